"""Morph targets, hidden nodes, rotations and materials of GLB files as glTF 2.0 defines them."""

import numpy as np
import pytest

from eg3d_rlhf.geometry.files import glb
from eg3d_rlhf.geometry.files.appearance import vertex_normals
from eg3d_rlhf.geometry.files.triangles import read_triangles, scene_triangles
from tests.geometry.files import boxes
from tests.rejections import raising

WIDER = np.where(boxes.POINTS[:, :1] > 0, [9.0, 0, 0], [0.0, 0, 0])  # 1 x 2 x 3 becomes 10 x 2 x 3
HIGHER = np.where(boxes.POINTS[:, 1:2] > 0, [0.0, 2, 0], [0.0, 0, 0])  # y 2 becomes 4
HIDDEN = {"KHR_node_visibility": {"visible": False}}


def volume(path) -> float:
    """The volume that is measured, which must be that of what is shown."""
    shown = scene_triangles(glb.read_glb(memoryview(path.read_bytes())))
    measured = read_triangles(path)
    assert all(np.array_equal(a, b) for a, b in zip(shown, measured, strict=True))
    return boxes.volume(*measured)


@pytest.mark.parametrize(
    ("mesh_weights", "node_weights", "expected"),
    [
        (None, None, 6),
        ([0, 0], None, 6),
        ([1, 0], None, 60),
        (None, [1, 0], 60),
        (None, [0.5, 0], 33),
        ([1, 0], [0, 0], 6),
        ([1, 0], [0, 1], 12),
        (None, [1, 1], 120),
        (None, [-0.1, 0.5], 1 * 0.1 * 3 * 3),
    ],
)
def test_weights_of_a_node_override_those_of_its_mesh(tmp_path, mesh_weights, node_weights, expected):
    mesh = {} if mesh_weights is None else {"weights": mesh_weights}
    node = {"mesh": 0} | ({} if node_weights is None else {"weights": node_weights})
    data = boxes.glb(targets=[WIDER, HIGHER], mesh=mesh, nodes=[node])
    assert volume(boxes.write(tmp_path / "a.glb", data)) == pytest.approx(expected, rel=1e-5)


def test_one_mesh_with_the_weights_of_two_nodes(tmp_path):
    data = boxes.glb(
        targets=[WIDER],
        nodes=[
            {"mesh": 0},
            {"mesh": 0, "weights": [1], "translation": [0, 9, 0]},
            {"mesh": 0, "weights": [0]},
        ],
        scenes=[{"nodes": [0, 1, 2]}],
    )
    path = boxes.write(tmp_path / "a.glb", data)
    assert volume(path) == pytest.approx(6 + 60 + 6)
    assert len(glb.read_glb(memoryview(data)).meshes) == 2


def test_normals_of_morphed_positions_are_computed_anew():
    normals = np.tile([1.0, 0, 0], (8, 1))
    tangents = np.tile([1.0, 0, 0, 1], (8, 1))
    data = boxes.glb(
        targets=[WIDER], mesh={"weights": [1]}, attributes={"NORMAL": normals, "TANGENT": tangents}
    )
    part = glb.read_glb(memoryview(data)).meshes[0][0]
    assert set(part.attributes) == {"POSITION", "NORMAL"}
    expected = vertex_normals(boxes.POINTS + WIDER, boxes.FACES)
    assert np.allclose(part.attributes["NORMAL"].values, expected, atol=1e-6)


def test_invalid_morph_targets_are_rejected():
    for weights, targets in (([1, 1], [WIDER]), ([1], [WIDER[:5]]), ([1], [WIDER * np.nan]), ([1], [])):
        with raising("GLB" if len(targets) != 1 or len(weights) > 1 else "morph"):
            glb.read_glb(memoryview(boxes.glb(targets=targets, mesh={"weights": weights})))


@pytest.mark.parametrize("required", [[], ["KHR_node_visibility"]])
@pytest.mark.parametrize("depth", [0, 1])
def test_hidden_nodes_are_neither_shown_nor_measured(tmp_path, required, depth):
    hidden = {"mesh": 0, "translation": [9, 0, 0]}
    nodes = (
        [{"mesh": 0}, {**hidden, "extensions": HIDDEN}]
        if depth == 0
        else [{"mesh": 0}, {"children": [2], "extensions": HIDDEN}, hidden]
    )
    fields = {"nodes": nodes, "scenes": [{"nodes": [0, 1]}], "extensionsRequired": required}
    path = boxes.write(tmp_path / "a.glb", boxes.glb(**fields))
    assert volume(path) == pytest.approx(6)
    assert len(glb.read_glb(memoryview(path.read_bytes())).nodes) == 1
    nodes[-1 if depth == 0 else 1] = {
        **nodes[-1 if depth == 0 else 1],
        "extensions": {"KHR_node_visibility": {"visible": True}},
    }
    assert volume(boxes.write(tmp_path / "b.glb", boxes.glb(**fields))) == pytest.approx(12)
    with raising("GLB", "triangles"):
        glb.read_glb(memoryview(boxes.glb(nodes=[{"mesh": 0, "extensions": HIDDEN}])))


@pytest.mark.parametrize("length", [0.1, 2.0, 30.0])
def test_rotations_of_another_length_do_not_scale(tmp_path, length):
    turn = np.array([0.0, 0.6, 0.0, 0.8])
    right = boxes.write(tmp_path / "a.glb", boxes.glb(nodes=[{"mesh": 0, "rotation": turn.tolist()}]))
    wrong = boxes.write(
        tmp_path / "b.glb", boxes.glb(nodes=[{"mesh": 0, "rotation": (length * turn).tolist()}])
    )
    assert volume(wrong) == pytest.approx(6)
    assert np.allclose(read_triangles(wrong)[0], read_triangles(right)[0])
    rounded = [0.0, 0.60001, 0.0, 0.8]
    model = glb.read_glb(memoryview(boxes.glb(nodes=[{"mesh": 0, "rotation": rounded}])))
    assert model.nodes[0].place["rotation"] == rounded
    with raising("rotation"):
        glb.read_glb(memoryview(boxes.glb(nodes=[{"mesh": 0, "rotation": [0, 0, 0, 0]}])))


@pytest.mark.parametrize("required", [[], ["KHR_materials_pbrSpecularGlossiness"]])
def test_specular_glossiness_gives_its_diffuse_colour_and_texture(required):
    def fields(glossy: dict, **other) -> dict:
        model = glb.read_glb(
            memoryview(
                boxes.glb(
                    attributes={"TEXCOORD_0": boxes.UV},
                    materials=[{"extensions": {"KHR_materials_pbrSpecularGlossiness": glossy}, **other}],
                    primitive={"material": 0},
                    textures=[{"source": 0}],
                    images=[boxes.image()],
                    extensionsRequired=required,
                )
            )
        )
        noted = [note.kind for note in model.notes] == ["approximated"]
        return {**model.materials[0]["pbrMetallicRoughness"], "noted": noted}

    assert fields({"diffuseFactor": [1, 0, 0, 1], "glossinessFactor": 0.25}) == {
        "baseColorFactor": [1, 0, 0, 1],
        "metallicFactor": 0,
        "roughnessFactor": 0.75,
        "noted": True,
    }
    textured = {"diffuseTexture": {"index": 0}, "specularGlossinessTexture": {"index": 0}}
    assert fields(textured) == {
        "baseColorTexture": {"index": 0},
        "metallicFactor": 0,
        "roughnessFactor": 1,
        "noted": True,
    }
    stated = {"pbrMetallicRoughness": {"baseColorFactor": [0, 1, 0, 1]}}
    assert fields(textured, **stated) == {"baseColorFactor": [0, 1, 0, 1], "noted": False}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"buffers": [{"byteLength": 4, "uri": "data:application/octet-stream;base64,AAAA"}]}, "base64"),
        ({"extensionsRequired": ["KHR_draco_mesh_compression"]}, "KHR_draco_mesh_compression"),
        ({"extensionsRequired": ["EXT_meshopt_compression"]}, "EXT_meshopt_compression"),
        ({"extensionsRequired": ["EXT_mesh_gpu_instancing"]}, "EXT_mesh_gpu_instancing"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, fields, named):
    path = boxes.write(tmp_path / "a.glb", boxes.glb(**fields))
    for read in (lambda: read_triangles(path), lambda: glb.read_glb(memoryview(path.read_bytes()))):
        with raising(named):
            read()
