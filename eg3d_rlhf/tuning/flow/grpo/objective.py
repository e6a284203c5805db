"""What GRPO minimises: advantages within groups, clipped ratios, the divergence from the reference.

Sources: Shao et al. 2024 (DeepSeekMath), equation 3; for flows Liu et al. 2025 (Flow-GRPO).

Shape letters: G groups, K samples of a group, N samples.
"""

from collections.abc import Sequence

import torch

from training.phases import derive_seed

USES = ("reward", "shuffled", "inverted")  # of rewards: as they are, and two controls
TINY = 1e-4  # added to a group's deviation


def advantages(rewards: torch.Tensor) -> torch.Tensor:
    """(r - mean) / (std + TINY) within each group, [G, K] -> [G, K]; 0 in a group whose rewards are all alike.

    >>> advantages(torch.tensor([[1.0, 3.0], [2.0, 2.0]])).round(decimals=2)
    tensor([[-1.,  1.],
            [ 0.,  0.]])
    """
    std, mean = torch.std_mean(rewards.double(), 1, correction=0, keepdim=True)
    return ((rewards - mean) / (std + TINY)).float()


def as_used(rewards: torch.Tensor, use: str, seeds: Sequence[int]) -> torch.Tensor:
    """Rewards [G, K] for a run or for one of its controls: "shuffled" gives each sample that of another of its group, so that they say
    nothing; "inverted" turns them over. Args: seeds: of every group."""
    if use == "inverted":
        return -rewards
    if use == "shuffled":
        order = [torch.randperm(rewards.shape[1], generator=torch.Generator().manual_seed(derive_seed("shuffled", seed))) for seed in seeds]
        return rewards.gather(1, torch.stack(order))
    return rewards


def clipped_loss(log_p: torch.Tensor, old: torch.Tensor, advantage: torch.Tensor, clip_range: float) -> torch.Tensor:
    """-min(r A, clip(r, 1 - c, 1 + c) A), r = exp(log_p - old), all [N] -> [N]. Differentiable in: log_p."""
    ratio = torch.exp(log_p - old)
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip_range, 1 + clip_range) * advantage)


def clipped(log_p: torch.Tensor, old: torch.Tensor, advantage: torch.Tensor, clip_range: float) -> torch.Tensor:
    """Which samples the clip takes the gradient from, [N] bool."""
    ratio = torch.exp(log_p.detach() - old)
    return ((ratio > 1 + clip_range) & (advantage > 0)) | ((ratio < 1 - clip_range) & (advantage < 0))
