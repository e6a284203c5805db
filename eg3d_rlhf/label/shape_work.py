"""The work of preparation itself: which shapes of a plan are missing, drawing them in order, and how far it is."""

import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from eg3d_rlhf.label.records import Shape
from eg3d_rlhf.label.shape_cache import ShapeCache, shape_key
from training.storage import write_atomic

_RECENT = 50  # shapes over which the pace is taken


class Drawer(Protocol):
    """What draws; see `drawing.ShapeDrawer`."""

    def generator(self, shape: Shape) -> object:
        """The generator of a shape; ValueError or OSError where it cannot be had."""

    def mesh(self, shape: Shape) -> bytes:
        """The compressed mesh; ValueError for a shape that cannot be drawn."""

    def picture(self, shape: Shape) -> bytes:
        """The PNG."""


@dataclass(frozen=True, kw_only=True)
class ShapeProgress:
    """How far the preparation of a campaign is."""

    campaign: str
    done: int = 0  # shapes that are prepared
    total: int = 0  # distinct shapes
    failed: int = 0  # shapes that cannot be drawn; their pairs are never shown
    seconds_per_shape: float | None = None  # over the last 50 that were drawn; None before the first
    seconds_left: float | None = None
    finished: bool = False  # nothing is left to draw
    error: str | None = None  # why the worker gave up; may name files, so it is for administrators

    def write(self, path: Path) -> None:
        """As JSON, whole or not at all."""
        write_atomic(path, (json.dumps(asdict(self)) + "\n").encode())

    @classmethod
    def read(cls, path: Path) -> "ShapeProgress | None":
        """What was written; None where there is nothing of this version."""
        try:
            return cls(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            return None


def progress_file(cache: ShapeCache, url: str, campaign: str) -> Path:
    """Where a campaign's progress is written: campaigns of several databases may share a cache."""
    name = hashlib.sha256(json.dumps([url, campaign]).encode()).hexdigest()[:16]
    return cache.folder / f"progress-{name}.json"


def prepare(
    shapes: Iterable[Shape], cache: ShapeCache, drawer: Drawer, renders: bool = False, tell: Callable[[dict], None] = lambda fields: None
) -> None:
    """Draw whatever of the shapes is missing in the cache, in order.

    Args: renders: also the RGB pictures; tell: hears the fields of `ShapeProgress` that it knows, before the first shape and after each.
    Raises: ValueError, OSError where a generator or the disk fails: that is no shape's fault, and nothing is noted against one.
    """
    distinct = {shape_key(shape): shape for shape in shapes}
    failed = {key for key, shape in distinct.items() if cache.failure(shape)}
    missing = [key for key, shape in distinct.items() if key not in failed and not _ready(cache, shape, renders)]
    seconds: deque[float] = deque(maxlen=_RECENT)

    def report(left: int) -> None:
        pace = sum(seconds) / len(seconds) if seconds else None
        tell({
            "done": len(distinct) - len(failed) - left, "total": len(distinct), "failed": len(failed), "seconds_per_shape": pace,
            "seconds_left": 0.0 if left == 0 else pace and pace * left, "finished": left == 0,
        })  # fmt: skip

    report(len(missing))
    for number, key in enumerate(missing, 1):
        start = time.monotonic()
        drawer.generator(distinct[key])
        reason = _draw(distinct[key], cache, drawer, renders)
        if reason is not None:
            cache.put_failure(distinct[key], reason)
            failed.add(key)
        seconds.append(time.monotonic() - start)
        report(len(missing) - number)


def _ready(cache: ShapeCache, shape: Shape, renders: bool) -> bool:
    return cache.mesh(shape) is not None and (not renders or cache.render(shape) is not None)


def _draw(shape: Shape, cache: ShapeCache, drawer: Drawer, renders: bool) -> str | None:
    """Draw what is missing of one shape; the picture first, as a shape counts as prepared with its mesh. Returns why it cannot be drawn."""
    try:
        picture = drawer.picture(shape) if renders and cache.render(shape) is None else None
        mesh = drawer.mesh(shape) if cache.mesh(shape) is None else None
    except ValueError as error:
        return str(error)
    if picture is not None:
        cache.put_render(shape, picture)
    if mesh is not None:
        cache.put_mesh(shape, mesh)
    return None
