"""Surface of one shape without a mesh: crossings with lines, and normals, at a fraction of a voxel.

A grid finds the voxels where a line crosses the surface. The density itself then places the crossing. Images
and distances therefore show the shape and not the steps of the grid.

Letters: P points or lines, D, H, W grid points, S samples along a line.
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

_FAR_BELOW = 1000.0  # outside the cube the density counts as this much below the level
_HALVINGS = 4  # bisections of a bracket of two voxels, before linear interpolation between its ends
REACHES = (0.024, 0.06)  # reaches of `crowding` in sides of the cube: for creases, and for hollows
# Safety margin of a step, in voxels: the surface is at most this much nearer than the interpolated distance
# to the nearest grid point inside.
_SLACK = 2.0
_LEAST_STEP = 1.0  # shortest step of a ray, in voxels


@dataclass(frozen=True, kw_only=True, eq=False)
class LevelSet:
    """The surface density = level of one shape. Inside, the density is above the level."""

    cube: Tensor  # [D, H, W] raw density at the points of spec
    spec: SlabSpec
    level: float
    density: Callable[[Tensor], Tensor]  # raw density [P] at world points [P, 3]

    @classmethod
    def of(cls, field: Field, resolution: int) -> "LevelSet":
        """Build the surface of a field of one shape.

        Args: resolution: points per edge of the grid, which covers the cube of the field.
        """
        assert len(field) == 1
        spec = SlabSpec.of(field.bounds, resolution)
        return cls(
            cube=field.density_grid(spec)[0],
            spec=spec,
            level=field.level,
            density=lambda points: field.density(points)[0],
        )

    def inside(self, points: Tensor) -> Tensor:
        """Return by how much [...] the density at world points [..., 3] exceeds the level; far below 0
        outside the cube.

        The density is interpolated trilinearly on the grid.
        """
        values = sample(self._maps[:1], self.spec, points)[0]
        return values.where(self._within(points), -_FAR_BELOW)

    def exactly_inside(self, points: Tensor) -> Tensor:
        """Return the same as `inside`, [P] at points [P, 3], from the density itself."""
        return torch.where(self._within(points), self.density(points) - self.level, -_FAR_BELOW)

    def _within(self, points: Tensor) -> Tensor:
        """Return True [...] for points [..., 3] in the cube. The factor 1 + 1e-6 admits rounded points on
        its faces.
        """
        return (points - points.new_tensor(self.spec.centre)).abs().amax(dim=-1) <= self.spec.box_warp / 2 * (
            1 + 1e-6
        )

    def place(self, origins: Tensor, directions: Tensor, t: Tensor) -> Tensor:
        """Refine crossings of lines [P, 3] + t [P, 3] from guesses t [P] that are within one voxel.

        Returns: t [P]. A guess without a crossing in its neighbourhood is returned unchanged.
        """
        reach = self.spec.voxel
        low = t - reach
        high = t + reach
        at_low, at_high = (self.exactly_inside(origins + end[:, None] * directions) for end in (low, high))
        # the bracket holds a crossing if its ends lie on different sides of the level
        crossed = (at_low >= 0) != (at_high >= 0)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            value = self.exactly_inside(origins + middle[:, None] * directions)
            lower_half_is_uniform = (value >= 0) == (at_low >= 0)
            low = torch.where(lower_half_is_uniform, middle, low)
            at_low = torch.where(lower_half_is_uniform, value, at_low)
            high = torch.where(lower_half_is_uniform, high, middle)
            at_high = torch.where(lower_half_is_uniform, at_high, value)
        return torch.where(crossed, between(low, high, at_low, at_high), t)

    def normals(self, points: Tensor) -> Tensor:
        """Compute outward unit normals [P, 3] at points [P, 3]: negated central differences of the
        density over one voxel.
        """
        offsets = torch.eye(3).to(points) * self.spec.voxel / 2
        differences = [self.density(points + offset) - self.density(points - offset) for offset in offsets]
        # density rises inwards, hence the minus
        return -F.normalize(torch.stack(differences, dim=-1), dim=-1)

    @torch.no_grad()
    def trace(self, origins: Tensor, directions: Tensor) -> Tensor:
        """Return the distances [P] at which rays first meet the surface; inf for rays that miss it.

        Args: origins: [P, 3]; directions: [P, 3], unit.
        Each step is as long as the distance to the nearest grid point inside allows, but at least one voxel.
        """
        centre = origins.new_tensor(self.spec.centre)
        side = self.spec.box_warp
        voxel = self.spec.voxel
        near, far = (t[0, :, 0] for t in ray_limits_box((origins - centre)[None], directions[None], side))
        depth = torch.full_like(near, torch.inf)
        maps = self._maps
        # indices of rays that are still being traced
        rays = (far > near).nonzero()[:, 0]
        t = near[rays]
        t_before = near[rays]
        # value at t_before; -1, because a ray starts outside
        value_before = torch.full_like(near[rays], -1.0)
        while len(rays):
            inside, free = sample(maps, self.spec, origins[rays] + t[:, None] * directions[rays])  # [P] each
            hit = inside >= 0
            # A hit lies between the last two samples, which are on different sides of the level.
            depth[rays[hit]] = between(t_before, t, value_before, inside)[hit]
            step = (free - _SLACK).clamp_min(_LEAST_STEP) * voxel
            unfinished = ~hit & (t < far[rays])
            t_before = t[unfinished]
            value_before = inside[unfinished]
            rays = rays[unfinished]
            t = (t + step)[unfinished]
            # The last sample of a ray is the point where it leaves the cube
            t = torch.minimum(t, far[rays])
        hit = depth.isfinite()
        # So far the crossing comes from the grid; place it by the density itself.
        depth[hit] = self.place(origins[hit], directions[hit], depth[hit])
        return depth

    @functools.cached_property
    def _maps(self) -> Tensor:
        """Maps for tracing, [2, D, H, W].

        The first is the density minus the level, the second the distance to the nearest grid point inside, in
        voxels (maximum norm, so a lower bound of the Euclidean distance).
        """
        from scipy.ndimage import distance_transform_cdt

        is_inside = (self.cube >= self.level).cpu().numpy()
        free = (
            # an empty grid has no nearest point inside; rays may cross it in one step
            distance_transform_cdt(~is_inside, "chessboard")
            if is_inside.any()
            else np.full(is_inside.shape, max(is_inside.shape))
        )
        return torch.stack([self.cube - self.level, torch.from_numpy(free).to(self.cube)])

    @functools.cached_property
    def crowding(self) -> Tensor:
        """Fraction of the space around each point that is inside, for each of REACHES: [2, D/2, H/2,
        W/2], 0..1.
        """
        from scipy.ndimage import uniform_filter

        # [1, D, H, W] -> [1, D/2, H/2, W/2]: half the resolution suffices for an average
        occupancy = F.avg_pool3d((self.cube >= self.level).float()[None], 2)[0].cpu().numpy()
        # Box widths in coarse points. A coarse point is two voxels, so a box is twice as wide as its reach.
        edges = [max(3, round(reach / self.spec.voxel * self.spec.box_warp)) for reach in REACHES]
        # Two box filters in sequence approximate a round (Gaussian) window.
        blurred = [
            uniform_filter(uniform_filter(occupancy, edge, mode="constant"), edge, mode="constant")
            for edge in edges
        ]
        return torch.from_numpy(np.stack(blurred)).to(self.cube)


def sample(values: Tensor, spec: SlabSpec, points: Tensor) -> Tensor:
    """Interpolate cubes [C, D, H, W] trilinearly at world points [..., 3]: [C, ...].

    Outside the cube the value of the nearest face is returned.
    """
    if points.numel() == 0:
        # grid_sample rejects an empty grid
        return points.new_zeros(len(values), *points.shape[:-1])
    # [..., 3] in (x, y, z), as grid_sample takes it; -1 and 1 are the outermost grid points
    grid = (points - points.new_tensor(spec.centre)) * (2 / spec.box_warp)
    sampled = F.grid_sample(
        values[None], grid.reshape(1, 1, 1, -1, 3), align_corners=True, padding_mode="border"
    )
    return sampled.reshape(len(values), *points.shape[:-1])


def between(t0: Tensor, t1: Tensor, v0: Tensor, v1: Tensor) -> Tensor:
    """Return the zero of the line through (t0, v0) and (t1, v1), clamped to the interval between t0 and
    t1.
    """
    return t0 + (t1 - t0) * (v0 / (v0 - v1).where(v0 != v1, v0.new_tensor(1.0))).clamp(0, 1)
