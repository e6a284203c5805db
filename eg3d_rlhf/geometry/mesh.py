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
_MIN_PART_FACES = 16  # smallest number of faces of a decimated part


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
    prepared_volume = prepare_density(
        volume.transpose(2, 1, 0), level
    )  # [W, H, D], so that vertices are (x, y, z)
    check_crossed(float(volume.min()), float(volume.max()), level)
    # One layer of low density around the volume closes the surface at the border.
    vertices, faces, _ = marching_cubes(
        [np.pad(prepared_volume, 1, constant_values=outside_value(level))], level
    )
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
            "Choose another level: eg3d-rlhf generator inspect NETWORK proposes one for all its shapes"
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
    """Return the raw density of all points outside the volume: the lower limit of `prepare_density`."""
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
    level_scale = max(abs(level), 1.0)
    np.clip(volume, level - _REACH * level_scale, level + _REACH * level_scale, out=volume)
    volume[np.abs(volume - level) < LEVEL_BAND * level_scale] = level - LEVEL_BAND * level_scale
    return volume


def marching_cubes(
    density_blocks: Iterable[np.ndarray], level: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Extract the surfaces of several blocks, each block by itself.

    Args:
        density_blocks: densities [X, Y, Z] float32 that `prepare_density` returned.
        level: raw density on the surface.

    Returns: three arrays.
        vertices [V, 3] float64, block after block, in grid steps from the first grid point of the block. Each
            vertex lies strictly inside a grid edge.
        faces [F, 3] int64, as indices into all vertices.
        numbers of vertices [blocks] of the blocks.
    """
    # Imported here, because the rest of the package works without this library.
    import mcubes

    block_meshes = [
        mcubes.marching_cubes(np.ascontiguousarray(block), float(level)) for block in density_blocks
    ]
    vertex_counts = np.array([len(vertices) for vertices, _ in block_meshes], dtype=np.int64)
    vertices = np.concatenate([vertices.reshape(-1, 3) for vertices, _ in block_meshes])
    faces = np.concatenate([faces.reshape(-1, 3) for _, faces in block_meshes]).astype(np.int64)
    # Indices within a block become indices into all vertices: the index of the block's first vertex is added.
    faces += np.repeat(np.cumsum(vertex_counts) - vertex_counts, [len(faces) for _, faces in block_meshes])[
        :, None
    ]
    # A vertex lies on a grid edge: two of its coordinates are integers, and only the third is clipped.
    edge_start = np.floor(vertices)
    edge_position = np.subtract(vertices, edge_start, out=vertices)
    np.clip(edge_position, _MARGIN, 1 - _MARGIN, out=edge_position, where=edge_position > 0)
    return np.add(edge_start, edge_position, out=edge_start), faces, vertex_counts


def to_world(vertices: np.ndarray, coordinates: Sequence[np.ndarray]) -> np.ndarray:
    """Convert positions in grid steps to world coordinates.

    The conversion is linear between grid points. Beyond the first and the last grid point, it continues with
    the outermost step.

    Args:
        vertices: positions [V, 3] as fractional indices of grid points.
        coordinates: world coordinates of the grid points along each of the three axes.

    Returns: world coordinates [V, 3] float32.
    """
    world_coordinates = np.empty(vertices.shape, dtype=np.float32)
    for axis_index, axis_coordinates in enumerate(coordinates):
        # index of the grid point before the vertex; clipped, so that lower_index + 1 exists
        lower_index = np.clip(
            np.floor(vertices[:, axis_index]).astype(np.int64), 0, len(axis_coordinates) - 2
        )
        world_coordinates[:, axis_index] = axis_coordinates[lower_index] + (
            vertices[:, axis_index] - lower_index
        ) * (axis_coordinates[lower_index + 1] - axis_coordinates[lower_index])
    return world_coordinates


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
        """Return True if each edge belongs to exactly two faces, which traverse it in opposite directions."""
        return self.open == 0 and self.shared == 0


def count_edges(faces: np.ndarray) -> EdgeCounts:
    """Count the half-edges that prevent a mesh from being closed and consistently oriented.

    Args:
        faces: triangles [F, 3] as indices of vertices.
    """
    # number of vertices: the largest index plus 1
    half_edge_matrix = half_edges(faces, int(faces.max(initial=-1)) + 1)
    # Entries of the sparse matrix are summed where a half-edge occurs several times.
    shared_count = 3 * len(faces) - half_edge_matrix.nnz
    # The matrix equals its transpose exactly if every half-edge has its reverse. This comparison is fast.
    reversed_matrix = half_edge_matrix.T.tocsr()
    half_edge_matrix.sort_indices()
    reversed_matrix.sort_indices()
    if (
        shared_count == 0
        and np.array_equal(half_edge_matrix.indptr, reversed_matrix.indptr)
        and np.array_equal(half_edge_matrix.indices, reversed_matrix.indices)
    ):
        return EdgeCounts(0, 0)
    # A half-edge becomes one 64-bit key: its start in the upper 32 bits, its end in the lower 32 bits.
    start_vertices, end_vertices = (
        faces[:, columns].astype(np.uint64).reshape(-1) for columns in ([0, 1, 2], [1, 2, 0])
    )
    half_edge_keys = (start_vertices << np.uint64(32)) | end_vertices
    reversed_keys = np.sort((end_vertices << np.uint64(32)) | start_vertices)
    partner_index = np.searchsorted(reversed_keys, half_edge_keys).clip(max=max(len(reversed_keys) - 1, 0))
    return EdgeCounts(int((reversed_keys[partner_index] != half_edge_keys).sum()), shared_count)


def half_edges(faces: np.ndarray, vertex_count: int) -> "csr_array":
    """Return the half-edges of a mesh as a sparse matrix [V, V].

    An entry is the number of faces with the half-edge from the row's vertex to the column's vertex.

    Args:
        faces: triangles [F, 3] as indices of vertices.
        vertex_count: number V of vertices.
    """
    # imported here, because few functions need this library
    from scipy.sparse import coo_array

    end_vertices = np.ascontiguousarray(faces[:, [1, 2, 0]]).reshape(-1)
    return coo_array(
        (np.ones(len(end_vertices), dtype=np.int8), (faces.reshape(-1), end_vertices)),
        shape=(vertex_count, vertex_count),
    ).tocsr()


def find_parts(faces: np.ndarray, vertex_count: int) -> tuple[int, np.ndarray]:
    """Find the parts of a mesh: sets of faces that are connected by shared vertices.

    Args:
        faces: triangles [F, 3] as indices of vertices.
        vertex_count: number V of vertices.

    Returns: the number P of parts, and the part [F] of each face in 0..P-1.
    """
    # imported here, because few functions need this library
    from scipy.sparse.csgraph import connected_components

    # weak: the directions of the half-edges do not matter
    component_count, vertex_label = connected_components(
        half_edges(faces, vertex_count), directed=True, connection="weak"
    )
    component_of_face = vertex_label[faces[:, 0]]
    # A vertex that no face uses is a component of the graph, but no part. The others are numbered again.
    is_used = np.bincount(component_of_face, minlength=component_count) > 0
    return int(is_used.sum()), (np.cumsum(is_used, dtype=np.int32) - 1)[component_of_face]


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
    part_count, part_of_face = find_parts(faces, len(vertices))
    if part_count > 1:
        # signed volume [P] of each part
        part_volumes = np.bincount(part_of_face, weights=face_volumes(vertices, faces), minlength=part_count)
        vertices, faces = remove_unused_vertices(vertices, faces[part_of_face == part_volumes.argmax()])
    return vertices, faces, part_count


def remove_unused_vertices(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Remove the vertices that no face uses, and adapt the indices in the faces."""
    is_used = np.zeros(len(vertices), dtype=bool)
    is_used[faces] = True
    new_index = np.cumsum(is_used, dtype=np.int64) - 1
    return vertices[is_used], new_index[faces].astype(faces.dtype)


def decimate(
    vertices: np.ndarray, faces: np.ndarray, target_face_count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Reduce the number of faces of a mesh by quadric edge collapse (Garland and Heckbert 1997).

    The library fast-simplification is used. Each part is decimated by itself, in proportion to its number of
    faces, but to at least 16 faces. A closed part stays closed: if it would not, it gets more faces, and a
    warning is issued. A mesh with at most `target_face_count` faces is returned unchanged.

    Args:
        vertices: coordinates [V, 3].
        faces: triangles [F, 3] as indices of vertices.
        target_face_count: approximate number of faces of the result, at least 4.

    Returns: vertices and faces of the decimated mesh.
    """
    assert target_face_count >= 4  # a tetrahedron has four faces
    # the mesh is small enough already
    if len(faces) <= target_face_count:
        return vertices, faces
    part_count, part_of_face = find_parts(faces, len(vertices))
    part_ends = np.cumsum(np.bincount(part_of_face, minlength=part_count))
    faces_by_part = np.argsort(part_of_face, kind="stable")  # faces sorted by part
    decimated_parts = []
    vertex_offset = 0
    excess_face_count = 0
    for part_start, part_end in zip([0, *part_ends[:-1]], part_ends, strict=True):
        # the part's vertices, and its faces as indices into them
        used_vertices, corners = np.unique(faces[faces_by_part[part_start:part_end]], return_inverse=True)
        wanted_face_count = max(
            round(target_face_count * (part_end - part_start) / len(faces)),
            _MIN_PART_FACES if part_count > 1 else target_face_count,
        )
        decimated_part = _decimate_part(
            vertices[used_vertices].astype(np.float32),
            corners.reshape(-1, 3).astype(np.int32),
            wanted_face_count,
        )
        excess_face_count += max(0, len(decimated_part[1]) - wanted_face_count)
        decimated_parts.append((decimated_part[0], decimated_part[1] + np.int32(vertex_offset)))
        vertex_offset += len(decimated_part[0])
    face_count = sum(len(piece_faces) for _, piece_faces in decimated_parts)
    # Up to 5 % more faces cause no warning, because of rounding and of the smallest number of faces of a
    # part.
    if excess_face_count > 0.05 * target_face_count:
        warnings.warn(
            f"decimate: the mesh has {face_count} faces instead of {target_face_count}, so that it stays"
            " closed.",
            stacklevel=2,
        )
    return np.concatenate([part_vertices for part_vertices, _ in decimated_parts]), np.concatenate(
        [part_faces for _, part_faces in decimated_parts]
    )


def _decimate_part(
    vertices: np.ndarray, faces: np.ndarray, wanted_face_count: float
) -> tuple[np.ndarray, np.ndarray]:
    """Decimate one part of a mesh.

    Args:
        vertices: coordinates [V, 3] float32.
        faces: triangles [F, 3] int32.
        wanted_face_count: number of faces. If a closed part would not stay closed, the number is increased
            step by step.

    Returns: vertices and faces. They are unchanged if no attempt was successful.
    """
    # imported here, because few functions need this library
    import fast_simplification

    is_closed = count_edges(faces).watertight
    for _ in range(_ATTEMPTS):
        if wanted_face_count >= len(faces):
            break
        new_vertices, new_faces = fast_simplification.simplify(
            vertices, faces, target_count=int(wanted_face_count)
        )
        new_vertices, new_faces = remove_unused_vertices(
            new_vertices.astype(np.float32), new_faces.astype(np.int32)
        )
        is_acceptable = len(new_faces) > 0 and (not is_closed or count_edges(new_faces).watertight)
        # Two vertices at the same position are rejected, because a program that reads the file may merge
        # them.
        if is_acceptable and not (is_closed and len(np.unique(new_vertices, axis=0)) < len(new_vertices)):
            return new_vertices, new_faces
        wanted_face_count *= _MORE
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
        face_vertex_matrix = csr_array(
            (np.ones(3 * len(face_chunk)), face_chunk.reshape(-1), row_starts),
            shape=(len(face_chunk), len(vertices)),
        )
        normals += face_vertex_matrix.T @ face_normals  # each vertex sums over its faces
    normal_lengths = np.sqrt(np.einsum("vi,vi->v", normals, normals))[:, None]
    # A vertex without faces, or with opposite ones, gets the normal 0.
    return np.divide(normals, normal_lengths, out=np.zeros_like(normals), where=normal_lengths > 0).astype(
        np.float32
    )


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
_MIN_BLOCK_PLANES = 16  # smallest number of planes of a block, so that there are not too many blocks


def bricks_along(point_count: int, cells_per_brick: int = BRICK) -> int:
    """Return the number of bricks (cubes of cells) that cover an axis, and one grid step beyond each end.

    Args:
        point_count: number of grid points along the axis.
        cells_per_brick: number of cells along the edge of a brick.
    """
    # The grid points and one step at each end are point_count + 1 cells; -(-a // b) is a / b, rounded up
    return -(-(point_count + 1) // cells_per_brick)


def padded_points(point_count: int) -> int:
    """Return the number of grid points of the bricks along an axis, including points outside the volume.

    Args:
        point_count: number of grid points of the volume along the axis.
    """
    return bricks_along(point_count) * BRICK + 1


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
    for reduce_extreme in (np.minimum, np.maximum):
        # The extremes of a brick are computed along x, then y, then z.
        extreme_values = reduce_extreme.reduce(layer, axis=0)
        for axis in (0, 1):
            brick_starts = np.arange(0, extreme_values.shape[axis] - 1, BRICK)
            # `reduceat` covers all points of a brick except its last point, the first point of the next
            # brick.
            extreme_without_last = reduce_extreme.reduceat(
                np.delete(extreme_values, -1, axis), brick_starts, axis=axis
            )
            extreme_values = reduce_extreme(
                extreme_without_last, extreme_values.take(brick_starts + BRICK, axis=axis)
            )
        extremes.append(extreme_values)
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

    def add(self, first_plane: int, layer: np.ndarray, selected_bricks: np.ndarray) -> None:
        """Extract the surface in some bricks of a layer, and add it to the mesh.

        Layers must be added in order. Each layer begins with the last plane of the previous layer.

        Args:
            first_plane: index along x of the layer's first plane; index 0 is the plane before the volume.
            layer: raw density [planes, padded Y, padded Z], including points outside the volume. Only the
                selected bricks are read.
            selected_bricks: bool [bricks along y, bricks along z], True for the selected bricks. The surface
                must not pass through other bricks.

        Raises: ValueError for NaN or infinity in the selected bricks.
        """
        corners = np.argwhere(selected_bricks) * BRICK
        window_size = BRICK + 1
        # [planes, y, z, S + 1, S + 1]
        brick_windows = np.lib.stride_tricks.sliding_window_view(
            layer, (window_size, window_size), axis=(1, 2)
        )
        brick_densities = brick_windows[:, corners[:, 0], corners[:, 1]].transpose(
            1, 0, 2, 3
        )  # [B, planes, S + 1, S + 1]
        if len(brick_densities):
            brick_densities = prepare_density(brick_densities, self._level)
            # The selection may contain bricks without a surface, since it comes from bounds or a tolerance.
            is_crossed = (brick_densities.min(axis=(1, 2, 3)) < self._level) & (
                brick_densities.max(axis=(1, 2, 3)) > self._level
            )
            brick_densities = brick_densities[is_crossed]
            corners = corners[is_crossed]
        if len(brick_densities) == 0:
            assert len(self._border[0]) == 0, "layers disagree in their shared plane"
            return
        # Vertices on the common face of two bricks occur in both; `_append` merges them.
        vertices, faces, vertex_counts = marching_cubes(brick_densities, self._level)
        edge_start = np.floor(vertices)
        # position on the grid edge in 0..1: only the coordinate along the edge is not 0
        edge_position = np.subtract(vertices, edge_start, out=vertices)
        edge_start = edge_start.astype(np.int64)
        edge_start[:, 1:] += np.repeat(corners, vertex_counts, axis=0)
        self._append(first_plane, len(layer), edge_start, edge_position, faces)

    def _append(
        self,
        first_plane: int,
        plane_count: int,
        edge_start: np.ndarray,
        edge_position: np.ndarray,
        faces: np.ndarray,
    ) -> None:
        """Assign an index to each new vertex, and store the new vertices and the faces.

        There is at most one vertex on a grid edge. Vertices in the first plane have the indices that they got
        in the previous layer.

        Args:
            first_plane: index along x of the first plane.
            plane_count: number of planes of the layer.
            edge_start: first grid point [V, 3] of the grid edge of each vertex, as indices in the layer.
            edge_position: position [V, 3] of each vertex on its grid edge, in grid steps.
            faces: triangles [F, 3] as indices into these vertices.
        """
        # key of a grid edge = 3 * (index of its first point) + its direction
        edge_keys = (
            (edge_start[:, 0] * self._sides[0] + edge_start[:, 1]) * self._sides[1] + edge_start[:, 2]
        ) * 3 + edge_position.argmax(axis=1)
        if len(self._lookup) < plane_count * self._plane_keys:
            self._lookup = np.full(plane_count * self._plane_keys, -1, dtype=np.int32)
        vertex_lookup = self._lookup
        # Vertices of the shared plane have indices from the previous layer.
        vertex_lookup[self._border[0]] = self._border[1]
        new_vertices = np.flatnonzero(vertex_lookup[edge_keys] < 0)
        new_keys = edge_keys[new_vertices]
        new_order = np.arange(len(new_vertices), dtype=np.int32)
        # Copies of a vertex, from neighbouring bricks, write to the same entry. The last copy that writes its
        # number is the copy that is stored.
        vertex_lookup[new_keys] = new_order
        is_kept = vertex_lookup[new_keys] == new_order
        vertex_lookup[new_keys[is_kept]] = self._count + np.arange(np.count_nonzero(is_kept), dtype=np.int32)
        new_vertices = new_vertices[is_kept]
        vertex_indices = vertex_lookup[edge_keys]
        self._count += len(new_vertices)
        last_plane_vertices = np.flatnonzero(
            edge_start[:, 0] == plane_count - 1
        )  # vertices in the last plane
        assert first_plane == 0 or not np.any(
            edge_start[new_vertices, 0] + edge_position[new_vertices, 0] == 0
        ), "layers disagree in their shared plane"
        # Only the used entries are reset to -1, which takes less time than filling the array.
        vertex_lookup[self._border[0]] = -1
        vertex_lookup[edge_keys] = -1
        self._border = (
            edge_keys[last_plane_vertices] - (plane_count - 1) * self._plane_keys,
            vertex_indices[last_plane_vertices],
        )
        positions = edge_start[new_vertices] + edge_position[new_vertices]
        # from indices with padding to indices of the volume, which begin at 0
        positions += (first_plane - 1, -1, -1)
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
    return max(_MIN_BLOCK_PLANES, _BLOCK_POINTS // points_per_plane)


def extract_mesh_blockwise(
    sample: Callable[[slice], torch.Tensor | np.ndarray],
    axes: Sequence[torch.Tensor | np.ndarray],
    level: float = LEVEL,
    planes_per_block: int | None = None,
    on_progress: Progress | None = None,
    get_density_range: Callable[[], tuple[float, float]] | None = None,
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
        planes_per_block: number of x indices per block; None: as many as fit into 32 MiB.
        on_progress: function that is called with ("density", number of finished x indices, X).
        get_density_range: function that is called after the last block and returns the smallest and the
            largest density, between which the level must lie. None: the extremes of the sampled densities
            are used.

    Returns: vertices [V, 3] float32 in world coordinates, and faces [F, 3] int32, whose corners are in
        counter-clockwise order seen from outside.

    Raises: ValueError if the density is not finite, or if it does not cross the level.
    """
    coordinates = [np.asarray(axis, dtype=np.float64) for axis in axes]
    assert min(len(axis) for axis in coordinates) >= 2
    x_count, y_count, z_count = (len(axis) for axis in coordinates)
    builder = SurfaceBuilder(coordinates, float(level))
    low = np.inf
    high = -np.inf
    # A layer has BRICK cells along x. Its last plane is the first plane of the next layer.
    layer = np.full(
        (BRICK + 1, padded_points(y_count), padded_points(z_count)), outside_value(level), dtype=np.float32
    )
    # Index along x of the layer's first plane, where 0 is outside the volume; number of filled planes after
    # it.
    first_plane = filled_planes = 0
    block_size = planes_per_block or block_planes(y_count * z_count)
    for block_start in range(0, x_count, block_size):
        block = np.asarray(sample(slice(block_start, min(block_start + block_size, x_count))))
        block_low = float(block.min())
        block_high = float(block.max())
        check_finite(block_low, block_high)
        low = min(low, block_low)
        high = max(high, block_high)
        for plane in block:
            filled_planes += 1
            layer[filled_planes, 1 : y_count + 1, 1 : z_count + 1] = plane
            if filled_planes == BRICK:
                builder.add(first_plane, layer, touched_bricks(layer, level))
                layer[0] = layer[-1]
                filled_planes = 0
                first_plane = first_plane + BRICK
        if on_progress is not None:
            on_progress("density", block_start + len(block), x_count)
    # The last layer ends with one plane outside the volume, which closes the surface.
    layer[filled_planes + 1] = outside_value(level)
    builder.add(first_plane, layer[: filled_planes + 2], touched_bricks(layer[: filled_planes + 2], level))
    # After the last block, because all densities must be known.
    check_crossed(*(get_density_range() if get_density_range else (low, high)), level)
    return builder.finish()
