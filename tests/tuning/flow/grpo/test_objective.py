"""Advantages and the clipped loss against loops and limits."""

import math

import pytest
import torch

from eg3d_rlhf.tuning.flow.grpo.objective import advantages, as_used, clipped, clipped_loss


def test_advantages_are_normal_within_each_group_whatever_its_scale():
    rewards = torch.rand(5, 6, generator=torch.Generator().manual_seed(0))
    found = advantages(rewards)
    assert found.mean(1).abs().max() < 1e-6 and (found.square().mean(1).sqrt() - 1).abs().max() < 1e-3
    torch.testing.assert_close(advantages(100 * rewards + 7), found, rtol=1e-3, atol=1e-3)
    assert advantages(torch.full([2, 3], 0.1)).abs().max() == 0


def test_controls_keep_what_is_in_a_group():
    rewards, seeds = torch.arange(12.0).view(2, 6), [5, 6]
    assert torch.equal(as_used(rewards, "reward", seeds), rewards) and torch.equal(as_used(rewards, "inverted", seeds), -rewards)
    mixed = as_used(rewards, "shuffled", seeds)
    assert torch.equal(mixed.sort(1).values, rewards) and not torch.equal(mixed, rewards)
    assert torch.equal(as_used(rewards[1:], "shuffled", seeds[1:]), mixed[1:])  # whatever other groups there are


@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize("ratio", [0.5, 0.99, 1.0, 1.01, 2.0])
def test_the_loss_is_the_clipped_one_and_its_gradient_ends_with_the_clip(advantage, ratio):
    log_p = torch.tensor([math.log(ratio)], requires_grad=True)
    old, A = torch.zeros(1), torch.tensor([advantage])
    loss = clipped_loss(log_p, old, A, 0.1)
    assert float(loss.detach()) == pytest.approx(-min(ratio * advantage, min(max(ratio, 0.9), 1.1) * advantage), rel=1e-6)
    loss.backward()
    cut = (ratio > 1.1 and advantage > 0) or (ratio < 0.9 and advantage < 0)
    assert bool(clipped(log_p, old, A, 0.1)) is cut
    assert float(log_p.grad) == pytest.approx(0 if cut else -ratio * advantage, rel=1e-6)
