"""Improved precision and recall of two sets of features (Kynkäänniemi et al. 2019): are fakes like reals, and are all reals reached?

Each set's manifold is the union of balls about its items, as wide as the distance to the item's k-th neighbour in the same set (eq. 1).
Precision: share of fakes inside the manifold of the reals; recall: share of reals inside the manifold of the fakes (eq. 2). Both depend on
the sizes of the sets and on the features, so they compare only under the same ones.
Shape letters: N fakes, M reals, F features.
"""

from dataclasses import dataclass

import numpy as np

from eg3d_rlhf.metrics.statistics import Interval, wilson_interval

NEIGHBOURS = 3  # k of the paper
_BLOCK_CELLS = 4_000_000  # distances held at once, 32 MB


@dataclass(frozen=True, kw_only=True, eq=False)
class PrecisionRecall:
    """Both shares, 0..1, with the items behind them."""

    precision: float
    recall: float
    k: int
    fake_inside: np.ndarray  # [N] bool: fakes inside the manifold of the reals
    real_inside: np.ndarray  # [M] bool: reals inside the manifold of the fakes

    def intervals(self, confidence: float = 0.95) -> dict[str, Interval]:
        """Wilson intervals of 'precision' and 'recall' for the two manifolds as they are: other items would also move the balls."""
        sets = {"precision": self.fake_inside, "recall": self.real_inside}
        return {name: wilson_interval(int(inside.sum()), len(inside), confidence) for name, inside in sets.items()}


def precision_recall(features_fake: np.ndarray, features_real: np.ndarray, k: int = NEIGHBOURS) -> PrecisionRecall:
    """Improved precision and recall of features [N, F] and [M, F] under the Euclidean distance.

    An item is no neighbour of itself, and a point on the edge of a ball is inside. Memory is bounded; time grows as (N + M)^2 F.
    Raises: ValueError on shapes, values that are not finite, or sets of no more than k items.
    """
    fake, real = (np.asarray(part, dtype=np.float64) for part in (features_fake, features_real))
    if fake.ndim != 2 or real.ndim != 2 or fake.shape[1] != real.shape[1]:
        raise ValueError(f"precision_recall: expected features [N, F] and [M, F], got {fake.shape} and {real.shape}. Use one network.")
    if k < 1 or min(len(fake), len(real)) <= k:
        raise ValueError(f"precision_recall: expected k >= 1 and more than k = {k} items, got {len(fake)} and {len(real)}. Add images.")
    if not (np.isfinite(fake).all() and np.isfinite(real).all()):
        raise ValueError("precision_recall: expected finite features, got NaN or infinity. Look for NaN images.")
    centre = real.mean(axis=0)  # distances stay, rounding shrinks
    fake, real = fake - centre, real - centre
    fake_inside, real_inside = _inside(fake, real, k), _inside(real, fake, k)
    return PrecisionRecall(
        precision=float(fake_inside.mean()), recall=float(real_inside.mean()), k=k, fake_inside=fake_inside, real_inside=real_inside
    )


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[A, B] of points [A, F] and [B, F]."""
    return np.maximum((a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * a @ b.T, 0.0)


def neighbour_radii(x: np.ndarray, k: int = NEIGHBOURS) -> np.ndarray:
    """Squared distance [N] of each item of x [N, F] to its k-th neighbour among the others."""
    radii, step = np.empty(len(x)), max(1, _BLOCK_CELLS // len(x))
    for start in range(0, len(x), step):
        rows = np.arange(start, min(start + step, len(x)))
        distances = _squared_distances(x[rows], x)
        distances[np.arange(len(rows)), rows] = np.inf
        radii[rows] = np.partition(distances, k - 1, axis=1)[:, k - 1]
    return radii


def _inside(points: np.ndarray, manifold: np.ndarray, k: int) -> np.ndarray:
    """Whether each point [A, F] lies in a ball of the manifold [B, F]; [A] bool."""
    radii, found, step = neighbour_radii(manifold, k), np.zeros(len(points), dtype=bool), max(1, _BLOCK_CELLS // len(manifold))
    slack = 1e-12 * float((manifold**2).sum(axis=1).max(initial=0.0))  # rounding of the expanded square
    for start in range(0, len(points), step):
        rows = slice(start, start + step)
        found[rows] = (_squared_distances(points[rows], manifold) <= radii + slack).any(axis=1)
    return found
