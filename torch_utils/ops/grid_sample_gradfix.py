"""Bilinear image sampling that can be differentiated twice in the image.

torch's own grid_sample has no second derivative. R1 regularisation through augmentation needs the one with
respect to the image.

Shapes: N batch, C channels, H x W input pixels, h x w output pixels.
"""

import torch
import torch.nn.functional as F

# Codes of the interpolation and padding modes in aten.
_BILINEAR = 0
_ZEROS = 0


def grid_sample(input: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """Sample an image at given points: bilinear, with zeros outside.

    Corners are not aligned: -1 and 1 are the borders of the image.
    Args:
        input: [N, C, H, W].
        grid: [N, h, w, 2], (x, y) in [-1, 1] inside the image.
    Returns: [N, C, h, w].
    Differentiable in `input` to any order, since the operation is linear in it. Differentiable in `grid`
    once, and not in combination with `input`.
    """
    assert input.ndim == grid.ndim == 4 and len(grid) == len(input) and grid.shape[3] == 2
    return _Sample.apply(input, grid)


class _Sample(torch.autograd.Function):
    """y = S(grid) x, with the linear operator S(grid) that samples at the grid."""

    @staticmethod
    def forward(ctx, x, grid):
        # The gradient for the image does not need the image; an empty tensor saves its memory.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else x.new_empty(0), grid)
        ctx.shape = x.shape
        return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    @staticmethod
    def backward(ctx, dy):
        x, grid = ctx.saved_tensors
        # By another autograd function, so that it has a gradient again; aten's own backward has none.
        dx = _Scatter.apply(dy, grid, ctx.shape) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return dx, None
        mask = [False, True]  # gradient of the grid only
        _, dgrid = torch.ops.aten.grid_sampler_2d_backward(
            dy.detach(), x.detach(), grid.detach(), _BILINEAR, _ZEROS, False, mask
        )
        return dx, dgrid


class _Scatter(torch.autograd.Function):
    """dx = S(grid)^T dy, the adjoint of _Sample in the image. Its own adjoint is _Sample again."""

    @staticmethod
    def forward(ctx, dy, grid, shape):
        ctx.save_for_backward(grid)
        x = dy.new_empty(1).expand(shape)  # aten reads only its shape
        dx, _ = torch.ops.aten.grid_sampler_2d_backward(dy, x, grid, _BILINEAR, _ZEROS, False, [True, False])
        return dx

    @staticmethod
    def backward(ctx, ddx):
        (grid,) = ctx.saved_tensors
        return (_Sample.apply(ddx, grid.detach()) if ctx.needs_input_grad[0] else None), None, None
