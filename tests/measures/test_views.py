"""Multi-view measures are nearly zero on an exactly known surface, and each grows with the damage that it
measures.
"""

import numpy as np
import pytest
import torch

from eg3d_rlhf.core.field import CameraFamily, Rendering
from eg3d_rlhf.measures.views import (
    WORST_COLOUR,
    ViewSpec,
    compare_views,
    lift,
    multi_view_measures,
    normals_from_points,
    project,
    render_views,
    spec_for,
    views_from_maps,
)
from training.rendering.cameras import RaySampler

SPEC = ViewSpec(resolution=64)


class AnalyticSphere:
    """Textured sphere of radius 0.3 at the origin, rendered exactly; `damage(depth, c)` changes its depth
    maps.
    """

    cameras = CameraFamily(radius=2.7, pivot=(0.0, 0.0, 0.2))

    def __init__(self, damage=None, texture=True):
        self.damage = damage
        self.texture = texture

    def field(self, ws, noise_mode="const"):
        assert noise_mode == "const"
        self.samples = len(ws)
        return self

    def render(self, cameras, options):
        c = cameras.expand(self.samples, -1)
        res = options.resolution
        cam2world = c[:, :16].reshape(-1, 4, 4)
        intrinsics = c[:, 16:].reshape(-1, 3, 3)
        o, d = RaySampler()(cam2world, intrinsics, res)
        b = (o * d).sum(-1)
        q = (o * o).sum(-1) - 0.3**2
        disc = b * b - q
        hit = disc > 0
        depth = torch.where(hit, -b - disc.clamp_min(0).sqrt(), 3.3)
        points = o + depth[..., None] * d
        colour = torch.sin(points * 6) if self.texture else torch.zeros_like(points)
        colour = torch.where(hit[..., None], colour, 1.0)
        depth = depth.reshape(-1, 1, res, res)
        if self.damage:
            depth = self.damage(depth, c)
        image = colour.transpose(1, 2).reshape(-1, 3, res, res)
        return Rendering(image, image, depth, hit.float().reshape(-1, 1, res, res))


WS = torch.zeros(2, 4, 8)


@pytest.fixture(scope="module")
def clean():
    return multi_view_measures(AnalyticSphere(), WS, SPEC)


def test_an_exact_surface_agrees_with_itself(clean):
    assert clean.photometric.shape == (2,)
    assert clean.photometric.max() < 0.001  # bilinear interpolation of the texture at 64 pixels
    assert clean.depth.max() < 1e-4
    assert clean.normal.max() < 0.2
    assert clean.covisible.min() > 0.5


@pytest.mark.parametrize("size", [0.02, 0.05])
def test_a_depth_offset_that_follows_the_camera_increases_the_measures(clean, size):
    shifted = multi_view_measures(AnalyticSphere(lambda depth, c: depth - size), WS, SPEC)
    assert shifted.photometric.min() > clean.photometric.max() + 0.1 * size
    assert shifted.depth.min() > clean.depth.max() * 2


def test_measures_grow_with_noise_on_the_depth(clean):
    def noisy(scale):
        def damage(depth, c):
            generator = torch.Generator().manual_seed(int(1000 * c[0, 3].abs()))
            return depth + scale * torch.randn(depth.shape, generator=generator)

        return multi_view_measures(AnalyticSphere(damage), WS, SPEC)

    small = noisy(0.003)
    large = noisy(0.01)
    for name in ("photometric", "depth", "normal"):
        values = [getattr(m, name).mean() for m in (clean, small, large)]
        assert values[0] < values[1] < values[2], (name, values)


def test_an_empty_view_gets_the_worst_values_and_not_nan():
    views = render_views(AnalyticSphere().field(WS), SPEC)
    empty = views_from_maps(
        views.image, torch.full_like(views.depth, float("nan")), torch.zeros_like(views.depth), SPEC
    )
    measures = compare_views(empty, SPEC)
    assert (
        (measures.photometric == WORST_COLOUR).all()
        and (measures.normal == 180).all()
        and (measures.covisible == 0).all()
    )
    assert np.isfinite(measures.depth).all()


def test_lift_and_project_are_inverse():
    cam2world = SPEC.cam2world()
    intrinsics = SPEC.intrinsics()
    depth = torch.rand(2, 5, 9, 9) + 2
    points = lift(depth, cam2world, intrinsics)
    steps = (torch.arange(9) + 0.5) / 9
    for view in range(5):
        uv, distance = project(points[:, view], cam2world[view], intrinsics)
        torch.testing.assert_close(distance, depth[:, view], atol=1e-5, rtol=0)
        torch.testing.assert_close(uv[..., 0], steps.expand(2, 9, 9), atol=1e-5, rtol=0)
        torch.testing.assert_close(uv[..., 1], steps[:, None].expand(2, 9, 9), atol=1e-5, rtol=0)


def test_normals_of_a_sphere_point_outwards():
    views = render_views(AnalyticSphere().field(WS[:1]), SPEC)
    normals, known = normals_from_points(views.points[:, 0], views.foreground[:, 0])
    outward = torch.nn.functional.normalize(views.points[:, 0], dim=-1)
    cosine = (normals * outward).sum(-1)[known]
    assert cosine.mean() > 0.995


def test_rendering_keeps_the_global_generator_and_is_repeatable():
    G = AnalyticSphere()
    state = torch.get_rng_state()
    first = multi_view_measures(G, WS, SPEC)
    second = multi_view_measures(G, WS, SPEC, batch=1)
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_allclose(first.photometric, second.photometric)


def test_cameras_follow_the_generator():
    spec = spec_for(AnalyticSphere(), resolution=32)
    assert (spec.cameras, spec.resolution) == (AnalyticSphere.cameras, 32)
    assert multi_view_measures(AnalyticSphere(), WS[:1]).depth.max() < 1e-4
