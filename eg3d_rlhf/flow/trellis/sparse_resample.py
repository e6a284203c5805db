"""Halving and doubling a sparse grid, and the residual block that TRELLIS's second flow does it in.

Shape letters: N samples, V voxels, W voxels of the coarser grid, C channels.
"""

from dataclasses import dataclass, field

import torch
from torch import nn

from eg3d_rlhf.flow.sparse import SparseBatch
from eg3d_rlhf.flow.trellis.blocks import LayerNorm32
from eg3d_rlhf.flow.trellis.sparse_conv import SubmanifoldConv

FACTOR = 2


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
        cells[:, 1:] //= FACTOR
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
    """Features of the coarse voxels on the voxels of `fine`, whose downsampling gave x's; [W, C] -> [V, C]. Differentiable in: x's feats.

    Raises: ValueError where x does not lie on the halved voxels of `fine`.
    """
    to = coarser(fine)
    if len(to.coords) != len(x.feats):
        raise ValueError(f"upsample: expected {len(to.coords)} coarse voxels, got {len(x.feats)}. Give the batch that was downsampled.")
    return fine.with_feats(x.feats[to.row])


class SparseResBlock(nn.Module):
    """Two convolutions beside a skip; the time scales and shifts between them. The grid is halved, doubled or kept before both.

    h = conv1(silu(norm1(x)));  y = skip(x) + conv2(silu(norm2(h) (1 + scale) + shift))
    """

    def __init__(self, channels: int, out_channels: int, time_channels: int, *, resample: str = "", backend: str = "auto"):
        super().__init__()
        self.resample = resample  # "down", "up" or neither
        self.norm1 = LayerNorm32(channels, affine=True)
        self.norm2 = LayerNorm32(out_channels)
        self.conv1 = SubmanifoldConv(channels, out_channels, backend)
        self.conv2 = SubmanifoldConv(out_channels, out_channels, backend)
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time_channels, 2 * out_channels))
        self.skip_connection = nn.Linear(channels, out_channels) if channels != out_channels else nn.Identity()

    def forward(self, x: SparseBatch, time: torch.Tensor, fine: SparseBatch | None = None) -> SparseBatch:
        """Features of a batch, time [N, C], and for "up" a batch on the voxels to return to."""
        if self.resample:
            x = downsample(x) if self.resample == "down" else upsample(x, fine)
        scale, shift = self.emb_layers(time).chunk(2, -1)
        h = self.conv1(x.with_feats(nn.functional.silu(self.norm1(x.feats))))
        h = self.norm2(h.feats) * (1 + scale[x.sample]) + shift[x.sample]
        return x.with_feats(self.conv2(x.with_feats(nn.functional.silu(h))).feats + self.skip_connection(x.feats))
