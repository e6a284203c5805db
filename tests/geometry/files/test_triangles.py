"""Every kind of mesh file, as triangles; what labelling accepts, it shows."""

import gzip
import json
import struct

import numpy as np
import pytest
import trimesh

from eg3d_rlhf.geometry.files.glb import read_glb
from eg3d_rlhf.geometry.files.model import Model, Node, model_from_primitives, triangle_primitive
from eg3d_rlhf.geometry.files.mtl import utf16
from eg3d_rlhf.geometry.files.obj import read_obj
from eg3d_rlhf.geometry.files.polygons import MAX_CORNERS, triangulate_faces
from eg3d_rlhf.geometry.files.triangles import read_triangles, scene_triangles
from eg3d_rlhf.people.label.assets import reading
from eg3d_rlhf.people.label.assets.collection import read_collection
from eg3d_rlhf.rewards.meshes.dataset import load_mesh
from tests.people.label import asset_files as files
from tests.people.label.test_asset_attacks import GLBS
from tests.rejections import raising

CUBE = "".join(f"v {x} {y} {z}\n" for x in (0, 1) for y in (0, 1) for z in (0, 1))
QUADS = [(1, 2, 4, 3), (5, 7, 8, 6), (1, 5, 6, 2), (3, 4, 8, 7), (1, 3, 7, 5), (2, 6, 8, 4)]  # outwards
ARROW = [(0, 0), (2, 2), (0, 4), (1, 2)]  # a concave quad: area 2
STAR = [(np.cos(t) * r, np.sin(t) * r) for t, r in zip(np.arange(10) * np.pi / 5, [3, 1] * 5, strict=True)]
COMB = [
    (0, 0),
    (7, 0),
    (7, 3),
    (6, 3),
    (6, 1),
    (5, 1),
    (5, 3),
    (4, 3),
    (4, 1),
    (3, 1),
    (3, 3),
    (2, 3),
    (2, 1),
    (1, 1),
    (1, 3),
    (0, 3),
]


def prism(outline, form: str = "{}") -> str:
    """An OBJ of a prism over an outline: two faces of many corners and quads. Args: form: of a corner."""
    n = len(outline)
    lines = [f"v {x} {y} {z}" for z in (0, 1) for x, y in outline]
    faces = [
        range(n, 0, -1),
        range(n + 1, 2 * n + 1),
        *((i + 1, (i + 1) % n + 1, (i + 1) % n + n + 1, i + n + 1) for i in range(n)),
    ]
    return (
        "\n".join([*lines, *("f " + " ".join(form.format(number) for number in face) for face in faces)])
        + "\n"
    )


def area(outline) -> float:
    x, y = np.array(outline, dtype=float).T
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


def ply_faces(vertices, faces, kind: str) -> bytes:
    """A PLY of faces of any number of corners. Args: kind: of its format."""
    head = (
        f"ply\nformat {kind} 1.0\nelement vertex {len(vertices)}\nproperty float x\nproperty float"
        " y\nproperty float z\n"
    )
    head += (
        f"element face {len(faces)}\nproperty list uchar int vertex_indices\nproperty uchar red\nproperty"
        " uchar green\n"
    )
    head += "property uchar blue\nend_header\n"
    if kind == "ascii":
        return (
            head
            + "".join(" ".join(map(str, row)) + "\n" for row in vertices)
            + "".join(f"{len(f)} {' '.join(map(str, f))} 9 8 7\n" for f in faces)
        ).encode()
    order = "<" if "little" in kind else ">"
    rows = b"".join(struct.pack(f"{order}3f", *row) for row in vertices)
    return (
        head.encode()
        + rows
        + b"".join(struct.pack(f"{order}B{len(f)}i3B", len(f), *f, 9, 8, 7) for f in faces)
    )


CUBE_POINTS = [tuple(map(float, line.split()[1:])) for line in CUBE.splitlines()]
FROM_ZERO = [tuple(i - 1 for i in face) for face in QUADS]
MIXED = [*FROM_ZERO[:5], FROM_ZERO[5][:3], (FROM_ZERO[5][0], *FROM_ZERO[5][2:])]
OBJ_FACES = "".join("f " + " ".join(map(str, face)) + "\n" for face in QUADS)
# every face below its own corners, counted backwards
INTERLEAVED = "".join(
    "".join("v {} {} {}\n".format(*CUBE_POINTS[i - 1]) for i in face) + "f -4 -3 -2 -1\n" for face in QUADS
)
WITH_ALL = (  # texture, normals, groups, smooth groups, a comment, a continued line
    CUBE
    + "vt 0 0\nvt 1 0\nvt 1 1\nvt 0 1\nvn 0 0 1\ng part\ns 1\n"
    + "".join(
        "f " + " \\\n".join(f"{i}/{k}/1" for k, i in enumerate(face, 1)) + " # side\n" for face in QUADS
    )
)
CLOSED = {  # name -> bytes, volume
    "quads.obj": (CUBE + OBJ_FACES, 1.0),
    "backwards.obj": (INTERLEAVED, 1.0),
    "all.obj": (WITH_ALL, 1.0),
    "windows.obj": ((CUBE + OBJ_FACES).replace("\n", "\r\n"), 1.0),
    "smooth.obj": (CUBE + "s 1\n" + OBJ_FACES + "s off\n", 1.0),
    "normals.obj": (
        CUBE + "vn 0 0 1\n" + OBJ_FACES.replace(" ", "//1 ").replace("f//1", "f").replace("\n", "//1\n"),
        1.0,
    ),
    "colours.obj": (CUBE.replace("\n", " .5 .5 .5\n") + OBJ_FACES, 1.0),
    "arrow.obj": (prism(ARROW), 2.0),
    "star.obj": (prism(STAR), area(STAR)),
    "comb.obj": (prism(COMB), area(COMB)),
    "utf8-mark.obj": ((CUBE + OBJ_FACES).encode("utf-8-sig"), 1.0),
    "utf16.obj": ((CUBE + OBJ_FACES).encode("utf-16"), 1.0),
    "utf16-le.obj": ((CUBE + OBJ_FACES).encode("utf-16-le"), 1.0),
    "utf16-be.obj": (("# caf\u00e9\n" + CUBE + OBJ_FACES).encode("utf-16-be"), 1.0),
    "no-mtl.obj": ("mtllib gone.mtl\n" + CUBE + "usemtl red\n" + OBJ_FACES, 1.0),
    **{
        f"{'mixed' if faces is MIXED else 'quads'}-{kind}.ply": (ply_faces(CUBE_POINTS, faces, kind), 1.0)
        for faces in (FROM_ZERO, MIXED)
        for kind in ("ascii", "binary_little_endian", "binary_big_endian")
    },
    "star.ply": (
        ply_faces(
            [(x, y, z) for z in (0, 1) for x, y in STAR],
            [
                range(9, -1, -1),
                range(10, 20),
                *((i, (i + 1) % 10, (i + 1) % 10 + 10, i + 10) for i in range(10)),
            ],
            "binary_little_endian",
        ),
        area(STAR),
    ),
}
REJECTED = {  # name -> bytes, texts in the error
    "points.obj": (CUBE, ("triangles", "OBJ")),
    "points.ply": (ply_faces(CUBE_POINTS, [], "ascii"), ("splats", "points")),
    "empty.obj": ("", ("1 byte", "0 bytes")),
    "beyond.obj": (CUBE + "f 1 2 9\n", (" 8 ", "9")),
    "zero.obj": (CUBE + "f 0 1 2\n", ("'0'", "line 9")),
    "before.obj": (CUBE + "f -9 -8 -7\n", (" 8 ", "'-9'", "line 9")),
    "words.obj": (CUBE + "f a b c\n", ("'a'", "line 9")),
    "beyond.ply": (ply_faces(CUBE_POINTS, [(0, 1, 8)], "binary_little_endian"), (" 8 ", "0..8")),
    "short.ply": (ply_faces(CUBE_POINTS, FROM_ZERO, "binary_little_endian")[:-9], ("6", "'face'", "PLY")),
    "unnamed.ply": (
        ply_faces(CUBE_POINTS, FROM_ZERO, "ascii").replace(b"vertex_indices", b"corners"),
        ("vertex_indices", "corners"),
    ),
    "nan.obj": (CUBE.replace("v 0 0 0", "v 0 nan 0") + OBJ_FACES, ("finite", "positions")),
    "utf16.ply": (CUBE.encode("utf-16"), ("UTF-16", "UTF-8")),
    "large.obj": (
        "".join(f"v {i} {i * i} 0\n" for i in range(MAX_CORNERS + 1))
        + "f "
        + " ".join(map(str, range(1, MAX_CORNERS + 2)))
        + "\n",
        (f"{MAX_CORNERS:,}", f"{MAX_CORNERS + 1:,}"),
    ),
}


def write(folder, name: str, data):
    path = folder / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def answer(request: dict) -> dict:
    """Return the answer of the labelling process, here without a process.

    Raises: ValueError for files that it rejects.
    """
    answered = reading._answer(request)
    if reading._REJECTED in answered:
        raise ValueError(answered[reading._REJECTED])
    return answered


def volume(vertices: np.ndarray, faces: np.ndarray) -> float:
    a, b, c = (np.asarray(vertices, float)[faces[:, i]] for i in range(3))
    return float((a * np.cross(b, c)).sum()) / 6


@pytest.mark.parametrize("name", CLOSED)
def test_what_examination_accepts_is_shown(tmp_path, name):
    data, expected = CLOSED[name]
    path = write(tmp_path, name, data)
    vertices, faces = read_triangles(path)
    assert volume(vertices, faces) == pytest.approx(expected, rel=1e-5)
    examined = answer({"do": "examine", "path": str(path)})
    answer(
        {
            "do": "clean",
            "path": str(path),
            "hash": examined["hash"],
            "degradation": "",
            "seed": 0,
            "out": str(tmp_path / "out"),
        }
    )
    document, binary = files.unpack_glb(gzip.decompress((tmp_path / "out").read_bytes()))
    indices = [
        document["accessors"][part["indices"]]["count"] for part in document["meshes"][0]["primitives"]
    ]
    assert sum(indices) == 3 * len(faces) and len(binary) > 12 * len(faces)
    assert volume(*(part.numpy() for part in load_mesh(path))) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", REJECTED)
def test_assets_that_cannot_be_shown_are_rejected_at_examination(tmp_path, name):
    data, names = REJECTED[name]
    path = write(tmp_path, name, data)
    with raising(*names):
        answer({"do": "examine", "path": str(path)})
    with pytest.raises(ValueError):
        load_mesh(path)


def test_all_kinds_are_examined_in_one_process(tmp_path):
    paths = [write(tmp_path, name, data) for name, (data, _) in CLOSED.items()]
    assert {examined.kind for examined in reading.examine(paths)} == {"obj", "ply"}
    with raising("points.obj", str(len(REJECTED) - 5)):
        reading.examine(paths + [write(tmp_path, name, data) for name, (data, _) in REJECTED.items()])


def test_a_missing_library_is_grey_and_named(tmp_path):
    path = write(tmp_path, "chair.obj", CLOSED["no-mtl.obj"][0])
    (examined,) = reading.examine([path])
    assert "gone.mtl" in examined.note and examined.untextured
    document, _ = files.unpack_glb(gzip.decompress(reading.clean(path, examined.hash)))
    colour = document["materials"][0]["pbrMetallicRoughness"]["baseColorFactor"]
    assert (
        colour[0] == colour[1] == colour[2] < 0.6 and document["meshes"][0]["primitives"][0]["material"] == 0
    )
    (tmp_path / "all" / "a").mkdir(parents=True)
    path.rename(tmp_path / "all" / "a" / "chair.obj")
    notes: list[str] = []
    read_collection(tmp_path / "all", notes.append)
    assert any("chair.obj" in line and "gone.mtl" in line for line in notes)
    assert any("1 of 1" in line for line in notes)
    write(tmp_path, "gone.mtl", "newmtl red\nKd 1 0 0\n".encode("utf-16"))
    write(tmp_path, "chair.obj", CLOSED["no-mtl.obj"][0])
    (examined,) = reading.examine([tmp_path / "chair.obj"])
    document, _ = files.unpack_glb(gzip.decompress(reading.clean(tmp_path / "chair.obj", examined.hash)))
    assert (examined.note, examined.untextured) == ("", False) and document["materials"][0][
        "pbrMetallicRoughness"
    ]["baseColorFactor"] == [
        1,
        0,
        0,
        1,
    ]


@pytest.mark.parametrize("outline", [ARROW, STAR, COMB, STAR[::-1], [(x, 0.5 * x) for x in range(5)]])
def test_polygons_keep_area_winding_and_number_of_triangles(outline):
    rng = np.random.default_rng(0)
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    turn *= np.sign(np.linalg.det(turn))
    for roll in range(len(outline)):
        flat = np.roll(np.array(outline, float), roll, axis=0)
        points = np.concatenate([flat, np.zeros((len(flat), 1))], axis=1) @ turn.T
        cut, face = triangulate_faces(points, np.arange(len(points)), np.array([len(points)]))
        areas = (
            np.cross(points[cut[:, 1]] - points[cut[:, 0]], points[cut[:, 2]] - points[cut[:, 0]])
            @ turn[:, 2]
            / 2
        )
        assert len(cut) == len(outline) - 2 and (face == 0).all()
        assert areas.sum() == pytest.approx(area(outline), abs=1e-9)
        assert (areas * np.sign(area(outline)) > -1e-9).all(), "none is wound the other way"


def test_faces_stay_in_order_and_small_ones_go():
    points = np.array([[*p, 0] for p in [(0, 0), (1, 0), (1, 1), (0, 1), (-1, 0.5)]], float)
    cut, face = triangulate_faces(
        points, np.array([0, 1, 2, 0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 4]), np.array([3, 4, 2, 5])
    )
    assert face.tolist() == [0, 1, 1, 3, 3, 3] and cut.max() == 13


def test_places_of_nodes_strips_and_integers(tmp_path):
    """A scene of two nodes, one mirrored, one turned and below another, against trimesh's reading of the
    same.
    """
    box = trimesh.creation.box((1, 2, 3))
    scene = trimesh.Scene()
    turn = trimesh.transformations.rotation_matrix(0.7, [1, 2, 3], [0.1, 0, 0])
    scene.add_geometry(box, node_name="a", transform=turn)
    scene.add_geometry(box, node_name="b", parent_node_name="a", transform=np.diag([-1.0, 2, 1, 1]))
    scene.export(tmp_path / "scene.glb")
    vertices, faces = read_triangles(tmp_path / "scene.glb")
    theirs = trimesh.load_mesh(tmp_path / "scene.glb", process=False)
    assert np.allclose(np.sort(vertices, axis=0), np.sort(theirs.vertices, axis=0), atol=1e-5)
    assert volume(vertices, faces) == pytest.approx(6 + 12, rel=1e-5)
    part = triangle_primitive(np.eye(3), np.array([[0, 1, 2]]))
    placed = Model(
        [
            Node([1], None, {"translation": [1, 0, 0], "rotation": [0, 0, 2**-0.5, 2**-0.5]}),
            Node([], 0, {"scale": [2, 2, 2]}),
        ],
        [0],
        [[part]],
    )
    assert np.allclose(scene_triangles(placed)[0], [[1, 2, 0], [-1, 0, 0], [1, 0, 2]])
    strip = model_from_primitives([part])
    object.__setattr__(strip.meshes[0][0], "mode", 5)
    assert len(scene_triangles(strip)[1]) == 1


def test_stl_files_and_files_of_other_formats(tmp_path):
    trimesh.creation.box().export(tmp_path / "box.stl")
    assert volume(*read_triangles(tmp_path / "box.stl")) == pytest.approx(1)
    for name, data in (("a.stl", b"solid nothing"), ("b.glb", b"<html>"), ("c", json.dumps({}).encode())):
        with pytest.raises(ValueError):
            read_triangles(write(tmp_path, name, data))


@pytest.mark.parametrize(
    "text, encoding",
    [
        ("v 1 2 3".encode("utf-16"), "utf-16"),
        ("v 1 2 3\n".encode("utf-16-le"), "utf-16-le"),
        ("v 1 2 3\n".encode("utf-16-be"), "utf-16-be"),
        (b"v 1 2 3\n", None),
        (bytes(40), None),
        (b"glTF\2\0\0\0aaaa", None),
    ],
)
def test_utf16_is_recognised_by_its_first_bytes(text, encoding):
    assert utf16(text) == encoding


def test_geometry_alone_equals_the_geometry_of_the_full_file(tmp_path):
    data = files.glb(300, 32, seed=1)
    path = files.write_obj(tmp_path / "p.obj", 300, seed=1)
    (tmp_path / "p.glb").write_bytes(data)
    for model, file in (
        (read_glb(memoryview(data)), tmp_path / "p.glb"),
        (read_obj(path.read_bytes(), path), path),
    ):
        for geometry, expected in zip(read_triangles(file), scene_triangles(model), strict=True):
            assert geometry.dtype == expected.dtype and np.array_equal(geometry, expected)
    alone = read_glb(memoryview(data), geometry_only=True)
    assert not (alone.materials or alone.textures or alone.images or alone.samplers)
    assert {name for part in alone.meshes[0] for name in part.attributes} == {"POSITION"}


def test_parts_without_geometry_are_not_checked(tmp_path):
    document, binary = files.glb_document()
    document["images"] = [{"uri": "http://127.0.0.1:9/x.png"}]
    document["accessors"][1]["count"] = 10**12  # texture coordinates
    (tmp_path / "p.glb").write_bytes(files.pack_glb(document, binary))
    path = files.write_obj(tmp_path / "p.obj")
    path.with_suffix(".mtl").write_text("newmtl a\nmap_Kd ../../none.png\n")
    for file in (tmp_path / "p.glb", path):
        vertices, faces = read_triangles(file)
        assert len(vertices) and len(faces)
    with pytest.raises(ValueError):
        read_glb(memoryview(files.pack_glb(document, binary)))
    assert [note.kind for note in read_obj(path.read_bytes(), path).notes] == ["untextured"]


@pytest.mark.parametrize("name", sorted(GLBS))
def test_hostile_geometry_is_rejected_alike(name):
    data = memoryview(GLBS[name][0])
    reasons = []
    for geometry_only in (False, True):
        with pytest.raises(ValueError) as caught:
            read_glb(data, geometry_only)
        reasons.append(str(caught.value))
    assert reasons[0] == reasons[1]
