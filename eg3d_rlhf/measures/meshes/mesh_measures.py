"""Compute all measures of a mesh in one call, for mesh validation and for the reward of valid solids.

    measure_mesh(clean_mesh(vertices, faces))["closed"]

docs/guides/check-assets.md describes each measure, and the meshes for which it gives a wrong result. libigl
is required, and manifold3d for `overlap`. Embree is optional and makes rays faster.

Shapes: V vertices, F faces, P points. A part is a connected set of faces, see `edges`. Voxels are bool arrays
[x, y, z] over the unit cube around the origin.
"""

import math
from dataclasses import replace

import numpy as np
from scipy.spatial import ConvexHull, QhullError

from eg3d_rlhf.geometry.mesh import face_volumes, remove_unused_vertices
from eg3d_rlhf.geometry.solids import fill
from eg3d_rlhf.measures.meshes.clean import CleanMesh, face_areas
from eg3d_rlhf.measures.meshes.edges import Edges, bend, edge_measures
from eg3d_rlhf.measures.meshes.settings import MeasureOptions
from eg3d_rlhf.measures.meshes.space import OFFSET, Space, sample, side_measures, solid_library

VOXELS = 32  # voxels per side of the cube, for symmetry, hollows and the mass of open bodies
MAX_BODIES = 256  # largest number of parts whose union is computed; with more parts, `overlap` is None
FOOT = 0.01  # share of the height: vertices up to this height above the lowest one touch the ground
STANDS = 3.0  # degrees; a body that can be tilted by at least this angle is said to stand
STEEP = math.cos(math.radians(45))  # smallest downward component of the normal of an overhanging face
GROUND = 0.02  # share of the height: lower faces count as lying on the ground and not as overhangs


DEFAULT = MeasureOptions()


def measure_mesh(mesh: CleanMesh, measure_options: MeasureOptions = DEFAULT) -> dict:
    """Compute all measures of a mesh.

    Args:
        mesh: cleaned mesh.
        measure_options: numbers of samples and thresholds.

    Returns: the measures by name, as JSON values. Lengths are shares of the longest edge of the bounding box,
        and angles are in degrees. A measure that is not defined for the mesh is None.
    Raises: ValueError if a library of the package's extra `solid` is not installed.
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
    # All measures of sides are estimated from the same random points.
    points, normals = sample(mesh, measure_options.samples, measure_options.seed)
    measures |= side_measures(
        space, points, normals, measure_options.thin, measure_options.rays, measure_options.seed
    )
    # Only a closed and consistently wound mesh has an inside that the sign of a volume can describe.
    has_inside = measures["closed"] and measures["oriented"]
    negative_part_numbers = negative_parts(edges) if has_inside else np.zeros(0, dtype=np.int64)
    # A part of negative volume is a cavity if other parts contain it, and an inverted body otherwise.
    inverted_part_numbers = negative_part_numbers[~find_contained(edges, space, negative_part_numbers)]
    # [x, y, z] bool, in the unit cube that contains the cleaned mesh
    solid_voxels = space.voxels(VOXELS)
    hull = convex_hull(mesh)
    mass_body, mass_centre_point = mass_centre(
        mesh, measures, solid_voxels, hull if measure_options.hull_mass else None
    )
    tip_degrees = tip(mesh.vertices, mass_centre_point)
    measures |= {
        "inverted_bodies": len(inverted_part_numbers),
        "overhang": overhang(mesh),
        "tip": tip_degrees,
        "stands": stability(tip_degrees),
        # Name of the body whose mass is assumed, see the result of `mass_centre`
        "mass": mass_body,
        "solidity": None,
        "bend": None,
    }
    # A flat mesh has no hull, so measures relative to the hull stay None.
    if hull is not None:
        measures |= {
            # 1 for convex bodies, smaller for all other bodies
            "solidity": measures["volume"] / signed_volume(hull),
            # 1 for convex bodies, larger for rough surfaces
            "bend": bend(edges) / bend(Edges(hull)),
        }
    # `fill` also fills hollows whose openings are narrower than a ball of radius `leak`, in voxels here.
    inner_share = (
        1 - solid_voxels.sum() / fill(solid_voxels, measure_options.leak * VOXELS).sum()
        if solid_voxels.any()
        else None
    )
    return measures | {
        "crossing": float(space.crossing_faces(edges).mean()),
        "overlap": overlap(edges, np.setdiff1d(negative_part_numbers, inverted_part_numbers))
        if has_inside
        else None,
        "symmetry": mirror_overlap(solid_voxels),
        "inner": None if inner_share is None else float(inner_share),
    }


def signed_volume(mesh: CleanMesh) -> float:
    """Compute the volume that the mesh encloses. It is negative if the faces are wound inwards."""
    return float(face_volumes(mesh.vertices, mesh.faces).sum())


def convex_hull(mesh: CleanMesh) -> CleanMesh | None:
    """Compute the convex hull of a mesh, wound outwards. Returns None if all vertices lie in a plane."""
    try:
        hull = ConvexHull(mesh.vertices)
    except (QhullError, ValueError):  # all vertices in one plane, or too few of them
        return None
    faces = hull.simplices.astype(np.int64)
    # scipy does not orient the triangles of a hull. The first three columns of its equations are their
    # outward normals. Reversing the vertices of a face turns the face around.
    a, b, c = (mesh.vertices[faces[:, i]] for i in range(3))
    # The normal of the winding points against the outward normal of the hull's plane.
    is_inward = (np.cross(b - a, c - a) * hull.equations[:, :3]).sum(axis=1) < 0
    faces[is_inward] = faces[is_inward][:, ::-1]
    vertices, faces = remove_unused_vertices(mesh.vertices, faces)
    return replace(mesh, vertices=vertices, faces=faces)


def mass_centre(
    mesh: CleanMesh, measures: dict, solid_voxels: np.ndarray, hull: CleanMesh | None
) -> tuple[str, np.ndarray]:
    """Compute the centre of mass of a mesh.

    The mass fills the first of these bodies that has a volume: the hull if `hull` is given, the inside of a
    closed and consistently wound mesh, the inner voxels of an open mesh that is not mainly a sheet. Otherwise
    the mass is spread over the area of the faces.

    Args:
        mesh: cleaned mesh.
        measures: measures 'closed', 'oriented' and 'sheet' of the mesh.
        solid_voxels: voxels inside the mesh.
        hull: convex hull of the mesh, or None.

    Returns: the name of the body, 'hull', 'volume', 'voxels' or 'area'; and the centre of mass [3].
    """
    # A centre is None if the volume is zero; the next case then applies. A mesh counts as a sheet if more
    # than half of its samples have no material on either side.
    if hull is not None and (centre := volume_centre(hull)) is not None:
        return "hull", centre
    if measures["closed"] and measures["oriented"] and (centre := volume_centre(mesh)) is not None:
        return "volume", centre
    if measures["sheet"] <= 0.5 and (centre := voxel_centre(solid_voxels)) is not None:
        return "voxels", centre
    return "area", area_centre(mesh)


def negative_parts(edges: Edges) -> np.ndarray:
    """Return the numbers of the parts that enclose a negative volume."""
    part_of_face, part_count = edges.part
    # The volumes of the tetrahedra between the origin and each face add up to the volume of a part. For
    # an open part, the sum depends on the origin.
    part_volumes = np.bincount(part_of_face, face_volumes(edges.mesh.vertices, edges.mesh.faces), part_count)
    return np.flatnonzero(part_volumes < 0)


def find_contained(edges: Edges, space: Space, part_numbers: np.ndarray) -> np.ndarray:
    """Return bool [len(part_numbers)]: True for each of the given parts that lies inside other parts.

    A part lies inside if the winding number of all other parts, at a point beside the largest face of the
    part, is not 0.

    Args:
        edges: edges of the mesh.
        space: the same mesh, for winding numbers.
        part_numbers: numbers of the parts to test.
    """
    mesh = edges.mesh
    part_of_face, _ = edges.part
    normals, areas = face_areas(mesh)
    is_contained = np.zeros(len(part_numbers), dtype=bool)
    for i, part_number in enumerate(part_numbers):
        part_faces = np.flatnonzero(part_of_face == part_number)
        largest_face = part_faces[areas[part_faces].argmax()]
        # Beside the face and not on it: on a surface, winding numbers are not defined.
        test_point = (mesh.vertices[mesh.faces[largest_face]].mean(axis=0) + OFFSET * normals[largest_face])[
            None
        ]
        # libigl needs contiguous arrays.
        # All other parts together, so that a cavity in a body of several parts is recognised.
        other_faces = np.ascontiguousarray(mesh.faces[part_of_face != part_number])
        # Winding numbers are close to integers, so 0.5 separates 0 from all others.
        is_contained[i] = (
            bool(len(other_faces))
            and abs(float(space.igl.winding_number(mesh.vertices, other_faces, test_point)[0])) > 0.5
        )
    return is_contained


def overlap(edges: Edges, cavity_part_numbers: np.ndarray) -> float | None:
    """Compute the overlap of the bodies of a mesh, 1 - (volume of their union) / (sum of their volumes).

    The volume of cavities is subtracted from the volume of the union and from the sum.

    Args:
        edges: edges of a closed and consistently wound mesh.
        cavity_part_numbers: numbers of the parts that are cavities.

    Returns: the overlap, 0..1; 0 for a single part. None if manifold3d rejects a part as not solid, if there
        are more than MAX_BODIES parts, or if the volumes sum to 0.
    Raises: ValueError if manifold3d is needed and not installed.
    """
    mesh = edges.mesh
    part_of_face, part_count = edges.part
    # A single part cannot overlap another one, and needs no manifold3d.
    if part_count == 1:
        return 0.0
    if part_count > MAX_BODIES:
        return None
    # manifold3d computes exact unions of solids; voxels would miss thin overlaps.
    manifold3d = solid_library("manifold3d")
    bodies: list = []
    hollows: list = []
    for part_number in range(part_count):
        vertices, faces = remove_unused_vertices(mesh.vertices, mesh.faces[part_of_face == part_number])
        if face_volumes(vertices, faces).sum() < 0:
            # manifold3d accepts only parts that are wound outwards.
            faces = np.ascontiguousarray(faces[:, ::-1])
        body = manifold3d.Manifold(manifold3d.Mesh64(np.ascontiguousarray(vertices), faces.astype(np.uint64)))
        # A part that is closed but pinched or crossing itself may be rejected.
        if body.status() != manifold3d.Error.NoError:
            return None
        # Cavities are not part of the union; their volume is subtracted below.
        if part_number in cavity_part_numbers:
            hollows.append(body)
        else:
            bodies.append(body)
    hollow_volume = sum(hollow.volume() for hollow in hollows)
    total_volume = sum(body.volume() for body in bodies) - hollow_volume
    union_volume = manifold3d.Manifold.batch_boolean(bodies, manifold3d.OpType.Add).volume() - hollow_volume
    # Rounding can make the union slightly larger than the sum.
    return max(0.0, 1 - union_volume / total_volume) if total_volume > 0 else None


def mirror_overlap(solid_voxels: np.ndarray) -> float:
    """Compute the intersection over union, 0..1, of voxels [x, y, z] and their mirror image in x.

    The result is 1 if all voxels are empty.
    """
    # The axis 0 is x, so [::-1] mirrors left and right.
    union_count = (solid_voxels | solid_voxels[::-1]).sum()
    return float((solid_voxels & solid_voxels[::-1]).sum() / union_count) if union_count else 1.0


# Static stability is measured as the angle in degrees by which a body can be tilted until its centre of mass
# is no longer above its foot. The foot is the convex hull of the vertices that touch the ground, as in the
# physics simulator MuJoCo, which computes contacts of convex hulls. By default the mass is that of the body
# itself; MuJoCo and DSO use its convex hull. Between 0 and 3 degrees the result depends too much on
# tolerances to say if the body stands. A ball gets 7.6 degrees, because vertices up to a small height count
# as touching the ground.


def tip(vertices: np.ndarray, centre: np.ndarray) -> float:
    """Compute the angle in degrees by which a body can be tilted before it falls.

    The angle is atan2(d, h). d is the distance of the centre of mass to the border of the foot, in the
    horizontal plane and positive inside the foot. h is the height of the centre above the ground. The angle
    is negative if the body falls without being tilted.

    Args:
        vertices: vertices [V, 3]; y points up.
        centre: centre of mass [3].
    """
    lowest_y = float(vertices[:, 1].min())
    highest_y = float(vertices[:, 1].max())
    # Horizontal coordinates x and z of the vertices that touch the ground
    foot_points = vertices[vertices[:, 1] <= lowest_y + FOOT * (highest_y - lowest_y)][:, [0, 2]]
    return math.degrees(math.atan2(inside_distance(foot_points, centre[[0, 2]]), float(centre[1]) - lowest_y))


def inside_distance(foot_points: np.ndarray, point: np.ndarray) -> float:
    """Compute the signed distance of a point to the border of the convex hull of other points.

    The distance is positive inside the hull, and negative or 0 outside. A hull that is a line or a single
    point has no inside.

    Args:
        foot_points: points [P, 2], P >= 1.
        point: point [2].
    """
    foot_points = np.unique(foot_points, axis=0)
    try:
        hull = ConvexHull(foot_points)
    except (QhullError, ValueError):  # all points on a line, or a single one
        # The first right singular vector is the direction of the line; its ends are the extreme points.
        line_direction = np.linalg.svd(foot_points - foot_points.mean(axis=0), full_matrices=False)[2][0]
        positions = foot_points @ line_direction
        return -_to_segment(foot_points[positions.argmin()], foot_points[positions.argmax()], point)
    # Signed distances to the lines through the hull's sides, negative inside. Outside, the nearest point may
    # be a corner, so distances to the sides themselves are needed.
    line_distance = float((hull.equations[:, :2] @ point + hull.equations[:, 2]).max())
    if line_distance <= 0:
        return -line_distance
    return -min(_to_segment(foot_points[a], foot_points[b], point) for a, b in hull.simplices)


def _to_segment(a: np.ndarray, b: np.ndarray, point: np.ndarray) -> float:
    """Compute the distance of a point [2] to the line segment from a to b.

    Args:
        a: first end [2] of the segment.
        b: second end [2] of the segment.
        point: point [2].
    """
    segment = b - a
    squared_length = float(segment @ segment)
    # Position of the nearest point along the segment, 0 at a and 1 at b; 0 for a segment of length 0
    t = min(max(float((point - a) @ segment) / squared_length, 0.0), 1.0) if squared_length else 0.0
    return float(np.linalg.norm(point - a - t * segment))


def volume_centre(mesh: CleanMesh) -> np.ndarray | None:
    """Compute the centre of mass [3] of the volume that a closed mesh encloses.

    Returns None if the volume is 0.
    """
    volumes = face_volumes(mesh.vertices, mesh.faces)
    total_volume = volumes.sum()
    if abs(total_volume) < 1e-12:
        return None
    # The centre of a tetrahedron from the origin to a face is the sum of the face's corners over 4.
    return volumes @ mesh.vertices[mesh.faces].sum(axis=1) / 4 / total_volume


def area_centre(mesh: CleanMesh) -> np.ndarray:
    """Compute the centre of mass [3] of a mesh whose faces are sheets of constant thickness."""
    _, areas = face_areas(mesh)
    return areas @ mesh.vertices[mesh.faces].mean(axis=1) / areas.sum()


def voxel_centre(solid_voxels: np.ndarray) -> np.ndarray | None:
    """Compute the centre of mass [3] of voxels [x, y, z] of the unit cube around the origin.

    Returns None if all voxels are empty.
    """
    if not solid_voxels.any():
        return None
    # Index i has its centre at (i + 0.5) / n - 0.5.
    return np.argwhere(solid_voxels).mean(axis=0) / solid_voxels.shape[0] + 0.5 / solid_voxels.shape[0] - 0.5


def overhang(mesh: CleanMesh) -> float:
    """Compute the share of the area, 0..1, whose normal is less than 45 degrees from straight down.

    Faces whose centre lies in the lowest 2 % of the height do not count, because they lie on the ground.
    """
    normals, areas = face_areas(mesh)
    face_heights = mesh.vertices[mesh.faces][:, :, 1].mean(axis=1)
    lowest_y = mesh.vertices[:, 1].min()
    # The margin excludes slopes of exactly 45 degrees, whose normals round either way.
    is_overhanging = (normals[:, 1] < -STEEP - 1e-9) & (
        face_heights > lowest_y + GROUND * np.ptp(mesh.vertices[:, 1])
    )
    return float(areas[is_overhanging].sum() / areas.sum())


def stability(degrees: float) -> str:
    """Classify the static stability of a body by the angle of `tip`, in degrees.

    Returns: 'stands' from STANDS on, 'tips' at 0 and below, 'barely' in between.
    """
    if degrees >= STANDS:
        return "stands"
    return "tips" if degrees <= 0 else "barely"
