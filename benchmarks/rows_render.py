"""Rows: the volume renderer alone, and the whole generator, without gradients."""

import functools

import torch

from benchmarks import configurations
from benchmarks.rows import Case, Outcome, Row, Target
from eg3d_rlhf.generators import load_generator
from training.triplane import TriPlaneGenerator

# Measured on the full renderer: 6e-5 in the features, 1.6e-4 in the depth, on a few of 16 thousand rays; 1e-7 and 4e-7 on average. It is
# float32: from the same rendering in float64 the reference's features are 1.4e-4 off, the fast path's 1.3e-4.
FEW_RAYS = 5e-4


def _generator(device: str, tiny: bool, size: str) -> tuple[TriPlaneGenerator, int]:
    """G in eval mode, and its rendered pixels per edge."""
    if size == "bundled" and not tiny:
        G = load_generator(None, device).G
    else:
        G = configurations.build(tiny, device)[0].G_ema
    return G, (G.neural_rendering_resolution if size == "bundled" or tiny else 128)


def renderer(device: str, tiny: bool, size: str) -> Case:
    """Planes and rays to features, depth and opacity; coarse and fine pass."""
    G, resolution = _generator(device, tiny, size)
    ws, c = configurations.latent(G, device)
    with torch.no_grad():
        planes = G.planes(ws, noise_mode="const")
        origins, directions = G.ray_sampler(c[:, :16].reshape(-1, 4, 4), c[:, 16:].reshape(-1, 3, 3), resolution)

    def run() -> Outcome:
        with torch.no_grad():
            features, depth, opacity = G.renderer(planes, G.decoder, origins, directions, G.rendering_kwargs)
        return Outcome({"features": features, "depth": depth, "opacity": opacity})

    return Case(fast=run)


def generator(device: str, tiny: bool, size: str) -> Case:
    """Latent and camera to the image."""
    G, resolution = _generator(device, tiny, size)
    _, c = configurations.latent(G, device)
    z = torch.randn([1, G.z_dim], generator=torch.Generator().manual_seed(2)).to(device)

    def run() -> Outcome:
        with torch.no_grad():
            return Outcome(G.synthesis(G.mapping(z, c), c, neural_rendering_resolution=resolution, noise_mode="const"))

    return Case(fast=run)


def _rows(size: str) -> list[Row]:
    full = size == "full"
    part = functools.partial
    return [
        Row(
            name="renderer forward", size=size, make=part(renderer, size=size), seconds=2.5 if full else 0.05,
            target=Target(at_least=2.5, aim=4) if full else None, tolerance=FEW_RAYS,
        ),
        Row(
            name="G forward", size=size, make=part(generator, size=size), seconds=6 if full else 0.1,
            target=Target(at_least=1.4, aim=2) if full else None, tolerance=FEW_RAYS, half_on_cuda=full,
        ),
    ]


ROWS = [*_rows("full"), *_rows("bundled")]
