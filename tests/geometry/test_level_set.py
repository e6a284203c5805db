"""The surface of known bodies: where rays meet it, its normals, and what stays hidden."""

import math

import pytest
import torch

from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.geometry.level_set import LevelSet

SPEC = SlabSpec.cube(48)


def body(distance, spec: SlabSpec = SPEC, level: float = 10.0) -> LevelSet:
    """A level set of a signed distance of points [..., 3]; the density is steep, as a network's may be."""

    def density(points):
        return level - 40 * torch.sinh(6 * distance(points))

    return LevelSet(cube=density(spec.points()), spec=spec, level=level, density=density)


def sphere(radius: float, centre=(0.0, 0.0, 0.0), spec: SlabSpec = SPEC) -> LevelSet:
    return body(lambda points: (points - torch.tensor(centre)).norm(dim=-1) - radius, spec)


def test_rays_meet_a_sphere_where_they_should():
    origin = torch.tensor([0.05, -0.1, 2.7])
    directions = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0)) * 0.08
    directions = torch.nn.functional.normalize(directions + torch.tensor([0.0, 0.0, -1.0]), dim=1)
    distances = sphere(0.3).trace(origin.expand(4000, 3), directions)
    along = -(directions @ origin)
    inside = along**2 - (origin @ origin - 0.3**2)
    expected = along - inside.clamp_min(0).sqrt()
    clear = inside.abs() > 0.02
    assert (
        torch.equal(distances.isfinite()[clear], (inside > 0)[clear])
        and 0.2 < distances.isfinite().float().mean() < 0.95
    )
    hit = clear & (inside > 0)
    assert (distances - expected)[hit].abs().max() < SPEC.voxel / 20


def test_thin_and_small_things_are_met_too():
    sheet = body(lambda points: points[..., 2].abs() - 0.015)  # 1.4 voxels thick
    distance = sheet.trace(torch.tensor([[0.1, 0.1, 2.7]]), torch.tensor([[0.0, 0.0, -1.0]]))
    assert distance.item() == pytest.approx(2.7 - 0.015, abs=SPEC.voxel / 20)
    speck = sphere(0.03, (0.2, 0.1, 0.0))
    assert speck.trace(torch.tensor([[0.2, 0.1, 2.7]]), torch.tensor([[0.0, 0.0, -1.0]])).isfinite().all()


def test_a_body_that_leaves_the_cube_is_met_at_its_face_and_nothing_outside_counts():
    slab = body(lambda points: points[..., 0] - 2.0)  # full everywhere
    distances = slab.trace(
        torch.tensor([[0.0, 0.0, 2.5], [0.9, 0.0, 2.5]]), torch.tensor([[0.0, 0.0, -1.0]]).expand(2, 3)
    )
    assert distances[0].item() == pytest.approx(2.0, abs=SPEC.voxel) and math.isinf(distances[1].item())
    assert slab.above_level(torch.tensor([[0.9, 0.0, 0.0]])).item() < -100


def test_normals_point_outwards():
    points = torch.nn.functional.normalize(
        torch.randn(200, 3, generator=torch.Generator().manual_seed(1)), dim=1
    )
    assert (sphere(0.3).normals(0.3 * points) * points).sum(dim=1).min() > 0.9999
