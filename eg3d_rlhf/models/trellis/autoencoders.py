"""TRELLIS's autoencoders of structures and of objects.

The first encodes occupancy grids of 64^3 voxels to 16^3 points with 8 channels. The second encodes image
features on voxels to latents on the same voxels, and decodes latents to a few Gaussians per voxel.

Shape letters: N samples, C channels, R voxels per axis, r points per axis of a latent, c channels of a
latent; V voxels, F features of the image network, K Gaussians per voxel, M Gaussians of an object.
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
    """Settings of both halves: `args` of their JSON files. An encoder has in_channels, a decoder
    out_channels.
    """

    latent_channels: int  # c
    num_res_blocks: int  # residual blocks per level
    channels: tuple[int, ...]  # channels of each level, in the order of computation
    in_channels: int | None = None
    out_channels: int | None = None
    num_res_blocks_middle: int = 2  # residual blocks at the lowest resolution
    # "layer" normalises over the channels of a point, "group" over 32 groups of channels and all points.
    norm_type: str = "layer"
    use_fp16: bool = False  # half precision for new inner convolutions; loaded files keep their own dtype

    def __post_init__(self):
        # A list from JSON becomes a tuple, so that the frozen object can be hashed.
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
        # One configuration class serves both halves; exactly one of the two numbers says which half it is.
        if not self.channels or (self.in_channels is None) == (self.out_channels is None):
            raise ValueError(
                "StructureVAEConfig: expected channels, and either in_channels or out_channels. Correct the"
                " JSON file."
            )


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of a volume, in float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [N, C, R, R, R]
        # nn.LayerNorm normalises the last axis.
        return super().forward(x.movedim(1, -1).float()).movedim(-1, 1).to(x.dtype)


class GroupNorm(nn.GroupNorm):
    """Group norm over 32 groups of channels with all their points, in float32."""

    def __init__(self, channels: int):
        super().__init__(GROUPS, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [N, C, R, R, R]
        return super().forward(x.float()).to(x.dtype)


GROUPS = 32  # groups of channels of "group" norms
NORMS: dict[str, Callable[[int], nn.Module]] = {"layer": ChannelNorm, "group": GroupNorm}


class ResBlock(nn.Module):
    """Residual block: x + conv(silu(norm(conv(silu(norm(x))))))."""

    def __init__(self, channels: int, norm_type: str):
        super().__init__()
        self.norm1, self.norm2 = (NORMS[norm_type](channels) for _ in range(2))
        self.conv1, self.conv2 = (nn.Conv3d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


def down(before: int, after: int) -> nn.Module:
    """Build a layer that halves the points per axis by a convolution of 2^3."""
    # Wrapped, because the checkpoint calls its parameters conv.weight and conv.bias.
    return nn.Sequential(OrderedDict(conv=nn.Conv3d(before, after, 2, stride=2)))


class Up(nn.Module):
    """Layer that doubles the points per axis: 8 channels of a convolution of 3^3 become 2^3 points (pixel
    shuffle).
    """

    def __init__(self, before: int, after: int):
        super().__init__()
        self.conv = nn.Conv3d(before, 8 * after, 3, padding=1)  # 8 channels per channel of the result

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x).unflatten(1, (-1, 2, 2, 2))  # [N, C, 2, 2, 2, R, R, R]
        # [N, C, R, 2, R, 2, R, 2] -> [N, C, 2 R, 2 R, 2 R]
        return x.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6).flatten(4, 5).flatten(2, 3)


def _levels(config: StructureVAEConfig, change: Callable[[int, int], nn.Module]) -> nn.ModuleList:
    """Build the residual blocks of all levels, with a change of resolution between them."""
    blocks: list[nn.Module] = []
    for i, channels in enumerate(config.channels):
        blocks += [ResBlock(channels, config.norm_type) for _ in range(config.num_res_blocks)]
        # No change of resolution after the last level.
        if i + 1 < len(config.channels):
            blocks.append(change(channels, config.channels[i + 1]))
    return nn.ModuleList(blocks)


class StructureEncoder(nn.Module):
    """Encode occupancy [N, 1, R, R, R] of 0 and 1 to mean and log-variance of the latent, each [N, c, r, r,
    r].
    """

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
            # Mean and log-variance side by side
            nn.Conv3d(last, 2 * config.latent_channels, 3, padding=1),
        )
        # Input and output layer stay in float32.
        if config.use_fp16:
            convert_torso([self.blocks, self.middle_block], torch.float16)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        check_shape(
            "StructureEncoder.x",
            x,
            ["N", self.config.in_channels or 1, "R", "R", "R"],
            "Pass occupancy grids.",
        )
        # The first and the last layer stay in float32.
        h = self.input_layer(x).to(torso_dtype(self.blocks))
        for block in self.blocks:
            h = block(h)
        mean, logvar = self.out_layer(self.middle_block(h).to(x.dtype)).chunk(2, 1)
        return mean, logvar


class StructureDecoder(nn.Module):
    """Decode latents [N, c, r, r, r] to logits of occupancy [N, 1, R, R, R].

    A voxel is occupied where its logit is positive.
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
            "Pass latents of the first stage.",
        )
        # Blocks compute in their own dtype, the last layer in the input's.
        h = self.middle_block(self.input_layer(x).to(torso_dtype(self.blocks)))
        for block in self.blocks:
            h = block(h)
        return self.out_layer(h.to(x.dtype))


def voxels_of(logits: torch.Tensor) -> list[torch.Tensor]:
    """Return the voxels of each sample, [v, 3] int32, where logits [N, 1, R, R, R] are positive.

    Not differentiable.
    """
    return [(sample[0] > 0).nonzero().int().contiguous() for sample in logits]


def grid_of(voxels: list[torch.Tensor], resolution: int) -> torch.Tensor:
    """Build occupancy [N, 1, R, R, R] of 0 and 1 from the voxels of each sample; inverse of `voxels_of`."""
    grid = torch.zeros(len(voxels), 1, *[resolution] * 3)
    for sample, places in zip(grid, voxels, strict=True):
        # Built on the CPU; the caller moves it.
        x, y, z = places.cpu().long().unbind(1)
        sample[0, x, y, z] = 1
    return grid


# Objects: both halves are transformers with attention in windows. Every other block shifts the windows: by
# half a window ("swin" and "shift_sequence", the latter along the Z-order curve), or by CURVE_SHIFT voxels
# per axis, which moves the curve itself ("shift_window").


ATTENTION = ("swin", "full", "shift_window", "shift_sequence")
CURVE_SHIFT = 16  # voxels


@dataclass(frozen=True, kw_only=True)
class SwinConfig(blocks.TransformerConfig):
    """Settings that encoder and decoder of objects have in common in `args` of their JSON files."""

    latent_channels: int  # c
    # "swin": in cubic windows; "full": among all voxels of a sample; "shift_...": along a curve through them.
    attn_mode: str = "swin"
    window_size: int = 8  # voxels per axis, or voxels along the curve

    def __post_init__(self):
        super().__post_init__()
        if self.attn_mode not in ATTENTION or self.window_size < 2:
            got = f"{self.attn_mode!r} and {self.window_size}"
            who = type(self).__name__
            raise ValueError(
                f"{who}: expected attn_mode {', '.join(ATTENTION)} and window_size >= 2, got {got}. Correct"
                " the JSON file. The Hilbert curve of shift_order is not supported, since no released model"
                " uses it."
            )


class SwinBlock(nn.Module):
    """Pre-norm transformer block: self-attention in windows and a feed-forward layer."""

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
    """Transformer over voxels: features [V, in] -> [V, out] on the same voxels."""

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
        """Apply input layer, positions, blocks, norm and output layer. Differentiable in: feats and
        parameters.
        """
        who = type(self).__name__
        config = self.config
        check_shape(
            f"{who}.feats",
            x.feats,
            ["V", self.input_layer.in_features],
            "Pass features of the kind that the model was trained on.",
        )
        # Input layer and positions are computed in float32.
        h = self.input_layer(x.feats.float()) + blocks.position_embedding(
            x.coords[:, 1:], config.model_channels
        )
        h = h.to(blocks.torso_dtype(self.blocks))
        # Two layouts alternate: without and with shifted windows.
        layouts = [blocks.SparseLayout(x, self._groups(x, odd)) for odd in range(2)]
        for i, block in enumerate(self.blocks):
            h = blocks.run_block(block, h, layouts[i % 2], recompute=self.recompute)
        # A norm without parameters, with torch's default eps of 1e-5.
        h = F.layer_norm(h.float(), h.shape[-1:])
        return x.with_feats(self.out_layer(h.to(self.out_layer.weight.dtype)))

    def _groups(self, x: SparseBatch, odd: int) -> blocks.Groups:
        """Return the voxels that attend to each other in even blocks (odd = 0) or odd blocks (odd = 1)."""
        mode = self.config.attn_mode
        window = self.config.window_size
        # odd is 0 or 1, so even blocks are not shifted.
        if mode == "full":
            return blocks.samples(x)
        if mode == "swin":
            return blocks.windows(x, window, odd * (window // 2))
        if mode == "shift_window":
            return blocks.curve_windows(x, window, shift=odd * CURVE_SHIFT)
        return blocks.curve_windows(x, window, start=odd * (window // 2))


@dataclass(frozen=True, kw_only=True)
class LatentEncoderConfig(SwinConfig):
    """Settings of the encoder of objects: `args` of its JSON file."""

    in_channels: int  # F; 1024 for DINOv2


class LatentEncoder(SwinTransformer):
    """Encode the mean image features of every voxel [V, F] as a normal distribution of latents [V, c]."""

    def __init__(self, config: LatentEncoderConfig):
        super().__init__(config, config.in_channels, 2 * config.latent_channels)

    def forward(self, x: SparseBatch) -> tuple[SparseBatch, SparseBatch]:
        """Compute mean and log-variance. Differentiable in: feats and parameters."""
        mean, logvar = self.transform(x).feats.chunk(2, -1)  # [V, c] each
        return x.with_feats(mean), x.with_feats(logvar)


# Numbers per Gaussian, in the order of the decoder's output.
LAYOUT = {"_xyz": 3, "_features_dc": 3, "_scaling": 3, "_rotation": 4, "_opacity": 1}
SIZE = sum(LAYOUT.values())
ACTIVATIONS = ("exp", "softplus")  # of raw scales


@dataclass(frozen=True, kw_only=True)
class GaussianSettings:
    """Settings by which the decoder's output becomes Gaussians: `representation_config` of the JSON file."""

    lr: Mapping[str, float]  # factor of each attribute, by its name in LAYOUT
    perturb_offset: bool  # spread the Gaussians of a voxel over the voxel
    voxel_size: float  # largest offset of a Gaussian, in voxels
    num_gaussians: int  # K
    filter_2d: float  # blur in the image plane that the renderer should use, in pixels
    filter_3d: float  # least standard deviation, in edge lengths of the cube
    scaling_bias: float  # standard deviation for a raw scale of zero
    opacity_bias: float  # opacity for a raw opacity of zero, in 0..1
    scaling_activation: str  # "exp" or "softplus"

    def __post_init__(self):
        who = "GaussianSettings"
        advice = "Correct representation_config in the model's JSON file."
        # Every attribute needs its factor.
        if set(self.lr) != set(LAYOUT):
            raise ValueError(
                f"{who}: expected lr for {', '.join(LAYOUT)}, got {', '.join(self.lr) or 'none'}. {advice}"
            )
        check_choice(f"{who}.scaling_activation", self.scaling_activation, ACTIVATIONS)
        if (
            # The biases enter logarithms, so they must be inside the open range.
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
    """Settings of the Gaussian decoder: `args` of its JSON file."""

    representation_config: Mapping

    @property
    def gaussians(self) -> GaussianSettings:
        """Settings of the Gaussians. Raises: ValueError for missing or unknown names."""
        values = self.representation_config
        # Two names of the JSON file begin with a digit and cannot be fields.
        renamed = {"2d_filter_kernel_size": "filter_2d", "3d_filter_kernel_size": "filter_3d"}
        try:
            return GaussianSettings(**{renamed.get(name, name): value for name, value in values.items()})
        except TypeError as error:
            raise ValueError(
                f"GaussianSettings: representation_config has the names {sorted(values)}: {error}. Correct"
                " the model's JSON file."
            ) from error


@dataclass(frozen=True, kw_only=True)
class Gaussians:
    """Gaussians of one object. The tensors are raw decoder output; the properties are what a renderer reads.

    Differentiable in: the tensors.
    """

    xyz: torch.Tensor  # [M, 3] in the cube 0..1
    features_dc: torch.Tensor  # [M, 1, 3] constant spherical-harmonic coefficients
    scaling: torch.Tensor  # [M, 3]
    rotation: torch.Tensor  # [M, 4]
    opacity: torch.Tensor  # [M, 1]
    settings: GaussianSettings

    @property
    def means(self) -> torch.Tensor:
        """Centres in the cube -0.5..0.5, [M, 3]."""
        return self.xyz - 0.5

    @property
    def scales(self) -> torch.Tensor:
        """Standard deviations along the axes, [M, 3], in edge lengths of the cube, > 0."""
        bias = self.settings.scaling_bias
        if self.settings.scaling_activation == "exp":
            scales = (self.scaling + math.log(bias)).exp()
        else:
            # softplus^-1(b) = b + log(1 - exp(-b)), so that a raw scale of 0 gives `bias`
            scales = F.softplus(self.scaling + bias + math.log(-math.expm1(-bias)))
        # Variances add: the 3D smoothing filter of Mip-Splatting (Yu et al. 2024).
        return (scales.square() + self.settings.filter_3d**2).sqrt()

    @property
    def rotations(self) -> torch.Tensor:
        """Unit quaternions, [M, 4], real part first; raw zeros mean no rotation."""
        return F.normalize(self.rotation + self.rotation.new_tensor([1, 0, 0, 0]), dim=-1)

    @property
    def opacities(self) -> torch.Tensor:
        """Opacities in 0..1, [M, 1]."""
        bias = self.settings.opacity_bias
        return torch.sigmoid(self.opacity + math.log(bias / (1 - bias)))


class GaussianDecoder(SwinTransformer):
    """Decode latents [V, c], not normalised, to the Gaussians of every sample.

    Differentiable in: feats and parameters.
    """

    def __init__(self, config: GaussianDecoderConfig):
        settings = config.gaussians
        super().__init__(config, config.latent_channels, settings.num_gaussians * SIZE)
        self.settings = settings
        # Persistent, because checkpoints hold it.
        self.register_buffer("offset_perturbation", perturbation(settings))

    def forward(self, x: SparseBatch) -> list[Gaussians]:
        """Decode the Gaussians: xyz = centre of the voxel + tanh(offset + perturbation) voxel_size / (2
        resolution).
        """
        s = self.settings
        count = self.settings.num_gaussians
        objects = []
        for sample in self.transform(x).samples():
            parts = sample.feats.split([count * size for size in LAYOUT.values()], 1)
            # Each attribute of all K Gaussians of a voxel is contiguous: [V, K size] -> [V, K, size].
            raw = {
                name: part.unflatten(1, (count, -1)) * s.lr[name]
                for name, part in zip(LAYOUT, parts, strict=True)
            }
            offset = raw["_xyz"] + self.offset_perturbation if s.perturb_offset else raw["_xyz"]
            reach = 0.5 * s.voxel_size / self.config.resolution  # largest offset from the voxel's centre
            centre = (sample.coords + 0.5) / self.config.resolution  # [V, 3]
            # [V, K, size] -> [M, size] with M = V K
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
    """Return offsets [K, 3] that spread the Gaussians of a voxel on a Hammersley set.

    The offsets are atanh((2 point - 1) / voxel_size).

    Raises: ValueError if voxel_size is at most 1, because the set's first point then has no offset.
    """
    count = settings.num_gaussians
    # Hammersley set: an even first coordinate, radical inverses in base 2 and 3 for the others.
    points = torch.tensor([[i / count, _radical_inverse(2, i), _radical_inverse(3, i)] for i in range(count)])
    if settings.perturb_offset and settings.voxel_size <= 1:
        got = settings.voxel_size
        raise ValueError(
            f"GaussianSettings: expected voxel_size > 1 with perturb_offset, got {got}. Correct the JSON"
            " file."
        )
    return ((2 * points - 1) / settings.voxel_size).atanh()


def _radical_inverse(base: int, n: int) -> float:
    """Mirror the digits of n in a base at the point: 6 = 110 in base 2 -> 0.011 = 3/8 (van der Corput)."""
    value = 0.0
    place = 1.0
    while n:
        place /= base
        # The lowest digit becomes the first one after the point.
        value += place * (n % base)
        n //= base
    return value
