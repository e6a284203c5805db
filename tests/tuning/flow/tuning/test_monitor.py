"""Each known failure sign is seen, and a healthy run shows none."""

import pytest

from eg3d_rlhf.tuning.flow.train_pairs import PAIRS, pair_signs, recent


def lines(count, *, rates=None, **figures):
    """Lines of 16 pairs every 10 updates; a figure is a number or a function of the line's number. rates: by update."""
    usual = {"loss": 0.69, "implicit_accuracy": 0.6, "margin": 1e-3, "w_diff": -5e-4, "l_diff": 5e-4, "grad_norm": 1.0}
    found = [] if rates is None else [{"step": 0, "pairs": 0, "win_rate": rates[0]}]
    for i in range(count):
        values = {k: v(i) if callable(v) else v for k, v in {**usual, **figures}.items()}
        found.append({"step": 10 * (i + 1), "pairs": 16, **values})
        if rates is not None and 10 * (i + 1) in rates:
            found[-1]["win_rate"] = rates[10 * (i + 1)]
    return found


def test_a_healthy_run_shows_none():
    assert pair_signs([]) == {} and pair_signs(lines(0, rates={0: 0.5})) == {}
    assert pair_signs(lines(40, rates={0: 0.5, 100: 0.6, 400: 0.7}, margin=lambda i: 1e-4 * i, w_diff=lambda i: -5e-5 * i)) == {}
    assert pair_signs(lines(40, loss=0.6931)) == {}  # a flat loss is no sign


def test_pairs_that_are_told_apart():
    found = pair_signs(lines(6, implicit_accuracy=0.97))
    assert list(found) == ["separated"] and "step 60: implicit accuracy 0.970 is above 0.95" in found["separated"]
    assert "loser_weight=0.5" in found["separated"]
    assert pair_signs(lines(3, implicit_accuracy=1.0)) == {}  # too few pairs to say
    assert pair_signs(lines(6, implicit_accuracy=0.97), preference=False) == {}


def test_the_latest_figures_are_weighed_by_pairs():
    found = lines(10, implicit_accuracy=lambda i: float(i >= 6))
    assert recent(found, "implicit_accuracy") == 1.0 and recent(found[: PAIRS // 16 - 1], "implicit_accuracy") is None
    assert pair_signs(found[:9]) == {} and list(pair_signs(found)) == ["separated"]


def test_pairs_that_are_told_apart_without_effect_are_off_policy():
    found = pair_signs(lines(20, implicit_accuracy=0.99, rates={0: 0.5, 200: 0.51}))
    assert set(found) == {"separated", "no-effect"} and "off-policy" in found["no-effect"] and "0.510 after 0.500" in found["no-effect"]
    assert "no-effect" not in pair_signs(lines(20, implicit_accuracy=0.99, rates={0: 0.5, 200: 0.6}))
    assert "no-effect" not in pair_signs(lines(20, implicit_accuracy=0.99, rates={0: 0.5}))
    assert "no-effect" not in pair_signs(lines(20, implicit_accuracy=0.99, rates={0: 0.5, 100: 0.8, 200: 0.5}))  # on its way down


def test_running_from_the_rejected():
    growing = {"margin": lambda i: 1e-3 * i, "w_diff": lambda i: 2e-3 * i, "l_diff": lambda i: 3e-3 * i}
    found = pair_signs(lines(20, **growing))
    assert list(found) == ["preferred-worse"] and "runs from the rejected" in found["preferred-worse"]
    assert pair_signs(lines(20, **{**growing, "margin": lambda i: 1e-3 * (20 - i)})) == {}  # the margin shrinks
    assert pair_signs(lines(20, **{**growing, "w_diff": lambda i: 1e-4 * i})) == {}  # next to nothing beside the rejected


def test_a_win_rate_that_falls():
    def found(*rates):
        return pair_signs(lines(40, rates={100 * i: rate for i, rate in enumerate(rates)}))

    assert found(0.5, 0.72, 0.66, 0.65) == {} and found(0.5, 0.72, 0.58) == {} and found(0.5, 0.72, 0.58, 0.66, 0.58) == {}
    assert list(found(0.5, 0.72, 0.6, 0.58)) == ["past-best"] == list(found(0.5, 0.72, 0.51))
    assert "step 300: the held-out win rate fell to 0.580 from 0.720 at step 100" in found(0.5, 0.72, 0.6, 0.58)["past-best"]
    assert set(found(0.5, 0.72, 0.31)) == {"past-best", "collapse"}
    assert "step 200: the held-out win rate is 0.310, worse than" in found(0.5, 0.72, 0.31)["collapse"]
    assert list(found(0.5, 0.47, 0.46)) == ["collapse"] and found(0.5, 0.46) == {}  # once is within the noise
    assert found(0.3, 0.35, 0.34) == {}  # better than it began


@pytest.mark.parametrize(("name", "factor"), [("loss", 5), ("grad_norm", 11)])
def test_spikes(name, factor):
    found = pair_signs(lines(20, **{name: lambda i: factor if i == 19 else 1.0}))
    assert list(found) == ["spikes"] and f"step 200: {name} {factor}" in found["spikes"]
    assert pair_signs(lines(20, **{name: lambda i: factor / 2 if i == 19 else 1.0})) == {}
    assert pair_signs(lines(5, **{name: lambda i: factor if i == 4 else 1.0})) == {}
    assert "spikes" in pair_signs(lines(20, **{name: lambda i: factor if i == 19 else 1.0}), preference=False)


def test_a_loss_without_a_floor_that_runs_away():
    growing = {"w_error": lambda i: 1.0 + 0.1 * i, "l_error": lambda i: 1.0 + 0.2 * i}
    found = pair_signs(lines(20, **growing), preference=False)
    assert list(found) == ["runaway"] and "rejected ones' error is 4.8 after 1" in found["runaway"]
    assert pair_signs(lines(4, **growing), preference=False) == {}
