"""DGPO: the policy's errors on a whole group of samples against their ranks or advantages (Luo et al. 2025):
DPO for more than two.

With e = m((v - u)^2) of the policy and e_ref of the untuned network, at one time and one noise for all K
samples of a group, and A their advantages, of sum 0 (or a constant would drift in),

    S = beta / K sum_j A_j (e_j - e_ref_j)        L = softplus(S) / beta
    gradient: 1 / K sum_j sigmoid(S) A_j grad e_j

K = 2 with A = ±1 is DPO divided by beta; at the reference the gradient is mean(A grad e) / 2; where all A are
0 there is none.

Defaults: beta 100 per unit of e, advantages by normal scores or normalised in the group and clipped at 5.
Deviates: published code writes mean(sg(sigmoid(S)) A e), whose gradient is this loss's and whose value means
nothing; `weights` has its factors.

Shape letters: G groups, K samples of a group.
"""

import torch
import torch.nn.functional as F

BETA = 100.0
CLIP = 1e-2  # of exp(e_old - e), about 1


def group_margin(
    errors: torch.Tensor, ref_errors: torch.Tensor, advantage: torch.Tensor, beta: float = BETA
) -> torch.Tensor:
    """S [G] of [G, K] each; below 0 where the policy is better than the reference at what is better.
    Differentiable in: errors.
    """
    return beta * (advantage * (errors - ref_errors.detach())).mean(1)


def dgpo_loss(
    errors: torch.Tensor, ref_errors: torch.Tensor, advantage: torch.Tensor, beta: float = BETA
) -> torch.Tensor:
    """softplus(S) / beta, [G] of [G, K] each. Differentiable in: errors."""
    return F.softplus(group_margin(errors, ref_errors, advantage, beta)) / beta


def weights(
    errors: torch.Tensor, ref_errors: torch.Tensor, advantage: torch.Tensor, beta: float = BETA
) -> torch.Tensor:
    """sigmoid(S) A, [G, K]: K times what multiplies each error's gradient. Without gradient."""
    return group_margin(errors, ref_errors, advantage, beta).detach().sigmoid()[:, None] * advantage


def left_alone(
    errors: torch.Tensor, old_errors: torch.Tensor, advantage: torch.Tensor, clip: float = CLIP
) -> torch.Tensor:
    """Which samples have gone far enough from the network that drew them, and give no gradient, bool of any
    one shape.

    q = exp(e_old - e), outside 1 ± c on the side that A asks for. Give dgpo_loss
    `torch.where(left_alone(...), e.detach(), e)`.
    """
    ratio = (old_errors - errors.detach()).exp()
    return torch.where(advantage > 0, ratio > 1 + clip, ratio < 1 - clip)
