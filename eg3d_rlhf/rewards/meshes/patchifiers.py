"""Divide the faces of meshes into patches, and compute the 10 features of each face.

The features are those of MeshMAE (Liang et al. 2022, arXiv 2207.10228):

| features | meaning |
| --- | --- |
| 0 | area of the face: divided by the area of the mesh ("share"), or not ("raw", as in MeshMAE) |
| 1-3 | normal of length 1 |
| 4-6 | interior angles, ascending, radians |
| 7-9 | dot products of the normal with the normals at the three vertices, ascending |

Shapes: N vertices and M faces of a mesh, P patches, F faces of a patch, Q points, K candidate faces or pairs
of neighbouring faces. A is the number of meshes.
"""

import math
import warnings
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from eg3d_rlhf.core.interfaces import Mesh, Patches
from eg3d_rlhf.geometry.mesh import decimate, find_parts, remove_unused_vertices
from eg3d_rlhf.rewards.point_layers import farthest_points
from training.heads.people_mesh import closest_on_triangles

# Smallest distance of the arguments of square root and arc cosine from points at which their slope is
# infinite
TINY = 1e-7


def face_features(
    vertices: torch.Tensor, faces: torch.Tensor, area: str = "share"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the features [M, 10] and the centres [M, 3] of all faces of a mesh.

    The normal at a vertex is the mean of the normals of its faces, weighted by their angles at the vertex.
    Differentiable in vertices, almost everywhere.

    Args:
        vertices: positions [N, 3].
        faces: vertices of each face, int64 [M, 3].
        area: unit of areas: "share" of the mesh's total area, or "raw" (squared unit of positions).
    """
    normal, face_area, angle = measure_faces(vertices[faces])
    normals_at_vertices = _average_normals(len(vertices), faces, normal, angle)
    if area == "share":
        face_area = face_area / face_area.sum()
    features = _assemble_features(normal, face_area, angle, normals_at_vertices[faces])
    return features, vertices[faces].mean(dim=1)


def measure_faces(face_corners: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the normals, areas and angles of faces from their corners [..., 3, 3].

    Returns: normals of length 1 [..., 3], areas [..., 1], and interior angles at the corners [..., 3].
    """
    side_vectors = face_corners.roll(-1, -2) - face_corners  # from each corner to the next corner
    cross_products = torch.linalg.cross(side_vectors[..., 0, :], -side_vectors[..., 2, :])
    double_area = _length(cross_products)
    side_directions = side_vectors / _length(side_vectors)
    # Cosine of the angle at each corner. The previous side arrives at the corner, hence the minus sign.
    angle_cosines = -(side_directions * side_directions.roll(1, -2)).sum(dim=-1)
    return cross_products / double_area, double_area / 2, angle_cosines.clamp(-1 + TINY, 1 - TINY).acos()


def _average_normals(
    vertex_count: int, faces: torch.Tensor, normal: torch.Tensor, angle: torch.Tensor
) -> torch.Tensor:
    """Compute normals of length 1 at vertices, [N, 3], as weighted means of the normals of faces.

    Args:
        vertex_count: number of vertices, N.
        faces: vertices of each face, int64 [M, 3].
        normal: normals [M, 3] of the faces.
        angle: interior angles [M, 3] of the faces, which are the weights.
    """
    weighted_normals = (angle[..., None] * normal[:, None]).flatten(0, 1)  # [3 M, 3]
    # index_add sums over all faces of a vertex.
    return F.normalize(
        normal.new_zeros(vertex_count, 3).index_add(0, faces.flatten(), weighted_normals), dim=1
    )


def vertex_normals(vertices: torch.Tensor, faces: torch.Tensor) -> torch.Tensor:
    """Compute normals of length 1 at the vertices of a mesh, [N, 3].

    Args:
        vertices: positions [N, 3].
        faces: vertices of each face, int64 [M, 3].
    """
    normal, _, angle = measure_faces(vertices[faces])
    return _average_normals(len(vertices), faces, normal, angle)


def _assemble_features(
    normal: torch.Tensor, area: torch.Tensor, angle: torch.Tensor, corner_normals: torch.Tensor
) -> torch.Tensor:
    """Assemble the features [..., 10] of faces.

    Args:
        normal: normals [..., 3] of the faces.
        area: areas [..., 1] of the faces.
        angle: interior angles [..., 3] of the faces.
        corner_normals: normals [..., 3, 3] at the vertices of the faces.
    """
    dot_products = (corner_normals * normal.unsqueeze(-2)).sum(dim=-1)
    # Sorted, so that the features do not depend on the order of the corners of a face.
    return torch.cat([area, normal, angle.sort(dim=-1).values, dot_products.sort(dim=-1).values], dim=-1)


def _length(x: torch.Tensor) -> torch.Tensor:
    """Compute the lengths [..., 1] of vectors [..., 3], at least TINY.

    The limit makes the gradient of the square root finite.
    """
    return x.square().sum(dim=-1, keepdim=True).clamp_min(TINY**2).sqrt()


def to_frame(mesh: Mesh, place: str = "centre") -> torch.Tensor:
    """Convert the vertices [N, 3] of a mesh to coordinates of its own frame. Differentiable in vertices.

    Args:
        mesh: the mesh.
        place: the frame. "centre" has its origin at the centre of the surface, and the mean distance of the
            surface from it as unit. "box" has its origin at the corner of the bounding box with the smallest
            coordinates, and the longest side of the box as unit, as in MeshMAE. "world" changes nothing.
    """
    single_mesh = Owners(
        1, *(torch.zeros(len(tensor), dtype=torch.int64, device=tensor.device) for tensor in mesh)
    )
    origin, unit, _ = compute_frames(mesh, single_mesh, place)
    return (mesh.vertices - origin) / unit


class Owners(NamedTuple):
    """Number of concatenated meshes, and the mesh to which each vertex and each face belongs."""

    mesh_count: int  # number of meshes, A
    vertices: torch.Tensor  # index of the mesh of each vertex, int64 [N]
    faces: torch.Tensor  # index of the mesh of each face, int64 [M]


def compute_frames(mesh: Mesh, owners: Owners, place: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the frame and the area of each of several concatenated meshes. Differentiable in vertices.

    Args:
        mesh: the concatenated meshes.
        owners: mesh of each vertex and face.
        place: the frame, see `to_frame`.
    Returns: origins [A, 3] and units [A, 1] of the frames in world units, and areas [A, 1] of the surfaces in
        world units^2. Coordinates in a frame are (x - origin) / unit. A mesh without faces has the origin 0,
        the unit 1 and the area 1.
    """
    vertices, faces = mesh
    # [M, 3] each: the positions of the three corners of every face
    corners_a, corners_b, corners_c = (vertices.index_select(0, faces[:, i]) for i in range(3))
    face_area = _length(torch.linalg.cross(corners_b - corners_a, corners_c - corners_a)) / 2  # [M, 1]

    def sum_over_faces(values: torch.Tensor) -> torch.Tensor:
        """Return the sums [A, C] of values [M, C] over the faces of each mesh."""
        return values.new_zeros(owners.mesh_count, values.shape[1]).index_add(0, owners.faces, values)

    total_area = sum_over_faces(face_area)
    has_area = total_area.detach() > 0
    area = torch.where(has_area, total_area, 1.0)
    if place == "box":
        vertex_owners = owners.vertices[:, None].expand(-1, 3)
        zeros = vertices.new_zeros(owners.mesh_count, 3)
        # Smallest and largest coordinates of the vertices of each mesh
        min_coordinates = zeros.scatter_reduce(0, vertex_owners, vertices, "amin", include_self=False)
        max_coordinates = zeros.scatter_reduce(0, vertex_owners, vertices, "amax", include_self=False)
        longest_side = (max_coordinates - min_coordinates).amax(dim=1, keepdim=True).clamp_min(TINY)
        return min_coordinates, torch.where(has_area, longest_side, 1.0), area
    if place == "world":
        return vertices.new_zeros(owners.mesh_count, 3), vertices.new_ones(owners.mesh_count, 1), area
    # Centre of the surface, and mean distance from it, both weighted by area
    face_centre = (corners_a + corners_b + corners_c) / 3
    origin = sum_over_faces(face_area * face_centre) / area
    centre_distances = _length(face_centre - origin.index_select(0, owners.faces))
    radius = sum_over_faces(face_area * centre_distances) / area
    return origin, torch.where(has_area, radius.clamp_min(TINY), 1.0), area


class Plan(NamedTuple):
    """Assignment of the faces of a mesh to patches, which has no gradient.

    The faces may have new vertices, each of which is a convex combination of three vertices of the mesh.
    """

    # Vertices of the mesh that are combined, int64 [N', 3]; None if the new vertices are the vertices
    # themselves
    source: torch.Tensor | None
    weight: torch.Tensor | None  # weights [N', 3] >= 0 of these vertices, which sum to 1
    faces: torch.Tensor  # faces of the new vertices, int64 [M', 3], from which normals and areas are computed
    select: torch.Tensor  # faces of each patch, int64 [P, F]
    mask: torch.Tensor  # bool [P], False for patches that do not exist and whose faces have no meaning

    def mixed(self, vertices: torch.Tensor) -> torch.Tensor:
        """Compute the new vertices [N', 3] from the vertices [N, 3]. Differentiable in vertices."""
        if self.source is None or self.weight is None:
            return vertices
        return (vertices[self.source] * self.weight.to(vertices.dtype)[..., None]).sum(dim=1)


def patch_features(vertices: torch.Tensor, plan: Plan, area: str = "share", place: str = "centre") -> Patches:
    """Compute the patches [1, P, F, ...] of a mesh. Differentiable in vertices.

    The patches of a mesh without faces are zeros and masked.

    Args:
        vertices: positions [N, 3], which may have changed since the plan was made.
        plan: assignment of faces to patches.
        area: unit of areas: "share" of the mesh's total area, or "raw" (squared unit of positions).
        place: frame of the coordinates, see `to_frame`.
    """
    if not len(plan.faces):
        # 10 features and 3 coordinates of the centre
        zeros = vertices.new_zeros(1, *plan.select.shape, 13)
        return Patches(zeros[..., :10], zeros[..., 10:], plan.mask[None])
    positions = to_frame(Mesh(plan.mixed(vertices), plan.faces), place)
    features, centres = face_features(positions, plan.faces, area)
    return Patches(features[plan.select][None], centres[plan.select][None], plan.mask[None])


def features_in_frame(
    corner: torch.Tensor,
    corner_normals: torch.Tensor,
    origin: torch.Tensor,
    unit: torch.Tensor,
    total_area: torch.Tensor,
    area: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the features [A, ..., 10] and the centres [A, ..., 3] of some faces of several meshes.

    Differentiable in all tensors.

    Args:
        corner: corners [A, ..., 3, 3] of the faces, world units.
        corner_normals: normals [A, ..., 3, 3] at the corners.
        origin: origins [A, 3] of the frames, see `compute_frames`.
        unit: units [A, 1] of the frames.
        total_area: areas [A, 1] of the meshes.
        area: unit of areas: "share" of the mesh's total area, or "raw" (squared unit of positions).
    """
    batch_shape = (len(corner), *[1] * (corner.ndim - 3))  # broadcasts over the faces of each mesh
    normal, face_area, angle = measure_faces(corner)
    face_area = face_area / (total_area if area == "share" else unit**2).view(*batch_shape, 1)
    features = _assemble_features(normal, face_area, angle, corner_normals)
    centres = (corner.mean(dim=-2) - origin.view(*batch_shape, 3)) / unit.view(*batch_shape, 1)
    return features, centres


# Patches as in MeshMAE: a base mesh of 256 faces, each of which is cut into 64 by three midpoint subdivisions
# and projected back onto the surface.

NEAR = 16  # number of faces with the nearest centres, among which the nearest point of a surface is searched
_EDGES = ((0, 1), (1, 2), (2, 0))  # edges of a face, as pairs of its corners


@torch.no_grad()
def maps(mesh: Mesh, patch_count: int = 256, faces_per_patch: int = 64) -> Plan:
    """Create a plan by subdivision of a coarse mesh, as MeshMAE does.

    The mesh is reduced by decimation, or refined by bisection, to a base mesh of P faces. Every face of the
    base becomes a patch, and is divided into F faces. If the mesh has more separate parts than the base can
    represent, the smallest parts are left out. The new vertices are the points of the mesh that are nearest
    to the vertices of the subdivided base. They are convex combinations of the corners of a face, so that
    they move with the mesh. All patches of a mesh without faces are masked.

    Args:
        mesh: the mesh.
        patch_count: number of patches, P, at least 4.
        faces_per_patch: number of faces of a patch, F, a power of 4.
    Raises: ValueError for numbers that are not allowed.
    """
    level_count = round(math.log(max(faces_per_patch, 1), 4))
    if faces_per_patch != 4**level_count or patch_count < 4:
        raise ValueError(
            "--set patchifier=maps: expected at least 4 patches, and 1, 4, 16, 64, ... faces per patch, got"
            f" {patch_count} patches of {faces_per_patch} faces. Use, for example, --set patches=256 and"
            " --set faces=64."
        )
    device = mesh.faces.device
    # Subdivision of face p of the base gives the faces p, p + P, p + 2 P, ...
    selected_faces = (
        torch.arange(patch_count * faces_per_patch, device=device).view(faces_per_patch, patch_count).T
    )
    if not len(mesh.faces):
        return Plan(
            None,
            None,
            mesh.faces,
            torch.zeros_like(selected_faces),
            torch.zeros(patch_count, dtype=torch.bool, device=device),
        )
    # Decimation and projection need no gradient, so they are computed by numpy, in float64.
    vertices = mesh.vertices.detach().double().cpu().numpy()
    mesh_faces = mesh.faces.cpu().numpy()
    points, new_faces = base(vertices, mesh_faces, patch_count)
    for _ in range(level_count):
        points, new_faces = subdivided(points, new_faces)
    # Nearest face of the mesh for each point, and weights of its corners
    nearest_faces, nearest_weights = nearest_on(points, vertices[mesh_faces])
    source_vertices = torch.from_numpy(mesh_faces[nearest_faces]).to(device)
    weights = torch.from_numpy(nearest_weights.astype(np.float32)).to(device)
    patch_mask = torch.ones(patch_count, dtype=torch.bool, device=device)
    return Plan(
        source_vertices,
        weights / weights.sum(dim=1, keepdim=True),
        torch.from_numpy(new_faces).to(device),
        selected_faces,
        patch_mask,
    )


def base(vertices: np.ndarray, faces: np.ndarray, face_count: int) -> tuple[np.ndarray, np.ndarray]:
    """Reduce or refine a mesh to exactly `face_count` faces.

    Args:
        vertices: positions [N, 3].
        faces: vertices of each face, [M, 3].
        face_count: number of faces of the result.
    Returns: positions [N', 3], float64, and faces [face_count, 3], int64.
    """
    target_count = face_count
    with warnings.catch_warnings():
        # decimate() warns if its result has more faces than requested. This case is handled below.
        warnings.simplefilter("ignore")
        points, new_faces = decimate(vertices, faces, target_count)
        # Decimation may end above its target, so the target is decreased step by step.
        while len(new_faces) > face_count and target_count > max(face_count // 4, 4):
            target_count = max(int(0.8 * target_count), 4)
            points, new_faces = decimate(vertices, faces, target_count)
    # If there are still too many faces, small parts of the mesh are left out.
    if len(new_faces) > face_count:
        part_count, part_of_face = find_parts(new_faces, len(points))
        face_corners = points[new_faces]
        # Twice the areas
        areas = np.linalg.norm(
            np.cross(face_corners[:, 1] - face_corners[:, 0], face_corners[:, 2] - face_corners[:, 0]), axis=1
        )
        # Parts in the order of decreasing area, and True for those whose faces together are at most
        # `face_count`
        part_order = np.argsort(
            -np.bincount(part_of_face, weights=areas, minlength=part_count), kind="stable"
        )
        is_selected = np.bincount(part_of_face, minlength=part_count)[part_order].cumsum() <= face_count
        if is_selected[0]:
            new_faces = new_faces[np.isin(part_of_face, part_order[is_selected])]
        else:
            # The largest part alone has too many faces, so the largest faces are used.
            new_faces = new_faces[np.argsort(-areas, kind="stable")[:face_count]]
        points, new_faces = remove_unused_vertices(points, new_faces)
    return _bisect(points.astype(np.float64), new_faces.astype(np.int64), face_count)


def _bisect(points: np.ndarray, faces: np.ndarray, face_count: int) -> tuple[np.ndarray, np.ndarray]:
    """Bisect the longest edge, and all faces at this edge, until there are `face_count` faces.

    The last bisection may leave a face at the edge undivided.

    Args:
        points: positions [N, 3].
        faces: vertices of each face, [M, 3].
        face_count: number of faces of the result.
    Returns: positions [N', 3] and faces [face_count, 3].
    """
    face_list = [tuple(face) for face in faces.tolist()]
    positions = list(points)
    while len(face_list) < face_count:
        # Squared length of each edge, by its two vertices in ascending order
        squared_length: dict[tuple[int, ...], float] = {}
        for face in face_list:
            for i, j in _EDGES:
                edge_vector = positions[face[i]] - positions[face[j]]
                squared_length[tuple(sorted((face[i], face[j])))] = float((edge_vector**2).sum())
        # Among edges of equal length, the indices of the vertices decide, so the result is deterministic.
        edge = max(squared_length, key=lambda vertices: (squared_length[vertices], vertices))
        midpoint_index = len(positions)
        positions.append((positions[edge[0]] + positions[edge[1]]) / 2)
        faces_at_edge = [k for k, face in enumerate(face_list) if set(edge) <= set(face)]
        for k in faces_at_edge[: face_count - len(face_list)]:
            face = face_list[k]
            i, j = next((i, j) for i, j in _EDGES if {face[i], face[j]} == set(edge))
            # The three positions in a face sum to 0 + 1 + 2 = 3.
            opposite = face[3 - i - j]
            face_list[k] = (face[i], midpoint_index, opposite)
            face_list.append((midpoint_index, face[j], opposite))
    return np.array(positions), np.array(face_list, dtype=np.int64)


def subdivided(points: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Divide every face into four faces at the midpoints of its edges.

    The parts of face i of M faces are the faces i, i + M, i + 2 M and i + 3 M.

    Args:
        points: positions [N, 3].
        faces: vertices of each face, [M, 3].
    Returns: positions [N', 3] and faces [4 M, 3].
    """
    edge_vertices = np.sort(faces[:, _EDGES], axis=2).reshape(-1, 2)
    # Faces with a common edge share its midpoint.
    edges, edge_index = np.unique(edge_vertices, axis=0, return_inverse=True)
    midpoint_indices = edge_index.reshape(-1, 3) + len(points)  # [M, 3], midpoints of the edges ab, bc, ca
    a, b, c = faces.T
    ab, bc, ca = midpoint_indices.T
    new_faces = np.concatenate(
        [np.stack(corners, axis=1) for corners in ((a, ab, ca), (ab, b, bc), (ca, bc, c), (ab, bc, ca))]
    )
    return np.concatenate([points, points[edges].mean(axis=1)]), new_faces


def nearest_on(points: np.ndarray, triangles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find for each of Q points the nearest point on a set of triangles.

    Only the NEAR triangles with the nearest centres are considered.

    Args:
        points: positions [Q, 3].
        triangles: corners [M, 3, 3] of the triangles.
    Returns: the index of the triangle that contains the nearest point [Q], and the weights [Q, 3] of its
        corners that give this point.
    """
    from scipy.spatial import cKDTree

    tree = cKDTree(triangles.mean(axis=1))
    _, candidate_triangles = tree.query(points, k=min(NEAR, len(triangles)))
    # With k = 1, `query` returns one axis less. [Q, K]
    candidate_triangles = candidate_triangles.reshape(len(points), -1)
    corner_weights = closest_on_triangles(triangles[candidate_triangles], points[:, None])  # [Q, K, 3]
    squared_difference = (
        (corner_weights[..., None] * triangles[candidate_triangles]).sum(axis=2) - points[:, None]
    ) ** 2
    best_candidates = squared_difference.sum(axis=2).argmin(axis=1)
    point_rows = np.arange(len(points))
    return candidate_triangles[point_rows, best_candidates], corner_weights[point_rows, best_candidates]


# Regions: patches that grow over neighbouring faces with similar normals. This is the default, for meshes of
# any kind. It replaces the mesh fusion of DreamCS, whose algorithm is not published. All choices are
# discrete, so topology has no gradient.

SIMILAR = 0.9  # smallest cosine of the angle between the normals of a face and of its region
RELAX = 0.1  # decrease of this limit when no region can grow
SMALL = 0.1  # area, relative to the mean area of regions, below which a region joins a neighbouring region


@torch.no_grad()
def regions(mesh: Mesh, patch_count: int, faces_per_patch: int) -> Plan:
    """Create a plan of P patches with F faces each, which are regions of the surface with similar normals.

    Regions start at P faces that are chosen by farthest-point sampling of the centres. A region grows by
    neighbouring faces whose normals are similar to its mean normal; the limit is relaxed when no region can
    grow. Parts of the mesh without a start become additional regions. Small regions and surplus regions join
    other regions, and the largest regions are halved until there are P regions. F faces of each region are
    then chosen at equal steps of area, from its centre outwards, so that large faces may be chosen several
    times, and small faces not at all. If the mesh has fewer than P faces, some patches are masked.

    Args:
        mesh: the mesh.
        patch_count: number of patches, P.
        faces_per_patch: number of faces of a patch, F.
    """
    triangles = mesh.vertices.detach().double().cpu().numpy()[mesh.faces.cpu().numpy()]  # [M, 3, 3]
    selected_faces = np.zeros((patch_count, faces_per_patch), dtype=np.int64)
    patch_mask = np.zeros(patch_count, dtype=bool)
    if len(triangles):
        region_of_face = grown(triangles, mesh.faces.cpu().numpy(), patch_count)
        region_count = int(region_of_face.max()) + 1
        selected_faces[:region_count] = _select_faces(
            triangles, region_of_face, region_count, faces_per_patch
        )
        patch_mask[:region_count] = True
    device = mesh.faces.device
    return Plan(
        None,
        None,
        mesh.faces,
        torch.from_numpy(selected_faces).to(device),
        torch.from_numpy(patch_mask).to(device),
    )


def grown(triangles: np.ndarray, faces: np.ndarray, max_regions: int) -> np.ndarray:
    """Divide the faces of a mesh into min(P, M) regions, each with at least one face.

    Args:
        triangles: corners [M, 3, 3] of the faces.
        faces: vertices of each face, [M, 3].
        max_regions: number of regions, P, if the mesh has at least as many faces.
    Returns: index of the region of each face, [M], in 0..min(P, M) - 1.
    """
    cross_products = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    double_area = np.linalg.norm(cross_products, axis=1)
    normals = cross_products / np.maximum(double_area, 1e-12)[:, None]
    areas = double_area / 2
    centres = triangles.mean(axis=1)
    region_count = min(max_regions, len(faces))
    face_pairs = neighbours(faces)
    start_faces = farthest_points(torch.from_numpy(centres.T.copy())[None], region_count, "farthest")[
        0
    ].numpy()
    region_of_face = _grow(normals, face_pairs, start_faces)
    region_of_face = _merge(region_of_face, face_pairs, areas, centres, region_count)
    return _split(region_of_face, areas, centres, region_count)


def neighbours(faces: np.ndarray) -> np.ndarray:
    """Return pairs [K, 2] of faces that have a common edge.

    If more than two faces have a common edge, each of them is paired with the next one.
    """
    edge_vertices = np.sort(faces[:, [[0, 1], [1, 2], [2, 0]]].reshape(-1, 2), axis=1)
    # One integer per edge
    edge_keys = edge_vertices[:, 0].astype(np.int64) * (int(faces.max(initial=0)) + 1) + edge_vertices[:, 1]
    # Equal edges of different faces are neighbours in the sorted order. Index i // 3 is the face of edge i.
    edge_order = np.argsort(edge_keys, kind="stable")
    is_same_edge = edge_keys[edge_order[1:]] == edge_keys[edge_order[:-1]]
    return np.stack([edge_order[:-1][is_same_edge] // 3, edge_order[1:][is_same_edge] // 3], axis=1)


def _grow(normals: np.ndarray, face_pairs: np.ndarray, start_faces: np.ndarray) -> np.ndarray:
    """Grow regions from their start faces, and return the index of the region of each face, [M].

    Connected parts of the mesh without a start face become regions with the indices P, P + 1, ...

    Args:
        normals: normals [M, 3] of the faces.
        face_pairs: pairs [K, 2] of neighbouring faces.
        start_faces: faces [P] at which the regions start.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    region_of_face = np.full(len(normals), -1)  # -1 for faces without a region
    region_of_face[start_faces] = np.arange(len(start_faces))
    normal_sum = normals[start_faces].copy()  # [P, 3], sums of the normals of each region
    min_cosine = SIMILAR
    # The neighbours of face i are neighbour_faces[neighbour_starts[i] : neighbour_starts[i + 1]].
    directed_pairs = np.concatenate([face_pairs, face_pairs[:, ::-1]])
    directed_pairs = directed_pairs[np.argsort(directed_pairs[:, 0], kind="stable")]
    neighbour_starts = np.searchsorted(directed_pairs[:, 0], np.arange(len(normals) + 1))
    neighbour_faces = directed_pairs[:, 1]
    new_faces = start_faces
    # Region candidate_regions[k] can grow by face candidate_faces[k]. Candidates are neighbours of faces that
    # joined in the last step, and candidates of earlier steps whose normals were not similar enough.
    candidate_regions = np.zeros(0, dtype=np.int64)
    candidate_faces = np.zeros(0, dtype=np.int64)
    while True:
        neighbour_counts = neighbour_starts[new_faces + 1] - neighbour_starts[new_faces]
        # Indices of the neighbours of all new faces, without a loop over faces
        neighbour_indices = np.repeat(
            neighbour_starts[new_faces] - neighbour_counts.cumsum() + neighbour_counts, neighbour_counts
        ) + np.arange(neighbour_counts.sum())
        candidate_regions = np.concatenate(
            [candidate_regions, np.repeat(region_of_face[new_faces], neighbour_counts)]
        )
        candidate_faces = np.concatenate([candidate_faces, neighbour_faces[neighbour_indices]])
        is_unassigned = region_of_face[candidate_faces] < 0
        candidate_regions = candidate_regions[is_unassigned]
        candidate_faces = candidate_faces[is_unassigned]
        if not len(candidate_faces):
            break
        normal_lengths = np.maximum(np.sqrt((normal_sum * normal_sum).sum(axis=1)), 1e-12)
        mean_normal = normal_sum / normal_lengths[:, None]
        candidate_cosines = np.einsum("ki,ki->k", normals[candidate_faces], mean_normal[candidate_regions])
        while not (is_similar := candidate_cosines >= min_cosine).any():
            min_cosine -= RELAX
        # If several regions can grow by the same face, the last assignment counts, so the most similar region
        # comes last.
        similarity_order = np.argsort(candidate_cosines[is_similar], kind="stable")
        new_faces = np.unique(candidate_faces[is_similar])
        region_of_face[candidate_faces[is_similar][similarity_order]] = candidate_regions[is_similar][
            similarity_order
        ]
        np.add.at(normal_sum, region_of_face[new_faces], normals[new_faces])
    # Faces that no region reaches are grouped by connected part.
    is_unreached = region_of_face < 0
    if is_unreached.any():
        is_unreached_pair = is_unreached[face_pairs].all(axis=1)
        unreached_pairs = face_pairs[is_unreached_pair]
        face_count = len(normals)
        graph = coo_array(
            (np.ones(len(unreached_pairs)), (unreached_pairs[:, 0], unreached_pairs[:, 1])),
            shape=(face_count, face_count),
        )
        part_of_face = connected_components(graph, directed=False)[1]
        region_of_face[is_unreached] = (
            len(start_faces) + np.unique(part_of_face[is_unreached], return_inverse=True)[1]
        )
    return region_of_face


def _merge(
    region_of_face: np.ndarray,
    face_pairs: np.ndarray,
    areas: np.ndarray,
    centres: np.ndarray,
    max_regions: int,
) -> np.ndarray:
    """Merge small regions and surplus regions into other regions.

    Args:
        region_of_face: index of the region of each face, [M].
        face_pairs: pairs [K, 2] of neighbouring faces.
        areas: areas [M] of the faces.
        centres: centres [M, 3] of the faces.
        max_regions: largest number of regions of the result.
    Returns: index of the region of each face, [M], numbered from 0 without gaps.
    """
    while True:
        region_of_face = np.unique(region_of_face, return_inverse=True)[1]
        region_count = int(region_of_face.max()) + 1
        region_area = np.bincount(region_of_face, weights=areas, minlength=region_count)
        # Pairs of different regions with a common edge
        region_pairs = region_of_face[face_pairs]
        region_pairs = region_pairs[region_pairs[:, 0] != region_pairs[:, 1]]
        has_neighbour = np.bincount(region_pairs.flatten(), minlength=region_count) > 0
        is_small = has_neighbour & (region_area < SMALL * region_area.mean())
        if region_count <= max_regions and not is_small.any():
            return region_of_face
        # The smallest of the small regions, or of all regions, is merged.
        is_eligible = is_small if is_small.any() else np.ones(region_count, dtype=bool)
        merged_region = int(np.where(is_eligible, region_area, np.inf).argmin())
        if has_neighbour[merged_region]:
            # It joins the neighbour with the largest number of common edges.
            neighbour_regions = np.concatenate(
                [
                    region_pairs[region_pairs[:, 0] == merged_region, 1],
                    region_pairs[region_pairs[:, 1] == merged_region, 0],
                ]
            )
            target_region = int(np.bincount(neighbour_regions).argmax())
        else:
            # A region without neighbours is a separate part, and joins the region with the nearest centre.
            region_centres = _region_means(region_of_face, centres, region_count)
            centre_distances = np.linalg.norm(region_centres - region_centres[merged_region], axis=1)
            centre_distances[merged_region] = np.inf
            target_region = int(centre_distances.argmin())
        region_of_face[region_of_face == merged_region] = target_region


def _split(
    region_of_face: np.ndarray, areas: np.ndarray, centres: np.ndarray, region_count: int
) -> np.ndarray:
    """Halve the largest regions, in place, until there are `region_count` regions.

    Args:
        region_of_face: index of the region of each face, [M].
        areas: areas [M] of the faces.
        centres: centres [M, 3] of the faces.
        region_count: number of regions, at most the number of faces.
    Returns: `region_of_face`.
    """
    current_count = int(region_of_face.max()) + 1
    while current_count < region_count:
        region_area = np.bincount(region_of_face, weights=areas, minlength=current_count)
        # A region of one face cannot be halved, so it is never the largest one.
        region_area[np.bincount(region_of_face, minlength=current_count) < 2] = -1
        region_faces = np.flatnonzero(region_of_face == region_area.argmax())
        # Each face joins the nearer one of two faces that are far apart.
        face_centres = centres[region_faces]
        first_end = face_centres[np.linalg.norm(face_centres - face_centres.mean(0), axis=1).argmax()]
        second_end = face_centres[np.linalg.norm(face_centres - first_end, axis=1).argmax()]
        joins_second = np.linalg.norm(face_centres - second_end, axis=1) < np.linalg.norm(
            face_centres - first_end, axis=1
        )
        # If all centres are equal, the last face becomes a new region.
        joins_second[-1] |= not joins_second.any()
        region_of_face[region_faces[joins_second]] = current_count
        current_count += 1
    return region_of_face


def _region_means(region_of_face: np.ndarray, face_values: np.ndarray, region_count: int) -> np.ndarray:
    """Compute the mean of values [M, 3] over the faces of each region: [region_count, 3]."""
    face_counts = np.bincount(region_of_face, minlength=region_count)
    value_sums = np.stack(
        [
            np.bincount(region_of_face, weights=value_column, minlength=region_count)
            for value_column in face_values.T
        ],
        axis=1,
    )
    return value_sums / face_counts[:, None]


def _select_faces(
    triangles: np.ndarray, region_of_face: np.ndarray, region_count: int, faces_per_region: int
) -> np.ndarray:
    """Select F faces of each region at equal steps of area, from the centre of the region outwards.

    Args:
        triangles: corners [M, 3, 3] of the faces.
        region_of_face: index of the region of each face, [M].
        region_count: number of regions.
        faces_per_region: number of faces to select in each region, F.
    Returns: indices of the selected faces, [region_count, F].
    """
    centres = triangles.mean(axis=1)
    centre_distances = np.linalg.norm(
        centres - _region_means(region_of_face, centres, region_count)[region_of_face], axis=1
    )
    # Sorted by region, and within a region by the distance from its centre
    face_order = np.lexsort((centre_distances, region_of_face))
    cross_products = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    # Twice the areas; with 1e-12, faces without area can be selected, too.
    double_areas = np.linalg.norm(cross_products, axis=1)[face_order] + 1e-12
    cumulative_area = double_areas.cumsum()
    # Positions in `face_order` of the first and the last face of each region
    last_positions = np.searchsorted(region_of_face[face_order], np.arange(region_count), side="right") - 1
    first_positions = np.concatenate([[0], last_positions[:-1] + 1])
    start_area = cumulative_area[first_positions] - double_areas[first_positions]
    end_area = cumulative_area[last_positions]
    # [region_count, F]: cumulative areas at the middles of F equal steps
    selection_areas = (
        start_area[:, None]
        + (end_area - start_area)[:, None] * (np.arange(faces_per_region) + 0.5) / faces_per_region
    )
    # The clip prevents that a rounding error selects a face of a neighbouring region.
    return face_order[
        np.searchsorted(cumulative_area, selection_areas).clip(
            first_positions[:, None], last_positions[:, None]
        )
    ]
