"""TRELLIS.2's networks: flows over a grid and over the voxels of an object, and its autoencoders of voxels.

Differences from TRELLIS: the flows have no convolutions or patches. Positions are rotary. One modulation by
the time is shared by all blocks, and each block adds a learnt vector to it. Queries and keys are normalised
in both attentions. A stage may read given features on its voxels beside the latent ("concat_cond"), which
only makes the input layer wider.

Shape letters as in trellis/blocks.py; R grid points per axis, T = R^3, K channels of the given features, P =
D / 2 planes of a head, V voxels, W voxels after a split.
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

# Rotary position embedding in three dimensions: attention depends only on differences of coordinates.
#
# A head's D channels form D / 2 planes. For each axis, n = D // 6 planes are rotated by coordinate * rate_i
# with rate_i = f_0 / f_1^(i / n); the remaining planes are not rotated. The product of a rotated query and a
# rotated key depends only on the difference of their angles, and so on that of their coordinates (Su et al.
# 2021, RoFormer, section 3.2; here per axis).


def angles_of(
    coords: torch.Tensor, head_channels: int, freq: tuple[float, float] = (1.0, 10000.0)
) -> torch.Tensor:
    """Compute rotation angles from coordinates [V, 3]: [V, P] float32.

    The planes of axis 1 come first, then those of axis 2 and of axis 3, then zeros.

    Args:
        head_channels: D.
        freq: f_0 and f_1.
    """
    count = head_channels // 6  # planes per axis
    rates = freq[0] / freq[1] ** (torch.arange(count, dtype=torch.float32, device=coords.device) / count)
    angles = (coords.float()[:, :, None] * rates).flatten(1)  # [V, 3 count]
    # An angle of zero leaves the remaining planes unrotated.
    return torch.nn.functional.pad(angles, (0, head_channels // 2 - angles.shape[1]))


def rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotate the planes of heads [..., V, H, D] by angles [V, P], in float32.

    Plane i consists of the channels 2 i and 2 i + 1. Differentiable in: x.
    """
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # [..., V, H, P]
    # One angle for all heads: [V, 1, P].
    cos = angles.cos()[:, None]
    sin = angles.sin()[:, None]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)


@dataclass(frozen=True)
class RotaryLayout:
    """Layout whose tokens have positions: self-attention rotates queries and keys, cross-attention does
    not.
    """

    inner: Layout
    angles: torch.Tensor  # [V, P] on voxels; [T, P] on a grid, where all samples have the same tokens

    def per_token(self, values: torch.Tensor) -> torch.Tensor:
        return self.inner.per_token(values)

    def self_attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.inner.self_attention(rotate(q, self.angles), rotate(k, self.angles), v)

    def cross_attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.inner.cross_attention(q, k, v)


DTYPES = {  # spellings of `dtype` in the JSON files
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
    """Settings of a flow: `args` of its JSON file."""

    # Grid points per axis of the structure. Flows on voxels do not use it; the texture's file may state any
    # number.
    resolution: int
    in_channels: int  # channels of the latent and of the given features
    out_channels: int  # channels of the latent
    pe_mode: str = "ape"  # kind of position embedding; only "rope" is supported
    # f_0 and f_1 of `angles_of`. The structure's flow ignores it and uses these defaults.
    rope_freq: tuple[float, float] = (1.0, 10000.0)
    dtype: str = "float32"  # of new blocks; loaded files keep their own
    initialization: str = "vanilla"  # of new weights in the original's training; not used here

    def __post_init__(self):
        object.__setattr__(self, "rope_freq", tuple(self.rope_freq))
        who = type(self).__name__
        if self.pe_mode != "rope" or self.dtype not in DTYPES:
            got = f"{self.pe_mode!r} and {self.dtype!r}"
            raise ValueError(
                f"{who}: expected pe_mode 'rope' and dtype {', '.join(DTYPES)}, got {got}. No released model"
                " uses other values: name a released model."
            )
        # given < 0 would mean fewer input channels than the latent has.
        if self.model_channels % self.heads or self.given < 0:
            got = f"{self.model_channels} / {self.heads}, {self.in_channels} and {self.out_channels}"
            expected = "model_channels to be a multiple of the heads, and in_channels >= out_channels"
            raise ValueError(f"{who}: expected {expected}, got {got}. Correct the model's JSON file.")
        # Rotation needs planes of two channels and at least one plane per axis.
        if self.head_channels % 2 or self.head_channels < 6 or len(self.rope_freq) != 2:
            got = f"{self.head_channels} channels and {self.rope_freq}"
            raise ValueError(
                f"{who}: expected heads of an even number of channels, 6 or more, and two rope_freq, got"
                f" {got}. Correct the model's JSON file."
            )

    @property
    def head_channels(self) -> int:
        """D, channels of a head."""
        return self.model_channels // self.heads

    @property
    def given(self) -> int:
        """K, channels of the given features."""
        return self.in_channels - self.out_channels


class Block(blocks.ModulatedBlock):
    """TRELLIS's block with a learnt vector `modulation` [6 C] that is added to the shared modulation."""

    def __init__(self, channels: int, *args, **kwargs):
        super().__init__(channels, *args, **kwargs)
        self.modulation = nn.Parameter(torch.randn(6 * channels) / channels**0.5)

    def forward(
        self, x: torch.Tensor, time: torch.Tensor, cond: torch.Tensor, layout: blocks.Layout
    ) -> torch.Tensor:
        return super().forward(x, (time + self.modulation).to(time.dtype), cond, layout)


class Flow(nn.Module):
    """Common part of both flows: layers, their names, and the path of tokens through them."""

    def __init__(self, config: FlowConfig):
        super().__init__()
        self.config = config
        self.recompute = config.use_checkpoint
        channels = config.model_channels
        self.t_embedder = blocks.TimeEmbedder(channels)
        if config.share_mod:
            self.adaLN_modulation = blocks.modulation(channels)
        self.input_layer = nn.Linear(config.in_channels, channels)
        # Only with shared modulation does a block have a vector of its own.
        self.blocks = config.blocks(Block if config.share_mod else blocks.ModulatedBlock)
        self.out_layer = nn.Linear(channels, config.out_channels)
        # Input and output layers stay in float32.
        blocks.convert_torso(self.blocks, DTYPES[config.dtype])

    def angles(self, coords: torch.Tensor) -> torch.Tensor:
        """Compute the angles [V, P] by which tokens at coordinates [V, 3] rotate the planes of a head."""
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
            t: [N].
            cond: [N, L, E].
            coords: [V, 3], or [T, 3] on a grid.
        Returns: [..., out_channels], in x's dtype.
        """
        config = self.config
        dtype = blocks.torso_dtype(self.blocks)
        time = self.t_embedder(t)
        if config.share_mod:
            time = self.adaLN_modulation(time)
        # Input and output layers are float32; only the blocks compute in `dtype`.
        h = self.input_layer(x.float()).to(dtype)
        time = time.to(dtype)
        cond = cond.to(dtype)
        # The rotation is part of the layout, so TRELLIS's blocks serve unchanged.
        layout = RotaryLayout(layout, self.angles(coords))
        for block in self.blocks:
            h = blocks.run_block(block, h, time, cond, layout, recompute=self.recompute)
        h = F.layer_norm(h.to(x.dtype), h.shape[-1:])
        return self.out_layer(h.to(self.out_layer.weight.dtype)).to(x.dtype)


class StructureFlow(Flow):
    """First stage: predict the velocity of a dense latent.

        model(x_t [N, C, R, R, R], t [N] in 0..1, cond [N, L, E]) -> velocity, like x_t

    Differentiable in: everything except t.
    """

    passes_over = True  # unknown settings in the JSON file are ignored, as in the original

    def __init__(self, config: FlowConfig):
        super().__init__(config)
        if config.given:
            got = f"{config.in_channels} and {config.out_channels}"
            raise ValueError(
                f"StructureFlow: expected in_channels equal to out_channels, got {got}. Correct the model's"
                " JSON file."
            )

    def angles(self, coords: torch.Tensor) -> torch.Tensor:
        """Compute the angles with the default frequencies, because the original ignores rope_freq here."""
        return angles_of(coords, self.config.head_channels)

    def places(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return the coordinates of the tokens, [T, 3]; the last axis varies fastest."""
        return torch.cartesian_prod(*[torch.arange(self.config.resolution, device=device)] * 3)

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        config = self.config
        shape: list[int | str] = ["N", config.in_channels, *[config.resolution] * 3]
        blocks.check_inputs("StructureFlow", x_t, shape, cond, len(x_t), config.cond_channels)
        # [N, C, R, R, R] -> tokens [N, T, C]
        v = self.transform(
            x_t.flatten(2).transpose(1, 2), t, cond, self.places(x_t.device), blocks.DenseLayout()
        )
        return v.transpose(1, 2).unflatten(2, [config.resolution] * 3)


class VoxelFlow(Flow):
    """Later stages: predict the velocity of latents on voxels.

        model(x_t: SparseBatch, t [N] in 0..1, cond [N, L, E]) -> velocity on the same voxels

    Given features on the voxels, [V, K], are concatenated to the latent before the input layer. They are
    neither noised nor predicted.

    Differentiable in: everything except t.
    """

    def forward(self, x_t: SparseBatch, t: torch.Tensor, cond: torch.Tensor) -> SparseBatch:
        config = self.config
        blocks.check_inputs(
            "VoxelFlow", x_t.feats, ["V", config.out_channels], cond, x_t.size, config.cond_channels
        )
        x = x_t.feats
        # Channels of the given features; 0 if there are none.
        width = 0 if x_t.given is None else x_t.given.shape[1]
        if width != config.given:
            remedy = "Pass the features of the previous stage if, and only if, the model reads them."
            raise ValueError(
                f"VoxelFlow.x_t: expected {config.given} given features beside the latent, got {width}."
                f" {remedy}"
            )
        if x_t.given is not None:
            # The latent comes first.
            x = torch.cat([x, x_t.given.to(x)], 1)
        return x_t.with_feats(self.transform(x, t, cond, x_t.coords[:, 1:], blocks.SparseLayout(x_t)))


# Autoencoders: features on fine voxels -> latents on coarse ones and back. An encoder merges eight children
# into a voxel step by step; a decoder splits a voxel into those of its eight children that exist. The shape's
# decoder predicts which children exist; the decoder of materials receives the shape's prediction.
#
# A block consists of a submanifold convolution, a norm and a feed-forward layer beside a skip (as in
# ConvNeXt). A split moves channels into space, in the branch and in the skip, whose channels are repeated to
# the new number. A merge moves space into channels, and the skip takes means of them (Xiang et al. 2025,
# sparse compression autoencoder). Child n lies at (n & 1, n >> 1 & 1, n >> 2 & 1) in its voxel.


# Published names of the blocks; only these are supported.
BLOCK = "SparseConvNeXtBlock3d"
SPLIT = "SparseResBlockC2S3d"
MERGE = "SparseResBlockS2C3d"
# Output channels of the shape: 3 for the vertex in its voxel, 3 for the crossed edges, 1 for how a face is
# split.
SHAPE_CHANNELS = 7


@dataclass(frozen=True, kw_only=True)
class VoxelConfig:
    """Settings that encoder and decoder have in common in `args` of their JSON files."""

    model_channels: tuple[int, ...]  # channels of each level, in the order of computation
    latent_channels: int
    num_blocks: tuple[int, ...]  # blocks of each level
    block_type: tuple[str, ...]  # published name of the block, per level
    block_args: tuple[Mapping, ...] = ()  # arguments of `ConvBlock`, per level
    resolution: int | None = None  # finest voxels per axis in training; the network does not use it
    use_fp16: bool = False  # half precision for new blocks; loaded files keep their own dtype

    def __post_init__(self):
        for name in ("model_channels", "num_blocks", "block_type", "block_args"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def check(self, between: Sequence[str], step: str, fits: Callable[[int, int], bool]) -> None:
        """Raise ValueError for inconsistent levels, unsupported blocks, or channels of neighbours that do not
        fit.

        Args:
            between: published names of the steps between levels.
            step: the only supported one.
            fits: whether the channels of a level and of the next one fit.
        """
        who = type(self).__name__
        levels = len(self.model_channels)
        if (
            not levels
            or len(self.num_blocks) != levels
            or len(self.block_type) != levels
            or len(between) != levels - 1
        ):
            got = f"{levels}, {len(self.num_blocks)}, {len(self.block_type)} and {len(between)}"
            expected = "model_channels, num_blocks and block_type for every level and a step between them"
            raise ValueError(f"{who}: expected {expected}, got {got}. Correct the model's JSON file.")
        # Other published kinds of blocks have other parameters.
        foreign = sorted({*self.block_type} - {BLOCK} | {*between} - {step})
        if foreign:
            raise ValueError(
                f"{who}: expected the blocks {BLOCK} and {step}, got {', '.join(foreign)}. Other blocks are"
                " not supported: name a released model."
            )
        if not all(fits(a, b) for a, b in zip(self.model_channels, self.model_channels[1:], strict=False)):
            got = f"{list(self.model_channels)}"
            raise ValueError(
                f"{who}: the model_channels {got} cannot be divided among eight children. Correct the model's"
                " JSON file."
            )


@dataclass(frozen=True, kw_only=True)
class VoxelDecoderConfig(VoxelConfig):
    """Settings of a decoder. Levels are listed coarsest first."""

    up_block_type: tuple[str, ...]  # between levels
    out_channels: int = SHAPE_CHANNELS  # the shape's file leaves it out
    pred_subdiv: bool = True  # whether the decoder predicts which children exist
    voxel_margin: float = 0.5  # how far a vertex may lie outside its voxel, in voxels

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "up_block_type", tuple(self.up_block_type))
        self.check(self.up_block_type, SPLIT, lambda a, b: a % 8 == 0 and b % (a // 8) == 0)

    @property
    def finer(self) -> int:
        """Number of finest voxels along a side of a coarsest voxel."""
        return 2 ** len(self.up_block_type)


@dataclass(frozen=True, kw_only=True)
class VoxelEncoderConfig(VoxelConfig):
    """Settings of an encoder. Levels are listed finest first."""

    down_block_type: tuple[str, ...]  # between levels
    # The shape's file leaves it out: 3 for the vertex in its voxel and 3 for crossed edges, minus 0.5 each.
    in_channels: int = 6

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "down_block_type", tuple(self.down_block_type))
        self.check(self.down_block_type, MERGE, lambda a, b: b % 8 == 0 and 8 * a % b == 0)

    @property
    def coarser(self) -> int:
        """Number of finest voxels along a side of a coarsest voxel."""
        return 2 ** len(self.down_block_type)


class Conv(Kernel):
    """Submanifold convolution with `weight` [B, 3, 3, 3, A] and `bias` [B]."""

    def forward(self, x: SparseBatch) -> SparseBatch:
        return submanifold_conv(x, self.weight, self.bias)


class ConvBlock(nn.Module):
    """Residual block: x + mlp(norm(conv(x)))."""

    def __init__(self, channels: int, mlp_ratio: float = 4.0, use_checkpoint: bool = False):
        super().__init__()
        # use_checkpoint is accepted because block_args of released files may name it.
        hidden = int(channels * mlp_ratio)
        self.norm = LayerNorm32(channels, affine=True)
        self.conv = Conv(channels, channels)
        self.mlp = nn.Sequential(nn.Linear(channels, hidden), nn.SiLU(), nn.Linear(hidden, channels))

    def forward(self, x: SparseBatch) -> SparseBatch:
        return x.with_feats(x.feats + self.mlp(self.norm(self.conv(x).feats)))


class SplitBlock(nn.Module):
    """Block that splits voxels into their children.

    y = split(x), h = split(conv1(silu(norm1(x)))), result: repeat(y) + conv2(silu(norm2(h))).
    """

    def __init__(self, channels: int, out_channels: int, pred_subdiv: bool):
        super().__init__()
        self.norm1 = LayerNorm32(channels, affine=True)
        self.norm2 = LayerNorm32(out_channels)
        self.conv1 = Conv(channels, 8 * out_channels)  # channels of all eight children
        self.conv2 = Conv(out_channels, out_channels)
        if pred_subdiv:
            self.to_subdiv = nn.Linear(channels, 8)
        # A child's skip has channels / 8 channels; each is repeated to reach out_channels.
        self.repeats = out_channels // (channels // 8)

    def subdivision(self, x: SparseBatch) -> torch.Tensor:
        """Compute logits of the children, [V, 8].

        Children with a logit above 0 exist. A voxel without such a child vanishes.
        """
        return self.to_subdiv(x.feats.to(self.to_subdiv.weight.dtype))

    def forward(self, x: SparseBatch, there: torch.Tensor) -> SparseBatch:
        h = self.conv1(x.with_feats(F.silu(self.norm1(x.feats))))
        # Both branches are split alike, so their voxels agree.
        y = split(x, there)
        h = split(h, there)
        h = self.conv2(y.with_feats(F.silu(self.norm2(h.feats))))
        return y.with_feats(h.feats + y.feats.repeat_interleave(self.repeats, 1))


class MergeBlock(nn.Module):
    """Block that merges children into voxels.

    y = means of merge(x), h = merge(conv1(silu(norm1(x)))), result: y + conv2(silu(norm2(h))).
    """

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.norm1 = LayerNorm32(channels, affine=True)
        self.norm2 = LayerNorm32(out_channels)
        self.conv1 = Conv(channels, out_channels // 8)  # eight children of out_channels / 8 make out_channels
        self.conv2 = Conv(out_channels, out_channels)

    def forward(self, x: SparseBatch) -> SparseBatch:
        h = merge(self.conv1(x.with_feats(F.silu(self.norm1(x.feats)))))
        # The skip averages consecutive groups of the merged channels: [V, 8 C] -> [V, C'].
        y = merge(x).feats.unflatten(1, (h.feats.shape[1], -1)).mean(2)
        return h.with_feats(y + self.conv2(h.with_feats(F.silu(self.norm2(h.feats)))).feats)


def split(x: SparseBatch, there: torch.Tensor) -> SparseBatch:
    """Split voxels with features [V, 8 C] into their children with features [W, C].

    A voxel's channels are those of child 0, then of child 1, and so on.

    Args: there: [V, 8] bool, True for children that exist.
    Differentiable in: feats.
    Raises: ValueError if no child exists.
    """
    check_shape("split.there", there, [len(x.feats), 8], "Pass the children of these voxels.")
    voxel, child = there.nonzero().unbind(1)  # [W]: children stay in the order of their voxels
    if not len(voxel):
        raise ValueError(
            f"decode: expected voxels with children, but none of the {len(x.feats)} voxels has any. Use other"
            " latents or weights."
        )
    # The first axis varies fastest among the children. [W, 3]
    bits = torch.stack([child & 1, child >> 1 & 1, child >> 2 & 1], 1)
    coords = x.coords[voxel].clone()
    coords[:, 1:] = 2 * coords[:, 1:] + bits.int()
    return SparseBatch(coords.contiguous(), x.feats.unflatten(1, (8, -1))[voxel, child], x.size)


def merge(x: SparseBatch) -> SparseBatch:
    """Merge features [W, C] into those of the voxels that contain them, [V, 8 C]; inverse of `split`.

    Voxels are sorted. Children that do not exist contribute zeros.
    """
    to = coarser(x)
    bits = x.coords[:, 1:].long() & 1  # [W, 3], position within the coarse voxel
    merged = x.feats.new_zeros(len(to.coords), 8, x.feats.shape[1])
    # Child number = x + 2 y + 4 z of the lowest bits, as in `split`.
    merged = merged.index_put((to.row, bits[:, 0] + 2 * bits[:, 1] + 4 * bits[:, 2]), x.feats)
    return SparseBatch(to.coords, merged.flatten(1), x.size, to.cache)


class VoxelNetwork(nn.Module):
    """Common part of encoders and decoders: blocks of all levels with a step between levels."""

    def __init__(self, config: VoxelConfig, step: Callable[[int, int], nn.Module]):
        super().__init__()
        channels = config.model_channels
        args = config.block_args or ({},) * len(config.model_channels)
        self.blocks = nn.ModuleList()
        for i, (width, count) in enumerate(zip(channels, config.num_blocks, strict=True)):
            # The step to the next level is the last block of a level; the last level has none.
            level = [ConvBlock(width, **args[i]) for _ in range(count)]
            self.blocks.append(
                nn.ModuleList([*level, *(step(width, after) for after in channels[i + 1 : i + 2])])
            )
        if config.use_fp16:
            convert_torso([self.blocks], torch.float16, (nn.Linear, Kernel))

    def first(self, x: SparseBatch, layer: nn.Linear) -> SparseBatch:
        """Apply the first layer in full precision and convert the result to the blocks' dtype."""
        # Matrices and kernels have the blocks' dtype; norms stay in float32.
        dtype = next((p.dtype for p in self.blocks.parameters() if p.ndim > 1), torch.float32)
        check_shape(
            f"{type(self).__name__}.x",
            x.feats,
            ["V", layer.in_features],
            "Pass features of this model's size.",
        )
        return x.with_feats(layer(x.feats.float()).to(dtype))

    def last(self, x: SparseBatch, layer: nn.Linear) -> SparseBatch:
        """Normalise and apply the last layer in full precision."""
        return x.with_feats(layer(F.layer_norm(x.feats.float(), x.feats.shape[-1:])))


class VoxelDecoder(VoxelNetwork):
    """Decode latents on voxels to features on the finest voxels."""

    def __init__(self, config: VoxelDecoderConfig):
        super().__init__(config, lambda before, after: SplitBlock(before, after, config.pred_subdiv))
        self.config = config
        self.from_latent = nn.Linear(config.latent_channels, config.model_channels[0])
        self.output_layer = nn.Linear(config.model_channels[-1], config.out_channels)

    def forward(
        self, x: SparseBatch, children: Sequence[torch.Tensor] | None = None, levels: int | None = None
    ) -> tuple[SparseBatch, list[torch.Tensor]]:
        """Decode latents [V, C] to features on the finest voxels.

        Args:
            children: logits of the children at every split, for a decoder that does not predict them.
            levels: stop after this many splits, before the output layer.
        Returns: features, and the logits of the children [V, 8] at every split.
        Raises: ValueError if the decoder does not predict children and the logits are missing.
        """
        config = self.config
        if not config.pred_subdiv and (children is None or len(children) != len(config.up_block_type)):
            got = "None" if children is None else len(children)
            raise ValueError(
                f"VoxelDecoder: expected the children of {len(config.up_block_type)} splits, got {got}. Pass"
                " the logits that the shape's decoder returned."
            )
        h = self.first(x, self.from_latent)
        logits = list[torch.Tensor]()
        for level in self.blocks:
            # As many logits as splits so far. The blocks of the level reached are not applied.
            if len(logits) == levels:
                return h, logits
            for block in level:  # type: ignore[attr-defined]
                if isinstance(block, SplitBlock):
                    logits.append(block.subdivision(h) if children is None else children[len(logits)])
                    h = block(h, logits[-1] > 0)
                else:
                    h = block(h)
        return self.last(h, self.output_layer), logits


class VoxelEncoder(VoxelNetwork):
    """Encode features on fine voxels to mean and log-variance of the latent on coarse voxels, [V, C] each."""

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
    """Decoded object of TRELLIS.2: one vertex per voxel, faces where edges are crossed, one material per
    voxel.
    """

    coords: torch.Tensor  # [W, 3] int32
    resolution: int  # voxels per axis of the grid
    vertices: torch.Tensor  # [W, 3], positions in the voxel: 0..1 inside, up to the margin outside
    # [W, 3] bool: whether the surface crosses the voxel's edge along each axis, at its far corner.
    crossed: torch.Tensor
    split: torch.Tensor  # [W] > 0: weights that decide along which diagonal a face is cut
    # [W, 6]: base colour, metallic, roughness, alpha of 0..1; not clipped yet.
    materials: torch.Tensor | None = None

    @property
    def means(self) -> torch.Tensor:
        """Vertices in the cube of +-0.5, [W, 3]."""
        return (self.coords + self.vertices) / self.resolution - 0.5

    @property
    def colours(self) -> torch.Tensor:
        """Base colours of 0..1, [W, 3]; grey without materials."""
        return (
            # Grey, as a renderer needs some colour
            torch.full_like(self.vertices, 0.5)
            if self.materials is None
            else self.materials[:, :3].clamp(0, 1)
        )

    @property
    def opacities(self) -> torch.Tensor:
        """Opacities of 0..1, [W]; 1 without materials."""
        return torch.ones_like(self.split) if self.materials is None else self.materials[:, 5].clamp(0, 1)

    def to(self, device: str | torch.device) -> "VoxelAsset":
        """Return the asset on another device."""
        moved: dict[str, Any] = {
            name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in vars(self).items()
        }
        return VoxelAsset(**moved)


def assets_of(
    shape: SparseBatch, materials: SparseBatch | None, resolution: int, margin: float
) -> list[VoxelAsset]:
    """Build assets from decoded features, shape [W, 7] and materials [W, 6] on the same voxels.

    Args: margin: how far a vertex may lie outside its voxel, in voxels.
    """
    # one entry per sample
    colours = [None] * shape.size if materials is None else [s.feats for s in materials.samples()]
    assets = []
    for sample, colour in zip(shape.samples(), colours, strict=True):
        # The shape's channels: 3 for the vertex, 3 for crossed edges, 1 for the diagonal.
        place, crossed, cut = sample.feats.split([3, 3, 1], 1)
        assets.append(
            VoxelAsset(
                coords=sample.coords,
                resolution=resolution,
                vertices=(1 + 2 * margin) * place.sigmoid() - margin,
                crossed=crossed > 0,
                split=F.softplus(cut[:, 0]),
                # The decoder's range -1..1 becomes 0..1
                materials=None if colour is None else 0.5 + 0.5 * colour,
            )
        )
    return assets
