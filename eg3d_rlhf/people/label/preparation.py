"""Prepares the shapes of a campaign in advance, in a separate process with low priority.

The process works through the shapes in the order of the plan with one thread. It may be stopped at any moment
and continues later with the shapes that are missing. A shape that cannot be prepared is recorded and skipped.
The process ends by itself when the process that started it has ended, regardless of the reason.
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

_RECENT = 50  # number of shapes over which the pace is averaged


@dataclass(frozen=True, kw_only=True)
class ShapeProgress:
    """Progress of the preparation of a campaign."""

    campaign: str
    done: int = 0  # shapes that are prepared
    total: int = 0  # distinct shapes
    failed: int = 0  # shapes that cannot be prepared; their pairs are never shown
    reason: str | None = None  # of one of these failures; may contain names of files
    seconds_per_shape: float | None = None  # average over the last 50 prepared shapes; None before the first
    seconds_left: float | None = None  # estimate; None before the first shape
    finished: bool = False  # no shape is left to prepare
    error: str | None = None  # why the worker ended; may contain names of files, so only admins see it

    def write(self, path: Path) -> None:
        """Write the progress as JSON; readers see the old or the new file, never a part."""
        write_atomic(path, (json.dumps(asdict(self)) + "\n").encode())

    @classmethod
    def read(cls, path: Path) -> "ShapeProgress | None":
        """Read a progress file; None if it is missing, or written by another version."""
        try:
            return cls(**json.loads(path.read_text()))
        # TypeError: fields of another version.
        except (OSError, ValueError, TypeError):
            return None


def progress_file(cache: ShapeCache, url: str, campaign: str) -> Path:
    """Return the file of a campaign's progress. Its name depends on the database, because campaigns of
    several databases may share a cache.
    """
    name = hashlib.sha256(json.dumps([url, campaign]).encode()).hexdigest()[:16]
    return cache.folder / f"progress-{name}.json"


def prepare(
    shapes: Iterable[Shape],
    cache: ShapeCache,
    renderer: Any,
    renders: bool = False,
    report: Callable[[dict], None] = lambda fields: None,
) -> None:
    """Prepare the shapes that are missing in the cache, in order.

    Args:
        shapes: of a campaign; equal ones are prepared once.
        cache: in which results and failures are stored.
        renderer: a `ShapeRenderer`, or an `AssetPreparer` for assets.
        renders: also make the RGB renders.
        report: called with fields of `ShapeProgress` before the first shape and after each.
    """
    # A dictionary keeps the order of the plan.
    distinct = {shape_key(shape): shape for shape in shapes}
    failed = {key for key, shape in distinct.items() if cache.failure(shape)}
    prepared = {
        key for key, shape in distinct.items() if cache.mesh(shape) and (not renders or cache.render(shape))
    }
    missing = [key for key in distinct if key not in failed and key not in prepared]
    seconds: deque[float] = deque(maxlen=_RECENT)
    reason = next((cache.failure(distinct[key]) for key in failed), None)

    def report_left(left: int) -> None:
        pace = sum(seconds) / len(seconds) if seconds else None
        report(
            {
                "done": len(distinct) - len(failed) - left,
                "total": len(distinct),
                "failed": len(failed),
                "reason": reason,
                "seconds_per_shape": pace,
                # `pace and pace * left` is None as long as no pace is known.
                "seconds_left": 0.0 if left == 0 else pace and pace * left,
                "finished": left == 0,
            }
        )

    report_left(len(missing))
    for number, key in enumerate(missing, 1):
        start = time.monotonic()
        # An error of the generator's file ends the preparation: it concerns all shapes, not this one.
        renderer.generator(distinct[key])
        failure = _prepare_shape(distinct[key], cache, renderer, renders)
        if failure is not None:
            reason = str(failure)
            cache.put_failure(distinct[key], reason, temporary=isinstance(failure, reading.ChangedError))
            failed.add(key)
            print(f"this shape is not shown: {reason}", file=sys.stderr, flush=True)
        seconds.append(time.monotonic() - start)
        report_left(len(missing) - number)


def _prepare_shape(shape: Shape, cache: ShapeCache, renderer: Any, renders: bool) -> ValueError | None:
    """Prepare what is missing of one shape. Returns the error if that is impossible, else None."""
    try:
        image = renderer.image(shape) if renders and cache.render(shape) is None else None
        mesh = renderer.mesh(shape) if cache.mesh(shape) is None else None
    except ValueError as error:
        return error
    # The mesh is stored last: a shape counts as prepared when its mesh is there.
    if image is not None:
        cache.put_render(shape, image)
    if mesh is not None:
        cache.put_mesh(shape, mesh)
    return None


class AssetPreparer:
    """Cleans asset files; it has the interface of `shape_rendering.ShapeRenderer`."""

    def generator(self, shape: Shape) -> object:
        """Return None: an asset has no generator that must be loaded."""

    def mesh(self, shape: Shape) -> bytes:
        """Return the cleaned file of an asset, damaged if the shape says so."""
        return reading.clean(Path(shape.source), shape.file, shape.degradation, shape.seed)

    def image(self, shape: Shape) -> bytes:
        raise ValueError("an asset has no render. Plan the campaign without renders.")


def prepare_prompts(prompts: Iterable[Mapping], cache: ShapeCache) -> None:
    """Make the images of prompts that are missing in the cache. An image that cannot be shown is recorded."""
    for prompt in prompts:
        key = prompt.get("hash")
        # Prompts that consist of a text have no image.
        if not key or cache.prompt_settled(key):
            continue
        try:
            cache.put_prompt(key, reading.clean(Path(prompt["image"]), key))
        except ValueError as error:
            cache.put_prompt_failure(key, str(error))


# the worker imports the package from here, in any working directory
_ROOT = Path(__file__).resolve().parents[3]
# The environment passes the address of the database, because other users can read the arguments of a process,
# and the address may contain a password.
URL_VARIABLE = "EG3D_RLHF_LABEL_URL"
_WRITE_EVERY = 0.5  # seconds between two writes of the progress
_CHECK_PARENT_EVERY = 0.5  # seconds between two checks of the parent process
_PATIENCE = 5.0  # seconds that a worker has for ending before it is killed
_RESTARTS = 3  # restarts of a worker that ended with an error without preparing a shape


def end_with_parent(parent: int) -> None:
    """End this process at once when `parent` is no longer its parent. Files are written atomically, so the
    process may be stopped at any point.
    """

    def end_if_orphaned() -> None:
        # A process whose parent has ended gets another parent, such as init.
        while os.getppid() == parent:
            time.sleep(_CHECK_PARENT_EVERY)
        os._exit(3)  # sys.exit would end this thread only

    threading.Thread(target=end_if_orphaned, name="parent check", daemon=True).start()


def work_through(url: str, campaign: str, cache: str, nice: int, parent: int) -> None:
    """Prepare the missing shapes of a campaign, in the process that `Preparation` starts.

    Args:
        url: of the database.
        campaign: name.
        cache: folder of the prepared shapes.
        nice: 0..19; with a higher number, other processes get more of the processor.
        parent: id of the process with which this one ends.
    """
    end_with_parent(parent)
    # Before PyTorch is imported, which takes seconds of processor time itself.
    os.nice(nice)
    import torch

    from eg3d_rlhf.people.label.store import Store  # of the optional dependencies [label]

    torch.set_num_threads(1)
    # One thread, so that the machine stays usable for annotators' requests and for its other users.
    shapes = ShapeCache(cache)
    shapes.remove_leftovers()
    file = progress_file(shapes, url, campaign)
    progress = ShapeProgress(campaign=campaign)
    last = -float("inf")

    def write_progress(fields: dict) -> None:
        nonlocal progress, last
        progress = ShapeProgress(campaign=campaign, **fields)
        if progress.finished or time.monotonic() - last >= _WRITE_EVERY:
            progress.write(file)
            last = time.monotonic()

    try:
        with Store.open(url, create=False) as store:
            stored = store.campaign(campaign)
            if stored is None:
                raise ValueError(
                    f"--campaign: expected the name of a campaign in the database, got {campaign!r}. Plan it"
                    " with tools/label.py."
                )
            planned = [shape for _, shape in store.shapes(stored.id)]
        prepare_prompts(stored.settings.extra.get("conditions", {}).values(), shapes)
        renderer: Any = AssetPreparer()
        if not planned[0].file:  # a campaign contains assets only, or none
            from eg3d_rlhf.people.label.shape_rendering import ShapeRenderer

            renderer = ShapeRenderer()
        prepare(planned, shapes, renderer, stored.settings.show_render, write_progress)
    except Exception as error:
        # The server reads the error from the file; the traceback goes to the log.
        replace(progress, error=str(error).strip() or type(error).__name__).write(file)
        raise


class Preparation:
    """The worker process of one campaign, as the server uses it. All methods are thread-safe."""

    def __init__(
        self, url: str, campaign: str, cache: ShapeCache | str | Path = DEFAULT_FOLDER, nice: int = 10
    ):
        self.cache = cache if isinstance(cache, ShapeCache) else ShapeCache(cache)
        self.url = url
        self.campaign = campaign
        self.nice = nice
        self._file = progress_file(self.cache, url, campaign)
        self._process: subprocess.Popen | None = None
        # Restarts since the last prepared shape, and the number of prepared shapes at the last failure.
        self._restarts = 0
        self._done = 0
        self._lock = threading.RLock()

    @property
    def running(self) -> bool:
        """True while the worker runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def gave_up(self) -> bool:
        """True if the worker has failed so often that it is not started again."""
        return self._restarts >= _RESTARTS and not self.running

    @property
    def log(self) -> Path:
        """File of the worker's output."""
        return self._file.with_suffix(".log")

    def start(self) -> None:
        """Start the worker, unless it runs."""
        with self._lock:
            if self.running:
                return
            self.cache.folder.mkdir(0o700, parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                self._file.unlink()  # the progress of an earlier worker is out of date
            # Libraries read the number of threads when they are imported, so it must be set before the start.
            threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
            # Also without installation, in a checkout.
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
                    start_new_session=True,  # Ctrl-C in the server's terminal must not reach the worker
                    env={**os.environ, **threads, "PYTHONPATH": path, URL_VARIABLE: self.url},
                )

    def stop(self) -> None:
        """Stop the worker and wait for its end."""
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
        """Start the worker again if it ended with an error. After three failures without a prepared shape it
        is not started any more.
        """
        with self._lock:
            if self._process is None or self.running or self._process.returncode == 0:
                return
            progress = ShapeProgress.read(self._file)
            done = progress.done if progress else 0
            # Progress since the last failure means that the failure was not caused by the next shape.
            self._restarts = 0 if done > self._done else self._restarts + 1
            self._done = max(done, self._done)
            if self._restarts < _RESTARTS:
                self.start()

    def progress(self) -> dict:
        """Return the fields of `ShapeProgress`, with `running` and the error of a worker that has ended."""
        progress = ShapeProgress.read(self._file) or ShapeProgress(campaign=self.campaign)
        process = self._process
        error = progress.error
        # A worker that was killed could not write its error.
        if (
            error is None
            and not progress.finished
            and process is not None
            and process.poll() not in (None, 0)
        ):
            error = f"the preparation ended with exit code {process.returncode}. See {self.log}."
        return {**asdict(progress), "error": error, "running": self.running}


if __name__ == "__main__":
    with user_errors():
        work_through(os.environ[URL_VARIABLE], **json.loads(sys.argv[1]))
