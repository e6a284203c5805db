"""One run of a long job of any kind, and its folder.

The folder holds these files:

    run.lock                  exists while the process of the run is alive
    training_options.json     settings, SHA-256 of the files that the run starts from, versions of packages,
                              and an identity of the launch that began the run
    stats.jsonl               measurements; equal runs give equal bytes
    timing.jsonl              time and memory, which differ between equal runs
    checkpoint-*.safetensors  the last two checkpoints, from which the run can resume

Only rank 0 writes and prints, but every method may be called on all ranks. `experiments.mode.Mode` makes and
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
from eg3d_rlhf.experiments.logs import Log
from eg3d_rlhf.experiments.process import StopRequest, peak_bytes, run_lock
from eg3d_rlhf.experiments.run_record import OPTIONS as OPTIONS
from eg3d_rlhf.experiments.run_record import recorded as recorded
from eg3d_rlhf.experiments.run_record import recorded_by as recorded_by
from training import checkpoint, rehearsal, storage
from training.distributed import SINGLE, Ranks, launch_identity
from training.progress import tqdm

STATS = "stats.jsonl"
TIMING = "timing.jsonl"
_NUMBERED = re.compile(r"(\d{5})-(.*)")  # name of a run folder: number, and the rest of the name
# keys of training_options.json that are not settings
_OURS = ("versions", "hashes", "processes", "launch", "rehearsal")


class Run:
    """Run of a job in a folder. As a context manager, it holds the lock of the folder.

    Args:
        folder: existing folder of the run, such as one that `claim` made.
        settings: settings that determine the results of the run, in JSON types.
        inputs: paths of the files that the run starts from, by name; None: no files.
        ranks: this process among the processes of the run.
        say: function that prints a status line; None: `print`.
        device: name of the device on which the run computes.
        jobs: number of processes that share the work.
        flags: values of the flags of the command line, by name; None: no flags.
        log: value of --log, which names the trackers that receive the measurements (see logs.named).
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
        # copies, because Mode replaces settings and adds inputs after the object was made
        self.settings = dict(settings)
        self.inputs = dict(inputs or {})
        self.ranks = ranks
        self.device = device
        self.jobs = jobs
        self.flags = flags or {}
        self.resumed: Path | None = None  # folder or state from which the run resumes; None: a new run
        self.began = time.time()  # seconds since 1970
        self.last_checkpoint: Path | None = None  # last checkpoint that was written or read
        self.lines = 0  # number of lines of stats.jsonl
        self._say = say or (lambda line: print(line, flush=True))
        self._lock = contextlib.ExitStack()
        self._request = StopRequest()
        # the trackers keep what they receive, so a rehearsal sends nothing
        self._log = Log(log if ranks.is_main and not rehearsal.active() else "", folder, self.settings)
        # (work that was done before, time in seconds) at the moment from which speed is measured
        self._start = (0.0, time.monotonic())
        self._waited = 0.0  # seconds of waiting for data

    def __enter__(self) -> "Run":
        # A folder that does not exist cannot be locked. A mistyped --resume gets its own error message later.
        self._lock.enter_context(run_lock(self.folder, enabled=self.ranks.is_main and self.folder.is_dir()))
        return self

    def __exit__(self, *exc: object) -> None:
        self._lock.close()
        self._log.close()

    # Beginning and resuming.

    def begin(self) -> None:
        """Record the settings and inputs of a new run in training_options.json.

        Measurements of an earlier attempt in this folder are deleted. That attempt ended before it wrote its
        first checkpoint, so it cannot be resumed.
        """
        # only one process writes into the folder
        if self.ranks.is_main:
            for name in (STATS, TIMING):
                (self.folder / name).unlink(missing_ok=True)
            launch_record = {
                "versions": versions(),
                "hashes": self.hashes(),
                "processes": self.ranks.world,
                "launch": launch_identity(),
                # read by `resume`, should a killed rehearsal leave its folder
                **({"rehearsal": True} if rehearsal.active() else {}),
            }
            self.write(OPTIONS, {**self.settings, **launch_record})

    def resume(self, free_settings: Collection[str] | None = ()) -> None:
        """Check that the inputs and the settings equal those with which the run was begun.

        Args:
            free_settings: names of settings that may have changed. A nested setting is named by its dotted
                path ("train.lr") or by the last part of it ("lr"). None: no setting is compared.

        Raises:
            ValueError: an input file or a setting has changed; the message names it.
        """
        # Rank 0 compares. The other ranks have an empty record, with which nothing differs.
        recorded_options = recorded(self.folder) if self.ranks.is_main else {}
        if recorded_options.get("rehearsal"):
            raise ValueError(
                f"--resume: {self.folder} belongs to a rehearsal, which ended after its first tick. Delete"
                " the folder, and start a new run without --resume."
            )
        for input_name, recorded_hash in recorded_options.get("hashes", {}).items():
            if input_name not in self.inputs:
                continue
            input_path = Path(self.inputs[input_name])
            if not input_path.is_file():
                raise ValueError(
                    f"--resume: the input file {input_name} {input_path}, with which the run was begun, does"
                    " not exist. Restore the file, or start a new run."
                )
            current_hash = file_hash(input_path)
            if current_hash != recorded_hash:
                raise ValueError(
                    f"--resume: the input file {input_name} {input_path} has changed since the run was begun:"
                    f" its SHA-256 was {recorded_hash[:12]}... and is {current_hash[:12]}... now. Restore the"
                    " file, or start a new run."
                )
        # The current settings pass through JSON, as the recorded ones did: a tuple equals a list then.
        recorded_settings = _flat({key: value for key, value in recorded_options.items() if key not in _OURS})
        current_settings = _flat(json.loads(json.dumps(self.settings)))
        # Only settings that exist now are compared. `version_0_1.options` and `from_dict` check settings that
        # were removed when they read the record.
        setting_names = current_settings.keys() if recorded_options and free_settings is not None else ()
        # A group is the dotted path without its last part. If the record has the group but not the setting,
        # the setting was added by a newer version of this package, and is not compared.
        recorded_groups = {setting_name.rpartition(".")[0] for setting_name in recorded_settings} - {""}
        compared_names = {
            setting_name
            for setting_name in setting_names
            if setting_name in recorded_settings or setting_name.rpartition(".")[0] not in recorded_groups
        }
        free_names = set(free_settings or ())
        changed_names = sorted(
            setting_name
            for setting_name in compared_names
            if recorded_settings.get(setting_name) != current_settings.get(setting_name)
            and not {setting_name, setting_name.split(".")[-1]} & free_names
        )
        if changed_names:
            # at most four settings, so that the message stays one readable line
            changes_text = "; ".join(
                f"{setting_name} {current_settings.get(setting_name)} instead of"
                f" {recorded_settings.get(setting_name)}"
                for setting_name in changed_names[:4]
            )
            raise ValueError(
                f"run {self.folder}: settings have changed since the run was begun: {changes_text}. Use the"
                " earlier settings, or start a new run."
            )

    def hashes(self) -> dict[str, str]:
        """Return the SHA-256 of each input file, by the name of the input."""
        return {name: file_hash(path) for name, path in self.inputs.items()}

    # Measurements and progress.

    def stats(self, stats_record: Mapping[str, Any]) -> None:
        """Append a line of measurements to stats.jsonl, and send them to the trackers of --log.

        Args:
            stats_record: measurements by name, in JSON types; the key "step" holds the step of the run.
        """
        if self.ranks.is_main:
            self._append(STATS, stats_record)
            self._log.line(stats_record)
            self.lines += 1

    def log_image(self, name: str, path: Path, step: int) -> None:
        """Send an image file to the trackers of --log.

        Args:
            name: title of the image in the tracker.
            path: image file.
            step: step of the run at which the image was made.
        """
        self._log.image(name, path, step)

    def status(
        self,
        first_fields: Mapping[str, object],
        done_amount: float,
        total_amount: float,
        unit_name: str,
        last_fields: Mapping[str, object] | None = None,
    ) -> None:
        """Print a status line with time, speed, remaining time and memory, and add a line to timing.jsonl.

        The line of timing.jsonl has the same numbers without the remaining time, `first_fields` and
        `last_fields`.

        Args:
            first_fields: fields at the start of the line by name, such as the step. The caller pads values
                that shall be aligned in columns.
            done_amount: amount of work that is done, in units of `unit_name`.
            total_amount: amount of all work, in units of `unit_name`.
            unit_name: name of the unit of work, such as "step" or "kimg".
            last_fields: fields at the end of the line by name; None: no fields.
        """
        if not self.ranks.is_main:
            return
        done_before, start_time = self._start
        elapsed_seconds = time.monotonic() - start_time
        # seconds per unit since this process started or resumed the run, not since the run was begun
        seconds_per_unit = elapsed_seconds / (done_amount - done_before) if done_amount > done_before else 0.0
        memory_gib = peak_bytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 2**30
        # The share of waiting is a number in timing.jsonl, and a percentage in the printed line. A run that
        # did not count its waiting has no such field.
        waiting_share = {"waited": self._waited / elapsed_seconds} if self._waited else {}
        last_fields = {
            **{name: f"{share:.1%}" for name, share in waiting_share.items()},
            **(last_fields or {}),
        }
        status_fields = {
            **first_fields,
            "time": f"{tqdm.format_interval(elapsed_seconds):<9s}",
            f"sec/{unit_name}": f"{seconds_per_unit:<7.4g}",
            "eta": f"{tqdm.format_interval(seconds_per_unit * max(total_amount - done_amount, 0)):<9s}",
            "mem_gb": f"{memory_gib:<5.2f}",
            **last_fields,
        }
        # the same numbers go to the terminal, for people, and to timing.jsonl, for programs
        self._say(" ".join(f"{name} {value}" for name, value in status_fields.items()))
        self._append(
            TIMING,
            {
                unit_name: done_amount,
                "seconds": elapsed_seconds,
                f"sec_per_{unit_name}": seconds_per_unit,
                "mem_gb": memory_gib,
                **waiting_share,
            },
        )

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside the context as waiting for data, whose share `status` prints."""
        wait_start = time.monotonic()
        try:
            yield
        finally:
            self._waited += time.monotonic() - wait_start

    def continue_from(self, done_amount: float, line_count: int | None = None) -> None:
        """Measure speed from now on, and cut stats.jsonl to the lines that belong to the resumed checkpoint.

        Args:
            done_amount: amount of work that is done already, in the unit of `status`.
            line_count: number of lines that stats.jsonl had when the resumed checkpoint was written; later
                lines are deleted. None: a new run, whose stats.jsonl is not changed.
        """
        self._start = (done_amount, time.monotonic())
        self._waited = 0.0
        if line_count is not None and self.ranks.is_main:
            storage.remove_temporaries(self.folder)
            if (self.folder / STATS).exists():
                # The resumed run repeats the steps after the state, and writes their lines again with the
                # same bytes. errors="replace": a killed process may have written half of a character.
                all_lines = (self.folder / STATS).read_text(errors="replace").splitlines(keepends=True)
                lines_of_state = all_lines[:line_count]
                storage.write_atomic(self.folder / STATS, "".join(lines_of_state).encode())
                self._log.resume(lines_of_state)
            self.lines = line_count

    def _append(self, file_name: str, json_record: Mapping[str, Any]) -> None:
        """Append a record to a file as one line of JSON with sorted keys."""
        with open(self.folder / file_name, "a") as file:
            file.write(json.dumps(json_record, sort_keys=True) + "\n")

    def write(self, file_name: str, json_record: Mapping[str, Any]) -> None:
        """Write a JSON file into the run folder atomically. Only rank 0 writes."""
        if self.ranks.is_main:
            storage.write_atomic(
                self.folder / file_name, (json.dumps(json_record, indent=2, sort_keys=True) + "\n").encode()
            )

    def done(self) -> None:
        """Print the time since this `Run` was made, and the run folder."""
        if self.ranks.is_main:
            print(f"Done in {tqdm.format_interval(time.time() - self.began)}: {self.folder}", flush=True)

    # States.

    def checkpoint(self, step: int, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> Path:
        """Write the state of the run into a checkpoint file, and return its path.

        The last two checkpoints of the folder are kept, and older ones are deleted.

        Args:
            step: number of steps (images or updates) that are done.
            tensors: tensors of the state, by name.
            meta: other values of the state, in JSON types.
        """
        # rank 0 writes; every rank computes the path, because messages print it
        checkpoint_path = checkpoint.path_of(self.folder, step)
        if self.ranks.is_main:
            checkpoint.write(self.folder, step, dict(tensors), dict(meta))
        self.last_checkpoint = checkpoint_path
        return checkpoint_path

    def read(
        self, source_file: Path | None = None, previous: bool = False
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Read a checkpoint of the run, and return (its tensors by name, its other values) on every rank.

        Args:
            source_file: checkpoint file; None: the newest checkpoint of the run folder.
            previous: True reads the checkpoint before the newest one, see training.checkpoint.read.
        """
        # Rank 0 reads and sends the state to the other ranks, which may run on machines without this folder.
        tensors, meta, checkpoint_path = (
            checkpoint.read(source_file or self.folder, previous)
            if self.ranks.is_main
            else (None, None, None)
        )
        meta, path_text = self.ranks.broadcast([meta, str(checkpoint_path)])
        self.last_checkpoint = Path(path_text)
        # the tensors are sent one by one, by name, and the other values with the broadcast above
        return self.ranks.broadcast_named(tensors), meta

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Add the path of the last good checkpoint to an OSError that is raised inside the context."""
        try:
            yield
        except OSError as error:
            error_text = str(error).rstrip(".")
            if self.last_checkpoint is None:
                remedy = "No checkpoint was written yet: start a new run when the folder can be written."
            else:
                remedy = f"Resume the run from its last good checkpoint with --resume={self.last_checkpoint}."
            raise OSError(f"run folder {self.folder} cannot be written: {error_text}. {remedy}") from error

    # Signals.

    @property
    def stop_requested(self) -> str | None:
        """Return the name of the stop signal that this process received, such as "SIGTERM"; None without one.

        A signal may reach only some of the ranks. The ranks must therefore agree before they stop.
        """
        return self._request.received

    def stoppable(self) -> contextlib.AbstractContextManager[object]:
        """Return a context manager inside which SIGTERM and the first SIGINT only set `stop_requested`.

        In a rehearsal the signals end the process as usual, because there will be nothing to resume.
        """
        return contextlib.nullcontext() if rehearsal.active() else self._request


def next_free(outdir: Path, name: str) -> Path:
    """Return the path outdir/NNNNN-name, where NNNNN is one more than the largest number in `outdir`."""
    name_matches = (_NUMBERED.match(path.name) for path in outdir.glob("*"))
    taken_numbers = [int(match.group(1)) for match in name_matches if match]
    # the first run of a folder has the number 00000
    return outdir / f"{max(taken_numbers, default=-1) + 1:05d}-{name}"


def claim(folder: Path, ranks: Ranks = SINGLE) -> Path:
    """Make a run folder, and return its path on every rank.

    If another run has taken the number in the meantime, the next free number is used. A folder that an
    earlier attempt of the same launch has made is used again, and so is any existing folder without a number.

    Args:
        folder: path of the folder that shall be made, see `next_free`.
        ranks: this process among the processes of the run.

    Raises:
        OSError: the folder cannot be made.
    """
    launch_id = launch_identity()
    # mkdir is atomic. If two processes choose the same number, one of them gets FileExistsError, and tries
    # the next number.
    while ranks.is_main:
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            numbered_match = _NUMBERED.fullmatch(folder.name)
            # The existing folder is used if it has no number, or if this launch of torchrun has made it
            # before.
            if numbered_match is None or launch_id is not None and _launch_of(folder) == launch_id:
                break
            folder = next_free(folder.parent, numbered_match.group(2))
        except OSError as error:
            error_text = error.strerror or error
            raise OSError(
                f"--outdir: the folder {folder} cannot be made: {error_text}. Pass --outdir=DIR with a folder"
                " that can be written."
            ) from error
    return Path(ranks.broadcast(str(folder)))


def begun_by_this_launch(outdir: Path, ranks: Ranks = SINGLE) -> Path | None:
    """Return the newest run in `outdir` that this launch of torchrun began before it restarted its processes.

    The launch is identified by training.distributed.launch_identity. Returns None if torchrun did not restart
    the processes, or if there is no such run.
    """
    if not ranks.restarts:
        return None
    launch_id = launch_identity()
    # rank 0 searches, and sends the path to the other ranks; "" means no folder
    begun_folder = ""
    if ranks.is_main and launch_id is not None:
        newest_first_paths = sorted(outdir.glob("*"), reverse=True)
        run_folders = (path for path in newest_first_paths if _NUMBERED.fullmatch(path.name))
        begun_folder = next((str(path) for path in run_folders if _launch_of(path) == launch_id), "")
    begun_folder = ranks.broadcast(begun_folder)
    return Path(begun_folder) if begun_folder else None


def _launch_of(folder: Path) -> str | None:
    """Read the identity of the launch that began a run; None if the folder has no readable record."""
    try:
        return recorded(folder).get("launch")
    except (OSError, ValueError):
        return None


def _flat(nested_settings: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    """Flatten nested settings: {"train": {"lr": 1}} -> {"train.lr": 1}.

    Args:
        nested_settings: settings, in JSON types.
        prefix: dotted path of `nested_settings`, with a dot at the end; "" at the top.
    """
    flat_settings: dict[str, object] = {}
    for key, value in nested_settings.items():
        if isinstance(value, dict):
            flat_settings |= _flat(value, f"{prefix}{key}.")
        else:
            flat_settings[f"{prefix}{key}"] = value
    return flat_settings
