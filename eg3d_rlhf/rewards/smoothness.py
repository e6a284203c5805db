"""A control without labels: a reward that likes smooth surfaces, and nothing else.

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
STEP = 0.02  # world units over which density is taken to fall from solid to empty


def roughness(sigma: torch.Tensor, level: float, spacing: float) -> torch.Tensor:
    """Mean squared bend [N] of the level sets about the surface of raw densities [N, D, H, W], per squared
    world unit; differentiable.

    How fast the direction of the density's slope turns, where the density is near the level.
    """
    slope = torch.stack(torch.gradient(sigma, spacing=spacing, dim=(1, 2, 3)), dim=1)  # [N, 3, D, H, W]
    size = slope.square().sum(dim=1, keepdim=True).sqrt()
    direction = slope / (size + 1e-3 * size.detach().amax(dim=(2, 3, 4), keepdim=True) + 1e-8)
    # [N, 3, 3, D, H, W]
    turns = torch.stack(torch.gradient(direction, spacing=spacing, dim=(2, 3, 4)), dim=2)
    near = torch.exp(-0.5 * ((sigma - level) / (size[:, 0].detach() * STEP + 1e-3)).square())
    return (turns.square().sum(dim=(1, 2)) * near).sum(dim=(1, 2, 3)) / near.sum(dim=(1, 2, 3)).clamp_min(
        1e-6
    )


@dataclasses.dataclass(frozen=True)
class WholeCube(observations.Observation):
    """One that is a score itself, [N, 1], of raw densities on a grid of the whole cube; `AsSeen` is the
    network of its reward.
    """

    spec: SlabSpec = SlabSpec.cube(48)

    @classmethod
    def of(cls, generator: "Generator", *, resolution: int | None = None) -> Self:  # type: ignore[override]
        return cls(SlabSpec.of(generator.bounds, resolution or cls.spec.resolution))

    @property
    def shape(self) -> tuple[int, ...]:
        return (1,)


@observations.register
@dataclasses.dataclass(frozen=True)
class Smoothness(WholeCube):
    """Minus the logarithm of the surface's roughness."""

    kind: ClassVar[str] = KIND

    def observe(self, field: Field) -> torch.Tensor:
        spacing = self.spec.box_warp / (self.spec.resolution - 1)
        return -torch.log(roughness(field.density_grid(self.spec), field.level, spacing) + 1e-6)[:, None]

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, **self.spec.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        return cls(SlabSpec.from_dict(values))


class AsSeen(RewardNetwork):
    """The observation itself is the score."""

    scale: torch.Tensor

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.register_buffer("scale", torch.ones(1))

    def features(self, observed: torch.Tensor) -> torch.Tensor:
        return observed * self.scale

    def embed(self, observed: torch.Tensor) -> torch.Tensor:
        return self.features(observed)

    def score_embedding(self, embedding: torch.Tensor) -> torch.Tensor:
        return embedding[:, 0]

    def check(self, shape: Sequence[int]) -> None:
        assert tuple(shape) == (1,)

    def describe(self) -> dict[str, Any]:
        return {}


register(KIND, lambda description: AsSeen(), {})
