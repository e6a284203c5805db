"""Geometry before and after, by measures that took no part in tuning: agreement of views, the extracted surface, the density itself.

A reward reads slabs on each sample's own scale, so the density's raw scale is free: its statistics show whether tuning used that freedom.
Letters: N latents, D, H, W grid points, V vertices, F faces.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from eg3d_rlhf.evaluation.comparison import Comparison
from eg3d_rlhf.evaluation.paired import NO_CONTROL, ROLES, compare, lower_is_better, plot_changes, plot_values
from eg3d_rlhf.generators import LoadedGenerator
from eg3d_rlhf.metrics.surface import main_surface, mean_curvature, topology
from eg3d_rlhf.metrics.views import MultiViewMeasures, multi_view_measures, spec_for
from eg3d_rlhf.reports import style
from eg3d_rlhf.reports.jobs import Finding, Job
from eg3d_rlhf.sigma.mesh import extract_mesh
from eg3d_rlhf.sigma.spec import SlabSpec

SHARE = 0.25  # of the report's latents; the rendered views are the most expensive part of it
VIEWS = {"yaws": (-0.4, 0.0, 0.4), "samples": 32}  # radians from frontal; samples per ray in each of two passes
RESOLUTION = 96  # grid points per edge of the cube that meshes come from
RIM_STEPS = 2  # grid steps from the cube's faces within which curvature is not taken: a body is cut and capped there
LARGEST_CURVATURE = 2  # grid steps: a radius below this is not resolved, and counts as this
VIEW_MEASURES = {
    "depth disagreement": "share of the camera distance", "normal disagreement": "degrees", "photometric reprojection": "L1 of 0..2",
}
SURFACE_MEASURES = {
    "mean |curvature|": "1/world unit", "components": "count", "holes": "handles and rims", "cavities": "count", "not watertight": "share",
    "loose volume": "share",
}
SIGMA_RESOLUTION = 64  # grid points per edge of the whole cube
EDGES = np.concatenate([[0.0], np.logspace(-1, 4, 51)])  # raw density; values above the last edge count in the last bin
LARGEST, POSITIVE, SOLID = "largest σ", "positive σ", "solid σ"
SIGMA_MEASURES = {LARGEST: "raw density", POSITIVE: "share of the cube", SOLID: "share of the cube above the surface's level"}


def jobs(c: Comparison) -> list[Job]:
    """Multi-view agreement, surfaces, density."""
    n = latents(c)
    plots = {"values": plot_values, "changes": plot_changes}
    return [
        c.job("view-consistency", "Do views of one shape agree?", view_consistency, plots, ROLES, n=n, views=VIEWS),
        c.job("surfaces", "Curvature, components, holes", surfaces, plots, ROLES, n=n, resolution=RESOLUTION),
        c.job("sigma-statistics", "Positive densities and the largest of each sample", sigma_statistics,
              {"histogram": plot_histogram, "largest": plot_largest}, ROLES, version=2, n=c.n, resolution=SIGMA_RESOLUTION),
    ]


def latents(c: Comparison) -> int:
    """How many latents views and surfaces take."""
    return max(2, round(SHARE * c.n))


def view_consistency(c: Comparison, _folder: Path) -> Finding:
    """Depth and normal disagreement and photometric reprojection error of neighbouring views, per latent."""
    seeds, values, compared = c.seeds(latents(c)), {}, []
    for role, generator in c.generators().items():
        found = view_measures(c, generator, seeds)
        values[role] = dict(zip(VIEW_MEASURES, (found.depth, found.normal, found.photometric), strict=True))
        compared.append(f"{role} {found.covisible.mean():.0%}")
    meaning = (
        f"Pixels that two neighbouring views share were compared ({', '.join(compared)} of the foreground), at yaws {VIEWS['yaws']} "
        "radians. Views that agree show that depth, normals and colour belong to one shape, not that it is a good head: a smooth ball "
        "agrees too."
    )
    return _with(c, compare(c, seeds, values, VIEW_MEASURES, lower_is_better), meaning)


def view_measures(
    c: Comparison, generator: LoadedGenerator, seeds: Sequence[int], on_batch: Callable[[int], None] | None = None
) -> MultiViewMeasures:
    """How well neighbouring views of each latent agree."""
    views = spec_for(generator.generator, **VIEWS)
    return multi_view_measures(generator.generator, c.ws(generator, seeds), views, batch=max(1, c.batch // 2), on_batch=on_batch)


def _with(c: Comparison, finding: Finding, *notes: str) -> Finding:
    """A finding that says more."""
    return replace(finding, says=[*finding.says, *notes, *([NO_CONTROL] if c.control is None else [])])


def surfaces(c: Comparison, _folder: Path) -> Finding:
    """Curvature, components, holes and cavities of the extracted meshes, per latent."""
    seeds = c.seeds(latents(c))
    values = {role: surface_values(c, generator, seeds) for role, generator in c.generators().items()}
    kept = [i for i in range(len(seeds)) if all(found[i] is not None for found in values.values())]
    lost = [seed for i, seed in enumerate(seeds) if i not in kept]
    notes = [
        f"Meshes are the surface at the generator's own level (σ = {c.before.generator.level:g}) on {RESOLUTION}³ points. Curvature is the "
        "area's mean of |H| on the largest component away from the cube's faces; lower is smoother, which is not better without end. Holes "
        "count handles (genus) and rims; the mesher caps a body at the cube's faces, so a leak there is not seen.",
    ]
    if lost:
        notes.append(f"Left out, since one of the networks gives no surface there: seeds {', '.join(map(str, lost))}.")
    if len(kept) < 2:
        why = "Fewer than two latents have a surface in every network, so nothing can be compared. Check the checkpoints, or raise --n."
        return Finding(facts=c.facts(seeds, ROLES), data={"measures": {}, "seeds": [], "absent": why}, says=[why, *notes])
    measured = {role: [one for i in kept if (one := found[i]) is not None] for role, found in values.items()}
    arrays = {role: {name: np.array([one[name] for one in found]) for name in SURFACE_MEASURES} for role, found in measured.items()}
    return _with(c, compare(c, [seeds[i] for i in kept], arrays, SURFACE_MEASURES, lower_is_better), *notes)


@torch.no_grad()
def surface_values(c: Comparison, generator: LoadedGenerator, seeds: Sequence[int]) -> list[dict[str, float] | None]:
    """SURFACE_MEASURES of each seed's mesh; None where the density does not cross the level."""
    spec, level = SlabSpec.of(generator.generator.bounds, RESOLUTION), generator.generator.level
    found: list[dict[str, float] | None] = []
    for field in c.fields(generator, seeds, batch=max(1, c.batch // 4)):
        for sigma in field.density_grid(spec).cpu():
            crossed = float(sigma.min()) < level < float(sigma.max())
            found.append(mesh_values(*extract_mesh(sigma, spec, level), spec) if crossed else None)
    return found


def mesh_values(vertices: np.ndarray, faces: np.ndarray, spec: SlabSpec) -> dict[str, float]:
    """SURFACE_MEASURES of one mesh of a cube sampled with `spec`."""
    shape = topology(vertices, faces)
    H, area = mean_curvature(vertices, main_surface(vertices, faces))
    offset = np.abs(vertices - np.asarray(spec.centre, dtype=vertices.dtype)).max(axis=1)
    inner = (offset < spec.box_warp / 2 - RIM_STEPS * spec.voxel) & (area > 0)
    bend = np.minimum(np.abs(H[inner]), 1 / (LARGEST_CURVATURE * spec.voxel))
    return {
        "mean |curvature|": float((bend * area[inner]).sum() / max(area[inner].sum(), 1e-30)), "components": float(shape.parts),
        "holes": float(shape.holes), "cavities": float(shape.cavities), "not watertight": float(not shape.watertight),
        "loose volume": 1.0 - shape.main_share,
    }


def sigma_statistics(c: Comparison, _folder: Path) -> Finding:
    """Histogram of positive raw σ over the whole cube; per latent the largest σ and the shares of the cube that are positive and solid."""
    seeds, counts, values = c.seeds(), {}, {}
    for role, generator in c.generators().items():
        counts[role], values[role] = sigma_values(c, generator, seeds)
    histogram = {"edges": EDGES.tolist(), "counts": {role: v.tolist() for role, v in counts.items()}, "level": c.before.generator.level}
    meaning = (
        f"σ is the decoder's raw density on {SIGMA_RESOLUTION}³ points of the whole cube. The largest value has no best size: the reward "
        "rescales each slab by its own range, so a few very dense voxels shrink all else that it sees. A rise is a warning, not a fault."
    )
    return _with(c, compare(c, seeds, values, SIGMA_MEASURES, **histogram), meaning)


@torch.no_grad()
def sigma_values(c: Comparison, generator: LoadedGenerator, seeds: range) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Counts [bins] of positive values over all samples, and SIGMA_MEASURES [N]."""
    spec, level = SlabSpec.of(generator.generator.bounds, SIGMA_RESOLUTION), generator.generator.level
    counts, values = np.zeros(len(EDGES) - 1, dtype=np.int64), {name: list[np.ndarray]() for name in SIGMA_MEASURES}
    for field in c.fields(generator, seeds):
        sigma = field.density_grid(spec).flatten(1).cpu().numpy()
        counts += np.histogram(np.minimum(sigma[sigma > 0], EDGES[-1]), EDGES)[0]
        values[LARGEST].append(sigma.max(axis=1).astype(np.float64))
        values[POSITIVE].append((sigma > 0).mean(axis=1))
        values[SOLID].append((sigma > level).mean(axis=1))
    return counts, {name: np.concatenate(parts) for name, parts in values.items()}


def plot_histogram(data: dict):
    """Positive values as shares of all positive values of a network."""
    drawn, axes = style.figure()
    edges = np.asarray(data["edges"])
    top = max(int(np.flatnonzero(counts)[-1]) if any(counts) else 1 for counts in data["counts"].values())
    for role, counts in data["counts"].items():
        share = np.asarray(counts) / max(1, sum(counts))
        axes.stairs(share, np.concatenate([[edges[1] / 1.26], edges[1:]]), color=style.colour(role), label=role, linewidth=1.3,
                    linestyle="--" if role == "control" else "-")
    axes.axvline(data["level"], color=style.colour("noise"), linewidth=1)
    axes.set(xscale="log", xlabel="positive σ (first bin: all below 0.1; grey line: the surface)", ylabel="share of positive σ",
             title="Distribution of positive σ", xlim=(None, edges[min(top + 4, len(edges) - 1)]))
    axes.legend()
    return drawn


def plot_largest(data: dict):
    """Largest σ of each sample, sorted, per network."""
    drawn, axes = style.figure()
    measure = data["measures"][LARGEST]
    for role, values in measure["values"].items():
        ordered, mean = np.sort(values), measure["means"][role]
        axes.plot(ordered, (np.arange(len(ordered)) + 1) / len(ordered), color=style.colour(role),
                  label=f"{role}: mean {mean['mean']:.0f} [{mean['lo']:.0f}, {mean['hi']:.0f}]")
    axes.set(xlabel="largest σ of a sample", ylabel="share of latents at or below", title="Largest σ per sample")
    axes.legend(fontsize=7)
    return drawn
