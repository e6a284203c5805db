"""Latents on a dense grid and on voxels, alone and in batches, behind the few functions that a flow needs.

A sample's latent is a tensor [C, R, R, R] or a `SparseSample`; a batch of them a tensor [N, C, R, R, R] or a `SparseBatch`.

Shape letters: N samples, V voxels of all samples of a batch, v voxels of one, C channels, R grid points per axis.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from eg3d_rlhf.shapes import check_shape


@dataclass(frozen=True)
class SparseSample:
    """One sample's features on its voxels."""

    coords: torch.Tensor  # [v, 3] int32, voxel indices along axes 1, 2, 3 of the grid; each once
    feats: torch.Tensor  # [v, C]

    def __post_init__(self):
        check_shape("SparseSample.coords", self.coords, ["v", 3], "Give one row of three indices per voxel.")
        check_shape("SparseSample.feats", self.feats, [len(self.coords), "C"], "Give one row of features per voxel.")

    @property
    def places(self) -> torch.Tensor:
        """[v] int64: one number per voxel, in the order of its indices."""
        x, y, z = self.coords.long().unbind(1)
        return (x << 42) + (y << 21) + z


@dataclass(frozen=True)
class SparseBatch:
    """Several samples; rows are grouped by sample, in order."""

    coords: torch.Tensor  # [V, 4] int32, contiguous: number of the sample, then the three voxel indices
    feats: torch.Tensor  # [V, C]
    size: int  # N; every sample has a voxel
    cache: dict = field(default_factory=dict, compare=False, repr=False)  # what depends on the coordinates alone, by name; shared

    def __post_init__(self):
        check_shape("SparseBatch.coords", self.coords, ["V", 4], "Give one row per voxel: its sample, then three indices.")
        check_shape("SparseBatch.feats", self.feats, [len(self.coords), "C"], "Give one row of features per voxel.")
        if not self.coords.is_contiguous():
            raise ValueError("SparseBatch.coords: expected contiguous rows, got strides of another layout. Call contiguous() on them.")

    @classmethod
    def join(cls, samples: Sequence[SparseSample]) -> "SparseBatch":
        """A batch of these samples."""
        coords = [torch.nn.functional.pad(s.coords.int(), (1, 0), value=i) for i, s in enumerate(samples)]
        return cls(torch.cat(coords).contiguous(), torch.cat([s.feats for s in samples]), len(samples))

    @property
    def sample(self) -> torch.Tensor:
        """[V] int64: the number of each row's sample."""
        return self.coords[:, 0].long()

    @property
    def lengths(self) -> torch.Tensor:
        """[N] int64: voxels of each sample."""
        if "lengths" not in self.cache:
            self.cache["lengths"] = torch.bincount(self.sample, minlength=self.size)
        return self.cache["lengths"]

    def with_feats(self, feats: torch.Tensor) -> "SparseBatch":
        """The same voxels with other features [V, C']; what is cached of the coordinates is shared."""
        return replace(self, feats=feats)

    def to(self, *args, **kwargs) -> "SparseBatch":
        """On another device; a type applies to the features alone."""
        feats = self.feats.to(*args, **kwargs)
        if feats.device == self.coords.device:
            return self.with_feats(feats)
        return SparseBatch(self.coords.to(feats.device), feats, self.size)

    def samples(self) -> list[SparseSample]:
        """Apart again; views."""
        counts = self.lengths.tolist()
        return [SparseSample(c[:, 1:], f) for c, f in zip(self.coords.split(counts), self.feats.split(counts), strict=True)]


Latent = torch.Tensor | SparseSample
Batch = torch.Tensor | SparseBatch


def collate(latents: Sequence[Latent]) -> Batch:
    """A batch of latents of one kind."""
    if len({isinstance(x, SparseSample) for x in latents}) != 1:
        got = sorted({type(x).__name__ for x in latents}) or "none"
        raise ValueError(f"collate: expected latents of one kind, got {got}. Batch the stages apart, and one sample at least.")
    sparse = [x for x in latents if isinstance(x, SparseSample)]
    return SparseBatch.join(sparse) if sparse else torch.stack([x for x in latents if isinstance(x, torch.Tensor)])


def to_cpu(latent: Latent) -> Latent:
    """A latent to keep: on the CPU, without gradient."""
    if isinstance(latent, SparseSample):
        return SparseSample(latent.coords.cpu(), latent.feats.detach().cpu())
    return latent.detach().cpu()


def separate(batch: Batch) -> list[Latent]:
    """Inverse of collate."""
    return [*batch.samples()] if isinstance(batch, SparseBatch) else [*batch]


def count(batch: Batch) -> int:
    """N."""
    return batch.size if isinstance(batch, SparseBatch) else len(batch)


def feats_of(batch: Batch) -> torch.Tensor:
    """The numbers of a batch: [N, C, R, R, R] or [V, C]."""
    return batch.feats if isinstance(batch, SparseBatch) else batch


def with_feats(batch: Batch, feats: torch.Tensor) -> Batch:
    """A batch like this one with other numbers."""
    return batch.with_feats(feats) if isinstance(batch, SparseBatch) else feats


def spread(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """One value per sample [N], in a shape that broadcasts against `feats_of(batch)`: [N, 1, 1, 1, 1] or [V, 1]."""
    if isinstance(batch, SparseBatch):
        return values[batch.sample].unsqueeze(1)
    return values.view(-1, *[1] * (batch.ndim - 1))


def mean_per_sample(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Mean over all that belongs to a sample, `values` like `feats_of(batch)` -> [N]; samples count alike, however many voxels they have.

    Differentiable in: values.
    """
    if not isinstance(batch, SparseBatch):
        return values.flatten(1).mean(1)
    rows = values.mean(1)  # [V]
    sums = rows.new_zeros(batch.size, dtype=torch.float64).index_add(0, batch.sample, rows.double())  # thousands of rows: no error adds up
    return (sums / batch.lengths).to(rows.dtype)
