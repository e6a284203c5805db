"""Modes of train.py and other jobs that run in a folder: settings, opening of their files, and the work.

    CLIMB = Mode(
        name="climb",
        help="Climb the reward from one seed.",
        settings=ClimbConfig,
        open=open_climb,
        work=climb,
    )
    MODES.add("climb", CLIMB)

    def open_climb(settings: ClimbConfig, run: Run):       checks and opens what the settings name; raises
                                                           ValueError before there is a folder; adds its
                                                           files to run.inputs
    def climb(settings: ClimbConfig, opened, run: Run):    does the remaining work of a new or resumed run

This module handles the folder, its lock and record, --resume, --dry-run, --outdir, --desc, --seed, --device,
--timeout, signals and ranks.
"""

import contextlib
import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import click
from click.core import ParameterSource

from eg3d_rlhf.core.cli import Decorator, GroupedCommand, choose_device, option, options_of, together
from eg3d_rlhf.experiments.process import StoppedError, sigterm_interrupts
from training.config import built, from_dict

if TYPE_CHECKING:  # these import torch, which would slow down --help
    from _typeshed import DataclassInstance

    from eg3d_rlhf.experiments.run import Run
    from training.distributed import Ranks

S = TypeVar("S", bound="DataclassInstance")
RUN = "Run"
FOLDER = click.Path(path_type=Path, file_okay=False)
FREE = frozenset({"resume", "device", "timeout", "dry_run"})  # flags that are allowed with --resume


class Flags(dict[str, Any]):
    """Values of a command line's flags, by name; None: not given, so that a preset or a problem decides.

    Args: written: names of the flags that were typed.
    """

    def __init__(self, values: Mapping[str, Any] = {}, written: Iterable[str] = ()):  # noqa: B006 (only read)
        super().__init__(values)
        self.written = frozenset(written)

    def some(self, names: Mapping[str, str]) -> dict[str, Any]:
        """Return the given flags under the names of fields. Args: names: name of the flag -> of the field."""
        return {field: self[name] for name, field in names.items() if self.get(name) is not None}

    def of(self, kind: type) -> dict[str, Any]:
        """Return the given values of a settings dataclass's knobs, by field."""
        knobs = {
            field.name: field.metadata["knob"]
            for field in dataclasses.fields(kind)
            if "knob" in field.metadata
        }
        return self.some({knob.name or name: name for name, knob in knobs.items()})

    def belong(self, names: Iterable[str], applies: bool, where: str) -> None:
        """Raise ValueError if any of `names` was typed but does not apply.

        Args: applies: the flags have an effect here; where: they have one, for the message.
        """
        extra = [flag(name) for name in names if name in self.written]
        if extra and not applies:
            raise ValueError(
                f"{', '.join(extra)}: applies to {where} only, and would have no effect here. Remove it."
            )


def flag(name: str) -> str:
    """Return the flag of a parameter's name."""
    return "--" + name.replace("_", "-")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mode(Generic[S]):
    """One mode of train.py. Only name, help, settings, open and work have no default."""

    name: str  # value of --mode
    help: str
    settings: type[S]  # a dataclass of knobs, maybe nested
    # opens and checks what the settings name, before there is a folder; adds the files to run.inputs
    open: Callable[[S, "Run"], Any]
    work: Callable[[S, Any, "Run"], None]  # does the remaining work of a run
    title: Callable[[S, Any], str] | None = None  # (settings, opened) -> name of the folder; None: the mode's
    flags: Decorator | None = None  # decorator that adds the mode's flags; None: one flag for each knob
    resolve: Callable[[Flags], S] | None = None  # settings of a command line; None: knobs by name
    # (settings, opened) -> content of training_options.json; None: the mode's name and the settings
    record: Callable[[S, Any], Mapping[str, Any]] | None = None
    # settings of the run that --resume names; None: inverse of `record`
    recorded: Callable[[Path, Flags, "Ranks"], S] | None = None
    shown: Callable[[S], Mapping[str, Any]] | None = None  # JSON that --dry-run prints; None: the settings
    # objects from which --help reads the defaults of flags, see core.cli.HelpValues; None: the settings
    defaults: Callable[[Flags], Iterable[object]] | None = None
    on_cpu: Callable[[S], bool] | None = None  # true where --device=auto means the CPU
    jobs: str = ""  # work that --jobs divides among processes; "": none, and there is no such flag
    beside_resume: frozenset[str] = frozenset()  # flags of the mode that are allowed with --resume
    # settings that a resumed run may change; None: all, they come from its state
    changes: frozenset[str] | None = frozenset()
    again: str = "--resume=RUN"  # flag that resumes a stopped run, for a message
    # true for a begun folder that holds a state from which to resume
    resumable: Callable[[Path], bool] = lambda folder: True

    def start(
        self, settings: S, outdir: Path, flags: Flags | None = None, ranks: "Ranks | None" = None
    ) -> Path:
        """Start a new run in `outdir`, and return its folder.

        After a restart by torchrun, the run that this launch had begun is resumed instead.
        """
        from eg3d_rlhf.experiments.run import begun_by_this_launch, next_free
        from training.distributed import SINGLE

        flags = flags or Flags()
        ranks = ranks or SINGLE
        begun = begun_by_this_launch(outdir, ranks)
        # rank 0 decides for all: ranks that disagreed would wait for each other forever
        if begun and ranks.broadcast(self.resumable(begun) if ranks.main else None):
            return self.go_on(settings, begun, flags, ranks)

        def folder(opened: Any) -> Path:
            title = self.title(settings, opened) if self.title else self.name
            return begun or next_free(outdir, "-".join(filter(None, (title, flags.get("desc")))))

        return self.begin(settings, folder, flags, ranks)

    def begin(
        self,
        settings: S,
        folder: Path | Callable[[Any], Path],
        flags: Flags | None = None,
        ranks: "Ranks | None" = None,
    ) -> Path:
        """Start a new run in a folder, and return the folder.

        Args: folder: or a function of what was opened. If the numbered folder is taken, the next one is used.
        """
        from eg3d_rlhf.experiments.run import claim

        run = self._run(folder if isinstance(folder, Path) else Path(), settings, flags, ranks)
        opened = self._open(settings, run)
        # only after opening, so that a user's mistake leaves no empty folder
        run.folder = claim(folder if isinstance(folder, Path) else folder(opened), run.ranks)
        with run:
            run.begin()
            self._work(settings, opened, run)
        return run.folder

    def go_on(
        self, settings: S, source: Path, flags: Flags | None = None, ranks: "Ranks | None" = None
    ) -> Path:
        """Resume a run, and return its folder. Args: source: the folder, or a state in it.

        Raises: ValueError where settings, or files that it started from, have changed.
        """
        run = self._run(source if source.is_dir() else source.parent, settings, flags, ranks)
        run.resumed = source
        # the lock comes first here: another process may still be writing states
        with run:
            opened = self._open(settings, run)
            run.resume(self.changes)
            self._work(settings, opened, run)
        return run.folder

    def read(self, source: Path, flags: Flags | None = None, ranks: "Ranks | None" = None) -> S:
        """Read the settings of a run. Raises: FileNotFoundError; ValueError for a folder of another mode."""
        from eg3d_rlhf.experiments.run import OPTIONS, recorded_by
        from training.distributed import SINGLE

        if self.recorded is not None:
            return self.recorded(source, flags or Flags(), ranks or SINGLE)
        return from_dict(self.settings, recorded_by(source, self.name)["settings"], str(source / OPTIONS))

    def _run(self, folder: Path, settings: S, flags: Flags | None, ranks: "Ranks | None") -> "Run":
        """Make the `Run`, with its device; nothing is written yet."""
        from eg3d_rlhf.experiments.run import Run
        from training.distributed import SINGLE

        flags = flags or Flags()
        ranks = ranks or SINGLE
        name = flags.get("device") or "auto"
        if name == "auto" and self.on_cpu is not None and self.on_cpu(settings):
            name = "cpu"
        # under torchrun each rank has its device already
        device = ranks.device if ranks.world > 1 else choose_device(name)
        return Run(folder, {}, ranks=ranks, device=str(device), jobs=flags.get("jobs") or 1, flags=flags)

    def _open(self, settings: S, run: "Run") -> Any:
        """Open what the settings name, and set the record of the run."""
        opened = self.open(settings, run)
        run.settings = dict(
            {"mode": self.name, "settings": dataclasses.asdict(settings)}
            if self.record is None
            else self.record(settings, opened)
        )
        return opened

    def _work(self, settings: S, opened: Any, run: "Run") -> None:
        """Print the folder, then do the work."""
        if run.ranks.main:
            print(f"Run folder {run.folder}.", flush=True)
        self.work(settings, opened, run)

    @functools.cached_property
    def command(self) -> GroupedCommand:
        """Make the click command, with the common flags and those of the mode."""
        mode = self

        @click.command(
            f"train.py --mode={self.name}",
            cls=GroupedCommand,
            job=f"train --mode={self.name}",
            help=self.help,
        )
        @run_flags(self)
        @self.flags or options_of(self.settings)
        @click.pass_context
        def command(context: click.Context, /, **given: Any) -> Path | None:
            # a resumed run takes its settings from its record, so other flags would be ignored
            flags = flags_of(context)
            resume = given["resume"]
            extra = (
                sorted(flags.written - FREE - mode.beside_resume - ({"jobs"} if mode.jobs else set()))
                if resume is not None
                else []
            )
            if extra:
                raise ValueError(
                    f"{', '.join(map(flag, extra))} cannot be combined with --resume, which uses the settings"
                    f" of the run. Remove {'it' if len(extra) == 1 else 'them'}."
                )
            settings: Any = None if resume is not None else mode.settings_of(flags)
            if given["dry_run"]:
                settings = mode.read(resume, flags) if settings is None else settings
                shown = dataclasses.asdict(settings) if mode.shown is None else mode.shown(settings)
                click.echo(json.dumps(shown, indent=2, sort_keys=True))
                return None
            with running(given["device"], given["timeout"], mode.again) as ranks:
                if settings is None:
                    return mode.go_on(mode.read(resume, flags, ranks), resume, flags, ranks)
                return mode.start(settings, given["outdir"], flags, ranks)

        command.resolved = mode.shown_by_help
        return command

    def settings_of(self, flags: Flags) -> S:
        """Return the settings of a new run. Raises: ValueError for flags that do not fit."""
        if self.resolve is not None:
            return self.resolve(flags)
        of_run = {"outdir", "desc", "resume", "dry_run", "timeout"}
        given = {n: v for n, v in flags.items() if v is not None and n not in of_run}
        settings: S = built(self.settings, given)
        return settings

    def shown_by_help(self, context: click.Context) -> Iterable[object]:
        """Return the objects from which --help reads the defaults of flags."""
        flags = flags_of(context)
        if flags["resume"] is not None:
            return [self.read(flags["resume"], flags)]
        return [self.settings_of(flags)] if self.defaults is None else self.defaults(flags)


def flags_of(context: click.Context) -> Flags:
    """Return a command's parameters, with the names of those that stand on the command line."""
    source = ParameterSource.COMMANDLINE
    return Flags(context.params, {n for n in context.params if context.get_parameter_source(n) == source})


@contextlib.contextmanager
def running(device: str | None, timeout: float, again: str) -> "Iterator[Ranks]":
    """Open the process group of a run, and yield its ranks.

    A run that is stopped by a signal prints how to resume it (`again`), and exits with status 130.
    """
    from training.distributed import process_group

    group = process_group(choose_device(device or "auto"), timeout)
    # twice: inside, so that the group sees the exit status on leaving; outside, for a stop before it is open
    with _ends_with_130(again), sigterm_interrupts(), group as ranks, _ends_with_130(again):
        yield ranks


@contextlib.contextmanager
def _ends_with_130(again: str) -> Iterator[None]:
    """Exit with status 130, as shells do for SIGINT, if the run was stopped."""
    try:
        yield
    except (StoppedError, KeyboardInterrupt) as stopped:
        click.echo(f"Stopped{f': {stopped}' if str(stopped) else '.'} Resume with {again}.", err=True)
        sys.exit(130)


def refuse_torchrun(several: bool, flags: str) -> None:
    """Raise ValueError for several trainings under torchrun with several processes.

    Args: several: several trainings are requested; flags: that request them, for the message.
    """
    if several and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"{flags}: expected one process for several trainings, got several processes of torchrun. Start"
            " without torchrun, and use --jobs."
        )


def run_flags(mode: Mode[S]) -> Decorator:
    """Make the decorator that adds the flags of every mode."""
    least = click.IntRange(min=0)
    flags = [
        option(
            "--mode",
            group=RUN,
            metavar="NAME",
            default=mode.name,
            expose_value=False,
            help="Kind of training.",
        ),
        option(
            "--outdir",
            group=RUN,
            metavar="DIR",
            type=FOLDER,
            default=Path("runs"),
            help="Folder in which numbered run folders are made.",
        ),
        # EG3D has this flag too; it matters most for its mode, and is listed as rare for the others
        option(
            "--desc",
            group=RUN,
            rare=mode.name != "gan",
            metavar="TEXT",
            help="Text added to the name of the run folder.",
        ),
        option("--seed", group=RUN, metavar="INT", type=least, default=0, help="Random seed."),
        option(
            "--device",
            group=RUN,
            type=click.Choice(["auto", "cpu", "cuda"]),
            default="auto",
            help="Device to run on. auto: CUDA if available.",
        ),
        option(
            "--resume",
            group=RUN,
            metavar="RUN",
            type=click.Path(path_type=Path),
            help="Resume a run, with the settings that it was started with.",
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
            help="With torchrun: longest wait for another process, in minutes.",
        ),
    ]
    if mode.jobs:
        flags.append(
            option(
                "--jobs",
                group=RUN,
                metavar="INT",
                type=click.IntRange(min=1),
                default=2,
                help=f"With {mode.jobs}: number of processes, with one thread each.",
            )
        )
    return together(*flags)
