"""A mode of train.py, and whatever else runs in a folder: its settings, what they open, and its work.

    CLIMB = Mode(
        name="climb",
        help="Climb the reward from one seed.",
        settings=ClimbConfig,
        open=open_climb,
        work=climb,
    )
    MODES.add("climb", CLIMB)

    def open_climb(settings: ClimbConfig, run: Run):       raises ValueError before there is a folder; notes
                                                           its files in run.inputs
    def climb(settings: ClimbConfig, opened, run: Run):    what is left to do of the run, new or resumed

Folder, lock, record, --resume, --dry-run, --outdir, --desc, --seed, --device, --timeout, signals and ranks
come from here.
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

if TYPE_CHECKING:  # they bring torch, which --help is spared
    from _typeshed import DataclassInstance

    from eg3d_rlhf.experiments.run import Run
    from training.distributed import Ranks

S = TypeVar("S", bound="DataclassInstance")
RUN = "Run"
FOLDER = click.Path(path_type=Path, file_okay=False)
FREE = frozenset({"resume", "device", "timeout", "dry_run"})  # what may stand beside --resume


class Flags(dict[str, Any]):
    """What a command line says, by name; None: not given, so that a preset or a problem may decide.

    Args: written: names that it holds.
    """

    def __init__(self, values: Mapping[str, Any] = {}, written: Iterable[str] = ()):  # noqa: B006 (only read)
        super().__init__(values)
        self.written = frozenset(written)

    def some(self, names: Mapping[str, str]) -> dict[str, Any]:
        """Those that are given, under the names of fields. Args: names: of flags -> of fields."""
        return {field: self[name] for name, field in names.items() if self.get(name) is not None}

    def of(self, kind: type) -> dict[str, Any]:
        """What is given of the knobs of a settings dataclass, by field."""
        knobs = {
            field.name: field.metadata["knob"]
            for field in dataclasses.fields(kind)
            if "knob" in field.metadata
        }
        return self.some({knob.name or name: name for name, knob in knobs.items()})

    def belong(self, names: Iterable[str], applies: bool, where: str) -> None:
        """Refuse those of `names` that were written where they do not apply.

        Raises: ValueError naming them, and `where` they do.
        """
        extra = [flag(name) for name in names if name in self.written]
        if extra and not applies:
            raise ValueError(
                f"{', '.join(extra)}: belongs to {where}, and would have no effect here. Leave it out."
            )


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mode(Generic[S]):
    """One mode. Only name, help, settings, open and work have no default."""

    name: str
    help: str
    settings: type[S]  # a dataclass of knobs, maybe nested
    # what the settings name, checked before there is a folder; files go into run.inputs
    open: Callable[[S, "Run"], Any]
    work: Callable[[S, Any, "Run"], None]  # what is left to do of a run
    title: Callable[[S, Any], str] | None = None  # (settings, opened) -> name of the folder; None: the mode's
    flags: Decorator | None = None  # a decorator: flags of its own; None: one for each knob
    resolve: Callable[[Flags], S] | None = None  # settings of a command line; None: knobs by name
    # (settings, opened) -> what is recorded; None: the mode's name and the settings
    record: Callable[[S, Any], Mapping[str, Any]] | None = None
    # settings of the run that --resume names; None: inverse of `record`
    recorded: Callable[[Path, Flags, "Ranks"], S] | None = None
    shown: Callable[[S], Mapping[str, Any]] | None = None  # what --dry-run prints; None: the settings
    # what --help takes the defaults of flags from, see core.cli.HelpValues; None: the settings
    defaults: Callable[[Flags], Iterable[object]] | None = None
    on_cpu: Callable[[S], bool] | None = None  # whether --device=auto means the CPU
    jobs: str = ""  # what --jobs shares among processes; "": nothing, and there is no such flag
    beside_resume: frozenset[str] = frozenset()  # flags of its own that may stand beside --resume
    # settings that a resumed run may change; None: all, they come from its state
    changes: frozenset[str] | None = frozenset()
    again: str = "--resume=RUN"  # what goes on with a run that was stopped
    # whether a folder that was begun has something to go on from
    resumable: Callable[[Path], bool] = lambda folder: True

    def start(
        self, settings: S, outdir: Path, flags: Flags | None = None, ranks: "Ranks | None" = None
    ) -> Path:
        """A new run in `outdir`, or, after a restart by torchrun, the one that this launch had begun. Returns
        its folder.
        """
        from eg3d_rlhf.experiments.run import begun_by_this_launch, next_free
        from training.distributed import SINGLE

        flags = flags or Flags()
        ranks = ranks or SINGLE
        begun = begun_by_this_launch(outdir, ranks)
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
        """A new run in a folder, or one named by what was opened; where it is taken, in the next free one.
        Returns it.
        """
        from eg3d_rlhf.experiments.run import claim

        run = self._run(folder if isinstance(folder, Path) else Path(), settings, flags, ranks)
        opened = self._open(settings, run)
        # now: a mistake leaves no folder behind
        run.folder = claim(folder if isinstance(folder, Path) else folder(opened), run.ranks)
        with run:
            run.begin()
            self._work(settings, opened, run)
        return run.folder

    def go_on(
        self, settings: S, source: Path, flags: Flags | None = None, ranks: "Ranks | None" = None
    ) -> Path:
        """Go on with a run where it was. Args: source: its folder, or a state in it. Returns the folder.

        Raises: ValueError where files that it started from, or settings, have changed.
        """
        run = self._run(source if source.is_dir() else source.parent, settings, flags, ranks)
        run.resumed = source
        with run:
            opened = self._open(settings, run)
            run.resume(self.changes)
            self._work(settings, opened, run)
        return run.folder

    def read(self, source: Path, flags: Flags | None = None, ranks: "Ranks | None" = None) -> S:
        """Settings of a run. Raises: FileNotFoundError; ValueError for a folder of another mode."""
        from eg3d_rlhf.experiments.run import OPTIONS, recorded_by
        from training.distributed import SINGLE

        if self.recorded is not None:
            return self.recorded(source, flags or Flags(), ranks or SINGLE)
        return from_dict(self.settings, recorded_by(source, self.name)["settings"], str(source / OPTIONS))

    def _run(self, folder: Path, settings: S, flags: Flags | None, ranks: "Ranks | None") -> "Run":
        from eg3d_rlhf.experiments.run import Run
        from training.distributed import SINGLE

        flags = flags or Flags()
        ranks = ranks or SINGLE
        name = flags.get("device") or "auto"
        if name == "auto" and self.on_cpu is not None and self.on_cpu(settings):
            name = "cpu"
        device = ranks.device if ranks.world > 1 else choose_device(name)
        return Run(folder, {}, ranks=ranks, device=str(device), jobs=flags.get("jobs") or 1, flags=flags)

    def _open(self, settings: S, run: "Run") -> Any:
        opened = self.open(settings, run)
        run.settings = dict(
            {"mode": self.name, "settings": dataclasses.asdict(settings)}
            if self.record is None
            else self.record(settings, opened)
        )
        return opened

    def _work(self, settings: S, opened: Any, run: "Run") -> None:
        if run.ranks.main:
            print(f"Run folder {run.folder}.", flush=True)
        self.work(settings, opened, run)

    @functools.cached_property
    def command(self) -> GroupedCommand:
        """The click command: the common flags and the mode's own."""
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
            flags = flags_of(context)
            resume = given["resume"]
            extra = (
                sorted(flags.written - FREE - mode.beside_resume - ({"jobs"} if mode.jobs else set()))
                if resume is not None
                else []
            )
            if extra:
                raise ValueError(
                    f"{', '.join(map(flag, extra))}: expected the run's own with --resume, got others. Leave"
                    " out."
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
        """Return what --help takes the defaults of flags from."""
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
    """The ranks of a run. One that was stopped says what goes on with it (`again`),
    and ends with status 130.
    """
    from training.distributed import process_group

    group = process_group(choose_device(device or "auto"), timeout)
    # Inside the group once more: it ends the process with the status that it sees leaving.
    with _ends_with_130(again), sigterm_interrupts(), group as ranks, _ends_with_130(again):
        yield ranks


@contextlib.contextmanager
def _ends_with_130(again: str) -> Iterator[None]:
    """Exit with status 130, as shells do for SIGINT, where a run was stopped."""
    try:
        yield
    except (StoppedError, KeyboardInterrupt) as stopped:
        click.echo(f"Stopped{f': {stopped}' if str(stopped) else '.'} {again} goes on from there.", err=True)
        sys.exit(130)


def refuse_torchrun(several: bool, flags: str) -> None:
    """Raises: ValueError where several trainings meet torchrun's several processes.

    Args: flags: that ask for several.
    """
    if several and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"{flags}: expected one process for several trainings, got torchrun's several. Use --jobs."
        )


def run_flags(mode: Mode[S]) -> Decorator:
    """A decorator: what every mode takes."""
    least = click.IntRange(min=0)
    flags = [
        option(
            "--mode",
            group=RUN,
            metavar="NAME",
            default=mode.name,
            expose_value=False,
            help="What is trained.",
        ),
        option(
            "--outdir",
            group=RUN,
            metavar="DIR",
            type=FOLDER,
            default=Path("runs"),
            help="Runs are numbered inside it.",
        ),
        # a flag of EG3D's
        option(
            "--desc",
            group=RUN,
            rare=mode.name != "gan",
            metavar="TEXT",
            help="Added to the run folder's name.",
        ),
        option("--seed", group=RUN, metavar="INT", type=least, default=0, help="Random seed."),
        option(
            "--device",
            group=RUN,
            type=click.Choice(["auto", "cpu", "cuda"]),
            default="auto",
            help="Where to run.",
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
            help="With torchrun: longest wait for another process.",
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
                help=f"With {mode.jobs}: processes, of one thread each.",
            )
        )
    return together(*flags)
