"""Compare measures of the same latents between networks: means, paired changes, sentences and plots.

A role is the part that a network plays in a report: "before" tuning, "after" tuning, or "control", which was
trained in the same way without the reward. The module also holds texts that several pages share.
Shapes: N latents, T networks.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eg3d_rlhf.core.statistics import bootstrap_mean_interval, decimals_apart, paired_summary
from eg3d_rlhf.evaluation.comparison import Comparison
from eg3d_rlhf.experiments import style
from eg3d_rlhf.experiments.pages import Finding
from eg3d_rlhf.measures.measure import Measure

BOOTSTRAP = "95 % percentile bootstrap over latents, 10,000 resamples"
NO_CONTROL = (
    "No control is shown: --control was not given, and no run was found that differs from the tuned run only"
    " in lambda_r = 0. To make a control, run train.py with the flags and the --seed of the tuned run, and"
    " with --lambda-r=0."
)
ROLES = ("before", "after", "control")  # networks whose hashes a finding's facts list


def span(estimate: float, lo: float, hi: float, number_format: str = "+.3f") -> str:
    """Format an estimate with its interval, for example '+1.234 [+1.100, +1.301]'."""
    return f"{estimate:{number_format}} [{lo:{number_format}}, {hi:{number_format}}]"


def span_apart(
    estimate: float, lo: float, hi: float, reference: float, decimals: int = 2, sign: str = ""
) -> str:
    """Format an estimate with its interval, so that no number is rounded to the reference.

    Sentences such as "more diverse" use it: an interval from 1.001 to 1.007 excludes 1, and two decimals
    would hide that.

    Args:
        reference: number that decides about the sentence, 1 for ratios and 0 for differences.
        decimals: smallest number of decimals.
        sign: "+" to print the sign of positive numbers.
    """
    digits = decimals_apart((estimate, lo, hi), reference, decimals)
    return span(estimate, lo, hi, f"{sign}.{digits}f")


def contains_zero(lo: float, hi: float) -> bool:
    """Return True if the interval [lo, hi] includes 0, so that the sign of the value is undecided."""
    return lo <= 0 <= hi


def compute_means(values_by_role: Mapping[str, np.ndarray]) -> dict[str, dict]:
    """Compute the mean of each role's values [N] with its bootstrap interval, under the keys mean, lo and hi.

    A role is a key of `values_by_role`: the name of a network, an arm or a region.
    """
    return {
        role: bootstrap_mean_interval(role_values)._asdict() for role, role_values in values_by_role.items()
    }


def compute_column_means(value_matrix: np.ndarray) -> list[dict]:
    """Compute the mean of every column of values [N, T] with its bootstrap interval.

    Returns: T dicts with the keys mean, lo and hi.
    """
    return [bootstrap_mean_interval(column_values)._asdict() for column_values in value_matrix.T]


def compute_paired_changes(
    values_by_role: Mapping[str, np.ndarray], base_role: str = "before", roles: Sequence[str] | None = None
) -> dict[str, dict]:
    """Summarise the paired changes of the same items from the base role to other roles.

    Args:
        values_by_role: values [N] of each role.
        base_role: role from which the changes are measured.
        roles: roles to which the changes are measured; None selects all roles except `base_role`.
    Returns: for each role a dict of the fields of `PairedSummary`.
    """
    return {
        role: paired_summary(values_by_role[base_role], role_values)._asdict()
        for role, role_values in values_by_role.items()
        if role != base_role and role in (roles or values_by_role)
    }


def make_seed_rows(seeds: Sequence[int], values_by_column: Mapping[str, np.ndarray]) -> list[dict]:
    """Return a table with one row for each seed.

    Args: values_by_column: values [N] by the name of the column. Values that are not finite become None.
    """
    return [
        {
            "seed": seed,
            # JSON has no NaN, so a value that could not be measured becomes null
            **{
                column_name: float(column_values[latent_index])
                if np.isfinite(column_values[latent_index])
                else None
                for column_name, column_values in values_by_column.items()
            },
        }
        for latent_index, seed in enumerate(seeds)
    ]


def compare(
    comparison: Comparison,
    seeds: Sequence[int],
    measurements_by_role: Mapping[str, Any],
    measures: Sequence[Measure],
    notes: Sequence[str] = (),
    **more_data,
) -> Finding:
    """Compute the means and the paired changes of every measure of a table.

    The statistics of a measure use the latents for which the measure is finite in all networks.

    Args:
        seeds: seeds of the N latents.
        measurements_by_role: role -> the object from which the measures read their values [N].
        measures: measures to compare.
        notes: sentences that follow the sentences about the measures.
        more_data: further entries of the finding's data.
    """
    values_by_measure = {
        measure: {
            role: measure.values(role_measurements)
            for role, role_measurements in measurements_by_role.items()
        }
        for measure in measures
    }
    statistics_by_measure = {}  # statistics by measure
    for measure, values_by_role in values_by_measure.items():
        # [roles, N] -> [N]: a paired change needs a latent that has the measure in every role
        is_finite = np.isfinite(list(values_by_role.values())).all(axis=0)
        finite_values = {role: role_values[is_finite] for role, role_values in values_by_role.items()}
        has_interval = is_finite.sum() >= 2  # an interval over latents needs two
        statistics_by_measure[measure.name] = {
            "unit": measure.unit,
            "n": int(is_finite.sum()),
            "values": {role: role_values.tolist() for role, role_values in finite_values.items()},
            "means": compute_means(finite_values) if has_interval else {},
            "paired": compute_paired_changes(finite_values) if has_interval else {},
        }
    # the rows keep every latent, also those that a measure leaves out
    values_by_column = {
        f"{measure.name} {role}": role_values
        for measure, values_by_role in values_by_measure.items()
        for role, role_values in values_by_role.items()
    }
    return Finding(
        facts=comparison.facts(seeds, ROLES, f"paired changes; {BOOTSTRAP}"),
        data={"measures": statistics_by_measure, "seeds": list(seeds), **more_data},
        rows=make_seed_rows(seeds, values_by_column),
        says=[*(_sentence(measure, statistics_by_measure[measure.name]) for measure in measures), *notes],
    )


def _sentence(measure: Measure, measure_data: Mapping) -> str:
    """Describe a measure in one sentence: means before and after, paired change, and the control's change.

    Args: measure_data: entry of the measure in the data that `compare` returns.
    """
    measure_name = measure.name
    if not measure_data["paired"]:
        return f"{measure_name}: not measured, since fewer than two latents have it in every network."
    mean_by_role = measure_data["means"]
    # The change of the tuned network decides the outcome; the control's change is only stated.
    tuned_change = measure_data["paired"]["after"]
    change_text_by_role = {
        role: span(role_change["mean"], role_change["mean_lo"], role_change["mean_hi"], "+.3g")
        for role, role_change in measure_data["paired"].items()
    }
    if contains_zero(tuned_change["mean_lo"], tuned_change["mean_hi"]):
        # An interval from 0 to 0 means that no latent has changed at all.
        outcome_text = (
            ": no change"
            if tuned_change["mean_lo"] == tuned_change["mean_hi"] == 0
            else ": no change is shown"
        )
    else:
        direction_word = "lower" if tuned_change["mean_hi"] < 0 else "higher"
        # A measure that has no better direction gets no outcome.
        outcome_text = (
            f": {direction_word}, which is"
            f" {measure.outcome(tuned_change['mean_lo'], tuned_change['mean_hi'])}"
            if measure.better
            else ""
        )
    means_text = f"{mean_by_role['before']['mean']:.4g} before, {mean_by_role['after']['mean']:.4g} after"
    control_text = f"; control {change_text_by_role['control']}" if "control" in change_text_by_role else ""
    return (
        f"{measure_name} ({measure_data['unit']}): {means_text}, paired"
        f" {change_text_by_role['after']}{outcome_text}"
        f"{control_text}."
    )


def plot_values(finding_data: dict):
    """Plot each measure of every latent, and its means with their intervals, over the networks.

    A grey line joins the values of one latent.

    Args: finding_data: data of the finding of `compare`.
    """
    measure_count = len(finding_data["measures"])
    figure, axes = style.grid(measure_count, 2.9)  # one panel for each measure
    for axis, (measure_name, measure_data) in zip(axes, finding_data["measures"].items(), strict=True):
        roles = list(measure_data["values"])
        for latent_values in zip(*measure_data["values"].values(), strict=True):
            axis.plot(
                range(len(roles)),
                latent_values,
                ".-",
                color=style.colour("noise"),
                linewidth=0.4,
                markersize=2.5,
                alpha=0.5,
            )
        for role_index, (role, mean_interval) in enumerate(measure_data["means"].items()):
            style.interval(axis, role_index, mean_interval, role, fmt="D", markersize=5, capsize=5)
        axis.set_xticks(range(len(roles)), roles)
        if not any(map(any, measure_data["values"].values())):
            # Every value is zero, around which matplotlib's automatic limits would be tiny.
            axis.set_ylim(-0.05, 1)
        axis.set(ylabel=measure_data["unit"], title=measure_name, xlim=(-0.5, len(roles) - 0.5))
    return figure


def plot_changes(finding_data: dict):
    """Plot the paired changes with their intervals, in standard deviations of the values before tuning.

    Args: finding_data: data of the finding of `compare`.
    """
    measure_names = list(finding_data["measures"])
    figure, axes = style.figure(size=(9.4, 0.45 * len(measure_names) + 1.2))  # inches
    # All measures have the same roles.
    roles = list(finding_data["measures"][measure_names[0]]["paired"])
    for role_index, role in enumerate(roles):
        for measure_index, measure_name in enumerate(measure_names):
            measure_data = finding_data["measures"][measure_name]
            paired_change = measure_data["paired"][role]
            scale_before = float(np.std(measure_data["values"]["before"]))
            # If the measure is constant before, its scale is taken from this role; if it is constant there as
            # well, the change is plotted in the measure's own unit.
            scale_before = scale_before or float(np.std(measure_data["values"][role])) or 1.0
            axes.errorbar(
                [paired_change["mean"] / scale_before],
                [
                    measure_index + 0.18 * (role_index - (len(roles) - 1) / 2)
                ],  # roles side by side, centred on the measure's row
                xerr=np.divide(style.errors(paired_change, lo_key="mean_lo", hi_key="mean_hi"), scale_before),
                fmt="o",
                capsize=3,
                markersize=4,
                color=style.colour(role),
                label=role if measure_index == 0 else None,
            )
    axes.axvline(0, color=style.colour("noise"), linewidth=1)
    axes.set_yticks(range(len(measure_names)), measure_names)
    axes.invert_yaxis()
    axes.set(
        xlabel="paired change, in standard deviations between latents before",
        title="Change of the same latents (left is lower)",
    )
    axes.legend()
    return figure
