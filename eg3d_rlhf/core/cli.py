"""Shared parts of all commands: options in titled groups, one-line errors, and checks at start-up.

A command is a `GroupedCommand`. Its options come from `option`, or from settings dataclasses by
`options_from_settings`. A rare setting is a setting without a flag: it is set by --set NAME=VALUE or by the
JSON file of --settings, and only --help-all lists it.

Errors that a user can correct are ValueError or OSError everywhere in the package; `user_errors` turns them
into one line on stderr. `--help` shows the defaults that the command will use (`HelpValues`).
"""

import atexit
import contextlib
import dataclasses
import difflib
import gc
import hashlib
import importlib.util
import itertools
import json
import os
import platform
import re
import select
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import click
from click.core import ParameterSource

from eg3d_rlhf.core import renamed
from training.config import knobs_of
from training.storage import ASSETS as ASSETS
from training.text_files import read_text

if TYPE_CHECKING:
    import torch  # importing torch takes 1.5 s, and commands without tensors do not need it

DISTRIBUTION = "eg3d-rlhf"
RARE = "Rare settings"  # title of the group of --set and --settings in --help, and of the list in --help-all
Command = TypeVar("Command", bound="Callable[..., Any] | click.Command")


class Decorator(Protocol):
    """A decorator of a click command, or of the function that becomes a command.

    It returns an object of the type of its argument.
    """

    def __call__(self, command: Command, /) -> Command: ...


class HelpValues:
    """Values that a command will use for its options. `--help` shows them as defaults.

    A knob (`training.config.Knob`) describes the option of one field of a settings dataclass.

    Args:
        resolved_settings: settings dataclasses, and mappings from names of parameters or fields to values. If
            several of them contain the same name, the first one counts. None if the values could not be
            determined, for example because a file does not exist.
    """

    def __init__(self, resolved_settings: Iterable[object] | None) -> None:
        self.unknown = resolved_settings is None
        self._by_name: dict[str, Any] = {}
        # by id: knobs are not hashable by content, and one knob can belong to several dataclasses
        self._by_knob: dict[int, Any] = {}
        for settings_or_mapping in resolved_settings or ():
            if isinstance(settings_or_mapping, Mapping):
                # Values that are already there come last and win: the first one given counts.
                self._by_name = {**settings_or_mapping, **self._by_name}
            else:
                self._add(settings_or_mapping)

    def _add(self, settings_instance: Any) -> None:
        """Store the values of the knobs of a settings dataclass, and of the dataclasses in its fields."""
        for field in dataclasses.fields(settings_instance):
            field_value = getattr(settings_instance, field.name)
            if dataclasses.is_dataclass(field_value):
                self._add(field_value)
            elif "knob" in field.metadata:
                self._by_knob.setdefault(id(field.metadata["knob"]), field_value)

    def lookup(self, option: "GroupedOption") -> tuple[bool, Any]:
        """Return (True, value) if the value that the command will use for an option is known, else (False,
        None).
        """
        # The name of the parameter may differ from the name of the field; mappings may use either.
        for option_name in (option.name, option.field and option.field.name):
            if option_name in self._by_name:
                return True, self._by_name[option_name]
        knob_id = id(option.field.metadata["knob"]) if option.field is not None else None
        return knob_id in self._by_knob, self._by_knob.get(knob_id)  # type: ignore[arg-type]


VALUES = f"{__name__}.values"  # key of the HelpValues in click's Context.meta while the help is written
ALL = f"{__name__}.all"  # key in click's Context.meta of a bool: True if --help-all was given


def as_shown(default_value: object) -> str:
    """Format a default value for `--help`.

    Numbers get their shortest exact form, sequences are joined by commas, and paths of bundled files are
    relative to the repository. Empty text becomes '""'.

    >>> as_shown(5.0), as_shown(1.2e-3), as_shown((0.7, 0.3))
    ('5', '0.0012', '0.7, 0.3')
    """
    if isinstance(default_value, (tuple, list)):
        return ", ".join(map(as_shown, default_value))
    if isinstance(default_value, float):
        # The short form, unless it would show another number than the one that is used.
        return f"{default_value:g}" if float(f"{default_value:g}") == default_value else repr(default_value)
    value_text = str(default_value)
    return (
        value_text.removeprefix(f"{ASSETS.parent}/")
        if value_text.startswith(str(ASSETS))
        else value_text or '""'
    )


Check = Callable[[Any], object]  # function that raises ValueError or OSError for a wrong value


class CheckedArgument(click.Argument):
    """A click argument with a `check`, see `GroupedOption`."""

    def __init__(self, *args: Any, check: Check | None = None, **kwargs: Any) -> None:
        self.check = check
        super().__init__(*args, **kwargs)


class GroupedOption(click.Option):
    """A click option that belongs to a titled group of `--help` and may set a field of a settings dataclass.

    Args:
        group: title of the group under which `--help` lists the option.
        field: dataclass field that the option sets, with a `Knob` in its metadata. None for an option that
            sets no field.
        check: function that raises ValueError or OSError for a wrong value, such as a path that does not
            exist. The command calls it after parsing, see `GroupedCommand`. It imports nothing heavy.
    """

    def __init__(
        self,
        *args: Any,
        group: str = "General",
        field: "dataclasses.Field[Any] | None" = None,
        check: Check | None = None,
        **kwargs: Any,
    ) -> None:
        self.group = group
        self.field = field
        self.check = check
        super().__init__(*args, **kwargs)

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        """Convert a value as click does. A value that was renamed since version 0.1 is an error."""
        # Other click commands have no attribute `job`, and no renamed values.
        command_words = getattr(ctx.command, "job", "")
        if isinstance(value, (str, tuple, list)) and not ctx.resilient_parsing:
            with user_errors():
                check_value(command_words, self.opts[0], value)
        return super().type_cast_value(ctx, value)

    def get_help_extra(self, ctx: click.Context) -> Any:
        """Return click's notes on the option, with the value that this command will use as the default."""
        help_notes = super().get_help_extra(ctx)
        # None if the command has no function `resolved`.
        help_values: HelpValues | None = ctx.meta.get(VALUES)
        is_resolved, default_value = help_values.lookup(self) if help_values is not None else (False, None)
        # click accepts a text for `show_default`, which it shows in place of a default.
        text_if_unset = self.show_default if isinstance(self.show_default, str) else None
        # The default of an option of a settings field is stored in the field; click's own default is None.
        if self.field is not None:
            default_value = default_value if is_resolved else self.field.default
            text_if_unset = self.field.metadata["knob"].shown
        elif not is_resolved and text_if_unset is None or self.is_flag and not self.secondary_opts:
            # Click's own default is correct for an option whose value is not resolved. It shows no default
            # for a flag without an opposite such as --no-NAME, which is correct, too.
            return help_notes
        help_notes.pop("default", None)
        # For an unset value the help shows a text such as "by resolution", which describes the behaviour.
        is_unset = default_value is None or default_value == "" and text_if_unset is not None
        default_text = text_if_unset if is_unset else as_shown(default_value)
        # A default that depends on values that could not be resolved is not shown at all.
        if default_text is not None and not (help_values is not None and help_values.unknown):
            help_notes["default"] = default_text
        return help_notes


def _with_dashes(name: str) -> str:
    """Replace underscores by dashes, as in 'gen_pose_cond' -> 'gen-pose-cond'.

    click passes the names of options and choices through this function before it compares them, so users may
    write either form.
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


def _print_version(ctx: click.Context, _: click.Parameter, is_requested: bool) -> None:
    """Print the version and end the command (click's callback of --version)."""
    # Shell completion and `prepare_help` parse with resilient_parsing: no callback may end the command then.
    if is_requested and not ctx.resilient_parsing:
        click.echo(f"{DISTRIBUTION} {version()}")
        ctx.exit()


def check_value(command_words: str, flag: str, flag_value: str | Sequence[Any]) -> None:
    """Raise ValueError for a value whose name or meaning changed since version 0.1.

    Args:
        command_words: words of the command, such as "report all".
        flag: name of the flag, for the message.
        flag_value: value of the flag, or all its values if it may be given several times.
    """
    for single_value in (flag_value,) if isinstance(flag_value, str) else flag_value:
        # Only texts were renamed.
        if not isinstance(single_value, str):
            continue
        if (old_and_new_name := renamed.new_value(command_words, flag, single_value)) is not None:
            old_name, new_name = old_and_new_name
            raise ValueError(
                f"{flag}={single_value}: the value {old_name} was renamed to {new_name}. Write {new_name}"
                " instead."
            )
        if flag == "--seeds":
            renamed.check_seeds(command_words, single_value)


def _report(message: str) -> None:
    """Print an error in one line on stderr. Under torchrun, one process prints an error that all have."""
    if _reports(message):
        click.echo(f"Error: {message}", err=True)


def _reports(message: str) -> bool:
    """Return True if this process has to print an error: always, except under torchrun."""
    # torchrun sets this variable; without it, the import of torch would only slow the error down
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return True
    from training.distributed import is_first_report

    return is_first_report(message)


class ReportsOnce(click.Command):
    """Command whose usage errors are printed by one process of torchrun instead of by all."""

    def main(  # type: ignore[override]
        self, args: Sequence[str] | None = None, *, standalone_mode: bool = True, **kwargs: Any
    ) -> Any:
        """Run the command as click does. Errors of the command line end it with exit code 2."""
        # At its end, Python searches all objects for cycles several times, which takes 1 s with the modules
        # of torch and transformers, and more on a busy machine. Frozen objects are not searched.
        atexit.unregister(gc.freeze)
        atexit.register(gc.freeze)
        if not standalone_mode or "TORCHELASTIC_RUN_ID" not in os.environ:
            return super().main(args, standalone_mode=standalone_mode, **kwargs)
        try:
            # Without standalone mode, click returns the code of an explicit exit, or the command's result.
            result = super().main(args, standalone_mode=False, **kwargs)
        except click.ClickException as error:
            if _reports(error.format_message()):
                error.show()
            sys.exit(error.exit_code)
        except click.Abort:
            sys.exit(1)
        sys.exit(result if isinstance(result, int) else 0)


class _TorchImport:
    """Import hook that prints a line on stderr when PyTorch is imported for the first time.

    Args: command_words: words of the running command, for the line.
    """

    def __init__(self, command_words: str) -> None:
        self.command_words = command_words

    def find_spec(self, module_name: str, *_: Any) -> None:
        """Print the line if the module is torch. The module is then found by the other hooks."""
        if module_name == "torch":
            sys.meta_path.remove(self)
            click.echo(f"{self.command_words}: loading PyTorch", err=True)


@contextlib.contextmanager
def announce_import(command_words: str, prints: bool = True) -> Iterator[None]:
    """Print a line on stderr as soon as the block imports PyTorch.

    The import takes two seconds and more, in which a command would print nothing. Commands that do not need
    PyTorch print no line.

    Args:
        command_words: words of the running command, for the line.
        prints: False to print nothing.
    """
    # torchrun sets RANK; one of its processes is enough
    if not prints or "torch" in sys.modules or os.environ.get("RANK", "0") != "0":
        yield
        return
    hook = _TorchImport(command_words)
    sys.meta_path.insert(0, hook)
    try:
        yield
    finally:
        # `find_spec` has removed it if PyTorch was imported
        if hook in sys.meta_path:
            sys.meta_path.remove(hook)


class GroupedCommand(ReportsOnce):
    """A click command that lists its options in groups and reports users' errors in one line.

    ValueError and OSError are users' errors. They end the command with exit code 2. Names of options may be
    written with underscores, as in EG3D.

    Rare settings (options with `Knob.rare`) have no flag. They are set by --set NAME=VALUE or by the JSON
    file of --settings. The function of the command receives their values in the same way as values of flags.
    The file may also contain values of flags. `--help-all` lists the rare settings.

    A `check` of an option or argument, such as whether a file exists, is called before the function of the
    command, which may import torch. So a wrong path is rejected at once.

    The attribute `resolved` is None, or a function that takes click's context. With the parameters that were
    given beside --help, it returns the values that the command would use (see `HelpValues`). The help shows
    these values as defaults.

    Args: job: words of the command, such as "report all". They are the key of the command in the tables of
        `core.renamed`. Empty for a command without renamed flags.
    """

    resolved: Callable[[click.Context], Iterable[object]] | None = None

    def __init__(self, *args: Any, job: str = "", **kwargs: Any) -> None:
        self.job = job
        common_settings = {
            "token_normalize_func": _with_dashes,
            "help_option_names": ["-h", "--help"],
            "max_content_width": 140,
        }
        # Settings of a command override the common ones.
        kwargs["context_settings"] = {**common_settings, **(kwargs.get("context_settings") or {})}
        super().__init__(*args, **kwargs)
        self.rare: dict[str, Any] = {
            option.name: option
            # Decorators run from the bottom up, so the attribute lists the options in reverse order.
            for option in reversed(getattr(self.callback, "rare", ()))
        }
        # Messages name --dry-run only where the command has it.
        self._has_dry_run = any(parameter.name == "dry_run" for parameter in self.params)
        self._settings_example = "the output of --dry-run" if self._has_dry_run else '{"seed": 1}'
        dry_run_text = " --dry-run prints all settings in the form of this file." if self._has_dry_run else ""
        # Only a command that has rare settings gets these two options.
        if self.rare:
            for decorate in (
                option(
                    "--set",
                    "set_",
                    group=RARE,
                    metavar="NAME=VALUE",
                    multiple=True,
                    help=(
                        f"Set one of {len(self.rare)} settings without a flag (see --help-all). May be"
                        f" repeated."
                    ),
                ),
                option(
                    "--settings",
                    group=RARE,
                    metavar="FILE.json",
                    type=click.Path(path_type=Path, dir_okay=False),
                    help=(
                        "Read settings, with or without a flag, from this JSON file. Flags take precedence"
                        f" over the file.{dry_run_text}"
                    ),
                ),
            ):
                decorate(self)
        option(
            "--help-all",
            is_flag=True,
            expose_value=False,
            hidden=not self.rare,
            help="Show the help together with the settings that have no flag, and exit.",
        )(self)
        version_flag(self)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments, and add the values of the rare settings to the parameters.

        A requested help text is written after the other arguments have been parsed, because they affect the
        defaults in it.
        """
        # True if the shell asks for completions.
        is_completing = ctx.resilient_parsing
        try:
            is_help_requested = not is_completing and self._is_help_requested(ctx, args)
            # With resilient_parsing click requires no option, and no callback ends the command before
            # the help.
            ctx.resilient_parsing |= is_help_requested
            unparsed_args = super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            # Each of the two ends the command with a more helpful message if it finds one.
            self._reject_renamed(error.option_name)
            self._reject_rare(error)
            raise
        if self.rare and not is_completing:
            with user_errors():
                self._add_rare_values(ctx)
        if is_help_requested:
            ctx.resilient_parsing = False
            click.echo(self.get_help(ctx), color=ctx.color)
            ctx.exit()
        return unparsed_args

    def _is_help_requested(self, ctx: click.Context, args: list[str]) -> bool:
        """Return True if the arguments contain --help or --help-all."""
        # The parser alone does not convert values or run callbacks.
        value_by_parameter, _, _ = self.make_parser(ctx).parse_args(args=list(args))
        ctx.meta[ALL] = bool(value_by_parameter.get("help_all"))
        help_option = self.get_help_option(ctx)
        return ctx.meta[ALL] or help_option is not None and bool(value_by_parameter.get(help_option.name))

    def _reject_renamed(self, typed_flag: str) -> None:
        """Print the new name of an option that was renamed since version 0.1, and exit with code 2.

        Returns normally for any other option.

        Args: typed_flag: the flag as it was typed, or "--set NAME" for a rare setting.
        """
        parameter_by_flag = {flag: parameter for parameter in self.params for flag in parameter.opts}
        if (new_flag := renamed.new_flag(self.job, typed_flag, parameter_by_flag)) is not None:
            with user_errors():
                raise ValueError(
                    f"{typed_flag} was renamed, so this command does not accept it. Write {new_flag} instead."
                )

    def _reject_rare(self, error: click.NoSuchOption) -> None:
        """Print how to set a rare setting whose name was typed as a flag, and exit with code 2.

        A name with a typing error is recognised, too. Returns normally for any other flag.
        """
        typed_flag = _with_dashes(error.option_name)
        # spelling as a flag -> name of the rare setting
        setting_name_by_spelling: dict[str, str] = {}
        for setting_name, setting in self.rare.items():
            for flag in setting.opts:
                setting_name_by_spelling[_with_dashes(flag)] = setting_name
        # `possibilities` are click's similar flags: one of them may be the better match. The cutoff 0.8
        # accepts typing errors only. A flag of another mode is no typing error; `ModeCommand` reports it.
        close_matches = difflib.get_close_matches(
            typed_flag, [*setting_name_by_spelling, *(error.possibilities or ())], n=1, cutoff=0.8
        )
        closest_name = setting_name_by_spelling.get(close_matches[0]) if close_matches else None
        if closest_name is None:
            return
        with user_errors():
            raise ValueError(
                f"{error.option_name}: the setting {closest_name} has no flag of its own. Write --set"
                f" {closest_name}=VALUE instead."
            ) from None

    def prepare_help(self, ctx: click.Context) -> str | None:
        """Determine the values that `GroupedOption` shows as defaults, and store them in the context.

        Returns: the reason if the values could not be determined, else None.
        """
        ctx.meta.pop(VALUES, None)
        if self.resolved is None:
            return None
        # Our documentation is generated from a context without parsed arguments. It uses the parameters of a
        # command line without any option.
        if not ctx.params:
            ctx.params = dict(self.make_context(ctx.info_name, [], resilient_parsing=True).params)
            if self.rare:
                self._add_rare_values(ctx)
        try:
            ctx.meta[VALUES] = HelpValues(self.resolved(ctx))
        # The help is shown even if, for example, a file that another flag names does not exist.
        except (ValueError, OSError, ImportError) as error:
            ctx.meta[VALUES] = HelpValues(None)
            return self._as_typed(str(error).strip())
        return None

    def _add_rare_values(self, ctx: click.Context) -> None:
        """Add the values of --settings and --set to the parameters.

        Raises: ValueError for an unknown name or a wrong value.
        """
        # The function of the command does not accept these two parameters themselves.
        assignments = ctx.params.pop("set_")  # texts NAME=VALUE
        settings_file = ctx.params.pop("settings")
        # All names that --settings may contain: the parameters of the command and the rare settings.
        option_by_name: dict[str, Any] = {
            parameter.name: parameter for parameter in self.params if parameter.name in ctx.params
        } | self.rare
        # The function of the command expects every rare setting, also those that were not given.
        ctx.params |= {
            setting_name: () if option.multiple else option.default
            for setting_name, option in self.rare.items()
        }
        value_by_name: dict[str, Any] = {}
        if settings_file is not None:
            try:
                value_by_name = json.loads(read_text(settings_file))
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"--settings: {settings_file} cannot be read as JSON: {error}. Name a JSON file, for"
                    f" example {self._settings_example}."
                ) from None
            # The file may hold a list or a number, which is valid JSON.
            if not isinstance(value_by_name, dict):
                raise ValueError(
                    f"--settings: expected a JSON object that maps names to values in {settings_file}, got a"
                    f" {type(value_by_name).__name__}. Write for example {self._settings_example}."
                )
            # Flags on the command line take precedence.
            names_on_command_line = {
                setting_name
                for setting_name in value_by_name
                if ctx.get_parameter_source(setting_name) == ParameterSource.COMMANDLINE
            }
            # --dry-run prints null for a setting that is not set, so null is skipped.
            value_by_name = {
                setting_name: setting_value
                for setting_name, setting_value in value_by_name.items()
                if setting_value is not None and setting_name not in names_on_command_line
            }
        # --set comes after the file and replaces its values.
        for assignment in assignments:
            setting_name, equals_sign, setting_value = assignment.partition("=")
            if not equals_sign:
                raise ValueError(
                    f"--set: expected NAME=VALUE, got {assignment!r}. Write --set {setting_name}=VALUE."
                )
            # Users may write the name in the form of a flag.
            setting_name = setting_name.lstrip("-").replace("-", "_")
            # A setting that may be repeated collects its values.
            is_repeatable = setting_name in option_by_name and getattr(
                option_by_name[setting_name], "multiple", False
            )
            value_by_name[setting_name] = (
                [*value_by_name.get(setting_name, ()), setting_value] if is_repeatable else setting_value
            )
        for setting_name, setting_value in value_by_name.items():
            if setting_name not in option_by_name:
                self._reject_renamed(f"--set {setting_name}")
                close_matches = difflib.get_close_matches(setting_name, option_by_name, n=1)
                suggestion = f"Did you mean {close_matches[0]}? " if close_matches else ""
                raise ValueError(
                    f"--set, --settings: {setting_name!r} is no setting of this command. {suggestion}Use one"
                    f" of the names that {'--dry-run' if self._has_dry_run else '--help-all'} prints."
                )
            if isinstance(setting_value, str):
                check_value(
                    self.job,
                    f"--set {setting_name}"
                    if setting_name in self.rare
                    else f"--{_with_dashes(setting_name)}",
                    setting_value,
                )
            # Options such as --crop take several values.
            value_count = getattr(option_by_name[setting_name], "nargs", 1)
            # --set gives them as one text: --set NAME="a b"
            setting_value = (
                setting_value.split() if value_count > 1 and isinstance(setting_value, str) else setting_value
            )
            is_list = isinstance(setting_value, list)
            if value_count > 1 and (not is_list or len(setting_value) != value_count):
                raise ValueError(
                    f"{setting_name}: expected {value_count} values, got {setting_value}. Separate the values"
                    " by spaces in --set, or write a list in the file of --settings."
                )
            try:
                # str(): values from JSON are already numbers, and click's types convert from text.
                # Each value is converted and checked as if it had come from a flag.
                converted_values = [
                    option_by_name[setting_name].type.convert(
                        str(single_value), option_by_name[setting_name], ctx
                    )
                    for single_value in (setting_value if is_list else [setting_value])
                ]
            except click.BadParameter as error:
                raise ValueError(
                    f"{setting_name}: {error.message.rstrip('.')}. --help-all lists the allowed values."
                ) from None
            has_several_values = is_list or option_by_name[setting_name].multiple
            ctx.params[setting_name] = tuple(converted_values) if has_several_values else converted_values[0]
            # `ModeCommand` and other callers distinguish given values from defaults by their source.
            ctx.set_parameter_source(setting_name, ParameterSource.COMMANDLINE)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the options by group, and the rare settings if --help-all was given."""
        reason_of_missing_defaults = self.prepare_help(ctx)
        records_by_group: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            help_record = parameter.get_help_record(ctx)
            if help_record is not None:
                # Groups in the order of their first option.
                records_by_group.setdefault(getattr(parameter, "group", "General"), []).append(help_record)
        if self.rare and ctx.meta.get(ALL):
            records_by_group[RARE] += self.rare_records(ctx)
        for title, help_records in records_by_group.items():
            with formatter.section(title):
                formatter.write_dl(help_records)
        if reason_of_missing_defaults is not None:
            formatter.write_paragraph()
            formatter.write_text(
                "Some defaults are not shown, because they could not be determined:"
                f" {reason_of_missing_defaults}"
            )

    def rare_records(self, ctx: click.Context) -> list[tuple[str, str]]:
        """Return ("NAME=VALUE", help text) for each rare setting, in the order of their declaration."""
        help_records = []
        for setting_name, setting in self.rare.items():
            metavar = "BOOL" if setting.is_flag else setting.make_metavar(ctx)
            # A help record is (names of the option, help text); the names would show a flag.
            help_records.append((f"{setting_name}={metavar}", setting.get_help_record(ctx)[1]))
        return help_records

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. Print a user's error in one line and exit with code 2.

        A line is printed before PyTorch is imported, which takes seconds.
        """
        with user_errors(self._as_typed):
            self.check_values(ctx)
            with announce_import(ctx.command_path, not ctx.params.get("dry_run")):
                return super().invoke(ctx)

    def check_values(self, ctx: click.Context) -> None:
        """Call the `check` of each option and argument with its value.

        This happens before the function of the command is called, which imports torch: that takes seconds.

        Raises: ValueError or OSError for a wrong value. The message begins with the flag of an option.
        """
        for parameter in [*self.params, *self.rare.values()]:
            check: Check | None = getattr(parameter, "check", None)
            parameter_value = ctx.params.get(parameter.name or "")
            if check is None or parameter_value is None:
                continue
            # An argument has no flag, so its check names the argument itself.
            context = (
                prefix_errors(parameter.opts[0])
                if isinstance(parameter, click.Option)
                else contextlib.nullcontext()
            )
            with context:
                # an option that may be repeated has a tuple of values
                values = parameter_value if isinstance(parameter_value, tuple) else (parameter_value,)
                for single_value in values:
                    check(single_value)

    def _as_typed(self, message: str) -> str:
        """Replace flags of rare settings in a message by --set NAME.

        Messages in the whole package name each setting by its flag, but rare settings have none.
        """
        for setting_name, setting in self.rare.items():
            for flag in setting.opts:
                # First flags with a value (--flag=3 -> --set flag=3), then flags without one. The lookarounds
                # exclude a longer flag that contains this one, such as --flag-size.
                message = re.sub(rf"(?<![\w-]){flag}(?==\S)", f"--set {setting_name}", message)
                message = re.sub(rf"(?<![\w-]){flag}(?![\w-])", f"--set {setting_name}=VALUE", message)
        return message


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
    "httpx": "judge",
    "diffusers": "sd",
    "transformers": "vision",
    "anny": "assets",
    "roma": "assets",
    "warp": "assets",
    "ninja": "ops",
}


@contextlib.contextmanager
def user_errors(edit_message: Callable[[str], str] = str) -> Iterator[None]:
    """Report ValueError, OSError and a missing optional package in one line on stderr, with exit code 2.

    Other exceptions are bugs and keep their traceback. If the reader of the output has closed the pipe, as in
    `command | head`, the BrokenPipeError is passed on to click, which ends the command silently.

    Args: edit_message: function that changes the text of a message before it is printed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            # All optional packages are in EXTRAS. An import that fails otherwise is a bug of ours.
            raise
        extra_name = EXTRAS[package]
        _report(
            f"this command needs {package}, which is not installed. Run pip install"
            f" 'eg3d-rlhf[{extra_name}]'."
        )
        sys.exit(2)
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _is_output_closed():
            raise
        _report(edit_message(str(error).strip()))
        sys.exit(2)


def check_extra(extra_name: str) -> None:
    """Raise ModuleNotFoundError if a package of an extra is not installed; `user_errors` reports it.

    A command calls this function before a long computation, which would otherwise fail at its end.

    Args: extra_name: name of an optional dependency group of pyproject.toml, such as "label".
    """
    for package, package_extra in EXTRAS.items():
        # find_spec does not import the package
        if package_extra == extra_name and importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(name=package)


def _is_output_closed() -> bool:
    """Return True if stdout or stderr is a pipe whose reader has closed it.

    A BrokenPipeError can otherwise come from a pipe to a child process, which is an error to report.
    """
    poller = select.poll()
    for stream in (sys.stdout, sys.stderr):
        # In tests the output is an object in memory without a file descriptor.
        with contextlib.suppress(OSError, ValueError):
            poller.register(stream, select.POLLOUT)
    # POLLERR on the writing end of a pipe means that no reader is left. The timeout 0 returns at once.
    return any(event & select.POLLERR for _, event in poller.poll(0))


def parse_names(flag: str, flag_value: str, allowed_names: Iterable[str]) -> list[str]:
    """Parse a comma-separated list of names. Return the names in the order of `allowed_names`.

    Args:
        flag: name of the flag, for the message.
        flag_value: value of the flag.
        allowed_names: allowed names.
    Raises: ValueError for an unknown name and for an empty list.
    """
    # The argument may be an iterator, and it is used twice.
    allowed_names = list(allowed_names)
    requested_names = {requested_name.strip() for requested_name in flag_value.split(",")} - {""}
    if not requested_names or requested_names - set(allowed_names):
        raise ValueError(
            f"{flag}: expected one or more of {', '.join(allowed_names)}, separated by commas, got"
            f" {flag_value!r}. Use only these names."
        )
    return [allowed_name for allowed_name in allowed_names if allowed_name in requested_names]


def parse_numbers(flag: str, flag_value: str, number_type: type[float] = float) -> list[Any]:
    """Parse comma-separated numbers. Empty text gives an empty list.

    Args:
        flag: name of the flag, for the message.
        flag_value: value of the flag.
        number_type: type of the numbers, float or int.
    Raises: ValueError that names the flag if a part is no number of this type.
    """
    try:
        return [number_type(number_text) for number_text in flag_value.split(",") if number_text.strip()]
    except ValueError:
        raise ValueError(
            f"{flag}: expected {'integers' if number_type is int else 'numbers'} separated by commas, got"
            f" {flag_value!r}. Write them in the form 0,1,10."
        ) from None


def seeds_of(flag: str, flag_value: str) -> tuple[int, ...]:
    """Parse a comma-separated list of training seeds. A repeated seed is returned only once.

    Args:
        flag: name of the flag, for the message.
        flag_value: value of the flag.
    Raises: ValueError that names the flag, for an empty list and for a negative seed.
    """
    seeds = tuple(dict.fromkeys(parse_numbers(flag, flag_value, int)))
    if not seeds or min(seeds) < 0:
        raise ValueError(
            f"{flag}: expected at least one training seed, none of them negative, got {flag_value!r}. Write"
            " the seeds in the form 0,1,2."
        )
    return seeds


@contextlib.contextmanager
def prefix_errors(flag: str) -> Iterator[None]:
    """Prefix the message of a ValueError or OSError that occurs in the block with a flag.

    A message that begins with the flag already stays as it is.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        message = str(error).strip()
        raise ValueError(
            message if re.match(rf"{flag}(?![\w-])", message) else f"{flag}: {message}"
        ) from error


def option(*spellings: str, group: str = "General", rare: bool = False, **kwargs: Any) -> Decorator:
    """Return a decorator that adds an option to a command.

    Args:
        spellings: spellings of the option and name of the parameter, as for `click.option`.
        group: title of the group under which `--help` lists the option.
        rare: True for a setting without a flag, which only --help-all lists (see `GroupedCommand`).
        kwargs: other arguments of `click.option`, such as `help`.
    """
    kwargs.setdefault("show_default", True)
    # click takes the default None of a required option for a value, and would not ask for the option
    if kwargs.get("required") and kwargs.get("default") is None:
        kwargs.pop("default", None)
    if not rare:
        return click.option(*spellings, cls=GroupedOption, group=group, **kwargs)

    def decorate(command: Command, /) -> Command:
        # Functions and commands accept new attributes, but their types declare none.
        untyped_command: Any = command
        # The default None marks a setting that was not given.
        untyped_command.rare = [
            *getattr(command, "rare", ()),
            GroupedOption(spellings, group=group, **{"default": None, **kwargs}),
        ]
        return command

    return decorate


def argument(name: str, check: Check, **kwargs: Any) -> Decorator:
    """Return a decorator that adds an argument whose value is checked to a command.

    Args:
        name: name of the parameter.
        check: function that raises ValueError or OSError for a wrong value, see `GroupedOption`.
        kwargs: other arguments of `click.argument`.
    """
    return click.argument(name, cls=CheckedArgument, check=check, **kwargs)


def version_flag(command: Command, /) -> Command:
    """Add `--version` to a command."""
    add_version_flag = option(
        "--version",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_print_version,
        help="Show the version and exit.",
    )
    return add_version_flag(command)


def combine_decorators(*decorators: Decorator) -> Decorator:
    """Combine decorators into one. `--help` lists their options in the order of the arguments."""

    def decorate(command: Command, /) -> Command:
        # decorators apply from the inside out
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


def mark_rare(parameter_names: Sequence[str], decorator: Decorator) -> Decorator:
    """Return a decorator that acts as `decorator`, but turns some of its options into rare settings.

    Rare settings have no flag, see `GroupedCommand`.

    Args:
        parameter_names: names of the parameters that become rare settings.
        decorator: decorator that adds options.
    """

    def decorate(command: Command, /) -> Command:
        command = decorator(command)
        untyped_command: Any = command
        # click collects the options of a function in this attribute until the command is created.
        parameters = untyped_command.__click_params__
        untyped_command.__click_params__ = [
            parameter for parameter in parameters if parameter.name not in parameter_names
        ]
        untyped_command.rare = [
            *getattr(untyped_command, "rare", ()),
            *(parameter for parameter in parameters if parameter.name in parameter_names),
        ]
        return command

    return decorate


def options_from_settings(*settings_classes: type, checks: Mapping[str, Check] | None = None) -> Decorator:
    """Return a decorator that adds one option for every knob of settings dataclasses.

    A knob (`training.config.Knob`) in the metadata of a field describes its option. A knob that several
    dataclasses share gives one option. The default of each option is None, so that a preset can decide where
    the option is not given. Knobs with `rare` become rare settings of `GroupedCommand`.

    Args:
        settings_classes: settings dataclasses.
        checks: name of a parameter -> check of its value, see `GroupedOption`.
    """
    decorator_by_name: dict[str, Any] = {}
    field_knobs = [
        field_knob for settings_class in settings_classes for field_knob in knobs_of(settings_class)
    ]
    for settings_field, value_type, knob in field_knobs:
        parameter_name = knob.name or settings_field.name
        # `flag` is False for a field that presets or the common flags of a mode set.
        if not knob.flag or parameter_name in decorator_by_name:
            continue
        spellings = (f"--{_with_dashes(parameter_name)}", *knob.flags, parameter_name)
        option_type: click.ParamType[Any] | type = (
            click.Path(path_type=Path) if value_type is Path else value_type
        )
        # `above` and `below` are exclusive bounds, `low` and `high` are inclusive. A knob has only one of the
        # two at each end.
        lower_bound = knob.low if knob.above is None else knob.above
        upper_bound = knob.high if knob.below is None else knob.below
        # Choices take precedence over the type of the field.
        if knob.choices is not None:
            option_type = click.Choice(knob.choices)
        elif value_type in (int, float) and (lower_bound, upper_bound) != (None, None):
            range_type: Any = click.IntRange if value_type is int else click.FloatRange
            option_type = range_type(
                lower_bound, upper_bound, min_open=knob.above is not None, max_open=knob.below is not None
            )
        metavar = knob.metavar or (None if knob.choices else {int: "INT", float: "FLOAT"}.get(value_type))
        decorator_by_name[parameter_name] = option(
            *spellings,
            group=knob.group,
            rare=knob.rare,
            metavar=metavar,
            type=option_type,
            default=None,
            # `GroupedOption` shows the value that the command resolves to; click would show None.
            show_default=False,
            help=knob.help,
            field=settings_field,
            check=(checks or {}).get(parameter_name),
        )
    return combine_decorators(*decorator_by_name.values())


LOG_WIDTH = 110  # letters of a line of a table that is not printed in a terminal
NARROWEST = 12  # letters; columns of a table are not made narrower than this


def aligned(cell_rows: Sequence[Sequence[str]], page_width: int | None = None) -> str:
    """Format rows of cells as text with aligned columns.

    A row has one line, unless the table is wider than the page. The widest columns are then made narrower,
    and their cells continue on further lines.

    Args:
        cell_rows: texts of the cells, with the same number of cells in every row.
        page_width: letters of a line; None: the width of the terminal, or `LOG_WIDTH` without one.
    """
    if page_width is None:
        page_width = shutil.get_terminal_size((LOG_WIDTH, 24)).columns
    # Widest cell of each column.
    column_widths = [max(map(len, column)) for column in zip(*cell_rows, strict=True)]
    # Two spaces separate columns. The widest column loses a letter until the table fits.
    while sum(column_widths) + 2 * (len(column_widths) - 1) > page_width and max(column_widths) > NARROWEST:
        column_widths[column_widths.index(max(column_widths))] -= 1
    text_lines = []
    for cell_row in cell_rows:
        # lines of each cell of this row; a cell that fits keeps its spaces
        wrapped_cells = [
            [cell] if len(cell) <= width else textwrap.wrap(cell, width)
            for cell, width in zip(cell_row, column_widths, strict=True)
        ]
        for line_cells in itertools.zip_longest(*wrapped_cells, fillvalue=""):
            padded_cells = (f"{cell:<{width}}" for cell, width in zip(line_cells, column_widths, strict=True))
            text_lines.append("  ".join(padded_cells).rstrip())
    return "\n".join(text_lines)


def choose_device(device_name: str) -> "torch.device":
    """Return the torch device of --device. 'auto' selects CUDA if it is available, else the CPU.

    For CUDA, TF32 is switched off in this process, as EG3D's training does. PyTorch computes convolutions in
    TF32 by default, which has 10 bits of mantissa: on an H100 scores of shapes differed by 1e-3 and gradients
    by 1e-2. `chosen_precision` switches it on again for flows that ask for it.

    Args: device_name: 'auto', 'cpu' or 'cuda'.
    Raises: ValueError if CUDA is requested but not available.
    """
    import torch

    if device_name == "auto":
        device_name = "cuda" if torch.cuda.is_available() else "cpu"
    if device_name == "cuda" and torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
    elif device_name == "cuda":
        raise ValueError(
            "--device: cuda was requested, but PyTorch finds no CUDA device. Use --device=cpu or"
            " --device=auto."
        )
    return torch.device(device_name)


def versions() -> dict[str, str]:
    """Return the properties of the environment that affect the last digits of results.

    These are the versions of Python, torch, numpy and scipy, the processor architecture and the number of
    torch's threads.
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
