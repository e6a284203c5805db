"""PointNet (Qi et al. 2017, arXiv 1612.00593) as the published point reward has it: no transform nets, softplus, maximum over points.

Letters: N clouds, C channels, P points.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from eg3d_rlhf.rewards.points.arch import PointArch, PointNetwork, norm, one_of


@dataclass(frozen=True, kw_only=True)
class PointNetArch(PointArch):
    """Defaults: 1,817,476 parameters."""

    network: ClassVar[str] = "pointnet"
    widths: tuple[int, int, int] = (64, 128, 1024)  # channels per point
    pool: str = "max"  # 'max' = the published; 'max-mean' joins the mean, through which every point gets a gradient

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("PointNetArch.pool", self.pool, ("max", "max-mean"))
        if len(self.widths) != 3:
            raise ValueError(f"PointNetArch.widths: expected three widths, got {self.widths}. Name three.")


class PointNet(PointNetwork):
    """Three layers on each point by itself, then what is largest over points."""

    def __init__(self, arch: PointNetArch | None = None):
        arch = arch or PointNetArch()
        super().__init__(arch.widths[-1] * (2 if arch.pool == "max-mean" else 1), **arch.sizes)
        self.arch: PointNetArch = arch
        a, b, c = arch.widths
        self.conv1, self.conv2, self.conv3 = nn.Conv1d(arch.inputs, a, 1), nn.Conv1d(a, b, 1), nn.Conv1d(b, c, 1)
        self.bn1, self.bn2, self.bn3 = (norm(arch.norm, width) for width in arch.widths)

    def features(self, observed: torch.Tensor) -> torch.Tensor:
        """See `RewardNetwork`: clouds [N, C, P]."""
        x, _ = self._read(observed)
        for layer, normalise in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = F.softplus(normalise(layer(x)))
        largest = x.max(dim=2).values
        return torch.cat([largest, x.mean(dim=2)], dim=1) if self.arch.pool == "max-mean" else largest
