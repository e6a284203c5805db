"""Interfaces between the parts of score distillation, and checks of tensors that priors and rewards exchange.

Shapes: A is the number of assets, V of views of one asset, and B = A * V of images, where the views of an
asset are adjacent. C, H and W are the axes of the prior's latents, h and w are pixels of images. K is the
number of noises, P of patches and F of faces of a patch.

Notation of DDPM (Ho, Jain and Abbeel 2020, equation 4): the time t is an integer in 0..999, x is a clean
latent, e is Gaussian noise, and the noisy latent is x_t = a x + s e with a = sqrt(alphas_cumprod[t]) and
s = sqrt(1 - alphas_cumprod[t]). Classifier-free guidance with scale g predicts the noise e(null) + g (e(text)
- e(null)), so g = 1 is the conditional prediction alone (Ho and Salimans 2022, in the convention of
diffusers).
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch

Modality = Literal["image", "multiview", "mesh", "density"]


@runtime_checkable
class DiffusionPrior(Protocol):
    """A frozen diffusion model of images."""

    alphas_cumprod: torch.Tensor  # [1000], decreasing; cumulative products of 1 - beta_t (DDPM)
    latent_shape: tuple[int, int, int]  # (C, H, W) of a latent
    # Number of views of an asset that the model denoises jointly; 1 for a single-view model. B is a multiple
    # of this number.
    views: int

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Encode images [B, 3, h, w] in 0..1 into latents [B, C, H, W]. Differentiable."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode latents into images [B, 3, h, w] in 0..1. Differentiable."""

    def embed(self, prompts: list[str], directions: list[str] | None = None) -> torch.Tensor:
        """Embed B prompts as conditioning tokens [B, tokens, dim].

        Args:
            prompts: one text for each image. An empty prompt gives the null conditioning.
            directions: one phrase for each image that names the visible side of the asset, such as "front
                view"; None for prompts without it.
        """

    def predict_noise(
        self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor, cameras: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Predict the noise [B, C, H, W] in noisy latents. Differentiable in x_t and cond.

        Args:
            x_t: noisy latents [B, C, H, W].
            t: times [B], integers in 0..999.
            cond: conditioning tokens [B, tokens, dim].
            cameras: camera poses [B, 16], flattened 4 x 4 matrices, or None for a prior without cameras.
        """


@runtime_checkable
class RewardModel(Protocol):
    """A reward that scores images, with the signature of imscore."""

    modality: Modality
    views: int  # number of images of an asset that are scored together; 1: each image has its own score
    differentiable: bool  # True: scores are differentiable in the pixels
    # view_prompts: bool, optional. True: the prompt of an image names the side of the asset that the image
    # shows (see `reward_prompts` of tuning/distill). A reward without the attribute gets prompts without it.

    def score(self, pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Score images [B, 3, h, w] in 0..1.

        Args:
            pixels: images [B, 3, h, w] in 0..1; the `views` images of an asset are adjacent.
            prompts: one text for each image.
        Returns: scores [B]. If `views` > 1, all images of an asset have the score of the asset.
        """


@runtime_checkable
class PairwiseJudge(Protocol):
    """A model that decides which of two images is better, with the signature of TRL."""

    def judge(
        self, prompts: list[str], pairs: list[tuple[torch.Tensor, torch.Tensor]], shuffle_order: bool = True
    ) -> list[int]:
        """Return the index of the better asset of each pair, 0 or 1, or -1 if the model gave no answer.

        Args:
            prompts: one text for each pair.
            pairs: two tensors of images [V, 3, h, w] in 0..1 for each pair, the views of either asset.
            shuffle_order: True: show the two assets in random order, so that a preference of the model for
                the first or second position cancels out.
        """


class Mesh(NamedTuple):
    """A triangle mesh whose face normals point outward, so that its signed volume is positive."""

    vertices: torch.Tensor  # [N, 3] world units
    faces: torch.Tensor  # [M, 3] int64, indices of vertices


class Patches(NamedTuple):
    """Meshes, divided into patches of faces with features.

    The 10 features of a face are its area (1), its normal (3), its three angles in sorted order (3), and the
    dot products of its normal with its three vertex normals in sorted order (3).
    """

    features: torch.Tensor  # [A, P, F, 10], described above
    centres: torch.Tensor  # [A, P, F, 3] face centres
    mask: torch.Tensor  # [A, P] bool; False marks padding of an asset with fewer patches


@runtime_checkable
class MeshReward(Protocol):
    """A reward that scores meshes.

    Its scores are differentiable in the features and centres of the patches.
    """

    def score(self, patches: Patches, prompts: list[str]) -> torch.Tensor:
        """Return the scores [A] of meshes, one for each asset.

        Args: patches: patches of the meshes; prompts: one text for each mesh.
        """


@dataclass
class GuidanceOutput:
    """Result of one step of a guidance (distillation method). All tensors are detached.

    The fields from `scores` to `one_sided` are None for methods that do not compare several noises by a
    reward.
    """

    grad: torch.Tensor  # gradient with respect to the prior's latents, [B, C, H, W], unreduced
    terms: dict[str, torch.Tensor] = field(default_factory=dict)  # name -> values [B] or [A] for the log
    scores: torch.Tensor | None = None  # [K, A] rewards of the predictions from K noises
    winner: torch.Tensor | None = None  # [A] index of the preferred noise; -1: there was no answer
    # [A] bool. True: the gradient does not push away from the rejected noise, because the preference gap was
    # too small or there was no answer.
    one_sided: torch.Tensor | None = None
    # Second gradient, with respect to the rendered images, [B, 3, h, w]; None for methods without it.
    image_grad: torch.Tensor | None = None


@runtime_checkable
class Guidance(Protocol):
    """A distillation method, which computes a gradient on the latents [B, C, H, W] of the rendered views."""

    def __call__(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        prompts: list[str],
        cameras: torch.Tensor | None,
        step: int,
        images: torch.Tensor | None = None,
    ) -> GuidanceOutput:
        """Compute the gradient of one optimisation step. `gradients.distillation_loss` turns it into a loss.

        Args:
            x: latents of the rendered views, [B, C, H, W]. They need no autograd graph.
            t: times [B], integers in 0..999.
            prompts: one text for each image.
            cameras: camera poses [B, 16], flattened 4 x 4 matrices, or None for a prior without cameras.
            step: index of the optimisation step, counted from 0.
            images: rendered images [B, 3, h, w] that x encodes, for methods with a term on pixels.
        """

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the state that a resumed run needs. Most methods have no state and return an empty dict."""

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore the state that `state_dict` returned."""


# Checks of arguments and results of priors and rewards. Their errors name the flag that selected the model.

SLACK = 1e-3  # images may exceed 0..1 by this much, because of rounding in a renderer


def check_views(image_count: int, view_count: int, message_start: str = "--prior") -> None:
    """Raise ValueError unless the images form complete sets of `view_count` views.

    Args:
        image_count: number of images.
        view_count: number of views of one asset.
        message_start: start of the message, such as the flag of the model.
    """
    if image_count < 1 or image_count % view_count:
        raise ValueError(
            f"{message_start}: expected a multiple of {view_count} images (the views of one asset), got"
            f" {image_count}. Pass complete sets of {view_count} views. In score distillation, set the"
            f" number of views with --set views={view_count}."
        )


def check_images(images: torch.Tensor, message_start: str) -> None:
    """Raise ValueError unless images have the shape [B, 3, h, w] and finite values within 0..1.

    Args: images: images of any shape; message_start: start of the message, such as the flag of the model.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"{message_start}: expected images of shape [B, 3, h, w], got {list(images.shape)}. Pass a batch"
            " of images with three colour channels."
        )
    # `aminmax` needs one pass over the tensor. Detached, because checks must not enter the graph.
    lowest_value, highest_value = (float(extreme) for extreme in images.detach().aminmax())
    # A comparison with NaN is False, so NaN is rejected too
    if not (lowest_value >= -SLACK and highest_value <= 1 + SLACK):
        raise ValueError(
            f"{message_start}: expected images within 0..1, got {lowest_value:.3g}..{highest_value:.3g}."
            " Scale images of 0..255 or -1..1 to 0..1. If the values are NaN or infinite, search for the step"
            " that computes them."
        )


def check_finite(tensor: torch.Tensor, message_start: str, remedy: str) -> None:
    """Raise ValueError if a tensor contains NaN or infinity.

    Args:
        tensor: tensor of any shape.
        message_start: start of the message, such as the flag of the model.
        remedy: sentence that ends the message and says what the user can do.
    """
    nonfinite_count = int((~torch.isfinite(tensor.detach())).sum())
    if nonfinite_count:
        raise ValueError(
            f"{message_start}: expected finite numbers, got NaN or infinity in {nonfinite_count} of"
            f" {tensor.numel()} values. {remedy}"
        )


class CheckedPrior:
    """A prior with checks of its arguments and results. Each method raises ValueError if a check fails.

    Args:
        prior: diffusion prior that does the work.
        remedy: sentence that ends the message about NaN or infinity.
    """

    def __init__(
        self,
        prior: DiffusionPrior,
        remedy: str = "Run its U-Net in full precision, or use another checkpoint.",
    ):
        self.prior = prior
        self.remedy = remedy
        self.alphas_cumprod = prior.alphas_cumprod
        self.latent_shape = prior.latent_shape
        self.views = prior.views

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Encode images in 0..1 into latents [B, C, H, W]."""
        # Checked here, because the prior's own errors would not name the flag.
        check_views(len(images), self.views)
        check_images(images, "--prior: encode")
        return self._finite(self.prior.encode(images), "encode")

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode latents into images [B, 3, h, w] in 0..1."""
        return self._finite(self.prior.decode(latents), "decode")

    def embed(self, prompts: list[str], directions: list[str] | None = None) -> torch.Tensor:
        """Embed B prompts as conditioning tokens [B, tokens, dim]. See `DiffusionPrior.embed`."""
        return self._finite(self.prior.embed(prompts, directions), "embed")

    def predict_noise(
        self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor, cameras: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Predict the noise [B, C, H, W] in noisy latents. See `DiffusionPrior.predict_noise`."""
        check_views(len(x_t), self.views)
        # With unequal numbers a prior would broadcast without an error, or fail far from the cause.
        count_by_input = {
            "times": len(t),
            "prompts": len(cond),
            "cameras": len(x_t) if cameras is None else len(cameras),
        }
        if tuple(x_t.shape[1:]) != tuple(self.latent_shape):
            raise ValueError(
                f"--prior: expected latents of shape [B, {', '.join(map(str, self.latent_shape))}], got"
                f" {list(x_t.shape)}. Pass latents that `encode` of this prior returned."
            )
        if set(count_by_input.values()) != {len(x_t)}:
            given_counts = ", ".join(f"{count} {input_name}" for input_name, count in count_by_input.items())
            raise ValueError(
                f"--prior: expected one time, prompt and camera for each of {len(x_t)} latents, got"
                f" {given_counts}. Pass as many of each as latents."
            )
        return self._finite(self.prior.predict_noise(x_t, t, cond, cameras), "predict_noise")

    def _finite(self, tensor: torch.Tensor, method_name: str) -> torch.Tensor:
        """Return a result of the prior, or raise ValueError, which names the method, if it is not finite."""
        check_finite(tensor, f"--prior: {method_name}", self.remedy)
        return tensor
