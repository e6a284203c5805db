"""From cameras to the words of a prompt, and Perp-Neg through a guidance."""

import math

import pytest
import torch

from eg3d_rlhf.rewards.images.analytic import Inverted
from eg3d_rlhf.tuning.distill import gradients
from eg3d_rlhf.tuning.distill.guidance.denoiser import mixture, view_direction
from eg3d_rlhf.tuning.distill.guidance.sds import Sds
from eg3d_rlhf.tuning.distill.guidance.settings import DenoiserSettings, SdsSettings
from eg3d_rlhf.tuning.distill.methods import make_guidance, make_settings
from eg3d_rlhf.tuning.distill.priors.gmm import GmmPrior
from eg3d_rlhf.tuning.distill.schedule import Streams

VIEWS = [(0.0, 10.0), (10.0, 100.0), (70.0, -160.0), (-5.0, -170.0)]  # elevation, azimuth


def cameras() -> torch.Tensor:
    """Cameras [4, 16] at those angles, y up."""
    made = torch.eye(4).repeat(len(VIEWS), 1, 1)
    for camera, (up, round_) in zip(made, VIEWS, strict=True):
        up = math.radians(up)
        round_ = math.radians(round_)
        camera[:3, 3] = 2.7 * torch.tensor(
            [math.cos(up) * math.sin(round_), math.sin(up), math.cos(up) * math.cos(round_)]
        )
    return made.flatten(1)


@pytest.fixture
def made() -> GmmPrior:
    draws = torch.Generator().manual_seed(0)
    names = ("cup", "cup, front", "cup, side", "cup, back", "cup, overhead", "")
    return GmmPrior(
        torch.randn(3, 1, 2, 2, generator=draws),
        torch.ones(3),
        {n: torch.randn(3, generator=draws) for n in names},
    )


def run(made, **settings):
    x = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([100, 300, 500, 700])
    streams = Streams(seed=0)
    guidance = Sds(made, SdsSettings(prior=DenoiserSettings(**settings)), views=1, streams=streams)
    noise = streams.noises(1, x, 3)[0]
    return (
        guidance(x, t, ["cup"] * 4, cameras(), 3).grad,
        guidance.denoiser.schedule.mix(x, noise, t),
        noise,
        t,
        guidance.denoiser.schedule,
    )


def test_the_prompt_names_the_side(made):
    grad, x_t, noise, t, schedule = run(made, view_prompts=True, weighting="uniform")
    sides = [view_direction(*view) for view in VIEWS]
    assert sides == ["front", "side", "overhead", "back"]
    text, null = (
        made.predict_noise(x_t, t, c) for c in (made.embed(["cup"] * 4, sides), made.embed([""] * 4))
    )
    torch.testing.assert_close(grad, gradients.guided(text, null, 7.5) - noise)
    assert not torch.allclose(grad, run(made, weighting="uniform")[0])
    # the negative prompt names no side
    grad, *_ = run(made, view_prompts=True, negative_prompt="cup", weighting="uniform")
    torch.testing.assert_close(
        grad, gradients.guided(text, made.predict_noise(x_t, t, made.embed(["cup"] * 4)), 7.5) - noise
    )


def test_perp_neg(made):
    grad, x_t, noise, t, schedule = run(made, view_prompts=True, perp_neg=True)
    null = made.embed([""] * 4)
    wanted = []
    for b, view in enumerate(VIEWS):
        shares, negatives, weights = mixture(*view)
        row = slice(b, b + 1)
        text = sum(share * made.embed(["cup"], [side]) for side, share in shares.items())
        others = [null[row] if n is None else made.embed(["cup"], [n]) for n in negatives]
        seen = [made.predict_noise(x_t[row], t[row], c) for c in (text, null[row], *others)]
        wanted.append(
            gradients.perp_neg(seen[0], seen[1], torch.stack(seen[2:]), torch.tensor([weights]), 7.5)
            - noise[row]
        )
    torch.testing.assert_close(
        grad, schedule.weight(t, "sds", grad) * torch.cat(wanted), rtol=1e-4, atol=1e-5
    )


class Listening:
    """A reward that records its prompts."""

    views = 1
    modality = "image"
    differentiable = True

    def __init__(self, view_prompts: bool):
        self.view_prompts = view_prompts
        self.prompts = []

    def score(self, pixels, prompts):
        self.prompts += prompts
        return pixels.flatten(1).mean(1)


@pytest.mark.parametrize("method", ["dreamreward", "dreamdpo", "rewardsds", "psd"])
def test_a_reward_trained_with_the_side_gets_it(made, method):
    x = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([100, 300, 500, 700])
    for view_prompts in (False, True):
        reward = Listening(view_prompts)
        guidance = make_guidance(
            method, make_settings(method, {}), made, Inverted(reward), None, 1, Streams(seed=0)
        )
        guidance(x, t, ["cup"] * 4, cameras(), 0)
        sides = ["cup, front view", "cup, side view", "cup, overhead view", "cup, back view"]
        assert set(reward.prompts) == (set(sides) if view_prompts else {"cup"}) and reward.prompts[:4] == (
            sides if view_prompts else ["cup"] * 4
        )
