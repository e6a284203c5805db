"""The separable path against the point-wise oracle and plain autograd."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.geometry.slab import DecoderWeights, sigma_from_planes, tri_grid_density
from tests.geometry.stand_in import random_planes, random_weights
from tests.rejections import raising
from torch_utils.ops.slab_density import slab_density
from torch_utils.ops.triplane_decode import projection_axes
from training.fullhead import sample_tri_grid
from training.rendering.renderer import generate_planes

SPEC = SlabSpec(resolution=24, crop=(0.1, 0.2, 0.0, 0.3, 0.25, 0.15))  # [D, H, W] of three different sizes


def with_grad(planes, weights):
    return planes.clone().requires_grad_(), DecoderWeights(*(w.clone().requires_grad_() for w in weights))


def forward_backward(planes, weights, axes, impl, box_warp=1.0, cotangent=None):
    planes, weights = with_grad(planes, weights)
    sigma = sigma_from_planes(planes, axes, weights, SPEC, box_warp, impl)
    if cotangent is None:
        cotangent = torch.randn(sigma.shape, generator=torch.Generator().manual_seed(3), dtype=sigma.dtype)
    return sigma.detach(), torch.autograd.grad(sigma, [planes, *weights], cotangent)


def relative(a, b):
    return ((a - b).norm() / b.norm().clamp_min(1e-12)).item()


def test_projection_axes_of_the_two_layouts():
    assert projection_axes(generate_planes("eg3d")) == ((0, 1), (0, 2), (2, 0))
    assert projection_axes(generate_planes("fixed")) == ((0, 1), (0, 2), (2, 1))


@pytest.mark.parametrize("scale", [2.0, -1.0])
def test_scaled_or_mirrored_axes_are_not_separable(scale):
    axes = generate_planes("eg3d")
    axes[1] *= scale
    assert projection_axes(axes) is None


@pytest.mark.parametrize("box_warp", [1.0, 1.7, 0.6])  # 0.6: part of the slab lies outside the planes
def test_equals_pointwise_with_gradients(layout, box_warp):
    planes = random_planes(2, 5, 16, 21)
    weights = random_weights(5, 7)
    axes = generate_planes(layout)
    fast, fast_grads = forward_backward(planes, weights, axes, "separable", box_warp)
    slow, slow_grads = forward_backward(planes, weights, axes, "pointwise", box_warp)
    assert fast.shape == (2, *SPEC.shape)
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=2e-5)
    for got, expected in zip(fast_grads, slow_grads, strict=True):
        assert relative(got, expected) < 1e-4


def test_only_the_pointwise_density_has_a_second_derivative(layout):
    planes = random_planes(1, 3, 9, 9)
    weights = random_weights(3, 4)
    axes = generate_planes(layout)
    planes = planes.requires_grad_()
    with raising("slab_density", "create_graph=True", '"ref"', kind=RuntimeError):
        torch.autograd.grad(sigma_from_planes(planes, axes, weights, SPEC).sum(), planes, create_graph=True)
    sigma = sigma_from_planes(planes, axes, weights, SPEC, impl="pointwise")
    (first,) = torch.autograd.grad(sigma.sum(), planes, create_graph=True)
    assert torch.autograd.grad(first.square().sum(), planes)[0].abs().max() > 0


def test_one_point_by_hand():
    """float64 numpy, from the definition: bilinear samples, mean over planes, two layers."""
    planes = random_planes(1, 2, 8, 8, torch.float64)
    weights = random_weights(2, 3, torch.float64)
    sigma = sigma_from_planes(planes, generate_planes("eg3d"), weights, SPEC)
    d = 5
    h = 7
    w = 3
    x, y, z = (float(axis[i]) * 2 for axis, i in zip(SPEC.axes(), (w, h, d), strict=True))
    feature = np.zeros(2)
    for plane, (u, v) in zip(planes[0].numpy(), ((x, y), (x, z), (z, x)), strict=True):
        column = ((u + 1) * 8 - 1) / 2
        row = ((v + 1) * 8 - 1) / 2
        for i in (int(np.floor(row)), int(np.floor(row)) + 1):
            for j in (int(np.floor(column)), int(np.floor(column)) + 1):
                if 0 <= i < 8 and 0 <= j < 8:
                    feature += plane[:, i, j] * (1 - abs(row - i)) * (1 - abs(column - j)) / 3
    w0, b0, w_sigma, b_sigma = (t.numpy() for t in weights)
    assert sigma[0, d, h, w].item() == pytest.approx(
        w_sigma @ np.log1p(np.exp(w0 @ feature + b0)) + b_sigma, rel=1e-10
    )


def random_maps(size, pairs, dtype, scale=1.0):
    x, j, y, z = size
    shapes = {"xy": (x, j, y, 1), "xz": (x, j, 1, z), "yz": (1, j, y, z)}
    rng = torch.Generator().manual_seed(11)
    return [
        (torch.randn(shapes[pair], generator=rng, dtype=dtype) * scale).requires_grad_() for pair in pairs
    ]


def test_chunks_do_not_change_the_values():
    maps = random_maps((6, 5, 7, 4), ("xy", "xz", "yz"), torch.float32)
    w = torch.randn(5)
    b = torch.zeros(())
    values = [slab_density(maps, w, b, (6, 7, 4), chunk=chunk) for chunk in (1, 37, 140, 300, 10**6)]
    for other in values[1:]:
        torch.testing.assert_close(other, values[0], rtol=1e-6, atol=1e-6)


def test_saved_for_backward_does_not_grow_with_the_volume_times_hidden(layout):
    """Autograd keeps the pair maps, the planes and small matrices: far below volume * hidden,
    at any resolution.
    """
    planes, weights = with_grad(random_planes(1, 4, 16, 16), random_weights(4, 32))
    sizes = {}
    for resolution in (16, 32):
        kept = {}

        def pack(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            sigma = sigma_from_planes(planes, generate_planes(layout), weights, SlabSpec.cube(resolution))
        sizes[resolution] = sum(kept.values())
        assert sigma.shape == (1, resolution, resolution, resolution)
    assert sizes[32] < 4.5 * sizes[16]  # area, not volume (which would be 8)
    assert sizes[32] < 32**3 * 32 / 4


# Density of a tri-grid from its slices, against the sampler at every point.


def at_points(planes, layout, weights, axes, extent):
    """The definition: [N, X, Y, Z]."""
    points = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    flat = points.reshape(1, -1, 3).expand(len(planes), -1, -1)
    features = sample_tri_grid(generate_planes(layout).to(planes), planes, flat, 2.0, extent).mean(dim=1)
    hidden = functional.softplus(functional.linear(features, weights.w0, weights.b0))
    return (hidden @ weights.w_sigma + weights.b_sigma).unflatten(1, points.shape[:3])


@pytest.mark.parametrize("layout", ["panohead", "fixed"])
@pytest.mark.parametrize(("slices", "extent"), [(3, 1.0), (1, 1.0), (2, 1.0), (3, 1.5), (4, 1.3)])
def test_values_and_gradients(layout, slices, extent):
    rng = torch.Generator().manual_seed(slices)
    planes = torch.randn(2, 3, 4, slices, 7, 9, generator=rng, dtype=torch.float64, requires_grad=True)
    weights = DecoderWeights(*(w.requires_grad_() for w in random_weights(4, 6, torch.float64)))
    axes = [
        torch.linspace(-1.1, 1.2, 6).double(),
        torch.linspace(-0.7, 1, 5).double(),
        torch.linspace(-1, 0.9, 8).double(),
    ]
    orders = [tuple(row.argmax(dim=1).tolist()) for row in generate_planes(layout)]
    computed = tri_grid_density(planes, orders, weights, axes, extent)
    expected = at_points(planes, layout, weights, axes, extent)
    torch.testing.assert_close(computed, expected, rtol=0, atol=1e-12)
    cotangent = torch.randn(computed.shape, generator=rng, dtype=torch.float64)
    for ours, theirs in zip(
        *(torch.autograd.grad(s, (planes, *weights), cotangent) for s in (computed, expected)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)
    with torch.no_grad():
        torch.testing.assert_close(
            tri_grid_density(planes, orders, weights, axes, extent), expected, rtol=0, atol=1e-12
        )


def test_blocks_of_any_size_give_the_same(monkeypatch):
    planes = torch.randn(1, 3, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    weights = random_weights(4, 6)
    axes = [torch.linspace(-1, 1, 9)] * 3
    orders = [(0, 1, 2), (0, 2, 1), (1, 2, 0)]
    at_once = tri_grid_density(planes, orders, weights, axes)
    monkeypatch.setattr("eg3d_rlhf.geometry.slab._CPU_BLOCK", 6 * 9 * 2)  # two rows of x
    torch.testing.assert_close(tri_grid_density(planes, orders, weights, axes), at_once)
