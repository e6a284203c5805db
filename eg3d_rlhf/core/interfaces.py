"""Interfaces between the parts of score distillation, and checks of tensors that priors and rewards exchange.

Letters: A assets, V views of one asset, B = A * V images (views of an asset adjacent), C, H, W of the prior's
latents, h, w pixels, K noises, P patches, F faces of a patch.

Time t is an integer in 0..999; a = sqrt(alphas_cumprod[t]), s = sqrt(1 - alphas_cumprod[t]); x_t = a x + s e.
Guidance scale g: e(null) + g (e(text) - e(null)), so 1 is the conditional prediction alone (Ho and Salimans
2022, in the convention of diffusers).
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch

Modality = Literal["image", "multiview", "mesh", "density"]


@runtime_checkable
class DiffusionPrior(Protocol):
    """A frozen diffusion model of images."""

    alphas_cumprod: torch.Tensor  # [1000], decreasing; cumulative products of 1 - beta_t (DDPM)
    latent_shape: tuple[int, int, int]  # (C, H, W)
    views: int  # 1, or the number of views that its attention joins; B is then a multiple of it

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Encode images [B, 3, h, w] in 0..1 into latents [B, C, H, W]. Differentiable."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode latents into images [B, 3, h, w] in 0..1. Differentiable."""

    def embed(self, prompts: list[str], directions: list[str] | None = None) -> torch.Tensor:
        """Embed B prompts as conditioning tokens [B, tokens, dim]. An empty prompt gives the null
        conditioning.
        """

    def predict_noise(
        self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor, cameras: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Predict the noise [B, C, H, W] in x_t at times t [B].

        Args: cond: conditioning tokens [B, tokens, dim]; cameras: [B, 16], or None.
        Differentiable in x_t and cond.
        """


@runtime_checkable
class RewardModel(Protocol):
    """A reward that scores images, with the signature of imscore."""

    modality: Modality
    views: int  # number of images that are scored together, those of an asset adjacent; 1: each alone
    differentiable: bool
    # view_prompts: bool, optional. True: the prompt of an image names the side of the asset that the image
    # shows (see `reward_prompts` of tuning/distill). A reward without the attribute gets prompts without it.

    def score(self, pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Score images [B, 3, h, w] in 0..1.

        Returns: [B]. With several views each of an asset's images has the asset's score.
        """


@runtime_checkable
class PairwiseJudge(Protocol):
    """A model that decides which of two images is better, with the signature of TRL."""

    def judge(
        self, prompts: list[str], pairs: list[tuple[torch.Tensor, torch.Tensor]], shuffle_order: bool = True
    ) -> list[int]:
        """Return 0 or 1 for the better one of each pair of images [V, 3, h, w]; -1 if there is no answer."""


class Mesh(NamedTuple):
    """A triangle mesh. Faces point outward: the signed volume is positive."""

    vertices: torch.Tensor  # [N, 3] world units
    faces: torch.Tensor  # [M, 3] int64


class Patches(NamedTuple):
    """Meshes as patches of faces with features.

    The 10 features of a face are its area (1), normal (3), sorted angles (3) and sorted dot products of its
    normal with the vertex normals (3).
    """

    features: torch.Tensor  # [A, P, F, 10], described above
    centres: torch.Tensor  # [A, P, F, 3] face centres
    mask: torch.Tensor  # [A, P] bool; False: padding, there is no such patch


@runtime_checkable
class MeshReward(Protocol):
    """A reward that scores meshes. Differentiable in features and centres."""

    def score(self, patches: Patches, prompts: list[str]) -> torch.Tensor:
        """Return a score for each asset [A]."""


@dataclass
class GuidanceOutput:
    """Result of one step of a guidance."""

    grad: torch.Tensor  # [B, C, H, W] with respect to the prior's latents, unreduced; no graph
    terms: dict[str, torch.Tensor] = field(default_factory=dict)  # named values [B] or [A] for the log
    scores: torch.Tensor | None = None  # [K, A] rewards of the noises
    winner: torch.Tensor | None = None  # [A] index of the preferred noise; -1: no answer
    one_sided: torch.Tensor | None = None  # [A] bool: the preference gap was too small to push away
    # [B, 3, h, w]: a second gradient, with respect to the rendered images
    image_grad: torch.Tensor | None = None


@runtime_checkable
class Guidance(Protocol):
    """A distillation method: it computes the gradient on the latents x [B, C, H, W] of the rendered views."""

    def __call__(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        prompts: list[str],
        cameras: torch.Tensor | None,
        step: int,
        images: torch.Tensor | None = None,
    ) -> GuidanceOutput:
        """Compute the gradient of one step. `gradients.distillation_loss` turns it into a loss.

        Args:
            x: latents, which need no graph.
            t: [B].
            prompts: one per image.
            cameras: [B, 16].
            step: counts from 0.
            images: the images that x encodes, for terms on pixels.
        """

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the state that a resumed run needs; empty for most methods."""

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what `state_dict` returned."""


# Checks of arguments and results: complete sets of views, images within 0..1, no NaN. Errors name the flag.

SLACK = 1e-3  # images may exceed 0..1 by this much, because of rounding in a renderer


def check_views(pictures: int, views: int, who: str = "--prior") -> None:
    """Raise ValueError unless the number of images is a multiple of `views`, the views of one asset."""
    if pictures < 1 or pictures % views:
        raise ValueError(
            f"{who}: expected a multiple of {views} views, got {pictures}. Set views={views} or a"
            " multiple of it."
        )


def check_pictures(images: torch.Tensor, who: str) -> None:
    """Raise ValueError unless images are [B, 3, h, w], finite and within 0..1."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"{who}: expected images [B, 3, h, w], got {list(images.shape)}. Pass the three colour channels"
            " only."
        )
    # One pass over the tensor; detached, because checks must not enter the graph.
    low, high = (float(x) for x in images.detach().aminmax())
    # A comparison with NaN is False, so NaN is rejected too
    if not (low >= -SLACK and high <= 1 + SLACK):
        raise ValueError(
            f"{who}: expected images within 0..1, got {low:.3g}..{high:.3g}. Scale images of 0..255 or -1..1"
            " to 0..1."
        )


def check_finite(tensor: torch.Tensor, who: str, remedy: str) -> None:
    """Raise ValueError if a tensor contains NaN or infinity. `remedy` ends the message."""
    # The number of bad values goes into the message.
    bad = int((~torch.isfinite(tensor.detach())).sum())
    if bad:
        raise ValueError(
            f"{who}: expected finite numbers, got NaN or infinity in {bad} of {tensor.numel()}. {remedy}"
        )


class CheckedPrior:
    """A prior with checks of its arguments and results. Each method raises ValueError if a check fails."""

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
        # Before the prior runs: its own errors would not name the flag.
        check_views(len(images), self.views)
        check_pictures(images, "--prior: encode")
        return self._finite(self.prior.encode(images), "encode")

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode latents into images [B, 3, h, w] in 0..1."""
        return self._finite(self.prior.decode(latents), "decode")

    def embed(self, prompts: list[str], directions: list[str] | None = None) -> torch.Tensor:
        """Embed prompts as conditioning tokens [B, tokens, dim]."""
        return self._finite(self.prior.embed(prompts, directions), "embed")

    def predict_noise(
        self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor, cameras: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Predict the noise [B, C, H, W]."""
        check_views(len(x_t), self.views)
        # A prior would broadcast or fail far from the cause.
        sizes = {
            "times": len(t),
            "prompts": len(cond),
            "cameras": len(x_t) if cameras is None else len(cameras),
        }
        if set(sizes.values()) != {len(x_t)} or tuple(x_t.shape[1:]) != tuple(self.latent_shape):
            got = ", ".join(f"{n} {name}" for name, n in sizes.items())
            raise ValueError(
                f"--prior: expected one of each per latent {list(self.latent_shape)}, got {got} for latents"
                f" {list(x_t.shape)}. Pass equal numbers."
            )
        return self._finite(self.prior.predict_noise(x_t, t, cond, cameras), "predict_noise")

    def _finite(self, tensor: torch.Tensor, what: str) -> torch.Tensor:
        """Return a result of the prior; raise ValueError if it is not finite. `what` names the method."""
        check_finite(tensor, f"--prior: {what}", self.remedy)
        return tensor
