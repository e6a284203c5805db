"""Meshes are measured whatever their materials, textures, normals and texture coordinates are like."""

import numpy as np
import pytest

from eg3d_rlhf.geometry.files import glb, obj, ply
from eg3d_rlhf.geometry.files.appearance import mended_normals, vertex_normals
from eg3d_rlhf.geometry.files.model import Model
from eg3d_rlhf.geometry.files.triangles import read_triangles
from tests.geometry.files import boxes

TEXTURED = {"pbrMetallicRoughness": {"baseColorTexture": {"index": 0}}}
NORMALS = np.tile([0.0, 0.0, 1.0], (8, 1))
NORMALS[3] = np.nan
LIBRARIES = [  # contents of an MTL file
    "map_Kd ../images/a.jpg",
    "map_Kd ..\\images\\a.jpg",
    "map_Kd D:/scans/a.png",
    "map_Kd /data/scans/a.png",
    "map_Kd gone.png",
    "map_Kd broken.png",
    "map_Kd picture.tga",
    "map_Kd -s 2 2 2 a.png",
    "map_Bump /data/scans/b.png",
    "norm gone.png",
    "Kd red green blue",
    "Kd spectral light.rfl",
    "Kd",
    "d much",
]
GLBS = {
    "ktx2": {
        "extensionsRequired": ["KHR_texture_basisu"],
        "textures": [{"extensions": {"KHR_texture_basisu": {"source": 0}}}],
        "images": [b"\xabKTX 20\xbb\r\n\x1a\n" + bytes(60)],
    },
    "avif": {
        "extensionsRequired": ["EXT_texture_avif"],
        "textures": [{"extensions": {"EXT_texture_avif": {"source": 0}}}],
        "images": [boxes.image("AVIF")],
    },
    "truncated": {"textures": [{"source": 0}], "images": [boxes.image()[:40]]},
    "elsewhere": {"textures": [{"source": 5}]},
    "transmission": {"extensionsRequired": ["KHR_materials_transmission", "KHR_lights_punctual"]},
}


def measured(path) -> float:
    return boxes.volume(*read_triangles(path))


@pytest.mark.parametrize("material", LIBRARIES)
def test_no_material_of_an_obj_stands_in_the_way(tmp_path, material):
    boxes.write(tmp_path / "a.mtl", f"newmtl m\n{material}\n")
    boxes.write(tmp_path / "broken.png", boxes.image()[:40])
    boxes.write(tmp_path / "picture.tga", boxes.image("TGA"))
    path = boxes.write(tmp_path / "a.obj", boxes.obj(boxes.VT + boxes.CORNERS, "mtllib a.mtl\nusemtl m\n"))
    assert measured(path) == pytest.approx(6)


@pytest.mark.parametrize(
    "lines", ["vn -nan(ind) -nan(ind) -nan(ind)\n", "vn nan nan nan\n", "vn inf 0 0\n", "vn 1\n", "vn\n"]
)
def test_normals_of_an_obj_that_are_no_numbers_are_computed_anew(tmp_path, lines):
    faces = (
        "vn 1 0 0\n" + lines + "".join("f {}//1 {}//2 {}//2\n".format(*(face + 1)) for face in boxes.FACES)
    )
    path = boxes.write(tmp_path / "a.obj", boxes.obj(faces))
    assert measured(path) == pytest.approx(6)
    shown = obj.read_obj(path.read_bytes(), path)
    normals = shown.meshes[0][0].attributes["NORMAL"].values
    assert np.allclose(np.linalg.norm(normals, axis=1), 1, atol=1e-6)
    assert (normals == [1, 0, 0]).all(axis=1).any(), "those that are numbers stay"


def test_texture_coordinates_of_an_obj_that_are_no_numbers_are_dropped(tmp_path):
    path = boxes.write(tmp_path / "a.obj", boxes.obj("vt nan nan\nvt 0 0\nvt 1 0\n" + boxes.CORNERS))
    assert measured(path) == pytest.approx(6)
    assert set(obj.read_obj(path.read_bytes(), path).meshes[0][0].attributes) == {"POSITION"}


@pytest.mark.parametrize("name", GLBS)
def test_no_texture_of_a_glb_stands_in_the_way(tmp_path, name):
    fields = {**GLBS[name], "materials": [TEXTURED], "primitive": {"material": 0}}
    path = boxes.write(tmp_path / "a.glb", boxes.glb(attributes={"TEXCOORD_0": boxes.UV}, **fields))
    assert measured(path) == pytest.approx(6)


@pytest.mark.parametrize("name", ["NORMAL", "TANGENT", "TEXCOORD_0", "COLOR_0"])
def test_attributes_of_a_glb_that_are_no_numbers(tmp_path, name):
    width = {"NORMAL": 3, "TANGENT": 4, "TEXCOORD_0": 2, "COLOR_0": 3}[name]
    values = np.zeros((8, width))
    values[:, 0] = 1
    values[3] = np.nan
    path = boxes.write(tmp_path / "a.glb", boxes.glb(attributes={name: values}))
    assert measured(path) == pytest.approx(6)
    for array in glb.read_glb(memoryview(path.read_bytes())).meshes[0][0].attributes.values():
        assert np.isfinite(array.values).all()


def test_normals_of_a_glb_and_of_a_ply_are_computed_where_they_are_no_numbers(tmp_path):
    expected = vertex_normals(boxes.POINTS, boxes.FACES)[3]
    columns = [("float", name) for name in ("nx", "ny", "nz")]
    text = boxes.ply(columns=columns, values=NORMALS)
    shown: list[Model] = [
        glb.read_glb(memoryview(boxes.glb(attributes={"NORMAL": NORMALS}))),
        ply.read_mesh(text),
    ]
    for model in shown:
        normals = model.meshes[0][0].attributes["NORMAL"].values
        assert np.array_equal(np.delete(normals, 3, 0), np.delete(NORMALS, 3, 0).astype("<f4"))
        assert np.allclose(normals[3], expected, atol=1e-6)
    assert measured(boxes.write(tmp_path / "a.ply", text)) == pytest.approx(6)


def test_smooth_normals_are_weighted_by_area():
    centred = boxes.POINTS - [0.5, 1, 1.5]
    normals = vertex_normals(centred, boxes.FACES)
    assert (normals * centred > 0).all(), "outwards along each axis"
    points = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 3]], float)
    faces = np.array([[0, 1, 2], [0, 2, 3]])
    # areas 1/2 along z and 3/2 along x
    assert np.allclose(vertex_normals(points, faces)[0], np.array([3, 0, 1]) / 10**0.5, atol=1e-6)
    assert np.array_equal(vertex_normals(np.zeros((1, 3)), np.array([[0, 0, 0]])), [[0, 0, 1]])
    finite = np.ones((4, 3), "<f4")
    assert mended_normals(finite, points, faces) is finite
