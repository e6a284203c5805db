"""Test which settings the control, the run with lambda_r = 0, shares with its run."""

import pytest

from eg3d_rlhf.modes.gan import resolve
from eg3d_rlhf.tuning.gan.settings import (
    DataConfig,
    EarlyStopConfig,
    RewardConfig,
    RoundConfig,
    Settings,
    control_differs,
    not_the_controls,
)
from training.config import GanConfig, NetworkConfig, knobs_of

RECORDED = {**Settings(task="reward").to_dict(), "hashes": {"init": "a" * 64, "reward": "b" * 64}}


@pytest.mark.parametrize("kind", [RewardConfig, EarlyStopConfig])
def test_the_control_shares_no_setting_of_the_reward_phase(kind):
    """At lambda_r = 0 there is no such phase. A new term has to be marked with control=False."""
    assert [field.name for field, _, knob in knobs_of(kind) if knob.control] == []


@pytest.mark.parametrize("kind", [GanConfig, NetworkConfig, DataConfig, RoundConfig])
def test_the_control_shares_what_trains_the_gan(kind):
    """But for the name of the initial network, whose hash counts."""
    assert {field.name for field, _, knob in knobs_of(kind) if not knob.control} <= {"init"}


@pytest.mark.parametrize("name", sorted(RECORDED))
def test_another_value_is_a_difference_unless_it_is_marked(name):
    other = {"init": "c" * 64} if name == "hashes" else "another"
    differ = control_differs({**RECORDED, "lambda_r": 10.0}, {**RECORDED, "lambda_r": 0.0, name: other})
    if name == "lambda_r":
        assert len(differ) == 1  # it must be 0
    elif name == "hashes":
        assert [line.split()[0] for line in differ] == ["init"]
    else:
        assert [line.split()[0] for line in differ] == ([] if name in not_the_controls() else [name])


def test_the_demos_control_differs_by_its_weight_alone():
    run, control = (resolve({"reward": "sigma", "lambda_r": weight}).to_dict() for weight in (10.0, 0.0))
    assert {name for name in run if run[name] != control[name]} == {"lambda_r"} <= not_the_controls()
