"""How alike two images of the same thing are: PSNR and SSIM of our own, and networks that the user names as
TorchScript.

Letters: N images, C channels, H, W pixels. Images are float in [-1, 1].
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

PSNR_CAP = 100.0  # dB; stands for images that are equal
# of the Gaussian in Wang et al. 2004
_WINDOW = 11
_SIGMA = 1.5
_K1 = 0.01
_K2 = 0.03


def _check(who: str, first: Tensor, second: Tensor) -> None:
    if first.ndim != 4 or first.shape != second.shape:
        raise ValueError(
            f"{who}: expected two batches [N, C, H, W] of one shape, got {list(first.shape)} and"
            f" {list(second.shape)}."
        )


def psnr(first: Tensor, second: Tensor) -> Tensor:
    """Peak signal-to-noise ratio [N] in dB, 10 log10(4 / mse) for images in [-1, 1]; at most PSNR_CAP. Higher
    is more alike.
    """
    _check("psnr", first, second)
    error = (first.double() - second.double()).square().mean(dim=(1, 2, 3))
    return (10 * torch.log10(4 / error.clamp_min(1e-30))).clamp_max(PSNR_CAP)


def ssim(first: Tensor, second: Tensor) -> Tensor:
    """Structural similarity [N], at most 1, of images in [-1, 1] (Wang, Bovik, Sheikh and Simoncelli 2004).

    Means, variances and covariance under an 11 x 11 Gaussian of deviation 1.5, biased; mean over the
    positions where the window fits, and over channels. Raises: ValueError for images smaller than the window.
    """
    _check("ssim", first, second)
    if min(first.shape[2:]) < _WINDOW:
        raise ValueError(
            f"ssim: expected images of at least {_WINDOW} pixels, got {list(first.shape[2:])}. Render larger"
            " ones."
        )
    offsets = torch.arange(_WINDOW, dtype=torch.float64, device=first.device) - _WINDOW // 2
    weights = torch.exp(-(offsets**2) / (2 * _SIGMA**2))
    weights = weights / weights.sum()

    def blur(x: Tensor) -> Tensor:
        x = functional.conv2d(x, weights.reshape(1, 1, -1, 1))
        return functional.conv2d(x, weights.reshape(1, 1, 1, -1))

    a, b = (images.double().flatten(0, 1)[:, None] for images in (first, second))  # [N*C, 1, H, W]
    mean_a = blur(a)
    mean_b = blur(b)
    var_a = blur(a * a) - mean_a**2
    var_b = blur(b * b) - mean_b**2
    cov = blur(a * b) - mean_a * mean_b
    # the range of values is 2
    c1 = (_K1 * 2) ** 2
    c2 = (_K2 * 2) ** 2
    values = (
        (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    )
    return values.unflatten(0, first.shape[:2]).mean(dim=(1, 2, 3, 4))


def scripted(path: Path, flag: str, what: str, device: torch.device | str) -> Callable[..., Any]:
    """The network of a TorchScript file, without gradients; what is wrong with it is said under the flag's
    name.
    """
    try:
        net = torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"{flag}: expected a TorchScript file, got {path} ({str(error).splitlines()[0]}). Export one."
        ) from error

    @torch.no_grad()
    def ask(*images: Tensor, **options: Any) -> Any:
        try:
            return net(*images, **options)
        except RuntimeError as error:
            reason = next(
                (line for line in str(error).splitlines()[::-1] if line.strip()), type(error).__name__
            )
            raise ValueError(f"{flag}: expected a net {what}, got {path} ({reason}).") from error

    return ask


def load_lpips(path: Path, device: torch.device | str = "cpu") -> Callable[[Tensor, Tensor], Tensor]:
    """A perceptual distance: f(a, b) -> [N] of images [N, 3, H, W] in [-1, 1], from TorchScript that is
    called the same way.

    Raises: ValueError for another file, or one that gives something else.
    """
    net = scripted(path, "--lpips", "f(a, b) of two image batches", device)

    def distance(first: Tensor, second: Tensor) -> Tensor:
        found = net(first, second)
        if not isinstance(found, Tensor) or found.numel() != len(first):
            raise ValueError(
                f"--lpips: expected one distance per pair from {path}, got"
                f" {getattr(found, 'shape', type(found))}."
            )
        return found.reshape(-1)

    return distance


def load_identity(path: Path, device: torch.device | str = "cpu") -> Callable[[Tensor], Tensor]:
    """Unit embeddings [N, F] of images [N, 3, H, W] in [-1, 1], from TorchScript that is called on the
    images. Raises: ValueError.
    """
    net = scripted(path, "--identity", "of image batches", device)

    def embed(images: Tensor) -> Tensor:
        found = net(images)
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(images):
            raise ValueError(
                f"--identity: expected embeddings [N, F] from {path}, got"
                f" {getattr(found, 'shape', type(found))}."
            )
        return functional.normalize(found.float(), dim=1)

    return embed
