"""Parts of the transformers in this project: attention, two layers with GELU, and a block of both.

Shape letters: N samples, T tokens that ask, L tokens that are asked, C channels, H heads, D channels of a
head.
"""

import torch
import torch.nn.functional as F
from torch import nn


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor | None = None
) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v: q [N, T, H, D], k and v [N, L, H, D] -> [N, T, H, D]. Differentiable in: q,
    k, v.

    Args: keep: [N, 1, 1, L] bool, which tokens are there.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [N, H, T, D]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep).transpose(1, 2)


class SelfAttention(nn.Module):
    """Attention among tokens, [N, T, C] -> [N, T, C]; named as in vision transformers."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)  # [N, T, H, D] each
        return self.proj(attend(q, k, v, keep).flatten(-2))


class Mlp(nn.Module):
    """Linear, GELU, linear, [..., C] -> [..., C]. Args: names: of the linear layers."""

    def __init__(self, width: int, hidden: int, names: tuple[str, str] = ("fc1", "fc2")):
        super().__init__()
        self.names = names
        for name, layer in zip(names, (nn.Linear(width, hidden), nn.Linear(hidden, width)), strict=True):
            self.add_module(name, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, last = (self.get_submodule(name) for name in self.names)
        return last(F.gelu(first(x)))


class Block(nn.Module):
    """Pre-norm transformer block: x + attn(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(self, width: int, heads: int, hidden: int, *, eps: float = 1e-5):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, hidden)

    def forward(self, x: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        """[N, L, E] -> [N, L, E]; keep [N, 1, 1, L] bool: which tokens are there."""
        x = x + self.attn(self.norm1(x), keep)
        return x + self.mlp(self.norm2(x))
