"""Settings of methods by name: ours, and those of released code as far as it differs."""

from eg3d_rlhf.distill.guidance.denoiser import DenoiserSettings
from eg3d_rlhf.distill.guidance.dreamdpo import DreamDpoSettings
from eg3d_rlhf.distill.guidance.ranking import RankingSettings
from eg3d_rlhf.distill.guidance.rewardsds import RewardSdsSettings
from eg3d_rlhf.distill.guidance.sds import SdsSettings

MVDREAM = DenoiserSettings(guidance_scale=50.0, form="recon", rescale=0.5)
PRESETS = {
    "sds": SdsSettings(),
    "dreamfusion": SdsSettings(prior=DenoiserSettings(guidance_scale=101.0, view_prompts=True)),  # threestudio writes 100
    "mvdream": SdsSettings(prior=MVDREAM),
    "dreamdpo": DreamDpoSettings(),
    "dreamdpo-formula": DreamDpoSettings(lose_guidance_scale=None),
    "dreamdpo-released": DreamDpoSettings(
        tau=0.01, subtract_noise=False, ranking=RankingSettings(pair_level="view", standardise=False, judge_mode="or")
    ),
    "rewardsds": RewardSdsSettings(),
    "rewardsds-released": RewardSdsSettings(
        prior=MVDREAM, noises=7, until=7000, explore_steps=15, explore_end="t0", standardise=False
    ),
}
