"""Relief at the eyes behind, of fields whose surface is known, and of ground-truth heads."""

import numpy as np
import pytest
import torch

from eg3d_rlhf.core.field import Bounds
from eg3d_rlhf.measures.back_relief import (
    BACK,
    FRONT,
    VOXELS,
    eye_relief,
    face_mask,
    field_depths,
    head_depths,
    high_passed,
    ray_grid,
    relief_correlation_with_front,
)
from tests.training.test_people import heads, latents
from training.heads.people import EYE, UNIT
from training.heads.people_mesh import head_grid

__all__ = ["heads", "latents"]


class Ellipsoid:
    """An ellipsoid, with bumps of a height in world units at the eyes in front and behind."""

    bounds = Bounds()
    level = 10.0

    def __init__(self, front: float, back: float):
        self.heights = {FRONT: front, BACK: back}

    def __len__(self):
        return 1

    def surface(self, x, y, side):
        eyes = torch.exp(-(((x.abs() - UNIT * EYE[0]) ** 2 + (y - UNIT * EYE[1]) ** 2) / (2 * 0.01**2)))
        base = 0.25 * (1 - (x / 0.3) ** 2 - (y / 0.4) ** 2).clamp_min(0).sqrt()
        return base + self.heights[side] * eyes

    def density(self, points):
        x, y, z = points.expand(1, -1, -1).unbind(-1) if points.ndim == 2 else points.unbind(-1)
        depth = torch.where(z > 0, self.surface(x, y, FRONT) - z, self.surface(x, y, BACK) + z)
        return self.level + 100 * depth


def test_depths_are_those_of_the_surface():
    field = Ellipsoid(0.004, -0.002)
    x, y = (torch.from_numpy(coordinates) for coordinates in ray_grid())
    for side in (FRONT, BACK):
        np.testing.assert_allclose(
            field_depths(field, side)[0], field.surface(x, y, side) * VOXELS, atol=0.01
        )


def test_a_face_on_the_back_is_found():
    plain, faint, copied = (field_depths(Ellipsoid(0.006, height), BACK)[0] for height in (0, 0.001, 0.006))
    front = field_depths(Ellipsoid(0.006, 0), FRONT)[0]
    assert 2 * eye_relief(plain) < eye_relief(faint) < eye_relief(copied) / 3
    assert relief_correlation_with_front(copied, front) > 0.95
    inverted = field_depths(Ellipsoid(0, -0.006), BACK)[0]
    assert relief_correlation_with_front(inverted, front) < -0.9


def test_rays_without_a_surface_do_not_count():
    depth = field_depths(Ellipsoid(0.0, 0.004), BACK)[0]
    holes = depth.copy()
    holes[:3] = np.nan
    assert np.isnan(high_passed(holes)[:3]).all()
    assert eye_relief(holes) == pytest.approx(eye_relief(depth), rel=1e-6)
    holes[face_mask()] = np.nan
    assert np.isnan(eye_relief(holes)) and np.isnan(relief_correlation_with_front(holes, holes))


def test_meshes_of_heads_have_the_depths_of_their_grids(heads):
    head = heads[0]
    grid = torch.from_numpy(head_grid(head, 64)).float()

    class Grid:
        level = 0.0

        def density(self, points):
            return -torch.nn.functional.grid_sample(
                grid.permute(2, 1, 0)[None, None],
                points.reshape(1, -1, 1, 1, 3) * 2,
                align_corners=False,
            ).reshape(1, -1)

    for side in (FRONT, BACK):
        difference = head_depths([head], side)[0] - field_depths(Grid(), side)[0]
        assert np.nanmedian(np.abs(difference)) < 0.1, side
