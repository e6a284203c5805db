"""Where along a ray to sample: stratified first, then by importance.

Shapes: N batch, M rays, S coarse samples, F fine samples, B = N*M.
"""

import torch

from torch_utils.ops.ray_march import invert_density, smooth_weights


def sample_stratified(
    origins: torch.Tensor, ray_start: float | torch.Tensor, ray_end: float | torch.Tensor, count: int, disparity: bool = False
) -> torch.Tensor:
    """Jittered depths, one per stratum: linspace(start, end, S) + U[0,1) (end-start)/(S-1); samples can exceed ray_end.

    Args:
        origins: [N, M, 3], for shape and device; ray_start, ray_end: world units, numbers or [N, M, 1].
        count: S; disparity: even in 1/depth instead.
    Returns: depths [N, M, S, 1], ascending. Draws once from torch's global generator.
    """
    n, m, _ = origins.shape
    steps = torch.linspace(0, 1, count, device=origins.device)
    if disparity:
        t = steps.reshape(1, 1, count, 1).repeat(n, m, 1, 1)
        t = t + torch.rand_like(t) * (1 / (count - 1))
        return 1 / (1 / ray_start * (1 - t) + 1 / ray_end * t)
    if isinstance(ray_start, torch.Tensor):
        span = ray_end - ray_start  # [N, M, 1]
        depths = (ray_start[:, :, None] + steps.reshape(1, 1, count, 1) * span[:, :, None]).contiguous()
        return depths + torch.rand_like(depths) * (span / (count - 1))[:, :, None]
    depths = torch.linspace(ray_start, ray_end, count, device=origins.device).reshape(1, 1, count, 1).repeat(n, m, 1, 1)
    return depths + torch.rand_like(depths) * ((ray_end - ray_start) / (count - 1))


def sample_importance(depths: torch.Tensor, weights: torch.Tensor, count: int) -> torch.Tensor:
    """Depths drawn in proportion to the coarse pass's smoothed weights.

    The weights are widened (max-pool 2, then average-pool 2) and lifted by 0.01. The histogram covers weights[1:-1] while its edges start
    at the first mid depth, which shifts samples half a bin towards the camera: EG3D's behaviour, kept.

    Args:
        depths: [N, M, S, 1]; weights: [N, M, S-1, 1]; count: F.
    Returns: [N, M, F, 1], detached, unsorted. Draws once from torch's global generator.
    """
    with torch.no_grad():
        n, m, s, _ = depths.shape
        z = depths.reshape(n * m, s)
        mids = 0.5 * (z[:, :-1] + z[:, 1:])  # [B, S-1]
        return sample_pdf(mids, smooth_weights(weights.reshape(n * m, s - 1)), count).reshape(n, m, count, 1)


def sample_pdf(bins: torch.Tensor, weights: torch.Tensor, count: int, eps: float = 1e-5) -> torch.Tensor:
    """Inverse-transform sampling of a piecewise-constant density.

    Args:
        bins: [B, K+2] edges, of which the last is never reached; weights: [B, K]; count: F samples per row.
    Returns: [B, F]. Draws once from torch's global generator.
    """
    return invert_density(bins, weights, uniform_draws(weights, count), eps)


def uniform_draws(rays: torch.Tensor, count: int) -> torch.Tensor:
    """The draws of the importance pass, [B, F] in [0, 1) for rays [B, ...], from torch's global generator."""
    return torch.rand(len(rays), count, device=rays.device)
