"""Test whether a body stands: by how many degrees it can be tilted before its centre of mass leaves its foot.

The foot is the convex hull of the vertices that touch the ground, since MuJoCo collides convex hulls. The
mass is that of the body, not that of its hull (which MuJoCo and DSO use). Between 0 and 3 degrees the result
depends too much on tolerances to be called either way. A ball gets 7.6 degrees, because vertices up to a
small height count as touching.

Letters: V vertices, F faces, P points of the foot.
"""

import math

import numpy as np
from scipy.spatial import ConvexHull, QhullError

from eg3d_rlhf.geometry.mesh import face_volumes
from eg3d_rlhf.measures.meshes.clean import CleanMesh, face_areas

FOOT = 0.01  # of the height: vertices up to this height above the lowest one touch the ground
STANDS = 3.0  # degrees; a body that can be tilted by at least this angle stands
STEEP = math.cos(math.radians(45))  # overhang: least downward component of the normal
GROUND = 0.02  # overhang: share of the height that counts as ground


def tip(vertices: np.ndarray, centre: np.ndarray) -> float:
    """Compute by how many degrees a body with vertices [V, 3] and centre of mass [3] can be tilted; y is up.

    The angle is atan2(signed distance of the projected centre to the border of the foot, height of the centre
    above the ground). It is negative if the body falls without being tilted.
    """
    low = float(vertices[:, 1].min())
    high = float(vertices[:, 1].max())
    foot = vertices[vertices[:, 1] <= low + FOOT * (high - low)][:, [0, 2]]
    return math.degrees(math.atan2(inside_distance(foot, centre[[0, 2]]), float(centre[1]) - low))


def inside_distance(foot: np.ndarray, point: np.ndarray) -> float:
    """Compute the distance of a point [2] to the border of the convex hull of points [P, 2].

    It is positive inside, and negative or 0 outside. A hull that is a line or a point has no inside.
    """
    foot = np.unique(foot, axis=0)
    try:
        hull = ConvexHull(foot)
    except (QhullError, ValueError):  # all points on a line, or a single one
        # The first right singular vector is the direction of the line.
        along = np.linalg.svd(foot - foot.mean(axis=0), full_matrices=False)[2][0]
        at = foot @ along
        return -_to_segment(foot[at.argmin()], foot[at.argmax()], point)
    # Signed distances to the lines through the hull's sides, negative inside. Outside, the nearest point may
    # be a corner, so distances to the sides themselves are needed.
    outside = float((hull.equations[:, :2] @ point + hull.equations[:, 2]).max())
    if outside <= 0:
        return -outside
    return -min(_to_segment(foot[a], foot[b], point) for a, b in hull.simplices)


def _to_segment(a: np.ndarray, b: np.ndarray, point: np.ndarray) -> float:
    """Compute the distance of a point [2] to the line segment from a to b."""
    along = b - a
    squared = float(along @ along)
    # Position of the perpendicular's foot along the segment, clamped to its ends; 0 for a segment of length
    # 0.
    t = min(max(float((point - a) @ along) / squared, 0.0), 1.0) if squared else 0.0
    return float(np.linalg.norm(point - a - t * along))


def volume_centre(mesh: CleanMesh) -> np.ndarray | None:
    """Return the centre of mass [3] of a closed mesh's volume, or None if that is 0."""
    volumes = face_volumes(mesh.vertices, mesh.faces)
    total = volumes.sum()
    # The centre of a tetrahedron from the origin to a face is the sum of the face's corners over 4.
    return None if abs(total) < 1e-12 else volumes @ mesh.vertices[mesh.faces].sum(axis=1) / 4 / total


def area_centre(mesh: CleanMesh) -> np.ndarray:
    """Return the centre of mass [3] of a sheet of constant thickness."""
    _, areas = face_areas(mesh)
    return areas @ mesh.vertices[mesh.faces].mean(axis=1) / areas.sum()


def voxel_centre(solid: np.ndarray) -> np.ndarray | None:
    """Return the centre of mass [3] of voxels [x, y, z] of the unit cube, or None if all are empty."""
    return (
        np.argwhere(solid).mean(axis=0) / solid.shape[0] + 0.5 / solid.shape[0] - 0.5 if solid.any() else None
    )


def overhang(mesh: CleanMesh) -> float:
    """Compute the share of the area that faces downwards at more than 45 degrees.

    Faces within 2 % of the height above the ground do not count.
    """
    normals, areas = face_areas(mesh)
    height = mesh.vertices[mesh.faces][:, :, 1].mean(axis=1)
    low = mesh.vertices[:, 1].min()
    # The margin excludes slopes of exactly 45 degrees, whose normals round either way.
    hangs = (normals[:, 1] < -STEEP - 1e-9) & (height > low + GROUND * np.ptp(mesh.vertices[:, 1]))
    return float(areas[hangs].sum() / areas.sum())


def stability(degrees: float) -> str:
    """Return 'stands', 'barely' or 'tips' for an angle in degrees."""
    return "stands" if degrees >= STANDS else "tips" if degrees <= 0 else "barely"
