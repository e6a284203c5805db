"""TRELLIS's autoencoder of occupancy grids: 64^3 voxels <-> 16^3 points with 8 channels.

Shape letters: N samples, C channels, R voxels per axis, r points per axis of a latent, c its channels.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from eg3d_rlhf.core.shapes import check_shape
from eg3d_rlhf.models.trellis.blocks import convert_torso, torso_dtype


@dataclass(frozen=True, kw_only=True)
class StructureVAEConfig:
    """What the JSON files of both halves call args; an encoder has in_channels, a decoder out_channels."""

    latent_channels: int
    num_res_blocks: int
    channels: tuple[int, ...]  # per level, in the order of computation
    in_channels: int | None = None
    out_channels: int | None = None
    num_res_blocks_middle: int = 2
    norm_type: str = "layer"  # over the channels of a point, or "group": over 32 groups of channels and all points
    use_fp16: bool = False  # type of the inner convolutions as built; files bring their own

    def __post_init__(self):
        object.__setattr__(self, "channels", tuple(self.channels))
        if self.norm_type not in NORMS:
            got = self.norm_type
            raise ValueError(f"StructureVAEConfig: expected norm_type {' or '.join(NORMS)}, got {got!r}. Correct the JSON file.")
        if self.norm_type == "group" and any(channels % GROUPS for channels in self.channels):
            raise ValueError(
                f"StructureVAEConfig: expected channels in multiples of {GROUPS} with norm_type 'group', got {list(self.channels)}. "
                "Correct the JSON file."
            )
        if not self.channels or (self.in_channels is None) == (self.out_channels is None):
            raise ValueError("StructureVAEConfig: expected channels, and in_channels or out_channels, got others. Correct the JSON file.")


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
        first, last = config.channels[0], config.channels[-1]
        self.input_layer = nn.Conv3d(config.in_channels or 1, first, 3, padding=1)
        self.blocks = _levels(config, down)
        self.middle_block = nn.Sequential(*[ResBlock(last, config.norm_type) for _ in range(config.num_res_blocks_middle)])
        self.out_layer = nn.Sequential(NORMS[config.norm_type](last), nn.SiLU(), nn.Conv3d(last, 2 * config.latent_channels, 3, padding=1))
        if config.use_fp16:
            convert_torso([self.blocks, self.middle_block], torch.float16)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        check_shape("StructureEncoder.x", x, ["N", self.config.in_channels or 1, "R", "R", "R"], "Give occupancy grids.")
        h = self.input_layer(x).to(torso_dtype(self.blocks))
        for block in self.blocks:
            h = block(h)
        mean, logvar = self.out_layer(self.middle_block(h).to(x.dtype)).chunk(2, 1)
        return mean, logvar


class StructureDecoder(nn.Module):
    """Latents [N, c, r, r, r] -> logits of occupancy [N, 1, R, R, R]; a voxel is there where its logit is positive."""

    def __init__(self, config: StructureVAEConfig):
        super().__init__()
        self.config = config
        first, last = config.channels[0], config.channels[-1]
        self.input_layer = nn.Conv3d(config.latent_channels, first, 3, padding=1)
        self.middle_block = nn.Sequential(*[ResBlock(first, config.norm_type) for _ in range(config.num_res_blocks_middle)])
        self.blocks = _levels(config, Up)
        self.out_layer = nn.Sequential(NORMS[config.norm_type](last), nn.SiLU(), nn.Conv3d(last, config.out_channels or 1, 3, padding=1))
        if config.use_fp16:
            convert_torso([self.blocks, self.middle_block], torch.float16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        check_shape("StructureDecoder.x", x, ["N", self.config.latent_channels, "r", "r", "r"], "Give latents of the first stage.")
        h = self.middle_block(self.input_layer(x).to(torso_dtype(self.blocks)))
        for block in self.blocks:
            h = block(h)
        return self.out_layer(h.to(x.dtype))


def voxels_of(logits: torch.Tensor) -> list[torch.Tensor]:
    """The voxels of each sample, [v, 3] int32, where logits [N, 1, R, R, R] are positive. Not differentiable."""
    return [(sample[0] > 0).nonzero().int().contiguous() for sample in logits]


def grid_of(voxels: list[torch.Tensor], resolution: int) -> torch.Tensor:
    """Occupancy [N, 1, R, R, R] of 0 and 1 from the voxels of each sample; inverse of `voxels_of`."""
    grid = torch.zeros(len(voxels), 1, *[resolution] * 3)
    for sample, places in zip(grid, voxels, strict=True):
        x, y, z = places.cpu().long().unbind(1)
        sample[0, x, y, z] = 1
    return grid
