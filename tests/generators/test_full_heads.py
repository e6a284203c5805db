"""Families of full heads: closed forms of their samplers, and their fields through what the package asks of
any field.
"""

import pytest
import torch

from eg3d_rlhf.core.field import Field, ProductField, RenderOptions
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.generators import FAMILIES, Generator, as_generator, camera, ws_of_seeds
from eg3d_rlhf.geometry.mesh_export import export_mesh
from eg3d_rlhf.geometry.settings import MeshOptions
from tests.generators.pickles.writer import HEAD_CLASSES, head_generator
from tests.rejections import raising
from torch_utils.ops.implementations import implementation
from training.fullhead import EMPTY, equal_area_square, sample_balls, sample_hybrid, sample_tri_grid
from training.rendering.renderer import generate_planes

HEADS = sorted(HEAD_CLASSES)
AXES = generate_planes("panohead")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def cloud(count: int, seed: int = 0) -> torch.Tensor:
    """Points [1, P, 3] of the unit cube about the origin."""
    return (torch.rand(count, 3, generator=torch.Generator().manual_seed(seed)) - 0.5)[None]


# Samplers.


def test_both_sides_of_the_seam_of_a_ball_read_the_same():
    """Ball A's azimuth jumps from pi to -pi where q_y = 0 and q_z < 0, at the back of the head; its weight is
    0 there.
    """
    planes = random(1, 2, 3, 4, 16, 16).double()
    seam = cloud(2000).double()
    eps = 1e-9
    seam = torch.stack([seam[..., 0], torch.zeros(1, 2000).double(), -seam[..., 2].abs() - 0.05], dim=-1)
    step = torch.tensor([0.0, eps, 0.0], dtype=torch.float64)
    above = sample_balls(planes, seam + step, 1.0)
    below = sample_balls(planes, seam - step, 1.0)
    assert (above - below).abs().max() < 1e-5
    only_a = planes * torch.tensor([1.0, 0.0]).view(1, 2, 1, 1, 1, 1)
    assert sample_balls(only_a, seam, 1.0).abs().max() < 1e-5


def test_equal_planes_of_both_balls_need_no_fusion_and_points_without_weight_give_zero():
    constant = torch.ones(1, 2, 3, 4, 16, 16)
    inner = cloud(2000) * 0.5
    theta_phi = sample_balls(constant, inner, 1.0)[:, 0]
    assert theta_phi.max() <= 1 + 1e-5 and theta_phi.median() > 0.999
    assert sample_balls(constant, torch.zeros(1, 1, 3), 1.0).isfinite().all()


def test_gradients_are_finite_at_the_origin_and_on_the_axes():
    points = torch.cat([torch.zeros(1, 3), 0.3 * torch.eye(3), -0.3 * torch.eye(3)])[None].requires_grad_()
    for features in (
        sample_balls(random(1, 2, 3, 4, 8, 8), points, 1.0),
        sample_hybrid(AXES, random(1, 4, 4, 8, 8), points, 1.0, True),
        sample_hybrid(AXES, random(1, 4, 4, 8, 8), points, 1.0, False),
    ):
        (gradient,) = torch.autograd.grad(features.square().sum(), points)
        assert features.isfinite().all() and gradient.isfinite().all()


def test_directions_lie_in_the_square_and_fill_it_evenly():
    square = equal_area_square(random(100_000, 3))
    assert square.square().max() <= 1 + 1e-4
    top, neck = equal_area_square(torch.tensor([[0.0, 1.0, 0.0], [1e-4, -1.0, 0.0]]))
    assert top.abs().max() < 1e-3 and neck.abs().max() > 0.99
    # Lambert: the share of the sphere within an angle is the disc's share
    radius = 2 * torch.asin(torch.linspace(0.1, 1, 10))
    height = random(100_000, 3)
    angle = torch.acos((height[:, 1] / height.norm(dim=1)).clamp(-1, 1))
    for r, limit in zip(torch.linspace(0.1, 1, 10), radius, strict=True):
        assert float((angle <= limit).float().mean()) == pytest.approx(float(r) ** 2, abs=0.01)


@pytest.mark.parametrize("equal_area", [True, False])
def test_the_sphere_plane_does_not_know_the_radius(equal_area):
    planes = random(1, 4, 4, 12, 12)
    points = cloud(500)
    sphere = [sample_hybrid(AXES, planes, points * scale, 1.0, equal_area)[:, 3] for scale in (0.1, 0.9)]
    torch.testing.assert_close(*sphere, rtol=1e-3, atol=1e-3)
    # and with even planes, sphere or not, a density is that of its direction; deep inside, where no edge
    # fades
    planes[:, :3] = 0.5
    rays = (
        sample_hybrid(AXES, planes, points * 0.5, 1.0, equal_area),
        sample_hybrid(AXES, planes, points * 0.1, 1.0, equal_area),
    )
    torch.testing.assert_close(*(features.mean(dim=1) for features in rays), rtol=1e-3, atol=1e-3)


def test_one_slice_fades_and_three_do_not_until_two_thirds():
    # box 1: t is in units of half of it
    points = torch.tensor([[[0.0, 0.0, t / 2] for t in (0.0, 0.3, 2 / 3, 1.0)]])
    one_slice, three = (
        sample_tri_grid(AXES, torch.ones(1, 3, 1, d, 9, 9), points, 1.0)[0, 0, :, 0] for d in (1, 3)
    )
    torch.testing.assert_close(one_slice, torch.tensor([1.0, 0.85, 2 / 3, 0.5]))
    torch.testing.assert_close(three, torch.tensor([1.0, 1.0, 1.0, 0.5]))
    stretched = sample_tri_grid(AXES, torch.ones(1, 3, 1, 3, 9, 9), points, 1.0, extent=1.5)[0, 0, :, 0]
    torch.testing.assert_close(stretched, torch.ones(4))


# Families.


@pytest.fixture(params=HEADS)
def head(request):
    """(family, generator, ws of two latents)."""
    G, _ = head_generator(request.param)
    generator = as_generator(G)
    return request.param, generator, ws_of_seeds(generator, [1, 2], 0.7)


def test_the_family_is_found_by_the_network(head):
    family, generator, _ = head
    assert (
        generator.architecture == family
        and isinstance(generator, Generator)
        and FAMILIES[family].module is type(generator.module)
    )
    assert generator.cameras.pivot == (0.0, 0.0, 0.0)  # although the file says (0, 0, 0.2)
    assert generator.module.rendering_kwargs["avg_camera_pivot"] == [0, 0, 0.2]
    assert generator.bounds.side == 1 and generator.conditioned


def test_densities_agree_however_they_are_asked(head):
    _, generator, ws = head
    field = generator.field(ws)
    assert isinstance(field, Field) and len(field) == 2
    grid = SlabSpec.from_bounds(generator.bounds, 9)
    with torch.no_grad():
        expected = field.density(grid.points().reshape(-1, 3)).unflatten(1, grid.shape)
        scale = float(expected.max() - expected.min())
        torch.testing.assert_close(field.density_grid(grid), expected, rtol=0, atol=1e-5 * scale)
        torch.testing.assert_close(field.density_grid(grid, "pointwise"), expected)
        skewed = SlabSpec(resolution=9, crop=(0.0,) * 6, lattice="skewed")
        torch.testing.assert_close(
            field.density_grid(skewed),
            field.density(skewed.points().reshape(-1, 3)).unflatten(1, skewed.shape),
        )
        points = grid.points().reshape(-1, 3)
        each = field.density(points.expand(2, -1, -1))
        assert torch.equal(each, expected.flatten(1))
        with implementation("ref"):
            assert torch.equal(field.density_grid(grid), expected)


def test_only_the_tri_grid_has_the_fast_path(head):
    family, generator, ws = head
    field = generator.field(ws)
    fast = family == "panohead"
    assert isinstance(field, ProductField) == fast and field.separable(*[torch.zeros(2)] * 3) is None
    if not fast:
        with raising("'auto'", "'pointwise'"):
            field.density_grid(SlabSpec.from_bounds(generator.bounds, 5), "separable")


def test_colour_at_a_point_is_that_of_an_opaque_ray(head):
    """A ray that is all one point's colour shows it: raw images and colours share decoder
    and style layer.
    """
    _, generator, ws = head
    field = generator.field(ws)
    G = generator.module
    points = cloud(30)[0]
    # [2, P, F]
    features = G.renderer.run_model(
        field.planes, G.decoder, points.expand(2, -1, -1), None, G.rendering_kwargs
    )["rgb"]
    image = G.to_rgb(G.scaled(features).transpose(1, 2).unflatten(2, (5, 6)), ws)  # [2, 3, 5, 6]
    torch.testing.assert_close(field.colour(points), ((image.flatten(2).transpose(1, 2) + 1) / 2).clamp(0, 1))


def test_images_are_reproducible_and_show_mask_and_background(head):
    _, generator, ws = head
    field = generator.field(ws)
    label = camera(generator, 0.3, -0.1)
    seen = []
    for _ in range(2):
        torch.manual_seed(0)
        seen.append(field.render(label, RenderOptions(resolution=8, samples=6)))
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True)) and seen[0].image.shape == (
        2,
        3,
        128,
        128,
    )
    G = generator.module
    nowhere = {**G.rendering_kwargs, "side_margin": 10.0}  # everything is cut away: the background alone
    out = G.render(field.planes, ws, label.expand(2, -1), 8, nowhere, noise_mode="const")
    assert out["image_opacity"].abs().max() < 1e-6 and torch.allclose(
        out["image_mask"], torch.tensor(-0.001), atol=1e-6
    )
    more = [ws[:, -1:]] * (G.bcg_synthesis.num_ws - ws.shape[1])
    assert more  # the background has the larger images, hence the last w again
    background = G.bcg_synthesis(torch.cat([ws, *more], dim=1), noise_mode="const")
    small = torch.nn.functional.interpolate(background, size=(8, 8), mode="bilinear", antialias=True)
    torch.testing.assert_close(out["image_raw"], G.to_rgb(small, ws), rtol=1e-4, atol=1e-5)


def test_the_sides_are_cut_while_rendering_alone(head):
    _, generator, ws = head
    G = generator.module
    field = generator.field(ws)
    origins = torch.tensor([0.45, 0.0, 1.0]).expand(2, 1, 3)  # a ray beside the head, within 0.1 of the side
    depths = torch.linspace(0.6, 1.4, 9).view(1, 1, 9, 1).expand(2, 1, 9, 1)
    ahead = torch.tensor([0.0, 0.0, -1.0]).expand(2, 1, 3)
    _, cut = G.renderer._query(field.planes, G.decoder, origins, ahead, depths, G.rendering_kwargs)
    _, kept = G.renderer._query(
        field.planes, G.decoder, origins, ahead, depths, {**G.rendering_kwargs, "side_margin": None}
    )
    assert (cut == EMPTY).all() and (kept > EMPTY / 2).all()
    points = (origins[0] + depths[0, 0] * ahead[0]).view(-1, 3)
    torch.testing.assert_close(field.density(points), kept.view(2, 9))


def test_forward_moves_the_camera_and_synthesis_does_not(head):
    _, generator, _ = head
    G = generator.module
    z = random(2, 8)
    c = camera(generator, 0.2, 0.1, n=2)
    before = c.clone()
    torch.manual_seed(0)
    output = G(z, c, noise_mode="const")
    torch.manual_seed(0)
    parts = G.synthesis(G.mapping(z, c), G.moved_camera(z, c), noise_mode="const")
    assert torch.equal(output["image"], parts["image"]) and torch.equal(c, before)
    moved = G.moved_camera(z, c) - c
    assert moved[:, [3, 7, 11]].abs().min() > 0 and moved.abs().sum() == pytest.approx(
        float(moved[:, [3, 7, 11]].abs().sum())
    )


def test_gradients_reach_every_part(head):
    family, generator, _ = head
    G = generator.module
    G.requires_grad_(True)
    try:
        ws = G.mapping(random(1, 8), camera(generator))
        field = generator.field(ws)
        field.density_grid(SlabSpec.from_bounds(generator.bounds, 5)).sum().backward()
        assert all(
            p.grad is not None and p.grad.isfinite().all() for p in G.backbone.parameters() if p.ndim > 1
        )
        field = generator.field(G.mapping(random(1, 8), camera(generator)))
        field.render(camera(generator), RenderOptions(resolution=4, samples=4)).image.sum().backward()
        named = {
            name.split(".")[0]
            for name, p in G.named_parameters()
            if p.grad is not None and p.grad.abs().max() > 0
        }
        expected = {"backbone", "decoder", "superresolution", "torgb", "bcg_synthesis"}
        assert named == expected | ({"ConvA", "ConvB"} if family == "spherehead" else set())
    finally:
        G.requires_grad_(False).zero_grad(set_to_none=True)


def test_vertices_of_a_mesh_lie_on_the_level(head):
    """Noise has a surface wherever the level cuts it; export checks that it is closed."""
    _, generator, ws = head
    field = generator.field(ws[:1])
    density = field.density_grid(SlabSpec.from_bounds(generator.bounds, 32))
    level = float(density.quantile(0.7))
    mesh, _ = export_mesh(field, MeshOptions(resolution=32, level=level))
    inner = mesh.vertices[(abs(mesh.vertices) < 0.45).all(axis=1)]
    values = field.density(torch.from_numpy(inner).float())[0]
    assert len(inner) > 50 and float((values - level).abs().median()) < 0.05 * float(
        density.max() - density.min()
    )
    assert mesh.colors is not None and mesh.colors.shape == mesh.vertices.shape
