"""Determine on which side of a mesh points lie and what rays hit.

Sides follow from the winding number, computed from solid angles by libigl. Signed crossings of rays would be
wrong where faces coincide. Rays use Embree if it is installed, and libigl otherwise.

Letters: P points, R rays, F faces, K directions.
"""

import functools
import importlib
from types import ModuleType

import numpy as np
from scipy.spatial.transform import Rotation

from eg3d_rlhf.measures.meshes.clean import CleanMesh, face_areas
from eg3d_rlhf.measures.meshes.edges import Edges

OFFSET = 1e-4  # of the longest edge: distance from the surface at which rays start and sides are determined
_FEW = 2000  # faces up to which exact winding numbers are faster than the hierarchy
# Fast winding numbers are accurate to .02. Those closer to one half than this are computed exactly.
_CLOSE = 0.05
_FIRST = 8  # directions that are tried for all samples first; most rays escape in one of them


def solid_library(name: str) -> ModuleType:
    """Import a library of the extra `solid`. Raises: ValueError naming the extra if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(
            f"measures of meshes: {name} is not installed. Install it: pip install 'eg3d-rlhf[solid]'."
        ) from None


class Space:
    """Clean mesh with acceleration structures, which answers queries for points and rays."""

    def __init__(self, mesh: CleanMesh):
        self.igl = solid_library("igl")
        self.mesh = mesh
        # libigl takes contiguous arrays without a copy.
        self._vertices = np.ascontiguousarray(mesh.vertices)
        self._faces = np.ascontiguousarray(mesh.faces)

    @functools.cached_property
    def tree(self):
        """libigl's bounding-box tree of the faces."""
        tree = self.igl.AABB()
        tree.init(self._vertices, self._faces)
        return tree

    @functools.cached_property
    def _fast_winding(self):
        """libigl's hierarchy for approximate winding numbers."""
        hierarchy = self.igl.FastWindingNumberBVH()
        hierarchy.init(self._vertices, self._faces)
        return hierarchy

    @functools.cached_property
    def _scene(self):
        """Embree's scene, or None if Embree is not installed."""
        try:
            from embreex import rtcore_scene
            from embreex.mesh_construction import TriangleMesh
        except ImportError:  # there is no wheel for every platform
            return None
        scene = rtcore_scene.EmbreeScene()
        TriangleMesh(scene, self._vertices.astype(np.float32), self._faces.astype(np.int32))
        return scene

    def first_hits(self, origins: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Intersect rays from origins [R, 3] along unit directions [R, 3] with the mesh.

        Returns: distances [R] to the first face, infinite without one, and face numbers [R], -1 without one.
        """
        if not len(origins):
            return np.zeros(0), np.zeros(0, dtype=np.int64)
        if self._scene is None:
            face, distance, _ = self.tree.intersect_ray_first(
                self._vertices, self._faces, origins, directions
            )
            return np.where(face < 0, np.inf, distance), np.asarray(face)
        # Embree computes in float32.
        hit = self._scene.run(origins.astype(np.float32), directions.astype(np.float32), output=1)
        face = hit["primID"].astype(np.int64)
        return np.where(face < 0, np.inf, hit["tfar"].astype(np.float64)), face

    def winding(self, points: np.ndarray) -> np.ndarray:
        """Compute winding numbers [P] of points [P, 3] to within .02.

        Numbers close to one half are exact, so that the comparison `> 0.5` is exact.
        """
        points = np.ascontiguousarray(points, dtype=np.float64)
        if len(self._faces) <= _FEW:
            return np.asarray(self.igl.winding_number(self._vertices, self._faces, points)).reshape(-1)
        numbers = np.asarray(self._fast_winding.winding_number(points)).reshape(-1)
        near = np.abs(numbers - 0.5) < _CLOSE
        if near.any():
            numbers[near] = self.igl.winding_number(self._vertices, self._faces, points[near])
        return numbers

    def voxels(self, resolution: int) -> np.ndarray:
        """Return which voxels of the unit cube around the origin are inside, as bool [x, y, z]."""
        axis = (np.arange(resolution) + 0.5) / resolution - 0.5  # centres of voxels
        return (
            self.winding(np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3)) > 0.5
        ).reshape(resolution, resolution, resolution)

    def crossing_faces(self, edges: Edges) -> np.ndarray:
        """Return which faces [F] cross another one, as bool; both faces of a crossing count.

        Two faces cross if an edge of one passes through the other and they share no corner. An edge meets a
        face at a fraction 0 < t < 1 of its length. Crossings of faces in one plane are not defined.
        """
        vertices = self._vertices
        faces = self._faces
        ends = edges.ends
        start = vertices[ends[:, 0]]
        along = vertices[ends[:, 1]] - vertices[ends[:, 0]]
        long = np.flatnonzero((along != 0).any(axis=1))  # edges of length 0 have no direction
        # Only few edges meet a face between their ends. Searching for the first hit is cheap and searching
        # for all hits is not, since a ray does not end with its edge. So the cheap search selects edges. It
        # starts OFFSET / 2 after the edge's start, beyond the faces there, and ends before the faces at the
        # edge's end.
        inside = start[long] + OFFSET / 2 * along[long]
        first, _, _ = self.tree.intersect_ray_first(vertices, faces, inside, along[long], 1 - OFFSET)
        long = long[np.asarray(first) >= 0]
        # Per edge a list of hits (face, t, u, v)
        edge_hits = self.tree.intersect_ray(vertices, faces, start[long], along[long])
        rows = [
            (edge, hit[0])
            for edge, hits in zip(long, edge_hits, strict=True)
            for hit in hits
            if OFFSET < hit[1] < 1 - OFFSET
        ]
        crossed = np.zeros(len(faces), dtype=bool)
        if rows:
            edge, face = np.array(rows).T
            # The edge's own faces always touch it, at a shared corner, and do not count.
            no_shared_corner = (faces[face][:, :, None] != ends[edge][:, None, :]).all(axis=(1, 2))
            passing = np.zeros(len(ends), dtype=bool)
            passing[edge[no_shared_corner]] = True
            crossed[face[no_shared_corner]] = True
            # An edge that passes through a face belongs to faces which cross that face, too.
            crossed[edges.order[np.repeat(passing, edges.faces)] // 3] = True
        return crossed


def sample(mesh: CleanMesh, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sample points [P, 3] on a mesh, and return them with their faces' normals [P, 3].

    The points are stratified by area. The same seed gives the same points.
    """
    rng = np.random.default_rng(seed)
    normals, areas = face_areas(mesh)
    total = np.cumsum(areas)
    at = (np.arange(count) + rng.random(count)) / count * total[-1]
    # The last point may lie beyond the sum by rounding; it belongs to the last face that has an area.
    face = np.minimum(np.searchsorted(total, at, side="right"), np.flatnonzero(areas)[-1])
    # The square root makes barycentric coordinates uniform over the triangle.
    root = np.sqrt(rng.random(count))[:, None]
    v = rng.random(count)[:, None]
    a, b, c = (mesh.vertices[mesh.faces[face, i]] for i in range(3))
    return (1 - root) * a + root * (1 - v) * b + root * v * c, normals[face]


def directions(count: int, seed: int) -> np.ndarray:
    """Return unit vectors [K, 3]: a Fibonacci sphere in a random orientation."""
    height = 1 - (2 * np.arange(count) + 1) / count
    angle = np.pi * (3 - 5**0.5) * np.arange(count)  # multiples of the golden angle
    ring = np.sqrt(1 - height**2)
    sphere = np.stack([ring * np.cos(angle), height, ring * np.sin(angle)], axis=1)
    # A quaternion of four normal numbers is a uniformly distributed rotation.
    return Rotation.from_quat(np.random.default_rng(seed).normal(size=4)).apply(sphere)


def hidden_samples(
    space: Space, points: np.ndarray, normals: np.ndarray, count: int, seed: int
) -> np.ndarray:
    """Return which points [P] are hidden: no ray from them escapes on either side of the surface.

    Args: count: number of directions that are tried, K.
    """
    rays = directions(count, seed)
    # Consecutive directions of the Fibonacci sphere are similar, so they are tried in a random order.
    rays = rays[np.random.default_rng(seed).permutation(count)]
    hidden = np.ones(len(points), dtype=bool)
    # The second block is traced only for points from which no ray of the first block escaped.
    for block in (rays[:_FIRST], rays[_FIRST:]):
        remaining = np.flatnonzero(hidden)
        if not len(remaining) or not len(block):
            break
        # [P, K]: a ray starts on the side of the surface towards which it points
        side = np.where(normals[remaining] @ block.T >= 0, OFFSET, -OFFSET)
        origins = points[remaining, None] + side[..., None] * normals[remaining, None]  # [P, K, 3]
        outward = np.broadcast_to(block, origins.shape)
        distance, _ = space.first_hits(origins.reshape(-1, 3), outward.reshape(-1, 3))
        hidden[remaining] = np.isfinite(distance).reshape(len(remaining), -1).all(axis=1)
    return hidden


def sides(space: Space, points: np.ndarray, normals: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Classify points [P] of the surface by the material on their two sides; returns three bool arrays [P].

    Buried points have material on both sides, points of a sheet on neither, and inverted points only on the
    side to which the normal points.
    """
    outer, inner = (space.winding(points + sign * OFFSET * normals) > 0.5 for sign in (1, -1))
    return outer & inner, ~outer & ~inner, outer & ~inner


def ways(space: Space, points: np.ndarray, towards: np.ndarray) -> np.ndarray:
    """Compute distances [P] from points of the surface along directions [P, 3] to the next surface.

    Args: towards: the normals, or their opposites. Distances are infinite if there is no further surface.
    """
    # A ray starts OFFSET above the surface, so that it does not hit its own face.
    return space.first_hits(points + OFFSET * towards, towards)[0] + OFFSET


def side_measures(
    space: Space, points: np.ndarray, normals: np.ndarray, thin: float, rays: int, seed: int
) -> dict:
    """Compute shares of the samples, and quantiles of the wall thickness and of the gaps in front of walls.

    Quantiles are None if no ray hits anything.
    """
    buried, sheet, inverted = sides(space, points, normals)
    # Buried points have no free side, so neither a thickness nor a gap is defined there.
    seen = ~buried
    walls = ways(space, points[seen], -normals[seen])
    return {
        "hidden": float(hidden_samples(space, points, normals, rays, seed).mean()),
        "buried": float(buried.mean()),
        "sheet": float(sheet.mean()),
        "inverted": float(inverted.mean()),
        **_quantiles("thick", walls),
        "thin": float((walls < thin).mean()) if len(walls) else 0.0,
        **_quantiles("gap", ways(space, points[seen], normals[seen])),
    }


def _quantiles(name: str, distances: np.ndarray) -> dict:
    """Return the 1 %, 5 % and 50 % quantiles of the finite distances, or None for each if there are none."""
    finite = distances[np.isfinite(distances)]
    values = np.quantile(finite, [0.01, 0.05, 0.5]).tolist() if len(finite) else [None] * 3
    return dict(zip((f"{name}_p01", f"{name}_p05", f"{name}_median"), values, strict=True))
