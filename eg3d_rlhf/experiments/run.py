"""One run of a long job, of any kind, in its folder:

    run.lock                  while it lives
    training_options.json     its settings, the SHA-256 of the files that it starts from, versions, the launch
                              that began it
    stats.jsonl               what it measured; equal runs give equal bytes
    timing.jsonl              how long that took
    checkpoint-*.safetensors  the last two states to go on from

Rank 0 alone writes and prints; every method may be called on all ranks. `experiments.mode.Mode` makes and
ends runs.

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
_OURS = ("versions", "hashes", "processes", "launch")  # what a record holds besides the settings


class Run:
    """A run in `folder`; a with-statement that holds its lock.

    Args:
        folder: made by `claim`, or any that exists; settings: JSON-able, all that decides what the run does.
        inputs: files that it starts from, by name. ranks: this process among those of the run.
        say: prints the status lines. device, jobs: where it runs, and on how many processes. flags: what else
            the command line says.
        log: where lines go besides stats.jsonl, see logs.named.
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
        self.resumed: Path | None = None  # what it goes on from: its folder or a state in it; None: it is new
        self.began = time.time()
        self.last_checkpoint: Path | None = None
        self.lines = 0  # of stats.jsonl
        self._say = say or (lambda line: print(line, flush=True))
        self._lock = contextlib.ExitStack()
        self._request = StopRequest()
        self._log = Log(log if ranks.main else "", folder, self.settings)
        self._start = (0.0, time.monotonic())
        self._waited = 0.0

    def __enter__(self) -> "Run":
        self._lock.enter_context(run_lock(self.folder, enabled=self.ranks.main and self.folder.is_dir()))
        return self

    def __exit__(self, *exc: object) -> None:
        self._lock.close()
        self._log.close()

    # Beginning, and going on.

    def begin(self) -> None:
        """Record settings and inputs of a new run; what an attempt left that ended before its first state is
        deleted.
        """
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
        """Check that the run is the one that was begun here: the same bytes in its inputs, and the same
        settings.

        Args: free: settings that may have changed, by their own or their dotted name; None: all of them.
        Raises: ValueError naming what is another.
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
        old = _flat({k: v for k, v in before.items() if k not in _OURS})
        new = _flat(json.loads(json.dumps(self.settings)))
        # a setting that is gone was judged when it was read
        names = new.keys() if before and free is not None else ()
        # what one of these lacks, there was not yet when the run was begun
        groups = {name.rpartition(".")[0] for name in old} - {""}
        known = {name for name in names if name in old or name.rpartition(".")[0] not in groups}
        changed = sorted(
            n for n in known if old.get(n) != new.get(n) and not {n, n.split(".")[-1]} & set(free or ())
        )
        if changed:
            got = "; ".join(f"{name} {new.get(name)} instead of {old.get(name)}" for name in changed[:4])
            raise ValueError(
                f"run {self.folder}: expected the settings that it was begun with, got {got}. Use those, or"
                " another folder."
            )

    def hashes(self) -> dict[str, str]:
        """SHA-256 of the inputs."""
        return {name: file_hash(path) for name, path in self.inputs.items()}

    # What it tells.

    def stats(self, record: Mapping[str, Any]) -> None:
        if self.ranks.main:
            self._append(STATS, record)
            self._log.line(record)
            self.lines += 1

    def picture(self, name: str, path: Path, step: int) -> None:
        """Tell where lines go besides stats.jsonl of a picture that was written."""
        self._log.picture(name, path, step)

    def status(
        self,
        at: Mapping[str, object],
        done: float,
        total: float,
        unit: str,
        more: Mapping[str, object] | None = None,
    ) -> None:
        """Print a line with time, speed and time left, and note them in timing.jsonl.

        Args: at: where it is, first in the line; done, total: work in `unit`s; more: last in the line. Pad
            what should stand in columns.
        """
        if not self.ranks.main:
            return
        seconds = time.monotonic() - self._start[1]
        rate = seconds / (done - self._start[0]) if done > self._start[0] else 0.0
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
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
        """Count the time inside as waiting for data; the status then has its share of all time."""
        since = time.monotonic()
        try:
            yield
        finally:
            self._waited += time.monotonic() - since

    def go_on(self, done: float, lines: int | None = None) -> None:
        """Count time and work from here.

        Args: done: work so far; lines: of stats.jsonl that stay, where the run continues from a state.
        """
        self._start = (done, time.monotonic())
        self._waited = 0.0
        if lines is not None and self.ranks.main:
            storage.remove_temporaries(self.folder)
            if (self.folder / STATS).exists():
                kept = (self.folder / STATS).read_text(errors="replace").splitlines(keepends=True)[:lines]
                storage.write_atomic(self.folder / STATS, "".join(kept).encode())
                self._log.go_on(kept)
            self.lines = lines

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        with open(self.folder / name, "a") as file:
            file.write(json.dumps(record, sort_keys=True) + "\n")

    def write(self, name: str, record: Mapping[str, Any]) -> None:
        """A JSON file of the run, such as its result: whole or not at all."""
        if self.ranks.main:
            storage.write_atomic(
                self.folder / name, (json.dumps(record, indent=2, sort_keys=True) + "\n").encode()
            )

    def done(self) -> None:
        if self.ranks.main:
            print(f"Done in {tqdm.format_interval(time.time() - self.began)}: {self.folder}", flush=True)

    # States.

    def checkpoint(self, step: int, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> Path:
        """Write the state after `step` steps (images, updates); the last two are kept."""
        path = checkpoint.path_of(self.folder, step)
        if self.ranks.main:
            checkpoint.write(self.folder, step, dict(tensors), dict(meta))
        self.last_checkpoint = path
        return path

    def read(
        self, source: Path | None = None, previous: bool = False
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """The newest state, or that of a named checkpoint, on every rank.

        Args: previous: see training.checkpoint.read.
        """
        tensors, meta, path = (
            checkpoint.read(source or self.folder, previous) if self.ranks.main else (None, None, None)
        )
        meta, name = self.ranks.broadcast([meta, str(path)])
        self.last_checkpoint = Path(name)
        return self.ranks.broadcast_named(tensors), meta

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Say, where the folder cannot be written, what is safe."""
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
        """Name of the signal that asked this process to stop; None where none did. Ranks must agree on it
        among themselves.
        """
        return self._request.received

    def stoppable(self) -> StopRequest:
        """A with-statement inside which SIGTERM and SIGINT are noted in `stop_requested`."""
        return self._request


def recorded_by(folder: Path, mode: str) -> dict[str, Any]:
    """training_options.json of a run of a mode.

    Raises: FileNotFoundError; ValueError for another mode's run, naming that.
    """
    record = recorded(folder)
    if not record:
        raise FileNotFoundError(
            f"--resume: expected a run folder with {OPTIONS}, got {folder}. Check the path."
        )
    if (other := record.get("mode", "gan")) != mode:
        raise ValueError(
            f"--resume: expected a run of --mode={mode}, got one of --mode={other} in {folder}. Name its"
            " mode."
        )
    return record


def recorded(folder: Path) -> dict[str, Any]:
    """training_options.json of a run folder; {} where there is none.

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
    """outdir/NNNNN-name with the next free number."""
    taken = [int(m.group(1)) for p in outdir.glob("*") if (m := _NUMBERED.match(p.name))]
    return outdir / f"{max(taken, default=-1) + 1:05d}-{name}"


def claim(folder: Path, ranks: Ranks = SINGLE) -> Path:
    """Make a run folder; where another run has taken its number meanwhile, the next one. That of an earlier
    attempt of this launch stays.

    Raises: OSError naming the folder that cannot be made.
    """
    launch = launch_identity()
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
    """After a restart by torchrun, the newest run in `outdir` that this launch (see
    training.distributed.launch_identity) has begun.
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
    try:
        return recorded(folder).get("launch")
    except (OSError, ValueError):
        return None


def _flat(values: Mapping[str, Any], name: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{name}{key}.") if isinstance(value, dict) else {f"{name}{key}": value}
    return flat
