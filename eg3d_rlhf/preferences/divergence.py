"""How far two sets of embeddings lie apart: the Cauchy-Schwarz divergence of their kernel density estimates. Pure.

Letters: m, n members of the two sets, N samples, M entries of an embedding.
"""

import math

import torch
import torch.nn.functional as F

ESTIMATORS = ("V", "U")


def cs_divergence(x: torch.Tensor, y: torch.Tensor, bandwidth: torch.Tensor | float, estimator: str = "V") -> torch.Tensor:
    """log mean k(x, x') + log mean k(y, y') - 2 log mean k(x, y), k(a, b) = exp(-|a - b|^2 / (2 bandwidth^2)).

    It says how far apart the sets are and not which one is better: exchanging them changes nothing.

    Args: x [m, M], y [n, M]; bandwidth: > 0, in the embeddings' units; estimator: 'V' takes every pair, a member with itself included, is
    at least 0 and too large in many dimensions (by about log((1/m + (1 - 1/m) A) / A) of each set, A = mean k of different members); 'U'
    leaves those pairs out of the first two means, has less bias and may be below 0: for measuring, not for training.
    Returns: []. Differentiable in: x, y, bandwidth. Identical sets have gradient 0.
    Raises: ValueError for other shapes, an unknown estimator, or 'U' with fewer than two members.
    """
    least = {"V": 1, "U": 2}.get(estimator)
    if least is None:
        raise ValueError(f"cs_divergence: expected an estimator of {', '.join(ESTIMATORS)}, got {estimator!r}. Choose one.")
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < least:
        got = f"{list(x.shape)} and {list(y.shape)}"
        raise ValueError(f"cs_divergence: expected [m, M] and [n, M] with at least {least} members each, got {got}. Pass embeddings.")

    def log_mean(a: torch.Tensor, b: torch.Tensor, within: bool = False) -> torch.Tensor:
        squares = (a[:, None] - b[None]).square().sum(2)  # [m, n]; exact for near points, unlike the expanded form
        exponents, count = -squares / (2 * bandwidth**2), squares.numel()
        if within and estimator == "U":
            exponents, count = exponents[~torch.eye(len(a), dtype=torch.bool, device=a.device)], count - len(a)
        return torch.logsumexp(exponents.flatten(), 0) - math.log(count)

    between = log_mean(x, y) + log_mean(y, x)  # both ways, so that exchanging the sets keeps the last bit
    return log_mean(x, x, within=True) + log_mean(y, y, within=True) - between


def median_distance(points: torch.Tensor) -> torch.Tensor:
    """Median distance [] between different members of [N, M]; the mean of the two middle ones of an even number. Without gradient.

    Raises: ValueError for fewer than two members.
    """
    if points.ndim != 2 or len(points) < 2:
        raise ValueError(f"median_distance: expected [N, M] with N >= 2, got {list(points.shape)}. Pass more points.")
    return F.pdist(points.detach()).quantile(0.5)
