"""What networks will hold in memory, found by running them on the meta device: shapes without numbers, so the
real sizes cost nothing.

Counted: weights, and every tensor that is alive at once, as PyTorch allocates them. Not counted: the CUDA
context (about half a GiB), workspaces of convolutions, fragmentation, the asset and its renderer. Attention
is counted as fused (no matrix of pixels x pixels).
"""

import contextlib
import weakref
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import BackwardCFunction, FunctionCtx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GIB = 2**30


class _Fused(torch.autograd.Function):
    """Attention's output without the matrix of weights; its graph keeps query, key, value and the output."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        out = query.new_empty((*query.shape[:-1], value.shape[-1]))
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx: BackwardCFunction, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


@contextlib.contextmanager
def _fused_attention() -> Iterator[None]:
    """torch's attention as _Fused, in backward passes as well."""
    real = F.scaled_dot_product_attention
    fused: Callable[..., torch.Tensor] = _Fused.apply
    F.scaled_dot_product_attention = lambda query, key, value, *args, **kwargs: fused(query, key, value)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = real


class _Live(TorchDispatchMode):
    """Bytes of the storages that were made inside and are still alive, and their peak."""

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)  # through super(), mypy does not see that it is torch's, untyped
        self.now = 0
        self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Collection[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = {
            x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage(), given)
        return out

    def _count(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key = storage._cdata
        size = storage.nbytes()
        if key not in self.known and key not in given:  # a view of a weight is no new memory
            self.known.add(key)
            weakref.finalize(storage, self._drop, key, size)
            self.now += size
            self.peak = max(self.peak, self.now)

    def _drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def peak_bytes(run: Callable[[], Any]) -> int:
    """Most bytes alive at once of what `run` makes on the meta device, its result included; its modules and
    arguments are not.
    """
    live = _Live()
    with _fused_attention(), live:
        held = run()
        del held
    return live.peak


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Weights by network and peaks by stage."""

    weights: dict[str, tuple[int, int]]  # numbers, bytes
    stages: dict[str, int]  # bytes on top of all weights

    @property
    def total(self) -> int:
        return sum(size for _, size in self.weights.values()) + max(self.stages.values(), default=0)

    def __add__(self, other: "Costs") -> "Costs":
        """Both in one table: all weights are held, the stages come one after another."""
        return Costs(weights=self.weights | other.weights, stages=self.stages | other.stages)

    def __str__(self) -> str:
        rows = [f"{'weights':44}{'numbers':>12}{'GiB':>9}"]
        rows += [
            f"  {name:42}{n / 1e6:>10.1f} M{size / GIB:>9.2f}" for name, (n, size) in self.weights.items()
        ]
        rows += [f"{'at its most, on top of the weights':56}{'GiB':>9}"]
        rows += [f"  {name:54}{size / GIB:>9.2f}" for name, size in self.stages.items()]
        return "\n".join([*rows, f"{'weights and the largest of these':56}{self.total / GIB:>9.2f}"])


def weight_row(module: torch.nn.Module, dtype: torch.dtype = torch.float32) -> tuple[int, int]:
    """(numbers, bytes) of a module whose parameters are kept as `dtype`."""
    numbers = sum(p.numel() for p in module.parameters())
    return numbers, numbers * dtype.itemsize
