"""TRELLIS's two flows.

The structure flow is a transformer over the dense latent of an occupancy grid. The latent flow is a
transformer over the latents of an object's voxels, between sparse convolutions at full resolution.

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

LARGE = 512  # tokens of a sample from which it pays to process samples one after the other
LONG = 4096  # tokens of a sample from which it pays to keep the attention of recomputed blocks
KEPT = 2 / 3  # share of the blocks that keep it: as much memory as processing single samples saves


@dataclass(frozen=True, kw_only=True)
class FlowConfig(blocks.TransformerConfig, blocks.ConditionedConfig):
    """Settings that the JSON files of both flows have in `args`."""

    in_channels: int  # channels of the latent
    out_channels: int  # channels of the velocity
    patch_size: int = 2  # edge length of a token in grid cells of the latent

    def __post_init__(self):
        super().__post_init__()
        # Patches must tile the grid.
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
    """Apply blocks to tokens in turn.

    On a CPU, large samples are processed one after the other, so that they share working memory.

    Args:
        modules, x, time, cond, layout: as for `blocks.ModulatedBlock`.
        lengths: [N], tokens of each sample.
        recompute: recompute the inside of blocks in the backward pass.
    """
    if min(lengths) < LARGE or not fits(x):
        for block in modules:
            x = blocks.run_block(block, x, time, cond, layout, recompute=recompute)
        return x
    # [N, T, C] or [V, C] -> one tensor [1, tokens, C] per sample.
    parts = [part.view(1, -1, x.shape[-1]) for part in x.flatten(0, -2).split(lengths)]
    for place, block in enumerate(modules):
        for i, part in enumerate(parts):
            # Recomputing attention over thousands of tokens costs more than keeping its result.
            keep = part.shape[1] >= LONG and place < KEPT * len(modules)
            passes = blocks.Passes(keep) if recompute and torch.is_grad_enabled() else None
            single = blocks.DenseLayout(passes=passes)
            parts[i] = blocks.run_block(
                block, part, time[i : i + 1], cond[i : i + 1], single, recompute=recompute
            )
            if passes is not None:
                # The block runs again only in the backward pass, and then finds that this is its second pass.
                passes.second = True
    return torch.cat([part[0] for part in parts]).view_as(x)


class StructureFlowConfig(FlowConfig):
    """Settings of the structure flow: `args` of its JSON file."""


class StructureFlow(nn.Module):
    """First stage: predict the velocity of a dense latent.

        model(x_t [N, C, R, R, R], t [N] in 0..1, cond [N, L, E]) -> velocity, like x_t

    Differentiable in: everything except t.
    """

    def __init__(self, config: StructureFlowConfig):
        super().__init__()
        self.config = config
        self.recompute = config.use_checkpoint
        channels = config.model_channels
        cells = config.patch_size**3  # grid cells of a token
        grid = torch.arange(config.resolution // config.patch_size)
        # The last axis varies fastest, as in `to_patches`.
        coords = torch.cartesian_prod(grid, grid, grid)  # [T, 3]
        self.t_embedder = blocks.TimeEmbedder(channels)
        if config.share_mod:
            self.adaLN_modulation = blocks.modulation(channels)
        # Checkpoints hold the positions, so they are a persistent buffer.
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
        time = self.t_embedder(t)  # [N, C], float32
        if config.share_mod:
            time = self.adaLN_modulation(time)
        # Input and output layers are float32; only the blocks compute in `dtype`.
        h = self.input_layer(to_patches(x_t.float(), config.patch_size)) + self.pos_emb
        h = h.to(dtype)
        time = time.to(dtype)
        cond = cond.to(dtype)
        h = run_blocks(self.blocks, h, time, cond, layout, [h.shape[1]] * len(h), recompute=self.recompute)
        # A last norm without parameters, with torch's default eps of 1e-5, as in the original.
        h = F.layer_norm(h.to(x_t.dtype), h.shape[-1:])
        return from_patches(self.out_layer(h.to(self.out_layer.weight.dtype)), config.patch_size).to(
            x_t.dtype
        )


def to_patches(x: torch.Tensor, p: int) -> torch.Tensor:
    """Split a grid into patches: [N, C, R, R, R] -> [N, T, C p^3], each row of the order C x p x p x p."""
    for axis in (2, 4, 6):
        x = x.unflatten(axis, (-1, p))  # after the loop [N, C, G, p, G, p, G, p]
    # [N, G, G, G, C, p, p, p] -> [N, T, C p^3]
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)


def from_patches(x: torch.Tensor, p: int) -> torch.Tensor:
    """Join patches to a grid; inverse of `to_patches`."""
    g = round(x.shape[1] ** (1 / 3))
    x = x.unflatten(1, (g, g, g)).unflatten(4, (-1, p, p, p))  # [N, G, G, G, C, p, p, p]
    # [N, C, G, p, G, p, G, p] -> [N, C, R, R, R]
    return x.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6).flatten(4, 5).flatten(2, 3)


@dataclass(frozen=True, kw_only=True)
class LatentFlowConfig(FlowConfig):
    """Settings of the latent flow: `args` of its JSON file. patch_size must be a power of two."""

    num_io_res_blocks: int = 2  # convolutional blocks per resolution, on each side of the transformer
    io_block_channels: tuple[int, ...] | None = None  # per halving, finest first; None if patch_size is 1
    use_skip_connection: bool = True
    sparse_conv: str = "auto"  # backend of the convolutions, see sparse_conv.py; not in TRELLIS's files

    def __post_init__(self):
        # Each halving of the resolution doubles the edge of a token.
        if self.patch_size != 2 ** len(self.io_channels) or self.num_io_res_blocks < 1:
            raise ValueError(
                "LatentFlowConfig: expected patch_size 2^(number of io_block_channels) and num_io_res_blocks"
                f" >= 1, got {self.patch_size}, {self.io_channels} and {self.num_io_res_blocks}. Correct the"
                " model's JSON file."
            )
        super().__post_init__()

    @property
    def io_channels(self) -> tuple[int, ...]:
        """Channels at each resolution finer than the transformer's, finest first."""
        return tuple(self.io_block_channels or ())


class LatentFlow(nn.Module):
    """Second stage: predict the velocity of latents on voxels.

        model(x_t: SparseBatch, t [N] in 0..1, cond [N, L, E]) -> velocity on the same voxels

    Differentiable in: everything except t.
    """

    def __init__(self, config: LatentFlowConfig):
        super().__init__()
        self.config = config
        self.recompute = config.use_checkpoint
        channels = config.model_channels
        outer = config.io_channels[0] if config.io_channels else channels  # channels at full resolution
        self.t_embedder = blocks.TimeEmbedder(channels)
        if config.share_mod:
            self.adaLN_modulation = blocks.modulation(channels)
        self.input_layer = nn.Linear(config.in_channels, outer)
        block = functools.partial(SparseResBlock, time_channels=channels, backend=config.sparse_conv)
        kept = config.num_io_res_blocks - 1  # blocks per resolution that do not change it
        # With skips, an output block reads the features of an input block beside its own.
        width = 2 if config.use_skip_connection else 1
        # Per resolution, finest first: blocks that keep the resolution, then one that halves it.
        self.input_blocks = nn.ModuleList()
        for finer, coarser in itertools.pairwise((*config.io_channels, channels)):
            self.input_blocks.extend(
                [block(finer, finer) for _ in range(kept)] + [block(finer, coarser, resample="down")]
            )
        self.blocks = config.blocks(blocks.ModulatedBlock)
        # Coarsest first: one block that doubles the resolution, then blocks that keep it.
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
        """Embed times [N] as the blocks read them, [N, C] float32."""
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
        # Transformer blocks read the shared modulation [N, 6 C], convolutional blocks the time itself [N, C].
        shared = self.adaLN_modulation(time) if config.share_mod else time
        time = time.to(dtype)
        shared = shared.to(dtype)
        cond = cond.to(dtype)
        h = x_t.with_feats(self.input_layer(x_t.feats.float()).to(dtype))
        # The features after each input block, and the batch before each halving, whose voxels the output
        # blocks return to.
        skips = []
        finer = []
        for block in self.input_blocks:
            if block.resample:
                finer.append(h)
            h = blocks.run_block(block, h, time, recompute=self.recompute)
            skips.append(h.feats)
        # Positions are those of the coarse voxels; the convolutions need none.
        feats = h.feats + blocks.position_embedding(h.coords[:, 1:], config.model_channels).to(dtype)
        layout = blocks.SparseLayout(h)
        feats = run_blocks(
            self.blocks, feats, shared, cond, layout, h.lengths.tolist(), recompute=self.recompute
        )
        h = h.with_feats(feats)
        # The last input block belongs to the first output block.
        for block, skip in zip(self.out_blocks, reversed(skips), strict=True):
            if config.use_skip_connection:
                h = h.with_feats(torch.cat([h.feats, skip], 1))
            h = blocks.run_block(
                block, h, time, finer.pop() if block.resample else None, recompute=self.recompute
            )
        feats = F.layer_norm(h.feats.to(x_t.feats.dtype), h.feats.shape[-1:])
        return x_t.with_feats(self.out_layer(feats.to(self.out_layer.weight.dtype)).to(x_t.feats.dtype))
