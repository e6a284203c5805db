"""Analyse the edges of a mesh: closed, manifold, consistently wound; parts, rims, handles.

Two faces are neighbours if they share an edge, independent of their winding. A corner is a face at a vertex.
Corners around a vertex that shared edges connect form a fan. A vertex with several fans is pinched.

Letters: V vertices, F faces, E unique edges, C = 3F corners (corner 3f + i belongs to face f; half-edge
3f + i runs from it to the next one).
"""

import functools

import numpy as np

from eg3d_rlhf.geometry.mesh import face_volumes
from eg3d_rlhf.measures.meshes.clean import CleanMesh, face_areas
from eg3d_rlhf.measures.surface import connected, topology


class Edges:
    """Unique edges of a clean mesh and the faces at each of them."""

    def __init__(self, mesh: CleanMesh):
        self.mesh = mesh
        start = mesh.faces.reshape(-1)  # [C]
        end = mesh.faces[:, [1, 2, 0]].reshape(-1)  # [C]
        low = np.minimum(start, end)
        high = np.maximum(start, end)
        key = low * len(mesh.vertices) + high  # one integer per undirected edge
        self.order = np.argsort(key, kind="stable")  # half-edges [C], those of one edge together
        new = np.flatnonzero(np.diff(key[self.order], prepend=-1))  # where the next edge begins
        self.faces = np.diff(np.append(new, len(key)))  # [E] number of faces at each edge
        first = self.order[new]
        self.ends = np.stack([low[first], high[first]], axis=1)  # [E, 2]
        # [C] bool, in sorted order: the half-edge runs from the lower vertex number to the higher one
        self.upward = (start < end)[self.order]
        self.new = new

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Lengths of the edges, [E]."""
        a, b = (self.mesh.vertices[self.ends[:, i]] for i in range(2))
        return np.linalg.norm(b - a, axis=1)

    @functools.cached_property
    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """The two half-edges of every edge with exactly two faces, [number of such edges] each."""
        at = self.new[self.faces == 2]
        return self.order[at], self.order[at + 1]

    @functools.cached_property
    def flipped(self) -> np.ndarray:
        """For every edge with exactly two faces, True if both run through it in the same direction."""
        at = self.new[self.faces == 2]
        return self.upward[at] == self.upward[at + 1]

    @functools.cached_property
    def neighbours(self) -> tuple[np.ndarray, np.ndarray]:
        """Pairs of half-edges that follow one another at the same edge; they chain all faces at that edge."""
        follows = np.ones(len(self.order), dtype=bool)
        follows[self.new] = False  # the first half-edge of an edge follows none
        at = np.flatnonzero(follows)
        return self.order[at - 1], self.order[at]

    @functools.cached_property
    def part(self) -> tuple[np.ndarray, int]:
        """The part [F] of each face, and the number of parts."""
        a, b = self.neighbours
        return connected([(a // 3, b // 3)], len(self.mesh.faces))

    @functools.cached_property
    def fan(self) -> tuple[np.ndarray, int]:
        """The fan [C] of each corner, and the number of fans."""
        a, b = self.neighbours
        vertex = self.mesh.faces.reshape(-1)
        # Two half-edges at one edge join two pairs of corners, one at each end of the edge. If both run the
        # same way, starts belong together; otherwise the start of one belongs to the end of the other.
        same = vertex[a] == vertex[b]
        after_a = _after(a)
        after_b = _after(b)
        corners = np.concatenate([a, after_a])
        partners = np.concatenate([np.where(same, b, after_b), np.where(same, after_b, b)])
        return connected([(corners, partners)], 3 * len(self.mesh.faces))

    def rims(self) -> int:
        """Count loops of open edges. Two loops that touch at a pinched vertex count as two."""
        half = self.order[self.new[self.faces == 1]]
        if not len(half):
            return 0
        # Fans and not vertices are the nodes: at a pinched vertex, each loop passes through its own fan.
        label, count = self.fan
        ends = np.stack([label[half], label[_after(half)]])
        names, ends = np.unique(ends, return_inverse=True)
        ends = ends.reshape(2, -1)
        return connected([(ends[0], ends[1])], len(names))[1]


def edge_measures(edges: Edges) -> dict:
    """Compute counts and shares by name; docs/guides/check-assets.md explains them."""
    mesh = edges.mesh
    _, areas = face_areas(mesh)
    area = float(areas.sum())
    single = edges.faces == 1
    shared = edges.faces > 2
    part, parts = edges.part
    # A vertex with k fans is pinched k - 1 times.
    pinched = edges.fan[1] - len(mesh.vertices)
    euler = len(mesh.vertices) - len(edges.ends) + len(mesh.faces)
    rims = edges.rims()
    part_areas = np.bincount(part, areas, parts)
    part_volumes = np.bincount(part, face_volumes(mesh.vertices, mesh.faces), parts)
    summed = float(np.abs(part_volumes).sum())
    surfaces = topology(mesh.vertices, mesh.faces)
    return {
        "faces": len(mesh.faces),
        "area": area,
        "volume": float(part_volumes.sum()),
        "open_edges": int(single.sum()),
        "open_share": float(single.mean()),
        # Divided by the root of the area, so that it does not depend on the unit.
        "open_length": float(edges.lengths[single].sum()) / area**0.5,
        "nonmanifold_edges": int(shared.sum()),
        "pinched": pinched,
        "flipped_share": float(edges.flipped.mean()) if len(edges.flipped) else 0.0,
        "closed": not single.any(),
        "manifold": not shared.any() and pinched == 0,
        "oriented": not edges.flipped.any(),
        "euler": euler,
        "rims": rims,
        # Euler's formula, summed over parts: euler = 2 parts - 2 genus - rims
        "genus": (2 * parts - rims - euler) / 2,
        "parts": parts,
        "bodies": surfaces.parts,
        "cavities": surfaces.cavities,
        "main_area": float(part_areas.max()) / area,
        "main_volume": float(np.abs(part_volumes).max()) / summed if summed > 0 else 0.0,
    }


def bend(edges: Edges) -> float:
    """Compute the sum over edges of length times |angle between the faces' normals| / 2.

    For a smooth surface, it is the integral of (|k1| + |k2|) / 2, with the principal curvatures k1 and k2.
    """
    normals, _ = face_areas(edges.mesh)
    a, b = (normals[half // 3] for half in edges.pairs)
    # The arc tangent is accurate for small angles, where the arc cosine is not.
    angle = np.arctan2(np.linalg.norm(np.cross(a, b), axis=1), (a * b).sum(axis=1))
    return float((edges.lengths[edges.faces == 2] * angle).sum()) / 2


def _after(half: np.ndarray) -> np.ndarray:
    """Return the next half-edge in the same face."""
    return np.where(half % 3 == 2, half - 2, half + 1)
