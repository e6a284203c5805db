"""Properties of averaged reward networks."""

from dataclasses import replace

import pytest
import torch

from eg3d_rlhf.observations import SigmaSlab
from eg3d_rlhf.reward.model import HEADS, RewardModel
from eg3d_rlhf.reward.networks import RewardEnsemble
from eg3d_rlhf.reward.reward import Reward, load_reward
from eg3d_rlhf.sigma.spec import SlabSpec

SPEC = SlabSpec(resolution=32)
SHAPE = SPEC.shape


@pytest.fixture
def members():
    torch.manual_seed(0)
    return [RewardModel(replace(HEADS, slab_shape=SHAPE)).eval() for _ in range(3)]


def slabs(n, seed=0):
    return torch.rand(n, 1, *SHAPE, generator=torch.Generator().manual_seed(seed)) * 100


def test_score_is_the_mean_of_the_members(members):
    x = slabs(4)
    expected = sum(m.score(x) for m in members) / 3
    ensemble = RewardEnsemble.of(members)
    torch.testing.assert_close(ensemble.score(x), expected)
    torch.testing.assert_close(ensemble.score_embedding(ensemble.embed(x)), expected)


def test_pair_margin_is_the_mean_and_swapping_negates_it(members):
    a, b = slabs(2), slabs(2, 1)
    ensemble = RewardEnsemble.of(members)
    margin = ensemble.pair_margin(ensemble.embed(a), ensemble.embed(b))
    torch.testing.assert_close(margin, sum(m.pair_margin(m.embed(a), m.embed(b)) for m in members) / 3)
    torch.testing.assert_close(margin, -ensemble.pair_margin(ensemble.embed(b), ensemble.embed(a)))


def test_saved_and_loaded_ensemble_scores_the_same(members, tmp_path):
    ensemble = RewardEnsemble.of(members)
    loaded = load_reward(Reward(SigmaSlab(SPEC), ensemble).save(tmp_path / "r.safetensors"))
    assert isinstance(loaded.network, RewardEnsemble) and len(loaded.members()) == 3
    assert torch.equal(loaded.score_observed(slabs(2)), ensemble.score(slabs(2)))
    assert torch.equal(loaded.members()[1].score_observed(slabs(2)), members[1].score(slabs(2)))


def test_score_is_differentiable_in_the_slab(members):
    x = slabs(2).requires_grad_(True)
    RewardEnsemble.of(members).score(x).sum().backward()
    expected = torch.zeros_like(x)
    for member in members:
        y = x.detach().clone().requires_grad_(True)
        member.requires_grad_(False).score(y).sum().backward()
        expected += y.grad / 3
    torch.testing.assert_close(x.grad, expected)
