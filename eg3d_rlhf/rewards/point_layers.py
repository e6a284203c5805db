"""Building blocks of networks that read point clouds: architecture, normalisation, and neighbour search.

Shapes: N clouds, C channels, P points, S centres, K neighbours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from eg3d_rlhf.rewards.networks import RewardNetwork
from eg3d_rlhf.rewards.presets import Architecture
from training.config import check_choice

NORMS = ("batch", "layer")
# Layers with fewer channels have no layer normalisation, because it would leave only the signs of one or two
# channels.
_NARROW = 8


@dataclass(frozen=True, kw_only=True)
class PointArch(Architecture):
    """Sizes of a point network, which determine its parameters and its function.

    The defaults are the published values.

    Raises: ValueError for a value that is not allowed.
    """

    network: ClassVar[str]  # name of the network in files
    inputs: int = 3  # number of channels of a point: 3 for its position, 6 for position and normal
    # Normalisation: 'batch', as published; or 'layer', which normalises the channels of each point, so that
    # the samples of a batch do not influence each other
    norm: str = "batch"
    trunk: tuple[int, ...] = (512, 512)  # hidden sizes of the trunk
    embedding: int = 512  # length of the trunk's output, which all output heads read
    heads: tuple[int, ...] = (256, 128)  # hidden sizes of each of the three output heads

    def __post_init__(self) -> None:
        check_choice(f"{type(self).__name__}.norm", self.norm, NORMS)
        if self.inputs not in (3, 6):
            raise ValueError(
                f"{type(self).__name__}.inputs: expected 3 (positions) or 6 (positions and normals), got"
                f" {self.inputs!r}. Choose one of them."
            )

    @property
    def sizes(self) -> dict[str, Any]:
        """Sizes of the trunk and of the output heads, as keyword arguments of `RewardNetwork`."""
        return {"trunk": self.trunk, "embedding": self.embedding, "heads": self.heads}

    def to_dict(self) -> dict[str, Any]:
        """Return the sizes as JSON values, including `network`."""
        return {"network": self.network, **super().to_dict()}


class PointNorm(nn.LayerNorm):
    """Layer normalisation of the channels of each point, which replaces batch normalisation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the channels of features x [N, C, ...]. Differentiable."""
        # nn.LayerNorm normalises the last axis.
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def norm(norm_kind: str, channels: int, axis_count: int = 1) -> nn.Module:
    """Create a normalisation of features [N, channels, ...].

    Args:
        norm_kind: "batch" or "layer".
        channels: number of channels.
        axis_count: number of axes after the channels, 2 or at most 1; layer normalisation ignores it.
    """
    if norm_kind == "batch":
        return nn.BatchNorm2d(channels) if axis_count == 2 else nn.BatchNorm1d(channels)
    return PointNorm(channels) if channels >= _NARROW else nn.Identity()


class PointNetwork(RewardNetwork):
    """Reward network on point clouds [N, C, P]."""

    arch: PointArch

    def describe(self) -> dict[str, Any]:
        """Return the architecture as JSON values, from which the network can be created again."""
        return self.arch.to_dict()

    def check(self, shape: Sequence[int]) -> None:
        """Raise ValueError unless `shape` is the shape [C, P] of a cloud with this network's channels."""
        if len(shape) != 2 or shape[0] != self.arch.inputs:
            raise ValueError(
                f"reward: expected clouds [{self.arch.inputs}, P] with {self.arch.inputs} channels per point,"
                f" got {list(shape)}. Use the observation that is stored with the reward."
            )

    def _split(self, observations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the clouds [N, C, P] and their positions [N, 3, P], the first three channels.

        Raises: ValueError for observations of any other shape.
        """
        if observations.ndim != 3:
            raise ValueError(
                f"reward: expected clouds [N, {self.arch.inputs}, P], got {list(observations.shape)}. Pass"
                " the result of the reward's observation."
            )
        self.check(observations.shape[1:])
        return observations, observations[:, :3]


def leaky(x: torch.Tensor) -> torch.Tensor:
    """Apply a leaky ReLU of slope 0.2."""
    return F.leaky_relu(x, 0.2)


# Neighbour search: farthest points, balls, and nearest points. The result depends only on the cloud.


STARTS = ("first", "farthest")  # values of `start` of `farthest_points`


def distances(centres: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Compute the Euclidean distances between centres [N, 3, S] and points [N, 3, P]: float64 [N, S, P]."""
    # The faster mode of cdist expands the square into products. Its rounding errors could change neighbours.
    exact_mode = "donot_use_mm_for_euclid_dist"
    return torch.cdist(
        centres.double().transpose(1, 2), points.double().transpose(1, 2), compute_mode=exact_mode
    )


@torch.no_grad()
def farthest_points(points: torch.Tensor, chosen_count: int, start: str = "first") -> torch.Tensor:
    """Choose points by farthest-point sampling, and return their indices, int64 [N, chosen_count].

    Each chosen point is the point with the largest distance from all points that were chosen before. Among
    equal distances, the point with the lowest index is chosen.

    Args:
        points: positions [N, 3, P].
        chosen_count: number of points to choose.
        start: choice of the first point. "first" is the point with index 0. "farthest" is the point farthest
            from the centroid, which does not depend on the order of the points.
    """
    points = points.double()
    chosen_indices = torch.zeros(len(points), chosen_count, dtype=torch.int64, device=points.device)
    if start == "farthest":
        chosen_indices[:, 0] = (points - points.mean(dim=2, keepdim=True)).square().sum(dim=1).argmax(dim=1)
    # [N, P]: squared distance of each point to the nearest chosen point
    nearest_distances = torch.full_like(points[:, 0], torch.inf)
    for i in range(1, chosen_count):
        # [N, 3, 1]
        previous_point = points.gather(2, chosen_indices[:, i - 1, None, None].expand(-1, 3, 1))
        # All earlier points are already included in `nearest_distances`.
        nearest_distances = torch.minimum(nearest_distances, (points - previous_point).square().sum(dim=1))
        chosen_indices[:, i] = nearest_distances.argmax(dim=1)
    return chosen_indices


@torch.no_grad()
def ball(
    centres: torch.Tensor, points: torch.Tensor, radius: float, max_points: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the points inside a ball around each centre.

    If a ball contains more than `max_points` points, the points with the lowest indices are returned. If it
    contains fewer, the first index is repeated.

    Args:
        centres: positions [N, 3, S]; each must be one of the points, so that no ball is empty.
        points: positions [N, 3, P].
        radius: radius of the balls, in the unit of the positions.
        max_points: largest number of points per ball.
    Returns: the indices of the points of each ball in ascending order, int64 [N, S, K] with K =
        min(max_points, P), and the number of indices of each ball without repetitions, int64 [N, S].
    """
    point_indices = torch.arange(points.shape[2], device=points.device)
    point_count = points.shape[2]
    # Points outside the ball get the index P, which is larger than all others. The smallest indices then
    # belong to points inside the ball.
    ball_indices = torch.where(distances(centres, points) < radius, point_indices, point_count)
    ball_indices = ball_indices.topk(min(max_points, point_count), dim=2, largest=False).values  # ascending
    is_inside = ball_indices < point_count
    return torch.where(is_inside, ball_indices, ball_indices[..., :1]), is_inside.sum(dim=2)


@torch.no_grad()
def nearest(points: torch.Tensor, nearest_count: int) -> torch.Tensor:
    """Find the nearest points of each point; the nearest one is the point itself.

    Args:
        points: positions [N, 3, P].
        nearest_count: number of nearest points, including the point itself.
    Returns: indices int64 [N, P, K] with K = min(nearest_count, P), in the order of the distances.
    """
    return distances(points, points).topk(min(nearest_count, points.shape[2]), dim=2, largest=False).indices


def take(x: torch.Tensor, point_indices: torch.Tensor) -> torch.Tensor:
    """Select the features of points by their index. Differentiable in x.

    Args:
        x: features [N, C, P].
        point_indices: indices of points, int64 [N, ...].
    Returns: features [N, C, ...].
    """
    # gather needs the index once per channel: [N, C, number of indices]
    channel_index = point_indices.flatten(1)[:, None].expand(-1, x.shape[1], -1)
    return x.gather(2, channel_index).unflatten(2, point_indices.shape[1:])
