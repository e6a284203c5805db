"""Computes what the browser shows of a shape's record: the mesh, and a render of the same latent.

The module also damages a density deliberately, so strongly that every annotator can see it. The damaged shape
is one side of a pair whose answer must be known. The damage moves only the surface, and its size is relative
to the size of the body, so it looks alike for all generators and all scales of their densities.

Letters: V vertices, F triangles; X, Y, Z = grid points along x, y, z.
"""

import functools
import warnings
from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

from eg3d_rlhf.experiments.media.rendering import camera, cameras_of, png, render
from eg3d_rlhf.generators import Generator, LoadedGenerator, load_generator, ws_of_seeds
from eg3d_rlhf.geometry.mesh import compact, decimate, extract_mesh_blockwise, face_volumes, parts
from eg3d_rlhf.geometry.mesh_export import FieldGrid, extract_field_mesh
from eg3d_rlhf.people.label.assets.damage import damage_draws
from eg3d_rlhf.people.label.entities import DAMAGES, Shape
from eg3d_rlhf.people.label.shape_files import compress, encode_mesh
from torch_utils.ops.implementations import implementation

_SLACK = 1.1  # a mesh may have this many times the requested number of triangles
_PASSES = 5  # largest number of decimations; each stops where further edges cost too much
_DUST = 16  # parts with fewer triangles are removed
# Number of lumps or holes, and the number that is enough if there is not enough space.
_PLACES = 6
_FEWEST = 3
_TRIED = 2000  # number of random places that are tried for lumps
# Radii of lumps and holes, relative to the size of the body.
_LUMP = 0.075
_BITE = 0.10
# Roughness: width of the bumps and standard deviation of the displacement, relative to the size of the body.
_GRAIN = 0.07
_REACH = 0.03
_STEEP = 1e3  # slope of the density at the new surface, in multiples of the level per world unit
_HELD = 2  # number of generators in memory: a study compares two


def surface(generator: Generator, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Compute the surface of a shape: all its visible parts, decimated.

    The density at the border of the generator's cube is cleared, so that the surface is closed. Cavities
    inside the body and tiny parts are removed. The computation uses plain PyTorch operators, because results
    should not depend on the compiler of the machine.

    Returns: vertices [V, 3] float32, in world units, and triangles [F, 3].
    """
    with implementation("torch"):
        field = generator.field(ws_of_seeds(generator, [shape.seed], shape.psi))
        grid = FieldGrid(field, shape.resolution, field.bounds.border)
        vertices, faces = extract_field_mesh(grid, shape.level)
        if shape.degradation:
            # The damage works on the entire grid [X, Y, Z]; undamaged shapes are extracted block by block.
            axes = tuple(axis.double().numpy() for axis in grid.axes)
            # Parts that are removed below must not attract the damage, so only the visible surface is passed.
            sigma = grid(slice(0, shape.resolution)).numpy()
            sigma = damage(
                shape.degradation, sigma, axes, shape.level, visible_parts(vertices, faces)[0], shape.seed
            )
            vertices, faces = extract_mesh_blockwise(lambda x: sigma[x], axes, shape.level)
    vertices, faces = visible_parts(vertices, faces)
    return within_budget(vertices, faces, shape.triangles)


def visible_parts(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Remove cavities (parts that enclose a negative volume) and parts with few triangles. The part with the
    largest volume always stays.
    """
    count, part = parts(faces, len(vertices))
    if count == 1:
        return vertices, faces
    # Faces are oriented outwards, so the surface of a cavity encloses a negative volume.
    volume = np.bincount(part, weights=face_volumes(vertices, faces), minlength=count)
    visible = (volume > 0) & (np.bincount(part, minlength=count) >= _DUST)
    visible[volume.argmax()] = True
    return compact(vertices, faces[visible[part]])


def within_budget(vertices: np.ndarray, faces: np.ndarray, triangles: int) -> tuple[np.ndarray, np.ndarray]:
    """Decimate a mesh to about `triangles` triangles. The result stays closed if that is possible; a mesh
    that would stay closed only with more triangles is opened.

    The mesh is only looked at: it must load fast and need not be closed.
    """
    with warnings.catch_warnings():
        # the warning that more triangles remain is handled below
        warnings.simplefilter("ignore", UserWarning)
        fewer, fewer_faces = decimate(vertices, faces, triangles)
    if len(fewer_faces) <= _SLACK * triangles:
        return fewer, fewer_faces
    import fast_simplification

    for _ in range(_PASSES):
        fewer, fewer_faces = fast_simplification.simplify(fewer, fewer_faces, target_count=triangles)
        fewer, fewer_faces = compact(fewer.astype(np.float32), fewer_faces.astype(np.int32))
        if len(fewer_faces) <= _SLACK * triangles:
            break
    return fewer, fewer_faces


class ShapeRenderer:
    """Computes meshes and renders of shapes. It keeps the generators that were used last in memory."""

    def __init__(self, device: str = "cpu"):
        self._load = functools.lru_cache(_HELD)(lambda source: load_generator(source or None, device))

    def mesh(self, shape: Shape) -> bytes:
        """Return the mesh of a shape, encoded and compressed."""
        return compress(encode_mesh(*surface(self.generator(shape).generator, shape)))

    def image(self, shape: Shape) -> bytes:
        """Return the frontal render as PNG. For a damaged shape it shows the undamaged latent, because the
        generator renders it without the mesh.
        """
        generator = self.generator(shape).generator
        with implementation("torch"):
            (pixels,) = render(
                generator, ws_of_seeds(generator, [shape.seed], shape.psi), [camera(cameras_of(generator))]
            )
        return png(pixels)

    def generator(self, shape: Shape) -> LoadedGenerator:
        """Return the generator of a shape. Raises: ValueError if the file now contains other weights."""
        loaded = self._load(shape.source)
        if loaded.hash != shape.generator:
            expected = shape.generator[:12]
            actual = loaded.hash[:12]
            raise ValueError(
                f"{loaded.path.name}: expected the campaign's weights {expected}..., got {actual}... Restore"
                " the file."
            )
        return loaded


@dataclass(frozen=True)
class Body:
    """A shape to be damaged: its density on a grid and its surface."""

    sigma: np.ndarray  # raw density [X, Y, Z]
    axes: tuple[np.ndarray, ...]  # world coordinates x [X], y [Y], z [Z], evenly spaced
    level: float  # raw density of the surface
    surface: np.ndarray  # its vertices [V, 3], world coordinates
    rng: np.random.Generator

    @property
    def size(self) -> float:
        """Mean extent of the surface along the axes, in world units."""
        return float(np.ptp(self.surface, axis=0).mean())

    def front(self) -> np.ndarray:
        """Return the third of the vertices nearest to the frontal camera [V', 3], in random order."""
        # The frontal camera stands on the side of +z.
        ahead = self.surface[self.surface[:, 2] >= np.quantile(self.surface[:, 2], 2 / 3)]
        return self.rng.permutation(ahead)

    def distance(self, centres: np.ndarray) -> np.ndarray:
        """Compute the distance [X, Y, Z] from every grid point to the nearest of the centres [.., 3]."""
        # x [X, 1, 1], y [1, Y, 1], z [1, 1, Z]: the sum broadcasts to the grid.
        x, y, z = np.ix_(*self.axes)
        squares = [(x - a) ** 2 + (y - b) ** 2 + (z - c) ** 2 for a, b, c in centres]
        return np.sqrt(np.minimum.reduce(squares))

    def signed(self, distance: np.ndarray) -> np.ndarray:
        """Return a density that equals the level where `distance` is 0 and increases with it."""
        # max(.., 1): a level near 0 must not give a flat density.
        return self.level + _STEEP * max(abs(self.level), 1.0) * distance


def floaters(body: Body) -> np.ndarray:
    """Add round lumps in front of the surface that touch nothing."""
    radius = _LUMP * body.size
    candidates = body.front()[:_TRIED]  # [N, 3]
    low, high = (np.array([axis[end] for axis in body.axes]) for end in (0, -1))
    direction = body.rng.normal(size=candidates.shape)
    direction[:, 2] = abs(direction[:, 2])  # towards the camera
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    distance = body.rng.uniform(1.5, 2.5, (len(candidates), 1)) * radius
    centres = candidates + distance * direction
    # World coordinates to fractional grid indices [N, 3], as map_coordinates expects them.
    index = (centres - low) / (high - low) * (np.array(body.sigma.shape) - 1)
    outside = ndimage.map_coordinates(body.sigma, index.T, order=1, mode="nearest") < body.level
    # A lump keeps a gap of at least 0.35 radii to the surface, so it is visibly loose.
    free = outside & (cKDTree(body.surface).query(centres)[0] > 1.35 * radius)
    margin = radius + 0.12 * (high - low)  # the border of the cube may be cleared
    free &= np.all((centres > low + margin) & (centres < high - margin), axis=1)
    lumps = _scattered("floaters", centres[free], 2.5 * radius)
    # The maximum of two densities is the union of their shapes.
    return np.maximum(body.sigma, body.signed(radius - body.distance(lumps)))


def holes(body: Body) -> np.ndarray:
    """Cut round holes into the side that faces the camera."""
    radius = _BITE * body.size
    centres = _scattered("holes", body.front(), 2 * radius)
    # The minimum of two densities is the intersection of their shapes, here with the outside of the spheres.
    return np.minimum(body.sigma, body.signed(body.distance(centres) - radius))


def rough(body: Body) -> np.ndarray:
    """Make the surface bumpy: every grid point takes the density of a random place nearby."""
    step = np.array([axis[1] - axis[0] for axis in body.axes])
    # source [3, X, Y, Z]: for each grid point, the indices where its density is read.
    source = np.indices(body.sigma.shape, dtype=np.float32)
    for axis in range(3):
        noise = body.rng.standard_normal(body.sigma.shape, dtype=np.float32)
        # Smoothing by half the width of a bump, in grid points of each axis.
        noise = ndimage.gaussian_filter(noise, (_GRAIN * body.size / 2 / step).tolist(), mode="wrap")
        # Division by the actual standard deviation: smoothing has reduced it by a factor that depends on the
        # grid.
        source[axis] += noise * np.float32(_REACH * body.size / step[axis] / noise.std())
    return ndimage.map_coordinates(body.sigma, source, order=1, mode="nearest")


def damage(
    name: str, sigma: np.ndarray, axes: tuple[np.ndarray, ...], level: float, surface: np.ndarray, seed: int
):
    """Compute the density [X, Y, Z] after damage `name`. Equal arguments give equal values.

    Args:
        name: a key of DAMAGES.
        sigma: raw density [X, Y, Z].
        axes: world coordinates x [X], y [Y], z [Z].
        level: raw density of the surface.
        surface: its vertices [V, 3].
        seed: of the shape; another one places the damage elsewhere.
    """
    rng = damage_draws(name, DAMAGES, seed)
    damaged = {function.__name__: function for function in (floaters, holes, rough)}[name]
    return damaged(Body(sigma, axes, level, surface, rng)).astype(np.float32)


def _scattered(name: str, places: np.ndarray, least: float) -> np.ndarray:
    """Select the first places [.., 3] whose distance to all places before is at least `least`."""
    selected: list[np.ndarray] = []
    for place in places:
        if all(np.linalg.norm(place - other) >= least for other in selected):
            selected.append(place)
            if len(selected) == _PLACES:
                break
    if len(selected) < _FEWEST:
        raise ValueError(
            f"damage({name}): expected space for {_FEWEST} places, got {len(selected)}. Choose another seed,"
            " psi or level."
        )
    return np.array(selected)
