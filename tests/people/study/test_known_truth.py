"""Studies whose truth is known: the interval covers it as often as it says, and random sides cancel the side
bias.
"""

import numpy as np
import pytest

from eg3d_rlhf.core.statistics import wilson_interval
from eg3d_rlhf.people.study.analysis import cluster_bootstrap, win_rate
from eg3d_rlhf.people.study.power import SimulationOptions, centre, coverage, simulate
from tests.rejections import raising


@pytest.mark.parametrize(
    "kind",
    [
        {},  # eight annotators who differ, two for each of 150 latents that differ
        {"ties": "excluded", "tie_share": 0.2},
        {"left_bias": 0.8},  # takes the left of two equals four times out of five
        {"annotators": 4},
        {"annotators": 20, "annotators_per_pair": 4, "latents": 60},
        {"annotator_sd": 0.8, "latent_sd": 1.0},
        {"annotator_sd": 0.0, "latent_sd": 0.0},  # nothing is clustered
        {"annotators_per_pair": 1, "latents": 300},
        {"annotators": 1, "annotators_per_pair": 1, "annotator_sd": 0.0},
        {"preference": 0.5},
        {"tie_share": 0.2, "left_bias": 0.6},  # ties that count half pull the truth towards one half
    ],
)
def test_the_interval_covers_the_truth_in_93_to_97_per_cent_of_1000_studies(kind):
    options = SimulationOptions(**{"preference": 0.7, "left_bias": 0.65, "tie_share": 0.0, "seed": 1, **kind})
    result = coverage(options)
    ties = options.tie_share if options.ties == "half" else 0.0
    assert (
        result["truth"] == options.truth == pytest.approx(options.preference * (1 - ties) + 0.5 * ties)
        and options.studies == 1000
    )
    assert 0.93 <= result["intervals"]["clustered"]["coverage"] <= 0.97, result["intervals"]
    assert result["mean_win_rate"] == pytest.approx(options.truth, abs=0.01)


def test_wilson_alone_covers_too_rarely_when_annotators_differ():
    differing = coverage(SimulationOptions(annotator_sd=0.8))["intervals"]["wilson"]["coverage"]
    alike = coverage(SimulationOptions(annotator_sd=0.0, latent_sd=0.0))["intervals"]["wilson"]["coverage"]
    assert differing < 0.85 and alike > 0.93


def test_random_sides_cancel_the_side_bias_and_fixed_sides_do_not():
    biased = {"preference": 0.7, "left_bias": 0.7, "tie_share": 0.0}
    fair, unfair = (coverage(SimulationOptions(**biased, random_sides=random)) for random in (True, False))
    assert fair["mean_win_rate"] == pytest.approx(0.7, abs=0.005) and fair["left_share"] > 0.6
    assert unfair["mean_win_rate"] > 0.82 and unfair["intervals"]["clustered"]["coverage"] < 0.2
    equals = {"preference": 0.5, "left_bias": 0.65, "tie_share": 0.0}
    # a difference out of nothing
    fair, unfair = (coverage(SimulationOptions(**equals, random_sides=random)) for random in (True, False))
    assert 0.03 <= fair["intervals"]["clustered"]["rejects_50_percent"] <= 0.07  # false alarms, as designed
    assert (
        fair["intervals"]["wilson"]["rejects_50_percent"] > 0.1
        and unfair["intervals"]["clustered"]["rejects_50_percent"] > 0.7
    )


def test_the_bootstraps_cover_as_documented():
    result = coverage(
        SimulationOptions(studies=60, annotator_sd=0.0, latent_sd=0.0, tie_share=0.0),
        bootstrap_study_count=60,
        resample_count=300,
    )
    assert result["intervals"]["bootstrap_both"]["coverage"] > 0.96  # wider than needed without clusters
    assert result["intervals"]["bootstrap_latents"]["coverage"] > 0.88


def test_the_centre_makes_the_win_rate_what_was_asked():
    rng = np.random.default_rng(0)
    mu = centre(0.7, bias=0.9, sd=0.6)
    log_odds = mu + 0.9 * rng.choice([-1, 1], 400_000) + 0.6 * rng.standard_normal(400_000)
    assert (1 / (1 + np.exp(-log_odds))).mean() == pytest.approx(0.7, abs=1e-3)
    assert centre(0.5, 1.3, 0.4) == pytest.approx(0, abs=1e-9)


def test_without_clusters_the_interval_is_wilsons_with_t():
    scores = np.array([1.0] * 14 + [0.0] * 6)
    alone = np.arange(20)
    result = win_rate(scores, alone, alone)
    assert (result.wilson[0][0], result.wilson[1][0]) == pytest.approx(tuple(wilson_interval(14, 20)))
    assert result.design_effect[0] == pytest.approx(1) and result.degrees[0] == 19


def test_copying_every_trial_of_an_annotator_gives_no_new_knowledge():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 2, 40).astype(float)
    annotator = np.arange(40)
    once = win_rate(scores, annotator, np.arange(40))
    twice = win_rate(np.repeat(scores, 5), np.repeat(annotator, 5), np.arange(200))
    assert (
        twice.clustered[0][0] == pytest.approx(once.clustered[0][0], abs=2e-3)
        and twice.wilson[0][0] > once.wilson[0][0] + 0.05
    )


def test_exchanging_the_generators_mirrors_everything():
    trials = simulate(SimulationOptions(studies=5))
    there = win_rate(trials.scores, trials.annotator, trials.latent)
    back = win_rate(1 - trials.scores, trials.annotator, trials.latent)
    assert np.allclose(back.rate, 1 - there.rate) and np.allclose(back.clustered[0], 1 - there.clustered[1])
    assert np.allclose(back.p_clustered, there.p_clustered)


def test_a_clean_sweep_has_an_interval_too():
    result = win_rate(np.ones(30), np.arange(30) % 3, np.arange(30))
    assert result.rate[0] == 1 and 0.3 < result.clustered[0][0] < 1 and result.clustered[1][0] == 1
    with raising("trial"):
        win_rate(np.full(4, np.nan), np.arange(4), np.arange(4))


def test_trials_that_do_not_count_change_nothing():
    trials = simulate(SimulationOptions(studies=1, tie_share=0.3, ties="excluded"))
    scores = trials.scores[0]
    counts = ~np.isnan(trials.scores[0])
    with_gaps = win_rate(scores, trials.annotator, trials.latent)
    without = win_rate(
        scores[counts], trials.annotator[counts], np.unique(trials.latent[counts], return_inverse=True)[1]
    )
    assert (
        with_gaps.clustered[0][0] == pytest.approx(without.clustered[0][0], rel=1e-12)
        and with_gaps.n[0] == counts.sum()
    )


def test_the_bootstrap_over_clusters_has_the_clusters_spread():
    means = np.array([0.2, 0.5, 0.9, 0.6])
    scores = np.repeat(means, 25)
    annotator = np.repeat(np.arange(4), 25)
    lo, hi = cluster_bootstrap(scores, annotator, np.arange(100), "annotators", resample_count=20_000)
    draws = np.random.default_rng(1).choice(means, (20_000, 4)).mean(axis=1)
    assert (lo, hi) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])), abs=0.02)


@pytest.mark.parametrize(
    "wrong",
    [{"preference": 1.0}, {"left_bias": 0}, {"tie_share": 1}, {"annotators_per_pair": 9}, {"ties": "drop"}],
)
def test_impossible_simulations_are_rejected(wrong):
    with raising(*wrong):
        SimulationOptions(**wrong)
