"""Train the features of the shape Fréchet distance: python -m builders.shapes

A network regresses latent coordinates and blur from normal maps of ground-truth heads. The program then
measures the shape Fréchet distance of held-out heads: of ground-truth heads, of blurred heads, and of damaged
scans.

Shapes: N number of shapes, F number of views, n grid points along each axis, S number of regression
targets, R pixels per side of a map, B number of maps.
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
from eg3d_rlhf.core.cli import GroupedCommand, options_from_settings
from eg3d_rlhf.core.seeds import GROUND_TRUTH_HEADS
from eg3d_rlhf.generators import latents
from eg3d_rlhf.measures import shape_features
from eg3d_rlhf.measures.shape_features import FEATURES, IDENTITY, MapNet, ShapeFeatures, normal_maps
from training.config import Knobs, knob
from training.heads import people, people_damage
from training.heads.people import LATENT, LEVEL, density_of
from training.heads.people_mesh import grid_points, ground_truth_grids
from training.progress import tqdm

# Depths, in world units, at which ground-truth heads reach their full density. Heads have them in turn. For
# 0, signed distances are used instead of a density.
EDGES = (0.0, 0.015, 0.03)
BLURS = (0.5, 0.75, 1.0, 2.0)  # blurs of the held-out heads: standard deviations in voxels of a grid of 64
OnShape = Callable[[int], object] | None  # called with 1 after every head


def mirrored(maps: torch.Tensor) -> torch.Tensor:
    """Mirror normal maps [..., 4, R, R] horizontally. The x component of the normals, channel 0, changes
    its sign.
    """
    sign = maps.new_tensor([-1.0, 1.0, 1.0, 1.0])[:, None, None]
    return maps.flip(-1) * sign


@dataclass(frozen=True, kw_only=True)
class ShapeTraining(Knobs):
    """Settings of a training. Repeated on the same machine with one thread, it is bitwise identical."""

    heads: int = knob(
        500,
        "Number of ground-truth heads on which the features are trained, each sharp and blurred.",
        "Data",
        low=5,
    )
    reference: int = knob(
        300,
        "Number of ground-truth heads that are the reference of the shape Fréchet distance. They are not"
        " trained on.",
        "Data",
        low=40,
    )
    held_out: int = knob(
        100,
        "Number of further ground-truth heads, on which the trained features are evaluated.",
        "Data",
        low=5,
    )
    grid: int = knob(64, "Grid points along each axis of the cube.", "Data", low=16, rare=True)
    blur: float = knob(
        2.0,
        "Largest standard deviation of the blur in training, in voxels of a grid of 64.",
        "Data",
        above=0.25,
        rare=True,
    )
    epochs: int = knob(20, "Number of passes over the normal maps.", "Training", low=1, rare=True)
    batch: int = knob(48, "Number of normal maps per training step.", "Training", low=2, rare=True)
    learning_rate: float = knob(
        1.5e-3,
        "Initial learning rate of AdamW. It decays to zero along a cosine.",
        "Training",
        above=0,
        rare=True,
    )
    seed: int = knob(
        0,
        "Random seed of the initial weights, of the order of the maps, and of blur and mirroring.",
        "Training",
        low=0,
    )


def true_grids(z: np.ndarray, grid: int, on_shape: OnShape = None) -> np.ndarray:
    """Compute signed distances of ground-truth heads on a grid. They are cached on disk.

    Args:
        z: latents of the heads, [N, 64].
        grid: n, grid points along each axis.
        on_shape: function that is called with 1 after every head.
    Returns: distances [N, n, n, n] in world units, negative inside.
    """
    grids = []
    for latent in z:
        grids.append(ground_truth_grids(torch.from_numpy(latent[None]), grid))
        if on_shape is not None:
            on_shape(1)
    return np.concatenate(grids)


def density_field(distances: np.ndarray, edge: float) -> np.ndarray:
    """Convert signed distances to a field of the density that a generator learns, which is negative inside.

    Args:
        distances: signed distances in world units.
        edge: depth at which the density is full, in world units; 0: the distances are returned.
    Returns: LEVEL - density, with the shape of the distances.
    """
    return (LEVEL - density_of(torch.from_numpy(distances), edge)).numpy() if edge else distances


def true_maps(distances: np.ndarray, blurs: np.ndarray | None = None) -> Tensor:
    """Render normal maps of heads. The heads have the depths EDGES in turn.

    Args:
        distances: signed distances of the heads, [N, n, n, n].
        blurs: standard deviations of the Gaussian blur [N], in voxels of a grid of 64; None means no blur.
    Returns: normal maps [N, F, 4, R, R] in half precision.
    """
    maps = []
    for i, grid in enumerate(distances):
        field = density_field(grid, EDGES[i % len(EDGES)])
        if blurs is not None:
            # len(values) = n: from voxels of a grid of 64 to voxels of this grid.
            field = gaussian_filter(field, blurs[i] * len(field) / 64)
        maps.append(normal_maps(torch.from_numpy(field)[None]).half())
    return torch.cat(maps)


def targets(z: np.ndarray, blurs: np.ndarray) -> Tensor:
    """Return the regression targets [N, S]: the coordinates of identity and hair, and the blur.

    Args:
        z: latents [N, 64].
        blurs: standard deviations of the blur, [N].
    """
    shape_coordinates = people.normalise_latents(z)[:, : people.SHAPE]
    columns = [
        shape_coordinates[:, :IDENTITY],
        shape_coordinates[:, people.COMPONENTS :],
        blurs[:, None],
    ]
    return torch.from_numpy(np.concatenate(columns, axis=1)).float()


def fit(maps: Tensor, map_targets: Tensor, options: ShapeTraining) -> MapNet:
    """Train a network to predict targets from normal maps, by the mean squared error.

    Each map is mirrored with probability 1/2, because heads are nearly symmetric.

    Args:
        maps: normal maps [B, 4, R, R] in half precision.
        map_targets: targets [B, S].
        options: settings.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        net = MapNet()
    generator = torch.Generator().manual_seed(options.seed)
    optimiser = torch.optim.AdamW(net.parameters(), lr=options.learning_rate, weight_decay=0.01)
    steps_per_epoch = math.ceil(len(maps) / options.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, options.epochs * steps_per_epoch)
    for _ in range(options.epochs):
        for map_indices in torch.randperm(len(maps), generator=generator).split(options.batch):
            map_batch = maps[map_indices].float()
            is_mirrored = torch.rand(len(map_indices), generator=generator) < 0.5
            predicted = net(torch.where(is_mirrored[:, None, None, None], mirrored(map_batch), map_batch))
            optimiser.zero_grad()
            functional.mse_loss(predicted, map_targets[map_indices]).backward()
            optimiser.step()
            schedule.step()
    return net


def train_shape_features(z: np.ndarray, options: ShapeTraining, on_shape: OnShape = None) -> ShapeFeatures:
    """Train the features of the shape Fréchet distance.

    Args:
        z: latents [heads + reference + held_out, 64]. The features are trained on the first `options.heads`
            latents. Their scale and the reference of the distance are computed from the next
            `options.reference`, and they are evaluated on the others.
        options: settings.
        on_shape: function that is called with 1 after every head.
    """
    train_z, reference_z, held_out_z = np.split(
        z[: options.heads + options.reference + options.held_out],
        [options.heads, options.heads + options.reference],
    )
    blurs = np.random.default_rng(options.seed).uniform(0.25, options.blur, options.heads)
    distances = true_grids(train_z, options.grid, on_shape)
    # Each head once sharp and once blurred.
    maps = torch.cat([true_maps(distances), true_maps(distances, blurs)])
    head_targets = torch.cat([targets(train_z, np.zeros(options.heads)), targets(train_z, blurs)])
    views = maps.shape[1]
    # All views of a head have the same targets.
    net = fit(maps.flatten(0, 1), head_targets.repeat_interleave(views, dim=0), options)
    # Scale 0 and 1, so that the features below are not standardised yet.
    shape_features = ShapeFeatures(
        net, torch.zeros(0), torch.stack([torch.zeros(FEATURES), torch.ones(FEATURES)]), {}
    )
    reference_features = shape_features(true_maps(true_grids(reference_z, options.grid, on_shape)))
    shape_features.scale = torch.stack(
        [reference_features.mean(dim=0), reference_features.std(dim=0).clamp_min(1e-6)]
    )
    shape_features.true = (reference_features - shape_features.scale[0]) / shape_features.scale[1]
    held_out_distances = true_grids(held_out_z, options.grid, on_shape)
    shape_features.record = {
        "training": asdict(options),
        "parameters": sum(p.numel() for p in net.parameters()),
        "frechet": frechet_distances(shape_features, held_out_z, held_out_distances),
        "explained": explained(net, held_out_z, held_out_distances),
    }
    return shape_features


def frechet_distances(features: ShapeFeatures, z: np.ndarray, distances: np.ndarray) -> dict[str, float]:
    """Compute Fréchet distances to the reference, by the name of the set of shapes.

    The sets are the ground-truth heads, the same heads with each of BLURS, and their damaged scans.

    Args:
        features: trained features.
        z: latents of the heads, [N, 64].
        distances: signed distances of the heads, [N, n, n, n].
    """
    # Grid points, repeated for each head: [N, n^3, 3].
    points = (
        torch.from_numpy(grid_points(distances.shape[1])).float().reshape(1, -1, 3).expand(len(z), -1, -1)
    )
    # The last coordinates of a latent define the damage of the scan.
    quality = torch.from_numpy(people.normalise_latents(z)[:, -people.QUALITY :]).float()
    scans = (
        people_damage.damaged_distance(points, torch.from_numpy(distances).flatten(1), quality)
        .reshape(distances.shape)
        .numpy()
    )
    frechet = {"true heads": features.frechet(true_maps(distances))}
    for blur in BLURS:
        frechet[f"blurred by {blur:g} voxels"] = features.frechet(true_maps(distances, np.full(len(z), blur)))
    return {**frechet, "scans": features.frechet(true_maps(scans))}


@torch.no_grad()
def explained(net: MapNet, z: np.ndarray, distances: np.ndarray) -> float:
    """Compute the share of variance that the network explains, as the mean over coordinates.

    Args:
        net: trained network.
        z: latents of the heads, [N, 64].
        distances: signed distances of the heads, [N, n, n, n].
    """
    maps = true_maps(distances)
    # Predictions are averaged over views. The last target, the blur, is 0 for all heads and is left out.
    predicted = net(maps.float().flatten(0, 1)).unflatten(0, maps.shape[:2]).mean(dim=1)[:, :-1]
    true_targets = targets(z, np.zeros(len(z)))[:, :-1]
    error = (predicted - true_targets).square().mean(dim=0)
    return float((1 - error / true_targets.var(dim=0, unbiased=False)).mean())


@click.command("python -m builders.shapes", cls=GroupedCommand)
@options_from_settings(ShapeTraining)
@command.out(shape_features.DEFAULT_ASSET)
@command.dry_run
def shapes(out: Path, dry_run: bool, **settings) -> None:
    """Train the features of the shape Fréchet distance on normal maps of ground-truth heads. Then print the
    distances of ground-truth heads, blurred heads and damaged scans.

    The training uses one thread, so that the same command writes the same bytes on the same machine. It takes
    a few minutes.

    \b
    Example:
        python -m builders.shapes --heads=8 --reference=40 --set=held_out=5 --set=grid=24 --out=s.safetensors
    """
    # Flags that are not given are None; they keep the defaults.
    options = ShapeTraining(**{name: value for name, value in settings.items() if value is not None})
    if dry_run:
        click.echo(json.dumps({"out": out.name, **asdict(options)}, indent=1))
        return
    torch.set_num_threads(1)
    head_count = options.heads + options.reference + options.held_out
    with tqdm(total=head_count, desc="heads", unit="head") as bar:
        network = train_shape_features(
            latents(range(GROUND_TRUTH_HEADS, GROUND_TRUTH_HEADS + head_count), LATENT).numpy(),
            options,
            bar.update,
        )
    network.save(out)
    for name, distance in network.record["frechet"].items():
        click.echo(f"shape Fréchet distance {distance:8.3f}: {name}")
    click.echo(
        "share of the variance of the latent coordinates that is explained:"
        f" {network.record['explained']:.3f}; saved to {out}"
    )


if __name__ == "__main__":
    shapes()
