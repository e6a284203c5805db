"""Losses of flow tuning that are pure functions of tensors. They return one value a sample (DGPO: a group),
unreduced.

All losses on the sampler's steps (GRPO, GRPO-Guard, Flow-DPPO) have the gradient -A grad log p at the network
that drew the samples, the guard's times s / D. log p is the mean over a sample's numbers, as in
online/steps.py, and q = exp(log p - log p_old) is the ratio of densities. DiffusionNFT and DGPO read errors
of finished samples. DPO on pairs is in dpo.py and preferences/losses.py.

Shape letters as in sparse.py; G groups, K samples of a group.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from eg3d_rlhf.models.sparse import Batch, feats_of, mean_per_sample, spread

# GRPO and GRPO-Guard: clipped ratios.


def clipped_ratio_loss(ratio: torch.Tensor, advantage: torch.Tensor, clip_range: float) -> torch.Tensor:
    """Compute GRPO's loss -min(q A, clip(q, 1 - c, 1 + c) A), [N] (Shao et al. 2024, equation 3; Liu et al.
    2025).

    Beyond the clip, on the side that the advantage asks for, there is no gradient. The standard deviation of
    log q falls as 1 / sqrt(numbers of a sample), and so must the clip: 1e-4 at ten thousand numbers, 1e-3 at
    a hundred.
    Args: ratio: q [N]; advantage: A [N]; clip_range: c.
    Differentiable in: ratio.
    """
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip_range, 1 + clip_range) * advantage)


class Clipped(NamedTuple):
    """Masks of the samples outside the clip, [N] bool each."""

    high: torch.Tensor
    low: torch.Tensor
    stopped: torch.Tensor  # outside on the side that the advantage asks for: without gradient


def outside_clip(ratio: torch.Tensor, advantage: torch.Tensor, clip_range: float) -> Clipped:
    """Find the samples whose ratio is outside the clip. Not differentiable."""
    high = ratio.detach() > 1 + clip_range
    low = ratio.detach() < 1 - clip_range
    return Clipped(high, low, (high & (advantage > 0)) | (low & (advantage < 0)))


def guarded_ratio(log_p: torch.Tensor, old: torch.Tensor, bias: torch.Tensor, std: float) -> torch.Tensor:
    """Compute GRPO-Guard's centred ratio q = exp(s (log p - log p_old + bias)), [N].

    The exponent is m(z (mu - mu_old)), where z is the noise that was drawn. It is linear in mu and has mean 0
    under the policy that drew, where GRPO's own exponent is always below 0. So both sides of the clip act
    alike at every step of the sampler.
    Args: bias: [N], m((mu - mu_old)^2) / (2 s^2), the divergence of the step's mean from that of the policy
        that drew; std: s, the standard deviation of the step.
    Differentiable in: log_p, bias.
    Deviates: s is the whole standard deviation for every kind of step, where published code multiplies some
        by sqrt(D) twice.
    """
    return torch.exp(std * (log_p - old + bias))


def guard_loss(
    ratio: torch.Tensor, advantage: torch.Tensor, clip_range: float, length: float
) -> torch.Tensor:
    """Compute GRPO-Guard's loss, the clipped loss of guarded ratios divided by the step's length D, [N].

    Args: length: D > 0; 1 gives the loss of programs that leave the division out.
    Differentiable in: ratio.
    """
    return clipped_ratio_loss(ratio, advantage, clip_range) / length


# Flow-DPPO: no clip of ratios.


def dppo_dropped(
    ratio: torch.Tensor, divergence: torch.Tensor, advantage: torch.Tensor, limit: float
) -> torch.Tensor:
    """Find the samples that give no gradient, [N] bool: their step has moved far to the side that the
    advantage asks for.

    Args: divergence: [N], of the step's mean from that of the policy that drew; limit: d, from which on a
        sample is dropped.
    """
    moved = ((ratio > 1) & (advantage > 0)) | ((ratio < 1) & (advantage < 0))
    return moved.detach() & (divergence.detach() >= limit)


def dppo_loss(ratio: torch.Tensor, advantage: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor:
    """Compute Flow-DPPO's loss -A q, 0 where a sample is dropped, [N].

    Differentiable in: ratio.
    Deviates: its program does not clip advantages; here they are clipped before they come, as for all losses.
    """
    return torch.where(dropped, torch.zeros_like(ratio), -advantage * ratio)


# DGPO: whole groups.

DGPO_BETA = 100.0  # per unit of error
DGPO_CLIP = 1e-2  # of exp(e_old - e), about 1


def group_margin(
    errors: torch.Tensor, ref_errors: torch.Tensor, advantage: torch.Tensor, beta: float = DGPO_BETA
) -> torch.Tensor:
    """Compute S = beta / K sum_j A_j (e_j - e_ref_j), [G] of [G, K] each.

    S is below 0 where the policy gained, against the reference, on the samples of positive advantage.
    Differentiable in: errors.
    """
    return beta * (advantage * (errors - ref_errors.detach())).mean(1)


def dgpo_loss(
    errors: torch.Tensor, ref_errors: torch.Tensor, advantage: torch.Tensor, beta: float = DGPO_BETA
) -> torch.Tensor:
    """Compute DGPO's loss softplus(S) / beta, [G] of [G, K] each (Luo et al. 2025): DPO for more than two
    samples.

    With e = m((v - u)^2) at one time and one noise for all samples of a group, the gradient is 1 / K sum_j
    sigmoid(S) A_j grad e_j. K = 2 with A = ±1 is DPO divided by beta. At the reference the gradient is mean(A
    grad e) / 2, and where all A are 0 there is none.
    Args: advantage: of sum 0 in a group, or a constant would drift in.
    Differentiable in: errors.
    Deviates: published code writes mean(sg(sigmoid(S)) A e), which has this gradient and a value without
        meaning.
    """
    return F.softplus(group_margin(errors, ref_errors, advantage, beta)) / beta


def dgpo_stopped(
    errors: torch.Tensor, old_errors: torch.Tensor, advantage: torch.Tensor, clip: float = DGPO_CLIP
) -> torch.Tensor:
    """Find the samples that have moved far enough from the network that drew them, bool of any one shape.

    They have q = exp(e_old - e) outside 1 ± c on the side that the advantage asks for. Pass
    `torch.where(dgpo_stopped(...), e.detach(), e)` to dgpo_loss, so that they give no gradient.
    """
    ratio = (old_errors - errors.detach()).exp()
    return torch.where(advantage > 0, ratio > 1 + clip, ratio < 1 - clip)


# DiffusionNFT.

FLOOR = 1e-5  # of the mean error that divides; absolute, so that latents should be about 1 in size
ADVANTAGE_CLIP = 5.0  # C
CURVATURE = 1.0  # b

# over a sample's numbers; a path that weighs its tensors brings its own
Mean = Callable[[torch.Tensor, Batch], torch.Tensor]


def goodness(advantage: torch.Tensor, clip: float = ADVANTAGE_CLIP) -> torch.Tensor:
    """Compute r = 1/2 + clip(A, ±C) / (2 C) of advantages of any shape: how good a sample is, in 0..1.

    >>> goodness(torch.tensor([-7.0, -2.5, 0.0, 1.0]))
    tensor([0.0000, 0.2500, 0.5000, 0.6000])
    """
    return (0.5 + advantage.clamp(-clip, clip) / (2 * clip)).clamp(0, 1)


class NftErrors(NamedTuple):
    """The errors m(a±^2) / n± of both sides, [N]. Differentiable in: v."""

    positive: torch.Tensor
    negative: torch.Tensor


def nft_errors(
    v: Batch,
    old: Batch,
    target: Batch,
    sigma: torch.Tensor,
    curvature: float = CURVATURE,
    adaptive: bool = True,
    mean: Mean = mean_per_sample,
) -> NftErrors:
    """Compute both errors of a batch at one time and noise a sample.

        v+ = v_old + b (v - v_old)        v- = v_old - b (v - v_old)
        a± = sigma (u - v±), the error of the x_0 that v± predicts

    Args: v: of the policy; old: v_old, of the network that drew the samples; target: u = (1 - s) eps - x_0;
        sigma: [N], s + (1 - s) t; curvature: b; adaptive: divide by n± = max(m|a±|, FLOOR), without gradient,
        which turns the weight sigma^2 into about sigma.
    Deviates: sigma_min s is kept, where published code has 0.
    """
    step = curvature * (feats_of(v) - feats_of(old).detach())
    missing = feats_of(target) - feats_of(old).detach()
    level = spread(sigma, v)
    sides = []
    for sign in (1, -1):
        error = level * (missing - sign * step)
        weight = torch.ones_like(sigma)
        if adaptive:
            weight = mean(error.detach().double().abs(), v).clamp(min=FLOOR).to(error.dtype)
        sides.append(mean(error.square(), v) / weight)
    return NftErrors(*sides)


def nft_loss(
    errors: NftErrors, r: torch.Tensor, clip: float = ADVANTAGE_CLIP, curvature: float = CURVATURE
) -> torch.Tensor:
    """Compute DiffusionNFT's loss C / b [r e+ + (1 - r) e-], [N] (Zheng et al. 2025).

    It moves a flow towards good finished samples and away from bad ones; any sampler will do, and no density
    is needed. At v = v_old its gradient is C (2r - 1) sigma^2 grad m((v - u)^2) / n: none for r = 1/2.
    Without n the optimum is v - v_old = (2r - 1) / b (u - v_old), and C and b act by their product alone.
    With n the same holds of the mean over many u at one x_t, while a single sample is pulled to the full
    bound v - v_old = ±(u - v_old) / b, however clear it is.

    The caller adds a weight times m((v - v_ref)^2), since the bound around v_old is none around the network
    that training began with. Offline, with r from labels, C is 1 and the old network is never refreshed: each
    refresh multiplies u - v_old by 1 - (2r - 1) / b.
    Args: clip: C, with which r was made; curvature: b, as in the errors.
    Differentiable in: the errors' v, r.
    """
    return clip / curvature * (r * errors.positive + (1 - r) * errors.negative)
