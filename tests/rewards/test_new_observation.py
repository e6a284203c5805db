"""A new observation in one file: depth maps of a plugin train a reward, which tunes a generator and serves as
held-out reward.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from eg3d_rlhf.core.registry import VARIABLE
from eg3d_rlhf.generators import load_generator, ws_of_seeds
from eg3d_rlhf.modes import reward_training
from eg3d_rlhf.modes.label_files import synthetic
from eg3d_rlhf.rewards import observations
from eg3d_rlhf.rewards.presets import PRESETS, Preset
from eg3d_rlhf.rewards.reward import Reward, check_reward, load_reward
from tests import tiny_runs
from tests.rejections import raising, rejected
from training import checkpoint, storage

PLUGIN = Path(__file__).parent / "frontal_depth.py"
KNOWN = ", ".join([*(kind for kind in observations.OBSERVATIONS if kind != "frontal-depth"), "frontal-depth"])


@pytest.fixture(scope="module", autouse=True)
def plugin():
    """Name the plugin in the environment, and nowhere else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(PLUGIN))
        yield


def succeed(command, *flags) -> str:
    result = CliRunner().invoke(command, [str(flag) for flag in flags])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def reward(tmp_path_factory) -> Path:
    """Train a reward on depth maps of the bundled generator, on simulated labels, for a few steps."""
    folder = tmp_path_factory.mktemp("depth")
    succeed(synthetic, "--pairs=24", "--block=2", "--resolution=24", f"--out={folder / 'labels.jsonl'}")
    command_output = succeed(
        reward_training.train,
        "--observation=frontal-depth",
        f"--labels={folder / 'labels.jsonl'}",
        f"--run-dir={folder / 'run'}",
        "--epochs=2",
        "--set=fractions=0.6 0.2 0.2",
    )
    assert re.search(r"\b\d+/\d+ = [01]\.\d{3}\b", command_output)  # of the test pairs
    return folder / "run" / "reward.safetensors"


def test_the_file_states_the_observation_and_fields_are_scored(reward):
    loaded = load_reward(reward)
    generator = load_generator().generator
    assert json.loads(reward.with_suffix(".json").read_text())["observation"]["kind"] == "frontal-depth"
    assert (
        type(loaded.observation) is observations.OBSERVATIONS["frontal-depth"]
        and loaded.provenance["architecture"] == "eg3d"
    )
    field = generator.field(ws_of_seeds(generator, [5, 6]).requires_grad_())
    scores = loaded.score(field)
    scores.sum().backward()
    assert scores.shape == (2,) and field.ws.grad.abs().sum() > 0
    depth = loaded.observation.observe(field).detach()
    assert depth.shape == (2, *loaded.observation.shape)
    assert depth[:, :, 8, 8].min() > depth[:, :, 0, 0].abs().max(), (
        "the head's middle is near, a corner empty"
    )
    check_reward(loaded, generator)
    elsewhere = Reward(type(loaded.observation)(radius=1.0), loaded.network)
    with raising("radius", "1.0", "2.7"):
        check_reward(elsewhere, generator)


@pytest.mark.long
def test_the_reward_tunes_and_is_the_held_out_reward_of_a_resumed_run(reward, tmp_path):
    loaded = load_reward(reward)
    for parameter in loaded.network.parameters():
        parameter.data.mul_(1.01)
    heldout = loaded.save(tmp_path / "heldout.safetensors")
    dataset_path = tiny_runs.write_dataset(tmp_path / "data.zip", resolution=64)
    flags = [
        "--reward=frontal-depth",
        "--lambda-r=1",
        f"--reward-ckpt={reward}",
        "--weak-reward",
        f"--heldout-reward={heldout}",
        f"--data={dataset_path}",
        "--kimg=0.016",
        "--tick=0.008",
        "--no-summary",
        f"--outdir={tmp_path / 'runs'}",
        "--device=cpu",
    ]
    result = tiny_runs.run(*flags)
    assert result.exit_code == 0, result.output
    run = tiny_runs.only_run(tmp_path / "runs")
    assert run.name.endswith("frontal-depth-lambda1")
    # the only warnings are those on the accuracy of a reward from a few pairs
    warnings = [line for line in result.stderr.splitlines() if line.startswith("Warning")]
    assert all("accuracy" in line for line in warnings), warnings
    lines = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all(
        {"RLHF/reward", "Monitored/reward", "Monitored/heldout"} <= line.keys() for line in lines
    )
    resumed = tmp_path / "resumed"
    shutil.copytree(run, resumed)
    final = checkpoint.available(resumed)[-1]
    final.unlink()
    assert tiny_runs.run(f"--resume={resumed}").exit_code == 0
    assert (resumed / "stats.jsonl").read_text() == (run / "stats.jsonl").read_text()
    tiny_runs.assert_same(*(storage.read_tensors(folder / final.name)[0] for folder in (run, resumed)))


@pytest.mark.parametrize(
    ("flags", "names"),
    [(["--observation=smell"], (KNOWN, "'smell'")), (["--preset=heads"], ("depth", "'heads'"))],
)
def test_unknown_observations_and_presets_are_rejected_by_name(flags, names, tmp_path):
    result = CliRunner().invoke(
        reward_training.train, ["--observation=frontal-depth", *flags, f"--run-dir={tmp_path / 'run'}"]
    )
    rejected(result, *names)


def test_a_preset_out_of_range_is_named_with_its_setting(tmp_path, monkeypatch):
    """Values of a plugin's presets are checked by the ranges of the flags."""
    kind = ["--observation=frontal-depth", "-n"]
    for values, names in (
        ({"observe": {"resolution": 12}}, ("--resolution", "12", "16")),
        ({"train": {"batch": 0}}, ("--batch", "0")),
        ({"train": {"epoch": 3}}, ("epoch",)),
    ):
        network = {"resolution": 16}
        observations.OBSERVATIONS["frontal-depth"]  # imports the plugin, which registers its presets
        monkeypatch.setitem(PRESETS._entries, "frontal-depth", {"shallow": Preset(network=network, **values)})
        result = CliRunner().invoke(reward_training.train, [*kind, f"--run-dir={tmp_path / 'run'}"])
        rejected(result, "--preset=shallow", "frontal-depth", *names)


def test_train_rejects_another_kind_than_that_of_the_file(reward, tmp_path):
    for flags, names in (
        (["--reward=smell"], ("--reward", KNOWN, "'smell'")),
        (
            ["--reward=frontal-depth"],
            ("--reward-ckpt", "--cfg=heads64", "--reward=frontal-depth"),
        ),
        (
            ["--reward=sigma", f"--reward-ckpt={reward}"],
            ("--reward=sigma", "frontal-depth"),
        ),
    ):
        result = tiny_runs.run(
            *flags, f"--outdir={tmp_path}", "--data=synthetic:people64@n=8", "--device=cpu"
        )
        rejected(result, *names)
