"""Products, feed-forward and attention of a transformer on a CPU, against float64."""

import pytest
import torch
import torch.nn.functional as F

from tests.rejections import raising
from torch_utils.ops import linear as linear_module
from torch_utils.ops import transformer
from torch_utils.ops.implementations import implementation
from torch_utils.ops.linear import fits, linear
from torch_utils.ops.transformer import feed_forward, self_attention, tiled


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_gradients(call, *inputs, trained=None):
    """Result, and gradients of the inputs under a fixed cotangent."""
    leaves = [
        x.detach().clone().requires_grad_(trained is None or i in trained) for i, x in enumerate(inputs)
    ]
    y = call(*leaves)
    cotangent = noise(*y.shape, seed=9).to(y.dtype)
    return y.detach(), torch.autograd.grad(y, [x for x in leaves if x.requires_grad], cotangent)


def assert_alike(call, oracle, *inputs, trained=None):
    y, gradients = with_gradients(call, *inputs, trained=trained)
    want, wanted = with_gradients(oracle, *(x.double() for x in inputs), trained=trained)
    torch.testing.assert_close(y.double(), want, rtol=0, atol=1e-5 * float(want.abs().max()))
    for got, expected in zip(gradients, wanted, strict=True):  # one token's queries and keys have none
        torch.testing.assert_close(
            got.double(), expected, rtol=0, atol=max(1e-5 * float(expected.abs().max()), 1e-7)
        )


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch):
    """The ways of large tensors, for small ones, in parts that do not divide them."""
    for name, value in (("LARGE", 2), ("LARGE_HIDDEN", 0), ("PART", 5 * 24), ("TILE", 17 * 37)):
        monkeypatch.setattr(transformer, name, value)
    monkeypatch.setattr(linear_module, "LARGE", 0)


@pytest.mark.parametrize("shape", [(7, 6), (2, 7, 6), (3, 1, 2, 6)])
@pytest.mark.parametrize("trained", [(0,), (1, 2), (0, 1, 2)])
def test_linear(shape, trained):
    assert_alike(linear, F.linear, noise(*shape), noise(4, 6, seed=1), noise(4, seed=2), trained=trained)


def test_linear_of_strided_tensors_and_without_bias():
    assert_alike(
        lambda x, w: linear(x.t(), w.t()),
        lambda x, w: F.linear(x.t(), w.t()),
        noise(6, 7),
        noise(6, 4, seed=1),
    )


@pytest.mark.parametrize("trained", [(0,), (0, 1, 2, 3, 4), (1, 4)])
def test_feed_forward(trained):
    def oracle(x, *p):
        return F.linear(F.gelu(F.linear(x, *p[:2]), approximate="tanh"), *p[2:])

    inputs = noise(2, 9, 6), noise(24, 6, seed=1), noise(24, seed=2), noise(6, 24, seed=3), noise(6, seed=4)
    assert_alike(feed_forward, oracle, *inputs, trained=trained)


def test_a_skipped_feed_forward_has_its_gradients():
    inputs = noise(9, 6), noise(24, 6, seed=1), noise(24, seed=2), noise(6, 24, seed=3), noise(6, seed=4)
    _, want = with_gradients(feed_forward, *inputs)
    _, got = with_gradients(lambda *x: feed_forward(*x, skip=True), *inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def attention(qkv, q_gain=None, k_gain=None):
    """The formula."""
    q, k, v = qkv.unbind(2)
    q, k = (x if g is None else x / x.norm(dim=-1, keepdim=True) * g for x, g in ((q, q_gain), (k, k_gain)))
    return torch.einsum(
        "nhij,njhd->nihd", (torch.einsum("nihd,njhd->nhij", q, k) * q.shape[-1] ** -0.5).softmax(-1), v
    )


@pytest.mark.parametrize("tokens", [1, 37])
@pytest.mark.parametrize("gains", [0, 2])
def test_self_attention(tokens, gains):
    inputs = noise(2, tokens, 3, 2, 8), *(noise(2, 8, seed=1 + i) for i in range(gains))
    assert_alike(self_attention, attention, *inputs)
    assert_alike(self_attention, attention, *inputs, trained=(0,))


def test_a_known_result_is_returned_and_its_gradients_are_those_of_the_formula():
    inputs = noise(1, 37, 3, 2, 8), noise(2, 8, seed=1), noise(2, 8, seed=2)
    _, want = with_gradients(self_attention, *inputs)
    known = torch.full((1, 37, 2, 8), 7.0)
    y, got = with_gradients(lambda *x: self_attention(*x, known), *inputs)
    if tiled(inputs[0]):
        assert torch.equal(y, known)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.skipif(
    not fits(noise(2, 2)), reason="products are torch's own where the processor has no AVX-512"
)
def test_a_second_derivative_is_an_error_where_there_is_none():
    feed = noise(9, 6), noise(24, 6, seed=1), noise(24, seed=2), noise(6, 24, seed=3), noise(6, seed=4)
    for call, inputs in ((feed_forward, feed), (self_attention, (noise(1, 37, 3, 2, 8),))):
        leaves = [x.requires_grad_() for x in inputs]
        with raising(call.__name__, "create_graph=True", kind=RuntimeError):
            torch.autograd.grad(call(*leaves).sum(), leaves, create_graph=True)


def test_the_reference_is_torchs_own():
    x = noise(5, 6)
    weight = noise(4, 6, seed=1)
    qkv = noise(1, 37, 3, 2, 8)
    with implementation("ref"):
        assert torch.equal(linear(x, weight), F.linear(x, weight))
        assert not tiled(qkv)
        torch.testing.assert_close(self_attention(qkv), attention(qkv))
