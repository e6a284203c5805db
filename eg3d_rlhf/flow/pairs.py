"""Preference pairs of a stage's latents: what DPO trains on, from people or from the loop."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from eg3d_rlhf.flow.sparse import Latent, SparseSample

SOURCES = ("human", "loop")


@dataclass(frozen=True, kw_only=True, eq=False)
class PreferencePair:
    """Two latents of one stage under one condition."""

    id: str  # unique within its set
    condition: str  # name; the pipeline knows its tokens
    stage: str
    preferred: Latent
    rejected: Latent
    source: str = "human"
    reward_preferred: float | None = None  # scores of the finished assets, where a reward has seen them
    reward_rejected: float | None = None
    w1: float | None = None  # filter: kept where above the threshold; see weights.py
    w2: float | None = None  # weight, mean 1 over the kept pairs
    provenance: Mapping = field(default_factory=dict)  # seeds, hashes of networks and files that it came from; JSON types

    def __post_init__(self):
        who = f"pair {self.id!r}"
        if not self.id or self.source not in SOURCES:
            raise ValueError(f"{who}: expected an id and source {' or '.join(SOURCES)}, got source {self.source!r}. Correct them.")
        for name in ("reward_preferred", "reward_rejected", "w1", "w2"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and (name != "w2" or value >= 0)):
                expected = "a number >= 0" if name == "w2" else "a finite number"
                raise ValueError(f"{who}, {name}: expected {expected} or None, got {value}. Drop the pair, or score it again.")
        for name in ("preferred", "rejected"):
            _check_latent(f"{who}, {name}", getattr(self, name))
        a, b = (_form(x) for x in (self.preferred, self.rejected))
        if a != b:
            raise ValueError(f"{who}: expected two latents of one form, got {a} and {b}. Pair latents of one stage.")


def _check_latent(who: str, latent: Latent) -> None:
    values = latent.feats if isinstance(latent, SparseSample) else latent
    if not torch.isfinite(values).all():
        bad = int((~torch.isfinite(values)).sum())
        raise ValueError(f"{who}: expected finite latents, got {bad} of {values.numel()} numbers NaN or infinite. Drop the pair.")
    if isinstance(latent, SparseSample):
        x, y, z = latent.coords.long().unbind(1)
        twice = len(latent.coords) - len(torch.unique((x << 42) + (y << 21) + z))
        if twice:
            raise ValueError(f"{who}: expected every voxel once, got {twice} repeated. Merge their features, or drop the pair.")


def _form(latent: Latent) -> str:
    if isinstance(latent, SparseSample):
        return f"voxels of {latent.feats.shape[1]} channels"
    return f"a grid {list(latent.shape)}"


def check_unique(who: str, pairs: Iterable[PreferencePair]) -> None:
    """Raise ValueError, in the name of `who`, where two pairs have one id: the id seeds a pair's noise and names it in files."""
    repeated = [name for name, n in Counter(p.id for p in pairs).items() if n > 1]
    if repeated:
        raise ValueError(f"{who}: expected every id once, got {len(repeated)} repeated, such as {repeated[0]!r}. Number the pairs.")
