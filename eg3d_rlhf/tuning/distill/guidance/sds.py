"""Implements score distillation sampling, the basis of all other methods, and best of n: the same from
several starts, of which the asset with the highest reward is kept.

Best of n uses no preference in its gradient. It is a baseline with n times the work. Letters: A assets, S
starts of each, V views.
"""

import torch

from eg3d_rlhf.core.interfaces import GuidanceOutput
from eg3d_rlhf.tuning.distill import gradients
from eg3d_rlhf.tuning.distill.guidance.denoiser import Guided, Rewarded, reward_prompts


class Sds(Guided):
    """Mean over noises of w(t) (p - e), or of the residual of another form."""

    @torch.no_grad()
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
        noise, x_t, _, prediction = d.noise_and_predict(s.samples, x, t, prompts, cameras, step)
        residuals = d.residuals(x, noise, t, x_t, prediction)
        # K noises: [K, B, C, H, W] becomes [B, C, H, W].
        grad = residuals.mean(0)
        output = GuidanceOutput(grad=grad, terms={"sds_norm": d.compare(residuals, grad)["sds_norm"]})
        if s.image_loss:
            assert images is not None, "image_loss needs the rendered images"
            # HiFA's weight is w a / s, because s / a converts a residual of the noise to one of the image.
            bar = d.schedule.alpha(t, images)
            weight = (
                s.image_loss * d.schedule.weight(t, s.prior.weighting, images) * bar.sqrt() / (1 - bar).sqrt()
            )
            # The gradient is the mean over one estimate per noise.
            decoded = [d.prior.decode(x0) for x0 in d.x0(x_t, prediction.guided(s.prior.guidance_scale), t)]
            output.image_grad = torch.stack(
                [gradients.image_loss(images, estimate, weight) for estimate in decoded]
            ).mean(0)
        return output


class BestOfN(Rewarded, Sds):
    """Distillation of S x A assets; those of start s have the indices s A to (s + 1) A - 1."""

    @torch.no_grad()
    def best(self, images: torch.Tensor, prompts: list[str], cameras: torch.Tensor) -> list[int]:
        """Return the indices of the A assets to keep: of each, the start with the largest mean reward over
        its views, and of equal ones the first.

        Args:
            images: [S A V, 3, h, w] in 0..1, of the finished assets.
            prompts: one per image.
            cameras: [S A V, 16].
        """
        d = self.denoiser
        # [S A]
        scores = d.per_asset(
            d.score(self.reward, images[None], reward_prompts(self.reward, prompts, cameras))
        )[0]
        starts = self.settings.starts
        assets = len(scores) // starts
        chosen = scores.unflatten(0, (starts, assets)).argmax(0).cpu()  # [A]
        return (chosen * assets + torch.arange(assets)).tolist()
