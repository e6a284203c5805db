"""Faces of any number of corners as triangles, concave ones too.

Letters: V vertices, F faces, C corners of all faces, T triangles, N corners of one face.
"""

import numpy as np

MAX_CORNERS = 4096  # of one face


def triangulated(
    positions: np.ndarray, corners: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The triangles of faces, each a run of corners.

    A quad is cut along the diagonal that leaves the better two triangles; a larger face loses its ears
    (Meisters 1975), in the plane of its area (Newell). No corner is added, and the winding stays. Faces of
    fewer than three corners are left out.

    Args: positions [V, 3]; corners [C], vertices, one face's after the other's; counts [F], corners of each.
    Returns: triangles [T, 3] as places in `corners`, and the face [T] of each, which rises.
    Raises: ValueError for a face of more than MAX_CORNERS.
    """
    counts = np.asarray(counts, dtype=np.int64)
    if counts.max(initial=0) > MAX_CORNERS:
        raise ValueError(f"expected faces of up to {MAX_CORNERS:,} corners, got one of {counts.max():,}")
    start = np.cumsum(counts) - counts
    points = np.asarray(positions, dtype=np.float64)
    three = np.flatnonzero(counts == 3)
    four = np.flatnonzero(counts == 4)
    found = [start[three, None] + np.arange(3), _of_quads(points, corners, start[four])]
    faces = [three, np.repeat(four, 2)]
    for number in np.flatnonzero(counts > 4):
        ears = _of_polygon(points[corners[start[number] : start[number] + counts[number]]])
        found.append(start[number] + ears)
        faces.append(np.full(len(ears), number))
    face = np.concatenate(faces)
    order = np.argsort(face, kind="stable")
    return np.concatenate(found)[order], face[order]


def _of_quads(points: np.ndarray, corners: np.ndarray, start: np.ndarray) -> np.ndarray:
    """[2 quads, 3]"""
    a, b, c, d = (points[corners[start + i]] for i in range(4))
    normal = np.cross(c - a, d - b)

    def worse(*cut: tuple[np.ndarray, np.ndarray, np.ndarray]) -> np.ndarray:
        """The smaller of two triangles' areas; negative where one is wound the other way."""
        return np.min([(np.cross(q - p, r - p) * normal).sum(axis=1) for p, q, r in cut], axis=0)

    other = worse((a, b, d), (b, c, d)) > worse((a, b, c), (a, c, d))
    cuts = np.where(other[:, None, None], [[0, 1, 3], [1, 2, 3]], [[0, 1, 2], [0, 2, 3]])
    return (start[:, None, None] + cuts).reshape(-1, 3)


def _of_polygon(points: np.ndarray) -> np.ndarray:
    """Triangles [N - 2, 3] of a face with these corners [N, 3]."""
    centred = points - points.mean(axis=0)
    normal = np.cross(centred, np.roll(centred, -1, axis=0)).sum(axis=0)
    axis = int(np.abs(normal).argmax())
    # counter-clockwise
    plane = centred[:, [(axis + 1) % 3, (axis + 2) % 3]] * [1 if normal[axis] >= 0 else -1, 1]
    turns = _cross(np.roll(plane, 1, axis=0), plane, np.roll(plane, -1, axis=0))
    number = np.arange(1, len(points) - 1)
    if (turns >= 0).all():
        return np.stack([np.zeros_like(number), number, number + 1], axis=1)
    return np.array(_ears(plane))


def _ears(plane: np.ndarray) -> list[tuple[int, int, int]]:
    """Cut off a corner whose triangle holds no other, again and again; where a face cuts itself, the most
    open one.
    """
    left = list(range(len(plane)))
    found = []
    at = 0
    while len(left) > 3:
        for tried in range(len(left)):
            i = (at + tried) % len(left)
            ear = left[i - 1], left[i], left[(i + 1) % len(left)]
            if _is_ear(plane, left, ear):
                break
        else:
            ring = plane[left]
            i = int(_cross(np.roll(ring, 1, axis=0), ring, np.roll(ring, -1, axis=0)).argmax())
            ear = left[i - 1], left[i], left[(i + 1) % len(left)]
        found.append(ear)
        del left[i]
        at = i
    return [*found, (left[0], left[1], left[2])]


def _is_ear(plane: np.ndarray, left: list[int], ear: tuple[int, int, int]) -> bool:
    a, b, c = plane[list(ear)]
    if _cross(a, b, c) <= 0:
        return False
    others = plane[left]
    inside = (_cross(a, b, others) >= 0) & (_cross(b, c, others) >= 0) & (_cross(c, a, others) >= 0)
    at_corner = (others == a).all(axis=1) | (others == b).all(axis=1) | (others == c).all(axis=1)
    return not (inside & ~at_corner).any()


def _cross(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Twice the signed areas of triangles [.., 2]."""
    return (b[..., 0] - a[..., 0]) * (c[..., 1] - a[..., 1]) - (b[..., 1] - a[..., 1]) * (
        c[..., 0] - a[..., 0]
    )
