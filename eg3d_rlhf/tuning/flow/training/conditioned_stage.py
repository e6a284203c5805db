"""Combine a stage with the source of its conditioning. Training needs nothing else of a generator.

A prompt is the name of a conditioning input (a text, or the name of an image). Its conditioning is the
tensors that the network reads.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch

from eg3d_rlhf.tuning.flow.base.conditioning import Condition
from eg3d_rlhf.tuning.flow.base.stage import FlowStage, Pipeline, stage_of


class ConditioningSource(Protocol):
    """Interface to a source of the conditioning tensors of a stage. A Pipeline implements it."""

    def conditioning(self, names: Sequence[str], stage: str) -> Condition:
        """Return the conditioning tensors of N prompts for a stage, N rows; see Pipeline."""

    def null_conditioning(self, n: int, stage: str) -> Condition:
        """Return the empty conditioning for a stage, n equal rows; see Pipeline."""


@dataclass(frozen=True)
class ConditionedStage:
    """Stage with the source of its conditioning."""

    stage: FlowStage
    source: ConditioningSource

    @classmethod
    def from_pipeline(cls, pipeline: Pipeline, name: str) -> Self:
        """Create the conditioned stage from the stage `name` of a pipeline.

        Raises: ValueError, with the names of the pipeline's stages, if no stage has this name.
        """
        # a pipeline conditions its own stages
        return cls(stage_of(pipeline, name), pipeline)

    def with_model(self, model: torch.nn.Module | None) -> Self:
        """Return the same stage with another network, or this object itself if `model` is None."""
        # the pipeline's own stage is not changed
        return self if model is None else replace(self, stage=replace(self.stage, model=model))

    def conditioning(self, names: Sequence[str]) -> Condition:
        """Return the conditioning tensors of N prompts, N rows."""
        return self.source.conditioning(names, self.stage.name)

    def null_conditioning(self, n: int) -> Condition:
        """Return the empty conditioning, n equal rows."""
        return self.source.null_conditioning(n, self.stage.name)
