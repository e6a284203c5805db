"""Schedules of the projectors against the reference values."""

import numpy as np
import pytest

from eg3d_rlhf.evaluation.inversion.projector import learning_rate, noise_scale
from tests.compat.reference import ROOT

MISC = ROOT / "reward_zoo" / "misc.npz"


@pytest.mark.skipif(not MISC.is_file(), reason=f"no reference values at {MISC}; set EG3D_RLHF_FIXTURES to their folder")
@pytest.mark.parametrize(("name", "schedule"), [("projector_lr", learning_rate), ("projector_noise_over_wstd", noise_scale)])
def test_schedules(name, schedule):
    with np.load(MISC) as reference:
        wanted = reference[name]  # [500]
    np.testing.assert_allclose([schedule(step, len(wanted)) for step in range(len(wanted))], wanted, rtol=0, atol=1e-12)
