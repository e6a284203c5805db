"""How far a surface has moved: signed distances along its normals between two shapes of one latent, and their size over many latents.

Letters: P points, S samples along a line, N latents.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.geometry.level_set import LevelSet, between
from eg3d_rlhf.measures.nearest_head import resample, surface_points

VOXELS = 64  # points per edge of the cube whose voxel is the unit
REACH = 4.0  # voxels; how far the other surface is looked for
_CHUNK = 1 << 14  # points at once
_POINTS = 1500  # per surface and latent


def voxel(spec: SlabSpec) -> float:
    """The unit, in world units, of the cube that a grid spans."""
    return spec.box_warp / (VOXELS - 1)


@torch.no_grad()
def displacement(before: LevelSet, points: Tensor, normals: Tensor, reach: float = REACH) -> Tensor:
    """How far the surface has moved to come to be at points [P, 3], along their outward normals: [P] in voxels of 64^3.

    Positive where it has grown. Of the crossings of the line p + s n at which the shape before ends, the nearest one counts,
    |s| <= reach; the displacement is -s. Where there is none it is +reach for a point that was outside before, -reach for one inside.
    """
    unit = voxel(before.spec)
    half = max(2, round(reach * unit / before.spec.voxel))
    s = torch.linspace(-reach * unit, reach * unit, 2 * half + 1).to(points)
    found = torch.empty(len(points)).to(points)
    for part in torch.arange(len(points), device=points.device).split(_CHUNK):
        p, n = points[part], normals[part]
        inside = before.inside(p[:, None] + s[:, None] * n[:, None])  # [P, S]
        ends = (inside[:, :-1] >= 0) & (inside[:, 1:] < 0)
        at = between(s[:-1], s[1:], inside[:, :-1], inside[:, 1:]).where(ends, torch.inf)
        nearest = at.gather(1, at.abs().argmin(dim=1, keepdim=True))[:, 0]
        none = nearest.isinf()
        placed = before.place(p, n, nearest.masked_fill(none, 0.0))
        found[part] = torch.where(none, torch.where(before.exactly_inside(p) >= 0, -reach, reach), -placed / unit)
    return found


def in_head(points: Tensor, spec: SlabSpec) -> Tensor:
    """Which of points [P, 3] lie in the box of the published slab, that is in the head without neck and shoulders: [P] bool."""
    box = SlabSpec(crop=SlabSpec().crop, box_warp=spec.box_warp, centre=spec.centre).axes()
    low, high = (points.new_tensor([float(axis[i]) for axis in box]) for i in (0, -1))
    return ((points >= low) & (points <= high)).all(dim=-1)


@torch.no_grad()
def median_change(before: LevelSet, after: LevelSet) -> float:
    """Median |displacement| in voxels over points of both surfaces that can be seen from the front and the sides, within the head.

    NaN where neither shape has a surface there.
    """
    moved = []
    for here, there in ((after, before), (before, after)):
        points = surface_points(here.cube.float(), here.spec, -here.spec.box_warp, here.level)
        points = points[in_head(points, here.spec)]
        if len(points):
            points = resample(points, _POINTS, 0)
            normals = here.normals(points)
            points = points + here.place(points, normals, torch.zeros(len(points)).to(points))[:, None] * normals
            moved.append(displacement(there, points, normals).abs())
    return float(torch.cat(moved).median()) if moved else float("nan")


def change_summary(medians: Iterable[float]) -> dict:
    """Median and quartiles over N latents that have a surface, as JSON values; None where there is none."""
    values = np.array([value for value in medians if np.isfinite(value)])
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist() if len(values) else (None, None, None)
    return {"median": middle, "quartiles": [low, high], "n": len(values)}
