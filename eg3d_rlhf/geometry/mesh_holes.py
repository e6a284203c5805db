"""Closing of the holes of a mesh. Shapes: V vertices, F faces."""

import numpy as np

from eg3d_rlhf.geometry.mesh import half_edges


def fill_rims(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Close the holes of a mesh: join each loop of rim edges to a new vertex at the mean of its vertices.

    A loop that passes a vertex twice is left open, because its order is not unique.

    Args:
        vertices: coordinates [V, 3].
        faces: triangles [F, 3] as indices of vertices.

    Returns: vertices with those at the centres of holes, faces with those that close them, and the number of
        closed holes.
    """
    edge_matrix = half_edges(faces, len(vertices))
    # A half-edge without a reverse is on a rim. The face that closes the hole traverses its reverse.
    rims = (edge_matrix > edge_matrix.T.multiply(edge_matrix > 0)).tocoo()
    next_by_vertex: dict[int, list[int]] = {}
    for start, end in zip(rims.col.tolist(), rims.row.tolist(), strict=True):
        next_by_vertex.setdefault(start, []).append(end)
    new_vertices: list[np.ndarray] = []
    new_faces: list[tuple[int, int, int]] = []
    remaining = {start for start, ends in next_by_vertex.items() if len(ends) == 1}
    while remaining:
        loop = [remaining.pop()]
        while (following := next_by_vertex[loop[-1]][0]) in remaining:
            remaining.discard(following)
            loop.append(following)
        # The loop is closed only if its last half-edge leads back to its first vertex.
        if following != loop[0] or len(loop) < 3:
            continue
        centre = len(vertices) + len(new_vertices)
        new_vertices.append(vertices[loop].mean(axis=0))
        new_faces += [(start, end, centre) for start, end in zip(loop, [*loop[1:], loop[0]], strict=True)]
    if not new_vertices:
        return vertices, faces, 0
    return (
        np.concatenate([vertices, np.array(new_vertices, dtype=vertices.dtype)]),
        np.concatenate([faces, np.array(new_faces, dtype=faces.dtype)]),
        len(new_vertices),
    )
