"""Shared transformer parts: attention, a two-layer perceptron with GELU, and a block that combines the two.

The transformer is that of Vaswani et al. 2017, "Attention is all you need". Attribute names are those of the
checkpoints.

Shapes: N samples, T query tokens, L key and value tokens, C channels, H attention heads, D channels of one
attention head.
"""

import torch
import torch.nn.functional as F
from torch import nn


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute scaled dot-product attention, softmax(q k^T / sqrt(D)) v (Vaswani et al. 2017, equation 1).

    Args:
        q: queries [N, T, H, D].
        k: keys [N, L, H, D].
        v: values [N, L, H, D].
        keep_mask: mask [N, 1, 1, L] bool, True for tokens that may be attended to. None allows all tokens.

    Returns: the attended values [N, T, H, D].
    Differentiable in: q, k, v.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [N, H, T, D]
    # torch expects heads before tokens. Its fused kernels never store the [T, L] matrix of weights.
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep_mask).transpose(1, 2)


class SelfAttention(nn.Module):
    """Self-attention over tokens, [N, T, C] -> [N, T, C].

    The parameters have the names that vision transformers in timm use.

    Args:
        width: number of channels C.
        num_heads: number of heads H, a divisor of C.
    """

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)  # queries, keys, values in this order
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, keep_mask: torch.Tensor | None = None) -> torch.Tensor:
        # One linear layer computes queries, keys and values. Its outputs are ordered [q | k | v], then by
        # attention head.
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)  # [N, T, H, D] each
        return self.proj(attend(q, k, v, keep_mask).flatten(-2))


class Mlp(nn.Module):
    """Perceptron of two layers, linear layer, GELU, linear layer: [..., C] -> [..., C].

    Args:
        width: number of channels C.
        hidden_channels: number of channels between the two linear layers.
        layer_names: attribute names of the two linear layers in the checkpoint.
    """

    def __init__(self, width: int, hidden_channels: int, layer_names: tuple[str, str] = ("fc1", "fc2")):
        super().__init__()
        self.names = layer_names
        # The names of the two layers differ between checkpoints, so the layers are registered under
        # `layer_names`.
        for layer_name, layer in zip(
            layer_names, (nn.Linear(width, hidden_channels), nn.Linear(hidden_channels, width)), strict=True
        ):
            self.add_module(layer_name, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # The layers are looked up by name, because the names differ between instances.
        input_layer, output_layer = (self.get_submodule(layer_name) for layer_name in self.names)
        return output_layer(F.gelu(input_layer(x)))


class Block(nn.Module):
    """Pre-norm transformer block: x becomes x + attn(norm1(x)), and then x + mlp(norm2(x)).

    Args:
        width: number of channels C.
        num_heads: number of heads H, a divisor of C.
        hidden_channels: number of channels inside the perceptron.
        eps: constant of the layer norms.
    """

    def __init__(self, width: int, num_heads: int, hidden_channels: int, *, eps: float = 1e-5):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        # The attribute names are those of vision transformers in timm.
        self.attn = SelfAttention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, hidden_channels)

    def forward(self, x: torch.Tensor, keep_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Apply the block.

        Args:
            x: tokens [N, L, C].
            keep_mask: mask [N, 1, 1, L] bool, True for tokens that may be attended to. None allows all
                tokens.

        Returns: tokens [N, L, C].
        """
        x = x + self.attn(self.norm1(x), keep_mask)
        return x + self.mlp(self.norm2(x))
