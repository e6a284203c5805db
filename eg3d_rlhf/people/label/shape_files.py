"""Defines the files of prepared shapes: the format in which the browser gets a mesh, and the cache, in which
each file lies under a hash of everything that determines the shape.

An existing file is correct, so it is never written again. Several campaigns, servers and workers may share a
folder, because every file appears completely or not at all. An asset (label/assets/) is a GLB or GSP1 file
compressed with gzip, or an MP4 file. A mesh is little-endian and compressed with gzip:

| bytes                | content                                                     |
| -------------------- | ----------------------------------------------------------- |
| 4                    | magic 'SHP1'                                                |
| 2 x uint32           | V vertices, F triangles                                     |
| 3 x float32          | smallest x, y, z of all vertices, world units               |
| 3 x float32          | extent along x, y, z, world units                           |
| V x 3 x uint16       | positions: q / 65535 * extent + least                       |
| 0 or 2               | zeros up to a multiple of 4 bytes                           |
| F x 3 x uint16 or 32 | vertices of each triangle; uint16 where V <= 65536          |
"""

import contextlib
import gzip
import hashlib
import json
import struct
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from eg3d_rlhf.people.label.entities import Shape
from training.storage import write_atomic

VERSION = 1  # of the computation and the format of shapes; a change gives all files new names
ASSET_VERSION = 1  # the same for assets
DEFAULT_FOLDER = Path("~/.cache/eg3d-rlhf/shapes")
_STALE = 3600  # age in seconds after which a temporary file of a killed writer is removed
# Everything that determines a shape, with its types, so that psi 1 and 1.0 are the same shape. The path of
# the weights is no part of it.
_KEY_FIELDS = {
    "generator": str,
    "seed": int,
    "psi": float,
    "level": float,
    "resolution": int,
    "triangles": int,
    "degradation": str,
}
MAGIC = b"SHP1"
_HEADER = struct.Struct("<4sII3f3f")  # magic, V, F, smallest x, y, z, extent along x, y, z
_STEPS = 65535  # quantisation steps along each axis
_SHORT = 65536  # largest number of vertices whose indices fit a uint16


def encode_mesh(vertices: np.ndarray, faces: np.ndarray) -> bytes:
    """Encode a mesh in the format of the module's docstring, not compressed.

    Quantisation moves a position by at most half a step, 1/131070 of the extent along each axis.

    Args:
        vertices: [V, 3], world units.
        faces: [F, 3], indices of vertices.

    Raises: ValueError for an empty mesh, another shape, or positions that are not finite.
    """
    vertices = np.asarray(vertices, dtype=np.float64)
    faces = np.asarray(faces)
    for name, values in (("vertices", vertices), ("faces", faces)):
        if values.ndim != 2 or values.shape[1] != 3 or len(values) == 0:
            raise ValueError(
                f"mesh: expected {name} [.., 3], at least one, got {list(values.shape)}. Pass a mesh with a"
                " surface."
            )
    if not np.isfinite(vertices).all():
        raise ValueError(
            "mesh: expected finite positions, got NaN or infinity. Check the generator's weights."
        )
    # Rounded to the precision of the file first, so that decoding uses the same numbers.
    least = vertices.min(axis=0).astype("<f4")
    extent = (vertices.max(axis=0) - least).astype("<f4")
    # A flat mesh has extent 0 along an axis. Its positions become 0 there instead of a division by zero.
    scaled = np.divide(vertices - least, extent, out=np.zeros_like(vertices), where=extent > 0)
    # Rounding the extent to float32 can push the largest position slightly above 1.
    positions = np.rint(scaled.clip(0, 1) * _STEPS).astype("<u2")
    header = _HEADER.pack(MAGIC, len(vertices), len(faces), *least.tolist(), *extent.tolist())
    # The browser reads the indices as a Uint32Array, which must begin at a multiple of 4 bytes.
    padding = bytes(-(len(header) + positions.nbytes) % 4)
    return (
        header
        + positions.tobytes()
        + padding
        + faces.astype("<u2" if len(vertices) <= _SHORT else "<u4").tobytes()
    )


def compress(data: bytes) -> bytes:
    """Compress with gzip, without a time and a name in the header, so that equal data give equal bytes."""
    return gzip.compress(data, 9, mtime=0)


def shape_key(shape: Shape) -> str:
    """Return the name of a shape's file, a SHA-256 in hex.

    For an isosurface it covers the fields of _KEY_FIELDS and VERSION. For an asset it covers the hash of its
    file, ASSET_VERSION, and the damage with its seed, if there is damage.
    """
    if shape.file:
        damage = [shape.degradation, shape.seed] if shape.degradation else []
        return hashlib.sha256(json.dumps(["asset", ASSET_VERSION, shape.file, *damage]).encode()).hexdigest()
    parts = [VERSION, *(kind(getattr(shape, name)) for name, kind in _KEY_FIELDS.items())]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class ShapeCache:
    """Files of prepared shapes in a folder, which is created at the first write; '~' is the user's home."""

    def __init__(self, folder: str | Path = DEFAULT_FOLDER):
        self.folder = Path(folder).expanduser()

    def mesh(self, shape: Shape) -> Path | None:
        """Return the file of a shape (see the module's docstring; of an asset perhaps an MP4), or None if it
        is not prepared yet.
        """
        return self._existing(shape, ".shp.gz") or (self._existing(shape, ".mp4") if shape.file else None)

    def render(self, shape: Shape) -> Path | None:
        """Return the PNG render of a shape's latent, or None."""
        return self._existing(shape, ".png")

    def failure(self, shape: Shape) -> str | None:
        """Return the reason why a shape cannot be prepared, or None."""
        path = self._existing(shape, ".failed.json")
        return json.loads(path.read_text())["reason"] if path else None

    def put_mesh(self, shape: Shape, data: bytes) -> Path:
        """Store a shape's mesh, splats or video."""
        # MP4 files have the type 'ftyp' of their first box at bytes 4 to 7. Everything else here is gzip.
        return self._put(shape, ".mp4" if data[4:8] == b"ftyp" else ".shp.gz", data)

    def put_render(self, shape: Shape, data: bytes) -> Path:
        """Store the PNG render of a shape's latent."""
        return self._put(shape, ".png", data)

    def put_failure(self, shape: Shape, reason: str, temporary: bool = False) -> Path:
        """Record that a shape cannot be prepared. A `temporary` failure is removed by
        `forget_temporary_failures`.
        """
        # "passing" marks a temporary failure; the name is that of existing caches.
        record = {"seed": shape.seed, "reason": reason, **({"passing": True} if temporary else {})}
        return self._put(shape, ".failed.json", (json.dumps(record) + "\n").encode())

    def forget_temporary_failures(self, shapes: Iterable[Shape]) -> None:
        """Remove failures of assets whose file had changed, so that they are prepared again."""
        for path in filter(None, (self._existing(shape, ".failed.json") for shape in shapes)):
            if json.loads(path.read_text()).get("passing"):
                # Another server that shares the folder may have removed the record.
                path.unlink(missing_ok=True)

    # ---- images of prompts, named by the hash of their file

    def prompt(self, key: str) -> Path | None:
        """Return the WebP image of a prompt, or None if it is not prepared."""
        path = self._prompt_path(key, ".webp")
        return path if path.is_file() else None

    def prompt_settled(self, key: str) -> bool:
        """Return True if a prompt's image is prepared, or can never be."""
        return self.prompt(key) is not None or self._prompt_path(key, ".failed.json").is_file()

    def put_prompt(self, key: str, data: bytes) -> None:
        write_atomic(self._prompt_path(key, ".webp"), data)

    def put_prompt_failure(self, key: str, reason: str) -> None:
        write_atomic(self._prompt_path(key, ".failed.json"), (json.dumps({"reason": reason}) + "\n").encode())

    def _prompt_path(self, key: str, suffix: str) -> Path:
        return self.folder / "prompts" / f"{key}{suffix}"

    def remove_leftovers(self) -> None:
        """Remove temporary files that killed writers have left."""
        for path in self.folder.glob("*/.*.tmp"):
            with contextlib.suppress(FileNotFoundError):  # another worker has removed it
                # A younger file may belong to a worker that is writing it.
                if time.time() - path.stat().st_mtime > _STALE:
                    path.unlink()

    def _path(self, shape: Shape, suffix: str) -> Path:
        key = shape_key(shape)
        # Two characters of the hash make up to 256 folders, which keeps each of them small.
        return self.folder / key[:2] / f"{key}{suffix}"

    def _existing(self, shape: Shape, suffix: str) -> Path | None:
        path = self._path(shape, suffix)
        return path if path.is_file() else None

    def _put(self, shape: Shape, suffix: str, data: bytes) -> Path:
        path = self._path(shape, suffix)
        write_atomic(path, data)
        return path
