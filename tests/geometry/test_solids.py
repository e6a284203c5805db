"""Measures of valid solids on grids: closed forms, the order of the spec's table, invariances, and
defects that a gradient can correct.
"""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from eg3d_rlhf.geometry import solids
from eg3d_rlhf.geometry.solids import HEADS, OBJECTS, Rules
from eg3d_rlhf.rewards.solid import slope_at, solid_loss
from tests.geometry.grid_measures import measure_grid
from tests.rejections import raising

N = 48
X, Y, Z = np.meshgrid(*[(np.arange(N) + 0.5) / N - 0.5] * 3, indexing="ij")


def ball(radius: float, at: tuple[float, float, float] = (0, 0, 0)) -> np.ndarray:
    return (X - at[0]) ** 2 + (Y - at[1]) ** 2 + (Z - at[2]) ** 2 < radius**2


def box(x: tuple[float, float], y: tuple[float, float], z: tuple[float, float]) -> np.ndarray:
    return (X > x[0]) & (x[1] > X) & (Y > y[0]) & (y[1] > Y) & (Z > z[0]) & (z[1] > Z)


def shell(hole: float = 0.0) -> np.ndarray:
    """4 voxels of wall."""
    return ball(0.3) & ~ball(0.3 - 4 / N) & ~((np.hypot(X, Z) < hole) & (Y > 0))


def tube(hole: float = 0.0) -> np.ndarray:
    """A cup with a mouth that is wide, and a hole in its wall."""
    inside = (np.hypot(X, Z) < 0.22) & (Y > -0.22)
    return (np.hypot(X, Z) < 0.3) & (np.abs(Y) < 0.3) & ~inside & ~((np.hypot(Y, Z) < hole) & (X > 0))


SHAPES = {
    "shell": shell(),
    "leaky": shell(0.05) | ball(0.05, (0.42, 0.42, 0.42)),
    "tube": tube(),
    "two": ball(0.2, (-0.2, 0, 0)) | ball(0.1, (0.3, 0.1, 0)),
    "tower": box((-0.1, 0.12), (-0.4, 0.4), (-0.1, 0.1)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_nothing_depends_on_where_a_shape_lies_or_how_it_is_turned_about_the_upright(name):
    shape = np.pad(SHAPES[name], 4)
    moved = np.roll(shape, (2, -3, 4), axis=(0, 1, 2))
    rotated = np.rot90(shape, axes=(0, 2))
    rules = Rules(leak=3.2)
    expected = solids.score(shape, rules).to_dict()
    for other in (moved, rotated):
        assert solids.score(other, rules).to_dict() == pytest.approx(expected, abs=1e-9)
        assert solids.euler(other) == solids.euler(shape)


def test_closed_forms():
    assert solids.euler(ball(0.3)) == 1 and solids.euler(shell()) == 2 and solids.euler(shell(0.05)) == 1
    assert (
        solids.euler(box((-0.3, 0.3), (-0.1, 0.1), (-0.3, 0.3)) & ~box((-0.1, 0.1), (-1, 1), (-0.1, 0.1)))
        == 0
    )
    angle, margin = solids.stability(box((-0.25, 0.25), (-0.25, 0.25), (-0.25, 0.25)))
    assert (angle, margin) == (pytest.approx(45), pytest.approx(N / 4))
    leaning = np.stack(
        [np.roll(box((-0.15, 0.15), (-0.4, 0.4), (-0.15, 0.15))[:, y], y // 3, axis=0) for y in range(N)],
        axis=1,
    )
    assert abs(solids.stability(leaning)[0] - math.degrees(math.atan2(0.15 - 0.4 / 3, 0.4))) < 2
    assert solids.enclosed(shell()).sum() == ball(0.3 - 4 / N).sum()


def test_a_slit_along_a_diagonal_closes_nothing_for_a_slicer():
    corner = np.zeros((4, 4, 4), dtype=bool)
    corner[1, 1, 1] = corner[2, 2, 1] = True
    measures = measure_grid(corner)
    assert measures["parts"] == 2 and measures["euler"] == 1  # of the closed cubes, which touch


def test_holes_up_to_the_bridge_are_no_way_out():
    """r > (h^2 + w^2/4) / w, give or take 1.6 voxels: piercing a shell gains nothing,
    a mouth is left open.
    """
    assert solids.fill(shell(1.8 / N), 3.2).sum() > 1.5 * shell().sum()
    assert solids.fill(shell(8 / N), 3.2).sum() == shell(8 / N).sum()
    pierced, closed = (solids.score(shape, Rules(leak=3.2)) for shape in (shell(1.8 / N), shell()))
    assert pierced.inner == pytest.approx(closed.inner, abs=0.02)


def test_the_reward_prefers_a_correction_to_a_blob():
    sick = SHAPES["leaky"]
    cured = ball(0.3)
    blobs = (ball(0.45), box((-0.3, 0.5), (-0.3, 0.5), (-0.3, 0.5)), np.roll(ball(0.3), 9, axis=0))
    as_it_is = solids.reward(sick, sick)
    correction = solids.reward(cured, sick)
    assert correction.reward > 0.95 and correction.reward > as_it_is.reward + 0.1
    for blob in blobs:
        blob_reward = solids.reward(blob, sick)
        assert blob_reward.score.solid > 0.9 and blob_reward.reward < as_it_is.reward / 2
    assert solids.reward(sick & ~ball(0.05, (0.42, 0.42, 0.42)), sick).reward > as_it_is.reward


def test_a_thread_joins_nothing_and_a_leg_of_one_voxel_carries_nothing():
    apart = ball(0.2, (-0.2, 0, 0)) | ball(0.1, (0.25, 0, 0))
    threaded, joined = (apart | (np.hypot(Y, Z) < thick / N) & (np.abs(X) < 0.3) for thick in (0.8, 2.2))
    scores = [solids.score(shape).main for shape in (apart, threaded, joined)]
    assert scores[1] < scores[0] + 0.02 and scores[2] == pytest.approx(1)
    top = box((-0.3, 0.3), (0.1, 0.2), (-0.3, 0.3)) | box((-0.3, -0.2), (-0.3, 0.2), (-0.3, 0.3))
    leg = box((0.2, 0.2 + 1.01 / N), (-0.3, 0.2), (-1.01 / N, 0.01))
    thick = box((0.15, 0.25), (-0.3, 0.2), (-0.1, 0.1))
    assert (
        leg.any(axis=1).sum() <= 2 and solids.score(top | thick).stand > solids.score(top | leg).stand + 0.2
    )


def test_empty_grids_score_zero_and_other_arrays_are_rejected():
    empty = np.zeros((8, 8, 8), dtype=bool)
    assert solids.score(empty) == solids.NOTHING and solids.reward(empty, shell()[:8, :8, :8]).reward == 0
    assert solids.reward(empty, empty).reward == 0 and not solids.hole_caps(empty, 5).any()
    assert solid_loss(torch.full((1, 8, 8, 8), -1.0), 0.0).item() == 0
    with raising("256", "257"):
        solids.score(np.ones((257, 2, 2), dtype=bool))
    with raising("bool", "float64"):
        solids.score(np.ones((8, 8, 8)))
    with raising("finite"):
        solids.occupied(np.full((2, 2, 2), np.nan), 0)
    with raising("[48, 48, 48]", "[47, 48, 48]"):
        solids.reward(shell(), ball(0.3)[1:])
    with raising("weights", "(0, 0, 0, 0)"):
        Rules(weights=(0, 0, 0, 0))


def test_large_grids_become_small_ones_by_majority():
    large = ball(0.3).repeat(3, axis=0).repeat(3, axis=1).repeat(3, axis=2)
    large[0, 0, 0] = True  # a speck
    assert (solids.reduced(large, N) == ball(0.3)).all() and solids.reduced(ball(0.3)).shape == (N,) * 3
    assert solids.reduced(np.ones((65, 3, 3), dtype=bool)).shape == (33, 2, 2)


def test_weights_leave_terms_out():
    leaning = SHAPES["two"]
    score = solids.score(leaning, OBJECTS)
    head = solids.score(leaning, HEADS)
    assert head.solid == pytest.approx((head.main * head.inner * head.thin) ** (1 / 3))
    assert score.solid == pytest.approx(
        (score.main * score.inner * score.thin * max(score.stand, 0.01)) ** 0.25
    )


@pytest.mark.parametrize("shape", [ball(0.3), tube(), box((-0.3, 0.3), (-0.3, 0.3), (-0.05, 0.05)), shell()])
def test_there_is_nothing_to_mend_of_a_sound_shape(shape):
    density = torch.from_numpy(np.where(shape, 2.0, -2.0)).float()[None].requires_grad_(True)
    loss = solid_loss(density, 0.0).sum()
    loss.backward()
    assert loss.item() == 0 and not density.grad.any()


def test_a_hole_is_mended_and_a_mouth_is_kept():
    sick = tube(2.2 / N) | ball(0.06, (0.42, 0.42, 0.42))
    distance = ndimage.distance_transform_edt(~sick) - ndimage.distance_transform_edt(sick)
    density = torch.from_numpy(-distance * 3).float().clamp(-8, 8)
    for _ in range(60):
        density.requires_grad_(True)
        (gradient,) = torch.autograd.grad(solid_loss(density[None], 0.0).sum(), density)
        if not gradient.any():
            break
        density = (density - gradient / gradient.abs().max()).detach()
    solid = (density > 0).numpy()
    assert ndimage.label(solid)[1] == 1 and not solids.hole_caps(solid, 5).any() and solids.euler(solid) == 1
    assert (solid & ~sick & ~tube()).sum() == 0  # the mouth is as it was
    assert (solid & tube()).sum() > 0.995 * tube().sum()


def test_the_loss_determines_the_density_up_to_its_unit():
    sick = SHAPES["leaky"]
    distance = torch.from_numpy(
        ndimage.distance_transform_edt(sick) - ndimage.distance_transform_edt(~sick)
    ).float()[None]
    small, large = (solid_loss(unit * distance + 10, 10.0) for unit in (1.0, 50.0))
    assert small.item() == pytest.approx(large.item(), rel=1e-4) and small.item() > 0
    assert slope_at(distance[0], 0.0) == pytest.approx(2, abs=0.01)  # from -1 to 1
    hollow = torch.from_numpy(np.where(shell(), 2.0, -2.0)).float()[None]
    assert solid_loss(hollow, 0.0, fill_hollows=True).item() > 0
