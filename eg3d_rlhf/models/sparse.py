"""Latents and batches of latents in one interface: single tensors, features on voxels, or named tensors.

The latent of a sample is a tensor such as [C, R, R, R] or [T, C], a `SparseSample`, or a `NamedSample`. A
batch is a tensor with N in front, a `SparseBatch`, or a `NamedBatch`. The functions below are all that a flow
needs of them.

Shape letters: N samples, V voxels of all samples of a batch, v voxels of one sample, C channels, G channels
of given features, R grid points per axis, T tokens, D numbers of a sample.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from eg3d_rlhf.core.shapes import check_shape


@dataclass(frozen=True)
class SparseSample:
    """Features of one sample on its voxels."""

    coords: torch.Tensor  # [v, 3] int32, voxel indices along axes 1, 2, 3 of the grid; each once
    feats: torch.Tensor  # [v, C]
    # [v, G], features from the previous stage. The flow reads them but does not generate them.
    given: torch.Tensor | None = None
    cells: int | None = None  # grid cells per axis, if the samples of a stage differ in it

    def __post_init__(self):
        # Samples are built by plugins and from files, so shapes are checked here, once.
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
        """One number per voxel, [v] int64; sorting by it sorts by the three indices."""
        # 21 bits per index fit into 63 bits.
        x, y, z = self.coords.long().unbind(1)
        return (x << 42) + (y << 21) + z


@dataclass(frozen=True)
class SparseBatch:
    """Features of several samples on their voxels; rows are grouped by sample, in order."""

    coords: torch.Tensor  # [V, 4] int32, contiguous: number of the sample, then the three voxel indices
    feats: torch.Tensor  # [V, C]
    size: int  # N; every sample has at least one voxel
    # Results that depend only on the coordinates, by name. Batches on the same voxels share this dictionary.
    cache: dict = field(default_factory=dict, compare=False, repr=False)
    given: torch.Tensor | None = None  # [V, G], see SparseSample
    cells: tuple[int | None, ...] = ()  # one per sample, see SparseSample

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
        # spconv reads strided coordinates wrongly, without an error.
        if not self.coords.is_contiguous():
            raise ValueError(
                "SparseBatch.coords: expected contiguous rows, got strides of another layout. Call"
                " contiguous() on them."
            )

    @classmethod
    def join(cls, samples: Sequence[SparseSample]) -> "SparseBatch":
        """Build a batch of samples.

        Raises: ValueError if only some of the samples have given features.
        """
        # Column 0 becomes the number of the sample: [v, 3] -> [v, 4].
        coords = [torch.nn.functional.pad(s.coords.int(), (1, 0), value=i) for i, s in enumerate(samples)]
        # Either all samples have given features or none: a stage reads them or does not.
        given = [s.given for s in samples if s.given is not None]
        if given and len(given) < len(samples):
            raise ValueError(
                f"collate: {len(given)} of {len(samples)} samples have given features, but all or none must."
                " Add them to the others."
            )
        feats = torch.cat([s.feats for s in samples])
        cells = tuple(s.cells for s in samples)
        return cls(
            # Rows are then grouped by sample, in order
            torch.cat(coords).contiguous(),
            feats,
            len(samples),
            given=torch.cat(given) if given else None,
            cells=cells,
        )

    @property
    def sample(self) -> torch.Tensor:
        """Number of the sample of each row, [V] int64."""
        return self.coords[:, 0].long()

    @property
    def lengths(self) -> torch.Tensor:
        """Number of voxels of each sample, [N] int64."""
        if "lengths" not in self.cache:
            self.cache["lengths"] = torch.bincount(self.sample, minlength=self.size)
        return self.cache["lengths"]

    def with_feats(self, feats: torch.Tensor) -> "SparseBatch":
        """Return a batch on the same voxels with other features [V, C']. The cache is shared."""
        return replace(self, feats=feats)

    def to(self, *args, **kwargs) -> "SparseBatch":
        """Return the batch on another device. A dtype applies only to the features."""
        feats = self.feats.to(*args, **kwargs)
        if feats.device == self.coords.device:
            return self.with_feats(feats)
        # The cache holds tensors of the old device, so the new batch starts with an empty one.
        given = None if self.given is None else self.given.to(feats.device)
        return SparseBatch(self.coords.to(feats.device), feats, self.size, given=given, cells=self.cells)

    def samples(self) -> list[SparseSample]:
        """Split the batch into its samples; their tensors are views."""
        # One transfer from the device for all lengths.
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
    """Several tensors of one sample by name, sorted by name."""

    tensors: Mapping[str, torch.Tensor]

    def __post_init__(self):
        if not self.tensors or any(not name or "/" in name for name in self.tensors):
            raise ValueError(
                f"{type(self).__name__}: expected one or more tensors with names without '/', got the names"
                f" {list(self.tensors)}. Rename them."
            )
        # Sorted, so that `feats` and noise do not depend on the order in which tensors were passed.
        object.__setattr__(self, "tensors", dict(sorted(self.tensors.items())))

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    @property
    def feats(self) -> torch.Tensor:
        """All numbers in one row, [D]."""
        return torch.cat([tensor.flatten() for tensor in self.tensors.values()])


@dataclass(frozen=True)
class NamedBatch(NamedSample):
    """Several samples of named tensors, [N, ...] each."""

    def __post_init__(self):
        super().__post_init__()
        if len({len(tensor) for tensor in self.tensors.values()}) != 1:
            got = {name: list(tensor.shape) for name, tensor in self.tensors.items()}
            raise ValueError(
                f"NamedBatch: expected one row per sample in every tensor, got {got}. Collate them again."
            )

    @property
    def size(self) -> int:
        """Number of samples, N."""
        return len(next(iter(self.tensors.values())))

    @property
    def feats(self) -> torch.Tensor:
        """All numbers of each sample in one row, [N, D]."""
        return torch.cat([tensor.flatten(1) for tensor in self.tensors.values()], 1)

    def with_feats(self, feats: torch.Tensor) -> "NamedBatch":
        """Return a batch of the same shapes with other numbers [N, D]."""
        # The inverse of `feats`: columns are divided among the tensors in the order of their names.
        # one [N, numbers of the tensor] per tensor
        parts = feats.split([tensor[0].numel() for tensor in self.tensors.values()], 1)
        return NamedBatch(
            {
                name: part.view(old.shape)
                for (name, old), part in zip(self.tensors.items(), parts, strict=True)
            }
        )

    def like(self, tensors: Mapping[str, torch.Tensor]) -> "NamedBatch":
        """Build a batch from tensors that must have this batch's names and shapes.

        Raises: ValueError if names or shapes differ.
        """
        # Sorted by name, as the tensors of this batch are.
        got = {name: list(tensor.shape) for name, tensor in sorted(tensors.items())}
        expected = {name: list(tensor.shape) for name, tensor in self.tensors.items()}
        if got != expected:
            raise ValueError(
                f"NamedBatch: expected tensors {expected}, got {got}. Return one tensor of the same shape for"
                " each name."
            )
        return NamedBatch(tensors)

    def to(self, *args, **kwargs) -> "NamedBatch":
        """Return the batch on another device or in another dtype."""
        return NamedBatch({name: tensor.to(*args, **kwargs) for name, tensor in self.tensors.items()})

    def samples(self) -> list[NamedSample]:
        """Split the batch into its samples; their tensors are views."""
        return [
            NamedSample({name: tensor[i] for name, tensor in self.tensors.items()}) for i in range(self.size)
        ]


Latent = torch.Tensor | SparseSample | NamedSample
Batch = torch.Tensor | SparseBatch | NamedBatch


def collate(latents: Sequence[Latent]) -> Batch:
    """Build a batch of latents of one kind.

    Raises: ValueError for no latents, or latents of different kinds.
    """
    kinds = {type(x) if isinstance(x, (SparseSample, NamedSample)) else torch.Tensor for x in latents}
    if len(kinds) != 1:
        got = sorted(kind.__name__ for kind in kinds) or "none"
        raise ValueError(
            f"collate: expected one or more latents of one kind, got {got}. Batch each stage separately."
        )
    # All latents are of one kind here, so either all are named or none is.
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
    """Return the tensors that a latent consists of, by name.

    A tensor is {"x"}. Features on voxels are {"coords", "feats"} and, where present, "given" and "cells".
    Named tensors have "/" before their names.
    """
    if isinstance(latent, SparseSample):
        # A number becomes a tensor, since files hold tensors only.
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
    """Build a latent from its tensors; inverse of `parts_of`."""
    # The names distinguish the three kinds; see `parts_of`.
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
    """Build latents by name from tensors that are called "name.part", or "name" for the part "x"."""
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        # Names of latents have no dot.
        name, _, part = key.partition(".")
        parts.setdefault(name, {})[part or "x"] = tensor
    return {name: latent_of(of_latent) for name, of_latent in parts.items()}


def to_cpu(latent: Latent) -> Latent:
    """Return a latent on the CPU and without gradient, to be kept."""
    return latent_of({name: tensor.detach().cpu() for name, tensor in parts_of(latent).items()})


def separate(batch: Batch) -> list[Latent]:
    """Split a batch into its latents; inverse of `collate`."""
    return [*batch] if isinstance(batch, torch.Tensor) else [*batch.samples()]


def count(batch: Batch) -> int:
    """Return the number of samples, N."""
    return len(batch) if isinstance(batch, torch.Tensor) else batch.size


def feats_of(batch: Batch | Latent) -> torch.Tensor:
    """Return the numbers of a batch or a latent: [N, ...], [V, C] on voxels, or [N, D] of named tensors."""
    return batch if isinstance(batch, torch.Tensor) else batch.feats


def with_feats(batch: Batch, feats: torch.Tensor) -> Batch:
    """Return a batch like this one with other numbers, of the form that `feats_of` gives."""
    return feats if isinstance(batch, torch.Tensor) else batch.with_feats(feats)


def single(batch: Batch) -> Batch:
    """Return the batch in float32 (single precision). Differentiable in: batch."""
    return with_feats(batch, feats_of(batch).float())


def coords_of(latents: Sequence[Latent]) -> list[torch.Tensor | None]:
    """Return the voxel indices [v, 3] of each latent, or None for a latent that is not on voxels."""
    return [x.coords if isinstance(x, SparseSample) else None for x in latents]


def spread(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Expand one value per sample [N] to a shape that broadcasts against `feats_of(batch)`: [N, 1, ...] or
    [V, 1].
    """
    if isinstance(batch, SparseBatch):
        return values[batch.sample].unsqueeze(1)
    # As many trailing axes of length 1 as the batch has.
    return values.view(-1, *[1] * (feats_of(batch).ndim - 1))


def mean_per_sample(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Average `values`, which have the form of `feats_of(batch)`, over each sample: [N].

    Samples count equally, independently of their number of voxels. Named tensors of a sample count equally,
    too, independently of their size.

    Differentiable in: values.
    """
    if isinstance(batch, NamedBatch):
        return torch.stack(
            [part.flatten(1).mean(1) for part in batch.with_feats(values).tensors.values()]
        ).mean(0)
    if not isinstance(batch, SparseBatch):
        return values.flatten(1).mean(1)
    rows = values.mean(1)  # [V]
    # A sample has thousands of rows: sums in float64 keep rounding errors from accumulating.
    sums = rows.new_zeros(batch.size, dtype=torch.float64).index_add(0, batch.sample, rows.double())
    return (sums / batch.lengths).to(rows.dtype)
