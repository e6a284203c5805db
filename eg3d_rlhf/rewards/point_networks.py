"""Networks that read point clouds: PointNet, PointNet++ and CurveNet as published, and our variants of them.

Our variants correct faults of the published ones. They normalise each point separately (a score depends on no
other sample, and a batch may contain one), start farthest-point sampling at the point farthest from the
centroid, which does not depend on the order of the points, and mix CurveNet's curves with the curves' own
weights.
Letters: N clouds, C channels, P points, K neighbours, Q curves, T steps of a curve, S centres, E edges, M
features.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from eg3d_rlhf.preferences.settings import LossWeights
from eg3d_rlhf.rewards.point_layers import (
    STARTS,
    PointArch,
    PointNetwork,
    ball,
    farthest_points,
    leaky,
    nearest,
    norm,
    take,
)
from eg3d_rlhf.rewards.presets import Preset
from training.config import check_choice

# CurveNet (Xiang et al. 2021, arXiv 2105.01288) as in the published point reward: blocks that walk curves
# over a cloud's features. First come the curves: their first points, the steps from neighbour to neighbour,
# and how points read them.

_EPS = 1e-8  # least product of norms in a cosine, which avoids a division by 0


class Walk(nn.Module):
    """Walk from point to neighbour by a hard choice, with the gradient of its softmax."""

    def __init__(self, channels: int, steps: int, mix: str, kind: str):
        super().__init__()
        self.steps = steps
        self.mix = mix
        self.agent_mlp = nn.Sequential(nn.Conv2d(2 * channels, 1, 1, bias=False), norm(kind, 1, 2))
        self.momentum_mlp = nn.Sequential(nn.Conv1d(2 * channels, 2, 1, bias=False), norm(kind, 2))

    def _mixed(self, current: torch.Tensor, descriptor: torch.Tensor) -> torch.Tensor:
        """Mix the curves' descriptor with their current features, [N, C, Q] each."""
        weights = F.softmax(self.momentum_mlp(torch.cat([current, descriptor], dim=1)), dim=1)  # [N, 2, Q]
        # As published: curve i reads the flat entries 2i and 2i + 1, which belong to other curves.
        if self.mix == "reshaped":
            weights = weights.reshape(len(weights), -1, 2).transpose(1, 2)
        return weights[:, :1] * current + weights[:, 1:] * descriptor

    def forward(self, x: torch.Tensor, index: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        """Compute features along the curves, [N, C, Q, T].

        Args: x: features [N, C, P]; index: neighbours of each point without the point itself [N, P, K];
            start: the curves' first points [N, Q].
        """
        place = start  # [N, Q]
        current = take(x, start)  # [N, C, Q]
        descriptor = current
        curve = []
        for step in range(self.steps):
            # In the first step, descriptor and features are equal.
            if step:
                descriptor = self._mixed(current, descriptor)
            choices = index.gather(1, place[..., None].expand(-1, -1, index.shape[2]))  # [N, Q, K]
            near = take(x, choices)  # [N, C, Q, K]
            # [N, Q, K]
            logits = self.agent_mlp(torch.cat([near, descriptor[..., None].expand_as(near)], dim=1)).squeeze(
                1
            )
            # The first step has no direction that could turn back.
            if step:
                logits = logits * onward(current - descriptor, near - current[..., None])
            soft = F.softmax(logits, dim=2)
            best = logits.argmax(dim=2, keepdim=True)  # [N, Q, 1]
            # Straight-through estimator: the value is one-hot, the gradient is that of the softmax.
            hard = torch.zeros_like(soft).scatter(2, best, 1.0) - soft.detach() + soft
            current = (near * hard[:, None]).sum(dim=3)
            place = choices.gather(2, best).squeeze(2)
            curve.append(current)
        return torch.stack(curve, dim=3)


@torch.no_grad()
def onward(direction: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Compute factors [N, Q, K] in 0..1 that keep curves from turning back.

    They are 1 + the cosine between the last step [N, C, Q] and the next one [N, C, Q, K], clamped to 0..1.
    """
    dot = (direction[..., None] * steps).sum(dim=1)
    return (1 + dot / (direction.norm(dim=1)[..., None] * steps.norm(dim=1)).clamp_min(_EPS)).clamp(0, 1)


class CurveGrouping(nn.Module):
    """Curves that begin at the points with the largest attention."""

    def __init__(self, channels: int, curves: int, steps: int, mix: str, kind: str):
        super().__init__()
        self.curves = curves
        self.att = nn.Conv1d(channels, 1, 1, bias=False)
        self.walk = Walk(channels, steps, mix, kind)

    def forward(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Compute curves [N, C, Q, T] of features [N, C, P], with neighbours [N, P, K] without the point
        itself.

        With the published mix, the order of the first points changes the result. It is the unsorted order of
        topk.
        """
        attention = torch.sigmoid(self.att(x))  # [N, 1, P]
        start = attention.squeeze(1).topk(min(self.curves, x.shape[2]), dim=1, sorted=False).indices
        return self.walk(x * attention, index, start)


class CurveAggregation(nn.Module):
    """Dot-product attention of points to the curves' means over steps and over curves."""

    def __init__(self, channels: int, kind: str):
        super().__init__()
        half = channels // 2
        self.conva, self.convb, self.convc = (nn.Conv1d(channels, half, 1, bias=False) for _ in range(3))
        self.convn, self.convl = (nn.Conv1d(half, half, 1, bias=False) for _ in range(2))
        self.convd = nn.Sequential(nn.Conv1d(2 * half, channels, 1, bias=False), norm(kind, channels))
        self.line_conv_att = nn.Conv2d(channels, 1, 1, bias=False)

    def forward(self, x: torch.Tensor, curves: torch.Tensor) -> torch.Tensor:
        """Update features [N, C, P] with curves [N, C, Q, T]; returns [N, C, P]."""
        # One attention map, normalised along each curve and across the curves at each step
        attention = self.line_conv_att(curves)  # [N, 1, Q, T]
        each = self.conva((curves * F.softmax(attention, dim=3)).sum(dim=3))  # [N, C/2, Q]
        across = self.convb((curves * F.softmax(attention, dim=2)).sum(dim=2))  # [N, C/2, T]
        query = self.convc(x).transpose(1, 2)  # [N, P, C/2]
        read = [
            self_values(keys).matmul(F.softmax(query @ keys, dim=2).transpose(1, 2))  # [N, C/2, P]
            for keys, self_values in ((each, self.convn), (across, self.convl))
        ]
        return leaky(x + self.convd(torch.cat(read, dim=1)))


# channels, number of points, ball radius, bottleneck ratio, whether the block walks curves
Block = tuple[int, int, float, int, bool]
PUBLISHED: tuple[Block, ...] = (
    (64, 1024, 0.05, 2, True),
    (64, 1024, 0.05, 4, True),
    (128, 1024, 0.05, 2, True),
    (128, 1024, 0.1, 4, True),
    (256, 256, 0.1, 2, False),
    (256, 256, 0.2, 4, False),
    (512, 64, 0.2, 2, False),
    (512, 64, 0.4, 4, False),
)
MIXES = ("reshaped", "transposed")  # see CurveNetArch.mix


@dataclass(frozen=True, kw_only=True)
class CurveNetArch(PointArch):
    """Sizes of a CurveNet.

    The defaults have 4,319,325 parameters, including four layers that are never used.
    """

    network: ClassVar[str] = "curvenet"
    first: int = 32  # channels before the blocks
    blocks: tuple[Block, ...] = PUBLISHED
    last: int = 1024  # channels after the blocks
    k: int = 20  # neighbours
    curves: int = 100  # at most; not more than there are points
    steps: int = 5  # points of a curve
    # 'reshaped' is the published error, by which curves get each other's weights; 'transposed' corrects it
    mix: str = "reshaped"
    # First point of the farthest-point sampling: 'first' of the cloud, or 'farthest' from its centroid, which
    # does not depend on the order of the points
    start: str = "first"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("CurveNetArch.mix", self.mix, MIXES)
        check_choice("CurveNetArch.start", self.start, STARTS)
        if not self.blocks or any(
            len(block) != 5 or block[2] <= 0 or block[3] < 1 or block[0] % block[3] for block in self.blocks
        ):
            expected = "(channels, points, radius > 0, ratio, curves) with ratios that divide channels"
            raise ValueError(
                f"CurveNetArch.blocks: expected {expected}, got {self.blocks}. Correct the blocks in the"
                " reward's file."
            )


def conv(size_in: int, size_out: int, kind: str, axes: int = 1) -> nn.Sequential:
    """Create a convolution of width 1 without bias, with normalisation, over [N, C, P] or [N, C, P, K]."""
    layer = (
        nn.Conv2d(size_in, size_out, 1, bias=False)
        if axes == 2
        else nn.Conv1d(size_in, size_out, 1, bias=False)
    )
    return nn.Sequential(layer, norm(kind, size_out, axes))


def surroundings(points: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Compute [p_i, p_j, p_j - p_i] for every point and its neighbours: [N, 3, P] -> [N, 9, P, K]."""
    near = take(points, index)  # [N, 3, P, K]
    here = points[..., None].expand_as(near)
    return torch.cat([here, near, near - here], dim=1)


class LocalAggregation(nn.Module):
    """Features of points from neighbours: maximum at the start, mean inside blocks."""

    def __init__(self, size_in: int, size_out: int, kind: str, initial: bool = False):
        super().__init__()
        if not initial:
            self.xyz2feature = conv(9, size_out, kind, 2)
        self.initial = initial
        self.mlp = nn.Sequential(conv(9 + size_in if initial else size_out, size_out, kind, 2))

    def forward(self, x: torch.Tensor | None, points: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Compute features [N, C', P].

        Args: x: features [N, C, P], or None if points have only positions; points: [N, 3, P]; index:
            neighbours [N, P, K].
        """
        near = surroundings(points, index)  # [N, 9, P, K]
        if self.initial:
            return leaky(self.mlp(near if x is None else torch.cat([near, take(x, index)], dim=1))).amax(
                dim=3
            )
        # Differences to the centre's features, plus an encoding of the positions
        assert x is not None
        return leaky(self.mlp(leaky(take(x, index) - x[..., None] + self.xyz2feature(near)))).mean(dim=3)


class CurveBlock(nn.Module):
    """Bottleneck with a shortcut: fewer points, then curves, then neighbours."""

    def __init__(self, size_in: int, block: Block, arch: CurveNetArch):
        super().__init__()
        size_out, self.points, self.radius, ratio, curves = block
        self.k = arch.k
        self.start = arch.start
        width = size_in // ratio
        if curves:
            self.curveaggregation = CurveAggregation(width, arch.norm)
            self.curvegrouping = CurveGrouping(width, arch.curves, arch.steps, arch.mix, arch.norm)
        self.curves = curves
        self.conv1 = conv(size_in, width, arch.norm)
        self.conv2 = conv(width, size_out, arch.norm)
        self.shortcut = conv(size_in, size_out, arch.norm) if size_in != size_out else nn.Identity()
        self.lpfa = LocalAggregation(width, width, arch.norm)

    def forward(self, x: torch.Tensor, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map features [N, C, P] at points [N, 3, P] to features [N, C', P'] at points [N, 3, P']."""
        # Max-pool over a ball around each of fewer points
        if self.points < points.shape[2]:
            centres = take(points, farthest_points(points, self.points, self.start))
            x = take(x, ball(centres, points, self.radius, self.k)[0]).amax(dim=3)
            points = centres
        shortcut = self.shortcut(x)
        x = leaky(self.conv1(x))
        index = nearest(points, self.k + 1)  # [N, P, K + 1], the point itself first
        if self.curves:
            x = self.curveaggregation(x, self.curvegrouping(x, index[:, :, 1:]))
        return leaky(self.conv2(self.lpfa(x, points, index[:, :, : self.k])) + shortcut), points


class CurveNetModule(nn.Module):
    """First aggregation, blocks, and the maximum and the mean over the remaining points."""

    def __init__(self, arch: CurveNetArch):
        super().__init__()
        self.k = arch.k
        self.lpfa = LocalAggregation(arch.inputs - 3, arch.first, arch.norm, initial=True)
        sizes: Sequence[int] = (arch.first, *(block[0] for block in arch.blocks))
        # Names of published state dicts: cic11, cic12, cic21, ...
        self.names = [f"cic{i // 2 + 1}{i % 2 + 1}" for i in range(len(arch.blocks))]
        for name, size, block in zip(self.names, sizes, arch.blocks, strict=False):
            self.add_module(name, CurveBlock(size, block, arch))
        self.conv0 = conv(sizes[-1], arch.last, arch.norm)
        # Layers of a classifier that published state dicts contain, and that are never used.
        if arch.norm == "batch":
            self.conv1 = nn.Linear(2 * arch.last, 512, bias=False)
            self.conv2 = nn.Linear(512, 1)
            self.bn1 = nn.BatchNorm1d(512)

    def forward(self, cloud: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
        """Compute features [N, 2 * last] of clouds [N, C, P] with positions [N, 3, P]."""
        x = self.lpfa(cloud[:, 3:] if cloud.shape[1] > 3 else None, points, nearest(points, self.k))
        for name in self.names:
            x, points = self.get_submodule(name)(x, points)
        x = F.relu(self.conv0(x))
        return torch.cat([x.amax(dim=2), x.mean(dim=2)], dim=1)


class CurveNet(PointNetwork):
    """CurveNet reward. Unlike the published code, it also accepts a batch of one."""

    def __init__(self, arch: CurveNetArch | None = None):
        arch = arch or CurveNetArch()
        super().__init__(2 * arch.last, **arch.sizes)
        self.arch: CurveNetArch = arch
        self.CurveNetModule = CurveNetModule(arch)

    def features(self, observations: torch.Tensor) -> torch.Tensor:
        """Return features of clouds [N, C, P], see `RewardNetwork`."""
        return self.CurveNetModule(*self._read(observations))


# PointNet++ (Qi et al. 2017, arXiv 1706.02413) as in the published point reward: two set abstractions and a
# global one.


@dataclass(frozen=True, kw_only=True)
class PointNet2Arch(PointArch):
    """Sizes of a PointNet++. The defaults have 2,482,118 parameters."""

    network: ClassVar[str] = "pointnet2"
    ratios: tuple[float, float] = (0.5, 0.25)  # centres per point of each level, (0, 1]
    radii: tuple[float, float] = (0.2, 0.4)  # of the balls, in the observation's units
    limit: int = 64  # largest number of neighbours; those with the lowest indices are taken
    first: tuple[int, ...] = (64, 64, 128)  # layer widths per edge, level 1
    second: tuple[int, ...] = (128, 128, 256)  # layer widths per edge, level 2
    whole: tuple[int, ...] = (256, 512, 1024)  # layer widths per centre of level 2, before the global maximum
    start: str = "first"  # see CurveNetArch.start

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("PointNet2Arch.start", self.start, STARTS)
        if (
            len(self.ratios) != 2
            or len(self.radii) != 2
            or min(*self.ratios, *self.radii) <= 0
            or max(self.ratios) > 1
        ):
            got = f"{self.ratios} and {self.radii}"
            raise ValueError(
                f"PointNet2Arch: expected two ratios in (0, 1] and two radii above 0, got {got}. Correct"
                " them in the reward's file."
            )


def layers(sizes: Sequence[int], kind: str) -> nn.Sequential:
    """Create a linear layer, normalisation and ReLU for each step from one size to the next, on [E, C]."""
    pairs = zip(sizes[:-1], sizes[1:], strict=True)
    return nn.Sequential(*(layer for a, b in pairs for layer in (nn.Linear(a, b), norm(kind, b), nn.ReLU())))


class SetAbstraction(nn.Module):
    """Set abstraction of PointNet++: features of centres from their neighbours.

    Layers read [features of the neighbour, its position relative to the centre], and the maximum over
    neighbours is the feature of the centre.
    """

    def __init__(self, ratio: float, radius: float, sizes: Sequence[int], arch: PointNet2Arch):
        super().__init__()
        self.ratio = ratio
        self.radius = radius
        self.limit = arch.limit
        self.start = arch.start
        # The nested names are those of published state dicts.
        self.point_conv = nn.ModuleDict({"local_nn": layers(sizes, arch.norm)})

    def forward(self, x: torch.Tensor | None, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map features [N, C, P], or None, at points [N, 3, P] to features [N, C', S] at centres [N, 3,
        S].
        """
        chosen = farthest_points(points, math.ceil(self.ratio * points.shape[2]), self.start)
        centres = take(points, chosen)  # [N, 3, S]
        index, counts = ball(centres, points, self.radius, self.limit)  # [N, S, K], [N, S]
        real = torch.arange(index.shape[2], device=index.device) < counts[..., None]  # [N, S, K]
        near = take(points, index) - centres[..., None]  # [N, 3, S, K]
        if x is not None:
            near = torch.cat([take(x, index), near], dim=1)
        # [E, C']: repeated neighbours are left out, since they would count in the statistics of a batch norm.
        edges = self.point_conv["local_nn"](near.movedim(1, -1)[real])
        # [N, S, K, C'], with -inf in the places of repeated neighbours, so that the maximum ignores them
        dense = edges.new_full((*real.shape, edges.shape[1]), -torch.inf).index_put((real,), edges)
        return dense.amax(dim=2).transpose(1, 2), centres


class PointNet2Module(nn.Module):
    """Two levels of set abstraction and the maximum over the remaining centres."""

    def __init__(self, arch: PointNet2Arch):
        super().__init__()
        # Published state dicts contain both, and nothing uses them.
        self.affine_offset = nn.Parameter(torch.zeros(()))
        self.affine_scale = nn.Parameter(torch.ones(()))
        self.sa1_module = SetAbstraction(arch.ratios[0], arch.radii[0], (arch.inputs, *arch.first), arch)
        self.sa2_module = SetAbstraction(
            arch.ratios[1], arch.radii[1], (arch.first[-1] + 3, *arch.second), arch
        )
        self.sa3_module = nn.ModuleDict({"mlp": layers((arch.second[-1] + 3, *arch.whole), arch.norm)})

    def forward(self, cloud: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
        """Compute features [N, M] of clouds [N, C, P] with positions [N, 3, P]."""
        x, centres = self.sa1_module(cloud[:, 3:] if cloud.shape[1] > 3 else None, points)
        x, centres = self.sa2_module(x, centres)
        rows = torch.cat([x, centres], dim=1).transpose(1, 2)  # [N, S, C + 3]
        return self.sa3_module["mlp"](rows.flatten(0, 1)).unflatten(0, rows.shape[:2]).amax(dim=1)


class PointNet2(PointNetwork):
    """PointNet++ reward."""

    def __init__(self, arch: PointNet2Arch | None = None):
        arch = arch or PointNet2Arch()
        super().__init__(arch.whole[-1], **arch.sizes)
        self.arch: PointNet2Arch = arch
        self.PointNet2Module = PointNet2Module(arch)

    def features(self, observations: torch.Tensor) -> torch.Tensor:
        """Return features of clouds [N, C, P], see `RewardNetwork`."""
        return self.PointNet2Module(*self._read(observations))


# PointNet (Qi et al. 2017, arXiv 1612.00593) as in the published point reward: without transform networks,
# with softplus, and with the maximum over points.


@dataclass(frozen=True, kw_only=True)
class PointNetArch(PointArch):
    """Sizes of a PointNet. The defaults have 1,817,476 parameters."""

    network: ClassVar[str] = "pointnet"
    widths: tuple[int, int, int] = (64, 128, 1024)  # channels per point
    # 'max' is the published pooling; 'max-mean' adds the mean, through which every point gets a gradient
    pool: str = "max"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("PointNetArch.pool", self.pool, ("max", "max-mean"))
        if len(self.widths) != 3:
            raise ValueError(
                f"PointNetArch.widths: expected three widths, got {self.widths}. Correct them in the reward's"
                " file."
            )


class PointNet(PointNetwork):
    """PointNet reward: three layers on each point separately, followed by a maximum over points."""

    def __init__(self, arch: PointNetArch | None = None):
        arch = arch or PointNetArch()
        super().__init__(arch.widths[-1] * (2 if arch.pool == "max-mean" else 1), **arch.sizes)
        self.arch: PointNetArch = arch
        a, b, c = arch.widths
        self.conv1 = nn.Conv1d(arch.inputs, a, 1)
        self.conv2 = nn.Conv1d(a, b, 1)
        self.conv3 = nn.Conv1d(b, c, 1)
        self.bn1, self.bn2, self.bn3 = (norm(arch.norm, width) for width in arch.widths)

    def features(self, observations: torch.Tensor) -> torch.Tensor:
        """Return features of clouds [N, C, P], see `RewardNetwork`."""
        x, _ = self._read(observations)
        for layer, normalise in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = F.softplus(normalise(layer(x)))
        largest = x.max(dim=2).values
        return torch.cat([largest, x.mean(dim=2)], dim=1) if self.arch.pool == "max-mean" else largest


_NETWORKS: Mapping[str, tuple[type[PointArch], Any]] = {
    arch.network: (arch, network)
    for arch, network in ((PointNetArch, PointNet), (PointNet2Arch, PointNet2), (CurveNetArch, CurveNet))
}
# leaves head and face of the bundled heads without shoulders
HEAD_CROP = (0.16, 0.16, 0.26, 0.20, 0.24, 0.25)
# Blocks of our CurveNet, in the form of Block
_CURVE_BLOCKS = (
    (32, 128, 0.15, 1, True),
    (32, 128, 0.15, 2, True),
    (64, 64, 0.25, 1, True),
    (64, 64, 0.25, 2, True),
    (96, 32, 0.35, 2, False),
)


def build(description: Mapping[str, Any]) -> PointNetwork:
    """Create a network from its description. Raises: ValueError for an unknown network or unknown fields."""
    values = dict(description)
    name = str(values.pop("network", None))
    check_choice("reward network", name, tuple(_NETWORKS))
    arch, network = _NETWORKS[name]
    return network(arch.from_dict(values))


def own_presets(inputs: int, observe: Mapping[str, Any]) -> dict[str, Preset]:
    """Return presets of our networks, which suit a few thousand pairs and one CPU core."""
    small: dict[str, Any] = {
        "inputs": inputs,
        "norm": "layer",
        "trunk": (64, 64),
        "embedding": 64,
        "heads": (32, 16),
    }
    archs = {
        "pointnet": PointNetArch(widths=(32, 64, 128), pool="max-mean", **small),
        "pointnet2": PointNet2Arch(
            ratios=(0.25, 0.25),
            radii=(0.15, 0.35),
            limit=16,
            first=(16, 16, 32),
            second=(32, 32, 64),
            whole=(64, 128),
            start="farthest",
            **small,
        ),
        "curvenet": CurveNetArch(
            first=16,
            blocks=_CURVE_BLOCKS,
            last=128,
            k=12,
            curves=16,
            steps=5,
            mix="transposed",
            start="farthest",
            **small,
        ),
    }
    train = {"epochs": 20, "patience": 20, "batch": 16, "lr": 1e-3, "weight_decay": 0.1, "decoupled": True}
    slow = {"epochs": 10, "patience": 10}  # a step of CurveNet takes five times as long
    return {
        name: Preset(
            network=arch.to_dict(), train={**train, **(slow if name == "curvenet" else {})}, observe=observe
        )
        for name, arch in archs.items()
    }


def published_presets() -> dict[str, Preset]:
    """Return presets of the published networks and their training.

    Batches have 4, 2 and 2 items, and only PointNet uses reference samples.
    """
    presets = {}
    for arch, batch, anchors in ((PointNetArch(), 4, 1000), (PointNet2Arch(), 2, 0), (CurveNetArch(), 2, 0)):
        train = {
            "epochs": 10,
            "patience": 3,
            "batch": batch,
            "lr": 1e-5,
            "cosine": False,
            "reference_samples": anchors,
            "weights": replace(LossWeights(), reconstruction=0.0),
        }
        presets[f"paper-{arch.network}"] = Preset(
            network=arch.to_dict(), train=train, observe={"resolution": 128}
        )
    return presets
