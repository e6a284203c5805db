"""Schedules, style mixing and the shape of the four phases; the reference values are in
tests/compat/test_losses.py.
"""

import pytest
import torch

from tests import tiny_runs
from training import gan_phases
from training.config import REG_TYPES, GanConfig
from training.gan_phases import GanPhases, schedule


@pytest.mark.parametrize(("kimg", "expected"), [(0, 10.0), (50, 7.5), (199, 0.05), (200, 0.0), (1000, 0.0)])
def test_blur_fades_linearly(kimg, expected):
    config = GanConfig(blur_init_sigma=10, blur_fade_kimg=200)
    assert schedule(config, kimg * 1000).blur_sigma == pytest.approx(expected)


@pytest.mark.parametrize(("kimg", "expected"), [(0, 1.0), (250, 0.875), (1000, 0.5), (5000, 0.5)])
def test_camera_swapping_fades_from_always_to_its_probability(kimg, expected):
    assert schedule(
        GanConfig(gpc_reg_prob=0.5, gpc_reg_fade_kimg=1000), kimg * 1000
    ).swapping_prob == pytest.approx(expected)


@pytest.mark.parametrize(
    ("kimg", "expected"), [(0, 64), (250, 80), (506, 96), (510, 97), (1000, 128), (9000, 128)]
)
def test_rendering_resolution_fades_in_whole_pixels(kimg, expected):
    config = GanConfig(nrr_initial=64, nrr_final=128, nrr_fade_kimg=1000)
    assert schedule(config, kimg * 1000).neural_rendering_resolution == expected


def test_zero_fades_and_absent_options_are_constant():
    config = GanConfig(blur_fade_kimg=0, gpc_reg_fade_kimg=0, nrr_initial=40)
    for nimg in (0, 123_456):
        assert schedule(config, nimg) == schedule(config, 0)
    assert schedule(config, 0).blur_sigma == 0 and schedule(config, 0).swapping_prob == 0.5
    assert schedule(config, 0).neural_rendering_resolution == 40
    assert schedule(GanConfig(gen_pose_cond=False), 0).swapping_prob is None


def phases_of(**gan) -> GanPhases:
    config = GanConfig(**{**tiny_runs.GAN, **gan})
    nets = tiny_runs.build_networks(config)
    return GanPhases(nets.G, nets.D, config)


@pytest.mark.parametrize("phase", ["g_main", "g_reg", "d_main", "d_reg"])
@pytest.mark.parametrize("reg_type", REG_TYPES)
def test_style_mixing_runs_in_every_phase(tiny_data, phase, reg_type):
    phases = phases_of(style_mixing_prob=1.0, reg_type=reg_type)
    phases.G.requires_grad_(phase[0] == "g")
    phases.D.requires_grad_(phase[0] == "d")
    torch.manual_seed(0)
    total = torch.zeros([])
    for loss in getattr(phases, phase)(tiny_runs.batch(tiny_data)):
        assert loss.value.shape == (4,) and torch.isfinite(loss.value).all()
        loss.value.mean().backward()
        total = total + loss.value.detach().abs().sum()
    module = phases.G if phase[0] == "g" else phases.D
    assert total > 0 and any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


@pytest.mark.parametrize(
    "swap", [torch.ones([4, 1], dtype=torch.bool), torch.tensor([[True], [False], [True], [False]]), None]
)
def test_the_latent_that_is_mixed_in_sees_the_true_camera(tiny_data, swap):
    """EG3D's order of draws: where to cut, whether to, then the second latent."""
    phases = phases_of(style_mixing_prob=1.0)
    batch = tiny_runs.batch(tiny_data)
    z = batch.gen_z
    c = batch.gen_c
    cond = torch.zeros_like(c) if swap is None else torch.where(swap, c.roll(1, 0), c)
    for seed in range(4):
        torch.manual_seed(seed)
        mixed = phases.ws(z, c, swap)
        torch.manual_seed(seed)
        expected = phases.G.mapping(z, cond)
        cut = int(torch.empty([], dtype=torch.int64).random_(1, expected.shape[1]))
        torch.rand([])
        expected[:, cut:] = phases.G.mapping(torch.randn_like(z), c)[:, cut:]
        assert torch.equal(mixed, expected)


def test_swapping_conditions_on_the_neighbours_camera(tiny_data):
    phases = phases_of()
    batch = tiny_runs.batch(tiny_data)
    swapped = phases.ws(batch.gen_z, batch.gen_c, torch.ones([4, 1], dtype=torch.bool))
    assert torch.equal(swapped, phases.G.mapping(batch.gen_z, batch.gen_c.roll(1, 0)))
    kept = phases.ws(batch.gen_z, batch.gen_c, torch.zeros([], dtype=torch.bool))
    assert torch.equal(kept, phases.G.mapping(batch.gen_z, batch.gen_c))
    assert torch.equal(
        phases.ws(batch.gen_z, batch.gen_c, None),
        phases.G.mapping(batch.gen_z, torch.zeros_like(batch.gen_c)),
    )


def test_r1_is_the_squared_gradient_at_both_images():
    image, raw = (torch.rand([2, 3, 4, 4], requires_grad=True) for _ in range(2))
    logits = (2 * image.sum(dim=[1, 2, 3]) + 3 * raw.square().sum(dim=[1, 2, 3]))[:, None]
    penalty = gan_phases.r1_penalty(logits, image, raw)
    torch.testing.assert_close(penalty, 48 * 4 + 36 * raw.square().sum(dim=[1, 2, 3]))
    assert torch.allclose(
        gan_phases.r1_penalty((2 * image.sum(dim=[1, 2, 3]))[:, None], image), torch.full([2], 192.0)
    )


def test_density_terms():
    sigma = torch.tensor([[1.0, 2.0, 5.0, 0.0], [0.0, 0.0, 1.0, 1.0]])[:, :, None]  # points 0, 1 against 2, 3
    assert gan_phases.density_l1(sigma).tolist() == [3.0, 1.0]
    assert gan_phases.density_monotonic(sigma, detach_front=False).tolist() == [1.0, 0.0]
    for detach in (False, True):
        leaf = sigma.clone().requires_grad_()
        gan_phases.density_monotonic(leaf, detach_front=detach).sum().backward()
        assert leaf.grad[0, :, 0].tolist() == [0.0, 0.0 if detach else 0.5, 0.0, -0.5]


def test_blur_keeps_constants_inside_and_vanishes_below_a_third_of_a_pixel():
    image = torch.rand([1, 3, 32, 32])
    assert gan_phases.blur(image, 0.3) is image
    flat = gan_phases.blur(torch.ones_like(image), 2.0)
    torch.testing.assert_close(flat[:, :, 6:-6, 6:-6], torch.ones([1, 3, 20, 20]))
    impulse = torch.zeros([1, 1, 17, 17])
    impulse[0, 0, 8, 8] = 1
    taps = [2 ** -((k / 1.5) ** 2) for k in range(-4, 5)]
    expected = torch.tensor([[a * b for b in taps] for a in taps]) / sum(taps) ** 2
    torch.testing.assert_close(
        gan_phases.blur(impulse, 1.5)[0, 0, 4:13, 4:13], expected, rtol=1e-5, atol=1e-7
    )
