"""Statistics equal those of scipy or written-out formulas, and intervals cover at their nominal rate, by
simulation.
"""

import numpy as np
import pytest
from scipy import stats

from eg3d_rlhf.core.statistics import (
    binomial_test,
    bootstrap_mean_interval,
    decimals_apart,
    fit_line,
    paired_summary,
    slopes,
    spearman,
    t_mean_interval,
    wilson_interval,
)
from eg3d_rlhf.evaluation.rewards import slope_summary
from eg3d_rlhf.measures.feature_sets import paired_separability
from eg3d_rlhf.measures.measure import Measure
from eg3d_rlhf.measures.resampling import frechet_change_interval, kernel_change_interval
from eg3d_rlhf.tuning.flow.training.accuracy import Accuracy


@pytest.mark.parametrize(("successes", "n"), [(0, 5), (1, 7), (5, 10), (37, 50), (744, 1000), (100, 100)])
@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.99])
def test_wilson_matches_scipy(successes, n, confidence):
    expected = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    lo, hi = wilson_interval(successes, n, confidence)
    assert (lo, hi) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(
    ("successes", "n", "rate"), [(0, 1, 0.5), (3, 12, 0.5), (9, 12, 0.5), (17, 40, 0.3), (300, 1000, 0.27)]
)
def test_binomial_matches_scipy(successes, n, rate):
    assert binomial_test(successes, n, rate) == pytest.approx(
        stats.binomtest(successes, n, rate).pvalue, rel=1e-8
    )


def test_bootstrap_matches_the_normal_interval_and_repeats():
    values = np.random.RandomState(3).randn(400) * 2 + 5
    mean, lo, hi = bootstrap_mean_interval(values, seed=1)
    half = 1.96 * values.std(ddof=1) / 20
    assert mean == pytest.approx(values.mean())
    assert (lo, hi) == pytest.approx((mean - half, mean + half), abs=0.03)
    assert bootstrap_mean_interval(values, seed=1) == (mean, lo, hi)
    assert bootstrap_mean_interval(values, seed=2) != (mean, lo, hi)


def test_t_interval_equals_that_of_scipy():
    values = np.array([1.0, 4.0, 2.5])
    expected = stats.t.interval(0.9, 2, values.mean(), stats.sem(values))
    assert t_mean_interval(values, 0.9)[1:] == pytest.approx(expected)


def test_paired_summary_counts_and_negates():
    before = np.array([0.0, 1, 2, 3, 4])
    after = np.array([1.0, 1, 4, 2, 9])
    summary = paired_summary(before, after)
    assert (summary.n, summary.positive, summary.negative, summary.ties) == (5, 3, 1, 1)
    assert summary.mean == pytest.approx(1.4)
    assert summary.sign_p == pytest.approx(stats.binomtest(3, 4).pvalue)
    swapped = paired_summary(after, before)
    assert (swapped.mean, swapped.positive, swapped.sign_p) == (
        -summary.mean,
        summary.negative,
        summary.sign_p,
    )
    assert all(isinstance(value, int | float) for value in summary._asdict().values())


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: wilson_interval(5, 4), ("successes", "5", "4")),
        (lambda: wilson_interval(1, 4, 95), ("confidence", "95")),
        (lambda: binomial_test(1, 4, 1.5), ("rate", "1.5")),
        (lambda: bootstrap_mean_interval([1.0, float("nan")]), ("finite", "2")),
        (lambda: paired_summary([1.0], [1.0, 2.0]), ("1", "2")),
        (lambda: t_mean_interval([1.0]), ("one",)),
        (lambda: fit_line([1, 1, 1], [1, 2, 3]), ("x",)),
        (lambda: fit_line([1, 2], [1, 2]), ("3", "2")),
        (lambda: slopes([0, 0], [[1, 2]]), ("times", "[0.0, 0.0]")),
        (lambda: spearman([1, 1, 1, 1], [1, 2, 3, 4]), ("x", "equal")),
        (lambda: spearman([1, 2, np.nan, 3], [1, 2, 3, 4]), ("finite", "4")),
    ],
)
def test_mistakes_are_named(call, names):
    with pytest.raises(ValueError) as caught:
        call()
    assert all(name in str(caught.value) for name in names), caught.value


RNG = np.random.default_rng(3)


def test_line_equals_that_of_scipy():
    x = RNG.normal(size=40)
    y = 0.3 * x - 2 + RNG.normal(size=40)
    fitted = fit_line(x, y)
    expected = stats.linregress(x, y)
    np.testing.assert_allclose(
        [fitted.slope, fitted.intercept], [expected.slope, expected.intercept], rtol=1e-10
    )
    assert fitted.lo < fitted.slope < fitted.hi and fitted.n == 40


def test_hc3_is_the_sandwich_written_out():
    x = RNG.normal(size=25)
    y = RNG.normal(size=25)
    design = np.stack([np.ones(25), x], axis=1)
    bread = np.linalg.inv(design.T @ design)
    residual = y - design @ (bread @ design.T @ y)
    leverage = np.einsum("ni,ij,nj->n", design, bread, design)
    error = np.sqrt((bread @ (design.T * (residual / (1 - leverage)) ** 2) @ design @ bread)[1, 1])
    half = stats.t.ppf(0.975, 23) * error
    fitted = fit_line(x, y)
    np.testing.assert_allclose([fitted.lo, fitted.hi], [fitted.slope - half, fitted.slope + half], rtol=1e-8)


def test_slopes_are_fitted_lines():
    times = np.array([0.0, 0.1, 0.4, 0.5])
    values = RNG.normal(size=(6, 4))
    np.testing.assert_allclose(
        slopes(times, values), [fit_line(times, row).slope for row in values], rtol=1e-10
    )


def test_spearman_equals_that_of_scipy_with_ties():
    x = RNG.integers(0, 6, 50)
    y = RNG.integers(0, 6, 50)
    fitted = spearman(x, y)
    np.testing.assert_allclose(fitted.mean, stats.spearmanr(x, y).statistic, rtol=1e-12)
    assert -1 < fitted.lo < fitted.mean < fitted.hi < 1


# Coverage of intervals

RUNS = 1000  # standard error of a coverage of 95 %: 0.7 %


def coverage(truth, interval, make, runs=RUNS, seed=0):
    """Return the share of samples whose interval (..., lo, hi) includes the truth."""
    rng = np.random.default_rng(seed)
    covered = 0
    for _ in range(runs):
        *_, lo, hi = interval(*make(rng))
        covered += lo <= truth <= hi
    return covered / runs


def nominal(share):
    return 0.93 <= share <= 0.97


def bootstrap(values):
    return bootstrap_mean_interval(values, resample_count=500)


@pytest.mark.parametrize("draw", ["normal", "exponential", "uniform"])
def test_bootstrap_covers_the_mean_of_a_hundred_values(draw):
    truth = {"normal": 0.0, "exponential": 1.0, "uniform": 0.5}[draw]
    assert nominal(coverage(truth, bootstrap, lambda rng: (getattr(rng, draw)(size=100),)))


def paired(before, after):
    summary = paired_summary(before, after, resample_count=500)
    return summary.mean_lo, summary.mean_hi


def pairs(rng):
    before = rng.normal(size=100)
    return before, before + 0.3 + 0.5 * rng.standard_t(6, size=100)


def test_paired_summary_covers_the_mean_difference():
    assert nominal(coverage(0.3, paired, pairs))


@pytest.mark.parametrize(("rho", "n"), [(0.0, 25), (0.5, 40), (-0.8, 100)])
def test_spearman_covers_the_rank_correlation(rho, n):
    def make(rng):
        x = rng.normal(size=n)
        return x, rho * x + np.sqrt(1 - rho**2) * rng.normal(size=n)

    assert nominal(coverage(6 / np.pi * np.arcsin(rho / 2), spearman, make))


def test_the_spread_of_slopes_includes_their_mean():
    times = np.array([0.0, 0.06, 0.12, 0.18, 0.24])

    def make(rng):
        item_slopes = 2.0 + rng.normal(size=(100, 1))
        return (rng.normal(size=(100, 1)) + item_slopes * times + 0.2 * rng.normal(size=(100, 5)),)

    summary = slope_summary(times, make(np.random.default_rng(1))[0])
    assert (
        summary["spread_lo"]
        < summary["mean_lo"]
        < summary["mean"]
        < summary["mean_hi"]
        < summary["spread_hi"]
    )


def test_separability_has_the_nominal_rate_of_false_positives():
    rng = np.random.default_rng(0)
    p_values = []
    for run in range(400):
        # pairs are similar; a test that ignored the pairs would never reject
        shared = rng.normal(size=(20, 4))
        a, b = (shared + 0.3 * rng.normal(size=(20, 4)) for _ in range(2))
        p_values.append(paired_separability(a, b, k=5, permutations=99, seed=run).p)
    assert 0.025 <= np.mean(np.array(p_values) <= 0.05) <= 0.08


@pytest.mark.long
@pytest.mark.parametrize(
    ("function", "F", "n"), [(frechet_change_interval, 6, 300), (kernel_change_interval, 6, 300)]
)
def test_intervals_of_changes_cover_the_true_change(function, F, n):
    """Move fakes a little away from the reals; the truth is that of infinitely many samples."""

    def sets(rng, n):
        base = rng.normal(size=(n, F))
        return base + 0.2, 1.1 * base + 0.3, rng.normal(size=(n, F))

    if function is frechet_change_interval:
        truth = F * (0.3**2 + 0.1**2) - F * 0.2**2
    else:  # the estimate is unbiased, so its mean over many small samples is the truth
        truth = np.mean(
            [function(*sets(np.random.default_rng(s), 400), resamples=50).mean for s in range(2000, 2400)]
        )
    assert nominal(
        coverage(truth, lambda *x: function(*x, resamples=60)[:3], lambda rng: sets(rng, n), runs=800)
    )


@pytest.mark.parametrize("reference", [0.0, 0.5, 1.0, 50.0])
@pytest.mark.parametrize("difference", [0.3, 0.0401, 0.0049, -0.00021, 3e-6])
def test_a_number_is_never_printed_as_the_reference_from_which_it_differs(reference, difference):
    digits = decimals_apart([reference + difference, reference], reference, 1)
    assert f"{reference + difference:.{digits}f}" not in (
        f"{reference:.{digits}f}",
        f"-{reference:.{digits}f}",
    )
    # one decimal less would hide the difference, unless it is the smallest number
    shorter = f"{reference + difference:.{digits - 1}f}".removeprefix("-")
    assert digits == 1 or shorter == f"{reference:.{digits - 1}f}"


def test_the_accuracy_of_a_flow_shows_on_which_side_of_one_half_its_interval_lies():
    accuracy = Accuracy(accuracy=0.61, interval=(0.5002, 0.7), margin=0.1, pairs=9, prompts=3)
    assert str(accuracy) == "0.6100 [0.5002, 0.7000]"


def test_a_change_of_a_measure_without_a_better_direction_is_neither_better_nor_worse():
    higher, lower, neither = (Measure("relief", None, better, "") for better in ("higher", "lower", ""))
    assert (higher.outcome(1, 2), lower.outcome(1, 2)) == ("better", "worse")
    assert neither.outcome(1, 2) == neither.outcome(-2, -1) == "changed"
    unclear_outcomes = {measure.outcome(-1, 1) for measure in (higher, lower, neither)}
    assert len(unclear_outcomes) == 1 and unclear_outcomes.isdisjoint(("better", "worse", "changed"))
