"""Reads the browser's mesh format in Python; the page does so in JavaScript."""

import struct

import numpy as np


def decode_mesh(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Vertices [V, 3] and faces [F, 3] of an uncompressed mesh."""
    magic, count, triangles, *numbers = struct.unpack_from("<4sII3f3f", data)
    assert magic == b"SHP1"
    positions = np.frombuffer(data, "<u2", 3 * count, 36).reshape(count, 3)
    start = 36 + 6 * count
    start += -start % 4
    faces = np.frombuffer(data, "<u2" if count <= 65536 else "<u4", offset=start).reshape(triangles, 3)
    assert faces.max() < count
    return (positions / 65535 * numbers[3:] + numbers[:3]).astype(np.float32), faces.astype(np.int32)
