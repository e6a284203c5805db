"""train.py --mode=grpo from the outside: its flags, what it refuses, and whole runs on a tiny problem."""

import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

import train
from eg3d_rlhf.models.lora import LoraConfig
from eg3d_rlhf.models.policies import tuned_model
from eg3d_rlhf.models.sparse import collate
from eg3d_rlhf.modes import online as commands
from eg3d_rlhf.modes.online import TOY_RUN, default_run
from eg3d_rlhf.tuning.flow.dpo import DpoConfig
from eg3d_rlhf.tuning.flow.online import arms
from eg3d_rlhf.tuning.flow.online.arms import BASE, GrpoRun, Worker, ranked_pairs
from eg3d_rlhf.tuning.flow.online.groups import GrpoConfig
from eg3d_rlhf.tuning.flow.toy.bundled import toy_problem
from eg3d_rlhf.tuning.flow.train_pairs import TrainConfig
from tests.tuning.flow.circular.test_commands import assert_one_line
from tests.tuning.flow.tiny_problem import full, tiny_problem

SHORT = {"steps": 4, "batch": 2, "lr": 0.02, "warmup": 1, "log_every": 2, "checkpoint_every": 2, "held_out_every": 2, "max_drop": 1.0}
LORA = LoraConfig(rank=2, alpha=4)
TINY = GrpoRun(
    grpo=GrpoConfig(lora=LORA, group=4, sampler_steps=3, **SHORT), dpo=TrainConfig(dpo=DpoConfig(beta=20.0), lora=LORA, **SHORT),
)  # fmt: skip


def run(*flags: str):
    return CliRunner().invoke(train.main, ["--mode=grpo", *(str(f) for f in flags)])


MISTAKES = {
    "arms": (["--arms=grpo,ppo"], "--arms: expected some of grpo, dpo, shuffled, inverted, each once, got grpo, ppo"),
    "jobs": (["--jobs=2"], "--jobs: belongs to several trainings"),
    "dropout": (["--set=lora_dropout=0.1"], "expected adapters without dropout"),
    "no table": (["--set=no_summary=true", "--table-noises=4"], "--table-noises: belongs to the table"),
    "steps": (["--set=trained_steps=8"], "--set trained_steps=VALUE: expected at most all steps of the sampler but the last, got 8 of 8"),
    "toy's reward": (["--pairs=x"], "--pairs: belongs to --pipeline=DIR"),
    "reward": (["--reward=nose"], "--reward: expected one of own"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_in_flags(case, tmp_path):
    flags, text = MISTAKES[case]
    resumed = [] if "resume" in flags[0] else [f"--outdir={tmp_path / 'runs'}"]
    assert_one_line(run(*(f.format(tmp=tmp_path) for f in flags), *resumed), text.format(tmp=tmp_path))
    assert not (tmp_path / "runs").exists()


def test_flags_reach_their_settings(tmp_path):
    flags = "--kl=2 --group=5 --lora-rank=3 --arms=grpo,dpo --seed=4 --set=choose_noises=0".split()
    result = run("-n", *flags, f"--outdir={tmp_path}/x")
    found, toy = json.loads(result.stdout), default_run("toy")
    assert found["grpo"]["kl"] == 2 and found["grpo"]["group"] == 5 and found["dpo"]["lora"]["rank"] == found["grpo"]["lora"]["rank"] == 3
    assert found["training_seeds"] == [4, 5, 6] and found["choosing"] is None and found["grpo"]["lr"] == toy.grpo.lr
    assert not (tmp_path / "x").exists() and json.loads(run("-n", "--tune=full").stdout)["grpo"]["lora"] is None


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The command on the tiny problem."""
    for module in (commands, arms):
        monkeypatch.setattr(module, "open_problem", lambda source, device: tiny_problem())
    monkeypatch.setattr(commands, "default_run", lambda pipeline: TINY)

    def go(*flags: str):
        result = run(*flags, *([] if any("--resume" in f for f in flags) else [f"--outdir={tmp_path}", "--table-noises=2"]))
        assert result.exit_code == 0, (result.stderr, result.exception)
        return result

    return go


def test_a_run_of_the_first_stage_writes_weights_and_a_table(tiny, tmp_path):
    result = tiny("--stage=structure", "--set=choose_noises=2")
    folder = tmp_path / "00000-grpo-toy-structure"
    stage = tiny_problem().pipeline.stages[0]
    tuned = tuned_model(stage.model, folder / "structure")
    assert not torch.equal(tuned.to_out.lora_B.weight, torch.zeros_like(tuned.to_out.lora_B.weight))
    found = json.loads((folder / "grpo.json").read_text())
    arm = found["arms"]["grpo"]
    assert 0 <= arm["reward"]["up"] <= 1 and set(arm["judges"]) == {"final", "chooser", "reward"} and arm["kl"][0] > 0
    assert found["pairwise"] == {} and arm["samples"] == [4 * 2 * 4] and "reward up on" in result.stdout and "eta" in result.output
    tiny(f"--resume={folder}")
    assert json.loads((folder / "grpo.json").read_text()) == found


def test_arms_are_compared_on_the_same_noises(tiny, tmp_path):
    result = tiny("--arms=grpo,dpo,shuffled,inverted", "--seeds=2", "--jobs=1")
    found = json.loads((tmp_path / "00000-grpo-toy-voxels" / "grpo.json").read_text())
    assert set(found["arms"]) == {"grpo", "dpo", "shuffled", "inverted"} and len(found["pairwise"]) == 6
    assert found["arms"]["dpo"]["samples"] == found["arms"]["grpo"]["samples"] == [32, 32] and found["training_seeds"] == [0, 1]
    assert "## Pair by pair, final judge" in result.stdout and (tmp_path / "00000-grpo-toy-voxels" / "voxels").is_dir()


def test_pairs_of_samples_are_ordered_by_the_reward_within_groups():
    problem = tiny_problem()
    bench = arms.bench_of(TINY, problem, 3)
    pairs = ranked_pairs(bench.task, bench.grpo, 3, batch=8)
    assert pairs and all(pair.reward_preferred > pair.reward_rejected for pair in pairs) and len(pairs) <= 4 * 2 * 2
    scored = full(problem.pipeline.decode(collate([pair.preferred for pair in pairs])), [pair.condition for pair in pairs])
    assert torch.equal(scored, torch.tensor([pair.reward_preferred for pair in pairs]))
    assert [p.id for p in ranked_pairs(bench.task, bench.grpo, 3, batch=64)] == [p.id for p in pairs]


# What docs/circular-dpo.md says of GRPO on the toy, for one training seed.


ARMS = ("grpo", "shuffled", "inverted")


@pytest.mark.long
def test_the_reward_rises_on_held_out_conditions_and_the_controls_do_not_raise_it(tmp_path):
    torch.set_num_threads(1)
    settings = replace(TOY_RUN, arms=ARMS, training_seeds=(3,))
    worker = Worker(settings, tmp_path, toy_problem(), say=lambda line: None)
    results = {task: worker(task) for task in (BASE, *(f"{arm}-3" for arm in ARMS))}
    rows = arms.table(results, ARMS, (3,), {"stage": "voxels"})["arms"]
    assert rows["grpo"]["reward"]["up"] >= 0.9 and rows["grpo"]["judges"]["final"]["ci95"][0] > 0.5
    assert 0 < rows["grpo"]["kl"][0] < 0.02
    assert rows["shuffled"]["reward"]["up"] < 0.7 and rows["inverted"]["reward"]["up"] < 0.2
