"""GRPO-Guard: the clip on a ratio that is centred, so that both of its sides act alike at every step of the
sampler.

With s the step's deviation, D its length, and bias = m((mu - mu_old)^2) / (2 s^2),

    q = exp(s (log p - log p_old + bias))        L = -min(q A, clip(q, 1 - c, 1 + c) A) / D

The exponent is m(z (mu - mu_old)), z being the noise that was drawn: linear in mu, of mean 0 under the policy
that drew, where GRPO's own is below 0 always. At q = 1 the gradient is -(s / D) A grad log p.

Default: c 2e-6 at ten thousand numbers (its recipe's; the published class has 1e-4); this package's toy takes
what suits its numbers.
Deviates: s is the whole deviation of the step for every kind of step, where published code multiplies some by
sqrt(D) twice; a program that leaves the division by D out is this one with `length` 1.
"""

import torch

from eg3d_rlhf.tuning.flow.training.losses.clip import clipped_ratio_loss


def guarded_ratio(log_p: torch.Tensor, old: torch.Tensor, bias: torch.Tensor, std: float) -> torch.Tensor:
    """q [N].

    Args: bias: [N], divergence of the step's mean from the drawing policy's. Differentiable in: log_p, bias.
    """
    return torch.exp(std * (log_p - old + bias))


def guard_loss(
    ratio: torch.Tensor, advantage: torch.Tensor, clip_range: float, length: float
) -> torch.Tensor:
    """[N] of guarded ratios. Args: length: D > 0. Differentiable in: ratio."""
    return clipped_ratio_loss(ratio, advantage, clip_range) / length
