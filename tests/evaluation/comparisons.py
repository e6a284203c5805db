"""Comparisons small enough for a test: tiny generators that differ by noise on their weights, a run with
snapshots, a control.
"""

import copy
import dataclasses
import json
from pathlib import Path

import torch

from eg3d_rlhf.core.field import Bounds
from eg3d_rlhf.evaluation.comparison import Comparison, Sources, load_comparison
from eg3d_rlhf.experiments.run import OPTIONS
from eg3d_rlhf.generators import LoadedGenerator
from tests import tiny_runs
from training import networks

SMALL = {"n": 16, "images": 20, "batch": 8}


def moved(amount: float, seed: int = 1) -> networks.Networks:
    """The tiny networks of seed 0 with noise on every weight of the moving average."""
    nets = tiny_runs.build_networks()
    G_ema = copy.deepcopy(nets.G_ema)
    random = torch.Generator().manual_seed(seed)
    for parameter in G_ema.parameters():
        parameter.data += amount * torch.randn(parameter.shape, generator=random)
    return dataclasses.replace(nets, G_ema=G_ema)


def write_run(folder: Path, amounts: dict[int, float], lambda_r: float, noise: int = 1, **settings) -> Path:
    """A run folder: snapshots after so many images with noise of these amounts, and the recorded settings."""
    folder.mkdir(parents=True)
    record = {
        "reward": "sigma",
        "lambda_r": lambda_r,
        "data": "",
        "mirror": False,
        "batch": 4,
        "hashes": {},
        **settings,
    }
    (folder / OPTIONS).write_text(json.dumps(record))
    for i, (nimg, amount) in enumerate(amounts.items()):
        nets = moved(amount, noise)
        nets.cur_nimg = nimg
        networks.save(folder / f"network-snapshot-{i:06d}.safetensors", nets)
    return folder


def load(before: Path, reward: Path, **sources) -> Comparison:
    """A comparison of SMALL size on one core."""
    return load_comparison(Sources(before=before, reward_ckpt=reward, **{**SMALL, **sources}))


class StandIn:
    """A generator with some of its answers replaced: `StandIn(generator, field=..., img_resolution=64)`."""

    def __init__(self, generator, **replaced):
        self._generator = generator
        vars(self).update(replaced)

    def __getattr__(self, name):
        return getattr(self._generator, name)


def replaced(loaded: LoadedGenerator, hash: str = "stand-in", **answers) -> LoadedGenerator:
    """A loaded generator with some of its generator's answers replaced."""
    return dataclasses.replace(loaded, generator=StandIn(loaded.generator, **answers), hash=hash)


class Bodies:
    """A field of known bodies: `density(spec)` gives [D, H, W] or [N, D, H, W]."""

    level = 10.0
    bounds = Bounds()

    def __init__(self, density, n: int):
        self._density = density
        self._n = n

    def density_grid(self, grid):
        return self._density(grid).expand(self._n, *grid.shape)
