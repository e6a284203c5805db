"""Computation of the mesh of a shape, and of a render of the same latent.

The module can also damage the density of a shape deliberately, so strongly that every annotator can see it.
The damaged shape is part of a gold or practice pair, whose correct answer must be known. The damage changes
only the surface. Its size is relative to the size of the shape, so it looks alike for all generators and for
all scales of their densities.

Shapes: V vertices, F triangles; X, Y, Z grid points along x, y, z; N points.
"""

import functools
import warnings
from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

from eg3d_rlhf.experiments.media.rendering import camera, cameras_of, png, render
from eg3d_rlhf.generators import Generator, LoadedGenerator, load_generator, ws_of_seeds
from eg3d_rlhf.geometry.mesh import (
    decimate,
    extract_mesh_blockwise,
    face_volumes,
    find_parts,
    remove_unused_vertices,
)
from eg3d_rlhf.geometry.mesh_export import FieldGrid, extract_field_mesh
from eg3d_rlhf.people.label.assets.damage import damage_draws
from eg3d_rlhf.people.label.entities import DAMAGES, Shape
from eg3d_rlhf.people.label.shape_files import compress, encode_mesh
from torch_utils.ops.implementations import implementation

_SLACK = 1.1  # largest accepted ratio of the number of triangles of a mesh to the requested number
_PASSES = 5  # largest number of decimations of a mesh, since one decimation may stop too early
_DUST = 16  # smallest number of triangles of a part that is not removed
_CENTRES = 6  # number of lumps or holes
_MIN_CENTRES = 3  # smallest accepted number of lumps or holes, if there is not enough space for _CENTRES
_TRIED = 2000  # number of random positions that are tried for lumps
# radii of lumps and holes, relative to the size of the shape
_LUMP = 0.075
_BITE = 0.10
# roughness: width of the bumps, and standard deviation of the displacement, relative to the size of the shape
_GRAIN = 0.07
_REACH = 0.03
_STEEP = 1e3  # slope of the density at a new surface, in multiples of the level per world unit
_HELD = 2  # number of generators that are kept in memory, because a study compares two


def surface(generator: Generator, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Compute the surface of a shape: all its visible parts, decimated.

    The density at the border of the generator's cube is cleared, so that the surface is closed. Cavities
    inside the shape and tiny parts are removed.

    Args:
        generator: generator of the shape.
        shape: shape, with its parameters.

    Returns:
        Vertices [V, 3] float32 in world units, and triangles [F, 3] as indices of vertices.
    """
    # With "torch", the operators of PyTorch are used and no compiled ones, so that results do not depend on
    # the compiler of the machine.
    with implementation("torch"):
        density_field = generator.field(ws_of_seeds(generator, [shape.seed], shape.psi))
        density_grid = FieldGrid(density_field, shape.resolution, density_field.bounds.border)
        vertices, faces = extract_field_mesh(density_grid, shape.level)
        if shape.degradation:
            # The damage needs the entire grid [X, Y, Z] at once. Undamaged shapes are extracted block by
            # block.
            axes = tuple(axis.double().numpy() for axis in density_grid.axes)
            # The damage shall be visible, so its position depends on the visible parts of the surface only.
            # raw density of the entire grid, [X, Y, Z]
            density = density_grid(slice(0, shape.resolution)).numpy()
            density = damage(
                shape.degradation, density, axes, shape.level, visible_parts(vertices, faces)[0], shape.seed
            )
            vertices, faces = extract_mesh_blockwise(lambda x: density[x], axes, shape.level)
    vertices, faces = visible_parts(vertices, faces)
    return within_budget(vertices, faces, shape.triangles)


def visible_parts(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Remove cavities and tiny parts from a mesh. The part with the largest volume always stays.

    Args:
        vertices: positions, [V, 3].
        faces: triangles, [F, 3].

    Returns:
        Vertices and triangles of the remaining parts.
    """
    # part_of_face: [F] index of the part of each face
    part_count, part_of_face = find_parts(faces, len(vertices))
    if part_count == 1:
        return vertices, faces
    # The normals of faces point out of the material, so the surface of a cavity encloses a negative volume.
    part_volumes = np.bincount(part_of_face, weights=face_volumes(vertices, faces), minlength=part_count)
    face_counts = np.bincount(part_of_face, minlength=part_count)
    is_visible = (part_volumes > 0) & (face_counts >= _DUST)
    is_visible[part_volumes.argmax()] = True
    return remove_unused_vertices(vertices, faces[is_visible[part_of_face]])


def within_budget(
    vertices: np.ndarray, faces: np.ndarray, max_triangles: int
) -> tuple[np.ndarray, np.ndarray]:
    """Decimate a mesh to about `max_triangles` triangles, so that it loads fast in the browser.

    The mesh stays closed if this number can be reached in that way. Otherwise a second method reaches it,
    with which the mesh may get open edges. They do no harm, because the mesh is only displayed.

    Args:
        vertices: positions, [V, 3].
        faces: triangles, [F, 3].
        max_triangles: requested number of triangles.
    """
    with warnings.catch_warnings():
        # `decimate` warns if more triangles remain. This case is handled below.
        warnings.simplefilter("ignore", UserWarning)
        fewer_vertices, fewer_faces = decimate(vertices, faces, max_triangles)
    if len(fewer_faces) <= _SLACK * max_triangles:
        return fewer_vertices, fewer_faces
    import fast_simplification

    for _ in range(_PASSES):
        fewer_vertices, fewer_faces = fast_simplification.simplify(
            fewer_vertices, fewer_faces, target_count=max_triangles
        )
        fewer_vertices, fewer_faces = remove_unused_vertices(
            fewer_vertices.astype(np.float32), fewer_faces.astype(np.int32)
        )
        if len(fewer_faces) <= _SLACK * max_triangles:
            break
    return fewer_vertices, fewer_faces


class ShapeRenderer:
    """Computation of meshes and renders of shapes. The generators that were used last are kept in memory.

    Args:
        device: device on which the generators compute.
    """

    def __init__(self, device: str = "cpu"):
        self._load = functools.lru_cache(_HELD)(lambda source: load_generator(source or None, device))

    def mesh(self, shape: Shape) -> bytes:
        """Return the mesh of a shape in the format of shape_files.py, compressed with gzip."""
        return compress(encode_mesh(*surface(self.generator(shape).generator, shape)))

    def image(self, shape: Shape) -> bytes:
        """Return the frontal render of a shape's latent as the bytes of a PNG file.

        The render of a damaged shape shows no damage, because the generator renders the latent and not the
        mesh.
        """
        generator = self.generator(shape).generator
        with implementation("torch"):
            # one camera gives a list of one image
            (rendered_image,) = render(
                generator, ws_of_seeds(generator, [shape.seed], shape.psi), [camera(cameras_of(generator))]
            )
        return png(rendered_image)

    def generator(self, shape: Shape) -> LoadedGenerator:
        """Load the network file of a shape's generator, or return the generator if it is still in memory.

        Raises:
            ValueError: the network file has changed since the campaign was planned.
        """
        loaded_generator = self._load(shape.source)
        if loaded_generator.hash != shape.generator:
            raise ValueError(
                f"{loaded_generator.path.name}: the weights have changed since the campaign was planned: the"
                f" SHA-256 was {shape.generator[:12]}... and is {loaded_generator.hash[:12]}... now. Use the"
                " original network file."
            )
        return loaded_generator


@dataclass(frozen=True)
class Body:
    """Shape that shall be damaged: its density on a grid, and its surface."""

    sigma: np.ndarray  # raw density [X, Y, Z]
    axes: tuple[np.ndarray, ...]  # world coordinates x [X], y [Y], z [Z] of the grid points, evenly spaced
    level: float  # raw density at the surface
    surface: np.ndarray  # vertices of the surface in world coordinates, [V, 3]
    rng: np.random.Generator  # source of the random positions

    @property
    def size(self) -> float:
        """Return the mean extent of the surface along the three axes, in world units."""
        return float(np.ptp(self.surface, axis=0).mean())

    def front(self) -> np.ndarray:
        """Return the third of the vertices that is nearest to the frontal camera, in random order."""
        # The frontal camera is on the side of +z, so these vertices have the largest z.
        z = self.surface[:, 2]
        front_vertices = self.surface[z >= np.quantile(z, 2 / 3)]
        return self.rng.permutation(front_vertices)

    def distance(self, centres: np.ndarray) -> np.ndarray:
        """Compute the distance from every grid point to the nearest centre, [X, Y, Z], in world units.

        Args:
            centres: world coordinates, [N, 3].
        """
        # np.ix_ gives x [X, 1, 1], y [1, Y, 1], z [1, 1, Z], whose sum has the shape of the grid.
        x, y, z = np.ix_(*self.axes)
        squares = [(x - a) ** 2 + (y - b) ** 2 + (z - c) ** 2 for a, b, c in centres]
        return np.sqrt(np.minimum.reduce(squares))

    def signed(self, distance: np.ndarray) -> np.ndarray:
        """Return a raw density that increases with `distance`, and equals the level where the distance is 0.

        Args:
            distance: signed distance to a surface, positive inside, in world units.
        """
        # With max(..., 1), the density is not constant if the level is near 0.
        return self.level + _STEEP * max(abs(self.level), 1.0) * distance


def floaters(body: Body) -> np.ndarray:
    """Add round lumps that float in front of the surface without touching it.

    Returns the density [X, Y, Z].
    """
    radius = _LUMP * body.size
    candidate_positions = body.front()[:_TRIED]  # [N, 3]
    # corners of the cube with the smallest and the largest coordinates, [3] each
    lowest_corner, highest_corner = (np.array([axis[index] for axis in body.axes]) for index in (0, -1))
    direction = body.rng.normal(size=candidate_positions.shape)
    direction[:, 2] = abs(direction[:, 2])  # towards the camera
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    lump_distance = body.rng.uniform(1.5, 2.5, (len(candidate_positions), 1)) * radius
    centres = candidate_positions + lump_distance * direction
    # world coordinates -> fractional indices of the grid [N, 3], which map_coordinates needs
    grid_indices = (
        (centres - lowest_corner) / (highest_corner - lowest_corner) * (np.array(body.sigma.shape) - 1)
    )
    is_outside = ndimage.map_coordinates(body.sigma, grid_indices.T, order=1, mode="nearest") < body.level
    # A gap of at least 0.35 radii between lump and surface makes it visible that the lump is loose.
    is_free = is_outside & (cKDTree(body.surface).query(centres)[0] > 1.35 * radius)
    # near the border of the cube the density may be cleared
    border_margin = radius + 0.12 * (highest_corner - lowest_corner)
    is_free &= np.all(
        (centres > lowest_corner + border_margin) & (centres < highest_corner - border_margin), axis=1
    )
    lump_centres = _scattered("floaters", centres[is_free], 2.5 * radius)
    # The maximum of two densities is the union of their shapes.
    return np.maximum(body.sigma, body.signed(radius - body.distance(lump_centres)))


def holes(body: Body) -> np.ndarray:
    """Cut round holes into the side that faces the frontal camera. Returns the density [X, Y, Z]."""
    radius = _BITE * body.size
    centres = _scattered("holes", body.front(), 2 * radius)
    # The minimum of two densities is the intersection of their shapes. Here the second one is the outside of
    # spheres.
    return np.minimum(body.sigma, body.signed(body.distance(centres) - radius))


def rough(body: Body) -> np.ndarray:
    """Make the surface bumpy: every grid point gets the density of a random point nearby.

    Returns the density [X, Y, Z].
    """
    # distance of grid points in world units, [3]
    grid_step = np.array([axis[1] - axis[0] for axis in body.axes])
    # source [3, X, Y, Z]: for each grid point, the indices of the point whose density it gets
    source_indices = np.indices(body.sigma.shape, dtype=np.float32)
    for axis in range(3):
        noise = body.rng.standard_normal(body.sigma.shape, dtype=np.float32)
        # The standard deviation of the filter is half the width of a bump, in grid points along each axis.
        noise = ndimage.gaussian_filter(noise, (_GRAIN * body.size / 2 / grid_step).tolist(), mode="wrap")
        # Smoothing reduces the standard deviation by a factor that depends on the grid. Division by
        # noise.std() removes this factor.
        source_indices[axis] += noise * np.float32(_REACH * body.size / grid_step[axis] / noise.std())
    return ndimage.map_coordinates(body.sigma, source_indices, order=1, mode="nearest")


def damage(
    damage_kind: str,
    sigma: np.ndarray,
    axes: tuple[np.ndarray, ...],
    level: float,
    surface: np.ndarray,
    seed: int,
):
    """Damage the density of a shape. Equal arguments give equal results.

    Args:
        damage_kind: kind of damage, a key of DAMAGES.
        sigma: raw density, [X, Y, Z].
        axes: world coordinates x [X], y [Y], z [Z] of the grid points.
        level: raw density at the surface.
        surface: vertices of the surface in world coordinates, [V, 3].
        seed: seed of the shape, on which the position of the damage depends.

    Returns:
        Damaged raw density, float32 [X, Y, Z].

    Raises:
        ValueError: there is not enough space for the damage.
    """
    rng = damage_draws(damage_kind, DAMAGES, seed)
    damage_function = {"floaters": floaters, "holes": holes, "rough": rough}[damage_kind]
    return damage_function(Body(sigma, axes, level, surface, rng)).astype(np.float32)


def _scattered(damage_kind: str, candidate_positions: np.ndarray, min_distance: float) -> np.ndarray:
    """Select up to _CENTRES of the candidate positions, in their order, at least `min_distance` apart.

    Args:
        damage_kind: kind of damage, for the message.
        candidate_positions: positions in world coordinates, [N, 3].
        min_distance: smallest distance between two selected positions, in world units.

    Raises:
        ValueError: fewer than _MIN_CENTRES positions can be selected.
    """
    selected_positions: list[np.ndarray] = []
    for candidate_position in candidate_positions:
        if all(
            np.linalg.norm(candidate_position - position) >= min_distance for position in selected_positions
        ):
            selected_positions.append(candidate_position)
            if len(selected_positions) == _CENTRES:
                break
    if len(selected_positions) < _MIN_CENTRES:
        raise ValueError(
            f"damage({damage_kind}): the shape has space for {len(selected_positions)} of the {_MIN_CENTRES}"
            " positions that this damage needs. Choose another seed, psi or level."
        )
    return np.array(selected_positions)
