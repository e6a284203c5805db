"""How well a reward orders held-out pairs: accuracy with an interval, calibration, and the same against a noise-free order.

Shape letters: P pairs.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from scipy.special import expit

from eg3d_rlhf.metrics.statistics import wilson_interval
from eg3d_rlhf.preferences.labels import Preference
from eg3d_rlhf.reward.files import Reward
from eg3d_rlhf.reward.slabs import SlabStore


def score_seeds(model: Reward, store: SlabStore, seeds: Sequence[int], batch: int = 32) -> dict[int, float]:
    """Reward of every seed. Pass a model in eval mode where it has dropout."""
    device = next(model.parameters()).device
    unique = list(dict.fromkeys(seeds))
    scores: dict[int, float] = {}
    with torch.no_grad():
        for start in range(0, len(unique), batch):
            part = unique[start : start + batch]
            scores.update(zip(part, model.score(store.take(part, device)).tolist(), strict=True))
    return scores


def margins(scores: Mapping[int, float], labels: Sequence[Preference]) -> np.ndarray:
    """r(winner) - r(loser) per label, float64 [P]. Swapping winner and loser negates it."""
    return np.array([scores[label.winner] - scores[label.loser] for label in labels], dtype=np.float64)


def log_loss(margin: np.ndarray) -> float:
    """Mean of -log sigmoid(margin)."""
    return float(np.logaddexp(0, -margin).mean())


def calibration_error(margin: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error of p = sigmoid(margin), Guo 2017 (arXiv 1706.04599), eq. 3: sum_b n_b / n * |accuracy_b - confidence_b|.

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
    """Divisor T of margins that minimises the log loss of sigmoid(margin / T), within 0.01 ... 100. Fit on validation pairs only."""
    found = minimize_scalar(lambda log_t: log_loss(margin * math.exp(-log_t)), bounds=(math.log(0.01), math.log(100)), method="bounded")
    return float(math.exp(found.x))


def rate(correct: int, n: int) -> dict:
    """A proportion with its Wilson 95 % interval, as plain JSON values."""
    low, high = wilson_interval(correct, n)
    return {"correct": correct, "n": n, "accuracy": correct / n if n else None, "interval_95": [float(low), float(high)]}


def evaluate(model: Reward, store: SlabStore, labels: Sequence[Preference], temperature: float = 1.0) -> dict:
    """Figures of one split.

    A margin of exactly 0 counts as wrong. `clean` is present when labels say which seed is better without noise; it counts those alone.
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
    sign = np.array([0 if label.clean is None else (1 if label.clean == label.winner else -1) for label in labels])  # [P]
    if np.any(sign):
        report["clean"] = rate(int((margin * sign > 0).sum()), int((sign != 0).sum()))
        report["label_noise"] = float((sign < 0).sum() / (sign != 0).sum())
    return report
