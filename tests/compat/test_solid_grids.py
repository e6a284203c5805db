"""Grids of the specification of `solid`: measures, the score with its pair, and the surrogate's two
trainings, as its files say.
"""

import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage.measure import euler_number
from torch.nn import functional as F

from eg3d_rlhf.geometry import solids
from eg3d_rlhf.rewards.solid import solid_loss
from tests.compat.reference import ROOT, arrays, existing, read_json

FOLDER = ROOT / "solid"
GRIDS = read_json(FOLDER / "grids.json")
SCORES = read_json(FOLDER / "score.json")
COUNTS = {"parts", "parts_least", "cavities", "euler"}
AS_IT_IS = "as it is"
OURS = {"score": "solid", "gated": "reward"}  # names that differ


def rules_of(recipe: dict) -> solids.Rules:
    return solids.Rules(thin=recipe["r_thin"], leak=recipe["r_leak"])


def unpacked(bits: np.ndarray, edge: int) -> np.ndarray:
    return np.unpackbits(bits)[: edge**3].reshape(edge, edge, edge).astype(bool)


@pytest.mark.parametrize("name", GRIDS.get("shapes", {}))
def test_measures_of_a_grid(name):
    solid = unpacked(arrays(FOLDER / "grids.npz")[name], GRIDS["R"])
    found = solids.measure_grid(solid, rules_of(GRIDS))
    found["main"] = found["main_volume"]  # in these files the share of the volume
    assert found["euler"] == euler_number(solid, connectivity=3)
    for key, value in GRIDS["shapes"][name].items():
        if key in COUNTS:
            assert found[key] == value, key
        else:
            assert found[key] == pytest.approx(value, abs=1e-4), key


@pytest.mark.parametrize("name", SCORES.get("values", {}))
def test_score_of_a_grid_beside_the_one_before(name):
    grids = arrays(FOLDER / "score.npz")
    before = f"{name.rpartition(' | ')[0]} | {AS_IT_IS}"
    solid, untuned = (unpacked(grids[key], SCORES["R"]) for key in (name, before))
    found = solids.reward(solid, untuned, rules_of(SCORES)).to_dict()
    expected = {OURS.get(key, key): value for key, value in SCORES["values"][name].items()}
    assert {key: found[key] for key in expected} == pytest.approx(expected, abs=1e-6)


class Surrogate:
    """The density, and what is wrong with it."""

    def __init__(self):
        stored = arrays(existing(FOLDER / "surrogate.npz"))
        self.density = torch.from_numpy(stored["density"].astype(np.float32))
        self.ideal, self.hole, self.floater = (
            unpacked(stored[key], len(self.density)) for key in ("ideal", "hole", "floater")
        )
        self.before = (self.density > 0).numpy()

    def iou(self, solid: np.ndarray) -> float:
        return float((solid & self.ideal).sum() / (solid | self.ideal).sum())

    def elsewhere(self, solid: np.ndarray, margin: int) -> float:
        """Share of the ideal shape that was added or lost further from the defects than `margin` voxels."""
        away = ndimage.distance_transform_edt(~(self.hole | self.floater)) > margin
        return float(((solid != self.before) & away).sum() / self.ideal.sum())

    def loss(self, density: torch.Tensor) -> torch.Tensor:
        return solid_loss(density[None], 0.0, reach=5.0)[0]


def test_the_surrogate_mends_voxels_and_nothing_else():
    case = Surrogate()
    density = case.density.clone().requires_grad_(True)
    for _ in range(60):
        (gradient,) = torch.autograd.grad(case.loss(density), density)
        if not gradient.any():
            break
        density = (density - 0.5 * gradient / gradient.abs().max()).detach().requires_grad_(True)
    solid = (density.detach() > 0).numpy()
    cure = case.iou(case.before & ~case.floater | case.hole)
    assert ndimage.label(solid)[1] == 1 and not solids.caps(solid, 5.0).any()
    assert case.elsewhere(solid, 0) <= 0.002
    assert case.iou(solid) >= min(0.97, cure - 0.005) and case.iou(solid) > case.iou(case.before)


def test_the_surrogate_mends_what_a_smooth_generator_makes():
    """12^3 coefficients: a voxel cannot move alone, so the 2 voxels about a defect, half a coefficient's
    cell, are not elsewhere.

    What holds the density pulls the floater back where the loss is 0: the best step counts.
    """
    case = Surrogate()
    coefficients = torch.zeros(1, 1, 12, 12, 12, requires_grad=True)
    optimizer = torch.optim.Adam([coefficients], lr=0.3)
    least = float("inf")
    solid = case.before
    for _ in range(60):
        density = case.density + F.interpolate(coefficients, size=case.density.shape, mode="trilinear")[0, 0]
        loss = case.loss(density)
        if loss.item() < least:
            least = loss.item()
            solid = (density.detach() > 0).numpy()
        optimizer.zero_grad()
        (loss + 0.005 * (density - case.density).square().mean()).backward()
        optimizer.step()
    assert not solids.caps(solid, 5.0).any()
    assert (solid & case.floater).sum() <= 0.02 * case.floater.sum()
    assert case.elsewhere(solid, 2) <= 0.015 and case.iou(solid) >= 0.95
