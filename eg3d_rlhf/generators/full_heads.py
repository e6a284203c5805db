"""Families of full-head generators: PanoHead (An et al. 2023), SphereHead (Li et al. 2024), HyPlaneHead (Li
et al. 2025).

Letters: N samples, P points, F features, X, Y, Z = grid points along x, y, z.
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

_POINT_CHUNK = 1 << 16  # points decoded at once if no gradient is recorded


class HeadField(PlaneField):
    """Fields of ws [N, L, W] of a full-head network. Differentiable like `PlaneField`."""

    def __init__(self, G: Any, ws: torch.Tensor, noise_mode: str = "const"):
        super().__init__(G, ws, noise_mode)
        # These decoders have no fast path, and expect float32.
        self.planes = self._wide(self.planes)

    def density(self, points: torch.Tensor) -> torch.Tensor:
        """Return the raw density, see `Field`."""
        points = points.to(self.planes).expand(len(self), -1, -1)  # [N, P, 3]
        # The graph is recorded if any of the inputs needs a gradient.
        recorded = any(
            tensor.requires_grad for tensor in (self.planes, points, *self._G.decoder.parameters())
        )
        # With a graph, chunks would save no memory.
        parts = (points,) if torch.is_grad_enabled() and recorded else points.split(_POINT_CHUNK, dim=1)
        return torch.cat([self._decoded(part, sigma_only=True)["sigma"].squeeze(2) for part in parts], dim=1)

    def density_grid(self, grid: SlabSpec, impl: str = "auto") -> torch.Tensor:
        """Return the raw density at grid points, see `Field`. Each point is decoded by itself.

        Raises: ValueError for an impl other than 'auto' or 'pointwise'.
        """
        if impl not in ("auto", "pointwise"):
            raise ValueError(
                f"density_grid: expected impl='auto' or 'pointwise' for {type(self._G).__name__}, got"
                f" {impl!r}. Use 'auto'."
            )
        return self.density(grid.points().reshape(-1, 3)).unflatten(1, grid.shape)

    def separable(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> None:
        """Return None: the density has no separable form (see `SeparableField`)."""

    def decode(self, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return density and colour in one pass, see `PlaneField`."""
        # Density and features come from the same pass.
        decoded = self._decoded(points.to(self.planes))
        return decoded["sigma"].squeeze(2), self._to_colours(decoded["rgb"]).clamp(0, 1)

    def _colours(self, points: torch.Tensor) -> torch.Tensor:
        """Decode colours [N, P, 3] at world points [N, P, 3]."""
        return self._to_colours(self._decoded(points)["rgb"])

    def _to_colours(self, features: torch.Tensor) -> torch.Tensor:
        """Convert decoded features [N, P, F] to colours [N, P, 3] as in the raw image, before
        super-resolution.
        """
        features = self._G.scaled(features).transpose(1, 2).unsqueeze(3)  # [N, F, P, 1]
        # to_rgb is a style-modulated convolution; points take the place of pixels. -1..1 -> 0..1.
        return (self._G.to_rgb(features, self.ws).squeeze(3).transpose(1, 2) + 1) / 2


class FullHead(EG3D):
    """A `Generator` around a full-head network."""

    field_class = HeadField

    @property
    def cameras(self) -> CameraFamily:
        """Return the training cameras. They look at the origin, the centre of these heads.

        The avg_camera_pivot of EG3D, which the networks' options still contain, does not apply.
        """
        return dataclasses.replace(super().cameras, pivot=(0.0, 0.0, 0.0))


class TriGridField(HeadField):
    """Fields of a tri-grid. On a straight grid the density is computed from slices, not point by point."""

    def density_grid(self, grid: SlabSpec, impl: str = "auto") -> torch.Tensor:
        """Return the raw density at grid points, see `Field`.

        Args:
            impl: 'separable' (from slices), 'pointwise', or 'auto' ('separable' if the lattice is straight).
        Raises: ValueError for another impl, and for 'separable' with a skewed lattice or with stacks along
        fewer than three axes.
        """
        has_slices = grid.lattice == "straight" and self._orders is not None
        if impl == "separable" and not has_slices:
            raise ValueError(
                "density_grid: impl='separable' needs a straight lattice and stacks along x, y and z, got"
                f" lattice {grid.lattice!r}. Use impl='auto'."
            )
        if impl == "separable" or (impl == "auto" and has_slices and implementations.current() != "ref"):
            # [N, X, Y, Z] -> [N, D, H, W]
            return self.density_product(*grid.axes()).permute(0, 3, 2, 1).contiguous()
        return super().density_grid(grid, impl)

    def density_product(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Return the raw density on a product of coordinates, see `ProductField`."""
        if self._orders is None:
            # [X, Y, Z, 3]; indexing "ij" keeps x first.
            points = torch.stack(torch.meshgrid(x, y, z, indexing="ij"), dim=-1)
            return self.density(points.reshape(-1, 3)).unflatten(1, points.shape[:3])
        # Interpolation weights are computed on the CPU, see `tri_grid_density`.
        axes = [axis.cpu().to(self.planes.dtype) * (2 / self.bounds.side) for axis in (x, y, z)]
        return tri_grid_density(
            self.planes, self._orders, self._weights(self.planes.dtype), axes, self._G.extent
        )

    @functools.cached_property
    def _orders(self) -> list[Order] | None:
        """Return the coordinates along width, height and slices of each stack; None unless slices lie
        along x, y and z.
        """
        # The bases are permutation matrices: the row's largest entry is the coordinate.
        orders = [tuple(int(i) for i in rows.argmax(dim=1)) for rows in self._axes]
        return orders if {order[2] for order in orders} == {0, 1, 2} else None  # type: ignore[return-value]


class PanoHead(FullHead):
    """A `Generator` around PanoHead's network: tri-grids."""

    architecture = "panohead"
    field_class = TriGridField


class SphereHead(FullHead):
    """A `Generator` around SphereHead's network: two balls of spherical planes.

    The angles and the radius of a grid point depend on all three coordinates, so grids have no shared parts.
    """

    architecture = "spherehead"


class HyPlaneHead(FullHead):
    """A `Generator` around HyPlaneHead's network: three planes, and a sphere over directions.

    The sphere's contribution to every hidden unit depends on all three coordinates.
    """

    architecture = "hyplanehead"


register(Family("panohead", PanoHeadGenerator, DualDiscriminator, PanoHead))
register(Family("spherehead", SphereHeadGenerator, DualDiscriminator, SphereHead))
register(Family("hyplanehead", HyPlaneHeadGenerator, DualDiscriminator, HyPlaneHead))
