"""A field of one shape on a cube of grid points, given out block by block: what meshes and volumes are made of.

Letters: X, Y, Z = grid points along x, y, z; P points.
"""

from collections.abc import Sequence

import torch

from eg3d_rlhf.field import Field, SeparableField
from eg3d_rlhf.sigma.separable import SeparableDensity, sigma_from_maps
from eg3d_rlhf.sigma.spec import SlabSpec

OUTSIDE = -1000.0  # raw density of a trimmed border, as EG3D's shape extraction sets it


class FieldGrid:
    """A field on a cube of grid points, given out in ranges of x: what `extract_mesh_blockwise` and `write_mrc` read.

    Args:
        field: the field.
        resolution: grid points per axis, >= 2, on the corners of the scene cube.
        border: share of the cube's edge that is trimmed from each face, 0 <= border < 0.5; trimmed points hold `OUTSIDE`.
    Raises: ValueError for values outside these ranges.
    """

    def __init__(self, field: Field, resolution: int, border: float = 0.0):
        if not 0 <= border < 0.5:
            raise ValueError(f"FieldGrid: expected a border of 0 <= border < 0.5, got {border:g}. Trim less.")
        self.field, self.resolution = field, resolution
        if len(field) != 1:
            raise ValueError(f"FieldGrid: expected a field of one shape, got {len(field)}. Take them one by one.")
        self.axes: Sequence[torch.Tensor] = SlabSpec.of(field.bounds, resolution).axes()
        self._trim = int(border * resolution)
        self.inside = slice(self._trim, resolution - self._trim)  # grid points along each axis that are not trimmed
        if resolution - 2 * self._trim < 2:
            raise ValueError(f"FieldGrid: expected at least 2 points inside the border, got a border of {border:g} on {resolution} points.")

    @property
    def trimmed(self) -> bool:
        """Whether points at the border hold `OUTSIDE`."""
        return self._trim > 0

    def separable(self) -> SeparableDensity | None:
        """The density of the points that are not trimmed, as maps; None where the planes have no such form."""
        return self._maps(*(axis[self.inside] for axis in self.axes))

    @torch.no_grad()
    def _maps(self, *axes: torch.Tensor) -> SeparableDensity | None:
        return self.field.separable(*axes) if isinstance(self.field, SeparableField) else None

    @torch.no_grad()
    def _block(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Raw density [X, Y, Z] on the CPU at the product of world coordinates x [X], y [Y], z [Z]."""
        density = self._maps(x, y, z)
        if density is None:
            points = torch.stack(torch.meshgrid(x, y, z, indexing="ij"), dim=-1).reshape(-1, 3)
            return self.field.density(points)[0].cpu().reshape(len(x), len(y), len(z))
        return sigma_from_maps(density.maps, density.w, density.b, density.shape).cpu()

    def __call__(self, x: slice) -> torch.Tensor:
        """Raw density [x, Y, Z] of the grid points with these x indices."""
        low, high = self._trim, self.resolution - self._trim
        start, stop = max(x.start, low), min(x.stop, high)
        if low == 0:
            return self._block(self.axes[0][x], *self.axes[1:])
        block = torch.full((x.stop - x.start, self.resolution, self.resolution), OUTSIDE)
        if start < stop:
            y, z = (axis[low:high] for axis in self.axes[1:])
            block[start - x.start : stop - x.start, low:high, low:high] = self._block(self.axes[0][start:stop], y, z)
        return block
