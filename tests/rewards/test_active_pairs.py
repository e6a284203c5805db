"""Pairs chosen by the posterior of a linear reward: the variance's reduction, and which pairs are taken."""

import dataclasses

import numpy as np
import pytest

from eg3d_rlhf.core.cli import file_hash
from eg3d_rlhf.generators import load_generator
from eg3d_rlhf.preferences.labels import Preference
from eg3d_rlhf.rewards import linear
from eg3d_rlhf.rewards.active_pairs import (
    ActiveReward,
    Posterior,
    choose_pairs,
    direction_map,
    half_cosine,
)
from tests.rejections import raising

RNG = np.random.default_rng(4)


@pytest.fixture(scope="module")
def posterior() -> Posterior:
    factor = RNG.normal(size=(5, 5))
    return Posterior(
        weights=RNG.normal(size=5),
        covariance=factor @ factor.T / 20 + 0.01 * np.eye(5),
        to_direction=RNG.normal(size=(8, 5)),
    )


def drawn_directions(posterior: Posterior, count: int) -> np.ndarray:
    weights = RNG.multivariate_normal(posterior.weights, posterior.covariance, size=count)
    return weights @ posterior.to_direction.T


def test_information_is_the_mean_over_the_posterior(posterior):
    difference = RNG.normal(size=5)
    weights = RNG.multivariate_normal(posterior.weights, posterior.covariance, size=40_000)
    probability = (1 / (1 + np.exp(-weights @ difference))).mean()
    expected = probability * (1 - probability)
    assert posterior.information(difference[None])[0] == pytest.approx(expected, abs=0.01)
    # the order within a pair does not matter
    assert posterior.information(-difference[None])[0] == pytest.approx(
        posterior.information(difference[None])[0]
    )


def test_variance_and_certainty_against_draws_from_the_posterior(posterior):
    narrow = dataclasses.replace(posterior, covariance=posterior.covariance / 50)
    directions = drawn_directions(narrow, 40_000)
    mean = narrow.to_direction @ narrow.weights
    cosines = directions @ mean / np.linalg.norm(directions, axis=1) / np.linalg.norm(mean)
    assert narrow.certainty == pytest.approx(cosines.mean(), abs=0.002)
    # perpendicular to the mean direction, relative to its length
    unit = mean / np.linalg.norm(mean)
    perpendicular = directions - np.outer(directions @ unit, unit)
    expected = (perpendicular**2).sum(axis=1).mean() / (mean @ mean)
    assert narrow.variance == pytest.approx(expected, rel=0.03)
    assert dataclasses.replace(posterior, weights=3 * posterior.weights).variance == pytest.approx(
        posterior.variance / 9
    )


def test_a_label_changes_the_covariance_as_the_inverse_of_the_summed_information(posterior):
    difference = RNG.normal(size=5)
    weight = posterior.information(difference[None])[0]
    expected = np.linalg.inv(np.linalg.inv(posterior.covariance) + weight * np.outer(difference, difference))
    after = posterior.after(difference)
    np.testing.assert_allclose(after.covariance, expected, atol=1e-12)
    reduction = posterior.reductions(difference[None], posterior.importance)[0]
    assert reduction == pytest.approx(posterior.variance - after.variance) and reduction > 0


def test_pairs_are_those_of_a_slow_greedy_search(posterior):
    features = RNG.normal(size=(9, 5))
    pending = RNG.normal(size=(2, 5))
    state = posterior
    for difference in pending:
        state = state.after(difference)
    importance = posterior.importance
    free = set(range(9))
    expected = []
    for _ in range(3):
        gains = {}
        for i in free:
            for j in free:
                if i < j:
                    after = state.after(features[i] - features[j])
                    gains[i, j] = np.trace(importance @ (state.covariance - after.covariance))
        best = max(gains, key=gains.get)
        expected.append((*best, gains[best]))
        state = state.after(features[best[0]] - features[best[1]])
        free -= set(best)
    chosen = choose_pairs(posterior, features, 3, pending)
    assert [(pair.first, pair.second) for pair in chosen] == [pair[:2] for pair in expected]
    np.testing.assert_allclose([pair.reduction for pair in chosen], [pair[2] for pair in expected])


def test_equal_samples_are_never_taken_first_and_too_few_are_rejected(posterior):
    features = np.concatenate([np.zeros((2, 5)), RNG.normal(size=(2, 5))])
    (chosen,) = choose_pairs(posterior, features, 1)
    assert {chosen.first, chosen.second} != {0, 1}
    with raising("3", "6", "4", "pool"):
        choose_pairs(posterior, features, 3)


def test_the_direction_is_the_ridge_regression_of_the_scores():
    z = RNG.normal(size=(50, 4))
    features = RNG.normal(size=(50, 3)) + 7
    weights = RNG.normal(size=3)
    scores = features @ weights
    expected = np.linalg.solve(z.T @ z + 2 * np.eye(4), z.T @ (scores - scores.mean()))
    np.testing.assert_allclose(direction_map(z, features, 2.0) @ weights, expected, atol=1e-9)


def test_halves_agree_for_labels_of_one_direction_and_not_for_random_ones():
    truth = np.array([1.0, -2.0, 0.5])
    differences = RNG.normal(size=(200, 3))
    oriented = differences * np.sign(differences @ truth)[:, None]
    numbers = np.arange(200)
    assert half_cosine(oriented, numbers, 1.0, np.eye(3)) > 0.95
    random = [
        half_cosine(differences * RNG.choice([-1, 1], size=(200, 1)), numbers, 1.0, np.eye(3))
        for _ in range(10)
    ]
    assert abs(np.mean(random)) < 0.4


def test_a_fitted_reward_chooses_new_pairs_and_is_named_by_its_file(tiny_networks, tmp_path):
    generator = load_generator(tiny_networks)
    labels = [
        Preference(winner=seed, loser=seed + 1, generator=generator.hash, psi=1.0) for seed in range(0, 60, 2)
    ]
    observation = linear.slab_of(generator.generator, 12)
    store = linear.observe_samples(generator, observation, [], psi=1.0)
    reward = ActiveReward.fit(generator, labels, observation, store, unlabelled=32)
    saved = linear.fit_linear_reward(generator, labels, unlabelled=32, resolution=12).save(
        tmp_path / "r.safetensors"
    )
    assert reward.hash == file_hash(saved), "the command reward linear writes the same reward"
    chosen = reward.choose(range(100, 120), 4, pending=[(130, 131)])
    seeds = [seed for first, second, _ in chosen for seed in (first, second)]
    assert len(set(seeds)) == 8 and set(seeds) <= set(range(100, 120))
    differences = reward.differences([(chosen[0][0], chosen[0][1])])
    features = reward.fitted.reward.network.embed(store.take([chosen[0][0], chosen[0][1]]))
    np.testing.assert_allclose(differences[0], (features[0] - features[1]).numpy(), rtol=1e-3, atol=1e-4)
    assessment = reward.assess({(0, 1), (2, 3)})
    assert assessment["labels"] == 30 and assessment["random_labels"] == 2
    assert 0 < assessment["certainty"] <= 1 and -1 <= assessment["half_cosine"] <= 1
    assert reward.assess(set())["accuracy"] is None
