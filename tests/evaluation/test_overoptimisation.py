"""Divergence: found where it was planted, not found in noise; independence of the second reward is told from its record."""

import numpy as np
import pytest

from eg3d_rlhf.core import bundled
from eg3d_rlhf.evaluation import rewards
from eg3d_rlhf.evaluation.comparison import Comparison, Sources, load_comparison
from eg3d_rlhf.experiments import pages
from eg3d_rlhf.rewards.reward import Reward

PROXY = np.array([0.0, 1, 2, 3, 4])


def measured(means, noise=0.2, n=64, seed=0):
    """[N, T] about these means."""
    return np.asarray(means) + noise * np.random.default_rng(seed).normal(size=(n, len(means)))


@pytest.mark.parametrize(
    ("means", "at"),
    [([0, 1, 2, 1.5, 1], 2), ([0, -0.5, -1, -1, -2], 0), ([0, 1, 2, 2.5, 3], None), ([0, 1, 2, 2, 2], None)],
)
def test_planted_divergence(means, at):
    assert rewards.divergence(measured(PROXY), measured(means, 0.05, seed=1)) == at


def test_both_falling_is_no_divergence():
    assert rewards.divergence(measured([0, 1, 2, 1, 0]), measured([0, 1, 2, 1, 0], seed=1)) is None


def test_noise_is_seldom_called_divergence():
    found = [rewards.divergence(measured(PROXY[:3]), measured([0, 0, 0], 1.0, seed=100 + s)) for s in range(60)]
    assert sum(at is not None for at in found) <= 5  # the peak of noise is always followed by a fall


def test_run_with_snapshots(tiny_comparison, tmp_path):
    (part,) = rewards.curve_jobs(tiny_comparison)
    found = pages.run([part], tmp_path, quiet=True)["over-optimisation"]
    data = found.data
    assert data["kimg"] == [0, 0.064, 0.128, 0.192] and list(data["curves"]) == [rewards.PROXY]
    assert data["distance"][0] == 0 and np.all(np.diff(data["distance"]) > 0)  # the noise grows along the run
    assert data["curves"][rewards.PROXY]["steps"][0] == {"mean": 0, "lo": 0, "hi": 0}
    says = " ".join(found.says)
    assert "--reward-watch" in says and "no KL divergence" in says and "No programmatic judge" in says
    assert (tmp_path / "figures" / "over-optimisation-curves.svg").is_file()


def test_without_snapshots_before_and_after_are_shown(unchanged, tmp_path):
    found = rewards.overoptimisation(unchanged, tmp_path)
    assert found.data["kimg"] == [0.0, None] and found.data["distance"] == [0, 0] and rewards.NO_SNAPSHOTS in found.says
    rewards.plot_curves(found.data)


@pytest.mark.parametrize(
    ("first", "second", "text"),
    [
        ({"labels": "a", "seed": 0}, {"labels": "a", "seed": 1}, "from the same labels with another seed"),
        ({"labels": "a", "seed": 0}, {"labels": "b", "seed": 1}, "from other labels with another seed"),
        ({"labels": "a", "seed": 0}, {}, "is not recorded"),
    ],
)
def test_independence_of_the_second_reward(tiny_comparison, first, second, text):
    reward = tiny_comparison.reward
    pair = {"reward": Reward(reward.observation, reward.network, first), "held_out": Reward(reward.observation, reward.network, second)}
    c = Comparison(**{**vars(tiny_comparison), **pair, "held_out_hash": "hash"})
    assert text in rewards.independence(c)


def test_bundled_networks_have_all_three_measures(tmp_path):
    c = load_comparison(Sources(after=bundled.GENERATOR, n=2, images=16))
    found = rewards.overoptimisation(c, tmp_path)
    assert list(found.data["curves"]) == [rewards.PROXY, rewards.SECOND, rewards.JUDGE]
    assert "No programmatic judge" not in " ".join(found.says)
