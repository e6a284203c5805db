"""Snapshot of the network in training: a second set of the trained parameters, which shares all other
parameters with the network. DiffusionNFT (Zheng et al. 2025) and DGPO sample from a snapshot that follows the
policy.
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
    """Compute the decay d in 0..1 with which the sampling network follows the policy.

    After each update, the parameters of the sampling network are d old + (1 - d) new, with "old" their
    values before and "new" the policy's.

    Args:
        name: name of a schedule in DECAYS.
        steps: number of optimiser steps so far.

    >>> decay("slow", 100), decay("copy", 100), decay("late", 100)
    (0.1, 0.0, 0.1875)
    """
    # an update may have several optimiser steps (`passes`), and each of them counts
    return DECAYS[name](steps)


class Snapshot:
    """Snapshot of a policy's trained parameters, which needs the memory of a second set of them.

    With adapters this is little memory. With full tuning it is the memory of all parameters of the network.

    Args:
        policy: network in training.
        trained_parameters: trained parameters of the policy, by name.
    """

    def __init__(self, policy: nn.Module, trained_parameters: Mapping[str, nn.Parameter]):
        self._policy = policy
        self._parameters = dict(trained_parameters)
        # clones, since the policy's parameters are changed in place
        self.values = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """Move the snapshot towards the policy: snapshot <- decay snapshot + (1 - decay) policy."""
        for name, p in self._parameters.items():
            # for a decay of 0 the values are copied, so that they are equal and not merely close
            self.values[name].lerp_(p, 1 - decay) if decay else self.values[name].copy_(p)

    @torch.no_grad()
    def load(self, values: Mapping[str, torch.Tensor]) -> None:
        """Copy `values`, a tensor for each name of a parameter, into the snapshot in place."""
        for name, value in self.values.items():
            value.copy_(values[name])

    @contextlib.contextmanager
    def active(self) -> Iterator[nn.Module]:
        """Yield the policy's module with the snapshot's parameters, without gradient.

        The policy has its own parameters again when the context ends, also after an error.
        """
        # `p.data` is exchanged, not copied: no memory is taken, and the optimiser's parameters stay the same
        policy_data = {name: p.data for name, p in self._parameters.items()}
        try:
            for name, p in self._parameters.items():
                p.data = self.values[name]
            with torch.no_grad(), evaluating(self._policy):
                yield self._policy
        finally:
            for name, p in self._parameters.items():
                p.data = policy_data[name]

    def velocity(
        self, stage: FlowStage, x_t: Batch, t: torch.Tensor, cond: Condition, step: float | None = None
    ) -> Batch:
        """Compute the velocity with the snapshot's parameters, see FrozenModel.velocity.

        Not differentiable.
        """
        # the policy's module is shared, so this must not be called within a forward pass of the policy
        with self.active() as model:
            return stage.velocity(x_t, t, cond, model, step)
