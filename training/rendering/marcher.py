"""Emission-absorption ray marching by the midpoint rule (Max 1995, as EG3D uses it).

Shapes: N batch, M rays, S samples along a ray, C colour channels.
"""

import torch


class MipRayMarcher2(torch.nn.Module):
    """Composite samples that are sorted by depth.

    With mid-point colour c_i, raw density s_i and depth d_i of neighbouring samples, and interval length delta_i:
    sigma_i = softplus(s_i - 1), alpha_i = 1 - exp(-sigma_i delta_i), w_i = alpha_i prod_{j<i} (1 - alpha_j + 1e-10).
    There is no interval from the last sample to infinity.
    """

    def forward(
        self, colors: torch.Tensor, densities: torch.Tensor, depths: torch.Tensor, rendering_options: dict
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """March.

        Args:
            colors: [N, M, S, C]; densities: [N, M, S, 1] raw; depths: [N, M, S, 1] ascending.
            rendering_options: 'clamp_mode' must be 'softplus'; 'white_back' adds 1 - sum(w) to the colour.
        Returns: colour sum(w c) * 2 - 1 [N, M, C]; depth sum(w d)/sum(w), clamped to the smallest and largest depth of the *whole batch*
            (so a rendering depends on its batch in empty pixels) [N, M, 1]; weights [N, M, S-1, 1].
        """
        if rendering_options.get("clamp_mode", "softplus") != "softplus":
            raise ValueError(f"rendering option clamp_mode: expected 'softplus', got {rendering_options['clamp_mode']!r}.")
        weights, depths_mid = march_weights(densities, depths)
        colors_mid = (colors[:, :, :-1] + colors[:, :, 1:]) / 2
        rgb = (weights * colors_mid).sum(dim=-2)
        total = weights.sum(dim=2)
        depth = (weights * depths_mid).sum(dim=-2) / total
        depth = torch.nan_to_num(depth, float("inf"))
        depth = torch.clamp(depth, depths.min(), depths.max())
        if rendering_options.get("white_back", False):
            rgb = rgb + 1 - total
        return rgb * 2 - 1, depth, weights


def march_weights(densities: torch.Tensor, depths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of the intervals and their mid depths; colours are not needed for either.

    Args:
        densities: [N, M, S, 1] raw; depths: [N, M, S, 1] ascending.
    Returns: weights [N, M, S-1, 1], mid depths [N, M, S-1, 1]. Differentiable in both arguments.
    """
    deltas = depths[:, :, 1:] - depths[:, :, :-1]
    densities_mid = (densities[:, :, :-1] + densities[:, :, 1:]) / 2  # averaged before the softplus
    depths_mid = (depths[:, :, :-1] + depths[:, :, 1:]) / 2
    sigma = torch.nn.functional.softplus(densities_mid - 1)
    alpha = 1 - torch.exp(-sigma * deltas)
    shifted = torch.cat([torch.ones_like(alpha[:, :, :1]), 1 - alpha + 1e-10], dim=-2)
    return alpha * torch.cumprod(shifted, dim=-2)[:, :, :-1], depths_mid
