"""Textures of OBJ and PLY files: which file is used, and what is noted where none can be used."""

import gzip
import json
import re

import numpy as np
import pytest
from click.testing import CliRunner

from eg3d_rlhf.geometry.files import glb, obj, ply
from eg3d_rlhf.geometry.files.model import Model
from eg3d_rlhf.geometry.files.triangles import read_triangles
from eg3d_rlhf.modes.label import main as label_main
from eg3d_rlhf.people.label.assets import reading
from eg3d_rlhf.people.label.assets.collection import read_collection
from tests.geometry.files import boxes
from tests.people.label.asset_files import unpack_glb

GREY = [0.4, 0.4, 0.4, 1.0]


def shown(
    folder, mtl: str, faces: str = "usemtl Tex\n" + boxes.CORNERS, head: str = "mtllib a.mtl\n"
) -> Model:
    """Read an OBJ of the box with a material file, and with a texture tex.png beside it."""
    boxes.write(folder / "a.mtl", mtl)
    boxes.write(folder / "tex.png", boxes.image())
    path = boxes.write(folder / "a.obj", boxes.obj(boxes.VT + faces, head))
    return obj.read_obj(path.read_bytes(), path)


def looks(model: Model) -> list:
    """For each part, 'texture' or the colour of its material, and whether it has texture coordinates."""
    found = []
    for part in model.meshes[0]:
        fields = model.materials[part.material]["pbrMetallicRoughness"]
        look = "texture" if "baseColorTexture" in fields else fields["baseColorFactor"]
        found.append((look, "TEXCOORD_0" in part.attributes))
    return found


@pytest.mark.parametrize(
    "name",
    [
        "tex.png",
        "./tex.png",
        "TEX.PNG",
        '"tex.png"',
        "tex.png # the texture",
        "-s 1 1 1 tex.png",
        "-blendu on -o 0 0 0 -bm 1.0 tex.png",
        "/data/scans/tex.png",
        "D:\\scans\\tex.png",
        "D:/scans/tex.png",
        "textures/tex.png",
        "../../elsewhere/tex.png",
    ],
)
def test_a_texture_that_lies_beside_the_obj_is_used(tmp_path, name):
    model = shown(tmp_path, f"newmtl Tex\nmap_Kd {name}\n")
    assert looks(model) == [("texture", True)] and model.notes == []


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("gone.png", "gone.png"),
        ("picture.tga", "picture.tga"),
        ("broken.png", "broken.png"),
        ("scrambled.png", "scrambled.png"),
        ("-s 2 2 2 tex.png", "-s"),
        ("-o 0.5 tex.png", "-o"),
        ("-clamp on tex.png", "-clamp"),
    ],
)
@pytest.mark.parametrize("colour", [None, (1, 0, 0)])
def test_a_texture_that_cannot_be_used_leaves_the_colour_and_a_note(tmp_path, name, named, colour):
    whole = boxes.image(side=64)
    at = whole.index(b"IDAT") + 4
    boxes.write(tmp_path / "broken.png", whole[:60])
    boxes.write(tmp_path / "scrambled.png", whole[:at] + bytes(20) + whole[at + 20 :])
    boxes.write(tmp_path / "picture.tga", boxes.image("TGA"))
    stated = "Kd {} {} {}\n".format(*colour) if colour else ""
    model = shown(tmp_path, f"newmtl Tex\n{stated}map_Kd {name}\n")
    assert looks(model) == [([1, 0, 0, 1] if colour else GREY, True)]
    assert [note.kind for note in model.notes] == ["untextured"] and named in model.notes[0].text


@pytest.mark.parametrize("separator", ["/", "\\"])
def test_the_layout_of_shapenet(tmp_path, separator):
    """Textures lie in a folder beside that of the mesh. They are used if the user passed a folder above."""
    models = tmp_path / "set" / "03001627" / "x1" / "models"
    path = boxes.write(models / "m.obj", boxes.obj(boxes.VT + boxes.CORNERS, "mtllib m.mtl\nusemtl m\n"))
    texture = separator.join(["..", "images", "texture0.jpg"])
    boxes.write(models / "m.mtl", f"newmtl m\nmap_Kd {texture}\n")
    picture = boxes.write(models.parent / "images" / "texture0.jpg", boxes.image("JPEG"))
    assert boxes.volume(*read_triangles(path)) == pytest.approx(6)
    assert looks(obj.read_obj(path.read_bytes(), path, root=tmp_path / "set")) == [("texture", True)]
    assert looks(obj.read_obj(path.read_bytes(), path)) == [(GREY, True)]
    boxes.write(
        tmp_path / "set" / "all.jsonl",
        json.dumps({"asset": "03001627/x1/models/m.obj", "prompt": "chair"}) + "\n",
    )
    (asset,) = read_collection(tmp_path / "set" / "all.jsonl").assets
    assert not asset.untextured
    document, _ = unpack_glb(gzip.decompress(reading.clean(asset.path, asset.hash)))
    assert len(document["images"]) == 1 and "extras" not in document["asset"]
    picture.write_bytes(boxes.image("JPEG", side=16))
    with pytest.raises(reading.ChangedError):
        reading.clean(asset.path, asset.hash)
    picture.unlink()
    picture.symlink_to(boxes.write(tmp_path / "texture0.jpg", boxes.image("JPEG")))
    (asset,) = read_collection(tmp_path / "set" / "all.jsonl").assets
    assert asset.untextured, "a link that leads out of the folder"


MTL = "newmtl Tex\nmap_Kd tex.png\nnewmtl Plain\nKd 0 1 0\n"
LINES = boxes.CORNERS.splitlines(keepends=True)
BARE = "".join("f {} {} {}\n".format(*(face + 1)) for face in boxes.FACES)


@pytest.mark.parametrize(
    ("mtl", "faces", "expected"),
    [
        ("newmtl Tex\nmap_Kd tex.png\n", boxes.CORNERS, [("texture", True)]),
        (MTL, boxes.CORNERS, [(GREY, True)]),
        (MTL, "usemtl TEX\n" + boxes.CORNERS, [("texture", True)]),
        (MTL, "usemtl Other\n" + boxes.CORNERS, [(GREY, True)]),
        (MTL, "usemtl Tex # comment\n" + boxes.CORNERS, [("texture", True)]),
        (
            MTL,
            "usemtl Tex\n" + "".join(LINES[:8]) + "usemtl Plain\n" + "".join(BARE.splitlines(True)[8:]),
            [("texture", True), ([0, 1, 0, 1], False)],
        ),
        (MTL + "newmtl tex\n", "usemtl TEX\n" + boxes.CORNERS, [(GREY, True)]),
        ("", "usemtl Tex\n" + boxes.CORNERS, [(GREY, True)]),
    ],
    ids=["one", "several", "case", "unknown", "comment", "mixed", "two-cases", "empty"],
)
def test_which_material_the_faces_have(tmp_path, mtl, faces, expected):
    model = shown(tmp_path, mtl, faces)
    assert looks(model) == expected
    assert bool(model.notes) == any(look == GREY for look, _ in expected)
    assert boxes.volume(*read_triangles(tmp_path / "a.obj")) == pytest.approx(6)


def test_faces_of_a_textured_material_without_texture_coordinates_are_named(tmp_path):
    model = shown(
        tmp_path, "newmtl Tex\nmap_Kd tex.png\n", "usemtl Tex\n" + LINES[0] + BARE.split("\n", 1)[1]
    )
    assert looks(model) == [("texture", True), (GREY, False)] and "tex.png" in model.notes[0].text


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("mtllib a.mtl b.mtl", ("a.mtl", "b.mtl")),
        ("mtllib b.mtl a.mtl # both", ("b.mtl", "a.mtl")),
        ("mtllib a.mtl # comment", ("a.mtl",)),
        ("mtllib A.MTL", ("a.mtl",)),
        ("mtllib C:\\me\\a.mtl", ("a.mtl",)),
        ("mtllib a b.mtl", ("a b.mtl",)),
        ("mtllib a.mtl\nmtllib b.mtl", ("a.mtl", "b.mtl")),
    ],
)
def test_lines_that_name_material_files(tmp_path, line, names):
    boxes.write(tmp_path / "b.mtl", "newmtl Plain\nKd 0 1 0\n")
    boxes.write(tmp_path / "a b.mtl", "newmtl Tex\nmap_Kd tex.png\n")
    faces = "usemtl Tex\n" + boxes.CORNERS + "usemtl Plain\nf 1 2 3\n"
    model = shown(tmp_path, "newmtl Tex\nmap_Kd tex.png\n", faces, line + "\n")
    companions = obj.companion_files((tmp_path / "a.obj").read_bytes(), tmp_path / "a.obj")
    assert {path.name for path in companions} == {*names, "tex.png"}
    assert looks(model)[0] == ("texture", True)
    assert (looks(model)[1] == ([0, 1, 0, 1], False)) == ("b.mtl" in names)


@pytest.mark.parametrize(
    ("lines", "opacity"),
    [("d 0.25", 0.25), ("Tr 0.75", 0.25), ("Tr 0", 1), ("d 1\nTr 1", 1), ("Tr 1\nd 1", 1)],
)
def test_opacity(tmp_path, lines, opacity):
    ((colour, _),) = looks(shown(tmp_path, f"newmtl Tex\nKd 1 0 0\n{lines}\n"))
    assert colour == [1, 0, 0, opacity]


WEDGE = "property list uchar float texcoord\n"
COORDINATES = ["6 0 0 1 0 1 1"] * 12


@pytest.mark.parametrize(
    "comment", ["TextureFile tex.png", "texturefile tex.png", "TextureFile C:\\me\\tex.png"]
)
@pytest.mark.parametrize("place", ["faces", "vertices"])
def test_textures_of_a_ply(tmp_path, comment, place):
    boxes.write(tmp_path / "tex.png", boxes.image())
    if place == "faces":
        data = boxes.ply(comments=[comment], face_properties=WEDGE, face_values=COORDINATES)
    else:
        data = boxes.ply(comments=[comment], columns=[("float", "s"), ("float", "t")], values=boxes.UV)
    path = boxes.write(tmp_path / "a.ply", data)
    model = ply.read_mesh(data, path=path)
    assert looks(model) == [("texture", True)] and model.notes == []
    part = model.meshes[0][0]
    corners = part.indices.values[:, 0]
    assert np.array_equal(part.attributes["POSITION"].values[corners], boxes.POINTS[boxes.FACES.reshape(-1)])
    uv = np.tile([[0, 1], [1, 1], [1, 0]], (12, 1)) if place == "faces" else boxes.UV[boxes.FACES.reshape(-1)]
    expected = uv if place == "faces" else np.stack([uv[:, 0], 1 - uv[:, 1]], axis=1)
    assert np.allclose(part.attributes["TEXCOORD_0"].values[corners], expected, atol=1e-6)
    (examined,) = reading.examine([path])
    document, _ = unpack_glb(gzip.decompress(reading.clean(path, examined.hash)))
    assert len(document["images"]) == 1 and not examined.untextured
    boxes.write(tmp_path / "tex.png", boxes.image(side=16))
    with pytest.raises(reading.ChangedError):
        reading.clean(path, examined.hash)


def test_several_textures_of_a_ply_and_faces_without_one(tmp_path):
    for name in ("a.png", "b.png"):
        boxes.write(tmp_path / name, boxes.image())
    data = boxes.ply(
        comments=["TextureFile a.png", "TextureFile b.png"],
        face_properties=WEDGE + "property int texnumber\n",
        face_values=[f"6 0 0 1 0 1 1 {number}" for number in [0] * 6 + [1] * 4 + [-1] * 2],
    )
    model = ply.read_mesh(data, path=boxes.write(tmp_path / "a.ply", data))
    assert looks(model) == [("texture", True), ("texture", True), (GREY, True)]
    assert [len(part.indices.values) // 3 for part in model.meshes[0]] == [6, 4, 2]


@pytest.mark.parametrize("values", [None, ["6 0 0 1 0 1 nan"] * 12])
@pytest.mark.parametrize("name", ["tex.png", "gone.png", "/etc/passwd"])
def test_a_ply_whose_texture_cannot_be_used_is_grey_with_a_note(tmp_path, values, name):
    boxes.write(tmp_path / "tex.png", boxes.image())
    fields = {"face_properties": WEDGE, "face_values": values} if values else {}
    if not values and name != "tex.png":
        fields = {"face_properties": WEDGE, "face_values": COORDINATES}
    data = boxes.ply(comments=[f"TextureFile {name}"], **fields)
    model = ply.read_mesh(data, path=boxes.write(tmp_path / "a.ply", data))
    assert looks(model) == [(GREY, False)] and name.rpartition("/")[2] in model.notes[0].text


def test_metal_and_light_of_a_glb_do_not_outlive_their_textures():
    material = {
        "pbrMetallicRoughness": {"baseColorTexture": {"index": 0}, "metallicRoughnessTexture": {"index": 0}},
        "emissiveTexture": {"index": 0},
        "emissiveFactor": [1, 1, 1],
        "normalTexture": {"index": 0, "scale": 2},
    }
    data = boxes.glb(
        attributes={"TEXCOORD_0": boxes.UV},
        materials=[material],
        primitive={"material": 0},
        textures=[{"extensions": {"EXT_texture_avif": {"source": 0}}}],
        images=[boxes.image("AVIF")],
    )
    model = glb.read_glb(memoryview(data))
    assert model.materials == [
        {"pbrMetallicRoughness": {"baseColorFactor": GREY, "metallicFactor": 0, "roughnessFactor": 1}}
    ]
    assert len(model.notes) == 4 and not model.images


def test_a_glb_whose_texture_has_no_coordinates_keeps_the_others(tmp_path):
    data = boxes.glb(
        attributes={"TEXCOORD_0": boxes.UV},
        materials=[
            {
                "pbrMetallicRoughness": {"baseColorTexture": {"index": 0, "texCoord": 1}},
                "normalTexture": {"index": 0},
            }
        ],
        primitive={"material": 0},
        textures=[{"source": 0}],
        images=[boxes.image()],
    )
    model = glb.read_glb(memoryview(data))
    material = model.materials[model.meshes[0][0].material]
    assert "normalTexture" in material and "baseColorTexture" not in material["pbrMetallicRoughness"]
    assert [note.kind for note in model.notes] == ["untextured"] and "TEXCOORD_1" in model.notes[0].text


def test_the_plan_counts_assets_without_their_textures(tmp_path):
    assets = tmp_path / "assets"
    for generator, name in (("one", "tex.png"), ("two", "gone.png")):
        for prompt in ("chair", "table", "lamp"):
            folder = assets / generator
            boxes.write(folder / "tex.png", boxes.image(side=8 + len(prompt)))
            boxes.write(folder / f"{prompt}.mtl", f"newmtl m\nmap_Kd {name}\n")
            boxes.write(
                folder / f"{prompt}.obj",
                boxes.obj(boxes.VT + boxes.CORNERS, f"# {generator}\nmtllib {prompt}.mtl\nusemtl m\n"),
            )
    lines: list[str] = []
    collection = read_collection(assets, lines.append)
    assert [asset.generator for asset in collection.assets if asset.untextured] == ["two"] * 3
    assert [
        note for note in collection.notes if "3 of 6" in note and re.search(r"\b3\b.*\b3\b.*\btwo\b", note)
    ]
    assert sum("chair.obj" in line and "gone.png" in line for line in lines) == 1
    done = CliRunner().invoke(
        label_main, [f"--assets={assets}", f"--db=sqlite:///{tmp_path}/x.db", "--dry-run"]
    )
    read = json.loads(done.stdout)["read"]
    assert (read["assets"], read["untextured"]) == (6, 3) and read["generators"] == ["one", "two"]
    assert read["notes"] == collection.notes
