"""From a record to a mesh in the browser's format, with the bundled generator and a tiny one."""

import gzip
import io
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
from scipy import ndimage

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.generators import latents, load_generator, ws_of_seeds
from eg3d_rlhf.geometry.mesh import count_edges, decimate, extract_mesh, face_volumes, find_parts
from eg3d_rlhf.people.label.entities import DAMAGES
from eg3d_rlhf.people.label.shape_rendering import (
    ShapeRenderer,
    damage,
    surface,
    visible_parts,
    within_budget,
)
from eg3d_rlhf.preferences.annotator import utility
from tests.people.label.plans import SHAPE, decode_mesh
from tests.rejections import raising
from training.heads.people_mesh import ground_truth_grids


@pytest.fixture(scope="module")
def generator():
    if not bundled.GENERATOR.exists():
        pytest.skip("needs assets/generator.safetensors; restore assets/ from the repository")
    return load_generator()


@pytest.fixture
def shape(generator):
    return replace(SHAPE, generator=generator.hash, resolution=64, triangles=2000)


def balls(*centres_and_radii) -> tuple[np.ndarray, np.ndarray]:
    """Mesh of balls (x, radius); a negative radius is a hollow."""
    axis = np.linspace(-1, 1, 49)
    z, y, x = np.ix_(axis, axis, axis)
    sigma = np.full((49, 49, 49), -1.0)
    for at, radius in centres_and_radii:
        distance = abs(radius) - np.sqrt((x - at) ** 2 + y**2 + z**2)
        sigma = np.maximum(sigma, distance) if radius > 0 else np.minimum(sigma, -distance)
    return extract_mesh(sigma, (axis, axis, axis), 0.0)


def test_the_mesh_is_the_surface_within_the_quantisation(generator, shape):
    renderer = ShapeRenderer()
    vertices, faces = surface(renderer.generator(shape).generator, shape)
    data = renderer.mesh(shape)
    decoded, decoded_faces = decode_mesh(gzip.decompress(data))
    assert np.array_equal(decoded_faces, faces) and np.abs(decoded - vertices).max() < 1 / 65535
    assert (
        1800 <= len(faces) <= 2200
        and count_edges(faces).open == 0
        and face_volumes(vertices, faces).sum() > 0.01
    )
    assert data == renderer.mesh(shape)


@pytest.mark.parametrize("degradation", ["floaters", "holes", "rough"])
def test_a_damaged_shape_is_another_one_of_the_same_size(generator, shape, degradation):
    vertices, faces = surface(generator.generator, replace(shape, degradation=degradation))
    clean, _ = surface(generator.generator, shape)
    assert len(faces) <= 2200
    assert (find_parts(faces, len(vertices))[0] > 3) is (degradation == "floaters")
    assert np.abs(vertices).max() < 0.45 and np.ptp(clean, axis=0).min() < np.ptp(vertices, axis=0).max()


def test_hollows_and_dust_are_left_out_and_loose_parts_kept():
    vertices, faces = balls((-0.4, 0.5), (-0.4, -0.2), (0.6, 0.15), (11 / 12, 0.03))
    assert find_parts(faces, len(vertices))[0] == 4
    shown, shown_faces = visible_parts(vertices, faces)
    assert find_parts(shown_faces, len(shown))[0] == 2
    assert face_volumes(shown, shown_faces).sum() == pytest.approx(
        4 / 3 * np.pi * (0.5**3 + 0.15**3), rel=0.02
    )
    assert len(np.unique(shown_faces)) == len(shown)


def test_the_number_of_triangles_is_kept_even_where_the_mesh_must_be_opened():
    rng = np.random.default_rng(0)
    axis = np.linspace(-1, 1, 40)
    # a sponge
    vertices, faces = extract_mesh(
        ndimage.gaussian_filter(rng.normal(size=(40, 40, 40)), 1.5), (axis, axis, axis), 0.0
    )
    with pytest.warns(UserWarning) as warned:
        assert len(decimate(vertices, faces, 1500)[1]) > 2200
    assert len(warned) == 1 and "1500" in str(warned[0].message)
    _, fewer = within_budget(vertices, faces, 2000)
    assert len(faces) > 20_000 and 0 < len(fewer) <= 2200


def test_a_level_that_is_not_crossed_and_other_weights_are_rejected(shape, tiny_networks):
    with raising("level 1e+06"):
        ShapeRenderer().mesh(replace(shape, level=1e6))
    with raising(tiny_networks.name, shape.generator[:12]):
        ShapeRenderer().mesh(replace(shape, source=str(tiny_networks)))


def test_the_image_is_that_of_the_latent(generator, shape):
    renderer = ShapeRenderer()
    first, again, other = (renderer.image(replace(shape, seed=seed)) for seed in (7, 7, 8))
    assert first == again != other
    with PIL.Image.open(io.BytesIO(first)) as image:
        assert image.format == "PNG" and image.size == (64, 64) and np.asarray(image).std() > 10


# ---- damage for pairs with a known answer: always for the worse, always where it is meant to be, always the
# same

RADIUS = 0.25
SIDE = 64


def ball(level: float, scale: float) -> tuple[np.ndarray, tuple, np.ndarray]:
    """Density of a ball about the origin [X, Y, Z], its axes and its surface;
    `scale` is the density's slope.
    """
    axis = np.linspace(-0.5, 0.5, SIDE)
    x, y, z = np.ix_(axis, axis, axis)
    sigma = (level + scale * (RADIUS - np.sqrt(x**2 + y**2 + z**2))).astype(np.float32)
    vertices, _ = extract_mesh(sigma.transpose(2, 1, 0), (axis, axis, axis), level)
    return sigma, (axis, axis, axis), vertices


@pytest.mark.parametrize("name", DAMAGES)
def test_the_densitys_scale_makes_no_difference(name):
    """The same surface is damaged alike, whether sigma is steep or flat, positive or negative there."""
    inside = []
    for level, scale in ((10.0, 100.0), (-3.0, 5.0), (200.0, 1e5)):
        sigma, axes, surface = ball(level, scale)
        inside.append(damage(name, sigma, axes, level, surface, seed=4) > level)
    assert np.mean(inside[0] != inside[1]) < 1e-3 and np.mean(inside[0] != inside[2]) < 1e-3
    assert np.mean(inside[0] != (ball(10.0, 100.0)[0] > 10)) > 1e-3


def test_floaters_are_loose_parts_and_holes_lie_on_the_side_that_looks_at_the_camera():
    sigma, axes, surface = ball(10.0, 100.0)
    after = damage("floaters", sigma, axes, 10.0, surface, seed=0)
    assert ndimage.label(after > 10)[1] >= 1 + 3
    assert np.all((after > 10)[sigma > 10]) and np.mean(after != sigma) < 0.1
    removed = (sigma > 10) & (damage("holes", sigma, axes, 10.0, surface, seed=0) < 10)
    depth = np.broadcast_to(axes[2], removed.shape)[removed]
    assert removed.sum() > 0.02 * (sigma > 10).sum() and np.mean(depth > 0) > 0.95


@pytest.mark.parametrize("count", [2, pytest.param(40, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", DAMAGES)
def test_the_programmatic_annotator_always_prefers_the_undamaged_shape(generator, count, name):
    n = 48
    seeds = range(10_000, 10_000 + count)
    level = generator.generator.level
    spec = SlabSpec.cube(n, box_warp=(n - 1) / n)  # middles of voxels
    axes = tuple(axis.double().numpy() for axis in spec.axes())
    # [N, D, H, W]
    cubes = (
        generator.generator.field(ws_of_seeds(generator.generator, seeds)).density_grid(spec).detach().numpy()
    )
    intact_grids = ground_truth_grids(latents(seeds, generator.generator.z_dim), n)
    for seed, cube, intact in zip(seeds, cubes, intact_grids, strict=True):
        sigma = np.ascontiguousarray(cube.transpose(2, 1, 0))
        surface, _ = extract_mesh(cube, spec, level)
        worse = damage(name, sigma, axes, level, surface, seed)
        assert utility(level - worse, intact).total < utility(level - sigma, intact).total - 0.01, seed
