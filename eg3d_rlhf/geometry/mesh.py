"""Extraction of the isosurface of a density as a closed triangle mesh, and checks and corrections of meshes.

The isosurface is extracted by marching cubes (Lorensen and Cline 1987). The checks count open edges, parts
and faces with the wrong orientation. The corrections select the largest part and reduce the number of faces.

Shapes: D, H, W grid points along z, y, x; X, Y, Z grid points along x, y, z; V vertices; F faces; P parts
(sets of faces that are connected by shared vertices); S cells along the edge of a brick; B bricks.
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

# Densities are clipped to level - d and level + d, where d is this number times max(|level|, 1). The padding
# outside the volume has the lower of these two values.
_REACH = 2.0**17
# Densities whose distance from the level is smaller than this number times max(|level|, 1) are set just below
# the level, so that no vertex lies on a grid point.
LEVEL_BAND = 2.0**-22
# Smallest distance of a vertex from the ends of its grid edge, in grid steps. Different vertices then have
# different coordinates in float32, too.
_MARGIN = 2e-4
_CHUNK = 1 << 20  # number of faces that are processed at once in float64; limits the required memory
_ATTEMPTS = 6  # largest number of attempts to decimate a part so that it stays closed
_MORE = 1.25  # factor on the number of faces from one attempt to the next
_LEAST = 16  # smallest number of faces of a decimated part


def extract_mesh(
    sigma: torch.Tensor | np.ndarray,
    axes: SlabSpec | Sequence[torch.Tensor | np.ndarray],
    level: float = LEVEL,
) -> tuple[np.ndarray, np.ndarray]:
    """Extract the surface on which the raw density sigma equals a level, by marching cubes.

    A body that the border of the volume cuts off is closed there by a cap, because the density outside the
    volume counts as far below the level. The cap lies within 1/100 of a grid step of the border for densities
    up to 1000 times the level (10,000 at level 10). Not differentiable.

    Args:
        sigma: raw density [D, H, W]; the inside is where it exceeds the level.
        axes: SlabSpec of this shape, or increasing world coordinates (x [W], y [H], z [D]).
        level: raw density on the surface.

    Returns: vertices [V, 3] float32 in world coordinates (x, y, z), and faces [F, 3] int64, whose corners are
        in counter-clockwise order seen from outside.

    Raises: ValueError if sigma is not finite, or if it does not cross the level.
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
    # - 1: the padding has shifted the indices by one
    return to_world(vertices - 1, coordinates), faces


def check_crossed(low: float, high: float, level: float) -> None:
    """Raise ValueError if all densities lie on one side of the level, so that there is no surface.

    Args:
        low: smallest density.
        high: largest density.
        level: raw density on the surface.
    """
    # Written with `not`, so that NaN is an error, too.
    if not low < level < high:
        remedy = (
            f"Choose a level between these two numbers, such as {(low + high) / 2:.6g}"
            if low < high
            else "The density is constant and has no surface at any level. Check the generator"
        )
        raise ValueError(
            f"extract_mesh: the density does not cross the level {level:g}: its range is [{low:g}, {high:g}]."
            f" {remedy}."
        )


def check_finite(low: float, high: float) -> None:
    """Raise ValueError unless the smallest and the largest density are finite numbers."""
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError(
            "extract_mesh: the density is not finite: it contains NaN or infinity. Check the weights of the"
            " generator."
        )


def outside_value(level: float) -> float:
    """Return the raw density of points outside the volume, the smallest value after `prepare_density`."""
    return level - _REACH * max(abs(level), 1.0)


def prepare_density(volume: np.ndarray, level: float) -> np.ndarray:
    """Return a copy of raw densities for `marching_cubes`, clipped around the level and never equal to it.

    Args:
        volume: raw densities of any shape.
        level: raw density on the surface.

    Returns: float32 array of the same shape.

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
    """Extract the surfaces of several blocks, each block by itself.

    Args:
        blocks: densities [X, Y, Z] float32 that `prepare_density` returned.
        level: raw density on the surface.

    Returns: three arrays.
        vertices [V, 3] float64, block after block, in grid steps from the first grid point of the block. Each
            vertex lies strictly inside a grid edge.
        faces [F, 3] int64, as indices into all vertices.
        numbers of vertices [blocks] of the blocks.
    """
    # Imported here, because the rest of the package works without this library.
    import mcubes

    pieces = [mcubes.marching_cubes(np.ascontiguousarray(block), float(level)) for block in blocks]
    counts = np.array([len(vertices) for vertices, _ in pieces], dtype=np.int64)
    vertices = np.concatenate([vertices.reshape(-1, 3) for vertices, _ in pieces])
    faces = np.concatenate([faces.reshape(-1, 3) for _, faces in pieces]).astype(np.int64)
    # Indices within a block become indices into all vertices: the index of the block's first vertex is added.
    faces += np.repeat(np.cumsum(counts) - counts, [len(faces) for _, faces in pieces])[:, None]
    # A vertex lies on a grid edge: two of its coordinates are integers, and only the third is clipped.
    start = np.floor(vertices)
    along = np.subtract(vertices, start, out=vertices)
    np.clip(along, _MARGIN, 1 - _MARGIN, out=along, where=along > 0)
    return np.add(start, along, out=start), faces, counts


def to_world(vertices: np.ndarray, coordinates: Sequence[np.ndarray]) -> np.ndarray:
    """Convert positions in grid steps to world coordinates.

    The conversion is linear between grid points. Beyond the first and the last grid point, it continues with
    the outermost step.

    Args:
        vertices: positions [V, 3] as fractional indices of grid points.
        coordinates: world coordinates of the grid points along each of the three axes.

    Returns: world coordinates [V, 3] float32.
    """
    world = np.empty(vertices.shape, dtype=np.float32)
    for i, axis in enumerate(coordinates):
        # index of the grid point before the vertex; clipped, so that start + 1 exists
        start = np.clip(np.floor(vertices[:, i]).astype(np.int64), 0, len(axis) - 2)
        world[:, i] = axis[start] + (vertices[:, i] - start) * (axis[start + 1] - axis[start])
    return world


@dataclass(frozen=True)
class EdgeCounts:
    """Numbers of half-edges that prevent a mesh from being closed.

    Every face has three half-edges, which are directed. In a closed mesh, each half-edge has exactly one
    partner, the half-edge of the neighbouring face in the opposite direction.
    """

    open: int  # half-edges without a partner: at the rim of a hole, or next to a face of opposite orientation
    shared: int  # repetitions of half-edges that occur in several faces, where sheets touch along an edge

    @property
    def watertight(self) -> bool:
        """True if every edge belongs to exactly two faces, which traverse it in opposite directions."""
        return self.open == 0 and self.shared == 0


def count_edges(faces: np.ndarray) -> EdgeCounts:
    """Count the half-edges that prevent a mesh from being closed and consistently oriented.

    Args:
        faces: triangles [F, 3] as indices of vertices.
    """
    # number of vertices: the largest index plus 1
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
    # A half-edge becomes one 64-bit key: its start in the upper 32 bits, its end in the lower 32 bits.
    start, end = (faces[:, columns].astype(np.uint64).reshape(-1) for columns in ([0, 1, 2], [1, 2, 0]))
    forward = (start << np.uint64(32)) | end
    backward = np.sort((end << np.uint64(32)) | start)
    partner = np.searchsorted(backward, forward).clip(max=max(len(backward) - 1, 0))
    return EdgeCounts(int((backward[partner] != forward).sum()), shared)


def half_edges(faces: np.ndarray, vertices: int) -> "csr_array":
    """Return the half-edges of a mesh as a sparse matrix [V, V].

    An entry is the number of faces with the half-edge from the row's vertex to the column's vertex.

    Args:
        faces: triangles [F, 3] as indices of vertices.
        vertices: number V of vertices.
    """
    # imported here, because few functions need this library
    from scipy.sparse import coo_array

    ends = np.ascontiguousarray(faces[:, [1, 2, 0]]).reshape(-1)
    return coo_array(
        (np.ones(len(ends), dtype=np.int8), (faces.reshape(-1), ends)), shape=(vertices, vertices)
    ).tocsr()


def find_parts(faces: np.ndarray, vertices: int) -> tuple[int, np.ndarray]:
    """Find the parts of a mesh: sets of faces that are connected by shared vertices.

    Args:
        faces: triangles [F, 3] as indices of vertices.
        vertices: number V of vertices.

    Returns: the number P of parts, and the part [F] of each face in 0..P-1.
    """
    # imported here, because few functions need this library
    from scipy.sparse.csgraph import connected_components

    # weak: the directions of the half-edges do not matter
    count, label = connected_components(half_edges(faces, vertices), directed=True, connection="weak")
    part = label[faces[:, 0]]
    # A vertex that no face uses is a component of the graph, but no part. The others are numbered again.
    is_used = np.bincount(part, minlength=count) > 0
    return int(is_used.sum()), (np.cumsum(is_used, dtype=np.int32) - 1)[part]


def face_volumes(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Compute the signed volumes of the tetrahedra between each face and the origin.

    Their sum is the volume that a closed mesh encloses. It is positive if the corners of the faces are in
    counter-clockwise order seen from outside.

    Args:
        vertices: coordinates [V, 3].
        faces: triangles [F, 3] as indices of vertices.

    Returns: signed volumes [F].
    """
    volumes = np.empty(len(faces))
    for start in range(0, len(faces), _CHUNK):
        (ax, ay, az), *side_vectors = _corners(vertices, faces[start : start + _CHUNK])
        # normal of each face, with twice its area as length
        nx, ny, nz = _cross(*side_vectors)
        # a . (b - a) x (c - a) = a . b x c, six times the signed volume
        volumes[start : start + _CHUNK] = (ax * nx + ay * ny + az * nz) / 6
    return volumes


def _corners(vertices: np.ndarray, faces: np.ndarray) -> list[list[np.ndarray]]:
    """Return the first corner a of each face, and its sides b - a and c - a.

    Each of the three is a list of columns x, y, z [F] in float64, because numpy is fastest with contiguous
    columns.
    """
    columns = [np.ascontiguousarray(vertices[:, axis], dtype=np.float64) for axis in range(3)]
    # three corners, each as three columns [F]
    a, b, c = ([column[faces[:, corner]] for column in columns] for corner in range(3))
    return [
        a,
        [end - start for start, end in zip(a, b, strict=True)],
        [end - start for start, end in zip(a, c, strict=True)],
    ]


def _cross(u: list[np.ndarray], v: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute the cross products of vectors u and v, which are lists of columns x, y, z [F]."""
    return u[1] * v[2] - u[2] * v[1], u[2] * v[0] - u[0] * v[2], u[0] * v[1] - u[1] * v[0]


def largest_part(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Select the part of a mesh that encloses the largest volume.

    The surface of a cavity is a part with a negative volume, so it is never selected.

    Args:
        vertices: coordinates [V, 3].
        faces: triangles [F, 3] as indices of vertices.

    Returns: vertices and faces of the selected part, and the number P of parts of the mesh.
    """
    count, part_of_face = find_parts(faces, len(vertices))
    if count > 1:
        # signed volume [P] of each part
        part_volumes = np.bincount(part_of_face, weights=face_volumes(vertices, faces), minlength=count)
        vertices, faces = remove_unused_vertices(vertices, faces[part_of_face == part_volumes.argmax()])
    return vertices, faces, count


def remove_unused_vertices(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Remove the vertices that no face uses, and adapt the indices in the faces."""
    is_used = np.zeros(len(vertices), dtype=bool)
    is_used[faces] = True
    new_index = np.cumsum(is_used, dtype=np.int64) - 1
    return vertices[is_used], new_index[faces].astype(faces.dtype)


def decimate(vertices: np.ndarray, faces: np.ndarray, target: int) -> tuple[np.ndarray, np.ndarray]:
    """Reduce the number of faces of a mesh by quadric edge collapse (Garland and Heckbert 1997).

    The library fast-simplification is used. Each part is decimated by itself, in proportion to its number of
    faces, but to at least 16 faces. A closed part stays closed: if it would not, it gets more faces, and a
    warning is issued. A mesh with at most `target` faces is returned unchanged.

    Args:
        vertices: coordinates [V, 3].
        faces: triangles [F, 3] as indices of vertices.
        target: approximate number of faces of the result, at least 4.

    Returns: vertices and faces of the decimated mesh.
    """
    assert target >= 4  # a tetrahedron has four faces
    # the mesh is small enough already
    if len(faces) <= target:
        return vertices, faces
    count, part = find_parts(faces, len(vertices))
    part_ends = np.cumsum(np.bincount(part, minlength=count))
    faces_by_part = np.argsort(part, kind="stable")  # faces sorted by part
    decimated = []
    offset = 0
    excess_faces = 0
    for start, part_end in zip([0, *part_ends[:-1]], part_ends, strict=True):
        # the part's vertices, and its faces as indices into them
        used_vertices, corners = np.unique(faces[faces_by_part[start:part_end]], return_inverse=True)
        wanted_faces = max(round(target * (part_end - start) / len(faces)), _LEAST if count > 1 else target)
        decimated_part = _decimate_part(
            vertices[used_vertices].astype(np.float32), corners.reshape(-1, 3).astype(np.int32), wanted_faces
        )
        excess_faces += max(0, len(decimated_part[1]) - wanted_faces)
        decimated.append((decimated_part[0], decimated_part[1] + np.int32(offset)))
        offset += len(decimated_part[0])
    face_count = sum(len(piece_faces) for _, piece_faces in decimated)
    # Up to 5 % more faces cause no warning, because of rounding and of the smallest number of faces of a
    # part.
    if excess_faces > 0.05 * target:
        warnings.warn(
            f"decimate: the mesh has {face_count} faces instead of {target}, so that it stays closed.",
            stacklevel=2,
        )
    return np.concatenate([part_vertices for part_vertices, _ in decimated]), np.concatenate(
        [part_faces for _, part_faces in decimated]
    )


def _decimate_part(
    vertices: np.ndarray, faces: np.ndarray, wanted_faces: float
) -> tuple[np.ndarray, np.ndarray]:
    """Decimate one part of a mesh.

    Args:
        vertices: coordinates [V, 3] float32.
        faces: triangles [F, 3] int32.
        wanted_faces: number of faces. If a closed part would not stay closed, the number is increased step by
            step.

    Returns: vertices and faces. They are unchanged if no attempt was successful.
    """
    # imported here, because few functions need this library
    import fast_simplification

    is_closed = count_edges(faces).watertight
    for _ in range(_ATTEMPTS):
        if wanted_faces >= len(faces):
            break
        new_vertices, new_faces = fast_simplification.simplify(
            vertices, faces, target_count=int(wanted_faces)
        )
        new_vertices, new_faces = remove_unused_vertices(
            new_vertices.astype(np.float32), new_faces.astype(np.int32)
        )
        is_acceptable = len(new_faces) > 0 and (not is_closed or count_edges(new_faces).watertight)
        # Two vertices at the same position are rejected, because a program that reads the file may merge
        # them.
        if is_acceptable and not (is_closed and len(np.unique(new_vertices, axis=0)) < len(new_vertices)):
            return new_vertices, new_faces
        wanted_faces *= _MORE
    # No attempt kept the part closed: it is returned unchanged.
    return vertices, faces


def vertex_normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Compute a unit normal for each vertex: the area-weighted mean of the normals of its faces.

    The normals point outwards if the corners of the faces are in counter-clockwise order seen from outside. A
    vertex without faces gets the normal 0.

    Args:
        vertices: coordinates [V, 3].
        faces: triangles [F, 3] as indices of vertices.

    Returns: normals [V, 3] float32.
    """
    # imported here, because few functions need this library
    from scipy.sparse import csr_array

    normals = np.zeros((len(vertices), 3))
    for start in range(0, len(faces), _CHUNK):
        face_chunk = faces[start : start + _CHUNK]
        _, *side_vectors = _corners(vertices, face_chunk)
        face_normals = np.stack(_cross(*side_vectors), axis=1)  # [f, 3], length = twice the area
        # row pointers of a sparse matrix with three entries per face
        row_starts = np.arange(0, 3 * len(face_chunk) + 1, 3)
        corners = csr_array(
            (np.ones(3 * len(face_chunk)), face_chunk.reshape(-1), row_starts),
            shape=(len(face_chunk), len(vertices)),
        )
        normals += corners.T @ face_normals  # each vertex sums over its faces
    length = np.sqrt(np.einsum("vi,vi->v", normals, normals))[:, None]
    # A vertex without faces, or with opposite ones, gets the normal 0.
    return np.divide(normals, length, out=np.zeros_like(normals), where=length > 0).astype(np.float32)


# Isosurface of a density that is never completely in memory. The grid is processed layer by layer. A layer
# consists of a few planes along x. It is cut along y and z into bricks, which share the grid points on their
# common faces. Grid points count from 1: point 0 and the points after the last one lie outside the volume.
# Marching cubes runs only on the bricks that the surface passes through, so its work grows with the surface
# and not with the volume. A vertex is identified by the grid edge on which it lies, so bricks and layers
# join without gaps. The memory holds one block and the surface so far, at any resolution.

BRICK = 8  # number S of cells along the edge of a brick
# Function that shows progress: (name of the stage, number of finished units, number of all units).
Progress = Callable[[str, int, int], None]
_BLOCK_POINTS = 1 << 23  # number of grid points of one block: 32 MiB in float32
_LEAST_PLANES = 16  # smallest number of planes of a block, so that there are not too many blocks


def bricks_along(points: int, size: int = BRICK) -> int:
    """Return the number of bricks along an axis that cover its grid points, and one step beyond each end.

    Args:
        points: number of grid points along the axis.
        size: number of cells along the edge of a brick.
    """
    # `points` grid points and one step at each end are points + 1 cells; -(-a // b) is a / b, rounded up
    return -(-(points + 1) // size)


def padded_points(points: int) -> int:
    """Return the number of grid points of the bricks along an axis, including points outside the volume.

    Args:
        points: number of grid points of the volume along the axis.
    """
    return bricks_along(points) * BRICK + 1


def touched_bricks(layer: np.ndarray, level: float) -> np.ndarray:
    """Find the bricks of a layer that the surface may pass through.

    These are the bricks with densities on both sides of the level, or within LEVEL_BAND of it.

    Args:
        layer: raw density [planes, padded Y, padded Z].
        level: raw density on the surface.

    Returns: bool [bricks along y, bricks along z].
    """
    band = LEVEL_BAND * max(abs(level), 1.0)
    extremes = []
    for extreme in (np.minimum, np.maximum):
        # The extremes of a brick are computed along x, then y, then z.
        values = extreme.reduce(layer, axis=0)
        for axis in (0, 1):
            starts = np.arange(0, values.shape[axis] - 1, BRICK)
            # `reduceat` covers all points of a brick except its last point, the first point of the next
            # brick.
            inside = extreme.reduceat(np.delete(values, -1, axis), starts, axis=axis)
            values = extreme(inside, values.take(starts + BRICK, axis=axis))
        extremes.append(values)
    # smallest and largest density of each brick
    return (extremes[0] < level + band) & (extremes[1] > level - band)


class SurfaceBuilder:
    """Builder of a mesh from consecutive layers of a volume.

    It holds the mesh so far, and the vertices in the last plane of the previous layer, which the next layer
    shares.

    Args:
        axes: increasing world coordinates x [X], y [Y], z [Z] of the grid points.
        level: raw density on the surface.
    """

    def __init__(self, axes: Sequence[np.ndarray], level: float):
        self._axes = axes
        self._level = level
        self._sides = tuple(padded_points(len(axis)) for axis in axes[1:])  # padded Y, Z
        # number of the grid edges that start in one plane: three directions for each grid point
        self._plane_keys = 3 * self._sides[0] * self._sides[1]
        # index of the vertex on each grid edge of a layer, or -1; between two calls, all entries are -1
        self._lookup = np.empty(0, dtype=np.int32)
        # vertices in the plane that the next layer shares: keys of their grid edges, and their indices
        self._border = (np.empty(0, np.int64), np.empty(0, np.int32))
        self._vertices: list[np.ndarray] = []
        self._faces: list[np.ndarray] = []
        self._count = 0  # number of vertices so far

    def add(self, first: int, layer: np.ndarray, bricks: np.ndarray) -> None:
        """Extract the surface in some bricks of a layer, and add it to the mesh.

        Layers must be added in order. Each layer begins with the last plane of the previous layer.

        Args:
            first: index along x of the first plane, where 0 is the plane outside the volume.
            layer: raw density [planes, padded Y, padded Z], including points outside the volume. Only the
                selected bricks are read.
            bricks: bool [bricks along y, bricks along z], True for the selected bricks. The surface must not
                pass through other bricks.

        Raises: ValueError for NaN or infinity in the selected bricks.
        """
        corners = np.argwhere(bricks) * BRICK
        width = BRICK + 1
        # [planes, y, z, S + 1, S + 1]
        windows = np.lib.stride_tricks.sliding_window_view(layer, (width, width), axis=(1, 2))
        values = windows[:, corners[:, 0], corners[:, 1]].transpose(1, 0, 2, 3)  # [B, planes, S + 1, S + 1]
        if len(values):
            values = prepare_density(values, self._level)
            # The selection may contain bricks without a surface, since it comes from bounds or a tolerance.
            crossed = (values.min(axis=(1, 2, 3)) < self._level) & (values.max(axis=(1, 2, 3)) > self._level)
            values = values[crossed]
            corners = corners[crossed]
        if len(values) == 0:
            assert len(self._border[0]) == 0, "layers disagree in their shared plane"
            return
        # Vertices on the common face of two bricks occur in both; `_append` merges them.
        vertices, faces, counts = marching_cubes(values, self._level)
        start = np.floor(vertices)
        # position on the grid edge in 0..1: only the coordinate along the edge is not 0
        along = np.subtract(vertices, start, out=vertices)
        start = start.astype(np.int64)
        start[:, 1:] += np.repeat(corners, counts, axis=0)
        self._append(first, len(layer), start, along, faces)

    def _append(
        self, first: int, planes: int, start: np.ndarray, along: np.ndarray, faces: np.ndarray
    ) -> None:
        """Assign an index to each new vertex, and store the new vertices and the faces.

        There is at most one vertex on a grid edge. Vertices in the first plane have the indices that they got
        in the previous layer.

        Args:
            first: index along x of the first plane.
            planes: number of planes of the layer.
            start: first grid point [V, 3] of the grid edge of each vertex, as indices in the layer.
            along: position [V, 3] of each vertex on its grid edge, in grid steps.
            faces: triangles [F, 3] as indices into these vertices.
        """
        # key of a grid edge = 3 * (index of its first point) + its direction
        keys = (
            (start[:, 0] * self._sides[0] + start[:, 1]) * self._sides[1] + start[:, 2]
        ) * 3 + along.argmax(axis=1)
        if len(self._lookup) < planes * self._plane_keys:
            self._lookup = np.full(planes * self._plane_keys, -1, dtype=np.int32)
        lookup = self._lookup
        # Vertices of the shared plane have indices from the previous layer.
        lookup[self._border[0]] = self._border[1]
        new_vertices = np.flatnonzero(lookup[keys] < 0)
        new_keys = keys[new_vertices]
        new_order = np.arange(len(new_vertices), dtype=np.int32)
        # Copies of a vertex, from neighbouring bricks, write to the same entry. The last copy that writes its
        # number is the copy that is stored.
        lookup[new_keys] = new_order
        is_kept = lookup[new_keys] == new_order
        lookup[new_keys[is_kept]] = self._count + np.arange(np.count_nonzero(is_kept), dtype=np.int32)
        new_vertices = new_vertices[is_kept]
        vertex_indices = lookup[keys]
        self._count += len(new_vertices)
        last_plane_vertices = np.flatnonzero(start[:, 0] == planes - 1)  # vertices in the last plane
        assert first == 0 or not np.any(start[new_vertices, 0] + along[new_vertices, 0] == 0), (
            "layers disagree in their shared plane"
        )
        # Only the used entries are reset to -1, which takes less time than filling the array.
        lookup[self._border[0]] = -1
        lookup[keys] = -1
        self._border = (
            keys[last_plane_vertices] - (planes - 1) * self._plane_keys,
            vertex_indices[last_plane_vertices],
        )
        positions = start[new_vertices] + along[new_vertices]
        # from indices with padding to indices of the volume, which begin at 0
        positions += (first - 1, -1, -1)
        self._vertices.append(to_world(positions, self._axes))
        self._faces.append(vertex_indices[faces])

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the vertices [V, 3] float32 in world coordinates and the faces [F, 3] int32 so far."""
        return np.concatenate(self._vertices), np.concatenate(self._faces)


def block_planes(points_per_plane: int) -> int:
    """Return the number of planes of one block, which limits the required memory.

    Args:
        points_per_plane: number of grid points of a plane.
    """
    return max(_LEAST_PLANES, _BLOCK_POINTS // points_per_plane)


def extract_mesh_blockwise(
    sample: Callable[[slice], torch.Tensor | np.ndarray],
    axes: Sequence[torch.Tensor | np.ndarray],
    level: float = LEVEL,
    planes: int | None = None,
    progress: Progress | None = None,
    between: Callable[[], tuple[float, float]] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Extract the surface on which the raw density equals a level, block by block.

    The mesh equals the mesh of `extract_mesh`, but the density is never completely in memory. Marching cubes
    runs only on the bricks that have densities on both sides of the level. The surface is closed at the
    border of the volume.

    Args:
        sample: function of a slice of x indices that returns the raw density [x, Y, Z] of these grid points.
            It is called once per block, in order.
        axes: increasing world coordinates x [X], y [Y], z [Z] of the grid points.
        level: raw density on the surface.
        planes: number of x indices per block; None: as many as fit into 32 MiB.
        progress: function that is called with ("density", number of finished x indices, X).
        between: function that is called after the last block and returns the smallest and the largest
            density,
            between which the level must lie. None: the extremes of the sampled densities are used.

    Returns: vertices [V, 3] float32 in world coordinates, and faces [F, 3] int32, whose corners are in
        counter-clockwise order seen from outside.

    Raises: ValueError if the density is not finite, or if it does not cross the level.
    """
    coordinates = [np.asarray(axis, dtype=np.float64) for axis in axes]
    assert min(len(axis) for axis in coordinates) >= 2
    count, rows, columns = (len(axis) for axis in coordinates)
    builder = SurfaceBuilder(coordinates, float(level))
    low = np.inf
    high = -np.inf
    # A layer has BRICK cells along x. Its last plane is the first plane of the next layer.
    layer = np.full(
        (BRICK + 1, padded_points(rows), padded_points(columns)), outside_value(level), dtype=np.float32
    )
    # Index along x of the layer's first plane, where 0 is outside the volume; number of filled planes after
    # it.
    first = filled_planes = 0
    step = planes or block_planes(rows * columns)
    for start in range(0, count, step):
        values = np.asarray(sample(slice(start, min(start + step, count))))
        block_low = float(values.min())
        block_high = float(values.max())
        check_finite(block_low, block_high)
        low = min(low, block_low)
        high = max(high, block_high)
        for plane in values:
            filled_planes += 1
            layer[filled_planes, 1 : rows + 1, 1 : columns + 1] = plane
            if filled_planes == BRICK:
                builder.add(first, layer, touched_bricks(layer, level))
                layer[0] = layer[-1]
                filled_planes = 0
                first = first + BRICK
        if progress is not None:
            progress("density", start + len(values), count)
    # The last layer ends with one plane outside the volume, which closes the surface.
    layer[filled_planes + 1] = outside_value(level)
    builder.add(first, layer[: filled_planes + 2], touched_bricks(layer[: filled_planes + 2], level))
    # After the last block, because all densities must be known.
    check_crossed(*(between() if between else (low, high)), level)
    return builder.finish()
