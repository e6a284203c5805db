"""True heads of the procedural family as raw density cubes, and how far a shape is from the nearest one.

A generator trained on rendered heads has only seen surfaces {p : head_sdf((p - t) / s, shape) = 0}; the distance of its own surface to the
nearest member says how much of its geometry is invented. Only what cameras in front can see is compared.
Letters: N heads or shapes, K starts, P surface points, S shape parameters, D, H, W grid points along z, y, x, V views or rays per axis,
R pixels.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from eg3d_rlhf.core.field import LEVEL
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.generators import of
from training.heads.family import SHAPE_COUNT
from training.heads.render import render_heads, union_field
from training.heads.sdf import head_geometry, head_sdf
from training.rendering.cameras import unpack_label
from training.synthetic_heads import HeadsOptions, head_parameters

SEED = 81  # of synthetic:heads64@seed=81: neither a generator nor the image features learn from these heads
RAMPS = (500.0, 2000.0, 8000.0)  # raw density per world unit at the surface: soft, as a trained decoder's, nearly a step
LOWEST, HIGHEST = -100.0, 200.0  # raw density that a ramp ends at, outside and inside


def true_shapes(n: int, first: int = 0) -> torch.Tensor:
    """Shape parameters [N, S] of the heads `first` and following."""
    return torch.from_numpy(head_parameters(HeadsOptions(seed=SEED), range(first, first + n))[0])


@torch.no_grad()
def head_distances(shape: torch.Tensor, spec: SlabSpec) -> torch.Tensor:
    """Signed distances [N, D, H, W] in world units of heads [N, S] at the points of a grid."""
    points = spec.points().reshape(1, -1, 3).expand(len(shape), -1, -1)
    return union_field(head_geometry(shape))(*points.unbind(-1)).unflatten(1, spec.shape)


def ramped(distance: torch.Tensor, ramp: float = RAMPS[1], level: float = LEVEL) -> torch.Tensor:
    """Raw density level - ramp * distance, held within LOWEST..HIGHEST: its surface is where the distance is 0, whatever the ramp."""
    return (level - ramp * distance).clamp(LOWEST, HIGHEST)


def true_pictures(index: int, cameras: torch.Tensor, resolution: int) -> torch.Tensor:
    """Pictures [V, 3, R, R] in 0..1 of one head, coloured and lit as in its set, from cameras [V, 25], on white."""
    shape, appearance, _ = (torch.from_numpy(values) for values in head_parameters(HeadsOptions(seed=SEED), range(index, index + 1)))
    n = len(cameras)
    return render_heads(shape.expand(n, -1), appearance.expand(n, -1), *unpack_label(cameras), resolution)[0]


# The distance to the family: fit its parameters, measure what is left.


WORST = 0.5  # world units; what a cube without surface gets, half the side of the scene
OUTLIER = 0.05  # world units; a surface point counts no more than this in the fit and in the result
STARTS_STDDEV = 0.5  # of the family's own shape parameters
TRACE_STEPS = 40


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """Effort of the fit; the defaults take about half a second per shape on one core."""

    points: int = 512  # surface points per shape in the fit
    starts: int = 3  # the average head and starts - 1 random ones
    steps: int = 60  # of Adam
    learning_rate: float = 0.08  # on normalised parameters, decayed to a tenth along a cosine
    shift: float = 0.05  # largest translation per axis, world units
    log_scale: float = 0.12  # largest |log scale|
    back: float = -0.05  # world z behind which surfaces are ignored
    rays: int = 40  # rays per axis of the grid that samples the fitted head
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.points, self.starts, self.steps, self.rays) < 1 or self.learning_rate <= 0:
            raise ValueError("FitOptions: expected points, starts, steps, rays >= 1 and a positive learning_rate.")


@dataclass(frozen=True, kw_only=True)
class HeadFit:
    """Per shape, float64 [N] in world units unless said otherwise; lower is better."""

    surface: np.ndarray  # mean |sdf| of the shape's visible points to the nearest head, 0..OUTLIER, or WORST for an empty cube
    uncovered: np.ndarray  # mean distance, beyond one voxel, from the nearest head's visible points to the shape's; same range
    distance: np.ndarray  # surface + uncovered
    shape: np.ndarray  # [N, S] fitted parameters, -1..1


class HeadPose(NamedTuple):
    """A head moved by `shift` and scaled by exp(log_scale) about the origin."""

    shape: Tensor  # [B, S] in [-1, 1]
    shift: Tensor  # [B, 3] world units
    log_scale: Tensor  # [B, 1]


def _axis_crossings(sigma: Tensor, axis: int, from_high: bool, spec: SlabSpec, level: float) -> Tensor:
    """First crossings of a level in one cube [D, H, W] along an axis (0 = z, 1 = y, 2 = x), world points [P, 3] as (x, y, z)."""
    volume = sigma.movedim(axis, 0)
    coordinates = [spec.axes()[2 - i].to(sigma) for i in range(3)]  # z, y, x
    along, rest = coordinates[axis], [c for i, c in enumerate(coordinates) if i != axis]
    if from_high:
        volume, along = volume.flip(0), along.flip(0)
    inside = volume >= level
    hit = inside.any(dim=0)
    index = inside.to(torch.uint8).argmax(dim=0)
    before = (index - 1).clamp_min(0)
    value, previous = volume.gather(0, index[None])[0], volume.gather(0, before[None])[0]
    step = torch.where(index > 0, ((level - previous) / (value - previous).clamp_min(1e-9)).clamp(0, 1), 1.0)
    position = along[before] + step * (along[index] - along[before])
    first, second = torch.meshgrid(*rest, indexing="ij")
    columns = [first[hit], second[hit]]
    columns.insert(axis, position[hit])  # z, y, x
    return torch.stack(columns[::-1], dim=-1)


def surface_points(sigma: Tensor, spec: SlabSpec, back: float = -0.05, level: float = LEVEL) -> Tensor:
    """Visible surface of one raw density cube [D, H, W]: first crossings from the front and from both sides, world points [P, 3].

    Points behind z = `back` are left out. P varies with the shape and is 0 for a cube without surface.
    """
    sigma = sigma.nan_to_num(nan=-1e4, posinf=1e4, neginf=-1e4)
    views = [_axis_crossings(sigma, axis, high, spec, level) for axis, high in ((0, True), (2, True), (2, False))]
    points = torch.cat(views)
    return points[points[:, 2] >= back]


def posed_sdf(points: Tensor, pose: HeadPose) -> Tensor:
    """Signed distance [B, P] to heads moved by `shift` and scaled by exp(log_scale) about the origin. Differentiable in everything."""
    scale = pose.log_scale.exp()
    return scale * head_sdf((points - pose.shift[:, None]) / scale[..., None], pose.shape)


def fit_heads(points: Tensor, options: FitOptions) -> tuple[HeadPose, Tensor]:
    """Nearest heads to point sets [N, P, 3]: Adam on the mean robust |sdf| from several starts, the best start per set.

    Loss: mean of min(|sdf|, OUTLIER) with the parameters normalised to their bounds and projected back after every step.
    Returns the poses (B = N) and the mean capped |sdf| of each, [N].
    """
    sets = points.repeat_interleave(options.starts, dim=0)  # [N*K, P, 3]
    drawn = np.random.default_rng(options.seed).standard_normal((options.starts, SHAPE_COUNT)) * STARTS_STDDEV
    drawn[0] = 0.0  # the average head
    shape = torch.from_numpy(drawn).clamp(-1, 1).to(points).repeat(len(points), 1)  # [N*K, S], the same K for every shape
    free = torch.cat([shape, shape.new_zeros(len(shape), 4)], dim=1).requires_grad_()  # [N*K, S+4], every column in [-1, 1]

    optimiser = torch.optim.Adam([free], lr=options.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, options.steps, eta_min=options.learning_rate / 10)
    best, best_free = free.new_full((len(free),), torch.inf), free.detach().clone()
    with torch.enable_grad():
        for step in range(options.steps + 1):
            loss = posed_sdf(sets, pose_from(free, options)).abs().clamp_max(OUTLIER).mean(dim=1)  # [N*K]
            better = loss.detach() < best
            best, best_free = torch.where(better, loss.detach(), best), torch.where(better[:, None], free.detach(), best_free)
            if step == options.steps:
                break
            optimiser.zero_grad()
            loss.sum().backward()
            optimiser.step()
            schedule.step()
            with torch.no_grad():
                free.clamp_(-1, 1)
    best = best.unflatten(0, (-1, options.starts))  # [N, K]
    chosen = best.argmin(dim=1)
    free = best_free.unflatten(0, (-1, options.starts))[torch.arange(len(points)), chosen]
    return pose_from(free, options), best.amin(dim=1)


def pose_from(free: Tensor, options: FitOptions) -> HeadPose:
    """Bounded parameters [B, S+4] in [-1, 1] as shape, shift and log scale."""
    return HeadPose(free[:, :SHAPE_COUNT], free[:, SHAPE_COUNT : SHAPE_COUNT + 3] * options.shift, free[:, -1:] * options.log_scale)


@torch.no_grad()
def visible_head_points(pose: HeadPose, spec: SlabSpec, options: FitOptions) -> list[Tensor]:
    """What orthographic rays from the front and from both sides hit of fitted heads: one [P, 3] per head (B lists).

    Sphere tracing with 0.8 of the signed distance, which the family promises is safe.
    """
    half, centre = spec.box_warp / 2, pose.shift.new_tensor(spec.centre)
    line = torch.linspace(-half, half, options.rays, dtype=pose.shape.dtype, device=pose.shape.device)
    v, u = (grid.reshape(-1) for grid in torch.meshgrid(line, line, indexing="ij"))
    edge = torch.full_like(u, half)
    start = torch.cat([torch.stack(rays, dim=-1) for rays in ((u, v, edge), (edge, v, u), (-edge, v, u))])  # [3V^2, 3], about the centre
    inward = torch.eye(3).to(start)[[2, 0, 0]] * start.new_tensor([[-1.0], [-1.0], [1.0]])
    direction = inward.repeat_interleave(len(u), dim=0)
    side = start[:, 2].abs() < half  # rays from the sides run at constant z; those behind `back` need no tracing
    start = start + centre
    kept = ~side | (start[:, 2] >= options.back)
    start, direction = start[kept], direction[kept]
    travelled = start.new_zeros(len(pose.shape), len(start))
    for _ in range(TRACE_STEPS):
        travelled = (travelled + 0.8 * posed_sdf(start + travelled[..., None] * direction, pose)).clamp(0, spec.box_warp)
    points = start + travelled[..., None] * direction  # [B, 3V^2, 3]
    on_surface = (posed_sdf(points, pose).abs() < 2e-3) & (points[..., 2] >= options.back) & ((points - centre).abs().amax(dim=-1) < half)
    return [p[m] for p, m in zip(points, on_surface, strict=True)]


def resample(points: Tensor, count: int, seed: int) -> Tensor:
    """`count` of the points [P, 3], drawn with replacement."""
    generator = torch.Generator().manual_seed(seed)
    return points[torch.randint(len(points), (count,), generator=generator).to(points.device)]


def nearest_heads(sigma: Tensor, spec: SlabSpec, options: FitOptions | None = None, level: float = LEVEL) -> HeadFit:
    """Fit every raw density cube and measure the remainder.

    surface = mean over the shape's visible points of min(|sdf of the fitted head|, OUTLIER);
    uncovered = mean over the fitted head's visible points of the distance to the nearest visible point of the shape beyond one voxel (the
    spacing of those points), capped alike.

    Args: `sigma` [N, D, H, W] raw density over `spec` (the whole cube, SlabSpec.cube(64), is meant); `options` sets the effort; `level` is
    that of the surface.
    Deterministic. Raises ValueError when sigma does not have the spec's shape.
    """
    options = options or FitOptions()
    if sigma.ndim != 4 or tuple(sigma.shape[1:]) != tuple(spec.shape):
        expected = ["N", *spec.shape]
        raise ValueError(f"nearest_heads: expected sigma {expected}, got {list(sigma.shape)}. Pass the spec that it was sampled with.")
    dense = [surface_points(cube.detach().float(), spec, options.back, level) for cube in sigma]
    filled = [i for i, points in enumerate(dense) if len(points) >= 16]
    surface, uncovered = np.full(len(sigma), WORST), np.full(len(sigma), WORST)
    shape = np.zeros((len(sigma), SHAPE_COUNT))
    if filled:
        sets = torch.stack([resample(dense[i], options.points, options.seed) for i in filled])
        pose, _ = fit_heads(sets, options)
        shape[filled] = pose.shape.double().cpu().numpy()
        heads = visible_head_points(pose, spec, options)
        for row, i in enumerate(filled):
            one = HeadPose(*(value[row : row + 1] for value in pose))
            surface[i], uncovered[i] = _apart(dense[i], one, heads[row], spec)
    return HeadFit(surface=surface, uncovered=uncovered, distance=surface + uncovered, shape=shape)


@torch.no_grad()
def _apart(points: Tensor, pose: HeadPose, seen: Tensor, spec: SlabSpec) -> tuple[float, float]:
    """surface and uncovered of a shape's visible points [P, 3] and one posed head, whose own visible points are `seen` [Q, 3]."""
    surface = posed_sdf(points[None], pose).abs().clamp_max(OUTLIER).mean().item()
    if not len(seen):
        return surface, WORST
    return surface, (torch.cdist(seen, points).amin(dim=1) - spec.voxel).clamp(0, OUTLIER).mean().item()


@torch.no_grad()
def distance_to_heads(sigma: Tensor, spec: SlabSpec, shape: Tensor, level: float = LEVEL) -> np.ndarray:
    """`HeadFit.distance` [N] of raw density cubes [N, D, H, W] to given heads [N, S] where the family has them: nothing is fitted."""
    options = FitOptions()
    pose = HeadPose(shape, shape.new_zeros(len(shape), 3), shape.new_zeros(len(shape), 1))
    heads, found = visible_head_points(pose, spec, options), np.full(len(sigma), 2 * WORST)
    for i, cube in enumerate(sigma):
        points = surface_points(cube.float(), spec, options.back, level)
        if len(points):
            found[i] = sum(_apart(points, HeadPose(*(value[i : i + 1] for value in pose)), heads[i], spec))
    return found


def nearest_head_measures(
    generator: Any, ws: Tensor, resolution: int = 64, options: FitOptions | None = None, batch: int = 8
) -> HeadFit:
    """`nearest_heads` of a generator's latents ws [N, L, Wd], on its whole cube at `resolution`, with constant noise."""
    if len(ws) == 0:
        raise ValueError("nearest_head_measures: expected at least one latent, got none. Pass ws [N, L, W].")
    generator = of(generator)
    spec = SlabSpec.of(generator.bounds, resolution)
    parts = []
    for chunk in ws.split(batch):
        with torch.no_grad():
            sigma = generator.field(chunk).density_grid(spec)
        parts.append(nearest_heads(sigma, spec, options, generator.level))
    return HeadFit(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in HeadFit.__dataclass_fields__})
