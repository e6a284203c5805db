"""Mini-Janus: score distillation keeps the noses that it finds; a geometry reward removes those too many, the controls do not (C5)."""

import pytest
import torch

from eg3d_rlhf.distill.rewards.analytic import OneNose, Volume
from eg3d_rlhf.distill.rewards.noses import shares
from tests.distill.problem_runs import heads, optimise

SEEDS = (3, 4, 5)


def inverted(field, prompts, step):
    return -OneNose()(field, prompts, step)


def test_distillation_keeps_the_noses_it_finds_and_a_geometry_reward_removes_them():
    plain, shaped = (optimise(heads(10), 3, steps=90, geometry=reward, weight=0.5) for reward in (None, OneNose()))
    assert torch.equal(plain.before, shaped.before)
    assert float((plain.after == plain.before).double().mean()) >= 0.9 and float(plain.rms.mean()) < 0.04
    assert shares(shaped.after).two_or_more < shares(plain.after).two_or_more
    assert shares(shaped.after).exactly_one > shares(plain.after).exactly_one and float(shaped.rms.mean()) < 0.04


@pytest.fixture(scope="module")
def arms():
    """Noses of 32 assets and three seeds in each arm, [96]."""
    found, rms = {}, {}
    for name, reward, weight in (
        ("sds", None, 0.0), ("geometry", OneNose(), 0.3), ("gentle", OneNose(), 0.1), ("inverted", inverted, 0.3),
        ("volume", Volume(0.4), 0.3),
    ):
        ends = [optimise(heads(32), seed, geometry=reward, weight=weight) for seed in SEEDS]
        found["start"] = torch.cat([end.before for end in ends])
        found[name], rms[name] = torch.cat([end.after for end in ends]), float(torch.cat([end.rms for end in ends]).mean())
        print(name, [tuple(round(share, 3) for share in shares(end.after)[:3]) for end in ends], f"rms {rms[name]:.4f}")
    return {name: shares(counts) for name, counts in found.items()}, rms


@pytest.mark.long
def test_the_start_sets_the_ratio(arms):
    found, rms = arms
    assert found["start"].two_or_more == pytest.approx(0.609, abs=0.1)
    assert found["sds"].two_or_more == pytest.approx(found["start"].two_or_more, abs=0.05) and rms["sds"] < 0.03


@pytest.mark.long
def test_a_third_fewer_with_two_faces_and_more_with_one(arms):
    found, rms = arms
    for name, drop in (("geometry", 0.33), ("gentle", 0.15)):
        assert found[name].two_or_more <= (1 - drop) * found["sds"].two_or_more, name
        assert found[name].exactly_one > found["sds"].exactly_one and found[name].none <= found["sds"].none + 0.02, name
        assert rms[name] < 0.03


@pytest.mark.long
def test_the_controls_remove_none(arms):
    found, _ = arms
    assert found["inverted"].two_or_more >= found["sds"].two_or_more - 0.03
    assert found["volume"].two_or_more >= (1 - 0.15) * found["sds"].two_or_more
