"""Every preset builds its guidance and makes one finite step; settings that do not fit are rejected;
without preference a method is the base.
"""

import dataclasses
import json
import warnings

import pytest
import torch

from eg3d_rlhf.core.interfaces import Guidance
from eg3d_rlhf.modes.distill import preset_method
from eg3d_rlhf.tuning.distill.config import METHODS
from eg3d_rlhf.tuning.distill.guidance.dreamdpo import DreamDpo
from eg3d_rlhf.tuning.distill.guidance.dreamreward import DreamReward
from eg3d_rlhf.tuning.distill.guidance.psd import Psd
from eg3d_rlhf.tuning.distill.guidance.rewardsds import RewardSds
from eg3d_rlhf.tuning.distill.guidance.sds import Sds
from eg3d_rlhf.tuning.distill.guidance.settings import (
    STRATEGIES,
    DenoiserSettings,
    DreamDpoSettings,
    DreamRewardSettings,
    NoiseWeighting,
    PsdSettings,
    RankingSettings,
    RewardSdsSettings,
    SdsSettings,
)
from eg3d_rlhf.tuning.distill.methods import PRESETS
from eg3d_rlhf.tuning.distill.schedule import Streams
from eg3d_rlhf.tuning.distill.schedules_by_step import Ramp
from tests.rejections import raising
from tests.tuning.distill.particles import PROMPT, Along, Prefers, Towards, optimise, prior, some


def guidance_for(settings):
    return next(method.guidance for method in METHODS.values() if method.settings is type(settings))


@pytest.mark.parametrize("name", PRESETS)
def test_one_step(name):
    made = prior()
    settings = PRESETS[name]
    more = {} if isinstance(settings, SdsSettings) else {"reward": Along(made)}
    guidance = guidance_for(settings)(made, settings, views=2, streams=Streams(seed=0), **more)
    x = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    cameras = torch.eye(4).flatten().repeat(4, 1)
    cameras[:, 11] = 2.7
    assert isinstance(guidance, Guidance)
    output = guidance(x, torch.tensor([300, 300, 700, 700]), [PROMPT] * 4, cameras, 2, made.decode(x))
    assert output.grad.shape == x.shape and torch.isfinite(output.grad).all() and output.grad.abs().max() > 0
    assert all(term.shape[0] in (2, 4) and torch.isfinite(term).all() for term in output.terms.values())
    assert json.dumps(dataclasses.asdict(settings))


@pytest.mark.parametrize("name", [name for name in PRESETS if METHODS[preset_method(name)].accepts_reward])
def test_a_reward_of_other_views_is_rejected(name):
    made = prior()
    settings = PRESETS[name]
    reward = Along(made)
    reward.views = 4
    with pytest.raises(ValueError, match="views|pair_level"):
        guidance_for(settings)(made, settings, views=6, streams=Streams(seed=0), reward=reward)


def blind(made):
    reward = Towards(made)
    reward.differentiable = False
    return reward


def sided(made):
    reward = Along(made)
    reward.view_prompts = True
    return reward


RECON = {"prior": DenoiserSettings(form="recon")}


@pytest.mark.parametrize(
    ("kind", "settings", "name"),
    [
        (DenoiserSettings, {"perp_neg": True}, "perp_neg"),
        (DenoiserSettings, {"form": "vsd"}, "form"),
        (SdsSettings, {"image_loss": 1.0, **RECON}, "image_loss"),
        (DreamDpoSettings, {"tau": -1.0}, "tau"),
        (DreamDpoSettings, {"tau": 2.0, "tau_mode": "quantile"}, "tau"),
        (DreamDpoSettings, RECON, "form"),
        (PsdSettings, RECON, "form"),
        (DreamRewardSettings, {"through": "images"}, "through"),
        (DreamRewardSettings, {"weight": Ramp((0.0, -1.0, 5))}, "weight"),
        (RewardSdsSettings, {"explore_end": "t0"}, "explore_end"),
        (NoiseWeighting, {"strategy": "mean"}, "strategy"),
    ],
)
def test_settings_that_do_not_fit(kind, settings, name):
    with pytest.raises(ValueError, match=f"--set(tings)? {name}|--{name}"):
        kind(**settings)


@pytest.mark.parametrize(
    ("settings", "reward", "judge", "names"),
    [
        (DreamDpoSettings(), None, None, ("--reward", "judge")),
        (
            DreamDpoSettings(ranking=RankingSettings(judge_mode="or")),
            None,
            Prefers(None),
            ("--reward", "judge"),
        ),
        (
            PsdSettings(negative_update="reward"),
            None,
            Prefers(None),
            ("--set negative_update=reward", "judge"),
        ),
        (DreamRewardSettings(), sided, None, ("--reward", "cameras")),
        (DreamRewardSettings(), blind, None, ("--reward", "differentiable")),
    ],
)
def test_rewards_and_judges_that_do_not_fit(settings, reward, judge, names):
    made = prior()
    more = {"judge": judge} if judge else {}
    with raising(*names):
        guidance_for(settings)(
            made, settings, views=1, streams=Streams(seed=0), reward=reward and reward(made), **more
        )(*some())


def test_no_warning_by_default():
    made = prior()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DreamDpo(made, DreamDpoSettings(), views=1, streams=Streams(seed=0), reward=Towards(made))
    guided = Psd(made, PsdSettings(), views=1, streams=Streams(seed=0), judge=Prefers(Towards(made)))
    assert guided.update == "preference"  # a judge has no gradient


# A method whose preference is turned off is bitwise identical to the base, with the same random numbers (E3,
# P1).


STREAMS = Streams(seed=1)
FEW = {"steps": 25, "lr": 0.05}


def run(kind, settings, reward=None):
    made = prior()
    more = {} if reward is None else {"reward": reward(made)}
    return optimise(kind(made, settings, views=1, streams=STREAMS, **more), made, **FEW).x


def base(samples: int = 1):
    return run(Sds, SdsSettings(samples=samples))


SOME_PSD = {"negative_update": "none"}
NOISES = {"noises": 4}


@pytest.mark.parametrize(
    ("kind", "settings", "reward", "samples"),
    [
        (DreamReward, DreamRewardSettings(weight=Ramp(0.0)), Along, 1),
        (Psd, PsdSettings(eta=0.0, **SOME_PSD), Towards, 2),
        (
            DreamReward,
            DreamRewardSettings(weight=Ramp((25, 0.0, 0.1, 50))),
            Along,
            1,
        ),  # from the last step on
        *(
            (RewardSds, RewardSdsSettings(noises=1, weighting=NoiseWeighting(strategy=strategy)), Towards, 1)
            for strategy in STRATEGIES
        ),
        (RewardSds, RewardSdsSettings(until=0, **NOISES), Towards, 1),
    ],
)
def test_without_its_preference_a_method_is_the_base(kind, settings, reward, samples):
    assert torch.equal(run(kind, settings, reward), base(samples))


@pytest.mark.parametrize(
    ("kind", "settings", "reward", "samples"),
    [
        (DreamReward, DreamRewardSettings(weight=Ramp((5, 0.0, 0.1, 20))), Along, 1),
        (Psd, PsdSettings(**SOME_PSD), Towards, 2),
        (RewardSds, RewardSdsSettings(**NOISES), Towards, 1),
        (Sds, SdsSettings(samples=2), None, 1),
    ],
)
def test_with_it_it_is_another(kind, settings, reward, samples):
    assert not torch.equal(run(kind, settings, reward), base(samples))
