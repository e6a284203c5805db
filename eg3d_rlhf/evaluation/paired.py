"""Several measures of the same latents in each network: their means, paired changes, sentences and figures; and wording that parts share.

Letters: N latents.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from eg3d_rlhf.core.statistics import bootstrap_mean_interval, paired_summary
from eg3d_rlhf.evaluation.comparison import Comparison
from eg3d_rlhf.experiments import style
from eg3d_rlhf.experiments.pages import Finding

BOOTSTRAP = "95 % percentile bootstrap over latents, 10,000 resamples"
NO_CONTROL = (
    "No control is shown: no run was named with --control, and none was found that differs from the tuned run in lambda_r = 0 alone. Run "
    "train.py with the same flags, --seed among them, and --lambda-r=0."
)
ROLES = ("before", "after", "control")
Values = Mapping[str, Mapping[str, np.ndarray]]  # role -> measure -> [N]; NaN where a latent has no such measure


def span(value: float, lo: float, hi: float, form: str = "+.3f") -> str:
    """'+1.234 [1.100, 1.301]'."""
    return f"{value:{form}} [{lo:{form}}, {hi:{form}}]"


def contains_zero(lo: float, hi: float) -> bool:
    """Whether an interval leaves the sign open."""
    return lo <= 0 <= hi


def compare(
    c: Comparison, seeds: Sequence[int], values: Values, units: Mapping[str, str], lower_is_better: bool = False,
    notes: Sequence[str] = (), **more,
) -> Finding:
    """Means and paired changes of every measure, over the latents that have it in all networks.

    Args: units: of the measures, in order; lower_is_better: for measures of faults; notes: sentences after those of the measures; more:
        further entries of the finding's data.
    """
    measures = {}
    for name, unit in units.items():
        known = np.all([np.isfinite(v[name]) for v in values.values()], axis=0)
        found = {role: np.asarray(v[name])[known] for role, v in values.items()}
        later = {role: v for role, v in found.items() if role != "before"}
        enough = known.sum() >= 2
        measures[name] = {
            "unit": unit, "n": int(known.sum()), "values": {role: v.tolist() for role, v in found.items()},
            "means": {role: bootstrap_mean_interval(v)._asdict() for role, v in found.items()} if enough else {},
            "paired": {role: paired_summary(found["before"], v)._asdict() for role, v in later.items()} if enough else {},
        }
    columns = {f"{name} {role}": v[name] for name in units for role, v in values.items()}
    rows = [
        {"seed": seed, **{name: float(column[i]) if np.isfinite(column[i]) else None for name, column in columns.items()}}
        for i, seed in enumerate(seeds)
    ]
    return Finding(
        facts=c.facts(seeds, ROLES, f"paired changes; {BOOTSTRAP}"), data={"measures": measures, "seeds": list(seeds), **more}, rows=rows,
        says=[*(_sentence(name, entry, lower_is_better) for name, entry in measures.items()), *notes],
    )


def _sentence(name: str, entry: Mapping, lower_is_better: bool) -> str:
    """Before, after, the paired change, and the control's."""
    if not entry["paired"]:
        return f"{name}: not measured, since fewer than two latents have it in every network."
    means, change = entry["means"], entry["paired"]["after"]
    shown = {role: span(p["mean"], p["mean_lo"], p["mean_hi"], "+.3g") for role, p in entry["paired"].items()}
    if contains_zero(change["mean_lo"], change["mean_hi"]):
        meaning = ": no change" if change["mean_lo"] == change["mean_hi"] == 0 else ": no change is shown"
    else:
        moved, judged = ("lower", "better") if change["mean_hi"] < 0 else ("higher", "worse")
        meaning = f": {moved}, which is {judged}" if lower_is_better else ""
    ends = f"{means['before']['mean']:.4g} before, {means['after']['mean']:.4g} after"
    control = f"; control {shown['control']}" if "control" in shown else ""
    return f"{name} ({entry['unit']}): {ends}, paired {shown['after']}{meaning}{control}."


def plot_values(data: dict):
    """Every latent's value of each measure per network, joined by lines, and the means with their intervals."""
    count = len(data["measures"])
    columns, rows = min(3, count), -(-count // 3)
    drawn, axes = style.figure(columns=columns, rows=rows, size=(9.4, 2.9 * rows))
    flat = list(np.atleast_1d(axes).ravel())
    for axis in flat[count:]:
        axis.set_axis_off()
    for axis, (name, measure) in zip(flat, data["measures"].items(), strict=False):
        roles = list(measure["values"])
        for one in zip(*measure["values"].values(), strict=True):
            axis.plot(range(len(roles)), one, ".-", color=style.colour("noise"), linewidth=0.4, markersize=2.5, alpha=0.5)
        for i, (role, mean) in enumerate(measure["means"].items()):
            style.interval(axis, i, mean, role, fmt="D", markersize=5, capsize=5)
        axis.set_xticks(range(len(roles)), roles)
        if not any(map(any, measure["values"].values())):
            axis.set_ylim(-0.05, 1)  # all zero: without this the axis shows rounding
        axis.set(ylabel=measure["unit"], title=name, xlim=(-0.5, len(roles) - 0.5))
    return drawn


def plot_changes(data: dict):
    """Paired changes with intervals, in deviations of the values before: left of zero is lower."""
    names = list(data["measures"])
    drawn, axes = style.figure(size=(9.4, 0.45 * len(names) + 1.2))
    roles = list(data["measures"][names[0]]["paired"])
    for j, role in enumerate(roles):
        for i, name in enumerate(names):
            measure = data["measures"][name]
            p, scale = measure["paired"][role], float(np.std(measure["values"]["before"]))
            scale = scale or float(np.std(measure["values"][role])) or 1.0
            axes.errorbar([p["mean"] / scale], [i + 0.18 * (j - (len(roles) - 1) / 2)],
                          xerr=np.divide(style.errors(p, lo="mean_lo", hi="mean_hi"), scale), fmt="o", capsize=3, markersize=4,
                          color=style.colour(role), label=role if i == 0 else None)
    axes.axvline(0, color=style.colour("noise"), linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlabel="paired change, in deviations between latents before", title="Change of the same latents (left is lower)")
    axes.legend()
    return drawn
