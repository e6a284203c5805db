"""The loss of a margin against closed forms in float64, and the reward's losses, which are its special case to the last bit."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from eg3d_rlhf.preferences.losses import AGGREGATIONS, KINDS, aggregate, margin_loss, preference_loss

OPTIONS = {"sigmoid": {"label_smoothing": 0.1, "margin": 0.3}, "robust": {"label_smoothing": 0.2}, "hinge": {"margin": -0.2}, "ipo": {}}


def deltas(n: int = 64, scale: float = 3.0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return scale * torch.randn(n, generator=torch.Generator().manual_seed(1), dtype=dtype)


def log_sigmoid(z: np.ndarray) -> np.ndarray:
    return -np.logaddexp(0, -z)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reward_losses_are_softplus_to_the_last_bit(dtype):
    g = torch.Generator().manual_seed(2)
    scale = torch.logspace(-6, 3, 4000, dtype=dtype)
    values = [scale * torch.randn(4000, generator=g, dtype=dtype) for _ in range(2)]
    got, expected = [], []
    for results, function in ((got, margin_loss), (expected, lambda better, worse: F.softplus(worse - better))):
        better, worse = (v.clone().requires_grad_() for v in values)
        terms = function(better, worse)
        terms.mean().backward()
        results += [terms.detach(), better.grad, worse.grad]
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("beta", [0.7, 250.0])
def test_closed_forms(beta):
    d = deltas().numpy()
    z = beta * d
    expected = {
        "sigmoid": -(0.9 * log_sigmoid(z - 0.3) + 0.1 * log_sigmoid(0.3 - z)),
        "robust": (-0.8 * log_sigmoid(z) + 0.2 * log_sigmoid(-z)) / 0.6,
        "hinge": np.maximum(0, 1 - (z + 0.2)),
        "ipo": (d - 1 / (2 * beta)) ** 2,
    }
    for kind in KINDS:
        got = preference_loss(torch.from_numpy(d), kind, beta, **OPTIONS[kind])
        assert got.shape == d.shape
        np.testing.assert_allclose(got.numpy(), expected[kind], rtol=1e-8, atol=1e-8, err_msg=kind)  # softplus is linear above 20


def test_equal_margins_cost_log_two():
    torch.testing.assert_close(preference_loss(torch.zeros(4), beta=2000.0), torch.full((4,), math.log(2)))


@given(st.floats(-8, 8), st.floats(0.1, 2))
@settings(max_examples=30, deadline=None)
def test_swapping_a_pair_negates_its_logit(value, beta):
    d = torch.tensor([value], dtype=torch.float64)
    torch.testing.assert_close(preference_loss(d, beta=beta) - preference_loss(-d, beta=beta), -beta * d)


def test_robust_is_unbiased_under_the_flips_that_it_assumes():
    d, e = deltas(), 0.3
    clean = preference_loss(d, beta=0.8)
    loss = [preference_loss(sign * d, "robust", 0.8, label_smoothing=e) for sign in (1, -1)]
    torch.testing.assert_close((1 - e) * loss[0] + e * loss[1], clean)
    torch.testing.assert_close(preference_loss(d, "robust", 0.8), clean)


def test_ipo_rests_at_its_margin_and_hinge_beyond_one():
    d = torch.tensor([0.25], dtype=torch.float64, requires_grad=True)
    preference_loss(d, "ipo", 2.0).sum().backward()
    assert d.grad.item() == 0
    assert preference_loss(torch.tensor([0.5, 0.6, 0.4]), "hinge", 2.0).tolist() == pytest.approx([0, 0, 0.2])


@pytest.mark.parametrize("kind", KINDS)
def test_weight_inside_rescales_the_margin_and_outside_the_loss(kind):
    d, w = deltas(scale=1.0), torch.linspace(0.2, 3, 64, dtype=torch.float64)
    options = OPTIONS[kind]
    inside = preference_loss(d, kind, 1.5, weight=w, **options)
    outside = preference_loss(d, kind, 1.5, weight=w, weight_mode="outside", **options)
    torch.testing.assert_close(inside, preference_loss(w * d, kind, 1.5, **options))
    torch.testing.assert_close(outside, w * preference_loss(d, kind, 1.5, **options))
    assert not torch.allclose(inside, outside)
    for mode in ("inside", "outside"):
        ones = preference_loss(d, kind, 1.5, weight=torch.ones_like(w), weight_mode=mode, **options)
        assert torch.equal(ones, preference_loss(d, kind, 1.5, **options))


def test_gradients_of_the_two_places_of_a_weight():
    w, beta = torch.linspace(0.2, 3, 64, dtype=torch.float64), 1.5
    for mode, inner in (("inside", w), ("outside", torch.ones_like(w))):
        d = deltas(scale=1.0).requires_grad_()
        preference_loss(d, beta=beta, weight=w, weight_mode=mode).sum().backward()
        torch.testing.assert_close(d.grad, -w * beta * torch.sigmoid(-inner * beta * d.detach()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["inside", "outside"])
def test_gradients_are_the_derivatives(kind, mode):
    d = deltas(8, 0.4).requires_grad_()
    w = torch.linspace(0.5, 2, 8, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda d, w: preference_loss(d, kind, 1.3, weight=w, weight_mode=mode, **OPTIONS[kind]), (d, w))
    assert torch.autograd.gradcheck(lambda d: aggregate(preference_loss(d, kind, 1.3), "drdpo", 0.4), (d,))


def test_drdpo_is_a_soft_minimum_between_the_smallest_and_the_mean():
    losses = deltas(32, 1.0).abs().requires_grad_()
    for beta in (0.1, 1.0, 10.0):
        expected = -beta * np.log(np.mean(np.exp(-losses.detach().numpy() / beta)))
        value = aggregate(losses, "drdpo", beta)
        assert value.item() == pytest.approx(expected)
        (gradient,) = torch.autograd.grad(value, losses)
        torch.testing.assert_close(gradient, torch.softmax(-losses.detach() / beta, 0))  # hard pairs count less
        assert losses.min() <= value <= losses.mean()
    assert aggregate(losses, "drdpo", 1e6).item() == pytest.approx(losses.mean().item(), rel=1e-5)
    assert torch.equal(aggregate(losses), losses.mean())


def test_huge_margins_stay_finite():
    d = torch.tensor([-1e6, 1e6], requires_grad=True)
    loss = preference_loss(d, beta=2000.0)
    loss.sum().backward()
    assert loss.tolist() == [2e9, 0] and d.grad.tolist() == [-2000, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "dpo"}, "expected kind one of sigmoid, hinge, ipo, robust, got 'dpo'"),
        ({"weight_mode": "both"}, "expected weight_mode one of inside, outside, got 'both'"),
        ({"beta": 0.0}, "expected beta > 0, got 0.0"),
        ({"beta": math.inf}, "expected beta > 0, got inf"),
        ({"label_smoothing": 0.5}, "expected label_smoothing from 0 to below 0.5, got 0.5"),
        ({"kind": "hinge", "label_smoothing": 0.1}, "expected label_smoothing 0 with hinge, got 0.1"),
        ({"kind": "ipo", "margin": 1.0}, "expected margin 0 with ipo, got 1.0"),
        ({"margin": math.nan}, "expected a finite margin, got nan"),
        ({"weight": torch.ones(3)}, r"expected a weight per pair, \[2\], got \[3\]"),
    ],
)
def test_errors_name_the_values(arguments, message):
    with pytest.raises(ValueError, match=f"preference_loss: {message}"):
        preference_loss(torch.zeros(2), **arguments)


def test_aggregation_errors_name_the_values():
    with pytest.raises(ValueError, match=f"aggregate: expected one of {', '.join(AGGREGATIONS)} and beta > 0, got 'sum' and 1.0"):
        aggregate(torch.zeros(2), "sum")
    with pytest.raises(ValueError, match="beta > 0, got 'drdpo' and 0"):
        aggregate(torch.zeros(2), "drdpo", 0)
