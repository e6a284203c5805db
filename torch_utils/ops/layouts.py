"""Memory layouts and dtypes that the compiled image ops read: contiguous, and channels-last for images."""

import torch

from torch_utils.ops.implementations import current

COMPILED_DTYPES = (  # what the compiled image ops take: [on a CPU, on CUDA]
    (torch.float32, torch.float64),
    (torch.float32, torch.float64, torch.float16, torch.bfloat16),
)
_CHANNELS_LAST_FROM = 64  # pixels per edge
_FEW_CHANNELS, _FEW_FROM = 64, 32  # up to so many channels, from so many pixels per edge on: weights are small there


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether x [N, C, H, W] lies channels-last and not contiguous as well."""
    return x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def dense(x: torch.Tensor) -> torch.Tensor:
    """x itself where it is contiguous or channels-last, else a contiguous copy. Differentiable in x."""
    return x if is_channels_last(x) else x.contiguous()


def like_layout(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """x in the memory layout of `other`, of the same shape; a copy only where it lies differently. Differentiable in x."""
    return x.contiguous(memory_format=torch.channels_last if is_channels_last(other) else torch.contiguous_format)


def convolution_layout(device: torch.device, resolution: int, channels: int) -> torch.memory_format:
    """The layout in which convolutions of `channels` channels of `resolution` x `resolution` pixels, and what lies between, are fastest.

    On a CPU channels-last from 64 pixels on (few channels: 32): oneDNN's transposed convolutions are twice as fast there, and the compiled
    ones need no copies. Below, weights outweigh pixels, and their reordering would cost more. The reference implementation is contiguous
    throughout.
    """
    least = _FEW_FROM if channels <= _FEW_CHANNELS else _CHANNELS_LAST_FROM
    fast = device.type == "cpu" and current() != "ref" and resolution >= least
    return torch.channels_last if fast else torch.contiguous_format
