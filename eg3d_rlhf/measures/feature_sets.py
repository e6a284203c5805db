"""Compare sets of features: the diversity of one set, and the coverage and the separability of two sets.

- Diversity: mean pairwise distance. It falls if a generator's samples collapse to a few modes.
- Improved precision and recall (Kynkäänniemi et al. 2019): the manifold of a set is the union of balls around
  its items. The radius of a ball is the distance to the item's k-th neighbour in the same set (eq. 1).
  Precision is the share of fakes inside the manifold of the reals. Recall is the share of reals inside the
  manifold of the fakes (eq. 2). Both depend on the sizes of the sets, so compare only values of equal sizes.
- Separability (Schilling 1986): share of nearest neighbours that belong to an item's own set, after the two
  sets are pooled. A permutation test exchanges the two items of a pair and never items of different pairs.

Fakes are features of generated images, reals are features of images of a dataset. Distances come from one
matrix product (scipy's cdist takes eight times as long at 2048 features).

Shapes: N items, fakes or pairs, M reals, F features, K neighbours, B permutations. In the private functions
that compare points with a second set, A is the number of points and B is the size of that second set.
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
_BLOCK_CELLS = 4_000_000  # largest number of distances in memory at once, 32 MB
_BLOCK_LABELS = 8_000_000  # largest number of compared labels in memory at once


def pairwise_distances(x: ArrayLike) -> np.ndarray:
    """Compute Euclidean distances [N, N] between the rows of x [N, F], N >= 3, divided by sqrt(F).

    A distance is thus the root mean square difference per feature, and values for different F can be
    compared.
    """
    x = np.asarray(x, dtype=np.float64)
    assert x.ndim == 2 and len(x) >= 3
    # Centring does not change distances. It keeps the squares below
    # small, so their difference loses fewer digits.
    centred_features = x - x.mean(axis=0)
    squared_norms = (centred_features**2).sum(axis=1)
    # |a - b|^2 = |a|^2 + |b|^2 - 2 a.b, which rounding can make slightly negative.
    squared_distances = (
        np.maximum(squared_norms[:, None] + squared_norms - 2 * centred_features @ centred_features.T, 0.0)
        / x.shape[1]
    )
    np.fill_diagonal(squared_distances, 0.0)
    return np.sqrt(squared_distances)


def mean_pairwise(distances: np.ndarray, confidence: float = 0.95) -> MeanInterval:
    """Average distances [N, N] over all pairs of different items, with a jackknife interval.

    The jackknife for averages over pairs (U-statistics) is that of Arvesen 1969.

    Args:
        distances: distances [N, N] between N >= 3 items.
        confidence: level of the interval, 0..1.
    """
    return _interval(*_leave_one_out(distances), confidence)


def pairwise_ratio(
    distances_before: np.ndarray, distances_after: np.ndarray, confidence: float = 0.95
) -> MeanInterval:
    """Compute the ratio of the mean pairwise distances after and before a change of the same items.

    Args:
        distances_before: distances [N, N] between N >= 3 items before the change.
        distances_after: distances [N, N] between the same items after the change.
        confidence: level of the interval, 0..1.

    Returns: the ratio and its interval. The jackknife is applied to the logarithm of the ratio. If all items
        are equal after the change, the interval goes from 0 to the ratio.
    Raises: ValueError if all items before the change, or all but one of them, are equal.
    """
    assert distances_before.shape == distances_after.shape
    mean_before, leave_one_out_before = _leave_one_out(distances_before)
    mean_after, leave_one_out_after = _leave_one_out(distances_after)
    if min(mean_before, leave_one_out_before.min()) <= 0:
        raise ValueError(
            "pairwise_ratio: the ratio is not defined, because the items before the change are equal (their"
            " mean distance is 0). Use items that differ before the change."
        )
    if min(mean_after, leave_one_out_after.min()) <= 0:
        # All items are equal after the change. The ratio 0 has no logarithm, so the interval starts at 0.
        return MeanInterval(mean_after / mean_before, 0.0, mean_after / mean_before)
    log_interval = _interval(
        np.log(mean_after / mean_before), np.log(leave_one_out_after / leave_one_out_before), confidence
    )
    # Back from the logarithm: mean, lower end and upper end
    return MeanInterval(*(float(np.exp(log_value)) for log_value in log_interval))


def _leave_one_out(distances: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the mean of distances [N, N] over pairs, and the means [N] of which each leaves out one item."""
    n = len(distances)
    row_sums = distances.sum(axis=1)
    distance_sum = row_sums.sum()  # counts each pair twice
    # An item contributes its row and its column to the total. N - 1 items have (N - 1)(N - 2) ordered pairs.
    return float(distance_sum / (n * (n - 1))), (distance_sum - 2 * row_sums) / ((n - 1) * (n - 2))


def _interval(estimate: float, leave_one_out: np.ndarray, confidence: float) -> MeanInterval:
    """Compute the jackknife interval of an estimate.

    Args:
        estimate: estimate from all N items.
        leave_one_out: estimates [N], of which each leaves out one item.
        confidence: level of the interval, 0..1.
    """
    # Jackknife standard error from the N estimates that leave one item out; N - 1 degrees of freedom.
    n = len(leave_one_out)
    standard_error = np.sqrt((n - 1) / n * ((leave_one_out - leave_one_out.mean()) ** 2).sum())
    half_width = float(stdtrit(n - 1, 0.5 + confidence / 2) * standard_error)
    return MeanInterval(float(estimate), float(estimate) - half_width, float(estimate) + half_width)


@dataclass(frozen=True, kw_only=True, eq=False)
class PrecisionRecall:
    """Precision and recall, and which items lie inside the manifold of the other set."""

    precision: float  # 0..1
    recall: float  # 0..1
    k: int  # number of neighbours that the radii are computed from
    fake_inside: np.ndarray  # [N] bool: fakes inside the manifold of the reals
    real_inside: np.ndarray  # [M] bool: reals inside the manifold of the fakes

    def intervals(self, confidence: float = 0.95) -> dict[str, Interval]:
        """Compute Wilson intervals of 'precision' and 'recall' at a level of confidence (0..1).

        The intervals describe the random choice of the items that are tested. They treat both manifolds as
        fixed, although other items would also give balls of other radii.
        """
        masks_by_name = {"precision": self.fake_inside, "recall": self.real_inside}
        return {
            set_name: wilson_interval(int(is_inside.sum()), len(is_inside), confidence)
            for set_name, is_inside in masks_by_name.items()
        }


def precision_recall(
    features_fake: np.ndarray, features_real: np.ndarray, k: int = MANIFOLD_NEIGHBOURS
) -> PrecisionRecall:
    """Compute improved precision and recall of features [N, F] and [M, F] under the Euclidean distance.

    An item is not its own neighbour, and a point at the edge of a ball is inside. Distances are computed in
    blocks of bounded size; the time grows as (N + M)^2 F.

    Args:
        features_fake: features [N, F] of generated images.
        features_real: features [M, F] of real images.
        k: number of neighbours, 1 <= k < min(N, M).

    Raises: ValueError if a feature is not finite.
    """
    fake_features, real_features = (
        np.asarray(features, dtype=np.float64) for features in (features_fake, features_real)
    )
    assert fake_features.shape[1] == real_features.shape[1] and 1 <= k < min(
        len(fake_features), len(real_features)
    )
    if not (np.isfinite(fake_features).all() and np.isfinite(real_features).all()):
        raise ValueError("precision_recall: a feature is NaN or infinite. Check the images for NaN.")
    # A common shift does not change distances, and smaller squares lose less by rounding.
    real_centre = real_features.mean(axis=0)
    fake_features = fake_features - real_centre
    real_features = real_features - real_centre
    fake_inside = _inside(fake_features, real_features, k)
    real_inside = _inside(real_features, fake_features, k)
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
    """Return the squared distance [N] of each item of x [N, F] to its k-th nearest other item in x."""
    squared_radii = np.empty(len(x))
    block_size = max(1, _BLOCK_CELLS // len(x))
    for block_start in range(0, len(x), block_size):
        block_rows = np.arange(block_start, min(block_start + block_size, len(x)))
        squared_distances = _squared_distances(x[block_rows], x)
        squared_distances[np.arange(len(block_rows)), block_rows] = np.inf  # an item is not its own neighbour
        squared_radii[block_rows] = np.partition(squared_distances, k - 1, axis=1)[:, k - 1]
    return squared_radii


def _inside(points: np.ndarray, manifold: np.ndarray, k: int) -> np.ndarray:
    """Return bool [A]: True for each point [A, F] that lies in a ball of the manifold of items [B, F].

    Args:
        points: features [A, F] of the points.
        manifold: features [B, F] of the items around which the balls lie.
        k: number of neighbours from which the radii of the balls are computed.
    """
    squared_radii = neighbour_radii(manifold, k)
    is_inside = np.zeros(len(points), dtype=bool)
    block_size = max(1, _BLOCK_CELLS // len(manifold))
    # The expanded square |a|^2 + |b|^2 - 2 a.b is rounded. Without the slack, a point at the edge of a ball
    # could be counted as outside.
    distance_slack = 1e-12 * float((manifold**2).sum(axis=1).max(initial=0.0))
    for block_start in range(0, len(points), block_size):
        block_rows = slice(block_start, block_start + block_size)
        is_inside[block_rows] = (
            _squared_distances(points[block_rows], manifold) <= squared_radii + distance_slack
        ).any(axis=1)
    return is_inside


@dataclass(frozen=True, kw_only=True, eq=False)
class Separability:
    """Mean share of nearest neighbours that belong to an item's own set, and the p-value of this share."""

    share: float  # 0..1; 0.5 is expected if the sets have the same distribution
    p: float  # p-value: (1 + number of permutations with at least this share) / (1 + B)
    chance: np.ndarray  # [B] shares under permutations
    k: int  # number of neighbours of each item
    n: int  # number of pairs

    def to_dict(self) -> dict:
        """Return the fields as JSON values."""
        return {**asdict(self), "chance": self.chance.tolist()}


def neighbours(pooled_features: np.ndarray, k: int) -> np.ndarray:
    """Return the indices [2N, K] of the k nearest neighbours of each item.

    Items i and i + N are partners, which share a latent. They never count as neighbours of each other:
    otherwise the neighbours would reflect the shared latent, and the share expected by chance would not be
    one half.

    Args:
        pooled_features: features [2N, F], first those of one set, then those of the other set in the same
            order.
        k: number of neighbours K of each item.
    """
    n = len(pooled_features) // 2
    centred_features = pooled_features - pooled_features.mean(axis=0)
    squared_norms = (centred_features**2).sum(axis=1)
    squared_distances = squared_norms[:, None] + squared_norms - 2 * centred_features @ centred_features.T
    item_indices = np.arange(2 * n)
    # Exclude the item itself and its partner.
    squared_distances[item_indices, item_indices] = squared_distances[
        item_indices, (item_indices + n) % (2 * n)
    ] = np.inf
    # A stable sort makes the choice among equal distances the same on every machine.
    return np.argsort(squared_distances, axis=1, kind="stable")[:, :k]


def paired_separability(
    first_features: np.ndarray,
    second_features: np.ndarray,
    k: int = NEIGHBOURS,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> Separability:
    """Compute the mean share of an item's K nearest neighbours that belong to its own set (Schilling 1986).

    Neighbours are searched in both sets together, by Euclidean distance. If the sets do not differ, the two
    items of a latent can be exchanged. The null distribution therefore exchanges items at random within
    pairs. The p-value is exact at any N (Phipson and Smyth 2010).

    Args:
        first_features: features [N, F] of the first set.
        second_features: features [N, F] of the second set; item i has the latent of item i of the first set.
        k: number of neighbours, 1 <= k < N.
        permutations: number of random exchanges B of the test.
        seed: random seed of the exchanges.
    """
    a = np.asarray(first_features, dtype=np.float64)
    b = np.asarray(second_features, dtype=np.float64)
    n = len(a)
    assert a.shape == b.shape and 1 <= k < n and np.isfinite([a, b]).all()
    neighbour_indices = neighbours(np.concatenate([a, b]), k)  # [2N, K]
    swaps = np.random.default_rng(seed).integers(0, 2, size=(permutations + 1, n), dtype=np.int8)
    swaps[0] = 0  # row 0 is the observed assignment, the others are permutations
    # Item i of the first set gets the label s_i, 0 or 1, and its partner gets 1 - s_i.
    set_labels = np.concatenate([swaps, 1 - swaps], axis=1)  # [B + 1, 2N]
    # In blocks of permutations, because all compared labels [B + 1, 2N, K] take too much memory. The double
    # negation rounds the number of blocks up.
    block_size = max(1, _BLOCK_LABELS // neighbour_indices.size)
    own_set_shares = np.concatenate(
        [
            (label_block[:, neighbour_indices] == label_block[:, :, None]).mean(axis=(1, 2))
            for label_block in np.array_split(set_labels, -(-len(set_labels) // block_size))
        ]
    )
    observed_share = float(own_set_shares[0])
    chance_shares = own_set_shares[1:]
    # A permutation counts if its share is at least the observed one; 1e-12 covers rounding of equal shares.
    p_value = (1 + int((chance_shares >= observed_share - 1e-12).sum())) / (1 + permutations)
    return Separability(share=observed_share, p=p_value, chance=chance_shares, k=k, n=n)
