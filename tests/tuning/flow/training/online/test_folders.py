"""Test online tuning on a generator's folder without pairs: points by a network with its data at t = 1, and
the reward of a plugin.
"""

import json

import torch
from click.testing import CliRunner

import train
from eg3d_rlhf.models.policies import tuned_model
from eg3d_rlhf.tuning.flow.base.conditioning import write_conditioning
from eg3d_rlhf.tuning.flow.base.sampling import crossed, generate
from eg3d_rlhf.tuning.flow.training.online import online_arms as arms
from tests.rejections import rejected
from tests.tuning.flow import point_family
from tests.tuning.flow.tiny_points import conditions, write_folder

FEW = [
    *"--steps=15 --batch=3 --group=8 --lr=0.02 --kl=0 --lora-rank=4 --device=cpu".split(),
    *"--set=warmup=0 --set=sampler_steps=4 --set=max_drift=9".split(),
]


def to_the_right(assets, names):
    """Return the mean of the points' first coordinate, a reward."""
    return torch.stack([asset[:, 0].mean() for asset in assets])


def call(tmp_path, *flags):
    return CliRunner().invoke(
        train.main,
        ["--mode=grpo", f"--pipeline={tmp_path / 'ROOT'}", f"--outdir={tmp_path / 'runs'}", *FEW, *flags],
    )


def test_a_folder_is_tuned_by_a_reward_alone(tmp_path, monkeypatch):
    root = write_folder(tmp_path / "ROOT")
    write_conditioning(tmp_path / "conditioning.safetensors", conditions())
    known = f"--conditioning={tmp_path / 'conditioning.safetensors'}"
    monkeypatch.setitem(arms.REWARDS, "right", lambda problem: to_the_right)
    for flags, names in (
        (["--reward=right"], ("--conditioning", "--pipeline", "--pairs")),
        ([known, "--reward=right", "--set=views=3"], ("--set views", "points")),
        ([known], ("--reward", "none")),
    ):
        rejected(call(tmp_path, *flags), *names)
    done = call(tmp_path, known, "--reward=right", "--set=desc=x")
    assert done.exit_code == 0, (done.output, done.exception)
    (run,) = (tmp_path / "runs").glob("*-online-grpo-ROOT-points-x")
    found = json.loads((run / "online.json").read_text())
    assert found["arms"]["grpo"]["reward"]["up"] == 1 and found["evaluator"] == "reward"
    pipeline = point_family.FAMILY.load(root, conditions())
    names, seeds = crossed("abcd", 16, 5)
    before, after = (
        to_the_right(generate(pipeline, names, seeds, models), names).mean()
        for models in ({}, {"points": tuned_model(pipeline.stages[0].model, run / "points")})
    )
    assert after > before + 0.1
