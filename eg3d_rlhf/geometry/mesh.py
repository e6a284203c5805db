"""Isosurface of a density volume as a closed triangle mesh in world coordinates, and what can go wrong with
one: open edges, loose parts, flipped faces, too many faces.

Letters: D, H, W = grid points along z, y, x; X, Y, Z = along x, y, z; V vertices; F faces; P parts
(connected by shared vertices); S = cells along a brick's edge; B bricks.
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

# values further from the level are clipped, in units of max(|level|, 1); the padding outside the volume lies
# there
_REACH = 2.0**17
# values so near to the level, in the same units, count as just below it: no vertex falls onto a grid point
LEVEL_BAND = 2.0**-22
# vertices keep this distance from the ends of their grid edge, in grid steps: distinct ones stay distinct in
# float32
_MARGIN = 2e-4
_CHUNK = 1 << 20  # faces whose volumes are taken at once
# decimations tried of a part, each with so many times the faces of the one before, until one is closed
_ATTEMPTS = 6
_MORE = 1.25
_LEAST = 16  # faces that every part keeps


def extract_mesh(
    sigma: torch.Tensor | np.ndarray,
    axes: SlabSpec | Sequence[torch.Tensor | np.ndarray],
    level: float = LEVEL,
) -> tuple[np.ndarray, np.ndarray]:
    """The surface sigma = level by marching cubes.

    A body that runs into the border of the volume is closed there: outside the volume the density counts as
    far below the level, so the cap lies within 1/100 of a grid step of the border for densities up to 1000
    times the level (10,000 at level 10).

    Args:
        sigma: raw density [D, H, W]; inside is where it exceeds the level.
        axes: a SlabSpec of that shape, or increasing world coordinates (x [W], y [H], z [D]).
        level: raw density of the surface.

    Returns: vertices [V, 3] float32 in world coordinates (x, y, z), faces [F, 3] int64 wound
        counter-clockwise seen from outside.
    Not differentiable.
    Raises: ValueError when sigma is not finite, or the level is not crossed.
    """
    volume = sigma.detach().cpu().numpy() if isinstance(sigma, torch.Tensor) else np.asarray(sigma)
    assert volume.ndim == 3 and min(volume.shape) >= 2
    coordinates = [
        np.asarray(axis, dtype=np.float64) for axis in (axes.axes() if isinstance(axes, SlabSpec) else axes)
    ]
    assert tuple(len(axis) for axis in reversed(coordinates)) == volume.shape
    assert all(np.all(np.diff(axis) > 0) for axis in coordinates)
    block = prepare_density(volume.transpose(2, 1, 0), level)  # [W, H, D], so vertices come as (x, y, z)
    check_crossed(float(volume.min()), float(volume.max()), level)
    vertices, faces, _ = marching_cubes([np.pad(block, 1, constant_values=outside_value(level))], level)
    return to_world(vertices - 1, coordinates), faces


def check_crossed(low: float, high: float, level: float) -> None:
    """Raise ValueError unless the densities from `low` to `high` lie on both sides of the level."""
    if not low < level < high:
        remedy = (
            f"Choose a level in between, such as {(low + high) / 2:.6g}"
            if low < high
            else "It is constant: no level has a surface"
        )
        raise ValueError(
            f"extract_mesh: expected sigma on both sides of level {level:g}, got [{low:g}, {high:g}]."
            f" {remedy}."
        )


def check_finite(low: float, high: float) -> None:
    """Raise ValueError unless the least and the greatest density are finite numbers."""
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError(
            "extract_mesh: expected finite sigma, got NaN or infinity. Check the generator's weights."
        )


def outside_value(level: float) -> float:
    """Density that stands for everything outside the volume: the lowest that `prepare_density` leaves."""
    return level - _REACH * max(abs(level), 1.0)


def prepare_density(volume: np.ndarray, level: float) -> np.ndarray:
    """A float32 copy of raw densities, clipped about the level and moved off it, as `marching_cubes` takes
    it.

    Raises: ValueError for NaN or infinity.
    """
    # PyMCubes raises on half and returns an empty mesh for integers
    volume = np.array(volume, dtype=np.float32)
    check_finite(volume.min(), volume.max())
    unit = max(abs(level), 1.0)
    np.clip(volume, level - _REACH * unit, level + _REACH * unit, out=volume)
    volume[np.abs(volume - level) < LEVEL_BAND * unit] = level - LEVEL_BAND * unit
    return volume


def marching_cubes(blocks: Iterable[np.ndarray], level: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Surfaces of prepared blocks [X, Y, Z] float32, each by itself.

    Returns: vertices [V, 3] float64 of one block after the other, in grid steps from its own first point and
    each strictly inside one grid edge; faces [F, 3] int64, numbers of vertices in all of them; how many of
    the vertices belong to each block [blocks].
    """
    import mcubes  # only here: the rest of the package works without it

    pieces = [mcubes.marching_cubes(np.ascontiguousarray(block), float(level)) for block in blocks]
    counts = np.array([len(vertices) for vertices, _ in pieces], dtype=np.int64)
    vertices = np.concatenate([vertices.reshape(-1, 3) for vertices, _ in pieces])
    faces = np.concatenate([faces.reshape(-1, 3) for _, faces in pieces]).astype(np.int64)
    faces += np.repeat(np.cumsum(counts) - counts, [len(faces) for _, faces in pieces])[:, None]
    start = np.floor(vertices)
    along = np.subtract(vertices, start, out=vertices)
    np.clip(along, _MARGIN, 1 - _MARGIN, out=along, where=along > 0)
    return np.add(start, along, out=start), faces, counts


def to_world(vertices: np.ndarray, coordinates: Sequence[np.ndarray]) -> np.ndarray:
    """Fractional indices [V, 3] to world coordinates [V, 3] float32, linear between grid points and carried
    on with the outermost step.
    """
    world = np.empty(vertices.shape, dtype=np.float32)
    for i, axis in enumerate(coordinates):
        start = np.clip(np.floor(vertices[:, i]).astype(np.int64), 0, len(axis) - 2)
        world[:, i] = axis[start] + (vertices[:, i] - start) * (axis[start + 1] - axis[start])
    return world


@dataclass(frozen=True)
class EdgeCounts:
    """Half-edges (every face has three) that have no single partner running the other way."""

    open: int  # without a partner: a hole's rim, or a neighbour that is wound the other way
    shared: int  # running the same way in several faces: sheets that touch along an edge

    @property
    def watertight(self) -> bool:
        """Every edge belongs to exactly two faces, which run through it in opposite directions."""
        return self.open == 0 and self.shared == 0


def count_edges(faces: np.ndarray) -> EdgeCounts:
    """Count the half-edges of faces [F, 3] that keep the mesh from being closed and consistently oriented."""
    graph = half_edges(faces, int(faces.max(initial=-1)) + 1)
    shared = 3 * len(faces) - graph.nnz
    reverse = graph.T.tocsr()
    graph.sort_indices()
    reverse.sort_indices()
    if (
        shared == 0
        and np.array_equal(graph.indptr, reverse.indptr)
        and np.array_equal(graph.indices, reverse.indices)
    ):
        return EdgeCounts(0, 0)  # every edge also runs the other way
    start, end = (faces[:, columns].astype(np.uint64).reshape(-1) for columns in ([0, 1, 2], [1, 2, 0]))
    forward = (start << np.uint64(32)) | end
    backward = np.sort((end << np.uint64(32)) | start)
    partner = np.searchsorted(backward, forward).clip(max=max(len(backward) - 1, 0))
    return EdgeCounts(int((backward[partner] != forward).sum()), shared)


def half_edges(faces: np.ndarray, vertices: int) -> "csr_array":
    """Directed edges of faces [F, 3] as a sparse matrix [V, V] with an entry where an edge runs from row to
    column.
    """
    from scipy.sparse import coo_array

    ends = np.ascontiguousarray(faces[:, [1, 2, 0]]).reshape(-1)
    return coo_array(
        (np.ones(len(ends), dtype=np.int8), (faces.reshape(-1), ends)), shape=(vertices, vertices)
    ).tocsr()


def parts(faces: np.ndarray, vertices: int) -> tuple[int, np.ndarray]:
    """The number of parts P that faces fall into, and the part [F] of each face, 0..P-1."""
    from scipy.sparse.csgraph import connected_components

    count, label = connected_components(half_edges(faces, vertices), directed=True, connection="weak")
    part = label[faces[:, 0]]
    used = np.bincount(part, minlength=count) > 0  # vertices that no face uses are no part
    return int(used.sum()), (np.cumsum(used, dtype=np.int32) - 1)[part]


def face_volumes(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Signed volumes [F] of the tetrahedra between each face and the origin; their sum is the volume that a
    closed mesh encloses.

    It is positive where the faces are wound counter-clockwise seen from outside.
    """
    volumes = np.empty(len(faces))
    for start in range(0, len(faces), _CHUNK):
        (ax, ay, az), *sides = _corners(vertices, faces[start : start + _CHUNK])
        nx, ny, nz = _cross(*sides)
        # a . (b - a) x (c - a) = a . b x c
        volumes[start : start + _CHUNK] = (ax * nx + ay * ny + az * nz) / 6
    return volumes


def _corners(vertices: np.ndarray, faces: np.ndarray) -> list[list[np.ndarray]]:
    """A corner a of each face and the sides b - a and c - a, as x, y, z [F] float64 each: single columns,
    which numpy is fastest with.
    """
    columns = [np.ascontiguousarray(vertices[:, axis], dtype=np.float64) for axis in range(3)]
    a, b, c = ([column[faces[:, corner]] for column in columns] for corner in range(3))
    return [a, [q - p for p, q in zip(a, b, strict=True)], [q - p for p, q in zip(a, c, strict=True)]]


def _cross(u: list[np.ndarray], v: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return u[1] * v[2] - u[2] * v[1], u[2] * v[0] - u[0] * v[2], u[0] * v[1] - u[1] * v[0]


def largest_part(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """The part that encloses the largest volume, and how many parts there were.

    Hollows inside a body are parts of their own, of negative volume, so they are never chosen.

    Returns: vertices [V', 3], faces [F', 3], P.
    """
    count, part = parts(faces, len(vertices))
    if count > 1:
        volume = np.bincount(part, weights=face_volumes(vertices, faces), minlength=count)
        vertices, faces = compact(vertices, faces[part == volume.argmax()])
    return vertices, faces, count


def compact(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mesh without the vertices that no face uses."""
    used = np.zeros(len(vertices), dtype=bool)
    used[faces] = True
    number = np.cumsum(used, dtype=np.int64) - 1
    return vertices[used], number[faces].astype(faces.dtype)


def decimate(vertices: np.ndarray, faces: np.ndarray, target: int) -> tuple[np.ndarray, np.ndarray]:
    """About `target` faces that keep the shape, by quadric edge collapse (Garland and Heckbert 1997;
    fast-simplification).

    Every part is decimated by itself, in proportion to its faces and to 16 at least. A closed part stays
    closed: where sheets would touch after the collapse it keeps more faces, with a warning. A mesh of no more
    than `target` faces is returned as it is.
    """
    assert target >= 4  # a tetrahedron's
    if len(faces) <= target:
        return vertices, faces
    count, part = parts(faces, len(vertices))
    ends = np.cumsum(np.bincount(part, minlength=count))
    order = np.argsort(part, kind="stable")
    done = []
    offset = 0
    extra = 0
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        used, corners = np.unique(faces[order[start:end]], return_inverse=True)
        wanted = max(round(target * (end - start) / len(faces)), _LEAST if count > 1 else target)
        piece = _decimate_part(
            vertices[used].astype(np.float32), corners.reshape(-1, 3).astype(np.int32), wanted
        )
        extra += max(0, len(piece[1]) - wanted)
        done.append((piece[0], piece[1] + np.int32(offset)))
        offset += len(piece[0])
    kept = sum(len(piece_faces) for _, piece_faces in done)
    if extra > 0.05 * target:
        warnings.warn(
            f"decimate: the mesh would not stay closed with {target} faces; kept {kept}.", stacklevel=2
        )
    return np.concatenate([v for v, _ in done]), np.concatenate([f for _, f in done])


def _decimate_part(vertices: np.ndarray, faces: np.ndarray, wanted: float) -> tuple[np.ndarray, np.ndarray]:
    """One part with about `wanted` faces, or with more where that would open it."""
    import fast_simplification

    closed = count_edges(faces).watertight
    for _ in range(_ATTEMPTS):
        if wanted >= len(faces):
            break
        new_vertices, new_faces = fast_simplification.simplify(vertices, faces, target_count=int(wanted))
        new_vertices, new_faces = compact(new_vertices.astype(np.float32), new_faces.astype(np.int32))
        kept = len(new_faces) > 0 and (not closed or count_edges(new_faces).watertight)
        # a reader may merge vertices at one place
        if kept and not (closed and len(np.unique(new_vertices, axis=0)) < len(new_vertices)):
            return new_vertices, new_faces
        wanted *= _MORE
    return vertices, faces


def vertex_normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Unit normals [V, 3] float32: the faces' normals at each vertex, weighted by area; outwards where the
    winding is.
    """
    from scipy.sparse import csr_array

    normals = np.zeros((len(vertices), 3))
    for start in range(0, len(faces), _CHUNK):
        part = faces[start : start + _CHUNK]
        _, *sides = _corners(vertices, part)
        normal = np.stack(_cross(*sides), axis=1)  # [f, 3], length = twice the area
        rows = np.arange(0, 3 * len(part) + 1, 3)
        corners = csr_array(
            (np.ones(3 * len(part)), part.reshape(-1), rows), shape=(len(part), len(vertices))
        )
        normals += corners.T @ normal  # each vertex sums over its faces
    length = np.sqrt(np.einsum("vi,vi->v", normals, normals))[:, None]
    return np.divide(normals, length, out=np.zeros_like(normals), where=length > 0).astype(np.float32)


# Isosurface of a density that is never held as a whole. A grid is taken layer by layer: a few planes along x,
# cut along y and z into bricks that share their faces. Grid points count from 1; point 0 and those after the
# last lie outside the volume. Marching cubes runs on the bricks that the surface passes through, so its work
# grows with the surface, not the volume; a vertex is known by the grid edge that it lies on, which makes the
# seams between bricks and layers exact. Memory is one block plus the surface so far, whatever the resolution.

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
    """Which bricks of a layer [planes, padded Y, padded Z] hold values on both sides of the level, or on it:
    bool [along y, along z].
    """
    band = LEVEL_BAND * max(abs(level), 1.0)
    extremes = []
    for extreme in (np.minimum, np.maximum):
        values = extreme.reduce(layer, axis=0)
        for axis in (0, 1):  # the last point of a brick is the first of the next
            starts = np.arange(0, values.shape[axis] - 1, BRICK)
            inside = extreme.reduceat(np.delete(values, -1, axis), starts, axis=axis)
            values = extreme(inside, values.take(starts + BRICK, axis=axis))
        extremes.append(values)
    return (extremes[0] < level + band) & (extremes[1] > level - band)


class SurfaceBuilder:
    """The mesh found so far, and the vertices in the last plane of the layer before.

    Args:
        axes: increasing world coordinates x [X], y [Y], z [Z].
        level: raw density of the surface.
    """

    def __init__(self, axes: Sequence[np.ndarray], level: float):
        self._axes = axes
        self._level = level
        self._sides = tuple(padded(len(axis)) for axis in axes[1:])  # padded Y, Z
        self._plane_keys = 3 * self._sides[0] * self._sides[1]
        # number of the vertex on each grid edge of a layer, -1 where there is none
        self._lookup = np.empty(0, dtype=np.int32)
        # edges in the shared plane, and their vertices' numbers
        self._border = (np.empty(0, np.int64), np.empty(0, np.int32))
        self._vertices: list[np.ndarray] = []
        self._faces: list[np.ndarray] = []
        self._count = 0

    def add(self, first: int, layer: np.ndarray, bricks: np.ndarray) -> None:
        """Mesh some bricks of a layer; layers come in order, and each begins with the last plane of the one
        before.

        Args:
            first: grid point along x of the first plane, 0 = outside.
            layer: raw density [planes, padded Y, padded Z], also outside; read in the chosen bricks only.
            bricks: bool [bricks along y, bricks along z]; the surface passes through no other.
        Raises: ValueError for NaN or infinity.
        """
        corners = np.argwhere(bricks) * BRICK
        width = BRICK + 1
        # [planes, y, z, S + 1, S + 1]
        windows = np.lib.stride_tricks.sliding_window_view(layer, (width, width), axis=(1, 2))
        values = windows[:, corners[:, 0], corners[:, 1]].transpose(1, 0, 2, 3)  # [B, planes, S + 1, S + 1]
        if len(values):
            values = prepare_density(values, self._level)
            crossed = (values.min(axis=(1, 2, 3)) < self._level) & (values.max(axis=(1, 2, 3)) > self._level)
            values = values[crossed]
            corners = corners[crossed]
        if len(values) == 0:
            assert len(self._border[0]) == 0, "layers disagree in their shared plane"
            return
        vertices, faces, counts = marching_cubes(values, self._level)  # seams are still double
        start = np.floor(vertices)
        along = np.subtract(vertices, start, out=vertices)  # places on the vertices' grid edges
        start = start.astype(np.int64)
        start[:, 1:] += np.repeat(corners, counts, axis=0)
        self._append(first, len(layer), start, along, faces)

    def _append(
        self, first: int, planes: int, start: np.ndarray, along: np.ndarray, faces: np.ndarray
    ) -> None:
        """Number the vertices, one per grid edge and those in the first plane as the layer before did, and
        keep what is new.

        start, along: [V, 3] first points of their grid edges in the layer, and places on them.
        """
        keys = (
            (start[:, 0] * self._sides[0] + start[:, 1]) * self._sides[1] + start[:, 2]
        ) * 3 + along.argmax(axis=1)
        if len(self._lookup) < planes * self._plane_keys:
            self._lookup = np.full(planes * self._plane_keys, -1, dtype=np.int32)
        lookup = self._lookup
        lookup[self._border[0]] = self._border[1]
        fresh = np.flatnonzero(lookup[keys] < 0)
        fresh_keys = keys[fresh]
        order = np.arange(len(fresh), dtype=np.int32)
        lookup[fresh_keys] = order  # of several on one edge, the last is kept
        kept = lookup[fresh_keys] == order
        lookup[fresh_keys[kept]] = self._count + np.arange(np.count_nonzero(kept), dtype=np.int32)
        fresh = fresh[kept]
        numbers = lookup[keys]
        self._count += len(fresh)
        last = np.flatnonzero(start[:, 0] == planes - 1)
        assert first == 0 or not np.any(start[fresh, 0] + along[fresh, 0] == 0), (
            "layers disagree in their shared plane"
        )
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
    sample: Callable[[slice], torch.Tensor | np.ndarray],
    axes: Sequence[torch.Tensor | np.ndarray],
    level: float = LEVEL,
    planes: int | None = None,
    progress: Progress | None = None,
    between: Callable[[], tuple[float, float]] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The surface sigma = level, the same as `extract_mesh` gives for the whole volume; closed at the
    volume's border.

    Marching cubes runs on the bricks of a block that hold values on both sides of the level.

    Args:
        sample: raw density [x, Y, Z] of the grid points slice.start <= x index < slice.stop; called once per
            block, in order.
        axes: increasing world coordinates x [X], y [Y], z [Z].
        level: raw density of the surface.
        planes: x indices per block; about 32 MiB of them when None.
        progress: called with ("density", x indices done, X).
        between: gives the least and greatest density that the level must lie between, once all is sampled;
            those sampled when None.

    Returns: vertices [V, 3] float32 in world coordinates, faces [F, 3] int32 wound counter-clockwise seen
        from outside.
    Raises: ValueError when sigma is not finite or the level is not crossed.
    """
    coordinates = [np.asarray(axis, dtype=np.float64) for axis in axes]
    assert min(len(axis) for axis in coordinates) >= 2
    count, rows, columns = (len(axis) for axis in coordinates)
    builder = SurfaceBuilder(coordinates, float(level))
    low = np.inf
    high = -np.inf
    # each begins with the last's end
    layer = np.full((BRICK + 1, padded(rows), padded(columns)), outside_value(level), dtype=np.float32)
    first = filled = 0  # grid point along x of the layer's first plane, 0 = outside; planes that follow it
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
    layer[filled + 1] = outside_value(level)
    builder.add(first, layer[: filled + 2], touched_bricks(layer[: filled + 2], level))
    check_crossed(*(between() if between else (low, high)), level)
    return builder.finish()
