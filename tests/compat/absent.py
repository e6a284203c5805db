"""Parametrizations over what a set of reference values holds: where it holds nothing, one skip says so."""

from collections.abc import Iterable

import pytest


def some(values: Iterable, reason: str, width: int = 1) -> list:
    """The values of a parametrization, or one that is skipped with the reason.

    Args: width: number of arguments of each.
    """
    none = pytest.param(*[None] * width, marks=pytest.mark.skip(reason=reason), id="absent")
    return list(values) or [none]
