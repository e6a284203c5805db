"""Computes the gradients of score distillation as pure functions: unreduced, without logging and random
numbers. Also the weights of several noises, the loss of a gradient, and the balance of two gradients of
different size.

Letters: K noises, A assets, V views of an asset, B = A V images, Q negatives. e is a noise, p a prediction of
it, w are weights [B, 1, 1, 1]. All methods use the identity p - e = (a / s) (x - x0): a step moves x towards
the image x0 that the prior estimates in one step.
"""

import torch

from eg3d_rlhf.core.interfaces import GuidanceOutput


def guided(text: torch.Tensor, null: torch.Tensor, scale: float) -> torch.Tensor:
    """Apply classifier-free guidance (Ho and Salimans 2022): p(null) + scale (p(text) - p(null)). Scale 1
    gives p(text).

    Deviates: threestudio's guidance of Stable Diffusion is p(text) + scale (p(text) - p(null)), so its scale
    100 is 101 here.
    """
    # Written from the null prediction: this is the only form in which scale 1 gives exactly p(text).
    return null + scale * (text - null)


def perpendicular(q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Return the component of q [B, ...] that is perpendicular to p [B, ...]."""
    # Inner products per image, [B]: a projection over the entire batch would mix assets.
    inner, square = ((a * p).flatten(1).sum(1) for a in (q, p))
    # clamp_min: p is 0 where the prompt has no effect, and q remains unchanged there.
    return q - (inner / square.clamp_min(1e-6)).view(-1, *[1] * (p.ndim - 1)) * p


def perp_neg(
    text: torch.Tensor, null: torch.Tensor, negatives: torch.Tensor, weights: torch.Tensor, scale: float
) -> torch.Tensor:
    """Apply guidance away from other views of the prompt, as far as these differ from it (Perp-Neg,
    Armandpour et al. 2023).

    p = text - null, q_i = negative_i - null; result: null + scale (p + sum_i weight_i perpendicular(q_i, p)).

    Args:
        text: prediction with the prompt [B, C, H, W].
        null: prediction with the null prompt [B, C, H, W].
        negatives: predictions with other views [Q, B, C, H, W].
        weights: [B, Q], below 0.
        scale: of the guidance.
    """
    p = text - null
    push = [
        w.view(-1, 1, 1, 1) * perpendicular(n - null, p)
        for n, w in zip(negatives, weights.unbind(1), strict=True)
    ]
    return null + scale * (p + torch.stack(push).sum(0))


def sds(predicted: torch.Tensor, noise: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Compute w (p - e), the gradient of DreamFusion (Poole et al. 2022, equation 3)."""
    # The Jacobian of the U-Net is omitted, as in DreamFusion: it is expensive, and poorly conditioned at
    # small noise levels.
    return weight * (predicted - noise)


def sjc(
    x: torch.Tensor,
    z: torch.Tensor,
    predicted: torch.Tensor,
    u: torch.Tensor,
    *,
    variance_reduced: bool = True,
) -> torch.Tensor:
    """Compute (x - D) / u if `variance_reduced`, else (z - D) / u, with z = x + u e, u = s / a and D = z - u
    p (Score Jacobian Chaining, Wang et al. 2023).
    """
    return ((x if variance_reduced else z) - (z - u * predicted)) / u


def image_loss(images: torch.Tensor, decoded: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Compute weight (images - decoded) on the rendered images [B, 3, h, w], with weight = w a / s (HiFA, Zhu
    et al. 2023).
    """
    return weight * (images - decoded)


def reconstruction_target(
    x0: torch.Tensor, x0_text: torch.Tensor, rescale: float, views: int
) -> torch.Tensor:
    """Compute rescale x0 std(x0_text) / std(x0) + (1 - rescale) x0, with standard deviations over an asset's
    views, channels and pixels (MVDream, section 3.3). Strong guidance increases the standard deviation of x0;
    rescaling corrects that.
    """
    # One standard deviation per asset, [A]; 1e-8 avoids a division by zero for constant images.
    std, std_text = (a.reshape(a.shape[0] // views, -1).std(1) + 1e-8 for a in (x0, x0_text))
    # Back from assets [A] to images [B, 1, 1, 1].
    ratio = (std_text / std).repeat_interleave(views).view(-1, 1, 1, 1)
    return rescale * (x0 * ratio) + (1 - rescale) * x0


def reconstruction(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Compute x - target, the gradient of 0.5 |x - target|^2, which MVDream and methods based on it use. It
    has no weight and no limit.
    """
    return x - target


def reward_weighted(residuals: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Compute sum_k weight_k residual_k, [K, B, C, H, W] and [K, B] -> [B, C, H, W] (RewardSDS, equation 5;
    DreamDPO with weights 1 and -1).
    """
    return torch.stack([w.view(-1, 1, 1, 1) * r for r, w in zip(residuals, weights, strict=True)]).sum(0)


def dreamdpo(
    predicted: torch.Tensor,
    noise: torch.Tensor,
    weights: torch.Tensor,
    weight: torch.Tensor,
    *,
    subtract_noise: bool = True,
) -> torch.Tensor:
    """Compute w [(p - e)_win - (p - e)_lose] if the gap is large enough, else w (p - e)_win (DreamDPO, Zhou
    et al. 2025, equations 8 and 9).

    If both are used with the same guidance scale, the result is w (a / s) (x0_lose - x0_win). Then no term
    keeps the image near the prior.

    Args:
        predicted: [2, B, C, H, W], that of the loser at its own guidance scale.
        noise: [2, B, C, H, W].
        weights: [2, B], 1 for the winner and -1 or 0 for the loser.
        weight: w, [B, 1, 1, 1].
        subtract_noise: False leaves out e where only the winner counts, as the released code does.
    """
    if not subtract_noise:
        # 1 where both noises have a weight, 0 where only the winner counts.
        noise = noise * (weights != 0).all(0).view(1, -1, 1, 1, 1)
    return weight * reward_weighted(predicted - noise, weights)


def psd(
    residuals: torch.Tensor,
    win: torch.Tensor,
    lose: torch.Tensor,
    noise_win: torch.Tensor,
    noise_lose: torch.Tensor,
    *,
    strength: torch.Tensor,
    weight: torch.Tensor,
) -> torch.Tensor:
    """Compute mean_k residual_k + strength w [(q - e)_win - (q - e)_lose] (PSD, arXiv 2603.01594,
    reconstructed; our derivation).

    Args:
        residuals: [K, B, ...], score distillation of each noise, weighted.
        win: q of the winner, from the predictor whose estimate was ranked.
        lose: q of the loser.
        noise_win: e of the winner.
        noise_lose: e of the loser.
        strength: [B], eta times a function of the gap.
        weight: w, [B, 1, 1, 1].
    """
    # The residuals are already weighted by w, the push is not.
    push = weight * ((win - noise_win) - (lose - noise_lose))
    return residuals.mean(0) + strength.view(-1, 1, 1, 1) * push


# --- from a gradient on images to a loss, and the balance of two gradients of different size


def target_loss(x: torch.Tensor, grad: torch.Tensor, *, clamp: float | None = None) -> torch.Tensor:
    """Compute the loss 0.5 sum (x - stopgrad(x - grad))^2 / B, [], whose derivative by x is grad / B.

    NaN and infinity in `grad` are replaced first (by 0 and the largest number), then it is limited to
    -clamp..clamp.

    Args:
        x: [B, ...].
        grad: [B, ...].
        clamp: None: no limit.

    Differentiable in: x.
    """
    # Without gradient: the loss is only a way to pass `grad` to the parameters through x.
    grad = torch.nan_to_num(grad.detach())
    if clamp is not None:
        grad = grad.clamp(-clamp, clamp)
    # x - target is `grad`, so the derivative of the loss needs no Jacobian of the prior.
    target = (x - grad).detach()
    return 0.5 * (x - target).square().sum() / len(x)


def distillation_loss(
    x: torch.Tensor, output: GuidanceOutput, *, images: torch.Tensor | None = None, clamp: float | None = None
) -> torch.Tensor:
    """Compute the loss of one step, []: `output.grad` on the latents x [B, C, H, W], and `output.image_grad`
    on the rendered images if there is one.
    """
    # Both losses share the graph of the render, so one backward pass serves both.
    loss = target_loss(x, output.grad, clamp=clamp)
    if output.image_grad is None:
        return loss
    assert images is not None, "a gradient on images needs the rendered ones, with their graph"
    return loss + target_loss(images, output.image_grad)


def norm_per_asset(grad: torch.Tensor, views: int) -> torch.Tensor:
    """Return the norm of each asset's gradient over its views, [B, ...] -> [A]."""
    # The views of an asset are adjacent: [B, ...] = [A V, ...] to [A, V ...].
    return grad.reshape(grad.shape[0] // views, -1).norm(dim=1)


class Window:
    """Numbers of the last steps, newest last. Most methods have no other state."""

    def __init__(self, window: int, rows: torch.Tensor, name: str):
        self.window = window  # largest number of steps
        self.rows = rows  # on the CPU, so that checkpoints do not depend on the device
        self.name = name  # key in checkpoints

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {self.name: self.rows}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        # A copy, because the tensors of a checkpoint may share their storage.
        self.rows = state[self.name].clone()


class Balance(Window):
    """Factor that scales a second gradient to the norm of the first one. Both norms are means over the last
    steps. There is one factor per asset, or a single one.
    """

    def __init__(self, window: int = 50):
        super().__init__(window, torch.zeros(2, 0, 0), "norms")  # [2, steps, A]

    def __call__(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Add the norms [A] of this step, and return mean |first| / mean |second| over the last steps, [A]; 0
        where all second norms were 0.
        """
        # Norms are averaged before the division: the mean of ratios would be dominated by steps with a tiny
        # norm.
        now = torch.stack([first, second]).detach().cpu()[:, None]  # [2, 1, A]
        # Another number of assets than before starts a new window.
        past = self.rows if self.rows.shape[2] == now.shape[2] else self.rows.new_zeros(2, 0, now.shape[2])
        # nan_to_num: one failed prediction must not spoil the next 50 steps.
        self.rows = torch.cat([past, now.nan_to_num()], 1)[:, -self.window :]
        mean_first, mean_second = self.rows.mean(1)
        # 0 instead of a huge factor where the second gradient has vanished.
        ratio = torch.where(mean_second > 0, mean_first / mean_second.clamp_min(1e-30), 0.0)
        return ratio.to(first.device)


class History(Window):
    """Scores of the last steps, with their standard deviation and quantiles."""

    def __init__(self, window: int = 200):
        super().__init__(window, torch.zeros(0, 0), "rows")  # [steps, numbers of a step]

    def add(self, numbers: torch.Tensor) -> None:
        """Append the numbers of one step, of any shape. Numbers that are not finite count as 0. Another count
        than before starts a new window.
        """
        # [1, numbers of a step]
        row = numbers.detach().flatten()[None].nan_to_num().cpu()
        past = self.rows if self.rows.shape[1] == row.shape[1] else self.rows.new_zeros(0, row.shape[1])
        self.rows = torch.cat([past, row])[-self.window :]

    def standardise(self, scores: torch.Tensor) -> torch.Tensor:
        """Divide scores, without their mean, by the standard deviation of the last steps, this step
        included.
        """
        # The scores of this step are included, so that the first step has a scale, too.
        self.add(scores)
        return (scores - float(self.rows.mean())) / self.std()

    def std(self) -> float:
        """Return the standard deviation of the scores, or 1 if it is 0 or there is one score only."""
        # Over all numbers of the window; std of a single number would be NaN.
        std = float(self.rows.std()) if self.rows.numel() > 1 else 0.0
        return std if std > 0 else 1.0

    def quantile(self, share: float) -> float:
        """Return the number below which a share of the numbers lies."""
        return float(self.rows.flatten().sort().values[int(share * (self.rows.numel() - 1))])


def digits(loss: float) -> int:
    """Count the characters before the point of the printed number, as DreamReward's released code does: 5 for
    1e-05, 1 for 9.5e-05.
    """
    # str(1e-05) contains no point, hence the 5 of the first example. The presets of the released
    # code depend on this.
    return len(str(loss).split(".")[0])
