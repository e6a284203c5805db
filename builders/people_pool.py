"""Compute exact distances and colours of ground-truth heads at many points: training data of the generator.

The package `warp` computes them once. Only building the assets needs it; `training.heads.people_mesh`
computes the same distances without it.

Shape letters: N heads, P points, V vertices, T triangles.
"""

# warp's kernels name their arguments' types by values, which mypy does not know
# mypy: disable-error-code="valid-type,index"

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from training.heads.people import (
    APPEARANCE,
    COMPONENTS,
    HAIR_FIELDS,
    LATENT,
    UNIT,
    Basis,
    Head,
    bust_end,
    named_people,
    scaled,
    surface_colour,
)

# files of the pool, and heads of each
CHUNKS = 32
HEADS = 50
POINT_STEP = 0.7 / 32767  # of stored coordinates, world units
NAMED = COMPONENTS + HAIR_FIELDS + APPEARANCE  # latent coordinates that define the ground-truth head


@functools.cache
def _kernels() -> tuple[Any, Any, Any]:
    """Return the package warp, a kernel of rays and one of distances."""
    import warp

    wp: Any = warp  # its array types are made by calls, which a type checker does not know
    wp.config.quiet = True
    wp.init()
    vectors, pairs, numbers, integers = (wp.array(dtype=kind) for kind in (wp.vec3, wp.vec2, float, wp.int32))

    @wp.kernel
    def rays(mesh: wp.uint64, origins: vectors, ways: vectors, reach: float, hit: integers):
        i = wp.tid()
        query = wp.mesh_query_ray(mesh, origins[i], ways[i], reach)
        if query.result:
            hit[i] = 1

    @wp.kernel
    def nearest(mesh: wp.uint64, points: vectors, distance: numbers, face: integers, weights: pairs):
        i = wp.tid()
        query = wp.mesh_query_point_sign_winding_number(mesh, points[i], 4.0, 2.0, 0.5)
        if query.result:
            at = wp.mesh_eval_position(mesh, query.face, query.u, query.v)
            distance[i] = query.sign * wp.length(at - points[i])
            face[i] = query.face
            weights[i] = wp.vec2(query.u, query.v)

    return wp, rays, nearest


def warp_mesh(vertices: np.ndarray, triangles: np.ndarray) -> Any:
    """Return a mesh of warp, which supports signs by winding number."""
    wp, _, _ = _kernels()
    corners = wp.array(triangles.ravel().astype(np.int32), dtype=wp.int32)
    return wp.Mesh(points=wp.array(vertices, dtype=wp.vec3), indices=corners, support_winding_number=True)


def ray_hits(mesh: Any, origins: np.ndarray, ways: np.ndarray, reach: float) -> np.ndarray:
    """Return a mask [P] of the rays [P, 3] that meet the mesh within `reach`, world units."""
    wp, rays, _ = _kernels()
    hit = wp.zeros(len(origins), dtype=wp.int32)
    wp.launch(
        rays,
        len(origins),
        inputs=[mesh.id, wp.array(origins, dtype=wp.vec3), wp.array(ways, dtype=wp.vec3), reach, hit],
    )
    return hit.numpy() > 0


def nearest(mesh: Any, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return for points [P, 3] the signed distances [P] to a mesh, nearest triangles [P], and weights [P, 3].

    The sign comes from the winding number; the weights are those of the triangles' corners.
    """
    wp, _, kernel = _kernels()
    n = len(points)
    distance = wp.zeros(n, dtype=float)
    face = wp.zeros(n, dtype=wp.int32)
    weights = wp.zeros(n, dtype=wp.vec2)
    wp.launch(kernel, n, inputs=[mesh.id, wp.array(points, dtype=wp.vec3), distance, face, weights])
    uv = weights.numpy()
    return distance.numpy(), face.numpy(), np.concatenate([uv, 1 - uv.sum(axis=1, keepdims=True)], axis=1)


@dataclass(frozen=True, kw_only=True)
class PoolOptions:
    """Numbers of points of each head, by region."""

    face: int = 6000  # near the front of the face
    eyes: int = 2500  # near the eyes
    rest: int = 8000  # near the rest of the surface
    back: int = 6000  # in and around the back of the head, where damage is
    anywhere: int = 5000  # in the cube and a margin around it
    walls: int = 2500  # near the cube's faces
    margin: float = 0.12  # world units beyond the cube

    @property
    def total(self) -> int:
        return self.face + self.eyes + self.rest + self.back + self.anywhere + self.walls


def _on_surface(
    head: Head, basis: Basis, share: np.ndarray, count: int, spread: float, rng: np.random.Generator
) -> np.ndarray:
    """Sample points [P, 3] around the surface, with probability proportional to area times `share` [V]."""
    corners = head.vertices[basis.triangles]
    area = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
    weight = area * share[basis.triangles].mean(axis=1)
    chosen = rng.choice(len(weight), count, p=weight / weight.sum())
    where = rng.dirichlet([1, 1, 1], count)
    return np.einsum("pc,pcd->pd", where, corners[chosen]) + spread * rng.standard_normal((count, 3))


def draw_points(head: Head, basis: Basis, o: PoolOptions, rng: np.random.Generator) -> np.ndarray:
    """Sample points [P, 3] of a head in all regions, in random order."""
    x = np.abs(basis.mean[:, 0]) / UNIT
    y = basis.mean[:, 1] / UNIT - 0.005
    eyes = np.exp(-(((x - 0.051) / 0.028) ** 2 + (y / 0.02) ** 2)) * (basis.mean[:, 2] > 0.05)
    face = basis.masks["face"] + basis.masks["lips"] + basis.masks["eyes"]
    side = 1 + 2 * o.margin
    walls = (rng.random((o.walls, 3)) - 0.5) * side
    axis = rng.choice([0, 1, 2, 2], o.walls)
    sign = rng.choice([-1, -1, 1], o.walls)
    walls[np.arange(o.walls), axis] = sign * rng.uniform(0.36, 0.5 + o.margin, o.walls)
    points = np.concatenate(
        [
            _on_surface(head, basis, np.minimum(face, 1), o.face, 0.010, rng),
            _on_surface(head, basis, eyes, o.eyes, 0.006, rng),
            _on_surface(head, basis, 1.02 - np.minimum(face, 1), o.rest, 0.015, rng),
            rng.uniform([-0.25, -0.36, -0.34], [0.25, 0.32, 0.06], (o.back, 3)),
            (rng.random((o.anywhere, 3)) - 0.5) * side,
            walls,
        ]
    )
    return points[rng.permutation(len(points))].clip(-0.62, 0.62)


def head_points(head: Head, basis: Basis, o: PoolOptions, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Sample points of a ground-truth head, with signed distances and colours.

    A colour is the shaded one of the nearest surface point. Points are stored in steps of POINT_STEP.
    """
    stored = np.round(draw_points(head, basis, o, rng) / POINT_STEP).astype(np.int16)
    points = stored.astype(np.float32) * np.float32(POINT_STEP)
    distance, face, weights = nearest(warp_mesh(head.vertices, basis.triangles), points)
    corners = basis.triangles[face]
    drawn, normals = (
        np.einsum("pcd,pc->pd", values[corners], weights) for values in (basis.drawn, head.normals)
    )
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-9)
    colour = surface_colour(head, drawn, normals)
    return {
        "points": stored,
        "distance": np.maximum(distance, bust_end(points)).astype(np.float16),
        "colour": np.round(255 * colour).astype(np.uint8),
    }


def write_chunk(
    path: Path, basis: Basis, seed: int, heads: int = HEADS, o: PoolOptions = PoolOptions()
) -> None:
    """Write a file of the pool for newly sampled latents. A file that exists is complete, and is kept."""
    if path.exists():
        return
    rng = np.random.default_rng([7, seed])
    z = scaled(rng.standard_normal((heads, LATENT)))
    rows = [head_points(head, basis, o, rng) for head in named_people(z, basis)]
    part = path.with_name(f".{path.name}")
    with open(part, "wb") as file:
        columns: dict[str, Any] = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        np.savez(file, z=z.astype(np.float32), **columns)
    part.replace(path)
