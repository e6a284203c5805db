"""Rows: the reward's slab and whole cubes of density, from planes and from a latent."""

import functools

import torch

from benchmarks import configurations
from benchmarks.planes import TINY, PlaneField, sizes
from benchmarks.rows import Case, Outcome, Row, Target
from eg3d_rlhf.generators import load_generator
from eg3d_rlhf.sigma import SlabSpec
from eg3d_rlhf.sigma.slab import sigma_grid

POINTS_AT_ONCE = 10**6  # as EG3D's shape extraction
SLAB = sizes(SlabSpec(), SlabSpec(resolution=64))
CUBE = sizes(SlabSpec.cube(256), SlabSpec.cube(64))


def from_planes(device: str, tiny: bool, size: str, cube: bool, train: bool) -> Case:
    """Both paths start from the same planes; the reference decodes all outputs at every point."""
    field = PlaneField(TINY if tiny else (CUBE if cube else SLAB)[size], "eg3d", device, POINTS_AT_ONCE)

    def run(path: str) -> Outcome:
        if not train:
            return Outcome({"sigma": field.forward(path)})
        sigma, gradients = field.train(path)
        return Outcome({"sigma": sigma}, gradients)

    return Case(fast=lambda: run("separable"), reference=lambda: run("pointwise"))


def from_latent(device: str, tiny: bool, size: str, cube: bool) -> Case:
    """From ws to the grid: one synthesis; in the reference one for each million of points."""
    if tiny or size == "full":
        G = configurations.build(tiny, device)[0].G_ema
    else:
        G = load_generator(None, device).G
    ws, _ = configurations.latent(G, device)
    spec = TINY.spec if tiny else (CUBE if cube else SLAB)[size].spec

    def run() -> Outcome:
        with torch.no_grad():
            return Outcome({"sigma": sigma_grid(G, ws, spec)})

    return Case(fast=run)


# The decoder that gives an untrained generator a closed surface takes the difference of two terms of up to 800: what rounds away there is
# 1e-5 of the density's own range, from planes that agree within 2e-6. The rows that start from the same planes keep the default, 1e-5.
_FROM_LATENT = 5e-5


def _rows(size: str) -> list[Row]:
    full = size == "full"
    cube = "256^3" if full else "64^3"
    slab = Target(at_least=15, aim=25) if full else None
    train = Target(at_least=12, aim=25, memory_mb_below=200) if full else None
    whole = Target(at_least=20, aim=40) if full else None

    def planes(**kwargs):
        return functools.partial(from_planes, size=size, **kwargs)

    def latent(**kwargs):
        return functools.partial(from_latent, size=size, **kwargs)

    seconds = {name: s if full else 0.05 for name, s in {"slab": 4.5, "train": 14, "latent": 6, "cube": 30, "cube latent": 42}.items()}
    return [
        Row(name="slab forward, from planes", size=size, make=planes(cube=False, train=False), seconds=seconds["slab"], target=slab),
        Row(
            name="slab forward + backward to planes and decoder", size=size, make=planes(cube=False, train=True), seconds=seconds["train"],
            target=train,
        ),
        Row(name="slab forward, from a latent", size=size, make=latent(cube=False), seconds=seconds["latent"], tolerance=_FROM_LATENT),
        Row(
            name=f"cube {cube}, from planes", size=size, make=planes(cube=True, train=False), seconds=seconds["cube"], target=whole,
            meter_in_round=full,
        ),
        Row(
            name=f"cube {cube}, from a latent", size=size, make=latent(cube=True), seconds=seconds["cube latent"], meter_in_round=full,
            tolerance=_FROM_LATENT,
        ),
    ]


ROWS = [*_rows("full"), *_rows("bundled")]
