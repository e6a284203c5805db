"""How a reward enters the loss: standardisation, softplus, comparison with references, and the clip that acts as a trust region.

Letters: N batch, M reference samples, E embedding; observed [N, ...] is what the reward reads.
"""

import torch

from eg3d_rlhf.reward.reward import Reward

SHAPINGS = ("none", "standardised", "softplus", "reference")


class Shaping(torch.nn.Module):
    """Turns what a reward reads into the quantity that the reward phase maximises. This one is the score itself."""

    def forward(self, reward: Reward, observed: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """observed [N, ...], places [N] of the samples in the whole run -> shaped [N], raw score [N]. Differentiable in observed."""
        del places
        score = reward.score_observed(observed)
        return self.shaped(score), score

    def shaped(self, score: torch.Tensor) -> torch.Tensor:
        """[N] -> [N], of scores alone."""
        return score


class Standardised(Shaping):
    """(r - mean) * scale over the initial samples, with scale = min(1 / max(std, 0.5 |mean|), 10) (sigma-reward.md, section 4)."""

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, initial_scores: torch.Tensor):
        """initial_scores: [M] scores of the untuned generator."""
        super().__init__()
        mean, std = initial_scores.mean(), initial_scores.std()
        self.register_buffer("mean", mean)
        self.register_buffer("scale", (1 / torch.maximum(std, 0.5 * mean.abs()).clamp_min(1e-8)).clamp_max(10.0))

    def shaped(self, score: torch.Tensor) -> torch.Tensor:
        """See `Shaping`."""
        return (score - self.mean) * self.scale


class NegativeSoftplus(Shaping):
    """-softplus(-2 r): saturates for good samples, linear for bad ones."""

    def shaped(self, score: torch.Tensor) -> torch.Tensor:
        """See `Shaping`."""
        return -torch.nn.functional.softplus(-2 * score)


class ReferenceWins(Shaping):
    """Mean probability, by the pairs head, of winning against `comparisons` reference samples, in both orders.

    The references are embeddings of samples of the untuned generator. The run's sample i meets references i * comparisons, and those after
    it, cyclically: whichever rank or accumulation round it falls to.
    """

    references: torch.Tensor

    def __init__(self, references: torch.Tensor, comparisons: int = 4):
        """references: [M, E] embeddings."""
        super().__init__()
        self.comparisons = comparisons
        self.register_buffer("references", references)
        self.register_buffer("offset", torch.zeros([], dtype=torch.int64))  # unused: checkpoints of earlier versions hold it

    def forward(self, reward: Reward, observed: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Shaping`."""
        embedding = reward.embed(observed)  # [N, E]
        score = reward.score_embedding(embedding)
        count = self.comparisons
        index = (places[:, None] * count + torch.arange(count, device=places.device)).flatten() % len(self.references)  # [N * count]
        mine, other = embedding.repeat_interleave(count, dim=0), self.references[index]
        margin = reward.pair_margin(mine, other)  # [N * count]
        return torch.sigmoid(margin).unflatten(0, (len(embedding), count)).mean(dim=1), score


def make_shaping(name: str, initial_scores: torch.Tensor, references: torch.Tensor) -> Shaping:
    """The shaping called `name`; its state comes from the untuned generator's scores [M] and embeddings [M, E].

    Raises: ValueError for an unknown name.
    """
    match name:
        case "none":
            return Shaping()
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
