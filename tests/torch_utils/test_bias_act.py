"""The finishing op: its implementations against each other, first and second derivatives, layouts."""

import pytest
import torch

from tests.rejections import raising
from tests.torch_utils.compilers import needs_cpp, noise
from torch_utils.ops.bias_act import activation_funcs, bias_act

FAST = ["torch", pytest.param("compiled", marks=needs_cpp)]


def derivatives(x, b, impl, **kwargs):
    """Result, gradients, and gradients of a product of the gradients with fixed directions: what R1 takes."""
    leaves = [t.detach().requires_grad_() for t in (x, b)]
    y = bias_act(*leaves, impl=impl, **kwargs)
    dy = noise(*y.shape, seed=7, dtype=y.dtype).requires_grad_()
    first = torch.autograd.grad(y, leaves, dy, create_graph=True)
    along = sum((g * noise(*g.shape, seed=8 + i, dtype=g.dtype)).sum() for i, g in enumerate(first))
    second = torch.autograd.grad(along, [dy, *leaves], allow_unused=True)
    return [
        y.detach(),
        *(g.detach() for g in first),
        *(s if s is not None else torch.zeros_like(dy) for s in second[:1]),
    ]


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("act", sorted(activation_funcs))
@pytest.mark.parametrize(
    "shape,dim",
    [
        ((2, 5, 7, 9), 1),
        ((3, 33), 1),
        ((2, 3, 4, 19), 3),
        ((2, 1, 5, 5), 1),
        ((70, 3), 0),
        ((1, 20, 70, 70), 1),
    ],
)
def test_fast_paths_agree_with_the_definition_to_second_order(shape, dim, act, impl):
    x = noise(*shape) * 2
    b = noise(shape[dim], seed=1)
    kwargs = {"dim": dim, "act": act, "clamp": 1.5}
    expected = derivatives(x, b, "ref", **kwargs)
    actual = derivatives(x.float(), b.float(), impl, **kwargs)
    for value, wanted, error in zip(actual, expected, (1e-5, 1e-4, 1e-4, 1e-4), strict=True):
        torch.testing.assert_close(
            value.double(), wanted, rtol=0, atol=error * max(1.0, float(wanted.abs().max()))
        )


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("act", sorted(activation_funcs))
def test_derivatives_are_those_of_finite_differences(act, impl):
    inputs = [noise(2, 3, 5).requires_grad_(), noise(3, seed=1).requires_grad_()]
    for clamp, gain in ((None, None), (0.9, 0.7)):

        def call(x, b, clamp=clamp, gain=gain):
            return bias_act(x, b, act=act, clamp=clamp, gain=gain, impl=impl)

        assert torch.autograd.gradcheck(call, inputs)
        assert torch.autograd.gradgradcheck(call, inputs)


@needs_cpp
@pytest.mark.parametrize("channels", [1, 6, 16, 37])
def test_channels_last_images_stay_so_and_hold_the_same_numbers(channels):
    x = noise(2, channels, 6, 7, dtype=torch.float32)
    b = noise(channels, seed=1, dtype=torch.float32)
    last = x.to(memory_format=torch.channels_last)
    contiguous, permuted = (derivatives(t, b, "compiled", act="lrelu", clamp=1.0) for t in (x, last))
    assert bias_act(last, b, act="lrelu", impl="compiled").is_contiguous(memory_format=torch.channels_last)
    for a, c in zip(contiguous, permuted, strict=True):
        torch.testing.assert_close(c, a, rtol=0, atol=1e-5)


@needs_cpp
def test_strided_images_are_fine_and_never_written_to():
    x = noise(6, 5, 4, 3, dtype=torch.float32).permute(3, 2, 1, 0)[:, :, ::2]
    b = noise(4, seed=1, dtype=torch.float32)
    before = x.clone()
    torch.testing.assert_close(
        bias_act(x, b, act="lrelu", impl="compiled"), bias_act(x, b, act="lrelu", impl="ref")
    )
    assert torch.equal(x, before)


@needs_cpp
@pytest.mark.parametrize("act", sorted(activation_funcs))
def test_a_nan_stays_where_it_is(act):
    x = noise(1, 2, 3, 20, dtype=torch.float32)
    x[0, 1, 2, 17] = float("nan")
    actual = bias_act(x, act=act, clamp=2.0, gain=1.1, impl="compiled").isnan()
    assert actual[0, 1, 2, 17] and actual.sum() == 1


@needs_cpp
def test_torch_sees_proper_operators():
    x = noise(2, 3, 4, 5).requires_grad_()
    b = noise(3, seed=1).requires_grad_()
    out = bias_act(x, b, act="lrelu", clamp=1.0).detach()
    ops = torch.ops.eg3d_rlhf
    for act in (0, 2, 8):
        torch.library.opcheck(ops.bias_act.default, (x, b, 1, act, 0.2, 1.4, 1.0))
    torch.library.opcheck(ops.bias_act_backward.default, (x, out, 1, 2, 0.2, 1.4, 1.0, True))
    torch.library.opcheck(ops.bias_act_slope.default, (x, b, out, 1, 2, 0.2, 1.4, 1.0))
    compiled_sum = torch.compile(
        lambda x, b: bias_act(x, b, act="lrelu", clamp=1.0), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled_sum(x, b), bias_act(x, b, act="lrelu", clamp=1.0, impl="ref"))


def test_what_the_compiled_op_does_not_cover_goes_through_torch():
    x = noise(2, 3, 4)
    b = noise(3, seed=1)
    torch.testing.assert_close(
        bias_act(x, b, act="lrelu", gain=-1.0), bias_act(x, b, act="lrelu", gain=-1.0, impl="ref")
    )
    with raising("bias_act", 'impl="compiled"'):
        bias_act(x, b, act="lrelu", gain=-1.0, impl="compiled")
