"""Train the bundled feature network of the Fréchet distance: python -m builders.features

The network regresses the factors of synthetic heads and the strength of artificial image damage. The program
then checks that Fréchet distances under the network rise with the strength of the damage. A function of
damage takes one strength per image, [N], where 0 leaves the image unchanged. Its result depends only on the
images, the strengths and the state of its generator.

Shapes: N number of images, H x W pixels, F number of features, K number of factors.
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
from eg3d_rlhf.core.cli import GroupedCommand, option, options_from_settings
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
DAMAGE_RANGE = {  # damage -> smallest and largest strength in training, in the units of DAMAGES
    "blur": (0.0, 2.5),
    "noise": (0.0, 0.4),
    "colour": (-0.4, 0.4),
    "shift": (-8.0, 8.0),
    "squeeze": (-0.25, 0.25),
    "ghost": (0.0, 0.5),
}


CLEAN_SHARE = 0.4  # share of images that stay undamaged in training; others get one or two kinds of damage


def blur(images: Tensor, sigma: Tensor, generator: torch.Generator) -> Tensor:
    """Blur images [N, 3, H, W] by Gaussians of standard deviation `sigma` [N] in pixels. Border pixels
    are repeated.
    """
    radius = max(1, math.ceil(3 * float(sigma.max())))
    steps = torch.arange(-radius, radius + 1, dtype=images.dtype)
    kernel = torch.exp(-0.5 * (steps / sigma.clamp_min(1e-3)[:, None]) ** 2)
    # One kernel per image and channel: [N * 3, taps].
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(3, dim=0)
    image_count, _, height, width = images.shape
    # Images and channels become groups of one convolution, first vertical, then horizontal.
    flat_images = F.pad(images, (radius,) * 4, mode="replicate").reshape(
        1, image_count * 3, height + 2 * radius, width + 2 * radius
    )
    flat_images = F.conv2d(flat_images, kernel[:, None, :, None], groups=image_count * 3)
    return F.conv2d(flat_images, kernel[:, None, None, :], groups=image_count * 3).reshape(
        image_count, 3, height, width
    )


def noise(images: Tensor, std: Tensor, generator: torch.Generator) -> Tensor:
    """Add white noise of standard deviation [N] to images in [-1, 1], and clip them to that range."""
    return (images + std[:, None, None, None] * torch.randn(images.shape, generator=generator)).clamp(-1, 1)


def colour(images: Tensor, amount: Tensor, generator: torch.Generator) -> Tensor:
    """Add `amount` [N] to the red channel, subtract it from the blue channel, and clip images to [-1, 1]."""
    tint = torch.tensor([1.0, 0.0, -1.0])[:, None, None] * amount[:, None, None, None]
    return (images + tint).clamp(-1, 1)


def _warp(images: Tensor, matrices: Tensor) -> Tensor:
    """Resample images by affine maps, with white outside the image.

    Args:
        images: images [N, 3, H, W].
        matrices: maps [N, 2, 3] from output to input coordinates, both in -1..1.
    """
    # White is 1. Padding adds zeros, so images are shifted by -1 before and by +1 after.
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    return F.grid_sample(images - 1, grid, mode="bilinear", padding_mode="zeros", align_corners=False) + 1


def shift(images: Tensor, pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Move images to the right by `pixels` [N], which may be negative or fractional."""
    matrices = torch.eye(2, 3).repeat(len(images), 1, 1)
    # The map is from output to input, hence the sign; the width is 2 in coordinates of -1..1.
    matrices[:, 0, 2] = -2 * pixels / images.shape[-1]
    return _warp(images, matrices)


def squeeze(images: Tensor, amount: Tensor, generator: torch.Generator) -> Tensor:
    """Scale the content of images horizontally to the share 1 - amount [N] of its width."""
    matrices = torch.eye(2, 3).repeat(len(images), 1, 1)
    matrices[:, 0, 0] = 1 / (1 - amount)
    return _warp(images, matrices)


def ghost(images: Tensor, amount: Tensor, generator: torch.Generator) -> Tensor:
    """Blend each image with a random image of the batch, (1 - amount) image + amount other image.

    The result looks like an average of samples.

    Args: amount: weight of the other image, [N] of 0..1.
    """
    other_images = images[torch.randperm(len(images), generator=generator)]
    return torch.lerp(images, other_images, amount[:, None, None, None])


# Name -> function, rising strengths that `adequacy` compares, unit of the strengths.
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
    """Settings of a training. Repeated on the same machine with the same number of threads, it gives the
    same network.
    """

    epochs: int = knob(20, "Number of passes over the training images.", "Training", low=1)
    batch: int = 64  # images per step
    learning_rate: float = 2e-3  # of Adam; it decays to zero along a cosine
    held_out: float = 0.1  # share of the images, the last ones, on which the network is only evaluated
    seed: int = knob(
        0,
        "Random seed of the initial weights, of the order of the images and of their damage.",
        "Training",
        low=0,
    )


def read_images(path: Path, count: int | None = None) -> Tensor:
    """Read the images of a dataset's zip file in the order of their names, uint8 [N, 3, H, W].

    Args:
        path: path of the zip file.
        count: number of images to read; None means all.
    """
    with zipfile.ZipFile(path) as archive:
        file_names = sorted(name for name in archive.namelist() if name.endswith(".png"))[:count]
        pixels = [
            np.asarray(PIL.Image.open(io.BytesIO(archive.read(name))).convert("RGB")) for name in file_names
        ]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()


def to_float(images: Tensor) -> Tensor:
    """Convert pixels from uint8 to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def factors(truth: HeadsTruth) -> Tensor:
    """Return the true factors [N, K] of images of synthetic heads, in the order of FACTOR_NAMES.

    The factors are the latent coordinates that are visible in an image, and yaw and pitch of the camera in
    radians, 0 for a frontal view. The coordinates of scan quality are left out, because the images show
    ground-truth heads.
    """
    # A label begins with the 16 numbers of the matrix cam2world, row by row; its last column is the position.
    camera_position = truth.labels[:, [3, 7, 11]].astype(np.float64)
    yaw = np.arctan2(camera_position[:, 0], camera_position[:, 2])
    pitch = np.arcsin(camera_position[:, 1] / np.linalg.norm(camera_position, axis=1))
    visible_coordinates = [
        truth.shape[:, :IDENTITY],
        truth.shape[:, people.COMPONENTS :],
        truth.appearance[:, : people.APPEARANCE],
    ]
    columns = np.concatenate([*visible_coordinates, np.stack([yaw, pitch], axis=1)], axis=1)
    return torch.from_numpy(columns.astype(np.float32))


def damage_batch(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Damage a random part of a batch.

    Args:
        images: images [N, 3, H, W] in [-1, 1].
        generator: random generator.
    Returns: images; and strengths [N, 6], one column per kind of damage. They are divided by the largest
        strength of the kind, and 0 without damage.
    """
    image_count = len(images)
    strengths = torch.zeros(image_count, len(DAMAGE_NAMES))
    is_damaged = torch.rand(image_count, generator=generator) >= CLEAN_SHARE
    # Two kinds of damage per image, which may be the same.
    damage_indices = torch.randint(len(DAMAGE_NAMES), (image_count, 2), generator=generator)
    for column, name in enumerate(DAMAGE_NAMES):
        low, high = DAMAGE_RANGE[name]
        amount = torch.rand(image_count, generator=generator) * (high - low) + low
        damaged_indices = (is_damaged & (damage_indices == column).any(dim=1)).nonzero()[:, 0]
        # A single image cannot be blended with another image.
        if len(damaged_indices) > 1:
            images = images.clone()
            images[damaged_indices] = DAMAGES[name][0](
                images[damaged_indices], amount[damaged_indices], generator
            )
            strengths[damaged_indices, column] = amount[damaged_indices] / max(abs(low), abs(high))
    return images, strengths


@torch.no_grad()
def _finish(
    net: HeadFactorNet, images: Tensor, targets: Tensor, held_out: slice, network_record: dict
) -> HeadFactorFeatures:
    """Standardise the features of a trained network, and complete its record.

    Features are standardised by their mean and standard deviation over the training images. The explained
    variance per factor on the held-out images and a hash of the weights are added to the record.

    Args:
        net: trained network.
        images: uint8 images [N, 3, H, W].
        targets: standardised factors [N, K].
        held_out: range of the held-out images, the last ones.
        network_record: description of the network; entries are added to it.
    """
    net.eval()
    features = torch.cat([net.penultimate(to_float(chunk)) for chunk in images.split(256)])  # [N, F]
    train_features = features[: held_out.start]
    net.feature_mean.copy_(train_features.mean(dim=0))
    net.feature_std.copy_(train_features.std(dim=0).clamp_min(1e-3))
    # The first outputs of the head are factors, the others strengths of damage.
    predicted = net.head(features[held_out])[:, : len(FACTOR_NAMES)]
    # Mean squared error over the variance: 1 - explained variance.
    residual = (predicted - targets[held_out]).square().mean(dim=0) / targets[held_out].var(dim=0).clamp_min(
        1e-6
    )
    network_record["explained_variance"] = {
        name: round(1 - float(r), 3) for name, r in zip(FACTOR_NAMES, residual, strict=True)
    }
    digest = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    network_record["hash"] = digest.hexdigest()[:12]
    return HeadFactorFeatures(net, network_record)


def train_features(
    images: Tensor,
    true_factors: Tensor,
    options: FeatureTraining,
    on_step: Callable[[int, int, float], None] | None = None,
) -> HeadFactorFeatures:
    """Train a network that regresses factors and damage from images, by the mean squared error.

    Args:
        images: images, uint8 [N, 3, H, W].
        true_factors: factors [N, K]; they are standardised.
        options: settings.
        on_step: function that is called after every step with (step, steps, loss).
    Returns: network with its record: settings, explained variance per factor on the held-out images, and a
        hash of the weights.
    """
    assert true_factors.shape == (len(images), len(FACTOR_NAMES))
    held_out = slice(len(images) - max(1, round(options.held_out * len(images))), len(images))
    if images.shape[-1] != RESOLUTION:
        images = to_resolution(images.float(), RESOLUTION).round().to(torch.uint8)
    # Factors are standardised over the training images.
    centre = true_factors[: held_out.start].mean(dim=0)
    spread = true_factors[: held_out.start].std(dim=0).clamp_min(1e-6)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        net = HeadFactorNet()
        generator = torch.Generator().manual_seed(options.seed)
    optimiser = torch.optim.Adam(net.parameters(), lr=options.learning_rate)
    steps_per_epoch = max(1, held_out.start // options.batch)
    steps = options.epochs * steps_per_epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    for step in range(steps):
        # A new random order at the beginning of every epoch; an incomplete batch at its end is left out.
        if step % steps_per_epoch == 0:
            order = torch.randperm(held_out.start, generator=generator)
        start = (step % steps_per_epoch) * options.batch
        image_indices = order[start : start + options.batch]
        # Images are not mirrored, because the light is always at the right.
        batch, strengths = damage_batch(to_float(images[image_indices]), generator)
        # Strengths have the factor 2, so that their scale is closer to that of the standardised factors.
        error = net(batch) - torch.cat(
            [(true_factors[image_indices] - centre) / spread, 2 * strengths], dim=1
        )
        loss = error.square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if on_step is not None:
            on_step(step + 1, steps, loss.item())
    network_record = {"training": asdict(options), "images": len(images), "final_loss": round(loss.item(), 4)}
    return _finish(net, images, (true_factors - centre) / spread, held_out, network_record)


@dataclass(frozen=True, kw_only=True)
class AdequacyRow:
    """Result of `adequacy` for one kind of damage."""

    damage: str  # name of the damage
    unit: str  # unit of the strengths
    strengths: tuple[float, ...]  # rising, beginning with 0
    distances: tuple[float, ...]  # Fréchet distance at each strength


@torch.no_grad()
def adequacy(network: FeatureNetwork, images: Tensor, seed: int = 0, batch: int = 250) -> list[AdequacyRow]:
    """Compute Fréchet distances between damaged and undamaged real images, for rising strengths of damage.

    The second half of the images is damaged; the first half is the reference.

    Args:
        network: feature network.
        images: images, uint8 [N, 3, H, W] with N >= 2 F + 2.
        seed: seed of random damage.
        batch: images per pass of the network.
    Returns: one row per kind of damage.
    Raises: ValueError for too few images.
    """
    half = len(images) // 2
    if half < network.dim + 1:
        raise ValueError(
            f"--check-data: at least {2 * network.dim + 2} images are needed for {network.dim} features, got"
            f" {len(images)}. Pass a larger dataset, such as synthetic:people64@n=1000."
        )

    def compute_statistics(half_images: Tensor, damage=None, strength: float = 0.0) -> FeatureStatistics:
        """Compute the mean and covariance of features of images, damaged if `damage` is not None."""
        # A new generator, so that all strengths have the same random damage.
        generator = torch.Generator().manual_seed(seed)
        feature_statistics = FeatureStatistics(network.dim)
        for chunk in half_images.split(batch):
            pixels = to_float(chunk)
            if damage is not None:
                pixels = damage(pixels, torch.full((len(chunk),), strength), generator)
            feature_statistics.update(network(pixels))
        return feature_statistics

    reference = compute_statistics(images[:half])
    undamaged_distance = compute_statistics(images[half:]).distance(reference)
    adequacy_rows = []
    for name, (damage, strengths, unit) in DAMAGES.items():
        distances = [
            compute_statistics(images[half:], damage, strength).distance(reference) for strength in strengths
        ]
        adequacy_rows.append(
            AdequacyRow(
                damage=name,
                unit=unit,
                strengths=(0.0, *strengths),
                distances=(undamaged_distance, *distances),
            )
        )
    return adequacy_rows


@click.command("python -m builders.features", cls=GroupedCommand)
@command.out(feature_files.DEFAULT_ASSET)
@option(
    "--data",
    metavar="NAME",
    default="synthetic:people64@n=6000,seed=71",
    help="Dataset of synthetic heads on which the network is trained, as synthetic:NAME@SETTINGS.",
    group="Training",
)
@options_from_settings(FeatureTraining)
@option(
    "--check-data",
    metavar="NAME",
    default="synthetic:people64",
    help="Dataset of images for the check. One half is damaged and compared with the other half.",
    group="Check",
)
@option(
    "--check-only",
    is_flag=True,
    group="Check",
    help="Only check the network in --out, without training. It may also be a TorchScript Inception.",
)
@command.dry_run
def features(out: Path, data: str, check_data: str, check_only: bool, dry_run: bool, **settings) -> None:
    """Train the bundled feature network of the Fréchet distance on images of heads. Then print the Fréchet
    distances of images with rising strengths of damage. This takes a few minutes on two cores.

    \b
    Example:
        python -m builders.features --check-only --check-data=synthetic:people64@n=256
    """
    # Flags that are not given are None; they keep the defaults.
    options = FeatureTraining(**{name: value for name, value in settings.items() if value is not None})
    if dry_run:
        click.echo(
            json.dumps({"out": out.name, "data": data, "check_data": check_data, **asdict(options)}, indent=1)
        )
        return
    if check_only:
        network = feature_files.load_features(out)
    else:
        dataset_path = resolve_dataset(data)
        images = read_images(dataset_path)
        targets = factors(load_truth(dataset_path))
        with command.loss_bar("features", []) as on_step:
            network = train_features(images, targets, options, on_step)
        network.record["data"] = data
        network.save(out)
        variance = network.record["explained_variance"]
        click.echo(
            f"{network.name}: mean explained variance {sum(variance.values()) / len(variance):.3f}, saved to"
            f" {out}"
        )
    click.echo(f"Fréchet distance between the damaged and the undamaged half of {check_data}:")
    for row in adequacy(network, read_images(resolve_dataset(check_data))):
        cells = "  ".join(
            f"{strength:g}: {distance:8.3f}"
            for strength, distance in zip(row.strengths, row.distances, strict=True)
        )
        is_rising = all(lower < higher for lower, higher in itertools.pairwise(row.distances))
        click.echo(f"{row.damage:8s} [{row.unit:10s}]  {cells}  {'rises' if is_rising else 'DOES NOT RISE'}")


if __name__ == "__main__":
    features()
