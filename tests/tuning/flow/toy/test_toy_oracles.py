"""The three judges: all prefer what was asked for, and they are not one judge."""

import numpy as np
import pytest
import torch
from scipy import stats
from skimage.measure import label

from eg3d_rlhf.tuning.flow.toy.bundled import load_network
from eg3d_rlhf.tuning.flow.toy.names import PROMPTS
from eg3d_rlhf.tuning.flow.toy.toy_oracles import (
    ChooserOracle,
    FinalOracle,
    LabelOracle,
    judge_drafts,
    simulated_pairs,
)
from eg3d_rlhf.tuning.flow.toy.toy_pipeline import TRAINED, Defects
from tests.tuning.flow.toy.drawing import drawn, perfect

ORACLES = [LabelOracle(), ChooserOracle(), FinalOracle()]
NAMES = list(PROMPTS)
each = pytest.mark.parametrize("oracle", ORACLES, ids=lambda oracle: type(oracle).__name__)


@each
def test_nothing_beats_what_was_asked_for(oracle):
    best = oracle(perfect(NAMES), NAMES)
    torch.testing.assert_close(best, best[:1].expand(len(best)), atol=1e-3, rtol=0)
    for variant in range(1, 4):
        torch.testing.assert_close(oracle(perfect(NAMES, variant), NAMES), best, atol=1e-3, rtol=0)
    assert (oracle(*drawn(len(NAMES))) <= best + 1e-3).all()


@each
@pytest.mark.parametrize("defect", ["floaters", "holes", "tint", "noise"])
def test_every_defect_lowers_the_score(oracle, defect):
    def mean(share: float) -> float:
        most = {**{name: 0 for name in ("floaters", "holes", "tint", "noise", "wrong")}, defect: share}
        return float(oracle(*drawn(128, 1, Defects(unrepaired=1, **most))).mean())

    assert mean(0) > mean(0.15) > mean(0.4)


@each
def test_the_wrong_shape_or_colour_is_worse(oracle):
    asset = perfect(["red ball"])
    right, shape, colour = (oracle(asset, [name]) for name in ("red ball", "red table", "blue ball"))
    assert right > shape and right > colour
    a = oracle.parts(asset, ["red ball"])
    b = oracle.parts(asset, ["blue ball"])
    assert torch.equal(a["geometry"], b["geometry"]) and a["colour"] > b["colour"]


@each
def test_parts_sum_to_the_score(oracle):
    assets, names = drawn(32)
    found = oracle.parts(assets, names)
    assert set(found) == {"geometry", "colour"}
    torch.testing.assert_close(found["geometry"] + found["colour"], oracle(assets, names))
    assert oracle(assets, names).dtype == torch.float32


def test_judges_agree_mostly_but_not_always():
    assets, names = drawn(512)
    scores = [oracle(assets, names).numpy() for oracle in ORACLES]
    for i in range(3):
        for j in range(i):
            assert 0.4 < stats.spearmanr(scores[i], scores[j]).statistic < 0.98


def test_iou_and_dice_by_hand():
    assets, names = drawn(1, 4, Defects(noise=0, tint=0))
    filled = assets[0].occupancy.numpy()
    variants = [perfect(names, k)[0].occupancy.numpy() for k in range(4)]
    iou = max((filled & v).sum() / (filled | v).sum() for v in variants)
    dice = max(2 * (filled & v).sum() / (filled.sum() + v.sum()) for v in variants)
    symmetry = (filled & filled[::-1]).sum() / filled.sum()
    assert np.isclose(LabelOracle().parts(assets, names)["geometry"].item(), 4 * iou)
    pieces = label(filled, connectivity=1, return_num=True)[1]
    assert np.isclose(
        FinalOracle().parts(assets, names)["geometry"].item(), dice + symmetry - 0.03 * (pieces - 1)
    )


# The people's pairs: one set of assets seen from both stages, called by a noisy annotator.


def test_pairs_of_both_stages_are_of_the_same_assets():
    structure, voxels = (simulated_pairs(stage, TRAINED[:3], 4, seed=1) for stage in ("structure", "voxels"))
    assert (
        len(structure) == 12
        and [p.id for p in structure] == [p.id for p in voxels]
        and len({p.id for p in structure}) == 12
    )
    for a, b in zip(structure, voxels, strict=True):
        assert (
            a.condition == b.condition
            and a.source == b.source == "human"
            and (a.stage, b.stage) == ("structure", "voxels")
        )
        for side in ("preferred", "rejected"):
            assert torch.equal((getattr(a, side)[0] > 0).nonzero().int(), getattr(b, side).coords)


def test_a_condition_has_its_own_draws():
    both = simulated_pairs("structure", TRAINED[:2], 3, seed=1)
    alone = simulated_pairs("structure", TRAINED[1:2], 3, seed=1)
    assert [p.id for p in both[3:]] == [p.id for p in alone]
    assert all(torch.equal(p.preferred, q.preferred) for p, q in zip(both[3:], alone, strict=True))
    other = simulated_pairs("structure", TRAINED[1:2], 3, seed=2)
    assert not all(torch.equal(p.preferred, q.preferred) for p, q in zip(alone, other, strict=True))


def test_the_annotator_errs_where_assets_are_alike():
    judged = judge_drafts([TRAINED[i % 64] for i in range(600)], torch.Generator().manual_seed(0))
    oracle = LabelOracle()
    gap = oracle(judged.assets[0], judged.prompts) - oracle(judged.assets[1], judged.prompts)
    assert torch.equal(gap > 0, judged.agrees)
    close = gap.abs() < gap.abs().median()
    assert 0.75 < judged.agrees.float().mean() < 0.95
    assert judged.agrees[~close].float().mean() > judged.agrees[close].float().mean() + 0.1


# The learned reward: learns from pairs, and mostly orders assets as the people's oracle does.


def test_a_score_is_of_its_own_asset_alone():
    assets, names = drawn(8)
    network = load_network("reward")
    torch.testing.assert_close(
        network(assets[3:4], names[3:4]), network(assets, names)[3:4], atol=1e-4, rtol=1e-4
    )
    assert network(assets, names).dtype == torch.float32 and not network(assets, names).requires_grad
