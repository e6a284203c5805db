"""Every preset builds its guidance and makes one finite step; what does not fit is refused; without preference a method is the base."""

import dataclasses
import json
import warnings

import pytest
import torch

from eg3d_rlhf.core.interfaces import Guidance
from eg3d_rlhf.modes.distill import method_of
from eg3d_rlhf.tuning.distill.config import METHODS
from eg3d_rlhf.tuning.distill.gradients import STRATEGIES, NoiseWeighting
from eg3d_rlhf.tuning.distill.guidance.denoiser import DenoiserSettings, RankingSettings
from eg3d_rlhf.tuning.distill.guidance.dreamdpo import DreamDpo, DreamDpoSettings
from eg3d_rlhf.tuning.distill.guidance.dreamreward import DreamReward, DreamRewardSettings
from eg3d_rlhf.tuning.distill.guidance.psd import Psd, PsdSettings
from eg3d_rlhf.tuning.distill.guidance.rewardsds import RewardSds, RewardSdsSettings
from eg3d_rlhf.tuning.distill.guidance.sds import Sds, SdsSettings
from eg3d_rlhf.tuning.distill.methods import PRESETS
from eg3d_rlhf.tuning.distill.schedule import Ramp, Streams
from tests.tuning.distill.particles import PROMPT, Along, Prefers, Towards, optimise, prior, some


def guidance_for(settings):
    return next(method.guidance for method in METHODS.values() if method.settings is type(settings))


@pytest.mark.parametrize("name", PRESETS)
def test_one_step(name):
    made, settings = prior(), PRESETS[name]
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


def test_released_code_is_not_what_we_do():
    for name in ("dreamdpo", "rewardsds"):
        assert PRESETS[name] != PRESETS[f"{name}-released"]


@pytest.mark.parametrize("name", [name for name in PRESETS if METHODS[method_of(name)].rewarded])
def test_a_reward_of_other_views_is_refused(name):
    made, settings = prior(), PRESETS[name]
    reward = Along(made)
    reward.views = 4
    with pytest.raises(ValueError, match="--views: expected a multiple of the 4 that|--pair-level: expected asset for a reward of 4"):
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


@pytest.mark.parametrize(("kind", "settings", "text"), [
    (DenoiserSettings, {"perp_neg": True}, "--perp-neg: expected --view-prompts"),
    (DenoiserSettings, {"form": "vsd"}, "--form: expected one of"),
    (SdsSettings, {"image_loss": 1.0, **RECON}, "--image-loss: expected the form sds"),
    (DreamDpoSettings, {"tau": -1.0}, "--tau: expected 0 to inf"),
    (DreamDpoSettings, {"tau": 2.0, "tau_mode": "quantile"}, "--tau: expected 0 to 1"),
    (DreamDpoSettings, RECON, "--form: expected sds"),
    (PsdSettings, RECON, "--form: expected sds"),
    (PsdSettings, {"rank_predictor": "cfg"}, "--rank-predictor: expected cond"),
    (DreamRewardSettings, {"through": "images"}, "--through: expected latents"),
    (DreamRewardSettings, {"weight": Ramp((0.0, -1.0, 5))}, "--reward-weight: expected weights >= 0"),
    (RewardSdsSettings, {"explore_end": "t0"}, "--explore-end: expected x0"),
    (RewardSdsSettings, {"noises": 0}, "noises must be >= 1"),
    (NoiseWeighting, {"strategy": "mean"}, "--strategy: expected one of"),
])  # fmt: skip
def test_settings_that_do_not_fit(kind, settings, text):
    with pytest.raises(ValueError, match=text):
        kind(**settings)


@pytest.mark.parametrize(("settings", "reward", "judge", "text"), [
    (DreamDpoSettings(), None, None, "--reward: expected a reward, or a judge"),
    (DreamDpoSettings(ranking=RankingSettings(judge_mode="or")), None, Prefers(None), "--reward: expected a reward"),
    (PsdSettings(negative_update="reward"), None, Prefers(None), "--negative-update: expected a differentiable reward"),
    (DreamRewardSettings(), blind, None, "--reward: expected a differentiable one"),
    (DreamRewardSettings(), sided, None, "--reward: expected cameras of the pictures"),
])  # fmt: skip
def test_rewards_and_judges_that_do_not_fit(settings, reward, judge, text):
    made = prior()
    more = {"judge": judge} if judge else {}
    with pytest.raises(ValueError, match=text):
        guidance_for(settings)(made, settings, views=1, streams=Streams(seed=0), reward=reward and reward(made), **more)(*some())


def test_no_warning_by_default():
    made = prior()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DreamDpo(made, DreamDpoSettings(), views=1, streams=Streams(seed=0), reward=Towards(made))
    guided = Psd(made, PsdSettings(), views=1, streams=Streams(seed=0), judge=Prefers(Towards(made)))
    assert guided.update == "preference"  # a judge has no gradient


# A method whose preference is turned off is the base to the last bit, with the same draws (E3, P1).


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
