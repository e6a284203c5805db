"""The Cauchy-Schwarz divergence against the published codes' values and gradients, for every case of both
sets.
"""

import functools
import math
import re

import numpy as np
import pytest
import torch

from eg3d_rlhf.preferences.losses import cs_divergence, median_distance
from tests.compat.absent import some
from tests.compat.distill_reference import members, under
from tests.compat.reference import ROOT, array_names, of_set

NAMES = {"divergence": "v", "d_dx": "dv_dx", "d_dy": "dv_dy"}  # of the first set -> of the second
ZOO = [
    (path.name, name.removesuffix("_x"))
    for path in sorted((ROOT / "reward_zoo").glob("misc*.npz"))
    for name in array_names(path)
    if re.fullmatch(r"cs\d+_x", name)
]
CASES = [("distill", name) for name in members("cs_divergence", "cs")] + ZOO


@functools.cache
def values_of(kind: str, name: str) -> dict[str, np.ndarray]:
    if kind == "distill":
        values = {key: value.numpy() for key, value in under("cs_divergence", f"cs/{name}").items()}
        return values | {theirs: values[ours] for ours, theirs in NAMES.items() if ours in values}
    with np.load(ROOT / "reward_zoo" / kind) as reference:
        return {
            key.removeprefix(f"{name}_"): reference[key] for key in reference if key.startswith(f"{name}_")
        }


def having(*keys: str):
    """Parametrize a test over the cases that have these values."""
    found = [case for case in CASES if set(keys) <= set(values_of(*case))]
    params = [pytest.param(values_of(*case), id="-".join(case)) for case in found]
    return pytest.mark.parametrize("case", some(params, f"this set has no divergence with {', '.join(keys)}"))


@having("x", "y", "sigma", "v", "dv_dx", "dv_dy")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_values_and_gradients(case, dtype, tolerance):
    x, y = (torch.as_tensor(case[name], dtype=dtype).requires_grad_(True) for name in "xy")
    divergence = cs_divergence(x, y, float(case["sigma"]))
    divergence.backward()
    scale = max(abs(float(case["v"])), 1.0)
    assert abs(float(divergence.detach()) - case["v"]) <= tolerance * scale
    for got, name in ((x.grad, "dv_dx"), (y.grad, "dv_dy")):
        np.testing.assert_allclose(got, case[name], rtol=0, atol=tolerance)
    if "u" in case:
        assert (
            abs(float(cs_divergence(x, y, float(case["sigma"]), "U").detach()) - case["u"])
            <= tolerance * scale
        )


@having("x", "y", "sigma", "kernel_xy")
def test_its_kernel_is_the_published_one(case):
    """A single pair of points has D = -2 log k(a, b)."""
    (kernel,) = of_set(case, "kernel_xy")
    x, y = (torch.as_tensor(case[name]) for name in "xy")
    for i, j in ((0, 0), (len(x) - 1, len(y) - 1)):
        divergence = cs_divergence(x[i : i + 1], y[j : j + 1], float(case["sigma"]))
        assert math.exp(-float(divergence) / 2) == pytest.approx(float(kernel[i, j]), rel=1e-9, abs=1e-300)


@having("x", "y", "median_squared_distance")
def test_median_distance_is_the_root_of_the_published_median_square(case):
    """The median of squares of an even number lies between two of them; that of distances a little elsewhere
    between the same two.
    """
    (wanted,) = of_set(case, "median_squared_distance")
    both = torch.cat([torch.as_tensor(case[name]) for name in "xy"])
    assert max(0.01, float(median_distance(both)) ** 2) == pytest.approx(float(wanted), rel=1e-3)


@having("x", "y", "sigma", "median_distance_normalised", "v_normalised")
def test_embeddings_of_length_one(case):
    median, divergence = of_set(case, "median_distance_normalised", "v_normalised")
    x, y = (torch.nn.functional.normalize(torch.as_tensor(case[name])) for name in "xy")
    assert float(median_distance(torch.cat([x, y]))) == pytest.approx(float(median), abs=1e-12)
    assert float(cs_divergence(x, y, float(case["sigma"]))) == pytest.approx(float(divergence), abs=1e-10)
