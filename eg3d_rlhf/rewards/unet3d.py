"""3-D U-Net with residual squeeze-and-excitation blocks, which reads a cropped density grid (sigma slab).

The names of its modules are those of the published checkpoints.

Sources: U-Net in 3-D (Cicek 2016, arXiv 1606.06650), residual blocks with summation joining (Lee 2017, arXiv
1706.00120), concurrent spatial and channel squeeze-and-excitation, joined by maximum (Roy 2018, arXiv
1803.02579), group normalisation (Wu 2018, arXiv 1803.08494).

Shapes: N samples, C channels, D, H, W = voxels along z, y, x (see eg3d_rlhf/core/shapes.py).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn


class ScSE(nn.Module):
    """Gates of a volume h, one per channel (g) and one per voxel (s), joined as out = max(h * g, h * s).

    cSE gives one gate per channel, g = sigmoid(fc2(relu(fc1(mean of h over z, y, x)))), without a reduction
    of the number of channels. sSE gives one gate per voxel, s = sigmoid(1x1x1 convolution of h to one
    channel).
    """

    def __init__(self, channels: int):
        super().__init__()
        # The names "fc1", "fc2" and "conv" are those of published state dicts.
        self.cSE = nn.ModuleDict({name: nn.Linear(channels, channels) for name in ("fc1", "fc2")})
        self.sSE = nn.ModuleDict({"conv": nn.Conv3d(channels, 1, kernel_size=1)})

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """Apply both gates to h [N, C, D, H, W], which must not be negative. Differentiable."""
        # g: [N, C, 1, 1, 1]
        g = torch.sigmoid(self.cSE["fc2"](F.relu(self.cSE["fc1"](h.mean(dim=(2, 3, 4))))))[
            :, :, None, None, None
        ]
        # h is not negative after its ReLU, so this equals h * max(g, s).
        return torch.maximum(h * g, h * torch.sigmoid(self.sSE["conv"](h)))


class NormConv(nn.Module):
    """GroupNorm, followed by a 3x3x3 convolution without bias that keeps the number of channels.

    If there are fewer channels than groups, one group is used, as in the published checkpoints.

    Args:
        channels: number of channels.
        groups: number of groups of the normalisation.
    Raises: ValueError if the number of channels is above the number of groups and not divisible by it.
    """

    def __init__(self, channels: int, groups: int):
        super().__init__()
        # For example, 4 channels cannot be divided into 8 groups.
        groups = 1 if channels < groups else groups
        if channels % groups:
            raise ValueError(
                f"NormConv: expected a number of channels that is divisible by the {groups} groups, got"
                f" {channels}. Change feature_maps or groups of the architecture."
            )
        self.groupnorm = nn.GroupNorm(groups, channels, eps=1e-5)
        self.conv = nn.Conv3d(channels, channels, kernel_size=3, padding=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the result [N, C, D, H, W] from x [N, C, D, H, W]. Differentiable."""
        return self.conv(self.groupnorm(x))


class ResidualBlock(nn.Module):
    """Residual block: r = conv1(x); h = relu(r + conv3(norm(relu(conv2(norm(r)))))); out = scSE(h).

    The residual is r, not the input x. conv1 is a 1x1x1 convolution with bias if the number of channels
    changes; otherwise it is the identity.

    Args:
        channels_in: number of input channels.
        channels_out: number of output channels.
        groups: number of groups of each normalisation.
    """

    def __init__(self, channels_in: int, channels_out: int, groups: int):
        super().__init__()
        self.conv1 = (
            nn.Identity()
            if channels_in == channels_out
            else nn.Conv3d(channels_in, channels_out, kernel_size=1)
        )
        self.conv2 = NormConv(channels_out, groups)
        self.conv3 = NormConv(channels_out, groups)
        self.se_module = ScSE(channels_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [N, C_in, D, H, W] to [N, C_out, D, H, W]. Differentiable."""
        # conv1 is linear and has no activation after it.
        r = self.conv1(x)
        # One activation follows conv2. The other one follows the sum with the residual, not conv3.
        h = F.relu(self.conv2(r))
        return self.se_module(F.relu(self.conv3(h) + r))


class Encoder(nn.Module):
    """Level of the U-Net's encoder: max-pooling by 2 if `pool` is True, followed by a residual block.

    Max-pooling drops the last voxel of an axis with an odd number of voxels.

    Args:
        channels_in: number of input channels.
        channels_out: number of output channels.
        groups: number of groups of each normalisation.
        pool: False for the finest level, which is not pooled.
    """

    def __init__(self, channels_in: int, channels_out: int, groups: int, pool: bool):
        super().__init__()
        self.pool = pool
        self.basic_module = ResidualBlock(channels_in, channels_out, groups)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [N, C_in, D, H, W] to [N, C_out, D', H', W'], where D' = D // 2 if `pool`, else D.

        Differentiable.
        """
        return self.basic_module(F.max_pool3d(x, 2) if self.pool else x)


class Upsampler(nn.Module):
    """Transposed convolution, followed by nearest-neighbour resampling to the size of the skip connection.

    The convolution turns n voxels per axis into 2 n - 1 voxels. The resampling from m to k voxels per axis
    reads voxel i * m // k for voxel i.

    Args:
        channels_in: number of input channels.
        channels_out: number of output channels.
    """

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        convolution = nn.ConvTranspose3d(
            channels_in, channels_out, kernel_size=3, stride=2, padding=1, bias=False
        )
        # The dictionary adds the level "upsample.conv_transposed" to the names, as in published state dicts.
        self.upsample = nn.ModuleDict({"conv_transposed": convolution})

    def forward(self, x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        """Map x [N, C_in, d, h, w] to [N, C_out, *size], where `size` is (D, H, W). Differentiable."""
        return F.interpolate(self.upsample["conv_transposed"](x), size=tuple(size), mode="nearest")


class Decoder(nn.Module):
    """Level of the U-Net's decoder: upsampling, sum with the skip connection, and a residual block.

    The skip connection is added and not concatenated, so the block has no conv1.

    Args:
        channels_in: number of channels of the coarser level.
        channels_out: number of output channels, equal to that of the skip connection.
        groups: number of groups of each normalisation.
    """

    def __init__(self, channels_in: int, channels_out: int, groups: int):
        super().__init__()
        self.upsampling = Upsampler(channels_in, channels_out)
        self.basic_module = ResidualBlock(channels_out, channels_out, groups)

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        """Compute a volume of the shape of `skip` from the coarser volume x. Differentiable."""
        return self.basic_module(skip + self.upsampling(x, skip.shape[2:]))


class UNet3d(nn.Module):
    """U-Net with a final 1x1x1 convolution, and with a scalar affine map for the reconstruction.

    Args:
        in_channels: number of channels of the input (1 for a slab, p^3 for a slab whose blocks of p^3 voxels
            are channels).
        feature_maps: numbers of channels of the levels, finest first, for example (8, 16, 32, 64, 128, 256).
        out_channels: number of channels of the final convolution.
        groups: number of groups of every GroupNorm.

    Differentiable in: input and parameters. `conv1d_for_recon` is in the state dict of the checkpoints but is
    never used, so its gradient stays None.
    """

    def __init__(self, in_channels: int, feature_maps: Sequence[int], out_channels: int, groups: int):
        super().__init__()
        widths = list(feature_maps)
        level_count = len(widths)
        # Encoder k reads the channels of level k - 1, and the first encoder reads the input without pooling.
        self.encoders = nn.ModuleList(
            Encoder([in_channels, *widths][level], widths[level], groups, pool=level > 0)
            for level in range(level_count)
        )
        # From the coarsest to the finest level
        self.decoders = nn.ModuleList(
            Decoder(widths[level + 1], widths[level], groups) for level in reversed(range(level_count - 1))
        )
        self.final_conv = nn.Conv3d(widths[0], out_channels, kernel_size=1)
        self.conv1d_for_recon = nn.Conv1d(1, 1, kernel_size=1)
        self.conv3d_for_recon = nn.Conv3d(1, 1, kernel_size=1)
        # Published initialisation: the affine map starts as the identity with a small random offset.
        nn.init.ones_(self.conv3d_for_recon.weight)
        assert self.conv3d_for_recon.bias is not None
        nn.init.uniform_(self.conv3d_for_recon.bias, -0.005, 0.005)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the maps [N, C_out, D, H, W] and the coarsest volume [N, C_last, d, h, w].

        Args: x: input [N, C_in, D, H, W]; each of D, H, W must be at least 2^(levels - 1).
        """
        skip_volumes = []
        for encoder in self.encoders:
            x = encoder(x)
            # Each level's result is a skip connection, except for the coarsest one.
            skip_volumes.append(x)
        bottleneck = skip_volumes.pop()
        for decoder in self.decoders:
            x = decoder(x, skip_volumes.pop())
        return self.final_conv(x), bottleneck


# Pooling of a U-Net's maps to features: the paper's profile of maxima over slices, or means and maxima over
# the cells of a coarse grid.


def slice_windows(slice_count: int, bin_count: int) -> torch.Tensor:
    """Return the indices of the slices that each bin of an adaptive pool covers, int64 [bin_count, K].

    With D slices and B bins, bin i covers the slices i * D // B to ceil((i + 1) * D / B) - 1. K is the
    largest number of slices of a bin. Bins with fewer slices repeat their last slice.
    """
    # Integer arithmetic, which rounds exactly as AdaptiveMaxPool3d does.
    bin_index = torch.arange(bin_count)
    first_slice = bin_index * slice_count // bin_count
    last_slice = ((bin_index + 1) * slice_count + bin_count - 1) // bin_count - 1
    width = int((last_slice - first_slice).max()) + 1
    # A repeated slice does not change a maximum.
    return torch.minimum(first_slice[:, None] + torch.arange(width), last_slice[:, None])


def slice_max_feature(x: torch.Tensor, bin_count: int) -> torch.Tensor:
    """Compute the paper's global feature: the maximum of each slice along z, stretched to B values.

    [N, C, D, H, W] -> [N, B]. The result and its gradients equal those of AdaptiveMaxPool3d((B, 1, 1)),
    applied to the maximum over channels: a bin that covers two slices takes the larger maximum. The maxima of
    the D slices are computed first, because B (8192 in the paper) is much larger than D.

    Args:
        x: maps [N, C, D, H, W].
        bin_count: length B of the result.
    """
    profile = x.max(dim=1).values.flatten(2).max(dim=2).values  # [N, D], the largest response per depth slice
    windows = slice_windows(profile.shape[1], bin_count).to(x.device)  # [B, K]
    return profile[:, windows].max(dim=2).values


def grid_feature(x: torch.Tensor, cells: tuple[int, int, int]) -> torch.Tensor:
    """Compute the mean and the maximum of every channel in every cell of a coarse grid.

    [N, C, D, H, W] -> [N, 2 * C * K], where K is the number of cells. Differentiable in x. Unlike
    `slice_max_feature`, the result depends on the position of a response along y and x.

    Args:
        x: maps [N, C, D, H, W].
        cells: numbers of cells along z, y, x.
    """
    # As in every adaptive pool, cells overlap by a voxel if the number of voxels is not divisible.
    means = F.adaptive_avg_pool3d(x, cells)
    return torch.cat([means.flatten(1), F.adaptive_max_pool3d(x, cells).flatten(1)], dim=1)
