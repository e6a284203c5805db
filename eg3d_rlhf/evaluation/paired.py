"""Compare several measures of the same latents between networks: means, paired changes, sentences, figures.

It also holds wording that several parts of a report share. Letters: N latents.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eg3d_rlhf.core.statistics import bootstrap_mean_interval, paired_summary
from eg3d_rlhf.evaluation.comparison import Comparison
from eg3d_rlhf.experiments import style
from eg3d_rlhf.experiments.pages import Finding
from eg3d_rlhf.measures.measure import Measure

BOOTSTRAP = "95 % percentile bootstrap over latents, 10,000 resamples"
NO_CONTROL = (
    "No control is shown: --control was not given, and no run was found that differs from the tuned run only"
    " in lambda_r = 0. Run train.py with the same flags and the same --seed, and with --lambda-r=0."
)
ROLES = ("before", "after", "control")  # networks whose hashes the facts of a part list


def span(value: float, lo: float, hi: float, form: str = "+.3f") -> str:
    """Format a value with its interval, for example '+1.234 [+1.100, +1.301]'."""
    return f"{value:{form}} [{lo:{form}}, {hi:{form}}]"


def contains_zero(lo: float, hi: float) -> bool:
    """Return True if the interval includes 0, so that the sign is undecided."""
    return lo <= 0 <= hi


def means_of(values: Mapping[str, np.ndarray]) -> dict[str, dict]:
    """Return mean and bootstrap interval of values [N], by role (network, arm or region)."""
    return {role: bootstrap_mean_interval(v)._asdict() for role, v in values.items()}


def means_of_columns(values: np.ndarray) -> list[dict]:
    """Return mean and bootstrap interval of every column of values [N, T]."""
    return [bootstrap_mean_interval(column)._asdict() for column in values.T]


def paired_of(
    values: Mapping[str, np.ndarray], base: str = "before", roles: Sequence[str] | None = None
) -> dict[str, dict]:
    """Summarise the paired changes of the same items from the base to every other role, or to `roles`."""
    return {
        role: paired_summary(values[base], v)._asdict()
        for role, v in values.items()
        if role != base and role in (roles or values)
    }


def seed_rows(seeds: Sequence[int], columns: Mapping[str, np.ndarray]) -> list[dict]:
    """Return a table with one row for each seed; None stands for values that are not finite."""
    return [
        {
            "seed": seed,
            # JSON has no NaN, so a value that could not be measured becomes null
            **{
                name: float(column[i]) if np.isfinite(column[i]) else None for name, column in columns.items()
            },
        }
        for i, seed in enumerate(seeds)
    ]


def compare(
    c: Comparison,
    seeds: Sequence[int],
    seen: Mapping[str, Any],
    table: Sequence[Measure],
    notes: Sequence[str] = (),
    **more,
) -> Finding:
    """Compute means and paired changes of every measure of a table.

    A measure's figures use the latents for which it is finite in all networks.
    Args: seen: by role, the object from which the measures read their values; notes: sentences that follow
        those of the measures; more: further entries of the data.
    """
    values = {measure: {role: measure.values(what) for role, what in seen.items()} for measure in table}
    measures = {}
    for measure, by_role in values.items():
        # pairs need the same latents in every role  # [roles, N] -> [N]
        known = np.isfinite(list(by_role.values())).all(axis=0)
        kept = {role: v[known] for role, v in by_role.items()}
        enough = known.sum() >= 2  # an interval over latents needs two
        measures[measure.name] = {
            "unit": measure.unit,
            "n": int(known.sum()),
            "values": {role: v.tolist() for role, v in kept.items()},
            "means": means_of(kept) if enough else {},
            "paired": paired_of(kept) if enough else {},
        }
    # the rows keep every latent, also those that a measure leaves out
    columns = {
        f"{measure.name} {role}": v for measure, by_role in values.items() for role, v in by_role.items()
    }
    return Finding(
        facts=c.facts(seeds, ROLES, f"paired changes; {BOOTSTRAP}"),
        data={"measures": measures, "seeds": list(seeds), **more},
        rows=seed_rows(seeds, columns),
        says=[*(_sentence(measure, measures[measure.name]) for measure in table), *notes],
    )


def _sentence(measure: Measure, entry: Mapping) -> str:
    """Describe a measure in one sentence: before, after, paired change, and the control's change."""
    name = measure.name
    if not entry["paired"]:
        return f"{name}: not measured, since fewer than two latents have it in every network."
    means = entry["means"]
    change = entry["paired"]["after"]  # the control is described, but decides nothing
    shown = {role: span(p["mean"], p["mean_lo"], p["mean_hi"], "+.3g") for role, p in entry["paired"].items()}
    if contains_zero(change["mean_lo"], change["mean_hi"]):
        # an interval of width zero at zero: every latent has exactly the same value
        meaning = ": no change" if change["mean_lo"] == change["mean_hi"] == 0 else ": no change is shown"
    else:
        moved = "lower" if change["mean_hi"] < 0 else "higher"
        # a measure without a better direction gets no outcome
        meaning = (
            f": {moved}, which is {measure.outcome(change['mean_lo'], change['mean_hi'])}"
            if measure.better
            else ""
        )
    ends = f"{means['before']['mean']:.4g} before, {means['after']['mean']:.4g} after"
    control = f"; control {shown['control']}" if "control" in shown else ""
    return f"{name} ({entry['unit']}): {ends}, paired {shown['after']}{meaning}{control}."


def plot_values(data: dict):
    """Plot each measure of every latent per network, joined by lines, and the means with their intervals."""
    count = len(data["measures"])
    drawn, axes = style.grid(count, 2.9)  # one panel for each measure
    for axis, (name, measure) in zip(axes, data["measures"].items(), strict=True):
        roles = list(measure["values"])
        for latent in zip(*measure["values"].values(), strict=True):
            axis.plot(
                range(len(roles)),
                latent,
                ".-",
                color=style.colour("noise"),
                linewidth=0.4,
                markersize=2.5,
                alpha=0.5,
            )
        for i, (role, mean) in enumerate(measure["means"].items()):
            style.interval(axis, i, mean, role, fmt="D", markersize=5, capsize=5)
        axis.set_xticks(range(len(roles)), roles)
        if not any(map(any, measure["values"].values())):
            # every value is zero: the automatic limits would magnify rounding errors
            axis.set_ylim(-0.05, 1)
        axis.set(ylabel=measure["unit"], title=name, xlim=(-0.5, len(roles) - 0.5))
    return drawn


def plot_changes(data: dict):
    """Plot paired changes with intervals, in standard deviations of the values before tuning."""
    names = list(data["measures"])
    drawn, axes = style.figure(size=(9.4, 0.45 * len(names) + 1.2))
    roles = list(data["measures"][names[0]]["paired"])
    for j, role in enumerate(roles):
        for i, name in enumerate(names):
            measure = data["measures"][name]
            p = measure["paired"][role]
            scale = float(np.std(measure["values"]["before"]))
            # constant before: use the values of this role; constant there too: leave the unit as it is
            scale = scale or float(np.std(measure["values"][role])) or 1.0
            axes.errorbar(
                [p["mean"] / scale],
                [i + 0.18 * (j - (len(roles) - 1) / 2)],  # roles side by side, centred on the measure's row
                xerr=np.divide(style.errors(p, lo="mean_lo", hi="mean_hi"), scale),
                fmt="o",
                capsize=3,
                markersize=4,
                color=style.colour(role),
                label=role if i == 0 else None,
            )
    axes.axvline(0, color=style.colour("noise"), linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(
        xlabel="paired change, in standard deviations between latents before",
        title="Change of the same latents (left is lower)",
    )
    axes.legend()
    return drawn
