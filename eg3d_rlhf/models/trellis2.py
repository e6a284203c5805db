"""TRELLIS.2's networks: its flows, over the cells of a grid and over the voxels of an object, and its decoders of voxels.

Against TRELLIS: the flows have no convolutions or patches; positions are rotary; one modulation of the time is shared by all blocks, each
of which adds a vector of its own to it; queries and keys are normalised in both attentions; a stage may read features on its voxels beside
the latent ("concat_cond"), which makes the input layer wider and nothing else.

Shape letters as in trellis/blocks.py; R grid points per axis, T = R^3, K channels of the features beside the latent, P = D / 2 planes of a
head, V voxels, W voxels after a split.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from eg3d_rlhf.core.shapes import check_shape
from eg3d_rlhf.models.sparse import SparseBatch
from eg3d_rlhf.models.trellis import blocks
from eg3d_rlhf.models.trellis.blocks import LayerNorm32, Layout, convert_torso
from eg3d_rlhf.models.trellis.sparse_conv import Kernel, submanifold_conv

# Rotary positions in three dimensions: attention that knows of two tokens only how far apart they are.
#
# A head's D channels are D / 2 planes. For each axis n = D // 6 planes turn by coordinate * rate_i, rate_i = f_0 / f_1^(i / n); planes left
# over do not turn. The product of a turned query and a turned key depends on the difference of their angles alone, hence on that of their
# coordinates (Su et al. 2021, here per axis).


def angles_of(coords: torch.Tensor, head_channels: int, freq: tuple[float, float] = (1.0, 10000.0)) -> torch.Tensor:
    """Angles of coordinates [V, 3] -> [V, P] float32: the planes of axis 1, of axis 2, of axis 3, then zeros."""
    count = head_channels // 6
    rates = freq[0] / freq[1] ** (torch.arange(count, dtype=torch.float32, device=coords.device) / count)
    turned = (coords.float()[:, :, None] * rates).flatten(1)  # [V, 3 count]
    return torch.nn.functional.pad(turned, (0, head_channels // 2 - turned.shape[1]))


def rotate(x: torch.Tensor, angles: torch.Tensor, adjacent: bool = True) -> torch.Tensor:
    """Turn heads [..., V, H, D] by angles [V, P]; norms stay. Computed in float32. Differentiable in: x.

    Args: adjacent: a plane is channels 2 i and 2 i + 1; otherwise i and i + P.
    """
    axis = -1 if adjacent else -2
    a, b = x.float().unflatten(-1, (-1, 2) if adjacent else (2, -1)).unbind(axis)  # [..., V, H, P]
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]  # [V, 1, P]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], axis).flatten(-2).to(x.dtype)


@dataclass(frozen=True)
class RotaryLayout:
    """A `Layout` whose tokens have places: self-attention turns queries and keys, attention to a condition does not."""

    inner: Layout
    angles: torch.Tensor  # [V, P], or [T, P] of the tokens that all samples have
    adjacent: bool = True

    def per_token(self, values: torch.Tensor) -> torch.Tensor:
        return self.inner.per_token(values)

    def self_attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.inner.self_attention(rotate(q, self.angles, self.adjacent), rotate(k, self.angles, self.adjacent), v)

    def cross_attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.inner.cross_attention(q, k, v)


DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """What a flow's JSON file calls args."""

    resolution: int
    in_channels: int  # of the latent and of what is read beside it
    model_channels: int
    cond_channels: int
    out_channels: int
    num_blocks: int
    num_heads: int | None = None  # or model_channels / num_head_channels
    num_head_channels: int = 64
    mlp_ratio: float = 4
    pe_mode: str = "rope"
    rope_freq: tuple[float, float] = (1.0, 10000.0)  # f_0 and f_1 of rotary.py
    dtype: str = "float32"  # of the blocks as built; files bring their own
    use_checkpoint: bool = False  # compute blocks again in the backward pass
    share_mod: bool = False
    initialization: str = "vanilla"  # of weights that training starts from: no concern of trained ones
    qk_rms_norm: bool = False
    qk_rms_norm_cross: bool = False
    rope_adjacent: bool = True  # in no file that is known here: see rotary.rotate

    def __post_init__(self):
        object.__setattr__(self, "rope_freq", tuple(self.rope_freq))
        who = type(self).__name__
        if self.pe_mode != "rope" or self.dtype not in DTYPES:
            got = f"{self.pe_mode!r} and {self.dtype!r}"
            raise ValueError(f"{who}: expected pe_mode 'rope' and dtype {', '.join(DTYPES)}, got {got}. Others are in no released model.")
        if self.model_channels % self.heads or self.given < 0:
            got = f"{self.model_channels} / {self.heads}, {self.in_channels} and {self.out_channels}"
            expected = "model_channels to divide by heads and in_channels >= out_channels"
            raise ValueError(f"{who}: expected {expected}, got {got}. Correct the model's JSON file.")
        if self.head_channels % 2 or self.head_channels < 6 or len(self.rope_freq) != 2:
            got = f"{self.head_channels} channels and {self.rope_freq}"
            raise ValueError(f"{who}: expected heads of an even number of channels, 6 or more, and two rope_freq, got {got}. Correct it.")

    @property
    def heads(self) -> int:
        """Of every attention."""
        return self.num_heads or self.model_channels // self.num_head_channels

    @property
    def head_channels(self) -> int:
        """D."""
        return self.model_channels // self.heads

    @property
    def given(self) -> int:
        """K."""
        return self.in_channels - self.out_channels

    def angles(self, coords: torch.Tensor) -> torch.Tensor:
        """By which tokens at coordinates [V, 3] turn the planes of a head, [V, P]."""
        return angles_of(coords, self.head_channels, self.rope_freq)


class Block(blocks.ModulatedBlock):
    """TRELLIS's block with a vector of its own, `modulation` [6 C], on top of the modulation that all blocks share."""

    def __init__(self, channels: int, *args, **kwargs):
        super().__init__(channels, *args, share_mod=True, **kwargs)
        self.modulation = nn.Parameter(torch.randn(6 * channels) / channels**0.5)

    def forward(self, x: torch.Tensor, time: torch.Tensor, cond: torch.Tensor, layout: blocks.Layout) -> torch.Tensor:
        return super().forward(x, (time + self.modulation).to(time.dtype), cond, layout)


class Flow(nn.Module):
    """What both flows have in common: layers, their names, and the way of tokens through them."""

    def __init__(self, config: FlowConfig):
        super().__init__()
        self.config = config
        self.recompute = config.use_checkpoint
        channels, kind = config.model_channels, Block if config.share_mod else blocks.ModulatedBlock
        self.t_embedder = blocks.TimeEmbedder(channels)
        if config.share_mod:
            self.adaLN_modulation = blocks.modulation(channels)
        self.input_layer = nn.Linear(config.in_channels, channels)
        self.blocks = nn.ModuleList(
            kind(channels, config.cond_channels, config.heads, config.mlp_ratio, qk_rms_norm=config.qk_rms_norm,
                 qk_rms_norm_cross=config.qk_rms_norm_cross)
            for _ in range(config.num_blocks)
        )
        self.out_layer = nn.Linear(channels, config.out_channels)
        blocks.convert_torso(self.blocks, getattr(torch, config.dtype))

    def transform(
        self, x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor, coords: torch.Tensor, layout: blocks.Layout
    ) -> torch.Tensor:
        """Tokens [..., in_channels] at coordinates [V, 3] (or [T, 3]), t [N], cond [N, L, E] -> [..., out_channels], in x's type."""
        config, dtype = self.config, blocks.torso_dtype(self.blocks)
        time = self.t_embedder(t)
        if config.share_mod:
            time = self.adaLN_modulation(time)
        h = self.input_layer(x.float()).to(dtype)
        time, cond = time.to(dtype), cond.to(dtype)
        layout = RotaryLayout(layout, config.angles(coords), config.rope_adjacent)
        for block in self.blocks:
            h = blocks.run_block(block, h, time, cond, layout, recompute=self.recompute)
        h = F.layer_norm(h.to(x.dtype), h.shape[-1:])
        return self.out_layer(h.to(self.out_layer.weight.dtype)).to(x.dtype)


class StructureFlow(Flow):
    """model(x_t [N, C, R, R, R], t [N] in 0..1, cond [N, L, E]) -> velocity, like x_t. Differentiable in: everything but t."""

    def __init__(self, config: FlowConfig):
        super().__init__(config)
        if config.given:
            got = f"{config.in_channels} and {config.out_channels}"
            raise ValueError(f"StructureFlow: expected in_channels = out_channels, got {got}. Correct the model's JSON file.")

    def places(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Of the tokens, [T, 3]."""
        return torch.cartesian_prod(*[torch.arange(self.config.resolution, device=device)] * 3)

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        config = self.config
        check_shape("StructureFlow.x_t", x_t, ["N", config.in_channels, *[config.resolution] * 3], "Give latents of this model's size.")
        check_shape("StructureFlow.cond", cond, [len(x_t), "L", config.cond_channels], "Use embeddings of the encoder it was trained with.")
        v = self.transform(x_t.flatten(2).transpose(1, 2), t, cond, self.places(x_t.device), blocks.DenseLayout())
        return v.transpose(1, 2).unflatten(2, [config.resolution] * 3)


class VoxelFlow(Flow):
    """model(x_t: SparseBatch, t [N] in 0..1, cond [N, L, E]) -> velocity on the same voxels. Differentiable in: everything but t.

    What is given on the voxels, [V, K], stands beside the latent in the input layer; it is neither noised nor predicted.
    """

    def forward(self, x_t: SparseBatch, t: torch.Tensor, cond: torch.Tensor) -> SparseBatch:
        config = self.config
        check_shape("VoxelFlow.x_t", x_t.feats, ["V", config.out_channels], "Give latents of this model's size.")
        check_shape("VoxelFlow.cond", cond, [x_t.size, "L", config.cond_channels], "Use embeddings of the encoder it was trained with.")
        x, width = x_t.feats, 0 if x_t.given is None else x_t.given.shape[1]
        if width != config.given:
            remedy = "Give the features that the stage before leaves, where the model reads some."
            raise ValueError(f"VoxelFlow.x_t: expected {config.given} given features beside the latent, got {width}. {remedy}")
        if x_t.given is not None:
            x = torch.cat([x, x_t.given.to(x)], 1)
        return x_t.with_feats(self.transform(x, t, cond, x_t.coords[:, 1:], blocks.SparseLayout(x_t)))


# Decoders: latents on coarse voxels -> features on fine ones, in steps that split a voxel into those of its eight children that are there.
# Which are there the shape's decoder says itself; the one of materials is told.
#
# A block is a submanifold convolution, a norm and a feed-forward beside a skip (as ConvNeXt); a split moves channels into space, in the
# branch and in the skip, whose channels are repeated to the new number (Xiang et al. 2025, sparse compression autoencoder).


BLOCK, SPLIT = "SparseConvNeXtBlock3d", "SparseResBlockC2S3d"  # the published names of both kinds, the only ones that are read
SHAPE_CHANNELS = 7  # of the shape's output: 3 place a vertex in its voxel, 3 say which edges are crossed, 1 how a face is split
MATERIAL_CHANNELS = 6  # base colour, metallic, roughness, alpha


@dataclass(frozen=True, kw_only=True)
class VoxelDecoderConfig:
    """What a decoder's JSON file calls args."""

    model_channels: tuple[int, ...]  # per level, coarsest first
    latent_channels: int
    num_blocks: tuple[int, ...]  # per level
    block_type: tuple[str, ...]
    up_block_type: tuple[str, ...]  # between levels
    block_args: tuple[Mapping, ...] = ()
    out_channels: int = SHAPE_CHANNELS  # the shape's file leaves it out
    pred_subdiv: bool = True  # whether it says which children are there
    resolution: int | None = None  # of the finest voxels; the latent's times 2^levels
    voxel_margin: float = 0.5  # by which a vertex may leave its voxel
    use_fp16: bool = False
    first_axis_fastest: bool = True  # in no file that is known here: whether child number 1 lies along the first axis, or the last

    def __post_init__(self):
        for many in ("model_channels", "num_blocks", "block_type", "up_block_type", "block_args"):
            object.__setattr__(self, many, tuple(getattr(self, many)))
        levels = len(self.model_channels)
        if not levels or len(self.num_blocks) != levels or len(self.block_type) != levels or len(self.up_block_type) != levels - 1:
            got = f"{levels}, {len(self.num_blocks)}, {len(self.block_type)} and {len(self.up_block_type)}"
            raise ValueError(
                "VoxelDecoderConfig: expected model_channels, num_blocks and block_type for every level and up_block_type between them, "
                f"got {got}. Correct the model's JSON file."
            )
        foreign = sorted({*self.block_type, *self.up_block_type} - {BLOCK, SPLIT} | ({*self.block_type} & {SPLIT}))
        if foreign:
            raise ValueError(f"VoxelDecoderConfig: expected blocks {BLOCK} and {SPLIT}, got {', '.join(foreign)}. Others are not read.")
        if any(a % 8 or b % (a // 8) for a, b in zip(self.model_channels, self.model_channels[1:], strict=False)):
            got = f"{list(self.model_channels)}"
            raise ValueError(f"VoxelDecoderConfig: expected channels that eight children can share, got {got}. Correct its JSON file.")


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

    def __init__(self, channels: int, out_channels: int, pred_subdiv: bool, first_axis_fastest: bool):
        super().__init__()
        self.norm1, self.norm2 = LayerNorm32(channels, affine=True), LayerNorm32(out_channels)
        self.conv1, self.conv2 = Conv(channels, 8 * out_channels), Conv(out_channels, out_channels)
        if pred_subdiv:
            self.to_subdiv = nn.Linear(channels, 8)
        self.repeats, self.first_axis_fastest = out_channels // (channels // 8), first_axis_fastest

    def subdivision(self, x: SparseBatch) -> torch.Tensor:
        """Which children are there, [V, 8] bool: by its own word, or of a voxel without any the likeliest."""
        logits = self.to_subdiv(x.feats.to(self.to_subdiv.weight.dtype))
        return (logits > 0) | ((logits <= 0).all(1, keepdim=True) & (logits == logits.amax(1, keepdim=True)))

    def forward(self, x: SparseBatch, there: torch.Tensor) -> SparseBatch:
        h = self.conv1(x.with_feats(F.silu(self.norm1(x.feats))))
        y, h = split(x, there, self.first_axis_fastest), split(h, there, self.first_axis_fastest)
        h = self.conv2(y.with_feats(F.silu(self.norm2(h.feats))))
        return y.with_feats(h.feats + y.feats.repeat_interleave(self.repeats, 1))


def split(x: SparseBatch, there: torch.Tensor, first_axis_fastest: bool = True) -> SparseBatch:
    """Features [V, 8 C] on voxels -> [W, C] on their children; a voxel's channels are those of child 0, then of child 1, ...

    Args: there: [V, 8] bool. Differentiable in: feats.
    """
    check_shape("split.there", there, [len(x.feats), 8], "Give the children of these voxels.")
    voxel, child = there.nonzero().unbind(1)  # [W]: children stay in the order of their voxels
    bits = torch.stack([child & 1, child >> 1 & 1, child >> 2 & 1], 1)  # [W, 3]
    coords = x.coords[voxel].clone()
    coords[:, 1:] = 2 * coords[:, 1:] + (bits if first_axis_fastest else bits.flip(1)).int()
    return SparseBatch(coords.contiguous(), x.feats.unflatten(1, (8, -1))[voxel, child], x.size)


class VoxelDecoder(nn.Module):
    """Latents on voxels -> features on the finest ones."""

    def __init__(self, config: VoxelDecoderConfig):
        super().__init__()
        self.config = config
        channels, levels = config.model_channels, len(config.model_channels)
        args = config.block_args or ({},) * levels
        self.from_latent = nn.Linear(config.latent_channels, channels[0])
        self.blocks = nn.ModuleList()
        for i, (width, count) in enumerate(zip(channels, config.num_blocks, strict=True)):
            level = [ConvBlock(width, **args[i]) for _ in range(count)]
            last = [SplitBlock(width, channels[i + 1], config.pred_subdiv, config.first_axis_fastest)] if i + 1 < levels else []
            self.blocks.append(nn.ModuleList([*level, *last]))
        self.output_layer = nn.Linear(channels[-1], config.out_channels)
        if config.use_fp16:
            convert_torso([self.blocks], torch.float16, (nn.Linear, Kernel))

    def forward(
        self, x: SparseBatch, told: Sequence[torch.Tensor] | None = None, levels: int | None = None
    ) -> tuple[SparseBatch, list[torch.Tensor]]:
        """Latents [V, C] -> features on the finest voxels, and which children every split found, [V, 8] each.

        Args: told: which children are there, for a decoder that does not say; levels: stop behind so many splits, before the output layer.
        """
        config = self.config
        check_shape("VoxelDecoder.x", x.feats, ["V", config.latent_channels], "Give latents of this model's size.")
        if not config.pred_subdiv and (told is None or len(told) != len(config.up_block_type)):
            got = "None" if told is None else len(told)
            raise ValueError(f"VoxelDecoder: expected the children of {len(config.up_block_type)} splits, got {got}. Give the shape's.")
        h, found = x.with_feats(self.from_latent(x.feats.float()).to(self._dtype)), list[torch.Tensor]()
        for level in self.blocks:
            if len(found) == levels:
                return h, found
            for block in level:  # type: ignore[attr-defined]
                if isinstance(block, SplitBlock):
                    found.append(block.subdivision(h) if told is None else told[len(found)])
                    h = block(h, found[-1])
                else:
                    h = block(h)
        feats = F.layer_norm(h.feats.float(), h.feats.shape[-1:])
        return h.with_feats(self.output_layer(feats)), found

    @property
    def _dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.blocks.parameters() if p.ndim > 1), torch.float32)


@dataclass(frozen=True, kw_only=True)
class VoxelAsset:
    """An object as TRELLIS.2 decodes it: a vertex per voxel, faces where edges are crossed, a material per voxel."""

    coords: torch.Tensor  # [W, 3] int32
    resolution: int  # of their grid
    vertices: torch.Tensor  # [W, 3] places in the voxel: 0..1 inside, the margin beyond
    crossed: torch.Tensor  # [W, 3] bool: whether the surface crosses the voxel's edge along each axis
    split: torch.Tensor  # [W] > 0: by which a face is cut into triangles
    materials: torch.Tensor | None = field(default=None)  # [W, 6] in 0..1: base colour, metallic, roughness, alpha


def assets_of(shape: SparseBatch, materials: SparseBatch | None, resolution: int, margin: float) -> list[VoxelAsset]:
    """Assets of decoded features, shape [W, 7] and materials [W, 6] on the same voxels."""
    colours = [None] * shape.size if materials is None else [s.feats for s in materials.samples()]
    assets = []
    for sample, colour in zip(shape.samples(), colours, strict=True):
        place, crossed, cut = sample.feats.split([3, 3, 1], 1)
        assets.append(VoxelAsset(
            coords=sample.coords, resolution=resolution, vertices=(1 + 2 * margin) * place.sigmoid() - margin, crossed=crossed > 0,
            split=F.softplus(cut[:, 0]), materials=None if colour is None else (0.5 + 0.5 * colour).clamp(0, 1),
        ))
    return assets
