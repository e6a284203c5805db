"""Architectures and presets of the networks that read σ slabs (cropped density grids).

The preset `paper` is the network of arXiv 2606.27305. This module does not import torch, so that `--help` is
quick.

Shapes: D, H, W = grid points along z, y, x.
"""

import math
from dataclasses import dataclass, replace

from eg3d_rlhf.preferences.settings import LossWeights
from eg3d_rlhf.rewards import presets
from eg3d_rlhf.rewards.presets import Architecture, Preset
from training.config import check_choice


@dataclass(frozen=True, kw_only=True)
class RewardArch(Architecture):
    """Sizes of a slab network, which determine its parameters and its function.

    Raises: ValueError for a value outside its range.
    """

    # Number of channels of each U-Net level, finest first; each is below `groups` or divisible by it
    feature_maps: tuple[int, ...]
    groups: int = 8  # number of groups of every GroupNorm
    recon_channels: int = 4  # number of channels of the final convolution that reconstruct the slab
    feature_channels: int = 4  # number of further channels of the final convolution, pooled to the features
    # Edge in voxels of the blocks of a slab whose voxels become channels. The paper uses 1, and 2 takes an
    # eighth of the time.
    patch: int = 1
    input_scale: float = 1.0  # factor on the slab's values 0..100 before the first layer; the paper uses 1
    # Pooling of the U-Net's maps to features. 'slice_max', the paper's pooling, takes the maximum of each
    # slice along z. 'grid' takes mean and maximum over the cells of a grid, of the final and the coarsest
    # maps.
    pooling: str = "slice_max"
    pool_size: int = 8192  # for 'slice_max': length of the stretched profile of maxima
    final_cells: tuple[int, int, int] = (4, 4, 4)  # for 'grid': cells along z, y, x over the final maps
    bottleneck_cells: tuple[int, int, int] = (2, 2, 2)  # for 'grid': cells along z, y, x, coarsest maps
    # Feature extractor: 'unet3d' is the paper's U-Net, and 'strided' is StridedConv3d with feature_maps[0]
    # channels and without pooling
    extractor: str = "unet3d"
    slab_shape: tuple[int, ...] = ()  # for 'strided': the only slab shape (D, H, W) that the network reads
    dropout: float = 0.0  # for 'strided': share of features that are dropped during training, [0, 1)
    trunk: tuple[int, ...] = (512, 512)  # hidden sizes of the trunk
    embedding: int = 512  # length of the trunk's output, which all output heads read
    heads: tuple[int, ...] = (256, 128)  # hidden sizes of each of the three output heads

    def __post_init__(self):
        check_choice("RewardArch.pooling", self.pooling, ("slice_max", "grid"))
        check_choice("RewardArch.extractor", self.extractor, ("unet3d", "strided"))
        positive_sizes = (
            self.groups,
            self.recon_channels,
            self.feature_channels,
            self.patch,
            self.pool_size,
            self.embedding,
        )
        has_valid_shape = (
            len(self.slab_shape) == 3 if self.extractor == "strided" else len(self.feature_maps) >= 2
        )
        if min(positive_sizes) < 1 or not has_valid_shape or not 0 <= self.dropout < 1:
            raise ValueError(
                "RewardArch: expected sizes of at least 1, dropout in [0, 1), and three entries of slab_shape"
                " (for 'strided') or at least two entries of feature_maps (for 'unet3d'), got groups"
                f" {self.groups}, recon_channels {self.recon_channels}, feature_channels"
                f" {self.feature_channels}, patch {self.patch}, pool_size {self.pool_size}, embedding"
                f" {self.embedding}, dropout {self.dropout}, slab_shape {self.slab_shape} and feature_maps"
                f" {self.feature_maps} for {self.extractor!r}. Correct these values in the network of the"
                " reward's file."
            )

    @property
    def feature_size(self) -> int:
        """Length of the feature vector, which the trunk reads."""
        if self.extractor == "strided":
            # The convolution with kernel 4 halves each side n and rounds down, and the two convolutions with
            # kernel 3 halve it and round up. -(-a // 4) is a / 4 rounded up.
            return 4 * self.feature_maps[0] * math.prod(-(-(n // 2) // 4) for n in self.slab_shape)
        if self.pooling == "slice_max":
            return self.pool_size
        # Mean and maximum of every channel in every cell
        final_size = self.feature_channels * math.prod(self.final_cells)
        bottleneck_size = self.feature_maps[-1] * math.prod(self.bottleneck_cells)
        return 2 * (final_size + bottleneck_size)

    @property
    def smallest_side(self) -> int:
        """Smallest number of voxels of a slab along an axis, which gives the coarsest level one voxel."""
        return self.patch * 2 ** (len(self.feature_maps) - 1)


PAPER = RewardArch(feature_maps=(8, 16, 32, 64, 128, 256))
SMALL = RewardArch(
    feature_maps=(8, 16, 32),
    patch=2,
    input_scale=0.02,
    pooling="grid",
    feature_channels=8,
    trunk=(64, 64),
    embedding=64,
    heads=(32, 16),
)
HEADS = RewardArch(
    feature_maps=(8,),
    extractor="strided",
    slab_shape=(39, 45, 36),
    dropout=0.7,
    trunk=(64, 64),
    embedding=64,
    heads=(32, 16),
)
PRESETS = {
    # About 0.1 M parameters for the bundled generator, whose slabs have 39 x 45 x 36 points. For another
    # generator, `new_network` gives the network the shape of its slabs.
    "heads": Preset(
        network=HEADS.to_dict(),
        train={"epochs": 12, "patience": 12, "batch": 8, "lr": 1e-3, "weight_decay": 0.3, "decoupled": True},
        observe={"resolution": 64},
    ),
    "paper": Preset(  # 12,686,699 parameters, slabs 129 x 141 x 128
        network=PAPER.to_dict(),
        train={
            "epochs": 10,
            "patience": 10,
            "batch": 1,
            "lr": 1e-5,
            "cosine": False,
            "reference_samples": 1000,
            "mirror": False,
            "weights": LossWeights(),
        },
        observe={"resolution": 256},
    ),
    "small": Preset(network=SMALL.to_dict()),  # about 0.25 M parameters, slabs of about 33 x 36 x 32
    # SMALL with the paper's pooling
    "small-slice": Preset(
        network=replace(SMALL, pooling="slice_max", pool_size=256, feature_channels=4).to_dict()
    ),
    "tiny": Preset(
        network=replace(
            SMALL, feature_maps=(8, 16), feature_channels=4, trunk=(32, 32), embedding=32
        ).to_dict()
    ),
}
presets.PRESETS.add("sigma", PRESETS)
