"""Parametrize tests over what a set of reference values holds; skip with the reason where it is nothing."""

from collections.abc import Iterable

import pytest


def some(values: Iterable, reason: str, width: int = 1) -> list:
    """Return the values of a parametrization, or one value that is skipped with the reason.

    Args: width: number of arguments of each.
    """
    none = pytest.param(*[None] * width, marks=pytest.mark.skip(reason=reason), id="absent")
    return list(values) or [none]
