"""The compiled parts of a volume block against plain torch."""

import pytest
import torch
import torch.nn.functional as F

from tests.torch_utils.compilers import needs_cpp
from torch_utils.ops.volume_block import (
    adjoint_kernel,
    differentiable,
    transformed_kernel,
    transposed_kernel,
    volume_conv,
    volume_conv_gradient,
    volume_conv_weight,
    volume_gate,
    volume_gate_gradient,
    volume_join,
    volume_profile,
    volume_up,
    volume_up_gradient,
)


@pytest.fixture(autouse=True, scope="module")
def loaded():
    """The gradients' library, where there is a compiler."""
    differentiable()


IMPLS = ["torch", pytest.param("compiled", marks=needs_cpp)]


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check(actual, sums, truth):
    torch.testing.assert_close(actual.double(), truth, atol=2e-5, rtol=1e-5)
    flat = truth.flatten(2)
    torch.testing.assert_close(
        sums, torch.stack([flat.sum(dim=2), flat.square().sum(dim=2)], dim=2), atol=1e-2, rtol=1e-5
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "size",
    [
        (1, 8, 8, 5, 9, 33),
        (2, 16, 8, 9, 14, 64),
        (1, 8, 16, 6, 11, 16),
        (2, 8, 8, 1, 3, 5),
        (1, 5, 8, 4, 4, 17),
    ],
)
def test_conv(impl, size):
    n, c, o, *shape = size
    x = randn(n, c, *shape)
    w = randn(o, c, 3, 3, 3, seed=1) / 10
    scale = randn(n, c, seed=2)
    shift = randn(n, c, seed=3)
    residual = randn(n, o, *shape, seed=4)
    inner = x.double() * scale.double()[..., None, None, None] + shift.double()[..., None, None, None]
    truth = F.relu(F.conv3d(inner, w.double(), padding=1) + residual.double())
    check(*volume_conv(x, scale, shift, w, residual=residual, relu=True, impl=impl), truth)
    memory = residual.clone()  # the residual's own memory
    y, sums = volume_conv(x, scale, shift, w, residual=memory, relu=True, out=memory, impl=impl)
    assert y.data_ptr() == memory.data_ptr()
    check(y, sums, truth)


@pytest.mark.parametrize("impl", IMPLS)
def test_conv_of_one_channel_with_kernels_for_each_sample(impl):
    n = 3
    c = 2
    o = 8
    shape = (4, 6, 19)
    x = randn(n, 1, *shape)
    w = randn(n, o, c, 3, 3, 3, seed=1)
    scale = randn(n, c, seed=2)
    shift = randn(n, c, seed=3)
    mix = randn(o, 2, seed=5)
    inner = x * scale[..., None, None, None] + shift[..., None, None, None]
    truth = torch.cat(
        [F.conv3d(a[None].double(), k.double(), padding=1) for a, k in zip(inner, w, strict=True)]
    )
    truth += x.double() * mix[:, 0, None, None, None] + mix[:, 1, None, None, None]
    check(*volume_conv(x, scale, shift, w, residual=x, mix=mix, impl=impl), truth)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(8, 8, 8), (9, 17, 16), (33, 20, 35)])
def test_up(impl, shape):
    skip = randn(2, 8, *shape)
    x = randn(2, 16, *(n // 2 for n in shape), seed=1)
    w = randn(16, 8, 3, 3, 3, seed=2) / 10
    fine = F.conv_transpose3d(x.double(), w.double(), stride=2, padding=1)
    truth = skip.double() + F.interpolate(fine, size=shape, mode="nearest")
    check(*volume_up(skip, x, w, impl=impl), truth)
    memory = skip.clone()
    check(*volume_up(memory, x, w, out=memory, impl=impl), truth)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(4, 6, 8), (5, 7, 9), (2, 3, 37)])
def test_gate_and_profile(impl, shape):
    h = randn(2, 8, *shape).relu()
    channel = torch.sigmoid(randn(2, 8, seed=1))
    w = randn(8, seed=2)
    b = randn(1, seed=3)
    spatial = torch.sigmoid(torch.einsum("ncdhw,c->ndhw", h, w) + b)[:, None]
    truth = torch.maximum(h * channel[..., None, None, None], h * spatial)
    y, small = volume_gate(h, channel, w, b, pool=True, impl=impl)
    torch.testing.assert_close(y, truth, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(small, F.max_pool3d(truth, 2), atol=2e-6, rtol=2e-6)
    memory = h.clone()
    assert volume_gate(memory, channel, w, b, out=memory, impl=impl)[1] is None
    torch.testing.assert_close(memory, truth, atol=2e-6, rtol=2e-6)
    final_w = randn(3, 8, seed=4)
    final_b = randn(3, seed=5)
    response = F.conv3d(truth, final_w[..., None, None, None], final_b)
    profile, places = volume_profile(h, channel, w, b, final_w, final_b, impl=impl)
    torch.testing.assert_close(profile, response.amax(dim=(1, 3, 4)), atol=1e-5, rtol=1e-5)
    at_places = response.amax(dim=1).flatten(2).gather(2, places[..., None])[..., 0]
    torch.testing.assert_close(at_places, profile, atol=1e-5, rtol=1e-5)


def spread(values):
    return values[..., None, None, None]


@needs_cpp
@pytest.mark.parametrize(
    "size", [(1, 8, 8, 5, 9, 33), (2, 16, 8, 9, 14, 64), (1, 8, 16, 6, 11, 16), (2, 8, 8, 1, 3, 5)]
)
@pytest.mark.parametrize("mixed", [False, True])
def test_gradient_of_conv(size, mixed):
    n, c, o, *shape = size
    w = randn(o, c, 3, 3, 3, seed=1) / 10
    g = randn(n, o, *shape, seed=2)
    h = randn(n, o, *shape, seed=3)
    factors = randn(n, o, 3, seed=4)
    other = randn(n, 1 if mixed else c, *shape, seed=5)
    mix = randn(c, 2, seed=6) if mixed else None
    arrived = torch.where(
        h > 0, spread(factors[..., 0]) * g + spread(factors[..., 1]) * h + spread(factors[..., 2]), 0
    ).double()
    x = torch.zeros(n, c, *shape, dtype=torch.float64, requires_grad=True)
    (truth,) = torch.autograd.grad(F.conv3d(x, w.double(), padding=1), x, arrived)
    y, sums = volume_conv_gradient(g, h, factors, transformed_kernel(adjoint_kernel(w)), other, mix)
    torch.testing.assert_close(y.double(), truth, atol=2e-5, rtol=1e-5)
    with_ = other.double() if mix is None else other.double() * spread(mix[:, 0]) + spread(mix[:, 1])
    expected = torch.stack([t.sum(dim=(2, 3, 4)) for t in (truth, truth * with_)], dim=2)
    torch.testing.assert_close(sums, expected, atol=1e-2, rtol=1e-5)


@needs_cpp
@pytest.mark.parametrize(
    "size",
    [
        (1, 8, 8, 5, 9, 33),
        (2, 16, 8, 9, 14, 64),
        (3, 8, 16, 6, 35, 130),
        (1, 5, 24, 1, 1, 1),
        (1, 8, 264, 2, 2, 2),
    ],
)
@pytest.mark.parametrize("mixed", [False, True])
def test_gradient_of_kernels(size, mixed):
    n, c, o, *shape = size
    g = randn(n, o, *shape, seed=2)
    h = randn(n, o, *shape, seed=3)
    factors = randn(n, o, 3, seed=4)
    x = randn(n, 1 if mixed else c, *shape)
    scale = randn(n, c, seed=5)
    shift = randn(n, c, seed=6)
    arrived = torch.where(
        h > 0, spread(factors[..., 0]) * g + spread(factors[..., 1]) * h + spread(factors[..., 2]), 0
    ).double()
    w = torch.zeros(o, c, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    inner = x.double() * spread(scale.double()) + spread(shift.double())
    (truth,) = torch.autograd.grad(F.conv3d(inner, w, padding=1), w, arrived)
    actual = volume_conv_weight(g, h, factors, x, scale, shift)
    assert (actual - truth).abs().max() <= 1e-6 * truth.abs().max() + 1e-6
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(volume_conv_weight(g, h, factors, x, scale, shift), actual)
    finally:
        torch.set_num_threads(threads)


@needs_cpp
@pytest.mark.parametrize("shape", [(4, 6, 8), (5, 7, 9), (2, 3, 37), (1, 1, 4)])
@pytest.mark.parametrize("given", ["full", "pooled", "both"])
def test_gradient_of_gate(shape, given):
    h = (randn(2, 8, *shape).abs() + 0.01).requires_grad_()
    channel = torch.sigmoid(randn(2, 8, seed=1)).requires_grad_()
    w = randn(8, seed=2).requires_grad_()
    b = randn(1, seed=3).requires_grad_()
    y, _ = volume_gate(h, channel, w, b, impl="torch")
    full = randn(*y.shape, seed=4) if given != "pooled" else None
    small = [s // 2 for s in shape]
    pooled = randn(2, 8, *small, seed=5) if given != "full" else None
    total = torch.zeros([], dtype=torch.float64)
    if full is not None:
        total = total + (y * full).sum()
    if pooled is not None and min(small) > 0:
        total = total + (F.max_pool3d(y, 2) * pooled).sum()
    inputs = [h, channel, w, b]
    truth = (
        torch.autograd.grad(total, inputs) if total.requires_grad else [torch.zeros_like(t) for t in inputs]
    )
    actual, sums = volume_gate_gradient(*(t.detach() for t in inputs), full, pooled)
    torch.testing.assert_close(actual, truth[0], atol=1e-5, rtol=1e-5)
    to_channel, to_w, to_b = sums.float().split([8, 8, 1], dim=1)
    for value, expected in zip((to_channel, to_w.sum(dim=0), to_b.sum(dim=0)), truth[1:], strict=True):
        torch.testing.assert_close(value, expected, atol=1e-4, rtol=1e-5)


@needs_cpp
def test_a_tied_maximum_gives_its_gradient_to_the_first_voxel():
    h = torch.ones(1, 8, 2, 4, 6)
    unit_gate = torch.ones(1, 8)
    actual, _ = volume_gate_gradient(
        h, unit_gate, torch.zeros(8), torch.zeros(1), None, torch.ones(1, 8, 1, 2, 3)
    )
    expected = torch.zeros_like(h)
    expected[:, :, 0, ::2, ::2] = 1
    assert torch.equal(actual, expected)


@needs_cpp
@pytest.mark.parametrize("mixed", [False, True])
def test_join(mixed):
    g, h, inner = (randn(2, 8, 3, 5, 7, seed=s) for s in (1, 2, 3))
    r = randn(2, 1 if mixed else 8, 3, 5, 7, seed=4)
    factors = randn(2, 8, 4, seed=5)
    mix = randn(8, 2, seed=6) if mixed else None
    from_ = r if mix is None else r * spread(mix[:, 0]) + spread(mix[:, 1])
    f = [spread(factors[..., k]) for k in range(4)]
    truth = torch.where(h > 0, g + f[0], 0) + f[1] * inner + f[2] * from_ + f[3]
    truth = truth if mix is None else (truth * spread(mix[:, 0])).sum(dim=1, keepdim=True)
    torch.testing.assert_close(volume_join(g, h, inner, r, factors, mix), truth, atol=1e-5, rtol=1e-5)


@needs_cpp
@pytest.mark.parametrize("shape", [(8, 8, 8), (9, 17, 16), (33, 20, 35), (4, 5, 4)])
def test_gradient_of_up(shape):
    w = randn(16, 8, 3, 3, 3, seed=2) / 10
    grad = randn(2, 8, *shape, seed=3)
    x = torch.zeros(2, 16, *(n // 2 for n in shape), dtype=torch.float64, requires_grad=True)
    fine = F.conv_transpose3d(x, w.double(), stride=2, padding=1)
    (truth,) = torch.autograd.grad(F.interpolate(fine, size=shape, mode="nearest"), x, grad.double())
    actual = volume_up_gradient(grad, transposed_kernel(w.transpose(0, 1)), tuple(x.shape[2:]))
    torch.testing.assert_close(actual.double(), truth, atol=2e-5, rtol=1e-5)


@needs_cpp
def test_gradients_are_rejected_by_the_compiled_op():
    x = randn(1, 8, 4, 4, 4).requires_grad_()
    unit_gate = torch.ones(1, 8)
    with pytest.raises(ValueError, match="compiled"):
        volume_conv(x, unit_gate, unit_gate, randn(8, 8, 3, 3, 3), impl="compiled")
    volume_conv(x, unit_gate, unit_gate, randn(8, 8, 3, 3, 3))[0].sum().backward()  # "auto" takes plain torch
    assert x.grad is not None
