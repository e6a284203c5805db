"""Test online tuning of the tiny generator: what each loss learns, and that passes, ranks and interruptions
do not change the result.
"""

import json
import math
from dataclasses import replace

import pytest
import torch

from eg3d_rlhf.models.lora_settings import LoraConfig
from eg3d_rlhf.models.policies import tuned_model
from eg3d_rlhf.models.sparse import feats_of
from eg3d_rlhf.tuning.flow.base.sampling import crossed, scores
from eg3d_rlhf.tuning.flow.base.stage import stage_of
from eg3d_rlhf.tuning.flow.training.online.scored_samples import Explorer, Task
from eg3d_rlhf.tuning.flow.training.online.settings import LOSSES, OnlineConfig
from eg3d_rlhf.tuning.flow.training.online.updates import OnlineUpdates, online_signs, train_online
from eg3d_rlhf.tuning.flow.training.trainer import policy_and_reference
from tests.rejections import raising
from tests.tuning.flow.tiny_flow import NAMES, TinyPipeline, likes_target
from tests.tuning.flow.tiny_trainings import at, contents, interrupt, silent
from training.distributed import SINGLE, Ranks

SETTINGS = {
    "lora": LoraConfig(rank=2, alpha=4.0, targets=("to_out",)),
    "steps": 10,
    "batch": 3,
    "group": 6,
    "lr": 0.02,
    "warmup": 2,
    "log_every": 2,
    "checkpoint_every": 3,
    "held_out_every": 4,
    "kl": 0.0,
    "seed": 3,
    "max_drop": 1.0,
    "loss": "grpo",
    "advantage": "group",
    "passes": 2,
    "clip_range": 1e-3,
    "max_drift": None,
}


def config_of(**changes) -> OnlineConfig:
    return OnlineConfig(**{**SETTINGS, **changes})


def task_of(pipeline=None, stage: str = "voxels", reward=likes_target) -> Task:
    pipeline = pipeline or TinyPipeline()
    return Task(pipeline=pipeline, stage=stage_of(pipeline, stage), rewards={"target": reward}, prompts=NAMES)


def run(out, task=None, **changes):
    options = {name: changes.pop(name) for name in ("say", "resume", "held_out") if name in changes}
    return train_online(task or task_of(), config_of(**changes), out, {}, **{"say": silent, **options})


def updates_of(task=None, ranks=SINGLE, **changes) -> OnlineUpdates:
    task = task or task_of()
    config = config_of(**changes)
    policy, reference = policy_and_reference(task.stage, config)
    return OnlineUpdates(task, config, policy, reference, ranks)


def reward_of(task: Task, folder=None, per_condition=32) -> float:
    names, seeds = crossed(NAMES, per_condition, 7)
    models = {} if folder is None else {task.stage.name: tuned_model(task.stage.model, folder)}
    return float(scores(task.pipeline, task.rewards["target"], names, seeds, models, 96).mean())


# What is learned.

LOSS = pytest.mark.parametrize("loss", LOSSES)
OF_LOSS = {  # settings under which a few updates of the tiny generator show what a loss does
    "nft": {"draws": 4},
    "dgpo": {"draws": 4, "group_beta": 10.0, "advantage": "ranks", "decay": "copy"},
    "grpo": {},
    "grpo-guard": {"clip_range": 1e-2},
    "dppo": {"clip_range": 1e-3},
}


SLOW = pytest.mark.long
LEARNT = [
    ("nft", "voxels"),
    ("grpo", "structure"),
    ("dgpo", "voxels"),
    *(
        pytest.param(*case, marks=SLOW)
        for case in (("nft", "structure"), ("grpo", "voxels"), ("grpo-guard", "voxels"), ("dppo", "voxels"))
    ),
]


@pytest.mark.parametrize(("loss", "stage"), LEARNT)
def test_the_reward_of_new_samples_rises_and_its_inverse_falls(tmp_path, loss, stage):
    def large(assets, conditions):
        return (
            torch.tensor([float(len(asset.coords)) for asset in assets])
            if stage == "structure"
            else likes_target(assets, conditions)
        )

    task = task_of(stage=stage, reward=large)
    before = reward_of(task)
    up, down = (
        reward_of(task, run(tmp_path / use, task, use=use, loss=loss, **OF_LOSS[loss]).weights)
        for use in ("reward", "inverted")
    )
    assert up > before + 0.05 and down < before - 0.05


@LOSS
def test_randomised_rewards_move_next_to_nothing_beside_the_rewards(loss):
    """Their gradient is noise: its mean over updates is far smaller than that of the rewards."""
    sums = {}
    for use in ("reward", "randomised"):
        updates = updates_of(use=use, passes=1, lr=1e-12, clip=1e9, batch=12, loss=loss, **OF_LOSS[loss])
        found = []
        for step in range(4):
            updates.run(step)
            found.append(torch.cat([p.grad.flatten() for p in updates.parameters if p.grad is not None]))
        sums[use] = float(torch.stack(found).mean(0).norm())
    assert sums["randomised"] < 0.6 * sums["reward"]


@pytest.mark.parametrize("loss", ["grpo", "nft"])
def test_the_divergence_holds_the_policy_to_the_reference(tmp_path, loss):
    free, held = (
        run(tmp_path / str(kl), kl=kl, loss=loss).stats[-1] for kl in (0.0, 30.0 if loss == "nft" else 3.0)
    )
    assert held["kl"] < 0.2 * free["kl"]


@pytest.mark.parametrize("loss", ["grpo", "grpo-guard", "dppo"])
def test_a_first_pass_has_ratios_of_one_and_a_gradient_that_is_the_scores(loss):
    """While the policy equals the sampling network, d loss = -A d log p, and the divergence is 0 at the
    reference.
    """
    updates = updates_of(loss=loss, kl=1.0, passes=1, lr=1e-12, clip=1e9)
    figures = updates.run(0)
    assert figures["kl"] == 0 and figures["clipped"] == 0 and figures["loss"] == pytest.approx(0, abs=1e-4)
    assert (
        figures["samples"] == 18
        and figures["spread"] > 0
        and figures["alike"] == 0
        and figures["grad_norm"] > 0
    )
    assert (
        figures["ratio"] == pytest.approx(0, abs=1e-6)
        and figures["clip_high"] == figures["clip_low"] == figures["drift"] == 0
    )


def test_figures_of_finished_samples():
    updates = updates_of(loss="nft", kl=1.0)
    first = updates.run(0)
    second = updates.run(1)
    assert first["r"] == pytest.approx(0.5, abs=0.02) and first["r_ends"] == 0 and first["lag"] == 0
    assert first["moved"] > 0  # the second pass is off the network that drew
    assert second["lag"] > 0 and second["drift"] > 0 and second["kl"] > 0 and set(second) == set(first)


def test_a_group_shares_what_other_stages_draw():
    task = task_of()
    config = config_of(group=4)
    reference = updates_of(task).explorer.reference
    explorer = Explorer(task=task, config=config, policy=task.stage.model, reference=reference)
    every = range(len(explorer.steps) - 1)
    (drawn,) = explorer.draw(["a", "b"], [5, 6], every, [0, 2])
    samples = drawn.x_0.samples()
    assert all(torch.equal(s.coords, samples[0].coords) for s in samples[:4]) and len(drawn.moves) == 2
    assert len({round(float(s.feats.sum()), 4) for s in samples}) == 8
    (again,) = explorer.draw(["b"], [6], every, [0, 2])
    assert torch.equal(feats_of(again.x_0), torch.cat([s.feats for s in samples[4:]]))


def chain(noisy, **changes) -> torch.Tensor:
    task = task_of()
    explorer = Explorer(
        task=task,
        config=config_of(**changes),
        policy=task.stage.model,
        reference=updates_of(task).explorer.reference,
    )
    (drawn,) = explorer.draw(["a", "b"], [5, 6], noisy)
    return feats_of(drawn.x_0)


def test_a_full_window_is_the_whole_sampler_and_an_empty_one_the_flow_itself():
    steps = range(task_of().stage.sampling.steps)
    torch.testing.assert_close(chain(()), chain(None), rtol=1e-5, atol=1e-5)  # the stage's own sampler
    assert torch.equal(chain(steps[:-1]), chain(steps))  # the last draws nothing
    assert not torch.allclose(chain(steps), chain(()), atol=1e-2) and not torch.allclose(
        chain([0]), chain([1]), atol=1e-2
    )
    full, plain = (updates_of(loss="grpo", window=window) for window in (len(steps) - 1, None))
    assert full.run(0) == plain.run(0)


def test_windows_move_by_the_seed_alone():
    updates = updates_of(window=2, window_end=3)
    found = [list(updates.objective.steps_of(step)[1]) for step in range(12)]
    assert found == [
        list(updates_of(window=2, window_end=3).objective.steps_of(step)[0]) for step in range(12)
    ]
    assert len({tuple(window) for window in found}) > 1 and all(len(window) == 2 for window in found)
    moving = updates_of(window=1, window_moves="progressive", window_updates=2, window_end=2)
    assert [moving.objective.steps_of(step)[0].start for step in range(6)] == [0, 0, 1, 1, 0, 0]


# Several rewards, the gate, the reference that moves.


def by_name(**rewards) -> Task:
    task = task_of()
    return replace(task, rewards=rewards, weights=(1.0,) * len(rewards))


def brightness(assets, prompts):
    return torch.stack([asset.feats.mean() for asset in assets])


def test_several_rewards_are_normalised_before_they_are_added():
    """A reward of large values does not dominate the others: scaling it by a thousand does not change the
    gradient.
    """
    found = []
    for factor in (1.0, 1000.0):
        task = by_name(
            target=likes_target,
            bright=lambda assets, conditions, factor=factor: factor * brightness(assets, conditions),
        )
        updates = updates_of(task, passes=1, loss="nft")
        figures = updates.run(0)
        assert {"reward/target", "reward/bright"} <= set(figures)
        found.append(torch.cat([p.grad.flatten() for p in updates.parameters]))
    torch.testing.assert_close(found[1], found[0], rtol=0.05, atol=1e-4)


def gated_task() -> Task:
    def heldout(assets, conditions):
        return {
            "bright": brightness(assets, conditions),
            "size": torch.tensor([float(len(asset.coords)) for asset in assets]),
        }

    return replace(task_of(), heldout=heldout, gate=("bright",))


@LOSS
def test_an_interrupted_run_resumes_to_the_same_bits(tmp_path, loss):
    """The run has a sampling network that follows the policy, a reference that was reset, and a gate with a
    history.
    """
    options = {"loss": loss, "held_out": likes, "reset": 4, "kl": 0.1, "draws": 1}
    straight = contents(run(tmp_path / "straight", gated_task(), **options).weights.parent)
    assert json.loads((tmp_path / "straight" / "stats.jsonl").read_text().splitlines()[-1])["gated"] > 0
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(out, gated_task(), say=at("step      8/", interrupt), **options)
    run(out, gated_task(), resume=True, **options)
    assert contents(out) == straight
    with raising("config.kl", "0.5", "0.1"):
        run(out, gated_task(), resume=True, **{**options, "kl": 0.5})


def test_a_reset_reference_is_the_network_of_that_moment():
    updates = updates_of(reset=2, kl=1.0, passes=1)
    assert updates.run(0)["kl"] == 0 and updates.run(1)["kl"] > 0  # then it is reset
    assert updates.run(2)["kl"] == 0 and updates.run(3)["kl"] > 0


def test_a_snapshot_is_the_network_as_it_was_and_follows():
    updates = updates_of(loss="nft", lr=0.1)
    old = updates.old
    before = [p.detach().clone() for p in updates.parameters]
    with torch.no_grad():
        for p in updates.parameters:
            p.add_(1.0)
    with old.active():
        assert all(torch.equal(p, value) for p, value in zip(updates.parameters, before, strict=True))
    assert all(torch.equal(p, value + 1) for p, value in zip(updates.parameters, before, strict=True))
    old.follow(0.25)
    for value, was in zip(old.values.values(), before, strict=True):
        torch.testing.assert_close(value, was + 0.75)


# The same, however it is computed.


@LOSS
def test_passes_change_nothing_beyond_rounding(loss):
    found = []
    for size in (None, 6, 12) if loss == "dgpo" else (None, 3, 8):
        updates = updates_of(batch_gpu=size, kl=0.1, loss=loss)
        figures = [updates.run(step) for step in range(2)]
        found.append((figures[-1], torch.cat([p.detach().flatten() for p in updates.parameters])))
    for figures, parameters in found[1:]:
        assert figures == pytest.approx(found[0][0], rel=1e-3, abs=1e-5)
        torch.testing.assert_close(parameters, found[0][1], rtol=1e-3, atol=1e-5)


def likes(model) -> float:
    return min(1.0, 0.5 + float(model.to_out.lora_B.weight.detach().abs().sum()))


@pytest.mark.parametrize("loss", ["grpo", "nft"])
def test_all_parameters_can_be_trained(tmp_path, loss):
    result = run(tmp_path / "run", lora=None, steps=2, loss=loss)
    assert (result.weights / "model.safetensors").exists() and result.stats[-1]["kl"] > 0


def test_the_status_line_and_the_file_hold_the_figures(tmp_path):
    lines = []
    result = run(tmp_path / "run", gated_task(), steps=4, say=lines.append)
    assert len(lines) == 2 and len({len(line.split("time")[0]) for line in lines}) == 1
    assert all(word in lines[-1] for word in ("reward", "kl", "eta"))
    assert [line["samples"] for line in result.stats] == [36, 36] and "pairs" not in result.stats[0]
    assert {
        "reward/target",
        "heldout/bright",
        "heldout/size",
        "alike",
        "clip_high",
        "clip_low",
        "ratio_std",
    } <= set(result.stats[0])


# Signs, stops and refusals.


def test_rewards_that_are_all_alike_are_warned_of(tmp_path):
    task = task_of(reward=lambda assets, conditions: torch.ones(len(assets)))
    result = run(tmp_path / "run", task, steps=8)
    assert [w.split(":")[0] for w in result.warnings] == ["alike"] and result.stats[-1]["grad_norm"] == 0


def test_a_policy_that_diverges_is_stopped(tmp_path):
    said = []
    result = run(tmp_path / "run", loss="nft", lr=0.2, max_drift=0.05, say=said.append)
    assert result.stats[-1]["step"] < 10 and result.stats[-1]["drift"] > 0.05
    assert str(result.stats[-1]["step"]) in said[-1] and "--kl" in said[-1]


def test_held_out_rewards_that_fall_are_warned_of():
    lines = [{"step": i, "reward": float(i), "heldout/a": -float(i), "heldout/b": 1.0 - i} for i in range(8)]
    assert "unconfirmed" in online_signs(lines, True)
    assert "unconfirmed" not in online_signs([{**line, "heldout/b": line["reward"]} for line in lines], True)
    assert "clip" in online_signs([{"step": i, "clipped": 0.95} for i in range(3)], True)
    assert "ends" in online_signs([{"step": i, "r_ends": 0.6} for i in range(3)], False)


def test_wrong_settings_are_named(tmp_path):
    for changes, names in [
        ({"group": 1}, ("group", ">= 2", "1")),
        ({"noise": 0.0}, ("noise", "> 0", "0.0")),
        ({"loss": "ppo"}, ("--loss", "nft", "dgpo", "ppo")),
        ({"lora": LoraConfig(dropout=0.1)}, ("dropout", "0.1")),
        ({"loss": "dgpo", "batch_gpu": 4}, ("dgpo", "6", "4")),
        ({"window": 2, "trained_steps": 2}, ("trained_steps", "--window")),
    ]:
        with raising(*names):
            config_of(**changes)
    with raising("--set trained_steps", "4 of 4"):
        run(tmp_path / "run", trained_steps=4)
    with raising("window", "0 to 3", "2", "0 to 4"):
        run(tmp_path / "run", window=2, window_end=4)
    assert not (tmp_path / "run").exists()
    with raising("--batch", "2", "3"):
        updates_of(ranks=Ranks(world=2))
    with raising("target", "NaN"):
        run(tmp_path / "run", task_of(reward=lambda assets, conditions: torch.full([len(assets)], math.nan)))
