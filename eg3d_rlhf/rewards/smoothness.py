"""Reward that prefers smooth surfaces. It needs no training, and serves as a label-free control.

Shapes: N shapes, D, H, W = grid points along z, y, x.
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
STEP = 0.02  # standard deviation of the Gaussian weight of a point's distance to the surface, world units


def roughness(sigma: torch.Tensor, level: float, spacing: float) -> torch.Tensor:
    """Compute the mean squared curvature [N] of the surface of each shape. Differentiable in the densities.

    The result is the squared derivative of the unit normal of the density's level sets, in 1 / world unit^2,
    averaged over grid points with a weight that decreases with the distance from the surface.

    Args:
        sigma: raw densities [N, D, H, W].
        level: raw density at the surface.
        spacing: distance between grid points, world units.
    """
    gradient = torch.stack(torch.gradient(sigma, spacing=spacing, dim=(1, 2, 3)), dim=1)  # [N, 3, D, H, W]
    slope = gradient.square().sum(dim=1, keepdim=True).sqrt()  # [N, 1, D, H, W]
    # Where the density is almost constant, the direction of its gradient is noise. The added constants make
    # the normal short there.
    normal = gradient / (slope + 1e-3 * slope.detach().amax(dim=(2, 3, 4), keepdim=True) + 1e-8)
    # [N, 3, 3, D, H, W]: derivative along each axis of each component of the normal
    curvature = torch.stack(torch.gradient(normal, spacing=spacing, dim=(2, 3, 4)), dim=2)
    # (sigma - level) / slope is approximately the distance to the surface. The slope is detached, so that a
    # generator cannot improve the result by a change of the slope alone.
    weight = torch.exp(-0.5 * ((sigma - level) / (slope[:, 0].detach() * STEP + 1e-3)).square())
    return (curvature.square().sum(dim=(1, 2)) * weight).sum(dim=(1, 2, 3)) / weight.sum(
        dim=(1, 2, 3)
    ).clamp_min(1e-6)


@dataclasses.dataclass(frozen=True)
class CubeScore(observations.Observation):
    """Base class of observations [N, 1] that are already scores, computed from raw densities on a grid.

    The grid covers the complete cube of the generator. The network that reads such an observation is
    `IdentityReward`, which returns the score.
    """

    spec: SlabSpec = SlabSpec.cube(48)

    @classmethod
    def from_generator(  # type: ignore[override]
        cls, generator: "Generator", *, resolution: int | None = None
    ) -> Self:
        """Create the observation for a generator's cube.

        Args:
            generator: generator whose shapes are observed.
            resolution: number of grid points per axis; None takes the default of the class.
        """
        return cls(SlabSpec.from_bounds(generator.bounds, resolution or cls.spec.resolution))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape [1] of the score of one sample."""
        return (1,)


@observations.register
@dataclasses.dataclass(frozen=True)
class Smoothness(CubeScore):
    """Observation that is the smoothness score [N, 1]: minus the logarithm of the surface's roughness."""

    kind: ClassVar[str] = KIND

    def observe(self, field: Field) -> torch.Tensor:
        """Compute the scores [N, 1] of the shapes of a field. Differentiable in the field."""
        # n grid points have n - 1 intervals.
        spacing = self.spec.box_warp / (self.spec.resolution - 1)
        # 1e-6 avoids the logarithm of 0 for a flat surface.
        return -torch.log(roughness(field.density_grid(self.spec), field.level, spacing) + 1e-6)[:, None]

    def to_dict(self) -> dict[str, Any]:
        """Return the observation as JSON values, with the fields of `spec` at the top level."""
        return {"kind": self.kind, **self.spec.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Create the observation from the JSON values of `to_dict` without the entry `kind`."""
        return cls(SlabSpec.from_dict(values))


class IdentityReward(RewardNetwork):
    """Network without parameters whose score is the observation itself."""

    scale: torch.Tensor

    def __init__(self) -> None:
        # RewardNetwork.__init__ is skipped, because it would create a trunk and output heads.
        nn.Module.__init__(self)
        # The file of a reward needs a state dict with at least one entry.
        self.register_buffer("scale", torch.ones(1))

    def features(self, observations: torch.Tensor) -> torch.Tensor:
        """Return the observations [N, 1]."""
        return observations * self.scale

    def embed(self, observations: torch.Tensor) -> torch.Tensor:
        """Return the observations [N, 1]."""
        return self.features(observations)

    def score_embedding(self, embedding: torch.Tensor) -> torch.Tensor:
        """Return the scores [N] of embeddings [N, 1], which are the observations."""
        return embedding[:, 0]

    def check(self, shape: Sequence[int]) -> None:
        """Assert that `shape`, the shape of one observation, is the shape [1] of a score."""
        assert tuple(shape) == (1,)

    def describe(self) -> dict[str, Any]:
        """Return an empty description, since the network has no sizes."""
        return {}


register(KIND, lambda description: IdentityReward(), {})
