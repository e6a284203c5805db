"""sigma_raw of a tri-grid on a straight grid, from slices that are read once per pair of coordinates and never once per point.

A tri-grid reads stack k at (u, v, t), linear in t between its D slices. Average and first layer are linear, so that at grid point (x, y, z)

    h[j] = b0[j] + sum_d (T_z[z, d] A[j, d, x, y] + T_y[y, d] B[j, d, x, z] + T_x[x, d] C[j, d, y, z]),
    sigma_raw = sum_j w[j] softplus(h[j]) + b,

with A, B, C the stacks whose slices lie along z, y and x, and at most two non-zeros in a row of T. This is no sum of maps of two
coordinates, so that neither `slab_density` nor the bounds of field_mesh.py apply: every point is evaluated, but by matrix products.

Letters: N batch, C channels, D slices, P, Q = rows, columns of a slice, J hidden units, X, Y, Z = grid points per axis, R, L = those of x
and z in a block.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from eg3d_rlhf.core.separable import interpolation
from eg3d_rlhf.geometry.slab import DecoderWeights

Order = tuple[int, int, int]  # coordinates (0, 1, 2 for x, y, z) along width, height and slices of a stack

_CPU_BLOCK, _CUDA_BLOCK = 1 << 17, 1 << 24  # pre-activations at once: 512 KiB, which a core's second-level cache holds; 64 MiB
_RECORDED_BLOCK = 1 << 22  # the same where a gradient is recorded: every block is a step of the graph


def tri_grid_density(
    planes: torch.Tensor, orders: Sequence[Order], weights: DecoderWeights, axes: Sequence[torch.Tensor], extent: float = 1.0
) -> torch.Tensor:
    """Raw density at the product of coordinates.

    Args:
        planes: [N, 3, C, D, P, Q]; orders: of the stacks, the slices of each along another coordinate; weights: of the decoder;
        axes: x [X], y [Y], z [Z] in plane units (world * 2 / box_warp), on the CPU; extent: see `sample_tri_grid`.
    Returns: [N, X, Y, Z].
    Differentiable in planes and weights; of more than one block, pre-activations are computed again in the backward pass.
    """
    blend_x, blend_y, blend_z = (_blend(axis, planes.shape[3], extent).to(planes) for axis in axes)  # [X, D], [Y, D], [Z, D]
    stacks = {order[2]: _hidden(planes[:, k], order, weights.w0 / len(orders), axes) for k, order in enumerate(orders)}
    a, b, c = stacks[2], stacks[1].permute(4, 0, 1, 3, 2), stacks[0].permute(4, 0, 1, 2, 3).contiguous()
    b = torch.cat([b, weights.b0[:, None, None].expand(*b.shape[:4], 1)], dim=4)  # [Z, N, J, X, D + 1]: the bias is one more slice,
    blend_y = torch.cat([blend_y, torch.ones_like(blend_y[:, :1])], dim=1)  # of share 1
    recorded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (planes, *weights))
    block, line = _CUDA_BLOCK if planes.is_cuda else _RECORDED_BLOCK if recorded else _CPU_BLOCK, a.shape[0] * a.shape[1] * a.shape[4]
    rows = min(max(1, block // line), a.shape[3] if recorded else -(-a.shape[3] // torch.get_num_threads()))
    layers = min(max(1, block // (line * rows)), len(b))
    again = recorded and (rows < a.shape[3] or layers < len(b))

    def of_rows(a_rows: torch.Tensor, b_rows: torch.Tensor, x_rows: torch.Tensor) -> torch.Tensor:
        a_rows, done = a_rows.movedim(2, 0).contiguous(), []  # [D, N, J, R, Y]
        for z_layers, b_layers, c_layers in zip(blend_z.split(layers), b_rows.split(layers), c.split(layers), strict=True):
            inputs = (a_rows, b_layers, c_layers, x_rows, blend_y, z_layers, weights.w_sigma, weights.b_sigma)
            done.append(checkpoint(_block, *inputs, use_reentrant=False) if again else _block(*inputs))
        return torch.cat(done)  # [Z, N, R, Y]

    split = a.split(rows, dim=3), b.split(rows, dim=3), blend_x.split(rows)
    parts = list(map(of_rows, *split)) if recorded or planes.is_cuda else _in_threads(of_rows, *split)
    return torch.cat(parts, dim=2).permute(1, 2, 3, 0)


def _in_threads(work: Callable[..., torch.Tensor], *items: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """`map` without gradients, in as many threads as torch has, each with serial operations: no barrier after every small product."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(torch.no_grad()(work), *items))
    finally:
        torch.set_num_threads(threads)


def _blend(axis: torch.Tensor, slices: int, extent: float) -> torch.Tensor:
    """Shares [points, D] of the slices at coordinates along them."""
    matrix, touched = interpolation(axis / extent, slices)
    return torch.zeros(len(axis), slices, dtype=axis.dtype).index_copy(1, torch.arange(slices)[touched], matrix.to(axis.dtype))


def _hidden(stack: torch.Tensor, order: Order, w0: torch.Tensor, axes: Sequence[torch.Tensor]) -> torch.Tensor:
    """A stack [N, C, D, P, Q] through the first layer w0 [J, C] at the product of its two coordinates: [N, J, D, lower, higher axis]."""
    width, height, _ = order
    (rows, row_slice), (columns, column_slice) = interpolation(axes[height], stack.shape[3]), interpolation(axes[width], stack.shape[4])
    sampled = rows.to(stack) @ stack[..., row_slice, column_slice] @ columns.to(stack).T  # [N, C, D, height, width]
    return torch.einsum("jc,ncduv->njduv", w0, sampled.transpose(3, 4) if height > width else sampled)


def _block(a, b, c, blend_x, blend_y, blend_z, w_sigma, b_sigma) -> torch.Tensor:
    """Raw density [L, N, R, Y] of L layers of z and R rows of x.

    Args: a [D, N, J, R, Y]; b [L, N, J, R, D + 1]; c [L, N, J, D, Y]; blends [R, D], [Y, D + 1], [L, D].
    """
    layers, (slices, n, j, r, y) = len(b), a.shape
    hidden = (blend_z @ a.view(slices, -1)).view(-1, y)  # [L N J R, Y], added to in place
    hidden.addmm_(b.reshape(-1, slices + 1), blend_y.T)
    hidden = hidden.view(-1, r, y).baddbmm_(blend_x.expand(layers * n * j, -1, -1), c.flatten(0, 2))
    active = functional.softplus(hidden).view(layers * n, j, r * y)
    return (w_sigma @ active).view(layers, n, r, y) + b_sigma
