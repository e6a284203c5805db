"""Figures of the attribution report, drawn from its findings alone."""

import numpy as np

from eg3d_rlhf.reports import style

_COLOURS = {"Shapley": "#0072B2", "Integrated Gradients": "#D55E00", "occlusion": "#009E73", "noise": "#999999"}


def _order(means: list[dict]) -> np.ndarray:
    """Regions by mean, the largest last, since bars are drawn upwards."""
    return np.argsort([m["mean"] for m in means])


def _bar_size(count: int) -> tuple[float, float]:
    return (6.4, 0.9 + 0.34 * count)


def plot_regions(data: dict):
    """Mean Shapley value per region with its interval."""
    drawn, axes = style.figure(size=_bar_size(len(data["names"])))
    order = _order(data["means"])
    means = [data["means"][i] for i in order]
    middle = np.array([m["mean"] for m in means])
    spread = [middle - [m["lo"] for m in means], [m["hi"] for m in means] - middle]
    colours = [style.colour("after") if v > 0 else style.colour("before") for v in middle]
    axes.barh([data["names"][i] for i in order], middle, xerr=spread, color=colours, error_kw={"ecolor": "#777777", "elinewidth": 1.2})
    axes.axvline(0, color=style.colour("noise"), linewidth=1)
    axes.set(xlabel="mean contribution to the change of the reward", title=f"Shapley values ({data['method']})")
    return drawn


def plot_latents(data: dict):
    """Every latent's value per region."""
    drawn, axes = style.figure(size=_bar_size(len(data["names"])))
    order = _order(data["means"])
    values = np.asarray(data["values"])
    offsets = np.linspace(-0.28, 0.28, len(values))
    for row, region in enumerate(order):
        error = None if data["errors"] is None else [latent[region] for latent in data["errors"]]
        axes.errorbar(values[:, region], row + offsets, xerr=error, fmt="o", markersize=3, color=style.colour("before"), elinewidth=0.8)
    axes.axvline(0, color=style.colour("noise"), linewidth=1)
    axes.set_yticks(range(len(order)), [data["names"][i] for i in order])
    axes.set(xlabel="contribution to the change of the reward", title="One point per latent")
    return drawn


def plot_methods(data: dict):
    """Mean attribution per region by every method."""
    count = len(data["names"])
    drawn, axes = style.figure(size=(6.4, 0.9 + 0.5 * count))
    order = _order(data["means"]["Shapley"])
    thick = 0.8 / len(data["means"])
    for k, (method, means) in enumerate(data["means"].items()):
        places = np.arange(count) + 0.4 - thick * (k + 0.5)
        axes.barh(places, [means[i]["mean"] for i in order], height=thick, color=_COLOURS.get(method, "#777777"), label=method)
    axes.axvline(0, color=style.colour("noise"), linewidth=1)
    axes.set_yticks(range(count), [data["names"][i] for i in order])
    axes.set(xlabel="mean attribution", title="Four methods")
    axes.legend(fontsize=7)
    return drawn


def plot_agreement(data: dict):
    """Mean rank correlation between methods, per latent."""
    pairs = [p for p in data["agreement"] if p["spearman"]["mean"] is not None]
    drawn, axes = style.figure(size=(6.4, 0.9 + 0.4 * max(len(pairs), 1)))
    for shift, kind, colour in ((0.12, "spearman", "#0072B2"), (-0.12, "kendall", "#D55E00")):
        means = [p[kind]["mean"] for p in pairs]
        middle = np.array([m["mean"] for m in means])
        spread = [middle - [m["lo"] for m in means], [m["hi"] for m in means] - middle]
        axes.errorbar(middle, np.arange(len(pairs)) + shift, xerr=spread, fmt="o", markersize=4, color=colour, label=kind)
    axes.axvline(0, color=style.colour("noise"), linewidth=1)
    axes.set_yticks(range(len(pairs)), [f"{p['first']} / {p['second']}" for p in pairs])
    axes.set(xlim=(-1.05, 1.05), xlabel="rank correlation, mean over latents", title="Agreement of methods")
    axes.legend(fontsize=7)
    return drawn


def plot_redrawn(data: dict):
    """Rank correlation with each reward of random weights, and the mean with its interval."""
    drawn, axes = style.figure(size=(6.4, 2.2))
    for row, (key, mean) in enumerate((("by_draw", "mean"), ("sizes", "mean_of_sizes"))):
        axes.plot(data[key], [row] * len(data[key]), "o", markersize=4, alpha=0.5, color=style.colour("noise"))
        if data[mean] is not None:
            m = data[mean]
            axes.errorbar([m["mean"]], [row + 0.18], xerr=[[m["mean"] - m["lo"]], [m["hi"] - m["mean"]]], fmt="D",
                          color=style.colour("reward"), label=None if row else "mean, 95 % interval")
    axes.axvline(0, color=style.colour("noise"), linewidth=1)
    axes.set_yticks([0, 1], ["with signs", "sizes alone"])
    axes.set(xlim=(-1.05, 1.05), ylim=(-0.5, 1.6), xlabel="Spearman correlation with the trained reward's attribution, one point per draw",
             title="Re-drawn weights")
    if data["mean"] is not None:
        axes.legend(fontsize=7)
    return drawn
