"""Flow-GRPO: advantages times ratios of densities, which the clip keeps about 1 (Shao et al. 2024, equation
3; Liu et al. 2025).

    L = -min(q A, clip(q, 1 - c, 1 + c) A)        q = exp(log p - log p_old), both at the step that was drawn

At q = 1 the gradient is -A grad log p; beyond the clip, on the side that A asks for, there is none.

log p being the mean over a sample's numbers, the deviation of log q falls as 1 / sqrt(numbers), and so must
c. Defaults: c 1e-4 at ten thousand numbers, 1e-3 at a hundred; A clipped at 5.
"""

from typing import NamedTuple

import torch


def clipped_loss(
    log_p: torch.Tensor, old: torch.Tensor, advantage: torch.Tensor, clip_range: float
) -> torch.Tensor:
    """-min(q A, clip(q, 1 - c, 1 + c) A), all [N] -> [N]. Differentiable in: log_p."""
    return clipped_ratio_loss(torch.exp(log_p - old), advantage, clip_range)


def clipped_ratio_loss(ratio: torch.Tensor, advantage: torch.Tensor, clip_range: float) -> torch.Tensor:
    """The same of ratios. Differentiable in: ratio."""
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip_range, 1 + clip_range) * advantage)


class Clipped(NamedTuple):
    """Which samples lie outside the clip, [N] bool."""

    high: torch.Tensor
    low: torch.Tensor
    stopped: torch.Tensor  # those of them whose gradient the clip takes


def outside(ratio: torch.Tensor, advantage: torch.Tensor, clip_range: float) -> Clipped:
    """Of ratios; without gradient."""
    high = ratio.detach() > 1 + clip_range
    low = ratio.detach() < 1 - clip_range
    return Clipped(high, low, (high & (advantage > 0)) | (low & (advantage < 0)))
