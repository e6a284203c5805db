"""Active selection of seeds: scores of the rewards, who chose what and why, and a share of random pairs."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from eg3d_rlhf.generators import load_generator
from eg3d_rlhf.people.label.entities import Kind
from eg3d_rlhf.people.label.pairing import PairingOptions, plan, reward_ensemble
from eg3d_rlhf.preferences.pair_strategies import Item, Items
from eg3d_rlhf.rewards.cache import observe_seeds
from eg3d_rlhf.rewards.reward import Reward, load_reward
from eg3d_rlhf.rewards.slab_network import RewardModel
from tests.rejections import raising


@pytest.fixture(scope="module")
def generator(tiny_networks):
    return load_generator(tiny_networks)


@pytest.fixture(scope="module")
def rewards(tiny_reward, tmp_path_factory):
    """Two reward files of one architecture, the second with a temperature."""
    first = load_reward(tiny_reward)
    torch.manual_seed(11)
    second = Reward(first.observation, RewardModel(first.network.arch), {"temperature": 2.0})
    return str(tiny_reward), str(second.save(tmp_path_factory.mktemp("rewards") / "second.safetensors"))


def test_scores_are_those_of_the_rewards_over_their_temperature(generator, rewards):
    ensemble = reward_ensemble(PairingOptions(rewards=rewards, psi=0.8), generator)
    seeds = range(25)  # more than a batch
    scored = Items(members=[Item()] * 25, ensemble=ensemble).scored()
    for row, path, temperature in zip(scored.scores, rewards, (1.0, 2.0), strict=True):
        reward = load_reward(path)
        expected = (
            reward.score_observed(observe_seeds(generator.G, reward.observation, psi=0.8)(list(seeds)))
            / temperature
        )
        assert np.allclose(row, expected.numpy(), rtol=1e-4, atol=1e-5)
    assert scored.embeddings.shape == (25, 32) and [d["members"] for d in ensemble.described] == [1, 1]


def test_rewards_that_do_not_fit_are_rejected_or_reported(generator, rewards, tmp_path, capsys):
    with raising("2", "1", "rewards"):
        reward_ensemble(PairingOptions(strategy="active", rewards=rewards[:1]), generator)
    assert reward_ensemble(PairingOptions(strategy="close", rewards=rewards[:1]), generator).size == 1
    first = load_reward(rewards[0])
    foreign = Reward(first.observation, first.network, {"generator": "f" * 64}).save(
        tmp_path / "foreign.safetensors"
    )
    reward_ensemble(PairingOptions(rewards=(str(foreign), rewards[1])), generator)
    # another line says that the reward states no accuracy
    (line,) = [text for text in capsys.readouterr().err.splitlines() if "f" * 12 in text]
    assert "foreign.safetensors" in line and "f" * 12 in line and generator.hash[:12] in line


def test_the_plan_says_who_chose_what_and_why(generator, rewards):
    options = PairingOptions(pairs=6, strategy="active", rewards=rewards, first_seed=50, diversity=0.4)
    ensemble = reward_ensemble(options, generator)
    planned = plan(options, generator, ensemble=ensemble)
    assert (
        planned == plan(options, generator, ensemble=ensemble)
        and json.loads(json.dumps(planned.report)) == planned.report
    )
    pairs = [pair for pair in planned.pairs if pair.kind is Kind.PAIR]
    assert [[p.first.seed, p.second.seed] for p in pairs] == [
        entry["seeds"] for entry in planned.report["why"]
    ]
    assert all(50 <= seed < 50 + 24 for entry in planned.report["why"] for seed in entry["seeds"])
    assert planned.report["disagreement_chosen"] > planned.report["disagreement_candidates"]
    assert [r["file"] for r in planned.report["rewards"]] == ["tiny.safetensors", "second.safetensors"]
    assert plan(replace(options, seed=1), generator, ensemble=ensemble).pairs != planned.pairs


def test_the_commands_wait_for_rewards_torch_and_the_server_only_where_they_are_needed():
    code = (
        "import sys, eg3d_rlhf.modes.study; assert not {'eg3d_rlhf.rewards', 'torch', 'fastapi'} &"
        " set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


def test_a_share_of_an_active_plan_is_random(generator, rewards):
    options = PairingOptions(
        pairs=8, strategy="active", rewards=rewards, gold=0, training=0, diversity=0.0, doubtful=0.5
    )
    ensemble = reward_ensemble(options, generator)
    planned = plan(options, generator, ensemble=ensemble)
    pairs = [(pair.first.seed, pair.second.seed) for pair in planned.pairs]
    assert len({seed for pair in pairs for seed in pair}) == 16 and pairs == [
        (pair.first.seed, pair.second.seed) for pair in plan(options, generator, ensemble=ensemble).pairs
    ]
    why = {tuple(entry["seeds"]) for entry in planned.report["why"]}
    reasons = plan(replace(options, doubtful=1.0), generator, ensemble=ensemble).report["why"]
    assert len(why) == 4 and why < set(pairs) and why == {tuple(entry["seeds"]) for entry in reasons[:4]}, (
        "the greatest doubts come first"
    )
