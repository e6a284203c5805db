"""Compute the losses of flow tuning as pure functions of tensors. Each loss function returns one value for
each sample (DGPO: for each group), without a mean or a sum over them.

GRPO, GRPO-Guard and Flow-DPPO act on the sampler's steps. Where the policy equals the sampling network, the
gradient of each loss is -A grad log p; for GRPO-Guard it is also multiplied by s / D. Here A is the advantage
of a sample, p the density of a step, s its standard deviation and D its length. log p is the mean over all
elements of a sample, as in online/steps.py, and q = exp(log p - log p_old) is the ratio of densities, with
p_old the density under the sampling network.

DiffusionNFT (Zheng et al. 2025) and DGPO (Luo et al. 2025) read errors of finished samples. There v is the
velocity of the policy, u the target velocity of flow matching, t the time in 0..1, s the path's sigma_min,
and m(x) the mean over all elements of a sample. DPO on pairs is in dpo.py and preferences/losses.py.

Shapes: N samples, V voxels and C channels, as in models/sparse.py; G groups, K samples of a group.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from eg3d_rlhf.models.sparse import Batch, feats_of, mean_per_sample, spread

# GRPO and GRPO-Guard, which clip ratios of densities.


def clipped_ratio_loss(ratio: torch.Tensor, advantage: torch.Tensor, clip_range: float) -> torch.Tensor:
    """Compute GRPO's loss -min(q A, clip(q, 1 - c, 1 + c) A) of each sample, [N].

    The source is Shao et al. 2024, equation 3; Liu et al. 2025 apply it to flows.

    A sample whose ratio lies beyond the clip, on the side towards which its advantage moves it, gives no
    gradient. The standard deviation of log q falls as 1 / sqrt(elements of a sample), so the clip must fall
    in the same way: 1e-4 for ten thousand elements, 1e-3 for a hundred.
    Differentiable in: ratio.

    Args:
        ratio: ratio q of the densities, [N].
        advantage: advantage A of each sample, [N].
        clip_range: largest distance c of the ratio from 1.
    """
    # the minimum is a pessimistic bound: the clip limits gains, but never hides that a sample became worse
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip_range, 1 + clip_range) * advantage)


class Clipped(NamedTuple):
    """Masks of the samples outside the clip, [N] bool each."""

    high: torch.Tensor  # ratio above 1 + c
    low: torch.Tensor  # ratio below 1 - c
    # outside on the side towards which the advantage moves the ratio, so that the sample gives no gradient
    stopped: torch.Tensor


def outside_clip(ratio: torch.Tensor, advantage: torch.Tensor, clip_range: float) -> Clipped:
    """Find the samples whose ratio is outside 1 ± c. Not differentiable.

    Args:
        ratio: ratio q of the densities, [N].
        advantage: advantage A of each sample, [N].
        clip_range: largest distance c of the ratio from 1.
    """
    is_above = ratio.detach() > 1 + clip_range
    is_below = ratio.detach() < 1 - clip_range
    # a sample outside on the opposite side keeps its gradient, which moves it back into the clip
    return Clipped(is_above, is_below, (is_above & (advantage > 0)) | (is_below & (advantage < 0)))


def guarded_ratio(
    log_p: torch.Tensor, old_log_p: torch.Tensor, bias: torch.Tensor, std: float
) -> torch.Tensor:
    """Compute GRPO-Guard's centred ratio q = exp(s (log p - log p_old + bias)), [N].

    The exponent is m(z (mu - mu_old)), where z is the noise of the sampled step, mu the step's mean under the
    policy, and mu_old its mean under the sampling policy. The exponent is linear in mu and has mean 0 under
    the sampling policy, whereas the mean of GRPO's own exponent is below 0. So both sides of the clip act
    alike at every step of the sampler.
    Differentiable in: log_p, bias.

    Args:
        log_p: log density of the step under the policy, [N].
        old_log_p: log density of the step under the sampling policy, [N].
        bias: m((mu - mu_old)^2) / (2 s^2), the divergence of mu from mu_old, [N].
        std: standard deviation s of the step.

    Deviates: s is the whole standard deviation for every kind of step, where published code multiplies some
        by sqrt(D) twice.
    """
    # the bias cancels the term of log p - log p_old that is quadratic in mu - mu_old
    return torch.exp(std * (log_p - old_log_p + bias))


def guard_loss(
    ratio: torch.Tensor, advantage: torch.Tensor, clip_range: float, length: float
) -> torch.Tensor:
    """Compute GRPO-Guard's loss, the clipped loss of guarded ratios divided by the step's length D, [N].

    Differentiable in: ratio.

    Args:
        ratio: result of guarded_ratio, [N].
        advantage: advantage A of each sample, [N].
        clip_range: largest distance c of the ratio from 1.
        length: length D > 0 of the step; 1 gives the loss of programs that leave the division out.
    """
    # steps of different length D would otherwise weigh differently in the gradient
    return clipped_ratio_loss(ratio, advantage, clip_range) / length


# Flow-DPPO, which drops samples by their divergence and clips no ratio.


def dppo_dropped(
    ratio: torch.Tensor, divergence: torch.Tensor, advantage: torch.Tensor, max_divergence: float
) -> torch.Tensor:
    """Find the samples that give no gradient, [N] bool.

    These are the samples whose step has diverged by at least `max_divergence` from the step of the sampling
    policy, in the direction towards which the advantage moves it.

    Args:
        ratio: ratio q of the densities, [N].
        divergence: divergence of the step's mean from that of the sampling policy, [N].
        advantage: advantage A of each sample, [N].
        max_divergence: divergence from which on a sample is dropped.
    """
    # a ratio on the opposite side of 1 means that the update still has to undo a change
    moved_with_advantage = ((ratio > 1) & (advantage > 0)) | ((ratio < 1) & (advantage < 0))
    return moved_with_advantage.detach() & (divergence.detach() >= max_divergence)


def dppo_loss(ratio: torch.Tensor, advantage: torch.Tensor, is_dropped: torch.Tensor) -> torch.Tensor:
    """Compute Flow-DPPO's loss -A q, 0 where a sample is dropped, [N].

    Differentiable in: ratio.

    Args:
        ratio: ratio q of the densities, [N].
        advantage: advantage A of each sample, [N].
        is_dropped: result of dppo_dropped, [N] bool.
    Deviates: the published program does not clip advantages; here the caller clips them, as for all losses.
    """
    # torch.where, not a product with the mask: 0 times an infinite ratio would be NaN
    return torch.where(is_dropped, torch.zeros_like(ratio), -advantage * ratio)


# DGPO, whose loss compares all samples of a group.

DGPO_BETA = 100.0  # beta, per unit of error
DGPO_CLIP = 1e-2  # c: the ratio exp(e_old - e) is clipped to 1 ± c


def group_margin(
    errors: torch.Tensor, ref_errors: torch.Tensor, advantage: torch.Tensor, beta: float = DGPO_BETA
) -> torch.Tensor:
    """Compute the margin S = beta / K sum_j A_j (e_j - e_ref_j) of each group, [G].

    All tensor arguments have the shape [G, K]: errors e, errors e_ref of the reference, and advantages A. S
    is below 0 where the policy's errors fell, against the reference's, on the samples of positive
    advantage.
    Differentiable in: errors.

    Args:
        errors: errors e of the policy, [G, K].
        ref_errors: errors e_ref of the reference, [G, K].
        advantage: advantages A, [G, K].
        beta: factor of the margin, per unit of error.
    """
    # [G, K] -> [G]
    return beta * (advantage * (errors - ref_errors.detach())).mean(1)


def dgpo_loss(
    errors: torch.Tensor, ref_errors: torch.Tensor, advantage: torch.Tensor, beta: float = DGPO_BETA
) -> torch.Tensor:
    """Compute DGPO's loss softplus(S) / beta of each group, [G] (Luo et al. 2025), with S from group_margin.

    DGPO extends DPO to more than two samples. With e = m((v - u)^2) at one time and one noise for all samples
    of a group, the gradient is 1 / K sum_j sigmoid(S) A_j grad e_j. K = 2 with A = ±1 is DPO divided by beta.
    At the reference the gradient is mean(A grad e) / 2, and where all A are 0 there is none.
    Differentiable in: errors.

    Args:
        errors: errors e of the policy, [G, K].
        ref_errors: errors of the reference at the same times and noises, [G, K].
        advantage: advantages A, [G, K]; they must sum to 0 in each group, since otherwise a constant would be
            added to S.
        beta: factor of the margin, per unit of error.

    Deviates: published code writes mean(sg(sigmoid(S)) A e), which has this gradient and a value without
        meaning.
    """
    # divided by beta, so that the size of the gradient does not grow with beta
    return F.softplus(group_margin(errors, ref_errors, advantage, beta)) / beta


def dgpo_stopped(
    errors: torch.Tensor, old_errors: torch.Tensor, advantage: torch.Tensor, clip: float = DGPO_CLIP
) -> torch.Tensor:
    """Find the samples whose errors have changed so much that they give no more gradient, as a bool tensor.

    A sample is found if its ratio q = exp(e_old - e), with e_old the error of the sampling network, lies
    outside 1 ± c on the side towards which the advantage moves it. Pass
    `torch.where(dgpo_stopped(...), e.detach(), e)` to dgpo_loss, so that these samples give no gradient. All
    tensor arguments have one shape, which is also that of the result.

    Args:
        errors: errors e of the policy.
        old_errors: errors e_old of the sampling network.
        advantage: advantages A.
        clip: largest distance c of the ratio from 1.
    """
    # an error below the old one counts as a density above the old one
    ratio = (old_errors - errors.detach()).exp()
    return torch.where(advantage > 0, ratio > 1 + clip, ratio < 1 - clip)


# DiffusionNFT.

FLOOR = 1e-5  # smallest mean error to divide by; it is absolute, so latents should be of size 1 or so
ADVANTAGE_CLIP = 5.0  # C, in standard deviations of the reward
CURVATURE = 1.0  # b, without unit

# function for the mean over the elements of a sample; a path that weights its tensors has a different one
Mean = Callable[[torch.Tensor, Batch], torch.Tensor]


def goodness(advantage: torch.Tensor, clip: float = ADVANTAGE_CLIP) -> torch.Tensor:
    """Compute the goodness r = 1/2 + clip(A, ±C) / (2 C) in 0..1 from advantages A of any shape.

    The argument `clip` is C, the largest absolute value of an advantage.

    >>> goodness(torch.tensor([-7.0, -2.5, 0.0, 1.0]))
    tensor([0.0000, 0.2500, 0.5000, 0.6000])
    """
    # the second clamp removes rounding beyond 0 and 1
    return (0.5 + advantage.clamp(-clip, clip) / (2 * clip)).clamp(0, 1)


class NftErrors(NamedTuple):
    """Errors m(a±^2) / n± of the velocities v+ and v- (see nft_errors), [N] each. Differentiable in: v."""

    positive: torch.Tensor
    negative: torch.Tensor


def nft_errors(
    v: Batch,
    v_old: Batch,
    target: Batch,
    sigma: torch.Tensor,
    curvature: float = CURVATURE,
    adaptive: bool = True,
    mean: Mean = mean_per_sample,
) -> NftErrors:
    """Compute DiffusionNFT's two errors of each sample, at one time and one noise.

        v+ = v_old + b (v - v_old)        v- = v_old - b (v - v_old)
        a± = sigma (u - v±), the error of the x_0 that v± predicts

    Args:
        v: velocities of the policy.
        v_old: velocities of the sampling network.
        target: target velocities u = (1 - s) eps - x_0.
        sigma: noise level s + (1 - s) t of each sample, [N].
        curvature: factor b.
        adaptive: whether the errors are divided by n± = max(m|a±|, 1e-5), without gradient. This changes the
            weight of a time from sigma^2 to about sigma. If False, n± is 1.
        mean: function for the mean over the elements of a sample.

    Deviates: the path's sigma_min s is used, where published code assumes 0.
    """
    # v_old is detached everywhere: only the policy is trained
    velocity_change = curvature * (feats_of(v) - feats_of(v_old).detach())
    old_residual = feats_of(target) - feats_of(v_old).detach()
    noise_level = spread(sigma, v)  # [N] -> one value for each element of the sample
    mean_errors = []
    for sign in (1, -1):
        # a+ for the sign 1 and a- for -1; u - v± is written as (u - v_old) ∓ b (v - v_old)
        error = noise_level * (old_residual - sign * velocity_change)
        weight = torch.ones_like(sigma)
        if adaptive:
            # m|a±| of each sample, [N]; in float64, since it divides
            weight = mean(error.detach().double().abs(), v).clamp(min=FLOOR).to(error.dtype)
        mean_errors.append(mean(error.square(), v) / weight)
    return NftErrors(*mean_errors)


def nft_loss(
    errors: NftErrors, r: torch.Tensor, clip: float = ADVANTAGE_CLIP, curvature: float = CURVATURE
) -> torch.Tensor:
    """Compute DiffusionNFT's loss C / b [r e+ + (1 - r) e-], [N] (Zheng et al. 2025).

    The loss moves a flow towards good finished samples and away from bad ones. It works with any sampler and
    needs no density. At v = v_old its gradient is C (2r - 1) sigma^2 grad m((v - u)^2) / n, which is 0 for r
    = 1/2. Without n the optimum is v - v_old = (2r - 1) / b (u - v_old), and only the product of C and b
    matters. With n the same holds for the mean over many u at one x_t, while a single sample is pulled to the
    full bound v - v_old = ±(u - v_old) / b, however close its r is to 1/2.

    The caller adds a weight times m((v - v_ref)^2), since the bound around v_old does not bound the distance
    from the network that training began with. Offline, with r from labels, C is 1 and the old network is
    never refreshed: each refresh would multiply u - v_old by 1 - (2r - 1) / b.
    Differentiable in: the velocity v of the errors, and r.

    Args:
        errors: result of nft_errors, e+ and e-.
        r: goodness of each sample in 0..1, [N].
        clip: factor C with which r was computed.
        curvature: factor b, the same as in the errors.
    """
    # C / b makes the size of the gradient at v = v_old independent of b
    return clip / curvature * (r * errors.positive + (1 - r) * errors.negative)
