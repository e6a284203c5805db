"""Displacement of surfaces whose displacement is known."""

import math

import pytest
import torch

from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.measures.surface import REACH, change_summary, displacement, in_head, median_change, voxel
from tests.geometry.test_level_set import SPEC, body, sphere

UNIT = voxel(SPEC)
POINTS = torch.nn.functional.normalize(torch.randn(500, 3, generator=torch.Generator().manual_seed(0)), dim=1)


def test_identical_shapes_have_not_moved():
    assert displacement(sphere(0.3), 0.3 * POINTS, POINTS).abs().max() < 0.02
    assert median_change(sphere(0.2), sphere(0.2)) < 0.02


@pytest.mark.parametrize("voxels", [1.0, -1.0, 0.25, -2.5])
def test_a_sphere_that_grew_has_moved_by_so_much_everywhere(voxels):
    radius = 0.25 + voxels * UNIT
    moved = displacement(sphere(0.25), radius * POINTS, POINTS)
    assert (moved - voxels).abs().max() < 0.03
    assert median_change(sphere(0.22), sphere(0.22 + voxels * UNIT)) == pytest.approx(abs(voxels), abs=0.03)


def test_the_change_is_the_same_both_ways():
    one, other = sphere(0.2), sphere(0.22, (0.01, 0.0, 0.02))
    assert median_change(one, other) == pytest.approx(median_change(other, one), rel=0.05)


def test_what_is_new_or_gone_altogether_is_at_the_end_of_the_scale():
    points = 0.03 * POINTS + torch.tensor([0.0, 0.4, 0.0])
    assert displacement(sphere(0.1), points, POINTS).eq(REACH).all()  # a floater that was not there
    full = body(lambda points: points[..., 0] * 0 - 1)
    assert displacement(full, 0.1 * POINTS, POINTS).eq(-REACH).all()  # a hollow cut into what was full


def test_the_nearest_surface_counts_and_only_where_matter_ends():
    shell = body(lambda points: (points.norm(dim=-1) - 0.25).abs() - 0.02)  # from .23 to .27
    moved = displacement(shell, 0.26 * POINTS, POINTS)
    assert moved * UNIT == pytest.approx(torch.full((500,), -0.01), abs=0.001)


def test_no_points_and_no_surface():
    assert displacement(sphere(0.3), torch.zeros(0, 3), torch.zeros(0, 3)).shape == (0,)
    empty = body(lambda points: points[..., 0] * 0 + 1)
    assert math.isnan(median_change(empty, empty))
    assert change_summary([float("nan")]) == {"median": None, "quartiles": [None, None], "n": 0}


def test_the_head_is_the_box_of_the_published_slab():
    points = torch.tensor([[0.0, 0.0, 0.2], [0.0, -0.3, 0.2], [0.3, 0.0, 0.2], [0.0, 0.0, -0.2]])
    assert in_head(points, SPEC).tolist() == [True, False, False, False]
    assert in_head(2 * points + 1, SlabSpec(resolution=48, crop=(0.0,) * 6, box_warp=2.0, centre=(1.0, 1.0, 1.0))).tolist() == [
        True, False, False, False
    ]


def test_the_summary_leaves_out_what_has_no_surface():
    assert change_summary([1.0, 2.0, float("nan"), 3.0]) == {"median": 2.0, "quartiles": [1.5, 2.5], "n": 3}
