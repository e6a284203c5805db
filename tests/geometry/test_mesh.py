"""Meshes of bodies whose shape is known."""

import numpy as np
import pytest
import torch
import trimesh
from skimage import measure

from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.geometry.mesh import extract_mesh
from eg3d_rlhf.geometry.mesh_export import save_mesh
from tests.rejections import raising

CENTRE = np.array([0.05, -0.1, 0.02])
RADIUS = 0.3


def ball(spec: SlabSpec, centre=CENTRE, radius=RADIUS) -> torch.Tensor:
    """sigma [D, H, W] that crosses level 10 on a sphere, with slope 100 per unit."""
    x, y, z = (axis.double() for axis in spec.axes())
    distance = (
        (x[None, None] - centre[0]) ** 2
        + (y[None, :, None] - centre[1]) ** 2
        + (z[:, None, None] - centre[2]) ** 2
    ).sqrt()
    return (10 + 100 * (radius - distance)).float()


CROPPED = SlabSpec(resolution=64, crop=(0.1, 0.1, 0, 0.15, 0.1, 0.1))


@pytest.mark.parametrize("spec", [SlabSpec.cube(48), SlabSpec.cube(40, box_warp=1.6), CROPPED])
def test_a_sphere_has_its_volume_centre_and_area(spec):
    vertices, faces = extract_mesh(ball(spec), spec)
    mesh = trimesh.Trimesh(vertices, faces, process=False)
    assert mesh.is_watertight
    assert mesh.is_winding_consistent
    # positive: the faces look outwards
    assert mesh.volume == pytest.approx(4 / 3 * np.pi * RADIUS**3, rel=0.02)
    np.testing.assert_allclose(mesh.center_mass, CENTRE, atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(vertices - CENTRE, axis=1), RADIUS, atol=spec.voxel / 10)
    assert vertices.dtype == np.float32
    assert faces.dtype == np.int64


def test_agrees_with_scikit_image():
    spec = SlabSpec.cube(40)
    sigma = ball(spec)
    vertices, faces = extract_mesh(sigma, spec.axes())
    other, other_faces, _, _ = measure.marching_cubes(sigma.numpy().transpose(2, 1, 0), 10.0)
    other = other * spec.voxel - 0.5
    volume = trimesh.Trimesh(other, other_faces, process=False).volume
    assert trimesh.Trimesh(vertices, faces, process=False).volume == pytest.approx(abs(volume), rel=1e-3)
    np.testing.assert_allclose(np.sort(vertices.sum(axis=1)), np.sort(other.sum(axis=1)), atol=1e-5)


def test_a_body_cut_by_the_border_is_closed():
    spec = SlabSpec.cube(40)
    vertices, faces = extract_mesh(ball(spec, centre=(0.0, 0.0, 0.5)), spec)
    mesh = trimesh.Trimesh(vertices, faces, process=False)
    assert mesh.is_watertight
    assert mesh.volume == pytest.approx(2 / 3 * np.pi * RADIUS**3, rel=0.03)
    assert vertices[:, 2].max() <= 0.5 + 0.011 * spec.voxel


def test_user_errors(tmp_path):
    spec = SlabSpec.cube(16)
    sigma = ball(spec)
    with raising("level 1000"):
        extract_mesh(sigma, spec, level=1000)
    with raising("level 10", "[99, 99]"):
        extract_mesh(torch.full((16, 16, 16), 99.0), spec)
    with raising("finite"):
        extract_mesh(torch.where(sigma > 20, torch.nan, sigma), spec)
    with raising(".ply, .obj, .glb", "'a.stl'"):
        save_mesh(tmp_path / "a.stl", np.zeros((3, 3)), np.array([[0, 1, 2]]))
