"""CurveNet (Xiang et al. 2021, arXiv 2105.01288) as the published point reward has it: blocks that walk curves over a cloud's features.

Letters: N clouds, C channels, P points, K neighbours, Q curves, T steps of a curve.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from eg3d_rlhf.rewards.points.arch import PointArch, PointNetwork, leaky, norm, one_of
from eg3d_rlhf.rewards.points.curves import CurveAggregation, CurveGrouping
from eg3d_rlhf.rewards.points.neighbours import STARTS, ball, farthest_points, nearest, take

Block = tuple[int, int, float, int, bool]  # channels, points, ball radius, bottleneck ratio, whether curves are walked
PUBLISHED: tuple[Block, ...] = (
    (64, 1024, 0.05, 2, True), (64, 1024, 0.05, 4, True), (128, 1024, 0.05, 2, True), (128, 1024, 0.1, 4, True),
    (256, 256, 0.1, 2, False), (256, 256, 0.2, 4, False), (512, 64, 0.2, 2, False), (512, 64, 0.4, 4, False),
)  # fmt: skip
MIXES = ("reshaped", "transposed")


@dataclass(frozen=True, kw_only=True)
class CurveNetArch(PointArch):
    """Defaults: 4,319,325 parameters, four layers that are never used among them."""

    network: ClassVar[str] = "curvenet"
    first: int = 32  # channels before the blocks
    blocks: tuple[Block, ...] = PUBLISHED
    last: int = 1024  # channels after the blocks
    k: int = 20  # neighbours
    curves: int = 100  # at most
    steps: int = 5  # points of a curve
    mix: str = "reshaped"  # 'reshaped' = the published slip, curves get each other's weights; 'transposed' = each curve its own
    start: str = "first"  # of farthest points: 'first' point of the cloud, or 'farthest' from its centroid, whatever the order

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("CurveNetArch.mix", self.mix, MIXES)
        one_of("CurveNetArch.start", self.start, STARTS)
        if not self.blocks or any(len(block) != 5 or block[0] % block[3] or block[2] <= 0 for block in self.blocks):
            raise ValueError(
                f"CurveNetArch.blocks: expected (channels, points, radius > 0, ratio, curves) with ratios that divide channels, got "
                f"{self.blocks}. Correct them."
            )


def conv(size_in: int, size_out: int, kind: str, axes: int = 1) -> nn.Sequential:
    """A convolution of width 1 without bias and its normalisation, over [N, C, P] or [N, C, P, K]."""
    layer = nn.Conv2d(size_in, size_out, 1, bias=False) if axes == 2 else nn.Conv1d(size_in, size_out, 1, bias=False)
    return nn.Sequential(layer, norm(kind, size_out, axes))


def surroundings(points: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """[p_i, p_j, p_j - p_i] of every point and its neighbours: [N, 3, P] -> [N, 9, P, K]."""
    near = take(points, index)  # [N, 3, P, K]
    here = points[..., None].expand_as(near)
    return torch.cat([here, near, near - here], dim=1)


class LocalAggregation(nn.Module):
    """Features of a point from those of its neighbours: at the start the largest, inside blocks the mean.

    Args: size_in: channels of features beside the position, at the start; size_out: channels.
    """

    def __init__(self, size_in: int, size_out: int, kind: str, initial: bool = False):
        super().__init__()
        if not initial:
            self.xyz2feature = conv(9, size_out, kind, 2)
        self.initial = initial
        self.mlp = nn.Sequential(conv(9 + size_in if initial else size_out, size_out, kind, 2))

    def forward(self, x: torch.Tensor | None, points: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Features [N, C, P] or none, points [N, 3, P], neighbours [N, P, K] -> [N, C', P]."""
        near = surroundings(points, index)  # [N, 9, P, K]
        if self.initial:
            return leaky(self.mlp(near if x is None else torch.cat([near, take(x, index)], dim=1))).amax(dim=3)
        assert x is not None
        return leaky(self.mlp(leaky(take(x, index) - x[..., None] + self.xyz2feature(near)))).mean(dim=3)


class CurveBlock(nn.Module):
    """A bottleneck with a shortcut: fewer points, then curves, then neighbours."""

    def __init__(self, size_in: int, block: Block, arch: CurveNetArch):
        super().__init__()
        size_out, self.points, self.radius, ratio, curves = block
        self.k, self.start = arch.k, arch.start
        width = size_in // ratio
        if curves:
            self.curveaggregation = CurveAggregation(width, arch.norm)
            self.curvegrouping = CurveGrouping(width, arch.curves, arch.steps, arch.mix, arch.norm)
        self.curves = curves
        self.conv1, self.conv2 = conv(size_in, width, arch.norm), conv(width, size_out, arch.norm)
        self.shortcut = conv(size_in, size_out, arch.norm) if size_in != size_out else nn.Identity()
        self.lpfa = LocalAggregation(width, width, arch.norm)

    def forward(self, x: torch.Tensor, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features [N, C, P], points [N, 3, P] -> features [N, C', P'], points [N, 3, P']."""
        if self.points < points.shape[2]:
            centres = take(points, farthest_points(points, self.points, self.start))
            x, points = take(x, ball(centres, points, self.radius, self.k)[0]).amax(dim=3), centres
        shortcut = self.shortcut(x)
        x = leaky(self.conv1(x))
        index = nearest(points, self.k + 1)  # itself the first
        if self.curves:
            x = self.curveaggregation(x, self.curvegrouping(x, index[:, :, 1:]))
        return leaky(self.conv2(self.lpfa(x, points, index[:, :, : self.k])) + shortcut), points


class CurveNetModule(nn.Module):
    """A first aggregation, the blocks, and the maximum and mean over what is left."""

    def __init__(self, arch: CurveNetArch):
        super().__init__()
        self.k = arch.k
        self.lpfa = LocalAggregation(arch.inputs - 3, arch.first, arch.norm, initial=True)
        sizes: Sequence[int] = (arch.first, *(block[0] for block in arch.blocks))
        self.names = [f"cic{i // 2 + 1}{i % 2 + 1}" for i in range(len(arch.blocks))]
        for name, size, block in zip(self.names, sizes, arch.blocks, strict=False):
            self.add_module(name, CurveBlock(size, block, arch))
        self.conv0 = conv(sizes[-1], arch.last, arch.norm)
        if arch.norm == "batch":  # of a classifier, in published state dicts, never used
            self.conv1, self.conv2 = nn.Linear(2 * arch.last, 512, bias=False), nn.Linear(512, 1)
            self.bn1 = nn.BatchNorm1d(512)

    def forward(self, cloud: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
        """Clouds [N, C, P] with positions [N, 3, P] -> [N, 2 * last]."""
        x = self.lpfa(cloud[:, 3:] if cloud.shape[1] > 3 else None, points, nearest(points, self.k))
        for name in self.names:
            x, points = self.get_submodule(name)(x, points)
        x = F.relu(self.conv0(x))
        return torch.cat([x.amax(dim=2), x.mean(dim=2)], dim=1)


class CurveNet(PointNetwork):
    """See the module. A batch of one is scored like any other, where the published code fails."""

    def __init__(self, arch: CurveNetArch | None = None):
        arch = arch or CurveNetArch()
        super().__init__(2 * arch.last, **arch.sizes)
        self.arch: CurveNetArch = arch
        self.CurveNetModule = CurveNetModule(arch)

    def features(self, observed: torch.Tensor) -> torch.Tensor:
        """See `RewardNetwork`: clouds [N, C, P]."""
        return self.CurveNetModule(*self._read(observed))
