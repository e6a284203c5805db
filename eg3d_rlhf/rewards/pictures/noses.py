"""How many sides of a box head have a nose: the detector of the test problem. It reads surfaces, never what a reward reads.

A share of "two or more" (the Janus ratio) alone calls it a success when every nose is gone: three shares are reported.

Letters: A assets, R height samples per edge, M faces.
"""

from typing import NamedTuple

import numpy as np
import torch

from eg3d_rlhf.core.field import Field
from eg3d_rlhf.core.spec import SlabSpec

_WINDOW = 0.25  # half-width of the part of a side that is searched, in sides of the cube: the recess
_STEP = 0.06  # least height over the floor, in sides of the cube: half of a nose's
_AREA = (0.06, 0.6)  # of the window, that a bump may cover
_FLOOR_QUANTILE = 0.3  # of heights in the window: the floor, under a nose that covers less than two thirds
RESOLUTION = 32


class Shares(NamedTuple):
    """Shares of assets by their number of noses; they add up to 1."""

    none: float
    exactly_one: float
    two_or_more: float  # the Janus ratio
    n: int  # assets


def shares(counts: torch.Tensor) -> Shares:
    """Of counts [A]. Raises: ValueError for none at all."""
    if not len(counts):
        raise ValueError("noses.shares: expected at least one asset, got none. Give counts.")
    none, one, more = (float(hit.double().mean()) for hit in (counts == 0, counts == 1, counts >= 2))
    return Shares(none, one, more, len(counts))


@torch.no_grad()
def heights_of_field(field: Field, resolution: int = RESOLUTION) -> torch.Tensor:
    """Heights [A, 4, R, R] of the outermost surface towards front, +x, back, -x, from the cube's middle, in sides of the cube; rows are y
    rising, columns to the camera's right; -1 where nothing is. From where the density crosses the level along each axis."""
    grid = SlabSpec.of(field.bounds, resolution)
    solid = field.density_grid(grid) >= field.level  # [A, z, y, x]
    along_z, along_x = solid.permute(0, 2, 3, 1), solid.permute(0, 2, 1, 3)  # [A, y, x, z], [A, y, z, x]
    sides = [along_z, along_x.flip(2), along_z.flip(2, 3), along_x.flip(3)]
    height = torch.linspace(-0.5, 0.5, resolution)
    return torch.stack([torch.where(side, height.to(field.density(torch.zeros(1, 3)).device), -1).amax(dim=3) for side in sides], dim=1)


def heights_of_mesh(vertices: torch.Tensor, faces: torch.Tensor, resolution: int = RESOLUTION, side: float = 1.0) -> torch.Tensor:
    """The same [1, 4, R, R] of one mesh, vertices [N, 3] in world units and faces [M, 3], of a cube of this side about the origin."""
    corners = (vertices.detach().cpu().double() / side)[faces.cpu()]  # [M, 3, 3]
    x, y, z = corners.unbind(2)
    return torch.stack([_heights(*axes, resolution) for axes in ((x, y, z), (-z, y, x), (-x, y, -z), (z, y, -x))])[None].float()


def _heights(across: torch.Tensor, up: torch.Tensor, towards: torch.Tensor, resolution: int) -> torch.Tensor:
    """[R, R]: for each ray the largest height of a triangle through it, from corners [M, 3]."""
    axis = torch.linspace(-0.5, 0.5, resolution, dtype=torch.float64) + 1e-7  # not on the edges of a grid's triangles
    best = torch.full((resolution, resolution), -1.0, dtype=torch.float64)
    (x0, x1, x2), (y0, y1, y2) = across.unbind(1), up.unbind(1)
    twice = (x1 - x0) * (y2 - y0) - (x2 - x0) * (y1 - y0)  # [M], signed area
    facing = twice.abs() > 1e-12
    for row, v in enumerate(axis):
        near = facing & (up.amin(dim=1) <= v) & (up.amax(dim=1) >= v)
        a = [part[near][:, None] for part in (x0, x1, x2, y0, y1, y2, twice)]
        b1 = ((axis - a[0]) * (a[5] - a[3]) - (a[2] - a[0]) * (v - a[3])) / a[6]  # [m, R] barycentric
        b2 = ((a[1] - a[0]) * (v - a[3]) - (axis - a[0]) * (a[4] - a[3])) / a[6]
        inside = (b1 >= 0) & (b2 >= 0) & (b1 + b2 <= 1)
        corner = towards[near].unbind(1)
        height = corner[0][:, None] * (1 - b1 - b2) + corner[1][:, None] * b1 + corner[2][:, None] * b2
        if len(height):
            best[row] = torch.where(inside, height, -1).amax(dim=0)
    return best


def count(heights: torch.Tensor) -> torch.Tensor:
    """Sides with a nose [A] (0..4), of heights [A, 4, R, R]: with at least one connected bump of fitting height and area in the recess."""
    from scipy import ndimage

    r = heights.shape[-1]
    window = torch.linspace(-0.5, 0.5, r).abs() <= _WINDOW
    inner = heights[:, :, window][:, :, :, window]  # [A, 4, w, w]
    floor = inner.flatten(2).quantile(_FLOOR_QUANTILE, dim=2)[:, :, None, None]
    raised = (inner > floor + _STEP).cpu().numpy()
    low, high = (share * inner[0, 0].numel() for share in _AREA)
    found = np.zeros(heights.shape[:2], dtype=bool)
    for index in np.ndindex(found.shape):
        labels, _ = ndimage.label(raised[index])
        areas = np.bincount(labels.ravel())[1:]
        found[index] = ((areas >= low) & (areas <= high)).any()
    return torch.from_numpy(found.sum(axis=1))


def noses(field: Field) -> torch.Tensor:
    """Sides with a nose [A] of a field."""
    return count(heights_of_field(field))
