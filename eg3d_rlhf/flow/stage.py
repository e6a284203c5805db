"""What a generator in stages is to everything else here: stages, each a flow, with gaps between them that no gradient passes.

Shape letters as in sparse.py; T tokens of a condition, E their size.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from eg3d_rlhf.flow.path import FlowPath, opposite
from eg3d_rlhf.flow.sparse import Batch, Latent, SparseSample, collate, count, separate
from eg3d_rlhf.shapes import check_shape

Asset = Any  # what the last stage decodes to and rewards look at; its kind is the pipeline's own affair
Voxels = torch.Tensor | None  # what the stage before leaves to one sample of the next: voxel indices [v, 3] int32; None at the first stage


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of the Euler sampler."""

    steps: int = 25
    cfg_strength: float = 5.0  # w of (1 + w) v_cond - w v_null
    cfg_interval: tuple[float, float] = (0.5, 1.0)  # times, both included, at which guidance acts
    rescale_t: float = 3.0  # r of t -> r t / (1 + (r - 1) t): larger spends more steps on noisy times

    def __post_init__(self):
        low, high = self.cfg_interval
        fits = self.steps >= 1 and self.rescale_t > 0 and 0 <= low <= high <= 1 and self.cfg_strength >= 0
        if not (fits and math.isfinite(self.rescale_t) and math.isfinite(self.cfg_strength)):
            raise ValueError(
                "Sampling: expected steps >= 1, finite rescale_t > 0 and cfg_strength >= 0, and an interval within 0..1, "
                f"got {self}. Correct them."
            )


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

    def __post_init__(self):
        if not self.name or self.channels < 1 or self.resolution < 1:
            got = f"{self.name!r}, {self.channels} and {self.resolution}"
            raise ValueError(f"FlowStage: expected a name, channels >= 1 and resolution >= 1, got {got}. Correct them.")

    def noise(self, seeds: Sequence[int], given: Sequence[Voxels]) -> Batch:
        """Standard normal noise, one sample per seed, on the CPU.

        A seed names one dense volume [C, R, R, R]; on voxels it is read there: samples of one seed share it wherever they share voxels.
        """
        shape = [self.channels, *[self.resolution] * 3]
        volumes = {seed: torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in set(seeds)}
        if not self.sparse:
            return collate([volumes[seed] for seed, _ in zip(seeds, given, strict=True)])
        found: list[Latent] = []
        for seed, places in zip(seeds, given, strict=True):
            self._check_voxels(f"FlowStage.noise of {self.name!r}", places)
            assert places is not None
            x, y, z = places.cpu().long().unbind(1)
            found.append(SparseSample(places.cpu().int(), volumes[seed][:, x, y, z].T.contiguous()))
        return collate(found)

    def check(self, who: str, latent: Latent) -> None:
        """Raise ValueError, in the name of `who`, for a latent that is none of this stage."""
        what = f"It is no latent of stage {self.name!r}: name the stage that it came from."
        if isinstance(latent, SparseSample) != self.sparse:
            expected, got = ("voxels", "a dense grid") if self.sparse else ("a dense grid", "voxels")
            raise ValueError(f"{who}: expected {expected}, got {got}. {what}")
        if not isinstance(latent, SparseSample):
            return check_shape(who, latent, [self.channels, *[self.resolution] * 3], what)
        check_shape(f"{who}, features", latent.feats, ["v", self.channels], what)
        self._check_voxels(who, latent.coords)

    def _check_voxels(self, who: str, places: Voxels) -> None:
        if places is None or len(places) == 0:
            remedy = "The stage before left an empty structure: drop the sample."
            raise ValueError(f"{who}: expected a voxel or more per sample, got none. {remedy}")
        low, high = int(places.min()), int(places.max())
        if low < 0 or high >= self.resolution:
            raise ValueError(f"{who}: expected voxel indices from 0 to {self.resolution - 1}, got {low} to {high}. Check the grid.")


class Pipeline(Protocol):
    """An ordered generator of two stages or more."""

    @property
    def stages(self) -> Sequence[FlowStage]:
        """In order."""

    def conditions(self, names: Sequence[str], stage: str) -> torch.Tensor:
        """Tokens [N, T, E] of conditions by name, for a stage."""

    def no_condition(self, n: int, stage: str) -> torch.Tensor:
        """The empty condition's tokens, [n, T, E]."""

    def advance(self, stage: str, x_0: Any) -> list[Voxels]:
        """The gap behind a stage: what its latents, a Batch of its kind, leave to the next, per sample. Not differentiable."""

    def decode(self, x_0: Any) -> list[Asset]:
        """The finished assets of the last stage's latents, a Batch of its kind. Not differentiable."""

    def encode(self, assets: Sequence[Asset]) -> Sequence[Mapping[str, Latent]]:
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


@torch.no_grad()
def check_convention(stage: FlowStage, x_0: Batch, cond: torch.Tensor, seed: int = 0) -> None:
    """Refuse a model that was trained with its data at t = 1: read that way, it explains data x_0 far better.

    Raises: ValueError where the mapped model's flow-matching error is below half of the model's own.
    """
    x_0 = x_0.to(cond.device)
    latents = separate(x_0)
    eps = stage.noise([seed + i for i in range(len(latents))], [x.coords if isinstance(x, SparseSample) else None for x in latents])
    eps, t = eps.to(cond.device), torch.linspace(0.1, 0.9, count(x_0), device=cond.device)
    x_t = stage.path.mix(x_0, t, eps)
    own = stage.path.errors(stage.model(x_t, t, cond), x_0, eps).mean()
    mapped = stage.path.errors(opposite(t, stage.model(x_t, 1 - t, cond))[1], x_0, eps).mean()
    if mapped < 0.5 * own:
        raise ValueError(
            f"stage {stage.name!r}: expected velocities of the convention with noise at t = 1, got a model of error {own:.3g} "
            f"that has {mapped:.3g} when read with data at t = 1. Wrap it in flow.path.Opposite."
        )
