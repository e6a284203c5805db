"""Common interface of three kinds of latents: single tensors, features on voxels, and named tensors.

The latent of a sample is a tensor such as [C, R, R, R] or [T, C], a `SparseSample`, or a `NamedSample`. A
batch of N samples is a tensor with N as its first axis, a `SparseBatch`, or a `NamedBatch`. The training and
the sampling of flow models use only the functions of this module, so they work for all kinds.

Shapes: N samples, V voxels of all samples of a batch, v voxels of one sample, C channels, G channels of given
features (inputs of a stage that it does not generate), R grid points per axis, T tokens, D values of a
sample.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from eg3d_rlhf.core.shapes import check_shape


@dataclass(frozen=True)
class SparseSample:
    """Features of one sample on its voxels."""

    # [v, 3] int32, indices of each voxel along the three axes of the grid; no voxel twice
    coords: torch.Tensor
    feats: torch.Tensor  # [v, C] features that the flow model generates
    # [v, G] features from the previous stage, which are an input of the flow model. None if it has no such
    # input.
    given: torch.Tensor | None = None
    cells: int | None = None  # number of grid cells per axis, if it differs between the samples of a stage

    def __post_init__(self):
        # Samples come from plugins and from files, so their shapes are checked.
        check_shape("SparseSample.coords", self.coords, ["v", 3], "Pass one row of three indices per voxel.")
        check_shape(
            "SparseSample.feats", self.feats, [len(self.coords), "C"], "Pass one row of features per voxel."
        )
        if self.given is not None:
            check_shape(
                "SparseSample.given",
                self.given,
                [len(self.coords), "G"],
                "Pass one row of features per voxel.",
            )

    @property
    def places(self) -> torch.Tensor:
        """Return one integer key per voxel, [v] int64, whose order is that of the voxels' three indices."""
        # 21 bits per index fit into 63 bits.
        x, y, z = self.coords.long().unbind(1)
        return (x << 42) + (y << 21) + z


@dataclass(frozen=True)
class SparseBatch:
    """Features of several samples on their voxels.

    The rows of a sample are contiguous, and samples are in ascending order.
    """

    coords: torch.Tensor  # [V, 4] int32, contiguous: index of the sample, then the three indices of the voxel
    feats: torch.Tensor  # [V, C]
    size: int  # N; every sample has at least one voxel
    # Results by name that depend only on the coordinates. Batches on the same voxels share this dictionary.
    cache: dict = field(default_factory=dict, compare=False, repr=False)
    given: torch.Tensor | None = None  # [V, G], see SparseSample
    cells: tuple[int | None, ...] = ()  # number of grid cells per axis of each sample, see SparseSample

    def __post_init__(self):
        check_shape(
            "SparseBatch.coords",
            self.coords,
            ["V", 4],
            "Pass one row per voxel: its sample, then three indices.",
        )
        check_shape(
            "SparseBatch.feats", self.feats, [len(self.coords), "C"], "Pass one row of features per voxel."
        )
        # The library spconv computes wrong results, without an error,
        # from coordinates that are not contiguous.
        if not self.coords.is_contiguous():
            raise ValueError(
                f"SparseBatch.coords must be contiguous, but has the strides {self.coords.stride()}. Use"
                " coords.contiguous()."
            )

    @classmethod
    def join(cls, samples: Sequence[SparseSample]) -> "SparseBatch":
        """Build a batch of samples.

        Raises: ValueError if some of the samples have the field `given` and others do not.
        """
        # The index of the sample becomes column 0: [v, 3] -> [v, 4]
        coords = [
            torch.nn.functional.pad(sample.coords.int(), (1, 0), value=i) for i, sample in enumerate(samples)
        ]
        given_features = [sample.given for sample in samples if sample.given is not None]
        if given_features and len(given_features) < len(samples):
            raise ValueError(
                f"collate: {len(given_features)} of {len(samples)} samples have the field `given`, but either"
                " all or no samples must have it. Add the features of the previous stage to all samples."
            )
        return cls(
            torch.cat(coords).contiguous(),
            torch.cat([sample.feats for sample in samples]),
            len(samples),
            given=torch.cat(given_features) if given_features else None,
            cells=tuple(sample.cells for sample in samples),
        )

    @property
    def sample(self) -> torch.Tensor:
        """Return the index of the sample of each row, [V] int64."""
        return self.coords[:, 0].long()

    @property
    def lengths(self) -> torch.Tensor:
        """Return the number of voxels of each sample, [N] int64."""
        if "lengths" not in self.cache:
            self.cache["lengths"] = torch.bincount(self.sample, minlength=self.size)
        return self.cache["lengths"]

    def with_feats(self, feats: torch.Tensor) -> "SparseBatch":
        """Return a batch on the same voxels with other features [V, C']. The cache is shared."""
        return replace(self, feats=feats)

    def to(self, *args, **kwargs) -> "SparseBatch":
        """Return the batch on another device or with features of another dtype.

        The arguments are those of torch.Tensor.to. A dtype applies only to `feats`.
        """
        feats = self.feats.to(*args, **kwargs)
        if feats.device == self.coords.device:
            return self.with_feats(feats)
        # The cache holds tensors of the old device, so the new batch starts with an empty one.
        given = None if self.given is None else self.given.to(feats.device)
        return SparseBatch(self.coords.to(feats.device), feats, self.size, given=given, cells=self.cells)

    def samples(self) -> list[SparseSample]:
        """Split the batch into its samples. The tensors of the samples are views of the batch."""
        voxel_counts = self.lengths.tolist()
        fields_of_samples = zip(
            self.coords.split(voxel_counts),
            self.feats.split(voxel_counts),
            [None] * self.size if self.given is None else self.given.split(voxel_counts),
            self.cells or [None] * self.size,
            strict=True,
        )
        # [:, 1:] drops the index of the sample.
        return [
            SparseSample(coords[:, 1:], feats, given, cells)
            for coords, feats, given, cells in fields_of_samples
        ]


@dataclass(frozen=True)
class NamedSample:
    """Several tensors of one sample, by name. They are sorted by name.

    Raises: ValueError if there is no tensor, or a name is empty or contains '/'.
    """

    tensors: Mapping[str, torch.Tensor]

    def __post_init__(self):
        if not self.tensors or any(not name or "/" in name for name in self.tensors):
            raise ValueError(
                f"{type(self).__name__}: there must be at least one tensor, and no name may be empty or"
                f" contain '/', got the names {list(self.tensors)}. Rename the tensors."
            )
        # Sorted, so that `feats` and noise do not depend on the order in which tensors were passed.
        object.__setattr__(self, "tensors", dict(sorted(self.tensors.items())))

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    @property
    def feats(self) -> torch.Tensor:
        """Return the values of all tensors in one row, [D]."""
        return torch.cat([tensor.flatten() for tensor in self.tensors.values()])


@dataclass(frozen=True)
class NamedBatch(NamedSample):
    """Several samples of named tensors, [N, ...] each.

    Raises: ValueError as `NamedSample`, or if N differs between the tensors.
    """

    def __post_init__(self):
        super().__post_init__()
        if len({len(tensor) for tensor in self.tensors.values()}) != 1:
            shapes = {name: list(tensor.shape) for name, tensor in self.tensors.items()}
            raise ValueError(
                f"NamedBatch: all tensors must have the same length N of their first axis, got {shapes}. Use"
                " collate to build a batch."
            )

    @property
    def size(self) -> int:
        """Return the number of samples, N."""
        return len(next(iter(self.tensors.values())))

    @property
    def feats(self) -> torch.Tensor:
        """Return the values of all tensors of each sample in one row, [N, D]."""
        return torch.cat([tensor.flatten(1) for tensor in self.tensors.values()], 1)

    def with_feats(self, feats: torch.Tensor) -> "NamedBatch":
        """Return a batch of the same names and shapes with other values [N, D], in the order of `feats`."""
        # The columns of each tensor; tensor[0].numel() is the number of values of one sample.
        columns_of_tensors = feats.split([tensor[0].numel() for tensor in self.tensors.values()], 1)
        return NamedBatch(
            {
                name: tensor_columns.view(tensor.shape)
                for (name, tensor), tensor_columns in zip(
                    self.tensors.items(), columns_of_tensors, strict=True
                )
            }
        )

    def like(self, tensors: Mapping[str, torch.Tensor]) -> "NamedBatch":
        """Build a batch from tensors that must have this batch's names and shapes.

        Raises: ValueError if names or shapes differ.
        """
        # Sorted by name, in the order of the tensors of this batch
        shapes = {name: list(tensor.shape) for name, tensor in sorted(tensors.items())}
        required_shapes = {name: list(tensor.shape) for name, tensor in self.tensors.items()}
        if shapes != required_shapes:
            raise ValueError(
                f"NamedBatch: the tensors must have the names and shapes {required_shapes}, got {shapes}."
                " Pass one tensor of this shape for each name."
            )
        return NamedBatch(tensors)

    def to(self, *args, **kwargs) -> "NamedBatch":
        """Return the batch on another device or in another dtype.

        The arguments are those of torch.Tensor.to.
        """
        return NamedBatch({name: tensor.to(*args, **kwargs) for name, tensor in self.tensors.items()})

    def samples(self) -> list[NamedSample]:
        """Split the batch into its samples. The tensors of the samples are views of the batch."""
        return [
            NamedSample({name: tensor[i] for name, tensor in self.tensors.items()}) for i in range(self.size)
        ]


Latent = torch.Tensor | SparseSample | NamedSample
Batch = torch.Tensor | SparseBatch | NamedBatch


def collate(latents: Sequence[Latent]) -> Batch:
    """Build a batch of latents of the same kind.

    Raises: ValueError if there are no latents, or latents of different kinds.
    """
    latent_types = {
        type(latent) if isinstance(latent, (SparseSample, NamedSample)) else torch.Tensor
        for latent in latents
    }
    if len(latent_types) != 1:
        type_names = (
            ", ".join(repr(latent_type.__name__) for latent_type in sorted(latent_types, key=str)) or "none"
        )
        raise ValueError(
            f"collate: a batch needs latents of exactly one kind, got {type_names}. Pass the latents of one"
            " stage."
        )
    # All latents are of the same kind here, so each of these lists contains all latents or none.
    named_samples = [latent for latent in latents if isinstance(latent, NamedSample)]
    if named_samples:
        return NamedBatch(
            {
                name: torch.stack([sample[name] for sample in named_samples])
                for name in named_samples[0].tensors
            }
        )
    sparse_samples = [latent for latent in latents if isinstance(latent, SparseSample)]
    if sparse_samples:
        return SparseBatch.join(sparse_samples)
    return torch.stack([latent for latent in latents if isinstance(latent, torch.Tensor)])


def parts_of(latent: Latent) -> dict[str, torch.Tensor]:
    """Return the tensors that a latent consists of, by name, for a file.

    The name of a single tensor is "x". A `SparseSample` has "coords" and "feats" and, if they are not None,
    "given" and "cells". The names of a `NamedSample` get "/" as their first character.
    """
    if isinstance(latent, SparseSample):
        tensors = {"coords": latent.coords, "feats": latent.feats}
        if latent.given is not None:
            tensors["given"] = latent.given
        if latent.cells is not None:
            # Files contain only tensors, so the number becomes a tensor.
            tensors["cells"] = torch.tensor(latent.cells)
        return tensors
    if isinstance(latent, NamedSample):
        return {f"/{name}": tensor for name, tensor in latent.tensors.items()}
    return {"x": latent}


def latent_of(tensors_by_part: Mapping[str, torch.Tensor]) -> Latent:
    """Build a latent from its tensors by name. This is the inverse of `parts_of`."""
    # The names differ between the three kinds of latents.
    if "coords" in tensors_by_part:
        return SparseSample(
            tensors_by_part["coords"],
            tensors_by_part["feats"],
            tensors_by_part.get("given"),
            int(tensors_by_part["cells"]) if "cells" in tensors_by_part else None,
        )
    if "x" in tensors_by_part:
        return tensors_by_part["x"]
    return NamedSample({name.removeprefix("/"): tensor for name, tensor in tensors_by_part.items()})


def latents_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, Latent]:
    """Build several latents from the tensors of a file.

    Args:
        tensors: tensors with the keys LATENT.PART, where PART is a name of `parts_of`. The key LATENT alone
            means the part "x".

    Returns: the latents by name.
    """
    parts_by_latent: dict[str, dict[str, torch.Tensor]] = {}
    for tensor_key, tensor in tensors.items():
        # Names of latents contain no dot.
        latent_name, _, part_name = tensor_key.partition(".")
        parts_by_latent.setdefault(latent_name, {})[part_name or "x"] = tensor
    return {latent_name: latent_of(latent_parts) for latent_name, latent_parts in parts_by_latent.items()}


def to_cpu(latent: Latent) -> Latent:
    """Return a latent on the CPU and without its gradient."""
    return latent_of({name: tensor.detach().cpu() for name, tensor in parts_of(latent).items()})


def separate(batch: Batch) -> list[Latent]:
    """Split a batch into its latents. This is the inverse of `collate`."""
    return [*batch] if isinstance(batch, torch.Tensor) else [*batch.samples()]


def count(batch: Batch) -> int:
    """Return the number of samples N of a batch."""
    return len(batch) if isinstance(batch, torch.Tensor) else batch.size


def feats_of(batch: Batch | Latent) -> torch.Tensor:
    """Return the values of a batch or a latent as one tensor.

    The shape is that of the tensor itself for a single tensor, [V, C] for features on voxels, and [N, D] (or
    [D] for a latent) for named tensors.
    """
    return batch if isinstance(batch, torch.Tensor) else batch.feats


def with_feats(batch: Batch, feats: torch.Tensor) -> Batch:
    """Return a batch of the same kind with other values, in the shape that `feats_of` returns."""
    return feats if isinstance(batch, torch.Tensor) else batch.with_feats(feats)


def single(batch: Batch) -> Batch:
    """Return the batch with its values in float32 (single precision). Differentiable in: batch."""
    return with_feats(batch, feats_of(batch).float())


def coords_of(latents: Sequence[Latent]) -> list[torch.Tensor | None]:
    """Return the voxel indices [v, 3] of each latent, or None for a latent that is not on voxels."""
    return [x.coords if isinstance(x, SparseSample) else None for x in latents]


def spread(sample_values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Expand one value per sample to a shape that broadcasts against `feats_of(batch)`.

    Args:
        sample_values: values [N].
        batch: batch of the N samples.

    Returns: the values, [V, 1] for features on voxels and [N, 1, ...] for other batches.
    """
    if isinstance(batch, SparseBatch):
        return sample_values[batch.sample].unsqueeze(1)
    # One axis of length 1 for each axis of the batch after the first
    return sample_values.view(-1, *[1] * (feats_of(batch).ndim - 1))


def mean_per_sample(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Average values over each sample, [N]. Differentiable in: values.

    For named tensors, each tensor is averaged first, so that all tensors of a sample have the same weight.

    Args:
        values: values in the shape of `feats_of(batch)`.
        batch: batch that assigns the values to its samples.
    """
    if isinstance(batch, NamedBatch):
        tensor_means = [tensor.flatten(1).mean(1) for tensor in batch.with_feats(values).tensors.values()]
        return torch.stack(tensor_means).mean(0)
    if not isinstance(batch, SparseBatch):
        return values.flatten(1).mean(1)
    row_means = values.mean(1)  # [V]
    # A sample has thousands of rows, so the sums are float64 to avoid an accumulation of rounding errors.
    sample_sums = row_means.new_zeros(batch.size, dtype=torch.float64).index_add(
        0, batch.sample, row_means.double()
    )
    return (sample_sums / batch.lengths).to(row_means.dtype)
