"""Distance to the family of heads: nearly zero for its members, and growing with whatever leaves the family."""

import numpy as np
import pytest
import torch

from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.measures.true_heads import OUTLIER, WORST, FitOptions, nearest_heads, surface_points
from training.heads.family import draw_parameters
from training.heads.sdf import head_sdf

SPEC = SlabSpec.cube(48)
QUICK = FitOptions(points=384, starts=2, steps=50)


def _points() -> torch.Tensor:
    x, y, z = SPEC.axes()
    grid = torch.meshgrid(z, y, x, indexing="ij")
    return torch.stack(grid[::-1], dim=-1)  # [D, H, W, 3]


def _sigma(distance: torch.Tensor) -> torch.Tensor:
    return (10 - 500 * distance).clamp(-100, 200)


@pytest.fixture(scope="module")
def shapes():
    rng = np.random.default_rng(11)
    return torch.from_numpy(np.stack([draw_parameters(rng)[0] for _ in range(3)]))


@pytest.fixture(scope="module")
def distances(shapes):
    points = _points().reshape(1, -1, 3).expand(len(shapes), -1, -1)
    return head_sdf(points, shapes).unflatten(1, SPEC.shape)


@pytest.fixture(scope="module")
def members(distances):
    return nearest_heads(_sigma(distances), SPEC, QUICK)


def test_members_are_found(members, shapes):
    assert members.surface.max() < 6e-4  # a voxel is 0.021
    assert members.uncovered.max() < 5e-4
    assert np.abs(members.shape - shapes.numpy()).mean() < 0.15


def _waves(d, amplitude):
    x, y, z = _points().unbind(-1)
    return d + amplitude * torch.sin(70 * x) * torch.sin(75 * y + 1) * torch.sin(65 * z + 2)


def _ball(d, centre, radius):
    return torch.minimum(d, (_points() - torch.tensor(centre)).norm(dim=-1) - radius)


def test_distance_grows_with_the_amplitude_of_waves(distances, members):
    small, large = (nearest_heads(_sigma(_waves(distances, a)), SPEC, QUICK) for a in (0.005, 0.012))
    assert (small.surface > members.surface + 3e-4).all()
    assert (large.surface > small.surface + 5e-4).all()


def test_a_missing_half_is_uncovered(distances, members):
    x = _points()[..., 0]
    half = nearest_heads(_sigma(torch.maximum(distances, x - 0.02)), SPEC, QUICK)
    assert (half.uncovered > members.uncovered + 3e-3).all()


def test_empty_is_the_worst_and_never_nan(distances):
    sigma = _sigma(distances[:1]).repeat(3, 1, 1, 1)
    sigma[0], sigma[2] = -5.0, float("nan")
    fit = nearest_heads(sigma, SPEC, QUICK)
    assert fit.surface[0] == fit.surface[2] == WORST and fit.distance[0] == 2 * WORST
    assert fit.surface[1] < OUTLIER and np.isfinite(fit.distance).all()


def test_shapes_do_not_depend_on_their_batch_and_repeat(distances, members):
    alone = nearest_heads(_sigma(distances[1:2]), SPEC, QUICK)
    np.testing.assert_allclose(alone.surface[0], members.surface[1], rtol=0.05, atol=2e-5)
    again = nearest_heads(_sigma(distances[1:2]), SPEC, QUICK)
    assert (again.surface, again.uncovered) == (alone.surface, alone.uncovered)


def test_surface_points_of_a_sphere_lie_on_it_within_a_fraction_of_a_voxel():
    distance = _points().norm(dim=-1) - 0.3
    points = surface_points(_sigma(distance), SPEC, back=-0.5)
    assert (points.norm(dim=-1) - 0.3).abs().max() < 0.002
    assert len(surface_points(torch.full(SPEC.shape, -1.0), SPEC)) == 0
