"""Estimate the memory and the floating-point operations of networks, without a GPU and without their weights.

Inside a `MemoryTrace` float tensors are fake: they have a shape and a dtype, but no values. Integer tensors
are computed. Their values are needed because a network on sparse grids finds neighbouring rows by integer
coordinates, and because a mixture of experts assigns tokens to experts by integers. Integers that depend on
fake values are replaced by evenly spread ones.

The estimate adds the sizes, as PyTorch allocates them on a CPU, of all tensors that exist at the same time.
It does not include the CUDA context (about 0.5 GiB), the workspaces of convolutions, and fragmentation.
Attention is counted as a fused operator, which stores no matrix of tokens x tokens.
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

GIB = 2**30  # bytes
Module = TypeVar("Module", bound=torch.nn.Module)
aten = torch.ops.aten
ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION_BACK = aten._scaled_dot_product_flash_attention_for_cpu_backward
# Operators that accept boolean masks as indices.
INDEXED = (aten.index, aten.index_put, aten.index_put_, aten._unsafe_index)


class MemoryTrace(TorchDispatchMode):
    """A context in which new float tensors are fake, for the measurement of memory and operations.

    It counts the bytes of all tensors that exist, and the multiplications and additions of the operators that
    were called.

    >>> with MemoryTrace() as trace: model = Denoiser(config); model(x, t, cond).sum().backward()
    >>> trace.peak, trace.flops
    """

    def __init__(self) -> None:
        # Not through super(): mypy would not recognise the untyped constructor of torch.
        TorchDispatchMode.__init__(self)
        self.current_bytes = 0  # bytes of all storages that exist
        # Largest value of `current_bytes` since the last call of `mark`
        self.peak = 0
        # Number of multiplications and additions since the last call of `mark`
        self.flops = 0
        # Bytes of each existing storage, by the address of its C++ implementation
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
        self.peak = self.current_bytes
        self.flops = 0

    def fill(self, module: Module) -> Module:
        """Replace the tensors of a module by fake tensors on the CPU, in place. Return the module.

        Args: module: module whose tensors are on the meta device.
        """
        with self:
            return module.to_empty(device="cpu")

    def peak_of(self, run: Callable[[], object]) -> int:
        """Return the largest number of bytes that are allocated at the same time while `run` is executed.

        The result of `run` is included. Tensors that existed before the call are not.

        Args: run: function without arguments; its tensors are fake.
        """
        with self:
            self.mark()
            bytes_before = self.current_bytes
            # The variable keeps the result alive until `run` has returned, so that it is counted. Deleting it
            # frees its memory for the next measurement.
            run_result = run()
            del run_result
        return self.peak - bytes_before

    def __torch_dispatch__(
        self,
        func: Any,
        types: Collection[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        # tree_leaves also finds tensors inside lists and dicts.
        input_tensors = [
            candidate for candidate in tree_leaves((args, kwargs)) if isinstance(candidate, torch.Tensor)
        ]
        # The operator creates a tensor on the meta device, which occupies no memory and is not counted.
        if not input_tensors and torch.device(kwargs.get("device") or "cpu").type == "meta":
            return self._execute(func, args, kwargs)
        # All input tensors have values (integers): execute the operator on them.
        if input_tensors and not any(
            isinstance(candidate, FakeTensor) or candidate.device.type == "meta"
            for candidate in input_tensors
        ):
            operator_result = self._execute(func, args, kwargs)
        elif func is aten._local_scalar_dense.default:
            # This operator is `.item()`, and a fake tensor has no value to return. With 1, loops over ranges
            # and divisions remain valid.
            return 1
        else:
            if func.overloadpacket in INDEXED:
                # FakeTensorMode raises an error for a boolean mask, because it cannot determine the number of
                # selected rows.
                args = (args[0], self._indices_from_masks(args[1]), *args[2:])
            # The fake mode computes shapes and dtypes only.
            operator_result = func(*args, **kwargs)
            integer_tensors = [
                candidate
                for candidate in tree_leaves(operator_result)
                if isinstance(candidate, torch.Tensor)
                and not (candidate.is_floating_point() or candidate.is_complex())
            ]
            # A new integer tensor, e.g. of torch.arange: compute it.
            if integer_tensors and not input_tensors:
                operator_result = self._execute(func, args, kwargs)
            elif integer_tensors:
                # The integers depend on fake values. Those of topk are indices along its dimension, which is
                # its third argument, -1 by default. For every other operator, 0 is a valid index.
                upper_bound = 1
                if func.overloadpacket is aten.topk:
                    dimension = args[2] if len(args) > 2 else -1
                    upper_bound = args[0].shape[dimension]
                # Compared by identity: `in` would compare elements of tensors.
                operator_result = tree_map(
                    lambda leaf: (
                        self._spread(leaf, upper_bound)
                        if any(leaf is tensor for tensor in integer_tensors)
                        else leaf
                    ),
                    operator_result,
                )
        self.flops += flops_of(func.overloadpacket, args, kwargs, operator_result)
        # Tensors on the meta device have no memory.
        for candidate in tree_leaves(operator_result):
            if isinstance(candidate, torch.Tensor) and candidate.device.type != "meta":
                self._count(candidate)
        return operator_result

    @staticmethod
    def _execute(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Execute an operator on values, outside the fake mode."""
        with unset_fake_temporarily():
            return func(*args, **kwargs)

    def _indices_from_masks(self, indices: Any) -> list[Any]:
        """Replace each boolean mask in a list of indices by the integer indices of its True elements."""
        integer_indices: list[Any] = []
        for index_tensor in indices:
            if isinstance(index_tensor, torch.Tensor) and index_tensor.dtype == torch.bool:
                # A mask of several dimensions gives one index tensor for each dimension.
                integer_indices += self._execute(
                    lambda mask: [*mask.nonzero(as_tuple=True)], (index_tensor,), {}
                )
            else:
                integer_indices.append(index_tensor)
        return integer_indices

    @staticmethod
    def _spread(replaced_tensor: torch.Tensor, upper_bound: int) -> torch.Tensor:
        """Return a tensor of valid integers that replaces integers which depend on fake values.

        Args:
            replaced_tensor: integer or boolean tensor, of which only the shape and the dtype are used.
            upper_bound: number of valid values, >= 1.
        Returns: the values 0, 1, ..., upper_bound - 1, repeated in this order; True for a boolean tensor.
        """
        with unset_fake_temporarily():
            return (
                torch.ones(replaced_tensor.shape, dtype=replaced_tensor.dtype)
                if replaced_tensor.dtype == torch.bool
                else torch.arange(replaced_tensor.numel()).view(replaced_tensor.shape) % upper_bound
            )

    def _count(self, tensor: torch.Tensor) -> None:
        """Add the size of a tensor's storage to the count until the storage is freed."""
        storage = tensor.untyped_storage()
        # Views share a storage, which is counted once.
        storage_address = storage._cdata
        if storage_address not in self._sizes:
            self._sizes[storage_address] = storage.nbytes()
            self.current_bytes += self._sizes[storage_address]
            self.peak = max(self.peak, self.current_bytes)
            weakref.finalize(storage, self._drop, storage_address)

    def _drop(self, storage_address: int) -> None:
        """Subtract the size of a storage that was freed."""
        self.current_bytes -= self._sizes.pop(storage_address, 0)


def flops_of(
    operator_packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any], operator_result: Any
) -> int:
    """Count the multiplications and additions of one operator call, as torch.utils.flop_counter does.

    The fused attention operators of the CPU, which torch's table does not contain, are counted, too.
    Operators outside the table, such as additions, count as 0.

    Args:
        operator_packet: overload packet of the operator, for example torch.ops.aten.mm.
        args, kwargs: arguments of the call.
        operator_result: result of the call.
    """
    if operator_packet is ATTENTION:
        # The first three arguments are query, key and value.
        return int(sdpa_flop_count(*(tensor.shape for tensor in args[:3])))
    if operator_packet is ATTENTION_BACK:
        # The first four arguments are the output's gradient, query, key and value.
        return int(sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4])))
    return (
        int(flop_registry[operator_packet](*args, **kwargs, out_val=operator_result))
        if operator_packet in flop_registry
        else 0
    )


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Memory of a job: the weights of each network, and the peak of each stage of the computation."""

    weights: dict[str, tuple[int, int]]  # name -> (number of parameters, bytes)
    stages: dict[str, int]  # name -> peak in bytes, in addition to all weights

    @property
    def total(self) -> int:
        """Return the bytes of all weights plus the peak of the most expensive stage."""
        return sum(byte_count for _, byte_count in self.weights.values()) + max(
            self.stages.values(), default=0
        )

    def __add__(self, other: "Costs") -> "Costs":
        """Combine the memory of two jobs.

        The weights of the two jobs are in memory at the same time. Their stages run one after another.

        Args: other: costs of the second job. If both jobs have a network or a stage of the same name, the
            second job's value is used.
        """
        return Costs(weights=self.weights | other.weights, stages=self.stages | other.stages)

    def __str__(self) -> str:
        """Format the weights and the stages as two tables for the terminal, in GiB."""
        text_lines = [f"{'weights':44}{'parameters':>12}{'GiB':>9}"]
        text_lines += [
            f"  {row_name:42}{parameter_count / 1e6:>10.1f} M{byte_count / GIB:>9.2f}"
            for row_name, (parameter_count, byte_count) in self.weights.items()
        ]
        text_lines += [f"{'peak memory of a stage, in addition to the weights':56}{'GiB':>9}"]
        text_lines += [
            f"  {row_name:54}{byte_count / GIB:>9.2f}" for row_name, byte_count in self.stages.items()
        ]
        return "\n".join([*text_lines, f"{'weights and the largest stage':56}{self.total / GIB:>9.2f}"])


def weight_row(module: torch.nn.Module, dtype: torch.dtype = torch.float32) -> tuple[int, int]:
    """Return (number of parameters, bytes) of a module if its parameters are stored as `dtype`."""
    # parameters() yields a parameter that several layers share only once.
    parameter_count = sum(parameter.numel() for parameter in module.parameters())
    return parameter_count, parameter_count * dtype.itemsize
