"""Fusion: the surface on a cube's lattice with one vertex per cell, the mean of where the surface crosses the cell's edges.

A quarter of the faces of marching tetrahedra, of like size, and every vertex moves with about four crossings: what a mesh reward reads.
V' = P V, rows of P convex: which crossings a vertex is the mean of is a choice of signs, without gradient (Gibson 1998, surface nets).

Letters: V vertices of the lattice, R cells per edge, N crossings, N' vertices of the mesh, M = 2 N faces.
"""

from typing import NamedTuple

import torch

from eg3d_rlhf.core.interfaces import Mesh
from eg3d_rlhf.rewards.meshes.meshing.lattice import Lattice
from eg3d_rlhf.rewards.meshes.meshing.tetrahedra import crossed


class Net(NamedTuple):
    """Which edges of cells are crossed, and what that makes of the four cells around each: a quadrilateral of their vertices."""

    edges: torch.Tensor  # [N, 2] int64, lattice vertices at the ends, the one with the smaller coordinate first
    corners: torch.Tensor  # [N, 4] int64, vertices of the mesh; counterclockwise from outside
    row: torch.Tensor  # [N, 4] int64 of 3 N': the coordinates that a crossing moves, and
    reach: torch.Tensor  # [N, 4]: by how much on its way from one end to the other, world units
    base: torch.Tensor  # [3 N']: coordinates with every crossing at its first end

    @property
    def faces(self) -> torch.Tensor:
        """[M, 3]: both halves of every quadrilateral."""
        return torch.cat([self.corners[:, :3], self.corners[:, [0, 2, 3]]])

    def vertices(self, share: torch.Tensor) -> torch.Tensor:
        """[N', 3] of where the surface crosses each edge, as a share [N] of it. Differentiable in share."""
        return self.base.to(share).index_add(0, self.row.flatten(), (share[:, None] * self.reach).flatten().to(share)).view(-1, 3)


@torch.no_grad()
def net(level: torch.Tensor, lattice: Lattice) -> Net:
    """Of a level [V], negative inside, whose border lies outside (`tetrahedra.closed_level`). Raises: ValueError where it does not."""
    inside = lattice.grid(level) < 0  # [R + 1, R + 1, R + 1]
    if bool((lattice.grid(lattice.border) & inside).any()):
        raise ValueError("net: expected a level that is outside on the lattice's border, got one inside. Pass it through closed_level.")
    side, places = inside.shape[0], lattice.vertices
    jump, cell = (side * side, side, 1), ((side - 1) ** 2, side - 1, 1)  # from a vertex, or a cell, to the next one along x, y, z
    edges, around, axes = [], [], []
    for axis in range(3):
        first, second = inside.narrow(axis, 0, side - 1), inside.narrow(axis, 1, side - 1)
        place = (first != second).nonzero()  # [n, 3] of the first end
        start, here = ((place * place.new_tensor(by)).sum(dim=1) for by in (jump, cell))
        one, other = cell[(axis + 1) % 3], cell[(axis + 2) % 3]
        quad = torch.stack([here - one - other, here - other, here, here - one], dim=1)  # counterclockwise from the second end
        around.append(torch.where(first[tuple(place.T)][:, None], quad, quad.flip(1)))
        edges.append(torch.stack([start, start + jump[axis]], dim=1))
        axes.append(torch.full_like(start, axis))
    cells, ends, axis_of = torch.cat(around), torch.cat(edges), torch.cat(axes)
    used = torch.zeros((side - 1) ** 3, dtype=torch.bool, device=level.device)
    used[cells.flatten()] = True
    corners = (used.cumsum(0) - 1)[cells]  # [N, 4]
    share = 1 / torch.bincount(corners.flatten()).to(places)[corners]  # [N, 4]
    low = (places[ends[:, 0], None] * share[..., None]).flatten(0, 1)  # [4 N, 3]
    base = places.new_zeros(int(used.sum()), 3).index_add(0, corners.flatten(), low).flatten()
    return Net(ends, corners, 3 * corners + axis_of[:, None], lattice.step * share, base)


def net_mesh(level: torch.Tensor, lattice: Lattice, known: Net | None = None) -> Mesh:
    """The surface level = 0 of a level [V], on a net that is already known or its own. Differentiable in: level."""
    known = known or net(level.detach(), lattice)
    return Mesh(known.vertices(crossed(*level[known.edges.T])), known.faces)
