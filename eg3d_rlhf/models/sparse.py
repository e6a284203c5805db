"""Latents as one tensor, on voxels, or as several tensors by name, alone and in batches, behind the few
functions that a flow needs.

A sample's latent is a tensor such as [C, R, R, R] or [T, C], a `SparseSample`, or a `NamedSample`; a batch of
them a tensor with N in front, a `SparseBatch`, or a `NamedBatch`.

Shape letters: N samples, V voxels of all samples of a batch, v voxels of one, C channels, R grid points per
axis, T tokens, D numbers of a sample.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from eg3d_rlhf.core.shapes import check_shape


@dataclass(frozen=True)
class SparseSample:
    """One sample's features on its voxels."""

    coords: torch.Tensor  # [v, 3] int32, voxel indices along axes 1, 2, 3 of the grid; each once
    feats: torch.Tensor  # [v, C]
    # [v, G], what the stage before leaves on them besides, which the flow reads and does not make
    given: torch.Tensor | None = None
    cells: int | None = None  # along an axis of its grid, where samples of a stage differ in it

    def __post_init__(self):
        check_shape("SparseSample.coords", self.coords, ["v", 3], "Give one row of three indices per voxel.")
        check_shape(
            "SparseSample.feats", self.feats, [len(self.coords), "C"], "Give one row of features per voxel."
        )
        if self.given is not None:
            check_shape(
                "SparseSample.given",
                self.given,
                [len(self.coords), "G"],
                "Give one row of features per voxel.",
            )

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
    # what depends on the coordinates alone, by name; shared
    cache: dict = field(default_factory=dict, compare=False, repr=False)
    given: torch.Tensor | None = None  # [V, G], as of each sample
    cells: tuple[int | None, ...] = ()  # likewise

    def __post_init__(self):
        check_shape(
            "SparseBatch.coords",
            self.coords,
            ["V", 4],
            "Give one row per voxel: its sample, then three indices.",
        )
        check_shape(
            "SparseBatch.feats", self.feats, [len(self.coords), "C"], "Give one row of features per voxel."
        )
        if not self.coords.is_contiguous():
            raise ValueError(
                "SparseBatch.coords: expected contiguous rows, got strides of another layout. Call"
                " contiguous() on them."
            )

    @classmethod
    def join(cls, samples: Sequence[SparseSample]) -> "SparseBatch":
        """A batch of these samples."""
        coords = [torch.nn.functional.pad(s.coords.int(), (1, 0), value=i) for i, s in enumerate(samples)]
        given = [s.given for s in samples if s.given is not None]
        if given and len(given) < len(samples):
            raise ValueError(
                f"collate: expected given features on all samples or none, got {len(given)} of"
                f" {len(samples)}. Add them."
            )
        feats = torch.cat([s.feats for s in samples])
        cells = tuple(s.cells for s in samples)
        return cls(
            torch.cat(coords).contiguous(),
            feats,
            len(samples),
            given=torch.cat(given) if given else None,
            cells=cells,
        )

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
        given = None if self.given is None else self.given.to(feats.device)
        return SparseBatch(self.coords.to(feats.device), feats, self.size, given=given, cells=self.cells)

    def samples(self) -> list[SparseSample]:
        """Apart again; views."""
        counts = self.lengths.tolist()
        given = [None] * self.size if self.given is None else self.given.split(counts)
        parts = zip(
            self.coords.split(counts),
            self.feats.split(counts),
            given,
            self.cells or [None] * self.size,
            strict=True,
        )
        return [SparseSample(coords[:, 1:], feats, more, cells) for coords, feats, more, cells in parts]


@dataclass(frozen=True)
class NamedSample:
    """One sample's tensors by name, kept in the order of their names."""

    tensors: Mapping[str, torch.Tensor]

    def __post_init__(self):
        if not self.tensors or any(not name or "/" in name for name in self.tensors):
            raise ValueError(
                f"{type(self).__name__}: expected tensors by names without '/', got {list(self.tensors)}."
                " Name them."
            )
        object.__setattr__(self, "tensors", dict(sorted(self.tensors.items())))

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    @property
    def feats(self) -> torch.Tensor:
        """[D], all of them in a row."""
        return torch.cat([tensor.flatten() for tensor in self.tensors.values()])


@dataclass(frozen=True)
class NamedBatch(NamedSample):
    """Several samples: tensors [N, ...] by name."""

    def __post_init__(self):
        super().__post_init__()
        if len({len(tensor) for tensor in self.tensors.values()}) != 1:
            got = {name: list(tensor.shape) for name, tensor in self.tensors.items()}
            raise ValueError(
                f"NamedBatch: expected one row per sample in every tensor, got {got}. Collate them again."
            )

    @property
    def size(self) -> int:
        """N."""
        return len(next(iter(self.tensors.values())))

    @property
    def feats(self) -> torch.Tensor:
        """[N, D]."""
        return torch.cat([tensor.flatten(1) for tensor in self.tensors.values()], 1)

    def with_feats(self, feats: torch.Tensor) -> "NamedBatch":
        """The same shapes with other numbers [N, D]."""
        parts = feats.split([tensor[0].numel() for tensor in self.tensors.values()], 1)
        return NamedBatch(
            {
                name: part.view(old.shape)
                for (name, old), part in zip(self.tensors.items(), parts, strict=True)
            }
        )

    def like(self, tensors: Mapping[str, torch.Tensor]) -> "NamedBatch":
        """A batch of these tensors. Raises: ValueError where names or shapes are not those of this one."""
        got = {name: list(tensor.shape) for name, tensor in sorted(tensors.items())}
        expected = {name: list(tensor.shape) for name, tensor in self.tensors.items()}
        if got != expected:
            raise ValueError(
                f"NamedBatch: expected {expected}, got {got}. Return a tensor for each, of its shape."
            )
        return NamedBatch(tensors)

    def to(self, *args, **kwargs) -> "NamedBatch":
        """On another device, or of another type."""
        return NamedBatch({name: tensor.to(*args, **kwargs) for name, tensor in self.tensors.items()})

    def samples(self) -> list[NamedSample]:
        """Apart again; views."""
        return [
            NamedSample({name: tensor[i] for name, tensor in self.tensors.items()}) for i in range(self.size)
        ]


Latent = torch.Tensor | SparseSample | NamedSample
Batch = torch.Tensor | SparseBatch | NamedBatch


def collate(latents: Sequence[Latent]) -> Batch:
    """A batch of latents of one kind."""
    kinds = {type(x) if isinstance(x, (SparseSample, NamedSample)) else torch.Tensor for x in latents}
    if len(kinds) != 1:
        got = sorted(kind.__name__ for kind in kinds) or "none"
        raise ValueError(
            f"collate: expected latents of one kind, got {got}. Batch the stages apart, and one sample at"
            " least."
        )
    named = [x for x in latents if isinstance(x, NamedSample)]
    if named:
        return NamedBatch({name: torch.stack([x[name] for x in named]) for name in named[0].tensors})
    sparse = [x for x in latents if isinstance(x, SparseSample)]
    return (
        SparseBatch.join(sparse)
        if sparse
        else torch.stack([x for x in latents if isinstance(x, torch.Tensor)])
    )


def parts_of(latent: Latent) -> dict[str, torch.Tensor]:
    """The tensors that a latent consists of, by name: "x" alone; coords, feats, maybe given, cells; or "/"
    before each of its own names.
    """
    if isinstance(latent, SparseSample):
        more = {"given": latent.given, "cells": None if latent.cells is None else torch.tensor(latent.cells)}
        return {
            "coords": latent.coords,
            "feats": latent.feats,
            **{name: x for name, x in more.items() if x is not None},
        }
    return (
        {f"/{name}": x for name, x in latent.tensors.items()}
        if isinstance(latent, NamedSample)
        else {"x": latent}
    )


def latent_of(parts: Mapping[str, torch.Tensor]) -> Latent:
    """Inverse of parts_of."""
    if "coords" in parts:
        return SparseSample(
            parts["coords"],
            parts["feats"],
            parts.get("given"),
            int(parts["cells"]) if "cells" in parts else None,
        )
    return (
        parts["x"] if "x" in parts else NamedSample({name.removeprefix("/"): x for name, x in parts.items()})
    )


def latents_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, Latent]:
    """Latents by name from tensors that are called "name.part", or "name" for the part "x"."""
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, part = key.partition(".")
        parts.setdefault(name, {})[part or "x"] = tensor
    return {name: latent_of(of_latent) for name, of_latent in parts.items()}


def to_cpu(latent: Latent) -> Latent:
    """A latent to keep: on the CPU, without gradient."""
    return latent_of({name: tensor.detach().cpu() for name, tensor in parts_of(latent).items()})


def separate(batch: Batch) -> list[Latent]:
    """Inverse of collate."""
    return [*batch] if isinstance(batch, torch.Tensor) else [*batch.samples()]


def count(batch: Batch) -> int:
    """N."""
    return len(batch) if isinstance(batch, torch.Tensor) else batch.size


def feats_of(batch: Batch | Latent) -> torch.Tensor:
    """The numbers of a batch, or of one latent: [N, ...], [V, C] on voxels, [N, D] of several tensors."""
    return batch if isinstance(batch, torch.Tensor) else batch.feats


def with_feats(batch: Batch, feats: torch.Tensor) -> Batch:
    """A batch like this one with other numbers."""
    return feats if isinstance(batch, torch.Tensor) else batch.with_feats(feats)


def single(batch: Batch) -> Batch:
    """The same numbers in float32. Differentiable in: batch."""
    return with_feats(batch, feats_of(batch).float())


def coords_of(latents: Sequence[Latent]) -> list[torch.Tensor | None]:
    """[v, 3] of each latent; None of one that is not on voxels."""
    return [x.coords if isinstance(x, SparseSample) else None for x in latents]


def spread(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """One value per sample [N], in a shape that broadcasts against `feats_of(batch)`:
    [N, 1, ...] or [V, 1].
    """
    if isinstance(batch, SparseBatch):
        return values[batch.sample].unsqueeze(1)
    return values.view(-1, *[1] * (feats_of(batch).ndim - 1))


def mean_per_sample(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Mean over all that belongs to a sample, `values` like `feats_of(batch)` -> [N]; samples count alike,
    however many voxels they have, and of several tensors each counts alike, however many numbers it has.

    Differentiable in: values.
    """
    if isinstance(batch, NamedBatch):
        return torch.stack(
            [part.flatten(1).mean(1) for part in batch.with_feats(values).tensors.values()]
        ).mean(0)
    if not isinstance(batch, SparseBatch):
        return values.flatten(1).mean(1)
    rows = values.mean(1)  # [V]
    # thousands of rows: no error adds up
    sums = rows.new_zeros(batch.size, dtype=torch.float64).index_add(0, batch.sample, rows.double())
    return (sums / batch.lengths).to(rows.dtype)
