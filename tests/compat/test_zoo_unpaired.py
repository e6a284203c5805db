"""The Cauchy-Schwarz divergence against the reference values and their gradients, for every case in the fixtures."""

import re

import numpy as np
import pytest
import torch

from eg3d_rlhf.preferences.losses import cs_divergence, median_distance
from tests.compat.reference import ROOT

MISC = ROOT / "reward_zoo" / "misc.npz"
CASES = sorted(name[:-2] for name in np.load(MISC) if re.fullmatch(r"cs\d+_x", name)) if MISC.is_file() else []
pytestmark = pytest.mark.skipif(not CASES, reason=f"no reference values at {MISC}; set EG3D_RLHF_FIXTURES to their folder")


@pytest.fixture(params=CASES)
def case(request):
    with np.load(MISC) as reference:
        return {name.removeprefix(f"{request.param}_"): reference[name] for name in reference if name.startswith(f"{request.param}_")}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_values_and_gradients(case, dtype, tolerance):
    x, y = (torch.as_tensor(case[name], dtype=dtype).requires_grad_(True) for name in "xy")
    divergence = cs_divergence(x, y, float(case["sigma"]))
    divergence.backward()
    scale = max(abs(float(case["v"])), 1.0)
    assert abs(float(divergence.detach()) - case["v"]) <= tolerance * scale
    np.testing.assert_allclose(x.grad, case["dv_dx"], rtol=0, atol=tolerance)
    np.testing.assert_allclose(y.grad, case["dv_dy"], rtol=0, atol=tolerance)
    assert abs(float(cs_divergence(x, y, float(case["sigma"]), "U").detach()) - case["u"]) <= tolerance * scale


def test_embeddings_of_length_one(case):
    x, y = (torch.nn.functional.normalize(torch.as_tensor(case[name])) for name in "xy")
    assert float(median_distance(torch.cat([x, y]))) == pytest.approx(float(case["median_distance_normalised"]), abs=1e-12)
    assert float(cs_divergence(x, y, float(case["sigma"]))) == pytest.approx(float(case["v_normalised"]), abs=1e-10)
