"""Loss terms against closed forms, and how they react to swaps and constants."""

import math
from types import SimpleNamespace

import pytest
import torch

from eg3d_rlhf.preferences import losses


def test_terms_at_indifference_are_log_two_and_unreduced():
    zero = torch.zeros(5)
    torch.testing.assert_close(losses.margin_loss(zero, zero), torch.full((5,), math.log(2)))
    torch.testing.assert_close(losses.pair_loss_both_orders(torch.zeros(5, 2), torch.zeros(5, 2)), torch.full((5,), math.log(2)))


def test_margin_and_strength_match_their_definitions():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(9, generator=g, dtype=torch.float64), torch.randn(9, generator=g, dtype=torch.float64)
    torch.testing.assert_close(losses.margin_loss(a, b), -torch.log(torch.sigmoid(a - b)))
    torch.testing.assert_close(losses.margin_loss(a, b), -torch.log(a.exp() / (a.exp() + b.exp())))
    torch.testing.assert_close(losses.margin_loss(a, b) - losses.margin_loss(b, a), b - a)  # swapping turns p into 1 - p


def test_drawn_order_uses_one_of_both_per_pair_and_repeats_by_generator():
    g = torch.Generator().manual_seed(0)
    first, second = torch.randn(200, 2, generator=g), torch.randn(200, 2, generator=g)
    drawn = losses.pair_loss_drawn_order(first, second, torch.Generator().manual_seed(3))
    options = torch.stack([-first.log_softmax(1)[:, 0], -second.log_softmax(1)[:, 1]])
    chosen = (drawn == options).float().mean(1)
    assert ((drawn == options).any(0)).all() and 0.4 < chosen[0] < 0.6
    torch.testing.assert_close(drawn, losses.pair_loss_drawn_order(first, second, torch.Generator().manual_seed(3)))


def test_strength_norm_carries_no_gradient():
    x = torch.ones(3, requires_grad=True)
    alone = losses.PreferenceLoss(losses.LossWeights(pairs=0, scalar=0, bradley_terry=0, strength=1, reconstruction=0))
    output = SimpleNamespace(log_strength=x)
    value = alone(output, x, x, pair_logits=None, observed=None, epoch=0, generator=None)["strength"]
    assert not value.requires_grad
    assert float(value) == pytest.approx(math.e * math.sqrt(3))


def test_reconstruction_ignores_affine_maps_and_survives_a_constant():
    o = torch.rand(2, 1, 3, 4, 5) * 100
    torch.testing.assert_close(losses.reconstruction_loss(o * 0.3 - 7, o), torch.zeros(2), atol=1e-3, rtol=0)
    flat = losses.reconstruction_loss(torch.zeros_like(o), o)
    torch.testing.assert_close(flat, (o - o.amin((1, 2, 3, 4), keepdim=True)).mean((1, 2, 3, 4)))


def test_negative_weights_are_refused():
    with pytest.raises(ValueError, match="scalar must be >= 0, got -1"):
        losses.LossWeights(scalar=-1)
