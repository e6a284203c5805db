"""Families of full heads: PanoHead (An et al. 2023), SphereHead (Li et al. 2024), HyPlaneHead
(Li et al. 2025).

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

_POINT_CHUNK = 1 << 16  # points decoded at once where no gradient is recorded


class HeadField(PlaneField):
    """The fields of ws [N, L, W]. Differentiable as `PlaneField` is."""

    def __init__(self, G: Any, ws: torch.Tensor, noise_mode: str = "const"):
        super().__init__(G, ws, noise_mode)
        self.planes = self._wide(self.planes)

    def density(self, points: torch.Tensor) -> torch.Tensor:
        """See `Field`."""
        points = points.to(self.planes).expand(len(self), -1, -1)  # [N, P, 3]
        recorded = any(
            tensor.requires_grad for tensor in (self.planes, points, *self._G.decoder.parameters())
        )
        parts = (points,) if torch.is_grad_enabled() and recorded else points.split(_POINT_CHUNK, dim=1)
        return torch.cat([self._decoded(part, sigma_only=True)["sigma"].squeeze(2) for part in parts], dim=1)

    def density_grid(self, grid: SlabSpec, impl: str = "auto") -> torch.Tensor:
        """See `Field`: every point on its own.

        Raises: ValueError for an impl other than 'auto' or 'pointwise'.
        """
        if impl not in ("auto", "pointwise"):
            raise ValueError(
                f"density_grid: expected impl='auto' or 'pointwise' for {type(self._G).__name__}, got"
                f" {impl!r}. Use 'auto'."
            )
        return self.density(grid.points().reshape(-1, 3)).unflatten(1, grid.shape)

    def separable(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> None:
        """None: see `SeparableField`."""

    def decode(self, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `PlaneField`."""
        decoded = self._decoded(points.to(self.planes))
        return decoded["sigma"].squeeze(2), self._pictured(decoded["rgb"]).clamp(0, 1)

    def _colours(self, points: torch.Tensor) -> torch.Tensor:
        return self._pictured(self._decoded(points)["rgb"])

    def _pictured(self, features: torch.Tensor) -> torch.Tensor:
        """Colours [N, P, 3] of decoded features [N, P, F] as raw pictures show them,
        before super-resolution.
        """
        features = self._G.scaled(features).transpose(1, 2).unsqueeze(3)  # [N, F, P, 1]
        return (self._G.to_rgb(features, self.ws).squeeze(3).transpose(1, 2) + 1) / 2


class FullHead(EG3D):
    """`Generator` around a full-head network."""

    field_class = HeadField

    @property
    def cameras(self) -> CameraFamily:
        """They look at the origin, where these heads are, whatever avg_camera_pivot says."""
        return dataclasses.replace(super().cameras, pivot=(0.0, 0.0, 0.0))


class TriGridField(HeadField):
    """The fields of a tri-grid: on a straight grid density comes from slices,
    without a look at every point.
    """

    def density_grid(self, grid: SlabSpec, impl: str = "auto") -> torch.Tensor:
        """See `Field`.

        Args: impl: 'separable' (from slices), 'pointwise', or 'auto' (the first where the lattice is
            straight).
        Raises: ValueError for another impl, or 'separable' on a skewed lattice or of stacks along fewer than
            three axes.
        """
        possible = grid.lattice == "straight" and self._orders is not None
        if impl == "separable" and not possible:
            raise ValueError(
                f"density_grid: expected a straight lattice and stacks along x, y, z, got {grid.lattice!r}."
                " Use impl='auto'."
            )
        if impl == "separable" or (impl == "auto" and possible and implementations.current() != "ref"):
            return self.density_product(*grid.axes()).permute(0, 3, 2, 1).contiguous()
        return super().density_grid(grid, impl)

    def density_product(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """See `ProductField`."""
        if self._orders is None:
            points = torch.stack(torch.meshgrid(x, y, z, indexing="ij"), dim=-1)
            return self.density(points.reshape(-1, 3)).unflatten(1, points.shape[:3])
        axes = [axis.cpu().to(self.planes.dtype) * (2 / self.bounds.side) for axis in (x, y, z)]
        return tri_grid_density(
            self.planes, self._orders, self._weights(self.planes.dtype), axes, self._G.extent
        )

    @functools.cached_property
    def _orders(self) -> list[Order] | None:
        """Coordinates along width, height and slices of each stack;
        None unless slices lie along x, y and z.
        """
        orders = [tuple(int(i) for i in rows.argmax(dim=1)) for rows in self._axes]
        return orders if {order[2] for order in orders} == {0, 1, 2} else None  # type: ignore[return-value]


class PanoHead(FullHead):
    """`Generator` around PanoHead's network."""

    architecture = "panohead"
    field_class = TriGridField


class SphereHead(FullHead):
    """Two balls of spherical planes. Angles and radius of a grid point depend on all three coordinates, so no
    part of a grid is shared.
    """

    architecture = "spherehead"


class HyPlaneHead(FullHead):
    """Three planes and a sphere over directions, whose share of every hidden unit depends on all three
    coordinates.
    """

    architecture = "hyplanehead"


register(Family("panohead", PanoHeadGenerator, DualDiscriminator, PanoHead))
register(Family("spherehead", SphereHeadGenerator, DualDiscriminator, SphereHead))
register(Family("hyplanehead", HyPlaneHeadGenerator, DualDiscriminator, HyPlaneHead))
