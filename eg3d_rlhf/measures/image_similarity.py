"""Measure how similar two images of the same object are.

PSNR and SSIM are implemented here. LPIPS and identity embeddings come from TorchScript files of the user.
Letters: N images, C channels, H, W pixels, F features. Images are float in [-1, 1].
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

PSNR_CAP = 100.0  # dB; the value of two equal images, whose ratio is infinite
# Constants of Wang et al. 2004: edge and standard deviation of the Gaussian window in pixels, and the two
# stabilising constants of the formula.
_WINDOW = 11
_SIGMA = 1.5
_K1 = 0.01
_K2 = 0.03


def _check(measure: str, first: Tensor, second: Tensor) -> None:
    """Raise ValueError unless both are batches of images of equal shape."""
    if first.ndim != 4 or first.shape != second.shape:
        raise ValueError(
            f"{measure}: expected two batches [N, C, H, W] of equal shape, got {list(first.shape)} and"
            f" {list(second.shape)}. Render both at the same resolution."
        )


def psnr(first: Tensor, second: Tensor) -> Tensor:
    """Compute the peak signal-to-noise ratio [N] in dB, 10 log10(4 / mse) for images in [-1, 1].

    Values are at most PSNR_CAP. Higher values mean more similar images.
    """
    _check("psnr", first, second)
    error = (first.double() - second.double()).square().mean(dim=(1, 2, 3))
    # The peak is 2, the range of values, so its square is 4. The clamp keeps equal images finite.
    return (10 * torch.log10(4 / error.clamp_min(1e-30))).clamp_max(PSNR_CAP)


def ssim(first: Tensor, second: Tensor) -> Tensor:
    """Compute the structural similarity [N], at most 1, of images in [-1, 1] (Wang, Bovik, Sheikh and
    Simoncelli 2004).

    Means, variances and the covariance are taken under an 11 x 11 Gaussian of standard deviation 1.5, without
    correction of the bias. The result is averaged over channels and over the positions where the window fits.
    Raises: ValueError if the images are smaller than the window.
    """
    _check("ssim", first, second)
    if min(first.shape[2:]) < _WINDOW:
        raise ValueError(
            f"ssim: expected images of at least {_WINDOW} x {_WINDOW} pixels, got {list(first.shape[2:])}."
            " Render larger ones."
        )
    offsets = torch.arange(_WINDOW, dtype=torch.float64, device=first.device) - _WINDOW // 2
    weights = torch.exp(-(offsets**2) / (2 * _SIGMA**2))
    weights = weights / weights.sum()

    # The Gaussian is separable: two convolutions with 11 weights replace one with 121.
    def blur(x: Tensor) -> Tensor:
        x = functional.conv2d(x, weights.reshape(1, 1, -1, 1))
        return functional.conv2d(x, weights.reshape(1, 1, 1, -1))

    a, b = (images.double().flatten(0, 1)[:, None] for images in (first, second))  # [N*C, 1, H, W]
    mean_a = blur(a)
    mean_b = blur(b)
    var_a = blur(a * a) - mean_a**2
    var_b = blur(b * b) - mean_b**2
    cov = blur(a * b) - mean_a * mean_b
    # C_i = (K_i L)^2 with the range of values L = 2.
    c1 = (_K1 * 2) ** 2
    c2 = (_K2 * 2) ** 2
    # Equation 13 of the paper; double precision, because each variance is a difference of large numbers.
    values = (
        (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    )
    return values.unflatten(0, first.shape[:2]).mean(dim=(1, 2, 3, 4))


def scripted(path: Path, flag: str, interface: str, device: torch.device | str) -> Callable[..., Any]:
    """Load a TorchScript network and return a function that evaluates it without gradients.

    Args: flag: option or class that messages name; interface: how the network is called, in words.
    Raises: ValueError if the file is not TorchScript, or if a call of the network fails.
    """
    try:
        net = torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"{flag}: expected a TorchScript file, got {path} ({str(error).splitlines()[0]}). Export the"
            " network with torch.jit."
        ) from error

    @torch.no_grad()
    def evaluate(*images: Tensor, **options: Any) -> Any:
        try:
            return net(*images, **options)
        except RuntimeError as error:
            # TorchScript prints a trace of several lines; the last one that is not blank states the cause.
            reason = next(
                (line for line in str(error).splitlines()[::-1] if line.strip()), type(error).__name__
            )
            raise ValueError(
                f"{flag}: expected a network that is called as {interface}, got {path} ({reason}). Export"
                " it with that interface."
            ) from error

    return evaluate


def load_lpips(path: Path, device: torch.device | str = "cpu") -> Callable[[Tensor, Tensor], Tensor]:
    """Load a perceptual distance, a function f(a, b) -> [N] of images [N, 3, H, W] in [-1, 1].

    The TorchScript file is called in the same way. f raises ValueError if the file's output is not one
    distance per pair.
    Raises: ValueError if the file is not TorchScript.
    """
    net = scripted(path, "--lpips", "f(a, b) of two image batches", device)

    def distance(first: Tensor, second: Tensor) -> Tensor:
        values = net(first, second)
        # Published LPIPS networks return [N, 1, 1, 1], others [N].
        if not isinstance(values, Tensor) or values.numel() != len(first):
            raise ValueError(
                f"--lpips: expected one distance per pair from {path}, got"
                f" {getattr(values, 'shape', type(values))}. Export a network that returns [N]."
            )
        return values.reshape(-1)

    return distance


def load_identity(path: Path, device: torch.device | str = "cpu") -> Callable[[Tensor], Tensor]:
    """Load a function that computes unit embeddings [N, F] of images [N, 3, H, W] in [-1, 1].

    The TorchScript file is called on the images.
    Raises: ValueError if the file is not TorchScript; the function raises it for an output of another shape.
    """
    net = scripted(path, "--identity", "f(images) of an image batch", device)

    def embed(images: Tensor) -> Tensor:
        embeddings = net(images)
        if not isinstance(embeddings, Tensor) or embeddings.ndim != 2 or len(embeddings) != len(images):
            raise ValueError(
                f"--identity: expected embeddings [N, F] from {path}, got"
                f" {getattr(embeddings, 'shape', type(embeddings))}. Export a network that returns [N, F]."
            )
        # Unit length: the inner product of two embeddings is then their cosine similarity.
        return functional.normalize(embeddings.float(), dim=1)

    return embed
