"""What the networks on clouds of points share: their description, their normalisation, the check of what they
read.
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
# layers of fewer channels are not normalised: of one or two channels nothing but a sign would be left
_NARROW = 8


@dataclass(frozen=True, kw_only=True)
class PointArch(Architecture):
    """Everything that decides the parameters' names and shapes, and the function they compute. The defaults
    are the published ones.
    """

    network: ClassVar[str]  # as files name it
    inputs: int = 3  # channels of a point: position, or position and normal (6)
    # 'batch' = the published; 'layer' = over the channels of each point, so that no sample depends on another
    norm: str = "batch"
    trunk: tuple[int, ...] = (512, 512)  # hidden sizes of the trunk
    embedding: int = 512  # length of the trunk's output, which all heads read
    heads: tuple[int, ...] = (256, 128)  # hidden sizes of each of the three heads

    def __post_init__(self) -> None:
        check_choice(f"{type(self).__name__}.norm", self.norm, NORMS)
        if self.inputs not in (3, 6):
            raise ValueError(
                f"{type(self).__name__}.inputs: expected 3 or 6, got {self.inputs!r}. Points have positions,"
                " perhaps normals."
            )

    @property
    def sizes(self) -> dict[str, Any]:
        """Keywords of `RewardNetwork`."""
        return {"trunk": self.trunk, "embedding": self.embedding, "heads": self.heads}

    def to_dict(self) -> dict[str, Any]:
        """With `network`."""
        return {"network": self.network, **super().to_dict()}


class PointNorm(nn.LayerNorm):
    """Layer normalisation of each point's channels, [N, C, ...], as the batch normalisations whose place it
    takes.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def norm(kind: str, channels: int, axes: int = 1) -> nn.Module:
    """A normalisation of [N, channels, ...] with so many axes behind the channels (batch: 1, also none; or
    2).
    """
    if kind == "batch":
        return nn.BatchNorm2d(channels) if axes == 2 else nn.BatchNorm1d(channels)
    return PointNorm(channels) if channels >= _NARROW else nn.Identity()


class PointNetwork(RewardNetwork):
    """A reward network on clouds [N, C, P]."""

    arch: PointArch

    def describe(self) -> dict[str, Any]:
        return self.arch.to_dict()

    def check(self, shape: Sequence[int]) -> None:
        """Clouds of so many channels, and any number of points."""
        if len(shape) != 2 or shape[0] != self.arch.inputs:
            raise ValueError(
                f"reward: expected clouds of {self.arch.inputs} channels per point, got {list(shape)}. Use"
                " its own observation."
            )

    def _read(self, observed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The cloud itself and its positions [N, 3, P]. Raises: ValueError for other shapes."""
        if observed.ndim != 3:
            raise ValueError(
                f"reward: expected clouds [N, {self.arch.inputs}, P], got {list(observed.shape)}. Pass what"
                " is observed."
            )
        self.check(observed.shape[1:])
        return observed, observed[:, :3]


def leaky(x: torch.Tensor) -> torch.Tensor:
    """Leaky ReLU of slope 0.2."""
    return F.leaky_relu(x, 0.2)


# Which points of a cloud stand near which: farthest points, balls, nearest ones. Always the same answer for
# the same cloud.


STARTS = ("first", "farthest")


def distances(centres: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """[N, 3, S] and [N, 3, P] -> [N, S, P] float64, without the short cut over products, which rounds."""
    exact = "donot_use_mm_for_euclid_dist"
    return torch.cdist(centres.double().transpose(1, 2), points.double().transpose(1, 2), compute_mode=exact)


@torch.no_grad()
def farthest_points(points: torch.Tensor, count: int, start: str = "first") -> torch.Tensor:
    """Indices of `count` points, each farthest from those before it; of equal ones the lowest index.
    [N, 3, P] -> int64 [N, count].

    Args: start: 'first' begins at index 0, 'farthest' with the point farthest from the centroid, wherever it
        stands in the order.
    """
    points = points.double()
    chosen = torch.zeros(len(points), count, dtype=torch.int64, device=points.device)
    if start == "farthest":
        chosen[:, 0] = (points - points.mean(dim=2, keepdim=True)).square().sum(dim=1).argmax(dim=1)
    distance = torch.full_like(points[:, 0], torch.inf)  # [N, P] to the nearest chosen point
    for i in range(1, count):
        last = points.gather(2, chosen[:, i - 1, None, None].expand(-1, 3, 1))
        distance = torch.minimum(distance, (points - last).square().sum(dim=1))
        chosen[:, i] = distance.argmax(dim=1)
    return chosen


@torch.no_grad()
def ball(
    centres: torch.Tensor, points: torch.Tensor, radius: float, limit: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Points nearer than `radius` to each centre, lowest index first, at most `limit`; the first fills what
    is left.

    Args: centres [N, 3, S] of the points [N, 3, P] themselves, so that no ball is empty.
    Returns: indices int64 [N, S, K], K = min(limit, P), and how many of them are real, int64 [N, S].
    """
    index = torch.arange(points.shape[2], device=points.device)
    total = points.shape[2]
    near = torch.where(distances(centres, points) < radius, index, total)
    near = near.topk(min(limit, total), dim=2, largest=False).values  # sorted
    return torch.where(near < total, near, near[..., :1]), (near < total).sum(dim=2)


@torch.no_grad()
def nearest(points: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the `count` nearest points of each point, itself the first: [N, 3, P] -> int64 [N, P, K],
    K = min(count, P).
    """
    return distances(points, points).topk(min(count, points.shape[2]), dim=2, largest=False).indices


def take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Columns of [N, C, P] by index [N, ...] -> [N, C, ...]. Differentiable in x."""
    flat = index.flatten(1)[:, None].expand(-1, x.shape[1], -1)
    return x.gather(2, flat).unflatten(2, index.shape[1:])
