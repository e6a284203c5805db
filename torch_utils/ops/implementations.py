"""Choice of the implementation of a custom op, and the memory layouts and dtypes of compiled image ops.

ref       the definition, written as simply as torch allows. It is the oracle of the tests. EG3D's own
code on a
          CPU does the same, so it is also the baseline of the benchmarks
torch     plain torch, arranged to be fast; works everywhere
compiled  C++ on a CPU, CUDA on a GPU; built on first use (torch_utils/build.py)
auto      compiled if it is available and applies to the given tensors, else torch
"""

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch

from torch_utils import build

FLOATS = (torch.float32, torch.float64)  # dtypes of the compiled ops
# Dtypes of the compiled image ops: [on a CPU, on CUDA].
COMPILED_DTYPES = (FLOATS, (*FLOATS, torch.float16, torch.bfloat16))
IMPLS = ("auto", "compiled", "torch", "ref")
_auto = "auto"  # meaning of "auto" in the enclosing `implementation` block
# Ops of several modules share this namespace, hence a fragment.
_LIB = torch.library.Library("eg3d_rlhf", "FRAGMENT")


def define(
    schema: str, fake: Callable | None = None, gradients: Callable | None = None, save: Callable | None = None
) -> None:
    """Register a compiled op with torch as torch.ops.eg3d_rlhf.<name>. Its library supplies the kernels.

    Args:
        schema: "name(Tensor x, ...) -> ...".
        fake: function that makes empty results from empty inputs, for torch.compile.
        gradients: gradients(ctx, *grads), for autograd; see torch.library.
        save: save(ctx, inputs, output), called before it.
    """
    _LIB.define(schema)
    name = "eg3d_rlhf::" + schema.partition("(")[0]
    if fake is not None:
        torch.library.register_fake(name, fake, lib=_LIB)
    if gradients is not None:
        torch.library.register_autograd(name, gradients, setup_context=save, lib=_LIB)


def alike(first: torch.Tensor, *others: torch.Tensor) -> bool:
    """Return whether tensors are what most compiled ops accept.

    That is: one dtype, float32 or float64, one device, and the first one not empty.
    """
    # Empty tensors go to torch, which handles them in every op.
    same = all(t.dtype == first.dtype and t.device == first.device for t in others)
    return same and first.dtype in FLOATS and first.numel() > 0


def current(impl: str = "auto", who: str = "implementation") -> str:
    """Return `impl`, or for "auto" the name given to the enclosing `implementation` block, if there is one.

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
    """Make "auto" mean `impl` inside the block, for all ops. The benchmarks compare implementations this way.

    Applies to the whole process. A backward pass uses the implementation of its forward pass.
    """
    global _auto
    before = _auto
    # "auto" restores the ordinary choice inside another block; other names are checked.
    _auto = impl if impl == "auto" else current(impl)
    try:
        yield
    finally:
        _auto = before


def once(
    who: str, remedy: str = 'Use implementation("ref") for a second one.'
) -> Callable[[Callable], Callable]:
    """Return a decorator for the backward of an autograd.Function that has no second derivative.

    A backward with create_graph=True then raises an error, which ends with `remedy`. torch's
    once_differentiable silently omits that derivative if the cotangent is a constant.
    """

    def decorate(backward: Callable) -> Callable:
        @functools.wraps(backward)
        def checked(ctx, *grads):
            # Gradients are enabled inside a backward only with create_graph=True.
            if torch.is_grad_enabled():
                raise RuntimeError(f"{who}: expected one derivative, got create_graph=True. {remedy}")
            return backward(ctx, *grads)

        return checked

    return decorate


def choose(
    who: str, impl: str, op: str, device_type: str, applies: bool = True, dropped: bool = False
) -> str:
    """Return the implementation that a call uses: "compiled", "torch" or "ref".

    Args:
        who: name of the public function, for errors.
        impl: implementation that the caller asked for.
        op: name of the compiled library.
        device_type: "cpu", "cuda", ...
        applies: whether the compiled op covers these tensors (dtype, sizes, required gradients).
        dropped: whether the compiled op is slower than plain torch here, so that "auto" does not choose it.
    Raises: ValueError for an unknown `impl`, and for "compiled" if that does not apply or cannot be built.
    """
    impl = current(impl, who)
    if impl in ("torch", "ref"):
        return impl
    # Before `available`, which may start a compilation.
    if impl == "auto" and (dropped or not applies):
        return "torch"
    if applies and build.available(op, device_type):  # compiles the op on its first use
        return "compiled"
    if impl == "auto":
        return "torch"
    if not applies:
        raise ValueError(
            f'{who}: impl="compiled" does not cover these tensors (dtype, sizes, gradients). Use impl="auto".'
        )
    raise ValueError(
        f'{who}: impl="compiled" needs a compiled op, and there is none for {device_type}. '
        'Run "python -m torch_utils.build" to see why, or use impl="auto".'
    )


def is_channels_last(x: torch.Tensor) -> bool:
    """Return whether x [N, C, H, W] is stored channels-last and is not contiguous as well."""
    return x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def dense(x: torch.Tensor) -> torch.Tensor:
    """Return x itself if it is contiguous or channels-last, else a contiguous copy. Differentiable in x."""
    return x if is_channels_last(x) else x.contiguous()


def like_layout(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return x in the memory layout of `other`, which has the same shape.

    Copies only if the layouts differ. Differentiable in x.
    """
    return x.contiguous(
        memory_format=torch.channels_last if is_channels_last(other) else torch.contiguous_format
    )


def convolution_layout(device: torch.device, resolution: int, channels: int) -> torch.memory_format:
    """Return the memory layout in which convolutions, and the ops between them, are fastest.

    On a CPU this is channels-last from 64 pixels on, or from 32 pixels on with up to 64 channels, whose
    weights are small. There, oneDNN's transposed convolutions are twice as fast, and the compiled ones need
    no copies. For smaller images the weights are larger than the pixels, and reordering them would cost more.
    The reference implementation is always contiguous.

    Args:
        resolution: pixels per edge.
        channels: number of channels.
    """
    # The reference keeps torch's default, as EG3D does.
    fast = device.type == "cpu" and current() != "ref" and resolution >= (32 if channels <= 64 else 64)
    return torch.channels_last if fast else torch.contiguous_format


def add_to(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return x + y, in the memory of x if no gradient is required. x must be the caller's own tensor.

    Fresh memory pages cost more than the sum.
    """
    return x + y if current() == "ref" or x.requires_grad or y.requires_grad else x.add_(y)
