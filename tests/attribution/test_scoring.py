"""The fused score equals the reward's own."""

import pytest
import torch

from eg3d_rlhf.attribution.scoring import fast_score, group_affine
from eg3d_rlhf.reward.ensembles import RewardEnsemble
from eg3d_rlhf.reward.model import PAPER, PRESETS, RewardArch, RewardModel


def preset(name):
    return RewardArch.from_dict(PRESETS[name].network)


def rewards(arch, seed=0):
    torch.manual_seed(seed)
    return RewardModel(arch).eval().requires_grad_(False)


@pytest.mark.parametrize("name", ["tiny", "small", "small-slice"])
@pytest.mark.parametrize("shape", [(24, 27, 23), (33, 36, 32)])
def test_presets(name, shape):
    reward = rewards(preset(name))
    slabs = torch.rand([3, 1, *shape], generator=torch.Generator().manual_seed(1)) * 100
    torch.testing.assert_close(fast_score(reward)(slabs), reward.score(slabs), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("maps", [(8, 16, 32, 64), (4, 8)])  # the second has fewer channels than groups and than lanes
def test_networks_without_patches(maps):
    arch = RewardArch(feature_maps=maps, pool_size=64, trunk=(16, 16), embedding=16, heads=(8, 8))
    reward = rewards(arch, 2)
    slabs = torch.rand([2, 1, 17, 21, 19], generator=torch.Generator().manual_seed(3)) * 100
    truth = reward.double().score(slabs.double()).float()
    reward.float()
    score = fast_score(reward)
    torch.testing.assert_close(score(slabs), truth, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(score(slabs.flip(0)).flip(0), score(slabs))  # memory that is kept does not leak


def test_strided_reward():
    reward = rewards(preset("heads"))
    slabs = torch.rand([5, 1, 33, 36, 44], generator=torch.Generator().manual_seed(1)) * 100
    reward.extractor.calibrate(slabs)
    torch.testing.assert_close(fast_score(reward)(slabs), reward.score(slabs), atol=1e-6, rtol=1e-6)


def test_a_flat_slab_gives_a_number():
    reward = rewards(RewardArch(feature_maps=(8, 16), pool_size=64, trunk=(16, 16), embedding=16, heads=(8, 8)))
    flat = torch.zeros(1, 1, 8, 9, 10)
    torch.testing.assert_close(fast_score(reward)(flat), reward.score(flat), atol=1e-3, rtol=1e-3)


def test_other_rewards_score_as_they_are():
    ensemble = RewardEnsemble.of([rewards(preset("tiny"), s) for s in (0, 1)])
    slabs = torch.rand(2, 1, 16, 18, 17) * 100
    assert torch.equal(fast_score(ensemble)(slabs), ensemble.score(slabs)) and "paper" in PRESETS


def test_group_affine():
    norm = torch.nn.GroupNorm(4, 8).double()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(2, 8, 3, 4, 5, dtype=torch.float64)
    sums = torch.stack([x.flatten(2).sum(dim=2), x.square().flatten(2).sum(dim=2)], dim=2)
    scale, shift = group_affine(norm, sums, 60)
    torch.testing.assert_close((x * scale[..., None, None, None] + shift[..., None, None, None]), norm(x), atol=1e-5, rtol=1e-5)


@pytest.mark.long
def test_full_size():
    reward = rewards(PAPER)
    slab = torch.nn.functional.interpolate(torch.rand(1, 1, 9, 9, 9) * 100, size=(129, 141, 128), mode="trilinear")
    torch.testing.assert_close(fast_score(reward)(slab), reward.score(slab), atol=2e-5, rtol=2e-5)
