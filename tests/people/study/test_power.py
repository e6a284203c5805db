"""Sample sizes against brute force over every outcome, and the ways in which a study cannot be planned."""

import pytest
from scipy.stats import binom, binomtest

from eg3d_rlhf.people.study.power import PowerOptions, decided_trials, exact_power, sample_size
from tests.rejections import raising


@pytest.mark.parametrize(
    ("n", "rate", "alpha"),
    [(5, 0.9, 0.05), (6, 0.9, 0.05), (30, 0.8, 0.01), (49, 0.7, 0.05), (64, 0.35, 0.1)],
)
def test_power_is_the_chance_of_the_outcomes_that_the_test_rejects(n, rate, alpha):
    rejected = [k for k in range(n + 1) if binomtest(k, n, 0.5).pvalue <= alpha]
    assert exact_power(n, rate, alpha) == pytest.approx(
        sum(binom.pmf(k, n, rate) for k in rejected), abs=1e-12
    )


@pytest.mark.parametrize("rate", [0.6, 0.7, 0.8, 0.3])
def test_the_power_never_falls_back_below_what_was_asked(rate):
    n = decided_trials(rate, power=0.8)
    assert all(exact_power(k, rate) >= 0.8 for k in range(n, 3 * n)) and exact_power(n - 1, rate) < 0.8


def test_textbook_figures():
    assert exact_power(5, 0.99) == 0 and exact_power(6, 0.99) > 0.9, (
        "five trials never reject at five per cent"
    )
    # the first n of the saw with 80 % for good comes later
    assert exact_power(49, 0.7) == pytest.approx(0.810, abs=1e-3)
    assert decided_trials(0.7) == 54 and decided_trials(0.7) == decided_trials(0.3)


def test_ties_and_clusters_cost_trials():
    independent = sample_size(
        PowerOptions(true_rate=0.7, tie_share=0, annotators=8, annotator_icc=0, latent_icc=0)
    )
    assert (
        independent.trials == independent.decided == 54
        and independent.design_effect == 1
        and independent.attained >= 0.8
    )
    tied = sample_size(
        PowerOptions(true_rate=0.7, tie_share=0.5, annotators=8, annotator_icc=0, latent_icc=0)
    )
    assert tied.trials == 108
    crossed = sample_size(
        PowerOptions(
            true_rate=0.7,
            tie_share=0,
            annotators=8,
            annotators_per_pair=4,
            annotator_icc=0.02,
            latent_icc=0.2,
        )
    )
    m = crossed.design_effect * 54 / 8
    assert crossed.design_effect == pytest.approx(1 + (m - 1) * 0.02 + 3 * 0.2, rel=1e-12)
    assert crossed.trials % 4 == 0 and crossed.per_annotator == -(-crossed.trials // 8)


def test_one_annotator_speaks_for_herself_and_too_few_cannot_be_made_up_for_by_trials():
    assert sample_size(PowerOptions(true_rate=0.7, tie_share=0, annotator_icc=0.3)).trials == 54
    with raising("annotators", "22", "4", "0.1"):
        sample_size(PowerOptions(annotators=4, annotator_icc=0.1))
    with raising("0.5", "0.5005"):
        decided_trials(0.5005)


@pytest.mark.parametrize(
    ("wrong", "names"),
    [
        ({"true_rate": 0.5}, ("true_rate", "0.5")),
        ({"true_rate": 1.2}, ("true_rate", "1.2")),
        ({"alpha": 0}, ("alpha", "0")),
        ({"power": 1.0}, ("power", "1.0")),
        ({"power": 0.04}, ("power", "alpha", "0.04", "0.05")),
        ({"tie_share": 1.0}, ("tie_share", "1.0")),
        ({"annotators_per_pair": 2}, ("annotators_per_pair", "number of annotators, 1", "2")),
    ],
)
def test_impossible_wishes_are_rejected(wrong, names):
    with raising(*names):
        PowerOptions(**wrong)
