"""Train the bundled feature network of the Fréchet distance on graded damage, and check that distances under
it rise with damage: python -m builders.features

Every kind of damage takes a strength per image [N], 0 = unchanged, and is deterministic given its generator.
Shape letters: N images, H x W pixels, F features, K factors.
"""

import hashlib
import io
import itertools
import json
import math
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.nn import functional as F

from builders import command
from eg3d_rlhf.core.cli import GroupedCommand, option, options_of
from eg3d_rlhf.measures import features as feature_files
from eg3d_rlhf.measures.distances import FeatureNetwork, FeatureStatistics
from eg3d_rlhf.measures.features import (
    DAMAGE_NAMES,
    FACTOR_NAMES,
    IDENTITY,
    RESOLUTION,
    HeadFactorFeatures,
    HeadFactorNet,
    to_resolution,
)
from training.config import Knobs, knob
from training.heads import people
from training.synthetic_heads import HeadsTruth, load_truth, resolve_dataset

Damage = Callable[[Tensor, Tensor, torch.Generator], Tensor]
DAMAGE_RANGE = {  # in the units of DAMAGES
    "blur": (0.0, 2.5),
    "noise": (0.0, 0.4),
    "colour": (-0.4, 0.4),
    "shift": (-8.0, 8.0),
    "squeeze": (-0.25, 0.25),
    "ghost": (0.0, 0.5),
}


CLEAN_SHARE = 0.4  # of every batch left undamaged; the others get one or two kinds of damage


def blur(images: Tensor, sigma: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian blur with standard deviation sigma [N] in pixels; borders repeat."""
    radius = max(1, math.ceil(3 * float(sigma.max())))
    steps = torch.arange(-radius, radius + 1, dtype=images.dtype)
    kernel = torch.exp(-0.5 * (steps / sigma.clamp_min(1e-3)[:, None]) ** 2)
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(3, dim=0)  # [N*3, taps]
    n, _, height, width = images.shape
    flat = F.pad(images, (radius,) * 4, mode="replicate").reshape(
        1, n * 3, height + 2 * radius, width + 2 * radius
    )
    flat = F.conv2d(flat, kernel[:, None, :, None], groups=n * 3)
    return F.conv2d(flat, kernel[:, None, None, :], groups=n * 3).reshape(n, 3, height, width)


def noise(images: Tensor, std: Tensor, generator: torch.Generator) -> Tensor:
    """Add white noise of standard deviation [N] to images in [-1, 1], and clip them to that range."""
    return (images + std[:, None, None, None] * torch.randn(images.shape, generator=generator)).clamp(-1, 1)


def colour(images: Tensor, amount: Tensor, generator: torch.Generator) -> Tensor:
    """Red gained and blue lost by `amount` [N] (signed), clipped to [-1, 1]."""
    tint = torch.tensor([1.0, 0.0, -1.0])[:, None, None] * amount[:, None, None, None]
    return (images + tint).clamp(-1, 1)


def _warp(images: Tensor, matrices: Tensor) -> Tensor:
    """Resample through affine matrices [N, 2, 3] (output to input, -1..1); outside is white."""
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    return F.grid_sample(images - 1, grid, mode="bilinear", padding_mode="zeros", align_corners=False) + 1


def shift(images: Tensor, pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Move right by `pixels` [N] (signed, may be fractional)."""
    matrices = torch.eye(2, 3).repeat(len(images), 1, 1)
    matrices[:, 0, 2] = -2 * pixels / images.shape[-1]
    return _warp(images, matrices)


def squeeze(images: Tensor, amount: Tensor, generator: torch.Generator) -> Tensor:
    """Narrow the content horizontally to 1 - amount of its width (negative widens)."""
    matrices = torch.eye(2, 3).repeat(len(images), 1, 1)
    matrices[:, 0, 0] = 1 / (1 - amount)
    return _warp(images, matrices)


def ghost(images: Tensor, amount: Tensor, generator: torch.Generator) -> Tensor:
    """Blend each image with another one of the batch, `amount` [N] in [0, 1] of it,
    as averaged samples look.
    """
    other = images[torch.randperm(len(images), generator=generator)]
    return torch.lerp(images, other, amount[:, None, None, None])


# name: function, rising strengths of the adequacy check, unit
DAMAGES: dict[str, tuple[Damage, tuple[float, ...], str]] = {
    "blur": (blur, (0.5, 0.75, 1.0, 1.5, 2.5), "px"),
    "noise": (noise, (0.03, 0.06, 0.12, 0.25, 0.5), "of range/2"),
    "colour": (colour, (0.05, 0.1, 0.2, 0.3, 0.5), "of range/2"),
    "shift": (shift, (1.0, 2.0, 4.0, 6.0, 10.0), "px of 64"),
    "squeeze": (squeeze, (0.05, 0.1, 0.15, 0.2, 0.3), "of width"),
    "ghost": (ghost, (0.05, 0.1, 0.2, 0.3, 0.5), "blend"),
}


@dataclass(frozen=True, kw_only=True)
class FeatureTraining(Knobs):
    """Settings of one run; a run repeats exactly on the same machine and number of threads."""

    epochs: int = knob(20, "Passes over them.", "Training", low=1)
    batch: int = 64
    learning_rate: float = 2e-3  # Adam, decayed to zero along a cosine
    held_out: float = 0.1  # last share of the images, for the record only
    seed: int = knob(0, "Seed of initialisation, order and damage.", "Training", low=0)


def read_images(path: Path, count: int | None = None) -> Tensor:
    """Images of a dataset zip in the order of their names, uint8 [N, 3, H, W]."""
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".png"))[:count]
        pixels = [np.asarray(PIL.Image.open(io.BytesIO(archive.read(name))).convert("RGB")) for name in names]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()


def to_float(images: Tensor) -> Tensor:
    """uint8 pixels as float in [-1, 1]."""
    return images.float() / 127.5 - 1


def factors(truth: HeadsTruth) -> Tensor:
    """Return the true factors [N, K] in the order of FACTOR_NAMES.

    They are the coordinates of the latent that an image shows, and yaw and pitch in radians from frontal.
    Scan quality is not among them, since the images show ground-truth heads.
    """
    position = truth.labels[:, [3, 7, 11]].astype(np.float64)  # camera centre, the last column of cam2world
    yaw = np.arctan2(position[:, 0], position[:, 2])
    pitch = np.arcsin(position[:, 1] / np.linalg.norm(position, axis=1))
    shown = [
        truth.shape[:, :IDENTITY],
        truth.shape[:, people.COMPONENTS :],
        truth.appearance[:, : people.APPEARANCE],
    ]
    columns = np.concatenate([*shown, np.stack([yaw, pitch], axis=1)], axis=1)
    return torch.from_numpy(columns.astype(np.float32))


def damage_batch(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Damage part of a batch at random; returns the images and the strengths [N, 6], scaled to about [-1, 1],
    0 where clean.
    """
    n = len(images)
    strengths = torch.zeros(n, len(DAMAGE_NAMES))
    damaged = torch.rand(n, generator=generator) >= CLEAN_SHARE
    kinds = torch.randint(len(DAMAGE_NAMES), (n, 2), generator=generator)
    for column, name in enumerate(DAMAGE_NAMES):
        low, high = DAMAGE_RANGE[name]
        amount = torch.rand(n, generator=generator) * (high - low) + low
        rows = (damaged & (kinds == column).any(dim=1)).nonzero()[:, 0]
        if len(rows) > 1:  # a single image has no partner to be blended with
            images = images.clone()
            images[rows] = DAMAGES[name][0](images[rows], amount[rows], generator)
            strengths[rows, column] = amount[rows] / max(abs(low), abs(high))
    return images, strengths


@torch.no_grad()
def _finish(
    net: HeadFactorNet, images: Tensor, targets: Tensor, held_out: slice, record: dict
) -> HeadFactorFeatures:
    """Standardise the features over the training part and write explained variances of the held-out part into
    the record.
    """
    net.eval()
    raw = torch.cat([net.penultimate(to_float(part)) for part in images.split(256)])
    fitted = raw[: held_out.start]
    net.feature_mean.copy_(fitted.mean(dim=0))
    net.feature_std.copy_(fitted.std(dim=0).clamp_min(1e-3))
    predicted = net.head(raw[held_out])[:, : len(FACTOR_NAMES)]
    residual = (predicted - targets[held_out]).square().mean(dim=0) / targets[held_out].var(dim=0).clamp_min(
        1e-6
    )
    record["explained_variance"] = {
        name: round(1 - float(r), 3) for name, r in zip(FACTOR_NAMES, residual, strict=True)
    }
    digest = hashlib.sha256()
    for name, value in sorted(net.state_dict().items()):
        digest.update(name.encode() + value.numpy().tobytes())
    record["hash"] = digest.hexdigest()[:12]
    return HeadFactorFeatures(net, record)


def train_features(
    images: Tensor,
    true_factors: Tensor,
    options: FeatureTraining,
    on_step: Callable[[int, int, float], None] | None = None,
) -> HeadFactorFeatures:
    """Regress factors and damage from images by mean squared error on standardised targets.

    Args: `images` uint8 [N, 3, H, W]; `true_factors` [N, K]; `on_step` is called with (step, steps, loss).
    Returns the network with its record (settings, explained variance per factor on the held-out images, hash
    of the weights).
    """
    assert true_factors.shape == (len(images), len(FACTOR_NAMES))
    held_out = slice(len(images) - max(1, round(options.held_out * len(images))), len(images))
    images = (
        to_resolution(images.float(), RESOLUTION).round().to(torch.uint8)
        if images.shape[-1] != RESOLUTION
        else images
    )
    centre = true_factors[: held_out.start].mean(dim=0)
    spread = true_factors[: held_out.start].std(dim=0).clamp_min(1e-6)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        net = HeadFactorNet()
        generator = torch.Generator().manual_seed(options.seed)
    optimiser = torch.optim.Adam(net.parameters(), lr=options.learning_rate)
    per_epoch = max(1, held_out.start // options.batch)
    steps = options.epochs * per_epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(held_out.start, generator=generator)
        start = (step % per_epoch) * options.batch
        rows = order[start : start + options.batch]
        # not mirrored: the light stands to the right
        batch, strengths = damage_batch(to_float(images[rows]), generator)
        error = net(batch) - torch.cat([(true_factors[rows] - centre) / spread, 2 * strengths], dim=1)
        loss = error.square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if on_step is not None:
            on_step(step + 1, steps, loss.item())
    record = {"training": asdict(options), "images": len(images), "final_loss": round(loss.item(), 4)}
    return _finish(net, images, (true_factors - centre) / spread, held_out, record)


@dataclass(frozen=True, kw_only=True)
class AdequacyRow:
    """One damage of the check: Fréchet distances of one half of the reals, damaged, to the other half."""

    damage: str
    unit: str
    strengths: tuple[float, ...]  # rising; the first is 0
    distances: tuple[float, ...]


@torch.no_grad()
def adequacy(network: FeatureNetwork, images: Tensor, seed: int = 0, batch: int = 250) -> list[AdequacyRow]:
    """Distance of the second half of images uint8 [N, 3, H, W], damaged ever more, to the untouched first
    half; 130 or more.
    """
    half = len(images) // 2
    if half < network.dim + 1:
        raise ValueError(
            f"adequacy: expected at least {2 * network.dim + 2} images, got {len(images)}. Use a larger set."
        )

    def statistics(part: Tensor, damage=None, strength: float = 0.0) -> FeatureStatistics:
        generator = torch.Generator().manual_seed(seed)
        result = FeatureStatistics(network.dim)
        for chunk in part.split(batch):
            pixels = to_float(chunk)
            if damage is not None:
                pixels = damage(pixels, torch.full((len(chunk),), strength), generator)
            result.update(network(pixels))
        return result

    reference = statistics(images[:half])
    floor = statistics(images[half:]).distance(reference)
    rows = []
    for name, (damage, strengths, unit) in DAMAGES.items():
        distances = [
            statistics(images[half:], damage, strength).distance(reference) for strength in strengths
        ]
        rows.append(
            AdequacyRow(damage=name, unit=unit, strengths=(0.0, *strengths), distances=(floor, *distances))
        )
    return rows


@click.command("python -m builders.features", cls=GroupedCommand)
@command.out(feature_files.DEFAULT_ASSET)
@option(
    "--data",
    metavar="NAME",
    default="synthetic:people64@n=6000,seed=71",
    help="Heads of people to train on.",
    group="Training",
)
@options_of(FeatureTraining)
@option(
    "--check-data",
    metavar="NAME",
    default="synthetic:people64",
    help="Reals of the damage table; halves are compared.",
    group="Check",
)
@option(
    "--check-only",
    is_flag=True,
    group="Check",
    help="Print the table for the network at --out (also a TorchScript Inception) without training.",
)
@command.dry_run
def features(out: Path, data: str, check_data: str, check_only: bool, dry_run: bool, **settings) -> None:
    """Train the bundled feature network on images of heads and print how its distances respond to damage
    (a few minutes on two cores).

    \b
    Example:
        python -m builders.features --check-only --check-data=synthetic:people64@n=256
    """
    options = FeatureTraining(**{name: value for name, value in settings.items() if value is not None})
    if dry_run:
        click.echo(
            json.dumps({"out": out.name, "data": data, "check_data": check_data, **asdict(options)}, indent=1)
        )
        return
    if check_only:
        network = feature_files.load_features(out)
    else:
        path = resolve_dataset(data)
        images = read_images(path)
        targets = factors(load_truth(path))
        with command.loss_bar("features", []) as on_step:
            network = train_features(images, targets, options, on_step)
        network.record["data"] = data
        network.save(out)
        variance = network.record["explained_variance"]
        click.echo(
            f"{network.name}: mean explained variance {sum(variance.values()) / len(variance):.3f}, saved to"
            f" {out}"
        )
    click.echo(f"Fréchet distance to the other half of {check_data}, by damage:")
    for row in adequacy(network, read_images(resolve_dataset(check_data))):
        cells = "  ".join(
            f"{strength:g}: {distance:8.3f}"
            for strength, distance in zip(row.strengths, row.distances, strict=True)
        )
        rises = all(a < b for a, b in itertools.pairwise(row.distances))
        click.echo(f"{row.damage:8s} [{row.unit:10s}]  {cells}  {'rises' if rises else 'DOES NOT RISE'}")


if __name__ == "__main__":
    features()
