"""The Cauchy-Schwarz divergence: closed forms, bounds, what it is blind to, and how its bias falls with the number of members."""

import math

import numpy as np
import pytest
import torch

from eg3d_rlhf.preferences.divergence import cs_divergence, median_distance


def points(count, size, seed=0, mean=0.0):
    found = torch.randn(count, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return found + torch.tensor([mean] + [0.0] * (size - 1), dtype=torch.float64)


def test_two_repeated_points_have_the_closed_form_and_share_its_gradient():
    a, b, s = torch.tensor([0.3, -1.0], dtype=torch.float64), torch.tensor([1.1, 0.4], dtype=torch.float64), 0.7
    x, y = a.repeat(5, 1).requires_grad_(True), b.repeat(3, 1)
    found = cs_divergence(x, y, s)
    found.backward()
    assert float(found.detach()) == pytest.approx(float((a - b).square().sum()) / s**2, abs=1e-12)
    torch.testing.assert_close(x.grad, (2 * (a - b) / s**2 / 5).repeat(5, 1))


def test_identical_sets_have_neither_divergence_nor_gradient():
    x = points(6, 3).requires_grad_(True)
    y = x.detach().clone().requires_grad_(True)
    found = cs_divergence(x, y, 0.8)
    found.backward()
    assert abs(float(found.detach())) < 1e-12
    assert float(x.grad.abs().max()) < 1e-12 and float(y.grad.abs().max()) < 1e-12


def test_order_rotation_shift_and_which_set_is_which_do_not_matter():
    x, y = points(7, 3), points(9, 3, 1, 0.5)
    known = float(cs_divergence(x, y, 0.9))
    assert known > 0
    turn = torch.linalg.qr(points(3, 3, 2)).Q
    for a, b in ((x.flip(0), y), (x @ turn, y @ turn), (x + 3, y + 3)):
        assert float(cs_divergence(a, b, 0.9)) == pytest.approx(known, abs=1e-12)
    one_dimensional = x[:, :1], y[:, :1]
    assert torch.equal(cs_divergence(*one_dimensional, 0.9), cs_divergence(*one_dimensional[::-1], 0.9)), "labels turned over"


def test_embeddings_of_length_one_are_bounded():
    for seed in range(20):
        x, y = (torch.nn.functional.normalize(points(4 + seed % 3, 2 + seed % 5, seed + 50 * k)) for k in (0, 1))
        for s in (0.2, 1.0, 3.0):
            assert -1e-12 <= float(cs_divergence(x, y, s)) <= 4 / s**2 + 1e-9
    opposite = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    assert float(cs_divergence(opposite, -opposite, 0.5)) == pytest.approx(16)


@pytest.mark.parametrize("estimator", ["V", "U"])
def test_gradients_are_those_of_differences(estimator):
    x, y = points(4, 3).requires_grad_(True), points(5, 3, 1).requires_grad_(True)
    s = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *inputs: cs_divergence(*inputs, estimator), (x, y, s))


def test_far_sets_do_not_overflow():
    x, y = points(4, 2).float().requires_grad_(True), points(4, 2, 1, 1e3).float()
    found = cs_divergence(x, y, 0.1)
    found.backward()
    assert math.isfinite(float(found.detach())) and bool(x.grad.isfinite().all())


@pytest.mark.long
def test_gaussians_come_to_the_population_value_with_the_square_root_of_their_number():
    """|gap|^2 / (s^2 + 2 tau^2); the error of V falls as m^-1/2."""
    tau, s, gap, size, sizes = 0.5, 1.0, 1.0, 4, (32, 64, 128, 256, 512, 1024)
    truth = gap**2 / (s**2 + 2 * tau**2)
    errors = []
    for m in sizes:
        draws = [(tau * points(m, size, 100 * m + k), tau * points(m, size, 100 * m + k + 50)) for k in range(40)]
        shift = torch.tensor([gap, 0, 0, 0], dtype=torch.float64)
        errors.append(np.mean([abs(float(cs_divergence(x, y + shift, s)) - truth) for x, y in draws]))
    slope = np.polyfit(np.log(sizes), np.log(errors), 1)[0]
    assert abs(slope + 0.5) <= 0.2, errors
    assert truth == pytest.approx(0.667, abs=1e-3) and errors[-1] < 0.05


def test_v_is_too_large_in_many_dimensions_and_u_is_not():
    v, u = ([float(cs_divergence(points(8, 16, k), points(8, 16, k + 100), 2.0, e)) for k in range(40)] for e in ("V", "U"))
    a = (2.0**2 / (2.0**2 + 2)) ** 8
    assert np.mean(v) == pytest.approx(2 * math.log((1 / 8 + (1 - 1 / 8) * a) / a), rel=0.15)
    assert abs(np.mean(u)) < 0.1 * np.mean(v)


def test_medians_are_of_different_members_and_carry_no_gradient():
    x = torch.tensor([[0.0], [1.0], [3.0]], requires_grad=True)
    found = median_distance(x)
    assert float(found) == 2 and not found.requires_grad


def test_bad_arguments_are_named():
    x = points(3, 2)
    with pytest.raises(ValueError, match="estimator of V, U, got 'W'"):
        cs_divergence(x, x, 1.0, "W")
    with pytest.raises(ValueError, match=r"at least 2 members each, got \[1, 2\] and \[3, 2\]"):
        cs_divergence(x[:1], x, 1.0, "U")
    with pytest.raises(ValueError, match=r"\[3, 2\] and \[3, 1\]"):
        cs_divergence(x, x[:, :1], 1.0)
    with pytest.raises(ValueError, match="N >= 2"):
        median_distance(x[:1])
