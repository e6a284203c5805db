"""Isosurface of a density that is never held as a whole: blocks of grid planes, meshed one after the other and welded at their borders.

Memory is one block plus the surface found so far, whatever the resolution.

Letters: X, Y, Z = grid points along x, y, z; V vertices; F faces.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from eg3d_rlhf.sigma.mesh import LEVEL, check_crossed, marching_cubes, outside_value, prepare_density, to_world

Progress = Callable[[str, int, int], None]  # (what is being done, units done, units in all)

_BLOCK_POINTS = 1 << 23  # grid points of one block: 32 MiB in float32
_LEAST_PLANES = 16  # per block, so that work done once per block stays small


class _Border(NamedTuple):
    """The surface's vertices in one grid plane: their sorted grid edges and their numbers in the whole mesh."""

    keys: np.ndarray
    numbers: np.ndarray


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

    Two neighbouring blocks share one grid plane. The vertices in it are the same in both, one per grid edge that the surface crosses, and
    are kept once.

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
    builder = _Builder(coordinates, float(level))
    for start in range(0, count, step):
        part = slice(start, min(start + step, count))
        values = sample(part)
        builder.add(values.numpy() if isinstance(values, torch.Tensor) else np.asarray(values), last=part.stop == count)
        if progress is not None:
            progress("density", part.stop, count)
    check_crossed(builder.low, builder.high, level)
    return builder.finish()


class _Builder:
    """The mesh found so far, and the last plane of the block before."""

    def __init__(self, coordinates: Sequence[np.ndarray], level: float):
        self.coordinates, self.level = coordinates, level
        self.low, self.high = np.inf, -np.inf
        self._outside = outside_value(level)
        rows, columns = (len(axis) + 2 for axis in coordinates[1:])
        self._plane = np.full((1, rows, columns), self._outside, dtype=np.float32)  # padded, [1, Y + 2, Z + 2]
        self._first = -1  # x index of that plane
        self._border = _Border(np.empty(0, np.int64), np.empty(0, np.int64))
        self._vertices: list[np.ndarray] = []
        self._faces: list[np.ndarray] = []
        self._count = 0

    def add(self, values: np.ndarray, last: bool) -> None:
        """Mesh the planes `values` [x, Y, Z] together with the one before them, and the outside behind the last."""
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))
        inner = np.pad(prepare_density(values, self.level), ((0, int(last)), (1, 1), (1, 1)), constant_values=self._outside)
        block = np.concatenate([self._plane, inner])  # [x + 1 or x + 2, Y + 2, Z + 2]
        self._plane = block[-1:].copy()
        first, self._first = self._first, self._first + len(block) - 1
        if block.min() > self.level or block.max() < self.level:
            self._border = _Border(np.empty(0, np.int64), np.empty(0, np.int64))
            return
        vertices, faces = marching_cubes(block, self.level)
        self._append(vertices, faces, first, len(block) - 1)

    def _append(self, vertices: np.ndarray, faces: np.ndarray, first: int, end: int) -> None:
        """Number the new vertices, those in the first plane as the block before did, and keep what lies in the last plane."""
        numbers = np.empty(len(vertices), dtype=np.int64)
        rows, keys = self._in_plane(vertices, 0)
        order = np.argsort(keys)
        assert np.array_equal(self._border.keys, keys[order]), "blocks disagree in their shared plane"
        known = np.zeros(len(vertices), dtype=bool)
        known[rows] = True
        numbers[rows[order]] = self._border.numbers
        fresh = np.flatnonzero(~known)
        numbers[fresh] = self._count + np.arange(len(fresh))
        self._count += len(fresh)
        rows, keys = self._in_plane(vertices, end)
        order = np.argsort(keys)
        self._border = _Border(keys[order], numbers[rows[order]])
        kept = vertices[fresh] + (first, -1, -1)
        self._vertices.append(to_world(kept, self.coordinates))
        self._faces.append(numbers[faces].astype(np.int32))

    def _in_plane(self, vertices: np.ndarray, x: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the vertices in grid plane x, and the number of the grid edge that each lies on."""
        rows = np.flatnonzero(vertices[:, 0] == x)  # a vertex on an edge along x lies strictly between two planes
        start = np.floor(vertices[rows, 1:]).astype(np.int64)
        along_z = vertices[rows, 2] > start[:, 1]
        return rows, 2 * (start[:, 0] * self._plane.shape[2] + start[:, 1]) + along_z

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """vertices [V, 3] and faces [F, 3] of all blocks."""
        return np.concatenate(self._vertices), np.concatenate(self._faces)
