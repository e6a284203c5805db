"""Implements what all methods share: noising the views, predicting the noise with and without the prompt, and
scoring and ranking the estimated images.

Letters: K noises, A assets, V views of an asset, B = A V images, Q = 2 negative prompts of Perp-Neg, T tokens
and D entries of a conditioning.
"""

import math
from typing import Any, NamedTuple

import torch

from eg3d_rlhf.core.interfaces import DiffusionPrior, PairwiseJudge, RewardModel
from eg3d_rlhf.tuning.distill import gradients
from eg3d_rlhf.tuning.distill.gradients import History, Window, norm_per_asset
from eg3d_rlhf.tuning.distill.guidance.settings import DenoiserSettings, RankingSettings
from eg3d_rlhf.tuning.distill.schedule import NoiseSchedule, Streams

# --- viewing directions in words, for prompts, and Perp-Neg's mixture of prompts (Armandpour et al. 2023).
# Angles are in degrees; azimuth 0 is the front, and elevation is positive upwards.

DIRECTIONS = ("side", "front", "back", "overhead")
OVERHEAD = 60  # elevation above which a view is called overhead
# A negative prompt has the weight -(a exp(-b r) + c), where r is the share of the nearer view: (a, b, c).
FRONT_OF_FRONT_SIDE = SIDE_OF_FRONT_SIDE = (4.0, 0.5, -2.426)
SIDE_OF_SIDE_BACK = (1.0, 0.5, -0.606)
FRONT_OF_SIDE_BACK = (1.0, 0.5, 0.967)


def camera_angles(cameras: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return elevation and azimuth [B] in degrees of cameras [B, 16], which are cam2world matrices with y up
    that look at the origin. Azimuth 0 is +z, 90 is +x.
    """
    # The last column of cam2world is the camera's position, which gives the angles because it looks at the
    # origin.
    x, y, z = cameras.view(-1, 4, 4)[:, :3, 3].unbind(1)
    return torch.rad2deg(torch.atan2(y, torch.hypot(x, z))), torch.rad2deg(torch.atan2(x, z))


def _wrap_degrees(azimuth: float) -> float:
    """Return the same angle in -180..180."""
    # Python's % gives a result of the sign of 360, so negative angles work, too.
    return (azimuth + 180) % 360 - 180


def direction_of(elevation: float, azimuth: float, within: float = 45) -> str:
    """Return the direction of a view: front or back if it is less than `within` degrees away from it,
    overhead if the elevation exceeds OVERHEAD, else side. MVDream uses within 30.
    """
    angle = abs(_wrap_degrees(azimuth))
    if elevation > OVERHEAD:
        return "overhead"
    if angle > 180 - within:
        return "back"
    return "front" if angle < within else "side"


def reward_prompts(reward: RewardModel, prompts: list[str], cameras: torch.Tensor | None) -> list[str]:
    """Return the prompts that a reward gets for images [B]. They contain the viewing direction if the reward
    was trained in this way, as Reward3D was (with MVDream's thresholds).

    Raises: ValueError if the direction is needed and no cameras [B, 16] are given.
    """
    if not getattr(reward, "view_prompts", False):
        return prompts
    if cameras is None:
        raise ValueError(
            "--reward: the prompts of this reward contain the viewing direction, but there are no cameras."
            " Use a renderer that gives cameras."
        )
    # (prompt, elevation, azimuth) of each image
    views = zip(prompts, *(angle.tolist() for angle in camera_angles(cameras)), strict=True)
    return [f"{prompt}, {direction_of(elevation, azimuth, 30)} view" for prompt, elevation, azimuth in views]


def mixture(elevation: float, azimuth: float) -> tuple[dict[str, float], list[str | None], list[float]]:
    """Mix the prompts of one view for Perp-Neg.

    Returns: shares of directions in the prompt, directions of two negative prompts (None: the null prompt),
    and their weights <= 0.
    """
    if elevation > OVERHEAD:
        # From above there is no neighbouring direction to guide away from: weights of 0 switch Perp-Neg off.
        return {"overhead": 1.0}, [None, None], [0.0, 0.0]
    angle = abs(_wrap_degrees(azimuth))
    # r is the share of the nearer view: of the front below 90 degrees, of the side above.
    r = 1 - angle / 90 if angle < 90 else 2 - angle / 90
    if angle < 90:
        decays = _decay(FRONT_OF_FRONT_SIDE, r), _decay(SIDE_OF_FRONT_SIDE, 1 - r)
        return {"front": r, "side": 1 - r}, ["front", "side"], [-d for d in decays]
    decays = _decay(SIDE_OF_SIDE_BACK, r), _decay(FRONT_OF_SIDE_BACK, r)
    return {"side": r, "back": 1 - r}, ["side", "front"], [-d for d in decays]


def _decay(constants: tuple[float, float, float], r: float) -> float:
    """Compute a exp(-b r) + c."""
    a, b, c = constants
    return a * math.exp(-b * r) + c


class Conditioning(NamedTuple):
    """Conditioning tokens of the prior for each image."""

    text: torch.Tensor  # [B, T, D], of the prompts
    null: torch.Tensor  # [B, T, D], of the null prompt
    negatives: torch.Tensor | None = None  # [Q, B, T, D], of Perp-Neg's negative prompts
    weights: torch.Tensor | None = None  # [B, Q], weights of the negative prompts


class Prediction(Conditioning):
    """Predicted noises for each conditioning: [K, B, C, H, W], and [Q, K, B, C, H, W] for negative
    prompts.
    """

    def guided(self, scale: float) -> torch.Tensor:
        """Apply guidance with a scale, with Perp-Neg if there are negative prompts, [K, B, C, H, W]."""
        # Without Perp-Neg this is classifier-free guidance.
        if self.negatives is None or self.weights is None:
            return gradients.guided(self.text, self.null, scale)
        return torch.stack(
            [
                gradients.perp_neg(text, null, others, self.weights, scale)
                # One noise after the other; unbind(1), because negatives are [Q, K, ...].
                for text, null, others in zip(self.text, self.null, self.negatives.unbind(1), strict=True)
            ]
        )


class Denoiser:
    """A prior with its schedule and random streams, for assets of V views each."""

    def __init__(self, prior: DiffusionPrior, settings: DenoiserSettings, *, views: int, streams: Streams):
        if views < 1 or views % prior.views:
            raise ValueError(
                f"--set views={views}: expected a multiple of {prior.views}, because this prior needs"
                f" {prior.views} views of an asset. Change it."
            )
        self.prior = prior
        self.settings = settings
        self.views = views
        self.streams = streams
        self.schedule = NoiseSchedule(prior.alphas_cumprod)

    def check(self, x: torch.Tensor, t: torch.Tensor, prompts: list[str]) -> None:
        """Check the shapes of a step's latents, times and prompts."""
        # Errors of our own code, so assertions are enough.
        assert x.shape[1:] == tuple(self.prior.latent_shape) and len(x) % self.views == 0, (
            x.shape,
            self.prior.latent_shape,
            self.views,
        )
        assert len(prompts) == len(t) == len(x), (len(prompts), t.shape, x.shape)

    def check_reward(self, reward: RewardModel) -> None:
        """Raise ValueError if a reward needs another number of views."""
        if self.views % reward.views:
            together = (
                f"a multiple of {reward.views}, because the reward scores {reward.views} views together"
            )
            raise ValueError(f"--set views={self.views}: expected {together}. Change it.")

    def conditioning(self, prompts: list[str], cameras: torch.Tensor | None) -> Conditioning:
        """Embed the prompts of each image, the null prompt, and negative prompts if Perp-Neg is used.

        Raises: ValueError if prompts contain the viewing direction and no cameras [B, 16] are given.
        """
        s = self.settings
        prior = self.prior
        # An empty negative prompt gives the null prompt.
        negative = [s.negative_prompt] * len(prompts)
        if not s.view_prompts:
            return Conditioning(prior.embed(prompts), prior.embed(negative))
        if cameras is None:
            raise ValueError(
                "--set view_prompts=True: the viewing direction needs cameras, but there are none. Use"
                " --set view_prompts=False."
            )
        # (elevation, azimuth) of each image
        views = list(zip(*(angle.tolist() for angle in camera_angles(cameras)), strict=True))
        directions = [direction_of(*view) for view in views]
        # The null prompt contains no direction, because guidance would push images away from it. threestudio
        # omits it, too.
        null = prior.embed(negative)
        if not s.perp_neg:
            return Conditioning(prior.embed(prompts, directions), null)
        mixtures = [mixture(*view) for view in views]
        # The embedding of a prompt is a mean over directions, weighted by their shares: [B, T, D].
        text = torch.stack(
            [
                torch.stack([share * prior.embed([prompt], [side])[0] for side, share in shares.items()]).sum(
                    0
                )
                for prompt, (shares, _, _) in zip(prompts, mixtures, strict=True)
            ]
        )
        # [Q, B, T, D]: for every image the first negative prompt, then for every image the second one.
        negatives = torch.stack(
            [
                torch.stack(
                    [
                        null[b] if (side := m[1][i]) is None else prior.embed([prompts[b]], [side])[0]
                        for b, m in enumerate(mixtures)
                    ]
                )
                for i in range(2)
            ]
        )
        return Conditioning(
            text, null, negatives, torch.tensor([weights for *_, weights in mixtures]).to(text)
        )

    def noise_and_predict(
        self,
        noises: int,
        x: torch.Tensor,
        t: torch.Tensor,
        prompts: list[str],
        cameras: torch.Tensor | None,
        step: int,
        conditioning: Conditioning | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, Conditioning, Prediction]:
        """Noise latents with `noises` noises of this step, and predict these.

        Args:
            noises: K.
            x: latents [B, C, H, W].
            t: [B].
            prompts: one per image.
            cameras: [B, 16] or None.
            step: of the run.
            conditioning: in place of that of the prompts.

        Returns: noise and x_t, both [K, B, C, H, W], the conditioning, and the prediction.
        """
        self.check(x, t, prompts)
        # [K, B, C, H, W], the same for all arms of a comparison
        noise = self.streams.noises(noises, x, step)
        x_t = self.noised(x, noise, t)
        conditioning = self.conditioning(prompts, cameras) if conditioning is None else conditioning
        return noise, x_t, conditioning, self.predict(x_t, t, conditioning, cameras)

    def noised(self, x: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Noise latents [B, C, H, W] with each noise, [K, B, C, H, W]."""
        return torch.stack([self.schedule.mix(x, e, t) for e in noise])

    def x0(self, x_t: torch.Tensor, predicted: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Estimate the latents without noise in one step, [K, B, C, H, W]."""
        return torch.stack([self.schedule.x0(x, p, t) for x, p in zip(x_t, predicted, strict=True)])

    def predict(
        self, x_t: torch.Tensor, t: torch.Tensor, conditioning: Conditioning, cameras: torch.Tensor | None
    ) -> Prediction:
        """Predict the noises of x_t [K, B, C, H, W] for every conditioning, in one call of the prior.

        Raises: ValueError if the prediction of an image contains no finite number.
        """
        # All predictions are one batch: a GPU is used better, and the prior sees all views of an asset
        # together.
        k, b = x_t.shape[:2]
        inputs = [
            conditioning.text,
            conditioning.null,
            *([] if conditioning.negatives is None else conditioning.negatives),
        ]
        rows = len(inputs) * k
        # Order of the batch: conditioning, then noise, then image, [len(inputs) K B, ...].
        out = self.prior.predict_noise(
            x_t.flatten(0, 1).repeat(len(inputs), 1, 1, 1),
            t.to(x_t.device).repeat(rows),
            torch.cat([c.repeat(k, 1, 1) for c in inputs]),
            None if cameras is None else cameras.repeat(rows, 1),
        )
        # Single NaN values are replaced later (gradients.target_loss); an image of NaN only is an error of
        # the prior.
        if not torch.isfinite(out).flatten(1).any(1).all():
            raise ValueError(
                "--prior: the prediction of an image is NaN in all pixels. Check the prior's files, or use"
                " --set amp=off."
            )
        text, null, *negatives = out.unflatten(0, (len(inputs), k, b)).unbind(0)
        return Prediction(text, null, torch.stack(negatives) if negatives else None, conditioning.weights)

    def residuals(
        self, x: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, x_t: torch.Tensor, prediction: Prediction
    ) -> torch.Tensor:
        """Compute the gradient of each noise in the settings' form, [K, B, C, H, W]."""
        s = self.settings
        sched = self.schedule
        predicted = prediction.guided(s.guidance_scale)
        if s.form == "sds":
            # Only this form is weighted by time.
            weight = sched.weight(t, s.weighting, x)
            return torch.stack([gradients.sds(p, e, weight) for p, e in zip(predicted, noise, strict=True)])
        if s.form == "recon":
            # MVDream rescales the guided estimate to the standard deviation of the estimate without guidance.
            estimates = zip(self.x0(x_t, predicted, t), self.x0(x_t, prediction.text, t), strict=True)
            targets = (
                gradients.reconstruction_target(x0, x0_text, s.rescale, self.views)
                for x0, x0_text in estimates
            )
            return torch.stack([gradients.reconstruction(x, target) for target in targets])
        # u = s / a, the noise level of score Jacobian chaining.
        bar = sched.alpha(t, x)
        u = ((1 - bar) / bar).sqrt()
        # sjc-plain keeps the noise in the difference.
        variance_reduced = s.form == "sjc"
        pairs = zip(noise, predicted, strict=True)
        return torch.stack(
            [gradients.sjc(x, x + u * e, p, u, variance_reduced=variance_reduced) for e, p in pairs]
        )

    def score(self, reward: RewardModel, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Score images [K, B, 3, h, w], [K, B].

        Raises: ValueError for scores that are not finite, or not one per image.
        """
        # [K B]: the prompts are repeated for every noise.
        scores = reward.score(images.flatten(0, 1), prompts * len(images))
        if scores.shape != (images.shape[0] * images.shape[1],) or not torch.isfinite(scores).all():
            actual = f"{list(scores.shape)}" + ("" if torch.isfinite(scores).all() else " with NaN")
            raise ValueError(
                f"--reward: expected finite scores [{images.shape[0] * images.shape[1]}], got {actual}."
                " Check the reward."
            )
        return scores.unflatten(0, (images.shape[0], -1))

    def per_asset(self, numbers: torch.Tensor) -> torch.Tensor:
        """Average numbers [K, B] over the views of each asset, [K, A]."""
        # [K, B] to [K, A, V]
        return numbers.unflatten(1, (-1, self.views)).mean(2)

    def compare(self, residuals: torch.Tensor, grad: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compare a gradient with plain distillation over the same noises [K, B, ...].

        Returns: figures [A]: the norm of distillation, the norm of what the preference adds, and the cosine
        between both.
        """
        # Plain distillation averages over its noises.
        base = residuals.mean(0)
        added = grad - base
        norms = norm_per_asset(base, self.views), norm_per_asset(added, self.views)
        # Inner product per asset over all its views, [A].
        inner = (base * added).reshape(-1, self.views * base[0].numel()).sum(1)
        return {
            "sds_norm": norms[0],
            "preference_norm": norms[1],
            "cosine": inner / (norms[0] * norms[1]).clamp_min(1e-30),
        }


class Guided:
    """Base of all methods: a denoiser, and windows of numbers of the last steps, by their names in
    checkpoints.
    """

    def __init__(self, prior: DiffusionPrior, settings: Any, *, views: int, streams: Streams):
        self.settings = settings
        self.denoiser = Denoiser(prior, settings.prior, views=views, streams=streams)
        self.windows: dict[str, Window] = {}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the numbers of all windows."""
        return {name: window.rows for name, window in self.windows.items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore the numbers of all windows."""
        for name, window in self.windows.items():
            window.rows = state[name].clone()


class Rewarded(Guided):
    """Base of methods with a reward of images. It scores all views of an asset together, or a divisor
    of them.
    """

    def __init__(
        self, prior: DiffusionPrior, settings: Any, *, views: int, streams: Streams, reward: RewardModel
    ):
        super().__init__(prior, settings, views=views, streams=streams)
        # At the start, not in the first step: loading a prior takes minutes.
        self.denoiser.check_reward(reward)
        self.reward = reward


# --- ranking of the images of K = 2 noises by a reward, a judge, or both. N is the number of assets, or of
# images if views are ranked one by one.


class Ranks(NamedTuple):
    """Result of a ranking."""

    scores: torch.Tensor  # [2, N]; without a reward 1 for the judge's choice and 0 for the other
    winner: torch.Tensor  # [N] 0 or 1; -1: the judge gave no answer
    gap: torch.Tensor  # [N] winner's score minus the loser's; 0 without an answer


class Ranking:
    """Scores and ranks the images of two noises. If only a judge ranks them, the gap is 1."""

    def __init__(
        self,
        denoiser: Denoiser,
        reward: RewardModel | None,
        judge: PairwiseJudge | None,
        settings: RankingSettings,
    ):
        if reward is None and (judge is None or settings.judge_mode != "replace"):
            raise ValueError("--reward: this method needs a reward, or a judge that replaces it. Name one.")
        # A multi-view reward has no score of a single view.
        if settings.pair_level == "view" and reward is not None and reward.views > 1:
            raise ValueError(
                f"--set pair_level=view: the reward scores {reward.views} views together, so views cannot be"
                " ranked one by one. Use pair_level=asset."
            )
        if reward is not None:
            denoiser.check_reward(reward)
        self.denoiser = denoiser
        self.reward = reward
        self.judge = judge
        self.settings = settings
        self.history = History()

    def __call__(self, images: torch.Tensor, prompts: list[str], cameras: torch.Tensor | None) -> Ranks:
        """Rank the images of two noises.

        Args:
            images: [2, B, 3, h, w] in 0..1.
            prompts: one per image.
            cameras: [B, 16] or None.
        """
        s = self.settings
        views = self.denoiser.views if self.settings.pair_level == "asset" else 1
        scores = (
            None
            if self.reward is None
            else self._score(images, reward_prompts(self.reward, prompts, cameras))
        )
        if self.judge is None:
            assert scores is not None
            # Of equal scores the first noise wins, as torch.argsort(stable=True) does elsewhere.
            first = scores[0] >= scores[1]
            return Ranks(scores, (~first).long(), (scores[0] - scores[1]).abs())
        answers = torch.tensor(self._answers(images, prompts, views), device=images.device)  # [N]
        # No answer, -1, gives 0 for both.
        votes = torch.stack([answers == 0, answers == 1]).to(images.dtype)  # [2, N]
        # A judge gives no size of the gap, so an answer counts as 1 and no answer as 0.
        if scores is None or s.judge_mode == "replace":
            return Ranks(votes if scores is None else scores, answers, (answers >= 0).to(images.dtype))
        # The first noise wins if the reward or the judge prefers it, as in DreamDPO's code.
        first = (scores[0] >= scores[1]) | (answers == 0)
        return Ranks(
            scores, (~first).long(), torch.where(first, scores[0] - scores[1], scores[1] - scores[0])
        )

    def _score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Score images [2, B, 3, h, w], [2, N]."""
        scores = self.denoiser.score(self.reward, images, prompts)  # type: ignore[arg-type]
        scores = self.denoiser.per_asset(scores) if self.settings.pair_level == "asset" else scores
        return self.history.standardise(scores) if self.settings.standardise else scores

    def _answers(self, images: torch.Tensor, prompts: list[str], views: int) -> list[int]:
        """Return the judge's answers [N]: 0, 1, or -1. Raises: ValueError for other answers."""
        first, second = images.unflatten(1, (-1, views)).unbind(0)  # [N, V, 3, h, w] each
        # A judge sees all views of an asset together, or single views.
        pairs = list(zip(first, second, strict=True))
        answers = self.judge.judge(prompts[::views], pairs)  # type: ignore[union-attr]
        if len(answers) != len(first) or not set(answers) <= {-1, 0, 1}:
            raise ValueError(
                f"--judge: expected {len(first)} answers of 0, 1 or -1, got {answers[:8]}. Check the judge."
            )
        return answers


class Ranked(Guided):
    """Base of the methods that rank two noises by a reward or by a judge."""

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
        self.windows = {"scores": self.ranking.history}
