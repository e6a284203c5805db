"""Divide faces into patches, and compute the 10 numbers that encoders read of a face (MeshMAE).

| numbers | meaning |
| --- | --- |
| 0 | area: a share of the mesh's area, independent of scale ('share'), or the raw area ('raw', as in MeshMAE)
| | 1-3 | unit normal |
| 4-6 | interior angles, ascending, radians |
| 7-9 | dot products of the normal with those of the three vertices, ascending |

Letters: A meshes, N vertices, M faces of a mesh; P patches, F faces of a patch; Q points, K candidate faces
or pairs of neighbouring ones.
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

TINY = 1e-7  # least distance of arguments of square root and arc cosine from points with an infinite slope


def face_features(
    vertices: torch.Tensor, faces: torch.Tensor, area: str = "share"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute features [M, 10] and face centres [M, 3] of vertices [N, 3] and faces [M, 3].

    A vertex normal is the mean of the normals of adjacent faces, weighted by their angles at the vertex.
    Differentiable in vertices, almost everywhere.
    """
    normal, size, angle = measured(vertices[faces])
    around = _joined(len(vertices), faces, normal, angle)
    return _numbers(normal, size / size.sum() if area == "share" else size, angle, around[faces]), vertices[
        faces
    ].mean(dim=1)


def measured(corner: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute unit normals [..., 3], areas [..., 1] and angles [..., 3] of faces with corners [..., 3, 3]."""
    side = corner.roll(-1, -2) - corner  # from each corner to the next
    cross = torch.linalg.cross(side[..., 0, :], -side[..., 2, :])
    double = _length(cross)
    along = side / _length(side)
    cosine = -(along * along.roll(1, -2)).sum(dim=-1)  # at each corner, between the sides that leave it
    return cross / double, double / 2, cosine.clamp(-1 + TINY, 1 - TINY).acos()


def _joined(count: int, faces: torch.Tensor, normal: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """Compute unit normals [N, 3] at vertices from the normals and angles of faces."""
    around = normal.new_zeros(count, 3)
    # index_add sums over all faces of a vertex.
    return F.normalize(
        around.index_add(0, faces.flatten(), (angle[..., None] * normal[:, None]).flatten(0, 1)), dim=1
    )


def vertex_normals(vertices: torch.Tensor, faces: torch.Tensor) -> torch.Tensor:
    """Compute unit normals [N, 3] at vertices [N, 3]."""
    normal, _, angle = measured(vertices[faces])
    return _joined(len(vertices), faces, normal, angle)


def _numbers(
    normal: torch.Tensor, size: torch.Tensor, angle: torch.Tensor, around: torch.Tensor
) -> torch.Tensor:
    """Assemble features [..., 10]. Args: around: [..., 3, 3], normals at the three vertices."""
    dots = (around * normal.unsqueeze(-2)).sum(dim=-1)
    # Sorted, so that the features do not depend on the corner with which a face begins.
    return torch.cat([size, normal, angle.sort(dim=-1).values, dots.sort(dim=-1).values], dim=-1)


def _length(x: torch.Tensor) -> torch.Tensor:
    """Compute lengths [..., 1] of vectors [..., 3], at least TINY, so that the root has a finite gradient."""
    return x.square().sum(dim=-1, keepdim=True).clamp_min(TINY**2).sqrt()


def placed(mesh: Mesh, place: str = "centre") -> torch.Tensor:
    """Express vertices [N, 3] in a frame of the mesh.

    'centre': from the surface's centre, in units of its mean radius. 'box': from the least corner of the
    bounding box, divided by its longest side, as in MeshMAE. 'world': unchanged.
    Differentiable in vertices. Raises: ValueError for another frame.
    """
    alone = Owners(1, *(torch.zeros(len(part), dtype=torch.int64, device=part.device) for part in mesh))
    origin, unit, _ = whereabouts(mesh, alone, place)
    return (mesh.vertices - origin) / unit


class Owners(NamedTuple):
    """Several meshes that are concatenated, and the mesh to which each element belongs."""

    number: int  # of meshes
    vertices: torch.Tensor  # [N] int64, mesh of each vertex
    faces: torch.Tensor  # [M] int64, mesh of each face


def whereabouts(mesh: Mesh, owners: Owners, place: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute origin [A, 3], unit [A, 1] and area [A, 1] of each of A concatenated meshes, in world units.

    Positions are expressed as (x - origin) / unit, see `placed`. A mesh without faces has 0, 1 and 1.
    Differentiable in vertices.
    """
    vertices, faces = mesh
    first, second, third = (vertices.index_select(0, faces[:, i]) for i in range(3))
    size = _length(torch.linalg.cross(second - first, third - first)) / 2  # [M, 1]

    # Sums over the faces of each mesh
    def summed(x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(owners.number, x.shape[1]).index_add(0, owners.faces, x)

    total = summed(size)
    has_area = total.detach() > 0
    area = torch.where(has_area, total, 1.0)
    if place == "box":
        index = owners.vertices[:, None].expand(-1, 3)
        empty = vertices.new_zeros(owners.number, 3)
        least, most = (
            empty.scatter_reduce(0, index, vertices, kind, include_self=False) for kind in ("amin", "amax")
        )
        return (
            least,
            torch.where(has_area, (most - least).amax(dim=1, keepdim=True).clamp_min(TINY), 1.0),
            area,
        )
    if place == "world":
        return vertices.new_zeros(owners.number, 3), vertices.new_ones(owners.number, 1), area
    # Area-weighted centre of the surface, and mean distance from it
    middle = (first + second + third) / 3
    origin = summed(size * middle) / area
    radius = summed(size * _length(middle - origin.index_select(0, owners.faces))) / area
    return origin, torch.where(has_area, radius.clamp_min(TINY), 1.0), area


class Plan(NamedTuple):
    """Assignment of the faces of a mesh to patches, made without gradient.

    Faces may belong to new vertices V' = P V, each of which is a convex mixture of three vertices of the
    mesh.
    """

    source: torch.Tensor | None  # [N', 3] int64, vertices that are mixed; None: the vertices themselves
    weight: torch.Tensor | None  # [N', 3] >= 0, rows sum to 1
    faces: torch.Tensor  # [M', 3] int64, of the new vertices; normals and the total area come from these
    select: torch.Tensor  # [P, F] int64, faces of each patch
    mask: torch.Tensor  # [P] bool; False: no such patch, and its faces have no meaning

    def mixed(self, vertices: torch.Tensor) -> torch.Tensor:
        """Compute V' [N', 3] from vertices [N, 3]. Differentiable in them."""
        if self.source is None or self.weight is None:
            return vertices
        return (vertices[self.source] * self.weight.to(vertices.dtype)[..., None]).sum(dim=1)


def patch_features(vertices: torch.Tensor, plan: Plan, area: str = "share", place: str = "centre") -> Patches:
    """Compute patches [1, P, F, ...] of a mesh whose vertices [N, 3] may have moved since its plan was made.

    A mesh without faces has zeros, all masked. Differentiable in vertices.
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
    """Compute features [A, ..., 10] and centres [A, ..., 3] of some faces of A meshes.

    Args: corner: [A, ..., 3, 3], world units; around: [A, ..., 3, 3], normals at the corners; origin: [A, 3];
        unit, total: [A, 1], see `whereabouts`.
    Differentiable in all arguments.
    """
    wide = (len(corner), *[1] * (corner.ndim - 3))  # for broadcasting over the faces of each mesh
    normal, size, angle = measured(corner)
    size = size / (total if area == "share" else unit**2).view(*wide, 1)
    return _numbers(normal, size, angle, around), (corner.mean(dim=-2) - origin.view(*wide, 3)) / unit.view(
        *wide, 1
    )


# Patches as in MeshMAE: a base mesh of 256 faces, each of which is cut into 64 by three midpoint subdivisions
# and projected back onto the surface.

NEAR = 16  # faces with the nearest centres, among which the nearest point of the surface is searched
_EDGES = ((0, 1), (1, 2), (2, 0))


@torch.no_grad()
def maps(mesh: Mesh, patches: int = 256, faces: int = 64) -> Plan:
    """Create a plan of P patches with F faces.

    Patch p holds faces p, p + P, p + 2 P, ... of the subdivided base.

    The base has P faces, by decimation or by bisection. If the mesh has more separate parts than the base can
    represent, the smallest ones are left out. New vertices are the points of the mesh nearest to those of the
    subdivided base, as convex mixtures of a face's corners, so they follow the mesh when it moves. All
    patches of a mesh without faces are masked.
    Raises: ValueError if the number of faces is not a power of 4, or there are fewer than 4 patches.
    """
    levels = round(math.log(max(faces, 1), 4))
    if faces != 4**levels or patches < 4:
        raise ValueError(
            f"maps: expected at least 4 patches of 4, 16, 64, ... faces, got {patches} patches of {faces}."
            " Use 256 patches of 64 faces, for example."
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
    # numpy in float64: decimation and projection need no gradient.
    vertices = mesh.vertices.detach().double().cpu().numpy()
    old = mesh.faces.cpu().numpy()
    points, new = base(vertices, old, patches)
    for _ in range(levels):
        points, new = subdivided(points, new)
    face, weight = nearest_on(points, vertices[old])
    source, subdivided_faces, weights = (
        torch.from_numpy(part).to(device) for part in (old[face], new, weight.astype(np.float32))
    )
    mask = torch.ones(patches, dtype=torch.bool, device=device)
    return Plan(source, weights / weights.sum(dim=1, keepdim=True), subdivided_faces, select, mask)


def base(vertices: np.ndarray, faces: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Reduce or subdivide a mesh to exactly `count` faces: vertices [N, 3] float64, faces [count, 3]
    int64.
    """
    target = count
    with warnings.catch_warnings():
        # decimate() warns if it kept more faces than requested, which is handled here.
        warnings.simplefilter("ignore")
        points, new = decimate(vertices, faces, target)
        # Decimation may stop above its target, so the target is lowered step by step.
        while len(new) > count and target > max(count // 4, 4):
            target = max(int(0.8 * target), 4)
            points, new = decimate(vertices, faces, target)
    # Still too many: keep the largest parts that fit together.
    if len(new) > count:
        number, part = parts(new, len(points))
        corner = points[new]
        areas = np.linalg.norm(np.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0]), axis=1)
        largest = np.argsort(-np.bincount(part, weights=areas, minlength=number), kind="stable")
        fits = np.bincount(part, minlength=number)[largest].cumsum() <= count
        # If the largest part alone is too large, keep its largest faces.
        kept = np.isin(part, largest[fits]) if fits[0] else np.argsort(-areas, kind="stable")[:count]
        points, new = compact(points, new[kept])
    return _halved(points.astype(np.float64), new.astype(np.int64), count)


def _halved(points: np.ndarray, faces: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Bisect the longest edge, with both faces at it, until there are `count` faces.

    The last bisection may cut only one of the two faces.
    """
    rows = [tuple(row) for row in faces.tolist()]
    where = list(points)
    while len(rows) < count:
        length = {
            tuple(sorted((row[i], row[j]))): float(((where[row[i]] - where[row[j]]) ** 2).sum())
            for row in rows
            for i, j in _EDGES
        }
        # Among equally long edges, the numbers of the ends decide, so the result is deterministic.
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
    """Cut every face into four at the midpoints of its edges.

    The parts of face i are faces i, i + M, i + 2 M and i + 3 M.
    """
    ends = np.sort(faces[:, _EDGES], axis=2).reshape(-1, 2)
    # Faces that share an edge share its midpoint.
    edges, number = np.unique(ends, axis=0, return_inverse=True)
    middle = number.reshape(-1, 3) + len(points)  # of edges 01, 12, 20
    a, b, c = faces.T
    ab, bc, ca = middle.T
    new = np.concatenate(
        [np.stack(corners, axis=1) for corners in ((a, ab, ca), (ab, b, bc), (ca, bc, c), (ab, bc, ca))]
    )
    return np.concatenate([points, points[edges].mean(axis=1)]), new


def nearest_on(points: np.ndarray, triangles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the nearest of triangles [M, 3, 3] to points [Q, 3].

    Only the NEAR triangles with the nearest centres are tried.
    Returns: face numbers [Q], and the nearest points as weights of the corners [Q, 3].
    """
    from scipy.spatial import cKDTree

    # [Q, K]
    near = (
        cKDTree(triangles.mean(axis=1)).query(points, k=min(NEAR, len(triangles)))[1].reshape(len(points), -1)
    )
    weight = closest_on_triangles(triangles[near], points[:, None])  # [Q, K, 3]
    squared = ((weight[..., None] * triangles[near]).sum(axis=2) - points[:, None]) ** 2
    best = squared.sum(axis=2).argmin(axis=1)
    row = np.arange(len(points))
    return near[row, best], weight[row, best]


# Patches that follow the surface: regions that are grown over neighbouring faces with similar normals. This
# is the default, for meshes of any kind. It replaces the mesh fusion of DreamCS, whose algorithm is not
# published. Choices are discrete, so topology has no gradient.

SIMILAR = 0.9  # least cosine between the normals of a face and of its region
RELAX = 0.1  # decrease of this bound when no region can grow
SMALL = 0.1  # regions with less than this share of the mean area join a neighbour


@torch.no_grad()
def regions(mesh: Mesh, patches: int, faces: int) -> Plan:
    """Create a plan of P patches with F faces each.

    If the mesh has fewer than P faces, some patches are masked.

    Seeds are farthest points of the face centres. A region takes neighbouring faces whose normals are within
    `SIMILAR` of its mean normal; the bound is relaxed when no region can grow. Parts without a seed become
    regions of their own. Small regions join a neighbour, and surplus ones the nearest region; then the
    largest regions are halved until there are P. F faces of each region are taken at equal distances of its
    area, from its centre outwards. Large faces may therefore occur twice, and small ones not at all.
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
    """Return the region [M] of each face, 0..min(P, M) - 1; every region has a face."""
    cross = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    double = np.linalg.norm(cross, axis=1)
    normals = cross / np.maximum(double, 1e-12)[:, None]
    areas = double / 2
    centres = triangles.mean(axis=1)
    region_count = min(patches, len(faces))
    pairs = neighbours(faces)
    seeds = farthest_points(torch.from_numpy(centres.T.copy())[None], region_count, "farthest")[0].numpy()
    label = _grow(normals, pairs, seeds)
    label = _merge(label, pairs, areas, centres, region_count)
    return _split(label, areas, centres, region_count)


def neighbours(faces: np.ndarray) -> np.ndarray:
    """Return pairs [K, 2] of faces that share an edge.

    With more than two faces, each is paired with the next one.
    """
    ends = np.sort(faces[:, [[0, 1], [1, 2], [2, 0]]].reshape(-1, 2), axis=1)
    key = ends[:, 0].astype(np.int64) * (int(faces.max(initial=0)) + 1) + ends[:, 1]  # one integer per edge
    order = np.argsort(key, kind="stable")
    same = key[order[1:]] == key[order[:-1]]
    return np.stack([order[:-1][same] // 3, order[1:][same] // 3], axis=1)


def _grow(normals: np.ndarray, pairs: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """Grow the regions of seeds [P]. Parts of the mesh without a seed get numbers from P on."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    label = np.full(len(normals), -1)
    label[seeds] = np.arange(len(seeds))
    total = normals[seeds].copy()
    bound = SIMILAR
    # Neighbours of face i are outer[first[i] : first[i + 1]].
    beside = np.concatenate([pairs, pairs[:, ::-1]])
    beside = beside[np.argsort(beside[:, 0], kind="stable")]
    first = np.searchsorted(beside[:, 0], np.arange(len(normals) + 1))
    outer = beside[:, 1]
    new = seeds
    region = np.zeros(0, dtype=np.int64)
    face = np.zeros(0, dtype=np.int64)
    # Candidates are pairs (region, face): those that were too different so far, and neighbours of new faces.
    while True:
        count = first[new + 1] - first[new]
        # Indices of the neighbours of all new faces, without a loop over faces
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
        while not (similar := likeness >= bound).any():
            bound -= RELAX
        # If several regions can take a face, the last assignment wins, so the most similar region comes last.
        order = np.argsort(likeness[similar], kind="stable")
        new = np.unique(face[similar])
        label[face[similar][order]] = region[similar][order]
        np.add.at(total, label[new], normals[new])
    # Faces that no seed reaches are grouped by connected part.
    unreached = label < 0
    if unreached.any():
        linked = unreached[pairs].all(axis=1)
        size = len(normals)
        graph = coo_array(
            (np.ones(int(linked.sum())), (pairs[linked, 0], pairs[linked, 1])), shape=(size, size)
        )
        part = connected_components(graph, directed=False)[1]
        label[unreached] = len(seeds) + np.unique(part[unreached], return_inverse=True)[1]
    return label


def _merge(
    label: np.ndarray, pairs: np.ndarray, areas: np.ndarray, centres: np.ndarray, most: int
) -> np.ndarray:
    """Merge small and surplus regions. Returns regions numbered 0.. without gaps, at most `most` of them."""
    while True:
        label = np.unique(label, return_inverse=True)[1]
        count = int(label.max()) + 1
        size = np.bincount(label, weights=areas, minlength=count)
        ends = label[pairs]
        ends = ends[ends[:, 0] != ends[:, 1]]
        beside = np.bincount(ends.flatten(), minlength=count) > 0
        small = beside & (size < SMALL * size.mean())
        if count <= most and not small.any():
            return label
        pick = int(np.where(small if small.any() else np.ones(count, dtype=bool), size, np.inf).argmin())
        if beside[pick]:
            # Into the neighbour with the longest common border, counted in edges
            touching = np.concatenate([ends[ends[:, 0] == pick, 1], ends[ends[:, 1] == pick, 0]])
            target = int(np.bincount(touching).argmax())
        else:
            # A region without neighbours is a separate part; it joins the region with the nearest centre.
            middle = _means(label, centres, count)
            distance = np.linalg.norm(middle - middle[pick], axis=1)
            distance[pick] = np.inf
            target = int(distance.argmin())
        label[label == pick] = target


def _split(label: np.ndarray, areas: np.ndarray, centres: np.ndarray, region_count: int) -> np.ndarray:
    """Halve the largest regions until there are `region_count`, which must not exceed the number of faces."""
    count = int(label.max()) + 1
    while count < region_count:
        size = np.bincount(label, weights=areas, minlength=count)
        size[np.bincount(label, minlength=count) < 2] = -1  # a single face cannot be halved
        members = np.flatnonzero(label == size.argmax())
        # Two faces far apart are the centres of both halves.
        places = centres[members]
        first = places[np.linalg.norm(places - places.mean(0), axis=1).argmax()]
        second = places[np.linalg.norm(places - first, axis=1).argmax()]
        nearer = np.linalg.norm(places - second, axis=1) < np.linalg.norm(places - first, axis=1)
        nearer[-1] |= not nearer.any()  # if all centres coincide, split off one face
        label[members[nearer]] = count
        count += 1
    return label


def _means(label: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    """Average values [M, 3] over each region, [count, 3]."""
    number = np.bincount(label, minlength=count)
    return (
        np.stack([np.bincount(label, weights=column, minlength=count) for column in values.T], axis=1)
        / number[:, None]
    )


def _evenly(triangles: np.ndarray, label: np.ndarray, count: int, faces: int) -> np.ndarray:
    """Select F faces [count, F] of each region, at equal distances of its area, from its centre outwards."""
    centres = triangles.mean(axis=1)
    distance = np.linalg.norm(centres - _means(label, centres, count)[label], axis=1)
    order = np.lexsort((distance, label))
    cross = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    area = np.linalg.norm(cross, axis=1)[order] + 1e-12  # faces without area still have a place
    until = area.cumsum()
    last = np.searchsorted(label[order], np.arange(count), side="right") - 1
    first = np.concatenate([[0], last[:-1] + 1])
    start = until[first] - area[first]
    end = until[last]
    at = start[:, None] + (end - start)[:, None] * (np.arange(faces) + 0.5) / faces
    # The clip keeps rounding from selecting a face of a neighbouring region.
    return order[np.searchsorted(until, at).clip(first[:, None], last[:, None])]
