"""Random choices in Hunyuan3D-2.1's autoencoder. Its numbers are tested in
tests/compat/test_family_hunyuan3d.py.
"""

import pytest
import torch

from eg3d_rlhf.core.interfaces import Mesh
from eg3d_rlhf.models.hunyuan3d import AutoencoderConfig, ShapeDecoder, ShapeEncoder, choose_points, farthest
from eg3d_rlhf.tuning.flow.families.hunyuan3d import surface_points
from tests.rejections import raising

CONFIG = AutoencoderConfig(
    num_latents=6,
    embed_dim=4,
    width=8,
    heads=2,
    num_decoder_layers=1,
    num_encoder_layers=1,
    num_freqs=2,
    pc_size=600,
    pc_sharpedge_size=0,
    point_feats=4,
)


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def box(size=(2.0, 1.0, 0.5), place=(3.0, 4.0, 5.0)) -> Mesh:
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3) * torch.tensor(size) + torch.tensor(place)
    quads = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    return Mesh(corners, torch.tensor([t for a, b, c, d in quads for t in ((a, b, c), (a, c, d))]))


def test_the_decoder_gives_the_same_values_on_a_grid_and_at_points():
    torch.manual_seed(4)
    model = ShapeDecoder(CONFIG).eval()
    axis = torch.linspace(-1.01, 1.01, 3)
    with torch.no_grad():
        decoded = model(torch.randn(1, 6, 4))
        full, part = (model.slab(decoded, axis, x) for x in (slice(0, 3), slice(1, 3)))
        point = torch.tensor([[[-1.01, 0.0, 1.01]]])
        assert float(full[0, 1, 2]) == pytest.approx(float(model.geo_decoder(point, decoded)[0, 0]), abs=1e-5)
    torch.testing.assert_close(part, full[1:])


def test_points_are_even_on_a_mesh_that_fills_the_cube_with_outward_normals():
    points = surface_points(box(), CONFIG, draw())
    places, normals, flags = points.split([3, 3, 1], 1)
    assert points.shape == (600, 7) and not flags.any()
    assert float(places[:, 0].abs().max()) <= 0.9999 and float(places[:, 0].abs().max()) > 0.99
    assert float(places[:, 1].abs().max()) <= 0.5 and float(places[:, 2].abs().max()) <= 0.25
    torch.testing.assert_close(normals.norm(dim=1), torch.ones(600))
    assert float((places * normals).sum(1).min()) > 0.24  # each face of the box looks away from its middle
    shares = [(normals.abs()[:, axis] > 0.5).float().mean().item() for axis in range(3)]
    assert shares == pytest.approx([1 / 7, 2 / 7, 4 / 7], abs=0.06)  # areas 0.5, 1 and 2
    assert torch.equal(points, surface_points(box(), CONFIG, draw()))
    with raising("area", "triangles"):
        surface_points(box(size=(1.0, 0.0, 0.0)), CONFIG, draw())


def test_queries_lie_far_from_each_other_among_the_points_that_are_kept():
    line = torch.stack([torch.arange(101) / 100, torch.zeros(101), torch.zeros(101)], 1)
    apart = sorted(line[farthest(line, 5, draw()), 0].tolist())
    assert min(b - a for a, b in zip(apart, apart[1:], strict=False)) > 0.1
    few = AutoencoderConfig(
        **{**vars(CONFIG), "downsample_ratio": 10, "pc_size": 400, "pc_sharpedge_size": 200}
    )
    surface = torch.rand(600, 7)
    queries, kept = choose_points(surface, few, draw())
    assert queries.shape == (6, 7) and kept.shape == (60, 7)
    rows = [tuple(row) for row in surface.tolist()]
    numbers = [rows.index(tuple(row)) for row in kept.tolist()]
    assert max(numbers[:40]) < 400 <= min(numbers[40:])
    assert {tuple(row) for row in queries.tolist()} <= {tuple(row) for row in kept.tolist()}


def test_a_surface_becomes_latents_in_the_scale_of_the_flow():
    torch.manual_seed(5)
    scaled = AutoencoderConfig(**{**vars(CONFIG), "scale_factor": 0.5})
    models = [ShapeEncoder(config).eval() for config in (CONFIG, scaled)]
    models[1].load_state_dict(models[0].state_dict())
    surface = surface_points(box(), CONFIG, draw())
    full, half = (model.latents(surface, draw(1)) for model in models)
    assert full.shape == (6, 4)
    torch.testing.assert_close(half, 0.5 * full)
