"""Preference losses of margins, the reward network's terms, and the divergence of two sets, against closed
forms.
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from eg3d_rlhf.preferences import losses
from eg3d_rlhf.preferences.losses import cs_divergence, margin_loss, median_distance, preference_loss


def deltas(n: int = 64, scale: float = 3.0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return scale * torch.randn(n, generator=torch.Generator().manual_seed(1), dtype=dtype)


def log_sigmoid(z: np.ndarray) -> np.ndarray:
    return -np.logaddexp(0, -z)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reward_losses_are_softplus_to_the_last_bit(dtype):
    g = torch.Generator().manual_seed(2)
    scale = torch.logspace(-6, 3, 4000, dtype=dtype)
    values = [scale * torch.randn(4000, generator=g, dtype=dtype) for _ in range(2)]
    got = []
    expected = []
    for results, function in (
        (got, margin_loss),
        (expected, lambda better, worse: F.softplus(worse - better)),
    ):
        better, worse = (v.clone().requires_grad_() for v in values)
        terms = function(better, worse)
        terms.mean().backward()
        results += [terms.detach(), better.grad, worse.grad]
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("beta", [0.7, 250.0])
def test_closed_form(beta):
    d = deltas()
    got = preference_loss(d, beta)
    # softplus is linear above 20
    np.testing.assert_allclose(got.numpy(), -log_sigmoid(beta * d.numpy()), rtol=1e-8, atol=1e-8)


@given(st.floats(-8, 8), st.floats(0.1, 2))
@settings(max_examples=30, deadline=None)
def test_swapping_a_pair_negates_its_logit(value, beta):
    d = torch.tensor([value], dtype=torch.float64)
    torch.testing.assert_close(preference_loss(d, beta=beta) - preference_loss(-d, beta=beta), -beta * d)


def test_a_weight_rescales_the_margin():
    d = deltas(scale=1.0).requires_grad_()
    w = torch.linspace(0.2, 3, 64, dtype=torch.float64)
    beta = 1.5
    loss = preference_loss(d, beta, w)
    torch.testing.assert_close(loss, preference_loss(w * d, beta))
    loss.sum().backward()
    torch.testing.assert_close(d.grad, -w * beta * torch.sigmoid(-w * beta * d.detach()))
    assert torch.equal(preference_loss(d, beta, torch.ones_like(w)), preference_loss(d, beta))


def test_gradients_are_the_derivatives():
    d = deltas(8, 0.4).requires_grad_()
    w = torch.linspace(0.5, 2, 8, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda d, w: preference_loss(d, 1.3, w), (d, w))


# Loss terms against closed forms, and how they react to swaps and constants.


def test_drawn_order_uses_one_of_both_per_pair_and_repeats_by_generator():
    g = torch.Generator().manual_seed(0)
    first = torch.randn(200, 2, generator=g)
    second = torch.randn(200, 2, generator=g)
    drawn = losses.pair_loss_drawn_order(first, second, torch.Generator().manual_seed(3))
    options = torch.stack([-first.log_softmax(1)[:, 0], -second.log_softmax(1)[:, 1]])
    chosen = (drawn == options).float().mean(1)
    assert ((drawn == options).any(0)).all() and 0.4 < chosen[0] < 0.6
    torch.testing.assert_close(
        drawn, losses.pair_loss_drawn_order(first, second, torch.Generator().manual_seed(3))
    )


def test_strength_norm_carries_no_gradient():
    x = torch.ones(3, requires_grad=True)
    alone = losses.PreferenceLoss(
        losses.LossWeights(pairs=0, scalar=0, bradley_terry=0, strength=1, reconstruction=0)
    )
    output = SimpleNamespace(log_strength=x)
    value = alone(output, x, x, pair_logits=None, network_input=None, epoch=0, generator=None)["strength"]
    assert not value.requires_grad
    assert float(value) == pytest.approx(math.e * math.sqrt(3))


def test_reconstruction_ignores_affine_maps_and_survives_a_constant():
    o = torch.rand(2, 1, 3, 4, 5) * 100
    torch.testing.assert_close(losses.reconstruction_loss(o * 0.3 - 7, o), torch.zeros(2), atol=1e-3, rtol=0)
    flat = losses.reconstruction_loss(torch.zeros_like(o), o)
    torch.testing.assert_close(flat, (o - o.amin((1, 2, 3, 4), keepdim=True)).mean((1, 2, 3, 4)))


# The Cauchy-Schwarz divergence: closed forms, bounds, what it is blind to, and how its bias falls with the
# number of members.


def points(count, size, seed=0, mean=0.0):
    normal = torch.randn(count, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return normal + torch.tensor([mean] + [0.0] * (size - 1), dtype=torch.float64)


def test_order_rotation_shift_and_which_set_is_which_do_not_matter():
    x = points(7, 3)
    y = points(9, 3, 1, 0.5)
    known = float(cs_divergence(x, y, 0.9))
    assert known > 0
    turn = torch.linalg.qr(points(3, 3, 2)).Q
    for a, b in ((x.flip(0), y), (x @ turn, y @ turn), (x + 3, y + 3)):
        assert float(cs_divergence(a, b, 0.9)) == pytest.approx(known, abs=1e-12)
    one_dimensional = x[:, :1], y[:, :1]
    assert torch.equal(cs_divergence(*one_dimensional, 0.9), cs_divergence(*one_dimensional[::-1], 0.9)), (
        "inverted labels"
    )


def test_embeddings_of_length_one_are_bounded():
    for seed in range(20):
        x, y = (
            torch.nn.functional.normalize(points(4 + seed % 3, 2 + seed % 5, seed + 50 * k)) for k in (0, 1)
        )
        for s in (0.2, 1.0, 3.0):
            assert -1e-12 <= float(cs_divergence(x, y, s)) <= 4 / s**2 + 1e-9
    opposite = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    assert float(cs_divergence(opposite, -opposite, 0.5)) == pytest.approx(16)


@pytest.mark.parametrize("estimator", ["V", "U"])
def test_gradients_are_those_of_differences(estimator):
    x = points(4, 3).requires_grad_(True)
    y = points(5, 3, 1).requires_grad_(True)
    s = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *inputs: cs_divergence(*inputs, estimator), (x, y, s))


def test_v_is_too_large_in_many_dimensions_and_u_is_not():
    v, u = (
        [float(cs_divergence(points(8, 16, k), points(8, 16, k + 100), 2.0, e)) for k in range(40)]
        for e in ("V", "U")
    )
    a = (2.0**2 / (2.0**2 + 2)) ** 8
    assert np.mean(v) == pytest.approx(2 * math.log((1 / 8 + (1 - 1 / 8) * a) / a), rel=0.15)
    assert abs(np.mean(u)) < 0.1 * np.mean(v)


def test_medians_are_of_different_members_and_carry_no_gradient():
    x = torch.tensor([[0.0], [1.0], [3.0]], requires_grad=True)
    median = median_distance(x)
    assert float(median) == 2 and not median.requires_grad
