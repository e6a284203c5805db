"""Surface nets: closed, outward, where the surface is; means of crossings, and their gradients."""

import pytest
import torch

from eg3d_rlhf.geometry.mesh import count_edges
from eg3d_rlhf.rewards.meshes.surfaces import closed_level, cube, marching_tetrahedra, net, net_mesh, signed_volume


def body(grid):
    """A ball with a bump."""
    x = grid.vertices
    return torch.minimum(x.norm(dim=1) - 0.31, (x - torch.tensor([0.0, 0.05, 0.3])).norm(dim=1) - 0.13)


@pytest.mark.parametrize("resolution", [9, 16])
def test_a_net_is_closed_outward_and_a_quarter_of_the_faces(resolution):
    grid = cube(resolution)
    level = body(grid)
    found, fine = net_mesh(level, grid), marching_tetrahedra(level, grid)
    assert count_edges(found.faces.numpy()).watertight
    assert float(signed_volume(found)) == pytest.approx(float(signed_volume(fine)), rel=0.1)
    assert len(found.faces) < 0.35 * len(fine.faces)


def test_vertices_are_means_of_the_crossings_around_their_cell():
    grid = cube(7)
    level, known = body(grid), net(body(grid), grid)
    points = known.vertices(torch.full((len(known.edges),), 0.25))
    for vertex in range(0, len(points), 9):
        around = (known.corners == vertex).any(dim=1)
        a, b = grid.vertices[known.edges[around]].unbind(1)
        torch.testing.assert_close(points[vertex], (a + 0.25 * (b - a)).mean(dim=0))
        assert float((points[vertex] - grid.vertices[known.edges[around][:, 0]]).abs().max()) < 1.01 * grid.step
    inside = level < 0
    assert bool((inside[known.edges[:, 0]] != inside[known.edges[:, 1]]).all())


def test_gradients_are_those_of_differences():
    grid = cube(6)
    level = body(grid).double()
    known = net(level, grid)
    weight = torch.randn(len(known.base) // 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def value(level):
        return (net_mesh(level, grid, known).vertices * weight).sum()

    level.requires_grad_(True)
    value(level).backward()
    assert torch.equal(level.grad != 0, torch.zeros_like(level, dtype=torch.bool).index_fill(0, known.edges.flatten().unique(), True))
    for vertex in known.edges.flatten().unique()[::12].tolist():
        shift = torch.zeros(len(level), dtype=torch.float64).index_fill(0, torch.tensor(vertex), 1e-6)
        with torch.no_grad():
            slope = float(value(level + shift) - value(level - shift)) / 2e-6
        assert slope == pytest.approx(float(level.grad[vertex]), rel=1e-3, abs=1e-6)


def test_a_level_without_a_surface_and_an_open_one():
    grid = cube(4)
    assert len(net_mesh(torch.ones(125), grid).faces) == 0 and net_mesh(torch.ones(125), grid).vertices.shape == (0, 3)
    with pytest.raises(ValueError, match="closed_level"):
        net(-torch.ones(125), grid)
    assert len(net_mesh(closed_level(-torch.ones(125), grid), grid).faces) == 2 * 6 * 9
