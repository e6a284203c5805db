"""Density of a tri-grid from its slices, against the sampler at every point."""

import pytest
import torch
from torch.nn import functional

from eg3d_rlhf.geometry.slab import DecoderWeights
from eg3d_rlhf.geometry.tri_grid import tri_grid_density
from tests.geometry.stand_in import random_weights
from training.fullhead import sample_tri_grid
from training.rendering.renderer import generate_planes


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
    axes = [torch.linspace(-1.1, 1.2, 6).double(), torch.linspace(-0.7, 1, 5).double(), torch.linspace(-1, 0.9, 8).double()]
    orders = [tuple(row.argmax(dim=1).tolist()) for row in generate_planes(layout)]
    found, expected = tri_grid_density(planes, orders, weights, axes, extent), at_points(planes, layout, weights, axes, extent)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    cotangent = torch.randn(found.shape, generator=rng, dtype=torch.float64)
    for ours, theirs in zip(*(torch.autograd.grad(s, (planes, *weights), cotangent) for s in (found, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)
    with torch.no_grad():
        torch.testing.assert_close(tri_grid_density(planes, orders, weights, axes, extent), expected, rtol=0, atol=1e-12)


def test_blocks_of_any_size_give_the_same(monkeypatch):
    planes, weights = torch.randn(1, 3, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1)), random_weights(4, 6)
    axes, orders = [torch.linspace(-1, 1, 9)] * 3, [(0, 1, 2), (0, 2, 1), (1, 2, 0)]
    whole = tri_grid_density(planes, orders, weights, axes)
    monkeypatch.setattr("eg3d_rlhf.geometry.tri_grid._CPU_BLOCK", 6 * 9 * 2)  # two rows of x
    torch.testing.assert_close(tri_grid_density(planes, orders, weights, axes), whole)
