"""Whether a body stands: how far it can be tilted before its centre of mass leaves its foot.

The foot is the convex hull of what touches the floor, as MuJoCo collides hulls; the mass is the body's own,
not the hull's (which is MuJoCo's default, and DSO's). Between 0 and 3 degrees neither answer is worth a
verdict; a ball gets 7.6 from the height that counts as touching.

Letters: V vertices, F faces, P points of the foot.
"""

import math

import numpy as np
from scipy.spatial import ConvexHull, QhullError

from eg3d_rlhf.geometry.mesh import face_volumes
from eg3d_rlhf.measures.meshes.clean import CleanMesh, face_areas

FOOT = 0.01  # of the height: vertices so near to the lowest touch the floor
STANDS = 3.0  # degrees, at least
# overhang: downward part of the normal, and the share of the height that is floor
STEEP = math.cos(math.radians(45))
GROUND = 0.02


def tip(vertices: np.ndarray, centre: np.ndarray) -> float:
    """Degrees that a body with vertices [V, 3] and centre of mass [3] can be tilted; negative where it falls.

    atan2(signed distance of the centre's projection to the border of the foot, height of the centre above the
    floor); y is up.
    """
    low = float(vertices[:, 1].min())
    high = float(vertices[:, 1].max())
    foot = vertices[vertices[:, 1] <= low + FOOT * (high - low)][:, [0, 2]]
    return math.degrees(math.atan2(inside_distance(foot, centre[[0, 2]]), float(centre[1]) - low))


def inside_distance(foot: np.ndarray, point: np.ndarray) -> float:
    """Distance of a point [2] to the border of the convex hull of points [P, 2]: positive inside, negative or
    0 outside and of a line.
    """
    foot = np.unique(foot, axis=0)
    try:
        hull = ConvexHull(foot)
    except (QhullError, ValueError):  # a point or a line
        along = np.linalg.svd(foot - foot.mean(axis=0), full_matrices=False)[2][0]
        at = foot @ along
        return -_to_segment(foot[at.argmin()], foot[at.argmax()], point)
    outside = float((hull.equations[:, :2] @ point + hull.equations[:, 2]).max())
    if outside <= 0:
        return -outside
    return -min(_to_segment(foot[a], foot[b], point) for a, b in hull.simplices)


def _to_segment(a: np.ndarray, b: np.ndarray, point: np.ndarray) -> float:
    along = b - a
    squared = float(along @ along)
    t = min(max(float((point - a) @ along) / squared, 0.0), 1.0) if squared else 0.0
    return float(np.linalg.norm(point - a - t * along))


def volume_centre(mesh: CleanMesh) -> np.ndarray | None:
    """Centre of mass [3] of what a closed mesh encloses; None where that is nothing."""
    volumes = face_volumes(mesh.vertices, mesh.faces)
    total = volumes.sum()
    return None if abs(total) < 1e-12 else volumes @ mesh.vertices[mesh.faces].sum(axis=1) / 4 / total


def area_centre(mesh: CleanMesh) -> np.ndarray:
    """Centre of mass [3] of a sheet."""
    _, areas = face_areas(mesh)
    return areas @ mesh.vertices[mesh.faces].mean(axis=1) / areas.sum()


def voxel_centre(solid: np.ndarray) -> np.ndarray | None:
    """Centre of mass [3] of voxels [x, y, z] of the cube about the origin; None where none is solid."""
    return (
        np.argwhere(solid).mean(axis=0) / solid.shape[0] + 0.5 / solid.shape[0] - 0.5 if solid.any() else None
    )


def overhang(mesh: CleanMesh) -> float:
    """Share of the area that looks down by more than 45 degrees, but for what lies within 2 % of the height
    above the floor.
    """
    normals, areas = face_areas(mesh)
    height = mesh.vertices[mesh.faces][:, :, 1].mean(axis=1)
    low = mesh.vertices[:, 1].min()
    hangs = (normals[:, 1] < -STEEP - 1e-9) & (height > low + GROUND * np.ptp(mesh.vertices[:, 1]))
    return float(areas[hangs].sum() / areas.sum())


def verdict(degrees: float) -> str:
    """'stands', 'barely' or 'tips'."""
    return "stands" if degrees >= STANDS else "tips" if degrees <= 0 else "barely"
