"""DINOv2's picture transformer in plain PyTorch, with the parameters' names of transformers' Dinov2Model (and of its form with registers).

Source: Oquab et al. 2023; Darcet et al. 2023 for the registers.
Shape letters: N pictures, S pixels per side, p pixels per side of a patch, G = S / p, L = 1 + registers + G^2 tokens, E their size.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from eg3d_rlhf.core.shapes import check_shape

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of pictures in 0..1


@dataclass(frozen=True, kw_only=True)
class DinoConfig:
    """What a config of transformers says of the network; the defaults are those of the large one."""

    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    mlp_ratio: int = 4
    image_size: int = 518  # of the position embeddings
    patch_size: int = 14
    num_channels: int = 3
    layer_norm_eps: float = 1e-6
    hidden_act: str = "gelu"
    qkv_bias: bool = True
    use_swiglu_ffn: bool = False
    num_register_tokens: int = 0

    def __post_init__(self):
        if self.hidden_act != "gelu" or self.use_swiglu_ffn:
            raise ValueError(f"DinoConfig: expected gelu and no swiglu, got {self.hidden_act!r}, {self.use_swiglu_ffn}. Not read here.")
        if self.image_size % self.patch_size or self.hidden_size % self.num_attention_heads:
            raise ValueError(f"DinoConfig: expected patches and heads that divide picture and size, got {self}. Correct it.")

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> "DinoConfig":
        """From a config; settings that say nothing of the network, such as dropout, are passed over."""
        return cls(**{field.name: content[field.name] for field in fields(cls) if content.get(field.name) is not None})

    @property
    def tokens(self) -> int:
        """L at its own size of pictures."""
        return 1 + self.num_register_tokens + (self.image_size // self.patch_size) ** 2


class Patches(nn.Module):
    """A linear map of every patch."""

    def __init__(self, config: DinoConfig):
        super().__init__()
        self.projection = nn.Conv2d(config.num_channels, config.hidden_size, config.patch_size, config.patch_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.projection(x).flatten(2).transpose(1, 2)


class Embeddings(nn.Module):
    """Patches with their positions, behind the token of the whole and the registers."""

    def __init__(self, config: DinoConfig):
        super().__init__()
        size = config.hidden_size
        self.cls_token, self.mask_token = nn.Parameter(torch.zeros(1, 1, size)), nn.Parameter(torch.zeros(1, size))
        if config.num_register_tokens:
            self.register_tokens = nn.Parameter(torch.zeros(1, config.num_register_tokens, size))
        self.registers = config.num_register_tokens
        self.patch_embeddings = Patches(config)
        positions = torch.zeros(1, 1 + (config.image_size // config.patch_size) ** 2, size)
        self.position_embeddings = nn.Parameter(positions)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), self.patch_embeddings(x)], 1) + self.position_embeddings
        if not self.registers:
            return tokens
        return torch.cat([tokens[:, :1], self.register_tokens.expand(len(x), -1, -1), tokens[:, 1:]], 1)


class Projections(nn.Module):
    """Queries, keys and values."""

    def __init__(self, config: DinoConfig):
        super().__init__()
        size = config.hidden_size
        self.query, self.key, self.value = (nn.Linear(size, size, bias=config.qkv_bias) for _ in range(3))


class Output(nn.Module):
    """What follows attention."""

    def __init__(self, size: int):
        super().__init__()
        self.dense = nn.Linear(size, size)


class Attention(nn.Module):
    """Of all tokens to all."""

    def __init__(self, config: DinoConfig):
        super().__init__()
        self.heads = config.num_attention_heads
        self.attention, self.output = Projections(config), Output(config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.attention
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (parts.query, parts.key, parts.value))
        return self.output.dense(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Scale(nn.Module):
    """A factor for every channel."""

    def __init__(self, size: int):
        super().__init__()
        self.lambda1 = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.lambda1


class Mlp(nn.Module):
    """Two layers."""

    def __init__(self, config: DinoConfig):
        super().__init__()
        inner = int(config.hidden_size * config.mlp_ratio)
        self.fc1, self.fc2 = nn.Linear(config.hidden_size, inner), nn.Linear(inner, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Layer(nn.Module):
    """Attention and mlp, each scaled."""

    def __init__(self, config: DinoConfig):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) for _ in range(2))
        self.attention, self.mlp = Attention(config), Mlp(config)
        self.layer_scale1, self.layer_scale2 = (Scale(config.hidden_size) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.layer_scale1(self.attention(self.norm1(x)))
        return x + self.layer_scale2(self.mlp(self.norm2(x)))


class Layers(nn.Module):
    """In turn."""

    def __init__(self, config: DinoConfig):
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))


class Dino(nn.Module):
    """Pictures [N, 3, S, S] of 0..1 -> tokens [N, L, E], before the last norm or after it. S is the size it was made for."""

    def __init__(self, config: DinoConfig):
        super().__init__()
        self.config = config
        self.embeddings, self.encoder = Embeddings(config), Layers(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pictures: torch.Tensor, normed: bool = True) -> torch.Tensor:
        size = self.config.image_size
        check_shape("Dino.pictures", pictures, ["N", self.config.num_channels, size, size], "Scale them to its size.")
        weight = self.layernorm.weight
        mean, std = (weight.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        x = self.embeddings((pictures.to(weight) - mean) / std)
        for layer in self.encoder.layer:
            x = layer(x)
        return self.layernorm(x) if normed else x
