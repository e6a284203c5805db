"""The command `report baselines` at tiny size: without ground truth, resumed, and with bad input."""

import json

import pytest
import safetensors.numpy
from click.testing import CliRunner

from eg3d_rlhf.core.seeds import LATENTS
from eg3d_rlhf.evaluation.baselines import measurements, rungs, samples
from eg3d_rlhf.generators import load_generator
from eg3d_rlhf.modes.report_baselines import baselines
from eg3d_rlhf.preferences.labels import Preference, write_labels
from eg3d_rlhf.rewards.reward import Reward
from eg3d_rlhf.rewards.smoothness import IdentityReward, Smoothness
from tests import tiny_runs
from tests.rejections import rejected
from training import networks


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Flags of a tiny network with two rewards, and small sizes."""
    monkeypatch.setattr(measurements, "POINTS", 16)
    monkeypatch.setattr(rungs, "TRUNCATIONS", (0.7,))
    monkeypatch.setattr(rungs, "MOVES", (-0.5, 1.0))
    monkeypatch.setattr(rungs, "STEPS", (1, 2))
    monkeypatch.setattr(rungs, "CLOSING_RADII", (8,))
    monkeypatch.setattr(samples, "IMAGE_PIXELS", 16)
    for seed, name in ((0, "before"), (1, "after")):
        networks.save(tmp_path / f"{name}.safetensors", tiny_runs.build_networks(seed=seed))
    generator = load_generator(tmp_path / "before.safetensors").generator
    Reward(Smoothness.from_generator(generator), IdentityReward()).save(tmp_path / "reward.safetensors")
    return [
        f"--network={tmp_path / 'before.safetensors'}",
        f"--reward-ckpt={tmp_path / 'reward.safetensors'}",
        f"--outdir={tmp_path / 'report'}",
        "--latents=4",
        "--validation=4",
        "--jobs=1",
    ]


def read(tmp_path) -> dict:
    return json.loads((tmp_path / "report" / "baselines.json").read_text())


def test_a_network_without_ground_truth(tiny, tmp_path):
    flags = [*tiny, "--only=truncation,best-of,filter,principal-direction,tuning", "--seed=1"]
    flags.append(f"--run={tmp_path / 'after.safetensors'}")
    result = CliRunner().invoke(baselines, flags)
    assert result.exit_code == 0, result.output
    data = read(tmp_path)
    assert data["seeds"] == list(LATENTS.take(4, 1)) and data["seeds"][0] > 1_000_000
    rows = {row["key"]: row for row in data["rows"]}
    assert list(rows)[0] == "nothing" and list(rows)[-1] == "tuned"
    # without a held-out reward there is no advice, since the rungs use the only reward
    assert data["advice"] is None and data["evaluator"] == ""
    nothing = rows["nothing"]["points"][0]["metrics"]
    assert rows["nothing"]["image_change"] == pytest.approx(0, abs=1e-6)
    assert nothing["variety"] in (None, 1.0)
    # by its own reward, the best of more samples is at least as good
    chosen = [rows[f"best-of-{count}"]["points"][0]["metrics"]["reward"] for count in (2, 4, 8)]
    assert nothing["reward"] <= chosen[0] <= chosen[1] <= chosen[2]
    assert {"error", "intact_degraded"} & set(nothing) == set()
    # the arrays by latent have the means that the table has
    arrays = safetensors.numpy.load_file(tmp_path / "report" / samples_file())
    assert arrays["nothing #0: reward"].mean() == pytest.approx(nothing["reward"])
    assert set(data["missing"]) and all("eg3d-rlhf" in command for command in data["missing"].values())
    # a second call computes nothing
    before = sorted((tmp_path / "report" / "work").rglob("done.json"))
    times = [path.stat().st_mtime_ns for path in before]
    assert CliRunner().invoke(baselines, flags).exit_code == 0
    assert [path.stat().st_mtime_ns for path in before] == times


def samples_file() -> str:
    return "baselines-latents.safetensors"


def test_a_heldout_reward_gives_advice(tiny, tmp_path, tiny_reward):
    flags = [*tiny, "--only=best-of", f"--heldout-reward={tiny_reward}"]
    result = CliRunner().invoke(baselines, flags)
    assert result.exit_code == 0, result.output
    data = read(tmp_path)
    assert data["evaluator"] and data["advice"]["latents"] == 4
    rows = {row["key"]: row for row in data["rows"]}
    arrays = safetensors.numpy.load_file(tmp_path / "report" / samples_file())
    gain = arrays["best-of-4 #0: heldout"] - arrays["nothing #0: heldout"]
    assert rows["best-of-4"]["points"][0]["metrics"]["gain"] == pytest.approx(gain.mean())


def test_bad_input(tiny, tmp_path):
    def run(*flags):
        return CliRunner().invoke(baselines, [*tiny, "-n", *flags])

    assert run().exit_code == 0
    rejected(run("--only=sculpting"), "--only", "sculpting")
    rejected(run(f"--heldout-reward={tmp_path / 'reward.safetensors'}"), "--heldout-reward")
    rejected(run(f"--run={tmp_path / 'missing.safetensors'}"), "--run", "missing.safetensors")
    rejected(
        CliRunner().invoke(baselines, ["-n", f"--network={tmp_path / 'before.safetensors'}"]), "--reward-ckpt"
    )
    foreign = [Preference(winner=2 * i, loser=2 * i + 1, generator="0" * 64) for i in range(30)]
    labels = write_labels(tmp_path / "labels.jsonl", foreign)
    rejected(run(f"--labels={labels}"), "labels", "0" * 12)
    rejected(run(str(tmp_path)), "--network", "WORK")
    rejected(CliRunner().invoke(baselines, ["-n", str(tmp_path)]), str(tmp_path), "work.json")
