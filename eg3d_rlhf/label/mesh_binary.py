"""The compact file in which a browser gets a mesh: quantised positions and indices, little-endian, compressed with gzip.

| bytes                | what                                                        |
| -------------------- | ----------------------------------------------------------- |
| 4                    | magic 'SHP1'                                                |
| 2 x uint32           | V vertices, F triangles                                     |
| 3 x float32          | least x, y, z of all vertices, world units                  |
| 3 x float32          | extent along x, y, z, world units                           |
| V x 3 x uint16       | positions: q / 65535 * extent + least                       |
| 0 or 2               | zeros up to a multiple of 4 bytes                           |
| F x 3 x uint16 or 32 | vertices of each triangle; uint16 where V <= 65536          |

Letters: V vertices, F triangles.
"""

import gzip
import io
import struct
import zlib

import numpy as np

MAGIC = b"SHP1"
_HEADER = struct.Struct("<4sII3f3f")
_STEPS = 65535  # quantisation steps along each axis
_SHORT = 65536  # vertices up to which an index is a uint16
_COMPRESSION = 9
_LARGEST = 1 << 28  # bytes that a file may unpack to: 8 million triangles


def encode_mesh(vertices: np.ndarray, faces: np.ndarray) -> bytes:
    """A mesh as the bytes above, not compressed.

    Positions move by half a step at most, 1/131070 of the extent along each axis.

    Args: vertices [V, 3] world coordinates; faces [F, 3] indices into them.
    Raises: ValueError for an empty mesh, for coordinates that are not finite, or for indices out of range.
    """
    vertices, faces = np.asarray(vertices, dtype=np.float64), np.asarray(faces)
    _check(vertices, faces)
    least = vertices.min(axis=0).astype("<f4")
    extent = (vertices.max(axis=0) - least).astype("<f4")
    scaled = np.divide(vertices - least, extent, out=np.zeros_like(vertices), where=extent > 0)
    positions = np.rint(scaled.clip(0, 1) * _STEPS).astype("<u2")
    header = _HEADER.pack(MAGIC, len(vertices), len(faces), *least.tolist(), *extent.tolist())
    padding = bytes(-(len(header) + positions.nbytes) % 4)
    return header + positions.tobytes() + padding + faces.astype(_index_type(len(vertices))).tobytes()


def decode_mesh(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Inverse of `encode_mesh`: vertices [V, 3] float32, faces [F, 3] int32.

    Raises: ValueError for anything else than a whole mesh of this format.
    """
    if len(data) < _HEADER.size or data[:4] != MAGIC:
        raise ValueError(f"decode_mesh: expected a mesh that begins with {MAGIC!r}, got {data[:4]!r}. Prepare the shape again.")
    _, count, triangles, *numbers = _HEADER.unpack_from(data)
    index = _index_type(count)
    start = _HEADER.size + 6 * count
    start += -start % 4
    whole = start + 3 * triangles * index.itemsize
    if len(data) != whole:
        raise ValueError(f"decode_mesh: expected {whole} bytes for {count} vertices and {triangles} triangles, got {len(data)}.")
    least, extent = np.array(numbers[:3], dtype=np.float64), np.array(numbers[3:], dtype=np.float64)
    positions = np.frombuffer(data, "<u2", 3 * count, _HEADER.size).reshape(count, 3)
    vertices = positions / _STEPS * extent + least
    faces = np.frombuffer(data, index, 3 * triangles, start).reshape(triangles, 3).astype(np.int64)
    _check(vertices, faces)
    return vertices.astype(np.float32), faces.astype(np.int32)


def compress(data: bytes) -> bytes:
    """gzip without a time or a name, so that equal data give equal bytes."""
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", compresslevel=_COMPRESSION, fileobj=buffer, mtime=0) as file:
        file.write(data)
    return buffer.getvalue()


def decompress(data: bytes) -> bytes:
    """Inverse of `compress`.

    Raises: ValueError for a damaged file, or one that unpacks to more than 256 MiB.
    """
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            unpacked = file.read(_LARGEST + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"decompress: expected a whole gzip file, got: {error}. Prepare the shape again.") from error
    if not data:
        raise ValueError("decompress: expected a whole gzip file, got no bytes. Prepare the shape again.")
    if len(unpacked) > _LARGEST:
        raise ValueError(f"decompress: expected at most {_LARGEST} bytes, got more. Decimate the shape.")
    return unpacked


def _index_type(vertices: int) -> np.dtype:
    return np.dtype("<u2" if vertices <= _SHORT else "<u4")


def _check(vertices: np.ndarray, faces: np.ndarray) -> None:
    for name, values in (("vertices", vertices), ("faces", faces)):
        if values.ndim != 2 or values.shape[1] != 3 or len(values) == 0:
            raise ValueError(f"mesh: expected {name} [.., 3], at least one, got {list(values.shape)}. Pass a mesh that holds a surface.")
    if not np.isfinite(vertices).all():
        raise ValueError("mesh: expected finite positions, got NaN or infinity. Check the generator's weights.")
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise ValueError(f"mesh: expected indices 0..{len(vertices) - 1}, got {faces.min()}..{faces.max()}. Pass the mesh's own vertices.")
