"""Names that changed since version 0.1: settings are read under the present ones, and inputs of artefacts are
hashed under the old ones.
"""

from pathlib import Path

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.cli import file_hash
from eg3d_rlhf.evaluation.trainings import TRAIN, TRAIN_REWARD, Part
from eg3d_rlhf.experiments import version_0_1
from eg3d_rlhf.experiments.store import Store, json_hash
from eg3d_rlhf.rewards.settings import BUNDLED_LABELS

BUNDLED = {
    "generator.safetensors": file_hash(bundled.GENERATOR),
    "reward.safetensors": file_hash(bundled.REWARD),
    "reward-watch.safetensors": file_hash(bundled.HELDOUT_REWARD),
    "labels.jsonl": file_hash(BUNDLED_LABELS),
}


def test_settings_are_read_at_any_depth():
    recorded = {"reward_watch": "w", "train": {"anchors": 3}, "filters": {"question": None}, "kimg": 1}
    assert version_0_1.settings(recorded) == {
        "heldout_reward": "w",
        "train": {"reference_samples": 3},
        "filters": {"criterion": None},
        "kimg": 1,
    }
    assert version_0_1.settings({"weighing": {"roles": "op"}}) == {"weighing": {"roles": "tuned"}}
    assert version_0_1.settings({"table_seeds": 2}) == version_0_1.settings({"table_seeds": [0, 1]})


def test_the_bundled_heldout_reward_is_found_under_its_present_name(tmp_path):
    old = bundled.HELDOUT_REWARD.with_name("reward-watch.safetensors")
    assert version_0_1.settings({"reward_watch": str(old)}) == {"heldout_reward": str(bundled.HELDOUT_REWARD)}
    own = tmp_path / old.name
    own.touch()
    assert version_0_1.settings({"reward_watch": str(own)}) == {"heldout_reward": str(own)}


def test_present_settings_stay():
    present = {"heldout_reward": "w", "consistency_gate": 0.5, "roles": "tuned", "table_seeds": [3]}
    assert version_0_1.settings(present) == present


def test_a_training_has_the_name_and_the_inputs_of_version_0_1(tmp_path):
    """The digits are over the words of that version; `second` is a file that a flag names."""
    second = tmp_path / "second.safetensors"
    second.write_bytes(b"reward")
    now = [
        "--reward=sigma",
        f"--heldout-reward={second}",
        "--consistency-gate=0.5",
        "--set=consistency_psi=1",
    ]
    old = ["--reward=sigma", f"--reward-watch={second}", "--anchor-gate=0.5", "--set=anchor_psi=1"]
    files = {**BUNDLED, "--reward-watch": file_hash(second)}
    part = Part.keyed("arm", Path("out"), now)
    assert part.folder == Path("out") / f"arm-{json_hash([old, files])[:8]}"
    assert part.command() == [TRAIN, *now, f"--outdir={part.folder}"]
    assert part.inputs() == {"command": [TRAIN, *old, f"--outdir={part.folder}"], "inputs": files}


def test_the_bundled_heldout_reward_has_its_old_name_in_inputs():
    part = Part("tuned", Path("out"), TRAIN, (f"--heldout-reward={bundled.HELDOUT_REWARD}",))
    old = bundled.HELDOUT_REWARD.with_name("reward-watch.safetensors")
    assert part.inputs()["command"][1] == f"--reward-watch={old}"
    assert part.inputs()["inputs"] == {**BUNDLED, "--reward-watch": file_hash(bundled.HELDOUT_REWARD)}


def test_a_reward_training_has_the_inputs_of_version_0_1():
    flags = ("--reference-samples=0", "--set=criterion=geometry", "--run-dir=out/reward")
    part = Part("reward", Path("out/reward"), TRAIN_REWARD, flags)
    old = ["--anchors=0", "--set=question=geometry", "--out=out/reward"]
    assert part.inputs() == {"command": [TRAIN_REWARD, *old], "inputs": BUNDLED}


def test_artefacts_are_hashed_with_the_old_value(tmp_path):
    old = {"weighing": {"roles": "op", "use_w1": True}}
    now = {"weighing": {"roles": "tuned", "use_w1": True}}
    store = Store(tmp_path)
    made = store.make("stage", now, lambda folder: ([], {"loss": 1}))
    assert made.folder == store.folder("stage", old)
    assert made.folder.name == f"stage-{json_hash({'format': 1, **old})[:16]}"
    assert Store(tmp_path).find("stage", old) is not None and Store(tmp_path).begun("stage", now)


def test_a_file_is_found_under_either_name(tmp_path):
    present, old = (tmp_path / name for name in version_0_1.CONDITIONING)
    assert version_0_1.conditioning_file(tmp_path) == present
    old.touch()
    assert version_0_1.conditioning_file(tmp_path) == old
    present.touch()
    assert version_0_1.conditioning_file(tmp_path) == present


def test_a_report_resumes_in_its_old_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    present = Path("runs/controlled-study")
    assert version_0_1.outdir(present) == present
    Path("runs/proof").mkdir(parents=True)
    assert version_0_1.outdir(present) == Path("runs/proof")
    assert version_0_1.outdir(Path("runs/elsewhere")) == Path("runs/elsewhere")
    present.mkdir()
    assert version_0_1.outdir(present) == present
