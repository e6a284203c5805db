"""The browser's mesh format: what is written can be read by anyone who knows the table, and nothing else is taken for it."""

import gzip
import struct

import numpy as np
import pytest

from eg3d_rlhf.people.label.shape_files import compress, encode_mesh
from tests.people.label.plans import decode_mesh


def random_mesh(vertices: int, faces: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(vertices, 3)) * [1, 0.01, 40], rng.integers(vertices, size=(faces, 3))


def read_by_hand(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The format read value by value with struct, in float64."""
    magic, count, triangles = struct.unpack_from("<4sII", data)
    assert magic == b"SHP1"
    least, extent = struct.unpack_from("<3f", data, 12), struct.unpack_from("<3f", data, 24)
    at = 36
    steps = [struct.unpack_from("<3H", data, at + 6 * i) for i in range(count)]
    vertices = [[q / 65535 * e + m for q, e, m in zip(step, extent, least, strict=True)] for step in steps]
    at += 6 * count
    while at % 4:
        assert data[at] == 0
        at += 1
    code, size = ("<3H", 6) if count <= 65536 else ("<3I", 12)
    faces = [struct.unpack_from(code, data, at + size * i) for i in range(triangles)]
    assert at + size * triangles == len(data)
    return np.array(vertices), np.array(faces)


@pytest.mark.parametrize(("vertices", "faces"), [(3, 1), (4, 4), (101, 200), (65536, 5), (65537, 5)])
def test_positions_are_half_a_step_off_at_most_and_indices_exact(vertices, faces):
    points, triangles = random_mesh(vertices, faces)
    triangles[-1] = vertices - 1  # the largest index
    by_hand = read_by_hand(encode_mesh(points, triangles))
    decoded = decode_mesh(encode_mesh(points, triangles))
    step = np.ptp(points, axis=0) / 65535
    for found, found_faces in (by_hand, decoded):
        assert np.all(np.abs(found - points) <= 0.51 * step + 1e-6 * np.abs(points).max(axis=0))  # float32 header
        assert np.array_equal(found_faces, triangles)


def test_a_flat_mesh_has_no_extent_along_its_normal():
    points = np.array([[0, 0, 0.25], [1, 0, 0.25], [0, 1, 0.25]])
    vertices, _ = decode_mesh(encode_mesh(points, [[0, 1, 2]]))
    assert np.allclose(vertices, points)


@pytest.mark.parametrize(
    ("points", "faces", "text"),
    [
        (np.zeros((0, 3)), np.zeros((0, 3), int), "holds a surface"), (np.zeros((3, 3)), np.zeros((0, 3), int), "faces"),
        ([[0, 0, np.nan]] * 3, [[0, 1, 2]], "finite"), (np.eye(3), [[0, 1, 3]], "0..2"), (np.eye(3), [[0, 1, -1]], "-1"),
    ],
)
def test_meshes_that_cannot_be_shown_are_refused(points, faces, text):
    with pytest.raises(ValueError, match=text):
        encode_mesh(points, faces)


def test_compression_depends_on_the_bytes_alone_and_is_plain_gzip():
    data = encode_mesh(*random_mesh(50, 90))
    packed = compress(data)
    assert packed == compress(data) and gzip.decompress(packed) == data
    assert packed[:4] == b"\x1f\x8b\x08\x00" and packed[4:8] == bytes(4)  # no name, no time
