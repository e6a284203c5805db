"""Signed distances to a head's mesh: the nearest triangle by a search tree, the sign by the winding number.

Besides numpy this needs scipy only. The winding number (Jacobson et al. 2013) is the sum of the signed solid
angles of all triangles, divided by 4 pi. It is 1 inside and 0 outside, and lies between them near openings,
such as lids and the mouth. Distant groups of triangles are approximated by one dipole (Barill et al. 2018,
order 1).

Shape letters: V vertices, T triangles, P points, G groups of triangles, B points of a block, n voxels per
edge.
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

NEIGHBOURS = 10  # surface samples whose triangles are candidates for the nearest one
SAMPLE = 0.012  # approximate largest distance between neighbouring samples of a triangle, world units
CLEAR = 6.0  # beyond this many SAMPLE, only the triangle of the nearest sample is a candidate
GROUP = 24  # approximate largest number of triangles in a group
FAR = 2.0  # a group is approximated by a dipole beyond this many of its radii
BLOCK = 192  # largest number of points that share their list of near groups


def solid_angles(corners: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return signed solid angles [P, T] of triangles [T, 3, 3] seen from points [P, 3].

    Formula of Van Oosterom and Strackee (1983).
    """
    # Vectors from the points to the corners: three arrays [P, T] each, one per axis.
    a, b, c = ([corners[None, :, i, d] - points[:, None, d] for d in range(3)] for i in range(3))
    la, lb, lc = (np.sqrt(_dot(v, v)) for v in (a, b, c))
    crossed = [b[1] * c[2] - b[2] * c[1], b[2] * c[0] - b[0] * c[2], b[0] * c[1] - b[1] * c[0]]
    return 2 * np.arctan2(
        _dot(a, crossed), la * lb * lc + _dot(a, b) * lc + _dot(b, c) * la + _dot(c, a) * lb
    )


def _dot(u: Sequence[np.ndarray], v: Sequence[np.ndarray]) -> np.ndarray:
    """Return scalar products of vectors given as three arrays of components.

    This is several times as fast as a sum over a last axis of length 3.
    """
    return u[0] * v[0] + u[1] * v[1] + u[2] * v[2]


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Triangles in groups of neighbours, for the approximation by dipoles."""

    order: np.ndarray  # [T] indices of triangles, group by group
    start: np.ndarray  # [G + 1] start of each group in `order`, and its end
    centre: np.ndarray  # [G, 3] mean position, weighted by area
    radius: np.ndarray  # [G] distance of the farthest corner from the centre
    dipole: np.ndarray  # [G, 3] sum of area times normal


def _grouped(corners: np.ndarray) -> Groups:
    """Divide triangles [T, 3, 3] into groups of neighbours."""
    middle = corners.mean(axis=1)
    groups = [np.arange(len(corners))]
    # All groups are halved together, each along its longest side, so their sizes differ by one at most.
    while len(groups[0]) > GROUP:
        halves = []
        for group in groups:
            axis = np.ptp(middle[group], axis=0).argmax()
            rank = group[np.argsort(middle[group, axis], kind="stable")]
            halves += [rank[: len(rank) // 2], rank[len(rank) // 2 :]]
        groups = halves
    start = np.cumsum([0] + [len(group) for group in groups])
    order = np.concatenate(groups)
    area = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]) / 2  # [T, 3]
    weight = np.linalg.norm(area, axis=1, keepdims=True) + 1e-12  # avoids 0 / 0 for degenerate triangles
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
    """Return winding numbers [P] of points [P, 3] for triangles [T, 3, 3] with outward normals."""
    corners = corners.astype(np.float64)
    points = points.astype(np.float64)
    groups = _grouped(corners)
    result = np.zeros(len(points))
    # Points of a block are close together, and share the decision which groups are far.
    for block in _blocks(points):
        at = points[block]
        middle = (at.min(axis=0) + at.max(axis=0)) / 2
        spread = np.linalg.norm(at - middle, axis=1).max()
        # Far from every point of the block, hence the spread.
        far = np.linalg.norm(groups.centre - middle, axis=1) > FAR * groups.radius + spread
        way = groups.centre[far] - at[:, None]  # [B, G, 3]
        # Solid angle of a dipole: way . dipole / |way|^3.
        total = np.einsum("bgd,gd,bg->b", way, groups.dipole[far], (way * way).sum(axis=2) ** -1.5)
        near = [groups.order[groups.start[i] : groups.start[i + 1]] for i in np.flatnonzero(~far)]
        if near:
            total += solid_angles(corners[np.concatenate(near)], at).sum(axis=1)
        result[block] = total / (4 * np.pi)
    return result


def _blocks(points: np.ndarray) -> list[np.ndarray]:
    """Return lists of indices of neighbouring points, at most BLOCK in each."""
    blocks = []
    todo = [np.arange(len(points))] if len(points) else []
    while todo:
        block = todo.pop()
        if len(block) <= BLOCK:
            blocks.append(block)
            continue
        axis = np.ptp(points[block], axis=0).argmax()
        half = len(block) // 2
        # A partition, not a sort: only the halves matter.
        rank = block[np.argpartition(points[block, axis], half)]
        todo += [rank[:half], rank[half:]]
    return blocks


def closest_on_triangles(corners: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return the places of triangles that are nearest to points, as weights [..., 3] of the corners.

    Args:
        corners: [..., 3, 3]; points: [..., 3]. They may broadcast.
    """

    def dot(u, v):
        return _dot(np.moveaxis(u, -1, 0), np.moveaxis(v, -1, 0))

    # First the projection onto the triangle's plane: p = a + second u + third v, from the normal equations.
    a = corners[..., 0, :]
    u = corners[..., 1, :] - corners[..., 0, :]
    v = corners[..., 2, :] - corners[..., 0, :]
    d = points - a
    uu = dot(u, u)
    uv = dot(u, v)
    vv = dot(v, v)
    flat = np.maximum(uu * vv - uv * uv, 1e-300)  # squared area; the bound covers degenerate triangles
    second = (vv * dot(u, d) - uv * dot(v, d)) / flat
    third = (uu * dot(v, d) - uv * dot(u, d)) / flat
    inside = np.stack([1 - second - third, second, third], axis=-1)
    best = inside
    least = np.where(
        (inside >= 0).all(axis=-1), dot(d - (second[..., None] * u + third[..., None] * v), d), np.inf
    )
    # Outside the triangle the nearest place is on an edge; all three are compared.
    for i, j in ((0, 1), (1, 2), (2, 0)):
        side = corners[..., j, :] - corners[..., i, :]
        along = np.clip(dot(points - corners[..., i, :], side) / np.maximum(dot(side, side), 1e-300), 0, 1)
        offset = points - corners[..., i, :] - along[..., None] * side
        on_edge = np.zeros_like(inside)
        on_edge[..., i], on_edge[..., j] = 1 - along, along
        nearer = dot(offset, offset) < least
        best = np.where(nearer[..., None], on_edge, best)
        least = np.where(nearer, dot(offset, offset), least)
    return best


@functools.cache
def _sample_weights(parts: int) -> np.ndarray:
    """Return weights [S, 3] of the centres of the parts^2 equal pieces of a triangle."""
    rows = []
    for i in range(parts):
        for j in range(parts - i):
            # An upright piece, and the inverted one beside it, which the last of a row does not have.
            rows.append((i + 1 / 3, j + 1 / 3))
            if i + j < parts - 1:
                rows.append((i + 2 / 3, j + 2 / 3))
    s = np.array(rows) / parts
    return np.concatenate([s, 1 - s.sum(axis=1, keepdims=True)], axis=1)


def nearest_places(corners: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the nearest place of a mesh for each point.

    Args:
        corners: [T, 3, 3]; points: [P, 3].
    Returns: nearest triangle [P], weights [P, 3] of its corners at the nearest place, and distance [P] >= 0.
    """
    # The tree finds surface samples that are near; exact distances are computed to their triangles only.
    # Large triangles get more samples.
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
    sample_distance, sample = tree.query(points, eps=0.01)
    # Far from the surface all candidates are about equally near, so one is enough.
    far = sample_distance > CLEAR * SAMPLE
    for rows, count in ((np.flatnonzero(far), 1), (np.flatnonzero(~far), NEIGHBOURS)):
        # Pieces bound the memory.
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
    """Return the centres [n, n, n, 3] of the voxels of the cube of side 1, axes x, y, z."""
    steps = (np.arange(resolution) + 0.5) / resolution - 0.5
    return np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1)


BACK = -0.02  # world z; the back of a head, whose volume errors are reported, is where z is smaller
BASE = -0.30  # world y; neck and shoulders below are not counted
FACE = (0.08, -0.13, 0.07)  # half width, lowest and highest y of the window over brows, nose and mouth
GRID_VERSION = 2  # part of the cache key; raise it when the values of `head_grid` change
BAND = 1.8  # voxels on each side of the surface in which distances are exact


def crossings(corners: np.ndarray, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Count how often lines along z enter and leave a mesh, behind each grid point and in front of it.

    For a closed mesh both counts are the winding number.

    Args:
        corners: [T, 3, 3], normals outwards.
        steps: [n] evenly spaced coordinates, the same along each axis.
    Returns: signed counts [n, n, n] at smaller z, and at larger z, than each point.
    """
    n = len(steps)
    first = steps[0]
    width = steps[1] - steps[0]
    flat = corners[:, :, :2]
    # The range of grid lines (x, y) that can hit each triangle.
    low = np.clip(np.ceil((flat.min(axis=1) - first) / width).astype(int), 0, n)
    high = np.clip(np.floor((flat.max(axis=1) - first) / width).astype(int) + 1, 0, n)
    extent = np.clip(high - low, 0, None)
    count = extent.prod(axis=1)
    # One row per pair of triangle and line.
    index = np.repeat(np.arange(len(corners)), count)
    within = np.arange(len(index)) - np.repeat(np.cumsum(count) - count, count)
    i = low[index, 0] + within // extent[index, 1]
    j = low[index, 1] + within % extent[index, 1]
    # Shifted a little, because a line through a vertex would hit several triangles at once.
    point = first + width * np.stack([i, j], axis=1) + 1e-7
    a, b, c = (flat[index, corner] for corner in range(3))
    area = cross_2d(b - a, c - a)
    share = np.stack(
        [cross_2d(c - b, point - b), cross_2d(a - c, point - c), cross_2d(b - a, point - a)], axis=1
    )
    hit = (np.abs(area) > 1e-15) & ((share * np.sign(area)[:, None]) >= 0).all(axis=1)
    weights = share[hit] / area[hit, None]
    place = ((weights * corners[index[hit], :, 2]).sum(axis=1) - first) / width  # z of the hit, in grid steps
    layer = np.clip(np.ceil(place).astype(int), 0, n)  # the first point in front of it
    sign = np.sign(area[hit]).astype(int)
    counts = np.zeros((n, n, n + 1), int)
    # A triangle whose normal points to the back (area < 0) is entered when z grows. np.add.at counts repeated
    # places, which plain indexing would not.
    np.add.at(counts, (i[hit], j[hit], layer), -sign)
    at_smaller_z = counts.cumsum(axis=2)
    return at_smaller_z[:, :, :n], (at_smaller_z - at_smaller_z[:, :, -1:])[:, :, :n]


def head_grid(head: Head, resolution: int) -> np.ndarray:
    """Return the signed distance of an intact head, closed at the bottom, at the centres of the cube's
    voxels.

    Distances are exact within BAND voxels of the surface. Beyond, they are right to a voxel, and to four
    voxels about the end of the bust. The sign comes from counting crossings along z. Where the counts from
    both sides disagree, as at open lids, it comes from the winding number.

    Returns: [n, n, n], negative inside, world units.
    """
    corners = head.vertices[load_basis().triangles].astype(np.float64)
    points = grid_points(resolution)
    below_crossings, above_crossings = crossings(corners, points[:, 0, 0, 0])
    inside = below_crossings > 0
    # Winding numbers cost much more than crossings, so they are computed for ambiguous voxels only.
    ambiguous = (below_crossings != above_crossings) | (below_crossings < 0) | (below_crossings > 1)
    inside[ambiguous] = winding_number(corners, points[ambiguous]) > 0.5
    end = bust_end(points)
    solid = inside & (end < 0)
    # The distance transform counts whole voxels; the surface lies half a voxel before the first one outside.
    distance = np.where(solid, -1, 1) * (edt(solid) + edt(~solid) - 0.5) / resolution
    near = np.abs(distance) < BAND / resolution
    _, _, exact = nearest_places(corners, points[near])
    distance[near] = np.maximum(np.where(inside[near], -exact, exact), end[near])
    return distance


def whole_grids(z: torch.Tensor, resolution: int = 64) -> np.ndarray:
    """Return `head_grid` of the ground-truth heads of latents [N, 64], as float32 [N, n, n, n].

    Each grid is kept in the user's cache.
    """
    return np.stack([_whole_grid(row, resolution) for row in z.detach().cpu().float().numpy()])


def _whole_grid(z: np.ndarray, resolution: int) -> np.ndarray:
    """Return the grid of one latent [64], from the cache if it is there."""
    # Named by everything that the grid depends on.
    key = z.tobytes() + f"{resolution} {GRID_VERSION}".encode() + _basis_hash()
    name = hashlib.sha256(key).hexdigest()[:20]
    path = cache_dir().parent / "heads" / f"{name}.npy"
    try:
        return np.load(path).astype(np.float32)
    except (OSError, ValueError):
        # Rounded to half precision before use, so that the first call returns the same as later ones.
        grid = head_grid(named_people(z[None])[0], resolution).astype(np.float16)
    # On a full or read-only disk the grid is not kept, and is computed again next time.
    with contextlib.suppress(OSError):
        buffer = io.BytesIO()
        np.save(buffer, grid)
        write_atomic(path, buffer.getvalue())
    return grid.astype(np.float32)


@functools.cache
def _basis_hash() -> bytes:
    """Return the hash of the basis file. Another basis would give other heads for the same latents."""
    return hashlib.sha256(ASSET.read_bytes()).digest()
