"""Pairwise distances against loops; the jackknife by simulation; a collapse shows."""

import numpy as np
import pytest

from eg3d_rlhf.measures.feature_sets import mean_pairwise, pairwise_distances, pairwise_ratio

RNG = np.random.default_rng(5)


def test_distances_are_root_mean_squares():
    x = RNG.normal(size=(6, 4)) + 100
    loop = [[np.sqrt(((a - b) ** 2).mean()) for b in x] for a in x]
    np.testing.assert_allclose(pairwise_distances(x), loop, atol=1e-6)


def test_mean_counts_each_pair_once():
    matrix = pairwise_distances(RNG.normal(size=(7, 3)))
    upper = matrix[np.triu_indices(7, 1)]
    np.testing.assert_allclose(mean_pairwise(matrix).mean, upper.mean(), rtol=1e-12)


def test_jackknife_is_leaving_each_item_out():
    matrix = pairwise_distances(RNG.normal(size=(9, 3)))
    without = []
    for i in range(9):
        kept = np.delete(np.arange(9), i)
        part = matrix[np.ix_(kept, kept)]
        without.append(part[np.triu_indices(8, 1)].mean())
    error = np.sqrt(8 / 9 * ((np.array(without) - np.mean(without)) ** 2).sum())
    found = mean_pairwise(matrix)
    np.testing.assert_allclose((found.hi - found.lo) / 2, 2.306004135 * error, rtol=1e-7)


def test_interval_covers():
    rng, hits = np.random.default_rng(2), 0
    truth = 2 / np.sqrt(np.pi)  # E|x - y| of standard normals
    for _ in range(1000):
        found = mean_pairwise(pairwise_distances(rng.normal(size=(60, 1))))
        hits += found.lo <= truth <= found.hi
    assert 0.925 <= hits / 1000 <= 0.975


def test_collapse_shows():
    x = RNG.normal(size=(40, 8))
    before = pairwise_distances(x)
    half = pairwise_ratio(before, pairwise_distances(0.5 * x))
    np.testing.assert_allclose(half, (0.5, 0.5, 0.5), rtol=1e-9)
    assert pairwise_ratio(before, pairwise_distances(np.ones((40, 8)))).mean == 0
    noisy = pairwise_ratio(before, pairwise_distances(x + 0.3 * RNG.normal(size=x.shape)))
    assert noisy.lo < noisy.mean < noisy.hi


def test_unusable_sets_are_refused():
    with pytest.raises(ValueError, match="N >= 3"):
        pairwise_distances(np.ones((2, 3)))
    with pytest.raises(ValueError, match="equal ones"):
        pairwise_ratio(np.zeros((4, 4)), np.ones((4, 4)) - np.eye(4))
