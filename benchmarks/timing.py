"""Seconds of two paths, taken in turns, and what can be said of their ratio."""

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_DRAWS = 2000  # of the bootstrap
_BOOTSTRAP_FROM = 6  # rounds; with fewer the range of the rounds' own ratios is all that can be said


@dataclass(frozen=True)
class Clock:
    """Wall-clock and processor seconds of one call; on a GPU until the device is done."""

    wall: float
    processor: float  # of all threads together


def clock(work: Callable[[], object], device: str) -> Clock:
    """Time one call."""
    synchronise(device)
    wall, processor = time.perf_counter(), time.process_time()
    work()
    synchronise(device)
    return Clock(time.perf_counter() - wall, time.process_time() - processor)


def synchronise(device: str) -> None:
    """Wait until a GPU has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def summary(values: list[float]) -> dict[str, float | list[float]]:
    """Median, extremes and all values."""
    return {"median_s": statistics.median(values), "min_s": min(values), "max_s": max(values), "all_s": values}


def ratio(reference: list[float], fast: list[float]) -> float:
    """How many times faster: median over median."""
    return statistics.median(reference) / statistics.median(fast)


def ratio_interval(reference: list[float], fast: list[float]) -> tuple[float, float, str]:
    """(low, high, kind) of the ratio; round i of both lists ran in the same turn.

    kind "bootstrap95": 95 % percentile interval over rounds drawn with replacement, in pairs; "range": extremes of the rounds' own ratios.
    """
    pairs = list(zip(reference, fast, strict=True))
    if len(pairs) < _BOOTSTRAP_FROM:
        ratios = [slow / quick for slow, quick in pairs]
        return min(ratios), max(ratios), "range"
    rng = random.Random(0)
    drawn = sorted(ratio(*zip(*rng.choices(pairs, k=len(pairs)), strict=True)) for _ in range(_DRAWS))
    return drawn[int(0.025 * _DRAWS)], drawn[int(0.975 * _DRAWS) - 1], "bootstrap95"


def rounds(pair_seconds: float, budget: float, most: int) -> int:
    """How often both paths run so that a row stays within `budget` seconds: 2 to `most` times."""
    return max(2, min(most, int(budget / max(pair_seconds, 1e-9))))
