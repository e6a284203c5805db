"""Test `--reward=solid` of flows: an asset is rewarded if it is solid and resembles its prompt's references,
but not if it is only solid. Voxels have y up.
"""

import numpy as np
import pytest
import torch

from eg3d_rlhf.geometry import solids
from eg3d_rlhf.modes.online import check_voxels
from eg3d_rlhf.tuning.flow.base.sampling import generate
from eg3d_rlhf.tuning.flow.families.opening import open_problem
from eg3d_rlhf.tuning.flow.families.sam3d import Sam3dPipeline
from eg3d_rlhf.tuning.flow.families.trellis import FAMILY
from eg3d_rlhf.tuning.flow.toy.toy_pipeline import R, ToyAsset
from eg3d_rlhf.tuning.flow.training.online.online_arms import reward_of
from eg3d_rlhf.tuning.flow.training.online.solid import SolidReward, grid_of, rules_for
from eg3d_rlhf.tuning.flow.training.settings import ArmsSource
from tests.rejections import raising
from tests.tuning.flow.families.trellis import tiny_trellis


@pytest.fixture(scope="module")
def toy():
    return open_problem(ArmsSource())


def asset(occupancy: torch.Tensor) -> ToyAsset:
    return ToyAsset(occupancy, torch.zeros(R, R, R, 3))


def test_sound_assets_of_the_condition_are_rewarded_and_blobs_are_not(toy):
    reward = reward_of("solid", toy)
    assert isinstance(reward, SolidReward)
    reward.references = 4
    names = ["red table"] * 4
    untuned = generate(toy.pipeline, names, [0, 1, 2, 3])
    floating = untuned[0].occupancy.clone()
    floating[0, 0, R - 1] = floating[R - 1, R - 1, R - 1] = True
    found = reward.score_terms(
        [*untuned, asset(torch.ones(R, R, R, dtype=torch.bool)), asset(floating)], [*names, *names[:2]]
    )
    assert found[4].score.solid == 1 and found[4].reward == 0, "a full cube is sound, and no table"
    assert found[5].score.main < 1 and found[5].reward < 1
    drawn = {name: len(grids) for name, grids in reward._reference_grids.items()}
    assert drawn == {names[0]: 4} and all(0 <= judged.reward <= 1 for judged in found)
    torch.testing.assert_close(reward(untuned, names), torch.tensor([judged.reward for judged in found[:4]]))
    assert reward_of("solid", toy) is not reward


def test_up_is_up():
    upright = torch.zeros(R, R, R, dtype=torch.bool)
    upright[3:5, 3:5, :6] = True
    grid = grid_of(None, asset(upright))
    assert grid.any(axis=(0, 2)).sum() == 6 and rules_for(grid) is solids.OCCUPANCY
    assert rules_for(np.ones((32, 32, 32), dtype=bool)) is solids.OBJECTS
    with raising("--reward=solid", "voxels", "int"):
        grid_of(None, 3)


def test_a_pipeline_without_voxels_is_rejected_before_sampling(toy, pipeline):
    check_voxels(toy.pipeline)
    check_voxels(pipeline)
    with raising("--reward=solid", "Sam3dPipeline"):
        check_voxels(object.__new__(Sam3dPipeline))


def test_assets_of_trellis_are_read_by_its_own_voxels(pipeline):
    names = list(tiny_trellis.NAMES[:1]) * 2
    assets = generate(pipeline, names, [0, 1])
    grid = grid_of(pipeline, assets[0])
    assert grid.sum() == len(pipeline.voxels(assets[0])) and grid.shape == (tiny_trellis.R,) * 3
    scores = SolidReward(pipeline=pipeline, references=2)(assets, names)
    assert scores.shape == (2,) and bool(((scores >= 0) & (scores <= 1)).all())


@pytest.fixture
def pipeline(tmp_path):
    return FAMILY.load(tiny_trellis.write_trellis(tmp_path / "TRELLIS-text-tiny"), tiny_trellis.tokens())
