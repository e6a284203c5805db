"""Determine if points lie inside or outside a mesh, and which faces rays hit.

A point is inside if its winding number exceeds one half. libigl computes the winding number from solid angles
(Jacobson et al. 2013). Counting the crossings of a ray would be wrong where faces coincide. Rays use Embree
if it is installed, and libigl otherwise. Lengths are shares of the longest edge of the bounding box.

Shapes: P points, R rays, F faces, K directions.
"""

import functools
import importlib
from types import ModuleType

import numpy as np
from scipy.spatial.transform import Rotation

from eg3d_rlhf.measures.meshes.clean import CleanMesh, face_areas
from eg3d_rlhf.measures.meshes.edges import Edges

OFFSET = 1e-4  # distance from the surface at which rays start and winding numbers are computed
_FEW = 2000  # largest number of faces for which exact winding numbers are faster than the hierarchy
# Fast winding numbers are accurate to 0.02. Numbers closer to one half than _CLOSE are computed exactly.
_CLOSE = 0.05
# Number of directions that are traced for all samples first. From most samples a ray in one of them escapes.
_FIRST = 8


def solid_library(library_name: str) -> ModuleType:
    """Import a library of the package's extra `solid`.

    Raises: ValueError if the library is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(library_name)
    except ImportError:
        raise ValueError(
            f"measures of meshes: {library_name} is not installed. Install it: pip install"
            " 'eg3d-rlhf[solid]'."
        ) from None


class Space:
    """Clean mesh with search structures for points and rays, which are built at their first use."""

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
        except ImportError:  # Embree is optional, because it has no package for some platforms
            return None
        scene = rtcore_scene.EmbreeScene()
        TriangleMesh(scene, self._vertices.astype(np.float32), self._faces.astype(np.int32))
        return scene

    def first_hits(self, origins: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Find the first face that each ray hits.

        Args:
            origins: starting points [R, 3] of the rays.
            directions: unit directions [R, 3] of the rays.

        Returns: the distances [R] to the first faces, and the indices [R] of these faces. A ray that hits no
            face has an infinite distance and the index -1.
        """
        if not len(origins):
            return np.zeros(0), np.zeros(0, dtype=np.int64)
        if self._scene is None:
            # libigl computes in float64, but traces rays more slowly than Embree.
            face_indices, distances, _ = self.tree.intersect_ray_first(
                self._vertices, self._faces, origins, directions
            )
            return np.where(face_indices < 0, np.inf, distances), np.asarray(face_indices)
        # Embree computes in float32.
        ray_hits = self._scene.run(origins.astype(np.float32), directions.astype(np.float32), output=1)
        face_indices = ray_hits["primID"].astype(np.int64)
        return np.where(face_indices < 0, np.inf, ray_hits["tfar"].astype(np.float64)), face_indices

    def winding(self, points: np.ndarray) -> np.ndarray:
        """Compute the winding numbers [P] of points [P, 3] with an error of at most 0.02.

        Numbers close to one half are exact, so that the comparison `> 0.5` has the exact result.
        """
        points = np.ascontiguousarray(points, dtype=np.float64)
        if len(self._faces) <= _FEW:
            return np.asarray(self.igl.winding_number(self._vertices, self._faces, points)).reshape(-1)
        winding_numbers = np.asarray(self._fast_winding.winding_number(points)).reshape(-1)
        # Only values near the limit of 0.5 are computed again. They are few, since winding numbers of
        # closed meshes are near integers.
        is_close = np.abs(winding_numbers - 0.5) < _CLOSE
        if is_close.any():
            winding_numbers[is_close] = self.igl.winding_number(self._vertices, self._faces, points[is_close])
        return winding_numbers

    def voxels(self, resolution: int) -> np.ndarray:
        """Return bool [x, y, z]: True for each voxel whose centre is inside the mesh.

        The voxels divide the unit cube around the origin.

        Args:
            resolution: number of voxels per side of the cube.
        """
        centre_coordinates = (
            np.arange(resolution) + 0.5
        ) / resolution - 0.5  # coordinates of the voxels' centres
        # [n, n, n, 3] -> [n^3, 3], in the order of the reshape below
        centres = np.stack(
            np.meshgrid(centre_coordinates, centre_coordinates, centre_coordinates, indexing="ij"), axis=-1
        ).reshape(-1, 3)
        return (self.winding(centres) > 0.5).reshape(resolution, resolution, resolution)

    def crossing_faces(self, edges: Edges) -> np.ndarray:
        """Return bool [F]: True for each face that crosses another face. Both faces of a crossing count.

        Two faces cross if an edge of one passes through the other and they share no vertex. An edge passes
        through a face if they meet between the ends of the edge. Crossings of faces in one plane are not
        found.

        Args:
            edges: edges of the same mesh.
        """
        vertices = self._vertices
        faces = self._faces
        edge_ends = edges.ends
        start_positions = vertices[edge_ends[:, 0]]
        edge_vector = vertices[edge_ends[:, 1]] - vertices[edge_ends[:, 0]]
        candidate_edges = np.flatnonzero(
            (edge_vector != 0).any(axis=1)
        )  # edges of length 0 have no direction
        # Only few edges meet a face between their ends. Searching for the first hit is cheap
        # and searching for all hits is not, since a ray does not end with its edge. So the
        # cheap search selects edges. It starts OFFSET / 2 after the edge's start, beyond the
        # faces there, and ends before the faces at the edge's end.
        search_starts = start_positions[candidate_edges] + OFFSET / 2 * edge_vector[candidate_edges]
        first_faces, _, _ = self.tree.intersect_ray_first(
            vertices, faces, search_starts, edge_vector[candidate_edges], 1 - OFFSET
        )
        candidate_edges = candidate_edges[np.asarray(first_faces) >= 0]
        # Each edge has a list of hits (face, t, u, v), where t is the
        # position along the edge, 0..1 between its ends.
        edge_hits = self.tree.intersect_ray(
            vertices, faces, start_positions[candidate_edges], edge_vector[candidate_edges]
        )
        edge_face_pairs = []
        for edge_index, hits in zip(candidate_edges, edge_hits, strict=True):
            edge_face_pairs += [(edge_index, hit[0]) for hit in hits if OFFSET < hit[1] < 1 - OFFSET]
        is_crossing = np.zeros(len(faces), dtype=bool)
        if edge_face_pairs:
            edge_index, face_index = np.array(edge_face_pairs).T
            # The faces at the edge itself always touch it, at a shared vertex, and do not count.
            has_no_shared_vertex = (faces[face_index][:, :, None] != edge_ends[edge_index][:, None, :]).all(
                axis=(1, 2)
            )
            is_passing_edge = np.zeros(len(edge_ends), dtype=bool)
            is_passing_edge[edge_index[has_no_shared_vertex]] = True
            is_crossing[face_index[has_no_shared_vertex]] = True
            # The faces at an edge that passes through another face cross that face, too. `order` lists the
            # half-edges edge by edge, and half-edge 3f + i belongs to face f.
            is_crossing[edges.order[np.repeat(is_passing_edge, edges.faces)] // 3] = True
        return is_crossing


def sample(mesh: CleanMesh, point_count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sample points on the surface of a mesh.

    The points are stratified by area: the area is divided into `point_count` equal intervals, and each
    interval gets one point. The same seed gives the same points.

    Args:
        mesh: cleaned mesh.
        point_count: number of points P.
        seed: random seed.

    Returns: the points [P, 3], and the unit normals [P, 3] of their faces.
    """
    rng = np.random.default_rng(seed)
    normals, areas = face_areas(mesh)
    # The inverse of the cumulative distribution selects faces in proportion to their areas.
    cumulative_areas = np.cumsum(areas)
    area_positions = (np.arange(point_count) + rng.random(point_count)) / point_count * cumulative_areas[-1]
    # The last position may exceed the sum by rounding; it belongs to the last face that has an area.
    face_indices = np.minimum(
        np.searchsorted(cumulative_areas, area_positions, side="right"), np.flatnonzero(areas)[-1]
    )
    # Barycentric coordinates of the points. The square root makes points uniform over the triangle.
    root = np.sqrt(rng.random(point_count))[:, None]
    v = rng.random(point_count)[:, None]
    a, b, c = (mesh.vertices[mesh.faces[face_indices, i]] for i in range(3))
    # The weights (1 - root, root (1 - v), root v) are not negative and add up to 1.
    return (1 - root) * a + root * (1 - v) * b + root * v * c, normals[face_indices]


def directions(direction_count: int, seed: int) -> np.ndarray:
    """Return K unit vectors [K, 3] that are spread evenly: a Fibonacci sphere in a random orientation.

    Args:
        direction_count: number of vectors K.
        seed: random seed of the orientation.
    """
    # Equal steps in height give bands of equal area (Archimedes), so the points are uniform over the sphere.
    height = 1 - (2 * np.arange(direction_count) + 1) / direction_count
    angle = np.pi * (3 - 5**0.5) * np.arange(direction_count)  # multiples of the golden angle
    # Radius of the circle of the unit sphere at each height, [K]
    ring_radius = np.sqrt(1 - height**2)
    sphere_points = np.stack([ring_radius * np.cos(angle), height, ring_radius * np.sin(angle)], axis=1)
    # A quaternion of four normal numbers is a uniformly distributed rotation.
    return Rotation.from_quat(np.random.default_rng(seed).normal(size=4)).apply(sphere_points)


def hidden_samples(
    space: Space, points: np.ndarray, normals: np.ndarray, direction_count: int, seed: int
) -> np.ndarray:
    """Return bool [P]: True for each point of the surface that is hidden.

    A point is hidden if all rays from it hit the mesh, on both sides of the surface.

    Args:
        space: mesh.
        points: points [P, 3] on its surface.
        normals: unit normals [P, 3] at the points.
        direction_count: number of ray directions K from each point.
        seed: random seed of the directions.
    """
    ray_directions = directions(direction_count, seed)
    # Consecutive directions of the Fibonacci sphere are similar, so they are tried in a random order.
    ray_directions = ray_directions[np.random.default_rng(seed).permutation(direction_count)]
    is_hidden = np.ones(len(points), dtype=bool)
    # The second block is traced only for points from which no ray of the first block escaped.
    for direction_block in (ray_directions[:_FIRST], ray_directions[_FIRST:]):
        remaining_indices = np.flatnonzero(is_hidden)
        if not len(remaining_indices) or not len(direction_block):
            break
        # [P, K]: a ray starts on the side of the surface towards which it points
        side_offset = np.where(normals[remaining_indices] @ direction_block.T >= 0, OFFSET, -OFFSET)
        origins = (
            points[remaining_indices, None] + side_offset[..., None] * normals[remaining_indices, None]
        )  # [P, K, 3]
        directions_of_rays = np.broadcast_to(direction_block, origins.shape)
        hit_distances, _ = space.first_hits(origins.reshape(-1, 3), directions_of_rays.reshape(-1, 3))
        is_hidden[remaining_indices] = (
            np.isfinite(hit_distances).reshape(len(remaining_indices), -1).all(axis=1)
        )
    return is_hidden


def classify_sides(
    space: Space, points: np.ndarray, normals: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Classify points of the surface by the material on their two sides.

    Args:
        space: mesh.
        points: points [P, 3] on its surface.
        normals: unit normals [P, 3] at the points.

    Returns: three bool arrays [P]. The first is True for buried points, which have material on both sides.
        The second is True for points of a sheet, which have material on neither side. The third is True for
        inverted points, which have material only on the side to which the normal points.
    """
    # True where the side to which the normal points, and the opposite side, are inside the mesh
    is_outer_solid, is_inner_solid = (
        space.winding(points + sign * OFFSET * normals) > 0.5 for sign in (1, -1)
    )
    return (
        is_outer_solid & is_inner_solid,
        ~is_outer_solid & ~is_inner_solid,
        is_outer_solid & ~is_inner_solid,
    )


def distance_to_surface(space: Space, points: np.ndarray, ray_directions: np.ndarray) -> np.ndarray:
    """Compute the distances [P] from points of the surface to the next surface in given directions.

    A distance is infinite if the ray meets no surface.

    Args:
        space: mesh.
        points: points [P, 3] on its surface.
        ray_directions: unit directions [P, 3], which are the normals or their opposites.
    """
    # A ray starts OFFSET above the surface, so that it does not hit its own face.
    return space.first_hits(points + OFFSET * ray_directions, ray_directions)[0] + OFFSET


def side_measures(
    space: Space, points: np.ndarray, normals: np.ndarray, max_thin_wall: float, ray_count: int, seed: int
) -> dict:
    """Compute the measures that need the two sides of sampled points.

    Args:
        space: mesh.
        points: sampled points [P, 3] on its surface.
        normals: unit normals [P, 3] at the points.
        max_thin_wall: walls that are thinner than this length count as thin.
        ray_count: number of ray directions from each point.
        seed: random seed of the directions.

    Returns: by name, the shares of hidden, buried, sheet, inverted and thin samples, and quantiles of the
        wall thickness ('thick_...') and of the gap in front of walls ('gap_...'). Quantiles are None if no
        ray hits a face.
    """
    is_buried, is_sheet, is_inverted = classify_sides(space, points, normals)
    # Buried points have no free side, so neither a thickness nor a gap is defined there.
    has_free_side = ~is_buried
    wall_thickness = distance_to_surface(space, points[has_free_side], -normals[has_free_side])
    return {
        "hidden": float(hidden_samples(space, points, normals, ray_count, seed).mean()),
        "buried": float(is_buried.mean()),
        "sheet": float(is_sheet.mean()),
        "inverted": float(is_inverted.mean()),
        **_quantiles("thick", wall_thickness),
        "thin": float((wall_thickness < max_thin_wall).mean()) if len(wall_thickness) else 0.0,
        **_quantiles("gap", distance_to_surface(space, points[has_free_side], normals[has_free_side])),
    }


def _quantiles(measure_name: str, distances: np.ndarray) -> dict:
    """Compute the 1 %, 5 % and 50 % quantiles of the finite distances.

    Args:
        measure_name: first part of the names of the results.
        distances: distances [P], which may be infinite.

    Returns: '<name>_p01', '<name>_p05' and '<name>_median'. All are None if no distance is finite.
    """
    finite_distances = distances[np.isfinite(distances)]
    quantile_values = (
        np.quantile(finite_distances, [0.01, 0.05, 0.5]).tolist() if len(finite_distances) else [None] * 3
    )
    return dict(
        zip(
            (f"{measure_name}_p01", f"{measure_name}_p05", f"{measure_name}_median"),
            quantile_values,
            strict=True,
        )
    )
