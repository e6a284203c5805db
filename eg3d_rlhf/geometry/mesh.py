"""Isosurface of a density volume as a closed triangle mesh in world coordinates, and what can go wrong with one: open edges, loose parts,
flipped faces, too many faces.

Letters: D, H, W = grid points along z, y, x; V vertices; F faces; P parts (connected by shared vertices).
"""

import importlib.util
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from eg3d_rlhf.core.field import LEVEL
from eg3d_rlhf.core.spec import SlabSpec

if TYPE_CHECKING:
    from scipy.sparse import csr_array

_REACH = 2.0**17  # values further from the level are clipped, in units of max(|level|, 1); the padding outside the volume lies there
LEVEL_BAND = 2.0**-22  # values so near to the level, in the same units, count as just below it: no vertex falls onto a grid point
_MARGIN = 2e-4  # vertices keep this distance from the ends of their grid edge, in grid steps: distinct ones stay distinct in float32
_CHUNK = 1 << 20  # faces whose volumes are taken at once
_ATTEMPTS, _MORE = 6, 1.25  # decimations tried of a part, each with so many times the faces of the one before, until one is closed
_LEAST = 16  # faces that every part keeps


def extract_mesh(
    sigma: torch.Tensor | np.ndarray, axes: SlabSpec | Sequence[torch.Tensor | np.ndarray], level: float = LEVEL
) -> tuple[np.ndarray, np.ndarray]:
    """The surface sigma = level by marching cubes.

    A body that runs into the border of the volume is closed there: outside the volume the density counts as far below the level, so the cap
    lies within 1/100 of a grid step of the border for densities up to 1000 times the level (10,000 at level 10).

    Args:
        sigma: raw density [D, H, W]; inside is where it exceeds the level.
        axes: a SlabSpec of that shape, or increasing world coordinates (x [W], y [H], z [D]).
        level: raw density of the surface.

    Returns: vertices [V, 3] float32 in world coordinates (x, y, z), faces [F, 3] int64 wound counter-clockwise seen from outside.
    Not differentiable.
    Raises: ValueError when the shapes disagree, sigma is not finite, or the level is not crossed.
    """
    volume = sigma.detach().cpu().numpy() if isinstance(sigma, torch.Tensor) else np.asarray(sigma)
    if volume.ndim != 3 or min(volume.shape) < 2:
        raise ValueError(
            f"extract_mesh: expected sigma [D, H, W] with sides >= 2, got {list(volume.shape)}. Pass one sample, without a batch axis."
        )
    coordinates = [np.asarray(axis, dtype=np.float64) for axis in (axes.axes() if isinstance(axes, SlabSpec) else axes)]
    got, wanted = [len(axis) for axis in reversed(coordinates)], list(volume.shape)
    if got != wanted:
        raise ValueError(f"extract_mesh: expected axes for a volume [D, H, W] = {wanted}, got {got}. Pass the spec it was sampled with.")
    if any(np.any(np.diff(axis) <= 0) for axis in coordinates):
        raise ValueError(
            "extract_mesh: expected increasing coordinates on every axis, got a decreasing step. Flip the axis together with sigma."
        )
    block = prepare_density(volume.transpose(2, 1, 0), level)  # [W, H, D], so vertices come as (x, y, z)
    check_crossed(float(volume.min()), float(volume.max()), level)
    vertices, faces, _ = marching_cubes([np.pad(block, 1, constant_values=outside_value(level))], level)
    return to_world(vertices - 1, coordinates), faces


def check_crossed(low: float, high: float, level: float) -> None:
    """Raise ValueError unless the densities from `low` to `high` lie on both sides of the level."""
    if not low < level < high:
        remedy = f"Choose a level in between, such as {(low + high) / 2:.6g}" if low < high else "It is constant: no level has a surface"
        raise ValueError(f"extract_mesh: expected sigma on both sides of level {level:g}, got [{low:g}, {high:g}]. {remedy}.")


def check_finite(low: float, high: float) -> None:
    """Raise ValueError unless the least and the greatest density are finite numbers."""
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError("extract_mesh: expected finite sigma, got NaN or infinity. Check the generator's weights.")


def outside_value(level: float) -> float:
    """Density that stands for everything outside the volume: the lowest that `prepare_density` leaves."""
    return level - _REACH * max(abs(level), 1.0)


def prepare_density(volume: np.ndarray, level: float) -> np.ndarray:
    """A float32 copy of raw densities, clipped about the level and moved off it, as `marching_cubes` takes it.

    Raises: ValueError for NaN or infinity.
    """
    volume = np.array(volume, dtype=np.float32)  # PyMCubes raises on half and returns an empty mesh for integers
    check_finite(volume.min(), volume.max())
    unit = max(abs(level), 1.0)
    np.clip(volume, level - _REACH * unit, level + _REACH * unit, out=volume)
    volume[np.abs(volume - level) < LEVEL_BAND * unit] = level - LEVEL_BAND * unit
    return volume


def marching_cubes(blocks: Iterable[np.ndarray], level: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Surfaces of prepared blocks [X, Y, Z] float32, each by itself.

    Returns: vertices [V, 3] float64 of one block after the other, in grid steps from its own first point and each strictly inside one grid
    edge; faces [F, 3] int64, numbers of vertices in all of them; how many of the vertices belong to each block [blocks].
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
    """Fractional indices [V, 3] to world coordinates [V, 3] float32, linear between grid points and carried on with the outermost step."""
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
    if shared == 0 and np.array_equal(graph.indptr, reverse.indptr) and np.array_equal(graph.indices, reverse.indices):
        return EdgeCounts(0, 0)  # every edge also runs the other way
    start, end = (faces[:, columns].astype(np.uint64).reshape(-1) for columns in ([0, 1, 2], [1, 2, 0]))
    forward, backward = (start << np.uint64(32)) | end, np.sort((end << np.uint64(32)) | start)
    partner = np.searchsorted(backward, forward).clip(max=max(len(backward) - 1, 0))
    return EdgeCounts(int((backward[partner] != forward).sum()), shared)


def half_edges(faces: np.ndarray, vertices: int) -> "csr_array":
    """Directed edges of faces [F, 3] as a sparse matrix [V, V] with an entry where an edge runs from row to column."""
    from scipy.sparse import coo_array

    ends = np.ascontiguousarray(faces[:, [1, 2, 0]]).reshape(-1)
    return coo_array((np.ones(len(ends), dtype=np.int8), (faces.reshape(-1), ends)), shape=(vertices, vertices)).tocsr()


def parts(faces: np.ndarray, vertices: int) -> tuple[int, np.ndarray]:
    """The number of parts P that faces fall into, and the part [F] of each face, 0..P-1."""
    from scipy.sparse.csgraph import connected_components

    count, label = connected_components(half_edges(faces, vertices), directed=True, connection="weak")
    part = label[faces[:, 0]]
    used = np.bincount(part, minlength=count) > 0  # vertices that no face uses are no part
    return int(used.sum()), (np.cumsum(used, dtype=np.int32) - 1)[part]


def face_volumes(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Signed volumes [F] of the tetrahedra between each face and the origin; their sum is the volume that a closed mesh encloses.

    It is positive where the faces are wound counter-clockwise seen from outside.
    """
    volumes = np.empty(len(faces))
    for start in range(0, len(faces), _CHUNK):
        (ax, ay, az), *sides = _corners(vertices, faces[start : start + _CHUNK])
        nx, ny, nz = _cross(*sides)
        volumes[start : start + _CHUNK] = (ax * nx + ay * ny + az * nz) / 6  # a . (b - a) x (c - a) = a . b x c
    return volumes


def _corners(vertices: np.ndarray, faces: np.ndarray) -> list[list[np.ndarray]]:
    """A corner a of each face and the sides b - a and c - a, as x, y, z [F] float64 each: single columns, which numpy is fastest with."""
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
    """About `target` faces that keep the shape, by quadric edge collapse (Garland and Heckbert 1997; fast-simplification).

    Every part is decimated by itself, in proportion to its faces and to 16 at least. A closed part stays closed: where sheets would touch
    after the collapse it keeps more faces, with a warning. A mesh of no more than `target` faces is returned as it is.

    Raises: ValueError for target < 4, or where fast-simplification is missing.
    """
    if target < 4:
        raise ValueError(f"decimate: expected at least 4 faces, got {target}. A tetrahedron is the smallest closed mesh.")
    if len(faces) <= target:
        return vertices, faces
    if importlib.util.find_spec("fast_simplification") is None:
        raise ValueError("decimate: expected the package fast-simplification, got none. Install it with pip.")
    count, part = parts(faces, len(vertices))
    ends = np.cumsum(np.bincount(part, minlength=count))
    order, done, offset, extra = np.argsort(part, kind="stable"), [], 0, 0
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        used, corners = np.unique(faces[order[start:end]], return_inverse=True)
        wanted = max(round(target * (end - start) / len(faces)), _LEAST if count > 1 else target)
        piece = _decimate_part(vertices[used].astype(np.float32), corners.reshape(-1, 3).astype(np.int32), wanted)
        extra += max(0, len(piece[1]) - wanted)
        done.append((piece[0], piece[1] + np.int32(offset)))
        offset += len(piece[0])
    kept = sum(len(piece_faces) for _, piece_faces in done)
    if extra > 0.05 * target:
        warnings.warn(f"decimate: the mesh would not stay closed with {target} faces; kept {kept}.", stacklevel=2)
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
        if kept and not (closed and len(np.unique(new_vertices, axis=0)) < len(new_vertices)):  # a reader may merge vertices at one place
            return new_vertices, new_faces
        wanted *= _MORE
    return vertices, faces


def vertex_normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Unit normals [V, 3] float32: the faces' normals at each vertex, weighted by area; outwards where the winding is."""
    from scipy.sparse import csr_array

    normals = np.zeros((len(vertices), 3))
    for start in range(0, len(faces), _CHUNK):
        part = faces[start : start + _CHUNK]
        _, *sides = _corners(vertices, part)
        normal = np.stack(_cross(*sides), axis=1)  # [f, 3], length = twice the area
        rows = np.arange(0, 3 * len(part) + 1, 3)
        corners = csr_array((np.ones(3 * len(part)), part.reshape(-1), rows), shape=(len(part), len(vertices)))
        normals += corners.T @ normal  # each vertex sums over its faces
    length = np.sqrt(np.einsum("vi,vi->v", normals, normals))[:, None]
    return np.divide(normals, length, out=np.zeros_like(normals), where=length > 0).astype(np.float32)
