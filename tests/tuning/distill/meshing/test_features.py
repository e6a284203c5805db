"""Faces as numbers: scale, order, flat sheets, gradients."""

import pytest
import torch

from eg3d_rlhf.core.interfaces import Mesh
from eg3d_rlhf.rewards.meshes.patchifiers import PLACES, face_features, placed
from eg3d_rlhf.rewards.meshes.surfaces import cube, marching_tetrahedra


@pytest.fixture(scope="module")
def mesh():
    grid = cube(6)
    return marching_tetrahedra((grid.vertices * torch.tensor([1.0, 1.3, 0.8])).norm(dim=1) - 0.31, grid)


def test_shares_of_area_do_not_see_scale_and_raw_areas_do(mesh):
    one, other = (face_features(k * mesh.vertices, mesh.faces)[0] for k in (1.0, 3.0))
    torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-5)
    assert float(one[:, 0].sum()) == pytest.approx(1.0, abs=1e-5)
    raw = [face_features(k * mesh.vertices, mesh.faces, "raw")[0][:, 0].sum() for k in (1.0, 3.0)]
    assert float(raw[1] / raw[0]) == pytest.approx(9.0, rel=1e-4)


def test_angles_and_normals(mesh):
    features, centres = face_features(mesh.vertices.double(), mesh.faces)
    torch.testing.assert_close(features[:, 4:7].sum(1), torch.full((len(features),), torch.pi, dtype=torch.float64), rtol=0, atol=2e-3)
    torch.testing.assert_close(features[:, 1:4].norm(dim=1), torch.ones(len(features), dtype=torch.float64))
    assert bool((features[:, 4:7].diff(dim=1) >= 0).all()) and bool((features[:, 7:].diff(dim=1) >= 0).all())
    assert bool(((features[:, 1:4] * centres).sum(1) > 0).all())


def test_a_flat_sheet_and_a_face_without_area_have_finite_gradients():
    vertices = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0], [2, 0, 0]], requires_grad=True)
    features, _ = face_features(vertices, torch.tensor([[0, 1, 2], [1, 3, 2], [0, 1, 4]]))
    features.square().sum().backward()
    assert bool(features.isfinite().all()) and bool(vertices.grad.isfinite().all())
    torch.testing.assert_close(features[:2, 1:4], torch.tensor([[0.0, 0, 1]] * 2))


@pytest.mark.parametrize("place", PLACES)
def test_gradients_are_those_of_differences(place):
    vertices = torch.tensor([[0.0, 0, 0], [1.1, 0, 0.2], [0.1, 1.3, 0], [0.3, 0.2, 0.9]], dtype=torch.float64, requires_grad=True)
    faces = torch.tensor([[0, 2, 1], [0, 1, 3], [1, 2, 3], [0, 3, 2]])
    assert torch.autograd.gradcheck(lambda v: face_features(placed(Mesh(v, faces), place), faces)[0], (vertices,))


def test_places(mesh):
    moved = Mesh(mesh.vertices * 2 + 5, mesh.faces)
    found = placed(moved, "box")
    assert float(found.min()) == 0 and float(found.max()) == 1
    torch.testing.assert_close(placed(moved), placed(mesh), rtol=1e-4, atol=1e-5)
    _, centres = face_features(placed(moved), mesh.faces)
    area = face_features(moved.vertices, mesh.faces)[0][:, :1]
    assert float((area * centres).sum(0).abs().max()) < 1e-4
    assert float((area[:, 0] * centres.norm(dim=1)).sum()) == pytest.approx(1, abs=1e-3)
    assert torch.equal(placed(mesh, "world"), mesh.vertices)
    for call, words in ((lambda: placed(mesh, "moon"), "got 'moon'"), (lambda: face_features(*mesh, "log"), "got 'log'")):
        with pytest.raises(ValueError, match=words):
            call()
