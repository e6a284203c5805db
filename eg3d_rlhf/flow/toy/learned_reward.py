"""A reward that has learned from pairs alone what people prefer: judges the loop's assets, and is wrong at times, as rewards are.

Letters as in the package; P pairs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from eg3d_rlhf.flow.toy.defects import neighbours
from eg3d_rlhf.flow.toy.people import Judged, judge_drafts
from eg3d_rlhf.flow.toy.pipeline import ToyAsset
from eg3d_rlhf.flow.toy.shapes import COLOURS, SHAPES, TRAINED, R, classes
from eg3d_rlhf.preferences.preference_loss import preference_loss

FEATURES = 15  # see _features


class LearnedReward(nn.Module):
    """A small network over counts of what lies beside what, and the distance to colours that it has learned; an AssetReward."""

    mean: torch.Tensor  # [F], of the features it was trained on
    std: torch.Tensor

    def __init__(self, hidden: int = 32):
        super().__init__()
        self.colour = nn.Embedding(len(COLOURS), R * 3)  # of every class by height
        nn.init.constant_(self.colour.weight, 0.5)
        self.register_buffer("mean", torch.zeros(FEATURES))
        self.register_buffer("std", torch.ones(FEATURES))
        sizes = [FEATURES + 2 + len(SHAPES), hidden, hidden]
        layers = [part for a, b in zip(sizes, sizes[1:], strict=False) for part in (nn.Linear(a, b), nn.GELU())]
        self.head = nn.Sequential(*layers, nn.Linear(hidden, 1))

    def fit_scale(self, volumes: torch.Tensor) -> None:
        """Take mean and deviation of the features from these volumes."""
        features = _features(volumes)
        self.mean, self.std = features.mean(0), features.std(0).clamp(min=1e-3)

    def score(self, volumes: torch.Tensor, shapes: torch.Tensor, colours: torch.Tensor) -> torch.Tensor:
        """[N, 4, R, R, R] and class numbers [N] -> [N]. Not differentiable in the volumes' occupancy."""
        filled, painted = volumes[:, :1], volumes[:, 1:]
        learned = self.colour(colours).view(-1, 3, 1, 1, R)
        error = ((painted - learned).square() * filled).flatten(2).sum(2) / filled.flatten(1).sum(1, keepdim=True)  # [N, 3]
        off = torch.stack([error.mean(1), error.mean(1).sqrt()], dim=1) * 4
        features = (_features(volumes) - self.mean) / self.std
        return self.head(torch.cat([features, off, F.one_hot(shapes, len(SHAPES)).float()], dim=1)).squeeze(1)

    @torch.no_grad()
    def forward(self, assets: Sequence[ToyAsset], conditions: Sequence[str]) -> torch.Tensor:
        """[N] float32; see AssetReward."""
        device = self.mean.device
        return self.score(volumes_of(assets).to(device), *(one.to(device) for one in classes(conditions))).cpu()


def _features(volumes: torch.Tensor) -> torch.Tensor:
    """[N, 4, R, R, R] -> [N, 15]: number of voxels; shares of them with 0 to 6 filled neighbours; empty places with 2 to 6 filled ones;
    share without a mirror image; roughness of the colour."""
    filled = volumes[:, 0]
    beside, n = neighbours(filled), filled.sum((1, 2, 3))
    full = [((beside == k) * filled).sum((1, 2, 3)) / n for k in range(7)]
    empty = [((beside == k) * (1 - filled)).sum((1, 2, 3)) / n for k in range(2, 7)]
    alone = ((1 - filled.flip(1)) * filled).sum((1, 2, 3)) / n
    both = filled[..., 1:] * filled[..., :-1]
    rough = (volumes[:, 1:].diff(dim=-1).abs().mean(1) * both).sum((1, 2, 3)) / both.sum((1, 2, 3)).clamp(min=1)
    return torch.stack([n, *full, *empty, alone, rough], dim=1)


def volumes_of(assets: Sequence[ToyAsset]) -> torch.Tensor:
    """Assets as the network reads them, [N, 4, R, R, R]."""
    return torch.stack([torch.cat([a.occupancy[None].float(), a.colours.permute(3, 0, 1, 2)]) for a in assets])


@dataclass(frozen=True, kw_only=True)
class RewardTraining:
    """How it learns."""

    pairs: int = 4000
    held_out: int = 800  # further pairs, which only test it
    epochs: int = 16
    batch: int = 64
    lr: float = 3e-3  # of AdamW, falling to 0 along a cosine
    seed: int = 0

    def __post_init__(self):
        if min(self.pairs, self.held_out, self.epochs, self.batch) < 1 or not self.lr > 0:
            raise ValueError(f"RewardTraining: expected positive numbers, got {self}. Correct them.")


def train_reward(training: RewardTraining, on_step: Callable[[int, int, float], None] | None = None) -> tuple[LearnedReward, dict]:
    """Fit by preference_loss to pairs of its own; returns it and its accuracy on pairs that it has not seen.

    Args: on_step: called with (step, steps, loss).
    """
    generator = torch.Generator().manual_seed(training.seed)
    judged = [_draw(n, generator) for n in (training.pairs, training.held_out)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        network = LearnedReward()
    optimizer = torch.optim.AdamW(network.parameters(), lr=training.lr, weight_decay=0.05)
    better, worse = (volumes_of(assets) for assets in judged[0].assets)
    network.fit_scale(torch.cat([better, worse]))
    shapes, colours = classes(judged[0].conditions)
    step, steps = 0, training.epochs * (-(-training.pairs // training.batch))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(training.epochs):
        for rows in torch.randperm(training.pairs, generator=generator).split(training.batch):
            scores = network.score(torch.cat([better[rows], worse[rows]]), shapes[rows].repeat(2), colours[rows].repeat(2))
            loss = preference_loss(scores[: len(rows)] - scores[len(rows) :]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
            if on_step is not None:
                on_step(step, steps, float(loss.detach()))
    return network.eval(), accuracy(network.eval(), judged[1])


def accuracy(network: LearnedReward, judged: Judged) -> dict[str, float]:
    """Share of pairs ordered as the annotator said, and as the labelling oracle thinks."""
    ordered = network(judged.assets[0], judged.conditions) > network(judged.assets[1], judged.conditions)
    return {"labels": float(ordered.float().mean()), "clean": float((ordered == judged.agrees).float().mean())}


def _draw(n: int, generator: torch.Generator) -> Judged:
    return judge_drafts([TRAINED[i % len(TRAINED)] for i in range(n)], generator)
