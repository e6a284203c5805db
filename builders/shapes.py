"""Train the features of the shape Fréchet distance on normal maps of true heads, and measure the distance of
held-out heads, true, blurred and damaged ones: python -m builders.shapes

Shape letters: N shapes, F views, Q features, n grid points along x, y, z, S targets, R pixels of a map's
edge, B maps of a batch.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor
from torch.nn import functional

from builders import command
from eg3d_rlhf.core.cli import GroupedCommand, options_of
from eg3d_rlhf.core.seeds import TRUE_HEADS
from eg3d_rlhf.generators import latents
from eg3d_rlhf.measures import shape_features
from eg3d_rlhf.measures.shape_features import FEATURES, IDENTITY, MapNet, ShapeFeatures, normal_maps
from training.config import Knobs, knob
from training.heads import people, people_damage
from training.heads.people import LATENT, LEVEL, density_of
from training.heads.people_mesh import grid_points, whole_grids
from training.progress import tqdm

EDGES = (0.0, 0.015, 0.03)  # depths at which true heads are fully dense, by turns; 0: distances as they are
BLURS = (0.5, 0.75, 1.0, 2.0)  # of the held-out heads, voxels of 64
OnShape = Callable[[int], object] | None


def mirrored(maps: torch.Tensor) -> torch.Tensor:
    """Maps [..., 4, R, R] of the mirror image: columns swapped, normals turned to the other side."""
    sign = maps.new_tensor([-1.0, 1.0, 1.0, 1.0])[:, None, None]
    return maps.flip(-1) * sign


@dataclass(frozen=True, kw_only=True)
class ShapeTraining(Knobs):
    """Settings of a training. On one machine with one thread it repeats bitwise."""

    heads: int = knob(
        500, "True heads that the features learn from, each as it is and blurred.", "Data", low=5
    )
    reference: int = knob(
        300, "True heads of the shape Fréchet distance, held out of the training.", "Data", low=40
    )
    held_out: int = knob(100, "True heads for the figures, held out of both.", "Data", low=5)
    grid: int = knob(64, "Points along an edge of the cube.", "Data", low=16, rare=True)
    blur: float = knob(2.0, "Largest blur that is learnt, voxels of 64.", "Data", above=0.25, rare=True)
    epochs: int = knob(20, "Passes over the maps.", "Training", low=1, rare=True)
    batch: int = knob(48, "Maps per step.", "Training", low=2, rare=True)
    learning_rate: float = knob(
        1.5e-3, "Of Adam, decayed to zero along a cosine.", "Training", above=0, rare=True
    )
    seed: int = knob(0, "Of initialisation, order, blur and mirroring.", "Training", low=0)


def true_grids(z: np.ndarray, grid: int, on_shape: OnShape = None) -> np.ndarray:
    """Return signed distances [N, n, n, n] of the ground-truth heads of latents [N, 64], which are cached."""
    grids = []
    for latent in z:
        grids.append(whole_grids(torch.from_numpy(latent[None]), grid))
        if on_shape is not None:
            on_shape(1)
    return np.concatenate(grids)


def filled(distances: np.ndarray, edge: float) -> np.ndarray:
    """Return LEVEL minus the density that a generator learns for distances; the distances if `edge` is 0."""
    return (LEVEL - density_of(torch.from_numpy(distances), edge)).numpy() if edge else distances


def true_maps(distances: np.ndarray, blurs: np.ndarray | None = None) -> Tensor:
    """Return normal maps [N, F, 4, R, R], half precision, of ground-truth heads [N, n, n, n].

    The heads take the values of EDGES in turn. Args: blurs: standard deviations [N] in voxels of 64.
    """
    maps = []
    for i, grid in enumerate(distances):
        values = filled(grid, EDGES[i % len(EDGES)])
        if blurs is not None:
            values = gaussian_filter(values, blurs[i] * len(values) / 64)
        maps.append(normal_maps(torch.from_numpy(values)[None]).half())
    return torch.cat(maps)


def targets(z: np.ndarray, blurs: np.ndarray) -> Tensor:
    """Return the regression targets [N, S] of latents [N, 64] and blurs [N]."""
    shown = people.scaled(z)[:, : people.SHAPE]
    columns = [shown[:, :IDENTITY], shown[:, people.COMPONENTS :], blurs[:, None]]
    return torch.from_numpy(np.concatenate(columns, axis=1)).float()


def fit(maps: Tensor, wanted: Tensor, o: ShapeTraining) -> MapNet:
    """Train a network on maps [B, 4, R, R], half precision, and targets [B, S].

    A random half of every batch is mirrored, since heads are nearly symmetric.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(o.seed)
        net = MapNet()
    random = torch.Generator().manual_seed(o.seed)
    optimiser = torch.optim.AdamW(net.parameters(), lr=o.learning_rate, weight_decay=0.01)
    per_epoch = math.ceil(len(maps) / o.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, o.epochs * per_epoch)
    for _ in range(o.epochs):
        for rows in torch.randperm(len(maps), generator=random).split(o.batch):
            batch = maps[rows].float()
            swap = torch.rand(len(rows), generator=random) < 0.5
            predicted = net(torch.where(swap[:, None, None, None], mirrored(batch), batch))
            optimiser.zero_grad()
            functional.mse_loss(predicted, wanted[rows]).backward()
            optimiser.step()
            schedule.step()
    return net


def train_shape_features(z: np.ndarray, o: ShapeTraining, on_shape: OnShape = None) -> ShapeFeatures:
    """Train the features on the first `o.heads` latents.

    The next `o.reference` latents standardise them, and the next `o.held_out` measure them.
    """
    learnt, known, held = np.split(z[: o.heads + o.reference + o.held_out], [o.heads, o.heads + o.reference])
    blurs = np.random.default_rng(o.seed).uniform(0.25, o.blur, o.heads)
    distances = true_grids(learnt, o.grid, on_shape)
    maps = torch.cat([true_maps(distances), true_maps(distances, blurs)])
    wanted = torch.cat([targets(learnt, np.zeros(o.heads)), targets(learnt, blurs)])
    views = maps.shape[1]
    net = fit(maps.flatten(0, 1), wanted.repeat_interleave(views, dim=0), o)
    result = ShapeFeatures(
        net, torch.zeros(0), torch.stack([torch.zeros(FEATURES), torch.ones(FEATURES)]), {}
    )
    raw = result(true_maps(true_grids(known, o.grid, on_shape)))
    result.scale = torch.stack([raw.mean(dim=0), raw.std(dim=0).clamp_min(1e-6)])
    result.true = (raw - result.scale[0]) / result.scale[1]
    of_held = true_grids(held, o.grid, on_shape)
    result.record = {
        "training": asdict(o),
        "parameters": sum(p.numel() for p in net.parameters()),
        "frechet": frechet_figures(result, held, of_held),
        "explained": explained(net, held, of_held),
    }
    return result


def frechet_figures(features: ShapeFeatures, z: np.ndarray, distances: np.ndarray) -> dict[str, float]:
    """Return Fréchet distances to the reference: of ground-truth heads [N, n, n, n], blurred ones, and scans.

    Args: z: the heads' latents [N, 64]; distances: the heads.
    """
    points = (
        torch.from_numpy(grid_points(distances.shape[1])).float().reshape(1, -1, 3).expand(len(z), -1, -1)
    )
    quality = torch.from_numpy(people.scaled(z)[:, -people.QUALITY :]).float()
    scans = (
        people_damage.damaged(points, torch.from_numpy(distances).flatten(1), quality)
        .reshape(distances.shape)
        .numpy()
    )
    figures = {"true heads": features.frechet(true_maps(distances))}
    for blur in BLURS:
        figures[f"blurred by {blur:g} voxels"] = features.frechet(true_maps(distances, np.full(len(z), blur)))
    return {**figures, "scans": features.frechet(true_maps(scans))}


@torch.no_grad()
def explained(net: MapNet, z: np.ndarray, distances: np.ndarray) -> float:
    """Return the mean share of the coordinates' variance that the network explains on held-out heads."""
    maps = true_maps(distances)
    predicted = net(maps.float().flatten(0, 1)).unflatten(0, maps.shape[:2]).mean(dim=1)[:, :-1]
    wanted = targets(z, np.zeros(len(z)))[:, :-1]
    return float((1 - (predicted - wanted).square().mean(dim=0) / wanted.var(dim=0, unbiased=False)).mean())


@click.command("python -m builders.shapes", cls=GroupedCommand)
@options_of(ShapeTraining)
@command.out(shape_features.DEFAULT_ASSET)
@command.dry_run
def shapes(out: Path, dry_run: bool, **settings) -> None:
    """Train the features of the shape Fréchet distance on normal maps of true heads, and print how it ranks
    true, blurred and defective ones.

    One thread, so that the same command writes the same bytes on the same machine (a few minutes).

    \b
    Example:
        python -m builders.shapes --heads=8 --reference=40 --set=held_out=5 --set=grid=24 --out=s.safetensors
    """
    options = ShapeTraining(**{name: value for name, value in settings.items() if value is not None})
    if dry_run:
        click.echo(json.dumps({"out": out.name, **asdict(options)}, indent=1))
        return
    torch.set_num_threads(1)
    count = options.heads + options.reference + options.held_out
    with tqdm(total=count, desc="heads", unit="head") as bar:
        network = train_shape_features(
            latents(range(TRUE_HEADS, TRUE_HEADS + count), LATENT).numpy(), options, bar.update
        )
    network.save(out)
    for name, distance in network.record["frechet"].items():
        click.echo(f"shape Fréchet distance {distance:8.3f}: {name}")
    click.echo(f"explains {network.record['explained']:.3f} of the coordinates' variance; saved to {out}")


if __name__ == "__main__":
    shapes()
