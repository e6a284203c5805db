"""Does a face have the relief of a face? Its height map seen from the front, beside that of the nearest true head.

The nearest head (nearest_head.py) is fitted to the whole visible surface; then heights over the face's window are correlated, first after
a plane is taken out of both. That leaves the convexity that every head shares, so even a face that was blurred by three voxels gets 0.93;
with a quadratic surface taken out as well it gets 0.84, a true head 0.98: what is left is brows, eyes, nose and lips.
Letters: N shapes, P points, D, H, W grid points along z, y, x; V, U = rows and columns of the window.
"""

from typing import NamedTuple

import numpy as np
import torch

from eg3d_rlhf.core.field import LEVEL
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.measures.nearest_head import OUTLIER, FitOptions, HeadPose, fit_heads, posed_sdf, resample, surface_points

WINDOW = (-0.09, 0.09, -0.16, 0.09)  # x from, x to, y from, y to, world units: from the chin to above the brows
FIT = FitOptions(points=256, starts=2, steps=40)  # a third of the usual effort; of true heads the correlation stays above 0.98
ALIKE = 0.9  # correlation from which a relief counts as a face's
TRACE_STEPS = 50


class Relief(NamedTuple):
    """Correlations per shape, float64 [N] in -1..1; 0 for a shape without a surface."""

    plane: np.ndarray  # a plane taken out of both height maps
    detail: np.ndarray  # a quadratic surface taken out of both


def front_heights(cube: torch.Tensor, spec: SlabSpec, level: float = LEVEL) -> torch.Tensor:
    """World z [H, W] of the first crossing of a level in a cube [D, H, W], seen from the front; NaN where there is none."""
    values, z = cube.flip(0), spec.axes()[2].to(cube).flip(0)
    inside = values >= level
    index = inside.to(torch.uint8).argmax(dim=0)
    before = (index - 1).clamp_min(0)
    value, previous = values.gather(0, index[None])[0], values.gather(0, before[None])[0]
    step = torch.where(index > 0, ((level - previous) / (value - previous).clamp_min(1e-9)).clamp(0, 1), 1.0)
    return torch.where(inside.any(dim=0), z[before] + step * (z[index] - z[before]), torch.nan)


@torch.no_grad()
def head_heights(pose: HeadPose, x: torch.Tensor, y: torch.Tensor, top: float) -> torch.Tensor:
    """World z [N, V, U] where rays from z = `top` straight back, at x [U] and y [V], meet fitted heads; sphere tracing."""
    v, u = torch.meshgrid(y, x, indexing="ij")
    points = torch.stack([u, v, torch.full_like(u, top)], dim=-1).reshape(1, -1, 3).repeat(len(pose.shape), 1, 1)
    for _ in range(TRACE_STEPS):
        points[..., 2] = (points[..., 2] - 0.8 * posed_sdf(points, pose)).clamp(-top, top)
    return points[..., 2].unflatten(1, u.shape)


def correlation(first: np.ndarray, second: np.ndarray, quadratic: bool = False) -> float:
    """Correlation of two height maps [V, U] after least-squares planes, or quadratic surfaces, are taken out; 0 where nothing is left."""
    y, x = np.meshgrid(*(np.linspace(-1, 1, size) for size in first.shape), indexing="ij")
    basis = [np.ones_like(x), x, y] + ([x * x, x * y, y * y] if quadratic else [])
    A = np.stack([part.ravel() for part in basis], axis=1)
    maps = np.stack([first.ravel(), second.ravel()], axis=1).astype(np.float64)
    a, b = (maps - A @ np.linalg.lstsq(A, maps, rcond=None)[0]).T
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / size if size > 1e-12 else 0.0


def relief(sigma: torch.Tensor, spec: SlabSpec, level: float = LEVEL, options: FitOptions = FIT) -> Relief:
    """Correlate the frontal heights of raw density cubes sigma [N, D, H, W] over `spec`, the whole cube, with those of their nearest heads.

    Heights count as no further than OUTLIER from the fitted head's, and a hole as that far behind it. Deterministic.
    """
    sigma = sigma.float().nan_to_num(nan=-1e4, posinf=1e4, neginf=-1e4)
    found = [surface_points(cube, spec, options.back, level) for cube in sigma]
    filled = [i for i, points in enumerate(found) if len(points) >= 16]
    out = Relief(np.zeros(len(sigma)), np.zeros(len(sigma)))
    if not filled:
        return out
    pose, _ = fit_heads(torch.stack([resample(found[i], options.points, options.seed) for i in filled]), options)
    x, y, z = (axis.to(sigma) for axis in spec.axes())
    columns, rows = (x >= WINDOW[0]) & (x <= WINDOW[1]), (y >= WINDOW[2]) & (y <= WINDOW[3])
    heads = head_heights(pose, x[columns], y[rows], float(z[-1]))  # [N, V, U]
    for i, head in zip(filled, heads, strict=True):
        own = front_heights(sigma[i], spec, level)[rows][:, columns]
        own = head + (own - head).nan_to_num(nan=-OUTLIER).clamp(-OUTLIER, OUTLIER)
        pair = own.double().cpu().numpy(), head.double().cpu().numpy()
        out.plane[i], out.detail[i] = correlation(*pair), correlation(*pair, quadratic=True)
    return out
