"""Measures of heads rank the ground-truth head first, then blurred ones, then damaged ones; filters do
not help much.
"""

from functools import partial

import numpy as np
import pytest
import scipy.ndimage
import torch

from eg3d_rlhf.measures import people as measures
from training.heads import people, people_mesh
from training.heads.people_damage import damaged_distance, kinds

N = 40  # points per axis
VOXEL = 1 / N
SOFT = 0.75 * N / 64  # points of this grid; a blur of .75 voxel of 64^3


@pytest.fixture(scope="module")
def heads():
    """Return latents whose heads are cut off at the back in scans, and the distances of their
    ground-truth heads.
    """
    latents = people.normalise_latents(np.random.default_rng(3).standard_normal((2, people.LATENT)))
    return latents, [people_mesh.head_grid(head, N) for head in people.heads_from_latents(latents)]


@pytest.fixture(scope="module")
def scans(heads):
    latents, intact_heads = heads
    quality = torch.from_numpy(latents[:, 46:]).float()
    quality[:, 0], quality[:, 1] = 2.0, -1.0
    assert kinds(quality)[:, 0].min() > 0.99
    points = torch.from_numpy(people_mesh.grid_points(N).reshape(1, -1, 3)).float().expand(2, -1, -1)
    distance = torch.from_numpy(np.stack(intact_heads).reshape(2, -1)).float()
    return damaged_distance(points, distance, quality).reshape(2, N, N, N).numpy()


def blurred(head: np.ndarray, voxels: float) -> np.ndarray:
    """Blur a head as if its density were blurred, which is bounded on both sides of the surface."""
    return scipy.ndimage.gaussian_filter(np.clip(head, -0.03, 0.03), voxels)


def morphologically_closed(values: np.ndarray, radius: float) -> np.ndarray:
    margin = int(radius) + 2
    padded = np.pad(values < 0, margin)
    grown = scipy.ndimage.distance_transform_edt(~padded) <= radius
    kept = scipy.ndimage.distance_transform_edt(grown) > radius
    return np.where(kept[margin:-margin, margin:-margin, margin:-margin], -1.0, 1.0)


@pytest.fixture
def coarse(monkeypatch):
    """Set tolerances in voxels of these grids."""
    monkeypatch.setattr(measures, "VOXEL", VOXEL)
    monkeypatch.setattr(measures, "FINE", VOXEL / 4)


def test_volumes_of_known_shapes():
    points = people_mesh.grid_points(N)
    ball = np.linalg.norm(points - [0, 0, -0.1], axis=3) - 0.2
    half = np.maximum(ball, points[..., 0])
    error = measures.volume_error(half, ball)
    assert error.missing == pytest.approx(0.5, abs=0.02) and error.extra == 0
    assert measures.volume_error(ball, half).extra == pytest.approx(1.0, abs=0.05)
    assert measures.surfaces(ball, ball)["fscore"] == 1
    assert measures.surfaces(np.ones_like(ball), ball)["fscore"] == 0
    radii = np.linalg.norm(measures.surface_points(ball) - [0, 0, -0.1], axis=1)
    np.testing.assert_allclose(radii, 0.2, atol=0.002)
    depth = measures.face_depth(ball)
    assert np.nanmax(depth) == pytest.approx(0.1, abs=0.003)


@pytest.mark.usefixtures("coarse")
def test_the_intact_head_is_best_a_blurred_one_worse_and_a_damaged_one_worse_still(heads, scans):
    for head, scan in zip(heads[1], scans, strict=True):
        shapes = (head, blurred(head, 0.75), blurred(head, 2.0), scan)
        errors = [measures.volume_error(shape, head).total for shape in shapes]
        assert errors[0] == 0 < errors[1] < errors[2] < errors[3]
        near = [measures.surfaces(shape, head) for shape in shapes]
        scores = [scores_of_shape["fine"] for scores_of_shape in near]
        assert scores[0] == 1 and scores[0] > scores[1] > scores[2] and scores[1] > scores[3]
        wide = [scores_of_shape["fscore"] for scores_of_shape in near]
        assert wide[0] == 1 and min(wide[:3]) > wide[3]


@pytest.mark.usefixtures("coarse")
def test_a_filter_removes_at_most_half_of_the_error(heads, scans):
    for head, scan in zip(heads[1], scans, strict=True):
        filters = [
            blurred(scan, 0.75),
            blurred(scan, 1.5),
            morphologically_closed(scan, 3),
            morphologically_closed(scan, 5),
        ]
        assert (
            min(measures.volume_error(shape, head).total for shape in filters)
            > measures.volume_error(scan, head).total / 2
        )
        best, before = (
            max(measures.surfaces(shape, head)["fscore"] for shape in shapes) for shapes in (filters, [scan])
        )
        assert best - before < (1 - before) / 2


def test_damage_at_the_back_leaves_the_front_and_the_face(heads, scans):
    known = [measures.face_relief(head) for head in heads[1]]
    for head, scan in zip(heads[1], scans, strict=True):
        assert measures.volume_error(scan, head, measures.in_front).total < 0.01
        assert measures.surfaces(scan, head)["fscore_front"] > 0.98
        np.testing.assert_allclose(measures.face_depth(scan), measures.face_depth(head), atol=0.2 * VOXEL)
    reliefs = [measures.face_relief(scan) for scan in scans]
    alike = np.array([[measures.relief_correlation(relief, other) for other in known] for relief in reliefs])
    assert (alike.argmax(axis=1) == np.arange(len(known))).all()
    assert measures.relief_correlation(known[0], measures.face_relief(blurred(heads[1][0], 1.5))) < 0.999


@pytest.mark.parametrize("measure", measures.MEASURES.values(), ids=lambda measure: measure.name)
def test_a_measure_of_the_back_ranks_intact_heads_first_and_filters_stay_below_half_way(
    measure, heads, scans
):
    intact_heads = np.stack(heads[1])
    better = 1 if measure.better == "higher" else -1

    def score(shapes):
        return better * measure.values(measures.compared(np.stack(shapes), intact_heads))

    intact = score(intact_heads)
    blurred_heads = score([blurred(head, SOFT) for head in intact_heads])
    defective = score(scans)
    assert intact.mean() > blurred_heads.mean() and (blurred_heads > defective).all()
    filters = [
        partial(blurred, voxels=0.75),
        partial(blurred, voxels=1.5),
        partial(morphologically_closed, radius=3),
        partial(morphologically_closed, radius=5),
    ]
    best = max(score([made(scan) for scan in scans]).mean() for made in filters)
    assert best - defective.mean() <= (intact.mean() - defective.mean()) / 2


@pytest.mark.parametrize("measure", measures.FRONT_MEASURES.values(), ids=lambda measure: measure.name)
def test_a_measure_of_the_front_ranks_intact_heads_and_scans_before_blurred_heads(measure, heads, scans):
    intact_heads = np.stack(heads[1])
    better = 1 if measure.better == "higher" else -1
    intact, blurred_heads, defective = (
        better * measure.values(measures.compared(np.stack(shapes), intact_heads))
        for shapes in (intact_heads, [blurred(head, SOFT) for head in intact_heads], scans)
    )
    assert (intact > blurred_heads).all() and (defective > blurred_heads).all()


def test_a_shape_without_a_surface_has_the_worst_of_each_measure(heads):
    head = heads[1][0]
    empty = np.ones_like(head)
    values = measures.surfaces(empty, head)
    assert values["completeness"] == 0 and values["distance"] == measures.FARTHEST
    assert measures.relief_amplitude(empty, head) == 0
