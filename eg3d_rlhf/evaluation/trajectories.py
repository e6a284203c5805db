"""Rewards of fixed latents over the snapshots of a run, with the lambda_r = 0 control beside them.

Two intervals of the slope stand side by side, since they answer different questions. The *spread* is the range in which the middle 95 %
of the latents' own least-squares slopes lie: it contains zero unless nearly all latents move the same way. The interval of the *mean*
slope is a bootstrap over latents: with many latents it finds a drift that is far too small to see on any one of them, and it says
nothing of other training runs, whose number here is one each.
Letters: N latents, T snapshots.
"""

from functools import partial
from pathlib import Path

import numpy as np

from eg3d_rlhf.cli import file_hash
from eg3d_rlhf.evaluation.comparison import Comparison
from eg3d_rlhf.evaluation.texts import BOOTSTRAP, NO_CONTROL, absent_job, contains_zero, span
from eg3d_rlhf.metrics.statistics import bootstrap_mean_interval, slopes
from eg3d_rlhf.reports import style
from eg3d_rlhf.reports.jobs import Finding, Job

KEY, TITLE = "trajectories", "Reward of fixed latents over training"
FEWEST = 3  # networks, the one before tuning among them, under a slope
SPREAD = "range of the middle 95 % of latents' least-squares slopes"


def jobs(c: Comparison) -> list[Job]:
    """One job; where the run kept too few snapshots, one that says so."""
    kept = {role: c.snapshots(role) for role in ("after", "control")}
    if len(kept["after"]) + 1 < FEWEST:
        why = (
            f"A trajectory needs {FEWEST - 1} snapshots of the tuned run; {len(kept['after'])} found"
            + (f" in {c.run.name}. " if c.run is not None else " (no run folder was named). ")
            + "Train with --snap=1, which keeps a snapshot per tick, and name the run with --run."
        )
        return [absent_job(c, KEY, TITLE, why)]
    files = {role: {f"{kimg:g}": file_hash(path) for kimg, path in found} for role, found in kept.items()}
    return [Job(
        key=KEY, title=TITLE, compute=partial(trajectories, c), plots={"trajectories": plot_trajectories, "slopes": plot_slopes},
        inputs=c.inputs("before", "reward", n=c.n, files=files),
    )]


def slope_summary(times: np.ndarray, values: np.ndarray) -> dict:
    """Slopes per kimg of values [N, T]: their mean with bootstrap interval, and the range of the middle 95 %."""
    found = slopes(times, values)
    mean, lo, hi = bootstrap_mean_interval(found)
    low, high = np.quantile(found, [0.025, 0.975])
    return {"slopes": found.tolist(), "mean": mean, "mean_lo": lo, "mean_hi": hi, "spread_lo": float(low), "spread_hi": float(high)}


def trajectories(c: Comparison, folder: Path) -> Finding:
    """Rewards over snapshots and per-latent slopes."""
    del folder
    seeds, data, rows = c.seeds(), {"roles": {}}, []
    start = c.scores(c.before, seeds).double().numpy()
    for role in ("after", "control"):
        kept = [(kimg, path) for kimg, path in c.snapshots(role) if kimg > 0]
        if len(kept) + 1 < FEWEST:
            continue
        times = np.array([0.0, *(kimg for kimg, _ in kept)])
        values = np.stack([start, *(c.scores(c.load(path), seeds).double().numpy() for _, path in kept)], axis=1)  # [N, T]
        steps = [bootstrap_mean_interval(column)._asdict() for column in values.T]
        data["roles"][role] = {"kimg": times.tolist(), "values": values.tolist(), "means": steps, **slope_summary(times, values)}
        rows += [{"role": role, "kimg": float(t), **step} for t, step in zip(times, steps, strict=True)]
    says = _says(data["roles"])
    facts = c.facts(seeds, ("before", "after", "control", "reward"), f"{SPREAD}; mean slope: {BOOTSTRAP}")
    return Finding(facts=facts, data=data, rows=rows, says=says)


def _says(roles: dict) -> list[str]:
    says = []
    for role, name in (("after", "tuned run"), ("control", "control")):
        if role not in roles:
            continue
        r = roles[role]
        verdict = "contains" if contains_zero(r["spread_lo"], r["spread_hi"]) else "does not contain"
        says.append(
            f"Slope of the {name}, reward per kimg: the middle 95 % of latents lie in [{r['spread_lo']:+.2f}, {r['spread_hi']:+.2f}], "
            f"which {verdict} zero; mean "
            f"{span(r['mean'], r['mean_lo'], r['mean_hi'], '+.2f')}."
        )
    if "control" not in roles:
        return [*says, NO_CONTROL + " It needs snapshots, too: --snap=1."]
    tuned, control = roles["after"], roles["control"]
    if contains_zero(control["mean_lo"], control["mean_hi"]):
        says.append("No drift of the control is shown, neither for single latents nor on average.")
    else:
        says.append(
            f"On average the control does drift: its mean slope differs from zero, at {abs(control['mean'] / tuned['mean']):.1%} of the "
            "tuned run's. Going on with GAN training moves more latents one way than the other, and a mean over many latents resolves "
            "that. One run cannot show whether other training seeds drift the same way."
        )
    return says


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
