"""RewardSDS on the analytic prior (R1), its weights, and its exploration."""

import pytest
import torch

from eg3d_rlhf.tuning.distill.guidance.rewardsds import RewardSds
from eg3d_rlhf.tuning.distill.guidance.settings import DenoiserSettings, NoiseWeighting, RewardSdsSettings
from eg3d_rlhf.tuning.distill.schedule import Streams
from tests.tuning.distill.particles import (
    BRIEF,
    PROMPT,
    Along,
    Towards,
    gain,
    optimise,
    prior,
    sds_outcome,
    some,
)

STREAMS = Streams(seed=1)


def weighted(made, reward, **settings) -> RewardSds:
    return RewardSds(made, RewardSdsSettings(**settings), views=1, streams=STREAMS, reward=reward)


@pytest.mark.parametrize(
    ("kind", "low", "high"),
    [("good", 0.95, 1.0), pytest.param("bad", 0.0, 0.05, marks=pytest.mark.long), ("random", 0.4, 0.6)],
)
def test_r1_the_preferred_mode_is_reached(kind, low, high):
    made = prior()
    end = optimise(weighted(made, Towards(made, kind)), made, **BRIEF)
    print("R1", kind, end, "| sds", sds_outcome())
    assert low <= end.share <= high and end.rms <= 2 * sds_outcome().rms


@pytest.mark.long
def test_r1_a_linear_reward_rises_within_the_mode():
    made = prior(1)
    soft = NoiseWeighting(strategy="weighted")
    arms = [(1.0, NoiseWeighting()), (-1.0, NoiseWeighting()), (1.0, soft)]
    ends = [
        optimise(weighted(made, Along(made, sign), weighting=weighting), made, **BRIEF)
        for sign, weighting in arms
    ]
    print("R1 linear", [(round(gain(end), 2), round(end.log_p, 2)) for end in ends], "| sds", sds_outcome(1))
    assert gain(ends[0]) > 0.75 and gain(ends[1]) < -0.75 and gain(ends[2]) > 0.75
    assert min(end.log_p for end in ends) > sds_outcome(1).log_p - 10


@pytest.mark.parametrize("strategy", ["min-max", "best", "weighted", "none", "push"])
def test_weights_follow_the_order_of_scores(strategy):
    weighting = NoiseWeighting(strategy=strategy)
    scores = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    weights = weighting(scores)
    mixed = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(weighting(scores[mixed]), weights[mixed])
    total = {"min-max": 0.8, "push": 0.0}.get(strategy, 1.0)
    torch.testing.assert_close(weights.sum(0), torch.full((4,), total))
    for column, given in zip(scores.unbind(1), weights.unbind(1), strict=True):
        assert (given[column.argsort()].diff() >= -1e-6).all()


def test_the_push_of_two_and_large_rewards():
    scores = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 2.0]])
    far = torch.tensor([True, False, True])
    got = NoiseWeighting(strategy="push")(scores, far)
    assert got.tolist() == [[1, 0, 1], [-1, 1, -1]]  # equal scores: the first wins
    weights = NoiseWeighting(strategy="weighted")(torch.tensor([[900.0], [1000.0]]))
    assert torch.isfinite(weights).all() and weights[1] == 1


def test_exploration_ends_on_the_prior():
    """A chain of many steps reaches the mode that the one-step estimate only leans to."""
    made = prior()
    x, t, prompts, *_ = some(64)
    guidance = weighted(made, Towards(made), explore_steps=30, prior=DenoiserSettings(guidance_scale=1.0))
    d = guidance.denoiser
    x_t = d.noised(x, STREAMS.noises(2, x, 0), t.clamp_min(700))
    conditioning = d.conditioning(prompts, None)
    explored = guidance.explore(x_t, t.clamp_min(700), conditioning, None, 1.0)
    one_step = d.x0(x_t, d.predict(x_t, t.clamp_min(700), conditioning, None).text, t.clamp_min(700))
    near, far = (
        made.log_prob(latents.flatten(0, 1), made.embed([PROMPT] * 128)).median()
        for latents in (explored, one_step)
    )
    assert near > far + 5
    ends_early = weighted(made, Towards(made), explore_steps=30, explore_end="t0").explore(
        x_t, t.clamp_min(700), conditioning, None, 1.0
    )
    assert 0 < (ends_early - explored).abs().max() < 0.2


def test_each_image_is_explored_from_its_own_time():
    made = prior()
    x, _, prompts, *_ = some(3)
    t = torch.tensor([60, 400, 900])
    guidance = weighted(made, Towards(made), explore_steps=15)
    x_t = guidance.denoiser.noised(x, STREAMS.noises(2, x, 0), t)
    full = guidance.explore(x_t, t, guidance.denoiser.conditioning(prompts, None), None, 7.5)
    for b in range(3):
        row = slice(b, b + 1)
        alone = guidance.explore(
            x_t[:, row], t[row], guidance.denoiser.conditioning(prompts[row], None), None, 7.5
        )
        torch.testing.assert_close(full[:, row], alone, rtol=1e-3, atol=1e-3)
