"""Curvature and topology of surfaces that are known: spheres, a torus, an open half-sphere, a hollow ball, sheets that touch."""

import numpy as np
import pytest

from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.geometry.mesh import count_edges, extract_mesh
from eg3d_rlhf.measures.surface import main_surface, mean_curvature, topology


def grid_faces(rows, columns, wrap_rows, wrap_columns):
    """Two triangles per cell of a grid of points, row by row."""
    i, j = np.meshgrid(np.arange(rows - (not wrap_rows)), np.arange(columns - (not wrap_columns)), indexing="ij")
    a, b = i * columns + j, i * columns + (j + 1) % columns
    c, d = (i + 1) % rows * columns + j, (i + 1) % rows * columns + (j + 1) % columns
    return np.concatenate([np.stack([a, c, b], -1).reshape(-1, 3), np.stack([b, c, d], -1).reshape(-1, 3)])


def torus(R=0.3, r=0.1, rows=48, columns=40):
    """Vertices, faces, and the mean curvature (R + 2 r cos t) / (2 r (R + r cos t)) at each vertex."""
    u, t = np.meshgrid(np.arange(rows) * 2 * np.pi / rows, np.arange(columns) * 2 * np.pi / columns, indexing="ij")
    ring = R + r * np.cos(t)
    vertices = np.stack([ring * np.cos(u), ring * np.sin(u), r * np.sin(t)], -1).reshape(-1, 3)
    return vertices, grid_faces(rows, columns, True, True), ((R + 2 * r * np.cos(t)) / (2 * r * ring)).reshape(-1)


def ball(radius=0.3, resolution=40, centre=(0, 0, 0)):
    """Density 10 on the surface, in a cube."""
    spec = SlabSpec.cube(resolution)
    x, y, z = (axis.double().numpy() for axis in spec.axes())
    distance = np.sqrt((x - centre[0]) ** 2 + (y[:, None] - centre[1]) ** 2 + (z[:, None, None] - centre[2]) ** 2)
    return 10 + 100 * (radius - distance), spec


def half_sphere():
    """Upper half of a sphere of marching cubes, cut along triangles."""
    vertices, faces = extract_mesh(*ball())
    return vertices, faces[(vertices[faces][:, :, 1] > 0).all(axis=1)]


def test_sphere():
    sigma, spec = ball(0.3, 64)
    vertices, faces = extract_mesh(sigma, spec)
    H, area = mean_curvature(vertices, faces)
    assert area.sum() == pytest.approx(4 * np.pi * 0.09, rel=0.01)
    assert (H * area).sum() / area.sum() == pytest.approx(1 / 0.3, rel=0.01)
    found = topology(vertices, faces)
    assert (found.parts, found.cavities, found.handles, found.rims, found.euler) == (1, 0, 0, 0, 2) and found.watertight


def test_torus_vertex_by_vertex():
    vertices, faces, expected = torus()
    H, area = mean_curvature(vertices, faces)
    assert np.abs(H - expected).max() < 0.02 * np.abs(expected).max()
    assert area.sum() == pytest.approx(4 * np.pi**2 * 0.3 * 0.1, rel=0.01)
    found = topology(vertices, faces)
    assert (found.parts, found.handles, found.rims, found.euler, found.holes) == (1, 1, 0, 0, 1) and found.watertight


def test_curvature_changes_sign_with_the_winding_and_scales_with_size():
    vertices, faces, _ = torus(rows=20, columns=16)
    H = mean_curvature(vertices, faces)[0]
    assert np.allclose(mean_curvature(vertices, faces[:, ::-1])[0], -H) and np.allclose(mean_curvature(vertices * 2, faces)[0], H / 2)


def test_a_plane_is_flat_and_its_rim_unknown():
    i, j = np.meshgrid(np.arange(5.0), np.arange(6.0), indexing="ij")
    vertices = np.stack([i, j, 0 * i], -1).reshape(-1, 3)
    H, area = mean_curvature(vertices, grid_faces(5, 6, False, False))
    assert np.isfinite(H).sum() == 3 * 4 and np.nanmax(np.abs(H)) < 1e-12 and area.sum() == pytest.approx(3 * 4)


def test_open_half_sphere_has_one_rim():
    found = topology(*half_sphere())
    assert (found.parts, found.cavities, found.handles, found.rims, found.euler) == (1, 0, 0, 1, 1) and not found.watertight
    assert found.open_edges == count_edges(half_sphere()[1]).open


def test_two_spheres_and_their_share():
    (one, spec), (two, _) = ball(0.2, 48, (-0.2, 0, 0)), ball(0.1, 48, (0.3, 0, 0))
    vertices, faces = extract_mesh(np.maximum(one, two), spec)
    found = topology(vertices, faces)
    assert (found.parts, found.cavities, found.handles, found.euler) == (2, 0, 0, 4)
    assert found.main_share == pytest.approx(8 / 9, abs=0.01)
    assert vertices[main_surface(vertices, faces)][..., 0].max() < 0.1


def test_a_hollow_is_a_cavity_and_no_part():
    outer, spec = ball(0.4)
    vertices, faces = extract_mesh(np.minimum(outer, 20 - ball(0.2)[0]), spec)
    found = topology(vertices, faces)
    assert (found.parts, found.cavities, found.handles, found.rims, found.main_share) == (1, 1, 0, 0, 1)


def test_an_open_tube_has_two_rims_and_a_doughnut_with_a_window_keeps_its_handle():
    u = np.arange(12) * 2 * np.pi / 12
    tube = np.stack([np.stack([np.cos(u), np.sin(u), 0 * u + h], -1) for h in (0.0, 0.5, 1.0)]).reshape(-1, 3)
    found = topology(tube, grid_faces(3, 12, False, True))
    assert (found.parts, found.handles, found.rims, found.euler) == (1, 0, 2, 0)
    vertices, faces, _ = torus(rows=12, columns=10)
    found = topology(vertices, faces[1:])
    assert (found.handles, found.rims, found.holes) == (1, 1, 2)


def test_surfaces_that_touch_at_a_vertex_are_two():
    tetrahedron = np.array([[0, 2, 1], [0, 1, 3], [1, 2, 3], [0, 3, 2]])
    vertices = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [-1, 0, 0], [0, -1, 0], [0, 0, -1.0]])
    other = np.array([0, 4, 5, 6])[tetrahedron][:, ::-1]
    found = topology(vertices, np.concatenate([tetrahedron, other]))
    assert (found.parts, found.euler, found.handles, found.watertight) == (2, 4, 0, True)


def test_an_edge_of_three_faces_is_no_closed_surface():
    vertices, faces, _ = torus(rows=8, columns=8)
    extra = np.array([[faces[0][0], faces[0][1], len(vertices)]])
    assert not topology(np.concatenate([vertices, [[0, 0, 1.0]]]), np.concatenate([faces, extra])).watertight


@pytest.mark.parametrize(
    ("vertices", "faces", "says"),
    [(np.zeros((3, 2)), np.zeros((1, 3), int), "vertices"), (np.zeros((3, 3)), np.array([[0, 1, 5]]), "finite vertices"),
     (np.zeros((3, 3)), np.zeros((0, 3), int), "F >= 1"), (np.zeros((3, 3)), np.array([[0, 0, 1]]), "twice")],
)
def test_refused(vertices, faces, says):
    for function in (topology, mean_curvature, main_surface):
        with pytest.raises(ValueError, match=says):
            function(vertices, faces)
