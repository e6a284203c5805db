"""Clouds of points, differentiable in what they were made of: lifted from a depth map, or drawn on the level set of a density grid.

Letters: N shapes, P points of a cloud, E places that a point may come from, R pixels per edge; D, H, W = grid points along z, y, x.
"""

import functools

import numpy as np
import torch

from eg3d_rlhf.core.spec import SlabSpec
from training.rendering.cameras import RaySampler, unpack_label

_FLAT = 1e-6  # densities of two grid points that differ less count as equal


def lift(depth: torch.Tensor, cameras: torch.Tensor) -> torch.Tensor:
    """Origin + depth * unit direction of every pixel's ray.

    Args: depth [N, 1, R, R] along the unit ray, world units; cameras [N or 1, 25].
    Returns: world points [N, R * R, 3], row by row. Differentiable in depth.
    """
    n, _, resolution, _ = depth.shape
    origins, directions = RaySampler()(*unpack_label(cameras.to(depth)), resolution)  # [N, R * R, 3] each
    return origins + depth.reshape(n, -1, 1) * directions


def evenly(total: int, count: int) -> torch.Tensor:
    """The published choice of `count` of `total` points: round(linspace(0, total - 1, count)), int64 [count]."""
    return torch.from_numpy(np.linspace(0, total - 1, count).round().astype(np.int64))


def self_scaled(points: torch.Tensor) -> torch.Tensor:
    """The published normalisation of [N, P, 3]: minus the centroid, over the largest absolute coordinate, times 0.999999.

    Differentiable in points, the largest coordinate's gradient included. Neither place nor size is left in it.
    """
    centred = points - points.mean(dim=1, keepdim=True)
    return centred / centred.abs().flatten(1).max(dim=1).values[:, None, None] * 0.999999


@functools.lru_cache(maxsize=8)
def _ranks(places: int, seed: int) -> torch.Tensor:
    """A permutation of 0 ... places - 1 that the seed decides, int64 [E]."""
    return torch.from_numpy(np.random.default_rng(seed).permutation(places))


def draw(usable: torch.Tensor, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose `count` places of those that are usable [N, E], the same ones for the same seed.

    Every place has a rank that the seed decides, and the lowest are taken: where one place changes, at most one point does. Where there are
    fewer than `count`, they are repeated in turn.

    Returns: places int64 [N, count], and whether there was any, [N, 1].
    """
    places = usable.shape[1]
    if places < count:
        raise ValueError(f"draw: expected at least {count} places, got {places}. Raise the resolution, or take fewer --points.")
    ranks = _ranks(places, seed).to(usable.device)
    best = torch.where(usable, ranks, ranks + places).topk(count, dim=1, largest=False)  # sorted
    held = usable.sum(dim=1, keepdim=True).clamp(1, count)  # [N, 1]
    return best.indices.gather(1, torch.arange(count, device=usable.device) % held), usable.any(dim=1, keepdim=True)


def _slopes(density: torch.Tensor, voxel: float) -> torch.Tensor:
    """Gradient of [N, D, H, W] by central differences, one-sided at faces: [N, 3, D, H, W], components along x, y, z."""
    return torch.stack(torch.gradient(density, spacing=voxel, dim=(3, 2, 1)), dim=1)


def _places(shape: tuple[int, int, int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The edges between neighbouring grid points: flat indices of both ends and the axis (0 x, 1 y, 2 z), int64 [E] each."""
    index = torch.arange(int(np.prod(shape)), device=device).reshape(shape)
    firsts, seconds, axes = [], [], []
    for axis, dim in enumerate((2, 1, 0)):
        firsts.append(index.narrow(dim, 0, shape[dim] - 1).flatten())
        seconds.append(index.narrow(dim, 1, shape[dim] - 1).flatten())
        axes.append(torch.full_like(firsts[-1], axis))
    return torch.cat(firsts), torch.cat(seconds), torch.cat(axes)


def level_set(
    density: torch.Tensor, level: float, grid: SlabSpec, count: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Points where a grid's edges cross a level, and normals there.

        p = p_a + t (p_b - p_a),  t = (level - s_a) / (s_b - s_a),  normal = -grad s / |grad s|

    Args: density [N, D, H, W] at the points of a straight grid; count: points drawn, see `draw`.
    Returns: world points [N, count, 3], unit outward normals [N, count, 3], and whether there is any crossing [N, 1]; where there is
    none, the points mean nothing.
    Differentiable in density, not in which edges cross. Where s_a and s_b are equal to 1e-6, t is constant.
    """
    first, second, axis = _places(grid.shape, density.device)
    flat = density.flatten(1)
    usable = (flat[:, first] >= level) != (flat[:, second] >= level)  # [N, E]
    chosen, found = draw(usable, count, seed)  # [N, P]
    a, b = first[chosen], second[chosen]
    start, step = flat.gather(1, a), flat.gather(1, b) - flat.gather(1, a)
    steep = step.abs() > _FLAT
    t = torch.where(steep, (level - start) / torch.where(steep, step, torch.ones_like(step)), torch.full_like(step, 0.5))  # [N, P]
    corners = grid.points().reshape(-1, 3).to(density)  # [D * H * W, 3]
    along = torch.nn.functional.one_hot(axis[chosen], 3) * grid.voxel  # [N, P, 3]
    points = corners[a] + t[..., None] * along
    slopes = _slopes(density, grid.voxel).flatten(2)  # [N, 3, D * H * W]
    at_a, at_b = (slopes.gather(2, end[:, None].expand(-1, 3, -1)) for end in (a, b))  # [N, 3, P]
    normals = torch.nn.functional.normalize(-torch.lerp(at_a, at_b, t[:, None]), dim=1, eps=_FLAT).transpose(1, 2)
    return points, normals, found


def in_box(points: torch.Tensor, side: float, centre: tuple[float, float, float]) -> torch.Tensor:
    """World points [..., 3] in halves of a box's side from its centre: -1..1 inside it."""
    return (points - torch.tensor(centre).to(points)) / (0.5 * side)
