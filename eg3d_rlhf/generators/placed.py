"""A generator seen in another world: moved, scaled, mirrored, its density on another scale. So rewards read
what was made elsewhere.

Letters: N samples, P points, D, H, W = grid points along z, y, x.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from eg3d_rlhf.core.field import OWN, Bounds, CameraFamily, Field, Rendering, RenderOptions
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.generators import Generator, ws_of_seeds
from training.rendering.cameras import mirror_label

_FAR_BELOW = 1000.0  # below the level: the density at points outside the generator's own cube


@dataclasses.dataclass(frozen=True)
class Similarity:
    """A point q of our world is the point p = scale * q + shift of the generator's."""

    scale: float = 1.0
    shift: tuple[float, float, float] = (0.0, 0.0, 0.0)  # the generator's units

    def apply(self, points: torch.Tensor) -> torch.Tensor:
        """Points [..., 3] of our world in the generator's. Differentiable in the points."""
        return points * self.scale + points.new_tensor(self.shift)

    @classmethod
    def of_boxes(cls, theirs: Bounds, ours: Bounds) -> "Similarity":
        """That which lays our cube on theirs."""
        scale = theirs.side / ours.side
        centres = zip(theirs.centre, ours.centre, strict=True)
        return cls(scale, tuple(a - scale * b for a, b in centres))  # type: ignore[arg-type]


def scaled_density(sigma: torch.Tensor, factor: float) -> torch.Tensor:
    """Raw density whose activation softplus(sigma - 1) is `factor` times that of the given one: optical depth
    is kept under scaling.

    Differentiable in sigma. Deviates: far below zero, where the activation is exp(sigma - 1), log(factor) is
    added.
    """
    x = sigma - 1
    activated = F.softplus(x.clamp_min(-15)) * factor
    return 1 + torch.where(x < -15, x + np.log(factor), activated + torch.log(-torch.expm1(-activated)))


@dataclasses.dataclass(frozen=True)
class Place:
    """How a generator's world is shown."""

    similarity: Similarity = Similarity()
    bounds: Bounds = Bounds()  # of our world
    mirrored: bool = False  # left and right exchanged about the bounds' centre
    cameras: CameraFamily | None = None  # of our world; None: the generator's own, as they are
    # raw density of theirs to ours, rising
    density: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.clone


class PlacedField:
    """A field of the generator as our world has it."""

    def __init__(self, inner: Field, place: Place):
        self._inner = inner
        self._place = place
        self.bounds = place.bounds
        self.level = float(place.density(torch.tensor(inner.level)))

    def __len__(self) -> int:
        return len(self._inner)

    def _flipped(self, points: torch.Tensor) -> torch.Tensor:
        if not self._place.mirrored:
            return points
        return torch.cat([2 * self.bounds.centre[0] - points[..., :1], points[..., 1:]], dim=-1)

    def _within(self, points: torch.Tensor) -> torch.Tensor:
        """Whether points [..., 3] of the generator's world lie in its own cube."""
        theirs = self._inner.bounds
        return (points - points.new_tensor(theirs.centre)).abs().amax(dim=-1) <= theirs.side / 2 * (1 + 1e-5)

    def density(self, points: torch.Tensor) -> torch.Tensor:
        """See `Field`; far below the level outside the generator's own cube."""
        moved = self._place.similarity.apply(self._flipped(points))
        sigma = self._place.density(self._inner.density(moved))
        return torch.where(self._within(moved).to(sigma.device), sigma, self.level - _FAR_BELOW)

    def density_grid(self, grid: SlabSpec) -> torch.Tensor:
        """See `Field`; outside the generator's own cube the least density of that shape inside, so that
        self-normalised slabs keep it.
        """
        if grid.lattice != "straight" and self._place.mirrored:
            return self.density(grid.points().reshape(-1, 3)).unflatten(1, grid.shape)
        low, high, *others = grid.crop
        down, up, back, front = others
        crop = (high, low, down, up, back, front) if self._place.mirrored else grid.crop
        similarity = self._place.similarity
        centre = similarity.apply(self._flipped(torch.tensor(grid.centre, dtype=torch.float64))).tolist()
        theirs = dataclasses.replace(
            grid, crop=crop, centre=tuple(centre), box_warp=grid.box_warp * similarity.scale
        )
        sigma = self._inner.density_grid(theirs)
        within = self._within(theirs.points()).to(sigma.device)  # [D, H, W]
        if within.any() and not within.all():
            least = sigma.where(within, torch.inf).amin(dim=(1, 2, 3), keepdim=True)
            sigma = torch.where(within, sigma, least)
        sigma = self._place.density(sigma)
        return sigma.flip(-1) if self._place.mirrored else sigma

    def colour(self, points: torch.Tensor) -> torch.Tensor:
        """See `Field`."""
        return self._inner.colour(self._place.similarity.apply(self._flipped(points)))

    def render(self, cameras: torch.Tensor, options: RenderOptions = OWN) -> Rendering:
        """See `Field`. The density's scale does not show: what a camera sees is the generator's own."""
        moved = cameras.clone()
        middle = self.bounds.centre[0]
        if self._place.mirrored:
            moved[:, 3] -= middle
            moved = mirror_label(moved)
            moved[:, 3] += middle
        moved[:, [3, 7, 11]] = self._place.similarity.apply(moved[:, [3, 7, 11]])
        seen = self._inner.render(moved, options)
        image, raw, depth, opacity = (part.flip(-1) for part in seen) if self._place.mirrored else seen
        return Rendering(image, raw, depth / self._place.similarity.scale, opacity)


class Placed:
    """`Generator` around another: its latents, its shapes in another place. Its mapping reads the generator's
    own cameras, see `ws_of`.
    """

    def __init__(self, inner: Generator, place: Place):
        self.inner = inner
        self.place = place
        self.bounds = place.bounds
        self.cameras = place.cameras or inner.cameras
        self.level = float(place.density(torch.tensor(inner.level)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def field(self, ws: torch.Tensor, noise_mode: str = "const") -> PlacedField:
        """See `Generator`."""
        return PlacedField(self.inner.field(ws, noise_mode), self.place)


def ws_of(generator: Generator, seeds: Sequence[int], psi: float, cutoff: int | None) -> torch.Tensor:
    """`ws_of_seeds`; of a placed generator, conditioned on the frontal camera of its own world."""
    return ws_of_seeds(generator.inner if isinstance(generator, Placed) else generator, seeds, psi, cutoff)
