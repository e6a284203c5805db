"""Whether attributions agree: rank correlations between methods per latent and overall, and against a reward with re-drawn weights.

Letters: N latents, R regions, K draws.
"""

import copy
from collections.abc import Mapping
from itertools import combinations

import numpy as np
import torch

from eg3d_rlhf.metrics.statistics import bootstrap_mean_interval


def rank_correlation(first: np.ndarray, second: np.ndarray, kind: str = "spearman") -> float | None:
    """Spearman's rho or Kendall's tau-b of two attributions [R]; None where one of them is constant and has no ranks."""
    from scipy.stats import kendalltau, spearmanr

    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float({"spearman": spearmanr, "kendall": kendalltau}[kind](first, second).statistic)


def agreement(methods: Mapping[str, np.ndarray]) -> list[dict]:
    """Rank correlation of every pair of methods, each [N, R].

    Returns: per pair and kind: per latent values, their mean with a bootstrap interval over latents, and the correlation of the mean
    attributions ("overall").
    """
    out = []
    for (one, a), (two, b) in combinations(methods.items(), 2):
        entry = {"first": one, "second": two}
        for kind in ("spearman", "kendall"):
            per_latent = [rank_correlation(x, y, kind) for x, y in zip(a, b, strict=True)]
            known = [v for v in per_latent if v is not None]
            mean = bootstrap_mean_interval(known)._asdict() if known else None
            entry[kind] = {"per_latent": per_latent, "mean": mean, "overall": rank_correlation(a.mean(axis=0), b.mean(axis=0), kind)}
        out.append(entry)
    return out


def redrawn(reward: torch.nn.Module, seed: int) -> torch.nn.Module:
    """A copy of a reward whose parameters are drawn anew: normal, with each tensor's own mean and deviation (Adebayo et al. 2018).

    Buffers (the slab's statistics) are kept: what it has learnt is gone, its scale is not. A tensor of one entry takes a random sign.
    """
    other = copy.deepcopy(reward)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            if parameter.numel() == 1:
                parameter.copy_(parameter.abs() * noise.sign())
            else:
                parameter.copy_(parameter.mean() + parameter.std() * noise)
    return other.eval().requires_grad_(False)
