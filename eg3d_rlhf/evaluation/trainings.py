"""Run jobs of the project as cached, resumable subprocesses.

A part is one of our scripts with its flags. Its folder is an artefact of a store (experiments/store.py): the
inputs are the command and the hashes of the files that it reads, the record is what it cost. The folder holds
a log and what the script writes, too. A folder that was made by another command or from other files is
emptied first, so give trainings that shall stay side by side `keyed` ones. Folders of version 0.1, whose
record is part.json, are found as well.
"""

import contextlib
import functools
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.cli import file_hash
from eg3d_rlhf.evaluation.comparison import snapshots
from eg3d_rlhf.experiments import version_0_1
from eg3d_rlhf.experiments.pool import run_tasks
from eg3d_rlhf.experiments.process import sigterm_interrupts
from eg3d_rlhf.experiments.run import recorded
from eg3d_rlhf.experiments.store import DONE, INPUTS, Artefact, Store, json_hash
from eg3d_rlhf.rewards.settings import BUNDLED_LABELS
from training import checkpoint
from training.progress import tqdm

REPO = Path(__file__).resolve().parents[2]
TRAIN = "train.py"
TRAIN_REWARD = "tools/train_reward.py"
DOOR = "eg3d_rlhf"  # the package as a script: its first flags are a job's words
_JOBS = {TRAIN: ["train"], TRAIN_REWARD: ["reward", "train"]}
EARLIER = "part.json"  # the record that version 0.1 wrote
LOG = "log.txt"


@dataclass(frozen=True)
class Part:
    """One of our scripts with its flags. The newest run in the folder is what train.py made; a `needed` file
    in it proves it finished.
    """

    name: str  # in messages
    folder: Path
    script: str  # relative to the repository
    flags: tuple[str, ...]
    needed: str = ""  # file of a finished run of train.py; '': the snapshot at the run's own length

    @classmethod
    def keyed(cls, name: str, parent: Path, flags: Sequence[str], needed: str = "") -> "Part":
        """A training in a folder of its own for its flags and files: parent/name-<eight digits over them>."""
        part = cls(name, parent, TRAIN, tuple(flags), needed)
        digits = json_hash([version_0_1.words(TRAIN, part.flags), part.inputs()["inputs"]])[:8]
        return cls(name, parent / f"{name}-{digits}", TRAIN, part.flags, needed)

    def command(self) -> list[str]:
        """The script and its flags; what it writes goes into the folder."""
        return [self.script, *self.flags, *([f"--outdir={self.folder}"] if self.script == TRAIN else [])]

    def files(self) -> dict[str, str]:
        """Hashes of what it reads: what is bundled, and every file that a flag names, which parts before it
        may have made.
        """
        paths = {
            path.name: path for path in (bundled.GENERATOR, bundled.REWARD, bundled.WATCH, BUNDLED_LABELS)
        }
        paths |= {
            name: Path(value)
            for name, _, value in (flag.partition("=") for flag in self.flags)
            if value and name not in ("--data", "--out", "--run-dir")
        }
        return {name: _hash(path, path.stat().st_mtime_ns) for name, path in paths.items() if path.is_file()}

    def inputs(self) -> dict:
        """Return all that the folder's content depends on, in the words of version 0.1."""
        script, *flags = self.command()
        return {
            "command": [script, *version_0_1.words(script, flags)],
            "inputs": version_0_1.file_names(script, self.files()),
        }

    @property
    def store(self) -> Store:
        """The folder's parent; what version 0.1 left in the folder is entered into it."""
        earlier = self.folder / EARLIER
        if earlier.is_file() and not (self.folder / INPUTS).is_file():
            known = json.loads(earlier.read_text())
            inputs = {name: known.get(name) for name in ("command", "inputs")}
            if "seconds" in known and (self.script != TRAIN or self.complete()):
                cost = {name: known.get(name, 0.0) for name in ("seconds", "megabytes")}
                Store.finish(self.folder, inputs, self.products(), cost)
            else:
                Store.begin(self.folder, inputs)
        return Store(self.folder.parent, hashed=False, renew=True)

    def found(self) -> Artefact | None:
        """Find what was made with this command from these files, with its cost; None if it is unfinished."""
        return self.store.find(self.folder.name, self.inputs())

    def finished(self) -> bool:
        """Whether it is done, with this command and these files."""
        return self.found() is not None

    def products(self) -> list[Path]:
        """The files of a finished part that others read."""
        run = self.run
        if self.script != TRAIN or run is None:
            kept = (INPUTS, DONE, EARLIER, LOG)
            return [path for path in self.folder.iterdir() if path.is_file() and path.name not in kept]
        network = self.network()
        return [*([] if network is None else [network]), *([run / self.needed] if self.needed else [])]

    @property
    def run(self) -> Path | None:
        """The newest run of train.py in the folder."""
        return max((path for path in self.folder.glob("[0-9]*-*") if path.is_dir()), default=None)

    def complete(self) -> bool:
        """Whether the newest run of train.py has come to its end:
        one that is asked to stop ends well, too.
        """
        return (
            self.network() is not None
            if not self.needed
            else self.run is not None and (self.run / self.needed).is_file()
        )

    def network(self) -> Path | None:
        """The newest snapshot of the newest run of train.py, where that has reached its length."""
        run = self.run
        if run is None or not (found := snapshots(run)):
            return None
        length = round(1000 * recorded(run)["kimg"])
        return next((path for kimg, path in found[::-1] if round(1000 * kimg) >= length), None)

    def state(self) -> str:
        """'finished', 'begun' where there is a state to go on from, or 'new'."""
        return "finished" if self.finished() else "new" if self.continued() == self.command() else "begun"

    def continued(self) -> list[str]:
        """The command that goes on with what an interrupted one left; the same where there is nothing to go
        on with.
        """
        if self.store.begun(self.folder.name, self.inputs()):
            if self.script == TRAIN_REWARD and (self.folder / "state.pt").is_file():
                return [TRAIN_REWARD, f"--resume={self.folder}"]
            if self.script == TRAIN and (run := self.run) is not None and checkpoint.available(run):
                return [TRAIN, f"--resume={run}", "--resume-previous"]
        return self.command()


@functools.lru_cache(maxsize=256)
def _hash(path: Path, _modified: int) -> str:
    return file_hash(path)


def _words(command: Sequence[str]) -> list[str]:
    """What runs a script; an installed package has no scripts beside it, but the jobs that they are."""
    script = command[0]
    flags = command[1:]
    if script in _JOBS and not (REPO / script).is_file():
        script, flags = DOOR, [*_JOBS[script], *flags]
    return [sys.executable, str(REPO / script), *flags]


@dataclass
class _Children:
    """The processes of the parts that are under way."""

    quiet: bool  # whether their output goes to the log
    threads: int | None  # OMP_NUM_THREADS of each
    _running: set[int] = field(default_factory=set)
    _stopped: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def stop(self) -> None:
        """Ask all to end; a training writes a checkpoint first."""
        with self._lock:
            self._stopped = True
            for number in self._running:
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    os.kill(number, signal.SIGTERM)

    def run(self, part: Part) -> tuple[list[Path], dict[str, float]]:
        """Run a part, or what is left of it; returns its products and its cost.

        The peak memory is never below that of this program (0.4 GB), from which the script is forked.
        Raises: ValueError where it failed.
        """
        environment = {**os.environ, **({"OMP_NUM_THREADS": str(self.threads)} if self.threads else {})}
        started = time.time()
        with (part.folder / LOG).open("ab") as log, self._lock:
            if self._stopped:
                raise ValueError("was not begun, since the work was stopped.")
            output, errors = (log, subprocess.STDOUT) if self.quiet else (None, None)
            process = subprocess.Popen(
                _words(part.continued()), env=environment, stdout=output, stderr=errors
            )
            self._running.add(process.pid)
        _, status, usage = os.wait4(process.pid, 0)
        with self._lock:
            self._running.remove(process.pid)
        process.returncode = code = os.waitstatus_to_exitcode(status)
        if code or part.script == TRAIN and not part.complete():
            raise ValueError(
                f"expected it to finish, but it {self._how(part, code)}; the same command goes on from there."
            )
        unit = 1 << 20 if sys.platform == "darwin" else 1 << 10  # of ru_maxrss
        cost = {"seconds": time.time() - started, "megabytes": usage.ru_maxrss * unit / 1e6}
        return part.products(), cost

    def _how(self, part: Part, code: int) -> str:
        how = "was stopped" if code in (0, -signal.SIGTERM, -signal.SIGINT) else f"ended with status {code}"
        if not self.quiet:
            return f"{how}, its message stands above"
        log = part.folder / LOG
        last = (log.read_text(errors="replace").strip().splitlines() or ["nothing"])[-1]
        return f"{how}: {last} See {log}"


def make(
    chains: Collection[Sequence[Part]],
    jobs: int = 1,
    threads: int | None = None,
    quiet: bool = True,
    tell: Callable[[Part], None] = lambda part: None,
) -> None:
    """Make what is not finished: `jobs` chains side by side, the first listed first, the parts of a chain in
    order.

    An interrupt, or the failure of one part, asks the others to stop; trainings write a checkpoint first.
    Args: threads: OMP_NUM_THREADS of a child; quiet: whether output goes to log.txt; tell: called for each
        part when it is done.
    Raises: ValueError naming the part that failed, its last line and its log.
    """
    parts = {part.name: part for chain in chains for part in chain}
    needs = {
        part.name: [before.name for before in chain[:i][-1:]]
        for chain in chains
        for i, part in enumerate(chain)
    }
    children = _Children(quiet, threads)

    def work(name: str) -> None:
        part = parts[name]
        part.store.make(part.folder.name, part.inputs(), lambda _: children.run(part))

    with sigterm_interrupts():
        run_tasks(
            needs,
            lambda: work,
            (),
            jobs,
            Path(),
            on_done=lambda name, _: tell(parts[name]),
            stop=children.stop,
        )


def make_shown(
    chains: Collection[Sequence[Part]], jobs: int, threads: int, words: str, unit: str = "part"
) -> None:
    """`make` under a progress bar."""
    with tqdm(total=sum(map(len, chains)), desc=words, unit=unit, dynamic_ncols=True) as bar:

        def tell(part: Part) -> None:
            bar.set_postfix_str(f"last: {part.name}; logs in {part.folder.parent}/*/{LOG}")
            bar.update()

        if chains:
            make(chains, jobs, threads, tell=tell)


def _announce(title: str, command: Sequence[str]) -> None:
    print(f"\n== {title}: {shlex.join(['python', *command])}", file=sys.stderr, flush=True)


def make_in_terminal(title: str, part: Part) -> None:
    """Make one part, if it is not finished, with its output in the terminal."""
    if not part.finished():
        _announce(title, part.continued())
        make([[part]], quiet=False)


def call(name: str, command: list[str]) -> float:
    """Run one of our scripts in the terminal; returns its seconds. Raises: ValueError where it failed."""
    _announce(name, command)
    started = time.time()
    code = subprocess.call(_words(command))
    if code:
        raise ValueError(
            f"{name}: expected status 0, got {code}. Its message stands above; the same command goes on."
        )
    return time.time() - started
