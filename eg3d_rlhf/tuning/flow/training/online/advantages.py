"""From rewards of groups to advantages: one reward, several, and a gate for those that nobody else confirms.

Shape letters: R rewards, G groups, K samples of a group, N = G K.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from training.phases import derive_seed

TINY = 1e-4  # added to a standard deviation
OVER = ("group", "batch", "raw", "none")


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What centred rewards are divided by; the defaults are ours and Flow-GRPO's.

    over: the standard deviation of each "group"; of the whole "batch" of centred rewards, so that a group
    that barely differs keeps small advantages; of the "raw" batch, as published code has it, which counts
    what lies between conditions; or "none", 1.
    """

    over: str = "group"
    correction: int = 0
    plus: float = TINY  # UniRL's 1e-8, in float32, makes advantages of rounding where a group has no spread
    least: float = 0.0

    def of(self, rewards: torch.Tensor, centred: torch.Tensor) -> torch.Tensor:
        """[G, K] each -> [G, 1] or []."""
        if self.over == "none":
            return torch.ones_like(rewards[0, 0])
        if self.over == "group":
            std = rewards.std(1, correction=self.correction, keepdim=True)
        elif self.over == "raw":
            std = rewards.std(correction=self.correction)
        else:
            std = centred.square().mean().sqrt()
        return std.clamp(min=self.least) + self.plus


def advantages(rewards: torch.Tensor, scale: Scale | None = None, clip: float = math.inf) -> torch.Tensor:
    """(r - mean of its group) / standard deviation within ±clip, [G, K] -> [G, K] float32; 0 in a group
    whose rewards are all alike.

    >>> advantages(torch.tensor([[1.0, 3.0], [2.0, 2.0]])).round(decimals=2)
    tensor([[-1.,  1.],
            [ 0.,  0.]])
    """
    return _scaled(rewards.double(), scale or Scale()).clamp(-clip, clip).float()


def _scaled(rewards: torch.Tensor, scale: Scale) -> torch.Tensor:
    alike = (rewards == rewards[:, :1]).all(1, keepdim=True)
    centred = (rewards - rewards.mean(1, keepdim=True)).masked_fill(alike, 0)
    return centred / scale.of(rewards, centred)


def several(
    rewards: torch.Tensor,
    weights: Sequence[float],
    scale: Scale | None = None,
    clip: float = math.inf,
    whole: bool = True,
) -> torch.Tensor:
    """Each reward is normalised in its group, then they are added, and the sum is normalised over the batch
    (GDPO), [R, G, K] -> [G, K].

    Without that, a reward of large numbers drowns the others, and groups in which two cancel count as no
    signal. A reward without spread in a group adds 0 there.
    Args: whole: with the last step.
    """
    scale = scale or Scale()
    summed = sum(weight * _scaled(one.double(), scale) for weight, one in zip(weights, rewards, strict=True))
    assert isinstance(summed, torch.Tensor)
    if whole:
        summed = (summed - summed.mean()) / (
            summed.std(correction=scale.correction).clamp(min=scale.least) + scale.plus
        )
    return summed.clamp(-clip, clip).float()


def normal_scores(rewards: torch.Tensor) -> torch.Tensor:
    """Advantages by rank alone: the normal quantile of (beaten + ties / 2 + 1/2) / K, centred,
    [G, K] -> [G, K] float32.

    >>> normal_scores(torch.tensor([[5.0, 1.0, 1.0]])).round(decimals=2)
    tensor([[ 0.91, -0.45, -0.45]])
    """
    above = rewards[:, :, None] - rewards[:, None]  # [G, K, K]
    ties = (above == 0).double().sum(2) - 1
    share = ((above > 0).double().sum(2) + ties / 2 + 0.5) / rewards.shape[1]
    scores = torch.special.ndtri(share)
    return (scores - scores.mean(1, keepdim=True)).float()


def as_used(rewards: torch.Tensor, use: str, seeds: Sequence[int]) -> torch.Tensor:
    """Rewards [..., G, K] for a run or for one of its controls: "randomised" gives each sample those of
    another of its group, so that they carry no signal; "inverted" negates them. Args: seeds: of every group.
    """
    if use == "inverted":
        return -rewards
    if use == "randomised":
        generators = [torch.Generator().manual_seed(derive_seed("shuffled", seed)) for seed in seeds]
        order = torch.stack(
            [torch.randperm(rewards.shape[-1], generator=generator) for generator in generators]
        )
        return rewards.gather(-1, order.expand(rewards.shape))
    return rewards


# GARDO's gate (Tsinghua and Kuaishou 2025): the divergence is paid where the trained reward alone praises a
# sample.

LOW = 0.02
HIGH = 0.2
KEPT = 20


@dataclass
class Gate:
    """Which samples pay the divergence: among those that the trained reward ranks above the others' mean
    rank, the share that it ranks highest above it. The share follows how far the trained reward has gone from
    the others.

    Deviates: the shipped gate takes the samples that the trained reward ranks *below* the others, against its
    own purpose; the share of a batch is otherwise as there.
    """

    share: float = 0.1
    past: list[float] = field(default_factory=list)  # mean excess of the last updates

    def __call__(self, trained: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """[N] bool. Args: trained: [N]; others: [R, N], one or more; the larger, the better."""
        excess = _ranks(trained[None])[0] - _ranks(others).mean(0)
        above = excess[excess >= 0]
        level = float(above.mean())
        if self.past and level > max(self.past):
            self.share = min(1.1 * self.share, HIGH)
        elif self.past and level < min(self.past):
            self.share = max(0.9 * self.share, LOW)
        self.past = [*self.past, level][-KEPT:]
        return excess >= torch.quantile(above, 1 - self.share)


def _ranks(values: torch.Tensor) -> torch.Tensor:
    """[R, N] -> [R, N] float64, from 0, the worst, on; equal ones share their mean."""
    above = values[:, :, None] - values[:, None]
    return (above > 0).double().sum(2) + ((above == 0).double().sum(2) - 1) / 2
