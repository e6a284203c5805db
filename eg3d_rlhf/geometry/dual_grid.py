"""Dual grid of a mesh: the voxels around grid lines that the surface crosses, and a vertex in each voxel.

TRELLIS.2 converts meshes, closed or open, in this way (Xiang et al. 2025, flexible dual grid). It is based on
dual contouring (Ju et al. 2002): the vertex minimises a quadratic error, so that sharp edges and corners are
preserved.

    E(p) = sum over crossings  d(p, plane of its triangle)^2 + sum over triangles in the voxel  d(p, plane)^2
         + 0.2 sum over border edges in the voxel  d(p, line)^2
         + 0.01 (number of crossings) |p - mean of the crossings|^2

Lengths are in voxels; the mesh covers 0..R along each axis.

Letters: P vertices, F triangles, R voxels per axis, X crossings, W voxels, K pieces of triangles or edges.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

# weights of the last two terms of E: border edges, and the mean of the crossings
LINE = 0.2
MEAN = 0.01
UPPER = [0, 0, 0, 1, 1, 2], [0, 1, 2, 1, 2, 2]  # rows and columns of the upper triangle of a 3 x 3 matrix
WHERE = torch.tensor([[0, 1, 2], [1, 3, 4], [2, 4, 5]])  # place of each entry of the matrix among these six
AT_ONCE = 1 << 20  # triangles, or columns of voxels around them, at a time; bounds memory


@dataclass(frozen=True)
class DualGrid:
    """Voxels around the surface, with a vertex in each."""

    coords: torch.Tensor  # [W, 3] int32, sorted
    vertices: torch.Tensor  # [W, 3] float32 in 0..1, relative to the voxel
    # [W, 3] bool: True if the surface crosses the edge of the voxel along each axis that ends at its far
    # corner
    crossed: torch.Tensor


def dual_grid(vertices: torch.Tensor, faces: torch.Tensor, resolution: int) -> DualGrid:
    """Compute the dual grid of a mesh in the cube of +-0.5, in float64 on the CPU.

    Args: vertices: [P, 3]; faces: [F, 3]; resolution: R.
    Deviates: the original minimises in float32.
    Raises: ValueError if no grid line is crossed.
    """
    corners = ((vertices.double().cpu() + 0.5) * resolution)[faces.long().cpu()]  # [F, 3 corners, 3]
    cross = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    # 1e-300: a degenerate triangle gets the normal 0
    normals = cross / cross.norm(dim=1, keepdim=True).clamp_min(1e-300)
    # code of a voxel = x R^2 + y R + z
    strides = torch.tensor([resolution**2, resolution, 1])
    # entries of each axis: axis, triangle [X], point [X, 3], codes of the four voxels around the line [X, 4]
    crossings: list[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for axis in range(3):
        others = [(axis + 1) % 3, (axis + 2) % 3]
        for face, point in _crossings(corners, axis):
            cell = point.floor().long()
            # Both other coordinates are integers. The four voxels around the line are found from the one
            # with the smallest indices, whose far corner lies on the line.
            cell[:, others] = point[:, others].round().long() - 1
            # All four voxels have to lie in the grid.
            inside = (
                (cell >= 0).all(1) & (cell[:, axis] < resolution) & (cell[:, others] < resolution - 1).all(1)
            )
            first = (cell[inside] * strides).sum(1, keepdim=True)
            u, v = strides[others].tolist()
            crossings.append((axis, face[inside], point[inside], first + torch.tensor([0, u, v, u + v])))
    # every voxel that touches a crossed grid line
    codes = torch.unique(torch.cat([about.flatten() for *_, about in crossings]))
    if not len(codes):
        raise ValueError(
            f"expected a mesh that crosses lines of a grid of {resolution} voxels, got none. Check that the"
            " mesh is not empty, and enlarge it if it is smaller than a voxel."
        )
    coords = torch.stack([codes // strides[0], codes // strides[1] % resolution, codes % resolution], 1)
    crossed = torch.zeros(len(codes), 3, dtype=torch.bool)
    error = _Quadratic(coords)
    for axis, face, point, about in crossings:
        rows = torch.searchsorted(codes, about)
        # rows[:, 0] is the voxel whose far corner lies on the line
        crossed[rows[:, 0], axis] = True
        for row in rows.unbind(1):
            error.planes(row, normals[face], corners[face, 0])
            error.point(row, point)

    def existing_rows(voxel: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rows of those voxels [K, 3] that are in the grid, and a mask [K] of these."""
        voxel_codes = (voxel * strides).sum(1)
        row = torch.searchsorted(codes, voxel_codes).clamp(max=len(codes) - 1)
        exists = codes[row] == voxel_codes
        return row[exists], exists

    # second term of E: all triangles that touch a voxel of the grid
    for face, voxel in _columns(corners, normals, resolution):
        row, exists = existing_rows(voxel)
        face = face[exists]
        voxel = voxel[exists]
        touched = _touches(corners[face], normals[face], voxel)
        error.planes(row[touched], normals[face[touched]], corners[face[touched], 0])
    # third term of E: border edges of open meshes
    ends = corners.flatten(0, 1)[_border(faces.cpu())]
    line, voxel = _passed(ends, resolution)
    row, exists = existing_rows(voxel)
    error.lines(row, ends[line[exists]])
    return DualGrid(coords.int(), error.least().float(), crossed)


def _ranges(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """List all integers low..high, both included, of every row, as (row, integer)."""
    counts = (high - low + 1).clamp_min(0)
    row = torch.repeat_interleave(torch.arange(len(low)), counts)
    # position within the row's run, plus its first integer
    return row, torch.arange(len(row)) - (counts.cumsum(0) - counts)[row] + low[row]


def _along(a: torch.Tensor, b: torch.Tensor, axis: int, value: torch.Tensor) -> torch.Tensor:
    """Compute the points of lines a b [K, 3] at which the coordinate `axis` has the value [K]."""
    share = (value - a[:, axis]) / (b[:, axis] - a[:, axis])
    return a + share[:, None] * (b - a)


def _crossings(corners: torch.Tensor, axis: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield triangles, and the points at which they meet grid lines along an axis.

    Intervals between the edges of a triangle are half open, with the upper end included, so that a line
    through an edge that two triangles share is counted once.
    """
    u = (axis + 1) % 3
    v = (axis + 2) % 3
    for start in range(0, len(corners), AT_ONCE):
        part = corners[start : start + AT_ONCE]
        # The triangle is cut by planes u = integer into segments, and these by planes v = integer into
        # points.
        order = part[:, :, u].argsort(1)
        low, middle, high = part.gather(1, order[:, :, None].expand(-1, -1, 3)).unbind(1)
        face, line = _ranges(low[:, u].floor().long() + 1, high[:, u].floor().long())  # rows: planes u = line
        plane_position = line.double()
        # the plane cuts the side between the lowest and the middle corner
        in_lower_half = (plane_position <= middle[face, u])[:, None]
        left = _along(low[face], high[face], u, plane_position)
        right = _along(
            torch.where(in_lower_half, low[face], middle[face]),
            torch.where(in_lower_half, middle[face], high[face]),
            u,
            plane_position,
        )
        swap = (left[:, v] > right[:, v])[:, None]
        left, right = torch.where(swap, right, left), torch.where(swap, left, right)
        row, column = _ranges(left[:, v].floor().long() + 1, right[:, v].floor().long())
        point = _along(left[row], right[row], v, column.double())
        # exact integers, without the rounding of the interpolation
        point[:, u], point[:, v] = plane_position[row], column.double()
        yield face[row] + start, point


def _columns(
    corners: torch.Tensor, normals: torch.Tensor, resolution: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield triangles and the voxels that they may intersect, column by column.

    Columns run along the axis that is nearest to the triangle's normal, so that a triangle passes few voxels
    of a column.
    """
    for axis in range(3):
        u = (axis + 1) % 3
        v = (axis + 2) % 3
        # degenerate triangles have the normal 0
        (facing,) = ((normals.abs().argmax(1) == axis) & (normals.norm(dim=1) > 0.5)).nonzero(as_tuple=True)
        # Number of columns in the bounding rectangle of each triangle. Groups of triangles have about AT_ONCE
        # columns.
        spread = (corners[facing].amax(1) - corners[facing].amin(1))[:, [u, v]] + 1
        group = (spread.prod(1).cumsum(0) / AT_ONCE).long()
        for chosen in facing.split(torch.unique_consecutive(group, return_counts=True)[1].tolist()):
            part = corners[chosen]
            low, high = (
                ends.floor().long().clamp(0, resolution - 1) for ends in (part.amin(1), part.amax(1))
            )
            face, row = _ranges(low[:, u], high[:, u])
            span = _span(part[face], u, v, row)
            column, cell = _ranges(
                span[0].floor().long().clamp(0), span[1].floor().long().clamp(max=resolution - 1)
            )
            face = face[column]
            row = row[column]
            normal = normals[chosen[face]]
            first = part[face, 0]
            # The plane's height over the centre of the column, and how far it rises and falls within the
            # column.
            slopes = [normal[:, k] / normal[:, axis] for k in (u, v)]
            middle = (
                first[:, axis]
                - slopes[0] * (row + 0.5 - first[:, u])
                - slopes[1] * (cell + 0.5 - first[:, v])
            )
            reach = (slopes[0].abs() + slopes[1].abs()) / 2
            deep, depth = _ranges(
                torch.maximum((middle - reach).floor().long(), low[face, axis]),
                torch.minimum((middle + reach).floor().long(), high[face, axis]),
            )
            voxel = torch.empty(len(deep), 3, dtype=torch.int64)
            voxel[:, axis], voxel[:, u], voxel[:, v] = depth, row[deep], cell[deep]
            yield chosen[face[deep]], voxel


def _span(corners: torch.Tensor, u: int, v: int, row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the smallest and the largest v of triangles [K, 3, 3] between the planes u = row and row + 1.

    A triangle that does not reach this strip gives (1, -1), an empty range.
    """
    least = torch.full((len(row),), torch.inf, dtype=torch.float64)
    most = torch.full((len(row),), -torch.inf, dtype=torch.float64)
    # the extremes lie on the three sides of the triangle, cut off at the planes
    for i in range(3):
        a = corners[:, i]
        b = corners[:, (i + 1) % 3]
        run = b[:, u] - a[:, u]
        # The side runs along the strip; `where` avoids the division by 0
        flat = run == 0
        bounds = [((row + k - a[:, u]) / run.where(~flat, 1.0)) for k in (0, 1)]
        near = torch.minimum(*bounds).where(~flat, 0.0).clamp(0, 1)
        far = torch.maximum(*bounds).where(~flat, 1.0).clamp(0, 1)
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
    """Return True [K] where triangles [K, 3, 3] intersect voxels [K, 3]: no axis separates them.

    Separating axes: Akenine-Moller (2001), fast 3D triangle-box overlap testing.
    """
    # relative to the centre of the voxel, which then covers +-0.5
    moved = corners - (voxel + 0.5)[:, None]
    # the three axes of the voxel
    apart = ((moved.amin(1) > 0.5) | (moved.amax(1) < -0.5)).any(1)
    # the normal of the triangle
    apart |= (normals * moved[:, 0]).sum(1).abs() > normals.abs().sum(1) / 2
    # the nine cross products of an axis of the voxel and a side of the triangle
    for i in range(3):
        edge = moved[:, (i + 1) % 3] - moved[:, i]
        for u, v in ((1, 2), (2, 0), (0, 1)):
            along = moved[:, :, v] * edge[:, u, None] - moved[:, :, u] * edge[:, v, None]
            half = (edge[:, u].abs() + edge[:, v].abs()) / 2
            apart |= (along.amin(1) > half) | (along.amax(1) < -half)
    return ~apart


def _border(faces: torch.Tensor) -> torch.Tensor:
    """Find edges that belong to only one triangle, [K, 2], as positions among all triangles' corners."""
    corner_index = torch.arange(faces.numel()).view(-1, 3)
    ends = torch.stack([faces, faces.roll(-1, 1)], 2).flatten(0, 1).sort(1).values
    _, edge_number, counts = torch.unique(ends, dim=0, return_inverse=True, return_counts=True)
    return torch.stack([corner_index, corner_index.roll(-1, 1)], 2).flatten(0, 1)[counts[edge_number] == 1]


def _passed(ends: torch.Tensor, resolution: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the voxels that edges [K, 2, 3] pass, as (edge, voxel).

    An edge is cut at the planes of the grid; the middle of each piece gives the voxel.
    """
    a, b = ends.unbind(1)
    rows = [torch.arange(len(a)).repeat(2)]
    # both ends, and below the cuts: positions along the edge in 0..1
    shares = [torch.cat([torch.zeros(len(a)), torch.ones(len(a))]).double()]
    for axis in range(3):
        low = torch.minimum(a, b)[:, axis]
        high = torch.maximum(a, b)[:, axis]
        row, plane = _ranges(low.floor().long() + 1, high.ceil().long() - 1)
        rows.append(row)
        shares.append((plane - a[row, axis]) / (b - a)[row, axis])
    row = torch.cat(rows)
    share = torch.cat(shares)
    # Stable sorts: first by position, then by edge.
    order = share.argsort(stable=True)
    order = order[row[order].argsort(stable=True)]
    row = row[order]
    share = share[order]
    # neighbours of the same edge bound a piece
    same = row[1:] == row[:-1]
    row = row[:-1][same]
    middle = ((share[1:] + share[:-1]) / 2)[same]
    voxel = (a[row] + middle[:, None] * (b - a)[row]).floor().long()
    # pieces of zero length are dropped
    within = ((voxel >= 0) & (voxel < resolution)).all(1) & (share[1:] > share[:-1])[same]
    return row[within], voxel[within]


class _Quadratic:
    """Sum of quadratic errors p^T A p - 2 b^T p of each voxel, for places p in 0..1 relative to the voxel."""

    def __init__(self, coords: torch.Tensor):
        self.coords = coords.double()
        self.sums = torch.zeros(len(coords), 9, dtype=torch.float64)  # upper triangle of A (6), b (3)
        # sum of the crossings (3), their number (1)
        self.points = torch.zeros(len(coords), 4, dtype=torch.float64)

    def planes(self, row: torch.Tensor, normals: torch.Tensor, points: torch.Tensor) -> None:
        """Add the squared distances to planes through `points` with unit `normals`: A = n n^T, b = n (n .
        q).
        """
        for part in torch.arange(len(row)).split(AT_ONCE):
            n = normals[part]
            part_rows = row[part]
            offset = (n * (points[part] - self.coords[part_rows])).sum(1, keepdim=True)
            self.sums.index_add_(0, part_rows, torch.cat([n[:, UPPER[0]] * n[:, UPPER[1]], n * offset], 1))

    def lines(self, row: torch.Tensor, ends: torch.Tensor) -> None:
        """Add the squared distances to lines: A = I - d d^T with the direction d, b = A q."""
        direction = torch.nn.functional.normalize(ends[:, 1] - ends[:, 0], dim=1, eps=1e-300)
        across = LINE * (torch.eye(3, dtype=torch.float64) - direction[:, :, None] * direction[:, None])
        projected = (across @ (ends[:, 0] - self.coords[row])[:, :, None])[:, :, 0]
        self.sums.index_add_(0, row, torch.cat([across[:, UPPER[0], UPPER[1]], projected], 1))

    def point(self, row: torch.Tensor, points: torch.Tensor) -> None:
        """Add crossings to their mean."""
        self.points.index_add_(0, row, torch.nn.functional.pad(points - self.coords[row], (0, 1), value=1.0))

    def least(self) -> torch.Tensor:
        """Minimise in every voxel: [W, 3] in 0..1.

        If the minimum lies outside of the voxel, the smallest value on its faces, edges and corners is taken.
        """
        A = self.sums[:, WHERE].clone() + MEAN * self.points[:, 3, None, None] * torch.eye(
            3, dtype=torch.float64
        )
        b = self.sums[:, 6:] + MEAN * self.points[:, :3]  # the number times the mean
        best = torch.linalg.solve(A, b)
        # A is positive definite thanks to the last term, so the unconstrained minimum exists.
        outside = ((best < 0) | (best > 1)).any(1).nonzero()[:, 0]
        A = A[outside]
        b = b[outside]
        lowest = torch.full((len(A),), torch.inf, dtype=torch.float64)
        chosen = torch.zeros(len(A), 3, dtype=torch.float64)
        # three digits to base 3: each coordinate is free (0), fixed at 0 (1) or fixed at 1 (2)
        for number in range(1, 27):
            state = [number % 3, number // 3 % 3, number // 9]
            free = [k for k in range(3) if not state[k]]
            fixed = [k for k in range(3) if state[k]]
            point = torch.zeros(len(A), 3, dtype=torch.float64)
            point[:, fixed] = torch.tensor([float(state[k] - 1) for k in fixed], dtype=torch.float64)
            if free:
                # minimum over the free coordinates, given the fixed ones
                right_side = b[:, free] - (A[:, free][:, :, fixed] @ point[:, fixed, None])[:, :, 0]
                point[:, free] = torch.linalg.solve(A[:, free][:, :, free], right_side)
            value = ((A @ point[:, :, None])[:, :, 0] * point).sum(1) - 2 * (b * point).sum(1)
            better = ((point >= 0) & (point <= 1)).all(1) & (value < lowest)
            lowest = value.where(better, lowest)
            chosen = point.where(better[:, None], chosen)
        best[outside] = chosen
        return best
