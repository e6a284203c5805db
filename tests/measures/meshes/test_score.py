"""The score `solid` of meshes: the specification's values of simple shapes, and that turning a mesh inside
out changes nothing.
"""

import numpy as np
import pytest
import trimesh

from eg3d_rlhf.measures.meshes.clean import clean_mesh
from eg3d_rlhf.measures.meshes.score import solid_mesh

pytest.importorskip("igl", reason="extra solid")


def parts(*meshes: trimesh.Trimesh) -> tuple[np.ndarray, np.ndarray]:
    whole = trimesh.util.concatenate(meshes)
    return np.asarray(whole.vertices), np.asarray(whole.faces)


def box() -> tuple[np.ndarray, np.ndarray]:
    return parts(trimesh.creation.box())


def lidless() -> tuple[np.ndarray, np.ndarray]:
    vertices, faces = box()
    return vertices, faces[~(vertices[faces][:, :, 1] > 0.49).all(axis=1)]


def one_turned() -> tuple[np.ndarray, np.ndarray]:
    vertices, faces = box()
    faces = faces.copy()
    faces[3] = faces[3][::-1]
    return vertices, faces


def nested(turn: bool) -> tuple[np.ndarray, np.ndarray]:
    inner = trimesh.creation.icosphere(subdivisions=2, radius=0.4)
    if turn:
        inner.invert()
    return parts(trimesh.creation.icosphere(subdivisions=2, radius=0.5), inner)


FLAT = (np.array([[0, 0, 0], [1, 0, 0], [1, 0, 1], [0, 0, 1.0]]), np.array([[0, 2, 1], [0, 3, 2]]))
VALUES = {
    "box": (box(), 1.0),
    "inside out": ((box()[0], box()[1][:, ::-1]), 1.0),
    "lidless": (lidless(), 0.36),
    "one face turned": (one_turned(), 0.19),
    "flat": (FLAT, 0.0),
}


@pytest.mark.parametrize("name", VALUES)
def test_values(name):
    mesh, expected = VALUES[name]
    assert solid_mesh(clean_mesh(*mesh)).solid == pytest.approx(expected, abs=0.01)


@pytest.mark.long
def test_a_wall_inside_is_seen_though_voxels_do_not_see_it():
    hollow, buried = (solid_mesh(clean_mesh(*nested(turn))) for turn in (True, False))
    assert hollow.solid == pytest.approx(0.84, abs=0.02) and hollow.inner < 0.55
    assert buried.solid == pytest.approx(0.61, abs=0.02) and buried.inner == 1
