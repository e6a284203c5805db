"""Reading the reference values of families of flow generators: cases are found, and what a set leaves out is
skipped with the reason.
"""

import ast
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.compat.family_tolerances import GRADIENT
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
    return pytest.fixture(scope="module", params=folders(family))(lambda request: Case(request.param))


def released(family: str, pattern: str = "*.json") -> list:
    """JSON files of the settings whose names and shapes are listed, as pytest's parameters."""
    return [pytest.param(path, id=path.stem) for path in sorted((ROOT / family / "params").glob(pattern))]


def table(path: Path) -> dict[str, list[int]]:
    """Shapes by name of a .tsv; skips the test where a set has left it out."""
    if not path.is_file():
        pytest.skip(f"this set has no {path.name}")
    rows = (line.split("\t") for line in path.read_text().splitlines())
    return {name: list(ast.literal_eval(shape)) for name, shape, *_ in rows}


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
