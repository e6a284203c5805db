"""Sphere tracing of the head family: rays of a camera, a coarse-to-fine cone march, and surface normals.

Shape letters: N heads, P rays of an image (row-major), K rays that are still active.
"""

from collections.abc import Callable

import torch

from training.heads.geometry import HeadGeometry
from training.heads.sdf import BOUND_CENTRE, BOUND_RADIUS, parts_at

Field = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # x, y, z [N, K] -> signed distance [N, K]

HIT_DISTANCE = 4e-4  # a ray has hit when the signed distance falls below this, world units
_STEP = 0.9  # fraction of the free distance to advance
_LEAST_SLOPE = 0.45  # near the surface a step is at most the free distance over this
_NEAR = 0.012  # "near", world units
_GRAZING = 2e-3  # a ray that is still on its way after the last step hits if it is nearer than this, and misses otherwise
_RAY_STEPS = 72
_CONE_STEPS = 10
_CONE_SLACK = 0.2  # a cone stops once the free distance beyond its radius falls below this share of the radius
CHUNK = 24_000  # points per evaluation, so that temporaries stay in the cache
_RECOMPACT = 0.75  # gather the active rays anew when fewer than this share of the gathered ones is active


def union_field(g: HeadGeometry) -> Field:
    """The signed distance of heads with dimensions `head_geometry(shape)` as a function of separate coordinates."""
    columns = max(1, CHUNK // g.heads)

    def field(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        pieces = zip(x.split(columns, dim=1), y.split(columns, dim=1), z.split(columns, dim=1), strict=True)
        values = [parts_at(*piece, g).union() for piece in pieces]
        return values[0] if len(values) == 1 else torch.cat(values, dim=1)

    return field


def pixel_rays(cam2world: torch.Tensor, intrinsics: torch.Tensor, resolution: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Origins [N, 3] and unit directions [N, P, 3] of the rays through the pixel centres ((column + .5) / R, (row + .5) / R), row-major.

    The convention is EG3D's: x = (u - cx - skew y) / fx, y = (v - cy) / fy, z = 1 in OpenCV camera axes.
    """
    centres = (torch.arange(resolution, device=cam2world.device, dtype=cam2world.dtype) + 0.5) / resolution
    v, u = torch.meshgrid(centres, centres, indexing="ij")
    fx, skew, cx, fy, cy = (intrinsics[:, i, j, None] for i, j in ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2)))
    y = (v.reshape(1, -1) - cy) / fy  # [N, P]
    x = (u.reshape(1, -1) - cx - skew * y) / fx
    local = torch.stack([x, y, torch.ones_like(x)], dim=-1)
    directions = torch.nn.functional.normalize(local @ cam2world[:, :3, :3].mT, dim=-1)
    return cam2world[:, :3, 3], directions


def march(
    field: Field, origins: torch.Tensor, directions: torch.Tensor, start: torch.Tensor, far: torch.Tensor, spread: float = 0.0
) -> torch.Tensor:
    """Advance each ray until the surface is nearer than the ray's cone is wide.

    t <- t + 0.9 (sdf(o + t d) - spread t) / slope, until sdf < 1.2 spread t + HIT_DISTANCE or t > far. The slope is 1 far away and, near
    the surface, the rate at which the last step shortened the distance (a secant step, so that grazing rays converge as well). Rays never
    influence one another, so the result does not depend on how they are batched.

    Args:
        field: signed distance.
        origins: [N, 3]. directions: [N, P, 3] unit. start: [N, P] distances at which to begin. far: [N, 1] distance beyond the bust.
        spread: radius of the cone per unit distance; 0 traces the ray itself.

    Returns:
        [N, P] distances; inf for rays (or whole cones) that miss.
    """
    t = start.clone()
    active = t < far
    last = torch.full_like(t, torch.inf)  # free distance before the last step
    step = torch.ones_like(t)
    o = origins.unsqueeze(-1)  # [N, 3, 1]
    columns = None
    for _ in range(_CONE_STEPS if spread else _RAY_STEPS):
        count = int(active.sum(dim=1).max())
        if count == 0:
            break
        if columns is None or count < _RECOMPACT * columns.shape[1]:
            columns = _active_columns(active, count)
            along = [directions[..., i].gather(1, columns) for i in range(3)]
        now, before, length, lanes = (v.gather(1, columns) for v in (t, last, step, active))
        room = field(*(torch.addcmul(o[:, i], now, along[i]) for i in range(3))) - spread * now
        slope = ((before - room) / length).clamp(_LEAST_SLOPE, 1)
        length = _STEP * room / torch.where(room < _NEAR, slope, 1.0)
        lanes = lanes & (room.abs() > HIT_DISTANCE + _CONE_SLACK * spread * now)
        now = torch.where(lanes, now + length, now)
        missed = lanes & (now >= far)
        t.scatter_(1, columns, now.masked_fill(missed, torch.inf))
        last.scatter_(1, columns, room)
        step.scatter_(1, columns, length)
        active.scatter_(1, columns, lanes & ~missed)
    return t if spread else t.masked_fill(active & (last > _GRAZING), torch.inf)


def _active_columns(active: torch.Tensor, count: int) -> torch.Tensor:
    """Indices [N, count] of each row's active columns; shorter rows are filled up with other, inactive columns."""
    return active.to(torch.uint8).topk(count, dim=1, sorted=False).indices


def cone_starts(field: Field, cam2world: torch.Tensor, intrinsics: torch.Tensor, resolution: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Distances [N, P] up to which the pixels of a resolution^2 image see nothing (inf: nothing at all), and `far` [N, 1].

    Marches one cone per block of 8, 4, 2 and 1 pixels, each level beginning where its parent stopped.
    """
    centre = torch.tensor(BOUND_CENTRE, dtype=cam2world.dtype, device=cam2world.device)
    reach = (cam2world[:, :3, 3] - centre).norm(dim=1, keepdim=True)  # [N, 1]
    far = reach + BOUND_RADIUS
    start = (reach - BOUND_RADIUS).clamp_min(0)
    size = 1
    narrow = float(intrinsics[:, [0, 1], [0, 1]].min())  # the shortest focal length gives the widest cone
    for grid in (resolution // 8, resolution // 4, resolution // 2, resolution):
        if grid < 1 or resolution % grid:
            continue
        start = repeat_pixels(start, size, grid // size) if grid % size == 0 else start[:, :1].expand(-1, grid * grid)
        size = grid
        origins, directions = pixel_rays(cam2world, intrinsics, grid)
        start = march(field, origins, directions, start, far, spread=0.5**0.5 / (grid * narrow))
    return start, far


def repeat_pixels(values: torch.Tensor, size: int, factor: int) -> torch.Tensor:
    """Row-major images [N, size^2] enlarged by repetition to [N, (size factor)^2]."""
    image = values.reshape(-1, size, 1, size, 1).expand(-1, size, factor, size, factor)
    return image.reshape(len(values), -1)


def normals(field: Field, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor, here: torch.Tensor, step: float = 1e-3) -> torch.Tensor:
    """Unit normals [N, K, 3] by forward differences from the values `here` [N, K] (3 evaluations; error of order step)."""
    ahead = (field(x + step, y, z), field(x, y + step, z), field(x, y, z + step))
    return torch.nn.functional.normalize(torch.stack([value - here for value in ahead], dim=-1), dim=-1)
