"""The analytic prior against torch.distributions and automatic differentiation, in float64."""

import math

import pytest
import torch

from eg3d_rlhf.core.interfaces import DiffusionPrior
from eg3d_rlhf.tuning.distill.priors.gmm import GmmPrior
from eg3d_rlhf.tuning.distill.schedule import NoiseSchedule

SHAPE = (2, 2, 3)
DRAWS = torch.Generator().manual_seed(0)


@pytest.fixture
def made() -> GmmPrior:
    means = torch.randn(3, *SHAPE, generator=DRAWS, dtype=torch.float64)
    to_logits = torch.randn(3, 5, generator=DRAWS, dtype=torch.float64)
    prompts = {
        name: torch.randn(5, generator=DRAWS, dtype=torch.float64) for name in ("", "cup", "cup, back")
    }
    bar = NoiseSchedule().alphas_cumprod.double()
    return GmmPrior(
        means, torch.tensor([0.1, 0.3, 0.9], dtype=torch.float64), prompts, to_logits, alphas_cumprod=bar
    )


def mixture_of(made: GmmPrior, cond: torch.Tensor, bar: torch.Tensor):
    """The noised mixture of one condition [E] as torch knows it."""
    std = (bar * made.stds.square() + 1 - bar).sqrt()[:, None].expand(-1, math.prod(SHAPE))
    parts = torch.distributions.Independent(
        torch.distributions.Normal(bar.sqrt() * made.means.flatten(1), std), 1
    )
    return torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(logits=made.to_logits @ cond), parts
    )


@pytest.mark.parametrize("t", [0, 20, 500, 999])
def test_the_noise_is_the_score(made, t):
    x = torch.randn(4, *SHAPE, generator=DRAWS, dtype=torch.float64).requires_grad_()
    cond = made.embed(["cup", "", "cup", "cup"], ["side", "front", "back", "front"])
    bar = made.alphas_cumprod[t]
    assert not torch.equal(cond[0], cond[2]) and torch.equal(cond[0], cond[3])
    log_p = torch.stack(
        [mixture_of(made, c[0], bar).log_prob(row) for c, row in zip(cond, x.flatten(1), strict=True)]
    )
    score = torch.autograd.grad(log_p.sum(), x)[0]
    noise = made.predict_noise(x.detach(), torch.full((4,), t), cond)
    torch.testing.assert_close(noise, -(1 - bar).sqrt() * score, rtol=1e-9, atol=1e-9)


def test_the_likelihood_is_exact(made):
    x = torch.randn(2, *SHAPE, generator=DRAWS, dtype=torch.float64)
    cond = made.embed(["cup", ""])
    want = torch.stack(
        [
            mixture_of(made, c[0], torch.ones(())).log_prob(row)
            for c, row in zip(cond, x.flatten(1), strict=True)
        ]
    )
    torch.testing.assert_close(made.log_prob(x, cond), want)


def test_the_condition_has_a_gradient(made):
    x = torch.randn(2, *SHAPE, generator=DRAWS, dtype=torch.float64)
    t = torch.tensor([200, 700])
    cond = made.embed(["cup", ""]).requires_grad_()
    assert torch.autograd.gradcheck(lambda c: made.predict_noise(x, t, c), (cond,))


def test_images_and_latents(made):
    images = torch.rand(2, *SHAPE, generator=DRAWS, dtype=torch.float64)
    torch.testing.assert_close(made.decode(made.encode(images)), images)
    assert isinstance(made, DiffusionPrior)
    index, distance = made.nearest(made.means + 0.01)
    assert index.tolist() == [0, 1, 2] and torch.allclose(distance, torch.full_like(distance, 0.01))
