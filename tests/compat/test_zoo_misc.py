"""What the reward zoo computes beside its networks against the reference values: aggregates, schedules of
projectors, cameras, clouds, the nose floor.
"""

import math
import re

import numpy as np
import pytest
import torch

from eg3d_rlhf.evaluation.inversion.projector import learning_rate, noise_scale
from eg3d_rlhf.rewards.depth import PUBLISHED_FOCAL, VIEWS, Depth
from eg3d_rlhf.rewards.ensembles import Aggregate
from eg3d_rlhf.rewards.points import evenly, lift, self_scaled
from eg3d_rlhf.tuning.gan.nose import floor_loss
from tests.compat.reference import ROOT, array_names, of_set, read_json

SETS = sorted((ROOT / "reward_zoo").glob("misc*.npz"))
AGGREGATES = sorted(
    {
        name.removeprefix("agg_")
        for path in SETS
        for name in array_names(path)
        if re.match("agg_(?!grad_)", name)
    }
)
pytestmark = pytest.mark.skipif(
    not SETS, reason=f"no reward_zoo/misc*.npz in {ROOT}; set EG3D_RLHF_FIXTURES to the folder of references"
)


@pytest.fixture(scope="module", params=SETS, ids=lambda path: path.stem)
def values(request):
    with np.load(request.param) as reference:
        return {**reference, "recipe": read_json(request.param.with_suffix(".json"))}


@pytest.mark.parametrize("case", AGGREGATES)
def test_aggregates_of_ensembles(case, values):
    kind, strength = re.fullmatch(r"([a-z]+)(?:_[a-z]+([\d.]+))?", case).groups()
    _, scores = of_set(values, f"agg_{case}", "members")
    members = torch.as_tensor(scores).requires_grad_(True)  # [E, N] float64
    joined = Aggregate(kind, strength and float(strength))(members)
    (joined * torch.as_tensor(values["cotangent"])).sum().backward()
    np.testing.assert_allclose(joined.detach(), values[f"agg_{case}"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(members.grad, values[f"agg_grad_{case}"], rtol=0, atol=1e-12)


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
    np.testing.assert_array_equal(Depth(yaws=VIEWS[3], focal=PUBLISHED_FOCAL).cameras(), wanted)
    np.testing.assert_array_equal(Depth(focal=PUBLISHED_FOCAL).cameras()[0], wanted[1])
    assert PUBLISHED_FOCAL == pytest.approx(1 / (math.tan(math.radians(18.837) / 2) * math.sqrt(2)), rel=1e-3)


def test_nose_floor(values):
    depths, least, expected, gradient = of_set(values, "depth", "nose_floor", "nose_loss", "nose_grad")
    maps = torch.from_numpy(depths)[None].requires_grad_()
    floor = float(least)
    loss = floor_loss(maps, floor, violators=True)
    loss.sum().backward()
    assert loss.item() == pytest.approx(float(expected), rel=1e-5)
    np.testing.assert_allclose(maps.grad[0], gradient, rtol=1e-5, atol=1e-8)
    share = float((maps < floor).float().mean())
    assert floor_loss(maps, floor).item() == pytest.approx(share * float(expected), rel=1e-5), (
        "ours counts all pixels"
    )


def test_lifting_normalisation_and_gradient(values):
    maps, cameras, subsampled = of_set(values, "depth", "triple_cameras", "subsampled")
    depth = torch.from_numpy(maps)[None, None].requires_grad_()
    points = lift(depth, torch.from_numpy(cameras[1:2]))
    chosen = points[:, evenly(points.shape[1], len(subsampled))]
    scaled = self_scaled(chosen)
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
