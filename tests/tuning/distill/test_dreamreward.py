"""DreamReward on the analytic prior, with inverted and random arms, and how two gradients are balanced."""

import pytest
import torch

from eg3d_rlhf.tuning.distill.gradients import Balance, norm_per_asset
from eg3d_rlhf.tuning.distill.guidance.dreamreward import DreamReward
from eg3d_rlhf.tuning.distill.guidance.settings import DreamRewardSettings
from eg3d_rlhf.tuning.distill.schedule import Streams
from eg3d_rlhf.tuning.distill.schedules_by_step import Ramp
from tests.tuning.distill.particles import BRIEF, Along, gain, optimise, prior, sds_outcome, some

STREAMS = Streams(seed=1)


class Slope(Along):
    """A reward whose slope is drawn anew at each call."""

    def score(self, pixels, prompts):
        draws = torch.Generator().manual_seed(int(pixels.detach().abs().sum() * 1e4))
        return (pixels * torch.randn(pixels.shape, generator=draws)).mean((1, 2, 3))


def rewarded(made, reward, weight=0.3, **settings) -> DreamReward:
    return DreamReward(
        made, DreamRewardSettings(weight=Ramp(weight), **settings), views=1, streams=STREAMS, reward=reward
    )


@pytest.mark.parametrize(
    ("reward", "low", "high"),
    [
        (Along, 0.8, 3.0),
        pytest.param(lambda made: Along(made, -1.0), -3.0, -0.8, marks=pytest.mark.long),
        (Slope, -0.1, 0.1),
    ],
)
def test_the_reward_moves_images_within_the_mode(reward, low, high):
    made = prior(1)
    end = optimise(rewarded(made, reward(made), 0.1), made, **BRIEF)
    print("DreamReward", gain(end), end)
    assert low < gain(end) < high and end.log_p > sds_outcome(1).log_p - 3


def test_the_weight_is_a_share_of_the_norm():
    made = prior()
    args = some()
    base = rewarded(made, Along(made), 0.0)(*args)
    for weight in (0.3, 2.0):
        added = rewarded(made, Along(made, 1e5), weight)(*args).grad - base.grad
        torch.testing.assert_close(
            norm_per_asset(added, 1), weight * norm_per_asset(base.grad, 1), rtol=1e-3, atol=1e-3
        )
        assert (added < 0).all()  # x - grad moves along the reward


def test_the_gradient_of_the_loss_is_that_of_the_mean_reward():
    """balance none: weight times the derivative of the mean over assets of the loss."""
    made = prior()
    views = 2
    x, t, prompts, *_ = some(3, views)
    settings = DreamRewardSettings(weight=Ramp(0.5), balance="none", x0_until=-1)
    output = DreamReward(made, settings, views=views, streams=STREAMS, reward=Along(made, 3.0))(
        x, t, prompts, None, 0
    )
    still = DreamRewardSettings(weight=Ramp(0.0))
    alone = DreamReward(made, still, views=views, streams=STREAMS, reward=Along(made))(x, t, prompts, None, 0)
    leaf = x.clone().requires_grad_()
    (0.5 * -3.0 * leaf.mean((1, 2, 3)).mean()).backward()
    torch.testing.assert_close((output.grad - alone.grad) / len(x), leaf.grad, rtol=1e-3, atol=1e-6)


def test_a_ceiling_ends_the_reward():
    made = prior()
    args = some()
    below, above = (rewarded(made, Along(made), ceiling=c)(*args) for c in (100.0, -100.0))
    assert (below.terms["preference_norm"] > 0).all() and (above.terms["preference_norm"] == 0).all()


def test_the_first_and_the_last_steps():
    made = prior()
    args = some()
    guidance = rewarded(made, Along(made), 0.3, reward_from=2, reward_only_from=5)
    outputs = [guidance(*args[:4], step) for step in range(6)]
    assert [o.scores is not None for o in outputs] == [False, False, True, True, True, True]
    spreads = [outputs[step].grad.flatten(1).std(1) for step in (4, 5)]
    # the linear reward's gradient alone is the same at each pixel
    assert (spreads[1] < 1e-5).all() and (spreads[0] > 0.1).all()


def test_images_get_their_own_gradient():
    made = prior()
    args = some()
    images = made.decode(args[0])
    latents = rewarded(made, Along(made), 0.3, balance="none")(*args)
    pixels = rewarded(made, Along(made), 0.3, balance="none", through="images")(*args, images)
    leaf = images.clone().requires_grad_()
    torch.testing.assert_close(
        torch.autograd.grad(made.encode(leaf), leaf, latents.grad - pixels.grad)[0], pixels.image_grad
    )


def test_balance_is_a_mean_of_the_last_steps():
    balance = Balance(window=3)
    ones = torch.ones(2)
    assert balance(ones, torch.tensor([0.0, 2.0])).tolist() == [0.0, 0.5]
    assert balance(3 * ones, torch.tensor([1.0, 2.0])).tolist() == [4.0, 1.0]
    for _ in range(3):
        last = balance(ones, ones)
    assert last.tolist() == [1.0, 1.0]
    again = Balance(window=3)
    again.load_state_dict(balance.state_dict())
    assert torch.equal(again(5 * ones, ones), balance(5 * ones, ones))


def test_a_rewards_dropout_is_off():
    made = prior()

    class Network(torch.nn.Module):
        modality = "image"
        views = 1
        differentiable = True

        def score(self, pixels, prompts):
            return torch.nn.functional.dropout(pixels, 0.5, self.training).mean((1, 2, 3))

    network = Network().train()
    rewarded(made, network)
    assert not network.training
