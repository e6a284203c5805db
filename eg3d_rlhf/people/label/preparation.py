"""Preparation of the shapes of a labelling campaign, in a separate process with low priority.

The process prepares the shapes in the order of the plan, with one thread. It may be stopped at any moment.
Another process then continues with the shapes that are missing. A shape that cannot be prepared is recorded
and skipped. The process ends when the process that started it has ended for any reason.
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

_RECENT = 50  # number of recent shapes over which the time per shape is averaged


@dataclass(frozen=True, kw_only=True)
class ShapeProgress:
    """Progress of the preparation of a campaign."""

    campaign: str  # name of the campaign
    done: int = 0  # number of shapes that are prepared
    total: int = 0  # number of different shapes
    failed: int = 0  # number of shapes that cannot be prepared; their pairs are never shown
    reason: str | None = None  # reason of one of these failures; it may contain names of files
    # mean time over the last 50 prepared shapes; None before the first shape is prepared
    seconds_per_shape: float | None = None
    seconds_left: float | None = None  # estimated time; None before the first shape is prepared
    finished: bool = False  # True if no shape is left to prepare
    # reason why the worker process ended; it may contain names of files, so it is shown to admins only
    error: str | None = None

    def write(self, path: Path) -> None:
        """Write the progress into a JSON file atomically."""
        write_atomic(path, (json.dumps(asdict(self)) + "\n").encode())

    @classmethod
    def read(cls, path: Path) -> "ShapeProgress | None":
        """Read a progress file. Returns None if it is missing, damaged, or of another version."""
        try:
            return cls(**json.loads(path.read_text()))
        # TypeError: the file has fields of another version
        except (OSError, ValueError, TypeError):
            return None


def progress_file(cache: ShapeCache, url: str, campaign: str) -> Path:
    """Return the path of the progress file of a campaign.

    Args:
        cache: cache of prepared shapes, whose folder contains the file.
        url: URL of the store. The name of the file depends on it, because several stores may share a cache.
        campaign: name of the campaign.
    """
    file_stem = hashlib.sha256(json.dumps([url, campaign]).encode()).hexdigest()[:16]
    return cache.folder / f"progress-{file_stem}.json"


def prepare(
    shapes: Iterable[Shape],
    cache: ShapeCache,
    renderer: Any,
    renders: bool = False,
    on_progress: Callable[[dict], None] = lambda fields: None,
) -> None:
    """Prepare the shapes that are missing in the cache, in order.

    Args:
        shapes: shapes of a campaign. Equal shapes are prepared once.
        cache: cache in which results and failures are stored.
        renderer: a `ShapeRenderer` for isosurfaces of a generator, or an `AssetPreparer` for asset files.
        renders: True makes the RGB renders as well.
        on_progress: function that is called with fields of `ShapeProgress`, before the first shape and after
            each shape.

    Raises:
        ValueError: the file of a generator cannot be used.
    """
    # A dictionary removes repetitions and keeps the order of the plan.
    shapes_by_key = {shape_key(shape): shape for shape in shapes}
    failed_keys = {key for key, shape in shapes_by_key.items() if cache.failure(shape)}
    prepared_keys = {
        key
        for key, shape in shapes_by_key.items()
        if cache.mesh(shape) and (not renders or cache.render(shape))
    }
    missing_keys = [key for key in shapes_by_key if key not in failed_keys and key not in prepared_keys]
    durations: deque[float] = deque(maxlen=_RECENT)  # seconds per shape
    failure_reason = next((cache.failure(shapes_by_key[key]) for key in failed_keys), None)

    def report_progress(missing_count: int) -> None:
        seconds_per_shape = sum(durations) / len(durations) if durations else None
        if missing_count == 0:
            seconds_left: float | None = 0.0
        else:
            # `and` keeps None, which means an unknown time
            seconds_left = seconds_per_shape and seconds_per_shape * missing_count
        on_progress(
            {
                "done": len(shapes_by_key) - len(failed_keys) - missing_count,
                "total": len(shapes_by_key),
                "failed": len(failed_keys),
                "reason": failure_reason,
                "seconds_per_shape": seconds_per_shape,
                "seconds_left": seconds_left,
                "finished": missing_count == 0,
            }
        )

    report_progress(len(missing_keys))
    for done_count, key in enumerate(missing_keys, 1):
        start_time = time.monotonic()
        shape = shapes_by_key[key]
        # This loads the generator. An error of its file concerns all shapes, so it ends the preparation.
        renderer.generator(shape)
        shape_error = _prepare_shape(shape, cache, renderer, renders)
        if shape_error is not None:
            failure_reason = str(shape_error)
            cache.put_failure(
                shape, failure_reason, is_temporary=isinstance(shape_error, reading.ChangedError)
            )
            failed_keys.add(key)
            print(f"A shape cannot be shown: {failure_reason}", file=sys.stderr, flush=True)
        durations.append(time.monotonic() - start_time)
        report_progress(len(missing_keys) - done_count)


def _prepare_shape(shape: Shape, cache: ShapeCache, renderer: Any, renders: bool) -> ValueError | None:
    """Make those files of one shape that are missing in the cache, and store them there.

    Returns:
        The error if the shape cannot be prepared, and None if it is prepared.
    """
    try:
        image_bytes = renderer.image(shape) if renders and cache.render(shape) is None else None
        mesh_bytes = renderer.mesh(shape) if cache.mesh(shape) is None else None
    except ValueError as error:
        return error
    # The mesh is stored last, because a shape counts as prepared when the file of its mesh exists.
    if image_bytes is not None:
        cache.put_render(shape, image_bytes)
    if mesh_bytes is not None:
        cache.put_mesh(shape, mesh_bytes)
    return None


class AssetPreparer:
    """Preparation of asset files, with the interface of `shape_rendering.ShapeRenderer`."""

    def generator(self, shape: Shape) -> object:
        """Return None, because an asset file has no generator that must be loaded."""

    def mesh(self, shape: Shape) -> bytes:
        """Return the content of an asset file for the page, with the damage of `shape.degradation`."""
        return reading.clean(Path(shape.source), shape.file, shape.degradation, shape.seed)

    def image(self, shape: Shape) -> bytes:
        """Raise ValueError, because an asset file has no latent that could be rendered."""
        raise ValueError("an asset file has no render. Plan the campaign without renders.")


def prepare_prompts(prompts: Iterable[Mapping], cache: ShapeCache) -> None:
    """Prepare the images of prompts that are missing in the cache.

    If an image cannot be shown, the cache records the failure.

    Args:
        prompts: prompts with the path "image" and the SHA-256 "hash" of their image, if they have one.
        cache: cache in which results and failures are stored.
    """
    for prompt in prompts:
        image_hash = prompt.get("hash")
        # A prompt that consists of a text has no "hash".
        if not image_hash or cache.prompt_settled(image_hash):
            continue
        try:
            cache.put_prompt(image_hash, reading.clean(Path(prompt["image"]), image_hash))
        except ValueError as error:
            cache.put_prompt_failure(image_hash, str(error))


# folder from which the worker process imports this package in any working directory
_ROOT = Path(__file__).resolve().parents[3]
# Environment variable with the URL of the store. The URL may contain a password, and other users of the
# machine can read the arguments of a process, but not its environment.
URL_VARIABLE = "EG3D_RLHF_LABEL_URL"
_WRITE_EVERY = 0.5  # shortest time between two writes of the progress, in seconds
_GROW_EVERY = 1.0  # time between two looks for answers of a campaign that learns from them, in seconds
_CHECK_PARENT_EVERY = 0.5  # time between two checks of the parent process, in seconds
_STOP_SECONDS = 5.0  # time in which a worker must end after SIGTERM; then it is killed
_RESTARTS = 3  # number of failures without a newly prepared shape after which a worker is not started again


def end_with_parent(parent_id: int) -> None:
    """Start a thread that ends this process when its parent process has ended.

    All files are written atomically, so the process may end at any moment.

    Args:
        parent_id: id of the parent process.
    """

    def end_if_orphaned() -> None:
        # When the parent of a process ends, the process gets another parent, such as init.
        while os.getppid() == parent_id:
            time.sleep(_CHECK_PARENT_EVERY)
        os._exit(3)  # sys.exit would only end this thread

    threading.Thread(target=end_if_orphaned, name="parent check", daemon=True).start()


def work_through(url: str, campaign: str, cache: str, nice: int, parent: int) -> None:
    """Prepare the missing shapes of a campaign.

    This is the main function of the process that `Preparation` starts.

    Args:
        url: URL of the store.
        campaign: name of the campaign.
        cache: folder of the prepared shapes.
        nice: decrease of the priority of this process, 0..19.
        parent: id of the parent process, with which this process ends.
    """
    end_with_parent(parent)
    # The priority is lowered before PyTorch is imported, because the import takes seconds of processor time.
    os.nice(nice)
    import torch

    from eg3d_rlhf.people.label.store import Store  # needs the optional dependencies [label]

    # One thread leaves the other processors to the requests of annotators and to other users.
    torch.set_num_threads(1)
    shape_cache = ShapeCache(cache)
    shape_cache.remove_leftovers()
    progress_path = progress_file(shape_cache, url, campaign)
    progress = ShapeProgress(campaign=campaign)
    last_write_time = -float("inf")  # time of the last write of the progress, in seconds of time.monotonic

    def write_progress(progress_fields: dict) -> None:
        nonlocal progress, last_write_time
        progress = ShapeProgress(campaign=campaign, **progress_fields)
        if progress.finished or time.monotonic() - last_write_time >= _WRITE_EVERY:
            progress.write(progress_path)
            last_write_time = time.monotonic()

    try:
        with Store.open(url, create=False) as store:
            stored_campaign = store.campaign(campaign)
            if stored_campaign is None:
                raise ValueError(
                    f"--campaign: the database has no campaign {campaign!r}. Plan the campaign with"
                    " tools/label.py."
                )
            planned_shapes = [shape for _, shape in store.shapes(stored_campaign.id)]
            prepare_prompts(stored_campaign.settings.extra.get("conditions", {}).values(), shape_cache)
            renderer: Any = AssetPreparer()
            # either all shapes of a campaign are asset files, or none
            if not planned_shapes[0].file:
                from eg3d_rlhf.people.label.shape_rendering import ShapeRenderer

                renderer = ShapeRenderer()
            show_render = stored_campaign.settings.show_render
            prepare(planned_shapes, shape_cache, renderer, show_render, write_progress)
            # A campaign that learns from its answers gets further pairs while people label.
            if store.plan(stored_campaign.id).missing_count:
                from eg3d_rlhf.people.label.active import PairPlanner

                planner = PairPlanner(
                    store, stored_campaign, renderer.generator(planned_shapes[0]), shape_cache.folder
                )
                while store.plan(stored_campaign.id).missing_count:
                    if not planner.append_batch():
                        time.sleep(_GROW_EVERY)
                        continue
                    planned_shapes = [shape for _, shape in store.shapes(stored_campaign.id)]
                    prepare(planned_shapes, shape_cache, renderer, show_render, write_progress)
    except Exception as error:
        # The server reads the error from the progress file. The traceback is written into the log of the
        # process.
        replace(progress, error=str(error).strip() or type(error).__name__).write(progress_path)
        raise


class Preparation:
    """Worker process that prepares the shapes of one campaign while the label server runs.

    All methods are thread-safe.

    Args:
        url: URL of the store.
        campaign: name of the campaign.
        cache: cache of prepared shapes, or its folder.
        nice: decrease of the priority of the worker process, 0..19.
    """

    def __init__(
        self, url: str, campaign: str, cache: ShapeCache | str | Path = DEFAULT_FOLDER, nice: int = 10
    ):
        self.cache = cache if isinstance(cache, ShapeCache) else ShapeCache(cache)
        self.url = url
        self.campaign = campaign
        self.nice = nice
        self._file = progress_file(self.cache, url, campaign)
        self._process: subprocess.Popen | None = None
        self._restarts = 0  # number of failures since the last prepared shape
        self._done = 0  # number of prepared shapes at the last failure
        self._lock = threading.RLock()

    @property
    def running(self) -> bool:
        """Return True while the worker process runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def gave_up(self) -> bool:
        """Return True if the worker has failed so often that it is not started again."""
        return self._restarts >= _RESTARTS and not self.running

    @property
    def log(self) -> Path:
        """Return the path of the file that receives the output of the worker process."""
        return self._file.with_suffix(".log")

    def start(self) -> None:
        """Start the worker process if it does not run."""
        with self._lock:
            if self.running:
                return
            self.cache.folder.mkdir(0o700, parents=True, exist_ok=True)
            # the progress file of an earlier worker is outdated
            with contextlib.suppress(FileNotFoundError):
                self._file.unlink()
            # Libraries read these variables when they are imported, so they are set before the process
            # starts.
            thread_variables = dict.fromkeys(
                ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"
            )
            # With _ROOT the worker can import this package also if it is not installed.
            python_path = os.pathsep.join(
                path_part for path_part in (str(_ROOT), os.environ.get("PYTHONPATH", "")) if path_part
            )
            worker_arguments = {
                "campaign": self.campaign,
                "cache": str(self.cache.folder),
                "nice": self.nice,
                "parent": os.getpid(),
            }
            with self.log.open("wb") as log_file:
                self._process = subprocess.Popen(
                    [
                        sys.executable,
                        "-m",
                        "eg3d_rlhf.people.label.preparation",
                        json.dumps(worker_arguments),
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=log_file,
                    stderr=log_file,
                    start_new_session=True,  # Ctrl-C in the server's terminal must not reach the worker
                    env={**os.environ, **thread_variables, "PYTHONPATH": python_path, URL_VARIABLE: self.url},
                )

    def stop(self) -> None:
        """Stop the worker process, and wait until it has ended."""
        with self._lock:
            if self._process is None:
                return
            self._process.terminate()
            try:
                self._process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def ensure(self) -> None:
        """Start the worker again if it has ended with an error.

        After _RESTARTS failures without a newly prepared shape it is not started any more.
        """
        with self._lock:
            if self._process is None or self.running or self._process.returncode == 0:
                return
            progress = ShapeProgress.read(self._file)
            done_count = progress.done if progress else 0
            # If shapes were prepared since the last failure, the count of failures starts again.
            self._restarts = 0 if done_count > self._done else self._restarts + 1
            self._done = max(done_count, self._done)
            if self._restarts < _RESTARTS:
                self.start()

    def progress(self) -> dict:
        """Return the fields of `ShapeProgress`, and "running": True while the worker process runs.

        If the worker process was killed, "error" states its exit code.
        """
        progress = ShapeProgress.read(self._file) or ShapeProgress(campaign=self.campaign)
        process = self._process
        error = progress.error
        # A worker that was killed has written no error.
        if (
            error is None
            and not progress.finished
            and process is not None
            and process.poll() not in (None, 0)
        ):
            error = f"The preparation ended with exit code {process.returncode}. Its output is in {self.log}."
        return {**asdict(progress), "error": error, "running": self.running}


if __name__ == "__main__":
    with user_errors():
        work_through(os.environ[URL_VARIABLE], **json.loads(sys.argv[1]))
