"""Clean a mesh before it is measured: scale its longest edge to 1, weld corners, remove repeated faces.

Welding merges corners that have almost the same position. GLB, OBJ and STL files give separate corners to the
faces on both sides of a seam, so without welding the same model would get other results in each format. Faces
without area are kept, because the mesh would be open where they were removed. The bounding box is that of the
faces with an area: a face without area that reaches out of it, such as a point far away, is invisible and is
dropped. The welding tolerance changes the results of defective assets, so reports state it beside every
result.

Shapes: V vertices, F faces. The longest edge is that of the bounding box.
"""

from dataclasses import dataclass

import numpy as np

from eg3d_rlhf.geometry.files.model import check_triangles
from eg3d_rlhf.geometry.files.triangles import drop_unused, may_be_visible
from eg3d_rlhf.measures.meshes.settings import MAX_TOLERANCE, TOLERANCE, UPS
from training.config import check_choice


@dataclass(frozen=True, kw_only=True, eq=False)
class CleanMesh:
    """Mesh that `clean_mesh` has cleaned, with the numbers of changes.

    Lengths are shares of the bounding box's longest edge, the box is centred at 0, and y points up.
    """

    vertices: np.ndarray  # positions [V, 3] float64; each vertex is used by a face
    faces: np.ndarray  # vertex indices [F, 3] int64
    edge: float  # longest edge of the bounding box, in the file's units
    welded: int  # number of vertices that were merged into another vertex
    # number of faces that were dropped because they use a vertex twice, or have no area and reach out of the
    # bounding box
    degenerate: int
    duplicate: int  # number of faces that were dropped because an earlier face has the same vertices
    raw_open_share: float  # share of edges with only one face before welding, 0..1
    tolerance: float  # welding tolerance, as a share of the longest edge


def clean_mesh(
    vertices: np.ndarray, faces: np.ndarray, tolerance: float = TOLERANCE, up: str = "y"
) -> CleanMesh:
    """Clean a mesh: scale and centre it, turn it so that y points up, weld vertices, and drop repeated faces.

    Vertices are welded if x / tolerance rounds to the same three integers, where x is the scaled position.
    Two vertices on different sides of a rounding step stay separate, however close they are.

    Args:
        vertices: positions [V, 3] in the file's units.
        faces: vertex indices [F, 3].
        tolerance: welding tolerance as a share of the longest edge, 0 < tolerance <= MAX_TOLERANCE.
        up: axis that points up in the file, 'y' (glTF) or 'z' (STL, OBJ of CAD).

    Raises: ValueError if the mesh is empty, not finite, without area, or refers to vertices that do not
        exist, or if an argument is outside its range.
    """
    if not 0 < tolerance <= MAX_TOLERANCE:
        raise ValueError(
            f"--weld={tolerance:g} must be greater than 0 and at most {MAX_TOLERANCE:g} (as a share of the"
            " longest edge)."
        )
    check_choice("--up", up, UPS)
    # float64, because differences of large coordinates lose their digits in float32.
    vertices = np.asarray(vertices, dtype=np.float64)
    faces = np.asarray(faces)
    check_triangles(vertices, faces)
    vertices, faces = drop_unused(vertices, faces.astype(np.int64))
    visible_faces = faces[may_be_visible(vertices, faces)]
    outside_count = len(faces) - len(visible_faces)
    if outside_count:
        vertices, faces = drop_unused(vertices, visible_faces)
    # [3] each; unused vertices were dropped above, so they cannot enlarge the box.
    lowest_corner = vertices.min(axis=0)
    highest_corner = vertices.max(axis=0)
    # Coordinates near the largest float overflow; the check below reports that as not finite.
    with np.errstate(over="ignore", invalid="ignore"):
        longest_edge = float((highest_corner - lowest_corner).max())
    if not np.isfinite(longest_edge):
        raise ValueError("The mesh has a position that is NaN, infinite or too large. Export the mesh again.")
    if longest_edge < 1e-150:  # squares of such lengths underflow to 0
        raise ValueError(
            "The mesh has no size: all its points are at almost the same position. Export it in larger units."
        )
    # Halves are added, since low + high could overflow.
    scaled_positions = (vertices - (lowest_corner / 2 + highest_corner / 2)) / longest_edge
    if up == "z":
        # A rotation about x by -90 degrees, which keeps the winding.
        scaled_positions = np.stack(
            [scaled_positions[:, 0], scaled_positions[:, 2], -scaled_positions[:, 1]], axis=1
        )
    # Vertices in the same cell become one vertex, at the position of the first of them in the file.
    cell_codes, first_vertex, cell_of_vertex = np.unique(
        np.rint(scaled_positions / tolerance).astype(np.int64), axis=0, return_index=True, return_inverse=True
    )
    # numpy versions differ in the shape of the inverse, so it is flattened.
    welded_faces = cell_of_vertex.reshape(-1)[faces]
    # A face that uses a welded vertex twice has no area.
    has_three_vertices = (welded_faces != np.roll(welded_faces, 1, axis=1)).all(axis=1)
    # The comparison with the rolled columns compares each corner with the previous one of its face.
    proper_faces = welded_faces[has_three_vertices]
    _, first_occurrence = np.unique(np.sort(proper_faces, axis=1), axis=0, return_index=True)
    # Sorted, so that the faces keep the order of the file.
    unique_faces = proper_faces[np.sort(first_occurrence)]
    if not len(unique_faces):
        raise ValueError("The mesh has no face with an area. Export the mesh again.")
    welded_positions, unique_faces = drop_unused(scaled_positions[first_vertex], unique_faces)
    mesh = CleanMesh(
        vertices=welded_positions,
        faces=unique_faces,
        edge=longest_edge,
        welded=len(scaled_positions) - len(cell_codes),
        degenerate=int((~has_three_vertices).sum()) + outside_count,
        duplicate=len(proper_faces) - len(unique_faces),
        raw_open_share=_open_share(faces, len(scaled_positions)),
        tolerance=tolerance,
    )
    # Faces with three different vertices on a line have no area either.
    if not face_areas(mesh)[1].sum() > 0:
        raise ValueError("The mesh has no face with an area. Export the mesh again.")
    return mesh


def face_areas(mesh: CleanMesh) -> tuple[np.ndarray, np.ndarray]:
    """Compute the unit normals [F, 3] and the areas [F] of all faces.

    Faces without area have the normal 0.
    """
    # [F, 3] each
    a, b, c = (mesh.vertices[mesh.faces[:, i]] for i in range(3))
    normals = np.cross(b - a, c - a)
    # The cross product of two edges has the length of their parallelogram, twice the triangle.
    double_area = np.linalg.norm(normals, axis=1)
    return (
        np.divide(normals, double_area[:, None], out=np.zeros_like(normals), where=double_area[:, None] > 0),
        double_area / 2,
    )


def _open_share(faces: np.ndarray, vertex_count: int) -> float:
    """Compute the share of edges that only one face uses, 0..1; 0 without any edge.

    Args:
        faces: vertex indices [F, 3].
        vertex_count: number of vertices V.
    """
    # The two vertices of each of the three edges of each face, smaller index first
    edge_vertices = np.sort(faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), axis=1)
    # A face that uses a vertex twice has an edge of length 0, which does not count.
    edge_vertices = edge_vertices[edge_vertices[:, 0] != edge_vertices[:, 1]]
    # One integer per edge, since np.unique is faster on integers than on rows.
    _, face_counts = np.unique(edge_vertices[:, 0] * vertex_count + edge_vertices[:, 1], return_counts=True)
    return float((face_counts == 1).mean()) if len(face_counts) else 0.0
