"""Preference score distillation (arXiv 2603.01594), reconstructed: its body was not reachable; each
assumption is a setting.

Distillation of two noises, a push from loser to winner beside it, and a null embedding that learns what the
loser has.
Letters: K = 2 noises, A assets, V views, B = A V pictures; n the null embedding [A, T, D].
"""

from typing import Any

import torch

from eg3d_rlhf.core.interfaces import GuidanceOutput
from eg3d_rlhf.preferences.losses import preference_loss
from eg3d_rlhf.tuning.distill import gradients
from eg3d_rlhf.tuning.distill.guidance.denoiser import Conditions, Prediction, Ranked, Ranks, told

NEGATIVE_BETA = 1000.0  # of the preference loss, per unit of squared error


class Psd(Ranked):
    """Distillation, push, and the null embedding of each asset, which is state."""

    def __init__(self, *args: Any, **more: Any):
        super().__init__(*args, **more)
        self.update = self.settings.negative_update
        differentiable = self.reward is not None and self.reward.differentiable and self.ranking.judge is None
        if self.update == "reward" and not differentiable:
            raise ValueError(
                "--set negative_update=reward: expected a differentiable reward and no judge. Use preference."
            )
        if self.update == "auto":
            self.update = "reward" if differentiable else "preference"
        self.moved: torch.Tensor | None = None  # n - n0, [A, T, D]

    def __call__(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        prompts: list[str],
        cameras: torch.Tensor | None,
        step: int,
        images: torch.Tensor | None = None,
    ) -> GuidanceOutput:
        d = self.denoiser
        s = self.settings
        with torch.no_grad():
            start = d.conditions(prompts, cameras)
            moved = 0 if self.moved is None else self.moved.to(start.null).repeat_interleave(d.views, 0)
            conditions = start._replace(null=start.null + moved)
            noise, x_t, _, prediction = d.ask(2, x, t, prompts, cameras, step, conditions)
            predicted = (
                prediction.text if s.predictor == "cond" else prediction.guided(s.prior.guidance_scale)
            )
            ranks = self.ranking(
                torch.stack([d.prior.decode(x0) for x0 in d.x0(x_t, predicted, t)]), prompts, cameras
            )
            anchors = d.residuals(x, noise, t, x_t, prediction)
            grad = self._gradient(x, t, noise, anchors, predicted, ranks)
        terms = {"gap": ranks.gap, **d.compare(anchors, grad)}
        if self.update != "none" and step >= s.negative_from and step % s.negative_every == 0:
            self._learn(x_t, t, noise, prompts, start, conditions, cameras, ranks)
        if self.moved is not None:
            begun = start.null[:: d.views].flatten(1).norm(dim=1)
            terms["negative_drift"] = self.moved.flatten(1).norm(dim=1) / begun
        return GuidanceOutput(
            grad=grad, terms=terms, scores=ranks.scores, winner=ranks.winner, one_sided=ranks.winner < 0
        )

    def _gradient(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        noise: torch.Tensor,
        anchors: torch.Tensor,
        q: torch.Tensor,
        ranks: Ranks,
    ) -> torch.Tensor:
        s = self.settings
        strength = s.eta * ranks.gap.sigmoid() * (ranks.winner >= 0)
        first = (ranks.winner < 1).repeat_interleave(len(x) // len(ranks.winner)).view(-1, 1, 1, 1)
        win = torch.where(first, q[0], q[1])
        lose = torch.where(first, q[1], q[0])
        noise_win = torch.where(first, noise[0], noise[1])
        noise_lose = torch.where(first, noise[1], noise[0])
        weight = self.denoiser.schedule.weight(t, s.prior.weighting, x)
        spread = strength.repeat_interleave(len(x) // len(strength))
        return gradients.psd(anchors, win, lose, noise_win, noise_lose, strength=spread, weight=weight)

    def _learn(
        self,
        x_t: torch.Tensor,
        t: torch.Tensor,
        noise: torch.Tensor,
        prompts: list[str],
        start: Conditions,
        now: Conditions,
        cameras: torch.Tensor | None,
        ranks: Ranks,
    ) -> None:
        """One step of n: a gradient of at most 1 per entry (root mean square), the rate, the ball."""
        d = self.denoiser
        s = self.settings
        begun = start.null[:: d.views]  # [A, T, D]
        n = now.null[:: d.views].detach().clone().requires_grad_()
        with torch.enable_grad():
            asked = now._replace(null=n.repeat_interleave(d.views, 0))
            prediction = d.predict(x_t, t, asked, cameras)
            if self.update == "reward":
                asked_for = told(self.reward, prompts, cameras)  # type: ignore[arg-type]
                gain = self._reward(x_t, t, prediction, asked_for)
            else:
                with torch.no_grad():
                    reference = d.predict(x_t, t, start, cameras).null
                gain = -self._preference(prediction.null, reference, noise, ranks)
            slope = torch.autograd.grad(gain.sum(), n)[0].nan_to_num()
        size = begun.flatten(1).norm(dim=1).view(-1, 1, 1)
        entries = begun[0].numel()
        slope = slope / (slope.flatten(1).norm(dim=1).view(-1, 1, 1) / entries**0.5).clamp_min(1.0)
        moved = n.detach() + s.negative_rate * size / entries**0.5 * slope - begun
        length = moved.flatten(1).norm(dim=1).view(-1, 1, 1)
        self.moved = moved * (s.negative_ball * size / length.clamp_min(1e-30)).clamp_max(1.0)

    def _reward(
        self, x_t: torch.Tensor, t: torch.Tensor, prediction: Prediction, prompts: list[str]
    ) -> torch.Tensor:
        """Mean reward of both guided estimates, [A], in deviations of the last ones."""
        d = self.denoiser
        x0 = d.x0(x_t, prediction.guided(self.settings.prior.guidance_scale), t)
        images = torch.stack([d.prior.decode(latents) for latents in x0])
        scores = d.score(self.reward, images, prompts)  # type: ignore[arg-type]
        spread = self.ranking.history.deviation() if self.settings.ranking.standardise else 1.0
        return d.per_asset(scores).mean(0) / spread

    def _preference(
        self, null: torch.Tensor, reference: torch.Tensor, noise: torch.Tensor, ranks: Ranks
    ) -> torch.Tensor:
        """Preference loss of delta = (e_ref - e)_win - (e_ref - e)_lose, [A]; e: mean squared error of the
        noise that n predicts, e_ref: that of n0. The winner's x_t already leans to what is wanted, so n
        explains its noise better by leaning the other way. No answer: 0.
        """
        # [2, B]
        better = (reference - noise).square().flatten(2).mean(2) - (null - noise).square().flatten(2).mean(2)
        first, second = better.unflatten(1, (len(ranks.winner), -1)).mean(2)
        delta = torch.where(ranks.winner < 1, first - second, second - first)
        loss = preference_loss(delta, beta=NEGATIVE_BETA) * (ranks.winner >= 0)
        return loss.unflatten(0, (null.shape[1] // self.denoiser.views, -1)).mean(1)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {**super().state_dict(), **({} if self.moved is None else {"moved": self.moved})}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        super().load_state_dict(state)
        self.moved = state["moved"].clone() if "moved" in state else None
