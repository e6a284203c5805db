"""Define what a row of the benchmark is: two paths of computation, a target, and the check that they agree.

The reference path computes as EG3D's own code does on a CPU: the ops run inside `implementation("ref")`, or
the row has its own function. The fast path is the project's default. Both paths start from the same tensors
and the same seed.
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
    """Results of one path: outputs and gradients by name."""

    outputs: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreement:
    """Differences between two outcomes."""

    max_abs_error: float  # over all outputs
    relative_error: float  # largest error of an output, relative to max(1, largest value of this output)
    gradient_error: float | None = None  # relative to the largest gradient; None without gradients


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """The two paths of a row, with their inputs."""

    fast: Callable[[], Outcome]
    reference: Callable[[], Outcome] | None = None  # None: `fast` is run inside implementation("ref")
    # restores the initial state; called before every call of a path, and not timed
    prepare: Callable[[], None] = lambda: None
    # compares the outcomes of the fast and the reference path; None: each tensor is compared by `compare`
    compare: Callable[[Outcome, Outcome], Agreement] | None = None
    # functions of further columns, which --torch-compile adds, by the column's name
    others: dict[str, Callable[[], Outcome]] = dataclasses.field(default_factory=dict)

    def call(self, path: str) -> Outcome:
        """Run a path, "reference" or "fast", or the function of a further column."""
        if path == FAST:
            return self.fast()
        if path != REFERENCE:
            return self.others[path]()
        with implementation("ref"):
            return self.fast() if self.reference is None else self.reference()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """Targets of a row on a CPU with two threads."""

    at_least: float  # least ratio, time of the reference / time of the fast path
    aim: float  # desired ratio
    memory_mb_below: float | None = None  # extra memory of the fast path

    def met(self, ratio: float, memory_mb: float | None) -> bool | None:
        """Return True if the ratio and the memory are within their limits, else False.

        Return None if the ratio is within its limit, but the memory, which has a limit, was not measured.
        """
        # Without a limit of the memory, the ratio alone decides.
        if ratio < self.at_least or self.memory_mb_below is None:
            return ratio >= self.at_least
        return None if memory_mb is None else memory_mb < self.memory_mb_below


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """Row of the table, with the functions that measure it."""

    name: str
    size: str  # "full" (ffhq512-128) or "bundled"
    # makes the case from (device, tiny); tiny inputs are for the warm-up and for quick runs
    make: Callable[[str, bool], Case]
    seconds: float  # rough duration of one call of the reference on two threads
    # True: the memory of the reference is measured in its first timed round, to save another long call
    meter_in_round: bool = False
    target: Target | None = None
    tolerance: float = 1e-5  # largest relative_error with which the paths agree
    gradient_tolerance: float = 1e-4  # largest gradient_error with which the paths agree
    # True: parts of the networks run in half precision on a GPU, so that the tolerances must be larger there
    half_on_cuda: bool = False
    cpu_only: bool = False  # True: the row is left out on a GPU, because what it measures runs only on a CPU

    def tolerances(self, device: str) -> tuple[float, float]:
        """Return the tolerances of outputs and of gradients on a device."""
        coarse = 5e-2 if self.half_on_cuda and device == "cuda" else 0.0
        return max(self.tolerance, coarse), max(self.gradient_tolerance, coarse)

    def seconds_on(self, device: str) -> float:
        """Return a rough duration of one call of the reference on a device, in seconds."""
        # A GPU is assumed to be 50 times as fast.
        return self.seconds / 50 if device == "cuda" else self.seconds


class DisagreementError(ValueError):
    """The two paths of a row compute different results, so that their times cannot be compared."""


def compare(fast: Outcome, reference: Outcome) -> Agreement:
    """Compute the largest differences between the tensors of two outcomes.

    The difference is infinite where only one of the tensors is NaN.
    Raises: DisagreementError if the names or the shapes of the tensors differ.
    """
    largest_absolute = 0.0
    largest_relative = 0.0
    for fast_tensor, reference_tensor in _matching_tensors(fast.outputs, reference.outputs):
        absolute_error = _difference(fast_tensor, reference_tensor)
        largest_value = _largest(reference_tensor)
        largest_absolute = max(largest_absolute, absolute_error)
        # an output below 1 is compared absolutely
        largest_relative = max(largest_relative, absolute_error / max(largest_value, 1.0))
    # All gradients are compared relative to the largest gradient of the outcome.
    gradient_errors = [
        (_difference(fast_tensor, reference_tensor), _largest(reference_tensor))
        for fast_tensor, reference_tensor in _matching_tensors(fast.gradients, reference.gradients)
    ]
    if not gradient_errors:
        return Agreement(max_abs_error=largest_absolute, relative_error=largest_relative)
    largest_gradient = max(largest_value for _, largest_value in gradient_errors)
    largest_error = max(absolute_error for absolute_error, _ in gradient_errors)
    gradient_error = (
        largest_error / largest_gradient
        if largest_gradient > 0
        else (0.0 if largest_error == 0 else float("inf"))
    )
    return Agreement(
        max_abs_error=largest_absolute, relative_error=largest_relative, gradient_error=gradient_error
    )


def check(agreement: Agreement, tolerance: float, gradient_tolerance: float) -> None:
    """Raise DisagreementError if the differences exceed the tolerances."""
    # "not <=" is used instead of ">", so that NaN is a disagreement, too.
    if not agreement.relative_error <= tolerance:
        raise DisagreementError(
            f"the relative error of the outputs is {agreement.relative_error:.2g} (largest absolute error"
            f" {agreement.max_abs_error:.2g}), which exceeds the tolerance {tolerance:g}"
        )
    if agreement.gradient_error is not None and not agreement.gradient_error <= gradient_tolerance:
        raise DisagreementError(
            "the error of the gradients, relative to the largest gradient, is"
            f" {agreement.gradient_error:.2g},"
            f" which exceeds the tolerance {gradient_tolerance:g}"
        )


def _matching_tensors(fast_tensors: dict[str, torch.Tensor], reference_tensors: dict[str, torch.Tensor]):
    """Yield the tensors of the same name from both dictionaries, detached.

    Raises: DisagreementError if names or shapes differ.
    """
    if fast_tensors.keys() != reference_tensors.keys():
        raise DisagreementError(
            f"the reference returns the tensors {sorted(reference_tensors)}, but the fast path returns"
            f" {sorted(fast_tensors)}"
        )
    for name, reference_tensor in reference_tensors.items():
        fast_tensor = fast_tensors[name]
        if fast_tensor.shape != reference_tensor.shape:
            raise DisagreementError(
                f"{name} has the shape {list(reference_tensor.shape)} in the reference, but"
                f" {list(fast_tensor.shape)} in the fast path"
            )
        yield fast_tensor.detach(), reference_tensor.detach()


def _difference(first_tensor: torch.Tensor, second_tensor: torch.Tensor) -> float:
    """Return the largest absolute difference of two tensors of equal shape, 0 for empty ones."""
    if first_tensor.numel() == 0:
        return 0.0
    difference = (first_tensor.double() - second_tensor.double()).abs()  # in float64, which adds no rounding
    difference = torch.where(
        (first_tensor == second_tensor) | (first_tensor.isnan() & second_tensor.isnan()), 0.0, difference
    )  # inf - inf is NaN, but equal infinities have the difference 0
    return torch.nan_to_num(difference, nan=float("inf"), posinf=float("inf")).max().item()


def _largest(tensor: torch.Tensor) -> float:
    """Return the largest absolute finite value of a tensor, 0 if it has none."""
    finite_values = tensor[tensor.isfinite()]
    return finite_values.abs().max().item() if finite_values.numel() else 0.0


def all_rows() -> list[Row]:
    """Return all rows of the table, in the order in which they run."""
    from benchmarks import (
        rows_field,
        rows_ops,
        rows_phases,
        rows_tuning,
    )  # imported here, since they import this module

    rows = [row for module in (rows_field, rows_tuning, rows_phases, rows_ops) for row in module.ROWS]
    assert len({(row.name, row.size) for row in rows}) == len(rows), "two rows of one name and size"
    return rows
