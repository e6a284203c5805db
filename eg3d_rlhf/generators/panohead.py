"""PanoHead's family: tri-grids (An et al. 2023). On a straight grid density comes from slices, without a look at every point.

Letters: N samples, X, Y, Z = grid points along x, y, z.
"""

import functools

import torch

from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.generators import Family, register
from eg3d_rlhf.generators.fullhead import FullHead, HeadField
from eg3d_rlhf.geometry.tri_grid import Order, tri_grid_density
from torch_utils.ops import implementations
from training.discriminator import DualDiscriminator
from training.fullhead import PanoHeadGenerator


class TriGridField(HeadField):
    """The fields of a tri-grid."""

    def density_grid(self, grid: SlabSpec, impl: str = "auto") -> torch.Tensor:
        """See `Field`.

        Args: impl: 'separable' (from slices), 'pointwise', or 'auto' (the first where the lattice is straight).
        Raises: ValueError for another impl, or 'separable' on a skewed lattice or of stacks along fewer than three axes.
        """
        possible = grid.lattice == "straight" and self._orders is not None
        if impl == "separable" and not possible:
            raise ValueError(f"density_grid: expected a straight lattice and stacks along x, y, z, got {grid.lattice!r}. Use impl='auto'.")
        if impl == "separable" or (impl == "auto" and possible and implementations.current() != "ref"):
            return self.density_product(*grid.axes()).permute(0, 3, 2, 1).contiguous()
        return super().density_grid(grid, impl)

    def density_product(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """See `ProductField`."""
        if self._orders is None:
            points = torch.stack(torch.meshgrid(x, y, z, indexing="ij"), dim=-1)
            return self.density(points.reshape(-1, 3)).unflatten(1, points.shape[:3])
        axes = [axis.cpu().to(self.planes.dtype) * (2 / self.bounds.side) for axis in (x, y, z)]
        return tri_grid_density(self.planes, self._orders, self._weights(self.planes.dtype), axes, self._G.extent)

    @functools.cached_property
    def _orders(self) -> list[Order] | None:
        """Coordinates along width, height and slices of each stack; None unless slices lie along x, y and z."""
        orders = [tuple(int(i) for i in rows.argmax(dim=1)) for rows in self._axes]
        return orders if {order[2] for order in orders} == {0, 1, 2} else None  # type: ignore[return-value]


class PanoHead(FullHead):
    """`Generator` around PanoHead's network."""

    architecture = "panohead"
    field_class = TriGridField


register(Family("panohead", PanoHeadGenerator, DualDiscriminator, PanoHead))
