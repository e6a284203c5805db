"""The control of a reward run is quoted where it is one, and only there."""

import json

import pytest
from click.testing import CliRunner

import train
from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.cli import file_hash
from eg3d_rlhf.evaluation.summary import control_delta
from eg3d_rlhf.tuning.gan.reward_run import input_files
from eg3d_rlhf.tuning.gan.settings import Settings


def settings(*flags: str) -> dict:
    """As a run of train.py records them."""
    result = CliRunner().invoke(train.main, ["-n", "--reward=sigma", *flags])
    assert result.exit_code == 0, result.stderr
    resolved = json.loads(result.stdout)
    return {
        **resolved,
        "hashes": {
            name: file_hash(path) for name, path in input_files(Settings.from_values(resolved)).items()
        },
    }


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """A bundled control of the demo's own settings, without running it."""
    known = settings("--lambda-r=0")
    of_machine = ("reward_ckpt", "heldout_reward", "versions", "launch")
    record = {"tuned_delta_mean": 0.125, "images": round(known["kimg"] * 1000), "seed": 0, "lambda_r": 0.0}
    record["settings"] = {name: value for name, value in known.items() if name not in of_machine}
    (tmp_path / "control-summary.json").write_text(json.dumps(record))
    monkeypatch.setattr(bundled, "CONTROL", tmp_path / "control-summary.json")


def test_the_recorded_control_is_quoted_by_the_demo(recorded):
    figures = control_delta(settings(), 1.5)
    assert figures == {"control_delta_mean": 0.125, "control_source": "control-summary.json"}
    assert (
        control_delta(settings("--lambda-r=3", "--lambda-sigma=0", "--desc=x", "--set=rlr=0.1"), 1.5)
        == figures
    )


def test_the_bundled_control_is_that_of_the_demo():
    assert (
        control_delta(settings(), 1.5)["control_delta_mean"]
        == json.loads(bundled.CONTROL.read_text())["tuned_delta_mean"]
    )


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--kimg=1"], ["kimg 0.6 ", " 1.0"]),
        (["--data=x.zip"], [f"data {bundled.DATA} ", " x.zip"]),
        (["--seed=3"], ["seed 0 ", " 3"]),
        (["--batch=16", "--glr=0.001"], ["batch 4 ", " 16"]),
    ],
)
def test_the_recorded_control_of_other_settings_is_not_quoted(recorded, flags, names):
    figures = control_delta(settings(*flags), 1.5)
    assert figures["control_delta_mean"] is None
    assert all(name in figures["control_source"] for name in [*names, "--lambda-r=0"])


def test_the_recorded_control_of_another_network_is_not_quoted(recorded, tiny_networks, tiny_reward):
    for flag, name in (
        (f"--init={tiny_networks}", "init (bytes)"),
        (f"--reward-ckpt={tiny_reward}", "reward (bytes)"),
    ):
        figures = control_delta(settings(flag), 1.5)
        assert figures["control_delta_mean"] is None and name in figures["control_source"]


def test_a_named_control_is_checked_like_the_recorded_one(tmp_path):
    summary = {"tuned_delta_mean": 0.25, "images": 720, "seed": 0, "lambda_r": 0.0}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "training_options.json").write_text(json.dumps(settings("--lambda-r=0", "--gamma=0.5")))
    run_settings = settings("--gamma=0.5", f"--control={tmp_path}")
    assert control_delta(run_settings, 1.5) == {
        "control_delta_mean": 0.25,
        "control_source": "summary.json",
    }
    other = control_delta({**run_settings, "gamma": 0.3}, 1.5)
    assert other["control_delta_mean"] is None
    assert all(name in other["control_source"] for name in ("summary.json", "gamma 0.5 ", " 0.3"))
    (tmp_path / "training_options.json").write_text(
        json.dumps({**run_settings, "lambda_r": 10.0, "kimg": 0.08})
    )
    source = control_delta(run_settings, 1.5)["control_source"]
    assert all(name in source for name in ("kimg 0.08 ", " 0.6", "lambda_r 10.0 ", " 0"))
