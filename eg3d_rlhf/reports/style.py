"""One look for every figure: light and dark, colours that colour-blind readers can tell apart, SVG and PNG."""

import contextlib
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROLES = {  # Okabe and Ito's palette, by what is shown
    "before": "#0072B2", "after": "#D55E00", "control": "#009E73", "reward": "#CC79A7", "held-out": "#56B4E9", "noise": "#999999",
}
CYCLE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442"]
SINGLE, WIDE = (4.6, 3.2), (9.4, 3.4)  # inches
_INK = {"light": "#1c1f24", "dark": "#e6e8eb"}
_GRID = {"light": "#d9dce1", "dark": "#3a3f47"}
THEMES = tuple(_INK)


@contextlib.contextmanager
def theme(name: str = "light") -> Iterator[None]:
    """Matplotlib's settings for figures drawn inside: a transparent ground, so that the page's shows.

    Raises: ValueError for an unknown theme.
    """
    if name not in THEMES:
        raise ValueError(f"theme: expected one of {', '.join(THEMES)}, got {name!r}.")
    import matplotlib
    from cycler import cycler

    ink, grid = _INK[name], _GRID[name]
    settings: dict[Any, Any] = {
        "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none", "text.color": ink, "axes.labelcolor": ink,
        "axes.edgecolor": grid, "xtick.color": ink, "ytick.color": ink, "axes.grid": True, "grid.color": grid, "grid.linewidth": 0.6,
        "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False, "axes.prop_cycle": cycler(color=CYCLE),
        "font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left", "legend.frameon": False, "figure.constrained_layout.use": True,
        "svg.fonttype": "none", "svg.hashsalt": "eg3d-rlhf", "image.cmap": "viridis", "font.family": "sans-serif",
    }
    with matplotlib.rc_context(settings):
        yield


def figure(columns: int = 1, rows: int = 1, size: tuple[float, float] | None = None):
    """(figure, axes) as `plt.subplots` gives them, without a display; axes is an array where there are several."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=size or (SINGLE if columns == rows == 1 else (min(4.6 * columns, 9.4), 3.2 * rows)))
    FigureCanvasAgg(drawn)
    return drawn, drawn.subplots(rows, columns)


def colour(role: str) -> str:
    """Colour of a role; unknown ones are grey."""
    return ROLES.get(role, "#777777")


def interval(axis, x: float, row: Mapping, role: str, value: str = "mean", lo: str = "lo", hi: str = "hi", **look) -> None:
    """One point of a row with its interval, in the colour of a role."""
    error = [[max(0.0, row[value] - row[lo])], [max(0.0, row[hi] - row[value])]]
    axis.errorbar([x], [row[value]], yerr=error, color=colour(role), **{"fmt": "o", "capsize": 4, **look})


def save(drawn, path: Path) -> None:
    """Write one figure; .svg without date, .png at 144 dots per inch on white."""
    from training.storage import write_atomic

    buffer, kind = io.BytesIO(), path.suffix.lstrip(".")
    extra = {"metadata": {"Date": None}} if kind == "svg" else {"dpi": 144, "facecolor": "white"}
    drawn.savefig(buffer, format=kind, **extra)
    write_atomic(path, buffer.getvalue())
