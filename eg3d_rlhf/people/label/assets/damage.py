"""Deliberate damage of asset files, so strong that every annotator can see it.

A damaged copy of an asset is part of a gold or practice pair, whose correct answer must be known.

Shapes: N points, F triangles.
"""

import zlib
from collections.abc import Collection
from dataclasses import replace

import numpy as np

from eg3d_rlhf.geometry.files.model import TRIANGLES, Array, Model, Primitive
from eg3d_rlhf.geometry.files.ply import Splats

# kind of damage -> its description for annotators
DAMAGES = {"holes": "pieces are torn out of it", "rough": "its surface is all bumps"}
DAMAGED_KINDS = ("glb", "ply", "obj", "splats")  # kinds of files that can be damaged; videos cannot
_HOLES = 12  # number of holes
_HOLE = 0.12  # radius of a hole, relative to the size of the asset
# roughness: number of waves; their length and the standard deviation of the displacement, relative to the
# size
_WAVES = 24
_GRAIN = 0.12
_REACH = 0.025
_TRIED = 4000  # number of random points from which the centres of the holes are chosen


def damage_mesh(model: Model, damage_kind: str, seed: int) -> Model:
    """Damage a mesh. Equal arguments give equal results.

    Args:
        model: mesh, which must consist of triangles.
        damage_kind: kind of damage, a key of DAMAGES.
        seed: random seed of the position of the damage.

    Raises:
        ValueError: the kind is unknown, the mesh contains triangle strips or fans, or no triangle would
            remain.
    """
    rng = damage_draws(damage_kind, DAMAGES, seed)
    primitives = [primitive for mesh in model.meshes for primitive in mesh]
    if any(primitive.mode != TRIANGLES for primitive in primitives):
        raise ValueError("a mesh of triangle strips or fans cannot be damaged. Save it as separate triangles")
    # Vertices that no triangle uses cannot be seen, so they have no influence on the size.
    points = np.concatenate(
        [primitive.attributes["POSITION"].values[np.unique(_faces(primitive))] for primitive in primitives]
    ).astype(np.float64)
    asset_size = _size(points)
    if damage_kind == "rough":
        displaced_by_id: dict[int, Array] = {}  # id of an array of positions -> its displaced copy
        bumps = _Bumps(rng, asset_size)
        return replace(
            model,
            meshes=[
                [_rough(primitive, bumps, displaced_by_id) for primitive in mesh] for mesh in model.meshes
            ],
        )
    # A triangle is removed if its centre lies in a hole. The centres of each primitive are [F, 3].
    triangle_centres = [_corners(primitive).mean(axis=1) for primitive in primitives]
    hole_centres = _distant_points(rng, np.concatenate(triangle_centres))
    # The iterator yields the masks in the order of `parts`, which is also the order of the loops below.
    kept_masks = iter(
        [_is_outside(centres, hole_centres, _HOLE * asset_size) for centres in triangle_centres]
    )
    meshes = [[_cut(primitive, next(kept_masks)) for primitive in mesh] for mesh in model.meshes]
    # GLB does not allow a primitive without triangles, so primitives that lie entirely in a hole are
    # removed.
    meshes = [
        [primitive for primitive in mesh if len(primitive.indices.values)]  # type: ignore[union-attr]
        for mesh in meshes
    ]
    if not all(meshes):
        raise ValueError("the damage would remove the entire mesh. Choose another asset")
    return replace(model, meshes=meshes)


def damage_splats(splats: Splats, damage_kind: str, seed: int) -> Splats:
    """Damage Gaussian splats. Equal arguments give equal results.

    Args:
        splats: Gaussian splats.
        damage_kind: kind of damage, a key of DAMAGES.
        seed: random seed of the position of the damage.

    Raises:
        ValueError: the kind is unknown, or no splat would remain.
    """
    rng = damage_draws(damage_kind, DAMAGES, seed)
    asset_size = _size(splats.centres.astype(np.float64))
    if damage_kind == "rough":
        displaced_centres = splats.centres + rng.normal(scale=_REACH * asset_size, size=splats.centres.shape)
        return replace(splats, centres=displaced_centres.astype("<f4"))
    # Opacities are 0..255, so 128 is an opacity of one half. A hole among transparent Gaussians would not be
    # visible.
    opaque_centres = splats.centres[splats.opacities >= 128]
    hole_centres = _distant_points(rng, opaque_centres if len(opaque_centres) else splats.centres)
    is_kept = _is_outside(splats.centres, hole_centres, _HOLE * asset_size)
    if not is_kept.any():
        raise ValueError("the damage would remove all splats. Choose another asset")
    array_names = ("centres", "scales", "rotations", "opacities", "colours", "rest")
    return replace(splats, **{array_name: getattr(splats, array_name)[is_kept] for array_name in array_names})


def damage_draws(damage_kind: str, allowed_kinds: Collection[str], seed: int) -> np.random.Generator:
    """Return the random number generator for damaging a shape, seeded by the kind of damage and the shape.

    Args:
        damage_kind: kind of damage.
        allowed_kinds: allowed kinds.
        seed: seed of the damaged shape.

    Raises:
        ValueError: the kind is not allowed.
    """
    if damage_kind not in allowed_kinds:
        raise ValueError(
            f"damage: the kind {damage_kind!r} is unknown, and must be one of {', '.join(allowed_kinds)}."
            " Plan the campaign with this version."
        )
    # crc32 is used, because Python's hash() of a text differs between processes.
    return np.random.default_rng([seed, zlib.crc32(damage_kind.encode())])


def _size(points: np.ndarray) -> float:
    """Return the mean extent of points [N, 3] along the axes, or 1 if they have no extent.

    The outermost 2 % of the points on each side are ignored, so that a few distant points have no influence.
    """
    low, high = np.quantile(points, [0.02, 0.98], axis=0)
    return float((high - low).mean()) or 1.0


def _distant_points(rng: np.random.Generator, points: np.ndarray) -> np.ndarray:
    """Choose _HOLES of the points [N, 3] (farthest point sampling).

    The first point is random. Each further point is the one with the largest distance to the points before
    it.
    """
    points = points[rng.permutation(len(points))[:_TRIED]].astype(np.float64)
    selected_points = [points[0]]
    distances = np.linalg.norm(points - selected_points[0], axis=1)  # to the nearest selected point
    for _ in range(_HOLES - 1):
        selected_points.append(points[distances.argmax()])
        distances = np.minimum(distances, np.linalg.norm(points - selected_points[-1], axis=1))
    return np.array(selected_points)


def _is_outside(points: np.ndarray, centres: np.ndarray, radius: float) -> np.ndarray:
    """Return the mask [N] of the points [N, 3] that are farther than `radius` from all centres."""
    # The loop saves memory: a matrix of all distances would be large for large assets.
    is_outside = np.ones(len(points), dtype=bool)
    for centre in centres:
        is_outside &= ((points - centre) ** 2).sum(axis=1) > radius**2
    return is_outside


class _Bumps:
    """Smooth random displacement field, which is a sum of sine waves.

    The displacement depends on the position only, so vertices at the same position stay together.

    Args:
        rng: random generator.
        asset_size: size of the asset.
    """

    def __init__(self, rng: np.random.Generator, asset_size: float):
        directions = rng.normal(size=(_WAVES, 3))
        # wave vectors [_WAVES, 3] with random directions, for a wavelength of _GRAIN * size
        self.waves = (
            directions / np.linalg.norm(directions, axis=1, keepdims=True) * 2 * np.pi / (_GRAIN * asset_size)
        )
        self.phases = rng.uniform(0, 2 * np.pi, _WAVES)
        # With the factor sqrt(2 / _WAVES), the standard deviation of the sum is _REACH * size for each
        # coordinate, because the variance of a sine is 1/2.
        self.amplitudes = rng.normal(size=(_WAVES, 3)) * _REACH * asset_size * np.sqrt(2 / _WAVES)

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """Return the displacement [N, 3] of points [N, 3]."""
        displacement = np.zeros(points.shape)
        for wave, phase, amplitude in zip(self.waves, self.phases, self.amplitudes, strict=True):
            displacement += np.sin(points @ wave + phase)[:, None] * amplitude
        return displacement


def _rough(primitive: Primitive, bumps: _Bumps, displaced_by_id: dict[int, Array]) -> Primitive:
    """Displace the vertices of a primitive, and remove its normals and tangents.

    Shading with the normals of the undamaged surface would hide the bumps.

    Args:
        primitive: part of a mesh that has one material (a primitive of glTF).
        bumps: displacement field.
        displaced_by_id: id of an array of positions -> its displaced copy. The dictionary is extended in
            place.
    """
    positions = primitive.attributes["POSITION"]
    # Several parts may share an array of positions. It is displaced only once, so that they keep sharing it.
    if id(positions) not in displaced_by_id:
        displaced_values = positions.values.astype(np.float64)
        displaced_values = displaced_values + bumps(displaced_values)
        # Positions may be quantised as integers. They are rounded, and limited to the range of their type.
        if positions.values.dtype.kind != "f":
            integer_limits = np.iinfo(positions.values.dtype)
            displaced_values = np.rint(displaced_values).clip(integer_limits.min, integer_limits.max)
        displaced_by_id[id(positions)] = Array(
            displaced_values.astype(positions.values.dtype), positions.normalized
        )
    attributes = {
        name: array for name, array in primitive.attributes.items() if name not in ("NORMAL", "TANGENT")
    }
    return replace(primitive, attributes={**attributes, "POSITION": displaced_by_id[id(positions)]})


def _faces(primitive: Primitive) -> np.ndarray:
    """Return the triangles of a primitive as indices of vertices, [F, 3]."""
    indices = (
        np.arange(len(primitive.attributes["POSITION"].values), dtype="<u4")
        if primitive.indices is None
        else primitive.indices.values[:, 0]
    )
    # One or two indices at the end, which form no triangle, are ignored, as other readers of GLB do.
    return indices[: len(indices) // 3 * 3].reshape(-1, 3)


def _corners(primitive: Primitive) -> np.ndarray:
    """Return the corners of the triangles of a primitive, [F, corner, coordinate] = [F, 3, 3]."""
    return primitive.attributes["POSITION"].values[_faces(primitive)].astype(np.float64)


def _cut(primitive: Primitive, is_kept: np.ndarray) -> Primitive:
    """Return a primitive with only the triangles for which `is_kept` [F] is True."""
    # [F', 3] -> [3 F', 1], the shape of an index array in GLB
    return replace(primitive, indices=Array(np.ascontiguousarray(_faces(primitive)[is_kept]).reshape(-1, 1)))
