"""Defines quantities that change with the step, and the window of times of the diffusion. This file imports
no PyTorch, so that `--help` is fast.
"""

import itertools
import math
from dataclasses import dataclass

STEPS = 1000  # times of the diffusion: 0..999


@dataclass(frozen=True)
class Ramp:
    """A number that may change with the step, for windows of times and for weights of rewards and
    regularisers.

    `spec` is a constant, [v0, v1, s1] from step 0, [s0, v0, v1, s1], or [s0, v0, v1, s1, v2, s2, ...]. The
    number is linear between steps and constant outside.
    """

    spec: float | tuple[float, ...]
    log: bool = False  # interpolate the logarithm linearly

    def __post_init__(self):
        numbers = (self.spec,) if isinstance(self.spec, (int, float)) else tuple(self.spec)
        # Lengths 1, 3, 4, 6, 8, ... are valid; 5 would leave a value without its step.
        knots = (
            [step for step, _ in self.knots()]
            if len(numbers) in (1, 3) or (len(numbers) >= 4 and len(numbers) % 2 == 0)
            else []
        )
        if (
            not knots
            or not all(math.isfinite(n) for n in numbers)
            or any(b <= a for a, b in itertools.pairwise(knots))
        ):
            raise ValueError(
                "Ramp: expected a number, [v0, v1, s1] or [s0, v0, v1, s1, v2, s2, ...] with increasing"
                f" steps s, got {self.spec}. Correct it."
            )

    def knots(self) -> list[tuple[float, float]]:
        """Return (step, value) of the ends of all pieces."""
        if isinstance(self.spec, (int, float)):
            return [(0, self.spec)]
        start, first, *rest = self.spec if len(self.spec) > 3 else (0, *self.spec)
        return [(start, first), *zip(rest[1::2], rest[::2], strict=True)]

    def __call__(self, step: int) -> float:
        """Return the number at a step."""
        knots = self.knots()
        # The piece that contains the step, or the last one after it.
        (s0, v0), (s1, v1) = (
            (knots[0], knots[0])
            if len(knots) == 1
            else next(
                (pair for pair in itertools.pairwise(knots) if step < pair[1][0]), (knots[-2], knots[-1])
            )
        )
        # A share outside 0..1 is limited, which makes the number constant outside.
        share = 0.0 if s0 == s1 else max(min(1.0, (step - s0) / (s1 - s0)), 0.0)
        return (
            math.exp(math.log(v0) + (math.log(v1) - math.log(v0)) * share)
            if self.log
            else v0 + (v1 - v0) * share
        )


@dataclass(frozen=True, kw_only=True)
class TimeWindow:
    """Window from which times t are sampled. Its ends are shares of 1000, rounded down, and both count."""

    low: Ramp = Ramp(0.02)
    high: Ramp = Ramp(0.98)
    # Number of steps of the run: t decreases from high to low with the square root of the step, and is not
    # random (HiFA).
    sqrt_anneal: int | None = None

    def __post_init__(self):
        ends = [ramp(int(step)) for ramp in (self.low, self.high) for step, _ in ramp.knots()]
        if not all(0 <= end < 1 for end in ends):
            raise ValueError(f"TimeWindow: expected shares from 0 to below 1, got {ends}. Correct them.")

    def at(self, step: int) -> tuple[int, int]:
        """Return the smallest and the largest time at a step. Raises: ValueError if they are in the
        wrong order.
        """
        low = self.low(step)
        high = self.high(step)
        if self.sqrt_anneal is not None:
            low = high = high - (high - low) * math.sqrt(min(step / self.sqrt_anneal, 1.0))
        low = int(STEPS * low)
        high = int(STEPS * high)
        if low > high:
            raise ValueError(
                f"TimeWindow: expected low <= high, got {low} and {high} at step {step}. Correct the ramps."
            )
        return low, high
