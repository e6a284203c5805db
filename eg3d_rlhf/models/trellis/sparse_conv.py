"""Operations on sparse voxels: convolution, halving and doubling of the resolution, and a residual block.

The convolution is the submanifold convolution of Graham, Engelcke and van der Maaten 2018, with 3 x 3 x 3
taps: it computes outputs only on the voxels of the input, from those neighbours that exist.

    y[u] = b + sum over taps (i, j, k) of W[:, i, j, k, :] x[u + (i - 1, j - 1, k - 1)]

x[u] are the features of voxel u (zero if it does not exist), y[u] the output, W the weights, b the bias, and
i, j and k run from 0 to 2. This equals a dense cross-correlation, evaluated at the voxels. Weights have the
layout of the library spconv.

Shapes: N samples, V voxels, W voxels of the grid of half the resolution, input channels (number A), output
channels (number B), P pairs of voxels that a tap connects, C channels.
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
MAX_GATHERED_VALUES = (
    1 << 20
)  # largest count of values that are gathered at a time for a tap, which limits the memory

# Pairs of voxels that a tap connects: output rows and input rows, [P] int64 each
Pairs = tuple[torch.Tensor, torch.Tensor]


class SubmanifoldConv(nn.Module):
    """Submanifold convolution with the parameters `conv.weight` [B, 3, 3, 3, A] and `conv.bias` [B].

    Args:
        channels: input channels A.
        out_channels: output channels B.
        backend: implementation, see `submanifold_conv`.
    """

    def __init__(self, channels: int, out_channels: int, backend: str = "auto"):
        super().__init__()
        check_backend(backend)
        self.conv = Kernel(channels, out_channels)
        self.backend = backend

    def forward(self, x: SparseBatch, coarse_feats: torch.Tensor | None = None) -> SparseBatch:
        return submanifold_conv(x, self.conv.weight, self.conv.bias, self.backend, coarse_feats)


class Kernel(nn.Module):
    """Weight [B, 3, 3, 3, A] and bias [B] of a convolution."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        # torch's initialisation of convolutions: uniform in -1 / sqrt(n) .. 1 / sqrt(n) for n inputs
        bound = (TAPS * channels) ** -0.5
        self.weight = nn.Parameter(torch.empty(out_channels, 3, 3, 3, channels).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(out_channels).uniform_(-bound, bound))


def submanifold_conv(
    x: SparseBatch,
    weight: torch.Tensor,
    bias: torch.Tensor,
    backend: str = "auto",
    coarse_feats: torch.Tensor | None = None,
) -> SparseBatch:
    """Apply the convolution of the module's docstring on the voxels of x, features [V, A] -> [V, B].

    Under autocast the convolution computes in autocast's dtype.

    Args:
        x: voxels and their features [V, A].
        weight: weights [B, 3, 3, 3, A].
        bias: bias [B].
        backend: "torch" or "spconv", whose backward pass exists only on CUDA. "auto" uses spconv on CUDA if
            it is installed, and torch otherwise.
        coarse_feats: features [W, A] on the voxels of half the resolution, which replace those of x: each
            voxel of x has the features of the coarse voxel that contains it. None uses the features of x.

    Differentiable in: features, weight and bias, once.
    Raises: ValueError if shapes do not fit, if a voxel occurs twice, or if spconv is requested and not
        installed.
    """
    feats = x.feats if coarse_feats is None else coarse_feats
    channels = feats.shape[1]
    check_shape(
        "submanifold_conv.weight", weight, ["B", 3, 3, 3, channels], "Pass a kernel for these features."
    )
    check_backend(backend)
    device = feats.device.type
    # A custom autograd function is not covered by autocast, so tensors are converted here.
    if torch.is_autocast_enabled(device):
        autocast_dtype = torch.get_autocast_dtype(device)
        feats, weight, bias = (tensor.to(autocast_dtype) for tensor in (feats, weight, bias))
    if backend == "spconv" or (backend == "auto" and device == "cuda" and has_spconv()):
        # spconv cannot read features of coarse voxels, so they are copied to the fine voxels.
        return x.with_feats(
            _spconv(x, feats if coarse_feats is None else feats[coarser(x).row], weight, bias)
        )
    pairs = neighbours(x)
    if coarse_feats is not None:
        # Reading the coarse rows directly avoids copies of the features on all fine voxels.
        coarse_row = coarser(x).row
        pairs = [(output_rows, coarse_row[input_rows]) for output_rows, input_rows in pairs]
    return x.with_feats(_Convolve.apply(feats, weight.flatten(1, 3), pairs, len(x.coords)) + bias)


def check_backend(backend: str) -> None:
    """Raise ValueError for an unknown backend, or for spconv if it is not installed."""
    check_choice("sparse convolution", backend, BACKENDS)
    if backend == "spconv" and not has_spconv():
        raise ValueError(
            "sparse convolution: the backend 'spconv' needs the package spconv, which is not installed."
            " Install it for your CUDA version, or use the backend 'torch'."
        )


def neighbours(x: SparseBatch) -> list[Pairs]:
    """Find the pairs of voxels that each tap connects, in the order of i, j, k.

    The result is stored in the cache of the batch. The second half of the taps mirrors the first half: if
    voxel u reads voxel w at a tap, then w reads u at the opposite tap.

    Raises: ValueError if a voxel occurs twice or has a negative index.
    """
    if "neighbours" in x.cache:
        return x.cache["neighbours"]
    coords = x.coords.long()
    # Number of indices per axis, with a margin of one voxel on either side: otherwise a neighbour beyond the
    # border would have the code of a voxel in the next row.
    index_range = int(coords[:, 1:].max()) + 3
    strides = torch.tensor([index_range**3, index_range**2, index_range, 1], device=coords.device)
    voxel_codes = (coords * strides).sum(1) + strides[
        1:
    ].sum()  # one integer per voxel; the sum adds the margin
    # Neighbours are found by a binary search in the sorted codes.
    sorted_codes, voxel_rows = voxel_codes.sort()
    if bool((sorted_codes[1:] == sorted_codes[:-1]).any()):
        raise ValueError("sparse convolution: a voxel occurs twice. Remove the repeated rows of coords.")
    if bool((coords < 0).any()):
        raise ValueError(
            f"sparse convolution: indices of voxels must be >= 0, got {int(coords.min())}. Add a constant to"
            " coords."
        )
    pairs_before_centre = []
    for tap in range(TAPS // 2):
        # Offsets -1, 0 or 1 of the tap along the three axes
        i = tap // 9 - 1
        j = tap // 3 % 3 - 1
        k = tap % 3 - 1
        neighbour_codes = voxel_codes + (i * strides[1] + j * strides[2] + k)
        # For codes above the largest one, searchsorted returns an index past the end. After the clamp, the
        # comparison below is false for them.
        positions = torch.searchsorted(sorted_codes, neighbour_codes).clamp(max=len(sorted_codes) - 1)
        output_rows = (sorted_codes[positions] == neighbour_codes).nonzero().squeeze(1)
        pairs_before_centre.append((output_rows, voxel_rows[positions[output_rows]]))
    all_rows = torch.arange(len(voxel_codes), device=coords.device)
    x.cache["neighbours"] = [
        *pairs_before_centre,
        (all_rows, all_rows),  # at the central tap, each voxel reads itself
        *((input_rows, output_rows) for output_rows, input_rows in reversed(pairs_before_centre)),
    ]
    return x.cache["neighbours"]


def _taps(
    pairs: list[Pairs], weight: torch.Tensor, input_row_count: int
) -> Iterator[tuple[int, torch.Tensor, Pairs, bool]]:
    """Iterate over the taps (positions in the kernel) that connect voxels, in chunks of pairs.

    MAX_GATHERED_VALUES limits the size of a chunk.

    Args:
        pairs: pairs of rows of each tap.
        weight: weights [B, 27, A].
        input_row_count: number of rows of the input.

    Yields: the index of the tap; its weights [B, A]; pairs of rows; and True if the tap has at least as many
        pairs as the input has rows, False otherwise.
    """
    chunk_size = max(MAX_GATHERED_VALUES // max(len(weight), weight.shape[2]), 1)
    for tap, (output_rows, input_rows) in enumerate(pairs):
        tap_weight = weight[:, tap].contiguous()
        # With coarse features there can be more pairs than rows. Each row is then multiplied once and
        # gathered afterwards, in a single chunk.
        has_many_pairs = len(input_rows) >= input_row_count
        pairs_per_chunk = max(len(input_rows), 1) if has_many_pairs else chunk_size
        for chunk in zip(output_rows.split(pairs_per_chunk), input_rows.split(pairs_per_chunk), strict=True):
            if len(chunk[0]):
                yield tap, tap_weight, chunk, has_many_pairs


def _sums(row_count: int, channels: int, like: torch.Tensor) -> torch.Tensor:
    """Return zeros [row_count, channels] to which values are added.

    They are on the device of `like`, in its dtype or in float32 if that is wider.
    """
    return torch.zeros(
        row_count, channels, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device
    )


class _Convolve(torch.autograd.Function):
    """Autograd function of the convolution without its bias.

    For each tap, the features of the input rows are gathered, multiplied by the weights and added to the
    output rows. Only the arguments are saved for the backward pass. The features are not saved if the weights
    need no gradient.
    """

    @staticmethod
    def forward(
        ctx, feats: torch.Tensor, weight: torch.Tensor, pairs: list[Pairs], output_row_count: int
    ) -> torch.Tensor:
        # weight is [B, 27, A]. The backward pass needs the features only for the gradient of the weights.
        ctx.save_for_backward(feats if ctx.needs_input_grad[1] else None, weight)
        ctx.pairs = pairs
        ctx.shape = feats.shape
        ctx.multiply = multiply = product if fits(feats, weight) else F.linear
        output_sums = _sums(output_row_count, len(weight), feats)
        for _, tap_weight, (output_rows, input_rows), has_many_pairs in _taps(pairs, weight, len(feats)):
            products = (
                multiply(feats, tap_weight).index_select(0, input_rows)
                if has_many_pairs
                else multiply(feats.index_select(0, input_rows), tap_weight)
            )
            output_sums.index_add_(0, output_rows, products.to(output_sums.dtype))
        return output_sums.to(feats.dtype)

    @staticmethod
    @once("sparse convolution", "Leave create_graph=True out.")
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # [V, B]
        feats, weight = ctx.saved_tensors
        input_row_count, channels = ctx.shape
        grad_feats = _sums(input_row_count, channels, grad) if ctx.needs_input_grad[0] else None
        grad_weight = (
            _sums(len(weight), TAPS * channels, grad).view(weight.shape) if ctx.needs_input_grad[1] else None
        )
        for tap, tap_weight, (output_rows, input_rows), has_many_pairs in _taps(
            ctx.pairs, weight, input_row_count
        ):
            row_grads = grad.index_select(0, output_rows)  # [P, B]
            if has_many_pairs:
                # Gradients of all pairs with the same input row are summed before they are multiplied.
                grad_sums = _sums(input_row_count, len(weight), grad)
                row_grads = grad_sums.index_add_(0, input_rows, row_grads.to(grad_sums.dtype)).to(grad.dtype)
            if grad_feats is not None:
                products = ctx.multiply(row_grads, tap_weight.t()).to(grad_feats.dtype)
                if has_many_pairs:
                    grad_feats = grad_feats.add_(products)
                else:
                    grad_feats = grad_feats.index_add_(0, input_rows, products)
            if grad_weight is not None:
                input_feats = feats if has_many_pairs else feats.index_select(0, input_rows)
                grad_weight[:, tap] += ctx.multiply(row_grads.t(), input_feats.t())
        gradients = (None if g is None else g.to(grad.dtype) for g in (grad_feats, grad_weight))
        # The pairs and the number of voxels have no gradient.
        return (*gradients, None, None)


@functools.cache
def has_spconv() -> bool:
    """Return True if the library spconv is installed. The library is not imported."""
    return importlib.util.find_spec("spconv") is not None


def _spconv(x: SparseBatch, feats: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Compute the convolution with the library spconv, features [V, A] -> [V, B].

    Args:
        x: voxels; their features are not used.
        feats: features [V, A].
        weight: weights [B, 3, 3, 3, A].
        bias: bias [B].
    """
    import spconv.pytorch as spconv

    grid_shape = [int(largest_index) + 1 for largest_index in x.coords[:, 1:].amax(0)]
    # spconv computes wrong results, without an error, if the indices are not contiguous int32.
    sparse_tensor = spconv.SparseConvTensor(
        feats.contiguous(), x.coords.int().contiguous(), grid_shape, x.size
    )
    # spconv stores its table of neighbours in this dictionary, which batches on the same voxels share.
    sparse_tensor.indice_dict = x.cache.setdefault("spconv", sparse_tensor.indice_dict)
    with torch.device("meta"):
        # On the meta device the layer allocates no weights. functional_call below replaces them by `weight`.
        layer = spconv.SubMConv3d(weight.shape[-1], weight.shape[0], 3, bias=False, indice_key="3")
    return torch.func.functional_call(layer, {"weight": weight}, (sparse_tensor,)).features + bias


@dataclass(frozen=True)
class Coarser:
    """Voxels of half the resolution that contain the voxels of a batch."""

    coords: torch.Tensor  # [W, 4] int32, sorted: by sample, then by the three indices
    row: torch.Tensor  # [V] row of the coarse voxel that contains each voxel
    counts: torch.Tensor  # [W] number of voxels in each coarse voxel
    cache: dict = field(default_factory=dict)  # cache of all batches on the coarse voxels


def coarser(x: SparseBatch) -> Coarser:
    """Compute the voxels of half the resolution. The result is stored in the cache of the batch."""
    if "coarser" not in x.cache:
        coarse_coords = x.coords.long()
        coarse_coords[:, 1:] //= 2
        voxels_per_axis = int(coarse_coords[:, 1:].max()) + 1
        # One integer per voxel, since torch.unique is faster on integers than on rows. It also sorts them.
        sample, i, j, k = coarse_coords.unbind(1)
        voxel_codes = ((sample * voxels_per_axis + i) * voxels_per_axis + j) * voxels_per_axis + k
        unique_codes, coarse_row, voxel_counts = torch.unique(
            voxel_codes, return_inverse=True, return_counts=True
        )
        # Sample and indices of each coarse voxel from its code
        coarse_columns = [
            unique_codes // voxels_per_axis**3,
            unique_codes // voxels_per_axis**2 % voxels_per_axis,
            unique_codes // voxels_per_axis % voxels_per_axis,
            unique_codes % voxels_per_axis,
        ]
        x.cache["coarser"] = Coarser(
            torch.stack(coarse_columns, 1).int().contiguous(), coarse_row, voxel_counts
        )
    return x.cache["coarser"]


def downsample(x: SparseBatch) -> SparseBatch:
    """Halve the resolution of a batch, features [V, C] -> [W, C]. Differentiable in: feats.

    The features of a coarse voxel are the sum of the features of its n voxels, divided by n + 1. This is not
    the mean, but released weights of TRELLIS were trained with it: the original averages the n voxels and a
    zero.
    """
    coarse_voxels = coarser(x)
    feature_sums = x.feats.new_zeros(len(coarse_voxels.coords), x.feats.shape[1]).index_add(
        0, coarse_voxels.row, x.feats
    )
    return SparseBatch(
        coarse_voxels.coords,
        feature_sums / (coarse_voxels.counts + 1).to(feature_sums.dtype)[:, None],
        x.size,
        coarse_voxels.cache,
    )


def upsample(x: SparseBatch, fine_batch: SparseBatch) -> SparseBatch:
    """Double the resolution of a batch, features [W, C] -> [V, C].

    Each fine voxel gets the features of the coarse voxel that contains it.

    Differentiable in: the features of x.

    Args:
        x: batch on the voxels that `downsample(fine_batch)` returns.
        fine_batch: batch on the voxels of the result.

    Raises: ValueError if the number of voxels of x is not that of `downsample(fine_batch)`.
    """
    coarse_voxels = coarser(fine_batch)
    # Comparing the numbers of rows is cheap, comparing coordinates would not be.
    if len(coarse_voxels.coords) != len(x.feats):
        raise ValueError(
            f"upsample: the batch must have the {len(coarse_voxels.coords)} voxels of downsample(fine_batch),"
            f" but has {len(x.feats)}. Pass the batch that was downsampled."
        )
    return fine_batch.with_feats(x.feats[coarse_voxels.row])


class SparseResBlock(nn.Module):
    """Residual block of two sparse convolutions. The time scales and shifts the features between them.

    h = conv1(silu(norm1(x)));  y = skip(x) + conv2(silu(norm2(h) (1 + scale) + shift))

    Args:
        channels: channels of the input.
        out_channels: channels of the output.
        time_channels: channels of the embedded time.
        resample: "down" halves and "up" doubles the resolution before the convolutions and the skip
            connection; "" does not change it.
        backend: implementation of the convolutions, see `submanifold_conv`.
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
        self.resample = resample
        self.norm1 = LayerNorm32(channels, affine=True)
        self.norm2 = LayerNorm32(out_channels)
        self.conv1 = SubmanifoldConv(channels, out_channels, backend)
        self.conv2 = SubmanifoldConv(out_channels, out_channels, backend)
        # The embedded time has one row for each sample. Only with many rows is this project's `Linear` faster
        # than torch's. The skip connection has one row for each voxel.
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time_channels, 2 * out_channels))
        self.skip_connection = Linear(channels, out_channels) if channels != out_channels else nn.Identity()

    def forward(
        self, x: SparseBatch, time: torch.Tensor, fine_batch: SparseBatch | None = None
    ) -> SparseBatch:
        """Apply the block.

        Args:
            x: batch of features.
            time: embedded times [N, C].
            fine_batch: batch on the voxels of the result, if `resample` is "up"; None otherwise.
        """
        if self.resample == "down":
            x = downsample(x)
        scale, shift = self.emb_layers(time).chunk(2, -1)
        h = F.silu(self.norm1(x.feats))
        skip = self.skip_connection(x.feats)
        if self.resample == "up":
            # The norm and the skip connection act on single rows. They are computed before the rows are
            # repeated, because a coarse voxel contains up to eight fine voxels.
            assert fine_batch is not None
            x = upsample(x.with_feats(skip), fine_batch)
            h = self.conv1(x, coarse_feats=h).feats
            skip = x.feats
        else:
            h = self.conv1(x.with_feats(h)).feats
        # Each voxel has the scale and shift of its sample: [N, C] -> [V, C].
        h = self.norm2(h) * (1 + scale[x.sample]) + shift[x.sample]
        return x.with_feats(self.conv2(x.with_feats(F.silu(h))).feats + skip)
