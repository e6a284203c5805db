"""Integrated Gradients along the straight path from the original slab to the tuned one, with a check of its completeness.

Sundararajan et al. (2017): IG = (x - x') * integral over a in [0, 1] of grad r(x' + a (x - x')); its sum is r(x) - r(x').
"""

from dataclasses import dataclass

import torch

from eg3d_rlhf.attribution.coalitions import Score
from eg3d_rlhf.attribution.shapley import relative_gap

BOUND = 0.01  # completeness gap, as a share of the reward difference
STEPS, MOST_STEPS = 32, 1024


@dataclass(frozen=True, kw_only=True)
class IntegratedGradients:
    """Attribution of every voxel, and how well it adds up."""

    voxels: torch.Tensor  # [D, H, W] float64 on the CPU, in units of the reward
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
        voxels = voxels[0, 0].detach().double().cpu()
        gap = float(voxels.sum()) - difference
        tried.append((steps, relative_gap(gap, difference)))
        if tried[-1][1] <= BOUND or 2 * steps > most_steps:
            return IntegratedGradients(voxels=voxels, steps=steps, gap=gap, difference=difference, tried=tuple(tried))
        steps *= 2
