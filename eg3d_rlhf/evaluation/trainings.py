"""Run scripts of the project as cached, resumable subprocesses.

A part is a script of this project with its flags. Its folder is an artefact of a store
(experiments/store.py): the inputs are the command and the hashes of the files that the script reads, and the
record is its cost in seconds and memory. The folder also holds a log and the files that the script writes. A
folder that was made by another command or from other files is emptied before the script runs. Several
trainings with different flags therefore need different folders, which `Part.keyed` gives them. Folders of
version 0.1, whose record is part.json, are recognised as well.
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
from eg3d_rlhf.experiments.process import peak_bytes, sigterm_interrupts
from eg3d_rlhf.experiments.run import recorded
from eg3d_rlhf.experiments.store import DONE, INPUTS, Artefact, Store, json_hash
from eg3d_rlhf.rewards.settings import BUNDLED_LABELS
from training import checkpoint
from training.progress import tqdm

REPO = Path(__file__).resolve().parents[2]
TRAIN = "train.py"
TRAIN_REWARD = "tools/train_reward.py"
PACKAGE = "eg3d_rlhf"  # the package as a script, whose first arguments name a job
_JOBS = {TRAIN: ["train"], TRAIN_REWARD: ["reward", "train"]}  # the job that each script runs
EARLIER = "part.json"  # the record that version 0.1 wrote
LOG = "log.txt"


@dataclass(frozen=True)
class Part:
    """A script of this project with its flags, and the folder that holds its results.

    If the script is train.py, its result is the newest run in the folder.
    """

    name: str  # name of the part in messages
    folder: Path
    script: str  # path of the script, relative to the repository
    flags: tuple[str, ...]
    # name of a file that exists in a run of train.py only if the run has finished; '': the run has finished
    # if it has a snapshot at its full length
    needed: str = ""

    @classmethod
    def keyed(
        cls, part_name: str, parent_folder: Path, flags: Sequence[str], needed_file: str = ""
    ) -> "Part":
        """Return a part that runs train.py in a folder whose name contains a hash of its flags and files.

        Args:
            part_name: name of the part, with which the folder's name begins.
            parent_folder: folder in which the part's folder lies.
            flags: flags of train.py.
            needed_file: name of a file that exists in a run of train.py only if the run has finished. If it
                is '', a run has finished if it has a snapshot at its full length.
        """
        # The hash is computed from the flags' names of version 0.1, so that its folders are found.
        part = cls(part_name, parent_folder, TRAIN, tuple(flags), needed_file)
        hash_digits = json_hash([version_0_1.words(TRAIN, part.flags), part.inputs()["inputs"]])[:8]
        return cls(part_name, parent_folder / f"{part_name}-{hash_digits}", TRAIN, part.flags, needed_file)

    def command(self) -> list[str]:
        """Return the script followed by its flags. For train.py, --outdir with the part's folder is added."""
        return [self.script, *self.flags, *([f"--outdir={self.folder}"] if self.script == TRAIN else [])]

    def files(self) -> dict[str, str]:
        """Return the hashes of the files that the script reads, by flag or name.

        These are the bundled files and every file that a flag names. The hashes are computed at every call,
        since an earlier part may write a file that a flag names.
        """
        path_by_name = {
            file_path.name: file_path
            for file_path in (bundled.GENERATOR, bundled.REWARD, bundled.HELDOUT_REWARD, BUNDLED_LABELS)
        }
        path_by_name |= {
            flag_or_file: Path(flag_value)
            for flag_or_file, _, flag_value in (flag.partition("=") for flag in self.flags)
            if flag_value and flag_or_file not in ("--data", "--out", "--run-dir")
        }
        # The time of modification is a part of the cache's key, so that a file that has changed is hashed
        # again.
        return {
            flag_or_file: _hash(file_path, file_path.stat().st_mtime_ns)
            for flag_or_file, file_path in path_by_name.items()
            if file_path.is_file()
        }

    def inputs(self) -> dict:
        """Return the command and the hashes of its files, which the folder's content depends on.

        Flags and files have their names of version 0.1, so that its folders are recognised.
        """
        script, *flags = self.command()
        return {
            "command": [script, *version_0_1.words(script, flags)],
            "inputs": version_0_1.file_names(script, self.files()),
        }

    @property
    def store(self) -> Store:
        """Return the store that the part's folder belongs to.

        If the folder has only a record of version 0.1, a record of this version is written first.
        """
        earlier_record_path = self.folder / EARLIER  # record of version 0.1
        if earlier_record_path.is_file() and not (self.folder / INPUTS).is_file():
            recorded_values = json.loads(earlier_record_path.read_text())
            inputs = {key: recorded_values.get(key) for key in ("command", "inputs")}
            # A record without seconds belongs to a part that was interrupted.
            if "seconds" in recorded_values and (self.script != TRAIN or self.complete()):
                cost = {key: recorded_values.get(key, 0.0) for key in ("seconds", "megabytes")}
                Store.finish(self.folder, inputs, self.products(), cost)
            else:
                Store.begin(self.folder, inputs)
        return Store(self.folder.parent, hashed=False, renew=True)

    def artefact(self) -> Artefact | None:
        """Return the finished artefact of this command and these files, with its cost.

        Return None if the part is not finished.
        """
        return self.store.find(self.folder.name, self.inputs())

    def finished(self) -> bool:
        """Return True if this command has finished with these files."""
        return self.artefact() is not None

    def products(self) -> list[Path]:
        """List the files of a finished part that other parts read."""
        run_folder = self.run
        if self.script != TRAIN or run_folder is None:
            # The store's own records and the log are not results.
            record_names = (INPUTS, DONE, EARLIER, LOG)
            return [
                file_path
                for file_path in self.folder.iterdir()
                if file_path.is_file() and file_path.name not in record_names
            ]
        # A run of train.py has the last snapshot, and the file that its end is recognised by.
        network = self.network()
        return [*([] if network is None else [network]), *([run_folder / self.needed] if self.needed else [])]

    @property
    def run(self) -> Path | None:
        """Return the newest run of train.py in the folder, or None if the folder has no run."""
        # The names of runs begin with a number that increases.
        return max((run_path for run_path in self.folder.glob("[0-9]*-*") if run_path.is_dir()), default=None)

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
        """Return the last snapshot of the newest run of train.py, or None if the run is not finished."""
        run_folder = self.run
        if run_folder is None or not (run_snapshots := snapshots(run_folder)):
            return None
        # Lengths are compared as integer numbers of images, since kimg (thousands of images) are floats. The
        # newest snapshot comes first.
        final_images = round(1000 * recorded(run_folder)["kimg"])
        return next(
            (
                snapshot_path
                for kimg, snapshot_path in run_snapshots[::-1]
                if round(1000 * kimg) >= final_images
            ),
            None,
        )

    def state(self) -> str:
        """Return 'finished' if the part is finished, 'begun' if it can be resumed, else 'new'."""
        return "finished" if self.finished() else "new" if self.continued() == self.command() else "begun"

    def continued(self) -> list[str]:
        """Return the command that resumes an interrupted part, or `command()` if nothing can be resumed."""
        # A training state is used only if this command made it from these files.
        if self.store.begun(self.folder.name, self.inputs()):
            if self.script == TRAIN_REWARD and (self.folder / "state.pt").is_file():
                return [TRAIN_REWARD, f"--resume={self.folder}"]
            if (
                self.script == TRAIN
                and (run_folder := self.run) is not None
                and checkpoint.available(run_folder)
            ):
                return [TRAIN, f"--resume={run_folder}", "--resume-previous"]
        return self.command()


@functools.lru_cache(maxsize=256)
def _hash(file_path: Path, _modified: int) -> str:
    """Return the hash of a file. Its time of modification is only used as a part of the cache's key."""
    # All parts read the bundled generator and reward, which are thus hashed only once.
    return file_hash(file_path)


def _python_command(command: Sequence[str]) -> list[str]:
    """Return the arguments of a process that runs a script with this Python interpreter."""
    script = command[0]
    arguments = command[1:]
    # An installed package has no scripts beside it, so the same job of the package is run instead.
    if script in _JOBS and not (REPO / script).is_file():
        script, arguments = PACKAGE, [*_JOBS[script], *arguments]
    return [sys.executable, str(REPO / script), *arguments]


@dataclass
class _Children:
    """Child processes of `make` that run at the moment."""

    quiet: bool  # True: output goes to the part's log; False: output goes to the terminal
    threads: int | None  # OMP_NUM_THREADS of each process; None: the inherited value
    _running: set[int] = field(default_factory=set)
    _stopped: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def stop(self) -> None:
        """Send SIGTERM to all child processes. A training writes a checkpoint before it ends."""
        with self._lock:
            self._stopped = True
            for process_id in self._running:
                with contextlib.suppress(ProcessLookupError):  # the process may have just ended
                    os.kill(process_id, signal.SIGTERM)

    def run(self, part: Part) -> tuple[list[Path], dict[str, float]]:
        """Run or resume a part, and return its products and its cost in seconds and megabytes.

        The measured peak memory is at least that of this program (0.4 GB), from which the script is forked.
        Raises: ValueError if the script failed or was stopped.
        """
        environment = {**os.environ, **({"OMP_NUM_THREADS": str(self.threads)} if self.threads else {})}
        start_time = time.time()
        # The lock is held while the process starts, so that `stop` finds every process. "ab" appends to the
        # log of an interrupted run.
        with (part.folder / LOG).open("ab") as log_file, self._lock:
            if self._stopped:
                raise ValueError(
                    "the script was not started, since another part failed or was interrupted. Run the same"
                    " command again."
                )
            stdout, stderr = (log_file, subprocess.STDOUT) if self.quiet else (None, None)
            process = subprocess.Popen(
                _python_command(part.continued()), env=environment, stdout=stdout, stderr=stderr
            )
            self._running.add(process.pid)
        # wait4 is used instead of process.wait(), since it also returns the peak memory of this process.
        _, wait_status, resource_usage = os.wait4(process.pid, 0)
        with self._lock:
            self._running.remove(process.pid)
        # Popen does not notice wait4; without this line it would wait for the process again.
        process.returncode = exit_status = os.waitstatus_to_exitcode(wait_status)
        if exit_status or part.script == TRAIN and not part.complete():
            # `run_tasks` puts the name of the part in front of the message.
            raise ValueError(
                f"the script {self._how(part, exit_status)}. Run the same command again to resume it."
            )
        cost = {"seconds": time.time() - start_time, "megabytes": peak_bytes(resource_usage.ru_maxrss) / 1e6}
        return part.products(), cost

    def _how(self, part: Part, exit_status: int) -> str:
        """Describe how a process failed: by its exit status, and by its last line of output."""
        # A training that received SIGTERM exits with status 0 after it has written a checkpoint.
        ending_text = (
            "was stopped"
            if exit_status in (0, -signal.SIGTERM, -signal.SIGINT)
            else f"ended with status {exit_status}"
        )
        if not self.quiet:
            return f"{ending_text} with the message above"
        log_path = part.folder / LOG
        last_line = (log_path.read_text(errors="replace").strip().splitlines() or ["nothing"])[-1]
        return f"{ending_text}: {last_line} See {log_path}"


def make(
    chains: Collection[Sequence[Part]],
    process_count: int = 1,
    thread_count: int | None = None,
    quiet: bool = True,
    on_done: Callable[[Part], None] = lambda part: None,
) -> None:
    """Run the parts (scripts with the folders of their results, see `Part`) that are not finished.

    An interrupt, or the failure of one part, stops all running parts; trainings write a checkpoint first.

    Args:
        chains: lists of parts; the parts of a chain run one after another.
        process_count: number of chains that run at the same time.
        thread_count: OMP_NUM_THREADS of each process; None keeps the value of this process.
        quiet: True if the output goes to log.txt in the part's folder, False if it goes to the terminal.
        on_done: function that is called with each part when it is finished.

    Raises: ValueError with the name of the part that failed, its last line of output, and its log.
    """
    part_by_name = {part.name: part for chain in chains for part in chain}
    # Each part needs the previous one in its chain. chain[:i][-1:] holds the previous part, and is empty for
    # the first part.
    needed_parts = {
        part.name: [previous_part.name for previous_part in chain[:i][-1:]]
        for chain in chains
        for i, part in enumerate(chain)
    }
    children = _Children(quiet, thread_count)

    def make_part(part_name: str) -> None:
        part = part_by_name[part_name]
        part.store.make(part.folder.name, part.inputs(), lambda _: children.run(part))

    # SIGTERM stops the children as Ctrl-C does
    with sigterm_interrupts():
        run_tasks(
            needed_parts,
            lambda: make_part,
            (),
            process_count,
            Path(),
            on_done=lambda part_name, _: on_done(part_by_name[part_name]),
            stop=children.stop,
        )


def make_with_progress_bar(
    chains: Collection[Sequence[Part]],
    process_count: int,
    thread_count: int,
    bar_text: str,
    unit_name: str = "part",
) -> None:
    """Run the parts (see `Part`) that are not finished, and show a progress bar.

    Args:
        chains: lists of parts; the parts of a chain run one after another.
        process_count: number of chains that run at the same time.
        thread_count: OMP_NUM_THREADS of each process.
        bar_text: text of the bar.
        unit_name: name of what the bar counts.
    """
    with tqdm(total=sum(map(len, chains)), desc=bar_text, unit=unit_name, dynamic_ncols=True) as bar:

        def advance(part: Part) -> None:
            bar.set_postfix_str(f"last: {part.name}; logs in {part.folder.parent}/*/{LOG}")
            bar.update()

        if chains:
            make(chains, process_count, thread_count, on_done=advance)


def _announce(heading: str, command: Sequence[str]) -> None:
    """Print a heading and a command line to stderr."""
    print(f"\n== {heading}: {shlex.join(['python', *command])}", file=sys.stderr, flush=True)


def make_in_terminal(heading: str, part: Part) -> None:
    """Run a part if it is not finished, and show the script's output in the terminal.

    Args: heading: text that is printed above the output.
    """
    if not part.finished():
        _announce(heading, part.continued())
        make([[part]], quiet=False)


def call(script_title: str, command: list[str]) -> float:
    """Run a script of this project, show its output in the terminal, and return the duration in seconds.

    Args:
        script_title: name of the step, for the terminal and the message.
        command: script and its flags, as `Part.command` returns them.
    Raises: ValueError if the script failed.
    """
    _announce(script_title, command)
    start_time = time.time()
    exit_status = subprocess.call(_python_command(command))
    if exit_status:
        raise ValueError(
            f"{script_title} failed with exit status {exit_status}. Read its message above, correct the"
            " cause, and run the same command again to resume."
        )
    return time.time() - start_time
