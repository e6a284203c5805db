"""Implements DreamReward (Ye et al. 2024, arXiv 2403.14613): the gradient of a reward of the one-step
estimate is added to distillation.

Letters: A assets, V views, B = A V images.
"""

from typing import Any

import torch
import torch.nn.functional as F

from eg3d_rlhf.core.interfaces import GuidanceOutput
from eg3d_rlhf.tuning.distill.gradients import Balance, digits, norm_per_asset
from eg3d_rlhf.tuning.distill.guidance.denoiser import Rewarded, reward_prompts

REWARD_ONLY_WEIGHT = 1e6  # weight of the reward in the released code's last steps


class DreamReward(Rewarded):
    """Distillation minus the gradient of the mean reward of each asset."""

    def __init__(self, *args: Any, **more: Any):
        super().__init__(*args, **more)
        if not self.reward.differentiable:
            raise ValueError(
                "--reward: dreamreward needs a differentiable reward, got one that is not. Use"
                " --method=dreamdpo or --method=rewardsds."
            )
        self.balance = Balance()
        self.windows = {"norms": self.balance}
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
        """Compute the gradient of one step, see `Guidance`."""
        d = self.denoiser
        s = self.settings
        assert s.through == "latents" or images is not None, "through='images' needs the rendered images"
        # The gradient is returned, not propagated: the loop applies it to the graph of x.
        x = x.detach()
        with torch.no_grad():
            noise, x_t, _, prediction = d.noise_and_predict(1, x, t, prompts, cameras, step)
            residuals = d.residuals(x, noise, t, x_t, prediction)
            grad = residuals.mean(0)
            # The reconstruction form moves x to x - grad, the rescaled estimate; other forms use the plain
            # one.
            x0 = (
                x - grad
                if s.prior.form == "recon"
                else d.x0(x_t, prediction.guided(s.prior.guidance_scale), t)[0]
            )
        terms = {"sds_norm": norm_per_asset(grad, d.views)}
        weight = s.weight(step)
        reward_only = s.reward_only_from is not None and step >= s.reward_only_from
        # Without a reward in this step, scoring is skipped.
        if step < s.reward_from or (weight == 0 and not reward_only):
            return GuidanceOutput(grad=grad, terms=terms)
        scores, loss, pixel_grad = self._reward(
            x, x0, t, reward_prompts(self.reward, prompts, cameras), images, reward_only
        )
        added = pixel_grad if s.through == "images" else self._to_latents(x, pixel_grad)
        scale = self._scale(grad, added, float(loss), reward_only) * (
            1.0 if reward_only and s.balance == "digits" else weight
        )
        # [A] to [B, 1, 1, 1]
        added = scale.repeat_interleave(d.views).view(-1, 1, 1, 1) * added
        # In its last steps the released code uses the reward only.
        distilled = torch.zeros_like(grad) if reward_only else grad
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
        reward_only: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Compute scores [A], the mean over assets of their losses, and the gradient of each asset's loss on
        the scored images [B, 3, h, w].
        """
        d = self.denoiser
        s = self.settings
        with torch.no_grad():
            # Decoding x is the fallback if the render itself is not given.
            rendered = d.prior.decode(x) if images is None else images
            # At large times the one-step estimate is blurred, so the render is scored instead.
            estimated = (t <= s.x0_until).view(-1, 1, 1, 1).to(x.device) & (not reward_only)
            scored = torch.where(estimated, d.prior.decode(x0), rendered) if estimated.any() else rendered
        # A leaf: the gradient is needed on the images, not on the prior.
        scored = scored.detach().requires_grad_()
        with torch.enable_grad():
            scores = d.per_asset(d.score(self.reward, scored[None], prompts))[0]
            # Above the ceiling a score has no gradient: more reward is not rewarded.
            losses = -scores if s.ceiling is None else F.relu(s.ceiling - scores)
            # A sum, so that each asset's gradient is that of its own loss.
            pixel_grad = torch.autograd.grad(losses.sum(), scored)[0]
        return scores.detach(), losses.detach().mean(), pixel_grad

    def _to_latents(self, x: torch.Tensor, pixel_grad: torch.Tensor) -> torch.Tensor:
        """Transform a gradient on images to one on latents, by the decoder's Jacobian at the render."""
        with torch.enable_grad():
            latents = x.detach().requires_grad_()
            return torch.autograd.grad(self.denoiser.prior.decode(latents), latents, pixel_grad)[0]

    def _scale(self, grad: torch.Tensor, added: torch.Tensor, loss: float, reward_only: bool) -> torch.Tensor:
        """Return the factor of each asset's reward gradient, [A]. The loss of images is a mean over B and
        that of assets a mean over A, so the factor contains V.
        """
        d = self.denoiser
        s = self.settings
        # [A]
        ones = grad.new_ones(len(grad) // d.views)
        if s.balance == "grad-norm":
            return self.balance(norm_per_asset(grad, d.views), norm_per_asset(added, d.views))
        if s.balance == "none":
            return d.views * ones
        if reward_only:
            return REWARD_ONLY_WEIGHT * d.views * ones
        # The released code compares the printed numbers of digits of both losses.
        distilled = float(0.5 * grad.square().sum() / len(grad))
        return 10.0 ** (digits(distilled) - digits(loss)) * d.views * ones
