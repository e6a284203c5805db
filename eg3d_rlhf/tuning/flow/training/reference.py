"""Reference network that a policy is compared with, and that is never trained.

A reference is either a second network (full tuning) or the policy itself with its adapters switched off
(LoRA). Before each use, the reference is checked: none of its parameters may be trained.

Shapes: N samples, V voxels and C channels, as in models/sparse.py; P pairs.
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
    """Reference network that is never trained and shares no trained parameter with the policy.

    Args:
        model: the reference network.
        policy: the network in training; None: it is not checked whether both share trained parameters.
    """

    def __init__(self, model: nn.Module, policy: nn.Module | None = None):
        self._model = model
        self._policy = policy
        self._check()

    def _check(self) -> None:
        """Assert that no parameter of the network is trained or shares memory with a trained parameter."""
        _assert_frozen(self._model.named_parameters())
        # parameters are compared by memory, not by identity: `shared_copy` makes new objects of the same data
        policy_parameters = [] if self._policy is None else self._policy.named_parameters()
        trained_addresses: dict[int, str] = {}  # address of the memory -> name of the parameter
        for name, p in policy_parameters:
            if p.requires_grad:
                trained_addresses |= dict.fromkeys(_storage_addresses(p), name)
        shared_names = []
        for p in self._model.parameters():
            for address in _storage_addresses(p):
                if address in trained_addresses:
                    shared_names.append(trained_addresses[address])
        # three names are enough to find the mistake
        assert not shared_names, (
            f"the reference shares trained parameters with the policy: {', '.join(shared_names[:3])}"
        )

    def velocity(
        self, stage: FlowStage, x_t: Batch, t: torch.Tensor, cond: Condition, step: float | None = None
    ) -> Batch:
        """Compute the reference's velocity v. Not differentiable.

        Args:
            stage: stage that the network belongs to.
            x_t: N samples at times t.
            t: times [N] in 0..1; 1 is pure noise.
            cond: conditioning, N rows.
            step: length of the sampler's step, for networks that are conditioned on it.
        """
        # at every call: `requires_grad_` on the policy may have changed since the last one
        self._check()
        with torch.no_grad(), evaluating(self._model):
            return stage.velocity(x_t, t, cond, self._model, step)

    def errors(self, stage: FlowStage, draw: PairDraw) -> torch.Tensor:
        """Compute the flow-matching errors [2P] of a batch of pairs, float32, in the order of the draw.

        Not differentiable.
        """
        with torch.no_grad():
            v = self.velocity(stage, draw.x_t, draw.t, draw.cond)
            # `single` converts to float32 before the difference of two nearly equal errors is taken
            return stage.path.errors(single(v), draw.x_0, draw.eps).float()


class AdapterOff(FrozenModel):
    """Reference that is the policy itself with its adapters switched off.

    This reference equals the untuned network exactly, and needs no further memory.
    """

    def __init__(self, model: nn.Module):
        assert adapted_layers(model), "the network has no adapters that could be switched off"
        super().__init__(model)

    def _check(self) -> None:
        # the adapters do train, but they are off while the reference is computed
        adapters = {id(p) for p in lora_parameters(self._model)}
        _assert_frozen((name, p) for name, p in self._model.named_parameters() if id(p) not in adapters)

    def velocity(
        self, stage: FlowStage, x_t: Batch, t: torch.Tensor, cond: Condition, step: float | None = None
    ) -> Batch:
        """Compute the velocity of the untuned network, see FrozenModel.velocity."""
        with adapters_off(self._model):
            return super().velocity(stage, x_t, t, cond, step)


def _assert_frozen(parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    trained_names = [name for name, p in parameters if p.requires_grad]
    # three names are enough to find the mistake
    assert not trained_names, f"parameters of the reference would be trained: {', '.join(trained_names[:3])}"


def _storage_addresses(parameter: nn.Parameter) -> list[int]:
    """Return a list with the address of a parameter's memory.

    The list is empty if the parameter has no memory that another one could share.
    """
    # sharded parameters are separate copies, so they cannot share memory with the reference
    if isinstance(parameter, DTensor):
        return []
    # meta tensors all have the address 0, which must not look like shared memory
    address = parameter.untyped_storage().data_ptr() if parameter.device.type != "meta" else 0
    return [address] if address else []
