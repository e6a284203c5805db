"""Prepared shapes on disk, each under a hash of all that it is drawn from: a file that is there is right, so it is never written again.

Several campaigns, servers and workers may share a folder; every file appears whole or not at all.
"""

import hashlib
import json
import time
from pathlib import Path

from eg3d_rlhf.label.entities import Shape
from training.storage import write_atomic

VERSION = 1  # of how shapes are drawn and written; a change makes other files
DEFAULT_FOLDER = Path("~/.cache/eg3d-rlhf/shapes")
_STALE = 3600  # seconds after which what a killed writer left is removed
# all that a shape is drawn from, with kinds: psi 1 and 1.0 are one shape; where the weights lie makes no difference
_DRAWN_FROM = {"generator": str, "seed": int, "psi": float, "level": float, "resolution": int, "triangles": int, "degradation": str}


def shape_key(shape: Shape) -> str:
    """SHA-256 hex of the generator's hash, seed, psi, level, resolution, triangles, damage and the version of the drawing."""
    parts = [VERSION, *(kind(getattr(shape, name)) for name, kind in _DRAWN_FROM.items())]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class ShapeCache:
    """Files of prepared shapes.

    Args: folder: made on the first write; '~' is the user's home.
    """

    def __init__(self, folder: str | Path = DEFAULT_FOLDER):
        self.folder = Path(folder).expanduser()

    def mesh(self, shape: Shape) -> Path | None:
        """The mesh (`mesh_binary`, gzip); None until it is prepared."""
        return self._existing(shape, ".shp.gz")

    def render(self, shape: Shape) -> Path | None:
        """The RGB picture (PNG); None until it is prepared."""
        return self._existing(shape, ".png")

    def failure(self, shape: Shape) -> str | None:
        """Why the shape cannot be drawn; None where nothing speaks against it."""
        path = self._existing(shape, ".failed.json")
        return json.loads(path.read_text())["reason"] if path else None

    def put_mesh(self, shape: Shape, data: bytes) -> Path:
        """Keep a compressed mesh."""
        return self._put(shape, ".shp.gz", data)

    def put_render(self, shape: Shape, data: bytes) -> Path:
        """Keep a PNG."""
        return self._put(shape, ".png", data)

    def put_failure(self, shape: Shape, reason: str) -> Path:
        """Remember that this shape cannot be drawn, however often it is tried."""
        return self._put(shape, ".failed.json", (json.dumps({"seed": shape.seed, "reason": reason}) + "\n").encode())

    def remove_leftovers(self) -> None:
        """Delete what writers that were killed left behind, an hour ago or earlier."""
        for path in self.folder.glob("*/.*.tmp"):
            try:
                if time.time() - path.stat().st_mtime > _STALE:
                    path.unlink()
            except FileNotFoundError:  # another worker was faster
                pass

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
