"""Winograd's convolution against torch's, to second order, and what is built on it."""

import itertools

import pytest
import torch

from tests.torch_utils.compilers import needs_cpp, noise
from torch_utils import build
from torch_utils.ops.conv2d_resample import conv2d_resample, modulated_conv2d
from torch_utils.ops.conv3x3 import conv3x3
from torch_utils.ops.upfirdn2d import setup_filter


def derivatives(call, inputs):
    """Result, first derivatives, and derivatives of a product of these with fixed directions."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = call(*leaves)
    dy = noise(*y.shape, seed=7, dtype=y.dtype).requires_grad_()
    first = torch.autograd.grad(y, leaves, dy, create_graph=True)
    along = sum((g * noise(*g.shape, seed=8 + i, dtype=g.dtype)).sum() for i, g in enumerate(first))
    return [y.detach()], [
        g.detach() for g in (*first, *torch.autograd.grad(along, [dy, *leaves], materialize_grads=True))
    ]


def assert_alike(actual, expected, outputs=1e-5, gradients=1e-4):
    for values, wanted, error in zip(actual, expected, (outputs, gradients), strict=True):
        for value, want in zip(values, wanted, strict=True):
            torch.testing.assert_close(
                value.double(), want, rtol=0, atol=error * max(float(want.abs().max()), 1e-6)
            )


def winograd(tile, padding=1):
    assert build.available("conv3x3", "cpu")

    def call(x, w):
        return torch.ops.eg3d_rlhf.conv3x3(
            x.contiguous(memory_format=torch.channels_last), w.contiguous(), padding, False, tile
        )

    return call


@needs_cpp
@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("size", [(3, 3), (7, 6), (4, 19), (9, 12)])  # every remainder of a tile
@pytest.mark.parametrize("channels", [(16, 32), (48, 16)])
def test_agrees_with_the_definition_to_second_order(channels, size, padding, tile):
    x = noise(2, channels[0], *size)
    w = noise(channels[1], channels[0], 3, 3, seed=1)
    expected = derivatives(lambda x, w: conv3x3(x, w, padding, impl="ref"), [x, w])
    for dtype, errors in ((torch.float64, (1e-12, 1e-12)), (torch.float32, (1e-5, 1e-4))):
        assert_alike(derivatives(winograd(tile, padding), [x.to(dtype), w.to(dtype)]), expected, *errors)


@needs_cpp
# measured: 4e-7 and 9e-7, 2e-6 and 2e-6
@pytest.mark.parametrize("tile,output,gradient", [(2, 1e-6, 2e-6), (4, 5e-6, 5e-6)])
def test_rounding_in_float32_stays_far_below_what_is_asked(tile, output, gradient):
    x = noise(4, 64, 32, 32)
    w = noise(64, 64, 3, 3, seed=1)
    actual = derivatives(winograd(tile), [x.float(), w.float()])
    assert_alike(actual, derivatives(lambda x, w: conv3x3(x, w, impl="ref"), [x, w]), output, gradient)


@needs_cpp
@pytest.mark.parametrize("tile,dtype", [(2, torch.float64), (4, torch.float32)])
def test_many_channels_are_taken_in_ranges(tile, dtype):
    x = noise(1, 512, 5, 6, dtype=dtype)
    w = noise(496, 512, 3, 3, seed=1, dtype=dtype)
    expected = derivatives(lambda x, w: conv3x3(x, w, impl="ref"), [x.double(), w.double()])
    assert_alike(derivatives(winograd(tile), [x, w]), expected)


@needs_cpp
@pytest.mark.parametrize("tile", [2, 4])
def test_several_chunks_of_tiles_and_several_threads_give_the_same_bits_every_time(tile):
    x = noise(1, 64, 61, 70, dtype=torch.float32)
    w = noise(64, 64, 3, 3, seed=1, dtype=torch.float32)
    runs = [derivatives(winograd(tile), [x, w]) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(sum(runs[0], []), sum(runs[1], []), strict=True))
    assert_alike(runs[0], derivatives(lambda x, w: conv3x3(x, w, impl="ref"), [x.double(), w.double()]))


@needs_cpp
@pytest.mark.parametrize("tile", [2, 4])
def test_a_nan_reaches_its_neighbourhood_and_no_other_tile(tile):
    x = noise(1, 16, 12, 12, dtype=torch.float32)
    w = noise(16, 16, 3, 3, seed=1, dtype=torch.float32)
    x[0, 3, 5, 5] = float("nan")
    actual = winograd(tile)(x, w).isnan()
    assert actual[:, :, 4:7, 4:7].all() and not actual[:, :, :4].any() and not actual[:, :, 8:].any()


@needs_cpp
@pytest.mark.parametrize("tile", [2, 4])
def test_torch_sees_proper_operators(tile):
    assert build.available("conv3x3", "cpu")
    x = noise(1, 16, 4, 5).to(memory_format=torch.channels_last).requires_grad_()
    w = noise(32, 16, 3, 3, seed=1).requires_grad_()
    grad = noise(1, 32, 4, 5, seed=2).to(memory_format=torch.channels_last).requires_grad_()
    torch.library.opcheck(torch.ops.eg3d_rlhf.conv3x3.default, (x, w, 1, False, tile))
    torch.library.opcheck(torch.ops.eg3d_rlhf.conv3x3.default, (grad.detach(), w, 1, True, tile))
    torch.library.opcheck(torch.ops.eg3d_rlhf.conv3x3_weight.default, (x, grad, 1, tile))
    compiled = torch.compile(lambda x, w: conv3x3(x, w, impl="compiled"), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, w), conv3x3(x, w, impl="ref"))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("channels", [6, 32])
@pytest.mark.parametrize(
    "kernel,up,down", [(3, 1, 1), (3, 2, 1), (3, 1, 2), (1, 1, 1), (1, 2, 1), (1, 1, 2), (3, 2, 2)]
)
def test_resampling_convolutions_agree_with_the_definition(kernel, up, down, channels, memory_format):
    x = noise(2, channels, 33, 34, dtype=torch.float32)
    w = noise(48, channels, kernel, kernel, seed=1, dtype=torch.float32)
    f = setup_filter([1, 3, 3, 1])

    def call(impl):
        return lambda x, w: conv2d_resample(
            x, w, f.to(x.dtype), up=up, down=down, padding=kernel // 2, flip_weight=up == 1, impl=impl
        )

    actual = derivatives(call("auto"), [x.to(memory_format=memory_format), w])
    assert_alike(actual, derivatives(call("ref"), [x.double(), w.double()]))


@pytest.mark.parametrize(
    "batch,demodulate,fused,up", list(itertools.product((1, 3), (True, False), (True, False), (1, 2)))
)
def test_modulation_agrees_with_the_definition(batch, demodulate, fused, up):
    x = noise(batch, 32, 9, 10)
    w = noise(16, 32, 3, 3, seed=1)
    styles = noise(batch, 32, seed=2)
    noises = noise(9 * up, 10 * up, seed=3)
    f = setup_filter([1, 3, 3, 1])
    kwargs = {
        "demodulate": demodulate,
        "fused_modconv": fused,
        "padding": 1,
        "up": up,
        "flip_weight": up == 1,
    }

    def call(impl):
        return lambda *t: modulated_conv2d(*t, resample_filter=f.to(t[0].dtype), impl=impl, **kwargs)

    expected = derivatives(call("ref"), [x, w, styles, noises])
    assert_alike(derivatives(call("auto"), [x.float(), w.float(), styles.float(), noises.float()]), expected)
    assert_alike(derivatives(call("torch"), [x, w, styles, noises]), expected, 1e-11, 1e-11)
