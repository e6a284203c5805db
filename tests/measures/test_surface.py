"""Curvature, topology and displacement of surfaces for which they are known."""

import math

import numpy as np
import pytest
import torch

from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.geometry.mesh import count_edges, extract_mesh
from eg3d_rlhf.measures.surface import (
    REACH,
    change_summary,
    displacement,
    main_surface,
    mean_curvature,
    median_change,
    surface_points,
    topology,
    voxel,
)
from tests.geometry.test_level_set import SPEC, body, sphere


def grid_faces(rows, columns, wrap_rows, wrap_columns):
    """Return two triangles per cell of a grid of points, row by row."""
    i, j = np.meshgrid(
        np.arange(rows - (not wrap_rows)), np.arange(columns - (not wrap_columns)), indexing="ij"
    )
    a = i * columns + j
    b = i * columns + (j + 1) % columns
    c = (i + 1) % rows * columns + j
    d = (i + 1) % rows * columns + (j + 1) % columns
    return np.concatenate([np.stack([a, c, b], -1).reshape(-1, 3), np.stack([b, c, d], -1).reshape(-1, 3)])


def torus(R=0.3, r=0.1, rows=48, columns=40):
    """Return vertices, faces, and the mean curvature (R + 2 r cos t) / (2 r (R + r cos t)) at each vertex."""
    u, t = np.meshgrid(
        np.arange(rows) * 2 * np.pi / rows, np.arange(columns) * 2 * np.pi / columns, indexing="ij"
    )
    ring = R + r * np.cos(t)
    vertices = np.stack([ring * np.cos(u), ring * np.sin(u), r * np.sin(t)], -1).reshape(-1, 3)
    return (
        vertices,
        grid_faces(rows, columns, True, True),
        ((R + 2 * r * np.cos(t)) / (2 * r * ring)).reshape(-1),
    )


def ball(radius=0.3, resolution=40, centre=(0, 0, 0)):
    """Return a density in a cube that is 10 at the surface of a ball."""
    spec = SlabSpec.cube(resolution)
    x, y, z = (axis.double().numpy() for axis in spec.axes())
    distance = np.sqrt(
        (x - centre[0]) ** 2 + (y[:, None] - centre[1]) ** 2 + (z[:, None, None] - centre[2]) ** 2
    )
    return 10 + 100 * (radius - distance), spec


def half_sphere():
    """Return the upper half of a sphere of marching cubes, cut along triangles."""
    vertices, faces = extract_mesh(*ball())
    return vertices, faces[(vertices[faces][:, :, 1] > 0).all(axis=1)]


def test_sphere():
    sigma, spec = ball(0.3, 64)
    vertices, faces = extract_mesh(sigma, spec)
    H, area = mean_curvature(vertices, faces)
    assert area.sum() == pytest.approx(4 * np.pi * 0.09, rel=0.01)
    assert (H * area).sum() / area.sum() == pytest.approx(1 / 0.3, rel=0.01)
    measured = topology(vertices, faces)
    assert (measured.parts, measured.cavities, measured.handles, measured.rims, measured.euler) == (
        1,
        0,
        0,
        0,
        2,
    ) and measured.watertight


def test_torus_vertex_by_vertex():
    vertices, faces, expected = torus()
    H, area = mean_curvature(vertices, faces)
    assert np.abs(H - expected).max() < 0.02 * np.abs(expected).max()
    assert area.sum() == pytest.approx(4 * np.pi**2 * 0.3 * 0.1, rel=0.01)
    measured = topology(vertices, faces)
    assert (measured.parts, measured.handles, measured.rims, measured.euler, measured.holes) == (
        1,
        1,
        0,
        0,
        1,
    ) and measured.watertight


def test_a_plane_is_flat_and_its_rim_unknown():
    i, j = np.meshgrid(np.arange(5.0), np.arange(6.0), indexing="ij")
    vertices = np.stack([i, j, 0 * i], -1).reshape(-1, 3)
    H, area = mean_curvature(vertices, grid_faces(5, 6, False, False))
    assert (
        np.isfinite(H).sum() == 3 * 4 and np.nanmax(np.abs(H)) < 1e-12 and area.sum() == pytest.approx(3 * 4)
    )


def test_open_half_sphere_has_one_rim():
    measured = topology(*half_sphere())
    assert (measured.parts, measured.cavities, measured.handles, measured.rims, measured.euler) == (
        1,
        0,
        0,
        1,
        1,
    ) and not measured.watertight
    assert measured.open_edges == count_edges(half_sphere()[1]).open


def test_two_spheres_and_their_share():
    large, spec = ball(0.2, 48, (-0.2, 0, 0))
    small, _ = ball(0.1, 48, (0.3, 0, 0))
    vertices, faces = extract_mesh(np.maximum(large, small), spec)
    measured = topology(vertices, faces)
    assert (measured.parts, measured.cavities, measured.handles, measured.euler) == (2, 0, 0, 4)
    assert measured.main_share == pytest.approx(8 / 9, abs=0.01)
    assert vertices[main_surface(vertices, faces)][..., 0].max() < 0.1


def test_a_hollow_is_a_cavity_and_not_a_part():
    outer, spec = ball(0.4)
    vertices, faces = extract_mesh(np.minimum(outer, 20 - ball(0.2)[0]), spec)
    measured = topology(vertices, faces)
    assert (measured.parts, measured.cavities, measured.handles, measured.rims, measured.main_share) == (
        1,
        1,
        0,
        0,
        1,
    )


def test_an_open_tube_has_two_rims_and_a_torus_with_a_hole_keeps_its_handle():
    u = np.arange(12) * 2 * np.pi / 12
    tube = np.stack([np.stack([np.cos(u), np.sin(u), 0 * u + h], -1) for h in (0.0, 0.5, 1.0)]).reshape(-1, 3)
    measured = topology(tube, grid_faces(3, 12, False, True))
    assert (measured.parts, measured.handles, measured.rims, measured.euler) == (1, 0, 2, 0)
    vertices, faces, _ = torus(rows=12, columns=10)
    measured = topology(vertices, faces[1:])
    assert (measured.handles, measured.rims, measured.holes) == (1, 1, 2)


def test_surfaces_that_touch_at_a_vertex_are_two():
    tetrahedron = np.array([[0, 2, 1], [0, 1, 3], [1, 2, 3], [0, 3, 2]])
    vertices = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [-1, 0, 0], [0, -1, 0], [0, 0, -1.0]])
    other = np.array([0, 4, 5, 6])[tetrahedron][:, ::-1]
    measured = topology(vertices, np.concatenate([tetrahedron, other]))
    assert (measured.parts, measured.euler, measured.handles, measured.watertight) == (2, 4, 0, True)


UNIT = voxel(SPEC)
POINTS = torch.nn.functional.normalize(torch.randn(500, 3, generator=torch.Generator().manual_seed(0)), dim=1)


def test_identical_shapes_have_not_moved():
    assert displacement(sphere(0.3), 0.3 * POINTS, POINTS).abs().max() < 0.02
    assert median_change(sphere(0.2), sphere(0.2)) < 0.02


@pytest.mark.parametrize("voxels", [1.0, -1.0, 0.25, -2.5])
def test_a_sphere_that_grew_has_moved_by_the_same_distance_everywhere(voxels):
    radius = 0.25 + voxels * UNIT
    moved = displacement(sphere(0.25), radius * POINTS, POINTS)
    assert (moved - voxels).abs().max() < 0.03
    assert median_change(sphere(0.22), sphere(0.22 + voxels * UNIT)) == pytest.approx(abs(voxels), abs=0.03)


def test_surfaces_that_appear_or_disappear_get_the_largest_displacement():
    points = 0.03 * POINTS + torch.tensor([0.0, 0.4, 0.0])
    assert displacement(sphere(0.1), points, POINTS).eq(REACH).all()  # a new floater
    full = body(lambda points: points[..., 0] * 0 - 1)
    assert displacement(full, 0.1 * POINTS, POINTS).eq(-REACH).all()  # a hollow in a body that was full


def test_the_nearest_surface_counts_where_the_shape_ends():
    shell = body(lambda points: (points.norm(dim=-1) - 0.25).abs() - 0.02)  # from .23 to .27
    moved = displacement(shell, 0.26 * POINTS, POINTS)
    assert moved * UNIT == pytest.approx(torch.full((500,), -0.01), abs=0.001)


def test_no_points_and_no_surface():
    assert displacement(sphere(0.3), torch.zeros(0, 3), torch.zeros(0, 3)).shape == (0,)
    empty = body(lambda points: points[..., 0] * 0 + 1)
    assert math.isnan(median_change(empty, empty))
    assert change_summary([float("nan")]) == {"median": None, "quartiles": [None, None], "n": 0}
    assert change_summary([1.0, 2.0, float("nan"), 3.0]) == {"median": 2.0, "quartiles": [1.5, 2.5], "n": 3}


def test_visible_points_of_a_sphere_lie_on_it_within_a_fraction_of_a_voxel():
    sigma, spec = ball(resolution=48)
    points = surface_points(torch.from_numpy(sigma), spec, back=-0.5)
    assert (points.norm(dim=-1) - 0.3).abs().max() < 0.002
    assert len(surface_points(torch.full(spec.shape, -1.0), spec)) == 0
