"""Marching tetrahedra against the reference values: every sign case, every field, plain and deformed, with gradients.

The reference has its field positive inside and faces that point inward then; ours is negative inside and faces point outward. So its field
is negated, and its triangles are turned over.
"""

import numpy as np
import pytest
import torch

from eg3d_rlhf.core.field import Bounds
from eg3d_rlhf.rewards.meshes.meshing.lattice import Lattice, cube
from eg3d_rlhf.rewards.meshes.meshing.tetrahedra import marching_tetrahedra, signed_volume
from tests.compat.reference import ROOT

PATH = ROOT / "distill" / "marching_tets.npz"
NAMES = list(np.load(PATH)) if PATH.is_file() else []
SIGNS = sorted({name.split("/")[1] for name in NAMES if name.startswith("tet/") and name.count("/") == 2})
FIELDS = sorted(name.removesuffix("/verts") for name in NAMES if name.count("/") == 2 and name.endswith("/verts") and name[:4] != "tet/")
pytestmark = pytest.mark.skipif(not NAMES, reason=f"no reference values at {PATH}; set EG3D_RLHF_FIXTURES to their folder")


@pytest.fixture(scope="module")
def reference():
    with np.load(PATH) as arrays:
        return {name: torch.as_tensor(arrays[name]) for name in arrays}


def triangles(faces, turned=False) -> set[tuple]:
    """Oriented triangles, whichever corner comes first."""
    found = [tuple(row[::-1] if turned else row) for row in faces.tolist()]
    return {min(row, row[1:] + row[:1], row[2:] + row[:2]) for row in found}


def close(found, wanted, tolerance):
    scale = max(float(wanted.abs().max()), 1.0)
    assert float((found - wanted).abs().max()) <= tolerance * scale


def test_the_cases_are_there():
    assert len(SIGNS) >= 14 and len(FIELDS) >= 10


@pytest.mark.parametrize("case", SIGNS)
def test_every_case_of_signs(reference, case):
    lattice = Lattice.of(reference["tet/vertices"], reference["tet/tets"], 1.0)
    sdf = reference[f"tet/{case}/sdf"].clone().requires_grad_(True)
    mesh = marching_tetrahedra(-sdf, lattice)
    close(mesh.vertices.detach(), reference[f"tet/{case}/verts"], 1e-6)
    assert triangles(mesh.faces) == triangles(reference[f"tet/{case}/faces"], turned=True)
    (mesh.vertices * reference[f"tet/{case}/weight"]).sum().backward()
    close(sdf.grad, reference[f"tet/{case}/dsum_dsdf"], 1e-5)


def test_our_lattice_is_the_references(reference):
    ours = cube(6, Bounds(centre=(0.5, 0.5, 0.5)))
    close(ours.vertices, reference["grid/vertices"], 1e-7)
    assert torch.equal(ours.tetrahedra, reference["grid/tets"])


@pytest.mark.parametrize("case", FIELDS)
def test_fields_and_their_gradients(reference, case):
    field, kind = case.split("/")
    own = {name.removeprefix(f"{case}/"): value for name, value in reference.items() if name.startswith(f"{case}/")}
    sdf = reference[f"{field}/sdf"].clone().requires_grad_(True)
    moved = reference[f"{field}/deformation"].clone().requires_grad_(True) if kind == "deformed" else None
    vertices = reference["grid/vertices"].clone().requires_grad_(True)
    mesh = marching_tetrahedra(-sdf, Lattice.of(vertices, reference["grid/tets"], 1 / 6), moved)
    close(mesh.vertices.detach(), own["verts"], 1e-6)
    assert triangles(mesh.faces) == triangles(own["faces"], turned=True)

    def gradient(value, of):
        return torch.autograd.grad(value, of, retain_graph=True)[0]

    total, volume = (mesh.vertices * own["weight"]).sum(), -signed_volume(mesh)
    assert abs(float(volume.detach() - own["signed_volume"])) <= 1e-6
    close(gradient(total, sdf), own["dsum_dsdf"], 1e-5)
    close(gradient(volume, sdf), own["dvolume_dsdf"], 1e-5)
    if moved is None:
        close(gradient(total, vertices), own["dsum_dvertices"], 1e-5)
    else:
        close(gradient(total, moved), own["dsum_ddeformation"], 1e-5)
