"""Cameras: seeded draws of the public defaults, the four fixed sides, and the z-up world of MVDream against its own numbers."""

import json
import math
import re

import numpy as np
import pytest
import torch

from eg3d_rlhf.generators.assets.views import CameraDraws, evenly_around, network_cameras, to_y_up, to_z_up, unit_distance, views_at


@pytest.fixture(scope="module")
def schedules(fixtures_dir):
    folder = fixtures_dir / "distill"
    if not (folder / "schedules.npz").exists():
        pytest.skip("no reference values of cameras (distill/schedules)")
    assert "camera" in json.loads((folder / "schedules.json").read_text())["cases"]
    return np.load(folder / "schedules.npz")


def test_mvdreams_cameras(schedules):
    cases = sorted({name.rsplit("/", 1)[0] for name in schedules.files if name.startswith("camera/")})
    assert cases
    for case in cases:
        n, elevation, first, span = (float(x) for x in re.fullmatch(r"camera/n(\d+)_e(-?\d+)_a(-?\d+)_s(\d+)", case).groups())
        azimuth = first + torch.arange(int(n), dtype=torch.float64) * span / n
        same = torch.ones_like(azimuth)
        ours = views_at(azimuth, elevation * same, same, 40 * same).cameras[:, :16].reshape(-1, 4, 4)
        theirs = torch.from_numpy(schedules[f"{case}/blender"]).reshape(-1, 4, 4)
        assert torch.allclose(to_z_up(ours), theirs, atol=2e-6), case
        assert torch.allclose(to_y_up(theirs), ours, atol=2e-6)
        axes = torch.tensor([1.0, -1.0, -1.0, 1.0])  # their y-up matrix keeps OpenGL's camera axes
        assert torch.allclose(ours * axes, torch.from_numpy(schedules[f"{case}/opengl"]).reshape(-1, 4, 4), atol=2e-6)


def test_the_translation_gets_norm_one_and_the_argument_stays(schedules):
    given = torch.from_numpy(schedules["normalize_camera/camera"])
    kept = given.clone()
    assert torch.allclose(unit_distance(given), torch.from_numpy(schedules["normalize_camera/out"]), rtol=2e-6, atol=1e-6)
    assert torch.equal(given, kept)
    views = CameraDraws().draw(3, torch.Generator().manual_seed(0))
    kept = views.cameras.clone()
    read = network_cameras(views.cameras)
    assert read.shape == (12, 16) and torch.allclose(read.reshape(-1, 4, 4)[:, :3, 3].norm(dim=1), torch.ones(12))
    assert torch.equal(views.cameras, kept)


def test_draws_are_the_public_ones():
    draws = CameraDraws()
    views = draws.draw(4000, torch.Generator().manual_seed(5))
    azimuth, elevation, distance, fov = (v.double().unflatten(0, (4000, 4)) for v in views[1:])
    assert torch.allclose(azimuth.diff(dim=1), torch.tensor(90.0).double(), atol=1e-3)
    assert azimuth.min() >= -180 and azimuth.max() < 180 and float(azimuth[:, 0].mean()) == pytest.approx(-135, abs=2)
    for value in (elevation, distance, fov):
        assert torch.equal(value, value[:, :1].expand(-1, 4))  # one for all views of an asset
    assert 15 <= fov.min() and fov.max() <= 60 and float(fov.mean()) == pytest.approx(37.5, abs=0.7)
    relative = distance * torch.tan(torch.deg2rad(fov) / 2) / 0.5
    assert 0.8 - 1e-5 <= relative.min() and relative.max() <= 1 + 1e-5
    on_sphere = math.degrees(math.asin(0.25))  # half of the draws have their median there, half at 15 degrees
    below = float((elevation < on_sphere).double().mean())
    assert 0 <= elevation.min() and elevation.max() <= 30.001 and below == pytest.approx(0.5 * (0.5 + on_sphere / 30), abs=0.02)


def test_cameras_look_at_the_middle_and_a_seed_repeats():
    views = CameraDraws(views=3).draw(2, torch.Generator().manual_seed(1))
    again, other = (CameraDraws(views=3).draw(2, torch.Generator().manual_seed(seed)) for seed in (1, 2))
    assert torch.equal(views.cameras, again.cameras) and not torch.equal(views.cameras, other.cameras)
    pose = views.cameras[:, :16].reshape(-1, 4, 4)
    assert torch.allclose(pose[:, :3, 3] + views.distance[:, None] * pose[:, :3, 2], torch.zeros(6, 3), atol=1e-5)
    assert torch.allclose(pose[:, 1, 3], views.distance * torch.deg2rad(views.elevation).sin(), atol=1e-5)
    assert torch.allclose(views.cameras[:, 16], 0.5 / torch.tan(torch.deg2rad(views.fov) / 2), atol=1e-5)


def test_the_four_sides():
    places = evenly_around(2).cameras[:, [3, 7, 11]]
    expected = torch.tensor([[0, 0, 1.5], [1.5, 0, 0], [0, 0, -1.5], [-1.5, 0, 0]]).repeat(2, 1)
    assert torch.allclose(places, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"fov": (60.0, 15.0)}, "low <= high"), ({"elevation": (-95.0, 0.0)}, "-90 < elevation < 90"), ({"views": 0}, "expected a view")],
)
def test_ranges_are_checked(wrong, message):
    with pytest.raises(ValueError, match=message):
        CameraDraws(**wrong)
