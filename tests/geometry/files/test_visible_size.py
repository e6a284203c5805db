"""Parts that cannot be seen, such as a stray vertex or a flat triangle, do not decide the size of a mesh."""

import numpy as np
import pytest

from eg3d_rlhf.geometry.files import obj, ply
from eg3d_rlhf.geometry.files.model import glb_parts
from eg3d_rlhf.geometry.files.triangles import may_be_visible, read_triangles
from eg3d_rlhf.measures.meshes.clean import clean_mesh
from eg3d_rlhf.people.label.assets.damage import damage_mesh
from eg3d_rlhf.people.label.shape_files import compress
from eg3d_rlhf.rewards.meshes.dataset import load_mesh
from tests.geometry.files import boxes
from tests.people.label.browser import browser, needs_chromium, page, plan, serve  # noqa: F401

FAR = np.vstack([boxes.POINTS, [[900, 0, 0], [901, 0, 0], [902, 0, 0]]])
PLAIN = boxes.obj()
HIDDEN = {  # files of the box with something far away that cannot be seen
    "stray.obj": boxes.obj(points=FAR),
    "point.obj": boxes.obj(points=FAR).rstrip() + "\nf 9 9 9\n",
    "two-points.obj": boxes.obj(points=FAR).rstrip() + "\nf 9 9 10\nl 9 10\n",
    "needle.obj": boxes.obj(points=FAR).rstrip() + "\nf 9 10 11\nf 1 10 11\n",
    "lines.obj": boxes.obj(points=FAR).rstrip() + "\nl 9 10 11\np 9\n",
    "stray.ply": boxes.ply(points=FAR),
    "point.ply": boxes.ply(points=FAR, faces=np.vstack([boxes.FACES, [[8, 8, 8]]])),
    "stray.glb": boxes.glb(points=FAR),
    "scale.glb": boxes.glb(
        nodes=[{"mesh": 0}, {"mesh": 0, "translation": [40, 0, 0], "scale": [0, 0, 0]}],
        scenes=[{"nodes": [0, 1]}],
    ),
    "line.glb": boxes.glb(
        nodes=[{"mesh": 0}, {"mesh": 0, "translation": [0, 0, 90], "scale": [0, 0, 7]}],
        scenes=[{"nodes": [0, 1]}],
    ),
}


@pytest.mark.parametrize("name", [name for name in HIDDEN if name != "needle.obj"])
def test_a_mesh_is_cleaned_as_if_the_invisible_were_not_there(tmp_path, name):
    plain = clean_mesh(*read_triangles(boxes.write(tmp_path / "plain.obj", PLAIN)))
    cleaned = clean_mesh(*read_triangles(boxes.write(tmp_path / name, HIDDEN[name])))
    assert np.array_equal(cleaned.vertices, plain.vertices) and np.array_equal(cleaned.faces, plain.faces)
    assert cleaned.edge == plain.edge == 3
    assert cleaned.raw_open_share == plain.raw_open_share == 0


@pytest.mark.parametrize("name", HIDDEN)
def test_meshes_are_encoded_without_the_invisible(tmp_path, name):
    mesh = load_mesh(boxes.write(tmp_path / name, HIDDEN[name]))
    assert np.array_equal(np.ptp(mesh.vertices.numpy(), axis=0), [1, 2, 3])
    assert boxes.volume(mesh.vertices.numpy(), mesh.faces.numpy()) == pytest.approx(6)


def test_faces_without_area_inside_the_box_stay():
    """They close a mesh whose neighbours have a vertex more on an edge."""
    points = np.vstack([boxes.POINTS, [0, 0, 1.5]])
    faces = np.vstack([boxes.FACES, [[0, 8, 1]], [[8, 8, 0]]])
    assert may_be_visible(points, faces).all()
    assert clean_mesh(points, faces).degenerate == 1
    assert may_be_visible(points[:3], np.array([[0, 0, 0]])).all(), "nothing has an area"
    assert may_be_visible(1e-200 * points, faces).all() and may_be_visible(1e200 * FAR, boxes.FACES).all()
    far = np.vstack([boxes.FACES, [[8, 9, 10]]])
    assert may_be_visible(FAR, far).sum() == 12


def test_the_damage_of_a_gold_check_is_as_large_as_without_stray_vertices():
    plain = ply.read_mesh(boxes.ply())
    stray = ply.read_mesh(boxes.ply(points=np.vstack([boxes.POINTS, np.full((8, 3), 500.0)])))
    damaged = [damage_mesh(model, "rough", 3).meshes[0][0].attributes["POSITION"] for model in (plain, stray)]
    assert np.array_equal(damaged[0].values, damaged[1].values[:8])


@pytest.mark.long
@needs_chromium
@pytest.mark.parametrize("name", ["stray.ply", "two-points.obj", "scale.glb", "needle.obj"])
def test_the_label_page_shows_both_in_one_size(tmp_path, serve, page, name):  # noqa: F811
    from eg3d_rlhf.geometry.files.glb import read_glb

    def packed(file: str, data: str | bytes) -> bytes:
        path = boxes.write(tmp_path / file, data)
        readers = {
            ".obj": lambda: obj.read_obj(path.read_bytes(), path),
            ".ply": lambda: ply.read_mesh(path.read_bytes()),
            ".glb": lambda: read_glb(memoryview(path.read_bytes())),
        }
        return compress(b"".join(bytes(part) for part in glb_parts(readers[path.suffix]())))

    plain = packed("plain.obj", PLAIN)
    hidden = packed(name, HIDDEN[name])
    label = page(serve(plan(1), lambda shape: hidden if shape.seed % 2 else plain).url).open()
    left = np.array(label.state("places.left"))
    assert np.allclose(left, label.state("places.right"), atol=1e-6)
    assert left[0] == pytest.approx(2 / 14**0.5)  # the ball around the box has the radius 1
