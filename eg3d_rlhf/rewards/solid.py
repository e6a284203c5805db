"""Rewards that nobody has to label: is the shape a sound body? The score of `eg3d_rlhf.geometry.solids`, and
a surrogate with a gradient.

    solid        minus `solid_loss`, which a generator can be tuned with: 0 where there is nothing to mend.
                 Experimental
    mesh-validity the score itself beside the shape's own repair; it chooses, and it has no gradient

Letters: N shapes; D, H, W = grid points along z, y, x.
"""

import dataclasses
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch.nn import functional as F

from eg3d_rlhf.core.field import Field
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.geometry import solids
from eg3d_rlhf.geometry.solids import HEADS
from eg3d_rlhf.rewards import observations
from eg3d_rlhf.rewards.networks import register
from eg3d_rlhf.rewards.smoothness import AsSeen, WholeCube

if TYPE_CHECKING:
    pass

MARGIN = 1.0  # m of `solid_loss`
REACH = 5.0  # voxels; bridges holes of radius h in walls w while REACH > (h^2 + w^2/4) / w


def solid_loss(
    density: torch.Tensor,
    level: float,
    *,
    reach: float = REACH,
    hollows: bool = False,
) -> torch.Tensor:
    """What is wrong with densities [N, D, H, W] as [N]: floaters to go and leaks to close, 0 without either.
    Differentiable in density.

    (sum over floaters of softplus(d - level + m) + sum over caps of softplus(level + m - d)) / voxels that
    are solid, d and the margin m in units of the density's slope per voxel at
    its surface. The masks are hard
    (`solids.floaters`, `solids.caps`) and have no gradient: nothing else moves, so it grows no blob. Nothing
    pulls towards the shape before: hold the density to it beside this. Voxels that are solid on both sides of
    the level are found anew in every call.

    Args: reach: radius in voxels of the ball that must not get in; hollows: fill closed cavities, too.
    Raises: ValueError for densities that are not finite. An empty shape gives 0, and no gradient.
    Misses holes of radius h in walls w where reach < (h^2 + w^2/4) / w, and closes wanted openings that are
    narrower.
    """
    return torch.stack([_loss(grid, level, reach, hollows) for grid in density])


def _loss(grid: torch.Tensor, level: float, reach: float, hollows: bool) -> torch.Tensor:
    solid = solids.occupied(grid.detach().cpu().numpy(), level, "solid_loss")
    if not solid.any():
        return grid.sum() * 0
    grow = solids.caps(solid, reach)
    if hollows:
        grow |= solids.enclosed(solid)
    d = (grid - level) / slope_at(grid.detach(), level)
    shrink_at, grow_at = (torch.from_numpy(mask).to(grid.device) for mask in (solids.floaters(solid), grow))
    return (F.softplus(d[shrink_at] + MARGIN).sum() + F.softplus(MARGIN - d[grow_at]).sum()) / int(
        solid.sum()
    )


def slope_at(grid: torch.Tensor, level: float) -> float:
    """Median change of a density [D, H, W] from voxel to voxel across its surface; 1 where there is none."""
    inside = grid > level
    steps = []
    for axis in range(3):
        crossed = inside.diff(dim=axis)
        steps.append(grid.diff(dim=axis)[crossed].abs())
    found = torch.cat(steps)
    return max(float(found.median()), 1e-6) if len(found) else 1.0


@observations.register
@dataclasses.dataclass(frozen=True)
class Solid(WholeCube):
    """Minus `solid_loss` on the whole cube, [N, 1]: the slab that other rewards read is cut, and what is cut
    is open.
    """

    reach: float = REACH  # voxels
    kind: ClassVar[str] = "solid"

    def observe(self, field: Field) -> torch.Tensor:
        return -solid_loss(field.density_grid(self.spec), field.level, reach=self.reach)[:, None]


@observations.register
@dataclasses.dataclass(frozen=True)
class Soundness(WholeCube):
    """solid * gate(F) of the whole cube at EDGE^3 beside its own repair, [N, 1]; no gradient. 0 for an empty
    shape.
    """

    spec: SlabSpec = SlabSpec.cube(solids.EDGE)
    weights: tuple[float, float, float, float] = HEADS.weights
    kind: ClassVar[str] = "mesh-validity"
    differentiable: ClassVar[bool] = False

    @torch.no_grad()
    def observe(self, field: Field) -> torch.Tensor:
        rules = solids.Rules(weights=self.weights)
        grids = occupancy(field, self.spec)
        return torch.tensor([[solids.reward(grid, grid, rules).reward] for grid in grids])


@torch.no_grad()
def occupancy(field: Field, spec: SlabSpec) -> list[np.ndarray]:
    """Which points of a grid are solid, bool [D, H, W] of every shape.

    Raises: ValueError for densities that are not finite.
    """
    return [solids.occupied(grid, field.level) for grid in field.density_grid(spec).float().cpu().numpy()]


for kind in (Solid.kind, Soundness.kind):
    register(kind, lambda description: AsSeen(), {})
