"""Point maps of depth maps: a plane and a sphere, the directions of the axes, and errors."""

import re

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from eg3d_rlhf.geometry.point_maps import depth_to_points, focal_of
from eg3d_rlhf.modes.jobs import command_of
from tests.rejections import raising, rejected

COLUMNS = 40
ROWS = 30
FOCAL = focal_of(60, COLUMNS)


def rays() -> np.ndarray:
    """Return the direction of each pixel's ray with z = 1, x to the left and y up, [h, w, 3]."""
    u, v = np.meshgrid(np.arange(COLUMNS) + 0.5, np.arange(ROWS) + 0.5)
    return np.stack([(COLUMNS / 2 - u) / FOCAL, (ROWS / 2 - v) / FOCAL, np.ones_like(u)], 2)


def run(*words):
    return CliRunner().invoke(command_of("data point-maps"), [str(word) for word in words])


def test_the_field_of_view_reaches_the_border_of_the_image():
    assert np.arctan2(COLUMNS / 2, FOCAL) == pytest.approx(np.radians(30))


def test_points_of_a_tilted_plane_lie_on_it():
    normal = np.array([0.3, -0.2, 1.0])
    offset = 4.0
    depth = offset / (rays() @ normal)
    points = depth_to_points(depth, FOCAL)
    assert points.shape == (ROWS, COLUMNS, 3) and points.dtype == np.float32
    np.testing.assert_allclose(points @ normal, offset, rtol=1e-5)
    # x to the left, y up, z forward
    assert points[0, 0, 0] > 0 > points[0, -1, 0] and points[0, 0, 1] > 0 > points[-1, 0, 1]
    assert (points[..., 2] > 0).all()


def test_points_of_a_sphere_lie_on_it_and_the_background_has_none():
    centre = np.array([0.2, -0.1, 3.0])
    radius = 0.8
    directions = rays()
    # |t d - c| = r: the nearer root of t^2 d.d - 2 t d.c + c.c - r^2
    a = (directions**2).sum(2)
    b = directions @ centre
    discriminant = b**2 - a * (centre @ centre - radius**2)
    depth = np.where(discriminant > 0, (b - np.sqrt(np.maximum(discriminant, 0))) / a, 0.0)
    points = depth_to_points(depth, FOCAL)
    hit = discriminant > 0
    assert 50 < hit.sum() < hit.size
    np.testing.assert_allclose(np.linalg.norm(points[hit] - centre, axis=1), radius, rtol=1e-5)
    assert np.isnan(points[~hit]).all()


def test_depths_that_make_no_points_are_rejected():
    for depth, focal, name in (
        (np.zeros((2, 2)), 1.0, "depth"),
        (np.ones((2, 2, 3)), 1.0, "[2, 2, 3]"),
        (np.ones((2, 2)), 0.0, "focal"),
    ):
        with raising(name):
            depth_to_points(depth, focal)


def test_the_command_writes_a_point_map_beside_each_image(tmp_path):
    images = tmp_path / "IMAGES"
    depths = tmp_path / "DEPTHS"
    images.mkdir()
    depths.mkdir()
    for name in ("chair", "lamp"):
        Image.fromarray(np.zeros((ROWS, COLUMNS, 4), np.uint8)).save(images / f"{name}.png")
    millimetres = np.full((ROWS, COLUMNS), 2500, np.uint16)
    millimetres[0, 0] = 0
    Image.fromarray(millimetres).save(depths / "chair.png")
    flags = (depths, f"--images={images}", "--fov=60", "--unit=0.001")
    rejected(run(*flags), "lamp", str(depths))
    assert not list(images.glob("*.npy"))
    np.save(depths / "lamp.npy", np.full((ROWS, COLUMNS), 1000.0))
    done = run(*flags)
    assert done.exit_code == 0 and re.search(r"^2\b", done.output, re.M), done.output
    points = np.load(images / "chair.npy")
    np.testing.assert_allclose(points[1:], depth_to_points(millimetres / 1000, FOCAL)[1:])
    assert np.isnan(points[0, 0]).all() and points[1, 1, 2] == 2.5
    rejected(run(*flags), "chair.npy")
    rejected(run(depths, f"--images={images}"), "--focal", "--fov")
    (images / "chair.npy").unlink()
    Image.fromarray(millimetres.astype(np.uint8)).save(depths / "chair.png")
    rejected(run(*flags), "chair.png", "16")
