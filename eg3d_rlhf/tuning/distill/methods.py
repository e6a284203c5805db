"""Registers the methods with their settings and guidance, and defines presets."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from eg3d_rlhf.tuning.distill.config import METHODS, Arm, DistillSettings, Method, parse_ramp
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


def import_guidance(module: str, name: str, *args: Any, **kwargs: Any) -> "Guidance":
    """Make the guidance of a method. Its module imports PyTorch, so it is imported here:
    `--help` stays fast.
    """
    # By name: importing the module only when a run starts.
    guidance: Guidance = getattr(
        importlib.import_module(f"eg3d_rlhf.tuning.distill.guidance.{module}"), name
    )(*args, **kwargs)
    return guidance


def _add(
    name: str, settings: type, module: str, guidance: str, noises: Callable[[Any], int], **more: bool
) -> None:
    """Register a method whose guidance is the class `guidance` of `module`."""
    make = partial(import_guidance, module, guidance)
    METHODS.add(name, Method(settings=settings, guidance=make, noises=noises, **more))


_add("sds", SdsSettings, "sds", "Sds", lambda s: s.samples, rewarded=False)
_add("dreamdpo", DreamDpoSettings, "dreamdpo", "DreamDpo", lambda s: 2, judged=True)
_add("rewardsds", RewardSdsSettings, "rewardsds", "RewardSds", lambda s: s.noises)
_add("dreamreward", DreamRewardSettings, "dreamreward", "DreamReward", lambda s: 1)
_add("psd", PsdSettings, "psd", "Psd", lambda s: 2, judged=True)
_add("best-of-n", BestOfNSettings, "sds", "BestOfN", lambda s: s.samples)

# Presets by name: our defaults, and those of released code where it differs.

MVDREAM = DenoiserSettings(guidance_scale=50.0, form="recon", rescale=0.5)
PRESETS = {
    "sds": SdsSettings(),
    # threestudio's formula for guidance adds 1 to its scale, so its 100 is 101 here (see gradients.guided).
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

RAMPS = ("weight",)  # settings that may change with the step; they are texts in flags and JSON


def settings_of(name: str, values: Mapping[str, Any], preset: str | None = None) -> Any:
    """Build the settings of a method: those of the preset if it belongs to this method, else the method's
    defaults, with `values` in place of the fields of the same names.
    """
    kind = METHODS[name].settings
    # best-of-n has the settings of sds and more, so a preset of sds is valid for it, too.
    base = PRESETS[preset] if preset is not None and issubclass(kind, type(PRESETS[preset])) else kind()
    # Flags and JSON contain ramps as texts.
    changed = {name: parse_ramp(value) if name in RAMPS else value for name, value in values.items()}
    # `built` distributes the flat values to the nested dataclasses.
    return built(kind, {**flat(base), **changed})


def flat(settings: Any) -> dict[str, Any]:
    """Return all settings by name, those of nested dataclasses included; a `Ramp` counts as one setting."""
    values: dict[str, Any] = {}
    for field in fields(settings):
        # A setting keeps its own name in the flat form, so names must be unique within a method.
        value = getattr(settings, field.name)
        values |= flat(value) if is_dataclass(value) and not isinstance(value, Ramp) else {field.name: value}
    return values


def make_guidance(
    name: str,
    settings: Any,
    prior: "DiffusionPrior",
    reward: "RewardModel | None",
    judge: "PairwiseJudge | None",
    views: int,
    streams: "Streams",
) -> "Guidance":
    """Make the guidance of a method. Raises: ValueError for a method without the reward that it needs."""
    method = METHODS[name]
    # A method gets only the arguments that it accepts.
    options = dict[str, Any]()
    if method.judged:
        options["judge"] = judge
    if method.rewarded:
        # A judge can take the place of the reward.
        if reward is None and options.get("judge") is None:
            raise ValueError(
                f"--method={name} needs a reward, got none. Name one with --reward, or use --method=sds."
            )
        options["reward"] = reward
    return method.guidance(prior, settings, views=views, streams=streams, **options)


def owners() -> dict[str, list[str]]:
    """Return the methods that have each setting: setting -> names of methods."""
    methods: dict[str, list[str]] = {}
    # From the defaults of each method, so that a new method needs no list of its settings.
    for name, method in METHODS.items():
        for setting in flat(method.settings()):
            methods.setdefault(setting, []).append(name)
    return methods


def arm_settings(settings: DistillSettings, arm: str) -> tuple[Any, int, int]:
    """Return an arm's settings of its method, the number of starts of each asset, and the number of noises of
    an image in a step.
    """
    method = Arm.parse(arm).method
    # Only best of n has several starts.
    chosen = settings_of(method, settings.guidance, settings.preset)
    return chosen, getattr(chosen, "starts", 1), METHODS[method].noises(chosen)
