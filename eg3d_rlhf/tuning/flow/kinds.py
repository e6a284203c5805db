"""Kinds of latents: what a stage's flow moves, and so how noise is drawn for it and which latents belong to it.

Shape letters as in sparse.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from eg3d_rlhf.core.shapes import check_shape
from eg3d_rlhf.models.sparse import Batch, Latent, NamedSample, SparseSample, collate
from training.phases import derive_seed

Voxels = torch.Tensor | SparseSample | None  # what the stage before leaves to one sample of the next: voxel indices [v, 3] int32, or these
# with features for the flow to read as `given`; None at the first stage


class LatentKind(Protocol):
    """What is asked of a kind; `who` speaks in messages, `remedy` ends them."""

    def noise(self, who: str, seeds: Sequence[int], given: Sequence[Voxels]) -> Batch:
        """Standard normal noise on the CPU, a sample per seed that is named by it, wherever it stands in a batch."""

    def check(self, who: str, latent: Latent, remedy: str) -> None:
        """Raise ValueError for a latent of another kind or shape."""


def _normal(shape: Sequence[int], seed: int) -> torch.Tensor:
    return torch.randn(list(shape), generator=torch.Generator().manual_seed(seed))


def _form(latent: object) -> str:
    if isinstance(latent, SparseSample):
        return "voxels"
    return "tensors by name" if isinstance(latent, NamedSample) else "a dense grid" if getattr(latent, "ndim", 0) == 4 else "one tensor"


def _check_form(who: str, latent: Latent, form: str, kind: type, remedy: str) -> None:
    if not isinstance(latent, kind):
        raise ValueError(f"{who}: expected {form}, got {_form(latent)}. {remedy}")


def _check_sizes(kind: object, **sizes: int) -> None:
    if min(sizes.values()) < 1:
        names, got = (" and ".join(map(str, values)) for values in (sizes, sizes.values()))
        raise ValueError(f"{type(kind).__name__}: expected {names} >= 1, got {got}. Correct them.")


@dataclass(frozen=True, kw_only=True)
class DenseGrid:
    """A volume [C, R, R, R]."""

    channels: int
    resolution: int

    def __post_init__(self):
        _check_sizes(self, channels=self.channels, resolution=self.resolution)

    @property
    def shape(self) -> list[int]:
        """Of a sample."""
        return [self.channels, *[self.resolution] * 3]

    def noise(self, who: str, seeds: Sequence[int], given: Sequence[Voxels]) -> Batch:
        """See LatentKind."""
        return collate([_normal(self.shape, seed) for seed, _ in zip(seeds, given, strict=True)])

    def check(self, who: str, latent: Latent, remedy: str) -> None:
        """See LatentKind."""
        _check_form(who, latent, "a dense grid", torch.Tensor, remedy)
        assert isinstance(latent, torch.Tensor)
        check_shape(who, latent, self.shape, remedy)


@dataclass(frozen=True, kw_only=True)
class TokenSet:
    """A set of tokens [T, C], which lie on no grid."""

    tokens: int
    channels: int

    def __post_init__(self):
        _check_sizes(self, tokens=self.tokens, channels=self.channels)

    def noise(self, who: str, seeds: Sequence[int], given: Sequence[Voxels]) -> Batch:
        """See LatentKind."""
        return collate([_normal([self.tokens, self.channels], seed) for seed, _ in zip(seeds, given, strict=True)])

    def check(self, who: str, latent: Latent, remedy: str) -> None:
        """See LatentKind."""
        _check_form(who, latent, "a set of tokens", torch.Tensor, remedy)
        assert isinstance(latent, torch.Tensor)
        check_shape(who, latent, [self.tokens, self.channels], remedy)


@dataclass(frozen=True, kw_only=True)
class SparseVoxels:
    """Features [v, C] on voxels that the stage before leaves.

    A seed names one dense volume [C, R, R, R], which is read at the voxels: samples of one seed share noise wherever they share voxels.
    """

    channels: int
    resolution: int
    given: int = 0  # G, features per voxel that come with the voxels

    def __post_init__(self):
        _check_sizes(self, channels=self.channels, resolution=self.resolution)

    def noise(self, who: str, seeds: Sequence[int], given: Sequence[Voxels]) -> Batch:
        """See LatentKind. Features that come with the voxels are the batch's `given`."""
        volumes = {seed: _normal([self.channels, *[self.resolution] * 3], seed) for seed in set(seeds)}
        found: list[Latent] = []
        for seed, one in zip(seeds, given, strict=True):
            places, more = (one.coords, one.feats.cpu()) if isinstance(one, SparseSample) else (one, None)
            places = self._checked(who, places)
            x, y, z = places.cpu().long().unbind(1)
            found.append(SparseSample(places.cpu().int(), volumes[seed][:, x, y, z].T.contiguous(), more))
        return collate(found)

    def check(self, who: str, latent: Latent, remedy: str) -> None:
        """See LatentKind."""
        _check_form(who, latent, "voxels", SparseSample, remedy)
        assert isinstance(latent, SparseSample)
        check_shape(f"{who}, features", latent.feats, ["v", self.channels], remedy)
        size = 0 if latent.given is None else latent.given.shape[1]
        if size != self.given:
            raise ValueError(f"{who}: expected {self.given} given features per voxel, got {size}. {remedy}")
        self._checked(who, latent.coords)

    def _checked(self, who: str, places: torch.Tensor | None) -> torch.Tensor:
        if places is None or len(places) == 0:
            remedy = "The stage before left an empty structure: drop the sample."
            raise ValueError(f"{who}: expected a voxel or more per sample, got none. {remedy}")
        low, high = int(places.min()), int(places.max())
        if low < 0 or high >= self.resolution:
            raise ValueError(f"{who}: expected voxel indices from 0 to {self.resolution - 1}, got {low} to {high}. Check the grid.")
        return places


@dataclass(frozen=True, kw_only=True)
class Dictionary:
    """Several tensors by name, each of a shape of its own; in errors each counts alike."""

    shapes: Mapping[str, Sequence[int]]  # by name, of a sample

    def __post_init__(self):
        if not self.shapes:
            raise ValueError("Dictionary.shapes: expected a shape or more by name, got none. Name them.")
        _check_sizes(self, **{name: min(shape, default=0) for name, shape in self.shapes.items()})

    def noise(self, who: str, seeds: Sequence[int], given: Sequence[Voxels]) -> Batch:
        """See LatentKind. A tensor's noise is named by the seed and its name."""
        return collate([
            NamedSample({name: _normal(shape, derive_seed("part", name, seed)) for name, shape in self.shapes.items()})
            for seed, _ in zip(seeds, given, strict=True)
        ])

    def check(self, who: str, latent: Latent, remedy: str) -> None:
        """See LatentKind."""
        _check_form(who, latent, "tensors by name", NamedSample, remedy)
        assert isinstance(latent, NamedSample)
        if set(latent.tensors) != set(self.shapes):
            raise ValueError(f"{who}: expected tensors {', '.join(sorted(self.shapes))}, got {', '.join(latent.tensors)}. {remedy}")
        for name, shape in self.shapes.items():
            check_shape(f"{who}, {name}", latent[name], list(shape), remedy)
