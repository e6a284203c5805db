"""Rows whose paths take a known time and differ by a known amount."""

import time

import torch

from benchmarks.rows import Case, Outcome, Row, Target

TARGET = Target(at_least=1.5, aim=3)


def case(fast_seconds: float, slow_seconds: float, error: float = 0.0, gradient_error: float = 0.0) -> Case:
    """Sleeps; outputs and gradients are ones, those of the fast path off by the errors."""

    def path(seconds: float, output_off: float, gradient_off: float):
        def run() -> Outcome:
            time.sleep(seconds)
            return Outcome({"y": torch.ones(3) + output_off}, {"w": torch.ones(2) + gradient_off})

        return run

    return Case(fast=path(fast_seconds, error, gradient_error), reference=path(slow_seconds, 0.0, 0.0))


def row(
    name: str = "sleep",
    *,
    fast: float = 0.002,
    slow: float = 0.01,
    size: str = "full",
    calls: list | None = None,
    **errors,
) -> Row:
    """A row of fake paths; `calls` notes each making of a case that is not tiny."""

    def make(device: str, tiny: bool) -> Case:
        if calls is not None and not tiny:
            calls.append(name)
        return case(fast, slow, **errors)

    return Row(name=name, size=size, make=make, seconds=slow, target=TARGET)
