"""Settings and guidance of the methods by name, and their presets."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from eg3d_rlhf.tuning.distill.config import METHODS, Arm, DistillSettings, Method, ramp_of
from eg3d_rlhf.tuning.distill.guidance.settings import (
    BestOfNSettings,
    DenoiserSettings,
    DreamDpoSettings,
    DreamRewardSettings,
    NoiseWeighting,
    PsdSettings,
    RankingSettings,
    RewardSdsSettings,
    SdsSettings,
)
from eg3d_rlhf.tuning.distill.schedules_by_step import Ramp
from training.config import built

if TYPE_CHECKING:
    from eg3d_rlhf.core.interfaces import DiffusionPrior, Guidance, PairwiseJudge, RewardModel
    from eg3d_rlhf.tuning.distill.schedule import Streams


def imported(module: str, name: str, *args: Any, **kwargs: Any) -> "Guidance":
    """Make the guidance of a method, whose module imports torch: `--help` is spared that."""
    made: Guidance = getattr(importlib.import_module(f"eg3d_rlhf.tuning.distill.guidance.{module}"), name)(
        *args, **kwargs
    )
    return made


def _add(
    name: str, settings: type, module: str, guidance: str, noises: Callable[[Any], int], **more: bool
) -> None:
    made = partial(imported, module, guidance)
    METHODS.add(name, Method(settings=settings, guidance=made, noises=noises, **more))


_add("sds", SdsSettings, "sds", "Sds", lambda s: s.samples, rewarded=False)
_add("dreamdpo", DreamDpoSettings, "dreamdpo", "DreamDpo", lambda s: 2, judged=True)
_add("rewardsds", RewardSdsSettings, "rewardsds", "RewardSds", lambda s: s.noises)
_add("dreamreward", DreamRewardSettings, "dreamreward", "DreamReward", lambda s: 1)
_add("psd", PsdSettings, "psd", "Psd", lambda s: 2, judged=True)
_add("best-of-n", BestOfNSettings, "sds", "BestOfN", lambda s: s.samples)

# Presets by name: ours, and those of released code as far as it differs.

MVDREAM = DenoiserSettings(guidance_scale=50.0, form="recon", rescale=0.5)
PRESETS = {
    "sds": SdsSettings(),
    # threestudio writes 100
    "dreamfusion": SdsSettings(prior=DenoiserSettings(guidance_scale=101.0, view_prompts=True)),
    "mvdream": SdsSettings(prior=MVDREAM),
    "dreamreward": DreamRewardSettings(),
    "dreamreward-released-1": DreamRewardSettings(
        prior=MVDREAM,
        weight=Ramp(0.6),
        balance="digits",
        ceiling=4.0,
        through="images",
        x0_until=100,
        reward_from=6000,
        reward_only_from=9801,
    ),
    "dreamreward-released-2": DreamRewardSettings(
        prior=MVDREAM,
        weight=Ramp(0.3),
        balance="digits",
        ceiling=4.0,
        through="images",
        x0_until=300,
        reward_from=1001,
        reward_only_from=9801,
    ),
    "dreamdpo": DreamDpoSettings(),
    "dreamdpo-formula": DreamDpoSettings(lose_guidance_scale=None),
    "dreamdpo-released": DreamDpoSettings(
        tau=0.01,
        subtract_noise=False,
        ranking=RankingSettings(pair_level="view", standardise=False, judge_mode="or"),
    ),
    "rewardsds": RewardSdsSettings(),
    "rewardsds-released": RewardSdsSettings(
        prior=MVDREAM, noises=7, until=7000, explore_steps=15, explore_end="t0", standardise=False
    ),
    "best-noise": RewardSdsSettings(weighting=NoiseWeighting(strategy="best", best=1)),
    "psd": PsdSettings(),
    "psd-fixed-negative": PsdSettings(negative_update="none"),
}

RAMPS = ("weight",)  # settings that may change with the step: text in flags and JSON


def settings_of(name: str, values: Mapping[str, Any], preset: str | None = None) -> Any:
    """A method's settings: the preset's, where it is one of this method, else its own, with `values` by name
    over them.
    """
    kind = METHODS[name].settings
    # best-of-n has those of sds
    base = PRESETS[preset] if preset is not None and issubclass(kind, type(PRESETS[preset])) else kind()
    given = {name: ramp_of(value) if name in RAMPS else value for name, value in values.items()}
    return built(kind, {**flat(base), **given})


def flat(settings: Any) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for field in fields(settings):
        value = getattr(settings, field.name)
        values |= flat(value) if is_dataclass(value) and not isinstance(value, Ramp) else {field.name: value}
    return values


def guidance_of(
    name: str,
    settings: Any,
    prior: "DiffusionPrior",
    reward: "RewardModel | None",
    judge: "PairwiseJudge | None",
    views: int,
    streams: "Streams",
) -> "Guidance":
    """The guidance of a method. Raises: ValueError for a method without the reward that it needs."""
    method = METHODS[name]
    more = dict[str, Any]()
    if method.judged:
        more["judge"] = judge
    if method.rewarded:
        if reward is None and more.get("judge") is None:
            raise ValueError(
                f"--reward: expected a reward for --method={name}, got none. Name one, or use --method=sds."
            )
        more["reward"] = reward
    return method.guidance(prior, settings, views=views, streams=streams, **more)


def owners() -> dict[str, list[str]]:
    methods: dict[str, list[str]] = {}
    for name, method in METHODS.items():
        for setting in flat(method.settings()):
            methods.setdefault(setting, []).append(name)
    return methods


def of_arm(settings: DistillSettings, arm: str) -> tuple[Any, int, int]:
    """An arm's settings of its method, how many starts each asset has, and how many noises a picture gets in
    a step.
    """
    method = Arm.parse(arm).method
    chosen = settings_of(method, settings.guidance, settings.preset)
    return chosen, getattr(chosen, "starts", 1), METHODS[method].noises(chosen)
