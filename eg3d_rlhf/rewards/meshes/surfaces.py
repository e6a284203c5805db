"""Extract surfaces of a level on a lattice: by marching tetrahedra, and as nets with one vertex per cell.

The lattice is a cube whose cells are cut into 6 tetrahedra around the main diagonal, at any resolution. It is
computed when needed and not stored in files.

Letters: R cells per edge, V = (R + 1)^3 vertices of the lattice, T tetrahedra, E edges; N vertices of a mesh,
M faces; of a net N crossings, N' vertices, M = 2 N faces.
"""

import functools
import itertools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from eg3d_rlhf.core.field import Bounds, Field, ProductField
from eg3d_rlhf.core.interfaces import Mesh

# edges of a tetrahedron, in the order of `Lattice.edges_of`
EDGES = tuple(itertools.combinations(range(4), 2))


@dataclass(frozen=True, eq=False)
class Lattice:
    """Tetrahedra and their edges. Tetrahedra are positively oriented: det(b - a, c - a, d - a) > 0."""

    vertices: torch.Tensor  # [V, 3] world units
    tetrahedra: torch.Tensor  # [T, 4] int64
    edges: torch.Tensor  # [E, 2] int64, each once, smaller vertex first, sorted
    edges_of: torch.Tensor  # [T, 6] int64, numbers of the edges EDGES of each tetrahedron
    step: float  # edge of a cell, world units; deformations are smaller
    border: torch.Tensor  # [V] bool, vertices on the surface of the cube
    # Coordinates x, y, z whose product gives the vertices, z fastest; None for other lattices
    axes: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    @classmethod
    def of(cls, vertices: torch.Tensor, tetrahedra: torch.Tensor, step: float, axes=None) -> "Lattice":
        """Create a lattice from any tetrahedra [T, 4] of vertices [V, 3].

        Vertices on the bounding box are the border. Args: step, axes: see the fields.
        """
        ends = tetrahedra[:, EDGES].sort(dim=2).values  # [T, 6, 2]
        # Each edge once, as a number a * V + b with a < b
        keys, edges_of = (ends[..., 0] * len(vertices) + ends[..., 1]).unique(return_inverse=True)
        edges = torch.stack([keys.div(len(vertices), rounding_mode="floor"), keys % len(vertices)], dim=1)
        border = ((vertices == vertices.amin(dim=0)) | (vertices == vertices.amax(dim=0))).any(dim=1)
        return cls(vertices, tetrahedra, edges, edges_of, step, border, axes)

    def to(self, device: str | torch.device) -> "Lattice":
        """Return the lattice on a device, which must be that of the field."""
        parts: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, torch.Tensor)
        }
        if self.axes is not None:
            parts["axes"] = tuple(axis.to(device) for axis in self.axes)
        return replace(self, **parts)

    def grid(self, values: torch.Tensor) -> torch.Tensor:
        """Reshape values [..., V] at the vertices of a `cube` to [..., X, Y, Z]."""
        assert self.axes is not None
        return values.unflatten(-1, tuple(len(axis) for axis in self.axes))


@functools.lru_cache(maxsize=8)
def cube(resolution: int, bounds: Bounds | None = None) -> Lattice:
    """Create the lattice of R^3 cells of a cube, by default of the unit cube around the origin.

    Vertices are in the order of x, y, z, with z fastest.
    """
    bounds = bounds or Bounds()
    side = resolution + 1
    axis = (torch.arange(side) / resolution - 0.5) * bounds.side
    x, y, z = (axis + c for c in bounds.centre)
    vertices = torch.cartesian_prod(x, y, z)
    index = torch.arange(side**3).view(side, side, side)
    jump = (side * side, side, 1)  # from a vertex to the next one along x, y, z
    corners = []
    # Kuhn triangulation: each order of the axes gives a path along the edges from corner (0, 0, 0) to (1, 1,
    # 1).
    for order in itertools.permutations(range(3)):
        path = list(itertools.accumulate((jump[axis] for axis in order), initial=0))
        # Odd permutations give negatively oriented tetrahedra, so two vertices are exchanged.
        odd = sum(a > b for a, b in itertools.combinations(order, 2)) % 2
        corners.append([path[0], path[1], path[3], path[2]] if odd else path)
    cells = index[:-1, :-1, :-1].reshape(-1, 1, 1)
    return Lattice.of(
        vertices, (cells + torch.tensor(corners)).reshape(-1, 4), bounds.side / resolution, (x, y, z)
    )


# Marching tetrahedra: the surface of a level on a lattice as a closed triangle mesh, differentiable in the
# level and in the positions of the lattice's vertices. The level is negative inside; 0 is outside. Faces
# point outward: the signed volume is positive. Which tetrahedra are cut is determined by signs: topology has
# no gradient, only the positions of existing vertices have. Source: DMTet (Shen et al. 2021). Its 16 cases
# are derived here from the signs.

LEAST_STEP = 1e-8  # least difference of levels along a cut edge; tetrahedra with a smaller one are skipped
# Pairs of opposite edges of a tetrahedron. A quadrilateral is cut along the first pair that belongs to it.
_DIAGONALS = (((0, 2), (1, 3)), ((0, 3), (1, 2)), ((0, 1), (2, 3)))


def _cases() -> tuple[torch.Tensor, torch.Tensor]:
    """Derive the triangles of all 16 cases, [16, 2, 3] as numbers of EDGES, and their number [16].

    Bit i of a case states whether vertex i is inside.
    """
    corner = torch.cat([torch.zeros(1, 3), torch.eye(3)])  # a positively oriented tetrahedron
    middle = {edge: (corner[edge[0]] + corner[edge[1]]) / 2 for edge in EDGES}
    triangles = torch.zeros(16, 2, 3, dtype=torch.int64)
    count = torch.zeros(16, dtype=torch.int64)
    for case in range(1, 15):
        inside = [bool(case >> i & 1) for i in range(4)]
        cut = [edge for edge in EDGES if inside[edge[0]] != inside[edge[1]]]
        corners = [tuple(cut)]
        # Four cut edges form a quadrilateral; its diagonal connects two opposite edges.
        if len(cut) == 4:
            p, q = next(pair for pair in _DIAGONALS if set(pair) <= set(cut))
            corners = [(p, q, edge) for edge in cut if edge not in (p, q)]
        outward = corner[[not within for within in inside]].mean(0) - corner[inside].mean(0)
        for i, (a, b, c) in enumerate(corners):
            # Order the corners so that the normal points from inside to outside.
            normal = torch.linalg.cross(middle[b] - middle[a], middle[c] - middle[a])
            ordered = (a, b, c) if normal @ outward > 0 else (a, c, b)
            triangles[case, i] = torch.tensor([EDGES.index(edge) for edge in ordered])
        count[case] = len(corners)
    return triangles, count


TRIANGLES, COUNT = _cases()


def marching_tetrahedra(
    level: torch.Tensor, lattice: Lattice, deformation: torch.Tensor | None = None
) -> Mesh:
    """Extract the surface level = 0.

    On a cut edge a-b it lies at (v_a s_b - v_b s_a) / (s_b - s_a), s = level.

    Args: level: [V], negative inside; deformation: [V, 3], any numbers: vertices move by tanh(deformation)
        cells.
    Returns: a mesh with vertices in the order of the sorted cut edges; without vertices and faces if the sign
        is the same everywhere.
    Differentiable in: level, deformation, lattice.vertices. Not in: which edges are cut.
    Raises: ValueError for levels that are not finite.
    """
    assert level.shape == (len(lattice.vertices),)
    if not bool(level.detach().isfinite().all()):
        raise ValueError(
            "marching_tetrahedra: expected finite levels, got NaN or infinity. Check the field's density."
        )
    edges, faces = cut(level.detach(), lattice)
    where = lattice.vertices if deformation is None else lattice.vertices + deformation.tanh() * lattice.step
    a, b = edges.unbind(1)
    return Mesh(where[a] + crossed(level[a], level[b])[:, None] * (where[b] - where[a]), faces)


@torch.no_grad()
def cut(level: torch.Tensor, lattice: Lattice) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the edges [N, 2] that the surface crosses, as pairs of lattice vertices, and the faces [M, 3].

    Faces are triples of crossings.
    """
    inside = level < 0
    ends = lattice.edges
    crossed = inside[ends[:, 0]] != inside[ends[:, 1]]  # [E]
    # Position and gradient on such an edge would be numerically meaningless.
    flat = crossed & ((level[ends[:, 0]] - level[ends[:, 1]]).abs() < LEAST_STEP)
    triangles = TRIANGLES.to(level.device)
    count = COUNT.to(level.device)
    case = (inside[lattice.tetrahedra] << torch.arange(4, device=level.device)).sum(dim=1)  # [T]
    used = ((case > 0) & (case < 15)).nonzero()[:, 0]
    used = used[~flat[lattice.edges_of[used]].any(dim=1)]
    crossed &= ~flat
    number = crossed.cumsum(0) - 1  # vertex number of each cut edge
    pick = triangles[case[used]].flatten(1)  # [T', 6]
    faces = number[lattice.edges_of[used].gather(1, pick)].view(-1, 2, 3)
    # Keep as many of the two triangles as the case has.
    return ends[crossed], faces[torch.arange(2, device=level.device) < count[case[used], None]]


def crossed(s_a: torch.Tensor, s_b: torch.Tensor) -> torch.Tensor:
    """Return the share [N] of an edge at which levels s_a, s_b [N] at its ends cross 0.

    If their signs are equal, it is 0 or 1, the end closer to the surface, without a gradient.
    """
    lost = (s_a < 0) == (s_b < 0)
    # The inner where() avoids a division by 0, whose gradient would be NaN.
    return torch.where(lost, (s_a.abs() >= s_b.abs()).to(s_a), s_a / torch.where(lost, 1.0, s_a - s_b))


def signed_volume(mesh: Mesh) -> torch.Tensor:
    """Compute the volume [] that a closed mesh encloses, world units^3; positive if faces point outward.

    Differentiable in the vertices.
    """
    a, b, c = mesh.vertices[mesh.faces].unbind(1)
    return (a * torch.linalg.cross(b, c)).sum() / 6


def closed_level(level: torch.Tensor, lattice: Lattice) -> torch.Tensor:
    """Set the lattice's border of a level [..., V] outside, so that a body that reaches it is closed there.

    The cap lies about 1/1000 of a cell from the border. Differentiable in level, except on the border where
    it was inside.
    """
    least = 1e-3 * level.detach().abs().mean(dim=-1, keepdim=True) + LEAST_STEP
    return torch.where(lattice.border, level.maximum(least), level)


def densities(field: Field, lattice: Lattice) -> torch.Tensor:
    """Compute raw density [N, V] of a field at the lattice's vertices.

    Differentiable in what created the field.
    """
    # Product fields evaluate a product grid faster than the same points one by one.
    if lattice.axes is not None and isinstance(field, ProductField):
        return field.density_product(*(axis.to(lattice.vertices) for axis in lattice.axes)).flatten(1)
    return field.density(lattice.vertices)


# Surface nets (Gibson 1998): the surface on a cube's lattice with one vertex per cell, at the mean of the
# points where the surface crosses the cell's edges. They have a quarter of the faces of marching tetrahedra,
# of similar size, and every vertex moves with about four crossings. Mesh rewards read nets. V' = P V, with
# convex rows of P: signs decide, without a gradient, of which crossings a vertex is the mean.


class Net(NamedTuple):
    """Cut edges of cells. The four cells around each cut edge give a quadrilateral of their vertices."""

    # [N, 2] int64, lattice vertices at the ends, the one with the smaller coordinate first
    edges: torch.Tensor
    corners: torch.Tensor  # [N, 4] int64, vertices of the mesh, counterclockwise from outside
    row: torch.Tensor  # [N, 4] int64 in 0..3 N' - 1, coordinates that a crossing moves
    reach: torch.Tensor  # [N, 4] their displacement if the crossing moves from the first end to the second
    base: torch.Tensor  # [3 N'] coordinates with every crossing at its first end, world units

    @property
    def faces(self) -> torch.Tensor:
        """Faces [M, 3]: both halves of every quadrilateral."""
        return torch.cat([self.corners[:, :3], self.corners[:, [0, 2, 3]]])

    def vertices(self, share: torch.Tensor) -> torch.Tensor:
        """Compute vertices [N', 3] from the shares [N] of edges where the surface crosses.

        Differentiable in share.
        """
        return (
            self.base.to(share)
            .index_add(0, self.row.flatten(), (share[:, None] * self.reach).flatten().to(share))
            .view(-1, 3)
        )


@torch.no_grad()
def net(level: torch.Tensor, lattice: Lattice) -> Net:
    """Create the net of a level [V], negative inside, whose border is outside (`closed_level`)."""
    inside = lattice.grid(level) < 0  # [R + 1, R + 1, R + 1]
    assert not bool((lattice.grid(lattice.border) & inside).any()), "pass it through closed_level"
    side = inside.shape[0]
    places = lattice.vertices
    # Steps of the index to the next lattice vertex and to the next cell along x, y, z
    jump = (side * side, side, 1)
    cell = ((side - 1) ** 2, side - 1, 1)
    edges = []
    around = []
    axes = []
    for axis in range(3):
        first = inside.narrow(axis, 0, side - 1)
        second = inside.narrow(axis, 1, side - 1)
        place = (first != second).nonzero()  # [n, 3] of the first end
        start, here = ((place * place.new_tensor(by)).sum(dim=1) for by in (jump, cell))
        before = cell[(axis + 1) % 3]
        below = cell[(axis + 2) % 3]
        # Counterclockwise as seen from the second end
        quad = torch.stack([here - before - below, here - below, here, here - before], dim=1)
        # Outside is at the second end if the first one is inside; otherwise the order is reversed.
        around.append(torch.where(first[tuple(place.T)][:, None], quad, quad.flip(1)))
        edges.append(torch.stack([start, start + jump[axis]], dim=1))
        axes.append(torch.full_like(start, axis))
    cells = torch.cat(around)
    ends = torch.cat(edges)
    axis_of = torch.cat(axes)
    used = torch.zeros((side - 1) ** 3, dtype=torch.bool, device=level.device)
    used[cells.flatten()] = True
    corners = (used.cumsum(0) - 1)[cells]  # [N, 4]
    # Each of a cell's crossings has an equal share in the cell's vertex.
    share = 1 / torch.bincount(corners.flatten()).to(places)[corners]  # [N, 4]
    low = (places[ends[:, 0], None] * share[..., None]).flatten(0, 1)  # [4 N, 3]
    base = places.new_zeros(int(used.sum()), 3).index_add(0, corners.flatten(), low).flatten()
    return Net(ends, corners, 3 * corners + axis_of[:, None], lattice.step * share, base)


def net_mesh(level: torch.Tensor, lattice: Lattice, known: Net | None = None) -> Mesh:
    """Extract the surface level = 0 of a level [V] on a known net, or on a new one.

    Differentiable in level.
    """
    known = known or net(level.detach(), lattice)
    return Mesh(known.vertices(crossed(*level[known.edges.T])), known.faces)
