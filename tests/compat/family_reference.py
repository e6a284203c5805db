"""Reading the reference values of families of flow generators: cases are found, and what a set leaves out is
skipped with the reason.
"""

import ast
import contextlib
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from eg3d_rlhf.models.trellis import blocks
from tests.compat.absent import some
from tests.compat.family_tolerances import ADAPTED, GRADIENT, HALF
from tests.compat.reference import ROOT


class Case:
    """A folder with case.json and values.npz."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.facts = json.loads((folder / "case.json").read_text())
        path = folder / "values.npz"
        self._values = np.load(path) if path.is_file() else {}
        self.names = list(self._values)

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def __getitem__(self, name: str) -> torch.Tensor:
        """A value; skips the test where the set has none of that name."""
        if name not in self.names:
            pytest.skip(f"{self.folder.name} has no {name}")
        return torch.from_numpy(self._values[name])

    def of(self, *names: str) -> list[torch.Tensor]:
        """Several values."""
        return [self[name] for name in names]

    def below(self, prefix: str) -> dict[str, torch.Tensor]:
        """Values whose names begin so, without it; skips the test where there are none."""
        values = {name.removeprefix(prefix): self[name] for name in self.names if name.startswith(prefix)}
        if not values:
            pytest.skip(f"{self.folder.name} has no {prefix}...")
        return values

    def fact(self, *path: str):
        """What case.json says; skips the test where it does not."""
        value = self.facts
        for name in path:
            if not isinstance(value, dict) or name not in value:
                pytest.skip(f"{self.folder.name}: case.json has no {'.'.join(path)}")
            value = value[name]
        return value

    def file(self, name: str) -> Path:
        """A file or folder of the case; skips the test where it is not there."""
        if not (self.folder / name).exists():
            pytest.skip(f"{self.folder.name} has no {name}")
        return self.folder / name


def folders(family: str) -> list:
    """Folders of a family's cases, as pytest's parameters."""
    return [
        pytest.param(path.parent, id=path.parent.name) for path in sorted((ROOT / family).glob("*/case.json"))
    ]


def cases(family: str):
    """A fixture: each of a family's cases in turn."""
    params = some(folders(family), f"this set has no {family}/CASE/case.json")
    return pytest.fixture(scope="module", params=params)(lambda request: Case(request.param))


def having(family: str, *names: str):
    """Parametrize a test over the cases that have these values, in place of the fixture's cases."""
    found = [param for param in folders(family) if all(name in Case(*param.values) for name in names)]
    reason = f"this set has no case of {family} with {', '.join(names)}"
    return pytest.mark.parametrize("case", some(found, reason), indirect=True)


def each(family: str, argument: str, of_case: Callable[[Case], Iterable[str]]):
    """Parametrize a test over the cases and the names that `of_case` lists for each, in place of the
    fixture's cases.
    """
    found = [
        pytest.param(*param.values, name, id=f"{param.id}-{name}")
        for param in folders(family)
        for name in of_case(Case(*param.values))
    ]
    reason = f"this set has no case of {family} with a {argument}"
    return pytest.mark.parametrize(("case", argument), some(found, reason, width=2), indirect=True)


def released(family: str, pattern: str = "*.json") -> list:
    """JSON files of the settings whose names and shapes are listed, as pytest's parameters."""
    found = [pytest.param(path, id=path.stem) for path in sorted((ROOT / family / "params").glob(pattern))]
    return some(found, f"this set has no {family}/params/{pattern}")


def table(path: Path) -> dict[str, list[int]]:
    """Shapes by name of a .tsv; skips the test where a set has left it out."""
    if not path.is_file():
        pytest.skip(f"this set has no {path.name}")
    rows = (line.split("\t") for line in path.read_text().splitlines())
    return {name: list(ast.literal_eval(shape)) for name, shape, *_ in rows}


def rounding_of(tensors: Iterable[torch.Tensor]) -> float:
    """Return how far outputs of merged weights may be from the reference, by the types of weights."""
    return ADAPTED if all(tensor.dtype in (torch.float32, torch.int64) for tensor in tensors) else HALF


def at_least(count: int, names: list) -> dict[str, tuple]:
    """Return at least `count` pictures: new name -> name, and by how many pixels it is rolled.

    Pictures of a case are repeated until every split of the conditions has some.
    """
    again = range(-(-count // len(names)))
    return {f"{name}-{shift}" if shift else str(name): (name, shift) for shift in again for name in names}


@contextlib.contextmanager
def surfaces(case: Case) -> Iterator[Callable[[Sequence[dict]], None]]:
    """Skip the test where the case's random network makes no surface, or fewer than two for a condition.

    There is nothing to rank then. Yields a function that takes the rows that were sampled.
    """
    reason = f"{case.folder.name}: its random network makes too few surfaces to look at"

    def heard(rows: Sequence[dict]) -> None:
        drawn = [row["condition"] for row in rows]
        if any(drawn.count(name) < 2 for name in drawn):
            pytest.skip(reason)

    try:
        yield heard
    except AssertionError as failure:  # of the command that draws
        if "flow sample" not in str(failure) or "surface" not in str(failure):
            raise
        pytest.skip(reason)


def pictures_of(case: Case) -> range:
    """Return the numbers of a case's pictures; skip the test where it has none."""
    count = len(case.fact("pictures"))
    return range(count) if count else pytest.skip(f"{case.folder.name} has no pictures")


def recorded(states: list, asked: dict) -> list:
    """Select the states of a trajectory that are recorded: all where the settings do not state `every`."""
    every = asked.get("every", 1)
    return states[every - 1 :: every]


PLAIN = (
    "from eg3d_rlhf.models.trellis import blocks as b; print(b.time_rates(b.TIME_FREQUENCIES // 2).tolist())"
)


@functools.cache
def plain_rates() -> torch.Tensor:
    """Compute the rates of time by MKL's plain code, which the machine of the references ran.

    MKL chooses its exp by the processor: 3 of 128 rates differ by a unit in the last place on an Intel with
    AVX-512, and the cosines of times near 1000 by 3e-5.
    """
    plain = subprocess.run(
        [sys.executable, "-c", PLAIN],
        env={**os.environ, "MKL_CBWR": "COMPATIBLE"},
        check=True,
        capture_output=True,
        text=True,
    )
    rates = torch.tensor([float(word) for word in plain.stdout.strip().strip("[]").split(",")])
    torch.testing.assert_close(rates, blocks.time_rates(len(rates)), rtol=2e-7, atol=0)
    return rates


def error(got, want, scale: float | None = None) -> float:
    """Largest difference over the largest value, or over `scale`."""
    got, want = (torch.as_tensor(x).detach().double() for x in (got, want))
    assert got.shape == want.shape, f"expected shape {list(want.shape)}, got {list(got.shape)}"
    size = float(want.abs().max()) if scale is None else scale
    return float((got - want).abs().max()) / max(size, 1e-30)


def largest(parameters) -> float:
    """Of several tensors' numbers."""
    return max(float(tensor.abs().max()) for tensor in parameters)


def check_gradients(got, wanted, least: float = 1e-3) -> None:
    """Tensors by name, each in units of its largest number, or of a share of the largest of all; none stands
    for zeros.
    """
    least *= largest(wanted.values())
    for name, grad in wanted.items():
        made = torch.zeros_like(grad) if got[name] is None else got[name]
        assert error(made, grad, max(largest([grad]), least)) < GRADIENT, name


def gradients(model) -> dict:
    """By the names of parameters."""
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def grad_norm(model) -> float:
    """Of all parameters."""
    return float(
        sum(grad.double().square().sum() for grad in gradients(model).values() if grad is not None).sqrt()
    )
