"""Rewards of the same latents: before and after, over truncation, and over the snapshots of a run with the control beside them.

Two intervals of a trajectory's slope stand side by side, since they answer different questions. The *spread* is the range in which the
middle 95 % of the latents' own least-squares slopes lie: it contains zero unless nearly all latents move the same way. The interval of the
*mean* slope is a bootstrap over latents: with many latents it finds a drift that is far too small to see on any one of them, and it says
nothing of other training runs, whose number here is one each.
Letters: N latents, T snapshots.
"""

from pathlib import Path

import numpy as np

from eg3d_rlhf.core import statistics
from eg3d_rlhf.core.cli import file_hash
from eg3d_rlhf.evaluation.comparison import Comparison
from eg3d_rlhf.evaluation.paired import BOOTSTRAP, NO_CONTROL, contains_zero, span
from eg3d_rlhf.experiments import style
from eg3d_rlhf.experiments.jobs import Finding, Job

PSIS = (0.25, 0.5, 0.7, 1.0)
ROLES = ("before", "after", "reward")
RANK_PSIS = (0.7, 0.25)
FEWEST = 3  # networks, the one before tuning among them, under a slope


def jobs(c: Comparison) -> list[Job]:
    """Reward shift, reward over psi, rank consistency, and trajectories where the run kept enough snapshots."""
    shifts = {"histograms": plot_histograms, "deltas": plot_deltas, "final-against-initial": plot_lines}
    return [
        c.job("reward-shift", "Reward of the same latents before and after", shift, shifts, n=c.n),
        c.job("reward-psi", "Reward over truncation", over_psi, {"means": plot_psi}, ROLES, n=c.n, psis=PSIS),
        c.job("rank-consistency", "Do latents keep their rank under truncation?", ranks, {"scatter": plot_ranks}, ROLES, n=c.n,
              psis=RANK_PSIS),
        trajectories_job(c),
    ]


def trajectories_job(c: Comparison) -> Job:
    """The trajectories, or a part that says which snapshots are missing."""
    kept = {role: c.snapshots(role) for role in ("after", "control")}
    key, title = "trajectories", "Reward of fixed latents over training"
    if len(kept["after"]) + 1 < FEWEST:
        where = f" in {c.run.name}" if c.run is not None else " (no run folder was named)"
        return c.absent(key, title, f"A trajectory needs {FEWEST - 1} snapshots of the tuned run; {len(kept['after'])} found{where}. Train "
                        "with --snap=1, which keeps a snapshot per tick, and name the run with --run.")
    files = {role: {f"{kimg:g}": file_hash(path) for kimg, path in found} for role, found in kept.items()}
    plots = {"trajectories": plot_trajectories, "slopes": plot_slopes}
    return c.job(key, title, trajectories, plots, ("before", "reward"), n=c.n, files=files)


def shift(c: Comparison, _folder: Path) -> Finding:
    """Paired deltas with their mean and share positive; line of final against initial reward."""
    seeds = c.seeds()
    scores = {role: c.scores(generator, seeds).double().numpy() for role, generator in c.generators().items()}
    later = {role: values for role, values in scores.items() if role != "before"}
    paired = {role: statistics.paired_summary(scores["before"], values)._asdict() for role, values in later.items()}
    lines = {role: statistics.fit_line(scores["before"], values)._asdict() for role, values in later.items()}
    columns = {**scores, **{f"delta_{role}": values - scores["before"] for role, values in later.items()}}
    rows = [{"seed": seed, **{name: float(column[i]) for name, column in columns.items()}} for i, seed in enumerate(seeds)]
    data = {"scores": {role: values.tolist() for role, values in scores.items()}, "paired": paired, "lines": lines}
    facts = c.facts(seeds, ("before", "after", "control", "reward"), f"mean: {BOOTSTRAP}; share: Wilson; {statistics.LINE_INTERVAL}")
    return Finding(facts=facts, data=data, rows=rows, says=_shift_says(paired, lines))


def _shift_says(paired: dict, lines: dict) -> list[str]:
    p, line = paired["after"], lines["after"]
    delta = span(p["mean"], p["mean_lo"], p["mean_hi"])
    says = [
        f"The reward changes by {delta} on average; it rises for {p['positive']} of {p['n']} latents "
        f"(share {span(p['positive_rate'], p['positive_lo'], p['positive_hi'], '.3f')}).",
        "This is the reward that the run optimised: its rise says that tuning did what it was asked, not that the shapes are better.",
    ]
    if line["lo"] > 0:
        kept = "latents keep part of their initial order" if line["hi"] < 1 else "a latent's initial reward carries over"
    else:
        kept = "no dependence of the final on the initial reward is shown" if line["hi"] > 0 else "the initial order is turned round"
    says.append(f"Final against initial reward has slope {span(line['slope'], line['lo'], line['hi'])}: {kept}.")
    if "control" not in paired:
        return [*says, NO_CONTROL]
    q = paired["control"]
    share = abs(q["mean"]) / max(abs(p["mean"]), 1e-12)
    moved = "no shift is shown" if contains_zero(q["mean_lo"], q["mean_hi"]) else "a small shift that training alone makes in this run"
    return [*says, f"In the control the mean change is {span(q['mean'], q['mean_lo'], q['mean_hi'])}, {share:.1%} of the tuned one: "
            f"{moved if share < 0.1 else 'training alone moves this reward much, and the shift is not the reward phase alone'}."]


def over_psi(c: Comparison, _folder: Path) -> Finding:
    """Mean reward at several truncations."""
    seeds, rows = c.seeds(), []
    for role in ("before", "after"):
        for psi in PSIS:
            values = c.scores(c.generators()[role], seeds, psi).double().numpy()
            mean, lo, hi = statistics.bootstrap_mean_interval(values)
            rows.append({"role": role, "psi": psi, "mean": mean, "lo": lo, "hi": hi, "std": float(values.std(ddof=1))})
    best = {role: max((r for r in rows if r["role"] == role), key=lambda r: r["mean"]) for role in ("before", "after")}
    says = [
        f"Highest mean reward: before at ψ = {best['before']['psi']:g} ({best['before']['mean']:.2f}), after at ψ = "
        f"{best['after']['psi']:g} ({best['after']['mean']:.2f}), of the truncations tried.",
        "Truncation pulls shapes towards the mean shape, so a reward that rises as ψ falls prefers typical shapes.",
    ]
    return Finding(facts=c.facts(seeds, ROLES, BOOTSTRAP, psi=None), data={"rows": rows}, rows=rows, says=says)


def ranks(c: Comparison, _folder: Path) -> Finding:
    """Spearman's rho of the rewards at two truncations of the same latents."""
    seeds, found, scores = c.seeds(), {}, {}
    for role in ("before", "after"):
        high_scores, low_scores = (c.scores(c.generators()[role], seeds, psi).double().numpy() for psi in RANK_PSIS)
        scores[role] = [high_scores.tolist(), low_scores.tolist()]
        found[role] = statistics.spearman(high_scores, low_scores)._asdict()
    high, low = RANK_PSIS
    rows = [{"role": role, "spearman": r["mean"], "lo": r["lo"], "hi": r["hi"]} for role, r in found.items()]
    before, after = (span(r["mean"], r["lo"], r["hi"], ".3f") for r in (found["before"], found["after"]))
    says = [
        f"Spearman's rho between the rewards at ψ = {high:g} and {low:g}: before {before}, after {after}.",
        "Both share the latent, so agreement is expected; what is missing to 1 is order that truncation changes.",
    ]
    data = {"scores": scores, "rho": found, "psis": RANK_PSIS}
    return Finding(facts=c.facts(seeds, ROLES, statistics.RANK_INTERVAL, psi=None), data=data, rows=rows, says=says)


def slope_summary(times: np.ndarray, values: np.ndarray) -> dict:
    """Slopes per kimg of values [N, T]: their mean with bootstrap interval, and the range of the middle 95 %."""
    found = statistics.slopes(times, values)
    mean, lo, hi = statistics.bootstrap_mean_interval(found)
    low, high = np.quantile(found, [0.025, 0.975])
    return {"slopes": found.tolist(), "mean": mean, "mean_lo": lo, "mean_hi": hi, "spread_lo": float(low), "spread_hi": float(high)}


def trajectories(c: Comparison, _folder: Path) -> Finding:
    """Rewards over snapshots and per-latent slopes."""
    roles: dict[str, dict] = {}
    seeds, rows = c.seeds(), []
    start = c.scores(c.before, seeds).double().numpy()
    for role in ("after", "control"):
        kept = [(kimg, path) for kimg, path in c.snapshots(role) if kimg > 0]
        if len(kept) + 1 < FEWEST:
            continue
        times = np.array([0.0, *(kimg for kimg, _ in kept)])
        values = np.stack([start, *(c.scores(c.load(path), seeds).double().numpy() for _, path in kept)], axis=1)  # [N, T]
        steps = [statistics.bootstrap_mean_interval(column)._asdict() for column in values.T]
        roles[role] = {"kimg": times.tolist(), "values": values.tolist(), "means": steps, **slope_summary(times, values)}
        rows += [{"role": role, "kimg": float(t), **step} for t, step in zip(times, steps, strict=True)]
    interval = f"range of the middle 95 % of latents' least-squares slopes; mean slope: {BOOTSTRAP}"
    facts = c.facts(seeds, ("before", "after", "control", "reward"), interval)
    return Finding(facts=facts, data={"roles": roles}, rows=rows, says=_trajectory_says(roles))


def _trajectory_says(roles: dict) -> list[str]:
    says = []
    for role, r in roles.items():
        name = "tuned run" if role == "after" else role
        verdict = "contains" if contains_zero(r["spread_lo"], r["spread_hi"]) else "does not contain"
        says.append(f"Slope of the {name}, reward per kimg: the middle 95 % of latents lie in [{r['spread_lo']:+.2f}, {r['spread_hi']:+.2f}"
                    f"], which {verdict} zero; mean {span(r['mean'], r['mean_lo'], r['mean_hi'], '+.2f')}.")
    if "control" not in roles:
        return [*says, NO_CONTROL + " It needs snapshots, too: --snap=1."]
    tuned, control = roles["after"], roles["control"]
    if contains_zero(control["mean_lo"], control["mean_hi"]):
        return [*says, "No drift of the control is shown, neither for single latents nor on average."]
    return [
        *says, f"On average the control does drift: its mean slope differs from zero, at {abs(control['mean'] / tuned['mean']):.1%} of the "
        "tuned run's. Going on with GAN training moves more latents one way than the other, and a mean over many latents resolves that. "
        "One run cannot show whether other training seeds drift the same way.",
    ]


@style.plot(xlabel="reward", ylabel="latents", title="Reward of held-out latents")
def plot_histograms(axes, data: dict):
    """Distribution of the reward per network."""
    edges = np.histogram_bin_edges(np.concatenate([np.asarray(v) for v in data["scores"].values()]), bins=30)
    for role, values in data["scores"].items():
        axes.hist(values, bins=edges, histtype="step" if role == "control" else "stepfilled", alpha=1 if role == "control" else 0.6,
                  color=style.colour(role), label=role, linewidth=1.4)


@style.plot(xlabel="latents, in order of the change", ylabel="change of the reward", title="Change per latent")
def plot_deltas(axes, data: dict):
    """Every latent's change, in order."""
    before = np.asarray(data["scores"]["before"])
    for role, p in data["paired"].items():
        delta = np.sort(np.asarray(data["scores"][role]) - before)
        axes.plot(np.arange(1, len(delta) + 1), delta, ".", markersize=3, color=style.colour(role),
                  label=f"{role}: {p['positive']}/{p['n']} rise")
    axes.axhline(0, color=style.colour("noise"), linewidth=1)


@style.plot(7, xlabel="reward before", ylabel="reward after", title="Final against initial reward")
def plot_lines(axes, data: dict):
    """Final against initial reward with the fitted lines."""
    before = np.asarray(data["scores"]["before"])
    ends = np.array([before.min(), before.max()])
    for role, line in data["lines"].items():
        axes.plot(before, data["scores"][role], ".", markersize=4, alpha=0.6, color=style.colour(role))
        axes.plot(ends, line["intercept"] + line["slope"] * ends, color=style.colour(role),
                  label=f"{role}: slope {line['slope']:.2f} [{line['lo']:.2f}, {line['hi']:.2f}]")
    axes.plot(ends, ends, "--", color=style.colour("noise"), linewidth=1, label="no change")


@style.plot(xlabel="truncation ψ", ylabel="mean reward", title="Reward over truncation")
def plot_psi(axes, data: dict):
    """Mean reward with interval over truncation."""
    for role in dict.fromkeys(row["role"] for row in data["rows"]):
        rows = [row for row in data["rows"] if row["role"] == role]
        style.band(axes, [row["psi"] for row in rows], rows, style.colour(role), role, markersize=3)


def plot_ranks(data: dict):
    """Ranks of the same latents at both truncations."""
    from scipy.stats import rankdata

    drawn, axes = style.figure(columns=2)
    high, low = data["psis"]
    for axis, role in zip(axes, ("before", "after"), strict=True):
        x, y = (rankdata(values) for values in data["scores"][role])
        rho = data["rho"][role]
        axis.plot(x, y, ".", markersize=4, color=style.colour(role))
        axis.set(xlabel=f"rank at ψ = {high:g}", ylabel=f"rank at ψ = {low:g}",
                 title=f"{role}: rho {rho['mean']:.2f} [{rho['lo']:.2f}, {rho['hi']:.2f}]")
    return drawn


def plot_trajectories(data: dict):
    """Every latent's reward over training, the mean on top."""
    drawn, axes = style.figure(columns=len(data["roles"]))
    for axis, (role, r) in zip(np.atleast_1d(axes), data["roles"].items(), strict=True):
        axis.plot(r["kimg"], np.asarray(r["values"]).T, color=style.colour(role), alpha=0.15, linewidth=0.6)
        axis.plot(r["kimg"], [step["mean"] for step in r["means"]], "o-", color=style.colour(role), linewidth=2, markersize=4, label="mean")
        axis.set(xlabel="training, thousand images", ylabel="reward", title=f"{role}, {len(r['values'])} latents")
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
        axis.axvspan(r["spread_lo"], r["spread_hi"], color=style.colour(role), alpha=0.12, label="middle 95 % of latents")
        axis.axvspan(r["mean_lo"], r["mean_hi"], color=style.colour(role), alpha=0.8, label="mean, 95 % interval")
        axis.axvline(0, color=style.colour("noise"), linewidth=1.2)
        axis.set(xlabel="slope, reward per kimg", ylabel="latents", title=role)
        axis.legend(fontsize=7)
    return drawn
