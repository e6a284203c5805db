"""The renderer from scalars against the renderer that sorts features: same images, gradients and random
sequence.
"""

import pytest
import torch

from tests.rejections import raising
from torch_utils.ops.implementations import implementation
from torch_utils.ops.triplane_decode import sample_planes_channels_first
from training.rendering import renderer as renderer_module
from training.rendering.cameras import FOV_to_intrinsics, LookAtPoseSampler, RaySampler
from training.rendering.renderer import ImportanceRenderer, MipRayMarcher2, uniform_draws
from training.triplane import OSGDecoder

FAST = ("auto", "torch")
OPTIONS = {
    "ray_start": 2.25,
    "ray_end": 3.3,
    "box_warp": 1.0,
    "depth_resolution": 9,
    "depth_resolution_importance": 7,
}
VARIANTS = [
    {},
    {"depth_resolution_importance": 0},
    {"white_back": True},
    {"density_noise": 0.5},
    {"disparity_space_sampling": True},
    {"ray_start": "auto", "ray_end": "auto"},
    {"importance_stratified": True},
    {"box_warp": 0.6},
    {"depth_resolution": 2, "depth_resolution_importance": 1},
]


def scene(layout="eg3d", n=2, resolution=6, channels=5, options=None, plane_slices=1):
    """renderer and the arguments of its forward."""
    torch.manual_seed(3)
    decoder = OSGDecoder(channels, {"decoder_lr_mul": 1, "decoder_hidden_dim": 11, "decoder_output_dim": 6})
    with torch.no_grad():
        decoder.net[2].weight[0] *= 30
    planes = torch.randn(n, 3, channels, 12, 12).requires_grad_()
    poses = LookAtPoseSampler.sample(1.5, 1.6, [0.0, 0.0, 0.0], 0.3, 0.2, radius=2.7, batch_size=n)
    rays = RaySampler()(poses, FOV_to_intrinsics(18.8).expand(n, 3, 3), resolution)
    return ImportanceRenderer(layout, plane_slices), (planes, decoder, *rays, {**OPTIONS, **(options or {})})


def render(renderer, arguments, impl):
    torch.manual_seed(11)
    with implementation(impl):
        out = renderer(*arguments)
    return out, torch.rand(1)


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("layout", ["eg3d", "fixed"])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("plane_slices", [1, 2])
def test_images_gradients_and_the_random_sequence_are_those_of_the_reference(
    impl, layout, options, plane_slices
):
    renderer, arguments = scene(layout, options=options, plane_slices=plane_slices)
    (actual, next_actual), (expected, next_expected) = (
        render(renderer, arguments, which) for which in (impl, "ref")
    )
    assert torch.equal(next_actual, next_expected)
    for value, reference in zip(actual, expected, strict=True):
        assert value.shape == reference.shape
        torch.testing.assert_close(value, reference, atol=2e-5, rtol=0)
    leaves = [arguments[0], *arguments[1].parameters()]
    cotangents = [torch.randn(value.shape, generator=torch.Generator().manual_seed(4)) for value in expected]
    pairs = zip(*(torch.autograd.grad(out, leaves, cotangents) for out in (actual, expected)), strict=True)
    for gradient, reference in pairs:
        assert (gradient - reference).abs().max() <= 1e-4 * reference.abs().max()


@pytest.mark.parametrize("options", [{}, {"density_noise": 0.5}])
def test_without_gradients_rays_go_through_in_parts(monkeypatch, options):
    renderer, arguments = scene(options=options)
    expected, after = render(renderer, arguments, "auto")
    _ = None
    monkeypatch.setattr(renderer_module, "_CPU_SAMPLES", 2 * 9 * 5)  # five of 36 rays at once
    with torch.no_grad():
        actual, after_parts = render(renderer, arguments, "auto")
    assert torch.equal(after, after_parts)
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0)


def test_a_reference_block_takes_the_straightforward_path(monkeypatch):
    renderer, arguments = scene()

    class FastPathTaken(Exception):
        """Raised by what only the fast path calls."""

    def forbidden(*_, **__):
        raise FastPathTaken

    monkeypatch.setattr(MipRayMarcher2, "accumulate", forbidden)
    monkeypatch.setattr(renderer_module, "triplane_decode", forbidden)
    render(renderer, arguments, "ref")
    with pytest.raises(FastPathTaken):
        render(renderer, arguments, "auto")


def test_a_marcher_of_ones_own_is_used():
    class Red(MipRayMarcher2):
        def forward(self, colors, densities, depths, rendering_options):
            rgb, depth, weights = super().forward(colors, densities, depths, rendering_options)
            return torch.ones_like(rgb), depth, weights

    renderer, arguments = scene()
    renderer.ray_marcher = Red()
    assert (renderer(*arguments)[0] == 1).all()


def test_a_decoder_without_weights_is_called():
    class Fog(torch.nn.Module):
        def decode(self, features):
            return {"rgb": features.sigmoid(), "sigma": features[..., :1] + 2}

    renderer, arguments = scene()
    arguments = (arguments[0], Fog(), *arguments[2:])
    (actual, _), (expected, _) = (render(renderer, arguments, impl) for impl in ("auto", "ref"))
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=0)


def test_clamp_mode_is_checked_on_both_paths():
    renderer, arguments = scene(options={"clamp_mode": "relu"})
    for impl in ("auto", "ref"):
        with raising("clamp_mode", "'softplus'", "'relu'"):
            render(renderer, arguments, impl)


@pytest.mark.parametrize("impl", ["ref", *FAST])
def test_density_only_queries(impl):
    renderer, (planes, decoder, *_, options) = scene()
    points = torch.rand(2, 50, 3) - 0.5
    with implementation(impl):
        both = renderer.run_model(planes, decoder, points, None, options)
        alone = renderer.run_model(planes, decoder, points, None, options, sigma_only=True)
    assert set(both) == {"rgb", "sigma"} and set(alone) == {"sigma"}
    torch.testing.assert_close(alone["sigma"], both["sigma"], atol=1e-5, rtol=1e-5)
    features = sample_planes_channels_first(renderer.plane_axes, planes, points, options["box_warp"])
    expected = decoder(features.transpose(2, 3))
    torch.testing.assert_close(both["sigma"], expected["sigma"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(both["rgb"], expected["rgb"], atol=1e-5, rtol=1e-5)


def test_plane_axes_that_are_replaced_are_noticed():
    renderer, (planes, decoder, *_, options) = scene("eg3d")
    points = torch.rand(2, 50, 3) - 0.5
    first = renderer.run_model(planes, decoder, points, None, options)["sigma"]
    renderer.plane_axes = renderer_module.generate_planes("fixed")
    second = renderer.run_model(planes, decoder, points, None, options)["sigma"]
    renderer.plane_axes.copy_(renderer_module.generate_planes("eg3d"))  # in place
    assert not torch.allclose(first, second)
    torch.testing.assert_close(renderer.run_model(planes, decoder, points, None, options)["sigma"], first)


def test_double_backward_through_a_rendering():
    renderer, arguments = scene(resolution=3)
    penalties = []
    for impl in ("auto", "ref"):
        (rgb, *_), _ = render(renderer, arguments, impl)
        (grad,) = torch.autograd.grad(rgb.sum(), list(arguments[1].parameters())[:1], create_graph=True)
        penalties.append(torch.autograd.grad(grad.square().sum(), arguments[1].net[2].weight)[0])
    assert (penalties[0] - penalties[1]).abs().max() <= 1e-3 * penalties[1].abs().max()


def test_stratified_draws_lie_one_in_each_part():
    torch.manual_seed(0)
    draws = uniform_draws(torch.zeros(50, 9), 7, stratified=True)
    assert torch.equal((draws * 7).floor(), torch.arange(7.0).expand(50, 7))
    assert ((draws * 7) % 1).std() > 0.25  # and anywhere within it
