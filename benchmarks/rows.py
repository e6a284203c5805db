"""Define the rows of the benchmark: name, target, two paths of computation, and the check that they agree.

The reference is what EG3D's own code does on a CPU: everything inside `implementation("ref")`, or a function
of the row's own. The fast path is what the project's users get. Both start from the same tensors and the same
seed.
"""

import dataclasses
from collections.abc import Callable

import torch

from torch_utils.ops.implementations import implementation

REFERENCE = "reference"
FAST = "fast"
PATHS = (REFERENCE, FAST)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Results of one path, by name; gradients are compared relative to the largest of them all."""

    outputs: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreement:
    """Differences between two outcomes."""

    max_abs_error: float  # over all outputs
    relative_error: float  # the same, each output relative to its own largest value or 1
    gradient_error: float | None = None  # relative to the largest gradient; None without gradients


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """The two paths of a row, on inputs that are already there."""

    fast: Callable[[], Outcome]
    reference: Callable[[], Outcome] | None = None  # None: `fast` inside implementation("ref")
    # back to the starting state; before every call, outside the clock
    prepare: Callable[[], None] = lambda: None
    # (fast, reference); None: tensor by tensor
    compare: Callable[[Outcome, Outcome], Agreement] | None = None
    # further columns of --torch-compile
    others: dict[str, Callable[[], Outcome]] = dataclasses.field(default_factory=dict)

    def call(self, path: str) -> Outcome:
        """Run "reference", "fast" or one of `others`."""
        if path == FAST:
            return self.fast()
        if path != REFERENCE:
            return self.others[path]()
        with implementation("ref"):
            return self.fast() if self.reference is None else self.reference()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """Targets of a row on a CPU with two threads."""

    at_least: float  # ratio
    aim: float
    memory_mb_below: float | None = None  # extra memory of the fast path

    def met(self, ratio: float, memory_mb: float | None) -> bool | None:
        """Return True if both limits hold, None if the memory has a limit and was not measured."""
        if ratio < self.at_least or self.memory_mb_below is None:
            return ratio >= self.at_least
        return None if memory_mb is None else memory_mb < self.memory_mb_below


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    name: str
    size: str  # "full" (ffhq512-128) or "bundled"
    # (device, tiny): tiny inputs warm up libraries, and stand for the row in a quick run
    make: Callable[[str, bool], Case]
    seconds: float  # rough time of one reference pass on two threads; plans repeats and time left
    # the reference is too long for a pass of its own: its memory is taken in its first timed round
    meter_in_round: bool = False
    target: Target | None = None
    tolerance: float = 1e-5  # relative_error above which the paths disagree
    gradient_tolerance: float = 1e-4
    # parts of the networks run in half precision on a GPU, whose rounding both paths show
    half_on_cuda: bool = False

    def tolerances(self, device: str) -> tuple[float, float]:
        """Return the tolerances of outputs and of gradients on a device."""
        coarse = 5e-2 if self.half_on_cuda and device == "cuda" else 0.0
        return max(self.tolerance, coarse), max(self.gradient_tolerance, coarse)

    def seconds_on(self, device: str) -> float:
        """Return `seconds`, or a rough estimate of it on a GPU."""
        return self.seconds / 50 if device == "cuda" else self.seconds


class DisagreementError(ValueError):
    """The two paths of a row computed different things: its times mean nothing."""


def compare(fast: Outcome, reference: Outcome) -> Agreement:
    """Compute the largest differences, tensor by tensor; NaN on one side alone counts as infinite.

    Raises: DisagreementError for other names or shapes.
    """
    absolute = 0.0
    relative = 0.0
    for a, b in _pairs(fast.outputs, reference.outputs):
        error = _difference(a, b)
        largest = _largest(b)
        absolute = max(absolute, error)
        relative = max(relative, error / max(largest, 1.0))
    gradients = [(_difference(a, b), _largest(b)) for a, b in _pairs(fast.gradients, reference.gradients)]
    if not gradients:
        return Agreement(max_abs_error=absolute, relative_error=relative)
    scale = max(largest for _, largest in gradients)
    worst = max(error for error, _ in gradients)
    gradient_error = worst / scale if scale > 0 else (0.0 if worst == 0 else float("inf"))
    return Agreement(max_abs_error=absolute, relative_error=relative, gradient_error=gradient_error)


def check(agreement: Agreement, tolerance: float, gradient_tolerance: float) -> None:
    """Raise DisagreementError if the differences exceed the tolerances."""
    if not agreement.relative_error <= tolerance:
        raise DisagreementError(
            f"expected outputs within {tolerance:g} of the reference, relative to the largest, got"
            f" {agreement.relative_error:.2g} (largest absolute error {agreement.max_abs_error:.2g})"
        )
    if agreement.gradient_error is not None and not agreement.gradient_error <= gradient_tolerance:
        raise DisagreementError(
            f"expected gradients within {gradient_tolerance:g} of the reference, relative to the largest"
            f" gradient, got {agreement.gradient_error:.2g}"
        )


def _pairs(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]):
    if first.keys() != second.keys():
        raise DisagreementError(f"expected {sorted(second)} from both paths, got {sorted(first)}")
    for name, b in second.items():
        a = first[name]
        if a.shape != b.shape:
            raise DisagreementError(f"expected {name} of shape {list(b.shape)}, got {list(a.shape)}")
        yield a.detach(), b.detach()


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.numel() == 0:
        return 0.0
    difference = (a.double() - b.double()).abs()
    difference = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, difference)  # equal infinities, too
    return torch.nan_to_num(difference, nan=float("inf"), posinf=float("inf")).max().item()


def _largest(b: torch.Tensor) -> float:
    finite = b[b.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


def all_rows() -> list[Row]:
    """Return all rows of the table, in the order in which they run."""
    from benchmarks import rows_field, rows_ops, rows_phases, rows_tuning  # here: they import this module

    rows = [row for module in (rows_field, rows_tuning, rows_phases, rows_ops) for row in module.ROWS]
    assert len({(row.name, row.size) for row in rows}) == len(rows), "two rows of one name and size"
    return rows
