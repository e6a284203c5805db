"""What a policy is compared with: a network that is never trained.

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
    """A network as it is. It shares no parameter that is trained with the policy."""

    def __init__(self, model: nn.Module, policy: nn.Module | None = None):
        self._model = model
        self._policy = policy
        self._check()

    def _check(self) -> None:
        _refuse_trainable(self._model.named_parameters())
        policy = [] if self._policy is None else self._policy.named_parameters()
        trained = {place: name for name, p in policy if p.requires_grad for place in _places(p)}
        shared = [
            trained[place] for p in self._model.parameters() for place in _places(p) if place in trained
        ]
        assert not shared, f"a reference that would train with the policy: {', '.join(shared[:3])}"

    def velocity(
        self, stage: FlowStage, x_t: Batch, t: torch.Tensor, cond: Condition, step: float | None = None
    ) -> Batch:
        """v at times t [N] in 0..1, and for steps of that length where it is given; without gradient."""
        self._check()
        with torch.no_grad(), evaluating(self._model):
            return stage.velocity(x_t, t, cond, self._model, step)

    def errors(self, stage: FlowStage, draw: PairDraw) -> torch.Tensor:
        """Flow-matching errors [2P] of a batch of pairs, float32, in the order of the draw;
        without gradient.
        """
        with torch.no_grad():
            return stage.path.errors(
                single(self.velocity(stage, draw.x_t, draw.t, draw.cond)), draw.x_0, draw.eps
            ).float()


class AdapterOff(FrozenModel):
    """The policy itself with its adapters off: no memory, and exactly the base."""

    def __init__(self, model: nn.Module):
        assert adapted_layers(model), "a network without adapters"
        super().__init__(model)

    def _check(self) -> None:
        adapters = {id(p) for p in lora_parameters(self._model)}
        _refuse_trainable((name, p) for name, p in self._model.named_parameters() if id(p) not in adapters)

    def velocity(
        self, stage: FlowStage, x_t: Batch, t: torch.Tensor, cond: Condition, step: float | None = None
    ) -> Batch:
        """v of the base."""
        with adapters_off(self._model):
            return super().velocity(stage, x_t, t, cond, step)


def _refuse_trainable(parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    names = [name for name, p in parameters if p.requires_grad]
    assert not names, f"a reference that would train: {', '.join(names[:3])}"


def _places(p: nn.Parameter) -> list[int]:
    """What two tensors of the same memory have in common; nothing for those without memory, or sharded."""
    if isinstance(p, DTensor):
        return []
    start = p.untyped_storage().data_ptr() if p.device.type != "meta" else 0
    return [start] if start else []
