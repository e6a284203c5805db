"""Observations of a field that rewards read, the registry of their kinds, and our σ slab (arXiv 2606.27305).

The σ slab is the cropped density grid of the paper. Plugins add other kinds, see docs/extending.md. The file
of a reward stores its observation, and nothing else decides what the reward reads.
`eg3d_rlhf.rewards.networks` lists the networks that read a kind.

Letters: N shapes; [N, ...] is the shape of their observation; D, H, W = grid points along z, y, x.
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
    """Function from fields to tensors that is the same for every shape.

    Subclasses are frozen dataclasses whose fields are JSON values, unless they override `to_dict`.
    """

    kind: ClassVar[str]  # name in files and flags
    # in the field; if false, a reward can rank shapes but not tune them
    differentiable: ClassVar[bool] = True
    # Implementation of operators for training data: "torch" gives identical bytes on any machine, "auto" is
    # faster
    ops: ClassVar[str] = "torch"

    @abc.abstractmethod
    def observe(self, field: Field) -> torch.Tensor:
        """Compute the observation of every shape, [N, ...]. Differentiable in the field."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample's observation, without N."""

    @classmethod
    @abc.abstractmethod
    def of(cls, generator: "Generator", **settings: Any) -> Self:
        """Create the observation that a new reward of this generator reads.

        The keyword arguments are the settings that flags such as `--resolution` and `--crop` can change.
        """

    def augment(self, observations: torch.Tensor, draws: np.ndarray) -> torch.Tensor:
        """Augment training inputs [N, ...] at random.

        Args: draws: one random number in [0, 1) per sample, [N]. By default inputs are not changed.
        """
        del draws
        return observations

    def misfits(self, generator: "Generator") -> list[str]:
        """List what the observation needs and this generator lacks, such as 'box_warp 1.0, got 2.0'."""
        del generator
        return []

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, including `kind`."""
        values: dict[str, Any] = {"kind": self.kind}
        # Subclasses are dataclasses; the base class is not, which mypy cannot express.
        values |= dataclasses.asdict(self)  # type: ignore[call-overload]
        if "spec" in values:
            # SlabSpec omits later fields at their defaults, so that earlier hashes stay the same.
            values["spec"] = self.spec.to_dict()  # type: ignore[attr-defined]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Create an observation from the values of `to_dict` without `kind`.

        Raises: ValueError for other fields.
        """
        # JSON has lists where the dataclass has tuples.
        arguments = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        if "spec" in cls.__dataclass_fields__:  # type: ignore[attr-defined]
            # A missing spec is read as an empty one, whose missing fields SlabSpec reports.
            arguments["spec"] = SlabSpec.from_dict(values.get("spec", {}))
        try:
            return cls(**arguments)
        except TypeError as error:
            raise ValueError(
                f"observation {cls.kind}: fields do not match: {error}. Check the reward's file; a later"
                " version may have written it."
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
Kind = TypeVar("Kind", bound=type[Observation])  # the decorator returns the class that it gets


def register(cls: Kind) -> Kind:
    """Register a kind of observation by its name, as a class decorator."""
    OBSERVATIONS.add(cls.kind, cls)
    return cls


def from_dict(values: Mapping[str, Any]) -> Observation:
    """Create an observation from the values of `to_dict`.

    Raises: ValueError for an unknown kind or other fields.
    """
    # The registry imports the module of the kind, and raises for an unknown one.
    return OBSERVATIONS[values.get("kind")].from_dict(
        {name: value for name, value in values.items() if name != "kind"}
    )


def observation_of(kind: str, generator: "Generator", **settings: Any) -> Observation:
    """Create a new observation of a generator. Settings that are None keep the default of the kind.

    Raises: ValueError for settings that the kind does not have.

    >>> from eg3d_rlhf import load_generator
    >>> observation_of("sigma", load_generator().generator, resolution=32).shape
    (1, 17, 18, 16)
    """
    cls = OBSERVATIONS[kind]
    # None means that the user did not set the flag.
    given = {name: value for name, value in settings.items() if value is not None}
    # The signature of `of` is the list of flags that apply to the kind.
    unknown = sorted(set(given) - set(inspect.signature(cls.of).parameters))
    if unknown:
        flags = ", ".join(f"--{name}" for name in unknown)
        raise ValueError(
            f"{flags}: does not apply to the observation {kind}, got {given[unknown[0]]!r}. Remove {flags}."
        )
    return cls.of(generator, **given)


@register
@dataclasses.dataclass(frozen=True)
class SigmaSlab(Observation):
    """Slabs [N, 1, D, H, W] in [0, value_max]: raw density on a grid, normalised per shape."""

    spec: SlabSpec = SlabSpec()
    kind: ClassVar[str] = "sigma"

    # The keyword arguments differ from those of the base class.
    @classmethod
    def of(  # type: ignore[override]
        cls,
        generator: "Generator",
        *,
        resolution: int = 64,
        crop: tuple[float, float, float, float, float, float] | None = None,
    ) -> Self:
        """Create the slab of a generator's cube.

        Args: resolution: grid points per axis of the complete cube; crop: shares that are trimmed from each
            face (x, x, y, y, z, z); None takes the paper's.
        64 points and the paper's crop give a slab of 33 x 36 x 32.
        """
        return cls(
            SlabSpec.of(generator.bounds, resolution, crop=SlabSpec.crop if crop is None else tuple(crop))
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample's slab, [1, D, H, W]."""
        return (1, *self.spec.shape)

    def observe(self, field: Field) -> torch.Tensor:
        """Compute the slabs, see `Observation`. A constant slab gives zeros with zero gradient."""
        # [N, D, H, W] -> [N, 1, D, H, W]
        return normalise_slab(field.density_grid(self.spec), self.spec.value_max).unsqueeze(1)

    def augment(self, observations: torch.Tensor, draws: np.ndarray) -> torch.Tensor:
        """Mirror slabs along x with probability one half."""
        # The last axis is x, which separates left and right.
        mirrored = torch.from_numpy(draws < 0.5).to(observations.device)
        return torch.where(mirrored[:, None, None, None, None], observations.flip(-1), observations)

    def misfits(self, generator: "Generator") -> list[str]:
        """List differences between this slab's cube and the generator's."""
        bounds = generator.bounds
        pairs = (("box_warp", self.spec.box_warp, bounds.side), ("centre", self.spec.centre, bounds.centre))
        return [f"{name} {value}, got {expected}" for name, value, expected in pairs if value != expected]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values. The fields of `spec` are at the top level, as in the first reward files."""
        return {"kind": self.kind, **self.spec.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Create a slab from the values of `to_dict` without `kind`."""
        return cls(SlabSpec.from_dict(values))
