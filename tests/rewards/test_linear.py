"""Linear rewards: oracles of the fit, the components and the variance; files; the command."""

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from scipy.optimize import minimize

from eg3d_rlhf.core.seeds import HELD_OUT, UNLABELLED_SAMPLES
from eg3d_rlhf.generators import load_generator
from eg3d_rlhf.modes.jobs import main
from eg3d_rlhf.preferences.dataset import fold_labels
from eg3d_rlhf.preferences.labels import Preference, write_labels
from eg3d_rlhf.rewards import linear
from eg3d_rlhf.rewards.cache import ObservationCache
from eg3d_rlhf.rewards.reward import load_reward
from tests.rejections import raising, rejected

RNG = np.random.default_rng(0)


def test_logistic_regression_against_a_general_optimiser():
    differences = RNG.normal(size=(60, 5)) + 0.4
    ridge = 3.0

    def loss(weights):
        return sum(np.log1p(np.exp(-row @ weights)) for row in differences) + ridge / 2 * weights @ weights

    expected = minimize(loss, np.zeros(5), method="BFGS", options={"gtol": 1e-9}).x
    weights, hessian = linear.fit_logistic(differences, ridge)
    np.testing.assert_allclose(weights, expected, atol=1e-5)
    # the Hessian is the derivative of the gradient, by central differences
    step = 1e-4
    for i, unit in enumerate(np.eye(5)):
        second = (loss(weights + step * unit) - 2 * loss(weights) + loss(weights - step * unit)) / step**2
        assert hessian[i, i] == pytest.approx(second, rel=1e-4)


def test_inverted_differences_negate_the_weights():
    differences = RNG.normal(size=(30, 4)) + 0.3
    weights, _ = linear.fit_logistic(differences, 1.0)
    inverted, _ = linear.fit_logistic(-differences, 1.0)
    np.testing.assert_allclose(inverted, -weights, atol=1e-12)


def test_perfectly_separable_pairs_have_finite_weights():
    weights, _ = linear.fit_logistic(np.full((20, 3), 50.0), 0.01)
    assert np.isfinite(weights).all() and (weights > 0).all()


def test_first_step_is_one_newton_step_from_zero():
    differences = RNG.normal(size=(40, 6))
    signs = RNG.choice([-1.0, 1.0], size=40)
    oriented = differences * signs[:, None]
    # gradient and Hessian of the loss at zero, where all probabilities are one half
    gradient = -0.5 * oriented.sum(axis=0)
    hessian = sum(np.outer(row, row) for row in oriented) / 4 + 2.0 * np.eye(6)
    np.testing.assert_allclose(
        linear.fit_first_step(differences, 2.0) @ signs, -np.linalg.solve(hessian, gradient), atol=1e-10
    )


def store_of(observations: np.ndarray) -> ObservationCache:
    """Return a cache with the observations of the seeds 0, 1, ..."""
    rows = torch.from_numpy(observations).float()
    store = ObservationCache(lambda seeds: rows[list(seeds)])
    store.fill(range(len(rows)))
    return store


def test_components_against_the_singular_value_decomposition():
    observations = RNG.normal(size=(40, 2, 15)) * np.linspace(2, 0.1, 15) + 1
    store = store_of(observations)
    seeds = list(range(40))
    pca = linear.principal_components(store, seeds, count=6)
    # in float64, of the values that the cache holds in half precision
    values = store.take(seeds).flatten(1).double().numpy()
    centred = values - values.mean(axis=0)
    _, singular_values, rows = np.linalg.svd(centred, full_matrices=False)
    cosines = np.abs((pca.components.astype(np.float64) * rows[:6]).sum(axis=1))
    np.testing.assert_allclose(cosines, 1, atol=1e-4)
    assert pca.scale == pytest.approx(singular_values[0] / np.sqrt(39), rel=1e-3)
    assert pca.explained == pytest.approx((singular_values[:6] ** 2).sum() / (singular_values**2).sum())
    # all features are divided by the same number, so their variances keep their proportions
    features = pca.project(store, seeds)
    np.testing.assert_allclose(
        features.std(axis=0, ddof=1), singular_values[:6] / singular_values[0], rtol=2e-3
    )


def test_equal_observations_are_rejected():
    with raising("observations", "12"):
        linear.principal_components(store_of(np.ones((12, 5))), list(range(12)))


def labels_of(scores: np.ndarray, count: int, seed: int = 0) -> list[Preference]:
    """Label random pairs by scores, each seed in one pair."""
    order = np.random.default_rng(seed).permutation(len(scores))[: 2 * count].reshape(-1, 2)
    return [
        Preference(winner=int(a), loser=int(b))
        if scores[a] > scores[b]
        else Preference(winner=int(b), loser=int(a))
        for a, b in order
    ]


@pytest.fixture(scope="module")
def fit():
    """Fit labels by the first of 30 entries, whose variance dominates."""
    observations = RNG.normal(size=(200, 30)) * np.array([3.0] + [0.5] * 29)
    store = store_of(observations)
    seeds = list(range(200))
    pca = linear.principal_components(store, seeds, count=10)
    features = dict(zip(seeds, pca.project(store, seeds), strict=True))
    labels = labels_of(observations[:, 0], 60)
    return linear.fit_linear(pca, features, labels, (30,)), store, features, labels


def test_fit_orders_held_out_pairs_and_scores_observations(fit):
    result, store, features, labels = fit
    assert result.accuracy["accuracy"] > 0.9
    low, high = result.accuracy["interval_95"]
    assert low < result.accuracy["accuracy"] <= high
    scores = result.network.score(store.take(range(20))).numpy()
    weights = result.network.weights.numpy()
    np.testing.assert_allclose(scores, [features[seed] @ weights for seed in range(20)], atol=1e-4)
    # swapping a pair negates its margin
    embeddings = result.network.embed(store.take(range(20)))
    margins = result.network.pair_margin(embeddings[:10], embeddings[10:])
    torch.testing.assert_close(margins, -result.network.pair_margin(embeddings[10:], embeddings[:10]))
    np.testing.assert_allclose(margins, scores[:10] - scores[10:], atol=1e-4)


def test_variance_is_laplaces_and_falls_with_labels(fit):
    result, store, features, labels = fit
    differences = np.stack([features[label.winner] - features[label.loser] for label in labels])
    _, hessian = linear.fit_logistic(differences, result.ridge)
    expected = [features[seed] @ np.linalg.solve(hessian, features[seed]) for seed in range(10)]
    variance = result.network.score_variance(store.take(range(10)))
    np.testing.assert_allclose(variance, expected, rtol=1e-3)
    embeddings = result.network.embed(store.take(range(10)))
    pair_variance = result.network.pair_variance(embeddings[:1], embeddings[1:2])
    difference = features[0] - features[1]
    assert float(pair_variance) == pytest.approx(difference @ np.linalg.solve(hessian, difference), rel=1e-3)
    _, fewer_hessian = linear.fit_logistic(differences[:20], result.ridge)
    assert np.trace(np.linalg.inv(fewer_hessian)) > np.trace(np.linalg.inv(hessian))


def test_ridge_is_large_for_labels_without_signal():
    differences = np.random.default_rng(5).normal(size=(60, 20))
    folds = np.arange(60) % 5
    signal = differences * np.sign(differences[:, :1])
    assert linear.choose_ridge(differences, folds) > linear.choose_ridge(signal, folds)


def test_folds_share_no_seed_and_no_pair():
    labels = labels_of(RNG.normal(size=100), 40) + [
        Preference(winner=500 + i, loser=500 + i + 1) for i in range(3)
    ]
    # the second label of a pair has its fold, whatever its order
    repeated = [Preference(winner=label.loser, loser=label.winner) for label in labels]
    folds = fold_labels([*labels, *repeated], 5)
    assert (folds[: len(labels)] == folds[len(labels) :]).all()
    seeds_by_fold = [
        {
            seed
            for label, f in zip(labels, folds[: len(labels)], strict=True)
            if f == fold
            for seed in (label.winner, label.loser)
        }
        for fold in range(5)
    ]
    assert sum(map(len, seeds_by_fold)) == len(set.union(*seeds_by_fold))
    sizes = np.bincount(folds)
    assert len(sizes) == 5 and sizes.max() - sizes.min() <= 4


def test_connected_pairs_are_distributed_over_folds():
    """All pairs of eight seeds share seeds, so that the folds can keep only the pairs apart."""
    labels = [Preference(winner=i, loser=j) for i in range(8) for j in range(i)]
    assert np.bincount(fold_labels(labels, 5)).min() >= 5
    with raising("labels", "5"):
        fold_labels(labels[:4], 5)


def test_labels_without_an_answer_are_rejected():
    pair = Preference(winner=1, loser=2)
    with raising("labels", "12"):
        linear.usable_labels([Preference(winner=i, loser=i + 1, tie=True) for i in range(12)])
    with raising("labels", "3", "10"):
        linear.usable_labels([pair] * 3)
    opposite = Preference(winner=2, loser=1)
    with raising("labels", "20"):
        linear.usable_labels([pair, opposite] * 10)
    assert len(linear.usable_labels([pair] * 10)) == 10


def test_unlabelled_seeds_are_not_held_out():
    seeds = linear.unlabelled_seeds(20_000, [Preference(winner=UNLABELLED_SAMPLES, loser=3)])
    assert len(set(seeds)) == 20_000 and UNLABELLED_SAMPLES not in seeds
    for held_out in HELD_OUT:
        assert not set(seeds) & set(held_out.seeds)


@pytest.fixture(scope="module")
def labels_file(tiny_networks, tmp_path_factory):
    """Write 30 labels of the tiny generator, by the mean density of its shapes."""
    generator = load_generator(tiny_networks)
    observation = linear.slab_of(generator.generator, 12)
    store = linear.observe_samples(generator, observation, range(60), psi=1.0)
    scores = store.take(range(60)).flatten(1).mean(dim=1).numpy()
    labels = [
        Preference(winner=label.winner, loser=label.loser, generator=generator.hash)
        for label in labels_of(scores, 30)
    ]
    return write_labels(tmp_path_factory.mktemp("labels") / "labels.jsonl", labels)


def test_command_writes_a_reward_that_scores_shapes(labels_file, tiny_networks, tmp_path):
    out = tmp_path / "linear.safetensors"
    flags = ["--set=unlabelled=32", "--resolution=12", "--device=cpu", f"--network={tiny_networks}"]
    result = CliRunner().invoke(main, ["reward", "linear", f"--labels={labels_file}", f"--out={out}", *flags])
    assert result.exit_code == 0, result.output
    reward = load_reward(out)
    generator = load_generator(tiny_networks)
    field = generator.generator.field(torch.randn(3, generator.generator.num_ws, generator.generator.w_dim))
    scores = reward.score(field)
    assert scores.shape == (3,) and torch.isfinite(scores).all()
    assert (reward.network.score_variance(reward.observation.observe(field)) >= 0).all()
    assert reward.provenance["generator"] == generator.hash
    assert 0 <= reward.provenance["test_accuracy"]["accuracy"] <= 1
    # saved and loaded again, it has the same scores
    copy = load_reward(reward.save(tmp_path / "copy.safetensors"))
    assert torch.equal(copy.score(field), scores)


def test_command_rejects_labels_of_another_generator(labels_file, tmp_path):
    out = tmp_path / "linear.safetensors"
    result = CliRunner().invoke(main, ["reward", "linear", f"--labels={labels_file}", f"--out={out}"])
    rejected(result, "30", "--network")
    assert not out.exists()
    result = CliRunner().invoke(main, ["reward", "linear", f"--labels={labels_file}", "--out=x.pt"])
    rejected(result, "--out", "x.pt", ".safetensors")
