"""The test problem's renderer: closed forms, a plain loop, finite differences, and the perspective renderer
from far away.
"""

import math

import pytest
import torch

from eg3d_rlhf.core.field import RenderOptions
from eg3d_rlhf.generators.assets.views import (
    DISTANCE,
    CameraRanges,
    FourViews,
    evenly_around,
    four_views,
    nearness,
    network_cameras,
)
from tests.generators.assets.test_grids import balls, random_voxels

BLACK = torch.zeros(3)


def looped(raw: torch.Tensor, colours: torch.Tensor, pitch: float, view: int) -> torch.Tensor:
    """One asset [N, N, N], one view, voxel by voxel from the camera on: channels and opacity [5, N, N]."""
    n = len(raw)
    out = torch.zeros(5, n, n, dtype=raw.dtype)
    for row in range(n):
        for column in range(n):
            y = n - 1 - row
            right = column
            left = n - 1 - column
            through = 1.0
            for step in range(n):
                near = n - 1 - step
                far = step
                z, x = {0: (near, right), 1: (left, near), 2: (far, left), 3: (right, far)}[view]
                opacity = 1 - math.exp(-math.log1p(math.exp(float(raw[z, y, x]) - 1)) * pitch)
                depth = DISTANCE - 0.5 + step / (n - 1)
                values = torch.cat(
                    [colours[:, z, y, x], torch.tensor([nearness(depth, 1.0, 2.0), 1.0]).to(raw)]
                )
                out[:, row, column] += through * opacity * values
                through *= 1 - opacity
    return out


def test_it_is_the_plain_loop():
    voxels = random_voxels(2, 4, torch.float64)
    channels, opacity = four_views(voxels.raw, torch.sigmoid(voxels.paint), voxels.pitch)
    assert channels.shape == (2, 4, 4, 4, 4) and opacity.shape == (2, 4, 1, 4, 4)
    for asset in range(2):
        for view in range(4):
            expected = looped(
                voxels.raw[asset].detach(), torch.sigmoid(voxels.paint[asset]).detach(), voxels.pitch, view
            )
            assert torch.allclose(channels[asset, view], expected[:4], atol=1e-6)
            assert torch.allclose(opacity[asset, view], expected[4:], atol=1e-6)


def test_gradients_are_finite_differences():
    voxels = random_voxels(1, 3, torch.float64)
    raw = voxels.raw.detach().div(3).requires_grad_()
    colours = torch.sigmoid(voxels.paint).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda r, c: four_views(r, c, 0.5), (raw, colours), fast_mode=True)


@torch.no_grad()
def test_orthographic_views_are_the_limit_of_distant_perspective_views():
    voxels = balls(1, 16)
    voxels.shape[:, 10:, 9:, 8:] = 2.0  # something that is not symmetric, coloured by where it is
    voxels.paint.copy_(torch.stack(torch.meshgrid(*[torch.linspace(-2, 2, 16)] * 3, indexing="ij")))
    orthographic = FourViews().render(voxels, FourViews().draw(1, torch.Generator()), BLACK)
    far = 200.0
    # pixels on the voxels
    cameras = evenly_around(1, distance=far, fov=math.degrees(2 * math.atan(0.5 * 16 / 15 / far))).cameras
    distant = torch.cat(
        [voxels.render(camera, RenderOptions(resolution=16, samples=100)).raw for camera in cameras.split(1)]
    )
    # rays at the rim leave the cube
    near, distant = (part[:, :, 1:-1, 1:-1] for part in (orthographic.images[:, :3], (distant + 1) / 2))
    apart = (near[:, None] - distant).abs().mean(dim=(2, 3, 4))  # [view, view]
    mirrored = (near.flip(3) - distant).abs().mean(dim=(1, 2, 3))
    assert (apart.diagonal() < 0.03).all()
    others = torch.cat([apart[~torch.eye(4, dtype=bool)], mirrored])
    assert float(others.min()) > 2 * float(apart.diagonal().max())


def test_backgrounds_and_finer_voxels():
    voxels = balls(2, 24)
    views = FourViews().draw(2, torch.Generator())
    dark, light = (FourViews().render(voxels, views, torch.full((8, 3), value)) for value in (0.0, 1.0))
    assert dark.images.shape == (8, 4, 16, 16)
    assert torch.allclose(light.images[:, :3], dark.images[:, :3] + 1 - dark.opacity, atol=1e-6)
    assert torch.equal(light.images[:, 3], dark.images[:, 3])


# Cameras: seeded draws of the public defaults, and the four fixed sides. MVDream's own numbers:
# tests/compat/test_distill_schedules.py.


def test_draws_are_the_public_ones():
    draws = CameraRanges()
    views = draws.draw(4000, torch.Generator().manual_seed(5))
    azimuth, elevation, distance, fov = (v.double().unflatten(0, (4000, 4)) for v in views[1:])
    assert torch.allclose(azimuth.diff(dim=1), torch.tensor(90.0).double(), atol=1e-3)
    assert (
        azimuth.min() >= -180
        and azimuth.max() < 180
        and float(azimuth[:, 0].mean()) == pytest.approx(-135, abs=2)
    )
    for value in (elevation, distance, fov):
        assert torch.equal(value, value[:, :1].expand(-1, 4))  # one for all views of an asset
    assert 15 <= fov.min() and fov.max() <= 60 and float(fov.mean()) == pytest.approx(37.5, abs=0.7)
    relative = distance * torch.tan(torch.deg2rad(fov) / 2) / 0.5
    assert 0.8 - 1e-5 <= relative.min() and relative.max() <= 1 + 1e-5
    on_sphere = math.degrees(math.asin(0.25))  # half of the draws have their median there, half at 15 degrees
    below = float((elevation < on_sphere).double().mean())
    assert (
        0 <= elevation.min()
        and elevation.max() <= 30.001
        and below == pytest.approx(0.5 * (0.5 + on_sphere / 30), abs=0.02)
    )


def test_cameras_look_at_the_middle_and_a_seed_repeats():
    views = CameraRanges(views=3).draw(2, torch.Generator().manual_seed(1))
    again, other = (CameraRanges(views=3).draw(2, torch.Generator().manual_seed(seed)) for seed in (1, 2))
    assert torch.equal(views.cameras, again.cameras) and not torch.equal(views.cameras, other.cameras)
    pose = views.cameras[:, :16].reshape(-1, 4, 4)
    kept = views.cameras.clone()
    read = network_cameras(views.cameras).reshape(-1, 4, 4)
    assert torch.allclose(read[:, :3, 3].norm(dim=1), torch.ones(6)) and torch.equal(views.cameras, kept)
    assert torch.allclose(
        pose[:, :3, 3] + views.distance[:, None] * pose[:, :3, 2], torch.zeros(6, 3), atol=1e-5
    )
    assert torch.allclose(pose[:, 1, 3], views.distance * torch.deg2rad(views.elevation).sin(), atol=1e-5)
    assert torch.allclose(views.cameras[:, 16], 0.5 / torch.tan(torch.deg2rad(views.fov) / 2), atol=1e-5)
