"""What a generator in stages is to everything else here: stages, each a flow, with gaps between them that no gradient passes.

Shape letters as in sparse.py; T tokens of a condition, E their size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from eg3d_rlhf.flow.path import FlowPath
from eg3d_rlhf.flow.sparse import Batch, Latent, SparseSample, collate

Given = torch.Tensor | None  # what the stage before leaves to one sample of the next: voxel indices [v, 3] int32; None at the first stage


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of the Euler sampler."""

    steps: int = 25
    cfg_strength: float = 5.0  # w of (1 + w) v_cond - w v_null
    cfg_interval: tuple[float, float] = (0.5, 1.0)  # times, both included, at which guidance acts
    rescale_t: float = 3.0  # r of t -> r t / (1 + (r - 1) t): larger spends more steps on noisy times

    def __post_init__(self):
        low, high = self.cfg_interval
        if self.steps < 1 or self.rescale_t <= 0 or not 0 <= low <= high <= 1 or self.cfg_strength < 0:
            raise ValueError(f"Sampling: expected steps >= 1, rescale_t > 0, cfg_strength >= 0 and an interval within 0..1, got {self}.")


@dataclass(kw_only=True)
class FlowStage:
    """One stage: a flow over latents of one kind."""

    name: str  # users call it by this
    model: torch.nn.Module  # model(x_t: Batch, t [N] in 0..1, cond [N, T, E]) -> v: Batch
    channels: int  # C of its latents
    resolution: int  # R of its grid
    sparse: bool  # its latents lie on voxels, given by the stage before
    path: FlowPath = field(default_factory=FlowPath)
    sampling: Sampling = field(default_factory=Sampling)
    lora_targets: tuple[str, ...] = ("to_qkv", "to_q", "to_kv", "to_out")  # last parts of the names of linear layers that adapters sit on

    def noise(self, seeds: Sequence[int], given: Sequence[Given]) -> Batch:
        """Standard normal noise, one sample per seed, on the CPU.

        A seed names one dense volume [C, R, R, R]; on voxels it is read there: samples of one seed share it wherever they share voxels.
        """
        return collate([self._noise(seed, places) for seed, places in zip(seeds, given, strict=True)])

    def _noise(self, seed: int, places: Given) -> Latent:
        volume = torch.randn([self.channels, *[self.resolution] * 3], generator=torch.Generator().manual_seed(seed))
        if not self.sparse:
            return volume
        x, y, z = places.cpu().long().unbind(1)
        return SparseSample(places.cpu().int(), volume[:, x, y, z].T.contiguous())


class Asset(Protocol):
    """What the last stage decodes to and rewards look at; its kind is the pipeline's own affair."""


class Pipeline(Protocol):
    """An ordered generator of two stages or more."""

    stages: Sequence[FlowStage]

    def conditions(self, names: Sequence[str], stage: str) -> torch.Tensor:
        """Tokens [N, T, E] of conditions by name, for a stage."""

    def no_condition(self, n: int, stage: str) -> torch.Tensor:
        """The empty condition's tokens, [n, T, E]."""

    def advance(self, stage: str, x_0: Batch) -> list[Given]:
        """The gap behind a stage: what its latents leave to the next, per sample. Not differentiable."""

    def decode(self, x_0: Batch) -> list[Asset]:
        """The finished assets of the last stage's latents. Not differentiable."""

    def encode(self, assets: Sequence[Asset]) -> list[dict[str, Latent]]:
        """Per asset the latent of every stage, by the stage's name. Not differentiable."""


class AssetReward(Protocol):
    """Scores finished assets; larger is better."""

    def __call__(self, assets: Sequence[Asset], conditions: Sequence[str]) -> torch.Tensor:
        """[N] float32, one per asset, given the names of their conditions."""


def stage_of(pipeline: Pipeline, name: str) -> FlowStage:
    """The stage of that name.

    Raises: ValueError naming those there are.
    """
    for stage in pipeline.stages:
        if stage.name == name:
            return stage
    names = ", ".join(s.name for s in pipeline.stages)
    raise ValueError(f"stage: expected one of {names}, got {name!r}. Name a stage of this pipeline.")
