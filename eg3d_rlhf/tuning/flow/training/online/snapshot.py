"""Snapshot of the network in training: a second set of the trained parameters, with all others shared. The
module also holds the schedules by which a snapshot follows the policy.
"""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from eg3d_rlhf.models.sparse import Batch
from eg3d_rlhf.tuning.flow.base.conditioning import Condition
from eg3d_rlhf.tuning.flow.base.sampling import evaluating
from eg3d_rlhf.tuning.flow.base.stage import FlowStage
from eg3d_rlhf.tuning.flow.training.online.settings import DECAYS


def decay(name: str, steps: int) -> float:
    """Compute the decay d in 0..1 after a number of optimiser steps.

    The sampling network follows the policy by old <- d old + (1 - d) new.

    >>> decay("slow", 100), decay("copy", 100), decay("late", 100)
    (0.1, 0.0, 0.1875)
    """
    # the step counts passes over the samples, not updates
    return DECAYS[name](steps)


class Snapshot:
    """Snapshot of a policy's trained parameters, which takes their memory a second time.

    With adapters this is little memory; with full tuning it is that of the whole network.

    Args: policy: the network in training; named: its parameters that are trained.
    """

    def __init__(self, policy: nn.Module, named: Mapping[str, nn.Parameter]):
        self._policy = policy
        self._named = dict(named)
        # clones: the policy's parameters change in place
        self.values = {name: p.detach().clone() for name, p in self._named.items()}

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """Move the snapshot towards the policy: old <- decay old + (1 - decay) new."""
        for name, p in self._named.items():
            # a decay of 0 copies, so that the values are equal and not merely close
            self.values[name].lerp_(p, 1 - decay) if decay else self.values[name].copy_(p)

    @torch.no_grad()
    def load(self, values: Mapping[str, torch.Tensor]) -> None:
        """Copy values into the snapshot, in place."""
        for name, value in self.values.items():
            value.copy_(values[name])

    @contextlib.contextmanager
    def active(self) -> Iterator[nn.Module]:
        """Yield the policy's module with the snapshot's parameters, without gradient.

        The policy's parameters return when the context ends, also after an error.
        """
        # `p.data` is exchanged, not copied: no memory is taken, and the optimiser's parameters stay the same
        policy_data = {name: p.data for name, p in self._named.items()}
        try:
            for name, p in self._named.items():
                p.data = self.values[name]
            with torch.no_grad(), evaluating(self._policy):
                yield self._policy
        finally:
            for name, p in self._named.items():
                p.data = policy_data[name]

    def velocity(
        self, stage: FlowStage, x_t: Batch, t: torch.Tensor, cond: Condition, step: float | None = None
    ) -> Batch:
        """Compute v with the snapshot's parameters, as FrozenModel does. Not differentiable."""
        # the policy's module is shared, so this must not be called within a forward pass of the policy
        with self.active() as model:
            return stage.velocity(x_t, t, cond, model, step)
