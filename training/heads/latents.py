"""Latents that name heads: each coordinate of z takes the place of one random number that a head of the family is drawn from.

Normal draws are the coordinates themselves, uniform ones come through the normal distribution function, choices through its quantiles; so
normal latents give exactly the family's heads. Shape letters: N latents, Z z_dim, S shape and A appearance parameters.
"""

import numpy as np
import torch
from scipy.special import ndtr

from training.heads.family import draw_parameters


class _Coordinates:
    """The coordinates of one latent in turn, where `draw_parameters` expects a random generator."""

    def __init__(self, z: np.ndarray):
        self._rest = iter(z.tolist())

    def standard_normal(self, size: int | None = None):
        return next(self._rest) if size is None else np.array([next(self._rest) for _ in range(size)])

    def random(self) -> float:
        return float(ndtr(next(self._rest)))

    def uniform(self, low=0.0, high=1.0):
        if np.ndim(low) == 0:
            return low + (high - low) * self.random()
        return np.array([self.uniform(a, b) for a, b in zip(low, high, strict=True)])

    def integers(self, high: int) -> int:
        return min(int(self.random() * high), high - 1)

    def choice(self, count: int, p) -> int:
        return min(int(np.searchsorted(np.cumsum(p), self.random(), side="right")), count - 1)


def named_heads(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The heads that latents z [N, Z] name: shape [N, S] and appearance [N, A], float32.

    Latents are scaled to unit root mean square first, as the mapping network does; coordinates beyond those of the draws name nothing.
    Raises: ValueError where Z is too small.
    """
    scaled = torch.nn.functional.normalize(z.double(), dim=1).mul(z.shape[1] ** 0.5).cpu().numpy()
    try:
        drawn = [draw_parameters(_Coordinates(row)) for row in scaled]
    except StopIteration:
        raise ValueError(f"named_heads: expected latents of at least 48 coordinates, got {z.shape[1]}. Use a wider z.") from None
    shape, appearance = (torch.from_numpy(np.stack(values)) for values in zip(*drawn, strict=True))
    return shape.to(z.device), appearance.to(z.device)
