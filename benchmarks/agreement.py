"""Whether two paths computed the same."""

import torch

from benchmarks.rows import Agreement, Outcome


class DisagreementError(ValueError):
    """The two paths of a row computed different things: its times mean nothing."""


def compare(fast: Outcome, reference: Outcome) -> Agreement:
    """Largest deviations, tensor by tensor; NaN on one side alone counts as infinite.

    Raises: DisagreementError for other names or shapes.
    """
    absolute, relative = 0.0, 0.0
    for a, b in _pairs(fast.outputs, reference.outputs):
        error, largest = _deviation(a, b), _largest(b)
        absolute, relative = max(absolute, error), max(relative, error / max(largest, 1.0))
    gradients = [(_deviation(a, b), _largest(b)) for a, b in _pairs(fast.gradients, reference.gradients)]
    if not gradients:
        return Agreement(max_abs_error=absolute, relative_error=relative)
    scale = max(largest for _, largest in gradients)
    worst = max(error for error, _ in gradients)
    gradient_error = worst / scale if scale > 0 else (0.0 if worst == 0 else float("inf"))
    return Agreement(max_abs_error=absolute, relative_error=relative, gradient_error=gradient_error)


def check(agreement: Agreement, tolerance: float, gradient_tolerance: float) -> None:
    """Raise DisagreementError where the deviations exceed the tolerances."""
    if not agreement.relative_error <= tolerance:
        raise DisagreementError(
            f"expected outputs within {tolerance:g} of the reference, relative to the largest, got {agreement.relative_error:.2g} "
            f"(largest absolute error {agreement.max_abs_error:.2g})"
        )
    if agreement.gradient_error is not None and not agreement.gradient_error <= gradient_tolerance:
        raise DisagreementError(
            f"expected gradients within {gradient_tolerance:g} of the reference, relative to the largest gradient, "
            f"got {agreement.gradient_error:.2g}"
        )


def _pairs(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]):
    if first.keys() != second.keys():
        raise DisagreementError(f"expected {sorted(second)} from both paths, got {sorted(first)}")
    for name, b in second.items():
        a = first[name]
        if a.shape != b.shape:
            raise DisagreementError(f"expected {name} of shape {list(b.shape)}, got {list(a.shape)}")
        yield a.detach(), b.detach()


def _deviation(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.numel() == 0:
        return 0.0
    difference = (a.double() - b.double()).abs()
    difference = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, difference)  # equal infinities, too
    return torch.nan_to_num(difference, nan=float("inf"), posinf=float("inf")).max().item()


def _largest(b: torch.Tensor) -> float:
    finite = b[b.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0
