"""The shapes' cache: a name for everything that a shape is drawn from, files that are whole or not there."""

import os
import time
from dataclasses import fields, replace

import pytest

from eg3d_rlhf.people.label.entities import Shape
from eg3d_rlhf.people.label.shape_files import ShapeCache, shape_key
from tests.people.label.plans import SHAPE

OTHER = {
    "generator": "b" * 64, "seed": 8, "psi": 0.7, "level": 9.5, "resolution": 33, "triangles": 501, "degradation": "holes",
}


@pytest.mark.parametrize("name", [field.name for field in fields(Shape)])
def test_the_key_knows_all_that_a_shape_is_drawn_from_and_nothing_else(name):
    changed = replace(SHAPE, **{name: OTHER.get(name, "/elsewhere/network.safetensors")})
    assert (shape_key(changed) == shape_key(SHAPE)) is (name in ("source", "condition"))


def test_the_key_does_not_depend_on_how_a_number_is_written():
    assert shape_key(replace(SHAPE, psi=1, level=10)) == shape_key(SHAPE) and len(shape_key(SHAPE)) == 64


def test_files_are_found_by_shape(tmp_path):
    cache = ShapeCache(tmp_path / "not there yet")
    assert cache.mesh(SHAPE) is cache.render(SHAPE) is cache.failure(SHAPE) is None
    cache.put_mesh(SHAPE, b"mesh")
    cache.put_render(SHAPE, b"png")
    cache.put_failure(SHAPE, "no surface")
    other = ShapeCache(tmp_path / "not there yet")
    assert other.mesh(SHAPE).read_bytes() == b"mesh" and other.render(SHAPE).read_bytes() == b"png" and other.failure(SHAPE) == "no surface"
    assert other.mesh(replace(SHAPE, seed=8)) is None


def test_a_file_that_is_being_written_is_not_there(tmp_path, monkeypatch):
    """Whatever happens before the rename, the cache does not have the shape."""
    cache = ShapeCache(tmp_path)
    seen = []

    def replace_file(temporary, path):
        seen.append(cache.mesh(SHAPE))
        raise OSError("killed here")

    monkeypatch.setattr(os, "replace", replace_file)
    with pytest.raises(OSError, match="killed here"):
        cache.put_mesh(SHAPE, b"mesh")
    assert seen == [None] and cache.mesh(SHAPE) is None


def test_only_old_leftovers_are_removed(tmp_path):
    cache = ShapeCache(tmp_path)
    folder = cache.put_mesh(SHAPE, b"mesh").parent
    old, fresh = folder / ".old.1.tmp", folder / ".fresh.2.tmp"
    for path in (old, fresh):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    cache.remove_leftovers()
    assert not old.exists() and fresh.exists() and cache.mesh(SHAPE) is not None


def test_the_home_folder_may_be_named(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ShapeCache().folder == tmp_path / ".cache" / "eg3d-rlhf" / "shapes"
