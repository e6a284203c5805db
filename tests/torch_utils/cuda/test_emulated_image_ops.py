"""bias_act's and upfirdn2d's CUDA kernels, run on the CPU, against their definitions in float64."""

import pytest
import torch

from tests.torch_utils.cuda.emulation import assert_close, emulate, needs_compiler
from torch_utils.ops.bias_act import activation_funcs
from torch_utils.ops.bias_act import bias_act as bias_act_reference
from torch_utils.ops.upfirdn2d import upfirdn2d as upfirdn2d_reference

pytestmark = needs_compiler
TYPES = {torch.float32: (0, 2e-6), torch.float64: (1, 1e-13), torch.bfloat16: (2, 5e-3)}


def emulate_any(op, folder, arguments, shapes, dtype, order=0):
    """`emulate`, with bfloat16 as its bits."""
    bits = [
        a.view(torch.int16) if isinstance(a, torch.Tensor) and a.dtype == torch.bfloat16 else a
        for a in arguments
    ]
    results = emulate(op, folder, bits, shapes, torch.int16 if dtype == torch.bfloat16 else dtype, order)
    return [r.view(dtype) for r in results]


@pytest.mark.parametrize("act", list(activation_funcs))
@pytest.mark.parametrize("dtype", list(TYPES), ids=str)
def test_bias_act(tmp_path, dtype, act):
    """A count that no vector divides, and a clamp that cuts."""
    torch.manual_seed(0)
    code, tolerance = TYPES[dtype]
    x = (3 * torch.randn(3, 7, 9, 5)).to(dtype)
    b = torch.randn(7).to(dtype)
    v = torch.randn(3, 7, 9, 5).to(dtype)
    alpha = 0.3
    gain = 1.7
    clamp = 2.5
    arguments = [code, x.numel(), 45, 7, list(activation_funcs).index(act), alpha, gain, clamp, x, b, v]
    piecewise = act in ("linear", "relu", "lrelu")
    out, *scaled = emulate_any("bias_act", tmp_path, arguments, [x.shape] * (1 + piecewise), dtype)
    wanted = bias_act_reference(
        x.double(), b.double(), act=act, alpha=alpha, gain=gain, clamp=clamp, impl="ref"
    )
    assert_close(out, wanted, tolerance)
    if piecewise:
        below = {"linear": 1.0, "relu": 0.0, "lrelu": alpha}[act]
        slope = gain * torch.where(out > 0, torch.ones_like(v.double()), below) * (out.abs() < clamp)
        assert (out.abs() >= clamp).any()
        assert_close(scaled[0], slope * (v.double() + b.double()[:, None, None]), tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size,dim", [((4, 1100), 1), ((33, 6, 100), 1), ((5, 3), 0), ((1, 1), 0)])
def test_bias_act_over_the_whole_grid(tmp_path, size, dim, dtype):
    torch.manual_seed(1)
    code, tolerance = TYPES[dtype]
    x = torch.randn(size).to(dtype)
    b = torch.randn(size[dim]).to(dtype)
    inner = x.stride(dim)
    for bias in (b, None):
        arguments = [code, x.numel(), inner, size[dim], 2, 0.2, 2.0, -1.0, x, bias, torch.ones_like(x)]
        wanted = bias_act_reference(
            x.double(), bias if bias is None else bias.double(), dim=dim, act="lrelu", gain=2.0, impl="ref"
        )
        assert_close(emulate_any("bias_act", tmp_path, arguments, [size, size], dtype)[0], wanted, tolerance)


CASES = [  # up, down, padding, taps (width, height), flip
    ((1, 1), (1, 1), (1, 2, 1, 2), (4, 4), False),
    ((2, 2), (1, 1), (2, 1, 2, 1), (4, 4), False),
    ((1, 1), (2, 2), (1, 1, 1, 1), (4, 4), True),
    ((2, 1), (1, 1), (6, 5, 0, 0), (12, 1), False),
    ((1, 3), (1, 2), (0, 0, -2, 5), (1, 7), False),
    ((3, 2), (2, 3), (4, -3, 1, 6), (5, 2), True),
    ((4, 4), (1, 1), (0, 3, 0, 3), (1, 1), False),
]


@pytest.mark.parametrize("planar", [True, False], ids=["planar", "channels_last"])
@pytest.mark.parametrize("dtype", list(TYPES), ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_upfirdn2d(tmp_path, case, dtype, planar):
    up, down, padding, taps, flip = case
    torch.manual_seed(3)
    code, tolerance = TYPES[dtype]
    n = 2
    c = 3
    h = 21
    w = 38
    x = torch.randn(n, c, h, w).to(dtype)
    f = torch.randn(taps[1], taps[0])
    f = f.to(dtype)
    wanted = upfirdn2d_reference(
        x.double(), f.double(), up=up, down=down, padding=padding, flip_filter=flip, gain=1.5, impl="ref"
    )
    out_h, out_w = wanted.shape[2:]
    memory, images, channels = (x, n * c, 0) if planar else (x.permute(0, 2, 3, 1), n, c)
    shape = (n, c, out_h, out_w) if planar else (n, out_h, out_w, c)
    sizes = [w, h, out_w, out_h, *up, *down, padding[0], padding[2], *taps]
    arguments = [code, images, channels, *sizes, int(flip), 1.5, memory, f]
    (out,) = emulate_any("upfirdn2d", tmp_path, arguments, [shape], dtype)
    assert_close(out if planar else out.permute(0, 3, 1, 2), wanted, tolerance)


def test_upfirdn2d_does_not_depend_on_the_order_of_threads(tmp_path):
    x = torch.randn(5, 40, 35)
    f = torch.randn(4, 4)
    arguments = [0, 5, 0, 35, 40, 35, 40, 1, 1, 1, 1, 2, 2, 4, 4, 0, 1.0, x, f]
    single, other = (
        emulate_any("upfirdn2d", tmp_path, arguments, [x.shape], torch.float32, order) for order in (0, 1)
    )
    assert torch.equal(single[0], other[0])
