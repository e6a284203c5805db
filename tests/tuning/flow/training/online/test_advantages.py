"""Test advantages: which shifts, scales and orders do not change them, in groups, over batches and for
several rewards; and the gate.
"""

import pytest
import torch

from eg3d_rlhf.tuning.flow.training.online.advantages import (
    Gate,
    Scale,
    advantages,
    apply_control,
    combine_rewards,
    normal_scores,
)
from eg3d_rlhf.tuning.flow.training.online.settings import check_window, progressive_window, random_window
from tests.rejections import raising


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_advantages_are_normal_within_each_group_whatever_its_scale():
    rewards = random(5, 6)
    found = advantages(rewards)
    assert found.mean(1).abs().max() < 1e-6 and (found.square().mean(1).sqrt() - 1).abs().max() < 1e-3
    torch.testing.assert_close(advantages(100 * rewards + 7), found, rtol=1e-3, atol=1e-3)
    assert advantages(rewards, clip=0.5).abs().max() == 0.5


@pytest.mark.parametrize("over", ["group", "batch", "raw", "none"])
def test_a_shift_of_each_group_changes_nothing_but_over_the_raw_batch(over):
    rewards = random(5, 6).double()
    shifts = 3 * random(5, 1, seed=1).double()
    same = torch.allclose(
        advantages(rewards + shifts, Scale(over=over)), advantages(rewards, Scale(over=over)), atol=1e-5
    )
    assert same is (over != "raw")
    torch.testing.assert_close(
        advantages(rewards + 2, Scale(over=over)), advantages(rewards, Scale(over=over))
    )
    order = torch.randperm(6)
    torch.testing.assert_close(
        advantages(rewards[:, order], Scale(over=over)), advantages(rewards, Scale(over=over))[:, order]
    )


def test_a_batch_keeps_groups_that_barely_differ_small():
    rewards = torch.stack([random(6), 0.01 * random(6, seed=1)])
    group = advantages(rewards)
    batch = advantages(rewards, Scale(over="batch"))
    assert group[1].abs().max() > 1 and batch[1].abs().max() < 0.05 and batch[0].abs().max() > 1
    assert batch.square().mean() == pytest.approx(1, abs=1e-2)


def test_a_group_without_spread_is_nothing_in_any_size():
    for size in range(2, 25):
        for value in (0.1, 0.7, 1 / 3, 1e6 + 0.1):
            rewards = torch.full([2, size], value, dtype=torch.float32)
            assert (
                not advantages(rewards).any()
                and not combine_rewards(rewards[None], [1.0]).any()
                and not normal_scores(rewards).any()
            )


def test_controls_keep_what_is_in_a_group():
    rewards = torch.arange(12.0).view(2, 6)
    seeds = [5, 6]
    assert torch.equal(apply_control(rewards, "reward", seeds), rewards) and torch.equal(
        apply_control(rewards, "inverted", seeds), -rewards
    )
    mixed = apply_control(rewards, "randomised", seeds)
    assert torch.equal(mixed.sort(1).values, rewards) and not torch.equal(mixed, rewards)
    # whatever other groups there are
    assert torch.equal(apply_control(rewards[1:], "randomised", seeds[1:]), mixed[1:])
    both = apply_control(torch.stack([rewards, -rewards]), "randomised", seeds)
    assert torch.equal(both[0], mixed) and torch.equal(both[1], -mixed)  # a sample's rewards stay together


def test_several_rewards_count_by_their_weights_and_not_by_their_scales():
    rewards = random(3, 4, 6).double()
    weights = [1.0, 0.5, 2.0]
    found = combine_rewards(rewards, weights)
    scaled = rewards * torch.tensor([1.0, 50.0, 0.2]).view(3, 1, 1) + random(3, 4, 1, seed=1)
    torch.testing.assert_close(combine_rewards(scaled, weights), found, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(
        combine_rewards(rewards, [10 * w for w in weights]), found, rtol=1e-3, atol=1e-3
    )
    one = torch.stack([combine_rewards(rewards[:1], [1.0]).flatten(), advantages(rewards[0]).flatten()])
    assert torch.corrcoef(one)[0, 1] > 1 - 1e-6
    flat = rewards.clone()
    flat[0, 2] = 0.3  # no spread in one group: the others decide there
    torch.testing.assert_close(
        combine_rewards(flat, weights, normalise_sum=False)[2],
        combine_rewards(flat[1:], weights[1:], normalise_sum=False)[2],
    )


def test_normal_scores_know_ranks_alone():
    rewards = random(3, 7)
    torch.testing.assert_close(normal_scores(rewards.exp() * 5), normal_scores(rewards))
    assert normal_scores(rewards).sum(1).abs().max() < 1e-5 and torch.equal(
        normal_scores(rewards).argsort(1), rewards.argsort(1)
    )


def test_the_gate_finds_samples_that_the_trained_reward_alone_praises():
    others = random(2, 40)
    trained = others.mean(0)
    order = others.sum(0).argsort()
    worst = order[:2]
    best = order[-2:]
    trained[best] = -1.0  # low where others are not: nobody was fooled
    trained[worst] = 9.0
    assert set(Gate()(trained, others).nonzero().flatten().tolist()) >= set(worst.tolist())
    assert not Gate()(trained, others)[best].any()


def test_the_gates_share_follows_how_far_the_rewards_have_parted():
    gate = Gate()
    others = random(2, 40)
    near = others.mean(0) + 0.1 * random(40, seed=2)
    far = random(40, seed=3)
    for trained, share in ((near, 0.1), (far, 0.11), (near - 0.0, 0.11)):
        gate(trained, others)
        assert gate.share == pytest.approx(share)
    assert len(gate.past) == 3


# Windows.


def test_windows_are_whole_and_within():
    for again in (False, True):
        found = [progressive_window(i, 3, 1, 8, stride=2, rounds=2, repeat=again) for i in range(40)]
        assert all(len(window) == 3 and window.start >= 1 and window.stop <= 8 for window in found)
        assert [window.start for window in found[:6]] == [1, 1, 3, 3, 5, 5] and (
            found[-1].start == 5 or again
        )
    begins = {
        random_window(2, 0, 5, lambda low, high, i=i: low + i % (high - low + 1)).start for i in range(8)
    }
    assert begins == {0, 1, 2, 3}


@pytest.mark.parametrize("window", [(0, 0, 4), (5, 0, 4), (2, 3, 3), (2, -1, 4), (3, 0, 9)])
def test_a_window_outside_the_sampler_is_rejected(window):
    size, first, last = window
    with raising("window", str(size), f"{first} to {last}"):
        check_window(*window, steps=8)
