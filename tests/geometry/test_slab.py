"""sigma_grid, sample_slab and normalise_slab at the generator's edge."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.geometry.slab import _warn_not_separable, normalise_slab
from tests.geometry.stand_in import StandIn, sigma_grid
from tests.rejections import raising
from training.triplane import TriPlaneGenerator

SPEC = SlabSpec(resolution=20)

volumes = arrays.arrays(
    np.float64, st.tuples(st.integers(1, 3), *[st.integers(1, 4)] * 3), elements=st.floats(-1e3, 1e3)
)


def latents(samples=2):
    return torch.randn(samples, 2, 3, generator=torch.Generator().manual_seed(7))


def test_one_synthesis_pass_with_the_noise_mode_asked_for(stand_in):
    sigma = sigma_grid(stand_in, latents(), SPEC, noise_mode="none")
    assert sigma.shape == (2, *SPEC.shape)
    assert stand_in.noise_modes == ["none"]
    sigma_grid(stand_in, latents(), SPEC)
    assert stand_in.noise_modes[1:] == ["const"]


def test_gradient_reaches_the_latents(stand_in):
    ws = latents().requires_grad_()
    grads = [
        torch.autograd.grad(sigma_grid(stand_in, ws, SPEC, impl=impl).square().mean(), ws)[0]
        for impl in ("separable", "pointwise")
    ]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)


def test_the_generators_box_warp_scales_the_planes():
    """Twice the box on both sides is the same slab."""
    small = StandIn(box_warp=1.0)
    large = StandIn(box_warp=2.0)
    torch.testing.assert_close(
        sigma_grid(small, latents(), SlabSpec(resolution=20)),
        sigma_grid(large, latents(), SlabSpec(resolution=20, box_warp=2.0)),
    )


def test_oblique_planes_fall_back_with_one_warning(stand_in):
    angle = torch.tensor(0.3)
    c = angle.cos()
    s = angle.sin()
    o = torch.tensor(0.0)
    i = torch.tensor(1.0)
    stand_in.renderer.plane_axes = stand_in.renderer.plane_axes @ torch.stack(
        [c, s, o, -s, c, o, o, o, i]
    ).view(3, 3)
    _warn_not_separable.cache_clear()
    with pytest.warns(UserWarning, match="axis-aligned"):
        first = sigma_grid(stand_in, latents(), SPEC)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = sigma_grid(stand_in, latents(), SPEC)
        torch.testing.assert_close(sigma_grid(stand_in, latents(), SPEC, impl="pointwise"), first)
    torch.testing.assert_close(first, second)
    with raising("impl='separable'", "axis-aligned"):
        sigma_grid(stand_in, latents(), SPEC, impl="separable")


def test_the_real_generator_agrees_with_its_own_point_sampler(layout):
    """TriPlaneGenerator.sample_mixed, which is independent of this package, is the oracle; gradients reach
    mapping and backbone.
    """
    torch.manual_seed(0)
    rendering = {
        "superresolution_module": "training.superresolution.SuperresolutionHybrid2X",
        "sr_antialias": True,
        "box_warp": 1.0,
        "c_gen_conditioning_zero": False,
        "c_scale": 1,
        "superresolution_noise_mode": "none",
        "density_noise": 0,
    }
    G = TriPlaneGenerator(
        16,
        25,
        512,
        128,
        3,
        rendering_kwargs=rendering,
        mapping_kwargs={"num_layers": 2},
        plane_resolution=16,
        plane_channels=8,
        plane_layout=layout,
        channel_base=256,
        channel_max=16,
        decoder_hidden_dim=16,
        sr_kwargs={"channel_base": 1024, "channel_max": 16, "fused_modconv_default": "inference_only"},
    ).eval()
    ws = G.mapping(torch.randn(2, 16), torch.randn(2, 25))
    sigma = sigma_grid(G, ws, SPEC)
    x, y, z = SPEC.axes()
    points = (
        torch.stack(torch.meshgrid(z, y, x, indexing="ij")[::-1], dim=-1).reshape(1, -1, 3).expand(2, -1, -1)
    )
    expected = G.sample_mixed(points, None, ws, noise_mode="const")["sigma"].view(2, *SPEC.shape)
    torch.testing.assert_close(sigma, expected, rtol=1e-4, atol=1e-5)
    sigma.square().mean().backward()
    for name in (
        "backbone.mapping.fc0.weight",
        "backbone.synthesis.b16.conv1.weight",
        "decoder.net.0.weight",
        "decoder.net.2.bias",
    ):
        assert G.get_parameter(name).grad.abs().sum() > 0, name


@given(volumes, st.floats(0.01, 100), st.floats(-100, 100))
def test_normalisation_ignores_scale_and_offset(values, scale, offset):
    sigma = torch.from_numpy(values)
    span = sigma.flatten(1).amax(1) - sigma.flatten(1).amin(1)
    if ((span > 0) & (span < 1e-3)).any():  # the offset would round such a span away
        return
    torch.testing.assert_close(
        normalise_slab(sigma * scale + offset), normalise_slab(sigma), rtol=1e-6, atol=1e-6
    )


@given(volumes, st.floats(0.1, 1000))
def test_normalisation_spans_zero_to_value_max(values, value_max):
    sigma = torch.from_numpy(values)
    flat = normalise_slab(sigma, value_max).flatten(1)
    constant = sigma.flatten(1).amax(1) == sigma.flatten(1).amin(1)
    assert not flat.isnan().any()
    assert (flat.amin(1) == 0).all()
    torch.testing.assert_close(
        flat.amax(1),
        torch.where(constant, 0.0, torch.tensor(value_max, dtype=torch.float64)),
        rtol=1e-9,
        atol=0,
    )


def test_constant_slab_gives_zeros_and_no_gradient_beside_an_ordinary_one():
    sigma = torch.stack([torch.full((2, 3, 4), 5.0), torch.arange(24.0).view(2, 3, 4)]).requires_grad_()
    out = normalise_slab(sigma)
    out.square().sum().backward()
    assert torch.equal(out[0], torch.zeros(2, 3, 4))
    assert torch.equal(sigma.grad[0], torch.zeros(2, 3, 4))
    assert sigma.grad[1].isfinite().all()
    assert sigma.grad[1].abs().sum() > 0


def test_normalisation_gradcheck():
    sigma = torch.randn(2, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(normalise_slab, (sigma,))
