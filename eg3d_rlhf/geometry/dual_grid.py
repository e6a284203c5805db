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
    cross = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    # The lower bound 1e-300 avoids a division by 0: a degenerate triangle gets the normal 0.
    normals = cross / cross.norm(dim=1, keepdim=True).clamp_min(1e-300)
    # code of a voxel = x R^2 + y R + z
    strides = torch.tensor([resolution**2, resolution, 1])
    # entries of each axis: axis, triangle [X], point [X, 3], codes of the four voxels around the line [X, 4]
    crossings: list[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for axis in range(3):
        other_axes = [(axis + 1) % 3, (axis + 2) % 3]
        for face, point in _crossings(corners, axis):
            first_voxel = point.floor().long()
            # The point lies on a grid line, so its coordinates along both other axes are integers up to
            # rounding. The line is shared by four voxels. `first_voxel` has the smallest indices of them.
            first_voxel[:, other_axes] = point[:, other_axes].round().long() - 1
            # The four voxels must lie in the grid, hence the limit resolution - 1 across the line.
            inside = (
                (first_voxel >= 0).all(1)
                & (first_voxel[:, axis] < resolution)
                & (first_voxel[:, other_axes] < resolution - 1).all(1)
            )
            first_code = (first_voxel[inside] * strides).sum(1, keepdim=True)
            u, v = strides[other_axes].tolist()
            crossings.append((axis, face[inside], point[inside], first_code + torch.tensor([0, u, v, u + v])))
    # codes of all voxels that touch a crossed grid line, sorted
    codes = torch.unique(torch.cat([four_codes.flatten() for *_, four_codes in crossings]))
    if not len(codes):
        raise ValueError(
            f"the mesh crosses no line of a grid with {resolution} voxels per axis. Check that the mesh is"
            " not empty, and enlarge it if it is smaller than a voxel."
        )
    # the codes back to the indices x, y, z
    coords = torch.stack([codes // strides[0], codes // strides[1] % resolution, codes % resolution], 1)
    crossed = torch.zeros(len(codes), 3, dtype=torch.bool)
    error = _Quadratic(coords)
    for axis, face, point, four_codes in crossings:
        rows = torch.searchsorted(codes, four_codes)
        # rows [X, 4]; the first column is `first_voxel`, whose far edge lies on the line
        crossed[rows[:, 0], axis] = True
        for row in rows.unbind(1):
            error.planes(row, normals[face], corners[face, 0])
            error.point(row, point)

    def existing_rows(voxel: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Find voxels [K, 3] in the dual grid.

        Returns: the rows of the voxels that are in the dual grid, and a mask [K] that is True for them.
        """
        voxel_codes = (voxel * strides).sum(1)
        row = torch.searchsorted(codes, voxel_codes).clamp(max=len(codes) - 1)
        exists = codes[row] == voxel_codes
        return row[exists], exists

    # Second term of E: all triangles that touch a voxel of the dual grid.
    for face, voxel in _columns(corners, normals, resolution):
        row, exists = existing_rows(voxel)
        face = face[exists]
        voxel = voxel[exists]
        touched = _touches(corners[face], normals[face], voxel)
        error.planes(row[touched], normals[face[touched]], corners[face[touched], 0])
    # Third term of E: border edges, which only open meshes have.
    ends = corners.flatten(0, 1)[_border(faces.cpu())]  # [K, 2 ends, 3]
    edge_index, voxel = _passed(ends, resolution)
    row, exists = existing_rows(voxel)
    error.lines(row, ends[edge_index[exists]])
    return DualGrid(coords.int(), error.least().float(), crossed)


def _ranges(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """List all integers of several ranges low..high, both ends included.

    Args:
        low: first integer [K] of each range.
        high: last integer [K] of each range; a range with high < low is empty.

    Returns: the index of the range and the integer, both [total number of integers], range after range.
    """
    # an empty range has no integers
    counts = (high - low + 1).clamp_min(0)
    row = torch.repeat_interleave(torch.arange(len(low)), counts)
    # The integer is its position within the range plus the first integer of the range.
    return row, torch.arange(len(row)) - (counts.cumsum(0) - counts)[row] + low[row]


def _along(a: torch.Tensor, b: torch.Tensor, axis: int, value: torch.Tensor) -> torch.Tensor:
    """Compute the points of lines at which one coordinate has a given value.

    Args:
        a, b: two points [K, 3] of each line, which differ in this coordinate.
        axis: index of the coordinate, 0 to 2.
        value: value [K] of the coordinate.

    Returns: points [K, 3].
    """
    # position on the line: 0 at a, 1 at b
    share = (value - a[:, axis]) / (b[:, axis] - a[:, axis])
    return a + share[:, None] * (b - a)


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
        batch = corners[start : start + AT_ONCE]
        # The planes u = integer cut a triangle into segments. The planes v = integer cut a segment at points.
        order = batch[:, :, u].argsort(1)
        low, middle, high = batch.gather(1, order[:, :, None].expand(-1, -1, 3)).unbind(1)
        face, plane = _ranges(
            low[:, u].floor().long() + 1, high[:, u].floor().long()
        )  # rows: planes u = line
        plane_position = plane.double()
        # Corners are sorted by u. A plane cuts the side low-high, and either low-middle or middle-high.
        in_lower_half = (plane_position <= middle[face, u])[:, None]
        left_end = _along(low[face], high[face], u, plane_position)
        right_end = _along(
            torch.where(in_lower_half, low[face], middle[face]),
            torch.where(in_lower_half, middle[face], high[face]),
            u,
            plane_position,
        )
        # The two ends of a segment are ordered by v.
        swap = (left_end[:, v] > right_end[:, v])[:, None]
        left_end, right_end = torch.where(swap, right_end, left_end), torch.where(swap, left_end, right_end)
        row, column = _ranges(left_end[:, v].floor().long() + 1, right_end[:, v].floor().long())
        point = _along(left_end[row], right_end[row], v, column.double())
        # Two coordinates are replaced by the exact integers, because the interpolation rounds.
        point[:, u], point[:, v] = plane_position[row], column.double()
        yield face[row] + start, point


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
        spread = (corners[facing_indices].amax(1) - corners[facing_indices].amin(1))[:, [u, v]] + 1
        group = (spread.prod(1).cumsum(0) / AT_ONCE).long()
        for group_indices in facing_indices.split(
            torch.unique_consecutive(group, return_counts=True)[1].tolist()
        ):
            group_corners = corners[group_indices]
            low, high = (
                bounds.floor().long().clamp(0, resolution - 1)
                for bounds in (group_corners.amin(1), group_corners.amax(1))
            )
            face, row = _ranges(low[:, u], high[:, u])
            span = _span(group_corners[face], u, v, row)
            column, cell = _ranges(
                span[0].floor().long().clamp(0), span[1].floor().long().clamp(max=resolution - 1)
            )
            face = face[column]
            row = row[column]
            normal = normals[group_indices[face]]
            first_corner = group_corners[face, 0]
            # Height of the triangle's plane at the centre of the column, and half of the range of heights
            # within the column.
            slopes = [normal[:, k] / normal[:, axis] for k in (u, v)]
            middle = (
                first_corner[:, axis]
                - slopes[0] * (row + 0.5 - first_corner[:, u])
                - slopes[1] * (cell + 0.5 - first_corner[:, v])
            )
            half_range = (slopes[0].abs() + slopes[1].abs()) / 2
            column_index, depth = _ranges(
                torch.maximum((middle - half_range).floor().long(), low[face, axis]),
                torch.minimum((middle + half_range).floor().long(), high[face, axis]),
            )
            voxel = torch.empty(len(column_index), 3, dtype=torch.int64)
            voxel[:, axis], voxel[:, u], voxel[:, v] = depth, row[column_index], cell[column_index]
            yield group_indices[face[column_index]], voxel


def _span(corners: torch.Tensor, u: int, v: int, row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the range of the coordinate v of triangles within a strip row <= u <= row + 1.

    Args:
        corners: coordinates [K, 3 corners, 3].
        u, v: indices of the coordinates, 0 to 2.
        row: lower bound [K] of the strip of each triangle.

    Returns: smallest and largest v, both [K]. A triangle outside its strip gives (1, -1), an empty range.
    """
    least = torch.full((len(row),), torch.inf, dtype=torch.float64)
    most = torch.full((len(row),), -torch.inf, dtype=torch.float64)
    # The extremes lie on the three sides of the triangle, cut off at the bounds of the strip.
    for i in range(3):
        a = corners[:, i]
        b = corners[:, (i + 1) % 3]
        run = b[:, u] - a[:, u]
        # A flat side is parallel to the bounds of the strip; `where` avoids the division by 0.
        flat = run == 0
        bounds = [((row + k - a[:, u]) / run.where(~flat, 1.0)) for k in (0, 1)]
        # Positions on the side, 0 at a and 1 at b, at which it enters and leaves the strip.
        near = torch.minimum(*bounds).where(~flat, 0.0).clamp(0, 1)
        far = torch.maximum(*bounds).where(~flat, 1.0).clamp(0, 1)
        # True if a part of the side lies in the strip
        inside = ((a[:, u] >= row) & (a[:, u] <= row + 1)) | (
            (torch.maximum(*bounds) >= 0) & (torch.minimum(*bounds) <= 1) & ~flat
        )
        for share in (near, far):
            value = a[:, v] + share * (b[:, v] - a[:, v])
            least = torch.minimum(least, value.where(inside, torch.inf))
            most = torch.maximum(most, value.where(inside, -torch.inf))
    empty = least > most
    return least.where(~empty, 1.0), most.where(~empty, -1.0)


def _touches(corners: torch.Tensor, normals: torch.Tensor, voxel: torch.Tensor) -> torch.Tensor:
    """Test whether triangles intersect voxels, by the separating axis theorem.

    The 13 axes are taken from Akenine-Moller (2001), "Fast 3D triangle-box overlap testing".

    Args:
        corners: coordinates [K, 3 corners, 3] of the triangles.
        normals: unit normals [K, 3] of the triangles.
        voxel: indices [K, 3] of the voxels.

    Returns: True [K] for triangles that intersect their voxel: no axis separates them.
    """
    # coordinates relative to the centre of the voxel, which then covers -0.5..0.5
    moved = corners - (voxel + 0.5)[:, None]
    # the three axes of the voxel
    is_separated = ((moved.amin(1) > 0.5) | (moved.amax(1) < -0.5)).any(1)
    # the normal of the triangle
    is_separated |= (normals * moved[:, 0]).sum(1).abs() > normals.abs().sum(1) / 2
    # the nine cross products of an axis of the voxel and a side of the triangle
    for i in range(3):
        edge = moved[:, (i + 1) % 3] - moved[:, i]
        for u, v in ((1, 2), (2, 0), (0, 1)):
            projection = moved[:, :, v] * edge[:, u, None] - moved[:, :, u] * edge[:, v, None]
            half_width = (edge[:, u].abs() + edge[:, v].abs()) / 2
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
    ends = torch.stack([faces, faces.roll(-1, 1)], 2).flatten(0, 1).sort(1).values
    _, edge_number, counts = torch.unique(ends, dim=0, return_inverse=True, return_counts=True)
    return torch.stack([corner_index, corner_index.roll(-1, 1)], 2).flatten(0, 1)[counts[edge_number] == 1]


def _passed(ends: torch.Tensor, resolution: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the voxels that edges pass through.

    An edge is cut at the planes of the grid. The middle of each piece lies in one voxel.

    Args:
        ends: coordinates [K, 2 ends, 3] of the edges.
        resolution: number R of voxels per axis.

    Returns: indices of edges [number of pieces], and voxels [number of pieces, 3].
    """
    a, b = ends.unbind(1)
    rows = [torch.arange(len(a)).repeat(2)]
    # Positions along the edges in 0..1: first both ends of each edge, then the cuts with the planes.
    shares = [torch.cat([torch.zeros(len(a)), torch.ones(len(a))]).double()]
    for axis in range(3):
        low = torch.minimum(a, b)[:, axis]
        high = torch.maximum(a, b)[:, axis]
        row, plane = _ranges(low.floor().long() + 1, high.ceil().long() - 1)
        rows.append(row)
        shares.append((plane - a[row, axis]) / (b - a)[row, axis])
    row = torch.cat(rows)
    share = torch.cat(shares)
    # Two stable sorts: by position along the edge, then by edge.
    order = share.argsort(stable=True)
    order = order[row[order].argsort(stable=True)]
    row = row[order]
    share = share[order]
    # Two neighbouring positions on the same edge are the ends of a piece.
    is_same_edge = row[1:] == row[:-1]
    row = row[:-1][is_same_edge]
    middle = ((share[1:] + share[:-1]) / 2)[is_same_edge]
    voxel = (a[row] + middle[:, None] * (b - a)[row]).floor().long()
    # Pieces outside the grid and pieces of length 0 are dropped.
    is_valid = ((voxel >= 0) & (voxel < resolution)).all(1) & (share[1:] > share[:-1])[is_same_edge]
    return row[is_valid], voxel[is_valid]


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

    def planes(self, row: torch.Tensor, normals: torch.Tensor, points: torch.Tensor) -> None:
        """Add squared distances to planes.

        A plane with the unit normal n through a point q adds n n^T to A, and n (n^T q) to b.

        Args:
            row: row [K] of the voxel of each plane.
            normals: unit normals [K, 3].
            points: points [K, 3] on the planes.
        """
        for batch in torch.arange(len(row)).split(AT_ONCE):
            n = normals[batch]
            batch_rows = row[batch]
            # n . q, with the point q relative to the voxel
            offset = (n * (points[batch] - self.coords[batch_rows])).sum(1, keepdim=True)
            self.sums.index_add_(0, batch_rows, torch.cat([n[:, UPPER[0]] * n[:, UPPER[1]], n * offset], 1))

    def lines(self, row: torch.Tensor, ends: torch.Tensor) -> None:
        """Add squared distances to lines.

        A line with the unit direction d through a point q adds M = I - d d^T to A, and M q to b, both times
        LINE.

        Args:
            row: row [K] of the voxel of each line.
            ends: two points [K, 2, 3] of each line.
        """
        direction = torch.nn.functional.normalize(ends[:, 1] - ends[:, 0], dim=1, eps=1e-300)
        # projection perpendicular to the line
        across = LINE * (torch.eye(3, dtype=torch.float64) - direction[:, :, None] * direction[:, None])
        projected = (across @ (ends[:, 0] - self.coords[row])[:, :, None])[:, :, 0]
        self.sums.index_add_(0, row, torch.cat([across[:, UPPER[0], UPPER[1]], projected], 1))

    def point(self, row: torch.Tensor, points: torch.Tensor) -> None:
        """Add crossings to the sums from which their mean is computed.

        Args:
            row: row [K] of the voxel of each crossing.
            points: crossings [K, 3].
        """
        # the fourth column counts the crossings
        self.points.index_add_(0, row, torch.nn.functional.pad(points - self.coords[row], (0, 1), value=1.0))

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
        best = torch.linalg.solve(A, b)
        # A is positive definite thanks to the last term, so the unconstrained minimum exists.
        outside = ((best < 0) | (best > 1)).any(1).nonzero()[:, 0]
        A = A[outside]
        b = b[outside]
        smallest_error = torch.full((len(A),), torch.inf, dtype=torch.float64)
        best_on_boundary = torch.zeros(len(A), 3, dtype=torch.float64)
        # A code has three digits to base 3: each coordinate is free (0), fixed at 0 (1), or fixed at 1 (2).
        # Code 0, with three free coordinates, is the unconstrained minimum.
        for code in range(1, 27):
            state = [code % 3, code // 3 % 3, code // 9]
            free = [k for k in range(3) if not state[k]]
            fixed = [k for k in range(3) if state[k]]
            point = torch.zeros(len(A), 3, dtype=torch.float64)
            point[:, fixed] = torch.tensor([float(state[k] - 1) for k in fixed], dtype=torch.float64)
            if free:
                # minimum over the free coordinates, given the fixed ones
                right_side = b[:, free] - (A[:, free][:, :, fixed] @ point[:, fixed, None])[:, :, 0]
                point[:, free] = torch.linalg.solve(A[:, free][:, :, free], right_side)
            # error of the candidate point, up to the same constant
            value = ((A @ point[:, :, None])[:, :, 0] * point).sum(1) - 2 * (b * point).sum(1)
            is_better = ((point >= 0) & (point <= 1)).all(1) & (value < smallest_error)
            smallest_error = value.where(is_better, smallest_error)
            best_on_boundary = point.where(is_better[:, None], best_on_boundary)
        best[outside] = best_on_boundary
        return best
