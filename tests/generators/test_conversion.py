"""The bundled generator as a tri-grid: the same density, colours, images and meshes through PanoHead's
path.
"""

import json
import re

import pytest
import torch
from click.testing import CliRunner

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.generators import as_generator, camera, load_generator, ws_of_seeds
from eg3d_rlhf.generators.conversion import EXACT, fit_slice_weights, to_tri_grid
from eg3d_rlhf.modes import network_files
from tests import tiny_runs
from tests.generators.pickles.writer import head_generator
from tests.rejections import check_message
from training import networks

SEEDS = [1, 2]
PSI = 0.7


def run(tool, *flags):
    return CliRunner().invoke(tool, [str(flag) for flag in flags])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(bundled generator, the same as a tri-grid, its file)."""
    path = tmp_path_factory.mktemp("converted") / "tri-grid.safetensors"
    result = run(network_files.convert, bundled.GENERATOR, "--tri-grid=1.5", f"--out={path}")
    assert result.exit_code == 0 and re.search(r"\b3\b.*\b1\.5\b", result.stdout), result.output
    return load_generator(), load_generator(path), path


@pytest.fixture(scope="module")
def fields(files):
    """Both fields of the same latents."""
    before, after, _ = files
    ws = ws_of_seeds(before.generator, SEEDS, PSI)
    assert torch.equal(ws, ws_of_seeds(after.generator, SEEDS, PSI))
    return before.generator.field(ws), after.generator.field(ws)


def test_the_blend_of_slices():
    shares, residual = fit_slice_weights(EXACT)
    torch.testing.assert_close(shares, torch.ones(3, dtype=torch.float64))
    assert residual < 1e-12
    # PanoHead's own slices: no blend is even up to the faces, where half is lost
    shares, residual = fit_slice_weights(1.0)
    assert shares[0] == pytest.approx(float(shares[2])) and 0.2 < residual < 0.5
    assert fit_slice_weights(1.4)[1] < residual


def test_density_and_colour_are_the_same(files, fields):
    before, after = fields
    assert files[1].generator.architecture == "panohead"
    grid = SlabSpec.from_bounds(files[0].generator.bounds, 25)
    with torch.no_grad():
        expected = before.density_grid(grid)
        scale = float(expected.max() - expected.min())
        for impl in ("separable", "pointwise"):
            assert float((after.density_grid(grid, impl) - expected).abs().max()) < 1e-5 * scale
        points = torch.rand(500, 3, generator=torch.Generator().manual_seed(0)) - 0.5
        torch.testing.assert_close(after.colour(points), before.colour(points), rtol=0, atol=1e-5)


def test_images_are_the_same(files, fields):
    label = camera(files[0].generator, 0.3, -0.1)
    seen = []
    for field in fields:
        torch.manual_seed(0)
        with torch.no_grad():
            seen.append(field.render(label))
    before, after = seen
    for name in ("image", "raw", "opacity"):
        error = (getattr(before, name) - getattr(after, name)).abs()
        # single fine samples move with rounding
        assert float(error.mean()) < 1e-5 and float(error.max()) < 5e-3, name
    solid = before.opacity > 0.5
    assert solid.float().mean() > 0.1 and float((before.depth - after.depth)[solid].abs().mean()) < 1e-4


@pytest.mark.parametrize("layout", ["eg3d", "fixed"])
def test_other_networks_are_converted_too(layout):
    """With super-resolution, noise, rays that leave the box, slices along two axes only,
    and no white background.
    """
    nets = tiny_runs.build_networks(plane_layout=layout)
    converted, residual = to_tri_grid(nets, extent=6)
    assert residual < 1e-12
    assert converted.D is nets.D and json.dumps(converted.G_kwargs)
    before = nets.G_ema
    after = converted.G_ema
    ws = before.mapping(torch.randn(2, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(2, 25))
    label = camera(before, 0.2, 0.1, n=2)
    for a, b in zip(*(render_image(G, ws, label) for G in (before, after)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    grid = SlabSpec.cube(9)
    torch.testing.assert_close(
        as_generator(after).field(ws).density_grid(grid),
        as_generator(before).field(ws).density_grid(grid),
        rtol=1e-4,
        atol=1e-4,
    )


def render_image(G, ws, label):
    torch.manual_seed(0)
    out = G.synthesis(ws, label, noise_mode="const")
    return out["image"], out["image_raw"], out["image_opacity"]


def test_networks_that_cannot_be_converted(tmp_path):
    G, kwargs = head_generator("panohead")
    path = tmp_path / "x.safetensors"
    networks.save(path, networks.Networks(None, None, G, kwargs, None, {}, architecture="panohead"))
    for flag, names in (
        ("--tri-grid=1.5", ("eg3d", "panohead")),
        ("--tri-grid=0.5", ("--tri-grid", "0.5")),
    ):
        result = run(network_files.convert, path, flag, f"--out={tmp_path / 'y.safetensors'}")
        assert result.exit_code == 2 and not (tmp_path / "y.safetensors").exists()
        check_message(result.stderr.splitlines()[-1], names)
