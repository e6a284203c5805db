"""Defines `Ramp`, a number that changes with the step, and `TimeWindow`, a range of diffusion times.

This file does not import PyTorch, so that `--help` is fast.
"""

import itertools
import math
from dataclasses import dataclass

STEPS = 1000  # number of diffusion times, 0..999


@dataclass(frozen=True)
class Ramp:
    """A number that changes with the step, for diffusion times and for weights of rewards and regularisers.

    It is linear between the given steps, and constant before the first and after the last of them.
    """

    # A constant; or values v at steps s, in threestudio's order: (v0, v1, s1), where s0 is 0; (s0, v0, v1,
    # s1); or (s0, v0, v1, s1, v2, s2, ...) for several linear pieces.
    spec: float | tuple[float, ...]
    log: bool = False  # True: the logarithm of the number is linear between steps, and not the number itself

    def __post_init__(self):
        ramp_numbers = (self.spec,) if isinstance(self.spec, (int, float)) else tuple(self.spec)
        # Lengths 1, 3, 4, 6, 8, ... are valid; with 5 numbers, the last value would have no step.
        has_valid_length = len(ramp_numbers) in (1, 3) or (
            len(ramp_numbers) >= 4 and len(ramp_numbers) % 2 == 0
        )
        steps = [step for step, _ in self.knots()] if has_valid_length else []
        if not has_valid_length or not all(math.isfinite(number) for number in ramp_numbers):
            raise ValueError(
                f"Ramp: {self.spec} is not a ramp. Write one number; or s0,v0,v1,s1, which is linear from v0"
                " at step s0 to v1 at step s1, and append v2,s2 for a further linear piece; or v0,v1,s1,"
                " which starts at step 0."
            )
        if any(next_step <= step for step, next_step in itertools.pairwise(steps)):
            raise ValueError(
                f"Ramp: the steps of {self.spec} do not increase ({steps}). In s0,v0,v1,s1,v2,s2,... write"
                " larger steps s from left to right."
            )

    def knots(self) -> list[tuple[float, float]]:
        """Return the pairs (step, value) between which the number is linear; one pair for a constant."""
        if isinstance(self.spec, (int, float)):
            return [(0, self.spec)]
        # After the first step and value, the value comes before its step: v1, s1, v2, s2, ...
        first_step, first_value, *later_numbers = self.spec if len(self.spec) > 3 else (0, *self.spec)
        later_knots = zip(later_numbers[1::2], later_numbers[::2], strict=True)
        return [(first_step, first_value), *later_knots]

    def __call__(self, step: int) -> float:
        """Return the value of the ramp at an optimisation step."""
        knots = self.knots()
        if len(knots) == 1:
            start_knot = end_knot = knots[0]
        else:
            # The first piece that ends after the step; the last piece if there is none.
            start_knot, end_knot = next(
                (piece for piece in itertools.pairwise(knots) if step < piece[1][0]), (knots[-2], knots[-1])
            )
        s0, v0 = start_knot
        s1, v1 = end_knot
        # Limited to 0..1, so that the number is constant before the first and after the last knot.
        share = 0.0 if s0 == s1 else max(min(1.0, (step - s0) / (s1 - s0)), 0.0)
        if self.log:
            return math.exp(math.log(v0) + (math.log(v1) - math.log(v0)) * share)
        return v0 + (v1 - v0) * share


@dataclass(frozen=True, kw_only=True)
class TimeWindow:
    """Range from which diffusion times t are sampled. Its bounds may change with the step."""

    low: Ramp = Ramp(0.02)  # smallest time, as a share of 1000
    high: Ramp = Ramp(0.98)  # largest time, as a share of 1000
    # None: times are random in the window. A number of steps: in its course, the time decreases from `high`
    # to `low` with the square root of the step, and is not random (HiFA, Zhu et al. 2023).
    sqrt_anneal: int | None = None

    def __post_init__(self):
        for name in ("low", "high"):
            ramp = getattr(self, name)
            shares = [ramp(int(step)) for step, _ in ramp.knots()]
            if not all(0 <= share < 1 for share in shares):
                raise ValueError(
                    f"TimeWindow: the bound {name} has the values {shares}, but times are shares of 1000 from"
                    " 0 to below 1. Use such values in --set t_min and --set t_max."
                )

    def at(self, step: int) -> tuple[int, int]:
        """Return the smallest and the largest time at a step, as integers in 0..999.

        Raises: ValueError if the smallest time is above the largest.
        """
        low = self.low(step)
        high = self.high(step)
        if self.sqrt_anneal is not None:
            # A window of one time.
            low = high = high - (high - low) * math.sqrt(min(step / self.sqrt_anneal, 1.0))
        low = int(STEPS * low)
        high = int(STEPS * high)
        if low > high:
            raise ValueError(
                f"TimeWindow: the smallest time {low} is above the largest time {high} at step {step}. Lower"
                " --set t_min, or raise --set t_max."
            )
        return low, high
