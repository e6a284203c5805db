"""Compare geometry before and after tuning by measures that were not used in tuning: agreement of views,
extracted surface, density, frontal depth.

A reward reads slabs that are normalised per sample, so the raw scale of the density is free. Its statistics
show whether tuning changed it.
Letters: N latents, D, H, W grid points, V vertices, F faces, R pixels per edge.
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

# share of the report's latents for views, surfaces and depth; rendering the views is the slowest part
SHARE = 0.25
# yaw in radians from frontal; samples per ray in each of two passes
VIEWS = {"yaws": (-0.4, 0.0, 0.4), "samples": 32}
RESOLUTION = 96  # grid points per edge of the cube from which meshes are extracted
# grid steps from the cube's faces within which curvature is not measured: bodies are cut and capped there
RIM_STEPS = 2
LARGEST_CURVATURE = 2  # grid steps: a smaller radius of curvature is not resolved, and counts as this one
VIEW_MEASURES = (  # of MultiViewMeasures
    Measure("depth disagreement", attrgetter("depth"), "lower", "share of the camera distance"),
    Measure("normal disagreement", attrgetter("normal"), "lower", "degrees"),
    Measure("photometric reprojection", attrgetter("photometric"), "lower", "L1 of 0..2"),
)
SURFACE_MEASURES = (  # of `mesh_values`
    Measure("mean |curvature|", None, "lower", "1/world unit"),
    Measure("components", None, "lower", "count"),
    Measure("holes", None, "lower", "handles and rims"),
    Measure("cavities", None, "lower", "count"),
    Measure("not watertight", None, "lower", "share"),
    Measure("loose volume", None, "lower", "share"),
)
SIGMA_RESOLUTION = 64  # grid points per edge of the whole cube
# raw density; values above the last edge count in the last bin
EDGES = np.concatenate([[0.0], np.logspace(-1, 4, 51)])
LARGEST = "largest σ"
POSITIVE = "positive σ"
SOLID = "solid σ"
SIGMA_MEASURES = (  # of `sigma_values`
    Measure(LARGEST, None, "", "raw density"),
    Measure(POSITIVE, None, "", "share of the cube"),
    Measure(SOLID, None, "", "share of the cube above the surface's level"),
)
SHOWN = 8  # latents in the image
LOOK = RenderOptions(resolution=64, samples=32)  # pixels per edge; samples per ray in each of two passes
OPACITY = 0.5  # accumulated opacity from which a pixel is valid
# Windows of the face: x from, x to, y from, y to, as shares of the cube, from its centre.
FACE = (-0.10, 0.10, -0.16, 0.18)
NOSE = (-0.05, 0.05, -0.10, 0.0)
CHEEKS = ((-0.09, -0.035, -0.08, -0.025), (0.035, 0.09, -0.08, -0.025))
LEAST_PIXELS = 8  # least number of valid pixels in a window; with fewer its measure is missing
DEPTH_MEASURES = (  # of `measures`
    Measure("valid pixels", None, "", "share of the image"),
    Measure("depth range of the face", None, "", "world units"),
    Measure("face relief", None, "", "world units"),
    Measure("nose prominence", None, "", "world units"),
)


def jobs(comparison: Comparison) -> list[Job]:
    """Return the parts on views, surfaces and density; `depth_jobs` has those on depth."""
    n = latents(comparison)
    plots = {"values": plot_values, "changes": plot_changes}
    return [
        comparison.job(
            "view-consistency",
            "Do views of one shape agree?",
            view_consistency,
            plots,
            ROLES,
            n=n,
            views=VIEWS,
        ),
        comparison.job(
            "surfaces", "Curvature, components, holes", surfaces, plots, ROLES, n=n, resolution=RESOLUTION
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


def latents(comparison: Comparison) -> int:
    """Return the number of latents of the slower parts, at least two for an interval."""
    return max(2, round(SHARE * comparison.n))


def view_consistency(comparison: Comparison, _folder: Path) -> Finding:
    """Compare depth and normal disagreement and the photometric reprojection error of neighbouring views, per
    latent.
    """
    seeds = comparison.seeds(latents(comparison))
    seen = {
        role: view_measures(comparison, generator, seeds)
        for role, generator in comparison.generators().items()
    }
    # Agreement is measured on shared pixels only, so their share is stated.
    compared = [f"{role} {views.covisible.mean():.0%}" for role, views in seen.items()]
    meaning = (
        f"Pixels that two neighbouring views share were compared ({', '.join(compared)} of the foreground),"
        f" at yaws {VIEWS['yaws']} radians. Views that agree show that depth, normals and colour belong to"
        " one shape, not that the shape is a good head: a smooth ball agrees too."
    )
    return compare(
        comparison,
        seeds,
        seen,
        VIEW_MEASURES,
        [meaning, *([NO_CONTROL] if comparison.control is None else [])],
    )


def view_measures(
    comparison: Comparison, generator: LoadedGenerator, seeds: Sequence[int]
) -> MultiViewMeasures:
    """Compute the view measures of seeds, [N] each."""
    views = spec_for(generator.generator, **VIEWS)
    # Half the batch: several views of each shape are rendered.
    return multi_view_measures(
        generator.generator, comparison.ws(generator, seeds), views, batch=max(1, comparison.batch // 2)
    )


def surfaces(comparison: Comparison, _folder: Path) -> Finding:
    """Compare curvature, components, holes and cavities of the extracted meshes, per latent."""
    seeds = comparison.seeds(latents(comparison))
    meshes = {
        role: surface_values(comparison, generator, seeds)
        for role, generator in comparison.generators().items()
    }
    # Pairs need a surface in every network: a latent that lacks one is left out everywhere.
    kept = [i for i in range(len(seeds)) if all(values[i] is not None for values in meshes.values())]
    lost = [seed for i, seed in enumerate(seeds) if i not in kept]
    notes = [
        (
            f"Meshes are the surface at the generator's own level (σ = {comparison.before.generator.level:g}) on"
            f" {RESOLUTION}³ points. Curvature is the area-weighted mean of |H| on the largest component,"
            " without the neighbourhood of the cube's faces; lower is smoother, but smoother is not always"
            " better. Holes count handles (genus) and rims; the mesher caps a body at the cube's faces, so"
            " a leak there is not seen."
        ),
    ]
    notes += (
        [f"Left out, since one of the networks gives no surface there: seeds {', '.join(map(str, lost))}."]
        if lost
        else []
    )
    # One pair has no interval.
    if len(kept) < 2:
        why = (
            "Fewer than two latents have a surface in every network, so nothing can be compared. Check the"
            " checkpoints, or raise --n."
        )
        return Finding(
            facts=comparison.facts(seeds, ROLES),
            data={"measures": {}, "seeds": [], "absent": why},
            says=[why, *notes],
        )
    columns = {
        role: {
            m.name: np.array([mesh[m.name] for i in kept if (mesh := values[i]) is not None])
            for m in SURFACE_MEASURES
        }
        for role, values in meshes.items()
    }
    notes += [NO_CONTROL] if comparison.control is None else []
    return compare(comparison, [seeds[i] for i in kept], columns, SURFACE_MEASURES, notes)


@torch.no_grad()
def surface_values(
    comparison: Comparison, generator: LoadedGenerator, seeds: Sequence[int]
) -> list[dict[str, float] | None]:
    """Compute SURFACE_MEASURES of each seed's mesh; None if the density does not cross the level."""
    spec = SlabSpec.of(generator.generator.bounds, RESOLUTION)
    level = generator.generator.level
    meshes: list[dict[str, float] | None] = []
    # A quarter of the batch, since a grid has RESOLUTION^3 points per shape.
    for field in comparison.fields(generator, seeds, batch=max(1, comparison.batch // 4)):
        for sigma in field.density_grid(spec).cpu():
            # Without a crossing the mesher has no surface to extract.
            crossed = float(sigma.min()) < level < float(sigma.max())
            meshes.append(mesh_values(*extract_mesh(sigma, spec, level), spec) if crossed else None)
    return meshes


def mesh_values(vertices: np.ndarray, faces: np.ndarray, spec: SlabSpec) -> dict[str, float]:
    """Compute SURFACE_MEASURES of one mesh of a cube sampled with `spec`."""
    shape = topology(vertices, faces)
    # H: mean curvature per vertex [V], 1/world unit; area: the vertices' areas [V]
    H, area = mean_curvature(vertices, main_surface(vertices, faces))
    # Largest distance to the centre along an axis: distance from the cube's faces
    offset = np.abs(vertices - np.asarray(spec.centre, dtype=vertices.dtype)).max(axis=1)
    inner = (offset < spec.box_warp / 2 - RIM_STEPS * spec.voxel) & (area > 0)
    # Curvature above the grid's resolution is an artefact of the mesh.
    bounded_curvature = np.minimum(np.abs(H[inner]), 1 / (LARGEST_CURVATURE * spec.voxel))
    return {
        "mean |curvature|": float((bounded_curvature * area[inner]).sum() / max(area[inner].sum(), 1e-30)),
        "components": float(shape.parts),
        "holes": float(shape.holes),
        "cavities": float(shape.cavities),
        "not watertight": float(not shape.watertight),
        "loose volume": 1.0 - shape.main_share,
    }


def sigma_statistics(comparison: Comparison, _folder: Path) -> Finding:
    """Compare the raw σ over the whole cube: a histogram of positive values, and per latent the largest σ and
    the shares of the cube that are positive and solid.
    """
    seeds = comparison.seeds()
    counts = {}
    values = {}
    # counts [bins] over all samples; values [N] per measure
    for role, generator in comparison.generators().items():
        counts[role], values[role] = sigma_values(comparison, generator, seeds)
    histogram = {
        "edges": EDGES.tolist(),
        "counts": {role: v.tolist() for role, v in counts.items()},
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
    """Count positive values over all samples, [bins], and compute SIGMA_MEASURES [N]."""
    spec = SlabSpec.of(generator.generator.bounds, SIGMA_RESOLUTION)
    level = generator.generator.level
    counts = np.zeros(len(EDGES) - 1, dtype=np.int64)
    values = {m.name: list[np.ndarray]() for m in SIGMA_MEASURES}
    for field in comparison.fields(generator, seeds):
        # [n, D * H * W]
        sigma = field.density_grid(spec).flatten(1).cpu().numpy()
        # Clipped, so that values above the last edge count in the last bin.
        counts += np.histogram(np.minimum(sigma[sigma > 0], EDGES[-1]), EDGES)[0]
        values[LARGEST].append(sigma.max(axis=1).astype(np.float64))
        values[POSITIVE].append((sigma > 0).mean(axis=1))
        values[SOLID].append((sigma > level).mean(axis=1))
    return counts, {name: np.concatenate(parts) for name, parts in values.items()}


@style.plot()
def plot_histogram(axes, data: dict):
    """Plot the share of positive σ per bin, one outline per role."""
    edges = np.asarray(data["edges"])
    # The last bin that any network fills bounds the axis.
    top = max(int(np.flatnonzero(counts)[-1]) if any(counts) else 1 for counts in data["counts"].values())
    for role, counts in data["counts"].items():
        share = np.asarray(counts) / max(1, sum(counts))
        axes.stairs(
            share,
            # A logarithmic axis has no 0: the first bin begins one bin width (a factor of 1.26) below its
            # upper edge.
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
        xlim=(None, edges[min(top + 4, len(edges) - 1)]),
    )


@style.plot(
    7, xlabel="largest σ of a sample", ylabel="share of latents at or below", title="Largest σ per sample"
)
def plot_largest(axes, data: dict):
    """Plot the cumulative distribution of the largest σ per sample."""
    measure = data["measures"][LARGEST]
    for role, values in measure["values"].items():
        ordered = np.sort(values)
        mean = measure["means"][role]
        axes.plot(
            ordered,
            (np.arange(len(ordered)) + 1) / len(ordered),
            color=style.colour(role),
            label=f"{role}: mean {mean['mean']:.0f} [{mean['lo']:.0f}, {mean['hi']:.0f}]",
        )


# Frontal depth map of each latent: relief of the face, and where tuning changed it.


class DepthMaps(NamedTuple):
    """Frontal depth maps of N latents."""

    points: np.ndarray  # [N, R, R, 3] world positions along the pixels' rays
    valid: np.ndarray  # [N, R, R] bool; pixels whose ray meets a surface


def depth_jobs(comparison: Comparison) -> list[Job]:
    """Return the part on frontal depth."""
    plots = {"measures": plot_values, "mean-change": plot_change}
    return [
        comparison.job(
            "canonical-depth",
            "Frontal depth: relief of the face",
            canonical_depth,
            plots,
            ROLES,
            version=2,
            n=latents(comparison),
            resolution=LOOK.resolution,
            shown=SHOWN,
        )
    ]


def canonical_depth(comparison: Comparison, folder: Path) -> Finding:
    """Compare valid pixels, depth range, relief and nose prominence per latent; show the mean change of depth
    at each pixel, and depth images.
    """
    seeds = comparison.seeds(latents(comparison))
    bounds = comparison.before.generator.bounds
    maps = {
        role: depth_maps(comparison, generator, seeds) for role, generator in comparison.generators().items()
    }
    values = {role: measures(role_maps, bounds) for role, role_maps in maps.items()}
    change = {role: _change(maps["before"], maps[role]) for role in maps if role != "before"}
    finding = compare(comparison, seeds, values, DEPTH_MEASURES, change=change)
    z = np.concatenate([role_maps.points[:SHOWN, :, :, 2] for role_maps in maps.values()])
    valid = np.concatenate([role_maps.valid[:SHOWN] for role_maps in maps.values()])
    # One grey scale for all networks; the quantiles ignore stray pixels.
    low, high = np.quantile(z[valid], [0.02, 0.998]) if valid.any() else (0.0, 1.0)
    # Hit pixels are at least .15 bright, so that they differ from black, which is no hit.
    shade = np.where(valid, 0.15 + 0.85 * np.clip((z - low) / max(high - low, 1e-9), 0, 1), 0.0)
    name = "canonical-depth.png"
    # Every pixel is doubled along both edges.
    save_grid(
        shade[:, None].repeat(2, axis=2).repeat(2, axis=3), (0, 1), min(SHOWN, len(seeds)), folder / name
    )
    caption = (
        f"Frontal depth of seeds {seeds[0]}..{seeds[min(SHOWN, len(seeds)) - 1]}, rows {', '.join(maps)}:"
        " near is bright, one scale for all, black where nothing is hit."
    )
    missing = [measure for measure, entry in finding.data["measures"].items() if not entry["paired"]]
    notes = [
        *([f"Hardly any latent has {', '.join(missing)}. Are these aligned heads?"] if missing else []),
        "These are diagnostics without a best value: a flattened face loses relief and nose, an exaggerated"
        " one gains them. "
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
    """Compute the world points of the frontal camera's pixels, with constant noise and the same ray jitter in
    every call.
    """
    points = []
    valid = []
    label = camera(generator.generator)  # [1, 25]
    pose = label[:, :16].reshape(1, 4, 4)
    intrinsics = label[0, 16:].reshape(3, 3)
    for field in comparison.fields(generator, seeds):
        (seen,) = render_each(field, [label], LOOK, comparison.seed)
        # [n, 1, R, R]
        depth = seen.depth.float()
        opacity = seen.opacity.float()
        # Pixels that are mostly transparent have no reliable depth.
        solid = (opacity >= OPACITY) & depth.isfinite()
        lifted = lift(torch.where(solid, depth, 0.0), pose, intrinsics)  # [n, 1, R, R, 3]
        points.append(lifted[:, 0].double().cpu().numpy())
        valid.append(solid[:, 0].cpu().numpy())
    return DepthMaps(np.concatenate(points), np.concatenate(valid))


def measures(maps: DepthMaps, bounds: Bounds) -> dict[str, np.ndarray]:
    """Compute DEPTH_MEASURES [N] of depth maps; NaN if a window of the face has too few pixels.

    Depth range: 5th to 95th percentile of z in the window of the face. Relief: RMS of z about its best fit by
    a quadratic in x and y. The fit removes the roundness of a head, so that a flat or a balloon-like face has
    no relief. Nose prominence: 98th percentile of z in the nose's window minus the mean of the cheeks' 80th
    percentiles. Windows are fixed regions of the cube where aligned heads have these parts.
    """
    values = {m.name: np.full(len(maps.valid), np.nan) for m in DEPTH_MEASURES}
    values["valid pixels"] = maps.valid.mean(axis=(1, 2))
    for i, (points, valid) in enumerate(zip(maps.points, maps.valid, strict=True)):
        face = points[valid & _window(points, FACE, bounds)]
        if len(face) >= LEAST_PIXELS:
            low, high = np.quantile(face[:, 2], [0.05, 0.95])
            # In shares of the cube's side, so that the least-squares problem is well scaled.
            x, y, z = (face / bounds.side).T
            # [P, 6]: quadratic in x and y
            terms = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=1)
            residual = float(np.sqrt(np.mean((z - terms @ np.linalg.lstsq(terms, z, rcond=None)[0]) ** 2)))
            values["depth range of the face"][i], values["face relief"][i] = (
                high - low,
                residual * bounds.side,
            )
        nose, *cheeks = (points[valid & _window(points, box, bounds)][:, 2] for box in (NOSE, *CHEEKS))
        if min(len(part) for part in (nose, *cheeks)) >= LEAST_PIXELS:
            values["nose prominence"][i] = np.quantile(nose, 0.98) - np.mean(
                [np.quantile(cheek, 0.8) for cheek in cheeks]
            )
    return values


def _window(points: np.ndarray, box: tuple[float, float, float, float], bounds: Bounds) -> np.ndarray:
    """Return True for points [..., 3] inside a window."""
    x, y = ((points[..., i] - bounds.centre[i]) / bounds.side for i in (0, 1))
    return (x >= box[0]) & (x <= box[1]) & (y >= box[2]) & (y <= box[3])


def _change(before: DepthMaps, after: DepthMaps) -> dict:
    """Compute the mean change of z [R, R] over the latents that are valid in both, in world units.

    A pixel is None if fewer than half of the latents are valid there.
    """
    both = before.valid & after.valid
    count = both.sum(axis=0)
    # Invalid pixels add 0 and are not counted.
    total = np.where(both, after.points[..., 2] - before.points[..., 2], 0.0).sum(axis=0)
    seen = count >= max(1, len(both) / 2)
    mean = np.where(seen, total / np.maximum(count, 1), np.nan)
    # JSON has no NaN.
    return {"mean": [[None if not np.isfinite(v) else round(float(v), 6) for v in row] for row in mean]}


def plot_change(data: dict):
    """Plot where, on average, the surface moved towards the camera (red) or away from it (blue)."""
    roles = list(data["change"])
    figure, axes = style.figure(columns=len(roles), size=(4.4 * len(roles), 3.4))
    fields = [
        np.array([[np.nan if v is None else v for v in row] for row in data["change"][role]["mean"]])
        for role in roles
    ]
    # One symmetric scale for all panels.
    top = max([float(np.nanmax(np.abs(f))) for f in fields if np.isfinite(f).any()], default=0.0) or 1e-6
    for axis, role, values in zip(np.atleast_1d(axes), roles, fields, strict=True):
        shown = axis.imshow(values, cmap="RdBu_r", vmin=-top, vmax=top, interpolation="nearest")
        axis.set(xticks=[], yticks=[], title=f"{role}: mean change of depth")
        axis.grid(False)
        figure.colorbar(shown, ax=axis, label="towards the camera, world units")
    return figure
