"""Which points of a cloud stand near which: farthest points, balls, nearest ones. Always the same answer for the same cloud.

Distances are differences of coordinates in float64, and no gradient passes through a choice.
Letters: N clouds, P points, S centres, K neighbours, C channels.
"""

import torch

STARTS = ("first", "farthest")


def distances(centres: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """[N, 3, S] and [N, 3, P] -> [N, S, P] float64, without the short cut over products, which rounds."""
    exact = "donot_use_mm_for_euclid_dist"
    return torch.cdist(centres.double().transpose(1, 2), points.double().transpose(1, 2), compute_mode=exact)


@torch.no_grad()
def farthest_points(points: torch.Tensor, count: int, start: str = "first") -> torch.Tensor:
    """Indices of `count` points, each farthest from those before it; of equal ones the lowest index. [N, 3, P] -> int64 [N, count].

    Args: start: 'first' begins at index 0, 'farthest' with the point farthest from the centroid, wherever it stands in the order.
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
def ball(centres: torch.Tensor, points: torch.Tensor, radius: float, limit: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points nearer than `radius` to each centre, lowest index first, at most `limit`; the first fills what is left.

    Args: centres [N, 3, S] of the points [N, 3, P] themselves, so that no ball is empty.
    Returns: indices int64 [N, S, K], K = min(limit, P), and how many of them are real, int64 [N, S].
    """
    index, total = torch.arange(points.shape[2], device=points.device), points.shape[2]
    found = torch.where(distances(centres, points) < radius, index, total)
    found = found.topk(min(limit, total), dim=2, largest=False).values  # sorted
    return torch.where(found < total, found, found[..., :1]), (found < total).sum(dim=2)


@torch.no_grad()
def nearest(points: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the `count` nearest points of each point, itself the first: [N, 3, P] -> int64 [N, P, K], K = min(count, P)."""
    return distances(points, points).topk(min(count, points.shape[2]), dim=2, largest=False).indices


def take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Columns of [N, C, P] by index [N, ...] -> [N, C, ...]. Differentiable in x."""
    flat = index.flatten(1)[:, None].expand(-1, x.shape[1], -1)
    return x.gather(2, flat).unflatten(2, index.shape[1:])
