"""Bring a mesh into the form that every measure reads: longest edge 1, corners at one place welded, no face
twice.

GLB, OBJ and STL files give separate corners to the faces on both sides of a seam, so one model in three
formats would get three results. Slivers without area are kept, because removing them opens the mesh at a
T-junction. The welding tolerance changes the results of defective assets, so it belongs beside every figure.

Letters: V vertices, F faces.
"""

from dataclasses import dataclass

import numpy as np

from eg3d_rlhf.geometry.files.model import check_triangles
from eg3d_rlhf.measures.meshes.settings import MOST_TOLERANCE, TOLERANCE, UPS
from training.config import check_choice


@dataclass(frozen=True, kw_only=True, eq=False)
class CleanMesh:
    """Cleaned mesh.

    Lengths are shares of the bounding box's longest edge, the box is centred, and y is up.
    """

    vertices: np.ndarray  # [V, 3] float64, each used by a face
    faces: np.ndarray  # [F, 3] int64
    edge: float  # the longest edge of the bounding box, in the file's units
    welded: int  # corners that were merged into another one
    degenerate: int  # faces that were dropped because they used a corner twice
    duplicate: int  # faces that were dropped because an earlier face has the same corners
    raw_open_share: float  # share of edges with only one face, before welding, 0..1
    tolerance: float  # of welding, as a share of the longest edge


def clean_mesh(
    vertices: np.ndarray, faces: np.ndarray, tolerance: float = TOLERANCE, up: str = "y"
) -> CleanMesh:
    """Clean a mesh of vertices [V, 3] and triangles [F, 3].

    Corners are welded if x / tolerance rounds to the same integers, where x is in shares of the longest edge.
    Two corners on different sides of a rounding step stay separate, however close they are.

    Args: up: the axis that points up in the file, 'y' (glTF) or 'z' (STL, OBJ of CAD).
    Raises: ValueError if the mesh is empty, not finite, without area, or refers to vertices that do not
        exist.
    """
    if not 0 < tolerance <= MOST_TOLERANCE:
        raise ValueError(
            f"--weld: expected 0 < tolerance <= {MOST_TOLERANCE:g} of the longest edge, got {tolerance:g}."
            " Use a smaller tolerance."
        )
    check_choice("--up", up, UPS)
    vertices = np.asarray(vertices, dtype=np.float64)
    faces = np.asarray(faces)
    check_triangles(vertices, faces)
    vertices, faces = _used(vertices, faces.astype(np.int64))
    low = vertices.min(axis=0)
    high = vertices.max(axis=0)
    # Coordinates near the largest float overflow; the check below reports that as not finite.
    with np.errstate(over="ignore", invalid="ignore"):
        edge = float((high - low).max())
    if not np.isfinite(edge):
        raise ValueError("expected finite positions, got NaN or infinity. Export the mesh again.")
    if edge < 1e-150:  # squares of such lengths underflow to 0
        raise ValueError(
            "expected a mesh with a size, got one whose points coincide. Export it in larger units."
        )
    # Halves are added, since low + high could overflow.
    x = (vertices - (low / 2 + high / 2)) / edge
    if up == "z":
        # A rotation about x by -90 degrees, which keeps the winding.
        x = np.stack([x[:, 0], x[:, 2], -x[:, 1]], axis=1)
    # Corners in the same cell become one, at the position of the first one in the file.
    cells, first, place = np.unique(
        np.rint(x / tolerance).astype(np.int64), axis=0, return_index=True, return_inverse=True
    )
    welded = place.reshape(-1)[faces]
    # A face that uses a welded corner twice has no area.
    kept = (welded != np.roll(welded, 1, axis=1)).all(axis=1)
    proper = welded[kept]
    _, earliest = np.unique(np.sort(proper, axis=1), axis=0, return_index=True)
    # Sorted, so that the faces keep the order of the file.
    single = proper[np.sort(earliest)]
    if not len(single):
        raise ValueError("expected a mesh with an area, got only faces without area. Export the mesh again.")
    points, single = _used(x[first], single)
    mesh = CleanMesh(
        vertices=points,
        faces=single,
        edge=edge,
        welded=len(x) - len(cells),
        degenerate=int((~kept).sum()),
        duplicate=len(proper) - len(single),
        raw_open_share=_open_share(faces, len(x)),
        tolerance=tolerance,
    )
    if not face_areas(mesh)[1].sum() > 0:
        raise ValueError("expected a mesh with an area, got only faces without area. Export the mesh again.")
    return mesh


def face_areas(mesh: CleanMesh) -> tuple[np.ndarray, np.ndarray]:
    """Compute unit normals [F, 3], zero where a face has no area, and areas [F]."""
    a, b, c = (mesh.vertices[mesh.faces[:, i]] for i in range(3))
    normals = np.cross(b - a, c - a)
    double = np.linalg.norm(normals, axis=1)
    return (
        np.divide(normals, double[:, None], out=np.zeros_like(normals), where=double[:, None] > 0),
        double / 2,
    )


def _used(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Drop the vertices that no face uses, and renumber the faces."""
    used = np.zeros(len(vertices), dtype=bool)
    used[faces.reshape(-1)] = True
    return vertices[used], (np.cumsum(used) - 1)[faces]


def _open_share(faces: np.ndarray, vertices: int) -> float:
    """Compute the share of edges that only one face uses."""
    ends = np.sort(faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), axis=1)
    # A face that uses a vertex twice has an edge of length 0, which is not an edge.
    ends = ends[ends[:, 0] != ends[:, 1]]
    _, count = np.unique(ends[:, 0] * vertices + ends[:, 1], return_counts=True)
    return float((count == 1).mean()) if len(count) else 0.0
