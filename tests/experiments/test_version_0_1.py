"""Renamed keys: settings and records of version 0.1 read as the present ones, and hashed inputs are the old
ones.
"""

from dataclasses import asdict, replace

import pytest

from eg3d_rlhf.evaluation.controlled_study.plan import Plan
from eg3d_rlhf.evaluation.settings import INVERTED, LABELS, RANDOMISED
from eg3d_rlhf.experiments import version_0_1
from eg3d_rlhf.modes.online import TOY_RUN
from eg3d_rlhf.tuning.flow.training.arm_runs import folder_of

OLD = {
    "mode": "online",
    "run": {
        "losses": {"nft": {"max_away": 0.4, "use": "reward"}, "grpo": {"max_away": None, "use": "shuffled"}},
        "arms": ["nft", "nft-shuffled", "grpo-plain-inverted", "dpo-shuffled"],
        "judging": {"per_condition": 4},
        "source": {"pipeline": "toy"},
    },
    "groups": ["a", "i", "anchor", "shuffled", "turned", "fed_winners"],
    "hashes": {"init": "1", "watch": "2"},
}
NEW = {
    "mode": "online",
    "run": {
        "losses": {
            "nft": {"max_drift": 0.4, "use": "reward"},
            "grpo": {"max_drift": None, "use": "randomised"},
        },
        "arms": ["nft", "nft-randomised", "grpo-plain-inverted", "dpo-randomised"],
        "evaluation": {"per_condition": 4},
        "source": {"pipeline": "toy"},
    },
    "groups": ["a", "i", "regulariser", "randomised", "inverted", "fed_winners"],
    "hashes": {"init": "1", "heldout": "2"},
}


def test_options_of_a_run_are_read_under_the_present_names():
    assert version_0_1.options(OLD) == NEW == version_0_1.options(NEW)


def test_hashed_settings_keep_the_former_names():
    assert version_0_1.former_settings(NEW["run"]["losses"]) == OLD["run"]["losses"]
    losses = version_0_1.former_settings(asdict(TOY_RUN.losses))
    assert all("max_away" in loss and "max_drift" not in loss for loss in losses.values())
    control = replace(TOY_RUN.losses.nft, use="randomised")
    assert version_0_1.former_settings(asdict(control))["use"] == "shuffled"


@pytest.mark.parametrize(
    ("task", "former"),
    [
        ("dpo-randomised-3", "dpo-shuffled-3"),
        ("randomised-0", "shuffled-0"),
        ("nft-inverted-1", "nft-inverted-1"),
    ],
)
def test_folders_of_arms_are_found(task, former, tmp_path):
    assert version_0_1.former_task(task) == former and folder_of(tmp_path, task) == tmp_path / task
    (tmp_path / former).mkdir()
    assert folder_of(tmp_path, task) == tmp_path / former


def plan_in(out) -> Plan:
    return Plan(
        out=out,
        arms=[LABELS, RANDOMISED, INVERTED],
        seeds=[0],
        rewards=1,
        draws=1,
        latents=2,
        network=None,
        labels=out / "labels.jsonl",
        train=(),
        tune=(),
    )


def test_a_controlled_study_finds_the_files_of_its_arms(tmp_path):
    assert plan_in(tmp_path).reward(RANDOMISED).parent.name == "randomised-d0-r0"
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "coin0.jsonl").write_text("")
    plan = plan_in(tmp_path)
    assert plan.labels_of(RANDOMISED, 0).name == "coin0.jsonl"
    assert plan.reward(RANDOMISED).parent.name == "coin-d0-r0"
    assert plan.reward(INVERTED).parent.name == "inverted-d0-r0"  # the folder had no such arm


def test_lines_and_records_are_renamed():
    old = {"step": 3, "away": 0.2, "watched/chooser": 0.1, "reward/own": 1.0}
    assert version_0_1.flow_stats(old) == {"step": 3, "drift": 0.2, "heldout/chooser": 0.1, "reward/own": 1.0}
    assert version_0_1.flow_progress({"step": 1, "sums": {"away": 1.0}}) == {
        "step": 1,
        "sums": {"drift": 1.0},
    }
    line = {"nimg": 8, "Watch/second": {"mean": 1.0}, "RLHF/held": {"mean": 0.5}}
    assert version_0_1.gan_stats(line).keys() == {"nimg", "Monitored/heldout", "RLHF/consistency_weight"}
    assert version_0_1.loop_pairs({"pairs": 2, "op_rewarded": 0.5}) == {"pairs": 2, "tuned_rewarded": 0.5}
    heads = {"before": {"error_broken": 0.4}, "filter": {"repaired": 0.1}}
    renamed = {"before": {"error_defective": 0.4}, "post_processing": {"error_reduction": 0.1}}
    assert version_0_1.summary({"heads": heads, "broken_n": 2}) == {"heads": renamed, "defective_n": 2}


def test_a_cached_part_of_a_report_is_renamed():
    known = {"facts": {}, "says": [], "pictures": {"a": "a.png"}, "rows": [{"seed": 1, "judge": 2.0}]}
    found = version_0_1.finding("scores", {**known, "data": {"scores": {"judge": [1.0]}, "judge": [2.0]}})
    assert found["images"] == {"a": "a.png"} and found["rows"] == [{"seed": 1, "evaluator": 2.0}]
    assert found["data"] == {"scores": {"judge": [1.0]}, "evaluator": [2.0]}  # the name of a reward stays
