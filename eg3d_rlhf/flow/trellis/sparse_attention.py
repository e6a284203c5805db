"""Attention over voxels: within each sample, within windows of each sample, and to each sample's condition.

Groups of tokens have lengths of their own. Groups of one length are attended to in one call of torch's fused attention, which keeps no
matrix of weights; hence no padding, no mask, and memory linear in the number of voxels. Which rows go together depends on the
coordinates alone and is kept in the batch's cache.

Shape letters: N samples, V voxels of all samples, H heads, D channels of a head, L tokens of a condition.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from eg3d_rlhf.flow.sparse import SparseBatch


@dataclass(frozen=True)
class Groups:
    """Rows of a batch, put in order such that groups are contiguous."""

    runs: tuple[tuple[int, int], ...]  # (number of groups, rows of each), one entry per stretch of groups of one length
    order: torch.Tensor | None = None  # [V] rows in that order; None: as they are
    inverse: torch.Tensor | None = None  # [V] where each row went

    @property
    def sizes(self) -> list[int]:
        """Rows of each run."""
        return [count * length for count, length in self.runs]


class SparseLayout:
    """The `Layout` of blocks.py for tokens [V, C] of a sparse batch.

    With a window, self-attention stays within windows of that many voxels per axis, whose borders `shift` moves back.
    """

    def __init__(self, batch: SparseBatch, window: int | None = None, shift: int = 0):
        self.batch, self.window, self.shift = batch, window, shift

    def per_token(self, values: torch.Tensor) -> torch.Tensor:
        """[N, C] -> [V, C]."""
        return values[self.batch.sample]

    def self_attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """All [V, H, D] -> [V, H, D]."""
        groups = samples(self.batch) if self.window is None else windows(self.batch, self.window, self.shift)
        parts = zip(*(_runs(x, groups) for x in (q, k, v)), strict=True)
        out = torch.cat([attend(*part).flatten(0, 1) for part in parts])
        return out if groups.inverse is None else out[groups.inverse]

    def cross_attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [V, H, D], k and v [N, L, H, D] -> [V, H, D]."""
        groups = samples(self.batch)
        counts = [count for count, _ in groups.runs]
        parts = zip(_runs(q, groups), k.split(counts), v.split(counts), strict=True)
        return torch.cat([attend(*part).flatten(0, 1) for part in parts])


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v: q [n, T, H, D], k and v [n, L, H, D] -> [n, T, H, D]. Differentiable in: all."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [n, H, T, D]
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _runs(x: torch.Tensor, groups: Groups) -> list[torch.Tensor]:
    """[V, H, D] -> per run [groups, rows of each, H, D]."""
    ordered = x if groups.order is None else x[groups.order]
    return [part.unflatten(0, run) for part, run in zip(ordered.split(groups.sizes), groups.runs, strict=True)]


def samples(batch: SparseBatch) -> Groups:
    """One group per sample; the rows are in order already."""
    if "samples" not in batch.cache:
        runs: list[tuple[int, int]] = []
        for length in batch.lengths.tolist():
            if runs and runs[-1][1] == length:
                runs[-1] = (runs[-1][0] + 1, length)
            else:
                runs.append((1, length))
        batch.cache["samples"] = Groups(tuple(runs))
    return batch.cache["samples"]


def windows(batch: SparseBatch, window: int, shift: int = 0) -> Groups:
    """One group per window that has voxels: those of a sample with one value of (coordinate + shift) // window on every axis."""
    name = f"windows {window} {shift}"
    if name not in batch.cache:
        cells = (batch.coords[:, 1:].long() + shift) // window  # [V, 3]
        side = int(cells.max()) + 1
        codes = ((batch.sample * side + cells[:, 0]) * side + cells[:, 1]) * side + cells[:, 2]
        _, group, lengths = torch.unique(codes, return_inverse=True, return_counts=True)
        order = torch.argsort(lengths[group] * len(lengths) + group, stable=True)  # short windows first
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        length, count = (x.tolist() for x in torch.unique(lengths, return_counts=True))
        batch.cache[name] = Groups(tuple(zip(count, length, strict=True)), order, inverse)
    return batch.cache[name]
