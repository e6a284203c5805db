"""Look at a few samples of a generator: range, surface, proposed level, and no effect on random numbers."""

import numpy as np
import pytest
import torch

from eg3d_rlhf.core.field import Bounds
from eg3d_rlhf.generators import load_generator
from eg3d_rlhf.generators.density_samples import default_seeds, sample_density
from eg3d_rlhf.geometry.mesh import extract_mesh
from tests.generators.density_balls import BallGenerator
from tests.rejections import raising


def test_range_and_share_of_a_known_ball():
    samples = sample_density(BallGenerator(radius=0.25), [3, 4, 5])
    check = samples.check(10.0)
    assert check.seeds == (3, 4, 5) and (check.with_surface, check.proposed_level) == (3, 10.0)
    # 50 of the 63 cells of an edge lie inside the border that meshes leave empty
    assert check.share == pytest.approx(4 / 3 * np.pi * 0.25**3 / (50 / 63) ** 3, rel=0.03)
    assert check.highest == pytest.approx(60, abs=3) and check.problem() is None
    distances = (samples.surface_points(10.0) - 0.5).norm(dim=1)
    assert len(distances) > 1000 and (distances - 0.25).abs().max() < 2e-3


@pytest.mark.parametrize("peak", [-3.0, pytest.param(9.0, marks=pytest.mark.long), 0.02])
def test_the_proposed_level_gives_a_surface(peak):
    """The density of another scale: nothing crosses the level 10."""
    generator = BallGenerator(peak=peak, radius=0.3)
    generator.slope = 10 * abs(peak)
    check = sample_density(generator).check(generator.level)
    assert (check.with_surface, check.share) == (0, 0.0)
    level = check.proposed_level
    assert check.proposed_with_surface == 8 and 0.02 < check.proposed_share < 0.2
    assert f"--set level={level:g}" in check.problem() and f"{check.lowest:.4g}" in check.problem()
    samples = sample_density(generator, [0])
    vertices, faces = extract_mesh(samples.cubes[0], samples.spec, level)
    assert len(faces) > 100 and np.abs(vertices).max() < 0.45


def test_a_density_above_the_level_everywhere_is_no_surface():
    check = sample_density(BallGenerator(peak=1e4, radius=0.3, level=-1e5)).check(-1e5)
    assert (check.with_surface, check.share) == (0, 1.0) and check.proposed_with_surface == 8


def test_a_constant_density_has_no_proposed_level():
    generator = BallGenerator()
    generator.slope = 0
    check = sample_density(generator).check(10.0)
    assert check.proposed_level is None and check.problem() is not None


def test_a_density_that_is_not_finite_is_an_error():
    with raising("NaN"):
        sample_density(BallGenerator(peak=float("nan")))


def test_finite_generators_have_fewer_samples():
    generator = BallGenerator()
    generator.count = 5
    assert default_seeds(generator) == [0, 1, 2, 3, 4] and default_seeds(generator, 3) == [3, 4]


def test_random_numbers_of_a_run_do_not_change():
    loaded = load_generator()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    samples = sample_density(loaded.generator, [0, 1])
    assert torch.equal(torch.rand(3), expected)
    again = sample_density(loaded.generator, [1])
    assert torch.equal(samples.cubes[1], again.cubes[0]) and samples.cubes.shape == (2, 64, 64, 64)


def test_points_are_placed_in_the_cube_of_the_generator():
    generator = BallGenerator(centre=(0.4, -0.2, 1.1), bounds=Bounds(2.0, (0.5, 0.0, 1.0)))
    points = sample_density(generator, [0]).surface_points(10.0) * 2 - 1 + torch.tensor([0.5, 0.0, 1.0])
    assert (points.mean(dim=0) - torch.tensor([0.4, -0.2, 1.1])).abs().max() < 0.01
