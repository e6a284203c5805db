"""Observations that rewards read from shapes, the registry of their kinds, and the σ slab.

The σ slab is the cropped density grid of arXiv 2606.27305. Plugins add other kinds of observations, see
docs/extending.md. The file of a reward states its observation completely. `eg3d_rlhf.rewards.networks` is the
registry of the networks that read each kind.

Shapes: N shapes; [N, ...] is a batch of observations, whose other axes depend on the kind. D, H and W are the
numbers of grid points along z, y and x.
"""

import abc
import dataclasses
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

import numpy as np
import torch

from eg3d_rlhf.core.field import Field
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.geometry.slab import normalise_slab
from eg3d_rlhf.rewards.observation_kinds import OBSERVATIONS as OBSERVATIONS
from eg3d_rlhf.rewards.slab_crops import Crop, choose_crop

if TYPE_CHECKING:
    from eg3d_rlhf.generators import Generator


class Observation(abc.ABC):
    """Base class of observations, which compute the input of a reward network from a field of N shapes.

    Subclasses are frozen dataclasses whose fields are JSON values, unless they override `to_dict`.
    """

    kind: ClassVar[str]  # name in files and flags
    # True if `observe` is differentiable in the field. Otherwise a reward can rank shapes, but a generator
    # cannot be tuned with it.
    differentiable: ClassVar[bool] = True
    # Implementation of the operators that compute training data: "torch" gives identical bytes on any
    # machine, and "auto" is faster
    ops: ClassVar[str] = "torch"

    @abc.abstractmethod
    def observe(self, field: Field) -> torch.Tensor:
        """Compute the observations [N, ...] of the N shapes of a field.

        Differentiable in the field if `differentiable` is True.
        """

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample's observation, without N."""

    @classmethod
    @abc.abstractmethod
    def from_generator(cls, generator: "Generator", **settings: Any) -> Self:
        """Create the observation for a new reward of this generator.

        Args:
            generator: generator whose shapes are observed.
            settings: settings of the kind, which flags such as `--resolution` and `--crop` can change.
        """

    def augment(self, observations: torch.Tensor, draws: np.ndarray) -> torch.Tensor:
        """Augment training inputs at random. This base class returns the inputs unchanged.

        Args:
            observations: training inputs [N, ...].
            draws: random numbers [N] in [0, 1), one per sample.
        Returns: the augmented inputs [N, ...].
        """
        del draws
        return observations

    def misfits(self, generator: "Generator") -> list[str]:
        """List the properties in which this observation and a generator differ.

        This base class compares nothing and returns an empty list.

        Returns: texts with the value of the observation and the value of the generator, for example
            "box_warp 1.0, got 2.0".
        """
        del generator
        return []

    def to_dict(self) -> dict[str, Any]:
        """Return the observation as JSON values, including `kind`."""
        json_values: dict[str, Any] = {"kind": self.kind}
        # All subclasses are dataclasses, but the base class is not, which mypy cannot express.
        json_values |= dataclasses.asdict(self)  # type: ignore[call-overload]
        if "spec" in json_values:
            # SlabSpec leaves out fields of later versions that have their default, so that hashes of earlier
            # files do not change.
            json_values["spec"] = self.spec.to_dict()  # type: ignore[attr-defined]
        return json_values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Create an observation of this class from JSON values.

        Args: values: result of `to_dict` without the entry `kind`.
        Raises: ValueError for unknown or missing fields.
        """
        # JSON has lists where the dataclass has tuples.
        field_values = {
            name: tuple(json_value) if isinstance(json_value, list) else json_value
            for name, json_value in values.items()
        }
        if "spec" in cls.__dataclass_fields__:  # type: ignore[attr-defined]
            # A missing spec is read as an empty one, whose missing fields SlabSpec reports.
            field_values["spec"] = SlabSpec.from_dict(values.get("spec", {}))
        try:
            return cls(**field_values)
        except TypeError as error:
            raise ValueError(
                f"observation {cls.kind}: the reward's file has unknown or missing fields: {error}. If a"
                " later version of the package wrote the file, use that version to open it."
            ) from error


Kind = TypeVar("Kind", bound=type[Observation])  # type of the class that the decorator `register` returns


def register(cls: Kind) -> Kind:
    """Register a class of observations under its `kind`. This is a class decorator."""
    OBSERVATIONS.add(cls.kind, cls)
    return cls


def from_dict(values: Mapping[str, Any]) -> Observation:
    """Create an observation from the JSON values that its `to_dict` returned.

    Raises: ValueError for an unknown kind, or for unknown or missing fields.
    """
    # The registry imports the module of the kind, and raises ValueError for an unknown kind.
    return OBSERVATIONS[values.get("kind")].from_dict(
        {name: value for name, value in values.items() if name != "kind"}
    )


def observation_of(kind: str, generator: "Generator", **settings: Any) -> Observation:
    """Create the observation of a kind for a new reward of a generator.

    Args:
        kind: kind of the observation.
        generator: generator whose shapes are observed.
        settings: settings of the kind; for a setting that is None, the kind's default is used.
    Raises: ValueError for an unknown kind, and for settings that the kind does not have.

    >>> from eg3d_rlhf import load_generator
    >>> observation_of("sigma", load_generator().generator, resolution=32).shape
    (1, 20, 23, 18)
    """
    observation_class = OBSERVATIONS[kind]
    # None means that the user did not set the flag.
    changed_settings = {name: value for name, value in settings.items() if value is not None}
    # The parameters of `from_generator` are the settings that apply to the kind.
    unknown_names = sorted(
        set(changed_settings) - set(inspect.signature(observation_class.from_generator).parameters)
    )
    if unknown_names:
        unknown_settings = ", ".join(f"--{name}={changed_settings[name]}" for name in unknown_names)
        unknown_flags = " and ".join(f"--{name}" for name in unknown_names)
        raise ValueError(
            f"The observation {kind} does not have the setting {unknown_settings}. Remove {unknown_flags}."
        )
    return observation_class.from_generator(generator, **changed_settings)


@register
@dataclasses.dataclass(frozen=True)
class SigmaSlab(Observation):
    """Observation of slabs [N, 1, D, H, W]: raw density on a cropped grid, normalised to [0, value_max].

    Each shape is normalised separately.
    """

    spec: SlabSpec = SlabSpec()
    kind: ClassVar[str] = "sigma"

    # The keyword arguments differ from those of the base class.
    @classmethod
    def from_generator(  # type: ignore[override]
        cls,
        generator: "Generator",
        *,
        resolution: int = 64,
        crop: Crop | None = None,
    ) -> Self:
        """Create the observation that evaluates a cropped grid over a generator's cube.

        64 grid points and the paper's crop give a slab of 33 x 36 x 32 points.

        Args:
            generator: generator whose shapes are observed.
            resolution: number of grid points per axis of the complete cube.
            crop: shares of the cube that are trimmed from its faces (x, x, y, y, z, z); None chooses them by
                the generator, see `eg3d_rlhf.rewards.slab_crops`.
        """
        chosen_crop = choose_crop([generator], cls.kind).crop if crop is None else tuple(crop)
        return cls(SlabSpec.from_bounds(generator.bounds, resolution, crop=chosen_crop))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape [1, D, H, W] of the slab of one sample."""
        return (1, *self.spec.shape)

    def observe(self, field: Field) -> torch.Tensor:
        """Compute the slabs [N, 1, D, H, W] of a field. Differentiable in the field.

        A shape with constant density gives a slab of zeros with zero gradient.
        """
        # [N, D, H, W] -> [N, 1, D, H, W]
        return normalise_slab(field.density_grid(self.spec), self.spec.value_max).unsqueeze(1)

    def augment(self, observations: torch.Tensor, draws: np.ndarray) -> torch.Tensor:
        """Mirror the slab of each sample left to right if its random number is below one half.

        Args:
            observations: slabs [N, 1, D, H, W].
            draws: random numbers [N], uniform in [0, 1).
        """
        # The last axis is x, which separates left and right.
        is_mirrored = torch.from_numpy(draws < 0.5).to(observations.device)
        return torch.where(is_mirrored[:, None, None, None, None], observations.flip(-1), observations)

    def misfits(self, generator: "Generator") -> list[str]:
        """List the differences between the cube of this slab and the cube of a generator.

        The list is empty if both cubes are equal.
        """
        bounds = generator.bounds
        # name, value of this slab, value of the generator
        compared_values = (
            ("box_warp", self.spec.box_warp, bounds.side),
            ("centre", self.spec.centre, bounds.centre),
        )
        return [
            f"{name} {value}, got {generator_value}"
            for name, value, generator_value in compared_values
            if value != generator_value
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the observation as JSON values, including `kind`.

        The fields of `spec` are entries of the top level, as in the reward files of the first version.
        """
        return {"kind": self.kind, **self.spec.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Create the observation from the JSON values of `to_dict` without the entry `kind`."""
        return cls(SlabSpec.from_dict(values))
