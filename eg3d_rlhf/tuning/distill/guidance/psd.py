"""Implements preference score distillation (arXiv 2603.01594), reconstructed because its text was not
available; each assumption is a setting.

It consists of distillation with two noises, a push from loser to winner, and a null embedding that learns the
properties of the loser. Letters: K = 2 noises, A assets, V views, B = A V images; n is the null embedding [A,
T, D].
"""

from typing import Any

import torch

from eg3d_rlhf.core.interfaces import GuidanceOutput
from eg3d_rlhf.preferences.losses import preference_loss
from eg3d_rlhf.tuning.distill import gradients
from eg3d_rlhf.tuning.distill.guidance.denoiser import Conditioning, Prediction, Ranked, Ranks, reward_prompts

NEGATIVE_BETA = 1000.0  # inverse temperature of the preference loss, per unit of squared error


class Psd(Ranked):
    """Distillation, push, and a null embedding for each asset, which is part of the state."""

    def __init__(self, *args: Any, **more: Any):
        super().__init__(*args, **more)
        self.update = self.settings.negative_update
        # A judge's answer has no gradient.
        differentiable = self.reward is not None and self.reward.differentiable and self.ranking.judge is None
        if self.update == "reward" and not differentiable:
            raise ValueError(
                "--set negative_update=reward needs a differentiable reward and no judge. Use"
                " negative_update=preference."
            )
        if self.update == "auto":
            self.update = "reward" if differentiable else "preference"
        # n - n0, [A, T, D], where n0 is the prior's own null embedding; None: 0
        self.moved: torch.Tensor | None = None

    def __call__(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        prompts: list[str],
        cameras: torch.Tensor | None,
        step: int,
        images: torch.Tensor | None = None,
    ) -> GuidanceOutput:
        """Compute the gradient of one step, see `Guidance`, and update the null embedding."""
        d = self.denoiser
        s = self.settings
        with torch.no_grad():
            # The prior's own embeddings, with n0 as the null embedding.
            start = d.conditioning(prompts, cameras)
            moved = 0 if self.moved is None else self.moved.to(start.null).repeat_interleave(d.views, 0)
            conditioning = start._replace(null=start.null + moved)
            noise, x_t, _, prediction = d.noise_and_predict(2, x, t, prompts, cameras, step, conditioning)
            # The ranked estimate and the push use the same prediction.
            predicted = (
                prediction.text if s.predictor == "cond" else prediction.guided(s.prior.guidance_scale)
            )
            ranks = self.ranking(
                torch.stack([d.prior.decode(x0) for x0 in d.x0(x_t, predicted, t)]), prompts, cameras
            )
            # Plain distillation of both noises, whatever the ranking.
            residuals = d.residuals(x, noise, t, x_t, prediction)
            grad = self._gradient(x, t, noise, residuals, predicted, ranks)
        terms = {"gap": ranks.gap, **d.compare(residuals, grad)}
        # After the gradient of this step, which uses n as it was.
        if self.update != "none" and step >= s.negative_from and step % s.negative_every == 0:
            self._learn(x_t, t, noise, prompts, start, conditioning, cameras, ranks)
        if self.moved is not None:
            start_norm = start.null[:: d.views].flatten(1).norm(dim=1)
            terms["negative_drift"] = self.moved.flatten(1).norm(dim=1) / start_norm
        return GuidanceOutput(
            grad=grad, terms=terms, scores=ranks.scores, winner=ranks.winner, one_sided=ranks.winner < 0
        )

    def _gradient(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        noise: torch.Tensor,
        residuals: torch.Tensor,
        q: torch.Tensor,
        ranks: Ranks,
    ) -> torch.Tensor:
        """Combine distillation and push, [B, C, H, W]."""
        s = self.settings
        # The push grows with the gap, and is 0 without an answer of the judge.
        strength = s.eta * ranks.gap.sigmoid() * (ranks.winner >= 0)
        # [B, 1, 1, 1], True where the first noise won; without an answer its push has strength 0.
        first = (ranks.winner < 1).repeat_interleave(len(x) // len(ranks.winner)).view(-1, 1, 1, 1)
        win = torch.where(first, q[0], q[1])
        lose = torch.where(first, q[1], q[0])
        noise_win = torch.where(first, noise[0], noise[1])
        noise_lose = torch.where(first, noise[1], noise[0])
        weight = self.denoiser.schedule.weight(t, s.prior.weighting, x)
        strength_per_image = strength.repeat_interleave(len(x) // len(strength))
        return gradients.psd(
            residuals, win, lose, noise_win, noise_lose, strength=strength_per_image, weight=weight
        )

    def _learn(
        self,
        x_t: torch.Tensor,
        t: torch.Tensor,
        noise: torch.Tensor,
        prompts: list[str],
        start: Conditioning,
        current: Conditioning,
        cameras: torch.Tensor | None,
        ranks: Ranks,
    ) -> None:
        """Perform one step of n. The gradient has a root mean square of at most 1 per entry; the step size is
        a share of the norm of n0, and n stays within a ball around n0.
        """
        d = self.denoiser
        s = self.settings
        # One of V equal embeddings per asset.
        n0 = start.null[:: d.views]  # [A, T, D]
        # One null embedding per asset: its views share it.
        n = current.null[:: d.views].detach().clone().requires_grad_()
        with torch.enable_grad():
            conditioning = current._replace(null=n.repeat_interleave(d.views, 0))
            prediction = d.predict(x_t, t, conditioning, cameras)
            if self.update == "reward":
                reward_texts = reward_prompts(self.reward, prompts, cameras)  # type: ignore[arg-type]
                gain = self._reward(x_t, t, prediction, reward_texts)
            else:
                with torch.no_grad():
                    # The prediction with n0, which the preference loss compares with.
                    reference = d.predict(x_t, t, start, cameras).null
                gain = -self._preference(prediction.null, reference, noise, ranks)
            grad = torch.autograd.grad(gain.sum(), n)[0].nan_to_num()
        # Step and ball are relative to the norm of n0, so they fit any text encoder.
        size = n0.flatten(1).norm(dim=1).view(-1, 1, 1)
        entries = n0[0].numel()
        # The gradient is limited, not normalised: a small one stays small.
        grad = grad / (grad.flatten(1).norm(dim=1).view(-1, 1, 1) / entries**0.5).clamp_min(1.0)
        moved = n.detach() + s.negative_rate * size / entries**0.5 * grad - n0
        length = moved.flatten(1).norm(dim=1).view(-1, 1, 1)
        # Projection onto the ball.
        self.moved = moved * (s.negative_ball * size / length.clamp_min(1e-30)).clamp_max(1.0)

    def _reward(
        self, x_t: torch.Tensor, t: torch.Tensor, prediction: Prediction, prompts: list[str]
    ) -> torch.Tensor:
        """Compute the mean reward of both guided estimates, [A], in units of the standard deviation of
        the last scores.
        """
        d = self.denoiser
        # n acts through guidance, so the guided estimate is scored.
        x0 = d.x0(x_t, prediction.guided(self.settings.prior.guidance_scale), t)
        images = torch.stack([d.prior.decode(latents) for latents in x0])
        scores = d.score(self.reward, images, prompts)  # type: ignore[arg-type]
        std = self.ranking.history.std() if self.settings.ranking.standardise else 1.0
        return d.per_asset(scores).mean(0) / std

    def _preference(
        self, null: torch.Tensor, reference: torch.Tensor, noise: torch.Tensor, ranks: Ranks
    ) -> torch.Tensor:
        """Compute the preference loss of delta = (e_ref - e)_win - (e_ref - e)_lose, [A], where e is the mean
        squared error of the noise predicted with n, and e_ref that with n0. Without an answer the loss is 0.

        The winner's x_t already leans towards the preferred image, so n predicts its noise better if it leans
        away from that image.
        """
        # [2, B] [2, B], positive where n predicts the noise better than n0.
        better = (reference - noise).square().flatten(2).mean(2) - (null - noise).square().flatten(2).mean(2)
        # [2, B] to [2, N]: mean over the views of a ranked asset.
        first, second = better.unflatten(1, (len(ranks.winner), -1)).mean(2)
        delta = torch.where(ranks.winner < 1, first - second, second - first)
        loss = preference_loss(delta, beta=NEGATIVE_BETA) * (ranks.winner >= 0)
        # [N] to [A]: ranked views are averaged per asset.
        return loss.unflatten(0, (null.shape[1] // self.denoiser.views, -1)).mean(1)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return windows and null embeddings."""
        return {**super().state_dict(), **({} if self.moved is None else {"moved": self.moved})}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore the result of `state_dict`."""
        super().load_state_dict(state)
        # Absent before the first update.
        self.moved = state["moved"].clone() if "moved" in state else None
