"""Errors by kind of flaw: of scans whose damage is known."""

import numpy as np
import torch

from eg3d_rlhf.measures.flaws import HARM, amounts_of_latents, errors_by_flaw, is_harmed
from tests.training.test_people_flaws import N, latents_with, scans
from training.heads.people_mesh import BASE, grid_points


def grids(z: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Scans and ground-truth heads [N, n, n, n] of latents."""
    _, distance, scan = scans(z)
    return scan.reshape(-1, N, N, N).numpy(), distance.reshape(-1, N, N, N).numpy()


def test_a_head_has_no_error_against_itself():
    z = latents_with(1, 1, 2)
    _, heads = grids(z)
    assert all((values == 0).all() for values in errors_by_flaw(heads, heads, z).values())


def test_each_flaw_is_an_error_of_its_own_region():
    above = grid_points(N)[..., 1] > BASE
    for flat, swelling in ((1, 0), (0, 1), (1, 1)):
        z = latents_with(flat, swelling, 4)
        shapes, heads = grids(z)
        errors = errors_by_flaw(shapes, heads, z)
        assert (errors["flat"] > 0.05).all() if flat else (errors["flat"] == 0).all()
        assert (errors["swelling"] > 0.01).all() if swelling else (errors["swelling"] == 0).all()
        # Inside and outside of a region together are the difference of the volumes.
        wrong = np.array(
            [
                ((s < 0) ^ (h < 0))[above].sum() / (h < 0)[above].sum()
                for s, h in zip(shapes, heads, strict=True)
            ]
        )
        for name in ("flat", "swelling"):
            np.testing.assert_allclose(errors[name] + errors[f"outside_{name}"], wrong, rtol=1e-12)
        amounts = amounts_of_latents(z)
        assert (amounts["flat"] == flat).all() and (amounts["swelling"] == swelling).all()


def test_harm_is_a_growth_outside_the_region():
    before = np.array([0.10, 0.10, 0.10])
    after = before + np.array([0.5, 1.5, -1]) * HARM
    assert is_harmed(before, after).tolist() == [False, True, False]
