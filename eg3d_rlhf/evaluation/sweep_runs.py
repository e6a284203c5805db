"""The training runs of a sweep: one cell for each pair of weights and seed, each a real run of train.py, resumable."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

from eg3d_rlhf.evaluation.comparison import snapshots
from training import checkpoint

LOG = "train.log"


@dataclass(frozen=True, kw_only=True, order=True)
class Cell:
    """One run of the grid."""

    lambda_r: float  # reward weight, >= 0
    lambda_sigma: float  # density consistency weight, >= 0; 0 is the run without that term
    seed: int

    @property
    def setting(self) -> str:
        """The weights, as reports name them."""
        return "control (λ_r = 0)" if self.lambda_r == 0 else f"λ_r = {self.lambda_r:g}, λ_σ = {self.lambda_sigma:g}"

    @property
    def name(self) -> str:
        """The cell as part of a file name."""
        return f"r{self.lambda_r:g}-sigma{self.lambda_sigma:g}-s{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Training:
    """What all cells share, and where they lie."""

    folder: Path  # holds one folder for each cell
    script: Path  # train.py
    kimg: float  # length of a cell
    flags: Sequence[str] = ()  # further flags of train.py
    hashes: dict = field(default_factory=dict)  # SHA-256 of the files behind the flags: other files are other cells
    workers: int = 1  # cells trained at the same time

    def home(self, cell: Cell) -> Path:
        """Folder of a cell: its name, and eight digits over all that shapes its run."""
        text = json.dumps({"kimg": self.kimg, "flags": list(self.flags), "hashes": self.hashes}, sort_keys=True)
        return self.folder / f"{cell.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def grid(lambda_r: Sequence[float], lambda_sigma: Sequence[float], seeds: Sequence[int]) -> list[Cell]:
    """Every combination, the cells of a seed together; λ_r = 0 once for each seed, since such a run has no reward phase.

    Raises: ValueError for a negative weight or an empty list.
    """
    for flag, values in (("--lambda-r", lambda_r), ("--lambda-sigma", lambda_sigma), ("--seeds", seeds)):
        if not values or min(values) < 0:
            raise ValueError(f"{flag}: expected one or more values >= 0, got {list(values)}. Write them with commas: 0,1,10.")
    cells = [Cell(lambda_r=r, lambda_sigma=s if r else 0.0, seed=seed) for seed in seeds for r in lambda_r for s in lambda_sigma]
    return list(dict.fromkeys(cells))


def finished(t: Training, cell: Cell) -> Path | None:
    """The network of a cell whose run has reached its length."""
    for run in _runs(t, cell):
        for kimg, path in snapshots(run)[::-1]:
            if round(kimg * 1000) >= round(t.kimg * 1000):
                return path
    return None


def begun(t: Training, cell: Cell) -> Path | None:
    """The newest run of a cell that can be continued."""
    return next((run for run in _runs(t, cell) if checkpoint.available(run)), None)


def _runs(t: Training, cell: Cell) -> list[Path]:
    return sorted((path for path in t.home(cell).glob("[0-9]*-*") if path.is_dir()), reverse=True)


def command(t: Training, cell: Cell) -> list[str]:
    """The command line that trains a cell, or goes on where it was interrupted."""
    start = [sys.executable, str(t.script)]
    run = begun(t, cell)
    if run is not None:
        return [*start, f"--resume={run}", "--resume-previous"]
    weights = [f"--lambda-r={cell.lambda_r:g}", f"--lambda-sigma={cell.lambda_sigma:g}", f"--seed={cell.seed}", f"--kimg={t.kimg:g}"]
    return [*start, "--reward=sigma", *weights, "--no-summary", f"--outdir={t.home(cell)}", *t.flags]


def train_all(cells: Sequence[Cell], t: Training, tell: Callable[[Cell], None] = lambda cell: None) -> dict[Cell, Path]:
    """Train what is not finished; returns every cell's network.

    An interrupt, or the failure of one cell, asks the others to stop; they write a checkpoint first.
    Args: tell: called for each cell when it is done.
    Raises: ValueError naming the cell that failed, its last line and its log.
    """
    group = _Group()
    with ThreadPoolExecutor(t.workers) as pool:
        waiting = {pool.submit(_train, cell, t, group): cell for cell in cells}
        try:
            for done in as_completed(waiting):
                done.result()
                tell(waiting[done])
        except BaseException:
            for future in waiting:
                future.cancel()
            group.stop()
            raise
    return {cell: path for cell in cells if (path := finished(t, cell)) is not None}


class _Group:
    """Running trainings, to be stopped together."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen] = set()
        self._lock, self._stopped = threading.Lock(), False

    def run(self, command: list[str], log: Path, threads: int) -> int | None:
        """Run to the end; returns the exit status, None where the group was stopped before."""
        with log.open("ab") as out:
            with self._lock:
                if self._stopped:
                    return None
                process = subprocess.Popen(
                    command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": str(threads)}
                )
                self._running.add(process)
            try:
                return process.wait()
            finally:
                with self._lock:
                    self._running.discard(process)

    def stop(self) -> None:
        """Ask every run to write a checkpoint and end."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.send_signal(signal.SIGTERM)


def _train(cell: Cell, t: Training, group: _Group) -> None:
    if finished(t, cell) is not None:
        return
    log = t.home(cell) / LOG
    log.parent.mkdir(parents=True, exist_ok=True)
    given = os.environ.get("OMP_NUM_THREADS")
    threads = int(given) if given else max(1, (os.cpu_count() or 1) // t.workers)
    status = group.run(command(t, cell), log, threads)
    if finished(t, cell) is None:
        lines = log.read_text(errors="replace").strip().splitlines()
        last = lines[-1] if lines else "nothing"
        how = "was stopped" if status in (0, None, -signal.SIGTERM, -signal.SIGINT) else f"ended with status {status}"
        raise ValueError(f"cell {cell.name}: expected a finished run, but it {how}: {last} See {log}; the same command goes on from there.")
