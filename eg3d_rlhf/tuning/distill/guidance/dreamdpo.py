"""Implements DreamDPO (Zhou et al. 2025, arXiv 2502.04370).

In each step the prior estimates an image from each of two noises. The gradient moves the render towards the
better of the two images. If its score is clearly higher, the gradient also moves the render away from the
other image.

Shapes: B images; N ranked units (assets, or images with pair_level=view); C, H, W channels, rows and columns
of latents.
"""

import warnings
from typing import Any

import torch

from eg3d_rlhf.core.interfaces import GuidanceOutput
from eg3d_rlhf.tuning.distill import gradients
from eg3d_rlhf.tuning.distill.gradients import History
from eg3d_rlhf.tuning.distill.guidance.denoiser import Ranked
from eg3d_rlhf.tuning.distill.guidance.settings import NoiseWeighting


class DreamDpo(Ranked):
    """DreamDPO with one pair of noises for each asset in a step. The arguments are those of `Ranked`.

    Warns if winner and loser have the same guidance scale. Images then diverge from the prior
    (docs/understand/distillation.md).
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.gaps = self.windows["gaps"] = History()
        settings = self.settings
        guidance_scale = settings.prior.guidance_scale
        has_same_scale = settings.lose_guidance_scale in (None, guidance_scale)
        # With an infinite tau, images are never moved away from the loser, so they do not diverge.
        if guidance_scale != 1 and has_same_scale and settings.tau != float("inf"):
            warnings.warn(
                f"lose_guidance_scale: winner and loser both have the guidance scale {guidance_scale:g}, so"
                " no term keeps images near the prior, and they diverge. Use --set lose_guidance_scale=1.",
                stacklevel=2,
            )

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
        """Compute the gradient of one step. The arguments are described at `Guidance`.

        `winner` and `one_sided` of the result have one entry per asset, or per image with pair_level=view.
        """
        denoiser = self.denoiser
        settings = self.settings
        noise, x_t, _, prediction = denoiser.noise_and_predict(2, x, t, prompts, cameras, step)
        guided_noises = prediction.guided(settings.prior.guidance_scale)
        estimated_images = torch.stack(
            [denoiser.prior.decode(x0) for x0 in denoiser.x0(x_t, guided_noises, t)]
        )
        ranks = self.ranking(estimated_images, prompts, cameras)
        # [N], True where images are moved away from the loser.
        is_two_sided = (ranks.gap >= self._tau(ranks.gap)) & (ranks.winner >= 0)
        # [2, N], 1 for the winner. Without an answer of the judge (-1), the first noise counts as the winner.
        winner_indicator = torch.stack([(ranks.winner < 1), (ranks.winner == 1)]).to(x)
        noise_weights = NoiseWeighting(strategy="push")(winner_indicator, is_two_sided)
        # From ranked units [2, N] to images [2, B].
        noise_weights = noise_weights.repeat_interleave(len(x) // noise_weights.shape[1], 1)
        is_subtracted = (noise_weights < 0).view(*noise_weights.shape, 1, 1, 1)  # [2, B, 1, 1, 1]
        time_weight = denoiser.schedule.weight(t, settings.prior.weighting, x)
        predicted_noises = torch.where(is_subtracted, self._predict_loser(prediction), guided_noises)
        grad = gradients.dreamdpo(
            predicted_noises, noise, noise_weights, time_weight, subtract_noise=settings.subtract_noise
        )
        terms = {"gap": ranks.gap, **denoiser.compare(denoiser.residuals(x, noise, t, x_t, prediction), grad)}
        return GuidanceOutput(
            grad=grad, terms=terms, scores=ranks.scores, winner=ranks.winner, one_sided=~is_two_sided
        )

    def _predict_loser(self, prediction) -> torch.Tensor:
        """Return the predicted noises [2, B, C, H, W] with the guidance scale of the loser."""
        loser_scale = self.settings.lose_guidance_scale
        # Scale 1 is the prediction for the prompt. This also holds with Perp-Neg, whose scale 1 would contain
        # its negative prompts.
        if loser_scale == 1:
            return prediction.text
        return prediction.guided(self.settings.prior.guidance_scale if loser_scale is None else loser_scale)

    def _tau(self, gap: torch.Tensor) -> float:
        """Return the smallest gap between scores at which images are moved away from the loser.

        Args:
            gap: [N], gaps of this step, which are added to those of the last steps for tau_mode=quantile.
        """
        if self.settings.tau_mode == "gap":
            return self.settings.tau
        # Added before the quantile is computed, so that the first step has a quantile, too.
        self.gaps.add(gap)
        return self.gaps.quantile(self.settings.tau)
