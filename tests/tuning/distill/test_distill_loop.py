"""The loop: what is stopped or killed goes on as if nothing had been; terms without weight leave the base as
it is.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eg3d_rlhf.experiments.process import StoppedError
from eg3d_rlhf.experiments.run import STATS
from eg3d_rlhf.generators.assets.asset import load_assets
from eg3d_rlhf.rewards.meshes.model import RewardCS
from eg3d_rlhf.rewards.meshes.settings import EncoderOptions, PatchOptions
from eg3d_rlhf.tuning.distill.config import Arm, DistillSettings, LoopConfig, SceneConfig
from eg3d_rlhf.tuning.distill.distill_loop import find_warnings
from eg3d_rlhf.tuning.distill.distill_run import ASSETS, Part, distil
from eg3d_rlhf.tuning.distill.outputs import notes
from eg3d_rlhf.tuning.distill.scene_boxes import bundled_scene
from training.storage import read_tensors

REPO = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")
SETTINGS = DistillSettings(
    prompts=("a white head with a red nose", "a grey head with a blue nose"),
    arms=("dreamdpo",),
    scene=SceneConfig(reward="one-face"),
    loop=LoopConfig(steps=6, batch=2, tick=2, checkpoint_ticks=1),
    guidance={"tau_mode": "quantile", "tau": 0.5},
)


def after(settings: DistillSettings, arm: str, steps: int = 3) -> dict[str, torch.Tensor]:
    """Parameters after some steps."""
    work = bundled_scene(settings, CPU).distillation(settings, Arm.parse(arm), 0)
    for step in range(steps):
        work.step(step)
    return {name: value.detach().clone() for name, value in work.asset.state_dict().items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "arm", ["dreamdpo", "dreamdpo+geometry", "rewardsds", "dreamreward", "psd", "best-of-n"]
)
def test_a_state_carries_everything(arm):
    settings = replace(
        SETTINGS, arms=(arm,), scene=replace(SETTINGS.scene, geometry_reward="one-nose"), guidance={}
    )
    scene = bundled_scene(settings, CPU)
    straight, cut = (scene.distillation(settings, Arm.parse(arm), 0) for _ in range(2))
    for step in range(4):
        straight.step(step)
    for step in range(2):
        cut.step(step)
    tensors, meta = cut.state()
    again = scene.distillation(settings, Arm.parse(arm), 0)
    again.load({name: value.clone() for name, value in tensors.items()}, json.loads(json.dumps(meta)))
    for step in range(2, 4):
        again.step(step)
    assert same(again.asset.state_dict(), straight.asset.state_dict())
    assert again.tick.line(4, again.drift()) == straight.tick.line(4, straight.drift())


def test_a_state_carries_what_a_mesh_reward_holds(tmp_path):
    """Cut off between two looks at the shapes, after a rebuild of the meshes; the reward is read from its
    file.
    """
    torch.manual_seed(0)
    path = tmp_path / "reward.safetensors"
    RewardCS(
        PatchOptions(patches=8, faces=4), EncoderOptions(faces=4, width=8, depth=1, heads=2), resolution=9
    ).save(path)
    shaped = replace(
        SETTINGS, scene=replace(SETTINGS.scene, geometry_reward=str(path)), guidance={"geometry_every": 3}
    )
    settings = replace(shaped, loop=replace(SETTINGS.loop, steps=20, lr=0.3))
    scene = bundled_scene(settings, CPU)
    straight = scene.distillation(settings, Arm.parse("sds+geometry"), 0)
    for step in range(17):
        straight.step(step)
        if step == 13:
            tensors, meta = straight.state()
            kept = {name: value.clone() for name, value in tensors.items()}
    again = scene.distillation(settings, Arm.parse("sds+geometry"), 0)
    again.load(kept, json.loads(json.dumps(meta)))
    for step in range(14, 17):
        again.step(step)
    assert same(again.asset.state_dict(), straight.asset.state_dict())
    assert not same(straight.asset.state_dict(), after(settings, "sds", 17))


def test_a_stopped_part_goes_on_to_the_same_bytes(tmp_path):
    scene = bundled_scene(SETTINGS, CPU)
    part = Part("dreamdpo", 0)
    distil(SETTINGS, scene, part, tmp_path / "straight", lambda line: None)

    def stop(line):
        if "step 4/6" in line:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(StoppedError, match=r"SIGTERM.*\b4\b"):
        distil(SETTINGS, scene, part, tmp_path / "cut", stop)
    distil(SETTINGS, scene, part, tmp_path / "cut", lambda line: None)
    assert (tmp_path / "cut" / STATS).read_bytes() == (tmp_path / "straight" / STATS).read_bytes()
    assert same(*(read_tensors(tmp_path / name / ASSETS)[0] for name in ("cut", "straight")))
    assert not list((tmp_path / "cut").glob("checkpoint-*"))


@pytest.mark.long
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path):
    flags = [
        "--mode=distill",
        "--method=dreamdpo",
        "--prompt=a white head with a red nose",
        "--steps=60",
        "--set=tick=2",
    ]
    flags += ["--set", "checkpoint_ticks=1", "--show=0"]
    command = [sys.executable, str(REPO / "train.py")]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": tmp_path}
    assert subprocess.run([*command, *flags, "--outdir=straight"], **quiet).returncode == 0
    killed = subprocess.Popen([*command, *flags, "--outdir=cut"], **quiet)
    folder = tmp_path / "cut" / "00000-distill-bundled-dreamdpo"
    end = time.monotonic() + 300
    while not list(folder.glob("parts/*/*/checkpoint-*")) and time.monotonic() < end:
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    assert not (folder / "assets-dreamdpo.safetensors").exists()
    assert subprocess.run([*command, "--mode=distill", f"--resume={folder}"], **quiet).returncode == 0
    other = tmp_path / "straight" / folder.name
    assert (folder / STATS).read_bytes() == (other / STATS).read_bytes()
    assert (folder / "assets-dreamdpo.safetensors").read_bytes() == (
        other / "assets-dreamdpo.safetensors"
    ).read_bytes()


def test_a_geometry_reward_without_weight_leaves_the_base_as_it_is():
    shaped = replace(
        SETTINGS, scene=replace(SETTINGS.scene, geometry_reward="one-nose"), guidance={"geometry_weight": 0.0}
    )
    assert same(after(shaped, "sds+geometry"), after(SETTINGS, "sds"))


def test_a_batch_does_not_depend_on_the_others():
    two = replace(SETTINGS, loop=replace(SETTINGS.loop, batch=1))
    scene = bundled_scene(two, CPU)
    first, second = (scene.distillation(two, Arm("sds"), batch).asset.state_dict() for batch in (0, 1))
    together = bundled_scene(SETTINGS, CPU).distillation(SETTINGS, Arm("sds"), 0).asset.state_dict()
    assert all(torch.equal(together[name], torch.cat([first[name], second[name]])) for name in together)


def test_signs_of_failure():
    usual = {"step": 1, "first_wins": 0.5, "one_sided": 0.2, "gap_90": 1.0, "reward": 0.0, "log_prob": 100.0}
    usual |= {"image_low": 0.0, "image_high": 1.0}
    assert find_warnings([usual] * 4) == {}
    assert set(find_warnings([{**usual, "one_sided": 1.0}])) == {"gaps"} and set(
        find_warnings([{**usual, "first_wins": 1.0}])
    ) == {"winner"}
    assert set(find_warnings([{**usual, "image_high": 255.0}])) == {"range"} and set(
        find_warnings([{**usual, "gap_90": 0.0}])
    ) == {"flat"}
    assert set(find_warnings([usual, usual, usual, {**usual, "reward": 1.0, "log_prob": 50.0}])) == {"drift"}


def test_best_of_n_keeps_the_start_that_the_reward_likes_best(tmp_path):
    settings = replace(
        SETTINGS, arms=("best-of-n",), guidance={"starts": 3}, loop=replace(SETTINGS.loop, steps=2)
    )
    scene = bundled_scene(settings, CPU)
    work = scene.distillation(settings, Arm("best-of-n"), 0)
    sds_asset = scene.distillation(settings, Arm("sds"), 0).asset
    assert len(work.asset) == 6 and same(work.asset.select([0, 1]).state_dict(), sds_asset.state_dict())
    for step in range(2):
        work.step(step)
    _, seen = work.look("views", 0)
    # [start, asset]
    scores = scene.reward.score(seen.images, [text for text in work.prompts for _ in range(4)])[
        ::4
    ].unflatten(0, (3, 2))
    assert scores.std(dim=0).min() > 0
    result = distil(settings, scene, Part("best-of-n", 0), tmp_path, lambda line: None)
    kept = load_assets(tmp_path / ASSETS)
    for asset, start in enumerate(scores.argmax(0).tolist()):
        assert same(kept.select([asset]).state_dict(), work.asset.select([2 * start + asset]).state_dict())
    assert result["assets"] == 2 and re.search(r"\b3\b", notes(settings)) and notes(SETTINGS) == ""
    worst = scene.distillation(settings, Arm("best-of-n", "inverted"), 0)
    worst.load(*work.state())
    for asset, start in enumerate(scores.argmin(0).tolist()):
        assert same(
            worst.finished().select([asset]).state_dict(), work.asset.select([2 * start + asset]).state_dict()
        )
