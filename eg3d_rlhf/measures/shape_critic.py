"""A second opinion on shapes, learnt from pictures of normals alone: the shape critic, and the features of the shape Fréchet distance.

Two small networks of one kind read normal maps. The critic tells true heads from shapes of early generators; its score is
the logit that a shape is a true head, averaged over views. The other one learnt the family's shape parameters from true heads alone and saw
no generator: its penultimate layer, standardised over true heads, is the feature of the Fréchet distance. Judges alone may read this file,
never an annotator, a reward or an early stop (tests/test_structure.py).
Letters: N shapes, F views, Q features, K true heads, S shape parameters, D, H, W grid points along z, y, x, R = RESOLUTION of the box's
grid and of the maps, B maps of a batch.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from eg3d_rlhf.core.cli import ASSETS
from eg3d_rlhf.core.field import LEVEL, Bounds, Field
from eg3d_rlhf.core.seeds import refuse_held_out
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.core.statistics import wilson_interval
from eg3d_rlhf.generators import of, ws_of_seeds
from eg3d_rlhf.measures.distances import FeatureStatistics
from eg3d_rlhf.measures.true_heads import RAMPS, head_distances, ramped
from eg3d_rlhf.measures.views import normals_from_points
from training import storage
from training.config import check_knobs, knob
from training.heads.family import SHAPE_COUNT

# Normal maps of a density's level set, seen from fixed directions without perspective: no renderer, no colour, no rays of the generator's.
# A box about the head is read from the density, turned about y and cut by columns; a column's first crossing of the level gives a height,
# the heights give normals. True heads and generators take the same path, so that only their shapes tell them apart.


RESOLUTION = 64  # R
CELLS = 128  # grid points per edge of the whole cube, of which the box holds half
CROP = (0.25, 0.25, 0.28125, 0.21875, 0.28125, 0.21875)  # x -0.25..0.25, y and z -0.22..0.28 of a cube of side 1: the head, no shoulders
YAWS = (-0.5, 0.0, 0.5)  # radians from frontal
CHANNELS = 4  # normal along the view's right, up and towards the viewer; 1 where there is a surface
CLIP = 50.0  # raw density above and below the level beyond which values count as this: a decoder's extremes do not move the surface


def box(bounds: Bounds) -> SlabSpec:
    """The grid that the maps of a field with these bounds are made from."""
    return SlabSpec.of(bounds, CELLS, crop=CROP)


@torch.no_grad()
def normal_maps(sigma: torch.Tensor, level: float = LEVEL, yaws: Sequence[float] = YAWS) -> torch.Tensor:
    """Maps [N, F, 4, R, R] of raw densities [N, R, R, R] on a `box`, in a view's own axes; rows run down. 0 where nothing is known.

    The viewer of yaw a stands in direction (sin a, 0, cos a). A normal is known where a pixel and its four neighbours show a surface.
    Raises: ValueError for a grid of another shape.
    """
    if sigma.ndim != 4 or tuple(sigma.shape[1:]) != (RESOLUTION,) * 3:
        expected = ["N", *(RESOLUTION,) * 3]
        raise ValueError(f"normal_maps: expected sigma {expected}, got {list(sigma.shape)}. Sample it on a box.")
    values = (sigma.float().nan_to_num(nan=-1e4, posinf=1e4, neginf=-1e4) - level).clamp(-CLIP, CLIP)
    layers = values.transpose(1, 2).flip(1) + CLIP  # [N, H, D, W], rows down; 0 is empty
    line = torch.linspace(-1, 1, RESOLUTION, device=sigma.device)  # of the box, half its side is 1
    w, u = torch.meshgrid(line.flip(0), line, indexing="ij")  # w: towards the viewer, nearest first
    maps = []
    for yaw in yaws:
        x, z = u * math.cos(yaw) + w * math.sin(yaw), w * math.cos(yaw) - u * math.sin(yaw)
        place = torch.stack([x, z], dim=-1).expand(len(sigma), -1, -1, -1)
        turned = functional.grid_sample(layers, place, align_corners=True) - CLIP  # [N, H, w, u]
        maps.append(_maps(turned, line))
    return torch.stack(maps, dim=1)


def _maps(values: torch.Tensor, line: torch.Tensor) -> torch.Tensor:
    """One view's maps [N, 4, R, R] of densities less the level [N, H, w, u], nearest w first."""
    inside = values >= 0
    hit = inside.any(dim=2)  # [N, H, u]
    index = inside.to(torch.uint8).argmax(dim=2, keepdim=True)
    before = (index - 1).clamp_min(0)
    value, previous = values.gather(2, index), values.gather(2, before)
    step = torch.where(index > 0, (-previous / (value - previous).clamp_min(1e-9)).clamp(0, 1), 0.0)[:, :, 0]
    spacing = 2 / (RESOLUTION - 1)
    height = 1 - spacing * (before[:, :, 0] + step)  # [N, H, u]
    v, u = torch.meshgrid(line.flip(0), line, indexing="ij")
    points = torch.stack([u.expand_as(height), v.expand_as(height), height], dim=-1)  # [N, R, R, 3]
    normal, known = normals_from_points(points, hit)
    return torch.cat([(normal * known[..., None]).permute(0, 3, 1, 2), hit[:, None].float()], dim=1)


def maps_of(field: Field) -> torch.Tensor:
    """Maps [N, F, 4, R, R] of a field's shapes."""
    with torch.no_grad():
        return normal_maps(field.density_grid(box(field.bounds)), field.level)


def mirrored(maps: torch.Tensor) -> torch.Tensor:
    """Maps [..., 4, R, R] of the mirror image: columns swapped, normals turned to the other side."""
    sign = maps.new_tensor([-1.0, 1.0, 1.0, 1.0])[:, None, None]
    return maps.flip(-1) * sign


DEFAULT_ASSET = ASSETS / "critic.safetensors"
KIND = "shape critic"
WIDTHS = (CHANNELS, 12, 24, 40, 48)
FEATURES = 32  # Q


class MapNet(nn.Module):
    """Four strided convolutions, a hidden layer and a linear output; 55 thousand parameters."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(4):
            size = 5 if i == 0 else 3
            layers += [nn.Conv2d(WIDTHS[i], WIDTHS[i + 1], size, stride=2, padding=size // 2), nn.SiLU()]
        self.trunk = nn.Sequential(*layers)  # [B, 4, R, R] -> [B, 48, R/16, R/16]
        self.hidden = nn.Linear(WIDTHS[-1] * (RESOLUTION // 16) ** 2, FEATURES)
        self.head = nn.Linear(FEATURES, outputs)

    def penultimate(self, maps: Tensor) -> Tensor:
        """[B, Q] of maps [B, 4, R, R]."""
        return functional.silu(self.hidden(self.trunk(maps).flatten(1)))

    def forward(self, maps: Tensor) -> Tensor:
        return self.head(self.penultimate(maps))


class ShapeCritic:
    """The two networks, the features of true heads that neither saw, and the record of their training."""

    def __init__(self, critic: MapNet, features: MapNet, true: Tensor, scale: Tensor, record: dict) -> None:
        self.critic, self.features_net = (net.eval().requires_grad_(False) for net in (critic, features))
        self.true, self.scale = true, scale  # [K, Q] features of true heads; [2, Q] mean and deviation of their raw ones
        self.record = record

    @torch.no_grad()
    def logits(self, maps: Tensor) -> Tensor:
        """Logit [N] that each shape is a true head, of maps [N, F, 4, R, R]; the mean over views. Higher is better."""
        return self.critic(maps.flatten(0, 1)).unflatten(0, maps.shape[:2]).mean(dim=(1, 2))

    @torch.no_grad()
    def features(self, maps: Tensor) -> Tensor:
        """Features [N, Q] of maps [N, F, 4, R, R], in deviations of true heads; the mean over views."""
        raw = self.features_net.penultimate(maps.flatten(0, 1)).unflatten(0, maps.shape[:2]).mean(dim=1)
        return (raw - self.scale[0]) / self.scale[1]

    def to(self, device: torch.device) -> "ShapeCritic":
        """Move the networks; returns self."""
        self.critic.to(device)
        self.features_net.to(device)
        self.scale = self.scale.to(device)
        return self

    def save(self, path: Path) -> None:
        """Write the networks and features at `path`, and the record as JSON beside them."""
        tensors = {f"{name}.{key}": value for name, net in self._nets().items() for key, value in net.state_dict().items()}
        storage.write_tensors(path, KIND, {**tensors, "true": self.true, "scale": self.scale}, self.record)
        storage.write_atomic(path.with_suffix(".json"), (json.dumps(self.record, indent=1, sort_keys=True) + "\n").encode())

    def _nets(self) -> dict[str, MapNet]:
        return {"critic": self.critic, "features": self.features_net}

    @classmethod
    def load(cls, path: Path = DEFAULT_ASSET) -> "ShapeCritic":
        """Read a file that `save` wrote. Raises: FileNotFoundError; ValueError for a damaged or foreign file."""
        tensors, record = storage.read_tensors(path, KIND)
        nets = {"critic": MapNet(1), "features": MapNet(SHAPE_COUNT)}
        for name, net in nets.items():
            own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
            storage.load_strict(net, own, str(path))
        return cls(nets["critic"], nets["features"], tensors["true"], tensors["scale"], record)


# Training of the critic and of the features, and what they were worth on shapes that were held out. Fakes are shapes of generators, never
# true heads that somebody damaged: what a critic of invented damage learns is the invention.


BINS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)  # of the predicted probability, for the calibration
OnShape = Callable[[int], object] | None


@dataclass(frozen=True, kw_only=True)
class CriticTraining:
    """One run; it repeats to the byte on the same machine with one thread."""

    latents: int = knob(300, "Shapes of each network.", "Data", low=5)
    heads: int = knob(1200, "True heads that the features learn from; the critic takes as many of them as there are fakes.", "Data", low=5)
    reference: int = knob(400, "True heads behind the shape Fréchet distance, held out of the training.", "Data", low=40)
    epochs: int = knob(12, "Passes over the maps.", "Training", low=1, rare=True)
    batch: int = knob(48, "Maps per step.", "Training", low=2, rare=True)
    learning_rate: float = knob(1.5e-3, "Of Adam, decayed to zero along a cosine.", "Training", above=0, rare=True)
    smoothing: float = knob(0.05, "How far labels are from 0 and 1: bounds the logits.", "Training", low=0, below=0.5, rare=True)
    held_out: float = knob(0.2, "Last share of every source, for the figures.", "Training", above=0, below=1, rare=True)
    seed: int = knob(0, "Of initialisation, order and mirroring.", "Training", low=0)

    def __post_init__(self) -> None:
        check_knobs(self)


def fake_maps(network: Any, seeds: range, batch: int = 16, on_shape: OnShape = None) -> Tensor:
    """Normal maps [N, F, 4, R, R] half precision of a generator's seeds, without truncation. Raises: ValueError for held-out seeds."""
    refuse_held_out(seeds, "shape critic")
    generator, parts = of(network), []
    for start in range(0, len(seeds), batch):
        with torch.no_grad():
            parts.append(maps_of(generator.field(ws_of_seeds(generator, seeds[start : start + batch]))).cpu().half())
        if on_shape is not None:
            on_shape(len(parts[-1]))
    return torch.cat(parts)


def true_maps(shape: Tensor, bounds: Bounds, on_shape: OnShape = None) -> Tensor:
    """Normal maps [N, F, 4, R, R] half precision of true heads [N, S]; their densities rise over one of RAMPS, by turns."""
    parts = []
    for i, one in enumerate(shape.split(1)):
        parts.append(normal_maps(ramped(head_distances(one, box(bounds)), RAMPS[i % len(RAMPS)])).half())
        if on_shape is not None:
            on_shape(1)
    return torch.cat(parts)


def split(n: int, share: float) -> int:
    """How many of n come before the held-out part, which has at least one."""
    return n - max(1, round(share * n))


def fit(maps: Tensor, targets: Tensor, outputs: int, loss: Callable[[Tensor, Tensor], Tensor], o: CriticTraining) -> MapNet:
    """A network trained on maps [B, 4, R, R] half precision and targets [B, outputs], half of every batch mirrored at random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(o.seed)
        net = MapNet(outputs)
    random = torch.Generator().manual_seed(o.seed)
    optimiser = torch.optim.AdamW(net.parameters(), lr=o.learning_rate, weight_decay=0.01)
    per_epoch = math.ceil(len(maps) / o.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, o.epochs * per_epoch)
    for _ in range(o.epochs):
        for rows in torch.randperm(len(maps), generator=random).split(o.batch):
            batch = maps[rows].float()
            swap = torch.rand(len(rows), generator=random) < 0.5
            found = net(torch.where(swap[:, None, None, None], mirrored(batch), batch))
            optimiser.zero_grad()
            loss(found, targets[rows]).backward()
            optimiser.step()
            schedule.step()
    return net


def train_critic(true: Tensor, shape: Tensor, reference: Tensor, fakes: dict[str, Tensor], o: CriticTraining) -> ShapeCritic:
    """Train both networks and judge them on what was held out.

    Args: true: maps [N, F, 4, R, R] of heads with parameters shape [N, S]; reference: those of other heads; fakes: by network, maps, not
        more than there are heads.
    """
    early = torch.cat([maps[: split(len(maps), o.held_out)] for maps in fakes.values()])
    kept, views = split(len(true), o.held_out), true.shape[1]
    both = torch.cat([true[: len(early)], early])
    label = torch.cat([torch.ones(len(early)), torch.zeros(len(early))]).repeat_interleave(views)[:, None]
    smooth = label * (1 - 2 * o.smoothing) + o.smoothing
    critic = fit(both.flatten(0, 1), smooth, 1, functional.binary_cross_entropy_with_logits, o)
    wanted = shape[:kept].repeat_interleave(views, dim=0)  # heads are symmetric, so mirrored maps have the same
    features = fit(true[:kept].flatten(0, 1), wanted, SHAPE_COUNT, functional.mse_loss, o)
    found = ShapeCritic(critic, features, torch.zeros(0), torch.stack([torch.zeros(FEATURES), torch.ones(FEATURES)]), {})
    raw = _in_parts(found.features, reference)
    found.scale = torch.stack([raw.mean(dim=0), raw.std(dim=0).clamp_min(1e-6)])
    found.true = (raw - found.scale[0]) / found.scale[1]
    late = {name: maps[split(len(maps), o.held_out) :].float() for name, maps in fakes.items()}
    as_many = true[kept : kept + sum(len(maps) for maps in late.values())].float()
    found.record = {"training": asdict(o), "parameters": sum(p.numel() for p in critic.parameters()), "true_heads": len(true),
                    **held_out_figures(found, as_many, late), **frechet_figures(found, fakes),
                    "shape_parameters_explained": _explained(found, true[kept:].float(), shape[kept:])}
    return found


def _in_parts(read: Callable[[Tensor], Tensor], maps: Tensor) -> Tensor:
    """read(maps) of maps [N, F, 4, R, R] in half precision, some at a time."""
    return torch.cat([read(part.float()) for part in maps.split(64)])


def held_out_figures(critic: ShapeCritic, true: Tensor, fakes: dict[str, Tensor]) -> dict:
    """Accuracy with its interval, Brier score, calibration in BINS, and mean logits by source."""
    logits = {"true heads": critic.logits(true), **{name: critic.logits(maps) for name, maps in fakes.items()}}
    every = torch.cat(list(logits.values()))
    label = torch.cat([torch.full_like(v, float(i == 0)) for i, v in enumerate(logits.values())])
    chance = every.sigmoid().double()
    right = int(((every > 0) == (label > 0.5)).sum())
    bins = []
    for low, high in zip(BINS, BINS[1:], strict=False):
        rows = (chance >= low) & ((chance < high) | (high == 1.0))
        if rows.any():
            bins.append({"from": low, "to": high, "n": int(rows.sum()), "predicted": float(chance[rows].mean()),
                         "observed": float(label[rows].double().mean())})
    return {
        "accuracy": right / len(every), "accuracy_ci95": list(wilson_interval(right, len(every))), "held_out": len(every),
        "brier": float((chance - label).square().mean()), "calibration": bins,
        "mean_logits": {name: float(value.mean()) for name, value in logits.items()},
    }


def frechet_figures(critic: ShapeCritic, fakes: dict[str, Tensor]) -> dict:
    """Fréchet distances to the reference: of its own halves to each other, which is the floor, and of each network's shapes."""
    sets = [critic.true, *(_in_parts(critic.features, maps) for maps in fakes.values())]
    whole, *networks = (FeatureStatistics(FEATURES).update(part) for part in sets)
    first, second = (FeatureStatistics(FEATURES).update(part) for part in critic.true.split(math.ceil(len(critic.true) / 2)))
    found = dict(zip(fakes, (statistics.distance(whole) for statistics in networks), strict=True))
    return {"frechet": {"true heads, by halves": first.distance(second), **found}}


def _explained(critic: ShapeCritic, maps: Tensor, shape: Tensor) -> float:
    """Mean share of the shape parameters' variance that the feature network explains on held-out heads."""
    with torch.no_grad():
        found = critic.features_net(maps.flatten(0, 1)).unflatten(0, maps.shape[:2]).mean(dim=1)
    return float(np.mean((1 - (found - shape).square().mean(0) / shape.var(0, unbiased=False).clamp_min(1e-6)).numpy()))
