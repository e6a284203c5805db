"""Lines, slopes and rank correlations against scipy and by simulation."""

import numpy as np
import pytest
import scipy.stats

from eg3d_rlhf.core.statistics import fit_line, slopes, spearman

RNG = np.random.default_rng(3)


def test_line_is_scipys():
    x = RNG.normal(size=40)
    y = 0.3 * x - 2 + RNG.normal(size=40)
    ours, theirs = fit_line(x, y), scipy.stats.linregress(x, y)
    np.testing.assert_allclose([ours.slope, ours.intercept], [theirs.slope, theirs.intercept], rtol=1e-10)
    assert ours.lo < ours.slope < ours.hi and ours.n == 40


def test_hc3_is_the_sandwich_written_out():
    x, y = RNG.normal(size=25), RNG.normal(size=25)
    design = np.stack([np.ones(25), x], axis=1)
    bread = np.linalg.inv(design.T @ design)
    residual = y - design @ (bread @ design.T @ y)
    leverage = np.einsum("ni,ij,nj->n", design, bread, design)
    error = np.sqrt((bread @ (design.T * (residual / (1 - leverage)) ** 2) @ design @ bread)[1, 1])
    half = scipy.stats.t.ppf(0.975, 23) * error
    found = fit_line(x, y)
    np.testing.assert_allclose([found.lo, found.hi], [found.slope - half, found.slope + half], rtol=1e-8)


def test_line_interval_covers_with_unequal_scatter():
    rng, hits = np.random.default_rng(0), 0
    for _ in range(2000):
        x = rng.normal(size=100)
        hits += (lambda line: line.lo <= 0.7 <= line.hi)(fit_line(x, 0.7 * x + (0.3 + np.abs(x)) * rng.normal(size=100)))
    assert 0.93 <= hits / 2000 <= 0.97


def test_slopes_are_fitted_lines():
    times, values = np.array([0.0, 0.1, 0.4, 0.5]), RNG.normal(size=(6, 4))
    np.testing.assert_allclose(slopes(times, values), [fit_line(times, row).slope for row in values], rtol=1e-10)


def test_spearman_is_scipys_with_ties():
    x, y = RNG.integers(0, 6, 50), RNG.integers(0, 6, 50)
    found = spearman(x, y)
    np.testing.assert_allclose(found.mean, scipy.stats.spearmanr(x, y).statistic, rtol=1e-12)
    assert -1 < found.lo < found.mean < found.hi < 1


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_spearman_interval_covers(rho):
    rng, hits = np.random.default_rng(1), 0
    truth = 6 / np.pi * np.arcsin(rho / 2)  # of a bivariate normal
    for _ in range(1000):
        x = rng.normal(size=100)
        found = spearman(x, rho * x + np.sqrt(1 - rho**2) * rng.normal(size=100))
        hits += found.lo <= truth <= found.hi
    assert 0.925 <= hits / 1000 <= 0.975


def test_perfect_order_has_no_width():
    assert spearman([1, 2, 3, 4, 5], [2, 4, 8, 16, 32]) == (1, 1, 1) and spearman([1, 2, 3, 4, 5], [5, 4, 3, 2, 1]).mean == -1


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: fit_line([1, 1, 1], [1, 2, 3]), "one alone"), (lambda: fit_line([1, 2], [1, 2]), "at least 3"),
        (lambda: slopes([0, 0], [[1, 2]]), "not all equal"), (lambda: spearman([1, 1, 1, 1], [1, 2, 3, 4]), "a constant"),
        (lambda: spearman([1, 2, np.nan, 3], [1, 2, 3, 4]), "finite"),
    ],
)
def test_unusable_values_are_refused(call, text):
    with pytest.raises(ValueError, match=text):
        call()
