"""Preference pairs of a stage's latents: what DPO trains on, from people or from the loop."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from eg3d_rlhf.flow.sparse import Latent

SOURCES = ("human", "loop")


@dataclass(frozen=True, kw_only=True)
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
