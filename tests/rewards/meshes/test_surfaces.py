"""Meshes from fields: closed, oriented outwards, of the right volume, with gradients that reach the field."""

import pytest
import torch

from eg3d_rlhf.core.field import Bounds
from eg3d_rlhf.geometry.mesh import count_edges
from eg3d_rlhf.rewards.meshes.surfaces import (
    Lattice,
    closed_level,
    cube,
    densities,
    marching_tetrahedra,
    net,
    net_mesh,
    signed_volume,
)


class Cloud:
    """Fields that are given by functions of points, with the methods that meshing needs."""

    bounds = Bounds()
    level = 0.0

    def __init__(self, *functions):
        self.functions = functions

    def density(self, points):
        return torch.stack([function(points) for function in self.functions])


def ball(radius, scale=20.0, centre=(0.0, 0.0, 0.0)):
    return lambda x: scale * (radius - (x - torch.tensor(centre)).norm(dim=1))


def test_the_lattice_fills_the_cube():
    for resolution in (1, 3, 6):
        grid = cube(resolution, Bounds(2.0, (1.0, 0.0, -1.0)))
        a, b, c, d = grid.vertices.double()[grid.tetrahedra].unbind(1)
        volume = ((b - a) * torch.linalg.cross(c - a, d - a)).sum(1) / 6
        assert float(volume.min()) > 0 and float(volume.sum()) == pytest.approx(8.0, rel=1e-6)
        assert (
            len(grid.tetrahedra) == 6 * resolution**3
            and int(grid.border.sum()) == (resolution + 1) ** 3 - (resolution - 1) ** 3
        )
        assert torch.equal(grid.edges[grid.edges_of[:, 0]], grid.tetrahedra[:, :2].sort(dim=1).values)


def test_an_edge_without_a_step_is_skipped_and_leaves_no_nan():
    grid = cube(2)
    level = torch.full((27,), 1.0)
    level[13] = -1e-10
    level[12] = 1e-10
    level.requires_grad_(True)
    mesh = marching_tetrahedra(level, grid)
    mesh.vertices.square().sum().backward()
    assert bool(mesh.vertices.isfinite().all()) and bool(level.grad.isfinite().all())
    full = marching_tetrahedra(torch.where(torch.arange(27) == 13, -1.0, 1.0), grid)
    assert 0 < len(mesh.faces) < len(full.faces)


def test_product_fields_are_evaluated_on_a_product_grid():
    grid = cube(5, Bounds(0.8))

    class Product(Cloud):
        def __len__(self):
            return 1

        def never(self, *args):
            raise AssertionError

        density_grid = colour = render = never

        def density_product(self, x, y, z):
            self.name_counts = True
            return self.density(torch.cartesian_prod(x, y, z)).view(1, len(x), len(y), len(z))

    field = Product(ball(0.3, centre=(0.0, 0.05, -0.02)))
    assert torch.equal(densities(field, grid), field.density(grid.vertices)) and field.name_counts
    free = Lattice.from_tetrahedra(grid.vertices, grid.tetrahedra, grid.step)
    assert torch.equal(densities(Cloud(ball(0.3)), free), ball(0.3)(grid.vertices)[None])


# Surface nets: closed, oriented outwards, at the surface; vertices are means of crossings; gradients


def body(grid):
    """Return a ball with a bump."""
    x = grid.vertices
    return torch.minimum(x.norm(dim=1) - 0.31, (x - torch.tensor([0.0, 0.05, 0.3])).norm(dim=1) - 0.13)


@pytest.mark.parametrize("resolution", [9, 16])
def test_a_net_is_closed_outward_and_a_quarter_of_the_faces(resolution):
    grid = cube(resolution)
    level = body(grid)
    coarse = net_mesh(level, grid)
    fine = marching_tetrahedra(level, grid)
    assert count_edges(coarse.faces.numpy()).watertight
    assert float(signed_volume(coarse)) == pytest.approx(float(signed_volume(fine)), rel=0.1)
    assert len(coarse.faces) < 0.35 * len(fine.faces)


def test_vertices_are_means_of_the_crossings_around_their_cell():
    grid = cube(7)
    level = body(grid)
    known = net(body(grid), grid)
    points = known.vertices(torch.full((len(known.edges),), 0.25))
    for vertex in range(0, len(points), 9):
        around = (known.corners == vertex).any(dim=1)
        a, b = grid.vertices[known.edges[around]].unbind(1)
        torch.testing.assert_close(points[vertex], (a + 0.25 * (b - a)).mean(dim=0))
        assert (
            float((points[vertex] - grid.vertices[known.edges[around][:, 0]]).abs().max()) < 1.01 * grid.step
        )
    inside = level < 0
    assert bool((inside[known.edges[:, 0]] != inside[known.edges[:, 1]]).all())


def test_gradients_of_nets_equal_differences():
    grid = cube(6)
    level = body(grid).double()
    known = net(level, grid)
    weight = torch.randn(
        len(known.base) // 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )

    def value(level):
        return (net_mesh(level, grid, known).vertices * weight).sum()

    level.requires_grad_(True)
    value(level).backward()
    assert torch.equal(
        level.grad != 0,
        torch.zeros_like(level, dtype=torch.bool).index_fill(0, known.edges.flatten().unique(), True),
    )
    for vertex in known.edges.flatten().unique()[::12].tolist():
        shift = torch.zeros(len(level), dtype=torch.float64).index_fill(0, torch.tensor(vertex), 1e-6)
        with torch.no_grad():
            slope = float(value(level + shift) - value(level - shift)) / 2e-6
        assert slope == pytest.approx(float(level.grad[vertex]), rel=1e-3, abs=1e-6)


def test_a_level_without_a_surface_and_an_open_one():
    grid = cube(4)
    assert len(net_mesh(torch.ones(125), grid).faces) == 0 and net_mesh(
        torch.ones(125), grid
    ).vertices.shape == (0, 3)
    assert len(net_mesh(closed_level(-torch.ones(125), grid), grid).faces) == 2 * 6 * 9
