"""Reference values of the online losses (flow_losses): cases found in the files, options read from their
JSON, every value to be read.
"""

import re
from collections.abc import Mapping

import numpy as np
import pytest
import torch

from tests.compat.reference import ROOT, array_names, arrays, read_json

FOLDER = ROOT / "flow_losses"
LOSS = 1e-6
GRADIENT = 1e-5


def options(name: str) -> dict:
    return read_json(FOLDER / f"{name}.json")


def cases(name: str) -> list[str]:
    """Of a file: what stands before the last part of its values' names. One that is absent counts, so that
    the skip is seen.
    """
    return sorted({key.rpartition("/")[0] for key in array_names(FOLDER / f"{name}.npz")}) or ["absent"]


def each(name: str):
    """A decorator: once for every case of a file."""
    return pytest.mark.parametrize("case", cases(name))


class Values(Mapping[str, np.ndarray]):
    """The values of a case by the last part of their names; `done` asserts that every one was asked for."""

    def __init__(self, name: str, case: str):
        prefix = f"{case}/" if case else ""
        with arrays(FOLDER / f"{name}.npz") as stored:
            self._values = {
                key.removeprefix(prefix): stored[key]
                for key in stored.files
                if key.rpartition("/")[0] == case
            }
        self._read: set[str] = set()

    def __getitem__(self, key: str) -> np.ndarray:
        value = self._values[key]
        self._read.add(key)
        return value

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __iter__(self):
        return iter(self._values)

    def __len__(self):
        return len(self._values)

    def tensor(self, key: str) -> torch.Tensor:
        return torch.as_tensor(self[key])

    def holds(self, key: str, got, tolerance: float | None = None, single: bool = False) -> None:
        """Compare, relative to the largest number: at 1e-9 what was computed in float64, at `tolerance`
        (or 1e-4) what in float32.

        Args: single: it was, though it is stored as float64.
        """
        want = self[key]
        got = np.asarray(got.detach() if isinstance(got, torch.Tensor) else got)
        limit = 1e-9 if want.dtype == np.float64 and not single else tolerance or 1e-4
        assert got.shape == want.shape, (key, got.shape, want.shape)
        if want.dtype == bool:
            assert (got == want).all(), key
        else:
            np.testing.assert_allclose(
                got.astype(float), want, rtol=limit, atol=limit * np.abs(want).max(initial=0), err_msg=key
            )

    def done(self) -> None:
        assert self._read == set(self._values), (
            f"not compared: {', '.join(sorted(set(self._values) - self._read))}"
        )


def present(name: str, case: str) -> Values:
    """The values of a case; skips the test where a set has left it out."""
    found = Values(name, case)
    return found if len(found) else pytest.skip(f"this set has no {case} in {name}")


def number(pattern: str, case: str) -> float:
    """The number that a case's name has behind a word."""
    found = re.search(pattern + r"(\d+(?:\.\d+)?(?:e-?\d+)?)", case)
    assert found, (pattern, case)
    return float(found.group(1))


def gradient(loss: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    (found,) = torch.autograd.grad(loss, at)
    return found
