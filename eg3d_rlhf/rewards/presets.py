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
    """Sizes of a network, as a reward's file states them. Subclasses are frozen dataclasses."""

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Create an architecture from JSON values.

        Raises: ValueError for fields that are unknown, missing or out of range.
        """
        try:
            return cls(**{name: _tuples(value) for name, value in values.items()})
        except TypeError as error:
            raise ValueError(
                f"{cls.__name__}: fields do not match: {error}. Check the reward's file; a later version"
                " may have written it."
            ) from error


def _tuples(value: Any) -> Any:
    """Convert nested lists to tuples, which JSON does not have."""
    return tuple(_tuples(part) for part in value) if isinstance(value, (list, tuple)) else value


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Architecture with the settings that suit it."""

    network: Mapping[str, Any]  # description, see `RewardNetwork.describe`
    train: Mapping[str, Any] = field(default_factory=dict)  # fields of TrainOptions
    # Settings of the observation, see `Observation.of`
    observe: Mapping[str, Any] = field(default_factory=dict)


# The module of an observation registers its networks' presets. Those of the slab are in a module that does
# not import torch. The first preset of a kind is its default.
PRESETS: Registry[Mapping[str, Preset]] = Registry(
    "network of an observation", {"sigma": "eg3d_rlhf.rewards.slab_presets"}
)


def presets_of(kind: str) -> Mapping[str, Preset]:
    """Return the presets of the networks that read a kind of observation; empty if these need no training.

    Raises: ValueError for an unknown kind, and for a kind that no network reads.
    """
    if kind not in PRESETS:
        from eg3d_rlhf.rewards.observations import OBSERVATIONS

        # The look-up imports the kind's module, which registers its presets, and raises for an unknown kind.
        OBSERVATIONS[kind]
    return PRESETS[kind]


def preset(name: str | None = None, kind: str = "sigma") -> Preset:
    """Return a preset of the networks that read `kind`; None takes the default one.

    Raises: ValueError for an unknown name, with the list of known names.
    """
    presets = presets_of(kind)
    if not presets:
        raise ValueError(
            f"reward preset: networks that read {kind} need no training, so they have no presets. Use this"
            " reward without training."
        )
    # The first preset of a kind is its default.
    name = next(iter(presets)) if name is None else name
    check_choice("reward preset", name, presets)
    return presets[name]
