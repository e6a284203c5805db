"""Confidence intervals and tests of reported metrics: rates, means, paired differences, fitted lines and
rank correlations.

All functions compute in float64 with numpy on the CPU. They are deterministic, because the bootstrap takes a
seed. scipy.stats has functions for the same purposes, but they round differently, and reports that were
already written have to stay bitwise reproducible. The largest relative differences with scipy 1.17 are 6e-13
for `binomtest`, 2e-16 for its Wilson interval, 1e-16 for `bootstrap` (whose resampled means are bitwise
equal, but which takes twice as long), 7e-15 for `t.interval` and 1e-16 for `spearmanr`.

Shapes: N is the number of items, T of times, C of clusters.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import gammaln, ndtri, stdtrit
from scipy.stats import rankdata

# Tolerance of the log-probability. A count whose probability equals the probability of the observed count,
# except for rounding, belongs to the two-sided tail.
_TIE_TOLERANCE = 1e-7
# Largest number of resampled values in memory at the same time: about 64 MB with their indices.
_BOOTSTRAP_CELLS = 4_000_000
# Least number of raters whose spread has a useful number of degrees of freedom, see
# `rate_of_repeated_trials`.
_LEAST_RATERS = 5
# Names of the intervals of `fit_line` and `spearman`, for reports.
LINE_INTERVAL = "95 % t interval of the slope, HC3 standard error"
RANK_INTERVAL = "95 % interval of Spearman's rho on Fisher's z scale, variance of Bonett and Wright (2000)"


class Interval(NamedTuple):
    """A two-sided interval with lo <= hi. It unpacks as `lo, hi`."""

    lo: float
    hi: float


class MeanInterval(NamedTuple):
    """A sample mean with its two-sided interval. It unpacks as `mean, lo, hi`."""

    mean: float
    lo: float
    hi: float


def _check_counts(caller_name: str, successes: float, n: int) -> None:
    """Raise ValueError unless 0 <= successes <= n. `caller_name` is the name of the calling function."""
    if n < 0 or successes < 0 or successes > n:
        raise ValueError(
            f"{caller_name}: expected 0 <= successes <= n, got successes={successes}, n={n}. Pass the number"
            " of successes and the number of trials."
        )


def _check_fraction(caller_name: str, argument_name: str, argument_value: float) -> None:
    """Raise ValueError unless 0 < value < 1. `caller_name` names the calling function, `argument_name` its
    argument.
    """
    if not 0.0 < argument_value < 1.0:
        raise ValueError(
            f"{caller_name}: expected {argument_name} strictly between 0 and 1, got {argument_value}. Pass"
            " 0.95 for 95 %."
        )


def _finite_vector(caller_name: str, values: ArrayLike) -> np.ndarray:
    """Return values as a float64 vector [N].

    Raises: ValueError, which begins with `caller_name`, if there is no value or a value is not finite.
    """
    value_vector = np.asarray(values, dtype=np.float64).reshape(-1)  # [N]
    if value_vector.size == 0:
        raise ValueError(f"{caller_name}: expected at least one value, got an empty sample. Add values.")
    nonfinite_count = int((~np.isfinite(value_vector)).sum())
    if nonfinite_count:
        raise ValueError(
            f"{caller_name}: expected finite values, got NaN or infinity in {nonfinite_count} of"
            f" {value_vector.size}. Remove these values first."
        )
    return value_vector


def wilson_interval(successes: float, n: int, confidence: float = 0.95) -> Interval:
    """Compute Wilson's interval of a proportion (Wilson 1927).

    The interval stays inside [0, 1]. It is valid for small n and for proportions of 0 or 1, too. With the
    two-sided normal quantile z and p = successes / n:
    centre = (p + z^2/2n) / (1 + z^2/n), half = z sqrt(p(1-p)/n + z^2/4n^2) / (1 + z^2/n).

    Args:
        successes: number of successes, 0 <= successes <= n.
        n: number of trials.
        confidence: level of the interval, in (0, 1).
    Returns: (lo, hi) in [0, 1]. For n = 0 there is no information, and the interval is (0, 1).
    Raises: ValueError for a negative count, successes > n, or a confidence outside (0, 1).
    """
    _check_counts("wilson_interval", successes, n)
    _check_fraction("wilson_interval", "confidence", confidence)
    if n == 0:
        return Interval(0.0, 1.0)
    lower, upper = wilson_ends(successes / n, n, float(ndtri(0.5 + confidence / 2)))
    # Wilson's formula gives exactly 0 for no success and exactly 1 for n successes, but rounding leaves an
    # error of about 1e-17.
    lo = 0.0 if successes == 0 else float(lower)
    hi = 1.0 if successes == n else float(upper)
    return Interval(lo, hi)


def wilson_ends(rate: ArrayLike, n: ArrayLike, quantile: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Compute Wilson's interval of rates for any quantile, for example one of Student's t distribution.

    Args: (arrays, which are broadcast against each other)
        rate: rates in 0..1.
        n: sample sizes > 0. An effective sample size may be a fraction.
        quantile: two-sided quantile of the level, for example 1.96 for 95 % of a normal distribution.
    Returns: lower and upper ends in 0..1, with the broadcast shape.
    """
    # z is the quantile in Wilson's formula, see `wilson_interval`.
    rate, n, z = (np.asarray(argument, dtype=np.float64) for argument in (rate, n, quantile))
    denominator = 1 + z * z / n
    centre = (rate + z * z / (2 * n)) / denominator
    half_width = z * np.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)) / denominator
    return np.clip(centre - half_width, 0, 1), np.clip(centre + half_width, 0, 1)


def binomial_test(successes: int, n: int, rate: float = 0.5) -> float:
    """Compute the two-sided p-value of the exact binomial test.

    The p-value is the sum of P(k) over every count k that is no more likely than the observed count (the
    minimum-likelihood tail, as in R and scipy).

    Args:
        successes: observed number of successes, 0 <= successes <= n.
        n: number of trials.
        rate: success probability of the null hypothesis, in [0, 1].
    Returns: the p-value, in [0, 1]. It is 1 for n = 0.
    Raises: ValueError for a negative count, successes > n, or a rate outside [0, 1].
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
        return 1.0 if successes == n * rate else 0.0  # only one count is possible
    k = np.arange(n + 1, dtype=np.float64)  # all possible counts of successes
    # log P(k), [n + 1]. The binomial coefficients themselves overflow float64 from about n = 1,030.
    log_pmf = (
        gammaln(n + 1)
        - gammaln(k + 1)
        - gammaln(n - k + 1)
        + k * math.log(rate)
        + (n - k) * math.log1p(-rate)
    )
    is_in_tail = log_pmf <= log_pmf[successes] + _TIE_TOLERANCE
    # By rounding, the sum may exceed 1 slightly.
    return min(1.0, float(np.exp(log_pmf[is_in_tail]).sum()))


def bootstrap_mean_interval(
    values: ArrayLike, confidence: float = 0.95, resample_count: int = 10_000, seed: int = 0
) -> MeanInterval:
    """Compute the percentile bootstrap interval of the mean (Efron 1979).

    The function draws N of the N values with replacement, `resample_count` times, and returns quantiles of
    the means.

    The interval is too narrow for small samples. For normal values a 95 % interval contains the mean in about
    89 % of cases at N = 10, 92 % at N = 20, 93.4 % at N = 32 and 95 % at N = 100
    (tests/measures/test_statistics.py). With fewer than 30 values prefer `t_mean_interval`.

    Args:
        values: finite values [N] in any unit.
        confidence: level of the interval, in (0, 1).
        resample_count: number of resamples, >= 100.
        seed: seed of the resampling.
    Returns: (mean, lo, hi) in the unit of `values`. A single value gives an interval of zero width.
    Raises: ValueError for an empty or non-finite sample, or an argument outside its range.
    """
    sample = _finite_vector("bootstrap_mean_interval", values)
    _check_fraction("bootstrap_mean_interval", "confidence", confidence)
    if resample_count < 100:
        raise ValueError(
            f"bootstrap_mean_interval: expected resamples >= 100, got {resample_count}. Use at least 100,"
            " because the ends of the interval are quantiles in the tails."
        )
    rng = np.random.default_rng(seed)
    # Several resamples at once form the rows of an array. The random numbers have the same order for any
    # number of rows.
    rows_at_once = max(1, _BOOTSTRAP_CELLS // sample.size)
    means_of_chunks = []
    for first_resample in range(0, resample_count, rows_at_once):
        row_count = min(rows_at_once, resample_count - first_resample)
        resampled_indices = rng.integers(0, sample.size, size=(row_count, sample.size))
        means_of_chunks.append(sample[resampled_indices].mean(axis=1))  # [rows, N] -> [rows]
    resampled_means = np.concatenate(means_of_chunks)  # [resamples]
    lo, hi = np.quantile(resampled_means, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return MeanInterval(float(sample.mean()), float(lo), float(hi))


def t_mean_interval(values: ArrayLike, confidence: float = 0.95) -> MeanInterval:
    """Compute Student's t interval of the mean, which is exact for normal values at any N.

    Use it for few values, such as one value per training seed, where the bootstrap interval is too narrow.

    Args:
        values: finite values [N], N >= 2, in any unit.
        confidence: level of the interval, in (0, 1).
    Returns: (mean, lo, hi) in the unit of `values`.
    Raises: ValueError for fewer than two values, or a value that is not finite.
    """
    sample = _finite_vector("t_mean_interval", values)
    _check_fraction("t_mean_interval", "confidence", confidence)
    if sample.size < 2:
        raise ValueError(
            "t_mean_interval: expected at least two values, got one. Add a value, because the spread of a"
            " single value is unknown."
        )
    # Quantile of Student's t with N - 1 degrees of freedom, times the standard error of the mean.
    half_width = (
        float(stdtrit(sample.size - 1, 0.5 + confidence / 2))
        * float(sample.std(ddof=1))
        / math.sqrt(sample.size)
    )
    return MeanInterval(
        float(sample.mean()), float(sample.mean()) - half_width, float(sample.mean()) + half_width
    )


def two_way_interval(
    statistic: Callable[[np.ndarray, np.ndarray], float],
    row_count: int,
    column_count: int,
    confidence: float = 0.95,
    resample_count: int = 2000,
    seed: int = 0,
) -> Interval:
    """Compute a percentile interval of a statistic of a table whose rows and columns are both samples.

    For example, rows may be training seeds, and columns may be latents. Both are resampled independently
    (pigeonhole bootstrap, Owen 2007). The intervals tend to be too wide rather than too narrow. If the table
    has a single row, only the columns vary.

    Args:
        statistic: function of two index arrays, the resampled rows [rows] and columns [columns], that returns
            the statistic of the resampled table.
        row_count: number of rows of the table.
        column_count: number of columns of the table.
        confidence: level of the interval, in (0, 1).
        resample_count: number of resamples.
        seed: seed of the resampling.
    Returns: (lo, hi) in the unit of the statistic.
    """
    rng = np.random.default_rng(seed)
    statistics = [
        statistic(rng.integers(0, row_count, row_count), rng.integers(0, column_count, column_count))
        for _ in range(resample_count)
    ]
    lo, hi = np.quantile(statistics, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Interval(float(lo), float(hi))


def clustered_rate(
    outcomes: ArrayLike, clusters: Sequence[Hashable], confidence: float = 0.95
) -> MeanInterval:
    """Compute the rate of clustered outcomes, with an interval that accounts for the clusters.

    Outcomes of one cluster, such as comparisons with the same prompt, are correlated. Let p be the rate of
    all N outcomes, C the number of clusters, and r_c the sum of (outcome - p) over cluster c. The variance V
    of the rate is the larger of p (1 - p) / N (independent outcomes) and C / (C - 1) sum_c r_c^2 / N^2
    (cluster-robust variance; Cameron, Gelbach and Miller 2011). The interval is Wilson's for the effective
    sample size p (1 - p) / V, with Student's quantile for C - 1 degrees of freedom. It stays inside [0, 1].

    Args:
        outcomes: outcomes [N] in 0..1, with 0.5 for a tie.
        clusters: name of each outcome's cluster, [N].
        confidence: level of the interval, in (0, 1).
    Returns: (rate, lo, hi) in 0..1.
    Raises: ValueError for fewer than two clusters, or for different numbers of outcomes and cluster names.
    """
    rate, residual_sums, degrees_of_freedom = _clustered_sums("clustered_rate", outcomes, clusters)
    n = np.size(outcomes)
    # degrees_of_freedom = C - 1. Without the maximum, clusters that agree by chance would give a narrower
    # interval than independent outcomes.
    variance = max(
        rate * (1 - rate) / n,
        float((residual_sums**2).sum()) / n**2 * (degrees_of_freedom + 1) / degrees_of_freedom,
    )
    # If all outcomes are 0, or all are 1, the variance is 0, and the number of outcomes is used.
    effective_size = rate * (1 - rate) / variance if variance > 0 else n
    # 1e-9 avoids a division by 0.
    lo, hi = wilson_ends(
        rate, max(effective_size, 1e-9), float(stdtrit(degrees_of_freedom, 0.5 + confidence / 2))
    )
    return MeanInterval(rate, float(lo), float(hi))


def rate_of_repeated_trials(
    outcomes: ArrayLike,
    items: Sequence[Hashable],
    raters: Sequence[Hashable],
    confidence: float = 0.95,
) -> MeanInterval:
    """Compute the rate of outcomes of items that several raters judged, or one rater several times.

    Repeated outcomes of one item are no new evidence, and outcomes of one rater are correlated. Let p be the
    rate of all N outcomes, and S(k) the sum over the clusters c of the classification k of
    (sum over c of (outcome - p))^2. The variance V of p is the largest of

        p (1 - p) / (number of items),  S(items) / N^2,
        (S(items) + S(raters) - S(items and raters)) / N^2.

    The last one is the two-way cluster-robust variance (Cameron, Gelbach and Miller 2011). The interval is
    Wilson's for the effective sample size p (1 - p) / V. If the spread between raters decides, and there are
    at least 5 raters, the quantile is Student's for (number of raters - 1) degrees of freedom. The spread
    between fewer raters is hardly known, so the interval then applies to these raters rather than to others.

    If every item has one outcome and raters do not matter, this is `wilson_interval`, bitwise.

    Args:
        outcomes: outcomes [N], 0 or 1.
        items: name of each outcome's item, [N].
        raters: name of each outcome's rater, [N].
        confidence: level of the interval, in (0, 1).
    Returns: (rate, lo, hi) in 0..1.
    Raises: ValueError if there is no outcome, or for different numbers of outcomes and names.
    """
    sample = _finite_vector("rate_of_repeated_trials", outcomes)
    if not len(items) == len(raters) == sample.size:
        raise ValueError(
            f"rate_of_repeated_trials: expected one item and one rater for each outcome, got {sample.size}"
            f" outcomes, {len(items)} items and {len(raters)} raters. Pass all three in the same order."
        )
    rate = float(sample.mean())
    residuals = sample - rate

    def cluster_squares(names: Sequence[Hashable]) -> tuple[float, int]:
        """Return S of a classification, and the number of its clusters."""
        # names of any type, so np.unique cannot sort them
        index_of_name = {name: index for index, name in enumerate(dict.fromkeys(names))}
        residual_sums = np.bincount([index_of_name[name] for name in names], residuals)
        return float((residual_sums**2).sum()), len(index_of_name)

    item_squares, item_count = cluster_squares(items)
    rater_squares, rater_count = cluster_squares(raters)
    joint_squares, _ = cluster_squares(list(zip(items, raters, strict=True)))
    # In units of N^2
    item_variance = max(rate * (1 - rate) * sample.size**2 / item_count, item_squares)
    rater_variance = item_squares + rater_squares - joint_squares
    # 1e-9: the sums of one rater differ from 0 by rounding
    depends_on_raters = rater_variance > item_variance * (1 + 1e-9)
    if item_count == sample.size and not depends_on_raters:
        return MeanInterval(rate, *wilson_interval(float(sample.sum()), sample.size, confidence))
    variance = max(item_variance, rater_variance) / sample.size**2
    # If all outcomes are 0, or all are 1, the variance is 0, and every item counts once.
    effective_size = rate * (1 - rate) / variance if variance > 0 else item_count
    quantile = float(ndtri(0.5 + confidence / 2))
    if depends_on_raters and rater_count >= _LEAST_RATERS:
        quantile = float(stdtrit(rater_count - 1, 0.5 + confidence / 2))
    lo, hi = wilson_ends(rate, max(effective_size, 1e-9), quantile)
    return MeanInterval(rate, 0.0 if rate == 0 else float(lo), 1.0 if rate == 1 else float(hi))


def clustered_mean(values: ArrayLike, clusters: Sequence[Hashable], confidence: float = 0.95) -> MeanInterval:
    """Compute the mean of clustered values, with an interval that accounts for the clusters.

    The values may be differences of paired outcomes, for example. The interval is Student's for C - 1 degrees
    of freedom and the variance of `clustered_rate`.

    Args:
        values: finite values [N] in any unit.
        clusters: name of each value's cluster, [N].
        confidence: level of the interval, in (0, 1).
    Returns: (mean, lo, hi) in the unit of `values`.
    Raises: ValueError for fewer than two clusters, or for different numbers of values and cluster names.
    """
    mean_value, residual_sums, degrees_of_freedom = _clustered_sums("clustered_mean", values, clusters)
    residuals = np.asarray(values, dtype=np.float64) - mean_value
    # As in `clustered_rate`: the larger of the variance of independent values and the cluster-robust one.
    variance = (
        max(float((residuals**2).sum()), float((residual_sums**2).sum()))
        / np.size(values) ** 2
        * (degrees_of_freedom + 1)
        / degrees_of_freedom
    )
    # Student's quantile times the cluster-robust standard error.
    half_width = float(stdtrit(degrees_of_freedom, 0.5 + confidence / 2)) * math.sqrt(variance)
    return MeanInterval(mean_value, mean_value - half_width, mean_value + half_width)


def _clustered_sums(
    caller_name: str, values: ArrayLike, clusters: Sequence[Hashable]
) -> tuple[float, np.ndarray, int]:
    """Return the mean, the sum of (value - mean) of each cluster [C], and the degrees of freedom C - 1."""
    sample = _finite_vector(caller_name, values)
    # [N]: index of each value's cluster in the sorted list of clusters
    _, cluster_indices = np.unique(np.asarray(clusters), return_inverse=True)
    cluster_count = int(cluster_indices.max()) + 1
    if cluster_indices.size != sample.size:
        raise ValueError(
            f"{caller_name}: expected one cluster name for each value, got {sample.size} values and"
            f" {cluster_indices.size} names. Pass both in the same order."
        )
    if cluster_count < 2:
        raise ValueError(
            f"{caller_name}: expected values of at least two clusters, got one cluster. Add another cluster,"
            " because the interval is computed from the spread between clusters."
        )
    residual_sums = np.bincount(cluster_indices, sample - sample.mean())
    return float(sample.mean()), residual_sums, cluster_count - 1


class PairedSummary(NamedTuple):
    """Statistics of the differences `after - before` of paired measurements.

    The mean, the median and the standard deviation have the unit of the measurement.
    """

    n: int  # number of pairs
    mean: float  # mean difference
    mean_lo: float  # ends of the bootstrap interval of the mean
    mean_hi: float
    median: float  # median difference
    std: float  # sample standard deviation of the differences (divisor n - 1); 0 for one pair
    positive: int  # number of pairs with after > before
    negative: int  # number of pairs with after < before
    ties: int  # number of pairs with after = before
    positive_rate: float  # positive / n, 0..1
    positive_lo: float  # ends of Wilson's interval of positive_rate
    positive_hi: float
    sign_p: float  # p-value of the two-sided exact sign test on the pairs without ties, 0..1
    confidence: float  # level of both intervals, in (0, 1)


def paired_summary(
    before: ArrayLike, after: ArrayLike, confidence: float = 0.95, seed: int = 0, resample_count: int = 10_000
) -> PairedSummary:
    """Summarise the differences `after - before` of paired samples.

    The summary contains the mean with a bootstrap interval, the median, the rate of increases and an exact
    sign test.

    Args:
        before: finite values [N] of N items.
        after: finite values [N] of the same items in the same order.
        confidence: level of the intervals, in (0, 1).
        seed: seed of the bootstrap.
        resample_count: number of resamples of the bootstrap, >= 100.
    Raises: ValueError if the lengths differ, there is no item, or a value is not finite.
    """
    values_before = _finite_vector("paired_summary", before)
    values_after = _finite_vector("paired_summary", after)
    if values_before.shape != values_after.shape:
        raise ValueError(
            f"paired_summary: expected as many values after as before, got {values_before.size} before and"
            f" {values_after.size} after. Pass the same items in both."
        )
    differences = values_after - values_before  # [N]
    # Differences, not values, are resampled, which keeps pairs together.
    mean_interval = bootstrap_mean_interval(differences, confidence, resample_count, seed)
    positive_count = int((differences > 0).sum())
    negative_count = int((differences < 0).sum())
    positive_rate = wilson_interval(positive_count, differences.size, confidence)
    return PairedSummary(
        n=differences.size,
        mean=mean_interval.mean,
        mean_lo=mean_interval.lo,
        mean_hi=mean_interval.hi,
        median=float(np.median(differences)),
        std=float(differences.std(ddof=1)) if differences.size > 1 else 0.0,
        positive=positive_count,
        negative=negative_count,
        ties=differences.size - positive_count - negative_count,
        positive_rate=positive_count / differences.size,
        positive_lo=positive_rate.lo,
        positive_hi=positive_rate.hi,
        # Ties carry no information on the sign and are left out of the test, as is usual.
        sign_p=binomial_test(positive_count, positive_count + negative_count),
        confidence=confidence,
    )


class Line(NamedTuple):
    """A fitted line y = intercept + slope * x, with the interval of its slope."""

    slope: float  # unit of y per unit of x
    lo: float  # lower end of the interval of the slope
    hi: float  # upper end of the interval of the slope
    intercept: float  # value at x = 0, unit of y
    n: int  # number of points


def _pair(caller_name: str, x: ArrayLike, y: ArrayLike, smallest_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Check x and y, and return both as float64 vectors [N].

    Args:
        caller_name: name of the calling function, which begins the message.
        x, y: values of the same items.
        smallest_size: smallest allowed N.
    Raises: ValueError if the lengths differ or are smaller than `smallest_size`, or if a value is not finite.
    """
    x_vector = np.asarray(x, dtype=np.float64).reshape(-1)
    y_vector = np.asarray(y, dtype=np.float64).reshape(-1)
    if x_vector.size != y_vector.size or x_vector.size < smallest_size:
        raise ValueError(
            f"{caller_name}: expected as many values of x as of y, and at least {smallest_size} of each, got"
            f" {x_vector.size} values of x and {y_vector.size} of y. Pass one x and one y for every item."
        )
    nonfinite_count = int((~(np.isfinite(x_vector) & np.isfinite(y_vector))).sum())
    if nonfinite_count:
        raise ValueError(
            f"{caller_name}: expected finite values, got NaN or infinity in {nonfinite_count} of"
            f" {x_vector.size} pairs. Remove these pairs first."
        )
    return x_vector, y_vector


def fit_line(x: ArrayLike, y: ArrayLike, confidence: float = 0.95) -> Line:
    """Fit a least-squares line. The interval of its slope is valid for unequal variances of the residuals.

    slope = sum_i (x_i - mean x) y_i / S with S = sum_i (x_i - mean x)^2. The variance of the slope is HC3
    (MacKinnon and White 1985): sum_i (x_i - mean x)^2 (e_i / (1 - h_i))^2 / S^2, where e_i is the residual
    and h_i = 1/N + (x_i - mean x)^2 / S the leverage of point i. The quantile is Student's t with N - 2
    degrees of freedom.

    Args:
        x: finite values [N], N >= 3, at least two of them distinct.
        y: finite values [N] of the same items.
        confidence: level of the interval, in (0, 1).
    Raises: ValueError for fewer than 3 points, different lengths, a value that is not finite, or constant x.
    """
    x_vector, y_vector = _pair("fit_line", x, y, 3)
    centred_x = x_vector - x_vector.mean()
    squares_of_x = float((centred_x**2).sum())  # S
    if squares_of_x == 0:
        raise ValueError(
            "fit_line: expected at least two distinct values of x, but all are equal. Add a point with"
            " another x."
        )
    # The mean of y need not be subtracted, because `centred_x` sums to 0.
    slope = float((centred_x * y_vector).sum() / squares_of_x)
    intercept = float(y_vector.mean() - slope * x_vector.mean())
    residuals = y_vector - intercept - slope * x_vector
    # A point has leverage 1 and residual 0 if all other points share another x. The bound avoids 0 / 0 there.
    leverage = np.minimum(1 / x_vector.size + centred_x**2 / squares_of_x, 1 - 1e-9)
    # HC3 standard error of the slope.
    standard_error = math.sqrt(float((centred_x**2 * (residuals / (1 - leverage)) ** 2).sum())) / squares_of_x
    half_width = float(stdtrit(x_vector.size - 2, 0.5 + confidence / 2)) * standard_error
    return Line(
        slope=slope, lo=slope - half_width, hi=slope + half_width, intercept=intercept, n=x_vector.size
    )


def slopes(times: ArrayLike, values: ArrayLike) -> np.ndarray:
    """Compute the least-squares slope over time of every item.

    Args:
        times: times [T], at least two of them distinct.
        values: values [N, T] of N items at these times.
    Returns: slopes [N], in the unit of the values per unit of time.
    Raises: ValueError for other shapes, or if all times are equal.
    """
    time_vector = np.asarray(times, dtype=np.float64)
    value_matrix = np.asarray(values, dtype=np.float64)
    if time_vector.ndim != 1 or value_matrix.ndim != 2 or value_matrix.shape[1] != time_vector.size:
        raise ValueError(
            f"slopes: expected times [T] and values [N, T], got the shapes {time_vector.shape} and"
            f" {value_matrix.shape}. Pass one value per item and time."
        )
    if time_vector.size < 2 or time_vector.min() == time_vector.max():
        raise ValueError(
            f"slopes: expected at least two distinct times, got {time_vector.tolist()}. Pass values of at"
            " least two different times."
        )
    centred_times = time_vector - time_vector.mean()
    item_slopes: np.ndarray = value_matrix @ centred_times / (centred_times @ centred_times)
    return item_slopes


def spearman(x: ArrayLike, y: ArrayLike, confidence: float = 0.95) -> MeanInterval:
    """Compute Spearman's rank correlation rho of pairs, with its interval. Tied values get their mean rank.

    The interval is tanh(atanh(rho) +- q sqrt((1 + rho^2 / 2) / (N - 3))) with the two-sided normal quantile q
    (Bonett and Wright 2000, Psychometrika 65, 23-28). A perfect correlation has an interval of zero width.

    Args:
        x: finite values [N], N >= 4, not all equal.
        y: finite values [N] of the same items, not all equal.
        confidence: level of the interval, in (0, 1).
    Returns: (rho, lo, hi) in -1..1.
    Raises: ValueError for fewer pairs, a value that is not finite, or constant x or y.
    """
    x_ranks, y_ranks = (rankdata(variable_values) for variable_values in _pair("spearman", x, y, 4))
    for variable_name, ranks in (("x", x_ranks), ("y", y_ranks)):
        if ranks.min() == ranks.max():
            raise ValueError(
                f"spearman: all values of {variable_name} are equal, so they cannot be ranked. Pass at least"
                " two distinct values."
            )
    # By rounding, the correlation may exceed 1 slightly.
    rho = float(np.clip(np.corrcoef(x_ranks, y_ranks)[0, 1], -1, 1))
    # atanh(1) is infinite, so a perfect correlation is handled separately.
    if abs(rho) > 1 - 1e-12:
        sign = math.copysign(1.0, rho)
        return MeanInterval(sign, sign, sign)
    half_width = float(ndtri(0.5 + confidence / 2)) * math.sqrt((1 + rho**2 / 2) / (x_ranks.size - 3))
    return MeanInterval(rho, math.tanh(math.atanh(rho) - half_width), math.tanh(math.atanh(rho) + half_width))


MOST_DECIMALS = 9  # largest number of decimals of `decimals_apart`


def decimals_apart(numbers: Iterable[float], reference: float, decimals: int) -> int:
    """Return the number of decimals with which no number is printed as a reference from which it differs.

    A sentence that calls a ratio of 1.004 "more" must not print it as "1.00".

    Args:
        numbers: numbers that are printed together.
        reference: number with which they are compared, such as 1 for ratios.
        decimals: smallest number of decimals.

    >>> decimals_apart([1.004, 1.3], 1, 2), decimals_apart([1.04, 1.3], 1, 2), decimals_apart([1, 1.3], 1, 2)
    (3, 2, 2)
    """
    different_numbers = [number for number in numbers if number != reference]
    for digits in range(decimals, MOST_DECIMALS):
        # compared as numbers, since -0.00 and 0.00 are the same
        if all(round(number - reference, digits) != 0 for number in different_numbers):
            return digits
    return MOST_DECIMALS
