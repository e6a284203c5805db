"""Computes the gradients of score distillation as pure functions of tensors.

The module also converts a gradient to a loss, balances two gradients of different size (`Balance`), and keeps
statistics of the last steps (`History`).

Shapes: K noises; A = number of assets; V views of an asset; B = A V images, with the views of an asset
adjacent; Q negative prompts; C, H, W channels, rows and columns of latents; h, w rows and columns of images.
Symbols: x clean latents of the render; e the added noise; p the prior's prediction of e; x_t = a x + s e the
noised latents with the levels a and s of the noise schedule (schedule.py); w the weight of the time, with the
shape [B, 1, 1, 1]. All methods use the identity p - e = (a / s) (x - x0), where x0 is the prior's one-step
estimate of x. A step along the negative gradient therefore moves x towards x0.
"""

import torch

from eg3d_rlhf.core.interfaces import GuidanceOutput


def guided(
    text_prediction: torch.Tensor, null_prediction: torch.Tensor, guidance_scale: float
) -> torch.Tensor:
    """Apply classifier-free guidance (Ho and Salimans 2022): p(null) + scale (p(text) - p(null)).

    Args:
        text_prediction: p(text), prediction for the prompt, of any shape.
        null_prediction: p(null), prediction for the null prompt, of the same shape.
        guidance_scale: guidance scale. Scale 1 gives p(text).

    Deviates: threestudio's guidance of Stable Diffusion is p(text) + scale (p(text) - p(null)), so its scale
    100 is 101 here.
    """
    return null_prediction + guidance_scale * (text_prediction - null_prediction)


def perpendicular(q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Return the component of q [B, ...] that is perpendicular to p [B, ...], for each image."""
    # Inner products per image, [B].
    q_dot_p, p_dot_p = ((tensor * p).flatten(1).sum(1) for tensor in (q, p))
    # clamp_min: if the prompt has no effect, p is 0; q then stays unchanged.
    return q - (q_dot_p / p_dot_p.clamp_min(1e-6)).view(-1, *[1] * (p.ndim - 1)) * p


def perp_neg(
    text_prediction: torch.Tensor,
    null_prediction: torch.Tensor,
    negative_predictions: torch.Tensor,
    negative_weights: torch.Tensor,
    guidance_scale: float,
) -> torch.Tensor:
    """Apply Perp-Neg guidance (Armandpour et al. 2023), which suppresses wrong viewing directions.

    With p = text - null and q_i = negative_i - null, the result, [B, C, H, W], is

        null + scale (p + sum_i weight_i perpendicular(q_i, p))

    Args:
        text_prediction: [B, C, H, W], prediction for the prompt.
        null_prediction: [B, C, H, W], prediction for the null prompt.
        negative_predictions: [Q, B, C, H, W], predictions for the prompt with other viewing directions.
        negative_weights: [B, Q], weights of the negative predictions, <= 0.
        guidance_scale: guidance scale.
    """
    p = text_prediction - null_prediction
    weighted_negatives = [
        weight.view(-1, 1, 1, 1) * perpendicular(negative - null_prediction, p)
        for negative, weight in zip(negative_predictions, negative_weights.unbind(1), strict=True)
    ]
    return null_prediction + guidance_scale * (p + torch.stack(weighted_negatives).sum(0))


def sds(predicted_noise: torch.Tensor, noise: torch.Tensor, time_weight: torch.Tensor) -> torch.Tensor:
    """Compute w (p - e), the gradient of score distillation sampling (Poole et al. 2022, equation 3).

    Args:
        predicted_noise: p, predicted noise, [B, C, H, W].
        noise: e, added noise, [B, C, H, W].
        time_weight: w, weight of the time, [B, 1, 1, 1].
    """
    # The Jacobian of the U-Net is omitted as in the paper, because it is expensive to compute and poorly
    # conditioned at small noise levels.
    return time_weight * (predicted_noise - noise)


def sjc(
    x: torch.Tensor,
    z: torch.Tensor,
    predicted_noise: torch.Tensor,
    u: torch.Tensor,
    *,
    variance_reduced: bool = True,
) -> torch.Tensor:
    """Compute the gradient of score Jacobian chaining (Wang et al. 2023): (x - D) / u or (z - D) / u.

    D = z - u p is the prior's estimate of x.

    Args:
        x: clean latents, [B, C, H, W].
        z: x + u e, latents noised without scaling, [B, C, H, W].
        predicted_noise: p, predicted noise, [B, C, H, W].
        u: s / a, noise level, [B, 1, 1, 1].
        variance_reduced: True for (x - D) / u, which does not contain the noise u e of z; False for (z - D) /
            u.
    """
    return ((x if variance_reduced else z) - (z - u * predicted_noise)) / u


def image_loss(
    images: torch.Tensor, decoded_images: torch.Tensor, image_weight: torch.Tensor
) -> torch.Tensor:
    """Compute the gradient of HiFA's loss on images (Zhu et al. 2023), weight (images - decoded images).

    Args:
        images: rendered images, [B, 3, h, w].
        decoded_images: images that the prior estimates, [B, 3, h, w].
        image_weight: w a / s, [B, 1, 1, 1].
    Returns: [B, 3, h, w].
    """
    return image_weight * (images - decoded_images)


def reconstruction_target(
    x0: torch.Tensor, x0_text: torch.Tensor, rescale: float, view_count: int
) -> torch.Tensor:
    """Compute rescale x0 std(x0_text) / std(x0) + (1 - rescale) x0 (MVDream, arXiv 2308.16512, section 3.3).

    Strong guidance increases the standard deviation of the estimate, and the rescaling reduces it again.

    Args:
        x0: estimate with guidance, [B, C, H, W].
        x0_text: estimate for the prompt without guidance, [B, C, H, W].
        rescale: strength of the rescaling, 0 to 1.
        view_count: number V of views of an asset. Standard deviations are over the views, channels and pixels
            of an asset.
    """
    # One standard deviation per asset, [A]; 1e-8 avoids a division by zero for constant latents.
    std, std_text = (
        estimate.reshape(estimate.shape[0] // view_count, -1).std(1) + 1e-8 for estimate in (x0, x0_text)
    )
    # From assets [A] to images [B, 1, 1, 1].
    ratio = (std_text / std).repeat_interleave(view_count).view(-1, 1, 1, 1)
    return rescale * (x0 * ratio) + (1 - rescale) * x0


def reconstruction(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Compute x - target, the gradient of 0.5 |x - target|^2, which MVDream uses for distillation.

    Unlike the other gradients of this module, it has no weight that depends on the diffusion time.

    Args:
        x: clean latents of the render, [B, C, H, W].
        target: result of `reconstruction_target`, [B, C, H, W].
    """
    return x - target


def reward_weighted(residuals: torch.Tensor, noise_weights: torch.Tensor) -> torch.Tensor:
    """Compute sum_k weight_k residual_k, [B, C, H, W] (RewardSDS, arXiv 2503.09601, equation 5).

    With two noises and the weights 1 and -1 it is the gradient of DreamDPO.

    Args:
        residuals: gradients of the K noises, [K, B, C, H, W].
        noise_weights: weights of the noises, [K, B].
    """
    weighted_residuals = [
        noise_weight.view(-1, 1, 1, 1) * residual
        for residual, noise_weight in zip(residuals, noise_weights, strict=True)
    ]
    return torch.stack(weighted_residuals).sum(0)


def dreamdpo(
    predicted_noises: torch.Tensor,
    noise: torch.Tensor,
    noise_weights: torch.Tensor,
    time_weight: torch.Tensor,
    *,
    subtract_noise: bool = True,
) -> torch.Tensor:
    """Compute DreamDPO's gradient, [B, C, H, W] (arXiv 2502.04370, equations 8 and 9).

    It is w [(p - e)_win - (p - e)_lose] for images whose scores differ enough, and w (p - e)_win for all
    others.

    If winner and loser have the same guidance scale, the first formula equals w (a / s) (x0_lose - x0_win),
    with the signal level a and the noise level s. It then contains no term that keeps the image near the
    prior.

    Args:
        predicted_noises: p of both noises, [2, B, C, H, W]. The prediction of the loser may have its own
            guidance scale.
        noise: e, both added noises, [2, B, C, H, W].
        noise_weights: [2, B]; 1 for the winner, and -1 or 0 for the loser.
        time_weight: w, weight of the time, [B, 1, 1, 1].
        subtract_noise: False to leave out e in the second formula, as the released code does.
    """
    if not subtract_noise:
        # The factor [1, B, 1, 1, 1] is 1 where both noises have a weight (first formula), else 0.
        noise = noise * (noise_weights != 0).all(0).view(1, -1, 1, 1, 1)
    return time_weight * reward_weighted(predicted_noises - noise, noise_weights)


def psd(
    residuals: torch.Tensor,
    win_prediction: torch.Tensor,
    lose_prediction: torch.Tensor,
    noise_win: torch.Tensor,
    noise_lose: torch.Tensor,
    *,
    strength: torch.Tensor,
    time_weight: torch.Tensor,
) -> torch.Tensor:
    """Compute the gradient of preference score distillation (PSD, arXiv 2603.01594), [B, C, H, W].

    The gradient is mean_k residual_k + strength w [(q - e)_win - (q - e)_lose], where q is the noise
    prediction whose image was ranked. This formula is our reconstruction, because the text of the paper was
    not available.

    Args:
        residuals: gradients of score distillation of the K noises, already multiplied by w, [K, B, C, H, W].
        win_prediction: q of the winner, [B, C, H, W].
        lose_prediction: q of the loser, [B, C, H, W].
        noise_win: e of the winner, [B, C, H, W].
        noise_lose: e of the loser, [B, C, H, W].
        strength: [B], the setting eta times a function of the gap between the scores.
        time_weight: w, weight of the time, [B, 1, 1, 1].
    """
    preference_term = time_weight * ((win_prediction - noise_win) - (lose_prediction - noise_lose))
    return residuals.mean(0) + strength.view(-1, 1, 1, 1) * preference_term


# --- conversion of a gradient to a loss, and balance of two gradients of different size


def target_loss(x: torch.Tensor, grad: torch.Tensor, *, clamp: float | None = None) -> torch.Tensor:
    """Compute a loss whose derivative with respect to x is grad / B: 0.5 sum (x - stopgrad(x - grad))^2 / B.

    The backward pass of this loss applies a gradient that was computed elsewhere to the parameters behind x.

    Args:
        x: [B, ...], tensor with the graph of the render.
        grad: [B, ...], gradient with respect to x. NaN is replaced by 0, and infinity by the largest finite
            number.
        clamp: largest absolute value of an entry of `grad`; None for no limit.
    Returns: scalar. Differentiable in x.
    """
    grad = torch.nan_to_num(grad.detach())
    if clamp is not None:
        grad = grad.clamp(-clamp, clamp)
    # detach: the target is a constant, so the derivative of the loss is (x - target) / B = grad / B.
    target = (x - grad).detach()
    return 0.5 * (x - target).square().sum() / len(x)


def distillation_loss(
    x: torch.Tensor,
    guidance_output: GuidanceOutput,
    *,
    images: torch.Tensor | None = None,
    clamp: float | None = None,
) -> torch.Tensor:
    """Compute the loss of one step, a scalar, from the gradients of a guidance.

    Args:
        x: [B, C, H, W], latents with the graph of the render, to which `guidance_output.grad` is applied.
        guidance_output: gradients of the guidance.
        images: [B, 3, h, w], rendered images with their graph. They are needed if
            `guidance_output.image_grad` is given.
        clamp: largest absolute value of an entry of `guidance_output.grad`; None for no limit.
    """
    loss = target_loss(x, guidance_output.grad, clamp=clamp)
    if guidance_output.image_grad is None:
        return loss
    assert images is not None, "a gradient on images needs the rendered ones, with their graph"
    return loss + target_loss(images, guidance_output.image_grad)


def norm_per_asset(grad: torch.Tensor, view_count: int) -> torch.Tensor:
    """Return the norm of each asset's gradient over all its views, [A].

    Args:
        grad: [B, ...], gradient of the images.
        view_count: number V of views of an asset.
    """
    # The views of an asset are adjacent: [B, ...] = [A V, ...] to [A, V ...].
    return grad.reshape(grad.shape[0] // view_count, -1).norm(dim=1)


class Window:
    """Tensor with numbers of the last steps of a run, which checkpoints store.

    Args:
        window: largest number of steps whose numbers are kept.
        rows: initial tensor of numbers, whose newest step is last.
        state_key: key of the tensor in the state dict.
    """

    def __init__(self, window: int, rows: torch.Tensor, state_key: str):
        self.window = window
        self.rows = rows  # on the CPU, so that checkpoints do not depend on the device
        self.name = state_key

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {self.name: self.rows}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        # A copy, because the tensors of a checkpoint may share their storage.
        self.rows = state[self.name].clone()


class Balance(Window):
    """Factor that scales the gradient of a reward to the norm of the distillation gradient, for each asset.

    Both norms are averaged over the last steps.

    Args:
        window: number of steps over which the norms are averaged.
    """

    def __init__(self, window: int = 50):
        # [2, steps, A]: norms of both gradients.
        super().__init__(window, torch.zeros(2, 0, 0), "norms")

    def __call__(self, distillation_grad_norm: torch.Tensor, reward_grad_norm: torch.Tensor) -> torch.Tensor:
        """Add the norms of this step, and return the factor of each asset.

        Args:
            distillation_grad_norm: [A], norms of the distillation gradient.
            reward_grad_norm: [A], norms of the gradient of the reward.
        Returns: [A], mean distillation norm divided by the mean reward norm. It is 0 for assets whose reward
        norms were all 0.
        """
        new_norms = (
            torch.stack([distillation_grad_norm, reward_grad_norm]).detach().cpu()[:, None]
        )  # [2, 1, A]
        # If the number of assets has changed, the old norms belong to other assets and are dropped.
        asset_count = new_norms.shape[2]
        old_norms = self.rows if self.rows.shape[2] == asset_count else self.rows.new_zeros(2, 0, asset_count)
        # nan_to_num: one failed prediction would otherwise make the means of the next 50 steps NaN.
        self.rows = torch.cat([old_norms, new_norms.nan_to_num()], 1)[:, -self.window :]
        # Norms are averaged before the division, since a mean of ratios would be dominated by steps with a
        # tiny norm.
        mean_distillation_norm, mean_reward_norm = self.rows.mean(1)
        # Without `where`, the factor would be huge if the gradient of the reward has vanished.
        ratio = torch.where(
            mean_reward_norm > 0, mean_distillation_norm / mean_reward_norm.clamp_min(1e-30), 0.0
        )
        return ratio.to(distillation_grad_norm.device)


class History(Window):
    """Scores of the last steps, with their standard deviation and quantiles.

    Args:
        window: largest number of steps whose scores are kept.
    """

    def __init__(self, window: int = 200):
        super().__init__(window, torch.zeros(0, 0), "rows")  # [steps, number of scores in a step]

    def add(self, scores: torch.Tensor) -> None:
        """Append the scores of one step, of any shape. NaN counts as 0.

        If the number of scores differs from that of the last step, all earlier scores are dropped.
        """
        new_score_row = scores.detach().flatten()[None].nan_to_num().cpu()  # [1, number of scores in a step]
        score_count = new_score_row.shape[1]
        old_score_rows = (
            self.rows if self.rows.shape[1] == score_count else self.rows.new_zeros(0, score_count)
        )
        self.rows = torch.cat([old_score_rows, new_score_row])[-self.window :]

    def standardise(self, scores: torch.Tensor) -> torch.Tensor:
        """Subtract the mean of the last steps from scores, and divide by their standard deviation.

        The scores [any shape] are added to the last steps first, so that a run's first step has a mean and a
        standard deviation, too.
        """
        self.add(scores)
        return (scores - float(self.rows.mean())) / self.std()

    def std(self) -> float:
        """Return the standard deviation of all scores of the last steps.

        The result is 1 if the standard deviation is 0, or if there are fewer than two scores.
        """
        # torch's std of a single number is NaN, hence the check of the number of scores.
        std = float(self.rows.std()) if self.rows.numel() > 1 else 0.0
        return std if std > 0 else 1.0

    def quantile(self, share: float) -> float:
        """Return the quantile of the scores of the last steps for a share in 0..1."""
        # The lower of the two neighbouring scores, without interpolation.
        return float(self.rows.flatten().sort().values[int(share * (self.rows.numel() - 1))])


def digits(loss: float) -> int:
    """Count the characters before the decimal point of str(loss), as DreamReward's released code does.

    Examples: 12.5 gives 2, 9.5e-05 gives 1, and 1e-05 gives 5, because its text contains no decimal point.
    The presets of the released code depend on this behaviour.
    """
    return len(str(loss).split(".")[0])
