"""Test the training of the toy flow generator's networks and of its reward."""

import re

import pytest
import torch
from click.testing import CliRunner

from builders.toy_flow import BaseTraining, accuracy, save_network, toy_flow, train_base, train_reward
from eg3d_rlhf.tuning.flow.toy.bundled import NETWORKS, load_network
from eg3d_rlhf.tuning.flow.toy.toy_oracles import RewardTraining, judge_drafts
from eg3d_rlhf.tuning.flow.toy.toy_pipeline import TRAINED

SHORT = BaseTraining(steps=16, batch=8, warm_up=2, ema=0.8)


SHORT_REWARD = RewardTraining(pairs=128, held_out=64, epochs=3, batch=32)


@pytest.mark.parametrize("stage", ["structure", pytest.param("voxels", marks=pytest.mark.long)])
def test_training_repeats_and_lowers_the_error(stage):
    losses = []
    first = train_base(stage, SHORT, lambda step, steps, loss: losses.append(loss))
    again = train_base(stage, SHORT)
    assert len(losses) == 16 and sum(losses[-4:]) < 0.95 * sum(losses[:4])
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True)
    )


def test_a_stored_network_comes_back_to_half_precision(tmp_path):
    network = NETWORKS["voxels"]()
    save_network("voxels", network, {"training": {}}, tmp_path)
    state = load_network("voxels", tmp_path).state_dict()
    for name, value in network.state_dict().items():
        torch.testing.assert_close(state[name], value.half().float(), atol=0, rtol=0)


def test_the_tool_makes_a_network(tmp_path):
    done = CliRunner().invoke(toy_flow, ["structure", "--steps=2", f"--outdir={tmp_path}"])
    assert done.exit_code == 0 and re.search(r"\bstructure\b.*\bloss\b.*\d", done.output), done.output
    assert [path.name for path in tmp_path.iterdir()] == ["structure.safetensors"]


def test_training_repeats_and_lowers_the_loss():
    losses = []
    first, found = train_reward(SHORT_REWARD, lambda step, steps, loss: losses.append(loss))
    again, _ = train_reward(SHORT_REWARD)
    assert len(losses) == 12 and sum(losses[-4:]) < sum(losses[:4])
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True)
    )
    assert set(found) == {"labels", "clean"} and all(0 <= value <= 1 for value in found.values())


def test_the_bundled_one_orders_new_pairs():
    judged = judge_drafts([TRAINED[i % 64] for i in range(400)], torch.Generator().manual_seed(99))
    found = accuracy(load_network("reward"), judged)
    assert 0.75 < found["clean"] < 0.98 and found["labels"] > 0.7
