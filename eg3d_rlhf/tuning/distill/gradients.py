"""The gradients of score distillation on a picture, as pure functions: unreduced, without logging, no draws;
then the weights of several noises, the loss of a gradient, and how two gradients of different size are
brought together.

Letters: K noises, A assets, V views of an asset, B = A V pictures, Q negatives. e a noise, p a prediction of
it, w weights [B, 1, 1, 1]. The identity behind all of them: p - e = (a / s) (x - x0), so a step moves x
towards the one-step denoised x0.
"""

import torch

from eg3d_rlhf.core.interfaces import GuidanceOutput


def guided(text: torch.Tensor, null: torch.Tensor, scale: float) -> torch.Tensor:
    """Classifier-free guidance p(null) + scale (p(text) - p(null)); scale 1 is p(text) alone. Ho and Salimans
    (2022).

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
    push = [
        w.view(-1, 1, 1, 1) * perpendicular(n - null, p)
        for n, w in zip(negatives, weights.unbind(1), strict=True)
    ]
    return null + scale * (p + torch.stack(push).sum(0))


def sds(predicted: torch.Tensor, noise: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """w (p - e), DreamFusion (Poole et al. 2022, equation 3)."""
    return weight * (predicted - noise)


def sjc(
    x: torch.Tensor,
    z: torch.Tensor,
    predicted: torch.Tensor,
    u: torch.Tensor,
    *,
    variance_reduced: bool = True,
) -> torch.Tensor:
    """(x - D) / u, or (z - D) / u, with z = x + u e, u = s / a and D = z - u p (Wang et al. 2023, Score
    Jacobian Chaining).
    """
    return ((x if variance_reduced else z) - (z - u * predicted)) / u


def image_loss(images: torch.Tensor, decoded: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """weight (images - decoded), on the rendered pictures [B, 3, h, w]; weight = w a / s (HiFA, Zhu et al.
    2023).
    """
    return weight * (images - decoded)


def reconstruction_target(
    x0: torch.Tensor, x0_text: torch.Tensor, rescale: float, views: int
) -> torch.Tensor:
    """rescale x0 std(x0_text) / std(x0) + (1 - rescale) x0, std over an asset's views, channels and pixels
    (MVDream, section 3.3).
    """
    spread, spread_text = (a.reshape(a.shape[0] // views, -1).std(1) + 1e-8 for a in (x0, x0_text))
    ratio = (spread_text / spread).repeat_interleave(views).view(-1, 1, 1, 1)
    return rescale * (x0 * ratio) + (1 - rescale) * x0


def reconstruction(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """x - target, of 0.5 |x - target|^2: the form that MVDream and all built on it use;
    no weight, no clamp.
    """
    return x - target


def reward_weighted(residuals: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """sum_k weight_k residual_k, [K, B, C, H, W] and [K, B] -> [B, C, H, W] (RewardSDS, equation 5; DreamDPO
    with weights 1, -1).
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
    """w [(p - e)_win - (p - e)_lose] where the gap is large enough, else w (p - e)_win (DreamDPO, Zhou et al.
    2025, equations 8 and 9).

    Args: predicted: [2, B, C, H, W], the loser's at its own guidance scale; weights: [2, B], 1 of the winner
        and -1 or 0 of the loser; subtract_noise: False leaves e out where only the winner counts, as the
        released code does.
    Two-sided, with one guidance scale for both, it is w (a / s) (x0_lose - x0_win): nothing anchors the
    picture then.
    """
    if not subtract_noise:
        noise = noise * (weights != 0).all(0).view(1, -1, 1, 1, 1)
    return weight * reward_weighted(predicted - noise, weights)


def psd(
    anchors: torch.Tensor,
    win: torch.Tensor,
    lose: torch.Tensor,
    noise_win: torch.Tensor,
    noise_lose: torch.Tensor,
    *,
    strength: torch.Tensor,
    weight: torch.Tensor,
) -> torch.Tensor:
    """mean_k anchor_k + strength w [(q - e)_win - (q - e)_lose], PSD reconstructed (2603.01594; our
    derivation).

    Args: anchors: [K, B, ...] score distillation of each noise, weighted; win, lose: q, of the same predictor
        that was ranked; strength: [B], eta times what the gap says.
    """
    push = weight * ((win - noise_win) - (lose - noise_lose))
    return anchors.mean(0) + strength.view(-1, 1, 1, 1) * push


# From a gradient on pictures to a loss, and how two gradients of different size are brought together.


def target_loss(x: torch.Tensor, grad: torch.Tensor, *, clamp: float | None = None) -> torch.Tensor:
    """0.5 sum (x - stopgrad(x - grad))^2 / B, [], whose derivative by x is grad / B.

    NaN and infinity of grad become numbers first (0 and the largest), then it is clamped to -clamp..clamp.
    Args: x, grad: [B, ...]. Differentiable in: x.
    """
    grad = torch.nan_to_num(grad.detach())
    if clamp is not None:
        grad = grad.clamp(-clamp, clamp)
    target = (x - grad).detach()
    return 0.5 * (x - target).square().sum() / len(x)


def distillation_loss(
    x: torch.Tensor, output: GuidanceOutput, *, images: torch.Tensor | None = None, clamp: float | None = None
) -> torch.Tensor:
    """The loss of one step, []: `output.grad` on the latents x [B, C, H, W], and `output.image_grad` on the
    pictures where there is one.
    """
    loss = target_loss(x, output.grad, clamp=clamp)
    if output.image_grad is None:
        return loss
    assert images is not None, "a gradient on pictures needs the rendered ones, with their graph"
    return loss + target_loss(images, output.image_grad)


def norm_per_asset(grad: torch.Tensor, views: int) -> torch.Tensor:
    return grad.reshape(grad.shape[0] // views, -1).norm(dim=1)


class Window:
    """Numbers of the last steps, newest last: all of the state that most methods have."""

    def __init__(self, window: int, rows: torch.Tensor, name: str):
        self.window = window
        self.rows = rows
        self.name = name

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {self.name: self.rows}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.rows = state[self.name].clone()


class Balance(Window):
    """Scales a second gradient to a fraction of the first one's norm, each a mean of the last steps. One
    number per asset, or one alone.
    """

    def __init__(self, window: int = 50):
        super().__init__(window, torch.zeros(2, 0, 0), "norms")  # [2, steps, A]

    def __call__(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """mean |first| / mean |second| over the last steps, [A], from this step's norms [A]; 0 where the
        second has been 0 throughout.
        """
        now = torch.stack([first, second]).detach().cpu()[:, None]  # [2, 1, A]
        past = self.rows if self.rows.shape[2] == now.shape[2] else self.rows.new_zeros(2, 0, now.shape[2])
        self.rows = torch.cat([past, now.nan_to_num()], 1)[:, -self.window :]
        mean_first, mean_second = self.rows.mean(1)
        ratio = torch.where(mean_second > 0, mean_first / mean_second.clamp_min(1e-30), 0.0)
        return ratio.to(first.device)


class History(Window):
    """Scores of the last steps: their spread, quantiles and range."""

    def __init__(self, window: int = 200):
        super().__init__(window, torch.zeros(0, 0), "rows")  # [steps, numbers of a step]

    def add(self, numbers: torch.Tensor) -> None:
        """Append one step's numbers, any shape; not-finite ones count as 0. Another number of them than
        before starts afresh.
        """
        row = numbers.detach().flatten()[None].nan_to_num().cpu()
        past = self.rows if self.rows.shape[1] == row.shape[1] else self.rows.new_zeros(0, row.shape[1])
        self.rows = torch.cat([past, row])[-self.window :]

    def standardised(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores in deviations of the last steps', these among them."""
        self.add(scores)
        return (scores - float(self.rows.mean())) / self.deviation()

    def deviation(self) -> float:
        """Standard deviation; 1 where there is none."""
        spread = float(self.rows.std()) if self.rows.numel() > 1 else 0.0
        return spread if spread > 0 else 1.0

    def quantile(self, share: float) -> float:
        """The number below which a share of them lies."""
        return float(self.rows.flatten().sort().values[int(share * (self.rows.numel() - 1))])


def digits(loss: float) -> int:
    """Characters before the point of the printed number, as DreamReward's released code counts: 5 of 1e-05, 1
    of 9.5e-05.
    """
    return len(str(loss).split(".")[0])
