"""Shared parts of all commands: options in titled groups, one-line errors with exit code 2, checks at
start-up.

A command is a `GroupedCommand`. Its options come from `option`, or from settings dataclasses (`options_of`).
Errors that a user can correct are ValueError or OSError everywhere in the package; `user_errors` turns them
into one line on stderr. `--help` shows the defaults that the command will use (`HelpValues`).
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
    import torch  # importing torch takes 1.5 s, and commands without tensors do not need it

DISTRIBUTION = "eg3d-rlhf"
RARE = "Rare settings"  # title of the group that lists them in --help
Command = TypeVar("Command", bound="Callable[..., Any] | click.Command")


class Decorator(Protocol):
    """A decorator of a command, or of the function that becomes one. It keeps the type of its argument."""

    def __call__(self, command: Command, /) -> Command: ...


class HelpValues:
    """Values of parameters and knobs that a command resolves to. `--help` shows them as defaults.

    Args:
        resolved: settings dataclasses, and mappings from names of parameters or fields to values. The first
            value counts if several are given. None: the command cannot resolve its values.
    """

    def __init__(self, resolved: Iterable[object] | None) -> None:
        self.unknown = resolved is None
        self._by_name: dict[str, Any] = {}
        # by id: knobs are not hashable by content, and one knob can belong to several dataclasses
        self._by_knob: dict[int, Any] = {}
        for values in resolved or ():
            if isinstance(values, Mapping):
                # Values that are already there come last and win: the first one given counts.
                self._by_name = {**values, **self._by_name}
            else:
                self._add(values)

    def _add(self, settings: Any) -> None:
        """Add the knobs of a settings dataclass, and of the dataclasses in its fields."""
        for field in dataclasses.fields(settings):
            value = getattr(settings, field.name)
            if dataclasses.is_dataclass(value):
                self._add(value)
            elif "knob" in field.metadata:
                self._by_knob.setdefault(id(field.metadata["knob"]), value)

    def of(self, option: "GroupedOption") -> tuple[bool, Any]:
        """Return True and the value of an option if it is resolved, else False and None."""
        for name in (option.name, option.field and option.field.name):
            if name in self._by_name:
                return True, self._by_name[name]
        key = id(option.field.metadata["knob"]) if option.field is not None else None
        return key in self._by_knob, self._by_knob.get(key)  # type: ignore[arg-type]


VALUES = f"{__name__}.values"  # key of the HelpValues in a context's `meta` while help is written
ALL = f"{__name__}.all"  # key that says whether rare settings are listed, likewise


def as_shown(value: object) -> str:
    """Format a value as `--help` shows a default. Paths of bundled files are relative to the repository.

    >>> as_shown(5.0), as_shown(1.2e-3), as_shown((0.7, 0.3))
    ('5', '0.0012', '0.7, 0.3')
    """
    if isinstance(value, (tuple, list)):
        return ", ".join(map(as_shown, value))
    if isinstance(value, float):
        # The short form, unless it would show another number than the one that is used.
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    text = str(value)
    return text.removeprefix(f"{ASSETS.parent}/") if text.startswith(str(ASSETS)) else text or '""'


class GroupedOption(click.Option):
    """An option with the title under which `--help` lists it, and the field of settings that it sets.

    Args: field: a dataclass field with a knob in its metadata, or None for other options.
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
        """Return click's notes on the option. The default is the value that this command resolves to."""
        extra = super().get_help_extra(ctx)
        # None if the command has no function `resolved`.
        values: HelpValues | None = ctx.meta.get(VALUES)
        is_resolved, value = values.of(self) if values is not None else (False, None)
        # a text that click shows in place of a default
        unset = self.show_default if isinstance(self.show_default, str) else None
        # An option of a settings field: the field knows the default, click does not.
        if self.field is not None:
            value = value if is_resolved else self.field.default
            unset = self.field.metadata["knob"].shown
        elif not is_resolved and unset is None or self.is_flag and not self.secondary_opts:
            # Click shows its own default correctly in these cases
            return extra
        extra.pop("default", None)
        # Where the value is unset, the text says what happens then, for example "by resolution".
        text = unset if value is None or value == "" and unset is not None else as_shown(value)
        # A default that depends on values that could not be resolved is not shown at all.
        if text is not None and not (values is not None and values.unknown):
            extra["default"] = text
        return extra


def _with_dashes(name: str) -> str:
    """Replace underscores: 'gen_pose_cond' -> 'gen-pose-cond'. click compares names and choices in this
    form.
    """
    return name.replace("_", "-")


def version() -> str:
    """Return the version of the installed package, or of this checkout if it is not installed."""
    import importlib.metadata
    import tomllib

    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return str(tomllib.loads((ASSETS.parent / "pyproject.toml").read_text())["project"]["version"])


def _print_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    """Print the version and end the command (click's callback of --version)."""
    # Shell completion and `prepare_help` parse with resilient_parsing: no callback may end the command then.
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
    """A command that lists its options in groups and reports users' errors in one line with exit code 2.

    Users' errors are ValueError and OSError. Option names may be written with underscores, as EG3D's are.

    Rare settings (`Knob.rare`) have no flag. They are set by --set NAME=VALUE or by the JSON file of
    --settings, and reach the function like the values of flags. The file may also set every other flag.
    `--help-all` lists the rare settings.

    `resolved` returns what the parameters beside --help resolve to (see `HelpValues`), so that the defaults
    in the help are the values that this command uses.

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
        # Settings of a command override the common ones.
        kwargs["context_settings"] = {**common, **(kwargs.get("context_settings") or {})}
        super().__init__(*args, **kwargs)
        self.rare: dict[str, Any] = {
            option.name: option
            # decorators add attributes from the bottom up; reversed, the order is that of the source
            for option in reversed(getattr(self.callback, "rare", ()))
        }
        # Only a command that has rare settings gets these two options.
        if self.rare:
            for decorate in (
                option(
                    "--set",
                    "set_",
                    group=RARE,
                    metavar="NAME=VALUE",
                    multiple=True,
                    help=f"Set one of {len(self.rare)} rare settings (see --help-all). May be repeated.",
                ),
                option(
                    "--settings",
                    group=RARE,
                    metavar="FILE.json",
                    type=click.Path(path_type=Path, dir_okay=False),
                    help=(
                        "Read settings by name from this file, rare ones included. Flags take precedence"
                        " over the file. --dry-run prints all settings in this form."
                    ),
                ),
            ):
                decorate(self)
        option(
            "--help-all",
            is_flag=True,
            expose_value=False,
            hidden=not self.rare,
            help="Show the help with the rare settings and exit.",
        )(self)
        version_flag(self)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse arguments, and make parameters of the rare settings.

        If help is requested, it is written after the other arguments have been parsed, since they affect the
        defaults that it shows.
        """
        completing = ctx.resilient_parsing
        try:
            wanted = not completing and self._wants_help(ctx, args)
            # With resilient_parsing click requires no option, and no callback ends the command before the
            # help.
            ctx.resilient_parsing |= wanted
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
        """Return True if the arguments contain --help or --help-all."""
        # The parser alone does not convert values or run callbacks.
        parsed, _, _ = self.make_parser(ctx).parse_args(args=list(args))
        ctx.meta[ALL] = bool(parsed.get("help_all"))
        help_option = self.get_help_option(ctx)
        return ctx.meta[ALL] or help_option is not None and bool(parsed.get(help_option.name))

    def _reject_renamed(self, typed: str) -> None:
        """Exit with the present name of a flag or of a rare setting, "--set name", that version 0.1 had."""
        known = {name: parameter for parameter in self.params for name in parameter.opts}
        if (now := renamed.new_flag(self.job, typed, known)) is not None:
            with user_errors():
                raise ValueError(f"{typed}: is named {now} here. Use {now}.")

    def _name_rare(self, error: click.NoSuchOption) -> None:
        """Raise ValueError if a rejected flag is the name of a rare setting, or close to one."""
        # As the user typed it, with dashes.
        typed = _with_dashes(error.option_name)
        names = {
            flag: name for name, setting in self.rare.items() for flag in map(_with_dashes, setting.opts)
        }
        # The cutoff accepts typing errors. A flag of another mode is no typing error; `ModeCommand` reports
        # it.
        close_matches = difflib.get_close_matches(
            typed, [*names, *(error.possibilities or ())], n=1, cutoff=0.8
        )
        name = names.get(close_matches[0]) if close_matches else None
        if name is None:
            return
        with user_errors():
            raise ValueError(
                f"{error.option_name} is a rare setting, which has no flag. Write --set {name}=VALUE instead."
            ) from None

    def prepare_help(self, ctx: click.Context) -> str | None:
        """Resolve the parameters beside --help for `GroupedOption`. Return the reason if that is not
        possible.
        """
        ctx.meta.pop(VALUES, None)
        if self.resolved is None:
            return None
        # The documentation creates a context without parsing arguments; the defaults of the options serve
        # then.
        if not ctx.params:
            ctx.params = dict(self.make_context(ctx.info_name, [], resilient_parsing=True).params)
            if self.rare:
                self._take_rare(ctx)
        try:
            ctx.meta[VALUES] = HelpValues(self.resolved(ctx))
        # The help is shown even if, for example, a file that another flag names does not exist.
        except (ValueError, OSError, ImportError) as error:
            ctx.meta[VALUES] = HelpValues(None)
            return self._as_typed(str(error).strip())
        return None

    def _take_rare(self, ctx: click.Context) -> None:
        """Add the values of --settings and --set to the parameters.

        Raises: ValueError for an unknown name or a wrong value.
        """
        # The function of the command does not get these two parameters themselves.
        written = ctx.params.pop("set_")
        file = ctx.params.pop("settings")
        # Everything that --settings may name: all parameters of the command and the rare settings.
        options: dict[str, Any] = {
            parameter.name: parameter for parameter in self.params if parameter.name in ctx.params
        } | self.rare
        # Every rare setting is a parameter, also where it is not given.
        ctx.params |= {name: () if option.multiple else option.default for name, option in self.rare.items()}
        values: dict[str, Any] = {}
        if file is not None:
            try:
                values = json.loads(file.read_text())
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"--settings: expected JSON in {file}, got: {error}. Correct the file."
                ) from None
            # The file may hold a list or a number, which is valid JSON.
            if not isinstance(values, dict):
                raise ValueError(
                    f"--settings: expected a JSON object of settings by name in {file}, got"
                    f" {type(values).__name__}. Correct the file."
                )
            # Flags on the command line take precedence. null in the file means "not set", as --dry-run prints
            # it.
            line = {name for name in values if ctx.get_parameter_source(name) == ParameterSource.COMMANDLINE}
            values = {name: value for name, value in values.items() if value is not None and name not in line}
        # --set comes after the file and replaces its values.
        for text in written:
            name, equals, value = text.partition("=")
            if not equals:
                raise ValueError(f"--set: expected NAME=VALUE, got {text!r}. Write --set {name}=VALUE.")
            name = name.lstrip("-").replace("-", "_")
            # A setting that may be repeated collects its values.
            several = name in options and getattr(options[name], "multiple", False)
            values[name] = [*values.get(name, ()), value] if several else value
        for name, value in values.items():
            if name not in options:
                self._reject_renamed(f"--set {name}")
                close_matches = difflib.get_close_matches(name, options, n=1)
                meant = f"Did you mean {close_matches[0]}? " if close_matches else ""
                raise ValueError(
                    f"--set, --settings: {name!r} is no setting of this command. {meant}--dry-run prints all"
                    " of them; use one of their names."
                )
            if isinstance(value, str):
                check_value(
                    self.job, f"--set {name}" if name in self.rare else f"--{_with_dashes(name)}", value
                )
            # Options such as --crop take several values.
            nargs = getattr(options[name], "nargs", 1)
            # on the command line: --set NAME="a b"
            value = value.split() if nargs > 1 and isinstance(value, str) else value
            several = isinstance(value, list)
            if nargs > 1 and (not several or len(value) != nargs):
                raise ValueError(f"{name}: expected {nargs} values, got {value}. Separate them by spaces.")
            try:
                # str(): values from JSON are already numbers, and click's types convert from text.
                # Each value is converted and checked as if it had come from a flag.
                parts = [
                    options[name].type.convert(str(part), options[name], ctx)
                    for part in (value if several else [value])
                ]
            except click.BadParameter as error:
                raise ValueError(f"{name}: {error.message.rstrip('.')}. Correct the value.") from None
            ctx.params[name] = tuple(parts) if several or options[name].multiple else parts[0]
            # `ModeCommand` and others distinguish given values from defaults by their source.
            ctx.set_parameter_source(name, ParameterSource.COMMANDLINE)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the options by group, and the rare settings if --help-all was given."""
        unresolved = self.prepare_help(ctx)
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                # Groups in the order of their first option.
                groups.setdefault(getattr(parameter, "group", "General"), []).append(record)
        if self.rare and ctx.meta.get(ALL):
            groups[RARE] += self.rare_records(ctx)
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records)
        if unresolved is not None:
            formatter.write_paragraph()
            formatter.write_text(
                f"Some defaults are not shown, because they could not be determined: {unresolved}"
            )

    def rare_records(self, ctx: click.Context) -> list[tuple[str, str]]:
        """Return "NAME=VALUE" and the help text of each rare setting."""
        records = []
        # In the order of declaration.
        for name, setting in self.rare.items():
            value = "BOOL" if setting.is_flag else setting.make_metavar(ctx)
            records.append((f"{name}={value}", setting.get_help_record(ctx)[1]))
        return records

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. A user's error is printed in one line and ends it with exit code 2."""
        with user_errors(self._as_typed):
            return super().invoke(ctx)

    def _as_typed(self, text: str) -> str:
        """Replace flags of rare settings in a message by --set NAME, since these have no flag.

        Messages everywhere in the package name a setting by its flag.
        """
        for name, setting in self.rare.items():
            for flag in setting.opts:
                # first with a value (--flag=3 -> --set flag=3), then without; a longer flag with the same
                # start stays
                text = re.sub(rf"(?<![\w-]){flag}(?==\S)", f"--set {name}", text)
                text = re.sub(rf"(?<![\w-]){flag}(?![\w-])", f"--set {name}=VALUE", text)
        return text


class GroupedGroup(GroupedCommand, click.Group):
    """A grouped command that has sub-commands."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the options, then the sub-commands."""
        GroupedCommand.format_options(self, ctx, formatter)
        self.format_commands(ctx, formatter)


# Packages that are imported only when needed -> the extra of pyproject.toml that installs each.
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
    """Report ValueError, OSError and a missing optional package in one line on stderr, with exit code 2.

    Other exceptions are bugs and keep their traceback. If the reader of the output has closed the pipe, as `|
    head` does, the BrokenPipeError is passed on to click, which ends the command silently.

    Args: words: changes the text of a message before it is printed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            # a package that belongs to no extra: our bug
            raise
        extra = EXTRAS[package]
        click.echo(
            f"Error: this command needs {package}, which is not installed. Run pip install"
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
    """Raise ModuleNotFoundError (see `user_errors`) if a package of an extra is not installed.

    Called before long computations, so that they do not fail at their end.
    """
    for package, package_extra in EXTRAS.items():
        # find_spec does not import the package
        if package_extra == extra and importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(name=package)


def _nobody_reads() -> bool:
    """Return True if the reader of our output has closed its pipe.

    A BrokenPipeError can otherwise come from a pipe to a child process, which is an error to report.
    """
    poller = select.poll()
    for stream in (sys.stdout, sys.stderr):
        # In tests the output is no file and has no descriptor
        with contextlib.suppress(OSError, ValueError):
            poller.register(stream, select.POLLOUT)
    # POLLERR on the writing end of a pipe means that no reader is left. The timeout 0 returns at once.
    return any(event & select.POLLERR for _, event in poller.poll(0))


def some_of(flag: str, text: str, known: Iterable[str]) -> list[str]:
    """Parse a comma-separated list of names. Return them in the order of `known`.

    Raises: ValueError for an unknown name and for an empty list.
    """
    # May be an iterator; it is used twice.
    known = list(known)
    requested = {name.strip() for name in text.split(",") if name.strip()}
    if not requested or requested - set(known):
        raise ValueError(
            f"{flag}: expected one or more of {', '.join(known)}, separated by commas, got {text!r}."
            " Correct the list."
        )
    return [name for name in known if name in requested]


def numbers_of(flag: str, text: str, kind: type[float] = float) -> list[Any]:
    """Parse the comma-separated numbers of a flag. Raises: ValueError that names the flag."""
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(
            f"{flag}: expected numbers separated by commas, such as 0,1,10, got {text!r}. Correct the list."
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
    """Put a flag in front of the message of a user's error that occurs in the block."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f"{flag}: {str(error).strip()}") from error


def option(*names: str, group: str = "General", rare: bool = False, **kwargs: Any) -> Decorator:
    """Return `click.option` in a group, with its default shown. A rare one has no flag, see
    `GroupedCommand`.
    """
    kwargs.setdefault("show_default", True)
    if not rare:
        return click.option(*names, cls=GroupedOption, group=group, **kwargs)

    def decorate(command: Command, /) -> Command:
        # Functions and commands accept attributes, but their types declare none
        made: Any = command
        # None as default: `_take_rare` then knows whether the setting was given.
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
    """Combine decorators into one. Their flags are listed in the given order."""

    def decorate(command: Command, /) -> Command:
        # decorators apply from the inside out
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


def rarely(names: Sequence[str], decorator: Decorator) -> Decorator:
    """Return a decorator whose flags in `names` become rare settings of the command (see
    `GroupedCommand`).
    """

    def decorate(command: Command, /) -> Command:
        command = decorator(command)
        made: Any = command
        # click collects the options of a function in this attribute until the command is created.
        params = made.__click_params__
        made.__click_params__ = [parameter for parameter in params if parameter.name not in names]
        made.rare = [
            *getattr(made, "rare", ()),
            *(parameter for parameter in params if parameter.name in names),
        ]
        return command

    return decorate


def options_of(*kinds: type) -> Decorator:
    """Return a decorator that adds one option for every knob of settings dataclasses.

    A knob that several dataclasses share gives one option. The default of each option is None, so that a
    preset can decide where the option is not given. Rare knobs become rare settings of `GroupedCommand`.
    """
    made: dict[str, Any] = {}
    for field, hint, knob in (triple for kind in kinds for triple in knobs_of(kind) if triple[2].flag):
        name = knob.name or field.name
        if name in made:
            continue
        names = (f"--{_with_dashes(name)}", *knob.flags, name)
        kind: click.ParamType[Any] | type = click.Path(path_type=Path) if hint is Path else hint
        # `above` and `below` are exclusive bounds, `low` and `high` inclusive ones
        # The tighter notation of the two wins; a knob has only one of them.
        low = knob.low if knob.above is None else knob.above
        high = knob.high if knob.below is None else knob.below
        # Choices take precedence over the type of the field.
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
            # `GroupedOption` shows the value that the command resolves to; click would show None.
            show_default=False,
            help=knob.help,
            field=field,
        )
    return together(*made.values())


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Format rows of cells as lines with aligned columns."""
    # Widest cell of each column.
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def choose_device(name: str) -> "torch.device":
    """Return the device for 'auto', 'cpu' or 'cuda'. 'auto' is CUDA if it is available.

    Raises: ValueError if CUDA is requested but not available.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: this machine has no CUDA device. Use --device=cpu or --device=auto.")
    return torch.device(name)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that affect results, with the machine and
    threads.
    """
    import numpy
    import scipy
    import torch

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "scipy": scipy.__version__,
        "machine": platform.machine(),  # e.g. x86_64
        # the order of sums in torch depends on the number of threads
        "threads": str(torch.get_num_threads()),
    }


def file_hash(path: str | Path) -> str:
    """Compute the SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
