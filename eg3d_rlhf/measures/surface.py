"""Measure surfaces: curvature and topology of a mesh, and displacement between shapes.

Topology is computed corner by corner. Corners of two faces are the same point only if an edge joins them, so
surfaces that merely touch at a vertex count as separate. Half-edges that more than two faces share, or that
have no partner in the opposite direction, count as open.
Letters: V vertices, F faces, C = 3F corners of faces (corner 3f + i belongs to face f), S surfaces; N shapes,
P points, and in `displacement` S samples along a line, D, H, W grid points along z, y, x.
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
from eg3d_rlhf.geometry.level_set import LevelSet, between
from eg3d_rlhf.geometry.mesh import face_volumes

_SLIVER = 1e-12  # squared double area over the squared square of the longest edge; below it a normal is noise


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Counts of connected surfaces, handles and rims over the complete mesh."""

    parts: int  # connected surfaces that enclose material (a positive volume), and open ones
    cavities: int  # connected closed surfaces of negative volume: hollows inside a body
    handles: int  # genus, summed over all surfaces: holes that pass through the body, as in a torus
    rims: int  # closed loops of open edges: holes in the surface itself
    euler: int  # vertices - edges + faces, where points that only touch are counted separately
    open_edges: int  # half-edges without a partner
    main_share: float  # volume of the largest part over that of all parts, 0..1; 1 if there is no volume

    @property
    def watertight(self) -> bool:
        """True if every edge joins exactly two faces that run through it in opposite directions."""
        return self.open_edges == 0

    @property
    def holes(self) -> int:
        """Number of handles and rims, which a simple closed surface does not have."""
        return self.handles + self.rims


def topology(vertices: np.ndarray, faces: np.ndarray) -> Topology:
    """Count parts, cavities, handles and rims of a mesh with vertices [V, 3] and faces [F, 3].

    Faces are wound counter-clockwise as seen from outside. For each connected surface, Euler's formula gives
    vertices - edges + faces = 2 - 2 genus - rims.
    """
    vertices, faces = _checked(vertices, faces)
    partner = _partners(faces)  # [C] half-edge, -1 where open
    paired_corners = np.flatnonzero(partner >= 0)
    # A partner runs in the opposite direction: it starts where the half-edge of the corner ends.
    partner_corners = partner[paired_corners]
    # Number the points [C]. Corners that an edge joins are one point, also if the mesh has copies of a
    # vertex.
    point, points = connected(
        [(paired_corners, _next(partner_corners)), (_next(paired_corners), partner_corners)], len(partner)
    )
    surface, surfaces = _surfaces(partner)
    first = surface[0::3]  # [F] surface of each face
    opened = partner < 0
    paired = partner >= 0
    point_surface = np.zeros(points, dtype=np.int64)
    point_surface[point] = surface
    count = np.bincount(point_surface, minlength=surfaces)  # vertices of each surface
    # A paired half-edge is half of an edge, an open one is an edge of its own.
    edges = np.bincount(surface, weights=np.where(paired, 0.5, 1.0), minlength=surfaces)
    euler = np.rint(count - edges + np.bincount(first, minlength=surfaces)).astype(np.int64)  # [S]
    rims = _rims(point, opened, points, point_surface, surfaces)
    genus = (2 - euler - rims) // 2
    volume = np.bincount(first, weights=face_volumes(vertices, faces), minlength=surfaces)
    # A closed surface with negative volume is wound inwards, so it bounds a hollow.
    closed = np.bincount(surface, weights=opened, minlength=surfaces) == 0
    cavity = closed & (volume < 0)
    bodies = np.abs(volume[~cavity])
    share = float(bodies.max() / bodies.sum()) if bodies.size and bodies.sum() > 0 else 1.0
    return Topology(
        parts=int((~cavity).sum()),
        cavities=int(cavity.sum()),
        handles=int(genus.sum()),
        rims=int(rims.sum()),
        euler=int(euler.sum()),
        open_edges=int(opened.sum()),
        main_share=share,
    )


def main_surface(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Return the faces [F', 3] of the connected surface with the largest volume.

    If no surface encloses a volume, return those of the surface with the most faces.
    """
    vertices, faces = _checked(vertices, faces)
    surface, surfaces = _surfaces(_partners(faces))
    volume = np.bincount(surface[0::3], weights=face_volumes(vertices, faces), minlength=surfaces)
    size = volume if volume.max() > 0 else np.bincount(surface[0::3], minlength=surfaces)
    return faces[surface[0::3] == size.argmax()]


def mean_curvature(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute the mean curvature H [V] in 1/world unit, and the area [V] that belongs to each vertex.

    Meyer et al. 2003, eq. 8: 2 H n = 1/(2A) sum over neighbours of (cot alpha + cot beta)(x_i - x_j). alpha
    and beta are the angles opposite the edge, and A is the mixed Voronoi area (fig. 4). H > 0 where the
    surface bends away from its outside; it is 1/r on a sphere. H is NaN and the area 0 at vertices on a rim
    and at vertices that no face uses. Not differentiable.
    Deviates: faces without area are left out, and the sign is that of the area-weighted vertex normal.
    """
    vertices, faces = _checked(vertices, faces)
    corners = vertices[faces]  # [F, 3, 3]
    sides = np.roll(corners, -1, axis=1) - corners  # side i runs from corner i to corner i + 1
    squared = (sides**2).sum(axis=2)  # [F, 3]
    normal = np.cross(sides[:, 0], sides[:, 1])  # [F, 3], length = twice the area
    double = np.linalg.norm(normal, axis=1)
    # Cotangents divide by the area, so faces that are nearly degenerate would dominate the sums.
    used = double**2 > _SLIVER * squared.max(axis=1) ** 2
    faces_used = faces[used]
    sides = sides[used]
    squared = squared[used]
    normal = normal[used]
    double = double[used]
    # Cotangent [F, 3] of the angle at corner i, between sides i - 1 and i: dot product over cross product
    cot = -(np.roll(sides, 1, axis=1) * sides).sum(axis=2) / double[:, None]
    obtuse = (cot < 0).any(axis=1)
    laplace = np.zeros_like(vertices)
    area = np.zeros(len(vertices))
    for i in range(3):  # side i lies opposite corner i + 2
        a = faces_used[:, i]
        b = faces_used[:, (i + 1) % 3]
        pull = cot[:, (i + 2) % 3, None] * sides[:, i]
        _add(laplace, a, -pull)
        _add(laplace, b, pull)
        before = (i + 2) % 3  # side i joins corners i and i + 1, side i + 2 joins i + 2 and i
        voronoi = (squared[:, before] * cot[:, (i + 1) % 3] + squared[:, i] * cot[:, before]) / 8
        # Where the face is obtuse, the circumcentre lies outside, and the vertex gets half or a quarter of
        # the area
        mixed = np.where(obtuse, np.where(cot[:, i] < 0, double / 4, double / 8), voronoi)
        area += np.bincount(a, weights=mixed, minlength=len(vertices))
    direction = np.zeros_like(vertices)
    for i in range(3):
        _add(direction, faces_used[:, i], normal)
    # The formula needs a closed ring of neighbours, which vertices on a rim do not have.
    rim = np.zeros(len(vertices), dtype=bool)
    opened = np.flatnonzero(_partners(faces) < 0)
    rim[faces.reshape(-1)[opened]] = rim[faces[:, [1, 2, 0]].reshape(-1)[opened]] = True
    known = (area > 0) & ~rim
    length = np.linalg.norm(laplace, axis=1) * np.where((laplace * direction).sum(axis=1) < 0, -1.0, 1.0)
    return np.where(known, length / (4 * np.where(known, area, 1.0)), np.nan), np.where(known, area, 0.0)


def _add(total: np.ndarray, rows: np.ndarray, values: np.ndarray) -> None:
    """Add values [n, 3] to the given rows of total [V, 3], in place; rows may repeat."""
    # bincount sums repeated rows, which total[rows] += values would not.
    for axis in range(3):
        total[:, axis] += np.bincount(rows, weights=values[:, axis], minlength=len(total))


def _checked(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Convert to float64 and int64, and assert that the mesh is finite and no face uses a vertex twice."""
    vertices = np.asarray(vertices, dtype=np.float64)
    faces = np.asarray(faces).astype(np.int64)
    assert len(faces) and np.isfinite(vertices).all() and not (faces == np.roll(faces, 1, axis=1)).any()
    return vertices, faces


def _partners(faces: np.ndarray) -> np.ndarray:
    """Return the only opposite half-edge of each half-edge [C], or -1.

    Half-edge 3f + i runs from corner i of face f to that face's next corner.
    """
    start = faces.reshape(-1)
    end = faces[:, [1, 2, 0]].reshape(-1)
    # One integer per undirected edge; the product cannot overflow int64 with fewer than 3e9 vertices.
    key = np.minimum(start, end) * (int(faces.max()) + 1) + np.maximum(start, end)
    order = np.argsort(key, kind="stable")  # half-edges of one edge become neighbours
    new = np.flatnonzero(np.diff(key[order], prepend=-1))  # first half-edge of each edge
    at = new[np.diff(np.append(new, len(key))) == 2]
    a = order[at]
    b = order[at + 1]
    # Two faces that run through the edge in the same direction do not bound one body: their edge stays open.
    opposed = start[a] == end[b]
    partner = np.full(len(key), -1)
    partner[a[opposed]], partner[b[opposed]] = b[opposed], a[opposed]
    return partner


def _next(corner: np.ndarray) -> np.ndarray:
    """Return the next corner in the same face for each corner."""
    return np.where(corner % 3 == 2, corner - 2, corner + 1)


def connected(pairs: list[tuple[np.ndarray, np.ndarray]], count: int) -> tuple[np.ndarray, int]:
    """Number the groups of 0..count-1 that the pairs link; returns the group [count] and the number of
    groups.
    """
    rows, columns = (np.concatenate([pair[i] for pair in pairs]) for i in range(2))
    graph = coo_array((np.ones(len(rows), dtype=np.int8), (rows, columns)), shape=(count, count))
    number, labels = connected_components(graph, directed=False)
    return labels.astype(np.int64), int(number)


def _surfaces(partner: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the connected surface [C] of each corner, and the number of surfaces."""
    here = np.flatnonzero(partner >= 0)
    corner = np.arange(len(partner))
    return connected([(here, partner[here]), (corner, _next(corner))], len(partner))


def _rims(
    point: np.ndarray, opened: np.ndarray, points: int, surface: np.ndarray, surfaces: int
) -> np.ndarray:
    """Count the loops of open half-edges on each surface, [S].

    Each point of a rim has one edge that arrives and one that leaves, so each loop is a connected group.
    """
    edge = np.flatnonzero(opened)
    if len(edge) == 0:
        return np.zeros(surfaces, dtype=np.int64)
    label, number = connected([(point[edge], point[_next(edge)])], points)
    on_rim = np.zeros(points, dtype=bool)
    on_rim[point[edge]] = True
    # A loop belongs to the surface of any of its points.
    loops, first = np.unique(label[on_rim], return_index=True)
    return np.bincount(surface[np.flatnonzero(on_rim)[first]], minlength=surfaces)


# Displacement of a surface: signed distances along its normals between two shapes of one latent, and their
# size over many latents.


VOXELS = 64  # points per edge of the cube whose voxel is the unit of length
REACH = 4.0  # voxels; the other surface is searched up to this distance
_CHUNK = 1 << 14  # points that are evaluated at once
_POINTS = 1500  # points per surface and latent


def voxel(spec: SlabSpec) -> float:
    """Return the edge of a voxel in world units: the cube of the grid with VOXELS points per edge."""
    return spec.box_warp / (VOXELS - 1)


@torch.no_grad()
def displacement(before: LevelSet, points: Tensor, normals: Tensor, reach: float = REACH) -> Tensor:
    """Compute how far the surface has moved to points [P, 3] along their outward normals.

    Returns [P] in voxels of 64^3, positive where the shape has grown. The line p + s n is intersected with
    the surface `before`, where that shape ends, and the intersection with the smallest |s| <= reach counts;
    the displacement is -s. Without an intersection it is +reach for a point that was outside before, and
    -reach for one inside.
    """
    unit = voxel(before.spec)
    half = max(2, round(reach * unit / before.spec.voxel))  # one sample per voxel of the grid
    s = torch.linspace(-reach * unit, reach * unit, 2 * half + 1).to(points)
    moved = torch.empty(len(points)).to(points)
    for part in torch.arange(len(points), device=points.device).split(_CHUNK):
        p = points[part]
        n = normals[part]
        inside = before.inside(p[:, None] + s[:, None] * n[:, None])  # [P, S], >= 0 inside
        # Only changes from inside to outside along the outward normal are the shape's end.
        ends = (inside[:, :-1] >= 0) & (inside[:, 1:] < 0)
        # An infinite distance marks the intervals without a crossing.
        at = between(s[:-1], s[1:], inside[:, :-1], inside[:, 1:]).where(ends, torch.inf)
        nearest = at.gather(1, at.abs().argmin(dim=1, keepdim=True))[:, 0]
        none = nearest.isinf()
        # The grid is only interpolated; `place` moves the crossing onto the field's own level set.
        placed = before.place(p, n, nearest.masked_fill(none, 0.0))
        moved[part] = torch.where(
            none, torch.where(before.exactly_inside(p) >= 0, -reach, reach), -placed / unit
        )
    return moved


def _axis_crossings(sigma: Tensor, axis: int, from_high: bool, spec: SlabSpec, level: float) -> Tensor:
    """Locate the first crossings of a level in one cube [D, H, W] along an axis (0 = z, 1 = y, 2 = x).

    Returns world points [P, 3] as (x, y, z).
    """
    volume = sigma.movedim(axis, 0)
    coordinates = [spec.axes()[2 - i].to(sigma) for i in range(3)]  # z, y, x
    along = coordinates[axis]
    rest = [c for i, c in enumerate(coordinates) if i != axis]
    if from_high:
        volume = volume.flip(0)
        along = along.flip(0)
    inside = volume >= level
    hit = inside.any(dim=0)
    index = inside.to(torch.uint8).argmax(dim=0)
    before = (index - 1).clamp_min(0)
    value = volume.gather(0, index[None])[0]
    previous = volume.gather(0, before[None])[0]
    # Linear interpolation between the last sample outside and the first one inside; 1 if the ray starts
    # inside.
    step = torch.where(index > 0, ((level - previous) / (value - previous).clamp_min(1e-9)).clamp(0, 1), 1.0)
    position = along[before] + step * (along[index] - along[before])
    first, second = torch.meshgrid(*rest, indexing="ij")
    columns = [first[hit], second[hit]]
    columns.insert(axis, position[hit])  # z, y, x; reversed below
    return torch.stack(columns[::-1], dim=-1)


def surface_points(sigma: Tensor, spec: SlabSpec, back: float = -0.05, level: float = LEVEL) -> Tensor:
    """Locate the surface of a raw density cube [D, H, W] as seen from the front and both sides.

    Returns world points [P, 3]. Points with z < `back` are left out. P varies with the shape, and is 0 for a
    cube without a surface.
    """
    # Not finite densities count as empty or solid, as their sign says.
    sigma = sigma.nan_to_num(nan=-1e4, posinf=1e4, neginf=-1e4)
    views = [
        _axis_crossings(sigma, axis, high, spec, level) for axis, high in ((0, True), (2, True), (2, False))
    ]
    points = torch.cat(views)
    return points[points[:, 2] >= back]


def resample(points: Tensor, count: int, seed: int) -> Tensor:
    """Choose `count` of the points [P, 3] at random with replacement."""
    # The generator lives on the CPU, so that every device chooses the same points.
    generator = torch.Generator().manual_seed(seed)
    return points[torch.randint(len(points), (count,), generator=generator).to(points.device)]


def in_head(points: Tensor, spec: SlabSpec) -> Tensor:
    """Return which points [P, 3] lie in the box of the published slab, as [P] bool."""
    box = SlabSpec(crop=SlabSpec().crop, box_warp=spec.box_warp, centre=spec.centre).axes()
    low, high = (points.new_tensor([float(axis[i]) for axis in box]) for i in (0, -1))
    return ((points >= low) & (points <= high)).all(dim=-1)


@torch.no_grad()
def median_change(before: LevelSet, after: LevelSet) -> float:
    """Compute the median |displacement| in voxels over points of both surfaces.

    The points lie on the head and are visible from the front or the sides. Returns NaN if there are none.
    """
    moved = []
    # Both directions: points of the new surface alone would miss what has disappeared.
    for surface, other in ((after, before), (before, after)):
        points = surface_points(surface.cube.float(), surface.spec, -surface.spec.box_warp, surface.level)
        points = points[in_head(points, surface.spec)]
        if len(points):
            points = resample(points, _POINTS, 0)
            normals = surface.normals(points)
            # Interpolated points are first moved onto the level set itself, so that equal shapes give 0.
            points = (
                points
                + surface.place(points, normals, torch.zeros(len(points)).to(points))[:, None] * normals
            )
            moved.append(displacement(other, points, normals).abs())
    return float(torch.cat(moved).median()) if moved else float("nan")


def change_summary(medians: Iterable[float]) -> dict:
    """Summarise latents that have a surface by median and quartiles, as JSON values."""
    values = np.array([value for value in medians if np.isfinite(value)])
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist() if len(values) else (None, None, None)
    return {"median": middle, "quartiles": [low, high], "n": len(values)}
