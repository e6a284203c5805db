"""Measures of heads of people: the true head is best, a blurred one worse, a damaged one worse still, and no
filter makes it good.
"""

from functools import partial

import numpy as np
import pytest
import scipy.ndimage
import torch

from eg3d_rlhf.measures import people as measures
from training.heads import people, people_mesh
from training.heads.people_damage import damaged, kinds

N = 40  # points per axis
VOXEL = 1 / N
SOFT = 0.75 * N / 64  # points; a blur of .75 voxel of 64^3


@pytest.fixture(scope="module")
def heads():
    """Latents whose back is cut off, and the distances of their whole heads."""
    latents = people.scaled(np.random.default_rng(3).standard_normal((2, people.LATENT)))
    return latents, [people_mesh.head_grid(head, N) for head in people.named_people(latents)]


@pytest.fixture(scope="module")
def scans(heads):
    latents, wholes = heads
    quality = torch.from_numpy(latents[:, 46:]).float()
    quality[:, 0], quality[:, 1] = 2.0, -1.0
    assert kinds(quality)[:, 0].min() > 0.99
    points = torch.from_numpy(people_mesh.grid_points(N).reshape(1, -1, 3)).float().expand(2, -1, -1)
    distance = torch.from_numpy(np.stack(wholes).reshape(2, -1)).float()
    return damaged(points, distance, quality).reshape(2, N, N, N).numpy()


def blurred(whole: np.ndarray, voxels: float) -> np.ndarray:
    """As a blur of the density leaves it, which is bounded on both sides of the surface."""
    return scipy.ndimage.gaussian_filter(np.clip(whole, -0.03, 0.03), voxels)


def closed(values: np.ndarray, radius: float) -> np.ndarray:
    room = int(radius) + 2
    padded = np.pad(values < 0, room)
    grown = scipy.ndimage.distance_transform_edt(~padded) <= radius
    kept = scipy.ndimage.distance_transform_edt(grown) > radius
    return np.where(kept[room:-room, room:-room, room:-room], -1.0, 1.0)


@pytest.fixture
def coarse(monkeypatch):
    """Tolerances in the voxels of these grids."""
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
    away = np.linalg.norm(measures.surface_points(ball) - [0, 0, -0.1], axis=1)
    np.testing.assert_allclose(away, 0.2, atol=0.002)
    depth = measures.face_depth(ball)
    assert np.nanmax(depth) == pytest.approx(0.1, abs=0.003)


@pytest.mark.usefixtures("coarse")
def test_the_true_head_is_best_a_blurred_one_worse_a_damaged_one_worse_still(heads, scans):
    for whole, scan in zip(heads[1], scans, strict=True):
        shapes = (whole, blurred(whole, 0.75), blurred(whole, 2.0), scan)
        errors = [measures.volume_error(shape, whole).total for shape in shapes]
        assert errors[0] == 0 < errors[1] < errors[2] < errors[3]
        near = [measures.surfaces(shape, whole) for shape in shapes]
        scores = [one["fine"] for one in near]
        assert scores[0] == 1 and scores[0] > scores[1] > scores[2] and scores[1] > scores[3]
        wide = [one["fscore"] for one in near]
        assert wide[0] == 1 and min(wide[:3]) > wide[3]


@pytest.mark.usefixtures("coarse")
def test_a_filter_goes_at_most_half_way(heads, scans):
    for whole, scan in zip(heads[1], scans, strict=True):
        filters = [blurred(scan, 0.75), blurred(scan, 1.5), closed(scan, 3), closed(scan, 5)]
        assert (
            min(measures.volume_error(shape, whole).total for shape in filters)
            > measures.volume_error(scan, whole).total / 2
        )
        best, before = (
            max(measures.surfaces(shape, whole)["fscore"] for shape in shapes) for shapes in (filters, [scan])
        )
        assert best - before < (1 - before) / 2


def test_what_is_done_behind_leaves_the_front_and_the_face(heads, scans):
    known = [measures.face_relief(whole) for whole in heads[1]]
    for whole, scan in zip(heads[1], scans, strict=True):
        assert measures.volume_error(scan, whole, measures.in_front).total < 0.01
        assert measures.surfaces(scan, whole)["fscore_front"] > 0.98
        np.testing.assert_allclose(measures.face_depth(scan), measures.face_depth(whole), atol=0.2 * VOXEL)
    reliefs = [measures.face_relief(scan) for scan in scans]
    alike = np.array([[measures.relief_correlation(one, other) for other in known] for one in reliefs])
    assert (alike.argmax(axis=1) == np.arange(len(known))).all()
    assert measures.relief_correlation(known[0], measures.face_relief(blurred(heads[1][0], 1.5))) < 0.999


@pytest.mark.parametrize("measure", measures.MEASURES.values(), ids=lambda measure: measure.name)
def test_a_measure_of_the_back_ranks_true_heads_before_blurred_ones_and_scans_and_no_filter_is_half_way(
    measure, heads, scans
):
    wholes = np.stack(heads[1])
    better = 1 if measure.better == "higher" else -1
    of = lambda shapes: better * measure.values(measures.compared(np.stack(shapes), wholes))  # noqa: E731
    true = of(wholes)
    soft = of([blurred(whole, SOFT) for whole in wholes])
    broken = of(scans)
    assert true.mean() > soft.mean() and (soft > broken).all()
    filters = [
        partial(blurred, voxels=0.75),
        partial(blurred, voxels=1.5),
        partial(closed, radius=3),
        partial(closed, radius=5),
    ]
    best = max(of([made(scan) for scan in scans]).mean() for made in filters)
    assert best - broken.mean() <= (true.mean() - broken.mean()) / 2


@pytest.mark.parametrize("measure", measures.FRONT_MEASURES.values(), ids=lambda measure: measure.name)
def test_a_measure_of_the_front_ranks_true_heads_before_blurred_ones_and_spares_scans(measure, heads, scans):
    wholes = np.stack(heads[1])
    better = 1 if measure.better == "higher" else -1
    true, soft, broken = (
        better * measure.values(measures.compared(np.stack(shapes), wholes))
        for shapes in (wholes, [blurred(whole, SOFT) for whole in wholes], scans)
    )
    assert (true > soft).all() and (broken > soft).all()


def test_a_shape_without_a_surface_has_the_worst_of_each_measure(heads):
    whole = heads[1][0]
    empty = np.ones_like(whole)
    found = measures.surfaces(empty, whole)
    assert found["completeness"] == 0 and found["distance"] == measures.FARTHEST
    assert measures.relief_amplitude(empty, whole) == 0
