"""Estimate the memory and the floating-point operations of networks, without a GPU and without their weights.

Inside a `MemoryTrace` float tensors are fake: they have a shape and a dtype, but no values. Integer tensors
are computed. They are needed because a network on sparse grids finds neighbouring rows by integer
coordinates, and because a mixture of experts assigns tokens to experts by integers. Integers that depend on
fake values are replaced by evenly spread ones.

The estimate counts all tensors that are alive at the same time, with the sizes that PyTorch allocates on a
CPU. It leaves out the CUDA context (about half a GiB), the workspaces of convolutions and fragmentation.
Attention is counted as fused, without a matrix of tokens x tokens.
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
# operators that accept boolean masks as indices
INDEXED = (aten.index, aten.index_put, aten.index_put_, aten._unsafe_index)


class MemoryTrace(TorchDispatchMode):
    """A context in which new float tensors are fake.

    It counts the bytes of all living tensors, and the multiplications and additions that were executed.

    >>> with MemoryTrace() as trace: model = Denoiser(config); model(x, t, cond).sum().backward()
    >>> trace.peak, trace.flops
    """

    def __init__(self) -> None:
        # Through super(), mypy does not see that it is torch's, untyped
        TorchDispatchMode.__init__(self)
        self.now = 0  # bytes of all living storages
        # Largest value of `now` since the last `mark`, bytes
        self.peak = 0
        # Multiplications and additions since the last `mark`
        self.flops = 0
        # Bytes of each living storage, by the address of its implementation
        self._sizes: dict[int, int] = {}
        # Computed integer tensors are inputs of operators next to fake ones, so both have to be allowed.
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __enter__(self) -> Self:
        self._fake.__enter__()
        TorchDispatchMode.__enter__(self)
        return self

    def __exit__(self, *error: Any) -> None:
        TorchDispatchMode.__exit__(self, *error)
        self._fake.__exit__(*error)

    def mark(self) -> None:
        """Start a new count: the peak becomes the present number of bytes, and the operations become 0."""
        self.peak = self.now
        self.flops = 0

    def fill(self, module: Module) -> Module:
        """Replace the tensors of a module on the meta device by fake ones on the CPU, in place. Return the
        module.
        """
        with self:
            return module.to_empty(device="cpu")

    def peak_of(self, run: Callable[[], object]) -> int:
        """Return the largest number of bytes that `run` allocates at once, its result included.

        Tensors that existed before the call are not counted.
        """
        with self:
            self.mark()
            before = self.now
            # The result is kept until the call is over, so that it counts, and is then freed for the next
            # measurement.
            result = run()
            del result
        return self.peak - before

    def __torch_dispatch__(
        self,
        func: Any,
        types: Collection[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        # All tensors among the arguments.
        input_tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        # A tensor that is created on the meta device occupies no memory. It is returned without being
        # counted.
        if not input_tensors and torch.device(kwargs.get("device") or "cpu").type == "meta":
            return self._execute(func, args, kwargs)
        # All inputs are computed (integers): execute the operator on their values.
        if input_tensors and not any(
            isinstance(x, FakeTensor) or x.device.type == "meta" for x in input_tensors
        ):
            result = self._execute(func, args, kwargs)
        elif func is aten._local_scalar_dense.default:
            # `.item()` of a fake tensor. There is no value, and 1 keeps loops and divisions valid.
            return 1
        else:
            if func.overloadpacket in INDEXED:
                # The number of rows that a fake is_mask selects is unknown, and FakeTensorMode would raise an
                # error.
                args = (args[0], self._indices_from_masks(args[1]), *args[2:])
            # The fake mode computes shapes and dtypes only.
            result = func(*args, **kwargs)
            integer_tensors = [
                x
                for x in tree_leaves(result)
                if isinstance(x, torch.Tensor) and not (x.is_floating_point() or x.is_complex())
            ]
            # A new integer tensor, e.g. of torch.arange: compute it.
            if integer_tensors and not input_tensors:
                result = self._execute(func, args, kwargs)
            elif integer_tensors:
                # Integers that depend on fake values. Of topk they are indices along its dimension (the third
                # argument, -1 by default); for every other operator 0 is valid wherever an index is needed.
                upper_bound = (
                    args[0].shape[args[2] if len(args) > 2 else -1] if func.overloadpacket is aten.topk else 1
                )
                result = tree_map(
                    lambda x: self._spread(x, upper_bound) if any(x is y for y in integer_tensors) else x,
                    result,
                )
        self.flops += flops_of(func.overloadpacket, args, kwargs, result)
        # Tensors on the meta device have no memory.
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.device.type != "meta":
                self._count(x)
        return result

    @staticmethod
    def _execute(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Execute an operator on values, outside the fake mode."""
        with unset_fake_temporarily():
            return func(*args, **kwargs)

    def _indices_from_masks(self, indices: Any) -> list[Any]:
        """Replace boolean masks among indices by the indices of the rows that they select."""
        chosen: list[Any] = []
        for index in indices:
            is_mask = isinstance(index, torch.Tensor) and index.dtype == torch.bool
            chosen += (
                self._execute(lambda i: [*i.nonzero(as_tuple=True)], (index,), {}) if is_mask else [index]
            )
        return chosen

    @staticmethod
    def _spread(x: torch.Tensor, upper_bound: int) -> torch.Tensor:
        """Return valid integers in place of those that depend on fake values.

        They are 0, 1, ..., upper_bound - 1, repeated in this order.

        Booleans become True.
        """
        with unset_fake_temporarily():
            return (
                torch.ones(x.shape, dtype=x.dtype)
                if x.dtype == torch.bool
                else torch.arange(x.numel()).view(x.shape) % upper_bound
            )

    def _count(self, x: torch.Tensor) -> None:
        """Add a tensor's storage to the count, and subtract it when the storage is freed."""
        storage = x.untyped_storage()
        # Views share a storage, which is counted once.
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += self._sizes[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        """Subtract a storage that was freed."""
        self.now -= self._sizes.pop(key, 0)


def flops_of(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Count the multiplications and additions of one operator call, as torch.utils.flop_counter does.

    Adds the fused attention of the CPU, which torch's table leaves out.
    """
    if op is ATTENTION:
        return int(sdpa_flop_count(*(x.shape for x in args[:3])))
    if op is ATTENTION_BACK:
        return int(sdpa_backward_flop_count(*(x.shape for x in args[:4])))
    # 0: operators outside torch's table, such as additions
    return int(flop_registry[op](*args, **kwargs, out_val=result)) if op in flop_registry else 0


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Memory of a job: the weights of each network, and the peak of each stage."""

    weights: dict[str, tuple[int, int]]  # name -> (number of parameters, bytes)
    stages: dict[str, int]  # name -> peak in bytes, in addition to all weights

    @property
    def total(self) -> int:
        """Return the bytes of all weights and of the most expensive stage."""
        return sum(size for _, size in self.weights.values()) + max(self.stages.values(), default=0)

    def __add__(self, other: "Costs") -> "Costs":
        """Join two tables. The weights of both are in memory together; the stages run one after another."""
        return Costs(weights=self.weights | other.weights, stages=self.stages | other.stages)

    def __str__(self) -> str:
        """Format both tables for the terminal, in GiB."""
        # The first line of each block is its heading.
        rows = [f"{'weights':44}{'parameters':>12}{'GiB':>9}"]
        rows += [
            f"  {name:42}{n / 1e6:>10.1f} M{size / GIB:>9.2f}" for name, (n, size) in self.weights.items()
        ]
        rows += [f"{'peak memory of a stage, in addition to the weights':56}{'GiB':>9}"]
        rows += [f"  {name:54}{size / GIB:>9.2f}" for name, size in self.stages.items()]
        return "\n".join([*rows, f"{'weights and the largest stage':56}{self.total / GIB:>9.2f}"])


def weight_row(module: torch.nn.Module, dtype: torch.dtype = torch.float32) -> tuple[int, int]:
    """Return (number of parameters, bytes) of a module whose parameters are stored as `dtype`."""
    # Shared parameters count once: parameters() yields each one once.
    numbers = sum(p.numel() for p in module.parameters())
    return numbers, numbers * dtype.itemsize
