"""Test the training of the small prior of score distillation."""

import torch

from builders.view_prior import PriorTraining, draw, draw_noise, reflect_between_modes, train
from eg3d_rlhf.rewards import boxes as problem
from eg3d_rlhf.tuning.distill.priors.tiny_unet import load_view_prior
from tests.tuning.distill.test_tiny_unet import TEXTS, noised


def test_training_learns_and_files_keep_it(tmp_path):
    steps: list[int] = []
    fresh = train(PriorTraining(steps=1, assets=6, seed=1))
    prior = train(PriorTraining(steps=25, assets=6, seed=1), lambda step, loss: steps.append(step))
    _, x_t, noise, t = noised(500)
    before, after = (
        float((made.predict_noise(x_t, t, made.embed(TEXTS)) - noise).square().mean())
        for made in (fresh, prior)
    )
    assert steps == list(range(25)) and after < 0.7 * before
    prior.save(tmp_path / "p.safetensors", {})
    back = load_view_prior(tmp_path / "p.safetensors")
    first, second = (made.predict_noise(x_t, t, made.embed(TEXTS)) for made in (prior, back))
    assert torch.allclose(first, second, atol=2e-2)  # stored in half precision
    x, prompt = draw(3, torch.Generator().manual_seed(0))
    again, _ = draw(3, torch.Generator().manual_seed(0))
    assert torch.equal(x, again) and x.shape == (3, 4, 4, 16, 16) and prompt.shape == (3,)


def test_an_object_and_its_reverse_are_reflections():
    x, prompt = draw(5, torch.Generator().manual_seed(0))
    middle = problem.modes().unflatten(0, (-1, 2)).mean(1)[prompt][:, None]
    assert torch.allclose(
        reflect_between_modes((x - middle)[::2][:2], prompt[1::2]), (x - middle)[1::2], atol=1e-5
    )
    assert torch.allclose(reflect_between_modes(reflect_between_modes(x, prompt), prompt), x, atol=1e-5)
    withheld, t, noise = draw_noise(prompt, PriorTraining(), torch.Generator().manual_seed(0))
    assert torch.equal(withheld[1::2], withheld[:4:2]) and torch.equal(t[1::2], t[:4:2])
    assert torch.allclose(
        noise[1::2].flatten(1).norm(dim=1), noise[:4:2].flatten(1).norm(dim=1)
    ) and not torch.equal(noise[1], noise[0])
