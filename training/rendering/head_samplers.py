"""How the full-head generators read features at points: tri-grids (PanoHead, An et al. 2023), two balls of spherical planes (SphereHead,
Li et al. 2024), and three planes with a sphere (HyPlaneHead, Li et al. 2025). All are differentiable in planes and points.

Letters: N batch, K planes, C channels, D slices of a tri-grid, H x W texels, P points; q = 2 p / box_warp.
"""

import math

import torch
from torch.nn.functional import grid_sample

EPSILON = 1e-8
_ROOT8 = 2 * math.sqrt(2)


def sample_tri_grid(
    axes: torch.Tensor, planes: torch.Tensor, points: torch.Tensor, box_warp: float, extent: float = 1.0
) -> torch.Tensor:
    """Trilinear reads, zeros outside, of K stacks of D slices (align_corners=False).

    With D = 1 a read fades by 1 - |t| / 2 along the third axis, so this is not EG3D's plane; with D = 3 slices lie at t = -2/3, 0, 2/3.

    Args:
        axes: [K, 3, 3], rows give the coordinates along width, height and slices; planes: [N, K, C, D, H, W]; points: [N, P, 3];
        extent: half the length of a stack over half the box, 1 in published networks.
    Returns: [N, K, P, C].
    """
    coordinates = torch.einsum("kij,npj->nkpi", axes.to(points), points * (2 / box_warp))  # width, height, slices
    grid = coordinates * coordinates.new_tensor([1.0, 1.0, 1.0 / extent])
    return _read(planes, grid.unsqueeze(2).unsqueeze(2))


def _read(planes: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """planes [N, K, C, (D,) H, W] at grid [N, K, (1,) 1, P, 2 or 3] -> [N, K, P, C]."""
    read = grid_sample(planes.flatten(0, 1), grid.flatten(0, 1).to(planes), mode="bilinear", padding_mode="zeros", align_corners=False)
    return read.flatten(2).unflatten(0, planes.shape[:2]).transpose(2, 3)


def _angle(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """atan2, with value and gradient 0 where both are 0 (there torch's gradient is NaN, and the value hangs on the sign of the zero)."""
    nowhere = (x == 0) & (y == 0)
    return torch.atan2(y.masked_fill(nowhere, 0.0), x.masked_fill(nowhere, 1.0))


def spherical(p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Polar angle from the third axis in 0..pi, and azimuth in -pi..pi, of points [..., 3]."""
    x, y, z = p.unbind(-1)
    return _angle(torch.linalg.vector_norm(p[..., :2], dim=-1), z), _angle(y, x)


def sample_balls(planes: torch.Tensor, points: torch.Tensor, box_warp: float) -> torch.Tensor:
    """Two balls fused. Ball A sees (q_z, q_y, -q_x), its seam at the back and its poles at the ears; B (-q_z, -q_x, q_y), seam in front.

    In a ball r = 2 |q| / sqrt 3 - 1, theta = 2 polar / pi - 1, phi = azimuth / pi, and its planes read (theta, phi), (theta, r), (phi, r).
    With the weight w = (1 + cos pi theta) / 2 (1 + cos pi phi) / 2 a feature is (A w_A + B w_B) / (w_A + w_B + 1e-8).

    Args: planes: [N, 2, 3, C, H, W]; points: [N, P, 3]. Returns: [N, 3, P, C].
    """
    x, y, z = (points * (2 / box_warp)).unbind(-1)
    total, weights = torch.zeros([], device=planes.device), torch.full([], EPSILON, device=planes.device)
    for ball, turned in zip(planes.unbind(1), ((z, y, -x), (-z, -x, y)), strict=True):
        q = torch.stack(turned, dim=-1)  # [N, P, 3]
        polar, azimuth = spherical(q)
        r = torch.linalg.vector_norm(q, dim=-1) * (2 / math.sqrt(3)) - 1
        theta, phi = polar * (2 / math.pi) - 1, azimuth / math.pi
        grid = torch.stack([torch.stack(pair, dim=-1) for pair in ((theta, phi), (theta, r), (phi, r))], dim=1)  # [N, 3, P, 2]
        weight = ((1 + torch.cos(math.pi * theta)) * (1 + torch.cos(math.pi * phi)) / 4)[:, None, :, None]
        total, weights = total + _read(ball, grid.unsqueeze(2)) * weight, weights + weight
    return total / weights


def equal_area_square(p: torch.Tensor) -> torch.Tensor:
    """Directions of points [..., 3] on the square -1..1 [..., 2]: Lambert's disc about the top of the head, the neck on its rim, then the
    elliptical map from disc to square."""
    x, y, z = p.unbind(-1)
    polar, azimuth = spherical(torch.stack([x, z, -y], dim=-1))
    radius = torch.cos(polar / 2)
    a, b = radius * torch.cos(azimuth), -radius * torch.sin(azimuth)  # the angle is -azimuth
    s = a.square() - b.square()

    def half(signed: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        plus, minus = (2 + signed + _ROOT8 * c + EPSILON), (2 + signed - _ROOT8 * c + EPSILON)
        return (plus.clamp_min(0).sqrt() - minus.clamp_min(0).sqrt()) / 2

    return torch.stack([half(s, a), half(-s, b)], dim=-1)


def sample_hybrid(axes: torch.Tensor, planes: torch.Tensor, points: torch.Tensor, box_warp: float, equal_area: bool) -> torch.Tensor:
    """Three planes, bilinear, and one over directions alone: constant along rays from the origin.

    Args: axes: [3, 3, 3]; planes: [N, 4, C, H, W], the sphere's last; points: [N, P, 3]; equal_area: by `equal_area_square`, else by both
    angles, as ball A sees them.
    Returns: [N, 4, P, C].
    """
    q = points * (2 / box_warp)
    flat = torch.einsum("kij,npj->nkpi", axes[:, :2].to(q), q)  # [N, 3, P, 2]
    if equal_area:
        around = equal_area_square(q)
    else:
        x, y, z = q.unbind(-1)
        polar, azimuth = spherical(torch.stack([z, y, -x], dim=-1))
        around = torch.stack([polar * (2 / math.pi) - 1, azimuth / math.pi], dim=-1)
    return _read(planes, torch.cat([flat, around[:, None]], dim=1).unsqueeze(2))
