"""Draw the shapes of a campaign ahead of the annotators, in a process of its own that leaves the machine to
others.

It works through the shapes in the order of the plan, keeps to one thread, may be ended at any moment and
takes up where it was. A shape that cannot be drawn is noted and passed over. It ends by itself when the
process that started it is gone, however that ended.
"""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from eg3d_rlhf.core.cli import user_errors
from eg3d_rlhf.people.label.assets import reading
from eg3d_rlhf.people.label.entities import Shape
from eg3d_rlhf.people.label.shape_files import DEFAULT_FOLDER, ShapeCache, shape_key
from training.storage import write_atomic

_RECENT = 50  # shapes over which the pace is taken


@dataclass(frozen=True, kw_only=True)
class ShapeProgress:
    """How far the preparation of a campaign is."""

    campaign: str
    done: int = 0  # shapes that are prepared
    total: int = 0  # distinct shapes
    failed: int = 0  # shapes that cannot be drawn; their pairs are never shown
    reason: str | None = None  # why, of the last one; may name files
    seconds_per_shape: float | None = None  # over the last 50 that were drawn; None before the first
    seconds_left: float | None = None
    finished: bool = False  # nothing is left to draw
    error: str | None = None  # why the worker gave up; may name files, so it is for administrators

    def write(self, path: Path) -> None:
        write_atomic(path, (json.dumps(asdict(self)) + "\n").encode())

    @classmethod
    def read(cls, path: Path) -> "ShapeProgress | None":
        try:
            return cls(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            return None


def progress_file(cache: ShapeCache, url: str, campaign: str) -> Path:
    """Where a campaign's progress is written: campaigns of several databases may share a cache."""
    name = hashlib.sha256(json.dumps([url, campaign]).encode()).hexdigest()[:16]
    return cache.folder / f"progress-{name}.json"


def prepare(
    shapes: Iterable[Shape],
    cache: ShapeCache,
    drawer: Any,
    renders: bool = False,
    tell: Callable[[dict], None] = lambda fields: None,
) -> None:
    """Draw whatever of the shapes is missing in the cache, in order.

    Args: renders: also the RGB pictures; tell: hears the fields of `ShapeProgress` that it knows, before the
        first shape and after each.
    """
    distinct = {shape_key(shape): shape for shape in shapes}
    failed = {key for key, shape in distinct.items() if cache.failure(shape)}
    drawn = {
        key for key, shape in distinct.items() if cache.mesh(shape) and (not renders or cache.render(shape))
    }
    missing = [key for key in distinct if key not in failed and key not in drawn]
    seconds: deque[float] = deque(maxlen=_RECENT)
    reason = next((cache.failure(distinct[key]) for key in failed), None)

    def report(left: int) -> None:
        pace = sum(seconds) / len(seconds) if seconds else None
        tell(
            {
                "done": len(distinct) - len(failed) - left,
                "total": len(distinct),
                "failed": len(failed),
                "reason": reason,
                "seconds_per_shape": pace,
                "seconds_left": 0.0 if left == 0 else pace and pace * left,
                "finished": left == 0,
            }
        )

    report(len(missing))
    for number, key in enumerate(missing, 1):
        start = time.monotonic()
        drawer.generator(distinct[key])
        wrong = _draw(distinct[key], cache, drawer, renders)
        if wrong is not None:
            reason = str(wrong)
            cache.put_failure(distinct[key], reason, passing=isinstance(wrong, reading.ChangedError))
            failed.add(key)
            print(f"not shown: {reason}", file=sys.stderr, flush=True)
        seconds.append(time.monotonic() - start)
        report(len(missing) - number)


def _draw(shape: Shape, cache: ShapeCache, drawer: Any, renders: bool) -> ValueError | None:
    """Draw what is missing of one shape; the picture first, as a shape counts as prepared with its mesh.
    Returns why it cannot be drawn.
    """
    try:
        picture = drawer.picture(shape) if renders and cache.render(shape) is None else None
        mesh = drawer.mesh(shape) if cache.mesh(shape) is None else None
    except ValueError as error:
        return error
    if picture is not None:
        cache.put_render(shape, picture)
    if mesh is not None:
        cache.put_mesh(shape, mesh)
    return None


class AssetDrawer:
    """Gives assets their clean form, where `drawing.ShapeDrawer` draws shapes."""

    def generator(self, shape: Shape) -> object:
        """Nothing: an asset is the file itself."""

    def mesh(self, shape: Shape) -> bytes:
        return reading.clean(Path(shape.source), shape.file, shape.degradation, shape.seed)

    def picture(self, shape: Shape) -> bytes:
        raise ValueError("expected a generator's shape, got an asset, of which no picture is made")


def prepare_prompts(conditions: Iterable[Mapping], cache: ShapeCache) -> None:
    """Make the pictures of prompts that are missing in the cache; one that cannot be shown is noted."""
    for condition in conditions:
        key = condition.get("hash")
        if not key or cache.prompt_settled(key):
            continue
        try:
            cache.put_prompt(key, reading.clean(Path(condition["image"]), key))
        except ValueError as error:
            cache.put_prompt_failure(key, str(error))


_ROOT = Path(__file__).resolve().parents[3]  # found by the worker, wherever the server was started
# passes the database's address, password included, out of sight of the process list
URL_VARIABLE = "EG3D_RLHF_LABEL_URL"
_WRITE_EVERY = 0.5  # seconds between two writes of the progress
_WATCH_EVERY = 0.5  # seconds between two looks at the parent
_PATIENCE = 5.0  # seconds that a worker has to end when it is asked to
_RESTARTS = 3  # of a worker that died, without a shape in between


def end_with_parent(parent: int) -> None:
    """End this process at once when `parent` is no longer its parent. What it writes it writes whole, so it
    may be cut off anywhere.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_EVERY)
        os._exit(3)

    threading.Thread(target=watch, name="parent watch", daemon=True).start()


def work_through(url: str, campaign: str, cache: str, nice: int, parent: int) -> None:
    """Draw what is missing of a campaign's shapes in `cache`; runs in the process that `Preparation` starts.

    Args: nice: 0..19, how far other processes go first; parent: id of the process with which this one ends.
    """
    end_with_parent(parent)
    os.nice(nice)
    import torch

    from eg3d_rlhf.people.label.store import Store  # of the extra, which the flags of a server do without

    torch.set_num_threads(1)
    shapes = ShapeCache(cache)
    shapes.remove_leftovers()
    file = progress_file(shapes, url, campaign)
    progress = ShapeProgress(campaign=campaign)
    last = -float("inf")

    def tell(fields: dict) -> None:
        nonlocal progress, last
        progress = ShapeProgress(campaign=campaign, **fields)
        if progress.finished or time.monotonic() - last >= _WRITE_EVERY:
            progress.write(file)
            last = time.monotonic()

    try:
        with Store.open(url, create=False) as store:
            stored = store.campaign(campaign)
            if stored is None:
                wrong = f"--campaign: expected the name of a campaign in the database, got {campaign!r}."
                raise ValueError(f"{wrong} Make it with tools/label.py.")
            planned = [shape for _, shape in store.shapes(stored.id)]
        prepare_prompts(stored.settings.extra.get("conditions", {}).values(), shapes)
        drawer: Any = AssetDrawer()
        if not planned[0].file:  # all of a campaign's shapes are assets, or none is
            from eg3d_rlhf.people.label.shape_rendering import ShapeDrawer

            drawer = ShapeDrawer()
        prepare(planned, shapes, drawer, stored.settings.show_render, tell)
    except Exception as error:
        replace(progress, error=str(error).strip() or type(error).__name__).write(file)
        raise


class Preparation:
    """The worker of one campaign, as the server sees it. Its methods may be called from any thread."""

    def __init__(
        self, url: str, campaign: str, cache: ShapeCache | str | Path = DEFAULT_FOLDER, nice: int = 10
    ):
        self.cache = cache if isinstance(cache, ShapeCache) else ShapeCache(cache)
        self.url = url
        self.campaign = campaign
        self.nice = nice
        self._file = progress_file(self.cache, url, campaign)
        self._process: subprocess.Popen | None = None
        # starts after a death, and how many shapes there were at the last one
        self._restarts = 0
        self._done = 0
        self._lock = threading.RLock()

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def gave_up(self) -> bool:
        return self._restarts >= _RESTARTS and not self.running

    @property
    def log(self) -> Path:
        return self._file.with_suffix(".log")

    def start(self) -> None:
        with self._lock:
            if self.running:
                return
            self.cache.folder.mkdir(0o700, parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                self._file.unlink()  # what an earlier worker said is no longer so
            threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
            path = os.pathsep.join(part for part in (str(_ROOT), os.environ.get("PYTHONPATH", "")) if part)
            arguments = {
                "campaign": self.campaign,
                "cache": str(self.cache.folder),
                "nice": self.nice,
                "parent": os.getpid(),
            }
            with self.log.open("wb") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "eg3d_rlhf.people.label.preparation", json.dumps(arguments)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    env={**os.environ, **threads, "PYTHONPATH": path, URL_VARIABLE: self.url},
                )

    def stop(self) -> None:
        with self._lock:
            if self._process is None:
                return
            self._process.terminate()
            try:
                self._process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def ensure(self) -> None:
        """Start a worker that was started and died before it was done; gives up after three deaths without a
        shape in between.
        """
        with self._lock:
            if self._process is None or self.running or self._process.returncode == 0:
                return
            progress = ShapeProgress.read(self._file)
            done = progress.done if progress else 0
            self._restarts = 0 if done > self._done else self._restarts + 1
            self._done = max(done, self._done)
            if self._restarts < _RESTARTS:
                self.start()

    def progress(self) -> dict:
        progress = ShapeProgress.read(self._file) or ShapeProgress(campaign=self.campaign)
        process = self._process
        error = progress.error
        if (
            error is None
            and not progress.finished
            and process is not None
            and process.poll() not in (None, 0)
        ):
            error = f"the worker ended with code {process.returncode}; see {self.log}"
        return {**asdict(progress), "error": error, "running": self.running}


if __name__ == "__main__":
    with user_errors():
        work_through(os.environ[URL_VARIABLE], **json.loads(sys.argv[1]))
