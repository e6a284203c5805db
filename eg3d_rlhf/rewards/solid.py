"""Two rewards for physically valid meshes. They need no labels and no training.

    solid            minus `solid_loss`. It is differentiable, so a generator can be tuned with it. It is 0 if
                     no defect is detected. This reward is experimental.
    mesh-validity    the score of `eg3d_rlhf.geometry.solids`, in which a shape is compared with its own
                     corrected version. It has no gradient and can only rank shapes.

Shapes: N shapes; D, H, W = grid points along z, y, x.
"""

import dataclasses
from typing import ClassVar

import numpy as np
import torch
from torch.nn import functional as F

from eg3d_rlhf.core.field import Field
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.geometry import solids
from eg3d_rlhf.geometry.solids import HEADS
from eg3d_rlhf.rewards import observations
from eg3d_rlhf.rewards.networks import register
from eg3d_rlhf.rewards.smoothness import CubeScore, IdentityReward

MARGIN = 1.0  # margin m of `solid_loss`, voxels
# Radius in voxels of the ball that must not pass an opening. Holes of radius h in walls of thickness w are
# closed if REACH > (h^2 + w^2/4) / w.
REACH = 5.0


def solid_loss(
    density: torch.Tensor,
    level: float,
    *,
    reach: float = REACH,
    fill_hollows: bool = False,
) -> torch.Tensor:
    """Compute a loss [N] of floaters (separate parts, to be removed) and leaks (openings, to be closed).

    The loss is (A + B) / number of solid voxels. A is the sum of softplus(d - level + m) over the voxels of
    floaters, and B is the sum of softplus(level + m - d) over the voxels that would close leaks. The density
    d, the level and the margin m are in units of the density's change per voxel at the surface.

    The masks of both kinds of voxels (`solids.floaters`, `solids.hole_caps`) are computed again in each call.
    Masks have no gradient, so only the densities of the masked voxels get a gradient. The loss does not
    preserve the remaining shape, so a density-consistency term is needed as well. A hole of radius h in a
    wall of thickness w is not detected if reach < (h^2 + w^2/4) / w. A smaller opening is closed, even if it
    belongs to the intended shape.

    Differentiable in density. The loss is 0 for a shape without such defects, and for an empty shape.

    Args:
        density: raw densities [N, D, H, W].
        level: raw density at the surface.
        reach: radius in voxels of the ball that must not pass an opening.
        fill_hollows: True to fill closed cavities as well.
    Raises: ValueError if a density is not finite.
    """
    return torch.stack([_grid_loss(grid, level, reach, fill_hollows) for grid in density])


def _grid_loss(grid: torch.Tensor, level: float, reach: float, fill_hollows: bool) -> torch.Tensor:
    """Compute the loss, a scalar tensor, of one grid of densities [D, H, W]; see `solid_loss`."""
    is_solid = solids.occupied(grid.detach().cpu().numpy(), level, "solid_loss")
    if not is_solid.any():
        # This 0 depends on the grid, so that backward() works.
        return grid.sum() * 0
    # Voxels that would close leaks of the largest part
    is_cap = solids.hole_caps(is_solid, reach)
    if fill_hollows:
        is_cap |= solids.enclosed(is_solid)
    # Approximately the signed distance to the surface in voxels. The scale is detached and has no gradient.
    d = (grid - level) / slope_at(grid.detach(), level)
    # Masks are computed by numpy on the CPU, and the sums on the device of the field.
    floater_mask = torch.from_numpy(solids.floaters(is_solid)).to(grid.device)
    cap_mask = torch.from_numpy(is_cap).to(grid.device)
    floater_sum = F.softplus(d[floater_mask] + MARGIN).sum()
    cap_sum = F.softplus(MARGIN - d[cap_mask]).sum()
    return (floater_sum + cap_sum) / int(is_solid.sum())


def slope_at(grid: torch.Tensor, level: float) -> float:
    """Return the median absolute difference of the densities of neighbouring voxels across the surface.

    The median is taken over all pairs of neighbouring voxels of which one is inside and the other is outside.
    The result is at least 1e-6, and 1 if no pair crosses the surface.

    Args:
        grid: raw densities [D, H, W].
        level: raw density at the surface.
    """
    is_inside = grid > level
    changes_by_axis = []
    for axis in range(3):
        crosses_surface = is_inside.diff(dim=axis)
        changes_by_axis.append(grid.diff(dim=axis)[crosses_surface].abs())
    density_changes = torch.cat(changes_by_axis)
    # The median does not depend on the few very large and very small changes.
    return max(float(density_changes.median()), 1e-6) if len(density_changes) else 1.0


@observations.register
@dataclasses.dataclass(frozen=True)
class Solid(CubeScore):
    """Observation that is a score [N, 1]: minus `solid_loss` on a grid of the complete cube.

    The grid is not cropped as a σ slab is, because a cropped shape is open where it was cut.
    """

    reach: float = REACH  # voxels, see `solid_loss`
    kind: ClassVar[str] = "solid"

    def observe(self, field: Field) -> torch.Tensor:
        """Compute the scores [N, 1] of the shapes of a field. Differentiable in the field."""
        return -solid_loss(field.density_grid(self.spec), field.level, reach=self.reach)[:, None]


@observations.register
@dataclasses.dataclass(frozen=True)
class Soundness(CubeScore):
    """Observation that is a score [N, 1] of physical validity: `solids.reward` on a grid of EDGE^3 voxels.

    The grid covers the complete cube. The shape is compared with its own corrected version. The score has no
    gradient, and it is 0 for an empty shape.
    """

    spec: SlabSpec = SlabSpec.cube(solids.EDGE)
    weights: tuple[float, float, float, float] = HEADS.weights  # weights of the score's terms, `solids.Rules`
    kind: ClassVar[str] = "mesh-validity"
    differentiable: ClassVar[bool] = False

    @torch.no_grad()
    def observe(self, field: Field) -> torch.Tensor:
        """Compute the scores [N, 1] of the shapes of a field."""
        rules = solids.Rules(weights=self.weights)
        # The score is computed on the CPU by numpy, one shape at a time. The second argument of `reward` is
        # the shape from which the corrected version is made: here the shape itself.
        grids = occupancy(field, self.spec)
        return torch.tensor([[solids.reward(grid, grid, rules).reward] for grid in grids])


@torch.no_grad()
def occupancy(field: Field, spec: SlabSpec) -> list[np.ndarray]:
    """Return a mask [D, H, W] of the solid grid points, for each shape of a field.

    Raises: ValueError if a density is not finite.
    """
    return [solids.occupied(grid, field.level) for grid in field.density_grid(spec).float().cpu().numpy()]


for kind in (Solid.kind, Soundness.kind):
    register(kind, lambda description: IdentityReward(), {})
