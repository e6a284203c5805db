"""What rewards read of a field, the registry of its kinds, and ours: the σ slab of arXiv 2606.27305. Plugins
bring others, see docs/extending.md.

A reward's file stores its observation and owns it: nobody else decides what the reward is shown. Which
networks read a kind is said in `eg3d_rlhf.rewards.networks`.

Letters: N shapes; [N, ...] is what is observed of them; D, H, W = grid points along z, y, x.
"""

import abc
import dataclasses
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

import numpy as np
import torch

from eg3d_rlhf.core.field import Field
from eg3d_rlhf.core.registry import Registry
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.geometry.slab import normalise_slab

if TYPE_CHECKING:
    from eg3d_rlhf.generators import Generator


class Observation(abc.ABC):
    """One way to look at fields, the same for every shape. A frozen dataclass whose fields are JSON values,
    unless it says otherwise.
    """

    kind: ClassVar[str]  # as files and flags name it
    differentiable: ClassVar[bool] = True  # in the field; what is not only chooses
    # that draw it for training: "torch" repeats to the byte on any machine, "auto" is faster
    ops: ClassVar[str] = "torch"

    @abc.abstractmethod
    def observe(self, field: Field) -> torch.Tensor:
        """What is seen of every shape, [N, ...]. Differentiable in the field."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of one shape's observation."""

    @classmethod
    @abc.abstractmethod
    def of(cls, generator: "Generator", **settings: Any) -> Self:
        """The observation as a new reward reads it of this generator; its keywords are what `--resolution`
        and `--crop` may set.
        """

    def augment(self, observed: torch.Tensor, draws: np.ndarray) -> torch.Tensor:
        """What training does to its inputs [N, ...] at random, from one number of [0, 1) each, [N]. Nothing,
        where there is nothing.
        """
        del draws
        return observed

    def misfits(self, generator: "Generator") -> list[str]:
        """What this generator lacks of what is observed, as 'box_warp 1.0, got 2.0'; none where it fits."""
        del generator
        return []

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, `kind` among them."""
        values: dict[str, Any] = {"kind": self.kind}
        values |= dataclasses.asdict(self)  # type: ignore[call-overload]
        if "spec" in values:
            values["spec"] = self.spec.to_dict()  # type: ignore[attr-defined]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`, without `kind`. Raises: ValueError for fields that are missing or unknown."""
        made = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        if "spec" in cls.__dataclass_fields__:  # type: ignore[attr-defined]
            made["spec"] = SlabSpec.from_dict(values.get("spec", {}))
        try:
            return cls(**made)
        except TypeError as error:
            raise ValueError(
                f"observation {cls.kind}: expected its own fields, got: {error}. Is the file from a later"
                " version?"
            ) from error


OBSERVATIONS: Registry[type[Observation]] = Registry(
    "observation",
    {
        "sigma": "eg3d_rlhf.rewards.observations",
        "depth": "eg3d_rlhf.rewards.depth",
        "points": "eg3d_rlhf.rewards.points",
        "lifted-points": "eg3d_rlhf.rewards.points",
        "published-points": "eg3d_rlhf.rewards.points",
        "smoothness": "eg3d_rlhf.rewards.smoothness",
        "solid": "eg3d_rlhf.rewards.solid",
        "mesh-validity": "eg3d_rlhf.rewards.solid",
    },
)
Kind = TypeVar("Kind", bound=type[Observation])


def register(cls: Kind) -> Kind:
    """Class decorator: make a kind of observation known by its name."""
    OBSERVATIONS.add(cls.kind, cls)
    return cls


def from_dict(values: Mapping[str, Any]) -> Observation:
    """The observation that `to_dict` described. Raises: ValueError for an unknown kind or other fields."""
    return OBSERVATIONS[values.get("kind")].from_dict(
        {name: value for name, value in values.items() if name != "kind"}
    )


def observation_of(kind: str, generator: "Generator", **settings: Any) -> Observation:
    """A new observation of a generator; settings that are None are left to the kind.

    Raises: ValueError for those it does not have.

    >>> from eg3d_rlhf import load_generator
    >>> observation_of("sigma", load_generator().generator, resolution=32).shape
    (1, 17, 18, 16)
    """
    cls = OBSERVATIONS[kind]
    given = {name: value for name, value in settings.items() if value is not None}
    unknown = sorted(set(given) - set(inspect.signature(cls.of).parameters))
    if unknown:
        flags = ", ".join(f"--{name}" for name in unknown)
        raise ValueError(
            f"{flags}: expected nothing for observation {kind}, got {given[unknown[0]]!r}. Leave it out."
        )
    return cls.of(generator, **given)


@register
@dataclasses.dataclass(frozen=True)
class SigmaSlab(Observation):
    """Slabs [N, 1, D, H, W] in [0, value_max] at the points of `spec`: raw density on a box of grid points,
    each shape on its own scale.
    """

    spec: SlabSpec = SlabSpec()
    kind: ClassVar[str] = "sigma"

    # its keywords are its own
    @classmethod
    def of(  # type: ignore[override]
        cls,
        generator: "Generator",
        *,
        resolution: int = 64,
        crop: tuple[float, float, float, float, float, float] | None = None,
    ) -> Self:
        """Args: resolution: grid points per axis of the whole cube; crop: shares trimmed from each face
            (x, x, y, y, z, z), the paper's.

        64 points and the paper's crop leave a slab of 33 x 36 x 32.
        """
        return cls(
            SlabSpec.of(generator.bounds, resolution, crop=SlabSpec.crop if crop is None else tuple(crop))
        )

    @property
    def shape(self) -> tuple[int, ...]:
        return (1, *self.spec.shape)

    def observe(self, field: Field) -> torch.Tensor:
        """See `Observation`. A constant slab gives zeros with zero gradient."""
        return normalise_slab(field.density_grid(self.spec), self.spec.value_max).unsqueeze(1)

    def augment(self, observed: torch.Tensor, draws: np.ndarray) -> torch.Tensor:
        mirrored = torch.from_numpy(draws < 0.5).to(observed.device)
        return torch.where(mirrored[:, None, None, None, None], observed.flip(-1), observed)

    def misfits(self, generator: "Generator") -> list[str]:
        """The scene cube must be the generator's."""
        bounds = generator.bounds
        pairs = (("box_warp", self.spec.box_warp, bounds.side), ("centre", self.spec.centre, bounds.centre))
        return [f"{name} {mine}, got {theirs}" for name, mine, theirs in pairs if mine != theirs]

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, **self.spec.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        return cls(SlabSpec.from_dict(values))
