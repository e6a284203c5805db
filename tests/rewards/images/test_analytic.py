"""Rewards in closed form: their rankings, their gradients, and controls without information."""

import pytest
import torch

from eg3d_rlhf.core.interfaces import RewardModel
from eg3d_rlhf.generators.assets.grids import Voxels
from eg3d_rlhf.rewards import boxes as problem
from eg3d_rlhf.rewards.images.analytic import (
    Floaters,
    Inverted,
    MeanPixel,
    ModeDistance,
    OneFace,
    OneNose,
    Random,
    occupancy,
)
from tests.rewards.test_boxes import BOX, FACES, HEAD, render

TEXTS = [HEAD.text] * 5
VIEWS = [HEAD.text] * 20


@pytest.fixture(scope="module")
def seen():
    return render(problem.build(HEAD, FACES))


def test_all_are_reward_models(seen):
    for reward in (ModeDistance(), OneFace(), MeanPixel(), Random(), Inverted(OneFace())):
        scores = reward.score(seen, VIEWS)
        assert isinstance(reward, RewardModel) and scores.shape == (20,) and scores.isfinite().all()


def test_mode_distance_prefers_faces_everywhere_and_one_face_does_not(seen):
    each = ModeDistance().score(seen, VIEWS).unflatten(0, (5, 4))
    assert torch.allclose(each, FACES * 2 - 1, atol=0.02) and each.mean(dim=1).argmax() == 4
    together = OneFace().score(seen, VIEWS).unflatten(0, (5, 4))
    assert torch.equal(together, together[:, :1].expand(-1, 4))
    assert (
        together[:, 0].argsort(descending=True)[:3].tolist() in ([1, 0, 2], [1, 2, 0])
        and together[:, 0].argmin() == 4
    )
    assert torch.equal(Inverted(OneFace()).score(seen, VIEWS), -OneFace().score(seen, VIEWS))
    boxes = render(problem.build(BOX, FACES))
    preferred = OneFace().score(boxes, [BOX.text] * 20)[::4]
    assert torch.allclose(preferred, FACES.mean(dim=1) * 2 - 1, atol=0.02)


def test_random_scores_depend_only_on_the_image_and_carry_no_information():
    rng = torch.Generator().manual_seed(0)
    pixels = torch.rand(2000, 3, 4, 4, generator=rng)
    scores = Random(seed=1).score(pixels, [])
    assert torch.equal(scores, Random(seed=1).score(pixels, [])) and not torch.equal(
        scores, Random(seed=2).score(pixels, [])
    )
    assert scores.min() >= 0 and scores.max() < 1 and float(scores.mean()) == pytest.approx(0.5, abs=0.03)
    assert abs(float(torch.corrcoef(torch.stack([scores, pixels.mean(dim=(1, 2, 3))]))[0, 1])) < 0.07
    assert torch.equal(Random(views=4).score(pixels, []).unflatten(0, (-1, 4)).std(dim=1), torch.zeros(500))


def test_one_nose_penalises_all_noses_but_the_largest():
    heads = problem.build(HEAD, FACES)
    scores = OneNose()(heads, TEXTS, 0)
    full = float(occupancy(heads)[4, problem.nose_voxels(16, 0)].mean())
    assert torch.allclose(scores, -torch.tensor([0.0, 0, 1, 2, 3]) * full, atol=1e-4)
    assert torch.equal(OneNose()(heads, [BOX.text] * 5, 0), torch.zeros(5))


def test_floaters():
    cube = Voxels(2, 16).requires_grad_(False)
    cube.shape.fill_(-2.0)
    cube.shape[:, 4:12, 4:12, 4:12] = 20.0
    assert torch.allclose(Floaters()(cube, [], 0), torch.zeros(2), atol=1e-6)
    cube.shape[1, 14, 14, 13:15] = 20.0
    assert Floaters()(cube, [], 0).tolist() == pytest.approx([0, -2 / (8**3 + 2)], abs=1e-5)


@pytest.mark.parametrize("reward", [OneNose(), Floaters()], ids=["noses", "floaters"])
def test_gradients_are_finite_differences(reward):
    heads = problem.start([HEAD.text], [torch.Generator().manual_seed(3)]).double()
    with torch.no_grad():
        heads.shape[0, 15, 15, 15] = 1.0  # a floater
    (gradient,) = torch.autograd.grad(reward(heads, [HEAD.text], 0).sum(), [heads.shape])
    direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def at(step: float) -> float:
        moved = heads.select([0]).requires_grad_(False)
        moved.shape += step * direction
        return float(reward(moved, [HEAD.text], 0))

    assert float((gradient * direction).sum()) == pytest.approx(
        (at(1e-5) - at(-1e-5)) / 2e-5, rel=1e-4, abs=1e-8
    )
    assert float(gradient.abs().sum()) > 0
