"""Tables of arms x judges x training seeds: win rates with intervals as JSON; and from the JSON alone
Markdown and a figure.

Scores of an arm by a judge are [K, C, S]: K training seeds, C conditions, S noises per condition, the same
for all arms, so that arms are compared asset by asset.

>>> # one training seed, two conditions, two noises
>>> tuned, base = [[[3.0, 1.0], [2.0, 2.0]]], [[[1.0, 1.0], [1.0, 1.0]]]
>>> table = Table(scores={"tuned": {"final": np.array(tuned)}}, base={"final": np.array(base)}, seeds=[0])
>>> table.against_base("tuned")["final"]["win_rate"]  # ties count half
0.875
>>> rows = [["tuned", with_interval(table.against_base("tuned")["final"])]]
>>> print("\\n".join(markdown_rows(["arm", "wins"], rows)))
| arm | wins |
| --- | --- |
| tuned | 0.875 [0.750, 1.000] |

A run then writes `write(data, folder, "grpo", markdown, plot)`: grpo.json, and grpo.md and grpo.png made of
it.
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

INTERVAL = "95 % percentile bootstrap over conditions, each the mean over training seeds and noises"

# Numbers.


def rate(a: np.ndarray, b: np.ndarray, seeds: Sequence[int]) -> dict[str, Any]:
    """How often scores a [K, C, S] beat b [K, C, S] on the same noises: win rate, interval over conditions,
    every seed's own.
    """
    won = (np.greater(a, b) + np.greater_equal(a, b).astype(float)) / 2  # 1, or 0.5 at a tie
    mean, lo, hi = bootstrap_mean_interval(won.mean(axis=(0, 2)))
    each = [bootstrap_mean_interval(of_seed.mean(axis=1)) for of_seed in won]
    by_seed = [
        {"seed": seed, "win_rate": m.mean, "ci95": [m.lo, m.hi]} for seed, m in zip(seeds, each, strict=True)
    ]
    return {"win_rate": mean, "ci95": [lo, hi], "seeds": by_seed}


def detectable(conditions: int, noises: int, seeds: int) -> float:
    """Smallest true win rate that the interval sets apart from one half in 80 % of tables:
    1/2 + (1.96 + 0.84) / 2 sqrt(C S K).

    Comparisons count as independent and ties as none; where conditions differ it takes more.
    """
    return 0.5 + (NormalDist().inv_cdf(0.975) + NormalDist().inv_cdf(0.8)) / (
        2 * math.sqrt(conditions * noises * seeds)
    )


@dataclass(frozen=True, kw_only=True)
class Table:
    """Scores of arms and of what they are compared with, by judge; a control is an arm like any other."""

    scores: Mapping[str, Mapping[str, np.ndarray]]  # by arm and judge, [K, C, S]
    base: Mapping[str, np.ndarray]  # by judge, [K, C, S], or [1, C, S] where it has no training seed
    seeds: Sequence[int]  # [K]

    def against_base(self, arm: str) -> dict[str, dict[str, Any]]:
        """By judge, how often an arm beats the base; see `rate`."""
        K = len(self.seeds)
        return {
            judge: rate(own, self.base[judge].repeat(K // len(self.base[judge]), 0), self.seeds)
            for judge, own in self.scores[arm].items()
        }

    def pairwise(self, judge: str, arms: Iterable[str] | None = None) -> dict[str, dict[str, Any]]:
        """ "x_vs_y": how often x beats y, for every two arms."""
        names = self.scores if arms is None else arms
        return {
            f"{x}_vs_{y}": rate(self.scores[x][judge], self.scores[y][judge], self.seeds)
            for x, y in combinations(names, 2)
        }

    @property
    def sizes(self) -> dict[str, int]:
        conditions, noises = next(iter(self.base.values())).shape[1:]
        return {"conditions": conditions, "noises": noises}


# For people.


def with_interval(value: Mapping[str, Any], form: str = ".3f", name: str = "win_rate") -> str:
    """ "0.612 [0.580, 0.640]": a rate, or another value with "ci95" beside it."""
    low, high = value["ci95"]
    return f"{value[name]:{form}} [{low:{form}}, {high:{form}}]"


def cell(value: float | Sequence[float | None] | None, form: str, ci95: Sequence[float] | None = None) -> str:
    """Format a figure: "0.61 [0.58, 0.64]" with its interval, "0.61 (0.58 to 0.64)" for values of several
    training seeds (mean, least and greatest), and "" where there is none.
    """
    known = [one for one in (value if isinstance(value, Sequence) else [value]) if one is not None]
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
    known = np.array(list(values.values()), dtype=np.float64)
    interval = t_mean_interval(known) if len(known) > 1 else None
    return {
        "by_seed": dict(values),
        "mean": float(known.mean()),
        "std": float(known.std(ddof=1)) if interval else 0.0,
        "ci95_over_seeds": [interval.lo, interval.hi] if interval else None,
    }


def of_seeds(rated: Mapping[str, Any]) -> list[str]:
    return [f"{one['win_rate']:.3f}" for one in rated["seeds"]]


def markdown_rows(head: Sequence[object], rows: Iterable[Sequence[object]]) -> list[str]:
    return ["| " + " | ".join(map(str, cells)) + " |" for cells in (head, ["---"] * len(head), *rows)]


def plot_rates(panels: Sequence[tuple[str, Mapping[str, Mapping[str, Any]]]], note: str) -> "Figure":
    """A figure of win rates with their intervals, and a tick for each training seed.

    Args: panels: a label of the axis, and rates by what stands beside them; note: what a reader of the figure
        must know.
    """
    drawn, axes = style.figure(
        columns=len(panels), size=(9.4 if len(panels) > 1 else 5.6, 1.4 + 0.26 * len(panels[0][1]))
    )
    rates = [
        rate
        for _, rows in panels
        for one in rows.values()
        for rate in (*one["ci95"], *(s["win_rate"] for s in one.get("seeds", ())))
    ]
    for axis, (label, rows) in zip(axes if len(panels) > 1 else [axes], panels, strict=True):
        for place, rated in enumerate(rows.values()):
            low = rated["win_rate"] - rated["ci95"][0]
            high = rated["ci95"][1] - rated["win_rate"]
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
            ticks = [seed["win_rate"] for seed in rated.get("seeds", ())]
            axis.plot(ticks, [place] * len(ticks), "|", color=style.colour("before"), markersize=7)
        axis.axvline(0.5, color=style.colour("noise"), linewidth=1)
        axis.set_yticks(range(len(rows)), list(rows), fontsize=7)
        axis.invert_yaxis()
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
    """<stem>.json, .md and, with `plot`, .png; the latter are made of the first."""
    paths = [folder / f"{stem}.{ending}" for ending in ("json", "md", "png")]
    write_atomic(paths[0], (json.dumps(data, indent=1) + "\n").encode())
    read = json.loads(paths[0].read_text())
    write_atomic(paths[1], markdown(read).encode())
    if plot is None:
        return paths[:2]
    with style.theme("light"):
        style.save(plot(read), paths[2])
    return paths
