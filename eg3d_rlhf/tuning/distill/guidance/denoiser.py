"""Implements the steps that all distillation methods share.

These are adding noise to the latents of the views, predicting the noise with and without the prompt,
computing the gradient of score distillation, and scoring and ranking the images that the prior estimates.

Shapes: K noises; A = number of assets; V views of an asset; B = A V images, with the views of an asset
adjacent; Q = 2 negative prompts of Perp-Neg; T tokens of a conditioning with D entries each; C, H, W
channels, rows and columns of latents; h, w rows and columns of images.
"""

import math
from typing import Any, NamedTuple

import torch

from eg3d_rlhf.core.interfaces import DiffusionPrior, PairwiseJudge, RewardModel
from eg3d_rlhf.tuning.distill import gradients
from eg3d_rlhf.tuning.distill.gradients import History, Window, norm_per_asset
from eg3d_rlhf.tuning.distill.guidance.settings import DenoiserSettings, RankingSettings
from eg3d_rlhf.tuning.distill.schedule import NoiseSchedule, Streams

# --- viewing directions in words, for prompts, and the mixture of prompts of Perp-Neg (Armandpour et al.
# 2023). Angles are in degrees; azimuth 0 is the front, and elevation is positive upwards.

DIRECTIONS = ("side", "front", "back", "overhead")
OVERHEAD = 60  # elevation in degrees above which a view is called overhead
# The weight of a negative prompt is -(a exp(-b r) + c), where r is the share of the nearer view. These are
# the constants (a, b, c) of the published code. X_OF_Y_Z is for the negative prompt "X view", if the camera
# is between the directions Y and Z.
FRONT_OF_FRONT_SIDE = SIDE_OF_FRONT_SIDE = (4.0, 0.5, -2.426)
SIDE_OF_SIDE_BACK = (1.0, 0.5, -0.606)
FRONT_OF_SIDE_BACK = (1.0, 0.5, 0.967)


def camera_angles(cameras: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the elevation [B] and the azimuth [B] of cameras, in degrees.

    Args:
        cameras: [B, 16], cam2world matrices of cameras that look at the origin. y points upwards; a camera on
            the z axis has the azimuth 0, a camera on the x axis 90.
    """
    # The last column of cam2world is the camera's position. It determines the angles, since the camera looks
    # at the origin.
    x, y, z = cameras.view(-1, 4, 4)[:, :3, 3].unbind(1)
    return torch.rad2deg(torch.atan2(y, torch.hypot(x, z))), torch.rad2deg(torch.atan2(x, z))


def _wrap_degrees(azimuth: float) -> float:
    """Return the equivalent angle in -180..180 degrees."""
    # Python's % has the sign of the divisor 360, so this is correct for negative angles, too.
    return (azimuth + 180) % 360 - 180


def view_direction(elevation: float, azimuth: float, largest_angle: float = 45) -> str:
    """Return the name of the direction from which a camera sees the asset, one of `DIRECTIONS`.

    Args:
        elevation: elevation of the camera in degrees. Above OVERHEAD, the direction is "overhead".
        azimuth: azimuth of the camera in degrees.
        largest_angle: largest angle in degrees between the camera and the exact front or back at which the
            direction is "front" or "back". At larger angles it is "side". MVDream uses 30.
    """
    angle_to_front = abs(_wrap_degrees(azimuth))
    if elevation > OVERHEAD:
        return "overhead"
    if angle_to_front > 180 - largest_angle:
        return "back"
    return "front" if angle_to_front < largest_angle else "side"


def reward_prompts(reward: RewardModel, prompts: list[str], cameras: torch.Tensor | None) -> list[str]:
    """Return the prompts with which a reward scores images.

    If the reward was trained on prompts that name the viewing direction, as Reward3D was, the direction is
    appended to each prompt.

    Args:
        reward: reward of images.
        prompts: B prompts, one for each image.
        cameras: [B, 16], cam2world matrices, or None.
    Raises: ValueError if the reward needs the direction and `cameras` is None.
    """
    if not getattr(reward, "view_prompts", False):
        return prompts
    if cameras is None:
        raise ValueError(
            "--reward: this reward needs prompts with the viewing direction, but the cameras of the images"
            " are missing. Pass cameras [B, 16], or use another reward."
        )
    elevations, azimuths = (angle.tolist() for angle in camera_angles(cameras))
    # 30 degrees is the threshold of MVDream, with which Reward3D was trained.
    return [
        f"{prompt}, {view_direction(elevation, azimuth, 30)} view"
        for prompt, elevation, azimuth in zip(prompts, elevations, azimuths, strict=True)
    ]


def mixture(elevation: float, azimuth: float) -> tuple[dict[str, float], list[str | None], list[float]]:
    """Return the viewing directions that Perp-Neg mixes for one view, with their shares and weights.

    Args:
        elevation: elevation of the camera in degrees.
        azimuth: azimuth of the camera in degrees.
    Returns: three results. The first is a dictionary from a viewing direction to its share in the positive
    prompt. The second is a list of the viewing directions of the two negative prompts; None in this list is
    the null prompt. The third is a list of the weights of the two negative prompts, which are <= 0.
    """
    if elevation > OVERHEAD:
        # A view from above has no neighbouring direction. The weights 0 switch Perp-Neg off.
        return {"overhead": 1.0}, [None, None], [0.0, 0.0]
    angle_to_front = abs(_wrap_degrees(azimuth))
    # Below 90 degrees the camera is between front and side, and r is the share of the front.
    if angle_to_front < 90:
        r = 1 - angle_to_front / 90
        decays = _decay(FRONT_OF_FRONT_SIDE, r), _decay(SIDE_OF_FRONT_SIDE, 1 - r)
        return {"front": r, "side": 1 - r}, ["front", "side"], [-decay for decay in decays]
    # Above 90 degrees it is between side and back, and r is the share of the side.
    r = 2 - angle_to_front / 90
    decays = _decay(SIDE_OF_SIDE_BACK, r), _decay(FRONT_OF_SIDE_BACK, r)
    return {"side": r, "back": 1 - r}, ["side", "front"], [-decay for decay in decays]


def _decay(constants: tuple[float, float, float], r: float) -> float:
    """Compute a exp(-b r) + c for the constants (a, b, c)."""
    a, b, c = constants
    return a * math.exp(-b * r) + c


class Conditioning(NamedTuple):
    """Conditioning tokens of each image: of its prompt, of the null prompt, and of negative prompts."""

    text: torch.Tensor  # [B, T, D], tokens of the prompts
    null: torch.Tensor  # [B, T, D], tokens of the null prompt
    negatives: torch.Tensor | None = None  # [Q, B, T, D], tokens of Perp-Neg's negative prompts
    weights: torch.Tensor | None = None  # [B, Q], weights of the negative prompts


class Prediction(Conditioning):
    """Noises that the prior predicts, for each conditioning.

    `text` and `null` are [K, B, C, H, W], `negatives` is [Q, K, B, C, H, W], and `weights` is [B, Q].
    """

    def guided(self, guidance_scale: float) -> torch.Tensor:
        """Return the predicted noises with guidance, [K, B, C, H, W].

        The guidance is Perp-Neg if there are negative prompts, else classifier-free guidance.

        Args:
            guidance_scale: guidance scale. Scale 1 of classifier-free guidance gives the prediction for the
                prompt.
        """
        if self.negatives is None or self.weights is None:
            return gradients.guided(self.text, self.null, guidance_scale)
        # Each noise on its own. unbind(1) splits along the noises, because the negatives are [Q, K, ...].
        negatives_by_noise = self.negatives.unbind(1)
        return torch.stack(
            [
                gradients.perp_neg(text, null, negatives, self.weights, guidance_scale)
                for text, null, negatives in zip(self.text, self.null, negatives_by_noise, strict=True)
            ]
        )


class Denoiser:
    """A prior with its noise schedule and random streams, which noises latents and predicts the noise.

    Args:
        prior: diffusion model.
        settings: settings of the predictions.
        views: number V of views of each asset.
        streams: random streams of the run.
    Raises: ValueError if the prior cannot process V views.
    """

    def __init__(self, prior: DiffusionPrior, settings: DenoiserSettings, *, views: int, streams: Streams):
        if views < 1 or views % prior.views:
            raise ValueError(
                f"--set views={views} does not fit this prior, which processes {prior.views} views of an"
                f" asset together. Use a multiple of {prior.views}."
            )
        self.prior = prior
        self.settings = settings
        self.views = views
        self.streams = streams
        self.schedule = NoiseSchedule(prior.alphas_cumprod)

    def check(self, x: torch.Tensor, t: torch.Tensor, prompts: list[str]) -> None:
        """Assert that the latents, times and prompts of a step have matching shapes."""
        # Assertions and not errors for users, because only our own code can violate this.
        assert x.shape[1:] == tuple(self.prior.latent_shape) and len(x) % self.views == 0, (
            x.shape,
            self.prior.latent_shape,
            self.views,
        )
        assert len(prompts) == len(t) == len(x), (len(prompts), t.shape, x.shape)

    def check_reward(self, reward: RewardModel) -> None:
        """Raise ValueError if a reward cannot score V views of an asset."""
        if self.views % reward.views:
            raise ValueError(
                f"--set views={self.views} does not fit the reward, which scores {reward.views} views of an"
                f" asset together. Use a multiple of {reward.views}."
            )

    def conditioning(self, prompts: list[str], cameras: torch.Tensor | None) -> Conditioning:
        """Embed the prompts of the images, the null prompt, and the negative prompts if Perp-Neg is used.

        Args:
            prompts: B prompts, one for each image.
            cameras: [B, 16], cam2world matrices, or None.
        Raises: ValueError if the setting view_prompts is True and `cameras` is None.
        """
        settings = self.settings
        prior = self.prior
        # Classifier-free guidance uses the negative prompt in place of the null prompt. It is empty by
        # default, which is the null prompt.
        negative_prompts = [settings.negative_prompt] * len(prompts)
        if not settings.view_prompts:
            return Conditioning(prior.embed(prompts), prior.embed(negative_prompts))
        if cameras is None:
            raise ValueError(
                "--set view_prompts=True needs the cameras of the images, which are missing. Use"
                " --set view_prompts=False, or pass cameras [B, 16]."
            )
        elevations, azimuths = (angle.tolist() for angle in camera_angles(cameras))
        angles = list(zip(elevations, azimuths, strict=True))  # (elevation, azimuth) of each image
        directions = [view_direction(elevation, azimuth) for elevation, azimuth in angles]
        # No direction is appended to the null prompt, because guidance would move images away from that
        # direction. threestudio does the same.
        null_tokens = prior.embed(negative_prompts)
        if not settings.perp_neg:
            return Conditioning(prior.embed(prompts, directions), null_tokens)
        mixtures = [mixture(elevation, azimuth) for elevation, azimuth in angles]
        text_embeddings = []
        first_negatives: list[torch.Tensor] = []
        second_negatives: list[torch.Tensor] = []
        for prompt, prompt_null, (shares, negative_directions, _) in zip(
            prompts, null_tokens, mixtures, strict=True
        ):
            # The embedding of a prompt is the sum over directions, weighted by their shares, [T, D].
            weighted_embeddings = [
                share * prior.embed([prompt], [direction])[0] for direction, share in shares.items()
            ]
            text_embeddings.append(torch.stack(weighted_embeddings).sum(0))
            for negatives, direction in zip(
                (first_negatives, second_negatives), negative_directions, strict=True
            ):
                # None stands for the null prompt.
                negatives.append(prompt_null if direction is None else prior.embed([prompt], [direction])[0])
        text_tokens = torch.stack(text_embeddings)  # [B, T, D]
        # [Q, B, T, D]
        negative_tokens = torch.stack([torch.stack(first_negatives), torch.stack(second_negatives)])
        negative_weights = torch.tensor([weights for _, _, weights in mixtures]).to(text_tokens)  # [B, Q]
        return Conditioning(text_tokens, null_tokens, negative_tokens, negative_weights)

    def noise_and_predict(
        self,
        noise_count: int,
        x: torch.Tensor,
        t: torch.Tensor,
        prompts: list[str],
        cameras: torch.Tensor | None,
        step: int,
        conditioning: Conditioning | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, Conditioning, Prediction]:
        """Add the K noises of a step to latents, and predict the noises from the result.

        Args:
            noise_count: number K of noises.
            x: [B, C, H, W], clean latents.
            t: [B] integers in 0..999, times.
            prompts: B prompts, one for each image.
            cameras: [B, 16], cam2world matrices, or None.
            step: number of the step in the run, which determines the noises.
            conditioning: conditioning to use; None to embed the prompts.
        Returns: four results. The first is the added noises, [K, B, C, H, W]. The second is the noised
        latents x_t, [K, B, C, H, W]. The third is the conditioning, and the fourth is the prediction.
        """
        self.check(x, t, prompts)
        # [K, B, C, H, W]; all arms of a comparison have the same noises.
        noise = self.streams.noises(noise_count, x, step)
        x_t = self.noised(x, noise, t)
        conditioning = self.conditioning(prompts, cameras) if conditioning is None else conditioning
        return noise, x_t, conditioning, self.predict(x_t, t, conditioning, cameras)

    def noised(self, x: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Add each of K noises [K, B, C, H, W] to latents x [B, C, H, W] at times t [B].

        Returns: noised latents x_t, [K, B, C, H, W].
        """
        return torch.stack([self.schedule.mix(x, e, t) for e in noise])

    def x0(self, x_t: torch.Tensor, predicted_noises: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Estimate the clean latents in one step, [K, B, C, H, W].

        Args:
            x_t: [K, B, C, H, W], noised latents.
            predicted_noises: [K, B, C, H, W], predicted noises.
            t: [B], times.
        """
        # The schedule computes one noise at a time.
        return torch.stack([self.schedule.x0(x, p, t) for x, p in zip(x_t, predicted_noises, strict=True)])

    def predict(
        self, x_t: torch.Tensor, t: torch.Tensor, conditioning: Conditioning, cameras: torch.Tensor | None
    ) -> Prediction:
        """Predict the noises of noised latents for every conditioning.

        Args:
            x_t: [K, B, C, H, W], noised latents.
            t: [B], times.
            conditioning: tokens of the prompts, of the null prompt and of negative prompts.
            cameras: [B, 16], cam2world matrices, or None.
        Raises: ValueError if the prediction of an image contains no finite number.
        """
        noise_count, image_count = x_t.shape[:2]  # K, B
        input_tokens = [conditioning.text, conditioning.null]
        if conditioning.negatives is not None:
            input_tokens += list(conditioning.negatives)
        repeat_count = len(input_tokens) * noise_count
        # One call with one large batch, which uses a GPU better than many small batches. Its order is:
        # conditioning inputs, then noises, then images, [len(input_tokens) K B, ...].
        predicted_noises = self.prior.predict_noise(
            x_t.flatten(0, 1).repeat(len(input_tokens), 1, 1, 1),
            t.to(x_t.device).repeat(repeat_count),
            torch.cat([tokens.repeat(noise_count, 1, 1) for tokens in input_tokens]),
            None if cameras is None else cameras.repeat(repeat_count, 1),
        )
        # A few NaN values are replaced later, by gradients.target_loss. If all values of an image are NaN,
        # the prior has failed.
        if not torch.isfinite(predicted_noises).flatten(1).any(1).all():
            raise ValueError(
                "--prior: the prediction for an image contains NaN or infinity only. Use --set amp=off for"
                " float32, or copy the prior's files again if they are damaged."
            )
        text_prediction, null_prediction, *negatives = predicted_noises.unflatten(
            0, (len(input_tokens), noise_count, image_count)
        ).unbind(0)
        return Prediction(
            text_prediction,
            null_prediction,
            torch.stack(negatives) if negatives else None,
            conditioning.weights,
        )

    def residuals(
        self, x: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, x_t: torch.Tensor, prediction: Prediction
    ) -> torch.Tensor:
        """Compute the gradient of score distillation for each noise, by the formula of the setting `form`.

        Args:
            x: [B, C, H, W], clean latents.
            noise: [K, B, C, H, W], added noises.
            t: [B], times.
            x_t: [K, B, C, H, W], noised latents.
            prediction: predicted noises.
        Returns: [K, B, C, H, W].
        """
        settings = self.settings
        predicted_noises = prediction.guided(settings.guidance_scale)
        # p and e are the predicted and the added noise, as in gradients.py.
        if settings.form == "sds":
            time_weight = self.schedule.weight(t, settings.weighting, x)
            return torch.stack(
                [gradients.sds(p, e, time_weight) for p, e in zip(predicted_noises, noise, strict=True)]
            )
        if settings.form == "recon":
            # MVDream rescales the estimate with guidance by the standard deviation of the estimate without
            # it.
            guided_estimates = self.x0(x_t, predicted_noises, t)
            text_estimates = self.x0(x_t, prediction.text, t)
            residuals = []
            for x0, x0_text in zip(guided_estimates, text_estimates, strict=True):
                target = gradients.reconstruction_target(x0, x0_text, settings.rescale, self.views)
                residuals.append(gradients.reconstruction(x, target))
            return torch.stack(residuals)
        # u = s / a, the noise level of score Jacobian chaining, whose noised latents are x + u e.
        bar = self.schedule.alpha(t, x)
        u = ((1 - bar) / bar).sqrt()
        variance_reduced = settings.form == "sjc"  # False for sjc-plain
        return torch.stack(
            [
                gradients.sjc(x, x + u * e, p, u, variance_reduced=variance_reduced)
                for e, p in zip(noise, predicted_noises, strict=True)
            ]
        )

    def score(self, reward: RewardModel, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Score the images of K noises.

        Args:
            reward: reward of images.
            images: [K, B, 3, h, w] in 0..1.
            prompts: B prompts, one for each image of a noise.
        Returns: [K, B].
        Raises: ValueError if the reward does not return one finite score for each image.
        """
        image_count = images.shape[0] * images.shape[1]
        scores = reward.score(images.flatten(0, 1), prompts * len(images))  # [K B]
        if scores.shape != (image_count,):
            raise ValueError(
                f"--reward: the reward returned scores of the shape {list(scores.shape)} for {image_count}"
                f" images. It must return one score for each image, [{image_count}]. Use another reward."
            )
        if not torch.isfinite(scores).all():
            raise ValueError(
                "--reward: the reward returned a score that is NaN or infinite. Use another reward, or --set"
                " amp=off."
            )
        return scores.unflatten(0, (images.shape[0], -1))

    def per_asset(self, image_values: torch.Tensor) -> torch.Tensor:
        """Average values [K, B] over the views of each asset, [K, A]."""
        return image_values.unflatten(1, (-1, self.views)).mean(2)  # mean of [K, A, V]

    def compare(self, residuals: torch.Tensor, grad: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compare the gradient of a method with score distillation over the same noises.

        Args:
            residuals: [K, B, C, H, W], gradients of score distillation.
            grad: [B, C, H, W], gradient of the method.
        Returns: dictionary from the name of a metric to its values [A], for the log. "sds_norm" is the norm
        of the mean of `residuals`. "preference_norm" is the norm of the difference between `grad` and that
        mean. "cosine" is the cosine of the angle between the mean and the difference.
        """
        mean_residual = residuals.mean(0)
        preference_term = grad - mean_residual
        base_norm = norm_per_asset(mean_residual, self.views)
        added_norm = norm_per_asset(preference_term, self.views)
        # Inner product over all views of an asset, [A].
        inner_products = (
            (mean_residual * preference_term).reshape(-1, self.views * mean_residual[0].numel()).sum(1)
        )
        return {
            "sds_norm": base_norm,
            "preference_norm": added_norm,
            # clamp_min: the cosine is 0 if one of the norms is 0.
            "cosine": inner_products / (base_norm * added_norm).clamp_min(1e-30),
        }


class Guided:
    """Base class of all distillation methods: their denoiser, and the numbers that checkpoints store.

    `windows` contains the numbers of the last steps that a method needs, by their keys in checkpoints.

    Args:
        prior: diffusion model.
        settings: settings of the method.
        views: number of views of an asset.
        streams: random streams of the run.
    """

    def __init__(self, prior: DiffusionPrior, settings: Any, *, views: int, streams: Streams):
        self.settings = settings
        self.denoiser = Denoiser(prior, settings.prior, views=views, streams=streams)
        self.windows: dict[str, Window] = {}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the state for checkpoints: the tensor of each window, by its key."""
        return {name: window.rows for name, window in self.windows.items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore the result of `state_dict`."""
        for name, window in self.windows.items():
            window.rows = state[name].clone()


class Rewarded(Guided):
    """Base class of the methods that need a reward of images.

    Args:
        prior: diffusion model.
        settings: settings of the method.
        views: number of views of an asset. It is a multiple of the number that the reward scores together.
        streams: random streams of the run.
        reward: reward of images.
    Raises: ValueError if the reward cannot score this number of views.
    """

    def __init__(
        self, prior: DiffusionPrior, settings: Any, *, views: int, streams: Streams, reward: RewardModel
    ):
        super().__init__(prior, settings, views=views, streams=streams)
        self.denoiser.check_reward(reward)  # here and not in the first step, so that an error appears early
        self.reward = reward


# --- ranking of the images of K = 2 noises by a reward, a judge, or both. N is the number of ranked units:
# assets, or images with pair_level=view.


class Ranks(NamedTuple):
    """Result of a ranking of two noises: their scores, the preferred noise, and the gap of the scores."""

    # [2, N]; without a reward, 1 for the noise that the judge prefers and 0 for the other noise.
    scores: torch.Tensor
    winner: torch.Tensor  # [N] index of the preferred noise, 0 or 1; -1 if the judge gave no answer
    # [N] score of the winner minus that of the loser. By a judge: 1, or 0 if it gave no answer.
    gap: torch.Tensor


class Ranking:
    """Scores and ranks the images of two noises, by a reward, a judge, or both.

    Args:
        denoiser: denoiser, from which the number of views is read.
        reward: reward of images, or None if a judge replaces it.
        judge: judge that ranks pairs of images, or None.
        settings: settings of the ranking.
    Raises: ValueError if neither a reward nor a judge can rank images, or if the reward does not fit the
    views.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        reward: RewardModel | None,
        judge: PairwiseJudge | None,
        settings: RankingSettings,
    ):
        if reward is None and judge is None:
            raise ValueError(
                "--reward is missing. Name a reward with --reward, or a judge with --judge and --set"
                " judge_mode=replace."
            )
        if reward is None and settings.judge_mode != "replace":
            raise ValueError(
                f"--reward is missing, which --set judge_mode={settings.judge_mode} needs besides the judge."
                " Name a reward with --reward, or use --set judge_mode=replace."
            )
        if settings.pair_level == "view" and reward is not None and reward.views > 1:
            raise ValueError(
                f"--set pair_level=view cannot be combined with this reward, which scores {reward.views}"
                " views of an asset together. Use --set pair_level=asset."
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
            images: [2, B, 3, h, w] in 0..1, images that the prior estimates from the two noises.
            prompts: B prompts, one for each image of a noise.
            cameras: [B, 16], cam2world matrices, or None.
        """
        settings = self.settings
        views_per_unit = self.denoiser.views if self.settings.pair_level == "asset" else 1
        scores = None
        if self.reward is not None:
            scores = self._score(images, reward_prompts(self.reward, prompts, cameras))
        if self.judge is None:
            assert scores is not None
            # If the scores are equal, the first noise wins, as in NoiseWeighting.
            first_wins = scores[0] >= scores[1]
            return Ranks(scores, (~first_wins).long(), (scores[0] - scores[1]).abs())
        answers = torch.tensor(self._answers(images, prompts, views_per_unit), device=images.device)  # [N]
        # [2, N]: 1 for the preferred noise; both are 0 if the judge gave no answer.
        answer_scores = torch.stack([answers == 0, answers == 1]).to(images.dtype)
        # A judge does not say how much better an image is, so the gap is 1 for an answer and 0 without one.
        if scores is None or settings.judge_mode == "replace":
            return Ranks(
                answer_scores if scores is None else scores, answers, (answers >= 0).to(images.dtype)
            )
        # judge_mode=or: the first noise wins if the reward or the judge prefers it, as in DreamDPO's code.
        # The gap is negative if the judge prefers the first noise although its score is lower.
        first_wins = (scores[0] >= scores[1]) | (answers == 0)
        gap = torch.where(first_wins, scores[0] - scores[1], scores[1] - scores[0])
        return Ranks(scores, (~first_wins).long(), gap)

    def _score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Return the scores [2, N] of images [2, B, 3, h, w] for N ranked units.

        A unit is an asset, or an image with pair_level=view. The scores are standardised over the last steps
        if the setting `standardise` is True.
        """
        scores = self.denoiser.score(self.reward, images, prompts)  # type: ignore[arg-type]
        scores = self.denoiser.per_asset(scores) if self.settings.pair_level == "asset" else scores
        return self.history.standardise(scores) if self.settings.standardise else scores

    def _answers(self, images: torch.Tensor, prompts: list[str], views_per_unit: int) -> list[int]:
        """Return the judge's N answers: the index 0 or 1 of the better image, or -1 for no answer.

        Args:
            images: [2, B, 3, h, w] in 0..1, images of the two noises.
            prompts: B prompts, one for each image of a noise.
            views_per_unit: number of views that the judge compares together: V for assets, 1 for single
                views.
        Raises: ValueError if the judge returns another number of answers, or other values.
        """
        # [N, V, 3, h, w] each; V is 1 if views are ranked separately.
        first_images, second_images = images.unflatten(1, (-1, views_per_unit)).unbind(0)
        image_pairs = list(zip(first_images, second_images, strict=True))
        # All views of a unit have the same prompt, so every views_per_unit-th prompt is enough.
        answers = self.judge.judge(prompts[::views_per_unit], image_pairs)  # type: ignore[union-attr]
        if len(answers) != len(first_images) or not set(answers) <= {-1, 0, 1}:
            raise ValueError(
                f"--judge: {len(first_images)} pairs of images need as many answers of 0, 1 or -1, but the"
                f" judge returned {len(answers)} answers, {answers[:8]}. Use another judge."
            )
        return answers


class Ranked(Guided):
    """Base class of the methods that rank two noises by a reward or by a judge.

    Args:
        prior: diffusion model.
        settings: settings of the method.
        views: number of views of an asset.
        streams: random streams of the run.
        reward: reward of images, or None if a judge replaces it.
        judge: judge that ranks pairs of images, or None.
    """

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
