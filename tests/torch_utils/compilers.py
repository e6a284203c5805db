"""Numbers and a compiler for tests of ops. Only a missing compiler skips it; an op that does not
build is a failure.
"""

import pytest
import torch

from torch_utils import build


def missing(device_type: str) -> str | None:
    """Return why nothing can be compiled for a device on this machine; None if it can."""
    if build.switched_off():
        return "EG3D_RLHF_OPS switches compiled ops off"
    try:
        build.recipe(build.ops(device_type)[0], device_type)
    except build.BuildError as error:
        return str(error)
    return None


needs_cpp = pytest.mark.skipif(missing("cpu") is not None, reason=str(missing("cpu")))
needs_nvcc = pytest.mark.skipif(missing("cuda") is not None, reason=str(missing("cuda")))


def require(device_type: str) -> None:
    """Skip without a compiler; fail where an op of the device does not build, or on a GPU does not pass its
    check.
    """
    if (reason := missing(device_type)) is not None:
        pytest.skip(reason)
    for op in build.ops(device_type):
        try:
            build.build(op, device_type)
        except build.BuildError as error:
            pytest.fail(f"{op} ({device_type}): {error}")
        if device_type == "cpu" or torch.cuda.is_available():
            assert build.available(op, device_type), (
                f"{op} ({device_type}) was built, but does not load or gives wrong results"
            )


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """N(0, 1), the same numbers in every type."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
