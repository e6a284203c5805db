"""Files of shapes: the browser's mesh format, a key of everything that a shape depends on, and the
preparation of a plan.
"""

import os
from dataclasses import fields, replace

import numpy as np
import pytest

from eg3d_rlhf.people.label.entities import Shape
from eg3d_rlhf.people.label.preparation import prepare
from eg3d_rlhf.people.label.shape_files import ShapeCache, encode_mesh, shape_key
from tests.people.label.plans import SHAPE, decode_mesh, numbered
from tests.rejections import raising

OTHER = {
    "generator": "b" * 64,
    "seed": 8,
    "psi": 0.7,
    "level": 9.5,
    "resolution": 33,
    "triangles": 501,
    "degradation": "holes",
}


@pytest.fixture
def cache(tmp_path) -> ShapeCache:
    return ShapeCache(tmp_path)


# ---- the format


def random_mesh(vertices: int, faces: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(vertices, 3)) * [1, 0.01, 40], rng.integers(vertices, size=(faces, 3))


@pytest.mark.parametrize(("vertices", "faces"), [(3, 1), (4, 4), (101, 200), (65536, 5), (65537, 5)])
def test_positions_are_half_a_step_off_at_most_and_indices_exact(vertices, faces):
    points, triangles = random_mesh(vertices, faces)
    triangles[-1] = vertices - 1  # the largest index
    decoded, decoded_faces = decode_mesh(encode_mesh(points, triangles))
    # float32 header
    assert np.all(
        np.abs(decoded - points) <= 0.51 * np.ptp(points, axis=0) / 65535 + 1e-6 * np.abs(points).max(axis=0)
    )
    assert np.array_equal(decoded_faces, triangles)


@pytest.mark.parametrize(
    ("points", "faces", "names"),
    [
        (np.zeros((0, 3)), np.zeros((0, 3), int), ("vertices", "[0, 3]")),
        (np.zeros((3, 3)), np.zeros((0, 3), int), ("faces", "[0, 3]")),
        ([[0, 0, np.nan]] * 3, [[0, 1, 2]], ("positions", "NaN")),
    ],
)
def test_meshes_that_cannot_be_shown_are_rejected(points, faces, names):
    with raising("mesh", *names):
        encode_mesh(points, faces)


# ---- the cache


@pytest.mark.parametrize("name", [field.name for field in fields(Shape)])
def test_the_key_knows_all_that_a_shape_is_drawn_from_and_nothing_else(name):
    changed = replace(SHAPE, **{name: OTHER.get(name, "/elsewhere/network.safetensors")})
    assert (shape_key(changed) == shape_key(SHAPE)) is (name in ("source", "condition"))
    # however a number is written
    assert shape_key(replace(SHAPE, psi=1, level=10)) == shape_key(SHAPE) and len(shape_key(SHAPE)) == 64


def test_files_are_found_by_shape(tmp_path, monkeypatch):
    cache = ShapeCache(tmp_path / "not there yet")
    assert cache.mesh(SHAPE) is cache.render(SHAPE) is cache.failure(SHAPE) is None
    cache.put_mesh(SHAPE, b"mesh")
    cache.put_render(SHAPE, b"png")
    cache.put_failure(SHAPE, reason := "no surface")
    other = ShapeCache(tmp_path / "not there yet")
    assert (
        other.mesh(SHAPE).read_bytes() == b"mesh"
        and other.render(SHAPE).read_bytes() == b"png"
        and other.failure(SHAPE) == reason
    )
    assert other.mesh(replace(SHAPE, seed=8)) is None
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ShapeCache().folder == tmp_path / ".cache" / "eg3d-rlhf" / "shapes"


def test_a_file_that_is_being_written_is_not_there(cache, monkeypatch):
    """After a failure at any time before the rename, the cache does not have the shape."""
    seen = []

    def replace_file(temporary, path):
        seen.append(cache.mesh(SHAPE))
        raise OSError("killed")

    monkeypatch.setattr(os, "replace", replace_file)
    with raising(str(cache.folder), "4", "killed", kind=OSError):
        cache.put_mesh(SHAPE, b"mesh")
    assert seen == [None] and cache.mesh(SHAPE) is None


# ---- working through a plan: in order, once each, on from where it was, past what cannot be drawn


UNCROSSED = "the level is not crossed"


class Recorder:
    """Makes a few bytes; rejects the seeds that have no surface."""

    def __init__(self, without_surface: tuple[int, ...] = (), lost: tuple[int, ...] = ()):
        self.drawn: list[int] = []
        self.images: list[int] = []
        self._without = without_surface
        self._lost = lost

    def generator(self, shape):
        if shape.seed in self._lost:
            raise FileNotFoundError("network.safetensors is missing")

    def mesh(self, shape) -> bytes:
        self.drawn.append(shape.seed)
        if shape.seed in self._without:
            raise ValueError(UNCROSSED)
        return shape_key(shape).encode()

    def image(self, shape) -> bytes:
        self.images.append(shape.seed)
        return b"png"


def test_shapes_are_drawn_in_order_and_each_once(cache):
    shapes = [*numbered(3, 5), *numbered(5, 4)]
    recorder = Recorder()
    prepare(shapes[1:2], cache, Recorder())  # what is there is not drawn again
    prepare(shapes, cache, recorder)
    assert recorder.drawn == [5, 7, 4, 8] and recorder.images == []
    assert all(cache.mesh(shape).read_bytes() == shape_key(shape).encode() for shape in shapes)
    prepare(shapes, cache, recorder, renders=True)  # images are added to shapes that have none
    assert (
        len(recorder.drawn) == 4
        and recorder.images == [5, 6, 7, 4, 8]
        and cache.render(shapes[1]).read_bytes() == b"png"
    )


def test_a_shape_counts_as_prepared_only_with_its_image(cache):
    """The server looks for the mesh alone, so that comes last."""
    seen = []
    put = cache.put_mesh
    shape = numbered(1)[0]
    cache.put_mesh = lambda *args: (seen.append(cache.render(shape)), put(*args))
    prepare([shape], cache, Recorder(), renders=True)
    assert len(seen) == 1 and seen[0] is not None


def test_a_shape_that_cannot_be_drawn_is_noted_once_and_passed_over(cache):
    shapes = numbered(5)
    recorder = Recorder(without_surface=(1, 3))
    reports: list[dict] = []
    for _ in range(2):
        prepare(shapes, cache, recorder, on_progress=reports.append)
    assert recorder.drawn == [0, 1, 2, 3, 4] and reports[-1] == {
        **reports[-1],
        "done": 3,
        "failed": 2,
        "total": 5,
        "finished": True,
    }
    assert (
        cache.failure(shapes[3]) == UNCROSSED
        and cache.mesh(shapes[3]) is None
        and cache.mesh(shapes[4]) is not None
    )


def test_a_lost_generator_stops_the_work_and_is_held_against_no_shape(cache):
    shapes = numbered(3)
    recorder = Recorder()
    with pytest.raises(FileNotFoundError):
        prepare(shapes, cache, Recorder(lost=(1,)))
    assert cache.failure(shapes[1]) is None
    prepare(shapes, cache, recorder)
    assert recorder.drawn == [1, 2]
