"""Statistics against scipy, plus the properties that reports rely on."""

import numpy as np
import pytest
from scipy import stats

from eg3d_rlhf.core.statistics import binomial_test, bootstrap_mean_interval, paired_summary, wilson_interval


@pytest.mark.parametrize(("successes", "n"), [(0, 5), (1, 7), (5, 10), (37, 50), (744, 1000), (100, 100)])
@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.99])
def test_wilson_matches_scipy(successes, n, confidence):
    expected = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    lo, hi = wilson_interval(successes, n, confidence)
    assert (lo, hi) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_knows_nothing_without_data():
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_wilson_is_symmetric_under_swapping_success_and_failure():
    lo, hi = wilson_interval(13, 40)
    other_lo, other_hi = wilson_interval(27, 40)
    assert (lo, hi) == pytest.approx((1 - other_hi, 1 - other_lo), abs=1e-14)


@pytest.mark.parametrize(("successes", "n", "rate"), [(0, 1, 0.5), (3, 12, 0.5), (9, 12, 0.5), (17, 40, 0.3), (300, 1000, 0.27)])
def test_binomial_matches_scipy(successes, n, rate):
    assert binomial_test(successes, n, rate) == pytest.approx(stats.binomtest(successes, n, rate).pvalue, rel=1e-8)


def test_binomial_edge_rates():
    assert binomial_test(0, 0) == 1.0
    assert binomial_test(0, 4, 0.0) == 1.0
    assert binomial_test(1, 4, 0.0) == 0.0


def test_bootstrap_matches_the_normal_interval_and_repeats():
    values = np.random.RandomState(3).randn(400) * 2 + 5
    mean, lo, hi = bootstrap_mean_interval(values, seed=1)
    half = 1.96 * values.std(ddof=1) / 20
    assert mean == pytest.approx(values.mean())
    assert (lo, hi) == pytest.approx((mean - half, mean + half), abs=0.03)
    assert bootstrap_mean_interval(values, seed=1) == (mean, lo, hi)
    assert bootstrap_mean_interval(values, seed=2) != (mean, lo, hi)


def test_bootstrap_of_a_constant_has_zero_width():
    assert bootstrap_mean_interval([2.0] * 9) == (2.0, 2.0, 2.0)


def test_paired_summary_counts_and_negates():
    before, after = np.array([0.0, 1, 2, 3, 4]), np.array([1.0, 1, 4, 2, 9])
    summary = paired_summary(before, after)
    assert (summary.n, summary.positive, summary.negative, summary.ties) == (5, 3, 1, 1)
    assert summary.mean == pytest.approx(1.4)
    assert summary.sign_p == pytest.approx(stats.binomtest(3, 4).pvalue)
    swapped = paired_summary(after, before)
    assert (swapped.mean, swapped.positive, swapped.sign_p) == (-summary.mean, summary.negative, summary.sign_p)
    assert all(isinstance(value, int | float) for value in summary._asdict().values())


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: wilson_interval(5, 4), "0 <= successes <= n"),
        (lambda: wilson_interval(1, 4, 95), "confidence"),
        (lambda: binomial_test(1, 4, 1.5), "rate"),
        (lambda: bootstrap_mean_interval([]), "at least one value"),
        (lambda: bootstrap_mean_interval([1.0, float("nan")]), "finite"),
        (lambda: paired_summary([1.0], [1.0, 2.0]), "Pair by item"),
    ],
)
def test_mistakes_are_named(call, text):
    with pytest.raises(ValueError, match=text):
        call()
