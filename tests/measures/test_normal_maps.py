"""Normal maps against spheres, whose normals are known; true heads and their mirror images."""

import math

import pytest
import torch

from eg3d_rlhf.core.field import Bounds
from eg3d_rlhf.measures.shape_critic import RESOLUTION, YAWS, box, mirrored, normal_maps
from eg3d_rlhf.measures.true_heads import RAMPS, head_distances, ramped, true_shapes

SPEC = box(Bounds())
HALF = (RESOLUTION - 1) * SPEC.voxel / 2


def sphere(radius: float, centre=(0.0, 0.0, 0.0)) -> torch.Tensor:
    """Raw density [1, R, R, R] of a sphere placed from the box's own centre."""
    middle = torch.tensor([float((axis[0] + axis[-1]) / 2) for axis in SPEC.axes()])
    return ramped((SPEC.points() - middle - torch.tensor(centre)).norm(dim=-1) - radius)[None]


@pytest.mark.parametrize("centre", [(0.0, 0.0, 0.0), (0.08, 0.05, -0.04)])
def test_normals_of_a_sphere(centre):
    radius = 0.12
    for yaw, found in zip(YAWS, normal_maps(sphere(radius, centre))[0], strict=True):
        line = torch.linspace(-HALF, HALF, RESOLUTION)
        v, u = torch.meshgrid(line.flip(0), line, indexing="ij")
        u = u - (centre[0] * math.cos(yaw) - centre[2] * math.sin(yaw))  # the view's right is (cos, 0, -sin)
        v = v - centre[1]
        inside = u**2 + v**2 <= (0.85 * radius) ** 2
        expected = torch.stack([u, v, (radius**2 - u**2 - v**2).clamp_min(0).sqrt()]) / radius
        cosine = (found[:3] * expected).sum(dim=0)[inside]
        assert torch.rad2deg(cosine.clamp(-1, 1).acos()).max() < 6 and torch.rad2deg(cosine.clamp(-1, 1).acos()).mean() < 1.5
        area = found[3].sum() * SPEC.voxel**2
        assert area == pytest.approx(math.pi * radius**2, rel=0.02)


def test_an_empty_box_and_one_that_is_full():
    assert normal_maps(torch.full((1, *SPEC.shape), -5.0)).eq(0).all()
    full = normal_maps(torch.full((1, *SPEC.shape), 500.0), yaws=(0.0,))[0, 0]
    assert full[3].eq(1).all() and full[2, 1:-1, 1:-1].allclose(torch.tensor(1.0))
    with pytest.raises(ValueError, match="normal_maps: expected sigma"):
        normal_maps(torch.zeros(1, 8, 8, 8))


def test_heads_are_the_same_under_any_ramp_and_symmetric():
    distance = head_distances(true_shapes(2), SPEC)
    soft, steep = (normal_maps(ramped(distance, ramp)) for ramp in (RAMPS[0], RAMPS[-1]))
    assert (soft[:, :, 3] - steep[:, :, 3]).abs().mean() < 0.01 and (soft - steep).abs().mean() < 0.02
    torch.testing.assert_close(mirrored(soft).flip(1), soft, atol=2e-2, rtol=0)  # the left view mirrored is the right one
    assert not torch.allclose(soft[:, 0], soft[:, 2], atol=0.1)
