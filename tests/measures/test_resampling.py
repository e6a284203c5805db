"""Intervals of distances include the known distance of Gaussians at their nominal rate, as percentiles do
not.
"""

import numpy as np
import pytest

from eg3d_rlhf.measures import resampling
from eg3d_rlhf.measures.distances import FeatureStatistics, kernel_distance
from eg3d_rlhf.measures.resampling import (
    frechet_change_interval,
    frechet_interval,
    kernel_change_interval,
    kernel_interval,
)
from tests.rejections import raising


def normal(seed, n, F, shift=0.0, scale=1.0):
    return np.random.RandomState(seed).randn(n, F) * scale + shift


def frechet_truth(F, shift, scale):
    return F * shift**2 + F * (1 - scale) ** 2


def kernel_mean(first, second):
    """Compute E (x.y / F + 1)^3 of independent Gaussians (mean, covariance) from their raw moments of
    order 1 to 3.
    """

    def moments(m, C):
        third = np.einsum("a,b,c->abc", m, m, m) + sum(
            np.einsum(f"{o[0]},{o[1:]}->abc", m, C) for o in ("abc", "bac", "cab")
        )
        return m, C + np.outer(m, m), third

    F = len(first[0])
    return 1 + sum(
        weight * (a * b).sum() / F**k
        for k, weight, a, b in zip((1, 2, 3), (3, 3, 1), moments(*first), moments(*second), strict=True)
    )


def kernel_truth(F, shift, scale):
    standard = (np.zeros(F), np.eye(F))
    changed = (np.full(F, shift), scale**2 * np.eye(F))
    return (
        kernel_mean(standard, standard) + kernel_mean(changed, changed) - 2 * kernel_mean(standard, changed)
    )


def test_measured_is_the_distance_of_all_samples():
    fake = normal(0, 80, 6)
    real = normal(1, 90, 6, 0.4, 1.3)
    statistics = [FeatureStatistics(6).update(part) for part in (fake, real)]
    assert frechet_interval(fake, real).measured == pytest.approx(
        statistics[0].distance(statistics[1]), rel=1e-9
    )
    interval = kernel_interval(fake, real)
    assert (
        interval.measured == interval.mean == pytest.approx(kernel_distance(fake, real), rel=1e-9)
        and interval.bias == 0
    )


@pytest.mark.parametrize("block", [37, 4_000_000])
def test_kernel_resample_equals_loops_over_drawn_items(block, monkeypatch):
    monkeypatch.setattr(resampling, "_BLOCK_CELLS", block)
    fake = normal(0, 9, 2)
    real = normal(1, 8, 2, 0.5)
    i = np.random.RandomState(2).randint(9, size=9)
    j = np.random.RandomState(3).randint(8, size=8)
    resampled = resampling._Kernel(fake, real).resampled(
        np.bincount(i, minlength=9)[None], np.bincount(j, minlength=8)[None]
    )[0]

    def k(a, b):
        return (a @ b / 2 + 1) ** 3

    within = [
        np.mean([k(x[a], x[b]) for a in drawn for b in drawn if a != b])
        for x, drawn in ((fake, i), (real, j))
    ]
    assert resampled == pytest.approx(
        sum(within) - 2 * np.mean([k(fake[a], real[b]) for a in i for b in j]), rel=1e-9
    )


@pytest.mark.parametrize("kind", [resampling._Frechet, resampling._Kernel])
def test_influence_is_the_derivative_with_respect_to_an_items_weight(kind):
    statistic = kind(normal(0, 40, 3), normal(1, 50, 3, 0.4, 1.5))
    step = 1e-4
    slopes = statistic.influence()
    for which, size in enumerate((40, 50)):
        assert abs(slopes[which].mean()) < 1e-9
        for item in (0, 7):
            values = []
            for sign in (1, -1):
                weights = [np.ones((1, 40)), np.ones((1, 50))]
                weights[which] = weights[which] * (1 - sign * step / size)
                weights[which][0, item] += sign * step
                values.append(statistic.resampled(*weights)[0])
            derivative = (values[0] - values[1]) / (2 * step) * size
            # the divisor n - 1 and self-pairs make a difference of order 1 over n
            assert derivative == pytest.approx(slopes[which][item], rel=0.06, abs=0.06)


def coverage(function, truth, runs, make):
    intervals = [function(*make(run), resamples=60, seed=run) for run in range(runs)]
    return intervals, np.mean([i.lo <= truth <= i.hi for i in intervals])


def test_frechet_interval_includes_the_truth_where_percentiles_do_not():
    truth = frechet_truth(6, 0.2, 1.2)
    intervals, share = coverage(
        frechet_interval, truth, 60, lambda r: (normal(r, 200, 6), normal(r + 999, 200, 6, 0.2, 1.2))
    )
    measured = np.mean([i.measured for i in intervals])
    assert (
        share >= 0.87
        and measured > 1.25 * truth
        and np.mean([i.mean for i in intervals]) == pytest.approx(truth, rel=0.1)
    )
    assert all(i.bias > 0 for i in intervals)


def test_change_of_paired_fakes_is_narrower_than_of_separate_ones():
    base = normal(0, 200, 4)
    real = normal(1, 200, 4)
    for function, single in (
        (frechet_change_interval, frechet_interval),
        (kernel_change_interval, kernel_interval),
    ):
        change = function(base + 0.3, base + 0.4, real)
        parts = [single(base + shift, real) for shift in (0.3, 0.4)]
        assert change.hi - change.lo < 0.5 * np.hypot(*(p.hi - p.lo for p in parts))
        assert change.measured == pytest.approx(parts[1].measured - parts[0].measured)
        same = function(base, base, real)
        assert same.lo == same.hi == same.mean == 0


def test_nan_is_rejected():
    for function in (frechet_interval, kernel_interval):
        with pytest.raises(ValueError, match="finite"):
            function(normal(0, 20, 3) * np.nan, normal(0, 20, 3))


def test_frechet_needs_more_samples_than_features():
    with raising("30", "20", "kernel"):
        frechet_interval(normal(0, 20, 30), normal(0, 20, 30))


@pytest.mark.long
@pytest.mark.parametrize(
    ("function", "truth", "F", "n", "shift", "scale"),
    [
        *(
            (frechet_interval, frechet_truth, *case)
            for case in (
                (8, 300, 0.2, 1.2),
                (16, 400, 0.1, 1.1),
                (16, 160, 0.1, 1.1),
                (10, 100, 0.15, 0.9),
                (4, 60, 0.2, 0.9),
                (8, 60, 0.2, 1.2),
            )
        ),
        *(
            (kernel_interval, kernel_truth, *case)
            for case in (
                (8, 400, 0.2, 1.2),
                (8, 100, 0.05, 1.05),
                (8, 100, 0.0, 1.0),
                (4, 60, 0.2, 0.9),
                (16, 160, 0.1, 1.1),
            )
        ),
    ],
)
def test_coverage(function, truth, F, n, shift, scale):
    make = lambda r: (normal(2 * r, n, F), normal(2 * r + 1, n, F, shift, scale))  # noqa: E731
    runs = 1000
    _, share = coverage(function, truth(F, shift, scale), runs, make)
    allowed = 0.02 + 2 * np.sqrt(0.95 * 0.05 / runs)  # 93 to 97 %, and two standard errors of the simulation
    assert abs(share - 0.95) <= allowed
