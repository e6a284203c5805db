"""Geometry-only pictures: a density cube's isosurface, shaded, without a graphics card.

Letters: N cubes, D, H, W grid points, R pixels, S steps.
"""

import torch
from torch.nn import functional as F

from eg3d_rlhf.core.field import LEVEL
from training.rendering.cameras import LookAtPoseSampler, RaySampler, intrinsics_matrix


@torch.no_grad()
def shade(sigma: torch.Tensor, yaw: float = 0.0, resolution: int = 128, level: float = LEVEL) -> torch.Tensor:
    """Lambert-shaded first crossings of the level along camera rays, in units of the cube: its size and place do not matter.

    Args:
        sigma: [N, D, H, W] raw density over the whole cube; yaw: radians from frontal; level: raw density of the surface.
    Returns: [N, 1, R, R] in [0, 1], white background.
    """
    pose = LookAtPoseSampler.sample(torch.pi / 2 + yaw, torch.pi / 2 - 0.1, torch.zeros(3), radius=2.7)
    origins, directions = RaySampler()(pose, intrinsics_matrix(4.2647).reshape(1, 3, 3), resolution)
    t = torch.linspace(2.1, 3.3, 160)  # near to far
    points = origins[:, :, None] + t[None, None, :, None] * directions[:, :, None]  # [1, M, S, 3]
    pictures = []
    for cube in sigma.cpu():
        values = _lookup(cube, points[0])  # [M, S]
        above = values >= level
        hit = above.any(dim=1)
        index = above.float().argmax(dim=1).clamp_min(1)
        rows = torch.arange(len(values))
        v0, v1 = values[rows, index - 1], values[rows, index]
        fraction = ((level - v0) / (v1 - v0).clamp_min(1e-6)).clamp(0, 1)
        depth = t[index - 1] + fraction * (t[1] - t[0])
        surface = origins[0] + depth[:, None] * directions[0]
        around = [_lookup(cube, surface - offset) - _lookup(cube, surface + offset) for offset in 0.012 * torch.eye(3)]
        normal = F.normalize(torch.stack(around, dim=-1), dim=-1)  # outward: minus the density's central differences
        light = F.normalize(torch.tensor([0.35, 0.5, 0.8]), dim=0)
        shading = 0.25 + 0.75 * (normal @ light).clamp_min(0)
        pictures.append(torch.where(hit, shading, torch.ones_like(shading)).reshape(1, resolution, resolution))
    return torch.stack(pictures)


def _lookup(cube: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Trilinear values of a cube [D, H, W] of side 1 at points [..., 3]; far below any level outside."""
    outside = -1000.0
    grid = (points * 2).reshape(1, 1, 1, -1, 3)
    values = F.grid_sample((cube - outside)[None, None], grid, align_corners=True, padding_mode="zeros") + outside
    return values.reshape(points.shape[:-1])
