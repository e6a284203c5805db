"""Tables of win rates of arms (compared training methods) with intervals, as JSON, Markdown and figures.

The scores that an evaluator gives to an arm have the shape [K, C, S]: K training seeds, C prompts, S noises
per prompt. Prompts and noises are the same for all arms, so that arms are compared asset by asset. Markdown
and figures are made from the JSON alone.

>>> # one training seed, two prompts, two noises
>>> tuned, base = [[[3.0, 1.0], [2.0, 2.0]]], [[[1.0, 1.0], [1.0, 1.0]]]
>>> table = Table(scores={"tuned": {"final": np.array(tuned)}}, base={"final": np.array(base)}, seeds=[0])
>>> table.against_base("tuned")["final"]["win_rate"]  # ties count half
0.875
>>> rows = [["tuned", with_interval(table.against_base("tuned")["final"])]]
>>> print("\\n".join(markdown_rows(["arm", "wins"], rows)))
| arm | wins |
| --- | --- |
| tuned | 0.875 [0.750, 1.000] |

A run then calls `write(data, folder, "grpo", markdown, plot)`, which writes grpo.json, and from it grpo.md
and grpo.png.
"""

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from eg3d_rlhf.core.statistics import bootstrap_mean_interval, t_mean_interval
from eg3d_rlhf.experiments import style
from training.storage import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INTERVAL = "95 % percentile bootstrap over prompts, each the mean over training seeds and noises"

# Numbers.


def rate(scores_a: np.ndarray, scores_b: np.ndarray, seeds: Sequence[int]) -> dict[str, Any]:
    """Compute the win rate of one arm against another: the share of its assets with the higher score.

    Assets of the same training seed, prompt and noise are compared. A tie counts half.

    Args:
        scores_a: scores of the first arm, [K, C, S].
        scores_b: scores of the second arm, [K, C, S].
        seeds: training seeds, [K].

    Returns:
        {"win_rate", "ci95": [low, high], "seeds": [{"seed", "win_rate", "ci95"}, ...]}: the win rate over all
        seeds with its interval over prompts, and the same for every training seed.
    """
    # [K, C, S]: 1 where a is higher, 0.5 at a tie, 0 where b is higher
    wins = (np.greater(scores_a, scores_b) + np.greater_equal(scores_a, scores_b).astype(float)) / 2
    # Noises and seeds of one prompt are not independent, so their mean [C] over each prompt is resampled.
    mean_rate, lo, hi = bootstrap_mean_interval(wins.mean(axis=(0, 2)))
    seed_intervals = [bootstrap_mean_interval(wins_of_seed.mean(axis=1)) for wins_of_seed in wins]
    seed_records = [
        {"seed": seed, "win_rate": seed_interval.mean, "ci95": [seed_interval.lo, seed_interval.hi]}
        for seed, seed_interval in zip(seeds, seed_intervals, strict=True)
    ]
    return {"win_rate": mean_rate, "ci95": [lo, hi], "seeds": seed_records}


def detectable(prompt_count: int, noise_count: int, seed_count: int) -> float:
    """Compute the smallest true win rate that a table detects with a power of 80 %.

    Detected means that the 95 % interval excludes one half. The formula is the one of the normal
    approximation of a binomial proportion, 1/2 + (1.96 + 0.84) / (2 sqrt(C S K)), for independent comparisons
    without ties. If win rates differ between prompts, a larger win rate is needed.

    Args:
        prompt_count: number of prompts, C.
        noise_count: number of noises per prompt, S.
        seed_count: number of training seeds, K.
    """
    # the quantiles of a two-sided 95 % interval (1.96) and of a power of 80 % (0.84)
    return 0.5 + (NormalDist().inv_cdf(0.975) + NormalDist().inv_cdf(0.8)) / (
        2 * math.sqrt(prompt_count * noise_count * seed_count)
    )


@dataclass(frozen=True, kw_only=True)
class Table:
    """Scores of arms, and of the base model that they are compared with. A control is an arm as well."""

    scores: Mapping[str, Mapping[str, np.ndarray]]  # by arm and evaluator, [K, C, S]
    base: Mapping[str, np.ndarray]  # by evaluator, [K, C, S], or [1, C, S] where it has no training seed
    seeds: Sequence[int]  # [K]

    def against_base(self, arm: str) -> dict[str, dict[str, Any]]:
        """Compute the win rate of an arm against the base model.

        Returns:
            Win rate with its intervals (see `rate`), by the name of the evaluator.
        """
        K = len(self.seeds)  # number of training seeds
        win_rates = {}
        for evaluator, arm_scores in self.scores[arm].items():
            base_scores = self.base[evaluator]
            # a base without training seeds is repeated: [1, C, S] -> [K, C, S]
            win_rates[evaluator] = rate(arm_scores, base_scores.repeat(K // len(base_scores), 0), self.seeds)
        return win_rates

    def pairwise(self, evaluator: str, arms: Iterable[str] | None = None) -> dict[str, dict[str, Any]]:
        """Compute the win rates of all pairs of arms.

        Args:
            evaluator: name of the evaluator whose scores are compared.
            arms: names of the arms; None: all arms.

        Returns:
            Win rate of arm x against arm y with its intervals (see `rate`), under the key "x_vs_y". Each pair
            occurs once, in the order of the arms.
        """
        arm_names = self.scores if arms is None else arms
        return {
            f"{first_arm}_vs_{second_arm}": rate(
                self.scores[first_arm][evaluator], self.scores[second_arm][evaluator], self.seeds
            )
            for first_arm, second_arm in combinations(arm_names, 2)
        }

    @property
    def sizes(self) -> dict[str, int]:
        """Return two sizes by their keys in the JSON file: the number of prompts, and of noises per prompt.

        The number of prompts still has the key that version 0.1 wrote, so that its files can be compared.
        """
        # all score arrays have the same number of prompts and noises: [K or 1, C, S]
        prompt_count, noise_count = next(iter(self.base.values())).shape[1:]
        return {"conditions": prompt_count, "noises": noise_count}


# Formatting for readers.


def with_interval(metric: Mapping[str, Any], form: str = ".3f", metric_key: str = "win_rate") -> str:
    """Format a value with its 95 % interval: "0.612 [0.580, 0.640]".

    Args:
        metric: mapping with the value and, under "ci95", its interval [low, high].
        form: format specification of the numbers, such as ".3f".
        metric_key: key of the value.
    """
    low, high = metric["ci95"]
    return f"{metric[metric_key]:{form}} [{low:{form}}, {high:{form}}]"


def cell(
    number_or_numbers: float | Sequence[float | None] | None, form: str, ci95: Sequence[float] | None = None
) -> str:
    """Format the cell of a table for one metric.

    Args:
        number_or_numbers: a number, a list of the numbers of several training seeds, or None. A number in the
            list may be None as well, and is then left out.
        form: format specification of the numbers, such as ".2f".
        ci95: interval (low, high), or None.

    Returns:
        "0.61 [0.58, 0.64]" for a number with its interval; "0.61 (0.58 to 0.64)" for several numbers, which
        is the mean, the smallest and the largest number; "" if there is no number.
    """
    numbers_or_none = number_or_numbers if isinstance(number_or_numbers, Sequence) else [number_or_numbers]
    numbers = [number for number in numbers_or_none if number is not None]
    if not numbers:
        return ""
    # compared as texts: a range that rounding hides is not shown
    smallest_text = f"{min(numbers):{form}}"
    largest_text = f"{max(numbers):{form}}"
    mean_text = f"{np.mean(numbers):{form}}" + (
        "" if smallest_text == largest_text else f" ({smallest_text} to {largest_text})"
    )
    return f"{mean_text} [{ci95[0]:{form}}, {ci95[1]:{form}}]" if ci95 else mean_text


def figure_table(
    arm_heading: str,
    arms: Mapping[str, Mapping[str, Any]],
    columns: Mapping[str, tuple[str, str]],
    intervals: Collection[str] = (),
) -> list[str]:
    """Format a Markdown table with a row for each arm and a column for each metric.

    Args:
        arm_heading: heading of the column that holds the names of the arms.
        arms: metrics of each arm, by the name of the arm and the key of the metric. A metric is a number, a
            list of numbers (one per training seed), or None.
        columns: (heading, format of the numbers) of each column, by the key of the metric.
        intervals: keys of the metrics that are shown with their interval, which an arm holds under
            <key>_ci95.

    Returns:
        Lines of the table.
    """
    table_rows = []
    for arm_name, metrics in arms.items():
        table_row = [arm_name]
        for metric_key, (_, number_format) in columns.items():
            ci95 = metrics.get(f"{metric_key}_ci95") if metric_key in intervals else None
            table_row.append(cell(metrics.get(metric_key), number_format, ci95))
        table_rows.append(table_row)
    return markdown_rows([arm_heading, *(heading for heading, _ in columns.values())], table_rows)


def summarise_over_seeds(value_by_seed: Mapping[str, float]) -> dict[str, Any]:
    """Summarise the values that a metric has for several training seeds.

    Args:
        value_by_seed: value of the metric, by training seed.

    Returns:
        {"by_seed": `value_by_seed`, "mean", "std": sample standard deviation, "ci95_over_seeds": [low, high]
        of Student's t interval of the mean}. For a single seed, "std" is 0 and the interval is None.
    """
    metric_values = np.array(list(value_by_seed.values()), dtype=np.float64)
    # the sample standard deviation of a single number is undefined, so it has no interval
    interval = t_mean_interval(metric_values) if len(metric_values) > 1 else None
    return {
        "by_seed": dict(value_by_seed),
        "mean": float(metric_values.mean()),
        "std": float(metric_values.std(ddof=1)) if interval else 0.0,
        "ci95_over_seeds": [interval.lo, interval.hi] if interval else None,
    }


def win_rates_by_seed(win_rate: Mapping[str, Any]) -> list[str]:
    """Format the win rate of every training seed with three decimals.

    Args:
        win_rate: result of `rate`.
    """
    return [f"{seed_record['win_rate']:.3f}" for seed_record in win_rate["seeds"]]


def markdown_rows(headings: Sequence[object], rows: Iterable[Sequence[object]]) -> list[str]:
    """Format the lines of a Markdown table.

    Args:
        headings: heading of each column.
        rows: cells of each row.
    """
    separator = ["---"] * len(headings)  # the syntax of Markdown requires this line below the headings
    return ["| " + " | ".join(map(str, cells)) + " |" for cells in (headings, separator, *rows)]


def plot_rates(panels: Sequence[tuple[str, Mapping[str, Mapping[str, Any]]]], note: str) -> "Figure":
    """Plot win rates with their intervals, and a tick for each training seed.

    Args:
        panels: one entry per plot: (label of the horizontal axis, win rates by the names of the rows). A win
            rate is a result of `rate`.
        note: title of the figure, which states its number of items, seeds and method.
    """
    row_count = len(panels[0][1])  # every panel has the same rows, and its height grows with their number
    plotted_figure, axes = style.figure(
        column_count=len(panels), size=(9.4 if len(panels) > 1 else 5.6, 1.4 + 0.26 * row_count)
    )
    # All panels get the same horizontal range, so that they can be compared. It spans all these numbers.
    plotted_values = []
    for _, rate_by_row in panels:
        for row_rate in rate_by_row.values():
            plotted_values += row_rate["ci95"]
            plotted_values += [seed_record["win_rate"] for seed_record in row_rate.get("seeds", ())]
    # style.figure returns a single Axes object for one panel
    for axis, (axis_label, rate_by_row) in zip(axes if len(panels) > 1 else [axes], panels, strict=True):
        for row_index, row_rate in enumerate(rate_by_row.values()):
            length_below = row_rate["win_rate"] - row_rate["ci95"][0]
            length_above = row_rate["ci95"][1] - row_rate["win_rate"]
            # errorbar rejects negative lengths, which rounding can cause
            bar_lengths = [[max(0, length_below)], [max(0, length_above)]]
            axis.errorbar(
                row_rate["win_rate"],
                row_index,
                xerr=bar_lengths,
                fmt="o",
                markersize=4,
                color=style.colour("after"),
                capsize=2,
            )
            # vertical ticks show the spread over training seeds, which the interval does not
            seed_rates = [seed["win_rate"] for seed in row_rate.get("seeds", ())]
            axis.plot(
                seed_rates, [row_index] * len(seed_rates), "|", color=style.colour("before"), markersize=7
            )
        axis.axvline(0.5, color=style.colour("noise"), linewidth=1)  # the win rate of equal arms
        axis.set_yticks(range(len(rate_by_row)), list(rate_by_row), fontsize=7)
        axis.invert_yaxis()  # the first row at the top, as in the table
        axis.set(xlim=(min(plotted_values) - 0.02, max(plotted_values) + 0.02))
        axis.set_xlabel(axis_label, fontsize=8)
    plotted_figure.suptitle(note, fontsize=8)
    return plotted_figure


def write(
    json_data: Mapping[str, Any],
    folder: Path,
    stem: str,
    markdown: Callable[[dict[str, Any]], str],
    plot: style.Plot | None = None,
) -> list[Path]:
    """Write a table as <stem>.json, <stem>.md and, if `plot` is passed, <stem>.png.

    Args:
        json_data: content of the JSON file.
        folder: folder of the files.
        stem: name of the files without their suffix.
        markdown: function that formats the content of the JSON file as Markdown.
        plot: function that plots the content of the JSON file; None: no figure is written.

    Returns:
        Paths of the written files.
    """
    paths = [folder / f"{stem}.{ending}" for ending in ("json", "md", "png")]
    write_atomic(paths[0], (json.dumps(json_data, indent=1) + "\n").encode())
    # The file is read back, so that the JSON file alone is enough to make Markdown and figure again.
    stored_data = json.loads(paths[0].read_text())
    write_atomic(paths[1], markdown(stored_data).encode())
    if plot is None:
        return paths[:2]
    # a PNG has a white background, on which only the light theme is readable
    with style.theme("light"):
        style.save(plot(stored_data), paths[2])
    return paths
