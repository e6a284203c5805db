"""Signed distances to the mesh of a synthetic head.

A search tree finds the nearest triangle, which gives the distance. The winding number gives the sign. It is
the sum of the signed solid angles of all triangles, divided by 4 pi (Jacobson et al. 2013). It is 1 inside
and 0 outside of the mesh, and has values between 0 and 1 near openings, such as those at the lids and the
mouth. Distant groups of triangles are approximated by a dipole (Barill et al. 2018, order 1).

Shapes: V is the number of vertices, T of triangles, P of points, G of groups of triangles, B of points in a
block, and n of voxels per edge.
"""

import contextlib
import functools
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt as edt
from scipy.spatial import cKDTree

from torch_utils.build import cache_dir
from training.heads.people import ASSET, Head, bust_end, cross_2d, heads_from_latents, load_basis
from training.storage import write_atomic

NEIGHBOURS = 10  # number of nearest surface samples whose triangles are candidates for the nearest triangle
SAMPLE = 0.012  # approximate largest distance between neighbouring samples of a triangle, world units
# Distance in units of SAMPLE. For points that are farther from the surface, only the triangle of the nearest
# sample is a candidate.
CLEAR = 6.0
GROUP = 24  # approximate largest number of triangles in a group
FAR = 2.0  # distance in radii of a group, from which on the group is approximated by a dipole
BLOCK = 192  # largest number of points in a block, for which the same groups are approximated


def solid_angles(corners: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Compute the signed solid angles [P, T] of triangles, seen from points (Van Oosterom and Strackee 1983).

    Args: corners: corners of the triangles [T, 3, 3]; points: points [P, 3].
    """
    # Vectors from the points to the three corners a, b and c. Each is a list of three arrays [P, T], one for
    # each axis.
    a, b, c = (
        [corners[None, :, corner, axis] - points[:, None, axis] for axis in range(3)] for corner in range(3)
    )
    length_a, length_b, length_c = (np.sqrt(_dot(vector, vector)) for vector in (a, b, c))
    cross_bc = [b[1] * c[2] - b[2] * c[1], b[2] * c[0] - b[0] * c[2], b[0] * c[1] - b[1] * c[0]]
    denominator = (
        length_a * length_b * length_c + _dot(a, b) * length_c + _dot(b, c) * length_a + _dot(c, a) * length_b
    )
    return 2 * np.arctan2(_dot(a, cross_bc), denominator)


def _dot(u: Sequence[np.ndarray], v: Sequence[np.ndarray]) -> np.ndarray:
    """Return the scalar products of vectors. A vector is a sequence of three arrays, one for each component.

    This form is several times as fast as a sum over a last axis of length 3.
    """
    return u[0] * v[0] + u[1] * v[1] + u[2] * v[2]


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Triangles, divided into groups of neighbours that dipoles can approximate."""

    order: np.ndarray  # indices of all triangles [T], group after group
    start: np.ndarray  # index in `order` of the first triangle of each group, and finally T; [G + 1]
    centre: np.ndarray  # mean position of each group, weighted by area [G, 3]
    radius: np.ndarray  # distance of the farthest corner from the centre [G]
    dipole: np.ndarray  # sum of area times unit normal over the triangles of each group [G, 3]


def _grouped(corners: np.ndarray) -> Groups:
    """Divide triangles with corners [T, 3, 3] into groups of neighbours."""
    triangle_centres = corners.mean(axis=1)
    triangle_groups = [np.arange(len(corners))]
    # All groups are halved in each step, along their longest axis. Their sizes therefore differ by at
    # most one.
    while len(triangle_groups[0]) > GROUP:
        half_groups = []
        for triangle_group in triangle_groups:
            axis = np.ptp(triangle_centres[triangle_group], axis=0).argmax()
            sorted_group = triangle_group[np.argsort(triangle_centres[triangle_group, axis], kind="stable")]
            half_size = len(sorted_group) // 2
            half_groups += [sorted_group[:half_size], sorted_group[half_size:]]
        triangle_groups = half_groups
    group_starts = np.cumsum([0] + [len(triangle_group) for triangle_group in triangle_groups])
    triangle_order = np.concatenate(triangle_groups)
    # Area times unit normal of each triangle, [T, 3].
    area_vectors = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]) / 2
    # The small number avoids 0 / 0 for groups of degenerate triangles.
    triangle_areas = np.linalg.norm(area_vectors, axis=1, keepdims=True) + 1e-12

    def sum_groups(triangle_values: np.ndarray) -> np.ndarray:
        """Return the sums of values of triangles, given in their original order, over each group."""
        return np.add.reduceat(triangle_values[triangle_order], group_starts[:-1])

    centre = sum_groups(triangle_areas * triangle_centres) / sum_groups(triangle_areas)
    # Index of the group of each triangle, in the order of `triangle_order`.
    group_of_triangle = np.repeat(np.arange(len(triangle_groups)), np.diff(group_starts))
    corner_distances = np.linalg.norm(corners[triangle_order] - centre[group_of_triangle, None], axis=2).max(
        axis=1
    )
    return Groups(
        order=triangle_order,
        start=group_starts,
        centre=centre,
        radius=np.maximum.reduceat(corner_distances, group_starts[:-1]),
        dipole=sum_groups(area_vectors),
    )


def winding_number(corners: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Compute the winding numbers [P] of points: 1 inside of a closed mesh, 0 outside.

    Args: corners: corners of triangles with outward normals [T, 3, 3]; points: points [P, 3].
    """
    corners = corners.astype(np.float64)
    points = points.astype(np.float64)
    triangle_groups = _grouped(corners)
    winding_numbers = np.zeros(len(points))
    # The points of a block are near each other, so the same groups are far from all of them.
    for block in _blocks(points):
        block_points = points[block]
        block_centre = (block_points.min(axis=0) + block_points.max(axis=0)) / 2
        block_radius = np.linalg.norm(block_points - block_centre, axis=1).max()
        # With the radius of the block, a group is far from every point of it.
        is_far = (
            np.linalg.norm(triangle_groups.centre - block_centre, axis=1)
            > FAR * triangle_groups.radius + block_radius
        )
        offsets = triangle_groups.centre[is_far] - block_points[:, None]  # [B, G, 3]
        # The solid angle of a dipole is offset . dipole / |offset|^3.
        angles = np.einsum(
            "bgd,gd,bg->b", offsets, triangle_groups.dipole[is_far], (offsets * offsets).sum(axis=2) ** -1.5
        )
        near_triangles = [
            triangle_groups.order[triangle_groups.start[i] : triangle_groups.start[i + 1]]
            for i in np.flatnonzero(~is_far)
        ]
        if near_triangles:
            angles += solid_angles(corners[np.concatenate(near_triangles)], block_points).sum(axis=1)
        winding_numbers[block] = angles / (4 * np.pi)
    return winding_numbers


def _blocks(points: np.ndarray) -> list[np.ndarray]:
    """Divide points [P, 3] into blocks of at most BLOCK neighbours.

    Returns: the indices of the points of each block.
    """
    blocks = []
    remaining_blocks = [np.arange(len(points))] if len(points) else []
    while remaining_blocks:
        block = remaining_blocks.pop()
        if len(block) <= BLOCK:
            blocks.append(block)
            continue
        axis = np.ptp(points[block], axis=0).argmax()
        half_size = len(block) // 2
        # A partition is faster than sorting, and the order within the halves does not matter.
        partitioned_block = block[np.argpartition(points[block, axis], half_size)]
        remaining_blocks += [partitioned_block[:half_size], partitioned_block[half_size:]]
    return blocks


def closest_on_triangles(corners: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Find the point of each triangle that is nearest to a given point.

    Args: (the leading axes are broadcast against each other)
        corners: corners of the triangles [..., 3, 3].
        points: points [..., 3].
    Returns: barycentric weights [..., 3] of the corners at the nearest point.
    """

    def dot(u, v):
        """Return the scalar products [...] of vectors [..., 3]."""
        return _dot(np.moveaxis(u, -1, 0), np.moveaxis(v, -1, 0))

    # Projection onto the plane of the triangle: the point a + weight_u u + weight_v v with the edges u and v.
    # The weights solve the normal equations.
    a = corners[..., 0, :]
    u = corners[..., 1, :] - corners[..., 0, :]
    v = corners[..., 2, :] - corners[..., 0, :]
    offset_from_a = points - a
    uu = dot(u, u)
    uv = dot(u, v)
    vv = dot(v, v)
    # Determinant of the equations, four times the squared area. The bound avoids a division by 0 for
    # degenerate triangles.
    determinant = np.maximum(uu * vv - uv * uv, 1e-300)
    weight_u = (vv * dot(u, offset_from_a) - uv * dot(v, offset_from_a)) / determinant
    weight_v = (uu * dot(v, offset_from_a) - uv * dot(u, offset_from_a)) / determinant
    projection_weights = np.stack([1 - weight_u - weight_v, weight_u, weight_v], axis=-1)
    best_weights = projection_weights
    # Squared distances. The projection is a candidate only if it lies inside the triangle.
    smallest_distance = np.where(
        (projection_weights >= 0).all(axis=-1),
        dot(offset_from_a - (weight_u[..., None] * u + weight_v[..., None] * v), offset_from_a),
        np.inf,
    )
    # The nearest points of the three edges are the other candidates.
    for i, j in ((0, 1), (1, 2), (2, 0)):
        edge = corners[..., j, :] - corners[..., i, :]
        edge_fraction = np.clip(
            dot(points - corners[..., i, :], edge) / np.maximum(dot(edge, edge), 1e-300), 0, 1
        )
        edge_offset = points - corners[..., i, :] - edge_fraction[..., None] * edge
        edge_weights = np.zeros_like(projection_weights)
        edge_weights[..., i] = 1 - edge_fraction
        edge_weights[..., j] = edge_fraction
        is_nearer = dot(edge_offset, edge_offset) < smallest_distance
        best_weights = np.where(is_nearer[..., None], edge_weights, best_weights)
        smallest_distance = np.where(is_nearer, dot(edge_offset, edge_offset), smallest_distance)
    return best_weights


@functools.cache
def _sample_weights(divisions: int) -> np.ndarray:
    """Return barycentric weights [divisions^2, 3] of samples of a triangle.

    The samples are the centres of divisions^2 equal triangles into which the triangle is divided.

    Args: divisions: number of parts of each edge.
    """
    first_two_weights_of_samples = []
    for i in range(divisions):
        for j in range(divisions - i):
            # An upright small triangle, and the inverted one next to it, which does not exist at the end
            # of a row.
            first_two_weights_of_samples.append((i + 1 / 3, j + 1 / 3))
            if i + j < divisions - 1:
                first_two_weights_of_samples.append((i + 2 / 3, j + 2 / 3))
    first_two_weights = np.array(first_two_weights_of_samples) / divisions
    # The three weights sum to 1.
    return np.concatenate([first_two_weights, 1 - first_two_weights.sum(axis=1, keepdims=True)], axis=1)


def nearest_places(corners: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the nearest point of a mesh for each of P points.

    Args: corners: corners of the triangles [T, 3, 3]; points: points [P, 3].
    Returns: three arrays. The first is the index of the nearest triangle [P]. The second contains the weights
        [P, 3] of its corners at the nearest point. The third is the distance [P] to the nearest point.
    """
    # A search tree finds the nearest samples of the surface. Exact distances are computed only to their
    # triangles. Large triangles have more samples.
    longest_edge = np.linalg.norm(corners - np.roll(corners, 1, axis=1), axis=2).max(axis=1)
    division_counts = np.clip(np.ceil(longest_edge / SAMPLE), 1, 6).astype(int)
    sample_positions = []
    triangles_of_samples = []
    for divisions in np.unique(division_counts):
        same_division_triangles = np.flatnonzero(division_counts == divisions)
        triangle_samples = np.einsum(
            "sc,tcd->tsd", _sample_weights(int(divisions)), corners[same_division_triangles]
        )
        sample_positions.append(triangle_samples.reshape(-1, 3))
        triangles_of_samples.append(np.repeat(same_division_triangles, triangle_samples.shape[1]))
    sample_tree = cKDTree(np.concatenate(sample_positions))
    triangle_of_sample = np.concatenate(triangles_of_samples)  # index of the triangle of each sample
    nearest_triangle = np.empty(len(points), int)
    nearest_weights = np.empty((len(points), 3))
    nearest_distance = np.empty(len(points))
    sample_distance, nearest_sample = sample_tree.query(points, eps=0.01)
    # Far from the surface, the triangle of the nearest sample is a sufficient approximation.
    is_far = sample_distance > CLEAR * SAMPLE
    for point_indices, candidate_count in (
        (np.flatnonzero(is_far), 1),
        (np.flatnonzero(~is_far), NEIGHBOURS),
    ):
        # Chunks bound the memory.
        for chunk_indices in np.array_split(point_indices, len(point_indices) // 20_000 + 1):
            nearest_samples = (
                nearest_sample[chunk_indices, None]
                if candidate_count == 1
                else sample_tree.query(points[chunk_indices], candidate_count)[1]
            )
            candidate_triangles = triangle_of_sample[nearest_samples]  # [chunk, candidate_count]
            # One row for each pair of a point and a candidate.
            repeated_points = np.repeat(points[chunk_indices], candidate_count, axis=0)
            candidate_corners = corners[candidate_triangles.ravel()]
            candidate_weights = closest_on_triangles(candidate_corners, repeated_points)
            nearest_points = np.einsum("pc,pcd->pd", candidate_weights, candidate_corners)
            candidate_distances = np.linalg.norm(nearest_points - repeated_points, axis=1).reshape(
                candidate_triangles.shape
            )
            best_candidate = candidate_distances.argmin(axis=1)
            chunk_rows = np.arange(len(chunk_indices))
            nearest_triangle[chunk_indices] = candidate_triangles[chunk_rows, best_candidate]
            nearest_distance[chunk_indices] = candidate_distances[chunk_rows, best_candidate]
            nearest_weights[chunk_indices] = candidate_weights.reshape(*candidate_triangles.shape, 3)[
                chunk_rows, best_candidate
            ]
    return nearest_triangle, nearest_weights, nearest_distance


def grid_points(resolution: int) -> np.ndarray:
    """Return the centres [n, n, n, 3] of the voxels of the cube of side 1 about the origin, axes x, y, z.

    Args: resolution: number of voxels per edge n.
    """
    coordinates = (np.arange(resolution) + 0.5) / resolution - 0.5
    return np.stack(np.meshgrid(coordinates, coordinates, coordinates, indexing="ij"), axis=-1)


# Regions of a head in which errors are reported, in world units.
BACK = -0.02  # the back of the head consists of points with a smaller z
BASE = -0.30  # the neck and the shoulders, which have a smaller y, are excluded
FACE = (0.08, -0.13, 0.07)  # half of the width, lowest y and highest y of the region of brows, nose and mouth

GRID_VERSION = 2  # part of the cache key; it has to be raised if `head_grid` returns other values
BAND = 1.8  # largest distance from the surface, in voxels, at which the distances of `head_grid` are exact


def crossings(corners: np.ndarray, grid_coordinates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Count the crossings of a mesh by the lines along z through the points of a grid.

    A crossing into the mesh counts 1, a crossing out of it -1. The crossings on either side of a point are
    counted separately. For a closed mesh, each of the two counts is the winding number.

    Args:
        corners: corners of triangles with outward normals [T, 3, 3].
        grid_coordinates: evenly spaced coordinates [n] of the grid, the same for each axis.
    Returns: two arrays of signed counts [n, n, n]. The first counts the crossings at a smaller z than each
        point, for a line in the direction of +z. The second counts the crossings at a larger z, for a line in
        the direction of -z.
    """
    n = len(grid_coordinates)
    first_coordinate = grid_coordinates[0]
    grid_spacing = grid_coordinates[1] - grid_coordinates[0]
    corners_xy = corners[:, :, :2]
    # Range of the lines (x, y) that can hit each triangle.
    first_lines = np.clip(
        np.ceil((corners_xy.min(axis=1) - first_coordinate) / grid_spacing).astype(int), 0, n
    )
    end_lines = np.clip(
        np.floor((corners_xy.max(axis=1) - first_coordinate) / grid_spacing).astype(int) + 1, 0, n
    )
    covered_extents = np.clip(end_lines - first_lines, 0, None)
    line_counts = covered_extents.prod(axis=1)
    # One row for each pair of a triangle and a line in its range. `line_numbers` counts the lines of a
    # triangle from 0.
    triangle_indices = np.repeat(np.arange(len(corners)), line_counts)
    line_numbers = np.arange(len(triangle_indices)) - np.repeat(
        np.cumsum(line_counts) - line_counts, line_counts
    )
    i = first_lines[triangle_indices, 0] + line_numbers // covered_extents[triangle_indices, 1]
    j = first_lines[triangle_indices, 1] + line_numbers % covered_extents[triangle_indices, 1]
    # The lines are shifted slightly, because a line through a vertex would hit several triangles.
    line_positions = first_coordinate + grid_spacing * np.stack([i, j], axis=1) + 1e-7
    a, b, c = (corners_xy[triangle_indices, corner] for corner in range(3))
    doubled_areas = cross_2d(b - a, c - a)
    # Barycentric weights of the corners, multiplied by the area.
    weighted_area = np.stack(
        [
            cross_2d(c - b, line_positions - b),
            cross_2d(a - c, line_positions - c),
            cross_2d(b - a, line_positions - a),
        ],
        axis=1,
    )
    is_hit = (np.abs(doubled_areas) > 1e-15) & ((weighted_area * np.sign(doubled_areas)[:, None]) >= 0).all(
        axis=1
    )
    corner_weights = weighted_area[is_hit] / doubled_areas[is_hit, None]
    # z coordinate of the crossing, in steps of the grid.
    crossing_z = (
        (corner_weights * corners[triangle_indices[is_hit], :, 2]).sum(axis=1) - first_coordinate
    ) / grid_spacing
    # Index of the first grid point at a larger z. It is n for crossings beyond the last point.
    layer_indices = np.clip(np.ceil(crossing_z).astype(int), 0, n)
    area_signs = np.sign(doubled_areas[is_hit]).astype(int)
    crossing_counts = np.zeros((n, n, n + 1), int)
    # A line in the direction of +z enters the mesh at a triangle whose normal points to -z (area < 0).
    # np.add.at adds several crossings with the same index, which indexing with += would not.
    np.add.at(crossing_counts, (i[is_hit], j[is_hit], layer_indices), -area_signs)
    counts_at_smaller_z = crossing_counts.cumsum(axis=2)
    counts_at_larger_z = counts_at_smaller_z - counts_at_smaller_z[:, :, -1:]
    # The last layer belongs to no grid point.
    return counts_at_smaller_z[:, :, :n], counts_at_larger_z[:, :, :n]


def head_grid(head: Head, resolution: int) -> np.ndarray:
    """Compute the signed distances of an intact head at the centres of voxels (see `grid_points`).

    The head is closed at the bottom by the cylinder of `bust_end`. Distances are exact within BAND voxels of
    the surface. Farther away their error is at most one voxel, and at most four voxels near the end of the
    bust. The sign is determined by counting crossings along z. If the counts from both sides differ, as at
    open lids, the winding number is computed.

    Args: head: intact head; resolution: number of voxels per edge n.
    Returns: signed distances [n, n, n] in world units, negative inside, axes x, y, z.
    """
    corners = head.vertices[load_basis().triangles].astype(np.float64)
    points = grid_points(resolution)
    # points[:, 0, 0, 0] are the coordinates along x, which are the same along y and z.
    crossings_at_smaller_z, crossings_at_larger_z = crossings(corners, points[:, 0, 0, 0])
    is_inside = crossings_at_smaller_z > 0
    # Winding numbers are much more expensive than crossings, so they are computed only for ambiguous voxels.
    is_ambiguous = (
        (crossings_at_smaller_z != crossings_at_larger_z)
        | (crossings_at_smaller_z < 0)
        | (crossings_at_smaller_z > 1)
    )
    is_inside[is_ambiguous] = winding_number(corners, points[is_ambiguous]) > 0.5
    bust_distance = bust_end(points)
    is_solid = is_inside & (bust_distance < 0)
    # The distance transform returns the distance in voxels to the nearest voxel on the other side. The
    # surface lies half a voxel before it.
    distance = np.where(is_solid, -1, 1) * (edt(is_solid) + edt(~is_solid) - 0.5) / resolution
    is_near = np.abs(distance) < BAND / resolution
    _, _, exact_distance = nearest_places(corners, points[is_near])
    # The maximum of two signed distances is the intersection of the head and the cylinder.
    distance[is_near] = np.maximum(
        np.where(is_inside[is_near], -exact_distance, exact_distance), bust_distance[is_near]
    )
    return distance


def ground_truth_grids(z: torch.Tensor, resolution: int = 64) -> np.ndarray:
    """Return the signed distances of the ground-truth heads of latents, see `head_grid`.

    The grids are stored in the user's cache.

    Args: z: latents [N, 64]; resolution: number of voxels per edge n.
    Returns: grids [N, n, n, n], float32, rounded to half precision.
    """
    return np.stack([_ground_truth_grid(latent, resolution) for latent in z.detach().cpu().float().numpy()])


def _ground_truth_grid(z: np.ndarray, resolution: int) -> np.ndarray:
    """Return the grid [n, n, n] of one latent [64], from the cache if it is stored there."""
    # The file name is a hash of everything that the grid depends on.
    cache_key = z.tobytes() + f"{resolution} {GRID_VERSION}".encode() + _basis_hash()
    file_stem = hashlib.sha256(cache_key).hexdigest()[:20]
    cache_path = cache_dir().parent / "heads" / f"{file_stem}.npy"
    try:
        return np.load(cache_path).astype(np.float32)
    except (OSError, ValueError):
        # The grid is stored in half precision. It is rounded here, so that the first call returns the same
        # values as later ones.
        grid = head_grid(heads_from_latents(z[None])[0], resolution).astype(np.float16)
    # If the disk is full or read-only, the grid is not stored, and a later call computes it again.
    with contextlib.suppress(OSError):
        buffer = io.BytesIO()
        np.save(buffer, grid)
        write_atomic(cache_path, buffer.getvalue())
    return grid.astype(np.float32)


@functools.cache
def _basis_hash() -> bytes:
    """Return the SHA-256 of the basis file, on which the head of a latent depends."""
    return hashlib.sha256(ASSET.read_bytes()).digest()
