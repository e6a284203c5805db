"""Modes of train.py and other jobs that run in a folder: settings, opening of their files, and the work.

    CLIMB = Mode(
        name="climb",
        help="Climb the reward from one seed.",
        settings=ClimbConfig,
        open=open_climb,
        work=climb,
    )
    MODES.add("climb", CLIMB)

    def open_climb(settings: ClimbConfig, run: Run):       checks and opens the files that the settings name,
                                                           and adds them to run.inputs; it raises ValueError
                                                           before a run folder is made
    def climb(settings: ClimbConfig, opened, run: Run):    does the remaining work of a new or resumed run

This module handles the run folder, its lock and its record training_options.json, the flags --resume,
--dry-run, --outdir, --desc, --seed, --device and --timeout, signals, and the ranks of torchrun.
"""

import contextlib
import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, get_type_hints

import click
from click.core import ParameterSource

from eg3d_rlhf.core.cli import (
    Decorator,
    GroupedCommand,
    choose_device,
    combine_decorators,
    option,
    options_from_settings,
)
from eg3d_rlhf.core.device_option import DEVICE
from eg3d_rlhf.experiments.process import StoppedError, sigterm_interrupts
from training.config import from_dict, settings_from_values

if TYPE_CHECKING:  # these import torch, which would slow down --help
    from _typeshed import DataclassInstance

    from eg3d_rlhf.experiments.run import Run
    from training.distributed import Ranks

S = TypeVar("S", bound="DataclassInstance")
RUN = "Run"
FOLDER = click.Path(path_type=Path, file_okay=False)
FREE = frozenset({"resume", "device", "timeout", "dry_run"})  # flags that are allowed with --resume


class Flags(dict[str, Any]):
    """Values of a command's flags, by parameter name.

    A value of None means that the flag was not passed. A preset or a default of the mode then decides.

    Args:
        values: value of each flag, by the name of its parameter.
        written_names: names of the flags that the user passed on the command line.
    """

    # the default {} is only read, hence the noqa
    def __init__(self, values: Mapping[str, Any] = {}, written_names: Iterable[str] = ()):  # noqa: B006
        super().__init__(values)
        self.written = frozenset(written_names)

    def select(self, field_by_flag: Mapping[str, str]) -> dict[str, Any]:
        """Return the values of some flags, under the names of the settings' fields that they set.

        Flags whose value is None are left out.

        Args:
            field_by_flag: maps the name of each flag to the name of the field that it sets.
        """
        return {
            field_name: self[flag_name]
            for flag_name, field_name in field_by_flag.items()
            if self.get(flag_name) is not None
        }

    def values_for(self, settings_class: type) -> dict[str, Any]:
        """Return the values of the flags that set fields of a settings dataclass, by the name of the field.

        Flags whose value is None are left out.

        Args:
            settings_class: settings dataclass, whose fields carry a `knob` (see training.config).
        """
        knobs = {
            field.name: field.metadata["knob"]
            for field in dataclasses.fields(settings_class)
            if "knob" in field.metadata
        }
        return self.select({knob.name or name: name for name, knob in knobs.items()})

    def check_applies(self, names: Iterable[str], applies: bool, reason: str) -> None:
        """Raise ValueError if the user passed any flag of `names` although it has no effect.

        Args:
            names: names of the flags that are checked.
            applies: True if these flags have an effect in this command.
            reason: clause for the message that follows "because" and states why they have no effect, such as
                "--loop is not given".
        """
        flags_without_effect = [flag(name) for name in names if name in self.written]
        if flags_without_effect and not applies:
            raise ValueError(
                f"{', '.join(flags_without_effect)} would have no effect in this command, because {reason}."
                f" Remove {', '.join(flags_without_effect)} from the command line."
            )


def flag(name: str) -> str:
    """Return the flag of a parameter: "dry_run" -> "--dry-run"."""
    return "--" + name.replace("_", "-")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mode(Generic[S]):
    """One mode of train.py: its settings, its flags, and the functions that open files and do the work.

    The fields name, help, settings, open and work must be passed; all others have a default.
    """

    name: str  # value of --mode
    help: str  # text at the top of --help
    settings: type[S]  # dataclass whose fields carry knobs; a field may be such a dataclass again
    # (settings, run) -> opened files: checks and opens the files that the settings name, before a run folder
    # is made, and adds them to run.inputs
    open: Callable[[S, "Run"], Any]
    work: Callable[[S, Any, "Run"], None]  # (settings, opened, run): does the remaining work of a run
    # (settings, opened) -> name of the run folder, without its number; None: `name`
    title: Callable[[S, Any], str] | None = None
    flags: Decorator | None = None  # decorator that adds the mode's flags; None: one flag for each knob
    # (flags) -> settings of a new run; None: every flag sets the knob of its name
    resolve: Callable[[Flags], S] | None = None
    # (settings, opened) -> content of training_options.json; None: the mode's name and the settings
    record: Callable[[S, Any], Mapping[str, Any]] | None = None
    # (value of --resume, flags, ranks) -> settings of that run; None: read them from training_options.json
    recorded: Callable[[Path, Flags, "Ranks"], S] | None = None
    # raises an error for a value of --resume that names no run, and imports nothing heavy; None:
    # training_options.json must exist and name this mode
    check_resume: Callable[[Path], object] | None = None
    shown: Callable[[S], Mapping[str, Any]] | None = None  # JSON that --dry-run prints; None: the settings
    # (flags) -> objects from which --help reads the defaults of flags, see core.cli.HelpValues; None: the
    # settings
    defaults: Callable[[Flags], Iterable[object]] | None = None
    on_cpu: Callable[[S], bool] | None = None  # returns True if --device=auto shall select the CPU
    jobs: str = ""  # work that --jobs divides among processes; "": the mode has no flag --jobs
    beside_resume: frozenset[str] = frozenset()  # flags of the mode that are allowed with --resume
    # settings that may differ when a run is resumed; None: no setting is compared, because the state holds
    # them
    changes: frozenset[str] | None = frozenset()
    # command or flag that resumes a stopped run, as the subject of the sentence "... resumes the run."
    again: str = "--resume=RUN"
    # (settings, flags): raises ValueError for a run that cannot be rehearsed. None: the mode has no flag
    # --rehearse
    check_rehearsal: Callable[[S, Flags], None] | None = None
    # (settings, folder) -> settings of the rehearsal, which writes only below this folder; None: the settings
    rehearsed: Callable[[S, Path], S] | None = None
    # returns True for the folder of an interrupted run that holds a state to resume from
    resumable: Callable[[Path], bool] = lambda folder: True

    def start(
        self, settings: S, outdir: Path, flags: Flags | None = None, ranks: "Ranks | None" = None
    ) -> Path:
        """Start a new run in a new folder of `outdir`, and return that folder.

        If torchrun restarted this process, the run that the same launch had begun is resumed instead.

        Args:
            settings: settings of the run.
            outdir: folder in which numbered run folders are made.
            flags: flags of the command line; None: no flags.
            ranks: this process among the processes of the run; None: a single process.
        """
        # imported here, because these modules import torch, which would slow down --help
        from eg3d_rlhf.experiments.run import begun_by_this_launch, next_free
        from training.distributed import SINGLE

        flags = flags or Flags()
        ranks = ranks or SINGLE
        begun_folder = begun_by_this_launch(outdir, ranks)
        # Rank 0 decides for all ranks. If one rank resumed and another started a new run, they would wait for
        # each other forever.
        if begun_folder and ranks.broadcast(self.resumable(begun_folder) if ranks.is_main else None):
            return self.resume(settings, begun_folder, flags, ranks)

        def choose_folder(opened_files: Any) -> Path:
            # A begun run without a state keeps its folder; every other run gets the next free number.
            title = self.title(settings, opened_files) if self.title else self.name
            return begun_folder or next_free(outdir, "-".join(filter(None, (title, flags.get("desc")))))

        return self.begin(settings, choose_folder, flags, ranks)

    def begin(
        self,
        settings: S,
        folder: Path | Callable[[Any], Path],
        flags: Flags | None = None,
        ranks: "Ranks | None" = None,
    ) -> Path:
        """Start a new run in a folder, and return the folder.

        Args:
            settings: settings of the run.
            folder: path of the folder, or a function that returns the path for the object that `open`
                returned. If a folder NNNNN-name exists already, the next free number is used.
            flags: flags of the command line; None: no flags.
            ranks: this process among the processes of the run; None: a single process.
        """
        from eg3d_rlhf.experiments.run import claim

        # a placeholder path while the folder is not known; it is replaced below
        run = self._run(folder if isinstance(folder, Path) else Path(), settings, flags, ranks)
        opened_files = self._open(settings, run)
        # only after opening, so that a user's mistake leaves no empty folder
        run.folder = claim(folder if isinstance(folder, Path) else folder(opened_files), run.ranks)
        with run:
            run.begin()
            self._work(settings, opened_files, run)
        return run.folder

    def resume(
        self, settings: S, resume_path: Path, flags: Flags | None = None, ranks: "Ranks | None" = None
    ) -> Path:
        """Resume a run, and return its folder.

        Args:
            settings: settings of the run, see `read`.
            resume_path: the run folder, or a checkpoint file in it.
            flags: flags of the command line; None: no flags.
            ranks: this process among the processes of the run; None: a single process.

        Raises:
            ValueError: the settings, or files that the run started from, have changed.
        """
        run = self._run(resume_path if resume_path.is_dir() else resume_path.parent, settings, flags, ranks)
        run.resumed = resume_path
        # the lock comes first here: another process may still be writing states
        with run:
            opened_files = self._open(settings, run)
            run.resume(self.changes)
            self._work(settings, opened_files, run)
        return run.folder

    def rehearse(
        self, settings: S, outdir: Path, flags: Flags | None = None, ranks: "Ranks | None" = None
    ) -> None:
        """Rehearse a new run in a temporary folder below `outdir`, and print the time of the whole run.

        The folder is on the disk of the real run, so that its checkpoints take as long. It is deleted at the
        end, also after an error.

        Args:
            settings: settings of the run.
            outdir: folder in which the real run would make its run folder.
            flags: flags of the command line; None: no flags.
            ranks: this process among the processes of the run; None: a single process.

        Raises:
            ValueError: a run with these settings cannot be rehearsed.
        """
        # imported here, because these modules import torch, which would slow down --help
        from eg3d_rlhf.experiments.rehearsal_report import temporary_folder, time_lines
        from training import rehearsal
        from training.distributed import SINGLE

        flags = flags or Flags()
        ranks = ranks or SINGLE
        if self.check_rehearsal is not None:
            self.check_rehearsal(settings, flags)
        with temporary_folder(outdir, ranks) as folder, rehearsal.rehearsing() as measured:
            rehearsed_settings = settings if self.rehearsed is None else self.rehearsed(settings, folder)
            self.begin(rehearsed_settings, folder / "run", flags, ranks)
        if ranks.is_main:
            click.echo("\n".join(time_lines(measured)))

    def read(self, resume_path: Path, flags: Flags | None = None, ranks: "Ranks | None" = None) -> S:
        """Read the settings of a run from its folder.

        Args:
            resume_path: value of --resume: the run folder, or a checkpoint file in it if the function
                `recorded` of this mode accepts one.
            flags: flags of the command line; None: no flags.
            ranks: this process among the processes of the run; None: a single process.

        Raises:
            FileNotFoundError: there is no run at `resume_path`.
            ValueError: the run belongs to another mode.
        """
        from eg3d_rlhf.experiments.run_record import OPTIONS, recorded_by
        from training.distributed import SINGLE

        if self.recorded is not None:
            return self.recorded(resume_path, flags or Flags(), ranks or SINGLE)
        return from_dict(
            self.settings, recorded_by(resume_path, self.name)["settings"], str(resume_path / OPTIONS)
        )

    def _run(self, folder: Path, settings: S, flags: Flags | None, ranks: "Ranks | None") -> "Run":
        """Make the `Run` object and choose its device. No file is written."""
        from eg3d_rlhf.experiments.run import Run
        from training.distributed import SINGLE

        flags = flags or Flags()
        ranks = ranks or SINGLE
        device_name = flags.get("device") or "auto"
        if device_name == "auto" and self.on_cpu is not None and self.on_cpu(settings):
            device_name = "cpu"
        # under torchrun each rank has its device already
        device = ranks.device if ranks.world > 1 else choose_device(device_name)
        return Run(folder, {}, ranks=ranks, device=str(device), jobs=flags.get("jobs") or 1, flags=flags)

    def _open(self, settings: S, run: "Run") -> Any:
        """Open the files that the settings name, and set the settings that the run records."""
        opened_files = self.open(settings, run)
        run.settings = dict(
            {"mode": self.name, "settings": dataclasses.asdict(settings)}
            if self.record is None
            else self.record(settings, opened_files)
        )
        return opened_files

    def _work(self, settings: S, opened_files: Any, run: "Run") -> None:
        """Print the folder, then do the work."""
        if run.ranks.is_main:
            print(f"Run folder {run.folder}.", flush=True)
        self.work(settings, opened_files, run)

    @functools.cached_property
    def command(self) -> GroupedCommand:
        """Make the click command with the common flags and the flags of the mode."""
        # `self` would be hidden inside the nested function, whose parameters are the flags
        mode = self

        @click.command(
            f"train.py --mode={self.name}",
            cls=GroupedCommand,
            job=f"train --mode={self.name}",
            help=self.help,
        )
        @run_flags(self)
        @self.flags or options_from_settings(self.settings)
        @click.pass_context
        def command(context: click.Context, /, **parameters: Any) -> Path | None:
            flags = flags_of(context)
            resume_path = parameters["resume"]
            is_rehearsal = bool(parameters.get("rehearse"))
            if is_rehearsal and resume_path is not None:
                raise ValueError(
                    "--rehearse cannot be combined with --resume, because a rehearsal measures a new run."
                    " Remove one of them; a resumed run prints the remaining time in its status lines."
                )
            # A resumed run takes its settings from its record. A flag is allowed if it repeats the recorded
            # value, because the command of the first start is what a user types again.
            if resume_path is not None:
                free_names = FREE | mode.beside_resume | ({"jobs"} if mode.jobs else set())
                mode.check_repeated_flags(flags, resume_path, sorted(flags.written - free_names))
            settings: Any = None if resume_path is not None else mode.settings_of(flags)
            if parameters["dry_run"]:
                settings = mode.read(resume_path, flags) if settings is None else settings
                shown_settings = dataclasses.asdict(settings) if mode.shown is None else mode.shown(settings)
                click.echo(json.dumps(shown_settings, indent=2, sort_keys=True))
                return None
            again = None if is_rehearsal else mode.again
            with running(parameters["device"], parameters["timeout"], again) as ranks:
                if is_rehearsal:
                    mode.rehearse(settings, parameters["outdir"], flags, ranks)
                    return None
                if settings is None:
                    return mode.resume(mode.read(resume_path, flags, ranks), resume_path, flags, ranks)
                return mode.start(settings, parameters["outdir"], flags, ranks)

        # GroupedCommand calls this when it formats --help
        command.resolved = mode.shown_by_help
        return command

    def settings_of(self, flags: Flags) -> S:
        """Return the settings of a new run, from the flags of its command line.

        Raises:
            ValueError: a flag has a value that is not allowed, or flags contradict each other.
        """
        if self.resolve is not None:
            return self.resolve(flags)
        # flags that the run itself uses, and that no settings dataclass has as a field
        run_only_flags = {"outdir", "desc", "resume", "dry_run", "rehearse", "timeout"}
        flag_values = {
            name: value for name, value in flags.items() if value is not None and name not in run_only_flags
        }
        settings: S = settings_from_values(self.settings, flag_values)
        return settings

    def check_repeated_flags(self, flags: Flags, resume_path: Path, repeated_names: Sequence[str]) -> None:
        """Check that flags beside --resume have the values with which the run was started.

        Args:
            flags: flags of the command line.
            resume_path: value of --resume.
            repeated_names: names of the flags to compare, which the user passed.

        Raises: ValueError that names the flags with other values, and the values of the run.
        """
        if not repeated_names:
            return
        recorded_settings = _flat(self.read(resume_path, flags))
        given_settings = _flat(self.settings_of(flags))
        knob_fields = _fields_by_flag(self.settings)
        run_folder = (resume_path if resume_path.is_dir() else resume_path.parent).resolve()
        differences = []
        for name in repeated_names:
            # These two flags are no settings. They made the path of the run folder.
            if name == "outdir" and Path(flags[name]).resolve() == run_folder.parent:
                continue
            if name == "desc" and run_folder.name.endswith(f"-{flags[name]}"):
                continue
            # The fields that a flag sets are those that change if it is left out. A flag whose value is the
            # default changes nothing; the field is then found by its knob.
            without_flag = Flags({**flags, name: self._default_of(name)}, flags.written - {name})
            try:
                other_settings = _flat(self.settings_of(without_flag))
            except ValueError:
                other_settings = given_settings  # the other flags are not allowed without this one
            changed_fields = {
                field for field in given_settings if given_settings[field] != other_settings.get(field)
            } or knob_fields.get(name, set())
            run_values = [
                recorded_settings.get(field)
                for field in sorted(changed_fields)
                if recorded_settings.get(field) != given_settings[field]
            ]
            if run_values or not changed_fields:
                value_text = f" (the run has {', '.join(map(str, run_values))})" if run_values else ""
                differences.append(f"{flag(name)}={flags[name]}{value_text}")
        if differences:
            raise ValueError(
                f"--resume: the run in {resume_path} was not started with {', '.join(differences)}."
                " A resumed run keeps its settings. Remove"
                f" {'this flag' if len(differences) == 1 else 'these flags'}, or start a new run without"
                " --resume."
            )

    def _default_of(self, name: str) -> Any:
        """Return the value of a flag that is not passed."""
        # options that only --set can pass are not among the parameters
        options = [*self.command.params, *self.command.rare.values()]
        option = next(option for option in options if option.name == name)
        return option.get_default(click.Context(self.command))

    def shown_by_help(self, context: click.Context) -> Iterable[object]:
        """Return the objects from which --help reads the defaults of flags."""
        flags = flags_of(context)
        if flags["resume"] is not None:
            return [self.read(flags["resume"], flags)]
        return [self.settings_of(flags)] if self.defaults is None else self.defaults(flags)


def _flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Return the values of a settings dataclass and of the dataclasses in it, by names like "loop.batch"."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            values |= _flat(value, f"{prefix}{field.name}.")
        else:
            values[prefix + field.name] = value
    return values


def _fields_by_flag(settings_class: type, prefix: str = "") -> dict[str, set[str]]:
    """Return the names of the fields, as in `_flat`, that each flag sets through a knob."""
    fields_by_flag: dict[str, set[str]] = {}
    # the annotations may be texts, which get_type_hints turns into classes
    field_types = get_type_hints(settings_class)
    for field in dataclasses.fields(settings_class):
        if "knob" in field.metadata:
            flag_name = field.metadata["knob"].name or field.name
            fields_by_flag.setdefault(flag_name, set()).add(prefix + field.name)
        elif dataclasses.is_dataclass(field_types[field.name]):
            inner_class: Any = field_types[field.name]
            for flag_name, names in _fields_by_flag(inner_class, f"{prefix}{field.name}.").items():
                fields_by_flag.setdefault(flag_name, set()).update(names)
    return fields_by_flag


def flags_of(context: click.Context) -> Flags:
    """Return the flags of a click command, and the names of the flags that the user passed."""
    command_line = ParameterSource.COMMANDLINE
    written_names = {name for name in context.params if context.get_parameter_source(name) == command_line}
    return Flags(context.params, written_names)


@contextlib.contextmanager
def running(device: str | None, timeout: float, resume_hint: str | None) -> "Iterator[Ranks]":
    """Open the process group of a run, and yield the `Ranks` object of this process.

    If a signal stops the run, the process prints how to resume it, and exits with status 130.

    Args:
        device: "auto", "cpu" or "cuda"; None: "auto".
        timeout: longest wait for another process of torchrun, in minutes.
        resume_hint: command or flag that resumes the run, as the subject of the printed sentence. None: the
            run is a rehearsal, which cannot be resumed.
    """
    from training.distributed import process_group

    process_group_context = process_group(choose_device(device or "auto"), timeout)
    # _ends_with_130 is used twice. The inner one turns a stop into SystemExit before the process group
    # closes, so that the group's __exit__ receives it. The outer one handles a stop while the group
    # is being opened.
    with (
        _ends_with_130(resume_hint),
        sigterm_interrupts(),
        process_group_context as ranks,
        _ends_with_130(resume_hint),
    ):
        yield ranks


@contextlib.contextmanager
def _ends_with_130(resume_hint: str | None) -> Iterator[None]:
    """Exit with status 130 if the run inside the context was stopped. Shells use this status for SIGINT."""
    try:
        yield
    except (StoppedError, KeyboardInterrupt) as stop_error:
        reason = f": {str(stop_error).rstrip('.')}" if str(stop_error) else ""
        remedy = "The rehearsal left no files." if resume_hint is None else f"{resume_hint} resumes the run."
        click.echo(f"Stopped{reason}. {remedy}", err=True)
        sys.exit(130)


def process_count() -> int:
    """Return the number of processes that torchrun started, or 1 without torchrun."""
    # torchrun sets WORLD_SIZE; a value that is no number is reported when the process group opens
    world_size = os.environ.get("WORLD_SIZE", "1")
    return max(int(world_size), 1) if world_size.isdecimal() else 1


def reject_torchrun(has_several: bool, flag_names: str) -> None:
    """Raise ValueError if several trainings are requested under torchrun with several processes.

    Args:
        has_several: True if the command requests several trainings.
        flag_names: names of the flags that request them, for the message.
    """
    if has_several and process_count() > 1:
        raise ValueError(
            f"{flag_names}: several trainings cannot share the processes of torchrun"
            f" (WORLD_SIZE={os.environ['WORLD_SIZE']}). Start the command without torchrun, and pass --jobs"
            " to run several trainings at once."
        )


def rehearse_option(group: str, rare: bool = False) -> Decorator:
    """Return the decorator that adds the flag --rehearse, which the command passes to `Mode.rehearse`.

    Args:
        group: title of the group under which --help lists the flag.
        rare: True for a command that lists it in --help-all.
    """
    return option(
        "--rehearse",
        group=group,
        rare=rare,
        is_flag=True,
        help=(
            "Do one tick, one checkpoint and the first samples of the summary, print the estimated hours of"
            " the whole run, and stop. All files are written into a temporary folder, which is deleted."
        ),
    )


def _check_record(mode_name: str, resume_path: Path) -> None:
    """Raise FileNotFoundError or ValueError if --resume names no run folder of a mode."""
    from eg3d_rlhf.experiments.run_record import recorded_by

    recorded_by(resume_path, mode_name)


def run_flags(mode: Mode[S]) -> Decorator:
    """Make the decorator that adds the flags which all modes have."""
    non_negative_int = click.IntRange(min=0)
    flag_decorators = [
        option(
            "--mode",
            group=RUN,
            metavar="NAME",
            default=mode.name,
            expose_value=False,
            help="Kind of training that train.py runs; `train.py --help` lists all kinds.",
        ),
        option(
            "--outdir",
            group=RUN,
            metavar="DIR",
            type=FOLDER,
            default=Path("runs"),
            help="Folder in which the run folder NNNNN-NAME is made, with the next free number.",
        ),
        # EG3D's train.py has --desc, so --help of --mode=gan lists it. The other modes list it in --help-all.
        option(
            "--desc",
            group=RUN,
            rare=mode.name != "gan",
            metavar="TEXT",
            help="Text that is appended to the name of the run folder.",
        ),
        option(
            "--seed",
            group=RUN,
            metavar="INT",
            type=non_negative_int,
            default=0,
            help="Random seed of the run.",
        ),
        option(
            "--device",
            group=RUN,
            type=DEVICE,
            default="auto",
            help=(
                "Device on which the run computes. auto selects CUDA if it is available, and the CPU"
                " otherwise."
            ),
        ),
        option(
            "--resume",
            group=RUN,
            metavar="RUN",
            type=click.Path(path_type=Path),
            check=mode.check_resume or functools.partial(_check_record, mode.name),
            # `recorded` of the other modes reads a file of the folder, so they do not accept a checkpoint
            help="Run folder of a stopped run, which is resumed with its recorded settings."
            + (" A checkpoint file in this folder may be named instead." if mode.name == "gan" else ""),
        ),
        option(
            "-n", "--dry-run", group=RUN, is_flag=True, help="Print the resolved settings as JSON and stop."
        ),
        option(
            "--timeout",
            group=RUN,
            rare=True,
            metavar="MINUTES",
            type=click.FloatRange(min=0, min_open=True),
            default=30,
            help="Longest time that a process of torchrun waits for another process, in minutes.",
        ),
    ]
    if mode.check_rehearsal is not None:
        flag_decorators.append(rehearse_option(RUN))
    if mode.jobs:
        flag_decorators.append(
            option(
                "--jobs",
                group=RUN,
                metavar="INT",
                type=click.IntRange(min=1),
                default=2,
                help=f"Number of processes that share the work of {mode.jobs}; each process has one thread.",
            )
        )
    return combine_decorators(*flag_decorators)
