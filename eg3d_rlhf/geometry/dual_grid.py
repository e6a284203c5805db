"""The dual grid of a mesh: which voxels lie about a grid line that its surface crosses, which edges these
are, and a vertex in each voxel.

It is how TRELLIS.2 reads a mesh, open or not (Xiang et al. 2025, flexible dual grid), after dual contouring
(Ju et al. 2002): the vertex minimises a quadratic error, so that sharp edges and corners stay.

    E(p) = sum over crossings  d(p, plane of its triangle)^2 + sum over triangles in the voxel  d(p, plane)^2
         + 0.2 sum over border edges in the voxel  d(p, line)^2
         + 0.01 (number of crossings) |p - mean of the crossings|^2

Shape letters: P vertices, F triangles, R voxels per axis, X crossings, W voxels, K pieces of triangles or
edges.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

# weights of border edges, and of the mean of the crossings
LINE = 0.2
MEAN = 0.01
UPPER = [0, 0, 0, 1, 1, 2], [0, 1, 2, 1, 2, 2]
WHERE = torch.tensor([[0, 1, 2], [1, 3, 4], [2, 4, 5]])  # of A among the six
AT_ONCE = 1 << 20  # triangles, or columns of voxels about them, at a time: bounds memory


@dataclass(frozen=True)
class DualGrid:
    """Voxels that the surface passes."""

    coords: torch.Tensor  # [W, 3] int32, sorted
    vertices: torch.Tensor  # [W, 3] float32 of 0..1, in their voxels
    # [W, 3] bool: whether the surface crosses the voxel's edge along each axis at its far corner
    crossed: torch.Tensor


def dual_grid(vertices: torch.Tensor, faces: torch.Tensor, resolution: int) -> DualGrid:
    """Of a mesh in the cube of +-0.5, vertices [P, 3] and faces [F, 3]; in float64 on the CPU.

    Deviates: the original minimises in float32.
    Raises: ValueError where no grid line is crossed.
    """
    corners = ((vertices.double().cpu() + 0.5) * resolution)[faces.long().cpu()]  # [F, 3 corners, 3]
    cross = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normals = cross / cross.norm(dim=1, keepdim=True).clamp_min(1e-300)
    strides = torch.tensor([resolution**2, resolution, 1])
    # crossings: axis, triangle, point, codes of four voxels [X, 4]
    met: list[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for axis in range(3):
        others = [(axis + 1) % 3, (axis + 2) % 3]
        for face, point in _crossings(corners, axis):
            cell = point.floor().long()
            # the voxel of the smallest indices, at whose far corner it is
            cell[:, others] = point[:, others].round().long() - 1
            inside = (
                (cell >= 0).all(1) & (cell[:, axis] < resolution) & (cell[:, others] < resolution - 1).all(1)
            )
            first = (cell[inside] * strides).sum(1, keepdim=True)
            u, v = strides[others].tolist()
            met.append((axis, face[inside], point[inside], first + torch.tensor([0, u, v, u + v])))
    codes = torch.unique(torch.cat([about.flatten() for *_, about in met]))
    if not len(codes):
        raise ValueError(
            f"expected a mesh that crosses lines of a grid of {resolution} voxels, got none. Is it empty, or"
            " very small?"
        )
    coords = torch.stack([codes // strides[0], codes // strides[1] % resolution, codes % resolution], 1)
    crossed = torch.zeros(len(codes), 3, dtype=torch.bool)
    error = _Quadratic(coords)
    for axis, face, point, about in met:
        rows = torch.searchsorted(codes, about)
        crossed[rows[:, 0], axis] = True
        for row in rows.unbind(1):
            error.planes(row, normals[face], corners[face, 0])
            error.point(row, point)

    def known(voxel: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of those that exist, and which these are."""
        wanted = (voxel * strides).sum(1)
        row = torch.searchsorted(codes, wanted).clamp(max=len(codes) - 1)
        there = codes[row] == wanted
        return row[there], there

    for face, voxel in _columns(corners, normals, resolution):
        row, there = known(voxel)
        face = face[there]
        voxel = voxel[there]
        touched = _touches(corners[face], normals[face], voxel)
        error.planes(row[touched], normals[face[touched]], corners[face[touched], 0])
    ends = corners.flatten(0, 1)[_border(faces.cpu())]
    line, voxel = _passed(ends, resolution)
    row, there = known(voxel)
    error.lines(row, ends[line[there]])
    return DualGrid(coords.int(), error.least().float(), crossed)


def _ranges(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """All integers low..high, both included, of every row, as (row, integer)."""
    counts = (high - low + 1).clamp_min(0)
    row = torch.repeat_interleave(torch.arange(len(low)), counts)
    return row, torch.arange(len(row)) - (counts.cumsum(0) - counts)[row] + low[row]


def _along(a: torch.Tensor, b: torch.Tensor, axis: int, value: torch.Tensor) -> torch.Tensor:
    """Points of the lines a b [K, 3] at which the coordinate `axis` has a value [K]."""
    share = (value - a[:, axis]) / (b[:, axis] - a[:, axis])
    return a + share[:, None] * (b - a)


def _crossings(corners: torch.Tensor, axis: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Triangles and points at which they meet grid lines along an axis; border lines are half open, the upper
    end included.
    """
    u = (axis + 1) % 3
    v = (axis + 2) % 3
    for start in range(0, len(corners), AT_ONCE):
        part = corners[start : start + AT_ONCE]
        order = part[:, :, u].argsort(1)
        low, middle, high = part.gather(1, order[:, :, None].expand(-1, -1, 3)).unbind(1)
        face, line = _ranges(low[:, u].floor().long() + 1, high[:, u].floor().long())  # rows: planes u = line
        at = line.double()
        early = (at <= middle[face, u])[:, None]
        left = _along(low[face], high[face], u, at)
        right = _along(
            torch.where(early, low[face], middle[face]), torch.where(early, middle[face], high[face]), u, at
        )
        swap = (left[:, v] > right[:, v])[:, None]
        left, right = torch.where(swap, right, left), torch.where(swap, left, right)
        row, column = _ranges(left[:, v].floor().long() + 1, right[:, v].floor().long())
        point = _along(left[row], right[row], v, column.double())
        point[:, u], point[:, v] = at[row], column.double()
        yield face[row] + start, point


def _columns(
    corners: torch.Tensor, normals: torch.Tensor, resolution: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Triangles and voxels that they may have a point in common with, by columns along the axis that the
    triangle faces.
    """
    for axis in range(3):
        u = (axis + 1) % 3
        v = (axis + 2) % 3
        (facing,) = ((normals.abs().argmax(1) == axis) & (normals.norm(dim=1) > 0.5)).nonzero(as_tuple=True)
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
    """Least and largest v of triangles [K, 3, 3] between the planes u = row and row + 1."""
    least = torch.full((len(row),), torch.inf, dtype=torch.float64)
    most = torch.full((len(row),), -torch.inf, dtype=torch.float64)
    for i in range(3):
        a = corners[:, i]
        b = corners[:, (i + 1) % 3]
        run = b[:, u] - a[:, u]
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
    """Whether triangles [K, 3, 3] have a point in common with voxels [K, 3]: no axis separates them
    (Akenine-Moller 2001).
    """
    moved = corners - (voxel + 0.5)[:, None]
    apart = ((moved.amin(1) > 0.5) | (moved.amax(1) < -0.5)).any(1)
    apart |= (normals * moved[:, 0]).sum(1).abs() > normals.abs().sum(1) / 2
    for i in range(3):
        edge = moved[:, (i + 1) % 3] - moved[:, i]
        for u, v in ((1, 2), (2, 0), (0, 1)):  # across the edge and an axis
            along = moved[:, :, v] * edge[:, u, None] - moved[:, :, u] * edge[:, v, None]
            half = (edge[:, u].abs() + edge[:, v].abs()) / 2
            apart |= (along.amin(1) > half) | (along.amax(1) < -half)
    return ~apart


def _border(faces: torch.Tensor) -> torch.Tensor:
    """Edges of one triangle alone, [K, 2], as places among all triangles' corners."""
    place = torch.arange(faces.numel()).view(-1, 3)
    ends = torch.stack([faces, faces.roll(-1, 1)], 2).flatten(0, 1).sort(1).values
    _, known, counts = torch.unique(ends, dim=0, return_inverse=True, return_counts=True)
    return torch.stack([place, place.roll(-1, 1)], 2).flatten(0, 1)[counts[known] == 1]


def _passed(ends: torch.Tensor, resolution: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which edges [K, 2, 3] pass which voxels: between their cuts by the planes of the grid."""
    a, b = ends.unbind(1)
    rows = [torch.arange(len(a)).repeat(2)]
    shares = [torch.cat([torch.zeros(len(a)), torch.ones(len(a))]).double()]
    for axis in range(3):
        low = torch.minimum(a, b)[:, axis]
        high = torch.maximum(a, b)[:, axis]
        row, plane = _ranges(low.floor().long() + 1, high.ceil().long() - 1)
        rows.append(row)
        shares.append((plane - a[row, axis]) / (b - a)[row, axis])
    row = torch.cat(rows)
    share = torch.cat(shares)
    order = share.argsort(stable=True)
    order = order[row[order].argsort(stable=True)]
    row = row[order]
    share = share[order]
    same = row[1:] == row[:-1]
    row = row[:-1][same]
    middle = ((share[1:] + share[:-1]) / 2)[same]
    voxel = (a[row] + middle[:, None] * (b - a)[row]).floor().long()
    within = ((voxel >= 0) & (voxel < resolution)).all(1) & (share[1:] > share[:-1])[same]
    return row[within], voxel[within]


class _Quadratic:
    """p^T A p - 2 b^T p per voxel, of places in it."""

    def __init__(self, coords: torch.Tensor):
        self.coords = coords.double()
        self.sums = torch.zeros(len(coords), 9, dtype=torch.float64)  # six of A, three of b
        # sum of the crossings, and their number
        self.points = torch.zeros(len(coords), 4, dtype=torch.float64)

    def planes(self, row: torch.Tensor, normals: torch.Tensor, points: torch.Tensor) -> None:
        for part in torch.arange(len(row)).split(AT_ONCE):
            n = normals[part]
            at = row[part]
            offset = (n * (points[part] - self.coords[at])).sum(1, keepdim=True)
            self.sums.index_add_(0, at, torch.cat([n[:, UPPER[0]] * n[:, UPPER[1]], n * offset], 1))

    def lines(self, row: torch.Tensor, ends: torch.Tensor) -> None:
        way = torch.nn.functional.normalize(ends[:, 1] - ends[:, 0], dim=1, eps=1e-300)
        across = LINE * (torch.eye(3, dtype=torch.float64) - way[:, :, None] * way[:, None])
        turned = (across @ (ends[:, 0] - self.coords[row])[:, :, None])[:, :, 0]
        self.sums.index_add_(0, row, torch.cat([across[:, UPPER[0], UPPER[1]], turned], 1))

    def point(self, row: torch.Tensor, points: torch.Tensor) -> None:
        self.points.index_add_(0, row, torch.nn.functional.pad(points - self.coords[row], (0, 1), value=1.0))

    def least(self) -> torch.Tensor:
        """[W, 3] of 0..1: where it is least in the voxel; outside, the least on faces, edges and corners."""
        A = self.sums[:, WHERE].clone() + MEAN * self.points[:, 3, None, None] * torch.eye(
            3, dtype=torch.float64
        )
        b = self.sums[:, 6:] + MEAN * self.points[:, :3]  # the number times the mean
        best = torch.linalg.solve(A, b)
        outside = ((best < 0) | (best > 1)).any(1).nonzero()[:, 0]
        A = A[outside]
        b = b[outside]
        lowest = torch.full((len(A),), torch.inf, dtype=torch.float64)
        chosen = torch.zeros(len(A), 3, dtype=torch.float64)
        for number in range(1, 27):  # base 3: each coordinate free, at 0 or at 1
            state = [number % 3, number // 3 % 3, number // 9]
            free = [k for k in range(3) if not state[k]]
            fixed = [k for k in range(3) if state[k]]
            point = torch.zeros(len(A), 3, dtype=torch.float64)
            point[:, fixed] = torch.tensor([float(state[k] - 1) for k in fixed], dtype=torch.float64)
            if free:
                rest = b[:, free] - (A[:, free][:, :, fixed] @ point[:, fixed, None])[:, :, 0]
                point[:, free] = torch.linalg.solve(A[:, free][:, :, free], rest)
            value = ((A @ point[:, :, None])[:, :, 0] * point).sum(1) - 2 * (b * point).sum(1)
            better = ((point >= 0) & (point <= 1)).all(1) & (value < lowest)
            lowest = value.where(better, lowest)
            chosen = point.where(better[:, None], chosen)
        best[outside] = chosen
        return best
