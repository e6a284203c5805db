"""How a reward enters the loss: standardisation, softplus, comparison with references, and the clip that acts as a trust region.

Letters: N batch, M reference samples, E embedding.
"""

from typing import Protocol

import torch

from eg3d_rlhf.reward.files import Reward

SHAPINGS = ("none", "standardised", "softplus", "reference")


class Shaping(Protocol):
    """Turns slabs into the quantity that the reward phase maximises."""

    def __call__(self, reward: Reward, slab: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """slab [N, 1, D, H, W] -> shaped [N], raw score [N]. Differentiable in slab."""
        ...


class Identity(torch.nn.Module):
    """The score itself."""

    def forward(self, reward: Reward, slab: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Shaping`."""
        score = reward.score(slab)
        return score, score


class Standardised(torch.nn.Module):
    """(r - mean) * scale over the initial samples, with scale = min(1 / max(std, 0.5 |mean|), 10) (sigma-reward.md, section 4)."""

    def __init__(self, initial_scores: torch.Tensor):
        """initial_scores: [M] scores of the untuned generator."""
        super().__init__()
        mean, std = initial_scores.mean(), initial_scores.std()
        self.register_buffer("mean", mean)
        self.register_buffer("scale", (1 / torch.maximum(std, 0.5 * mean.abs()).clamp_min(1e-8)).clamp_max(10.0))

    def forward(self, reward: Reward, slab: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Shaping`."""
        score = reward.score(slab)
        return (score - self.mean) * self.scale, score


class NegativeSoftplus(torch.nn.Module):
    """-softplus(-2 r): saturates for good samples, linear for bad ones."""

    def forward(self, reward: Reward, slab: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Shaping`."""
        score = reward.score(slab)
        return -torch.nn.functional.softplus(-2 * score), score


class ReferenceWins(torch.nn.Module):
    """Mean probability, by the pairs head, of winning against `comparisons` reference samples, in both orders.

    The references are embeddings of samples of the untuned generator; sample n of a batch meets references n, n + 1, ... cyclically, from
    an offset that moves with every call and is part of the state.
    """

    def __init__(self, references: torch.Tensor, comparisons: int = 4):
        """references: [M, E] embeddings."""
        super().__init__()
        self.comparisons = comparisons
        self.register_buffer("references", references)
        self.register_buffer("offset", torch.zeros([], dtype=torch.int64))

    def forward(self, reward: Reward, slab: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Shaping`."""
        embedding = reward.embed(slab)  # [N, E]
        score = reward.score_embedding(embedding)
        n, count = len(embedding), self.comparisons
        index = (self.offset + torch.arange(n * count, device=slab.device)) % len(self.references)
        self.offset.copy_((self.offset + n * count) % len(self.references))
        mine, other = embedding.repeat_interleave(count, dim=0), self.references[index]
        margin = reward.pair_margin(mine, other)  # [N * count]
        return torch.sigmoid(margin).unflatten(0, (n, count)).mean(dim=1), score


def make_shaping(name: str, initial_scores: torch.Tensor, references: torch.Tensor) -> torch.nn.Module:
    """The shaping called `name`; its state comes from the untuned generator's scores [M] and embeddings [M, E].

    Raises: ValueError for an unknown name.
    """
    match name:
        case "none":
            return Identity()
        case "standardised":
            return Standardised(initial_scores)
        case "softplus":
            return NegativeSoftplus()
        case "reference":
            return ReferenceWins(references)
    raise ValueError(f"--reward-shaping: expected one of {', '.join(SHAPINGS)}, got {name!r}.")


def clip_bounds(spec: str, initial_shaped: torch.Tensor) -> tuple[float, float]:
    """Bounds of the trust region.

    Args:
        spec: 'LOW,HIGH', 'none', or 'iqr': the quartiles of the untuned generator's shaped rewards, widened by 1.5 interquartile ranges.
        initial_shaped: [M].
    Raises: ValueError for anything else.
    """
    if spec == "none":
        return -float("inf"), float("inf")
    if spec == "iqr":
        low, high = torch.quantile(initial_shaped.float(), torch.tensor([0.25, 0.75], device=initial_shaped.device)).tolist()
        return low - 1.5 * (high - low), high + 1.5 * (high - low)
    return parse_clip(spec)


def parse_clip(spec: str) -> tuple[float, float]:
    """'LOW,HIGH' to numbers; infinite for the names that `clip_bounds` resolves later."""
    if spec in ("none", "iqr"):
        return -float("inf"), float("inf")
    try:
        low, high = (float(part) for part in spec.split(","))
    except ValueError:
        low, high = 0.0, 0.0
    if not low < high:
        raise ValueError(f"--reward-clip: expected LOW,HIGH with LOW < HIGH, iqr or none, got {spec!r}. Write e.g. --reward-clip=-10,10.")
    return low, high
