"""The gradients of score distillation on a picture, as pure functions: unreduced, without logging, no draws.

Letters: K noises, A assets, V views of an asset, B = A V pictures, Q negatives. e a noise, p a prediction of it, w weights [B, 1, 1, 1].
The identity behind all of them: p - e = (a / s) (x - x0), so a step moves x towards the one-step denoised x0.
"""

import torch


def guided(text: torch.Tensor, null: torch.Tensor, scale: float) -> torch.Tensor:
    """Classifier-free guidance p(null) + scale (p(text) - p(null)); scale 1 is p(text) alone. Ho and Salimans (2022).

    threestudio's Stable Diffusion guidance writes p(text) + scale (p(text) - p(null)): its 100 is 101 here.
    """
    return null + scale * (text - null)


def perpendicular(q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """The part of q [B, ...] that is at right angles to p [B, ...]."""
    inner, square = ((a * p).flatten(1).sum(1) for a in (q, p))
    return q - (inner / square.clamp_min(1e-6)).view(-1, *[1] * (p.ndim - 1)) * p


def perp_neg(
    text: torch.Tensor, null: torch.Tensor, negatives: torch.Tensor, weights: torch.Tensor, scale: float
) -> torch.Tensor:
    """Guidance away from other views of the prompt, where they say something new (Armandpour et al. 2023).

    p = text - null, q_i = negative_i - null; null + scale (p + sum_i weight_i perpendicular(q_i, p)).
    Args: text, null [B, C, H, W]; negatives [Q, B, C, H, W]; weights [B, Q], below 0.
    """
    p = text - null
    push = [w.view(-1, 1, 1, 1) * perpendicular(n - null, p) for n, w in zip(negatives, weights.unbind(1), strict=True)]
    return null + scale * (p + torch.stack(push).sum(0))


def sds(predicted: torch.Tensor, noise: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """w (p - e), DreamFusion (Poole et al. 2022, equation 3)."""
    return weight * (predicted - noise)


def sjc(x: torch.Tensor, z: torch.Tensor, predicted: torch.Tensor, u: torch.Tensor, *, variance_reduced: bool = True) -> torch.Tensor:
    """(x - D) / u, or (z - D) / u, with z = x + u e, u = s / a and D = z - u p (Wang et al. 2023, Score Jacobian Chaining)."""
    return ((x if variance_reduced else z) - (z - u * predicted)) / u


def image_loss(images: torch.Tensor, decoded: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """weight (images - decoded), on the rendered pictures [B, 3, h, w]; weight = w a / s (HiFA, Zhu et al. 2023)."""
    return weight * (images - decoded)


def reconstruction_target(x0: torch.Tensor, x0_text: torch.Tensor, rescale: float, views: int) -> torch.Tensor:
    """rescale x0 std(x0_text) / std(x0) + (1 - rescale) x0, std over an asset's views, channels and pixels (MVDream, section 3.3)."""
    spread, spread_text = (a.reshape(a.shape[0] // views, -1).std(1) + 1e-8 for a in (x0, x0_text))
    ratio = (spread_text / spread).repeat_interleave(views).view(-1, 1, 1, 1)
    return rescale * (x0 * ratio) + (1 - rescale) * x0


def reconstruction(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """x - target, of 0.5 |x - target|^2: the form that MVDream and all built on it use; no weight, no clamp."""
    return x - target


def reward_weighted(residuals: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """sum_k weight_k residual_k, [K, B, C, H, W] and [K, B] -> [B, C, H, W] (RewardSDS, equation 5; DreamDPO with weights 1, -1)."""
    return torch.stack([w.view(-1, 1, 1, 1) * r for r, w in zip(residuals, weights, strict=True)]).sum(0)


def dreamdpo(
    predicted: torch.Tensor, noise: torch.Tensor, weights: torch.Tensor, weight: torch.Tensor, *, subtract_noise: bool = True
) -> torch.Tensor:
    """w [(p - e)_win - (p - e)_lose] where the gap is large enough, else w (p - e)_win (DreamDPO, Zhou et al. 2025, equations 8 and 9).

    Args: predicted: [2, B, C, H, W], the loser's at its own guidance scale; weights: [2, B], 1 of the winner and -1 or 0 of the loser;
        subtract_noise: False leaves e out where only the winner counts, as the released code does.
    Two-sided, with one guidance scale for both, it is w (a / s) (x0_lose - x0_win): nothing anchors the picture then.
    """
    if not subtract_noise:
        noise = noise * (weights != 0).all(0).view(1, -1, 1, 1, 1)
    return weight * reward_weighted(predicted - noise, weights)


def psd(
    anchors: torch.Tensor, win: torch.Tensor, lose: torch.Tensor, noise_win: torch.Tensor, noise_lose: torch.Tensor, *,
    strength: torch.Tensor, weight: torch.Tensor,
) -> torch.Tensor:
    """mean_k anchor_k + strength w [(q - e)_win - (q - e)_lose], PSD reconstructed (2603.01594; our derivation).

    Args: anchors: [K, B, ...] score distillation of each noise, weighted; win, lose: q, of the same predictor that was ranked;
        strength: [B], eta times what the gap says.
    """
    push = weight * ((win - noise_win) - (lose - noise_lose))
    return anchors.mean(0) + strength.view(-1, 1, 1, 1) * push
