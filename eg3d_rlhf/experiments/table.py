"""Tables of arms x evaluators x training seeds: win rates with intervals as JSON, and Markdown and figures.

The scores of an arm by an evaluator are [K, C, S]: K training seeds, C prompts, S noises per prompt. Prompts
and noises are the same for all arms, so that arms are compared asset by asset. Markdown and figures are made
from the JSON alone.

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


def rate(a: np.ndarray, b: np.ndarray, seeds: Sequence[int]) -> dict[str, Any]:
    """Compute how often scores a [K, C, S] are above b [K, C, S] on the same noises.

    Returns the win rate, its interval over prompts, and the same for every training seed.
    """
    won = (np.greater(a, b) + np.greater_equal(a, b).astype(float)) / 2  # 1, or 0.5 at a tie
    # prompts are the unit of resampling: noises and seeds of one prompt are not independent; [C]
    mean, lo, hi = bootstrap_mean_interval(won.mean(axis=(0, 2)))
    each = [bootstrap_mean_interval(of_seed.mean(axis=1)) for of_seed in won]
    by_seed = [
        {"seed": seed, "win_rate": m.mean, "ci95": [m.lo, m.hi]} for seed, m in zip(seeds, each, strict=True)
    ]
    return {"win_rate": mean, "ci95": [lo, hi], "seeds": by_seed}


def detectable(conditions: int, noises: int, seeds: int) -> float:
    """Compute the smallest true win rate whose interval excludes one half in 80 % of tables (the power).

    Formula: 1/2 + (1.96 + 0.84) / (2 sqrt(C S K)), for independent comparisons without ties. If win rates
    differ between prompts, a larger win rate is needed.
    """
    return 0.5 + (NormalDist().inv_cdf(0.975) + NormalDist().inv_cdf(0.8)) / (
        2 * math.sqrt(conditions * noises * seeds)
    )


@dataclass(frozen=True, kw_only=True)
class Table:
    """Scores of arms and of the base that they are compared with, by evaluator; a control is an arm too."""

    scores: Mapping[str, Mapping[str, np.ndarray]]  # by arm and evaluator, [K, C, S]
    base: Mapping[str, np.ndarray]  # by evaluator, [K, C, S], or [1, C, S] where it has no training seed
    seeds: Sequence[int]  # [K]

    def against_base(self, arm: str) -> dict[str, dict[str, Any]]:
        """Compute the win rate of an arm against the base, by evaluator; see `rate`."""
        K = len(self.seeds)
        rates = {}
        for evaluator, scores in self.scores[arm].items():
            base = self.base[evaluator]
            # a base without training seeds is repeated: [1, C, S] -> [K, C, S]
            rates[evaluator] = rate(scores, base.repeat(K // len(base), 0), self.seeds)
        return rates

    def pairwise(self, evaluator: str, arms: Iterable[str] | None = None) -> dict[str, dict[str, Any]]:
        """Compute, for every two arms x and y, the win rate of x against y under the key "x_vs_y"."""
        names = self.scores if arms is None else arms
        return {
            f"{x}_vs_{y}": rate(self.scores[x][evaluator], self.scores[y][evaluator], self.seeds)
            for x, y in combinations(names, 2)
        }

    @property
    def sizes(self) -> dict[str, int]:
        """Return the number of prompts, under its old JSON key, and the number of noises per prompt."""
        prompts, noises = next(iter(self.base.values())).shape[1:]
        return {"conditions": prompts, "noises": noises}


# Formatting for readers.


def with_interval(value: Mapping[str, Any], form: str = ".3f", name: str = "win_rate") -> str:
    """Format a rate, or another value beside "ci95", with its interval: "0.612 [0.580, 0.640]"."""
    low, high = value["ci95"]
    return f"{value[name]:{form}} [{low:{form}}, {high:{form}}]"


def cell(value: float | Sequence[float | None] | None, form: str, ci95: Sequence[float] | None = None) -> str:
    """Format a figure: "0.61 [0.58, 0.64]" with its interval, "0.61 (0.58 to 0.64)" for values of several
    training seeds (mean, least and greatest), and "" where there is none.
    """
    known = [item for item in (value if isinstance(value, Sequence) else [value]) if item is not None]
    if not known:
        return ""
    least, most = (f"{end:{form}}" for end in (min(known), max(known)))
    text = f"{np.mean(known):{form}}" + ("" if least == most else f" ({least} to {most})")
    return f"{text} [{ci95[0]:{form}}, {ci95[1]:{form}}]" if ci95 else text


def figure_table(
    first: str,
    arms: Mapping[str, Mapping[str, Any]],
    columns: Mapping[str, tuple[str, str]],
    intervals: Collection[str] = (),
) -> list[str]:
    """Format a Markdown table with a line for each arm.

    Args: first: head of the arms' column; arms: figures by name, each a number, a list by training seed, or
        None; columns: words and format by figure; intervals: figures that are shown with the interval that
        stands under <figure>_ci95.
    """

    def text(figures: Mapping[str, Any], key: str, form: str) -> str:
        return cell(figures.get(key), form, figures.get(f"{key}_ci95") if key in intervals else None)

    rows = [
        [name, *(text(figures, key, form) for key, (_, form) in columns.items())]
        for name, figures in arms.items()
    ]
    return markdown_rows([first, *(words for words, _ in columns.values())], rows)


def over_seeds(values: Mapping[str, float]) -> dict[str, Any]:
    """Compute the mean, the sample standard deviation and Student's 95 % interval of a figure over seeds."""
    # float64, and no interval for a single seed, whose standard deviation is undefined
    known = np.array(list(values.values()), dtype=np.float64)
    interval = t_mean_interval(known) if len(known) > 1 else None
    return {
        "by_seed": dict(values),
        "mean": float(known.mean()),
        "std": float(known.std(ddof=1)) if interval else 0.0,
        "ci95_over_seeds": [interval.lo, interval.hi] if interval else None,
    }


def of_seeds(rated: Mapping[str, Any]) -> list[str]:
    """Format the win rate of every training seed."""
    return [f"{of_seed['win_rate']:.3f}" for of_seed in rated["seeds"]]


def markdown_rows(head: Sequence[object], rows: Iterable[Sequence[object]]) -> list[str]:
    """Format the lines of a Markdown table."""
    return ["| " + " | ".join(map(str, cells)) + " |" for cells in (head, ["---"] * len(head), *rows)]


def plot_rates(panels: Sequence[tuple[str, Mapping[str, Mapping[str, Any]]]], note: str) -> "Figure":
    """Plot win rates with their intervals, and a tick for each training seed.

    Args: panels: (label of the axis, rates by their names); note: title, which states the facts of the
        figure.
    """
    drawn, axes = style.figure(
        columns=len(panels), size=(9.4 if len(panels) > 1 else 5.6, 1.4 + 0.26 * len(panels[0][1]))
    )
    # all values of all panels, so that the panels have one range and can be compared
    rates = [
        rate
        for _, rows in panels
        for rated in rows.values()
        for rate in (*rated["ci95"], *(s["win_rate"] for s in rated.get("seeds", ())))
    ]
    for axis, (label, rows) in zip(axes if len(panels) > 1 else [axes], panels, strict=True):
        for place, rated in enumerate(rows.values()):
            low = rated["win_rate"] - rated["ci95"][0]
            high = rated["ci95"][1] - rated["win_rate"]
            # errorbar rejects negative lengths, which rounding can cause
            around = [[max(0, low)], [max(0, high)]]
            axis.errorbar(
                rated["win_rate"],
                place,
                xerr=around,
                fmt="o",
                markersize=4,
                color=style.colour("after"),
                capsize=2,
            )
            # vertical ticks show the spread over training seeds, which the interval does not
            ticks = [seed["win_rate"] for seed in rated.get("seeds", ())]
            axis.plot(ticks, [place] * len(ticks), "|", color=style.colour("before"), markersize=7)
        axis.axvline(0.5, color=style.colour("noise"), linewidth=1)  # chance
        axis.set_yticks(range(len(rows)), list(rows), fontsize=7)
        axis.invert_yaxis()  # the first row at the top, as in the table
        axis.set(xlim=(min(rates) - 0.02, max(rates) + 0.02))
        axis.set_xlabel(label, fontsize=8)
    drawn.suptitle(note, fontsize=8)
    return drawn


def write(
    data: Mapping[str, Any],
    folder: Path,
    stem: str,
    markdown: Callable[[dict[str, Any]], str],
    plot: style.Plot | None = None,
) -> list[Path]:
    """Write <stem>.json, and from it <stem>.md and, with `plot`, <stem>.png; return their paths."""
    paths = [folder / f"{stem}.{ending}" for ending in ("json", "md", "png")]
    write_atomic(paths[0], (json.dumps(data, indent=1) + "\n").encode())
    # read back, so that table and figure can be made again from the JSON file alone
    read = json.loads(paths[0].read_text())
    write_atomic(paths[1], markdown(read).encode())
    if plot is None:
        return paths[:2]
    with style.theme("light"):
        style.save(plot(read), paths[2])
    return paths
