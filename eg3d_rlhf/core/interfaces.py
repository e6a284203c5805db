"""What the parts of score distillation ask of one another, and checks at the edges of what comes from files.

Letters: A assets, V views of one asset, B = A * V pictures (views of an asset adjacent), C, H, W of the
prior's latents, K noises, P patches, F faces of a patch. Time t is an integer 0..999;
a = sqrt(alphas_cumprod[t]), s = sqrt(1 - alphas_cumprod[t]); x_t = a x + s e. Guidance scale g: e(null) + g
(e(text) - e(null)), so 1 is the conditional prediction alone.
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch

Modality = Literal["image", "multiview", "mesh", "density"]


@runtime_checkable
class DiffusionPrior(Protocol):
    """A frozen diffusion model of pictures."""

    alphas_cumprod: torch.Tensor  # [1000]
    latent_shape: tuple[int, int, int]  # C, H, W
    views: int  # 1, or the number that its attention sees together; B is then a multiple of it

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Latents [B, C, H, W] of images [B, 3, h, w] in 0..1. Differentiable."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, h, w] in 0..1 of latents. Differentiable."""

    def embed(self, prompts: list[str], directions: list[str] | None = None) -> torch.Tensor:
        """Conditions [B, tokens, dim] of B prompts; an empty prompt is the null condition."""

    def predict_noise(
        self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor, cameras: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Noise [B, C, H, W] in x_t at t [B], given conditions [B, tokens, dim] and cameras [B, 16].
        Differentiable in x_t and cond.
        """


@runtime_checkable
class RewardModel(Protocol):
    """Scores pictures; imscore's signature."""

    modality: Modality
    views: int  # pictures that are scored together, an asset's adjacent; 1: each alone
    differentiable: bool
    # view_prompts: bool, where it is told the side that a picture shows (directions.told); a reward without
    # it is not

    def score(self, pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Scores [B] of pictures [B, 3, h, w] in 0..1; with several views the asset's score stands at each of
        them.
        """


@runtime_checkable
class PairwiseJudge(Protocol):
    """Which of two pictures is better; TRL's signature."""

    def judge(
        self, prompts: list[str], pairs: list[tuple[torch.Tensor, torch.Tensor]], shuffle_order: bool = True
    ) -> list[int]:
        """0 or 1 for the better one of each pair of pictures [V, 3, h, w]; -1 where there is no answer."""


class Mesh(NamedTuple):
    """One shape. Faces point outward: the signed volume is positive."""

    vertices: torch.Tensor  # [N, 3] world units
    faces: torch.Tensor  # [M, 3] int64


class Patches(NamedTuple):
    """A mesh as patches of faces with features (spec: area, normal, sorted angles, sorted dots of vertex
    normals).
    """

    features: torch.Tensor  # [A, P, F, 10]
    centres: torch.Tensor  # [A, P, F, 3] face centres
    mask: torch.Tensor  # [A, P] bool; False: no such patch


@runtime_checkable
class MeshReward(Protocol):
    """Scores meshes. Differentiable in features and centres."""

    def score(self, patches: Patches, prompts: list[str]) -> torch.Tensor:
        """Scores [A]."""


@dataclass
class GuidanceOutput:
    """What a guidance says of one step."""

    grad: torch.Tensor  # [B, C, H, W] on the prior's latents, unreduced; no graph
    terms: dict[str, torch.Tensor] = field(default_factory=dict)  # named figures [B] or [A] for the log
    scores: torch.Tensor | None = None  # [K, A] rewards of the noises
    winner: torch.Tensor | None = None  # [A] index of the preferred noise; -1: no answer
    one_sided: torch.Tensor | None = None  # [A] bool: the preference gap was too small to push away
    # [B, 3, h, w] a second gradient, on the rendered pictures themselves
    image_grad: torch.Tensor | None = None


@runtime_checkable
class Guidance(Protocol):
    """One method: the gradient on the latents x [B, C, H, W] of the rendered views."""

    def __call__(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        prompts: list[str],
        cameras: torch.Tensor | None,
        step: int,
        images: torch.Tensor | None = None,
    ) -> GuidanceOutput:
        """x needs no graph; t [B]; prompts one per picture; cameras [B, 16]; step counts from 0; images: the
        pictures that x encodes, for terms on pixels. `gradients.distillation_loss` makes the loss.
        """

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What a resumed run needs; empty for most."""

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from `state_dict`."""


# A prior whose arguments and results are looked at: views in whole assets, pictures within 0..1, no NaN. One
# line names flag and remedy.

SLACK = 1e-3  # beyond 0..1 that rounding of a renderer may reach


def check_views(pictures: int, views: int, who: str = "--prior") -> None:
    """Raises: ValueError unless the pictures are whole assets of `views` views."""
    if pictures < 1 or pictures % views:
        raise ValueError(
            f"{who}: expected a multiple of {views} views, got {pictures}. Set views={views}, or another"
            " multiple of it."
        )


def check_pictures(images: torch.Tensor, who: str) -> None:
    """Raises: ValueError for what is not finite [B, 3, h, w] within 0..1."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"{who}: expected pictures [B, 3, h, w], got {list(images.shape)}. Render colours only."
        )
    low, high = (float(x) for x in images.detach().aminmax())
    if not (low >= -SLACK and high <= 1 + SLACK):  # NaN fails, too
        raise ValueError(
            f"{who}: expected pictures within 0..1, got {low:.3g}..{high:.3g}. Not 0..255, not -1..1: scale"
            " them."
        )


def check_finite(tensor: torch.Tensor, who: str, remedy: str) -> None:
    """Raises: ValueError for NaN and infinity."""
    bad = int((~torch.isfinite(tensor.detach())).sum())
    if bad:
        raise ValueError(
            f"{who}: expected finite numbers, got NaN or infinity in {bad} of {tensor.numel()}. {remedy}"
        )


class CheckedPrior:
    """Any prior, with checks at its edge. Raises: ValueError in each method, as above."""

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
        """Latents [B, C, H, W] of images in 0..1."""
        check_views(len(images), self.views)
        check_pictures(images, "--prior: encode")
        return self._finite(self.prior.encode(images), "encode")

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, h, w] in 0..1 of latents."""
        return self._finite(self.prior.decode(latents), "decode")

    def embed(self, prompts: list[str], directions: list[str] | None = None) -> torch.Tensor:
        """Conditions [B, tokens, dim]."""
        return self._finite(self.prior.embed(prompts, directions), "embed")

    def predict_noise(
        self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor, cameras: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Noise [B, C, H, W]."""
        check_views(len(x_t), self.views)
        sizes = {
            "times": len(t),
            "conditions": len(cond),
            "cameras": len(x_t) if cameras is None else len(cameras),
        }
        if set(sizes.values()) != {len(x_t)} or tuple(x_t.shape[1:]) != tuple(self.latent_shape):
            got = ", ".join(f"{n} {name}" for name, n in sizes.items())
            raise ValueError(
                f"--prior: expected one each per latent {list(self.latent_shape)}, got {got} for"
                f" {list(x_t.shape)}."
            )
        return self._finite(self.prior.predict_noise(x_t, t, cond, cameras), "predict_noise")

    def _finite(self, tensor: torch.Tensor, what: str) -> torch.Tensor:
        check_finite(tensor, f"--prior: {what}", self.remedy)
        return tensor
