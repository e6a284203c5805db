"""GRPO on the tiny generator: what it learns, and that it is the same however it is computed or interrupted."""

import math

import pytest
import torch

from eg3d_rlhf.models.lora import LoraConfig
from eg3d_rlhf.models.policies import tuned_model
from eg3d_rlhf.models.sparse import feats_of
from eg3d_rlhf.tuning.flow.generate import crossed, scores
from eg3d_rlhf.tuning.flow.online.groups import Explorer, GroupUpdates, GrpoConfig, Task, train_online
from eg3d_rlhf.tuning.flow.stage import stage_of
from eg3d_rlhf.tuning.flow.train import policy_and_reference, trained
from tests.tuning.flow.tiny_flow import NAMES, TinyPipeline, likes_target
from tests.tuning.flow.tiny_trainings import at, contents, interrupt, silent
from training.distributed import SINGLE, Ranks

SETTINGS = {
    "lora": LoraConfig(rank=2, alpha=4.0, targets=("to_out",)), "steps": 10, "batch": 3, "group": 6, "lr": 0.02, "warmup": 2,
    "log_every": 2, "checkpoint_every": 3, "held_out_every": 4, "kl": 0.0, "seed": 3, "max_drop": 1.0,
}  # fmt: skip


def config_of(**changes) -> GrpoConfig:
    return GrpoConfig(**{**SETTINGS, **changes})


def task_of(pipeline=None, stage: str = "voxels", reward=likes_target) -> Task:
    pipeline = pipeline or TinyPipeline()
    return Task(pipeline=pipeline, stage=stage_of(pipeline, stage), reward=reward, conditions=NAMES)


def run(out, task=None, **changes):
    options = {name: changes.pop(name) for name in ("say", "resume", "held_out") if name in changes}
    return train_online(task or task_of(), config_of(**changes), out, {}, **{"say": silent, **options})


def updates_of(task=None, ranks=SINGLE, **changes) -> GroupUpdates:
    task, config = task or task_of(), config_of(**changes)
    policy, reference = policy_and_reference(task.stage, config)
    return GroupUpdates(task, config, policy, trained(policy).values(), reference, ranks)


def reward_of(task: Task, folder=None, per_condition=32) -> float:
    names, seeds = crossed(NAMES, per_condition, 7)
    models = {} if folder is None else {task.stage.name: tuned_model(task.stage.model, folder)}
    return float(scores(task.pipeline, task.reward, names, seeds, models, 96).mean())


# What is learned.


@pytest.mark.parametrize("stage", ["structure", "voxels"])
def test_the_reward_of_new_samples_rises_and_its_inverse_falls(tmp_path, stage):
    def large(assets, conditions):
        return torch.tensor([float(len(asset.coords)) for asset in assets]) if stage == "structure" else likes_target(assets, conditions)

    task = task_of(stage=stage, reward=large)
    before = reward_of(task)
    up, down = (reward_of(task, run(tmp_path / use, task, use=use).weights) for use in ("reward", "inverted"))
    assert up > before + 0.1 and down < before - 0.1


def test_shuffled_rewards_move_next_to_nothing_beside_the_rewards(tmp_path):
    """Their gradient is noise: its mean over updates is far smaller than that of the rewards."""
    sums = {}
    for use in ("reward", "shuffled"):
        updates = updates_of(use=use, passes=1, lr=1e-12, clip=1e9, batch=12)
        found = []
        for step in range(4):
            updates.run(step)
            found.append(torch.cat([p.grad.flatten() for p in updates.parameters if p.grad is not None]))
        sums[use] = float(torch.stack(found).mean(0).norm())
    assert sums["shuffled"] < 0.5 * sums["reward"]


def test_the_divergence_holds_the_policy_to_the_reference(tmp_path):
    free, held = (run(tmp_path / str(kl), kl=kl).stats[-1] for kl in (0.0, 3.0))
    assert held["kl"] < 0.2 * free["kl"]


def test_a_first_pass_has_ratios_of_one_and_a_gradient_that_is_the_scores():
    """d loss = -A d log p where the policy is still the one that drew; the divergence is 0 at the reference."""
    updates = updates_of(kl=1.0, passes=1, lr=1e-12, clip=1e9)
    figures = updates.run(0)
    assert figures["kl"] == 0 and figures["clipped"] == 0 and figures["loss"] == pytest.approx(0, abs=1e-5)
    assert figures["samples"] == 18 and figures["spread"] > 0 and figures["alike"] == 0 and figures["grad_norm"] > 0


def test_a_group_shares_what_other_stages_draw():
    task = task_of()
    explorer = Explorer(task=task, config=config_of(group=4), policy=task.stage.model, reference=updates_of(task).explorer.reference)
    drawn, rewards = explorer.draw(["a", "b"], [5, 6], [0, 2])
    samples = drawn[0].x_0.samples()
    assert all(torch.equal(s.coords, samples[0].coords) for s in samples[:4]) and rewards.shape == (2, 4)
    assert len({round(float(s.feats.sum()), 4) for s in samples}) == 8 and len(drawn[0].moves) == 2
    again, same = explorer.draw(["b"], [6], [0, 2])
    assert torch.equal(feats_of(again[0].x_0), torch.cat([s.feats for s in samples[4:]])) and torch.equal(same[0], rewards[1])


# The same, however it is computed.


def test_passes_change_nothing_beyond_rounding():
    found = []
    for size in (None, 3, 8):
        updates = updates_of(batch_gpu=size, kl=0.1, trained_steps=2)
        figures = [updates.run(step) for step in range(2)]
        found.append((figures[-1], torch.cat([p.detach().flatten() for p in updates.parameters])))
    for figures, parameters in found[1:]:
        assert figures == pytest.approx(found[0][0], rel=1e-3, abs=1e-5)
        torch.testing.assert_close(parameters, found[0][1], rtol=1e-3, atol=1e-5)


def likes(model) -> float:
    return min(1.0, 0.5 + float(model.to_out.lora_B.weight.detach().abs().sum()))


def test_an_interrupted_run_resumes_to_the_same_bits(tmp_path):
    straight = contents(run(tmp_path / "straight", held_out=likes, trained_steps=2).weights.parent)
    out, options = tmp_path / "run", {"held_out": likes, "trained_steps": 2}
    with pytest.raises(KeyboardInterrupt):
        run(out, say=at("step      8/", interrupt), **options)
    run(out, resume=True, **options)
    assert contents(out) == straight
    with pytest.raises(ValueError, match=r"begun with, got config.kl 0.5 instead of 0.0"):
        run(out, resume=True, kl=0.5, **options)


def test_all_parameters_can_be_trained(tmp_path):
    result = run(tmp_path / "run", lora=None, steps=2)
    assert (result.weights / "model.safetensors").exists() and result.stats[-1]["kl"] > 0


def test_the_status_line_and_the_file_hold_the_figures(tmp_path):
    lines = []
    result = run(tmp_path / "run", steps=4, say=lines.append)
    assert len(lines) == 2 and len({len(line.split("time")[0]) for line in lines}) == 1
    assert all(word in lines[-1] for word in ("reward", "kl", "eta"))
    assert [line["samples"] for line in result.stats] == [36, 36] and "pairs" not in result.stats[0]


# Signs and refusals.


def test_rewards_that_are_all_alike_are_told(tmp_path):
    task = task_of(reward=lambda assets, conditions: torch.ones(len(assets)))
    result = run(tmp_path / "run", task, steps=8)
    assert [w.split(":")[0] for w in result.warnings] == ["alike"] and result.stats[-1]["grad_norm"] == 0


def test_wrong_settings_are_named(tmp_path):
    for changes, text in [
        ({"group": 1}, "group must be >= 2"), ({"noise": 0.0}, "noise must be > 0"),
        ({"lora": LoraConfig(dropout=0.1)}, "expected adapters without dropout, got 0.1"),
    ]:
        with pytest.raises(ValueError, match=text):
            config_of(**changes)
    with pytest.raises(ValueError, match="--trained-steps: expected at most all steps of the sampler but the last, got 4 of 4"):
        run(tmp_path / "run", trained_steps=4)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="--batch: expected a multiple of 2 processes, got 3 groups"):
        updates_of(ranks=Ranks(world=2))
    with pytest.raises(ValueError, match="expected finite rewards, got"):
        run(tmp_path / "run", task_of(reward=lambda assets, conditions: torch.full([len(assets)], math.nan)))
