"""Memory and computing of networks, estimated without a device and without their weights.

Inside a `MemoryTrace` float tensors are fake: they have shapes and no numbers. Integer tensors are computed.
A network of sparse grids decides by its coordinates which rows meet, and a mixture of experts decides by
integers which expert a token goes to. Integers that follow from fake numbers are spread evenly.

Counted is every tensor that is alive at once, as PyTorch allocates it on a CPU. Not counted are the CUDA
context (about half a GiB), workspaces of convolutions and fragmentation. Attention is counted as fused: there
is no matrix of tokens x tokens.
"""

import weakref
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

GIB = 2**30
Module = TypeVar("Module", bound=torch.nn.Module)
aten = torch.ops.aten
ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION_BACK = aten._scaled_dot_product_flash_attention_for_cpu_backward
INDEXED = (aten.index, aten.index_put, aten.index_put_, aten._unsafe_index)


class MemoryTrace(TorchDispatchMode):
    """Context in which new float tensors are fake. It counts the bytes of all living tensors, and
    multiplications and additions.

    >>> with MemoryTrace() as trace: model = Denoiser(config); model(x, t, cond).sum().backward()
    >>> trace.peak, trace.flops
    """

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)  # through super(), mypy does not see that it is torch's, untyped
        self.now = 0  # bytes
        self.peak = 0
        self.flops = 0  # since the last `mark`
        self._sizes: dict[int, int] = {}  # of living storages
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __enter__(self) -> Self:
        self._fake.__enter__()
        TorchDispatchMode.__enter__(self)
        return self

    def __exit__(self, *error: Any) -> None:
        TorchDispatchMode.__exit__(self, *error)
        self._fake.__exit__(*error)

    def mark(self) -> None:
        """Count from here."""
        self.peak = self.now
        self.flops = 0

    def fill(self, module: Module) -> Module:
        """Give a module on the meta device fake numbers, in place."""
        with self:
            return module.to_empty(device="cpu")

    def peak_of(self, run: Callable[[], object]) -> int:
        """Return the most bytes that what `run` makes holds at once, its result included; what lived before
        is not counted.
        """
        with self:
            self.mark()
            before = self.now
            held = run()
            del held
        return self.peak - before

    def __torch_dispatch__(
        self,
        func: Any,
        types: Collection[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
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
    def _really(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with unset_fake_temporarily():
            return func(*args, **kwargs)

    def _numbered(self, indices: Any) -> list[Any]:
        """Replace masks among indices by the numbers of the rows that they choose."""
        chosen: list[Any] = []
        for index in indices:
            mask = isinstance(index, torch.Tensor) and index.dtype == torch.bool
            chosen += self._really(lambda i: [*i.nonzero(as_tuple=True)], (index,), {}) if mask else [index]
        return chosen

    @staticmethod
    def _spread(x: torch.Tensor, most: int) -> torch.Tensor:
        """Return integers below `most` in place of those that follow from fake numbers: they go round.
        Conditions hold.
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
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)


def flops_of(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Count multiplications and additions as torch does, and those of the CPU's attention, which it leaves
    out.
    """
    if op is ATTENTION:
        return int(sdpa_flop_count(*(x.shape for x in args[:3])))
    if op is ATTENTION_BACK:
        return int(sdpa_backward_flop_count(*(x.shape for x in args[:4])))
    return int(flop_registry[op](*args, **kwargs, out_val=result)) if op in flop_registry else 0


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Weights by network and peaks by stage."""

    weights: dict[str, tuple[int, int]]  # numbers, bytes
    stages: dict[str, int]  # bytes on top of all weights

    @property
    def total(self) -> int:
        return sum(size for _, size in self.weights.values()) + max(self.stages.values(), default=0)

    def __add__(self, other: "Costs") -> "Costs":
        """Join both tables: all weights are held, the stages come one after another."""
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
    """Return (numbers, bytes) of a module whose parameters are kept as `dtype`."""
    numbers = sum(p.numel() for p in module.parameters())
    return numbers, numbers * dtype.itemsize
