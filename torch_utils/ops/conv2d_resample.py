"""2-D convolution with optional upsampling or downsampling, and the modulated convolution of StyleGAN2.

Shapes: N images, I (or C) input and O output channels, G groups, H x W pixels, K (or k) pixels per side of a
    kernel.
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
    """Upsample images, convolve them, and downsample them. The padding is applied once, to the
    upsampled images.

    The steps are linear, so they are reordered to save time: 1x1 kernels convolve the smaller image. KxK
    kernels use a convolution with a stride (down) or a transposed convolution with a stride (up), with the
    low-pass filter before or after it.

    Args:
        x: images [N, I, H, W].
        w: kernels [O, I/G, K, K].
        f: low-pass filter from `upfirdn2d.setup_filter`, used if up > 1 or down > 1. None means no filter.
        up: integer factor of the upsampling, >= 1.
        down: integer factor of the downsampling, >= 1.
        padding: padding of the upsampled image in pixels, see `upfirdn2d`. The padding that the filter needs
            is added to it.
        groups: number of groups G, a divisor of I and O.
        flip_weight: True computes a correlation, which torch calls convolution; False a convolution.
        flip_filter: True computes a correlation with the low-pass filter, False a convolution.
        impl: see `torch_utils.ops.implementations`. It also applies to the filter and to 3x3 convolutions.

    Returns: images [N, O, H', W'], with H' = H*up/down for a padding of K//2.
    Differentiable in x and w, to any order.
    Raises: ValueError for an unknown `impl`, or for "compiled" if the compiled op cannot be used.
    """
    assert x.ndim == w.ndim == 4 and x.shape[1] == w.shape[1] * groups and up >= 1 and down >= 1
    kh, kw = w.shape[2:]
    pads = _parse_padding(padding)
    # The padding that the filter needs is added, so that the argument `padding` is that of the convolution.
    pads = same_size_padding(f, pads, up=up) if up > 1 else pads
    pads = same_size_padding(f, pads, down=down) if down > 1 else pads
    impl = current(impl, "conv2d_resample")

    if up == 1 and down == 1:
        return _convolve(x, w, pads, 1, groups, flip_weight, impl)
    # 1x1 kernel, down: filter and downsample first, then convolve the smaller image.
    if up == 1 and (kh, kw) == (1, 1):
        x = upfirdn2d(x, f, down=down, padding=pads, flip_filter=flip_filter, impl=impl)
        return _convolve(x, w, (0, 0, 0, 0), 1, groups, flip_weight, impl)
    # KxK kernel, down: filter at full size, then a convolution with a
    # stride, which computes only the pixels of the result.
    if up == 1:
        x = upfirdn2d(x, f, padding=pads, flip_filter=flip_filter, impl=impl)
        return _convolve(x, w, (0, 0, 0, 0), down, groups, flip_weight, impl)
    # Up: zero-insertion divides the mean by up^2, hence the gain.
    if (kh, kw) == (1, 1):
        x = _convolve(x, w, (0, 0, 0, 0), 1, groups, flip_weight, impl)
        x = upfirdn2d(x, f, up=up, padding=pads, gain=up**2, flip_filter=flip_filter, impl=impl)
    else:
        x, remaining_pads = _transposed(x, w, up, pads, groups, flip_weight, impl)
        x = upfirdn2d(x, f, padding=remaining_pads, gain=up**2, flip_filter=flip_filter, impl=impl)
    return upfirdn2d(x, f, down=down, flip_filter=flip_filter, impl=impl) if down > 1 else x


def _convolve(
    x: torch.Tensor, w: torch.Tensor, pads: Pads, stride: int, groups: int, flip_weight: bool, impl: str
) -> torch.Tensor:
    """Convolve images with a stride and any padding, with the fastest available function.

    Args:
        x: images [N, I, H, W].
        w: kernels [O, I/G, K, K].
        pads: padding (x_before, x_after, y_before, y_after) in pixels; negative values crop.
        stride: stride along rows and columns.
        groups: number of groups G.
        flip_weight: True computes a correlation, False a convolution.
        impl: see `torch_utils.ops.implementations`.

    Returns: images [N, O, H', W'].
    """
    if not flip_weight and w.shape[2:] != (1, 1):
        w = w.flip([2, 3])
    x0, x1, y0, y1 = pads
    # 3x3 without a stride: Winograd's algorithm
    if (
        w.shape[2:] == (3, 3)
        and stride == groups == 1
        and x0 == x1 == y0 == y1
        and 0 <= x0 <= 2
        and min(x.shape[2:]) + 2 * x0 >= 3
    ):
        return conv3x3(x, w, x0, impl=impl)
    # 1x1: a matrix product
    if (
        w.shape[2:] == (1, 1)
        and stride == groups == 1
        and pads == (0, 0, 0, 0)
        and impl != "ref"
        and x.device.type == "cpu"
    ):
        return _pointwise(x, w)
    # 3x3 with stride 2: minimal filtering, see conv3x3.py
    if w.shape[2:] == (3, 3) and (stride, groups, pads) == (2, 1, (0, 0, 0, 0)):
        return conv3x3_down(x, w, impl=impl)
    # torch's convolution pads both sides equally. Other and negative paddings need a separate step.
    if x0 == x1 and y0 == y1 and x0 >= 0 and y0 >= 0:
        return F.conv2d(x, w, stride=stride, padding=(y0, x0), groups=groups)
    return F.conv2d(F.pad(x, pads), w, stride=stride, groups=groups)


def _pointwise(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Compute a 1x1 convolution as a matrix product, x [N, I, H, W] and w [O, I, 1, 1] -> [N, O, H, W].

    The memory layout of x is kept. torch's 1x1 convolution is slow on a CPU, above all in the backward pass.
    """
    w = w[:, :, 0, 0]  # [O, I]
    # With few channels, each row of an image is a separate product, because one product over all pixels is
    # slow for the gradient of w.
    if is_channels_last(x) and x.shape[1] < 16:
        image_rows = x.permute(0, 2, 3, 1).flatten(0, 1)  # [N*H, W, I]
        # [N*H, W, I] @ [N*H, I, O] -> [N, H, W, O] -> [N, O, H, W], channels-last in memory
        return (
            torch.bmm(image_rows, w.t().expand(len(image_rows), -1, -1))
            .unflatten(0, (len(x), -1))
            .permute(0, 3, 1, 2)
        )
    if is_channels_last(x):
        return linear(x.permute(0, 2, 3, 1), w).permute(0, 3, 1, 2)
    # [O, I] @ [N, I, H W] -> [N, O, H, W]
    return (w @ x.flatten(2)).unflatten(2, x.shape[2:])


def _transposed(
    x: torch.Tensor, w: torch.Tensor, up: int, pads: Pads, groups: int, flip_weight: bool, impl: str
) -> tuple[torch.Tensor, Pads]:
    """Compute zero-insertion and a KxK convolution as one transposed convolution.

    The result of a transposed convolution is larger than the image, so a part of the padding is not needed.

    Args:
        x: images [N, I, H, W].
        w: kernels [O, I/G, K, K].
        up: factor of the upsampling.
        pads: padding (x_before, x_after, y_before, y_after) of the upsampled image.
        groups: number of groups G.
        flip_weight: True computes a correlation, False a convolution.
        impl: see `torch_utils.ops.implementations`.

    Returns: the images, and the remaining padding (x_before, x_after, y_before, y_after), which the low-pass
        filter has to apply.
    """
    kh, kw = w.shape[2:]
    # [O, I/G, K, K] -> [I, O/G, K, K], as conv_transpose2d requires
    w = w.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    if flip_weight:
        w = w.flip([2, 3])
    # The result of a transposed convolution is larger than the image by
    # K - 1 pixels before and K - up pixels after it.
    x0 = pads[0] - (kw - 1)
    x1 = pads[1] - (kw - up)
    y0 = pads[2] - (kh - 1)
    y1 = pads[3] - (kh - up)
    # Pixels (x, y) that conv_transpose2d can crop equally on both sides
    conv_crop = max(min(-x0, -x1), 0), max(min(-y0, -y1), 0)
    if (up, groups, conv_crop, w.shape[2:]) == (2, 1, (0, 0), (3, 3)):
        x = conv3x3_up(x, w, impl=impl)
    else:
        x = F.conv_transpose2d(x, w, stride=up, padding=(conv_crop[1], conv_crop[0]), groups=groups)
    return x, (x0 + conv_crop[0], x1 + conv_crop[0], y0 + conv_crop[1], y1 + conv_crop[1])


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
    """Compute the modulated convolution of StyleGAN2 (Karras et al. 2020, section 2.2).

    The input channels of the kernels w are scaled for each sample n by its style s: w'[n,o,c] = w[o,c]
    s[n,c]. Demodulation multiplies the result by d[n,o] = rsqrt(sum_{c,k} w'^2 + 1e-8). Noise is added after
    demodulation.

    Args:
        x: images [N, C, H, W].
        weight: kernels w [O, C, k, k].
        styles: styles s [N, C].
        noise: noise that is added to the result, in a shape that broadcasts to it; None adds no noise.
        up: factor of the upsampling, see `conv2d_resample`.
        down: factor of the downsampling.
        padding: padding of the upsampled image in pixels.
        resample_filter: low-pass filter of the resampling, see `conv2d_resample`; None: no filter.
        demodulate: True multiplies the result by d.
        flip_weight: True computes a correlation, False a convolution.
        fused_modconv: True computes one convolution in groups with the kernels w' d. False scales x,
            convolves the batch with w, and scales the result. On a CPU, "auto" and "compiled" ignore this
            argument: they scale the kernels for a single sample, and x and the result for a batch.
        impl: see `torch_utils.ops.implementations`. It also applies to the convolution and the filter.

    Returns: images [N, O, H*up/down, W*up/down].
    Differentiable in x, weight, styles and noise.
    Raises: ValueError for an unknown `impl`, or for "compiled" if the compiled op cannot be used.
    """
    impl = current(impl, "modulated_conv2d")
    # In half precision the sum of squares could overflow. Demodulation cancels both factors.
    if x.dtype == torch.float16 and demodulate:
        largest_weight = weight.norm(float("inf"), dim=[1, 2, 3], keepdim=True)
        weight = weight * (1 / math.sqrt(weight[0].numel()) / largest_weight)
        styles = styles / styles.norm(float("inf"), dim=1, keepdim=True)
    resample_kwargs: dict[str, Any] = {
        "f": resample_filter,
        "up": up,
        "down": down,
        "padding": padding,
        "flip_weight": flip_weight,
        "impl": impl,
    }
    is_fused = (
        fused_modconv
        if impl == "ref"
        else len(x) == 1 or (fused_modconv and (impl == "torch" or x.device.type != "cpu"))
    )
    # Kernels w' of each sample, [N, O, C, k, k]; None if they are not needed
    sample_kernels = (
        weight[None] * styles[:, None, :, None, None] if impl == "ref" or (is_fused and len(x) > 1) else None
    )
    demodulation = None  # d, [N, O]
    if demodulate and impl == "ref":
        assert sample_kernels is not None
        demodulation = (sample_kernels.square().sum(dim=[2, 3, 4]) + 1e-8).rsqrt()
    elif demodulate:
        # The same value without a tensor [N, O, C, k, k]: sum_{c,k} w'^2 = sum_c s^2 sum_k w^2
        squared_weight_sum = weight.square().sum(dim=[2, 3])  # sum over the kernel, [O, C]
        demodulation = (styles.square() @ squared_weight_sum.t() + 1e-8).rsqrt()
    # Scaling the input by s and the result by d is equal to a convolution with w' d.
    if not is_fused:
        x = conv2d_resample(
            x=x * styles.to(x.dtype)[:, :, None, None], w=weight.to(x.dtype), **resample_kwargs
        )
        x = x if demodulation is None else x * demodulation.to(x.dtype)[:, :, None, None]
    elif sample_kernels is not None:
        # Each sample has its own kernels, so each sample becomes a
        # group of one convolution, [1, N * C, H, W].
        w = sample_kernels if demodulation is None else sample_kernels * demodulation[:, :, None, None, None]
        y = conv2d_resample(
            x=x.reshape(1, -1, *x.shape[2:]), w=w.flatten(0, 1).to(x.dtype), groups=len(x), **resample_kwargs
        )
        x = y.reshape(len(x), -1, *y.shape[2:])  # [1, N * O, H', W'] -> [N, O, H', W']
    else:
        # A single sample: scale the kernels, without groups.
        scale = styles if demodulation is None else demodulation.t() * styles  # [1 or O, C]
        x = conv2d_resample(x=x, w=(weight * scale[:, :, None, None]).to(x.dtype), **resample_kwargs)
    # The noise is added after demodulation, so that its strength does not depend on the styles.
    return x if noise is None else add_to(x, noise.to(x.dtype))
