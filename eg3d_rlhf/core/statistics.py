"""Confidence intervals and tests of the reported figures: counts, means, paired differences, fitted lines,
rank correlation.

All functions compute in float64 with numpy on the CPU. They are deterministic: the bootstrap takes a seed.
scipy.stats has functions for the same purposes, but they round differently, and reports that were already
written have to stay bitwise reproducible. Measured with scipy 1.17: `binomtest` differs by up to 6e-13
(relative), its Wilson interval by 2e-16, `bootstrap` by 1e-16 (its resampled means are bitwise equal, but it
takes twice as long), `t.interval` by 7e-15, `spearmanr` by 1e-16.

Letters: N items, T times, C clusters.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import gammaln, ndtri, stdtrit
from scipy.stats import rankdata

# Relative tolerance. Counts whose probability equals that of the observed one, up to rounding, belong to the
# two-sided tail.
_TIE_TOLERANCE = 1e-7
_BOOTSTRAP_CELLS = 4_000_000  # resampled values in memory at once, about 64 MB with their indices
LINE_INTERVAL = "95 % t interval of the slope, HC3 standard error"
RANK_INTERVAL = "95 % interval of Spearman's rho on Fisher's z scale, variance of Bonett and Wright (2000)"


class Interval(NamedTuple):
    """A two-sided interval `lo <= hi`; unpacks as `lo, hi`."""

    lo: float
    hi: float


class MeanInterval(NamedTuple):
    """A sample mean with its two-sided interval; unpacks as `mean, lo, hi`."""

    mean: float
    lo: float
    hi: float


def _check_counts(who: str, successes: float, n: int) -> None:
    """Raise ValueError unless 0 <= successes <= n. `who` names the caller in the message."""
    if n < 0 or successes < 0 or successes > n:
        raise ValueError(
            f"{who}: expected 0 <= successes <= n, got successes={successes}, n={n}. Pass counts, not rates."
        )


def _check_fraction(who: str, name: str, value: float) -> None:
    """Raise ValueError unless 0 < value < 1."""
    if not 0.0 < value < 1.0:
        raise ValueError(f"{who}: expected {name} strictly between 0 and 1, got {value}. For 95 % pass 0.95.")


def _finite_vector(who: str, values: ArrayLike) -> np.ndarray:
    """Return values as a float64 vector [N]. Raises ValueError if it is empty or a value is not finite."""
    array = np.asarray(values, dtype=np.float64).reshape(-1)  # [N]
    if array.size == 0 or not np.isfinite(array).all():
        raise ValueError(
            f"{who}: expected at least one value, all finite, got {array.size} values. Drop missing samples"
            " first."
        )
    return array


def wilson_interval(successes: float, n: int, confidence: float = 0.95) -> Interval:
    """Compute Wilson's interval of a proportion. It stays inside [0, 1] and is valid for small n and for
    rates of 0 or 1.

    Wilson (1927), with the two-sided normal quantile z and p = successes / n:
    centre = (p + z^2/2n) / (1 + z^2/n), half = z sqrt(p(1-p)/n + z^2/4n^2) / (1 + z^2/n).

    Args: successes, n: counts, 0 <= successes <= n; confidence: in (0, 1).
    Returns: (lo, hi) in [0, 1]; (0, 1) for n = 0, when there is no information.
    Raises: ValueError for impossible counts.
    """
    _check_counts("wilson_interval", successes, n)
    _check_fraction("wilson_interval", "confidence", confidence)
    if n == 0:
        return Interval(0.0, 1.0)
    lo, hi = wilson_ends(successes / n, n, float(ndtri(0.5 + confidence / 2)))
    # Wilson's formula gives exactly 0 and 1 in these two cases; rounding would leave about 1e-17.
    return Interval(0.0 if successes == 0 else float(lo), 1.0 if successes == n else float(hi))


def wilson_ends(rate: ArrayLike, n: ArrayLike, quantile: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Compute Wilson's interval of rates for any quantile, for example one of Student's t distribution.

    Args: rate, n, quantile: [...], broadcast against each other. n is the sample size, or the
    effective one, and may be a fraction.
    Returns: lower and upper ends [...], in 0..1.
    """
    rate, n, z = (np.asarray(values, dtype=np.float64) for values in (rate, n, quantile))
    scale = 1 + z * z / n
    centre = (rate + z * z / (2 * n)) / scale
    half = z * np.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)) / scale
    return np.clip(centre - half, 0, 1), np.clip(centre + half, 0, 1)


def binomial_test(successes: int, n: int, rate: float = 0.5) -> float:
    """Compute the two-sided exact p-value of `successes` out of `n` under the success probability `rate`.

    p is the sum of P(k) over every k that is no more likely than the observed count (the minimum-likelihood
    tail, as in R and scipy).

    Args: counts as above; rate: in [0, 1].
    Returns: p in (0, 1]; 1 for n = 0.
    Raises: ValueError for impossible counts or a rate outside [0, 1].
    """
    _check_counts("binomial_test", successes, n)
    if not 0.0 <= rate <= 1.0:
        raise ValueError(
            f"binomial_test: expected rate in [0, 1], got {rate}. Pass the success probability of the null"
            " hypothesis."
        )
    if n == 0:
        return 1.0
    if rate in (0.0, 1.0):
        return 1.0 if successes == n * rate else 0.0  # only one outcome is possible
    # All possible counts.
    k = np.arange(n + 1, dtype=np.float64)
    # [n + 1]. Logarithms, because the binomial coefficients overflow float64 from about n = 1,030.
    log_pmf = (
        gammaln(n + 1)
        - gammaln(k + 1)
        - gammaln(n - k + 1)
        + k * math.log(rate)
        + (n - k) * math.log1p(-rate)
    )
    # Two-sided by likelihood: every count that is no more likely than the observed one.
    tail = log_pmf <= log_pmf[successes] + _TIE_TOLERANCE
    # The terms of the tail may sum to slightly more than 1 by rounding.
    return min(1.0, float(np.exp(log_pmf[tail]).sum()))


def bootstrap_mean_interval(
    values: ArrayLike, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> MeanInterval:
    """Compute the percentile bootstrap interval of the mean (Efron 1979).

    Draws N of the N values with replacement, `resamples` times, and takes quantiles of the means.

    The interval is too narrow for small samples. For normal values a 95 % interval contains the mean in about
    89 % of cases at N = 10, 92 % at N = 20, 93.4 % at N = 32 and 95 % at N = 100
    (tests/measures/test_statistics.py). With fewer than 30 values prefer `t_mean_interval`.

    Args: values: [N], finite, any unit; confidence: in (0, 1); resamples: >= 100; seed: of the resampling.
    Returns: (mean, lo, hi) in the unit of `values`. A single value gives an interval of zero width.
    Raises: ValueError for an empty or non-finite sample.
    """
    sample = _finite_vector("bootstrap_mean_interval", values)
    _check_fraction("bootstrap_mean_interval", "confidence", confidence)
    if resamples < 100:
        raise ValueError(
            f"bootstrap_mean_interval: expected resamples >= 100, got {resamples}. Use more: the ends of the"
            " interval are quantiles in the tails."
        )
    rng = np.random.default_rng(seed)
    # Rows of resamples in one array. The random numbers come in the same order for any size of the chunks.
    chunk = max(1, _BOOTSTRAP_CELLS // sample.size)
    # [resamples]: means over axis 1 of [chunk, N]
    means = np.concatenate(
        [
            sample[rng.integers(0, sample.size, size=(min(chunk, resamples - start), sample.size))].mean(
                axis=1
            )
            for start in range(0, resamples, chunk)
        ]
    )
    lo, hi = np.quantile(means, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return MeanInterval(float(sample.mean()), float(lo), float(hi))


def t_mean_interval(values: ArrayLike, confidence: float = 0.95) -> MeanInterval:
    """Compute Student's t interval of the mean. It is exact for normal values at any N.

    Use it for few values, such as runs of several seeds, where the bootstrap is too narrow.

    Args: values: [N], N >= 2, finite.
    Raises: ValueError for fewer values.
    """
    sample = _finite_vector("t_mean_interval", values)
    _check_fraction("t_mean_interval", "confidence", confidence)
    if sample.size < 2:
        raise ValueError(
            "t_mean_interval: expected at least two values, got one. Add a value: one alone has no spread."
        )
    # quantile of Student's t, N - 1 degrees of freedom, times the standard error of the mean
    half = (
        float(stdtrit(sample.size - 1, 0.5 + confidence / 2))
        * float(sample.std(ddof=1))
        / math.sqrt(sample.size)
    )
    return MeanInterval(float(sample.mean()), float(sample.mean()) - half, float(sample.mean()) + half)


def two_way_interval(
    statistic: Callable[[np.ndarray, np.ndarray], float],
    rows: int,
    columns: int,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Compute a percentile interval of a statistic of a table whose rows and columns are both samples.

    Rows may be training seeds, for example, and columns latents. Both are resampled independently (pigeonhole
    bootstrap, Owen 2007), which gives intervals that are rather too wide than too narrow. A single row is
    never varied.

    Args:
        statistic: maps indices of sampled rows [rows] and columns [columns] to a number.
        rows, columns: size of the table.
    """
    rng = np.random.default_rng(seed)
    # One resample of rows and one of columns give one value of the statistic.
    draws = [
        statistic(rng.integers(0, rows, rows), rng.integers(0, columns, columns)) for _ in range(resamples)
    ]
    lo, hi = np.quantile(draws, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Interval(float(lo), float(hi))


def clustered_rate(
    outcomes: ArrayLike, clusters: Sequence[Hashable], confidence: float = 0.95
) -> MeanInterval:
    """Compute a rate of outcomes that come in clusters, with an interval that allows for the clusters.

    Outcomes of one cluster, such as pairs of one prompt, are correlated. The interval stays inside [0, 1]: it
    has Wilson's ends, with the effective number p (1 - p) / V of outcomes, and Student's quantile with C - 1
    degrees of freedom. V is the larger of p (1 - p) / N and C / (C - 1) sum over clusters of (sum of (outcome
    - p))^2 / N^2 (cluster-robust variance; Cameron, Gelbach and Miller 2011).

    Args: outcomes: [N] in 0..1, ties 0.5; clusters: [N], the name of each outcome's cluster.
    Raises: ValueError for fewer than two clusters.
    """
    rate, sums, degrees = _clustered_sums("clustered_rate", outcomes, clusters)
    n = np.size(outcomes)
    # (degrees + 1) / degrees is C / (C - 1). The maximum keeps clusters that agree by chance from narrowing
    # the interval below that of independent outcomes.
    variance = max(rate * (1 - rate) / n, float((sums**2).sum()) / n**2 * (degrees + 1) / degrees)
    # All outcomes equal, rate 0 or 1: the variance estimate is 0, so the number of outcomes is used.
    effective = rate * (1 - rate) / variance if variance > 0 else n
    lo, hi = wilson_ends(rate, max(effective, 1e-9), float(stdtrit(degrees, 0.5 + confidence / 2)))
    return MeanInterval(rate, float(lo), float(hi))


def clustered_mean(values: ArrayLike, clusters: Sequence[Hashable], confidence: float = 0.95) -> MeanInterval:
    """Compute the mean of values that come in clusters, with Student's interval of C - 1 degrees of freedom.

    The values may be differences of paired outcomes, for example.

    Args: values: [N], finite; clusters: [N], the name of each value's cluster.
    Raises: ValueError for fewer than two clusters.
    """
    mean, sums, degrees = _clustered_sums("clustered_mean", values, clusters)
    residuals = np.asarray(values, dtype=np.float64) - mean
    # As in `clustered_rate`: the larger of the variance of independent values and the cluster-robust one.
    spread = (
        max(float((residuals**2).sum()), float((sums**2).sum()))
        / np.size(values) ** 2
        * (degrees + 1)
        / degrees
    )
    # Student's quantile times the cluster-robust standard error.
    half = float(stdtrit(degrees, 0.5 + confidence / 2)) * math.sqrt(spread)
    return MeanInterval(mean, mean - half, mean + half)


def _clustered_sums(
    who: str, values: ArrayLike, clusters: Sequence[Hashable]
) -> tuple[float, np.ndarray, int]:
    """Return the mean, the sum of residuals of each cluster [C], and C - 1."""
    sample = _finite_vector(who, values)
    # [N]: index of each value's cluster in the sorted list of clusters
    _, cluster_index = np.unique(np.asarray(clusters), return_inverse=True)
    count = int(cluster_index.max()) + 1
    if cluster_index.size != sample.size or count < 2:
        raise ValueError(
            f"{who}: expected values of at least two clusters, got {sample.size} values of {count}. Add"
            " another cluster: the interval comes from the spread between clusters."
        )
    return float(sample.mean()), np.bincount(cluster_index, sample - sample.mean()), count - 1


class PairedSummary(NamedTuple):
    """Differences after - before of the same items, in the unit of the measurement unless a field says
    otherwise.
    """

    n: int  # pairs
    mean: float
    mean_lo: float  # bootstrap interval of the mean
    mean_hi: float
    median: float
    std: float  # sample standard deviation (divisor n - 1); 0 for one pair
    positive: int  # pairs with after > before
    negative: int
    ties: int
    positive_rate: float  # positive / n, 0..1
    positive_lo: float  # Wilson interval of positive_rate
    positive_hi: float
    sign_p: float  # two-sided exact sign test on the untied pairs, 0..1
    confidence: float


def paired_summary(
    before: ArrayLike, after: ArrayLike, confidence: float = 0.95, seed: int = 0, resamples: int = 10_000
) -> PairedSummary:
    """Summarise `after - before` of paired samples.

    The summary has the mean with a bootstrap interval, the median, the rate of increases and an exact sign
    test.

    Args: before, after: [N], the same items in the same order, finite.
    Raises: ValueError if the lengths differ or a value is not finite.
    """
    first = _finite_vector("paired_summary", before)
    second = _finite_vector("paired_summary", after)
    if first.shape != second.shape:
        raise ValueError(
            f"paired_summary: expected as many values after as before, got {first.size} before and"
            f" {second.size} after. Pass the same items in both."
        )
    delta = second - first  # [N]
    # Differences of items are resampled, which keeps pairs together.
    interval = bootstrap_mean_interval(delta, confidence, resamples, seed)
    positive = int((delta > 0).sum())
    negative = int((delta < 0).sum())
    rate = wilson_interval(positive, delta.size, confidence)
    return PairedSummary(
        n=delta.size,
        mean=interval.mean,
        mean_lo=interval.lo,
        mean_hi=interval.hi,
        median=float(np.median(delta)),
        std=float(delta.std(ddof=1)) if delta.size > 1 else 0.0,
        positive=positive,
        negative=negative,
        ties=delta.size - positive - negative,
        positive_rate=positive / delta.size,
        positive_lo=rate.lo,
        positive_hi=rate.hi,
        # Ties carry no information on the sign and are left out of the test, as is usual.
        sign_p=binomial_test(positive, positive + negative),
        confidence=confidence,
    )


class Line(NamedTuple):
    """y = intercept + slope * x, with the interval of the slope."""

    slope: float
    lo: float
    hi: float
    intercept: float
    n: int


def _pair(who: str, x: ArrayLike, y: ArrayLike, least: int) -> tuple[np.ndarray, np.ndarray]:
    """Return both sides as float64 vectors.

    Raises: ValueError unless they have equal lengths >= `least` and finite values.
    """
    first = np.asarray(x, dtype=np.float64).reshape(-1)
    second = np.asarray(y, dtype=np.float64).reshape(-1)
    if (
        first.size != second.size
        or first.size < least
        or not (np.isfinite(first).all() and np.isfinite(second).all())
    ):
        raise ValueError(
            f"{who}: expected at least {least} finite pairs, got {first.size} and {second.size} values. Pass"
            " one value of each side per item."
        )
    return first, second


def fit_line(x: ArrayLike, y: ArrayLike, confidence: float = 0.95) -> Line:
    """Fit a least-squares line, with an interval of the slope that allows for unequal variances of the
    residuals.

    slope = sum((x - mean x) y) / S, S = sum (x - mean x)^2. The variance is HC3 (MacKinnon and White 1985):
    sum((x_i - mean x)^2 (e_i / (1 - h_i))^2) / S^2 with residuals e and leverages h. Quantiles are Student's
    t with N - 2 degrees of freedom.

    Args: x, y: [N], N >= 3; x is not constant.
    Raises: ValueError for other input.
    """
    first, second = _pair("fit_line", x, y, 3)
    centred = first - first.mean()
    spread = float((centred**2).sum())
    if spread == 0:
        raise ValueError("fit_line: expected at least two distinct values of x, got one. Add another x.")
    # Since `centred` sums to 0, the mean of y drops out.
    slope = float((centred * second).sum() / spread)
    intercept = float(second.mean() - slope * first.mean())
    residual = second - intercept - slope * first
    # A point alone at its x has leverage 1 and residual 0. The bound avoids 0 / 0 there.
    leverage = np.minimum(1 / first.size + centred**2 / spread, 1 - 1e-9)
    # HC3 standard error of the slope.
    error = math.sqrt(float((centred**2 * (residual / (1 - leverage)) ** 2).sum())) / spread
    half = float(stdtrit(first.size - 2, 0.5 + confidence / 2)) * error
    return Line(slope=slope, lo=slope - half, hi=slope + half, intercept=intercept, n=first.size)


def slopes(times: ArrayLike, values: ArrayLike) -> np.ndarray:
    """Compute the least-squares slope over time of every item.

    Args: times: [T], not all equal; values: [N, T].
    Returns: [N], in the unit of the values per unit of time.
    Raises: ValueError for other shapes.
    """
    t = np.asarray(times, dtype=np.float64)
    y = np.asarray(values, dtype=np.float64)
    if t.ndim != 1 or y.ndim != 2 or y.shape[1] != t.size or t.size < 2 or t.min() == t.max():
        raise ValueError(
            f"slopes: expected times [T], not all equal, and values [N, T], got {t.shape} and {y.shape}. Name"
            " at least two snapshots of different times."
        )
    centred = t - t.mean()
    rates: np.ndarray = y @ centred / (centred @ centred)
    return rates


def spearman(x: ArrayLike, y: ArrayLike, confidence: float = 0.95) -> MeanInterval:
    """Compute Spearman's rank correlation of pairs and its interval. Ties get their mean rank.

    tanh(atanh(rho) +- q sqrt((1 + rho^2 / 2) / (N - 3))): Bonett and Wright (2000), Psychometrika 65, 23-28.
    The interval of a perfect correlation has zero width.

    Args: x, y: [N], N >= 4.
    Raises: ValueError for fewer pairs, or if one side is constant.
    """
    first, second = (rankdata(side) for side in _pair("spearman", x, y, 4))
    if first.min() == first.max() or second.min() == second.max():
        raise ValueError(
            "spearman: expected different values on both sides, got a constant. Pass values that can be"
            " ranked."
        )
    # Rounding may exceed 1 slightly.
    rho = float(np.clip(np.corrcoef(first, second)[0, 1], -1, 1))
    # atanh(1) is infinite.
    if abs(rho) > 1 - 1e-12:
        return MeanInterval(*[math.copysign(1.0, rho)] * 3)
    half = float(ndtri(0.5 + confidence / 2)) * math.sqrt((1 + rho**2 / 2) / (first.size - 3))
    return MeanInterval(rho, math.tanh(math.atanh(rho) - half), math.tanh(math.atanh(rho) + half))
