"""Which implementation of a custom op a call gets.

    ref       the definition, written as plainly as torch allows: the oracle of the tests and the slow side of the benchmarks
    torch     plain torch, arranged to be fast; works everywhere
    compiled  C++ on a CPU, CUDA on a GPU; built on first use (torch_utils/build.py)
    auto      compiled where it can be had and applies to the tensors at hand, else torch
"""

import contextlib
from collections.abc import Iterator

from torch_utils import build

IMPLS = ("auto", "compiled", "torch", "ref")
_auto = "auto"


def check_impl(who: str, impl: str) -> None:
    """Refuse an unknown `impl`.

    Raises: ValueError for a name that is not in `IMPLS`.
    """
    if impl not in IMPLS:
        known = ", ".join(IMPLS)
        raise ValueError(f'{who}: expected impl to be one of {known}, got {impl!r}. Use "auto" unless you compare implementations.')


@contextlib.contextmanager
def implementation(impl: str) -> Iterator[None]:
    """Make `impl` what "auto" means inside the block, for all ops: how the benchmarks run one path against another.

    Holds for the whole process. A backward pass uses what its forward used.
    """
    global _auto
    check_impl("implementation", impl)
    before, _auto = _auto, impl
    try:
        yield
    finally:
        _auto = before


def current() -> str:
    """What "auto" means here: "auto", or the name given to the enclosing `implementation` block."""
    return _auto


def choose(who: str, impl: str, op: str, device_type: str, applies: bool = True, dropped: bool = False) -> str:
    """The implementation that a call uses: "compiled", "torch" or "ref".

    Args:
        who: name of the public function, for errors; impl: what the caller asked for.
        op: name of the compiled library; device_type: "cpu", "cuda", ...
        applies: whether the compiled op covers these tensors (dtype, sizes, gradients asked for).
        dropped: the compiled op loses against plain torch here, so "auto" does not take it.
    Raises: ValueError for an unknown `impl`, and for "compiled" where that does not apply or cannot be built.
    """
    check_impl(who, impl)
    if impl == "auto":
        impl = current()
    if impl in ("torch", "ref"):
        return impl
    if impl == "auto" and (dropped or not applies):
        return "torch"
    if applies and build.available(op, device_type):
        return "compiled"
    if impl == "auto":
        return "torch"
    if not applies:
        raise ValueError(f'{who}: expected tensors that the compiled op takes for impl="compiled". Use impl="auto".')
    raise ValueError(
        f'{who}: expected a compiled op for impl="compiled", got none for {device_type}. '
        'Run "python -m torch_utils.build" to see why, or use impl="auto".'
    )
