"""A prior whose arguments and results are looked at: views in whole assets, pictures within 0..1, no NaN. One line names flag and remedy.

Shape letters: B pictures, C, H, W of latents.
"""

import torch

from eg3d_rlhf.core.interfaces import DiffusionPrior

SLACK = 1e-3  # beyond 0..1 that rounding of a renderer may reach


def check_views(pictures: int, views: int, who: str = "--prior") -> None:
    """Raises: ValueError unless the pictures are whole assets of `views` views."""
    if pictures < 1 or pictures % views:
        raise ValueError(f"{who}: expected a multiple of {views} views, got {pictures}. Set --views={views}, or another multiple of it.")


def check_pictures(images: torch.Tensor, who: str) -> None:
    """Raises: ValueError for what is not finite [B, 3, h, w] within 0..1."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"{who}: expected pictures [B, 3, h, w], got {list(images.shape)}. Render colours only.")
    low, high = (float(x) for x in images.detach().aminmax())
    if not (low >= -SLACK and high <= 1 + SLACK):  # NaN fails, too
        raise ValueError(f"{who}: expected pictures within 0..1, got {low:.3g}..{high:.3g}. Not 0..255, not -1..1: scale them.")


def check_finite(tensor: torch.Tensor, who: str, remedy: str) -> None:
    """Raises: ValueError for NaN and infinity."""
    bad = int((~torch.isfinite(tensor.detach())).sum())
    if bad:
        raise ValueError(f"{who}: expected finite numbers, got NaN or infinity in {bad} of {tensor.numel()}. {remedy}")


class CheckedPrior:
    """Any prior, with checks at its edge. Raises: ValueError in each method, as above."""

    def __init__(self, prior: DiffusionPrior, remedy: str = "Run its U-Net in full precision, or use another checkpoint."):
        self.prior, self.remedy = prior, remedy
        self.alphas_cumprod, self.latent_shape, self.views = prior.alphas_cumprod, prior.latent_shape, prior.views

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

    def predict_noise(self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor, cameras: torch.Tensor | None = None) -> torch.Tensor:
        """Noise [B, C, H, W]."""
        check_views(len(x_t), self.views)
        sizes = {"times": len(t), "conditions": len(cond), "cameras": len(x_t) if cameras is None else len(cameras)}
        if set(sizes.values()) != {len(x_t)} or tuple(x_t.shape[1:]) != tuple(self.latent_shape):
            got = ", ".join(f"{n} {name}" for name, n in sizes.items())
            raise ValueError(f"--prior: expected one each per latent {list(self.latent_shape)}, got {got} for {list(x_t.shape)}.")
        return self._finite(self.prior.predict_noise(x_t, t, cond, cameras), "predict_noise")

    def _finite(self, tensor: torch.Tensor, what: str) -> torch.Tensor:
        check_finite(tensor, f"--prior: {what}", self.remedy)
        return tensor
