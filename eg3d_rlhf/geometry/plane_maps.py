"""Maps of two coordinates whose sum is the input of the decoder's nonlinearity on a grid.

A tri-plane field (EG3D, arXiv:2112.07945) averages bilinear samples of K axis-aligned planes, and applies a
linear layer with J hidden units. At the grid point (x, y, z), the pre-activation h[j] of hidden unit j is
therefore a sum of maps of two coordinates each:

    h[j] = A[j, x, y] + B[j, x, z] + C[j, y, z]
    sigma_raw = sum_j w[j] softplus(h[j]) + b

where w and b are the weights and the bias of the density. Each plane is sampled once per pair of coordinates
instead of once per point. Planes that depend on the same two coordinates share one map: released EG3D
checkpoints project onto (x, y), (x, z) and (z, x), which gives two maps.

If the xy plane has two slices (`torch_utils.ops.triplane_decode`), its contribution is f(z) A[j, x, y] + (1 -
f(z)) A'[j, x, y], where A is the map of the slice in front, A' the map of the slice at the back, and f(z) the
weight of the slice in front. The weight is 0 or 1 except in a short range of z, so most of the grid is
computed from three maps as before.

Shapes: N batch; K planes; C channels; P, Q rows and columns of a plane; J hidden units of the decoder; X, Y,
Z grid points along x, y, z.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint

from torch_utils.ops.implementations import once
from torch_utils.ops.slab_density import slab_density
from torch_utils.ops.triplane_decode import Blend, front_weights

# Number of pre-activations between the two slices that are computed at once: 16 MB, which bounds the memory.
_BLEND_CHUNK = 1 << 22


def interpolation_matrix(coordinates: torch.Tensor, texel_count: int) -> tuple[torch.Tensor, slice]:
    """Compute the weights of linear interpolation along one axis of a plane.

    Args:
        coordinates: coordinates [points] in plane units, where -1 and 1 are the outer edges of the plane
            (align_corners=False). The plane is 0 outside.
        texel_count: number of texels along the axis.

    Returns: a matrix [points, touched texels] with at most two non-zeros per row, and the slice of the texels
        to which its columns belong.
    """
    # position in texels: texel i has its centre at position i
    texel_position = ((coordinates + 1) * texel_count - 1) / 2
    low_position = texel_position.floor()
    fraction = texel_position - low_position
    low_index = low_position.long()
    # The slice is clipped to the plane. A neighbour outside it matches no column, so it contributes 0.
    first_texel = min(max(int(low_index.min()), 0), texel_count - 1)
    last_texel = max(min(int(low_index.max()) + 1, texel_count - 1), first_texel)
    texels = torch.arange(first_texel, last_texel + 1)
    is_low_texel = low_index[:, None] == texels
    is_high_texel = (low_index + 1)[:, None] == texels
    return is_low_texel * (1 - fraction)[:, None] + is_high_texel * fraction[:, None], slice(
        first_texel, last_texel + 1
    )


@dataclass(frozen=True)
class PlaneMaps:
    """Pre-activations of the hidden layer on a grid, as maps of two coordinates each.

    With a batch, every map has a further first axis N; `sample` and `samples_along_x` remove it.
    """

    # One to three maps [X, J, Y, 1], [X, J, 1, Z] and [1, J, Y, Z], of which the first is that of the first
    # plane. Their broadcast sum is h, if the first plane has no slices.
    maps: list[torch.Tensor]
    back: torch.Tensor | None = None  # [X, J, Y, 1] map of the slice at the back; maps[0] is the one in front
    front: torch.Tensor | None = None  # [Z] weight of the slice in front, in ascending z

    @property
    def all_maps(self) -> list[torch.Tensor]:
        """Return all maps, with that of the slice at the back as the last one."""
        return self.maps if self.back is None else [*self.maps, self.back]

    def _with_maps(self, maps: list[torch.Tensor], front: torch.Tensor | None) -> "PlaneMaps":
        """Return an object with other maps, in the order of `all_maps`, and other weights."""
        return PlaneMaps(maps) if self.back is None else PlaneMaps(maps[:-1], maps[-1], front)

    def sample(self, sample_index: int) -> "PlaneMaps":
        """Return the maps of one sample of a batch."""
        return self._with_maps([batch[sample_index] for batch in self.all_maps], self.front)

    def samples_along_x(self) -> "PlaneMaps":
        """Return the maps of a batch as the maps of one grid with N X points along x.

        Every map must depend on x.
        """
        return self._with_maps([batch.flatten(0, 1) for batch in self.all_maps], self.front)

    def part(self, x_range: slice, y_range: slice, z_ranges: Sequence[slice]) -> "PlaneMaps":
        """Return the maps of ranges of grid points.

        Args:
            x_range: range of x indices.
            y_range: range of y indices.
            z_ranges: one or more ranges of z indices, which are concatenated.
        """
        maps = []
        for full_map in self.all_maps:
            # an axis of length 1: the map does not depend on this coordinate
            selected_map = full_map[x_range] if full_map.shape[0] > 1 else full_map
            selected_map = selected_map[:, :, y_range] if selected_map.shape[2] > 1 else selected_map
            # Concatenated slices are copied run by run; a list of indices would copy value by value.
            if selected_map.shape[3] > 1 and len(z_ranges) > 1:
                selected_map = torch.cat([selected_map[..., z_range] for z_range in z_ranges], dim=3)
            elif selected_map.shape[3] > 1:
                selected_map = selected_map[..., z_ranges[0]]
            maps.append(selected_map)
        front = None if self.front is None else torch.cat([self.front[z_range] for z_range in z_ranges])
        return self._with_maps(maps, front)

    def density(self, w: torch.Tensor, b: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
        """Compute the raw density [X, Y, Z]. Differentiable in the maps, w and b, once.

        Args:
            w: weights [J] of the density in the decoder's last layer.
            b: bias of the density, a tensor with one element.
            shape: numbers of grid points (X, Y, Z).
        """
        if self.back is None or self.front is None:
            return slab_density(self.maps, w, b, shape)
        front_map, *other_maps = self.maps
        # Runs of z indices at which only the slice in front (1), only that at the back (0), or both count.
        runs = [
            (only_slice, len(list(run)))
            for only_slice, run in itertools.groupby(
                # `front_weights` clamps, so the weights outside of the range are exactly 0 or 1.
                weight if weight in (0, 1) else None
                for weight in self.front.tolist()
            )
        ]
        run_lengths = [length for _, length in runs]
        # A single `split` has a cheaper backward pass than one index operation for each run.
        maps_of_runs = [
            one_map.split(run_lengths, dim=3) if one_map.shape[3] > 1 else [one_map] * len(runs)
            for one_map in other_maps
        ]
        weights_of_runs = self.front.to(w).split(run_lengths)
        parts = []
        for run_index, (only_slice, length) in enumerate(runs):
            run_maps = [run_parts[run_index] for run_parts in maps_of_runs]
            if only_slice is None:
                weights = weights_of_runs[run_index]
                parts.append(_blended_density(front_map, self.back, run_maps, weights, w, b))
            else:
                slice_map = front_map if only_slice else self.back  # 1.0 or 0.0
                parts.append(slab_density([slice_map, *run_maps], w, b, (*shape[:2], length)))
        return torch.cat(parts, dim=2)


def _blended_density(
    front_map: torch.Tensor,
    back_map: torch.Tensor,
    other_maps: Sequence[torch.Tensor],
    weights: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor,
) -> torch.Tensor:
    """Compute the raw density [X, Y, Z] at z indices at which both slices of the first plane count.

    The sum of the maps is computed at every point, in blocks of x that bound the memory.

    Args:
        front_map: map [X, J, Y, 1] of the slice in front.
        back_map: map [X, J, Y, 1] of the slice at the back.
        other_maps: maps [X, J, 1, Z] and [1, J, Y, Z] of the other planes, if they exist.
        weights: weights [Z] of the slice in front.
        w: weights [J] of the density in the decoder's last layer.
        b: bias of the density.
    """
    count_x, unit_count, count_y, _ = front_map.shape
    # At least one index of x, also if a single one exceeds the limit.
    block_size = max(1, _BLEND_CHUNK // (unit_count * count_y * len(weights)))
    inputs = (front_map, back_map, *other_maps, w, b)
    # With gradients, the blocks save memory only if the backward pass computes their sums again.
    is_recomputed = (
        block_size < count_x and torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    )
    blocks = []
    for start in range(0, count_x, block_size):
        x_range = slice(start, start + block_size)
        block_maps = [one_map[x_range] if one_map.shape[0] > 1 else one_map for one_map in other_maps]
        block_inputs = (front_map[x_range], back_map[x_range], block_maps, weights, w, b)
        if is_recomputed:
            blocks.append(checkpoint(_blend_block, *block_inputs, use_reentrant=False))
        else:
            blocks.append(_blend_block(*block_inputs))
    return torch.cat(blocks)


def _blend_block(
    front_map: torch.Tensor,
    back_map: torch.Tensor,
    other_maps: Sequence[torch.Tensor],
    weights: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor,
) -> torch.Tensor:
    """Compute `_blended_density` for all points at once. The arguments are the same."""
    # Both slices times their weights, for all z in one matrix product: [Z, 2] @ [2, X J Y] -> [Z, X, J, Y].
    slice_weights = torch.stack([weights, 1 - weights], dim=1)
    both_slices = torch.stack([front_map.squeeze(3), back_map.squeeze(3)])
    blended_maps = torch.tensordot(slice_weights, both_slices, dims=1)
    count_x, _, count_y, _ = front_map.shape
    # [X, J, 1, Z] -> Z times [X, J, 1, 1], and [1, J, Y, Z] -> Z times [1, J, 1, Y]
    other_layers = [[layer.unsqueeze(2) for layer in other_map.unbind(3)] for other_map in other_maps]
    layers = []
    # The points of one z are a grid with a single point along its second axis, and with y along its third,
    # because the compiled op computes several points along the last axis at once.
    for blended_map, *layer_maps in zip(blended_maps.unsqueeze(3).unbind(), *other_layers, strict=True):
        sigma = slab_density([blended_map, *layer_maps], w, b, (count_x, 1, count_y))
        layers.append(sigma[:, 0])  # [X, Y]
    return torch.stack(layers, dim=2)  # [X, Y, Z]


def grid_maps(
    planes: torch.Tensor,
    pairs: Sequence[tuple[int, int]],
    world_axes: Sequence[torch.Tensor],
    w0: torch.Tensor,
    b0: torch.Tensor,
    box_warp: float,
    blend: Blend | None = None,
) -> PlaneMaps:
    """Compute the pre-activations of the hidden layer on a grid as maps of two coordinates each.

    There is one map for each unordered pair of coordinates that occurs, and one more if the first plane has
    two slices. Differentiable in planes, w0 and b0.

    Args:
        planes: feature planes [N, K, C, P, Q].
        pairs: coordinates (0, 1, 2 for x, y, z) along the width and the height of each plane, which
            `projection_axes` returns.
        world_axes: world coordinates x [X], y [Y], z [Z] of the grid points, on the CPU.
        w0: weights [J, C] of the first layer.
        b0: biases [J] of the first layer.
        box_warp: side of the cube that the planes cover, in world units.
        blend: z coordinates in world units between the slices of the first plane; None: it has no slices.

    Returns: maps with a batch axis, [N, X, J, Y, 1], [N, X, J, 1, Z] and [N, 1, J, Y, Z].
    """
    # unordered pairs, each once, in the order of the planes
    unique_pairs = tuple(dict.fromkeys((min(pair), max(pair)) for pair in pairs))
    # World units -> plane units, where -1 and 1 are the outer edges of the planes.
    plane_axes = tuple(axis.to(planes.dtype) * (2 / box_warp) for axis in world_axes)
    features = _SampledPlanes.apply(planes, tuple(pairs), unique_pairs, plane_axes)
    # The bias is added to the map of the first plane only, since the maps are summed.
    biases = [b0] + [None] * (len(unique_pairs) - 1)
    if blend is None:
        return PlaneMaps(
            [
                _hidden_map(w0, len(pairs), bias, sampled_features, pair)
                for pair, sampled_features, bias in zip(unique_pairs, features, biases, strict=True)
            ]
        )
    # No layout has a second plane of x and y, which would have no slices.
    assert unique_pairs[0] == (0, 1) and sum(set(pair) == {0, 1} for pair in pairs) == 1
    front_count = planes.shape[2] // 2  # channels of the slice in front
    # Both slices get the bias, since their weights add up to 1.
    front_map, back_map = (
        _hidden_map(w0[:, channels], len(pairs), b0, features[0][:, channels], (0, 1))
        for channels in (slice(front_count), slice(front_count, None))
    )
    other_maps = [
        _hidden_map(w0, len(pairs), None, sampled_features, pair)
        for pair, sampled_features in zip(unique_pairs[1:], features[1:], strict=True)
    ]
    return PlaneMaps([front_map, *other_maps], back_map, front_weights(world_axes[2].cpu(), blend))


def _hidden_map(
    w0: torch.Tensor,
    plane_count: int,
    bias: torch.Tensor | None,
    sampled_features: torch.Tensor,
    pair: tuple[int, int],
) -> torch.Tensor:
    """Apply the first layer to the features of a pair of coordinates.

    Args:
        w0: weights [J, C] of the first layer.
        plane_count: number of planes K. The division by K is the average over planes.
        bias: biases [J] of the first layer; None: no bias is added.
        sampled_features: features [N, C, lower axis, higher axis].
        pair: lower and higher coordinate (0, 1, 2 for x, y, z).

    Returns: map [N, X, J, Y, 1], [N, X, J, 1, Z] or [N, 1, J, Y, Z].
    """
    # Coordinate on which the map does not depend. The three coordinates 0, 1 and 2 sum to 3.
    absent_axis = 3 - sum(pair)
    # In a map that depends on x, x comes before J, because slab_density reads slices of x.
    hidden_map = torch.einsum(
        "jc,ncuv->njuv" if absent_axis == 0 else "jc,ncuv->nujv", w0 / plane_count, sampled_features
    )
    if bias is not None:
        # Broadcast to [N, J, Y, Z] without x, and to [N, X, J, .] with x.
        hidden_map = hidden_map + (bias[:, None, None] if absent_axis == 0 else bias[:, None])
    # a new axis of length 1 for the missing coordinate
    return hidden_map.unsqueeze({0: 1, 1: 3, 2: 4}[absent_axis])


class _SampledPlanes(torch.autograd.Function):
    """Bilinear sampling of planes [N, K, C, P, Q] on a grid, with a custom backward pass.

    A plane is multiplied by an interpolation matrix from the left and from the right. Planes of the same pair
    of coordinates are summed. The result holds one tensor [N, C, lower axis, higher axis] for each pair of
    `merged`. The backward pass writes the gradients of all planes into one tensor.
    """

    @staticmethod
    def forward(ctx, planes, pairs, merged, axes):
        ctx.shape = planes.shape
        ctx.pairs = pairs
        ctx.merged = merged
        # Stored, because the backward pass multiplies by the same matrices, transposed.
        ctx.sides = [
            (
                interpolation_matrix(axes[height], planes.shape[3]),
                interpolation_matrix(axes[width], planes.shape[4]),
            )
            for width, height in pairs
        ]
        features = [None] * len(merged)
        for plane_index, ((width, height), ((rows, row_slice), (columns, column_slice))) in enumerate(
            zip(pairs, ctx.sides, strict=True)
        ):
            # the part of plane k that the grid reads, as [N, C, rows, columns]
            touched_texels = planes[:, plane_index, :, row_slice, column_slice]
            sampled_features = (
                rows.to(planes.device) @ touched_texels @ columns.to(planes.device).T
            )  # [N, C, height, width]
            # A plane of (z, x) is transposed to (x, z), so that it can be added to a plane of (x, z).
            sampled_features = sampled_features.transpose(2, 3) if height > width else sampled_features
            pair_index = merged.index((min(width, height), max(width, height)))
            # Added in place, which is safe: the first term was created in this function.
            features[pair_index] = (
                sampled_features.contiguous()
                if features[pair_index] is None
                else features[pair_index].add_(sampled_features)
            )
        return tuple(features)

    @staticmethod
    @once("density_grid", 'Use impl="pointwise" for a second derivative.')
    def backward(ctx, *grads):
        # The gradient of an unused map is None. Any other gradient has the dtype and the device of the
        # result.
        any_gradient = next(gradient for gradient in grads if gradient is not None)
        # Texels outside the touched rows and columns have the gradient 0.
        plane_gradients = any_gradient.new_zeros(ctx.shape)
        for plane_index, ((width, height), ((rows, row_slice), (columns, column_slice))) in enumerate(
            zip(ctx.pairs, ctx.sides, strict=True)
        ):
            grad = grads[ctx.merged.index((min(width, height), max(width, height)))]
            if grad is not None:
                # This undoes the transposition of the forward pass.
                grad = grad.transpose(2, 3) if height > width else grad
                plane_gradients[:, plane_index, :, row_slice, column_slice] = (
                    rows.to(grad.device).T @ grad @ columns.to(grad.device)
                )
        return plane_gradients, None, None, None  # pairs, merged and axes have no gradient
