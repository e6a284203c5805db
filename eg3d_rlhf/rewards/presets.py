"""Presets of reward networks by name: an architecture and the settings that suit it. Imports no torch:
`--help` shows them.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from eg3d_rlhf.core.registry import Registry
from training.config import check_choice


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Sizes of a network and what it computes, as a reward's file states them."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Raises: ValueError for fields that are unknown, missing or out of range."""
        try:
            return cls(**{name: _tuples(value) for name, value in values.items()})
        except TypeError as error:
            raise ValueError(
                f"{cls.__name__}: expected its own fields, got: {error}. Is the file from a later version?"
            ) from error


def _tuples(value: Any) -> Any:
    return tuple(_tuples(part) for part in value) if isinstance(value, (list, tuple)) else value


@dataclass(frozen=True, kw_only=True)
class Preset:
    """An architecture by name, with the settings that suit it."""

    network: Mapping[str, Any]  # as `RewardNetwork.describe` gives it
    train: Mapping[str, Any] = field(default_factory=dict)  # fields of TrainOptions
    # settings of the observation, see `Observation.of`
    observe: Mapping[str, Any] = field(default_factory=dict)


# An observation's file registers the presets of its networks with them; those of the slab stand in a file of
# their own, which imports no torch. The first preset of a kind is its default.
PRESETS: Registry[Mapping[str, Preset]] = Registry(
    "network of an observation", {"sigma": "eg3d_rlhf.rewards.slab_presets"}
)


def presets_of(kind: str) -> Mapping[str, Preset]:
    """Return the presets of the networks that read a kind; none where they have nothing to learn.

    Raises: ValueError for an unknown kind, and one that no network reads.
    """
    if kind not in PRESETS:
        from eg3d_rlhf.rewards.observations import OBSERVATIONS

        OBSERVATIONS[kind]  # imports its file, which registers them; an error names those that are known
    return PRESETS[kind]


def preset(name: str | None = None, kind: str = "sigma") -> Preset:
    """A preset of the networks that read `kind`, the default one for None.

    Raises: ValueError with the list of names.
    """
    presets = presets_of(kind)
    if not presets:
        raise ValueError(
            f"reward preset: expected an observation whose networks learn, got {kind}. Use its score as"
            " it is."
        )
    name = next(iter(presets)) if name is None else name
    check_choice("reward preset", name, presets)
    return presets[name]
