"""Isosurface of a density that is never held as a whole: blocks of grid planes, meshed one after the other and welded at their borders.

Memory is one block plus the surface found so far, whatever the resolution.

Letters: X, Y, Z = grid points along x, y, z; V vertices; F faces.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from eg3d_rlhf.field import LEVEL
from eg3d_rlhf.sigma.mesh import check_crossed, check_finite, outside_value
from eg3d_rlhf.sigma.surface_blocks import BRICK, SurfaceBuilder, padded, touched_bricks

Progress = Callable[[str, int, int], None]  # (what is being done, units done, units in all)

_BLOCK_POINTS = 1 << 23  # grid points of one block: 32 MiB in float32
_LEAST_PLANES = 16  # per block, so that work done once per block stays small


def block_planes(points_per_plane: int) -> int:
    """Grid planes that go into one block."""
    return max(_LEAST_PLANES, _BLOCK_POINTS // points_per_plane)


def extract_mesh_blockwise(
    sample: Callable[[slice], torch.Tensor | np.ndarray],
    axes: Sequence[torch.Tensor | np.ndarray],
    level: float = LEVEL,
    planes: int | None = None,
    progress: Progress | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The surface sigma = level, the same as `extract_mesh` gives for the whole volume; closed at the volume's border.

    Marching cubes runs on the bricks of a block that hold values on both sides of the level (`surface_blocks`).

    Args:
        sample: raw density [x, Y, Z] of the grid points slice.start <= x index < slice.stop; called once per block, in order.
        axes: increasing world coordinates x [X], y [Y], z [Z].
        level: raw density of the surface.
        planes: x indices per block; about 32 MiB of them when None.
        progress: called with ("density", x indices done, X).

    Returns: vertices [V, 3] float32 in world coordinates, faces [F, 3] int32 wound counter-clockwise seen from outside.
    Raises: ValueError when sigma is not finite or the level is not crossed, or an axis has fewer than 2 points.
    """
    coordinates = [np.asarray(axis, dtype=np.float64) for axis in axes]
    count = len(coordinates[0])
    if min(len(axis) for axis in coordinates) < 2:
        raise ValueError(f"extract_mesh: expected at least 2 points per axis, got {[len(axis) for axis in coordinates]}. Sample more.")
    step = planes or block_planes(len(coordinates[1]) * len(coordinates[2]))
    mesher = _DenseMesher(coordinates, float(level))
    for start in range(0, count, step):
        part = slice(start, min(start + step, count))
        values = sample(part)
        mesher.add(values.numpy() if isinstance(values, torch.Tensor) else np.asarray(values), last=part.stop == count)
        if progress is not None:
            progress("density", part.stop, count)
    check_crossed(mesher.low, mesher.high, level)
    return mesher.builder.finish()


class _DenseMesher:
    """Hands blocks of grid planes to a `SurfaceBuilder` in layers, each with the last plane of the one before."""

    def __init__(self, coordinates: Sequence[np.ndarray], level: float):
        self.level, self.low, self.high = level, np.inf, -np.inf
        self.builder = SurfaceBuilder(coordinates, level)
        sides = [padded(len(axis)) for axis in coordinates[1:]]
        self._layer = np.full((BRICK + 1, *sides), outside_value(level), dtype=np.float32)  # planes 0.._filled of the next layer
        self._first, self._filled = 0, 0  # grid point along x of the layer's first plane, 0 = outside

    def add(self, values: np.ndarray, last: bool) -> None:
        """Mesh as many of the planes `values` [x, Y, Z] as make whole layers; all, and the step to the outside, after the last."""
        low, high = float(values.min()), float(values.max())
        check_finite(low, high)
        self.low, self.high = min(self.low, low), max(self.high, high)
        _, rows, columns = values.shape
        done = 0
        while done < len(values):
            take = min(BRICK - self._filled, len(values) - done)
            planes = slice(self._filled + 1, self._filled + 1 + take)
            self._layer[planes, 1 : rows + 1, 1 : columns + 1] = values[done : done + take]
            self._filled, done = self._filled + take, done + take
            if self._filled == BRICK:
                self._mesh(self._layer)
                self._layer[0], self._filled, self._first = self._layer[-1], 0, self._first + BRICK
        if last:
            self._layer[self._filled + 1] = outside_value(self.level)
            self._mesh(self._layer[: self._filled + 2])

    def _mesh(self, layer: np.ndarray) -> None:
        self.builder.add(self._first, layer, touched_bricks(layer, self.level))
