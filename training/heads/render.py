"""Images and true depth of procedural heads: sphere tracing with a coarse-to-fine cone march, colours, shading that does not depend on
the view, anti-aliasing.

Shape letters: N heads, S shape and A appearance parameters, R resolution, P rays of an image (row-major), K of them: those that are still
active, or that hit.
"""

from collections.abc import Callable

import torch

from training.heads.family import APPEARANCE_COUNT, APPEARANCE_NAMES
from training.heads.sdf import BOUND_CENTRE, BOUND_RADIUS, HeadGeometry, HeadParts, head_geometry, parts_at

BACKGROUNDS = ("white", "flat")

_OCCLUSION_REACH = 0.035  # how far the ambient-occlusion probe looks, world units
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
    columns = max(1, CHUNK // len(g.eye_x))

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
        origins: [N, 3]; directions: [N, P, 3] unit; start: [N, P] distances at which to begin; far: [N, 1] distance beyond the bust.
        spread: radius of the cone per unit distance; 0 traces the ray itself.
    Returns: [N, P] distances; inf for rays (or whole cones) that miss.
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
            columns = _columns(active, count)
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


def _columns(true: torch.Tensor, count: int) -> torch.Tensor:
    """Indices [N, count] of each row's true columns; shorter rows are filled up with others."""
    return true.to(torch.uint8).topk(count, dim=1, sorted=False).indices


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


def _colour(a: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    return torch.stack([a[f"{name}_{channel}"] for channel in "rgb"], dim=-1)  # [N, 1, 3]


def _step(edge: float | torch.Tensor, value: torch.Tensor, width: float) -> torch.Tensor:
    """1 where value < edge, 0 beyond, with a linear ramp of the given width."""
    return ((edge - value) / width + 0.5).clamp(0, 1)


def _mix(base: torch.Tensor, colour: torch.Tensor | float, weight: torch.Tensor) -> torch.Tensor:
    return base + (colour - base) * weight.unsqueeze(-1)


def _skin_albedo(x, y, z, g, a) -> torch.Tensor:
    """Skin with blush, painted eyebrows, the line between the lips and nostrils. [N, K, 3]"""
    skin, hair = _colour(a, "skin"), _colour(a, "hair")
    ax = x.abs()
    blush = torch.exp(-((ax - 0.072) ** 2 + (y + 0.040) ** 2) / 0.032**2) * (z > 0.03)
    albedo = _mix(skin.expand(*x.shape, 3), skin * skin.new_tensor([0.98, 0.66, 0.62]), blush * (0.15 + 0.35 * a["blush"]))
    across = (ax - g.eye_x) / 0.042
    line = 0.058 + g.brow_bend - 0.010 * across * across
    thick = (0.0065 + 0.004 * a["brow_thickness"]) * (1 - 0.35 * across.clamp(-1, 1))
    brow = _step(thick, (y - line).abs(), 0.003) * _step(1.0, across.abs(), 0.1) * (z > 0.05)
    albedo = _mix(albedo, 0.85 * hair, brow * (0.55 + 0.45 * a["brow_darkness"]))
    nostril = _step(0.0062, ((ax - 0.0125) ** 2 + (y + 0.060) ** 2).sqrt(), 0.003) * (z > 0.14)
    return _mix(albedo, 0.35 * skin, nostril)


def _eye_albedo(x, y, z, g, a) -> torch.Tensor:
    """Sclera, iris with a dark rim, pupil and a painted catch light, looking along +z. [N, K, 3]"""
    radius = g.eye_radius
    dx, dy = x.abs() - g.eye_x, y - g.eye_y
    rho = (dx * dx + dy * dy).sqrt() / radius
    iris = _colour(a, "iris")
    albedo = iris.new_full((*x.shape, 3), 0.93)
    albedo = _mix(albedo, 0.45 * iris, _step(0.50, rho, 0.06))
    albedo = _mix(albedo, iris * 1.1, _step(0.42, rho, 0.06))
    albedo = _mix(albedo, 0.03, _step(0.22, rho, 0.06))
    glint = ((x - torch.sign(x) * g.eye_x - 0.15 * radius) ** 2 + (dy - 0.18 * radius) ** 2).sqrt() / radius
    return _mix(albedo, 1.0, _step(0.10, glint, 0.06))


def _albedo(x, y, z, g, a, parts: HeadParts) -> torch.Tensor:
    """Colour of surface points [N, K, 3]: each takes that of the part it lies on."""
    albedo = _skin_albedo(x, y, z, g, a)
    lips = _colour(a, "lip")
    ax = x.abs()
    seam = (y + 0.108 - 2.1 * ax * ax + 0.0005).abs()
    lip_colour = _mix(lips.expand(*x.shape, 3), 0.4 * lips, _step(0.0030, seam, 0.003))
    seam_line = _step(0.0030, seam, 0.003) * _step(0.036 + 0.016 * a["mouth_width"], ax, 0.004) * (z > 0.08)
    albedo = _mix(albedo, 0.4 * lips, seam_line)
    strands = 1 + 0.10 * torch.sin(130 * x + 25 * torch.sin(9 * y + 4 * z)) * torch.sin(60 * z + 14 * y)
    hair = _colour(a, "hair") * strands.unsqueeze(-1)
    nearest = parts.union()
    for part, colour in ((parts.lips, lip_colour), (parts.eyes, _eye_albedo(x, y, z, g, a)), (parts.hair, hair)):
        albedo = torch.where((part <= nearest).unsqueeze(-1), colour, albedo)
    collar = (parts.skin <= nearest) & (y < -0.255)
    shirt = (parts.shirt <= nearest) & ~collar
    return torch.where(shirt.unsqueeze(-1), _colour(a, "shirt"), albedo)


def shade(field: Field, x, y, z, g, a) -> torch.Tensor:
    """albedo (ambient sky + wrapped Lambert), with occlusion from one probe along the normal. [N, K, 3]; no term depends on the view."""
    parts = parts_at(x, y, z, g)
    n = normals(field, x, y, z, parts.union())
    nx, ny, nz = n.unbind(-1)
    r = _OCCLUSION_REACH
    open_sky = (field(x + r * nx, y + r * ny, z + r * nz) / r).clamp(0, 1)  # 1 where nothing is near
    light = torch.cat([0.75 * a["light_x"], 0.45 + 0.35 * a["light_y"], torch.full_like(a["light_x"], 0.85)], dim=1)
    light = torch.nn.functional.normalize(light, dim=1)  # [N, 3], world axes
    lambert = ((n @ light.unsqueeze(-1)).squeeze(-1) * 0.8 + 0.2).clamp_min(0)
    level = 0.34 + 0.30 * a["ambient"]
    sky = (0.80 + 0.20 * ny) * (0.45 + 0.55 * open_sky)
    shading = level * sky + (1.08 - level) * lambert * (0.65 + 0.35 * open_sky)
    return _albedo(x, y, z, g, a, parts) * shading.unsqueeze(-1)


def _colour_rays(field: Field, origins, directions, t, g, a) -> torch.Tensor:
    """Colours [N, P, 3] of rays that hit at t [N, P] (inf: miss, black)."""
    hit = t.isfinite()
    count = int(hit.sum(dim=1).max())
    image = t.new_zeros((*t.shape, 3))
    if count == 0:
        return image
    for columns in _columns(hit, count).split(max(1, CHUNK // len(t)), dim=1):
        distance = t.gather(1, columns).unsqueeze(-1)
        valid = distance.isfinite()
        index = columns.unsqueeze(-1).expand(-1, -1, 3)
        points = origins.unsqueeze(1) + torch.where(valid, distance, 0.0) * directions.gather(1, index)
        x, y, z = (p.contiguous() for p in points.unbind(-1))
        colours = shade(field, x, y, z, g, a).clamp(0, 1)
        image.scatter_(1, index, colours * valid)
    return image


@torch.no_grad()
def render_heads(
    shape: torch.Tensor, appearance: torch.Tensor, cam2world: torch.Tensor, intrinsics: torch.Tensor, resolution: int, supersample: int = 2,
    background: str = "white",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Render heads by sphere tracing.

    Args:
        shape: [N, S] in [-1, 1]; appearance: [N, A]; names and ranges in `heads.family`.
        cam2world: [N, 4, 4], OpenCV camera axes; intrinsics: [N, 3, 3], normalised by the image size.
        resolution: R, pixels; supersample: rays per pixel along each axis.
        background: "white", or "flat" for the head's own background colour.
    Returns: image [N, 3, R, R] in [0, 1] (box-filtered), and depth [N, R, R]: Euclidean distance along the unit ray through the pixel's
        centre, inf where it misses. Not differentiable; use `head_sdf` for gradients.
    Raises: ValueError on wrong shapes or an unknown background.
    """
    n, got = len(shape), [list(tensor.shape) for tensor in (appearance, cam2world, intrinsics)]
    if got != [[n, APPEARANCE_COUNT], [n, 4, 4], [n, 3, 3]]:
        raise ValueError(
            f"render_heads: expected appearance [{n}, {APPEARANCE_COUNT}], cam2world [{n}, 4, 4] and intrinsics [{n}, 3, 3], got {got}. "
            "Give every head one row of each."
        )
    if background not in BACKGROUNDS:
        raise ValueError(f"render_heads: expected background to be one of {BACKGROUNDS}, got {background!r}.")
    g, a = head_geometry(shape), dict(zip(APPEARANCE_NAMES, appearance.unsqueeze(-1).unbind(1), strict=True))
    field = union_field(g)
    start, far = cone_starts(field, cam2world, intrinsics, resolution)
    origins, directions = pixel_rays(cam2world, intrinsics, resolution)
    t = depth = march(field, origins, directions, start, far)
    fine = resolution * supersample
    if supersample > 1:
        origins, directions = pixel_rays(cam2world, intrinsics, fine)
        t = march(field, origins, directions, repeat_pixels(start, resolution, supersample), far)
    colours = _colour_rays(field, origins, directions, t, g, a)
    behind = _colour(a, "background") if background == "flat" else colours.new_ones(1, 1, 3)
    colours = torch.where(t.isfinite().unsqueeze(-1), colours, behind)
    image = colours.mT.reshape(-1, 3, fine, fine)
    return torch.nn.functional.avg_pool2d(image, supersample), depth.reshape(-1, resolution, resolution)
