"""3x3 convolution with fewer multiplications than its definition, on a CPU.

For stride 1, this is Winograd's minimal filtering algorithm F(m x m, 3x3) (Lavin and Gray 2016, "Fast
Algorithms for Convolutional Neural Networks", section 4). A tile of m x m results is

    Y = A^T [(G g G^T) * (B^T d B)] A

for a kernel g and a patch d of m + 2 by m + 2 pixels. A, B and G are constant matrices of the paper, and * is
the elementwise product, summed over the input channels. The computation therefore consists of (m + 2)^2
matrix products. The gradient of the kernel is G^T [sum over tiles (B^T d B) * (A dY A^T)] G. For a tile and a
pair of channels, m = 4 takes 36 multiplications instead of 144, and m = 2 takes 16 instead of 36.

The largest rounding errors in float32, relative to the largest value, for 32 to 512 channels are 2.6e-6 with
m = 4 and 5e-7 with m = 2, for results and gradients. torch's own convolution has 2.6e-6.

With stride 2 there are three operations:

    down   y[n, o, i, j] = sum_{c, a, b} x[n, c, 2 i + a, 2 j + b] w[o, c, a, b]
    up     its transpose: x[n, c, 2 i + a, 2 j + b] += y[n, o, i, j] w[o, c, a, b]
    weight the gradient with respect to w, from x and the gradient g with respect to y:
           sum_{n, i, j} x[n, c, 2 i + a, 2 j + b] g[n, o, i, j]

Each operation is a derivative of the other two. The compiled op takes 49 multiplications instead of 81 for 3
x 3 pixels of the small image. Along each axis, the two outer taps of the kernel form a filter over every
second pixel, which gives three results with four multiplications (Toom-Cook algorithm). The middle tap takes
three multiplications, so there are 7 instead of 9. The largest rounding errors in float32 for 32 to 512
channels are 3e-7 to 9e-7 of the largest value; torch's are 5e-7 to 2.2e-6.

Shapes: N images, H x W pixels, I input and O output channels (with stride 2: I channels of the large image
and O of the small image).
"""

import torch
import torch.nn.functional as F

from torch_utils.ops.implementations import alike, choose, define, is_channels_last

_LANES = 16  # number of channels that the transformations process at a time
# With fewer channels or pixels than these, "auto" uses torch's convolution, because the transformations of
# images and kernels would take more time than they save.
_MIN_CHANNELS = 32
_MIN_PIXELS = 32 * 32
# Smallest number of 4x4 tiles for which they are faster than 2x2 tiles. Measured ratio of the times of F(2x2)
# and F(4x4), forward pass and gradients, one thread of a Zen 4 processor: 0.8 to 1.0 with 16 tiles, 1.2
# with 32 tiles (64 and 512 channels), 1.1 to 1.5 with 64 tiles (32 to 512 channels).
_MIN_TILES = 32
# Smallest average number of 2x2 tiles that a 4x4 tile must replace. It is 4 if no 4x4 tile extends beyond the
# image. The measured ratio of the times is 0.8 with 2.25, 1.0 with 2.8, and 1.2 with 3.1.
_MIN_SAVING = 3


def conv3x3(x: torch.Tensor, w: torch.Tensor, padding: int = 1, impl: str = "auto") -> torch.Tensor:
    """Correlate images with 3x3 kernels.

    Args:
        x: images [N, I, H, W].
        w: kernels [O, I, 3, 3].
        padding: number of zero pixels that are added on every side, 0 to 2.
        impl: see `torch_utils.ops.implementations`. "ref" and "torch" are torch's convolution. "compiled" is
            Winograd's algorithm on a CPU, for float32 or float64 and I and O that are multiples of 16. Its
            result is channels-last.

    Returns: images [N, O, H + 2 padding - 2, W + 2 padding - 2].
    Differentiable in x and w, to any order.
    Raises: ValueError for an unknown `impl`, or for "compiled" if the compiled op cannot be used.
    """
    assert (
        x.ndim == w.ndim == 4
        and w.shape[1:] == (x.shape[1], 3, 3)
        and padding in (0, 1, 2)
        and min(x.shape[2:]) + 2 * padding >= 3
    )
    # The compiled code always processes 16 channels together, and cannot process a smaller remainder.
    has_full_lanes = x.shape[1] % _LANES == 0 and w.shape[0] % _LANES == 0
    is_supported = has_full_lanes and alike(x, w)
    # Cases in which torch is faster
    is_slower = (
        min(x.shape[1], w.shape[0]) < _MIN_CHANNELS
        or x.shape[2] * x.shape[3] < _MIN_PIXELS
        or x.dtype == torch.float64
    )
    if (
        choose("conv3x3", impl, "conv3x3", x.device.type, is_supported and x.device.type == "cpu", is_slower)
        == "compiled"
    ):
        tile = _tile(len(x), x.shape[2] + 2 * padding - 2, x.shape[3] + 2 * padding - 2)
        return torch.ops.eg3d_rlhf.conv3x3(
            x.contiguous(memory_format=torch.channels_last), w.contiguous(), padding, False, tile
        )
    return F.conv2d(x, w, padding=padding)


def _tile(n: int, h: int, w: int) -> int:
    """Return the side of the tiles, 2 or 4, with which the convolution is fastest.

    The gradients use the same side.

    Args:
        n: number of images.
        h: number of rows of a result.
        w: number of columns of a result.
    """
    # -(-a // b) rounds up: tiles at the border may be partly empty.
    small_tile_count, large_tile_count = (n * -(-h // m) * -(-w // m) for m in (2, 4))
    return 4 if large_tile_count >= _MIN_TILES and small_tile_count >= _MIN_SAVING * large_tile_count else 2


def _fake(x, w, padding, transposed, tile):
    """Return an empty result, for torch.compile."""
    height, width = (length + 2 * padding - 2 for length in x.shape[2:])
    # NHWC in memory, NCHW in shape: channels-last, as the kernel returns it.
    return x.new_empty([len(x), height, width, w.shape[1 if transposed else 0]]).permute(0, 3, 1, 2)


def _save(ctx, inputs, output) -> None:
    x, w, ctx.padding, ctx.transposed, ctx.tile = inputs
    ctx.save_for_backward(x, w)


def _gradients(ctx, grad):
    """Return the gradients of x and w. They are computed by compiled ops that can be differentiated again."""
    x, w = ctx.saved_tensors
    need_x, need_w = ctx.needs_input_grad[:2]
    grad = grad.contiguous(memory_format=torch.channels_last)
    p = ctx.padding
    # The gradient for x is the convolution with the reversed kernel and the complementary padding.
    grad_x = torch.ops.eg3d_rlhf.conv3x3(grad, w, 2 - p, not ctx.transposed, ctx.tile) if need_x else None
    grad_w = None
    if need_w:
        # In the transposed op, grad and x exchange their roles.
        weight_op_inputs = (grad, x, 2 - p) if ctx.transposed else (x, grad, p)
        grad_w = torch.ops.eg3d_rlhf.conv3x3_weight(*weight_op_inputs, ctx.tile)
    return grad_x, grad_w, None, None, None


def _save_weight(ctx, inputs, output) -> None:
    x, grad, ctx.padding, ctx.tile = inputs
    ctx.save_for_backward(x, grad)


def _gradients_weight(ctx, grad_w):
    """Return the gradients of `conv3x3_weight` with respect to x and grad."""
    x, grad = ctx.saved_tensors
    need_x, need_grad = ctx.needs_input_grad[:2]
    grad_w = grad_w.contiguous()
    p = ctx.padding
    # conv3x3_weight is bilinear in x and grad, so its derivatives are convolutions with grad_w.
    grad_x = torch.ops.eg3d_rlhf.conv3x3(grad, grad_w, 2 - p, True, ctx.tile) if need_x else None
    return (
        grad_x,
        torch.ops.eg3d_rlhf.conv3x3(x, grad_w, p, False, ctx.tile) if need_grad else None,
        None,
        None,
    )


# x and the result are channels-last; padding is 0..2; tile is 2 or 4. w is [O, I, 3, 3], contiguous. With
# `transposed` it is [I, O, 3, 3] and is read in reverse order.
define(
    "conv3x3(Tensor x, Tensor w, int padding, bool transposed, int tile) -> Tensor", _fake, _gradients, _save
)
define(  # d<conv3x3(x, w, padding, False, tile), grad>/dw
    "conv3x3_weight(Tensor x, Tensor grad, int padding, int tile) -> Tensor",
    lambda x, grad, padding, tile: x.new_empty([grad.shape[1], x.shape[1], 3, 3]),
    _gradients_weight,
    _save_weight,
)


# 3x3 convolution with stride 2, and its transpose, between images of 2 h + 1 by 2 w + 1 and of h by w pixels.


# Smallest number of pixels of the small image for which "auto" uses the compiled op. With 512 channels, torch
# is 1.2 times as fast as the op for 16 x 16 pixels, and 0.8 times as fast for 32 x 32.
_MIN_PIXELS_STRIDED = 32 * 32


def conv3x3_down(x: torch.Tensor, w: torch.Tensor, impl: str = "auto") -> torch.Tensor:
    """Correlate images with 3x3 kernels with stride 2. Differentiable in x and w, to any order.

    Args:
        x: images [N, I, H, W].
        w: kernels [O, I, 3, 3].
        impl: see `conv3x3`. "compiled" also needs float32, and odd H and W.

    Returns: images [N, O, (H - 1) // 2, (W - 1) // 2].
    """
    # The compiled op supports only odd sizes, in which every pixel is used.
    has_odd_size = x.shape[2] % 2 == x.shape[3] % 2 == 1
    if _compiled(x, w, (x.shape[2] - 1) // 2 * ((x.shape[3] - 1) // 2), impl, has_odd_size):
        return _Convolution.apply(x, w, False)
    return F.conv2d(x, w, stride=2)


def conv3x3_up(x: torch.Tensor, w: torch.Tensor, impl: str = "auto") -> torch.Tensor:
    """Compute the transpose of `conv3x3_down`. Differentiable in x and w, to any order.

    Args:
        x: images [N, O, height, width].
        w: kernels [O, I, 3, 3].
        impl: see `conv3x3`. "compiled" also needs float32.

    Returns: images [N, I, 2 height + 1, 2 width + 1].
    """
    if _compiled(x, w, x.shape[2] * x.shape[3], impl):
        return _Convolution.apply(x, w, True)
    return F.conv_transpose2d(x, w, stride=2)


def _compiled(
    x: torch.Tensor, w: torch.Tensor, pixel_count: int, impl: str, has_supported_size: bool = True
) -> bool:
    """Return True if the compiled op with stride 2 is used.

    Args:
        x: images.
        w: kernels [O, I, 3, 3].
        pixel_count: number of pixels of the small image.
        impl: see `conv3x3`.
        has_supported_size: False if the op does not support the size of the image.
    """
    has_full_lanes = w.shape[0] % _LANES == w.shape[1] % _LANES == 0 and w.shape[2:] == (3, 3) and x.ndim == 4
    is_supported = (
        has_supported_size
        and has_full_lanes
        and alike(x, w)
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and pixel_count > 0
    )
    # An image that is not channels-last would have to be copied first.
    is_slower = pixel_count < _MIN_PIXELS_STRIDED or not is_channels_last(x)
    return (
        choose("conv3x3_strided", impl, "conv3x3_strided", x.device.type, is_supported, is_slower)
        == "compiled"
    )


class _Convolution(torch.autograd.Function):
    """Autograd function of the convolution with stride 2, or of its transpose if `up` is True."""

    @staticmethod
    def forward(ctx, x, w, up):
        ctx.save_for_backward(x, w)
        ctx.up = up
        return torch.ops.eg3d_rlhf.conv3x3_strided(
            x.contiguous(memory_format=torch.channels_last), w.contiguous(), up
        )

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        # The gradient of the kernels correlates the large image with the small image.
        large_image, small_image = (grad, x) if ctx.up else (x, grad)
        need_x, need_w, _ = ctx.needs_input_grad
        return (
            _Convolution.apply(grad, w, not ctx.up) if need_x else None,
            _Weight.apply(large_image, small_image) if need_w else None,
            None,
        )


class _Weight(torch.autograd.Function):
    """Autograd function of the gradient of the convolution with stride 2 with respect to its kernels."""

    @staticmethod
    def forward(ctx, x, grad):
        x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
        ctx.save_for_backward(x, grad)
        return torch.ops.eg3d_rlhf.conv3x3_strided_weight(x, grad)

    @staticmethod
    def backward(ctx, grad_w):
        x, grad = ctx.saved_tensors
        need_x, need_grad = ctx.needs_input_grad
        # The function is bilinear in x and grad, so each derivative is
        # a convolution of the other one with grad_w.
        return _Convolution.apply(grad, grad_w, True) if need_x else None, (
            _Convolution.apply(x, grad_w, False) if need_grad else None
        )


define(
    "conv3x3_strided(Tensor x, Tensor w, bool up) -> Tensor",
    lambda x, w, up: x.new_empty(
        [
            len(x),
            *((2 * size + 1 if up else (size - 1) // 2) for size in x.shape[2:]),
            w.shape[1 if up else 0],
        ]
    ).permute(0, 3, 1, 2),
)
define(
    "conv3x3_strided_weight(Tensor x, Tensor grad) -> Tensor",
    lambda x, grad: x.new_empty([grad.shape[1], x.shape[1], 3, 3]),
)
