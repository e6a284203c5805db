"""The table of a comparison against counts by hand, with known judges."""

import pytest
import torch

from eg3d_rlhf.core.statistics import wilson_interval
from eg3d_rlhf.tuning.distill.compare import compare, markdown


class Assets(list):
    """Numbers in the place of assets."""


class Larger:
    """The larger number is better; a difference under a half ties."""

    def compare(self, first, second, prompts):
        return [-1 if abs(a - b) < 0.5 else int(b > a) for a, b in zip(first, second, strict=True)]


PAIRS = [("x", 0), ("y", 0), ("x", 1), ("y", 1)]


def table(**arms):
    measured = {name: {"size": torch.tensor([float(v) for v in values])} for name, values in arms.items()}
    data, judgements = compare(
        {name: Assets(values) for name, values in arms.items()}, PAIRS, Larger(), measured
    )
    return {**data, "evaluator": "size"}, judgements


def test_win_rates_count_ties_half_whatever_the_order_of_arms():
    for order in (("sds", "other"), ("other", "sds")):
        values = {"sds": [1, 1, 1, 1], "other": [2, 2, 0, 1]}
        data, judgements = table(**{name: values[name] for name in order})
        other = data["arms"]["other"]
        assert other["win_rate"] == pytest.approx(2.5 / 4) and other["ties"] == 1 and other["n"] == 4
        assert other["ci95"] == list(wilson_interval(2.5, 4))
        assert [(j.winner == "tie", j.prompt) for j in judgements] == [
            (False, "x #0"),
            (False, "y #0"),
            (False, "x #1"),
            (True, "y #1"),
        ]
        assert (
            data["arms"]["sds"]["win_rate"] == 0.5
            and other["elo"]["mean"] > data["arms"]["sds"]["elo"]["mean"]
        )
    assert "| other | 0.625" in markdown(data)


def test_measures_leave_out_what_does_not_apply():
    data, _ = compare(
        {"sds": Assets([1, 1, 1, 1])} | {"b": Assets([2, 2, 2, 2])},
        PAIRS,
        Larger(),
        {
            name: {
                "share": torch.tensor([1.0, torch.nan, 0.0, torch.nan]),
                "unmeasured": torch.full((4,), torch.nan),
            }
            for name in ("sds", "b")
        },
    )
    assert (
        data["arms"]["b"]["measures"]["share"]["mean"] == 0.5
        and data["arms"]["b"]["measures"]["share"]["n"] == 2
    )
    assert set(data["arms"]["b"]["measures"]) == {"share"} and "unmeasured" not in markdown(
        {**data, "evaluator": "size"}
    )


def test_changes_are_paired():
    data, _ = table(sds=[1, 2, 3, 4], b=[2, 3, 4, 5])
    assert data["arms"]["b"]["changes"]["size"] == {"mean": 1.0, "ci95": [1.0, 1.0], "n": 4}
    assert "| b | +1 [+1, +1] |" in markdown(data)
