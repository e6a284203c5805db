"""From a record to a mesh in the browser's format, with the bundled generator and a tiny one."""

import gzip
import io
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
from scipy.ndimage import gaussian_filter

from eg3d_rlhf.core import bundled
from eg3d_rlhf.generators import load_generator
from eg3d_rlhf.geometry.mesh import count_edges, decimate, extract_mesh, face_volumes, parts
from eg3d_rlhf.people.label.drawing import ShapeDrawer, surface, visible_parts, within_budget
from tests.people.label.plans import SHAPE, decode_mesh


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
    drawer = ShapeDrawer()
    vertices, faces = surface(drawer.generator(shape).generator, shape)
    data = drawer.mesh(shape)
    found, found_faces = decode_mesh(gzip.decompress(data))
    assert np.array_equal(found_faces, faces) and np.abs(found - vertices).max() < 1 / 65535
    assert 1800 <= len(faces) <= 2200 and count_edges(faces).watertight and face_volumes(vertices, faces).sum() > 0.01
    assert data == drawer.mesh(shape)


@pytest.mark.parametrize("degradation", ["floaters", "holes", "rough"])
def test_a_damaged_shape_is_another_one_of_the_same_size(generator, shape, degradation):
    vertices, faces = surface(generator.generator, replace(shape, degradation=degradation))
    clean, _ = surface(generator.generator, shape)
    assert len(faces) <= 2200
    assert (parts(faces, len(vertices))[0] > 3) is (degradation == "floaters")
    assert np.abs(vertices).max() < 0.45 and np.ptp(clean, axis=0).min() < np.ptp(vertices, axis=0).max()


def test_hollows_and_dust_are_left_out_and_loose_parts_kept():
    vertices, faces = balls((-0.4, 0.5), (-0.4, -0.2), (0.6, 0.15), (11 / 12, 0.03))
    assert parts(faces, len(vertices))[0] == 4
    shown, shown_faces = visible_parts(vertices, faces)
    assert parts(shown_faces, len(shown))[0] == 2
    assert face_volumes(shown, shown_faces).sum() == pytest.approx(4 / 3 * np.pi * (0.5**3 + 0.15**3), rel=0.02)
    assert len(np.unique(shown_faces)) == len(shown)


def test_the_number_of_triangles_is_kept_even_where_the_mesh_must_be_opened():
    rng = np.random.default_rng(0)
    axis = np.linspace(-1, 1, 40)
    vertices, faces = extract_mesh(gaussian_filter(rng.normal(size=(40, 40, 40)), 1.5), (axis, axis, axis), 0.0)  # a sponge
    with pytest.warns(UserWarning, match="not stay closed"):
        assert len(decimate(vertices, faces, 1500)[1]) > 2200
    _, fewer = within_budget(vertices, faces, 2000)
    assert len(faces) > 20_000 and 0 < len(fewer) <= 2200


def test_a_level_that_is_not_crossed_is_told(generator, shape):
    with pytest.raises(ValueError, match="both sides of level"):
        ShapeDrawer().mesh(replace(shape, level=1e6))


def test_other_weights_than_the_campaigns_are_refused(shape, tiny_networks):
    with pytest.raises(ValueError, match="Restore the file"):
        ShapeDrawer().mesh(replace(shape, source=str(tiny_networks)))


def test_the_picture_is_that_of_the_latent(generator, shape):
    drawer = ShapeDrawer()
    first, again, other = (drawer.picture(replace(shape, seed=seed)) for seed in (7, 7, 8))
    assert first == again != other
    with PIL.Image.open(io.BytesIO(first)) as image:
        assert image.format == "PNG" and image.size == (64, 64) and np.asarray(image).std() > 10


def test_generators_are_loaded_once_and_two_are_kept(generator, shape, tiny_networks):
    drawer = ShapeDrawer()
    tiny = replace(shape, source=str(tiny_networks), generator=load_generator(tiny_networks).hash)
    one, two = drawer.generator(shape), drawer.generator(tiny)
    assert one.hash != two.hash and drawer.generator(shape) is one and drawer.generator(tiny) is two
