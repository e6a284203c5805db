"""Memory layouts and dtypes that the compiled image ops read: contiguous, and channels-last for images."""

import torch

from torch_utils.ops.implementations import current

COMPILED_DTYPES = (  # what the compiled image ops take: [on a CPU, on CUDA]
    (torch.float32, torch.float64),
    (torch.float32, torch.float64, torch.float16, torch.bfloat16),
)
_CHANNELS_LAST_FROM = 64  # pixels per edge


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether x [N, C, H, W] lies channels-last and not contiguous as well."""
    return x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def dense(x: torch.Tensor) -> torch.Tensor:
    """x itself where it is contiguous or channels-last, else a contiguous copy. Differentiable in x."""
    return x if is_channels_last(x) else x.contiguous()


def like_layout(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """x in the memory layout of `other`, of the same shape; a copy only where it lies differently. Differentiable in x."""
    return x.contiguous(memory_format=torch.channels_last if is_channels_last(other) else torch.contiguous_format)


def convolution_layout(device: torch.device, resolution: int) -> torch.memory_format:
    """The layout in which convolutions of an image of `resolution` pixels and what lies between them are fastest.

    On a CPU channels-last from 64 pixels on: oneDNN's transposed convolutions are twice as fast there, and the compiled ones need no
    copies. Below, weights outweigh pixels, and their reordering would cost more. The reference implementation is contiguous throughout.
    """
    fast = device.type == "cpu" and current() != "ref" and resolution >= _CHANNELS_LAST_FROM
    return torch.channels_last if fast else torch.contiguous_format
