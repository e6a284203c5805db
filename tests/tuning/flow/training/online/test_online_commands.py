"""Test online tuning by its command: flags, errors of users, and complete runs on a tiny problem."""

import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

import train
from eg3d_rlhf.experiments.table import with_interval
from eg3d_rlhf.models.lora_settings import LoraConfig
from eg3d_rlhf.models.policies import tuned_model
from eg3d_rlhf.models.sparse import collate
from eg3d_rlhf.modes import online as commands
from eg3d_rlhf.modes.online import TOY_RUN, default_run
from eg3d_rlhf.tuning.flow.families import opening
from eg3d_rlhf.tuning.flow.toy.bundled import toy_problem
from eg3d_rlhf.tuning.flow.training.arm_runs import BASE, Worker, table
from eg3d_rlhf.tuning.flow.training.online.online_arms import ranked_pairs
from eg3d_rlhf.tuning.flow.training.online.settings import (
    Losses,
    OnlineConfig,
    OnlineRun,
    parse_weights,
    split_arm,
)
from eg3d_rlhf.tuning.flow.training.settings import DpoConfig, TrainConfig
from tests.rejections import raising, rejected
from tests.tuning.flow.tiny_problem import full, tiny_problem

SHORT = {
    "steps": 4,
    "batch": 2,
    "lr": 0.02,
    "warmup": 1,
    "log_every": 2,
    "checkpoint_every": 2,
    "held_out_every": 2,
    "max_drop": 1.0,
}
LORA = LoraConfig(rank=2, alpha=4)
ONE = OnlineConfig(lora=LORA, group=4, sampler_steps=3, max_drift=None, **SHORT)
TINY = OnlineRun(
    losses=Losses(
        **{
            name: replace(ONE, loss=name.removesuffix("_plain").replace("_", "-"))
            for name in ("nft", "grpo", "grpo_plain", "grpo_guard", "dppo", "dgpo")
        }
    ),
    dpo=TrainConfig(dpo=DpoConfig(beta=20.0), lora=LORA, **SHORT),
)


def run(*flags: str, mode: str = "online"):
    return CliRunner().invoke(train.main, [f"--mode={mode}", *(str(f) for f in flags)])


MISTAKES = {
    "arms": (
        ["--arms=grpo,ppo"],
        ("--arms", "grpo-plain", "grpo-guard", "dppo", "dgpo", "dpo", "ppo"),
    ),
    "loss and arms": (["--arms=grpo,nft", "--loss=nft"], ("--loss", "--arms")),
    "jobs": (["--jobs=2"], ("--jobs", "--arms")),
    "dropout": (["--set=lora_dropout=0.1"], ("dropout", "0.1")),
    "no table": (["--set=no_summary=true", "--table-noises=4"], ("--table-noises", "no_summary")),
    "steps": (["--loss=grpo", "--set=trained_steps=8"], ("--set trained_steps", "8")),
    "window": (["--loss=grpo", "--window=9", "--set=window_end=9"], ("window", "0 to 3", "9")),
    "window of nft": (["--window=2"], ("--window",)),
    "nft's": (["--loss=dgpo", "--set=curvature=0.5"], ("--set curvature", "--loss=nft")),
    "toy's reward": (["--pairs=x"], ("--pairs", "--pipeline")),
    "reward": (["--reward=nose"], ("--reward", "own", "nose")),
    "weight": (["--reward=own:-1"], ("--reward", ":WEIGHT", "'own:-1'")),
    "several": (["--reward=own,nose", "--advantage=group"], ("--advantage",)),
    "gate": (["--gate=nose"], ("--gate", "chooser", "overlap", "symmetry", "pieces", "colour", "'nose'")),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_in_flags(case, tmp_path):
    flags, names = MISTAKES[case]
    rejected(run(*flags, f"--outdir={tmp_path / 'runs'}"), *names)
    assert not (tmp_path / "runs").exists()


def test_a_group_of_one_is_rejected():
    result = run("--group=1")
    assert result.exit_code == 2 and "'--group'" in result.stderr  # of click, with its usage


def test_flags_reach_their_settings(tmp_path):
    flags = "--kl=2 --group=5 --lora-rank=3 --arms=grpo,dpo --seed=4 --window=1 --set=choose_noises=0".split()
    result = run("-n", *flags, f"--outdir={tmp_path}/x")
    found = json.loads(result.stdout)
    toy = default_run("toy")
    grpo = found["losses"]["grpo"]
    assert (
        grpo["kl"] == 2
        and grpo["group"] == 5
        and found["dpo"]["lora"]["rank"] == grpo["lora"]["rank"] == 3
        and grpo["window"] == 1
    )
    assert (
        found["training_seeds"] == [4, 5, 6]
        and found["choosing"] is None
        and grpo["lr"] == toy.losses.grpo.lr
    )
    assert (
        not (tmp_path / "x").exists()
        and json.loads(run("-n", "--tune=full").stdout)["losses"]["nft"]["lora"] is None
    )


def test_the_preset_is_grpo_at_every_step():
    found = json.loads(run("-n", mode="grpo").stdout)
    assert (
        found["arms"] == ["grpo", "grpo-randomised"]
        and found["losses"]["grpo"] == found["losses"]["grpo_plain"]
    )
    assert found["losses"]["grpo"]["window"] is None and found["losses"]["grpo"]["clip_range"] == 1e-3
    assert (
        found["choosing"]
        and found["losses"]["grpo"]["steps"] == 50
        and json.loads(run("-n", "--no-control").stdout)["arms"] == ["nft"]
    )
    every = json.loads(run("-n", "--arms=all").stdout)["arms"]
    assert len(every) == 18 and {split_arm(arm)[1] for arm in every} == {"reward", "randomised", "inverted"}


def test_weights_of_rewards():
    assert parse_weights("own, solid:0.5") == {"own": 1.0, "solid": 0.5}
    for text in ("own:x", "own,,b", "own:inf", ""):
        with raising("--reward", repr(text)):
            parse_weights(text)


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The command on the tiny problem."""
    monkeypatch.setattr(opening, "open_problem", lambda source, device: tiny_problem())
    monkeypatch.setattr(commands, "default_run", lambda pipeline, preset: TINY)

    def go(*flags: str):
        result = run(
            *flags,
            *([] if any("--resume" in f for f in flags) else [f"--outdir={tmp_path}", "--table-noises=2"]),
        )
        assert result.exit_code == 0, (result.stderr, result.exception)
        return result

    return go


def test_a_run_of_the_first_stage_writes_weights_and_a_table(tiny, tmp_path):
    result = tiny("--stage=structure", "--loss=grpo", "--gate=chooser", "--set=choose_noises=2")
    folder = tmp_path / "00000-online-grpo-toy-structure"
    stage = tiny_problem().pipeline.stages[0]
    tuned = tuned_model(stage.model, folder / "structure")
    assert not torch.equal(tuned.to_out.lora_B.weight, torch.zeros_like(tuned.to_out.lora_B.weight))
    found = json.loads((folder / "online.json").read_text())
    arm = found["arms"]["grpo"]
    assert (
        0 <= arm["reward"]["up"] <= 1
        and set(arm["evaluators"]) == {"final", "chooser", "reward"}
        and arm["kl"][0] > 0
    )
    assert (
        list(found["pairwise"]) == ["grpo_vs_grpo-randomised"]
        and list(found["arms"]) == ["grpo", "grpo-randomised"]
        and arm["samples"] == [4 * 2 * 4]
        and f"{arm['reward']['up']:.0%}" in result.stdout
        and "eta" in result.output
    )
    lines = [json.loads(line) for line in (folder / "grpo-0" / "stats.jsonl").read_text().splitlines()]
    assert {"heldout/chooser", "reward/own", "gated"} <= set(lines[-1])
    tiny(f"--resume={folder}")
    assert json.loads((folder / "online.json").read_text()) == found


def test_arms_are_compared_on_the_same_noises(tiny, tmp_path):
    names = "nft,grpo,dpo,dpo-randomised,nft-inverted"
    result = tiny(f"--arms={names}", "--seeds=0,1", "--jobs=1")
    folder = tmp_path / "00000-online-arms-toy-voxels"
    found = json.loads((folder / "online.json").read_text())
    # controls are compared with the base alone
    assert list(found["arms"]) == names.split(",") and len(found["pairwise"]) == 3
    assert all(arm["samples"] == [32, 32] for arm in found["arms"].values()) and found["training_seeds"] == [
        0,
        1,
    ]
    assert (folder / "voxels").is_dir()
    for name, rated in found["pairwise"].items():
        cells = " | ".join([*name.split("_vs_"), with_interval(rated)])
        assert f"| {cells} |" in result.stdout, name


def test_pairs_of_samples_are_ordered_by_the_reward_within_groups():
    problem = tiny_problem()
    bench = TINY.bench((problem, None), 3)
    pairs = ranked_pairs(bench.task, bench.config("dpo"), 3, batch=8)
    assert (
        pairs
        and all(pair.reward_preferred > pair.reward_rejected for pair in pairs)
        and len(pairs) <= 4 * 2 * 2
    )
    scored = full(
        problem.pipeline.decode(collate([pair.preferred for pair in pairs])),
        [pair.condition for pair in pairs],
    )
    assert torch.equal(scored, torch.tensor([pair.reward_preferred for pair in pairs]))
    assert [p.id for p in ranked_pairs(bench.task, bench.config("dpo"), 3, batch=64)] == [p.id for p in pairs]
    turned = ranked_pairs(bench.task, bench.config("dpo-inverted"), 3, batch=8)
    assert all(pair.reward_preferred > pair.reward_rejected for pair in turned)
    scored = full(
        problem.pipeline.decode(collate([pair.preferred for pair in turned])),
        [pair.condition for pair in turned],
    )
    assert torch.equal(scored, -torch.tensor([pair.reward_preferred for pair in turned]))


# What online tuning does on the toy, for one training seed.


ARMS = ("nft", "nft-randomised", "nft-inverted")


@pytest.mark.long
def test_the_reward_rises_on_held_out_conditions_and_the_controls_do_not_raise_it(tmp_path):
    torch.set_num_threads(1)
    settings = replace(TOY_RUN, arms=ARMS, training_seeds=(3,))
    worker = Worker(settings, tmp_path, (toy_problem(), None), say=lambda line: None)
    results = {task: worker(task) for task in (BASE, *(f"{arm}-3" for arm in ARMS))}
    rows = table(results, settings, {"stage": "voxels"})["arms"]
    assert rows["nft"]["reward"]["up"] >= 0.75 and rows["nft"]["kl"][0] > 0
    assert (
        rows["nft-randomised"]["reward"]["up"] < rows["nft"]["reward"]["up"]
        and rows["nft-inverted"]["reward"]["up"] < 0.3
    )
