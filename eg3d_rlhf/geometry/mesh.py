"""Isosurface of a density volume as a closed triangle mesh in world coordinates, and checks and corrections
of meshes.

The checks count open edges, loose parts and flipped faces. The corrections choose the largest part and reduce
the number of faces.

Letters: D, H, W = grid points along z, y, x; X, Y, Z = along x, y, z; V vertices; F faces; P parts (connected
by shared vertices); S = cells along a brick's edge; B bricks.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from eg3d_rlhf.core.field import LEVEL
from eg3d_rlhf.core.spec import SlabSpec

if TYPE_CHECKING:
    from scipy.sparse import csr_array

# Densities are clipped to the level +- this many units of max(|level|, 1). The padding outside the volume has
# the lower of these values.
_REACH = 2.0**17
# Densities closer to the level than this, in the same units, count as just below it, so that no vertex lies
# on a grid point.
LEVEL_BAND = 2.0**-22
# Distance, in grid steps, that vertices keep from the ends of their grid edge. Distinct vertices then stay
# distinct in float32.
_MARGIN = 2e-4
_CHUNK = 1 << 20  # faces that are processed at once in float64
_ATTEMPTS = 6  # decimations of a part that are tried until one is closed
_MORE = 1.25  # ratio of the numbers of faces of successive attempts
_LEAST = 16  # smallest number of faces of a part


def extract_mesh(
    sigma: torch.Tensor | np.ndarray,
    axes: SlabSpec | Sequence[torch.Tensor | np.ndarray],
    level: float = LEVEL,
) -> tuple[np.ndarray, np.ndarray]:
    """Extract the surface sigma = level by marching cubes.

    A body that is cut off by the border of the volume is closed there. Outside the volume the density counts
    as far below the level. The cap therefore lies within 1/100 of a grid step of the border for densities up
    to 1000 times the level (10,000 at level 10).

    Args:
        sigma: raw density [D, H, W]; inside is where it exceeds the level.
        axes: a SlabSpec of that shape, or increasing world coordinates (x [W], y [H], z [D]).
        level: raw density at the surface.
    Returns: vertices [V, 3] float32 in world coordinates (x, y, z), and faces [F, 3] int64 in
    counter-clockwise order seen from outside.
    Not differentiable.
    Raises: ValueError if sigma is not finite, or if the level is not crossed.
    """
    volume = sigma.detach().cpu().numpy() if isinstance(sigma, torch.Tensor) else np.asarray(sigma)
    assert volume.ndim == 3 and min(volume.shape) >= 2
    coordinates = [
        np.asarray(axis, dtype=np.float64) for axis in (axes.axes() if isinstance(axes, SlabSpec) else axes)
    ]
    assert tuple(len(axis) for axis in reversed(coordinates)) == volume.shape
    assert all(np.all(np.diff(axis) > 0) for axis in coordinates)
    block = prepare_density(volume.transpose(2, 1, 0), level)  # [W, H, D], so that vertices are (x, y, z)
    check_crossed(float(volume.min()), float(volume.max()), level)
    vertices, faces, _ = marching_cubes([np.pad(block, 1, constant_values=outside_value(level))], level)
    # - 1: the padding shifted the indices
    return to_world(vertices - 1, coordinates), faces


def check_crossed(low: float, high: float, level: float) -> None:
    """Raise ValueError unless densities lie on both sides of the level.

    Args: low, high: smallest and largest density.
    """
    if not low < level < high:
        remedy = (
            f"Choose a level between these, such as {(low + high) / 2:.6g}"
            if low < high
            else "The density is constant and has no surface at any level. Check the generator"
        )
        raise ValueError(
            f"extract_mesh: expected sigma on both sides of level {level:g}, got [{low:g}, {high:g}]."
            f" {remedy}."
        )


def check_finite(low: float, high: float) -> None:
    """Raise ValueError unless the smallest and the largest density are finite numbers."""
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError(
            "extract_mesh: expected finite sigma, got NaN or infinity. Check the generator's weights."
        )


def outside_value(level: float) -> float:
    """Return the density that stands for everything outside the volume: the lowest value after
    `prepare_density`.
    """
    return level - _REACH * max(abs(level), 1.0)


def prepare_density(volume: np.ndarray, level: float) -> np.ndarray:
    """Return a float32 copy of raw densities for `marching_cubes`: clipped around the level, and never equal
    to it.

    Raises: ValueError for NaN or infinity.
    """
    # PyMCubes raises an error for float16, and returns an empty mesh for integers.
    volume = np.array(volume, dtype=np.float32)
    check_finite(volume.min(), volume.max())
    unit = max(abs(level), 1.0)
    np.clip(volume, level - _REACH * unit, level + _REACH * unit, out=volume)
    volume[np.abs(volume - level) < LEVEL_BAND * unit] = level - LEVEL_BAND * unit
    return volume


def marching_cubes(blocks: Iterable[np.ndarray], level: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Extract the surfaces of prepared blocks [X, Y, Z] float32, each by itself.

    Returns:
        vertices [V, 3] float64, one block after another, in grid steps from the first point of the block;
            each lies strictly inside a grid edge.
        faces [F, 3] int64, indices into all vertices.
        number of vertices of each block [blocks].
    """
    # Imported here, because the rest of the package works without it
    import mcubes

    pieces = [mcubes.marching_cubes(np.ascontiguousarray(block), float(level)) for block in blocks]
    counts = np.array([len(vertices) for vertices, _ in pieces], dtype=np.int64)
    vertices = np.concatenate([vertices.reshape(-1, 3) for vertices, _ in pieces])
    faces = np.concatenate([faces.reshape(-1, 3) for _, faces in pieces]).astype(np.int64)
    # index of a block's first vertex
    faces += np.repeat(np.cumsum(counts) - counts, [len(faces) for _, faces in pieces])[:, None]
    # A vertex lies on a grid edge: two of its coordinates are integers, and only the third is clipped.
    start = np.floor(vertices)
    along = np.subtract(vertices, start, out=vertices)
    np.clip(along, _MARGIN, 1 - _MARGIN, out=along, where=along > 0)
    return np.add(start, along, out=start), faces, counts


def to_world(vertices: np.ndarray, coordinates: Sequence[np.ndarray]) -> np.ndarray:
    """Convert fractional indices [V, 3] to world coordinates [V, 3] float32.

    The conversion is linear between grid points. Beyond the ends it continues with the outermost step.
    """
    world = np.empty(vertices.shape, dtype=np.float32)
    for i, axis in enumerate(coordinates):
        start = np.clip(np.floor(vertices[:, i]).astype(np.int64), 0, len(axis) - 2)
        world[:, i] = axis[start] + (vertices[:, i] - start) * (axis[start + 1] - axis[start])
    return world


@dataclass(frozen=True)
class EdgeCounts:
    """Numbers of half-edges without exactly one partner in the opposite direction. Every face has three
    half-edges.
    """

    open: int  # half-edges without a partner: the rim of a hole, or a neighbour of opposite orientation
    shared: int  # half-edges that occur in several faces: sheets that touch along an edge

    @property
    def watertight(self) -> bool:
        """True if every edge belongs to exactly two faces, which traverse it in opposite directions."""
        return self.open == 0 and self.shared == 0


def count_edges(faces: np.ndarray) -> EdgeCounts:
    """Count the half-edges of faces [F, 3] that prevent the mesh from being closed and consistently
    oriented.
    """
    graph = half_edges(faces, int(faces.max(initial=-1)) + 1)
    # Entries of the sparse matrix are summed where a half-edge occurs several times.
    shared = 3 * len(faces) - graph.nnz
    # The matrix equals its transpose exactly if every half-edge has its reverse. This comparison is fast.
    reverse = graph.T.tocsr()
    graph.sort_indices()
    reverse.sort_indices()
    if (
        shared == 0
        and np.array_equal(graph.indptr, reverse.indptr)
        and np.array_equal(graph.indices, reverse.indices)
    ):
        return EdgeCounts(0, 0)
    # A half-edge as one 64-bit key: start in the upper 32 bits, end in the lower ones.
    start, end = (faces[:, columns].astype(np.uint64).reshape(-1) for columns in ([0, 1, 2], [1, 2, 0]))
    forward = (start << np.uint64(32)) | end
    backward = np.sort((end << np.uint64(32)) | start)
    partner = np.searchsorted(backward, forward).clip(max=max(len(backward) - 1, 0))
    return EdgeCounts(int((backward[partner] != forward).sum()), shared)


def half_edges(faces: np.ndarray, vertices: int) -> "csr_array":
    """Return the directed edges of faces [F, 3] as a sparse matrix [V, V].

    An entry counts the faces that traverse the edge from row to column.
    """
    from scipy.sparse import coo_array

    ends = np.ascontiguousarray(faces[:, [1, 2, 0]]).reshape(-1)
    return coo_array(
        (np.ones(len(ends), dtype=np.int8), (faces.reshape(-1), ends)), shape=(vertices, vertices)
    ).tocsr()


def parts(faces: np.ndarray, vertices: int) -> tuple[int, np.ndarray]:
    """Return the number P of connected parts, and the part [F] of each face, 0..P-1."""
    from scipy.sparse.csgraph import connected_components

    count, label = connected_components(half_edges(faces, vertices), directed=True, connection="weak")
    part = label[faces[:, 0]]
    # A vertex that no face uses is a component, but no part
    used = np.bincount(part, minlength=count) > 0
    return int(used.sum()), (np.cumsum(used, dtype=np.int32) - 1)[part]


def face_volumes(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Compute the signed volumes [F] of the tetrahedra between each face and the origin.

    Their sum is the volume that a closed mesh encloses. It is positive if the faces are in counter-clockwise
    order seen from outside.
    """
    volumes = np.empty(len(faces))
    for start in range(0, len(faces), _CHUNK):
        (ax, ay, az), *sides = _corners(vertices, faces[start : start + _CHUNK])
        nx, ny, nz = _cross(*sides)
        # a . (b - a) x (c - a) = a . b x c, six times the signed volume
        volumes[start : start + _CHUNK] = (ax * nx + ay * ny + az * nz) / 6
    return volumes


def _corners(vertices: np.ndarray, faces: np.ndarray) -> list[list[np.ndarray]]:
    """Return the corner a of each face and its sides b - a and c - a, each as columns x, y, z [F] in float64.

    numpy is fastest with contiguous columns.
    """
    columns = [np.ascontiguousarray(vertices[:, axis], dtype=np.float64) for axis in range(3)]
    a, b, c = ([column[faces[:, corner]] for column in columns] for corner in range(3))
    return [a, [q - p for p, q in zip(a, b, strict=True)], [q - p for p, q in zip(a, c, strict=True)]]


def _cross(u: list[np.ndarray], v: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute the cross product of vectors that are given as columns x, y, z."""
    return u[1] * v[2] - u[2] * v[1], u[2] * v[0] - u[0] * v[2], u[0] * v[1] - u[1] * v[0]


def largest_part(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Select the part that encloses the largest volume.

    Hollows inside a body are parts with a negative volume, so they are never selected.

    Returns: vertices [V', 3], faces [F', 3], and the number P of parts before the selection.
    """
    count, part = parts(faces, len(vertices))
    if count > 1:
        volume = np.bincount(part, weights=face_volumes(vertices, faces), minlength=count)
        vertices, faces = compact(vertices, faces[part == volume.argmax()])
    return vertices, faces, count


def compact(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Remove the vertices that no face uses."""
    used = np.zeros(len(vertices), dtype=bool)
    used[faces] = True
    number = np.cumsum(used, dtype=np.int64) - 1
    return vertices[used], number[faces].astype(faces.dtype)


def decimate(vertices: np.ndarray, faces: np.ndarray, target: int) -> tuple[np.ndarray, np.ndarray]:
    """Reduce a mesh to about `target` faces by quadric edge collapse (Garland and Heckbert 1997;
    fast-simplification).

    Each part is decimated by itself, in proportion to its number of faces, but to at least 16. A closed part
    stays closed: if sheets would touch after the collapse, it keeps more faces, and a warning is issued. A
    mesh of at most `target` faces is returned unchanged.
    """
    assert target >= 4  # a tetrahedron has four faces
    if len(faces) <= target:
        return vertices, faces
    count, part = parts(faces, len(vertices))
    ends = np.cumsum(np.bincount(part, minlength=count))
    order = np.argsort(part, kind="stable")  # faces sorted by part
    decimated = []
    offset = 0
    extra = 0
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        # the part's vertices, and its faces as indices into them
        used, corners = np.unique(faces[order[start:end]], return_inverse=True)
        wanted = max(round(target * (end - start) / len(faces)), _LEAST if count > 1 else target)
        piece = _decimate_part(
            vertices[used].astype(np.float32), corners.reshape(-1, 3).astype(np.int32), wanted
        )
        extra += max(0, len(piece[1]) - wanted)
        decimated.append((piece[0], piece[1] + np.int32(offset)))
        offset += len(piece[0])
    face_count = sum(len(piece_faces) for _, piece_faces in decimated)
    # 5 %: rounding and small parts alone cause no warning
    if extra > 0.05 * target:
        warnings.warn(
            f"decimate: the mesh keeps {face_count} faces. With {target} faces it would not stay closed.",
            stacklevel=2,
        )
    return np.concatenate([v for v, _ in decimated]), np.concatenate([f for _, f in decimated])


def _decimate_part(vertices: np.ndarray, faces: np.ndarray, wanted: float) -> tuple[np.ndarray, np.ndarray]:
    """Decimate one part to about `wanted` faces, or to more if it would not stay closed otherwise."""
    import fast_simplification

    closed = count_edges(faces).watertight
    for _ in range(_ATTEMPTS):
        if wanted >= len(faces):
            break
        new_vertices, new_faces = fast_simplification.simplify(vertices, faces, target_count=int(wanted))
        new_vertices, new_faces = compact(new_vertices.astype(np.float32), new_faces.astype(np.int32))
        acceptable = len(new_faces) > 0 and (not closed or count_edges(new_faces).watertight)
        # Vertices at one position are rejected, because a program that reads the file may merge them.
        if acceptable and not (closed and len(np.unique(new_vertices, axis=0)) < len(new_vertices)):
            return new_vertices, new_faces
        wanted *= _MORE
    # No attempt kept the part closed: it is returned unchanged.
    return vertices, faces


def vertex_normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Compute unit normals [V, 3] float32: the area-weighted mean of the normals of the faces at each vertex.

    They point outwards if the faces are in counter-clockwise order seen from outside.
    """
    from scipy.sparse import csr_array

    normals = np.zeros((len(vertices), 3))
    for start in range(0, len(faces), _CHUNK):
        part = faces[start : start + _CHUNK]
        _, *sides = _corners(vertices, part)
        normal = np.stack(_cross(*sides), axis=1)  # [f, 3], length = twice the area
        # row pointers of a sparse matrix with three entries per face
        rows = np.arange(0, 3 * len(part) + 1, 3)
        corners = csr_array(
            (np.ones(3 * len(part)), part.reshape(-1), rows), shape=(len(part), len(vertices))
        )
        normals += corners.T @ normal  # each vertex sums over its faces
    length = np.sqrt(np.einsum("vi,vi->v", normals, normals))[:, None]
    # A vertex without faces, or with opposite ones, gets the normal 0.
    return np.divide(normals, length, out=np.zeros_like(normals), where=length > 0).astype(np.float32)


# Isosurface of a density that is never in memory as a whole. The grid is processed layer by layer. A layer is
# a few planes along x, cut along y and z into bricks that share their faces. Grid points count from 1; point
# 0 and those after the last lie outside the volume. Marching cubes runs only on the bricks that the surface
# passes through, so its work grows with the surface and not with the volume. A vertex is identified by the
# grid edge on which it lies, so the seams between bricks and between layers are exact. The memory holds one
# block and the surface so far, at any resolution.

BRICK = 8  # cells along a brick's edge
Progress = Callable[[str, int, int], None]  # (name of the stage, units done, units in all)
_BLOCK_POINTS = 1 << 23  # grid points of one block: 32 MiB in float32
_LEAST_PLANES = 16  # planes per block at least, so that the work per block stays small


def bricks_along(points: int, size: int = BRICK) -> int:
    """Return the number of bricks that cover `points` grid points and one step to the outside at each end."""
    return -(-(points + 1) // size)


def padded(points: int) -> int:
    """Return the number of grid points of those bricks, points outside the volume included."""
    return bricks_along(points) * BRICK + 1


def touched_bricks(layer: np.ndarray, level: float) -> np.ndarray:
    """Find bricks with values on both sides of the level, or at the level: bool [along y, along z].

    Args: layer: [planes, padded Y, padded Z].
    """
    band = LEVEL_BAND * max(abs(level), 1.0)
    extremes = []
    for extreme in (np.minimum, np.maximum):
        values = extreme.reduce(layer, axis=0)
        for axis in (0, 1):
            starts = np.arange(0, values.shape[axis] - 1, BRICK)
            # reduceat covers the points of each brick but its last one, which is the first point of the next
            # brick.
            inside = extreme.reduceat(np.delete(values, -1, axis), starts, axis=axis)
            values = extreme(inside, values.take(starts + BRICK, axis=axis))
        extremes.append(values)
    return (extremes[0] < level + band) & (extremes[1] > level - band)


class SurfaceBuilder:
    """The mesh so far, and the vertices in the last plane of the previous layer.

    Args:
        axes: increasing world coordinates x [X], y [Y], z [Z].
        level: raw density at the surface.
    """

    def __init__(self, axes: Sequence[np.ndarray], level: float):
        self._axes = axes
        self._level = level
        self._sides = tuple(padded(len(axis)) for axis in axes[1:])  # padded Y, Z
        # keys of the grid edges that start in one plane: three directions per grid point
        self._plane_keys = 3 * self._sides[0] * self._sides[1]
        # index of the vertex on each grid edge of a layer, -1 if there is none; all -1 between two calls
        self._lookup = np.empty(0, dtype=np.int32)
        # vertices in the plane that the next layer shares: keys of their grid edges, and their indices
        self._border = (np.empty(0, np.int64), np.empty(0, np.int32))
        self._vertices: list[np.ndarray] = []
        self._faces: list[np.ndarray] = []
        self._count = 0  # vertices so far

    def add(self, first: int, layer: np.ndarray, bricks: np.ndarray) -> None:
        """Mesh some bricks of a layer. Layers come in order; each begins with the last plane of the one
        before.

        Args:
            first: grid point along x of the first plane, 0 = outside.
            layer: raw density [planes, padded Y, padded Z], points outside included. Only selected bricks are
                read.
            bricks: bool [bricks along y, bricks along z]: selected bricks. The surface must pass through no
                other.
        Raises: ValueError for NaN or infinity.
        """
        corners = np.argwhere(bricks) * BRICK
        width = BRICK + 1
        # [planes, y, z, S + 1, S + 1]
        windows = np.lib.stride_tricks.sliding_window_view(layer, (width, width), axis=(1, 2))
        values = windows[:, corners[:, 0], corners[:, 1]].transpose(1, 0, 2, 3)  # [B, planes, S + 1, S + 1]
        if len(values):
            values = prepare_density(values, self._level)
            # `bricks` is a superset: bounds or the level band may have selected bricks without a surface.
            crossed = (values.min(axis=(1, 2, 3)) < self._level) & (values.max(axis=(1, 2, 3)) > self._level)
            values = values[crossed]
            corners = corners[crossed]
        if len(values) == 0:
            assert len(self._border[0]) == 0, "layers disagree in their shared plane"
            return
        # Vertices on the faces between bricks still occur once in each brick.
        vertices, faces, counts = marching_cubes(values, self._level)
        start = np.floor(vertices)
        # position on the grid edge, non-zero along the edge only
        along = np.subtract(vertices, start, out=vertices)
        start = start.astype(np.int64)
        start[:, 1:] += np.repeat(corners, counts, axis=0)
        self._append(first, len(layer), start, along, faces)

    def _append(
        self, first: int, planes: int, start: np.ndarray, along: np.ndarray, faces: np.ndarray
    ) -> None:
        """Assign an index to each new vertex, and store the new vertices and the faces.

        There is one vertex per grid edge. Those in the first plane keep the indices from the previous layer.

        Args: start, along: [V, 3]: first point of the vertex's grid edge in the layer, and position on the
        edge.
        """
        # key of a grid edge = 3 * (index of its first point) + its direction
        keys = (
            (start[:, 0] * self._sides[0] + start[:, 1]) * self._sides[1] + start[:, 2]
        ) * 3 + along.argmax(axis=1)
        if len(self._lookup) < planes * self._plane_keys:
            self._lookup = np.full(planes * self._plane_keys, -1, dtype=np.int32)
        lookup = self._lookup
        # Vertices of the shared plane are already known from the previous layer.
        lookup[self._border[0]] = self._border[1]
        fresh = np.flatnonzero(lookup[keys] < 0)
        fresh_keys = keys[fresh]
        order = np.arange(len(fresh), dtype=np.int32)
        # Several vertices on one edge write to the same entry, and the last one stays.
        lookup[fresh_keys] = order
        is_kept = lookup[fresh_keys] == order
        lookup[fresh_keys[is_kept]] = self._count + np.arange(np.count_nonzero(is_kept), dtype=np.int32)
        fresh = fresh[is_kept]
        numbers = lookup[keys]
        self._count += len(fresh)
        last = np.flatnonzero(start[:, 0] == planes - 1)  # vertices in the last plane
        assert first == 0 or not np.any(start[fresh, 0] + along[fresh, 0] == 0), (
            "layers disagree in their shared plane"
        )
        # Clearing the used entries costs less than filling the whole array.
        lookup[self._border[0]] = -1
        lookup[keys] = -1
        self._border = (keys[last] - (planes - 1) * self._plane_keys, numbers[last])
        positions = start[fresh] + along[fresh]
        # from padded to volume indices, which begin at 0
        positions += (first - 1, -1, -1)
        self._vertices.append(to_world(positions, self._axes))
        self._faces.append(numbers[faces])

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """Return vertices [V, 3] float32 in world coordinates and faces [F, 3] int32 of all layers."""
        return np.concatenate(self._vertices), np.concatenate(self._faces)


def block_planes(points_per_plane: int) -> int:
    """Return the number of grid planes of one block."""
    return max(_LEAST_PLANES, _BLOCK_POINTS // points_per_plane)


def extract_mesh_blockwise(
    sample: Callable[[slice], torch.Tensor | np.ndarray],
    axes: Sequence[torch.Tensor | np.ndarray],
    level: float = LEVEL,
    planes: int | None = None,
    progress: Progress | None = None,
    between: Callable[[], tuple[float, float]] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Extract the surface sigma = level block by block. The mesh equals that of `extract_mesh`.

    Marching cubes runs only on the bricks of a block that have values on both sides of the level. The surface
    is closed at the border of the volume.

    Args:
        sample: returns the raw density [x, Y, Z] of the grid points slice.start <= x index < slice.stop;
            called once per block, in order.
        axes: increasing world coordinates x [X], y [Y], z [Z].
        level: raw density at the surface.
        planes: x indices per block; None: about 32 MiB of them.
        progress: called with ("density", x indices done, X).
        between: called after the last block; returns the smallest and the largest density between which the
            level must lie. None: those that were sampled.
    Returns: vertices [V, 3] float32 in world coordinates, and faces [F, 3] int32 in counter-clockwise order
    seen from outside.
    Raises: ValueError if sigma is not finite or the level is not crossed.
    """
    coordinates = [np.asarray(axis, dtype=np.float64) for axis in axes]
    assert min(len(axis) for axis in coordinates) >= 2
    count, rows, columns = (len(axis) for axis in coordinates)
    builder = SurfaceBuilder(coordinates, float(level))
    low = np.inf
    high = -np.inf
    # A layer of BRICK cells. The last plane of a layer is the first plane of the next.
    layer = np.full((BRICK + 1, padded(rows), padded(columns)), outside_value(level), dtype=np.float32)
    # Grid point along x of the layer's first plane, 0 = outside; planes after it
    first = filled = 0
    step = planes or block_planes(rows * columns)
    for start in range(0, count, step):
        values = np.asarray(sample(slice(start, min(start + step, count))))
        least = float(values.min())
        greatest = float(values.max())
        check_finite(least, greatest)
        low = min(low, least)
        high = max(high, greatest)
        for plane in values:
            filled += 1
            layer[filled, 1 : rows + 1, 1 : columns + 1] = plane
            if filled == BRICK:
                builder.add(first, layer, touched_bricks(layer, level))
                layer[0] = layer[-1]
                filled = 0
                first = first + BRICK
        if progress is not None:
            progress("density", start + len(values), count)
    # The last layer ends with one plane outside the volume, which closes the surface.
    layer[filled + 1] = outside_value(level)
    builder.add(first, layer[: filled + 2], touched_bricks(layer[: filled + 2], level))
    check_crossed(*(between() if between else (low, high)), level)
    return builder.finish()
