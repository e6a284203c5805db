"""The score `solid` of a mesh: that of its voxels, times what voxels do not see."""

import math
from collections.abc import Mapping
from dataclasses import replace

from eg3d_rlhf.geometry import solids
from eg3d_rlhf.measures.meshes.clean import CleanMesh
from eg3d_rlhf.measures.meshes.edges import Edges
from eg3d_rlhf.measures.meshes.measure import DEFAULT, measure_mesh, signed_volume
from eg3d_rlhf.measures.meshes.space import Space

EXTENT = 0.94  # of the cube's edge that the body takes


def solid_mesh(
    mesh: CleanMesh, measures: Mapping | None = None, rules: solids.Rules = solids.OBJECTS
) -> solids.Score:
    """How sound a mesh is: the terms are those of its voxels at EDGE^3, where the winding number is above one
    half, and

        solid = solid of the voxels * (1 - buried) / (1 + open_length)
                * exp(-8 (nonmanifold edges / edges + flipped_share)).

    A mesh that is inside out as a whole is turned over first, since nothing lies inside it. All 0 where
    nothing is inside.

    Args: measures: of the mesh the right way round, where they are known (`measure_mesh`).
    Raises: ValueError naming the extra `solid` where libigl is missing.
    """
    if signed_volume(mesh) < 0:
        mesh = mesh.flipped()
        measures = None
    known = (
        measure_mesh(mesh, DEFAULT, without=("crossing", "overlap", "symmetry"))
        if measures is None
        else measures
    )
    found = solids.score(Space(mesh).voxels(solids.EDGE, 1 / EXTENT), rules)
    bad = known["nonmanifold_edges"] / len(Edges(mesh).ends) + known["flipped_share"]
    return replace(
        found, solid=found.solid * (1 - known["buried"]) / (1 + known["open_length"]) * math.exp(-8 * bad)
    )
