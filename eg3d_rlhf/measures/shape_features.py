"""The features of the shape Fréchet distance, learnt from pictures of true heads' normals alone.

A small network reads normal maps of heads of people from in front, behind and both sides. It learnt which
coordinates of a latent they show, and by how much a head was blurred; it saw no generator and no damaged
scan. Its penultimate layer, standardised over true heads, is the feature. Judges alone may read this file,
never an annotator, a reward or an early stop (tests/test_structure.py).
Letters: N shapes, F views, Q features, K true heads, n grid points along x, y, z, S targets, R pixels of a
map's edge, B maps of a batch.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn
from torch.nn import functional

from eg3d_rlhf.core.cli import ASSETS
from eg3d_rlhf.measures.distances import FeatureStatistics
from eg3d_rlhf.measures.views import normals_from_points
from training import storage
from training.config import check_knobs, knob
from training.heads import people, people_damage
from training.heads.people import LEVEL, density_of
from training.heads.people_mesh import grid_points, whole_grids

# Normal maps of a shape's surface, seen from fixed directions without perspective: no renderer, no colour, no
# rays of the generator's. A grid of values is turned about y and cut by columns; a column's first change of
# sign gives a height, the heights give normals. True heads and generators take the same path from grids of
# one size, so that only their shapes tell them apart.


RESOLUTION = 48  # R
# radians from frontal: the face, the back and both sides of it, where scans differ
YAWS = (0.0, 2.1, math.pi, -2.1)
# of the box that is seen, world units: side of the maps, y of its floor, depth along a view
WIDTH = 0.66
LOWEST = -0.30
DEPTH = 0.90
STEPS = 58  # samples along a view
CHANNELS = 4  # normal along the view's right, up and towards the viewer; 1 where there is a surface


def levelled(values: Tensor) -> Tensor:
    """Values [N, n, n, n] over the median step between neighbours across each shape's surface, held within
    -1..1: neither the unit, nor a decoder's slope and extremes, tell one kind of shape from another.
    """
    values = values.float().nan_to_num(nan=1e4, posinf=1e4, neginf=-1e4)
    out = []
    for shape in values:
        steps = []
        for axis in range(3):
            first = shape.narrow(axis, 0, len(shape) - 1)
            second = shape.narrow(axis, 1, len(shape) - 1)
            steps.append((first - second)[(first < 0) != (second < 0)].abs())
        step = torch.cat(steps)
        out.append((shape / (step.median() if len(step) else 1.0)).clamp(-1, 1))
    return torch.stack(out)


@torch.no_grad()
def normal_maps(values: Tensor, yaws: Sequence[float] = YAWS) -> Tensor:
    """Maps [N, F, 4, R, R] of shapes [N, n, n, n] over the cube of side 1, in a view's own axes; rows run
    down. 0 where nothing is known.

    Args: values: axes x, y, z, the middles of voxels, negative inside, as `people_mesh.grid_points` orders
        them.
    The viewer of yaw a stands in direction (sin a, 0, cos a). A normal is known where a pixel and its four
    neighbours show a surface.
    Raises: ValueError for what is no cube.
    """
    if values.ndim != 4 or len(set(values.shape[1:])) != 1:
        raise ValueError(
            f"normal_maps: expected values [N, n, n, n], got {list(values.shape)}. Sample them on a cube."
        )
    # [N, 1, z, y, x]; outside the cube is 0, as far from the surface
    volume = (1 - levelled(values)).permute(0, 3, 2, 1)[:, None]
    line = (torch.arange(RESOLUTION, device=values.device) + 0.5) / RESOLUTION * WIDTH
    u = line - WIDTH / 2
    v = (LOWEST + line).flip(0)
    # towards the viewer, nearest first
    w = torch.linspace(DEPTH / 2, -DEPTH / 2, STEPS, device=values.device)
    v, w, u = torch.meshgrid(v, w, u, indexing="ij")
    maps = []
    for yaw in yaws:
        x = u * math.cos(yaw) + w * math.sin(yaw)
        z = w * math.cos(yaw) - u * math.sin(yaw)
        place = 2 * torch.stack([x, v, z], dim=-1)
        turned = (
            functional.grid_sample(volume, place.expand(len(volume), -1, -1, -1, -1), align_corners=False)[
                :, 0
            ]
            - 1
        )
        maps.append(_maps(turned, u[:, 0], v[:, 0]))
    return torch.stack(maps, dim=1)


def _maps(values: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """One view's maps [N, 4, R, R] of values [N, H, w, u] that are positive inside, nearest w first; u, v
    [R, R]: places of the pixels.
    """
    inside = values >= 0
    hit = inside.any(dim=2)  # [N, H, u]
    index = inside.to(torch.uint8).argmax(dim=2, keepdim=True)
    before = (index - 1).clamp_min(0)
    value = values.gather(2, index)
    previous = values.gather(2, before)
    step = torch.where(index > 0, (-previous / (value - previous).clamp_min(1e-9)).clamp(0, 1), 0.0)[:, :, 0]
    height = DEPTH / 2 - DEPTH / (STEPS - 1) * (before[:, :, 0] + step)  # [N, H, u]
    points = torch.stack([u.expand_as(height), v.expand_as(height), height], dim=-1)  # [N, R, R, 3]
    normal, known = normals_from_points(points, hit)
    return torch.cat([(normal * known[..., None]).permute(0, 3, 1, 2), hit[:, None].float()], dim=1)


def mirrored(maps: torch.Tensor) -> torch.Tensor:
    """Maps [..., 4, R, R] of the mirror image: columns swapped, normals turned to the other side."""
    sign = maps.new_tensor([-1.0, 1.0, 1.0, 1.0])[:, None, None]
    return maps.flip(-1) * sign


DEFAULT_ASSET = ASSETS / "shape-features.safetensors"
KIND = "shape features"
AT_ONCE = 8  # shapes whose maps are drawn together
WIDTHS = (CHANNELS, 12, 24, 40, 48)
FEATURES = 32  # Q
IDENTITY = 16  # leading components of a head's shape: maps of few pixels show little of the others
TARGETS = IDENTITY + people.HAIR_FIELDS + 1  # S; the last is the blur


class MapNet(nn.Module):
    """Four strided convolutions, a hidden layer and a linear output; 42 thousand parameters."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(4):
            size = 5 if i == 0 else 3
            layers += [nn.Conv2d(WIDTHS[i], WIDTHS[i + 1], size, stride=2, padding=size // 2), nn.SiLU()]
        self.trunk = nn.Sequential(*layers)  # [B, 4, R, R] -> [B, 48, R/16, R/16]
        self.hidden = nn.Linear(WIDTHS[-1] * (RESOLUTION // 16) ** 2, FEATURES)
        self.head = nn.Linear(FEATURES, TARGETS)

    def penultimate(self, maps: Tensor) -> Tensor:
        """[B, Q] of maps [B, 4, R, R]."""
        return functional.silu(self.hidden(self.trunk(maps).flatten(1)))

    def forward(self, maps: Tensor) -> Tensor:
        return self.head(self.penultimate(maps))


class ShapeFeatures:
    """The network, its features of true heads that it did not learn from, and the record of its training."""

    def __init__(self, net: MapNet, true: Tensor, scale: Tensor, record: dict) -> None:
        self.net = net.eval().requires_grad_(False)
        # [K, Q] features of true heads; [2, Q] mean and deviation of their raw ones
        self.true = true
        self.scale = scale
        self.record = record

    @torch.no_grad()
    def __call__(self, maps: Tensor) -> Tensor:
        """Features [N, Q] of maps [N, F, 4, R, R], in deviations of true heads; the mean over views."""
        parts = [
            self.net.penultimate(part.float().flatten(0, 1)).unflatten(0, part.shape[:2]).mean(dim=1)
            for part in maps.split(64)
        ]
        return (torch.cat(parts) - self.scale[0]) / self.scale[1]

    def of_grids(self, values: np.ndarray) -> np.ndarray:
        """Features [N, Q] float64 of shapes [N, n, n, n], negative inside."""
        parts = torch.from_numpy(np.ascontiguousarray(values)).float().split(AT_ONCE)
        return torch.cat([self(normal_maps(part)) for part in parts]).double().numpy()

    def frechet(self, maps: Tensor) -> float:
        """Fréchet distance of shapes' maps [N, F, 4, R, R] to the true heads; lower is better."""
        return (
            FeatureStatistics(FEATURES)
            .update(self(maps))
            .distance(FeatureStatistics(FEATURES).update(self.true))
        )

    def save(self, path: Path) -> None:
        """Write the network and features at `path`, and the record as JSON beside them."""
        storage.write_tensors(
            path, KIND, {**self.net.state_dict(), "true": self.true, "scale": self.scale}, self.record
        )
        storage.write_atomic(
            path.with_suffix(".json"), (json.dumps(self.record, indent=1, sort_keys=True) + "\n").encode()
        )

    @classmethod
    def load(cls, path: Path = DEFAULT_ASSET) -> "ShapeFeatures":
        """Read a file that `save` wrote.

        Raises: FileNotFoundError; ValueError for a damaged or foreign file.
        """
        tensors, record = storage.read_tensors(path, KIND)
        true = tensors.pop("true")
        scale = tensors.pop("scale")
        net = MapNet()
        storage.load_strict(net, tensors, str(path))
        return cls(net, true, scale, record)


# Training, and what the distance says of heads that were held out: of true ones, blurred ones and broken
# ones.


EDGES = (0.0, 0.015, 0.03)  # depths at which true heads are fully dense, by turns; 0: distances as they are
BLURS = (0.5, 0.75, 1.0, 2.0)  # of the held-out heads, voxels of 64
OnShape = Callable[[int], object] | None


@dataclass(frozen=True, kw_only=True)
class ShapeTraining:
    """One run; it repeats to the byte on the same machine with one thread."""

    heads: int = knob(
        500, "True heads that the features learn from, each as it is and blurred.", "Data", low=5
    )
    reference: int = knob(
        300, "True heads behind the shape Fréchet distance, held out of the training.", "Data", low=40
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

    def __post_init__(self) -> None:
        check_knobs(self)


def true_grids(z: np.ndarray, grid: int, on_shape: OnShape = None) -> np.ndarray:
    """Signed distances [N, n, n, n] of the whole heads of latents [N, 64]; kept in the cache from then on."""
    grids = []
    for latent in z:
        grids.append(whole_grids(torch.from_numpy(latent[None]), grid))
        if on_shape is not None:
            on_shape(1)
    return np.concatenate(grids)


def filled(distances: np.ndarray, edge: float) -> np.ndarray:
    """Level less density of distances as a generator learns it; distances as they are where `edge` is 0."""
    return (LEVEL - density_of(torch.from_numpy(distances), edge)).numpy() if edge else distances


def true_maps(distances: np.ndarray, blurs: np.ndarray | None = None) -> Tensor:
    """Maps [N, F, 4, R, R] half precision of true heads [N, n, n, n], dense by one of EDGES by turns and
    blurred by voxels of 64.
    """
    maps = []
    for i, grid in enumerate(distances):
        values = filled(grid, EDGES[i % len(EDGES)])
        if blurs is not None:
            values = gaussian_filter(values, blurs[i] * len(values) / 64)
        maps.append(normal_maps(torch.from_numpy(values)[None]).half())
    return torch.cat(maps)


def targets(z: np.ndarray, blurs: np.ndarray) -> Tensor:
    """What is learnt [N, S] of latents [N, 64] and blurs [N]."""
    shown = people.scaled(z)[:, : people.SHAPE]
    columns = [shown[:, :IDENTITY], shown[:, people.COMPONENTS :], blurs[:, None]]
    return torch.from_numpy(np.concatenate(columns, axis=1)).float()


def fit(maps: Tensor, wanted: Tensor, o: ShapeTraining) -> MapNet:
    """A network trained on maps [B, 4, R, R] half precision and targets [B, S], half of every batch mirrored
    at random: heads are nearly symmetric.
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
    """Learn from the first `o.heads` of latents, standardise by the next `o.reference`, and measure on the
    next `o.held_out`.
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
    """Fréchet distances to the reference of whole heads [N, n, n, n] that latents [N, 64] name, of blurred
    ones, and of their scans.
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
    """Mean share of the coordinates' variance that the network explains on held-out heads."""
    maps = true_maps(distances)
    predicted = net(maps.float().flatten(0, 1)).unflatten(0, maps.shape[:2]).mean(dim=1)[:, :-1]
    wanted = targets(z, np.zeros(len(z)))[:, :-1]
    return float((1 - (predicted - wanted).square().mean(dim=0) / wanted.var(dim=0, unbiased=False)).mean())
