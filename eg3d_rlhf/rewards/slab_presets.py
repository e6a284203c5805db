"""Architectures of the networks that read σ slabs, and their presets; imports no torch.

Letters: D, H, W = z, y, x.
"""

import math
from dataclasses import dataclass, replace

from eg3d_rlhf.preferences.settings import LossWeights
from eg3d_rlhf.rewards import presets
from eg3d_rlhf.rewards.presets import Architecture, Preset
from training.config import check_choice


@dataclass(frozen=True, kw_only=True)
class RewardArch(Architecture):
    """Everything that decides the parameters' names and shapes, and the function they compute."""

    # channels per U-Net level, finest first; each divisible by `groups` or below it
    feature_maps: tuple[int, ...]
    groups: int = 8  # groups of every GroupNorm
    recon_channels: int = 4  # first channels of the final convolution, for the reconstruction
    feature_channels: int = 4  # the channels after them, for the feature
    # the slab is cut into patch^3 voxels that become channels; 1 = the paper's, 2 is 8 times cheaper
    patch: int = 1
    input_scale: float = 1.0  # factor on the slab's [0, 100] before the first layer; 1 = the paper's
    # 'slice_max' = the paper's profile along z; 'grid' = mean and max over cells of final and bottleneck maps
    pooling: str = "slice_max"
    pool_size: int = 8192  # 'slice_max': length of the stretched profile
    final_cells: tuple[int, int, int] = (4, 4, 4)  # 'grid': cells along z, y, x over the final maps
    bottleneck_cells: tuple[int, int, int] = (2, 2, 2)  # 'grid': the same over the coarsest encoder maps
    # 'unet3d' = the paper's; 'strided' = see StridedConv3d, feature_maps[0] channels, pooling unused
    extractor: str = "unet3d"
    slab_shape: tuple[int, ...] = ()  # 'strided': the one slab shape (D, H, W) it reads
    dropout: float = 0.0  # 'strided': share of features dropped in training, [0, 1)
    trunk: tuple[int, ...] = (512, 512)  # hidden sizes of the trunk
    embedding: int = 512  # length of the trunk's output, which all heads read
    heads: tuple[int, ...] = (256, 128)  # hidden sizes of each of the three heads

    def __post_init__(self):
        check_choice("RewardArch.pooling", self.pooling, ("slice_max", "grid"))
        check_choice("RewardArch.extractor", self.extractor, ("unet3d", "strided"))
        sizes = (
            self.groups,
            self.recon_channels,
            self.feature_channels,
            self.patch,
            self.pool_size,
            self.embedding,
        )
        shaped = len(self.slab_shape) == 3 if self.extractor == "strided" else len(self.feature_maps) >= 2
        if min(sizes) < 1 or not shaped or not 0 <= self.dropout < 1:
            raise ValueError(
                "RewardArch: expected sizes from 1, a slab's shape or two levels, dropout below 1, got"
                f" {self}. Correct it."
            )

    @property
    def feature_size(self) -> int:
        """Length of the pooled feature vector, the trunk's input."""
        if self.extractor == "strided":
            # flattened
            return 4 * self.feature_maps[0] * math.prod(-(-(n // 2) // 4) for n in self.slab_shape)
        if self.pooling == "slice_max":
            return self.pool_size
        cells = [a * b * c for a, b, c in (self.final_cells, self.bottleneck_cells)]
        return 2 * (self.feature_channels * cells[0] + self.feature_maps[-1] * cells[1])

    @property
    def smallest_side(self) -> int:
        """Least number of voxels that a slab must have along each axis."""
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
    # about 0.1 M parameters, heads of the bundled generator from brow to nape without shoulders: slabs of 39
    # x 45 x 36
    "heads": Preset(
        network=HEADS.to_dict(),
        train={"epochs": 12, "patience": 12, "batch": 8, "lr": 1e-3, "weight_decay": 0.3, "decoupled": True},
        observe={"resolution": 64, "crop": (0.22, 0.22, 0.20, 0.12, 0.10, 0.30)},
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
    # the paper's pooling
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
