"""A generator whose shapes are translated, scaled and mirrored, and whose density is rescaled.

A reward can therefore score shapes of a generator that it was not trained with. "Our world" has the
coordinates of the reward, and "their world" has the coordinates of the inner generator.

Shapes: N is the number of samples, P of points, and D, H and W are numbers of grid points along z, y and x.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from eg3d_rlhf.core.field import DEFAULT_OPTIONS, Bounds, CameraFamily, Field, Rendering, RenderOptions
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.generators import Generator, ws_of_seeds
from training.rendering.cameras import mirror_label

_FAR_BELOW = 1000.0  # difference of the level and the density outside the generator's cube


@dataclasses.dataclass(frozen=True)
class Similarity:
    """A similarity transformation from points of our world to points of their world.

    A point q of our world is mapped to the point p = scale * q + shift.
    """

    scale: float = 1.0  # units of their world per unit of our world
    shift: tuple[float, float, float] = (0.0, 0.0, 0.0)  # units of their world

    def apply(self, points: torch.Tensor) -> torch.Tensor:
        """Map points [..., 3] of our world to their world. Differentiable in the points."""
        return points * self.scale + points.new_tensor(self.shift)

    @classmethod
    def from_bounds(cls, their_bounds: Bounds, our_bounds: Bounds) -> "Similarity":
        """Return the transformation that maps the cube `our_bounds` onto the cube `their_bounds`."""
        scale = their_bounds.side / our_bounds.side
        # The centre of our cube has to become the centre of theirs.
        shift = tuple(
            their_coordinate - scale * our_coordinate
            for their_coordinate, our_coordinate in zip(their_bounds.centre, our_bounds.centre, strict=True)
        )
        return cls(scale, shift)  # type: ignore[arg-type]


def scaled_density(sigma: torch.Tensor, factor: float) -> torch.Tensor:
    """Multiply the density by a factor. Argument and result are raw densities of any shape.

    The density of EG3D's ray marcher is softplus(sigma - 1). The result r fulfils softplus(r - 1) = factor *
    softplus(sigma - 1). If lengths are divided by `factor` at the same time, the optical depth is unchanged.
    Differentiable in sigma.

    Args: sigma: raw density; factor: positive number.
    Deviates: for sigma - 1 < -15, where softplus(x) is approximately exp(x), log(factor) is added to sigma.
    """
    shifted_sigma = sigma - 1
    # The clamp keeps the values that `where` discards finite. Otherwise their gradient would be NaN.
    scaled_activation = F.softplus(shifted_sigma.clamp_min(-15)) * factor
    # Inverse of softplus: log(exp(a) - 1) = a + log(1 - exp(-a)).
    return 1 + torch.where(
        shifted_sigma < -15,
        shifted_sigma + np.log(factor),
        scaled_activation + torch.log(-torch.expm1(-scaled_activation)),
    )


@dataclasses.dataclass(frozen=True)
class Placement:
    """Position, size, orientation and density scale of a generator's shapes in our world."""

    similarity: Similarity = Similarity()  # transformation from our world to theirs
    bounds: Bounds = Bounds()  # cube of the shapes, in our world
    mirrored: bool = False  # True: x is mirrored about the centre of the bounds
    cameras: CameraFamily | None = None  # in our world; None: the generator's cameras, unchanged
    # Increasing function from raw densities of the generator to raw densities in our world. The default
    # returns them unchanged.
    density: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.clone


class PlacedField:
    """A field of another generator, moved into our world.

    Args:
        inner_field: field in the world of the other generator.
        place: position, size, orientation and density scale of its shapes in our world.
    """

    def __init__(self, inner_field: Field, place: Placement):
        self._inner = inner_field
        self._place = place
        self.bounds = place.bounds
        self.level = float(place.density(torch.tensor(inner_field.level)))

    def __len__(self) -> int:
        return len(self._inner)

    def _flipped(self, points: torch.Tensor) -> torch.Tensor:
        """Mirror points [..., 3] of our world if the place is mirrored, else return them unchanged."""
        if not self._place.mirrored:
            return points
        # Only x changes: reflection in the plane through the centre of the bounds.
        return torch.cat([2 * self.bounds.centre[0] - points[..., :1], points[..., 1:]], dim=-1)

    def _within(self, points: torch.Tensor) -> torch.Tensor:
        """Test which points [..., 3] of their world lie in the inner generator's cube: a bool [...]."""
        inner_bounds = self._inner.bounds
        offsets = points - points.new_tensor(inner_bounds.centre)
        # The tolerance 1e-5 includes points that rounding has moved out of the cube.
        return offsets.abs().amax(dim=-1) <= inner_bounds.side / 2 * (1 + 1e-5)

    def density(self, points: torch.Tensor) -> torch.Tensor:
        """Return the raw density [N, P], see `Field`.

        Outside the generator's cube the density is far below the level of the surface.
        """
        inner_points = self._place.similarity.apply(self._flipped(points))
        sigma = self._place.density(self._inner.density(inner_points))
        return torch.where(self._within(inner_points).to(sigma.device), sigma, self.level - _FAR_BELOW)

    def density_grid(self, grid: SlabSpec) -> torch.Tensor:
        """Return the raw density [N, D, H, W] at grid points, see `Field`.

        A point outside the generator's cube gets the smallest density of its shape inside the cube. Slabs are
        scaled by their own range of densities, and these points do not change that range.
        """
        # The mirror image of a skewed lattice is not a skewed lattice, so its points are evaluated one
        # by one.
        if grid.lattice != "straight" and self._place.mirrored:
            return self.density(grid.points().reshape(-1, 3)).unflatten(1, grid.shape)
        # For a mirrored place, the grid is evaluated without mirroring, with the crops at low and high x
        # exchanged, and the result is flipped at the end.
        x_low, x_high, y_low, y_high, z_low, z_high = grid.crop
        inner_crop = (x_high, x_low, y_low, y_high, z_low, z_high) if self._place.mirrored else grid.crop
        similarity = self._place.similarity
        inner_centre = similarity.apply(
            self._flipped(torch.tensor(grid.centre, dtype=torch.float64))
        ).tolist()
        inner_grid = dataclasses.replace(
            grid, crop=inner_crop, centre=tuple(inner_centre), box_warp=grid.box_warp * similarity.scale
        )
        # The grid is transformed, not its points, because the inner generator may evaluate grids faster.
        sigma = self._inner.density_grid(inner_grid)
        is_inside = self._within(inner_grid.points()).to(sigma.device)  # [D, H, W]
        # If all points are inside, none is replaced. If none is inside, there is no smallest density.
        if is_inside.any() and not is_inside.all():
            # [N, 1, 1, 1]
            smallest_sigma = sigma.where(is_inside, torch.inf).amin(dim=(1, 2, 3), keepdim=True)
            sigma = torch.where(is_inside, sigma, smallest_sigma)
        sigma = self._place.density(sigma)
        return sigma.flip(-1) if self._place.mirrored else sigma

    def colour(self, points: torch.Tensor) -> torch.Tensor:
        """Return the colour [N, P, 3] in 0..1, see `Field`."""
        return self._inner.colour(self._place.similarity.apply(self._flipped(points)))

    def render(self, cameras: torch.Tensor, options: RenderOptions = DEFAULT_OPTIONS) -> Rendering:
        """Render the shapes from cameras of our world, see `Field`.

        The inner generator renders with its own density, so the density scale of the place has no effect.
        """
        # A copy, because the caller's labels must not change.
        inner_cameras = cameras.clone()
        centre_x = self.bounds.centre[0]
        # mirror_label mirrors about x = 0. Entry 3 of a label is the x coordinate of the camera's position,
        # so the camera is shifted before and after.
        if self._place.mirrored:
            inner_cameras[:, 3] -= centre_x
            inner_cameras = mirror_label(inner_cameras)
            inner_cameras[:, 3] += centre_x
        # The camera's position is column 3 of the row-major 4 x 4 pose: entries 3, 7 and 11.
        inner_cameras[:, [3, 7, 11]] = self._place.similarity.apply(inner_cameras[:, [3, 7, 11]])
        renderings = self._inner.render(inner_cameras, options)
        # The generator renders the unmirrored shape from the mirrored camera, so the image has to be flipped.
        image, raw_image, depth, opacity = (
            (tensor.flip(-1) for tensor in renderings) if self._place.mirrored else renderings
        )
        # The depth is a length in their world.
        return Rendering(image, raw_image, depth / self._place.similarity.scale, opacity)


class Placed:
    """A `Generator` with the latents and shapes of another generator, which are moved into our world.

    Its mapping network expects conditioning cameras of the inner generator, see `ws_of_placed`.

    Args:
        inner_generator: the other generator.
        place: position, size, orientation and density scale of its shapes in our world.
    """

    def __init__(self, inner_generator: Generator, place: Placement):
        self.inner = inner_generator
        self.place = place
        self.bounds = place.bounds
        self.cameras = place.cameras or inner_generator.cameras
        self.level = float(place.density(torch.tensor(inner_generator.level)))

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the inner generator. Python calls this for attributes not defined here."""
        return getattr(self.inner, name)

    def field(self, ws: torch.Tensor, noise_mode: str = "const") -> PlacedField:
        """Synthesise shapes, see `Generator`."""
        return PlacedField(self.inner.field(ws, noise_mode), self.place)


def ws_of_placed(generator: Generator, seeds: Sequence[int], psi: float, cutoff: int | None) -> torch.Tensor:
    """Map N seeds to style vectors ws [N, L, W].

    The mapping network of a `Placed` generator is conditioned on the frontal camera of its inner generator,
    as without the placement.

    Args:
        generator: a generator, `Placed` or not.
        seeds: N latent seeds.
        psi: truncation factor in 0..1.
        cutoff: number of layers that are truncated; None: all layers.
    """
    return ws_of_seeds(generator.inner if isinstance(generator, Placed) else generator, seeds, psi, cutoff)
