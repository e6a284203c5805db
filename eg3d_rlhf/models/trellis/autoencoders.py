"""Autoencoders of TRELLIS (Xiang et al. 2024) for the structure and for the appearance of objects.

The structure autoencoder encodes occupancy grids of 64^3 voxels as latents of 16^3 points with 8 channels.
The object autoencoder encodes image features on voxels as latents on the same voxels, and decodes latents to
a few Gaussians (Kerbl et al. 2023, 3D Gaussian splatting) per voxel.

Shapes: N samples, C channels, R voxels per axis, r points per axis of a latent, c channels of a latent; V
voxels of all samples, v voxels of one sample, F features of the image network, K Gaussians per voxel, M
Gaussians of an object.
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
    """Settings of the structure encoder or the structure decoder, the entry `args` of their JSON files.

    Raises: ValueError for settings that are not supported or do not fit together.
    """

    latent_channels: int  # c
    num_res_blocks: int  # number of residual blocks per level
    channels: tuple[int, ...]  # channels of each level of resolution, in the order of computation
    in_channels: int | None = None  # channels of the occupancy grid; None for a decoder
    out_channels: int | None = None  # channels of the logits; None for an encoder
    num_res_blocks_middle: int = 2  # number of residual blocks at the lowest resolution
    # Norm of the residual blocks: "layer" over the channels of a point,
    # "group" over 32 groups of channels and all points
    norm_type: str = "layer"
    # Half precision for new inner layers; weights from files have the dtype of the file
    use_fp16: bool = False

    def __post_init__(self):
        # A list from JSON becomes a tuple, so that the frozen object can be hashed.
        object.__setattr__(self, "channels", tuple(self.channels))
        if self.norm_type not in NORMS:
            raise ValueError(
                f"StructureVAEConfig: norm_type must be {' or '.join(NORMS)}, got {self.norm_type!r}."
                " Download the model's JSON file again."
            )
        if self.norm_type == "group" and any(channels % GROUPS for channels in self.channels):
            raise ValueError(
                f"StructureVAEConfig: with norm_type 'group', all channels must be multiples of {GROUPS}, got"
                f" {list(self.channels)}. Download the model's JSON file again."
            )
        # An encoder has in_channels and a decoder out_channels.
        if not self.channels or (self.in_channels is None) == (self.out_channels is None):
            raise ValueError(
                "StructureVAEConfig: channels must not be empty, and exactly one of in_channels and"
                f" out_channels must be given, got channels={list(self.channels)},"
                f" in_channels={self.in_channels} and out_channels={self.out_channels}. Download the model's"
                " JSON file again."
            )


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each point of a volume [N, C, R, R, R], computed in float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [N, C, R, R, R]
        # nn.LayerNorm normalises the last axis.
        return super().forward(x.movedim(1, -1).float()).movedim(-1, 1).to(x.dtype)


class GroupNorm(nn.GroupNorm):
    """Group norm over 32 groups of channels of a volume [N, C, R, R, R], computed in float32."""

    def __init__(self, channels: int):
        super().__init__(GROUPS, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [N, C, R, R, R]
        return super().forward(x.float()).to(x.dtype)


GROUPS = 32  # number of groups of channels of a group norm
NORMS: dict[str, Callable[[int], nn.Module]] = {"layer": ChannelNorm, "group": GroupNorm}


class ResBlock(nn.Module):
    """Residual block over volumes [N, C, R, R, R]: x + conv2(silu(norm2(conv1(silu(norm1(x))))))."""

    def __init__(self, channels: int, norm_type: str):
        super().__init__()
        self.norm1, self.norm2 = (NORMS[norm_type](channels) for _ in range(2))
        self.conv1, self.conv2 = (nn.Conv3d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


def down(in_channels: int, out_channels: int) -> nn.Module:
    """Build a layer that halves the number of points per axis by a convolution with stride 2."""
    # The name conv is needed, because the checkpoint calls the parameters conv.weight and conv.bias.
    return nn.Sequential(OrderedDict(conv=nn.Conv3d(in_channels, out_channels, 2, stride=2)))


class Up(nn.Module):
    """Layer that doubles the number of points per axis.

    A convolution computes 8 channels per channel of the result, which become 2 x 2 x 2 points (pixel
    shuffle).
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv3d(in_channels, 8 * out_channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x).unflatten(1, (-1, 2, 2, 2))  # [N, C, 2, 2, 2, R, R, R]
        # [N, C, R, 2, R, 2, R, 2] -> [N, C, 2 R, 2 R, 2 R]
        return x.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6).flatten(4, 5).flatten(2, 3)


def _levels(config: StructureVAEConfig, make_resampling: Callable[[int, int], nn.Module]) -> nn.ModuleList:
    """Build the residual blocks of all levels, with a change of resolution between levels.

    Args:
        config: settings of the encoder or decoder.
        make_resampling: function that builds the layer between two levels from their numbers of channels.
    """
    level_modules: list[nn.Module] = []
    for i, channels in enumerate(config.channels):
        level_modules += [ResBlock(channels, config.norm_type) for _ in range(config.num_res_blocks)]
        # There is no change of resolution after the last level.
        if i + 1 < len(config.channels):
            level_modules.append(make_resampling(channels, config.channels[i + 1]))
    return nn.ModuleList(level_modules)


class StructureEncoder(nn.Module):
    """Encoder of occupancy grids [N, 1, R, R, R] of 0 and 1.

    It returns the mean and the log-variance of the latents, [N, c, r, r, r] each.
    """

    def __init__(self, config: StructureVAEConfig):
        super().__init__()
        self.config = config
        fine_channels = config.channels[0]  # of the highest resolution, which comes first in an encoder
        coarse_channels = config.channels[-1]
        self.input_layer = nn.Conv3d(config.in_channels or 1, fine_channels, 3, padding=1)
        self.blocks = _levels(config, down)
        self.middle_block = nn.Sequential(
            *[ResBlock(coarse_channels, config.norm_type) for _ in range(config.num_res_blocks_middle)]
        )
        self.out_layer = nn.Sequential(
            NORMS[config.norm_type](coarse_channels),
            nn.SiLU(),
            # The channels of the mean, then those of the log-variance
            nn.Conv3d(coarse_channels, 2 * config.latent_channels, 3, padding=1),
        )
        # The input layer and the output layer stay in float32.
        if config.use_fp16:
            convert_torso([self.blocks, self.middle_block], torch.float16)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        check_shape(
            "StructureEncoder.x",
            x,
            ["N", self.config.in_channels or 1, "R", "R", "R"],
            "Pass occupancy grids.",
        )
        # Blocks compute in their own dtype, the output layer in that of x.
        h = self.input_layer(x).to(torso_dtype(self.blocks))
        for block in self.blocks:
            h = block(h)
        mean, logvar = self.out_layer(self.middle_block(h).to(x.dtype)).chunk(2, 1)
        return mean, logvar


class StructureDecoder(nn.Module):
    """Decoder of latents [N, c, r, r, r], which returns logits of the occupancy [N, 1, R, R, R].

    A voxel is occupied if its logit is positive.
    """

    def __init__(self, config: StructureVAEConfig):
        super().__init__()
        self.config = config
        coarse_channels = config.channels[0]  # of the lowest resolution, which comes first in a decoder
        fine_channels = config.channels[-1]
        self.input_layer = nn.Conv3d(config.latent_channels, coarse_channels, 3, padding=1)
        self.middle_block = nn.Sequential(
            *[ResBlock(coarse_channels, config.norm_type) for _ in range(config.num_res_blocks_middle)]
        )
        self.blocks = _levels(config, Up)
        self.out_layer = nn.Sequential(
            NORMS[config.norm_type](fine_channels),
            nn.SiLU(),
            nn.Conv3d(fine_channels, config.out_channels or 1, 3, padding=1),
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
        # Blocks compute in their own dtype, the output layer in that of x.
        h = self.middle_block(self.input_layer(x).to(torso_dtype(self.blocks)))
        for block in self.blocks:
            h = block(h)
        return self.out_layer(h.to(x.dtype))


def voxels_of(logits: torch.Tensor) -> list[torch.Tensor]:
    """Return the indices of the occupied voxels of each sample, [v, 3] int32. Not differentiable.

    Args:
        logits: logits of the occupancy [N, 1, R, R, R]; a voxel is occupied if its logit is positive.
    """
    return [(sample[0] > 0).nonzero().int().contiguous() for sample in logits]


def grid_of(voxels_of_samples: list[torch.Tensor], resolution: int) -> torch.Tensor:
    """Build occupancy grids [N, 1, R, R, R] of 0 and 1 on the CPU from the occupied voxels of each sample.

    Args:
        voxels_of_samples: indices [v, 3] of the occupied voxels of each sample.
        resolution: number of voxels per axis R.
    """
    grids = torch.zeros(len(voxels_of_samples), 1, *[resolution] * 3)
    for grid, voxel_indices in zip(grids, voxels_of_samples, strict=True):
        x, y, z = voxel_indices.cpu().long().unbind(1)
        grid[0, x, y, z] = 1
    return grids


# The encoder and the decoder of the object autoencoder are transformers over voxels with attention in
# windows. In every second block the windows are shifted: by half a window in the mode "swin" (Liu et al.
# 2021), by half a window along the Z-order curve in the mode "shift_sequence", and by CURVE_SHIFT voxels per
# axis, which gives another Z-order curve, in the mode "shift_window". In the mode "full" all voxels of a
# sample attend to each other.


ATTENTION = ("swin", "full", "shift_window", "shift_sequence")
CURVE_SHIFT = 16  # shift of the coordinates in voxels


@dataclass(frozen=True, kw_only=True)
class SwinConfig(blocks.TransformerConfig):
    """Settings that the JSON files of the object encoder and of the object decoder contain in `args`.

    Raises: ValueError for settings that are not supported or do not fit together.
    """

    latent_channels: int  # c
    attn_mode: str = "swin"  # windows of the attention, one of ATTENTION
    # Size of a window: voxels per axis for "swin", voxels along the curve for "shift_window" and
    # "shift_sequence"
    window_size: int = 8

    def __post_init__(self):
        super().__post_init__()
        who = type(self).__name__
        if self.attn_mode not in ATTENTION:
            raise ValueError(
                f"{who}: attn_mode must be one of {', '.join(ATTENTION)}, got {self.attn_mode!r}, which no"
                " released model uses. Use a released model."
            )
        if self.window_size < 2:
            raise ValueError(
                f"{who}: window_size must be >= 2, got {self.window_size}. Download the model's JSON file"
                " again."
            )


class SwinBlock(nn.Module):
    """Pre-norm transformer block of a self-attention in windows and a feed-forward layer.

    Args:
        channels: channels C of a token.
        num_heads: number of attention heads.
        mlp_ratio: channels inside the feed-forward layer, as a multiple of C.
        qk_rms_norm: True normalises queries and keys.
    """

    def __init__(self, channels: int, num_heads: int, mlp_ratio: float, qk_rms_norm: bool):
        super().__init__()
        self.norm1 = blocks.LayerNorm32(channels)
        self.norm2 = blocks.LayerNorm32(channels)
        self.attn = blocks.SelfAttention(channels, num_heads, qk_rms_norm)
        self.mlp = blocks.FeedForward(channels, mlp_ratio)

    def forward(self, x: torch.Tensor, layout: blocks.Layout) -> torch.Tensor:
        x = x + self.attn(self.norm1(x), layout)
        return x + self.mlp(self.norm2(x))


class SwinTransformer(nn.Module):
    """Transformer over voxels, features [V, in_channels] -> [V, out_channels] on the same voxels."""

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
        """Apply the transformer to a batch.

        The position embedding is added after the input layer. Differentiable in: feats and parameters.
        """
        who = type(self).__name__
        config = self.config
        check_shape(
            f"{who}.feats",
            x.feats,
            ["V", self.input_layer.in_features],
            "Pass features of the kind that the model was trained with.",
        )
        # The input layer and the position embedding are computed in float32.
        h = self.input_layer(x.feats.float()) + blocks.position_embedding(
            x.coords[:, 1:], config.model_channels
        )
        h = h.to(blocks.torso_dtype(self.blocks))
        # Layout of even blocks, without a shift of the windows, and layout of odd blocks, with a shift
        layouts = [blocks.SparseLayout(x, self._groups(x, block_parity)) for block_parity in range(2)]
        for i, block in enumerate(self.blocks):
            h = blocks.run_block(block, h, layouts[i % 2], recompute=self.recompute)
        # As in the original, the last norm has no parameters and torch's default constant 1e-5.
        h = F.layer_norm(h.float(), h.shape[-1:])
        return x.with_feats(self.out_layer(h.to(self.out_layer.weight.dtype)))

    def _groups(self, x: SparseBatch, block_parity: int) -> blocks.Groups:
        """Return the groups of voxels that attend to each other.

        Args:
            x: voxels.
            block_parity: 0 for even blocks, whose windows are not shifted; 1 for odd blocks.
        """
        attention_mode = self.config.attn_mode
        window_size = self.config.window_size
        if attention_mode == "full":
            return blocks.samples(x)
        if attention_mode == "swin":
            return blocks.windows(x, window_size, block_parity * (window_size // 2))
        if attention_mode == "shift_window":
            return blocks.curve_windows(x, window_size, shift=block_parity * CURVE_SHIFT)
        return blocks.curve_windows(x, window_size, start=block_parity * (window_size // 2))


@dataclass(frozen=True, kw_only=True)
class LatentEncoderConfig(SwinConfig):
    """Settings of the object encoder, the entry `args` of its JSON file."""

    in_channels: int  # F; 1024 for the large DINOv2


class LatentEncoder(SwinTransformer):
    """Object encoder, from image features [V, F] to a normal distribution of latents [V, c].

    The features of a voxel are averaged over all images that show it.
    """

    def __init__(self, config: LatentEncoderConfig):
        super().__init__(config, config.in_channels, 2 * config.latent_channels)

    def forward(self, x: SparseBatch) -> tuple[SparseBatch, SparseBatch]:
        """Compute the mean and the log-variance of the latents. Differentiable in: feats and parameters."""
        mean, logvar = self.transform(x).feats.chunk(2, -1)  # [V, c] each
        return x.with_feats(mean), x.with_feats(logvar)


# Attributes of a Gaussian and the number of their values, in the order of the decoder's output
LAYOUT = {"_xyz": 3, "_features_dc": 3, "_scaling": 3, "_rotation": 4, "_opacity": 1}
SIZE = sum(LAYOUT.values())  # number of values of a Gaussian
ACTIVATIONS = ("exp", "softplus")  # functions that make raw scales positive


@dataclass(frozen=True, kw_only=True)
class GaussianSettings:
    """Settings that convert the decoder's output to Gaussians: `representation_config` of the JSON file.

    Raises: ValueError for settings that are not supported or outside their range.
    """

    lr: Mapping[str, float]  # factor of the decoder's output for each attribute, by its name in LAYOUT
    perturb_offset: bool  # True: fixed offsets spread the Gaussians of a voxel over the voxel
    voxel_size: float  # side of the cube around a voxel's centre in which its Gaussians lie, in voxels
    num_gaussians: int  # K
    filter_2d: float  # blur in the image plane that the renderer should use, in pixels
    filter_3d: float  # smallest standard deviation of a Gaussian, in sides of the cube
    scaling_bias: float  # standard deviation for a raw scale of zero, > 0
    opacity_bias: float  # opacity for a raw opacity of zero, between 0 and 1
    scaling_activation: str  # function of the raw scales, "exp" or "softplus"

    def __post_init__(self):
        who = "GaussianSettings"
        remedy = "Download the model's JSON file again."
        if set(self.lr) != set(LAYOUT):
            raise ValueError(
                f"{who}: representation_config must have an lr for each of {', '.join(LAYOUT)}, got"
                f" {', '.join(self.lr) or 'none'}. {remedy}"
            )
        check_choice(f"{who}.scaling_activation", self.scaling_activation, ACTIVATIONS)
        # The logarithm of opacity_bias and scaling_bias must be finite.
        if (
            self.num_gaussians < 1
            or not 0 < self.opacity_bias < 1
            or self.scaling_bias <= 0
            or self.voxel_size <= 0
        ):
            raise ValueError(
                f"{who}: representation_config must have num_gaussians >= 1, 0 < opacity_bias < 1,"
                f" scaling_bias > 0 and voxel_size > 0, got num_gaussians={self.num_gaussians},"
                f" opacity_bias={self.opacity_bias}, scaling_bias={self.scaling_bias} and"
                f" voxel_size={self.voxel_size}. {remedy}"
            )


@dataclass(frozen=True, kw_only=True)
class GaussianDecoderConfig(SwinConfig):
    """Settings of the Gaussian decoder, the entry `args` of its JSON file."""

    representation_config: Mapping  # settings of the Gaussians, with the names of the JSON file

    @property
    def gaussians(self) -> GaussianSettings:
        """Return the settings of the Gaussians.

        Raises: ValueError if a setting is missing, unknown or not supported.
        """
        file_settings = self.representation_config
        # Two names of the JSON file begin with a digit, so they cannot be names of fields.
        field_names = {"2d_filter_kernel_size": "filter_2d", "3d_filter_kernel_size": "filter_3d"}
        try:
            return GaussianSettings(
                **{
                    field_names.get(setting_name, setting_name): setting_value
                    for setting_name, setting_value in file_settings.items()
                }
            )
        except TypeError as error:
            # Python's error for arguments that are missing or unknown names the argument.
            raise ValueError(
                f"GaussianSettings: representation_config has the names {sorted(file_settings)}, which are"
                f" not those of the settings ({error}). Download the model's JSON file again."
            ) from error


@dataclass(frozen=True, kw_only=True)
class Gaussians:
    """Gaussians of one object.

    The tensors are raw outputs of the decoder. The properties convert them to the inputs of a renderer, and
    are differentiable in the tensors.
    """

    xyz: torch.Tensor  # [M, 3] centres in the cube 0..1
    features_dc: torch.Tensor  # [M, 1, 3] spherical-harmonic coefficients of degree 0, the colour
    scaling: torch.Tensor  # [M, 3] raw scales
    rotation: torch.Tensor  # [M, 4] raw quaternions
    opacity: torch.Tensor  # [M, 1] raw opacities
    settings: GaussianSettings

    @property
    def means(self) -> torch.Tensor:
        """Return the centres [M, 3] in the cube -0.5..0.5."""
        return self.xyz - 0.5

    @property
    def scales(self) -> torch.Tensor:
        """Return standard deviations [M, 3] > 0 along the axes of each Gaussian, in sides of the cube."""
        bias = self.settings.scaling_bias
        if self.settings.scaling_activation == "exp":
            activated_scales = (self.scaling + math.log(bias)).exp()
        else:
            # softplus^-1(b) = b + log(1 - exp(-b)), so that a raw scale of 0 gives `bias`
            activated_scales = F.softplus(self.scaling + bias + math.log(-math.expm1(-bias)))
        # The 3D smoothing filter of Mip-Splatting (Yu et al. 2024): a
        # convolution of two Gaussians adds variances.
        return (activated_scales.square() + self.settings.filter_3d**2).sqrt()

    @property
    def rotations(self) -> torch.Tensor:
        """Return unit quaternions [M, 4], real part first. Raw quaternions of zero mean no rotation."""
        return F.normalize(self.rotation + self.rotation.new_tensor([1, 0, 0, 0]), dim=-1)

    @property
    def opacities(self) -> torch.Tensor:
        """Return the opacities [M, 1], 0..1."""
        bias = self.settings.opacity_bias
        # log(b / (1 - b)) is the inverse of the sigmoid, so that a raw opacity of 0 gives `bias`.
        return torch.sigmoid(self.opacity + math.log(bias / (1 - bias)))


class GaussianDecoder(SwinTransformer):
    """Gaussian decoder, from latents [V, c] to the Gaussians of every sample.

    The latents are not normalised. Differentiable in: feats and parameters.
    """

    def __init__(self, config: GaussianDecoderConfig):
        gaussian_settings = config.gaussians
        super().__init__(config, config.latent_channels, gaussian_settings.num_gaussians * SIZE)
        self.settings = gaussian_settings
        # Checkpoints contain the offsets, so they are a persistent buffer.
        self.register_buffer("offset_perturbation", perturbation(gaussian_settings))

    def forward(self, x: SparseBatch) -> list[Gaussians]:
        """Decode the Gaussians of every sample.

        The centre of a Gaussian is xyz = centre of the voxel + tanh(offset + perturbation) voxel_size / (2
        resolution). The offset is an output of the network, and the perturbation is fixed (`perturbation`).
        """
        gaussian_settings = self.settings
        gaussians_per_voxel = self.settings.num_gaussians
        gaussians_of_samples = []
        for sample in self.transform(x).samples():
            attributes = sample.feats.split(
                [gaussians_per_voxel * value_count for value_count in LAYOUT.values()], 1
            )
            # The values of an attribute of all K Gaussians of a voxel are
            # adjacent: [v, K size] -> [v, K, size]
            raw_attributes = {
                attribute_name: attribute.unflatten(1, (gaussians_per_voxel, -1))
                * gaussian_settings.lr[attribute_name]
                for attribute_name, attribute in zip(LAYOUT, attributes, strict=True)
            }
            raw_offset = (
                raw_attributes["_xyz"] + self.offset_perturbation
                if gaussian_settings.perturb_offset
                else raw_attributes["_xyz"]
            )
            max_offset = (
                0.5 * gaussian_settings.voxel_size / self.config.resolution
            )  # from the centre of the voxel
            centre = (sample.coords + 0.5) / self.config.resolution  # [v, 3]
            # [v, K, size] -> [M, size] with M = v K
            flat_attributes = {
                attribute_name: attribute.flatten(0, 1)
                for attribute_name, attribute in raw_attributes.items()
            }
            gaussians_of_samples.append(
                Gaussians(
                    xyz=(centre[:, None] + raw_offset.tanh() * max_offset).flatten(0, 1),
                    features_dc=flat_attributes["_features_dc"][:, None],
                    scaling=flat_attributes["_scaling"],
                    rotation=flat_attributes["_rotation"],
                    opacity=flat_attributes["_opacity"],
                    settings=gaussian_settings,
                )
            )
        return gaussians_of_samples


def perturbation(gaussian_settings: GaussianSettings) -> torch.Tensor:
    """Compute fixed offsets [K, 3] that spread the Gaussians of a voxel over the voxel.

    The offsets are atanh((2 p - 1) / voxel_size), where p are the points of a Hammersley set in 0..1.

    Raises: ValueError if perturb_offset is True and voxel_size at most 1, because atanh is infinite for the
        first point.
    """
    gaussians_per_voxel = gaussian_settings.num_gaussians
    # Hammersley set: the first coordinates are spaced evenly, the
    # others are radical inverses in base 2 and 3.
    points = torch.tensor(
        [
            [i / gaussians_per_voxel, _radical_inverse(2, i), _radical_inverse(3, i)]
            for i in range(gaussians_per_voxel)
        ]
    )
    if gaussian_settings.perturb_offset and gaussian_settings.voxel_size <= 1:
        raise ValueError(
            "GaussianSettings: with perturb_offset, voxel_size must be > 1, got"
            f" {gaussian_settings.voxel_size}. Download the model's JSON file again."
        )
    return ((2 * points - 1) / gaussian_settings.voxel_size).atanh()


def _radical_inverse(base: int, n: int) -> float:
    """Compute the radical inverse of n in a base (van der Corput).

    For example 6, which is 110 in base 2, gives 0.011 in base 2, which is 3/8. The digits of n are mirrored
    at the radix point.
    """
    radical_inverse = 0.0
    digit_value = 1.0
    while n:
        digit_value /= base
        # The lowest digit of n becomes the first digit after the point.
        radical_inverse += digit_value * (n % base)
        n //= base
    return radical_inverse
