"""Files of prepared shapes: the mesh as the browser gets it, and the cache where each lies under a hash of
all that it is drawn from.

A file that is there is right, so it is never written again; several campaigns, servers and workers may share
a folder, and every file appears whole or not at all. Assets (label/assets/) are a GLB or GSP1 with gzip, or
an MP4. Meshes are little-endian, compressed with gzip:

| bytes                | what                                                        |
| -------------------- | ----------------------------------------------------------- |
| 4                    | magic 'SHP1'                                                |
| 2 x uint32           | V vertices, F triangles                                     |
| 3 x float32          | least x, y, z of all vertices, world units                  |
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

VERSION = 1  # of how shapes are drawn and written; a change makes other files
ASSET_VERSION = 1  # the same of assets
DEFAULT_FOLDER = Path("~/.cache/eg3d-rlhf/shapes")
_STALE = 3600  # seconds after which what a killed writer left is removed
# all that a shape is drawn from, with kinds: psi 1 and 1.0 are one shape; where the weights lie makes no
# difference
_DRAWN_FROM = {
    "generator": str,
    "seed": int,
    "psi": float,
    "level": float,
    "resolution": int,
    "triangles": int,
    "degradation": str,
}
MAGIC = b"SHP1"
_HEADER = struct.Struct("<4sII3f3f")
_STEPS = 65535  # quantisation steps along each axis
_SHORT = 65536  # vertices up to which an index is a uint16


def encode_mesh(vertices: np.ndarray, faces: np.ndarray) -> bytes:
    """A mesh as the bytes above, not compressed.

    Positions move by half a step at most, 1/131070 of the extent along each axis.
    """
    vertices = np.asarray(vertices, dtype=np.float64)
    faces = np.asarray(faces)
    for name, values in (("vertices", vertices), ("faces", faces)):
        if values.ndim != 2 or values.shape[1] != 3 or len(values) == 0:
            raise ValueError(
                f"mesh: expected {name} [.., 3], at least one, got {list(values.shape)}. Pass a mesh that"
                " holds a surface."
            )
    if not np.isfinite(vertices).all():
        raise ValueError(
            "mesh: expected finite positions, got NaN or infinity. Check the generator's weights."
        )
    least = vertices.min(axis=0).astype("<f4")
    extent = (vertices.max(axis=0) - least).astype("<f4")
    scaled = np.divide(vertices - least, extent, out=np.zeros_like(vertices), where=extent > 0)
    positions = np.rint(scaled.clip(0, 1) * _STEPS).astype("<u2")
    header = _HEADER.pack(MAGIC, len(vertices), len(faces), *least.tolist(), *extent.tolist())
    padding = bytes(-(len(header) + positions.nbytes) % 4)
    return (
        header
        + positions.tobytes()
        + padding
        + faces.astype("<u2" if len(vertices) <= _SHORT else "<u4").tobytes()
    )


def compress(data: bytes) -> bytes:
    """gzip without a time or a name, so that equal data give equal bytes."""
    return gzip.compress(data, 9, mtime=0)


def shape_key(shape: Shape) -> str:
    """SHA-256 hex of the generator's hash, seed, psi, level, resolution, triangles, damage and the version of
    the drawing.

    Of an asset: of its file's hash, the damage and where it is, and the version of the cleaning.
    """
    if shape.file:
        damaged = [shape.degradation, shape.seed] if shape.degradation else []
        return hashlib.sha256(json.dumps(["asset", ASSET_VERSION, shape.file, *damaged]).encode()).hexdigest()
    parts = [VERSION, *(kind(getattr(shape, name)) for name, kind in _DRAWN_FROM.items())]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class ShapeCache:
    """Files of prepared shapes. Args: folder: made on the first write; '~' is the user's home."""

    def __init__(self, folder: str | Path = DEFAULT_FOLDER):
        self.folder = Path(folder).expanduser()

    def mesh(self, shape: Shape) -> Path | None:
        """The mesh (see above, gzip), of an asset maybe an MP4; None until it is prepared."""
        return self._existing(shape, ".shp.gz") or (self._existing(shape, ".mp4") if shape.file else None)

    def render(self, shape: Shape) -> Path | None:
        return self._existing(shape, ".png")

    def failure(self, shape: Shape) -> str | None:
        path = self._existing(shape, ".failed.json")
        return json.loads(path.read_text())["reason"] if path else None

    def put_mesh(self, shape: Shape, data: bytes) -> Path:
        return self._put(shape, ".mp4" if data[4:8] == b"ftyp" else ".shp.gz", data)

    def put_render(self, shape: Shape, data: bytes) -> Path:
        return self._put(shape, ".png", data)

    def put_failure(self, shape: Shape, reason: str, passing: bool = False) -> Path:
        """Remember that this shape cannot be drawn, however often it is tried; `passing`: until
        `forget_passing`.
        """
        record = {"seed": shape.seed, "reason": reason, **({"passing": True} if passing else {})}
        return self._put(shape, ".failed.json", (json.dumps(record) + "\n").encode())

    def forget_passing(self, shapes: Iterable[Shape]) -> None:
        """Let what could not be drawn because its file had changed be tried again."""
        for path in filter(None, (self._existing(shape, ".failed.json") for shape in shapes)):
            if json.loads(path.read_text()).get("passing"):
                path.unlink(missing_ok=True)

    # ---- pictures of prompts, by the hash of their file

    def prompt(self, key: str) -> Path | None:
        path = self._prompt_path(key, ".webp")
        return path if path.is_file() else None

    def prompt_settled(self, key: str) -> bool:
        return self.prompt(key) is not None or self._prompt_path(key, ".failed.json").is_file()

    def put_prompt(self, key: str, data: bytes) -> None:
        write_atomic(self._prompt_path(key, ".webp"), data)

    def put_prompt_failure(self, key: str, reason: str) -> None:
        write_atomic(self._prompt_path(key, ".failed.json"), (json.dumps({"reason": reason}) + "\n").encode())

    def _prompt_path(self, key: str, suffix: str) -> Path:
        return self.folder / "prompts" / f"{key}{suffix}"

    def remove_leftovers(self) -> None:
        for path in self.folder.glob("*/.*.tmp"):
            with contextlib.suppress(FileNotFoundError):  # another worker was faster
                if time.time() - path.stat().st_mtime > _STALE:
                    path.unlink()

    def _path(self, shape: Shape, suffix: str) -> Path:
        key = shape_key(shape)
        return self.folder / key[:2] / f"{key}{suffix}"

    def _existing(self, shape: Shape, suffix: str) -> Path | None:
        path = self._path(shape, suffix)
        return path if path.is_file() else None

    def _put(self, shape: Shape, suffix: str, data: bytes) -> Path:
        path = self._path(shape, suffix)
        write_atomic(path, data)
        return path
