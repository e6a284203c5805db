"""Filters without labels: what they close, cut off and leave, and which of them is best."""

import numpy as np
import pytest

from eg3d_rlhf.evaluation.filters import FILTERS, best_post_processing, evaluate_filters
from training.heads.people_mesh import grid_points

N = 32
POINTS = grid_points(N)


def ball(centre=(0.0, 0.0, -0.1), radius=0.25) -> np.ndarray:
    return np.linalg.norm(POINTS - centre, axis=-1) - radius


def holed(radius: float) -> np.ndarray:
    """A ball with a channel from behind to its middle."""
    channel = np.maximum(np.hypot(POINTS[..., 0], POINTS[..., 1]) - radius, POINTS[..., 2] + 0.1)
    return np.maximum(ball(), -channel)


def solid(values: np.ndarray) -> int:
    return int((values < 0).sum())


@pytest.mark.parametrize("name", FILTERS)
def test_a_whole_ball_stays(name):
    whole = ball()
    made = FILTERS[name](ball())
    assert made.shape == whole.shape
    assert np.abs(solid(made) / solid(whole) - 1) < (0.25 if name == "blur 2" else 0.1)
    if not name.startswith("blur"):
        kept = (made < 0) == (whole < 0)
        # its surface keeps its place between the points
        np.testing.assert_array_equal(made[kept], whole[kept])


@pytest.mark.parametrize("name", FILTERS)
def test_nothing_stays_nothing(name):
    assert solid(FILTERS[name](np.ones((N, N, N)))) == 0


@pytest.mark.parametrize("name", [name for name in FILTERS if "largest" in name])
def test_a_floater_goes(name):
    floater = ball((0.0, 0.42, 0.42), 0.06)
    assert solid(floater) > 0
    kept = FILTERS[name](np.minimum(ball(), floater))
    assert solid(np.maximum(kept, floater)) == 0 and solid(kept) >= solid(ball()) * 0.99


@pytest.mark.parametrize(
    ("name", "radius", "closes"),
    [
        ("closing 4", 0.04, True),
        ("closing 4", 0.12, False),
        ("closing 11", 0.12, True),
        ("convex hull", 0.12, True),
        ("fill holes", 0.04, False),
        ("largest part, closing 11", 0.12, True),
    ],
)
def test_a_hole_closes_that_the_ball_does_not_enter(name, radius, closes):
    lacking = solid(ball()) - solid(holed(radius))
    left = solid(np.maximum(ball(), -FILTERS[name](holed(radius))))
    assert left < 0.35 * lacking if closes else left > 0.5 * lacking


def test_hollows_fill_and_what_one_side_lacks_the_other_lends():
    hollow = np.maximum(ball(), -ball(radius=0.15))
    (fill,) = (change for name, change in FILTERS.items() if name.startswith("fill"))
    assert solid(hollow) < solid(fill(hollow)) == solid(ball())
    half = np.maximum(ball(), POINTS[..., 0])
    assert solid(FILTERS["mirror"](half)) == solid(ball())


def test_the_best_filter_closes_most_and_the_best_that_spares_harms_none():
    whole = np.stack([ball(), np.minimum(ball(), ball((0.0, -0.3, 0.0), 0.1)), ball(radius=0.2)])
    # a wide channel, a back cut off, and a shape that lacks nothing
    shapes = np.stack([holed(0.17), np.maximum(whole[1], POINTS[..., 2] * -1 - 0.22), whole[2]])
    trial = evaluate_filters(shapes, whole)
    errors = {name: error for name, (error, _) in trial.items()}
    assert set(trial) == set(FILTERS)
    assert errors[best_post_processing(trial, spares_intact=False)] == min(errors.values())
    spared = best_post_processing(trial, spares_intact=True)
    assert trial[spared][1] == min(harmed for _, harmed in trial.values()) and errors[spared] >= min(
        errors.values()
    )
