"""Networks of TRELLIS.2 (Xiang et al. 2025): flow models on grids and on voxels, and autoencoders of voxels.

Differences from TRELLIS: the flow models have no convolutions or patches. Position embeddings are rotary. All
blocks share the layers that compute the modulation by the time, and each block adds a trained vector to it.
Queries and keys are normalised in self-attention and in cross-attention. A stage may have features on its
voxels as an additional input (the setting "concat_cond" of the original); they are concatenated to the
latent. Time t is 0 at data and 1 at noise.

Shapes: N samples, C channels, H attention heads, D channels of an attention head, P = D / 2 channel pairs of
an attention head, L conditioning tokens, E channels of a conditioning token, R grid points per axis, T = R^3
tokens, K channels of the additional features, V voxels of all samples, W voxels after a split.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from eg3d_rlhf.core.shapes import check_shape
from eg3d_rlhf.models.sparse import SparseBatch
from eg3d_rlhf.models.trellis import blocks
from eg3d_rlhf.models.trellis.blocks import LayerNorm32, Layout, convert_torso
from eg3d_rlhf.models.trellis.sparse_conv import Kernel, coarser, submanifold_conv

# Rotary position embedding in three dimensions (Su et al. 2021, RoFormer, section 3.2, here for each axis)
#
# The D channels of an attention head form D / 2 pairs. For each of the three axes, n = D // 6 pairs are
# rotated by the angle coordinate * rate_i, with rate_i = f_0 / f_1^(i / n) and settings f_0
# and f_1. The remaining pairs are not rotated. The inner product of a rotated query and a
# rotated key depends only on the difference of their coordinates.


def angles_of(
    coords: torch.Tensor, head_channels: int, frequencies: tuple[float, float] = (1.0, 10000.0)
) -> torch.Tensor:
    """Compute the angles by which the channel pairs of an attention head are rotated, [V, P] float32.

    With n = head_channels // 6, the angles for axis 1 are coordinate * f_0 / f_1^(i / n) for i = 0 .. n - 1.
    They are followed by the angles for axis 2 and for axis 3, and then by zeros.

    Args:
        coords: coordinates [V, 3] of the tokens.
        head_channels: channels D of an attention head.
        frequencies: constants f_0 and f_1 of the angles.
    """
    pairs_per_axis = head_channels // 6  # number of channel pairs per axis
    rates = frequencies[0] / frequencies[1] ** (
        torch.arange(pairs_per_axis, dtype=torch.float32, device=coords.device) / pairs_per_axis
    )
    angles = (coords.float()[:, :, None] * rates).flatten(1)  # [V, 3 pairs_per_axis]
    # An angle of zero leaves the remaining pairs unrotated.
    return torch.nn.functional.pad(angles, (0, head_channels // 2 - angles.shape[1]))


def rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotate the channel pairs of attention heads by angles, in float32. Differentiable in: x.

    Args:
        x: queries or keys [..., V, H, D]. Pair i consists of the channels 2 i and 2 i + 1.
        angles: angles [V, P] in radians.
    """
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # the two channels of each pair, [..., V, H, P] each
    # One angle for all attention heads: [V, 1, P].
    cos = angles.cos()[:, None]
    sin = angles.sin()[:, None]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)


@dataclass(frozen=True)
class RotaryLayout:
    """Layout whose self-attention rotates queries and keys by their positions. Cross-attention does not."""

    inner: Layout  # layout that computes the attention
    angles: torch.Tensor  # [V, P] on voxels; [T, P] on a grid, where all samples have the same tokens

    def per_token(self, sample_rows: torch.Tensor) -> torch.Tensor:
        return self.inner.per_token(sample_rows)

    def self_attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.inner.self_attention(rotate(q, self.angles), rotate(k, self.angles), v)

    def cross_attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.inner.cross_attention(q, k, v)


DTYPES = {  # values of the setting `dtype` in the JSON files
    "float32": torch.float32,
    "fp32": torch.float32,
    "f32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "f16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}


@dataclass(frozen=True, kw_only=True)
class FlowConfig(blocks.ConditionedConfig):
    """Settings of a flow model, the entry `args` of its JSON file.

    Raises: ValueError for settings that are not supported or do not fit together.
    """

    resolution: int  # R, used only by the structure flow
    in_channels: int  # channels of the latent plus channels K of the additional features
    out_channels: int  # channels of the latent
    pe_mode: str = "ape"  # kind of position embedding; only "rope", the rotary one, is supported
    # f_0 and f_1 of `angles_of`. The structure flow ignores this setting and uses the default.
    rope_freq: tuple[float, float] = (1.0, 10000.0)
    dtype: str = "float32"  # dtype of new blocks; weights from files have the dtype of the file
    initialization: str = "vanilla"  # initialisation in the original's training; not used here

    def __post_init__(self):
        object.__setattr__(self, "rope_freq", tuple(self.rope_freq))
        who = type(self).__name__
        if self.pe_mode != "rope" or self.dtype not in DTYPES:
            raise ValueError(
                f"{who}: pe_mode must be 'rope' and dtype one of {', '.join(DTYPES)}, got {self.pe_mode!r}"
                f" and {self.dtype!r}, which no released model uses. Use a released model."
            )
        # `given` is negative if the input has fewer channels than the latent.
        if self.model_channels % self.heads or self.given < 0:
            raise ValueError(
                f"{who}: model_channels must be a multiple of the number of heads, and in_channels must be >="
                f" out_channels, got model_channels={self.model_channels}, {self.heads} heads,"
                f" in_channels={self.in_channels} and out_channels={self.out_channels}. Download the model's"
                " JSON file again."
            )
        # A rotation needs pairs of channels, and at least one pair for each of three axes.
        if self.head_channels % 2 or self.head_channels < 6 or len(self.rope_freq) != 2:
            raise ValueError(
                f"{who}: attention heads must have an even number of channels, at least 6, and rope_freq must"
                f" have two values, got {self.head_channels} channels and {self.rope_freq}. Download the"
                " model's JSON file again."
            )

    @property
    def head_channels(self) -> int:
        """Return the number of channels D of an attention head."""
        return self.model_channels // self.heads

    @property
    def given(self) -> int:
        """Return the number of channels K of the additional features; 0 if the model has none."""
        return self.in_channels - self.out_channels


class Block(blocks.ModulatedBlock):
    """Block of TRELLIS with a trained vector `modulation` [6 C], which is added to the shared modulation."""

    def __init__(self, channels: int, *args, **kwargs):
        super().__init__(channels, *args, **kwargs)
        self.modulation = nn.Parameter(torch.randn(6 * channels) / channels**0.5)

    def forward(
        self, x: torch.Tensor, time: torch.Tensor, cond: torch.Tensor, layout: blocks.Layout
    ) -> torch.Tensor:
        return super().forward(x, (time + self.modulation).to(time.dtype), cond, layout)


class Flow(nn.Module):
    """Base class of the flow models: their layers, and the transformer over tokens."""

    def __init__(self, config: FlowConfig):
        super().__init__()
        self.config = config
        self.recompute = config.use_checkpoint
        channels = config.model_channels
        self.t_embedder = blocks.TimeEmbedder(channels)
        if config.share_mod:
            self.adaLN_modulation = blocks.modulation(channels)
        self.input_layer = nn.Linear(config.in_channels, channels)
        # Blocks have their own vectors only if the modulation is shared.
        self.blocks = config.blocks(Block if config.share_mod else blocks.ModulatedBlock)
        self.out_layer = nn.Linear(channels, config.out_channels)
        # Input and output layers stay in float32.
        blocks.convert_torso(self.blocks, DTYPES[config.dtype])

    def angles(self, coords: torch.Tensor) -> torch.Tensor:
        """Compute the angles [V, P] of the rotations for tokens at coordinates [V, 3]."""
        return angles_of(coords, self.config.head_channels, self.config.rope_freq)

    def transform(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        cond: torch.Tensor,
        coords: torch.Tensor,
        layout: blocks.Layout,
    ) -> torch.Tensor:
        """Apply the network to tokens.

        Args:
            x: tokens [..., in_channels].
            t: times [N] in 0..1.
            cond: conditioning tokens [N, L, E].
            coords: coordinates of the tokens, [V, 3] on voxels or [T, 3] on a grid.
            layout: assignment of the tokens to the samples.

        Returns: tokens [..., out_channels] in the dtype of x.
        """
        config = self.config
        dtype = blocks.torso_dtype(self.blocks)
        time = self.t_embedder(t)
        if config.share_mod:
            time = self.adaLN_modulation(time)
        # Input and output layers are float32. Only the blocks compute in `dtype`.
        h = self.input_layer(x.float()).to(dtype)
        time = time.to(dtype)
        cond = cond.to(dtype)
        # The layout rotates queries and keys, so the blocks of TRELLIS can be used without changes.
        layout = RotaryLayout(layout, self.angles(coords))
        for block in self.blocks:
            h = blocks.run_block(block, h, time, cond, layout, recompute=self.recompute)
        # As in the original, the last norm has no parameters and torch's default constant 1e-5.
        h = F.layer_norm(h.to(x.dtype), h.shape[-1:])
        return self.out_layer(h.to(self.out_layer.weight.dtype)).to(x.dtype)


class StructureFlow(Flow):
    """Flow model of the first stage, which predicts the velocity of a dense latent.

    Usage: velocity = model(x_t, t, cond), with latents x_t [N, C, R, R, R], times t [N] in 0..1, and
    conditioning tokens cond [N, L, E]. The velocity has the shape of x_t.

    Differentiable in: x_t and cond.
    """

    passes_over = True  # True: settings of the JSON file that are no fields are ignored, as in the original

    def __init__(self, config: FlowConfig):
        super().__init__(config)
        if config.given:
            raise ValueError(
                f"StructureFlow: in_channels must equal out_channels, got {config.in_channels} and"
                f" {config.out_channels}. Download the model's JSON file again."
            )

    def angles(self, coords: torch.Tensor) -> torch.Tensor:
        """Compute the angles [T, P] with the default frequencies: the original ignores rope_freq here."""
        return angles_of(coords, self.config.head_channels)

    def places(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return the coordinates of the tokens, [T, 3]. The last coordinate varies fastest."""
        return torch.cartesian_prod(*[torch.arange(self.config.resolution, device=device)] * 3)

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        config = self.config
        required_shape: list[int | str] = ["N", config.in_channels, *[config.resolution] * 3]
        blocks.check_inputs("StructureFlow", x_t, required_shape, cond, len(x_t), config.cond_channels)
        # [N, C, R, R, R] -> tokens [N, T, C]
        velocity = self.transform(
            x_t.flatten(2).transpose(1, 2), t, cond, self.places(x_t.device), blocks.DenseLayout()
        )
        return velocity.transpose(1, 2).unflatten(2, [config.resolution] * 3)


class VoxelFlow(Flow):
    """Flow model of the later stages, which predicts the velocity of latents on voxels.

    Usage: velocity = model(x_t, t, cond), with a SparseBatch x_t, times t [N] in 0..1, and conditioning
    tokens cond [N, L, E]. The velocity is on the voxels of x_t. Additional features x_t.given [V, K] are
    concatenated to the latent before the input layer. No noise is added to them, and they are not predicted.

    Differentiable in: the features of x_t and cond.
    """

    def forward(self, x_t: SparseBatch, t: torch.Tensor, cond: torch.Tensor) -> SparseBatch:
        config = self.config
        blocks.check_inputs(
            "VoxelFlow", x_t.feats, ["V", config.out_channels], cond, x_t.size, config.cond_channels
        )
        x = x_t.feats
        given_channels = 0 if x_t.given is None else x_t.given.shape[1]
        if given_channels != config.given:
            raise ValueError(
                f"VoxelFlow.x_t: this model needs {config.given} channels of features from the previous stage"
                f" (the field `given`), got {given_channels}. Use collate on samples with these features."
            )
        if x_t.given is not None:
            # The order of the trained weights: the latent comes first.
            x = torch.cat([x, x_t.given.to(x)], 1)
        return x_t.with_feats(self.transform(x, t, cond, x_t.coords[:, 1:], blocks.SparseLayout(x_t)))


# Autoencoders (Xiang et al. 2025, sparse compression autoencoder)
#
# An encoder computes latents on coarse voxels from features on fine voxels. In each step it
# merges the eight children of a voxel, which are the voxels of twice the resolution inside it. A
# decoder splits each voxel into those of its eight children that exist. The decoder of the shape
# predicts which children exist, and the decoder of materials uses this prediction. Child n has
# the offset (n & 1, n >> 1 & 1, n >> 2 & 1) in its voxel.
#
# A block consists of a submanifold convolution, a norm and a feed-forward layer, with a skip connection
# around them (as in ConvNeXt). A split divides the channels of a voxel among its children, and repeats the
# channels of the skip connection to get the new number. A merge concatenates the channels of the children,
# and averages those of the skip connection.


# Names of the blocks in the published files. Other blocks are not supported.
BLOCK = "SparseConvNeXtBlock3d"
SPLIT = "SparseResBlockC2S3d"
MERGE = "SparseResBlockS2C3d"
# Output channels of the shape: 3 for the position of the vertex in its voxel, 3 for the edges that the
# surface crosses, 1 for the diagonal along which a face is divided into triangles
SHAPE_CHANNELS = 7


@dataclass(frozen=True, kw_only=True)
class VoxelConfig:
    """Settings that the JSON files of encoders and decoders contain in `args`."""

    model_channels: tuple[int, ...]  # channels of each level, in the order of computation
    latent_channels: int  # channels of a latent
    num_blocks: tuple[int, ...]  # number of blocks of each level
    block_type: tuple[str, ...]  # published name of the blocks of each level
    block_args: tuple[Mapping, ...] = ()  # arguments of `ConvBlock` for each level; empty: the defaults
    resolution: int | None = None  # finest voxels per axis in the original's training; not used here
    use_fp16: bool = False  # half precision for new blocks; weights from files have the dtype of the file

    def __post_init__(self):
        for name in ("model_channels", "num_blocks", "block_type", "block_args"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def check(
        self, step_blocks: Sequence[str], supported_block: str, channels_fit: Callable[[int, int], bool]
    ) -> None:
        """Raise ValueError for levels that do not fit together, or for blocks that are not supported.

        Args:
            step_blocks: published names of the blocks between levels.
            supported_block: name of the block between levels that is supported.
            channels_fit: function of the channels of a level and of the next level that returns True if they
                fit.
        """
        who = type(self).__name__
        level_count = len(self.model_channels)
        if (
            not level_count
            or len(self.num_blocks) != level_count
            or len(self.block_type) != level_count
            or len(step_blocks) != level_count - 1
        ):
            counts_text = (
                f"{level_count}, {len(self.num_blocks)}, {len(self.block_type)} and {len(step_blocks)}"
            )
            raise ValueError(
                f"{who}: every level must have model_channels, num_blocks and block_type, with a block"
                f" between two levels, got {counts_text} of them. Download the model's JSON file again."
            )
        unsupported_blocks = sorted({*self.block_type} - {BLOCK} | {*step_blocks} - {supported_block})
        if unsupported_blocks:
            raise ValueError(
                f"{who}: only the blocks {BLOCK} and {supported_block} are supported, got"
                f" {', '.join(unsupported_blocks)}. Use a released model."
            )
        # Pairs of the channels of a level and of the next level
        channel_pairs = zip(self.model_channels, self.model_channels[1:], strict=False)
        if not all(channels_fit(channels, next_channels) for channels, next_channels in channel_pairs):
            raise ValueError(
                f"{who}: the model_channels {list(self.model_channels)} cannot be divided among eight"
                " children. Download the model's JSON file again."
            )


@dataclass(frozen=True, kw_only=True)
class VoxelDecoderConfig(VoxelConfig):
    """Settings of a `VoxelDecoder`. Levels are listed from the coarsest to the finest.

    Raises: ValueError for settings that are not supported or do not fit together.
    """

    up_block_type: tuple[str, ...]  # published names of the blocks between levels
    out_channels: int = SHAPE_CHANNELS  # channels of the output; the shape's file does not state them
    pred_subdiv: bool = True  # True: the decoder predicts which children exist
    voxel_margin: float = 0.5  # largest distance of a vertex from its voxel, in voxels

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "up_block_type", tuple(self.up_block_type))
        # A split gives each child an eighth of the channels; the skip connection repeats them.
        self.check(self.up_block_type, SPLIT, lambda a, b: a % 8 == 0 and b % (a // 8) == 0)

    @property
    def finer(self) -> int:
        """Return the number of finest voxels along a side of a coarsest voxel."""
        return 2 ** len(self.up_block_type)


@dataclass(frozen=True, kw_only=True)
class VoxelEncoderConfig(VoxelConfig):
    """Settings of a `VoxelEncoder`. Levels are listed from the finest to the coarsest.

    Raises: ValueError for settings that are not supported or do not fit together.
    """

    down_block_type: tuple[str, ...]  # published names of the blocks between levels
    # Channels of the input; the shape's file does not state them: 3 for the position of the vertex in its
    # voxel and 3 for the crossed edges, minus 0.5 each
    in_channels: int = 6

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "down_block_type", tuple(self.down_block_type))
        # A merge concatenates the channels of eight children; the skip connection averages groups of them.
        self.check(self.down_block_type, MERGE, lambda a, b: b % 8 == 0 and 8 * a % b == 0)

    @property
    def coarser(self) -> int:
        """Return the number of finest voxels along a side of a coarsest voxel."""
        return 2 ** len(self.down_block_type)


class Conv(Kernel):
    """Submanifold convolution from A to B channels, with `weight` [B, 3, 3, 3, A] and `bias` [B]."""

    def forward(self, x: SparseBatch) -> SparseBatch:
        return submanifold_conv(x, self.weight, self.bias)


class ConvBlock(nn.Module):
    """Residual block over voxels: x + mlp(norm(conv(x)))."""

    def __init__(self, channels: int, mlp_ratio: float = 4.0, use_checkpoint: bool = False):
        super().__init__()
        # use_checkpoint has no effect. It is accepted because block_args of released files may contain it.
        hidden_channels = int(channels * mlp_ratio)
        self.norm = LayerNorm32(channels, affine=True)
        self.conv = Conv(channels, channels)
        self.mlp = nn.Sequential(
            nn.Linear(channels, hidden_channels), nn.SiLU(), nn.Linear(hidden_channels, channels)
        )

    def forward(self, x: SparseBatch) -> SparseBatch:
        return x.with_feats(x.feats + self.mlp(self.norm(self.conv(x).feats)))


class SplitBlock(nn.Module):
    """Block that splits voxels into their children: the voxels of half the size inside them that exist.

    With y = split(x) and h = split(conv1(silu(norm1(x)))), the result is repeat(y) + conv2(silu(norm2(h))).

    Args:
        channels: channels of the input, a multiple of 8.
        out_channels: channels of the output, a multiple of channels / 8.
        pred_subdiv: True if the block predicts which children exist.
    """

    def __init__(self, channels: int, out_channels: int, pred_subdiv: bool):
        super().__init__()
        self.norm1 = LayerNorm32(channels, affine=True)
        self.norm2 = LayerNorm32(out_channels)
        self.conv1 = Conv(channels, 8 * out_channels)  # channels of all eight children
        self.conv2 = Conv(out_channels, out_channels)
        if pred_subdiv:
            self.to_subdiv = nn.Linear(channels, 8)
        # In the skip connection a child has channels / 8 channels, which are repeated to get out_channels.
        self.repeats = out_channels // (channels // 8)

    def subdivision(self, x: SparseBatch) -> torch.Tensor:
        """Compute the logits of the children, [V, 8].

        A child exists if its logit is positive. A voxel may have no child.
        """
        return self.to_subdiv(x.feats.to(self.to_subdiv.weight.dtype))

    def forward(self, x: SparseBatch, child_exists: torch.Tensor) -> SparseBatch:
        h = self.conv1(x.with_feats(F.silu(self.norm1(x.feats))))
        # child_exists: bool [V, 8], True for children that exist. The skip connection and the branch of the
        # convolutions get the same voxels.
        y = split(x, child_exists)
        h = split(h, child_exists)
        h = self.conv2(y.with_feats(F.silu(self.norm2(h.feats))))
        return y.with_feats(h.feats + y.feats.repeat_interleave(self.repeats, 1))


class MergeBlock(nn.Module):
    """Block that merges the children of each voxel (up to eight voxels of half the size) into the voxel.

    With y = the means over groups of channels of merge(x), and h = merge(conv1(silu(norm1(x)))), the result
    is y + conv2(silu(norm2(h))).

    Args:
        channels: channels of the input.
        out_channels: channels of the output, a multiple of 8 and a divisor of 8 * channels.
    """

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.norm1 = LayerNorm32(channels, affine=True)
        self.norm2 = LayerNorm32(out_channels)
        self.conv1 = Conv(channels, out_channels // 8)  # `merge` concatenates the channels of eight children
        self.conv2 = Conv(out_channels, out_channels)

    def forward(self, x: SparseBatch) -> SparseBatch:
        h = merge(self.conv1(x.with_feats(F.silu(self.norm1(x.feats)))))
        # The skip connection averages groups of consecutive channels: [V, 8 channels] -> [V, out_channels].
        y = merge(x).feats.unflatten(1, (h.feats.shape[1], -1)).mean(2)
        return h.with_feats(y + self.conv2(h.with_feats(F.silu(self.norm2(h.feats)))).feats)


def split(x: SparseBatch, child_exists: torch.Tensor) -> SparseBatch:
    """Split voxels with features [V, 8 C] into their children with features [W, C]. Differentiable in: feats.

    The first C channels of a voxel belong to child 0, the next C channels to child 1, and so on.

    Args:
        x: batch of voxels.
        child_exists: bool [V, 8], True for children that exist.

    Raises: ValueError if no child exists.
    """
    check_shape("split.child_exists", child_exists, [len(x.feats), 8], "Pass the children of these voxels.")
    # [W] each: children stay in the order of their voxels
    voxel_rows, child_indices = child_exists.nonzero().unbind(1)
    if not len(voxel_rows):
        raise ValueError(
            f"decode: none of the {len(x.feats)} voxels has children, so the decoded object is empty. Use"
            " other latents or other weights."
        )
    # Offsets of the children in their voxels, [W, 3]; the first axis varies fastest.
    offsets = torch.stack([child_indices & 1, child_indices >> 1 & 1, child_indices >> 2 & 1], 1)
    coords = x.coords[voxel_rows].clone()
    coords[:, 1:] = 2 * coords[:, 1:] + offsets.int()
    return SparseBatch(coords.contiguous(), x.feats.unflatten(1, (8, -1))[voxel_rows, child_indices], x.size)


def merge(x: SparseBatch) -> SparseBatch:
    """Concatenate the features of the children of each voxel, [W, C] -> [V, 8 C].

    This is the inverse of `split`. The voxels of the result are sorted. The features of children that do not
    exist are zero.
    """
    coarse_voxels = coarser(x)
    offsets = x.coords[:, 1:].long() & 1  # [W, 3] offset of each child in its voxel
    child_index = offsets[:, 0] + 2 * offsets[:, 1] + 4 * offsets[:, 2]  # as in `split`
    merged_feats = x.feats.new_zeros(len(coarse_voxels.coords), 8, x.feats.shape[1])
    merged_feats = merged_feats.index_put((coarse_voxels.row, child_index), x.feats)
    return SparseBatch(coarse_voxels.coords, merged_feats.flatten(1), x.size, coarse_voxels.cache)


class VoxelNetwork(nn.Module):
    """Base class of encoders and decoders: the blocks of all levels, with a block between levels.

    Args:
        config: settings.
        make_step: function that builds the block between two levels from their numbers of channels.
    """

    def __init__(self, config: VoxelConfig, make_step: Callable[[int, int], nn.Module]):
        super().__init__()
        channels = config.model_channels
        args_by_level = config.block_args or ({},) * len(config.model_channels)
        self.blocks = nn.ModuleList()
        for level_index, (level_channels, n_blocks) in enumerate(
            zip(channels, config.num_blocks, strict=True)
        ):
            level_blocks = [ConvBlock(level_channels, **args_by_level[level_index]) for _ in range(n_blocks)]
            # The block between levels is the last block of a level. The
            # last level has none, so the slice is empty.
            step_blocks = [
                make_step(level_channels, next_width)
                for next_width in channels[level_index + 1 : level_index + 2]
            ]
            self.blocks.append(nn.ModuleList([*level_blocks, *step_blocks]))
        if config.use_fp16:
            convert_torso([self.blocks], torch.float16, (nn.Linear, Kernel))

    def first(self, x: SparseBatch, layer: nn.Linear) -> SparseBatch:
        """Apply the input layer in float32, and convert the result to the dtype of the blocks."""
        # Matrices and kernels have the dtype of the blocks. Norms and their vectors stay in float32.
        matrix_dtypes = (parameter.dtype for parameter in self.blocks.parameters() if parameter.ndim > 1)
        dtype = next(matrix_dtypes, torch.float32)
        check_shape(
            f"{type(self).__name__}.x",
            x.feats,
            ["V", layer.in_features],
            "Pass features of this model.",
        )
        return x.with_feats(layer(x.feats.float()).to(dtype))

    def last(self, x: SparseBatch, layer: nn.Linear) -> SparseBatch:
        """Normalise the features and apply the output layer, in float32."""
        return x.with_feats(layer(F.layer_norm(x.feats.float(), x.feats.shape[-1:])))


class VoxelDecoder(VoxelNetwork):
    """Decoder, from latents on coarse voxels to features on the finest voxels."""

    def __init__(self, config: VoxelDecoderConfig):
        super().__init__(
            config, lambda channels, next_channels: SplitBlock(channels, next_channels, config.pred_subdiv)
        )
        self.config = config
        self.from_latent = nn.Linear(config.latent_channels, config.model_channels[0])
        self.output_layer = nn.Linear(config.model_channels[-1], config.out_channels)

    def forward(
        self,
        x: SparseBatch,
        child_logits: Sequence[torch.Tensor] | None = None,
        split_count: int | None = None,
    ) -> tuple[SparseBatch, list[torch.Tensor]]:
        """Decode latents [V, C] to features on the finest voxels.

        Args:
            x: batch of latents.
            child_logits: logits of the children [V, 8] at every split, for a decoder that does not predict
                them; None otherwise.
            split_count: number of splits after which the decoder stops, without the output layer; None: all.

        Returns: the batch of features, and a list of the logits of the children [V, 8] at every split.
        Raises: ValueError if the decoder does not predict children and the logits are missing.
        """
        config = self.config
        if not config.pred_subdiv and (
            child_logits is None or len(child_logits) != len(config.up_block_type)
        ):
            given_split_count = "None" if child_logits is None else len(child_logits)
            raise ValueError(
                f"VoxelDecoder: this decoder needs child_logits for {len(config.up_block_type)} splits, got"
                f" {given_split_count}. Pass the logits that the decoder of the shape returned."
            )
        h = self.first(x, self.from_latent)
        split_logits = list[torch.Tensor]()
        for level_blocks in self.blocks:
            # There is one entry of logits for each split.
            if len(split_logits) == split_count:
                return h, split_logits
            for block in level_blocks:  # type: ignore[attr-defined]
                if isinstance(block, SplitBlock):
                    split_logits.append(
                        block.subdivision(h) if child_logits is None else child_logits[len(split_logits)]
                    )
                    h = block(h, split_logits[-1] > 0)
                else:
                    h = block(h)
        return self.last(h, self.output_layer), split_logits


class VoxelEncoder(VoxelNetwork):
    """Encoder, from features on fine voxels to latents on coarse voxels.

    It returns the mean and the log-variance of the latents, [V, C] each.
    """

    def __init__(self, config: VoxelEncoderConfig):
        super().__init__(config, MergeBlock)
        self.config = config
        self.input_layer = nn.Linear(config.in_channels, config.model_channels[0])
        self.to_latent = nn.Linear(config.model_channels[-1], 2 * config.latent_channels)

    def forward(self, x: SparseBatch) -> tuple[SparseBatch, SparseBatch]:
        h = self.first(x, self.input_layer)
        for level in self.blocks:
            for block in level:  # type: ignore[attr-defined]
                h = block(h)
        h = self.last(h, self.to_latent)
        mean, logvar = h.feats.chunk(2, 1)
        return h.with_feats(mean), h.with_feats(logvar)


@dataclass(frozen=True, kw_only=True)
class VoxelAsset:
    """Decoded object of TRELLIS.2.

    Each voxel has one vertex and one material. The mesh has a face for each edge of a voxel that the surface
    crosses.
    """

    coords: torch.Tensor  # [W, 3] int32 indices of the voxels
    resolution: int  # number of voxels per axis of the grid
    vertices: torch.Tensor  # [W, 3] positions of the vertices in their voxels, 0..1 inside the voxel
    # [W, 3] bool: True if the surface crosses the edge of the voxel along this axis that ends at the voxel's
    # corner with the largest coordinates
    crossed: torch.Tensor
    split: torch.Tensor  # [W] weights > 0 that decide along which diagonal a face is divided into triangles
    # [W, 6] base colour (3), metallic, roughness and opacity, nominally 0..1; not clamped
    materials: torch.Tensor | None = None

    @property
    def means(self) -> torch.Tensor:
        """Return the positions of the vertices [W, 3] in the cube -0.5..0.5."""
        return (self.coords + self.vertices) / self.resolution - 0.5

    @property
    def colours(self) -> torch.Tensor:
        """Return the base colours [W, 3], 0..1. They are grey (0.5) without materials."""
        if self.materials is None:
            return torch.full_like(self.vertices, 0.5)
        return self.materials[:, :3].clamp(0, 1)

    @property
    def opacities(self) -> torch.Tensor:
        """Return the opacities [W], 0..1. They are 1 without materials."""
        return torch.ones_like(self.split) if self.materials is None else self.materials[:, 5].clamp(0, 1)

    def to(self, device: str | torch.device) -> "VoxelAsset":
        """Return the asset on another device."""
        field_values: dict[str, Any] = {
            field_name: field_value.to(device) if isinstance(field_value, torch.Tensor) else field_value
            for field_name, field_value in vars(self).items()
        }
        return VoxelAsset(**field_values)


def assets_of(
    shape_batch: SparseBatch, material_batch: SparseBatch | None, resolution: int, margin: float
) -> list[VoxelAsset]:
    """Build one asset per sample from the outputs of the decoders.

    Args:
        shape_batch: output [W, 7] of the shape's decoder.
        material_batch: output [W, 6] of the decoder of materials on the same voxels, or None.
        resolution: number of voxels per axis of the grid.
        margin: largest distance of a vertex from its voxel, in voxels.
    """
    sample_materials = (
        [None] * shape_batch.size
        if material_batch is None
        else [sample.feats for sample in material_batch.samples()]
    )
    voxel_assets = []
    for sample, raw_materials in zip(shape_batch.samples(), sample_materials, strict=True):
        # Channels of the shape: 3 for the vertex, 3 for the crossed edges, 1 for the diagonal
        raw_vertices, crossing_logits, raw_split = sample.feats.split([3, 3, 1], 1)
        voxel_assets.append(
            VoxelAsset(
                coords=sample.coords,
                resolution=resolution,
                vertices=(1 + 2 * margin) * raw_vertices.sigmoid() - margin,
                crossed=crossing_logits > 0,
                split=F.softplus(raw_split[:, 0]),
                # The range -1..1 of the decoder becomes 0..1.
                materials=None if raw_materials is None else 0.5 + 0.5 * raw_materials,
            )
        )
    return voxel_assets
