"""Mini-Janus: score distillation keeps the noses that it finds; a geometry reward removes those too many, the
controls do not (C5).
"""

import pytest
import torch

from eg3d_rlhf.rewards import boxes as problem
from eg3d_rlhf.rewards.images.analytic import ModeDistance, OneNose, occupancy
from eg3d_rlhf.rewards.meshes.mesh_reward_training import MeshTraining, open_meshes
from eg3d_rlhf.rewards.meshes.patches import MeshReader
from eg3d_rlhf.rewards.meshes.settings import MeshRewardTraining
from eg3d_rlhf.rewards.meshes.surfaces import cube
from eg3d_rlhf.tuning.distill.guidance.dreamreward import DreamReward
from eg3d_rlhf.tuning.distill.guidance.geometry import MeshGeometry
from eg3d_rlhf.tuning.distill.guidance.settings import DenoiserSettings, DreamRewardSettings
from eg3d_rlhf.tuning.distill.schedule import Streams
from tests.tuning.distill.problem_runs import heads, optimise, sds, shares

SEEDS = (3, 4, 5)


def inverted(field, prompts, step):
    return -OneNose()(field, prompts, step)


def filled(field, prompts, step):
    """Minus the squared relative error of the filled volume: nothing to do with noses."""
    return -(occupancy(field).mean(dim=(1, 2, 3)) / 0.4 - 1).square()


def test_distillation_keeps_the_noses_it_finds_and_a_geometry_reward_removes_them():
    sds_noses, shaped = (
        optimise(heads(10), 3, steps=90, geometry=reward, weight=0.5) for reward in (None, OneNose())
    )
    assert torch.equal(sds_noses.before, shaped.before)
    assert (
        float((sds_noses.after == sds_noses.before).double().mean()) >= 0.9
        and float(sds_noses.rms.mean()) < 0.04
    )
    assert shares(shaped.after).two_or_more < shares(sds_noses.after).two_or_more
    assert (
        shares(shaped.after).exactly_one > shares(sds_noses.after).exactly_one
        and float(shaped.rms.mean()) < 0.04
    )


def learned():
    """RewardCS of the problem's own objects, as docs/guides/reward.md trains it."""
    options = MeshRewardTraining(
        source="janus",
        resolution=15,
        patches=32,
        faces=16,
        width=48,
        depth=2,
        steps=600,
        lr=3e-3,
        divergence=0.0,
    )
    training = MeshTraining(options, open_meshes(options))
    training.run(options.steps)
    reward = training.finished().requires_grad_(False)
    return MeshGeometry(MeshReader(cube(options.resolution), reward.patches), reward)


def faces_everywhere(prior, seed):
    """A reward of images that scores a face in each view, by its gradient."""
    settings = DreamRewardSettings(prior=DenoiserSettings(guidance_scale=1.0))
    return DreamReward(
        prior, settings, views=problem.SIDES, streams=Streams(seed=seed), reward=ModeDistance()
    )


@pytest.fixture(scope="module")
def arms():
    """Noses of 32 assets and three seeds in each arm, [96]."""
    counts_of = {}
    rms = {}
    for name, reward, weight, guidance in (
        ("sds", None, 0.0, sds),
        ("geometry", OneNose(), 0.3, sds),
        ("gentle", OneNose(), 0.1, sds),
        ("inverted", inverted, 0.3, sds),
        ("volume", filled, 0.3, sds),
        ("images", None, 0.0, faces_everywhere),
        ("learned", learned(), 0.3, sds),
    ):
        ends = []
        for seed in SEEDS:
            if isinstance(reward, MeshGeometry):
                reward.reader.choices = []  # of the seed before
            ends.append(optimise(heads(32), seed, guidance, geometry=reward, weight=weight))
        counts_of["start"] = torch.cat([end.before for end in ends])
        counts_of[name] = torch.cat([end.after for end in ends])
        rms[name] = float(torch.cat([end.rms for end in ends]).mean())
        print(
            name,
            [tuple(round(share, 3) for share in shares(end.after)[:3]) for end in ends],
            f"rms {rms[name]:.4f}",
        )
    return {name: shares(counts) for name, counts in counts_of.items()}, rms


@pytest.mark.long
def test_the_start_sets_the_ratio(arms):
    noses, rms = arms
    assert noses["start"].two_or_more == pytest.approx(0.609, abs=0.1)
    assert (
        noses["sds"].two_or_more == pytest.approx(noses["start"].two_or_more, abs=0.05) and rms["sds"] < 0.03
    )


@pytest.mark.long
def test_a_third_fewer_with_two_faces_and_more_with_one(arms):
    noses, rms = arms
    for name, drop in (("geometry", 0.33), ("gentle", 0.15)):
        assert noses[name].two_or_more <= (1 - drop) * noses["sds"].two_or_more, name
        assert (
            noses[name].exactly_one > noses["sds"].exactly_one
            and noses[name].none <= noses["sds"].none + 0.02
        ), name
        assert rms[name] < 0.03


@pytest.mark.long
def test_the_controls_remove_none(arms):
    noses, _ = arms
    assert noses["inverted"].two_or_more >= noses["sds"].two_or_more - 0.03
    assert noses["volume"].two_or_more >= (1 - 0.15) * noses["sds"].two_or_more
    assert noses["images"].two_or_more >= noses["sds"].two_or_more + 0.1


@pytest.mark.long
@pytest.mark.xfail(
    reason=(
        "not met: a learned reward of meshes leaves the noses where they are; docs/results/text-to-3d.md"
        " says why"
    )
)
def test_a_learned_reward_removes_noses_too(arms):
    noses, _ = arms
    assert noses["learned"].two_or_more <= (1 - 0.33) * noses["sds"].two_or_more
