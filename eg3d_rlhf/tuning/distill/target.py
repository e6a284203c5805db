"""From a gradient on pictures to a loss, and how two gradients of different size are brought together.

Letters: A assets, V views, B = A V pictures.
"""

import torch

from eg3d_rlhf.core.interfaces import GuidanceOutput


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
    """The loss of one step, []: `output.grad` on the latents x [B, C, H, W], and `output.image_grad` on the pictures where there is one.

    Raises: ValueError where a gradient on pictures came and no pictures are given.
    """
    loss = target_loss(x, output.grad, clamp=clamp)
    if output.image_grad is None:
        return loss
    if images is None:
        raise ValueError("distillation_loss: expected images beside a gradient on images, got None. Give the rendered pictures with graph.")
    return loss + target_loss(images, output.image_grad)


def norm_per_asset(grad: torch.Tensor, views: int) -> torch.Tensor:
    """Norm of a gradient [B, ...] over all views of an asset, [A]."""
    return grad.reshape(grad.shape[0] // views, -1).norm(dim=1)


class Balance:
    """Scales a second gradient to a fraction of the first one's norm, each a mean of the last steps. One number per asset, or one alone."""

    def __init__(self, window: int = 50):
        self.window = window
        self.norms = torch.zeros(2, 0, 0)  # [2, steps, A], newest last

    def __call__(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """mean |first| / mean |second| over the last steps, [A], from this step's norms [A]; 0 where the second has been 0 throughout."""
        now = torch.stack([first, second]).detach().cpu()[:, None]  # [2, 1, A]
        past = self.norms if self.norms.shape[2] == now.shape[2] else self.norms.new_zeros(2, 0, now.shape[2])
        self.norms = torch.cat([past, now.nan_to_num()], 1)[:, -self.window :]
        mean_first, mean_second = self.norms.mean(1)
        ratio = torch.where(mean_second > 0, mean_first / mean_second.clamp_min(1e-30), 0.0)
        return ratio.to(first.device)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What a resumed run needs."""
        return {"norms": self.norms}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from `state_dict`."""
        self.norms = state["norms"].clone()


class History:
    """Scores of the last steps: their spread, quantiles and range."""

    def __init__(self, window: int = 200):
        self.window = window
        self.rows = torch.zeros(0, 0)  # [steps, numbers of a step], newest last

    def add(self, numbers: torch.Tensor) -> None:
        """Append one step's numbers, any shape; not-finite ones count as 0. Another number of them than before starts afresh."""
        row = numbers.detach().flatten()[None].nan_to_num().cpu()
        past = self.rows if self.rows.shape[1] == row.shape[1] else self.rows.new_zeros(0, row.shape[1])
        self.rows = torch.cat([past, row])[-self.window :]

    def deviation(self) -> float:
        """Standard deviation; 1 where there is none."""
        spread = float(self.rows.std()) if self.rows.numel() > 1 else 0.0
        return spread if spread > 0 else 1.0

    def mean(self) -> float:
        """Mean."""
        return float(self.rows.mean())

    def quantile(self, share: float) -> float:
        """The number below which a share of them lies."""
        return float(self.rows.flatten().sort().values[int(share * (self.rows.numel() - 1))])

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What a resumed run needs."""
        return {"rows": self.rows}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from `state_dict`."""
        self.rows = state["rows"].clone()


def digits(loss: float) -> int:
    """Characters before the point of the printed number, as DreamReward's released code counts: 5 of 1e-05, 1 of 9.5e-05."""
    return len(str(loss).split(".")[0])
