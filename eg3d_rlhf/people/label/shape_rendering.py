"""From a shape's record to what the browser gets: the mesh, and the picture of the same latent.

Also damage that nobody can overlook, done to a density on purpose: one side of every pair whose answer must
be known. It moves the surface alone and is measured by the surface's own size, so it looks alike for any
generator, whatever its densities are.

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

_SLACK = 1.1  # times the wanted triangles that a mesh may have
_PASSES = 5  # of decimation, each of which stops where edges are too costly
_DUST = 16  # triangles; smaller parts are left out
# lumps or bites, and how few will do
_PLACES = 6
_FEWEST = 3
_TRIED = 2000  # places looked at for lumps
# their radii, in sizes of the body
_LUMP = 0.075
_BITE = 0.10
# of the roughness: width of its bumps and the standard deviation of the displacement, in sizes
_GRAIN = 0.07
_REACH = 0.03
_STEEP = 1e3  # slope of the density at the new surface, in levels per world unit
_HELD = 2  # generators in memory: the two of a study


def surface(generator: Generator, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Vertices [V, 3] float32 and triangles [F, 3] of a shape's surface, all its parts that can be seen,
    decimated.

    The border of the generator's cube is cleared. Hollows inside the body and dust are left out. In plain
    torch: what is judged should not depend on the compiler of the machine, nor wait for it.
    """
    with implementation("torch"):
        field = generator.field(ws_of_seeds(generator, [shape.seed], shape.psi))
        grid = FieldGrid(field, shape.resolution, field.bounds.border)
        vertices, faces = extract_field_mesh(grid, shape.level)
        if shape.degradation:
            axes = tuple(axis.double().numpy() for axis in grid.axes)
            sigma = grid(slice(0, shape.resolution)).numpy()
            sigma = damage(
                shape.degradation, sigma, axes, shape.level, visible_parts(vertices, faces)[0], shape.seed
            )
            vertices, faces = extract_mesh_blockwise(lambda x: sigma[x], axes, shape.level)
    vertices, faces = visible_parts(vertices, faces)
    return within_budget(vertices, faces, shape.triangles)


def visible_parts(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mesh without hollows (parts that enclose a negative volume) and without dust; always with the
    largest part.
    """
    count, part = parts(faces, len(vertices))
    if count == 1:
        return vertices, faces
    volume = np.bincount(part, weights=face_volumes(vertices, faces), minlength=count)
    kept = (volume > 0) & (np.bincount(part, minlength=count) >= _DUST)
    kept[volume.argmax()] = True
    return compact(vertices, faces[kept[part]])


def within_budget(vertices: np.ndarray, faces: np.ndarray, triangles: int) -> tuple[np.ndarray, np.ndarray]:
    """About so many triangles, closed where that can be had; a mesh that stays closed only with more is
    opened instead.

    What is looked at must load in time and need not be closed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # says that more triangles were kept
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


class ShapeDrawer:
    """Draws shapes; keeps the generators that it used last."""

    def __init__(self, device: str = "cpu"):
        self._load = functools.lru_cache(_HELD)(lambda source: load_generator(source or None, device))

    def mesh(self, shape: Shape) -> bytes:
        return compress(encode_mesh(*surface(self.generator(shape).generator, shape)))

    def picture(self, shape: Shape) -> bytes:
        """The frontal rendering as PNG; that of a damaged shape shows the latent undamaged, as the image is
        not drawn from the mesh.
        """
        generator = self.generator(shape).generator
        with implementation("torch"):
            (pixels,) = render(
                generator, ws_of_seeds(generator, [shape.seed], shape.psi), [camera(cameras_of(generator))]
            )
        return png(pixels)

    def generator(self, shape: Shape) -> LoadedGenerator:
        loaded = self._load(shape.source)
        if loaded.hash != shape.generator:
            wanted = shape.generator[:12]
            got = loaded.hash[:12]
            raise ValueError(
                f"{loaded.path.name}: expected the campaign's weights {wanted}..., got {got}... Restore the"
                " file."
            )
        return loaded


@dataclass(frozen=True)
class Body:
    """What is damaged."""

    sigma: np.ndarray  # raw density [X, Y, Z]
    axes: tuple[np.ndarray, ...]  # world coordinates x [X], y [Y], z [Z], evenly spaced
    level: float  # raw density of the surface
    surface: np.ndarray  # its vertices [V, 3], world coordinates
    rng: np.random.Generator

    @property
    def size(self) -> float:
        return float(np.ptp(self.surface, axis=0).mean())

    def front(self) -> np.ndarray:
        """The third of the vertices nearest to the camera [V', 3], in random order; +z looks at it."""
        ahead = self.surface[self.surface[:, 2] >= np.quantile(self.surface[:, 2], 2 / 3)]
        return self.rng.permutation(ahead)

    def distance(self, centres: np.ndarray) -> np.ndarray:
        """Distance [X, Y, Z] from every grid point to the nearest of centres [.., 3]."""
        x, y, z = np.ix_(*self.axes)
        squares = [(x - a) ** 2 + (y - b) ** 2 + (z - c) ** 2 for a, b, c in centres]
        return np.sqrt(np.minimum.reduce(squares))

    def signed(self, distance: np.ndarray) -> np.ndarray:
        """A density that crosses the level where a distance is 0 and rises with it."""
        return self.level + _STEEP * max(abs(self.level), 1.0) * distance


def floaters(body: Body) -> np.ndarray:
    """Round lumps that hang in the air in front of the surface."""
    radius = _LUMP * body.size
    near = body.front()[:_TRIED]
    low, high = (np.array([axis[i] for axis in body.axes]) for i in (0, -1))
    direction = body.rng.normal(size=near.shape)
    direction[:, 2] = abs(direction[:, 2])
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    centres = near + body.rng.uniform(1.5, 2.5, (len(near), 1)) * radius * direction
    index = (centres - low) / (high - low) * (np.array(body.sigma.shape) - 1)
    outside = ndimage.map_coordinates(body.sigma, index.T, order=1, mode="nearest") < body.level
    free = outside & (cKDTree(body.surface).query(centres)[0] > 1.35 * radius)
    margin = radius + 0.12 * (high - low)  # the outermost parts of the cube may be trimmed
    free &= np.all((centres > low + margin) & (centres < high - margin), axis=1)
    lumps = _scattered("floaters", centres[free], 2.5 * radius)
    return np.maximum(body.sigma, body.signed(radius - body.distance(lumps)))


def holes(body: Body) -> np.ndarray:
    """Round bites out of the side that looks at the camera."""
    radius = _BITE * body.size
    bites = _scattered("holes", body.front(), 2 * radius)
    return np.minimum(body.sigma, body.signed(body.distance(bites) - radius))


def rough(body: Body) -> np.ndarray:
    """A surface full of bumps: every point takes the density of a place nearby."""
    step = np.array([axis[1] - axis[0] for axis in body.axes])
    at = np.indices(body.sigma.shape, dtype=np.float32)
    for axis in range(3):
        noise = body.rng.standard_normal(body.sigma.shape, dtype=np.float32)
        noise = ndimage.gaussian_filter(noise, (_GRAIN * body.size / 2 / step).tolist(), mode="wrap")
        at[axis] += noise * np.float32(_REACH * body.size / step[axis] / noise.std())
    return ndimage.map_coordinates(body.sigma, at, order=1, mode="nearest")


def damage(
    name: str, sigma: np.ndarray, axes: tuple[np.ndarray, ...], level: float, surface: np.ndarray, seed: int
):
    """The density [X, Y, Z] after damage `name`; equal arguments give equal values."""
    rng = damage_draws(name, DAMAGES, seed)
    damaged = {function.__name__: function for function in (floaters, holes, rough)}[name]
    return damaged(Body(sigma, axes, level, surface, rng)).astype(np.float32)


def _scattered(name: str, places: np.ndarray, least: float) -> np.ndarray:
    """The first places [.., 3] that keep a distance of `least` from those before."""
    kept: list[np.ndarray] = []
    for place in places:
        if all(np.linalg.norm(place - other) >= least for other in kept):
            kept.append(place)
            if len(kept) == _PLACES:
                break
    if len(kept) < _FEWEST:
        raise ValueError(
            f"damage({name}): expected room for {_FEWEST} places, got {len(kept)}. Choose another seed, psi"
            " or level."
        )
    return np.array(kept)
