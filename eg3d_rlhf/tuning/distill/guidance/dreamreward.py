"""DreamReward (Ye et al. 2024, arXiv 2403.14613): the gradient of a reward on the one-step estimate, beside
distillation.

Letters: A assets, V views, B = A V pictures.
"""

from typing import Any

import torch
import torch.nn.functional as F

from eg3d_rlhf.core.interfaces import GuidanceOutput
from eg3d_rlhf.tuning.distill.gradients import Balance, digits, norm_per_asset
from eg3d_rlhf.tuning.distill.guidance.denoiser import Rewarded, told

ALONE = 1e6  # weight of the reward in the released code's last steps


class DreamReward(Rewarded):
    """Distillation, and minus the gradient of the mean reward of an asset."""

    def __init__(self, *args: Any, **more: Any):
        super().__init__(*args, **more)
        if not self.reward.differentiable:
            raise ValueError(
                "--reward: expected a differentiable one with dreamreward, got one without. Use dreamdpo or"
                " rewardsds."
            )
        self.balance = Balance()
        self.kept = {"norms": self.balance}
        if isinstance(self.reward, torch.nn.Module):
            self.reward.eval()  # dropout would make its gradients noisy

    def __call__(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        prompts: list[str],
        cameras: torch.Tensor | None,
        step: int,
        images: torch.Tensor | None = None,
    ) -> GuidanceOutput:
        d = self.denoiser
        s = self.settings
        assert s.through == "latents" or images is not None, "the rendered pictures"
        x = x.detach()
        with torch.no_grad():
            noise, x_t, _, prediction = d.ask(1, x, t, prompts, cameras, step)
            residuals = d.residuals(x, noise, t, x_t, prediction)
            grad = residuals.mean(0)
            # the rescaled estimate that the reconstruction form moves to, or the plain one
            x0 = (
                x - grad
                if s.prior.form == "recon"
                else d.x0(x_t, prediction.guided(s.prior.guidance_scale), t)[0]
            )
        terms = {"sds_norm": norm_per_asset(grad, d.views)}
        weight = s.weight(step)
        alone = s.reward_only_from is not None and step >= s.reward_only_from
        if step < s.reward_from or (weight == 0 and not alone):
            return GuidanceOutput(grad=grad, terms=terms)
        scores, loss, pixels = self._reward(x, x0, t, told(self.reward, prompts, cameras), images, alone)
        added = pixels if s.through == "images" else self._pull(x, pixels)
        scale = self._scale(grad, added, float(loss), alone) * (
            1.0 if alone and s.balance == "digits" else weight
        )
        added = scale.repeat_interleave(d.views).view(-1, 1, 1, 1) * added
        distilled = torch.zeros_like(grad) if alone else grad
        terms["preference_norm"] = norm_per_asset(added, d.views)
        if s.through == "images":
            return GuidanceOutput(grad=distilled, image_grad=added, terms=terms, scores=scores[None])
        terms |= d.compare(residuals, grad + added)
        return GuidanceOutput(grad=distilled + added, terms=terms, scores=scores[None])

    def _reward(
        self,
        x: torch.Tensor,
        x0: torch.Tensor,
        t: torch.Tensor,
        prompts: list[str],
        images: torch.Tensor | None,
        alone: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Scores [A], the mean over assets of their losses, and the gradient of each asset's loss on the
        scored pictures [B, 3, h, w].
        """
        d = self.denoiser
        s = self.settings
        with torch.no_grad():
            rendered = d.prior.decode(x) if images is None else images
            estimated = (t <= s.x0_until).view(-1, 1, 1, 1).to(x.device) & (not alone)
            seen = torch.where(estimated, d.prior.decode(x0), rendered) if estimated.any() else rendered
        seen = seen.detach().requires_grad_()
        with torch.enable_grad():
            scores = d.per_asset(d.score(self.reward, seen[None], prompts))[0]
            losses = -scores if s.ceiling is None else F.relu(s.ceiling - scores)
            pixels = torch.autograd.grad(losses.sum(), seen)[0]
        return scores.detach(), losses.detach().mean(), pixels

    def _pull(self, x: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        """The gradient on latents of one on pictures: that of the decoder at the render."""
        with torch.enable_grad():
            latents = x.detach().requires_grad_()
            return torch.autograd.grad(self.denoiser.prior.decode(latents), latents, pixels)[0]

    def _scale(self, grad: torch.Tensor, added: torch.Tensor, loss: float, alone: bool) -> torch.Tensor:
        """Factor of each asset's reward gradient, [A]; the loss of pictures is a mean over B, that of assets
        over A: hence V.
        """
        d = self.denoiser
        s = self.settings
        ones = grad.new_ones(len(grad) // d.views)
        if s.balance == "grad-norm":
            return self.balance(norm_per_asset(grad, d.views), norm_per_asset(added, d.views))
        if s.balance == "none":
            return d.views * ones
        if alone:
            return ALONE * d.views * ones
        distilled = float(0.5 * grad.square().sum() / len(grad))
        return 10.0 ** (digits(distilled) - digits(loss)) * d.views * ones
