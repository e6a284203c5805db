"""Triangulation of polygons, concave ones included.

Letters: V vertices, F faces, C corners of all faces, T triangles, N corners of one face.
"""

import numpy as np

MAX_CORNERS = 4096  # corners of one face; ear clipping takes time quadratic in them or worse


def triangulated(
    positions: np.ndarray, corners: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Triangulate faces, each given as a run of corners.

    A quad is cut along the diagonal that gives the better worst triangle. A larger face is cut by ear
    clipping (Meisters 1975) in its mean plane (Newell's method). No corner is added, and the orientation is
    preserved. Faces with fewer than three corners are dropped.

    Args: positions: [V, 3]; corners: [C], vertices, face after face; counts: [F], corners of each face.
    Returns: triangles [T, 3] as positions in `corners`, and the face [T] of each triangle, ascending.
    Raises: ValueError for a face with more than MAX_CORNERS.
    """
    counts = np.asarray(counts, dtype=np.int64)
    if counts.max(initial=0) > MAX_CORNERS:
        raise ValueError(f"expected faces with up to {MAX_CORNERS:,} corners, got one with {counts.max():,}")
    start = np.cumsum(counts) - counts
    points = np.asarray(positions, dtype=np.float64)
    three = np.flatnonzero(counts == 3)
    four = np.flatnonzero(counts == 4)
    triangles = [start[three, None] + np.arange(3), _split_quads(points, corners, start[four])]
    faces = [three, np.repeat(four, 2)]
    for number in np.flatnonzero(counts > 4):
        ears = _split_polygon(points[corners[start[number] : start[number] + counts[number]]])
        triangles.append(start[number] + ears)
        faces.append(np.full(len(ears), number))
    face = np.concatenate(faces)
    # the three groups back into the order of the faces; stable, so a face's triangles stay in order
    order = np.argsort(face, kind="stable")
    return np.concatenate(triangles)[order], face[order]


def _split_quads(points: np.ndarray, corners: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Cut quads into two triangles each, [2 quads, 3]. Args: start: first corner of each quad."""
    a, b, c, d = (points[corners[start + i]] for i in range(4))
    # twice the vector area; it defines the orientation of the quad
    normal = np.cross(c - a, d - b)

    def smaller_area(*cut: tuple[np.ndarray, np.ndarray, np.ndarray]) -> np.ndarray:
        """Return the smaller of the areas of two triangles, negative if one has the opposite orientation."""
        return np.min([(np.cross(q - p, r - p) * normal).sum(axis=1) for p, q, r in cut], axis=0)

    other_diagonal = smaller_area((a, b, d), (b, c, d)) > smaller_area((a, b, c), (a, c, d))
    cuts = np.where(other_diagonal[:, None, None], [[0, 1, 3], [1, 2, 3]], [[0, 1, 2], [0, 2, 3]])
    return (start[:, None, None] + cuts).reshape(-1, 3)


def _split_polygon(points: np.ndarray) -> np.ndarray:
    """Triangulate one face with corners [N, 3]: [N - 2, 3]."""
    centred = points - points.mean(axis=0)
    # Newell's normal; the face is projected along its largest component.
    normal = np.cross(centred, np.roll(centred, -1, axis=0)).sum(axis=0)
    axis = int(np.abs(normal).argmax())
    # [N, 2], counter-clockwise
    plane = centred[:, [(axis + 1) % 3, (axis + 2) % 3]] * [1 if normal[axis] >= 0 else -1, 1]
    turns = _cross(np.roll(plane, 1, axis=0), plane, np.roll(plane, -1, axis=0))
    number = np.arange(1, len(points) - 1)
    if (turns >= 0).all():  # convex: a fan of triangles
        return np.stack([np.zeros_like(number), number, number + 1], axis=1)
    return np.array(_ears(plane))


def _ears(plane: np.ndarray) -> list[tuple[int, int, int]]:
    """Clip ears of a polygon [N, 2] until a triangle is left.

    An ear is a convex corner whose triangle contains no other corner. If a polygon intersects itself and has
    no ear, the corner with the largest signed area is cut off.
    """
    remaining = list(range(len(plane)))
    ears = []
    at = 0
    while len(remaining) > 3:
        # The search starts where the last ear was, which avoids testing the same corners again.
        for step in range(len(remaining)):
            i = (at + step) % len(remaining)
            ear = remaining[i - 1], remaining[i], remaining[(i + 1) % len(remaining)]
            if _is_ear(plane, remaining, ear):
                break
        else:
            # No break: no corner is an ear.
            ring = plane[remaining]
            i = int(_cross(np.roll(ring, 1, axis=0), ring, np.roll(ring, -1, axis=0)).argmax())
            ear = remaining[i - 1], remaining[i], remaining[(i + 1) % len(remaining)]
        ears.append(ear)
        del remaining[i]
        at = i
    return [*ears, (remaining[0], remaining[1], remaining[2])]


def _is_ear(plane: np.ndarray, remaining: list[int], ear: tuple[int, int, int]) -> bool:
    """Return True if a corner of the remaining polygon is convex and its triangle contains no other
    corner.
    """
    a, b, c = plane[list(ear)]
    if _cross(a, b, c) <= 0:
        return False
    others = plane[remaining]
    inside = (_cross(a, b, others) >= 0) & (_cross(b, c, others) >= 0) & (_cross(c, a, others) >= 0)
    # corners at the same position, as at the bridge of a hole, do not count
    at_corner = (others == a).all(axis=1) | (others == b).all(axis=1) | (others == c).all(axis=1)
    return not (inside & ~at_corner).any()


def _cross(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Compute twice the signed areas of triangles with corners [..., 2]."""
    return (b[..., 0] - a[..., 0]) * (c[..., 1] - a[..., 1]) - (b[..., 1] - a[..., 1]) * (
        c[..., 0] - a[..., 0]
    )
