"""Geometry before and after, by measures that took no part in tuning: agreement of views, and the extracted surface itself.

Letters: N latents, D, H, W grid points, V vertices, F faces.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from eg3d_rlhf.evaluation.comparison import Comparison
from eg3d_rlhf.evaluation.texts import BOOTSTRAP, NO_CONTROL, contains_zero, span
from eg3d_rlhf.generators import LoadedGenerator
from eg3d_rlhf.metrics.statistics import bootstrap_mean_interval, paired_summary
from eg3d_rlhf.metrics.surface import main_surface, mean_curvature, topology
from eg3d_rlhf.metrics.views import multi_view_measures, spec_for
from eg3d_rlhf.reports import style
from eg3d_rlhf.reports.jobs import Finding, Job
from eg3d_rlhf.sigma.mesh import extract_mesh
from eg3d_rlhf.sigma.slab import sigma_grid
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
ROLES = ("before", "after", "control")


def jobs(c: Comparison) -> list[Job]:
    """Multi-view agreement, surfaces."""
    n = latents(c)
    return [
        Job(
            key="view-consistency", title="Do views of one shape agree?", compute=partial(view_consistency, c),
            plots={"values": plot_values, "changes": plot_changes}, inputs=c.inputs(*ROLES, n=n, views=VIEWS),
        ),
        Job(
            key="surfaces", title="Curvature, components, holes", compute=partial(surfaces, c),
            plots={"values": plot_values, "changes": plot_changes}, inputs=c.inputs(*ROLES, n=n, resolution=RESOLUTION),
        ),
    ]


def latents(c: Comparison) -> int:
    """How many latents these parts take."""
    return max(2, round(SHARE * c.n))


def view_consistency(c: Comparison, folder: Path) -> Finding:
    """Depth and normal disagreement and photometric reprojection error of neighbouring views, per latent."""
    del folder
    seeds, values = c.seeds(latents(c)), {}
    for role, generator in c.generators().items():
        spec = spec_for(generator.G, **VIEWS)
        found = multi_view_measures(generator.G, c.ws(generator, seeds), spec, batch=max(1, c.batch // 2))
        values[role] = dict(zip(VIEW_MEASURES, (found.depth, found.normal, found.photometric), strict=True))
        values[role]["compared"] = found.covisible
    compared = ", ".join(f"{role} {v.pop('compared').mean():.0%}" for role, v in values.items())
    meaning = (
        f"Pixels that two neighbouring views share were compared ({compared} of the foreground), at yaws {VIEWS['yaws']} radians. Views "
        "that agree show that depth, normals and colour belong to one shape, not that it is a good head: a smooth ball agrees too."
    )
    return _finding(c, seeds, values, VIEW_MEASURES, [meaning])


def surfaces(c: Comparison, folder: Path) -> Finding:
    """Curvature, components, holes and cavities of the extracted meshes, per latent."""
    del folder
    seeds, values, missing = c.seeds(latents(c)), {}, {}
    for role, generator in c.generators().items():
        found = surface_values(c, generator, seeds)
        missing[role] = [seed for seed, one in zip(seeds, found, strict=True) if one is None]
        values[role] = found
    kept = [i for i in range(len(seeds)) if all(found[i] is not None for found in values.values())]
    lost = sorted({seed for gone in missing.values() for seed in gone})
    notes = [
        f"Meshes are the surface σ = 10 on {RESOLUTION}³ points. Curvature is the area's mean of |H| on the largest component away "
        "from the cube's faces; lower is smoother, which is not better without end. Holes count handles (genus) and rims; the mesher caps "
        "a body at the cube's faces, so a leak there is not seen.",
    ]
    if lost:
        notes.append(f"Left out, since one of the networks gives no surface there: seeds {', '.join(map(str, lost))}.")
    if len(kept) < 2:
        why = "Fewer than two latents have a surface in every network, so nothing can be compared. Check the checkpoints, or raise --n."
        facts = c.facts(seeds, ROLES)
        return Finding(facts=facts, data={"measures": {}, "seeds": [], "absent": why}, says=[why, *notes])
    arrays = {role: {name: np.array([found[i][name] for i in kept]) for name in SURFACE_MEASURES} for role, found in values.items()}
    return _finding(c, [seeds[i] for i in kept], arrays, SURFACE_MEASURES, notes)


@torch.no_grad()
def surface_values(c: Comparison, generator: LoadedGenerator, seeds: Sequence[int]) -> list[dict[str, float] | None]:
    """SURFACE_MEASURES of each seed's mesh; None where the density does not cross the level."""
    spec = SlabSpec.cube(RESOLUTION, float(generator.G.rendering_kwargs["box_warp"]))
    found: list[dict[str, float] | None] = []
    for ws in c.ws(generator, seeds).split(max(1, c.batch // 4)):
        for sigma in sigma_grid(generator.G, ws, spec).cpu():
            try:
                found.append(mesh_values(*extract_mesh(sigma, spec), spec))
            except ValueError as error:
                if "both sides of level" not in str(error):
                    raise
                found.append(None)
    return found


def mesh_values(vertices: np.ndarray, faces: np.ndarray, spec: SlabSpec) -> dict[str, float]:
    """SURFACE_MEASURES of one mesh of a cube sampled with `spec`."""
    shape = topology(vertices, faces)
    H, area = mean_curvature(vertices, main_surface(vertices, faces))
    inner = (np.abs(vertices).max(axis=1) < spec.box_warp / 2 - RIM_STEPS * spec.voxel) & (area > 0)
    bend = np.minimum(np.abs(H[inner]), 1 / (LARGEST_CURVATURE * spec.voxel))
    return {
        "mean |curvature|": float((bend * area[inner]).sum() / max(area[inner].sum(), 1e-30)), "components": float(shape.parts),
        "holes": float(shape.holes), "cavities": float(shape.cavities), "not watertight": float(not shape.watertight),
        "loose volume": 1.0 - shape.main_share,
    }


def _finding(
    c: Comparison, seeds: Sequence[int], values: Mapping[str, Mapping[str, np.ndarray]], units: Mapping[str, str], notes: Sequence[str]
) -> Finding:
    """Values [N] per role and measure, lower being better, as a finding with paired changes."""
    measures, rows = {}, []
    for name, unit in units.items():
        means = {role: bootstrap_mean_interval(v[name])._asdict() for role, v in values.items()}
        paired = {role: paired_summary(values["before"][name], values[role][name]).to_dict() for role in values if role != "before"}
        measures[name] = {
            "unit": unit, "values": {role: np.asarray(v[name]).tolist() for role, v in values.items()}, "means": means, "paired": paired,
        }
    for i, seed in enumerate(seeds):
        rows.append({"seed": seed, **{f"{name} {role}": float(v[name][i]) for name in units for role, v in values.items()}})
    says = [line for name in units for line in _says(name, measures[name])]
    says += [*notes, *([NO_CONTROL] if c.control is None else [])]
    data = {"measures": measures, "seeds": list(seeds)}
    return Finding(facts=c.facts(seeds, ROLES, f"paired changes; {BOOTSTRAP}"), data=data, rows=rows, says=says)


def _says(name: str, measure: Mapping) -> list[str]:
    """One sentence per measure: before, after, the paired change, and the control's."""
    means, change = measure["means"], measure["paired"]["after"]
    if contains_zero(change["mean_lo"], change["mean_hi"]):
        verdict = "no change" if change["mean_lo"] == change["mean_hi"] == 0 else "no change is shown"
    else:
        verdict = "lower, which is better" if change["mean_hi"] < 0 else "higher, which is worse"
    change_text = span(change["mean"], change["mean_lo"], change["mean_hi"], "+.3g")
    ends = f"{means['before']['mean']:.4g} before, {means['after']['mean']:.4g} after"
    text = f"{name} ({measure['unit']}): {ends}, paired {change_text}: {verdict}"
    if "control" in measure["paired"]:
        control = measure["paired"]["control"]
        text += f"; control {span(control['mean'], control['mean_lo'], control['mean_hi'], '+.3g')}"
    return [f"{text}."]


def _grid(count: int):
    """Axes for some small figures, three to a row."""
    rows = -(-count // 3)
    drawn, axes = style.figure(columns=min(3, count), rows=rows, size=(9.4, 2.9 * rows))
    flat = list(np.atleast_1d(axes).ravel())
    for axis in flat[count:]:
        axis.set_axis_off()
    return drawn, flat[:count]


def plot_values(data: dict):
    """Mean of each measure per network, with its interval, over the single latents."""
    if "absent" in data:
        return _empty(data["absent"])
    drawn, axes = _grid(len(data["measures"]))
    for axis, (name, measure) in zip(axes, data["measures"].items(), strict=True):
        for i, (role, values) in enumerate(measure["values"].items()):
            offsets = np.linspace(-0.18, 0.18, len(values))
            axis.plot(i + offsets, values, ".", markersize=2.5, alpha=0.5, color=style.colour(role))
            mean = measure["means"][role]
            error = [[max(0.0, mean["mean"] - mean["lo"])], [max(0.0, mean["hi"] - mean["mean"])]]
            axis.errorbar([i], [mean["mean"]], yerr=error, fmt="D", markersize=5, capsize=5, color=style.colour(role))
        axis.set_xticks(range(len(measure["values"])), list(measure["values"]))
        if not any(map(any, measure["values"].values())):
            axis.set_ylim(-0.05, 1)  # all zero: without this the axis shows rounding
        axis.set(ylabel=measure["unit"], title=name, xlim=(-0.5, len(measure["values"]) - 0.5))
    return drawn


def plot_changes(data: dict):
    """Paired changes with intervals, in deviations of the values before: left of zero is lower."""
    if "absent" in data:
        return _empty(data["absent"])
    names = list(data["measures"])
    drawn, axes = style.figure(size=(9.4, 0.45 * len(names) + 1.2))
    roles = list(data["measures"][names[0]]["paired"])
    for j, role in enumerate(roles):
        for i, name in enumerate(names):
            measure = data["measures"][name]
            p, scale = measure["paired"][role], float(np.std(measure["values"]["before"]))
            scale = scale or float(np.std(measure["values"][role])) or 1.0
            error = [[max(0.0, p["mean"] - p["mean_lo"]) / scale], [max(0.0, p["mean_hi"] - p["mean"]) / scale]]
            axes.errorbar([p["mean"] / scale], [i + 0.18 * (j - (len(roles) - 1) / 2)], xerr=error, fmt="o", capsize=3, markersize=4,
                          color=style.colour(role), label=role if i == 0 else None)
    axes.axvline(0, color=style.colour("noise"), linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlabel="paired change, in deviations between latents before", title="Change of the same latents (left is lower)")
    axes.legend()
    return drawn


def _empty(why: str):
    """A figure that says why there is none."""
    drawn, axes = style.figure(size=(9.4, 0.8))
    axes.set_axis_off()
    axes.text(0, 0.5, why, wrap=True, va="center")
    return drawn
