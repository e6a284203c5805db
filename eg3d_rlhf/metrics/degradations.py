"""Graded damage to images: what a distance between image sets must notice.

Images are float [N, 3, H, W] in [-1, 1], background white (1). Every function takes a strength per image [N], 0 = unchanged, and is
deterministic given its generator.
Shape letters: N images, H x W pixels.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Damage = Callable[[Tensor, Tensor, torch.Generator], Tensor]


def blur(images: Tensor, sigma: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian blur with standard deviation sigma [N] in pixels; borders repeat."""
    del generator
    radius = max(1, math.ceil(3 * float(sigma.max())))
    steps = torch.arange(-radius, radius + 1, dtype=images.dtype)
    kernel = torch.exp(-0.5 * (steps / sigma.clamp_min(1e-3)[:, None]) ** 2)
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(3, dim=0)  # [N*3, taps]
    n, _, height, width = images.shape
    flat = F.pad(images, (radius,) * 4, mode="replicate").reshape(1, n * 3, height + 2 * radius, width + 2 * radius)
    flat = F.conv2d(flat, kernel[:, None, :, None], groups=n * 3)
    return F.conv2d(flat, kernel[:, None, None, :], groups=n * 3).reshape(n, 3, height, width)


def noise(images: Tensor, deviation: Tensor, generator: torch.Generator) -> Tensor:
    """White noise with standard deviation [N] in units of the [-1, 1] range, clipped to it."""
    return (images + deviation[:, None, None, None] * torch.randn(images.shape, generator=generator)).clamp(-1, 1)


def colour(images: Tensor, amount: Tensor, generator: torch.Generator) -> Tensor:
    """Red gained and blue lost by `amount` [N] (signed), clipped to [-1, 1]."""
    del generator
    tint = torch.tensor([1.0, 0.0, -1.0])[:, None, None] * amount[:, None, None, None]
    return (images + tint).clamp(-1, 1)


def _warp(images: Tensor, matrices: Tensor) -> Tensor:
    """Resample through affine matrices [N, 2, 3] (output to input, -1..1); outside is white."""
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    return F.grid_sample(images - 1, grid, mode="bilinear", padding_mode="zeros", align_corners=False) + 1


def shift(images: Tensor, pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Move right by `pixels` [N] (signed, may be fractional)."""
    del generator
    matrices = torch.eye(2, 3).repeat(len(images), 1, 1)
    matrices[:, 0, 2] = -2 * pixels / images.shape[-1]
    return _warp(images, matrices)


def squeeze(images: Tensor, amount: Tensor, generator: torch.Generator) -> Tensor:
    """Narrow the content horizontally to 1 - amount of its width (negative widens)."""
    del generator
    matrices = torch.eye(2, 3).repeat(len(images), 1, 1)
    matrices[:, 0, 0] = 1 / (1 - amount)
    return _warp(images, matrices)


def ghost(images: Tensor, amount: Tensor, generator: torch.Generator) -> Tensor:
    """Blend each image with another one of the batch, `amount` [N] in [0, 1] of it, as averaged samples look."""
    other = images[torch.randperm(len(images), generator=generator)]
    return torch.lerp(images, other, amount[:, None, None, None])


DAMAGES: dict[str, tuple[Damage, tuple[float, ...], str]] = {  # name: function, rising strengths of the adequacy check, unit
    "blur": (blur, (0.5, 0.75, 1.0, 1.5, 2.5), "px"),
    "noise": (noise, (0.03, 0.06, 0.12, 0.25, 0.5), "of range/2"),
    "colour": (colour, (0.05, 0.1, 0.2, 0.3, 0.5), "of range/2"),
    "shift": (shift, (1.0, 2.0, 4.0, 6.0, 10.0), "px of 64"),
    "squeeze": (squeeze, (0.05, 0.1, 0.15, 0.2, 0.3), "of width"),
    "ghost": (ghost, (0.05, 0.1, 0.2, 0.3, 0.5), "blend"),
}
