"""Drafts: what goes wrong with them, how much, and what repairs it."""

import numpy as np
import pytest
import torch

from eg3d_rlhf.tuning.flow.toy.judges import LabelOracle
from eg3d_rlhf.tuning.flow.toy.pipeline import CONDITIONS, Defects, R, draw_drafts, make_assets, neighbours, targets
from tests.tuning.flow.toy.drawing import PERFECT, drawn

NAMES = list(CONDITIONS)


def geometry(defects: Defects) -> torch.Tensor:
    assets, names = drawn(256, 3, defects)
    return LabelOracle().parts(assets, names)["geometry"] / 4


def test_drafts_without_defects_are_what_was_asked_for():
    drafts = draw_drafts(NAMES, torch.Generator().manual_seed(0), PERFECT)
    shapes, colours = targets(NAMES)
    assert (drafts.structure[:, None] == shapes).flatten(2).all(2).any(1).all()
    assert torch.equal(drafts.features[..., :3], colours)
    assert all(torch.equal(asset.occupancy, one) for asset, one in zip(make_assets(drafts), drafts.structure, strict=True))


def test_a_seed_repeats_and_another_does_not():
    first, same, other = (draw_drafts(NAMES, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.features, same.features) and not torch.equal(first.structure, other.structure)


def test_strengths_differ_from_sample_to_sample():
    """The variance of the number of floaters is far above what one share for all would give."""
    only = Defects(floaters=0.1, holes=0, unrepaired=1, wrong=0)
    names = ["red box"] * 500
    drafts = draw_drafts(names, torch.Generator().manual_seed(0), only)
    counts = (drafts.structure & ~targets(names)[0].any(1)).flatten(1).sum(1).double()
    assert counts.var() > 2 * counts.mean()


def test_sizes_repair_floaters_and_holes():
    unrepaired = geometry(Defects(unrepaired=1, wrong=0)).mean()
    assert geometry(Defects(unrepaired=0, wrong=0)).mean() > 0.97 > unrepaired
    assert geometry(PERFECT).eq(1).all()
    assert geometry(Defects(floaters=0, holes=0, wrong=0.2)).mean() < 0.99


def test_latents_of_both_stages_lie_on_the_same_voxels():
    drafts = draw_drafts(NAMES[:5], torch.Generator().manual_seed(0))
    structure, voxels = drafts.latents("structure"), drafts.latents("voxels")
    assert structure.shape == (5, 1, R, R, R) and set(structure.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal((structure[:, 0] > 0).nonzero().int(), voxels.coords)
    sample, x, y, z = voxels.coords.long().unbind(1)
    torch.testing.assert_close(voxels.feats, drafts.features[sample, x, y, z] * 2 - 1)


def test_neighbours_by_hand():
    grid = np.random.default_rng(0).integers(0, 2, (2, R, R, R)).astype(np.float64)
    padded = np.pad(grid, ((0, 0), (1, 1), (1, 1), (1, 1)))
    inner = slice(1, -1)
    expected = sum(np.roll(padded, step, axis)[:, inner, inner, inner] for axis in (1, 2, 3) for step in (-1, 1))
    np.testing.assert_array_equal(neighbours(torch.from_numpy(grid)).numpy(), expected)


def test_impossible_strengths_are_refused():
    with pytest.raises(ValueError, match=r"Defects.holes: expected 0 to 1, got 1.5. Set it."):
        Defects(holes=1.5)
