"""From scores of several noises to their weights in the gradient: RewardSDS's strategies, and DreamDPO's push as the case of two.

Letters: K noises, N assets or pictures.
"""

from dataclasses import dataclass

import torch

from training.config import check_knobs, knob

NOISES = "Noises and rewards"
STRATEGIES = ("min-max", "best", "weighted", "none", "push")


@dataclass(frozen=True, kw_only=True)
class NoiseWeighting:
    """Weights of noises: mean of the best, softmax, best minus worst, all alike, or winner minus loser. One noise always weighs 1."""

    strategy: str = knob("min-max", "Which noises count: the best, a softmax, best minus worst, all.", NOISES, choices=STRATEGIES)
    best: int = knob(2, "Noises counted as the best.", NOISES, low=1)
    worst: int = knob(2, "Noises counted as the worst.", NOISES, low=1)
    best_weight: float = knob(0.9, "Weight of the best ones' mean, of min-max.", NOISES, low=0)
    worst_weight: float = knob(0.1, "Weight of the worst ones' mean, of min-max, subtracted.", NOISES, low=0)
    temperature: float = knob(1.0, "Of the softmax.", NOISES, above=0)

    def __post_init__(self):
        check_knobs(self)

    def __call__(self, scores: torch.Tensor, push: torch.Tensor | None = None) -> torch.Tensor:
        """Weights [K, N] of scores [K, N].

        Args: push: [N] bool, of the strategy push: whether the loser is pushed away, too; None: always. Equal scores: the first wins.
        """
        count = len(scores)
        if count == 1:
            return torch.ones_like(scores)
        if self.strategy == "none":
            return torch.full_like(scores, 1 / count)
        if self.strategy == "weighted":
            return (scores / self.temperature).softmax(0)
        order = scores.argsort(dim=0, descending=True, stable=True)
        if self.strategy == "push":
            away = torch.ones_like(scores[:1]) if push is None else push[None].to(scores)
            return torch.zeros_like(scores).scatter_(0, order[:1], 1.0).scatter_add_(0, order[-1:], -away)
        best, worst = min(self.best, count), min(self.worst, count)
        kept = torch.full_like(scores[:best], 1 / best)
        if self.strategy == "best":
            return torch.zeros_like(scores).scatter_(0, order[:best], kept)
        weights = torch.zeros_like(scores).scatter_(0, order[:best], self.best_weight * kept)
        return weights.scatter_add_(0, order[-worst:], torch.full_like(scores[:worst], -self.worst_weight / worst))
