"""TRELLIS's two flows: a transformer over the dense latent of an occupancy grid, and one over the latents of
an object's voxels, between convolutions at full resolution.

Shape letters as in blocks.py; R grid points per axis, p patch size, G = R / p, T = G^3 tokens.
"""

import functools
import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from eg3d_rlhf.models.sparse import SparseBatch
from eg3d_rlhf.models.trellis import blocks
from eg3d_rlhf.models.trellis.sparse_conv import Kernel, SparseResBlock
from torch_utils.ops.linear import fits

LARGE = 512  # tokens of a sample from which on it is worth a pass of its own
LONG = 4096  # tokens of a sample from which on attention is worth its memory where blocks are recomputed
KEPT = 2 / 3  # share of the blocks that then keep it: as much memory as passes of single samples save


@dataclass(frozen=True, kw_only=True)
class FlowConfig(blocks.TransformerConfig, blocks.ConditionedConfig):
    """What a flow's JSON file calls args, as far as both flows have it."""

    in_channels: int
    out_channels: int
    patch_size: int = 2  # edge of a token, in the latents' cells

    def __post_init__(self):
        super().__post_init__()
        if self.resolution % self.patch_size:
            got = f"{self.resolution} / {self.patch_size}"
            raise ValueError(
                f"{type(self).__name__}: expected patch_size to divide resolution, got {got}. Correct the"
                " model's JSON file."
            )


def run_blocks(
    modules: nn.ModuleList,
    x: torch.Tensor,
    time: torch.Tensor,
    cond: torch.Tensor,
    layout: blocks.Layout,
    lengths: list[int],
    *,
    recompute: bool,
) -> torch.Tensor:
    """Tokens through blocks in turn; on a CPU large samples one after the other, so that they share working
    memory.

    Args: as a ModulatedBlock; lengths: [N], tokens of each sample.
    """
    if min(lengths) < LARGE or not fits(x):
        for block in modules:
            x = blocks.run_block(block, x, time, cond, layout, recompute=recompute)
        return x
    parts = [part.view(1, -1, x.shape[-1]) for part in x.flatten(0, -2).split(lengths)]
    for place, block in enumerate(modules):
        for i, part in enumerate(parts):
            keep = part.shape[1] >= LONG and place < KEPT * len(modules)
            passes = blocks.Passes(keep) if recompute and torch.is_grad_enabled() else None
            single = blocks.DenseLayout(passes=passes)
            parts[i] = blocks.run_block(
                block, part, time[i : i + 1], cond[i : i + 1], single, recompute=recompute
            )
            if passes is not None:
                passes.second = True
    return torch.cat([part[0] for part in parts]).view_as(x)


class StructureFlowConfig(FlowConfig):
    """What its JSON file calls args."""


class StructureFlow(nn.Module):
    """model(x_t [N, C, R, R, R], t [N] in 0..1, cond [N, L, E]) -> velocity, like x_t. Differentiable in:
    everything but t.
    """

    def __init__(self, config: StructureFlowConfig):
        super().__init__()
        self.config = config
        self.recompute = config.use_checkpoint
        channels = config.model_channels
        cells = config.patch_size**3
        grid = torch.arange(config.resolution // config.patch_size)
        coords = torch.cartesian_prod(grid, grid, grid)  # [T, 3]
        self.t_embedder = blocks.TimeEmbedder(channels)
        if config.share_mod:
            self.adaLN_modulation = blocks.modulation(channels)
        self.register_buffer("pos_emb", blocks.position_embedding(coords, channels))
        self.input_layer = nn.Linear(config.in_channels * cells, channels)
        self.blocks = config.blocks(blocks.ModulatedBlock)
        self.out_layer = nn.Linear(channels, config.out_channels * cells)
        if config.use_fp16:
            blocks.convert_torso(self.blocks, torch.float16)

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        config = self.config
        shape: list[int | str] = ["N", config.in_channels, *[config.resolution] * 3]
        blocks.check_inputs("StructureFlow", x_t, shape, cond, len(x_t), config.cond_channels)
        dtype = blocks.torso_dtype(self.blocks)
        layout = blocks.DenseLayout()
        time = self.t_embedder(t)
        if config.share_mod:
            time = self.adaLN_modulation(time)
        h = self.input_layer(to_patches(x_t.float(), config.patch_size)) + self.pos_emb
        h = h.to(dtype)
        time = time.to(dtype)
        cond = cond.to(dtype)
        h = run_blocks(self.blocks, h, time, cond, layout, [h.shape[1]] * len(h), recompute=self.recompute)
        h = F.layer_norm(h.to(x_t.dtype), h.shape[-1:])
        return from_patches(self.out_layer(h.to(self.out_layer.weight.dtype)), config.patch_size).to(
            x_t.dtype
        )


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


@dataclass(frozen=True, kw_only=True)
class LatentFlowConfig(FlowConfig):
    """What its JSON file calls args; patch_size is a power of two."""

    num_io_res_blocks: int = 2  # convolutional blocks per resolution, on either side
    io_block_channels: tuple[int, ...] | None = None  # per halving, finest first; None where patch_size is 1
    use_skip_connection: bool = True
    sparse_conv: str = "auto"  # not in TRELLIS's files: backend of the convolutions, see sparse_conv.py

    def __post_init__(self):
        if self.patch_size != 2 ** len(self.io_channels) or self.num_io_res_blocks < 1:
            raise ValueError(
                "LatentFlowConfig: expected patch_size 2^(number of io_block_channels) and num_io_res_blocks"
                f" >= 1, got {self.patch_size}, {self.io_channels} and {self.num_io_res_blocks}. Correct the"
                " model's JSON file."
            )
        super().__post_init__()

    @property
    def io_channels(self) -> tuple[int, ...]:
        """Channels at each resolution above the transformer's, finest first."""
        return tuple(self.io_block_channels or ())


class LatentFlow(nn.Module):
    """model(x_t: SparseBatch, t [N] in 0..1, cond [N, L, E]) -> velocity on the same voxels. Differentiable
    in: everything but t.
    """

    def __init__(self, config: LatentFlowConfig):
        super().__init__()
        self.config = config
        self.recompute = config.use_checkpoint
        channels = config.model_channels
        outer = config.io_channels[0] if config.io_channels else channels
        self.t_embedder = blocks.TimeEmbedder(channels)
        if config.share_mod:
            self.adaLN_modulation = blocks.modulation(channels)
        self.input_layer = nn.Linear(config.in_channels, outer)
        block = functools.partial(SparseResBlock, time_channels=channels, backend=config.sparse_conv)
        kept = config.num_io_res_blocks - 1
        width = 2 if config.use_skip_connection else 1
        # per resolution, finest first: blocks that keep it, then one that halves it
        self.input_blocks = nn.ModuleList()
        for finer, coarser in itertools.pairwise((*config.io_channels, channels)):
            self.input_blocks.extend(
                [block(finer, finer) for _ in range(kept)] + [block(finer, coarser, resample="down")]
            )
        self.blocks = config.blocks(blocks.ModulatedBlock)
        # coarsest first: one block that doubles it, then blocks that keep it
        self.out_blocks = nn.ModuleList()
        for coarser, finer in itertools.pairwise((channels, *reversed(config.io_channels))):
            self.out_blocks.append(block(width * coarser, finer, resample="up"))
            self.out_blocks.extend([block(width * finer, finer) for _ in range(kept)])
        self.out_layer = nn.Linear(outer, config.out_channels)
        if config.use_fp16:
            blocks.convert_torso(
                (self.input_blocks, self.blocks, self.out_blocks), torch.float16, (nn.Linear, Kernel)
            )

    def time(self, t: torch.Tensor) -> torch.Tensor:
        """Times [N] as the blocks read them, [N, C] float32."""
        return self.t_embedder(t)

    def forward(
        self, x_t: SparseBatch, t: torch.Tensor, cond: torch.Tensor, *step: torch.Tensor | None
    ) -> SparseBatch:
        config = self.config
        blocks.check_inputs(
            "LatentFlow", x_t.feats, ["V", config.in_channels], cond, x_t.size, config.cond_channels
        )
        dtype = blocks.torso_dtype(self.blocks)
        time = self.time(t, *step)
        shared = self.adaLN_modulation(time) if config.share_mod else time
        time = time.to(dtype)
        shared = shared.to(dtype)
        cond = cond.to(dtype)
        h = x_t.with_feats(self.input_layer(x_t.feats.float()).to(dtype))
        # the features behind each input block, and the batch before each halving
        skips = []
        finer = []
        for block in self.input_blocks:
            if block.resample:
                finer.append(h)
            h = blocks.run_block(block, h, time, recompute=self.recompute)
            skips.append(h.feats)
        feats = h.feats + blocks.position_embedding(h.coords[:, 1:], config.model_channels).to(dtype)
        layout = blocks.SparseLayout(h)
        feats = run_blocks(
            self.blocks, feats, shared, cond, layout, h.lengths.tolist(), recompute=self.recompute
        )
        h = h.with_feats(feats)
        # which sees its input block's features beside its own
        for block, skip in zip(self.out_blocks, reversed(skips), strict=True):
            if config.use_skip_connection:
                h = h.with_feats(torch.cat([h.feats, skip], 1))
            h = blocks.run_block(
                block, h, time, finer.pop() if block.resample else None, recompute=self.recompute
            )
        feats = F.layer_norm(h.feats.to(x_t.feats.dtype), h.feats.shape[-1:])
        return x_t.with_feats(self.out_layer(feats.to(self.out_layer.weight.dtype)).to(x_t.feats.dtype))
