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
from eg3d_rlhf.evaluation.paired import NO_CONTROL, ROLES, compare, plot_changes, plot_values, span
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
# The smallest radius of curvature in grid steps. The grid does not resolve smaller radii.
MIN_CURVATURE_RADIUS = 2
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
# Windows of a frontal head: (smallest x, largest x, smallest y, largest y), relative to the cube's centre, as
# shares of the cube's side.
FACE = (-0.10, 0.10, -0.16, 0.18)
NOSE = (-0.05, 0.05, -0.10, 0.0)
CHEEKS = ((-0.09, -0.035, -0.08, -0.025), (0.035, 0.09, -0.08, -0.025))
MIN_PIXELS = 8  # smallest number of valid pixels in a window; with fewer, its measures are NaN
DEPTH_MEASURES = (  # computed by `measure_depth`
    Measure("valid pixels", None, "", "share of the image"),
    Measure("depth range of the face", None, "", "world units"),
    Measure("face relief", None, "", "world units"),
    Measure("nose prominence", None, "", "world units"),
)


def jobs(comparison: Comparison) -> list[Job]:
    """Return the jobs on views, surfaces and density. `depth_jobs` returns the job on depth."""
    latent_count = slow_latent_count(comparison)
    plot_by_name = {"values": plot_values, "changes": plot_changes}
    return [
        comparison.job(
            "view-consistency",
            "Do views of one shape agree?",
            view_consistency,
            plot_by_name,
            ROLES,
            n=latent_count,
            views=VIEWS,
        ),
        comparison.job(
            "surfaces",
            "Curvature, components, holes",
            surfaces,
            plot_by_name,
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
    shared_pixel_texts = [
        f"{role} {role_measures.covisible.mean():.0%}" for role, role_measures in measures_by_role.items()
    ]
    meaning_text = (
        f"Pixels that two neighbouring views share were compared ({', '.join(shared_pixel_texts)} of the"
        f" foreground), at yaws {VIEWS['yaws']} radians. Views that agree show that depth, normals and colour"
        " belong to one shape, not that the shape is a good head: a smooth ball agrees too."
    )
    return compare(
        comparison,
        seeds,
        measures_by_role,
        VIEW_MEASURES,
        [meaning_text, *([NO_CONTROL] if comparison.control is None else [])],
    )


def view_measures(
    comparison: Comparison, generator: LoadedGenerator, seeds: Sequence[int]
) -> MultiViewMeasures:
    """Compute how well neighbouring views of each seed's shape agree: depth, normals and colour, [N] each."""
    view_spec = spec_for(generator.generator, **VIEWS)
    # Half of the batch size, since several views of each shape are rendered.
    return multi_view_measures(
        generator.generator, comparison.ws(generator, seeds), view_spec, batch=max(1, comparison.batch // 2)
    )


def surfaces(comparison: Comparison, _folder: Path) -> Finding:
    """Compare curvature, components, holes and cavities of the meshes that are extracted from the latents'
    shapes.
    """
    seeds = comparison.seeds(slow_latent_count(comparison))
    values_by_role = {
        role: surface_values(comparison, generator, seeds)
        for role, generator in comparison.generators().items()
    }
    # A paired comparison needs a surface in every network, so a latent that lacks one is left out.
    kept_indices = [
        latent_index
        for latent_index in range(len(seeds))
        if all(values_by_latent[latent_index] is not None for values_by_latent in values_by_role.values())
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
                    mesh_measures[measure.name]
                    for latent_index in kept_indices
                    if (mesh_measures := values_by_latent[latent_index]) is not None
                ]
            )
            for measure in SURFACE_MEASURES
        }
        for role, values_by_latent in values_by_role.items()
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
    """Extract the mesh of each seed's shape, and measure it.

    Returns: for each seed a dict from the names of SURFACE_MEASURES to values, or None if its density does
        not cross the generator's level, so that there is no mesh.
    """
    spec = SlabSpec.from_bounds(generator.generator.bounds, RESOLUTION)
    level = generator.generator.level
    values_by_mesh: list[dict[str, float] | None] = []
    # A quarter of the batch size, since a grid has RESOLUTION^3 points per shape.
    for field in comparison.fields(generator, seeds, batch_size=max(1, comparison.batch // 4)):
        for sigma in field.density_grid(spec).cpu():
            # If no value or all values are above the level, there is no surface to extract.
            has_surface = float(sigma.min()) < level < float(sigma.max())
            values_by_mesh.append(
                mesh_values(*extract_mesh(sigma, spec, level), spec) if has_surface else None
            )
    return values_by_mesh


def mesh_values(vertices: np.ndarray, faces: np.ndarray, spec: SlabSpec) -> dict[str, float]:
    """Measure the curvature and the topology of a mesh.

    Args:
        vertices: positions of the vertices, [V, 3].
        faces: indices of vertices, [F, 3].
        spec: grid from which the mesh was extracted.

    Returns: dict from the names of SURFACE_MEASURES to values.
    """
    topology_counts = topology(vertices, faces)
    # H: mean curvature at each vertex [V], 1 / world unit; area: area that belongs to each vertex [V]
    H, vertex_areas = mean_curvature(vertices, main_surface(vertices, faces))
    # The largest of the distances to the centre along x, y and z; it is box_warp / 2 on the cube's faces.
    centre_distances = np.abs(vertices - np.asarray(spec.centre, dtype=vertices.dtype)).max(axis=1)
    is_inner = (centre_distances < spec.box_warp / 2 - RIM_STEPS * spec.voxel) & (vertex_areas > 0)
    # A larger curvature than the grid can resolve is an artefact of the mesh, so it is bounded.
    bounded_curvature = np.minimum(np.abs(H[is_inner]), 1 / (MIN_CURVATURE_RADIUS * spec.voxel))
    return {
        "mean |curvature|": float(
            (bounded_curvature * vertex_areas[is_inner]).sum() / max(vertex_areas[is_inner].sum(), 1e-30)
        ),
        "components": float(topology_counts.parts),
        "holes": float(topology_counts.holes),
        "cavities": float(topology_counts.cavities),
        "not watertight": float(not topology_counts.watertight),
        "loose volume": 1.0 - topology_counts.main_share,
    }


def sigma_statistics(comparison: Comparison, _folder: Path) -> Finding:
    """Compare the raw density σ over the whole cube.

    The results are a histogram of positive values over all latents, and for each latent the largest σ and the
    shares of the cube in which σ is positive or above the surface's level.
    """
    seeds = comparison.seeds()  # N held-out latents
    counts_by_role = {}  # by role
    values_by_role = {}  # by role
    # counts: [bins], over all samples; values: [N] for each measure
    for role, generator in comparison.generators().items():
        counts_by_role[role], values_by_role[role] = sigma_values(comparison, generator, seeds)
    histogram_data = {
        "edges": EDGES.tolist(),
        "counts": {role: role_counts.tolist() for role, role_counts in counts_by_role.items()},
        "level": comparison.before.generator.level,
    }
    meaning_text = (
        f"σ is the decoder's raw density on {SIGMA_RESOLUTION}³ points of the whole cube. The largest value"
        " has no best size: the reward rescales each slab by its range, so a few very dense voxels compress"
        " the rest of its input. A rise is a warning, not a defect."
    )
    return compare(
        comparison,
        seeds,
        values_by_role,
        SIGMA_MEASURES,
        notes=[meaning_text, *([NO_CONTROL] if comparison.control is None else [])],
        **histogram_data,
    )


@torch.no_grad()
def sigma_values(
    comparison: Comparison, generator: LoadedGenerator, seeds: range
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Compute a histogram of positive σ, and statistics of σ for each sample.

    Returns: the counts [bins] of the histogram over all samples; and a dict from the names of SIGMA_MEASURES
        to values [N].
    """
    spec = SlabSpec.from_bounds(generator.generator.bounds, SIGMA_RESOLUTION)
    level = generator.generator.level
    bin_counts = np.zeros(len(EDGES) - 1, dtype=np.int64)  # [bins]
    batches_by_measure = {measure.name: list[np.ndarray]() for measure in SIGMA_MEASURES}
    for field in comparison.fields(generator, seeds):
        # [n, D * H * W]
        sigma = field.density_grid(spec).flatten(1).cpu().numpy()
        # Values above the last edge are clipped, so that they count in the last bin. [0]: only the counts
        bin_counts += np.histogram(np.minimum(sigma[sigma > 0], EDGES[-1]), EDGES)[0]
        batches_by_measure[LARGEST].append(sigma.max(axis=1).astype(np.float64))
        batches_by_measure[POSITIVE].append((sigma > 0).mean(axis=1))
        batches_by_measure[SOLID].append((sigma > level).mean(axis=1))
    return bin_counts, {
        measure_name: np.concatenate(value_batches)
        for measure_name, value_batches in batches_by_measure.items()
    }


@style.plot()
def plot_histogram(axes, finding_data: dict):
    """Plot the share of positive σ in each bin, as one outline for each network.

    Args: finding_data: data of the finding of `sigma_statistics`.
    """
    bin_edges = np.asarray(finding_data["edges"])  # [bins + 1]
    # The axis ends a little above the last bin that is not empty in any network.
    last_bin = max(
        int(np.flatnonzero(bin_counts)[-1]) if any(bin_counts) else 1
        for bin_counts in finding_data["counts"].values()
    )
    for role, bin_counts in finding_data["counts"].items():
        bin_shares = np.asarray(bin_counts) / max(1, sum(bin_counts))  # shares of the positive values
        axes.stairs(
            bin_shares,
            # A logarithmic axis has no 0, so the first bin is drawn from one bin width (a factor of 1.26)
            # below its upper edge.
            np.concatenate([[bin_edges[1] / 1.26], bin_edges[1:]]),
            color=style.colour(role),
            label=role,
            linewidth=1.3,
            linestyle="--" if role == "control" else "-",
        )
    axes.axvline(finding_data["level"], color=style.colour("noise"), linewidth=1)
    axes.set(
        xscale="log",
        xlabel="positive σ (first bin: all below 0.1; grey line: the surface)",
        ylabel="share of positive σ",
        title="Distribution of positive σ",
        xlim=(None, bin_edges[min(last_bin + 4, len(bin_edges) - 1)]),
    )


@style.plot(
    7, xlabel="largest σ of a sample", ylabel="share of latents at or below", title="Largest σ per sample"
)
def plot_largest(axes, finding_data: dict):
    """Plot the cumulative distribution of the largest σ per sample.

    Args: finding_data: data of the finding of `sigma_statistics`.
    """
    measure_data = finding_data["measures"][LARGEST]
    for role, largest_sigmas in measure_data["values"].items():
        sorted_sigmas = np.sort(largest_sigmas)  # ascending
        mean_interval = measure_data["means"][role]
        mean_text = span(mean_interval["mean"], mean_interval["lo"], mean_interval["hi"], ".0f")
        axes.plot(
            sorted_sigmas,
            (np.arange(len(sorted_sigmas)) + 1) / len(sorted_sigmas),
            color=style.colour(role),
            label=f"{role}: mean {mean_text}",
        )


# Frontal depth map of each latent: the relief of the face, and the pixels at which tuning changed the depth.


class DepthMaps(NamedTuple):
    """Frontal depth maps of N latents."""

    points: np.ndarray  # [N, R, R, 3] world positions along the pixels' rays
    valid: np.ndarray  # [N, R, R] bool; pixels whose ray meets a surface


def depth_jobs(comparison: Comparison) -> list[Job]:
    """Return a list with the job on frontal depth."""
    plot_by_name = {"measures": plot_values, "mean-change": plot_change}
    return [
        comparison.job(
            "canonical-depth",
            "Frontal depth: relief of the face",
            canonical_depth,
            plot_by_name,
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
    maps_by_role = {
        role: depth_maps(comparison, generator, seeds) for role, generator in comparison.generators().items()
    }
    values_by_role = {role: measure_depth(role_maps, bounds) for role, role_maps in maps_by_role.items()}
    change_by_role = {
        role: _change(maps_by_role["before"], maps_by_role[role]) for role in maps_by_role if role != "before"
    }
    finding = compare(comparison, seeds, values_by_role, DEPTH_MEASURES, change=change_by_role)
    shown_depth = np.concatenate([role_maps.points[:SHOWN, :, :, 2] for role_maps in maps_by_role.values()])
    # [roles * SHOWN, R, R]
    is_valid = np.concatenate([role_maps.valid[:SHOWN] for role_maps in maps_by_role.values()])
    # All networks have the same grey scale. Quantiles are used, so that single outliers do not determine it.
    low_depth, high_depth = (
        np.quantile(shown_depth[is_valid], [0.02, 0.998]) if is_valid.any() else (0.0, 1.0)
    )
    # Valid pixels have a brightness of at least 0.15, so that they differ from the black background.
    brightness = np.where(
        is_valid,
        0.15 + 0.85 * np.clip((shown_depth - low_depth) / max(high_depth - low_depth, 1e-9), 0, 1),
        0.0,
    )
    image_name = "canonical-depth.png"
    # Every pixel is doubled along both edges.
    save_grid(
        brightness[:, None].repeat(2, axis=2).repeat(2, axis=3),
        (0, 1),
        min(SHOWN, len(seeds)),
        folder / image_name,
    )
    caption = (
        f"Frontal depth of seeds {seeds[0]}..{seeds[min(SHOWN, len(seeds)) - 1]}, rows"
        f" {', '.join(maps_by_role)}: near is bright, one scale for all, black where nothing is hit."
    )
    missing_measures = [
        measure_name
        for measure_name, measure_data in finding.data["measures"].items()
        if not measure_data["paired"]
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
    return replace(finding, says=[*finding.says, *notes], images={caption: image_name})


@torch.no_grad()
def depth_maps(comparison: Comparison, generator: LoadedGenerator, seeds: range) -> DepthMaps:
    """Compute the world positions of the surface points that the frontal camera sees, for each seed.

    The noise inputs are constant and the rays have the same jitter in every call, so that networks can be
    compared.
    """
    points_by_batch = []
    valid_by_batch = []
    camera_label = camera(generator.generator)  # [1, 25]
    pose = camera_label[:, :16].reshape(1, 4, 4)
    intrinsics = camera_label[0, 16:].reshape(3, 3)
    for field in comparison.fields(generator, seeds):
        (rendering,) = render_each(field, [camera_label], LOOK, comparison.seed)
        # [n, 1, R, R]
        depth = rendering.depth.float()
        opacity = rendering.opacity.float()  # [n, 1, R, R]
        # The depth of pixels that are mostly transparent is not reliable.
        is_opaque = (opacity >= OPACITY) & depth.isfinite()
        surface_points = lift(torch.where(is_opaque, depth, 0.0), pose, intrinsics)  # [n, 1, R, R, 3]
        points_by_batch.append(surface_points[:, 0].double().cpu().numpy())
        valid_by_batch.append(is_opaque[:, 0].cpu().numpy())
    return DepthMaps(np.concatenate(points_by_batch), np.concatenate(valid_by_batch))


def measure_depth(depth_maps_of_latents: DepthMaps, bounds: Bounds) -> dict[str, np.ndarray]:
    """Compute four measures of each frontal depth map, from the world position of every pixel.

    A window is a rectangle in x and y, relative to the cube, in which the part of an aligned frontal head
    lies: the face, the nose or a cheek. z points towards the camera.

    - Valid pixels: the share of the pixels that show a surface.
    - Depth range of the face: the difference between the 95th and the 5th percentile of z in the window of
      the face.
    - Face relief: the root mean square difference between z and its least-squares fit by a quadratic in x and
      y, in the window of the face. The fit removes the roundness of a head, so that a flat face and a balloon
      have no relief.
    - Nose prominence: the 98th percentile of z in the window of the nose minus the mean of the 80th
      percentiles of z in the windows of the two cheeks.

    Args:
        depth_maps_of_latents: depth maps of N latents.
        bounds: cube of the generator, to which the windows are relative.

    Returns: dict from the names of DEPTH_MEASURES to values [N] float64. Lengths are in world units. A value
        is NaN if a window that it needs has fewer than MIN_PIXELS valid pixels.
    """
    values_by_measure = {
        measure.name: np.full(len(depth_maps_of_latents.valid), np.nan) for measure in DEPTH_MEASURES
    }
    values_by_measure["valid pixels"] = depth_maps_of_latents.valid.mean(axis=(1, 2))
    for latent_index, (pixel_points, is_valid) in enumerate(
        zip(depth_maps_of_latents.points, depth_maps_of_latents.valid, strict=True)
    ):
        face_points = pixel_points[is_valid & _window(pixel_points, FACE, bounds)]
        if len(face_points) >= MIN_PIXELS:
            low_depth, high_depth = np.quantile(face_points[:, 2], [0.05, 0.95])  # z
            # Positions in units of the cube's side, so that the least-squares problem is well conditioned.
            x, y, z = (face_points / bounds.side).T
            # [P, 6]: the design matrix of the least-squares fit
            quadratic_terms = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=1)
            rms_residual = float(
                np.sqrt(
                    np.mean((z - quadratic_terms @ np.linalg.lstsq(quadratic_terms, z, rcond=None)[0]) ** 2)
                )
            )
            (
                values_by_measure["depth range of the face"][latent_index],
                values_by_measure["face relief"][latent_index],
            ) = (
                high_depth - low_depth,
                rms_residual * bounds.side,
            )
        nose_depths, *cheek_depths = (
            pixel_points[is_valid & _window(pixel_points, window, bounds)][:, 2] for window in (NOSE, *CHEEKS)
        )
        if min(len(window_depths) for window_depths in (nose_depths, *cheek_depths)) >= MIN_PIXELS:
            values_by_measure["nose prominence"][latent_index] = np.quantile(nose_depths, 0.98) - np.mean(
                [np.quantile(depths, 0.8) for depths in cheek_depths]
            )
    return values_by_measure


def _window(points: np.ndarray, window: tuple[float, float, float, float], bounds: Bounds) -> np.ndarray:
    """Return a mask [...] of the points [..., 3] inside a window.

    Args: window: smallest x, largest x, smallest y and largest y, relative to the cube's centre, as shares of
        the cube's side.
    """
    x, y = ((points[..., i] - bounds.centre[i]) / bounds.side for i in (0, 1))
    return (x >= window[0]) & (x <= window[1]) & (y >= window[2]) & (y <= window[3])


def _change(maps_before: DepthMaps, maps_after: DepthMaps) -> dict:
    """Compute the mean change of z at each pixel between the depth maps of two networks.

    The mean is over the latents for which the pixel is valid in the maps of both networks. It is None if
    these are fewer than half of the latents.

    Args:
        maps_before: depth maps before tuning.
        maps_after: depth maps of the same latents after tuning, or of the control.

    Returns: {"mean": nested list [R, R] of numbers in world units, or None}.
    """
    is_valid_in_both = maps_before.valid & maps_after.valid
    latent_counts = is_valid_in_both.sum(axis=0)  # number of latents, [R, R]
    # Pixels that are not valid in both networks add 0, and are not counted.
    summed_changes = np.where(
        is_valid_in_both, maps_after.points[..., 2] - maps_before.points[..., 2], 0.0
    ).sum(axis=0)
    has_enough_latents = latent_counts >= max(1, len(is_valid_in_both) / 2)  # [R, R]
    mean_changes = np.where(
        has_enough_latents, summed_changes / np.maximum(latent_counts, 1), np.nan
    )  # [R, R]
    json_rows = []
    for pixel_row in mean_changes:
        # JSON has no NaN, so it is written as None. Six digits keep the file small.
        json_rows.append(
            [
                None if not np.isfinite(mean_change) else round(float(mean_change), 6)
                for mean_change in pixel_row
            ]
        )
    return {"mean": json_rows}


def plot_change(finding_data: dict):
    """Plot the pixels at which the surface moved, on average, towards the camera (red) or away (blue).

    Args: finding_data: data of the finding of `canonical_depth`.
    """
    roles = list(finding_data["change"])
    figure, axes = style.figure(column_count=len(roles), size=(4.4 * len(roles), 3.4))  # inches
    change_maps = [
        np.array(
            [
                [np.nan if mean_change is None else mean_change for mean_change in pixel_row]
                for pixel_row in finding_data["change"][role]["mean"]
            ]
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
    for axis, role, shown_changes in zip(np.atleast_1d(axes), roles, change_maps, strict=True):
        image = axis.imshow(
            shown_changes, cmap="RdBu_r", vmin=-largest_change, vmax=largest_change, interpolation="nearest"
        )
        axis.set(xticks=[], yticks=[], title=f"{role}: mean change of depth")
        axis.grid(False)
        figure.colorbar(image, ax=axis, label="towards the camera, world units")
    return figure
