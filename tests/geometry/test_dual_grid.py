"""The dual grid of a mesh: what of its surface stays; against the original's own in
tests/compat/test_family_trellis2.py.
"""

import torch
import trimesh

from eg3d_rlhf.geometry.dual_grid import dual_grid
from tests.rejections import raising


def grid_of(mesh, resolution):
    made = dual_grid(torch.tensor(mesh.vertices), torch.tensor(mesh.faces), resolution)
    return made, (made.coords + made.vertices.double()) / resolution - 0.5


def test_corners_and_edges_of_a_box_stay():
    half = torch.tensor([0.37, 0.29, 0.41], dtype=torch.float64)
    made, points = grid_of(trimesh.creation.box(2 * half.numpy()), 16)
    distance_to_surface = (points.abs() - half).amax(1).abs() * 16
    assert float(distance_to_surface.max()) < 0.05  # of a voxel: the mean of the crossings pulls a little
    for corner in torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 3):
        assert float((points - corner * half).norm(dim=1).min()) * 16 < 0.05
    assert torch.equal(made.coords, torch.unique(made.coords, dim=0)) and made.crossed.any(0).all()


def test_an_open_square_ends_where_it_ends():
    z = 0.03
    corners = torch.tensor([[-0.33, -0.21, z], [0.33, -0.21, z], [0.33, 0.21, z], [-0.33, 0.21, z]])
    made = dual_grid(corners, torch.tensor([[0, 1, 2], [0, 2, 3]]), 16)
    points = (made.coords + made.vertices) / 16 - 0.5
    assert torch.allclose(points[:, 2], torch.full_like(points[:, 2], z), atol=1e-4)
    assert float(points[:, :2].abs().amax(0)[0]) < 0.34 and float(points[:, :2].abs().amax(0)[1]) < 0.22
    assert not made.crossed[:, :2].any() and made.crossed[:, 2].any()


def test_a_mesh_that_crosses_no_grid_line_is_rejected():
    with raising("grid", " 4 "):
        dual_grid(torch.full((3, 3), 0.1) + 0.01 * torch.eye(3), torch.tensor([[0, 1, 2]]), 4)
