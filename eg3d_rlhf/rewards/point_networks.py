"""Networks that read point clouds: PointNet, PointNet++ and CurveNet as published, and our variants of them.

The published networks are those of the point rewards of arXiv 2606.27305. Our variants correct three faults:

- They normalise the channels of each point separately. A score then does not depend on the other samples of
  the batch, and a batch may contain a single sample.
- Farthest-point sampling starts at the point farthest from the centroid, so that it does not depend on the
  order of the points.
- The curves of CurveNet are mixed with their own weights, and not with those of other curves.

Shapes: N clouds, C channels, P points, K neighbours, Q curves, T steps of a curve, S centres, E = pairs of a
centre and a neighbour, M features.
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

# CurveNet (Xiang et al. 2021, arXiv 2105.01288) as in the published point reward. A curve is a sequence of
# points, each a neighbour of the previous one, that a learned function chooses. The classes below choose the
# first points of curves, choose their further points, and update the features of all points from the curves.

_EPS = 1e-8  # smallest product of norms in the denominator of a cosine; it avoids a division by 0


class Walk(nn.Module):
    """Module that chooses the points of curves, step by step from a point to one of its neighbours.

    The neighbour with the largest logit is chosen. The gradient is that of the softmax over the neighbours.

    Args:
        channels: number of channels C of the features.
        step_count: number of steps T of each curve.
        mix: "reshaped" or "transposed", see `CurveNetArch.mix`.
        norm_kind: kind of the normalisation, "batch" or "layer".
    """

    def __init__(self, channels: int, step_count: int, mix: str, norm_kind: str):
        super().__init__()
        self.step_count = step_count
        self.mix = mix
        self.agent_mlp = nn.Sequential(nn.Conv2d(2 * channels, 1, 1, bias=False), norm(norm_kind, 1, 2))
        self.momentum_mlp = nn.Sequential(nn.Conv1d(2 * channels, 2, 1, bias=False), norm(norm_kind, 2))

    def _mix(self, current_features: torch.Tensor, descriptors: torch.Tensor) -> torch.Tensor:
        """Compute the new descriptors [N, C, Q] of curves, weighted means of descriptors and features.

        A descriptor summarises the features of the points that a curve has visited.

        Args:
            current_features: features [N, C, Q] of the current points of the curves.
            descriptors: descriptors [N, C, Q] of the curves.
        """
        # [N, 2, Q]
        weights = F.softmax(self.momentum_mlp(torch.cat([current_features, descriptors], dim=1)), dim=1)
        # The published error: curve i gets the entries 2 i and 2 i + 1 of the flattened weights, which belong
        # to other curves.
        if self.mix == "reshaped":
            weights = weights.reshape(len(weights), -1, 2).transpose(1, 2)
        return weights[:, :1] * current_features + weights[:, 1:] * descriptors

    def forward(
        self, x: torch.Tensor, neighbour_indices: torch.Tensor, start_points: torch.Tensor
    ) -> torch.Tensor:
        """Choose the points of the curves, and return the features of these points, [N, C, Q, T].

        Args:
            x: features of all points, [N, C, P].
            neighbour_indices: indices of the neighbours of each point, without the point itself, [N, P, K].
            start_points: indices of the points at which the curves start, [N, Q].
        """
        current_points = start_points  # [N, Q], index of the current point of each curve
        current_features = take(x, start_points)  # [N, C, Q]
        descriptors = current_features
        curve_features = []
        for step in range(self.step_count):
            # In the first step, descriptor and current features are equal.
            if step:
                descriptors = self._mix(current_features, descriptors)
            # [N, Q, K]
            curve_neighbours = neighbour_indices.gather(
                1, current_points[..., None].expand(-1, -1, neighbour_indices.shape[2])
            )
            neighbour_features = take(x, curve_neighbours)  # [N, C, Q, K]
            agent_input = torch.cat(
                [neighbour_features, descriptors[..., None].expand_as(neighbour_features)], dim=1
            )
            logits = self.agent_mlp(agent_input).squeeze(1)  # [N, Q, K]
            # The first step has no previous direction.
            if step:
                logits = logits * turning_factors(
                    current_features - descriptors, neighbour_features - current_features[..., None]
                )
            probabilities = F.softmax(logits, dim=2)
            best_neighbour = logits.argmax(dim=2, keepdim=True)  # [N, Q, 1]
            # Straight-through estimator: the value is one-hot, and the gradient is that of the softmax.
            one_hot = torch.zeros_like(probabilities).scatter(2, best_neighbour, 1.0)
            choice_weights = one_hot - probabilities.detach() + probabilities
            current_features = (neighbour_features * choice_weights[:, None]).sum(dim=3)
            current_points = curve_neighbours.gather(2, best_neighbour).squeeze(2)
            curve_features.append(current_features)
        return torch.stack(curve_features, dim=3)


@torch.no_grad()
def turning_factors(previous_directions: torch.Tensor, next_steps: torch.Tensor) -> torch.Tensor:
    """Compute factors in 0..1 for the logits of neighbours, so that a curve is unlikely to turn back.

    The factor is 1 + the cosine between the previous direction and the next step, clamped to 0..1. Both are
    vectors of features. No gradient.

    Args:
        previous_directions: previous directions [N, C, Q] of the curves.
        next_steps: possible next steps [N, C, Q, K] to the neighbours.
    Returns: factors [N, Q, K].
    """
    dot_products = (previous_directions[..., None] * next_steps).sum(dim=1)
    return (
        1
        + dot_products / (previous_directions.norm(dim=1)[..., None] * next_steps.norm(dim=1)).clamp_min(_EPS)
    ).clamp(0, 1)


class CurveGrouping(nn.Module):
    """Module that creates curves, which start at the points with the largest attention.

    Args:
        channels: number of channels C of the features.
        max_curves: largest number of curves.
        step_count: number of steps T of each curve.
        mix: "reshaped" or "transposed", see `CurveNetArch.mix`.
        norm_kind: kind of the normalisation, "batch" or "layer".
    """

    def __init__(self, channels: int, max_curves: int, step_count: int, mix: str, norm_kind: str):
        super().__init__()
        self.max_curves = max_curves
        self.att = nn.Conv1d(channels, 1, 1, bias=False)
        self.walk = Walk(channels, step_count, mix, norm_kind)

    def forward(self, x: torch.Tensor, neighbour_indices: torch.Tensor) -> torch.Tensor:
        """Create curves, and return the features of their points, [N, C, Q, T].

        Args:
            x: features of all points, [N, C, P].
            neighbour_indices: indices of the neighbours of each point, without the point itself, [N, P, K].
        """
        attention = torch.sigmoid(self.att(x))  # [N, 1, P]
        # With the mix "reshaped", the order of the curves changes the result. The published code uses the
        # unsorted order of topk.
        curve_count = min(self.max_curves, x.shape[2])
        start_points = attention.squeeze(1).topk(curve_count, dim=1, sorted=False).indices
        return self.walk(x * attention, neighbour_indices, start_points)


class CurveAggregation(nn.Module):
    """Module that updates the features of points by dot-product attention to the curves.

    The keys are means of each curve over its steps, and means of each step over the curves.

    Args:
        channels: number of channels C of the features.
        norm_kind: kind of the normalisation, "batch" or "layer".
    """

    def __init__(self, channels: int, norm_kind: str):
        super().__init__()
        half_channels = channels // 2
        # The names are those of published state dicts.
        self.conva, self.convb, self.convc = (
            nn.Conv1d(channels, half_channels, 1, bias=False) for _ in range(3)
        )
        self.convn, self.convl = (nn.Conv1d(half_channels, half_channels, 1, bias=False) for _ in range(2))
        self.convd = nn.Sequential(
            nn.Conv1d(2 * half_channels, channels, 1, bias=False), norm(norm_kind, channels)
        )
        self.line_conv_att = nn.Conv2d(channels, 1, 1, bias=False)

    def forward(self, x: torch.Tensor, curves: torch.Tensor) -> torch.Tensor:
        """Compute the updated features [N, C, P] of all points.

        Args:
            x: features of all points, [N, C, P].
            curves: features of the points of the curves, [N, C, Q, T].
        """
        # The same logits give two means: over the steps of each curve, and over the curves at each step.
        logits = self.line_conv_att(curves)  # [N, 1, Q, T]
        curve_keys = self.conva((curves * F.softmax(logits, dim=3)).sum(dim=3))  # [N, C/2, Q]
        step_keys = self.convb((curves * F.softmax(logits, dim=2)).sum(dim=2))  # [N, C/2, T]
        point_queries = self.convc(x).transpose(1, 2)  # [N, P, C/2]
        attended_features = [
            value_layer(keys).matmul(F.softmax(point_queries @ keys, dim=2).transpose(1, 2))  # [N, C/2, P]
            for keys, value_layer in ((curve_keys, self.convn), (step_keys, self.convl))
        ]
        return leaky(x + self.convd(torch.cat(attended_features, dim=1)))


# Settings of a block: output channels, number of points, radius of the ball for pooling, divisor of the input
# channels inside the block, True if the block uses curves
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

    The network with the default sizes has 4,319,325 parameters. Three of its layers, a published classifier,
    are never used.

    Raises: ValueError for a value that is not allowed.
    """

    network: ClassVar[str] = "curvenet"
    first: int = 32  # number of channels before the blocks
    blocks: tuple[Block, ...] = PUBLISHED  # settings of each block
    last: int = 1024  # number of channels after the blocks
    k: int = 20  # number of neighbours
    curves: int = 100  # largest number of curves; there are never more curves than points
    steps: int = 5  # number of points of a curve
    # Weights with which curves are mixed: 'reshaped' is the published error, by which a curve gets the
    # weights of other curves, and 'transposed' corrects it
    mix: str = "reshaped"
    # First point of the farthest-point sampling: 'first' is the first point of the cloud; 'farthest' is the
    # point farthest from its centroid, which does not depend on the order of the points
    start: str = "first"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("CurveNetArch.mix", self.mix, MIXES)
        check_choice("CurveNetArch.start", self.start, STARTS)
        # The entries are listed at `Block`.
        if not self.blocks or any(
            len(block) != 5 or block[2] <= 0 or block[3] < 1 or block[0] % block[3] for block in self.blocks
        ):
            raise ValueError(
                "CurveNetArch.blocks: expected at least one block (channels, points, radius, ratio, curves)"
                " with radius > 0 and a ratio >= 1 that divides the channels, got"
                f" {self.blocks}. Correct the blocks of the network in the reward's file."
            )


def conv(size_in: int, size_out: int, norm_kind: str, axis_count: int = 1) -> nn.Sequential:
    """Create a convolution with kernel size 1 and without bias, followed by a normalisation.

    Args:
        size_in: number of input channels.
        size_out: number of output channels.
        norm_kind: kind of the normalisation, "batch" or "layer".
        axis_count: number of axes after the channels: 1 for features [N, C, P], 2 for features [N, C, P, K].
    """
    layer = (
        nn.Conv2d(size_in, size_out, 1, bias=False)
        if axis_count == 2
        else nn.Conv1d(size_in, size_out, 1, bias=False)
    )
    return nn.Sequential(layer, norm(norm_kind, size_out, axis_count))


def encode_neighbours(points: torch.Tensor, neighbour_indices: torch.Tensor) -> torch.Tensor:
    """Compute the 9 channels (p_i, p_j, p_j - p_i) for every point i and each of its neighbours j.

    Args:
        points: positions [N, 3, P].
        neighbour_indices: indices of the neighbours of each point, [N, P, K].
    Returns: encoding [N, 9, P, K].
    """
    neighbours = take(points, neighbour_indices)  # [N, 3, P, K]
    centres = points[..., None].expand_as(neighbours)
    return torch.cat([centres, neighbours, neighbours - centres], dim=1)


class LocalAggregation(nn.Module):
    """Module that computes the features of points from their neighbours.

    It takes the maximum over the neighbours if `is_initial` is True, and the mean otherwise.

    Args:
        size_in: number of input channels, C.
        size_out: number of output channels, C'.
        norm_kind: kind of the normalisation, "batch" or "layer".
        is_initial: True for the layer before the blocks, which reads positions and input channels directly.
    """

    def __init__(self, size_in: int, size_out: int, norm_kind: str, is_initial: bool = False):
        super().__init__()
        if not is_initial:
            self.xyz2feature = conv(9, size_out, norm_kind, 2)
        self.initial = is_initial
        self.mlp = nn.Sequential(conv(9 + size_in if is_initial else size_out, size_out, norm_kind, 2))

    def forward(
        self, x: torch.Tensor | None, points: torch.Tensor, neighbour_indices: torch.Tensor
    ) -> torch.Tensor:
        """Compute features [N, C', P].

        Args:
            x: features [N, C, P]; None if the points have only positions.
            points: positions [N, 3, P].
            neighbour_indices: indices of the neighbours of each point, [N, P, K].
        """
        encoding = encode_neighbours(points, neighbour_indices)  # [N, 9, P, K]
        if self.initial:
            features = encoding if x is None else torch.cat([encoding, take(x, neighbour_indices)], dim=1)
            return leaky(self.mlp(features)).amax(dim=3)
        # Only the initial layer may have no features.
        assert x is not None
        # Differences between the features of neighbour and centre, plus an encoding of the positions
        features = take(x, neighbour_indices) - x[..., None] + self.xyz2feature(encoding)
        return leaky(self.mlp(leaky(features))).mean(dim=3)


class CurveBlock(nn.Module):
    """Block of CurveNet: pooling to fewer points, curves, and aggregation over neighbours, with a shortcut.

    Args:
        size_in: number of input channels, C.
        block: settings of the block.
        arch: sizes of the network.
    """

    def __init__(self, size_in: int, block: Block, arch: CurveNetArch):
        super().__init__()
        size_out, self.point_count, self.radius, ratio, has_curves = block
        self.k = arch.k
        self.start = arch.start
        width = size_in // ratio
        if has_curves:
            self.curveaggregation = CurveAggregation(width, arch.norm)
            self.curvegrouping = CurveGrouping(width, arch.curves, arch.steps, arch.mix, arch.norm)
        self.has_curves = has_curves
        self.conv1 = conv(size_in, width, arch.norm)
        self.conv2 = conv(width, size_out, arch.norm)
        self.shortcut = conv(size_in, size_out, arch.norm) if size_in != size_out else nn.Identity()
        self.lpfa = LocalAggregation(width, width, arch.norm)

    def forward(self, x: torch.Tensor, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute features [N, C', P'] and positions [N, 3, P'] of at most `self.point_count` points.

        Args:
            x: features [N, C, P].
            points: positions [N, 3, P].
        """
        # Choose fewer points, and take the maximum of the features over a ball around each of them.
        if self.point_count < points.shape[2]:
            centres = take(points, farthest_points(points, self.point_count, self.start))
            ball_index, _ = ball(centres, points, self.radius, self.k)
            x = take(x, ball_index).amax(dim=3)
            points = centres
        shortcut = self.shortcut(x)
        x = leaky(self.conv1(x))
        neighbour_indices = nearest(points, self.k + 1)  # [N, P, K + 1]; entry 0 is the point itself
        if self.has_curves:
            # A curve must not stay at its point, so the point itself is left out.
            x = self.curveaggregation(x, self.curvegrouping(x, neighbour_indices[:, :, 1:]))
        # As published, the aggregation over K neighbours includes the point itself.
        x = self.lpfa(x, points, neighbour_indices[:, :, : self.k])
        return leaky(self.conv2(x) + shortcut), points


class CurveNetModule(nn.Module):
    """Feature extractor of CurveNet: initial aggregation, blocks, then maximum and mean over all points."""

    def __init__(self, arch: CurveNetArch):
        super().__init__()
        self.k = arch.k
        self.lpfa = LocalAggregation(arch.inputs - 3, arch.first, arch.norm, is_initial=True)
        # Numbers of channels before the first block and after each block
        sizes: Sequence[int] = (arch.first, *(block[0] for block in arch.blocks))
        # Names of published state dicts: cic11, cic12, cic21, cic22, ...
        self.block_names = [f"cic{i // 2 + 1}{i % 2 + 1}" for i in range(len(arch.blocks))]
        # The last of the sizes is no input of a block, so zip must not be strict.
        for name, size_in, block in zip(self.block_names, sizes, arch.blocks, strict=False):
            self.add_module(name, CurveBlock(size_in, block, arch))
        self.conv0 = conv(sizes[-1], arch.last, arch.norm)
        # Published state dicts contain these layers of a classifier, which are never used.
        if arch.norm == "batch":
            self.conv1 = nn.Linear(2 * arch.last, 512, bias=False)
            self.conv2 = nn.Linear(512, 1)
            self.bn1 = nn.BatchNorm1d(512)

    def forward(self, cloud: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
        """Compute features [N, 2 * last], where `last` is the field of `CurveNetArch`.

        Args:
            cloud: clouds [N, C, P].
            points: positions [N, 3, P], the first three channels of the clouds.
        """
        # The channels after the position are the normals, if there are any.
        x = self.lpfa(cloud[:, 3:] if cloud.shape[1] > 3 else None, points, nearest(points, self.k))
        for name in self.block_names:
            x, points = self.get_submodule(name)(x, points)
        x = F.relu(self.conv0(x))
        return torch.cat([x.amax(dim=2), x.mean(dim=2)], dim=1)


class CurveNet(PointNetwork):
    """Reward network on point clouds with CurveNet. Unlike the published code, it accepts a single sample.

    Args: arch: sizes of the network; None takes the published sizes.
    """

    def __init__(self, arch: CurveNetArch | None = None):
        arch = arch or CurveNetArch()
        super().__init__(2 * arch.last, **arch.sizes)
        self.arch: CurveNetArch = arch
        self.CurveNetModule = CurveNetModule(arch)

    def features(self, observations: torch.Tensor) -> torch.Tensor:
        """Compute features [N, M] of clouds [N, C, P]. Differentiable in the clouds."""
        return self.CurveNetModule(*self._split(observations))


# PointNet++ (Qi et al. 2017, arXiv 1706.02413) as in the published point reward: two set abstractions
# (features of fewer points from the points around them), and a maximum over all remaining points.


@dataclass(frozen=True, kw_only=True)
class PointNet2Arch(PointArch):
    """Sizes of a PointNet++. The network with the default sizes has 2,482,118 parameters.

    Raises: ValueError for a value that is not allowed.
    """

    network: ClassVar[str] = "pointnet2"
    ratios: tuple[float, float] = (0.5, 0.25)  # number of centres per point, levels 1 and 2, (0, 1]
    radii: tuple[float, float] = (0.2, 0.4)  # radii of the balls, levels 1 and 2, in the unit of positions
    limit: int = 64  # largest number of neighbours in a ball; those with the lowest indices are used
    first: tuple[int, ...] = (64, 64, 128)  # layer widths per pair of centre and neighbour, level 1
    second: tuple[int, ...] = (128, 128, 256)  # layer widths per pair of centre and neighbour, level 2
    whole: tuple[int, ...] = (256, 512, 1024)  # layer widths per centre of level 2, before the global maximum
    start: str = "first"  # first point of the farthest-point sampling, see CurveNetArch.start

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("PointNet2Arch.start", self.start, STARTS)
        if (
            len(self.ratios) != 2
            or len(self.radii) != 2
            or min(*self.ratios, *self.radii) <= 0
            or max(self.ratios) > 1
        ):
            raise ValueError(
                "PointNet2Arch: expected two ratios in (0, 1] and two radii above 0, got ratios"
                f" {self.ratios} and radii {self.radii}. Correct ratios and radii of the network in the"
                " reward's file."
            )


def layers(layer_sizes: Sequence[int], norm_kind: str) -> nn.Sequential:
    """Create a stack of layers on features [E, C]: linear layer, normalisation and ReLU for each size.

    Args:
        layer_sizes: number of input channels, followed by the number of output channels of each linear layer.
        norm_kind: kind of the normalisation, "batch" or "layer".
    """
    layer_list: list[nn.Module] = []
    for size_in, size_out in zip(layer_sizes[:-1], layer_sizes[1:], strict=True):
        layer_list += [nn.Linear(size_in, size_out), norm(norm_kind, size_out), nn.ReLU()]
    return nn.Sequential(*layer_list)


class SetAbstraction(nn.Module):
    """Set abstraction of PointNet++: a module that computes features of centres, a subset of the points.

    The layers read the features of a neighbour and its position relative to the centre. The maximum over all
    neighbours is the feature of the centre.

    Args:
        ratio: number of centres per point, (0, 1].
        radius: radius of the ball around a centre that contains its neighbours.
        sizes: sizes of the layers, see `layers`.
        arch: sizes of the network.
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
        """Compute features [N, C', S] and positions [N, 3, S] of the centres.

        Args:
            x: features [N, C, P]; None if the points have only positions.
            points: positions [N, 3, P].
        """
        centre_index = farthest_points(points, math.ceil(self.ratio * points.shape[2]), self.start)
        centres = take(points, centre_index)  # [N, 3, S]
        # [N, S, K], [N, S]
        neighbour_indices, neighbour_counts = ball(centres, points, self.radius, self.limit)
        # False for indices that `ball` repeated
        # [N, S, K]
        is_neighbour = (
            torch.arange(neighbour_indices.shape[2], device=neighbour_indices.device)
            < neighbour_counts[..., None]
        )
        neighbours = take(points, neighbour_indices) - centres[..., None]  # [N, 3, S, K]
        if x is not None:
            neighbours = torch.cat([take(x, neighbour_indices), neighbours], dim=1)
        # [E, C']: repeated neighbours are left out, since they would change the statistics of a batch
        # normalisation.
        pair_features = self.point_conv["local_nn"](neighbours.movedim(1, -1)[is_neighbour])
        # [N, S, K, C'], with -inf for repeated neighbours, so that the maximum ignores them
        no_features = pair_features.new_full((*is_neighbour.shape, pair_features.shape[1]), -torch.inf)
        padded_features = no_features.index_put((is_neighbour,), pair_features)
        return padded_features.amax(dim=2).transpose(1, 2), centres


class PointNet2Module(nn.Module):
    """Feature extractor of PointNet++: two set abstractions, and the maximum over the remaining centres."""

    def __init__(self, arch: PointNet2Arch):
        super().__init__()
        # Published state dicts contain these two parameters, which are never used.
        self.affine_offset = nn.Parameter(torch.zeros(()))
        self.affine_scale = nn.Parameter(torch.ones(()))
        self.sa1_module = SetAbstraction(arch.ratios[0], arch.radii[0], (arch.inputs, *arch.first), arch)
        self.sa2_module = SetAbstraction(
            arch.ratios[1], arch.radii[1], (arch.first[-1] + 3, *arch.second), arch
        )
        self.sa3_module = nn.ModuleDict({"mlp": layers((arch.second[-1] + 3, *arch.whole), arch.norm)})

    def forward(self, cloud: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
        """Compute one feature vector per cloud, [N, M].

        Args:
            cloud: clouds [N, C, P].
            points: positions [N, 3, P], the first three channels of the clouds.
        """
        # The channels after the position are the normals, if there are any.
        x, centres = self.sa1_module(cloud[:, 3:] if cloud.shape[1] > 3 else None, points)
        x, centres = self.sa2_module(x, centres)
        centre_rows = torch.cat([x, centres], dim=1).transpose(1, 2)  # [N, S, C + 3]
        # The layers read rows of all samples together, [N * S, C + 3].
        return (
            self.sa3_module["mlp"](centre_rows.flatten(0, 1)).unflatten(0, centre_rows.shape[:2]).amax(dim=1)
        )


class PointNet2(PointNetwork):
    """Reward network with PointNet++.

    Args: arch: sizes of the network; None takes the published sizes.
    """

    def __init__(self, arch: PointNet2Arch | None = None):
        arch = arch or PointNet2Arch()
        super().__init__(arch.whole[-1], **arch.sizes)
        self.arch: PointNet2Arch = arch
        self.PointNet2Module = PointNet2Module(arch)

    def features(self, observations: torch.Tensor) -> torch.Tensor:
        """Compute features [N, M] of clouds [N, C, P]. Differentiable in the clouds."""
        return self.PointNet2Module(*self._split(observations))


# PointNet (Qi et al. 2017, arXiv 1612.00593) as in the published point reward: without transform networks,
# with softplus, and with the maximum over points.


@dataclass(frozen=True, kw_only=True)
class PointNetArch(PointArch):
    """Sizes of a PointNet. The network with the default sizes has 1,817,476 parameters.

    Raises: ValueError for a value that is not allowed.
    """

    network: ClassVar[str] = "pointnet"
    widths: tuple[int, int, int] = (64, 128, 1024)  # numbers of channels of the three layers on each point
    # Pooling over points. 'max' takes the maximum, as published. 'max-mean' appends the mean to the maximum,
    # so that every point gets a gradient
    pool: str = "max"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("PointNetArch.pool", self.pool, ("max", "max-mean"))
        if len(self.widths) != 3:
            raise ValueError(
                f"PointNetArch.widths: expected three widths, got {self.widths}. Correct the entry widths of"
                " the network in the reward's file."
            )


class PointNet(PointNetwork):
    """Reward network with PointNet: three layers on each point separately, and a maximum over points.

    Args: arch: sizes of the network; None takes the published sizes.
    """

    def __init__(self, arch: PointNetArch | None = None):
        arch = arch or PointNetArch()
        super().__init__(arch.widths[-1] * (2 if arch.pool == "max-mean" else 1), **arch.sizes)
        self.arch: PointNetArch = arch
        width1, width2, width3 = arch.widths
        self.conv1 = nn.Conv1d(arch.inputs, width1, 1)
        self.conv2 = nn.Conv1d(width1, width2, 1)
        self.conv3 = nn.Conv1d(width2, width3, 1)
        self.bn1, self.bn2, self.bn3 = (norm(arch.norm, width) for width in arch.widths)

    def features(self, observations: torch.Tensor) -> torch.Tensor:
        """Compute features [N, M] of clouds [N, C, P]. Differentiable in the clouds."""
        x, _ = self._split(observations)
        for layer, normalise in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = F.softplus(normalise(layer(x)))
        max_features = x.max(dim=2).values
        return (
            torch.cat([max_features, x.mean(dim=2)], dim=1) if self.arch.pool == "max-mean" else max_features
        )


# Class of the sizes, and class of the network, by the name of the network in files
_NETWORKS: Mapping[str, tuple[type[PointArch], Any]] = {
    arch.network: (arch, network)
    for arch, network in ((PointNetArch, PointNet), (PointNet2Arch, PointNet2), (CurveNetArch, CurveNet))
}
# Settings of the blocks of our CurveNet, see `Block`
_CURVE_BLOCKS = (
    (32, 128, 0.15, 1, True),
    (32, 128, 0.15, 2, True),
    (64, 64, 0.25, 1, True),
    (64, 64, 0.25, 2, True),
    (96, 32, 0.35, 2, False),
)


def build(description: Mapping[str, Any]) -> PointNetwork:
    """Create an untrained network from its description.

    Args: description: under "network" the name of the network; all other entries are fields of its
        architecture.
    Raises: ValueError for an unknown network, or for unknown fields.
    """
    # A copy, since an entry is removed below.
    architecture_values = dict(description)
    network_name = str(architecture_values.pop("network", None))
    check_choice("reward network", network_name, tuple(_NETWORKS))
    arch_class, network_class = _NETWORKS[network_name]
    return network_class(arch_class.from_dict(architecture_values))


def own_presets(inputs: int, observation_settings: Mapping[str, Any]) -> dict[str, Preset]:
    """Return the presets of our networks, which suit a few thousand pairs and one CPU core.

    Args:
        inputs: number of channels of a point, 3 (position) or 6 (position and normal).
        observation_settings: settings of the observation, see `Observation.from_generator`.
    Returns: preset by name.
    """
    common_sizes: dict[str, Any] = {
        "inputs": inputs,
        "norm": "layer",
        "trunk": (64, 64),
        "embedding": 64,
        "heads": (32, 16),
    }
    architectures = {
        "pointnet": PointNetArch(widths=(32, 64, 128), pool="max-mean", **common_sizes),
        "pointnet2": PointNet2Arch(
            ratios=(0.25, 0.25),
            radii=(0.15, 0.35),
            limit=16,
            first=(16, 16, 32),
            second=(32, 32, 64),
            whole=(64, 128),
            start="farthest",
            **common_sizes,
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
            **common_sizes,
        ),
    }
    train_settings = {
        "epochs": 20,
        "patience": 20,
        "batch": 16,
        "lr": 1e-3,
        "weight_decay": 0.1,
        "decoupled": True,
    }
    curvenet_settings = {"epochs": 10, "patience": 10}  # a step of CurveNet takes five times as long
    return {
        name: Preset(
            network=arch.to_dict(),
            train={**train_settings, **(curvenet_settings if name == "curvenet" else {})},
            observe=observation_settings,
        )
        for name, arch in architectures.items()
    }


def published_presets() -> dict[str, Preset]:
    """Return the presets of the published networks, with the settings of their published training."""
    preset_by_name = {}
    # Sizes of the network, pairs per batch, number of reference samples
    for arch, batch_size, reference_samples in (
        (PointNetArch(), 4, 1000),
        (PointNet2Arch(), 2, 0),
        (CurveNetArch(), 2, 0),
    ):
        train_settings = {
            "epochs": 10,
            "patience": 3,
            "batch": batch_size,
            "lr": 1e-5,
            "cosine": False,
            "reference_samples": reference_samples,
            "weights": replace(LossWeights(), reconstruction=0.0),
        }
        preset_by_name[f"paper-{arch.network}"] = Preset(
            network=arch.to_dict(), train=train_settings, observe={"resolution": 128}
        )
    return preset_by_name
