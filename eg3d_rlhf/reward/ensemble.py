"""Several reward networks that were trained apart, averaged: less variance than one, for as many times the cost.

Shape letters: N samples, P pairs, M entries of an embedding, E members, D, H, W = z, y, x.
"""

from dataclasses import replace

import torch
from torch import nn

from eg3d_rlhf.reward.config import RewardArch
from eg3d_rlhf.reward.model import RewardModel


class RewardEnsemble(nn.Module):
    """Mean score of `arch.members` networks (Lakshminarayanan et al. 2017, arXiv 1612.01474). Used like a RewardModel; not trained itself.

    Args: `arch`, whose `members` says how many networks; each is RewardModel(arch with one member).
    """

    def __init__(self, arch: RewardArch):
        super().__init__()
        self.arch = arch
        self.members = nn.ModuleList(RewardModel(replace(arch, members=1)) for _ in range(arch.members))

    @classmethod
    def of(cls, models: list[RewardModel]) -> "RewardEnsemble":
        """Join trained networks of one architecture; their parameters are copied."""
        ensemble = cls(replace(models[0].arch, members=len(models)))
        for member, model in zip(ensemble.members, models, strict=True):
            member.load_state_dict(model.state_dict())
        return ensemble.to(next(models[0].parameters()).device).eval().requires_grad_(False)

    def score(self, slab: torch.Tensor) -> torch.Tensor:
        """The reward: slab [N, 1, D, H, W] in [0, 100] -> [N], higher is better. Differentiable in: slab and parameters."""
        return torch.stack([member.score(slab) for member in self.members]).mean(dim=0)

    def score_embedding(self, embedding: torch.Tensor) -> torch.Tensor:
        """The reward of embeddings [N, E * M] -> [N]."""
        parts = zip(self.members, embedding.chunk(len(self.members), dim=1), strict=True)
        return torch.stack([member.score_embedding(part) for member, part in parts]).mean(dim=0)

    def embed(self, slab: torch.Tensor) -> torch.Tensor:
        """Embeddings of all members side by side: slab [N, 1, D, H, W] -> [N, E * M]."""
        return torch.cat([member.embed(slab) for member in self.members], dim=1)

    def pair_margin(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Mean order-free logit that `first` is better, from embeddings [P, E * M] each -> [P]. Swapping the pair negates it."""
        parts = zip(self.members, first.chunk(len(self.members), dim=1), second.chunk(len(self.members), dim=1), strict=True)
        return torch.stack([member.pair_margin(a, b) for member, a, b in parts]).mean(dim=0)
