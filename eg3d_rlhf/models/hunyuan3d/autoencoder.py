"""Hunyuan3D-2.1's decoder of latent sets: a transformer, then cross-attention from points to it, which says what is inside.

Written from the architecture as it is published, as denoiser.py; the encoder, which wants points sampled on a watertight mesh, is left out.

Shape letters: N samples, T latent tokens, C channels of a latent, W width, H heads, D width of a head, P points, R points
per axis of a grid.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

BOUND = 1.01  # half the edge of the cube that shapes lie in
CHUNK = 8192  # points at once


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """What config.yaml calls vae.params, as far as the decoder reads it; defaults of ShapeVAE."""

    num_latents: int  # T
    embed_dim: int  # C
    width: int
    heads: int
    num_decoder_layers: int
    num_freqs: int = 8
    include_pi: bool = True
    qkv_bias: bool = True
    qk_norm: bool = False
    geo_decoder_mlp_expand_ratio: int = 4
    geo_decoder_downsample_ratio: int = 1
    geo_decoder_ln_post: bool = True
    scale_factor: float = 1.0  # latents are multiplied by it before the flow sees them

    def __post_init__(self):
        if self.geo_decoder_downsample_ratio != 1 or not self.geo_decoder_ln_post:
            raise ValueError("config.yaml, vae: expected geo_decoder_downsample_ratio 1 and geo_decoder_ln_post, got others.")
        least = min(self.num_latents, self.embed_dim, self.heads, self.num_decoder_layers)
        if least < 1 or self.width % self.heads or self.scale_factor <= 0:
            raise ValueError(f"config.yaml, vae: expected sizes >= 1 and heads that divide the width, got {self}. Restore the file.")


class Heads(nn.Module):
    """Norms of queries and keys, head by head."""

    def __init__(self, size: int, norm: bool):
        super().__init__()
        self.q_norm, self.k_norm = (nn.LayerNorm(size, eps=1e-6) if norm else nn.Identity() for _ in range(2))

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """[N, S, H, D] each -> [N, S, W]."""
        q, k, v = (x.transpose(1, 2) for x in (self.q_norm(q), self.k_norm(k), v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """One layer makes queries, keys and values, head by head."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.heads, width = config.heads, config.width
        self.c_qkv, self.c_proj = nn.Linear(width, 3 * width, bias=config.qkv_bias), nn.Linear(width, width)
        self.attention = Heads(width // config.heads, config.qk_norm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(self.attention(*self.c_qkv(x).unflatten(-1, (self.heads, -1)).chunk(3, -1)))


class CrossAttention(nn.Module):
    """From points to latents."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.heads, width = config.heads, config.width
        self.c_q, self.c_kv = nn.Linear(width, width, bias=config.qkv_bias), nn.Linear(width, 2 * width, bias=config.qkv_bias)
        self.c_proj, self.attention = nn.Linear(width, width), Heads(width // config.heads, config.qk_norm)

    def forward(self, x: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
        q, kv = (y.unflatten(-1, (self.heads, -1)) for y in (self.c_q(x), self.c_kv(data)))
        return self.c_proj(self.attention(q, *kv.chunk(2, -1)))


class Mlp(nn.Module):
    """Two layers."""

    def __init__(self, width: int, ratio: int):
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(width, ratio * width), nn.Linear(ratio * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class ResidualBlock(nn.Module):
    """Attention, mlp."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.attn, self.mlp = SelfAttention(config), Mlp(config.width, 4)
        self.ln_1, self.ln_2 = (nn.LayerNorm(config.width, eps=1e-6) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class CrossBlock(nn.Module):
    """Cross-attention, mlp."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.attn, self.mlp = CrossAttention(config), Mlp(config.width, config.geo_decoder_mlp_expand_ratio)
        self.ln_1, self.ln_2, self.ln_3 = (nn.LayerNorm(config.width, eps=1e-6) for _ in range(3))

    def forward(self, x: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x), self.ln_2(data))
        return x + self.mlp(self.ln_3(x))


class PointDecoder(nn.Module):
    """Points and latents -> a number, positive inside."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.freqs, self.pi = config.num_freqs, config.include_pi
        self.query_proj = nn.Linear(3 * (2 * config.num_freqs + 1), config.width)
        self.cross_attn_decoder = CrossBlock(config)
        self.ln_post, self.output_proj = nn.LayerNorm(config.width), nn.Linear(config.width, 1)

    def forward(self, points: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """[N, P, 3], [N, T, W] -> [N, P]."""
        rates = 2.0 ** torch.arange(self.freqs, dtype=torch.float32, device=points.device) * (torch.pi if self.pi else 1)
        angles = (points[..., None] * rates).flatten(-2)  # [N, P, 3 F]
        seen = torch.cat([points, angles.sin(), angles.cos()], -1).to(latents.dtype)
        x = self.cross_attn_decoder(self.query_proj(seen), latents)
        return self.output_proj(self.ln_post(x))[..., 0]


class Transformer(nn.Module):
    """Blocks in turn."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.resblocks = nn.ModuleList(ResidualBlock(config) for _ in range(config.num_decoder_layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.resblocks:
            x = block(x)
        return x


class ShapeDecoder(nn.Module):
    """The half of the autoencoder that makes shapes of latents."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        self.post_kl = nn.Linear(config.embed_dim, config.width)
        self.transformer, self.geo_decoder = Transformer(config), PointDecoder(config)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as the flow sees them, [N, T, C] -> what points are asked of, [N, T, W]."""
        return self.transformer(self.post_kl(latents / self.config.scale_factor))

    @torch.no_grad()
    def volume(self, latents: torch.Tensor, resolution: int) -> torch.Tensor:
        """Latents of one shape [T, C] -> its numbers on a grid over the cube, [R, R, R] over x, y, z, on the CPU."""
        decoded = self(latents[None])
        found = [self.geo_decoder(points[None], decoded)[0].float().cpu() for points in _grid(resolution, latents.device)]
        return torch.cat(found).view(resolution, resolution, resolution)


def _grid(resolution: int, device: torch.device) -> Iterator[torch.Tensor]:
    """Points [P, 3] of the grid, some at a time."""
    axis = torch.linspace(-BOUND, BOUND, resolution, device=device)
    for start in range(0, resolution**3, CHUNK):
        number = torch.arange(start, min(start + CHUNK, resolution**3), device=device)
        yield torch.stack([axis[number // resolution**2], axis[number // resolution % resolution], axis[number % resolution]], 1)
