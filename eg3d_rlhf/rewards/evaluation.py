"""Evaluate how well a reward orders held-out pairs: accuracy with an interval, calibration, and learning
curves.

Simulated labels contain errors on purpose. If labels state the order without these errors (the noise-free
order), accuracy is also computed against it.

Shapes: P pairs, N points, M entries of an embedding.
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

from eg3d_rlhf.core.statistics import rate_of_repeated_trials
from eg3d_rlhf.preferences.dataset import pair_of
from eg3d_rlhf.preferences.labels import Preference
from eg3d_rlhf.preferences.losses import cs_divergence, median_distance
from eg3d_rlhf.preferences.unpaired import UnpairedPreference
from eg3d_rlhf.rewards.cache import ObservationCache
from eg3d_rlhf.rewards.ensembles import RewardEnsemble
from eg3d_rlhf.rewards.networks import RewardNetwork
from training.distributed import SINGLE, Ranks

# What is enough to learn differs from what is needed to measure.
STEER_LABELS = 50  # labels with which steering of the bundled heads works (eg3d-rlhf steer)
# Pairs for training: the training share of 100 labels. With a reward of 100 labels, tuning of the bundled
# heads removed 72 % of the error at the back; with 500 and 2,000 labels 76 % (one training each).
MIN_TRAIN = 70
# Pairs for the choice of the epoch, and for the test. With 54 pairs, the exact binomial test distinguishes a
# true accuracy of 0.7 from chance with a power of 80 %.
MIN_TEST = 54
MIN_SHAPES = 27  # held-out labels of single shapes, for preferred shapes and for all other shapes
# Difference of the volume errors of two shapes, as a share of the volume of the back of the head. Every
# reward should order pairs correctly that differ by at least this much.
APART = 0.05


def too_few(counts: Mapping[str, int], fractions: Sequence[float]) -> str:
    """Return a warning if there are too few pairs to learn from, or to measure an accuracy, and '' otherwise.

    Both are different: a reward of few labels may be good, but its accuracy is not known then.

    Args:
        counts: number of different pairs of each of the splits train, val and test. A pair that was labelled
            several times counts once.
        fractions: shares of the splits train, val and test, in 0..1.
    """
    # In the order of `fractions`
    train_count, val_count, test_count = (counts[name] for name in ("train", "val", "test"))
    warnings = []
    if train_count < MIN_TRAIN:
        warnings.append(
            f"too few labels to learn a reward for tuning: {train_count} pairs for training, but about"
            f" {MIN_TRAIN} are needed ({_label_count(MIN_TRAIN, fractions[:1])} labels in all). Label more"
            f" pairs; {STEER_LABELS} labels are enough to steer the latents instead (eg3d-rlhf steer)."
        )
    if val_count < MIN_TEST or test_count < MIN_TEST:
        warnings.append(
            f"too few labels to measure the accuracy: {val_count} pairs for the choice of the epoch and"
            f" {test_count} for the test. From {MIN_TEST} of each on, about"
            f" {_label_count(MIN_TEST, fractions[1:])} labels in all, a true accuracy of 70 % is"
            " distinguished from chance with a power of 80 %. The reward may be good nevertheless, but the"
            " results below are not reliable."
        )
    return " ".join(warnings)


def _label_count(split_count: int, shares: Sequence[float]) -> int:
    """Return the number of labels for which every split with a share above 0 gets `split_count` pairs."""
    # rounded, because 70 / 0.7 is slightly above 100
    counts = (math.ceil(round(split_count / share, 6)) for share in shares if share)
    return max(counts, default=split_count)


def too_few_shapes(preferred_count: int, other_count: int) -> str:
    """Return a warning if there are too few held-out labels of single shapes, and '' otherwise.

    Args:
        preferred_count: number of different held-out shapes that are labelled as preferred.
        other_count: number of different held-out shapes with any other label.
    """
    if min(preferred_count, other_count) >= MIN_SHAPES:
        return ""
    return (
        f"too few labels: {preferred_count} preferred shapes and {other_count} other shapes are held out,"
        f" but {MIN_SHAPES} preferred and {MIN_SHAPES} other shapes are needed. Label more shapes."
    )


def auc_interval(
    measured_auc: float, preferred_count: int, other_count: int, confidence: float = 0.95
) -> tuple[float, float]:
    """Compute the confidence interval of an AUC (area under the ROC curve).

    This is method 5 of Newcombe (2006). The ends of the interval are the solutions A of |A - measured AUC| =
    z sqrt(V(A)), where z is the quantile of the normal distribution. V is the variance of Hanley and McNeil
    (1982), in which both counts inside the bracket are replaced by their mean:

        V(A) = A (1 - A) (1 + n ((1 - A) / (2 - A) + A / (1 + A))) / (preferred_count * other_count),
        n = (preferred_count + other_count) / 2 - 1.

    The interval lies inside 0..1, and it also exists for values of 0 and 1.

    Args:
        measured_auc: measured AUC, in 0..1.
        preferred_count: number of preferred shapes.
        other_count: number of all other shapes.
        confidence: level of the interval, in 0..1.
    Returns: the lower end and the upper end of the interval.
    """
    z = float(ndtri(0.5 + confidence / 2))
    n = (preferred_count + other_count) / 2 - 1

    # Squared distance from the measured AUC minus z^2 V. It is negative inside the interval and positive
    # outside, so that each end is a root.
    def excess(a: float) -> float:
        variance = a * (1 - a) * (1 + n * ((1 - a) / (2 - a) + a / (1 + a))) / (preferred_count * other_count)
        return (a - measured_auc) ** 2 - z * z * variance

    # For a value of exactly 0 or 1 the function is 0 there, which is a root but not the searched end.
    inner_auc = min(max(measured_auc, 1e-9), 1 - 1e-9)
    return (
        0.0 if measured_auc <= 0 else brentq(excess, 0.0, inner_auc),
        1.0 if measured_auc >= 1 else brentq(excess, inner_auc, 1.0),
    )


Network = RewardNetwork | RewardEnsemble


def score_seeds(
    model: Network, store: ObservationCache, seeds: Iterable[int], ranks: Ranks = SINGLE, batch: int = 32
) -> dict[int, float]:
    """Compute the reward of every seed from its cached observation.

    The batches are distributed over the ranks, and every rank gets all scores. The model must be in eval mode
    if it has dropout.

    Args:
        model: reward network or ensemble.
        store: cache that contains the observations of all seeds.
        seeds: seeds of the samples; repetitions are allowed.
        ranks: processes that share the work.
        batch: number of samples that are scored at once.
    Returns: score by seed, in the order of the first occurrences in `seeds`.
    """
    device = next(model.parameters()).device
    unique_seeds = list(dict.fromkeys(seeds))  # without repetitions, in the given order
    rank_scores: list[tuple[int, float]] = []
    with torch.no_grad():
        # Rank r scores the batches r, r + world, r + 2 world, ...
        for start in range(ranks.rank * batch, len(unique_seeds), ranks.world * batch):
            batch_seeds = unique_seeds[start : start + batch]
            batch_scores = model.score(store.take(batch_seeds, device)).tolist()
            rank_scores += zip(batch_seeds, batch_scores, strict=True)
    # Every rank needs all scores, for instance so that all ranks choose the same epoch.
    scores: dict[int, float] = {}
    for gathered_scores in ranks.gather(rank_scores):
        scores.update((int(seed), score) for seed, score in gathered_scores)
    # In the order of the seeds, which does not depend on the number of ranks.
    return {seed: scores[seed] for seed in unique_seeds}


def margins(scores: Mapping[int, float], labels: Sequence[Preference]) -> np.ndarray:
    """Compute the margin r(winner) - r(loser) for each label: float64 [P].

    Args:
        scores: reward r by seed.
        labels: P labelled pairs.
    """
    return np.array([scores[label.winner] - scores[label.loser] for label in labels], dtype=np.float64)


def log_loss(margin: np.ndarray) -> float:
    """Compute the mean of -log sigmoid(margin) over the margins [P] of labelled pairs, in nats."""
    # logaddexp(0, -m) = log(1 + exp(-m)), without overflow.
    return float(np.logaddexp(0, -margin).mean())


def calibration_error(margin: np.ndarray, bin_count: int = 10) -> float:
    """Compute the expected calibration error of p = sigmoid(margin), where p is the probability of the label.

    The error is sum_b n_b / n * |accuracy_b - confidence_b| (Guo et al. 2017, arXiv 1706.04599, eq. 3), where
    bin b contains n_b of the n pairs. The confidence of a pair is max(p, 1 - p). The result is in [0, 1], and
    0 is best.

    Args:
        margin: margins [P].
        bin_count: number of bins of equal width over the confidences 0.5..1.
    """
    confidence = expit(np.abs(margin))
    # A confidence of exactly 1 belongs to the last bin.
    bin_index = np.minimum(((confidence - 0.5) * 2 * bin_count).astype(int), bin_count - 1)
    error = 0.0
    for bin_number in range(bin_count):
        is_in_bin = bin_index == bin_number  # [P]
        # An empty bin has no accuracy and contributes nothing.
        if is_in_bin.any():
            error += is_in_bin.mean() * abs((margin[is_in_bin] > 0).mean() - confidence[is_in_bin].mean())
    return float(error)


def fit_temperature(margin: np.ndarray) -> float:
    """Return the temperature T in 0.01..100 that minimises the log loss of sigmoid(margin / T).

    This is temperature scaling (Guo et al. 2017, arXiv 1706.04599). The margins must belong to validation
    pairs, never to test pairs.

    Args: margin: margins [P] of validation pairs.
    """
    # The search is over log T, in which doubling and halving are steps of equal size.
    optimum = minimize_scalar(
        lambda log_t: log_loss(margin * math.exp(-log_t)),
        bounds=(math.log(0.01), math.log(100)),
        method="bounded",
    )
    return float(math.exp(optimum.x))


def rate(is_correct: np.ndarray, labels: Sequence[Preference]) -> dict:
    """Return the accuracy over labels with its 95 % interval, as JSON values.

    The interval counts pairs. Labels that repeat a pair are no new evidence, and labels of one annotator are
    correlated, see `rate_of_repeated_trials`. If every pair has one label of one annotator, it is Wilson's.

    Args:
        is_correct: True for each label in whose order the reward scores the pair, [P].
        labels: the labels.
    Returns: dict with "correct" and "n" (numbers of labels), "pairs" (number of different pairs), "accuracy"
        (None if `n` is 0) and "interval_95" (lower and upper end).
    """
    pairs = [pair_of(label) for label in labels]
    accuracy = None
    ends = [0.0, 1.0]  # no information
    if labels:
        accuracy, *ends = rate_of_repeated_trials(is_correct, pairs, [label.annotator for label in labels])
    return {
        "correct": int(np.sum(is_correct)),
        "n": len(labels),
        "pairs": len(set(pairs)),
        "accuracy": accuracy,
        "interval_95": ends,
    }


def auc(preferred_scores: Sequence[float], other_scores: Sequence[float]) -> float:
    """Compute the AUC, the area under the ROC curve, of preferred shapes against all other shapes.

    The AUC is the probability that a preferred shape has a higher score than a shape that is not preferred,
    where equal scores count one half. A random score has an AUC of 0.5.

    Args:
        preferred_scores: scores of the preferred shapes.
        other_scores: scores of all other shapes.
    Raises: ValueError if there is no preferred shape or no other shape.
    """
    if not len(preferred_scores) or not len(other_scores):
        raise ValueError(
            "auc: expected scores of at least one preferred and one other shape, got"
            f" {len(preferred_scores)} and {len(other_scores)} scores. Label more shapes."
        )
    # Mann-Whitney U statistic: the rank sum of the preferred shapes minus its smallest possible value
    # n (n + 1) / 2. Equal scores get their mean rank.
    ranks = rankdata([*preferred_scores, *other_scores])
    u_statistic = (
        ranks[: len(preferred_scores)].sum() - len(preferred_scores) * (len(preferred_scores) + 1) / 2
    )
    return float(u_statistic / (len(preferred_scores) * len(other_scores)))


def silhouette(points: np.ndarray, is_first_set: np.ndarray) -> float:
    """Compute the mean silhouette of two sets of points, in -1..1: 1 if they are well separated.

    The silhouette of a point is (b - a) / max(a, b) (Rousseeuw 1987), where a is its mean distance to the
    other points of its own set, and b its mean distance to the points of the other set.

    Args:
        points: positions [N, M].
        is_first_set: mask [N] of the points of the first set; each set needs at least two points.
    """
    distances = cdist(points, points)
    # [2, N]: sums of the distances to the points of the second set and of the first set
    distance_sums = np.stack([distances[:, ~is_first_set].sum(1), distances[:, is_first_set].sum(1)])
    set_index = is_first_set.astype(int)
    set_sizes = np.array([(~is_first_set).sum(), is_first_set.sum()])
    point_index = np.arange(len(is_first_set))
    # The sum contains the distance of the point to itself, which is 0, so the divisor is smaller by one.
    a = distance_sums[set_index, point_index] / (set_sizes[set_index] - 1)
    b = distance_sums[1 - set_index, point_index] / set_sizes[1 - set_index]
    # If all distances are 0, the tiny divisor gives a silhouette of 0.
    return float(((b - a) / np.maximum(np.maximum(a, b), np.finfo(float).tiny)).mean())


def evaluate_unpaired(
    model: Network, embed: RewardNetwork, store: ObservationCache, labels: Sequence[UnpairedPreference]
) -> dict:
    """Evaluate a reward on labels of single shapes, each of which is preferred or not.

    The AUC states how well the scores separate preferred shapes from all other shapes. The Cauchy-Schwarz
    divergence and the silhouette state how well the embeddings, normalised to length 1, separate them.

    Args:
        model: reward network or ensemble that gives the scores.
        embed: network that gives the embedding, for example the first member of an ensemble.
        store: cache that contains the observations of all seeds.
        labels: labels of single shapes; at least two must be preferred, and at least two must not.
    Returns: dict of JSON values. "n" contains the numbers of preferred and of other shapes. The other entries
        are "auc", "auc_interval_95", "divergence" and "silhouette".
    """
    seeds = [label.seed for label in labels]
    # `preferred` may also be None, which counts as not preferred.
    is_preferred = np.array([label.preferred is True for label in labels])
    scores = score_seeds(model, store, seeds)
    device = next(embed.parameters()).device
    with torch.no_grad():
        # Batches of 32, since observations of many shapes do not fit into memory at once. Each result is
        # [32, M].
        embeddings = [
            embed.embed(store.take(seeds[i : i + 32], device)).cpu().double()
            for i in range(0, len(seeds), 32)
        ]
    unit_embeddings = torch.nn.functional.normalize(torch.cat(embeddings))
    divergence = cs_divergence(
        unit_embeddings[is_preferred], unit_embeddings[~is_preferred], median_distance(unit_embeddings), "U"
    )
    seed_scores = np.array([scores[seed] for seed in seeds])
    # Numbers of different preferred shapes and of different other shapes. Repeated labels of one shape are no
    # new evidence, so they do not narrow the interval.
    shape_counts = [
        len({label.seed for label in labels if label.preferred is True}),
        len({label.seed for label in labels if label.preferred is not True}),
    ]
    measured_auc = auc(seed_scores[is_preferred], seed_scores[~is_preferred])
    return {
        "n": shape_counts,
        "auc": measured_auc,
        "auc_interval_95": list(auc_interval(measured_auc, *shape_counts)),
        "divergence": float(divergence),
        "silhouette": silhouette(unit_embeddings.numpy(), is_preferred),
    }


def _select(
    is_correct: np.ndarray, labels: Sequence[Preference], mask: np.ndarray
) -> tuple[np.ndarray, list[Preference]]:
    """Return the outcomes [P] and the labels that a mask [P] selects."""
    return is_correct[mask], [label for label, is_selected in zip(labels, mask, strict=True) if is_selected]


def evaluate(
    model: Network, store: ObservationCache, labels: Sequence[Preference], temperature: float = 1.0
) -> dict:
    """Evaluate a reward on the labelled pairs of one split.

    A pair is correct if the winner has the higher score; equal scores count as wrong.

    Args:
        model: reward network or ensemble.
        store: cache that contains the observations of all seeds.
        labels: P labelled pairs.
        temperature: divisor of the margins for "calibration_error_scaled", see `fit_temperature`.
    Returns: dict of JSON values. It always has the entries "labels" (the accuracy), "log_loss",
        "calibration_error", "calibration_error_scaled" and "mean_margin". If some labels state the noise-free
        order, two entries are added for these labels: "clean" is the accuracy against this order, and
        "label_noise" is the share of the labels that contradict it. If some of these labels also state that
        the volume errors of the pair differ by at least APART, "apart" is the accuracy over these pairs.
    """
    scores = score_seeds(model, store, [seed for label in labels for seed in (label.winner, label.loser)])
    # [P], positive where the reward agrees with the label
    pair_margins = margins(scores, labels)
    report = {
        "labels": rate(pair_margins > 0, labels),
        "log_loss": log_loss(pair_margins),
        "calibration_error": calibration_error(pair_margins),
        "calibration_error_scaled": calibration_error(pair_margins / temperature),
        "mean_margin": float(pair_margins.mean()),
    }
    # [P]: 1 where the label agrees with the noise-free order, -1 where it contradicts this order, 0 where the
    # label does not state it
    agreement = np.zeros(len(labels), dtype=int)
    for i, label in enumerate(labels):
        if label.clean is not None:
            agreement[i] = 1 if label.clean == label.winner else -1
    if np.any(agreement):
        # margin * agreement is positive where the reward agrees with the noise-free order.
        report["clean"] = rate(*_select(pair_margins * agreement > 0, labels, agreement != 0))
        report["label_noise"] = float((agreement < 0).sum() / (agreement != 0).sum())
    # [P]; "gap" is the difference of the volume errors
    differs_clearly = (agreement != 0) & np.array([label.extra.get("gap", 0.0) >= APART for label in labels])
    if np.any(differs_clearly):
        report["apart"] = rate(*_select(pair_margins * agreement > 0, labels, differs_clearly))
    return report


def evaluate_feature(feature: Mapping[int, float], labels: Sequence[Preference]) -> dict:
    """Compute the share of pairs that a handcrafted feature orders correctly; larger values count as better.

    Only labels that state the noise-free order are used, and the feature is compared with this order.

    Args:
        feature: value of the feature by seed.
        labels: labelled pairs; their seeds are looked up in `feature`.
    Returns: dict of accuracies, each a result of `rate`. "clean" is the accuracy over all pairs, and "apart"
        the accuracy over the pairs whose volume errors differ by at least APART. An accuracy without any pair
        is left out.
    """
    clean_labels = [label for label in labels if label.clean is not None]
    # +1 where the label agrees with the noise-free order, -1 where it contradicts this order
    agreement = np.array([2 * (label.clean == label.winner) - 1 for label in clean_labels])
    feature_differences = np.array([feature[label.winner] - feature[label.loser] for label in clean_labels])
    # True where the feature agrees with the noise-free order
    is_correct = agreement * feature_differences > 0
    differs_clearly = np.array([label.extra.get("gap", 0.0) >= APART for label in clean_labels], dtype=bool)
    pair_masks = {"clean": np.ones_like(differs_clearly), "apart": differs_clearly}
    return {
        accuracy_name: rate(*_select(is_correct, clean_labels, pair_mask))
        for accuracy_name, pair_mask in pair_masks.items()
        if pair_mask.any()
    }


def collect_curves(history: Sequence[dict], best_epoch: int, context: dict) -> dict:
    """Collect the learning curves of a training as JSON values, one list over epochs per quantity.

    Args:
        history: records of the epochs, in order: dicts with "epoch", "train_accuracy", "val_accuracy",
            "val_log_loss" and "loss" (value by name of the loss term).
        best_epoch: index of the chosen epoch, from 0.
        context: facts by name that are printed above the plot, for example the number of pairs and the seed.
    Returns: dict with "epoch" (from 1), one entry per accuracy and loss, "best_epoch" (from 1) and "context".
    """
    metrics = {
        metric_name: [epoch_record[metric_name] for epoch_record in history]
        for metric_name in ("train_accuracy", "val_accuracy", "val_log_loss")
    }
    losses = {
        metric_name: [epoch_record["loss"][metric_name] for epoch_record in history]
        for metric_name in history[0]["loss"]
    }
    # Plots count epochs from 1.
    epochs = [epoch_record["epoch"] + 1 for epoch_record in history]
    return {"epoch": epochs, **metrics, "loss": losses, "best_epoch": best_epoch + 1, "context": context}


def plot_curves(json_path: Path, png_path: Path) -> Path:
    """Plot learning curves as a PNG file: accuracies on the left, losses on the right.

    The losses are the validation log loss and the terms of the training loss, multiplied by their weights.

    Args:
        json_path: file with the result of `collect_curves`.
        png_path: file to write.
    Returns: `png_path`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = json.loads(json_path.read_text())
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    accuracy_axes, loss_axes = figure.subplots(1, 2)
    accuracy_axes.plot(curves["epoch"], curves["train_accuracy"], label="training pairs (during training)")
    accuracy_axes.plot(curves["epoch"], curves["val_accuracy"], label="validation pairs")
    # The epoch whose weights the reward has
    accuracy_axes.axvline(curves["best_epoch"], color="0.6", linestyle=":", label="chosen epoch")
    accuracy_axes.set(xlabel="epoch", ylabel="pairs ordered as labelled (fraction)")
    accuracy_axes.legend()
    loss_axes.plot(curves["epoch"], curves["val_log_loss"], label="validation log loss")
    for term_name, term_values in curves["loss"].items():
        # The divergence is maximised, so the loss holds its negative. The axis is logarithmic.
        sign = -1 if term_name == "divergence" else 1
        loss_axes.plot(
            curves["epoch"],
            [sign * term_value for term_value in term_values],
            label=f"training {term_name}, weighted",
            linewidth=1,
        )
    loss_axes.set(xlabel="epoch", ylabel="loss (nats)", yscale="log")
    loss_axes.legend(fontsize=8)
    figure.suptitle(
        ", ".join(f"{fact_name} {fact}" for fact_name, fact in curves["context"].items()), fontsize=9
    )
    figure.savefig(png_path, dpi=120)
    return png_path
