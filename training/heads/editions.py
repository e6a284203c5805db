"""Editions of the synthetic heads: which damage the scans of a latent have.

Both editions have the same basis of intact heads, so the ground truth of a latent is the same. In the third
edition, the damage has coordinates of its own in the latent (`people_damage`), and damaged scans are hollow.
In the fourth, the identity decides about the damage, and all scans are solid (`people_flaws`).

Shapes: N is the number of heads, P of points.
"""

from collections.abc import Callable

import torch

from training.heads.people_damage import damaged_distance
from training.heads.people_flaws import NAMED, flawed_distance


def _third(points: torch.Tensor, distance: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Return the signed distance of a scan of the third edition, see `scan_distance`."""
    # The damage of this edition depends only on the coordinates of scan quality.
    return damaged_distance(points, distance, z[:, NAMED:])


EDITIONS: dict[int, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    3: _third,
    4: flawed_distance,
}


def scan_distance(
    edition: int, points: torch.Tensor, distance: torch.Tensor, z: torch.Tensor
) -> torch.Tensor:
    """Return the signed distances [N, P] of the damaged scans of latents, negative inside.

    Args:
        edition: edition of the heads, 3 or 4.
        points: points [N, P, 3], world units.
        distance: signed distances [N, P] of the intact heads, negative inside.
        z: latents [N, 64] with a root mean square of 1.
    Raises: ValueError for another edition.
    """
    if edition not in EDITIONS:
        raise ValueError(
            f"edition of the heads: expected one of {', '.join(map(str, EDITIONS))}, got {edition}."
            " Use 4 for damage that depends on the identity."
        )
    return EDITIONS[edition](points, distance, z)
