"""What all methods share: noising the views, asking the prior with and without the prompt, and scoring what comes out.

Letters: K noises, A assets, V views of an asset, B = A V pictures, Q = 2 negatives of Perp-Neg, T, D tokens and entries of a condition.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from eg3d_rlhf.core.interfaces import DiffusionPrior, RewardModel
from eg3d_rlhf.tuning.distill import gradients
from eg3d_rlhf.tuning.distill.guidance.directions import angles_of, direction_of, mixture
from eg3d_rlhf.tuning.distill.schedule import WEIGHTINGS, NoiseSchedule
from eg3d_rlhf.tuning.distill.streams import Streams
from eg3d_rlhf.tuning.distill.target import norm_per_asset
from training.config import check_knobs, knob

PRIOR = "Asking the prior"  # title of the flags
FORMS = ("sds", "sjc", "sjc-plain", "recon")


@dataclass(frozen=True, kw_only=True)
class DenoiserSettings:
    """How the prior is asked, and how its answer becomes a gradient."""

    guidance_scale: float = knob(7.5, "Of the prompt; 1: the prompt alone.", PRIOR, low=0)
    negative_prompt: str = knob("", "What the pictures should not be.", PRIOR, metavar="TEXT")
    form: str = knob("sds", "Gradient: SDS, score Jacobian chaining, or MVDream's reconstruction.", PRIOR, choices=FORMS)
    weighting: str = knob("sds", "Weight of times, of the form sds.", PRIOR, choices=WEIGHTINGS)
    rescale: float = knob(0.5, "Share of x0 whose spread is the unguided one's, of the form recon.", PRIOR, low=0, high=1)
    view_prompts: bool = knob(False, "Say the side that the camera looks from in the prompt.", PRIOR)
    front: float = knob(45.0, "Largest azimuth of a front view.", PRIOR, metavar="DEGREES", low=0, high=180)
    back: float = knob(45.0, "Largest angle from the back of a back view.", PRIOR, metavar="DEGREES", low=0, high=180)
    overhead: float = knob(60.0, "Elevation above which a view is overhead.", PRIOR, metavar="DEGREES", low=0, high=90)
    perp_neg: bool = knob(False, "Perp-Neg: mix the prompts of neighbouring sides, away from the others.", PRIOR)

    def __post_init__(self):
        check_knobs(self)
        if self.perp_neg and not self.view_prompts:
            raise ValueError("--perp-neg: expected --view-prompts with it, got none. Turn both on.")


class Conditions(NamedTuple):
    """What the prior is told."""

    text: torch.Tensor  # [B, T, D]
    null: torch.Tensor  # [B, T, D]
    negatives: torch.Tensor | None = None  # [Q, B, T, D]
    weights: torch.Tensor | None = None  # [B, Q]


class Prediction(NamedTuple):
    """Noises that the prior sees, [K, B, C, H, W]."""

    text: torch.Tensor
    null: torch.Tensor
    negatives: torch.Tensor | None  # [Q, K, B, C, H, W]
    weights: torch.Tensor | None  # [B, Q]

    def guided(self, scale: float) -> torch.Tensor:
        """The prediction with guidance, [K, B, C, H, W]."""
        if self.negatives is None or self.weights is None:
            return gradients.guided(self.text, self.null, scale)
        return torch.stack([
            gradients.perp_neg(text, null, others, self.weights, scale)
            for text, null, others in zip(self.text, self.null, self.negatives.unbind(1), strict=True)
        ])


class Asked(NamedTuple):
    """One step's question and answer."""

    noise: torch.Tensor  # [K, B, C, H, W]
    x_t: torch.Tensor  # [K, B, C, H, W]
    conditions: Conditions
    prediction: Prediction


class Denoiser:
    """A prior, a schedule and named draws, for assets of V views each."""

    def __init__(self, prior: DiffusionPrior, settings: DenoiserSettings, *, views: int, streams: Streams):
        """Raises: ValueError for a number of views that the prior cannot see together."""
        if views < 1 or views % prior.views:
            raise ValueError(f"--views: expected a multiple of the {prior.views} that this prior sees together, got {views}. Change it.")
        self.prior, self.settings, self.views, self.streams = prior, settings, views, streams
        self.schedule = NoiseSchedule(prior.alphas_cumprod)

    def check(self, x: torch.Tensor, t: torch.Tensor, prompts: list[str]) -> None:
        """Raises: ValueError where pictures, times and prompts do not belong together."""
        if x.ndim != 4 or tuple(x.shape[1:]) != tuple(self.prior.latent_shape) or len(x) % self.views:
            shape = ", ".join(str(size) for size in self.prior.latent_shape)
            got = f"{list(x.shape)} for {self.views} views"
            raise ValueError(f"Denoiser(x): expected [assets x {self.views}, {shape}], got {got}. Render all views of each asset.")
        if len(prompts) != len(x) or t.shape != (len(x),):
            got = f"{len(prompts)} prompts and times {list(t.shape)} for {len(x)}"
            raise ValueError(f"Denoiser: expected a prompt and a time for each picture, got {got}. Repeat them for the views.")

    def check_reward(self, reward: RewardModel) -> None:
        """Raises: ValueError for a reward that scores another number of views together."""
        if self.views % reward.views:
            together = f"a multiple of the {reward.views} that the reward scores together"
            raise ValueError(f"--views: expected {together}, got {self.views}. Change it.")

    def conditions(self, prompts: list[str], cameras: torch.Tensor | None) -> Conditions:
        """What the prior is told of each picture.

        Raises: ValueError where prompts should name the side and no cameras [B, 16] are given.
        """
        s, prior = self.settings, self.prior
        negative = [s.negative_prompt] * len(prompts)
        if not s.view_prompts:
            return Conditions(prior.embed(prompts), prior.embed(negative))
        if cameras is None:
            raise ValueError("--view-prompts: expected cameras of the pictures, got none. Leave it out or give cameras.")
        elevations, azimuths = (angle.tolist() for angle in angles_of(cameras))
        views = list(zip(elevations, azimuths, strict=True))
        sides = [direction_of(up, round_, front=s.front, back=s.back, overhead=s.overhead) for up, round_ in views]
        null = prior.embed(negative)  # named there, the side would be pushed away from: threestudio does not say it either
        if not s.perp_neg:
            return Conditions(prior.embed(prompts, sides), null)
        mixed = [mixture(up, round_, s.overhead) for up, round_ in views]
        text = torch.stack([
            torch.stack([share * prior.embed([prompt], [side])[0] for side, share in shares.items()]).sum(0)
            for prompt, (shares, _, _) in zip(prompts, mixed, strict=True)
        ])
        others = torch.stack([
            torch.stack([null[b] if (side := m[1][i]) is None else prior.embed([prompts[b]], [side])[0] for b, m in enumerate(mixed)])
            for i in range(2)
        ])
        return Conditions(text, null, others, torch.tensor([weights for *_, weights in mixed]).to(text))

    def ask(
        self, noises: int, x: torch.Tensor, t: torch.Tensor, prompts: list[str], cameras: torch.Tensor | None, step: int,
        conditions: Conditions | None = None,
    ) -> Asked:
        """What the prior predicts of so many noises of this step. Args: conditions: what it is told, where that is not `prompts` alone."""
        self.check(x, t, prompts)
        noise = self.streams.noises(noises, x, step)
        x_t = self.noised(x, noise, t)
        conditions = self.conditions(prompts, cameras) if conditions is None else conditions
        return Asked(noise, x_t, conditions, self.predict(x_t, t, conditions, cameras))

    def noised(self, x: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x_t of all noises, [K, B, C, H, W]."""
        return torch.stack([self.schedule.mix(x, e, t) for e in noise])

    def x0(self, x_t: torch.Tensor, predicted: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """One-step estimates of all noises, [K, B, C, H, W]."""
        return torch.stack([self.schedule.x0(x, p, t) for x, p in zip(x_t, predicted, strict=True)])

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, conditions: Conditions, cameras: torch.Tensor | None) -> Prediction:
        """All predictions of x_t [K, B, C, H, W] in one call of the prior.

        Raises: ValueError where a whole picture's prediction is not finite.
        """
        k, b = x_t.shape[:2]
        told = [conditions.text, conditions.null, *([] if conditions.negatives is None else conditions.negatives)]
        rows = len(told) * k
        out = self.prior.predict_noise(
            x_t.flatten(0, 1).repeat(len(told), 1, 1, 1), t.to(x_t.device).repeat(rows), torch.cat([c.repeat(k, 1, 1) for c in told]),
            None if cameras is None else cameras.repeat(rows, 1),
        )
        if not torch.isfinite(out).flatten(1).any(1).all():
            raise ValueError("--prior: expected finite predictions, got a picture of NaN alone. Check its files or its precision.")
        text, null, *others = out.unflatten(0, (len(told), k, b)).unbind(0)
        return Prediction(text, null, torch.stack(others) if others else None, conditions.weights)

    def residuals(self, x: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, x_t: torch.Tensor, prediction: Prediction) -> torch.Tensor:
        """The distillation gradient of each noise, [K, B, C, H, W]."""
        s, sched = self.settings, self.schedule
        predicted = prediction.guided(s.guidance_scale)
        if s.form == "sds":
            weight = sched.weight(t, s.weighting, x)  # type: ignore[arg-type]
            return torch.stack([gradients.sds(p, e, weight) for p, e in zip(predicted, noise, strict=True)])
        if s.form == "recon":
            found = zip(self.x0(x_t, predicted, t), self.x0(x_t, prediction.text, t), strict=True)
            targets = (gradients.reconstruction_target(x0, x0_text, s.rescale, self.views) for x0, x0_text in found)
            return torch.stack([gradients.reconstruction(x, target) for target in targets])
        bar = sched.alpha(t, x)
        u = ((1 - bar) / bar).sqrt()
        reduced = s.form == "sjc"
        pairs = zip(noise, predicted, strict=True)
        return torch.stack([gradients.sjc(x, x + u * e, p, u, variance_reduced=reduced) for e, p in pairs])

    def score(self, reward: RewardModel, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Scores [K, B] of pictures [K, B, 3, h, w].

        Raises: ValueError for scores that are not finite, or not one per picture.
        """
        scores = reward.score(images.flatten(0, 1), prompts * len(images))
        if scores.shape != (images.shape[0] * images.shape[1],) or not torch.isfinite(scores).all():
            got = f"{list(scores.shape)}" + ("" if torch.isfinite(scores).all() else " with NaN")
            raise ValueError(f"--reward: expected finite scores [{images.shape[0] * images.shape[1]}], got {got}. Check the reward.")
        return scores.unflatten(0, (images.shape[0], -1))

    def per_asset(self, numbers: torch.Tensor) -> torch.Tensor:
        """Means over the views of an asset, [K, B] -> [K, A]."""
        return numbers.unflatten(1, (-1, self.views)).mean(2)

    def compare(self, residuals: torch.Tensor, grad: torch.Tensor) -> dict[str, torch.Tensor]:
        """Figures [A] of a gradient beside plain distillation over the same noises [K, B, ...]: their norms, and the cosine between
        distillation and what the preference adds to it."""
        base = residuals.mean(0)
        added = grad - base
        norms = norm_per_asset(base, self.views), norm_per_asset(added, self.views)
        inner = (base * added).reshape(-1, self.views * base[0].numel()).sum(1)
        return {"sds_norm": norms[0], "preference_norm": norms[1], "cosine": inner / (norms[0] * norms[1]).clamp_min(1e-30)}
