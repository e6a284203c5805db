"""Evaluate how well a reward orders held-out pairs: accuracy with an interval, calibration, and learning
curves.

Accuracy is also computed against the noise-free order, where labels contain it.
Shape letters: P pairs, N points, M entries of an embedding.
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

# Numbers of labels that suffice for training and for statements about the result
LEAST_TRAIN = 200  # pairs; with fewer, a network that reads a slab mostly memorises them
# Pairs; with this many, the exact test distinguishes a true accuracy of 0.7 from chance with a power of 80 %
LEAST_TEST = 54
LEAST_KIND = 27  # held-out single shapes, preferred ones and others each
# Difference of two volume errors, as a share of the volume of the back of the head. Every reward should order
# pairs correctly that differ by at least this much.
APART = 0.05


def too_few(counts: Mapping[str, int], fractions: Sequence[float]) -> str:
    """Return a line to print if there are too few pairs to train or to evaluate the result, else ''.

    Args: counts: number of pairs by split; fractions: shares of the splits train, val and test, 0..1.
    """
    # In the order of `fractions`
    train, val, test = (counts[name] for name in ("train", "val", "test"))
    if train >= LEAST_TRAIN and val >= LEAST_TEST and test >= LEAST_TEST:
        return ""
    # The total for which every split with a share gets its least number
    shares = zip((LEAST_TRAIN, LEAST_TEST, LEAST_TEST), fractions, strict=True)
    needed = max(math.ceil(least / share) for least, share in shares if share)
    return (
        f"too few labels: {train} pairs for training, {val} for the choice of the epoch and {test} for the"
        f" test. About {needed} labels are needed ({LEAST_TRAIN} for training, {LEAST_TEST} and"
        f" {LEAST_TEST} held out). The figures below are not reliable."
    )


def too_few_shapes(good: int, others: int) -> str:
    """Return a line to print if there are too few held-out labels of single shapes, else ''."""
    if min(good, others) >= LEAST_KIND:
        return ""
    return (
        f"too few labels: {good} preferred and {others} other shapes are held out; {LEAST_KIND} of each"
        " kind are needed."
    )


def auc_interval(value: float, good: int, others: int, confidence: float = 0.95) -> tuple[float, float]:
    """Compute the interval of an AUC from `good` preferred and `others` other shapes.

    Newcombe (2006), method 5: its ends solve |AUC - value| = z sqrt(V), with V the variance of Hanley and
    McNeil (1982) at that AUC for equal numbers of both kinds: V = AUC (1 - AUC) (1 + N ((1 - AUC) / (2 - AUC)
    + AUC / (1 + AUC))) / (good others), N = (good + others) / 2 - 1. The interval lies inside 0..1, and it
    also exists for values of 0 and 1.
    """
    z = float(ndtri(0.5 + confidence / 2))
    n = (good + others) / 2 - 1

    # Negative inside the interval, positive outside, so that each end is a root.
    def beyond(at: float) -> float:
        variance = at * (1 - at) * (1 + n * ((1 - at) / (2 - at) + at / (1 + at))) / (good * others)
        return (at - value) ** 2 - z * z * variance

    # At exactly 0 and 1 the variance is 0, and so is the function: a root that is not an end.
    inside = min(max(value, 1e-9), 1 - 1e-9)
    return (
        0.0 if value <= 0 else brentq(beyond, 0.0, inside),
        1.0 if value >= 1 else brentq(beyond, inside, 1.0),
    )


Network = RewardNetwork | RewardEnsemble


def score_seeds(
    model: Network, store: ObservationCache, seeds: Iterable[int], ranks: Ranks = SINGLE, batch: int = 32
) -> dict[int, float]:
    """Compute the reward of every seed. Ranks take batches in turn, and every rank gets all scores.

    A model with dropout must be in eval mode.
    """
    device = next(model.parameters()).device
    unique = list(dict.fromkeys(seeds))  # without repetitions, in the given order
    rank_scores: list[tuple[int, float]] = []
    with torch.no_grad():
        for start in range(ranks.rank * batch, len(unique), ranks.world * batch):
            part = unique[start : start + batch]
            rank_scores += zip(part, model.score(store.take(part, device)).tolist(), strict=True)
    # Every rank needs all scores, for instance to choose the epoch alike.
    scores = {int(seed): score for part in ranks.gather(rank_scores) for seed, score in part}
    # In the order of the seeds, which does not depend on the number of ranks.
    return {seed: scores[seed] for seed in unique}


def margins(scores: Mapping[int, float], labels: Sequence[Preference]) -> np.ndarray:
    """Compute r(winner) - r(loser) for each label, float64 [P]. Swapping winner and loser negates it."""
    return np.array([scores[label.winner] - scores[label.loser] for label in labels], dtype=np.float64)


def log_loss(margin: np.ndarray) -> float:
    """Compute the mean of -log sigmoid(margin)."""
    # logaddexp(0, -m) = log(1 + exp(-m)), without overflow.
    return float(np.logaddexp(0, -margin).mean())


def calibration_error(margin: np.ndarray, bins: int = 10) -> float:
    """Compute the expected calibration error of p = sigmoid(margin), Guo et al. 2017 (arXiv 1706.04599), eq.
    3.

    The error is sum_b n_b / n * |accuracy_b - confidence_b|. The confidence is max(p, 1 - p), and `bins` bins
    of equal width span [0.5, 1]. Returns a value in [0, 1]; 0 is best.
    """
    confidence = expit(np.abs(margin))
    # A confidence of exactly 1 belongs to the last bin.
    index = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    error = 0.0
    for b in range(bins):
        inside = index == b
        if inside.any():
            error += inside.mean() * abs((margin[inside] > 0).mean() - confidence[inside].mean())
    return float(error)


def fit_temperature(margin: np.ndarray) -> float:
    """Return the divisor T of margins that minimises the log loss of sigmoid(margin / T), within 0.01 ...
    100.

    Fit it on validation pairs only.
    """
    # The search is over log T, in which factors up and down are symmetric.
    fit = minimize_scalar(
        lambda log_t: log_loss(margin * math.exp(-log_t)),
        bounds=(math.log(0.01), math.log(100)),
        method="bounded",
    )
    return float(math.exp(fit.x))


def rate(correct: int, n: int) -> dict:
    """Return a proportion with its Wilson 95 % interval, as JSON values."""
    low, high = wilson_interval(correct, n)
    return {
        "correct": correct,
        "n": n,
        "accuracy": correct / n if n else None,
        "interval_95": [float(low), float(high)],
    }


def auc(good: Sequence[float], others: Sequence[float]) -> float:
    """Compute the area under the ROC curve of preferred shapes against others.

    Ties count one half. The value of chance is 0.5.
    Raises: ValueError if either kind is empty.
    """
    if not len(good) or not len(others):
        raise ValueError(
            f"auc: expected scores of preferred and of other shapes, got {len(good)} and {len(others)}."
            " Label more shapes."
        )
    # Mann-Whitney U from the rank sum of the preferred shapes; ties get mean ranks.
    ranks = rankdata([*good, *others])
    return float((ranks[: len(good)].sum() - len(good) * (len(good) + 1) / 2) / (len(good) * len(others)))


def silhouette(points: np.ndarray, kind: np.ndarray) -> float:
    """Compute how well two kinds of points separate: the mean of (b - a) / max(a, b), Rousseeuw (1987),
    -1..1.

    a is a point's mean distance to the other points of its kind, and b the mean distance to the other kind.
    Args: points: [N, M]; kind: [N] bool, at least two of each.
    """
    distance = cdist(points, points)
    # [2, N]: sums of distances to points of kind False and of kind True
    sums = np.stack([distance[:, ~kind].sum(1), distance[:, kind].sum(1)])
    kind_index = kind.astype(int)
    count = np.array([(~kind).sum(), kind.sum()])
    each = np.arange(len(kind))
    # The distance to itself is 0, so the divisor leaves the point out.
    a = sums[kind_index, each] / (count[kind_index] - 1)
    b = sums[1 - kind_index, each] / count[1 - kind_index]
    # A tiny divisor for points that coincide, whose silhouette is 0.
    return float(((b - a) / np.maximum(np.maximum(a, b), np.finfo(float).tiny)).mean())


def evaluate_unpaired(
    model: Network, embed: RewardNetwork, store: ObservationCache, labels: Sequence[UnpairedPreference]
) -> dict:
    """Compute figures of unpaired labels: the AUC of the scores, and the separation of both kinds in an
    embedding.

    The separation is given as Cauchy-Schwarz divergence and as silhouette of embeddings of length 1.
    Args: embed: the network that gives the embedding, for example the first member of an ensemble.
    """
    seeds = [label.seed for label in labels]
    kind = np.array([label.preferred is True for label in labels])
    scores = score_seeds(model, store, seeds)
    device = next(embed.parameters()).device
    with torch.no_grad():
        # In batches of 32, since observations of many shapes do not fit into memory at once.
        # [N, M]
        parts = [
            embed.embed(store.take(seeds[i : i + 32], device)).cpu().double()
            for i in range(0, len(seeds), 32)
        ]
    points = torch.nn.functional.normalize(torch.cat(parts))
    divergence = cs_divergence(points[kind], points[~kind], median_distance(points), "U")
    values = np.array([scores[seed] for seed in seeds])
    n = [int(kind.sum()), int((~kind).sum())]
    # Ties count one half, see `auc`.
    area = auc(values[kind], values[~kind])
    return {
        "n": n,
        "auc": area,
        "auc_interval_95": list(auc_interval(area, *n)),
        "divergence": float(divergence),
        "silhouette": silhouette(points.numpy(), kind),
    }


def evaluate(
    model: Network, store: ObservationCache, labels: Sequence[Preference], temperature: float = 1.0
) -> dict:
    """Compute the figures of one split.

    A margin of exactly 0 counts as wrong. `clean` is present if labels state which seed is better without
    noise; it counts only those labels. `apart` counts the labels among them whose volume errors differ by at
    least APART, if labels state the difference.
    Args: temperature: divisor of the margins for `calibration_error_scaled` (see fit_temperature).
    """
    scores = score_seeds(model, store, [seed for label in labels for seed in (label.winner, label.loser)])
    # [P], positive where the reward agrees with the label
    margin = margins(scores, labels)
    report = {
        "labels": rate(int((margin > 0).sum()), len(margin)),
        "log_loss": log_loss(margin),
        "calibration_error": calibration_error(margin),
        "calibration_error_scaled": calibration_error(margin / temperature),
        "mean_margin": float(margin.mean()),
    }
    # [P]: 1 where the label agrees with the noise-free order, -1 where it does not, 0 where that is not known
    sign = np.array(
        [0 if label.clean is None else (1 if label.clean == label.winner else -1) for label in labels]
    )
    if np.any(sign):
        report["clean"] = rate(int((margin * sign > 0).sum()), int((sign != 0).sum()))
        report["label_noise"] = float((sign < 0).sum() / (sign != 0).sum())
    differs = (sign != 0) & np.array([label.extra.get("gap", 0.0) >= APART for label in labels])
    if np.any(differs):
        report["apart"] = rate(int((margin * sign > 0)[differs].sum()), int(differs.sum()))
    return report


def ordered_by(filled: Mapping[int, float], labels: Sequence[Preference]) -> dict:
    """Compute how many pairs are ordered correctly by one handcrafted feature, of which larger is better.

    Args: filled: feature by seed.
    Returns: figures in the form of `evaluate`, for all pairs and for those that differ by at least APART.
    """
    known = [label for label in labels if label.clean is not None]
    # +1 or -1 times the difference: positive where the feature agrees with the noise-free order
    right = np.array([2 * (label.clean == label.winner) - 1 for label in known])
    right = right * np.array([filled[label.winner] - filled[label.loser] for label in known]) > 0
    differs = np.array([label.extra.get("gap", 0.0) >= APART for label in known], dtype=bool)
    counted = {"clean": np.ones_like(differs), "apart": differs}
    return {
        name: rate(int(right[rows].sum()), int(rows.sum())) for name, rows in counted.items() if rows.any()
    }


def collect_curves(history: Sequence[dict], best_epoch: int, context: dict) -> dict:
    """Collect one series per quantity over epochs, as JSON values.

    Args: context: stated under the figure: n, seed, preset and generator.
    """
    named = {name: [r[name] for r in history] for name in ("train_accuracy", "val_accuracy", "val_log_loss")}
    losses = {name: [r["loss"][name] for r in history] for name in history[0]["loss"]}
    epochs = [r["epoch"] + 1 for r in history]
    return {"epoch": epochs, **named, "loss": losses, "best_epoch": best_epoch + 1, "context": context}


def plot_curves(json_path: Path, png_path: Path) -> Path:
    """Plot a file of `collect_curves`: accuracies on the left, validation log loss and loss terms on the
    right.

    Loss terms are weighted as in training.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = json.loads(json_path.read_text())
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.plot(curves["epoch"], curves["train_accuracy"], label="training pairs (during training)")
    left.plot(curves["epoch"], curves["val_accuracy"], label="validation pairs")
    # The epoch whose weights the reward has
    left.axvline(curves["best_epoch"], color="0.6", linestyle=":", label="chosen epoch")
    left.set(xlabel="epoch", ylabel="pairs ordered as labelled (fraction)")
    left.legend()
    right.plot(curves["epoch"], curves["val_log_loss"], label="validation log loss")
    for name, values in curves["loss"].items():
        # The divergence is maximised, so the loss holds its negative. The axis is logarithmic.
        sign = -1 if name == "divergence" else 1
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
