"""The resampling op: its implementations against each other, derivatives of any order, layouts."""

import itertools

import pytest
import torch

from tests.torch_utils.compilers import needs_cpp, noise
from torch_utils import build
from torch_utils.ops.upfirdn2d import setup_filter, upfirdn2d

FAST = ["torch", pytest.param("compiled", marks=needs_cpp)]
FACTORS = [(up, down) for up, down in itertools.product([(1, 1), (2, 2), (3, 2)], [(1, 1), (2, 2), (1, 3)])]


def taps(kind):
    full = noise(3, 4, seed=1)
    long = noise(12, seed=2)
    single = noise(1, 1, seed=3)
    return {"binomial": setup_filter([1, 3, 3, 1]).double(), "full": full, "long": long, "single": single}[
        kind
    ]


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("kind", ["binomial", "full", "long", "single"])
@pytest.mark.parametrize("up,down", FACTORS)
def test_fast_paths_agree_with_the_definition(up, down, kind, impl):
    x = noise(2, 3, 13, 18)
    f = taps(kind)
    for pads, flip in itertools.product(
        [(0, 0, 0, 0), (2, 1, 3, 0), (-1, 2, 4, -2), (9, 14, 13, 8)], (False, True)
    ):
        kwargs = {"up": up, "down": down, "padding": pads, "flip_filter": flip, "gain": 1.7}
        wanted = upfirdn2d(x, f, impl="ref", **kwargs)
        for dtype, error in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
            actual = upfirdn2d(x.to(dtype), f.to(dtype), impl=impl, **kwargs)
            torch.testing.assert_close(
                actual.double(), wanted, rtol=0, atol=error * float(wanted.abs().max())
            )


@needs_cpp
@pytest.mark.parametrize("channels", [1, 6, 40])
@pytest.mark.parametrize("kind", ["binomial", "full"])
def test_channels_last_images_stay_so_and_hold_the_same_numbers(kind, channels):
    # wide enough for two tiles
    x = noise(2, channels, 9, 130, dtype=torch.float32)
    f = taps(kind).float()
    last = x.to(memory_format=torch.channels_last)
    for up, down in FACTORS:
        contiguous, permuted = (
            upfirdn2d(t, f, up=up, down=down, padding=(2, 1, 3, 2), impl="compiled") for t in (x, last)
        )
        assert permuted.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(permuted, contiguous, rtol=0, atol=1e-5)


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("up,down", FACTORS)
def test_derivatives_are_those_of_finite_differences(up, down, impl):
    x = noise(1, 2, 5, 6).requires_grad_()
    f = taps("full")
    for pads in ((2, 1, 2, 3), (-1, 4, 3, -1)):

        def call(x, pads=pads):
            return upfirdn2d(x, f, up=up, down=down, padding=pads, impl=impl)

        assert torch.autograd.gradcheck(call, [x])
        assert torch.autograd.gradgradcheck(call, [x])


@needs_cpp
def test_strided_images_are_fine_and_bits_are_the_same_every_time():
    x = noise(40, 30, 4, 3, dtype=torch.float32).permute(3, 2, 1, 0)[:, ::2]
    f = taps("binomial").float()
    first, second = (upfirdn2d(x, f, up=2, impl="compiled") for _ in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, upfirdn2d(x, f, up=2, impl="ref"), rtol=0, atol=1e-5)


@needs_cpp
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_torch_sees_a_proper_operator(memory_format):
    assert build.available("upfirdn2d", "cpu")
    x = noise(2, 3, 6, 7).to(memory_format=memory_format).requires_grad_()
    f = taps("binomial")
    torch.library.opcheck(
        torch.ops.eg3d_rlhf.upfirdn2d.default, (x, f, [2, 1], [1, 3], [2, 1, -1, 3], False, 1.5)
    )
    compiled = torch.compile(
        lambda x: upfirdn2d(x, f, up=2, padding=(2, 1, 2, 1)), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(x), upfirdn2d(x, f, up=2, padding=(2, 1, 2, 1), impl="ref"))
