"""Runs of networks without memory and without weights: what they would hold, and how much they would compute.

Numbers are fake, integers are real. A network of sparse grids decides by its coordinates which rows meet, and
a mixture by integers which expert a token goes to: those are computed, or, where they follow from numbers
that nobody has, spread evenly.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten
ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION_BACK = aten._scaled_dot_product_flash_attention_for_cpu_backward
INDEXED = (aten.index, aten.index_put, aten.index_put_, aten._unsafe_index)


class Pretended(TorchDispatchMode):
    """A with-statement inside which new numbers are fake; counts the bytes of all tensors that live, and
    multiplications and additions.

    Results on a CPU and on CUDA differ in what the device's own kernels hold besides; fake tensors are those
    of a CPU.

    >>> with Pretended() as run: model = Denoiser(config); model(x, t, cond).sum().backward()
    >>> run.peak, run.flops
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0  # bytes
        self.flops = 0  # since the last `mark`
        self._sizes: dict[int, int] = {}  # of living storages
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __enter__(self):
        self._fake.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error):
        super().__exit__(*error)
        self._fake.__exit__(*error)

    def mark(self) -> None:
        """Count from here."""
        self.peak = self.now
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if not given and torch.device(kwargs.get("device") or "cpu").type == "meta":
            return self._really(func, args, kwargs)
        if given and not any(isinstance(x, FakeTensor) or x.device.type == "meta" for x in given):
            result = self._really(func, args, kwargs)
        elif func is aten._local_scalar_dense.default:
            return 1
        else:
            if func.overloadpacket in INDEXED:
                args = (args[0], self._numbered(args[1]), *args[2:])
            result = func(*args, **kwargs)
            whole = [
                x
                for x in tree_leaves(result)
                if isinstance(x, torch.Tensor) and not (x.is_floating_point() or x.is_complex())
            ]
            if whole and not given:
                result = self._really(func, args, kwargs)
            elif whole:
                most = (
                    args[0].shape[args[2] if len(args) > 2 else -1] if func.overloadpacket is aten.topk else 1
                )
                result = tree_map(
                    lambda x: self._spread(x, most) if any(x is y for y in whole) else x, result
                )
        self.flops += flops_of(func.overloadpacket, args, kwargs, result)
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.device.type != "meta":
                self._count(x)
        return result

    @staticmethod
    def _really(func: Callable, args: tuple, kwargs: dict) -> Any:
        with unset_fake_temporarily():
            return func(*args, **kwargs)

    def _numbered(self, indices: Any) -> list:
        """Masks among indices as the rows that they choose."""
        chosen: list = []
        for index in indices:
            mask = isinstance(index, torch.Tensor) and index.dtype == torch.bool
            chosen += self._really(lambda i: [*i.nonzero(as_tuple=True)], (index,), {}) if mask else [index]
        return chosen

    @staticmethod
    def _spread(x: torch.Tensor, most: int) -> torch.Tensor:
        """Integers below `most` in place of those that follow from fake numbers: they go round, and
        conditions hold.
        """
        with unset_fake_temporarily():
            return (
                torch.ones(x.shape, dtype=x.dtype)
                if x.dtype == torch.bool
                else torch.arange(x.numel()).view(x.shape) % most
            )

    def _count(self, x: torch.Tensor) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += self._sizes[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)


def flops_of(op: Any, args: tuple, kwargs: dict, result: Any) -> int:
    """As torch counts them, and of the CPU's attention, which it leaves out."""
    if op is ATTENTION:
        return sdpa_flop_count(*(x.shape for x in args[:3]))
    if op is ATTENTION_BACK:
        return sdpa_backward_flop_count(*(x.shape for x in args[:4]))
    return flop_registry[op](*args, **kwargs, out_val=result) if op in flop_registry else 0
