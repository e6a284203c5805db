"""Intervals of accuracies count pairs: repeated labels and several annotators do not narrow them."""

import numpy as np
import pytest
from scipy.special import ndtri

from eg3d_rlhf.core.statistics import rate_of_repeated_trials, wilson_interval
from tests.rejections import raising


def test_one_outcome_per_pair_gives_wilsons_interval_bitwise():
    outcomes = np.arange(45) % 5 > 0
    rate, *ends = rate_of_repeated_trials(outcomes, range(45), [None] * 45)
    assert rate == 36 / 45 and tuple(ends) == wilson_interval(36, 45)


@pytest.mark.parametrize("raters", [lambda k: None, lambda k: f"ann{k}"], ids=["repeats", "annotators"])
@pytest.mark.parametrize("times", [2, 5])
@pytest.mark.parametrize("correct", [0, 36, 45])
def test_equal_outcomes_of_a_pair_give_the_interval_of_the_pairs(raters, times, correct):
    outcomes = np.tile(np.arange(45) < correct, times)
    items = list(range(45)) * times
    names = [raters(k) for k in range(times) for _ in range(45)]
    result = rate_of_repeated_trials(outcomes, items, names)
    assert result == pytest.approx((correct / 45, *wilson_interval(correct, 45)), abs=1e-12)


def test_a_difference_between_annotators_widens_the_interval():
    # five annotators of 20 pairs each, with accuracies of .4 to 1
    outcomes = np.concatenate([np.arange(20) < 20 * share for share in (0.4, 0.55, 0.7, 0.85, 1.0)])
    raters = [f"ann{k}" for k in range(5) for _ in range(20)]
    _, low, high = rate_of_repeated_trials(outcomes, range(100), raters)
    independent = wilson_interval(70, 100)
    assert high - low > 1.5 * (independent.hi - independent.lo)


@pytest.mark.parametrize(("annotators", "per_pair"), [(1, 3), (2, 2), (6, 2), (6, 1)])
def test_coverage(annotators, per_pair):
    """The interval contains the true rate in at least 93 % of cases, where Wilson's over lines does not."""
    rng = np.random.default_rng(0)
    pairs = 60
    covered = np.zeros(2)
    cases = 600
    items = np.repeat(np.arange(pairs), per_pair)
    for _ in range(cases):
        raters = rng.integers(annotators, size=pairs * per_pair)
        if annotators >= per_pair:
            raters = np.concatenate([rng.permutation(annotators)[:per_pair] for _ in range(pairs)])
        # outcomes of one pair are correlated by its difficulty
        difficulty = np.repeat(rng.standard_normal(pairs), per_pair)
        own = rng.standard_normal(pairs * per_pair)
        outcomes = np.sqrt(0.7) * difficulty + np.sqrt(0.3) * own < ndtri(0.7)
        _, low, high = rate_of_repeated_trials(outcomes, items.tolist(), raters.tolist())
        by_lines = wilson_interval(float(outcomes.sum()), outcomes.size)
        covered += [low <= 0.7 <= high, by_lines.lo <= 0.7 <= by_lines.hi]
    share, share_of_lines = covered / cases
    assert share >= 0.93
    if per_pair > 1:
        assert share_of_lines < 0.9


def test_mistakes_are_named():
    with raising("3", "2"):
        rate_of_repeated_trials([1, 0, 1], [1, 2], [1, 2, 3])
    with raising("empty"):
        rate_of_repeated_trials([], [], [])
