"""Presets of reward networks by name: an architecture, and the training settings that suit it.

This module does not import torch, because `--help` lists the presets.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from eg3d_rlhf.core.registry import Registry
from training.config import check_choice


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Sizes of a network, which a reward's file states. Subclasses are frozen dataclasses."""

    def to_dict(self) -> dict[str, Any]:
        """Return the sizes as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Create an architecture from the JSON values that `to_dict` returned.

        Raises: ValueError for fields that are unknown, missing or out of range.
        """
        try:
            return cls(**{name: _tuples(json_value) for name, json_value in values.items()})
        except TypeError as error:
            raise ValueError(
                f"{cls.__name__}: the reward's file has unknown or missing fields: {error}. If a later"
                " version of the package wrote the file, use that version to open it."
            ) from error


def _tuples(json_value: Any) -> Any:
    """Convert nested lists to tuples, which JSON does not have. Return any other value unchanged."""
    return (
        tuple(_tuples(json_item) for json_item in json_value)
        if isinstance(json_value, (list, tuple))
        else json_value
    )


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Description of an untrained network, with settings of training and observation that suit it."""

    network: Mapping[str, Any]  # description, see `RewardNetwork.describe`
    train: Mapping[str, Any] = field(default_factory=dict)  # fields of TrainOptions
    # Settings of the observation, see `Observation.from_generator`
    observe: Mapping[str, Any] = field(default_factory=dict)


# Presets by kind of observation and name. The module of an observation registers the presets of its networks.
# The presets of sigma slabs are in a separate module, which does not import torch. The first preset of a kind
# is its default.
PRESETS: Registry[Mapping[str, Preset]] = Registry(
    "network of an observation", {"sigma": "eg3d_rlhf.rewards.slab_presets"}
)


def presets_of(kind: str) -> Mapping[str, Preset]:
    """Return the presets, by name, of the networks that read a kind of observation.

    The result is empty if these networks need no training.

    Raises: ValueError for an unknown kind, and for a kind that no network reads.
    """
    if kind not in PRESETS:
        from eg3d_rlhf.rewards.observations import OBSERVATIONS

        # The look-up is needed for its effects: it imports the module of the kind, which registers its
        # presets, and raises ValueError for an unknown kind.
        OBSERVATIONS[kind]
    return PRESETS[kind]


def preset(name: str | None = None, kind: str = "sigma") -> Preset:
    """Return a preset of the networks that read a kind of observation.

    Args:
        name: name of the preset; None for the default preset of the kind.
        kind: kind of the observation.
    Raises: ValueError for an unknown name, and for a kind whose networks need no training.
    """
    presets_by_name = presets_of(kind)
    if not presets_by_name:
        raise ValueError(
            f"reward preset: the reward {kind} needs no training and has no presets. Do not train it: pass"
            f" its name where the file of a trained reward is expected, for example --reward={kind}."
        )
    # The first preset of a kind is its default.
    name = next(iter(presets_by_name)) if name is None else name
    check_choice("reward preset", name, presets_by_name)
    return presets_by_name[name]
