"""Implements DreamDPO (Zhou et al. 2025, arXiv 2502.04370): the image moves towards the better of two noises
and, if that is clearly better, away from the other.
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
    """DreamDPO with one pair of noises per step and asset."""

    def __init__(self, *args: Any, **more: Any):
        """Warn if winner and loser have the same guidance scale, because images then leave the prior
        (docs/understand/distillation.md).
        """
        super().__init__(*args, **more)
        self.gaps = self.windows["gaps"] = History()
        settings = self.settings
        scale = settings.prior.guidance_scale
        # With an infinite tau losers are never pushed away, so nothing can diverge.
        if scale != 1 and settings.lose_guidance_scale in (None, scale) and settings.tau != float("inf"):
            warnings.warn(
                f"lose_guidance_scale: with {scale:g} for both noises, no term keeps images near the prior:"
                " they diverge. Use 1.",
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
        """Compute the gradient of one step, see `Guidance`. If views are ranked one by one, `winner` and
        `one_sided` are per image, else per asset.
        """
        d = self.denoiser
        s = self.settings
        noise, x_t, _, prediction = d.noise_and_predict(2, x, t, prompts, cameras, step)
        # The ranked images are those of the guided prediction.
        guided = prediction.guided(s.prior.guidance_scale)
        ranks = self.ranking(
            torch.stack([d.prior.decode(x0) for x0 in d.x0(x_t, guided, t)]), prompts, cameras
        )
        # [N], where the loser is pushed away
        two_sided = (ranks.gap >= self._tau(ranks.gap)) & (ranks.winner >= 0)
        # Without an answer, the first noise is used alone, as in plain distillation.
        ordered = torch.stack([(ranks.winner < 1), (ranks.winner == 1)]).to(x)
        weights = NoiseWeighting(strategy="push")(ordered, two_sided)
        # Ranks are per asset or per image; the weights are needed per image.
        weights = weights.repeat_interleave(len(x) // weights.shape[1], 1)  # [2, B]
        # [2, B, 1, 1, 1]
        loser = (weights < 0).view(*weights.shape, 1, 1, 1)
        weight = d.schedule.weight(t, s.prior.weighting, x)
        predicted = torch.where(loser, self._lose(prediction), guided)
        grad = gradients.dreamdpo(predicted, noise, weights, weight, subtract_noise=s.subtract_noise)
        terms = {"gap": ranks.gap, **d.compare(d.residuals(x, noise, t, x_t, prediction), grad)}
        return GuidanceOutput(
            grad=grad, terms=terms, scores=ranks.scores, winner=ranks.winner, one_sided=~two_sided
        )

    def _lose(self, prediction) -> torch.Tensor:
        """Return the prediction for the loser, at its own guidance scale."""
        scale = self.settings.lose_guidance_scale
        if scale == 1:
            # Scale 1 is the prediction with the prompt only.
            return prediction.text
        return prediction.guided(self.settings.prior.guidance_scale if scale is None else scale)

    def _tau(self, gap: torch.Tensor) -> float:
        """Return the smallest gap at which the loser is pushed away."""
        if self.settings.tau_mode == "gap":
            return self.settings.tau
        # The gaps of this step are included, so the first step has a quantile, too.
        self.gaps.add(gap)
        return self.gaps.quantile(self.settings.tau)
