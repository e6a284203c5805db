"""Ray marching on scalars: compositing weights of samples in any order, and depths of the importance pass.

Sort the samples by depth. With density s and depth d, neighbouring samples bound intervals (Max 1995, as in
EG3D):

    delta_k = d_{k+1} - d_k
    sigma_k = softplus((s_k + s_{k+1}) / 2 - 1)
    alpha_k = 1 - exp(-sigma_k delta_k)
    w_k     = alpha_k prod_{j<k} (1 - alpha_j + 1e-10)

Colours are composited as sum_k w_k (c_k + c_{k+1}) / 2 = sum_s v_s c_s with the sample weights v_s = (w_{s-1}
+ w_s) / 2. Colours therefore need not be sorted.

Shapes: B rays, S samples along a ray, F fine samples.
"""

import torch

from torch_utils.ops.implementations import alike, choose, define

_CUDA_SAMPLES = 512  # largest number of samples along a ray in the CUDA kernels


def ray_march(
    densities: torch.Tensor, depths: torch.Tensor, impl: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute compositing weights of samples in any order.

    Args:
        densities: [B, S] raw.
        depths: [B, S], world units, in any order. Equal depths keep their order.
        impl: see `implementations`.
    Returns: sample weights v [B, S] in the order of the arguments, sum_k w_k (d_k + d_{k+1})/2 [B], sum_k w_k
        [B].
    Differentiable in densities and depths, to any order. (The compiled op: once, in densities; everything
    else goes through plain torch.)
    Raises: ValueError for an unknown `impl`.
    """
    # The compiled op has no gradient for depths.
    applies = _applies(densities, depths) and not (depths.requires_grad and torch.is_grad_enabled())
    if choose("ray_march", impl, "ray_march", densities.device.type, applies) == "compiled":
        return torch.ops.eg3d_rlhf.ray_march(densities.contiguous(), depths.contiguous())
    return ray_march_ref(densities, depths)


def ray_march_ref(
    densities: torch.Tensor, depths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the definition, which is also the torch path: sort, march, scatter back."""
    # Stable: samples of equal depth keep their order, as in the compiled op.
    depths, order = depths.sort(dim=-1, stable=True)
    weights, mids = interval_weights(densities.gather(-1, order), depths)
    halves = weights / 2
    # v_s = (w_{s-1} + w_s) / 2; the first and the last sample have one interval each.
    at_sorted = torch.nn.functional.pad(halves, (0, 1)) + torch.nn.functional.pad(halves, (1, 0))
    return (
        torch.zeros_like(at_sorted).scatter(-1, order, at_sorted),  # back to the order of the arguments
        (weights * mids).sum(dim=-1),
        weights.sum(dim=-1),
    )


def interval_weights(densities: torch.Tensor, depths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weights of the intervals and their mid depths.

    Args:
        densities: [..., S] raw.
        depths: [..., S] ascending.
    Returns: w [..., S-1], mid depths [..., S-1]. Differentiable in both arguments.
    """
    deltas = depths[..., 1:] - depths[..., :-1]
    densities_mid = (densities[..., :-1] + densities[..., 1:]) / 2  # averaged before the softplus
    depths_mid = (depths[..., :-1] + depths[..., 1:]) / 2
    sigma = torch.nn.functional.softplus(densities_mid - 1)
    alpha = 1 - torch.exp(-sigma * deltas)
    # The transmittance before interval k: the product over the intervals in front of it, 1 for the first.
    shifted = torch.cat([torch.ones_like(alpha[..., :1]), 1 - alpha + 1e-10], dim=-1)
    return alpha * torch.cumprod(shifted, dim=-1)[..., :-1], depths_mid


def importance_depths(
    densities: torch.Tensor, depths: torch.Tensor, u: torch.Tensor, impl: str = "auto"
) -> torch.Tensor:
    """Return the depths of the fine samples from the coarse pass.

    Weights of the coarse pass, their smoothing and the inverse-transform sampling are one op. The histogram
    has the weights without the first and the last one, while its edges begin at the first mid depth. This
    shifts samples half a bin towards the camera. EG3D does the same; it is kept.

    Args:
        densities: [B, S] raw.
        depths: [B, S] ascending.
        u: [B, F] uniform random numbers in [0, 1).
        impl: see `implementations`.
    Returns: [B, F] in the order of u, detached.
    Raises: ValueError for an unknown `impl`.
    """
    applies = _applies(densities, depths, u)
    assert u.ndim == 2 and len(u) == len(depths)
    chosen = choose("importance_depths", impl, "ray_march", densities.device.type, applies)
    # EG3D's fine depths carry no gradient, either.
    with torch.no_grad():
        if chosen == "compiled":
            return torch.ops.eg3d_rlhf.importance_depths(
                densities.detach().contiguous(), depths.detach().contiguous(), u.contiguous()
            )
        weights, mids = interval_weights(densities, depths)
        return invert_density(mids, smooth_weights(weights), u)


def smooth_weights(weights: torch.Tensor) -> torch.Tensor:
    """Smooth interval weights [B, S-1] and return all but the first and the last, [B, S-3].

    The weights are widened (max-pool 2, then average-pool 2) and raised by 0.01. With S = 2 nothing remains.
    """
    # Padding makes S windows of the S - 1 weights; the average pool makes S - 1 of them again.
    widened = torch.nn.functional.max_pool1d(weights.unsqueeze(1), 2, 1, padding=1)
    return (torch.nn.functional.avg_pool1d(widened, 2, 1).squeeze(1) + 0.01)[:, 1:-1]


def invert_density(
    bins: torch.Tensor, weights: torch.Tensor, u: torch.Tensor, eps: float = 1e-5
) -> torch.Tensor:
    """Sample a piecewise-constant density by the inverse transform.

    Args:
        bins: [B, K+2] edges, of which the last is never reached.
        weights: [B, K].
        u: [B, F] in [0, 1).
        eps: added to weights; narrower steps of the distribution count as empty.
    Returns: [B, F].
    """
    k = weights.shape[1]
    weights = weights + eps  # no bin is impossible, as in EG3D
    pdf = weights / weights.sum(dim=-1, keepdim=True)
    cdf = torch.cat([torch.zeros_like(bins[:, :1]), torch.cumsum(pdf, dim=-1)], dim=-1)  # [B, K+1]
    # The bin whose range of the distribution contains u.
    index = torch.searchsorted(cdf, u.contiguous(), right=True)
    below = (index - 1).clamp_min(0)
    above = index.clamp_max(k)
    cdf_below = cdf.gather(1, below)
    cdf_above = cdf.gather(1, above)
    bin_below = bins.gather(1, below)
    bin_above = bins.gather(1, above)
    width = cdf_above - cdf_below
    # In an empty bin the quotient below would be 0 / 0; its lower edge is returned instead.
    width = torch.where(width < eps, torch.ones_like(width), width)
    # Linear inside the bin, since the density is constant there.
    return bin_below + (u - cdf_below) / width * (bin_above - bin_below)


def _applies(densities: torch.Tensor, depths: torch.Tensor, *others: torch.Tensor) -> bool:
    """Return whether the compiled op covers these tensors."""
    assert densities.ndim == 2 and densities.shape == depths.shape and densities.shape[1] >= 2
    return alike(densities, depths, *others) and (
        densities.device.type != "cuda" or densities.shape[1] <= _CUDA_SAMPLES
    )


def _gradients(ctx, *grads):
    """Return the gradient for densities. `ray_march` does not call the compiled op if depths need one."""
    densities, depths = ctx.saved_tensors
    # Gradients are enabled here only if this gradient is to be differentiated again.
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
