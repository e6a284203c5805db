"""How sets of features lie: how far their items are apart, whether one set covers another, whether two sets
mingle.

- Diversity: mean pairwise distance, so that a collapse shows.
- Improved precision and recall (Kynkäänniemi et al. 2019): each set's manifold is the union of balls about
  its items, as wide as the distance to the item's k-th neighbour in the same set (eq. 1). Precision is the
  share of fakes inside the manifold of the reals, recall the share of reals inside that of the fakes (eq. 2).
  Both depend on the sizes of the sets, so they compare only under the same ones.
- Separability: nearest neighbours of pooled features, with a permutation test that keeps pairs.

Distances come from one matrix product (scipy's cdist takes eight times as long at 2048 features).
Letters: N items, fakes or pairs, M reals, F features, K neighbours, B permutations.
"""

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import stdtrit

from eg3d_rlhf.core.statistics import Interval, MeanInterval, wilson_interval

METHOD = "95 % jackknife t interval over items"
TEST = "permutation test that swaps the two networks within each latent"
MANIFOLD_NEIGHBOURS = 3  # k of precision and recall, the paper's
# of separability
NEIGHBOURS = 10
PERMUTATIONS = 2000
_BLOCK_CELLS = 4_000_000  # distances held at once, 32 MB
_BLOCK_LABELS = 8_000_000  # compared labels held at once


def pairwise_distances(x: ArrayLike) -> np.ndarray:
    """Euclidean distances [N, N] of x [N, F] over sqrt(F): the root mean square difference, whatever the
    size.
    """
    x = np.asarray(x, dtype=np.float64)
    assert x.ndim == 2 and len(x) >= 3
    centred = x - x.mean(axis=0)
    squares = (centred**2).sum(axis=1)
    squared = np.maximum(squares[:, None] + squares - 2 * centred @ centred.T, 0.0) / x.shape[1]
    np.fill_diagonal(squared, 0.0)
    return np.sqrt(squared)


def mean_pairwise(distances: np.ndarray, confidence: float = 0.95) -> MeanInterval:
    """Mean over the pairs of different items of distances [N, N], with its jackknife interval (Arvesen 1969,
    for U-statistics).
    """
    return _interval(*_leave_one_out(distances), confidence)


def pairwise_ratio(before: np.ndarray, after: np.ndarray, confidence: float = 0.95) -> MeanInterval:
    """Mean pairwise distance after over before, of the same items: [N, N] each. The jackknife is taken on its
    logarithm.

    Raises: ValueError for items before that are all equal.
    """
    assert before.shape == after.shape
    first, first_without = _leave_one_out(before)
    second, second_without = _leave_one_out(after)
    if min(first, first_without.min()) <= 0:
        raise ValueError(
            "pairwise_ratio: expected items that differ before, got equal ones. A ratio to nothing says"
            " nothing."
        )
    if min(second, second_without.min()) <= 0:
        return MeanInterval(second / first, 0.0, second / first)  # all items are equal after
    found = _interval(np.log(second / first), np.log(second_without / first_without), confidence)
    return MeanInterval(*(float(np.exp(value)) for value in found))


def _leave_one_out(distances: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean over pairs, and the same without each item [N]."""
    n = len(distances)
    sums = distances.sum(axis=1)
    total = sums.sum()
    return float(total / (n * (n - 1))), (total - 2 * sums) / ((n - 1) * (n - 2))


def _interval(whole: float, without: np.ndarray, confidence: float) -> MeanInterval:
    n = len(without)
    error = np.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum())
    half = float(stdtrit(n - 1, 0.5 + confidence / 2) * error)
    return MeanInterval(float(whole), float(whole) - half, float(whole) + half)


@dataclass(frozen=True, kw_only=True, eq=False)
class PrecisionRecall:
    """Both shares, 0..1, with the items behind them."""

    precision: float
    recall: float
    k: int
    fake_inside: np.ndarray  # [N] bool: fakes inside the manifold of the reals
    real_inside: np.ndarray  # [M] bool: reals inside the manifold of the fakes

    def intervals(self, confidence: float = 0.95) -> dict[str, Interval]:
        """Wilson intervals of 'precision' and 'recall' for the two manifolds as they are: other items would
        also move the balls.
        """
        sets = {"precision": self.fake_inside, "recall": self.real_inside}
        return {
            name: wilson_interval(int(inside.sum()), len(inside), confidence) for name, inside in sets.items()
        }


def precision_recall(
    features_fake: np.ndarray, features_real: np.ndarray, k: int = MANIFOLD_NEIGHBOURS
) -> PrecisionRecall:
    """Improved precision and recall of features [N, F] and [M, F] under the Euclidean distance.

    An item is no neighbour of itself, and a point on the edge of a ball is inside. Memory is bounded; time
    grows as (N + M)^2 F.
    Raises: ValueError for values that are not finite.
    """
    fake, real = (np.asarray(part, dtype=np.float64) for part in (features_fake, features_real))
    assert fake.shape[1] == real.shape[1] and 1 <= k < min(len(fake), len(real))
    if not (np.isfinite(fake).all() and np.isfinite(real).all()):
        raise ValueError(
            "precision_recall: expected finite features, got NaN or infinity. Look for NaN images."
        )
    centre = real.mean(axis=0)  # distances stay, rounding shrinks
    fake = fake - centre
    real = real - centre
    fake_inside = _inside(fake, real, k)
    real_inside = _inside(real, fake, k)
    return PrecisionRecall(
        precision=float(fake_inside.mean()),
        recall=float(real_inside.mean()),
        k=k,
        fake_inside=fake_inside,
        real_inside=real_inside,
    )


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[A, B] of points [A, F] and [B, F]."""
    return np.maximum((a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * a @ b.T, 0.0)


def neighbour_radii(x: np.ndarray, k: int = MANIFOLD_NEIGHBOURS) -> np.ndarray:
    """Squared distance [N] of each item of x [N, F] to its k-th neighbour among the others."""
    radii = np.empty(len(x))
    step = max(1, _BLOCK_CELLS // len(x))
    for start in range(0, len(x), step):
        rows = np.arange(start, min(start + step, len(x)))
        distances = _squared_distances(x[rows], x)
        distances[np.arange(len(rows)), rows] = np.inf
        radii[rows] = np.partition(distances, k - 1, axis=1)[:, k - 1]
    return radii


def _inside(points: np.ndarray, manifold: np.ndarray, k: int) -> np.ndarray:
    """Whether each point [A, F] lies in a ball of the manifold [B, F]; [A] bool."""
    radii = neighbour_radii(manifold, k)
    found = np.zeros(len(points), dtype=bool)
    step = max(1, _BLOCK_CELLS // len(manifold))
    slack = 1e-12 * float((manifold**2).sum(axis=1).max(initial=0.0))  # rounding of the expanded square
    for start in range(0, len(points), step):
        rows = slice(start, start + step)
        found[rows] = (_squared_distances(points[rows], manifold) <= radii + slack).any(axis=1)
    return found


@dataclass(frozen=True, kw_only=True, eq=False)
class Separability:
    """Share of neighbours from the own set, and how often chance gives as much."""

    share: float  # 0..1; 0.5 expected where the sets are alike
    p: float  # (1 + permutations with at least this share) / (1 + permutations)
    chance: np.ndarray  # [B] shares under permutations
    k: int
    n: int  # pairs

    def to_dict(self) -> dict:
        return {**asdict(self), "chance": self.chance.tolist()}


def neighbours(pooled: np.ndarray, k: int) -> np.ndarray:
    """Indices [2N, K] of each item's nearest others; items i and i + N are partners and never count as each
    other's neighbours.

    Args: pooled [2N, F]. Partners share a latent: with them, nearness would tell of the latent and the share
    expected by chance would not be one half.
    """
    n = len(pooled) // 2
    centred = pooled - pooled.mean(axis=0)
    squares = (centred**2).sum(axis=1)
    distance = squares[:, None] + squares - 2 * centred @ centred.T
    rows = np.arange(2 * n)
    distance[rows, rows] = distance[rows, (rows + n) % (2 * n)] = np.inf
    return np.argsort(distance, axis=1, kind="stable")[:, :k]


def paired_separability(
    first: np.ndarray,
    second: np.ndarray,
    k: int = NEIGHBOURS,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> Separability:
    """Mean share of an item's K nearest neighbours (Euclidean, both sets pooled) that are of its own set
    (Schilling 1986).

    Under no difference the two items of a latent can be swapped, so the null distribution swaps at random
    within pairs; the p-value is exact at any N (Phipson and Smyth 2010).
    Args: first, second [N, F]: item i of both belongs to the same latent; N > K.
    """
    a = np.asarray(first, dtype=np.float64)
    b = np.asarray(second, dtype=np.float64)
    n = len(a)
    assert a.shape == b.shape and 1 <= k < n and np.isfinite([a, b]).all()
    near = neighbours(np.concatenate([a, b]), k)
    swaps = np.random.default_rng(seed).integers(0, 2, size=(permutations + 1, n), dtype=np.int8)
    swaps[0] = 0  # as observed
    labels = np.concatenate([swaps, 1 - swaps], axis=1)  # [B + 1, 2N]
    step = max(1, _BLOCK_LABELS // near.size)
    shares = np.concatenate(
        [
            (part[:, near] == part[:, :, None]).mean(axis=(1, 2))
            for part in np.array_split(labels, -(-len(labels) // step))
        ]
    )
    share = float(shares[0])
    chance = shares[1:]
    p = (1 + int((chance >= share - 1e-12).sum())) / (1 + permutations)
    return Separability(share=share, p=p, chance=chance, k=k, n=n)
