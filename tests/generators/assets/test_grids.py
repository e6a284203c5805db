"""Assets under optimisation are fields: everything that reads a field reads them, and every number has a
gradient.
"""

import numpy as np
import pytest
import torch

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.field import LEVEL, CameraFamily, Field, ProductField, RenderOptions
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.generators.assets.asset import ARCHITECTURE, load_assets, sparsity
from eg3d_rlhf.generators.assets.grids import GAIN, TriPlanes, Voxels
from eg3d_rlhf.generators.assets.views import PerspectiveViews
from eg3d_rlhf.rewards.depth import Depth
from eg3d_rlhf.rewards.observations import SigmaSlab
from eg3d_rlhf.rewards.points import LevelSetPoints, LiftedPoints
from tests.rejections import raising
from training.rendering.renderer import ImportanceRenderer
from training.storage import write_tensors
from training.triplane import OSGDecoder

RADIUS = 0.3


def balls(assets: int = 2, resolution: int = 24) -> Voxels:
    """Balls of radius .3, the first red: raw density falls linearly through LEVEL at the surface."""
    voxels = Voxels(assets, resolution)
    points = SlabSpec.from_bounds(voxels.bounds, resolution).points()
    with torch.no_grad():
        voxels.shape.copy_((RADIUS - points.norm(dim=-1)) * 20)
        voxels.paint[0] = torch.tensor([8.0, -8.0, -8.0])[:, None, None, None]
    return voxels


def random_voxels(assets: int = 2, resolution: int = 5, dtype=torch.float32) -> Voxels:
    voxels = Voxels(assets, resolution)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in voxels.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng))
    return voxels.to(dtype)


@pytest.mark.parametrize("asset", [random_voxels(), TriPlanes(2, 8)], ids=["voxels", "planes"])
def test_an_asset_is_a_field(asset):
    assert isinstance(asset, Field) and len(asset) == 2
    points = torch.rand(7, 3) - 0.5
    each = torch.stack([points, points])
    assert torch.equal(asset.density(points), asset.density(each)) and asset.density(points).shape == (2, 7)
    assert (
        asset.colour(points).shape == (2, 7, 3)
        and 0 <= asset.colour(points).min()
        and asset.colour(points).max() <= 1
    )
    for grid in (
        SlabSpec.from_bounds(asset.bounds, 9),
        SlabSpec(resolution=16),
        SlabSpec(resolution=8, lattice="skewed"),
    ):
        pointwise = asset.density(grid.points().reshape(-1, 3)).unflatten(1, grid.shape)
        assert torch.allclose(asset.density_grid(grid), pointwise, atol=1e-4)
    assert (asset.density(torch.tensor([[0.0, 0.0, 0.6]])) < -900).all()


def test_voxels_interpolate_their_values_exactly():
    voxels = random_voxels()
    assert isinstance(voxels, ProductField)
    grid = SlabSpec.from_bounds(voxels.bounds, 5)
    assert torch.allclose(voxels.density_grid(grid), LEVEL + GAIN * voxels.shape, atol=1e-4)
    colours = voxels.colour(grid.points().reshape(-1, 3)).transpose(1, 2).unflatten(2, (5, 5, 5))
    assert torch.allclose(colours, torch.sigmoid(voxels.paint), atol=1e-5)
    middle = (grid.points()[1, 2, 3] + grid.points()[1, 2, 4]) / 2
    assert torch.allclose(voxels.density(middle[None])[:, 0], voxels.raw[:, 1, 2, 3:].mean(dim=1), atol=1e-4)


def test_planes_decode_as_the_generators_do():
    asset = TriPlanes(2, 8, channels=4, hidden=6)
    decoder = OSGDecoder(4, {"decoder_lr_mul": 1, "decoder_output_dim": 3, "decoder_hidden_dim": 6})
    renderer = ImportanceRenderer("fixed")
    points = torch.rand(1, 11, 3) - 0.5
    for k in range(2):
        with torch.no_grad():
            for layer, w, b in ((decoder.net[0], asset.w0, asset.b0), (decoder.net[2], asset.w1, asset.b1)):
                layer.weight.copy_(w[k] / layer.effective_weight(None).div(layer.weight).mean())
                layer.bias.copy_(b[k])
        theirs = renderer.run_model(asset.planes[k : k + 1], decoder, points, None, {"box_warp": 1.0})
        raw, colour = asset.decode(points.expand(2, -1, -1))
        blob = 1 + 20 * (1 - points[0].norm(dim=1) / 0.25)
        assert torch.allclose(raw[k] - blob, theirs["sigma"][0, :, 0], atol=1e-4)
        assert torch.allclose(colour[k], theirs["rgb"][0].clamp(0, 1), atol=1e-5)


@pytest.mark.parametrize(
    ("observation", "shape"),
    [
        (SigmaSlab(SlabSpec(resolution=16)), (1, 9, 9, 8)),
        (Depth(resolution=12, samples=16, pivot=(0, 0, 0), near=2.2, far=3.2), (1, 2, 12, 12)),
        (LevelSetPoints(spec=SlabSpec.cube(16), points=64), (6, 64)),
        (LiftedPoints(resolution=24, samples=24, points=64), (3, 64)),
    ],
    ids=["sigma", "depth", "points", "lifted"],
)
def test_observations_read_it_and_reach_every_asset(observation, shape):
    field = balls()
    seen = observation.observe(field)
    assert seen.shape == (2, *shape) == (2, *observation.shape) and seen.isfinite().all()
    seen.square().sum().backward()
    assert (field.shape.grad.flatten(1).abs().amax(dim=1) > 0).all()


def test_depth_and_clouds_lie_on_the_ball():
    field = balls().requires_grad_(False)
    camera = CameraFamily().label()
    seen = field.render(camera, RenderOptions(resolution=33, samples=200))
    assert (
        float(seen.depth[0, 0, 16, 16]) == pytest.approx(2.7 - RADIUS + 0.04, abs=0.02)
        and float(seen.opacity[0, 0, 16, 16]) > 0.99
    )
    assert (
        float(seen.opacity[0, 0, 0, 0]) == 0
        and float(seen.raw[0].amax()) <= 1
        and float(seen.raw[1, 0, 0, 0]) == -1
    )
    assert seen.raw[0, :, 16, 16].tolist() == pytest.approx([1, -1, -1], abs=0.02)
    cloud = LevelSetPoints(spec=SlabSpec.cube(32), points=256).observe(field)
    assert torch.allclose(cloud[:, :3].norm(dim=1) / 2, torch.tensor(RADIUS), atol=0.01)


def test_rendering_in_parts_is_the_same(monkeypatch):
    field = balls()
    cameras = CameraFamily().label(0.3, 0.1, 2)
    options = RenderOptions(resolution=16, samples=12)

    def gradient():
        field.zero_grad()
        seen = field.render(cameras, options)
        (seen.raw.square().sum() + seen.depth.sum()).backward()
        return seen.raw.detach(), field.shape.grad.clone()

    full_grid = gradient()
    monkeypatch.setattr("eg3d_rlhf.core.field._SAMPLES_AT_ONCE", 2 * 12 * 50)
    parts = gradient()
    assert torch.allclose(full_grid[0], parts[0]) and torch.allclose(full_grid[1], parts[1], atol=1e-5)


@pytest.mark.parametrize(
    "asset", [random_voxels(2, 3, torch.float64), TriPlanes(2, 4, 2, 3).double()], ids=["voxels", "planes"]
)
def test_gradients_are_finite_differences(asset):
    cameras = CameraFamily(radius=1.5, focal=1.0).label(0.4, 0.2, 2).double()
    names, leaves = zip(*asset.named_parameters(), strict=True)

    def figure(*values):
        named = {f"asset.{name}": value for name, value in zip(names, values, strict=True)}
        return torch.func.functional_call(_Figure(asset, cameras), named, ())

    values = tuple(leaf.detach().clone().requires_grad_() for leaf in leaves)
    assert torch.autograd.gradcheck(figure, values, eps=1e-6, atol=1e-5, fast_mode=True)


class _Figure(torch.nn.Module):
    def __init__(self, asset, cameras):
        super().__init__()
        self.asset = asset
        self.cameras = cameras

    def forward(self):
        seen = self.asset.render(self.cameras, RenderOptions(resolution=3, samples=5))
        return torch.stack([seen.raw.sum(), *(value.sum() for value in self.asset.regularisers().values())])


def test_penalties_in_closed_form():
    raw = torch.full((1, 4), 1.0)
    o = 1 - np.exp(-np.log(2) * 0.5)
    penalties = sparsity(raw, 0.5)
    entropy = -o * np.log(o) - (1 - o) * np.log(1 - o)
    assert float(penalties["sparsity"]) == pytest.approx(o) and float(penalties["opacity"]) == pytest.approx(
        entropy
    )
    empty, full = (float(sparsity(torch.full((1, 4), value), 0.5)["opacity"]) for value in (-60.0, 60.0))
    assert abs(empty) < 1e-6 and abs(full) < 1e-6
    flat = Voxels(1, 4).requires_grad_(False)
    rough = Voxels(1, 4).requires_grad_(False)
    rough.shape[:, ::2] += 1
    assert float(flat.regularisers()["roughness"]) == 0 and float(
        rough.regularisers()["roughness"]
    ) == pytest.approx(1 / 3)


@pytest.mark.parametrize("asset", [random_voxels(), TriPlanes(2, 8, seed=3)], ids=["voxels", "planes"])
def test_files_and_copies(asset, tmp_path):
    asset.save(tmp_path / "a.safetensors")
    back = load_assets(tmp_path / "a.safetensors")
    pairs = zip(asset.state_dict().values(), back.state_dict().values(), strict=True)
    assert type(back) is type(asset) and all(torch.equal(a, b) for a, b in pairs)
    points = torch.rand(5, 3) - 0.5
    second = asset.select([1])
    assert len(second) == 1 and torch.equal(second.density(points)[0], asset.density(points)[1])
    assert sum(map(len, asset.groups().values())) == len(list(asset.parameters()))


def test_a_file_of_another_kind_is_rejected(tmp_path):
    meta = {"architecture": ARCHITECTURE, "G_kwargs": {"field": "hash-grid", "assets": 1, "settings": {}}}
    write_tensors(tmp_path / "b.safetensors", "network", {"x": torch.zeros(1)}, meta)
    with raising("voxels", "planes", "latents", "'hash-grid'"):
        load_assets(tmp_path / "b.safetensors")
    with raising("generator.safetensors", "eg3d"):
        load_assets(bundled.GENERATOR)


def test_a_ball_in_perspective_from_the_public_cameras():
    views = PerspectiveViews(24, samples=48)
    drawn = views.draw(2, torch.Generator().manual_seed(0))
    seen = views.render(balls(), drawn, torch.tensor([0.0, 1.0, 0.0]))
    assert seen.images.shape == (8, 3, 24, 24) and seen.opacity.shape == (8, 1, 24, 24)
    # the background in the corner
    assert torch.allclose(seen.images[:, :, 0, 0], torch.tensor([0.0, 1.0, 0.0]), atol=1e-5)
    # the red ball in the middle
    assert torch.allclose(seen.images[:4, :, 12, 12], torch.tensor([1.0, 0.0, 0.0]), atol=0.02)
