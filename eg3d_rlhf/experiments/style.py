"""Common style of all figures: light and dark themes, colours for colour-blind readers, SVG and PNG files.

matplotlib is imported inside the functions, so that commands that plot nothing start faster.
"""

import contextlib
import functools
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from training.storage import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Plot = Callable[[dict[str, Any]], "Figure"]  # (data of a finding, see pages.Finding) -> figure

# Palette of Okabe and Ito (Color Universal Design, 2008), by the role of the data in a figure.
ROLES = {
    "before": "#0072B2",
    "after": "#D55E00",
    "control": "#009E73",
    "reward": "#CC79A7",
    "held-out": "#56B4E9",
    "noise": "#999999",
}
CYCLE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442"]
# (colour of text, colour of grid lines) of each theme
_THEMES = {"light": ("#1c1f24", "#d9dce1"), "dark": ("#e6e8eb", "#3a3f47")}


@contextlib.contextmanager
def theme(name: str = "light") -> Iterator[None]:
    """Apply the settings of a theme to figures that are made inside the context.

    The background is transparent, so that a figure takes the background colour of its page.

    Args:
        name: "light" or "dark".
    """
    import matplotlib
    from cycler import cycler

    text_colour, grid_colour = _THEMES[name]
    rc_settings: dict[Any, Any] = {
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "savefig.facecolor": "none",
        "text.color": text_colour,
        "axes.labelcolor": text_colour,
        "axes.edgecolor": grid_colour,
        "xtick.color": text_colour,
        "ytick.color": text_colour,
        "axes.grid": True,
        "grid.color": grid_colour,
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
        # text is stored as text, not as outlines, so readers can search and select it
        "svg.fonttype": "none",
        "svg.hashsalt": "eg3d-rlhf",  # a fixed salt gives fixed ids, so equal figures give equal bytes
        "image.cmap": "viridis",
        "font.family": "sans-serif",
    }
    with matplotlib.rc_context(rc_settings):
        yield


def figure(
    column_count: int = 1, row_count: int = 1, size: tuple[float, float] | None = None
) -> tuple["Figure", Any]:
    """Make a figure and its axes like `plt.subplots`, but without a display.

    Args:
        column_count: number of plots side by side.
        row_count: number of plots one below another.
        size: (width, height) in inches; None: chosen by the number of plots.

    Returns:
        The figure, and one Axes object or, for several plots, an array of them.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # in inches; a figure is at most 9.4 inches wide
    new_figure = Figure(figsize=size or (min(4.6 * column_count, 9.4), 3.2 * row_count))
    FigureCanvasAgg(new_figure)  # sets new_figure.canvas, which savefig needs
    return new_figure, new_figure.subplots(row_count, column_count)


def grid(plot_count: int, height: float) -> tuple["Figure", list["Axes"]]:
    """Make a figure with `plot_count` plots, three in a row.

    Args:
        plot_count: number of plots.
        height: height of a row in inches.

    Returns:
        The figure, and the list of its `plot_count` Axes.
    """
    row_count = -(-plot_count // 3)  # plot_count / 3, rounded up
    grid_figure, axes = figure(
        column_count=min(3, plot_count), row_count=row_count, size=(9.4, height * row_count)
    )
    # a single plot comes as one Axes object and not as an array
    all_axes = list(np.atleast_1d(axes).ravel())
    # the axes at the end of the last row that no plot needs
    for axis in all_axes[plot_count:]:
        axis.set_axis_off()
    return grid_figure, all_axes[:plot_count]


def plot(
    legend: float | str | None = "medium", size: tuple[float, float] | None = None, **labels: Any
) -> Callable[[Callable[[Any, dict[str, Any]], object]], Plot]:
    """Make a decorator that turns a function `draw(axes, data)` into a function of the data.

    The new function makes a figure with a single plot, calls `draw` with its axes and the data of a finding,
    and returns the figure.

    Args:
        legend: font size of the legend; None: no legend.
        size: (width, height) of the figure in inches; None: the default of `figure`.
        labels: keyword arguments of `axes.set`, such as title and xlabel.
    """

    def decorate(draw: Callable[[Any, dict[str, Any]], object]) -> Plot:
        @functools.wraps(draw)
        def plot_data(data: dict[str, Any]) -> "Figure":
            new_figure, axes = figure(size=size)
            draw(axes, data)
            axes.set(**labels)
            if legend is not None:
                axes.legend(fontsize=legend)
            return new_figure

        return plot_data

    return decorate


@plot(None, size=(9.4, 0.8))
def plot_absent(axes: "Axes", data: dict[str, Any]) -> None:
    """Plot a text in place of a figure: the reason why a finding has no data, from its key "absent"."""
    axes.set_axis_off()
    axes.text(0, 0.5, data["absent"], wrap=True, va="center")


def colour(role: str) -> str:
    """Return the colour '#rrggbb' of data with a role, such as "before". Roles that ROLES lacks are grey."""
    return ROLES.get(role, "#777777")


def errors(
    table_row: Mapping[str, Any], value_key: str = "mean", lo_key: str = "lo", hi_key: str = "hi"
) -> list[list[float]]:
    """Convert the interval of a row to the argument `yerr` of matplotlib's errorbar.

    Args:
        table_row: line of a table.
        value_key: key of the value.
        lo_key: key of the lower end of its interval.
        hi_key: key of the upper end of its interval.

    Returns:
        [[length of the bar below the value], [length of the bar above it]], both >= 0.
    """
    # errorbar rejects negative lengths, which rounding of the values can cause
    return [
        [max(0.0, table_row[value_key] - table_row[lo_key])],
        [max(0.0, table_row[hi_key] - table_row[value_key])],
    ]


def interval(
    axis: "Axes",
    x: float,
    table_row: Mapping[str, Any],
    role: str,
    value_key: str = "mean",
    **errorbar_options: Any,
) -> None:
    """Plot the value of a row with its interval as an error bar.

    Args:
        axis: axes of the plot.
        x: horizontal position of the point.
        table_row: line of a table, with the keys `value_key`, "lo" and "hi".
        role: role that decides the colour, see `colour`.
        value_key: key of the value.
        errorbar_options: further keyword arguments of matplotlib's errorbar.
    """
    axis.errorbar(
        [x],
        [table_row[value_key]],
        yerr=errors(table_row, value_key),
        color=colour(role),
        **{"fmt": "o", "capsize": 4, **errorbar_options},
    )


def band(
    axes: "Axes",
    x: Sequence[float],
    table_rows: Sequence[Mapping[str, Any]],
    line_colour: str,
    label: str,
    **line_options: Any,
) -> None:
    """Plot the means of rows over x, joined by lines, with their intervals as a shaded band.

    Args:
        axes: axes of the plot.
        x: horizontal position of each row.
        table_rows: lines of a table, with the keys "mean", "lo" and "hi".
        line_colour: colour of the line and the band.
        label: text in the legend.
        line_options: further keyword arguments of `axes.plot`.
    """
    axes.plot(
        x,
        [table_row["mean"] for table_row in table_rows],
        "o-",
        color=line_colour,
        label=label,
        **line_options,
    )
    axes.fill_between(
        x,
        [table_row["lo"] for table_row in table_rows],
        [table_row["hi"] for table_row in table_rows],
        alpha=0.2,
        color=line_colour,
        linewidth=0,
    )


def save(plotted_figure: "Figure", path: Path) -> None:
    """Write a figure into a file atomically.

    Args:
        plotted_figure: figure to write.
        path: file with the suffix .svg (written without a date) or .png (144 dots per inch, white
            background).
    """
    image_buffer = io.BytesIO()
    file_format = path.suffix.lstrip(".")
    # an SVG file without the date has the same bytes whenever an equal figure is written
    format_options = (
        {"metadata": {"Date": None}} if file_format == "svg" else {"dpi": 144, "facecolor": "white"}
    )
    plotted_figure.savefig(image_buffer, format=file_format, **format_options)
    write_atomic(path, image_buffer.getvalue())
