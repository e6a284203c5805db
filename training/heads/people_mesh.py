"""Signed distances to a head's mesh without any library but scipy: the nearest triangle by a search tree, the
side by the winding number.

The winding number (Jacobson et al. 2013) is the sum of the signed solid angles of all triangles over 4 pi: 1
inside, 0 outside, and in between near what is open, such as lids and the mouth. Far groups of triangles count
as one dipole (Barill et al. 2018, order 1).

Shape letters: V vertices, T triangles, P points, G groups of triangles, B points of a block.
"""

import contextlib
import functools
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt as edt
from scipy.spatial import cKDTree

from torch_utils.build import cache_dir
from training.heads.people import ASSET, Head, bust_end, cross_2d, load_basis, named_people
from training.storage import write_atomic

NEIGHBOURS = 10  # samples of the surface whose triangles may be nearest
SAMPLE = 0.012  # no two neighbouring samples of a triangle are farther apart, about; world units
CLEAR = 6.0  # beyond so many samples' distances the nearest sample alone is asked
GROUP = 24  # triangles of a group, about
FAR = 2.0  # a group counts as one dipole beyond so many of its radii
BLOCK = 192  # points that share their list of near groups


def solid_angles(corners: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Signed solid angles [P, T] of triangles [T, 3, 3] seen from points [P, 3] (Van Oosterom and Strackee
    1983).
    """
    # each three [P, T]
    a, b, c = ([corners[None, :, i, d] - points[:, None, d] for d in range(3)] for i in range(3))
    la, lb, lc = (np.sqrt(_dot(v, v)) for v in (a, b, c))
    crossed = [b[1] * c[2] - b[2] * c[1], b[2] * c[0] - b[0] * c[2], b[0] * c[1] - b[1] * c[0]]
    return 2 * np.arctan2(
        _dot(a, crossed), la * lb * lc + _dot(a, b) * lc + _dot(b, c) * la + _dot(c, a) * lb
    )


def _dot(u: Sequence[np.ndarray], v: Sequence[np.ndarray]) -> np.ndarray:
    """Of vectors by their three components: several times as fast as a sum over a short last axis."""
    return u[0] * v[0] + u[1] * v[1] + u[2] * v[2]


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Triangles in groups of neighbours."""

    order: np.ndarray  # [T] triangles, group by group
    start: np.ndarray  # [G + 1] of each group in it
    centre: np.ndarray  # [G, 3]
    radius: np.ndarray  # [G]
    dipole: np.ndarray  # [G, 3] sum of area times normal


def _grouped(corners: np.ndarray) -> Groups:
    middle = corners.mean(axis=1)
    groups = [np.arange(len(corners))]
    while len(groups[0]) > GROUP:  # halved along the longest side
        halves = []
        for group in groups:
            axis = np.ptp(middle[group], axis=0).argmax()
            rank = group[np.argsort(middle[group, axis], kind="stable")]
            halves += [rank[: len(rank) // 2], rank[len(rank) // 2 :]]
        groups = halves
    start = np.cumsum([0] + [len(group) for group in groups])
    order = np.concatenate(groups)
    area = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]) / 2  # [T, 3]
    weight = np.linalg.norm(area, axis=1, keepdims=True) + 1e-12
    sums = lambda values: np.add.reduceat(values[order], start[:-1])  # noqa: E731
    centre = sums(weight * middle) / sums(weight)
    owner = np.repeat(np.arange(len(groups)), np.diff(start))
    reach = np.linalg.norm(corners[order] - centre[owner, None], axis=2).max(axis=1)
    return Groups(
        order=order,
        start=start,
        centre=centre,
        radius=np.maximum.reduceat(reach, start[:-1]),
        dipole=sums(area),
    )


def winding_number(corners: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Winding numbers [P] of points [P, 3] about triangles [T, 3, 3] whose normals point outwards."""
    corners = corners.astype(np.float64)
    points = points.astype(np.float64)
    groups = _grouped(corners)
    result = np.zeros(len(points))
    for block in _blocks(points):
        at = points[block]
        middle = (at.min(axis=0) + at.max(axis=0)) / 2
        spread = np.linalg.norm(at - middle, axis=1).max()
        far = np.linalg.norm(groups.centre - middle, axis=1) > FAR * groups.radius + spread
        way = groups.centre[far] - at[:, None]  # [B, G, 3]
        total = np.einsum("bgd,gd,bg->b", way, groups.dipole[far], (way * way).sum(axis=2) ** -1.5)
        near = [groups.order[groups.start[i] : groups.start[i + 1]] for i in np.flatnonzero(~far)]
        if near:
            total += solid_angles(corners[np.concatenate(near)], at).sum(axis=1)
        result[block] = total / (4 * np.pi)
    return result


def _blocks(points: np.ndarray) -> list[np.ndarray]:
    """Indices of neighbouring points, at most BLOCK at a time."""
    blocks = []
    todo = [np.arange(len(points))] if len(points) else []
    while todo:
        block = todo.pop()
        if len(block) <= BLOCK:
            blocks.append(block)
            continue
        axis = np.ptp(points[block], axis=0).argmax()
        half = len(block) // 2
        rank = block[np.argpartition(points[block, axis], half)]
        todo += [rank[:half], rank[half:]]
    return blocks


def closest_on_triangles(corners: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Weights [..., 3] of the corners at the places of triangles [..., 3, 3] that are nearest to points
    [..., 3], which may broadcast.
    """

    def dot(u, v):
        return _dot(np.moveaxis(u, -1, 0), np.moveaxis(v, -1, 0))

    a = corners[..., 0, :]
    u = corners[..., 1, :] - corners[..., 0, :]
    v = corners[..., 2, :] - corners[..., 0, :]
    d = points - a
    uu = dot(u, u)
    uv = dot(u, v)
    vv = dot(v, v)
    flat = np.maximum(uu * vv - uv * uv, 1e-300)
    second = (vv * dot(u, d) - uv * dot(v, d)) / flat
    third = (uu * dot(v, d) - uv * dot(u, d)) / flat
    inside = np.stack([1 - second - third, second, third], axis=-1)
    best = inside
    least = np.where(
        (inside >= 0).all(axis=-1), dot(d - (second[..., None] * u + third[..., None] * v), d), np.inf
    )
    for i, j in ((0, 1), (1, 2), (2, 0)):  # else on an edge
        side = corners[..., j, :] - corners[..., i, :]
        along = np.clip(dot(points - corners[..., i, :], side) / np.maximum(dot(side, side), 1e-300), 0, 1)
        away = points - corners[..., i, :] - along[..., None] * side
        on_edge = np.zeros_like(inside)
        on_edge[..., i], on_edge[..., j] = 1 - along, along
        nearer = dot(away, away) < least
        best = np.where(nearer[..., None], on_edge, best)
        least = np.where(nearer, dot(away, away), least)
    return best


@functools.cache
def _sample_weights(parts: int) -> np.ndarray:
    """Weights [S, 3] of the middles of a triangle's parts^2 equal pieces."""
    rows = []
    for i in range(parts):
        for j in range(parts - i):
            rows.append((i + 1 / 3, j + 1 / 3))
            if i + j < parts - 1:
                rows.append((i + 2 / 3, j + 2 / 3))
    s = np.array(rows) / parts
    return np.concatenate([s, 1 - s.sum(axis=1, keepdims=True)], axis=1)


def nearest_places(corners: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nearest triangle [P] of [T, 3, 3], weights [P, 3] of its corners at the nearest place, and the distance
    [P] >= 0.
    """
    longest = np.linalg.norm(corners - np.roll(corners, 1, axis=1), axis=2).max(axis=1)
    parts = np.clip(np.ceil(longest / SAMPLE), 1, 6).astype(int)
    samples = []
    owners = []
    for count in np.unique(parts):
        chosen = np.flatnonzero(parts == count)
        places = np.einsum("sc,tcd->tsd", _sample_weights(int(count)), corners[chosen])
        samples.append(places.reshape(-1, 3))
        owners.append(np.repeat(chosen, places.shape[1]))
    tree = cKDTree(np.concatenate(samples))
    owner = np.concatenate(owners)
    triangle = np.empty(len(points), int)
    weights = np.empty((len(points), 3))
    distance = np.empty(len(points))
    away, sample = tree.query(points, eps=0.01)
    far = away > CLEAR * SAMPLE
    for rows, count in ((np.flatnonzero(far), 1), (np.flatnonzero(~far), NEIGHBOURS)):
        for piece in np.array_split(rows, len(rows) // 20_000 + 1):
            chosen = sample[piece, None] if count == 1 else tree.query(points[piece], count)[1]
            candidates = owner[chosen]  # [p, count]
            at = np.repeat(points[piece], count, axis=0)
            flat = candidates.ravel()
            shares = closest_on_triangles(corners[flat], at)
            lengths = np.linalg.norm(np.einsum("pc,pcd->pd", shares, corners[flat]) - at, axis=1).reshape(
                candidates.shape
            )
            best = lengths.argmin(axis=1)
            row = np.arange(len(piece))
            triangle[piece] = candidates[row, best]
            distance[piece] = lengths[row, best]
            weights[piece] = shares.reshape(*candidates.shape, 3)[row, best]
    return triangle, weights, distance


def grid_points(resolution: int) -> np.ndarray:
    """Middles [n, n, n, 3] of the voxels of the cube, axes x, y, z."""
    steps = (np.arange(resolution) + 0.5) / resolution - 0.5
    return np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1)


BACK = -0.02  # world z; behind it is the back of a head, by whose volume errors are stated
BASE = -0.30  # world y; neck and shoulders below do not count
FACE = (0.08, -0.13, 0.07)  # half a width, lowest and highest y of the window over brows, nose and mouth
GRID_VERSION = 2  # of what `head_grid` gives
BAND = 1.8  # voxels about the surface in which distances are exact


def crossings(corners: np.ndarray, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How often lines along z enter and leave a mesh: counts [n, n, n] of signed crossings behind each point
    and in front of it.

    For a closed mesh both are the winding number. Args: corners: [T, 3, 3], normals outwards; steps: [n] even
    coordinates along each axis.
    """
    n = len(steps)
    first = steps[0]
    width = steps[1] - steps[0]
    flat = corners[:, :, :2]
    low = np.clip(np.ceil((flat.min(axis=1) - first) / width).astype(int), 0, n)
    high = np.clip(np.floor((flat.max(axis=1) - first) / width).astype(int) + 1, 0, n)
    extent = np.clip(high - low, 0, None)
    count = extent.prod(axis=1)
    index = np.repeat(np.arange(len(corners)), count)
    within = np.arange(len(index)) - np.repeat(np.cumsum(count) - count, count)
    i = low[index, 0] + within // extent[index, 1]
    j = low[index, 1] + within % extent[index, 1]
    point = first + width * np.stack([i, j], axis=1) + 1e-7  # not through vertices
    a, b, c = (flat[index, corner] for corner in range(3))
    area = cross_2d(b - a, c - a)
    share = np.stack(
        [cross_2d(c - b, point - b), cross_2d(a - c, point - c), cross_2d(b - a, point - a)], axis=1
    )
    hit = (np.abs(area) > 1e-15) & ((share * np.sign(area)[:, None]) >= 0).all(axis=1)
    weights = share[hit] / area[hit, None]
    place = ((weights * corners[index[hit], :, 2]).sum(axis=1) - first) / width
    layer = np.clip(np.ceil(place).astype(int), 0, n)  # the first point in front of it
    sign = np.sign(area[hit]).astype(int)
    steps_up = np.zeros((n, n, n + 1), int)
    np.add.at(steps_up, (i[hit], j[hit], layer), -sign)  # normals to the back enter
    behind = steps_up.cumsum(axis=2)
    return behind[:, :, :n], (behind - behind[:, :, -1:])[:, :, :n]


def head_grid(head: Head, resolution: int) -> np.ndarray:
    """Signed distance of the whole head, closed below, at the middles of the cube's voxels [n, n, n];
    negative inside, world units.

    Exact within BAND voxels of the surface; beyond, right to a voxel, and to four about the end
    of the bust. Where lines along z do not tell the side, as at open lids, the winding number does.
    """
    corners = head.vertices[load_basis().triangles].astype(np.float64)
    points = grid_points(resolution)
    behind, before = crossings(corners, points[:, 0, 0, 0])
    inside = behind > 0
    asked = (behind != before) | (behind < 0) | (behind > 1)
    inside[asked] = winding_number(corners, points[asked]) > 0.5
    end = bust_end(points)
    solid = inside & (end < 0)
    distance = np.where(solid, -1, 1) * (edt(solid) + edt(~solid) - 0.5) / resolution
    near = np.abs(distance) < BAND / resolution
    _, _, exact = nearest_places(corners, points[near])
    distance[near] = np.maximum(np.where(inside[near], -exact, exact), end[near])
    return distance


def whole_grids(z: torch.Tensor, resolution: int = 64) -> np.ndarray:
    """`head_grid` of the whole heads that latents [N, 64] name: [N, n, n, n] float32. Each is kept in the
    user's cache.
    """
    return np.stack([_whole_grid(row, resolution) for row in z.detach().cpu().float().numpy()])


def _whole_grid(z: np.ndarray, resolution: int) -> np.ndarray:
    name = hashlib.sha256(z.tobytes() + f"{resolution} {GRID_VERSION}".encode() + _basis_hash()).hexdigest()[
        :20
    ]
    path = cache_dir().parent / "heads" / f"{name}.npy"
    try:
        return np.load(path).astype(np.float32)
    except (OSError, ValueError):
        grid = head_grid(named_people(z[None])[0], resolution).astype(np.float16)
    with contextlib.suppress(OSError):  # a full or closed disk: it is made again next time
        buffer = io.BytesIO()
        np.save(buffer, grid)
        write_atomic(path, buffer.getvalue())
    return grid.astype(np.float32)


@functools.cache
def _basis_hash() -> bytes:
    return hashlib.sha256(ASSET.read_bytes()).digest()
