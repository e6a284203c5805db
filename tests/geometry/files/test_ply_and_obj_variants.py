"""Variants of PLY headers, colours in several ranges, rational points, and splats that are not read."""

import struct

import numpy as np
import pytest

from eg3d_rlhf.geometry.files import obj, ply
from eg3d_rlhf.geometry.files.appearance import colours_255
from eg3d_rlhf.geometry.files.model import srgb_to_linear
from eg3d_rlhf.geometry.files.triangles import read_triangles
from tests.geometry.files import boxes
from tests.rejections import raising


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_line_ends_and_comments_of_a_header(tmp_path, newline):
    data = boxes.ply(comments=["end_header", "made by x, end_header follows"], newline=newline)
    assert boxes.volume(*read_triangles(boxes.write(tmp_path / "a.ply", data))) == pytest.approx(6)


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("first", [10, 13, 0])
def test_binary_data_whose_first_byte_is_a_line_end(tmp_path, newline, first):
    head = newline.join(
        [
            b"ply",
            b"format binary_little_endian 1.0",
            b"element vertex 8",
            *(b"property float " + name for name in (b"x", b"y", b"z")),
            b"element face 12",
            b"property list uchar int vertex_indices",
            b"end_header",
        ]
    )
    points = boxes.POINTS.astype("<f4")
    # the lowest byte of the first number: less than a millionth of it
    points[0, 0] = np.frombuffer(bytes([first, 0, 0, 0x2F]), "<f4")[0]
    body = points.tobytes() + b"".join(struct.pack("<B3i", 3, *face) for face in boxes.FACES)
    vertices, _ = read_triangles(boxes.write(tmp_path / "a.ply", head + newline + body))
    assert np.array_equal(vertices, points)


COLOURS = {  # type, values in the file -> sRGB in 0..255
    "uchar": ("uchar", [200, 10, 10], [200, 10, 10]),
    "unit": ("float", [0.8, 0.04, 0.04], [204, 10, 10]),
    "bytes-as-float": ("float", [200, 10, 10], [200, 10, 10]),
    "bytes-as-double": ("double", [200, 1, 0], [200, 1, 0]),
    "dark-bytes": ("float", [2, 1, 0], [2, 1, 0]),
    "white": ("float", [1, 1, 1], [255, 255, 255]),
    "rounding": ("float", [1.0000001, 0.5, 0], [255, 128, 0]),
}


@pytest.mark.parametrize("name", COLOURS)
@pytest.mark.parametrize(
    "names",
    ["red green blue", "diffuse_red diffuse_green diffuse_blue", "r g b"],
    ids=["rgb", "diffuse", "short"],
)
@pytest.mark.parametrize("place", ["vertices", "faces"])
def test_colours_of_a_ply(name, names, place):
    kind, values, expected = COLOURS[name]
    if place == "vertices":
        columns = [(kind, channel) for channel in names.split()]
        data = boxes.ply(columns=columns, values=np.tile(values, (8, 1)))
    else:
        properties = "".join(f"property {kind} {channel}\n" for channel in names.split())
        data = boxes.ply(face_properties=properties, face_values=[" ".join(map(str, values))] * 12)
    shown = ply.read_mesh(data).meshes[0][0].attributes["COLOR_0"].values
    assert np.allclose(shown, srgb_to_linear(np.array(expected) / 255), atol=1e-6)


@pytest.mark.parametrize("name", [name for name in COLOURS if name != "uchar"])
def test_colours_of_an_obj(tmp_path, name):
    _, values, expected = COLOURS[name]
    line = "v {} {} {} " + " ".join(map(str, values))
    path = boxes.write(tmp_path / "a.obj", boxes.obj(line=line))
    shown = obj.read_obj(path.read_bytes(), path).meshes[0][0].attributes["COLOR_0"].values
    assert np.allclose(shown, srgb_to_linear(np.array(expected) / 255), atol=1e-6)
    assert boxes.volume(*read_triangles(path)) == pytest.approx(6)


def test_colours_of_both_ranges():
    assert np.array_equal(colours_255(np.array([[0.0, 1.0, np.nan]])), [[0, 255, 0]])
    assert np.array_equal(colours_255(np.array([[0.0, 300.0, -5.0]])), [[0, 255, 0]])
    assert colours_255(np.zeros((4, 0))).shape == (4, 0)


def test_colours_of_some_vertices_of_an_obj_are_noted(tmp_path):
    text = boxes.obj().replace("v 0.0 0.0 0.0\n", "v 0.0 0.0 0.0 1 0 0\n")
    path = boxes.write(tmp_path / "a.obj", text)
    model = obj.read_obj(path.read_bytes(), path)
    assert "COLOR_0" not in model.meshes[0][0].attributes and "1 of 8" in model.notes[0].text


def test_rational_points_are_divided_by_w(tmp_path):
    doubled = boxes.write(tmp_path / "a.obj", boxes.obj(points=2 * boxes.POINTS, line="v {} {} {} 2"))
    assert boxes.volume(*read_triangles(doubled)) == pytest.approx(6)
    mixed = boxes.obj(points=boxes.POINTS).replace("v 1.0 2.0 3.0\n", "v 2 4 6 2.0\n")
    assert boxes.volume(*read_triangles(boxes.write(tmp_path / "b.obj", mixed))) == pytest.approx(6)
    with raising("w = 0"):
        read_triangles(boxes.write(tmp_path / "c.obj", boxes.obj(line="v {} {} {} 0")))


def splat_header(*names: str, elements: str = "") -> bytes:
    """A PLY of one point with float properties."""
    properties = "".join(f"property float {name}\n" for name in names)
    head = f"ply\nformat binary_little_endian 1.0\n{elements}element vertex 1\n{properties}end_header\n"
    return head.encode() + bytes(4 * len(names) + 400)


ROTATION = [f"rot_{i}" for i in range(4)]
SCALES = [f"scale_{i}" for i in range(3)]
HARMONICS = [f"f_dc_{i}" for i in range(3)]
KINDS = {  # kind of a file that is not read -> its bytes, text in the error
    "compressed": (
        splat_header("packed_position", "packed_rotation", "packed_scale", "packed_color"),
        "SuperSplat",
    ),
    "rgb": (
        splat_header(*"xyz", "red", "green", "blue", "opacity", *SCALES, *ROTATION),
        "ns-export",
    ),
    "flat": (splat_header(*"xyz", *HARMONICS, "opacity", *SCALES[:2], *ROTATION), "2D"),
    "no-opacity": (splat_header(*"xyz", *HARMONICS, *SCALES, *ROTATION), "opacity"),
    "strips": (
        b"ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nproperty float y\nproperty float z\n"
        b"element tristrips 1\nproperty list int int vertex_indices\nend_header\n0 0 0\n3 0 0 0\n",
        "tristrips",
    ),
    "splats": (splat_header(*"xyz", *HARMONICS, "opacity", *SCALES, *ROTATION), "splats"),
    "points": (splat_header(*"xyz"), "1 points"),
}


@pytest.mark.parametrize("name", KINDS)
def test_what_a_ply_without_a_mesh_is(tmp_path, name):
    data, text = KINDS[name]
    path = boxes.write(tmp_path / "a.ply", data)
    with raising(text):
        read_triangles(path)
    if ply.read_header(memoryview(data)).splats and name != "splats":
        with raising(text):
            ply.read_splats(memoryview(data))
