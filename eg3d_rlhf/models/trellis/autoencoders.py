"""TRELLIS's autoencoders: of occupancy grids, 64^3 voxels <-> 16^3 points with 8 channels; and of objects,
image features on voxels to latents on the same, and latents to a few Gaussians per voxel.

Shape letters: N samples, C channels, R voxels per axis, r points per axis of a latent, c its channels; V
voxels, F features of the image network, K Gaussians per voxel, M Gaussians of an object.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from eg3d_rlhf.core.shapes import check_shape
from eg3d_rlhf.models.sparse import SparseBatch
from eg3d_rlhf.models.trellis import blocks
from eg3d_rlhf.models.trellis.blocks import convert_torso, torso_dtype
from training.config import check_choice


@dataclass(frozen=True, kw_only=True)
class StructureVAEConfig:
    """What the JSON files of both halves call args; an encoder has in_channels, a decoder out_channels."""

    latent_channels: int
    num_res_blocks: int
    channels: tuple[int, ...]  # per level, in the order of computation
    in_channels: int | None = None
    out_channels: int | None = None
    num_res_blocks_middle: int = 2
    # over the channels of a point, or "group": over 32 groups of channels and all points
    norm_type: str = "layer"
    use_fp16: bool = False  # type of the inner convolutions as built; files bring their own

    def __post_init__(self):
        object.__setattr__(self, "channels", tuple(self.channels))
        if self.norm_type not in NORMS:
            got = self.norm_type
            raise ValueError(
                f"StructureVAEConfig: expected norm_type {' or '.join(NORMS)}, got {got!r}. Correct the JSON"
                " file."
            )
        if self.norm_type == "group" and any(channels % GROUPS for channels in self.channels):
            raise ValueError(
                f"StructureVAEConfig: expected channels in multiples of {GROUPS} with norm_type 'group', got"
                f" {list(self.channels)}. Correct the JSON file."
            )
        if not self.channels or (self.in_channels is None) == (self.out_channels is None):
            raise ValueError(
                "StructureVAEConfig: expected channels, and in_channels or out_channels, got others. Correct"
                " the JSON file."
            )


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of a volume, in float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [N, C, R, R, R]
        return super().forward(x.movedim(1, -1).float()).movedim(-1, 1).to(x.dtype)


class GroupNorm(nn.GroupNorm):
    """Over 32 groups of channels with all their points, in float32."""

    def __init__(self, channels: int):
        super().__init__(GROUPS, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [N, C, R, R, R]
        return super().forward(x.float()).to(x.dtype)


GROUPS = 32
NORMS: dict[str, Callable[[int], nn.Module]] = {"layer": ChannelNorm, "group": GroupNorm}


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))))))."""

    def __init__(self, channels: int, norm_type: str):
        super().__init__()
        self.norm1, self.norm2 = (NORMS[norm_type](channels) for _ in range(2))
        self.conv1, self.conv2 = (nn.Conv3d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


def down(before: int, after: int) -> nn.Module:
    """Half the points per axis, by a convolution of 2^3."""
    return nn.Sequential(OrderedDict(conv=nn.Conv3d(before, after, 2, stride=2)))


class Up(nn.Module):
    """Twice the points per axis: 8 channels of a convolution of 3^3 become 2^3 points."""

    def __init__(self, before: int, after: int):
        super().__init__()
        self.conv = nn.Conv3d(before, 8 * after, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x).unflatten(1, (-1, 2, 2, 2))  # [N, C, 2, 2, 2, R, R, R]
        return x.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6).flatten(4, 5).flatten(2, 3)


def _levels(config: StructureVAEConfig, change: Callable[[int, int], nn.Module]) -> nn.ModuleList:
    blocks: list[nn.Module] = []
    for i, channels in enumerate(config.channels):
        blocks += [ResBlock(channels, config.norm_type) for _ in range(config.num_res_blocks)]
        if i + 1 < len(config.channels):
            blocks.append(change(channels, config.channels[i + 1]))
    return nn.ModuleList(blocks)


class StructureEncoder(nn.Module):
    """Occupancy [N, 1, R, R, R] of 0 and 1 -> mean and log-variance of the latent, each [N, c, r, r, r]."""

    def __init__(self, config: StructureVAEConfig):
        super().__init__()
        self.config = config
        first = config.channels[0]
        last = config.channels[-1]
        self.input_layer = nn.Conv3d(config.in_channels or 1, first, 3, padding=1)
        self.blocks = _levels(config, down)
        self.middle_block = nn.Sequential(
            *[ResBlock(last, config.norm_type) for _ in range(config.num_res_blocks_middle)]
        )
        self.out_layer = nn.Sequential(
            NORMS[config.norm_type](last),
            nn.SiLU(),
            nn.Conv3d(last, 2 * config.latent_channels, 3, padding=1),
        )
        if config.use_fp16:
            convert_torso([self.blocks, self.middle_block], torch.float16)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        check_shape(
            "StructureEncoder.x",
            x,
            ["N", self.config.in_channels or 1, "R", "R", "R"],
            "Give occupancy grids.",
        )
        h = self.input_layer(x).to(torso_dtype(self.blocks))
        for block in self.blocks:
            h = block(h)
        mean, logvar = self.out_layer(self.middle_block(h).to(x.dtype)).chunk(2, 1)
        return mean, logvar


class StructureDecoder(nn.Module):
    """Latents [N, c, r, r, r] -> logits of occupancy [N, 1, R, R, R]; a voxel is there where its logit is
    positive.
    """

    def __init__(self, config: StructureVAEConfig):
        super().__init__()
        self.config = config
        first = config.channels[0]
        last = config.channels[-1]
        self.input_layer = nn.Conv3d(config.latent_channels, first, 3, padding=1)
        self.middle_block = nn.Sequential(
            *[ResBlock(first, config.norm_type) for _ in range(config.num_res_blocks_middle)]
        )
        self.blocks = _levels(config, Up)
        self.out_layer = nn.Sequential(
            NORMS[config.norm_type](last), nn.SiLU(), nn.Conv3d(last, config.out_channels or 1, 3, padding=1)
        )
        if config.use_fp16:
            convert_torso([self.blocks, self.middle_block], torch.float16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        check_shape(
            "StructureDecoder.x",
            x,
            ["N", self.config.latent_channels, "r", "r", "r"],
            "Give latents of the first stage.",
        )
        h = self.middle_block(self.input_layer(x).to(torso_dtype(self.blocks)))
        for block in self.blocks:
            h = block(h)
        return self.out_layer(h.to(x.dtype))


def voxels_of(logits: torch.Tensor) -> list[torch.Tensor]:
    """The voxels of each sample, [v, 3] int32, where logits [N, 1, R, R, R] are positive.
    Not differentiable.
    """
    return [(sample[0] > 0).nonzero().int().contiguous() for sample in logits]


def grid_of(voxels: list[torch.Tensor], resolution: int) -> torch.Tensor:
    """Occupancy [N, 1, R, R, R] of 0 and 1 from the voxels of each sample; inverse of `voxels_of`."""
    grid = torch.zeros(len(voxels), 1, *[resolution] * 3)
    for sample, places in zip(grid, voxels, strict=True):
        x, y, z = places.cpu().long().unbind(1)
        sample[0, x, y, z] = 1
    return grid


# Objects: both halves are transformers with attention in windows, which every other block shifts: by half a
# window ("swin" and "shift_sequence", the latter along the Z-order curve), or by CURVE_SHIFT voxels per axis,
# which moves the curve itself ("shift_window").


ATTENTION = ("swin", "full", "shift_window", "shift_sequence")
CURVE_SHIFT = 16


@dataclass(frozen=True, kw_only=True)
class SwinConfig(blocks.TransformerConfig):
    """What encoder and decoder have in common of what their JSON files call args."""

    latent_channels: int
    # in windows; "full": among all voxels of a sample; "shift_...": along a curve through them
    attn_mode: str = "swin"
    window_size: int = 8  # voxels per axis, or along the curve

    def __post_init__(self):
        super().__post_init__()
        if self.attn_mode not in ATTENTION or self.window_size < 2:
            got = f"{self.attn_mode!r} and {self.window_size}"
            who = type(self).__name__
            raise ValueError(
                f"{who}: expected attn_mode {', '.join(ATTENTION)} and window_size >= 2, got {got}. Correct"
                " the JSON file; the Hilbert curve of shift_order is in no released model."
            )


class SwinBlock(nn.Module):
    """Self-attention and feed-forward."""

    def __init__(self, channels: int, heads: int, mlp_ratio: float, qk_rms_norm: bool):
        super().__init__()
        self.norm1 = blocks.LayerNorm32(channels)
        self.norm2 = blocks.LayerNorm32(channels)
        self.attn = blocks.SelfAttention(channels, heads, qk_rms_norm)
        self.mlp = blocks.FeedForward(channels, mlp_ratio)

    def forward(self, x: torch.Tensor, layout: blocks.Layout) -> torch.Tensor:
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
            SwinBlock(config.model_channels, config.heads, config.mlp_ratio, config.qk_rms_norm)
            for _ in range(config.num_blocks)
        )
        self.out_layer = nn.Linear(config.model_channels, out_channels)
        if config.use_fp16:
            blocks.convert_torso(self.blocks, torch.float16)

    def transform(self, x: SparseBatch) -> SparseBatch:
        """Input layer, positions, blocks, norm, output layer. Differentiable in: feats and parameters."""
        who = type(self).__name__
        config = self.config
        check_shape(
            f"{who}.feats",
            x.feats,
            ["V", self.input_layer.in_features],
            "Give features of the kind that it was trained on.",
        )
        h = self.input_layer(x.feats.float()) + blocks.position_embedding(
            x.coords[:, 1:], config.model_channels
        )
        h = h.to(blocks.torso_dtype(self.blocks))
        layouts = [blocks.SparseLayout(x, self._groups(x, odd)) for odd in range(2)]
        for i, block in enumerate(self.blocks):
            h = blocks.run_block(block, h, layouts[i % 2], recompute=self.recompute)
        h = F.layer_norm(h.float(), h.shape[-1:])
        return x.with_feats(self.out_layer(h.to(self.out_layer.weight.dtype)))

    def _groups(self, x: SparseBatch, odd: int) -> blocks.Groups:
        """Voxels that attend to each other in even blocks (0) or odd ones (1)."""
        mode = self.config.attn_mode
        window = self.config.window_size
        if mode == "full":
            return blocks.samples(x)
        if mode == "swin":
            return blocks.windows(x, window, odd * (window // 2))
        if mode == "shift_window":
            return blocks.curve_windows(x, window, shift=odd * CURVE_SHIFT)
        return blocks.curve_windows(x, window, start=odd * (window // 2))


@dataclass(frozen=True, kw_only=True)
class LatentEncoderConfig(SwinConfig):
    """What its JSON file calls args."""

    in_channels: int  # F; 1024 of DINOv2


class LatentEncoder(SwinTransformer):
    """Mean image features of every voxel [V, F] -> a normal distribution of latents [V, C]."""

    def __init__(self, config: LatentEncoderConfig):
        super().__init__(config, config.in_channels, 2 * config.latent_channels)

    def forward(self, x: SparseBatch) -> tuple[SparseBatch, SparseBatch]:
        """Mean and logarithm of the variance. Differentiable in: feats and parameters."""
        mean, logvar = self.transform(x).feats.chunk(2, -1)
        return x.with_feats(mean), x.with_feats(logvar)


# numbers per Gaussian, in the order of the output
LAYOUT = {"_xyz": 3, "_features_dc": 3, "_scaling": 3, "_rotation": 4, "_opacity": 1}
SIZE = sum(LAYOUT.values())
ACTIVATIONS = ("exp", "softplus")


@dataclass(frozen=True, kw_only=True)
class GaussianSettings:
    """How numbers become Gaussians; `representation_config` of the JSON file."""

    lr: Mapping[str, float]  # factor per attribute, by its name in LAYOUT
    perturb_offset: bool  # spread the Gaussians of a voxel over it
    voxel_size: float  # reach of an offset, in voxels
    num_gaussians: int  # K
    filter_2d: float  # blur in the image plane that the renderer should use, pixels
    filter_3d: float  # least standard deviation, in edges of the cube
    scaling_bias: float  # standard deviation that a raw scale of zero means
    opacity_bias: float  # opacity that a raw opacity of zero means
    scaling_activation: str

    def __post_init__(self):
        who = "GaussianSettings"
        advice = "Correct representation_config in the model's JSON file."
        if set(self.lr) != set(LAYOUT):
            raise ValueError(
                f"{who}: expected lr for {', '.join(LAYOUT)}, got {', '.join(self.lr) or 'none'}. {advice}"
            )
        check_choice(f"{who}.scaling_activation", self.scaling_activation, ACTIVATIONS)
        if (
            self.num_gaussians < 1
            or not 0 < self.opacity_bias < 1
            or self.scaling_bias <= 0
            or self.voxel_size <= 0
        ):
            raise ValueError(
                f"{who}: expected num_gaussians >= 1, 0 < opacity_bias < 1, scaling_bias > 0 and voxel_size >"
                f" 0, got {self}. {advice}"
            )


@dataclass(frozen=True, kw_only=True)
class GaussianDecoderConfig(SwinConfig):
    """What its JSON file calls args."""

    representation_config: Mapping

    @property
    def gaussians(self) -> GaussianSettings:
        values = self.representation_config
        renamed = {"2d_filter_kernel_size": "filter_2d", "3d_filter_kernel_size": "filter_3d"}
        try:
            return GaussianSettings(**{renamed.get(name, name): value for name, value in values.items()})
        except TypeError as error:
            raise ValueError(
                f"GaussianSettings: expected the names of representation_config, got {sorted(values)}:"
                f" {error}."
            ) from error


@dataclass(frozen=True, kw_only=True)
class Gaussians:
    """One object. The tensors are raw, as decoded; the properties are what a renderer draws. Differentiable
    in: the tensors.
    """

    xyz: torch.Tensor  # [M, 3] in the cube 0..1
    features_dc: torch.Tensor  # [M, 1, 3] constant spherical-harmonic coefficients
    scaling: torch.Tensor  # [M, 3]
    rotation: torch.Tensor  # [M, 4]
    opacity: torch.Tensor  # [M, 1]
    settings: GaussianSettings

    @property
    def means(self) -> torch.Tensor:
        """[M, 3] centres in the cube -0.5..0.5."""
        return self.xyz - 0.5

    @property
    def scales(self) -> torch.Tensor:
        """[M, 3] standard deviations along the axes, in edges of the cube, > 0."""
        bias = self.settings.scaling_bias
        if self.settings.scaling_activation == "exp":
            scales = (self.scaling + math.log(bias)).exp()
        else:
            # softplus^-1(b) = b + log(1 - exp(-b))
            scales = F.softplus(self.scaling + bias + math.log(-math.expm1(-bias)))
        return (scales.square() + self.settings.filter_3d**2).sqrt()

    @property
    def rotations(self) -> torch.Tensor:
        """[M, 4] unit quaternions, real part first; raw zeros mean no rotation."""
        return F.normalize(self.rotation + self.rotation.new_tensor([1, 0, 0, 0]), dim=-1)

    @property
    def opacities(self) -> torch.Tensor:
        """[M, 1] in 0..1."""
        bias = self.settings.opacity_bias
        return torch.sigmoid(self.opacity + math.log(bias / (1 - bias)))


class GaussianDecoder(SwinTransformer):
    """Latents [V, C], not normalised, -> the Gaussians of every sample. Differentiable in: feats and
    parameters.
    """

    def __init__(self, config: GaussianDecoderConfig):
        settings = config.gaussians
        super().__init__(config, config.latent_channels, settings.num_gaussians * SIZE)
        self.settings = settings
        self.register_buffer("offset_perturbation", perturbation(settings))

    def forward(self, x: SparseBatch) -> list[Gaussians]:
        """xyz = voxel's centre + tanh(offset + perturbation) voxel_size / (2 resolution)."""
        s = self.settings
        count = self.settings.num_gaussians
        objects = []
        for sample in self.transform(x).samples():
            parts = sample.feats.split([count * size for size in LAYOUT.values()], 1)
            # [V, K, size]
            raw = {
                name: part.unflatten(1, (count, -1)) * s.lr[name]
                for name, part in zip(LAYOUT, parts, strict=True)
            }
            offset = raw["_xyz"] + self.offset_perturbation if s.perturb_offset else raw["_xyz"]
            reach = 0.5 * s.voxel_size / self.config.resolution
            centre = (sample.coords + 0.5) / self.config.resolution  # [V, 3]
            flat = {name: part.flatten(0, 1) for name, part in raw.items()}
            objects.append(
                Gaussians(
                    xyz=(centre[:, None] + offset.tanh() * reach).flatten(0, 1),
                    features_dc=flat["_features_dc"][:, None],
                    scaling=flat["_scaling"],
                    rotation=flat["_rotation"],
                    opacity=flat["_opacity"],
                    settings=s,
                )
            )
        return objects


def perturbation(settings: GaussianSettings) -> torch.Tensor:
    """Offsets [K, 3] that put the Gaussians of a voxel on a Hammersley set over it:
    atanh((2 point - 1) / voxel_size).

    Raises: ValueError where voxel_size is at most 1, which leaves no offset for the set's first point.
    """
    count = settings.num_gaussians
    points = torch.tensor([[i / count, _radical_inverse(2, i), _radical_inverse(3, i)] for i in range(count)])
    if settings.perturb_offset and settings.voxel_size <= 1:
        got = settings.voxel_size
        raise ValueError(
            f"GaussianSettings: expected voxel_size > 1 with perturb_offset, got {got}. Correct the JSON"
            " file."
        )
    return ((2 * points - 1) / settings.voxel_size).atanh()


def _radical_inverse(base: int, n: int) -> float:
    """n's digits in a base, mirrored at the point: 6 = 110 in base 2 -> 0.011 = 3/8."""
    value = 0.0
    place = 1.0
    while n:
        place /= base
        value += place * (n % base)
        n //= base
    return value
