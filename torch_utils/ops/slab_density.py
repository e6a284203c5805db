"""sigma_raw on a regular grid from maps of two coordinates each: the second step of the separable evaluation.

    sigma_raw[x, y, z] = sum_j w[j] softplus(A[x, j, y] + B[x, j, z] + C[j, y, z]) + b

A tri-plane feature is a sum of functions of two coordinates, and so is the decoder's first layer before its
softplus. A map that a plane layout does not have is omitted (released EG3D checkpoints have A and B). Nothing
of size X*Y*Z*J is ever stored: the backward pass computes the pre-activations again.

Letters: J hidden units; X, Y, Z grid points per axis.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch.nn import functional as F

from torch_utils.ops.implementations import alike, choose, define, once

_T = TypeVar("_T")

# Elements of one buffer: 512 KiB in float32. Two of them stay in a core's second-level cache.
_CPU_CHUNK = 1 << 17
_CUDA_CHUNK = 1 << 24  # 64 MiB: large enough to occupy the device
_EXP_RANGE = 85.0  # limit of |h| below which exp(h) and all its partial products are normal float32 numbers


def slab_density(
    maps: Sequence[torch.Tensor],
    w: torch.Tensor,
    b: torch.Tensor,
    shape: Sequence[int],
    impl: str = "auto",
    chunk: int | None = None,
) -> torch.Tensor:
    """Compute the raw density on the whole grid.

    Args:
        maps: one to three of [X, J, Y, 1], [X, J, 1, Z] and [1, J, Y, Z], in any order, each at most once.
        w: [J]; b: [].
        shape: (X, Y, Z).
        impl: see `torch_utils.ops.implementations`.
        chunk: elements of the working buffer of the torch path; None: chosen by device.
    Returns: sigma_raw [X, Y, Z].
    Differentiable in maps, w and b, once ("ref": to any order).
    Raises: ValueError for maps that do not fit, or an unknown `impl`.
    """
    x, y, z = shape = tuple(int(n) for n in shape)
    # Shape of a map -> its name, and its axis of length 1.
    kinds: dict[tuple[int, ...], tuple[str, int]] = {
        (x, len(w), y, 1): ("xy", 3),
        (x, len(w), 1, z): ("xz", 2),
        (1, len(w), y, z): ("yz", 0),
    }
    # A map's kind follows from its shape, so that callers need not order them.
    names = [kinds[tuple(m.shape)] for m in maps if tuple(m.shape) in kinds]
    if not maps or len(names) < len(maps) or (len(set(names)) != len(names) and min(shape) > 1):
        raise ValueError(
            f"slab_density: expected maps of X, Y, Z = {list(shape)}, J = {len(w)}, got"
            f" {[list(m.shape) for m in maps]}. Pass each of the three kinds at most once."
        )
    # With a single point along an axis, the shapes of different
    # maps are equal, and the op could not name them.
    applies = alike(w, *maps, b) and min(shape) > 1
    chosen = choose("slab_density", impl, "slab_density", w.device.type, applies)
    if chosen == "ref":
        return slab_density_ref(maps, w, b, shape)
    if chosen == "torch":
        return _SlabDensity.apply(shape, chunk, w, b, *maps)
    # The compiled op takes maps without the axis of length 1, in a fixed order, and None for a missing one.
    flat = {name: m.squeeze(axis).contiguous() for (name, axis), m in zip(names, maps, strict=True)}
    return torch.ops.eg3d_rlhf.slab_density(
        flat.get("xy"), flat.get("xz"), flat.get("yz"), w.contiguous(), b, list(shape)
    )


def slab_density_ref(
    maps: Sequence[torch.Tensor], w: torch.Tensor, b: torch.Tensor, shape: Sequence[int]
) -> torch.Tensor:
    """Compute the definition, with every pre-activation at once, [X, J, Y, Z]."""
    hidden: Any = sum(m.expand(shape[0], len(w), shape[1], shape[2]) for m in maps)
    return torch.einsum("j,xjyz->xyz", w, F.softplus(hidden)) + b


def _save(ctx, inputs, output) -> None:
    """Save the weights, the maps that are present, and which of the three they are."""
    xy, xz, yz, w, _, _ = inputs
    ctx.save_for_backward(w, *(m for m in (xy, xz, yz) if m is not None))
    ctx.present = [m is not None for m in (xy, xz, yz)]


@once("slab_density")
def _gradients(ctx, grad):
    """Return the gradients for the maps that are present, w and b."""
    w, *saved = ctx.saved_tensors
    rest = iter(saved)
    maps = [next(rest) if there else None for there in ctx.present]
    grad_w, *grad_maps = torch.ops.eg3d_rlhf.slab_density_backward(grad.contiguous(), *maps, w)
    return (
        *(g if there else None for g, there in zip(grad_maps, ctx.present, strict=True)),
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


def _cut(tensor: torch.Tensor, x: slice, y: slice) -> torch.Tensor:
    """Return a block's part of a map [X | 1, J, Y | 1, Z | 1]. An axis of length 1 is broadcast, not cut."""
    return tensor[x if tensor.shape[0] > 1 else slice(None), :, y if tensor.shape[2] > 1 else slice(None)]


class _Volume:
    """Iteration over the volume in blocks, each in the same reused buffer.

    The buffer holds t = exp(h), or h where the exponentials would leave the range of float32. Since exp(A + B
    + C) = exp(A) exp(B) exp(C), and the three factors are maps, no exponential is computed per point. With t,
    softplus(h) = log1p(t) and sigmoid(h) = t / (1 + t). float64 always takes the direct form.
    """

    def __init__(self, maps: Sequence[torch.Tensor], shape: tuple[int, int, int], chunk: int | None):
        self.shape = shape
        # Upper bound of |h| over all points, per unit [J], then over units.
        largest: Any = sum(m.detach().abs().amax(dim=(0, 2, 3)) for m in maps)
        reach = largest.max()
        self.product = maps[0].dtype == torch.float32 and bool(reach < _EXP_RANGE)
        self.factors = [m.detach().exp() if self.product else m.detach() for m in maps]
        self.on_cpu = maps[0].device.type == "cpu"
        self.chunk = chunk or (_CPU_CHUNK if self.on_cpu else _CUDA_CHUNK)

    def parts(self, work: Callable[[range], _T]) -> list[_T]:
        """Return work(range of x) over the whole of X. On a CPU each thread of torch gets one range.

        Threads over ranges, each with serial operations, replace threads inside every small operation.
        Without a barrier per operation, a busy machine does not delay them. torch's number of threads is
        restored at the end.
        """
        count_x = self.shape[0]
        before = torch.get_num_threads()
        threads = min(before, count_x) if self.on_cpu else 1
        if threads == 1:
            # On a GPU, and with a single thread, there is nothing to divide.
            return [work(range(count_x))]
        cuts = [count_x * i // threads for i in range(threads + 1)]
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(threads) as pool:
                # no_grad is a setting per thread, so each worker needs its own.
                return list(pool.map(torch.no_grad()(work), map(range, cuts[:-1], cuts[1:])))
        finally:
            torch.set_num_threads(before)

    def blocks(self, over: range) -> Iterator[tuple[slice, slice, torch.Tensor]]:
        """Yield (x, y, t or h [x, J, y, Z]) for every block of the x in `over`, about `chunk` elements each.

        A block is several whole x-slices, or a band of y of a single x-slice. The next block overwrites the
        tensor.
        """
        _, count_y, count_z = self.shape
        units = self.factors[0].shape[1]
        # As many whole x-slices as fit into the buffer; a slice that does not fit is divided along y.
        step_x = max(1, self.chunk // (units * count_y * count_z))
        bands = math.ceil(units * count_y * count_z / self.chunk) if step_x == 1 else 1
        step_y = math.ceil(count_y / min(bands, count_y))
        buffer = self.factors[0].new_empty(min(step_x, len(over)) * units * step_y * count_z)
        for start_x in range(over.start, over.stop, step_x):
            for start_y in range(0, count_y, step_y):
                x = slice(start_x, min(start_x + step_x, over.stop))
                y = slice(start_y, min(start_y + step_y, count_y))
                shape = (x.stop - x.start, units, y.stop - y.start, count_z)
                yield x, y, self._fill(buffer[: math.prod(shape)].view(shape), x, y)

    def _fill(self, block: torch.Tensor, x: slice, y: slice) -> torch.Tensor:
        """Combine the maps of a block: a product of exponentials, or a sum."""
        # exp(A + B) is a product of the factors, A + B a sum of them.
        combine = torch.mul if self.product else torch.add
        first, *rest = (_cut(factor, x, y) for factor in self.factors)
        if not rest:
            return block.copy_(first.expand(block.shape))
        combine(first, rest[0], out=block)
        for factor in rest[1:]:
            combine(block, factor, out=block)
        return block

    def softplus(self, block: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Return softplus(h) of a block. `out` may be the block itself."""
        return torch.log1p(block, out=out) if self.product else F.softplus(block)

    def sigmoid_(self, block: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
        """Return sigmoid(h), in place of the block."""
        return block.div_(torch.add(block, 1, out=scratch)) if self.product else block.sigmoid_()


class _SlabDensity(torch.autograd.Function):
    """sigma_raw [X, Y, Z] from the maps, in torch. The backward pass computes h again, block by block."""

    @staticmethod
    def forward(ctx, shape, chunk, w, b, *maps):
        ctx.save_for_backward(w, *maps)
        ctx.shape = shape
        ctx.chunk = chunk
        volume = _Volume(maps, shape, chunk)
        sigma = w.new_empty(shape)  # written by all threads, at disjoint x
        weight = w.detach()  # the threads must not record a graph

        def work(over: range) -> None:
            for x, y, block in volume.blocks(over):
                # [J] @ [x, J, y Z] -> [x, y Z]
                activation = volume.softplus(block, out=block)
                sigma[x, y] = torch.matmul(weight, activation.flatten(2)).view(
                    block.shape[0], block.shape[2], block.shape[3]
                )

        volume.parts(work)
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
    """Compute the gradients for w [J] and the maps from that of sigma [X, Y, Z]; each is None if not needed.

    d/dw[j] = sum grad * softplus(h[j])
    d/dmap[j] = w[j] * sum grad * sigmoid(h[j]), over the axes that the map does not have
    """
    # One gradient per map, to which all ranges of x add.
    shared = [torch.zeros_like(m) if need else None for m, need in zip(maps, need_maps, strict=True)]

    def work(over: range) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        """Add up the gradients of a range of x.

        Maps with an x axis are written at disjoint places. Sums over x are kept per range and added up in
        order, so the result does not depend on which thread finishes first.
        """
        part_w = torch.zeros_like(w)
        part_maps = [torch.zeros_like(m) if m is not None and m.shape[0] == 1 else m for m in shared]
        scratch = w.new_empty(0)
        for x, y, block in volume.blocks(over):
            # Grows to the largest block once, then is reused.
            scratch = scratch if scratch.numel() >= block.numel() else w.new_empty(block.numel())
            spare = scratch[: block.numel()].view(block.shape)
            part = grad[x, y].contiguous()  # gradient of the block, [x, y, Z]
            if need_w:
                activation = volume.softplus(block, out=spare)
                part_w += torch.matmul(activation.flatten(2), part.flatten(1)[..., None]).sum(dim=(0, 2))
            if any(need_maps):
                # In place: the block is overwritten, and must not be read again.
                slope = volume.sigmoid_(block, scratch=spare).mul_(part[:, None])  # [x, J, y, Z]
                # The gradient of a broadcast map is the sum over the axes along which it was broadcast.
                for target in (_cut(m, x, y) for m in part_maps if m is not None):
                    summed = [axis for axis in range(4) if target.shape[axis] == 1 and slope.shape[axis] > 1]
                    target += slope.sum(dim=summed, keepdim=True) if summed else slope
        return part_w, part_maps

    results = volume.parts(work)
    for _, part_maps in results:
        for total, partial in zip(shared, part_maps, strict=True):
            # `partial is total` for maps with an x axis, which were written in place.
            if total is not None and partial is not None and partial is not total:
                total += partial
    # The factor w[j] is common to all terms of the sum, so it is applied once, at the end.
    grad_maps = [None if m is None else m.mul_(w[None, :, None, None]) for m in shared]
    grad_w: Any = sum(part_w for part_w, _ in results) if need_w else None
    return grad_w, grad_maps
