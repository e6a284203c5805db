"""Rewards of the same latents: before and after, over truncation, over snapshots beside the control, and
against what they stand for.

Two intervals of a trajectory's slope stand side by side, since they answer different questions. The *spread*
is the range in which the middle 95 % of the latents' own least-squares slopes lie: it contains zero unless
nearly all latents move the same way. The interval of the *mean* slope is a bootstrap over latents: with many
latents it finds a drift that is far too small to see on any one of them, and it says nothing of other
training runs, whose number here is one each.
Letters: N latents, T snapshots or networks in order of training.
"""

from pathlib import Path

import numpy as np
import torch
from scipy.stats import rankdata

from eg3d_rlhf.core import statistics
from eg3d_rlhf.core.cli import file_hash
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.core.statistics import bootstrap_mean_interval
from eg3d_rlhf.evaluation.comparison import Comparison, settings_of
from eg3d_rlhf.evaluation.paired import (
    BOOTSTRAP,
    NO_CONTROL,
    contains_zero,
    means_of_columns,
    paired_of,
    seed_rows,
    span,
)
from eg3d_rlhf.experiments import style
from eg3d_rlhf.experiments.pages import Finding, Job
from eg3d_rlhf.generators import KEPT, LoadedGenerator
from eg3d_rlhf.tuning.gan.heldout_metrics import ORACLE_RESOLUTION, utilities
from eg3d_rlhf.tuning.gan.phase import density_l1

PSIS = (0.25, 0.5, 0.7, 1.0)
ROLES = ("before", "after", "reward")
RANK_PSIS = (0.7, 0.25)
FEWEST = 3  # networks, the one before tuning among them, under a slope


def jobs(c: Comparison) -> list[Job]:
    """Reward shift, reward over psi, rank consistency,
    and trajectories where the run kept enough snapshots.
    """
    shifts = {"histograms": plot_histograms, "deltas": plot_deltas, "final-against-initial": plot_lines}
    return [
        c.job("reward-shift", "Reward of the same latents before and after", shift, shifts, n=c.n),
        c.job("reward-psi", "Reward over truncation", over_psi, {"means": plot_psi}, ROLES, n=c.n, psis=PSIS),
        c.job(
            "rank-consistency",
            "Do latents keep their rank under truncation?",
            ranks,
            {"scatter": plot_ranks},
            ROLES,
            n=c.n,
            psis=RANK_PSIS,
        ),
        trajectories_job(c),
    ]


def trajectories_job(c: Comparison) -> Job:
    """The trajectories, or a part that says which snapshots are missing."""
    kept = {role: c.snapshots(role) for role in ("after", "control")}
    key = "trajectories"
    title = "Reward of fixed latents over training"
    if len(kept["after"]) + 1 < FEWEST:
        where = f" in {c.run.name}" if c.run is not None else " (no run folder was named)"
        return c.absent(
            key,
            title,
            f"A trajectory needs {FEWEST - 1} snapshots of the tuned run; {len(kept['after'])} found{where}."
            " Train with --snap=1, which keeps a snapshot per tick, and name the run with --run.",
        )
    files = {
        role: {f"{kimg:g}": file_hash(path) for kimg, path in snapshots} for role, snapshots in kept.items()
    }
    plots = {"trajectories": plot_trajectories, "slopes": plot_slopes}
    return c.job(key, title, trajectories, plots, ("before", "reward"), n=c.n, files=files)


def shift(c: Comparison, _folder: Path) -> Finding:
    """Paired deltas with their mean and share positive; line of final against initial reward."""
    seeds = c.seeds()
    scores = {role: c.scores(generator, seeds).double().numpy() for role, generator in c.generators().items()}
    paired = paired_of(scores)
    lines = {role: statistics.fit_line(scores["before"], scores[role])._asdict() for role in paired}
    rows = seed_rows(
        seeds, {**scores, **{f"delta_{role}": scores[role] - scores["before"] for role in paired}}
    )
    data = {
        "scores": {role: values.tolist() for role, values in scores.items()},
        "paired": paired,
        "lines": lines,
    }
    facts = c.facts(
        seeds,
        ("before", "after", "control", "reward"),
        f"mean: {BOOTSTRAP}; share: Wilson; {statistics.LINE_INTERVAL}",
    )
    return Finding(facts=facts, data=data, rows=rows, says=_shift_says(paired, lines))


def _shift_says(paired: dict, lines: dict) -> list[str]:
    p = paired["after"]
    line = lines["after"]
    delta = span(p["mean"], p["mean_lo"], p["mean_hi"])
    says = [
        (
            f"The reward changes by {delta} on average; it rises for {p['positive']} of {p['n']} latents "
            f"(share {span(p['positive_rate'], p['positive_lo'], p['positive_hi'], '.3f')})."
        ),
        (
            "This is the reward that the run optimised: its rise says that tuning did what it was asked, not"
            " that the shapes are better."
        ),
    ]
    if line["lo"] > 0:
        kept = (
            "latents keep part of their initial order"
            if line["hi"] < 1
            else "a latent's initial reward carries over"
        )
    else:
        kept = (
            "no dependence of the final on the initial reward is shown"
            if line["hi"] > 0
            else "the initial order is turned round"
        )
    says.append(
        f"Final against initial reward has slope {span(line['slope'], line['lo'], line['hi'])}: {kept}."
    )
    if "control" not in paired:
        return [*says, NO_CONTROL]
    q = paired["control"]
    share = abs(q["mean"]) / max(abs(p["mean"]), 1e-12)
    moved = (
        "no shift is shown"
        if contains_zero(q["mean_lo"], q["mean_hi"])
        else "a small shift that training alone makes in this run"
    )
    alone = "training alone moves this reward much, and the shift is not the reward phase alone"
    return [
        *says,
        (
            f"In the control the mean change is {span(q['mean'], q['mean_lo'], q['mean_hi'])}, {share:.1%} of"
            f" the tuned one: {moved if share < 0.1 else alone}."
        ),
    ]


def over_psi(c: Comparison, _folder: Path) -> Finding:
    seeds = c.seeds()
    rows = []
    for role in ("before", "after"):
        for psi in PSIS:
            values = c.scores(c.generators()[role], seeds, psi).double().numpy()
            mean, lo, hi = bootstrap_mean_interval(values)
            rows.append(
                {"role": role, "psi": psi, "mean": mean, "lo": lo, "hi": hi, "std": float(values.std(ddof=1))}
            )
    best = {
        role: max((r for r in rows if r["role"] == role), key=lambda r: r["mean"])
        for role in ("before", "after")
    }
    says = [
        (
            f"Highest mean reward: before at ψ = {best['before']['psi']:g} ({best['before']['mean']:.2f}),"
            f" after at ψ = {best['after']['psi']:g} ({best['after']['mean']:.2f}), of the truncations tried."
        ),
        (
            "Truncation pulls shapes towards the mean shape, so a reward that rises as ψ falls prefers"
            " typical shapes."
        ),
    ]
    return Finding(
        facts=c.facts(seeds, ROLES, BOOTSTRAP, psi=None), data={"rows": rows}, rows=rows, says=says
    )


def ranks(c: Comparison, _folder: Path) -> Finding:
    """Spearman's rho of the rewards at two truncations of the same latents."""
    seeds = c.seeds()
    rho = {}
    scores = {}
    for role in ("before", "after"):
        high_scores, low_scores = (
            c.scores(c.generators()[role], seeds, psi).double().numpy() for psi in RANK_PSIS
        )
        scores[role] = [high_scores.tolist(), low_scores.tolist()]
        rho[role] = statistics.spearman(high_scores, low_scores)._asdict()
    high, low = RANK_PSIS
    rows = [{"role": role, "spearman": r["mean"], "lo": r["lo"], "hi": r["hi"]} for role, r in rho.items()]
    before, after = (span(r["mean"], r["lo"], r["hi"], ".3f") for r in (rho["before"], rho["after"]))
    says = [
        f"Spearman's rho between the rewards at ψ = {high:g} and {low:g}: before {before}, after {after}.",
        (
            "Both share the latent, so agreement is expected; what is missing to 1 is order that truncation"
            " changes."
        ),
    ]
    data = {"scores": scores, "rho": rho, "psis": RANK_PSIS}
    return Finding(
        facts=c.facts(seeds, ROLES, statistics.RANK_INTERVAL, psi=None), data=data, rows=rows, says=says
    )


def slope_summary(times: np.ndarray, values: np.ndarray) -> dict:
    """Slopes per kimg of values [N, T]: their mean with bootstrap interval,
    and the range of the middle 95 %.
    """
    slopes = statistics.slopes(times, values)
    mean, lo, hi = bootstrap_mean_interval(slopes)
    low, high = np.quantile(slopes, [0.025, 0.975])
    return {
        "slopes": slopes.tolist(),
        "mean": mean,
        "mean_lo": lo,
        "mean_hi": hi,
        "spread_lo": float(low),
        "spread_hi": float(high),
    }


def trajectories(c: Comparison, _folder: Path) -> Finding:
    roles: dict[str, dict] = {}
    seeds = c.seeds()
    rows = []
    start = c.scores(c.before, seeds).double().numpy()
    for role in ("after", "control"):
        kept = [(kimg, path) for kimg, path in c.snapshots(role) if kimg > 0]
        if len(kept) + 1 < FEWEST:
            continue
        times = np.array([0.0, *(kimg for kimg, _ in kept)])
        # [N, T]
        values = np.stack(
            [start, *(c.scores(c.load(path), seeds).double().numpy() for _, path in kept)], axis=1
        )
        steps = means_of_columns(values)
        roles[role] = {
            "kimg": times.tolist(),
            "values": values.tolist(),
            "means": steps,
            **slope_summary(times, values),
        }
        rows += [{"role": role, "kimg": float(t), **step} for t, step in zip(times, steps, strict=True)]
    interval = f"range of the middle 95 % of latents' least-squares slopes; mean slope: {BOOTSTRAP}"
    facts = c.facts(seeds, ("before", "after", "control", "reward"), interval)
    return Finding(facts=facts, data={"roles": roles}, rows=rows, says=_trajectory_says(roles))


def _trajectory_says(roles: dict) -> list[str]:
    says = []
    for role, r in roles.items():
        name = "tuned run" if role == "after" else role
        verdict = "contains" if contains_zero(r["spread_lo"], r["spread_hi"]) else "does not contain"
        says.append(
            f"Slope of the {name}, reward per kimg: the middle 95 % of latents lie in [{r['spread_lo']:+.2f},"
            f" {r['spread_hi']:+.2f}], which {verdict} zero; mean"
            f" {span(r['mean'], r['mean_lo'], r['mean_hi'], '+.2f')}."
        )
    if "control" not in roles:
        return [*says, NO_CONTROL + " It needs snapshots, too: --snap=1."]
    tuned = roles["after"]
    control = roles["control"]
    if contains_zero(control["mean_lo"], control["mean_hi"]):
        return [*says, "No drift of the control is shown, neither for single latents nor on average."]
    return [
        *says,
        (
            "On average the control does drift: its mean slope differs from zero, at"
            f" {abs(control['mean'] / tuned['mean']):.1%} of the tuned run's. Going on with GAN training"
            " moves more latents one way than the other, and a mean over many latents resolves that. One run"
            " cannot show whether other training seeds drift the same way."
        ),
    ]


@style.plot(xlabel="reward", ylabel="latents", title="Reward of held-out latents")
def plot_histograms(axes, data: dict):
    edges = np.histogram_bin_edges(np.concatenate([np.asarray(v) for v in data["scores"].values()]), bins=30)
    for role, values in data["scores"].items():
        axes.hist(
            values,
            bins=edges,
            histtype="step" if role == "control" else "stepfilled",
            alpha=1 if role == "control" else 0.6,
            color=style.colour(role),
            label=role,
            linewidth=1.4,
        )


@style.plot(
    xlabel="latents, in order of the change", ylabel="change of the reward", title="Change per latent"
)
def plot_deltas(axes, data: dict):
    """Every latent's change, in order."""
    before = np.asarray(data["scores"]["before"])
    for role, p in data["paired"].items():
        delta = np.sort(np.asarray(data["scores"][role]) - before)
        axes.plot(
            np.arange(1, len(delta) + 1),
            delta,
            ".",
            markersize=3,
            color=style.colour(role),
            label=f"{role}: {p['positive']}/{p['n']} rise",
        )
    axes.axhline(0, color=style.colour("noise"), linewidth=1)


@style.plot(7, xlabel="reward before", ylabel="reward after", title="Final against initial reward")
def plot_lines(axes, data: dict):
    before = np.asarray(data["scores"]["before"])
    ends = np.array([before.min(), before.max()])
    for role, line in data["lines"].items():
        axes.plot(before, data["scores"][role], ".", markersize=4, alpha=0.6, color=style.colour(role))
        axes.plot(
            ends,
            line["intercept"] + line["slope"] * ends,
            color=style.colour(role),
            label=f"{role}: slope {line['slope']:.2f} [{line['lo']:.2f}, {line['hi']:.2f}]",
        )
    axes.plot(ends, ends, "--", color=style.colour("noise"), linewidth=1, label="no change")


@style.plot(xlabel="truncation ψ", ylabel="mean reward", title="Reward over truncation")
def plot_psi(axes, data: dict):
    for role in dict.fromkeys(row["role"] for row in data["rows"]):
        rows = [row for row in data["rows"] if row["role"] == role]
        style.band(axes, [row["psi"] for row in rows], rows, style.colour(role), role, markersize=3)


def plot_ranks(data: dict):
    drawn, axes = style.figure(columns=2)
    high, low = data["psis"]
    for axis, role in zip(axes, ("before", "after"), strict=True):
        x, y = (rankdata(values) for values in data["scores"][role])
        rho = data["rho"][role]
        axis.plot(x, y, ".", markersize=4, color=style.colour(role))
        axis.set(
            xlabel=f"rank at ψ = {high:g}",
            ylabel=f"rank at ψ = {low:g}",
            title=f"{role}: rho {rho['mean']:.2f} [{rho['lo']:.2f}, {rho['hi']:.2f}]",
        )
    return drawn


def plot_trajectories(data: dict):
    """Every latent's reward over training, the mean on top."""
    drawn, axes = style.figure(columns=len(data["roles"]))
    for axis, (role, r) in zip(np.atleast_1d(axes), data["roles"].items(), strict=True):
        axis.plot(r["kimg"], np.asarray(r["values"]).T, color=style.colour(role), alpha=0.15, linewidth=0.6)
        axis.plot(
            r["kimg"],
            [step["mean"] for step in r["means"]],
            "o-",
            color=style.colour(role),
            linewidth=2,
            markersize=4,
            label="mean",
        )
        axis.set(
            xlabel="training, thousand images", ylabel="reward", title=f"{role}, {len(r['values'])} latents"
        )
        axis.legend()
    every = np.concatenate([np.ravel(r["values"]) for r in data["roles"].values()])
    for axis in np.atleast_1d(axes):
        axis.set_ylim(every.min() - 0.5, every.max() + 0.5)
    return drawn


def plot_slopes(data: dict):
    """Distribution of latents' slopes per run, with both intervals."""
    drawn, axes = style.figure(columns=len(data["roles"]))
    for axis, (role, r) in zip(np.atleast_1d(axes), data["roles"].items(), strict=True):
        axis.hist(r["slopes"], bins=25, color=style.colour(role), alpha=0.6)
        axis.axvspan(
            r["spread_lo"],
            r["spread_hi"],
            color=style.colour(role),
            alpha=0.12,
            label="middle 95 % of latents",
        )
        axis.axvspan(
            r["mean_lo"], r["mean_hi"], color=style.colour(role), alpha=0.8, label="mean, 95 % interval"
        )
        axis.axvline(0, color=style.colour("noise"), linewidth=1.2)
        axis.set(xlabel="slope, reward per kimg", ylabel="latents", title=role)
        axis.legend(fontsize=7)
    return drawn


# Over-optimisation: does what the reward stands for rise with it? The tuned reward, a second one, and for
# synthetic data the oracle (the rule of the simulated annotator), over the distance from the generator
# before tuning. T networks in
# order of training, the first the one before.

DISTANCE = "mean |σ - σ before| over the whole cube (density-consistency distance)"
CURVE_ROLES = ("before", "after", "reward", "held-out")
PROXY = "tuned reward"
SECOND = "held-out reward"
ORACLE = "oracle"
NO_SECOND = (
    "No second reward: name one with --heldout-reward, trained on other labels with another seed"
    " (tools/train_reward.py)."
)
NO_SNAPSHOTS = (
    "Only before and after are shown: the run kept no snapshot between them, so a peak inside the run would"
    " be missed. Train with --snap=1."
)


def curve_jobs(c: Comparison) -> list[Job]:
    """One job; with fewer snapshots or evaluators it shows what there is."""
    files = {f"{kimg:g}": file_hash(path) for kimg, path in c.snapshots("after")}
    return [
        c.job(
            "over-optimisation",
            "Over-optimisation: tuned reward against what it stands for",
            overoptimisation,
            {"curves": plot_curves},
            CURVE_ROLES,
            n=c.n,
            files=files,
            data=c.data,
        )
    ]


def divergence(proxy: np.ndarray, other: np.ndarray, seed: int = 0) -> int | None:
    """Index of the network from which on the proxy rises while the other measure falls, or None.

    It is the peak p of the other's mean for which a later network exists whose paired differences to p
    exclude zero: upwards for the proxy, downwards for the other (bootstrap intervals over latents, 95 %
    together over all T (T - 1) / 2 pairs that could be the peak and a later network, since the peak of mere
    noise is always followed by a fall).

    Args: proxy, other [N, T] of the same latents and networks.
    """
    peak = int(other.mean(axis=0).argmax())
    networks = other.shape[1]
    confidence = 1 - 0.05 / max(1, networks * (networks - 1) / 2)
    for later in range(peak + 1, networks):
        rise = bootstrap_mean_interval(proxy[:, later] - proxy[:, peak], confidence, seed=seed)
        fall = bootstrap_mean_interval(other[:, later] - other[:, peak], confidence, seed=seed)
        if rise.lo > 0 and fall.hi < 0:
            return peak
    return None


@torch.no_grad()
def densities(c: Comparison, generator: LoadedGenerator, seeds: range) -> torch.Tensor:
    """Raw density [N, D, H, W] over the whole cube on the CPU, on the grid of the method's anchor."""
    spec = SlabSpec.of(generator.generator.bounds, ORACLE_RESOLUTION)
    return torch.cat([field.density_grid(spec).cpu() for field in c.fields(generator, seeds)])


def overoptimisation(c: Comparison, _folder: Path) -> Finding:
    """Changes of every measure in units of its standard deviation before, over distance,
    with the point of divergence.
    """
    seeds = c.seeds()
    kept = [(kimg, path) for kimg, path in c.snapshots("after") if kimg > 0]
    # by an early stop: one of the run's own
    chosen = c.after.nets.cur_nimg / 1000 if c.after.path.name == KEPT else None
    if chosen is not None and chosen not in dict(kept):
        kept = sorted([*kept, (chosen, c.after.path)])
    last = c.load(kept[-1][1]).hash if kept else None
    end: list[tuple[None, LoadedGenerator]] = (
        [] if last == c.after.hash or chosen is not None else [(None, c.after)]
    )
    # (kimg, network)
    networks: list[tuple[float | None, LoadedGenerator | Path]] = [(0.0, c.before), *kept, *end]
    known = {PROXY: True, SECOND: c.held_out is not None, ORACLE: c.synthetic}
    values = {name: list[np.ndarray]() for name, here in known.items() if here}
    start = None
    distances = []
    for _, source in networks:
        generator = c.load(source) if isinstance(source, Path) else source
        sigma = densities(c, generator, seeds)
        start = sigma if start is None else start
        distances.append(density_l1(sigma, start).double().numpy())
        for name, found in values.items():
            found.append(
                utilities(generator.generator, seeds)
                if name == ORACLE
                else c.scores(generator, seeds, held_out=name == SECOND).double().numpy()
            )
    columns = {name: np.stack(found, axis=1) for name, found in values.items()}  # [N, T]
    curves = {}
    rows = []
    for name, column in columns.items():
        deviation = float(column[:, 0].std(ddof=1)) or 1.0
        steps = means_of_columns((column - column[:, :1]) / deviation)
        at = None if name == PROXY else divergence(columns[PROXY], column)
        curves[name] = {"steps": steps, "standard_deviation": deviation, "divergence": at}
        rows += [
            {
                "measure": name,
                "kimg": kimg,
                "distance": float(distances[t].mean()),
                "raw_mean": float(column[:, t].mean()),
                **steps[t],
            }
            for t, (kimg, _) in enumerate(networks)
        ]
    data = {
        "distance": [float(d.mean()) for d in distances],
        "kimg": [kimg for kimg, _ in networks],
        "curves": curves,
    }
    says = [*_says(c, data), *([NO_SNAPSHOTS] if len(networks) < 3 else [])]
    return Finding(facts=c.facts(seeds, CURVE_ROLES, BOOTSTRAP), data=data, rows=rows, says=says)


def independence(c: Comparison) -> str:
    """What the descriptions of both rewards say of their independence."""
    if c.held_out is None:
        return NO_SECOND
    first = c.reward.provenance
    second = c.held_out.provenance
    text = "The held-out reward took no part in tuning this generator's weights"
    if settings_of(c.run).get("hashes", {}).get("reward") == c.held_out_hash:
        return (
            "The run names the held-out reward as the one that it optimised: it is not held out. Name another"
            " with --heldout-reward."
        )
    if not (c.reward.labels and c.held_out.labels):
        return f"{text}; whether its labels are others than the tuned reward's is not recorded."
    seeds = "another seed" if first.get("seed") != second.get("seed") else "the same seed"
    if c.reward.labels & c.held_out.labels:
        return (
            f"{text}, but it learnt from the same labels with {seeds}: it shares their faults, and a rise of"
            " both is weaker evidence than one of a reward with labels of its own. Train one on other labels"
            " and name it with --heldout-reward."
        )
    return f"{text}; it learnt from other labels with {seeds}."


def _says(c: Comparison, data: dict) -> list[str]:
    ends = {name: curve["steps"][-1] for name, curve in data["curves"].items()}
    says = [
        f"The {name} changes by {span(e['mean'], e['lo'], e['hi'], '+.2f')} of its standard deviations"
        " before."
        for name, e in ends.items()
    ]
    for name, curve in data["curves"].items():
        if name != PROXY and curve["divergence"] is None:
            says.append(
                f"No divergence: the {name} is not shown to fall from its highest while the tuned reward"
                " rises."
            )
        elif name != PROXY:
            where = data["kimg"][curve["divergence"]]
            says.append(
                f"Divergence: the {name} falls from {'the end' if where is None else f'{where:g} kimg'} on"
                f" (distance {data['distance'][curve['divergence']]:.3g}) while the tuned reward rises. Stop"
                " there, or raise --lambda-sigma."
            )
    says += [
        independence(c),
        (
            "The distance is no KL divergence: these generators have no density to compare. It only orders"
            " the networks."
        ),
    ]
    return [
        *says,
        (
            "The oracle is the formula whose noisy answers the labels are: it shows whether tuning reached"
            " what the reward should mean. It is no second opinion; the geometry measures, which no label"
            " used, are."
            if c.synthetic
            else ("No oracle: it applies to synthetic data alone. People's judgement is what settles this.")
        ),
    ]


@style.plot(
    size=(9.4, 3.4),
    xlabel=DISTANCE,
    ylabel="mean change, standard deviations before",
    title="Over-optimisation",
)
def plot_curves(axes, data: dict):
    colours = {PROXY: style.colour("reward"), SECOND: style.colour("held-out"), ORACLE: style.CYCLE[4]}
    x = data["distance"]
    for name, curve in data["curves"].items():
        style.band(axes, x, curve["steps"], colours[name], name, markersize=4)
        if curve["divergence"] is not None:
            axes.axvline(
                x[curve["divergence"]],
                color=colours[name],
                linestyle="--",
                linewidth=1.2,
                label=f"{name}: divergence",
            )
    axes.axhline(0, color=style.colour("noise"), linewidth=1)
