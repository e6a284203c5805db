"""Raw density of feature planes on a grid of world points, and the self-normalised slab that a reward reads.

Two implementations of one function: `separable` (2-D maps) and `pointwise` (every point on its own: the
oracle, and the only way for planes that are not axis-aligned and for a skewed lattice); tri-grids have their
own.

Letters: N batch, L layers of ws, K planes, C channels, P, Q = rows, columns of a plane, J hidden units, X, Y,
Z = grid points per axis, D, H, W = grid points along z, y, x, P = points; of a tri-grid D slices, R,
L = points of x and z in a block.
"""

import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from eg3d_rlhf.core.field import Field
from eg3d_rlhf.core.shapes import check_shape
from eg3d_rlhf.core.spec import SlabSpec
from torch_utils.ops import implementations
from torch_utils.ops.implementations import once
from torch_utils.ops.slab_density import slab_density
from torch_utils.ops.triplane_decode import DecoderWeights as BothLayers
from torch_utils.ops.triplane_decode import MergedPlanes, projection_axes, triplane_decode

# A tri-plane field averages bilinear samples of K axis-aligned planes before a linear layer, so at grid point
# (x, y, z) the hidden pre-activation is a sum of maps of two coordinates each,
#     h[j] = A[j, x, y] + B[j, x, z] + C[j, y, z],      sigma_raw = sum_j w[j] * softplus(h[j]) + b,
# and each plane is sampled once per pair of coordinates, never once per point; planes that read the same
# unordered pair share one map (released EG3D checkpoints project onto (x, y), (x, z), (z, x): two maps).


def interpolation(coordinates: torch.Tensor, size: int) -> tuple[torch.Tensor, slice]:
    """Bilinear weights of `size` texels at 1-D coordinates in plane units (-1..1 = outer edges,
    align_corners=False, zeros outside).

    Returns: the matrix [points, touched texels] with at most two non-zeros per row, and the slice of texels
        it refers to.
    """
    position = ((coordinates + 1) * size - 1) / 2
    low = position.floor()
    fraction = position - low
    index = low.long()
    first = min(max(int(index.min()), 0), size - 1)
    last = max(min(int(index.max()) + 1, size - 1), first)
    texels = torch.arange(first, last + 1)
    here = index[:, None] == texels
    following = (index + 1)[:, None] == texels
    return here * (1 - fraction)[:, None] + following * fraction[:, None], slice(first, last + 1)


def pair_maps(
    planes: torch.Tensor,
    pairs: Sequence[tuple[int, int]],
    axes: Sequence[torch.Tensor],
    w0: torch.Tensor,
    b0: torch.Tensor,
) -> list[torch.Tensor]:
    """Hidden pre-activations as one map per unordered pair of coordinates, whose broadcast sum is h
    [N, X, J, Y, Z].

    Args: planes [N, K, C, P, Q]; pairs from `projection_axes`; axes: x [X], y [Y], z [Z] in plane units
    (world * 2/box_warp), on the CPU; w0 [J, C], b0 [J].
    Returns: maps [N, X, J, Y, 1], [N, X, J, 1, Z] and [N, 1, J, Y, Z], those that occur.
    Differentiable in planes, w0 and b0.
    """
    merged = tuple(dict.fromkeys((min(pair), max(pair)) for pair in pairs))
    features = _SampledPlanes.apply(
        planes, tuple(pairs), merged, tuple(axis.to(planes.dtype) for axis in axes)
    )
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

    Returns [N, C, lower axis, higher axis] for each of `merged`: a product with an interpolation matrix from
    each side. The backward writes every plane's gradient in its place in one tensor.
    """

    @staticmethod
    def forward(ctx, planes, pairs, merged, axes):
        ctx.shape = planes.shape
        ctx.pairs = pairs
        ctx.merged = merged
        ctx.sides = [
            (interpolation(axes[height], planes.shape[3]), interpolation(axes[width], planes.shape[4]))
            for width, height in pairs
        ]
        features = [None] * len(merged)
        for k, ((width, height), ((rows, row_slice), (columns, column_slice))) in enumerate(
            zip(pairs, ctx.sides, strict=True)
        ):
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
        for k, ((width, height), ((rows, row_slice), (columns, column_slice))) in enumerate(
            zip(ctx.pairs, ctx.sides, strict=True)
        ):
            grad = grads[ctx.merged.index((min(width, height), max(width, height)))]
            if grad is not None:
                grad = grad.transpose(2, 3) if height > width else grad
                out[:, k, :, row_slice, column_slice] = (
                    rows.to(grad.device).T @ grad @ columns.to(grad.device)
                )
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
        """Raw density [x, y, all of z] at ranges of x and y indices and at one or more ranges of z indices;
        at least two points each.
        """
        shape = (x.stop - x.start, y.stop - y.start, sum(run.stop - run.start for run in z))
        maps = []
        for m in self.maps:
            m = m[x] if m.shape[0] > 1 else m
            m = m[:, :, y] if m.shape[2] > 1 else m
            if m.shape[3] > 1:  # slices: a list of indices would be gathered value by value
                m = torch.cat([m[..., run] for run in z], dim=3) if len(z) > 1 else m[..., z[0]]
            maps.append(m)
        return slab_density(maps, self.w, self.b, shape)


@runtime_checkable
class SeparableField(Field, Protocol):
    """A field of axis-aligned planes: its density on a grid is a sum of maps of two coordinates each, which
    meshing exploits.
    """

    def separable(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> SeparableDensity | None:
        """The maps of one shape (N = 1) at the product of world coordinates x [X], y [Y], z [Z]; None where
        there is no such form.
        """


_IMPLS = ("auto", "separable", "pointwise")
_POINT_CHUNK = 1 << 17  # points decoded at once where no gradient is asked for


class DecoderWeights(NamedTuple):
    """Effective weights of the density row of the decoder:
    w_sigma @ softplus(w0 @ features + b0) + b_sigma.
    """

    w0: torch.Tensor  # [J, C]
    b0: torch.Tensor  # [J]
    w_sigma: torch.Tensor  # [J]
    b_sigma: torch.Tensor  # []


def sigma_from_planes(
    planes: torch.Tensor,
    plane_axes: torch.Tensor,
    weights: DecoderWeights,
    spec: SlabSpec,
    box_warp: float = 1.0,
    impl: str = "auto",
) -> torch.Tensor:
    """Raw density at the points of `spec` from planes that are already there.

    Features are bilinear samples (zeros outside, align_corners=False) of the K planes at world * 2/box_warp,
    averaged over the planes (eg3d.md, section 4).

    Args: planes [N, K, C, rows, columns]; plane_axes [K, 3, 3]; box_warp: side of the cube that the planes
        span, world units.
    Returns: sigma_raw [N, D, H, W].
    Differentiable in planes and weights.
    Raises: ValueError for 'separable' with planes that are not axis-aligned or a skewed lattice.
    """
    assert impl in _IMPLS
    check_shape("sigma_from_planes(plane_axes)", plane_axes, ("K", 3, 3), "Pass G.renderer.plane_axes.")
    check_shape(
        "sigma_from_planes(planes)",
        planes,
        ("N", plane_axes.shape[0], "C", "H", "W"),
        "Pass the output of G.planes.",
    )
    if planes.dtype not in (torch.float32, torch.float64):
        planes = planes.float()
    weights = DecoderWeights(*(weight.to(planes.dtype) for weight in weights))
    straight = spec.lattice == "straight"
    if impl == "separable" and not straight:
        raise ValueError(
            f"density_grid: expected a straight lattice for impl='separable', got {spec.lattice!r}. Use"
            " impl='auto'."
        )
    pairs = projection_axes(plane_axes) if straight and impl != "pointwise" else None
    if pairs is not None:
        axes = [axis.to(planes.dtype) * (2 / box_warp) for axis in spec.axes()]
        depth, height, width = spec.shape
        maps = pair_maps(planes, pairs, axes, weights.w0, weights.b0)
        last = (weights.w_sigma, weights.b_sigma)
        # every map has an x axis: the samples lie one behind the other along x
        if all(m.shape[1] == width for m in maps):
            sigma = slab_density([m.flatten(0, 1) for m in maps], *last, (len(planes) * width, height, depth))
            return sigma.unflatten(0, (len(planes), width)).permute(0, 3, 2, 1).contiguous()
        volumes = [
            slab_density([m[n] for m in maps], *last, (width, height, depth)).permute(2, 1, 0)
            for n in range(len(planes))
        ]
        return torch.stack(volumes)  # [N, D, H, W], contiguous
    if impl == "separable":
        raise ValueError(
            "density_grid: expected axis-aligned planes for impl='separable', got others. Use impl='auto'."
        )
    if impl == "auto" and straight:
        _warn_not_separable()
    points = spec.points().to(planes)  # [D, H, W, 3], components x, y, z
    way = "ref" if impl == "pointwise" else "auto"
    return sigma_at(planes, plane_axes, weights, points.reshape(-1, 3), box_warp, way).unflatten(
        1, spec.shape
    )


@cache
def _warn_not_separable() -> None:
    """Once per process."""
    warnings.warn(
        "density_grid: the planes are not axis-aligned, so every point is decoded on its own (slower).",
        stacklevel=4,
    )


def sigma_at(
    planes: torch.Tensor,
    plane_axes: torch.Tensor,
    weights: DecoderWeights,
    points: torch.Tensor,
    box_warp: float = 1.0,
    impl: str = "auto",
    merged: MergedPlanes | None = None,
) -> torch.Tensor:
    """Raw density at arbitrary points.

    Args: planes [N, K, C, rows, columns]; plane_axes [K, 3, 3]; points [P, 3] world coordinates; impl and
    merged: see `torch_utils.ops.triplane_decode`, which does the work where the planes are axis-aligned.
    Returns: sigma_raw [N, P].
    Differentiable in planes, weights and points.
    """
    ref = implementations.current(impl, "sigma_at") == "ref"
    pairs = None if ref else projection_axes(plane_axes) if merged is None else merged.pairs
    if pairs is None:
        inputs = (planes, points, *weights)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
            return _decode_points(planes, plane_axes, weights, points, box_warp)
        return torch.cat(
            [
                _decode_points(planes, plane_axes, weights, part, box_warp)
                for part in points.split(_POINT_CHUNK)
            ],
            dim=1,
        )
    both = BothLayers(weights.w0, weights.b0, weights.w_sigma[None], weights.b_sigma[None])
    points = points.expand(len(planes), -1, -1)
    return triplane_decode(
        planes, pairs if merged is None else plane_axes, points, box_warp, both, impl, merged
    )[1].squeeze(2)


def plane_features(
    planes: torch.Tensor, plane_axes: torch.Tensor, points: torch.Tensor, box_warp: float
) -> torch.Tensor:
    """Features [N, C, P] at points [P, 3]: bilinear samples of every plane, averaged over the planes."""
    inverse = torch.linalg.inv(plane_axes).to(points)
    grid = (points * (2 / box_warp) @ inverse)[..., :2]  # [K, P, 2], (width, height)
    grid = grid[None, :, None].expand(planes.shape[0], -1, -1, -1, -1)  # [N, K, 1, P, 2]
    sampled = F.grid_sample(
        planes.flatten(0, 1), grid.flatten(0, 1), mode="bilinear", padding_mode="zeros", align_corners=False
    )
    return sampled.squeeze(2).unflatten(0, planes.shape[:2]).mean(dim=1)  # [N, C, P]


def _decode_points(
    planes: torch.Tensor,
    plane_axes: torch.Tensor,
    weights: DecoderWeights,
    points: torch.Tensor,
    box_warp: float,
) -> torch.Tensor:
    """[N, P], all points at once: the slow, obvious form of everything in this file."""
    features = plane_features(planes, plane_axes, points, box_warp).transpose(1, 2)  # [N, P, C]
    return F.softplus(F.linear(features, weights.w0, weights.b0)) @ weights.w_sigma + weights.b_sigma


def normalise_slab(sigma: torch.Tensor, value_max: float = 100.0) -> torch.Tensor:
    """Each sample on its own scale: (sigma - min) / (max - min) * value_max, so that it spans [0, value_max].

    Args: sigma [N, ...] with at least one further axis; value_max > 0.
    Returns: the same shape. A constant sample gives zeros with zero gradient.
    Differentiable in sigma, the minimum and maximum included; tied extremes share the gradient evenly.
    Deviates: the authors' division is unguarded and gives NaN for a constant slab.
    """
    assert sigma.ndim >= 2 and sigma[:1].numel() > 0
    dims = tuple(range(1, sigma.ndim))
    low = sigma.amin(dim=dims, keepdim=True)
    high = sigma.amax(dim=dims, keepdim=True)
    span = high - low
    constant = span == 0
    scaled = (sigma - low) / torch.where(constant, torch.ones_like(span), span) * value_max
    return torch.where(constant, torch.zeros_like(scaled), scaled)


# A tri-grid reads stack k at (u, v, t), linear in t between its D slices. Average and first layer are linear:
# at grid point (x, y, z)
#     h[j] = b0[j] + sum_d (T_z[z, d] A[j, d, x, y] + T_y[y, d] B[j, d, x, z] + T_x[x, d] C[j, d, y, z]),
#     sigma_raw = sum_j w[j] softplus(h[j]) + b,
# with A, B, C the stacks whose slices lie along z, y and x, and at most two non-zeros in a row of T. This is
# no sum of maps of two coordinates, so that neither `slab_density` nor bounds of bricks apply: every point is
# evaluated, but by matrix products.

Order = tuple[int, int, int]  # coordinates (0, 1, 2 for x, y, z) along width, height and slices of a stack

# pre-activations at once: 512 KiB, which a core's second-level cache holds; 64 MiB
_CPU_BLOCK = 1 << 17
_CUDA_BLOCK = 1 << 24
_RECORDED_BLOCK = 1 << 22  # the same where a gradient is recorded: every block is a step of the graph


def tri_grid_density(
    planes: torch.Tensor,
    orders: Sequence[Order],
    weights: DecoderWeights,
    axes: Sequence[torch.Tensor],
    extent: float = 1.0,
) -> torch.Tensor:
    """Raw density at the product of coordinates.

    Args:
        planes: [N, 3, C, D, P, Q]; orders: of the stacks, the slices of each along another coordinate;
            weights: of the decoder;
        axes: x [X], y [Y], z [Z] in plane units (world * 2 / box_warp), on the CPU; extent: see
            `sample_tri_grid`.
    Returns: [N, X, Y, Z].
    Differentiable in planes and weights; of more than one block, pre-activations are computed again in the
    backward pass.
    """
    # [X, D], [Y, D], [Z, D]
    blend_x, blend_y, blend_z = (_blend(axis, planes.shape[3], extent).to(planes) for axis in axes)
    stacks = {
        order[2]: _hidden(planes[:, k], order, weights.w0 / len(orders), axes)
        for k, order in enumerate(orders)
    }
    a = stacks[2]
    b = stacks[1].permute(4, 0, 1, 3, 2)
    c = stacks[0].permute(4, 0, 1, 2, 3).contiguous()
    # [Z, N, J, X, D + 1]: the bias is one more slice,
    b = torch.cat([b, weights.b0[:, None, None].expand(*b.shape[:4], 1)], dim=4)
    blend_y = torch.cat([blend_y, torch.ones_like(blend_y[:, :1])], dim=1)  # of share 1
    recorded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (planes, *weights))
    block = _CUDA_BLOCK if planes.is_cuda else _RECORDED_BLOCK if recorded else _CPU_BLOCK
    line = a.shape[0] * a.shape[1] * a.shape[4]
    rows = min(max(1, block // line), a.shape[3] if recorded else -(-a.shape[3] // torch.get_num_threads()))
    layers = min(max(1, block // (line * rows)), len(b))
    again = recorded and (rows < a.shape[3] or layers < len(b))

    def of_rows(a_rows: torch.Tensor, b_rows: torch.Tensor, x_rows: torch.Tensor) -> torch.Tensor:
        # [D, N, J, R, Y]
        a_rows = a_rows.movedim(2, 0).contiguous()
        done = []
        for z_layers, b_layers, c_layers in zip(
            blend_z.split(layers), b_rows.split(layers), c.split(layers), strict=True
        ):
            inputs = (a_rows, b_layers, c_layers, x_rows, blend_y, z_layers, weights.w_sigma, weights.b_sigma)
            done.append(checkpoint(_block, *inputs, use_reentrant=False) if again else _block(*inputs))
        return torch.cat(done)  # [Z, N, R, Y]

    split = a.split(rows, dim=3), b.split(rows, dim=3), blend_x.split(rows)
    parts = list(map(of_rows, *split)) if recorded or planes.is_cuda else _in_threads(of_rows, *split)
    return torch.cat(parts, dim=2).permute(1, 2, 3, 0)


def _in_threads(work: Callable[..., torch.Tensor], *items: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """`map` without gradients, in as many threads as torch has, each with serial operations: no barrier after
    every small product.
    """
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
    return torch.zeros(len(axis), slices, dtype=axis.dtype).index_copy(
        1, torch.arange(slices)[touched], matrix.to(axis.dtype)
    )


def _hidden(
    stack: torch.Tensor, order: Order, w0: torch.Tensor, axes: Sequence[torch.Tensor]
) -> torch.Tensor:
    """A stack [N, C, D, P, Q] through the first layer w0 [J, C] at the product of its two coordinates:
    [N, J, D, lower, higher axis].
    """
    width, height, _ = order
    rows, row_slice = interpolation(axes[height], stack.shape[3])
    columns, column_slice = interpolation(axes[width], stack.shape[4])
    # [N, C, D, height, width]
    sampled = rows.to(stack) @ stack[..., row_slice, column_slice] @ columns.to(stack).T
    return torch.einsum("jc,ncduv->njduv", w0, sampled.transpose(3, 4) if height > width else sampled)


def _block(a, b, c, blend_x, blend_y, blend_z, w_sigma, b_sigma) -> torch.Tensor:
    """Raw density [L, N, R, Y] of L layers of z and R rows of x.

    Args: a [D, N, J, R, Y]; b [L, N, J, R, D + 1]; c [L, N, J, D, Y]; blends [R, D], [Y, D + 1], [L, D].
    """
    layers = len(b)
    slices, n, j, r, y = a.shape
    hidden = (blend_z @ a.view(slices, -1)).view(-1, y)  # [L N J R, Y], added to in place
    hidden.addmm_(b.reshape(-1, slices + 1), blend_y.T)
    hidden = hidden.view(-1, r, y).baddbmm_(blend_x.expand(layers * n * j, -1, -1), c.flatten(0, 2))
    active = F.softplus(hidden).view(layers * n, j, r * y)
    return (w_sigma @ active).view(layers, n, r, y) + b_sigma
