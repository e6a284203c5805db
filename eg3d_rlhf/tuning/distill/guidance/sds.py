"""Implements score distillation sampling (SDS; Poole et al. 2022) and best-of-n.

All other methods are based on SDS. Best-of-n optimises several assets for each prompt by SDS, and keeps the
asset with the highest reward. Its gradient contains no reward. It is a baseline that takes n times the
computation of SDS.

Shapes: A = number of assets that are kept; S starts for each of them; V views of an asset; K noises; B
images; C, H, W channels, rows and columns of latents; h, w rows and columns of images.
"""

import torch

from eg3d_rlhf.core.interfaces import GuidanceOutput
from eg3d_rlhf.tuning.distill import gradients
from eg3d_rlhf.tuning.distill.guidance.denoiser import Guided, Rewarded, reward_prompts


class Sds(Guided):
    """Score distillation sampling: the mean over K noises of w(t) (p - e).

    Here w(t) is the weight of the diffusion time, p the predicted noise and e the added noise. The setting
    `form` selects other formulas, see gradients.py.
    """

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
        """Compute the gradient of one step. The arguments are described at `Guidance`."""
        denoiser = self.denoiser
        settings = self.settings
        noise, x_t, _, prediction = denoiser.noise_and_predict(settings.samples, x, t, prompts, cameras, step)
        residuals = denoiser.residuals(x, noise, t, x_t, prediction)  # [K, B, C, H, W]
        grad = residuals.mean(0)
        guidance_output = GuidanceOutput(
            grad=grad, terms={"sds_norm": denoiser.compare(residuals, grad)["sds_norm"]}
        )
        if settings.image_loss:
            assert images is not None, "image_loss needs the rendered images"
            # HiFA's weight is w a / s (Zhu et al. 2023): p - e = (a / s) (x - x0), so it gives a difference
            # of images the scale of w (p - e). `bar` is a^2.
            bar = denoiser.schedule.alpha(t, images)
            image_weight = (
                settings.image_loss
                * denoiser.schedule.weight(t, settings.prior.weighting, images)
                * bar.sqrt()
                / (1 - bar).sqrt()
            )
            # [K, B, C, H, W]
            latent_estimates = denoiser.x0(x_t, prediction.guided(settings.prior.guidance_scale), t)
            image_grads = [
                gradients.image_loss(images, denoiser.prior.decode(x0), image_weight)
                for x0 in latent_estimates
            ]
            guidance_output.image_grad = torch.stack(image_grads).mean(0)
        return guidance_output


class BestOfN(Rewarded, Sds):
    """Score distillation with S starts of each asset, of which one is kept.

    If A assets are kept, those of the start s have the indices s A to (s + 1) A - 1.
    """

    @torch.no_grad()
    def best(self, images: torch.Tensor, prompts: list[str], cameras: torch.Tensor) -> list[int]:
        """Return the indices of the assets to keep, [A]: the best of the S starts of each asset.

        The best start has the largest mean reward over its views. If several starts have this mean, the first
        one is kept.

        Args:
            images: [S A V, 3, h, w] in 0..1, renders of the finished assets.
            prompts: S A V prompts, one for each image.
            cameras: [S A V, 16], cam2world matrices.
        """
        denoiser = self.denoiser
        # images[None]: `score` expects a dimension of noises, which has the size 1 here.
        image_scores = denoiser.score(
            self.reward, images[None], reward_prompts(self.reward, prompts, cameras)
        )
        scores = denoiser.per_asset(image_scores)[0]  # [S A]
        start_count = self.settings.starts
        asset_count = len(scores) // start_count
        best_starts = scores.unflatten(0, (start_count, asset_count)).argmax(0).cpu()  # [A]
        return (best_starts * asset_count + torch.arange(asset_count)).tolist()
