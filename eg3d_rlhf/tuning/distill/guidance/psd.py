"""Implements preference score distillation (PSD, arXiv 2603.01594).

The method is reconstructed, because the text of the paper was not available. Each assumption is a setting.

It has three parts: score distillation with two noises; a preference term, called push, which moves the render
from the estimate of the loser to that of the winner; and a null embedding that is trained during the run, so
that classifier-free guidance moves images away from the properties of losers.

Shapes: K = 2 noises; A = number of assets; V views of an asset; B = A V images; N ranked units (assets, or
images with pair_level=view); T tokens of an embedding with D entries each; C, H, W channels, rows and columns
of latents.
Symbols: n the trained null embedding [A, T, D]; n0 its initial value, the prior's own null embedding; e a
noise.
"""

from typing import Any

import torch

from eg3d_rlhf.core.interfaces import GuidanceOutput
from eg3d_rlhf.preferences.losses import preference_loss
from eg3d_rlhf.tuning.distill import gradients
from eg3d_rlhf.tuning.distill.guidance.denoiser import Conditioning, Prediction, Ranked, Ranks, reward_prompts

NEGATIVE_BETA = 1000.0  # inverse temperature of the preference loss, in units of 1 / (mean squared error)


class Psd(Ranked):
    """Preference score distillation, with a trained null embedding for each asset.

    The arguments are those of `Ranked`. The null embeddings are part of the state dict.

    Raises: ValueError if the setting negative_update needs a differentiable reward and there is none.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.update = self.settings.negative_update
        # The answer of a judge has no gradient.
        is_differentiable = (
            self.reward is not None and self.reward.differentiable and self.ranking.judge is None
        )
        if self.update == "reward" and not is_differentiable:
            raise ValueError(
                "--set negative_update=reward needs a differentiable reward, and cannot be combined with"
                " --judge. Use --set negative_update=preference."
            )
        if self.update == "auto":
            self.update = "reward" if is_differentiable else "preference"
        # n - n0, [A, T, D]; None before the first update, when n equals n0.
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
        """Compute the gradient of one step, and update the null embedding.

        The arguments are described at `Guidance`.
        """
        denoiser = self.denoiser
        settings = self.settings
        with torch.no_grad():
            initial_conditioning = denoiser.conditioning(prompts, cameras)  # its null embedding is n0
            # n - n0, from assets [A, T, D] to images [B, T, D].
            null_change: torch.Tensor | int = 0
            if self.moved is not None:
                null_change = self.moved.to(initial_conditioning.null).repeat_interleave(denoiser.views, 0)
            conditioning = initial_conditioning._replace(null=initial_conditioning.null + null_change)
            noise, x_t, _, prediction = denoiser.noise_and_predict(
                2, x, t, prompts, cameras, step, conditioning
            )
            # The ranking and the push use the same prediction.
            ranked_noises = (
                prediction.text
                if settings.predictor == "cond"
                else prediction.guided(settings.prior.guidance_scale)
            )
            estimated_images = torch.stack(
                [denoiser.prior.decode(x0) for x0 in denoiser.x0(x_t, ranked_noises, t)]
            )
            ranks = self.ranking(estimated_images, prompts, cameras)
            residuals = denoiser.residuals(x, noise, t, x_t, prediction)
            grad = self._gradient(x, t, noise, residuals, ranked_noises, ranks)
        terms = {"gap": ranks.gap, **denoiser.compare(residuals, grad)}
        # The update of n takes effect in the next step.
        if self.update != "none" and step >= settings.negative_from and step % settings.negative_every == 0:
            self._update_null(x_t, t, noise, prompts, initial_conditioning, conditioning, cameras, ranks)
        if self.moved is not None:
            # The views of an asset are adjacent and have the same null embedding: every V-th is enough, [A].
            initial_norm = initial_conditioning.null[:: denoiser.views].flatten(1).norm(dim=1)
            terms["negative_drift"] = self.moved.flatten(1).norm(dim=1) / initial_norm
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
        """Return the gradient of score distillation and the preference term (`gradients.psd`), [B, C, H, W].

        Args:
            x: [B, C, H, W], clean latents.
            t: [B], times.
            noise: [2, B, C, H, W], added noises.
            residuals: [2, B, C, H, W], gradients of score distillation.
            q: [2, B, C, H, W], predicted noises whose images were ranked.
            ranks: result of the ranking.
        """
        settings = self.settings
        # [N]; larger for a larger gap, and 0 if the judge gave no answer.
        strength = settings.eta * ranks.gap.sigmoid() * (ranks.winner >= 0)
        images_per_unit = len(x) // len(ranks.winner)
        # [B, 1, 1, 1]. Without an answer of the judge, winner is -1; the order then does not matter.
        first_wins = (ranks.winner < 1).repeat_interleave(images_per_unit).view(-1, 1, 1, 1)
        win_prediction = torch.where(first_wins, q[0], q[1])
        lose_prediction = torch.where(first_wins, q[1], q[0])
        noise_win = torch.where(first_wins, noise[0], noise[1])
        noise_lose = torch.where(first_wins, noise[1], noise[0])
        time_weight = self.denoiser.schedule.weight(t, settings.prior.weighting, x)
        strength_per_image = strength.repeat_interleave(images_per_unit)
        return gradients.psd(
            residuals,
            win_prediction,
            lose_prediction,
            noise_win,
            noise_lose,
            strength=strength_per_image,
            time_weight=time_weight,
        )

    def _update_null(
        self,
        x_t: torch.Tensor,
        t: torch.Tensor,
        noise: torch.Tensor,
        prompts: list[str],
        initial_conditioning: Conditioning,
        conditioning: Conditioning,
        cameras: torch.Tensor | None,
        ranks: Ranks,
    ) -> None:
        """Update the null embedding n by a step that raises the reward or lowers the preference loss.

        The gradient is limited to a root mean square of 1. The length of the step is a share of the norm of
        the initial embedding n0, and n stays within a ball around n0.

        Args:
            x_t: [2, B, C, H, W], noised latents.
            t: [B], times.
            noise: [2, B, C, H, W], added noises.
            prompts: B prompts, one for each image.
            initial_conditioning: conditioning tokens with n0 as the null embedding.
            conditioning: conditioning tokens with n as the null embedding.
            cameras: [B, 16], cam2world matrices, or None.
            ranks: result of the ranking.
        """
        denoiser = self.denoiser
        settings = self.settings
        # One of V equal embeddings per asset.
        # The views of an asset are adjacent and share their null embedding, so every V-th entry is enough.
        n0 = initial_conditioning.null[:: denoiser.views]  # [A, T, D]
        n = conditioning.null[:: denoiser.views].detach().clone().requires_grad_()
        with torch.enable_grad():
            # The same values as in `conditioning`, but with a graph to n.
            prediction = denoiser.predict(
                x_t, t, conditioning._replace(null=n.repeat_interleave(denoiser.views, 0)), cameras
            )
            if self.update == "reward":
                reward_texts = reward_prompts(self.reward, prompts, cameras)  # type: ignore[arg-type]
                objective = self._mean_reward(x_t, t, prediction, reward_texts)
            else:
                # The preference loss compares the prediction for n with the prediction for n0.
                with torch.no_grad():
                    reference_prediction = denoiser.predict(x_t, t, initial_conditioning, cameras).null
                objective = -self._preference_loss(prediction.null, reference_prediction, noise, ranks)
            # A sum over assets: the objective of an asset depends on its own null embedding only.
            grad = torch.autograd.grad(objective.sum(), n)[0].nan_to_num()
        # The length of the step and the radius of the ball are multiples of |n0|, so that the same settings
        # fit any text encoder. [A, 1, 1]
        initial_norm = n0.flatten(1).norm(dim=1).view(-1, 1, 1)
        entry_count = n0[0].numel()
        # The root mean square of the gradient is limited to 1. A smaller gradient is not enlarged.
        grad = grad / (grad.flatten(1).norm(dim=1).view(-1, 1, 1) / entry_count**0.5).clamp_min(1.0)
        # Gradient ascent on the objective.
        null_change = n.detach() + settings.negative_rate * initial_norm / entry_count**0.5 * grad - n0
        change_norm = null_change.flatten(1).norm(dim=1).view(-1, 1, 1)
        # Projection onto the ball about n0 with the radius negative_ball |n0|.
        self.moved = null_change * (
            settings.negative_ball * initial_norm / change_norm.clamp_min(1e-30)
        ).clamp_max(1.0)

    def _mean_reward(
        self, x_t: torch.Tensor, t: torch.Tensor, prediction: Prediction, prompts: list[str]
    ) -> torch.Tensor:
        """Return the mean reward of the images that the prior estimates from both noises, [A].

        With standardised scores, it is divided by the standard deviation of the scores of the last steps.

        Args:
            x_t: [2, B, C, H, W], noised latents.
            t: [B], times.
            prediction: predicted noises, differentiable in the null embedding.
            prompts: B prompts for the reward.
        """
        denoiser = self.denoiser
        # The estimates are guided, because n affects images only through classifier-free guidance.
        x0 = denoiser.x0(x_t, prediction.guided(self.settings.prior.guidance_scale), t)
        images = torch.stack([denoiser.prior.decode(latents) for latents in x0])
        scores = denoiser.score(self.reward, images, prompts)  # type: ignore[arg-type]
        std = self.ranking.history.std() if self.settings.ranking.standardise else 1.0
        return denoiser.per_asset(scores).mean(0) / std

    def _preference_loss(
        self,
        null_prediction: torch.Tensor,
        reference_prediction: torch.Tensor,
        noise: torch.Tensor,
        ranks: Ranks,
    ) -> torch.Tensor:
        """Return the preference loss of delta = (r - m)_win - (r - m)_lose for each asset, [A].

        m is the mean squared error of the noise that the prior predicts with the null embedding n, and r is
        that error with its initial value n0. The loss is smaller if n predicts the noise of the winner
        better, relative to n0, than the noise of the loser. The noised latents of the winner already resemble
        the preferred image, so n predicts their noise better if n describes that image less. The loss is 0
        for assets without an answer of the judge.

        Args:
            null_prediction: [2, B, C, H, W], predictions with n.
            reference_prediction: [2, B, C, H, W], predictions with n0.
            noise: [2, B, C, H, W], added noises.
            ranks: result of the ranking.
        """
        reference_error = (reference_prediction - noise).square().flatten(2).mean(2)  # [2, B]
        prediction_error = (null_prediction - noise).square().flatten(2).mean(2)  # [2, B]
        # r - m, positive where n predicts the noise better than n0. From images [2, B] to ranked units, [N]
        # each.
        improvement = (reference_error - prediction_error).unflatten(1, (len(ranks.winner), -1)).mean(2)
        first_improvement, second_improvement = improvement
        delta = torch.where(
            ranks.winner < 1, first_improvement - second_improvement, second_improvement - first_improvement
        )
        loss = preference_loss(delta, beta=NEGATIVE_BETA) * (ranks.winner >= 0)
        # From ranked units [N] to assets [A]: the mean over the views if these were ranked separately.
        return loss.unflatten(0, (null_prediction.shape[1] // self.denoiser.views, -1)).mean(1)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the scores of the last steps, and as "moved" the change n - n0 of the null embedding."""
        state = super().state_dict()
        return state if self.moved is None else {**state, "moved": self.moved}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore the result of `state_dict`."""
        super().load_state_dict(state)
        self.moved = state["moved"].clone() if "moved" in state else None
