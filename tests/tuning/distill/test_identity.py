"""A method whose preference is turned off is the base to the last bit, with the same draws (E3, P1)."""

import pytest
import torch

from eg3d_rlhf.tuning.distill.gradients import STRATEGIES, NoiseWeighting
from eg3d_rlhf.tuning.distill.guidance.dreamreward import DreamReward, DreamRewardSettings
from eg3d_rlhf.tuning.distill.guidance.psd import Psd, PsdSettings
from eg3d_rlhf.tuning.distill.guidance.rewardsds import RewardSds, RewardSdsSettings
from eg3d_rlhf.tuning.distill.guidance.sds import Sds, SdsSettings
from eg3d_rlhf.tuning.distill.schedule import Ramp, Streams
from tests.tuning.distill.particles import Along, Towards, optimise, prior

STREAMS, FEW = Streams(seed=1), {"steps": 25, "lr": 0.05}


def run(kind, settings, reward=None):
    made = prior()
    more = {} if reward is None else {"reward": reward(made)}
    return optimise(kind(made, settings, views=1, streams=STREAMS, **more), made, **FEW).x


def base(samples: int = 1):
    return run(Sds, SdsSettings(samples=samples))


@pytest.mark.parametrize("weight", [Ramp(0.0), Ramp((0, 0.0, 0.0, 10))])
def test_reward_weight_nought(weight):
    assert torch.equal(run(DreamReward, DreamRewardSettings(weight=weight), Along), base())


def test_a_weight_that_rises_later_changes_nothing_before():
    late = DreamRewardSettings(weight=Ramp((25, 0.0, 0.1, 50)))
    assert torch.equal(run(DreamReward, late, Along), base())
    early = DreamRewardSettings(weight=Ramp((5, 0.0, 0.1, 20)))
    assert not torch.equal(run(DreamReward, early, Along), base())


def test_p1_eta_nought_is_two_sample_distillation():
    still = {"negative_update": "none"}
    assert torch.equal(run(Psd, PsdSettings(eta=0.0, **still), Towards), base(samples=2))
    assert not torch.equal(run(Psd, PsdSettings(eta=1.0, **still), Towards), base(samples=2))
    assert not torch.equal(base(samples=2), base())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_noise(strategy):
    settings = RewardSdsSettings(noises=1, weighting=NoiseWeighting(strategy=strategy))
    assert torch.equal(run(RewardSds, settings, Towards), base())
    assert not torch.equal(run(RewardSds, RewardSdsSettings(noises=4), Towards), base())


def test_after_its_last_step_rewardsds_is_the_base():
    assert torch.equal(run(RewardSds, RewardSdsSettings(noises=4, until=0), Towards), base())
