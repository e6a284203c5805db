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
from tests.compat.absent import some
from tests.compat.reference import ROOT, arrays, of_set, read_json
from tests.geometry.grid_measures import measure_grid

FOLDER = ROOT / "solid"
GRIDS = [
    pytest.param(path, name, id=f"{path.stem}-{name}")
    for path in sorted(FOLDER.glob("grids*.json"))
    for name in read_json(path)["shapes"]
]
SCORES = [
    pytest.param(path, name, id=f"{path.stem}-{name}")
    for path in sorted(FOLDER.glob("score*.json"))
    for name in read_json(path)["values"]
]
SURROGATES = sorted(FOLDER.glob("surrogate*.npz"))
COUNTS = {"parts", "parts_least", "cavities", "euler"}
OURS = {"score": "solid", "gated": "reward"}  # names that differ
# of the surrogate: what a surrogate*.json may state, and what the one in tests/references was made with
PRESENT = {
    "reach": 5.0,  # voxels: holes that a ball of this radius does not pass are filled
    "steps": 60,
    "step": 0.5,  # of voxels: of the largest entry of the gradient
    "coefficients": 12,  # per edge
    "rate": 0.3,  # of coefficients: of Adam
    "hold": 0.005,  # of coefficients: weight of what keeps the density
    # of voxels and of coefficients: how much may change elsewhere, and how near the ideal shape is at least
    "elsewhere": [0.002, 0.015],
    "iou": [0.97, 0.95],
}


def rules_of(recipe: dict) -> solids.Rules:
    weights = {"weights": tuple(recipe["weights"])} if "weights" in recipe else {}
    return solids.Rules(thin=recipe["r_thin"], leak=recipe["r_leak"], **weights)


def unpacked(bits: np.ndarray, edge: int) -> np.ndarray:
    return np.unpackbits(bits)[: edge**3].reshape(edge, edge, edge).astype(bool)


@pytest.mark.parametrize(("path", "name"), some(GRIDS, "this set has no solid/grids*.json", width=2))
def test_measures_of_a_grid(path, name):
    recipe = read_json(path)
    (bits,) = of_set(arrays(path.with_suffix(".npz")), name)
    solid = unpacked(bits, recipe["R"])
    found = measure_grid(solid, rules_of(recipe))
    found["main"] = found["main_volume"]  # in these files the share of the volume
    assert found["euler"] == euler_number(solid, connectivity=3)
    for key, value in recipe["shapes"][name].items():
        if key in COUNTS:
            assert found[key] == value, key
        else:
            assert found[key] == pytest.approx(value, abs=1e-4), key


@pytest.mark.parametrize(("path", "name"), some(SCORES, "this set has no solid/score*.json", width=2))
def test_score_of_a_grid_beside_the_one_before(path, name):
    recipe = read_json(path)
    before = f"{name.rpartition(' | ')[0]} | {recipe.get('before', 'as it is')}"
    grids = of_set(arrays(path.with_suffix(".npz")), name, before)
    solid, untuned = (unpacked(bits, recipe["R"]) for bits in grids)
    found = solids.reward(solid, untuned, rules_of(recipe)).to_dict()
    expected = {OURS.get(key, key): value for key, value in recipe["values"][name].items()}
    assert {key: found[key] for key in expected} == pytest.approx(expected, abs=1e-6)


class Surrogate:
    """The density, and what is wrong with it."""

    def __init__(self, path):
        stored = arrays(path)
        density, *grids = of_set(stored, "density", "ideal", "hole", "floater")
        self.recipe = {**PRESENT, **read_json(path.with_suffix(".json"))}
        self.reach = self.recipe["reach"]
        self.density = torch.from_numpy(density.astype(np.float32))
        self.ideal, self.hole, self.floater = (unpacked(grid, len(self.density)) for grid in grids)
        self.before = (self.density > 0).numpy()

    def iou(self, solid: np.ndarray) -> float:
        return float((solid & self.ideal).sum() / (solid | self.ideal).sum())

    def elsewhere(self, solid: np.ndarray, margin: int) -> float:
        """Share of the ideal shape that was added or lost further from the defects than `margin` voxels."""
        away = ndimage.distance_transform_edt(~(self.hole | self.floater)) > margin
        return float(((solid != self.before) & away).sum() / self.ideal.sum())

    def loss(self, density: torch.Tensor) -> torch.Tensor:
        return solid_loss(density[None], 0.0, reach=self.reach)[0]


surrogates = pytest.mark.parametrize(
    "path", some([pytest.param(p, id=p.stem) for p in SURROGATES], "this set has no solid/surrogate*.npz")
)


@surrogates
def test_the_surrogate_mends_voxels_and_nothing_else(path):
    case = Surrogate(path)
    density = case.density.clone().requires_grad_(True)
    for _ in range(case.recipe["steps"]):
        (gradient,) = torch.autograd.grad(case.loss(density), density)
        if not gradient.any():
            break
        density = (
            (density - case.recipe["step"] * gradient / gradient.abs().max()).detach().requires_grad_(True)
        )
    solid = (density.detach() > 0).numpy()
    cure = case.iou(case.before & ~case.floater | case.hole)
    assert ndimage.label(solid)[1] == 1 and not solids.hole_caps(solid, case.reach).any()
    assert case.elsewhere(solid, 0) <= case.recipe["elsewhere"][0]
    assert case.iou(solid) >= min(case.recipe["iou"][0], cure - 0.005) and case.iou(solid) > case.iou(
        case.before
    )


@surrogates
def test_the_surrogate_mends_what_a_smooth_generator_makes(path):
    """A few coefficients, 12^3 for 48^3: a voxel cannot move alone, so the 2 voxels about a defect, half a
    coefficient's cell, are not elsewhere.

    What holds the density pulls the floater back where the loss is 0: the best step counts.
    """
    case = Surrogate(path)
    recipe = case.recipe
    coefficients = torch.zeros(1, 1, *[recipe["coefficients"]] * 3, requires_grad=True)
    optimizer = torch.optim.Adam([coefficients], lr=recipe["rate"])
    least = float("inf")
    solid = case.before
    for _ in range(recipe["steps"]):
        density = case.density + F.interpolate(coefficients, size=case.density.shape, mode="trilinear")[0, 0]
        loss = case.loss(density)
        if loss.item() < least:
            least = loss.item()
            solid = (density.detach() > 0).numpy()
        optimizer.zero_grad()
        (loss + recipe["hold"] * (density - case.density).square().mean()).backward()
        optimizer.step()
    assert not solids.hole_caps(solid, case.reach).any()
    assert (solid & case.floater).sum() <= 0.02 * case.floater.sum()
    half = len(case.density) // recipe["coefficients"] // 2
    assert case.elsewhere(solid, half) <= recipe["elsewhere"][1] and case.iou(solid) >= recipe["iou"][1]
