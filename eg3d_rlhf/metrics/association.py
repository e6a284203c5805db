"""How one quantity goes with another: fitted lines and rank correlation, with intervals.

Float64 numpy, deterministic. Letters: N items, T times.
"""

import math
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtri, stdtrit
from scipy.stats import rankdata

from eg3d_rlhf.metrics.statistics import MeanInterval

LINE_INTERVAL = "95 % t interval of the slope, HC3 standard error"
RANK_INTERVAL = "95 % interval of Spearman's rho on Fisher's z scale, variance of Bonett and Wright (2000)"


@dataclass(frozen=True, kw_only=True)
class Line:
    """y = intercept + slope * x, with the interval of the slope."""

    slope: float
    lo: float
    hi: float
    intercept: float
    n: int

    def to_dict(self) -> dict[str, float]:
        """Plain JSON numbers."""
        return asdict(self)


def _pair(who: str, x: ArrayLike, y: ArrayLike, least: int) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.asarray(x, dtype=np.float64).reshape(-1), np.asarray(y, dtype=np.float64).reshape(-1)
    if first.size != second.size or first.size < least or not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError(f"{who}: expected at least {least} finite pairs, got {first.size} and {second.size} values. Pair by item.")
    return first, second


def fit_line(x: ArrayLike, y: ArrayLike, confidence: float = 0.95) -> Line:
    """Least-squares line with an interval of the slope that allows for unequal scatter.

    slope = sum((x - mean x) y) / S, S = sum (x - mean x)^2; variance HC3 (MacKinnon and White 1985):
    sum((x_i - mean x)^2 (e_i / (1 - h_i))^2) / S^2 with residuals e and leverages h; quantiles of Student's t, N - 2 degrees.

    Args: x, y [N], N >= 3, x not constant. Raises: ValueError.
    """
    first, second = _pair("fit_line", x, y, 3)
    centred = first - first.mean()
    spread = float((centred**2).sum())
    if spread == 0:
        raise ValueError("fit_line: expected different values of x, got one alone. A line needs two.")
    slope = float((centred * second).sum() / spread)
    intercept = float(second.mean() - slope * first.mean())
    residual = second - intercept - slope * first
    leverage = np.minimum(1 / first.size + centred**2 / spread, 1 - 1e-9)
    error = math.sqrt(float((centred**2 * (residual / (1 - leverage)) ** 2).sum())) / spread
    half = float(stdtrit(first.size - 2, 0.5 + confidence / 2)) * error
    return Line(slope=slope, lo=slope - half, hi=slope + half, intercept=intercept, n=first.size)


def slopes(times: ArrayLike, values: ArrayLike) -> np.ndarray:
    """Least-squares slope over time of every item: times [T], values [N, T] -> [N]. Raises: ValueError."""
    t, y = np.asarray(times, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if t.ndim != 1 or y.ndim != 2 or y.shape[1] != t.size or t.size < 2 or t.min() == t.max():
        raise ValueError(f"slopes: expected times [T], not all equal, and values [N, T], got {t.shape} and {y.shape}. Name more snapshots.")
    centred = t - t.mean()
    return y @ centred / (centred @ centred)


def spearman(x: ArrayLike, y: ArrayLike, confidence: float = 0.95) -> MeanInterval:
    """Rank correlation of pairs, ties at their mean rank, with its interval.

    tanh(atanh(rho) +- q sqrt((1 + rho^2 / 2) / (N - 3))): Bonett and Wright (2000), Psychometrika 65, 23-28. The interval of a perfect
    correlation has no width.

    Args: x, y [N], N >= 4. Raises: ValueError for fewer, or where one side is constant.
    """
    first, second = (rankdata(side) for side in _pair("spearman", x, y, 4))
    if first.min() == first.max() or second.min() == second.max():
        raise ValueError("spearman: expected different values on both sides, got a constant. It has no ranks.")
    rho = float(np.clip(np.corrcoef(first, second)[0, 1], -1, 1))
    if abs(rho) > 1 - 1e-12:
        return MeanInterval(*[math.copysign(1.0, rho)] * 3)
    half = float(ndtri(0.5 + confidence / 2)) * math.sqrt((1 + rho**2 / 2) / (first.size - 3))
    return MeanInterval(rho, math.tanh(math.atanh(rho) - half), math.tanh(math.atanh(rho) + half))
