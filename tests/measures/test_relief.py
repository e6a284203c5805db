"""Relief of a face: 1 for a true head against itself, less for what has no face; heights against closed forms."""

import numpy as np
import pytest
import torch

from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.measures.surface import ALIKE, correlation, front_heights, head_heights, relief
from eg3d_rlhf.measures.true_heads import HeadPose, head_distances, ramped, true_shapes

SPEC = SlabSpec.cube(64)


def surface(height):
    """Raw density [D, H, W] of the half space behind z = height(x, y)."""
    x, y, z = SPEC.points().unbind(-1)
    return 10 - 500 * (z - height(x, y))


@pytest.fixture(scope="module")
def distances():
    return head_distances(true_shapes(3), SPEC)


def test_front_heights_are_those_of_the_surface():
    x, y, _ = SPEC.axes()
    found = front_heights(surface(lambda x, y: 0.1 + 0.3 * x - 0.2 * y), SPEC)
    torch.testing.assert_close(found, (0.1 + 0.3 * x[None] - 0.2 * y[:, None]), atol=1e-5, rtol=0)
    assert front_heights(torch.full(SPEC.shape, -1.0), SPEC).isnan().all()


def test_a_fitted_head_has_the_heights_of_its_cube(distances):
    pose = HeadPose(true_shapes(3), torch.zeros(3, 3), torch.zeros(3, 1))
    x, y, z = SPEC.axes()
    traced = head_heights(pose, x[24:40], y[26:38], float(z[-1]))
    read = torch.stack([front_heights(cube, SPEC) for cube in ramped(distances)])[:, 26:38, 24:40]
    assert (traced - read).abs().median() < 5e-4 and (traced - read).abs().mean() < 1e-3  # edges, such as the nose's, differ


@pytest.mark.parametrize(("quadratic", "ignored"), [(False, lambda x, y: 3 + 2 * x - y), (True, lambda x, y: x - 5 * x * y + 4 * y * y)])
def test_correlation_of_maps(quadratic, ignored):
    y, x = np.meshgrid(np.linspace(-1, 1, 9), np.linspace(-1, 1, 7), indexing="ij")
    wave = np.sin(5 * x) * np.cos(4 * y)
    assert correlation(wave, 2 * wave + ignored(x, y), quadratic) == pytest.approx(1)
    assert correlation(wave, ignored(x, y) - wave, quadratic) == pytest.approx(-1)
    assert correlation(wave, ignored(x, y), quadratic) == pytest.approx(0, abs=0.2) and correlation(0 * wave, wave, quadratic) == 0


def test_true_heads_have_the_relief_of_their_nearest_head_and_lose_it(distances):
    heads = relief(ramped(distances), SPEC)
    assert heads.plane.min() > 0.98 and heads.detail.min() > 0.95
    x, y, z = SPEC.points().unbind(-1)
    pressed = torch.maximum(distances, z - 0.13)  # the face cut off flat
    flat = relief(ramped(pressed), SPEC)
    assert (flat.detail < ALIKE).all() and (flat.plane < heads.plane).all()
    empty = relief(torch.cat([torch.full_like(distances[:1], -5.0), ramped(distances[:1])]), SPEC)
    assert empty.plane[0] == empty.detail[0] == 0 and empty.plane[1] == pytest.approx(heads.plane[0], abs=5e-3)
