"""Building blocks of point networks: description, normalisation, checks, neighbour search.

Letters: N clouds, C channels, P points, S centres, K neighbours.
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
# Layers with fewer channels are not normalised: of one or two channels, layer normalisation leaves only
# signs.
_NARROW = 8


@dataclass(frozen=True, kw_only=True)
class PointArch(Architecture):
    """Sizes of a point network: everything that determines its parameters and the function that it computes.

    The defaults are the published ones.
    """

    network: ClassVar[str]  # name in files
    inputs: int = 3  # channels of a point: 3 for its position, 6 for position and normal
    # 'batch' is the published one; 'layer' normalises the channels of each point, so samples are independent
    norm: str = "batch"
    trunk: tuple[int, ...] = (512, 512)  # hidden sizes of the trunk
    embedding: int = 512  # length of the trunk's output, which all heads read
    heads: tuple[int, ...] = (256, 128)  # hidden sizes of each of the three heads

    def __post_init__(self) -> None:
        check_choice(f"{type(self).__name__}.norm", self.norm, NORMS)
        if self.inputs not in (3, 6):
            raise ValueError(
                f"{type(self).__name__}.inputs: expected 3 (positions) or 6 (positions and normals), got"
                f" {self.inputs!r}. Choose one of them."
            )

    @property
    def sizes(self) -> dict[str, Any]:
        """Keyword arguments of `RewardNetwork`."""
        return {"trunk": self.trunk, "embedding": self.embedding, "heads": self.heads}

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, including `network`."""
        return {"network": self.network, **super().to_dict()}


class PointNorm(nn.LayerNorm):
    """Layer normalisation of each point's channels, [N, C, ...], in place of a batch normalisation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the normalised [N, C, ...]. Differentiable."""
        # nn.LayerNorm normalises the last axis.
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def norm(kind: str, channels: int, axes: int = 1) -> nn.Module:
    """Create a normalisation of [N, channels, ...] with `axes` axes after the channels.

    For batch normalisation, `axes` is 1 (also if there is none) or 2. Layer normalisation takes any number.
    """
    if kind == "batch":
        return nn.BatchNorm2d(channels) if axes == 2 else nn.BatchNorm1d(channels)
    return PointNorm(channels) if channels >= _NARROW else nn.Identity()


class PointNetwork(RewardNetwork):
    """Reward network on point clouds [N, C, P]."""

    arch: PointArch

    def describe(self) -> dict[str, Any]:
        """Return the JSON values of `arch`."""
        return self.arch.to_dict()

    def check(self, shape: Sequence[int]) -> None:
        """Raise ValueError unless clouds have this network's number of channels."""
        if len(shape) != 2 or shape[0] != self.arch.inputs:
            raise ValueError(
                f"reward: expected clouds of {self.arch.inputs} channels per point, got {list(shape)}. Use"
                " the observation that is stored with the reward."
            )

    def _read(self, observations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the cloud and its positions [N, 3, P]. Raises: ValueError for other shapes."""
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


STARTS = ("first", "farthest")


def distances(centres: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Compute distances [N, S, P] in float64 between [N, 3, S] and [N, 3, P]."""
    # The faster mode expands the square into products, which rounds, so that neighbours could change.
    exact = "donot_use_mm_for_euclid_dist"
    return torch.cdist(centres.double().transpose(1, 2), points.double().transpose(1, 2), compute_mode=exact)


@torch.no_grad()
def farthest_points(points: torch.Tensor, count: int, start: str = "first") -> torch.Tensor:
    """Choose `count` points, each the farthest from those before it: [N, 3, P] -> int64 [N, count].

    Of equally far points, the one with the lowest index is chosen.
    Args: start: 'first' begins at index 0, 'farthest' with the point farthest from the centroid, so that the
        result does not depend on the order of the points.
    """
    points = points.double()
    # Index 0 is the first point, unless start is 'farthest'.
    chosen = torch.zeros(len(points), count, dtype=torch.int64, device=points.device)
    if start == "farthest":
        chosen[:, 0] = (points - points.mean(dim=2, keepdim=True)).square().sum(dim=1).argmax(dim=1)
    distance = torch.full_like(points[:, 0], torch.inf)  # [N, P] to the nearest chosen point
    for i in range(1, count):
        last = points.gather(2, chosen[:, i - 1, None, None].expand(-1, 3, 1))
        # Only the last chosen point can be nearer than the ones before it.
        distance = torch.minimum(distance, (points - last).square().sum(dim=1))
        chosen[:, i] = distance.argmax(dim=1)
    return chosen


@torch.no_grad()
def ball(
    centres: torch.Tensor, points: torch.Tensor, radius: float, limit: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the points closer than `radius` to each centre, at most `limit`, those of lowest index first.

    Unused places repeat the first point.
    Args: centres: [N, 3, S], a subset of the points [N, 3, P], so that no ball is empty.
    Returns: indices int64 [N, S, K], K = min(limit, P), and the number of real ones, int64 [N, S].
    """
    index = torch.arange(points.shape[2], device=points.device)
    total = points.shape[2]
    # Points outside get an index beyond all others, so the smallest indices are the points inside.
    near = torch.where(distances(centres, points) < radius, index, total)
    # The smallest indices, which belong to points inside
    near = near.topk(min(limit, total), dim=2, largest=False).values  # sorted
    return torch.where(near < total, near, near[..., :1]), (near < total).sum(dim=2)


@torch.no_grad()
def nearest(points: torch.Tensor, count: int) -> torch.Tensor:
    """Find the `count` nearest points of each point, the first of which is the point itself.

    [N, 3, P] -> int64 [N, P, K], K = min(count, P).
    """
    return distances(points, points).topk(min(count, points.shape[2]), dim=2, largest=False).indices


def take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Select columns of [N, C, P] by index [N, ...] -> [N, C, ...]. Differentiable in x."""
    # [N, C, all indices], since gather needs an index for every channel
    flat = index.flatten(1)[:, None].expand(-1, x.shape[1], -1)
    return x.gather(2, flat).unflatten(2, index.shape[1:])
