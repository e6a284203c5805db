"""Rotary positions in three dimensions: attention that knows of two tokens only how far apart they are.

A head's D channels are D / 2 planes. For each axis n = D // 6 planes turn by coordinate * rate_i, rate_i = f_0 / f_1^(i / n); planes left
over do not turn. The product of a turned query and a turned key depends on the difference of their angles alone, hence on that of
their coordinates (Su et al. 2021, here per axis).

Shape letters as in trellis/blocks.py; P = D / 2 planes of a head.
"""

from dataclasses import dataclass

import torch

from eg3d_rlhf.models.trellis.blocks import Layout


def angles_of(coords: torch.Tensor, head_channels: int, freq: tuple[float, float] = (1.0, 10000.0)) -> torch.Tensor:
    """Angles of coordinates [V, 3] -> [V, P] float32: the planes of axis 1, of axis 2, of axis 3, then zeros."""
    count = head_channels // 6
    rates = freq[0] / freq[1] ** (torch.arange(count, dtype=torch.float32, device=coords.device) / count)
    turned = (coords.float()[:, :, None] * rates).flatten(1)  # [V, 3 count]
    return torch.nn.functional.pad(turned, (0, head_channels // 2 - turned.shape[1]))


def rotate(x: torch.Tensor, angles: torch.Tensor, adjacent: bool = True) -> torch.Tensor:
    """Turn heads [..., V, H, D] by angles [V, P]; norms stay. Computed in float32. Differentiable in: x.

    Args: adjacent: a plane is channels 2 i and 2 i + 1; otherwise i and i + P.
    """
    axis = -1 if adjacent else -2
    a, b = x.float().unflatten(-1, (-1, 2) if adjacent else (2, -1)).unbind(axis)  # [..., V, H, P]
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]  # [V, 1, P]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], axis).flatten(-2).to(x.dtype)


@dataclass(frozen=True)
class RotaryLayout:
    """A `Layout` whose tokens have places: self-attention turns queries and keys, attention to a condition does not."""

    inner: Layout
    angles: torch.Tensor  # [V, P], or [T, P] of the tokens that all samples have
    adjacent: bool = True

    def per_token(self, values: torch.Tensor) -> torch.Tensor:
        return self.inner.per_token(values)

    def self_attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.inner.self_attention(rotate(q, self.angles, self.adjacent), rotate(k, self.angles, self.adjacent), v)

    def cross_attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.inner.cross_attention(q, k, v)
