"""PanoHead's path from end to end: the bundled generator as a tri-grid is labelled, gives a reward, is
scored, tuned and exported.
"""

import json
from pathlib import Path

import pytest
import torch
import trimesh
from click.testing import CliRunner

import train
from eg3d_rlhf.core import bundled
from eg3d_rlhf.generators import load_generator, ws_of_seeds
from eg3d_rlhf.modes import network_files, reward_training, samples
from eg3d_rlhf.modes.label_files import synthetic
from eg3d_rlhf.rewards.reward import check_reward, load_reward
from training import networks, storage

pytestmark = pytest.mark.long


def run(command, *flags):
    result = CliRunner().invoke(command, [str(flag) for flag in flags])
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_labelled_scored_tuned_exported(tmp_path):
    network = tmp_path / "tri-grid.safetensors"
    labels = tmp_path / "labels.jsonl"
    reward = tmp_path / "reward"
    run(network_files.convert, bundled.GENERATOR, "--tri-grid=1.5", f"--out={network}")
    before = load_generator(network)

    flags = ["--pairs=24", "--block=2", "--resolution=24"]
    run(synthetic, f"--network={network}", f"--out={labels}", *flags)
    run(synthetic, f"--out={tmp_path / 'own.jsonl'}", *flags)
    converted_labels = read(labels)
    original_labels = read(tmp_path / "own.jsonl")
    assert len(converted_labels) == 24 and [
        {k: v for k, v in row.items() if k not in ("generator", "gap")} for row in converted_labels
    ] == [
        {k: v for k, v in row.items() if k not in ("generator", "gap")} for row in original_labels
    ]  # the same shapes get the same labels
    # the densities agree to float32's rounding, which moves a surface's volume by a few voxels
    assert [row["gap"] for row in converted_labels] == pytest.approx(
        [row["gap"] for row in original_labels], abs=0.01
    )
    assert json.loads(labels.with_suffix(".meta.json").read_text())["generator"] == before.hash

    run(
        reward_training.train,
        f"--labels={labels}",
        f"--network={network}",
        "--preset=tiny",
        "--epochs=1",
        f"--run-dir={reward}",
    )
    trained = load_reward(reward / "reward.safetensors")
    released = load_reward(bundled.REWARD)
    field = before.generator.field(ws_of_seeds(before.generator, [11, 12], 0.7))
    with torch.no_grad():
        for reward_model in (trained, released):
            check_reward(reward_model, before.generator)
            assert reward_model.score(field).isfinite().all()

    small = [
        "--batch=4",
        "--mbstd-group=4",
        "--kimg=0.008",
        "--tick=0.004",
        "--snap=1",
        "--no-summary",
        "--nrr-initial=16",
        "--seed=1",
    ]
    run(
        train.main,
        f"--init={network}",
        "--data=synthetic:people64@n=8",
        "--reward=sigma",
        f"--reward-ckpt={reward / 'reward.safetensors'}",
        "--weak-reward",
        "--lambda-r=1",
        f"--outdir={tmp_path / 'runs'}",
        *small,
    )
    (folder,) = (tmp_path / "runs").iterdir()
    after = load_generator(folder)
    assert (
        after.generator.architecture == "panohead"
        and storage.read_meta(after.path)["G_kwargs"] == before.nets.G_kwargs
    )
    assert networks.state_hash(after.nets.G_ema) != networks.state_hash(before.nets.G_ema)
    moved = {
        n.split(".")[0]
        for n, p in after.nets.G_ema.named_parameters()
        if not torch.equal(p, before.nets.G_ema.get_parameter(n))
    }
    assert {"backbone", "decoder", "bcg_synthesis", "torgb"} <= moved
    assert any(
        "Loss/Grlhf/reward" in json.dumps(row) or "RLHF" in json.dumps(row)
        for row in read(folder / "stats.jsonl")
    )

    out = tmp_path / "tuned.ply"
    run(samples.mesh, f"--network={folder}", "--seed=1", "--trunc=0.7", "--resolution=48", f"--out={out}")
    mesh = trimesh.load(out)
    assert mesh.is_watertight and mesh.volume > 0
