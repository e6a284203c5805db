"""Preference rounds small enough for a test: a tiny generator whose shapes have a surface, a few pairs, tiny
rewards.
"""

import dataclasses
import functools
from pathlib import Path

import torch

from eg3d_rlhf.rewards import training_run
from eg3d_rlhf.tuning.gan import heldout_metrics as monitor
from eg3d_rlhf.tuning.gan import rounds
from tests import tiny_runs
from training import networks
from training.heads import people

DATA = "synthetic:people32@n=24"
FLAGS = (
    "--reward=sigma",
    "--rounds=2",
    "--weak-reward",  # the rewards are trained on a few pairs only
    "--round-pairs=14",
    "--set=round_members=2",
    "--set=round_preset=tiny",
    "--kimg=0.008",
    "--tick=0.004",
    "--snap=0",
    "--set=rlr=0.02",
    "--no-summary",
    "--reward-shaping=none",
    "--reward-clip=-10,10",
    "--consistency-gate=1",
)


def write_networks(path: Path) -> Path:
    """Tiny networks whose latents name heads, and whose raw density crosses the surface's level all over the
    cube.
    """
    nets = tiny_runs.build_networks(z_dim=people.LATENT)
    for G in (nets.G, nets.G_ema):
        last = G.decoder.net[2]
        with torch.no_grad():
            last.weight[0] *= 400
            last.bias[0] = 10 - 420
    networks.save(path, nets)
    return path


def flags(init: Path, watch: Path, outdir: Path, *more: str) -> list[str]:
    """Of a run of two rounds."""
    return tiny_runs.train_flags(Path(DATA), init, outdir, f"--heldout-reward={watch}", *FLAGS, *more)


def ledger_of(folder: Path) -> list[dict]:
    """The rounds that the ledger names, checked."""
    return rounds.Ledger(folder).rounds


def coarse(setattr=setattr) -> None:
    """Let annotator and rewards look at coarse grids, which is quick.

    Args: setattr: such as a monkeypatch's.
    """
    small = dataclasses.replace(training_run.preset("tiny"), observe={"resolution": 24})
    setattr(training_run, "preset", lambda *_: small)
    setattr(rounds, "AnnotationOptions", functools.partial(rounds.AnnotationOptions, resolution=16))
    setattr(monitor, "ORACLE_RESOLUTION", 16)
