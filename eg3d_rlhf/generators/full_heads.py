"""Families of full-head generators: PanoHead (An et al. 2023), SphereHead (Li et al. 2024), HyPlaneHead (Li
et al. 2025).

Shapes: N is the number of samples, P of points, F of features, and X, Y and Z are numbers of grid points
along x, y and z.
"""

import dataclasses
import functools
from typing import Any

import torch

from eg3d_rlhf.core.field import CameraFamily
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.generators import Family, register
from eg3d_rlhf.generators.eg3d import EG3D, PlaneField
from eg3d_rlhf.geometry.slab import Order, tri_grid_density
from torch_utils.ops import implementations
from training.discriminator import DualDiscriminator
from training.fullhead import HyPlaneHeadGenerator, PanoHeadGenerator, SphereHeadGenerator

_POINT_CHUNK = 1 << 16  # number of points that are decoded in one call if no gradient is recorded


class HeadField(PlaneField):
    """N shapes of a full-head network, as a `Field`. Differentiable in ws and the network's weights."""

    def __init__(self, G: Any, ws: torch.Tensor, noise_mode: str = "const"):
        super().__init__(G, ws, noise_mode)
        # The decoders of these networks expect float32.
        self.planes = self._wide(self.planes)

    def density(self, points: torch.Tensor) -> torch.Tensor:
        """Return the raw density [N, P], see `Field`."""
        points = points.to(self.planes).expand(len(self), -1, -1)  # [N, P, 3]
        # The graph is recorded if any of the inputs needs a gradient.
        is_graph_recorded = torch.is_grad_enabled() and any(
            tensor.requires_grad for tensor in (self.planes, points, *self._G.decoder.parameters())
        )
        # A graph keeps the intermediate results of all chunks, so chunks would save no memory.
        point_chunks = (points,) if is_graph_recorded else points.split(_POINT_CHUNK, dim=1)
        return torch.cat(
            [self._decoded(point_chunk, sigma_only=True)["sigma"].squeeze(2) for point_chunk in point_chunks],
            dim=1,
        )

    def density_grid(self, grid: SlabSpec, impl: str = "auto") -> torch.Tensor:
        """Return the raw density [N, D, H, W] at grid points, see `Field`.

        Each point is decoded by itself.

        Args: grid: specification of the grid; impl: 'auto' or 'pointwise', which have the same effect.
        Raises: ValueError for another impl.
        """
        if impl not in ("auto", "pointwise"):
            raise ValueError(
                f"density_grid: expected impl='auto' or 'pointwise' for {type(self._G).__name__}, got"
                f" {impl!r}. Use 'auto'."
            )
        return self.density(grid.points().reshape(-1, 3)).unflatten(1, grid.shape)

    def separable(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> None:
        """Return None, because the density has no separable form (see `SeparableField`)."""

    def decode(self, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return raw density [N, P] and colour [N, P, 3] from one decoder pass, see `PlaneField.decode`."""
        decoder_outputs = self._decoded(points.to(self.planes))
        return decoder_outputs["sigma"].squeeze(2), self._to_colours(decoder_outputs["rgb"]).clamp(0, 1)

    def _colours(self, points: torch.Tensor) -> torch.Tensor:
        """Decode colours [N, P, 3] at world points [N, P, 3]."""
        return self._to_colours(self._decoded(points)["rgb"])

    def _to_colours(self, features: torch.Tensor) -> torch.Tensor:
        """Convert decoded features [N, P, F] to the colours [N, P, 3] of the raw image, in about 0..1.

        The raw image is the rendered image before super-resolution.
        """
        features = self._G.scaled(features).transpose(1, 2).unsqueeze(3)  # [N, F, P, 1]
        # to_rgb is a convolution of images, so the points are passed as an image of P x 1 pixels. Its output
        # is in -1..1.
        return (self._G.to_rgb(features, self.ws).squeeze(3).transpose(1, 2) + 1) / 2


class FullHead(EG3D):
    """Base class of the `Generator`s around full-head networks."""

    field_class = HeadField

    @property
    def cameras(self) -> CameraFamily:
        """Return the training cameras, which look at the origin, the centre of these heads.

        The networks' options still contain EG3D's avg_camera_pivot, which does not apply to these cameras.
        """
        return dataclasses.replace(super().cameras, pivot=(0.0, 0.0, 0.0))


class TriGridField(HeadField):
    """N shapes of a network with tri-grids, as a `Field`.

    A tri-grid consists of three stacks of slices, where EG3D has three planes. On a grid with the lattice
    "straight" of `SlabSpec`, the density is interpolated slice by slice, which is faster than point by point.
    """

    def density_grid(self, grid: SlabSpec, impl: str = "auto") -> torch.Tensor:
        """Return the raw density [N, D, H, W] at grid points, see `Field`.

        Args:
            grid: specification of the grid.
            impl: 'separable' (slice by slice), 'pointwise' (each point is decoded by itself), or 'auto'
                ('separable' if possible).
        Raises: ValueError for another impl, and for 'separable' if the lattice of the grid is skewed (see
            `SlabSpec`), or if the slices of the three stacks do not lie along three different axes.
        """
        is_separable = grid.lattice == "straight" and self._orders is not None
        if impl == "separable" and grid.lattice != "straight":
            raise ValueError(
                f"density_grid: impl='separable' needs a grid with lattice='straight', got {grid.lattice!r}."
                " Use impl='auto'."
            )
        if impl == "separable" and not is_separable:
            raise ValueError(
                "density_grid: impl='separable' needs stacks of slices along x, y and z, but two stacks of"
                " this network lie along the same axis. Use impl='auto'."
            )
        if impl == "separable" or (impl == "auto" and is_separable and implementations.current() != "ref"):
            # [N, X, Y, Z] -> [N, D, H, W]
            return self.density_product(*grid.axes()).permute(0, 3, 2, 1).contiguous()
        return super().density_grid(grid, impl)

    def density_product(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Return the raw density [N, X, Y, Z] on a grid of coordinates, see `ProductField`."""
        if self._orders is None:
            # [X, Y, Z, 3]; with indexing="ij" the first axis is x.
            points = torch.stack(torch.meshgrid(x, y, z, indexing="ij"), dim=-1)
            return self.density(points.reshape(-1, 3)).unflatten(1, points.shape[:3])
        # Interpolation weights are computed on the CPU, see `tri_grid_density`.
        plane_coordinates = [axis.cpu().to(self.planes.dtype) * (2 / self.bounds.side) for axis in (x, y, z)]
        return tri_grid_density(
            self.planes, self._orders, self._weights(self.planes.dtype), plane_coordinates, self._G.extent
        )

    @functools.cached_property
    def _orders(self) -> list[Order] | None:
        """Determine the world axes (0, 1, 2) along the width, the height and the slices of each stack.

        Returns: three axes for each stack, or None if the slices of two stacks lie along the same axis.
        """
        # The basis of a stack is a permutation matrix. The largest entry of a row is at the world axis.
        axis_orders = [tuple(int(axis) for axis in basis.argmax(dim=1)) for basis in self._axes]
        slice_axes = {axis_order[2] for axis_order in axis_orders}
        return axis_orders if slice_axes == {0, 1, 2} else None  # type: ignore[return-value]


class PanoHead(FullHead):
    """A `Generator` around a network of PanoHead, which has tri-grids in place of planes."""

    architecture = "panohead"
    field_class = TriGridField


class SphereHead(FullHead):
    """A `Generator` around a network of SphereHead, which has two balls of planes in spherical coordinates.

    The spherical coordinates of a point depend on all of x, y and z. The points of a grid therefore share no
    intermediate results, and each is decoded by itself.
    """

    architecture = "spherehead"


class HyPlaneHead(FullHead):
    """A `Generator` around a network of HyPlaneHead: three planes and a feature map over directions.

    The features of the map depend on all of x, y and z. The points of a grid therefore share no intermediate
    results, and each is decoded by itself.
    """

    architecture = "hyplanehead"


# The discriminators of released files also read masks or other images than `DualDiscriminator`, and are not
# read. A generator of EG3D that was converted to a tri-grid keeps its `DualDiscriminator` and can be tuned.
_RELEASED_TASKS = ("score", "label", "steer")
register(Family("panohead", PanoHeadGenerator, DualDiscriminator, PanoHead, _RELEASED_TASKS))
register(Family("spherehead", SphereHeadGenerator, DualDiscriminator, SphereHead, _RELEASED_TASKS))
register(Family("hyplanehead", HyPlaneHeadGenerator, DualDiscriminator, HyPlaneHead, _RELEASED_TASKS))
