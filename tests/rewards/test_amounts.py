"""Too few labels are said to be so, and an AUC's interval holds."""

import math

import numpy as np
import pytest

from eg3d_rlhf.people.study.power import decided_trials
from eg3d_rlhf.rewards.amounts import LEAST_TEST, auc_interval, too_few, too_few_shapes
from eg3d_rlhf.rewards.evaluation import auc

FRACTIONS = (0.7, 0.15, 0.15)


def test_too_few_pairs_are_told_with_how_many_are_wanted():
    said = too_few({"train": 17, "val": 4, "test": 3}, FRACTIONS)
    assert said.startswith("too few labels: 17 pairs to train, 4 to choose the epoch by and 3 to test; some 360 labels are wanted")
    assert too_few({"train": 252, "val": 54, "test": 54}, FRACTIONS) == ""
    assert "too few" in too_few({"train": 252, "val": 54, "test": 53}, FRACTIONS) and "too few" in too_few_shapes(26, 60)
    assert too_few_shapes(27, 27) == ""


def test_the_least_test_pairs_tell_seven_in_ten_from_chance():
    assert decided_trials(0.7) == LEAST_TEST


def test_an_auc_of_one_has_room_for_doubt():
    low, high = auc_interval(1.0, 5, 5)
    assert 0.4 < low < 0.8 and high == 1 and auc_interval(0.0, 5, 5) == pytest.approx((0, 1 - low))
    assert auc_interval(0.7, 50, 50) == pytest.approx((0.59, 0.79), abs=0.02)


@pytest.mark.parametrize(("good", "others", "apart"), [(10, 10, 0.0), (10, 10, 1.5), (25, 25, 0.8), (8, 30, 1.0)])
def test_the_interval_of_an_auc_holds_the_truth(good, others, apart):
    rng, truth = np.random.default_rng(0), 0.5 * (1 + math.erf(apart / 2))
    held = []
    for _ in range(600):
        low, high = auc_interval(auc(rng.normal(apart, 1, good), rng.normal(0, 1, others)), good, others)
        held.append(low <= truth <= high)
    assert 0.92 <= np.mean(held) <= 0.98
