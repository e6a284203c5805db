"""Compute advantages from the rewards of groups: for one reward or several, and a gate for samples that only
the trained reward ranks highly.

Shapes: R rewards, G groups, K samples of a group, N = G K.
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
    """Divisor of centred rewards; the defaults are those of Flow-GRPO.

    over: "group" divides by the standard deviation of each group; "batch" by that of all centred rewards, so
    that a group with little spread keeps small advantages; "raw" by that of all uncentred rewards, as
    published code does, which includes the differences between prompts; "none" divides by 1.
    """

    over: str = "group"  # one of OVER
    correction: int = 0  # of the standard deviation: 0 divides by n, 1 by n - 1
    # added to the standard deviation; UniRL's 1e-8, in float32, turns rounding into advantages where a group
    # has no spread
    plus: float = TINY
    least: float = 0.0  # lower bound of the standard deviation

    def of(self, rewards: torch.Tensor, centred: torch.Tensor) -> torch.Tensor:
        """Compute the divisor from rewards and centred rewards [G, K], as [G, 1] or a scalar."""
        if self.over == "none":
            return torch.ones_like(rewards[0, 0])
        if self.over == "group":
            std = rewards.std(1, correction=self.correction, keepdim=True)
        elif self.over == "raw":
            std = rewards.std(correction=self.correction)
        else:
            # groups are centred, so the mean over the batch is 0 already
            std = centred.square().mean().sqrt()
        return std.clamp(min=self.least) + self.plus


def advantages(rewards: torch.Tensor, scale: Scale | None = None, clip: float = math.inf) -> torch.Tensor:
    """Compute (r - mean of its group) / standard deviation, clipped to ±clip, [G, K] -> [G, K] float32.

    The advantages are 0 in a group whose rewards are all equal.

    >>> advantages(torch.tensor([[1.0, 3.0], [2.0, 2.0]])).round(decimals=2)
    tensor([[-1.,  1.],
            [ 0.,  0.]])
    """
    return _scaled(rewards.double(), scale or Scale()).clamp(-clip, clip).float()


def _scaled(rewards: torch.Tensor, scale: Scale) -> torch.Tensor:
    """Centre rewards [G, K] in their groups, and divide them."""
    # the mean of equal rewards may differ from them by rounding, which the division would enlarge
    alike = (rewards == rewards[:, :1]).all(1, keepdim=True)
    centred = (rewards - rewards.mean(1, keepdim=True)).masked_fill(alike, 0)
    return centred / scale.of(rewards, centred)


def several(
    rewards: torch.Tensor,
    weights: Sequence[float],
    scale: Scale | None = None,
    clip: float = math.inf,
    normalise_sum: bool = True,
) -> torch.Tensor:
    """Compute advantages from several rewards (GDPO), [R, G, K] -> [G, K] float32.

    Each reward is normalised in its group; then the rewards are added with their weights, and the sum is
    normalised over the batch. If rewards were added first, one of large values would dominate the others, and
    a group in which two cancel would give no signal. A reward without spread in a group adds 0 there.
    Args: normalise_sum: whether the sum is normalised over the batch.
    """
    scale = scale or Scale()
    # float64, as the standard deviation of nearly equal rewards is small
    summed = sum(
        weight * _scaled(reward.double(), scale) for weight, reward in zip(weights, rewards, strict=True)
    )
    assert isinstance(summed, torch.Tensor)  # at least one reward: an empty sum would be 0
    if normalise_sum:
        summed = (summed - summed.mean()) / (
            summed.std(correction=scale.correction).clamp(min=scale.least) + scale.plus
        )
    return summed.clamp(-clip, clip).float()


def normal_scores(rewards: torch.Tensor) -> torch.Tensor:
    """Compute advantages from ranks alone, [G, K] -> [G, K] float32.

    They are the normal quantiles of (samples below + ties / 2 + 1/2) / K, centred in the group.

    >>> normal_scores(torch.tensor([[5.0, 1.0, 1.0]])).round(decimals=2)
    tensor([[ 0.91, -0.45, -0.45]])
    """
    above = rewards[:, :, None] - rewards[:, None]  # [G, K, K]
    ties = (above == 0).double().sum(2) - 1  # less the tie with itself
    share = ((above > 0).double().sum(2) + ties / 2 + 0.5) / rewards.shape[1]
    # share is in 1 / (2 K)..1 - 1 / (2 K), so that all quantiles are finite
    scores = torch.special.ndtri(share)
    return (scores - scores.mean(1, keepdim=True)).float()


def as_used(rewards: torch.Tensor, use: str, seeds: Sequence[int]) -> torch.Tensor:
    """Return rewards [..., G, K] as a run or one of its controls uses them.

    "randomised" permutes the rewards within each group, so that they carry no signal; "inverted" negates
    them. Args: seeds: one of every group.
    """
    if use == "inverted":
        return -rewards
    if use == "randomised":
        # one permutation a group for all rewards: several rewards of a sample stay together
        generators = [torch.Generator().manual_seed(derive_seed("shuffled", seed)) for seed in seeds]
        order = torch.stack(
            [torch.randperm(rewards.shape[-1], generator=generator) for generator in generators]
        )
        return rewards.gather(-1, order.expand(rewards.shape))
    return rewards


# GARDO's gate (Tsinghua and Kuaishou 2025): the divergence penalty applies to samples that the trained reward
# alone ranks highly.

LOW = 0.02  # least share of the samples with a penalty
HIGH = 0.2  # largest share
KEPT = 20  # updates whose mean excess is remembered


@dataclass
class Gate:
    """Gate that selects the samples to which the divergence penalty applies.

    The excess of a sample is its rank by the trained reward minus its mean rank by the held-out rewards.
    Among samples with an excess of at least 0, the gate selects the share with the largest excess. The share
    grows when the mean excess exceeds that of all recent updates, and shrinks when it is below all of them.

    Deviates: the published program selects the samples that the trained reward ranks *below* the others,
    against its own purpose. The share is otherwise computed as there.
    """

    share: float = 0.1  # of the samples with an excess of at least 0, in LOW..HIGH
    past: list[float] = field(default_factory=list)  # mean excess of the last updates

    def __call__(self, trained: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """Select samples, [N] bool, and update the share.

        Args: trained: rewards [N]; others: held-out rewards [R, N], R at least 1; larger is better.
        """
        # ranks make rewards of different units comparable
        excess = _ranks(trained[None])[0] - _ranks(others).mean(0)
        above = excess[excess >= 0]  # never empty, since all ranks have the same mean
        level = float(above.mean())
        if self.past and level > max(self.past):
            self.share = min(1.1 * self.share, HIGH)
        elif self.past and level < min(self.past):
            self.share = max(0.9 * self.share, LOW)
        self.past = [*self.past, level][-KEPT:]
        return excess >= torch.quantile(above, 1 - self.share)


def _ranks(values: torch.Tensor) -> torch.Tensor:
    """Rank values, [R, N] -> [R, N] float64, from 0 for the smallest; equal values share their mean rank."""
    # [R, N, N]
    above = values[:, :, None] - values[:, None]
    return (above > 0).double().sum(2) + ((above == 0).double().sum(2) - 1) / 2
