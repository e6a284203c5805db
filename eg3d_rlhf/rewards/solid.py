"""Label-free rewards for physically valid meshes: the score of `eg3d_rlhf.geometry.solids`, and a
differentiable one.

    solid            minus `solid_loss`, with which a generator can be tuned: 0 if no defect is detected.
                     Experimental
    mesh-validity    the score itself, against the shape's own correction; it can rank shapes, and has no
                     gradient

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
from eg3d_rlhf.rewards.smoothness import AsSeen, CubeScore

if TYPE_CHECKING:
    pass

MARGIN = 1.0  # m of `solid_loss`, voxels
REACH = 5.0  # voxels; closes holes of radius h in walls of thickness w while REACH > (h^2 + w^2/4) / w


def solid_loss(
    density: torch.Tensor,
    level: float,
    *,
    reach: float = REACH,
    hollows: bool = False,
) -> torch.Tensor:
    """Compute the defects of densities [N, D, H, W] as [N]: floaters to remove and leaks to close; 0 without
    either.

    (sum over floaters of softplus(d - level + m) + sum over caps of softplus(level + m - d)) / number of
    solid voxels. The density d and the margin m are in units of the density's change per voxel at its
    surface. The masks (`solids.floaters`, `solids.caps`) are hard and have no gradient, so no other voxel
    changes. Nothing keeps the remaining shape as it is: use a density-consistency term as well. Solid voxels
    are determined again in every call.

    Args: reach: radius in voxels of the ball that must not pass an opening; hollows: fill closed cavities as
        well.
    Differentiable in density.
    Raises: ValueError if a density is not finite. An empty shape gives 0 without a gradient.
    Misses holes of radius h in walls of thickness w if reach < (h^2 + w^2/4) / w. It also closes intended
    openings that are narrower.
    """
    return torch.stack([_loss(grid, level, reach, hollows) for grid in density])


def _loss(grid: torch.Tensor, level: float, reach: float, hollows: bool) -> torch.Tensor:
    """Compute the loss [] of one density [D, H, W]."""
    solid = solids.occupied(grid.detach().cpu().numpy(), level, "solid_loss")
    if not solid.any():
        # Zero that depends on the grid, so that backward() works.
        return grid.sum() * 0
    # Voxels that would close leaks of the largest part
    grow = solids.caps(solid, reach)
    if hollows:
        grow |= solids.enclosed(solid)
    # Signed distance to the surface in voxels, approximately; the scale has no gradient.
    d = (grid - level) / slope_at(grid.detach(), level)
    # Masks come from numpy on the CPU; the sums run on the field's device.
    shrink_at, grow_at = (torch.from_numpy(mask).to(grid.device) for mask in (solids.floaters(solid), grow))
    return (F.softplus(d[shrink_at] + MARGIN).sum() + F.softplus(MARGIN - d[grow_at]).sum()) / int(
        solid.sum()
    )


def slope_at(grid: torch.Tensor, level: float) -> float:
    """Return the median step of a density [D, H, W] across its surface; 1 without a surface."""
    inside = grid > level
    steps = []
    for axis in range(3):
        crossed = inside.diff(dim=axis)
        steps.append(grid.diff(dim=axis)[crossed].abs())
    changes = torch.cat(steps)
    # The median ignores the steep and flat tails of a decoder.
    return max(float(changes.median()), 1e-6) if len(changes) else 1.0


@observations.register
@dataclasses.dataclass(frozen=True)
class Solid(CubeScore):
    """Minus `solid_loss` on the complete cube, [N, 1].

    The slab that other rewards read is cropped, and a cropped shape is open where it was cut.
    """

    reach: float = REACH  # voxels, see `solid_loss`
    kind: ClassVar[str] = "solid"

    def observe(self, field: Field) -> torch.Tensor:
        """Compute the scores, see `Observation`."""
        return -solid_loss(field.density_grid(self.spec), field.level, reach=self.reach)[:, None]


@observations.register
@dataclasses.dataclass(frozen=True)
class Soundness(CubeScore):
    """Score solid * gate(F) of the complete cube at EDGE^3, against the shape's own correction, [N, 1].

    It has no gradient, and is 0 for an empty shape.
    """

    spec: SlabSpec = SlabSpec.cube(solids.EDGE)
    weights: tuple[float, float, float, float] = HEADS.weights  # see `solids.Rules`
    kind: ClassVar[str] = "mesh-validity"
    differentiable: ClassVar[bool] = False

    @torch.no_grad()
    def observe(self, field: Field) -> torch.Tensor:
        """Compute the scores, see `Observation`."""
        rules = solids.Rules(weights=self.weights)
        # Computed on the CPU by numpy, one shape at a time.
        grids = occupancy(field, self.spec)
        return torch.tensor([[solids.reward(grid, grid, rules).reward] for grid in grids])


@torch.no_grad()
def occupancy(field: Field, spec: SlabSpec) -> list[np.ndarray]:
    """Return which points of a grid are solid, as bool [D, H, W] for every shape.

    Raises: ValueError if a density is not finite.
    """
    return [solids.occupied(grid, field.level) for grid in field.density_grid(spec).float().cpu().numpy()]


for kind in (Solid.kind, Soundness.kind):
    register(kind, lambda description: AsSeen(), {})
