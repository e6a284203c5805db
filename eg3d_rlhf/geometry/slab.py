"""Raw density of feature planes on a grid of world points, and the normalised sigma slab that a reward reads.

A sigma slab is a cropped grid of densities (arXiv 2606.27305); `core.spec` defines its points.

There are two implementations of the density on a grid. The fast implementation, `separable`, uses maps of two
coordinates (`plane_maps`). The slow implementation, `pointwise`, decodes every point by itself. It is the
reference of the tests, and is also used for planes that are not aligned with the axes and for a skewed
lattice. Tri-grids have a function of their own, `tri_grid_density`.

Shapes: N batch; K planes; C channels; P, Q rows and columns of a plane; J hidden units of the decoder; X, Y,
Z grid points along x, y, z; D, H, W grid points along z, y, x; P also points in a list. In the functions of
tri-grids: D slices of a stack; R, L numbers of x and z indices in a block.
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
from eg3d_rlhf.geometry.plane_maps import PlaneMaps, grid_maps, interpolation_matrix
from torch_utils.ops import implementations
from torch_utils.ops.triplane_decode import (
    Blend,
    MergedPlanes,
    front_weights,
    projection_axes,
    triplane_decode,
    weigh_slices,
)
from torch_utils.ops.triplane_decode import DecoderWeights as BothLayers


@dataclass(frozen=True)
class SeparableDensity:
    """Raw density of one shape on a grid in separable form: as maps of two coordinates each."""

    maps: PlaneMaps  # pre-activations h
    w: torch.Tensor  # [J] weights of the density in the decoder's last layer
    b: torch.Tensor  # [] bias of the density in the decoder's last layer
    shape: tuple[int, int, int]  # X, Y, Z

    @torch.no_grad()
    def part(self, x_range: slice, y_range: slice, z_ranges: Sequence[slice]) -> torch.Tensor:
        """Compute the raw density at ranges of grid points.

        Args:
            x_range: range of at least two x indices.
            y_range: range of at least two y indices.
            z_ranges: one or more ranges of z indices, with at least two indices in total.

        Returns: raw density [number of x indices, number of y indices, total number of z indices].
        """
        shape = (
            x_range.stop - x_range.start,
            y_range.stop - y_range.start,
            sum(z_range.stop - z_range.start for z_range in z_ranges),
        )
        return self.maps.part(x_range, y_range, z_ranges).density(self.w, self.b, shape)


@runtime_checkable
class SeparableField(Field, Protocol):
    """Density field of axis-aligned planes, which can return its density on a grid in separable form.

    In this form, the input of the nonlinearity is a sum of maps of two coordinates each. The mesh extraction
    uses it to skip regions without a surface.
    """

    def separable(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> SeparableDensity | None:
        """Return the density of one shape in separable form on a grid of world points.

        Args:
            x: world coordinates [X] of the grid points along x.
            y: world coordinates [Y] of the grid points along y.
            z: world coordinates [Z] of the grid points along z.

        Returns: the density as maps of two coordinates; None if the planes are not aligned with the axes.
        """


_IMPLS = ("auto", "separable", "pointwise")
# Number of points that are decoded at once if no gradient is needed; limits the required memory.
_POINT_CHUNK = 1 << 17


class DecoderWeights(NamedTuple):
    """Weights of the decoder's density: sigma_raw = w_sigma @ softplus(w0 @ features + b0) + b_sigma.

    The weights are already multiplied by the gains of EG3D's FullyConnectedLayer.
    """

    w0: torch.Tensor  # [J, C] weights of the first layer
    b0: torch.Tensor  # [J] biases of the first layer
    w_sigma: torch.Tensor  # [J] weights of the density in the last layer
    b_sigma: torch.Tensor  # [] bias of the density in the last layer


def sigma_from_planes(
    planes: torch.Tensor,
    plane_axes: torch.Tensor,
    weights: DecoderWeights,
    spec: SlabSpec,
    box_warp: float = 1.0,
    impl: str = "auto",
    blend: Blend | None = None,
) -> torch.Tensor:
    """Compute the raw density of feature planes at the points of a slab.

    Features are bilinear samples (0 outside, align_corners=False) of the K planes at world * 2 / box_warp,
    averaged over the planes, as in EG3D's ImportanceRenderer and OSGDecoder. Differentiable in planes and
    weights.

    Args:
        planes: feature planes [N, K, C, P, Q].
        plane_axes: [K, 3, 3] basis of each plane in world coordinates, as in EG3D.
        weights: weights of the decoder.
        spec: points of the slab.
        box_warp: side of the cube that the planes cover, in world units.
        impl: implementation, 'separable' or 'pointwise'. 'auto' selects 'separable' where possible.
        blend: z coordinates in world units between the slices of the first plane; None: it has no slices.

    Returns: sigma_raw [N, D, H, W].

    Raises: ValueError for 'separable' with planes that are not axis-aligned, or with a skewed lattice.
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
    is_straight = spec.lattice == "straight"
    if impl == "separable" and not is_straight:
        raise ValueError(
            f"density_grid: impl='separable' needs a grid with lattice='straight', got {spec.lattice!r}. Use"
            " impl='auto'."
        )
    # None if the planes are not axis-aligned
    pairs = projection_axes(plane_axes) if is_straight and impl != "pointwise" else None
    if pairs is not None:
        axes = [axis.to(planes.dtype) for axis in spec.axes()]
        depth, height, width = spec.shape
        maps = grid_maps(planes, pairs, axes, weights.w0, weights.b0, box_warp, blend)
        density_weights = (weights.w_sigma, weights.b_sigma)
        # If every map depends on x, the samples of a batch can be concatenated along x: one call computes
        # all.
        if all(map_batch.shape[1] == width for map_batch in maps.maps):
            sigma = maps.samples_along_x().density(*density_weights, (len(planes) * width, height, depth))
            # [N X, Y, Z] -> [N, X, Y, Z] -> [N, D, H, W]
            return sigma.unflatten(0, (len(planes), width)).permute(0, 3, 2, 1).contiguous()
        # Otherwise a map [N, 1, J, Y, Z] is shared along x, and each sample needs its own call.
        volumes = [
            maps.sample(sample_index).density(*density_weights, (width, height, depth)).permute(2, 1, 0)
            for sample_index in range(len(planes))
        ]
        return torch.stack(volumes)  # [N, D, H, W], contiguous
    if impl == "separable":
        raise ValueError(
            "density_grid: impl='separable' needs axis-aligned planes, but these planes are not aligned with"
            " the axes. Use impl='auto'."
        )
    if impl == "auto" and is_straight:
        _warn_not_separable()
    points = spec.points().to(planes)  # [D, H, W, 3], components x, y, z
    point_impl = "ref" if impl == "pointwise" else "auto"
    return sigma_at(
        planes, plane_axes, weights, points.reshape(-1, 3), box_warp, point_impl, blend=blend
    ).unflatten(1, spec.shape)


@cache
def _warn_not_separable() -> None:
    """Warn that the slow implementation is used. The cache makes the warning appear once per process."""
    warnings.warn(
        "density_grid: the planes are not axis-aligned, so each point is decoded by itself (slower).",
        # the caller of `density_grid`
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
    blend: Blend | None = None,
) -> torch.Tensor:
    """Compute the raw density of feature planes at arbitrary points.

    Axis-aligned planes are computed by the operator `triplane_decode`. Differentiable in planes, weights and
    points.

    Args:
        planes: feature planes [N, K, C, P, Q].
        plane_axes: [K, 3, 3] basis of each plane in world coordinates, as in EG3D.
        weights: weights of the decoder.
        points: world coordinates [number of points, 3].
        box_warp: side of the cube that the planes cover, in world units.
        impl: implementation of the operator; see `torch_utils.ops.triplane_decode`.
        merged: planes in the layout of the operator, if they are already computed.
        blend: z coordinates in world units between the slices of the first plane; None: it has no slices.

    Returns: sigma_raw [N, number of points].
    """
    use_reference = implementations.current(impl, "sigma_at") == "ref"
    pairs = None if use_reference else projection_axes(plane_axes) if merged is None else merged.pairs
    if pairs is None:
        inputs = (planes, points, *weights)
        # With gradients, chunks would not save memory, because the graph holds the activations of all chunks.
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
            return _decode_points(planes, plane_axes, weights, points, box_warp, blend)
        return torch.cat(
            [
                _decode_points(planes, plane_axes, weights, point_chunk, box_warp, blend)
                for point_chunk in points.split(_POINT_CHUNK)
            ],
            dim=1,
        )
    # The operator expects the weights of both layers. The density is the only output here: [1, J] and [1].
    both_layers = BothLayers(weights.w0, weights.b0, weights.w_sigma[None], weights.b_sigma[None])
    # [P, 3] -> [N, P, 3]
    points = points.expand(len(planes), -1, -1)
    return triplane_decode(
        planes, pairs if merged is None else plane_axes, points, box_warp, both_layers, impl, merged, blend
    )[1].squeeze(2)


def plane_features(
    planes: torch.Tensor,
    plane_axes: torch.Tensor,
    points: torch.Tensor,
    box_warp: float,
    blend: Blend | None = None,
) -> torch.Tensor:
    """Sample the features of planes at points: bilinear samples of every plane, averaged over the planes.

    Args:
        planes: feature planes [N, K, C, P, Q].
        plane_axes: [K, 3, 3] basis of each plane in world coordinates, as in EG3D.
        points: world coordinates [number of points, 3].
        box_warp: side of the cube that the planes cover, in world units.
        blend: z coordinates in world units between the slices of the first plane; None: it has no slices.

    Returns: features [N, C, number of points].
    """
    inverse_axes = torch.linalg.inv(plane_axes).to(points)
    # As EG3D's project_onto_planes: the first two coordinates of a point in the basis of each plane.
    plane_positions = (points * (2 / box_warp) @ inverse_axes)[..., :2]  # [K, P, 2], (width, height)
    # grid_sample expects a two-dimensional grid, so the points form a grid of one row.
    plane_positions = plane_positions[None, :, None].expand(
        planes.shape[0], -1, -1, -1, -1
    )  # [N, K, 1, P, 2]
    sampled_features = F.grid_sample(
        planes.flatten(0, 1),
        plane_positions.flatten(0, 1),
        mode="bilinear",
        padding_mode="zeros",
        align_corners=False,
    )  # [N K, C, 1, P]
    features = sampled_features.squeeze(2).unflatten(0, planes.shape[:2])  # [N, K, C, P]
    if blend is not None:
        weights = front_weights(points[:, 2], blend)[None]  # [1, P], the same for all samples
        first_plane = weigh_slices(features[:, 0], weights)
        features = torch.cat([first_plane[:, None], features[:, 1:]], dim=1)
    return features.mean(dim=1)  # [N, C, P]


def _decode_points(
    planes: torch.Tensor,
    plane_axes: torch.Tensor,
    weights: DecoderWeights,
    points: torch.Tensor,
    box_warp: float,
    blend: Blend | None,
) -> torch.Tensor:
    """Compute the raw density [N, number of points] of all points at once.

    This slow function is the reference for the other implementations in this file. The arguments are those of
    `sigma_at`.
    """
    features = plane_features(planes, plane_axes, points, box_warp, blend).transpose(1, 2)  # [N, P, C]
    return F.softplus(F.linear(features, weights.w0, weights.b0)) @ weights.w_sigma + weights.b_sigma


def normalise_slab(sigma: torch.Tensor, value_max: float = 100.0) -> torch.Tensor:
    """Scale each slab to [0, value_max] by its own range: (sigma - min) / (max - min) * value_max.

    Differentiable in sigma, also through the minimum and the maximum. If several points have the extreme
    value, they share its gradient evenly.

    Args:
        sigma: densities [N, ...] with at least one further axis.
        value_max: largest value of the result, above 0.

    Returns: tensor of the same shape. A constant slab gives zeros with zero gradient.

    Deviates: the division of the paper (arXiv 2606.27305) gives NaN for a constant slab.
    """
    assert sigma.ndim >= 2 and sigma[:1].numel() > 0
    # all axes except the batch
    dims = tuple(range(1, sigma.ndim))
    low = sigma.amin(dim=dims, keepdim=True)
    high = sigma.amax(dim=dims, keepdim=True)
    sigma_range = high - low
    # The inner `where` avoids 0 / 0. Its gradient would be NaN although the outer `where` discards the value.
    is_constant = sigma_range == 0
    scaled_sigma = (
        (sigma - low) / torch.where(is_constant, torch.ones_like(sigma_range), sigma_range) * value_max
    )
    return torch.where(is_constant, torch.zeros_like(scaled_sigma), scaled_sigma)


# A tri-grid (PanoHead, arXiv:2303.13071) has a stack of D parallel slices in place of each plane, and
# interpolates linearly between the slices. The average over stacks and the first layer are linear, so the
# pre-activation at the grid point (x, y, z) is
#     h[j] = b0[j] + sum_d (T_z[z, d] A[j, d, x, y] + T_y[y, d] B[j, d, x, z] + T_x[x, d] C[j, d, y, z]),
#     sigma_raw = sum_j w[j] softplus(h[j]) + b,
# where A, B and C are the stacks whose slices lie along z, y and x after the first layer, and T_z, T_y, T_x
# are the interpolation weights of the slices. A row of T has at most two non-zeros. This is no sum of maps of
# two coordinates, so neither `slab_density` nor the bounds of bricks apply. Every point is evaluated, but by
# matrix products.

# Coordinates (0, 1, 2 for x, y, z) along the width, the height and the slices of a stack.
Order = tuple[int, int, int]

# Number of pre-activations that are computed at once: 512 KiB on the CPU, which fit into the second-level
# cache of a core, and 64 MiB on a GPU.
_CPU_BLOCK = 1 << 17
_CUDA_BLOCK = 1 << 24
# On the CPU with gradients, blocks are larger, because each block is a node of autograd's graph.
_RECORDED_BLOCK = 1 << 22


def tri_grid_density(
    planes: torch.Tensor,
    axis_orders: Sequence[Order],
    weights: DecoderWeights,
    axes: Sequence[torch.Tensor],
    extent: float = 1.0,
) -> torch.Tensor:
    """Compute the raw density of a tri-grid on a grid of points.

    Differentiable in planes and weights. If there is more than one block, the pre-activations are computed
    again in the backward pass, to save memory.

    Args:
        planes: stacks [N, 3, C, D, P, Q].
        axis_orders: coordinates along the axes of each stack. The slices of no two stacks lie along the same
            coordinate.
        weights: weights of the decoder.
        axes: coordinates x [X], y [Y], z [Z] in plane units (world * 2 / box_warp), on the CPU.
        extent: extent of the slices, in edge lengths of the cube; see `sample_tri_grid`.

    Returns: sigma_raw [N, X, Y, Z].
    """
    # [X, D], [Y, D], [Z, D]: interpolation weights T of the slices
    blend_x, blend_y, blend_z = (_blend(axis, planes.shape[3], extent).to(planes) for axis in axes)
    # by the coordinate along the slices; the division by the number of stacks is the average over them
    stacks = {
        axis_order[2]: _hidden(planes[:, stack_index], axis_order, weights.w0 / len(axis_orders), axes)
        for stack_index, axis_order in enumerate(axis_orders)
    }
    a = stacks[2]  # [N, J, D, X, Y]
    b = stacks[1].permute(4, 0, 1, 3, 2)  # [N, J, D, X, Z] -> [Z, N, J, X, D]
    c = stacks[0].permute(4, 0, 1, 2, 3).contiguous()  # [N, J, D, Y, Z] -> [Z, N, J, D, Y]
    # [Z, N, J, X, D + 1]: the bias b0 becomes one more slice, whose weight in blend_y is 1.
    b = torch.cat([b, weights.b0[:, None, None].expand(*b.shape[:4], 1)], dim=4)
    blend_y = torch.cat([blend_y, torch.ones_like(blend_y[:, :1])], dim=1)
    needs_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (planes, *weights))
    block_size = _CUDA_BLOCK if planes.is_cuda else _RECORDED_BLOCK if needs_gradient else _CPU_BLOCK
    # number of pre-activations of one x and one z index: N J Y
    line_size = a.shape[0] * a.shape[1] * a.shape[4]
    # Without gradients, each thread of the CPU computes a share of the x indices; -(-a // b) rounds up.
    row_count = min(
        max(1, block_size // line_size),
        a.shape[3] if needs_gradient else -(-a.shape[3] // torch.get_num_threads()),
    )
    layer_count = min(max(1, block_size // (line_size * row_count)), len(b))
    recompute = needs_gradient and (row_count < a.shape[3] or layer_count < len(b))

    def evaluate_rows(a_rows: torch.Tensor, b_rows: torch.Tensor, x_rows: torch.Tensor) -> torch.Tensor:
        """Compute the raw density [Z, N, R, Y] of a range of R x indices at all z indices."""
        # [D, N, J, R, Y]: D comes first, so that a block is one matrix product
        a_rows = a_rows.movedim(2, 0).contiguous()
        layer_blocks = []
        for z_layers, b_layers, c_layers in zip(
            blend_z.split(layer_count), b_rows.split(layer_count), c.split(layer_count), strict=True
        ):
            block_inputs = (
                a_rows,
                b_layers,
                c_layers,
                x_rows,
                blend_y,
                z_layers,
                weights.w_sigma,
                weights.b_sigma,
            )
            layer_blocks.append(
                checkpoint(_block, *block_inputs, use_reentrant=False) if recompute else _block(*block_inputs)
            )
        return torch.cat(layer_blocks)  # [Z, N, R, Y]

    row_splits = a.split(row_count, dim=3), b.split(row_count, dim=3), blend_x.split(row_count)
    row_blocks = (
        list(map(evaluate_rows, *row_splits))
        if needs_gradient or planes.is_cuda
        else _in_threads(evaluate_rows, *row_splits)
    )
    return torch.cat(row_blocks, dim=2).permute(1, 2, 3, 0)  # [Z, N, X, Y] -> [N, X, Y, Z]


def _in_threads(
    function: Callable[..., torch.Tensor], *argument_sequences: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Call a function without gradients in as many threads as torch uses, each with serial operations.

    If the small matrix products were parallel themselves, their threads would mostly wait for each other.

    Args:
        function: function to call.
        argument_sequences: one sequence for each argument of the function, as for `map`.

    Returns: the results, in order.
    """
    thread_count = torch.get_num_threads()
    # operations within a thread are then serial
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(thread_count) as pool:
            return list(pool.map(torch.no_grad()(function), *argument_sequences))
    finally:
        torch.set_num_threads(thread_count)


def _blend(positions: torch.Tensor, slice_count: int, extent: float) -> torch.Tensor:
    """Compute the weights of linear interpolation between the slices of a stack.

    Args:
        positions: coordinates [points] along the slices, in plane units.
        slice_count: number D of slices.
        extent: extent of the slices, in edge lengths of the cube.

    Returns: weights [points, D].
    """
    weight_matrix, touched_slices = interpolation_matrix(positions / extent, slice_count)
    return torch.zeros(len(positions), slice_count, dtype=positions.dtype).index_copy(
        1, torch.arange(slice_count)[touched_slices], weight_matrix.to(positions.dtype)
    )


def _hidden(
    stack: torch.Tensor, axis_order: Order, w0: torch.Tensor, axes: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Sample a stack on a grid of its two coordinates, and apply the first layer of the decoder.

    Args:
        stack: features [N, C, D, P, Q] of the D parallel slices.
        axis_order: coordinates along the axes of the stack.
        w0: weights [J, C] of the first layer.
        axes: coordinates x [X], y [Y], z [Z] in plane units.

    Returns: pre-activations without the bias, [N, J, D, lower axis, higher axis], where x is lower than y,
        and y is lower than z.
    """
    width, height, _ = axis_order
    rows, row_slice = interpolation_matrix(axes[height], stack.shape[3])
    columns, column_slice = interpolation_matrix(axes[width], stack.shape[4])
    # [N, C, D, height, width]
    sampled_features = rows.to(stack) @ stack[..., row_slice, column_slice] @ columns.to(stack).T
    return torch.einsum(
        "jc,ncduv->njduv", w0, sampled_features.transpose(3, 4) if height > width else sampled_features
    )


def _block(a, b, c, blend_x, blend_y, blend_z, w_sigma, b_sigma) -> torch.Tensor:
    """Compute the raw density [L, N, R, Y] of a block of L z indices and R x indices.

    The comment above `tri_grid_density` explains the formula and its symbols.

    Args:
        a: stack A [D, N, J, R, Y].
        b: stack B [L, N, J, R, D + 1], whose last slice is the bias.
        c: stack C [L, N, J, D, Y].
        blend_x: interpolation weights T_x [R, D].
        blend_y: interpolation weights T_y [Y, D + 1].
        blend_z: interpolation weights T_z [L, D].
        w_sigma: weights [J] of the density.
        b_sigma: bias [] of the density.
    """
    layer_count = len(b)
    slice_count, n, j, r, y = a.shape
    # sum_d T_z A, [L, D] @ [D, N J R Y]. The two other terms are added in place: this memory is the largest.
    pre_activations = (blend_z @ a.view(slice_count, -1)).view(-1, y)  # [L N J R, Y]
    pre_activations.addmm_(b.reshape(-1, slice_count + 1), blend_y.T)  # + b0 + sum_d T_y B
    # + sum_d T_x C: [L N J, R, Y]
    pre_activations = pre_activations.view(-1, r, y).baddbmm_(
        blend_x.expand(layer_count * n * j, -1, -1), c.flatten(0, 2)
    )
    activations = F.softplus(pre_activations).view(layer_count * n, j, r * y)
    return (w_sigma @ activations).view(layer_count, n, r, y) + b_sigma
