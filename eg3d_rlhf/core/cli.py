"""What every command of the project shares: options in titled groups, one-line errors with exit code 2,
start-up checks.
"""

import contextlib
import dataclasses
import difflib
import hashlib
import importlib.util
import json
import platform
import re
import select
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import click
from click.core import ParameterSource

from eg3d_rlhf.core import renamed
from training.config import knobs_of
from training.storage import ASSETS as ASSETS

if TYPE_CHECKING:
    import torch  # a second and a half, which commands without tensors are spared

DISTRIBUTION = "eg3d-rlhf"
RARE = "Rare settings"  # title under which --help lists them
Command = TypeVar("Command", bound="Callable[..., Any] | click.Command")


class Decorator(Protocol):
    """A decorator of a command or of the function that becomes one; it keeps the type."""

    def __call__(self, command: Command, /) -> Command: ...


class HelpValues:
    """Values that a command resolves to, by parameter and by knob, for the defaults that `--help` shows.

    Args: resolved: settings dataclasses, and mappings from the names of parameters or fields to values. Where
        several hold a value, the first one counts. None: the command cannot resolve them.
    """

    def __init__(self, resolved: Iterable[object] | None) -> None:
        self.unknown = resolved is None
        self._by_name: dict[str, Any] = {}
        self._by_knob: dict[int, Any] = {}
        for found in resolved or ():
            if isinstance(found, Mapping):
                self._by_name = {**found, **self._by_name}
            else:
                self._add(found)

    def _add(self, settings: Any) -> None:
        for field in dataclasses.fields(settings):
            value = getattr(settings, field.name)
            if dataclasses.is_dataclass(value):
                self._add(value)
            elif "knob" in field.metadata:
                self._by_knob.setdefault(id(field.metadata["knob"]), value)

    def of(self, option: "GroupedOption") -> tuple[bool, Any]:
        """Return whether the value of an option is known, and the value."""
        for name in (option.name, option.field and option.field.name):
            if name in self._by_name:
                return True, self._by_name[name]
        key = id(option.field.metadata["knob"]) if option.field is not None else None
        return key in self._by_knob, self._by_knob.get(key)  # type: ignore[arg-type]


VALUES = f"{__name__}.values"  # in a context's `meta`, while help is written: HelpValues
ALL = f"{__name__}.all"  # likewise: whether rare settings are listed


def as_shown(value: object) -> str:
    """Write a value as `--help` shows a default; bundled files by their place in the repository.

    >>> as_shown(5.0), as_shown(1.2e-3), as_shown((0.7, 0.3))
    ('5', '0.0012', '0.7, 0.3')
    """
    if isinstance(value, (tuple, list)):
        return ", ".join(map(as_shown, value))
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    text = str(value)
    return text.removeprefix(f"{ASSETS.parent}/") if text.startswith(str(ASSETS)) else text or '""'


class GroupedOption(click.Option):
    """An option that remembers under which title `--help` lists it, and which field of settings it sets.

    Args: field: a field with a knob, whose option it is.
    """

    def __init__(
        self,
        *args: Any,
        group: str = "General",
        field: "dataclasses.Field[Any] | None" = None,
        **kwargs: Any,
    ) -> None:
        self.group = group
        self.field = field
        super().__init__(*args, **kwargs)

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        """Convert as click does, after rejecting a value that version 0.1 named otherwise."""
        job = getattr(ctx.command, "job", "")
        if isinstance(value, (str, tuple, list)) and not ctx.resilient_parsing:
            with user_errors():
                check_value(job, self.opts[0], value)
        return super().type_cast_value(ctx, value)

    def get_help_extra(self, ctx: click.Context) -> Any:
        """Return click's notes, with the value that this command resolves to as the default."""
        extra = super().get_help_extra(ctx)
        values: HelpValues | None = ctx.meta.get(VALUES)
        known, value = values.of(self) if values is not None else (False, None)
        unset = self.show_default if isinstance(self.show_default, str) else None
        if self.field is not None:
            value = value if known else self.field.default
            unset = self.field.metadata["knob"].shown
        elif not known and unset is None or self.is_flag and not self.secondary_opts:
            return extra  # click knows the default
        extra.pop("default", None)
        text = unset if value is None or value == "" and unset is not None else as_shown(value)
        if text is not None and not (values is not None and values.unknown):
            extra["default"] = text
        return extra


def _with_dashes(name: str) -> str:
    """'gen_pose_cond' -> 'gen-pose-cond': click compares names and choices after this."""
    return name.replace("_", "-")


def version() -> str:
    """Return the version of the package: of what is installed, else of this checkout."""
    import importlib.metadata
    import tomllib

    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return str(tomllib.loads((ASSETS.parent / "pyproject.toml").read_text())["project"]["version"])


def _print_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        click.echo(f"{DISTRIBUTION} {version()}")
        ctx.exit()


def check_value(job: str, flag: str, value: str | Sequence[Any]) -> None:
    """Raise ValueError for a value that version 0.1 named otherwise, or meant otherwise.

    Args: job: words of the command; value: of one flag, or those of one that was given several times.
    """
    for text in (value,) if isinstance(value, str) else value:
        if not isinstance(text, str):
            continue
        if (names := renamed.new_value(job, flag, text)) is not None:
            raise ValueError(f"{flag}={text}: {names[0]} is named {names[1]} now. Use {names[1]}.")
        if flag == "--seeds":
            renamed.check_seeds(job, text)


class GroupedCommand(click.Command):
    """Lists options under their groups and turns users' errors (ValueError, OSError) into one line and exit
    code 2.

    Option names may be written with underscores, as EG3D's are. Rare settings (`Knob.rare`) come by --set
    NAME=VALUE or from the JSON of --settings, and reach the function as if they were flags; so does every
    other flag that such a file names. `--help-all` lists them.

    `resolved` gives what the parameters beside --help resolve to, see `HelpValues`: the defaults that are
    shown are then the values that this command uses.

    Args: job: words of the command in `core.renamed`, where a flag of it had another name in version 0.1.
    """

    resolved: Callable[[click.Context], Iterable[object]] | None = None

    def __init__(self, *args: Any, job: str = "", **kwargs: Any) -> None:
        self.job = job
        common = {
            "token_normalize_func": _with_dashes,
            "help_option_names": ["-h", "--help"],
            "max_content_width": 140,
        }
        kwargs["context_settings"] = {**common, **(kwargs.get("context_settings") or {})}
        super().__init__(*args, **kwargs)
        self.rare: dict[str, Any] = {
            option.name: option
            for option in reversed(getattr(self.callback, "rare", ()))  # as declared
        }
        if self.rare:
            for decorate in (
                option(
                    "--set",
                    "set_",
                    group=RARE,
                    metavar="NAME=VALUE",
                    multiple=True,
                    help=f"One of {len(self.rare)} settings that --help-all lists. May be given again.",
                ),
                option(
                    "--settings",
                    group=RARE,
                    metavar="FILE.json",
                    type=click.Path(path_type=Path, dir_okay=False),
                    help=(
                        "Settings by name, these among them; flags go before them, and --dry-run prints all."
                    ),
                ),
            ):
                decorate(self)
        option(
            "--help-all",
            is_flag=True,
            expose_value=False,
            hidden=not self.rare,
            help="Show the rare settings as well and exit.",
        )(self)
        version_flag(self)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse; rare settings become parameters as the others are. Help is written after what stands beside
        it has been read.
        """
        completing = ctx.resilient_parsing
        try:
            wanted = not completing and self._wants_help(ctx, args)
            ctx.resilient_parsing |= wanted  # nothing is required, and no callback ends the command
            rest = super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            self._reject_renamed(error.option_name)
            self._name_rare(error)
            raise
        if self.rare and not completing:
            with user_errors():
                self._take_rare(ctx)
        if wanted:
            ctx.resilient_parsing = False
            click.echo(self.get_help(ctx), color=ctx.color)
            ctx.exit()
        return rest

    def _wants_help(self, ctx: click.Context, args: list[str]) -> bool:
        given, _, _ = self.make_parser(ctx).parse_args(args=list(args))
        ctx.meta[ALL] = bool(given.get("help_all"))
        help_option = self.get_help_option(ctx)
        return ctx.meta[ALL] or help_option is not None and bool(given.get(help_option.name))

    def _reject_renamed(self, typed: str) -> None:
        """Exit with the present name of a flag or of a rare setting, "--set name", that version 0.1 had."""
        known = {name: parameter for parameter in self.params for name in parameter.opts}
        if (now := renamed.new_flag(self.job, typed, known)) is not None:
            with user_errors():
                raise ValueError(f"{typed}: is named {now} here. Use {now}.")

    def _name_rare(self, error: click.NoSuchOption) -> None:
        """Raise the error of a flag that is, or is nearly, the name of a rare setting."""
        typed = _with_dashes(error.option_name)
        names = {
            flag: name for name, setting in self.rare.items() for flag in map(_with_dashes, setting.opts)
        }
        # nearly: a slip of the keys, not the flag of another mode, which `ModeCommand` names
        near = difflib.get_close_matches(typed, [*names, *(error.possibilities or ())], n=1, cutoff=0.8)
        name = names.get(near[0]) if near else None
        if name is None:
            return
        with user_errors():
            raise ValueError(
                f"{error.option_name}: expected --set {name}=VALUE for a rare setting, got a flag. Write"
                " that."
            ) from None

    def prepare_help(self, ctx: click.Context) -> str | None:
        """Resolve what stands beside --help, for `GroupedOption`. Returns why that is not possible."""
        ctx.meta.pop(VALUES, None)
        if self.resolved is None:
            return None
        if not ctx.params:  # a context of its own, as the documentation makes it
            ctx.params = dict(self.make_context(ctx.info_name, [], resilient_parsing=True).params)
            if self.rare:
                self._take_rare(ctx)
        try:
            ctx.meta[VALUES] = HelpValues(self.resolved(ctx))
        except (ValueError, OSError, ImportError) as error:
            ctx.meta[VALUES] = HelpValues(None)
            return self._as_typed(str(error).strip())
        return None

    def _take_rare(self, ctx: click.Context) -> None:
        """Put what --settings and --set say among the parameters.

        Raises: ValueError for an unknown name or a wrong value.
        """
        written = ctx.params.pop("set_")
        file = ctx.params.pop("settings")
        options: dict[str, Any] = {
            parameter.name: parameter for parameter in self.params if parameter.name in ctx.params
        } | self.rare
        ctx.params |= {name: () if option.multiple else option.default for name, option in self.rare.items()}
        values: dict[str, Any] = {}
        if file is not None:
            try:
                values = json.loads(file.read_text())
            except (OSError, ValueError) as error:
                raise ValueError(f"--settings: expected JSON in {file}, got: {error}. Correct it.") from None
            if not isinstance(values, dict):
                raise ValueError(
                    f"--settings: expected settings by name in {file}, got {type(values).__name__}."
                    " Correct it."
                )
            line = {name for name in values if ctx.get_parameter_source(name) == ParameterSource.COMMANDLINE}
            values = {name: value for name, value in values.items() if value is not None and name not in line}
        for text in written:
            name, equals, value = text.partition("=")
            if not equals:
                raise ValueError(f"--set: expected NAME=VALUE, got {text!r}. Write --set {name}=VALUE.")
            name = name.lstrip("-").replace("-", "_")
            several = name in options and getattr(options[name], "multiple", False)
            values[name] = [*values.get(name, ()), value] if several else value
        for name, value in values.items():
            if name not in options:
                self._reject_renamed(f"--set {name}")
                near = difflib.get_close_matches(name, options, n=1)
                meant = f"Did you mean {near[0]}? " if near else ""
                raise ValueError(
                    f"--set, --settings: expected a setting, got {name!r}. {meant}--dry-run prints them all."
                )
            if isinstance(value, str):
                check_value(
                    self.job, f"--set {name}" if name in self.rare else f"--{_with_dashes(name)}", value
                )
            nargs = getattr(options[name], "nargs", 1)
            value = value.split() if nargs > 1 and isinstance(value, str) else value
            several = isinstance(value, list)
            if nargs > 1 and (not several or len(value) != nargs):
                raise ValueError(
                    f"{name}: expected {nargs} values, got {value}. Write them with spaces between."
                )
            try:
                parts = [
                    options[name].type.convert(str(part), options[name], ctx)
                    for part in (value if several else [value])
                ]
            except click.BadParameter as error:
                raise ValueError(f"{name}: {error.message.rstrip('.')}. Correct it.") from None
            ctx.params[name] = tuple(parts) if several or options[name].multiple else parts[0]
            ctx.set_parameter_source(name, ParameterSource.COMMANDLINE)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the options by group, and with --help-all the rare settings."""
        unresolved = self.prepare_help(ctx)
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                groups.setdefault(getattr(parameter, "group", "General"), []).append(record)
        if self.rare and ctx.meta.get(ALL):
            groups[RARE] += self.rare_records(ctx)
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records)
        if unresolved is not None:
            formatter.write_paragraph()
            formatter.write_text(f"Defaults that depend on what is missing are not shown. {unresolved}")

    def rare_records(self, ctx: click.Context) -> list[tuple[str, str]]:
        """Return NAME=VALUE and the help of each rare setting."""
        records = []
        for name, setting in self.rare.items():
            value = "BOOL" if setting.is_flag else setting.make_metavar(ctx)
            records.append((f"{name}={value}", setting.get_help_record(ctx)[1]))
        return records

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; see the class."""
        with user_errors(self._as_typed):
            return super().invoke(ctx)

    def _as_typed(self, text: str) -> str:
        """Code names every setting by its flag; rare ones are typed otherwise."""
        for name, setting in self.rare.items():
            for flag in setting.opts:
                text = re.sub(rf"(?<![\w-]){flag}(?==\S)", f"--set {name}", text)
                text = re.sub(rf"(?<![\w-]){flag}(?![\w-])", f"--set {name}=VALUE", text)
        return text


class GroupedGroup(GroupedCommand, click.Group):
    """A grouped command with sub-commands."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List flags, then sub-commands."""
        GroupedCommand.format_options(self, ctx, formatter)
        self.format_commands(ctx, formatter)


# packages that are imported when they are needed, and the extra of pyproject.toml that brings each
EXTRAS = {
    **dict.fromkeys(("fastapi", "starlette", "granian", "sqlalchemy", "jinja2", "segno"), "label"),
    "psycopg": "postgres",
    "captum": "attribution",
    "umap": "attribution",
    "manifold3d": "solid",
    "igl": "solid",
    "diffusers": "sd",
    "transformers": "vision",
    "anny": "assets",
    "roma": "assets",
    "warp": "assets",
    "ninja": "ops",
}


@contextlib.contextmanager
def user_errors(words: Callable[[str], str] = str) -> Iterator[None]:
    """Translate ValueError, OSError and a missing extra into one line on stderr and exit code 2; bugs keep
    their traceback.

    Where nobody reads on, as after `| head`, the BrokenPipeError goes to click, which ends without a word.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        extra = EXTRAS[package]
        click.echo(
            f"Error: this job needs the extra {extra}: {package} is not installed. Run pip install"
            f" 'eg3d-rlhf[{extra}]'.",
            err=True,
        )
        sys.exit(2)
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            raise
        click.echo(f"Error: {words(str(error).strip())}", err=True)
        sys.exit(2)


def check_extra(extra: str) -> None:
    """Before what takes long, raise ModuleNotFoundError, see `user_errors`, where a package of an extra is
    not installed.
    """
    for package, brought in EXTRAS.items():
        if brought == extra and importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(name=package)


def _nobody_reads() -> bool:
    """Whether the output's pipe has no reader any more;
    else it was a pipe to a process of ours that broke.
    """
    watch = select.poll()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a test's output is no file
            watch.register(stream, select.POLLOUT)
    return any(event & select.POLLERR for _, event in watch.poll(0))


def some_of(flag: str, text: str, known: Iterable[str]) -> list[str]:
    """The names of a comma-separated list, in the order of those that are known.

    Raises: ValueError for others, and for none.
    """
    known = list(known)
    wanted = {name.strip() for name in text.split(",") if name.strip()}
    if not wanted or wanted - set(known):
        raise ValueError(f"{flag}: expected some of {', '.join(known)}, got {text!r}. Correct the list.")
    return [name for name in known if name in wanted]


def numbers_of(flag: str, text: str, kind: type[float] = float) -> list[Any]:
    """Comma-separated values of a flag. Raises: ValueError naming the flag."""
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(
            f"{flag}: expected numbers with commas between them, such as 0,1,10, got {text!r}. Correct the"
            " list."
        ) from None


def seeds_of(flag: str, text: str) -> tuple[int, ...]:
    """Return the training seeds of a comma-separated list, each once.

    Raises: ValueError naming the flag, for an empty list and for a negative seed.
    """
    seeds = tuple(dict.fromkeys(numbers_of(flag, text, int)))
    if not seeds or min(seeds) < 0:
        raise ValueError(f"{flag}: expected training seeds >= 0 with commas, such as 0,1,2, got {text!r}.")
    return seeds


@contextlib.contextmanager
def naming(flag: str) -> Iterator[None]:
    """Put the flag that is at fault in front of a user's error."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f"{flag}: {str(error).strip()}") from error


def option(*names: str, group: str = "General", rare: bool = False, **kwargs: Any) -> Decorator:
    """`click.option` in a group, with the default shown; a rare one is no flag, see `GroupedCommand`."""
    kwargs.setdefault("show_default", True)
    if not rare:
        return click.option(*names, cls=GroupedOption, group=group, **kwargs)

    def decorate(command: Command, /) -> Command:
        made: Any = command  # functions and commands alike take attributes
        made.rare = [
            *getattr(command, "rare", ()),
            GroupedOption(names, group=group, **{"default": None, **kwargs}),
        ]
        return command

    return decorate


def version_flag(command: Command, /) -> Command:
    """Add `--version` to a command."""
    flag = option(
        "--version",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_print_version,
        help="Show the version and exit.",
    )
    return flag(command)


def together(*decorators: Decorator) -> Decorator:
    """One decorator of several; their flags are listed in this order."""

    def decorate(command: Command, /) -> Command:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


def rarely(names: Sequence[str], decorator: Decorator) -> Decorator:
    """The decorator, with those of its flags that a command lists rarely told to `GroupedCommand` as rare."""

    def decorate(command: Command, /) -> Command:
        command = decorator(command)
        made: Any = command
        params = made.__click_params__
        made.__click_params__ = [parameter for parameter in params if parameter.name not in names]
        made.rare = [
            *getattr(made, "rare", ()),
            *(parameter for parameter in params if parameter.name in names),
        ]
        return command

    return decorate


def options_of(*kinds: type) -> Decorator:
    """One option for every knob of settings dataclasses, one alone where several share it; None where it is
    not given, so that a preset may decide. Rare knobs are told to `GroupedCommand`.
    """
    made: dict[str, Any] = {}
    for field, hint, knob in (triple for kind in kinds for triple in knobs_of(kind) if triple[2].flag):
        name = knob.name or field.name
        if name in made:
            continue
        names = (f"--{_with_dashes(name)}", *knob.flags, name)
        kind: click.ParamType[Any] | type = click.Path(path_type=Path) if hint is Path else hint
        low = knob.low if knob.above is None else knob.above
        high = knob.high if knob.below is None else knob.below
        if knob.choices is not None:
            kind = click.Choice(knob.choices)
        elif hint in (int, float) and (low, high) != (None, None):
            limited: Any = click.IntRange if hint is int else click.FloatRange
            kind = limited(low, high, min_open=knob.above is not None, max_open=knob.below is not None)
        metavar = knob.metavar or (None if knob.choices else {int: "INT", float: "FLOAT"}.get(hint))
        made[name] = option(
            *names,
            group=knob.group,
            rare=knob.rare,
            metavar=metavar,
            type=kind,
            default=None,
            show_default=False,
            help=knob.help,
            field=field,
        )
    return together(*made.values())


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines, the columns one below another."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def choose_device(name: str) -> "torch.device":
    """'auto', 'cpu' or 'cuda' to a device.

    Raises: ValueError where CUDA is asked for and missing.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "--device: expected a CUDA device, got a machine without one. Use --device=cpu or --device=auto."
        )
    return torch.device(name)


def versions() -> dict[str, str]:
    import numpy
    import scipy
    import torch

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "scipy": scipy.__version__,
        "machine": platform.machine(),
        "threads": str(torch.get_num_threads()),
    }


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
