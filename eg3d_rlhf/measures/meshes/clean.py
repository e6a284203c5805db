"""A mesh as every measure reads it: its longest edge 1, corners at one place welded, no face twice.

GLB, OBJ and STL give corners of their own to the faces at a seam; so one model in three formats would give
three answers. Slivers without area stay, as a T-junction opens without them. The tolerance decides on bad
assets and belongs beside every figure.

Letters: V vertices, F faces.
"""

from dataclasses import dataclass

import numpy as np

from eg3d_rlhf.geometry.files.model import check_triangles
from eg3d_rlhf.measures.meshes.settings import MOST_TOLERANCE, TOLERANCE, UPS
from training.config import check_choice


@dataclass(frozen=True, kw_only=True, eq=False)
class CleanMesh:
    """Lengths are shares of the longest edge of the bounding box, whose middle is the origin; y is up."""

    vertices: np.ndarray  # [V, 3] float64, each used by a face
    faces: np.ndarray  # [F, 3] int64
    edge: float  # the longest edge, in the file's units
    welded: int  # corners that are gone, as they were another's
    degenerate: int  # faces dropped that used a corner twice
    duplicate: int  # faces dropped that an earlier one has the corners of
    raw_open_share: float  # of edges with one face, before welding
    tolerance: float


def clean_mesh(
    vertices: np.ndarray, faces: np.ndarray, tolerance: float = TOLERANCE, up: str = "y"
) -> CleanMesh:
    """Vertices [V, 3] and triangles [F, 3] in the form that is measured.

    Corners are welded where x / tolerance rounds to the same numbers, x in shares of the longest edge; two
    that straddle a step stay two.

    Args: up: axis that points up in the file, 'y' (glTF) or 'z' (STL, OBJ of CAD).
    Raises: ValueError for a mesh that is empty, not finite, without area, or names vertices that are not
        there.
    """
    if not 0 < tolerance <= MOST_TOLERANCE:
        raise ValueError(
            f"--weld: expected 0 < tolerance <= {MOST_TOLERANCE:g} of the longest edge, got {tolerance:g}."
            " Lower it."
        )
    check_choice("--up", up, UPS)
    vertices = np.asarray(vertices, dtype=np.float64)
    faces = np.asarray(faces)
    check_triangles(vertices, faces)
    vertices, faces = _used(vertices, faces.astype(np.int64))
    low = vertices.min(axis=0)
    high = vertices.max(axis=0)
    with np.errstate(over="ignore", invalid="ignore"):
        edge = float((high - low).max())
    if not np.isfinite(edge):
        raise ValueError("expected finite positions, got others")
    if edge < 1e-150:  # its squares are no numbers
        raise ValueError("expected a mesh that has a size, got one whose points are all in one place")
    x = (vertices - (low / 2 + high / 2)) / edge
    if up == "z":
        x = np.stack([x[:, 0], x[:, 2], -x[:, 1]], axis=1)
    cells, first, place = np.unique(
        np.rint(x / tolerance).astype(np.int64), axis=0, return_index=True, return_inverse=True
    )
    welded = place.reshape(-1)[faces]
    kept = (welded != np.roll(welded, 1, axis=1)).all(axis=1)
    whole = welded[kept]
    _, earliest = np.unique(np.sort(whole, axis=1), axis=0, return_index=True)
    single = whole[np.sort(earliest)]
    if not len(single):
        raise ValueError("expected a mesh with an area, got none")
    points, single = _used(x[first], single)
    mesh = CleanMesh(
        vertices=points,
        faces=single,
        edge=edge,
        welded=len(x) - len(cells),
        degenerate=int((~kept).sum()),
        duplicate=len(whole) - len(single),
        raw_open_share=_open_share(faces, len(x)),
        tolerance=tolerance,
    )
    if not face_areas(mesh)[1].sum() > 0:
        raise ValueError("expected a mesh with an area, got none")
    return mesh


def face_areas(mesh: CleanMesh) -> tuple[np.ndarray, np.ndarray]:
    """Unit normals [F, 3], zero where a face has no area, and areas [F]."""
    a, b, c = (mesh.vertices[mesh.faces[:, i]] for i in range(3))
    normals = np.cross(b - a, c - a)
    double = np.linalg.norm(normals, axis=1)
    return (
        np.divide(normals, double[:, None], out=np.zeros_like(normals), where=double[:, None] > 0),
        double / 2,
    )


def _used(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Without the vertices that no face uses."""
    used = np.zeros(len(vertices), dtype=bool)
    used[faces.reshape(-1)] = True
    return vertices[used], (np.cumsum(used) - 1)[faces]


def _open_share(faces: np.ndarray, vertices: int) -> float:
    ends = np.sort(faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), axis=1)
    ends = ends[ends[:, 0] != ends[:, 1]]
    _, count = np.unique(ends[:, 0] * vertices + ends[:, 1], return_counts=True)
    return float((count == 1).mean()) if len(count) else 0.0
