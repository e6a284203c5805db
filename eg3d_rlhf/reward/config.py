"""Architecture of a reward network as one frozen record, and the presets that the command line offers by name."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace

from eg3d_rlhf.reward.strided import strided_feature_size

POOLINGS = ("slice_max", "grid")
EXTRACTORS = ("unet3d", "strided")


@dataclass(frozen=True, kw_only=True)
class RewardArch:
    """Everything that decides the parameters' names and shapes, and the function they compute."""

    feature_maps: tuple[int, ...]  # channels per U-Net level, finest first; each divisible by `groups` or below it
    groups: int = 8  # groups of every GroupNorm
    recon_channels: int = 4  # first channels of the final convolution, for the reconstruction
    feature_channels: int = 4  # the channels after them, for the feature
    patch: int = 1  # the slab is cut into patch^3 voxels that become channels; 1 = the paper's, 2 is 8 times cheaper
    input_scale: float = 1.0  # factor on the slab's [0, 100] before the first layer; 1 = the paper's
    pooling: str = "slice_max"  # 'slice_max' = the paper's profile along z; 'grid' = mean and max over cells of final and bottleneck maps
    pool_size: int = 8192  # 'slice_max': length of the stretched profile
    final_cells: tuple[int, int, int] = (4, 4, 4)  # 'grid': cells along z, y, x over the final maps
    bottleneck_cells: tuple[int, int, int] = (2, 2, 2)  # 'grid': the same over the coarsest encoder maps
    extractor: str = "unet3d"  # 'unet3d' = the paper's; 'strided' = see strided.py, feature_maps[0] channels, pooling unused
    slab_shape: tuple[int, ...] = ()  # 'strided': the one slab shape (D, H, W) it reads
    dropout: float = 0.0  # 'strided': share of features dropped in training, [0, 1)
    members: int = 1  # networks trained apart whose scores are averaged, see ensemble.py
    trunk: tuple[int, ...] = (512, 512)  # hidden sizes of the trunk
    embedding: int = 512  # length of the trunk's output, which all heads read
    heads: tuple[int, ...] = (256, 128)  # hidden sizes of each of the three heads

    def __post_init__(self):
        if self.pooling not in POOLINGS:
            raise ValueError(f"RewardArch.pooling: expected one of {', '.join(POOLINGS)}, got {self.pooling!r}. Choose one of them.")
        if self.extractor not in EXTRACTORS:
            raise ValueError(f"RewardArch.extractor: expected one of {', '.join(EXTRACTORS)}, got {self.extractor!r}. Choose one of them.")
        if self.extractor == "strided" and len(self.slab_shape) != 3:
            raise ValueError(f"RewardArch.slab_shape: expected (D, H, W) for the strided extractor, got {self.slab_shape}. Name the slab.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"RewardArch.dropout: expected a share in [0, 1), got {self.dropout}. Lower it.")
        if self.extractor == "unet3d" and len(self.feature_maps) < 2:
            raise ValueError(f"RewardArch.feature_maps: expected two or more levels, got {self.feature_maps}. Add a level.")
        for name in ("groups", "recon_channels", "feature_channels", "patch", "pool_size", "members", "embedding"):
            if getattr(self, name) < 1:
                raise ValueError(f"RewardArch.{name}: expected at least 1, got {getattr(self, name)}. Raise it.")

    @property
    def feature_size(self) -> int:
        """Length of the pooled feature vector, the trunk's input."""
        if self.extractor == "strided":
            return strided_feature_size(self.feature_maps[0], self.slab_shape)
        if self.pooling == "slice_max":
            return self.pool_size
        cells = [a * b * c for a, b, c in (self.final_cells, self.bottleneck_cells)]
        return 2 * (self.feature_channels * cells[0] + self.feature_maps[-1] * cells[1])

    @property
    def smallest_side(self) -> int:
        """Least number of voxels that a slab must have along each axis."""
        return self.patch * 2 ** (len(self.feature_maps) - 1)

    def to_dict(self) -> dict:
        """Plain JSON types."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping) -> "RewardArch":
        """Inverse of `to_dict`. Raises ValueError on unknown or missing fields."""
        names = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - names)
        if unknown or "feature_maps" not in values:
            found = f"unknown fields {unknown}" if unknown else "no feature_maps"
            raise ValueError(f"RewardArch.from_dict: expected fields {sorted(names)}, got {found}. Is the file from a later version?")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


PAPER = RewardArch(feature_maps=(8, 16, 32, 64, 128, 256))
SMALL = RewardArch(
    feature_maps=(8, 16, 32), patch=2, input_scale=0.02, pooling="grid", feature_channels=8, trunk=(64, 64), embedding=64, heads=(32, 16)
)
HEADS = RewardArch(
    feature_maps=(8,), extractor="strided", slab_shape=(27, 37, 38), dropout=0.7, trunk=(64, 64), embedding=64, heads=(32, 16)
)
PRESETS: dict[str, RewardArch] = {
    "heads": HEADS,  # about 0.1 M parameters, slabs 27 x 37 x 38 of the bundled heads
    "paper": PAPER,  # 12,686,699 parameters, slabs 129 x 141 x 128
    "small": SMALL,  # about 0.25 M parameters, slabs of about 33 x 36 x 32
    "small-slice": replace(SMALL, pooling="slice_max", pool_size=256, feature_channels=4),  # small, with the paper's pooling
    "tiny": replace(SMALL, feature_maps=(8, 16), bottleneck_cells=(2, 2, 2), feature_channels=4, trunk=(32, 32), embedding=32),
}


def preset(name: str) -> RewardArch:
    """The architecture called `name`. Raises ValueError with the list of names."""
    if name not in PRESETS:
        raise ValueError(f"reward preset: expected one of {', '.join(PRESETS)}, got {name!r}. Choose one of them.")
    return PRESETS[name]
