"""The shown points and the advice, on made-up gains."""

import numpy as np
import pytest

from eg3d_rlhf.evaluation.baselines.frontier import advise, choose_point, choose_share
from eg3d_rlhf.evaluation.baselines.rungs import CollateralBound

KEEPS = {"identity_kept": 1.0, "front_moved_voxels": 0.0, "variety": 1.0, "intact_degraded": 0.0}


@pytest.mark.parametrize(
    "name, at_bound, beyond",
    [
        ("identity_kept", 0.95, 0.94),
        ("front_moved_voxels", 0.1, 0.11),
        ("variety", 0.95, 0.94),
        ("intact_degraded", 0.02, 0.03),
    ],
)
def test_each_metric_can_exceed_the_bound(name, at_bound, beyond):
    bound = CollateralBound()
    assert bound.exceeded_by({**KEEPS, name: at_bound}) == []
    assert bound.exceeded_by({**KEEPS, name: beyond}) == [name]
    # a metric that is not defined is not checked
    assert bound.exceeded_by({**KEEPS, name: None}) == []


def test_one_degraded_sample_is_always_allowed():
    bound = CollateralBound()
    assert bound.exceeded_by({**KEEPS, "intact_degraded": 1 / 38, "intact": 38.0}) == []
    assert bound.exceeded_by({**KEEPS, "intact_degraded": 2 / 38, "intact": 38.0}) == ["intact_degraded"]


def test_the_strongest_point_within_the_bound_is_shown():
    assert choose_point([[], [], ["variety"], []]) == 3
    assert choose_point([[], [], ["variety"], ["variety"]]) == 1
    assert choose_point([[], [], []], strongest=1) == 1
    assert choose_point([["variety"], ["variety"]]) == 0


def test_the_share_of_a_filter_separates_those_that_it_helps():
    changed = np.array([0.01, 0.02, 0.3, 0.4])
    before = np.array([1.0, 1.0, 0.0, 0.0])
    after = np.array([0.0, 0.0, 1.0, 1.0])  # worse where little changes
    shares = (np.inf, 0.35, 0.1, 0.0)
    assert choose_share(before, after, changed, shares) == (2, 1.0)
    # a filter that helps nobody is never applied
    assert choose_share(before, before - 1, changed, shares) == (0, 0.5)


def test_the_cheapest_rung_with_a_negligible_loss_is_advised():
    rng = np.random.default_rng(0)
    best = 1 + 0.1 * rng.standard_normal(200)
    gains = {
        "nothing": np.zeros(200),
        "weak": 0.5 * best,
        "cheap": best - 0.02,
        "dear": best,
    }
    advice = advise(gains, dict.fromkeys(gains, True))
    assert advice["best"] == "dear" and advice["cheapest"] == "cheap" and advice["undecided"] == []
    assert advice["losses"]["cheap"][0] == pytest.approx(0.02 / best.mean())
    assert advice["losses"]["nothing"][0] == pytest.approx(1)
    # a rung beyond the bound is neither the best nor sufficient
    assert advise(gains, {**dict.fromkeys(gains, True), "cheap": False, "dear": False})["cheapest"] == "weak"


def test_few_latents_cannot_decide():
    rng = np.random.default_rng(1)
    best = 1 + rng.standard_normal(12)
    gains = {"nothing": np.zeros(12), "cheap": best + 1.5 * rng.standard_normal(12) - 0.3, "dear": best + 1}
    advice = advise(gains, dict.fromkeys(gains, True))
    assert advice["cheapest"] == "dear"
    noise = rng.standard_normal(12)
    undecided = advise(
        {"nothing": np.zeros(12), "cheap": best + 1 + noise - noise.mean(), "dear": best + 1.05},
        {"nothing": True, "cheap": True, "dear": True},
    )
    assert undecided["undecided"] == ["cheap"] and undecided["cheapest"] == "dear"


def test_without_a_certain_gain_nothing_is_advised():
    noise = np.random.default_rng(2).standard_normal(50)
    gains = {"nothing": np.zeros(50), "harmful": noise - noise.mean() - 0.1}
    advice = advise(gains, dict.fromkeys(gains, True))
    assert advice["best"] is None and advice["cheapest"] is None
    assert advise(gains, dict.fromkeys(gains, False))["best"] is None
