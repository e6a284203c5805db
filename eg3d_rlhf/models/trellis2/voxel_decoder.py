"""TRELLIS.2's decoders: latents on coarse voxels -> features on fine ones, in steps that split a voxel into those of its eight children
that are there. Which are there the shape's decoder says itself; the one of materials is told.

A block is a submanifold convolution, a norm and a feed-forward beside a skip (as ConvNeXt); a split moves channels into space, in the
branch and in the skip, whose channels are repeated to the new number (Xiang et al. 2025, sparse compression autoencoder).

Shape letters: V voxels, W voxels after a split, C channels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from eg3d_rlhf.core.shapes import check_shape
from eg3d_rlhf.models.sparse import SparseBatch
from eg3d_rlhf.models.trellis.blocks import LayerNorm32, convert_torso
from eg3d_rlhf.models.trellis.sparse_conv import Kernel, submanifold_conv

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
    found = []
    for sample, colour in zip(shape.samples(), colours, strict=True):
        place, crossed, cut = sample.feats.split([3, 3, 1], 1)
        found.append(VoxelAsset(
            coords=sample.coords, resolution=resolution, vertices=(1 + 2 * margin) * place.sigmoid() - margin, crossed=crossed > 0,
            split=F.softplus(cut[:, 0]), materials=None if colour is None else (0.5 + 0.5 * colour).clamp(0, 1),
        ))
    return found
