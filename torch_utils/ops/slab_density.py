"""Compute the raw density of a tri-plane decoder on a regular grid, from maps of two coordinates each.

    sigma_raw[x, y, z] = sum_j w[j] softplus(A[x, j, y] + B[x, j, z] + C[j, y, z]) + b

The features of EG3D's tri-planes (Chan et al. 2022) are a sum of functions of two coordinates. The first
layer of the decoder is linear, so its pre-activations, the arguments of the softplus, are a sum of maps A, B
and C of two coordinates. w and b are the weights and the bias of the second layer. A map that a layout of
planes does not have is omitted (released EG3D checkpoints have only A and B). The pre-activations of all
points are never stored together; the backward pass computes them again.

Shapes: J hidden units; X, Y and Z grid points per axis.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch.nn import functional as F

from torch_utils.ops.implementations import alike, choose, define, once

_T = TypeVar("_T")

# Number of elements of a buffer on a CPU, 512 KiB in float32. Two
# buffers fit into the second-level cache of a core.
_CPU_CHUNK = 1 << 17
# Number of elements of a buffer on CUDA, 64 MiB, which is enough to use the whole device
_CUDA_CHUNK = 1 << 24
# Upper bound of |h| for a pre-activation h, below which exp(h) and its factors are normal numbers in float32
_EXP_RANGE = 85.0


def slab_density(
    maps: Sequence[torch.Tensor],
    w: torch.Tensor,
    b: torch.Tensor,
    shape: Sequence[int],
    impl: str = "auto",
    chunk: int | None = None,
) -> torch.Tensor:
    """Compute the raw density on the complete grid.

    Args:
        maps: one to three maps with the shapes [X, J, Y, 1], [X, J, 1, Z] and [1, J, Y, Z], in any order,
            each shape at most once.
        w: weights [J] of the second layer.
        b: bias of the second layer, a tensor with one element.
        shape: numbers of grid points (X, Y, Z).
        impl: see `torch_utils.ops.implementations`.
        chunk: number of elements of the buffer of the torch implementation; None: 2^17 on a CPU, 2^24 on
            CUDA.

    Returns: sigma_raw [X, Y, Z].
    Differentiable in maps, w and b, once ("ref": to any order).
    Raises: ValueError for maps of other shapes, for an unknown `impl`, or for "compiled" if the compiled op
        cannot be used.
    """
    x, y, z = shape = tuple(int(n) for n in shape)
    # By the shape of a map: its name and its axis of length 1
    map_kind_by_shape: dict[tuple[int, ...], tuple[str, int]] = {
        (x, len(w), y, 1): ("xy", 3),
        (x, len(w), 1, z): ("xz", 2),
        (1, len(w), y, z): ("yz", 0),
    }
    # The shape of a map shows which of the three it is.
    map_kinds = [map_kind_by_shape[tuple(m.shape)] for m in maps if tuple(m.shape) in map_kind_by_shape]
    if not maps or len(map_kinds) < len(maps) or (len(set(map_kinds)) != len(map_kinds) and min(shape) > 1):
        raise ValueError(
            "slab_density: maps must have the shapes [X, J, Y, 1], [X, J, 1, Z] or [1, J, Y, Z] with X, Y, Z"
            f" = {list(shape)} and J = {len(w)}, each at most once, got {[list(m.shape) for m in maps]}."
        )
    # With a single point along an axis, different maps have the same
    # shape, and the op could not distinguish them.
    is_distinct = min(shape) > 1
    if w.device.type == "cpu":
        # Also with a single point along an axis, if the other two axes have more.
        is_distinct = len(map_kind_by_shape) == 3
    is_supported = alike(w, *maps, b) and is_distinct
    implementation_name = choose("slab_density", impl, "slab_density", w.device.type, is_supported)
    if implementation_name == "ref":
        return slab_density_ref(maps, w, b, shape)
    if implementation_name == "torch":
        return _SlabDensity.apply(shape, chunk, w, b, *maps)
    # The compiled op takes the maps without their axis of length 1,
    # in a fixed order, and None for a missing map.
    flat_maps = {name: m.squeeze(axis).contiguous() for (name, axis), m in zip(map_kinds, maps, strict=True)}
    return torch.ops.eg3d_rlhf.slab_density(
        flat_maps.get("xy"), flat_maps.get("xz"), flat_maps.get("yz"), w.contiguous(), b, list(shape)
    )


def slab_density_ref(
    maps: Sequence[torch.Tensor], w: torch.Tensor, b: torch.Tensor, shape: Sequence[int]
) -> torch.Tensor:
    """Compute the definition of `slab_density`, with all pre-activations [X, J, Y, Z] at once."""
    pre_activations: Any = sum(m.expand(shape[0], len(w), shape[1], shape[2]) for m in maps)
    return torch.einsum("j,xjyz->xyz", w, F.softplus(pre_activations)) + b


def _save(ctx, inputs, output) -> None:
    """Store the weights and the maps for the backward pass, and which of the three maps are present."""
    xy, xz, yz, w, _, _ = inputs
    ctx.save_for_backward(w, *(m for m in (xy, xz, yz) if m is not None))
    ctx.present = [m is not None for m in (xy, xz, yz)]


@once("slab_density")
def _gradients(ctx, grad):
    """Return the gradients of the six arguments of the op.

    The gradients of missing maps and of the shape are None.
    """
    w, *saved_maps = ctx.saved_tensors
    remaining_maps = iter(saved_maps)
    maps = [next(remaining_maps) if is_present else None for is_present in ctx.present]
    grad_w, *grad_maps = torch.ops.eg3d_rlhf.slab_density_backward(grad.contiguous(), *maps, w)
    return (
        *(g if is_present else None for g, is_present in zip(grad_maps, ctx.present, strict=True)),
        grad_w,
        grad.sum(),
        None,
    )


define(
    "slab_density(Tensor? xy, Tensor? xz, Tensor? yz, Tensor w, Tensor b, int[] shape) -> Tensor",
    lambda xy, xz, yz, w, b, shape: w.new_empty(shape),
    _gradients,
    _save,
)
define(
    "slab_density_backward(Tensor grad, Tensor? xy, Tensor? xz, Tensor? yz, Tensor w) -> (Tensor, Tensor,"
    " Tensor, Tensor)",
    lambda grad, xy, xz, yz, w: (
        torch.empty_like(w),
        *(w.new_empty(0) if m is None else torch.empty_like(m) for m in (xy, xz, yz)),
    ),
)


def _cut(grid_map: torch.Tensor, x: slice, y: slice) -> torch.Tensor:
    """Return the part of a map [X or 1, J, Y or 1, Z or 1] that belongs to a block of the grid.

    Axes of length 1 are not cut, because they are broadcast.

    Args:
        grid_map: map.
        x: range of x of the block.
        y: range of y of the block.
    """
    return grid_map[
        x if grid_map.shape[0] > 1 else slice(None), :, y if grid_map.shape[2] > 1 else slice(None)
    ]


class _Volume:
    """Iteration over the grid in blocks, which all use the same buffer.

    For each point of a block and each hidden unit, the buffer contains t = exp(h), where h is the
    pre-activation. Since exp(A + B + C) = exp(A) exp(B) exp(C), exponentials are computed for the maps and
    not for each point. From t follow softplus(h) = log1p(t) and sigmoid(h) = t / (1 + t). The buffer contains
    h itself if an exponential would be too large or too small for float32, and for float64.
    """

    def __init__(self, maps: Sequence[torch.Tensor], shape: tuple[int, int, int], chunk: int | None):
        self.shape = shape
        # Upper bound of |h| over all points, for each hidden unit [J]
        largest_magnitudes: Any = sum(m.detach().abs().amax(dim=(0, 2, 3)) for m in maps)
        # True: the buffer contains exp(h), a product; False: it contains h, a sum
        self.product = maps[0].dtype == torch.float32 and bool(largest_magnitudes.max() < _EXP_RANGE)
        self.factors = [m.detach().exp() if self.product else m.detach() for m in maps]
        self.on_cpu = maps[0].device.type == "cpu"
        self.chunk = chunk or (_CPU_CHUNK if self.on_cpu else _CUDA_CHUNK)

    def parts(self, process_range: Callable[[range], _T]) -> list[_T]:
        """Apply a function to consecutive ranges of x that together cover the grid, and return its results.

        On a CPU there is one range and one thread for each of torch's threads, and operations inside a range
        are serial. This is faster than several threads in each small operation, which would have to wait for
        each other after every operation. torch's number of threads is restored at the end.

        Args:
            process_range: function of a range of x.

        Returns: the results in the order of the ranges.
        """
        count_x = self.shape[0]
        torch_thread_count = torch.get_num_threads()
        thread_count = min(torch_thread_count, count_x) if self.on_cpu else 1
        if thread_count == 1:
            return [process_range(range(count_x))]
        range_edges = [count_x * i // thread_count for i in range(thread_count + 1)]
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(thread_count) as pool:
                # The mode no_grad applies to one thread, so it is set in each of them.
                return list(
                    pool.map(torch.no_grad()(process_range), map(range, range_edges[:-1], range_edges[1:]))
                )
        finally:
            torch.set_num_threads(torch_thread_count)

    def blocks(self, x_range: range) -> Iterator[tuple[slice, slice, torch.Tensor]]:
        """Iterate over blocks of about `chunk` elements that cover a range of x.

        A block consists of several complete slices of constant x, or of a part of one slice along y.

        Args:
            x_range: range of x.

        Yields: the x and the y of the block as slices, and t or h [x, J, y, Z]. This tensor is overwritten by
            the next block.
        """
        _, count_y, count_z = self.shape
        unit_count = self.factors[0].shape[1]
        # As many complete slices of constant x as fit into the buffer.
        # A slice that does not fit is divided along y.
        step_x = max(1, self.chunk // (unit_count * count_y * count_z))
        band_count = math.ceil(unit_count * count_y * count_z / self.chunk) if step_x == 1 else 1
        step_y = math.ceil(count_y / min(band_count, count_y))
        buffer = self.factors[0].new_empty(min(step_x, len(x_range)) * unit_count * step_y * count_z)
        for start_x in range(x_range.start, x_range.stop, step_x):
            for start_y in range(0, count_y, step_y):
                x = slice(start_x, min(start_x + step_x, x_range.stop))
                y = slice(start_y, min(start_y + step_y, count_y))
                shape = (x.stop - x.start, unit_count, y.stop - y.start, count_z)
                yield x, y, self._fill(buffer[: math.prod(shape)].view(shape), x, y)

    def _fill(self, block: torch.Tensor, x: slice, y: slice) -> torch.Tensor:
        """Write t or h of all points of a block into `block`, and return it.

        Args:
            block: memory [x, J, y, Z] of the block.
            x: range of x of the block.
            y: range of y of the block.
        """
        # t is the product of the exponentials of the maps, h is the sum of the maps.
        combine = torch.mul if self.product else torch.add
        first_factor, *other_factors = (_cut(factor, x, y) for factor in self.factors)
        if not other_factors:
            return block.copy_(first_factor.expand(block.shape))
        combine(first_factor, other_factors[0], out=block)
        for factor in other_factors[1:]:
            combine(block, factor, out=block)
        return block

    def softplus(self, block: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Return softplus(h) of a block.

        Args:
            block: t or h of the points, see the class.
            out: memory that may be used for the result; it may be that of the block.
        """
        return torch.log1p(block, out=out) if self.product else F.softplus(block)

    def sigmoid_(self, block: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
        """Replace the contents of a block by sigmoid(h), and return it.

        Args:
            block: t or h of the points, see the class.
            scratch: memory of the same shape, which is overwritten.
        """
        return block.div_(torch.add(block, 1, out=scratch)) if self.product else block.sigmoid_()


class _SlabDensity(torch.autograd.Function):
    """Autograd function of `slab_density` in torch. The backward pass computes the pre-activations again."""

    @staticmethod
    def forward(ctx, shape, chunk, w, b, *maps):
        ctx.save_for_backward(w, *maps)
        ctx.shape = shape
        ctx.chunk = chunk
        volume = _Volume(maps, shape, chunk)
        sigma = w.new_empty(shape)  # written by all threads, at disjoint x
        detached_w = w.detach()  # the threads must not record a graph

        def process_range(x_range: range) -> None:
            for x, y, block in volume.blocks(x_range):
                # [J] @ [x, J, y Z] -> [x, y Z]
                activation = volume.softplus(block, out=block)
                sigma[x, y] = torch.matmul(detached_w, activation.flatten(2)).view(
                    block.shape[0], block.shape[2], block.shape[3]
                )

        volume.parts(process_range)
        return sigma.add_(b)

    @staticmethod
    @once("slab_density")
    def backward(ctx, grad):
        w, *maps = ctx.saved_tensors
        _, _, need_w, need_b, *need_maps = ctx.needs_input_grad  # the first two are shape and chunk
        grad_w, grad_maps = _volume_gradients(
            _Volume(maps, ctx.shape, ctx.chunk), grad, w.detach(), maps, need_w, need_maps
        )
        return None, None, grad_w, grad.sum() if need_b else None, *grad_maps


def _volume_gradients(
    volume: _Volume,
    grad: torch.Tensor,
    w: torch.Tensor,
    maps: Sequence[torch.Tensor],
    need_w: bool,
    need_maps: Sequence[bool],
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    """Compute the gradients of w [J] and of the maps. A gradient that is not needed is None.

    With the pre-activations h and the gradient g of sigma_raw, the gradients are

        d/dw[j]   = sum of g * softplus(h[j]) over all points
        d/dmap[j] = w[j] * sum of g * sigmoid(h[j]) over the axes along which the map has the length 1

    Args:
        volume: iteration over the grid in blocks.
        grad: gradient with respect to sigma_raw [X, Y, Z].
        w: weights [J] of the second layer.
        maps: maps A, B and C that are present, see `slab_density`.
        need_w: True if the gradient of w is needed.
        need_maps: True for each map whose gradient is needed.
    """
    # Gradients of the maps, which all threads use
    shared_grad_maps = [
        torch.zeros_like(m) if is_needed else None for m, is_needed in zip(maps, need_maps, strict=True)
    ]

    def process_range(x_range: range) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        """Compute the contributions of a range of x to the gradients of w and of the maps.

        Threads write to different rows of the maps that depend on x. The contributions to other gradients are
        added in the order of the ranges afterwards, so the result does not depend on the order in which
        threads finish.
        """
        range_grad_w = torch.zeros_like(w)
        range_grad_maps = [
            torch.zeros_like(m) if m is not None and m.shape[0] == 1 else m for m in shared_grad_maps
        ]
        scratch_memory = w.new_empty(0)
        for x, y, block in volume.blocks(x_range):
            # Grows to the largest block once, then is reused.
            scratch_memory = (
                scratch_memory if scratch_memory.numel() >= block.numel() else w.new_empty(block.numel())
            )
            spare_block = scratch_memory[: block.numel()].view(block.shape)
            block_grad = grad[x, y].contiguous()  # gradient of the block, [x, y, Z]
            if need_w:
                activation = volume.softplus(block, out=spare_block)
                range_grad_w += torch.matmul(activation.flatten(2), block_grad.flatten(1)[..., None]).sum(
                    dim=(0, 2)
                )
            if any(need_maps):
                # In place: the block is overwritten, and must not be read again.
                hidden_grad = volume.sigmoid_(block, scratch=spare_block).mul_(
                    block_grad[:, None]
                )  # [x, J, y, Z]
                # The gradient of a broadcast map is the sum over the axes along which it was broadcast.
                for grad_map_block in (_cut(m, x, y) for m in range_grad_maps if m is not None):
                    broadcast_axes = [
                        axis
                        for axis in range(4)
                        if grad_map_block.shape[axis] == 1 and hidden_grad.shape[axis] > 1
                    ]
                    grad_map_block += (
                        hidden_grad.sum(dim=broadcast_axes, keepdim=True) if broadcast_axes else hidden_grad
                    )
        return range_grad_w, range_grad_maps

    range_gradients = volume.parts(process_range)
    for _, range_grad_maps in range_gradients:
        for grad_map, range_grad_map in zip(shared_grad_maps, range_grad_maps, strict=True):
            # `range_grad_map is grad_map` for maps with an x axis, which were written in place.
            if grad_map is not None and range_grad_map is not None and range_grad_map is not grad_map:
                grad_map += range_grad_map
    # The factor w[j] is common to all terms of the sum, so it is applied once, at the end.
    grad_maps = [None if m is None else m.mul_(w[None, :, None, None]) for m in shared_grad_maps]
    grad_w: Any = sum(range_grad_w for range_grad_w, _ in range_gradients) if need_w else None
    return grad_w, grad_maps
