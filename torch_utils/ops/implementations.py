"""Which implementation of a custom op a call gets, and the memory layouts and dtypes that compiled image ops
read.

    ref       the definition, written as plainly as torch allows: the oracle of the tests, and, as EG3D's own
              code on a CPU does the same, the slow side of the benchmarks
    torch     plain torch, arranged to be fast; works everywhere
    compiled  C++ on a CPU, CUDA on a GPU; built on first use (torch_utils/build.py)
    auto      compiled where it can be had and applies to the tensors at hand, else torch
"""

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch

from torch_utils import build

FLOATS = (torch.float32, torch.float64)  # what the compiled ops take
# what the image ops take: [on a CPU, on CUDA]
COMPILED_DTYPES = (FLOATS, (*FLOATS, torch.float16, torch.bfloat16))
IMPLS = ("auto", "compiled", "torch", "ref")
_auto = "auto"
_LIB = torch.library.Library("eg3d_rlhf", "FRAGMENT")


def define(
    schema: str, fake: Callable | None = None, gradients: Callable | None = None, save: Callable | None = None
) -> None:
    """Make a compiled op known to torch as torch.ops.eg3d_rlhf.<name>; its library brings the kernels.

    Args: schema: "name(Tensor x, ...) -> ..."; fake: makes empty results of empty inputs, for torch.compile;
        gradients(ctx, *grads), after save(ctx, inputs, output): for autograd; see torch.library.
    """
    _LIB.define(schema)
    name = "eg3d_rlhf::" + schema.partition("(")[0]
    if fake is not None:
        torch.library.register_fake(name, fake, lib=_LIB)
    if gradients is not None:
        torch.library.register_autograd(name, gradients, setup_context=save, lib=_LIB)


def alike(first: torch.Tensor, *others: torch.Tensor) -> bool:
    """Whether tensors are of one dtype, float32 or float64, on one device, and the first not empty: what most
    compiled ops take.
    """
    same = all(t.dtype == first.dtype and t.device == first.device for t in others)
    return same and first.dtype in FLOATS and first.numel() > 0


def current(impl: str = "auto", who: str = "implementation") -> str:
    """`impl`, or what "auto" means here: "auto", or the name given to the enclosing `implementation` block.

    Raises: ValueError, which names `who`, for an `impl` that is not in `IMPLS`.
    """
    if impl not in IMPLS:
        known = ", ".join(IMPLS)
        raise ValueError(
            f'{who}: expected impl to be one of {known}, got {impl!r}. Use "auto" unless you compare'
            " implementations."
        )
    return _auto if impl == "auto" else impl


@contextlib.contextmanager
def implementation(impl: str) -> Iterator[None]:
    """Make `impl` what "auto" means inside the block, for all ops: how the benchmarks run one path against
    another.

    Holds for the whole process. A backward pass uses what its forward used.
    """
    global _auto
    before = _auto
    _auto = impl if impl == "auto" else current(impl)
    try:
        yield
    finally:
        _auto = before


def once(
    who: str, remedy: str = 'Use implementation("ref") for a second one.'
) -> Callable[[Callable], Callable]:
    """Decorates the backward of an autograd.Function that has no second derivative: create_graph=True is an
    error that ends with `remedy`.

    torch's once_differentiable leaves that derivative out, silently, where the cotangent is a constant.
    """

    def decorate(backward: Callable) -> Callable:
        @functools.wraps(backward)
        def checked(ctx, *grads):
            if torch.is_grad_enabled():
                raise RuntimeError(f"{who}: expected one derivative, got create_graph=True. {remedy}")
            return backward(ctx, *grads)

        return checked

    return decorate


def choose(
    who: str, impl: str, op: str, device_type: str, applies: bool = True, dropped: bool = False
) -> str:
    """The implementation that a call uses: "compiled", "torch" or "ref".

    Args:
        who: name of the public function, for errors; impl: what the caller asked for.
        op: name of the compiled library; device_type: "cpu", "cuda", ...
        applies: whether the compiled op covers these tensors (dtype, sizes, gradients asked for).
        dropped: the compiled op loses against plain torch here, so "auto" does not take it.
    Raises: ValueError for an unknown `impl`, and for "compiled" where that does not apply or cannot be built.
    """
    impl = current(impl, who)
    if impl in ("torch", "ref"):
        return impl
    if impl == "auto" and (dropped or not applies):
        return "torch"
    if applies and build.available(op, device_type):
        return "compiled"
    if impl == "auto":
        return "torch"
    if not applies:
        raise ValueError(
            f'{who}: expected tensors that the compiled op takes for impl="compiled". Use impl="auto".'
        )
    raise ValueError(
        f'{who}: expected a compiled op for impl="compiled", got none for {device_type}. '
        'Run "python -m torch_utils.build" to see why, or use impl="auto".'
    )


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether x [N, C, H, W] lies channels-last and not contiguous as well."""
    return x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def dense(x: torch.Tensor) -> torch.Tensor:
    """x itself where it is contiguous or channels-last, else a contiguous copy. Differentiable in x."""
    return x if is_channels_last(x) else x.contiguous()


def like_layout(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """x in the memory layout of `other`, of the same shape; a copy only where it lies differently.
    Differentiable in x.
    """
    return x.contiguous(
        memory_format=torch.channels_last if is_channels_last(other) else torch.contiguous_format
    )


def convolution_layout(device: torch.device, resolution: int, channels: int) -> torch.memory_format:
    """The layout in which convolutions of `channels` channels of `resolution` x `resolution` pixels, and what
    lies between, are fastest.

    On a CPU channels-last from 64 pixels on (32 with up to 64 channels, whose weights are small): oneDNN's
    transposed convolutions are twice as fast there, and the compiled ones need no copies. Below, weights
    outweigh pixels, and their reordering would cost more. The reference implementation is contiguous
    throughout.
    """
    fast = device.type == "cpu" and current() != "ref" and resolution >= (32 if channels <= 64 else 64)
    return torch.channels_last if fast else torch.contiguous_format


def add_to(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x + y of a caller's own x, in its memory where no gradient is asked for: fresh pages cost more than the
    sum.
    """
    return x + y if current() == "ref" or x.requires_grad or y.requires_grad else x.add_(y)
