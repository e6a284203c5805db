"""The shapes of a campaign as the server serves them: which are prepared, and their bytes."""

import threading
import time
from pathlib import Path

from eg3d_rlhf.label.entities import Mode, Shape, StoredCampaign
from eg3d_rlhf.label.server.options import AppOptions

POLL = 0.5  # seconds between two looks at the cache
AHEAD = 64  # shapes are prepared in order of the plan: a look goes no further than so many missing ones
GRAIN = 16 * 1024  # bytes; see `padded`
_COMMENT = 0x10  # gzip's flag FCOMMENT


class PreparedShapes:
    """Looks shapes up by asset token. Thread-safe; its methods block.

    In a blind study nothing is served before every shape is prepared, so that waiting tells nothing, and all bodies have one length, so
    that neither size nor transfer time tells which generator a shape is from.
    """

    def __init__(self, options: AppOptions, campaign: StoredCampaign):
        self.cache, self.worker, self.blind = options.cache, options.preparation, campaign.settings.mode is Mode.STUDY
        self._shapes = dict(options.store.shapes(campaign.id))
        self._missing = dict(self._shapes)  # in order of the plan
        self._files: dict[str, Path] = {}
        self._failed: set[str] = set()  # cannot be drawn
        self._length = 0  # of every body of a study
        self._looked = -POLL
        self._lock = threading.Lock()
        self._look()  # at tens of thousands of shapes it takes a second, for which the first to ask would all wait
        self._looked = -POLL  # what is still missing may be there when the first one asks

    def known(self, asset: str) -> bool:
        """Whether the campaign has such a shape, and it can be drawn."""
        self._look()
        return asset in self._shapes and asset not in self._failed

    def shape(self, asset: str) -> Shape | None:
        """The shape behind a token."""
        return self._shapes.get(asset)

    def ready(self, asset: str) -> bool:
        """Whether a shape may be shown now."""
        self._look()
        return asset in self._files and (not self.blind or not self._missing)

    def settled(self) -> bool:
        """Whether every shape is prepared or given up."""
        self._look()
        return not self._missing

    def body(self, asset: str) -> bytes:
        """A prepared shape's gzip file."""
        data = self._files[asset].read_bytes()
        return padded(data, self._common_length()) if self.blind else data

    def progress(self) -> dict:
        """Shapes done and in total, and the seconds left, None where unknown."""
        self._look()
        done, total = len(self._shapes) - len(self._missing), len(self._shapes)
        pace = self.worker.progress()["seconds_per_shape"] if self.worker is not None and self._missing else None
        return {"done": done, "total": total, "seconds_left": 0.0 if done == total else pace and pace * (total - done)}

    def trouble(self) -> str | None:
        """Why the preparation is stuck, for administrators: it may name files."""
        return self.worker.progress()["error"] if self.worker is not None and self._missing else None

    def _look(self) -> None:
        with self._lock:
            if not self._missing or time.monotonic() - self._looked < POLL:
                return
            if self.worker is not None:
                self.worker.ensure()
            absent = 0
            for asset, shape in list(self._missing.items()):
                path = self.cache.mesh(shape)
                if path is not None:
                    self._files[asset] = path
                elif self.cache.failure(shape) is not None:
                    self._failed.add(asset)
                elif (absent := absent + 1) > AHEAD:
                    break
                else:
                    continue
                del self._missing[asset]
            self._looked = time.monotonic()

    def _common_length(self) -> int:
        with self._lock:
            if self._length == 0:
                longest = max(path.stat().st_size for path in self._files.values())
                self._length = (longest // GRAIN + 2) * GRAIN
            return self._length


def padded(data: bytes, length: int) -> bytes:
    """The same gzip member, made `length` bytes long by a comment in its header (RFC 1952, 2.3): it decompresses to the same bytes.

    Raises: ValueError for other than one bare member shorter than `length`.
    """
    if data[:3] != b"\x1f\x8b\x08" or data[3] != 0 or len(data) >= length:
        raise ValueError(f"padded: expected a bare gzip member of fewer than {length} bytes, got {len(data)}. Prepare the shapes again.")
    return data[:3] + bytes([_COMMENT]) + data[4:10] + b" " * (length - len(data) - 1) + b"\0" + data[10:]
