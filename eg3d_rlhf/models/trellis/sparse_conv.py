"""Sparse grids: convolution, halving and doubling, and the residual block that TRELLIS's second flow makes of
them.

The convolution is submanifold, 3 x 3 x 3: outputs on the voxels of the input alone, from those neighbours
that exist.

    y[u] = b + sum over taps (i, j, k) of W[:, i, j, k, :] x[u + (i - 1, j - 1, k - 1)]

That is a dense cross-correlation read off at the voxels (Graham, Engelcke and van der Maaten 2018). Weights
lie as spconv stores them.

Shape letters: N samples, V voxels, W voxels of the coarser grid, A channels in, B channels out, P pairs of
neighbours at a tap.
"""

import functools
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from eg3d_rlhf.core.shapes import check_shape
from eg3d_rlhf.models.sparse import SparseBatch
from eg3d_rlhf.models.trellis.blocks import LayerNorm32
from torch_utils.ops.implementations import once
from torch_utils.ops.linear import Linear, fits, product
from training.config import check_choice

BACKENDS = ("auto", "torch", "spconv")
TAPS = 27
NUMBERS = 1 << 20  # features of one tap's pairs that are gathered at a time: bounds the working memory

Pairs = tuple[torch.Tensor, torch.Tensor]  # rows written and rows read, [P] int64 each


class SubmanifoldConv(nn.Module):
    """The convolution with its parameters, `conv.weight` [B, 3, 3, 3, A] and `conv.bias` [B]."""

    def __init__(self, channels: int, out_channels: int, backend: str = "auto"):
        super().__init__()
        check_backend(backend)
        self.conv = Kernel(channels, out_channels)
        self.backend = backend

    def forward(self, x: SparseBatch, coarse: torch.Tensor | None = None) -> SparseBatch:
        return submanifold_conv(x, self.conv.weight, self.conv.bias, self.backend, coarse)


class Kernel(nn.Module):
    """Parameters of a convolution."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        bound = (TAPS * channels) ** -0.5
        self.weight = nn.Parameter(torch.empty(out_channels, 3, 3, 3, channels).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(out_channels).uniform_(-bound, bound))


def submanifold_conv(
    x: SparseBatch,
    weight: torch.Tensor,
    bias: torch.Tensor,
    backend: str = "auto",
    coarse: torch.Tensor | None = None,
) -> SparseBatch:
    """The formula above on the voxels of x, feats [V, A] -> [V, B]; in autocast's type where that is on.

    Args:
        coarse: [W, A], features in place of those of x on the voxels of x halved; each voxel of x has those
            of the one that it falls into.
        weight: [B, 3, 3, 3, A]; bias: [B].
        backend: "torch"; "spconv", which computes backwards on CUDA only; "auto": spconv on CUDA where it is
            installed.
    Differentiable in: feats, weight, bias (once).
    Raises: ValueError where shapes disagree, a voxel comes twice, or spconv is asked for and missing.
    """
    feats = x.feats if coarse is None else coarse
    channels = feats.shape[1]
    check_shape(
        "submanifold_conv.weight", weight, ["B", 3, 3, 3, channels], "Give a kernel for these features."
    )
    check_backend(backend)
    device = feats.device.type
    if torch.is_autocast_enabled(device):
        feats, weight, bias = (v.to(torch.get_autocast_dtype(device)) for v in (feats, weight, bias))
    if backend == "spconv" or (backend == "auto" and device == "cuda" and has_spconv()):
        return x.with_feats(_spconv(x, feats if coarse is None else feats[coarser(x).row], weight, bias))
    pairs = neighbours(x)
    if coarse is not None:
        row = coarser(x).row
        pairs = [(written, row[read]) for written, read in pairs]
    return x.with_feats(_Convolve.apply(feats, weight.flatten(1, 3), pairs, len(x.coords)) + bias)


def check_backend(backend: str) -> None:
    """Raise ValueError for a name that is none, or spconv where it is not installed."""
    check_choice("sparse convolution", backend, BACKENDS)
    if backend == "spconv" and not has_spconv():
        raise ValueError(
            "sparse convolution: expected the package spconv, got none. Install it for this CUDA version, or"
            " use 'torch'."
        )


def neighbours(x: SparseBatch) -> list[Pairs]:
    """Per tap the pairs of voxels that it joins, in order of i, j, k; found once per set of coordinates.

    The second half mirrors the first: if u reads w at a tap, w reads u at the opposite one.
    """
    if "neighbours" in x.cache:
        return x.cache["neighbours"]
    places = x.coords.long()
    # a margin on either side: no neighbour is mistaken for one in the next row
    side = int(places[:, 1:].max()) + 3
    strides = torch.tensor([side**3, side**2, side, 1], device=places.device)
    codes = (places * strides).sum(1) + strides[1:].sum()
    known, rows = codes.sort()
    if bool((known[1:] == known[:-1]).any()) or bool((places < 0).any()):
        raise ValueError(
            "sparse convolution: expected every voxel once and no negative index, got others. Remove the"
            " repeated rows."
        )
    before = []
    for tap in range(TAPS // 2):
        i = tap // 9 - 1
        j = tap // 3 % 3 - 1
        k = tap % 3 - 1
        wanted = codes + (i * strides[1] + j * strides[2] + k)
        at = torch.searchsorted(known, wanted).clamp(max=len(known) - 1)
        written = (known[at] == wanted).nonzero().squeeze(1)
        before.append((written, rows[at[written]]))
    itself = torch.arange(len(codes), device=places.device)
    x.cache["neighbours"] = [
        *before,
        (itself, itself),
        *((read, written) for written, read in reversed(before)),
    ]
    return x.cache["neighbours"]


def _taps(
    pairs: list[Pairs], weight: torch.Tensor, rows: int
) -> Iterator[tuple[int, torch.Tensor, Pairs, bool]]:
    """(tap, its weights [B, A], pairs, whether these are more than all `rows` of the input) of taps that have
    any, as many pairs at a time as NUMBERS allows.
    """
    most = max(NUMBERS // max(len(weight), weight.shape[2]), 1)
    for tap, (written, read) in enumerate(pairs):
        kernel = weight[:, tap].contiguous()
        many = len(read) >= rows
        count = max(len(read), 1) if many else most
        for pair in zip(written.split(count), read.split(count), strict=True):
            if len(pair[0]):
                yield tap, kernel, pair, many


def _sums(rows: int, channels: int, like: torch.Tensor) -> torch.Tensor:
    """Zeros to add up in: float32 at least."""
    return torch.zeros(
        rows, channels, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device
    )


class _Convolve(torch.autograd.Function):
    """Gather, multiply, add, tap by tap; where a tap joins more pairs than there are rows to read, these are
    multiplied once each.

    Both passes keep nothing but their arguments; a frozen kernel keeps no features.
    """

    @staticmethod
    # weight [B, 27, A]
    def forward(
        ctx, feats: torch.Tensor, weight: torch.Tensor, pairs: list[Pairs], voxels: int
    ) -> torch.Tensor:
        ctx.save_for_backward(feats if ctx.needs_input_grad[1] else None, weight)
        ctx.pairs = pairs
        ctx.shape = feats.shape
        ctx.multiply = multiply = product if fits(feats, weight) else F.linear
        out = _sums(voxels, len(weight), feats)
        for _, own, (written, read), many in _taps(pairs, weight, len(feats)):
            part = (
                multiply(feats, own).index_select(0, read)
                if many
                else multiply(feats.index_select(0, read), own)
            )
            out.index_add_(0, written, part.to(out.dtype))
        return out.to(feats.dtype)

    @staticmethod
    @once("sparse convolution", "There is no second one.")
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # [V, B]
        feats, weight = ctx.saved_tensors
        rows, channels = ctx.shape
        to_feats = _sums(rows, channels, grad) if ctx.needs_input_grad[0] else None
        to_weight = (
            _sums(len(weight), TAPS * channels, grad).view(weight.shape) if ctx.needs_input_grad[1] else None
        )
        for tap, own, (written, read), many in _taps(ctx.pairs, weight, rows):
            part = grad.index_select(0, written)
            if many:
                total = _sums(rows, len(weight), grad)
                part = total.index_add_(0, read, part.to(total.dtype)).to(grad.dtype)
            if to_feats is not None:
                own_part = ctx.multiply(part, own.t()).to(to_feats.dtype)
                to_feats = to_feats.add_(own_part) if many else to_feats.index_add_(0, read, own_part)
            if to_weight is not None:
                to_weight[:, tap] += ctx.multiply(
                    part.t(), (feats if many else feats.index_select(0, read)).t()
                )
        return (*(None if g is None else g.to(grad.dtype) for g in (to_feats, to_weight)), None, None)


@functools.cache
def has_spconv() -> bool:
    """Whether the package is there; looking does not import it."""
    return importlib.util.find_spec("spconv") is not None


def _spconv(x: SparseBatch, feats: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The same by spconv. Its indices must be contiguous int32: it reads others wrongly without a word."""
    import spconv.pytorch as spconv

    shape = [int(s) + 1 for s in x.coords[:, 1:].amax(0)]
    tensor = spconv.SparseConvTensor(feats.contiguous(), x.coords.int().contiguous(), shape, x.size)
    tensor.indice_dict = x.cache.setdefault("spconv", tensor.indice_dict)
    with torch.device("meta"):
        layer = spconv.SubMConv3d(weight.shape[-1], weight.shape[0], 3, bias=False, indice_key="3")
    return torch.func.functional_call(layer, {"weight": weight}, (tensor,)).features + bias


@dataclass(frozen=True)
class Coarser:
    """What halving a set of coordinates gives."""

    coords: torch.Tensor  # [W, 4] int32, sorted: by sample, then by the three indices
    row: torch.Tensor  # [V] which coarse voxel a voxel falls into
    counts: torch.Tensor  # [W] voxels that fall into each
    cache: dict = field(default_factory=dict)  # of the coarse batches


def coarser(x: SparseBatch) -> Coarser:
    """Coordinates // 2, each once; kept in the batch's cache."""
    if "coarser" not in x.cache:
        cells = x.coords.long()
        cells[:, 1:] //= 2
        side = int(cells[:, 1:].max()) + 1
        codes = ((cells[:, 0] * side + cells[:, 1]) * side + cells[:, 2]) * side + cells[:, 3]
        kept, row, counts = torch.unique(codes, return_inverse=True, return_counts=True)
        parts = [kept // side**3, kept // side**2 % side, kept // side % side, kept % side]
        x.cache["coarser"] = Coarser(torch.stack(parts, 1).int().contiguous(), row, counts)
    return x.cache["coarser"]


def downsample(x: SparseBatch) -> SparseBatch:
    """Per coarse voxel the sum of its n voxels / (n + 1), [V, C] -> [W, C]. Differentiable in: feats.

    Deviates: no mean. TRELLIS averages with the zero that the buffer began with, and its weights expect that.
    """
    to = coarser(x)
    sums = x.feats.new_zeros(len(to.coords), x.feats.shape[1]).index_add(0, to.row, x.feats)
    return SparseBatch(to.coords, sums / (to.counts + 1).to(sums.dtype)[:, None], x.size, to.cache)


def upsample(x: SparseBatch, fine: SparseBatch) -> SparseBatch:
    """Features of the coarse voxels on the voxels of `fine`, whose downsampling gave x's; [W, C] -> [V, C].
    Differentiable in: x's feats.

    Raises: ValueError where x does not lie on the halved voxels of `fine`.
    """
    to = coarser(fine)
    if len(to.coords) != len(x.feats):
        raise ValueError(
            f"upsample: expected {len(to.coords)} coarse voxels, got {len(x.feats)}. Give the batch that was"
            " downsampled."
        )
    return fine.with_feats(x.feats[to.row])


class SparseResBlock(nn.Module):
    """Two convolutions beside a skip; the time scales and shifts between them. The grid is halved, doubled or
    kept before both.

    h = conv1(silu(norm1(x)));  y = skip(x) + conv2(silu(norm2(h) (1 + scale) + shift))
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        time_channels: int,
        *,
        resample: str = "",
        backend: str = "auto",
    ):
        super().__init__()
        self.resample = resample  # "down", "up" or neither
        self.norm1 = LayerNorm32(channels, affine=True)
        self.norm2 = LayerNorm32(out_channels)
        self.conv1 = SubmanifoldConv(channels, out_channels, backend)
        self.conv2 = SubmanifoldConv(out_channels, out_channels, backend)
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time_channels, 2 * out_channels))
        self.skip_connection = Linear(channels, out_channels) if channels != out_channels else nn.Identity()

    def forward(self, x: SparseBatch, time: torch.Tensor, fine: SparseBatch | None = None) -> SparseBatch:
        """Features of a batch, time [N, C], and for "up" a batch on the voxels to return to."""
        if self.resample == "down":
            x = downsample(x)
        scale, shift = self.emb_layers(time).chunk(2, -1)
        h = F.silu(self.norm1(x.feats))
        skip = self.skip_connection(x.feats)
        if self.resample == "up":  # what is done row by row is done before rows are repeated
            assert fine is not None
            x = upsample(x.with_feats(skip), fine)
            coarse = h
            h = self.conv1(x, coarse).feats
            skip = x.feats
        else:
            h = self.conv1(x.with_feats(h)).feats
        h = self.norm2(h) * (1 + scale[x.sample]) + shift[x.sample]
        return x.with_feats(self.conv2(x.with_feats(F.silu(h))).feats + skip)
