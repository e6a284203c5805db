"""Settings of methods by name: ours, and those of released code as far as it differs."""

from eg3d_rlhf.tuning.distill.guidance.denoiser import DenoiserSettings
from eg3d_rlhf.tuning.distill.guidance.dreamdpo import DreamDpoSettings
from eg3d_rlhf.tuning.distill.guidance.dreamreward import DreamRewardSettings
from eg3d_rlhf.tuning.distill.guidance.psd import PsdSettings
from eg3d_rlhf.tuning.distill.guidance.ranking import RankingSettings
from eg3d_rlhf.tuning.distill.guidance.rewardsds import RewardSdsSettings
from eg3d_rlhf.tuning.distill.guidance.sds import SdsSettings
from eg3d_rlhf.tuning.distill.noise_weighting import NoiseWeighting
from eg3d_rlhf.tuning.distill.schedule import Ramp

MVDREAM = DenoiserSettings(guidance_scale=50.0, form="recon", rescale=0.5)
PRESETS = {
    "sds": SdsSettings(),
    "dreamfusion": SdsSettings(prior=DenoiserSettings(guidance_scale=101.0, view_prompts=True)),  # threestudio writes 100
    "mvdream": SdsSettings(prior=MVDREAM),
    "dreamreward": DreamRewardSettings(),
    "dreamreward-released-1": DreamRewardSettings(
        prior=MVDREAM, weight=Ramp(0.6), balance="digits", ceiling=4.0, through="images", x0_until=100, reward_from=6000,
        reward_only_from=9801,
    ),
    "dreamreward-released-2": DreamRewardSettings(
        prior=MVDREAM, weight=Ramp(0.3), balance="digits", ceiling=4.0, through="images", x0_until=300, reward_from=1001,
        reward_only_from=9801,
    ),
    "dreamdpo": DreamDpoSettings(),
    "dreamdpo-formula": DreamDpoSettings(lose_guidance_scale=None),
    "dreamdpo-released": DreamDpoSettings(
        tau=0.01, subtract_noise=False, ranking=RankingSettings(pair_level="view", standardise=False, judge_mode="or")
    ),
    "rewardsds": RewardSdsSettings(),
    "rewardsds-released": RewardSdsSettings(
        prior=MVDREAM, noises=7, until=7000, explore_steps=15, explore_end="t0", standardise=False
    ),
    "best-noise": RewardSdsSettings(weighting=NoiseWeighting(strategy="best", best=1)),
    "psd": PsdSettings(),
    "psd-fixed-negative": PsdSettings(negative_update="none"),
}
