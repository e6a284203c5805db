"""Dual grid of a mesh: the voxels around grid lines that the surface crosses, and a vertex in each voxel.

TRELLIS.2 converts closed and open meshes in this way (Xiang et al. 2025, flexible dual grid). The method is
based on dual contouring (Ju et al. 2002). The vertex p of a voxel minimises a quadratic error, so that sharp
edges and corners are preserved:

    E(p) = sum over crossings  d(p, plane of its triangle)^2 + sum over triangles in the voxel  d(p, plane)^2
         + 0.2 sum over border edges in the voxel  d(p, line)^2
         + 0.01 (number of crossings) |p - mean of the crossings|^2

A crossing is an intersection of a triangle with a grid line, d is the Euclidean distance, and a border edge
is an edge that belongs to only one triangle. Lengths are in voxels: the grid covers 0..R along each axis.

Shapes: P vertices of the mesh, F triangles, R voxels per axis, X crossings, W voxels of the dual grid, K any
number of triangles, edges or voxels.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

LINE = 0.2  # weight of border edges in E
MEAN = 0.01  # weight of the mean of the crossings in E
# A symmetric 3 x 3 matrix is stored as six numbers: UPPER holds the rows and columns of its upper triangle,
# and WHERE the index among the six numbers of each entry of the full matrix.
UPPER = [0, 0, 0, 1, 1, 2], [0, 1, 2, 1, 2, 2]
WHERE = torch.tensor([[0, 1, 2], [1, 3, 4], [2, 4, 5]])
# Number of triangles, or of columns of voxels, that are processed at once. It limits the required memory.
AT_ONCE = 1 << 20


@dataclass(frozen=True)
class DualGrid:
    """Voxels around the surface of a mesh, with one vertex in each voxel."""

    coords: torch.Tensor  # [W, 3] int32, indices of the voxels, sorted
    vertices: torch.Tensor  # [W, 3] float32 in 0..1, relative to the voxel
    # [W, 3] bool: True if the surface crosses the edge of the voxel along each axis that ends at its far
    # corner
    crossed: torch.Tensor


def dual_grid(vertices: torch.Tensor, faces: torch.Tensor, resolution: int) -> DualGrid:
    """Compute the dual grid of a mesh that lies in the cube from -0.5 to 0.5, in float64 on the CPU.

    Args:
        vertices: coordinates [P, 3] of the vertices, in -0.5..0.5.
        faces: triangles [F, 3] as indices of vertices.
        resolution: number R of voxels per axis.

    Deviates: the original program of TRELLIS.2 minimises E in float32.

    Raises: ValueError if the mesh crosses no grid line.
    """
    corners = ((vertices.double().cpu() + 0.5) * resolution)[faces.long().cpu()]  # [F, 3 corners, 3]
    cross_products = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    # The lower bound 1e-300 avoids a division by 0: a degenerate triangle gets the normal 0.
    normals = cross_products / cross_products.norm(dim=1, keepdim=True).clamp_min(1e-300)
    # code of a voxel = x R^2 + y R + z
    strides = torch.tensor([resolution**2, resolution, 1])
    # entries of each axis: axis, triangle [X], point [X, 3], codes of the four voxels around the line [X, 4]
    crossings: list[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for axis in range(3):
        other_axes = [(axis + 1) % 3, (axis + 2) % 3]
        for face_index, points in _crossings(corners, axis):
            first_voxel = points.floor().long()
            # The point lies on a grid line, so its coordinates along both other axes are integers up to
            # rounding. The line is shared by four voxels. `first_voxel` has the smallest indices of them.
            first_voxel[:, other_axes] = points[:, other_axes].round().long() - 1
            # The four voxels must lie in the grid, hence the limit resolution - 1 across the line.
            is_in_grid = (
                (first_voxel >= 0).all(1)
                & (first_voxel[:, axis] < resolution)
                & (first_voxel[:, other_axes] < resolution - 1).all(1)
            )
            first_codes = (first_voxel[is_in_grid] * strides).sum(1, keepdim=True)
            u_stride, v_stride = strides[other_axes].tolist()
            crossings.append(
                (
                    axis,
                    face_index[is_in_grid],
                    points[is_in_grid],
                    first_codes + torch.tensor([0, u_stride, v_stride, u_stride + v_stride]),
                )
            )
    # codes of all voxels that touch a crossed grid line, sorted
    voxel_codes = torch.unique(torch.cat([four_codes.flatten() for *_, four_codes in crossings]))
    if not len(voxel_codes):
        raise ValueError(
            f"the mesh crosses no line of a grid with {resolution} voxels per axis. Check that the mesh is"
            " not empty, and enlarge it if it is smaller than a voxel."
        )
    # the codes back to the indices x, y, z
    coords = torch.stack(
        [voxel_codes // strides[0], voxel_codes // strides[1] % resolution, voxel_codes % resolution], 1
    )
    is_crossed = torch.zeros(len(voxel_codes), 3, dtype=torch.bool)
    quadratic_error = _Quadratic(coords)
    for axis, face_index, points, four_codes in crossings:
        voxel_rows = torch.searchsorted(voxel_codes, four_codes)
        # rows [X, 4]; the first column is `first_voxel`, whose far edge lies on the line
        is_crossed[voxel_rows[:, 0], axis] = True
        for voxel_row in voxel_rows.unbind(1):
            quadratic_error.planes(voxel_row, normals[face_index], corners[face_index, 0])
            quadratic_error.point(voxel_row, points)

    def existing_rows(voxels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Find voxels [K, 3] in the dual grid.

        Returns: the rows of the voxels that are in the dual grid, and a mask [K] that is True for them.
        """
        searched_codes = (voxels * strides).sum(1)
        voxel_row = torch.searchsorted(voxel_codes, searched_codes).clamp(max=len(voxel_codes) - 1)
        is_existing = voxel_codes[voxel_row] == searched_codes
        return voxel_row[is_existing], is_existing

    # Second term of E: all triangles that touch a voxel of the dual grid.
    for face_index, voxels in _columns(corners, normals, resolution):
        voxel_row, is_existing = existing_rows(voxels)
        face_index = face_index[is_existing]
        voxels = voxels[is_existing]
        is_touched = _touches(corners[face_index], normals[face_index], voxels)
        quadratic_error.planes(
            voxel_row[is_touched], normals[face_index[is_touched]], corners[face_index[is_touched], 0]
        )
    # Third term of E: border edges, which only open meshes have.
    border_ends = corners.flatten(0, 1)[_border(faces.cpu())]  # [K, 2 ends, 3]
    edge_index, voxels = _passed(border_ends, resolution)
    voxel_row, is_existing = existing_rows(voxels)
    quadratic_error.lines(voxel_row, border_ends[edge_index[is_existing]])
    return DualGrid(coords.int(), quadratic_error.least().float(), is_crossed)


def _ranges(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """List all integers of several ranges low..high, both ends included.

    Args:
        low: first integer [K] of each range.
        high: last integer [K] of each range; a range with high < low is empty.

    Returns: the index of the range and the integer, both [total number of integers], range after range.
    """
    # an empty range has no integers
    range_lengths = (high - low + 1).clamp_min(0)
    range_index = torch.repeat_interleave(torch.arange(len(low)), range_lengths)
    # The integer is its position within the range plus the first integer of the range.
    return range_index, torch.arange(len(range_index)) - (range_lengths.cumsum(0) - range_lengths)[
        range_index
    ] + low[range_index]


def _along(a: torch.Tensor, b: torch.Tensor, axis: int, coordinate: torch.Tensor) -> torch.Tensor:
    """Compute the points of lines at which one coordinate has a given value.

    Args:
        a, b: two points [K, 3] of each line, which differ in this coordinate.
        axis: index of the coordinate, 0 to 2.
        coordinate: value [K] of the coordinate.

    Returns: points [K, 3].
    """
    # position on the line: 0 at a, 1 at b
    position = (coordinate - a[:, axis]) / (b[:, axis] - a[:, axis])
    return a + position[:, None] * (b - a)


def _crossings(corners: torch.Tensor, axis: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Find the intersections of triangles with the grid lines along one axis.

    The intervals between the edges of a triangle include their upper end only, so that a grid line through an
    edge that two triangles share is counted once.

    Args:
        corners: coordinates [F, 3 corners, 3].
        axis: index of the axis, 0 to 2.

    Yields: indices of triangles [K], and the intersections [K, 3].
    """
    u = (axis + 1) % 3
    v = (axis + 2) % 3
    for start in range(0, len(corners), AT_ONCE):
        triangles = corners[start : start + AT_ONCE]
        # The planes u = integer cut a triangle into segments. The planes v = integer cut a segment at points.
        corner_order = triangles[:, :, u].argsort(1)
        low, middle, high = triangles.gather(1, corner_order[:, :, None].expand(-1, -1, 3)).unbind(1)
        face_index, plane_index = _ranges(
            low[:, u].floor().long() + 1, high[:, u].floor().long()
        )  # one entry for each plane u = plane_index that cuts a triangle
        plane_position = plane_index.double()
        # Corners are sorted by u. A plane cuts the side low-high, and either low-middle or middle-high.
        in_lower_half = (plane_position <= middle[face_index, u])[:, None]
        left_end = _along(low[face_index], high[face_index], u, plane_position)
        right_end = _along(
            torch.where(in_lower_half, low[face_index], middle[face_index]),
            torch.where(in_lower_half, middle[face_index], high[face_index]),
            u,
            plane_position,
        )
        # The two ends of a segment are ordered by v.
        is_swapped = (left_end[:, v] > right_end[:, v])[:, None]
        left_end, right_end = (
            torch.where(is_swapped, right_end, left_end),
            torch.where(is_swapped, left_end, right_end),
        )
        segment_index, v_index = _ranges(left_end[:, v].floor().long() + 1, right_end[:, v].floor().long())
        points = _along(left_end[segment_index], right_end[segment_index], v, v_index.double())
        # Two coordinates are replaced by the exact integers, because the interpolation rounds.
        points[:, u], points[:, v] = plane_position[segment_index], v_index.double()
        yield face_index[segment_index] + start, points


def _columns(
    corners: torch.Tensor, normals: torch.Tensor, resolution: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Find the voxels that triangles may intersect, column by column.

    Columns of voxels run along the axis that is nearest to the triangle's normal, so that a triangle passes
    only few voxels of a column.

    Args:
        corners: coordinates [F, 3 corners, 3].
        normals: unit normals [F, 3], 0 for a degenerate triangle.
        resolution: number R of voxels per axis.

    Yields: indices of triangles [K], and voxels [K, 3].
    """
    for axis in range(3):
        u = (axis + 1) % 3
        v = (axis + 2) % 3
        # > 0.5 excludes degenerate triangles, whose normal is 0; the other normals have length 1.
        (facing_indices,) = ((normals.abs().argmax(1) == axis) & (normals.norm(dim=1) > 0.5)).nonzero(
            as_tuple=True
        )
        # Number of columns in the bounding rectangle of each triangle. Groups of triangles have about AT_ONCE
        # columns.
        extents = (corners[facing_indices].amax(1) - corners[facing_indices].amin(1))[:, [u, v]] + 1
        group_number = (extents.prod(1).cumsum(0) / AT_ONCE).long()
        for group_indices in facing_indices.split(
            torch.unique_consecutive(group_number, return_counts=True)[1].tolist()
        ):
            group_corners = corners[group_indices]
            low, high = (
                corner_extremes.floor().long().clamp(0, resolution - 1)
                for corner_extremes in (group_corners.amin(1), group_corners.amax(1))
            )
            face_index, u_index = _ranges(low[:, u], high[:, u])
            v_range = _span(group_corners[face_index], u, v, u_index)
            strip_index, v_index = _ranges(
                v_range[0].floor().long().clamp(0), v_range[1].floor().long().clamp(max=resolution - 1)
            )
            face_index = face_index[strip_index]
            u_index = u_index[strip_index]
            face_normals = normals[group_indices[face_index]]
            first_corner = group_corners[face_index, 0]
            # Height of the triangle's plane at the centre of the column, and half of the range of heights
            # within the column.
            slopes = [face_normals[:, k] / face_normals[:, axis] for k in (u, v)]
            plane_height = (
                first_corner[:, axis]
                - slopes[0] * (u_index + 0.5 - first_corner[:, u])
                - slopes[1] * (v_index + 0.5 - first_corner[:, v])
            )
            half_range = (slopes[0].abs() + slopes[1].abs()) / 2
            column_index, axis_index = _ranges(
                torch.maximum((plane_height - half_range).floor().long(), low[face_index, axis]),
                torch.minimum((plane_height + half_range).floor().long(), high[face_index, axis]),
            )
            voxels = torch.empty(len(column_index), 3, dtype=torch.int64)
            voxels[:, axis], voxels[:, u], voxels[:, v] = (
                axis_index,
                u_index[column_index],
                v_index[column_index],
            )
            yield group_indices[face_index[column_index]], voxels


def _span(
    corners: torch.Tensor, u: int, v: int, strip_start: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the range of the coordinate v of triangles within a strip, strip_start <= u <= strip_start + 1.

    Args:
        corners: coordinates [K, 3 corners, 3].
        u, v: indices of the coordinates, 0 to 2.
        strip_start: lower bound [K] of the strip of each triangle.

    Returns: smallest and largest v, both [K]. A triangle outside its strip gives (1, -1), an empty range.
    """
    smallest_v = torch.full((len(strip_start),), torch.inf, dtype=torch.float64)
    largest_v = torch.full((len(strip_start),), -torch.inf, dtype=torch.float64)
    # The extremes lie on the three sides of the triangle, cut off at the bounds of the strip.
    for i in range(3):
        a = corners[:, i]
        b = corners[:, (i + 1) % 3]
        u_length = b[:, u] - a[:, u]
        # A flat side is parallel to the bounds of the strip; `where` avoids the division by 0.
        is_flat = u_length == 0
        crossing_positions = [((strip_start + k - a[:, u]) / u_length.where(~is_flat, 1.0)) for k in (0, 1)]
        # Positions on the side, 0 at a and 1 at b, at which it enters and leaves the strip.
        entry_position = torch.minimum(*crossing_positions).where(~is_flat, 0.0).clamp(0, 1)
        exit_position = torch.maximum(*crossing_positions).where(~is_flat, 1.0).clamp(0, 1)
        # True if a part of the side lies in the strip
        is_inside = ((a[:, u] >= strip_start) & (a[:, u] <= strip_start + 1)) | (
            (torch.maximum(*crossing_positions) >= 0) & (torch.minimum(*crossing_positions) <= 1) & ~is_flat
        )
        for position in (entry_position, exit_position):
            v_value = a[:, v] + position * (b[:, v] - a[:, v])
            smallest_v = torch.minimum(smallest_v, v_value.where(is_inside, torch.inf))
            largest_v = torch.maximum(largest_v, v_value.where(is_inside, -torch.inf))
    is_empty = smallest_v > largest_v
    return smallest_v.where(~is_empty, 1.0), largest_v.where(~is_empty, -1.0)


def _touches(corners: torch.Tensor, normals: torch.Tensor, voxels: torch.Tensor) -> torch.Tensor:
    """Test whether triangles intersect voxels, by the separating axis theorem.

    The 13 axes are taken from Akenine-Moller (2001), "Fast 3D triangle-box overlap testing".

    Args:
        corners: coordinates [K, 3 corners, 3] of the triangles.
        normals: unit normals [K, 3] of the triangles.
        voxels: indices [K, 3] of the voxels.

    Returns: True [K] for triangles that intersect their voxel: no axis separates them.
    """
    # coordinates relative to the centre of the voxel, which then covers -0.5..0.5
    centred_corners = corners - (voxels + 0.5)[:, None]
    # the three axes of the voxel
    is_separated = ((centred_corners.amin(1) > 0.5) | (centred_corners.amax(1) < -0.5)).any(1)
    # the normal of the triangle
    is_separated |= (normals * centred_corners[:, 0]).sum(1).abs() > normals.abs().sum(1) / 2
    # the nine cross products of an axis of the voxel and a side of the triangle
    for corner in range(3):
        triangle_side = centred_corners[:, (corner + 1) % 3] - centred_corners[:, corner]
        for u, v in ((1, 2), (2, 0), (0, 1)):
            projection = (
                centred_corners[:, :, v] * triangle_side[:, u, None]
                - centred_corners[:, :, u] * triangle_side[:, v, None]
            )
            half_width = (triangle_side[:, u].abs() + triangle_side[:, v].abs()) / 2
            is_separated |= (projection.amin(1) > half_width) | (projection.amax(1) < -half_width)
    return ~is_separated


def _border(faces: torch.Tensor) -> torch.Tensor:
    """Find the border edges of a mesh, which belong to only one triangle.

    Args:
        faces: triangles [F, 3] as indices of vertices.

    Returns: [K, 2] both ends of each edge, as indices into the 3 F corners of all triangles.
    """
    corner_index = torch.arange(faces.numel()).view(-1, 3)
    # [3 F, 2]: each corner with the next corner of its triangle, sorted, so that both directions are equal
    edge_ends = torch.stack([faces, faces.roll(-1, 1)], 2).flatten(0, 1).sort(1).values
    _, edge_number, edge_counts = torch.unique(edge_ends, dim=0, return_inverse=True, return_counts=True)
    return torch.stack([corner_index, corner_index.roll(-1, 1)], 2).flatten(0, 1)[
        edge_counts[edge_number] == 1
    ]


def _passed(edge_ends: torch.Tensor, resolution: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the voxels that edges pass through.

    An edge is cut at the planes of the grid. The middle of each piece lies in one voxel.

    Args:
        edge_ends: coordinates [K, 2 ends, 3] of the edges.
        resolution: number R of voxels per axis.

    Returns: indices of edges [number of pieces], and voxels [number of pieces, 3].
    """
    a, b = edge_ends.unbind(1)
    edge_indices = [torch.arange(len(a)).repeat(2)]
    # Positions along the edges in 0..1: first both ends of each edge, then the cuts with the planes.
    position_parts = [torch.cat([torch.zeros(len(a)), torch.ones(len(a))]).double()]
    for axis in range(3):
        low = torch.minimum(a, b)[:, axis]
        high = torch.maximum(a, b)[:, axis]
        edge_index, plane_index = _ranges(low.floor().long() + 1, high.ceil().long() - 1)
        edge_indices.append(edge_index)
        position_parts.append((plane_index - a[edge_index, axis]) / (b - a)[edge_index, axis])
    edge_index = torch.cat(edge_indices)
    position = torch.cat(position_parts)
    # Two stable sorts: by position along the edge, then by edge.
    sort_order = position.argsort(stable=True)
    sort_order = sort_order[edge_index[sort_order].argsort(stable=True)]
    edge_index = edge_index[sort_order]
    position = position[sort_order]
    # Two neighbouring positions on the same edge are the ends of a piece.
    is_same_edge = edge_index[1:] == edge_index[:-1]
    edge_index = edge_index[:-1][is_same_edge]
    midpoint = ((position[1:] + position[:-1]) / 2)[is_same_edge]
    voxels = (a[edge_index] + midpoint[:, None] * (b - a)[edge_index]).floor().long()
    # Pieces outside the grid and pieces of length 0 are dropped.
    is_valid = ((voxels >= 0) & (voxels < resolution)).all(1) & (position[1:] > position[:-1])[is_same_edge]
    return edge_index[is_valid], voxels[is_valid]


class _Quadratic:
    """Error E of each voxel as a quadratic function p^T A p - 2 b^T p, up to a constant.

    p is a point in 0..1 relative to the voxel. A is a 3 x 3 matrix and b a vector.

    Args:
        coords: indices [W, 3] of the voxels.
    """

    def __init__(self, coords: torch.Tensor):
        self.coords = coords.double()
        # per voxel: six entries of the upper triangle of A, and three of b
        self.sums = torch.zeros(len(coords), 9, dtype=torch.float64)
        # per voxel: sum of the crossings (3), and their number (1)
        self.points = torch.zeros(len(coords), 4, dtype=torch.float64)

    def planes(self, voxel_row: torch.Tensor, normals: torch.Tensor, points: torch.Tensor) -> None:
        """Add squared distances to planes.

        A plane with the unit normal n through a point q adds n n^T to A, and n (n^T q) to b.

        Args:
            voxel_row: row [K] of the voxel of each plane.
            normals: unit normals [K, 3].
            points: points [K, 3] on the planes.
        """
        for batch_indices in torch.arange(len(voxel_row)).split(AT_ONCE):
            n = normals[batch_indices]
            batch_rows = voxel_row[batch_indices]
            # n . q, with the point q relative to the voxel
            plane_offset = (n * (points[batch_indices] - self.coords[batch_rows])).sum(1, keepdim=True)
            self.sums.index_add_(
                0, batch_rows, torch.cat([n[:, UPPER[0]] * n[:, UPPER[1]], n * plane_offset], 1)
            )

    def lines(self, voxel_row: torch.Tensor, line_ends: torch.Tensor) -> None:
        """Add squared distances to lines.

        A line with the unit direction d through a point q adds M = I - d d^T to A, and M q to b, both times
        LINE.

        Args:
            voxel_row: row [K] of the voxel of each line.
            line_ends: two points [K, 2, 3] of each line.
        """
        direction = torch.nn.functional.normalize(line_ends[:, 1] - line_ends[:, 0], dim=1, eps=1e-300)
        # projection perpendicular to the line
        line_projection = LINE * (
            torch.eye(3, dtype=torch.float64) - direction[:, :, None] * direction[:, None]
        )
        projected_points = (line_projection @ (line_ends[:, 0] - self.coords[voxel_row])[:, :, None])[:, :, 0]
        self.sums.index_add_(
            0, voxel_row, torch.cat([line_projection[:, UPPER[0], UPPER[1]], projected_points], 1)
        )

    def point(self, voxel_row: torch.Tensor, points: torch.Tensor) -> None:
        """Add crossings to the sums from which their mean is computed.

        Args:
            voxel_row: row [K] of the voxel of each crossing.
            points: crossings [K, 3].
        """
        # the fourth column counts the crossings
        self.points.index_add_(
            0, voxel_row, torch.nn.functional.pad(points - self.coords[voxel_row], (0, 1), value=1.0)
        )

    def least(self) -> torch.Tensor:
        """Compute the point of each voxel that minimises the error: [W, 3] in 0..1 relative to the voxel.

        If the minimum lies outside the voxel, the point of its faces, edges and corners with the smallest
        error is returned.
        """
        # The fourth term of E adds MEAN times the number of crossings to the diagonal of A.
        A = self.sums[:, WHERE].clone() + MEAN * self.points[:, 3, None, None] * torch.eye(
            3, dtype=torch.float64
        )
        b = self.sums[:, 6:] + MEAN * self.points[:, :3]  # the number times the mean
        best_points = torch.linalg.solve(A, b)
        # A is positive definite thanks to the last term, so the unconstrained minimum exists.
        outside_rows = ((best_points < 0) | (best_points > 1)).any(1).nonzero()[:, 0]
        A = A[outside_rows]
        b = b[outside_rows]
        smallest_error = torch.full((len(A),), torch.inf, dtype=torch.float64)
        best_on_boundary = torch.zeros(len(A), 3, dtype=torch.float64)
        # A code has three digits to base 3: each coordinate is free (0), fixed at 0 (1), or fixed at 1 (2).
        # Code 0, with three free coordinates, is the unconstrained minimum.
        for code in range(1, 27):
            axis_states = [code % 3, code // 3 % 3, code // 9]
            free_axes = [k for k in range(3) if not axis_states[k]]
            fixed_axes = [k for k in range(3) if axis_states[k]]
            point = torch.zeros(len(A), 3, dtype=torch.float64)
            point[:, fixed_axes] = torch.tensor(
                [float(axis_states[k] - 1) for k in fixed_axes], dtype=torch.float64
            )
            if free_axes:
                # minimum over the free coordinates, given the fixed ones
                right_side = (
                    b[:, free_axes]
                    - (A[:, free_axes][:, :, fixed_axes] @ point[:, fixed_axes, None])[:, :, 0]
                )
                point[:, free_axes] = torch.linalg.solve(A[:, free_axes][:, :, free_axes], right_side)
            # error of the candidate point, up to the same constant
            point_error = ((A @ point[:, :, None])[:, :, 0] * point).sum(1) - 2 * (b * point).sum(1)
            is_better = ((point >= 0) & (point <= 1)).all(1) & (point_error < smallest_error)
            smallest_error = point_error.where(is_better, smallest_error)
            best_on_boundary = point.where(is_better[:, None], best_on_boundary)
        best_points[outside_rows] = best_on_boundary
        return best_points
