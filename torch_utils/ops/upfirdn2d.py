"""Zero-insertion, padding, FIR filtering and decimation of images: the resampling op of StyleGAN networks.

Shapes: N batch, C channels, H x W pixels, K taps. Paddings are in pixels of the zero-inserted image; negative
ones crop.

Everything here is linear in x and therefore differentiable in x to any order. The filter is a constant.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from torch_utils.ops.implementations import COMPILED_DTYPES, choose, define, dense, like_layout

Scale = int | Sequence[int]
Pair = tuple[int, int]  # (x, y)
Pads = tuple[int, int, int, int]  # (x_before, x_after, y_before, y_after)
# Shorter 1-D filters are replaced by their outer product: one small 2-D pass is cheaper than two 1-D passes.
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
        f: scalar, [K] taps or [KH, KW] taps; None is the identity.
        device: device of the result.
        normalize: scale the taps to sum 1.
        flip_filter: reverse the taps.
        gain: overall factor of the two-dimensional filter.
        separable: keep 1-D taps; None: keep them from 8 taps on.
    Returns: float32 [K] (applied along both axes) or [KH, KW].
    """
    given = np.asarray(1.0 if f is None else f.detach().cpu() if isinstance(f, torch.Tensor) else f)
    taps = torch.as_tensor(given, dtype=torch.float32, device="cpu")
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
    # 1-D taps are applied along both axes, so each application gets the square root of the gain.
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
    """Resample with a FIR filter: insert zeros, pad, filter, and keep every down-th pixel.

    Along each axis y[n] = sum_m f[K-1-m] u[n*down + m - pad0], where u[i*up] = x[i] and 0 elsewhere
    (trailing zeros included).

    Args:
        x: [N, C, H, W].
        f: [K] (both axes) or [KH, KW] from `setup_filter`; None is the identity.
        up, down: factor, or (x, y) factors, >= 1.
        padding: one number, (x, y), or (x_before, x_after, y_before, y_after); negative crops.
        flip_filter: False convolves, True correlates.
        gain: factor on the result (gain**(1/2) per axis for 1-D taps).
        impl: see `torch_utils.ops.implementations`; "compiled" needs float32 or float64.
    Returns: [N, C, H', W'] with H' = (H*up + pads - K) // down + 1.
    Differentiable in x, to any order; not in f.
    Raises: ValueError for an empty result or an unknown `impl`.
    """
    assert x.ndim == 4 and (f is None or f.ndim in (1, 2))
    up = _parse_scaling(up)
    down = _parse_scaling(down)
    padding = _parse_padding(padding)
    # detach(): the filter is a constant, also if it comes from a network's buffer.
    f = torch.ones([1, 1], device=x.device) if f is None else f.detach()
    for size, k in zip(_padded_size(x, up, padding), filter_size(f), strict=True):
        if size < k:
            raise ValueError(
                f"upfirdn2d: expected at least {k} pixels after padding, got {size}. Use images larger than"
                f" {list(x.shape)}."
            )
    applies = x.dtype in COMPILED_DTYPES[x.device.type == "cuda"] and x.numel() > 0
    chosen = choose("upfirdn2d", impl, "upfirdn2d", x.device.type, applies)
    if chosen != "compiled":
        return (upfirdn2d_ref if chosen == "ref" else _upfirdn2d_torch)(
            x, f, up, down, padding, flip_filter, gain
        )
    return torch.ops.eg3d_rlhf.upfirdn2d(
        dense(x), f.to(x.dtype).contiguous(), up, down, padding, flip_filter, float(gain)
    )


def _padded_size(x: torch.Tensor, up: Pair, padding: Pads) -> Pair:
    """Return (width, height) in pixels after zero-insertion and padding."""
    x0, x1, y0, y1 = padding
    return x.shape[3] * up[0] + x0 + x1, x.shape[2] * up[1] + y0 + y1


def upfirdn2d_ref(
    x: torch.Tensor, f: torch.Tensor, up: Pair, down: Pair, padding: Pads, flip_filter: bool, gain: float
) -> torch.Tensor:
    """Compute the definition: insert zeros, pad or crop, filter each channel, keep every down-th pixel."""
    n, channels, height, width = x.shape
    if up != (1, 1):
        # Zeros after every pixel: [N, C, H, 1, W, 1] -> [N, C, H, up, W, up] -> [N, C, H up, W up].
        x = x.reshape(n, channels, height, 1, width, 1)
        x = F.pad(x, (0, up[0] - 1, 0, 0, 0, up[1] - 1)).reshape(n, channels, height * up[1], width * up[0])
    x = F.pad(x, padding) if any(padding) else x  # F.pad crops for negative values
    f = (f * gain ** (f.ndim / 2)).to(x.dtype)
    # One kernel for all channels, in a depthwise convolution.
    # conv2d correlates, so a convolution needs the flipped filter.
    f = f if flip_filter else f.flip(list(range(f.ndim)))
    for kernel in (f,) if f.ndim == 2 else (f[None, :], f[:, None]):
        x = F.conv2d(x, kernel.expand(channels, 1, *kernel.shape), groups=channels)
    return x[:, :, :: down[1], :: down[0]]


def _upfirdn2d_torch(
    x: torch.Tensor, f: torch.Tensor, up: Pair, down: Pair, padding: Pads, flip_filter: bool, gain: float
) -> torch.Tensor:
    """Compute upfirdn2d in plain torch: one depthwise convolution, or two for 1-D taps."""
    f = (f * gain ** (f.ndim / 2)).to(x.dtype)
    if f.ndim == 2:
        return _filter_pass(x, f, up, down, padding, flip_filter)
    x = _filter_pass(x, f[None, :], (up[0], 1), (down[0], 1), (*padding[:2], 0, 0), flip_filter)  # along W
    return _filter_pass(x, f[:, None], (1, up[1]), (1, down[1]), (0, 0, *padding[2:]), flip_filter)  # along H


def _filter_pass(
    x: torch.Tensor, f: torch.Tensor, up: Pair, down: Pair, padding: Pads, flip_filter: bool
) -> torch.Tensor:
    """Compute upfirdn2d for taps [KH, KW] of x's dtype.

    Without zero-insertion it is a strided depthwise correlation. With it, it is a depthwise transposed
    convolution, whose full output is z[j] = sum_i x[i] f[j - i*up]. The result is y[n] = z[n + K-1 - pad0].
    Padding thus becomes cropping, and no zeros are multiplied.
    """
    channels = x.shape[1]
    kh, kw = f.shape
    x0, x1, y0, y1 = padding
    if up == (1, 1):
        kernel = (f if flip_filter else f.flip([0, 1])).expand(channels, 1, kh, kw)
        # Part of the padding that conv2d can apply itself, equally on both sides.
        inside = max(min(x0, x1), 0), max(min(y0, y1), 0)
        rest = (x0 - inside[0], x1 - inside[0], y0 - inside[1], y1 - inside[1])
        x = F.pad(x, rest) if any(rest) else x
        return F.conv2d(x, kernel, stride=(down[1], down[0]), padding=(inside[1], inside[0]), groups=channels)
    # A transposed convolution runs the kernel backwards, so the flips are the opposite of those above.
    kernel = (f.flip([0, 1]) if flip_filter else f).expand(channels, 1, kh, kw)
    # How much of the full output each border loses.
    crop = (kw - 1 - x0, kw - up[0] - x1, kh - 1 - y0, kh - up[1] - y1)
    # conv_transpose2d can crop equally on both sides; the rest is cropped, or padded, afterwards.
    inside = max(min(crop[:2]), 0), max(min(crop[2:]), 0)
    x = F.conv_transpose2d(x, kernel, stride=(up[1], up[0]), padding=(inside[1], inside[0]), groups=channels)
    rest = (inside[0] - crop[0], inside[0] - crop[1], inside[1] - crop[2], inside[1] - crop[3])
    x = F.pad(x, rest) if any(rest) else x
    return x if down == (1, 1) else x[:, :, :: down[1], :: down[0]]


def _fake(x, f, up, down, padding, flip_filter, gain):
    """Return an empty result, for torch.compile."""
    kw, kh = filter_size(f)
    width, height = _padded_size(x, up, padding)
    shape = [x.shape[0], x.shape[1], (height - kh) // down[1] + 1, (width - kw) // down[0] + 1]
    return like_layout(x.new_empty(shape), x)


def _save(ctx, inputs, output) -> None:
    """Save what the backward pass needs.

    The transpose of upfirdn2d is upfirdn2d with its factors swapped, its filter flipped, and `ctx.padding`.
    """
    x, f, ctx.up, ctx.down, padding, ctx.flip_filter, ctx.gain = inputs
    ctx.save_for_backward(f)
    ctx.padding = []
    for axis, k in enumerate(filter_size(f)):
        before = padding[2 * axis]
        size = x.shape[3 - axis]  # axis 0 is x, the last one of the image
        out = output.shape[3 - axis]
        # Chosen so that the transpose has exactly `size` pixels, for any remainder of the division by `down`.
        ctx.padding += [k - 1 - before, (size - 1) * ctx.up[axis] - out * ctx.down[axis] + 1 + before]


def _gradients(ctx, grad):
    """Return the gradient for x, which is an upfirdn2d again and so has gradients of its own."""
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
    """Filter an image and keep its size. `padding` is added to the padding that keeps it.

    Arguments and errors are those of `upfirdn2d`. Returns [N, C, H, W] (plus the extra padding).
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
    """Enlarge an image by integer factors and keep its mean. `padding` is added to that which gives up*H x
    up*W.

    Arguments and errors are those of `upfirdn2d`. Returns [N, C, up*H, up*W] (plus the extra padding).
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
    """Shrink an image by integer factors. `padding` is added to that which gives H/down x W/down.

    Arguments and errors are those of `upfirdn2d`. Returns [N, C, H/down, W/down] (plus the extra padding).
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
    """Return `padding` plus the padding that makes the result exactly up / down times as large as the image.

    One of the two factors must be 1.
    """
    pads = _parse_padding(padding)
    added = []  # (before, after) along x, then y
    for k, u, d in zip(filter_size(f), _parse_scaling(up), _parse_scaling(down), strict=True):
        added += [(k - d + 1) // 2, (k - d) // 2] if d > 1 else [(k + u - 1) // 2, (k - u) // 2]
    return pads[0] + added[0], pads[1] + added[1], pads[2] + added[2], pads[3] + added[3]


def filter_size(f: torch.Tensor | None) -> Pair:
    """Return (width, height) in taps of a prepared filter; (1, 1) for None."""
    return (1, 1) if f is None else (f.shape[-1], f.shape[0])


def _parse_scaling(scaling: Scale) -> Pair:
    """Return one factor or (x, y) as (x, y)."""
    sx, sy = (scaling, scaling) if isinstance(scaling, int) else scaling
    assert sx >= 1 and sy >= 1
    return sx, sy


def _parse_padding(padding: Scale) -> Pads:
    """Return one pad, (x, y) or all four as (x_before, x_after, y_before, y_after)."""
    pads = [padding] * 2 if isinstance(padding, int) else list(padding)
    if len(pads) == 2:
        pads = [pads[0], pads[0], pads[1], pads[1]]
    before_x, after_x, before_y, after_y = pads
    return before_x, after_x, before_y, after_y
