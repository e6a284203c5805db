"""Settings of a run as plain JSON and back: what a run folder keeps, and what worker processes are given."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import TypeVar

Settings = TypeVar("Settings")


def from_dict(kind: type[Settings], values: Mapping, who: str = "") -> Settings:
    """A dataclass from what `dataclasses.asdict` made of it, after a journey through JSON.

    Raises: ValueError naming a field that is unknown or of the wrong sort.
    """
    who = who or kind.__name__
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ValueError(f"{who}: expected settings of this version, got unknown ones: {', '.join(unknown)}. Start a new run.")
    return kind(**{name: _value(hints[name], value, f"{who}.{name}") for name, value in values.items()})


def _value(hint: object, value: object, who: str) -> object:
    if value is None:
        return None
    for option in _options(hint):
        if dataclasses.is_dataclass(option):
            if not isinstance(value, Mapping):
                raise ValueError(f"{who}: expected settings by name, got {value!r}. Start a new run.")
            return from_dict(option, value, who)
        if typing.get_origin(option) is tuple:
            return tuple(value)
    return value


def _options(hint: object) -> tuple:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
