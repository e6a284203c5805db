"""What an encoder of meshes reads of a face: 10 numbers (MeshMAE, Liang et al. 2022).

| numbers | meaning |
| --- | --- |
| 0 | area: as a share of the mesh's, so that scale does not matter ('share'), or as it is ('raw', as MeshMAE has it) |
| 1-3 | unit normal |
| 4-6 | interior angles, ascending, radians |
| 7-9 | dots of the normal with those of the three vertices, ascending |

Letters: N vertices, M faces of a mesh; P patches, F faces of a patch.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from eg3d_rlhf.core.interfaces import Mesh, Patches

AREAS = ("share", "raw")
PLACES = ("centre", "box", "world")
TINY = 1e-7  # arguments of root and arc cosine keep this distance from where they have no slope


def face_features(vertices: torch.Tensor, faces: torch.Tensor, area: str = "share") -> tuple[torch.Tensor, torch.Tensor]:
    """Features [M, 10] and face centres [M, 3] of vertices [N, 3] and faces [M, 3].

    Vertex normals are the faces' around them, weighted by their angles there. Differentiable in vertices, almost everywhere.
    Raises: ValueError for an unknown form of the area.
    """
    if area not in AREAS:
        raise ValueError(f"face_features: expected area of {', '.join(AREAS)}, got {area!r}. Choose one.")
    normal, size, angle = measured(vertices[faces])
    around = _joined(len(vertices), faces, normal, angle)
    return _numbers(normal, size / size.sum() if area == "share" else size, angle, around[faces]), vertices[faces].mean(dim=1)


def measured(corner: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unit normals [..., 3], areas [..., 1] and angles [..., 3] of faces with corners [..., 3, 3]."""
    side = corner.roll(-1, -2) - corner  # from each corner to the next
    cross = torch.linalg.cross(side[..., 0, :], -side[..., 2, :])
    double = _length(cross)
    along = side / _length(side)
    cosine = -(along * along.roll(1, -2)).sum(dim=-1)  # at each corner, between the sides that leave it
    return cross / double, double / 2, cosine.clamp(-1 + TINY, 1 - TINY).acos()


def _joined(count: int, faces: torch.Tensor, normal: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """Unit normals [N, 3] at vertices, of faces that were measured."""
    around = normal.new_zeros(count, 3)
    return F.normalize(around.index_add(0, faces.flatten(), (angle[..., None] * normal[:, None]).flatten(0, 1)), dim=1)


def vertex_normals(vertices: torch.Tensor, faces: torch.Tensor) -> torch.Tensor:
    """Unit normals [N, 3] at vertices [N, 3]."""
    normal, _, angle = measured(vertices[faces])
    return _joined(len(vertices), faces, normal, angle)


def _numbers(normal: torch.Tensor, size: torch.Tensor, angle: torch.Tensor, around: torch.Tensor) -> torch.Tensor:
    """Features [..., 10]; around [..., 3, 3]: normals at the three vertices."""
    dots = (around * normal.unsqueeze(-2)).sum(dim=-1)
    return torch.cat([size, normal, angle.sort(dim=-1).values, dots.sort(dim=-1).values], dim=-1)


def _length(x: torch.Tensor) -> torch.Tensor:
    return x.square().sum(dim=-1, keepdim=True).clamp_min(TINY**2).sqrt()


def placed(mesh: Mesh, place: str = "centre") -> torch.Tensor:
    """Vertices [N, 3] from the centre of the surface, in units of its mean radius ('centre'); from the least corner of their box, divided
    by its longest side, as MeshMAE has them ('box'); or as they are ('world').

    Differentiable in vertices. Raises: ValueError for another place.
    """
    alone = Owners(1, *(torch.zeros(len(part), dtype=torch.int64, device=part.device) for part in mesh))
    origin, unit, _ = whereabouts(mesh, alone, place)
    return (mesh.vertices - origin) / unit


class Owners(NamedTuple):
    """Several meshes as one: whose is what."""

    number: int
    vertices: torch.Tensor  # [N] int64
    faces: torch.Tensor  # [M] int64


def whereabouts(mesh: Mesh, owners: Owners, place: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each of A meshes that stand together in one: origin [A, 3] and unit [A, 1], so that places are (x - origin) / unit, and area
    [A, 1], world units. Of one without faces: 0, 1 and 1. Differentiable in vertices. Raises: ValueError for another place."""
    if place not in PLACES:
        raise ValueError(f"placed: expected a place of {', '.join(PLACES)}, got {place!r}. Choose one.")
    vertices, faces = mesh
    first, second, third = (vertices.index_select(0, faces[:, i]) for i in range(3))
    size = _length(torch.linalg.cross(second - first, third - first)) / 2  # [M, 1]

    def summed(x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(owners.number, x.shape[1]).index_add(0, owners.faces, x)

    total = summed(size)
    there = total.detach() > 0
    area = torch.where(there, total, 1.0)
    if place == "box":
        index, empty = owners.vertices[:, None].expand(-1, 3), vertices.new_zeros(owners.number, 3)
        least, most = (empty.scatter_reduce(0, index, vertices, kind, include_self=False) for kind in ("amin", "amax"))
        return least, torch.where(there, (most - least).amax(dim=1, keepdim=True).clamp_min(TINY), 1.0), area
    if place == "world":
        return vertices.new_zeros(owners.number, 3), vertices.new_ones(owners.number, 1), area
    middle = (first + second + third) / 3
    origin = summed(size * middle) / area
    radius = summed(size * _length(middle - origin.index_select(0, owners.faces))) / area
    return origin, torch.where(there, radius.clamp_min(TINY), 1.0), area


class Plan(NamedTuple):
    """Which faces of a mesh stand in which patch; made without gradient. V' = P V: each new vertex is a convex mixture of three."""

    source: torch.Tensor | None  # [N', 3] int64, vertices that are mixed; None: the vertices themselves
    weight: torch.Tensor | None  # [N', 3] >= 0, rows sum to 1
    faces: torch.Tensor  # [M', 3] int64, of the new vertices; normals and the total area are theirs
    select: torch.Tensor  # [P, F] int64, faces of each patch
    mask: torch.Tensor  # [P] bool; False: no such patch, and its faces mean nothing

    def mixed(self, vertices: torch.Tensor) -> torch.Tensor:
        """V' [N', 3] of vertices [N, 3]. Differentiable in them."""
        if self.source is None or self.weight is None:
            return vertices
        return (vertices[self.source] * self.weight.to(vertices.dtype)[..., None]).sum(dim=1)


def patch_features(vertices: torch.Tensor, plan: Plan, area: str = "share", place: str = "centre") -> Patches:
    """Patches [1, P, F, ...] of a mesh whose vertices [N, 3] may have moved since its plan was made. Differentiable in vertices.

    A mesh without faces has zeros, all masked.
    """
    if not len(plan.faces):
        zeros = vertices.new_zeros(1, *plan.select.shape, 13)
        return Patches(zeros[..., :10], zeros[..., 10:], plan.mask[None])
    where = placed(Mesh(plan.mixed(vertices), plan.faces), place)
    features, centres = face_features(where, plan.faces, area)
    return Patches(features[plan.select][None], centres[plan.select][None], plan.mask[None])


def framed(
    corner: torch.Tensor, around: torch.Tensor, origin: torch.Tensor, unit: torch.Tensor, total: torch.Tensor, area: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [A, ..., 10] and centres [A, ..., 3] of some faces of A meshes whose whole is known.

    Args: corner [A, ..., 3, 3], world units; around [A, ..., 3, 3], normals at the corners; origin [A, 3], unit, total [A, 1]: see
    `whereabouts`. Differentiable in all but area.
    """
    wide = (len(corner), *[1] * (corner.ndim - 3))
    normal, size, angle = measured(corner)
    size = size / (total if area == "share" else unit**2).view(*wide, 1)
    return _numbers(normal, size, angle, around), (corner.mean(dim=-2) - origin.view(*wide, 3)) / unit.view(*wide, 1)
