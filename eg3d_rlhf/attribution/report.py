"""The parts of the attribution report: regions, Shapley values, other methods, a check with re-drawn weights, the surface.

Letters: N latents, R regions, K draws.
"""

from functools import partial
from pathlib import Path

import numpy as np

from eg3d_rlhf.attribution import plots
from eg3d_rlhf.attribution.cross_checks import BOUND, agreement, rank_correlation
from eg3d_rlhf.attribution.landmarks import BACKGROUND
from eg3d_rlhf.attribution.regions import OTHER
from eg3d_rlhf.attribution.study import BOXES, CHECK_ORDERS, HEAD, LANDMARKS, Study
from eg3d_rlhf.attribution.surface import by_region, labels_at, picture, region_colour, surface, write_pictures
from eg3d_rlhf.cli import naming
from eg3d_rlhf.evaluation.paired import BOOTSTRAP, contains_zero, span
from eg3d_rlhf.metrics.statistics import bootstrap_mean_interval
from eg3d_rlhf.reports.jobs import Finding, Job, identity_of_file
from eg3d_rlhf.sigma.mesh import extract_mesh

TITLE = "Which regions does the reward like?"
KINDS = {
    BOXES: "fixed boxes of the slab", LANDMARKS: "boxes about each latent's landmarks", HEAD: "the whole head, divided about its landmarks",
}
ROLES = ("before", "after", "reward")
_DRAWN = 3  # latents in the picture of the regions
_YAWS = (0.0, 0.6, 1.57)


def jobs(study: Study) -> list[Job]:
    """Every part of the report; the regions come first, since they are drawn before anything is computed."""
    s, c = study.settings, study.c
    files: dict = {"regions": s.regions}
    if s.regions not in KINDS:
        with naming("--regions"):
            files["regions"] = [identity_of_file(path) for path in (s.regions, Path(s.regions).with_suffix(".json"))]
    with naming("--landmarks"):
        files["landmarks"] = identity_of_file(s.landmarks)
    base = c.inputs(*ROLES, n=c.n, data=c.synthetic, **files)
    shared = {**base, "method": s.method, "permutations": s.permutations, "gap_bound": s.gap_bound}
    integral = {**shared, "orders": CHECK_ORDERS, "steps": s.steps, "most_steps": s.most_steps}
    head = [
        Job(key="whole-head", title="The whole head in eight parts", compute=partial(whole_head, study), inputs=shared,
            plots={"regions": plots.plot_regions, "latents": plots.plot_latents}),
    ] if s.regions == LANDMARKS else []
    places = [Job(key="surface", title="Where on the surface", compute=partial(surface, study), inputs=integral)] * study.reads_slabs
    return [
        Job(key="regions", version=2, title="The regions", compute=partial(regions, study), inputs=base),
        Job(key="shapley", title="Shapley values of the regions", compute=partial(shapley, study), inputs=shared,
            plots={"regions": plots.plot_regions, "latents": plots.plot_latents}),
        *head,
        Job(key="methods", title="Do other methods agree?", compute=partial(methods, study), inputs=integral,
            plots={"means": plots.plot_methods, "rank-correlation": plots.plot_agreement}),
        Job(key="redrawn-reward", title="The same with a reward of random weights", compute=partial(redrawn_reward, study),
            inputs={**shared, "orders": CHECK_ORDERS, "draws": s.draws, "checked": s.checked},
            plots={"rank-correlation": plots.plot_redrawn}),
        *places,
    ]


def regions(study: Study, folder: Path) -> Finding:
    """The partition, and that of the whole head where it has one, on meshes of the first latents from three sides; voxels per region."""
    c, kind = study.c, KINDS.get(str(study.settings.regions), "your masks")
    rows, pictures = _counts(study), draw_regions(study, folder, "regions.png") if study.reads_slabs else {}
    empty = [row["region"] for row in rows if row["most"] == 0]
    says = [
        f"{len(rows)} regions from {kind}; where two overlap, the first in the table wins. Every voxel of the slab belongs to one.",
        "The partition is a choice: a value says what a region contributes, and another partition divides the same difference otherwise.",
    ]
    says += [f"Empty, and so without any influence: {', '.join(empty)}."] if empty else []
    if not pictures:
        missing = "No latent drawn here has a surface" if study.reads_slabs else "The reward reads no slab"
        says.append(f"{missing}, so there is no picture.")
    if study.settings.regions == LANDMARKS:
        head = study.of_the_head()
        rows = [{"partition": name, **row} for name, part in (("regions", study), ("whole head", head)) for row in _counts(part)]
        pictures |= draw_regions(head, folder, "whole-head.png", "The whole head in eight parts, ")
    return Finding(facts=c.facts(study.seeds, ("before",)), data={"names": list(study.names), "kind": kind}, rows=rows, says=says,
                   pictures=pictures)


def _counts(study: Study) -> list[dict]:
    counts = np.array([p.counts() for p in study.partitions])  # [N, R]
    return [
        {"region": region, "voxels (mean)": float(found.mean()), "least": int(found.min()), "most": int(found.max()),
         "colour": "#{:02x}{:02x}{:02x}".format(*region_colour(i))}
        for i, (region, found) in enumerate(zip(study.names, counts.T, strict=True))
    ]


def draw_regions(study: Study, folder: Path, name: str, what: str = "Regions ") -> dict[str, str]:
    """A partition on the meshes of the first latents: the picture's name by its caption; nothing where no latent has a surface."""
    drawn = []
    for i, seed in enumerate(study.seeds[:_DRAWN]):
        try:
            vertices, faces = extract_mesh(study.cube("before", seed)[0], study.cube_spec, study.level)
        except ValueError:  # a sample without a surface has nothing to draw on
            continue
        colours = by_region(labels_at(vertices, study.partitions[i], study.spec))
        drawn.append([picture(vertices, faces, colours, yaw, half=study.cube_spec.box_warp / 2) for yaw in _YAWS])
    if not drawn:
        return {}
    write_pictures(folder / name, drawn)
    where = f"{what}on the surface of seeds {study.seeds[0]}.. before tuning"
    return {f"{where}: front, half turned, side; colours as in the table, grey: outside the slab.": name}


def whole_head(study: Study, folder: Path) -> Finding:
    """Shapley values of the parts of the whole head, most of which lie outside the face's landmarks."""
    return shapley(study.of_the_head(), folder)


def shapley(study: Study, folder: Path) -> Finding:
    """Shapley values per latent and region, their means with intervals, and the efficiency gaps."""
    del folder
    found, names, c = study.shapley, study.names, study.c
    values = np.stack([a.values for a in found])
    means = [bootstrap_mean_interval(column)._asdict() for column in values.T]
    rows = [
        {"seed": seed, "region": name, "value": float(a.values[i]), "standard_error": None if a.errors is None else float(a.errors[i]),
         "difference": a.difference, "gap": a.gap}
        for seed, a in zip(study.seeds, found, strict=True) for i, name in enumerate(names)
    ]
    gap = max(a.relative_gap for a in found)
    total = bootstrap_mean_interval([a.difference for a in found])
    data = {
        "names": list(names), "values": values.tolist(), "means": means, "method": study.settings.method, "seeds": list(study.seeds),
        "errors": None if found[0].errors is None else [a.errors.tolist() for a in found if a.errors is not None],
        "difference": total._asdict(), "largest_relative_gap": gap, "gaps": [a.gap for a in found],
    }
    interval = f"means: {BOOTSTRAP}" + ("" if found[0].errors is None else "; bars per latent: standard error of sampling")
    return Finding(facts=c.facts(study.seeds, ROLES, interval), data=data, rows=rows, says=_shapley_says(study, values, means, total, gap))


def _shapley_says(study: Study, values: np.ndarray, means: list[dict], total, gap: float) -> list[str]:
    order = np.argsort([-abs(m["mean"]) for m in means])
    clear = [i for i in order if not contains_zero(means[i]["lo"], means[i]["hi"])]
    s = study.settings
    how = f"all {2 ** len(study.names):,} coalitions" if s.method == "exact" else f"{s.permutations} permutations ({s.method})"
    says = [
        f"The reward changes by {span(*total)} on average; Shapley values from {how} divide that among {len(study.names)} regions. The "
        f"largest efficiency gap is {gap:.1e} of a latent's difference (refused above {s.gap_bound:g}).",
    ]
    if clear:
        listed = "; ".join(f"{study.names[i]} {span(*means[i].values())}" for i in clear[:4])
        says.append(f"Regions whose mean contribution differs from zero, largest first: {listed}.")
        first = int((np.abs(values).argmax(axis=1) == order[0]).sum())
        share = np.mean([p.counts()[order[0]] / p.labels.numel() for p in study.partitions])
        says.append(
            f"{study.names[order[0]].capitalize()}, with {share:.0%} of the voxels, contributes most in {first} of {len(values)} latents."
        )
        if study.names[order[0]] in (OTHER, BACKGROUND):
            below = "the parts of the whole head and " if s.regions == LANDMARKS else ""
            says.append(
                f"Most of the change lies outside the named regions, so that this partition explains little of it: look at {below}the "
                "surface below, or divide that part with masks of your own (--regions=FILE)."
            )
    else:
        says.append("No region's mean contribution differs from zero over these latents: raise --n.")
    says.append("A contribution says where this reward sees the change, not that the change is good there. Large regions hold more voxels.")
    return says


def methods(study: Study, folder: Path) -> Finding:
    """Mean attribution by four methods, completeness of the integral, and rank correlations between methods."""
    del folder
    found, names, c = study.methods, study.names, study.c
    means = {method: [bootstrap_mean_interval(column)._asdict() for column in values.T] for method, values in found.items()}
    pairs = agreement(found)
    rows = [
        {"seed": seed, "region": name, **{method: float(values[n, i]) for method, values in found.items()}}
        for n, seed in enumerate(study.seeds) for i, name in enumerate(names)
    ]
    ig = [
        {"seed": seed, "steps": g.steps, "gap": g.gap, "share": g.tried[-1][1], "complete": g.complete, "tried": [list(t) for t in g.tried]}
        for seed, g in zip(study.seeds, study.integrated, strict=True)
    ]
    says = [_ig_says(study, ig), *_pair_says(pairs)]
    says.append(
        "Noise has each region's change shuffled among its voxels: the same amount of change without its shape. A method that agrees with "
        "it as well as with the others measures how much a region changed, not what became of it. Occlusion counts only the last step into "
        "the tuned slab, so that regions which act together count more than once or not at all."
    )
    data = {"names": list(names), "means": means, "agreement": pairs, "integrated": ig}
    return Finding(facts=c.facts(study.seeds, ROLES, f"means, and mean rank correlations: {BOOTSTRAP}"), data=data, rows=rows, says=says)


def _ig_says(study: Study, ig: list[dict]) -> str:
    complete = sum(entry["complete"] for entry in ig)
    worst, steps = max(entry["share"] for entry in ig), [entry["steps"] for entry in ig]
    more = sum(len(entry["tried"]) > 1 for entry in ig)
    text = (
        f"Integrated Gradients add up to within {BOUND:.0%} of the reward difference for {complete} of {len(ig)} latents (largest gap "
        f"{worst:.2%}) with {min(steps)} to {max(steps)} steps; the count rose from {study.settings.steps} by itself for {more}."
    )
    return text if complete == len(ig) else text + " The others stay incomplete: raise --most-steps, or read them with that doubt."


def _interval(mean: dict) -> str:
    return span(mean["mean"], mean["lo"], mean["hi"], ".2f")


def _pair_says(pairs: list[dict]) -> list[str]:
    says = []
    for pair in pairs:
        if pair["first"] != "Shapley":
            continue
        mean, tau = pair["spearman"]["mean"], pair["kendall"]["mean"]
        if mean is None:
            says.append(f"{pair['second']}: no ranks to compare, since one side is constant.")
            continue
        overall = pair["spearman"]["overall"]
        says.append(
            f"Shapley and {pair['second']}: Spearman {_interval(mean)} per latent (Kendall {_interval(tau)}), "
            f"{'none' if overall is None else f'{overall:.2f}'} between the means over latents."
        )
    return says


def redrawn_reward(study: Study, folder: Path) -> Finding:
    """Rank correlation of attributions by the trained reward and by rewards with re-drawn weights."""
    del folder
    s, c = study.settings, study.c
    count = min(s.checked, len(study.seeds))
    trained = np.stack([a.values for a in study.shapley[:count]])
    rows, by_draw, sizes = [], [], []
    for draw in range(s.draws):
        random = study.redrawn(draw)
        rho = [rank_correlation(a, b) for a, b in zip(trained, random, strict=True)]
        size = [rank_correlation(np.abs(a), np.abs(b)) for a, b in zip(trained, random, strict=True)]
        rows += [{"draw": draw, "seed": study.seeds[i], "spearman": r, "spearman_of_sizes": z}
                 for i, (r, z) in enumerate(zip(rho, size, strict=True))]
        by_draw += [float(np.mean(known))] if (known := [r for r in rho if r is not None]) else []
        sizes += [float(np.mean(known))] if (known := [z for z in size if z is not None]) else []
    data = {"by_draw": by_draw, "sizes": sizes, "draws": s.draws, "latents": count,
            "mean": bootstrap_mean_interval(by_draw)._asdict() if by_draw else None,
            "mean_of_sizes": bootstrap_mean_interval(sizes)._asdict() if sizes else None}
    facts = c.facts(study.seeds[:count], ROLES, f"95 % percentile bootstrap over {len(by_draw)} draws of weights, 10,000 resamples")
    return Finding(facts=facts, data=data, rows=rows, says=_redrawn_says(data))


def _redrawn_says(data: dict) -> list[str]:
    if data["mean"] is None:
        return ["Every reward with re-drawn weights attributes the same to all regions, so there are no ranks to compare."]
    mean, lo, hi = data["mean"].values()
    if contains_zero(lo, hi):
        verdict = "its interval contains zero: the attributions come from what the reward has learnt, as far as this check can tell"
    else:
        verdict = "its interval leaves zero out: part of the attribution comes from slabs or architecture, not from training"
    says = [
        f"Spearman correlation between the trained reward's attributions and those of {len(data['by_draw'])} rewards with re-drawn "
        f"weights: {span(mean, lo, hi, '.2f')}; {verdict}.",
        f"With {len(data['by_draw'])} draws a correlation within the interval's width of zero would not be noticed.",
    ]
    if data["mean_of_sizes"] is not None:
        size = _interval(data["mean_of_sizes"])
        says.append(f"Sizes without signs correlate by {size}: any network reacts more where more changed, so this need not be near zero.")
    return says
