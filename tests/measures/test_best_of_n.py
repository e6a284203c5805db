"""The best of n: against all subsets by hand, in closed form, and on planted laws."""

import itertools
import math

import numpy as np
import pytest

from eg3d_rlhf.evaluation.best_of_n import best_of, chances, divergence_of, fit, number_at, peak, resampled


@pytest.fixture
def drawn():
    return np.random.default_rng(0).normal(size=(2, 9))


@pytest.mark.parametrize("n", range(1, 10))
def test_the_mean_over_all_subsets(drawn, n):
    reward, judge = drawn
    by_hand = [judge[max(subset, key=lambda i: reward[i])] for subset in itertools.combinations(range(9), n)]
    assert best_of(reward, judge, [n])[0] == pytest.approx(np.mean(by_hand), abs=1e-12)


def test_the_ends_in_closed_form():
    reward, judge = np.random.default_rng(1).normal(size=(2, 4096))
    one, all_of_them = best_of(reward, judge, [1, 4096])
    assert one == pytest.approx(judge.mean(), abs=1e-12) and all_of_them == judge[reward.argmax()]


def test_a_judge_that_is_the_reward_rises_and_its_opposite_falls():
    reward, numbers = np.random.default_rng(2).normal(size=4096), [1, 2, 3, 10, 50, 512]
    same, opposite = best_of(reward, reward, numbers), best_of(reward, -reward, numbers)
    assert (np.diff(same) > 0).all() and np.array_equal(same, -opposite)
    assert same[1] == pytest.approx(1 / math.sqrt(math.pi), abs=0.03)  # the larger of two normals


@pytest.mark.parametrize("n", [1, 2, 17, 512, 4096])
def test_chances_are_those_of_the_binomials(n):
    found = chances(4096, n)
    assert found.sum() == pytest.approx(1, abs=1e-9) and (found >= 0).all() and np.count_nonzero(found) <= 4097 - n
    for i in (4096, 4000, 2048):
        assert found[i - 1] == pytest.approx(math.comb(i - 1, n - 1) / math.comb(4096, n), rel=1e-9)


def test_equal_rewards_share_their_chances():
    reward, judge = np.array([0.0, 1, 1, 1]), np.array([5.0, 1, 2, 6])
    assert best_of(reward, judge, [4])[0] == pytest.approx(3) and best_of(reward, judge, [2])[0] == pytest.approx(3)
    order = [2, 0, 3, 1]
    np.testing.assert_allclose(best_of(reward[order], judge[order], [1, 2, 3, 4]), best_of(reward, judge, [1, 2, 3, 4]))


def test_the_law_is_found_again():
    distance = np.sqrt(divergence_of([1, 2, 4, 8, 16, 64, 256]))
    found = fit(distance, np.stack([distance * (2 - 0.5 * distance), distance * (1 + 0.1 * distance)]))
    np.testing.assert_allclose(found, [[2, 0.5], [1, -0.1]], atol=1e-12)
    np.testing.assert_allclose(peak(*found.T), [2, np.inf])
    assert peak(np.array(-1.0), np.array(1.0)) == 0
    for n in (1, 2, 100, 512):
        assert number_at(float(np.sqrt(divergence_of([n])[0]))) == pytest.approx(n, rel=1e-6)


def test_resamples(drawn):
    reward, judge = drawn
    counts = np.array([[1] * 9, [0, 2, 1, 1, 1, 1, 1, 1, 1], [9, *[0] * 8]])
    found = resampled(reward, judge, [1, 3, 9], counts)
    np.testing.assert_allclose(found[0], best_of(reward, judge, [1, 3, 9]), atol=1e-12)
    kept = np.repeat(np.arange(9), counts[1])
    np.testing.assert_allclose(found[1], best_of(reward[kept], judge[kept], [1, 3, 9]), atol=1e-12)
    np.testing.assert_allclose(found[2], judge[0], atol=1e-12)
