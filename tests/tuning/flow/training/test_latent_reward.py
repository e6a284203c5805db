"""Test a reward of latents: what it learns from pairs, its files, and that nothing is decoded while a stage
is tuned by it.
"""

from dataclasses import replace

import pytest
import torch

from eg3d_rlhf.core.statistics import clustered_rate
from eg3d_rlhf.models.sparse import SparseSample, collate
from eg3d_rlhf.tuning.flow.base.pairs import PreferencePair
from eg3d_rlhf.tuning.flow.base.stage import DenseGrid, SparseVoxels
from eg3d_rlhf.tuning.flow.toy.bundled import toy_problem
from eg3d_rlhf.tuning.flow.training import latent_reward
from eg3d_rlhf.tuning.flow.training.accuracy import score_order
from eg3d_rlhf.tuning.flow.training.latent_accuracy import of_latents
from eg3d_rlhf.tuning.flow.training.latent_reward import LatentTraining, load, save, train_on_pairs
from eg3d_rlhf.tuning.flow.training.online.scored_samples import Task
from tests.rejections import raising
from tests.tuning.flow.tiny_flow import TinyPipeline, structure_pairs, voxel_pairs
from training.storage import read_tensors, write_tensors

MADE = {"structure": structure_pairs, "voxels": voxel_pairs}
QUICK = LatentTraining(epochs=12, batch=8)


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(latent_reward, "MEMBERS", 2)


def accuracy(reward, pairs) -> float:
    return float(of_latents(reward, pairs).mean())


@pytest.mark.parametrize("stage", ["structure", pytest.param("voxels", marks=pytest.mark.long)])
def test_it_orders_pairs_that_it_has_not_seen(stage):
    reward = train_on_pairs(TinyPipeline(), stage, MADE[stage](60), QUICK)
    held = MADE[stage](60, seed=7)
    assert accuracy(reward, held) > 0.75 and 1 - accuracy(reward, _turned(held)) == pytest.approx(
        accuracy(reward, held)
    )


def test_it_learns_from_a_reward_of_finished_assets_whatever_the_answers_were():
    pairs = voxel_pairs(60)
    held = voxel_pairs(60, seed=7)
    scores = torch.tensor(
        [[float(x.feats.mean()) for x in (pair.preferred, pair.rejected)] for pair in pairs]
    )
    learnt = train_on_pairs(TinyPipeline(), "voxels", pairs, QUICK, decoded_scores=3 * scores)
    turned = train_on_pairs(
        TinyPipeline(), "voxels", _turned(pairs), QUICK, decoded_scores=3 * scores.flip(1)
    )
    assert accuracy(learnt, held) > 0.8 and accuracy(turned, held) > 0.8 and learnt.record["decoded"]


def _turned(pairs):
    return [replace(pair, preferred=pair.rejected, rejected=pair.preferred) for pair in pairs]


@pytest.mark.parametrize("cells", [None, 5])
def test_symmetry_is_read_about_the_middle_of_the_samples_own_grid(cells):
    """Two voxels at opposite ends of the grid are mirror images or not.

    Neither their coordinates nor their neighbours show which.
    """
    pipeline = TinyPipeline()
    g = torch.Generator().manual_seed(0)
    side = cells or 6
    pipeline.stages[1].latents = SparseVoxels(channels=2, resolution=6)

    def latent(a, b):
        coords = torch.tensor([[0, *a], [side - 1, *b]]).int()
        return SparseSample(coords, torch.randn(2, 2, generator=g), cells=cells)

    pairs = []
    for i in range(200):
        a, *others = torch.randperm(side**2, generator=g)[:2].tolist()
        here = divmod(a, side)
        there = divmod(others[0], side)
        pairs.append(
            PreferencePair(
                id=str(i),
                condition="a",
                stage="voxels",
                preferred=latent(here, here),
                rejected=latent(here, there),
            )
        )
    reward = train_on_pairs(pipeline, "voxels", pairs[:100], QUICK)
    assert accuracy(reward, pairs[100:]) > 0.95


def test_a_score_depends_on_the_sample_alone_and_teaching_is_repeatable():
    pairs = voxel_pairs(24)
    one, two = (train_on_pairs(TinyPipeline(), "voxels", pairs, QUICK) for _ in range(2))
    latents = [pair.preferred for pair in pairs[:9]]
    names = [pair.condition for pair in pairs[:9]]
    together = one.score_latents(collate(latents), names)
    assert torch.equal(together, two.score_latents(collate(latents), names))
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0)).tolist()
    alone = torch.cat([one.score_latents(collate([latents[i]]), [names[i]]) for i in order])
    torch.testing.assert_close(alone, together[order])


def test_files_are_read_strictly(tmp_path):
    pipeline = TinyPipeline()
    reward = train_on_pairs(pipeline, "voxels", voxel_pairs(12), QUICK)
    stages = pipeline.stages
    path = save(tmp_path / "reward.safetensors", reward)
    pair = voxel_pairs(1)[0]
    again = load(path, pipeline, stages[1], "a")
    assert (
        torch.equal(*(r.score_latents(collate([pair.preferred]), ["a"]) for r in (reward, again)))
        and again.record == reward.record
    )
    with raising("'structure'", "'voxels'"):
        load(path, pipeline, stages[0], "a")
    tensors, meta = read_tensors(path, "latent-reward")
    write_tensors(
        tmp_path / "odd.safetensors",
        "latent-reward",
        {k: v for k, v in tensors.items() if k != "members.0.head.0.bias"},
        meta,
    )
    with raising("odd.safetensors", "members.0.head.0.bias"):
        load(tmp_path / "odd.safetensors", pipeline, stages[1], "a")
    torch.nn.init.ones_(stages[1].model.to_out.weight)
    with raising("reward.safetensors", "hash of the stage's network"):
        load(path, pipeline, stages[1], "a")
    stages[1].latents = DenseGrid(channels=2, resolution=2)
    with raising("'DenseGrid'", "'SparseVoxels'"):
        load(path, pipeline, stages[1], "a")


def test_no_labels():
    with raising("'voxels'", "no labelled pairs"):
        train_on_pairs(TinyPipeline(), "voxels", [])


def test_nothing_is_decoded_while_a_stage_is_tuned_by_it(monkeypatch):
    pipeline = TinyPipeline()
    reward = train_on_pairs(pipeline, "voxels", voxel_pairs(12), QUICK)
    monkeypatch.setattr(pipeline, "decode", lambda x_0: pytest.fail("decoded"))
    task = Task(pipeline=pipeline, stage=pipeline.stages[1], rewards={"latent": reward}, prompts=("a",))
    x_0 = collate([pair.preferred for pair in voxel_pairs(4)])
    scores, heldout = task.scores(x_0, ["a"] * 4, [0] * 4)
    assert (
        scores.shape == (1, 4)
        and heldout == {}
        and torch.equal(scores[0], reward.score_latents(x_0, ["a"] * 4))
    )


@pytest.mark.long
def test_what_one_feature_of_assets_orders_without_any_training():
    """The feature is the share of a toy's voxels whose mirror image is filled, on the pairs of the table of
    `reward latent`; `pytest -s` prints its accuracy.
    """
    problem = toy_problem()
    pairs = problem.held_out_pairs("voxels")
    assets = [
        problem.pipeline.decode(collate([latent]))[0]
        for pair in pairs
        for latent in (pair.preferred, pair.rejected)
    ]
    share = (
        torch.tensor([float((a.occupancy & a.occupancy.flip(0)).sum() / a.occupancy.sum()) for a in assets])
        .double()
        .view(-1, 2)
    )
    found = clustered_rate(
        score_order((share[:, 0] - share[:, 1]).numpy()), [pair.condition for pair in pairs]
    )
    print("mirrored share: {:.3f} [{:.3f}, {:.3f}]".format(*found))
    assert found.lo > 0.5 and len(pairs) == 576
