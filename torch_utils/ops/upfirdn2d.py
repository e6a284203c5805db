"""Resample images with a FIR filter, as the StyleGAN networks do: insert zeros, pad, filter, and drop pixels.

Shapes: N images, C channels, H x W pixels, K taps of a filter (KH x KW in two dimensions). Paddings are in
pixels of the image with inserted zeros; negative paddings crop.

All functions are linear in x and therefore differentiable in x to any order. The filter is a constant.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from torch_utils.ops.implementations import COMPILED_DTYPES, choose, define, dense, like_layout

Scale = int | Sequence[int]
Pair = tuple[int, int]  # (x, y)
Pads = tuple[int, int, int, int]  # (x_before, x_after, y_before, y_after)
# Smallest number of taps for which a filter is applied along each axis separately. For a shorter filter, one
# pass with its outer product is faster than two passes.
SEPARABLE_FROM = 8


def setup_filter(
    f: torch.Tensor | np.ndarray | Sequence | float | None,
    device: torch.device | str = "cpu",
    normalize: bool = True,
    flip_filter: bool = False,
    gain: float = 1,
    separable: bool | None = None,
) -> torch.Tensor:
    """Prepare a FIR filter for the functions below.

    Args:
        f: taps [K] or [KH, KW], or one number; None is the filter that changes nothing.
        device: device of the result.
        normalize: True scales the taps so that their sum is 1.
        flip_filter: True reverses the taps.
        gain: factor of the two-dimensional filter.
        separable: True keeps taps [K], which are applied along rows and columns. False replaces them by their
            outer product. None keeps the taps if there are at least 8 of them.

    Returns: taps, float32 [K] or [KH, KW].
    """
    if f is None:
        f = 1.0
    elif isinstance(f, torch.Tensor):
        f = f.detach().cpu()
    taps = torch.as_tensor(np.asarray(f), dtype=torch.float32, device="cpu")
    assert taps.ndim <= 2 and taps.numel() > 0
    taps = taps.reshape(1) if taps.ndim == 0 else taps  # a scalar is a filter of one tap
    if separable is None:
        separable = taps.ndim == 1 and taps.numel() >= SEPARABLE_FROM
    assert not (separable and taps.ndim == 2)
    if taps.ndim == 1 and not separable:
        taps = torch.outer(taps, taps)
    if normalize:
        taps = taps / taps.sum()
    if flip_filter:
        taps = taps.flip(list(range(taps.ndim)))
    # 1-D taps are applied twice, so each application has the square root of the gain.
    return (taps * gain ** (taps.ndim / 2)).to(device)


def upfirdn2d(
    x: torch.Tensor,
    f: torch.Tensor | None,
    up: Scale = 1,
    down: Scale = 1,
    padding: Scale = 0,
    flip_filter: bool = False,
    gain: float = 1,
    impl: str = "auto",
) -> torch.Tensor:
    """Resample images with a FIR filter: insert zeros, pad, filter, and keep every down-th pixel.

    Along each axis, y[n] = sum_m f[K-1-m] u[n*down + m - pad], where pad is the padding before the image,
    u[i*up] = x[i], and u is 0 elsewhere. There are up - 1 zeros after every pixel, also after the last one.

    Args:
        x: images [N, C, H, W].
        f: taps from `setup_filter`, [K] for rows and columns or [KH, KW]; None does not filter.
        up: factor of the upsampling, >= 1, or a pair of factors (x, y).
        down: factor of the downsampling, >= 1, or a pair of factors (x, y).
        padding: padding in pixels: one number, (x, y), or (x_before, x_after, y_before, y_after). Negative
            numbers crop.
        flip_filter: False computes a convolution, True a correlation.
        gain: factor of the result.
        impl: see `torch_utils.ops.implementations`. "compiled" needs float32 or float64, on CUDA also float16
            or bfloat16.

    Returns: images [N, C, H', W'] with H' = (H*up + y_before + y_after - K) // down + 1.
    Differentiable in x, to any order, but not in f.
    Raises: ValueError if the padded image is smaller than the filter, for an unknown `impl`, or for
        "compiled" if the compiled op cannot be used.
    """
    assert x.ndim == 4 and (f is None or f.ndim in (1, 2))
    up = _parse_scaling(up)
    down = _parse_scaling(down)
    padding = _parse_padding(padding)
    # detach(), because the filter is a constant.
    f = torch.ones([1, 1], device=x.device) if f is None else f.detach()
    for padded_length, k in zip(_padded_size(x, up, padding), filter_size(f), strict=True):
        if padded_length < k:
            raise ValueError(
                f"upfirdn2d: after padding, images of the shape {list(x.shape)} have {padded_length} pixels"
                f" along an axis, but the filter needs at least {k}. Use larger images"
                " or a larger padding."
            )
    is_supported = x.dtype in COMPILED_DTYPES[x.device.type == "cuda"] and x.numel() > 0
    implementation_name = choose("upfirdn2d", impl, "upfirdn2d", x.device.type, is_supported)
    if implementation_name != "compiled":
        resample = upfirdn2d_ref if implementation_name == "ref" else _upfirdn2d_torch
        return resample(x, f, up, down, padding, flip_filter, gain)
    return torch.ops.eg3d_rlhf.upfirdn2d(
        dense(x), f.to(x.dtype).contiguous(), up, down, padding, flip_filter, float(gain)
    )


def _padded_size(x: torch.Tensor, up: Pair, padding: Pads) -> Pair:
    """Return the (width, height) of images x in pixels after zero-insertion and padding."""
    x0, x1, y0, y1 = padding
    return x.shape[3] * up[0] + x0 + x1, x.shape[2] * up[1] + y0 + y1


def upfirdn2d_ref(
    x: torch.Tensor, f: torch.Tensor, up: Pair, down: Pair, padding: Pads, flip_filter: bool, gain: float
) -> torch.Tensor:
    """Compute the definition of `upfirdn2d`: insert zeros, pad or crop, filter each channel, drop pixels."""
    n, channel_count, height, width = x.shape
    if up != (1, 1):
        # Zeros after every pixel: [N, C, H, 1, W, 1] -> [N, C, H, up, W, up] -> [N, C, H up, W up].
        x = x.reshape(n, channel_count, height, 1, width, 1)
        x = F.pad(x, (0, up[0] - 1, 0, 0, 0, up[1] - 1)).reshape(
            n, channel_count, height * up[1], width * up[0]
        )
    x = F.pad(x, padding) if any(padding) else x  # F.pad crops for negative values
    f = (f * gain ** (f.ndim / 2)).to(x.dtype)
    # torch's conv2d computes a correlation, so a convolution needs the flipped filter.
    f = f if flip_filter else f.flip(list(range(f.ndim)))
    # 1-D taps are applied along the width [1, K] and then along the height [K, 1].
    for kernel in (f,) if f.ndim == 2 else (f[None, :], f[:, None]):
        # A convolution in groups applies the same kernel to each channel separately.
        x = F.conv2d(x, kernel.expand(channel_count, 1, *kernel.shape), groups=channel_count)
    return x[:, :, :: down[1], :: down[0]]


def _upfirdn2d_torch(
    x: torch.Tensor, f: torch.Tensor, up: Pair, down: Pair, padding: Pads, flip_filter: bool, gain: float
) -> torch.Tensor:
    """Compute `upfirdn2d` in plain torch by one convolution of each channel, or by two for 1-D taps."""
    f = (f * gain ** (f.ndim / 2)).to(x.dtype)
    if f.ndim == 2:
        return _filter_pass(x, f, up, down, padding, flip_filter)
    x = _filter_pass(x, f[None, :], (up[0], 1), (down[0], 1), (*padding[:2], 0, 0), flip_filter)  # along W
    return _filter_pass(x, f[:, None], (1, up[1]), (1, down[1]), (0, 0, *padding[2:]), flip_filter)  # along H


def _filter_pass(
    x: torch.Tensor, f: torch.Tensor, up: Pair, down: Pair, padding: Pads, flip_filter: bool
) -> torch.Tensor:
    """Compute `upfirdn2d` for taps [KH, KW] of the dtype of x.

    Without zero-insertion, this is a correlation with a stride. With zero-insertion, it is a transposed
    convolution with the output z[j] = sum_i x[i] f[j - i*up]. The result is y[n] = z[n + K-1 - pad], where
    pad is the padding before the image. The padding is thus a cropping of z, and no zeros are multiplied.
    """
    channel_count = x.shape[1]
    kh, kw = f.shape
    x0, x1, y0, y1 = padding
    if up == (1, 1):
        kernel = (f if flip_filter else f.flip([0, 1])).expand(channel_count, 1, kh, kw)
        # Padding (x, y) that conv2d can apply equally on both sides; the remaining padding is applied before
        conv_padding = max(min(x0, x1), 0), max(min(y0, y1), 0)
        remaining_padding = (
            x0 - conv_padding[0],
            x1 - conv_padding[0],
            y0 - conv_padding[1],
            y1 - conv_padding[1],
        )
        x = F.pad(x, remaining_padding) if any(remaining_padding) else x
        return F.conv2d(
            x,
            kernel,
            stride=(down[1], down[0]),
            padding=(conv_padding[1], conv_padding[0]),
            groups=channel_count,
        )
    # A transposed convolution uses the kernel in the opposite direction, so the flip is the opposite of that
    # above.
    kernel = (f.flip([0, 1]) if flip_filter else f).expand(channel_count, 1, kh, kw)
    # Pixels of z that are cropped at (x_before, x_after, y_before, y_after)
    crop_pixels = (kw - 1 - x0, kw - up[0] - x1, kh - 1 - y0, kh - up[1] - y1)
    # Pixels (x, y) that conv_transpose2d can crop equally on both
    # sides; the remaining ones are cropped afterwards
    conv_crop = max(min(crop_pixels[:2]), 0), max(min(crop_pixels[2:]), 0)
    x = F.conv_transpose2d(
        x, kernel, stride=(up[1], up[0]), padding=(conv_crop[1], conv_crop[0]), groups=channel_count
    )
    remaining_padding = (
        conv_crop[0] - crop_pixels[0],
        conv_crop[0] - crop_pixels[1],
        conv_crop[1] - crop_pixels[2],
        conv_crop[1] - crop_pixels[3],
    )
    x = F.pad(x, remaining_padding) if any(remaining_padding) else x
    return x if down == (1, 1) else x[:, :, :: down[1], :: down[0]]


def _fake(x, f, up, down, padding, flip_filter, gain):
    """Return an empty result, for torch.compile."""
    kw, kh = filter_size(f)
    width, height = _padded_size(x, up, padding)
    shape = [x.shape[0], x.shape[1], (height - kh) // down[1] + 1, (width - kw) // down[0] + 1]
    return like_layout(x.new_empty(shape), x)


def _save(ctx, inputs, output) -> None:
    """Store the filter and the settings for the backward pass.

    The transpose of upfirdn2d is upfirdn2d with `up` and `down` exchanged, the filter flipped, and the
    padding `ctx.padding`, which is computed here.
    """
    x, f, ctx.up, ctx.down, padding, ctx.flip_filter, ctx.gain = inputs
    ctx.save_for_backward(f)
    ctx.padding = []
    for axis, k in enumerate(filter_size(f)):
        pad_before = padding[2 * axis]
        input_length = x.shape[3 - axis]  # axis 0 is x, the last axis of the tensor
        output_length = output.shape[3 - axis]
        # With this padding the transpose has exactly `input_length` pixels,
        # for any remainder of the division by `down`.
        ctx.padding += [
            k - 1 - pad_before,
            (input_length - 1) * ctx.up[axis] - output_length * ctx.down[axis] + 1 + pad_before,
        ]


def _gradients(ctx, grad):
    """Return the gradient of x, and None for the other arguments.

    The gradient is computed by the same op, so it can be differentiated again.
    """
    (f,) = ctx.saved_tensors
    grad = torch.ops.eg3d_rlhf.upfirdn2d(
        dense(grad), f, ctx.down, ctx.up, ctx.padding, not ctx.flip_filter, ctx.gain
    )
    return grad, None, None, None, None, None, None


# Contract of the compiled op. x is contiguous or channels-last, and so is the result. f is [K] or [KH, KW],
# contiguous, of x's dtype and device. up and down are (x, y); padding is (x_before, x_after, y_before,
# y_after) of any sign. The result is never empty.
define(
    "upfirdn2d(Tensor x, Tensor f, int[] up, int[] down, int[] padding, bool flip_filter, float gain) ->"
    " Tensor",
    _fake,
    _gradients,
    _save,
)


def filter2d(
    x: torch.Tensor,
    f: torch.Tensor | None,
    padding: Scale = 0,
    flip_filter: bool = False,
    gain: float = 1,
    impl: str = "auto",
) -> torch.Tensor:
    """Filter images without a change of their size, [N, C, H, W] -> [N, C, H, W].

    Arguments and errors are those of `upfirdn2d`. A padding other than 0 enlarges (or, if negative, crops)
    the result by this number of pixels on each side.
    """
    return upfirdn2d(
        x, f, padding=same_size_padding(f, padding), flip_filter=flip_filter, gain=gain, impl=impl
    )


def upsample2d(
    x: torch.Tensor,
    f: torch.Tensor | None,
    up: Scale = 2,
    padding: Scale = 0,
    flip_filter: bool = False,
    gain: float = 1,
    impl: str = "auto",
) -> torch.Tensor:
    """Enlarge images by integer factors without a change of their mean, [N, C, H, W] -> [N, C, up*H, up*W].

    Arguments and errors are those of `upfirdn2d`. A padding other than 0 enlarges (or, if negative, crops)
    the result by this number of pixels on each side.
    """
    ux, uy = _parse_scaling(up)
    # Zero-insertion divides the mean by ux * uy; the gain restores it.
    pads = same_size_padding(f, padding, up=(ux, uy))
    return upfirdn2d(x, f, up=(ux, uy), padding=pads, flip_filter=flip_filter, gain=gain * ux * uy, impl=impl)


def downsample2d(
    x: torch.Tensor,
    f: torch.Tensor | None,
    down: Scale = 2,
    padding: Scale = 0,
    flip_filter: bool = False,
    gain: float = 1,
    impl: str = "auto",
) -> torch.Tensor:
    """Shrink images by integer factors, [N, C, H, W] -> [N, C, H/down, W/down].

    Arguments and errors are those of `upfirdn2d`. A padding other than 0 enlarges (or, if negative, crops)
    the image before it is shrunk.
    """
    return upfirdn2d(
        x,
        f,
        down=down,
        padding=same_size_padding(f, padding, down=down),
        flip_filter=flip_filter,
        gain=gain,
        impl=impl,
    )


def same_size_padding(f: torch.Tensor | None, padding: Scale = 0, up: Scale = 1, down: Scale = 1) -> Pads:
    """Compute the padding with which `upfirdn2d` returns images of exactly up / down times the size.

    Args:
        f: filter from `setup_filter`; None is a filter of one tap.
        padding: further padding, which is added to the result; see `upfirdn2d`.
        up: factor of the upsampling, or a pair of factors (x, y).
        down: factor of the downsampling, or a pair of factors (x, y). It must be 1 if `up` is larger than 1.

    Returns: the padding (x_before, x_after, y_before, y_after).
    """
    pads = _parse_padding(padding)
    filter_pads = []  # padding for the filter: x_before, x_after, y_before, y_after
    for k, u, d in zip(filter_size(f), _parse_scaling(up), _parse_scaling(down), strict=True):
        filter_pads += [(k - d + 1) // 2, (k - d) // 2] if d > 1 else [(k + u - 1) // 2, (k - u) // 2]
    x_before, x_after, y_before, y_after = (
        pad + filter_pad for pad, filter_pad in zip(pads, filter_pads, strict=True)
    )
    return x_before, x_after, y_before, y_after


def filter_size(f: torch.Tensor | None) -> Pair:
    """Return the (width, height) of a filter from `setup_filter` in taps; (1, 1) for None."""
    return (1, 1) if f is None else (f.shape[-1], f.shape[0])


def _parse_scaling(scaling: Scale) -> Pair:
    """Convert one factor, or a pair of factors (x, y), to a pair (x, y)."""
    sx, sy = (scaling, scaling) if isinstance(scaling, int) else scaling
    assert sx >= 1 and sy >= 1
    return sx, sy


def _parse_padding(padding: Scale) -> Pads:
    """Convert a padding of one, two or four numbers to (x_before, x_after, y_before, y_after)."""
    pads = [padding] * 2 if isinstance(padding, int) else list(padding)
    if len(pads) == 2:
        pads = [pads[0], pads[0], pads[1], pads[1]]
    before_x, after_x, before_y, after_y = pads
    return before_x, after_x, before_y, after_y
