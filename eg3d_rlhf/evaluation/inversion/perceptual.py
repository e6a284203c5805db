"""How far apart two images look: a network's features that gradients pass through, the bundled ones or a TorchScript file's.

Letters: N images, H, W pixels, F features.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from eg3d_rlhf.measures.features import RESOLUTION, HeadFactorFeatures, to_resolution

LARGEST = 256  # pixels per edge that a file's network is shown at most, as the published projectors have it


class Perceptual:
    """A distance [N] between images [N, 3, H, W] in [-1, 1]; `name` says whose, and distances under different names never compare.

    Args: features: images -> [N, F], differentiable; mean: divide the sum of squared differences by F.
    """

    def __init__(self, name: str, features: Callable[[Tensor], Tensor], mean: bool):
        self.name, self.features, self._mean = name, features, mean

    def distance(self, seen: Tensor, wanted: Tensor) -> Tensor:
        """Squared difference [N] of features [N, F]; wanted may be [1, F]. Differentiable in both."""
        squares = (seen - wanted).square()
        return squares.mean(dim=1) if self._mean else squares.sum(dim=1)

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        """Distance [N] of two batches of images."""
        return self.distance(self.features(first), self.features(second))


def load_perceptual(path: Path | None, resolution: int, device: torch.device | str = "cpu") -> Perceptual:
    """The distance of a file: None for the bundled head-factor network, .safetensors for another of its kind, else TorchScript.

    TorchScript is called as the projectors of the StyleGAN family call their VGG16: net(images in 0..255 of at most 256 pixels,
    resize_images=False, return_lpips=True) -> [N, F], or net(images) where it takes no such options; its squared differences are summed.
    The bundled network's standardised features are averaged.

    Args: resolution: pixels per edge of the images to come, with which the file is tried.
    Raises: ValueError for another file, one that gives something else, or one that lets no gradient through.
    """
    if path is None or path.suffix == ".safetensors":
        own = HeadFactorFeatures.load(path, device)

        def features(images: Tensor) -> Tensor:
            return (own.net.penultimate(to_resolution(images, RESOLUTION)) - own.net.feature_mean) / own.net.feature_std

        return Perceptual(own.name, features, mean=True)
    try:
        net = torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"expected a TorchScript file or .safetensors, got {path} ({reason}). Name another.") from error
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    takes = {argument.name for argument in net.forward.schema.arguments}
    options = {name: value for name, value in {"resize_images": False, "return_lpips": True}.items() if name in takes}

    def scripted(images: Tensor) -> Tensor:
        pixels = (images + 1) * 127.5
        if max(pixels.shape[-2:]) > LARGEST:
            pixels = functional.interpolate(pixels, (LARGEST, LARGEST), mode="area")
        return net(pixels, **options)

    _try(scripted, path, resolution, device)
    return Perceptual(f"torchscript-{path.stem}", scripted, mean=False)


def _try(features: Callable[[Tensor], Tensor], path: Path, resolution: int, device: torch.device | str) -> None:
    images = torch.zeros(2, 3, resolution, resolution, device=device, requires_grad=True)
    try:
        found = features(images)
    except RuntimeError as error:
        reason = next((line for line in str(error).splitlines()[::-1] if line.strip()), type(error).__name__)
        raise ValueError(f"expected a net of images [N, 3, H, W], got {path} ({reason.strip()}). Name a VGG16 of projectors.") from None
    if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != 2:
        raise ValueError(f"expected features [N, F] from {path}, got {getattr(found, 'shape', type(found))}. Name another.")
    if not found.requires_grad:
        raise ValueError(f"expected features that gradients pass through, got none from {path}. Export the network without no_grad.")
