"""A family that defines density and colour gets renders from `march`, and with them sheets and meshes."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from click.testing import CliRunner

from eg3d_rlhf.core import registry
from eg3d_rlhf.core.field import LEVEL, DecodedField, Field, RenderOptions, march
from eg3d_rlhf.generators import camera, load_generator, ws_of_seeds
from eg3d_rlhf.generators.assets.grids import TriPlanes
from eg3d_rlhf.modes import samples
from tests import tiny_runs

PLUGIN = Path(__file__).with_name("balls.py")
CENTRE = (0.05, -0.03, 0.02)
SLOPE = 200.0  # of balls.py
MIDDLE = 20  # of an image of 41 pixels, which looks at the centre


def entry(radius: float) -> float:
    """Return the mean depth at which a ray through a ball's centre ends, world units below the surface."""
    below = np.linspace(-0.1, 2 * radius + 0.1, 100_001)
    absorbed = np.logaddexp(0, LEVEL + SLOPE * (radius - np.abs(below - radius)) - 1) * (below[1] - below[0])
    weights = absorbed * np.exp(-np.cumsum(absorbed))
    return float((below * weights).sum() / weights.sum())


@pytest.fixture(scope="module")
def balls(tmp_path_factory):
    """File of the family; the plugin is named, not imported."""
    path = tmp_path_factory.mktemp("balls") / "balls.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(registry.VARIABLE, str(PLUGIN))
        registry.load_plugins()
        sys.modules[PLUGIN.stem].save(path, centre=CENTRE)
        yield path
    tiny_runs.forget_plugin("balls")


@pytest.fixture(scope="module")
def pair(balls):
    """(generator, field of two shapes, their radii [2, 2])."""
    generator = load_generator(balls).generator
    ws = ws_of_seeds(generator, [1, 2])
    return generator, generator.field(ws), ws[:, 0]


def test_images_equal_closed_forms(pair):
    """From the front, each camera looking at a ball: the way to its surface, its colour, and nothing beside
    it.
    """
    generator, field, radii = pair
    assert isinstance(field, Field) and not isinstance(field, DecodedField)
    options = RenderOptions(resolution=41, samples=1000)
    for ball, colour in enumerate(([1, -0.5, -0.5], [-0.5, -0.5, 1])):
        labels = camera(generator, n=2).clone()
        labels[:, 3] += (-0.2, 0.2)[ball]  # beside its place, so that it looks at the ball
        with torch.no_grad():
            rendering = field.render(labels, options)
        middle = generator.module.middles[ball].detach()
        ways = (labels[:, [3, 7, 11]] - middle).norm(dim=1).double() - radii[:, ball].double()
        ways += torch.tensor([entry(radius) for radius in radii[:, ball].tolist()])
        torch.testing.assert_close(rendering.depth[:, 0, MIDDLE, MIDDLE].double(), ways, rtol=0, atol=1e-4)
        assert rendering.raw[:, :, MIDDLE, MIDDLE].flatten().tolist() == pytest.approx(colour * 2, abs=0.1)
        assert (rendering.opacity[:, 0, MIDDLE, MIDDLE] > 0.95).all() and (
            rendering.opacity[:, 0, 0, 0] == 0
        ).all()
        assert (rendering.raw[:, :, 0, 0] == -1).all()


def test_one_pass_or_two_are_the_same():
    asset = TriPlanes(2, 8)

    class TwoPasses(Field):
        bounds = asset.bounds
        level = asset.level

        def __len__(self):
            return len(asset)

        def density(self, points):
            return asset.density(points)

        def colour(self, points):
            return asset.colour(points)

    options = RenderOptions(resolution=9, samples=12)
    cameras = camera(load_generator().generator, 0.3, 0.1, n=2)
    for once, twice in zip(asset.render(cameras, options), march(TwoPasses(), cameras, options), strict=True):
        assert torch.equal(once, twice)


def test_sheets_and_meshes(balls, pair, tmp_path):
    _, _, radii = pair
    for command, flags in (
        (
            samples.images,
            ["--seeds=1", "--shapes=1", "--shape-res=24", "--shape-format=.glb", f"--outdir={tmp_path}"],
        ),
        (
            samples.mesh,
            [
                "--seed=1",
                "--trunc=1",
                "--resolution=96",
                "--set=component=all",
                f"--out={tmp_path / 'balls.ply'}",
            ],
        ),
    ):
        done = CliRunner().invoke(command, [f"--network={balls}", *flags])
        assert done.exit_code == 0, (done.output, done.exception)
    assert {path.suffix for path in tmp_path.iterdir()} >= {".glb", ".png", ".ply"}
    mesh = trimesh.load(tmp_path / "balls.ply")
    assert mesh.is_watertight
    assert mesh.volume == pytest.approx(4 / 3 * math.pi * float((radii[0] ** 3).sum()), rel=0.02)
