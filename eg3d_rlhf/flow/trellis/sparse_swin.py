"""The transformer of TRELLIS's latent autoencoder: attention in windows, which every other block shifts by half a window.

Shape letters: V voxels, C channels.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from eg3d_rlhf.flow.sparse import SparseBatch
from eg3d_rlhf.flow.trellis.blocks import (
    FeedForward,
    LayerNorm32,
    Layout,
    SelfAttention,
    convert_torso,
    position_embedding,
    run_block,
    torso_dtype,
)
from eg3d_rlhf.flow.trellis.sparse_attention import SparseLayout
from eg3d_rlhf.shapes import check_shape

ATTENTION = ("swin", "full")


@dataclass(frozen=True, kw_only=True)
class SwinConfig:
    """What encoder and decoder have in common of what their JSON files call args."""

    resolution: int
    model_channels: int
    latent_channels: int
    num_blocks: int
    num_heads: int | None = None  # or model_channels / num_head_channels
    num_head_channels: int = 64
    mlp_ratio: float = 4
    attn_mode: str = "swin"  # in windows, or "full": among all voxels of a sample
    window_size: int = 8  # voxels per axis
    pe_mode: str = "ape"
    use_fp16: bool = False  # type of the blocks as built; files bring their own
    use_checkpoint: bool = False  # compute blocks again in the backward pass
    qk_rms_norm: bool = False

    def __post_init__(self):
        who = type(self).__name__
        if self.pe_mode != "ape":
            raise ValueError(f"{who}: expected pe_mode 'ape', got {self.pe_mode!r}. Rotary positions are in no released model.")
        if self.attn_mode not in ATTENTION or self.window_size < 2:
            got = f"{self.attn_mode!r} and {self.window_size}"
            raise ValueError(f"{who}: expected attn_mode {' or '.join(ATTENTION)} and window_size >= 2, got {got}. Correct the JSON file.")
        if self.model_channels % self.heads:
            got = f"{self.model_channels} / {self.heads}"
            raise ValueError(f"{who}: expected model_channels to divide by heads, got {got}. Correct the model's JSON file.")

    @property
    def heads(self) -> int:
        return self.num_heads or self.model_channels // self.num_head_channels


class SwinBlock(nn.Module):
    """Self-attention and feed-forward."""

    def __init__(self, channels: int, heads: int, mlp_ratio: float, qk_rms_norm: bool):
        super().__init__()
        self.norm1, self.norm2 = LayerNorm32(channels), LayerNorm32(channels)
        self.attn = SelfAttention(channels, heads, qk_rms_norm)
        self.mlp = FeedForward(channels, mlp_ratio)

    def forward(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        x = x + self.attn(self.norm1(x), layout)
        return x + self.mlp(self.norm2(x))


class SwinTransformer(nn.Module):
    """Features [V, in] on voxels -> [V, out] on the same."""

    def __init__(self, config: SwinConfig, in_channels: int, out_channels: int):
        super().__init__()
        self.config = config
        self.recompute = config.use_checkpoint
        self.input_layer = nn.Linear(in_channels, config.model_channels)
        self.blocks = nn.ModuleList(
            SwinBlock(config.model_channels, config.heads, config.mlp_ratio, config.qk_rms_norm) for _ in range(config.num_blocks)
        )
        self.out_layer = nn.Linear(config.model_channels, out_channels)
        if config.use_fp16:
            convert_torso(self.blocks, torch.float16)

    def transform(self, x: SparseBatch) -> SparseBatch:
        """Input layer, positions, blocks, norm, output layer. Differentiable in: feats and parameters."""
        who, config = type(self).__name__, self.config
        check_shape(f"{who}.feats", x.feats, ["V", self.input_layer.in_features], "Give features of the kind that it was trained on.")
        h = self.input_layer(x.feats.float()) + position_embedding(x.coords[:, 1:], config.model_channels)
        h = h.to(torso_dtype(self.blocks))
        window = config.window_size if config.attn_mode == "swin" else None
        layouts = [SparseLayout(x, window, shift) for shift in (0, config.window_size // 2)]
        for i, block in enumerate(self.blocks):
            h = run_block(block, h, layouts[i % 2], recompute=self.recompute)
        h = F.layer_norm(h.float(), h.shape[-1:])
        return x.with_feats(self.out_layer(h.to(self.out_layer.weight.dtype)))
