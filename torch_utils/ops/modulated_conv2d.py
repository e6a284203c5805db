"""Convolution whose input channels are scaled per sample, the layer of StyleGAN2's synthesis network.

Shapes: N batch, C input and O output channels, H x W pixels, k kernel size.
"""

import math

import torch

from torch_utils.ops.conv2d_resample import conv2d_resample
from torch_utils.ops.implementations import add_to, current


def modulated_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    styles: torch.Tensor,
    noise: torch.Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: int = 0,
    resample_filter: torch.Tensor | None = None,
    demodulate: bool = True,
    flip_weight: bool = True,
    fused_modconv: bool = True,
    impl: str = "auto",
) -> torch.Tensor:
    """Convolution whose input channels are scaled per sample (Karras et al. 2020, section 2.2).

    w'[n,o,c] = w[o,c] s[n,c]; demodulated by d[n,o] = rsqrt(sum_{c,k} w'^2 + 1e-8); noise is added after demodulation.

    Args:
        x: [N, C, H, W]; weight: [O, C, k, k]; styles: [N, C].
        noise: broadcast to the output, or None.
        fused_modconv: one grouped convolution with w'd; otherwise scale x, convolve once for the batch, scale the result. "auto" and
            "compiled" choose by themselves on a CPU: a single sample has its kernels scaled, which needs no groups, a batch never.
        impl: see `torch_utils.ops.implementations`; the same for the convolution and the filter inside.
    Returns: [N, O, H*up/down, W*up/down]. Differentiable in x, weight, styles, noise.
    Raises: ValueError for an unknown `impl`.
    """
    impl = current(impl, "modulated_conv2d")
    if x.dtype == torch.float16 and demodulate:  # keep the sum of squares inside half's range; demodulation cancels both factors
        largest = weight.norm(float("inf"), dim=[1, 2, 3], keepdim=True)
        weight = weight * (1 / math.sqrt(weight[0].numel()) / largest)
        styles = styles / styles.norm(float("inf"), dim=1, keepdim=True)
    resample = {"f": resample_filter, "up": up, "down": down, "padding": padding, "flip_weight": flip_weight, "impl": impl}
    fused = fused_modconv if impl == "ref" else len(x) == 1 or (fused_modconv and (impl == "torch" or x.device.type != "cpu"))
    own = weight[None] * styles[:, None, :, None, None] if impl == "ref" or (fused and len(x) > 1) else None  # w', [N, O, C, k, k]
    coefficients = None  # d, [N, O]
    if demodulate and impl == "ref":
        coefficients = (own.square().sum(dim=[2, 3, 4]) + 1e-8).rsqrt()
    elif demodulate:  # the same without [N, O, C, k, k]: sum_{c,k} w'^2 = sum_c s^2 sum_k w^2
        energy = weight.square().sum(dim=[2, 3])  # [O, C]
        coefficients = (styles.square() @ energy.t() + 1e-8).rsqrt()
    if not fused:
        x = conv2d_resample(x=x * styles.to(x.dtype)[:, :, None, None], w=weight.to(x.dtype), **resample)
        x = x if coefficients is None else x * coefficients.to(x.dtype)[:, :, None, None]
    elif own is not None:  # each sample with its own kernels, as groups of one convolution
        w = own if coefficients is None else own * coefficients[:, :, None, None, None]
        y = conv2d_resample(x=x.reshape(1, -1, *x.shape[2:]), w=w.flatten(0, 1).to(x.dtype), groups=len(x), **resample)
        x = y.reshape(len(x), -1, *y.shape[2:])
    else:
        scale = styles if coefficients is None else coefficients.t() * styles  # [1 or O, C]
        x = conv2d_resample(x=x, w=(weight * scale[:, :, None, None]).to(x.dtype), **resample)
    return x if noise is None else add_to(x, noise.to(x.dtype))
