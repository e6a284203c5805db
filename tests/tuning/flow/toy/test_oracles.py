"""The three judges: all prefer what was asked for, and they are not one judge."""

import numpy as np
import pytest
import torch
from scipy import stats
from skimage.measure import label

from eg3d_rlhf.tuning.flow.toy.judges import ChooserOracle, FinalOracle, LabelOracle
from eg3d_rlhf.tuning.flow.toy.pipeline import CONDITIONS, Defects, ToyAsset
from tests.tuning.flow.toy.drawing import PERFECT, drawn, perfect

ORACLES = [LabelOracle(), ChooserOracle(), FinalOracle()]
NAMES = list(CONDITIONS)
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
    a, b = oracle.parts(asset, ["red ball"]), oracle.parts(asset, ["blue ball"])
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
    assert np.isclose(FinalOracle().parts(assets, names)["geometry"].item(), dice + symmetry - 0.03 * (pieces - 1))


def test_detached_voxels_are_parts_of_their_own():
    asset = perfect(["red box"])[0]
    filled = asset.occupancy.clone()
    filled[0, 0, 7] = filled[7, 0, 7] = True  # symmetric, so only overlap and number of parts suffer
    n = int(asset.occupancy.sum())
    found = FinalOracle().parts([ToyAsset(filled, asset.colours)], ["red box"])["geometry"].item()
    assert np.isclose(found, 2 * n / (2 * n + 2) + 1 - 0.06, atol=1e-5)


def test_lists_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="oracle: expected as many conditions as assets, got 2 and 1"):
        FinalOracle()(perfect(["red ball"]), ["red ball", "red box"])


def test_a_perfect_draft_is_perfect():
    assets, names = drawn(64, 0, PERFECT)
    assert FinalOracle()(assets, names).allclose(torch.tensor(2.0), atol=1e-5)
