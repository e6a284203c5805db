"""Compare sets of features: the diversity of one set, and the coverage and the separability of two sets.

- Diversity: mean pairwise distance. It falls if a generator's samples collapse to a few modes.
- Improved precision and recall (Kynkäänniemi et al. 2019): the manifold of a set is the union of balls around
  its items. The radius of a ball is the distance to the item's k-th neighbour in the same set (eq. 1).
  Precision is the share of fakes inside the manifold of the reals. Recall is the share of reals inside the
  manifold of the fakes (eq. 2). Both depend on the sizes of the sets, so compare only values of equal sizes.
- Separability: nearest neighbours of pooled features, with a permutation test that keeps pairs together.

Distances come from one matrix product (scipy's cdist takes eight times as long at 2048 features).
Letters: N items, fakes or pairs, M reals, F features, K neighbours, B permutations, A points, and in helpers
B items of the other set.
"""

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import stdtrit

from eg3d_rlhf.core.statistics import Interval, MeanInterval, wilson_interval

METHOD = "95 % jackknife t interval over items"
TEST = "permutation test that swaps the two networks within each latent"
MANIFOLD_NEIGHBOURS = 3  # k of precision and recall, as in the paper
NEIGHBOURS = 10  # k of the separability
PERMUTATIONS = 2000  # of the test of separability
_BLOCK_CELLS = 4_000_000  # distances that are in memory at once, 32 MB
_BLOCK_LABELS = 8_000_000  # compared labels that are in memory at once


def pairwise_distances(x: ArrayLike) -> np.ndarray:
    """Compute Euclidean distances [N, N] between the rows of x [N, F], divided by sqrt(F).

    The result is the root mean square difference per feature, so it does not depend on the number of
    features.
    """
    x = np.asarray(x, dtype=np.float64)
    assert x.ndim == 2 and len(x) >= 3
    # Centring leaves distances as they are, and keeps the squares below small, so that less is cancelled.
    centred = x - x.mean(axis=0)
    squares = (centred**2).sum(axis=1)
    # |a - b|^2 = |a|^2 + |b|^2 - 2 a.b, which rounding can make slightly negative.
    squared = np.maximum(squares[:, None] + squares - 2 * centred @ centred.T, 0.0) / x.shape[1]
    np.fill_diagonal(squared, 0.0)
    return np.sqrt(squared)


def mean_pairwise(distances: np.ndarray, confidence: float = 0.95) -> MeanInterval:
    """Average distances [N, N] over all pairs of different items, with a jackknife interval (Arvesen 1969,
    for U-statistics).
    """
    return _interval(*_leave_one_out(distances), confidence)


def pairwise_ratio(before: np.ndarray, after: np.ndarray, confidence: float = 0.95) -> MeanInterval:
    """Divide the mean pairwise distance after a change by the one before, for the same items.

    Args: before, after: distances [N, N] between the same items.
    Returns: the ratio and its interval. The jackknife is applied to the logarithm of the ratio.
    Raises: ValueError if all items before are equal.
    """
    assert before.shape == after.shape
    first, first_without = _leave_one_out(before)
    second, second_without = _leave_one_out(after)
    if min(first, first_without.min()) <= 0:
        raise ValueError(
            "pairwise_ratio: expected items that differ before the change, got equal ones, so the ratio is"
            " not defined. Sample other items."
        )
    if min(second, second_without.min()) <= 0:
        # All items are equal after the change. Its logarithm does not exist, so the interval starts at 0.
        return MeanInterval(second / first, 0.0, second / first)
    logarithm = _interval(np.log(second / first), np.log(second_without / first_without), confidence)
    return MeanInterval(*(float(np.exp(value)) for value in logarithm))


def _leave_one_out(distances: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the mean over pairs of distances [N, N], and the same mean without each item, [N]."""
    n = len(distances)
    sums = distances.sum(axis=1)
    total = sums.sum()  # counts each pair twice
    # Without an item, its row and its column leave the total: N - 1 items have (N - 1)(N - 2) ordered pairs.
    return float(total / (n * (n - 1))), (total - 2 * sums) / ((n - 1) * (n - 2))


def _interval(estimate: float, without: np.ndarray, confidence: float) -> MeanInterval:
    """Compute the interval of an estimate from the estimates without each item, [N]."""
    # Jackknife standard error from the N estimates that leave one item out; N - 1 degrees of freedom.
    n = len(without)
    error = np.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum())
    half = float(stdtrit(n - 1, 0.5 + confidence / 2) * error)
    return MeanInterval(float(estimate), float(estimate) - half, float(estimate) + half)


@dataclass(frozen=True, kw_only=True, eq=False)
class PrecisionRecall:
    """Precision and recall, and for each item whether it lies inside the manifold of the other set."""

    precision: float  # 0..1
    recall: float  # 0..1
    k: int  # neighbours
    fake_inside: np.ndarray  # [N] bool: fakes inside the manifold of the reals
    real_inside: np.ndarray  # [M] bool: reals inside the manifold of the fakes

    def intervals(self, confidence: float = 0.95) -> dict[str, Interval]:
        """Compute Wilson intervals of 'precision' and 'recall', with both manifolds taken as fixed.

        Other items would also change the radii of the balls; the intervals do not include that.
        """
        sets = {"precision": self.fake_inside, "recall": self.real_inside}
        return {
            name: wilson_interval(int(inside.sum()), len(inside), confidence) for name, inside in sets.items()
        }


def precision_recall(
    features_fake: np.ndarray, features_real: np.ndarray, k: int = MANIFOLD_NEIGHBOURS
) -> PrecisionRecall:
    """Compute improved precision and recall of features [N, F] and [M, F] under the Euclidean distance.

    An item is not its own neighbour, and a point at the edge of a ball is inside. Memory is bounded; time
    grows as (N + M)^2 F.
    Raises: ValueError if a feature is not finite.
    """
    fake, real = (np.asarray(part, dtype=np.float64) for part in (features_fake, features_real))
    assert fake.shape[1] == real.shape[1] and 1 <= k < min(len(fake), len(real))
    if not (np.isfinite(fake).all() and np.isfinite(real).all()):
        raise ValueError(
            "precision_recall: expected finite features, got NaN or infinity. Check the images for NaN."
        )
    # A common shift leaves distances as they are, and smaller squares lose less by rounding.
    centre = real.mean(axis=0)
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
    """Compute squared distances [A, B] between points [A, F] and [B, F]."""
    return np.maximum((a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * a @ b.T, 0.0)


def neighbour_radii(x: np.ndarray, k: int = MANIFOLD_NEIGHBOURS) -> np.ndarray:
    """Return the squared distance [N] of each item of x [N, F] to its k-th other neighbour."""
    radii = np.empty(len(x))
    step = max(1, _BLOCK_CELLS // len(x))
    for start in range(0, len(x), step):
        rows = np.arange(start, min(start + step, len(x)))
        distances = _squared_distances(x[rows], x)
        distances[np.arange(len(rows)), rows] = np.inf  # an item is not its own neighbour
        radii[rows] = np.partition(distances, k - 1, axis=1)[:, k - 1]
    return radii


def _inside(points: np.ndarray, manifold: np.ndarray, k: int) -> np.ndarray:
    """Return for each point [A, F] whether it lies in a ball of the manifold [B, F], as [A] bool."""
    radii = neighbour_radii(manifold, k)
    inside = np.zeros(len(points), dtype=bool)
    step = max(1, _BLOCK_CELLS // len(manifold))
    # The expanded square |a|^2 + |b|^2 - 2 a.b rounds, so a point at the edge of a ball could fall outside.
    slack = 1e-12 * float((manifold**2).sum(axis=1).max(initial=0.0))
    for start in range(0, len(points), step):
        rows = slice(start, start + step)
        inside[rows] = (_squared_distances(points[rows], manifold) <= radii + slack).any(axis=1)
    return inside


@dataclass(frozen=True, kw_only=True, eq=False)
class Separability:
    """Share of nearest neighbours from an item's own set, and its p-value."""

    share: float  # 0..1; 0.5 is expected if the sets have the same distribution
    p: float  # (1 + permutations with at least this share) / (1 + permutations)
    chance: np.ndarray  # [B] shares under permutations
    k: int  # neighbours of each item
    n: int  # pairs

    def to_dict(self) -> dict:
        """Return the fields as JSON values."""
        return {**asdict(self), "chance": self.chance.tolist()}


def neighbours(pooled: np.ndarray, k: int) -> np.ndarray:
    """Return indices [2N, K] of the nearest other items of each item of pooled [2N, F].

    Items i and i + N are partners, which share a latent. They never count as neighbours of each other:
    otherwise the distance would reflect the shared latent, and the share expected by chance would not be one
    half.
    """
    n = len(pooled) // 2
    centred = pooled - pooled.mean(axis=0)
    squares = (centred**2).sum(axis=1)
    distance = squares[:, None] + squares - 2 * centred @ centred.T
    rows = np.arange(2 * n)
    # Exclude the item itself and its partner.
    distance[rows, rows] = distance[rows, (rows + n) % (2 * n)] = np.inf
    # A stable sort makes the choice among equal distances the same on every machine.
    return np.argsort(distance, axis=1, kind="stable")[:, :k]


def paired_separability(
    first: np.ndarray,
    second: np.ndarray,
    k: int = NEIGHBOURS,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> Separability:
    """Compute the mean share of an item's K nearest neighbours that belong to its own set (Schilling 1986).

    Neighbours are Euclidean, with both sets pooled. If the sets do not differ, the two items of a latent can
    be exchanged, so the null distribution exchanges items at random within pairs. The p-value is exact at any
    N (Phipson and Smyth 2010).
    Args: first, second: features [N, F], where item i of both belongs to the same latent; N > K.
    """
    a = np.asarray(first, dtype=np.float64)
    b = np.asarray(second, dtype=np.float64)
    n = len(a)
    assert a.shape == b.shape and 1 <= k < n and np.isfinite([a, b]).all()
    near = neighbours(np.concatenate([a, b]), k)  # [2N, K]
    swaps = np.random.default_rng(seed).integers(0, 2, size=(permutations + 1, n), dtype=np.int8)
    swaps[0] = 0  # row 0 is the observed assignment, the others are permutations
    # Item i of `first` gets label s_i and its partner gets 1 - s_i.
    labels = np.concatenate([swaps, 1 - swaps], axis=1)  # [B + 1, 2N]
    # In blocks of permutations, because all compared labels [B + 1, 2N, K] take too much memory.
    step = max(1, _BLOCK_LABELS // near.size)
    shares = np.concatenate(
        [
            (part[:, near] == part[:, :, None]).mean(axis=(1, 2))
            for part in np.array_split(labels, -(-len(labels) // step))
        ]
    )
    share = float(shares[0])
    chance = shares[1:]
    # A permutation counts if its share is at least the observed one; 1e-12 covers rounding of equal shares.
    p = (1 + int((chance >= share - 1e-12).sum())) / (1 + permutations)
    return Separability(share=share, p=p, chance=chance, k=k, n=n)
