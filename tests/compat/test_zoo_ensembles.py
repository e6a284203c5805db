"""Aggregates of ensembles against the reference values and their gradients, for every aggregate in the fixtures."""

import re

import numpy as np
import pytest
import torch

from eg3d_rlhf.rewards.ensembles import Aggregate
from tests.compat.reference import ROOT

MISC = ROOT / "reward_zoo" / "misc.npz"
CASES = sorted(name.removeprefix("agg_") for name in np.load(MISC) if re.match("agg_(?!grad_)", name)) if MISC.is_file() else []


@pytest.mark.skipif(not CASES, reason=f"no reference values of aggregates at {MISC}; set EG3D_RLHF_FIXTURES to their folder")
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case):
    kind, strength = re.fullmatch(r"([a-z]+)(?:_[a-z]+([\d.]+))?", case).groups()
    with np.load(MISC) as reference:
        members = torch.as_tensor(reference["members"]).requires_grad_(True)  # [E, N] float64
        joined = Aggregate(kind, strength and float(strength))(members)
        (joined * torch.as_tensor(reference["cotangent"])).sum().backward()
        np.testing.assert_allclose(joined.detach(), reference[f"agg_{case}"], rtol=0, atol=1e-12)
        np.testing.assert_allclose(members.grad, reference[f"agg_grad_{case}"], rtol=0, atol=1e-12)
