"""Marching tetrahedra against the reference values: every sign case, every field, plain and deformed, with
gradients.

The reference has its field positive inside and faces that point inward then; ours is negative inside and
faces point outward. So its field is negated, and its triangles are turned over.
"""

import pytest
import torch

from eg3d_rlhf.core.field import Bounds
from eg3d_rlhf.rewards.meshes.surfaces import Lattice, cube, marching_tetrahedra, signed_volume
from tests.compat.absent import some
from tests.compat.distill_reference import close, members, needs, present, recipe, under, values

NAME = "marching_tets"
pytestmark = needs(NAME)
RESOLUTIONS = {
    field: entry["resolution"] for field, entry in recipe(NAME)["cases"].items() if "resolution" in entry
}
SIGNS = [case for case in members(NAME, "tet") if f"tet/{case}/sdf" in values(NAME)]
FIELDS = [
    (field, kind)
    for field in RESOLUTIONS
    for kind in members(NAME, field)
    if f"{field}/{kind}/verts" in values(NAME)
]


def triangles(faces, turned=False) -> set[tuple]:
    """Oriented triangles, whichever corner comes first."""
    rows = [tuple(row[::-1] if turned else row) for row in faces.tolist()]
    return {min(row, row[1:] + row[:1], row[2:] + row[:2]) for row in rows}


def gradient(value, of):
    return torch.autograd.grad(value, of, retain_graph=True)[0]


@pytest.mark.parametrize("case", some(SIGNS, f"this set has no tet/CASE/sdf in {NAME}.npz"))
def test_every_case_of_signs(case):
    v = under(NAME, f"tet/{case}")
    lattice = Lattice.from_tetrahedra(*present(values(NAME), "tet/vertices", "tet/tets"), 1.0)
    sdf = v["sdf"].clone().requires_grad_(True)
    mesh = marching_tetrahedra(-sdf, lattice)
    close(mesh.vertices, v["verts"], 1e-6)
    assert triangles(mesh.faces) == triangles(v["faces"], turned=True)
    close(gradient((mesh.vertices * v["weight"]).sum(), sdf), v["dsum_dsdf"], 1e-5)


@pytest.mark.parametrize(
    "resolution", some(sorted(set(RESOLUTIONS.values())), f"this set has no resolution in {NAME}.json")
)
def test_our_lattice_is_the_references(resolution):
    vertices, tetrahedra = present(values(NAME), "grid/vertices", "grid/tets")
    ours = cube(resolution, Bounds(centre=(0.5, 0.5, 0.5)))
    close(ours.vertices, vertices, 1e-7)
    assert torch.equal(ours.tetrahedra, tetrahedra)


@pytest.mark.parametrize(
    ("field", "kind"), some(FIELDS, f"this set has no FIELD/KIND/verts in {NAME}.npz", width=2)
)
def test_fields_and_their_gradients(field, kind):
    v = under(NAME, f"{field}/{kind}")
    sdf = values(NAME)[f"{field}/sdf"].clone().requires_grad_(True)
    moved = values(NAME)[f"{field}/deformation"].clone().requires_grad_(True) if kind == "deformed" else None
    vertices, tetrahedra = present(values(NAME), "grid/vertices", "grid/tets")
    vertices = vertices.clone().requires_grad_(True)
    mesh = marching_tetrahedra(
        -sdf, Lattice.from_tetrahedra(vertices, tetrahedra, 1 / RESOLUTIONS[field]), moved
    )
    close(mesh.vertices, v["verts"], 1e-6)
    assert triangles(mesh.faces) == triangles(v["faces"], turned=True)
    total = (mesh.vertices * v["weight"]).sum()
    volume = -signed_volume(mesh)
    assert abs(float(volume.detach() - v["signed_volume"])) <= 1e-6
    close(gradient(total, sdf), v["dsum_dsdf"], 1e-5)
    close(gradient(volume, sdf), v["dvolume_dsdf"], 1e-5)
    if moved is None:
        close(gradient(total, vertices), v["dsum_dvertices"], 1e-5)
    else:
        close(gradient(total, moved), v["dsum_ddeformation"], 1e-5)
