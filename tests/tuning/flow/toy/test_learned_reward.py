"""The learned reward: learns from pairs, and mostly orders assets as the people's oracle does."""

import pytest
import torch

from eg3d_rlhf.tuning.flow.toy.bundled import load_network
from eg3d_rlhf.tuning.flow.toy.judges import RewardTraining, accuracy, judge_drafts, train_reward, volumes_of
from eg3d_rlhf.tuning.flow.toy.pipeline import TRAINED, Defects, R
from tests.tuning.flow.toy.drawing import drawn, perfect

SHORT = RewardTraining(pairs=128, held_out=64, epochs=3, batch=32)


def test_training_repeats_and_lowers_the_loss():
    losses = []
    first, found = train_reward(SHORT, lambda step, steps, loss: losses.append(loss))
    again, _ = train_reward(SHORT)
    assert len(losses) == 12 and sum(losses[-4:]) < sum(losses[:4])
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))
    assert set(found) == {"labels", "clean"} and all(0 <= value <= 1 for value in found.values())


def test_the_bundled_one_orders_new_pairs():
    judged = judge_drafts([TRAINED[i % 64] for i in range(400)], torch.Generator().manual_seed(99))
    found = accuracy(load_network("reward"), judged)
    assert 0.75 < found["clean"] < 0.98 and found["labels"] > 0.7


def test_a_score_is_of_its_own_asset_alone():
    assets, names = drawn(8)
    network = load_network("reward")
    torch.testing.assert_close(network(assets[3:4], names[3:4]), network(assets, names)[3:4], atol=1e-4, rtol=1e-4)
    assert network(assets, names).dtype == torch.float32 and not network(assets, names).requires_grad


def test_a_better_colour_scores_more():
    network, names = load_network("reward"), ["red ball", "blue ball"]
    assert network(perfect(["red ball"]) * 2, names).diff() < 0


def test_more_floaters_and_holes_score_less():
    network, scores = load_network("reward"), []
    for share in (0, 0.1, 0.3):
        assets, names = drawn(64, 0, Defects(floaters=share, holes=share, unrepaired=1, wrong=0, noise=0, tint=0))
        assert volumes_of(assets).shape == (64, 4, R, R, R)
        scores.append(float(network(assets, names).mean()))
    assert scores[0] > scores[1] > scores[2]


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="RewardTraining: expected positive numbers"):
        RewardTraining(epochs=0)
