"""Patches as MeshMAE has them: a base of 256 faces, each cut into 64 by three midpoint subdivisions, laid back onto the surface.

Letters: N vertices, M faces; P patches, F = 4^levels faces of a patch; Q points, K candidate faces.
"""

import math
import warnings

import numpy as np
import torch

from eg3d_rlhf.core.interfaces import Mesh
from eg3d_rlhf.geometry.mesh import compact, decimate, parts
from eg3d_rlhf.rewards.meshes.meshing.features import Plan

NEAR = 16  # faces whose centres are nearest to a point: on one of them lies what it is laid onto
_EDGES = ((0, 1), (1, 2), (2, 0))


@torch.no_grad()
def maps(mesh: Mesh, patches: int = 256, faces: int = 64) -> Plan:
    """A plan of P patches with F faces; patch p holds faces p, p + P, p + 2 P, ... of the subdivided base.

    The base is decimated to P faces, or halved up to them; where the mesh falls into more parts than the base has room for, the smallest
    ones are left out. New vertices are the points of the mesh nearest to those of the subdivided base, as convex mixtures of a face's
    corners, so they follow the mesh when it moves. A mesh without faces has masked patches.
    Raises: ValueError for a number of faces that is no power of 4, or fewer than 4 patches.
    """
    levels = round(math.log(max(faces, 1), 4))
    if faces != 4**levels or patches < 4:
        raise ValueError(f"maps: expected at least 4 patches of 4, 16, 64, ... faces, got {patches} of {faces}. Choose 256 of 64.")
    device = mesh.faces.device
    select = torch.arange(patches * faces, device=device).view(faces, patches).T
    if not len(mesh.faces):
        return Plan(None, None, mesh.faces, torch.zeros_like(select), torch.zeros(patches, dtype=torch.bool, device=device))
    vertices, old = mesh.vertices.detach().double().cpu().numpy(), mesh.faces.cpu().numpy()
    points, new = base(vertices, old, patches)
    for _ in range(levels):
        points, new = subdivided(points, new)
    face, weight = nearest_on(points, vertices[old])
    source, made, weights = (torch.from_numpy(part).to(device) for part in (old[face], new, weight.astype(np.float32)))
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
        kept = np.isin(part, largest[held]) if held[0] else np.argsort(-areas, kind="stable")[:count]  # one part that would not go lower
        points, new = compact(points, new[kept])
    return _halved(points.astype(np.float64), new.astype(np.int64), count)


def _halved(points: np.ndarray, faces: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Up to `count` faces, by halving the longest edge and both faces at it; one face alone where there is room for one."""
    rows, where = [tuple(row) for row in faces.tolist()], list(points)
    while len(rows) < count:
        length = {tuple(sorted((row[i], row[j]))): float(((where[row[i]] - where[row[j]]) ** 2).sum()) for row in rows for i, j in _EDGES}
        edge = max(length, key=lambda one: (length[one], one))
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
    """Every face in four by the middles of its edges; the parts of face i are faces i, i + M, i + 2 M, i + 3 M."""
    ends = np.sort(faces[:, _EDGES], axis=2).reshape(-1, 2)
    edges, number = np.unique(ends, axis=0, return_inverse=True)
    middle = number.reshape(-1, 3) + len(points)  # of edges 01, 12, 20
    (a, b, c), (ab, bc, ca) = faces.T, middle.T
    new = np.concatenate([np.stack(one, axis=1) for one in ((a, ab, ca), (ab, b, bc), (ca, bc, c), (ab, bc, ca))])
    return np.concatenate([points, points[edges].mean(axis=1)]), new


def nearest_on(points: np.ndarray, triangles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For points [Q, 3]: the face [Q] of triangles [M, 3, 3] that is nearest, and the nearest place on it as weights [Q, 3] of its corners.

    Only the NEAR faces with the nearest centres are looked at.
    """
    from scipy.spatial import cKDTree

    near = cKDTree(triangles.mean(axis=1)).query(points, k=min(NEAR, len(triangles)))[1].reshape(len(points), -1)  # [Q, K]
    weight = _weights(points[:, None], triangles[near])  # [Q, K, 3]
    away = ((weight[..., None] * triangles[near]).sum(axis=2) - points[:, None]) ** 2
    best = away.sum(axis=2).argmin(axis=1)
    row = np.arange(len(points))
    return near[row, best], weight[row, best]


def _weights(point: np.ndarray, corner: np.ndarray) -> np.ndarray:
    """Weights [Q, K, 3] of corners [Q, K, 3, 3] at the place nearest to a point [Q, 1, 3] on each triangle."""

    def dot(u, v):
        return (u * v).sum(axis=-1)

    a, u, v = corner[:, :, 0], corner[:, :, 1] - corner[:, :, 0], corner[:, :, 2] - corner[:, :, 0]
    d, uu, uv, vv = point - a, dot(u, u), dot(u, v), dot(v, v)
    flat = np.maximum(uu * vv - uv * uv, 1e-300)
    second, third = (vv * dot(u, d) - uv * dot(v, d)) / flat, (uu * dot(v, d) - uv * dot(u, d)) / flat
    inside = np.stack([1 - second - third, second, third], axis=-1)
    best, least = inside, np.where((inside >= 0).all(axis=-1), dot(d - (second[..., None] * u + third[..., None] * v), d), np.inf)
    for i, j in _EDGES:
        side = corner[:, :, j] - corner[:, :, i]
        along = np.clip(dot(point - corner[:, :, i], side) / np.maximum(dot(side, side), 1e-300), 0, 1)
        away = point - corner[:, :, i] - along[..., None] * side
        on_edge = np.zeros_like(inside)
        on_edge[..., i], on_edge[..., j] = 1 - along, along
        nearer = dot(away, away) < least
        best, least = np.where(nearer[..., None], on_edge, best), np.where(nearer, dot(away, away), least)
    return best
