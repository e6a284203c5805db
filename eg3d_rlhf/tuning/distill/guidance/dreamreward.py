"""Implements DreamReward (Ye et al. 2024, arXiv 2403.14613).

The gradient of score distillation is combined with the gradient of a reward. The reward scores the image that
the prior estimates in one step, or the rendered image.

Shapes: A = number of assets; V views of an asset; B = A V images; C, H, W channels, rows and columns of
latents; h, w rows and columns of images.
"""

from typing import Any

import torch
import torch.nn.functional as F

from eg3d_rlhf.core.interfaces import GuidanceOutput
from eg3d_rlhf.tuning.distill.gradients import Balance, digits, norm_per_asset
from eg3d_rlhf.tuning.distill.guidance.denoiser import Rewarded, reward_prompts

REWARD_ONLY_WEIGHT = (
    1e6  # weight of the reward in the last steps of the released code, which use the reward only
)


class DreamReward(Rewarded):
    """Score distillation minus the gradient of the mean reward of each asset.

    The arguments are those of `Rewarded`.

    Raises: ValueError if the reward is not differentiable.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if not self.reward.differentiable:
            raise ValueError(
                "--method=dreamreward needs a differentiable --reward, and this reward is not. Use another"
                " reward, or --method=dreamdpo or --method=rewardsds, which only rank images."
            )
        self.balance = Balance()
        self.windows = {"norms": self.balance}
        if isinstance(self.reward, torch.nn.Module):
            self.reward.eval()  # switches dropout off, which would make the gradients noisy

    def __call__(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        prompts: list[str],
        cameras: torch.Tensor | None,
        step: int,
        images: torch.Tensor | None = None,
    ) -> GuidanceOutput:
        """Compute the gradient of one step. The arguments are described at `Guidance`."""
        denoiser = self.denoiser
        settings = self.settings
        assert settings.through == "latents" or images is not None, (
            "through='images' needs the rendered images"
        )
        # This method only returns gradients; the loop propagates them through the graph of x.
        x = x.detach()
        with torch.no_grad():
            noise, x_t, _, prediction = denoiser.noise_and_predict(1, x, t, prompts, cameras, step)
            residuals = denoiser.residuals(x, noise, t, x_t, prediction)
            grad = residuals.mean(0)
            if settings.prior.form == "recon":
                # The gradient of this form is x - target, so x - grad is the rescaled estimate.
                x0 = x - grad
            else:
                x0 = denoiser.x0(x_t, prediction.guided(settings.prior.guidance_scale), t)[0]
        terms = {"sds_norm": norm_per_asset(grad, denoiser.views)}
        reward_weight = settings.weight(step)
        reward_only = settings.reward_only_from is not None and step >= settings.reward_only_from
        # The reward has no effect in this step, so it is not computed.
        if step < settings.reward_from or (reward_weight == 0 and not reward_only):
            return GuidanceOutput(grad=grad, terms=terms)
        reward_texts = reward_prompts(self.reward, prompts, cameras)
        scores, loss, pixel_grad = self._reward_gradient(x, x0, t, reward_texts, images, reward_only)
        reward_grad = pixel_grad if settings.through == "images" else self._to_latents(x, pixel_grad)
        asset_factors = self._scale(grad, reward_grad, float(loss), reward_only)  # [A]
        # In its last steps the released code uses a constant, REWARD_ONLY_WEIGHT, in place of the weight.
        asset_factors = asset_factors * (
            1.0 if reward_only and settings.balance == "digits" else reward_weight
        )
        # From assets [A] to images [B, 1, 1, 1].
        reward_grad = asset_factors.repeat_interleave(denoiser.views).view(-1, 1, 1, 1) * reward_grad
        distillation_grad = torch.zeros_like(grad) if reward_only else grad
        terms["preference_norm"] = norm_per_asset(reward_grad, denoiser.views)
        # scores[None]: the result expects scores [K, A], and there is one noise.
        if settings.through == "images":
            return GuidanceOutput(
                grad=distillation_grad, image_grad=reward_grad, terms=terms, scores=scores[None]
            )
        terms |= denoiser.compare(residuals, grad + reward_grad)
        return GuidanceOutput(grad=distillation_grad + reward_grad, terms=terms, scores=scores[None])

    def _reward_gradient(
        self,
        x: torch.Tensor,
        x0: torch.Tensor,
        t: torch.Tensor,
        prompts: list[str],
        images: torch.Tensor | None,
        reward_only: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Score images, and compute the gradient of the reward's loss.

        Args:
            x: [B, C, H, W], latents of the render.
            x0: [B, C, H, W], latents that the prior estimates.
            t: [B], times. Up to the time x0_until the estimate is scored, and the render at larger times.
            prompts: B prompts for the reward.
            images: [B, 3, h, w] in 0..1, rendered images; None to decode x in their place.
            reward_only: True if the step uses the reward only; the render is then scored at all times.
        Returns: three results. The first is the scores of the assets, [A]. The second is the loss, averaged
        over assets, a scalar. The third is the gradient of the sum of the losses with respect to the scored
        images, [B, 3, h, w].
        """
        denoiser = self.denoiser
        settings = self.settings
        with torch.no_grad():
            rendered_images = denoiser.prior.decode(x) if images is None else images
            # [B, 1, 1, 1]. At large times the estimate is blurred, so the render is scored in its place.
            uses_estimate = (t <= settings.x0_until).view(-1, 1, 1, 1).to(x.device) & (not reward_only)
            scored_images = rendered_images
            if uses_estimate.any():
                scored_images = torch.where(uses_estimate, denoiser.prior.decode(x0), rendered_images)
        # A leaf of a new graph, which contains the reward only, and neither the decoder nor the renderer.
        scored_images = scored_images.detach().requires_grad_()
        with torch.enable_grad():
            # [None] and [0] add and remove the dimension of noises, which `score` expects.
            scores = denoiser.per_asset(denoiser.score(self.reward, scored_images[None], prompts))[0]
            # relu: a score above the ceiling has no gradient.
            losses = -scores if settings.ceiling is None else F.relu(settings.ceiling - scores)
            # The sum and not the mean, so that the gradient of an asset does not depend on the number of
            # assets.
            pixel_grad = torch.autograd.grad(losses.sum(), scored_images)[0]
        return scores.detach(), losses.detach().mean(), pixel_grad

    def _to_latents(self, x: torch.Tensor, pixel_grad: torch.Tensor) -> torch.Tensor:
        """Convert a gradient with respect to images to one with respect to latents, [B, C, H, W].

        The conversion multiplies the gradient by the Jacobian of the decoder.

        Args:
            x: [B, C, H, W], latents of the render, at which the Jacobian is computed.
            pixel_grad: [B, 3, h, w], gradient with respect to the decoded images.
        """
        with torch.enable_grad():
            latents = x.detach().requires_grad_()
            return torch.autograd.grad(self.denoiser.prior.decode(latents), latents, pixel_grad)[0]

    def _scale(
        self, grad: torch.Tensor, reward_grad: torch.Tensor, loss: float, reward_only: bool
    ) -> torch.Tensor:
        """Return the factor of the reward's gradient for each asset, [A], before the weight is applied.

        The loop averages a gradient over B images, while the reward's loss is a mean over the assets. The
        factor therefore contains the number V of views.

        Args:
            grad: [B, C, H, W], gradient of score distillation.
            reward_grad: gradient of the reward, with respect to latents or images, [B, ...].
            loss: loss of the reward, averaged over assets.
            reward_only: True if the step uses the reward only.
        """
        denoiser = self.denoiser
        settings = self.settings
        ones = grad.new_ones(len(grad) // denoiser.views)  # [A]
        if settings.balance == "grad-norm":
            return self.balance(
                norm_per_asset(grad, denoiser.views), norm_per_asset(reward_grad, denoiser.views)
            )
        if settings.balance == "none":
            return denoiser.views * ones
        if reward_only:
            return REWARD_ONLY_WEIGHT * denoiser.views * ones
        # The released code compares the numbers of digits of the two printed losses.
        distillation_loss = float(0.5 * grad.square().sum() / len(grad))
        return 10.0 ** (digits(distillation_loss) - digits(loss)) * denoiser.views * ones
