"""The table of all rewards: its lines and its commands."""

import json

import pytest
from click.testing import CliRunner

from eg3d_rlhf.evaluation.reward_comparison import markdown, plot, record
from eg3d_rlhf.evaluation.reward_comparison_entries import ENTRIES
from eg3d_rlhf.experiments.table import write
from eg3d_rlhf.modes import report_studies


class Learnt:
    """A reward that has nothing but a provenance."""

    def __init__(self, **provenance):
        self.provenance = provenance


TEST = {"accuracy": 0.8, "interval_95": [0.75, 0.84], "n": 300, "correct": 240}
TUNED = {
    "win_rate": 0.9,
    "win_rate_ci95": [0.85, 0.93],
    "win_rate_n": 200,
    "error_reduction": 0.5,
    "intact_degraded": 0.0,
    "face_moved_voxels": 0.02,
    "frechet_ratio": 0.99,
    "reward_delta_positive": 97,
    "reward_delta_n": 100,
}


def test_a_line_takes_the_noise_free_order_where_it_is_known():
    clean = {**TEST, "accuracy": 0.85}
    line = record(
        Learnt(test_accuracy=TEST, test_accuracy_clean=clean), [TUNED], {"reward": 10.0, "seed0": 5.0}, 600.0
    )
    assert (line["accuracy"], line["accuracy_labels"], line["against"]) == (0.85, 0.8, "noise-free order")
    assert (line["seconds"], line["oracle_win_rate"], line["oracle_win_rate_range"]) == (
        15.0,
        0.9,
        [0.85, 0.93],
    )
    assert record(Learnt(test_accuracy=TEST), [TUNED], {}, 600.0)["against"] == "labels"


def test_several_training_seeds_show_their_spread():
    line = record(
        Learnt(test_accuracy=TEST), [TUNED, {**TUNED, "win_rate": 1.0, "error_reduction": 0.7}], {}, 600.0
    )
    assert line["oracle_win_rate"] == pytest.approx(0.95) and line["oracle_win_rate_range"] == [0.9, 1.0]
    assert line["error_reduction"] == pytest.approx(0.6) and line["rewards_up"] == [97, 97]


def test_table_and_figure_are_made_of_the_json_alone(tmp_path):
    second = {**TUNED, "error_reduction": 0.7, "win_rate": 1.0}
    lines = {
        "sigma": record(Learnt(test_accuracy=TEST), [TUNED, second], {"seed0": 5.0}, 600.0),
        "depth": record(
            Learnt(test_accuracy=TEST), [{**TUNED, "error_reduction": None}], {"seed0": 5.0}, 600.0
        ),
    }
    paths = write({"rewards": lines, "full": False, "kimg": 0.3}, tmp_path, "rewards", markdown, plot)
    assert [path.name for path in paths] == ["rewards.json", "rewards.md", "rewards.png"]
    sigma, depth = (
        line for line in paths[1].read_text().splitlines() if line.startswith(("| sigma", "| depth"))
    )
    cells = [cell.strip() for cell in sigma.strip("|").split("|")]
    assert cells[1:5] == ["0.800 [0.750, 0.840]", "97", "95.0% [90.0%, 100.0%]", "60% (50% to 70%)"]
    assert depth.strip("|").split("|")[4].strip() == ""


def planned(*flags: str) -> dict:
    result = CliRunner().invoke(report_studies.rewards, ["-n", *flags])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_commands(tmp_path):
    plan = planned(f"--outdir={tmp_path}", "--seeds=0,4")
    assert list(plan) == list(ENTRIES)
    assert list(plan["sigma"]) == ["seed0", "seed4"]  # bundled: nothing to train
    assert list(plan["thumbs"]) == ["label", "reward", "seed0", "seed4"]
    assert "--set=pairs=0" in plan["thumbs"]["reward"]  # the bundled pairs have no weight
    for name, parts in plan.items():
        assert all(flag in parts["seed4"] for flag in (*ENTRIES[name].tune, "--seed=4", "--no-summary"))
    short = ENTRIES["depth"].short[0]
    assert (
        short in plan["depth"]["reward"] and short not in planned("--full", "--only=depth")["depth"]["reward"]
    )
    assert list(tmp_path.iterdir()) == []
