"""Rewards of the same latents before and after: shift, final against initial, over truncation, and whether truncation keeps the ranks."""

from functools import partial
from pathlib import Path

import numpy as np

from eg3d_rlhf.evaluation.comparison import Comparison
from eg3d_rlhf.evaluation.texts import BOOTSTRAP, NO_CONTROL, contains_zero, span
from eg3d_rlhf.metrics.statistics import LINE_INTERVAL, RANK_INTERVAL, bootstrap_mean_interval, fit_line, paired_summary, spearman
from eg3d_rlhf.reports import style
from eg3d_rlhf.reports.jobs import Finding, Job

PSIS = (0.25, 0.5, 0.7, 1.0)
ROLES = ("before", "after", "reward")
RANK_PSIS = (0.7, 0.25)


def jobs(c: Comparison) -> list[Job]:
    """Reward shift, reward over psi, rank consistency."""
    many = {"n": c.n}
    return [
        Job(
            key="reward-shift", title="Reward of the same latents before and after", compute=partial(shift, c), inputs=c.inputs(**many),
            plots={"histograms": plot_histograms, "deltas": plot_deltas, "final-against-initial": plot_lines},
        ),
        Job(
            key="reward-psi", title="Reward over truncation", compute=partial(over_psi, c), plots={"means": plot_psi},
            inputs=c.inputs(*ROLES, psis=PSIS, **many),
        ),
        Job(
            key="rank-consistency", title="Do latents keep their rank under truncation?", compute=partial(ranks, c),
            plots={"scatter": plot_ranks}, inputs=c.inputs(*ROLES, psis=RANK_PSIS, **many),
        ),
    ]


def shift(c: Comparison, folder: Path) -> Finding:
    """Paired deltas with their mean and share positive; line of final against initial reward."""
    del folder
    seeds = c.seeds()
    scores = {role: c.scores(generator, seeds).double().numpy() for role, generator in c.generators().items()}
    later = [role for role in scores if role != "before"]
    paired = {role: paired_summary(scores["before"], scores[role]).to_dict() for role in later}
    lines = {role: fit_line(scores["before"], scores[role]).to_dict() for role in later}
    rows = [
        {"seed": seed, **{role: float(values[i]) for role, values in scores.items()},
         **{f"delta_{role}": float(scores[role][i] - scores["before"][i]) for role in later}}
        for i, seed in enumerate(seeds)
    ]
    data = {"scores": {role: values.tolist() for role, values in scores.items()}, "paired": paired, "lines": lines}
    method = f"mean: {BOOTSTRAP}; share: Wilson; {LINE_INTERVAL}"
    return Finding(facts=c.facts(seeds, ("before", "after", "control", "reward"), method), data=data, rows=rows,
                   says=_shift_says(c, paired, lines))


def _shift_says(c: Comparison, paired: dict, lines: dict) -> list[str]:
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
    control = span(q["mean"], q["mean_lo"], q["mean_hi"])
    return [*says, f"In the control the mean change is {control}, {share:.1%} of the tuned one: "
            f"{moved if share < 0.1 else 'training alone moves this reward much, and the shift is not the reward phase alone'}."]


def over_psi(c: Comparison, folder: Path) -> Finding:
    """Mean reward at several truncations."""
    del folder
    seeds, rows = c.seeds(), []
    for role in ("before", "after"):
        for psi in PSIS:
            values = c.scores(c.generators()[role], seeds, psi).double().numpy()
            mean, lo, hi = bootstrap_mean_interval(values)
            rows.append({"role": role, "psi": psi, "mean": mean, "lo": lo, "hi": hi, "std": float(values.std(ddof=1))})
    best = {role: max((r for r in rows if r["role"] == role), key=lambda r: r["mean"]) for role in ("before", "after")}
    says = [
        f"Highest mean reward: before at ψ = {best['before']['psi']:g} ({best['before']['mean']:.2f}), after at ψ = "
        f"{best['after']['psi']:g} ({best['after']['mean']:.2f}), of the truncations tried.",
        "Truncation pulls shapes towards the mean shape, so a reward that rises as ψ falls prefers typical shapes.",
    ]
    facts = c.facts(seeds, ROLES, BOOTSTRAP, psi=None)
    return Finding(facts=facts, data={"rows": rows}, rows=rows, says=says)


def ranks(c: Comparison, folder: Path) -> Finding:
    """Spearman's rho of the rewards at two truncations of the same latents."""
    del folder
    seeds, found, scores = c.seeds(), {}, {}
    for role in ("before", "after"):
        pair = [c.scores(c.generators()[role], seeds, psi).double().numpy() for psi in RANK_PSIS]
        scores[role] = [values.tolist() for values in pair]
        found[role] = spearman(*pair)._asdict()
    high, low = RANK_PSIS
    rows = [{"role": role, "spearman": r["mean"], "lo": r["lo"], "hi": r["hi"]} for role, r in found.items()]
    before, after = (found[role] for role in ("before", "after"))
    says = [
        f"Spearman's rho between the rewards at ψ = {high:g} and {low:g}: before {span(*before.values(), '.3f')}, after "
        f"{span(*after.values(), '.3f')}.",
        "Both share the latent, so agreement is expected; what is missing to 1 is order that truncation changes.",
    ]
    facts = c.facts(seeds, ROLES, RANK_INTERVAL, psi=None)
    return Finding(facts=facts, data={"scores": scores, "rho": found, "psis": RANK_PSIS}, rows=rows, says=says)


def plot_histograms(data: dict):
    """Distribution of the reward per network."""
    drawn, axes = style.figure()
    edges = np.histogram_bin_edges(np.concatenate([np.asarray(v) for v in data["scores"].values()]), bins=30)
    for role, values in data["scores"].items():
        axes.hist(values, bins=edges, histtype="step" if role == "control" else "stepfilled", alpha=1 if role == "control" else 0.6,
                  color=style.colour(role), label=role, linewidth=1.4)
    axes.set(xlabel="reward", ylabel="latents", title="Reward of held-out latents")
    axes.legend()
    return drawn


def plot_deltas(data: dict):
    """Every latent's change, in order."""
    drawn, axes = style.figure()
    before = np.asarray(data["scores"]["before"])
    for role, p in data["paired"].items():
        delta = np.sort(np.asarray(data["scores"][role]) - before)
        axes.plot(np.arange(1, len(delta) + 1), delta, ".", markersize=3, color=style.colour(role),
                  label=f"{role}: {p['positive']}/{p['n']} rise")
    axes.axhline(0, color=style.colour("noise"), linewidth=1)
    axes.set(xlabel="latents, in order of the change", ylabel="change of the reward", title="Change per latent")
    axes.legend()
    return drawn


def plot_lines(data: dict):
    """Final against initial reward with the fitted lines."""
    drawn, axes = style.figure()
    before = np.asarray(data["scores"]["before"])
    ends = np.array([before.min(), before.max()])
    for role, line in data["lines"].items():
        axes.plot(before, data["scores"][role], ".", markersize=4, alpha=0.6, color=style.colour(role))
        axes.plot(ends, line["intercept"] + line["slope"] * ends, color=style.colour(role),
                  label=f"{role}: slope {line['slope']:.2f} [{line['lo']:.2f}, {line['hi']:.2f}]")
    axes.plot(ends, ends, "--", color=style.colour("noise"), linewidth=1, label="no change")
    axes.set(xlabel="reward before", ylabel="reward after", title="Final against initial reward")
    axes.legend(fontsize=7)
    return drawn


def plot_psi(data: dict):
    """Mean reward with interval over truncation."""
    drawn, axes = style.figure()
    for role in dict.fromkeys(row["role"] for row in data["rows"]):
        rows = [row for row in data["rows"] if row["role"] == role]
        x = [row["psi"] for row in rows]
        axes.plot(x, [row["mean"] for row in rows], "o-", markersize=3, color=style.colour(role), label=role)
        axes.fill_between(x, [row["lo"] for row in rows], [row["hi"] for row in rows], alpha=0.2, color=style.colour(role), linewidth=0)
    axes.set(xlabel="truncation ψ", ylabel="mean reward", title="Reward over truncation")
    axes.legend()
    return drawn


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
