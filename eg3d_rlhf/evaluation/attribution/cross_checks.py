"""What Shapley values are held against: Integrated Gradients, occlusion, noise of the change's size, rewards with re-drawn weights.

Integrated Gradients run along the straight path from the original slab to the tuned one (Sundararajan et al. 2017):
IG = (x - x') * integral over a in [0, 1] of grad r(x' + a (x - x')); its sum is r(x) - r(x'), which is checked.
Letters: N latents, R regions, K draws, D, H, W = z, y, x.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch

from eg3d_rlhf.core.statistics import bootstrap_mean_interval
from eg3d_rlhf.evaluation.attribution.regions import region_shape
from eg3d_rlhf.evaluation.attribution.shapley import Score, Value, relative_gap
from eg3d_rlhf.rewards.evaluation import Network

BOUND = 0.01  # completeness gap, as a share of the reward difference
STEPS, MOST_STEPS = 32, 1024


@dataclass(frozen=True, kw_only=True)
class IntegratedGradients:
    """Attribution of every voxel, and how well it adds up."""

    voxels: torch.Tensor  # [D, H, W] float64 on the CPU, in units of the reward; of another observation its own shape
    steps: int  # of the last integral
    gap: float  # sum of voxels - difference
    difference: float  # r_tuned - r_original
    tried: tuple[tuple[int, float], ...]  # (steps, gap as a share of the difference), in order

    @property
    def complete(self) -> bool:
        """Whether the gap is within BOUND."""
        return relative_gap(self.gap, self.difference) <= BOUND


def integrated_gradients(
    score: Score, original: torch.Tensor, tuned: torch.Tensor, difference: float, steps: int = STEPS, most_steps: int = MOST_STEPS,
    batch: int = 16,
) -> IntegratedGradients:
    """Attribute r(tuned) - r(original) to voxels; the step count doubles until the gap is within 1 % of the difference.

    Args: original, tuned: [1, D, H, W]; difference: computed from the slabs alone; batch: slabs with gradients at once.
    Returns: the integral with the most steps; `complete` is False where `most_steps` did not suffice.
    Raises: ValueError for a step count below 2 or above `most_steps`.
    """
    from captum.attr import IntegratedGradients as Captum  # only here: the rest of the package works without it

    if not 2 <= steps <= most_steps:
        raise ValueError(f"--steps: expected 2 to {most_steps} steps, got {steps}. The count doubles by itself where it is too low.")
    method, tried = Captum(score, multiply_by_inputs=True), []
    while True:
        voxels = method.attribute(
            tuned[None], baselines=original[None], n_steps=steps, method="gausslegendre", internal_batch_size=max(batch, 2),
        )
        voxels = voxels[0].reshape(region_shape(original.shape)).detach().double().cpu()
        gap = float(voxels.sum()) - difference
        tried.append((steps, relative_gap(gap, difference)))
        if tried[-1][1] <= BOUND or 2 * steps > most_steps:
            return IntegratedGradients(voxels=voxels, steps=steps, gap=gap, difference=difference, tried=tuple(tried))
        steps *= 2


def occlusion(value: Value, regions: int) -> np.ndarray:
    """What the tuned slab loses when one region is set back to the original, [R]: v(all) - v(all but i) (Zeiler and Fergus 2014)."""
    everything = torch.ones(regions + 1, regions, dtype=torch.bool)
    everything[torch.arange(regions), torch.arange(regions)] = False
    values = value(everything).numpy()
    return values[-1] - values[:-1]


def shuffled_change(original: torch.Tensor, tuned: torch.Tensor, labels: torch.Tensor, seed: int) -> torch.Tensor:
    """The original slab [1, D, H, W] with the change tuned - original shuffled among the voxels of each region [D, H, W].

    Same regions, same amount of change in each, no shape: whatever is attributed to it is the reward's response to noise of that energy.
    """
    change = (tuned - original).flatten().cpu()
    flat, out = labels.flatten().cpu(), torch.empty_like(change)
    generator = torch.Generator().manual_seed(seed)
    for region in range(int(flat.max()) + 1):
        voxels = torch.nonzero(flat == region).squeeze(1)
        out[voxels] = change[voxels[torch.randperm(len(voxels), generator=generator)]]
    return original + out.reshape(original.shape).to(original)


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
        entry: dict = {"first": one, "second": two}
        for kind in ("spearman", "kendall"):
            per_latent = [rank_correlation(x, y, kind) for x, y in zip(a, b, strict=True)]
            known = [v for v in per_latent if v is not None]
            mean = bootstrap_mean_interval(known)._asdict() if known else None
            entry[kind] = {"per_latent": per_latent, "mean": mean, "overall": rank_correlation(a.mean(axis=0), b.mean(axis=0), kind)}
        out.append(entry)
    return out


def redrawn(reward: Network, seed: int) -> Network:
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
