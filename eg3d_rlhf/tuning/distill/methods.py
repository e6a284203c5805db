"""Registers the distillation methods with their settings and guidance, and defines their presets."""

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
from training.config import settings_from_values

if TYPE_CHECKING:
    from eg3d_rlhf.core.interfaces import DiffusionPrior, Guidance, PairwiseJudge, RewardModel
    from eg3d_rlhf.tuning.distill.schedule import Streams


def import_guidance(module_name: str, class_name: str, *args: Any, **kwargs: Any) -> "Guidance":
    """Import a guidance class from the folder guidance/, and make an instance of it.

    Args:
        module_name: name of the module in the folder guidance/.
        class_name: name of the class in that module.
        args: positional arguments of the class.
        kwargs: keyword arguments of the class.
    """
    # The module is imported here and not above, because it imports PyTorch, which would slow down `--help`.
    guidance_module = importlib.import_module(f"eg3d_rlhf.tuning.distill.guidance.{module_name}")
    guidance: Guidance = getattr(guidance_module, class_name)(*args, **kwargs)
    return guidance


def _add(
    method_name: str,
    settings_class: type,
    module_name: str,
    guidance_class_name: str,
    noises: Callable[[Any], int],
    **method_flags: bool,
) -> None:
    """Register a method whose guidance is the class `guidance_class_name` of `module_name`.

    Args:
        method_name: value of --method.
        settings_class: dataclass of the method's settings.
        module_name: name of the module in the folder guidance/.
        guidance_class_name: name of the class in that module.
        noises: function from the settings to the number of noises of an image in a step.
        method_flags: fields `accepts_reward` and `accepts_judge` of `Method`, if they differ from the
            defaults.
    """
    make_method_guidance = partial(import_guidance, module_name, guidance_class_name)
    METHODS.add(
        method_name,
        Method(settings=settings_class, guidance=make_method_guidance, noises=noises, **method_flags),
    )


_add("sds", SdsSettings, "sds", "Sds", lambda s: s.samples, accepts_reward=False)
_add("dreamdpo", DreamDpoSettings, "dreamdpo", "DreamDpo", lambda s: 2, accepts_judge=True)
_add("rewardsds", RewardSdsSettings, "rewardsds", "RewardSds", lambda s: s.noises)
_add("dreamreward", DreamRewardSettings, "dreamreward", "DreamReward", lambda s: 1)
_add("psd", PsdSettings, "psd", "Psd", lambda s: 2, accepts_judge=True)
_add("best-of-n", BestOfNSettings, "sds", "BestOfN", lambda s: s.samples)

# Presets: value of --preset -> settings. The preset with the name of a method has our defaults. Presets
# "-released" have the settings of the method's released code.

MVDREAM = DenoiserSettings(guidance_scale=50.0, form="recon", rescale=0.5)
PRESETS = {
    "sds": SdsSettings(),
    # DreamFusion's settings in threestudio, whose formula for guidance adds 1 to its scale. Its scale 100 is
    # 101 here (see gradients.guided).
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


def make_settings(method_name: str, changed_values: Mapping[str, Any], preset: str | None = None) -> Any:
    """Build the settings of a method from its preset or its defaults, and from changed values.

    Args:
        method_name: name of the method.
        changed_values: name of a setting -> value that differs from the preset. Ramps are texts.
        preset: name of a preset. It is ignored if it belongs to another method, as in a comparison of
            methods.
    Returns: instance of the method's dataclass of settings.
    """
    settings_class = METHODS[method_name].settings
    # issubclass: best-of-n has the settings of sds and additional ones, so a preset of sds is valid for it.
    if preset is not None and issubclass(settings_class, type(PRESETS[preset])):
        base_settings = PRESETS[preset]
    else:
        base_settings = settings_class()
    parsed_values = {
        setting: parse_ramp(value) if setting in RAMPS else value for setting, value in changed_values.items()
    }
    # `settings_from_values` distributes the flat values to the nested dataclasses.
    return settings_from_values(settings_class, {**flatten_settings(base_settings), **parsed_values})


def flatten_settings(settings: Any) -> dict[str, Any]:
    """Return all settings of a dataclass as a flat dictionary from name to value.

    Settings of nested dataclasses are included under their own names, which are unique within a method. A
    `Ramp` is a value, although it is a dataclass.
    """
    value_by_name: dict[str, Any] = {}
    for field in fields(settings):
        value = getattr(settings, field.name)
        if is_dataclass(value) and not isinstance(value, Ramp):
            value_by_name |= flatten_settings(value)
        else:
            value_by_name[field.name] = value
    return value_by_name


def make_guidance(
    method_name: str,
    settings: Any,
    prior: "DiffusionPrior",
    reward: "RewardModel | None",
    judge: "PairwiseJudge | None",
    view_count: int,
    streams: "Streams",
) -> "Guidance":
    """Make the guidance of a method, which computes the gradient of a step.

    Args:
        method_name: name of the method.
        settings: settings of the method.
        prior: diffusion model.
        reward: reward of images, or None. It is not used by a method without a reward.
        judge: judge that ranks pairs in place of the reward, or None. It is not used by a method without a
            judge.
        view_count: number of views of an asset in a step.
        streams: random streams of the run.
    Raises: ValueError if the method needs a reward and there is neither a reward nor a judge.
    """
    method = METHODS[method_name]
    # Only the arguments that the method accepts.
    optional_arguments = dict[str, Any]()
    if method.accepts_judge:
        optional_arguments["judge"] = judge
    if method.accepts_reward:
        # A judge can take the place of the reward.
        if reward is None and optional_arguments.get("judge") is None:
            raise ValueError(
                f"--method={method_name} needs a reward, but --reward is missing. Name a reward with"
                " --reward, or use --method=sds."
            )
        optional_arguments["reward"] = reward
    return method.guidance(prior, settings, views=view_count, streams=streams, **optional_arguments)


def methods_by_setting() -> dict[str, list[str]]:
    """Return a dictionary from each setting's name to the names of the methods that have this setting."""
    methods_of_setting: dict[str, list[str]] = {}
    for method_name, method in METHODS.items():
        for setting in flatten_settings(method.settings()):
            methods_of_setting.setdefault(setting, []).append(method_name)
    return methods_of_setting


def arm_settings(settings: DistillSettings, arm: str) -> tuple[Any, int, int]:
    """Return the settings of an arm's method, and two numbers that determine the work of the arm.

    Args:
        settings: settings of the run.
        arm: name of the arm.
    Returns: three results. The first is the settings of the method. The second is the number of starts of
    each asset, and the third is the number of noises of an image in a step.
    """
    method = Arm.parse(arm).method
    method_settings = make_settings(method, settings.guidance, settings.preset)
    # Only best-of-n has the setting `starts`; all other methods optimise each asset once.
    start_count = getattr(method_settings, "starts", 1)
    return method_settings, start_count, METHODS[method].noises(method_settings)
