"""The Cauchy-Schwarz divergence against the published code's values and gradients."""

import math

import pytest
import torch

from eg3d_rlhf.preferences.losses import cs_divergence, median_distance
from tests.compat.distill_reference import members, needs, under

NAME = "cs_divergence"
pytestmark = needs(NAME)


@pytest.fixture(params=members(NAME, "cs"))
def case(request):
    return under(NAME, f"cs/{request.param}")


def test_values_and_gradients(case):
    x, y = (case[name].clone().requires_grad_(True) for name in "xy")
    divergence = cs_divergence(x, y, float(case["sigma"]))
    divergence.backward()
    assert abs(float(divergence.detach() - case["divergence"])) <= 1e-10 * max(1.0, abs(float(case["divergence"])))
    assert float((x.grad - case["d_dx"]).abs().max()) <= 1e-9
    assert float((y.grad - case["d_dy"]).abs().max()) <= 1e-9


def test_its_kernel_is_the_published_one(case):
    """A single pair of points has D = -2 log k(a, b)."""
    for i, j in ((0, 0), (len(case["x"]) - 1, len(case["y"]) - 1)):
        divergence = cs_divergence(case["x"][i : i + 1], case["y"][j : j + 1], float(case["sigma"]))
        assert math.exp(-float(divergence) / 2) == pytest.approx(float(case["kernel_xy"][i, j]), rel=1e-9, abs=1e-300)


def test_median_distance_is_the_root_of_the_published_median_square(case):
    """The median of squares of an even number lies between two of them; that of distances a little elsewhere between the same two."""
    both = torch.cat([case["x"], case["y"]])
    assert max(0.01, float(median_distance(both)) ** 2) == pytest.approx(float(case["median_squared_distance"]), rel=1e-3)
