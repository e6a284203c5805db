"""The toy's two velocity networks: small transformers over patches of the grid and over voxels.

Shape letters: L tokens of the longest sample, V voxels of all samples, C width, H heads, D entries per head; others as in the package.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from eg3d_rlhf.flow.sparse import SparseBatch
from eg3d_rlhf.flow.toy.shapes import R
from eg3d_rlhf.flow.trellis.blocks import CrossAttention, DenseLayout, SelfAttention

PATCH = 2  # places per axis of one token of the structure
FREQUENCIES = 32  # of the embedding of the time


@dataclass(frozen=True, kw_only=True)
class Width:
    """Size of a network."""

    width: int = 64
    blocks: int = 2
    heads: int = 2
    condition: int = 16  # E, entries of a condition's token

    def __post_init__(self):
        if min(self.width, self.blocks, self.heads, self.condition) < 1 or self.width % self.heads:
            raise ValueError(f"Width: expected positive numbers and a width that the heads divide, got {self}. Correct it.")


@dataclass(frozen=True)
class Packing:
    """How rows [V, ...] of several samples stand as [N, L, ...]: each sample's in order, zeros behind the shorter ones."""

    shape: tuple[int, int]  # N, L
    places: torch.Tensor  # [V] int64, rows of N * L
    keep: torch.Tensor  # [N, 1, 1, L] bool, where there is a row

    @classmethod
    def of(cls, batch: SparseBatch) -> "Packing":
        """Of a batch's voxels; kept in its cache."""
        if "packing" not in batch.cache:
            lengths, n = batch.lengths, batch.size
            longest = int(lengths.max())
            order = torch.arange(len(batch.sample), device=lengths.device) - (lengths.cumsum(0) - lengths)[batch.sample]
            keep = torch.arange(longest, device=lengths.device) < lengths[:, None]  # [N, L]
            batch.cache["packing"] = cls((n, longest), batch.sample * longest + order, keep[:, None, None])
        return batch.cache["packing"]

    def pad(self, rows: torch.Tensor) -> torch.Tensor:
        """[V, ...] -> [N, L, ...]."""
        padded = rows.new_zeros(math.prod(self.shape), *rows.shape[1:])
        return padded.index_copy(0, self.places, rows).unflatten(0, self.shape)

    def flat(self, padded: torch.Tensor) -> torch.Tensor:
        """Inverse of pad."""
        return padded.flatten(0, 1).index_select(0, self.places)


class PaddedLayout(DenseLayout):
    """Tokens [N, L, C], of which only those of `keep` [N, 1, 1, L] are there; None: all."""

    def __init__(self, keep: torch.Tensor | None):
        self.keep = keep

    def self_attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """All [N, L, H, D]."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.keep).transpose(1, 2)


class Block(nn.Module):
    """Self-attention and feed-forward, both modulated by the sample's time and condition, with cross-attention between them."""

    def __init__(self, size: Width):
        super().__init__()
        C = size.width
        self.self_attn = SelfAttention(C, size.heads)
        self.cross_attn = CrossAttention(C, size.condition, size.heads)
        self.norm = nn.LayerNorm(C)
        self.mlp = nn.Sequential(nn.Linear(C, 2 * C), nn.GELU(approximate="tanh"), nn.Linear(2 * C, C))
        self.modulation = nn.Parameter(torch.randn(6 * C) * 0.02)  # added to what all blocks share

    def forward(self, x: torch.Tensor, shared: torch.Tensor, cond: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
        """[N, L, C], [N, 6 C], [N, T, E] -> [N, L, C]."""
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = (shared + self.modulation)[:, None].chunk(6, dim=2)  # each [N, 1, C]
        x = x + gate_1 * self.self_attn(torch.addcmul(shift_1, _norm(x), 1 + scale_1), PaddedLayout(keep))
        x = x + self.cross_attn(self.norm(x), cond, PaddedLayout(keep))
        return x + gate_2 * self.mlp(torch.addcmul(shift_2, _norm(x), 1 + scale_2))


class Trunk(nn.Module):
    """What both networks share: tokens in, tokens out."""

    def __init__(self, size: Width, channels: int, positions: int):
        super().__init__()
        C = size.width
        self.input_layer = nn.Linear(channels, C)
        self.position = nn.Parameter(torch.randn(positions, C) * 0.2)
        self.t_embedder = nn.Sequential(nn.Linear(2 * FREQUENCIES, C), nn.SiLU(), nn.Linear(C, C))
        self.c_embedder = nn.Linear(size.condition, C)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(C, 6 * C))
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.blocks))

    def forward(
        self, tokens: torch.Tensor, position: torch.Tensor, t: torch.Tensor, cond: torch.Tensor, keep: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[N, L, channels], embeddings that broadcast to [N, L, C], times [N], conditions [N, T, E] -> [N, L, C]."""
        shared = self.modulation(self.t_embedder(embed_time(t)) + self.c_embedder(cond.sum(1)))
        x = self.input_layer(tokens) + position
        for block in self.blocks:
            x = block(x, shared, cond, keep)
        return _norm(x)


def embed_time(t: torch.Tensor) -> torch.Tensor:
    """Cosines and sines of times in 0..1, [N] -> [N, 64]; wavelengths from 2 pi to 2 pi / 100."""
    rates = 100 ** torch.linspace(0, 1, FREQUENCIES, device=t.device)
    angles = t[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class StructureFlow(nn.Module):
    """Velocity over the occupancy grid, [N, 1, R, R, R]."""

    def __init__(self, size: Width | None = None):
        super().__init__()
        size = size or Width()
        self.trunk = Trunk(size, PATCH**3, (R // PATCH) ** 3)
        self.out_layer = _zeros(nn.Linear(size.width, PATCH**3))

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        """See flow/stage.py: the velocity at x_t, times t [N] and conditions [N, T, E]."""
        n, side = len(x_t), R // PATCH
        cells = x_t.view(n, side, PATCH, side, PATCH, side, PATCH).permute(0, 1, 3, 5, 2, 4, 6)  # [N, 4, 4, 4, 2, 2, 2]
        out = self.out_layer(self.trunk(cells.flatten(4).flatten(1, 3), self.trunk.position, t, cond))  # [N, 64, 8]
        cells = out.view(n, side, side, side, PATCH, PATCH, PATCH).permute(0, 1, 4, 2, 5, 3, 6)
        return cells.reshape(x_t.shape)


class VoxelFlow(nn.Module):
    """Velocity over colour and size of voxels, [V, 4]; a voxel also sees which of the 26 places around it are filled."""

    def __init__(self, size: Width | None = None):
        super().__init__()
        size = size or Width()
        self.trunk = Trunk(size, 4 + 27, R**3)
        self.out_layer = _zeros(nn.Linear(size.width, 4))

    def forward(self, x_t: SparseBatch, t: torch.Tensor, cond: torch.Tensor) -> SparseBatch:
        """See flow/stage.py: the velocity at x_t, times t [N] and conditions [N, T, E]."""
        around = surroundings(x_t)
        x, y, z = x_t.coords[:, 1:].long().unbind(1)
        tokens = torch.cat([x_t.feats, around.to(x_t.feats.dtype)], dim=1)
        packing, position = Packing.of(x_t), self.trunk.position.index_select(0, (x * R + y) * R + z)
        out = self.out_layer(self.trunk(packing.pad(tokens), packing.pad(position), t, cond, packing.keep))
        return x_t.with_feats(packing.flat(out))


def surroundings(batch: SparseBatch) -> torch.Tensor:
    """Which of the 27 places around a voxel are filled, [V, 27] float; kept in the batch's cache."""
    if "surroundings" not in batch.cache:
        sample, x, y, z = batch.coords.long().unbind(1)
        filled = torch.zeros(batch.size, R + 2, R + 2, R + 2, device=batch.coords.device)
        filled[sample, x + 1, y + 1, z + 1] = 1
        steps = [(i, j, k) for i in range(3) for j in range(3) for k in range(3)]
        batch.cache["surroundings"] = torch.stack([filled[sample, x + i, y + j, z + k] for i, j, k in steps], dim=1)
    return batch.cache["surroundings"]


def _norm(x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:])


def _zeros(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
