"""The surface of one shape without a mesh: where lines cross it, and its normals there, to a fraction of a
voxel.

A grid finds the crossings, the density itself places them, so pictures and distances show the shape and not
the grid's steps.
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
_HALVINGS = 4  # of a bracket of two voxels, before the line through its ends
REACHES = (0.024, 0.06)  # of crowding, in sides of the cube: creases, and hollows
# voxels; the surface is at most so much nearer than interpolated distances to grid points inside
_SLACK = 2.0
_LEAST_STEP = 1.0


@dataclass(frozen=True, kw_only=True, eq=False)
class LevelSet:
    """The surface density = level of one shape; inside is above."""

    cube: Tensor  # [D, H, W] raw density at the points of spec
    spec: SlabSpec
    level: float
    density: Callable[[Tensor], Tensor]  # raw density [P] at world points [P, 3]

    @classmethod
    def of(cls, field: Field, resolution: int) -> "LevelSet":
        """The surface of a field of one shape, looked for on a grid of its whole cube with so many points per
        edge.
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
        """How far [...] the density at world points [..., 3] lies above the level, by trilinear
        interpolation; far below outside.
        """
        values = sample(self._maps[:1], self.spec, points)[0]
        return values.where(self._within(points), -_FAR_BELOW)

    def exactly_inside(self, points: Tensor) -> Tensor:
        """The same [P] at points [P, 3] by the density itself."""
        return torch.where(self._within(points), self.density(points) - self.level, -_FAR_BELOW)

    def _within(self, points: Tensor) -> Tensor:
        return (points - points.new_tensor(self.spec.centre)).abs().amax(dim=-1) <= self.spec.box_warp / 2 * (
            1 + 1e-6
        )

    def place(self, origins: Tensor, directions: Tensor, t: Tensor) -> Tensor:
        """Crossings [P] along lines [P, 3] + t [P, 3], from guesses t [P] within a voxel; a guess without a
        crossing about it stays.
        """
        reach = self.spec.voxel
        low = t - reach
        high = t + reach
        at_low, at_high = (self.exactly_inside(origins + end[:, None] * directions) for end in (low, high))
        crossed = (at_low >= 0) != (at_high >= 0)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            value = self.exactly_inside(origins + middle[:, None] * directions)
            first = (value >= 0) == (at_low >= 0)
            low = torch.where(first, middle, low)
            at_low = torch.where(first, value, at_low)
            high = torch.where(first, high, middle)
            at_high = torch.where(first, at_high, value)
        return torch.where(crossed, between(low, high, at_low, at_high), t)

    def normals(self, points: Tensor) -> Tensor:
        """Outward unit normals [P, 3] at points [P, 3]: minus the density's central differences over one
        voxel.
        """
        offsets = torch.eye(3).to(points) * self.spec.voxel / 2
        ahead = [self.density(points + offset) - self.density(points - offset) for offset in offsets]
        return -F.normalize(torch.stack(ahead, dim=-1), dim=-1)

    @torch.no_grad()
    def trace(self, origins: Tensor, directions: Tensor) -> Tensor:
        """Distances [P] at which rays from origins [P, 3] along unit directions [P, 3] first meet the
        surface; inf where they miss.

        Steps are as long as the way to the nearest grid point inside allows, and a voxel beside it.
        """
        centre = origins.new_tensor(self.spec.centre)
        side = self.spec.box_warp
        voxel = self.spec.voxel
        near, far = (t[0, :, 0] for t in ray_limits_box((origins - centre)[None], directions[None], side))
        depth = torch.full_like(near, torch.inf)
        maps = self._maps
        rays = (far > near).nonzero()[:, 0]  # those that are on their way
        t = near[rays]
        t_before = near[rays]
        before = torch.full_like(near[rays], -1.0)
        while len(rays):
            inside, free = sample(maps, self.spec, origins[rays] + t[:, None] * directions[rays])  # [P] each
            hit = inside >= 0
            depth[rays[hit]] = between(t_before, t, before, inside)[hit]
            step = (free - _SLACK).clamp_min(_LEAST_STEP) * voxel
            on = ~hit & (t < far[rays])
            t_before = t[on]
            before = inside[on]
            rays = rays[on]
            t = (t + step)[on]
            t = torch.minimum(t, far[rays])
        hit = depth.isfinite()
        depth[hit] = self.place(origins[hit], directions[hit], depth[hit])
        return depth

    @functools.cached_property
    def _maps(self) -> Tensor:
        """How far above the level, and a lower bound of the distance to the nearest grid point inside, in
        voxels: [2, D, H, W].
        """
        from scipy.ndimage import distance_transform_cdt

        full = (self.cube >= self.level).cpu().numpy()
        free = (
            distance_transform_cdt(~full, "chessboard")
            if full.any()
            else np.full(full.shape, max(full.shape))
        )
        return torch.stack([self.cube - self.level, torch.from_numpy(free).to(self.cube)])

    @functools.cached_property
    def crowding(self) -> Tensor:
        """Share of the space about each point that is inside, within each of REACHES: [2, D/2, H/2, W/2],
        0..1.
        """
        from scipy.ndimage import uniform_filter

        full = F.avg_pool3d((self.cube >= self.level).float()[None], 2)[0].cpu().numpy()
        # in coarse points: twice the reach
        edges = [max(3, round(reach / self.spec.voxel * self.spec.box_warp)) for reach in REACHES]
        # nearly round
        blurred = [
            uniform_filter(uniform_filter(full, edge, mode="constant"), edge, mode="constant")
            for edge in edges
        ]
        return torch.from_numpy(np.stack(blurred)).to(self.cube)


def sample(values: Tensor, spec: SlabSpec, points: Tensor) -> Tensor:
    """Trilinear values [C, ...] of whole cubes [C, D, H, W] at world points [..., 3]; outside, those of the
    nearest face.
    """
    if points.numel() == 0:
        return points.new_zeros(len(values), *points.shape[:-1])
    grid = (points - points.new_tensor(spec.centre)) * (2 / spec.box_warp)
    sampled = F.grid_sample(
        values[None], grid.reshape(1, 1, 1, -1, 3), align_corners=True, padding_mode="border"
    )
    return sampled.reshape(len(values), *points.shape[:-1])


def between(t0: Tensor, t1: Tensor, v0: Tensor, v1: Tensor) -> Tensor:
    """Where the line through (t0, v0) and (t1, v1) is 0, between the two."""
    return t0 + (t1 - t0) * (v0 / (v0 - v1).where(v0 != v1, v0.new_tensor(1.0))).clamp(0, 1)
