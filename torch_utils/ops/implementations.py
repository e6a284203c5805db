"""Choose the implementation of a custom op, and the memory layouts and dtypes of compiled image ops.

Functions of custom ops have an argument `impl`, which is one of these names:

ref       the definition of the op, written as simply as torch allows. The tests compare the other
          implementations with it. EG3D computes the same operations on a CPU, so it is also the baseline of
          the benchmarks
torch     a faster computation in plain torch, which works on every device
compiled  C++ on a CPU, CUDA on a GPU; it is built at its first use (torch_utils/build.py)
auto      compiled, if it is available and supports the given tensors; otherwise torch
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
_auto = "auto"  # implementation that replaces "auto" in the enclosing `implementation` block
# A fragment, because several modules define ops in this namespace.
_LIB = torch.library.Library("eg3d_rlhf", "FRAGMENT")


def define(
    schema: str, fake: Callable | None = None, gradients: Callable | None = None, save: Callable | None = None
) -> None:
    """Register a compiled op with torch as torch.ops.eg3d_rlhf.<name>. The op's library contains the kernels.

    Args:
        schema: signature "name(Tensor x, ...) -> ..." in torch's schema language.
        fake: function of the op's arguments that returns empty results of the right shapes, for
            torch.compile; None: torch.compile does not support the op.
        gradients: backward pass gradients(ctx, *grads), see torch.library.register_autograd; None: the op is
            not differentiable.
        save: function save(ctx, inputs, output) that stores what `gradients` needs; called in the forward
            pass.
    """
    _LIB.define(schema)
    name = "eg3d_rlhf::" + schema.partition("(")[0]
    if fake is not None:
        torch.library.register_fake(name, fake, lib=_LIB)
    if gradients is not None:
        torch.library.register_autograd(name, gradients, setup_context=save, lib=_LIB)


def alike(first_tensor: torch.Tensor, *other_tensors: torch.Tensor) -> bool:
    """Return True if tensors have the dtypes and the device that most compiled ops require.

    All tensors must have the same dtype, float32 or float64, and the same device. The first tensor must not
    be empty. (torch computes the ops on empty tensors.)
    """
    have_same_type = all(
        t.dtype == first_tensor.dtype and t.device == first_tensor.device for t in other_tensors
    )
    return have_same_type and first_tensor.dtype in FLOATS and first_tensor.numel() > 0


def current(impl: str = "auto", who: str = "implementation") -> str:
    """Return the implementation that `impl` stands for.

    In an `implementation` block, "auto" stands for the name that was given to the block. Otherwise `impl` is
    returned unchanged.

    Args:
        impl: name of an implementation.
        who: name of the caller, with which the error message begins.

    Raises: ValueError for an `impl` that is not in `IMPLS`.
    """
    if impl not in IMPLS:
        raise ValueError(
            f"{who}: impl must be one of {', '.join(IMPLS)}, got {impl!r}. Use 'auto' unless you compare"
            " implementations."
        )
    return _auto if impl == "auto" else impl


@contextlib.contextmanager
def implementation(impl: str) -> Iterator[None]:
    """Use the implementation `impl` for all ops that are called with "auto" inside a `with` block.

    The benchmarks compare implementations in this way. The setting applies to all threads of the process. A
    backward pass uses the implementation of its forward pass.
    """
    global _auto
    previous_auto = _auto
    # "auto" restores the normal choice inside of another block, so `current` must not resolve it.
    _auto = impl if impl == "auto" else current(impl)
    try:
        yield
    finally:
        _auto = previous_auto


def once(
    who: str, remedy: str = 'Use implementation("ref") for a second derivative.'
) -> Callable[[Callable], Callable]:
    """Return a decorator for the `backward` of an autograd.Function that has no second derivative.

    With it, a backward pass with create_graph=True raises RuntimeError. (torch's once_differentiable silently
    returns no second derivative if the incoming gradient is a constant.)

    Args:
        who: name of the op, with which the error message begins.
        remedy: sentence with which the error message ends.
    """

    def decorate(backward: Callable) -> Callable:
        @functools.wraps(backward)
        def checked(ctx, *grads):
            # Gradients are enabled inside a backward only with create_graph=True.
            if torch.is_grad_enabled():
                raise RuntimeError(
                    f"{who}: this op has no second derivative, so create_graph=True is not supported."
                    f" {remedy}"
                )
            return backward(ctx, *grads)

        return checked

    return decorate


def choose(
    who: str, impl: str, op: str, device_type: str, is_supported: bool = True, is_slower: bool = False
) -> str:
    """Return the implementation that a call uses: "compiled", "torch" or "ref".

    Args:
        who: name of the public function, for errors.
        impl: implementation that the caller requested.
        op: name of the compiled library.
        device_type: kind of device, such as "cpu" or "cuda".
        is_supported: True if the compiled op supports these tensors (dtype, sizes, required gradients).
        is_slower: True if the compiled op is slower than plain torch for these tensors, so that "auto" does
            not choose it.

    Raises: ValueError for an unknown `impl`, and for "compiled" if it does not support these tensors or
        cannot be built.
    """
    impl = current(impl, who)
    if impl in ("torch", "ref"):
        return impl
    # This comes before `available`, which may start a compilation.
    if impl == "auto" and (is_slower or not is_supported):
        return "torch"
    if is_supported and build.available(op, device_type):  # compiles the op on its first use
        return "compiled"
    if impl == "auto":
        return "torch"
    if not is_supported:
        raise ValueError(
            f'{who}: impl="compiled" does not support these tensors (dtype, sizes, gradients).'
            ' Use impl="auto".'
        )
    raise ValueError(
        f'{who}: impl="compiled" cannot be used, because no compiled op is available for {device_type}.'
        " Compiled ops may be turned off (EG3D_RLHF_OPS), the compilation may have failed (run"
        ' "python -m torch_utils.build" to see why), or the check of the op on the GPU may have failed, which'
        ' printed a warning. Use impl="auto" to compute with plain torch.'
    )


def is_channels_last(x: torch.Tensor) -> bool:
    """Return True if x [N, C, H, W] is stored channels-last.

    A tensor that is contiguous, too (for example with one channel), counts as contiguous.
    """
    return x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def dense(x: torch.Tensor) -> torch.Tensor:
    """Return x if it is contiguous or channels-last, and a contiguous copy otherwise. Differentiable in x."""
    return x if is_channels_last(x) else x.contiguous()


def like_layout(x: torch.Tensor, template: torch.Tensor) -> torch.Tensor:
    """Return x in the memory layout of another tensor of the same shape. Differentiable in x.

    x is copied only if the layouts differ.
    """
    use_channels_last = is_channels_last(template)
    return x.contiguous(memory_format=torch.channels_last if use_channels_last else torch.contiguous_format)


def convolution_layout(device: torch.device, resolution: int, channels: int) -> torch.memory_format:
    """Return the memory layout in which convolutions, and the ops between them, are fastest.

    On a CPU this is channels-last for images of at least 64 pixels per side, or of at least 32 pixels with at
    most 64 channels. In this layout oneDNN's transposed convolutions are twice as fast, and the compiled
    convolutions need no copies. For smaller images, reordering the weights would cost more time than is
    saved.

    Args:
        device: device of the images.
        resolution: pixels per side.
        channels: number of channels.
    """
    # The reference implementation uses torch's default layout, as EG3D does.
    use_channels_last = (
        device.type == "cpu" and current() != "ref" and resolution >= (32 if channels <= 64 else 64)
    )
    return torch.channels_last if use_channels_last else torch.contiguous_format


def add_to(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return x + y. If no gradient is required, the sum is written into the memory of x.

    The caller must not use x afterwards. Allocating new memory would take more time than the sum.
    """
    return x + y if current() == "ref" or x.requires_grad or y.requires_grad else x.add_(y)
