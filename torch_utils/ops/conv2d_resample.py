"""2-D convolution with optional up- or downsampling around it, and modulated convolution of StyleGAN2.

Shapes: N batch, I (or C) input and O output channels, G groups, H x W pixels, K or k kernel size.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F

from torch_utils.ops.conv3x3 import conv3x3, conv3x3_down, conv3x3_up
from torch_utils.ops.implementations import add_to, current, is_channels_last
from torch_utils.ops.linear import linear
from torch_utils.ops.upfirdn2d import Pads, Scale, _parse_padding, same_size_padding, upfirdn2d


def conv2d_resample(
    x: torch.Tensor,
    w: torch.Tensor,
    f: torch.Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: Scale = 0,
    groups: int = 1,
    flip_weight: bool = True,
    flip_filter: bool = False,
    impl: str = "auto",
) -> torch.Tensor:
    """Upsample by `up`, convolve, and downsample by `down`. All padding is applied once, before these steps.

    The three steps are linear and commute, so each case runs in its cheapest order. 1x1 kernels convolve the
    smaller image. KxK kernels use a strided convolution (down) or a strided transposed convolution (up), with
    the low-pass filter next to it.
    Args:
        x: [N, I, H, W].
        w: [O, I/G, K, K].
        f: low-pass filter from `upfirdn2d.setup_filter`, used if up > 1 or down > 1. None is the identity.
        up, down: integer factors >= 1.
        padding: as in `upfirdn2d`, with respect to the upsampled image. The padding that the filter needs is
            added.
        groups: G; divides I and O.
        flip_weight: True correlates (what torch calls convolution), False convolves.
        flip_filter: as in `upfirdn2d`.
        impl: see `torch_utils.ops.implementations`; it also holds for the filter and for 3x3 convolutions
            inside.
    Returns: [N, O, H', W'], with H' = H*up/down for "same" padding (K//2).
    Differentiable in x and w, to any order.
    Raises: ValueError for an unknown `impl`.
    """
    assert x.ndim == w.ndim == 4 and x.shape[1] == w.shape[1] * groups and up >= 1 and down >= 1
    kh, kw = w.shape[2:]
    pads = _parse_padding(padding)
    # The filter's own margin is added here, so that the caller's padding concerns the convolution only.
    pads = same_size_padding(f, pads, up=up) if up > 1 else pads
    pads = same_size_padding(f, pads, down=down) if down > 1 else pads
    impl = current(impl, "conv2d_resample")

    if up == 1 and down == 1:
        return _convolve(x, w, pads, 1, groups, flip_weight, impl)
    # 1x1 kernel, down: filter and downsample first, then convolve the smaller image.
    if up == 1 and (kh, kw) == (1, 1):
        x = upfirdn2d(x, f, down=down, padding=pads, flip_filter=flip_filter, impl=impl)
        return _convolve(x, w, (0, 0, 0, 0), 1, groups, flip_weight, impl)
    # KxK kernel, down: filter at full size, then a convolution
    # with stride, which computes only the pixels that stay.
    if up == 1:
        x = upfirdn2d(x, f, padding=pads, flip_filter=flip_filter, impl=impl)
        return _convolve(x, w, (0, 0, 0, 0), down, groups, flip_weight, impl)
    # Up: zero-insertion divides the mean by up^2, hence the gain.
    if (kh, kw) == (1, 1):
        x = _convolve(x, w, (0, 0, 0, 0), 1, groups, flip_weight, impl)
        x = upfirdn2d(x, f, up=up, padding=pads, gain=up**2, flip_filter=flip_filter, impl=impl)
    else:
        x, rest = _transposed(x, w, up, pads, groups, flip_weight, impl)
        x = upfirdn2d(x, f, padding=rest, gain=up**2, flip_filter=flip_filter, impl=impl)
    return upfirdn2d(x, f, down=down, flip_filter=flip_filter, impl=impl) if down > 1 else x


def _convolve(
    x: torch.Tensor, w: torch.Tensor, pads: Pads, stride: int, groups: int, flip_weight: bool, impl: str
) -> torch.Tensor:
    """Convolve with stride and any padding: x [N, I, H, W], w [O, I/G, K, K] -> [N, O, H', W']."""
    if not flip_weight and w.shape[2:] != (1, 1):
        w = w.flip([2, 3])
    x0, x1, y0, y1 = pads
    # 3x3 without stride: Winograd's algorithm.
    if (
        w.shape[2:] == (3, 3)
        and stride == groups == 1
        and x0 == x1 == y0 == y1
        and 0 <= x0 <= 2
        and min(x.shape[2:]) + 2 * x0 >= 3
    ):
        return conv3x3(x, w, x0, impl=impl)
    # 1x1: a matrix product.
    if (
        w.shape[2:] == (1, 1)
        and stride == groups == 1
        and pads == (0, 0, 0, 0)
        and impl != "ref"
        and x.device.type == "cpu"
    ):
        return _pointwise(x, w)
    # 3x3 with stride 2: minimal filtering.
    if w.shape[2:] == (3, 3) and (stride, groups, pads) == (2, 1, (0, 0, 0, 0)):
        return conv3x3_down(x, w, impl=impl)
    # torch pads both sides equally; other paddings, and negative ones, which crop, need a step of their own.
    if x0 == x1 and y0 == y1 and x0 >= 0 and y0 >= 0:
        return F.conv2d(x, w, stride=stride, padding=(y0, x0), groups=groups)
    return F.conv2d(F.pad(x, pads), w, stride=stride, groups=groups)


def _pointwise(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Compute a 1x1 convolution as a matrix product, and keep the memory layout.

    torch's convolution takes a slow path for it on a CPU, above all in the backward pass.
    """
    w = w[:, :, 0, 0]  # [O, I]
    # With few channels, row by row of the image: the gradient of w as one product over all pixels is slow.
    if is_channels_last(x) and x.shape[1] < 16:
        rows = x.permute(0, 2, 3, 1).flatten(0, 1)  # [N*H, W, I]
        # [N*H, W, I] @ [N*H, I, O] -> [N, H, W, O] -> [N, O, H, W], channels-last in memory
        return torch.bmm(rows, w.t().expand(len(rows), -1, -1)).unflatten(0, (len(x), -1)).permute(0, 3, 1, 2)
    if is_channels_last(x):
        return linear(x.permute(0, 2, 3, 1), w).permute(0, 3, 1, 2)
    # [O, I] @ [N, I, H W] -> [N, O, H, W]
    return (w @ x.flatten(2)).unflatten(2, x.shape[2:])


def _transposed(
    x: torch.Tensor, w: torch.Tensor, up: int, pads: Pads, groups: int, flip_weight: bool, impl: str
) -> tuple[torch.Tensor, Pads]:
    """Compute zero-insertion and KxK convolution as one transposed convolution, whose borders replace
    padding.

    Returns: the image, and the remaining padding (before, after along x, then y) for the low-pass filter.
    """
    kh, kw = w.shape[2:]
    # [O, I/G, K, K] -> [I, O/G, K, K], the form of conv_transpose2d.
    w = w.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    if flip_weight:
        w = w.flip([2, 3])
    # The full result of a transposed convolution extends beyond
    # the image by K - 1 pixels before and K - up after it.
    x0 = pads[0] - (kw - 1)
    x1 = pads[1] - (kw - up)
    y0 = pads[2] - (kh - 1)
    y1 = pads[3] - (kh - up)
    inside = max(min(-x0, -x1), 0), max(min(-y0, -y1), 0)  # part that conv_transpose2d can crop itself
    if (up, groups, inside, w.shape[2:]) == (2, 1, (0, 0), (3, 3)):
        x = conv3x3_up(x, w, impl=impl)
    else:
        x = F.conv_transpose2d(x, w, stride=up, padding=(inside[1], inside[0]), groups=groups)
    return x, (x0 + inside[0], x1 + inside[0], y0 + inside[1], y1 + inside[1])


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
    """Convolve with input channels that are scaled per sample (Karras et al. 2020, section 2.2).

    w'[n,o,c] = w[o,c] s[n,c]. Demodulation multiplies the result by d[n,o] = rsqrt(sum_{c,k} w'^2 + 1e-8).
    Noise is added after demodulation.

    Args:
        x: [N, C, H, W].
        weight: [O, C, k, k].
        styles: s, [N, C].
        noise: broadcast to the output, or None.
        up, down, padding, flip_weight: see `conv2d_resample`.
        resample_filter: low-pass filter of `conv2d_resample`.
        demodulate: multiply by d.
        fused_modconv: use one grouped convolution with w' d. Otherwise scale x, convolve once for the batch,
            and scale the result. On a CPU "auto" and "compiled" ignore this: for a single sample the kernels
            are scaled, which needs no groups, for a batch never.
        impl: see `torch_utils.ops.implementations`; it also holds for the convolution and the filter inside.
    Returns: [N, O, H*up/down, W*up/down]. Differentiable in x, weight, styles, noise.
    Raises: ValueError for an unknown `impl`.
    """
    impl = current(impl, "modulated_conv2d")
    # Half precision: keep the sum of squares in its range. Demodulation cancels both factors.
    if x.dtype == torch.float16 and demodulate:
        largest = weight.norm(float("inf"), dim=[1, 2, 3], keepdim=True)
        weight = weight * (1 / math.sqrt(weight[0].numel()) / largest)
        styles = styles / styles.norm(float("inf"), dim=1, keepdim=True)
    resample: dict[str, Any] = {
        "f": resample_filter,
        "up": up,
        "down": down,
        "padding": padding,
        "flip_weight": flip_weight,
        "impl": impl,
    }
    fused = (
        fused_modconv
        if impl == "ref"
        else len(x) == 1 or (fused_modconv and (impl == "torch" or x.device.type != "cpu"))
    )
    # Kernels of each sample, w' [N, O, C, k, k], only where they are needed as such.
    sample_kernels = (
        weight[None] * styles[:, None, :, None, None] if impl == "ref" or (fused and len(x) > 1) else None
    )
    coefficients = None  # d, [N, O]
    if demodulate and impl == "ref":
        assert sample_kernels is not None
        coefficients = (sample_kernels.square().sum(dim=[2, 3, 4]) + 1e-8).rsqrt()
    elif demodulate:
        # The same without [N, O, C, k, k]: sum_{c,k} w'^2 = sum_c s^2 sum_k w^2.
        energy = weight.square().sum(dim=[2, 3])  # sum over the kernel, [O, C]
        coefficients = (styles.square() @ energy.t() + 1e-8).rsqrt()
    # Scaling inputs by s and outputs by d equals a convolution with w' d.
    if not fused:
        x = conv2d_resample(x=x * styles.to(x.dtype)[:, :, None, None], w=weight.to(x.dtype), **resample)
        x = x if coefficients is None else x * coefficients.to(x.dtype)[:, :, None, None]
    elif sample_kernels is not None:
        # Each sample has its own kernels: the batch becomes the groups of one convolution, [1, N * C, H, W].
        w = sample_kernels if coefficients is None else sample_kernels * coefficients[:, :, None, None, None]
        y = conv2d_resample(
            x=x.reshape(1, -1, *x.shape[2:]), w=w.flatten(0, 1).to(x.dtype), groups=len(x), **resample
        )
        x = y.reshape(len(x), -1, *y.shape[2:])  # [1, N * O, H', W'] -> [N, O, H', W']
    else:
        # A single sample: scale the kernels, without groups.
        scale = styles if coefficients is None else coefficients.t() * styles  # [1 or O, C]
        x = conv2d_resample(x=x, w=(weight * scale[:, :, None, None]).to(x.dtype), **resample)
    # After demodulation, so that the strength of the noise does not depend on the styles.
    return x if noise is None else add_to(x, noise.to(x.dtype))
