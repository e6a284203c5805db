"""Advantages of five programs, several rewards, GARDO's gate, and windows of steps against what they
computed.
"""

import itertools
import random

import numpy as np
import pytest
import torch

from eg3d_rlhf.tuning.flow.training.online.advantages import Gate, Scale, advantages, combine_rewards
from eg3d_rlhf.tuning.flow.training.online.settings import progressive_window, random_window
from tests.compat.absent import some
from tests.compat.online_reference import Values, each, options, present

PROGRAMS = {  # how each divides
    "flow_grpo": {"correction": 0},
    "verl": {"correction": 1},
    "unirl": {"correction": 1, "plus": 1e-8},
    "flow_factory": {"plus": 0.0, "least": 1e-6},
}
SINGLE = 1e-6  # ours end in float32


def close(got: torch.Tensor, want: np.ndarray) -> None:
    np.testing.assert_allclose(got, want, rtol=SINGLE, atol=SINGLE * np.abs(want).max())


@each("advantages")
def test_advantages(case):
    program = case.split("/")[0]
    settings = options("advantages")
    if program in ("", "trap", "gardo"):
        return
    rewards = Values("advantages", "").tensor("rewards")
    known = Values("advantages", case)
    for key, want in known.items():
        if program == "gdpo_trl" or key == "gdpo":
            scale = Scale(correction=1) if program == "gdpo_trl" else Scale(**PROGRAMS["flow_factory"])
            got = combine_rewards(
                rewards, settings["weights"], scale, normalise_sum=key != "before_batch_norm"
            )
        else:
            over = {"True": "raw", "False": "group", "std": "none"}[key.rpartition("_")[2]]
            whole = key.startswith("sum")  # Flow-Factory adds its rewards first
            first = (
                (torch.tensor(settings["weights"]).view(-1, 1, 1) * rewards).sum(0) if whole else rewards[0]
            )
            options_of = {} if over == "none" else PROGRAMS[program]
            got = advantages(first, Scale(over=over, **({"plus": 0.0} if over == "none" else options_of)))
        close(got, want)
    known.done()


def test_a_group_without_spread_teaches_nothing_where_published_code_makes_it_noise():
    known = present("advantages", "trap")
    rewards = known.tensor("rewards32")
    assert (
        not advantages(rewards[None]).any()
        and not advantages(rewards[None], Scale(correction=1, plus=1e-8)).any()
    )
    if "unirl" in known:
        assert np.abs(known["unirl"]).max() > 1e-3
    if "flow_grpo" in known:
        known.holds("flow_grpo", advantages(rewards[None])[0].double())
    known.done()


def test_the_gate_with_the_sign_of_its_purpose_is_the_shipped_one_on_negated_rewards():
    known = present("advantages", "gardo")
    gate = Gate(**options("advantages").get("gate", {}))
    number = 0
    gates = []
    shares = []
    while f"rewards{number}" in known:
        rewards = -known.tensor(f"rewards{number}").double()
        gates.append(gate(rewards[0], rewards[1:]).numpy())
        shares.append(gate.share)
        number += 1
    for key, got in {"gate": np.stack(gates or [[]]), "share": np.array(shares)}.items():
        if key in known:
            known.holds(key, got)


# Windows.


def window_cases(pick: bool) -> list[tuple[str, object]]:
    found = options("windows").get("cases", {})
    every: list[tuple[str, object]] = (
        [(name, case) for name, case in found.items() if isinstance(case, dict)]
        if not pick
        else [
            (f"{name}{i}", case)
            for name, of_name in found.items()
            if isinstance(of_name, list)
            for i, case in enumerate(of_name)
        ]
    )
    return some(every, f"this set has no windows {'drawn' if pick else 'that move'} in windows.json", width=2)


@pytest.mark.parametrize(("name", "case"), window_cases(False))
def test_windows_that_move(name, case):
    """As recorded, but for those that shrank or stood empty: ours stay whole."""
    settings = case["settings"]
    recorded = case["windows"]
    size = settings["group_size"]
    steps = settings["max_timesteps"]
    whole = [
        list(range(min(window[0], steps - size), min(window[0], steps - size) + size))
        for window in recorded
        if window
    ]
    if settings.get("sample_strategy") == "random":
        ours = [list(random_window(size, 0, steps, lambda low, high: 0))]  # it begins at 0
        first = case.get("seed", settings.get("seed", 0))
        for seed in range(first, first + len(recorded) - 1):
            draw = np.random.default_rng(seed)
            ours.append(
                list(
                    random_window(
                        size, 0, steps, lambda low, high, draw=draw: int(draw.integers(low, high + 1))
                    )
                )
            )
        assert ours == recorded
        return
    told = settings.get("prog_overlap_step", settings.get("stride", 1))  # by the original's name, or ours
    stride = told if settings.get("prog_overlap") else size
    facts = {
        "stride": stride,
        "rounds": settings["iters_per_group"],
        "repeat": settings.get("roll_back", False),
    }
    ours = [
        list(progressive_window(i, size, 0, steps, **facts))
        for i in range((settings["iters_per_group"] + 1) * len(recorded))
    ]
    wanted = [window for window, _ in itertools.groupby(whole)]
    assert [window for window, _ in itertools.groupby(ours)][: len(wanted)] == wanted
    for mine, theirs in zip(
        ours, itertools.takewhile(lambda window: len(window) == size, recorded), strict=False
    ):
        assert mine == theirs or settings.get("sample_strategy") == "exp_decay"
    assert all(len(window) == size for window in ours)


@pytest.mark.parametrize(("name", "case"), window_cases(True))
def test_windows_that_are_drawn(name, case):
    low, high = case["range"] or (0, case["size"])
    draw = random.Random(case["seed"]).randint
    if case["size"] > high - low:  # verl-omni lets it reach beyond
        with pytest.raises(ValueError, match="window"):
            random_window(case["size"], low, high, draw)
        return
    window = random_window(case["size"], low, high, draw)
    assert [window.start, window.stop] == case["window"]
