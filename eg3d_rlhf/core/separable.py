"""sigma_raw on a straight grid from 2-D maps: each plane is sampled once per pair of coordinates, never once per point.

A tri-plane field averages bilinear samples of K axis-aligned planes before a linear layer, so at grid point (x, y, z) the hidden
pre-activation is a sum of maps of two coordinates each,

    h[j] = A[j, x, y] + B[j, x, z] + C[j, y, z],      sigma_raw = sum_j w[j] * softplus(h[j]) + b,

and planes that read the same unordered pair share one map (released EG3D checkpoints project onto (x, y), (x, z), (z, x): two maps).

Letters: K planes, C channels, P, Q = rows, columns of a plane, J hidden units, X, Y, Z = grid points per axis.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from torch_utils.ops.implementations import once
from torch_utils.ops.slab_density import slab_density


def interpolation(coordinates: torch.Tensor, size: int) -> tuple[torch.Tensor, slice]:
    """Bilinear weights of `size` texels at 1-D coordinates in plane units (-1..1 = outer edges, align_corners=False, zeros outside).

    Returns: the matrix [points, touched texels] with at most two non-zeros per row, and the slice of texels it refers to.
    """
    position = ((coordinates + 1) * size - 1) / 2
    low = position.floor()
    fraction = position - low
    index = low.long()
    first = min(max(int(index.min()), 0), size - 1)
    last = max(min(int(index.max()) + 1, size - 1), first)
    texels = torch.arange(first, last + 1)
    here, following = index[:, None] == texels, (index + 1)[:, None] == texels
    return here * (1 - fraction)[:, None] + following * fraction[:, None], slice(first, last + 1)


def pair_maps(
    planes: torch.Tensor, pairs: Sequence[tuple[int, int]], axes: Sequence[torch.Tensor], w0: torch.Tensor, b0: torch.Tensor
) -> list[torch.Tensor]:
    """Hidden pre-activations as one map per unordered pair of coordinates, whose broadcast sum is h [N, X, J, Y, Z].

    Args: planes [N, K, C, P, Q]; pairs from `projection_axes`; axes: x [X], y [Y], z [Z] in plane units (world * 2/box_warp), on the CPU;
    w0 [J, C], b0 [J].
    Returns: maps [N, X, J, Y, 1], [N, X, J, 1, Z] and [N, 1, J, Y, Z], those that occur.
    Differentiable in planes, w0 and b0.
    """
    merged = tuple(dict.fromkeys((min(pair), max(pair)) for pair in pairs))
    features = _SampledPlanes.apply(planes, tuple(pairs), merged, tuple(axis.to(planes.dtype) for axis in axes))
    maps = []
    for position, (pair, sampled) in enumerate(zip(merged, features, strict=True)):
        absent = 3 - sum(pair)
        hidden = torch.einsum("jc,ncuv->njuv" if absent == 0 else "jc,ncuv->nujv", w0 / len(pairs), sampled)
        if position == 0:
            hidden = hidden + (b0[:, None, None] if absent == 0 else b0[:, None])
        maps.append(hidden.unsqueeze({0: 1, 1: 3, 2: 4}[absent]))
    return maps


class _SampledPlanes(torch.autograd.Function):
    """Bilinear samples of planes [N, K, C, P, Q] on the grid, planes of one pair summed.

    Returns [N, C, lower axis, higher axis] for each of `merged`: a product with an interpolation matrix from each side. The backward writes
    every plane's gradient in its place in one tensor.
    """

    @staticmethod
    def forward(ctx, planes, pairs, merged, axes):
        ctx.shape, ctx.pairs, ctx.merged = planes.shape, pairs, merged
        ctx.sides = [
            (interpolation(axes[height], planes.shape[3]), interpolation(axes[width], planes.shape[4])) for width, height in pairs
        ]
        features = [None] * len(merged)
        for k, ((width, height), ((rows, row_slice), (columns, column_slice))) in enumerate(zip(pairs, ctx.sides, strict=True)):
            part = planes[:, k, :, row_slice, column_slice]
            sampled = rows.to(planes.device) @ part @ columns.to(planes.device).T  # [N, C, height, width]
            sampled = sampled.transpose(2, 3) if height > width else sampled
            slot = merged.index((min(width, height), max(width, height)))
            features[slot] = sampled.contiguous() if features[slot] is None else features[slot].add_(sampled)
        return tuple(features)

    @staticmethod
    @once("density_grid", 'Use impl="pointwise" for a second one.')
    def backward(ctx, *grads):
        some = next(g for g in grads if g is not None)
        out = some.new_zeros(ctx.shape)
        for k, ((width, height), ((rows, row_slice), (columns, column_slice))) in enumerate(zip(ctx.pairs, ctx.sides, strict=True)):
            grad = grads[ctx.merged.index((min(width, height), max(width, height)))]
            if grad is not None:
                grad = grad.transpose(2, 3) if height > width else grad
                out[:, k, :, row_slice, column_slice] = rows.to(grad.device).T @ grad @ columns.to(grad.device)
        return out, None, None, None


@dataclass(frozen=True)
class SeparableDensity:
    """Raw density on a grid as maps of two coordinates each."""

    maps: list[torch.Tensor]  # [X, J, Y, 1], [X, J, 1, Z] and [1, J, Y, Z], those that occur
    w: torch.Tensor  # [J]
    b: torch.Tensor  # []
    shape: tuple[int, int, int]  # X, Y, Z

    @torch.no_grad()
    def part(self, x: slice, y: slice, z: Sequence[slice]) -> torch.Tensor:
        """Raw density [x, y, all of z] at ranges of x and y indices and at one or more ranges of z indices; at least two points each."""
        shape = (x.stop - x.start, y.stop - y.start, sum(run.stop - run.start for run in z))
        maps = []
        for m in self.maps:
            m = m[x] if m.shape[0] > 1 else m
            m = m[:, :, y] if m.shape[2] > 1 else m
            if m.shape[3] > 1:  # slices: a list of indices would be gathered value by value
                m = torch.cat([m[..., run] for run in z], dim=3) if len(z) > 1 else m[..., z[0]]
            maps.append(m)
        return slab_density(maps, self.w, self.b, shape)
