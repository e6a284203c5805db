"""Over-optimisation: does what the reward stands for rise with it? The tuned reward, a second one, and for synthetic data the programmatic
judge, over the distance from the generator before tuning.

Letters: N latents, T networks in order of training, the first the one before.
"""

from pathlib import Path

import numpy as np
import torch

from eg3d_rlhf.core.cli import file_hash
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.core.statistics import bootstrap_mean_interval
from eg3d_rlhf.evaluation.comparison import Comparison, settings_of
from eg3d_rlhf.evaluation.paired import BOOTSTRAP, span
from eg3d_rlhf.experiments import style
from eg3d_rlhf.experiments.jobs import Finding, Job
from eg3d_rlhf.generators import KEPT, LoadedGenerator
from eg3d_rlhf.preferences.annotator import utility
from eg3d_rlhf.tuning.gan.phase import density_l1
from eg3d_rlhf.tuning.gan.watch import JUDGE_RESOLUTION, annotator_calibration

DISTANCE = "mean |σ - σ before| over the whole cube (density-consistency distance)"
ROLES = ("before", "after", "reward", "held-out")
PROXY, SECOND, JUDGE = "tuned reward", "held-out reward", "programmatic judge"
NO_SECOND = "No second reward: name one with --reward-watch, trained on other labels with another seed (tools/train_reward.py)."
NO_SNAPSHOTS = (
    "Only before and after are shown: the run kept no snapshot between them, so a peak inside the run would be missed. Train with --snap=1."
)


def jobs(c: Comparison) -> list[Job]:
    """One job; with fewer snapshots or judges it shows what there is."""
    files = {f"{kimg:g}": file_hash(path) for kimg, path in c.snapshots("after")}
    return [c.job("over-optimisation", "Over-optimisation: tuned reward against what it stands for", overoptimisation,
                  {"curves": plot_curves}, ROLES, n=c.n, files=files, data=c.data)]


def divergence(proxy: np.ndarray, other: np.ndarray, seed: int = 0) -> int | None:
    """Index of the network from which on the proxy rises while the other measure falls, or None.

    It is the peak p of the other's mean for which a later network exists whose paired differences to p exclude zero: upwards for the
    proxy, downwards for the other (bootstrap intervals over latents, 95 % together over all T (T - 1) / 2 pairs that could be the peak
    and a later network, since the peak of mere noise is always followed by a fall).

    Args: proxy, other [N, T] of the same latents and networks.
    """
    peak, networks = int(other.mean(axis=0).argmax()), other.shape[1]
    confidence = 1 - 0.05 / max(1, networks * (networks - 1) / 2)
    for later in range(peak + 1, networks):
        rise = bootstrap_mean_interval(proxy[:, later] - proxy[:, peak], confidence, seed=seed)
        fall = bootstrap_mean_interval(other[:, later] - other[:, peak], confidence, seed=seed)
        if rise.lo > 0 and fall.hi < 0:
            return peak
    return None


@torch.no_grad()
def densities(c: Comparison, generator: LoadedGenerator, seeds: range) -> torch.Tensor:
    """Raw density [N, D, H, W] over the whole cube on the CPU, on the grid of both the method's anchor and the judge."""
    spec = SlabSpec.of(generator.generator.bounds, JUDGE_RESOLUTION)
    return torch.cat([field.density_grid(spec).cpu() for field in c.fields(generator, seeds)])


def judged(c: Comparison, sigma: torch.Tensor) -> np.ndarray:
    """The programmatic judge's utility [N] of cubes [N, D, H, W]."""
    side, calibration = c.before.generator.bounds.side, annotator_calibration()
    return np.array([utility(cube.numpy(), calibration=calibration, box_warp=side).total for cube in sigma])


def overoptimisation(c: Comparison, _folder: Path) -> Finding:
    """Changes of every measure in units of its deviation before, over distance, with the point of divergence."""
    seeds, kept = c.seeds(), [(kimg, path) for kimg, path in c.snapshots("after") if kimg > 0]
    chosen = c.after.nets.cur_nimg / 1000 if c.after.path.name == KEPT else None  # by an early stop: one of the run's own
    if chosen is not None and chosen not in dict(kept):
        kept = sorted([*kept, (chosen, c.after.path)])
    last = c.load(kept[-1][1]).hash if kept else None
    end: list[tuple[None, LoadedGenerator]] = [] if last == c.after.hash or chosen is not None else [(None, c.after)]
    networks: list[tuple[float | None, LoadedGenerator | Path]] = [(0.0, c.before), *kept, *end]  # (kimg, network)
    known = {PROXY: True, SECOND: c.held_out is not None, JUDGE: c.synthetic}
    values = {name: list[np.ndarray]() for name, here in known.items() if here}
    start, distances = None, []
    for _, source in networks:
        generator = c.load(source) if isinstance(source, Path) else source
        sigma = densities(c, generator, seeds)
        start = sigma if start is None else start
        distances.append(density_l1(sigma, start).double().numpy())
        for name, found in values.items():
            found.append(judged(c, sigma) if name == JUDGE else c.scores(generator, seeds, held_out=name == SECOND).double().numpy())
    columns = {name: np.stack(found, axis=1) for name, found in values.items()}  # [N, T]
    curves, rows = {}, []
    for name, column in columns.items():
        deviation = float(column[:, 0].std(ddof=1)) or 1.0
        steps = [bootstrap_mean_interval((column[:, t] - column[:, 0]) / deviation)._asdict() for t in range(len(networks))]
        at = None if name == PROXY else divergence(columns[PROXY], column)
        curves[name] = {"steps": steps, "deviation": deviation, "divergence": at}
        rows += [
            {"measure": name, "kimg": kimg, "distance": float(distances[t].mean()), "raw_mean": float(column[:, t].mean()), **steps[t]}
            for t, (kimg, _) in enumerate(networks)
        ]
    data = {"distance": [float(d.mean()) for d in distances], "kimg": [kimg for kimg, _ in networks], "curves": curves}
    says = [*_says(c, data), *([NO_SNAPSHOTS] if len(networks) < 3 else [])]
    return Finding(facts=c.facts(seeds, ROLES, BOOTSTRAP), data=data, rows=rows, says=says)


def independence(c: Comparison) -> str:
    """What the descriptions of both rewards say of their independence."""
    if c.held_out is None:
        return NO_SECOND
    first, second = c.reward.provenance, c.held_out.provenance
    text = "The held-out reward took no part in tuning this generator's weights"
    if settings_of(c.run).get("hashes", {}).get("reward") == c.held_out_hash:
        return "The run names the held-out reward as the one that it optimised: it is not held out. Name another with --reward-watch."
    if not (c.reward.labels and c.held_out.labels):
        return f"{text}; whether its labels are others than the tuned reward's is not recorded."
    seeds = "another seed" if first.get("seed") != second.get("seed") else "the same seed"
    if c.reward.labels & c.held_out.labels:
        return (
            f"{text}, but it learnt from the same labels with {seeds}: it shares their faults, and a rise of both is weaker evidence than "
            "one of a reward with labels of its own. Train one on other labels and name it with --reward-watch."
        )
    return f"{text}; it learnt from other labels with {seeds}."


def _says(c: Comparison, data: dict) -> list[str]:
    ends = {name: curve["steps"][-1] for name, curve in data["curves"].items()}
    says = [f"The {name} changes by {span(e['mean'], e['lo'], e['hi'], '+.2f')} of its deviations before." for name, e in ends.items()]
    for name, curve in data["curves"].items():
        if name != PROXY and curve["divergence"] is None:
            says.append(f"No divergence: the {name} is not shown to fall from its highest while the tuned reward rises.")
        elif name != PROXY:
            where = data["kimg"][curve["divergence"]]
            says.append(f"Divergence: the {name} falls from {'the end' if where is None else f'{where:g} kimg'} on (distance "
                        f"{data['distance'][curve['divergence']]:.3g}) while the tuned reward rises. Stop there, or raise --lambda-sigma.")
    says += [independence(c), "The distance is no KL divergence: these generators have no density to compare. It only orders the networks."]
    return [*says, (
        "The judge is the formula whose noisy answers the labels are: it shows whether tuning reached what the reward should mean. "
        "It is no second opinion; the geometry measures, which no label used, are."
    ) if c.synthetic else "No programmatic judge: it applies to synthetic data alone. People's judgement is what settles this."]


@style.plot(size=(9.4, 3.4), xlabel=DISTANCE, ylabel="mean change, deviations before", title="Over-optimisation")
def plot_curves(axes, data: dict):
    """Every measure over distance, with the point of divergence."""
    colours = {PROXY: style.colour("reward"), SECOND: style.colour("held-out"), JUDGE: style.CYCLE[4]}
    x = data["distance"]
    for name, curve in data["curves"].items():
        style.band(axes, x, curve["steps"], colours[name], name, markersize=4)
        if curve["divergence"] is not None:
            axes.axvline(x[curve["divergence"]], color=colours[name], linestyle="--", linewidth=1.2, label=f"{name}: divergence")
    axes.axhline(0, color=style.colour("noise"), linewidth=1)
