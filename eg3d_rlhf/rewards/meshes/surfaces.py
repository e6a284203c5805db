"""Extract surfaces on a lattice: by marching tetrahedra, or as surface nets with one vertex per cell.

A level is a number per vertex of the lattice that is negative inside a shape, so that the surface is where
the level is 0. The lattice is a cube whose cells are divided into 6 tetrahedra around the main diagonal. It
is computed when needed and not stored in files.

Shapes: R cells per edge, V = (R + 1)^3 vertices of the lattice, T tetrahedra, E edges of tetrahedra. Marching
tetrahedra give a mesh of N vertices and M faces. A net has N crossings of the surface with edges, N'
vertices, and M = 2 N faces.
"""

import functools
import itertools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from eg3d_rlhf.core.field import Bounds, Field, ProductField
from eg3d_rlhf.core.interfaces import Mesh

# Edges of a tetrahedron as pairs of its vertices 0..3, in the order of `Lattice.edges_of`
EDGES = tuple(itertools.combinations(range(4), 2))


@dataclass(frozen=True, eq=False)
class Lattice:
    """Lattice of tetrahedra, at whose vertices levels and densities are given.

    All tetrahedra (a, b, c, d) are positively oriented: det(b - a, c - a, d - a) > 0.
    """

    vertices: torch.Tensor  # positions [V, 3], world units
    tetrahedra: torch.Tensor  # vertices of each tetrahedron, int64 [T, 4]
    edges: torch.Tensor  # vertices of each edge, int64 [E, 2]: sorted, each edge once, smaller index first
    edges_of: torch.Tensor  # indices in `edges` of the edges EDGES of each tetrahedron, int64 [T, 6]
    step: float  # edge of a cell, world units; deformations are smaller
    border: torch.Tensor  # bool [V], True for vertices on the surface of the cube
    # Coordinates x, y, z whose cartesian product gives the vertices, z fastest; None for other lattices
    axes: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    @classmethod
    def from_tetrahedra(
        cls, vertices: torch.Tensor, tetrahedra: torch.Tensor, step: float, axes=None
    ) -> "Lattice":
        """Create a lattice from tetrahedra. The vertices on the bounding box form its border.

        Args:
            vertices: positions [V, 3], world units.
            tetrahedra: vertices of each tetrahedron, int64 [T, 4].
            step: edge of a cell, world units.
            axes: coordinates of a product lattice, see the field `axes`.
        """
        edge_vertices = tetrahedra[:, EDGES].sort(dim=2).values  # [T, 6, 2]
        # An edge from vertex a to vertex b > a gets the key a * V + b, and `unique` removes repeated edges.
        edge_keys, edges_of = (edge_vertices[..., 0] * len(vertices) + edge_vertices[..., 1]).unique(
            return_inverse=True
        )
        edges = torch.stack(
            [edge_keys.div(len(vertices), rounding_mode="floor"), edge_keys % len(vertices)], dim=1
        )
        is_border = ((vertices == vertices.amin(dim=0)) | (vertices == vertices.amax(dim=0))).any(dim=1)
        return cls(vertices, tetrahedra, edges, edges_of, step, is_border, axes)

    def to(self, device: str | torch.device) -> "Lattice":
        """Return a copy of the lattice on a device, which must be the device of the evaluated field."""
        tensors: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, torch.Tensor)
        }
        if self.axes is not None:
            tensors["axes"] = tuple(axis.to(device) for axis in self.axes)
        return replace(self, **tensors)

    def grid(self, values: torch.Tensor) -> torch.Tensor:
        """Reshape values [..., V] at the vertices of a `cube` to [..., R + 1, R + 1, R + 1]: axes x, y, z."""
        assert self.axes is not None
        return values.unflatten(-1, tuple(len(axis) for axis in self.axes))


@functools.lru_cache(maxsize=8)
def cube(resolution: int, bounds: Bounds | None = None) -> Lattice:
    """Create the lattice that divides a cube into R^3 cells, and each cell into 6 tetrahedra.

    The order of the vertices is that of their coordinates x, y, z, with z fastest.

    Args:
        resolution: number of cells per edge, R.
        bounds: the cube; None for the unit cube around the origin.
    """
    bounds = bounds or Bounds()
    vertices_per_edge = resolution + 1
    coordinates = (torch.arange(vertices_per_edge) / resolution - 0.5) * bounds.side
    x, y, z = (coordinates + centre for centre in bounds.centre)
    vertices = torch.cartesian_prod(x, y, z)
    vertex_indices = torch.arange(vertices_per_edge**3).view(
        vertices_per_edge, vertices_per_edge, vertices_per_edge
    )
    # From a vertex to the next vertex along x, y, z
    index_step = (
        vertices_per_edge * vertices_per_edge,
        vertices_per_edge,
        1,
    )
    corners = []
    # Kuhn triangulation: each of the 6 orders of the axes gives a path along edges of the cell from corner
    # (0, 0, 0) to corner (1, 1, 1), and the four corners of the path form a tetrahedron.
    for axis_order in itertools.permutations(range(3)):
        corner_path = list(itertools.accumulate((index_step[axis] for axis in axis_order), initial=0))
        # Odd permutations give negatively oriented tetrahedra, so two vertices are exchanged.
        is_odd = sum(a > b for a, b in itertools.combinations(axis_order, 2)) % 2
        corners.append(
            [corner_path[0], corner_path[1], corner_path[3], corner_path[2]] if is_odd else corner_path
        )
    # [R^3, 1, 1], corner (0, 0, 0) of each cell
    first_corners = vertex_indices[:-1, :-1, :-1].reshape(-1, 1, 1)
    tetrahedra = (first_corners + torch.tensor(corners)).reshape(-1, 4)
    return Lattice.from_tetrahedra(vertices, tetrahedra, bounds.side / resolution, (x, y, z))


# Marching tetrahedra extract the surface of a level as a closed triangle mesh, differentiable in the level
# and in the positions of the lattice's vertices. A level of exactly 0 counts as outside. Faces point outward:
# the signed volume is positive. The signs of the level determine which tetrahedra are cut, so topology has no
# gradient, and only the positions of existing vertices have one. Source: DMTet (Shen et al. 2021, arXiv
# 2111.04276). The table of its 16 cases is derived here from the signs.

# Smallest difference of the levels at the two ends of an edge that is cut. Tetrahedra with a smaller
# difference are skipped.
MIN_STEP = 1e-8
# Pairs of opposite edges of a tetrahedron. A quadrilateral is divided along the first pair that belongs to
# it.
_DIAGONALS = (((0, 2), (1, 3)), ((0, 3), (1, 2)), ((0, 1), (2, 3)))


def _cases() -> tuple[torch.Tensor, torch.Tensor]:
    """Derive the triangles of marching tetrahedra for all 16 cases of signs.

    Bit i of the number of a case is 1 if vertex i of the tetrahedron is inside.

    Returns: the triangles [16, 2, 3], whose corners are indices of EDGES, and the number of triangles of each
        case [16].
    """
    corners = torch.cat([torch.zeros(1, 3), torch.eye(3)])  # a positively oriented tetrahedron
    edge_midpoints = {edge: (corners[edge[0]] + corners[edge[1]]) / 2 for edge in EDGES}
    triangles = torch.zeros(16, 2, 3, dtype=torch.int64)
    triangle_counts = torch.zeros(16, dtype=torch.int64)
    # In the cases 0 and 15 all vertices are on the same side, and there is no surface.
    for case in range(1, 15):
        is_corner_inside = [bool(case >> i & 1) for i in range(4)]
        cut_edges = [edge for edge in EDGES if is_corner_inside[edge[0]] != is_corner_inside[edge[1]]]
        case_triangles = [tuple(cut_edges)]
        # Four cut edges form a quadrilateral; its diagonal connects two opposite edges.
        if len(cut_edges) == 4:
            p, q = next(pair for pair in _DIAGONALS if set(pair) <= set(cut_edges))
            case_triangles = [(p, q, edge) for edge in cut_edges if edge not in (p, q)]
        is_corner_outside = [not is_inside for is_inside in is_corner_inside]
        outward_direction = corners[is_corner_outside].mean(0) - corners[is_corner_inside].mean(0)
        for i, (a, b, c) in enumerate(case_triangles):
            # Order the corners so that the normal points from inside to outside.
            normal = torch.linalg.cross(
                edge_midpoints[b] - edge_midpoints[a], edge_midpoints[c] - edge_midpoints[a]
            )
            oriented_triangle = (a, b, c) if normal @ outward_direction > 0 else (a, c, b)
            triangles[case, i] = torch.tensor([EDGES.index(edge) for edge in oriented_triangle])
        triangle_counts[case] = len(case_triangles)
    return triangles, triangle_counts


TRIANGLES, TRIANGLE_COUNTS = _cases()


def marching_tetrahedra(
    level: torch.Tensor, lattice: Lattice, deformation: torch.Tensor | None = None
) -> Mesh:
    """Extract the surface at which the level is 0, as a triangle mesh.

    On a cut edge from vertex a to vertex b with the positions v and levels s, the surface lies at
    (v_a s_b - v_b s_a) / (s_b - s_a).

    Differentiable in level, deformation and lattice.vertices, but not in the choice of the edges that are
    cut.

    Args:
        level: levels [V], negative inside.
        lattice: lattice of the levels.
        deformation: unbounded numbers [V, 3]; each vertex of the lattice moves by tanh(deformation) cells.
            None for no displacement.
    Returns: a mesh whose vertices are in the order of the sorted cut edges. It has no vertices and faces if
        the sign of the level is the same everywhere.
    Raises: ValueError for levels that are not finite.
    """
    assert level.shape == (len(lattice.vertices),)
    if not bool(level.detach().isfinite().all()):
        raise ValueError(
            "marching_tetrahedra: the level contains NaN or infinity. Check the density of the field, for"
            " example the weights of the generator."
        )
    edges, faces = find_cut_edges(level.detach(), lattice)
    positions = lattice.vertices
    if deformation is not None:
        positions = positions + deformation.tanh() * lattice.step
    a, b = edges.unbind(1)
    crossing_shares = crossing_share(level[a], level[b])[:, None]  # [N, 1]
    return Mesh(positions[a] + crossing_shares * (positions[b] - positions[a]), faces)


@torch.no_grad()
def find_cut_edges(level: torch.Tensor, lattice: Lattice) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the edges that the surface crosses, and connect their crossings to faces.

    Args:
        level: levels [V], negative inside.
        lattice: lattice of the levels.
    Returns: the vertices of each cut edge [N, 2], and the faces [M, 3], whose corners are indices of cut
        edges.
    """
    is_vertex_inside = level < 0
    a, b = lattice.edges.unbind(1)  # [E] each
    is_cut = is_vertex_inside[a] != is_vertex_inside[b]  # [E]
    # On an edge whose levels are almost equal, position and gradient would be rounding errors.
    is_flat = is_cut & ((level[a] - level[b]).abs() < MIN_STEP)
    triangles = TRIANGLES.to(level.device)
    triangle_counts = TRIANGLE_COUNTS.to(level.device)
    # The number of the case has bit i set if vertex i is inside. [T]
    case_numbers = (is_vertex_inside[lattice.tetrahedra] << torch.arange(4, device=level.device)).sum(dim=1)
    tetrahedra = ((case_numbers > 0) & (case_numbers < 15)).nonzero()[:, 0]
    tetrahedra = tetrahedra[~is_flat[lattice.edges_of[tetrahedra]].any(dim=1)]  # [T'], cut and not flat
    is_cut &= ~is_flat
    vertex_index = is_cut.cumsum(0) - 1  # index of the mesh vertex on each cut edge
    corner_edges = triangles[case_numbers[tetrahedra]].flatten(1)  # [T', 6], indices of EDGES
    faces = vertex_index[lattice.edges_of[tetrahedra].gather(1, corner_edges)].view(-1, 2, 3)
    # A case has one or two triangles.
    is_existing = torch.arange(2, device=level.device) < triangle_counts[case_numbers[tetrahedra], None]
    return lattice.edges[is_cut], faces[is_existing]


def crossing_share(s_a: torch.Tensor, s_b: torch.Tensor) -> torch.Tensor:
    """Return the position [N] on each edge at which the level is 0, in 0..1: 0 is end a, 1 is end b.

    If the levels at both ends have the same sign, the result is 0 or 1, the end that is closer to the
    surface, without a gradient.

    Args:
        s_a: levels [N] at the ends a.
        s_b: levels [N] at the ends b.
    """
    is_uncut = (s_a < 0) == (s_b < 0)
    # The inner where() avoids a division by 0, whose gradient would be NaN.
    share = s_a / torch.where(is_uncut, 1.0, s_a - s_b)
    return torch.where(is_uncut, (s_a.abs() >= s_b.abs()).to(s_a), share)


def signed_volume(mesh: Mesh) -> torch.Tensor:
    """Compute the volume that a closed mesh encloses, a scalar tensor in world units^3.

    The volume is positive if the faces point outward. Differentiable in the vertices.
    """
    # Sum of the signed volumes of the tetrahedra from the origin to each face
    a, b, c = mesh.vertices[mesh.faces].unbind(1)
    return (a * torch.linalg.cross(b, c)).sum() / 6


def closed_level(level: torch.Tensor, lattice: Lattice) -> torch.Tensor:
    """Change a level so that the border of the lattice is outside, which closes the shape there.

    The closing surface lies about 1/1000 of a cell from the border. Differentiable in level, except at
    vertices of the border that were inside.

    Args:
        level: levels [..., V], negative inside.
        lattice: lattice of the levels.
    """
    border_level = 1e-3 * level.detach().abs().mean(dim=-1, keepdim=True) + MIN_STEP
    return torch.where(lattice.border, level.maximum(border_level), level)


def densities(field: Field, lattice: Lattice) -> torch.Tensor:
    """Compute the raw densities [A, V] of the shapes of a field at the vertices of a lattice.

    Differentiable in the parameters of the field.
    """
    # A product field evaluates a product of axes faster than a list of the same points.
    if lattice.axes is not None and isinstance(field, ProductField):
        return field.density_product(*(axis.to(lattice.vertices) for axis in lattice.axes)).flatten(1)
    return field.density(lattice.vertices)


# Surface nets (Gibson 1998) have one vertex per cell of a cube's lattice, at the mean of the points at which
# the surface crosses the edges of the cell. They have a quarter of the faces of marching tetrahedra, of
# similar size, and every vertex moves with about four crossings. Mesh rewards read nets. A vertex is a mean
# of crossings, and the signs of the level decide, without a gradient, which crossings these are.


class Net(NamedTuple):
    """Surface net: the edges of cells that the surface crosses, and the mesh that they give.

    Each cut edge gives a quadrilateral whose corners are the vertices of the four cells around the edge.
    """

    # Vertices of the lattice at both ends of each cut edge, int64 [N, 2]; the end with the smaller coordinate
    # first
    edges: torch.Tensor
    corners: torch.Tensor  # corners of each quadrilateral, int64 [N, 4], counterclockwise from outside
    row: torch.Tensor  # indices in `base` of the four coordinates that a crossing moves, int64 [N, 4]
    reach: torch.Tensor  # displacement [N, 4] of these coordinates if the crossing moves from end 0 to end 1
    base: torch.Tensor  # coordinates [3 N'] of the vertices if every crossing is at end 0, world units

    @property
    def faces(self) -> torch.Tensor:
        """Faces [M, 3]: two triangles of every quadrilateral."""
        return torch.cat([self.corners[:, :3], self.corners[:, [0, 2, 3]]])

    def vertices(self, share: torch.Tensor) -> torch.Tensor:
        """Compute the vertices [N', 3] from the positions of the crossings. Differentiable in share.

        Args: share: position [N] of each crossing on its edge, 0 at end 0 and 1 at end 1.
        """
        displacement = (share[:, None] * self.reach).flatten().to(share)  # [4 N]
        return self.base.to(share).index_add(0, self.row.flatten(), displacement).view(-1, 3)


@torch.no_grad()
def net(level: torch.Tensor, lattice: Lattice) -> Net:
    """Create the surface net of a level.

    Args:
        level: levels [V], negative inside; the border must be outside, see `closed_level`.
        lattice: lattice of the levels, made by `cube`.
    """
    is_vertex_inside = lattice.grid(level) < 0  # [R + 1, R + 1, R + 1]
    assert not bool((lattice.grid(lattice.border) & is_vertex_inside).any()), (
        "pass the level through closed_level"
    )
    vertices_per_edge = is_vertex_inside.shape[0]
    positions = lattice.vertices
    # Steps of the index to the next vertex of the lattice, and to the next cell, along x, y, z
    vertex_step = (vertices_per_edge * vertices_per_edge, vertices_per_edge, 1)
    cell_step = ((vertices_per_edge - 1) ** 2, vertices_per_edge - 1, 1)
    edges = []
    cells = []
    axes = []
    for axis in range(3):
        start_inside = is_vertex_inside.narrow(axis, 0, vertices_per_edge - 1)
        end_inside = is_vertex_inside.narrow(axis, 1, vertices_per_edge - 1)
        start_position = (start_inside != end_inside).nonzero()  # [n, 3], of the starts of cut edges
        start_vertex = (start_position * start_position.new_tensor(vertex_step)).sum(dim=1)
        start_cell = (start_position * start_position.new_tensor(cell_step)).sum(dim=1)
        # Steps to the neighbouring cells along the two other axes
        second_step = cell_step[(axis + 1) % 3]
        third_step = cell_step[(axis + 2) % 3]
        # The four cells around the edge, counterclockwise as seen from its end
        surrounding_cells = torch.stack(
            [
                start_cell - second_step - third_step,
                start_cell - third_step,
                start_cell,
                start_cell - second_step,
            ],
            dim=1,
        )
        # Seen from outside, the order must be counterclockwise. If the end of the edge is inside, the order
        # is reversed.
        is_start_inside = start_inside[tuple(start_position.T)][:, None]
        cells.append(torch.where(is_start_inside, surrounding_cells, surrounding_cells.flip(1)))
        edges.append(torch.stack([start_vertex, start_vertex + vertex_step[axis]], dim=1))
        axes.append(torch.full_like(start_vertex, axis))
    all_cells = torch.cat(cells)  # [N, 4]
    all_edges = torch.cat(edges)  # [N, 2]
    edge_axis = torch.cat(axes)  # [N]
    has_vertex = torch.zeros((vertices_per_edge - 1) ** 3, dtype=torch.bool, device=level.device)
    has_vertex[all_cells.flatten()] = True
    # The vertices are numbered in the order of their cells.
    corners = (has_vertex.cumsum(0) - 1)[all_cells]  # [N, 4]
    # A vertex is the mean of the crossings of its cell, so all crossings of a cell have the same weight.
    weight = 1 / torch.bincount(corners.flatten()).to(positions)[corners]  # [N, 4]
    start_parts = (positions[all_edges[:, 0], None] * weight[..., None]).flatten(0, 1)  # [4 N, 3]
    vertices = positions.new_zeros(int(has_vertex.sum()), 3).index_add(0, corners.flatten(), start_parts)
    # A crossing moves only the coordinate along its edge, which is coordinate `edge_axis` of the vertex.
    moved_coordinates = 3 * corners + edge_axis[:, None]
    return Net(all_edges, corners, moved_coordinates, lattice.step * weight, vertices.flatten())


def net_mesh(level: torch.Tensor, lattice: Lattice, surface_net: Net | None = None) -> Mesh:
    """Extract the surface at which a level is 0, as a surface net. Differentiable in level.

    Args:
        level: levels [V], negative inside.
        lattice: lattice of the levels.
        surface_net: net of the level, if it is already known; None computes the net.
    """
    surface_net = surface_net or net(level.detach(), lattice)
    start_level, end_level = level[surface_net.edges.T]
    return Mesh(surface_net.vertices(crossing_share(start_level, end_level)), surface_net.faces)
