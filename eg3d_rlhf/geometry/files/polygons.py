"""Triangulation of the polygons of a mesh, also of concave polygons.

Shapes: V vertices, F faces, C corners of all faces, T triangles, N corners of one face.
"""

import numpy as np

# Largest number of corners of one face; the time of ear clipping grows at least with its square.
MAX_CORNERS = 4096


def triangulate_faces(
    positions: np.ndarray, corners: np.ndarray, corner_counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Triangulate the faces of a mesh.

    A face with four corners is cut along the diagonal whose smaller triangle has the larger area. A face with
    more corners is projected onto its mean plane (Newell's method) and cut by ear clipping (Meisters 1975).
    No corner is added, and the orientation is preserved. Faces with fewer than three corners are dropped.

    Args:
        positions: coordinates [V, 3] of the vertices.
        corners: indices [C] of vertices: all corners of the first face, then all corners of the second face,
            and so on.
        corner_counts: number of corners [F] of each face.

    Returns: triangles [T, 3] as indices into `corners`, and the index of the face [T] of each triangle, in
        ascending order.

    Raises: ValueError for a face with more than MAX_CORNERS corners.
    """
    corner_counts = np.asarray(corner_counts, dtype=np.int64)
    if corner_counts.max(initial=0) > MAX_CORNERS:
        raise ValueError(
            f"a face has {corner_counts.max():,} corners, but at most {MAX_CORNERS:,} are allowed."
            " Triangulate the mesh before exporting it."
        )
    # index of the first corner of each face in `corners`
    first_corner = np.cumsum(corner_counts) - corner_counts
    points = np.asarray(positions, dtype=np.float64)
    triangle_faces = np.flatnonzero(corner_counts == 3)
    quad_faces = np.flatnonzero(corner_counts == 4)
    triangles = [
        first_corner[triangle_faces, None] + np.arange(3),
        _split_quads(points, corners, first_corner[quad_faces]),
    ]
    # A quad gives two triangles.
    face_indices = [triangle_faces, np.repeat(quad_faces, 2)]
    for face_index in np.flatnonzero(corner_counts > 4):
        face_triangles = _split_polygon(
            points[corners[first_corner[face_index] : first_corner[face_index] + corner_counts[face_index]]]
        )
        triangles.append(first_corner[face_index] + face_triangles)
        face_indices.append(np.full(len(face_triangles), face_index))
    face_of_triangle = np.concatenate(face_indices)
    # Triangles, quads and larger faces are sorted back into the order of the faces. The sort is stable, so
    # the triangles of a face keep their order.
    sort_order = np.argsort(face_of_triangle, kind="stable")
    return np.concatenate(triangles)[sort_order], face_of_triangle[sort_order]


def _split_quads(points: np.ndarray, corners: np.ndarray, first_corner: np.ndarray) -> np.ndarray:
    """Cut faces with four corners into two triangles each.

    Args:
        points: coordinates [V, 3] of the vertices.
        corners: indices [C] of vertices.
        first_corner: index [Q] in `corners` of the first corner of each of the Q faces.

    Returns: triangles [2 Q, 3] as indices into `corners`.
    """
    a, b, c, d = (points[corners[first_corner + offset]] for offset in range(4))
    # Twice the vector area of the quad; its direction is the orientation of the quad.
    normal = np.cross(c - a, d - b)

    def smaller_area(*triangle_pair: tuple[np.ndarray, np.ndarray, np.ndarray]) -> np.ndarray:
        """Return the smaller of the areas of two triangles, negative if one has the opposite orientation."""
        return np.min([(np.cross(q - p, r - p) * normal).sum(axis=1) for p, q, r in triangle_pair], axis=0)

    uses_second_diagonal = smaller_area((a, b, d), (b, c, d)) > smaller_area((a, b, c), (a, c, d))
    # corners of the two triangles for each diagonal
    corner_offsets = np.where(
        uses_second_diagonal[:, None, None], [[0, 1, 3], [1, 2, 3]], [[0, 1, 2], [0, 2, 3]]
    )
    return (first_corner[:, None, None] + corner_offsets).reshape(-1, 3)


def _split_polygon(points: np.ndarray) -> np.ndarray:
    """Triangulate one face.

    Args:
        points: coordinates [N, 3] of its corners, in order.

    Returns: triangles [N - 2, 3] as indices of the corners.
    """
    # Centred, so that the cross products do not lose digits far from the origin.
    centred_points = points - points.mean(axis=0)
    # Newell's normal. The face is projected along the coordinate axis that is nearest to the normal.
    normal = np.cross(centred_points, np.roll(centred_points, -1, axis=0)).sum(axis=0)
    dropped_axis = int(np.abs(normal).argmax())
    # [N, 2]; the sign mirrors the plane if necessary, so that the corners are in counter-clockwise order
    plane_points = centred_points[:, [(dropped_axis + 1) % 3, (dropped_axis + 2) % 3]] * [
        1 if normal[dropped_axis] >= 0 else -1,
        1,
    ]
    signed_areas = _cross(np.roll(plane_points, 1, axis=0), plane_points, np.roll(plane_points, -1, axis=0))
    corner_index = np.arange(1, len(points) - 1)
    # No corner turns right: the face is convex, and a fan of triangles around its first corner is enough.
    if (signed_areas >= 0).all():
        return np.stack([np.zeros_like(corner_index), corner_index, corner_index + 1], axis=1)
    return np.array(_ears(plane_points))


def _ears(plane_points: np.ndarray) -> list[tuple[int, int, int]]:
    """Triangulate a polygon by ear clipping: cut off one ear after another until a triangle remains.

    An ear is a convex corner whose triangle with its two neighbours contains no other corner. If a polygon
    intersects itself and has no ear, the corner with the largest signed area is cut off.

    Args:
        plane_points: coordinates [N, 2] of the corners in counter-clockwise order.

    Returns: N - 2 triangles as indices of the corners.
    """
    remaining_corners = list(range(len(plane_points)))
    ears = []
    search_start = 0
    while len(remaining_corners) > 3:
        # The search starts where the last ear was, which avoids testing the same corners again.
        for step in range(len(remaining_corners)):
            position = (search_start + step) % len(remaining_corners)
            # for position 0, the index -1 is the last corner
            ear = (
                remaining_corners[position - 1],
                remaining_corners[position],
                remaining_corners[(position + 1) % len(remaining_corners)],
            )
            if _is_ear(plane_points, remaining_corners, ear):
                break
        else:
            # The loop found no ear, so the polygon intersects itself.
            ring_points = plane_points[remaining_corners]
            position = int(
                _cross(
                    np.roll(ring_points, 1, axis=0), ring_points, np.roll(ring_points, -1, axis=0)
                ).argmax()
            )
            ear = (
                remaining_corners[position - 1],
                remaining_corners[position],
                remaining_corners[(position + 1) % len(remaining_corners)],
            )
        ears.append(ear)
        del remaining_corners[position]
        search_start = position
    return [*ears, (remaining_corners[0], remaining_corners[1], remaining_corners[2])]


def _is_ear(plane_points: np.ndarray, remaining_corners: list[int], ear: tuple[int, int, int]) -> bool:
    """Return True if a corner of the remaining polygon is an ear.

    Args:
        plane_points: coordinates [N, 2] of all corners.
        remaining_corners: indices of the corners that were not cut off yet.
        ear: indices of the previous corner, the corner itself, and the next corner.
    """
    a, b, c = plane_points[list(ear)]
    if _cross(a, b, c) <= 0:
        return False
    other_corners = plane_points[remaining_corners]
    is_inside = (
        (_cross(a, b, other_corners) >= 0)
        & (_cross(b, c, other_corners) >= 0)
        & (_cross(c, a, other_corners) >= 0)
    )
    # Corners at the same position as a corner of the triangle do not count. They occur where a polygon with a
    # hole is cut open along a line to the hole.
    is_at_corner = (
        (other_corners == a).all(axis=1) | (other_corners == b).all(axis=1) | (other_corners == c).all(axis=1)
    )
    return not (is_inside & ~is_at_corner).any()


def _cross(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Compute twice the signed areas [...] of triangles with corners a, b and c [..., 2].

    An area is positive if the corners are in counter-clockwise order.
    """
    return (b[..., 0] - a[..., 0]) * (c[..., 1] - a[..., 1]) - (b[..., 1] - a[..., 1]) * (
        c[..., 0] - a[..., 0]
    )
