"""Measurements of samples: corrected fields, general geometry, and metrics against slow loops."""

import numpy as np
import pytest
import torch

from eg3d_rlhf.core.field import Bounds, Field
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.evaluation.baselines import rungs
from eg3d_rlhf.evaluation.baselines.measurements import (
    CorrectedField,
    changed_share,
    compute_metrics,
    cube_grids,
    cube_points,
    measure_shapes,
)
from training.heads.people_mesh import grid_points

CPU = torch.device("cpu")


class Balls(Field):
    """Balls of several radii in a cube that is not centred at the origin."""

    bounds = Bounds(side=2.0, centre=(0.5, 0.0, -0.25))
    level = 10.0

    def __init__(self, radii):
        self.radii = torch.tensor(radii)

    def __len__(self) -> int:
        return len(self.radii)

    def density(self, points):
        offsets = points - torch.tensor(self.bounds.centre)
        return self.level + 100 * (self.radii[:, None] - offsets.norm(dim=-1).expand(len(self.radii), -1))

    def colour(self, points):
        return torch.full((len(self.radii), points.shape[-2], 3), 0.5)


def test_grids_cover_the_cube_of_the_generator():
    balls = Balls([0.5, 0.25])
    grids = cube_grids(balls, CPU, 24)
    points = cube_points(balls.bounds, 24)
    expected = [balls.level - balls.density(point[None]).numpy()[:, 0] for point in points[::1000]]
    assert np.allclose(grids.reshape(2, -1)[:, ::1000].T, expected, atol=1e-4)
    # volume of a ball in units of the voxel, side 2 / 24
    assert (grids[0] < 0).sum() == pytest.approx(4 / 3 * np.pi * 0.5**3 * 12**3, rel=0.03)


def test_a_corrected_field_has_the_filtered_values_at_the_grid_points():
    balls = Balls([0.5, 0.25])
    grids = cube_grids(balls, CPU, 16)
    filtered = grids + np.random.default_rng(0).normal(size=grids.shape).astype(np.float32)
    corrected = CorrectedField(balls, grids - filtered)
    assert np.allclose(cube_grids(corrected, CPU, 16), filtered, atol=1e-3)
    # without a correction, both ways to evaluate the density are those of the field
    same = CorrectedField(balls, np.zeros_like(grids))
    spec = SlabSpec.from_bounds(balls.bounds, 12)
    assert torch.equal(same.density_grid(spec), balls.density_grid(spec))
    points = spec.points().reshape(-1, 3)
    by_points = corrected.density(points).unflatten(1, spec.shape)
    assert torch.allclose(corrected.density_grid(spec), by_points, atol=1e-4)


def test_loose_and_enclosed_volume():
    points = grid_points(32)
    distance = np.linalg.norm(points, axis=-1)
    hollow = np.abs(distance - 0.25) - 0.06  # a shell
    island = np.linalg.norm(points - 0.42, axis=-1) - 0.06
    measured = measure_shapes(np.stack([hollow, np.minimum(hollow, island)]), None)
    shell_count = (hollow < 0).sum()
    island_count = (island < 0).sum()
    hole_count = (distance <= 0.19).sum()
    assert measured["loose"] == pytest.approx([0, island_count / (shell_count + island_count)])
    assert measured["enclosed"][0] == pytest.approx(hole_count / shell_count, rel=0.02)
    assert "missing" not in measured


def test_metrics_of_the_same_and_of_moved_shapes():
    points = grid_points(32)
    rng = np.random.default_rng(3)
    centres = rng.uniform(-0.05, 0.05, (5, 3))
    grids = np.stack([np.linalg.norm((points - c) * [1, 1.2, 1 + c[0]], axis=-1) - 0.3 for c in centres])
    before = {**measure_shapes(grids, None), "reward": np.arange(5.0)}
    same = compute_metrics(before, before, is_same_sample=True)
    assert same["identity_kept"] == 1 and same["front_moved_voxels"] == 0 and same["variety"] == 1
    # towards the camera by one voxel of 32^3, which is two voxels of 64^3
    moved = {**measure_shapes(np.roll(grids, 1, axis=3), None), "reward": np.arange(5.0) + 1}
    metrics = compute_metrics(before, moved, is_same_sample=True)
    assert metrics["front_moved_voxels"] == pytest.approx(2, abs=0.01) and metrics["reward"] == 3
    other = compute_metrics(before, moved, is_same_sample=False)
    assert other["identity_kept"] is None and other["front_moved_voxels"] is None
    assert "error" not in metrics  # there is no ground truth


def test_changed_share_counts_voxels():
    before = -np.ones((1, 8, 8, 8))
    after = before.copy()
    after[0, :2] = 1
    assert changed_share(before, after, has_back=False) == pytest.approx([2 / 6])
    assert changed_share(before, before, has_back=True) == [0]


def test_rungs_are_listed_from_cheap_to_dear_without_those_that_lack_their_input(tmp_path):
    inputs = rungs.Inputs(network=None, reward=tmp_path, heldout_reward=None, labels=None)
    kinds = [rung.kind for rung in rungs.list_rungs(inputs, 0, 0)]
    assert kinds == sorted(kinds, key=rungs.KINDS.index) and kinds[0] == rungs.NOTHING
    assert not {rungs.STEERING, rungs.NETWORK, rungs.EIGENVECTOR} & set(kinds)
    assert [rung.labels for rung in rungs.list_rungs(inputs, 60, 0) if rung.kind == rungs.STEERING] == [
        25,
        60,
    ]
    assert rungs.label_subsets(2000) == [25, 100, 2000] and rungs.label_subsets(25) == [25]
