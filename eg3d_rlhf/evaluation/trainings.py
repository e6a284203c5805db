"""Run jobs of the project as cached, resumable subprocesses.

A part is a script of this project with its flags. Its folder is an artefact of a store
(experiments/store.py): the inputs are the command and the hashes of the files that it reads, and the record
is its cost in seconds and memory. The folder also holds a log and what the script writes. A folder that was
made by another command or from other files is emptied first, so trainings that must be kept side by side need
`Part.keyed`. Folders of version 0.1, whose record is part.json, are recognised as well.
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
DOOR = "eg3d_rlhf"  # the package as a script: its first arguments name a job
_JOBS = {TRAIN: ["train"], TRAIN_REWARD: ["reward", "train"]}  # the job that each script runs
EARLIER = "part.json"  # the record that version 0.1 wrote
LOG = "log.txt"


@dataclass(frozen=True)
class Part:
    """A script of this project with its flags, and the folder that holds its results.

    If the script is train.py, its result is the newest run in the folder; the `needed` file in that run
    exists only if the run has finished.
    """

    name: str  # for messages
    folder: Path
    script: str  # relative to the repository
    flags: tuple[str, ...]
    needed: str = ""  # file that a finished run of train.py has; '': the snapshot at the run's full length

    @classmethod
    def keyed(cls, name: str, parent: Path, flags: Sequence[str], needed: str = "") -> "Part":
        """Make a training whose folder is parent/name-<eight hex digits>, a hash of its flags and files."""
        # the hash uses the flags' names of version 0.1, so that folders from then keep their names
        part = cls(name, parent, TRAIN, tuple(flags), needed)
        digits = json_hash([version_0_1.words(TRAIN, part.flags), part.inputs()["inputs"]])[:8]
        return cls(name, parent / f"{name}-{digits}", TRAIN, part.flags, needed)

    def command(self) -> list[str]:
        """Return the script and its flags; train.py gets the folder as --outdir."""
        return [self.script, *self.flags, *([f"--outdir={self.folder}"] if self.script == TRAIN else [])]

    def files(self) -> dict[str, str]:
        """Return the hashes of the files that the script reads, by flag or name.

        These are the bundled files and every file that a flag names. An earlier part may have made it, so the
        hashes are computed when they are needed.
        """
        paths = {
            path.name: path for path in (bundled.GENERATOR, bundled.REWARD, bundled.WATCH, BUNDLED_LABELS)
        }
        paths |= {
            name: Path(value)
            for name, _, value in (flag.partition("=") for flag in self.flags)
            if value and name not in ("--data", "--out", "--run-dir")
        }
        # the time of modification is part of the cache's key: a file that was rewritten is hashed again
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
        """Return the store of the folder's parent, after it has taken over a record of version 0.1."""
        earlier = self.folder / EARLIER
        if earlier.is_file() and not (self.folder / INPUTS).is_file():
            known = json.loads(earlier.read_text())
            inputs = {name: known.get(name) for name in ("command", "inputs")}
            # a record without seconds belongs to a part that was interrupted
            if "seconds" in known and (self.script != TRAIN or self.complete()):
                cost = {name: known.get(name, 0.0) for name in ("seconds", "megabytes")}
                Store.finish(self.folder, inputs, self.products(), cost)
            else:
                Store.begin(self.folder, inputs)
        return Store(self.folder.parent, hashed=False, renew=True)

    def artefact(self) -> Artefact | None:
        """Return the artefact of this command and these files, with its cost; None if it is unfinished."""
        return self.store.find(self.folder.name, self.inputs())

    def finished(self) -> bool:
        """Return True if this command has finished with these files."""
        return self.artefact() is not None

    def products(self) -> list[Path]:
        """List the files of a finished part that other parts read."""
        run = self.run
        if self.script != TRAIN or run is None:
            # the store's own records and the log are no results
            kept = (INPUTS, DONE, EARLIER, LOG)
            return [path for path in self.folder.iterdir() if path.is_file() and path.name not in kept]
        network = self.network()
        return [*([] if network is None else [network]), *([run / self.needed] if self.needed else [])]

    @property
    def run(self) -> Path | None:
        """Return the newest run of train.py in the folder, None if there is none."""
        # names of runs begin with a number that grows
        return max((path for path in self.folder.glob("[0-9]*-*") if path.is_dir()), default=None)

    def complete(self) -> bool:
        """Return True if the newest run of train.py has reached its end.

        The exit status is not enough: a run that was asked to stop also exits with status 0.
        """
        return (
            self.network() is not None
            if not self.needed
            else self.run is not None and (self.run / self.needed).is_file()
        )

    def network(self) -> Path | None:
        """Return the newest snapshot of the newest run of train.py; None if the run is not finished."""
        run = self.run
        if run is None or not (kept := snapshots(run)):
            return None
        # compared in whole images, since kimg are floats
        length = round(1000 * recorded(run)["kimg"])
        return next((path for kimg, path in kept[::-1] if round(1000 * kimg) >= length), None)

    def state(self) -> str:
        """Return 'finished', 'begun' if there is a state from which the part can resume, or 'new'."""
        return "finished" if self.finished() else "new" if self.continued() == self.command() else "begun"

    def continued(self) -> list[str]:
        """Return the command that resumes an interrupted part, or `command()` if nothing can be resumed."""
        # a state in the folder is used only if it was made by this command from these files
        if self.store.begun(self.folder.name, self.inputs()):
            if self.script == TRAIN_REWARD and (self.folder / "state.pt").is_file():
                return [TRAIN_REWARD, f"--resume={self.folder}"]
            if self.script == TRAIN and (run := self.run) is not None and checkpoint.available(run):
                return [TRAIN, f"--resume={run}", "--resume-previous"]
        return self.command()


@functools.lru_cache(maxsize=256)
def _hash(path: Path, _modified: int) -> str:
    # every part reads the bundled generator and reward, which are hashed once for all of them
    return file_hash(path)


def _words(command: Sequence[str]) -> list[str]:
    """Return the arguments that run a script in this Python."""
    script = command[0]
    flags = command[1:]
    # an installed package has no scripts beside it, so the equal job of the package runs instead
    if script in _JOBS and not (REPO / script).is_file():
        script, flags = DOOR, [*_JOBS[script], *flags]
    return [sys.executable, str(REPO / script), *flags]


@dataclass
class _Children:
    """The running child processes."""

    quiet: bool  # True: their output goes to the log; False: to the terminal
    threads: int | None  # OMP_NUM_THREADS of each; None: inherited
    _running: set[int] = field(default_factory=set)
    _stopped: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def stop(self) -> None:
        """Send SIGTERM to all children; a training writes a checkpoint before it ends."""
        with self._lock:
            self._stopped = True
            for number in self._running:
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    os.kill(number, signal.SIGTERM)

    def run(self, part: Part) -> tuple[list[Path], dict[str, float]]:
        """Run or resume a part; return its products and its cost.

        The peak memory is at least that of this program (0.4 GB), from which the script is forked.
        Raises: ValueError if it failed or was stopped.
        """
        environment = {**os.environ, **({"OMP_NUM_THREADS": str(self.threads)} if self.threads else {})}
        started = time.time()
        # the lock covers the start, so that `stop` misses no child; the log is appended to when resuming
        with (part.folder / LOG).open("ab") as log, self._lock:
            if self._stopped:
                raise ValueError("was not started, since the work was stopped. Run the same command again.")
            output, errors = (log, subprocess.STDOUT) if self.quiet else (None, None)
            process = subprocess.Popen(
                _words(part.continued()), env=environment, stdout=output, stderr=errors
            )
            self._running.add(process.pid)
        # wait4 instead of process.wait(): it also returns this child's peak memory
        _, status, usage = os.wait4(process.pid, 0)
        with self._lock:
            self._running.remove(process.pid)
        # Popen must learn that its child was collected, or it would wait for it again
        process.returncode = code = os.waitstatus_to_exitcode(status)
        if code or part.script == TRAIN and not part.complete():
            raise ValueError(
                f"expected it to finish, but it {self._how(part, code)}."
                " Run the same command again to resume."
            )
        # ru_maxrss: the factor turns the platform's unit into bytes
        unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
        cost = {"seconds": time.time() - started, "megabytes": usage.ru_maxrss * unit / 1e6}
        return part.products(), cost

    def _how(self, part: Part, code: int) -> str:
        """Describe how a child failed: its status, and its last line of output."""
        # a training that was asked to stop exits with 0 after its checkpoint
        how = "was stopped" if code in (0, -signal.SIGTERM, -signal.SIGINT) else f"ended with status {code}"
        if not self.quiet:
            return f"{how} with the message above"
        log = part.folder / LOG
        last = (log.read_text(errors="replace").strip().splitlines() or ["nothing"])[-1]
        return f"{how}: {last} See {log}"


def make(
    chains: Collection[Sequence[Part]],
    jobs: int = 1,
    threads: int | None = None,
    quiet: bool = True,
    on_done: Callable[[Part], None] = lambda part: None,
) -> None:
    """Make the parts that are not finished.

    Up to `jobs` chains run at the same time, in the order of the list; the parts of a chain run one after
    another. An interrupt, or the failure of one part, stops the others; trainings write a checkpoint first.
    Args: threads: OMP_NUM_THREADS of a child; quiet: send output to log.txt, not to the terminal; on_done:
        called for each part when it is finished.
    Raises: ValueError naming the part that failed, its last line and its log.
    """
    parts = {part.name: part for chain in chains for part in chain}
    # each part needs the one before it in its chain; the slice is empty for the first
    needs = {
        part.name: [before.name for before in chain[:i][-1:]]
        for chain in chains
        for i, part in enumerate(chain)
    }
    children = _Children(quiet, threads)

    def work(name: str) -> None:
        part = parts[name]
        part.store.make(part.folder.name, part.inputs(), lambda _: children.run(part))

    # SIGTERM stops the children as Ctrl-C does
    with sigterm_interrupts():
        run_tasks(
            needs,
            lambda: work,
            (),
            jobs,
            Path(),
            on_done=lambda name, _: on_done(parts[name]),
            stop=children.stop,
        )


def make_shown(
    chains: Collection[Sequence[Part]], jobs: int, threads: int, words: str, unit: str = "part"
) -> None:
    """Call `make` and show a progress bar. Args: words: text of the bar; unit: of its count."""
    with tqdm(total=sum(map(len, chains)), desc=words, unit=unit, dynamic_ncols=True) as bar:

        def advance(part: Part) -> None:
            bar.set_postfix_str(f"last: {part.name}; logs in {part.folder.parent}/*/{LOG}")
            bar.update()

        if chains:
            make(chains, jobs, threads, on_done=advance)


def _announce(title: str, command: Sequence[str]) -> None:
    print(f"\n== {title}: {shlex.join(['python', *command])}", file=sys.stderr, flush=True)


def make_in_terminal(title: str, part: Part) -> None:
    """Make a part that is not finished, and show its output in the terminal."""
    if not part.finished():
        _announce(title, part.continued())
        make([[part]], quiet=False)


def call(name: str, command: list[str]) -> float:
    """Run a script of this project in the terminal; return its seconds.

    Raises: ValueError if it failed.
    """
    _announce(name, command)
    started = time.time()
    code = subprocess.call(_words(command))
    if code:
        raise ValueError(
            f"{name}: expected exit status 0, got {code}. See its message above, and run the same command"
            " again to resume."
        )
    return time.time() - started
