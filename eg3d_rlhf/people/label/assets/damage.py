"""Damages a copy of an asset deliberately, so strongly that every annotator can see it. The damaged copy is
one side of a pair whose answer must be known.
"""

import zlib
from collections.abc import Collection
from dataclasses import replace

import numpy as np

from eg3d_rlhf.geometry.files.model import TRIANGLES, Array, Model, Primitive
from eg3d_rlhf.geometry.files.ply import Splats

# Names of the damages, with their descriptions for annotators.
DAMAGES = {"holes": "pieces are torn out of it", "rough": "its surface is all bumps"}
DAMAGED_KINDS = ("glb", "ply", "obj", "splats")  # kinds of files that can be damaged; videos cannot
# Number of holes, and their radius relative to the size of the asset.
_PLACES = 12
_HOLE = 0.12
# Roughness: number of waves, their length, and the standard deviation of the displacement, relative to the
# size.
_WAVES = 24
_GRAIN = 0.12
_REACH = 0.025
_TRIED = 4000  # number of random places from which the holes are chosen


def damage_mesh(model: Model, name: str, seed: int) -> Model:
    """Damage a model. Equal arguments give equal models.

    Args:
        model: of triangles.
        name: a key of DAMAGES.
        seed: places the damage.

    Raises: ValueError for an unknown name, strips or fans, and if nothing would remain.
    """
    rng = damage_draws(name, DAMAGES, seed)
    parts = [part for mesh in model.meshes for part in mesh]
    if any(part.mode != TRIANGLES for part in parts):
        raise ValueError("only meshes of triangles can be damaged, got strips or fans")
    points = np.concatenate([part.attributes["POSITION"].values for part in parts]).astype(np.float64)
    size = _size(points)
    if name == "rough":
        moved: dict[int, Array] = {}  # id of a position array -> its displaced copy
        bumps = _Bumps(rng, size)
        return replace(model, meshes=[[_rough(part, bumps, moved) for part in mesh] for mesh in model.meshes])
    # Middles of the triangles [F, 3], for each part. A triangle is removed if its middle lies in a hole.
    middles = [_corners(part).mean(axis=1) for part in parts]
    places = _distant_places(rng, np.concatenate(middles))
    kept = iter([_outside(middle, places, _HOLE * size) for middle in middles])
    meshes = [[_cut(part, next(kept)) for part in mesh] for mesh in model.meshes]
    # A part that lies entirely in a hole has no triangles left, which GLB does not allow.
    meshes = [
        [part for part in mesh if len(part.indices.values)]  # type: ignore[union-attr]
        for mesh in meshes
    ]
    if not all(meshes):
        raise ValueError("the holes would remove the entire mesh. Choose another asset")
    return replace(model, meshes=meshes)


def damage_splats(splats: Splats, name: str, seed: int) -> Splats:
    """Damage Gaussian splats. Raises: as `damage_mesh`."""
    rng = damage_draws(name, DAMAGES, seed)
    size = _size(splats.centres.astype(np.float64))
    if name == "rough":
        moved = splats.centres + rng.normal(scale=_REACH * size, size=splats.centres.shape)
        return replace(splats, centres=moved.astype("<f4"))
    # Holes in invisible Gaussians would not be seen: 128 of 255 is an opacity of one half.
    opaque = splats.centres[splats.opacities >= 128]
    places = _distant_places(rng, opaque if len(opaque) else splats.centres)
    kept = _outside(splats.centres, places, _HOLE * size)
    if not kept.any():
        raise ValueError("the holes would remove all splats. Choose another asset")
    arrays = ("centres", "scales", "rotations", "opacities", "colours", "rest")
    return replace(splats, **{array: getattr(splats, array)[kept] for array in arrays})


def damage_draws(name: str, known: Collection[str], seed: int) -> np.random.Generator:
    """Return the random generator of a damage. Raises: ValueError if `name` is not one of `known`."""
    if name not in known:
        raise ValueError(
            f"damage: expected one of {', '.join(known)}, got {name!r}. Plan the campaign with this version."
        )
    # crc32 and not hash(): Python's hash of a text differs from process to process.
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def _size(points: np.ndarray) -> float:
    """Return the mean extent of points [N, 3] along the axes, without the outermost 2 % on each side."""
    # Quantiles ignore a few stray points. An asset without extent gets 1.
    low, high = np.quantile(points, [0.02, 0.98], axis=0)
    return float((high - low).mean()) or 1.0


def _distant_places(rng: np.random.Generator, points: np.ndarray) -> np.ndarray:
    """Choose _PLACES of the points [N, 3], each the farthest from those chosen before it."""
    points = points[rng.permutation(len(points))[:_TRIED]].astype(np.float64)
    chosen = [points[0]]
    nearest = np.linalg.norm(points - chosen[0], axis=1)
    for _ in range(_PLACES - 1):
        chosen.append(points[nearest.argmax()])
        nearest = np.minimum(nearest, np.linalg.norm(points - chosen[-1], axis=1))
    return np.array(chosen)


def _outside(points: np.ndarray, places: np.ndarray, radius: float) -> np.ndarray:
    """Return [N] True for points [N, 3] that are farther than `radius` from all places."""
    # One place after the other: a matrix of all distances would need much memory for large assets.
    out = np.ones(len(points), dtype=bool)
    for place in places:
        out &= ((points - place) ** 2).sum(axis=1) > radius**2
    return out


class _Bumps:
    """A smooth random displacement field, a sum of sine waves. Vertices at the same position move
    together.
    """

    def __init__(self, rng: np.random.Generator, size: float):
        directions = rng.normal(size=(_WAVES, 3))
        # Wave vectors [_WAVES, 3]: random directions, wavelength _GRAIN times the size.
        self.waves = (
            directions / np.linalg.norm(directions, axis=1, keepdims=True) * 2 * np.pi / (_GRAIN * size)
        )
        self.phases = rng.uniform(0, 2 * np.pi, _WAVES)
        # The factor sqrt(2 / _WAVES) makes the standard deviation of the sum _REACH times the size per
        # coordinate.
        self.amplitudes = rng.normal(size=(_WAVES, 3)) * _REACH * size * np.sqrt(2 / _WAVES)

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """Return the displacement [N, 3] of points [N, 3]."""
        out = np.zeros(points.shape)
        for wave, phase, amplitude in zip(self.waves, self.phases, self.amplitudes, strict=True):
            out += np.sin(points @ wave + phase)[:, None] * amplitude
        return out


def _rough(part: Primitive, bumps: _Bumps, moved: dict[int, Array]) -> Primitive:
    """Displace a part. Normals and tangents are removed, because shading with the old ones would hide the
    bumps.
    """
    old = part.attributes["POSITION"]
    # Parts may share an array of positions, which is displaced once.
    if id(old) not in moved:
        values = old.values.astype(np.float64)
        values = values + bumps(values)
        # Quantised positions are rounded and must stay within their type's range.
        if old.values.dtype.kind != "f":
            ends = np.iinfo(old.values.dtype)
            values = np.rint(values).clip(ends.min, ends.max)
        moved[id(old)] = Array(values.astype(old.values.dtype), old.normalized)
    kept = {name: array for name, array in part.attributes.items() if name not in ("NORMAL", "TANGENT")}
    return replace(part, attributes={**kept, "POSITION": moved[id(old)]})


def _faces(part: Primitive) -> np.ndarray:
    """Return the triangles of a part, [F, 3] indices."""
    indices = (
        np.arange(len(part.attributes["POSITION"].values), dtype="<u4")
        if part.indices is None
        else part.indices.values[:, 0]
    )
    # Readers ignore one or two indices at the end that form no triangle.
    return indices[: len(indices) // 3 * 3].reshape(-1, 3)


def _corners(part: Primitive) -> np.ndarray:
    """Return the corners of a part's triangles, [F, 3, 3]."""
    return part.attributes["POSITION"].values[_faces(part)].astype(np.float64)


def _cut(part: Primitive, kept: np.ndarray) -> Primitive:
    """Keep the triangles of a part for which `kept` [F] is True."""
    return replace(part, indices=Array(np.ascontiguousarray(_faces(part)[kept]).reshape(-1, 1)))
