"""Compute advantages from the rewards of groups, for one reward (Flow-GRPO, Liu et al. 2025) or several
(GDPO).

The module also has GARDO's gate, which finds samples that only the trained reward ranks highly.

Shapes: R rewards, G groups, K samples of a group, N = G K.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from training.phases import derive_seed

TINY = 1e-4  # value that is added to a standard deviation before the division
OVER = ("group", "batch", "raw", "none")  # names of the divisors, see Scale


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Settings of the divisor that normalises centred rewards. The defaults are those of Flow-GRPO.

    The field `over` names the divisor:
        group    the standard deviation of the rewards of each group
        batch    the standard deviation of all centred rewards, so that a group with little spread keeps small
                 advantages
        raw      the standard deviation of all uncentred rewards, as in published code; it includes the
                 differences between prompts
        none     1
    """

    over: str = "group"  # one of OVER
    correction: int = 0  # 0: the variance is a sum divided by n; 1: divided by n - 1
    # value added to the standard deviation; UniRL's 1e-8, in float32, turns rounding into advantages where a
    # group has no spread
    plus: float = TINY
    least: float = 0.0  # lower bound of the standard deviation

    def divisor(self, rewards: torch.Tensor, centred_rewards: torch.Tensor) -> torch.Tensor:
        """Compute the divisor from rewards [G, K] and centred rewards [G, K].

        Returns: a tensor [G, 1] if `over` is "group", and a scalar tensor otherwise.
        """
        if self.over == "none":
            # a scalar 1 of the same type and device
            return torch.ones_like(rewards[0, 0])
        if self.over == "group":
            std = rewards.std(1, correction=self.correction, keepdim=True)
        elif self.over == "raw":
            std = rewards.std(correction=self.correction)
        else:
            # groups are centred, so the mean over the batch is 0 already
            std = centred_rewards.square().mean().sqrt()
        return std.clamp(min=self.least) + self.plus


def advantages(rewards: torch.Tensor, scale: Scale | None = None, clip: float = math.inf) -> torch.Tensor:
    """Compute the advantages of one reward, [G, K] -> [G, K] float32.

    The advantage of a sample is (r - mean of its group) / standard deviation, clipped to ±clip, with r its
    reward. The advantages are 0 in a group whose rewards are all equal.

    >>> advantages(torch.tensor([[1.0, 3.0], [2.0, 2.0]])).round(decimals=2)
    tensor([[-1.,  1.],
            [ 0.,  0.]])

    Args:
        rewards: rewards [G, K].
        scale: settings of the divisor; None: the defaults.
        clip: largest absolute value of the result.
    """
    return _scaled(rewards.double(), scale or Scale()).clamp(-clip, clip).float()


def _scaled(rewards: torch.Tensor, scale: Scale) -> torch.Tensor:
    """Subtract the mean of each group from rewards [G, K], and divide by the divisor of `scale`."""
    # the mean of equal rewards may differ from them by rounding, which the division would enlarge
    all_equal = (rewards == rewards[:, :1]).all(1, keepdim=True)
    centred_rewards = (rewards - rewards.mean(1, keepdim=True)).masked_fill(all_equal, 0)
    return centred_rewards / scale.divisor(rewards, centred_rewards)


def combine_rewards(
    rewards: torch.Tensor,
    weights: Sequence[float],
    scale: Scale | None = None,
    clip: float = math.inf,
    normalise_sum: bool = True,
) -> torch.Tensor:
    """Compute advantages from several rewards (GDPO), [R, G, K] -> [G, K] float32.

    Each reward is normalised in its group; then the rewards are added with their weights, and the sum is
    normalised over the batch. If rewards were added first, one of large values would dominate the others, and
    a group in which two rewards cancel would give no signal. A reward without spread in a group adds 0 there.

    Args:
        rewards: rewards of all samples, [R, G, K].
        weights: weight of each reward, [R].
        scale: settings of the divisor; None: the defaults.
        clip: largest absolute value of the result.
        normalise_sum: whether the sum is normalised over the batch.
    """
    scale = scale or Scale()
    # float64, as the standard deviation of nearly equal rewards is small
    reward_sum = sum(
        weight * _scaled(reward.double(), scale) for weight, reward in zip(weights, rewards, strict=True)
    )
    assert isinstance(reward_sum, torch.Tensor)  # at least one reward: an empty sum would be 0
    if normalise_sum:
        reward_sum = (reward_sum - reward_sum.mean()) / (
            reward_sum.std(correction=scale.correction).clamp(min=scale.least) + scale.plus
        )
    return reward_sum.clamp(-clip, clip).float()


def normal_scores(rewards: torch.Tensor) -> torch.Tensor:
    """Compute advantages from the ranks of rewards alone, [G, K] -> [G, K] float32.

    The advantage of a sample is the standard normal quantile of (b + e / 2 + 1/2) / K, centred in the group.
    Here b is the number of samples of the group with a lower reward, and e the number of others with an equal
    reward.

    >>> normal_scores(torch.tensor([[5.0, 1.0, 1.0]])).round(decimals=2)
    tensor([[ 0.91, -0.45, -0.45]])
    """
    differences = rewards[:, :, None] - rewards[:, None]  # [G, K, K]
    ties = (differences == 0).double().sum(2) - 1  # minus the tie with itself
    quantile_level = ((differences > 0).double().sum(2) + ties / 2 + 0.5) / rewards.shape[1]
    # quantile_level is in 1 / (2 K)..1 - 1 / (2 K), so that all quantiles are finite
    scores = torch.special.ndtri(quantile_level)
    return (scores - scores.mean(1, keepdim=True)).float()


def apply_control(rewards: torch.Tensor, use: str, seeds: Sequence[int]) -> torch.Tensor:
    """Return rewards [..., G, K] as a run or one of its controls uses them.

    With `use` "randomised" the rewards are permuted within each group, so that they carry no signal. With
    "inverted" they are negated. With any other value they are returned unchanged.

    Args:
        rewards: rewards of all samples.
        use: use of the rewards, see OnlineConfig.use.
        seeds: seed of each group, [G].
    """
    if use == "inverted":
        return -rewards
    if use == "randomised":
        # one permutation a group for all rewards: several rewards of a sample stay together; the stream has
        # the name of version 0.1, so that a seed gives the same permutations as there
        generators = [torch.Generator().manual_seed(derive_seed("shuffled", seed)) for seed in seeds]
        permutations = torch.stack(
            [torch.randperm(rewards.shape[-1], generator=generator) for generator in generators]
        )
        return rewards.gather(-1, permutations.expand(rewards.shape))
    return rewards


# GARDO's gate (Tsinghua and Kuaishou 2025): the divergence penalty applies to samples that the trained reward
# alone ranks highly.

MIN_SHARE = 0.02  # smallest share of the samples with a penalty
MAX_SHARE = 0.2  # largest share of the samples with a penalty
HISTORY = 20  # number of recent updates whose mean excess is stored


@dataclass
class Gate:
    """Gate that selects the samples to which the divergence penalty applies.

    The excess of a sample is its rank by the trained reward minus its mean rank by the held-out rewards.
    Among samples with an excess of at least 0, the gate selects the share with the largest excess. The share
    grows when the mean excess exceeds that of all recent updates, and shrinks when it is below all of them.

    Deviates: the published program selects the samples that the trained reward ranks *below* the others,
    against its own purpose. The share is otherwise computed as there.
    """

    # share of the samples with an excess of at least 0 that are selected, in MIN_SHARE..MAX_SHARE
    share: float = 0.1
    past: list[float] = field(default_factory=list)  # mean excess of each of the last updates

    def __call__(self, trained_rewards: torch.Tensor, heldout_rewards: torch.Tensor) -> torch.Tensor:
        """Select samples, [N] bool, and update the share.

        Args:
            trained_rewards: trained reward of each sample, [N]; larger is better.
            heldout_rewards: held-out rewards, [R, N], with R at least 1; larger is better.
        """
        # ranks make rewards of different units comparable
        excess = _ranks(trained_rewards[None])[0] - _ranks(heldout_rewards).mean(0)
        nonnegative_excess = excess[excess >= 0]  # never empty, since all ranks have the same mean
        mean_excess = float(nonnegative_excess.mean())
        if self.past and mean_excess > max(self.past):
            self.share = min(1.1 * self.share, MAX_SHARE)
        elif self.past and mean_excess < min(self.past):
            self.share = max(0.9 * self.share, MIN_SHARE)
        self.past = [*self.past, mean_excess][-HISTORY:]
        return excess >= torch.quantile(nonnegative_excess, 1 - self.share)


def _ranks(values: torch.Tensor) -> torch.Tensor:
    """Rank the values of each row, [R, N] -> [R, N] float64; the smallest value has the rank 0.

    Equal values all have the mean of their ranks.
    """
    # difference of every value from every other one, [R, N, N]
    differences = values[:, :, None] - values[:, None]
    # - 1: minus the tie with itself
    return (differences > 0).double().sum(2) + ((differences == 0).double().sum(2) - 1) / 2
