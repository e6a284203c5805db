"""Depth maps: closed forms, gradients through the renderer, one synthesis for all views, and what cannot be seen."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from eg3d_rlhf.core.field import Bounds, CameraFamily
from eg3d_rlhf.generators import of, ws_of_seeds
from eg3d_rlhf.rewards import observations
from eg3d_rlhf.rewards.depth import SmallDepth
from eg3d_rlhf.rewards.observations.depth import PUBLISHED_FOCAL, PUBLISHED_RESOLUTION, VIEWS, Depth, mirror, nearness
from eg3d_rlhf.rewards.reward import Reward, check_reward
from tests import tiny_runs
from tests.rewards.observations.ball import Ball
from torch_utils.ops.implementations import implementation

SIZE = 32


def small(views: int = 1) -> SmallDepth:
    torch.manual_seed(1)
    return SmallDepth(views=views, resolution=SIZE).eval()


def test_nearness_in_closed_form():
    plane = torch.full((2, 1, 8, 8), 2.775)
    torch.testing.assert_close(nearness(plane, 2.25, 3.3), torch.full_like(plane, 0.5))
    assert nearness(torch.tensor([2.25, 3.3]), 2.25, 3.3).tolist() == pytest.approx([1, 0], abs=1e-6)
    depth = torch.rand(1, 1, 8, 8) + 2
    torch.testing.assert_close(nearness(depth + 0.2, 2.25, 3.3), nearness(depth, 2.25, 3.3) - 0.2 / 1.05)


@pytest.mark.parametrize("views", [1, 3])
def test_the_rewards_gradient_equals_central_differences(views):
    """<d reward / d depth, v> in float64."""
    network, rng = small(views).double(), np.random.default_rng(0)
    depth = torch.from_numpy(rng.uniform(2.3, 3.2, (1, views, 1, SIZE, SIZE))).requires_grad_()
    opacity = torch.from_numpy(rng.uniform(0, 1, depth.shape))

    def score(depth):
        return network.score(torch.cat([nearness(depth, 2.25, 3.3) * opacity, opacity], dim=2)).sum()

    score(depth).backward()
    for _ in range(3):
        v, step = torch.from_numpy(rng.standard_normal(depth.shape)), 1e-3
        with torch.no_grad():
            wanted = (score(depth + step * v) - score(depth - step * v)) / (2 * step)
        assert float((depth.grad * v).sum()) == pytest.approx(float(wanted), rel=1e-3)


def test_depth_follows_a_ball_that_moves():
    centres = torch.zeros(1, 3)
    for moved in (0.02, -0.05):
        before, after = (Depth(resolution=SIZE, masked=False, near=2.2, far=3.2, pivot=(0.0, 0.0, 0.0)).observe(Ball(centre))[0, 0, 0]
                         for centre in (centres, centres + torch.tensor([0.0, 0.0, moved])))  # fmt: skip
        middle = slice(SIZE // 2 - 2, SIZE // 2 + 2)
        assert (after - before)[middle, middle].mean().item() == pytest.approx(moved / (3.2 - 2.2), rel=0.05), "nearer is brighter"


@pytest.mark.parametrize("views", [1, 3])
def test_a_shapes_reward_has_the_gradient_of_central_differences(views):
    """Through both passes of the renderer."""
    observation = Depth(yaws=VIEWS[views], resolution=SIZE, samples=64, near=2.2, far=3.2, pivot=(0.0, 0.0, 0.0))
    network = small(views)

    def score(z):
        return network.score(observation.observe(Ball(torch.stack([torch.zeros_like(z), torch.zeros_like(z), z], dim=1)))).sum()

    z, step = torch.tensor([-0.1], requires_grad=True), 0.002
    score(z).backward()
    with torch.no_grad():
        wanted = (score(z + step) - score(z - step)) / (2 * step)
    assert float(z.grad) == pytest.approx(float(wanted), rel=0.02)


def test_where_nothing_is_there_is_neither_value_nor_a_broken_gradient():
    """Fault: 0 / 0 in the marcher's mean depth made the gradients of all weights NaN."""
    centres = torch.tensor([[0.0, 0.0, 0.0], [9.0, 0.0, 0.0]], requires_grad=True)
    maps = Depth(resolution=8, near=2.2, far=3.2).observe(Ball(centres, size=0.01))
    assert maps[1].abs().max() < 1e-4 and maps.shape == (2, 1, 2, 8, 8)
    maps.sum().backward()
    assert centres.grad.isfinite().all()


@pytest.fixture(scope="module")
def generator(tiny_networks):
    return of(tiny_runs.networks.load(tiny_networks).G_ema)


def test_views_of_a_sample_share_its_planes(generator, monkeypatch):
    calls, synthesis = [], generator.module.backbone.synthesis.forward
    monkeypatch.setattr(generator.module.backbone.synthesis, "forward", lambda *a, **k: calls.append(1) or synthesis(*a, **k))
    observation = replace(Depth.of(generator, views=3, resolution=SIZE), samples=4)
    reward = Reward(observation, small(3))
    ws = ws_of_seeds(generator, [1, 2]).requires_grad_()
    reward.score(generator.field(ws)).sum().backward()
    assert calls == [1] and ws.grad.abs().sum() > 0


def test_a_shape_looks_the_same_twice_and_the_draws_of_others_stay(generator):
    observation = replace(Depth.of(generator, resolution=8), samples=4)
    field = generator.field(ws_of_seeds(generator, [1]))
    torch.manual_seed(3)
    before = torch.rand(4)
    torch.manual_seed(3)
    assert torch.equal(observation.observe(field), observation.observe(field)) and torch.equal(before, torch.rand(4))


def test_mirrored_views_change_places(generator):
    maps = torch.rand(2, 3, 2, 8, 8)
    assert torch.equal(mirror(mirror(maps)), maps) and torch.equal(mirror(maps)[:, 0], maps[:, 2].flip(-1))
    seen = Depth.of(generator, views=3).augment(maps, np.array([0.1, 0.9]))
    assert torch.equal(seen[0], mirror(maps)[0]) and torch.equal(seen[1], maps[1])
    ball = torch.tensor([[0.1, 0.05, 0.0]])
    observation = Depth(yaws=VIEWS[3], resolution=SIZE, near=2.2, far=3.2, pivot=(0.0, 0.0, 0.0))
    left, right = (observation.observe(Ball(centre)) for centre in (ball, ball * torch.tensor([-1.0, 1.0, 1.0])))
    assert (mirror(left) - right).abs().mean() < 0.1 * left.abs().mean(), "up to the jitter of the rays"
    assert (left - right).abs().mean() > 0.5 * left.abs().mean()


def stand_in(**cameras):
    return SimpleNamespace(cameras=CameraFamily(**cameras), bounds=Bounds())


def test_a_generators_own_rays_and_cameras():
    ffhq = Depth.of(stand_in(pivot=(0.0, 0.0, 0.2), span=(2.25, 3.3)), views=3, published=True)
    assert (ffhq.near, ffhq.far, ffhq.focal, ffhq.resolution, ffhq.samples) == (2.25, 3.3, PUBLISHED_FOCAL, PUBLISHED_RESOLUTION, None)
    assert ffhq.shape == (3, 1, 128, 128) and ffhq.pivot == (0.0, 0.0, 0.2)
    assert (Depth.of(stand_in()).near, Depth.of(stand_in()).far) == pytest.approx((2.2, 3.2))
    again = observations.from_dict(ffhq.to_dict())
    assert again == ffhq


def test_what_a_generator_cannot_give_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"^--observation=depth: expected cameras outside the shape's cube of side 1, got 0\.5"):
        Depth.of(stand_in(radius=0.5))
    with pytest.raises(ValueError, match="expected 1 or 3 views, got 2"):
        Depth.of(stand_in(), views=2)
    observation = Depth.of(stand_in(), resolution=SIZE)
    assert observation.misfits(stand_in()) == []
    assert observation.misfits(stand_in(radius=3.0)) == ["camera radius 2.7, got 3.0", "rays between (2.2, 3.2), got (2.5, 3.5)"]
    with pytest.raises(ValueError, match=r"^--reward-ckpt: expected a generator with rays between \(2\.2, 3\.2\), got \(1, 5\)"):
        check_reward(Reward(observation, small()), stand_in(span=(1, 5)), "--reward-ckpt")


@pytest.mark.parametrize("kind", ["depth", "lifted-points"])
def test_training_may_draw_maps_with_compiled_ops(kind, generator):
    """What is kept, in half precision, is the same but for its last bit; slabs keep to plain torch, which repeats to the byte."""
    assert observations.OBSERVATIONS["sigma"].ops == "torch" and observations.OBSERVATIONS[kind].ops == "auto"
    observation = observations.OBSERVATIONS[kind].of(of(generator), resolution=24)
    field = of(generator).field(ws_of_seeds(of(generator), [3, 4], 0.7, 14))
    with torch.no_grad():
        fast = observation.observe(field)
        with implementation("torch"):
            plain = observation.observe(field)
    torch.testing.assert_close(fast, plain, rtol=1e-3, atol=1e-4)
