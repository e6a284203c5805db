"""The learned prior: its contract and gradients, its files, a training that learns, and the bundled file
beside the exact prior.
"""

import pytest
import torch

from eg3d_rlhf.core.bundled import VIEW_PRIOR
from eg3d_rlhf.core.interfaces import DiffusionPrior
from eg3d_rlhf.generators.assets.views import DISTANCE, evenly_around
from eg3d_rlhf.rewards import box_prompts
from eg3d_rlhf.rewards import boxes as problem
from eg3d_rlhf.tuning.distill.priors.tiny_unet import TinyPrior, TinySizes, TinyUNet, load_view_prior
from eg3d_rlhf.tuning.distill.schedule import NoiseSchedule
from tests.rejections import raising

TEXTS = [box_prompts.PROMPTS[0].text] * 4 + [box_prompts.PROMPTS[14].text] * 4


def small() -> TinyPrior:
    torch.manual_seed(0)
    network = TinyUNet(
        TinySizes(fine=8, coarse=8, width=8, embedding=4), [prompt.text for prompt in box_prompts.PROMPTS]
    )
    for block in (network.fine, network.coarse, network.late):  # blocks begin as nothing
        torch.nn.init.normal_(block.second.weight, std=0.1)
    torch.nn.init.normal_(network.views.out.weight, std=0.3)
    return TinyPrior(network)


def noised(t: int, seed: int = 0):
    """x, x_t, noise [8, 4, 16, 16] of two objects, one of each kind, and t [8]."""
    rng = torch.Generator().manual_seed(seed)
    both = problem.modes_of(TEXTS) * 2 - 1
    x = both[torch.arange(8), torch.randint(2, (8,), generator=rng)]
    noise = torch.randn(x.shape, generator=rng)
    times = torch.full((8,), t)
    return x, NoiseSchedule().mix(x, noise, times), noise, times


def test_it_is_a_prior_of_four_views():
    prior = small()
    assert isinstance(prior, DiffusionPrior) and prior.views == 4
    _, x_t, _, t = noised(300)
    cond = prior.embed(TEXTS)
    cameras = evenly_around(2, 4, DISTANCE).cameras
    assert cond.shape == (8, 1, 4) and torch.equal(prior.embed([""] * 2)[0], prior.embed([""])[0])
    alone = prior.predict_noise(x_t, t, cond)
    for seen in (cameras, cameras[:, :16]):
        assert torch.equal(alone, prior.predict_noise(x_t, t, cond, seen))
    moved = x_t.clone()
    moved[1] += 1  # another view of the first asset
    other = prior.predict_noise(moved, t, cond)
    assert (other[0] - alone[0]).abs().max() > 1e-5 and torch.allclose(other[4:], alone[4:], atol=1e-6)
    assert not torch.allclose(alone, prior.predict_noise(x_t, t, cond, cameras.roll(1, 0)))
    assert not torch.allclose(alone, prior.predict_noise(x_t, t, prior.embed([""] * 8)))
    with raising("--prior", "4", "3"):
        prior.predict_noise(x_t[:3], t[:3], cond[:3])
    with raising("--prompt", "'a cat'"):
        prior.embed(["a cat"])


def test_gradients_are_finite_differences():
    prior = small()
    prior.network.double()
    _, x_t, _, t = noised(400)
    x_t = x_t[:4].double().requires_grad_()
    cond = prior.embed(TEXTS[:4]).detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, c: prior.predict_noise(x, t[:4], c), (x_t, cond), fast_mode=True
    )


@pytest.fixture(scope="module")
def bundled():
    assert VIEW_PRIOR.stat().st_size < 500_000
    return load_view_prior()


@pytest.mark.parametrize("t", [100, 300, 500])
def test_the_bundled_prior_removes_noise(bundled, t):
    x, x_t, noise, times = noised(t)
    clean = NoiseSchedule().x0(x_t, bundled.predict_noise(x_t, times, bundled.embed(TEXTS)), times)
    before = NoiseSchedule().x0(x_t, torch.zeros_like(noise), times)
    assert float((clean - x).square().mean()) < 0.25 * float((before - x).square().mean())


def test_the_bundled_prior_heeds_the_prompt(bundled):
    x, x_t, _, times = noised(700)
    swapped = TEXTS[4:] + TEXTS[:4]
    right, wrong = (
        NoiseSchedule().x0(x_t, bundled.predict_noise(x_t, times, bundled.embed(texts)), times)
        for texts in (TEXTS, swapped)
    )
    assert float((right - x).square().mean()) < 0.7 * float((wrong - x).square().mean())
