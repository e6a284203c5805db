"""Residual squeeze-and-excitation 3-D U-Net on a density slab. Names match published checkpoints.

Sources: U-Net in 3-D (Cicek 2016, arXiv 1606.06650), residual blocks with summation joining (Lee 2017, arXiv
1706.00120), concurrent spatial and channel squeeze-and-excitation, joined by maximum (Roy 2018, arXiv
1803.02579), group normalisation (Wu 2018, arXiv 1803.08494).

Shape letters: N samples, C channels, D, H, W = z, y, x (see eg3d_rlhf/core/shapes.py).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn


class ScSE(nn.Module):
    """Concurrent channel and voxel gates, joined by the elementwise maximum: out = max(h * g, h * s).

    cSE: one gate per channel, g = sigmoid(fc2(relu(fc1(mean over z, y, x)))), with reduction ratio 1.
    sSE: one gate per voxel, s = sigmoid(1x1x1 convolution to one channel).
    """

    def __init__(self, channels: int):
        super().__init__()
        # Names of published state dicts.
        self.cSE = nn.ModuleDict({name: nn.Linear(channels, channels) for name in ("fc1", "fc2")})
        self.sSE = nn.ModuleDict({"conv": nn.Conv3d(channels, 1, kernel_size=1)})

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """Apply both gates to [N, C, D, H, W]. Differentiable."""
        # g: [N, C, 1, 1, 1]
        g = torch.sigmoid(self.cSE["fc2"](F.relu(self.cSE["fc1"](h.mean(dim=(2, 3, 4))))))[
            :, :, None, None, None
        ]
        # h is not negative after its ReLU, so this equals h * max(g, s).
        return torch.maximum(h * g, h * torch.sigmoid(self.sSE["conv"](h)))


class NormConv(nn.Module):
    """GroupNorm, followed by a 3x3x3 convolution without bias.

    With fewer channels than groups, there is one group, as in the published checkpoints.
    """

    def __init__(self, channels: int, groups: int):
        super().__init__()
        # For example, 4 channels cannot be divided into 8 groups.
        groups = 1 if channels < groups else groups
        if channels % groups:
            raise ValueError(
                f"NormConv: expected channels that are divisible by {groups} groups, got {channels}. Change"
                " feature_maps or groups."
            )
        self.groupnorm = nn.GroupNorm(groups, channels, eps=1e-5)
        self.conv = nn.Conv3d(channels, channels, kernel_size=3, padding=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [N, C, D, H, W] of the same shape. Differentiable."""
        return self.conv(self.groupnorm(x))


class ResidualBlock(nn.Module):
    """Residual block: r = conv1(x); h = relu(r + conv3(norm(relu(conv2(norm(r)))))); out = scSE(h).

    The residual is r, not x. conv1 is a 1x1x1 convolution with bias if the number of channels changes, and it
    is absent (without parameters) otherwise.
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
        # The first activation belongs to conv2; the second one follows the sum with the residual.
        h = F.relu(self.conv2(r))
        return self.se_module(F.relu(self.conv3(h) + r))


class Encoder(nn.Module):
    """Optional max-pooling by 2, where an odd side loses its last voxel, followed by a residual block."""

    def __init__(self, channels_in: int, channels_out: int, groups: int, pool: bool):
        super().__init__()
        self.pool = pool
        self.basic_module = ResidualBlock(channels_in, channels_out, groups)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [N, C_in, D, H, W] to [N, C_out, D', H', W'], halved if `pool` is true. Differentiable."""
        return self.basic_module(F.max_pool3d(x, 2) if self.pool else x)


class Upsampler(nn.Module):
    """Transposed convolution n -> 2n - 1, followed by nearest-neighbour resampling to the skip's size.

    The source of index i is i * in // out.
    """

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        convolution = nn.ConvTranspose3d(
            channels_in, channels_out, kernel_size=3, stride=2, padding=1, bias=False
        )
        # The dictionary adds the level of names that published state dicts have.
        self.upsample = nn.ModuleDict({"conv_transposed": convolution})

    def forward(self, x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        """Map [N, C_in, d, h, w] to [N, C_out, *size]. Differentiable."""
        return F.interpolate(self.upsample["conv_transposed"](x), size=tuple(size), mode="nearest")


class Decoder(nn.Module):
    """Upsampling, sum with the skip (no concatenation), and a residual block without conv1."""

    def __init__(self, channels_in: int, channels_out: int, groups: int):
        super().__init__()
        self.upsampling = Upsampler(channels_in, channels_out)
        self.basic_module = ResidualBlock(channels_out, channels_out, groups)

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        """Return a volume of the skip's shape. Differentiable."""
        return self.basic_module(skip + self.upsampling(x, skip.shape[2:]))


class UNet3d(nn.Module):
    """U-Net with its final 1x1x1 convolution, and the scalar affine of the reconstruction.

    Args:
        in_channels: channels of the input (1 for a slab, p^3 for a slab that is cut into p^3 patches).
        feature_maps: channels per level, finest first, for example (8, 16, 32, 64, 128, 256).
        out_channels: channels of the final convolution.
        groups: groups of every GroupNorm.

    Differentiable in: input and parameters. `conv1d_for_recon` is in the checkpoints' state dict and never
    used, so its gradient stays None.
    """

    def __init__(self, in_channels: int, feature_maps: Sequence[int], out_channels: int, groups: int):
        super().__init__()
        f = list(feature_maps)
        self.encoders = nn.ModuleList(
            Encoder([in_channels, *f][k], f[k], groups, pool=k > 0) for k in range(len(f))
        )
        self.decoders = nn.ModuleList(Decoder(f[k + 1], f[k], groups) for k in reversed(range(len(f) - 1)))
        self.final_conv = nn.Conv3d(f[0], out_channels, kernel_size=1)
        self.conv1d_for_recon = nn.Conv1d(1, 1, kernel_size=1)
        self.conv3d_for_recon = nn.Conv3d(1, 1, kernel_size=1)
        # Published initialisation: the affine starts as the identity with a small random offset.
        nn.init.ones_(self.conv3d_for_recon.weight)
        assert self.conv3d_for_recon.bias is not None
        nn.init.uniform_(self.conv3d_for_recon.bias, -0.005, 0.005)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map x [N, C_in, D, H, W] to maps [N, C_out, D, H, W] and the coarsest volume [N, C_last, d, h, w].

        Each side of x must be at least 2^(levels - 1).
        """
        skips = []
        for encoder in self.encoders:
            x = encoder(x)
            # Each level's result is a skip connection, except for the coarsest one.
            skips.append(x)
        bottleneck = skips.pop()
        for decoder in self.decoders:
            x = decoder(x, skips.pop())
        return self.final_conv(x), bottleneck


# Pooling of a U-Net's maps to features: the paper's profile of slices, or means and maxima over cells.


def slice_windows(slices: int, bins: int) -> torch.Tensor:
    """Return the slices that each bin of an adaptive pool covers, as int64 [bins, K].

    Bin i covers i * D // bins ... ceil((i + 1) * D / bins) - 1. Shorter bins repeat their last slice.
    """
    # Integer arithmetic, which rounds exactly as AdaptiveMaxPool3d does.
    i = torch.arange(bins)
    first = i * slices // bins
    last = ((i + 1) * slices + bins - 1) // bins - 1
    width = int((last - first).max()) + 1
    # A repeated slice does not change a maximum.
    return torch.minimum(first[:, None] + torch.arange(width), last[:, None])


def slice_max_feature(x: torch.Tensor, bins: int) -> torch.Tensor:
    """Compute the paper's global feature: the profile of slices along z, stretched to `bins` values.

    [N, C, D, H, W] -> [N, bins]. The result equals AdaptiveMaxPool3d((bins, 1, 1)) of the channel maximum,
    including gradients: a bin that covers two slices takes the larger one, and passes its gradient there.
    With 129 slices there are at most 129 different values, so no pool of 8192 cells is computed.
    """
    profile = x.max(dim=1).values.flatten(2).max(dim=2).values  # [N, D], the largest response per depth slice
    windows = slice_windows(profile.shape[1], bins).to(x.device)  # [bins, K]
    return profile[:, windows].max(dim=2).values


def grid_feature(x: torch.Tensor, cells: tuple[int, int, int]) -> torch.Tensor:
    """Compute mean and maximum of every channel in every cell of a coarse z, y, x grid.

    [N, C, D, H, W] -> [N, 2 * C * cells]. Differentiable in x. It keeps where a response lies along y and x,
    which the profile of slices discards.
    """
    # Cells may overlap by a voxel if a side is not divisible, as in every adaptive pool.
    means = F.adaptive_avg_pool3d(x, cells)
    return torch.cat([means.flatten(1), F.adaptive_max_pool3d(x, cells).flatten(1)], dim=1)
