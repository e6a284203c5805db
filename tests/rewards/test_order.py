"""Figures of pairs whose volume errors differ, and of one handcrafted feature."""

import numpy as np

from eg3d_rlhf.preferences.labels import Preference
from eg3d_rlhf.rewards.evaluation import evaluate_feature


def test_a_feature_is_counted_by_the_noise_free_order_and_separately_where_errors_differ():
    labels = [
        Preference(winner=1, loser=2, clean=1, extra={"gap": 0.5}),
        Preference(winner=2, loser=1, clean=1, extra={"gap": 0.5}),  # a mistaken label
        Preference(winner=3, loser=1, clean=3, extra={"gap": 0.01}),
        Preference(winner=2, loser=3),  # without a noise-free order
    ]
    figures = evaluate_feature({1: 0.9, 2: 0.1, 3: 0.5}, labels)
    assert (figures["clean"]["correct"], figures["clean"]["n"]) == (2, 3)
    assert (figures["apart"]["correct"], figures["apart"]["n"]) == (2, 2)
    assert "apart" not in evaluate_feature(dict.fromkeys(range(4), 0.0), labels[2:]) and np.isfinite(
        figures["clean"]["accuracy"]
    )
