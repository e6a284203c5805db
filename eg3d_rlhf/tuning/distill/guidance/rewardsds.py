"""Implements RewardSDS (Chachy et al. 2025, arXiv 2503.09601): several noises, each weighted by the reward of
the image that the prior estimates from it.
"""

from typing import Any

import torch

from eg3d_rlhf.core.interfaces import GuidanceOutput
from eg3d_rlhf.tuning.distill import gradients
from eg3d_rlhf.tuning.distill.gradients import History
from eg3d_rlhf.tuning.distill.guidance.denoiser import Conditioning, Rewarded, reward_prompts
from eg3d_rlhf.tuning.distill.schedule import ddim_times


class RewardSds(Rewarded):
    """Sum over noises of weight times distillation gradient."""

    def __init__(self, *args: Any, **more: Any):
        super().__init__(*args, **more)
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
        """Compute the gradient of one step, see `Guidance`."""
        d = self.denoiser
        s = self.settings
        # From the step `until` on, this is plain distillation with one noise.
        count = s.noises if s.until is None or step < s.until else 1
        # Noise k is the same for any count, so an arm with more noises contains those of other arms.
        noise, x_t, conditioning, prediction = d.noise_and_predict(count, x, t, prompts, cameras, step)
        residuals = d.residuals(x, noise, t, x_t, prediction)
        scores = None
        # With one noise nothing can be ranked, and the reward is not evaluated.
        if len(noise) > 1:
            scale = s.prior.guidance_scale
            one_step = d.x0(x_t, prediction.guided(scale), t)
            explored = (
                one_step if s.explore_steps == 1 else self.explore(x_t, t, conditioning, cameras, scale)
            )
            scores = self._score(
                torch.stack([d.prior.decode(latents) for latents in explored]),
                reward_prompts(self.reward, prompts, cameras),
            )
        # Weights are computed per asset [K, A] and repeated for its views [K, B].
        weights = (
            x.new_ones(1, len(x)) if scores is None else s.weighting(scores).repeat_interleave(d.views, 1)
        )
        grad = gradients.reward_weighted(residuals, weights)
        # For the log only: the gradient uses the weights.
        winner = None if scores is None else scores.argmax(0)
        return GuidanceOutput(grad=grad, terms=d.compare(residuals, grad), scores=scores, winner=winner)

    def explore(
        self,
        x_t: torch.Tensor,
        t: torch.Tensor,
        conditioning: Conditioning,
        cameras: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        """Follow DDIM from x_t [K, B, C, H, W]: through t and those of `explore_steps` even times 0..999 that
        are smaller.
        """
        # All noises are denoised in one batch [K B, C, H, W].
        d = self.denoiser
        k = len(x_t)

        def predict(flat: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
            prediction = d.predict(flat.unflatten(0, (k, -1)), now[: len(t)], conditioning, cameras)
            return prediction.guided(scale).flatten(0, 1)

        # Times above t would add noise to x_t.
        even = [time for time in ddim_times(self.settings.explore_steps, "floor") if time < int(t.max())]
        ends_at_x0 = self.settings.explore_end == "x0"
        # clamp_max: images with a smaller t stay at it until the chain reaches it.
        decreasing = [t, *(t.clamp_max(time) for time in even if time or not ends_at_x0)]
        times = [time.repeat(k) for time in decreasing]
        latents = d.schedule.ddim_chain(x_t.flatten(0, 1), times, predict)
        if ends_at_x0:
            # The last prediction gives the estimate without noise.
            latents = d.schedule.x0(latents, predict(latents, times[-1]), times[-1])
        return latents.unflatten(0, (k, -1))

    def _score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Score images [K, B, 3, h, w] per asset, [K, A]; standardised by the last steps if the
        settings say so.
        """
        scores = self.denoiser.per_asset(self.denoiser.score(self.reward, images, prompts))
        return self.history.standardise(scores) if self.settings.standardise else scores
