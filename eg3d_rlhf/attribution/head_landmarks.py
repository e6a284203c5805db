"""The procedural heads bring their own landmarks: 98 WFLW points of a member of the family, and of the member nearest to a density.

Letters: N heads, L landmarks (98), S shape parameters, D, H, W = z, y, x.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

from eg3d_rlhf.metrics.nearest_head import FitOptions, fit_heads, posed_sdf, surface_points
from eg3d_rlhf.sigma.spec import SlabSpec
from training.heads.geometry import BROW_Y, NOSE_LENGTH, NOSE_TOP, HeadGeometry, head_geometry

_FRONT = 0.45  # world z from which rays look for the surface
_STEPS = 80  # of the sphere tracing
_LEAST_POINTS = 16


class HeadPose(NamedTuple):
    """A head moved by `shift` and scaled by exp(log_scale) about the origin."""

    shape: torch.Tensor  # [N, S] in [-1, 1]
    shift: torch.Tensor  # [N, 3] world units
    log_scale: torch.Tensor  # [N, 1]


def _arc(centre: torch.Tensor, radii: tuple[float, torch.Tensor], degrees: list[float]) -> torch.Tensor:
    """Points [N, len(degrees), 2] on an ellipse, counter-clockwise from +x."""
    t = torch.tensor([math.radians(d) for d in degrees]).to(centre)
    x, y = radii
    return torch.stack([centre[:, :1] + x * t.cos(), centre[:, 1:] + y * t.sin()], dim=-1)


def _mirrored(points: torch.Tensor) -> torch.Tensor:
    return points * points.new_tensor([-1.0, 1.0])


def _frontal(g: HeadGeometry) -> torch.Tensor:
    """x and y [N, L, 2] of the landmarks from the places of the family's parts; indices as in landmarks.py."""
    n, zero = g.heads, torch.zeros_like(g.eye_x)
    jaw_x, jaw_y = 1 / g.jaw[0], 1 / g.jaw[1]
    degrees = np.interp(range(33), [0, 8, 24, 32], [150, 180, 360, 390]).tolist()  # ear, jaw, jaw, ear
    contour = _arc(torch.cat([zero, g.jaw_y], dim=1), (0.97 * jaw_x, jaw_y), degrees)
    along = torch.linspace(0, 1, 5).to(zero)
    upper = torch.stack([0.085 * (1 - along).expand(n, 5) + 0.02 * along, BROW_Y + 0.008 + 0 * along.expand(n, 5)], dim=-1)
    lower = torch.stack([0.03 + 0.05 * along[:4].expand(n, 4), BROW_Y - 0.008 + 0 * along[:4].expand(n, 4)], dim=-1)
    right_brow = torch.cat([upper.flip(1), lower.flip(1)], dim=1)  # 42-50: inner to outer, then back along the lower edge
    left_brow = _mirrored(torch.cat([upper, lower], dim=1))  # 33-41: outer to inner
    drop = torch.linspace(0.15, 1, 4).to(zero) * NOSE_LENGTH
    bridge = torch.stack([zero.expand(n, 4), (NOSE_TOP - drop).expand(n, 4)], dim=-1)
    base = torch.stack([g.wing * torch.tensor([-2.2, -1.1, 0.0, 1.1, 2.2]).to(zero), (-0.052 + 0 * zero).expand(n, 5)], dim=-1)
    eye = torch.cat([g.eye_x, g.eye_y + 0 * zero], dim=1)
    opening = (0.95 * g.eye_radius, 0.8 / g.lid_opening[1])
    right_eye = _arc(eye, opening, [180, 135, 90, 45, 0, -45, -90, -135])  # from the inner corner over the upper lid
    left_eye = _mirrored(_arc(eye, opening, [0, 45, 90, 135, 180, 225, 270, 315]))
    lip_y = torch.cat([zero, zero - 0.106], dim=1)
    lips = 1 / g.upper_lip[1] + 1 / g.lower_lip[1]
    outer = _arc(lip_y, (0.043, 0.8 * lips), [180 - 30 * i for i in range(12)])
    inner = _arc(lip_y, (0.034, 0.15 * lips), [180 - 45 * i for i in range(8)])
    pupils = torch.stack([_mirrored(eye), eye], dim=1)
    return torch.cat([contour, left_brow, right_brow, bridge, base, left_eye, right_eye, outer, inner, pupils], dim=1)


@torch.no_grad()
def head_landmarks(shape: torch.Tensor, shift: torch.Tensor | None = None, log_scale: torch.Tensor | None = None) -> torch.Tensor:
    """Landmarks [N, L, 3] in world coordinates of heads with shape parameters [N, S] in [-1, 1].

    x and y follow from the family's dimensions; z is where a ray from the front meets the head, or, beside it, passes nearest.

    Args: shift [N, 3], log_scale [N, 1]: pose of a fitted head, none by default.
    """
    shift = shape.new_zeros(len(shape), 3) if shift is None else shift
    log_scale = shape.new_zeros(len(shape), 1) if log_scale is None else log_scale
    frontal = _frontal(head_geometry(shape)) * log_scale.exp()[..., None] + shift[:, None, :2]  # [N, L, 2]
    z = torch.full_like(frontal[..., 0], _FRONT)
    nearest, best = z.clone(), torch.full_like(z, torch.inf)
    pose = HeadPose(shape, shift, log_scale)
    for _ in range(_STEPS):
        distance = posed_sdf(torch.cat([frontal, z[..., None]], dim=-1), pose)
        closer = distance.abs() < best
        nearest, best = torch.where(closer, z, nearest), torch.where(closer, distance.abs(), best)
        z = (z - (0.8 * distance).clamp_min(1e-4)).clamp_min(-_FRONT)
    return torch.cat([frontal, nearest[..., None]], dim=-1)


def fitted_landmarks(sigma: torch.Tensor, spec: SlabSpec, options: FitOptions | None = None) -> np.ndarray:
    """Landmarks [N, L, 3] of the family's members nearest to raw densities [N, D, H, W] over `spec`.

    Raises: ValueError for a density without a visible surface.
    """
    options = options or FitOptions()
    sets = []
    for i, cube in enumerate(sigma):
        points = surface_points(cube.detach().float(), spec, options.back)
        if len(points) < _LEAST_POINTS:
            raise ValueError(f"expected a visible surface of shape {i}, got {len(points)} points. Use --regions=boxes.")
        generator = torch.Generator().manual_seed(options.seed)
        sets.append(points[torch.randint(len(points), (options.points,), generator=generator).to(points.device)])
    pose, _ = fit_heads(torch.stack(sets), options)
    return head_landmarks(pose.shape, pose.shift, pose.log_scale).double().cpu().numpy()
