"""Files of prepared shapes: the format of meshes for the browser, and the cache of files.

The name of a file in the cache is a hash of all values that determine the shape. So an existing file is
correct, and is never written again. Several campaigns, servers and workers may share a folder, because files
are written atomically. An asset (label/assets/) is a GLB or GSP1 file that is compressed with gzip, or an MP4
file. A mesh of V vertices and F triangles has the following content, little-endian and compressed with gzip:

| bytes                | content                                                     |
| -------------------- | ----------------------------------------------------------- |
| 4                    | magic 'SHP1'                                                |
| 2 x uint32           | V vertices, F triangles                                     |
| 3 x float32          | smallest x, y, z of all vertices, world units               |
| 3 x float32          | extent along x, y, z, world units                           |
| V x 3 x uint16       | positions, as numbers q: position = q / 65535 * extent + smallest |
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

VERSION = 1  # version of the computation and the format of meshes; another version gives all files new names
ASSET_VERSION = 1  # version of the preparation of asset files; another version gives all files new names
DEFAULT_FOLDER = Path("~/.cache/eg3d-rlhf/shapes")
_STALE = 3600  # age in seconds after which a temporary file is deleted, because its writer was killed
# Fields of a shape that determine its mesh, with their types. With the types, psi 1 and psi 1.0 have the same
# key. The path of the network file is not one of them.
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
_STEPS = 65535  # number of quantisation steps along each axis
_SHORT = 65536  # largest number of vertices whose indices fit a uint16


def encode_mesh(vertices: np.ndarray, faces: np.ndarray) -> bytes:
    """Encode a mesh in the format that the docstring of this module describes, without compression.

    Quantisation moves a position by at most half a step, which is 1/131070 of the extent along each axis.

    Args:
        vertices: positions in world units, [V, 3].
        faces: indices of vertices, [F, 3].

    Raises:
        ValueError: the mesh is empty, an array has another shape, or a position is not finite.
    """
    vertices = np.asarray(vertices, dtype=np.float64)
    faces = np.asarray(faces)
    for array_name, mesh_array in (("vertices", vertices), ("faces", faces)):
        if mesh_array.ndim != 2 or mesh_array.shape[1] != 3 or len(mesh_array) == 0:
            raise ValueError(
                f"mesh: the array of {array_name} has the shape {list(mesh_array.shape)}, but must have the"
                " shape [N, 3] with N >= 1. Pass a mesh with a surface."
            )
    if not np.isfinite(vertices).all():
        raise ValueError(
            "mesh: the positions contain NaN or infinity. Check the weights of the generator, or use another"
            " seed."
        )
    # Both are rounded to float32, the precision of the file, before they are used, as the reader of the file
    # does.
    lowest_corner = vertices.min(axis=0).astype("<f4")
    extent = (vertices.max(axis=0) - lowest_corner).astype("<f4")
    # A flat mesh has the extent 0 along an axis. `where` avoids a division by zero, and the result there is
    # 0.
    scaled_positions = np.divide(
        vertices - lowest_corner, extent, out=np.zeros_like(vertices), where=extent > 0
    )
    # Rounding the extent to float32 can push the largest position slightly above 1.
    quantised_positions = np.rint(scaled_positions.clip(0, 1) * _STEPS).astype("<u2")
    header_bytes = _HEADER.pack(MAGIC, len(vertices), len(faces), *lowest_corner.tolist(), *extent.tolist())
    # The browser reads the indices as a Uint32Array, which must begin at a multiple of 4 bytes.
    padding_bytes = bytes(-(len(header_bytes) + quantised_positions.nbytes) % 4)
    return (
        header_bytes
        + quantised_positions.tobytes()
        + padding_bytes
        + faces.astype("<u2" if len(vertices) <= _SHORT else "<u4").tobytes()
    )


def compress(raw_bytes: bytes) -> bytes:
    """Compress data with gzip. The header contains no time and no name, so equal data give equal bytes."""
    return gzip.compress(raw_bytes, 9, mtime=0)


def shape_key(shape: Shape) -> str:
    """Return the name of the prepared file of a shape, which is a SHA-256 as hexadecimal digits.

    For an isosurface it is the hash of the fields in _KEY_FIELDS and of VERSION. For an asset file it is the
    hash of the file's SHA-256, of ASSET_VERSION and, if the asset is damaged, of the damage and its seed.
    """
    if shape.file:
        damage_parts = [shape.degradation, shape.seed] if shape.degradation else []
        return hashlib.sha256(
            json.dumps(["asset", ASSET_VERSION, shape.file, *damage_parts]).encode()
        ).hexdigest()
    key_parts = [VERSION, *(field_type(getattr(shape, name)) for name, field_type in _KEY_FIELDS.items())]
    return hashlib.sha256(json.dumps(key_parts).encode()).hexdigest()


class ShapeCache:
    """Cache of prepared shapes.

    Args:
        folder: folder of the files, which is created at the first write; "~" is the home folder of the user.
    """

    def __init__(self, folder: str | Path = DEFAULT_FOLDER):
        self.folder = Path(folder).expanduser()

    def mesh(self, shape: Shape) -> Path | None:
        """Return the path of the prepared file of a shape, or None if it is not prepared.

        The file is a mesh, or for an asset a GLB, GSP1 or MP4 file, see the docstring of this module.
        """
        return self._existing(shape, ".shp.gz") or (self._existing(shape, ".mp4") if shape.file else None)

    def render(self, shape: Shape) -> Path | None:
        """Return the path of the PNG render of a shape's latent, or None if there is none."""
        return self._existing(shape, ".png")

    def failure(self, shape: Shape) -> str | None:
        """Return the reason why a shape cannot be prepared, or None if no failure is recorded."""
        path = self._existing(shape, ".failed.json")
        return json.loads(path.read_text())["reason"] if path else None

    def put_mesh(self, shape: Shape, file_bytes: bytes) -> Path:
        """Store the prepared file of a shape, and return its path."""
        # In an MP4 file, bytes 4 to 7 are the type of the first box, 'ftyp'. All other files are compressed
        # with gzip.
        return self._put(shape, ".mp4" if file_bytes[4:8] == b"ftyp" else ".shp.gz", file_bytes)

    def put_render(self, shape: Shape, file_bytes: bytes) -> Path:
        """Store the PNG render of a shape's latent, and return its path."""
        return self._put(shape, ".png", file_bytes)

    def put_failure(self, shape: Shape, reason: str, is_temporary: bool = False) -> Path:
        """Record that a shape cannot be prepared.

        Args:
            shape: shape.
            reason: reason of the failure.
            is_temporary: True for a failure that `forget_temporary_failures` deletes.
        """
        # "passing" marks a temporary failure. Existing caches contain this key.
        failure_record = {"seed": shape.seed, "reason": reason, **({"passing": True} if is_temporary else {})}
        return self._put(shape, ".failed.json", (json.dumps(failure_record) + "\n").encode())

    def forget_temporary_failures(self, shapes: Iterable[Shape]) -> None:
        """Delete the recorded temporary failures of shapes, so that these shapes are prepared again.

        A failure is temporary if the asset file had changed since the campaign was planned.
        """
        for path in filter(None, (self._existing(shape, ".failed.json") for shape in shapes)):
            if json.loads(path.read_text()).get("passing"):
                # missing_ok, because another server that shares the folder may have deleted the record
                path.unlink(missing_ok=True)

    # ---- images of prompts. Their key is the SHA-256 of the image file.

    def prompt(self, image_hash: str) -> Path | None:
        """Return the path of the WebP image of a prompt, or None if it is not prepared."""
        path = self._prompt_path(image_hash, ".webp")
        return path if path.is_file() else None

    def prompt_settled(self, image_hash: str) -> bool:
        """Return True if the image of a prompt is prepared, or is recorded as impossible to prepare."""
        return self.prompt(image_hash) is not None or self._prompt_path(image_hash, ".failed.json").is_file()

    def put_prompt(self, image_hash: str, file_bytes: bytes) -> None:
        """Store the WebP image of a prompt."""
        write_atomic(self._prompt_path(image_hash, ".webp"), file_bytes)

    def put_prompt_failure(self, image_hash: str, reason: str) -> None:
        """Record that the image of a prompt cannot be prepared."""
        write_atomic(
            self._prompt_path(image_hash, ".failed.json"), (json.dumps({"reason": reason}) + "\n").encode()
        )

    def _prompt_path(self, image_hash: str, suffix: str) -> Path:
        """Return the path of a file about the image of a prompt.

        Args:
            image_hash: SHA-256 of the image.
            suffix: ".webp" for the prepared image, ".failed.json" for the record of a failure.
        """
        return self.folder / "prompts" / f"{image_hash}{suffix}"

    def remove_leftovers(self) -> None:
        """Delete temporary files of writers that were killed."""
        for path in self.folder.glob("*/.*.tmp"):
            # FileNotFoundError: another worker has deleted the file
            with contextlib.suppress(FileNotFoundError):
                # A younger file may belong to a worker that is still writing.
                if time.time() - path.stat().st_mtime > _STALE:
                    path.unlink()

    def _path(self, shape: Shape, suffix: str) -> Path:
        """Return the path of a file of a shape, which may not exist.

        Args:
            shape: shape.
            suffix: ending of the file's name with a dot, which decides its content.
        """
        key = shape_key(shape)
        # The first two characters of the hash are the name of a subfolder, so that no folder has too many
        # files.
        return self.folder / key[:2] / f"{key}{suffix}"

    def _existing(self, shape: Shape, suffix: str) -> Path | None:
        """Return the path of a file of a shape, or None if it does not exist. See `_path` for `suffix`."""
        path = self._path(shape, suffix)
        return path if path.is_file() else None

    def _put(self, shape: Shape, suffix: str, file_bytes: bytes) -> Path:
        """Write a file of a shape, and return its path. See `_path` for `suffix`."""
        path = self._path(shape, suffix)
        write_atomic(path, file_bytes)
        return path
