"""What all methods share: noising the views, asking the prior with and without the prompt, scoring and
ranking what comes out.

Letters: K noises, A assets, V views of an asset, B = A V pictures, Q = 2 negatives of Perp-Neg, T, D tokens
and entries of a condition.
"""

import math
from typing import Any, NamedTuple

import torch

from eg3d_rlhf.core.interfaces import DiffusionPrior, PairwiseJudge, RewardModel
from eg3d_rlhf.tuning.distill import gradients
from eg3d_rlhf.tuning.distill.gradients import History, Window, norm_per_asset
from eg3d_rlhf.tuning.distill.guidance.settings import DenoiserSettings, RankingSettings
from eg3d_rlhf.tuning.distill.schedule import NoiseSchedule, Streams

# From which side a camera looks, in words for the prompt, and Perp-Neg's mixture of prompts (Armandpour et
# al. 2023). In degrees; azimuth 0 is the front, elevation up.

DIRECTIONS = ("side", "front", "back", "overhead")
OVERHEAD = 60  # elevation above which a view is one
# weight -(a exp(-b r) + c) of a negative prompt, r the share of the nearer view: (a, b, c)
FRONT_OF_FRONT_SIDE = SIDE_OF_FRONT_SIDE = (4.0, 0.5, -2.426)
SIDE_OF_SIDE_BACK = (1.0, 0.5, -0.606)
FRONT_OF_SIDE_BACK = (1.0, 0.5, 0.967)


def angles_of(cameras: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Elevation and azimuth [B] in degrees of cameras [B, 16], cam2world with y up that look at the origin;
    azimuth 0 is +z, 90 is +x.
    """
    x, y, z = cameras.view(-1, 4, 4)[:, :3, 3].unbind(1)
    return torch.rad2deg(torch.atan2(y, torch.hypot(x, z))), torch.rad2deg(torch.atan2(x, z))


def _turned(azimuth: float) -> float:
    return (azimuth + 180) % 360 - 180


def direction_of(elevation: float, azimuth: float, within: float = 45) -> str:
    """side, unless `within` of the front or the back, or more than OVERHEAD up; the later one wins. MVDream's
    family: within 30.
    """
    turned = abs(_turned(azimuth))
    if elevation > OVERHEAD:
        return "overhead"
    if turned > 180 - within:
        return "back"
    return "front" if turned < within else "side"


def told(reward: RewardModel, prompts: list[str], cameras: torch.Tensor | None) -> list[str]:
    """What a reward is told of pictures [B]: their prompts, and the side where it was trained so, as Reward3D
    was (MVDream's thresholds).

    Raises: ValueError where prompts should name the side and no cameras [B, 16] are given.
    """
    if not getattr(reward, "view_prompts", False):
        return prompts
    if cameras is None:
        raise ValueError(
            "--reward: expected cameras of the pictures, whose side it is told, got none. Give cameras."
        )
    views = zip(prompts, *(angle.tolist() for angle in angles_of(cameras)), strict=True)
    return [f"{prompt}, {direction_of(elevation, azimuth, 30)} view" for prompt, elevation, azimuth in views]


def mixture(elevation: float, azimuth: float) -> tuple[dict[str, float], list[str | None], list[float]]:
    """Perp-Neg of one view: shares of directions in the prompt, those of two negatives (None: the null one),
    their weights <= 0.
    """
    if elevation > OVERHEAD:
        return {"overhead": 1.0}, [None, None], [0.0, 0.0]
    turned = abs(_turned(azimuth))
    r = 1 - turned / 90 if turned < 90 else 2 - turned / 90
    if turned < 90:
        decays = _decay(FRONT_OF_FRONT_SIDE, r), _decay(SIDE_OF_FRONT_SIDE, 1 - r)
        return {"front": r, "side": 1 - r}, ["front", "side"], [-d for d in decays]
    decays = _decay(SIDE_OF_SIDE_BACK, r), _decay(FRONT_OF_SIDE_BACK, r)
    return {"side": r, "back": 1 - r}, ["side", "front"], [-d for d in decays]


def _decay(constants: tuple[float, float, float], r: float) -> float:
    a, b, c = constants
    return a * math.exp(-b * r) + c


class Conditions(NamedTuple):
    """What the prior is told."""

    text: torch.Tensor  # [B, T, D]
    null: torch.Tensor  # [B, T, D]
    negatives: torch.Tensor | None = None  # [Q, B, T, D]
    weights: torch.Tensor | None = None  # [B, Q]


class Prediction(Conditions):
    """Noises that the prior sees with each of them: [K, B, C, H, W],
    those of negatives [Q, K, B, C, H, W].
    """

    def guided(self, scale: float) -> torch.Tensor:
        if self.negatives is None or self.weights is None:
            return gradients.guided(self.text, self.null, scale)
        return torch.stack(
            [
                gradients.perp_neg(text, null, others, self.weights, scale)
                for text, null, others in zip(self.text, self.null, self.negatives.unbind(1), strict=True)
            ]
        )


class Denoiser:
    """A prior, a schedule and named draws, for assets of V views each."""

    def __init__(self, prior: DiffusionPrior, settings: DenoiserSettings, *, views: int, streams: Streams):
        if views < 1 or views % prior.views:
            raise ValueError(
                f"--set views={views}: expected a multiple of the {prior.views} that this prior sees"
                " together. Change it."
            )
        self.prior = prior
        self.settings = settings
        self.views = views
        self.streams = streams
        self.schedule = NoiseSchedule(prior.alphas_cumprod)

    def check(self, x: torch.Tensor, t: torch.Tensor, prompts: list[str]) -> None:
        assert x.shape[1:] == tuple(self.prior.latent_shape) and len(x) % self.views == 0, (
            x.shape,
            self.prior.latent_shape,
            self.views,
        )
        assert len(prompts) == len(t) == len(x), (len(prompts), t.shape, x.shape)

    def check_reward(self, reward: RewardModel) -> None:
        if self.views % reward.views:
            together = f"a multiple of the {reward.views} that the reward scores together"
            raise ValueError(f"--set views={self.views}: expected {together}. Change it.")

    def conditions(self, prompts: list[str], cameras: torch.Tensor | None) -> Conditions:
        """What the prior is told of each picture.

        Raises: ValueError where prompts should name the side and no cameras [B, 16] are given.
        """
        s = self.settings
        prior = self.prior
        negative = [s.negative_prompt] * len(prompts)
        if not s.view_prompts:
            return Conditions(prior.embed(prompts), prior.embed(negative))
        if cameras is None:
            raise ValueError(
                "--set view_prompts=True: expected cameras of the pictures, got none. Leave it out or give"
                " cameras."
            )
        views = list(zip(*(angle.tolist() for angle in angles_of(cameras)), strict=True))
        sides = [direction_of(*view) for view in views]
        # named there, the side would be pushed away from: threestudio does not say it either
        null = prior.embed(negative)
        if not s.perp_neg:
            return Conditions(prior.embed(prompts, sides), null)
        mixed = [mixture(*view) for view in views]
        text = torch.stack(
            [
                torch.stack([share * prior.embed([prompt], [side])[0] for side, share in shares.items()]).sum(
                    0
                )
                for prompt, (shares, _, _) in zip(prompts, mixed, strict=True)
            ]
        )
        others = torch.stack(
            [
                torch.stack(
                    [
                        null[b] if (side := m[1][i]) is None else prior.embed([prompts[b]], [side])[0]
                        for b, m in enumerate(mixed)
                    ]
                )
                for i in range(2)
            ]
        )
        return Conditions(text, null, others, torch.tensor([weights for *_, weights in mixed]).to(text))

    def ask(
        self,
        noises: int,
        x: torch.Tensor,
        t: torch.Tensor,
        prompts: list[str],
        cameras: torch.Tensor | None,
        step: int,
        conditions: Conditions | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, Conditions, Prediction]:
        """So many noises of this step, x_t, both [K, B, C, H, W], what the prior is told, and what it
        predicts.

        Args: conditions: what it is told, where that is not `prompts` alone.
        """
        self.check(x, t, prompts)
        noise = self.streams.noises(noises, x, step)
        x_t = self.noised(x, noise, t)
        conditions = self.conditions(prompts, cameras) if conditions is None else conditions
        return noise, x_t, conditions, self.predict(x_t, t, conditions, cameras)

    def noised(self, x: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.schedule.mix(x, e, t) for e in noise])

    def x0(self, x_t: torch.Tensor, predicted: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.schedule.x0(x, p, t) for x, p in zip(x_t, predicted, strict=True)])

    def predict(
        self, x_t: torch.Tensor, t: torch.Tensor, conditions: Conditions, cameras: torch.Tensor | None
    ) -> Prediction:
        """All predictions of x_t [K, B, C, H, W] in one call of the prior.

        Raises: ValueError where a whole picture's prediction is not finite.
        """
        k, b = x_t.shape[:2]
        told = [
            conditions.text,
            conditions.null,
            *([] if conditions.negatives is None else conditions.negatives),
        ]
        rows = len(told) * k
        out = self.prior.predict_noise(
            x_t.flatten(0, 1).repeat(len(told), 1, 1, 1),
            t.to(x_t.device).repeat(rows),
            torch.cat([c.repeat(k, 1, 1) for c in told]),
            None if cameras is None else cameras.repeat(rows, 1),
        )
        if not torch.isfinite(out).flatten(1).any(1).all():
            raise ValueError(
                "--prior: expected finite predictions, got a picture of NaN alone. Check its files or its"
                " precision."
            )
        text, null, *others = out.unflatten(0, (len(told), k, b)).unbind(0)
        return Prediction(text, null, torch.stack(others) if others else None, conditions.weights)

    def residuals(
        self, x: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, x_t: torch.Tensor, prediction: Prediction
    ) -> torch.Tensor:
        s = self.settings
        sched = self.schedule
        predicted = prediction.guided(s.guidance_scale)
        if s.form == "sds":
            weight = sched.weight(t, s.weighting, x)
            return torch.stack([gradients.sds(p, e, weight) for p, e in zip(predicted, noise, strict=True)])
        if s.form == "recon":
            estimates = zip(self.x0(x_t, predicted, t), self.x0(x_t, prediction.text, t), strict=True)
            targets = (
                gradients.reconstruction_target(x0, x0_text, s.rescale, self.views)
                for x0, x0_text in estimates
            )
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
            raise ValueError(
                f"--reward: expected finite scores [{images.shape[0] * images.shape[1]}], got {got}. Check"
                " the reward."
            )
        return scores.unflatten(0, (images.shape[0], -1))

    def per_asset(self, numbers: torch.Tensor) -> torch.Tensor:
        return numbers.unflatten(1, (-1, self.views)).mean(2)

    def compare(self, residuals: torch.Tensor, grad: torch.Tensor) -> dict[str, torch.Tensor]:
        """Figures [A] of a gradient beside plain distillation over the same noises [K, B, ...]: their norms,
        and the cosine between distillation and what the preference adds to it.
        """
        base = residuals.mean(0)
        added = grad - base
        norms = norm_per_asset(base, self.views), norm_per_asset(added, self.views)
        inner = (base * added).reshape(-1, self.views * base[0].numel()).sum(1)
        return {
            "sds_norm": norms[0],
            "preference_norm": norms[1],
            "cosine": inner / (norms[0] * norms[1]).clamp_min(1e-30),
        }


class Guided:
    """What all methods are: a prior that is asked, and numbers of the last steps, by the name under which a
    state has them.
    """

    def __init__(self, prior: DiffusionPrior, settings: Any, *, views: int, streams: Streams):
        self.settings = settings
        self.denoiser = Denoiser(prior, settings.prior, views=views, streams=streams)
        self.kept: dict[str, Window] = {}

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {name: window.rows for name, window in self.kept.items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        for name, window in self.kept.items():
            window.rows = state[name].clone()


class Rewarded(Guided):
    """A method that asks a reward of so many views as an asset has, or of a share of them."""

    def __init__(
        self, prior: DiffusionPrior, settings: Any, *, views: int, streams: Streams, reward: RewardModel
    ):
        super().__init__(prior, settings, views=views, streams=streams)
        self.denoiser.check_reward(reward)
        self.reward = reward


# Which of K = 2 noises gave the better pictures: by a reward, by a judge, or by both. N assets, or pictures
# where views are ranked alone.


class Ranks(NamedTuple):
    """A ranking."""

    scores: torch.Tensor  # [2, N]; a judge's answer alone: 1 and 0
    winner: torch.Tensor  # [N] 0 or 1; -1: no answer
    gap: torch.Tensor  # [N] winner's score less the loser's; 0 where there is no answer


class Ranking:
    """Scores and ranks the pictures of two noises. An answer of a judge alone is a gap of 1."""

    def __init__(
        self,
        denoiser: Denoiser,
        reward: RewardModel | None,
        judge: PairwiseJudge | None,
        settings: RankingSettings,
    ):
        if reward is None and (judge is None or settings.judge_mode != "replace"):
            raise ValueError("--reward: expected a reward, or a judge that replaces it, got none. Name one.")
        if settings.pair_level == "view" and reward is not None and reward.views > 1:
            raise ValueError(
                f"--set pair_level=view: expected asset for a reward of {reward.views} views together. Use"
                " asset."
            )
        if reward is not None:
            denoiser.check_reward(reward)
        self.denoiser = denoiser
        self.reward = reward
        self.judge = judge
        self.settings = settings
        self.history = History()

    def __call__(self, images: torch.Tensor, prompts: list[str], cameras: torch.Tensor | None) -> Ranks:
        """Args: images [2, B, 3, h, w] in 0..1; prompts: one per picture; cameras [B, 16]."""
        s = self.settings
        views = self.denoiser.views if self.settings.pair_level == "asset" else 1
        scores = None if self.reward is None else self._score(images, told(self.reward, prompts, cameras))
        if self.judge is None:
            assert scores is not None
            first = scores[0] >= scores[1]
            return Ranks(scores, (~first).long(), (scores[0] - scores[1]).abs())
        answers = torch.tensor(self._answers(images, prompts, views), device=images.device)  # [N]
        votes = torch.stack([answers == 0, answers == 1]).to(images.dtype)  # [2, N]
        if scores is None or s.judge_mode == "replace":
            return Ranks(votes if scores is None else scores, answers, (answers >= 0).to(images.dtype))
        first = (scores[0] >= scores[1]) | (answers == 0)
        return Ranks(
            scores, (~first).long(), torch.where(first, scores[0] - scores[1], scores[1] - scores[0])
        )

    def _score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        scores = self.denoiser.score(self.reward, images, prompts)  # type: ignore[arg-type]
        scores = self.denoiser.per_asset(scores) if self.settings.pair_level == "asset" else scores
        return self.history.standardised(scores) if self.settings.standardise else scores

    def _answers(self, images: torch.Tensor, prompts: list[str], views: int) -> list[int]:
        first, second = images.unflatten(1, (-1, views)).unbind(0)  # [N, V, 3, h, w] each
        pairs = list(zip(first, second, strict=True))
        answers = self.judge.judge(prompts[::views], pairs)  # type: ignore[union-attr]
        if len(answers) != len(first) or not set(answers) <= {-1, 0, 1}:
            raise ValueError(
                f"--judge: expected {len(first)} answers of 0, 1 or -1, got {answers[:8]}. Check the judge."
            )
        return answers


class Ranked(Guided):
    """A method that ranks two noises, by a reward, a judge, or both."""

    def __init__(
        self,
        prior: DiffusionPrior,
        settings: Any,
        *,
        views: int,
        streams: Streams,
        reward: RewardModel | None = None,
        judge: PairwiseJudge | None = None,
    ):
        super().__init__(prior, settings, views=views, streams=streams)
        self.reward = reward
        self.ranking = Ranking(self.denoiser, reward, judge, settings.ranking)
        self.kept = {"scores": self.ranking.history}
