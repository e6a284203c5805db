"""Compare pairwise distances and their jackknife with loops, and precision and recall with the paper's
definition.
"""

import numpy as np
import pytest

from eg3d_rlhf.measures import feature_sets
from eg3d_rlhf.measures.feature_sets import (
    mean_pairwise,
    pairwise_distances,
    pairwise_ratio,
    precision_recall,
)

RNG = np.random.default_rng(5)


def test_distances_are_root_mean_squares():
    x = RNG.normal(size=(6, 4)) + 100
    loop = [[np.sqrt(((a - b) ** 2).mean()) for b in x] for a in x]
    np.testing.assert_allclose(pairwise_distances(x), loop, atol=1e-6)


def test_jackknife_is_leaving_each_item_out():
    matrix = pairwise_distances(RNG.normal(size=(9, 3)))
    without = []
    for i in range(9):
        kept = np.delete(np.arange(9), i)
        part = matrix[np.ix_(kept, kept)]
        without.append(part[np.triu_indices(8, 1)].mean())
    error = np.sqrt(8 / 9 * ((np.array(without) - np.mean(without)) ** 2).sum())
    interval = mean_pairwise(matrix)
    np.testing.assert_allclose(interval.mean, matrix[np.triu_indices(9, 1)].mean(), rtol=1e-12)
    np.testing.assert_allclose((interval.hi - interval.lo) / 2, 2.306004135 * error, rtol=1e-7)


def test_interval_covers():
    rng = np.random.default_rng(2)
    hits = 0
    truth = 2 / np.sqrt(np.pi)  # E|x - y| of standard normals
    for _ in range(1000):
        interval = mean_pairwise(pairwise_distances(rng.normal(size=(60, 1))))
        hits += interval.lo <= truth <= interval.hi
    assert 0.925 <= hits / 1000 <= 0.975


def test_a_collapse_lowers_the_ratio():
    x = RNG.normal(size=(40, 8))
    before = pairwise_distances(x)
    half = pairwise_ratio(before, pairwise_distances(0.5 * x))
    np.testing.assert_allclose(half, (0.5, 0.5, 0.5), rtol=1e-9)
    assert pairwise_ratio(before, pairwise_distances(np.ones((40, 8)))).mean == 0
    noisy = pairwise_ratio(before, pairwise_distances(x + 0.3 * RNG.normal(size=x.shape)))
    assert noisy.lo < noisy.mean < noisy.hi


def test_equal_items_have_no_ratio():
    with pytest.raises(ValueError, match="pairwise_ratio"):
        pairwise_ratio(np.zeros((4, 4)), np.ones((4, 4)) - np.eye(4))


def brute_force(points, manifold, k):
    """Evaluate equation 1 of the paper with loops in float64."""
    radii = [
        sorted(np.linalg.norm(a - b) for j, b in enumerate(manifold) if j != i)[k - 1]
        for i, a in enumerate(manifold)
    ]
    return np.array(
        [any(np.linalg.norm(p - a) <= r for a, r in zip(manifold, radii, strict=True)) for p in points]
    )


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("block", [7, 4_000_000])
def test_equals_brute_force(k, block, monkeypatch):
    monkeypatch.setattr(feature_sets, "_BLOCK_CELLS", block)
    random = np.random.RandomState(k)
    # far from the origin, where the rounding of squares matters
    fake = random.randn(40, 4) * 1.3 + 0.7 + 50
    real = random.randn(55, 4) + 50
    measured = precision_recall(fake, real, k)
    assert (measured.fake_inside == brute_force(fake, real, k)).all() and (
        measured.real_inside == brute_force(real, fake, k)
    ).all()
    assert (
        measured.precision == measured.fake_inside.mean()
        and measured.recall == measured.real_inside.mean()
        and measured.k == k
    )
    assert 0 < measured.precision < 1 and 0 < measured.recall < 1


def test_a_collapse_lowers_only_recall():
    random = np.random.RandomState(1)
    real = random.randn(300, 3)
    collapsed = 0.05 * random.randn(300, 3)
    measured = precision_recall(collapsed, real)
    assert measured.precision > 0.99 and measured.recall < 0.05
    noisy = precision_recall(random.randn(300, 3) * 4, real)
    assert noisy.precision < 0.5 and noisy.recall > 0.8


def test_nan_is_rejected():
    with pytest.raises(ValueError, match="finite"):
        precision_recall(np.full((5, 2), np.nan), np.zeros((5, 2)))
