"""A cube cut into tetrahedra: 6 around the main diagonal of every cell, any resolution, nothing stored.

Letters: R cells per edge, V = (R + 1)^3 vertices, T tetrahedra, E edges.
"""

import functools
import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch

from eg3d_rlhf.core.field import Bounds

EDGES = tuple(itertools.combinations(range(4), 2))  # of a tetrahedron, in the order of `Lattice.edges_of`


@dataclass(frozen=True, eq=False)
class Lattice:
    """Tetrahedra and their edges; positively oriented, so det(b - a, c - a, d - a) > 0."""

    vertices: torch.Tensor  # [V, 3] world units
    tetrahedra: torch.Tensor  # [T, 4] int64
    edges: torch.Tensor  # [E, 2] int64, each once, smaller vertex first, sorted
    edges_of: torch.Tensor  # [T, 6] int64, numbers of the edges EDGES of each tetrahedron
    step: float  # a cell's edge, world units: deformations stay below it
    border: torch.Tensor  # [V] bool: on the surface of the cube
    axes: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None  # x, y, z whose product the vertices are, z the fastest

    @classmethod
    def of(cls, vertices: torch.Tensor, tetrahedra: torch.Tensor, step: float, axes=None) -> "Lattice":
        """Any tetrahedra [T, 4] of vertices [V, 3]; what lies on their bounding box is the border. Args: axes: see there."""
        ends = tetrahedra[:, EDGES].sort(dim=2).values  # [T, 6, 2]
        keys, edges_of = (ends[..., 0] * len(vertices) + ends[..., 1]).unique(return_inverse=True)
        edges = torch.stack([keys.div(len(vertices), rounding_mode="floor"), keys % len(vertices)], dim=1)
        border = ((vertices == vertices.amin(dim=0)) | (vertices == vertices.amax(dim=0))).any(dim=1)
        return cls(vertices, tetrahedra, edges, edges_of, step, border, axes)

    def to(self, device: str | torch.device) -> "Lattice":
        """The lattice on a device: that of the field."""
        parts: dict[str, Any] = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        if self.axes is not None:
            parts["axes"] = tuple(axis.to(device) for axis in self.axes)
        return replace(self, **parts)

    def grid(self, values: torch.Tensor) -> torch.Tensor:
        """Values [..., V] at the vertices of a `cube` as [..., X, Y, Z]. Raises: ValueError for a lattice that is none."""
        if self.axes is None:
            raise ValueError("Lattice.grid: expected a lattice made by cube, got free tetrahedra. Use cube.")
        return values.unflatten(-1, tuple(len(axis) for axis in self.axes))


@functools.lru_cache(maxsize=8)
def cube(resolution: int, bounds: Bounds | None = None) -> Lattice:
    """R^3 cells of a cube, by default the unit cube about the origin; vertices in the order of x, y, z, the last one fastest.

    Raises: ValueError for fewer than one cell.
    """
    if resolution < 1:
        raise ValueError(f"cube: expected at least 1 cell per edge, got {resolution}. Raise it.")
    bounds, side = bounds or Bounds(), resolution + 1
    axis = (torch.arange(side) / resolution - 0.5) * bounds.side
    x, y, z = (axis + c for c in bounds.centre)
    vertices = torch.cartesian_prod(x, y, z)
    index = torch.arange(side**3).view(side, side, side)
    jump = (side * side, side, 1)  # from a vertex to the next one along x, y, z
    corners = []
    for order in itertools.permutations(range(3)):
        path = list(itertools.accumulate((jump[axis] for axis in order), initial=0))
        odd = sum(a > b for a, b in itertools.combinations(order, 2)) % 2
        corners.append([path[0], path[1], path[3], path[2]] if odd else path)
    cells = index[:-1, :-1, :-1].reshape(-1, 1, 1)
    return Lattice.of(vertices, (cells + torch.tensor(corners)).reshape(-1, 4), bounds.side / resolution, (x, y, z))
