"""Training of the shape critic and of the features beside it (shape_critic.py), and what it was worth on shapes that were held out.

Fakes are shapes of generators, never true heads that somebody damaged: what a critic of invented damage learns is the invention.
Letters: N shapes, F views, R pixels, S shape parameters, B maps of a batch.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from eg3d_rlhf.core.field import Bounds
from eg3d_rlhf.core.seeds import refuse_held_out
from eg3d_rlhf.core.statistics import wilson_interval
from eg3d_rlhf.generators import of, ws_of_seeds
from eg3d_rlhf.measures.distances import FeatureStatistics
from eg3d_rlhf.measures.normal_maps import box, maps_of, mirrored, normal_maps
from eg3d_rlhf.measures.shape_critic import FEATURES, MapNet, ShapeCritic
from eg3d_rlhf.measures.true_heads import RAMPS, head_distances, ramped
from training.config import check_knobs, knob
from training.heads.family import SHAPE_COUNT

BINS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)  # of the predicted probability, for the calibration
OnShape = Callable[[int], object] | None


@dataclass(frozen=True, kw_only=True)
class CriticTraining:
    """One run; it repeats to the byte on the same machine with one thread."""

    latents: int = knob(300, "Shapes of each network.", "Data", low=5)
    heads: int = knob(1200, "True heads that the features learn from; the critic takes as many of them as there are fakes.", "Data", low=5)
    reference: int = knob(400, "True heads behind the shape Fréchet distance, held out of the training.", "Data", low=40)
    epochs: int = knob(12, "Passes over the maps.", "Training", low=1)
    batch: int = knob(48, "Maps per step.", "Training", low=2)
    learning_rate: float = knob(1.5e-3, "Of Adam, decayed to zero along a cosine.", "Training", above=0)
    smoothing: float = knob(0.05, "Labels are so far from 0 and 1: keeps logits from running away.", "Training", low=0, below=0.5)
    held_out: float = knob(0.2, "Last share of every source, for the figures.", "Training", above=0, below=1)
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
