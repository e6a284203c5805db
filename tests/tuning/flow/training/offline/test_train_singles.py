"""Test the training on single assets: what it learns and leaves unchanged, that passes and ranks do not
change it, and what is rejected.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from eg3d_rlhf.experiments.process import StoppedError
from eg3d_rlhf.models.lora_settings import LoraConfig
from eg3d_rlhf.models.sparse import feats_of
from eg3d_rlhf.preferences.label_scores import goodness_for_use, goodness_from_ranks, normal_scores
from eg3d_rlhf.tuning.flow.base.pairs import by_condition
from eg3d_rlhf.tuning.flow.base.stage import stage_of
from eg3d_rlhf.tuning.flow.training.conditioned_stage import ConditionedStage
from eg3d_rlhf.tuning.flow.training.offline.settings import SinglesConfig
from eg3d_rlhf.tuning.flow.training.offline.train_singles import (
    GroupUpdates,
    Single,
    SingleUpdates,
    Velocities,
    draw_singles,
    train_singles,
)
from eg3d_rlhf.tuning.flow.training.trainer import policy_and_reference
from tests.rejections import raising
from tests.tuning.flow.tiny_flow import TinyPipeline, structure_pairs, voxel_pairs
from tests.tuning.flow.tiny_trainings import at, contents, judge, silent
from training.distributed import SINGLE, Ranks
from training.phases import LossNotFiniteError

SETTINGS = {
    "lora": LoraConfig(rank=2, alpha=4.0, dropout=0.2, targets=("to_out",)),
    "steps": 40,
    "batch": 12,
    "lr": 0.01,
    "warmup": 5,
    "held_out_every": 10,
    "checkpoint_every": 10,
    "log_every": 5,
    "seed": 3,
    "patience": 50,
    "max_drop": 1.0,
}
LOSSES = {
    "nft": SinglesConfig(**SETTINGS),
    "dgpo": SinglesConfig(**{**SETTINGS, "loss": "dgpo", "beta": 20.0, "batch": 3, "group": 6}),
}


def singles(n: int = 12, stage: str = "voxels", use: str = "labels") -> list[Single]:
    """Return n assets of each prompt, with features about +1/2 (r = .8) and -1/2 (r = .2), or ranked."""
    pairs = voxel_pairs(3 * n // 2) if stage == "voxels" else structure_pairs(3 * n // 2)
    made = [
        Single(id=f"{pair.id}-{side}", condition=pair.condition, stage=stage, latent=getattr(pair, side), r=r)
        for pair in pairs
        for side, r in (("preferred", 0.8), ("rejected", 0.2))
    ]
    r = goodness_for_use({one.id: one.r for one in made}, {one.id: one.condition for one in made}, use, 0)
    return [replace(one, r=r[one.id]) for one in made]


def ranked(made: list[Single]) -> list[Single]:
    """Rank assets by their mean feature."""
    r = {}
    for group in by_condition(made).values():
        r |= goodness_from_ranks({one.id: -float(feats_of(one.latent).mean()) for one in group})
    return [replace(one, r=r[one.id]) for one in made]


def run(out, loss="nft", data=None, pipeline=None, stage="voxels", config=None, **options):
    data = data or (singles(stage=stage) if loss == "nft" else ranked(singles(stage=stage)))
    return train_singles(
        ConditionedStage.from_pipeline(pipeline or TinyPipeline(), stage),
        data,
        config or LOSSES[loss],
        out,
        **{"say": silent, **options},
    )


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("stage", ["structure", "voxels"])
def test_it_learns_which_are_good(loss, stage, tmp_path):
    result = run(tmp_path / "run", loss, stage=stage, config=replace(LOSSES[loss], log_every=1))
    first = result.stats[0]
    last = result.stats[-1]
    assert first["distance"] == first["drift"] == 0 and first["agreement"] == 0.5
    assert last["agreement"] > 0.7 and last["distance"] > 0 and 0 < last["drift"] < 2
    assert all(line["samples"] == (12 if loss == "nft" else 18) for line in result.stats)


def test_the_win_rate_rises_by_thumbs_and_falls_by_inverted_ones(tmp_path):
    pipeline = TinyPipeline()
    rates = {}
    for use in ("labels", "inverted"):
        result = run(tmp_path / use, data=singles(24, use=use), pipeline=pipeline, held_out=judge(pipeline))
        rates[use] = [line["win_rate"] for line in result.stats if "win_rate" in line]
    assert (
        rates["labels"][0] == rates["inverted"][0] == 0.5
        and max(rates["labels"]) > 0.65
        and rates["inverted"][-1] < 0.4
    )


# Closed forms.


def parts(loss: str, config: SinglesConfig, data):
    pipeline = TinyPipeline()
    stage = stage_of(pipeline, data[0].stage)
    config = replace(config, lora=None)
    policy, reference = policy_and_reference(stage, config)
    kind, examples = (
        (SingleUpdates, data) if loss == "nft" else (GroupUpdates, list(by_condition(data).values()))
    )
    return (
        pipeline,
        stage,
        policy,
        reference,
        kind(ConditionedStage(stage, pipeline), examples, config, policy, reference, SINGLE),
    )


def gradient(policy) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


def test_r_of_one_half_has_no_gradient_at_the_start_and_one_less_r_the_opposite():
    found = {}
    for name, change in (("as_said", lambda r: r), ("turned", lambda r: 1 - r), ("even", lambda r: 0.5)):
        data = [replace(one, r=change(one.r)) for one in singles()]
        *_, policy, _, updates = parts("nft", LOSSES["nft"], data)
        updates.backward(data, 0, 0)
        found[name] = gradient(policy)
    assert found["even"].abs().max() < 1e-6 < 0.1 < found["as_said"].abs().max()
    torch.testing.assert_close(found["turned"], -found["as_said"])


def test_the_gradient_of_a_group_at_the_start_is_that_of_advantages_times_errors():
    data = ranked(singles(6))[:6]
    data = [replace(one, condition="a") for one in data]
    pipeline, stage, policy, reference, updates = parts("dgpo", LOSSES["dgpo"], data)
    updates.backward([data], 0, 0)
    found = gradient(policy)
    policy.zero_grad()
    draw = draw_singles(
        ConditionedStage(stage, pipeline), data, ["a"] * 6, updates.config.seed, 0, torch.device("cpu")
    )
    advantage = torch.from_numpy(normal_scores(np.array([one.r for one in data]))).float()
    (advantage * Velocities(stage, draw, policy, reference).errors).mean().mul(0.5).backward()
    torch.testing.assert_close(found, gradient(policy))


def test_a_group_shares_its_time_and_noise_and_assets_by_themselves_do_not():
    pipeline = TinyPipeline()
    data = singles(6, "structure")
    stage = stage_of(pipeline, "structure")
    drawn = {
        names: draw_singles(
            ConditionedStage(stage, pipeline),
            data,
            [one.condition if names == "shared" else one.id for one in data],
            0,
            0,
            "cpu",
        )
        for names in ("shared", "own")
    }
    # (1 - s) eps
    noise = {name: draw.target + torch.stack([one.latent for one in data]) for name, draw in drawn.items()}
    same = torch.tensor([[a.condition == b.condition for b in data] for a in data])
    assert torch.equal(torch.cdist(noise["shared"].flatten(1), noise["shared"].flatten(1)) < 1e-3, same)
    assert (
        torch.equal(drawn["shared"].t[:, None] == drawn["shared"].t, same)
        and len(drawn["own"].t.unique()) > 12
    )
    assert drawn["own"].t.min() >= 0.02  # where several may stand


def test_members_of_a_large_group_change_with_the_pass_alone():
    data = [replace(one, condition="a") for one in ranked(singles(12))]
    *_, updates = parts("dgpo", LOSSES["dgpo"], data)
    first, again, second = (updates.members(data, epoch) for epoch in (0, 0, 1))
    assert [one.id for one in first] == [one.id for one in again] != [one.id for one in second] and len(
        first
    ) == 6


# Equal runs.


@pytest.mark.parametrize("loss", LOSSES)
def test_a_resumed_run_is_the_run_that_was_never_stopped(loss, tmp_path):
    pipeline = TinyPipeline()
    straight = run(tmp_path / "straight", loss, pipeline=pipeline, held_out=judge(pipeline))
    with pytest.raises(StoppedError):
        run(
            tmp_path / "cut",
            loss,
            pipeline=pipeline,
            held_out=judge(pipeline),
            say=at("step     25/", interrupt_by_signal),
        )
    resumed = run(tmp_path / "cut", loss, pipeline=pipeline, held_out=judge(pipeline), resume=True)
    assert resumed.stats == straight.stats and contents(tmp_path / "cut") == contents(tmp_path / "straight")


def interrupt_by_signal():
    import os
    import signal

    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("loss", LOSSES)
def test_passes_do_not_change_what_is_learned(loss, tmp_path):
    config = replace(LOSSES[loss], lora=replace(SETTINGS["lora"], dropout=0.0), steps=6)
    whole, cut = (
        run(tmp_path / str(size), loss, config=replace(config, batch_gpu=size))
        for size in (None, 3 if loss == "nft" else 1)
    )
    for a, b in zip(whole.stats, cut.stats, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)


def test_the_stage_itself_is_left_as_it_is(tmp_path):
    pipeline = TinyPipeline()
    before = {k: v.clone() for k, v in pipeline.stages[1].model.state_dict().items()}
    run(tmp_path / "run", pipeline=pipeline, config=replace(LOSSES["nft"], lora=None, steps=5))
    assert all(torch.equal(v, before[k]) for k, v in pipeline.stages[1].model.state_dict().items())


# What is refused.

BROKEN = {
    "none": ([], ("empty",)),
    "even": ([replace(one, r=0.5) for one in singles(2)], ("6",)),
    "twice": (singles(2) * 2, ("6", "'pair-0-preferred'")),
    "another stage": (singles(2, "structure"), ("'pair-0-preferred'", "'structure'")),
    "r": ([replace(one, r=1.2) for one in singles(2)], (" r ", "1.2", "'pair-0-preferred'")),
}


@pytest.mark.parametrize("case", BROKEN)
def test_assets_that_cannot_be_trained_on(case, tmp_path):
    data, names = BROKEN[case]
    with raising("(voxels)", *names):
        train_singles(
            ConditionedStage.from_pipeline(TinyPipeline(), "voxels"),
            data,
            LOSSES["nft"],
            tmp_path / "run",
            say=silent,
        )
    assert not (tmp_path / "run").exists()


def test_ties_everywhere_and_a_batch_that_cannot_be_divided(tmp_path):
    tied = [replace(one, r=0.8 if one.condition == "a" else 0.4) for one in singles(4)]
    with raising("(voxels)", "dgpo"):
        run(tmp_path / "run", "dgpo", tied)
    pipeline, stage, policy, reference, _ = parts("nft", LOSSES["nft"], singles(2))
    with raising("batch_gpu", "5", "2", "12"):
        SingleUpdates(
            ConditionedStage(stage, pipeline), singles(2), LOSSES["nft"], policy, reference, Ranks(world=5)
        )


def test_a_loss_that_is_not_finite_stops_the_training_and_says_where(tmp_path):
    pipeline = TinyPipeline()
    torch.nn.init.constant_(pipeline.stages[1].model.to_out.weight, float("inf"))
    with raising("loss", "voxels", kind=(LossNotFiniteError, ValueError)):
        run(tmp_path / "run", pipeline=pipeline)


def test_far_from_where_it_began_is_said(tmp_path):
    config = replace(LOSSES["nft"], trust=0.01, kl=0.0, lr=0.5, steps=30)
    assert any(text.startswith("far:") for text in run(tmp_path / "run", config=config).warnings)
