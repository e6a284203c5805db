"""The density itself before and after: how its positive values are distributed, and the largest one of each sample.

A reward reads slabs on each sample's own scale, so the raw scale is free: this part shows whether tuning used that freedom.
Letters: N latents, D, H, W grid points.
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch

from eg3d_rlhf.evaluation.comparison import Comparison
from eg3d_rlhf.evaluation.texts import BOOTSTRAP, NO_CONTROL, contains_zero, span
from eg3d_rlhf.generators import LoadedGenerator
from eg3d_rlhf.metrics.statistics import bootstrap_mean_interval, paired_summary
from eg3d_rlhf.reports import style
from eg3d_rlhf.reports.jobs import Finding, Job
from eg3d_rlhf.sigma.slab import sigma_grid
from eg3d_rlhf.sigma.spec import SlabSpec

RESOLUTION = 64  # grid points per edge of the whole cube
EDGES = np.concatenate([[0.0], np.logspace(-1, 4, 51)])  # raw density; values above the last edge count in the last bin
ROLES = ("before", "after", "control")
QUANTITIES = {"largest": "largest σ", "positive_share": "share of positive σ", "solid_share": "share above σ = 10"}


def jobs(c: Comparison) -> list[Job]:
    """The one part."""
    return [Job(
        key="sigma-statistics", title="Positive densities and the largest of each sample", compute=partial(sigma_statistics, c),
        plots={"histogram": plot_histogram, "largest": plot_largest}, inputs=c.inputs(*ROLES, n=c.n, resolution=RESOLUTION),
    )]


def sigma_statistics(c: Comparison, folder: Path) -> Finding:
    """Histogram of positive raw σ over the whole cube; per latent the largest σ and the shares of the cube that are positive and solid."""
    del folder
    seeds, counts, values = c.seeds(), {}, {}
    for role, generator in c.generators().items():
        counts[role], values[role] = densities(c, generator, seeds)
    means = {role: {name: bootstrap_mean_interval(v[name])._asdict() for name in QUANTITIES} for role, v in values.items()}
    paired = {
        role: {name: paired_summary(values["before"][name], values[role][name]).to_dict() for name in QUANTITIES}
        for role in values if role != "before"
    }
    rows = [
        {"seed": seed, **{f"{name}_{role}": float(v[name][i]) for name in QUANTITIES for role, v in values.items()}}
        for i, seed in enumerate(seeds)
    ]
    data = {
        "edges": EDGES.tolist(), "counts": {role: v.tolist() for role, v in counts.items()}, "means": means, "paired": paired,
        "largest": {role: v["largest"].tolist() for role, v in values.items()},
    }
    facts = c.facts(seeds, ROLES, f"paired changes; {BOOTSTRAP}")
    return Finding(facts=facts, data=data, rows=rows, says=_says(c, data))


@torch.no_grad()
def densities(c: Comparison, generator: LoadedGenerator, seeds: range) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Counts [bins] of positive values over all samples, and QUANTITIES [N]."""
    spec = SlabSpec.cube(RESOLUTION, float(generator.G.rendering_kwargs["box_warp"]))
    counts, values = np.zeros(len(EDGES) - 1, dtype=np.int64), {name: [] for name in QUANTITIES}
    for ws in c.ws(generator, seeds).split(c.batch):
        sigma = sigma_grid(generator.G, ws, spec).flatten(1).cpu().numpy()
        counts += np.histogram(np.minimum(sigma[sigma > 0], EDGES[-1]), EDGES)[0]
        values["largest"].append(sigma.max(axis=1).astype(np.float64))
        values["positive_share"].append((sigma > 0).mean(axis=1))
        values["solid_share"].append((sigma > 10).mean(axis=1))
    return counts, {name: np.concatenate(parts) for name, parts in values.items()}


def _says(c: Comparison, data: dict) -> list[str]:
    says = []
    for name, label in QUANTITIES.items():
        before, after, change = (data["means"]["before"][name], data["means"]["after"][name], data["paired"]["after"][name])
        none = contains_zero(change["mean_lo"], change["mean_hi"])
        text = f"{label}: {before['mean']:.4g} before, {after['mean']:.4g} after; paired "
        text += span(change["mean"], change["mean_lo"], change["mean_hi"], "+.3g") + (", no change is shown" if none else "")
        if "control" in data["paired"]:
            other = data["paired"]["control"][name]
            text += f"; control {span(other['mean'], other['mean_lo'], other['mean_hi'], '+.3g')}"
        says.append(f"{text}.")
    says.append(
        f"σ is the decoder's raw density on {RESOLUTION}³ points of the whole cube. The largest value has no best size: the reward "
        "rescales each slab by its own range, so a few very dense voxels shrink all else that it sees. A rise is a warning, not a fault."
    )
    return says if c.control is not None else [*says, NO_CONTROL]


def plot_histogram(data: dict):
    """Positive values as shares of all positive values of a network."""
    drawn, axes = style.figure()
    edges = np.asarray(data["edges"])
    top = max(int(np.flatnonzero(counts)[-1]) if any(counts) else 1 for counts in data["counts"].values())
    for role, counts in data["counts"].items():
        share = np.asarray(counts) / max(1, sum(counts))
        axes.stairs(share, np.concatenate([[edges[1] / 1.26], edges[1:]]), color=style.colour(role), label=role, linewidth=1.3,
                    linestyle="--" if role == "control" else "-")
    axes.axvline(10, color=style.colour("noise"), linewidth=1)
    axes.set(xscale="log", xlabel="positive σ (first bin: all below 0.1; grey line: the surface)", ylabel="share of positive σ",
             title="Distribution of positive σ", xlim=(None, edges[min(top + 4, len(edges) - 1)]))
    axes.legend()
    return drawn


def plot_largest(data: dict):
    """Largest σ of each sample, sorted, per network."""
    drawn, axes = style.figure()
    for role, values in data["largest"].items():
        ordered, mean = np.sort(values), data["means"][role]["largest"]
        axes.plot(ordered, (np.arange(len(ordered)) + 1) / len(ordered), color=style.colour(role),
                  label=f"{role}: mean {mean['mean']:.0f} [{mean['lo']:.0f}, {mean['hi']:.0f}]")
    axes.set(xlabel="largest σ of a sample", ylabel="share of latents at or below", title="Largest σ per sample")
    axes.legend(fontsize=7)
    return drawn
