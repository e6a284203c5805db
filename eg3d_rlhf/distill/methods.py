"""The methods by name: settings and guidance of each, with the flags that belong to it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from eg3d_rlhf.distill.config import ramp_of
from eg3d_rlhf.distill.guidance.dreamdpo import DreamDpo, DreamDpoSettings
from eg3d_rlhf.distill.guidance.dreamreward import DreamReward, DreamRewardSettings
from eg3d_rlhf.distill.guidance.psd import Psd, PsdSettings
from eg3d_rlhf.distill.guidance.rewardsds import RewardSds, RewardSdsSettings
from eg3d_rlhf.distill.guidance.sds import Sds, SdsSettings
from eg3d_rlhf.distill.interfaces import DiffusionPrior, Guidance, PairwiseJudge, RewardModel
from eg3d_rlhf.distill.presets import PRESETS
from eg3d_rlhf.distill.schedule import Ramp
from eg3d_rlhf.distill.streams import Streams
from training.config import built

RAMPS = ("weight",)  # settings that may change with the step: text in flags and JSON


@dataclass(frozen=True)
class Method:
    """One method."""

    settings: type
    guidance: Callable[..., Guidance]
    rewarded: bool = True
    judged: bool = False  # a judge of pairs may rank in the reward's place


TABLE: dict[str, Method] = {
    "sds": Method(SdsSettings, Sds, rewarded=False), "dreamdpo": Method(DreamDpoSettings, DreamDpo, judged=True),
    "rewardsds": Method(RewardSdsSettings, RewardSds), "dreamreward": Method(DreamRewardSettings, DreamReward),
    "psd": Method(PsdSettings, Psd, judged=True),
}


def settings_of(name: str, values: Mapping[str, Any], preset: str | None = None) -> Any:
    """A method's settings: the preset's, where it is one of this method, else its own, with `values` by name over them."""
    kind = TABLE[name].settings
    base = PRESETS[preset] if preset is not None and isinstance(PRESETS[preset], kind) else kind()
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
