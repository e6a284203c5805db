"""The progressive geometry reward: ramp, balance, what it leaves alone, and rewards of every kind on an asset
under optimisation.
"""

import pytest
import torch

from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.rewards.depth import Depth
from eg3d_rlhf.rewards.images.analytic import OneNose
from eg3d_rlhf.rewards.meshes.patches import MeshReader
from eg3d_rlhf.rewards.meshes.settings import PatchOptions
from eg3d_rlhf.rewards.meshes.surfaces import cube
from eg3d_rlhf.rewards.points import LevelSetPoints
from eg3d_rlhf.rewards.reward import load_reward
from eg3d_rlhf.tuning.distill.guidance.geometry import (
    GEOMETRY_REWARDS,
    GeometryReward,
    MeshGeometry,
    ObservedGeometry,
    ProgressiveGeometry,
)
from eg3d_rlhf.tuning.distill.guidance.settings import GeometrySettings
from tests.generators.assets.test_grids import balls, random_voxels
from tests.rejections import raising


def linear(field, prompts, step):
    return field.shape.flatten(1).sum(dim=1)


def curved(field, prompts, step):
    return -(field.shape - step).square().flatten(1).sum(dim=1)


def with_gradients(seed: int = 0):
    asset = random_voxels()
    rng = torch.Generator().manual_seed(seed)
    for parameter in asset.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=rng)
    return asset, [parameter.grad.clone() for parameter in asset.parameters()]


def test_its_norm_is_a_share_of_the_distillations_that_rises():
    asset, before = with_gradients()
    geometry = ProgressiveGeometry(
        linear, GeometrySettings(geometry_weight=0.5, geometry_weight_from=0.1, geometry_start=0.2), 100
    )
    assert [geometry.alpha(step) for step in (20, 60, 100)] == pytest.approx([0.1, 0.3, 0.5])
    terms = geometry.add(asset, list(asset.parameters()), ["", ""], 60)
    norm = sum(g.flatten(1).square().sum(dim=1) for g in before).sqrt()
    moved = before[0] - asset.shape.grad
    assert torch.allclose(moved.flatten(1).norm(dim=1), 0.3 * norm, rtol=1e-4)
    assert (moved > 0).all()  # descent on -r, whose gradient is one everywhere
    assert torch.equal(asset.paint.grad, before[1])
    assert torch.allclose(terms["geometry"], asset.shape.flatten(1).sum(dim=1)) and terms[
        "geometry_alpha"
    ].item() == pytest.approx(0.3)
    expected = -before[0].flatten(1).sum(dim=1) / (norm * asset.shape[0].numel() ** 0.5)
    assert torch.allclose(terms["geometry_cosine"], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "step"), [({"geometry_start": 0.5}, 49), ({"geometry_weight": 0.0}, 80), ({}, 10)]
)
def test_before_its_time_and_without_weight_nothing_changes(settings, step):
    asset, before = with_gradients()

    def never(*args):
        raise AssertionError("asked")

    assert (
        ProgressiveGeometry(never, GeometrySettings(**settings), 100).add(
            asset, list(asset.parameters()), ["", ""], step
        )
        == {}
    )
    assert all(torch.equal(a.grad, b) for a, b in zip(asset.parameters(), before, strict=True))


def test_between_looks_the_gradient_stays():
    geometry = ProgressiveGeometry(
        curved, GeometrySettings(geometry_start=0.0, geometry_weight_from=0.3, geometry_every=3), 20
    )
    moved = []
    for step in range(6):
        asset, before = with_gradients()
        terms = geometry.add(asset, list(asset.parameters()), ["", ""], step)
        pull = (before[0] - asset.shape.grad).flatten(1)
        moved.append((terms["geometry"], pull / pull.norm(dim=1, keepdim=True)))
        assert torch.equal(asset.paint.grad, before[1])
    for a, b, alike in ((0, 1, True), (1, 2, True), (2, 3, False), (3, 5, True)):
        assert (
            torch.equal(moved[a][0], moved[b][0]) is alike
            and torch.allclose(moved[a][1], moved[b][1], atol=1e-5) is alike
        )


def test_a_resumed_run_goes_on_alike():
    def run(geometry, steps):
        gradients = []
        for step in steps:
            asset, _ = with_gradients(step)
            geometry.add(asset, list(asset.parameters()), ["", ""], step)
            gradients.append(asset.shape.grad)
        return gradients

    straight = run(ProgressiveGeometry(curved, GeometrySettings(), 20), range(4, 10))
    first, second = (ProgressiveGeometry(curved, GeometrySettings(), 20) for _ in range(2))
    halves = run(first, range(4, 7))
    second.load_state_dict(first.state_dict())
    halves += run(second, range(7, 10))
    assert all(torch.equal(a, b) for a, b in zip(straight, halves, strict=True))


def test_an_inverted_reward_is_climbed_down_and_a_ramp_has_a_length():
    moved = []
    for sign in (1, -1):
        asset, before = with_gradients()
        geometry = ProgressiveGeometry(curved, GeometrySettings(), 20, sign)
        moved.append(
            (
                geometry.add(asset, list(asset.parameters()), ["", ""], 10)["geometry"],
                asset.shape.grad - before[0],
            )
        )
    assert torch.equal(moved[0][0], -moved[1][0]) and torch.allclose(moved[0][1], -moved[1][1], atol=1e-6)
    with raising("--set geometry_start=1"):
        ProgressiveGeometry(linear, GeometrySettings(geometry_start=1.0), 10)


class Area:
    def score(self, patches, prompts):
        return patches.features[..., 0].sum(dim=(1, 2)) + patches.centres.square().sum(dim=(1, 2, 3))


class Spread:
    """Stands for a trained reward: anything that scores a field by an observation."""

    def __init__(self, observation):
        self.observation = observation

    def score(self, field):
        return self.observation.observe(field).flatten(1).std(dim=1)


@pytest.mark.parametrize("kind", ["sigma", "depth", "points", "mesh", "noses"])
def test_rewards_of_every_kind_reach_every_asset(kind, tiny_reward):
    field = balls(2, 16)
    made: dict[str, object] = {
        "sigma": lambda: ObservedGeometry(load_reward(tiny_reward)),
        "depth": lambda: ObservedGeometry(
            Spread(Depth(resolution=8, samples=12, pivot=(0, 0, 0), near=2.2, far=3.2))
        ),
        "points": lambda: ObservedGeometry(Spread(LevelSetPoints(spec=SlabSpec.cube(16), points=32))),
        "mesh": lambda: MeshGeometry(MeshReader(cube(10), PatchOptions(patches=8, faces=8)), Area()),
        "noses": OneNose,
    }
    reward = made[kind]()
    assert isinstance(reward, GeometryReward)
    for parameter in field.parameters():
        parameter.grad = torch.ones_like(parameter)
    geometry = ProgressiveGeometry(reward, GeometrySettings(geometry_start=0.0, geometry_weight_from=0.1), 10)
    heads = ["a white head with a red nose"] * 2
    terms = geometry.add(field, list(field.parameters()), heads, 0)
    assert terms["geometry"].shape == (2,) and terms["geometry"].isfinite().all()
    assert ((field.shape.grad - 1).flatten(1).norm(dim=1) > 0).all() and field.shape.grad.isfinite().all()


def test_solid_closes_leaks_and_does_not_change_valid_meshes():
    field = balls(2, 32)
    assert GEOMETRY_REWARDS["solid"].make()(field, ["", ""], 0).tolist() == [0, 0]
    with torch.no_grad():
        field.shape[0, ..., :2, :2, :2] = field.shape[0].max()  # a corner apart
    scores = GEOMETRY_REWARDS["solid"].make()(field, ["", ""], 0)
    scores.sum().backward()
    assert scores[0] < 0 == scores[1] and field.shape.grad[0].any() and not field.shape.grad[1].any()
