"""The compiled parts of a volume block against plain torch."""

import pytest
import torch
import torch.nn.functional as F

from tests.torch_utils.compilers import needs_cpp
from torch_utils.ops.volume_block import volume_conv, volume_gate, volume_profile, volume_up

IMPLS = ["torch", pytest.param("compiled", marks=needs_cpp)]


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check(found, sums, truth):
    torch.testing.assert_close(found.double(), truth, atol=2e-5, rtol=1e-5)
    flat = truth.flatten(2)
    torch.testing.assert_close(sums, torch.stack([flat.sum(dim=2), flat.square().sum(dim=2)], dim=2), atol=1e-2, rtol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "size", [(1, 8, 8, 5, 9, 33), (2, 16, 8, 9, 14, 64), (1, 8, 16, 6, 11, 16), (2, 8, 8, 1, 3, 5), (1, 5, 8, 4, 4, 17)]
)
def test_conv(impl, size):
    n, c, o, *shape = size
    x, w, scale, shift = randn(n, c, *shape), randn(o, c, 3, 3, 3, seed=1) / 10, randn(n, c, seed=2), randn(n, c, seed=3)
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
    n, c, o, shape = 3, 2, 8, (4, 6, 19)
    x, w, scale, shift = randn(n, 1, *shape), randn(n, o, c, 3, 3, 3, seed=1), randn(n, c, seed=2), randn(n, c, seed=3)
    mix = randn(o, 2, seed=5)
    inner = x * scale[..., None, None, None] + shift[..., None, None, None]
    truth = torch.cat([F.conv3d(a[None].double(), k.double(), padding=1) for a, k in zip(inner, w, strict=True)])
    truth += x.double() * mix[:, 0, None, None, None] + mix[:, 1, None, None, None]
    check(*volume_conv(x, scale, shift, w, residual=x, mix=mix, impl=impl), truth)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(8, 8, 8), (9, 17, 16), (33, 20, 35)])
def test_up(impl, shape):
    skip, x, w = randn(2, 8, *shape), randn(2, 16, *(n // 2 for n in shape), seed=1), randn(16, 8, 3, 3, 3, seed=2) / 10
    fine = F.conv_transpose3d(x.double(), w.double(), stride=2, padding=1)
    truth = skip.double() + F.interpolate(fine, size=shape, mode="nearest")
    check(*volume_up(skip, x, w, impl=impl), truth)
    memory = skip.clone()
    check(*volume_up(memory, x, w, out=memory, impl=impl), truth)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(4, 6, 8), (5, 7, 9), (2, 3, 37)])
def test_gate_and_profile(impl, shape):
    h, channel, w, b = randn(2, 8, *shape).relu(), torch.sigmoid(randn(2, 8, seed=1)), randn(8, seed=2), randn(1, seed=3)
    spatial = torch.sigmoid(torch.einsum("ncdhw,c->ndhw", h, w) + b)[:, None]
    truth = torch.maximum(h * channel[..., None, None, None], h * spatial)
    y, small = volume_gate(h, channel, w, b, pool=True, impl=impl)
    torch.testing.assert_close(y, truth, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(small, F.max_pool3d(truth, 2), atol=2e-6, rtol=2e-6)
    memory = h.clone()
    assert volume_gate(memory, channel, w, b, out=memory, impl=impl)[1] is None
    torch.testing.assert_close(memory, truth, atol=2e-6, rtol=2e-6)
    final_w, final_b = randn(3, 8, seed=4), randn(3, seed=5)
    response = F.conv3d(truth, final_w[..., None, None, None], final_b)
    profile = volume_profile(h, channel, w, b, final_w, final_b, impl=impl)
    torch.testing.assert_close(profile, response.amax(dim=(1, 3, 4)), atol=1e-5, rtol=1e-5)


@needs_cpp
def test_gradients_are_refused_by_the_compiled_op():
    x = randn(1, 8, 4, 4, 4).requires_grad_()
    one = torch.ones(1, 8)
    with pytest.raises(ValueError, match="compiled"):
        volume_conv(x, one, one, randn(8, 8, 3, 3, 3), impl="compiled")
    volume_conv(x, one, one, randn(8, 8, 3, 3, 3))[0].sum().backward()  # "auto" takes plain torch
    assert x.grad is not None


@pytest.mark.parametrize(("x", "w"), [((1, 8, 4, 4), (8, 8, 3, 3, 3)), ((1, 8, 4, 4, 4), (8, 4, 3, 3, 3))])
def test_wrong_shapes_are_named(x, w):
    with pytest.raises(ValueError, match="volume_conv"):
        volume_conv(randn(*x), torch.ones(1, 8), torch.ones(1, 8), randn(*w))
    with pytest.raises(ValueError, match="contiguous"):
        volume_up(randn(1, 8, 4, 4, 4), randn(1, 8, 2, 2, 2), randn(8, 8, 3, 3, 3), out=torch.empty(3), impl="auto")
