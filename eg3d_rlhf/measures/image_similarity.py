"""Measure how similar two images of the same object are.

PSNR and SSIM (Wang, Bovik, Sheikh and Simoncelli 2004) are implemented here. LPIPS (Zhang et al. 2018) and
the embeddings of a face recogniser ("identity") are computed by TorchScript files of the user.

Shapes: N images, C channels, H x W pixels, F features. Images are float in [-1, 1].
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

PSNR_CAP = 100.0  # dB; the value of two equal images, whose ratio is infinite
# Constants of Wang et al. 2004: side and standard deviation of the Gaussian window in pixels, and the two
# constants that keep the denominators of the formula away from 0.
_WINDOW = 11
_SIGMA = 1.5
_K1 = 0.01
_K2 = 0.03


def _check(measure_name: str, first_images: Tensor, second_images: Tensor) -> None:
    """Raise ValueError unless both arguments are batches of images [N, C, H, W] of equal shape."""
    if first_images.ndim != 4 or first_images.shape != second_images.shape:
        raise ValueError(
            f"{measure_name}: both batches must have the same shape [N, C, H, W], but have"
            f" {list(first_images.shape)} and {list(second_images.shape)}. Render both at the same"
            " resolution."
        )


def psnr(first_images: Tensor, second_images: Tensor) -> Tensor:
    """Compute the peak signal-to-noise ratio [N] in dB of image pairs, 10 log10(4 / mse).

    mse is the mean squared difference of the two images of a pair. Values are at most PSNR_CAP. Higher values
    mean more similar images.

    Args:
        first_images: images [N, C, H, W] in [-1, 1].
        second_images: images of the same shape.

    Raises: ValueError if the shapes differ.
    """
    _check("psnr", first_images, second_images)
    mean_squared_error = (first_images.double() - second_images.double()).square().mean(dim=(1, 2, 3))
    # The peak is 2, the range of values, so its square is 4. The clamp keeps equal images finite.
    return (10 * torch.log10(4 / mean_squared_error.clamp_min(1e-30))).clamp_max(PSNR_CAP)


def ssim(first_images: Tensor, second_images: Tensor) -> Tensor:
    """Compute the structural similarity [N], at most 1, of image pairs (Wang, Bovik, Sheikh and Simoncelli
    2004, eq. 13).

    Means, variances and the covariance are weighted by an 11 x 11 Gaussian window of standard deviation 1.5.
    Variances are not corrected for their bias. The result is averaged over channels and over the positions
    where the window lies inside the image.

    Args:
        first_images: images [N, C, H, W] in [-1, 1].
        second_images: images of the same shape.

    Raises: ValueError if the shapes differ or the images are smaller than the window.
    """
    _check("ssim", first_images, second_images)
    if min(first_images.shape[2:]) < _WINDOW:
        raise ValueError(
            f"ssim: images must have at least {_WINDOW} x {_WINDOW} pixels, but have"
            f" {list(first_images.shape[2:])}. Render larger images."
        )
    pixel_offsets = torch.arange(_WINDOW, dtype=torch.float64, device=first_images.device) - _WINDOW // 2
    window_weights = torch.exp(-(pixel_offsets**2) / (2 * _SIGMA**2))
    window_weights = window_weights / window_weights.sum()

    # The Gaussian is separable: two convolutions with 11 weights replace one with 121.
    def blur(x: Tensor) -> Tensor:
        x = functional.conv2d(x, window_weights.reshape(1, 1, -1, 1))
        return functional.conv2d(x, window_weights.reshape(1, 1, 1, -1))

    # `blur` convolves one channel, so channels become items of the batch: [N*C, 1, H, W].
    a, b = (images.double().flatten(0, 1)[:, None] for images in (first_images, second_images))
    mean_a = blur(a)
    mean_b = blur(b)
    var_a = blur(a * a) - mean_a**2
    var_b = blur(b * b) - mean_b**2
    cov = blur(a * b) - mean_a * mean_b
    # C_i = (K_i L)^2 with the range of values L = 2.
    c1 = (_K1 * 2) ** 2
    c2 = (_K2 * 2) ** 2
    # Equation 13 of the paper; double precision, because each variance is a difference of large numbers.
    similarity_map = (
        (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    )
    return similarity_map.unflatten(0, first_images.shape[:2]).mean(dim=(1, 2, 3, 4))


def scripted(path: Path, flag: str, interface: str, device: torch.device | str) -> Callable[..., Any]:
    """Load a TorchScript network and return a function that evaluates it without gradients.

    Args:
        path: TorchScript file.
        flag: name of the option or class that error messages begin with.
        interface: description of the call that the network must support, for error messages.
        device: device of the network.

    Raises: ValueError if the file is not TorchScript. The returned function raises ValueError if the call of
        the network fails.
    """
    try:
        net = torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"{flag}: {path} is not a readable TorchScript file ({str(error).splitlines()[0]}). Export the"
            " network with torch.jit.script or torch.jit.trace, and save it with torch.jit.save."
        ) from error

    @torch.no_grad()
    def evaluate(*images: Tensor, **arguments: Any) -> Any:
        try:
            return net(*images, **arguments)
        except RuntimeError as error:
            # TorchScript prints a trace of several lines; the last one that is not blank states the cause.
            reason = next(
                (message_line for message_line in str(error).splitlines()[::-1] if message_line.strip()),
                type(error).__name__,
            )
            raise ValueError(
                f"{flag}: the network in {path} cannot be called as {interface} ({reason}). Export a network"
                " with that interface."
            ) from error

    return evaluate


def load_lpips(path: Path, device: torch.device | str = "cpu") -> Callable[[Tensor, Tensor], Tensor]:
    """Load the perceptual distance LPIPS (Zhang et al. 2018) from a TorchScript file.

    Returns: a function f(a, b) that computes the distances [N] between images a and b, both [N, 3, H, W] in
        [-1, 1]. The network of the file is called in the same way. f raises ValueError if the network does
        not return one distance per pair.
    Raises: ValueError if the file is not TorchScript.
    """
    net = scripted(path, "--lpips", "f(a, b) of two image batches", device)

    def distance(first_images: Tensor, second_images: Tensor) -> Tensor:
        distances = net(first_images, second_images)
        # Published LPIPS networks return [N, 1, 1, 1], but networks that return [N] are accepted, too.
        if not isinstance(distances, Tensor) or distances.numel() != len(first_images):
            raise ValueError(
                f"--lpips: the network in {path} must return one distance per image pair, but returned"
                f" {getattr(distances, 'shape', type(distances))}. Export a network that returns [N]."
            )
        return distances.reshape(-1)

    return distance


def load_identity(path: Path, device: torch.device | str = "cpu") -> Callable[[Tensor], Tensor]:
    """Load a network that computes identity embeddings of faces from a TorchScript file.

    Returns: a function that computes embeddings [N, F] of length 1 from images [N, 3, H, W] in [-1, 1]. The
        function raises ValueError if the network of the file does not return [N, F].
    Raises: ValueError if the file is not TorchScript.
    """
    net = scripted(path, "--identity", "f(images) of an image batch", device)

    def embed(images: Tensor) -> Tensor:
        embeddings = net(images)
        if not isinstance(embeddings, Tensor) or embeddings.ndim != 2 or len(embeddings) != len(images):
            raise ValueError(
                f"--identity: the network in {path} must return embeddings [N, F], but returned"
                f" {getattr(embeddings, 'shape', type(embeddings))}. Export a network that returns [N, F]."
            )
        # Unit length: the inner product of two embeddings is then their cosine similarity.
        return functional.normalize(embeddings.float(), dim=1)

    return embed
