"""Label-free control: a reward that only prefers smooth surfaces.

Letters: N shapes, D, H, W grid points along z, y, x.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import nn

from eg3d_rlhf.core.field import Field
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.rewards import observations
from eg3d_rlhf.rewards.networks import RewardNetwork, register

if TYPE_CHECKING:
    from eg3d_rlhf.generators import Generator

KIND = "smoothness"
STEP = 0.02  # world units; width of the region around the surface that counts


def roughness(sigma: torch.Tensor, level: float, spacing: float) -> torch.Tensor:
    """Compute the mean squared curvature [N] of level sets near the surface of raw densities [N, D, H, W].

    It is the squared gradient of the unit normal, weighted by how close the density is to the level, per
    squared world unit. Differentiable.
    """
    slope = torch.stack(torch.gradient(sigma, spacing=spacing, dim=(1, 2, 3)), dim=1)  # [N, 3, D, H, W]
    size = slope.square().sum(dim=1, keepdim=True).sqrt()
    # The added constants avoid directions of noise where the density is flat.
    direction = slope / (size + 1e-3 * size.detach().amax(dim=(2, 3, 4), keepdim=True) + 1e-8)
    # [N, 3, 3, D, H, W]: derivative along each axis of each component of the normal
    turns = torch.stack(torch.gradient(direction, spacing=spacing, dim=(2, 3, 4)), dim=2)
    # (sigma - level) / |slope| is about the distance to the surface. Detached, so that steepness cannot be
    # used to change the weights.
    near = torch.exp(-0.5 * ((sigma - level) / (size[:, 0].detach() * STEP + 1e-3)).square())
    return (turns.square().sum(dim=(1, 2)) * near).sum(dim=(1, 2, 3)) / near.sum(dim=(1, 2, 3)).clamp_min(
        1e-6
    )


@dataclasses.dataclass(frozen=True)
class CubeScore(observations.Observation):
    """Observation that is already a score, [N, 1], of raw densities on a grid of the complete cube.

    `AsSeen` is the network of its reward.
    """

    spec: SlabSpec = SlabSpec.cube(48)

    @classmethod
    def of(cls, generator: "Generator", *, resolution: int | None = None) -> Self:  # type: ignore[override]
        """Create the observation of a generator's cube. Args: resolution: grid points per axis."""
        return cls(SlabSpec.of(generator.bounds, resolution or cls.spec.resolution))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample's score, [1]."""
        return (1,)


@observations.register
@dataclasses.dataclass(frozen=True)
class Smoothness(CubeScore):
    """Minus the logarithm of the surface's roughness, [N, 1]."""

    kind: ClassVar[str] = KIND

    def observe(self, field: Field) -> torch.Tensor:
        """Compute the scores, see `Observation`."""
        spacing = self.spec.box_warp / (self.spec.resolution - 1)
        return -torch.log(roughness(field.density_grid(self.spec), field.level, spacing) + 1e-6)[:, None]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, with the fields of `spec` at the top level."""
        return {"kind": self.kind, **self.spec.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Create the observation from the values of `to_dict` without `kind`."""
        return cls(SlabSpec.from_dict(values))


class AsSeen(RewardNetwork):
    """Network without parameters whose score is the observation itself."""

    scale: torch.Tensor

    def __init__(self) -> None:
        # Not RewardNetwork.__init__, which would create a trunk and heads.
        nn.Module.__init__(self)
        # One constant buffer, since a state dict must not be empty.
        self.register_buffer("scale", torch.ones(1))

    def features(self, observations: torch.Tensor) -> torch.Tensor:
        """Return the observation [N, 1]."""
        return observations * self.scale

    def embed(self, observations: torch.Tensor) -> torch.Tensor:
        """Return the observation [N, 1]."""
        return self.features(observations)

    def score_embedding(self, embedding: torch.Tensor) -> torch.Tensor:
        """Return scores [N] of embeddings [N, 1]."""
        return embedding[:, 0]

    def check(self, shape: Sequence[int]) -> None:
        """Assert that the observation is a score."""
        assert tuple(shape) == (1,)

    def describe(self) -> dict[str, Any]:
        """Return an empty description, since there are no sizes."""
        return {}


register(KIND, lambda description: AsSeen(), {})
