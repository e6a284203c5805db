"""Level set of the density of one shape: intersections with rays, and normals, without a mesh.

The density on a grid locates the voxel in which a ray crosses the surface. Evaluations of the density itself
then refine the intersection to a fraction of a voxel. Images and distances therefore show the shape and not
the steps of the grid.

Shapes: P points or rays; D, H, W grid points along z, y, x; C channels; [...] any axes.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from eg3d_rlhf.core.field import Field
from eg3d_rlhf.core.spec import SlabSpec
from training.rendering.cameras import ray_limits_box

_FAR_BELOW = 1000.0  # outside the cube, the density counts as this much below the level
_HALVINGS = 4  # number of bisections of an interval of two voxels, before the final linear interpolation
# Radii of the neighbourhoods of `crowding`, in sides of the cube: small for creases, large for hollows.
REACHES = (0.024, 0.06)
# Safety margin of a step in voxels: the surface is at most this much nearer than the interpolated distance to
# the nearest grid point inside.
_SLACK = 2.0
_MIN_STEP = 1.0  # shortest step of a ray, in voxels


@dataclass(frozen=True, kw_only=True, eq=False)
class LevelSet:
    """Surface of one shape: the points where the raw density equals a level. The density is higher inside."""

    cube: Tensor  # [D, H, W] raw density at the grid points of `spec`
    spec: SlabSpec
    level: float  # raw density on the surface
    density: Callable[[Tensor], Tensor]  # raw density [P] at world points [P, 3]

    @classmethod
    def from_field(cls, field: Field, resolution: int) -> "LevelSet":
        """Build the level set of a density field.

        Args:
            field: field of one shape.
            resolution: number of grid points per edge of the field's cube.
        """
        # one shape, since the level set has one grid
        assert len(field) == 1
        spec = SlabSpec.from_bounds(field.bounds, resolution)
        return cls(
            # [1, D, H, W] -> [D, H, W]
            cube=field.density_grid(spec)[0],
            spec=spec,
            level=field.level,
            density=lambda points: field.density(points)[0],
        )

    def above_level(self, points: Tensor) -> Tensor:
        """Compute the density minus the level, interpolated trilinearly on the grid.

        Args:
            points: world coordinates [..., 3].

        Returns: the difference [...]: positive inside the shape, and -1000 outside the cube.
        """
        # the first of the two maps is the density minus the level
        level_differences = sample(self._maps[:1], self.spec, points)[0]
        return level_differences.where(self._within(points), -_FAR_BELOW)

    def above_level_exact(self, points: Tensor) -> Tensor:
        """Compute the density minus the level from the density itself, without interpolation.

        Args:
            points: world coordinates [P, 3].

        Returns: the difference [P]: positive inside the shape, and -1000 outside the cube.
        """
        return torch.where(self._within(points), self.density(points) - self.level, -_FAR_BELOW)

    def _within(self, points: Tensor) -> Tensor:
        """Test which points [..., 3] lie inside the cube or on its faces. Returns a bool [...]."""
        # The factor 1 + 1e-6 admits points on the faces that rounding has moved outwards.
        return (points - points.new_tensor(self.spec.centre)).abs().amax(dim=-1) <= self.spec.box_warp / 2 * (
            1 + 1e-6
        )

    def refine_crossings(self, origins: Tensor, directions: Tensor, t: Tensor) -> Tensor:
        """Refine intersections of lines with the surface by bisection and linear interpolation.

        Args:
            origins: points [P, 3] of the lines.
            directions: unit directions [P, 3] of the lines.
            t: approximate distances [P] of the intersections from the origins, within one voxel.

        Returns: refined distances [P]. A distance is returned unchanged if the density does not cross the
            level within one voxel of it.
        """
        reach = self.spec.voxel
        low_t = t - reach
        high_t = t + reach
        low_value, high_value = (
            self.above_level_exact(origins + bound_t[:, None] * directions) for bound_t in (low_t, high_t)
        )
        # The interval contains an intersection if its two ends lie on different sides of the surface.
        is_bracket = (low_value >= 0) != (high_value >= 0)
        # Bisection: the half whose ends lie on different sides of the surface replaces the interval.
        for _ in range(_HALVINGS):
            middle_t = (low_t + high_t) / 2
            middle_value = self.above_level_exact(origins + middle_t[:, None] * directions)
            lower_half_is_uniform = (middle_value >= 0) == (low_value >= 0)
            low_t = torch.where(lower_half_is_uniform, middle_t, low_t)
            low_value = torch.where(lower_half_is_uniform, middle_value, low_value)
            high_t = torch.where(lower_half_is_uniform, high_t, middle_t)
            high_value = torch.where(lower_half_is_uniform, high_value, middle_value)
        return torch.where(is_bracket, interpolate_zero(low_t, high_t, low_value, high_value), t)

    def normals(self, points: Tensor) -> Tensor:
        """Compute outward unit normals [P, 3] at points [P, 3].

        A normal is the negative gradient of the density, computed by central differences over one voxel.
        """
        # rows: half a voxel along x, y and z
        offsets = torch.eye(3).to(points) * self.spec.voxel / 2
        central_differences = [
            self.density(points + offset) - self.density(points - offset) for offset in offsets
        ]
        # density rises inwards, hence the minus
        return -F.normalize(torch.stack(central_differences, dim=-1), dim=-1)

    @torch.no_grad()
    def trace(self, origins: Tensor, directions: Tensor) -> Tensor:
        """Compute the first intersection of each ray with the surface by sphere tracing on the grid.

        Each step is as long as the distance to the nearest grid point inside allows, but at least one voxel.
        Intersections are then refined with the density itself.

        Args:
            origins: origins [P, 3] of the rays.
            directions: unit directions [P, 3] of the rays.

        Returns: distances [P] from the origins; inf for rays that miss the surface.
        """
        centre = origins.new_tensor(self.spec.centre)
        cube_side = self.spec.box_warp
        voxel_size = self.spec.voxel
        # distances [P] at which rays enter and leave the cube; `ray_limits_box` takes a batch axis
        near, far = (
            t[0, :, 0] for t in ray_limits_box((origins - centre)[None], directions[None], cube_side)
        )
        depth = torch.full_like(near, torch.inf)
        maps = self._maps
        # indices of the rays that are still being traced; rays that miss the cube keep the depth inf
        ray_indices = (far > near).nonzero()[:, 0]
        t = near[ray_indices]
        previous_t = near[ray_indices]
        # value at previous_t; -1, because a ray starts outside
        previous_value = torch.full_like(near[ray_indices], -1.0)
        while len(ray_indices):
            # both [rays]: density minus level, and distance to the nearest grid point inside in voxels
            level_difference, free_distance = sample(
                maps, self.spec, origins[ray_indices] + t[:, None] * directions[ray_indices]
            )
            has_hit = level_difference >= 0
            # The intersection lies between the last two samples, which are on different sides of the surface.
            depth[ray_indices[has_hit]] = interpolate_zero(previous_t, t, previous_value, level_difference)[
                has_hit
            ]
            step_length = (free_distance - _SLACK).clamp_min(_MIN_STEP) * voxel_size
            is_unfinished = ~has_hit & (t < far[ray_indices])
            previous_t = t[is_unfinished]
            previous_value = level_difference[is_unfinished]
            ray_indices = ray_indices[is_unfinished]
            t = (t + step_length)[is_unfinished]
            # The last sample of a ray is the point at which it leaves the cube.
            t = torch.minimum(t, far[ray_indices])
        has_hit = depth.isfinite()
        # So far, distances come from the interpolated grid. The density itself refines them.
        depth[has_hit] = self.refine_crossings(origins[has_hit], directions[has_hit], depth[has_hit])
        return depth

    @functools.cached_property
    def _maps(self) -> Tensor:
        """Return the two maps [2, D, H, W] that `trace` reads.

        The first map is the density minus the level. The second map is the distance to the nearest grid point
        inside in voxels. It uses the maximum norm, which is a lower bound of the Euclidean distance.
        """
        # imported here, because few functions need this library
        from scipy.ndimage import distance_transform_cdt

        is_inside = (self.cube >= self.level).cpu().numpy()
        free_distance = (
            # An empty grid has no nearest point inside, so rays may cross it in one step.
            distance_transform_cdt(~is_inside, "chessboard")
            if is_inside.any()
            else np.full(is_inside.shape, max(is_inside.shape))
        )
        return torch.stack([self.cube - self.level, torch.from_numpy(free_distance).to(self.cube)])

    @functools.cached_property
    def crowding(self) -> Tensor:
        """Return the fraction of the space around each grid point that is inside the shape, in 0..1.

        The result [2, D/2, H/2, W/2] has one map for each radius of REACHES, at half the resolution.
        """
        # imported here, because few functions need this library
        from scipy.ndimage import uniform_filter

        # [1, D, H, W] -> [1, D/2, H/2, W/2]: half the resolution suffices for an average
        occupancy = F.avg_pool3d((self.cube >= self.level).float()[None], 2)[0].cpu().numpy()
        # Box widths in coarse points. A coarse point is two voxels, so a box is twice as wide as its reach.
        box_widths = [max(3, round(reach / self.spec.voxel * self.spec.box_warp)) for reach in REACHES]
        # Two box filters in sequence approximate a round (Gaussian) window. "constant": outside is empty.
        blurred_maps = [
            uniform_filter(uniform_filter(occupancy, box_width, mode="constant"), box_width, mode="constant")
            for box_width in box_widths
        ]
        return torch.from_numpy(np.stack(blurred_maps)).to(self.cube)


def sample(maps: Tensor, spec: SlabSpec, points: Tensor) -> Tensor:
    """Interpolate maps on a grid trilinearly.

    Args:
        maps: maps [C, D, H, W] on the grid points of `spec`.
        spec: grid.
        points: world coordinates [..., 3].

    Returns: values [C, ...]. Outside the cube, the value of the nearest face is returned.
    """
    if points.numel() == 0:
        # F.grid_sample raises an error for an empty grid.
        return points.new_zeros(len(maps), *points.shape[:-1])
    # [..., 3] in the order x, y, z of grid_sample. -1 and 1 are the outermost grid points (align_corners).
    grid_positions = (points - points.new_tensor(spec.centre)) * (2 / spec.box_warp)
    sampled_values = F.grid_sample(
        maps[None], grid_positions.reshape(1, 1, 1, -1, 3), align_corners=True, padding_mode="border"
    )
    return sampled_values.reshape(len(maps), *points.shape[:-1])


def interpolate_zero(t0: Tensor, t1: Tensor, v0: Tensor, v1: Tensor) -> Tensor:
    """Compute the zero of the line through (t0, v0) and (t1, v1), clamped to the interval from t0 to t1.

    Args:
        t0, t1: positions [P].
        v0, v1: values [P] at the positions. If they are equal, there is no zero; the result is then an
            end of the interval or a position within it.
    """
    # `where` replaces a denominator of 0 by 1, so that no NaN occurs
    return t0 + (t1 - t0) * (v0 / (v0 - v1).where(v0 != v1, v0.new_tensor(1.0))).clamp(0, 1)
