"""What the reward zoo computes beside its networks against the reference values: aggregates, schedules of
projectors, cameras, clouds, the nose floor.

Cameras are read from the words of the JSON, parameters of aggregates from the arrays' names.
"""

import math
import re

import numpy as np
import pytest
import torch

from eg3d_rlhf.evaluation.inversion.projector import learning_rate, noise_scale
from eg3d_rlhf.rewards.aggregates import Aggregate
from eg3d_rlhf.rewards.depth import PUBLISHED_FOCAL, VIEWS, Depth
from eg3d_rlhf.rewards.points import evenly_spaced, lift, self_scaled
from eg3d_rlhf.tuning.gan.phase import floor_loss
from tests.compat.absent import some
from tests.compat.reference import ROOT, array_names, of_set, read_json

SETS = sorted((ROOT / "reward_zoo").glob("misc*.npz"))
NONE = "this set has no reward_zoo/misc*.npz"
AGGREGATES = [
    pytest.param(path, match[1], id=f"{path.stem}-{match[1]}")
    for path in SETS
    for name in array_names(path)
    if (match := re.fullmatch("agg_(?!grad_)(.+)", name))
]
PUBLISHED_FOV = 18.837  # degrees
NUMBER = r"[+-]?\d+(?:\.\d+)?"


def load(path) -> dict:
    with np.load(path) as reference:
        return {**reference, "recipe": read_json(path.with_suffix(".json"))}


@pytest.fixture(scope="module", params=some([pytest.param(p, id=p.stem) for p in SETS], NONE))
def values(request):
    return load(request.param)


def stated(recipe: dict, word: str, default: list[float]) -> list[float]:
    """Return the numbers behind a word of the JSON's note."""
    found = re.search(rf"{word} ?\(?({NUMBER}(?:, ?{NUMBER})*)", recipe.get("note", ""))
    return [float(number) for number in found[1].split(",")] if found else default


def cameras_of(recipe: dict) -> Depth:
    """Return the published cameras, or those that the note states."""
    default = Depth()
    (fov,) = stated(recipe, "fov", [PUBLISHED_FOV])
    focal = 1 / (math.tan(math.radians(fov) / 2) * math.sqrt(2))
    return Depth(
        yaws=tuple(stated(recipe, "yaw", list(VIEWS[3]))),
        focal=PUBLISHED_FOCAL if fov == PUBLISHED_FOV else focal,  # rounded as the published code has it
        pivot=tuple(stated(recipe, "look-at", list(default.pivot))),
        radius=stated(recipe, "radius", [default.radius])[0],
    )


@pytest.mark.parametrize(("path", "case"), some(AGGREGATES, f"{NONE} with agg_...", width=2))
def test_aggregates_of_ensembles(path, case):
    values = load(path)
    kind, strength = re.fullmatch(r"([a-z]+)(?:_[a-z]+([\d.]+))?", case).groups()
    expected, scores = of_set(values, f"agg_{case}", "members")
    members = torch.as_tensor(scores).requires_grad_(True)  # [E, N] float64
    joined = Aggregate(kind, strength and float(strength))(members)
    np.testing.assert_allclose(joined.detach(), expected, rtol=0, atol=1e-12)
    cotangent, gradient = of_set(values, "cotangent", f"agg_grad_{case}")
    (joined * torch.as_tensor(cotangent)).sum().backward()
    np.testing.assert_allclose(members.grad, gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "schedule"), [("projector_lr", learning_rate), ("projector_noise_over_wstd", noise_scale)]
)
def test_schedules_of_projectors(name, schedule, values):
    (wanted,) = of_set(values, name)  # [500]
    np.testing.assert_allclose(
        [schedule(step, len(wanted)) for step in range(len(wanted))], wanted, rtol=0, atol=1e-12
    )


def test_cameras(values):
    (wanted,) = of_set(values, "triple_cameras")
    cameras = cameras_of(values["recipe"])
    # a focal length that is not the published one is rounded differently here and there
    compare = (
        np.testing.assert_array_equal if cameras.focal == PUBLISHED_FOCAL else np.testing.assert_allclose
    )
    compare(cameras.cameras().numpy(), wanted)
    if cameras == Depth(yaws=VIEWS[3], focal=PUBLISHED_FOCAL):
        np.testing.assert_array_equal(Depth(focal=PUBLISHED_FOCAL).cameras()[0], wanted[1])


def test_the_published_focal_length():
    focal = 1 / (math.tan(math.radians(PUBLISHED_FOV) / 2) * math.sqrt(2))
    assert PUBLISHED_FOCAL == pytest.approx(focal, rel=1e-3)


def test_nose_floor(values):
    depths, least, expected, gradient = of_set(values, "depth", "nose_floor", "nose_loss", "nose_grad")
    maps = torch.from_numpy(depths)[None].requires_grad_()
    floor = float(least)
    loss = floor_loss(maps, floor, only_violators=True)
    loss.sum().backward()
    assert loss.item() == pytest.approx(float(expected), rel=1e-5)
    np.testing.assert_allclose(maps.grad[0], gradient, rtol=1e-5, atol=1e-8)
    share = float((maps < floor).float().mean())
    assert floor_loss(maps, floor).item() == pytest.approx(share * float(expected), rel=1e-5), (
        "ours counts all pixels"
    )


def normalised(depth: torch.Tensor, camera: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    """Lift a map [1, 1, R, R] to points [1, P, 3]; return them, `count` of them, and those at unit scale."""
    points = lift(depth, camera)
    chosen = points[:, evenly_spaced(points.shape[1], count)]
    return points, chosen, self_scaled(chosen)


def test_lifting_normalisation_and_gradient(values):
    maps, cameras, subsampled = of_set(values, "depth", "triple_cameras", "subsampled")
    depth = torch.from_numpy(maps)[None, None].requires_grad_()
    (view,) = map(int, stated(values["recipe"], "row-major, camera", [1]))
    points, chosen, scaled = normalised(depth, torch.from_numpy(cameras[view : view + 1]), len(subsampled))
    for lifted, name in ((points, "lifted"), (chosen, "subsampled"), (scaled, "scaled")):
        if name in values:
            np.testing.assert_allclose(lifted[0].detach(), values[name], rtol=0, atol=1e-6)
    (expected,) = of_set(values, "depth_grad_of_scaled")
    cotangent = (
        np.random.RandomState(values["recipe"]["seed"] + 1)
        .standard_normal(scaled.shape[1:])
        .astype(np.float32)
    )
    (scaled * torch.from_numpy(cotangent)).sum().backward()
    np.testing.assert_allclose(depth.grad[0, 0], expected, rtol=0, atol=1e-5 * np.abs(cotangent).sum() ** 0.5)
