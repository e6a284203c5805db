"""Every preset builds its guidance and makes one finite step; the released ones differ from ours."""

import dataclasses
import json

import pytest
import torch

from eg3d_rlhf.tuning.distill.guidance.dreamdpo import DreamDpo, DreamDpoSettings
from eg3d_rlhf.tuning.distill.guidance.dreamreward import DreamReward, DreamRewardSettings
from eg3d_rlhf.tuning.distill.guidance.psd import Psd, PsdSettings
from eg3d_rlhf.tuning.distill.guidance.rewardsds import RewardSds, RewardSdsSettings
from eg3d_rlhf.tuning.distill.guidance.sds import Sds, SdsSettings
from eg3d_rlhf.tuning.distill.methods import PRESETS
from eg3d_rlhf.tuning.distill.schedule import Streams
from tests.tuning.distill.particles import PROMPT, Along, prior

METHODS = {DreamDpoSettings: DreamDpo, DreamRewardSettings: DreamReward, PsdSettings: Psd, RewardSdsSettings: RewardSds, SdsSettings: Sds}


@pytest.mark.parametrize("name", PRESETS)
def test_one_step(name):
    made, settings = prior(), PRESETS[name]
    more = {} if isinstance(settings, SdsSettings) else {"reward": Along(made)}
    guidance = METHODS[type(settings)](made, settings, views=2, streams=Streams(seed=0), **more)
    x = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    cameras = torch.eye(4).flatten().repeat(4, 1)
    cameras[:, 11] = 2.7
    output = guidance(x, torch.tensor([300, 300, 700, 700]), [PROMPT] * 4, cameras, 2, made.decode(x))
    assert output.grad.shape == x.shape and torch.isfinite(output.grad).all() and output.grad.abs().max() > 0
    assert all(term.shape[0] in (2, 4) and torch.isfinite(term).all() for term in output.terms.values())
    assert json.dumps(dataclasses.asdict(settings))


def test_released_code_is_not_what_we_do():
    for name in ("dreamdpo", "rewardsds"):
        assert PRESETS[name] != PRESETS[f"{name}-released"]


@pytest.mark.parametrize("name", [name for name in PRESETS if not isinstance(PRESETS[name], SdsSettings)])
def test_a_reward_of_other_views_is_refused(name):
    made, settings = prior(), PRESETS[name]
    reward = Along(made)
    reward.views = 4
    with pytest.raises(ValueError, match="--views: expected a multiple of the 4 that|--pair-level: expected asset for a reward of 4"):
        METHODS[type(settings)](made, settings, views=6, streams=Streams(seed=0), reward=reward)
