"""The people's pairs: one set of assets seen from both stages, called by a noisy annotator."""

import torch

from eg3d_rlhf.tuning.flow.toy.judges import LabelOracle, human_pairs, judge_drafts
from eg3d_rlhf.tuning.flow.toy.pipeline import TRAINED


def test_pairs_of_both_stages_are_of_the_same_assets():
    structure, voxels = (human_pairs(stage, TRAINED[:3], 4, seed=1) for stage in ("structure", "voxels"))
    assert len(structure) == 12 and [p.id for p in structure] == [p.id for p in voxels] and len({p.id for p in structure}) == 12
    for a, b in zip(structure, voxels, strict=True):
        assert a.condition == b.condition and a.source == b.source == "human" and (a.stage, b.stage) == ("structure", "voxels")
        for side in ("preferred", "rejected"):
            assert torch.equal((getattr(a, side)[0] > 0).nonzero().int(), getattr(b, side).coords)


def test_a_condition_has_its_own_draws():
    both, alone = human_pairs("structure", TRAINED[:2], 3, seed=1), human_pairs("structure", TRAINED[1:2], 3, seed=1)
    assert [p.id for p in both[3:]] == [p.id for p in alone]
    assert all(torch.equal(p.preferred, q.preferred) for p, q in zip(both[3:], alone, strict=True))
    other = human_pairs("structure", TRAINED[1:2], 3, seed=2)
    assert not all(torch.equal(p.preferred, q.preferred) for p, q in zip(alone, other, strict=True))


def test_the_annotator_errs_where_assets_are_alike():
    judged = judge_drafts([TRAINED[i % 64] for i in range(600)], torch.Generator().manual_seed(0))
    oracle = LabelOracle()
    gap = oracle(judged.assets[0], judged.conditions) - oracle(judged.assets[1], judged.conditions)
    assert torch.equal(gap > 0, judged.agrees)
    close = gap.abs() < gap.abs().median()
    assert 0.75 < judged.agrees.float().mean() < 0.95
    assert judged.agrees[~close].float().mean() > judged.agrees[close].float().mean() + 0.1
