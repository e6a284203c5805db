"""Two slices of the xy plane: every fast path against the plain definition, and formats without slices."""

import copy
import json

import pytest
import torch

from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.generators import as_generator, load_networks
from eg3d_rlhf.generators.conversion import to_tri_grid, write
from eg3d_rlhf.generators.eg3d import PlaneField
from eg3d_rlhf.geometry import plane_maps
from eg3d_rlhf.geometry.brick_bounds import bounds_of_size
from eg3d_rlhf.geometry.mesh import extract_mesh
from eg3d_rlhf.geometry.mesh_export import FieldGrid, extract_field_mesh
from eg3d_rlhf.geometry.slab import sigma_at
from eg3d_rlhf.modes.network_files import describe_networks
from tests import tiny_runs
from tests.geometry.stand_in import StandIn, random_planes
from tests.geometry.test_chunked_mesh import assert_same_surface
from tests.rejections import raising
from torch_utils.ops.implementations import implementation
from training import networks
from training.fullhead import PanoHeadGenerator
from training.networks import state_hash
from training.rendering.renderer import SLICE_BLEND, slice_blend
from training.triplane import TriPlaneGenerator

SPEC = SlabSpec(
    resolution=20, crop=(0.1, 0.2, 0.0, 0.3, 0.1, 0.05)
)  # reaches in front of and behind the blend


def sliced_networks(seed: int = 0) -> networks.Networks:
    """Tiny networks whose xy plane has two slices."""
    nets = tiny_runs.build_networks(seed=seed)
    torch.manual_seed(seed)
    kwargs = {**nets.G_kwargs, "plane_slices": 2}
    return networks.build(kwargs, nets.D_kwargs, nets.training_set)


def sliced_field(layout: str, samples: int = 2, box_warp: float = 1.0, texels: int = 12) -> PlaneField:
    G = StandIn(layout, box_warp, plane_slices=2)
    G.basis = random_planes(3, 4, texels, texels, seed=5)
    ws = torch.randn(samples, 2, 3, generator=torch.Generator().manual_seed(1))
    return PlaneField(G, ws)


@pytest.mark.parametrize("layout", ["eg3d", "fixed", "panohead"])
@pytest.mark.parametrize("box_warp", [1.0, 0.7])
@pytest.mark.parametrize("block", [None, 700])
def test_the_density_on_a_grid_and_its_gradients_equal_those_of_points(monkeypatch, layout, box_warp, block):
    if block is not None:  # several blocks along x, whose sums the backward pass computes again
        monkeypatch.setattr(plane_maps, "_BLEND_CHUNK", block)
    G = StandIn(layout, box_warp, plane_slices=2)
    ws = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(1))
    values = []
    for impl in ("separable", "pointwise"):
        weights = [weight.clone().requires_grad_() for weight in G.weights]
        G.decoder.sigma_weights = lambda weights=weights: tuple(weights)
        leaf = ws.clone().requires_grad_()
        sigma = PlaneField(G, leaf).density_grid(SPEC, impl)
        cotangent = torch.randn(sigma.shape, generator=torch.Generator().manual_seed(3))
        values.append((sigma.detach(), *torch.autograd.grad(sigma, [leaf, *weights], cotangent)))
    for fast, slow in zip(*values, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4 * float(slow.abs().max()))


def test_slices_count_on_their_own_side_alone():
    """In front, channels of the slice at the back have no effect, and the reverse. Both do between them."""
    G = StandIn("fixed", plane_slices=2)
    ws = torch.ones(1, 2, 3)
    z = torch.tensor([-0.4, -0.101, -0.06, 0.0, 0.051, 0.3])
    points = torch.stack([torch.full_like(z, 0.1), torch.full_like(z, -0.2), z], dim=1)
    before = PlaneField(G, ws).density(points)[0]
    changed = {}
    for name, channels in (("front", slice(0, 2)), ("back", slice(2, 4))):
        other = copy.deepcopy(G)
        other.basis[:, 0, channels] += 1
        changed[name] = (PlaneField(other, ws).density(points)[0] - before).abs() > 1e-6
    assert changed["front"].tolist() == [False, False, True, True, True, True]
    assert changed["back"].tolist() == [True, True, True, True, False, False]


def test_the_density_has_a_gradient_in_the_points_on_both_paths():
    field = sliced_field("fixed")
    points = (torch.rand(50, 3, generator=torch.Generator().manual_seed(2)) - 0.5) * 0.9
    gradients = []
    for impl in ("auto", "ref"):
        leaf = points.clone().requires_grad_()
        sigma = sigma_at(field.planes, field._axes, field._G.weights, leaf, impl=impl, blend=slice_blend(2))
        gradients.append(torch.autograd.grad(sigma.sum(), leaf)[0])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-4)
    assert gradients[0][:, 2].abs().min() > 0


@pytest.mark.parametrize("layout", ["eg3d", "fixed"])
@pytest.mark.parametrize("border", [0, 0.1])
@pytest.mark.parametrize("resolution", [22, 41])
def test_the_surface_from_bricks_equals_that_of_the_full_volume(layout, border, resolution):
    grid = FieldGrid(sliced_field(layout, samples=1, box_warp=1.2, texels=6), resolution, border)
    volume = grid(slice(0, resolution))
    level = float(volume[(grid.inside,) * 3].quantile(0.7))
    mesh = extract_field_mesh(grid, level)
    assert_same_surface(mesh, extract_mesh(volume.permute(2, 1, 0), grid.axes, level))


@pytest.mark.parametrize("cells", [2, 4])
def test_bounds_of_bricks_hold(cells):
    grid = FieldGrid(sliced_field("fixed", samples=1, texels=6), 25, 0)
    density = grid.separable()
    volume = density.maps.density(density.w, density.b, density.shape)
    level = float(volume.quantile(0.8))
    bounds = bounds_of_size(density, level, cells)
    is_above = volume > level
    first = torch.arange(bounds.undecided.shape[0]) * cells - 1
    decided = 0
    for x, y, z in torch.cartesian_prod(*(first,) * 3).tolist():
        part = is_above[tuple(slice(max(i, 0), i + cells + 1) for i in (x, y, z))]
        if not bounds.undecided[tuple((i + 1) // cells for i in (x, y, z))]:
            assert part.all() or not part.any()
            decided += 1
    assert decided > 0


def test_a_network_agrees_with_its_definition_and_with_its_file(tmp_path):
    nets = sliced_networks()
    plain = tiny_runs.build_networks()
    assert [name for name, _ in nets.G_ema.named_parameters()] == [
        name for name, _ in plain.G_ema.named_parameters()
    ]
    assert nets.G_ema.state_dict().keys() == plain.G_ema.state_dict().keys()
    path = tmp_path / "sliced.safetensors"
    networks.save(path, nets)
    read = load_networks(path).G_ema
    assert read.plane_slices == 2 and read.renderer.blend == SLICE_BLEND
    assert state_hash(read) == state_hash(nets.G_ema)
    field = as_generator(read).field(read.mapping(torch.randn(2, 8), torch.zeros(2, 25)))
    points = (torch.rand(2, 300, 3) - 0.5) * 0.9
    with torch.no_grad():
        fast = field.density(points), field.colour(points), field.density_grid(SPEC)
        decoded = field.decode(points)
        with implementation("ref"):
            slow = field.density(points), field.colour(points), field.density_grid(SPEC)
    for actual, expected in zip(fast, slow, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(decoded, slow[:2], rtol=1e-4, atol=1e-4)
    read.renderer.blend = None
    assert (field.density(points) - fast[0]).abs().max() > 1e-3


def test_networks_without_slices_are_as_before(tmp_path):
    nets = tiny_runs.build_networks()
    assert nets.G_ema.renderer.blend is None and "plane_slices" not in nets.G_kwargs
    networks.save(tmp_path / "x.safetensors", nets)
    assert "plane_slices" not in json.dumps(load_networks(tmp_path / "x.safetensors").G_kwargs)


def test_other_layouts_reject_a_network_with_slices(tmp_path):
    nets = sliced_networks()
    with raising("plane_slices=2", ".safetensors"):
        to_tri_grid(nets)
    for suffix in (".pt", ".pkl"):
        with raising("plane_slices=2", ".safetensors"):
            write(nets, tmp_path / f"x{suffix}", checkout_folder=tmp_path)
    assert not list(tmp_path.iterdir())
    write(nets, tmp_path / "x.safetensors")
    with raising("plane_slices", "2"):
        PanoHeadGenerator(rendering_kwargs={}, plane_slices=2)
    with raising("plane_slices", "3"):
        TriPlaneGenerator(**{**nets.G_kwargs, "plane_slices": 3})


def test_inspect_states_the_slices(tmp_path):
    stated = []
    for name, nets in (("plain", tiny_runs.build_networks()), ("sliced", sliced_networks())):
        path = tmp_path / f"{name}.safetensors"
        networks.save(path, nets)
        stated.append(describe_networks(path, seed_count=4)["generator"]["planes"])
    assert "slices" not in stated[0] and stated[1] == {**stated[0], "slices": 2}
