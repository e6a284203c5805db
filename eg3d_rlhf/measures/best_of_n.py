"""The best of n samples by one measure, valued by another: exact expectations, their intervals, and the law that they follow.

Choosing the best of n moves the samples by KL = log n - (n - 1) / n nats. With d = sqrt(KL) the gain by the other measure follows
d (alpha - beta d), which peaks at d* = alpha / (2 beta) (Gao et al. 2022, arXiv 2210.10760).

Letters: N samples, T numbers n to choose among, B resamples.
"""

from collections.abc import Sequence

import numpy as np
from scipy.optimize import brentq


def chances(total: int, n: int) -> np.ndarray:
    """Chance of the i-th of `total` in ascending order to be the best of n drawn without replacement: C(i - 1, n - 1) / C(N, n), [N]."""
    i = np.arange(total, 1, -1)
    falling = np.cumprod(np.clip((i - n) / (i - 1), 0, None))  # from the i-th to the one below it
    return n / total * np.concatenate([[1.0], falling])[::-1]


def best_of(reward: np.ndarray, judge: np.ndarray, numbers: Sequence[int]) -> np.ndarray:
    """Expected judge's value of the best of n by the reward, for every n: exact over all subsets of the latents.

    Args: reward, judge [N]; numbers: each 1 to N. Returns: [T]; n = 1 gives the judge's mean, n = N the value of the top latent.
    """
    ranked = by_rank(reward, judge)[1]
    return np.array([chances(len(ranked), n) @ ranked for n in numbers])


def by_rank(reward: np.ndarray, judge: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Latents in ascending order of reward [N], and their judge's values in that order, those of equal rewards averaged."""
    _, place, count = np.unique(reward, return_inverse=True, return_counts=True)
    return np.argsort(reward, kind="stable"), np.repeat(np.bincount(place, judge) / count, count)


def divergence_of(numbers: Sequence[int]) -> np.ndarray:
    """KL divergence of the best of n from one sample, nats."""
    n = np.asarray(numbers, dtype=np.float64)
    return np.log(n) - (n - 1) / n


def fit(distance: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """Least squares of gain = d (alpha - beta d): distance [T], gain [..., T] -> alpha and beta, [..., 2]."""
    return gain @ np.linalg.pinv(np.stack([distance, -(distance**2)], axis=1)).T


def peak(alpha: np.ndarray, beta: np.ndarray) -> np.ndarray:
    """d* = alpha / (2 beta), at least 0; infinite where the fit never falls."""
    return np.where(beta > 0, np.maximum(alpha, 0) / np.where(beta > 0, 2 * beta, 1), np.inf)


def number_at(distance: float) -> float:
    """The n whose best lies at this distance sqrt(KL)."""
    x = brentq(lambda log_n: log_n - 1 + np.exp(-log_n) - distance**2, 0, distance**2 + 2) if distance > 0 else 0.0
    return float(np.exp(x))


def resampled(reward: np.ndarray, judge: np.ndarray, numbers: Sequence[int], counts: np.ndarray) -> np.ndarray:
    """`best_of` over resamples of the latents: counts [B, N], how often each latent was drawn -> [B, T]."""
    order, ranked = by_rank(reward, judge)
    table = np.stack([chances(len(ranked), n) for n in numbers])  # [T, N]
    return np.stack([table @ np.repeat(ranked, drawn[order]) for drawn in counts])
