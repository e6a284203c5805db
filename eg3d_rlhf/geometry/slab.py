"""Raw density of feature planes on a grid of world points, and the self-normalised sigma slab that a reward
reads.

A sigma slab is a cropped density grid (arXiv 2606.27305; `core.spec` defines its points).

There are two implementations of the density on a grid: `separable` uses 2-D maps and is fast; `pointwise`
decodes every point by itself. The pointwise one is the reference of the tests, and the only one for planes
that are not axis-aligned and for a skewed lattice. Tri-grids have their own function, `tri_grid_density`.

Letters: N batch, L layers of ws, K planes, C channels, P, Q = rows, columns of a plane, J hidden units, X, Y,
Z = grid points per axis, D, H, W = grid points along z, y, x, P = points; of a tri-grid D slices, R, L =
points of x and z in a block.
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

# A tri-plane field averages bilinear samples of K axis-aligned planes before a linear layer. At grid point
# (x, y, z) the hidden pre-activation is therefore a sum of maps of two coordinates each,
#     h[j] = A[j, x, y] + B[j, x, z] + C[j, y, z],      sigma_raw = sum_j w[j] * softplus(h[j]) + b.
# Each plane is sampled once per pair of coordinates instead of once per point. Planes that read the same
# unordered pair share one map (released EG3D checkpoints project onto (x, y), (x, z), (z, x): two maps).


def interpolation(coordinates: torch.Tensor, size: int) -> tuple[torch.Tensor, slice]:
    """Compute the weights of bilinear interpolation along one axis of a plane.

    Args:
        coordinates: [points] in plane units: -1 and 1 are the outer edges (align_corners=False), zeros
            outside.
        size: number of texels.
    Returns: the matrix [points, touched texels], with at most two non-zeros per row, and the slice of the
    texels that its columns refer to.
    """
    # texel i has its centre at position i
    position = ((coordinates + 1) * size - 1) / 2
    low = position.floor()
    fraction = position - low
    index = low.long()
    # The slice is clipped to the plane. Neighbours outside of it match no column, so they contribute zero.
    first = min(max(int(index.min()), 0), size - 1)
    last = max(min(int(index.max()) + 1, size - 1), first)
    texels = torch.arange(first, last + 1)
    at_low = index[:, None] == texels
    at_high = (index + 1)[:, None] == texels
    return at_low * (1 - fraction)[:, None] + at_high * fraction[:, None], slice(first, last + 1)


def pair_maps(
    planes: torch.Tensor,
    pairs: Sequence[tuple[int, int]],
    axes: Sequence[torch.Tensor],
    w0: torch.Tensor,
    b0: torch.Tensor,
) -> list[torch.Tensor]:
    """Compute hidden pre-activations as one map per unordered pair of coordinates. Their broadcast sum is h
    [N, X, J, Y, Z].

    Args:
        planes: [N, K, C, P, Q].
        pairs: from `projection_axes`.
        axes: x [X], y [Y], z [Z] in plane units (world * 2 / box_warp), on the CPU.
        w0, b0: [J, C] and [J], the first layer.
    Returns: the maps [N, X, J, Y, 1], [N, X, J, 1, Z] and [N, 1, J, Y, Z], those that occur.
    Differentiable in planes, w0 and b0.
    """
    merged = tuple(dict.fromkeys((min(pair), max(pair)) for pair in pairs))
    features = _SampledPlanes.apply(
        planes, tuple(pairs), merged, tuple(axis.to(planes.dtype) for axis in axes)
    )
    maps = []
    for position, (pair, sampled) in enumerate(zip(merged, features, strict=True)):
        # the coordinate (0, 1, 2 for x, y, z) that the map does not depend on; the three sum to 3
        absent = 3 - sum(pair)
        # The division by K is the average over planes. A map with x gets x before J, because slab_density
        # reads slices of x.
        hidden = torch.einsum("jc,ncuv->njuv" if absent == 0 else "jc,ncuv->nujv", w0 / len(pairs), sampled)
        # the bias is added once, to the first map
        if position == 0:
            hidden = hidden + (b0[:, None, None] if absent == 0 else b0[:, None])
        maps.append(hidden.unsqueeze({0: 1, 1: 3, 2: 4}[absent]))
    return maps


class _SampledPlanes(torch.autograd.Function):
    """Bilinear samples of planes [N, K, C, P, Q] on the grid. Planes of one pair of coordinates are summed.

    Returns [N, C, lower axis, higher axis] for each pair of `merged`. Each is a product with an interpolation
    matrix from the left and from the right. The backward pass writes the gradients of all planes into one
    tensor.
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
            # [N, C, touched rows, touched columns]
            part = planes[:, k, :, row_slice, column_slice]
            sampled = rows.to(planes.device) @ part @ columns.to(planes.device).T  # [N, C, height, width]
            # A plane that projects (z, x) is transposed to (x, z), so that it can be added to that of (x, z).
            sampled = sampled.transpose(2, 3) if height > width else sampled
            slot = merged.index((min(width, height), max(width, height)))
            features[slot] = sampled.contiguous() if features[slot] is None else features[slot].add_(sampled)
        return tuple(features)

    @staticmethod
    @once("density_grid", 'Use impl="pointwise" for a second one.')
    def backward(ctx, *grads):
        # a map without a gradient is None; any other gives dtype and device
        any_gradient = next(g for g in grads if g is not None)
        # texels outside the touched rows and columns keep a gradient of zero
        plane_gradients = any_gradient.new_zeros(ctx.shape)
        for k, ((width, height), ((rows, row_slice), (columns, column_slice))) in enumerate(
            zip(ctx.pairs, ctx.sides, strict=True)
        ):
            grad = grads[ctx.merged.index((min(width, height), max(width, height)))]
            if grad is not None:
                grad = grad.transpose(2, 3) if height > width else grad
                plane_gradients[:, k, :, row_slice, column_slice] = (
                    rows.to(grad.device).T @ grad @ columns.to(grad.device)
                )
        return plane_gradients, None, None, None


@dataclass(frozen=True)
class SeparableDensity:
    """Raw density on a grid in separable form: as maps of two coordinates each."""

    maps: list[torch.Tensor]  # [X, J, Y, 1], [X, J, 1, Z] and [1, J, Y, Z], those that occur
    w: torch.Tensor  # [J] density row of the decoder's last layer
    b: torch.Tensor  # [] its bias
    shape: tuple[int, int, int]  # X, Y, Z

    @torch.no_grad()
    def part(self, x: slice, y: slice, z: Sequence[slice]) -> torch.Tensor:
        """Compute the raw density [x, y, all of z] at ranges of indices.

        Args: x, y: ranges of at least two points; z: one or more ranges, of at least two points in all.
        """
        shape = (x.stop - x.start, y.stop - y.start, sum(run.stop - run.start for run in z))
        maps = []
        for m in self.maps:
            m = m[x] if m.shape[0] > 1 else m
            m = m[:, :, y] if m.shape[2] > 1 else m
            # Concatenated slices are copied in runs; a list of indices would gather value by value.
            if m.shape[3] > 1:
                m = torch.cat([m[..., run] for run in z], dim=3) if len(z) > 1 else m[..., z[0]]
            maps.append(m)
        return slab_density(maps, self.w, self.b, shape)


@runtime_checkable
class SeparableField(Field, Protocol):
    """A field of axis-aligned planes. Its density on a grid is a sum of maps of two coordinates each.

    The mesh extraction uses these maps to skip regions without a surface.
    """

    def separable(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> SeparableDensity | None:
        """Return the maps of one shape (N = 1) at the product of world coordinates x [X], y [Y], z [Z].

        Returns None if the planes have no such form.
        """


_IMPLS = ("auto", "separable", "pointwise")
_POINT_CHUNK = 1 << 17  # points that are decoded at once if no gradient is needed; bounds memory


class DecoderWeights(NamedTuple):
    """Effective weights of the density row of the decoder: w_sigma @ softplus(w0 @ features + b0) + b_sigma.

    Effective: multiplied by the gains of EG3D's FullyConnectedLayer.
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
    """Compute the raw density at the points of `spec` from planes that are already computed.

    Features are bilinear samples (zeros outside, align_corners=False) of the K planes at world * 2 /
    box_warp, averaged over the planes (as in EG3D's ImportanceRenderer and OSGDecoder).

    Args:
        planes: [N, K, C, rows, columns].
        plane_axes: [K, 3, 3].
        weights: of the decoder.
        box_warp: side of the cube that the planes cover, world units.
        impl: 'auto', 'separable' or 'pointwise'.
    Returns: sigma_raw [N, D, H, W].
    Differentiable in planes and weights.
    Raises: ValueError for 'separable' with planes that are not axis-aligned or with a skewed lattice.
    """
    assert impl in _IMPLS
    check_shape("sigma_from_planes(plane_axes)", plane_axes, ("K", 3, 3), "Pass G.renderer.plane_axes.")
    check_shape(
        "sigma_from_planes(planes)",
        planes,
        ("N", plane_axes.shape[0], "C", "H", "W"),
        "Pass the output of G.planes.",
    )
    # Generators may run in float16; interpolation and softplus are computed in float32 at least.
    if planes.dtype not in (torch.float32, torch.float64):
        planes = planes.float()
    weights = DecoderWeights(*(weight.to(planes.dtype) for weight in weights))
    straight = spec.lattice == "straight"
    if impl == "separable" and not straight:
        raise ValueError(
            f"density_grid: expected a straight lattice for impl='separable', got {spec.lattice!r}. Use"
            " impl='auto'."
        )
    # None if the planes are not axis-aligned
    pairs = projection_axes(plane_axes) if straight and impl != "pointwise" else None
    if pairs is not None:
        axes = [axis.to(planes.dtype) * (2 / box_warp) for axis in spec.axes()]
        depth, height, width = spec.shape
        maps = pair_maps(planes, pairs, axes, weights.w0, weights.b0)
        last = (weights.w_sigma, weights.b_sigma)
        # If every map has an x axis, the samples of a batch can be concatenated along x: one call for all.
        if all(m.shape[1] == width for m in maps):
            sigma = slab_density([m.flatten(0, 1) for m in maps], *last, (len(planes) * width, height, depth))
            # [N X, Y, Z] -> [N, X, Y, Z] -> [N, D, H, W]
            return sigma.unflatten(0, (len(planes), width)).permute(0, 3, 2, 1).contiguous()
        # Otherwise a map [N, 1, J, Y, Z] is shared along x, and each sample needs its own call.
        volumes = [
            slab_density([m[n] for m in maps], *last, (width, height, depth)).permute(2, 1, 0)
            for n in range(len(planes))
        ]
        return torch.stack(volumes)  # [N, D, H, W], contiguous
    if impl == "separable":
        raise ValueError(
            "density_grid: impl='separable' needs axis-aligned planes, and these are not. Use impl='auto'."
        )
    if impl == "auto" and straight:
        _warn_not_separable()
    points = spec.points().to(planes)  # [D, H, W, 3], components x, y, z
    point_impl = "ref" if impl == "pointwise" else "auto"
    return sigma_at(planes, plane_axes, weights, points.reshape(-1, 3), box_warp, point_impl).unflatten(
        1, spec.shape
    )


@cache
def _warn_not_separable() -> None:
    """Warn, once per process, that the slow implementation is used."""
    warnings.warn(
        "density_grid: the planes are not axis-aligned, so each point is decoded by itself (slower).",
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
    """Compute the raw density at arbitrary points.

    Args:
        planes: [N, K, C, rows, columns].
        plane_axes: [K, 3, 3].
        points: [P, 3] world coordinates.
        impl, merged: see `torch_utils.ops.triplane_decode`, which computes axis-aligned planes.
    Returns: sigma_raw [N, P].
    Differentiable in planes, weights and points.
    """
    ref = implementations.current(impl, "sigma_at") == "ref"
    pairs = None if ref else projection_axes(plane_axes) if merged is None else merged.pairs
    if pairs is None:
        inputs = (planes, points, *weights)
        # Chunks would not save memory here: the graph keeps the activations of all of them.
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
            return _decode_points(planes, plane_axes, weights, points, box_warp)
        return torch.cat(
            [
                _decode_points(planes, plane_axes, weights, part, box_warp)
                for part in points.split(_POINT_CHUNK)
            ],
            dim=1,
        )
    # A decoder with density as its only output: [1, J] and [1].
    both = BothLayers(weights.w0, weights.b0, weights.w_sigma[None], weights.b_sigma[None])
    # [P, 3] -> [N, P, 3]
    points = points.expand(len(planes), -1, -1)
    return triplane_decode(
        planes, pairs if merged is None else plane_axes, points, box_warp, both, impl, merged
    )[1].squeeze(2)


def plane_features(
    planes: torch.Tensor, plane_axes: torch.Tensor, points: torch.Tensor, box_warp: float
) -> torch.Tensor:
    """Sample features [N, C, P] at points [P, 3]: bilinear samples of every plane, averaged over the
    planes.
    """
    inverse = torch.linalg.inv(plane_axes).to(points)
    # EG3D's project_onto_planes: the first two coordinates in the basis of each plane
    grid = (points * (2 / box_warp) @ inverse)[..., :2]  # [K, P, 2], (width, height)
    # grid_sample takes 2-D grids; the points form one row
    grid = grid[None, :, None].expand(planes.shape[0], -1, -1, -1, -1)  # [N, K, 1, P, 2]
    sampled = F.grid_sample(
        planes.flatten(0, 1), grid.flatten(0, 1), mode="bilinear", padding_mode="zeros", align_corners=False
    )  # [N K, C, 1, P]
    return sampled.squeeze(2).unflatten(0, planes.shape[:2]).mean(dim=1)  # [N, C, P]


def _decode_points(
    planes: torch.Tensor,
    plane_axes: torch.Tensor,
    weights: DecoderWeights,
    points: torch.Tensor,
    box_warp: float,
) -> torch.Tensor:
    """Decode all points at once, [N, P]. This is the slow reference of all functions in this file."""
    features = plane_features(planes, plane_axes, points, box_warp).transpose(1, 2)  # [N, P, C]
    return F.softplus(F.linear(features, weights.w0, weights.b0)) @ weights.w_sigma + weights.b_sigma


def normalise_slab(sigma: torch.Tensor, value_max: float = 100.0) -> torch.Tensor:
    """Scale each sample by its own range: (sigma - min) / (max - min) * value_max, which spans [0,
    value_max].

    Args: sigma: [N, ...] with at least one further axis; value_max: > 0.
    Returns: the same shape. A constant sample gives zeros with zero gradient.
    Differentiable in sigma, also through the minimum and maximum. Tied extremes share the gradient evenly.
    Deviates: the paper's division has no guard and gives NaN for a constant slab.
    """
    assert sigma.ndim >= 2 and sigma[:1].numel() > 0
    dims = tuple(range(1, sigma.ndim))
    low = sigma.amin(dim=dims, keepdim=True)
    high = sigma.amax(dim=dims, keepdim=True)
    span = high - low
    # The inner where avoids 0 / 0, whose gradient would be NaN even though the outer where discards the
    # value.
    constant = span == 0
    scaled = (sigma - low) / torch.where(constant, torch.ones_like(span), span) * value_max
    return torch.where(constant, torch.zeros_like(scaled), scaled)


# A tri-grid (PanoHead) reads stack k at (u, v, t), linearly in t between its D slices. The average and the
# first layer are linear, so at grid point (x, y, z)
#     h[j] = b0[j] + sum_d (T_z[z, d] A[j, d, x, y] + T_y[y, d] B[j, d, x, z] + T_x[x, d] C[j, d, y, z]),
#     sigma_raw = sum_j w[j] softplus(h[j]) + b,
# where A, B, C are the stacks whose slices lie along z, y and x. A row of T has at most two non-zeros. This
# is no sum of maps of two coordinates, so neither `slab_density` nor the bounds of bricks apply. Every point
# is evaluated, but by matrix products.

Order = tuple[int, int, int]  # coordinates (0, 1, 2 for x, y, z) along width, height and slices of a stack

# Number of pre-activations that are computed at once. On the CPU 512 KiB, which the second-level cache of a
# core holds; on a GPU 64 MiB.
_CPU_BLOCK = 1 << 17
_CUDA_BLOCK = 1 << 24
_RECORDED_BLOCK = 1 << 22  # on the CPU with gradients: larger, because each block is a node of the graph


def tri_grid_density(
    planes: torch.Tensor,
    orders: Sequence[Order],
    weights: DecoderWeights,
    axes: Sequence[torch.Tensor],
    extent: float = 1.0,
) -> torch.Tensor:
    """Compute the raw density of a tri-grid at the product of coordinates.

    Args:
        planes: [N, 3, C, D, P, Q].
        orders: of the stacks; the slices of each lie along another coordinate.
        weights: of the decoder.
        axes: x [X], y [Y], z [Z] in plane units (world * 2 / box_warp), on the CPU.
        extent: see `sample_tri_grid`.
    Returns: [N, X, Y, Z].
    Differentiable in planes and weights. If there is more than one block, pre-activations are computed again
    in the backward pass.
    """
    # [X, D], [Y, D], [Z, D]: interpolation weights T of the slices
    blend_x, blend_y, blend_z = (_blend(axis, planes.shape[3], extent).to(planes) for axis in axes)
    stacks = {
        order[2]: _hidden(planes[:, k], order, weights.w0 / len(orders), axes)
        for k, order in enumerate(orders)
    }
    a = stacks[2]  # [N, J, D, X, Y]
    b = stacks[1].permute(4, 0, 1, 3, 2)  # [N, J, D, X, Z] -> [Z, N, J, X, D]
    c = stacks[0].permute(4, 0, 1, 2, 3).contiguous()  # [N, J, D, Y, Z] -> [Z, N, J, D, Y]
    # [Z, N, J, X, D + 1]: the bias b0 becomes one more slice, whose weight in blend_y is 1.
    b = torch.cat([b, weights.b0[:, None, None].expand(*b.shape[:4], 1)], dim=4)
    blend_y = torch.cat([blend_y, torch.ones_like(blend_y[:, :1])], dim=1)
    recorded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (planes, *weights))
    block = _CUDA_BLOCK if planes.is_cuda else _RECORDED_BLOCK if recorded else _CPU_BLOCK
    # pre-activations of one x and one z: N J Y
    line = a.shape[0] * a.shape[1] * a.shape[4]
    # Without gradients on the CPU, each thread takes a share of the rows of x.
    rows = min(max(1, block // line), a.shape[3] if recorded else -(-a.shape[3] // torch.get_num_threads()))
    layers = min(max(1, block // (line * rows)), len(b))
    recompute = recorded and (rows < a.shape[3] or layers < len(b))

    def evaluate_rows(a_rows: torch.Tensor, b_rows: torch.Tensor, x_rows: torch.Tensor) -> torch.Tensor:
        """Evaluate a range of x at all z: [Z, N, R, Y]."""
        # D first, so that a block is one matrix product
        a_rows = a_rows.movedim(2, 0).contiguous()
        layer_blocks = []
        for z_layers, b_layers, c_layers in zip(
            blend_z.split(layers), b_rows.split(layers), c.split(layers), strict=True
        ):
            inputs = (a_rows, b_layers, c_layers, x_rows, blend_y, z_layers, weights.w_sigma, weights.b_sigma)
            layer_blocks.append(
                checkpoint(_block, *inputs, use_reentrant=False) if recompute else _block(*inputs)
            )
        return torch.cat(layer_blocks)  # [Z, N, R, Y]

    split = a.split(rows, dim=3), b.split(rows, dim=3), blend_x.split(rows)
    parts = (
        list(map(evaluate_rows, *split)) if recorded or planes.is_cuda else _in_threads(evaluate_rows, *split)
    )
    return torch.cat(parts, dim=2).permute(1, 2, 3, 0)  # [Z, N, X, Y] -> [N, X, Y, Z]


def _in_threads(work: Callable[..., torch.Tensor], *items: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Apply `work` to items without gradients, in as many threads as torch uses, each with serial operations.

    Parallel operations would wait at a barrier after every small product.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(torch.no_grad()(work), *items))
    finally:
        torch.set_num_threads(threads)


def _blend(axis: torch.Tensor, slices: int, extent: float) -> torch.Tensor:
    """Compute the interpolation weights [points, D] of D slices at coordinates along them."""
    matrix, touched = interpolation(axis / extent, slices)
    return torch.zeros(len(axis), slices, dtype=axis.dtype).index_copy(
        1, torch.arange(slices)[touched], matrix.to(axis.dtype)
    )


def _hidden(
    stack: torch.Tensor, order: Order, w0: torch.Tensor, axes: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Apply the first layer w0 [J, C] to a stack [N, C, D, P, Q] at the product of its two coordinates.

    Returns: [N, J, D, lower axis, higher axis].
    """
    width, height, _ = order
    rows, row_slice = interpolation(axes[height], stack.shape[3])
    columns, column_slice = interpolation(axes[width], stack.shape[4])
    # [N, C, D, height, width]
    sampled = rows.to(stack) @ stack[..., row_slice, column_slice] @ columns.to(stack).T
    return torch.einsum("jc,ncduv->njduv", w0, sampled.transpose(3, 4) if height > width else sampled)


def _block(a, b, c, blend_x, blend_y, blend_z, w_sigma, b_sigma) -> torch.Tensor:
    """Compute the raw density [L, N, R, Y] of L layers of z and R rows of x.

    Args: a: [D, N, J, R, Y]; b: [L, N, J, R, D + 1]; c: [L, N, J, D, Y]; blends: [R, D], [Y, D + 1], [L, D].
    """
    layers = len(b)
    slices, n, j, r, y = a.shape
    # sum_d T_z A, [L, D] @ [D, N J R Y]. The two other terms are added in place: this memory is the largest.
    hidden = (blend_z @ a.view(slices, -1)).view(-1, y)  # [L N J R, Y]
    hidden.addmm_(b.reshape(-1, slices + 1), blend_y.T)  # + b0 + sum_d T_y B
    # + sum_d T_x C: [L N J, R, Y]
    hidden = hidden.view(-1, r, y).baddbmm_(blend_x.expand(layers * n * j, -1, -1), c.flatten(0, 2))
    active = F.softplus(hidden).view(layers * n, j, r * y)
    return (w_sigma @ active).view(layers, n, r, y) + b_sigma
