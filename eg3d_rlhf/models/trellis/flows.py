"""The two flow models of TRELLIS (Xiang et al. 2024).

The first stage, the structure flow, is a transformer over the dense latent of an occupancy grid. The second
stage, the latent flow, is a transformer over the latents of an object's voxels. Before and after this
transformer, sparse convolutions change the resolution. Time t is 0 at data and 1 at noise, as in the
original.

Shapes: N samples, C channels, L conditioning tokens, E channels of a conditioning token, V voxels of all
samples, R grid points per axis, p patch size, G = R / p, T = G^3 tokens.
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

# Smallest number of tokens of a sample for which samples are processed one after the other on a CPU
LARGE = 512
LONG = 4096  # smallest number of tokens for which the attention of a recomputed block is stored
# Share of the blocks whose attention is stored. It takes as much memory as processing single samples saves.
KEPT = 2 / 3


@dataclass(frozen=True, kw_only=True)
class FlowConfig(blocks.TransformerConfig, blocks.ConditionedConfig):
    """Settings that the JSON files of both flow models contain in `args`.

    Raises: ValueError for settings that are not supported or do not fit together.
    """

    in_channels: int  # channels of the latent
    out_channels: int  # channels of the velocity
    patch_size: int = 2  # side of the patch of a token, in grid cells of the latent

    def __post_init__(self):
        super().__post_init__()
        if self.resolution % self.patch_size:
            raise ValueError(
                f"{type(self).__name__}: resolution must be a multiple of patch_size, got {self.resolution}"
                f" and {self.patch_size}. Download the model's JSON file again."
            )


def run_blocks(
    transformer_blocks: nn.ModuleList,
    x: torch.Tensor,
    time: torch.Tensor,
    cond: torch.Tensor,
    layout: blocks.Layout,
    lengths: list[int],
    *,
    recompute: bool,
) -> torch.Tensor:
    """Apply a sequence of transformer blocks to tokens.

    On a CPU, large samples are processed one after the other, so that they use the same working memory.

    Args:
        transformer_blocks: blocks, see `blocks.ModulatedBlock`.
        x: tokens [N, T, C] or [V, C].
        time: embedded times [N, C], or the modulation [N, 6 C] if all blocks share it.
        cond: conditioning tokens [N, L, E].
        layout: assignment of the tokens to the samples.
        lengths: number of tokens of each sample.
        recompute: True computes blocks again in the backward pass, which needs less memory.

    Returns: tokens in the shape of x.
    """
    if min(lengths) < LARGE or not fits(x):
        for block in transformer_blocks:
            x = blocks.run_block(block, x, time, cond, layout, recompute=recompute)
        return x
    # [N, T, C] or [V, C] -> one tensor [1, tokens, C] per sample
    sample_tokens = [tokens.view(1, -1, x.shape[-1]) for tokens in x.flatten(0, -2).split(lengths)]
    for block_index, block in enumerate(transformer_blocks):
        for i, tokens in enumerate(sample_tokens):
            # For thousands of tokens, storing the result of the attention is cheaper than computing it again.
            keeps_attention = tokens.shape[1] >= LONG and block_index < KEPT * len(transformer_blocks)
            passes = blocks.Passes(keeps_attention) if recompute and torch.is_grad_enabled() else None
            sample_layout = blocks.DenseLayout(passes=passes)
            # Slices i : i + 1 keep the axis of the samples.
            sample_tokens[i] = blocks.run_block(
                block, tokens, time[i : i + 1], cond[i : i + 1], sample_layout, recompute=recompute
            )
            if passes is not None:
                # The block is computed again only in the backward pass.
                passes.second = True
    return torch.cat([tokens[0] for tokens in sample_tokens]).view_as(x)


class StructureFlowConfig(FlowConfig):
    """Settings of the structure flow, the entry `args` of its JSON file."""


class StructureFlow(nn.Module):
    """Flow model of the first stage, which predicts the velocity of a dense latent.

    Usage: velocity = model(x_t, t, cond), with latents x_t [N, C, R, R, R], times t [N] in 0..1, and
    conditioning tokens cond [N, L, E]. The velocity has the shape of x_t.

    Differentiable in: x_t and cond.
    """

    def __init__(self, config: StructureFlowConfig):
        super().__init__()
        self.config = config
        self.recompute = config.use_checkpoint
        channels = config.model_channels
        cells_per_patch = config.patch_size**3  # grid cells of a patch
        patch_indices = torch.arange(config.resolution // config.patch_size)
        # The last axis varies fastest, as in `to_patches`.
        coords = torch.cartesian_prod(patch_indices, patch_indices, patch_indices)  # [T, 3]
        self.t_embedder = blocks.TimeEmbedder(channels)
        if config.share_mod:
            self.adaLN_modulation = blocks.modulation(channels)
        # Checkpoints contain the position embedding, so it is a persistent buffer.
        self.register_buffer("pos_emb", blocks.position_embedding(coords, channels))
        self.input_layer = nn.Linear(config.in_channels * cells_per_patch, channels)
        self.blocks = config.blocks(blocks.ModulatedBlock)
        self.out_layer = nn.Linear(channels, config.out_channels * cells_per_patch)
        if config.use_fp16:
            blocks.convert_torso(self.blocks, torch.float16)

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        config = self.config
        required_shape: list[int | str] = ["N", config.in_channels, *[config.resolution] * 3]
        blocks.check_inputs("StructureFlow", x_t, required_shape, cond, len(x_t), config.cond_channels)
        dtype = blocks.torso_dtype(self.blocks)
        layout = blocks.DenseLayout()
        time = self.t_embedder(t)  # [N, C], float32
        if config.share_mod:
            time = self.adaLN_modulation(time)
        # Input and output layers are float32. Only the blocks compute in `dtype`.
        h = self.input_layer(to_patches(x_t.float(), config.patch_size)) + self.pos_emb
        h = h.to(dtype)
        time = time.to(dtype)
        cond = cond.to(dtype)
        h = run_blocks(self.blocks, h, time, cond, layout, [h.shape[1]] * len(h), recompute=self.recompute)
        # As in the original, the last norm has no parameters and torch's default constant 1e-5.
        h = F.layer_norm(h.to(x_t.dtype), h.shape[-1:])
        return from_patches(self.out_layer(h.to(self.out_layer.weight.dtype)), config.patch_size).to(
            x_t.dtype
        )


def to_patches(x: torch.Tensor, p: int) -> torch.Tensor:
    """Split grids [N, C, R, R, R] into patches of p^3 points.

    Returns: the patches [N, T, C p^3]. The values of a patch have the order C x p x p x p.
    """
    for axis in (2, 4, 6):
        x = x.unflatten(axis, (-1, p))  # after the loop [N, C, G, p, G, p, G, p]
    # [N, G, G, G, C, p, p, p] -> [N, T, C p^3]
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)


def from_patches(x: torch.Tensor, p: int) -> torch.Tensor:
    """Join patches of p^3 points to a grid, [N, T, C p^3] -> [N, C, R, R, R].

    This is the inverse of `to_patches`.
    """
    patches_per_axis = round(x.shape[1] ** (1 / 3))  # G
    x = x.unflatten(1, (patches_per_axis, patches_per_axis, patches_per_axis)).unflatten(
        4, (-1, p, p, p)
    )  # [N, G, G, G, C, p, p, p]
    # [N, C, G, p, G, p, G, p] -> [N, C, R, R, R]
    return x.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6).flatten(4, 5).flatten(2, 3)


@dataclass(frozen=True, kw_only=True)
class LatentFlowConfig(FlowConfig):
    """Settings of the latent flow, the entry `args` of its JSON file. patch_size must be a power of two.

    Raises: ValueError for settings that are not supported or do not fit together.
    """

    # Number of convolutional blocks per resolution before and after the transformer
    num_io_res_blocks: int = 2
    # Channels at each resolution finer than the transformer's, finest first; None if patch_size is 1
    io_block_channels: tuple[int, ...] | None = None
    use_skip_connection: bool = True  # True: output blocks also have the features of input blocks as inputs
    # Backend of the convolutions, see sparse_conv.py. TRELLIS's files do not contain this setting.
    sparse_conv: str = "auto"

    def __post_init__(self):
        # Each halving of the resolution doubles the side of a token's patch.
        if self.patch_size != 2 ** len(self.io_channels) or self.num_io_res_blocks < 1:
            raise ValueError(
                "LatentFlowConfig: patch_size must be 2^(number of io_block_channels), and num_io_res_blocks"
                f" must be >= 1, got patch_size={self.patch_size}, io_block_channels={self.io_channels} and"
                f" num_io_res_blocks={self.num_io_res_blocks}. Download the model's JSON file again."
            )
        super().__post_init__()

    @property
    def io_channels(self) -> tuple[int, ...]:
        """Return the channels at each resolution finer than the transformer's, finest first; may be empty."""
        return tuple(self.io_block_channels or ())


class LatentFlow(nn.Module):
    """Flow model of the second stage, which predicts the velocity of latents on voxels.

    Usage: velocity = model(x_t, t, cond), with a SparseBatch x_t, times t [N] in 0..1, and conditioning
    tokens cond [N, L, E]. The velocity is on the voxels of x_t.

    Differentiable in: the features of x_t and cond.
    """

    def __init__(self, config: LatentFlowConfig):
        super().__init__()
        self.config = config
        self.recompute = config.use_checkpoint
        channels = config.model_channels
        full_channels = config.io_channels[0] if config.io_channels else channels  # at full resolution
        self.t_embedder = blocks.TimeEmbedder(channels)
        if config.share_mod:
            self.adaLN_modulation = blocks.modulation(channels)
        self.input_layer = nn.Linear(config.in_channels, full_channels)
        make_block = functools.partial(SparseResBlock, time_channels=channels, backend=config.sparse_conv)
        plain_block_count = config.num_io_res_blocks - 1  # blocks per resolution that do not change it
        # With skip connections, the features of an input block are concatenated to those of an output block.
        width_factor = 2 if config.use_skip_connection else 1
        # For each resolution, finest first: plain blocks, then a block that halves the resolution
        self.input_blocks = nn.ModuleList()
        for fine_channels, coarse_channels in itertools.pairwise((*config.io_channels, channels)):
            self.input_blocks.extend(
                [make_block(fine_channels, fine_channels) for _ in range(plain_block_count)]
            )
            self.input_blocks.append(make_block(fine_channels, coarse_channels, resample="down"))
        self.blocks = config.blocks(blocks.ModulatedBlock)
        # For each resolution, coarsest first: a block that doubles the resolution, then plain blocks
        self.out_blocks = nn.ModuleList()
        for coarse_channels, fine_channels in itertools.pairwise((channels, *reversed(config.io_channels))):
            self.out_blocks.append(make_block(width_factor * coarse_channels, fine_channels, resample="up"))
            self.out_blocks.extend(
                [make_block(width_factor * fine_channels, fine_channels) for _ in range(plain_block_count)]
            )
        self.out_layer = nn.Linear(full_channels, config.out_channels)
        if config.use_fp16:
            blocks.convert_torso(
                (self.input_blocks, self.blocks, self.out_blocks), torch.float16, (nn.Linear, Kernel)
            )

    def time(self, t: torch.Tensor) -> torch.Tensor:
        """Embed times [N] for the blocks, [N, C] float32."""
        return self.t_embedder(t)

    def forward(
        self, x_t: SparseBatch, t: torch.Tensor, cond: torch.Tensor, *step: torch.Tensor | None
    ) -> SparseBatch:
        # step: step sizes of subclasses that are shortcut models, see sam3d.py; empty for TRELLIS
        config = self.config
        blocks.check_inputs(
            "LatentFlow", x_t.feats, ["V", config.in_channels], cond, x_t.size, config.cond_channels
        )
        dtype = blocks.torso_dtype(self.blocks)
        time = self.time(t, *step)
        # Inputs of transformer blocks are the shared modulation [N, 6 C], if there is one. Inputs of
        # convolutional blocks are the embedded times [N, C].
        modulation = self.adaLN_modulation(time) if config.share_mod else time
        time = time.to(dtype)
        modulation = modulation.to(dtype)
        cond = cond.to(dtype)
        h = x_t.with_feats(self.input_layer(x_t.feats.float()).to(dtype))
        skip_feats = []  # features after each input block
        fine_batches = []  # batch before each halving of the resolution; output blocks return to its voxels
        for block in self.input_blocks:
            if block.resample:
                fine_batches.append(h)
            h = blocks.run_block(block, h, time, recompute=self.recompute)
            skip_feats.append(h.feats)
        # The transformer needs positions, those of the coarse voxels. Convolutions do not need them.
        feats = h.feats + blocks.position_embedding(h.coords[:, 1:], config.model_channels).to(dtype)
        layout = blocks.SparseLayout(h)
        feats = run_blocks(
            self.blocks, feats, modulation, cond, layout, h.lengths.tolist(), recompute=self.recompute
        )
        h = h.with_feats(feats)
        # The skip connection of the first output block comes from the last input block.
        for block, skip_connection in zip(self.out_blocks, reversed(skip_feats), strict=True):
            if config.use_skip_connection:
                h = h.with_feats(torch.cat([h.feats, skip_connection], 1))
            fine_batch = fine_batches.pop() if block.resample else None
            h = blocks.run_block(block, h, time, fine_batch, recompute=self.recompute)
        # As in the original, the last norm has no parameters and torch's default constant 1e-5.
        feats = F.layer_norm(h.feats.to(x_t.feats.dtype), h.feats.shape[-1:])
        return x_t.with_feats(self.out_layer(feats.to(self.out_layer.weight.dtype)).to(x_t.feats.dtype))
