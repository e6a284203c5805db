"""The methods by name: settings and guidance of each, with the flags that belong to it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from eg3d_rlhf.core.interfaces import DiffusionPrior, Guidance, PairwiseJudge, RewardModel
from eg3d_rlhf.tuning.distill.config import Arm, DistillSettings, ramp_of
from eg3d_rlhf.tuning.distill.guidance.best_of_n import BestOfN, BestOfNSettings
from eg3d_rlhf.tuning.distill.guidance.dreamdpo import DreamDpo, DreamDpoSettings
from eg3d_rlhf.tuning.distill.guidance.dreamreward import DreamReward, DreamRewardSettings
from eg3d_rlhf.tuning.distill.guidance.psd import Psd, PsdSettings
from eg3d_rlhf.tuning.distill.guidance.rewardsds import RewardSds, RewardSdsSettings
from eg3d_rlhf.tuning.distill.guidance.sds import Sds, SdsSettings
from eg3d_rlhf.tuning.distill.presets import PRESETS
from eg3d_rlhf.tuning.distill.schedule import Ramp
from eg3d_rlhf.tuning.distill.streams import Streams
from training.config import built

RAMPS = ("weight",)  # settings that may change with the step: text in flags and JSON


@dataclass(frozen=True)
class Method:
    """One method."""

    settings: type
    guidance: Callable[..., Guidance]
    noises: Callable[[Any], int]  # per step and picture, of its settings
    rewarded: bool = True
    judged: bool = False  # a judge of pairs may rank in the reward's place


TABLE: dict[str, Method] = {
    "sds": Method(SdsSettings, Sds, lambda own: own.samples, rewarded=False),
    "dreamdpo": Method(DreamDpoSettings, DreamDpo, lambda own: 2, judged=True),
    "rewardsds": Method(RewardSdsSettings, RewardSds, lambda own: own.noises),
    "dreamreward": Method(DreamRewardSettings, DreamReward, lambda own: 1),
    "psd": Method(PsdSettings, Psd, lambda own: 2, judged=True),
    "best-of-n": Method(BestOfNSettings, BestOfN, lambda own: own.samples),
}


def settings_of(name: str, values: Mapping[str, Any], preset: str | None = None) -> Any:
    """A method's settings: the preset's, where it is one of this method, else its own, with `values` by name over them."""
    kind = TABLE[name].settings
    base = PRESETS[preset] if preset is not None and issubclass(kind, type(PRESETS[preset])) else kind()  # best-of-n has those of sds
    given = {name: ramp_of(value) if name in RAMPS else value for name, value in values.items()}
    return built(kind, {**flat(base), **given})


def flat(settings: Any) -> dict[str, Any]:
    """All fields of settings by name, those of nested ones among them."""
    found: dict[str, Any] = {}
    for one in fields(settings):
        value = getattr(settings, one.name)
        found |= flat(value) if is_dataclass(value) and not isinstance(value, Ramp) else {one.name: value}
    return found


def guidance_of(
    name: str, settings: Any, prior: DiffusionPrior, reward: RewardModel | None, judge: PairwiseJudge | None, views: int, streams: Streams
) -> Guidance:
    """The guidance of a method.

    Raises: ValueError for a method without the reward that it needs.
    """
    method, more = TABLE[name], dict[str, Any]()
    if method.judged:
        more["judge"] = judge
    if method.rewarded:
        if reward is None and more.get("judge") is None:
            raise ValueError(f"--reward: expected a reward for --method={name}, got none. Name one, or use --method=sds.")
        more["reward"] = reward
    return method.guidance(prior, settings, views=views, streams=streams, **more)


def owners() -> dict[str, list[str]]:
    """Methods that a setting belongs to, by its name."""
    found: dict[str, list[str]] = {}
    for name, method in TABLE.items():
        for one in flat(method.settings()):
            found.setdefault(one, []).append(name)
    return found


def of_arm(settings: DistillSettings, arm: str) -> tuple[Any, int, int]:
    """An arm's settings of its method, how many starts each asset has, and how many noises a picture gets in a step."""
    method = Arm.parse(arm).method
    own = settings_of(method, settings.guidance, settings.preset)
    return own, own.starts if isinstance(own, BestOfNSettings) else 1, TABLE[method].noises(own)
