"""Analyse the edges of a mesh: find out if it is closed, manifold and consistently wound, and count its
parts.

Two faces are neighbours if they share an edge, independent of their winding. A part is a connected set of
faces. A corner is a vertex of one face, and a half-edge is an edge of one face, in the direction of its
winding. The corners at a vertex that are connected by shared edges form a fan. A vertex with several fans is
called pinched. A rim is a closed loop of open edges, which are edges with one face.

Shapes: V vertices, F faces, E unique edges, C = 3F corners or half-edges. Corner 3f + i is corner i of face
f, and half-edge 3f + i runs from that corner to the next corner of the face.
"""

import functools

import numpy as np

from eg3d_rlhf.geometry.mesh import face_volumes
from eg3d_rlhf.measures.meshes.clean import CleanMesh, face_areas
from eg3d_rlhf.measures.surface import connected, topology


class Edges:
    """Unique edges of a clean mesh, and the faces at each edge."""

    def __init__(self, mesh: CleanMesh):
        self.mesh = mesh
        start_vertex = mesh.faces.reshape(-1)  # [C]
        end_vertex = mesh.faces[:, [1, 2, 0]].reshape(-1)  # [C]
        lower_vertex = np.minimum(start_vertex, end_vertex)
        higher_vertex = np.maximum(start_vertex, end_vertex)
        edge_codes = lower_vertex * len(mesh.vertices) + higher_vertex  # one integer per undirected edge
        self.order = np.argsort(
            edge_codes, kind="stable"
        )  # half-edges [C], sorted so that those of an edge are together
        # [E] position in `order` of the first half-edge of each edge
        self.edge_starts = np.flatnonzero(np.diff(edge_codes[self.order], prepend=-1))
        self.faces = np.diff(np.append(self.edge_starts, len(edge_codes)))  # [E] number of faces at each edge
        first_half_edge = self.order[self.edge_starts]
        # [E, 2] vertices of each edge, the lower number first
        self.ends = np.stack([lower_vertex[first_half_edge], higher_vertex[first_half_edge]], axis=1)
        # [C] bool in the order of `order`: the half-edge runs from the lower vertex number to the higher one
        self.upward = (start_vertex < end_vertex)[self.order]

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Lengths [E] of the edges."""
        # [E, 3] each
        start_positions, end_positions = (self.mesh.vertices[self.ends[:, i]] for i in range(2))
        return np.linalg.norm(end_positions - start_positions, axis=1)

    @functools.cached_property
    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """Half-edges of every edge with exactly two faces, as two arrays with one half-edge of each edge."""
        pair_starts = self.edge_starts[self.faces == 2]
        return self.order[pair_starts], self.order[pair_starts + 1]

    @functools.cached_property
    def flipped(self) -> np.ndarray:
        """True for every edge with exactly two faces that run through the edge in the same direction.

        The array has one entry per edge with exactly two faces. Consistently wound faces run through their
        common edge in opposite directions.
        """
        pair_starts = self.edge_starts[self.faces == 2]
        return self.upward[pair_starts] == self.upward[pair_starts + 1]

    @functools.cached_property
    def neighbours(self) -> tuple[np.ndarray, np.ndarray]:
        """Pairs of half-edges at the same edge, as two arrays.

        At an edge with n faces there are n - 1 pairs, which connect all these faces.
        """
        # In the sorted order, each half-edge is paired with the previous one of the same edge.
        has_predecessor = np.ones(len(self.order), dtype=bool)
        has_predecessor[self.edge_starts] = False  # the first half-edge of an edge has none
        order_positions = np.flatnonzero(has_predecessor)
        return self.order[order_positions - 1], self.order[order_positions]

    @functools.cached_property
    def part(self) -> tuple[np.ndarray, int]:
        """Number [F] of the part of each face, and the count of parts."""
        first_half_edges, second_half_edges = self.neighbours
        return connected(
            [(first_half_edges // 3, second_half_edges // 3)], len(self.mesh.faces)
        )  # half-edge 3f + i belongs to face f

    @functools.cached_property
    def fan(self) -> tuple[np.ndarray, int]:
        """Number [C] of the fan of each corner, and the count of fans."""
        a, b = self.neighbours
        start_vertex = self.mesh.faces.reshape(-1)
        # Two half-edges a and b at one edge connect two pairs of corners, one at each
        # end of the edge. If both run in the same direction, their starts belong
        # together. Otherwise the start of a belongs to the end of b.
        is_same_direction = start_vertex[a] == start_vertex[b]
        end_of_a = _next_half_edge(a)
        end_of_b = _next_half_edge(b)
        first_corners = np.concatenate([a, end_of_a])
        second_corners = np.concatenate(
            [np.where(is_same_direction, b, end_of_b), np.where(is_same_direction, end_of_b, b)]
        )
        return connected([(first_corners, second_corners)], 3 * len(self.mesh.faces))

    def rims(self) -> int:
        """Count loops of open edges. Two loops that touch at a pinched vertex count as two."""
        # An edge with one face has one half-edge, so its start in `order` is that half-edge.
        open_half_edges = self.order[self.edge_starts[self.faces == 1]]
        if not len(open_half_edges):
            return 0
        # The nodes of the loops are fans and not vertices: at a pinched vertex, each loop has its own fan.
        fan_of_corner, _ = self.fan
        # [2, open half-edges]: the fans at both ends, which are the nodes of a graph. Its components are
        # the rims.
        end_fans = np.stack([fan_of_corner[open_half_edges], fan_of_corner[_next_half_edge(open_half_edges)]])
        # Renumber the fans at rims from 0. numpy versions differ in the shape of the inverse.
        rim_fans, end_nodes = np.unique(end_fans, return_inverse=True)
        end_nodes = end_nodes.reshape(2, -1)
        return connected([(end_nodes[0], end_nodes[1])], len(rim_fans))[1]


def edge_measures(edges: Edges) -> dict:
    """Compute all measures of a mesh that follow from its edges and faces.

    Returns: measures by name, as JSON values; docs/guides/check-assets.md explains them. Lengths, areas and
        volumes are in units of the longest edge of the bounding box.
    """
    mesh = edges.mesh
    _, areas = face_areas(mesh)
    total_area = float(areas.sum())
    is_open = edges.faces == 1
    is_nonmanifold = edges.faces > 2
    part_of_face, part_count = edges.part
    # A vertex with k fans is pinched k - 1 times.
    pinch_count = edges.fan[1] - len(mesh.vertices)
    euler_number = len(mesh.vertices) - len(edges.ends) + len(mesh.faces)
    rim_count = edges.rims()
    # bincount with weights adds up a value of each face by part: [F] -> [parts].
    part_areas = np.bincount(part_of_face, areas, part_count)
    part_volumes = np.bincount(part_of_face, face_volumes(mesh.vertices, mesh.faces), part_count)
    # The absolute values, so that inverted parts and cavities do not cancel other parts.
    total_volume = float(np.abs(part_volumes).sum())
    mesh_topology = topology(mesh.vertices, mesh.faces)
    return {
        "faces": len(mesh.faces),
        "area": total_area,
        "volume": float(part_volumes.sum()),
        "open_edges": int(is_open.sum()),
        "open_share": float(is_open.mean()),
        # Divided by the square root of the area, so that it does not depend on the size of the mesh.
        "open_length": float(edges.lengths[is_open].sum()) / total_area**0.5,
        "nonmanifold_edges": int(is_nonmanifold.sum()),
        "pinched": pinch_count,
        "flipped_share": float(edges.flipped.mean()) if len(edges.flipped) else 0.0,
        "closed": not is_open.any(),
        "manifold": not is_nonmanifold.any() and pinch_count == 0,
        "oriented": not edges.flipped.any(),
        "euler": euler_number,
        "rims": rim_count,
        # Euler's formula, summed over parts: euler = 2 parts - 2 genus - rims
        "genus": (2 * part_count - rim_count - euler_number) / 2,
        "parts": part_count,
        "bodies": mesh_topology.parts,
        "cavities": mesh_topology.cavities,
        "main_area": float(part_areas.max()) / total_area,
        "main_volume": float(np.abs(part_volumes).max()) / total_volume if total_volume > 0 else 0.0,
    }


def bend(edges: Edges) -> float:
    """Compute how strongly a surface is bent: half the sum of edge length times angle between normals.

    Only edges with exactly two faces count, and the angle (radians) is between the normals of the two faces.
    For a smooth surface, the sum approaches the integral of (|k1| + |k2|) / 2, where k1 and k2 are the
    principal curvatures.
    """
    normals, _ = face_areas(edges.mesh)
    # Half-edge 3f + i belongs to face f, so // 3 gives the faces at both sides of an edge.
    first_normals, second_normals = (normals[half_edges // 3] for half_edges in edges.pairs)
    # The arc tangent is accurate for small angles, where the arc cosine is not.
    sines = np.linalg.norm(np.cross(first_normals, second_normals), axis=1)
    angles = np.arctan2(sines, (first_normals * second_normals).sum(axis=1))
    return float((edges.lengths[edges.faces == 2] * angles).sum()) / 2


def _next_half_edge(half_edges: np.ndarray) -> np.ndarray:
    """Return for each half-edge the next half-edge of the same face.

    Its number is also that of the corner in which the given half-edge ends.
    """
    # Half-edges of a face are 3f, 3f + 1 and 3f + 2; the one after 3f + 2 is 3f.
    return np.where(half_edges % 3 == 2, half_edges - 2, half_edges + 1)
