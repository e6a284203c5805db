"""Common style of all figures: light and dark themes, colours for colour-blind readers, SVG and PNG."""

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

Plot = Callable[[dict[str, Any]], "Figure"]  # (a finding's data) -> figure

ROLES = {  # Okabe and Ito's palette, by the role of what is shown
    "before": "#0072B2",
    "after": "#D55E00",
    "control": "#009E73",
    "reward": "#CC79A7",
    "held-out": "#56B4E9",
    "noise": "#999999",
}
CYCLE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442"]
_THEMES = {"light": ("#1c1f24", "#d9dce1"), "dark": ("#e6e8eb", "#3a3f47")}  # (text, lines of the grid)


@contextlib.contextmanager
def theme(name: str = "light") -> Iterator[None]:
    """Apply the settings of a theme to figures that are drawn inside the context.

    The background is transparent, so that the background of the page shows.
    """
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
        "svg.fonttype": "none",  # text stays text, which readers can search and select
        "svg.hashsalt": "eg3d-rlhf",  # fixed ids: the same figure gives the same bytes
        "image.cmap": "viridis",
        "font.family": "sans-serif",
    }
    with matplotlib.rc_context(settings):
        yield


def figure(columns: int = 1, rows: int = 1, size: tuple[float, float] | None = None) -> tuple["Figure", Any]:
    """Make (figure, axes) as `plt.subplots` does, without a display; several axes come as an array."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=size or (min(4.6 * columns, 9.4), 3.2 * rows))  # inches
    FigureCanvasAgg(drawn)
    return drawn, drawn.subplots(rows, columns)


def grid(count: int, height: float) -> tuple["Figure", list["Axes"]]:
    """Make (figure, [axes]) for `count` plots, three in a row. Args: height: of a row, in inches."""
    rows = -(-count // 3)  # rounded up
    drawn, axes = figure(columns=min(3, count), rows=rows, size=(9.4, height * rows))
    flat = list(np.atleast_1d(axes).ravel())
    # the last row may have empty places
    for axis in flat[count:]:
        axis.set_axis_off()
    return drawn, flat[:count]


def plot(
    legend: float | str | None = "medium", size: tuple[float, float] | None = None, **labels: Any
) -> Callable[[Callable[[Any, dict[str, Any]], object]], Plot]:
    """Decorate `draw(axes, data)`, so that it becomes a Plot with one pair of axes.

    Args: legend: font size of the legend, None for no legend; size: (width, height) in inches; labels: passed
        to `axes.set`.
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
    """Print the reason why a finding has no data, in place of its figure."""
    axes.set_axis_off()
    axes.text(0, 0.5, data["absent"], wrap=True, va="center")


def colour(role: str) -> str:
    """Return the colour of a role; unknown roles are grey."""
    return ROLES.get(role, "#777777")


def errors(row: Mapping[str, Any], value: str = "mean", lo: str = "lo", hi: str = "hi") -> list[list[float]]:
    """Convert a row's interval to the argument of matplotlib's errorbar: [[below], [above]]."""
    # errorbar rejects negative lengths, which rounding can cause
    return [[max(0.0, row[value] - row[lo])], [max(0.0, row[hi] - row[value])]]


def interval(
    axis: "Axes", x: float, row: Mapping[str, Any], role: str, value: str = "mean", **look: Any
) -> None:
    """Plot one point of a row with its interval, in the colour of a role."""
    axis.errorbar(
        [x], [row[value]], yerr=errors(row, value), color=colour(role), **{"fmt": "o", "capsize": 4, **look}
    )


def band(
    axes: "Axes", x: Sequence[float], rows: Sequence[Mapping[str, Any]], ink: str, label: str, **look: Any
) -> None:
    """Plot the means of rows over x, joined by lines, with their intervals as a band."""
    axes.plot(x, [row["mean"] for row in rows], "o-", color=ink, label=label, **look)
    axes.fill_between(
        x, [row["lo"] for row in rows], [row["hi"] for row in rows], alpha=0.2, color=ink, linewidth=0
    )


def save(drawn: "Figure", path: Path) -> None:
    """Write one figure; .svg without date, .png at 144 dots per inch on white."""
    # without the date, equal figures give equal files
    buffer = io.BytesIO()
    kind = path.suffix.lstrip(".")
    extra = {"metadata": {"Date": None}} if kind == "svg" else {"dpi": 144, "facecolor": "white"}
    drawn.savefig(buffer, format=kind, **extra)
    write_atomic(path, buffer.getvalue())
