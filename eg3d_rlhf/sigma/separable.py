"""sigma_raw on a straight grid from 2-D maps: each plane is sampled once per pair of coordinates, never once per point.

A tri-plane field averages bilinear samples of K axis-aligned planes before a linear layer, so at grid point (x, y, z) the hidden
pre-activation is a sum of maps of two coordinates each,

    h[j] = A[j, x, y] + B[j, x, z] + C[j, y, z],      sigma_raw = sum_j w[j] * softplus(h[j]) + b,

and planes that read the same unordered pair share one map (released EG3D checkpoints project onto (x, y), (x, z), (z, x): two maps).

Letters: K planes, C channels, P, Q = rows, columns of a plane, J hidden units, X, Y, Z = grid points per axis.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_T = TypeVar("_T")

_CPU_CHUNK = 1 << 17  # elements of one buffer, 512 KiB in float32: two of them stay in a core's second-level cache
_CUDA_CHUNK = 1 << 24  # 64 MiB: large enough to fill the device
_EXP_RANGE = 85.0  # |h| bound under which exp(h) and all its partial products are normal float32 numbers


def projection_axes(plane_axes: torch.Tensor) -> tuple[tuple[int, int], ...] | None:
    """Which world axis each plane reads along its width and its height.

    Args: plane_axes [K, 3, 3]; plane k reads the first two components of coords @ inverse(plane_axes[k]) as (width, height) (eg3d.md, 4).
    Returns: per plane (width axis, height axis), 0 = x, 1 = y, 2 = z; None when a plane is not axis-aligned (there is no separable form).
    """
    pairs = []
    for matrix in torch.linalg.inv(plane_axes.detach().double().cpu()):
        columns = matrix[:, :2]  # [3, 2]
        axes = columns.argmax(dim=0)
        unit = F.one_hot(axes, 3).T.to(columns)
        if axes[0] == axes[1] or not torch.allclose(columns, unit, rtol=0, atol=1e-6):
            return None
        pairs.append((int(axes[0]), int(axes[1])))
    return tuple(pairs)


def _interpolation(coordinates: torch.Tensor, size: int) -> tuple[torch.Tensor, slice]:
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
    """Hidden pre-activations as one map per unordered pair of coordinates, whose broadcast sum is h [X, J, Y, Z].

    Args: planes [K, C, P, Q]; pairs from `projection_axes`; axes: x [X], y [Y], z [Z] in plane units (world * 2/box_warp), on the CPU;
    w0 [J, C], b0 [J].
    Returns: maps [X, J, Y, 1], [X, J, 1, Z] and [1, J, Y, Z], those that occur.
    Differentiable in planes, w0 and b0.
    """
    features: dict[tuple[int, int], torch.Tensor] = {}
    for plane, (width, height) in zip(planes, pairs, strict=True):
        rows, row_slice = _interpolation(axes[height].to(planes.dtype), plane.shape[1])
        columns, column_slice = _interpolation(axes[width].to(planes.dtype), plane.shape[2])
        sampled = rows.to(plane.device) @ plane[:, row_slice, column_slice] @ columns.to(plane.device).T  # [C, height, width]
        if height > width:
            sampled = sampled.transpose(1, 2)  # [C, lower axis, higher axis]
        pair = (min(width, height), max(width, height))
        features[pair] = features[pair] + sampled if pair in features else sampled
    maps = []
    for position, (pair, sampled) in enumerate(features.items()):
        hidden = torch.einsum("jc,cuv->juv", w0 / len(pairs), sampled)
        if position == 0:
            hidden = hidden + b0[:, None, None]
        absent = 3 - sum(pair)
        if absent == 0:
            maps.append(hidden[None])  # [1, J, Y, Z]
        else:
            maps.append(hidden.transpose(0, 1).unsqueeze(3 if absent == 2 else 2).contiguous())  # [X, J, Y, 1] or [X, J, 1, Z]
    return maps


def _cut(tensor: torch.Tensor, x: slice, y: slice) -> torch.Tensor:
    """The block's part of a map [X | 1, J, Y | 1, Z | 1]; an axis of length 1 is broadcast, not cut."""
    return tensor[x if tensor.shape[0] > 1 else slice(None), :, y if tensor.shape[2] > 1 else slice(None)]


class _Volume:
    """Walks the volume block by block: fills one reused buffer with exp(h), or with h where the exponentials would leave float32.

    exp(A + B + C) = exp(A) exp(B) exp(C), and the three factors are maps: with them no exponential is taken per point, and
    softplus(h) = log1p(t), sigmoid(h) = t / (1 + t) for t = exp(h). float64 always takes the direct form.
    """

    def __init__(self, maps: Sequence[torch.Tensor], shape: tuple[int, int, int], chunk: int | None):
        self.shape = shape
        reach = sum(m.detach().abs().amax(dim=(0, 2, 3)) for m in maps).max()  # largest |h| that any point could have
        self.product = maps[0].dtype == torch.float32 and bool(reach < _EXP_RANGE)
        self.factors = [m.detach().exp() if self.product else m.detach() for m in maps]
        self.on_cpu = maps[0].device.type == "cpu"
        self.chunk = chunk or (_CPU_CHUNK if self.on_cpu else _CUDA_CHUNK)

    def parts(self, work: Callable[[range], _T]) -> list[_T]:
        """work(range of x) over the whole of X, on a CPU with one range for each of torch's threads.

        Threads over ranges, each with serial operations, in place of threads inside every small operation: without a barrier per operation
        a busy machine does not stall it. torch's thread count is restored on return.
        """
        count_x, before = self.shape[0], torch.get_num_threads()
        threads = min(before, count_x) if self.on_cpu else 1
        if threads == 1:
            return [work(range(count_x))]
        cuts = [count_x * i // threads for i in range(threads + 1)]
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(threads) as pool:
                return list(pool.map(torch.no_grad()(work), map(range, cuts[:-1], cuts[1:])))
        finally:
            torch.set_num_threads(before)

    def blocks(self, over: range) -> Iterator[tuple[slice, slice, torch.Tensor]]:
        """(x, y, t or h [x, J, y, Z]) for every block of the x in `over`, about `chunk` elements each.

        A block is whole x-slices together, or one x-slice's band of y. The tensor is overwritten by the next one.
        """
        _, count_y, count_z = self.shape
        units = self.factors[0].shape[1]
        step_x = max(1, self.chunk // (units * count_y * count_z))
        bands = math.ceil(units * count_y * count_z / self.chunk) if step_x == 1 else 1
        step_y = math.ceil(count_y / min(bands, count_y))
        buffer = self.factors[0].new_empty(min(step_x, len(over)) * units * step_y * count_z)
        for start_x in range(over.start, over.stop, step_x):
            for start_y in range(0, count_y, step_y):
                x, y = slice(start_x, min(start_x + step_x, over.stop)), slice(start_y, min(start_y + step_y, count_y))
                shape = (x.stop - x.start, units, y.stop - y.start, count_z)
                yield x, y, self._fill(buffer[: math.prod(shape)].view(shape), x, y)

    def _fill(self, block: torch.Tensor, x: slice, y: slice) -> torch.Tensor:
        combine = torch.mul if self.product else torch.add
        first, *rest = (_cut(factor, x, y) for factor in self.factors)
        if not rest:
            return block.copy_(first.expand(block.shape))
        combine(first, rest[0], out=block)
        for factor in rest[1:]:
            combine(block, factor, out=block)
        return block

    def softplus(self, block: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """softplus(h) of a block; `out` may be the block itself."""
        return torch.log1p(block, out=out) if self.product else F.softplus(block)

    def sigmoid_(self, block: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
        """sigmoid(h) in place of the block."""
        return block.div_(torch.add(block, 1, out=scratch)) if self.product else block.sigmoid_()


class _SigmaFromMaps(torch.autograd.Function):
    """sigma_raw [X, Y, Z] from the pair maps; the backward recomputes h block by block, so nothing of size X*Y*Z*J is ever stored."""

    @staticmethod
    def forward(ctx, shape, chunk, w, b, *maps):
        ctx.save_for_backward(w, *maps)
        ctx.shape, ctx.chunk = shape, chunk
        volume = _Volume(maps, shape, chunk)
        sigma, weight = w.new_empty(shape), w.detach()

        def work(over: range) -> None:
            for x, y, block in volume.blocks(over):
                activation = volume.softplus(block, out=block)
                sigma[x, y] = torch.matmul(weight, activation.flatten(2)).view(block.shape[0], block.shape[2], block.shape[3])

        volume.parts(work)
        return sigma.add_(b)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        w, *maps = ctx.saved_tensors
        _, _, need_w, need_b, *need_maps = ctx.needs_input_grad
        grad_w, grad_maps = _volume_gradients(_Volume(maps, ctx.shape, ctx.chunk), grad, w.detach(), maps, need_w, need_maps)
        return None, None, grad_w, grad.sum() if need_b else None, *grad_maps


def _volume_gradients(
    volume: _Volume, grad: torch.Tensor, w: torch.Tensor, maps: Sequence[torch.Tensor], need_w: bool, need_maps: Sequence[bool]
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    """Gradients for w [J] and the maps from that of sigma [X, Y, Z], each None where it is not needed:

    d/dw[j] = sum grad * softplus(h[j]),   d/dmap[j] = w[j] * sum grad * sigmoid(h[j]) over the axes that the map lacks.
    """
    shared = [torch.zeros_like(m) if need else None for m, need in zip(maps, need_maps, strict=True)]

    def work(over: range) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        """Maps with an x axis are written at disjoint places; the sums over x are kept per range and added up in order."""
        own_w = torch.zeros_like(w)
        own = [torch.zeros_like(m) if m is not None and m.shape[0] == 1 else m for m in shared]
        scratch = w.new_empty(0)
        for x, y, block in volume.blocks(over):
            scratch = scratch if scratch.numel() >= block.numel() else w.new_empty(block.numel())
            spare = scratch[: block.numel()].view(block.shape)
            part = grad[x, y].contiguous()  # [x, y, Z]
            if need_w:
                activation = volume.softplus(block, out=spare)
                own_w += torch.matmul(activation.flatten(2), part.flatten(1)[..., None]).sum(dim=(0, 2))
            if any(need_maps):
                slope = volume.sigmoid_(block, scratch=spare).mul_(part[:, None])  # [x, J, y, Z]
                for target in (m for m in own if m is not None):
                    _accumulate(_cut(target, x, y), slope)
        return own_w, own

    results = volume.parts(work)
    for _, own in results:
        for total, partial in zip(shared, own, strict=True):
            if total is not None and partial is not total:
                total += partial
    grad_maps = [None if m is None else m.mul_(w[None, :, None, None]) for m in shared]
    return sum(own_w for own_w, _ in results) if need_w else None, grad_maps


def _accumulate(target: torch.Tensor, values: torch.Tensor) -> None:
    """target += values, summed over the axes along which target was broadcast."""
    summed = [axis for axis in range(values.ndim) if target.shape[axis] == 1 and values.shape[axis] > 1]
    target += values.sum(dim=summed, keepdim=True) if summed else values


def sigma_from_maps(
    maps: Sequence[torch.Tensor], w: torch.Tensor, b: torch.Tensor, shape: tuple[int, int, int], chunk: int | None = None
) -> torch.Tensor:
    """sigma_raw [X, Y, Z] = sum_j w[j] softplus(sum of maps)[j] + b, softplus with beta 1.

    Args: maps as from `pair_maps`; w [J]; b []; shape (X, Y, Z); chunk: elements of the working buffer, by device when None.
    Differentiable in maps, w and b, once.
    """
    return _SigmaFromMaps.apply(tuple(shape), chunk, w, b, *maps)
