"""What a generator in stages is to everything else here: stages, each a flow, with gaps between them that no gradient passes.

Shape letters as in sparse.py; T tokens of a condition, E their size.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from eg3d_rlhf.models.sparse import Batch, Latent, SparseSample, count, separate
from eg3d_rlhf.tuning.flow.condition import Condition, tensor_of
from eg3d_rlhf.tuning.flow.kinds import LatentKind, Voxels
from eg3d_rlhf.tuning.flow.path import FlowPath, opposite

Asset = Any  # what the last stage decodes to and rewards look at; its kind is the pipeline's own affair
Call = Callable[..., Any]  # (module, x_t, t [N] in 0..1, condition) -> v
CallStep = Callable[..., Any]  # and the length of the step, [N]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of the Euler sampler."""

    steps: int = 25
    cfg_strength: float = 5.0  # w of (1 + w) v_cond - w v_null
    cfg_interval: tuple[float, float] = (0.5, 1.0)  # times, both included, at which guidance acts
    rescale_t: float = 3.0  # r of t -> r t / (1 + (r - 1) t): larger spends more steps on noisy times
    cfg_rescale: float = 0.0  # share of a guided x_0 that is brought to the standard deviation of the one without guidance
    shortcut: bool = False  # tell the network how long a step is: 1 / steps; it then need not take many

    def __post_init__(self):
        low, high = self.cfg_interval
        fits = self.steps >= 1 and self.rescale_t > 0 and 0 <= low <= high <= 1 and self.cfg_strength >= 0
        if not (fits and math.isfinite(self.rescale_t) and math.isfinite(self.cfg_strength) and 0 <= self.cfg_rescale <= 1):
            raise ValueError(
                "Sampling: expected steps >= 1, finite rescale_t > 0 and cfg_strength >= 0, and an interval and cfg_rescale within 0..1, "
                f"got {self}. Correct them."
            )


def as_is(module: torch.nn.Module, x_t: Batch, t: torch.Tensor, cond: Condition) -> Batch:
    """The call of a module that takes what a stage gives."""
    return module(x_t, t, cond)


@dataclass(kw_only=True)
class FlowStage:
    """One stage: a flow over latents of one kind, and how its module is called. The module keeps the names of its own parameters."""

    name: str  # users call it by this
    model: torch.nn.Module
    latents: LatentKind
    call: Call = as_is  # of the module; times and sign as the module has them
    call_step: CallStep | None = None  # of a module that can be told how long a step is; None: it cannot
    data_at_one: bool = False  # the module has its data at t = 1 and its noise at t = 0
    path: FlowPath = field(default_factory=FlowPath)
    sampling: Sampling = field(default_factory=Sampling)
    lora_targets: tuple[str, ...] = ("to_qkv", "to_q", "to_kv", "to_out")  # last parts of the names of linear layers that adapters sit on

    def __post_init__(self):
        if not self.name:
            raise ValueError("FlowStage: expected a name, got ''. Name the stage.")

    def velocity(
        self, x_t: Batch, t: torch.Tensor, cond: Condition, model: torch.nn.Module | None = None, step: float | None = None
    ) -> Batch:
        """v in this package's convention, by the stage's module or another of its kind in its place.

        Args: t: [N] in 0..1, 1 is noise; step: how long a step will be made of v, where the module can be told; None: v as trained.
        Raises: ValueError for a step where the module cannot be told. Differentiable in: x_t, the module's parameters.
        """
        model, at = self.model if model is None else model, 1 - t if self.data_at_one else t
        if step is None:
            v = self.call(model, x_t, at, cond)
        elif self.call_step is None:
            got = f"a step of {step:g}. Set shortcut off"
            raise ValueError(f"stage {self.name!r}: expected no length of steps, which its network does not read, got {got}.")
        else:
            v = self.call_step(model, x_t, at, cond, torch.full_like(t, step))
        return opposite(at, v)[1] if self.data_at_one else v

    def noise(self, seeds: Sequence[int], given: Sequence[Voxels]) -> Batch:
        """Standard normal noise, one sample per seed, on the CPU; see the kind of latents for what a seed names."""
        return self.latents.noise(f"FlowStage.noise of {self.name!r}", seeds, given)

    def check(self, who: str, latent: Latent) -> None:
        """Raise ValueError, in the name of `who`, for a latent that is none of this stage."""
        self.latents.check(who, latent, f"It is no latent of stage {self.name!r}: name the stage that it came from.")


class Pipeline(Protocol):
    """An ordered generator of one stage or more; `advance` and `encode` are asked for by the loop alone, which wants two."""

    @property
    def stages(self) -> Sequence[FlowStage]:
        """In order."""

    def conditions(self, names: Sequence[str], stage: str) -> Condition:
        """Tokens [N, T, E] of conditions by name, for a stage; or several tensors by name, [N, ...] each."""

    def no_condition(self, n: int, stage: str) -> Condition:
        """The empty condition, n times, of the same form."""

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
def check_convention(stage: FlowStage, x_0: Batch, cond: Condition, seed: int = 0) -> None:
    """Refuse a model that was trained with its data at the other end: read that way, it explains data x_0 far better.

    Raises: ValueError where the flow-matching error of the other reading is below half of the stage's own.
    """
    device = tensor_of(cond).device
    x_0 = x_0.to(device)
    latents = separate(x_0)
    eps = stage.noise([seed + i for i in range(len(latents))], [x.coords if isinstance(x, SparseSample) else None for x in latents])
    eps, t = eps.to(device), torch.linspace(0.1, 0.9, count(x_0), device=device)
    x_t = stage.path.mix(x_0, t, eps)
    own = stage.path.errors(stage.velocity(x_t, t, cond), x_0, eps).mean()
    mapped = stage.path.errors(opposite(t, stage.velocity(x_t, 1 - t, cond))[1], x_0, eps).mean()
    if mapped < 0.5 * own:
        here, there = ("data", "noise") if stage.data_at_one else ("noise", "data")
        raise ValueError(
            f"stage {stage.name!r}: expected velocities of the convention with {here} at t = 1, got a model of error {own:.3g} "
            f"that has {mapped:.3g} when read with {there} at t = 1. Its stage wants data_at_one={not stage.data_at_one}."
        )
