"""Properties of the ops that the reference values do not cover."""

import pytest
import torch
import torch.nn.functional as F

from tests.rejections import raising
from tests.torch_utils.compilers import noise
from torch_utils.ops import bias_act, upfirdn2d
from torch_utils.ops.grid_sample_gradfix import grid_sample


def upfirdn2d_loops(x, f, up, down, pads, flip_filter):
    """The definition, pixel by pixel: x [H, W], f [KH, KW]."""
    x0, x1, y0, y1 = pads
    u = torch.zeros(x.shape[0] * up[1], x.shape[1] * up[0], dtype=x.dtype)
    u[:: up[1], :: up[0]] = x
    u = F.pad(u, pads)
    f = f if flip_filter else f.flip([0, 1])
    rows = u.shape[0] - f.shape[0] + 1
    columns = u.shape[1] - f.shape[1] + 1
    y = torch.stack(
        [
            torch.stack([(u[i : i + f.shape[0], j : j + f.shape[1]] * f).sum() for j in range(columns)])
            for i in range(rows)
        ]
    )
    return y[:: down[1], :: down[0]]


@pytest.mark.parametrize("pads", [(0, 0, 0, 0), (2, 1, 0, 3), (-1, 2, -2, -1), (7, 6, 5, 9)])
@pytest.mark.parametrize(
    "up,down", [((1, 1), (1, 1)), ((2, 3), (1, 1)), ((1, 1), (3, 2)), ((3, 2), (2, 3)), ((1, 2), (1, 2))]
)
@pytest.mark.parametrize("flip_filter", [False, True])
def test_upfirdn2d_is_its_definition(pads, up, down, flip_filter):
    x = noise(1, 2, 7, 8)
    f = noise(3, 4, seed=1)
    y = upfirdn2d.upfirdn2d(x, f, up=up, down=down, padding=pads, flip_filter=flip_filter, gain=1.5)
    for channel in range(2):
        expected = 1.5 * upfirdn2d_loops(x[0, channel], f, up, down, pads, flip_filter)
        torch.testing.assert_close(y[0, channel], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("act", sorted(bias_act.activation_funcs))
@pytest.mark.parametrize("gain", [None, 0.0, -2.0])
def test_bias_act_never_writes_to_its_input_and_takes_any_gain(act, gain):
    x = noise(2, 3, 4)
    b = noise(3, seed=1)
    before = x.clone()
    spec = bias_act.activation_funcs[act]
    for bias in (None, b):
        y = bias_act.bias_act(x, bias, act=act, gain=gain, clamp=0.7)
        shifted = x if bias is None else x + b[None, :, None]
        expected = spec.func(shifted, spec.def_alpha) * (spec.def_gain if gain is None else gain)
        torch.testing.assert_close(y, expected.clamp(-0.7, 0.7), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(x, before, rtol=0, atol=0)


def test_grid_sample_matches_torch_and_has_second_derivatives():
    x = noise(2, 3, 5, 6).requires_grad_()
    grid = (noise(2, 4, 3, 2, seed=1) * 0.7).requires_grad_()
    reference = F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    torch.testing.assert_close(grid_sample(x, grid), reference, rtol=0, atol=0)
    v = noise(*reference.shape, seed=2)
    for actual, expected in zip(
        torch.autograd.grad(grid_sample(x, grid), [x, grid], v),
        torch.autograd.grad(reference, [x, grid], v),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    fixed = grid.detach()
    assert torch.autograd.gradgradcheck(lambda x: grid_sample(x, fixed).square(), [x])


def test_mistakes_are_explained():
    x = torch.zeros(1, 2, 4, 4)
    with raising("bias_act", "impl", "auto", "compiled", "ref", "'fast'"):
        bias_act.bias_act(x, impl="fast")
    with raising("upfirdn2d", "at least 4", "2", "[1, 2, 4, 4]"):
        upfirdn2d.upfirdn2d(x, upfirdn2d.setup_filter([1, 3, 3, 1]), padding=-1)
