"""Compare normal maps with spheres and ground-truth heads, and test that blurring shapes does not lower
the distance.
"""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from builders.shapes import EDGES, density_field, true_grids
from eg3d_rlhf.generators import latents, load_generator, ws_of_seeds
from eg3d_rlhf.measures.people import shape_grids
from eg3d_rlhf.measures.shape_features import LOWEST, RESOLUTION, WIDTH, YAWS, ShapeFeatures, normal_maps
from training.heads.people_mesh import grid_points

N = 32


def sphere(radius: float, centre=(0.0, 0.0, 0.0)) -> torch.Tensor:
    """Return signed distances [1, n, n, n]."""
    return torch.from_numpy(np.linalg.norm(grid_points(64) - np.array(centre), axis=-1) - radius)[None]


@pytest.mark.parametrize("centre", [(0.0, 0.0, 0.0), (0.06, 0.05, -0.04)])
def test_normals_of_a_sphere(centre):
    radius = 0.15
    line = (torch.arange(RESOLUTION) + 0.5) / RESOLUTION * WIDTH
    v, u = torch.meshgrid((LOWEST + line).flip(0), line - WIDTH / 2, indexing="ij")
    v = v - centre[1]
    for yaw, maps in zip(YAWS, normal_maps(sphere(radius, centre))[0], strict=True):
        # the view's right is (cos, 0, -sin)
        across = u - (centre[0] * math.cos(yaw) - centre[2] * math.sin(yaw))
        inside = across**2 + v**2 <= (0.85 * radius) ** 2
        expected = torch.stack([across, v, (radius**2 - across**2 - v**2).clamp_min(0).sqrt()]) / radius
        angle = torch.rad2deg((maps[:3] * expected).sum(dim=0)[inside].clamp(-1, 1).acos())
        assert angle.max() < 6 and angle.mean() < 1.5
        assert maps[3].sum() * (WIDTH / RESOLUTION) ** 2 == pytest.approx(math.pi * radius**2, rel=0.03)


def test_an_empty_cube_and_a_full_one():
    assert normal_maps(torch.full((1, N, N, N), 5.0)).eq(0).all()
    full = normal_maps(torch.full((1, N, N, N), -500.0), yaws=(0.0,))[0, 0]
    assert full[3].eq(1).all() and full[2, 1:-1, 1:-1].mean() > 0.99
    with pytest.raises(ValueError, match="normal_maps"):
        normal_maps(torch.zeros(1, 8, 8, 9))


@pytest.fixture(scope="module")
def heads():
    z = latents(range(50), 64).numpy()
    return z, true_grids(z[:3], N)


def test_maps_do_not_depend_on_unit_or_ramp_and_show_the_back(heads):
    _, distances = heads
    maps, halved = (normal_maps(torch.from_numpy(scale * distances[:2])) for scale in (1.0, 0.5))
    torch.testing.assert_close(maps, halved, atol=1e-3, rtol=0)
    dense = normal_maps(torch.from_numpy(density_field(distances[:2], EDGES[-1])))
    assert (maps - dense).abs().mean() < 0.03
    back = YAWS.index(math.pi)
    # The head is cut off at z = -0.08.
    cut = np.maximum(distances[:1], -0.08 - grid_points(N)[..., 2]).astype(np.float32)
    changed = (normal_maps(torch.from_numpy(cut)) - maps[:1]).abs().mean(dim=(0, 2, 3, 4))
    assert changed[0] < 0.01 and changed[back] > 5 * changed[0]


@pytest.mark.long
def test_blurring_the_generators_shapes_increases_the_distance():
    generator = load_generator().generator
    features = ShapeFeatures.load()
    with torch.no_grad():
        shapes = np.concatenate(
            [shape_grids(generator.field(ws)) for ws in ws_of_seeds(generator, range(80)).split(4)]
        )
    blurred = np.stack([gaussian_filter(shape, 0.75) for shape in shapes])
    before, after = (
        features.frechet(torch.cat([normal_maps(torch.from_numpy(s[None])) for s in part]))
        for part in (shapes, blurred)
    )
    assert after > before
