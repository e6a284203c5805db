"""A stage with its conditioning: all that training needs of a generator."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch

from eg3d_rlhf.tuning.flow.base.conditioning import Condition
from eg3d_rlhf.tuning.flow.base.stage import FlowStage, Pipeline, stage_of


class Conditioning(Protocol):
    """Gives conditioning tensors of a stage. A Pipeline is one."""

    def conditions(self, names: Sequence[str], stage: str) -> Condition:
        """Return the tensors of conditions by name; see Pipeline."""

    def no_condition(self, n: int, stage: str) -> Condition:
        """Return the empty condition, n times; see Pipeline."""


@dataclass(frozen=True)
class ConditionedStage:
    """A stage, and what gives its conditioning."""

    stage: FlowStage
    conditioning: Conditioning

    @classmethod
    def from_pipeline(cls, pipeline: Pipeline, name: str) -> Self:
        """Take the stage of that name. Raises: ValueError naming those there are."""
        return cls(stage_of(pipeline, name), pipeline)

    def with_model(self, model: torch.nn.Module | None) -> Self:
        """Return the same with another network in the stage, or with its own for None."""
        return self if model is None else replace(self, stage=replace(self.stage, model=model))

    def conditions(self, names: Sequence[str]) -> Condition:
        """Return the tensors of conditions by name, N rows."""
        return self.conditioning.conditions(names, self.stage.name)

    def no_condition(self, n: int) -> Condition:
        """Return the empty condition, n rows."""
        return self.conditioning.no_condition(n, self.stage.name)
