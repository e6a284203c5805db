"""Sparse grids: convolution, halving and doubling of the resolution, and a residual block made of these.

The convolution is submanifold, 3 x 3 x 3: it computes outputs only on the voxels of the input, from those
neighbours that exist.

    y[u] = b + sum over taps (i, j, k) of W[:, i, j, k, :] x[u + (i - 1, j - 1, k - 1)]

This equals a dense cross-correlation, evaluated at the voxels (Graham, Engelcke and van der Maaten 2018).
Weights have spconv's layout.

Shape letters: N samples, V voxels, W voxels of the coarser grid, A input channels, B output channels, P pairs
of neighbours at a tap.
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
TAPS = 27  # 3 x 3 x 3
NUMBERS = 1 << 20  # numbers that are gathered at a time for one tap; bounds the working memory

Pairs = tuple[torch.Tensor, torch.Tensor]  # output rows and input rows, [P] int64 each


class SubmanifoldConv(nn.Module):
    """Submanifold convolution with its parameters, `conv.weight` [B, 3, 3, 3, A] and `conv.bias` [B]."""

    def __init__(self, channels: int, out_channels: int, backend: str = "auto"):
        super().__init__()
        check_backend(backend)
        self.conv = Kernel(channels, out_channels)
        self.backend = backend

    def forward(self, x: SparseBatch, coarse: torch.Tensor | None = None) -> SparseBatch:
        return submanifold_conv(x, self.conv.weight, self.conv.bias, self.backend, coarse)


class Kernel(nn.Module):
    """Weight and bias of a convolution."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        # The usual initialisation of convolutions: uniform within 1 / sqrt(fan in).
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
    """Apply the convolution above on the voxels of x, feats [V, A] -> [V, B].

    Under autocast it computes in autocast's dtype.

    Args:
        coarse: [W, A], features on the coarser voxels of x, used in place of those of x. Each voxel of x
            reads the features of the coarse voxel that contains it.
        weight: [B, 3, 3, 3, A].
        bias: [B].
        backend: "torch"; "spconv", whose backward pass exists only on CUDA; "auto": spconv on CUDA if it is
            installed, else torch.
    Differentiable in: feats, weight, bias (once).
    Raises: ValueError if shapes disagree, if a voxel occurs twice, or if spconv is requested but missing.
    """
    feats = x.feats if coarse is None else coarse
    channels = feats.shape[1]
    check_shape(
        "submanifold_conv.weight", weight, ["B", 3, 3, 3, channels], "Give a kernel for these features."
    )
    check_backend(backend)
    device = feats.device.type
    # A custom autograd function is not covered by autocast, so tensors are converted here.
    if torch.is_autocast_enabled(device):
        feats, weight, bias = (v.to(torch.get_autocast_dtype(device)) for v in (feats, weight, bias))
    if backend == "spconv" or (backend == "auto" and device == "cuda" and has_spconv()):
        # spconv has no form that reads coarse rows, so the features are copied to the fine voxels.
        return x.with_feats(_spconv(x, feats if coarse is None else feats[coarser(x).row], weight, bias))
    pairs = neighbours(x)
    if coarse is not None:
        # Reading the coarse rows directly avoids copies of the features on all fine voxels.
        row = coarser(x).row
        pairs = [(written, row[read]) for written, read in pairs]
    return x.with_feats(_Convolve.apply(feats, weight.flatten(1, 3), pairs, len(x.coords)) + bias)


def check_backend(backend: str) -> None:
    """Raise ValueError for an unknown backend, or for spconv if it is not installed."""
    check_choice("sparse convolution", backend, BACKENDS)
    if backend == "spconv" and not has_spconv():
        raise ValueError(
            "sparse convolution: the package spconv is not installed. Install it for your CUDA version, or"
            " use the backend 'torch'."
        )


def neighbours(x: SparseBatch) -> list[Pairs]:
    """Find, per tap, the pairs of voxels that the tap connects, in the order of i, j, k.

    The result is cached for a set of coordinates. The second half of the taps mirrors the first: if u reads w
    at a tap, then w reads u at the opposite tap.
    """
    if "neighbours" in x.cache:
        return x.cache["neighbours"]
    places = x.coords.long()
    # A margin on either side keeps a neighbour beyond the border from coding as a voxel of the next row.
    side = int(places[:, 1:].max()) + 3
    strides = torch.tensor([side**3, side**2, side, 1], device=places.device)
    codes = (places * strides).sum(1) + strides[1:].sum()  # one integer per voxel
    # Sorted codes allow a binary search for each neighbour instead of a hash table.
    known, rows = codes.sort()
    if bool((known[1:] == known[:-1]).any()) or bool((places < 0).any()):
        raise ValueError(
            "sparse convolution: expected each voxel once and no negative index. Remove repeated rows and"
            " shift the coordinates."
        )
    before = []
    for tap in range(TAPS // 2):
        # Offsets -1, 0, 1 of the tap along the three axes; only the taps before the centre are searched.
        i = tap // 9 - 1
        j = tap // 3 % 3 - 1
        k = tap % 3 - 1
        neighbour = codes + (i * strides[1] + j * strides[2] + k)
        # Beyond the last code searchsorted gives one past the end; the comparison below rejects it.
        at = torch.searchsorted(known, neighbour).clamp(max=len(known) - 1)
        written = (known[at] == neighbour).nonzero().squeeze(1)
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
    """Yield taps that have pairs, with as many pairs at a time as NUMBERS allows.

    Yields: the tap, its weights [B, A], pairs, and whether the pairs are more than all `rows` of the input.
    """
    most = max(NUMBERS // max(len(weight), weight.shape[2]), 1)  # pairs at a time
    for tap, (written, read) in enumerate(pairs):
        kernel = weight[:, tap].contiguous()
        # More pairs than rows occur with `coarse`: then each row is multiplied once, before it is gathered.
        many = len(read) >= rows
        count = max(len(read), 1) if many else most
        for pair in zip(written.split(count), read.split(count), strict=True):
            if len(pair[0]):
                yield tap, kernel, pair, many


def _sums(rows: int, channels: int, like: torch.Tensor) -> torch.Tensor:
    """Return zeros [rows, channels] for accumulation, in float32 at least."""
    return torch.zeros(
        rows, channels, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device
    )


class _Convolve(torch.autograd.Function):
    """Gather, multiply and add features, tap by tap.

    If a tap connects more pairs than there are input rows, each row is multiplied once and then gathered.
    Both passes save only their arguments, and a frozen kernel saves no features.
    """

    @staticmethod
    def forward(
        ctx, feats: torch.Tensor, weight: torch.Tensor, pairs: list[Pairs], voxels: int
    ) -> torch.Tensor:
        # weight [B, 27, A]. Features are needed in the backward pass only for the weight's gradient.
        ctx.save_for_backward(feats if ctx.needs_input_grad[1] else None, weight)
        ctx.pairs = pairs
        ctx.shape = feats.shape
        ctx.multiply = multiply = product if fits(feats, weight) else F.linear
        out = _sums(voxels, len(weight), feats)
        for _, kernel, (written, read), many in _taps(pairs, weight, len(feats)):
            part = (
                multiply(feats, kernel).index_select(0, read)
                if many
                else multiply(feats.index_select(0, read), kernel)
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
        for tap, kernel, (written, read), many in _taps(ctx.pairs, weight, rows):
            part = grad.index_select(0, written)  # [P, B]
            if many:
                # Gradients of all pairs that read the same row are summed before they are multiplied.
                total = _sums(rows, len(weight), grad)
                part = total.index_add_(0, read, part.to(total.dtype)).to(grad.dtype)
            if to_feats is not None:
                product_part = ctx.multiply(part, kernel.t()).to(to_feats.dtype)
                if many:
                    to_feats = to_feats.add_(product_part)
                else:
                    to_feats = to_feats.index_add_(0, read, product_part)
            if to_weight is not None:
                to_weight[:, tap] += ctx.multiply(
                    part.t(), (feats if many else feats.index_select(0, read)).t()
                )
        return (*(None if g is None else g.to(grad.dtype) for g in (to_feats, to_weight)), None, None)


@functools.cache
def has_spconv() -> bool:
    """Return whether spconv is installed, without importing it."""
    return importlib.util.find_spec("spconv") is not None


def _spconv(x: SparseBatch, feats: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Compute the convolution with spconv.

    Its indices must be contiguous int32: it reads others wrongly, without an error.
    """
    import spconv.pytorch as spconv

    shape = [int(s) + 1 for s in x.coords[:, 1:].amax(0)]
    tensor = spconv.SparseConvTensor(feats.contiguous(), x.coords.int().contiguous(), shape, x.size)
    # spconv caches its own table of neighbours here; batches on the same voxels share it.
    tensor.indice_dict = x.cache.setdefault("spconv", tensor.indice_dict)
    with torch.device("meta"):
        # On the meta device the layer allocates no weights: the given one is used in its place.
        layer = spconv.SubMConv3d(weight.shape[-1], weight.shape[0], 3, bias=False, indice_key="3")
    return torch.func.functional_call(layer, {"weight": weight}, (tensor,)).features + bias


@dataclass(frozen=True)
class Coarser:
    """Halved coordinates of a batch of voxels."""

    coords: torch.Tensor  # [W, 4] int32, sorted: by sample, then by the three indices
    row: torch.Tensor  # [V], row of the coarse voxel that contains each voxel
    counts: torch.Tensor  # [W], number of voxels in each coarse voxel
    cache: dict = field(default_factory=dict)  # cache of all batches on the coarse voxels


def coarser(x: SparseBatch) -> Coarser:
    """Halve the coordinates of a batch, each coarse voxel once. The result is cached in the batch."""
    if "coarser" not in x.cache:
        cells = x.coords.long()
        cells[:, 1:] //= 2
        side = int(cells[:, 1:].max()) + 1
        # One integer per voxel, so that torch.unique compares numbers and not rows. It also sorts them.
        codes = ((cells[:, 0] * side + cells[:, 1]) * side + cells[:, 2]) * side + cells[:, 3]
        kept, row, counts = torch.unique(codes, return_inverse=True, return_counts=True)
        parts = [kept // side**3, kept // side**2 % side, kept // side % side, kept % side]
        x.cache["coarser"] = Coarser(torch.stack(parts, 1).int().contiguous(), row, counts)
    return x.cache["coarser"]


def downsample(x: SparseBatch) -> SparseBatch:
    """Halve the resolution: per coarse voxel the sum of its n voxels / (n + 1), [V, C] -> [W, C].

    Differentiable in: feats.

    Deviates: this is not a mean. TRELLIS averages with the zero that its buffer starts with, and its weights
        expect that.
    """
    to = coarser(x)
    sums = x.feats.new_zeros(len(to.coords), x.feats.shape[1]).index_add(0, to.row, x.feats)
    return SparseBatch(to.coords, sums / (to.counts + 1).to(sums.dtype)[:, None], x.size, to.cache)


def upsample(x: SparseBatch, fine: SparseBatch) -> SparseBatch:
    """Double the resolution: copy features of coarse voxels to the voxels of `fine`, [W, C] -> [V, C].

    Downsampling `fine` must have given the voxels of x. Differentiable in: x's feats.

    Raises: ValueError if x does not lie on the halved voxels of `fine`.
    """
    to = coarser(fine)
    # The same number of rows is the only check that costs nothing; the order is that of `coarser`.
    if len(to.coords) != len(x.feats):
        raise ValueError(
            f"upsample: expected {len(to.coords)} coarse voxels, got {len(x.feats)}. Pass the batch that was"
            " downsampled."
        )
    return fine.with_feats(x.feats[to.row])


class SparseResBlock(nn.Module):
    """Residual block of two sparse convolutions; the time scales and shifts the features between them.

    h = conv1(silu(norm1(x)));  y = skip(x) + conv2(silu(norm2(h) (1 + scale) + shift))

    The resolution is halved, doubled or kept before both branches.
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
        self.resample = resample  # "down", "up" or "" for neither
        self.norm1 = LayerNorm32(channels, affine=True)
        self.norm2 = LayerNorm32(out_channels)
        self.conv1 = SubmanifoldConv(channels, out_channels, backend)
        self.conv2 = SubmanifoldConv(out_channels, out_channels, backend)
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time_channels, 2 * out_channels))
        self.skip_connection = Linear(channels, out_channels) if channels != out_channels else nn.Identity()

    def forward(self, x: SparseBatch, time: torch.Tensor, fine: SparseBatch | None = None) -> SparseBatch:
        """Apply the block to a batch with times [N, C]; for "up", `fine` is a batch on the voxels to return
        to.
        """
        if self.resample == "down":
            x = downsample(x)
        scale, shift = self.emb_layers(time).chunk(2, -1)
        h = F.silu(self.norm1(x.feats))
        skip = self.skip_connection(x.feats)
        if self.resample == "up":
            # Operations on single rows run before rows are repeated, on an eighth of the rows at best.
            assert fine is not None
            x = upsample(x.with_feats(skip), fine)
            coarse = h
            h = self.conv1(x, coarse).feats
            skip = x.feats
        else:
            h = self.conv1(x.with_feats(h)).feats
        # Each row reads the scale and shift of its sample: [N, C] -> [V, C].
        h = self.norm2(h) * (1 + scale[x.sample]) + shift[x.sample]
        return x.with_feats(self.conv2(x.with_feats(F.silu(h))).feats + skip)
