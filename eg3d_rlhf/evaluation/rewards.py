"""Analyse rewards of the same latents: before and after tuning, over truncation, and over snapshots.

The last part tests for over-optimisation: it compares the tuned reward with a held-out reward and, for
synthetic data, with the oracle.

Two intervals of a trajectory's slope are reported, since they answer different questions. The *spread* is the
range of the middle 95 % of the single latents' least-squares slopes. It contains zero unless nearly all
latents move in the same direction. The interval of the *mean* slope is a bootstrap over latents. With many
latents it detects a drift that is too small to see on a single one. Neither interval covers the variation
between training runs, since there is one run of each kind.
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

PSIS = (0.25, 0.5, 0.7, 1.0)  # truncations over which the mean reward is plotted
ROLES = ("before", "after", "reward")
RANK_PSIS = (0.7, 0.25)  # truncations between which ranks are compared
FEWEST = 3  # least number of networks for a slope, with the one before tuning


def jobs(c: Comparison) -> list[Job]:
    """List the jobs of this part: reward shift, reward over psi, rank consistency, and trajectories."""
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
    """Return the job of the trajectories, or a part that explains which snapshots are missing."""
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
    # hashes of the snapshots are inputs: a run that has new ones is measured again
    files = {
        role: {f"{kimg:g}": file_hash(path) for kimg, path in snapshots} for role, snapshots in kept.items()
    }
    plots = {"trajectories": plot_trajectories, "slopes": plot_slopes}
    return c.job(key, title, trajectories, plots, ("before", "reward"), n=c.n, files=files)


def shift(c: Comparison, _folder: Path) -> Finding:
    """Compute paired changes of the reward, and the line fitted to final against initial reward."""
    seeds = c.seeds()
    # float64, so that the statistics add no rounding of their own
    scores = {role: c.scores(generator, seeds).double().numpy() for role, generator in c.generators().items()}
    paired = paired_of(scores)
    lines = {role: statistics.fit_line(scores["before"], scores[role])._asdict() for role in paired}
    rows = seed_rows(
        seeds, {**scores, **{f"delta_{role}": scores[role] - scores["before"] for role in paired}}
    )
    # everything that the plots read; they see no tensors
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
    """Describe the change of the reward in sentences."""
    p = paired["after"]
    line = lines["after"]
    delta = span(p["mean"], p["mean_lo"], p["mean_hi"])
    says = [
        (
            f"The reward changes by {delta} on average; it rises for {p['positive']} of {p['n']} latents "
            f"(share {span(p['positive_rate'], p['positive_lo'], p['positive_hi'], '.3f')})."
        ),
        (
            "The run optimised this reward. Its rise shows that the optimisation worked; it does not show"
            " that the shapes are better."
        ),
    ]
    # slope 1: the order is kept and all shift alike; 0: the initial reward predicts nothing
    if line["lo"] > 0:
        kept = (
            "latents keep part of their initial order"
            if line["hi"] < 1
            else "the differences between latents are kept"
        )
    else:
        kept = (
            "no dependence of the final on the initial reward is shown"
            if line["hi"] > 0
            else "the initial order is reversed"
        )
    says.append(
        f"Final against initial reward has slope {span(line['slope'], line['lo'], line['hi'])}: {kept}."
    )
    if "control" not in paired:
        return [*says, NO_CONTROL]
    q = paired["control"]
    # the guard is for a run whose mean change is exactly zero
    share = abs(q["mean"]) / max(abs(p["mean"]), 1e-12)
    moved = (
        "no shift is shown"
        if contains_zero(q["mean_lo"], q["mean_hi"])
        else "a small shift, which training without the reward causes in this run"
    )
    alone = "training without the reward also moves it much, so the shift is not due to the reward alone"
    return [
        *says,
        (
            f"In the control the mean change is {span(q['mean'], q['mean_lo'], q['mean_hi'])}, {share:.1%} of"
            f" the tuned one: {moved if share < 0.1 else alone}."
        ),
    ]


def over_psi(c: Comparison, _folder: Path) -> Finding:
    """Compute the mean reward at each truncation, before and after tuning."""
    seeds = c.seeds()
    rows = []
    for role in ("before", "after"):
        for psi in PSIS:
            values = c.scores(c.generators()[role], seeds, psi).double().numpy()
            mean, lo, hi = bootstrap_mean_interval(values)
            rows.append(
                {"role": role, "psi": psi, "mean": mean, "lo": lo, "hi": hi, "std": float(values.std(ddof=1))}
            )
    # the truncation with the highest mean reward, by role
    best = {
        role: max((r for r in rows if r["role"] == role), key=lambda r: r["mean"])
        for role in ("before", "after")
    }
    says = [
        (
            f"Highest mean reward: before at ψ = {best['before']['psi']:g} ({best['before']['mean']:.2f}),"
            f" after at ψ = {best['after']['psi']:g} ({best['after']['mean']:.2f}). Only the listed"
            " truncations were tried."
        ),
        (
            "Truncation pulls shapes towards the mean shape, so a reward that rises as ψ falls prefers"
            " typical shapes."
        ),
    ]
    return Finding(
        # psi=None: the part has several truncations, so the facts state none
        facts=c.facts(seeds, ROLES, BOOTSTRAP, psi=None),
        data={"rows": rows},
        rows=rows,
        says=says,
    )


def ranks(c: Comparison, _folder: Path) -> Finding:
    """Compute Spearman's rho between the rewards of the same latents at two truncations."""
    seeds = c.seeds()
    rho = {}  # by role
    scores = {}  # by role: rewards at the two truncations
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
            "Both rewards belong to the same latent, so agreement is expected. A rho below 1 means that"
            " truncation changes the order."
        ),
    ]
    data = {"scores": scores, "rho": rho, "psis": RANK_PSIS}
    return Finding(
        facts=c.facts(seeds, ROLES, statistics.RANK_INTERVAL, psi=None), data=data, rows=rows, says=says
    )


def slope_summary(times: np.ndarray, values: np.ndarray) -> dict:
    """Fit a slope per kimg to each row of values [N, T], and summarise the slopes.

    Returns: the slopes; their mean with its bootstrap interval; the range of the middle 95 %.
    """
    slopes = statistics.slopes(times, values)  # [N]
    mean, lo, hi = bootstrap_mean_interval(slopes)
    low, high = np.quantile(slopes, [0.025, 0.975])
    return {
        "slopes": slopes.tolist(),
        "mean": mean,
        "mean_lo": lo,
        "mean_hi": hi,
        "spread_lo": float(low),  # of single latents, not of the mean
        "spread_hi": float(high),
    }


def trajectories(c: Comparison, _folder: Path) -> Finding:
    """Score the same latents under every snapshot of the tuned run and of the control."""
    roles: dict[str, dict] = {}
    seeds = c.seeds()
    rows = []
    start = c.scores(c.before, seeds).double().numpy()  # [N]; the first point of both trajectories
    for role in ("after", "control"):
        kept = [(kimg, path) for kimg, path in c.snapshots(role) if kimg > 0]
        # a control without snapshots is left out
        if len(kept) + 1 < FEWEST:
            continue
        times = np.array([0.0, *(kimg for kimg, _ in kept)])  # [T]; both runs start from the same network
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
    """Describe the slopes in sentences."""
    says = []
    for role, r in roles.items():
        name = "tuned run" if role == "after" else role
        contains = "contains" if contains_zero(r["spread_lo"], r["spread_hi"]) else "does not contain"
        says.append(
            f"Slope of the {name}, reward per kimg: the middle 95 % of latents lie in [{r['spread_lo']:+.2f},"
            f" {r['spread_hi']:+.2f}], which {contains} zero; mean"
            f" {span(r['mean'], r['mean_lo'], r['mean_hi'], '+.2f')}."
        )
    if "control" not in roles:
        return [*says, NO_CONTROL + " It needs snapshots, too: --snap=1."]
    tuned = roles["after"]
    control = roles["control"]
    # decided by the interval of the mean, which detects smaller drifts than the spread does
    if contains_zero(control["mean_lo"], control["mean_hi"]):
        return [*says, "The mean slope of the control does not differ from zero: no drift is shown."]
    return [
        *says,
        (
            "On average the control does drift: its mean slope differs from zero, at"
            f" {abs(control['mean'] / tuned['mean']):.1%} of the tuned run's. Further GAN training moves more"
            " latents in one direction than in the other, and a mean over many latents resolves that. One run"
            " cannot show if other training seeds drift in the same direction."
        ),
    ]


@style.plot(xlabel="reward", ylabel="latents", title="Reward of held-out latents")
def plot_histograms(axes, data: dict):
    """Plot histograms of the reward before, after, and of the control."""
    # the same bins for all roles
    edges = np.histogram_bin_edges(np.concatenate([np.asarray(v) for v in data["scores"].values()]), bins=30)
    for role, values in data["scores"].items():
        axes.hist(
            values,
            bins=edges,
            histtype="step" if role == "control" else "stepfilled",  # an outline, so that it hides nothing
            alpha=1 if role == "control" else 0.6,
            color=style.colour(role),
            label=role,
            linewidth=1.4,
        )


@style.plot(
    xlabel="latents, in order of the change", ylabel="change of the reward", title="Change per latent"
)
def plot_deltas(axes, data: dict):
    """Plot the change of every latent, in ascending order."""
    before = np.asarray(data["scores"]["before"])
    for role, p in data["paired"].items():
        delta = np.sort(np.asarray(data["scores"][role]) - before)
        axes.plot(
            np.arange(1, len(delta) + 1),
            delta,
            ".",
            markersize=3,
            color=style.colour(role),
            label=f"{role}: {p['positive']}/{p['n']} rise",  # number of latents
        )
    axes.axhline(0, color=style.colour("noise"), linewidth=1)


@style.plot(7, xlabel="reward before", ylabel="reward after", title="Final against initial reward")
def plot_lines(axes, data: dict):
    """Plot final against initial reward, with the fitted line of each role."""
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
    # points on the diagonal have not changed
    axes.plot(ends, ends, "--", color=style.colour("noise"), linewidth=1, label="no change")


@style.plot(xlabel="truncation ψ", ylabel="mean reward", title="Reward over truncation")
def plot_psi(axes, data: dict):
    """Plot the mean reward with its interval over truncation."""
    # dict.fromkeys removes repeated roles and keeps their order
    for role in dict.fromkeys(row["role"] for row in data["rows"]):
        rows = [row for row in data["rows"] if row["role"] == role]
        style.band(axes, [row["psi"] for row in rows], rows, style.colour(role), role, markersize=3)


def plot_ranks(data: dict):
    """Plot the ranks of latents at one truncation against those at the other."""
    drawn, axes = style.figure(columns=2)
    high, low = data["psis"]
    for axis, role in zip(axes, ("before", "after"), strict=True):
        x, y = (rankdata(values) for values in data["scores"][role])  # ties share their mean rank
        rho = data["rho"][role]
        axis.plot(x, y, ".", markersize=4, color=style.colour(role))
        axis.set(
            xlabel=f"rank at ψ = {high:g}",
            ylabel=f"rank at ψ = {low:g}",
            title=f"{role}: rho {rho['mean']:.2f} [{rho['lo']:.2f}, {rho['hi']:.2f}]",
        )
    return drawn


def plot_trajectories(data: dict):
    """Plot the reward of every latent over training, with the mean on top."""
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
    # the same limits in all panels, so that control and tuned run can be compared
    every = np.concatenate([np.ravel(r["values"]) for r in data["roles"].values()])
    for axis in np.atleast_1d(axes):
        axis.set_ylim(every.min() - 0.5, every.max() + 0.5)  # margin in units of the reward
    return drawn


def plot_slopes(data: dict):
    """Plot the distribution of the latents' slopes for each run, with both intervals."""
    drawn, axes = style.figure(columns=len(data["roles"]))
    for axis, (role, r) in zip(np.atleast_1d(axes), data["roles"].items(), strict=True):
        axis.hist(r["slopes"], bins=25, color=style.colour(role), alpha=0.6)
        # the wide band is the spread of latents, the narrow one the interval of the mean
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


# Over-optimisation: the tuned reward is a proxy, which may rise while the quality that it represents falls.
# The curves show the tuned reward, a held-out reward, and for synthetic data the oracle (the rule of the
# simulated annotator), over the distance from the generator before tuning. T networks in order of training;
# the first is the one before tuning.

DISTANCE = "mean |σ - σ before| over the whole cube (density-consistency distance)"
CURVE_ROLES = ("before", "after", "reward", "held-out")  # files whose hashes the facts list
PROXY = "tuned reward"  # the one that the run optimised
SECOND = "held-out reward"  # trained on other labels; only where one is given
ORACLE = "oracle"  # utility of the simulated annotator without noise
NO_SECOND = (
    "No held-out reward was given. Train one on other labels with another seed (tools/train_reward.py), and"
    " name it with --heldout-reward."
)
NO_SNAPSHOTS = (
    "Only the networks before and after are shown, since the run kept no snapshot between them. A peak within"
    " the run would be missed. Train with --snap=1."
)


def curve_jobs(c: Comparison) -> list[Job]:
    """Return the single job of this part; it uses the snapshots and evaluators that are available."""
    # hashes of the snapshots are inputs: a run that has new ones is measured again
    files = {f"{kimg:g}": file_hash(path) for kimg, path in c.snapshots("after")}
    return [
        c.job(
            "over-optimisation",
            "Over-optimisation: tuned reward against held-out reward and oracle",
            overoptimisation,
            {"curves": plot_curves},
            CURVE_ROLES,
            n=c.n,
            files=files,
            data=c.data,
        )
    ]


def divergence(proxy: np.ndarray, other: np.ndarray, seed: int = 0) -> int | None:
    """Return the index of the network after which the proxy rises while the other measure falls, or None.

    It is the peak p of the other measure's mean, if a later network exists whose paired differences to p
    exclude zero: upwards for the proxy, and downwards for the other. The intervals are bootstraps over
    latents. Together they have 95 % confidence over all T (T - 1) / 2 pairs of a peak and a later network,
    since even pure noise falls after its peak.

    Args: proxy, other [N, T] of the same latents and networks.
    """
    peak = int(other.mean(axis=0).argmax())
    networks = other.shape[1]
    # Bonferroni correction over the pairs; one network has no pair
    confidence = 1 - 0.05 / max(1, networks * (networks - 1) / 2)
    # the peak at the last network leaves no later one: no divergence
    for later in range(peak + 1, networks):
        rise = bootstrap_mean_interval(proxy[:, later] - proxy[:, peak], confidence, seed=seed)
        fall = bootstrap_mean_interval(other[:, later] - other[:, peak], confidence, seed=seed)
        if rise.lo > 0 and fall.hi < 0:
            return peak
    return None


@torch.no_grad()
def densities(c: Comparison, generator: LoadedGenerator, seeds: range) -> torch.Tensor:
    """Return raw densities [N, D, H, W] over the whole cube, on the CPU.

    The grid is that of the density-consistency term, so that the distances are comparable with its values.
    """
    spec = SlabSpec.of(generator.generator.bounds, ORACLE_RESOLUTION)
    return torch.cat([field.density_grid(spec).cpu() for field in c.fields(generator, seeds)])


def overoptimisation(c: Comparison, _folder: Path) -> Finding:
    """Compute the curve of every measure over distance, and its point of divergence.

    A curve is the change of the mean, in standard deviations of the measure before tuning.
    """
    seeds = c.seeds()
    kept = [(kimg, path) for kimg, path in c.snapshots("after") if kimg > 0]
    # the network of an early stop lies within the run: it is sorted in among the snapshots, not at the end
    chosen = c.after.nets.cur_nimg / 1000 if c.after.path.name == KEPT else None
    if chosen is not None and chosen not in dict(kept):
        kept = sorted([*kept, (chosen, c.after.path)])
    # the last snapshot is often the final network; then it must not be shown twice
    last = c.load(kept[-1][1]).hash if kept else None
    end: list[tuple[None, LoadedGenerator]] = (
        [] if last == c.after.hash or chosen is not None else [(None, c.after)]
    )
    # (kimg, network)
    networks: list[tuple[float | None, LoadedGenerator | Path]] = [(0.0, c.before), *kept, *end]
    available = {PROXY: True, SECOND: c.held_out is not None, ORACLE: c.synthetic}
    values = {name: list[np.ndarray]() for name, here in available.items() if here}
    start = None  # densities before tuning
    distances = []
    for _, source in networks:
        # a snapshot is in memory only while it is measured
        generator = c.load(source) if isinstance(source, Path) else source
        sigma = densities(c, generator, seeds)
        start = sigma if start is None else start
        distances.append(density_l1(sigma, start).double().numpy())  # [N]
        for name, scores in values.items():
            scores.append(
                utilities(generator.generator, seeds)
                if name == ORACLE
                else c.scores(generator, seeds, held_out=name == SECOND).double().numpy()
            )
    columns = {name: np.stack(scores, axis=1) for name, scores in values.items()}  # [N, T]
    curves = {}
    rows = []
    for name, column in columns.items():
        std_before = float(column[:, 0].std(ddof=1)) or 1.0  # a constant measure keeps its unit
        steps = means_of_columns((column - column[:, :1]) / std_before)
        # index into the networks; the proxy cannot diverge from itself
        at = None if name == PROXY else divergence(columns[PROXY], column)
        curves[name] = {"steps": steps, "standard_deviation": std_before, "divergence": at}
        rows += [
            {
                "measure": name,
                "kimg": kimg,
                "distance": float(distances[t].mean()),  # raw density
                "raw_mean": float(column[:, t].mean()),  # in the measure's own unit
                **steps[t],
            }
            for t, (kimg, _) in enumerate(networks)
        ]
    data = {
        "distance": [float(d.mean()) for d in distances],
        "kimg": [kimg for kimg, _ in networks],  # None: the final network, which is not a snapshot
        "curves": curves,
    }
    says = [*_says(c, data), *([NO_SNAPSHOTS] if len(networks) < 3 else [])]
    return Finding(facts=c.facts(seeds, CURVE_ROLES, BOOTSTRAP), data=data, rows=rows, says=says)


def independence(c: Comparison) -> str:
    """Describe how independent the held-out reward is of the tuned one, by the provenance of both."""
    if c.held_out is None:
        return NO_SECOND
    first = c.reward.provenance
    second = c.held_out.provenance
    text = "The held-out reward took no part in tuning this generator's weights"
    # a user may name the tuned reward by mistake, which would look like perfect agreement
    if settings_of(c.run).get("hashes", {}).get("reward") == c.held_out_hash:
        return (
            "The run optimised the reward that was given as held out, so it is not held out. Name another one"
            " with --heldout-reward."
        )
    if not (c.reward.labels and c.held_out.labels):
        # the list of labels is an optional part of a reward's provenance
        return f"{text}. It is not recorded if its labels differ from those of the tuned reward."
    seeds = "another seed" if first.get("seed") != second.get("seed") else "the same seed"
    # one common label is enough, since both rewards then share its error
    if c.reward.labels & c.held_out.labels:
        return (
            f"{text}, but it was trained on the same labels with {seeds}. It shares the errors of these"
            " labels, so a rise of both rewards is weaker evidence. Train a reward on other labels, and name"
            " it with --heldout-reward."
        )
    return f"{text}. It was trained on other labels with {seeds}."


def _says(c: Comparison, data: dict) -> list[str]:
    """Describe the curves in sentences."""
    # the last network of the curve against the one before tuning
    ends = {name: curve["steps"][-1] for name, curve in data["curves"].items()}
    says = [
        f"The {name} changes by {span(e['mean'], e['lo'], e['hi'], '+.2f')} of its standard deviations"
        " before."
        for name, e in ends.items()
    ]
    for name, curve in data["curves"].items():
        if name != PROXY and curve["divergence"] is None:
            says.append(
                f"No divergence: the {name} is not shown to fall after its peak while the tuned reward rises."
            )
        elif name != PROXY:
            where = data["kimg"][curve["divergence"]]  # None: the final network
            says.append(
                f"Divergence: the {name} falls from {'the end' if where is None else f'{where:g} kimg'} on"
                f" (distance {data['distance'][curve['divergence']]:.3g}) while the tuned reward rises. Stop"
                " there, or raise --lambda-sigma."
            )
    says += [
        independence(c),
        (
            "The distance is not a KL divergence, since a GAN has no explicit likelihood. It only orders the"
            " networks."
        ),
    ]
    return [
        *says,
        (
            "The labels are noisy answers of the oracle, which is a formula. The oracle therefore shows if"
            " tuning reached what the labels ask for. It is not independent evidence; the geometry measures"
            " are, since no label used them."
            if c.synthetic
            else "There is no oracle, since it applies only to synthetic data. Ask people which shapes are"
            " better."
        ),
    ]


@style.plot(
    size=(9.4, 3.4),
    xlabel=DISTANCE,
    ylabel="mean change, standard deviations before",
    title="Over-optimisation",
)
def plot_curves(axes, data: dict):
    """Plot every measure over distance, with a dashed line at each divergence."""
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
