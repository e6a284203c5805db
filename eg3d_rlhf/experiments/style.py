"""One look for every figure: light and dark, colours that colour-blind readers can tell
apart, SVG and PNG.
"""

import contextlib
import functools
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from training.storage import write_atomic

if TYPE_CHECKING:  # matplotlib is imported where something is drawn
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Plot = Callable[[dict[str, Any]], "Figure"]  # draws a finding's data

ROLES = {  # Okabe and Ito's palette, by what is shown
    "before": "#0072B2",
    "after": "#D55E00",
    "control": "#009E73",
    "reward": "#CC79A7",
    "held-out": "#56B4E9",
    "noise": "#999999",
}
CYCLE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442"]
_THEMES = {"light": ("#1c1f24", "#d9dce1"), "dark": ("#e6e8eb", "#3a3f47")}  # of text, and of the grid


@contextlib.contextmanager
def theme(name: str = "light") -> Iterator[None]:
    """Matplotlib's settings for figures drawn inside: a transparent ground, so that the page's shows."""
    import matplotlib
    from cycler import cycler

    ink, grid = _THEMES[name]
    settings: dict[Any, Any] = {
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "savefig.facecolor": "none",
        "text.color": ink,
        "axes.labelcolor": ink,
        "axes.edgecolor": grid,
        "xtick.color": ink,
        "ytick.color": ink,
        "axes.grid": True,
        "grid.color": grid,
        "grid.linewidth": 0.6,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": cycler(color=CYCLE),
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "legend.frameon": False,
        "figure.constrained_layout.use": True,
        "svg.fonttype": "none",
        "svg.hashsalt": "eg3d-rlhf",
        "image.cmap": "viridis",
        "font.family": "sans-serif",
    }
    with matplotlib.rc_context(settings):
        yield


def figure(columns: int = 1, rows: int = 1, size: tuple[float, float] | None = None) -> tuple["Figure", Any]:
    """(figure, axes) as `plt.subplots` gives them, without a display; axes is an array where there are
    several.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=size or (min(4.6 * columns, 9.4), 3.2 * rows))  # inches
    FigureCanvasAgg(drawn)
    return drawn, drawn.subplots(rows, columns)


def grid(count: int, height: float) -> tuple["Figure", list["Axes"]]:
    """(figure, [axes]) of `count` plots, three in a row of this height in inches."""
    rows = -(-count // 3)
    drawn, axes = figure(columns=min(3, count), rows=rows, size=(9.4, height * rows))
    flat = list(np.atleast_1d(axes).ravel())
    for axis in flat[count:]:
        axis.set_axis_off()
    return drawn, flat[:count]


def plot(
    legend: float | str | None = "medium", size: tuple[float, float] | None = None, **labels: Any
) -> Callable[[Callable[[Any, dict[str, Any]], object]], Plot]:
    """Make `draw(axes, data)` a plot of a finding's data on one pair of axes.

    Args: legend: its font size, None for none; size: inches.
    """

    def decorate(draw: Callable[[Any, dict[str, Any]], object]) -> Plot:
        @functools.wraps(draw)
        def plotted(data: dict[str, Any]) -> "Figure":
            drawn, axes = figure(size=size)
            draw(axes, data)
            axes.set(**labels)
            if legend is not None:
                axes.legend(fontsize=legend)
            return drawn

        return plotted

    return decorate


@plot(None, size=(9.4, 0.8))
def plot_absent(axes: "Axes", data: dict[str, Any]) -> None:
    axes.set_axis_off()
    axes.text(0, 0.5, data["absent"], wrap=True, va="center")


def colour(role: str) -> str:
    """Colour of a role; unknown ones are grey."""
    return ROLES.get(role, "#777777")


def errors(row: Mapping[str, Any], value: str = "mean", lo: str = "lo", hi: str = "hi") -> list[list[float]]:
    """A row's interval as matplotlib's errorbar takes it."""
    return [[max(0.0, row[value] - row[lo])], [max(0.0, row[hi] - row[value])]]


def interval(
    axis: "Axes", x: float, row: Mapping[str, Any], role: str, value: str = "mean", **look: Any
) -> None:
    """One point of a row with its interval, in the colour of a role."""
    axis.errorbar(
        [x], [row[value]], yerr=errors(row, value), color=colour(role), **{"fmt": "o", "capsize": 4, **look}
    )


def band(
    axes: "Axes", x: Sequence[float], rows: Sequence[Mapping[str, Any]], ink: str, label: str, **look: Any
) -> None:
    """The means of rows over x, joined by lines, with their intervals as a band."""
    axes.plot(x, [row["mean"] for row in rows], "o-", color=ink, label=label, **look)
    axes.fill_between(
        x, [row["lo"] for row in rows], [row["hi"] for row in rows], alpha=0.2, color=ink, linewidth=0
    )


def save(drawn: "Figure", path: Path) -> None:
    """Write one figure; .svg without date, .png at 144 dots per inch on white."""
    buffer = io.BytesIO()
    kind = path.suffix.lstrip(".")
    extra = {"metadata": {"Date": None}} if kind == "svg" else {"dpi": 144, "facecolor": "white"}
    drawn.savefig(buffer, format=kind, **extra)
    write_atomic(path, buffer.getvalue())
