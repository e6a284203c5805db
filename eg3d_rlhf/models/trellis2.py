"""TRELLIS.2's networks: its flows, over the cells of a grid and over the voxels of an object, and both halves
of its autoencoders.

Against TRELLIS: the flows have no convolutions or patches; positions are rotary; one modulation of the time
is shared by all blocks, each of which adds a vector of its own to it; queries and keys are normalised in both
attentions; a stage may read features on its voxels beside the latent ("concat_cond"), which makes the input
layer wider and nothing else.

Shape letters as in trellis/blocks.py; R grid points per axis, T = R^3, K channels of the features beside the
latent, P = D / 2 planes of a head, V voxels, W voxels after a split.
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

# Rotary positions in three dimensions: attention that knows of two tokens only how far apart they are.
#
# A head's D channels are D / 2 planes. For each axis n = D // 6 planes turn by coordinate * rate_i, rate_i =
# f_0 / f_1^(i / n); planes left over do not turn. The product of a turned query and a turned key depends on
# the difference of their angles alone, hence on that of their coordinates (Su et al. 2021, here per axis).


def angles_of(
    coords: torch.Tensor, head_channels: int, freq: tuple[float, float] = (1.0, 10000.0)
) -> torch.Tensor:
    """Angles of coordinates [V, 3] -> [V, P] float32: the planes of axis 1, of axis 2,
    of axis 3, then zeros.
    """
    count = head_channels // 6
    rates = freq[0] / freq[1] ** (torch.arange(count, dtype=torch.float32, device=coords.device) / count)
    turned = (coords.float()[:, :, None] * rates).flatten(1)  # [V, 3 count]
    return torch.nn.functional.pad(turned, (0, head_channels // 2 - turned.shape[1]))


def rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Turn the planes, channels 2 i and 2 i + 1, of heads [..., V, H, D] by angles [V, P]; in float32.
    Differentiable in: x.
    """
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # [..., V, H, P]
    # [V, 1, P]
    cos = angles.cos()[:, None]
    sin = angles.sin()[:, None]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)


@dataclass(frozen=True)
class RotaryLayout:
    """A `Layout` whose tokens have places: self-attention turns queries and keys, attention to a condition
    does not.
    """

    inner: Layout
    angles: torch.Tensor  # [V, P], or [T, P] of the tokens that all samples have

    def per_token(self, values: torch.Tensor) -> torch.Tensor:
        return self.inner.per_token(values)

    def self_attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.inner.self_attention(rotate(q, self.angles), rotate(k, self.angles), v)

    def cross_attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.inner.cross_attention(q, k, v)


DTYPES = {
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
    """What a flow's JSON file calls args."""

    # of the structure's grid; a flow on voxels does not use it, and files of the texture's say anything
    resolution: int
    in_channels: int  # of the latent and of what is read beside it
    out_channels: int
    pe_mode: str = "ape"
    # f_0 and f_1 of `angles_of`; the structure's flow takes these whatever it says
    rope_freq: tuple[float, float] = (1.0, 10000.0)
    dtype: str = "float32"  # of the blocks as built; files bring their own
    initialization: str = "vanilla"  # of weights that training starts from: no concern of trained ones

    def __post_init__(self):
        object.__setattr__(self, "rope_freq", tuple(self.rope_freq))
        who = type(self).__name__
        if self.pe_mode != "rope" or self.dtype not in DTYPES:
            got = f"{self.pe_mode!r} and {self.dtype!r}"
            raise ValueError(
                f"{who}: expected pe_mode 'rope' and dtype {', '.join(DTYPES)}, got {got}. Others are in no"
                " released model."
            )
        if self.model_channels % self.heads or self.given < 0:
            got = f"{self.model_channels} / {self.heads}, {self.in_channels} and {self.out_channels}"
            expected = "model_channels to divide by heads and in_channels >= out_channels"
            raise ValueError(f"{who}: expected {expected}, got {got}. Correct the model's JSON file.")
        if self.head_channels % 2 or self.head_channels < 6 or len(self.rope_freq) != 2:
            got = f"{self.head_channels} channels and {self.rope_freq}"
            raise ValueError(
                f"{who}: expected heads of an even number of channels, 6 or more, and two rope_freq, got"
                f" {got}. Correct it."
            )

    @property
    def head_channels(self) -> int:
        """D."""
        return self.model_channels // self.heads

    @property
    def given(self) -> int:
        """K."""
        return self.in_channels - self.out_channels


class Block(blocks.ModulatedBlock):
    """TRELLIS's block with a vector of its own, `modulation` [6 C], on top of the modulation that all blocks
    share.
    """

    def __init__(self, channels: int, *args, **kwargs):
        super().__init__(channels, *args, **kwargs)
        self.modulation = nn.Parameter(torch.randn(6 * channels) / channels**0.5)

    def forward(
        self, x: torch.Tensor, time: torch.Tensor, cond: torch.Tensor, layout: blocks.Layout
    ) -> torch.Tensor:
        return super().forward(x, (time + self.modulation).to(time.dtype), cond, layout)


class Flow(nn.Module):
    """What both flows have in common: layers, their names, and the way of tokens through them."""

    def __init__(self, config: FlowConfig):
        super().__init__()
        self.config = config
        self.recompute = config.use_checkpoint
        channels = config.model_channels
        self.t_embedder = blocks.TimeEmbedder(channels)
        if config.share_mod:
            self.adaLN_modulation = blocks.modulation(channels)
        self.input_layer = nn.Linear(config.in_channels, channels)
        self.blocks = config.blocks(Block if config.share_mod else blocks.ModulatedBlock)
        self.out_layer = nn.Linear(channels, config.out_channels)
        blocks.convert_torso(self.blocks, DTYPES[config.dtype])

    def angles(self, coords: torch.Tensor) -> torch.Tensor:
        """By which tokens at coordinates [V, 3] turn the planes of a head, [V, P]."""
        return angles_of(coords, self.config.head_channels, self.config.rope_freq)

    def transform(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        cond: torch.Tensor,
        coords: torch.Tensor,
        layout: blocks.Layout,
    ) -> torch.Tensor:
        """Tokens [..., in_channels] at coordinates [V, 3] (or [T, 3]), t [N], cond [N, L, E] -> [...,
        out_channels], in x's type.
        """
        config = self.config
        dtype = blocks.torso_dtype(self.blocks)
        time = self.t_embedder(t)
        if config.share_mod:
            time = self.adaLN_modulation(time)
        h = self.input_layer(x.float()).to(dtype)
        time = time.to(dtype)
        cond = cond.to(dtype)
        layout = RotaryLayout(layout, self.angles(coords))
        for block in self.blocks:
            h = blocks.run_block(block, h, time, cond, layout, recompute=self.recompute)
        h = F.layer_norm(h.to(x.dtype), h.shape[-1:])
        return self.out_layer(h.to(self.out_layer.weight.dtype)).to(x.dtype)


class StructureFlow(Flow):
    """model(x_t [N, C, R, R, R], t [N] in 0..1, cond [N, L, E]) -> velocity, like x_t. Differentiable in:
    everything but t.
    """

    passes_over = True  # args that it does not know

    def __init__(self, config: FlowConfig):
        super().__init__(config)
        if config.given:
            got = f"{config.in_channels} and {config.out_channels}"
            raise ValueError(
                f"StructureFlow: expected in_channels = out_channels, got {got}. Correct the model's JSON"
                " file."
            )

    def angles(self, coords: torch.Tensor) -> torch.Tensor:
        """The original forgets rope_freq here."""
        return angles_of(coords, self.config.head_channels)

    def places(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Of the tokens, [T, 3]."""
        return torch.cartesian_prod(*[torch.arange(self.config.resolution, device=device)] * 3)

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        config = self.config
        shape: list[int | str] = ["N", config.in_channels, *[config.resolution] * 3]
        blocks.check_inputs("StructureFlow", x_t, shape, cond, len(x_t), config.cond_channels)
        v = self.transform(
            x_t.flatten(2).transpose(1, 2), t, cond, self.places(x_t.device), blocks.DenseLayout()
        )
        return v.transpose(1, 2).unflatten(2, [config.resolution] * 3)


class VoxelFlow(Flow):
    """model(x_t: SparseBatch, t [N] in 0..1, cond [N, L, E]) -> velocity on the same voxels. Differentiable
    in: everything but t.

    What is given on the voxels, [V, K], stands beside the latent in the input layer; it is neither noised nor
    predicted.
    """

    def forward(self, x_t: SparseBatch, t: torch.Tensor, cond: torch.Tensor) -> SparseBatch:
        config = self.config
        blocks.check_inputs(
            "VoxelFlow", x_t.feats, ["V", config.out_channels], cond, x_t.size, config.cond_channels
        )
        x = x_t.feats
        width = 0 if x_t.given is None else x_t.given.shape[1]
        if width != config.given:
            remedy = "Give the features that the stage before leaves, where the model reads some."
            raise ValueError(
                f"VoxelFlow.x_t: expected {config.given} given features beside the latent, got {width}."
                f" {remedy}"
            )
        if x_t.given is not None:
            x = torch.cat([x, x_t.given.to(x)], 1)
        return x_t.with_feats(self.transform(x, t, cond, x_t.coords[:, 1:], blocks.SparseLayout(x_t)))


# Autoencoders: features on fine voxels -> latents on coarse ones and back, in steps that merge eight children
# into a voxel, or split it into those of them that are there. Which are there the shape's decoder says
# itself; the one of materials is told.
#
# A block is a submanifold convolution, a norm and a feed-forward beside a skip (as ConvNeXt); a split moves
# channels into space, in the branch and in the skip, whose channels are repeated to the new number; a merge
# moves space into channels, and means are taken (Xiang et al. 2025, sparse compression autoencoder). Child n
# lies at (n & 1, n >> 1 & 1, n >> 2 & 1) in its voxel.


# published names, the only ones that are read
BLOCK = "SparseConvNeXtBlock3d"
SPLIT = "SparseResBlockC2S3d"
MERGE = "SparseResBlockS2C3d"
# of the shape's output: 3 place a vertex in its voxel, 3 say which edges are crossed, 1 how a face is split
SHAPE_CHANNELS = 7


@dataclass(frozen=True, kw_only=True)
class VoxelConfig:
    """What the JSON files of both halves call args."""

    model_channels: tuple[int, ...]  # per level, in the order of computation
    latent_channels: int
    num_blocks: tuple[int, ...]  # per level
    block_type: tuple[str, ...]
    block_args: tuple[Mapping, ...] = ()
    resolution: int | None = None  # of the finest voxels in training: no concern of the network
    use_fp16: bool = False

    def __post_init__(self):
        for name in ("model_channels", "num_blocks", "block_type", "block_args"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def check(self, between: Sequence[str], step: str, fits: Callable[[int, int], bool]) -> None:
        """Raise ValueError for levels that are not alike, blocks of another kind, and channels of neighbours
        that do not fit.
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
        foreign = sorted({*self.block_type} - {BLOCK} | {*between} - {step})
        if foreign:
            raise ValueError(
                f"{who}: expected blocks {BLOCK} and {step}, got {', '.join(foreign)}. Others are not read."
            )
        if not all(fits(a, b) for a, b in zip(self.model_channels, self.model_channels[1:], strict=False)):
            got = f"{list(self.model_channels)}"
            raise ValueError(
                f"{who}: expected channels that eight children can share, got {got}. Correct its JSON file."
            )


@dataclass(frozen=True, kw_only=True)
class VoxelDecoderConfig(VoxelConfig):
    """Coarsest level first."""

    up_block_type: tuple[str, ...]  # between levels
    out_channels: int = SHAPE_CHANNELS  # the shape's file leaves it out
    pred_subdiv: bool = True  # whether it says which children are there
    voxel_margin: float = 0.5  # by which a vertex may leave its voxel

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "up_block_type", tuple(self.up_block_type))
        self.check(self.up_block_type, SPLIT, lambda a, b: a % 8 == 0 and b % (a // 8) == 0)

    @property
    def finer(self) -> int:
        """Voxels of the finest level along a side of one of the coarsest."""
        return 2 ** len(self.up_block_type)


@dataclass(frozen=True, kw_only=True)
class VoxelEncoderConfig(VoxelConfig):
    """Finest level first."""

    down_block_type: tuple[str, ...]  # between levels
    # the shape's file leaves it out: 3 of the vertex in its voxel, 3 of crossed edges, less a half each
    in_channels: int = 6

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "down_block_type", tuple(self.down_block_type))
        self.check(self.down_block_type, MERGE, lambda a, b: b % 8 == 0 and 8 * a % b == 0)

    @property
    def coarser(self) -> int:
        """Voxels of the finest level along a side of one of the coarsest."""
        return 2 ** len(self.down_block_type)


class Conv(Kernel):
    """A submanifold convolution, `weight` [B, 3, 3, 3, A] and `bias` [B]."""

    def forward(self, x: SparseBatch) -> SparseBatch:
        return submanifold_conv(x, self.weight, self.bias)


class ConvBlock(nn.Module):
    """x + mlp(norm(conv(x)))."""

    def __init__(self, channels: int, mlp_ratio: float = 4.0, use_checkpoint: bool = False):
        super().__init__()
        hidden = int(channels * mlp_ratio)
        self.norm = LayerNorm32(channels, affine=True)
        self.conv = Conv(channels, channels)
        self.mlp = nn.Sequential(nn.Linear(channels, hidden), nn.SiLU(), nn.Linear(hidden, channels))

    def forward(self, x: SparseBatch) -> SparseBatch:
        return x.with_feats(x.feats + self.mlp(self.norm(self.conv(x).feats)))


class SplitBlock(nn.Module):
    """y = split(x), h = split(conv1(silu(norm1(x)))), result: repeat(y) + conv2(silu(norm2(h)))."""

    def __init__(self, channels: int, out_channels: int, pred_subdiv: bool):
        super().__init__()
        self.norm1 = LayerNorm32(channels, affine=True)
        self.norm2 = LayerNorm32(out_channels)
        self.conv1 = Conv(channels, 8 * out_channels)
        self.conv2 = Conv(out_channels, out_channels)
        if pred_subdiv:
            self.to_subdiv = nn.Linear(channels, 8)
        self.repeats = out_channels // (channels // 8)

    def subdivision(self, x: SparseBatch) -> torch.Tensor:
        """Logits of the children, [V, 8]: those above 0 are there, and a voxel without any vanishes."""
        return self.to_subdiv(x.feats.to(self.to_subdiv.weight.dtype))

    def forward(self, x: SparseBatch, there: torch.Tensor) -> SparseBatch:
        h = self.conv1(x.with_feats(F.silu(self.norm1(x.feats))))
        y = split(x, there)
        h = split(h, there)
        h = self.conv2(y.with_feats(F.silu(self.norm2(h.feats))))
        return y.with_feats(h.feats + y.feats.repeat_interleave(self.repeats, 1))


class MergeBlock(nn.Module):
    """y = means of merge(x), h = merge(conv1(silu(norm1(x)))), result: y + conv2(silu(norm2(h)))."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.norm1 = LayerNorm32(channels, affine=True)
        self.norm2 = LayerNorm32(out_channels)
        self.conv1 = Conv(channels, out_channels // 8)
        self.conv2 = Conv(out_channels, out_channels)

    def forward(self, x: SparseBatch) -> SparseBatch:
        h = merge(self.conv1(x.with_feats(F.silu(self.norm1(x.feats)))))
        y = merge(x).feats.unflatten(1, (h.feats.shape[1], -1)).mean(2)
        return h.with_feats(y + self.conv2(h.with_feats(F.silu(self.norm2(h.feats)))).feats)


def split(x: SparseBatch, there: torch.Tensor) -> SparseBatch:
    """Features [V, 8 C] on voxels -> [W, C] on their children; a voxel's channels are those of child 0, then
    of child 1, ...

    Args: there: [V, 8] bool. Differentiable in: feats. Raises: ValueError where no child is left.
    """
    check_shape("split.there", there, [len(x.feats), 8], "Give the children of these voxels.")
    voxel, child = there.nonzero().unbind(1)  # [W]: children stay in the order of their voxels
    if not len(voxel):
        raise ValueError(
            f"decode: expected voxels with children, got {len(x.feats)} without any. Use other latents or"
            " weights."
        )
    bits = torch.stack([child & 1, child >> 1 & 1, child >> 2 & 1], 1)  # [W, 3]
    coords = x.coords[voxel].clone()
    coords[:, 1:] = 2 * coords[:, 1:] + bits.int()
    return SparseBatch(coords.contiguous(), x.feats.unflatten(1, (8, -1))[voxel, child], x.size)


def merge(x: SparseBatch) -> SparseBatch:
    """Inverse of split: features [W, C] -> [V, 8 C] on the voxels that they lie in, sorted; zeros of children
    that are absent.
    """
    to = coarser(x)
    bits = x.coords[:, 1:].long() & 1
    merged = x.feats.new_zeros(len(to.coords), 8, x.feats.shape[1])
    merged = merged.index_put((to.row, bits[:, 0] + 2 * bits[:, 1] + 4 * bits[:, 2]), x.feats)
    return SparseBatch(to.coords, merged.flatten(1), x.size, to.cache)


class VoxelNetwork(nn.Module):
    """What both halves have in common."""

    def __init__(self, config: VoxelConfig, step: Callable[[int, int], nn.Module]):
        super().__init__()
        channels = config.model_channels
        args = config.block_args or ({},) * len(config.model_channels)
        self.blocks = nn.ModuleList()
        for i, (width, count) in enumerate(zip(channels, config.num_blocks, strict=True)):
            level = [ConvBlock(width, **args[i]) for _ in range(count)]
            self.blocks.append(
                nn.ModuleList([*level, *(step(width, after) for after in channels[i + 1 : i + 2])])
            )
        if config.use_fp16:
            convert_torso([self.blocks], torch.float16, (nn.Linear, Kernel))

    def first(self, x: SparseBatch, layer: nn.Linear) -> SparseBatch:
        """Through a layer of full precision, and then of the blocks' type."""
        dtype = next((p.dtype for p in self.blocks.parameters() if p.ndim > 1), torch.float32)
        check_shape(
            f"{type(self).__name__}.x",
            x.feats,
            ["V", layer.in_features],
            "Give features of this model's size.",
        )
        return x.with_feats(layer(x.feats.float()).to(dtype))

    def last(self, x: SparseBatch, layer: nn.Linear) -> SparseBatch:
        """Normalised, and through a layer of full precision."""
        return x.with_feats(layer(F.layer_norm(x.feats.float(), x.feats.shape[-1:])))


class VoxelDecoder(VoxelNetwork):
    """Latents on voxels -> features on the finest ones."""

    def __init__(self, config: VoxelDecoderConfig):
        super().__init__(config, lambda before, after: SplitBlock(before, after, config.pred_subdiv))
        self.config = config
        self.from_latent = nn.Linear(config.latent_channels, config.model_channels[0])
        self.output_layer = nn.Linear(config.model_channels[-1], config.out_channels)

    def forward(
        self, x: SparseBatch, told: Sequence[torch.Tensor] | None = None, levels: int | None = None
    ) -> tuple[SparseBatch, list[torch.Tensor]]:
        """Latents [V, C] -> features on the finest voxels, and the children of every split as logits, [V, 8]
        each.

        Args: told: these, for a decoder that does not say; levels: stop behind so many splits, before the
            output layer.
        """
        config = self.config
        if not config.pred_subdiv and (told is None or len(told) != len(config.up_block_type)):
            got = "None" if told is None else len(told)
            raise ValueError(
                f"VoxelDecoder: expected the children of {len(config.up_block_type)} splits, got {got}. Give"
                " the shape's."
            )
        h = self.first(x, self.from_latent)
        logits = list[torch.Tensor]()
        for level in self.blocks:
            if len(logits) == levels:
                return h, logits
            for block in level:  # type: ignore[attr-defined]
                if isinstance(block, SplitBlock):
                    logits.append(block.subdivision(h) if told is None else told[len(logits)])
                    h = block(h, logits[-1] > 0)
                else:
                    h = block(h)
        return self.last(h, self.output_layer), logits


class VoxelEncoder(VoxelNetwork):
    """Features on fine voxels -> mean and log-variance of the latent on coarse ones, [V, C] each."""

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
    """An object as TRELLIS.2 decodes it: a vertex per voxel, faces where edges are crossed, a material per
    voxel.
    """

    coords: torch.Tensor  # [W, 3] int32
    resolution: int  # of their grid
    vertices: torch.Tensor  # [W, 3] places in the voxel: 0..1 inside, the margin beyond
    # [W, 3] bool: whether the surface crosses the voxel's edge along each axis, at its far corner
    crossed: torch.Tensor
    split: torch.Tensor  # [W] > 0: by which a face is cut into triangles
    # [W, 6] base colour, metallic, roughness, alpha of 0..1; to be clipped
    materials: torch.Tensor | None = None

    @property
    def means(self) -> torch.Tensor:
        """[W, 3], the vertices in the cube of +-0.5."""
        return (self.coords + self.vertices) / self.resolution - 0.5

    @property
    def colours(self) -> torch.Tensor:
        """[W, 3] of 0..1; grey where there are no materials."""
        return (
            torch.full_like(self.vertices, 0.5)
            if self.materials is None
            else self.materials[:, :3].clamp(0, 1)
        )

    @property
    def opacities(self) -> torch.Tensor:
        """[W] of 0..1."""
        return torch.ones_like(self.split) if self.materials is None else self.materials[:, 5].clamp(0, 1)

    def to(self, device: str | torch.device) -> "VoxelAsset":
        """On another device."""
        moved: dict[str, Any] = {
            name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in vars(self).items()
        }
        return VoxelAsset(**moved)


def assets_of(
    shape: SparseBatch, materials: SparseBatch | None, resolution: int, margin: float
) -> list[VoxelAsset]:
    """Assets of decoded features, shape [W, 7] and materials [W, 6] on the same voxels."""
    colours = [None] * shape.size if materials is None else [s.feats for s in materials.samples()]
    assets = []
    for sample, colour in zip(shape.samples(), colours, strict=True):
        place, crossed, cut = sample.feats.split([3, 3, 1], 1)
        assets.append(
            VoxelAsset(
                coords=sample.coords,
                resolution=resolution,
                vertices=(1 + 2 * margin) * place.sigmoid() - margin,
                crossed=crossed > 0,
                split=F.softplus(cut[:, 0]),
                materials=None if colour is None else 0.5 + 0.5 * colour,
            )
        )
    return assets
