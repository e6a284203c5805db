"""Compute signed distances and colours of ground-truth heads at many points, the training data of the
generator.

They are computed once by the package `warp`, which is needed only for building the assets.
`training.heads.people_mesh` computes the same distances without it.

Shapes: N number of heads, P number of points, V number of vertices, T number of triangles.
"""

# Annotations of warp's kernels are values and not types, which mypy does not support.
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
    heads_from_latents,
    normalise_latents,
    surface_colour,
)

HEADS = 50  # heads in each file
POINT_STEP = 0.7 / 32767  # step of the stored coordinates (int16), in world units
NAMED = (
    COMPONENTS + HAIR_FIELDS + APPEARANCE
)  # number of latent coordinates that define the ground-truth head


@functools.cache
def _kernels() -> tuple[Any, Any, Any]:
    """Return the package warp, a kernel that traces rays, and a kernel that computes distances."""
    import warp

    wp: Any = warp  # Any, because its array types are made by calls, which type checkers do not support
    wp.config.quiet = True
    wp.init()
    # Types of arrays: 3-vectors, 2-vectors, floats and integers.
    vec3_array, vec2_array, float_array, int_array = (
        wp.array(dtype=kind) for kind in (wp.vec3, wp.vec2, float, wp.int32)
    )

    @wp.kernel
    def rays(mesh: wp.uint64, origins: vec3_array, directions: vec3_array, reach: float, hit: int_array):
        i = wp.tid()  # index of the ray
        query = wp.mesh_query_ray(mesh, origins[i], directions[i], reach)
        if query.result:
            hit[i] = 1

    @wp.kernel
    def nearest(
        mesh: wp.uint64, points: vec3_array, distance: float_array, face: int_array, weights: vec2_array
    ):
        i = wp.tid()  # index of the point
        # Largest distance of the search 4; accuracy 2 and threshold 0.5 of the winding number, warp's
        # defaults.
        query = wp.mesh_query_point_sign_winding_number(mesh, points[i], 4.0, 2.0, 0.5)
        if query.result:
            surface_point = wp.mesh_eval_position(mesh, query.face, query.u, query.v)
            distance[i] = query.sign * wp.length(surface_point - points[i])
            face[i] = query.face
            weights[i] = wp.vec2(query.u, query.v)

    return wp, rays, nearest


def warp_mesh(vertices: np.ndarray, triangles: np.ndarray) -> Any:
    """Build a mesh of warp from vertices [V, 3] and triangles [T, 3]. It supports signs by winding number."""
    wp, _, _ = _kernels()
    corners = wp.array(triangles.ravel().astype(np.int32), dtype=wp.int32)
    return wp.Mesh(points=wp.array(vertices, dtype=wp.vec3), indices=corners, support_winding_number=True)


def ray_hits(mesh: Any, origins: np.ndarray, directions: np.ndarray, reach: float) -> np.ndarray:
    """Find the rays that meet a mesh.

    Args:
        mesh: mesh of `warp_mesh`.
        origins: origins of the rays, [P, 3].
        directions: unit directions of the rays, [P, 3].
        reach: length of the rays in world units.
    Returns: mask [P] of rays that meet the mesh.
    """
    wp, rays, _ = _kernels()
    hit_flags = wp.zeros(len(origins), dtype=wp.int32)
    wp.launch(
        rays,
        len(origins),
        inputs=[
            mesh.id,
            wp.array(origins, dtype=wp.vec3),
            wp.array(directions, dtype=wp.vec3),
            reach,
            hit_flags,
        ],
    )
    return hit_flags.numpy() > 0


def nearest(mesh: Any, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the nearest surface points of a mesh.

    Args:
        mesh: mesh of `warp_mesh`.
        points: points [P, 3].
    Returns: signed distances [P], negative inside by the winding number; indices of the nearest triangles
        [P]; and barycentric weights [P, 3] of the triangles' corners.
    """
    wp, _, kernel = _kernels()
    n = len(points)
    distance = wp.zeros(n, dtype=float)
    face = wp.zeros(n, dtype=wp.int32)
    weights = wp.zeros(n, dtype=wp.vec2)
    wp.launch(kernel, n, inputs=[mesh.id, wp.array(points, dtype=wp.vec3), distance, face, weights])
    uv = weights.numpy()  # [P, 2]; the three barycentric weights sum to 1
    return distance.numpy(), face.numpy(), np.concatenate([uv, 1 - uv.sum(axis=1, keepdims=True)], axis=1)


@dataclass(frozen=True, kw_only=True)
class PoolOptions:
    """Number of points of each head by region, and the margin around the cube."""

    face: int = 6000  # near the front of the face
    eyes: int = 2500  # near the eyes
    rest: int = 8000  # near the surface outside the face
    back: int = 6000  # in and around the back of the head, where scans are damaged
    anywhere: int = 5000  # uniform in the cube and the margin around it
    walls: int = 2500  # near the faces of the cube
    margin: float = 0.12  # width of the margin around the cube, in world units

    @property
    def total(self) -> int:
        """Number of points of each head in all regions."""
        return self.face + self.eyes + self.rest + self.back + self.anywhere + self.walls


def _on_surface(
    head: Head, basis: Basis, share: np.ndarray, point_count: int, spread: float, rng: np.random.Generator
) -> np.ndarray:
    """Sample points around the surface of a head, with density proportional to `share`.

    Args:
        head: head, whose vertices are used.
        basis: basis, whose triangles are used.
        share: relative density at each vertex, [V].
        point_count: P, number of points.
        spread: standard deviation of the points' distance from the surface along each axis, in world units.
        rng: random generator.
    Returns: points [P, 3].
    """
    corners = head.vertices[basis.triangles]
    area = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
    weight = area * share[basis.triangles].mean(axis=1)
    triangle = rng.choice(len(weight), point_count, p=weight / weight.sum())
    barycentric = rng.dirichlet([1, 1, 1], point_count)  # uniform in a triangle
    return np.einsum("pc,pcd->pd", barycentric, corners[triangle]) + spread * rng.standard_normal(
        (point_count, 3)
    )


def draw_points(head: Head, basis: Basis, options: PoolOptions, rng: np.random.Generator) -> np.ndarray:
    """Sample points [P, 3] of a head in all regions, in random order. P is `options.total`.

    Args:
        head: head whose points are sampled.
        basis: basis with the regions of the mean head.
        options: numbers of points by region.
        rng: random generator.
    """
    # Coordinates of the vertices of the mean head, relative to the eyes and in units of the original head.
    x = np.abs(basis.mean[:, 0]) / UNIT
    y = basis.mean[:, 1] / UNIT - 0.005
    eyes = np.exp(-(((x - 0.051) / 0.028) ** 2 + (y / 0.02) ** 2)) * (basis.mean[:, 2] > 0.05)
    face = basis.masks["face"] + basis.masks["lips"] + basis.masks["eyes"]
    side = 1 + 2 * options.margin  # of the cube with its margin
    walls = (rng.random((options.walls, 3)) - 0.5) * side
    # One coordinate is moved near a face of the cube. The z axis and negative sides are chosen twice as
    # often.
    axis = rng.choice([0, 1, 2, 2], options.walls)
    sign = rng.choice([-1, -1, 1], options.walls)
    walls[np.arange(options.walls), axis] = sign * rng.uniform(0.36, 0.5 + options.margin, options.walls)
    points = np.concatenate(
        [
            _on_surface(head, basis, np.minimum(face, 1), options.face, 0.010, rng),
            _on_surface(head, basis, eyes, options.eyes, 0.006, rng),
            # 1.02, so that the face has a small density in this region, too.
            _on_surface(head, basis, 1.02 - np.minimum(face, 1), options.rest, 0.015, rng),
            rng.uniform([-0.25, -0.36, -0.34], [0.25, 0.32, 0.06], (options.back, 3)),
            (rng.random((options.anywhere, 3)) - 0.5) * side,
            walls,
        ]
    )
    return points[rng.permutation(len(points))].clip(-0.62, 0.62)


def head_points(
    head: Head, basis: Basis, options: PoolOptions, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Sample points of a ground-truth head, and compute signed distances and colours at them.

    The colour of a point is the shaded colour of the nearest surface point.

    Args:
        head: ground-truth head.
        basis: basis with the triangles of the heads.
        options: numbers of points by region.
        rng: random generator.
    Returns: "points" [P, 3] int16 in steps of POINT_STEP, "distance" [P] float16 in world units, and "colour"
        [P, 3] uint8.
    """
    # Distances are computed at the rounded points, so that rounding causes no error.
    stored_points = np.round(draw_points(head, basis, options, rng) / POINT_STEP).astype(np.int16)
    points = stored_points.astype(np.float32) * np.float32(POINT_STEP)
    distance, face, weights = nearest(warp_mesh(head.vertices, basis.triangles), points)
    corners = basis.triangles[face]
    # Attributes of the nearest surface points, interpolated between the corners of their triangles.
    vertex_attributes, normals = (
        np.einsum("pcd,pc->pd", vertex_values[corners], weights)
        for vertex_values in (basis.drawn, head.normals)
    )
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-9)
    colour = surface_colour(head, vertex_attributes, normals)
    return {
        "points": stored_points,
        # The head ends where the bust is cut off.
        "distance": np.maximum(distance, bust_end(points)).astype(np.float16),
        "colour": np.round(255 * colour).astype(np.uint8),
    }


def write_chunk(
    path: Path, basis: Basis, seed: int, heads: int = HEADS, options: PoolOptions = PoolOptions()
) -> None:
    """Write a file of the pool for newly sampled latents. An existing file is complete and is not changed.

    Args:
        path: path of the .npz file.
        basis: basis of heads.
        seed: seed of the latents and points; it is the number of the file.
        heads: number of heads.
        options: numbers of points.
    """
    if path.exists():
        return
    # The constant 7 makes the stream differ from other streams with the same seed.
    rng = np.random.default_rng([7, seed])
    z = normalise_latents(rng.standard_normal((heads, LATENT)))
    data_of_heads = [head_points(head, basis, options, rng) for head in heads_from_latents(z, basis)]
    # Written under another name and then renamed, so that an interrupted run leaves no incomplete file.
    temporary_path = path.with_name(f".{path.name}")
    with open(temporary_path, "wb") as file:
        columns: dict[str, Any] = {
            name: np.stack([head_data[name] for head_data in data_of_heads]) for name in data_of_heads[0]
        }
        np.savez(file, z=z.astype(np.float32), **columns)
    temporary_path.replace(path)
