"""Marching tetrahedra: a level on a lattice as a closed triangle mesh, differentiable in the level and in where the lattice's vertices are.

The level is negative inside; 0 is outside. Faces point outward: the signed volume is positive. Which tetrahedra are cut is a choice of
signs: topology gets no gradient, only the positions of the vertices that are there do.
Source: DMTet (Shen et al. 2021). Its 16 cases are derived here from the signs.

Letters: V vertices of the lattice, T tetrahedra, E edges, N vertices of the mesh, M faces.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from eg3d_rlhf.core.field import Field, ProductField
from eg3d_rlhf.core.interfaces import Mesh
from eg3d_rlhf.rewards.meshes.meshing.lattice import EDGES, Lattice

LEAST_STEP = 1e-8  # between the levels of an edge's ends; tetrahedra with a cut edge below it are skipped
OPACITY_TOLERANCE = 0.02  # of the mean opacity that an automatic isovalue is held to
_DIAGONALS = (((0, 2), (1, 3)), ((0, 3), (1, 2)), ((0, 1), (2, 3)))  # opposite edges; a quadrilateral is cut along the first pair


def _cases() -> tuple[torch.Tensor, torch.Tensor]:
    """Triangles [16, 2, 3] as numbers of EDGES and how many there are [16]; bit i of a case: vertex i is inside."""
    corner = torch.cat([torch.zeros(1, 3), torch.eye(3)])  # a positively oriented tetrahedron
    middle = {edge: (corner[edge[0]] + corner[edge[1]]) / 2 for edge in EDGES}
    triangles, count = torch.zeros(16, 2, 3, dtype=torch.int64), torch.zeros(16, dtype=torch.int64)
    for case in range(1, 15):
        inside = [bool(case >> i & 1) for i in range(4)]
        cut = [edge for edge in EDGES if inside[edge[0]] != inside[edge[1]]]
        found = [tuple(cut)]
        if len(cut) == 4:
            p, q = next(pair for pair in _DIAGONALS if set(pair) <= set(cut))
            found = [(p, q, edge) for edge in cut if edge not in (p, q)]
        outward = corner[[not one for one in inside]].mean(0) - corner[inside].mean(0)
        for i, (a, b, c) in enumerate(found):
            normal = torch.linalg.cross(middle[b] - middle[a], middle[c] - middle[a])
            ordered = (a, b, c) if normal @ outward > 0 else (a, c, b)
            triangles[case, i] = torch.tensor([EDGES.index(edge) for edge in ordered])
        count[case] = len(found)
    return triangles, count


TRIANGLES, COUNT = _cases()


def marching_tetrahedra(level: torch.Tensor, lattice: Lattice, deformation: torch.Tensor | None = None) -> Mesh:
    """The surface level = 0. On a cut edge a-b it lies at (v_a s_b - v_b s_a) / (s_b - s_a), s = level.

    Args: level [V], negative inside; deformation [V, 3], any number: vertices move by tanh(deformation) cells.
    Returns: vertices in the order of the sorted edges that are cut; no vertex and no face where the sign is everywhere the same.
    Differentiable in: level, deformation, lattice.vertices. Not in: which edges are cut.
    Raises: ValueError for another number of levels, or NaN.
    """
    if level.shape != (len(lattice.vertices),):
        expected = [len(lattice.vertices)]
        raise ValueError(f"marching_tetrahedra: expected level {expected}, got {list(level.shape)}. Sample it at the vertices.")
    if not bool(level.detach().isfinite().all()):
        raise ValueError("marching_tetrahedra: expected finite levels, got NaN or infinity. Check the field's density.")
    edges, faces = cut(level.detach(), lattice)
    return Mesh(on_edges(level, lattice, edges, deformation), faces)


@torch.no_grad()
def cut(level: torch.Tensor, lattice: Lattice) -> tuple[torch.Tensor, torch.Tensor]:
    """The edges [N, 2] that the surface crosses, as pairs of lattice vertices, and faces [M, 3] between their crossings."""
    inside, ends = level < 0, lattice.edges
    crossed = inside[ends[:, 0]] != inside[ends[:, 1]]  # [E]
    flat = crossed & ((level[ends[:, 0]] - level[ends[:, 1]]).abs() < LEAST_STEP)
    triangles, count = TRIANGLES.to(level.device), COUNT.to(level.device)
    case = (inside[lattice.tetrahedra] << torch.arange(4, device=level.device)).sum(dim=1)  # [T]
    used = ((case > 0) & (case < 15)).nonzero()[:, 0]
    used = used[~flat[lattice.edges_of[used]].any(dim=1)]
    crossed &= ~flat
    number = crossed.cumsum(0) - 1  # of an edge's vertex
    pick = triangles[case[used]].flatten(1)  # [T', 6]
    faces = number[lattice.edges_of[used].gather(1, pick)].view(-1, 2, 3)
    return ends[crossed], faces[torch.arange(2, device=level.device) < count[case[used], None]]


def on_edges(level: torch.Tensor, lattice: Lattice, edges: torch.Tensor, deformation: torch.Tensor | None = None) -> torch.Tensor:
    """Vertices [N, 3] where the level crosses edges [N, 2], see `crossings`. Differentiable in level, deformation, lattice.vertices."""
    where = lattice.vertices if deformation is None else lattice.vertices + deformation.tanh() * lattice.step
    a, b = edges.unbind(1)
    return crossings(level[a], level[b], where[a], where[b])


def crossings(s_a: torch.Tensor, s_b: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Where levels s_a, s_b [N] at the ends a, b [N, 3] of edges cross 0, [N, 3]; see `crossed`."""
    return a + crossed(s_a, s_b)[:, None] * (b - a)


def crossed(s_a: torch.Tensor, s_b: torch.Tensor) -> torch.Tensor:
    """The share [N] of an edge at which levels s_a, s_b [N] at its ends cross 0; 0 or 1, the end nearer to 0, where their signs are the
    same, without gradient."""
    lost = (s_a < 0) == (s_b < 0)
    return torch.where(lost, (s_a.abs() >= s_b.abs()).to(s_a), s_a / torch.where(lost, 1.0, s_a - s_b))


def signed_volume(mesh: Mesh) -> torch.Tensor:
    """Volume [] that a closed mesh encloses, world units^3; positive where faces point outward. Differentiable in the vertices."""
    a, b, c = mesh.vertices[mesh.faces].unbind(1)
    return (a * torch.linalg.cross(b, c)).sum() / 6


def marched(density: torch.Tensor) -> torch.Tensor:
    """Density per world unit from raw density, as the ray marcher takes it."""
    return F.softplus(density - 1)


def matching_isovalue(density: torch.Tensor, step: float, activation: Callable[[torch.Tensor], torch.Tensor] = marched) -> float:
    """The raw density whose surface covers as much of the pictures as the volume does: silhouettes equal to the mean opacity.

    Views are the three parallel projections along the axes; a ray is covered where its largest density exceeds the isovalue, so the
    isovalue is a quantile of these. Without gradient.
    Args: density [X, Y, Z] raw; step: between grid points, world units; activation: raw density to density per world unit, >= 0.
    Raises: ValueError where no isovalue comes within 2 % of the mean opacity: nothing to see, everything full, or constant densities.
    """
    density = density.detach()
    opacity = torch.cat([(1 - torch.exp(-activation(density).sum(dim=i) * step)).flatten() for i in range(3)])
    peaks = torch.cat([density.amax(dim=i).flatten() for i in range(3)]).sort(descending=True).values
    mean, n = float(opacity.mean()), len(peaks)
    k = min(max(round(mean * n), 1), n - 1)
    found = float((peaks[k - 1] + peaks[k]) / 2)
    covered = float((peaks > found).double().mean())
    if not math.isfinite(mean) or abs(covered - mean) > OPACITY_TOLERANCE:
        raise ValueError(
            f"matching_isovalue: expected a density whose silhouettes cover the mean opacity {mean:.3f}, got {covered:.3f} at best. "
            "Set an isovalue."
        )
    return found


def isovalues(density: torch.Tensor, lattice: Lattice, level: float, isovalue: float | str | None) -> list[float]:
    """The raw density of the surface of each shape, density [N, V]: the one given; `level` for None; `matching_isovalue` for 'auto', on a
    lattice made by `cube`. Raises: ValueError for another word."""
    if isovalue == "auto":
        return [matching_isovalue(lattice.grid(one), lattice.step) for one in density]
    if isinstance(isovalue, str):
        raise ValueError(f"isovalue: expected a number, or 'auto', got {isovalue!r}. Correct it.")
    return [level if isovalue is None else float(isovalue)] * len(density)


def closed_level(level: torch.Tensor, lattice: Lattice) -> torch.Tensor:
    """Level [..., V] with the lattice's border outside, so that a body that runs into it is closed there.

    The cap lies about 1/1000 of a cell from the border. Differentiable in level, but not on the border where it was inside.
    """
    least = 1e-3 * level.detach().abs().mean(dim=-1, keepdim=True) + LEAST_STEP
    return torch.where(lattice.border, level.maximum(least), level)


def densities(field: Field, lattice: Lattice) -> torch.Tensor:
    """Raw density [N, V] of a field at the lattice's vertices. Differentiable in what made the field."""
    if lattice.axes is not None and isinstance(field, ProductField):
        return field.density_product(*(axis.to(lattice.vertices) for axis in lattice.axes)).flatten(1)
    return field.density(lattice.vertices)


def extract(field: Field, lattice: Lattice, isovalue: float | str | None = None, closed: bool = True) -> list[Mesh]:
    """One mesh for each shape of a field: level = isovalue - density.

    Args: isovalue: see `isovalues`; closed: see `closed_level`.
    Differentiable in: what made the field, through the vertices.
    """
    density = densities(field, lattice)
    levels = [iso - one for one, iso in zip(density, isovalues(density, lattice, field.level, isovalue), strict=True)]
    return [marching_tetrahedra(closed_level(one, lattice) if closed else one, lattice) for one in levels]
