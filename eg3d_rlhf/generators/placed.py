"""A generator in other world coordinates: translated, scaled, mirrored, with its density on another scale.

It lets a reward score shapes of another generator than the one that it was trained with.

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

_FAR_BELOW = 1000.0  # the density outside the generator's cube is this much below the level


@dataclasses.dataclass(frozen=True)
class Similarity:
    """A similarity transformation: the point q of our world is the point p = scale * q + shift of the
    generator's.
    """

    scale: float = 1.0
    shift: tuple[float, float, float] = (0.0, 0.0, 0.0)  # in the generator's units

    def apply(self, points: torch.Tensor) -> torch.Tensor:
        """Map points [..., 3] of our world to the generator's world. Differentiable in the points."""
        return points * self.scale + points.new_tensor(self.shift)

    @classmethod
    def of_boxes(cls, theirs: Bounds, ours: Bounds) -> "Similarity":
        """Return the transformation that maps our cube onto theirs."""
        # q is in our cube exactly if p is in theirs.
        scale = theirs.side / ours.side
        centres = zip(theirs.centre, ours.centre, strict=True)
        return cls(scale, tuple(a - scale * b for a, b in centres))  # type: ignore[arg-type]


def scaled_density(sigma: torch.Tensor, factor: float) -> torch.Tensor:
    """Return the raw density whose activation softplus(sigma - 1) is `factor` times the given one's.

    The optical depth is then unchanged if lengths are divided by `factor`.

    Differentiable in sigma.
    Deviates: far below zero, where the activation is exp(sigma - 1), log(factor) is added instead.
    """
    # The argument of EG3D's softplus.
    x = sigma - 1
    # The clamp keeps the branch that `where` discards finite, also in the backward pass.
    activated = F.softplus(x.clamp_min(-15)) * factor
    # inverse softplus: log(exp(a) - 1) = a + log(1 - exp(-a))
    return 1 + torch.where(x < -15, x + np.log(factor), activated + torch.log(-torch.expm1(-activated)))


@dataclasses.dataclass(frozen=True)
class Place:
    """Position, orientation and density scale in which a generator is presented."""

    similarity: Similarity = Similarity()
    bounds: Bounds = Bounds()  # in our world
    mirrored: bool = False  # left and right are exchanged about the centre of the bounds
    cameras: CameraFamily | None = None  # in our world; None: the generator's cameras, unchanged
    # increasing function from their raw density to ours
    density: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.clone


class PlacedField:
    """A field of the generator in our world."""

    def __init__(self, inner: Field, place: Place):
        self._inner = inner
        self._place = place
        self.bounds = place.bounds
        self.level = float(place.density(torch.tensor(inner.level)))

    def __len__(self) -> int:
        return len(self._inner)

    def _flipped(self, points: torch.Tensor) -> torch.Tensor:
        """Mirror points [..., 3] of our world, if the place is mirrored."""
        if not self._place.mirrored:
            return points
        # reflection in the plane through the centre of the bounds
        return torch.cat([2 * self.bounds.centre[0] - points[..., :1], points[..., 1:]], dim=-1)

    def _within(self, points: torch.Tensor) -> torch.Tensor:
        """Return True for points [..., 3] of the generator's world that lie in its cube. 1e-5 admits
        rounded points.
        """
        inner_bounds = self._inner.bounds
        return (points - points.new_tensor(inner_bounds.centre)).abs().amax(
            dim=-1
        ) <= inner_bounds.side / 2 * (1 + 1e-5)

    def density(self, points: torch.Tensor) -> torch.Tensor:
        """Return the raw density, see `Field`. Outside the generator's cube it is far below the level."""
        moved = self._place.similarity.apply(self._flipped(points))
        sigma = self._place.density(self._inner.density(moved))
        return torch.where(self._within(moved).to(sigma.device), sigma, self.level - _FAR_BELOW)

    def density_grid(self, grid: SlabSpec) -> torch.Tensor:
        """Return the raw density at grid points, see `Field`.

        Outside the generator's cube it is the smallest density of that shape inside, so that the range of a
        self-normalised slab does not change.
        """
        # A mirrored skewed lattice is no lattice of this kind, so its points are evaluated one by one.
        if grid.lattice != "straight" and self._place.mirrored:
            return self.density(grid.points().reshape(-1, 3)).unflatten(1, grid.shape)
        left, right, bottom, top, back, front = grid.crop
        # A mirrored grid is evaluated unmirrored, with left and right cropped the other way round, and then
        # flipped.
        crop = (right, left, bottom, top, back, front) if self._place.mirrored else grid.crop
        similarity = self._place.similarity
        centre = similarity.apply(self._flipped(torch.tensor(grid.centre, dtype=torch.float64))).tolist()
        inner_grid = dataclasses.replace(
            grid, crop=crop, centre=tuple(centre), box_warp=grid.box_warp * similarity.scale
        )
        # The inner generator may have a fast path for grids, so the grid itself is transformed.
        sigma = self._inner.density_grid(inner_grid)
        within = self._within(inner_grid.points()).to(sigma.device)  # [D, H, W]
        # Otherwise there is nothing to replace, or no density to replace it by.
        if within.any() and not within.all():
            least = sigma.where(within, torch.inf).amin(dim=(1, 2, 3), keepdim=True)
            sigma = torch.where(within, sigma, least)
        sigma = self._place.density(sigma)
        return sigma.flip(-1) if self._place.mirrored else sigma

    def colour(self, points: torch.Tensor) -> torch.Tensor:
        """Return the colour, see `Field`."""
        return self._inner.colour(self._place.similarity.apply(self._flipped(points)))

    def render(self, cameras: torch.Tensor, options: RenderOptions = OWN) -> Rendering:
        """Render, see `Field`. The scale of the density has no effect: the image is the generator's own."""
        # The caller's labels must not change.
        moved = cameras.clone()
        middle = self.bounds.centre[0]
        # mirror_label mirrors about x = 0, and entry 3 of a label is the camera's x.
        if self._place.mirrored:
            moved[:, 3] -= middle
            moved = mirror_label(moved)
            moved[:, 3] += middle
        # camera position: column 3 of the row-major cam2world
        moved[:, [3, 7, 11]] = self._place.similarity.apply(moved[:, [3, 7, 11]])
        renderings = self._inner.render(moved, options)
        # The generator renders the unmirrored shape from the mirrored camera, so the image has to be flipped.
        image, raw, depth, opacity = (
            (part.flip(-1) for part in renderings) if self._place.mirrored else renderings
        )
        return Rendering(image, raw, depth / self._place.similarity.scale, opacity)  # depths are lengths


class Placed:
    """A `Generator` around another one, with the same latents and its shapes in another place.

    Its mapping is conditioned on the inner generator's cameras, see `ws_of`.
    """

    def __init__(self, inner: Generator, place: Place):
        self.inner = inner
        self.place = place
        self.bounds = place.bounds
        self.cameras = place.cameras or inner.cameras
        self.level = float(place.density(torch.tensor(inner.level)))

    def __getattr__(self, name: str) -> Any:
        """Return attributes of the inner generator that this class does not define."""
        return getattr(self.inner, name)

    def field(self, ws: torch.Tensor, noise_mode: str = "const") -> PlacedField:
        """Synthesise fields, see `Generator`."""
        return PlacedField(self.inner.field(ws, noise_mode), self.place)


def ws_of(generator: Generator, seeds: Sequence[int], psi: float, cutoff: int | None) -> torch.Tensor:
    """Map seeds to ws. A placed generator is conditioned on the frontal camera of its inner generator."""
    return ws_of_seeds(generator.inner if isinstance(generator, Placed) else generator, seeds, psi, cutoff)
