"""How well a reward orders held-out pairs: accuracy with an interval, calibration, the same against a
noise-free order; learning curves.

Shape letters: P pairs.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import brentq, minimize_scalar
from scipy.spatial.distance import cdist
from scipy.special import expit, ndtri
from scipy.stats import rankdata

from eg3d_rlhf.core.statistics import wilson_interval
from eg3d_rlhf.preferences.labels import Preference
from eg3d_rlhf.preferences.losses import cs_divergence, median_distance
from eg3d_rlhf.preferences.unpaired import UnpairedPreference
from eg3d_rlhf.rewards.cache import ObservationCache
from eg3d_rlhf.rewards.ensembles import RewardEnsemble
from eg3d_rlhf.rewards.networks import RewardNetwork
from training.distributed import SINGLE, Ranks

# How many labels it takes to learn from and to say anything of the result.
LEAST_TRAIN = 200  # pairs; a network that reads a slab remembers fewer by heart
# pairs; from then on the exact test tells a true accuracy of 0.7 from chance in four cases of five
LEAST_TEST = 54
LEAST_KIND = 27  # held-out single shapes of either kind
# of the volume of a head's back; pairs whose errors differ by so much should be told apart by all
APART = 0.05


def too_few(counts: Mapping[str, int], fractions: Sequence[float]) -> str:
    """A line to print where pairs, counted by split, are too few to train or to judge the result, else ''.

    Args: fractions: of splits.
    """
    train, val, test = (counts[name] for name in ("train", "val", "test"))
    if train >= LEAST_TRAIN and val >= LEAST_TEST and test >= LEAST_TEST:
        return ""
    shares = zip((LEAST_TRAIN, LEAST_TEST, LEAST_TEST), fractions, strict=True)
    wanted = max(math.ceil(least / share) for least, share in shares if share)
    return (
        f"too few labels: {train} pairs to train, {val} to choose the epoch by and {test} to test; some"
        f" {wanted} labels are wanted ({LEAST_TRAIN} to train, {LEAST_TEST} and {LEAST_TEST} held out). The"
        " figures below say little."
    )


def too_few_shapes(good: int, others: int) -> str:
    """The same for held-out labels of single shapes."""
    if min(good, others) >= LEAST_KIND:
        return ""
    return (
        f"too few labels: {good} preferred and {others} other shapes are held out; {LEAST_KIND} of either are"
        " wanted."
    )


def auc_interval(value: float, good: int, others: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of an AUC from so many of either kind, inside 0..1 and for values of 0 and 1, too.

    Newcombe (2006), method 5: where |AUC - value| = z sqrt(V), V the variance of Hanley and McNeil (1982) at
    that AUC with equal numbers of both kinds: V = AUC (1 - AUC) (1 + N ((1 - AUC) / (2 - AUC) +
    AUC / (1 + AUC))) / (good others), N = (good + others) / 2 - 1.
    """
    z = float(ndtri(0.5 + confidence / 2))
    n = (good + others) / 2 - 1

    def beyond(at: float) -> float:
        variance = at * (1 - at) * (1 + n * ((1 - at) / (2 - at) + at / (1 + at))) / (good * others)
        return (at - value) ** 2 - z * z * variance

    inside = min(max(value, 1e-9), 1 - 1e-9)  # at 0 and 1 themselves the variance is 0
    return (
        0.0 if value <= 0 else brentq(beyond, 0.0, inside),
        1.0 if value >= 1 else brentq(beyond, inside, 1.0),
    )


Network = RewardNetwork | RewardEnsemble


def score_seeds(
    model: Network, store: ObservationCache, seeds: Iterable[int], ranks: Ranks = SINGLE, batch: int = 32
) -> dict[int, float]:
    """Reward of every seed, batch by batch in turn over the ranks; every rank gets all. Pass a model in eval
    mode where it has dropout.
    """
    device = next(model.parameters()).device
    unique = list(dict.fromkeys(seeds))
    mine: list[tuple[int, float]] = []
    with torch.no_grad():
        for start in range(ranks.rank * batch, len(unique), ranks.world * batch):
            part = unique[start : start + batch]
            mine += zip(part, model.score(store.take(part, device)).tolist(), strict=True)
    scores = {int(seed): score for part in ranks.gather(mine) for seed, score in part}
    return {seed: scores[seed] for seed in unique}


def margins(scores: Mapping[int, float], labels: Sequence[Preference]) -> np.ndarray:
    """r(winner) - r(loser) per label, float64 [P]. Swapping winner and loser negates it."""
    return np.array([scores[label.winner] - scores[label.loser] for label in labels], dtype=np.float64)


def log_loss(margin: np.ndarray) -> float:
    """Mean of -log sigmoid(margin)."""
    return float(np.logaddexp(0, -margin).mean())


def calibration_error(margin: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error of p = sigmoid(margin), Guo 2017 (arXiv 1706.04599), eq. 3: sum_b
    n_b / n * |accuracy_b - confidence_b|.

    Confidence is max(p, 1 - p); `bins` equal ones span [0.5, 1]. Returns a value in [0, 1]; 0 is best.
    """
    confidence = expit(np.abs(margin))
    index = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    error = 0.0
    for b in range(bins):
        inside = index == b
        if inside.any():
            error += inside.mean() * abs((margin[inside] > 0).mean() - confidence[inside].mean())
    return float(error)


def fit_temperature(margin: np.ndarray) -> float:
    """Divisor T of margins that minimises the log loss of sigmoid(margin / T), within 0.01 ... 100. Fit on
    validation pairs only.
    """
    fit = minimize_scalar(
        lambda log_t: log_loss(margin * math.exp(-log_t)),
        bounds=(math.log(0.01), math.log(100)),
        method="bounded",
    )
    return float(math.exp(fit.x))


def rate(correct: int, n: int) -> dict:
    """A proportion with its Wilson 95 % interval, as plain JSON values."""
    low, high = wilson_interval(correct, n)
    return {
        "correct": correct,
        "n": n,
        "accuracy": correct / n if n else None,
        "interval_95": [float(low), float(high)],
    }


def auc(good: Sequence[float], others: Sequence[float]) -> float:
    """Share of all pairs of a preferred and another shape whose scores are in that order, ties half; 0.5 is
    chance.
    """
    if not len(good) or not len(others):
        raise ValueError(
            f"auc: expected scores of both kinds, got {len(good)} and {len(others)}. Label more shapes."
        )
    ranks = rankdata([*good, *others])
    return float((ranks[: len(good)].sum() - len(good) * (len(good) + 1) / 2) / (len(good) * len(others)))


def silhouette(points: np.ndarray, kind: np.ndarray) -> float:
    """How well two kinds lie apart, -1..1: the mean of (b - a) / max(a, b), Rousseeuw (1987).

    a is a point's mean distance to the others of its kind, b that to the other kind. Args: points [N, M];
    kind [N] bool, at least two of each.
    """
    distance = cdist(points, points)
    # [2, N]
    sums = np.stack([distance[:, ~kind].sum(1), distance[:, kind].sum(1)])
    mine = kind.astype(int)
    count = np.array([(~kind).sum(), kind.sum()])
    each = np.arange(len(kind))
    a = sums[mine, each] / (count[mine] - 1)
    b = sums[1 - mine, each] / count[1 - mine]
    return float(((b - a) / np.maximum(np.maximum(a, b), np.finfo(float).tiny)).mean())


def evaluate_unpaired(
    model: Network, embed: RewardNetwork, store: ObservationCache, labels: Sequence[UnpairedPreference]
) -> dict:
    """Figures of unpaired labels: AUC of the scores; divergence and silhouette of the two kinds in an
    embedding of length 1.

    Args: embed: the network whose embedding it is, such as an ensemble's first member.
    """
    seeds = [label.seed for label in labels]
    kind = np.array([label.preferred is True for label in labels])
    scores = score_seeds(model, store, seeds)
    device = next(embed.parameters()).device
    with torch.no_grad():
        parts = [
            embed.embed(store.take(seeds[i : i + 32], device)).cpu().double()
            for i in range(0, len(seeds), 32)
        ]
    points = torch.nn.functional.normalize(torch.cat(parts))
    apart = cs_divergence(points[kind], points[~kind], median_distance(points), "U")
    values = np.array([scores[seed] for seed in seeds])
    n = [int(kind.sum()), int((~kind).sum())]
    area = auc(values[kind], values[~kind])
    return {
        "n": n,
        "auc": area,
        "auc_interval_95": list(auc_interval(area, *n)),
        "divergence": float(apart),
        "silhouette": silhouette(points.numpy(), kind),
    }


def evaluate(
    model: Network, store: ObservationCache, labels: Sequence[Preference], temperature: float = 1.0
) -> dict:
    """Figures of one split.

    A margin of exactly 0 counts as wrong. `clean` is present when labels say which seed is better without
    noise; it counts those alone. `apart` counts those of them whose volume errors differ by at least APART,
    where labels say so.
    Args: `temperature` divides the margins for `calibration_error_scaled` (see fit_temperature).
    """
    scores = score_seeds(model, store, [seed for label in labels for seed in (label.winner, label.loser)])
    margin = margins(scores, labels)
    report = {
        "labels": rate(int((margin > 0).sum()), len(margin)),
        "log_loss": log_loss(margin),
        "calibration_error": calibration_error(margin),
        "calibration_error_scaled": calibration_error(margin / temperature),
        "mean_margin": float(margin.mean()),
    }
    # [P]
    sign = np.array(
        [0 if label.clean is None else (1 if label.clean == label.winner else -1) for label in labels]
    )
    if np.any(sign):
        report["clean"] = rate(int((margin * sign > 0).sum()), int((sign != 0).sum()))
        report["label_noise"] = float((sign < 0).sum() / (sign != 0).sum())
    apart = (sign != 0) & np.array([label.extra.get("gap", 0.0) >= APART for label in labels])
    if np.any(apart):
        report["apart"] = rate(int((margin * sign > 0)[apart].sum()), int(apart.sum()))
    return report


def ordered_by(filled: Mapping[int, float], labels: Sequence[Preference]) -> dict:
    """What one feature made by hand orders, larger is better: figures as `evaluate` has them.

    Args: filled: by seed.
    """
    known = [label for label in labels if label.clean is not None]
    right = np.array([2 * (label.clean == label.winner) - 1 for label in known])
    right = right * np.array([filled[label.winner] - filled[label.loser] for label in known]) > 0
    apart = np.array([label.extra.get("gap", 0.0) >= APART for label in known], dtype=bool)
    counted = {"clean": np.ones_like(apart), "apart": apart}
    return {
        name: rate(int(right[rows].sum()), int(rows.sum())) for name, rows in counted.items() if rows.any()
    }


def collect_curves(history: Sequence[dict], best_epoch: int, context: dict) -> dict:
    """One series per quantity over epochs. `context` is stated under the figure:
    n, seed, preset, generator.
    """
    named = {name: [r[name] for r in history] for name in ("train_accuracy", "val_accuracy", "val_log_loss")}
    losses = {name: [r["loss"][name] for r in history] for name in history[0]["loss"]}
    epochs = [r["epoch"] + 1 for r in history]
    return {"epoch": epochs, **named, "loss": losses, "best_epoch": best_epoch + 1, "context": context}


def plot_curves(json_path: Path, png_path: Path) -> Path:
    """Draw a file of `collect_curves`: accuracies on the left, validation log loss and weighted loss terms on
    the right.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = json.loads(json_path.read_text())
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.plot(curves["epoch"], curves["train_accuracy"], label="training pairs (while training)")
    left.plot(curves["epoch"], curves["val_accuracy"], label="validation pairs")
    left.axvline(curves["best_epoch"], color="0.6", linestyle=":", label="chosen epoch")
    left.set(xlabel="epoch", ylabel="pairs ordered as labelled (fraction)")
    left.legend()
    right.plot(curves["epoch"], curves["val_log_loss"], label="validation log loss")
    for name, values in curves["loss"].items():
        sign = -1 if name == "divergence" else 1  # it is made large
        right.plot(
            curves["epoch"],
            [sign * value for value in values],
            label=f"training {name}, weighted",
            linewidth=1,
        )
    right.set(xlabel="epoch", ylabel="loss (nats)", yscale="log")
    right.legend(fontsize=8)
    figure.suptitle(", ".join(f"{k} {v}" for k, v in curves["context"].items()), fontsize=9)
    figure.savefig(png_path, dpi=120)
    return png_path
