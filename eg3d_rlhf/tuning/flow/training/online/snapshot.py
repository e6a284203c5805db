"""A network as it was, beside the one in training: a second set of the parameters that training moves, and
the rest shared. And how fast such a network follows the policy.
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
    """Compute d after so many optimiser steps, in 0..1: the network that draws follows the policy by
    old <- d old + (1 - d) new.

    >>> decay("slow", 100), decay("copy", 100), decay("late", 100)
    (0.1, 0.0, 0.1875)
    """
    return DECAYS[name](steps)


class Snapshot:
    """Of adapters it takes their memory once more, of all parameters the network's.

    Args: policy: the network in training; named: its parameters that are trained.
    """

    def __init__(self, policy: nn.Module, named: Mapping[str, nn.Parameter]):
        self._policy = policy
        self._named = dict(named)
        self.values = {name: p.detach().clone() for name, p in self._named.items()}

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """old <- decay old + (1 - decay) new."""
        for name, p in self._named.items():
            self.values[name].lerp_(p, 1 - decay) if decay else self.values[name].copy_(p)

    @torch.no_grad()
    def load(self, values: Mapping[str, torch.Tensor]) -> None:
        for name, value in self.values.items():
            value.copy_(values[name])

    @contextlib.contextmanager
    def active(self) -> Iterator[nn.Module]:
        """The policy's module with these parameters, without gradient; then with its own again."""
        own = {name: p.data for name, p in self._named.items()}
        try:
            for name, p in self._named.items():
                p.data = self.values[name]
            with torch.no_grad(), evaluating(self._policy):
                yield self._policy
        finally:
            for name, p in self._named.items():
                p.data = own[name]

    def velocity(
        self, stage: FlowStage, x_t: Batch, t: torch.Tensor, cond: Condition, step: float | None = None
    ) -> Batch:
        """v of the network as it was, as FrozenModel has it."""
        with self.active() as model:
            return stage.velocity(x_t, t, cond, model, step)
