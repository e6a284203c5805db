"""Our scripts as parts of a longer job, each in a child: done once for its command and the files that it
reads, gone on with after a stop.

A part's folder holds part.json, which says what is made there and, once it is done, what that cost; a log;
and what the script writes. A folder that was made by another command or from other files is emptied first, so
give trainings that shall stay side by side `keyed` ones.
"""

import functools
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.cli import file_hash
from eg3d_rlhf.evaluation.comparison import snapshots
from eg3d_rlhf.experiments.process import sigterm_interrupts
from eg3d_rlhf.experiments.run import recorded
from eg3d_rlhf.rewards.training_run import BUNDLED_LABELS
from training import checkpoint
from training.storage import write_atomic

REPO = Path(__file__).resolve().parents[2]
TRAIN = "train.py"
TRAIN_REWARD = "tools/train_reward.py"
DOOR = "eg3d_rlhf"  # the package as a script: its first flags are a job's words
_JOBS = {TRAIN: ["train"], TRAIN_REWARD: ["reward", "train"]}
RECORD = "part.json"
LOG = "log.txt"
POLL = 0.05  # seconds between looks at the children


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
        digest = hashlib.sha256(json.dumps([part.flags, part.inputs()], sort_keys=True).encode()).hexdigest()
        return cls(name, parent / f"{name}-{digest[:8]}", TRAIN, part.flags, needed)

    def command(self) -> list[str]:
        """The script and its flags; what it writes goes into the folder."""
        return [self.script, *self.flags, *([f"--outdir={self.folder}"] if self.script == TRAIN else [])]

    def inputs(self) -> dict[str, str]:
        """Hashes of what it reads: what is bundled, and every file that a flag names, which parts before it
        may have made.
        """
        files = {
            path.name: path for path in (bundled.GENERATOR, bundled.REWARD, bundled.WATCH, BUNDLED_LABELS)
        }
        files |= {
            name: Path(value)
            for name, _, value in (flag.partition("=") for flag in self.flags)
            if value and name not in ("--data", "--out")
        }
        return {name: _hash(path, path.stat().st_mtime_ns) for name, path in files.items() if path.is_file()}

    def record(self) -> dict:
        """What is made here with this command from these files, and its cost where it is done; {} where it is
        not, or another is.
        """
        path = self.folder / RECORD
        known = json.loads(path.read_text()) if path.is_file() else {}
        return (
            known if known.get("command") == self.command() and known.get("inputs") == self.inputs() else {}
        )

    @property
    def run(self) -> Path | None:
        """The newest run of train.py in the folder."""
        return max((path for path in self.folder.glob("[0-9]*-*") if path.is_dir()), default=None)

    def finished(self) -> bool:
        """Whether it is done, with this command and these files."""
        return "seconds" in self.record() and (self.script != TRAIN or self.complete())

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
        length = 0 if run is None else round(1000 * recorded(run)["kimg"])
        return next((path for kimg, path in snapshots(run)[::-1] if round(1000 * kimg) >= length), None)

    def state(self) -> str:
        """'finished', 'begun' where there is a state to go on from, or 'new'."""
        return "finished" if self.finished() else "new" if self.continued() == self.command() else "begun"

    def continued(self) -> list[str]:
        """The command that goes on with what an interrupted one left; the same where there is nothing to go
        on with.
        """
        if self.record():
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
class _Child:
    """A script under way."""

    part: Part
    quiet: bool  # whether its output goes to the log
    threads: int | None

    def __post_init__(self) -> None:
        part = self.part
        command = self.part.continued()
        known = {"command": part.command(), "inputs": part.inputs()}
        if (part.folder / RECORD).is_file() and not part.record():
            shutil.rmtree(part.folder)  # another part's
        part.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(part.folder / RECORD, json.dumps(known, indent=1).encode())
        self.known = known
        self.started = time.time()
        environment = {**os.environ, **({"OMP_NUM_THREADS": str(self.threads)} if self.threads else {})}
        with (part.folder / LOG).open("ab") as log:
            output, errors = (log, subprocess.STDOUT) if self.quiet else (None, None)
            self.process = subprocess.Popen(_words(command), env=environment, stdout=output, stderr=errors)

    def ended(self) -> bool:
        """Whether it has ended; its cost is then kept.

        The peak memory is never below that of this program (0.4 GB), from which the script is forked. Raises:
        ValueError where it failed.
        """
        number, status, usage = os.wait4(self.process.pid, os.WNOHANG)
        if not number:
            return False
        part = self.part
        code = os.waitstatus_to_exitcode(status)
        self.process.returncode = code
        if code or part.script == TRAIN and not part.complete():
            raise ValueError(
                f"{part.name}: expected it to finish, but it {self._how(code)}; the same command goes on from"
                " there."
            )
        unit = 1 << 20 if sys.platform == "darwin" else 1 << 10  # of ru_maxrss
        cost = {"seconds": time.time() - self.started, "megabytes": usage.ru_maxrss * unit / 1e6}
        write_atomic(part.folder / RECORD, json.dumps({**self.known, **cost}, indent=1).encode())
        return True

    def _how(self, code: int) -> str:
        how = "was stopped" if code in (0, -signal.SIGTERM, -signal.SIGINT) else f"ended with status {code}"
        if not self.quiet:
            return f"{how}, its message stands above"
        log = self.part.folder / LOG
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
    waiting = [list(chain) for chain in chains]
    running = dict[int, _Child]()
    try:
        with sigterm_interrupts():
            while any(waiting) or running:
                for place, chain in enumerate(waiting):
                    while chain and place not in running and len(running) < jobs:
                        if chain[0].finished():
                            tell(chain.pop(0))
                        else:
                            running[place] = _Child(chain[0], quiet, threads)
                time.sleep(POLL)
                for place in [place for place, child in running.items() if child.ended()]:
                    del running[place]
                    tell(waiting[place].pop(0))
    finally:
        for child in running.values():
            if child.process.returncode is None:
                child.process.send_signal(signal.SIGTERM)
        for child in running.values():
            child.process.wait()


def line_of(part: Part) -> str:
    """What makes a part, as it may be typed."""
    return shlex.join(["python", *part.continued()])


def call(name: str, command: list[str]) -> float:
    """Run one of our scripts in the terminal; returns its seconds. Raises: ValueError where it failed."""
    click.echo(f"\n== {name}: {shlex.join(['python', *command])}", err=True)
    started = time.time()
    code = subprocess.call(_words(command))
    if code:
        raise ValueError(
            f"{name}: expected status 0, got {code}. Its message stands above; the same command goes on."
        )
    return time.time() - started
