"""Along a ray: where to sample, stratified first and then by importance, and how samples are composited, by the midpoint rule of
emission-absorption (Max 1995, as EG3D uses it).

Shapes: N batch, M rays, S samples along a ray (of the coarse pass where there are two), F fine samples, C colour channels, B = N*M.
"""

from collections.abc import Sequence

import torch

from torch_utils.ops.ray_march import interval_weights, invert_density, ray_march, smooth_weights


class MipRayMarcher2(torch.nn.Module):
    """Composite samples that are sorted by depth.

    With mid-point colour c_i, raw density s_i and depth d_i of neighbouring samples, and interval length delta_i:
    sigma_i = softplus(s_i - 1), alpha_i = 1 - exp(-sigma_i delta_i), w_i = alpha_i prod_{j<i} (1 - alpha_j + 1e-10).
    There is no interval from the last sample to infinity. `symmetric` colours go from 0..1 to -1..1 at the end, as EG3D's do.
    """

    def __init__(self, symmetric: bool = True):
        super().__init__()
        self.symmetric = symmetric

    def forward(
        self, colors: torch.Tensor, densities: torch.Tensor, depths: torch.Tensor, rendering_options: dict
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """March.

        Args:
            colors: [N, M, S, C]; densities: [N, M, S, 1] raw; depths: [N, M, S, 1] ascending.
            rendering_options: 'clamp_mode' must be 'softplus'; 'white_back' adds 1 - sum(w) to the colour.
        Returns: colour sum(w c) * 2 - 1, or sum(w c) where not symmetric [N, M, C]; depth sum(w d)/sum(w), clamped to the smallest and
            largest depth of the *whole batch* (so a rendering depends on its batch in empty pixels) [N, M, 1]; weights [N, M, S-1, 1].
        """
        weights, depths_mid = march_weights(densities, depths)
        colors_mid = (colors[:, :, :-1] + colors[:, :, 1:]) / 2
        rgb = (weights * colors_mid).sum(dim=-2)
        depth_range = (depths.min(), depths.max())
        rgb, depth = self.finish(rgb, (weights * depths_mid).sum(dim=-2), weights.sum(dim=2), depth_range, rendering_options)
        return rgb, depth, weights

    def accumulate(
        self, passes: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """March the union of passes whose samples are in any order; colours are neither sorted nor put together.

        Args:
            passes: (colors [N, M, S, C], densities [N, M, S, 1] raw, depths [N, M, S, 1]) of each; S may differ.
        Returns: sum(w c) [N, M, C], sum(w d) [N, M, 1], sum(w) [N, M, 1].
        """
        n, m = passes[0][0].shape[:2]
        densities, depths = (torch.cat([part[i] for part in passes], dim=2).reshape(n * m, -1) for i in (1, 2))  # [N*M, S of all]
        weights, depth_sum, total = ray_march(densities, depths)
        rgb, start = 0, 0
        for colors, _, _ in passes:
            count = colors.shape[2]
            rgb = rgb + _WeightedSum.apply(weights[:, start : start + count], colors.reshape(n * m, count, -1))  # [N*M, C]
            start += count
        return rgb.reshape(n, m, -1), depth_sum.reshape(n, m, 1), total.reshape(n, m, 1)

    def finish(
        self, rgb: torch.Tensor, depth_sum: torch.Tensor, total: torch.Tensor, depth_range: tuple[torch.Tensor, torch.Tensor],
        rendering_options: dict,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Colour [N, M, C] and depth [N, M, 1] as `forward` returns them, from what `accumulate` returns.

        depth_range: smallest and largest depth [] of all samples of the batch.
        """
        if rendering_options.get("clamp_mode", "softplus") != "softplus":
            raise ValueError(f"rendering option clamp_mode: expected 'softplus', got {rendering_options['clamp_mode']!r}.")
        seen = total > 0  # where nothing is, 0 / 0 would make the gradient NaN
        depth = torch.where(seen, depth_sum / torch.where(seen, total, 1), float("inf"))
        if rendering_options.get("white_back", False):
            rgb = rgb + 1 - total
        return rgb * 2 - 1 if self.symmetric else rgb, torch.clamp(depth, *depth_range)


class _WeightedSum(torch.autograd.Function):
    """sum_s v_s c_s of weights v [B, S] and colours c [B, S, C].

    As torch's matrix product, but its gradient for c, a product with an inner size of 1, is a plain multiplication, which is faster.
    """

    @staticmethod
    def forward(ctx, weights, colors):
        ctx.save_for_backward(weights, colors)
        return torch.bmm(weights.unsqueeze(1), colors).squeeze(1)

    @staticmethod
    def backward(ctx, grad):
        weights, colors = ctx.saved_tensors
        grad_weights = torch.bmm(grad.unsqueeze(1), colors.transpose(1, 2)).squeeze(1) if ctx.needs_input_grad[0] else None
        return grad_weights, weights.unsqueeze(2) * grad.unsqueeze(1) if ctx.needs_input_grad[1] else None


def march_weights(densities: torch.Tensor, depths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of the intervals and their mid depths; colours are not needed for either.

    Args:
        densities: [N, M, S, 1] raw; depths: [N, M, S, 1] ascending.
    Returns: weights [N, M, S-1, 1], mid depths [N, M, S-1, 1]. Differentiable in both arguments.
    """
    weights, depths_mid = interval_weights(densities.squeeze(-1), depths.squeeze(-1))
    return weights.unsqueeze(-1), depths_mid.unsqueeze(-1)


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


def sample_importance(depths: torch.Tensor, weights: torch.Tensor, count: int, stratified: bool = False) -> torch.Tensor:
    """Depths drawn in proportion to the coarse pass's smoothed weights.

    The weights are widened (max-pool 2, then average-pool 2) and lifted by 0.01. The histogram covers weights[1:-1] while its edges start
    at the first mid depth, which shifts samples half a bin towards the camera: EG3D's behaviour, kept.

    Args:
        depths: [N, M, S, 1]; weights: [N, M, S-1, 1]; count: F; stratified: as in `uniform_draws`.
    Returns: [N, M, F, 1], detached, unsorted. Draws once from torch's global generator.
    """
    with torch.no_grad():
        n, m, s, _ = depths.shape
        z = depths.reshape(n * m, s)
        mids = 0.5 * (z[:, :-1] + z[:, 1:])  # [B, S-1]
        weights = smooth_weights(weights.reshape(n * m, s - 1))
        return invert_density(mids, weights, uniform_draws(weights, count, stratified), 1e-5).reshape(n, m, count, 1)


def uniform_draws(rays: torch.Tensor, count: int, stratified: bool = False) -> torch.Tensor:
    """The draws of the importance pass, [B, F] in [0, 1) for rays [B, ...], from torch's global generator.

    Args: stratified: one in each of F equal parts, which halves the speckle of small sample counts; not what published networks had.
    """
    draws = torch.rand(len(rays), count, device=rays.device)
    return (draws + torch.arange(count, device=rays.device)) / count if stratified else draws
