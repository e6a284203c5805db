"""What an encoder of meshes reads of a face, 10 numbers (MeshMAE, Liang et al. 2022), and the two ways to
deal faces into patches.

| numbers | meaning |
| --- | --- |
| 0 | area: a share of the mesh's, so that scale does not matter ('share'), or as it is ('raw', as MeshMAE) |
| 1-3 | unit normal |
| 4-6 | interior angles, ascending, radians |
| 7-9 | dots of the normal with those of the three vertices, ascending |

Letters: N vertices, M faces of a mesh; P patches, F faces of a patch; Q points, K candidate faces or pairs of
neighbouring ones.
"""

import math
import warnings
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from eg3d_rlhf.core.interfaces import Mesh, Patches
from eg3d_rlhf.geometry.mesh import compact, decimate, parts
from eg3d_rlhf.rewards.point_layers import farthest_points
from training.heads.people_mesh import closest_on_triangles

TINY = 1e-7  # arguments of root and arc cosine keep this distance from where they have no slope


def face_features(
    vertices: torch.Tensor, faces: torch.Tensor, area: str = "share"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [M, 10] and face centres [M, 3] of vertices [N, 3] and faces [M, 3].

    Vertex normals are the faces' around them, weighted by their angles there. Differentiable in vertices,
    almost everywhere.
    """
    normal, size, angle = measured(vertices[faces])
    around = _joined(len(vertices), faces, normal, angle)
    return _numbers(normal, size / size.sum() if area == "share" else size, angle, around[faces]), vertices[
        faces
    ].mean(dim=1)


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
    return F.normalize(
        around.index_add(0, faces.flatten(), (angle[..., None] * normal[:, None]).flatten(0, 1)), dim=1
    )


def vertex_normals(vertices: torch.Tensor, faces: torch.Tensor) -> torch.Tensor:
    """Unit normals [N, 3] at vertices [N, 3]."""
    normal, _, angle = measured(vertices[faces])
    return _joined(len(vertices), faces, normal, angle)


def _numbers(
    normal: torch.Tensor, size: torch.Tensor, angle: torch.Tensor, around: torch.Tensor
) -> torch.Tensor:
    """Features [..., 10]; around [..., 3, 3]: normals at the three vertices."""
    dots = (around * normal.unsqueeze(-2)).sum(dim=-1)
    return torch.cat([size, normal, angle.sort(dim=-1).values, dots.sort(dim=-1).values], dim=-1)


def _length(x: torch.Tensor) -> torch.Tensor:
    return x.square().sum(dim=-1, keepdim=True).clamp_min(TINY**2).sqrt()


def placed(mesh: Mesh, place: str = "centre") -> torch.Tensor:
    """Vertices [N, 3] from the centre of the surface, in units of its mean radius ('centre'); from the least
    corner of their box, divided by its longest side, as MeshMAE has them ('box'); or as they are ('world').

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
    """Of each of A meshes that stand together in one: origin [A, 3] and unit [A, 1], so that places are
    (x - origin) / unit, and area [A, 1], world units. Of one without faces: 0, 1 and 1. Differentiable in
    vertices.
    """
    vertices, faces = mesh
    first, second, third = (vertices.index_select(0, faces[:, i]) for i in range(3))
    size = _length(torch.linalg.cross(second - first, third - first)) / 2  # [M, 1]

    def summed(x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(owners.number, x.shape[1]).index_add(0, owners.faces, x)

    total = summed(size)
    there = total.detach() > 0
    area = torch.where(there, total, 1.0)
    if place == "box":
        index = owners.vertices[:, None].expand(-1, 3)
        empty = vertices.new_zeros(owners.number, 3)
        least, most = (
            empty.scatter_reduce(0, index, vertices, kind, include_self=False) for kind in ("amin", "amax")
        )
        return least, torch.where(there, (most - least).amax(dim=1, keepdim=True).clamp_min(TINY), 1.0), area
    if place == "world":
        return vertices.new_zeros(owners.number, 3), vertices.new_ones(owners.number, 1), area
    middle = (first + second + third) / 3
    origin = summed(size * middle) / area
    radius = summed(size * _length(middle - origin.index_select(0, owners.faces))) / area
    return origin, torch.where(there, radius.clamp_min(TINY), 1.0), area


class Plan(NamedTuple):
    """Which faces of a mesh stand in which patch; made without gradient. V' = P V: each new vertex is a
    convex mixture of three.
    """

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
    """Patches [1, P, F, ...] of a mesh whose vertices [N, 3] may have moved since its plan was made.
    Differentiable in vertices.

    A mesh without faces has zeros, all masked.
    """
    if not len(plan.faces):
        zeros = vertices.new_zeros(1, *plan.select.shape, 13)
        return Patches(zeros[..., :10], zeros[..., 10:], plan.mask[None])
    where = placed(Mesh(plan.mixed(vertices), plan.faces), place)
    features, centres = face_features(where, plan.faces, area)
    return Patches(features[plan.select][None], centres[plan.select][None], plan.mask[None])


def framed(
    corner: torch.Tensor,
    around: torch.Tensor,
    origin: torch.Tensor,
    unit: torch.Tensor,
    total: torch.Tensor,
    area: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [A, ..., 10] and centres [A, ..., 3] of some faces of A meshes whose whole is known.

    Args: corner [A, ..., 3, 3], world units; around [A, ..., 3, 3], normals at the corners; origin [A, 3],
    unit, total [A, 1]: see `whereabouts`. Differentiable in all but area.
    """
    wide = (len(corner), *[1] * (corner.ndim - 3))
    normal, size, angle = measured(corner)
    size = size / (total if area == "share" else unit**2).view(*wide, 1)
    return _numbers(normal, size, angle, around), (corner.mean(dim=-2) - origin.view(*wide, 3)) / unit.view(
        *wide, 1
    )


# Patches as MeshMAE has them: a base of 256 faces, each cut into 64 by three midpoint subdivisions, laid back
# onto the surface.

NEAR = 16  # faces whose centres are nearest to a point: on one of them lies what it is laid onto
_EDGES = ((0, 1), (1, 2), (2, 0))


@torch.no_grad()
def maps(mesh: Mesh, patches: int = 256, faces: int = 64) -> Plan:
    """A plan of P patches with F faces; patch p holds faces p, p + P, p + 2 P, ... of the subdivided base.

    The base is decimated to P faces, or halved up to them; where the mesh falls into more parts than the base
    has room for, the smallest ones are left out. New vertices are the points of the mesh nearest to those of
    the subdivided base, as convex mixtures of a face's corners, so they follow the mesh when it moves. A mesh
    without faces has masked patches.
    Raises: ValueError for a number of faces that is no power of 4, or fewer than 4 patches.
    """
    levels = round(math.log(max(faces, 1), 4))
    if faces != 4**levels or patches < 4:
        raise ValueError(
            f"maps: expected at least 4 patches of 4, 16, 64, ... faces, got {patches} of {faces}. Choose 256"
            " of 64."
        )
    device = mesh.faces.device
    select = torch.arange(patches * faces, device=device).view(faces, patches).T
    if not len(mesh.faces):
        return Plan(
            None,
            None,
            mesh.faces,
            torch.zeros_like(select),
            torch.zeros(patches, dtype=torch.bool, device=device),
        )
    vertices = mesh.vertices.detach().double().cpu().numpy()
    old = mesh.faces.cpu().numpy()
    points, new = base(vertices, old, patches)
    for _ in range(levels):
        points, new = subdivided(points, new)
    face, weight = nearest_on(points, vertices[old])
    source, made, weights = (
        torch.from_numpy(part).to(device) for part in (old[face], new, weight.astype(np.float32))
    )
    whole = torch.ones(patches, dtype=torch.bool, device=device)
    return Plan(source, weights / weights.sum(dim=1, keepdim=True), made, select, whole)


def base(vertices: np.ndarray, faces: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The mesh with exactly `count` faces: vertices [N, 3] float64, faces [count, 3] int64."""
    target = count
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that decimation kept more faces is seen here
        points, new = decimate(vertices, faces, target)
        while len(new) > count and target > max(count // 4, 4):
            target = max(int(0.8 * target), 4)
            points, new = decimate(vertices, faces, target)
    if len(new) > count:
        number, part = parts(new, len(points))
        corner = points[new]
        areas = np.linalg.norm(np.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0]), axis=1)
        largest = np.argsort(-np.bincount(part, weights=areas, minlength=number), kind="stable")
        held = np.bincount(part, minlength=number)[largest].cumsum() <= count
        # one part that would not go lower
        kept = np.isin(part, largest[held]) if held[0] else np.argsort(-areas, kind="stable")[:count]
        points, new = compact(points, new[kept])
    return _halved(points.astype(np.float64), new.astype(np.int64), count)


def _halved(points: np.ndarray, faces: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Up to `count` faces, by halving the longest edge and both faces at it; one face alone where there is
    room for one.
    """
    rows = [tuple(row) for row in faces.tolist()]
    where = list(points)
    while len(rows) < count:
        length = {
            tuple(sorted((row[i], row[j]))): float(((where[row[i]] - where[row[j]]) ** 2).sum())
            for row in rows
            for i, j in _EDGES
        }
        edge = max(length, key=lambda ends: (length[ends], ends))
        middle = len(where)
        where.append((where[edge[0]] + where[edge[1]]) / 2)
        for place in [k for k, row in enumerate(rows) if set(edge) <= set(row)][: count - len(rows)]:
            row = rows[place]
            i, j = next((i, j) for i, j in _EDGES if {row[i], row[j]} == set(edge))
            third = row[3 - i - j]
            rows[place] = (row[i], middle, third)
            rows.append((middle, row[j], third))
    return np.array(where), np.array(rows, dtype=np.int64)


def subdivided(points: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every face in four by the middles of its edges; the parts of face i are faces i, i + M, i + 2 M, i + 3
    M.
    """
    ends = np.sort(faces[:, _EDGES], axis=2).reshape(-1, 2)
    edges, number = np.unique(ends, axis=0, return_inverse=True)
    middle = number.reshape(-1, 3) + len(points)  # of edges 01, 12, 20
    a, b, c = faces.T
    ab, bc, ca = middle.T
    new = np.concatenate(
        [np.stack(corners, axis=1) for corners in ((a, ab, ca), (ab, b, bc), (ca, bc, c), (ab, bc, ca))]
    )
    return np.concatenate([points, points[edges].mean(axis=1)]), new


def nearest_on(points: np.ndarray, triangles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest faces [Q] of triangles [M, 3, 3] to points [Q, 3], and where on them, as weights [Q, 3];
    only NEAR ones are tried.
    """
    from scipy.spatial import cKDTree

    # [Q, K]
    near = (
        cKDTree(triangles.mean(axis=1)).query(points, k=min(NEAR, len(triangles)))[1].reshape(len(points), -1)
    )
    weight = closest_on_triangles(triangles[near], points[:, None])  # [Q, K, 3]
    away = ((weight[..., None] * triangles[near]).sum(axis=2) - points[:, None]) ** 2
    best = away.sum(axis=2).argmin(axis=1)
    row = np.arange(len(points))
    return near[row, best], weight[row, best]


# Patches that follow the surface: regions grown over neighbouring faces of similar normals. The default, for
# meshes of any kind. Stands in for the mesh fusion of DreamCS, whose algorithm is not published. Choices are
# discrete, so topology gets no gradient.

# least cosine between a face and its region, and by how much it falls where nothing grows any more
SIMILAR = 0.9
RELAX = 0.1
SMALL = 0.1  # regions with less than this share of the mean area join a neighbour


@torch.no_grad()
def regions(mesh: Mesh, patches: int, faces: int) -> Plan:
    """A plan of P patches with F faces each; fewer patches, and a mask, where the mesh has fewer faces.

    Seeds are farthest points of the face centres. A region takes neighbouring faces whose normals are within
    `SIMILAR` of its mean one; what no region wants yet waits until the bound has been relaxed. Parts without
    a seed are regions of their own. Small regions join a neighbour, surplus ones the nearest; large ones are
    halved until there are P. F faces of each are taken evenly over its area, from its middle outwards: large
    faces may come twice, and small ones not at all.
    """
    triangles = mesh.vertices.detach().double().cpu().numpy()[mesh.faces.cpu().numpy()]  # [M, 3, 3]
    select = np.zeros((patches, faces), dtype=np.int64)
    mask = np.zeros(patches, dtype=bool)
    if len(triangles):
        label = grown(triangles, mesh.faces.cpu().numpy(), patches)
        count = int(label.max()) + 1
        select[:count] = _evenly(triangles, label, count, faces)
        mask[:count] = True
    device = mesh.faces.device
    return Plan(
        None, None, mesh.faces, torch.from_numpy(select).to(device), torch.from_numpy(mask).to(device)
    )


def grown(triangles: np.ndarray, faces: np.ndarray, patches: int) -> np.ndarray:
    """The region [M] of each face, 0..min(P, M) - 1, all used."""
    cross = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    double = np.linalg.norm(cross, axis=1)
    normals = cross / np.maximum(double, 1e-12)[:, None]
    areas = double / 2
    centres = triangles.mean(axis=1)
    wanted = min(patches, len(faces))
    pairs = neighbours(faces)
    seeds = farthest_points(torch.from_numpy(centres.T.copy())[None], wanted, "farthest")[0].numpy()
    label = _grow(normals, pairs, seeds)
    label = _merge(label, pairs, areas, centres, wanted)
    return _split(label, areas, centres, wanted)


def neighbours(faces: np.ndarray) -> np.ndarray:
    """Pairs [K, 2] of faces that share an edge; an edge of more than two faces joins each to the next one."""
    ends = np.sort(faces[:, [[0, 1], [1, 2], [2, 0]]].reshape(-1, 2), axis=1)
    key = ends[:, 0].astype(np.int64) * (int(faces.max(initial=0)) + 1) + ends[:, 1]
    order = np.argsort(key, kind="stable")
    same = key[order[1:]] == key[order[:-1]]
    return np.stack([order[:-1][same] // 3, order[1:][same] // 3], axis=1)


def _grow(normals: np.ndarray, pairs: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """Regions of seeds [P]; parts of the mesh without one get numbers from P on."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    label = np.full(len(normals), -1)
    label[seeds] = np.arange(len(seeds))
    total = normals[seeds].copy()
    bound = SIMILAR
    beside = np.concatenate([pairs, pairs[:, ::-1]])
    beside = beside[np.argsort(beside[:, 0], kind="stable")]
    first = np.searchsorted(beside[:, 0], np.arange(len(normals) + 1))
    outer = beside[:, 1]
    new = seeds
    region = np.zeros(0, dtype=np.int64)
    face = np.zeros(0, dtype=np.int64)
    # what regions may take: what they could not take before, and what stands beside their new faces
    while True:
        count = first[new + 1] - first[new]
        place = np.repeat(first[new] - count.cumsum() + count, count) + np.arange(count.sum())
        region = np.concatenate([region, np.repeat(label[new], count)])
        face = np.concatenate([face, outer[place]])
        open_ = label[face] < 0
        region = region[open_]
        face = face[open_]
        if not len(face):
            break
        mean = total / np.maximum(np.sqrt((total * total).sum(axis=1)), 1e-12)[:, None]
        likeness = np.einsum("ki,ki->k", normals[face], mean[region])
        while not (wanted := likeness >= bound).any():
            bound -= RELAX
        # a face that several regions want goes to the one it is most like
        order = np.argsort(likeness[wanted], kind="stable")
        new = np.unique(face[wanted])
        label[face[wanted][order]] = region[wanted][order]
        np.add.at(total, label[new], normals[new])
    left = label < 0
    if left.any():
        linked = left[pairs].all(axis=1)
        size = len(normals)
        graph = coo_array(
            (np.ones(int(linked.sum())), (pairs[linked, 0], pairs[linked, 1])), shape=(size, size)
        )
        part = connected_components(graph, directed=False)[1]
        label[left] = len(seeds) + np.unique(part[left], return_inverse=True)[1]
    return label


def _merge(
    label: np.ndarray, pairs: np.ndarray, areas: np.ndarray, centres: np.ndarray, wanted: int
) -> np.ndarray:
    """Regions numbered 0.. without gaps, at most `wanted` of them."""
    while True:
        label = np.unique(label, return_inverse=True)[1]
        count = int(label.max()) + 1
        size = np.bincount(label, weights=areas, minlength=count)
        ends = label[pairs]
        ends = ends[ends[:, 0] != ends[:, 1]]
        beside = np.bincount(ends.flatten(), minlength=count) > 0
        small = beside & (size < SMALL * size.mean())
        if count <= wanted and not small.any():
            return label
        pick = int(np.where(small if small.any() else np.ones(count, dtype=bool), size, np.inf).argmin())
        if beside[pick]:
            touching = np.concatenate([ends[ends[:, 0] == pick, 1], ends[ends[:, 1] == pick, 0]])
            into = int(np.bincount(touching).argmax())
        else:
            middle = _means(label, centres, count)
            distance = np.linalg.norm(middle - middle[pick], axis=1)
            distance[pick] = np.inf
            into = int(distance.argmin())
        label[label == pick] = into


def _split(label: np.ndarray, areas: np.ndarray, centres: np.ndarray, wanted: int) -> np.ndarray:
    """Halves of the largest regions until there are `wanted`, a number that the faces suffice for."""
    count = int(label.max()) + 1
    while count < wanted:
        size = np.bincount(label, weights=areas, minlength=count)
        size[np.bincount(label, minlength=count) < 2] = -1
        members = np.flatnonzero(label == size.argmax())
        places = centres[members]
        first = places[np.linalg.norm(places - places.mean(0), axis=1).argmax()]
        second = places[np.linalg.norm(places - first, axis=1).argmax()]
        nearer = np.linalg.norm(places - second, axis=1) < np.linalg.norm(places - first, axis=1)
        nearer[-1] |= not nearer.any()  # faces that all have one centre
        label[members[nearer]] = count
        count += 1
    return label


def _means(label: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    """Mean of values [M, 3] in each region, [count, 3]."""
    number = np.bincount(label, minlength=count)
    return (
        np.stack([np.bincount(label, weights=column, minlength=count) for column in values.T], axis=1)
        / number[:, None]
    )


def _evenly(triangles: np.ndarray, label: np.ndarray, count: int, faces: int) -> np.ndarray:
    """F faces [count, F] of each region, evenly over its area, from its middle outwards."""
    centres = triangles.mean(axis=1)
    away = np.linalg.norm(centres - _means(label, centres, count)[label], axis=1)
    order = np.lexsort((away, label))
    cross = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    area = np.linalg.norm(cross, axis=1)[order] + 1e-12
    until = area.cumsum()
    last = np.searchsorted(label[order], np.arange(count), side="right") - 1
    first = np.concatenate([[0], last[:-1] + 1])
    start = until[first] - area[first]
    end = until[last]
    at = start[:, None] + (end - start)[:, None] * (np.arange(faces) + 0.5) / faces
    return order[np.searchsorted(until, at).clip(first[:, None], last[:, None])]
