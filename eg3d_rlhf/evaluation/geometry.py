"""Compare geometry before and after tuning by measures that were not used in tuning.

The measures are the agreement of rendered views, the extracted surface, the density σ, and the frontal depth.
A reward reads density slabs that are normalised for each sample, so tuning may change the scale of the raw
density without changing the reward. The statistics of σ show whether this has happened.
Shapes: N latents, D x H x W grid points, V vertices, P points or pixels, R pixels per edge.
"""

from collections.abc import Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from eg3d_rlhf.core.field import Bounds, RenderOptions, render_each
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.evaluation.comparison import Comparison
from eg3d_rlhf.evaluation.paired import NO_CONTROL, ROLES, compare, plot_changes, plot_values
from eg3d_rlhf.experiments import style
from eg3d_rlhf.experiments.pages import Finding, Job
from eg3d_rlhf.generators import LoadedGenerator, camera
from eg3d_rlhf.geometry.mesh import extract_mesh
from eg3d_rlhf.measures.measure import Measure
from eg3d_rlhf.measures.surface import main_surface, mean_curvature, topology
from eg3d_rlhf.measures.views import MultiViewMeasures, lift, multi_view_measures, spec_for
from training.gan import save_grid

SHARE = 0.25  # share of the report's latents for views, surfaces and depth, which are slow to compute
# "yaws": yaws of the views, in radians from frontal; "samples": samples per ray in each of two passes
VIEWS = {"yaws": (-0.4, 0.0, 0.4), "samples": 32}
RESOLUTION = 96  # grid points per edge of the cube from which meshes are extracted
# Curvature is not measured within this number of grid steps from the cube's faces, where shapes are cut.
RIM_STEPS = 2
# The least radius of curvature in grid steps. The grid does not resolve smaller radii.
LARGEST_CURVATURE = 2
VIEW_MEASURES = (  # read from MultiViewMeasures
    Measure("depth disagreement", attrgetter("depth"), "lower", "share of the camera distance"),
    Measure("normal disagreement", attrgetter("normal"), "lower", "degrees"),
    Measure("photometric reprojection", attrgetter("photometric"), "lower", "L1 of 0..2"),
)
SURFACE_MEASURES = (  # computed by `mesh_values`
    Measure("mean |curvature|", None, "lower", "1/world unit"),
    Measure("components", None, "lower", "count"),
    Measure("holes", None, "lower", "handles and rims"),
    Measure("cavities", None, "lower", "count"),
    Measure("not watertight", None, "lower", "share"),
    Measure("loose volume", None, "lower", "share"),
)
SIGMA_RESOLUTION = 64  # grid points per edge of the whole cube
# Edges of the histogram's bins, raw density. Values above the last edge count in the last bin.
EDGES = np.concatenate([[0.0], np.logspace(-1, 4, 51)])
LARGEST = "largest σ"
POSITIVE = "positive σ"
SOLID = "solid σ"
SIGMA_MEASURES = (  # computed by `sigma_values`
    Measure(LARGEST, None, "", "raw density"),
    Measure(POSITIVE, None, "", "share of the cube"),
    Measure(SOLID, None, "", "share of the cube above the surface's level"),
)
SHOWN = 8  # number of latents in the depth image
LOOK = RenderOptions(resolution=64, samples=32)  # pixels per edge; samples per ray in each of two passes
OPACITY = 0.5  # a pixel is valid from this accumulated opacity on
# Windows of the face: least x, largest x, least y, largest y, relative to the cube's centre, in shares of its
# side.
FACE = (-0.10, 0.10, -0.16, 0.18)
NOSE = (-0.05, 0.05, -0.10, 0.0)
CHEEKS = ((-0.09, -0.035, -0.08, -0.025), (0.035, 0.09, -0.08, -0.025))
LEAST_PIXELS = 8  # least number of valid pixels in a window; with fewer its measure is missing
DEPTH_MEASURES = (  # computed by `measure_depth`
    Measure("valid pixels", None, "", "share of the image"),
    Measure("depth range of the face", None, "", "world units"),
    Measure("face relief", None, "", "world units"),
    Measure("nose prominence", None, "", "world units"),
)


def jobs(comparison: Comparison) -> list[Job]:
    """Return the jobs on views, surfaces and density. `depth_jobs` returns the job on depth."""
    latent_count = slow_latent_count(comparison)
    plots = {"values": plot_values, "changes": plot_changes}
    return [
        comparison.job(
            "view-consistency",
            "Do views of one shape agree?",
            view_consistency,
            plots,
            ROLES,
            n=latent_count,
            views=VIEWS,
        ),
        comparison.job(
            "surfaces",
            "Curvature, components, holes",
            surfaces,
            plots,
            ROLES,
            n=latent_count,
            resolution=RESOLUTION,
        ),
        comparison.job(
            "sigma-statistics",
            "Positive densities and the largest of each sample",
            sigma_statistics,
            {"histogram": plot_histogram, "largest": plot_largest},
            ROLES,
            version=2,
            n=comparison.n,
            resolution=SIGMA_RESOLUTION,
        ),
    ]


def slow_latent_count(comparison: Comparison) -> int:
    """Return the number of latents of the slower jobs, which is at least two, since an interval needs two."""
    return max(2, round(SHARE * comparison.n))


def view_consistency(comparison: Comparison, _folder: Path) -> Finding:
    """Compare how well neighbouring views of each latent agree.

    The measures are the disagreement of depth and of normals, and the photometric reprojection error.
    """
    seeds = comparison.seeds(slow_latent_count(comparison))
    measures_by_role = {
        role: view_measures(comparison, generator, seeds)
        for role, generator in comparison.generators().items()
    }
    # Agreement is measured only on pixels that two views share, so their share is stated.
    shared_pixel_texts = [f"{role} {views.covisible.mean():.0%}" for role, views in measures_by_role.items()]
    meaning = (
        f"Pixels that two neighbouring views share were compared ({', '.join(shared_pixel_texts)} of the"
        f" foreground), at yaws {VIEWS['yaws']} radians. Views that agree show that depth, normals and colour"
        " belong to one shape, not that the shape is a good head: a smooth ball agrees too."
    )
    return compare(
        comparison,
        seeds,
        measures_by_role,
        VIEW_MEASURES,
        [meaning, *([NO_CONTROL] if comparison.control is None else [])],
    )


def view_measures(
    comparison: Comparison, generator: LoadedGenerator, seeds: Sequence[int]
) -> MultiViewMeasures:
    """Compute the measures of agreement between views of each seed, [N] each."""
    views = spec_for(generator.generator, **VIEWS)
    # Half of the batch size, since several views of each shape are rendered.
    return multi_view_measures(
        generator.generator, comparison.ws(generator, seeds), views, batch=max(1, comparison.batch // 2)
    )


def surfaces(comparison: Comparison, _folder: Path) -> Finding:
    """Compare curvature, components, holes and cavities of the meshes that are extracted of each latent."""
    seeds = comparison.seeds(slow_latent_count(comparison))
    values_by_role = {
        role: surface_values(comparison, generator, seeds)
        for role, generator in comparison.generators().items()
    }
    # A paired comparison needs a surface in every network, so a latent that lacks one is left out.
    kept_indices = [
        latent_index
        for latent_index in range(len(seeds))
        if all(values[latent_index] is not None for values in values_by_role.values())
    ]
    skipped_seeds = [seed for latent_index, seed in enumerate(seeds) if latent_index not in kept_indices]
    notes = [
        (
            f"Meshes are the surface at the generator's own level (σ = {comparison.before.generator.level:g})"
            f" on {RESOLUTION}³ points. Curvature is the area-weighted mean of |H| on the largest component,"
            " without the neighbourhood of the cube's faces; lower is smoother, but smoother is not always"
            " better. Holes count handles (genus) and rims. The mesh is closed at the cube's faces, so holes"
            " there are not counted."
        ),
    ]
    notes += (
        [f"Left out, since one of the networks gives no surface: seeds {', '.join(map(str, skipped_seeds))}."]
        if skipped_seeds
        else []
    )
    # An interval needs at least two latents.
    if len(kept_indices) < 2:
        reason = (
            "Fewer than two latents have a surface in every network, so nothing can be compared. Check the"
            " checkpoints, or raise --n."
        )
        return Finding(
            facts=comparison.facts(seeds, ROLES),
            data={"measures": {}, "seeds": [], "absent": reason},
            says=[reason, *notes],
        )
    kept_values = {
        role: {
            measure.name: np.array(
                [
                    mesh[measure.name]
                    for latent_index in kept_indices
                    if (mesh := values[latent_index]) is not None
                ]
            )
            for measure in SURFACE_MEASURES
        }
        for role, values in values_by_role.items()
    }
    notes += [NO_CONTROL] if comparison.control is None else []
    return compare(
        comparison,
        [seeds[latent_index] for latent_index in kept_indices],
        kept_values,
        SURFACE_MEASURES,
        notes,
    )


@torch.no_grad()
def surface_values(
    comparison: Comparison, generator: LoadedGenerator, seeds: Sequence[int]
) -> list[dict[str, float] | None]:
    """Compute SURFACE_MEASURES of the mesh of each seed.

    The result of a seed is None if its density does not cross the generator's level.
    """
    spec = SlabSpec.from_bounds(generator.generator.bounds, RESOLUTION)
    level = generator.generator.level
    values_by_mesh: list[dict[str, float] | None] = []
    # A quarter of the batch size, since a grid has RESOLUTION^3 points per shape.
    for field in comparison.fields(generator, seeds, batch=max(1, comparison.batch // 4)):
        for sigma in field.density_grid(spec).cpu():
            # If no value or all values are above the level, there is no surface to extract.
            has_surface = float(sigma.min()) < level < float(sigma.max())
            values_by_mesh.append(
                mesh_values(*extract_mesh(sigma, spec, level), spec) if has_surface else None
            )
    return values_by_mesh


def mesh_values(vertices: np.ndarray, faces: np.ndarray, spec: SlabSpec) -> dict[str, float]:
    """Compute SURFACE_MEASURES of a mesh.

    Args:
        vertices: positions of the vertices, [V, 3].
        faces: indices of vertices, [F, 3].
        spec: grid from which the mesh was extracted.
    """
    topology_counts = topology(vertices, faces)
    # H: mean curvature at each vertex [V], 1 / world unit; area: area that belongs to each vertex [V]
    H, area = mean_curvature(vertices, main_surface(vertices, faces))
    # The largest of the distances to the centre along x, y and z; it is box_warp / 2 on the cube's faces.
    offset = np.abs(vertices - np.asarray(spec.centre, dtype=vertices.dtype)).max(axis=1)
    is_inner = (offset < spec.box_warp / 2 - RIM_STEPS * spec.voxel) & (area > 0)
    # A larger curvature than the grid can resolve is an artefact of the mesh, so it is bounded.
    bounded_curvature = np.minimum(np.abs(H[is_inner]), 1 / (LARGEST_CURVATURE * spec.voxel))
    return {
        "mean |curvature|": float(
            (bounded_curvature * area[is_inner]).sum() / max(area[is_inner].sum(), 1e-30)
        ),
        "components": float(topology_counts.parts),
        "holes": float(topology_counts.holes),
        "cavities": float(topology_counts.cavities),
        "not watertight": float(not topology_counts.watertight),
        "loose volume": 1.0 - topology_counts.main_share,
    }


def sigma_statistics(comparison: Comparison, _folder: Path) -> Finding:
    """Compare the raw density σ over the whole cube.

    Computed are a histogram of positive values over all latents, and for each latent the largest σ and the
    shares of the cube in which σ is positive or above the surface's level.
    """
    seeds = comparison.seeds()  # N held-out latents
    counts = {}  # by role
    values = {}  # by role
    # counts: [bins], over all samples; values: [N] for each measure
    for role, generator in comparison.generators().items():
        counts[role], values[role] = sigma_values(comparison, generator, seeds)
    histogram = {
        "edges": EDGES.tolist(),
        "counts": {role: role_counts.tolist() for role, role_counts in counts.items()},
        "level": comparison.before.generator.level,
    }
    meaning = (
        f"σ is the decoder's raw density on {SIGMA_RESOLUTION}³ points of the whole cube. The largest value"
        " has no best size: the reward rescales each slab by its range, so a few very dense voxels compress"
        " the rest of its input. A rise is a warning, not a defect."
    )
    return compare(
        comparison,
        seeds,
        values,
        SIGMA_MEASURES,
        notes=[meaning, *([NO_CONTROL] if comparison.control is None else [])],
        **histogram,
    )


@torch.no_grad()
def sigma_values(
    comparison: Comparison, generator: LoadedGenerator, seeds: range
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Compute the histogram [bins] of positive σ over all samples, and SIGMA_MEASURES, [N] each."""
    spec = SlabSpec.from_bounds(generator.generator.bounds, SIGMA_RESOLUTION)
    level = generator.generator.level
    counts = np.zeros(len(EDGES) - 1, dtype=np.int64)  # [bins]
    values = {measure.name: list[np.ndarray]() for measure in SIGMA_MEASURES}
    for field in comparison.fields(generator, seeds):
        # [n, D * H * W]
        sigma = field.density_grid(spec).flatten(1).cpu().numpy()
        # Values above the last edge are clipped, so that they count in the last bin. [0]: only the counts
        counts += np.histogram(np.minimum(sigma[sigma > 0], EDGES[-1]), EDGES)[0]
        values[LARGEST].append(sigma.max(axis=1).astype(np.float64))
        values[POSITIVE].append((sigma > 0).mean(axis=1))
        values[SOLID].append((sigma > level).mean(axis=1))
    return counts, {name: np.concatenate(batches) for name, batches in values.items()}


@style.plot()
def plot_histogram(axes, data: dict):
    """Plot the share of positive σ in each bin, as an outline for each role."""
    edges = np.asarray(data["edges"])  # [bins + 1]
    # The axis ends a little above the last bin that is not empty in any network.
    last_bin = max(
        int(np.flatnonzero(counts)[-1]) if any(counts) else 1 for counts in data["counts"].values()
    )
    for role, counts in data["counts"].items():
        bin_shares = np.asarray(counts) / max(1, sum(counts))  # shares of the positive values
        axes.stairs(
            bin_shares,
            # A logarithmic axis has no 0, so the first bin is drawn from one bin width (a factor of 1.26)
            # below its upper edge.
            np.concatenate([[edges[1] / 1.26], edges[1:]]),
            color=style.colour(role),
            label=role,
            linewidth=1.3,
            linestyle="--" if role == "control" else "-",
        )
    axes.axvline(data["level"], color=style.colour("noise"), linewidth=1)
    axes.set(
        xscale="log",
        xlabel="positive σ (first bin: all below 0.1; grey line: the surface)",
        ylabel="share of positive σ",
        title="Distribution of positive σ",
        xlim=(None, edges[min(last_bin + 4, len(edges) - 1)]),
    )


@style.plot(
    7, xlabel="largest σ of a sample", ylabel="share of latents at or below", title="Largest σ per sample"
)
def plot_largest(axes, data: dict):
    """Plot the cumulative distribution of the largest σ per sample."""
    measure = data["measures"][LARGEST]
    for role, values in measure["values"].items():
        ordered = np.sort(values)  # ascending
        mean = measure["means"][role]
        axes.plot(
            ordered,
            (np.arange(len(ordered)) + 1) / len(ordered),
            color=style.colour(role),
            label=f"{role}: mean {mean['mean']:.0f} [{mean['lo']:.0f}, {mean['hi']:.0f}]",
        )


# Frontal depth map of each latent: the relief of the face, and the pixels at which tuning changed the depth.


class DepthMaps(NamedTuple):
    """Frontal depth maps of N latents."""

    points: np.ndarray  # [N, R, R, 3] world positions along the pixels' rays
    valid: np.ndarray  # [N, R, R] bool; pixels whose ray meets a surface


def depth_jobs(comparison: Comparison) -> list[Job]:
    """Return the job on frontal depth, as a list of length one."""
    plots = {"measures": plot_values, "mean-change": plot_change}
    return [
        comparison.job(
            "canonical-depth",
            "Frontal depth: relief of the face",
            canonical_depth,
            plots,
            ROLES,
            version=2,
            n=slow_latent_count(comparison),
            resolution=LOOK.resolution,
            shown=SHOWN,
        )
    ]


def canonical_depth(comparison: Comparison, folder: Path) -> Finding:
    """Compare valid pixels, depth range, relief and nose prominence of each latent.

    Also compute the mean change of depth at each pixel, and write an image with depth maps into `folder`.
    """
    seeds = comparison.seeds(slow_latent_count(comparison))
    bounds = comparison.before.generator.bounds
    maps = {
        role: depth_maps(comparison, generator, seeds) for role, generator in comparison.generators().items()
    }
    values = {role: measure_depth(role_maps, bounds) for role, role_maps in maps.items()}
    change = {role: _change(maps["before"], maps[role]) for role in maps if role != "before"}
    finding = compare(comparison, seeds, values, DEPTH_MEASURES, change=change)
    shown_depth = np.concatenate([role_maps.points[:SHOWN, :, :, 2] for role_maps in maps.values()])
    # [roles * SHOWN, R, R]
    is_valid = np.concatenate([role_maps.valid[:SHOWN] for role_maps in maps.values()])
    # All networks have the same grey scale. Quantiles are used, so that single outliers do not determine it.
    low, high = np.quantile(shown_depth[is_valid], [0.02, 0.998]) if is_valid.any() else (0.0, 1.0)
    # Valid pixels have a brightness of at least 0.15, so that they differ from the black background.
    brightness = np.where(
        is_valid, 0.15 + 0.85 * np.clip((shown_depth - low) / max(high - low, 1e-9), 0, 1), 0.0
    )
    name = "canonical-depth.png"
    # Every pixel is doubled along both edges.
    save_grid(
        brightness[:, None].repeat(2, axis=2).repeat(2, axis=3), (0, 1), min(SHOWN, len(seeds)), folder / name
    )
    caption = (
        f"Frontal depth of seeds {seeds[0]}..{seeds[min(SHOWN, len(seeds)) - 1]}, rows {', '.join(maps)}:"
        " near is bright, one scale for all, black where nothing is hit."
    )
    missing_measures = [
        measure for measure, measure_data in finding.data["measures"].items() if not measure_data["paired"]
    ]
    notes = [
        *(
            [
                f"Fewer than two latents have {', '.join(missing_measures)}. These measures need aligned"
                " frontal heads."
            ]
            if missing_measures
            else []
        ),
        "These measures have no best value: a flattened face has less relief and nose, an exaggerated face"
        " has more. "
        + (
            "The simulated annotator also checks whether the face is kept, so these measures are not"
            " independent of it."
            if comparison.synthetic
            else "The windows of nose and cheeks fit aligned frontal heads only."
        ),
        *([NO_CONTROL] if comparison.control is None else []),
    ]
    return replace(finding, says=[*finding.says, *notes], images={caption: name})


@torch.no_grad()
def depth_maps(comparison: Comparison, generator: LoadedGenerator, seeds: range) -> DepthMaps:
    """Compute the world positions of the surface points that the frontal camera sees, for each seed.

    The noise inputs are constant and the rays have the same jitter in every call, so that networks can be
    compared.
    """
    points_by_batch = []
    valid_by_batch = []
    label = camera(generator.generator)  # [1, 25]
    pose = label[:, :16].reshape(1, 4, 4)
    intrinsics = label[0, 16:].reshape(3, 3)
    for field in comparison.fields(generator, seeds):
        (rendered,) = render_each(field, [label], LOOK, comparison.seed)
        # [n, 1, R, R]
        depth = rendered.depth.float()
        opacity = rendered.opacity.float()  # [n, 1, R, R]
        # The depth of pixels that are mostly transparent is not reliable.
        is_opaque = (opacity >= OPACITY) & depth.isfinite()
        lifted = lift(torch.where(is_opaque, depth, 0.0), pose, intrinsics)  # [n, 1, R, R, 3]
        points_by_batch.append(lifted[:, 0].double().cpu().numpy())
        valid_by_batch.append(is_opaque[:, 0].cpu().numpy())
    return DepthMaps(np.concatenate(points_by_batch), np.concatenate(valid_by_batch))


def measure_depth(maps: DepthMaps, bounds: Bounds) -> dict[str, np.ndarray]:
    """Compute DEPTH_MEASURES [N] of depth maps. A value is NaN if a window of the face has too few pixels.

    - Depth range: the difference between the 95th and the 5th percentile of z in the window of the face.
    - Relief: the root mean square difference between z and its best fit by a quadratic in x and y. The fit
      removes the roundness of a head, so that a flat face and a balloon have no relief.
    - Nose prominence: the 98th percentile of z in the window of the nose minus the mean of the 80th
      percentiles in the windows of the cheeks.

    Windows are fixed regions of the cube, where aligned heads have these parts.
    """
    values = {measure.name: np.full(len(maps.valid), np.nan) for measure in DEPTH_MEASURES}
    values["valid pixels"] = maps.valid.mean(axis=(1, 2))
    for latent_index, (points, is_valid) in enumerate(zip(maps.points, maps.valid, strict=True)):
        face = points[is_valid & _window(points, FACE, bounds)]
        if len(face) >= LEAST_PIXELS:
            low, high = np.quantile(face[:, 2], [0.05, 0.95])  # z
            # Positions in units of the cube's side, so that the least-squares problem is well conditioned.
            x, y, z = (face / bounds.side).T
            # [P, 6]: the terms of a quadratic in x and y
            terms = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=1)
            residual = float(np.sqrt(np.mean((z - terms @ np.linalg.lstsq(terms, z, rcond=None)[0]) ** 2)))
            values["depth range of the face"][latent_index], values["face relief"][latent_index] = (
                high - low,
                residual * bounds.side,
            )
        nose, *cheeks = (points[is_valid & _window(points, box, bounds)][:, 2] for box in (NOSE, *CHEEKS))
        if min(len(window_depths) for window_depths in (nose, *cheeks)) >= LEAST_PIXELS:
            values["nose prominence"][latent_index] = np.quantile(nose, 0.98) - np.mean(
                [np.quantile(cheek, 0.8) for cheek in cheeks]
            )
    return values


def _window(points: np.ndarray, box: tuple[float, float, float, float], bounds: Bounds) -> np.ndarray:
    """Return a mask [...] of the points [..., 3] inside a window.

    Args: box: least x, largest x, least y, largest y, relative to the cube's centre, in shares of its side.
    """
    x, y = ((points[..., i] - bounds.centre[i]) / bounds.side for i in (0, 1))
    return (x >= box[0]) & (x <= box[1]) & (y >= box[2]) & (y <= box[3])


def _change(maps_before: DepthMaps, maps_after: DepthMaps) -> dict:
    """Compute the mean change of z at each pixel [R, R], in world units.

    The mean is over the latents whose pixel is valid in both networks. It is None if these are fewer than
    half of the latents.
    """
    both_valid = maps_before.valid & maps_after.valid
    count = both_valid.sum(axis=0)  # number of latents, [R, R]
    # Pixels that are not valid in both networks add 0, and are not counted.
    total = np.where(both_valid, maps_after.points[..., 2] - maps_before.points[..., 2], 0.0).sum(axis=0)
    has_enough = count >= max(1, len(both_valid) / 2)  # [R, R]
    mean = np.where(has_enough, total / np.maximum(count, 1), np.nan)  # [R, R]
    rows = []
    for row in mean:
        # JSON has no NaN, so None stands for it. Six digits keep the file small.
        rows.append([None if not np.isfinite(change) else round(float(change), 6) for change in row])
    return {"mean": rows}


def plot_change(data: dict):
    """Plot the pixels at which the surface moved, on average, towards the camera (red) or away (blue)."""
    roles = list(data["change"])
    figure, axes = style.figure(columns=len(roles), size=(4.4 * len(roles), 3.4))  # inches
    change_maps = [
        np.array(
            [[np.nan if change is None else change for change in row] for row in data["change"][role]["mean"]]
        )
        for role in roles
    ]
    # All panels have the same scale, which is symmetric about 0. 1e-6 avoids an empty scale.
    largest_change = (
        max(
            [
                float(np.nanmax(np.abs(change_map)))
                for change_map in change_maps
                if np.isfinite(change_map).any()
            ],
            default=0.0,
        )
        or 1e-6
    )
    for axis, role, values in zip(np.atleast_1d(axes), roles, change_maps, strict=True):
        image = axis.imshow(
            values, cmap="RdBu_r", vmin=-largest_change, vmax=largest_change, interpolation="nearest"
        )
        axis.set(xticks=[], yticks=[], title=f"{role}: mean change of depth")
        axis.grid(False)
        figure.colorbar(image, ax=axis, label="towards the camera, world units")
    return figure
