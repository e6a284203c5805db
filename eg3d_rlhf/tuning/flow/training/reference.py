"""Reference network that a policy is compared with, and that is never trained.

A reference is either a second network (full tuning) or the policy itself with its adapters switched off
(LoRA). Before each use it is checked that no parameter of it would be trained.

Shape letters as in sparse.py; P pairs.
"""

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from eg3d_rlhf.models.lora import adapted_layers, adapters_off, lora_parameters
from eg3d_rlhf.models.sparse import Batch, single
from eg3d_rlhf.tuning.flow.base.conditioning import Condition
from eg3d_rlhf.tuning.flow.base.sampling import evaluating
from eg3d_rlhf.tuning.flow.base.stage import FlowStage
from eg3d_rlhf.tuning.flow.training.dpo import PairDraw


class FrozenModel:
    """A network that stays as it is. It shares no trained parameter with the policy."""

    def __init__(self, model: nn.Module, policy: nn.Module | None = None):
        self._model = model
        self._policy = policy
        self._check()

    def _check(self) -> None:
        """Assert that neither the network nor memory that it shares with the policy is trained."""
        _assert_frozen(self._model.named_parameters())
        # parameters are compared by memory, not by identity: `shared_copy` makes new objects of the same data
        policy = [] if self._policy is None else self._policy.named_parameters()
        trained = {place: name for name, p in policy if p.requires_grad for place in _places(p)}
        shared = [
            trained[place] for p in self._model.parameters() for place in _places(p) if place in trained
        ]
        assert not shared, f"a reference that would train with the policy: {', '.join(shared[:3])}"

    def velocity(
        self, stage: FlowStage, x_t: Batch, t: torch.Tensor, cond: Condition, step: float | None = None
    ) -> Batch:
        """Compute v at times t [N] in 0..1. Not differentiable.

        Args: step: length of the sampler's step, for networks that are conditioned on it.
        """
        # at every call: `requires_grad_` on the policy may have changed since the last one
        self._check()
        with torch.no_grad(), evaluating(self._model):
            return stage.velocity(x_t, t, cond, self._model, step)

    def errors(self, stage: FlowStage, draw: PairDraw) -> torch.Tensor:
        """Compute the flow-matching errors [2P] of a batch of pairs, float32, in the order of the draw.

        Not differentiable.
        """
        # `single` converts to float32 before the difference of two nearly equal errors is taken
        with torch.no_grad():
            return stage.path.errors(
                single(self.velocity(stage, draw.x_t, draw.t, draw.cond)), draw.x_0, draw.eps
            ).float()


class AdapterOff(FrozenModel):
    """The policy with its adapters switched off: it equals the base exactly and needs no further memory."""

    def __init__(self, model: nn.Module):
        assert adapted_layers(model), "a network without adapters"
        super().__init__(model)

    def _check(self) -> None:
        # the adapters do train, but they are off while the reference is computed
        adapters = {id(p) for p in lora_parameters(self._model)}
        _assert_frozen((name, p) for name, p in self._model.named_parameters() if id(p) not in adapters)

    def velocity(
        self, stage: FlowStage, x_t: Batch, t: torch.Tensor, cond: Condition, step: float | None = None
    ) -> Batch:
        """Compute v of the base, as FrozenModel does."""
        with adapters_off(self._model):
            return super().velocity(stage, x_t, t, cond, step)


def _assert_frozen(parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    names = [name for name, p in parameters if p.requires_grad]
    assert not names, f"a reference that would train: {', '.join(names[:3])}"


def _places(p: nn.Parameter) -> list[int]:
    """Return the address of a parameter's memory in a list; an empty list if it has none of its own."""
    # sharded parameters are copies of their own, so they cannot share memory with the reference
    if isinstance(p, DTensor):
        return []
    # meta tensors all have the address 0, which must not look like shared memory
    start = p.untyped_storage().data_ptr() if p.device.type != "meta" else 0
    return [start] if start else []
