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

from eg3d_rlhf.distill.interfaces import Mesh, Patches

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
    corner = vertices[faces]  # [M, 3, 3]
    side = corner.roll(-1, 1) - corner  # from each corner to the next
    cross = torch.linalg.cross(side[:, 0], -side[:, 2])
    double = _length(cross)  # [M, 1]
    normal, size = cross / double, double / 2
    along = side / _length(side)
    cosine = -(along * along.roll(1, 1)).sum(dim=2)  # at each corner, between the sides that leave it
    angle = cosine.clamp(-1 + TINY, 1 - TINY).acos()  # [M, 3]
    around = vertices.new_zeros(vertices.shape)
    around = around.index_add(0, faces.flatten(), (angle[..., None] * normal[:, None]).flatten(0, 1))
    dots = (F.normalize(around, dim=1)[faces] * normal[:, None]).sum(dim=2)
    size = size / size.sum() if area == "share" else size
    return torch.cat([size, normal, angle.sort(dim=1).values, dots.sort(dim=1).values], dim=1), corner.mean(dim=1)


def _length(x: torch.Tensor) -> torch.Tensor:
    return x.square().sum(dim=-1, keepdim=True).clamp_min(TINY**2).sqrt()


def placed(mesh: Mesh, place: str = "centre") -> torch.Tensor:
    """Vertices [N, 3] from the centre of the surface, in units of its mean radius ('centre'); from the least corner of their box, divided
    by its longest side, as MeshMAE has them ('box'); or as they are ('world').

    Differentiable in vertices. Raises: ValueError for another place.
    """
    if place not in PLACES:
        raise ValueError(f"placed: expected a place of {', '.join(PLACES)}, got {place!r}. Choose one.")
    vertices = mesh.vertices
    if place == "world" or not len(mesh.faces):
        return vertices
    if place == "box":
        shifted = vertices - vertices.amin(dim=0)
        return shifted / shifted.amax().clamp_min(TINY)
    corner = vertices[mesh.faces]
    area = _length(torch.linalg.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0]))  # [M, 1], doubled
    middle = corner.mean(dim=1)
    shifted = vertices - (area * middle).sum(dim=0) / area.sum()
    return shifted / ((area * _length(shifted[mesh.faces].mean(dim=1))).sum() / area.sum()).clamp_min(TINY)


class Plan(NamedTuple):
    """Which faces of a mesh stand in which patch; made without gradient. V' = P V: each new vertex is a convex mixture of three."""

    source: torch.Tensor | None  # [N', 3] int64, vertices that are mixed; None: the vertices themselves
    weight: torch.Tensor | None  # [N', 3] >= 0, rows sum to 1
    faces: torch.Tensor  # [M', 3] int64, of the new vertices; normals and the total area are theirs
    select: torch.Tensor  # [P, F] int64, faces of each patch
    mask: torch.Tensor  # [P] bool; False: no such patch, and its faces mean nothing


def patch_features(vertices: torch.Tensor, plan: Plan, area: str = "share", place: str = "centre") -> Patches:
    """Patches [1, P, F, ...] of a mesh whose vertices [N, 3] may have moved since its plan was made. Differentiable in vertices.

    A mesh without faces has zeros, all masked.
    """
    if not len(plan.faces):
        zeros = vertices.new_zeros(1, *plan.select.shape, 13)
        return Patches(zeros[..., :10], zeros[..., 10:], plan.mask[None])
    if plan.source is not None and plan.weight is not None:
        vertices = (vertices[plan.source] * plan.weight.to(vertices.dtype)[..., None]).sum(dim=1)
    where = placed(Mesh(vertices, plan.faces), place)
    features, centres = face_features(where, plan.faces, area)
    return Patches(features[plan.select][None], centres[plan.select][None], plan.mask[None])
