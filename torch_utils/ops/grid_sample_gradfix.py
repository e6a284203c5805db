"""Bilinear sampling of images that can be differentiated twice with respect to the image.

torch's grid_sample has no second derivative. R1 regularisation (Mescheder et al. 2018) of images that were
augmented needs the second derivative with respect to the image.

Shapes: N images, C channels, H x W input pixels, h x w output pixels.
"""

import torch
import torch.nn.functional as F

# Numbers of the interpolation mode "bilinear" and the padding mode "zeros" in torch's internal functions
_BILINEAR = 0
_ZEROS = 0


def grid_sample(input: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """Sample images bilinearly at given points. Values outside the image are 0.

    Args:
        input: images [N, C, H, W].
        grid: points (x, y), [N, h, w, 2]. -1 and 1 are the outer edges of the image (align_corners=False).

    Returns: samples [N, C, h, w].
    Differentiable in `input` to any order, and in `grid` once. There is no mixed second derivative.
    """
    assert input.ndim == grid.ndim == 4 and len(grid) == len(input) and grid.shape[3] == 2
    return _Sample.apply(input, grid)


class _Sample(torch.autograd.Function):
    """Autograd function y = S(grid) x, where S(grid) is the linear operator that samples at the points."""

    @staticmethod
    def forward(ctx, x, grid):
        # Only the gradient of the grid needs the image. Otherwise an empty tensor is stored in its place.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else x.new_empty(0), grid)
        ctx.shape = x.shape
        return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    @staticmethod
    def backward(ctx, dy):
        x, grid = ctx.saved_tensors
        # _Scatter is an autograd function, so dx can be differentiated again. torch's own backward cannot.
        dx = _Scatter.apply(dy, grid, ctx.shape) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return dx, None
        mask = [False, True]  # gradient of the grid only
        _, dgrid = torch.ops.aten.grid_sampler_2d_backward(
            dy.detach(), x.detach(), grid.detach(), _BILINEAR, _ZEROS, False, mask
        )
        return dx, dgrid


class _Scatter(torch.autograd.Function):
    """Autograd function dx = S(grid)^T dy, the adjoint of _Sample. Its own adjoint is _Sample again."""

    @staticmethod
    def forward(ctx, dy, grid, shape):
        ctx.save_for_backward(grid)
        x = dy.new_empty(1).expand(shape)  # the function below uses only the shape of x
        dx, _ = torch.ops.aten.grid_sampler_2d_backward(dy, x, grid, _BILINEAR, _ZEROS, False, [True, False])
        return dx

    @staticmethod
    def backward(ctx, ddx):
        (grid,) = ctx.saved_tensors
        return (_Sample.apply(ddx, grid.detach()) if ctx.needs_input_grad[0] else None), None, None
