"""TRELLIS's first flow: a transformer over the dense latent of an occupancy grid.

Shape letters as in blocks.py; R grid points per axis, p patch size, G = R / p, T = G^3.
"""

import torch
import torch.nn.functional as F
from torch import nn

from eg3d_rlhf.flow.trellis.blocks import (
    DenseLayout,
    ModulatedBlock,
    TimeEmbedder,
    convert_torso,
    modulation,
    position_embedding,
    run_block,
    torso_dtype,
)
from eg3d_rlhf.flow.trellis.flow_config import FlowConfig
from eg3d_rlhf.shapes import check_shape


class StructureFlowConfig(FlowConfig):
    """What its JSON file calls args."""


class StructureFlow(nn.Module):
    """model(x_t [N, C, R, R, R], t [N] in 0..1, cond [N, L, E]) -> velocity, like x_t. Differentiable in: everything but t."""

    def __init__(self, config: StructureFlowConfig):
        super().__init__()
        self.config = config
        self.recompute = config.use_checkpoint
        channels, cells = config.model_channels, config.patch_size**3
        grid = torch.arange(config.resolution // config.patch_size)
        coords = torch.cartesian_prod(grid, grid, grid)  # [T, 3]
        self.t_embedder = TimeEmbedder(channels)
        if config.share_mod:
            self.adaLN_modulation = modulation(channels)
        self.register_buffer("pos_emb", position_embedding(coords, channels))
        self.input_layer = nn.Linear(config.in_channels * cells, channels)
        self.blocks = nn.ModuleList(
            ModulatedBlock(
                channels, config.cond_channels, config.heads, config.mlp_ratio, share_mod=config.share_mod,
                qk_rms_norm=config.qk_rms_norm, qk_rms_norm_cross=config.qk_rms_norm_cross,
            )
            for _ in range(config.num_blocks)
        )
        self.out_layer = nn.Linear(channels, config.out_channels * cells)
        if config.use_fp16:
            convert_torso(self.blocks, torch.float16)

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        config = self.config
        check_shape("StructureFlow.x_t", x_t, ["N", config.in_channels, *[config.resolution] * 3], "Give latents of this model's size.")
        check_shape("StructureFlow.cond", cond, [len(x_t), "L", config.cond_channels], "Use embeddings of the encoder it was trained with.")
        dtype, layout = torso_dtype(self.blocks), DenseLayout()
        time = self.t_embedder(t)
        if config.share_mod:
            time = self.adaLN_modulation(time)
        h = self.input_layer(to_patches(x_t.float(), config.patch_size)) + self.pos_emb
        h, time, cond = h.to(dtype), time.to(dtype), cond.to(dtype)
        for block in self.blocks:
            h = run_block(block, h, time, cond, layout, recompute=self.recompute)
        h = F.layer_norm(h.to(x_t.dtype), h.shape[-1:])
        return from_patches(self.out_layer(h.to(self.out_layer.weight.dtype)), config.patch_size).to(x_t.dtype)


def to_patches(x: torch.Tensor, p: int) -> torch.Tensor:
    """[N, C, R, R, R] -> [N, T, C p^3], each row C x p x p x p."""
    for axis in (2, 4, 6):
        x = x.unflatten(axis, (-1, p))  # in the end [N, C, G, p, G, p, G, p]
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)


def from_patches(x: torch.Tensor, p: int) -> torch.Tensor:
    """Inverse of to_patches."""
    g = round(x.shape[1] ** (1 / 3))
    x = x.unflatten(1, (g, g, g)).unflatten(4, (-1, p, p, p))  # [N, G, G, G, C, p, p, p]
    return x.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6).flatten(4, 5).flatten(2, 3)
