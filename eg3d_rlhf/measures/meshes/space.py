"""Which side of a mesh a point lies on, and what a ray meets: what surfaces hide, bury and leave thin.

Sides are told by the winding number, by solid angles (libigl): signed crossings of rays are wrong where faces
coincide. Rays are Embree's where it is installed, else libigl's.

Letters: P points, R rays, F faces, K directions.
"""

import functools
import importlib
from types import ModuleType

import numpy as np
from scipy.spatial.transform import Rotation

from eg3d_rlhf.measures.meshes.clean import CleanMesh, face_areas
from eg3d_rlhf.measures.meshes.edges import Edges

OFFSET = 1e-4  # of the longest edge: how far from the surface rays start and sides are told
_FEW = 2000  # faces up to which winding numbers by solid angles are the faster ones
# winding numbers nearer to one half than this are computed exactly; the fast ones are within .02
_CLOSE = 0.05
_FIRST = 8  # directions that all samples try; most leave by one of them


def solid_library(name: str) -> ModuleType:
    """A library of the extra `solid`. Raises: ValueError naming the extra."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(
            f"measures of meshes: expected {name}, got none. pip install 'eg3d-rlhf[solid]'."
        ) from None


class Space:
    """A clean mesh that answers for points and rays."""

    def __init__(self, mesh: CleanMesh):
        self.igl = solid_library("igl")
        self.mesh = mesh
        self._vertices = np.ascontiguousarray(mesh.vertices)
        self._faces = np.ascontiguousarray(mesh.faces)

    @functools.cached_property
    def tree(self):
        tree = self.igl.AABB()
        tree.init(self._vertices, self._faces)
        return tree

    @functools.cached_property
    def _fast_winding(self):
        hierarchy = self.igl.FastWindingNumberBVH()
        hierarchy.init(self._vertices, self._faces)
        return hierarchy

    @functools.cached_property
    def _scene(self):
        """Embree's scene; None where it is not installed."""
        try:
            from embreex import rtcore_scene
            from embreex.mesh_construction import TriangleMesh
        except ImportError:  # no wheel for the machine
            return None
        scene = rtcore_scene.EmbreeScene()
        TriangleMesh(scene, self._vertices.astype(np.float32), self._faces.astype(np.int32))
        return scene

    def first_hits(self, origins: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Distances [R] along unit directions [R, 3] from origins [R, 3] to the first face, infinite where
        there is none; faces [R], -1.
        """
        if not len(origins):
            return np.zeros(0), np.zeros(0, dtype=np.int64)
        if self._scene is None:
            face, distance, _ = self.tree.intersect_ray_first(
                self._vertices, self._faces, origins, directions
            )
            return np.where(face < 0, np.inf, distance), np.asarray(face)
        hit = self._scene.run(origins.astype(np.float32), directions.astype(np.float32), output=1)
        face = hit["primID"].astype(np.int64)
        return np.where(face < 0, np.inf, hit["tfar"].astype(np.float64)), face

    def winding(self, points: np.ndarray) -> np.ndarray:
        """Winding numbers [P] of points [P, 3], within .02; exact where they are near one half, so that
        `> .5` is.
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
        """Return whether each voxel of the unit cube about the origin is inside, [x, y, z] bool."""
        axis = (np.arange(resolution) + 0.5) / resolution - 0.5
        return (
            self.winding(np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3)) > 0.5
        ).reshape(resolution, resolution, resolution)

    def crossing_faces(self, edges: Edges) -> np.ndarray:
        """Which faces [F] cross another: an edge of one passes through the other, and they share no corner.
        Both count.

        An edge meets a face at 0 < t < 1 of its length. Not defined where faces lie in one plane.
        """
        vertices = self._vertices
        faces = self._faces
        ends = edges.ends
        start = vertices[ends[:, 0]]
        along = vertices[ends[:, 1]] - vertices[ends[:, 0]]
        long = np.flatnonzero((along != 0).any(axis=1))
        # Few edges meet anything on their way. To ask for the first hit is cheap, for all hits is not: a ray
        # does not end with its edge. behind the faces at its start, and OFFSET ends it before those at its
        # end
        inside = start[long] + OFFSET / 2 * along[long]
        first, _, _ = self.tree.intersect_ray_first(vertices, faces, inside, along[long], 1 - OFFSET)
        long = long[np.asarray(first) >= 0]
        # per edge: (face, t, u, v)
        found = self.tree.intersect_ray(vertices, faces, start[long], along[long])
        rows = [
            (edge, hit[0])
            for edge, hits in zip(long, found, strict=True)
            for hit in hits
            if OFFSET < hit[1] < 1 - OFFSET
        ]
        crossed = np.zeros(len(faces), dtype=bool)
        if rows:
            edge, face = np.array(rows).T
            apart = (faces[face][:, :, None] != ends[edge][:, None, :]).all(axis=(1, 2))
            passing = np.zeros(len(ends), dtype=bool)
            passing[edge[apart]] = True
            crossed[face[apart]] = True
            crossed[edges.order[np.repeat(passing, edges.faces)] // 3] = True
        return crossed


def sample(mesh: CleanMesh, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Points [P, 3] on a mesh and their faces' normals [P, 3]; stratified by area, the same for the same
    seed.
    """
    rng = np.random.default_rng(seed)
    normals, areas = face_areas(mesh)
    total = np.cumsum(areas)
    at = (np.arange(count) + rng.random(count)) / count * total[-1]
    face = np.minimum(np.searchsorted(total, at, side="right"), np.flatnonzero(areas)[-1])
    root = np.sqrt(rng.random(count))[:, None]
    v = rng.random(count)[:, None]
    a, b, c = (mesh.vertices[mesh.faces[face, i]] for i in range(3))
    return (1 - root) * a + root * (1 - v) * b + root * v * c, normals[face]


def directions(count: int, seed: int) -> np.ndarray:
    """Unit vectors [K, 3]: a Fibonacci sphere under a random rotation."""
    height = 1 - (2 * np.arange(count) + 1) / count
    angle = np.pi * (3 - 5**0.5) * np.arange(count)
    ring = np.sqrt(1 - height**2)
    sphere = np.stack([ring * np.cos(angle), height, ring * np.sin(angle)], axis=1)
    return Rotation.from_quat(np.random.default_rng(seed).normal(size=4)).apply(sphere)


def hidden_samples(
    space: Space, points: np.ndarray, normals: np.ndarray, count: int, seed: int
) -> np.ndarray:
    """Which points [P] no ray leaves from, on either side of the surface.

    Args: count: directions tried, K.
    """
    rays = directions(count, seed)
    # neighbours on the sphere are not tried one after the other
    rays = rays[np.random.default_rng(seed).permutation(count)]
    hidden = np.ones(len(points), dtype=bool)
    for block in (rays[:_FIRST], rays[_FIRST:]):
        left = np.flatnonzero(hidden)
        if not len(left) or not len(block):
            break
        # [P, K]: a ray starts on the side that it goes to
        side = np.where(normals[left] @ block.T >= 0, OFFSET, -OFFSET)
        origins = points[left, None] + side[..., None] * normals[left, None]
        away = np.broadcast_to(block, origins.shape)
        distance, _ = space.first_hits(origins.reshape(-1, 3), away.reshape(-1, 3))
        hidden[left] = np.isfinite(distance).reshape(len(left), -1).all(axis=1)
    return hidden


def sides(space: Space, points: np.ndarray, normals: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which points [P] of the surface have material on both sides (buried), on neither (a sheet), on the
    wrong one (inverted).
    """
    outer, inner = (space.winding(points + sign * OFFSET * normals) > 0.5 for sign in (1, -1))
    return outer & inner, ~outer & ~inner, outer & ~inner


def ways(space: Space, points: np.ndarray, towards: np.ndarray) -> np.ndarray:
    """Distances [P] from points of the surface along normals or their opposites [P, 3] to the next surface;
    infinite for none.
    """
    return space.first_hits(points + OFFSET * towards, towards)[0] + OFFSET


def side_measures(
    space: Space, points: np.ndarray, normals: np.ndarray, thin: float, rays: int, seed: int
) -> dict:
    """What the samples see: shares of them, and quantiles of the way through the body and through the air;
    None where nothing is hit.
    """
    buried, sheet, inverted = sides(space, points, normals)
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
    found = distances[np.isfinite(distances)]
    values = np.quantile(found, [0.01, 0.05, 0.5]).tolist() if len(found) else [None] * 3
    return dict(zip((f"{name}_p01", f"{name}_p05", f"{name}_median"), values, strict=True))
