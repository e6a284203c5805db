"""One run of a long job of any kind, in its folder:

    run.lock                  exists while the run's process lives
    training_options.json     settings, SHA-256 of the files that the run starts from, versions, and the
                              launch that began it
    stats.jsonl               measurements; equal runs give equal bytes
    timing.jsonl              time and memory, which differ between equal runs
    checkpoint-*.safetensors  the last two states from which the run can resume

Only rank 0 writes and prints; every method may be called on all ranks. `experiments.mode.Mode` makes and ends
runs.

    with Run(claim(next_free(outdir, "toy"), ranks), settings, {"init": path}, ranks=ranks) as run:
        run.begin()  # or run.resume(), and run.read() for the state
        with run.stoppable():
            while step < steps and not run.stop_requested:
                ...
                run.stats({"step": step, "loss": loss})
                run.status({"step": step}, step, steps, "step")
                run.checkpoint(step, tensors, meta)
"""

import contextlib
import json
import re
import resource
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from eg3d_rlhf.core.cli import file_hash, versions
from eg3d_rlhf.experiments import version_0_1
from eg3d_rlhf.experiments.logs import Log
from eg3d_rlhf.experiments.process import StopRequest, run_lock
from training import checkpoint, storage
from training.distributed import SINGLE, Ranks, launch_identity
from training.progress import tqdm

OPTIONS = "training_options.json"
STATS = "stats.jsonl"
TIMING = "timing.jsonl"
_NUMBERED = re.compile(r"(\d{5})-(.*)")
_OURS = ("versions", "hashes", "processes", "launch")  # fields of the record that are no settings


class Run:
    """A run in `folder`; a context manager that holds the folder's lock.

    Args:
        folder: made by `claim`, or any existing one.
        settings: JSON types; everything that determines the results of the run.
        inputs: files that the run starts from, by name; ranks: this process and the others of the run.
        say: prints the status lines; device: to run on; jobs: number of processes; flags: of the command
            line.
        log: further logging of the lines, see logs.named.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        inputs: Mapping[str, str | Path] | None = None,
        *,
        ranks: Ranks = SINGLE,
        say: Callable[[str], object] | None = None,
        device: str = "cpu",
        jobs: int = 1,
        flags: Mapping[str, Any] | None = None,
        log: str = "",
    ):
        self.folder = folder
        self.settings = dict(settings)
        self.inputs = dict(inputs or {})
        self.ranks = ranks
        self.device = device
        self.jobs = jobs
        self.flags = flags or {}
        self.resumed: Path | None = None  # folder or state from which the run resumes; None: a new run
        self.began = time.time()
        self.last_checkpoint: Path | None = None
        self.lines = 0  # number of lines of stats.jsonl
        self._say = say or (lambda line: print(line, flush=True))
        self._lock = contextlib.ExitStack()
        self._request = StopRequest()
        self._log = Log(log if ranks.main else "", folder, self.settings)
        self._start = (0.0, time.monotonic())  # (work done before, time) from which speed is measured
        self._waited = 0.0  # seconds

    def __enter__(self) -> "Run":
        self._lock.enter_context(run_lock(self.folder, enabled=self.ranks.main and self.folder.is_dir()))
        return self

    def __exit__(self, *exc: object) -> None:
        self._lock.close()
        self._log.close()

    # Beginning and resuming.

    def begin(self) -> None:
        """Record the settings and inputs of a new run.

        Measurements of an earlier attempt, which ended before its first state, are deleted.
        """
        # every other rank returns at once: one process alone writes into the folder
        if self.ranks.main:
            for name in (STATS, TIMING):
                (self.folder / name).unlink(missing_ok=True)
            known = {
                "versions": versions(),
                "hashes": self.hashes(),
                "processes": self.ranks.world,
                "launch": launch_identity(),
            }
            self.write(OPTIONS, {**self.settings, **known})

    def resume(self, free: Collection[str] | None = ()) -> None:
        """Check that inputs and settings are those with which the run was begun.

        Args: free: settings that may have changed, by their last or their dotted name; None: all of them.
        Raises: ValueError naming what has changed.
        """
        before = recorded(self.folder) if self.ranks.main else {}
        for name, expected in before.get("hashes", {}).items():
            path = Path(self.inputs.get(name, ""))
            got = file_hash(path) if path.is_file() else "nothing"
            if name in self.inputs and got != expected:
                raise ValueError(
                    f"--resume: {name} {path}: expected the bytes that the run was begun with"
                    f" ({expected[:12]}...), got others ({got[:12]}...). Restore the file, or start a new"
                    " run."
                )
        # through JSON, so that tuples and lists compare equal to what was read
        old = _flat({k: v for k, v in before.items() if k not in _OURS})
        new = _flat(json.loads(json.dumps(self.settings)))
        # only current settings: `version_0_1.options` and `from_dict` check removed ones when they read them
        names = new.keys() if before and free is not None else ()
        # a setting that a recorded group lacks was added by a newer version, and is not compared
        groups = {name.rpartition(".")[0] for name in old} - {""}
        known = {name for name in names if name in old or name.rpartition(".")[0] not in groups}
        changed = sorted(
            n for n in known if old.get(n) != new.get(n) and not {n, n.split(".")[-1]} & set(free or ())
        )
        if changed:
            # at most four settings, so that the message stays one readable line
            got = "; ".join(f"{name} {new.get(name)} instead of {old.get(name)}" for name in changed[:4])
            raise ValueError(
                f"run {self.folder}: expected the settings that it was begun with, got {got}. Use the earlier"
                " settings, or start a new run."
            )

    def hashes(self) -> dict[str, str]:
        """Hash the inputs with SHA-256, by name."""
        return {name: file_hash(path) for name, path in self.inputs.items()}

    # Measurements and progress.

    def stats(self, record: Mapping[str, Any]) -> None:
        """Append a line of measurements to stats.jsonl, and log it."""
        if self.ranks.main:
            self._append(STATS, record)
            self._log.line(record)
            self.lines += 1

    def picture(self, name: str, path: Path, step: int) -> None:
        """Log an image file that was written."""
        self._log.image(name, path, step)

    def status(
        self,
        at: Mapping[str, object],
        done: float,
        total: float,
        unit: str,
        more: Mapping[str, object] | None = None,
    ) -> None:
        """Print a line with time, speed and time left, and append them to timing.jsonl.

        Args: at: position, first in the line; done, total: work in `unit`s; more: last in the line. Pad
            values that should stand in columns.
        """
        if not self.ranks.main:
            return
        seconds = time.monotonic() - self._start[1]
        # seconds per unit since the start or the resume, not over the whole run
        rate = seconds / (done - self._start[0]) if done > self._start[0] else 0.0
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB (Linux) to GiB
        waited = {"waited": self._waited / seconds} if self._waited else {}
        more = {**{name: f"{share:.1%}" for name, share in waited.items()}, **(more or {})}
        fields = {
            **at,
            "time": f"{tqdm.format_interval(seconds):<9s}",
            f"sec/{unit}": f"{rate:<7.4g}",
            "eta": f"{tqdm.format_interval(rate * max(total - done, 0)):<9s}",
            "mem_gb": f"{memory:<5.2f}",
            **more,
        }
        self._say(" ".join(f"{name} {value}" for name, value in fields.items()))
        self._append(
            TIMING, {unit: done, "seconds": seconds, f"sec_per_{unit}": rate, "mem_gb": memory, **waited}
        )

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for data; the status shows its share of all time."""
        since = time.monotonic()
        try:
            yield
        finally:
            self._waited += time.monotonic() - since

    def go_on(self, done: float, lines: int | None = None) -> None:
        """Start counting time and work here.

        Args: done: work so far; lines: number of lines of stats.jsonl to keep, where the run resumes a state.
        """
        self._start = (done, time.monotonic())
        self._waited = 0.0
        if lines is not None and self.ranks.main:
            # lines after the state will be written again, with the same bytes
            storage.remove_temporaries(self.folder)
            if (self.folder / STATS).exists():
                kept = (self.folder / STATS).read_text(errors="replace").splitlines(keepends=True)[:lines]
                storage.write_atomic(self.folder / STATS, "".join(kept).encode())
                self._log.resume(kept)
            self.lines = lines

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        """Append a line of JSON, with sorted keys, so that equal records give equal bytes."""
        with open(self.folder / name, "a") as file:
            file.write(json.dumps(record, sort_keys=True) + "\n")

    def write(self, name: str, record: Mapping[str, Any]) -> None:
        """Write a JSON file of the run, such as its result, atomically."""
        if self.ranks.main:
            storage.write_atomic(
                self.folder / name, (json.dumps(record, indent=2, sort_keys=True) + "\n").encode()
            )

    def done(self) -> None:
        """Print the total time and the folder."""
        if self.ranks.main:
            print(f"Done in {tqdm.format_interval(time.time() - self.began)}: {self.folder}", flush=True)

    # States.

    def checkpoint(self, step: int, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> Path:
        """Write the state after `step` steps (images or updates); the last two states are kept."""
        # the path is known on every rank, for messages; rank 0 writes
        path = checkpoint.path_of(self.folder, step)
        if self.ranks.main:
            checkpoint.write(self.folder, step, dict(tensors), dict(meta))
        self.last_checkpoint = path
        return path

    def read(
        self, source: Path | None = None, previous: bool = False
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Read the newest state, or that of a named checkpoint, and return it on every rank.

        Args: previous: see training.checkpoint.read.
        """
        # rank 0 reads, the others receive: they may run on other machines
        tensors, meta, path = (
            checkpoint.read(source or self.folder, previous) if self.ranks.main else (None, None, None)
        )
        meta, name = self.ranks.broadcast([meta, str(path)])
        self.last_checkpoint = Path(name)
        return self.ranks.broadcast_named(tensors), meta

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Add the last good checkpoint to the error of a folder that cannot be written."""
        try:
            yield
        except OSError as error:
            good = f"Last good checkpoint: {self.last_checkpoint or 'none was written yet'}"
            cause = str(error).rstrip(".")
            raise OSError(
                f"run folder {self.folder}: expected to write into it, got: {cause}. {good}; continue with"
                " --resume."
            ) from error

    # Signals.

    @property
    def stop_requested(self) -> str | None:
        """Return the name of the signal that asked this process to stop, or None.

        Signals may reach only some ranks, so ranks must agree on stopping among themselves.
        """
        return self._request.received

    def stoppable(self) -> StopRequest:
        """Return a context manager inside which SIGTERM and SIGINT only set `stop_requested`."""
        return self._request


def recorded_by(folder: Path, mode: str) -> dict[str, Any]:
    """Read training_options.json of a run of a mode.

    Raises: FileNotFoundError; ValueError for a run of another mode, naming that mode.
    """
    record = recorded(folder)
    if not record:
        raise FileNotFoundError(
            f"--resume: expected a run folder with {OPTIONS}, got {folder}. Check the path."
        )
    if (other := record.get("mode", "gan")) != mode:
        raise ValueError(
            f"--resume: expected a run of --mode={mode}, got a run of --mode={other} in {folder}. Pass"
            f" --mode={other}."
        )
    return record


def recorded(folder: Path) -> dict[str, Any]:
    """Read training_options.json of a run folder, with the names of this version; {} where there is none.

    Raises: ValueError where it is damaged.
    """
    path = folder / OPTIONS
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got: {error}. Restore the file.") from error
    return version_0_1.options(values) if isinstance(values, dict) else {}


def next_free(outdir: Path, name: str) -> Path:
    """Return outdir/NNNNN-name with the next free number."""
    taken = [int(m.group(1)) for p in outdir.glob("*") if (m := _NUMBERED.match(p.name))]
    return outdir / f"{max(taken, default=-1) + 1:05d}-{name}"


def claim(folder: Path, ranks: Ranks = SINGLE) -> Path:
    """Make a run folder, and return it.

    If another run has taken its number in the meantime, the next free number is used. The folder of an
    earlier attempt of this launch is used again.
    Raises: OSError naming the folder that cannot be made.
    """
    launch = launch_identity()
    # mkdir is atomic: of two processes that choose one number, one gets FileExistsError and tries the next
    while ranks.main:
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            numbered = _NUMBERED.fullmatch(folder.name)
            if numbered is None or launch is not None and _launch_of(folder) == launch:
                break
            folder = next_free(folder.parent, numbered.group(2))
        except OSError as error:
            reason = error.strerror or error
            raise OSError(
                f"--outdir: expected to make {folder}, got: {reason}. Choose a folder that can be written."
            ) from error
    return Path(ranks.broadcast(str(folder)))


def begun_by_this_launch(outdir: Path, ranks: Ranks = SINGLE) -> Path | None:
    """Return the newest run in `outdir` that this launch has begun, after a restart by torchrun; else None.

    The launch is identified by training.distributed.launch_identity.
    """
    if not ranks.restarts:
        return None
    launch = launch_identity()
    begun = ""
    if ranks.main and launch is not None:
        numbered = (p for p in sorted(outdir.glob("*"), reverse=True) if _NUMBERED.fullmatch(p.name))
        begun = next((str(p) for p in numbered if _launch_of(p) == launch), "")
    begun = ranks.broadcast(begun)
    return Path(begun) if begun else None


def _launch_of(folder: Path) -> str | None:
    """Read the launch that began a run; None for a folder without a readable record."""
    try:
        return recorded(folder).get("launch")
    except (OSError, ValueError):
        return None


def _flat(values: Mapping[str, Any], name: str = "") -> dict[str, object]:
    """Flatten nested settings to dotted names."""
    flat: dict[str, object] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{name}{key}.") if isinstance(value, dict) else {f"{name}{key}": value}
    return flat
