"""PointNet++ (Qi et al. 2017, arXiv 1706.02413) as the published point reward has it: two set abstractions and a global one.

The published code starts its farthest points at a random one, so that its reward is noisy; here the start is fixed.
Letters: N clouds, C channels, P points, S centres, K neighbours, E edges from a centre to a neighbour.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from eg3d_rlhf.rewards.points.arch import PointArch, PointNetwork, norm, one_of
from eg3d_rlhf.rewards.points.neighbours import STARTS, ball, farthest_points, take


@dataclass(frozen=True, kw_only=True)
class PointNet2Arch(PointArch):
    """Defaults: 2,482,118 parameters."""

    network: ClassVar[str] = "pointnet2"
    ratios: tuple[float, float] = (0.5, 0.25)  # centres per point of each level, (0, 1]
    radii: tuple[float, float] = (0.2, 0.4)  # of the balls, in the observation's units
    limit: int = 64  # neighbours at most, those of lowest index
    first: tuple[int, ...] = (64, 64, 128)  # widths per edge, level 1
    second: tuple[int, ...] = (128, 128, 256)  # widths per edge, level 2
    whole: tuple[int, ...] = (256, 512, 1024)  # widths per centre of level 2
    start: str = "first"  # 'first' point of the cloud, or 'farthest' from its centroid, whatever the order

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("PointNet2Arch.start", self.start, STARTS)
        if len(self.ratios) != 2 or not all(0 < ratio <= 1 for ratio in self.ratios):
            raise ValueError(f"PointNet2Arch.ratios: expected two in (0, 1], got {self.ratios}. Correct them.")
        if len(self.radii) != 2 or not all(radius > 0 for radius in self.radii):
            raise ValueError(f"PointNet2Arch.radii: expected two above 0, got {self.radii}. Correct them.")


def layers(sizes: Sequence[int], kind: str) -> nn.Sequential:
    """Linear, normalisation, ReLU for each step from one size to the next, [E, C]."""
    pairs = zip(sizes[:-1], sizes[1:], strict=True)
    return nn.Sequential(*(layer for a, b in pairs for layer in (nn.Linear(a, b), norm(kind, b), nn.ReLU())))


class SetAbstraction(nn.Module):
    """Of every centre: the largest over its neighbours of layers on [features of the neighbour, where it lies from the centre]."""

    def __init__(self, ratio: float, radius: float, sizes: Sequence[int], arch: PointNet2Arch):
        super().__init__()
        self.ratio, self.radius, self.limit, self.start = ratio, radius, arch.limit, arch.start
        self.point_conv = nn.ModuleDict({"local_nn": layers(sizes, arch.norm)})  # as published names have it

    def forward(self, x: torch.Tensor | None, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features [N, C, P] or none, points [N, 3, P] -> features [N, C', S], centres [N, 3, S]."""
        chosen = farthest_points(points, math.ceil(self.ratio * points.shape[2]), self.start)
        centres = take(points, chosen)  # [N, 3, S]
        index, counts = ball(centres, points, self.radius, self.limit)  # [N, S, K], [N, S]
        real = torch.arange(index.shape[2], device=index.device) < counts[..., None]  # [N, S, K]
        near = take(points, index) - centres[..., None]  # [N, 3, S, K]
        if x is not None:
            near = torch.cat([take(x, index), near], dim=1)
        edges = self.point_conv["local_nn"](near.movedim(1, -1)[real])  # [E, C'], real ones alone: they are what a batch norm counts
        dense = edges.new_full((*real.shape, edges.shape[1]), -torch.inf).index_put((real,), edges)  # [N, S, K, C']
        return dense.amax(dim=2).transpose(1, 2), centres


class PointNet2Module(nn.Module):
    """Two levels and the maximum over what is left."""

    def __init__(self, arch: PointNet2Arch):
        super().__init__()
        self.affine_offset, self.affine_scale = nn.Parameter(torch.zeros(())), nn.Parameter(torch.ones(()))  # published, never used
        self.sa1_module = SetAbstraction(arch.ratios[0], arch.radii[0], (arch.inputs, *arch.first), arch)
        self.sa2_module = SetAbstraction(arch.ratios[1], arch.radii[1], (arch.first[-1] + 3, *arch.second), arch)
        self.sa3_module = nn.ModuleDict({"mlp": layers((arch.second[-1] + 3, *arch.whole), arch.norm)})

    def forward(self, cloud: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
        """Clouds [N, C, P] with positions [N, 3, P] -> [N, M]."""
        x, centres = self.sa1_module(cloud[:, 3:] if cloud.shape[1] > 3 else None, points)
        x, centres = self.sa2_module(x, centres)
        rows = torch.cat([x, centres], dim=1).transpose(1, 2)  # [N, S, C + 3]
        return self.sa3_module["mlp"](rows.flatten(0, 1)).unflatten(0, rows.shape[:2]).amax(dim=1)


class PointNet2(PointNetwork):
    """See the module."""

    def __init__(self, arch: PointNet2Arch | None = None):
        arch = arch or PointNet2Arch()
        super().__init__(arch.whole[-1], **arch.sizes)
        self.arch: PointNet2Arch = arch
        self.PointNet2Module = PointNet2Module(arch)

    def features(self, observed: torch.Tensor) -> torch.Tensor:
        """See `RewardNetwork`: clouds [N, C, P]."""
        return self.PointNet2Module(*self._read(observed))
