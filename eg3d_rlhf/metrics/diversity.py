"""How much the items of a set differ from each other, so that a collapse shows.

Letters: N items, F features.
"""

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import stdtrit

from eg3d_rlhf.metrics.statistics import MeanInterval

METHOD = "95 % jackknife t interval over items"


def pairwise_distances(x: ArrayLike) -> np.ndarray:
    """Euclidean distances [N, N] of x [N, F] over sqrt(F): the root mean square difference, whatever the size. Raises: ValueError."""
    x = np.asarray(x, dtype=np.float64)
    if x.ndim != 2 or len(x) < 3 or not np.isfinite(x).all():
        raise ValueError(f"pairwise_distances: expected finite items [N, F], N >= 3, got {x.shape}. Add items.")
    centred = x - x.mean(axis=0)
    squares = (centred**2).sum(axis=1)
    squared = np.maximum(squares[:, None] + squares - 2 * centred @ centred.T, 0.0) / x.shape[1]
    np.fill_diagonal(squared, 0.0)
    return np.sqrt(squared)


def mean_pairwise(distances: np.ndarray, confidence: float = 0.95) -> MeanInterval:
    """Mean over the pairs of different items of distances [N, N], with its jackknife interval (Arvesen 1969, for U-statistics)."""
    whole, without = _leave_one_out(distances)
    return _interval(whole, without, confidence)


def pairwise_ratio(before: np.ndarray, after: np.ndarray, confidence: float = 0.95) -> MeanInterval:
    """Mean pairwise distance after over before, of the same items: [N, N] each. The jackknife is taken on its logarithm.

    Raises: ValueError for other sizes, or items before that are all equal.
    """
    if before.shape != after.shape:
        raise ValueError(f"pairwise_ratio: expected as many items after as before, got {before.shape} and {after.shape}. Pair them.")
    (first, first_without), (second, second_without) = _leave_one_out(before), _leave_one_out(after)
    if min(first, first_without.min()) <= 0:
        raise ValueError("pairwise_ratio: expected items that differ before, got equal ones. A ratio to nothing says nothing.")
    if min(second, second_without.min()) <= 0:
        return MeanInterval(second / first, 0.0, second / first)  # all items are equal after
    found = _interval(np.log(second / first), np.log(second_without / first_without), confidence)
    return MeanInterval(*(float(np.exp(value)) for value in found))


def _leave_one_out(distances: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean over pairs, and the same without each item [N]."""
    n, sums = len(distances), distances.sum(axis=1)
    total = sums.sum()
    return float(total / (n * (n - 1))), (total - 2 * sums) / ((n - 1) * (n - 2))


def _interval(whole: float, without: np.ndarray, confidence: float) -> MeanInterval:
    n = len(without)
    error = np.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum())
    half = float(stdtrit(n - 1, 0.5 + confidence / 2) * error)
    return MeanInterval(float(whole), float(whole) - half, float(whole) + half)
