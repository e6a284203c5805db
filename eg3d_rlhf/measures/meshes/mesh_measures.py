"""Compute all measures of a mesh in one call, for mesh validation and for the reward `solid` of a mesh.

    measure_mesh(clean_mesh(vertices, faces))["closed"]

docs/guides/check-assets.md describes what each measure means and which meshes mislead it. libigl is required,
and manifold3d for `overlap`. Embree is optional and makes rays faster.

Letters: V vertices, F faces, P parts, or points of the foot.
"""

import math
from dataclasses import replace

import numpy as np
from scipy.spatial import ConvexHull, QhullError

from eg3d_rlhf.geometry.mesh import compact, face_volumes
from eg3d_rlhf.geometry.solids import fill
from eg3d_rlhf.measures.meshes.clean import CleanMesh, face_areas
from eg3d_rlhf.measures.meshes.edges import Edges, bend, edge_measures
from eg3d_rlhf.measures.meshes.settings import MeasureOptions
from eg3d_rlhf.measures.meshes.space import OFFSET, Space, sample, side_measures, solid_library

VOXELS = 32  # per edge of the cube, for symmetry, hollows and the mass of open bodies
MOST_BODIES = 256  # parts whose union is computed; with more of them, `overlap` is None
FOOT = 0.01  # of the height: vertices up to this height above the lowest one touch the ground
STANDS = 3.0  # degrees; a body that can be tilted by at least this angle stands
STEEP = math.cos(math.radians(45))  # overhang: least downward component of the normal
GROUND = 0.02  # overhang: share of the height that counts as ground


DEFAULT = MeasureOptions()


def measure_mesh(mesh: CleanMesh, options: MeasureOptions = DEFAULT) -> dict:
    """Compute every measure by name; lengths are in longest edges, and angles in degrees.

    A measure that is not defined for the mesh is None.
    Raises: ValueError naming the extra `solid` if a library is missing.
    """
    edges = Edges(mesh)
    space = Space(mesh)
    measures = {
        "edge_L": mesh.edge,
        "welded": mesh.welded,
        "degenerate": mesh.degenerate,
        "duplicate": mesh.duplicate,
        "raw_open_share": mesh.raw_open_share,
        **edge_measures(edges),
    }
    points, normals = sample(mesh, options.samples, options.seed)
    # Estimates from the same random points
    measures |= side_measures(space, points, normals, options.thin, options.rays, options.seed)
    # Only a closed and consistently wound mesh has an inside that the sign of a volume can describe.
    body = measures["closed"] and measures["oriented"]
    negative = negative_parts(edges) if body else np.zeros(0, dtype=np.int64)
    # A part of negative volume is a cavity if other parts contain it, and an inverted body otherwise.
    inverted = negative[~contained(edges, space, negative)]
    solid = space.voxels(VOXELS)
    hull = hull_of(mesh)
    mass, centre = mass_centre(mesh, measures, solid, hull if options.hull_mass else None)
    degrees = tip(mesh.vertices, centre)
    measures |= {
        "inverted_bodies": len(inverted),
        "overhang": overhang(mesh),
        "tip": degrees,
        "stands": stability(degrees),
        # What carries the mass, see `mass_centre`
        "mass": mass,
        "solidity": None,
        "bend": None,
    }
    # A flat mesh has no hull, so measures relative to the hull stay None.
    if hull is not None:
        measures |= {
            # 1 for convex bodies, smaller for others
            "solidity": measures["volume"] / signed_volume(hull),
            # 1 for convex bodies, larger for rough ones
            "bend": bend(edges) / bend(Edges(hull)),
        }
    # `fill` also fills hollows whose openings are narrower than a ball of radius `leak`, in voxels here.
    inner = 1 - solid.sum() / fill(solid, options.leak * VOXELS).sum() if solid.any() else None
    return measures | {
        "crossing": float(space.crossing_faces(edges).mean()),
        "overlap": overlap(edges, np.setdiff1d(negative, inverted)) if body else None,
        "symmetry": mirror_overlap(solid),
        "inner": None if inner is None else float(inner),
    }


def signed_volume(mesh: CleanMesh) -> float:
    """Return the volume that the mesh encloses; negative if the mesh is inside out."""
    return float(face_volumes(mesh.vertices, mesh.faces).sum())


def hull_of(mesh: CleanMesh) -> CleanMesh | None:
    """Return the convex hull, wound outwards, or None for a flat mesh."""
    try:
        hull = ConvexHull(mesh.vertices)
    except (QhullError, ValueError):  # all vertices in one plane, or too few of them
        return None
    faces = hull.simplices.astype(np.int64)
    # scipy does not orient the triangles of a hull. Its equations hold outward normals.
    a, b, c = (mesh.vertices[faces[:, i]] for i in range(3))
    inwards = (np.cross(b - a, c - a) * hull.equations[:, :3]).sum(axis=1) < 0
    faces[inwards] = faces[inwards][:, ::-1]
    vertices, faces = compact(mesh.vertices, faces)
    return replace(mesh, vertices=vertices, faces=faces)


def mass_centre(
    mesh: CleanMesh, measures: dict, solid: np.ndarray, hull: CleanMesh | None
) -> tuple[str, np.ndarray]:
    """Return the name of what carries the mass, and its centre [3].

    These are the hull if it is given, the volume of a closed mesh, the voxels inside an open mesh, or the
    area of a sheet.
    """
    # Each case falls through to the next one if its volume is zero.
    if hull is not None and (centre := volume_centre(hull)) is not None:
        return "hull", centre
    if measures["closed"] and measures["oriented"] and (centre := volume_centre(mesh)) is not None:
        return "volume", centre
    if measures["sheet"] <= 0.5 and (centre := voxel_centre(solid)) is not None:
        return "voxels", centre
    return "area", area_centre(mesh)


def negative_parts(edges: Edges) -> np.ndarray:
    """Return the numbers of the parts that enclose a negative volume."""
    part, parts = edges.part
    return np.flatnonzero(np.bincount(part, face_volumes(edges.mesh.vertices, edges.mesh.faces), parts) < 0)


def contained(edges: Edges, space: Space, numbers: np.ndarray) -> np.ndarray:
    """Return for each of the numbered parts whether other parts contain it, as bool [len(numbers)].

    It is contained if the winding number of all other parts, at a point beside its largest face, is not 0.
    """
    mesh = edges.mesh
    part, _ = edges.part
    normals, areas = face_areas(mesh)
    result = np.zeros(len(numbers), dtype=bool)
    for i, number in enumerate(numbers):
        part_faces = np.flatnonzero(part == number)
        face = part_faces[areas[part_faces].argmax()]
        # Beside the face and not on it: on a surface, winding numbers are not defined.
        point = (mesh.vertices[mesh.faces[face]].mean(axis=0) + OFFSET * normals[face])[None]
        # All other parts; libigl needs contiguous arrays.
        rest = np.ascontiguousarray(mesh.faces[part != number])
        result[i] = (
            bool(len(rest)) and abs(float(space.igl.winding_number(mesh.vertices, rest, point)[0])) > 0.5
        )
    return result


def overlap(edges: Edges, cavities: np.ndarray) -> float | None:
    """Compute the overlap of several bodies: 1 - volume of their union / summed volume.

    The volume of cavities is subtracted from both. Returns None if manifold3d rejects a part as not solid, or
    if there are more than MOST_BODIES parts.
    Args: cavities: numbers of the parts that are cavities.
    """
    mesh = edges.mesh
    part, parts = edges.part
    # A single part cannot overlap another one, and needs no manifold3d.
    if parts == 1:
        return 0.0
    if parts > MOST_BODIES:
        return None
    manifold3d = solid_library("manifold3d")
    bodies: list = []
    hollows: list = []
    for number in range(parts):
        vertices, faces = compact(mesh.vertices, mesh.faces[part == number])
        if face_volumes(vertices, faces).sum() < 0:
            # manifold3d accepts only parts that are wound outwards.
            faces = np.ascontiguousarray(faces[:, ::-1])
        body = manifold3d.Manifold(manifold3d.Mesh64(np.ascontiguousarray(vertices), faces.astype(np.uint64)))
        if body.status() != manifold3d.Error.NoError:
            return None
        # A cavity is subtracted and not united.
        (hollows if number in cavities else bodies).append(body)
    hollow = sum(cavity.volume() for cavity in hollows)
    summed = sum(body.volume() for body in bodies) - hollow
    union = manifold3d.Manifold.batch_boolean(bodies, manifold3d.OpType.Add).volume() - hollow
    # Rounding can make the union slightly larger than the sum.
    return max(0.0, 1 - union / summed) if summed > 0 else None


def mirror_overlap(solid: np.ndarray) -> float:
    """Compute the IoU of voxels [x, y, z] and their mirror image in x; 1 if all are empty."""
    union = (solid | solid[::-1]).sum()
    return float((solid & solid[::-1]).sum() / union) if union else 1.0


# Static stability: by how many degrees a body can be tilted before its centre of mass leaves its foot. The
# foot is the convex hull of the vertices that touch the ground, since MuJoCo collides convex hulls. The
# mass is that of the body, not that of its hull (which MuJoCo and DSO use). Between 0 and 3 degrees the
# result depends too much on tolerances to be called either way. A ball gets 7.6 degrees, because vertices
# up to a small height count as touching.


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
