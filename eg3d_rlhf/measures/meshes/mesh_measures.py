"""All measures of a mesh in one call: what the census lists, and what the reward `solid` of a mesh reads.

    measure_mesh(clean_mesh(vertices, faces))["closed"]

docs/guides/check-assets.md says of each what it means and what fools it. libigl is needed, manifold3d for
`overlap`; Embree makes rays faster.

Letters: V vertices, F faces, P parts.
"""

from dataclasses import replace

import numpy as np
from scipy.spatial import ConvexHull, QhullError

from eg3d_rlhf.geometry.mesh import compact, face_volumes
from eg3d_rlhf.geometry.solids import fill
from eg3d_rlhf.measures.meshes import static_stability as standing
from eg3d_rlhf.measures.meshes.clean import CleanMesh, face_areas
from eg3d_rlhf.measures.meshes.edges import Edges, bend, edge_measures
from eg3d_rlhf.measures.meshes.settings import MeasureOptions
from eg3d_rlhf.measures.meshes.space import OFFSET, Space, sample, side_measures, solid_library

VOXELS = 32  # per edge of the cube, for symmetry, hollows and the mass of open bodies
MOST_BODIES = 256  # parts whose union is taken


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
    degrees = standing.tip(mesh.vertices, centre)
    measures |= {
        "inverted_bodies": len(inverted),
        "overhang": standing.overhang(mesh),
        "tip": degrees,
        "stands": standing.verdict(degrees),
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
    if hull is not None and (centre := standing.volume_centre(hull)) is not None:
        return "hull", centre
    if measures["closed"] and measures["oriented"] and (centre := standing.volume_centre(mesh)) is not None:
        return "volume", centre
    if measures["sheet"] <= 0.5 and (centre := standing.voxel_centre(solid)) is not None:
        return "voxels", centre
    return "area", standing.area_centre(mesh)


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
