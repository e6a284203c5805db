"""Implements RewardSDS (Chachy et al. 2025, arXiv 2503.09601).

Each step uses several noises. The gradient of score distillation of each noise has a weight, which depends on
the reward of the image that the prior estimates from that noise.

Shapes: K noises; A = number of assets; V views of an asset; B = A V images; C, H, W channels, rows and
columns of latents.
"""

from typing import Any

import torch

from eg3d_rlhf.core.interfaces import GuidanceOutput
from eg3d_rlhf.tuning.distill import gradients
from eg3d_rlhf.tuning.distill.gradients import History
from eg3d_rlhf.tuning.distill.guidance.denoiser import Conditioning, Rewarded, reward_prompts
from eg3d_rlhf.tuning.distill.schedule import ddim_times


class RewardSds(Rewarded):
    """RewardSDS: the sum over noises of weight times gradient. The arguments are those of `Rewarded`."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.history = History()
        self.windows = {"rows": self.history}

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
        # From the step `until` on, the method is score distillation with one noise.
        noise_count = settings.noises if settings.until is None or step < settings.until else 1
        noise, x_t, conditioning, prediction = denoiser.noise_and_predict(
            noise_count, x, t, prompts, cameras, step
        )
        residuals = denoiser.residuals(x, noise, t, x_t, prediction)
        scores = None
        # The weight of a single noise is 1 for any score, so the reward is not computed.
        if len(noise) > 1:
            guidance_scale = settings.prior.guidance_scale
            if settings.explore_steps == 1:
                explored_latents = denoiser.x0(x_t, prediction.guided(guidance_scale), t)
            else:
                explored_latents = self.explore(x_t, t, conditioning, cameras, guidance_scale)
            images = torch.stack([denoiser.prior.decode(latents) for latents in explored_latents])
            scores = self._score(images, reward_prompts(self.reward, prompts, cameras))
        # Weights are computed for assets [K, A] and repeated for their views [K, B].
        noise_weights = (
            x.new_ones(1, len(x))
            if scores is None
            else settings.weighting(scores).repeat_interleave(denoiser.views, 1)
        )
        grad = gradients.reward_weighted(residuals, noise_weights)
        winner = None if scores is None else scores.argmax(0)  # for the log only
        return GuidanceOutput(
            grad=grad, terms=denoiser.compare(residuals, grad), scores=scores, winner=winner
        )

    def explore(
        self,
        x_t: torch.Tensor,
        t: torch.Tensor,
        conditioning: Conditioning,
        cameras: torch.Tensor | None,
        guidance_scale: float,
    ) -> torch.Tensor:
        """Denoise latents by several DDIM steps (RewardSDS's exploration).

        The setting explore_steps is a number of evenly spaced times in 0..999. Denoising starts at t, and
        continues at each of the evenly spaced times that is smaller than t.

        Args:
            x_t: [K, B, C, H, W], noised latents.
            t: [B], times of x_t.
            conditioning: tokens of the prompts.
            cameras: [B, 16], cam2world matrices, or None.
            guidance_scale: guidance scale.
        Returns: [K, B, C, H, W], clean estimate of the last prediction, or with explore_end=t0 the latents at
        t = 0.
        """
        denoiser = self.denoiser
        noise_count = len(x_t)  # K

        # The schedule processes all noises as one batch [K B, C, H, W], and the denoiser expects [K, B, C, H,
        # W].
        def predict(flat_latents: torch.Tensor, flat_times: torch.Tensor) -> torch.Tensor:
            # All noises have the same times, so the first B of K B are enough.
            prediction = denoiser.predict(
                flat_latents.unflatten(0, (noise_count, -1)), flat_times[: len(t)], conditioning, cameras
            )
            return prediction.guided(guidance_scale).flatten(0, 1)

        ends_at_x0 = self.settings.explore_end == "x0"
        chain_times = [t]
        for chain_time in ddim_times(self.settings.explore_steps, "floor"):
            # Only times below t: DDIM steps remove noise. An end at x0 is computed below from a prediction,
            # not by a step to t = 0.
            if chain_time < int(t.max()) and (chain_time > 0 or not ends_at_x0):
                # clamp_max: an image whose own t is smaller stays unchanged until the chain reaches its t.
                chain_times.append(t.clamp_max(chain_time))
        flat_chain_times = [step_times.repeat(noise_count) for step_times in chain_times]  # [K B] each
        latents = denoiser.schedule.ddim_chain(x_t.flatten(0, 1), flat_chain_times, predict)
        if ends_at_x0:
            latents = denoiser.schedule.x0(
                latents, predict(latents, flat_chain_times[-1]), flat_chain_times[-1]
            )
        return latents.unflatten(0, (noise_count, -1))

    def _score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Return the scores [K, A] of images [K, B, 3, h, w], averaged over the views of each asset.

        The scores are standardised over the last steps if the setting `standardise` is True.
        """
        scores = self.denoiser.per_asset(self.denoiser.score(self.reward, images, prompts))
        return self.history.standardise(scores) if self.settings.standardise else scores
