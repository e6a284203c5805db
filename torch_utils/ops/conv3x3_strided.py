"""3x3 convolution with stride 2 and its transpose, between images of 2 h + 1 by 2 w + 1 and of h by w pixels.

    down   y[n, o, i, j] = sum_{c, a, b} x[n, c, 2 i + a, 2 j + b] w[o, c, a, b]
    up     its transpose: x[n, c, 2 i + a, 2 j + b] += y[n, o, i, j] w[o, c, a, b]
    weight the gradient to w of the sum of y g

Each is the derivative of the others. The compiled op takes 49 products where the definition takes 81 (3 x 3 small pixels at a time), by
minimal filtering as in `conv3x3`: along a line the outer two taps are a filter over every second pixel, three results by Cook and Toom's
four products, and the middle tap is multiplied as it is, 4 + 3 products for 9. Largest rounding errors in float32, 32 to 512 channels:
3e-7 to 9e-7 of the largest value, torch's 5e-7 to 2.2e-6.

Shapes: N batch, I channels of the large and O of the small image.
"""

import torch
import torch.nn.functional as F

from torch_utils.ops.implementations import alike, choose, define, is_channels_last

_LANES = 16  # channels that the transformations take at a time
_LEAST_PIXELS = 32 * 32  # of the small image: with 16 x 16 of 512 channels torch is 1.2 times as fast, with 32 x 32 0.8 times


def conv3x3_down(x: torch.Tensor, w: torch.Tensor, impl: str = "auto") -> torch.Tensor:
    """x [N, I, H, W], w [O, I, 3, 3] -> [N, O, (H - 1) // 2, (W - 1) // 2]; `impl` as in `conv3x3`. Differentiable to any order."""
    odd = x.shape[2] % 2 == x.shape[3] % 2 == 1
    if _compiled(x, w, (x.shape[2] - 1) // 2 * ((x.shape[3] - 1) // 2), impl, odd):
        return _Convolution.apply(x, w, False)
    return F.conv2d(x, w, stride=2)


def conv3x3_up(x: torch.Tensor, w: torch.Tensor, impl: str = "auto") -> torch.Tensor:
    """x [N, O, h, w], w [O, I, 3, 3] -> [N, I, 2 h + 1, 2 w + 1]; `impl` as in `conv3x3`. Differentiable to any order."""
    if _compiled(x, w, x.shape[2] * x.shape[3], impl):
        return _Convolution.apply(x, w, True)
    return F.conv_transpose2d(x, w, stride=2)


def _compiled(x: torch.Tensor, w: torch.Tensor, pixels: int, impl: str, fits: bool = True) -> bool:
    lanes = w.shape[0] % _LANES == w.shape[1] % _LANES == 0 and w.shape[2:] == (3, 3) and x.ndim == 4
    applies = fits and lanes and alike(x, w) and x.dtype == torch.float32 and x.device.type == "cpu" and pixels > 0
    dropped = pixels < _LEAST_PIXELS or not is_channels_last(x)
    return choose("conv3x3_strided", impl, "conv3x3_strided", x.device.type, applies, dropped) == "compiled"


class _Convolution(torch.autograd.Function):
    """Down, or up where that is True."""

    @staticmethod
    def forward(ctx, x, w, up):
        ctx.save_for_backward(x, w)
        ctx.up = up
        return torch.ops.eg3d_rlhf.conv3x3_strided(x.contiguous(memory_format=torch.channels_last), w.contiguous(), up)

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        large, small = (grad, x) if ctx.up else (x, grad)
        need_x, need_w, _ = ctx.needs_input_grad
        return _Convolution.apply(grad, w, not ctx.up) if need_x else None, _Weight.apply(large, small) if need_w else None, None


class _Weight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, grad):
        x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
        ctx.save_for_backward(x, grad)
        return torch.ops.eg3d_rlhf.conv3x3_strided_weight(x, grad)

    @staticmethod
    def backward(ctx, grad_w):
        x, grad = ctx.saved_tensors
        need_x, need_grad = ctx.needs_input_grad
        return _Convolution.apply(grad, grad_w, True) if need_x else None, _Convolution.apply(x, grad_w, False) if need_grad else None


define(
    "conv3x3_strided(Tensor x, Tensor w, bool up) -> Tensor",
    lambda x, w, up: x.new_empty(
        [len(x), *((2 * size + 1 if up else (size - 1) // 2) for size in x.shape[2:]), w.shape[1 if up else 0]]
    ).permute(0, 3, 1, 2),
)
define(
    "conv3x3_strided_weight(Tensor x, Tensor grad) -> Tensor",
    lambda x, grad: x.new_empty([grad.shape[1], x.shape[1], 3, 3]),
)
