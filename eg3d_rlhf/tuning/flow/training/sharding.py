"""Shard a network for full tuning over several processes (PyTorch's FSDP2, `fully_shard`).

Each process holds a part of every parameter, of its gradient and of its moments in the optimiser. The
parameters of a block are gathered while the block is computed, one block at a time. Gradients are summed over
ranks during the backward pass.

The frozen reference is not sharded. Files hold unsharded tensors, so that a run can be resumed with any
number of processes.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils import _pytree as pytree

from eg3d_rlhf.models.sparse import NamedBatch, SparseBatch
from training.distributed import Ranks

# Our own batch classes as pytrees: (flatten into tensors and context, unflatten). FSDP's hooks search the
# outputs of a module for tensors that carry a gradient; a class that pytree cannot flatten would hide them.
_KINDS: Mapping[type, tuple[Any, Any]] = {
    # pytree passes the list of tensors back; it has one element here, the features
    SparseBatch: (lambda batch: ([batch.feats], batch), lambda feats, batch: batch.with_feats(*feats)),
    NamedBatch: (
        lambda batch: ([*batch.tensors.values()], [*batch.tensors]),
        lambda values, names: NamedBatch(dict(zip(names, values, strict=True))),
    ),
}


def shard(model: torch.nn.Module, ranks: Ranks) -> None:
    """Divide a network's parameters over ranks, in place.

    Each block of its module lists becomes a unit of its own; the remaining parameters form the last unit.
    """
    for batch_class, (flatten, unflatten) in _KINDS.items():
        # registering a class twice is an error, and a process may train several stages
        if batch_class not in pytree.SUPPORTED_NODES:
            pytree.register_pytree_node(batch_class, flatten, unflatten)
    # one dimension: the parameters are divided over all ranks
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    # inner modules first, as `fully_shard` asks: the root takes the parameters that no block has taken
    for unit in [*_blocks(model), model]:
        sharded_unit: Any = fully_shard(unit, mesh=mesh)
        # losses are sums over a batch, divided once by their number
        sharded_unit.set_gradient_divide_factor(1.0)
        sharded_unit.set_force_sum_reduction_for_comms(True)  # gloo can only sum


def _blocks(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Yield the elements of a network's outermost module lists.

    Modules inside a block are not sharded by themselves, because different ranks may call different ones of
    them, and a collective operation that not all ranks reach would wait forever.
    """
    for child in model.children():
        yield from child if isinstance(child, torch.nn.ModuleList) else _blocks(child)


@contextlib.contextmanager
def gathered(model: torch.nn.Module) -> Iterator[None]:
    """Gather a sharded network on every rank, for evaluation or sampling.

    Inside the context a forward pass needs no communication, so ranks may call the network independently.
    """
    # an unsharded network has no FSDP modules: the context then does nothing
    fsdp_modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for fsdp_module in fsdp_modules:
        # otherwise the first forward pass would free the gathered parameters again
        fsdp_module.set_reshard_after_forward(False, recurse=False)
        fsdp_module.unshard()
    try:
        yield
    finally:
        for fsdp_module in fsdp_modules:
            fsdp_module.set_reshard_after_forward(True, recurse=False)
            fsdp_module.reshard()


def sharded(tensor: torch.Tensor) -> bool:
    """Return True if a tensor is divided over ranks."""
    return isinstance(tensor, DTensor)


def unsharded(tensors: Mapping[str, torch.Tensor], ranks: Ranks) -> dict[str, torch.Tensor]:
    """Gather sharded tensors on the CPU of rank 0, by name.

    On the other ranks the gathered tensors are empty. Tensors that are not sharded are returned as they are.

    All ranks must call this function with the same names in the same order, since gathering is a collective
    operation.
    """
    gathered_tensors = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
            # one tensor at a time leaves the device again, so that memory for one full tensor is enough
            tensor = tensor.cpu() if ranks.is_main else tensor.new_empty(0)
        gathered_tensors[name] = tensor
    return gathered_tensors


def like(full_tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a full tensor, or the tensor itself if `parameter` is not sharded.

    Args:
        full_tensor: full tensor of a parameter's shape, or a scalar state of the optimiser.
        parameter: the parameter whose device and sharding the result has.
    """
    # AdamW's step counter is a scalar state of a sharded parameter: another shape, and not sharded
    if not isinstance(parameter, DTensor) or full_tensor.shape != parameter.shape:
        return full_tensor
    # src_data_rank=None: every rank has read the same file, so nothing needs to be sent
    return distribute_tensor(
        full_tensor.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )
