"""Ray marching: compositing weights of samples in any order, and depths of the samples of the fine pass.

The fine pass is the second pass of rendering. Its samples are placed by the densities of the first, coarse
pass.

Volume rendering follows Max 1995, "Optical models for direct volume rendering", as in EG3D (Chan et al.
2022). The samples of a ray are sorted by depth. Two neighbouring samples k and k + 1 with densities s and
depths d bound an interval with the weight w_k:

    delta_k = d_{k+1} - d_k
    sigma_k = softplus((s_k + s_{k+1}) / 2 - 1)
    alpha_k = 1 - exp(-sigma_k delta_k)
    w_k     = alpha_k prod_{j<k} (1 - alpha_j + 1e-10)

The colour of the ray is sum_k w_k (c_k + c_{k+1}) / 2 = sum_k v_k c_k, with the colours c_k and the weights
of samples v_k = (w_{k-1} + w_k) / 2. Colours therefore need not be sorted.

Shapes: B rays, S samples along a ray, F samples of the fine pass, K bins.
"""

import torch

from torch_utils.ops.implementations import alike, choose, define

_CUDA_SAMPLES = 512  # largest number of samples along a ray in the CUDA kernels


def ray_march(
    densities: torch.Tensor, depths: torch.Tensor, impl: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the compositing weights of samples in any order.

    Args:
        densities: raw densities s [B, S].
        depths: depths d [B, S] in world units, in any order. Samples of equal depth are not reordered.
        impl: see `implementations`.

    Returns: three tensors. The first contains the weights v [B, S] of the samples, in the order of the
        arguments; the second the weighted depths [B], sum_k w_k (d_k + d_{k+1}) / 2; and the third the
        accumulated opacities [B], sum_k w_k.
    Differentiable in densities and depths, to any order. (Only the first derivative with respect to densities
        is compiled; torch computes the others.)
    Raises: ValueError for an unknown `impl`, or for "compiled" if the compiled op cannot be used.
    """
    # The compiled op has no gradient for depths.
    is_supported = _applies(densities, depths) and not (depths.requires_grad and torch.is_grad_enabled())
    if choose("ray_march", impl, "ray_march", densities.device.type, is_supported) == "compiled":
        return torch.ops.eg3d_rlhf.ray_march(densities.contiguous(), depths.contiguous())
    return ray_march_ref(densities, depths)


def ray_march_ref(
    densities: torch.Tensor, depths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the definition of `ray_march`: sort the samples, compute weights, and restore the order.

    This is also the implementation in plain torch.
    """
    # Stable: samples of equal depth are not reordered, as in the compiled op.
    depths, depth_order = depths.sort(dim=-1, stable=True)
    weights, centre_depths = interval_weights(densities.gather(-1, depth_order), depths)
    half_weights = weights / 2
    # v_k = (w_{k-1} + w_k) / 2, where the padding supplies 0 for the
    # missing intervals of the first and last sample
    sorted_weights = torch.nn.functional.pad(half_weights, (0, 1)) + torch.nn.functional.pad(
        half_weights, (1, 0)
    )
    return (
        # Back to the order of the arguments
        torch.zeros_like(sorted_weights).scatter(-1, depth_order, sorted_weights),
        (weights * centre_depths).sum(dim=-1),
        weights.sum(dim=-1),
    )


def interval_weights(densities: torch.Tensor, depths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the weights of the intervals and the depths of their centres. Differentiable in densities and
    depths.

    Args:
        densities: raw densities [..., S].
        depths: depths [..., S] in ascending order.

    Returns: the weights w [..., S-1], and the depths of the centres [..., S-1].
    """
    deltas = depths[..., 1:] - depths[..., :-1]
    densities_mid = (densities[..., :-1] + densities[..., 1:]) / 2  # averaged before the softplus
    depths_mid = (depths[..., :-1] + depths[..., 1:]) / 2
    sigma = torch.nn.functional.softplus(densities_mid - 1)
    alpha = 1 - torch.exp(-sigma * deltas)
    # The product of the first k factors is the transmittance in front of interval k, 1 for the first.
    transmittance_factors = torch.cat([torch.ones_like(alpha[..., :1]), 1 - alpha + 1e-10], dim=-1)
    return alpha * torch.cumprod(transmittance_factors, dim=-1)[..., :-1], depths_mid


def importance_depths(
    densities: torch.Tensor, depths: torch.Tensor, u: torch.Tensor, impl: str = "auto"
) -> torch.Tensor:
    """Sample the depths of the fine pass from the densities of the coarse pass.

    The weights of the coarse pass are smoothed and used as a histogram, from which depths are sampled by the
    inverse transform. As in EG3D, the histogram contains the weights without the first and the last one,
    although its edges begin at the first centre. This shifts the samples by half a bin towards the camera.

    Args:
        densities: raw densities [B, S] of the coarse pass.
        depths: depths [B, S] of the coarse pass in ascending order.
        u: uniform random numbers [B, F] in [0, 1).
        impl: see `implementations`.

    Returns: depths [B, F] in the order of u, without gradients.
    Raises: ValueError for an unknown `impl`, or for "compiled" if the compiled op cannot be used.
    """
    is_supported = _applies(densities, depths, u)
    assert u.ndim == 2 and len(u) == len(depths)
    implementation_name = choose("importance_depths", impl, "ray_march", densities.device.type, is_supported)
    # As in EG3D, the depths have no gradient.
    with torch.no_grad():
        if implementation_name == "compiled":
            return torch.ops.eg3d_rlhf.importance_depths(
                densities.detach().contiguous(), depths.detach().contiguous(), u.contiguous()
            )
        weights, centre_depths = interval_weights(densities, depths)
        return invert_density(centre_depths, smooth_weights(weights), u)


def smooth_weights(weights: torch.Tensor) -> torch.Tensor:
    """Smooth the weights of intervals [B, S-1], and return all but the first and the last one, [B, S-3].

    As in EG3D, a max-pooling and an average-pooling with a window of 2 are applied, and 0.01 is added. The
    result is empty for S = 2 and S = 3.
    """
    # The max-pooling with padding has S results for S - 1 weights, and the average-pooling has S - 1 again.
    largest_weights = torch.nn.functional.max_pool1d(weights.unsqueeze(1), 2, 1, padding=1)
    return (torch.nn.functional.avg_pool1d(largest_weights, 2, 1).squeeze(1) + 0.01)[:, 1:-1]


def invert_density(
    bins: torch.Tensor, weights: torch.Tensor, u: torch.Tensor, eps: float = 1e-5
) -> torch.Tensor:
    """Sample a piecewise-constant density by the inverse transform.

    Args:
        bins: edges [B, K+2] of the bins in ascending order; the last edge is not used.
        weights: weights [B, K] of the bins, which need not sum to 1.
        u: uniform random numbers [B, F] in [0, 1).
        eps: constant that is added to the weights. Bins with a probability below eps count as empty.

    Returns: samples [B, F].
    """
    bin_count = weights.shape[1]
    weights = weights + eps  # as in EG3D, so that every bin has a positive probability
    pdf = weights / weights.sum(dim=-1, keepdim=True)
    cdf = torch.cat([torch.zeros_like(bins[:, :1]), torch.cumsum(pdf, dim=-1)], dim=-1)  # [B, K+1]
    # The bin whose range of the distribution contains u.
    upper_edge_index = torch.searchsorted(cdf, u.contiguous(), right=True)
    lower_index = (upper_edge_index - 1).clamp_min(0)
    upper_index = upper_edge_index.clamp_max(bin_count)
    cdf_below = cdf.gather(1, lower_index)
    cdf_above = cdf.gather(1, upper_index)
    lower_edge = bins.gather(1, lower_index)
    upper_edge = bins.gather(1, upper_index)
    cdf_width = cdf_above - cdf_below
    # In an empty bin the quotient below would be 0 / 0; its lower edge is returned instead.
    cdf_width = torch.where(cdf_width < eps, torch.ones_like(cdf_width), cdf_width)
    # Linear inside the bin, since the density is constant there.
    return lower_edge + (u - cdf_below) / cdf_width * (upper_edge - lower_edge)


def _applies(densities: torch.Tensor, depths: torch.Tensor, *other_tensors: torch.Tensor) -> bool:
    """Return True if the compiled op supports these tensors."""
    assert densities.ndim == 2 and densities.shape == depths.shape and densities.shape[1] >= 2
    return alike(densities, depths, *other_tensors) and (
        densities.device.type != "cuda" or densities.shape[1] <= _CUDA_SAMPLES
    )


def _gradients(ctx, *grads):
    """Return the gradient of the densities, and None for the depths.

    `ray_march` does not use the compiled op if the depths need a gradient.
    """
    densities, depths = ctx.saved_tensors
    # Gradients are enabled here only if this gradient will be differentiated again. torch then computes it.
    if torch.is_grad_enabled():
        return (
            torch.autograd.grad(
                ray_march_ref(densities, depths.detach()), densities, grads, create_graph=True
            )[0],
            None,
        )
    return torch.ops.eg3d_rlhf.ray_march_backward(*(g.contiguous() for g in grads), densities, depths), None


define(
    "ray_march(Tensor densities, Tensor depths) -> (Tensor, Tensor, Tensor)",
    lambda densities, depths: (
        torch.empty_like(densities),
        *(densities.new_empty(len(densities)) for _ in range(2)),
    ),
    _gradients,
    lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
define(
    "ray_march_backward(Tensor grad_sample_weights, Tensor grad_depth_sum, Tensor grad_total, Tensor"
    " densities, Tensor depths) -> Tensor",
    lambda *tensors: torch.empty_like(tensors[3]),
)
define(
    "importance_depths(Tensor densities, Tensor depths, Tensor u) -> Tensor",
    lambda densities, depths, u: torch.empty_like(u),
)
