"""Homogeneous matrices and wavelet filters for image augmentation.

Shapes: N batch. Matrices act on column vectors from the left; an entry is a number or a tensor [N].
"""

import math
from collections.abc import Sequence

import numpy as np
import torch

Entry = float | torch.Tensor

# Least asymmetric Daubechies wavelet with 6 vanishing moments, low-pass decomposition filter (Daubechies 1992, table 6.3).
SYM6 = (
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633, 0.4910559419267466, 0.787641141030194,
    0.3379294217276218, -0.07263752278646252, -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148,
)  # fmt: skip
_R3 = math.sqrt(3)
SYM2 = tuple(a / (4 * math.sqrt(2)) for a in (1 - _R3, 3 - _R3, 3 + _R3, 1 + _R3))  # the same with 2 vanishing moments


def matrix(rows: Sequence[Sequence[Entry]], like: torch.Tensor) -> torch.Tensor:
    """Assemble matrices from entries. Returns [N, R, R] on the device and dtype of `like` [N, ...]."""
    n = like.shape[0]
    entries = [torch.as_tensor(e, dtype=like.dtype, device=like.device).expand(n) for row in rows for e in row]
    return torch.stack(entries, dim=1).reshape(n, len(rows), len(rows[0]))


def translate2d(x: Entry, y: Entry, like: torch.Tensor) -> torch.Tensor:
    """Shift by (x, y). Returns [N, 3, 3]."""
    return matrix([[1, 0, x], [0, 1, y], [0, 0, 1]], like)


def scale2d(x: Entry, y: Entry, like: torch.Tensor) -> torch.Tensor:
    """Scale about the origin. Returns [N, 3, 3]."""
    return matrix([[x, 0, 0], [0, y, 0], [0, 0, 1]], like)


def rotate2d(theta: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Rotate by theta radians [N], from x towards y. Returns [N, 3, 3]."""
    c, s = theta.cos(), theta.sin()
    return matrix([[c, -s, 0], [s, c, 0], [0, 0, 1]], like)


def translate3d(x: Entry, y: Entry, z: Entry, like: torch.Tensor) -> torch.Tensor:
    """Shift by (x, y, z). Returns [N, 4, 4]."""
    return matrix([[1, 0, 0, x], [0, 1, 0, y], [0, 0, 1, z], [0, 0, 0, 1]], like)


def scale3d(x: Entry, y: Entry, z: Entry, like: torch.Tensor) -> torch.Tensor:
    """Scale about the origin. Returns [N, 4, 4]."""
    return matrix([[x, 0, 0, 0], [0, y, 0, 0], [0, 0, z, 0], [0, 0, 0, 1]], like)


def rotate_about_grey(theta: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Rotate colours by theta radians [N] about the grey axis v = (1,1,1)/sqrt 3 (Rodrigues: vv' + cos (I - vv') + sin [v]x).

    Returns [N, 4, 4].
    """
    c, s = theta.cos(), theta.sin()
    same, plus, minus = (1 + 2 * c) / 3, (1 - c) / 3 + s / _R3, (1 - c) / 3 - s / _R3
    return matrix([[same, minus, plus, 0], [plus, same, minus, 0], [minus, plus, same, 0], [0, 0, 0, 1]], like)


def grey_projector(like: torch.Tensor) -> torch.Tensor:
    """vv' of the homogeneous grey axis v = (1,1,1,0)/sqrt 3. Returns [4, 4]."""
    v = like.new_tensor([1, 1, 1, 0]) / _R3
    return torch.outer(v, v)


def octave_filter_bank(bands: int = 4) -> np.ndarray:
    """Zero-phase FIR filters that split a signal into octaves and add up to the identity.

    One two-band stage has the power responses |H|^2/2 of the sym2 low-pass and of its mirrored high-pass, which sum to 1. Each
    further stage splits the lowest band again: all filters so far are stretched by two (zero-stuffed), their images removed by the
    low-pass, and the high-pass joins as the new top band (Karras et al. 2020, "Training GANs with limited data", appendix B).

    Returns: float64 [bands, taps] from lowest to highest band; taps = 43 for 4 bands.
    """
    low = np.asarray(SYM2)
    high = low * (-1.0) ** np.arange(len(low))
    low2, high2 = (np.convolve(h, h[::-1]) / 2 for h in (low, high))
    bank = np.eye(bands, 1)
    for top in range(1, bands):
        stretched = np.zeros([bands, 2 * bank.shape[1] - 1])
        stretched[:, ::2] = bank
        bank = np.stack([np.convolve(row, low2) for row in stretched])
        start = (bank.shape[1] - len(high2)) // 2
        bank[top, start : start + len(high2)] += high2
    return np.where(np.abs(bank) < 1e-12, 0.0, bank)  # taps that cancel are 0 in whatever order numpy sums them
