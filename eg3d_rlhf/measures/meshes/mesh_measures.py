"""All measures of a mesh in one call: what the census lists, and what the reward `solid` of a mesh reads.

    measure_mesh(clean_mesh(vertices, faces))["closed"]

docs/guides/check-assets.md says of each what it means and what fools it. libigl is needed, manifold3d for
`overlap`; Embree makes rays faster.

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
MOST_BODIES = 256  # parts whose union is taken
FOOT = 0.01  # of the height: vertices so near to the lowest touch the floor
STANDS = 3.0  # degrees, at least
# overhang: downward part of the normal, and the share of the height that is floor
STEEP = math.cos(math.radians(45))
GROUND = 0.02


DEFAULT = MeasureOptions()


def measure_mesh(mesh: CleanMesh, options: MeasureOptions = DEFAULT) -> dict:
    """Every measure by name: counts, truth values, shares, lengths in longest edges, angles in degrees; None
    where it has no meaning.

    Raises: ValueError naming the extra `solid` where a library is missing.
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
    measures |= side_measures(space, points, normals, options.thin, options.rays, options.seed)
    body = measures["closed"] and measures["oriented"]
    negative = negative_parts(edges) if body else np.zeros(0, dtype=np.int64)
    inverted = negative[~contained(edges, space, negative)]
    solid = space.voxels(VOXELS)
    hull = hull_of(mesh)
    mass, centre = mass_centre(mesh, measures, solid, hull if options.hull_mass else None)
    degrees = tip(mesh.vertices, centre)
    measures |= {
        "inverted_bodies": len(inverted),
        "overhang": overhang(mesh),
        "tip": degrees,
        "stands": verdict(degrees),
        "mass": mass,
        "solidity": None,
        "bend": None,
    }
    if hull is not None:
        measures |= {
            "solidity": measures["volume"] / signed_volume(hull),
            "bend": bend(edges) / bend(Edges(hull)),
        }
    inner = 1 - solid.sum() / fill(solid, options.leak * VOXELS).sum() if solid.any() else None
    return measures | {
        "crossing": float(space.crossing_faces(edges).mean()),
        "overlap": overlap(edges, np.setdiff1d(negative, inverted)) if body else None,
        "symmetry": mirror_overlap(solid),
        "inner": None if inner is None else float(inner),
    }


def signed_volume(mesh: CleanMesh) -> float:
    """Of what the mesh encloses; negative where it is inside out."""
    return float(face_volumes(mesh.vertices, mesh.faces).sum())


def hull_of(mesh: CleanMesh) -> CleanMesh | None:
    """The convex hull, wound outwards; None of a flat mesh."""
    try:
        hull = ConvexHull(mesh.vertices)
    except (QhullError, ValueError):
        return None
    faces = hull.simplices.astype(np.int64)
    a, b, c = (mesh.vertices[faces[:, i]] for i in range(3))
    inwards = (np.cross(b - a, c - a) * hull.equations[:, :3]).sum(axis=1) < 0
    faces[inwards] = faces[inwards][:, ::-1]
    vertices, faces = compact(mesh.vertices, faces)
    return replace(mesh, vertices=vertices, faces=faces)


def mass_centre(
    mesh: CleanMesh, measures: dict, solid: np.ndarray, hull: CleanMesh | None
) -> tuple[str, np.ndarray]:
    """Return what carries the mass, and its centre [3]: the hull if given, the volume of a closed mesh,
    the voxels inside an open mesh, or the area of a sheet.
    """
    if hull is not None and (centre := volume_centre(hull)) is not None:
        return "hull", centre
    if measures["closed"] and measures["oriented"] and (centre := volume_centre(mesh)) is not None:
        return "volume", centre
    if measures["sheet"] <= 0.5 and (centre := voxel_centre(solid)) is not None:
        return "voxels", centre
    return "area", area_centre(mesh)


def negative_parts(edges: Edges) -> np.ndarray:
    """Numbers of the parts that enclose a negative volume."""
    part, parts = edges.part
    return np.flatnonzero(np.bincount(part, face_volumes(edges.mesh.vertices, edges.mesh.faces), parts) < 0)


def contained(edges: Edges, space: Space, numbers: np.ndarray) -> np.ndarray:
    """Whether each of some parts lies inside others: the winding number of the rest at a point beside its
    largest face is not 0.
    """
    mesh = edges.mesh
    part, _ = edges.part
    normals, areas = face_areas(mesh)
    result = np.zeros(len(numbers), dtype=bool)
    for i, number in enumerate(numbers):
        own = np.flatnonzero(part == number)
        face = own[areas[own].argmax()]
        point = (mesh.vertices[mesh.faces[face]].mean(axis=0) + OFFSET * normals[face])[None]
        rest = np.ascontiguousarray(mesh.faces[part != number])
        result[i] = (
            bool(len(rest)) and abs(float(space.igl.winding_number(mesh.vertices, rest, point)[0])) > 0.5
        )
    return result


def overlap(edges: Edges, cavities: np.ndarray) -> float | None:
    """Share of the volume that several bodies claim: 1 - volume of their union / summed volume, cavities
    taken off both.

    None where manifold3d takes a part for no solid, or there are more than MOST_BODIES parts. Args: cavities:
    numbers of parts.
    """
    mesh = edges.mesh
    part, parts = edges.part
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
            faces = np.ascontiguousarray(faces[:, ::-1])
        made = manifold3d.Manifold(manifold3d.Mesh64(np.ascontiguousarray(vertices), faces.astype(np.uint64)))
        if made.status() != manifold3d.Error.NoError:
            return None
        (hollows if number in cavities else bodies).append(made)
    hollow = sum(cavity.volume() for cavity in hollows)
    summed = sum(body.volume() for body in bodies) - hollow
    union = manifold3d.Manifold.batch_boolean(bodies, manifold3d.OpType.Add).volume() - hollow
    return max(0.0, 1 - union / summed) if summed > 0 else None


def mirror_overlap(solid: np.ndarray) -> float:
    """Intersection over union of voxels [x, y, z] with their mirror image in x; 1 where none is solid."""
    union = (solid | solid[::-1]).sum()
    return float((solid & solid[::-1]).sum() / union) if union else 1.0


# Standing: how far a body can be tilted before its centre of mass leaves its foot, the convex hull of what
# touches the floor, as MuJoCo collides hulls. The mass is the body's own, not the hull's (which is MuJoCo's
# default, and DSO's). Between 0 and 3 degrees neither answer is worth a verdict; a ball gets 7.6 from the
# height that counts as touching.


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
