"""Flow-DPPO: no clip of ratios; a sample is dropped once its step has moved far, in divergence, to the side
that its advantage asks for.

    L = -A q        q = exp(log p - log p_old);  dropped where m((mu - mu_old)^2) / (2 s^2) >= d,
                    and q > 1 with A > 0 or q < 1 with A < 0

At q = 1 the gradient is -A grad log p. Means of the drawing policy must be kept beside its densities.

Default: d 1e-5. Its program does not clip the advantages; here they are clipped at 5 as everywhere, before
they come.
"""

import torch


def dropped(ratio: torch.Tensor, far: torch.Tensor, advantage: torch.Tensor, limit: float) -> torch.Tensor:
    """Which samples give no gradient, [N] bool.

    Args: far: [N], divergence of the step's mean from the drawing policy's; limit: d.
    """
    moved = ((ratio > 1) & (advantage > 0)) | ((ratio < 1) & (advantage < 0))
    return moved.detach() & (far.detach() >= limit)


def dppo_loss(ratio: torch.Tensor, advantage: torch.Tensor, drop: torch.Tensor) -> torch.Tensor:
    """-A q, [N], 0 where dropped. Differentiable in: ratio."""
    return torch.where(drop, torch.zeros_like(ratio), -advantage * ratio)
