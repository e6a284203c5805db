"""Full tuning over several processes: each holds its part of every parameter, of its gradient and of the
optimiser's moments (PyTorch's FSDP2, `fully_shard`). Blocks are put together where they are computed, one at
a time; gradients are summed over ranks as they are made.

The frozen reference stays whole on every process. Files hold whole tensors, so that runs go on with any
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

# in which hooks look for tensors with a gradient: to tensors and what is left, and back
_KINDS: Mapping[type, tuple[Any, Any]] = {
    SparseBatch: (lambda batch: ([batch.feats], batch), lambda feats, batch: batch.with_feats(*feats)),
    NamedBatch: (
        lambda batch: ([*batch.tensors.values()], [*batch.tensors]),
        lambda values, names: NamedBatch(dict(zip(names, values, strict=True))),
    ),
}


def shard(model: torch.nn.Module, ranks: Ranks) -> None:
    """Divide a network's parameters over ranks, in place: each element of its lists of blocks by itself, then
    what is left.
    """
    for kind, (flatten, unflatten) in _KINDS.items():
        if kind not in pytree.SUPPORTED_NODES:
            pytree.register_pytree_node(kind, flatten, unflatten)
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    for module in [*_blocks(model), model]:
        part: Any = fully_shard(module, mesh=mesh)
        part.set_gradient_divide_factor(1.0)  # losses are sums over a batch, divided once by their number
        part.set_force_sum_reduction_for_comms(True)  # gloo has no other


def _blocks(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Elements of the outermost lists: what is inside of one may not be called by every rank alike."""
    for child in model.children():
        yield from child if isinstance(child, torch.nn.ModuleList) else _blocks(child)


@contextlib.contextmanager
def gathered(model: torch.nn.Module) -> Iterator[None]:
    """Within it a sharded network is whole on every rank, and is computed without a word between them: to
    measure, or to draw.
    """
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()


def sharded(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, DTensor)


def whole(tensors: Mapping[str, torch.Tensor], ranks: Ranks) -> dict[str, torch.Tensor]:
    """Tensors by name, sharded ones put together on rank 0's CPU and empty elsewhere; all ranks ask, for the
    same names in one order.
    """
    found = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
            tensor = tensor.cpu() if ranks.main else tensor.new_empty(0)
        found[name] = tensor
    return found


def like(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A whole tensor as a parameter has its own: this rank's part of it where that one is sharded."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(
        value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )
