"""Isosurface of a density that is never held as a whole: blocks of grid planes, meshed one after the other and welded at their borders.

A grid is taken layer by layer: a few planes along x, cut along y and z into bricks that share their faces. Grid points count from 1;
point 0 and those after the last lie outside the volume. Marching cubes runs on the bricks that the surface passes through, so its work
grows with the surface, not the volume; a vertex is known by the grid edge that it lies on, which makes the seams between bricks and layers
exact. Memory is one block plus the surface found so far, whatever the resolution.

Letters: X, Y, Z = grid points along x, y, z; S = cells along a brick's edge; B bricks; V vertices; F faces.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from eg3d_rlhf.core.field import LEVEL
from eg3d_rlhf.geometry.mesh import LEVEL_BAND, check_crossed, check_finite, marching_cubes, outside_value, prepare_density, to_world

BRICK = 8  # cells along a brick's edge
Progress = Callable[[str, int, int], None]  # (what is being done, units done, units in all)
_BLOCK_POINTS = 1 << 23  # grid points of one block: 32 MiB in float32
_LEAST_PLANES = 16  # per block, so that work done once per block stays small


def bricks_along(points: int, size: int = BRICK) -> int:
    """Bricks that cover `points` grid points in a row and the step to the outside at either end."""
    return -(-(points + 1) // size)


def padded(points: int) -> int:
    """Grid points of those bricks, the outside included."""
    return bricks_along(points) * BRICK + 1


def touched_bricks(layer: np.ndarray, level: float) -> np.ndarray:
    """Which bricks of a layer [planes, padded Y, padded Z] hold values on both sides of the level, or on it: bool [along y, along z]."""
    band = LEVEL_BAND * max(abs(level), 1.0)
    found = []
    for extreme in (np.minimum, np.maximum):
        values = extreme.reduce(layer, axis=0)
        for axis in (0, 1):  # the last point of a brick is the first of the next
            starts = np.arange(0, values.shape[axis] - 1, BRICK)
            inside = extreme.reduceat(np.delete(values, -1, axis), starts, axis=axis)
            values = extreme(inside, values.take(starts + BRICK, axis=axis))
        found.append(values)
    return (found[0] < level + band) & (found[1] > level - band)


class SurfaceBuilder:
    """The mesh found so far, and the vertices in the last plane of the layer before.

    Args:
        axes: increasing world coordinates x [X], y [Y], z [Z].
        level: raw density of the surface.
    """

    def __init__(self, axes: Sequence[np.ndarray], level: float):
        self._axes, self._level = axes, level
        self._sides = tuple(padded(len(axis)) for axis in axes[1:])  # padded Y, Z
        self._plane_keys = 3 * self._sides[0] * self._sides[1]
        self._lookup = np.empty(0, dtype=np.int32)  # number of the vertex on each grid edge of a layer, -1 where there is none
        self._border = (np.empty(0, np.int64), np.empty(0, np.int32))  # edges in the shared plane, and their vertices' numbers
        self._vertices: list[np.ndarray] = []
        self._faces: list[np.ndarray] = []
        self._count = 0

    def add(self, first: int, layer: np.ndarray, bricks: np.ndarray) -> None:
        """Mesh some bricks of a layer; layers come in order, and each begins with the last plane of the one before.

        Args:
            first: grid point along x of the first plane, 0 = outside.
            layer: raw density [planes, padded Y, padded Z], also outside; read in the chosen bricks only.
            bricks: bool [bricks along y, bricks along z]; the surface passes through no other.
        Raises: ValueError for NaN or infinity.
        """
        corners, width = np.argwhere(bricks) * BRICK, BRICK + 1
        windows = np.lib.stride_tricks.sliding_window_view(layer, (width, width), axis=(1, 2))  # [planes, y, z, S + 1, S + 1]
        values = windows[:, corners[:, 0], corners[:, 1]].transpose(1, 0, 2, 3)  # [B, planes, S + 1, S + 1]
        if len(values):
            values = prepare_density(values, self._level)
            crossed = (values.min(axis=(1, 2, 3)) < self._level) & (values.max(axis=(1, 2, 3)) > self._level)
            values, corners = values[crossed], corners[crossed]
        if len(values) == 0:
            assert len(self._border[0]) == 0, "layers disagree in their shared plane"
            return
        vertices, faces, counts = marching_cubes(values, self._level)  # seams are still double
        start = np.floor(vertices)
        along = np.subtract(vertices, start, out=vertices)  # places on the vertices' grid edges
        start = start.astype(np.int64)
        start[:, 1:] += np.repeat(corners, counts, axis=0)
        self._append(first, len(layer), start, along, faces)

    def _append(self, first: int, planes: int, start: np.ndarray, along: np.ndarray, faces: np.ndarray) -> None:
        """Number the vertices, one per grid edge and those in the first plane as the layer before did, and keep what is new.

        start, along: [V, 3] first points of their grid edges in the layer, and places on them.
        """
        keys = ((start[:, 0] * self._sides[0] + start[:, 1]) * self._sides[1] + start[:, 2]) * 3 + along.argmax(axis=1)
        if len(self._lookup) < planes * self._plane_keys:
            self._lookup = np.full(planes * self._plane_keys, -1, dtype=np.int32)
        lookup = self._lookup
        lookup[self._border[0]] = self._border[1]
        fresh = np.flatnonzero(lookup[keys] < 0)
        fresh_keys, order = keys[fresh], np.arange(len(fresh), dtype=np.int32)
        lookup[fresh_keys] = order  # of several on one edge, the last is kept
        kept = lookup[fresh_keys] == order
        lookup[fresh_keys[kept]] = self._count + np.arange(np.count_nonzero(kept), dtype=np.int32)
        fresh = fresh[kept]
        numbers = lookup[keys]
        self._count += len(fresh)
        last = np.flatnonzero(start[:, 0] == planes - 1)
        assert first == 0 or not np.any(start[fresh, 0] + along[fresh, 0] == 0), "layers disagree in their shared plane"
        lookup[self._border[0]] = -1
        lookup[keys] = -1
        self._border = (keys[last] - (planes - 1) * self._plane_keys, numbers[last])
        place = start[fresh] + along[fresh]
        place += (first - 1, -1, -1)
        self._vertices.append(to_world(place, self._axes))
        self._faces.append(numbers[faces])

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """vertices [V, 3] float32 in world coordinates and faces [F, 3] int32 of all layers."""
        return np.concatenate(self._vertices), np.concatenate(self._faces)


def block_planes(points_per_plane: int) -> int:
    """Grid planes that go into one block."""
    return max(_LEAST_PLANES, _BLOCK_POINTS // points_per_plane)


def extract_mesh_blockwise(
    sample: Callable[[slice], torch.Tensor | np.ndarray], axes: Sequence[torch.Tensor | np.ndarray], level: float = LEVEL,
    planes: int | None = None, progress: Progress | None = None, between: Callable[[], tuple[float, float]] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The surface sigma = level, the same as `extract_mesh` gives for the whole volume; closed at the volume's border.

    Marching cubes runs on the bricks of a block that hold values on both sides of the level.

    Args:
        sample: raw density [x, Y, Z] of the grid points slice.start <= x index < slice.stop; called once per block, in order.
        axes: increasing world coordinates x [X], y [Y], z [Z].
        level: raw density of the surface.
        planes: x indices per block; about 32 MiB of them when None.
        progress: called with ("density", x indices done, X).
        between: gives the least and greatest density that the level must lie between, once all is sampled; those sampled when None.

    Returns: vertices [V, 3] float32 in world coordinates, faces [F, 3] int32 wound counter-clockwise seen from outside.
    Raises: ValueError when sigma is not finite or the level is not crossed, or an axis has fewer than 2 points.
    """
    coordinates = [np.asarray(axis, dtype=np.float64) for axis in axes]
    if min(len(axis) for axis in coordinates) < 2:
        raise ValueError(f"extract_mesh: expected at least 2 points per axis, got {[len(axis) for axis in coordinates]}. Sample more.")
    count, rows, columns = (len(axis) for axis in coordinates)
    builder, low, high = SurfaceBuilder(coordinates, float(level)), np.inf, -np.inf
    layer = np.full((BRICK + 1, padded(rows), padded(columns)), outside_value(level), dtype=np.float32)  # each begins with the last's end
    first = filled = 0  # grid point along x of the layer's first plane, 0 = outside; planes that follow it
    step = planes or block_planes(rows * columns)
    for start in range(0, count, step):
        values = np.asarray(sample(slice(start, min(start + step, count))))
        least, greatest = float(values.min()), float(values.max())
        check_finite(least, greatest)
        low, high = min(low, least), max(high, greatest)
        for plane in values:
            filled += 1
            layer[filled, 1 : rows + 1, 1 : columns + 1] = plane
            if filled == BRICK:
                builder.add(first, layer, touched_bricks(layer, level))
                layer[0], filled, first = layer[-1], 0, first + BRICK
        if progress is not None:
            progress("density", start + len(values), count)
    layer[filled + 1] = outside_value(level)
    builder.add(first, layer[: filled + 2], touched_bricks(layer[: filled + 2], level))
    check_crossed(*(between() if between else (low, high)), level)
    return builder.finish()
