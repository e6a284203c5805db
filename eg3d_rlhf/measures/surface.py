"""Measure surfaces: curvature and topology of a mesh, and displacement between shapes.

A corner is a vertex of one face, so a mesh of F faces has 3F corners. Topology is computed from corners.
Corners of two faces are the same point only if an edge joins them, so surfaces that only touch at a vertex
count as separate. A half-edge is an edge of one face, in the direction of the face's winding. It counts as
open if more than two faces share its edge, or if no other face runs through the edge in the opposite
direction.

Shapes: V vertices, F faces, C = 3F corners or half-edges (corner 3f + i belongs to face f, and half-edge 3f +
i starts there), S surfaces, P points, D x H x W grid points along z, y and x; in `displacement` S is the
number of samples along a line.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from eg3d_rlhf.core.field import LEVEL
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.geometry.level_set import LevelSet, interpolate_zero
from eg3d_rlhf.geometry.mesh import face_volumes

# Smallest ratio of (2 area)^2 to (longest edge)^4 of a face.
# Below it the normal of the face is rounding noise.
_SLIVER = 1e-12


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Numbers of connected surfaces, handles and rims of a complete mesh."""

    parts: int  # number of connected surfaces that are open or enclose material (a positive volume)
    cavities: int  # number of connected closed surfaces of negative volume: hollows inside a body
    handles: int  # genus, summed over all surfaces: holes that pass through the body, as in a torus
    rims: int  # number of closed loops of open edges: holes in the surface itself
    euler: int  # vertices - edges + faces, where surfaces that only touch have separate vertices
    open_edges: int  # number of half-edges without a partner in the opposite direction
    main_share: float  # volume of the largest part over the volume of all parts, 0..1; 1 if there is none

    @property
    def watertight(self) -> bool:
        """True if every edge joins exactly two faces that run through it in opposite directions."""
        return self.open_edges == 0

    @property
    def holes(self) -> int:
        """Number of handles and rims, which a simple closed surface does not have."""
        return self.handles + self.rims


def topology(vertices: np.ndarray, faces: np.ndarray) -> Topology:
    """Count parts, cavities, handles and rims of a mesh.

    For each connected surface, Euler's formula gives vertices - edges + faces = 2 - 2 genus - rims.

    Args:
        vertices: positions [V, 3], all finite.
        faces: vertex indices [F, 3], F >= 1, wound counter-clockwise as seen from outside. No face uses a
            vertex twice.
    """
    vertices, faces = _check_mesh(vertices, faces)
    partners = _partners(faces)  # [C] half-edge, -1 where open
    paired_corners = np.flatnonzero(partners >= 0)
    # A partner runs in the opposite direction: it starts where the half-edge of the corner ends.
    partner_corners = partners[paired_corners]
    # Number the points [C]. Corners that an edge joins are one
    # point, also if the mesh has copies of a vertex.
    point_of_corner, point_count = connected(
        [(paired_corners, _next(partner_corners)), (_next(paired_corners), partner_corners)], len(partners)
    )
    surface_of_corner, surface_count = _surfaces(partners)
    face_surface = surface_of_corner[0::3]  # [F] surface of each face, that of its first corner
    is_open = partners < 0  # [C]
    point_surface = np.zeros(point_count, dtype=np.int64)
    point_surface[point_of_corner] = surface_of_corner
    vertex_counts = np.bincount(point_surface, minlength=surface_count)  # [S]
    # A paired half-edge is half of an edge, and an open half-edge is a complete edge.
    edge_counts = np.bincount(surface_of_corner, weights=np.where(is_open, 1.0, 0.5), minlength=surface_count)
    face_counts = np.bincount(face_surface, minlength=surface_count)
    euler_numbers = np.rint(vertex_counts - edge_counts + face_counts).astype(np.int64)  # [S]
    rim_counts = _rims(point_of_corner, is_open, point_count, point_surface, surface_count)
    genus = (2 - euler_numbers - rim_counts) // 2
    surface_volumes = np.bincount(
        face_surface, weights=face_volumes(vertices, faces), minlength=surface_count
    )
    # A closed surface with negative volume is wound inwards, so it bounds a hollow.
    is_closed = np.bincount(surface_of_corner, weights=is_open, minlength=surface_count) == 0
    is_cavity = is_closed & (surface_volumes < 0)
    part_volumes = np.abs(surface_volumes[~is_cavity])
    main_share = (
        float(part_volumes.max() / part_volumes.sum())
        if part_volumes.size and part_volumes.sum() > 0
        else 1.0
    )
    return Topology(
        parts=int((~is_cavity).sum()),
        cavities=int(is_cavity.sum()),
        handles=int(genus.sum()),
        rims=int(rim_counts.sum()),
        euler=int(euler_numbers.sum()),
        open_edges=int(is_open.sum()),
        main_share=main_share,
    )


def main_surface(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Return the faces of the connected surface with the largest volume.

    If no surface encloses a positive volume, the surface with the most faces is chosen.

    Args:
        vertices: positions [V, 3].
        faces: vertex indices [F, 3] of the complete mesh.

    Returns: the rows of `faces` that belong to the surface.
    """
    vertices, faces = _check_mesh(vertices, faces)
    corner_surface, surface_count = _surfaces(_partners(faces))
    face_surface = corner_surface[0::3]  # [F], the surface of each face's first corner
    surface_volumes = np.bincount(
        face_surface, weights=face_volumes(vertices, faces), minlength=surface_count
    )
    surface_sizes = (
        surface_volumes if surface_volumes.max() > 0 else np.bincount(face_surface, minlength=surface_count)
    )
    return faces[face_surface == surface_sizes.argmax()]


def mean_curvature(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute the mean curvature H at each vertex, and the area that belongs to each vertex.

    Meyer, Desbrun, Schroeder and Barr 2003, eq. 8: 2 H n = 1/(2A) sum over neighbours j of vertex i of
    (cot alpha + cot beta)(x_i - x_j). Here n is the normal of vertex i, x are positions, alpha and beta are
    the angles opposite the edge from i to j, and A is the mixed Voronoi area (fig. 4). H > 0 where the
    surface is convex; on a sphere of radius r, H is 1/r. Not differentiable.

    Args:
        vertices: positions [V, 3] in world units.
        faces: vertex indices [F, 3], wound counter-clockwise as seen from outside.

    Returns: the curvature [V] in 1/world unit, and the area [V] in squared world units. The curvature is NaN
        and the area 0 at vertices on a rim and at vertices that no face uses.
    Deviates: faces without area are ignored. The sign of H comes from the area-weighted vertex normal.
    """
    vertices, faces = _check_mesh(vertices, faces)
    corners = vertices[faces]  # [F, 3, 3]
    side_vectors = np.roll(corners, -1, axis=1) - corners  # side i runs from corner i to corner i + 1
    squared_lengths = (side_vectors**2).sum(axis=2)  # [F, 3]
    face_normals = np.cross(side_vectors[:, 0], side_vectors[:, 1])  # [F, 3], length = twice the area
    double_area = np.linalg.norm(face_normals, axis=1)
    # Cotangents divide by the area, so faces that are nearly degenerate would dominate the sums.
    has_area = double_area**2 > _SLIVER * squared_lengths.max(axis=1) ** 2
    faces_used = faces[has_area]
    side_vectors = side_vectors[has_area]
    squared_lengths = squared_lengths[has_area]
    face_normals = face_normals[has_area]
    double_area = double_area[has_area]
    # Cotangent [F, 3] of the angle at corner i, between sides i - 1 and i: dot product over cross product.
    # The minus turns side i - 1, which ends at corner i, around.
    cotangents = -(np.roll(side_vectors, 1, axis=1) * side_vectors).sum(axis=2) / double_area[:, None]
    is_obtuse = (cotangents < 0).any(axis=1)
    laplacians = np.zeros_like(vertices)
    vertex_areas = np.zeros(len(vertices))
    for i in range(3):  # side i lies opposite corner i + 2
        start_vertices = faces_used[:, i]
        end_vertices = faces_used[:, (i + 1) % 3]
        weighted_side = cotangents[:, (i + 2) % 3, None] * side_vectors[:, i]  # cot alpha (x_end - x_start)
        _add(laplacians, start_vertices, -weighted_side)
        _add(laplacians, end_vertices, weighted_side)
        # The previous side joins corners i + 2 and i. The two sides at corner i are therefore it and side i.
        previous_side = (i + 2) % 3
        voronoi_areas = (
            squared_lengths[:, previous_side] * cotangents[:, (i + 1) % 3]
            + squared_lengths[:, i] * cotangents[:, previous_side]
        ) / 8
        # In an obtuse face the circumcentre lies outside the face. There the vertex at the obtuse angle gets
        # half of the area, and the other two vertices a quarter each.
        mixed_areas = np.where(
            is_obtuse, np.where(cotangents[:, i] < 0, double_area / 4, double_area / 8), voronoi_areas
        )
        vertex_areas += np.bincount(start_vertices, weights=mixed_areas, minlength=len(vertices))
    vertex_normals = np.zeros_like(vertices)
    for i in range(3):
        _add(vertex_normals, faces_used[:, i], face_normals)
    # The formula needs a closed ring of neighbours, which vertices on a rim do not have.
    is_on_rim = np.zeros(len(vertices), dtype=bool)
    open_half_edges = np.flatnonzero(_partners(faces) < 0)
    # Both ends of an open half-edge lie on a rim.
    is_on_rim[faces.reshape(-1)[open_half_edges]] = True
    is_on_rim[faces[:, [1, 2, 0]].reshape(-1)[open_half_edges]] = True
    is_defined = (vertex_areas > 0) & ~is_on_rim
    # Negative where the surface is concave
    signed_length = np.linalg.norm(laplacians, axis=1) * np.where(
        (laplacians * vertex_normals).sum(axis=1) < 0, -1.0, 1.0
    )
    # Eq. 8 divides the sum by 2A and by 2. The inner `where` avoids a division by 0.
    curvature = np.where(is_defined, signed_length / (4 * np.where(is_defined, vertex_areas, 1.0)), np.nan)
    return curvature, np.where(is_defined, vertex_areas, 0.0)


def _add(row_sums: np.ndarray, row_indices: np.ndarray, row_values: np.ndarray) -> None:
    """Add values [n, 3] to the rows of `row_sums` [V, 3] with the indices `row_indices` [n], in place.

    An index may occur several times; the values of its occurrences are all added.
    """
    # total[rows] += values would add only one of the values of a repeated index.
    for axis in range(3):
        row_sums[:, axis] += np.bincount(row_indices, weights=row_values[:, axis], minlength=len(row_sums))


def _check_mesh(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Convert a mesh to float64 and int64, and assert that it is valid.

    A valid mesh has a face and finite vertices, and no face uses a vertex twice.
    """
    vertices = np.asarray(vertices, dtype=np.float64)
    faces = np.asarray(faces).astype(np.int64)
    assert len(faces) and np.isfinite(vertices).all() and not (faces == np.roll(faces, 1, axis=1)).any()
    return vertices, faces


def _partners(faces: np.ndarray) -> np.ndarray:
    """Return the index of the partner of each half-edge, [C].

    The partner is the only other half-edge at the same edge, and runs in the opposite direction. Half-edges
    without such a partner get -1. Half-edge 3f + i runs from corner i of face f to the next corner of that
    face.
    """
    start_vertex = faces.reshape(-1)
    end_vertex = faces[:, [1, 2, 0]].reshape(-1)
    # One integer per undirected edge; the product cannot overflow int64 with fewer than 3e9 vertices.
    edge_codes = np.minimum(start_vertex, end_vertex) * (int(faces.max()) + 1) + np.maximum(
        start_vertex, end_vertex
    )
    half_edge_order = np.argsort(edge_codes, kind="stable")  # half-edges of one edge become neighbours
    edge_starts = np.flatnonzero(
        np.diff(edge_codes[half_edge_order], prepend=-1)
    )  # position of each edge's first half-edge
    pair_starts = edge_starts[
        np.diff(np.append(edge_starts, len(edge_codes))) == 2
    ]  # edges of exactly two faces
    first_half_edges = half_edge_order[pair_starts]
    second_half_edges = half_edge_order[pair_starts + 1]
    # Two faces that run through the edge in the same direction do not bound one body: their edge stays open.
    is_opposed = start_vertex[first_half_edges] == end_vertex[second_half_edges]
    partners = np.full(len(edge_codes), -1)
    partners[first_half_edges[is_opposed]] = second_half_edges[is_opposed]
    partners[second_half_edges[is_opposed]] = first_half_edges[is_opposed]
    return partners


def _next(corners: np.ndarray) -> np.ndarray:
    """Return for each of the given corners the next corner of the same face, in the order of the winding."""
    # Corners of a face are 3f, 3f + 1 and 3f + 2; the one after 3f + 2 is 3f.
    return np.where(corners % 3 == 2, corners - 2, corners + 1)


def connected(index_pairs: list[tuple[np.ndarray, np.ndarray]], item_count: int) -> tuple[np.ndarray, int]:
    """Number the groups of items that pairs connect (connected components of a graph).

    Args:
        index_pairs: pairs of index arrays of equal length; item a[k] is connected with item b[k].
        item_count: number of items.

    Returns: the number of the group of each item, [item_count], and the count of groups.
    """
    first_items, second_items = (
        np.concatenate([index_pair[i] for index_pair in index_pairs]) for i in range(2)
    )
    item_graph = coo_array(
        (np.ones(len(first_items), dtype=np.int8), (first_items, second_items)),
        shape=(item_count, item_count),
    )
    group_count, group_of_item = connected_components(item_graph, directed=False)
    return group_of_item.astype(np.int64), int(group_count)


def _surfaces(partners: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the number [C] of the connected surface of each corner, and the count of surfaces.

    Args:
        partners: partner of each half-edge, see `_partners`.
    """
    # Faces that share an edge are connected, and so are the corners of a face.
    paired_half_edges = np.flatnonzero(partners >= 0)
    corners = np.arange(len(partners))
    return connected(
        [(paired_half_edges, partners[paired_half_edges]), (corners, _next(corners))], len(partners)
    )


def _rims(
    point_of_corner: np.ndarray,
    is_open: np.ndarray,
    point_count: int,
    point_surface: np.ndarray,
    surface_count: int,
) -> np.ndarray:
    """Count the loops of open half-edges on each surface, [S].

    At each point of a rim one open half-edge ends and another one starts, so each loop is a connected group.

    Args:
        point_of_corner: point of each corner, [C].
        is_open: True for each half-edge [C] without a partner.
        point_count: number of points.
        point_surface: surface of each point, [point_count].
        surface_count: number of surfaces S.
    """
    open_half_edges = np.flatnonzero(is_open)
    if len(open_half_edges) == 0:
        return np.zeros(surface_count, dtype=np.int64)
    point_loop, loop_count = connected(
        [(point_of_corner[open_half_edges], point_of_corner[_next(open_half_edges)])], point_count
    )
    is_on_rim = np.zeros(point_count, dtype=bool)
    is_on_rim[point_of_corner[open_half_edges]] = True
    # A loop lies on one surface, so its first point gives that surface.
    _, first_positions = np.unique(point_loop[is_on_rim], return_index=True)
    return np.bincount(point_surface[np.flatnonzero(is_on_rim)[first_positions]], minlength=surface_count)


# Displacement of a surface: signed distances along its normals between two shapes of the same latent, and
# statistics of these distances over many latents.


VOXELS = 64  # grid points per side of the cube; its voxel is the unit of length
REACH = 4.0  # in voxels: the other surface is searched up to this distance
_CHUNK = 1 << 14  # number of points that are evaluated at once
_POINTS = 1500  # number of points per surface and latent


def voxel(spec: SlabSpec) -> float:
    """Return the side of a voxel in world units, for a grid with VOXELS points per side of the cube."""
    # VOXELS points from side to side of the cube have VOXELS - 1 intervals.
    return spec.box_warp / (VOXELS - 1)


@torch.no_grad()
def displacement(surface_before: LevelSet, points: Tensor, normals: Tensor, reach: float = REACH) -> Tensor:
    """Compute how far a surface has moved to reach points of a new surface, along the new outward normals.

    The line p + s n through a point p of the new surface with normal n is intersected with the old surface.
    Only intersections where the line leaves the old shape count. The displacement is -s at the intersection
    with the smallest |s| <= reach. Without an intersection it is +reach for a point outside the old shape and
    -reach for a point inside it.

    Args:
        surface_before: old surface.
        points: points [P, 3] of the new surface, in world units.
        normals: outward unit normals [P, 3] of the new surface.
        reach: largest distance that is searched, in voxels of the 64^3 grid.

    Returns: displacements [P] in voxels of the 64^3 grid, positive where the shape has grown.
    """
    voxel_side = voxel(surface_before.spec)
    # Samples on each side of the point: one per voxel of the grid of `surface_before`, at least 2
    half_sample_count = max(2, round(reach * voxel_side / surface_before.spec.voxel))
    s = torch.linspace(-reach * voxel_side, reach * voxel_side, 2 * half_sample_count + 1).to(points)  # [S]
    displacements = torch.empty(len(points)).to(points)
    for chunk_indices in torch.arange(len(points), device=points.device).split(_CHUNK):
        p = points[chunk_indices]
        n = normals[chunk_indices]
        density_excess = surface_before.above_level(
            p[:, None] + s[:, None] * n[:, None]
        )  # [P, S] density - level, >= 0 inside
        # The shape ends where the line runs from inside to outside.
        is_leaving = (density_excess[:, :-1] >= 0) & (density_excess[:, 1:] < 0)
        # An infinite distance marks the intervals without a crossing.
        crossings = interpolate_zero(s[:-1], s[1:], density_excess[:, :-1], density_excess[:, 1:]).where(
            is_leaving, torch.inf
        )
        nearest_crossings = crossings.gather(1, crossings.abs().argmin(dim=1, keepdim=True))[:, 0]
        has_no_crossing = nearest_crossings.isinf()
        # The grid is only interpolated; `refine_crossings` moves the crossing onto the level set of the field
        # itself.
        refined_crossings = surface_before.refine_crossings(
            p, n, nearest_crossings.masked_fill(has_no_crossing, 0.0)
        )
        displacements[chunk_indices] = torch.where(
            has_no_crossing,
            torch.where(surface_before.above_level_exact(p) >= 0, -reach, reach),
            -refined_crossings / voxel_side,
        )
    return displacements


def _axis_crossings(sigma: Tensor, axis: int, from_high: bool, spec: SlabSpec, level: float) -> Tensor:
    """Locate the points where rays parallel to an axis first enter a shape, the region with density >= level.

    Args:
        sigma: densities [D, H, W] of one shape.
        axis: axis of the rays: 0 = z, 1 = y, 2 = x.
        from_high: True for rays that start at the largest coordinate, False for the smallest.
        spec: grid of the densities.
        level: density of the surface.

    Returns: world points [P, 3] as (x, y, z). P is the number of rays that meet the shape.
    """
    ray_densities = sigma.movedim(axis, 0)
    axis_coordinates = [spec.axes()[2 - i].to(sigma) for i in range(3)]  # z, y, x
    ray_coordinates = axis_coordinates[axis]
    cross_coordinates = [coordinates for i, coordinates in enumerate(axis_coordinates) if i != axis]
    if from_high:
        ray_densities = ray_densities.flip(0)
        ray_coordinates = ray_coordinates.flip(0)
    is_inside = ray_densities >= level
    is_hit = is_inside.any(dim=0)
    # First sample inside; argmax returns the first of equal values, and 0 if there is none.
    inside_index = is_inside.to(torch.uint8).argmax(dim=0)
    outside_index = (inside_index - 1).clamp_min(0)
    inside_value = ray_densities.gather(0, inside_index[None])[0]
    outside_value = ray_densities.gather(0, outside_index[None])[0]
    # Linear interpolation between the last sample outside and the first sample inside. Both have the same
    # index if the ray starts inside, and the share 1 then gives that sample.
    step_share = torch.where(
        inside_index > 0,
        ((level - outside_value) / (inside_value - outside_value).clamp_min(1e-9)).clamp(0, 1),
        1.0,
    )
    hit_coordinates = ray_coordinates[outside_index] + step_share * (
        ray_coordinates[inside_index] - ray_coordinates[outside_index]
    )
    first_grid, second_grid = torch.meshgrid(*cross_coordinates, indexing="ij")
    coordinate_columns = [first_grid[is_hit], second_grid[is_hit]]
    coordinate_columns.insert(axis, hit_coordinates[is_hit])  # z, y, x; reversed below
    return torch.stack(coordinate_columns[::-1], dim=-1)


def surface_points(sigma: Tensor, spec: SlabSpec, back: float = -0.05, level: float = LEVEL) -> Tensor:
    """Locate the surface of a shape as seen from the front and from both sides.

    Args:
        sigma: raw densities [D, H, W].
        spec: grid of the densities.
        back: smallest z of the returned points, in world units.
        level: raw density of the surface.

    Returns: world points [P, 3] as (x, y, z). P depends on the shape; it is 0 for a cube without a surface.
    """
    # Negative infinity and NaN count as empty, positive infinity as solid.
    sigma = sigma.nan_to_num(nan=-1e4, posinf=1e4, neginf=-1e4)
    points_of_views = [
        _axis_crossings(sigma, axis, from_high, spec, level)
        for axis, from_high in ((0, True), (2, True), (2, False))  # from +z, the front, and from +x and -x
    ]
    points = torch.cat(points_of_views)
    return points[points[:, 2] >= back]


def resample(points: Tensor, point_count: int, seed: int) -> Tensor:
    """Choose points at random with replacement.

    Args:
        points: points [P, 3].
        point_count: number of points to choose.
        seed: random seed; the same seed gives the same choice.

    Returns: the chosen points [point_count, 3].
    """
    # A random generator of the CPU: every device then chooses the same points.
    random_generator = torch.Generator().manual_seed(seed)
    return points[torch.randint(len(points), (point_count,), generator=random_generator).to(points.device)]


def in_head(points: Tensor, spec: SlabSpec) -> Tensor:
    """Return bool [P]: True for each of the world points [P, 3] in the box of the published σ slab.

    The σ slab is the cropped density grid that the reward of the paper reads, see `core.spec`.

    Args:
        points: points [P, 3].
        spec: grid of the generator. The box has the centre and the scale of this grid, but the crop of the
            published slab.
    """
    # The default crop with the scale of this generator. Axes are sorted, so their first and last coordinates
    # are the sides of the box.
    box_axes = SlabSpec(crop=SlabSpec().crop, box_warp=spec.box_warp, centre=spec.centre).axes()
    lowest_corner, highest_corner = (
        points.new_tensor([float(axis[i]) for axis in box_axes]) for i in (0, -1)
    )
    return ((points >= lowest_corner) & (points <= highest_corner)).all(dim=-1)


@torch.no_grad()
def median_change(surface_before: LevelSet, surface_after: LevelSet) -> float:
    """Compute the median |displacement| between two shapes, in voxels of the 64^3 grid.

    The median is over points of the two surfaces that lie in the box of the published σ slab and are visible
    from the front or the sides.

    Args:
        surface_before: surface before a change.
        surface_after: surface after the change.

    Returns: the median, or NaN if neither surface has such a point.
    """
    absolute_displacements = []
    # Both directions: points of the new surface alone would miss parts that have disappeared.
    for surface, other_surface in ((surface_after, surface_before), (surface_before, surface_after)):
        points = surface_points(surface.cube.float(), surface.spec, -surface.spec.box_warp, surface.level)
        points = points[in_head(points, surface.spec)]
        if len(points):
            points = resample(points, _POINTS, 0)
            normals = surface.normals(points)
            # Interpolated points are first moved onto the level set itself, so that equal shapes give 0.
            points = (
                points
                + surface.refine_crossings(points, normals, torch.zeros(len(points)).to(points))[:, None]
                * normals
            )
            absolute_displacements.append(displacement(other_surface, points, normals).abs())
    return float(torch.cat(absolute_displacements).median()) if absolute_displacements else float("nan")


def change_summary(medians: Iterable[float]) -> dict:
    """Summarise the values of `median_change` over latents, as JSON values.

    Args:
        medians: value of each latent in voxels; NaN for a latent without a surface, which is not counted.

    Returns: a dictionary of 'median' and 'quartiles' over the latents, which are None without any value, and
        'n', the number of latents that count.
    """
    finite_medians = np.array([latent_value for latent_value in medians if np.isfinite(latent_value)])
    if len(finite_medians):
        lower_quartile, median, upper_quartile = np.quantile(finite_medians, [0.25, 0.5, 0.75]).tolist()
    else:
        lower_quartile = median = upper_quartile = None
    return {"median": median, "quartiles": [lower_quartile, upper_quartile], "n": len(finite_medians)}
