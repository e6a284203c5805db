"""Pictures as published scorers expect them, differentiable and without torchvision.

Shape letters: B pictures, h, w of the pictures, S side that the scorer sees.
"""

import torch
import torch.nn.functional as F

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def clip_preprocess(images: torch.Tensor, size: int = 224) -> torch.Tensor:
    """Short side to `size` (bicubic, antialiased; the long side is truncated to a whole number), centre cut, CLIP's statistics.

    Args: images [B, 3, h, w] in 0..1. Returns: [B, 3, S, S], a new tensor. Differentiable in images.
    Equals torchvision's Resize - CenterCrop - Normalize bit for bit (reference case `preprocess`).
    """
    height, width = images.shape[-2:]
    short = min(height, width)
    resized = _resize(images, (size, size * width // short) if height <= width else (size * height // short, size))
    top, left = (round((side - size) / 2) for side in resized.shape[-2:])
    return normalise(resized[..., top : top + size, left : left + size])


def pad_preprocess(images: torch.Tensor, size: int = 224) -> torch.Tensor:
    """Long side to `size`, black bars about the short one, CLIP's statistics: open_clip's ResizeMaxSize, as HPSv2 sees pictures.

    Args: images [B, 3, h, w] in 0..1. Returns: [B, 3, S, S], a new tensor. Differentiable in images.
    """
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    rows, columns = max(round(height * scale), 1), max(round(width * scale), 1)
    top, left = (size - rows) // 2, (size - columns) // 2
    return normalise(F.pad(_resize(images, (rows, columns)), (left, size - columns - left, top, size - rows - top)))


def normalise(images: torch.Tensor) -> torch.Tensor:
    """(images - mean) / deviation of CLIP's data, per channel; the argument is left as it is."""
    mean, std = (images.new_tensor(numbers).view(3, 1, 1) for numbers in (CLIP_MEAN, CLIP_STD))
    return (images - mean) / std


def _resize(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    if images.shape[-2:] == size:
        return images
    return F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False)
