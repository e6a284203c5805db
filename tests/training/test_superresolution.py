"""Super-resolution modules: official files are read, and what the one without super-resolution does."""

from functools import cache

import torch

from eg3d_rlhf.generators import pickles
from tests.generators.pickles.writer import G_KWARGS, RENDERING, SnapshotWriter
from training import networks
from training.superresolution import NoSuperresolution
from training.triplane import TriPlaneGenerator

FILTER = "superresolution.resample_filter"


@cache
def with_8x() -> networks.Networks:
    """A generator of 512 pixels with few channels. Treat as read-only."""
    torch.manual_seed(0)
    rendering = {
        **RENDERING,
        "image_resolution": 512,
        "superresolution_module": "training.superresolution.SuperresolutionHybrid8X",
    }
    kwargs = {**G_KWARGS, "img_resolution": 512, "rendering_kwargs": rendering}
    return networks.Networks(None, None, TriPlaneGenerator(**kwargs).eval(), kwargs, None, {})


def test_an_official_pickle_with_the_8x_module_is_read():
    nets = with_8x()
    rebuilt = pickles.rebuild(
        pickles.parse(memoryview(SnapshotWriter().snapshot(nets, ("G_ema",))), "official.pkl")
    )
    assert FILTER in rebuilt.G_ema.state_dict() and networks.state_hash(rebuilt.G_ema) == networks.state_hash(
        nets.G_ema
    )


def test_without_super_resolution_the_rendering_is_the_image():
    module = NoSuperresolution(channels=3, img_resolution=64)
    rgb = torch.rand(2, 3, 64, 64)
    assert module(rgb, rgb, torch.zeros(2, 7, 8)) is rgb and not list(module.parameters())
    larger = torch.rand(2, 3, 96, 96)
    smaller = torch.full((2, 3, 32, 32), 0.5)
    assert module(larger, larger, torch.zeros(2, 7, 8)).shape == larger.shape
    assert torch.equal(module(smaller, smaller, torch.zeros(2, 7, 8)), torch.full((2, 3, 64, 64), 0.5))
