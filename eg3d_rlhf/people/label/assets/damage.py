"""Damage that nobody can overlook, done to a copy of an asset on purpose: one side of every pair whose answer
must be known.
"""

import zlib
from collections.abc import Collection
from dataclasses import replace

import numpy as np

from eg3d_rlhf.geometry.files.model import TRIANGLES, Array, Model, Primitive
from eg3d_rlhf.geometry.files.ply import Splats

# with what a person sees
DAMAGES = {"holes": "pieces are torn out of it", "rough": "its surface is all bumps"}
DAMAGED_KINDS = ("glb", "ply", "obj", "splats")  # of files; videos stay whole
# holes, and their radius in sizes of the asset
_PLACES = 12
_HOLE = 0.12
# of the roughness: waves, their length, and the displacement's standard deviation, in sizes
_WAVES = 24
_GRAIN = 0.12
_REACH = 0.025
_TRIED = 4000  # places looked at for holes


def damage_mesh(model: Model, name: str, seed: int) -> Model:
    """A model after damage `name`; equal arguments give equal models.

    Raises: ValueError for an unknown name, strips, or nothing left.
    """
    rng = damage_draws(name, DAMAGES, seed)
    parts = [part for mesh in model.meshes for part in mesh]
    if any(part.mode != TRIANGLES for part in parts):
        raise ValueError("expected a mesh of triangles to damage, got strips or fans")
    points = np.concatenate([part.attributes["POSITION"].values for part in parts]).astype(np.float64)
    size = _size(points)
    if name == "rough":
        moved: dict[int, Array] = {}
        bumps = _Bumps(rng, size)
        return replace(model, meshes=[[_rough(part, bumps, moved) for part in mesh] for mesh in model.meshes])
    centres = [_corners(part).mean(axis=1) for part in parts]
    places = _spread(rng, np.concatenate(centres))
    kept = iter([_far(middle, places, _HOLE * size) for middle in centres])
    meshes = [[_cut(part, next(kept)) for part in mesh] for mesh in model.meshes]
    meshes = [
        [part for part in mesh if len(part.indices.values)]  # type: ignore[union-attr]
        for mesh in meshes
    ]
    if not all(meshes):
        raise ValueError("expected a mesh that stays where holes are cut, got one that is gone")
    return replace(model, meshes=meshes)


def damage_splats(splats: Splats, name: str, seed: int) -> Splats:
    """Gaussians after damage `name`. Raises: as `damage_mesh`."""
    rng = damage_draws(name, DAMAGES, seed)
    size = _size(splats.centres.astype(np.float64))
    if name == "rough":
        moved = splats.centres + rng.normal(scale=_REACH * size, size=splats.centres.shape)
        return replace(splats, centres=moved.astype("<f4"))
    seen = splats.centres[splats.opacities >= 128]
    kept = _far(splats.centres, _spread(rng, seen if len(seen) else splats.centres), _HOLE * size)
    if not kept.any():
        raise ValueError("expected splats that stay where holes are cut, got some that are gone")
    arrays = ("centres", "scales", "rotations", "opacities", "colours", "rest")
    return replace(splats, **{array: getattr(splats, array)[kept] for array in arrays})


def damage_draws(name: str, known: Collection[str], seed: int) -> np.random.Generator:
    """Return the generator that damage `name` draws from. Raises: ValueError for a name that is not known."""
    if name not in known:
        raise ValueError(
            f"damage: expected one of {', '.join(known)}, got {name!r}. Make the campaign with this version."
        )
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def _size(points: np.ndarray) -> float:
    low, high = np.quantile(points, [0.02, 0.98], axis=0)
    return float((high - low).mean()) or 1.0


def _spread(rng: np.random.Generator, points: np.ndarray) -> np.ndarray:
    points = points[rng.permutation(len(points))[:_TRIED]].astype(np.float64)
    chosen = [points[0]]
    nearest = np.linalg.norm(points - chosen[0], axis=1)
    for _ in range(_PLACES - 1):
        chosen.append(points[nearest.argmax()])
        nearest = np.minimum(nearest, np.linalg.norm(points - chosen[-1], axis=1))
    return np.array(chosen)


def _far(points: np.ndarray, places: np.ndarray, radius: float) -> np.ndarray:
    out = np.ones(len(points), dtype=bool)
    for place in places:
        out &= ((points - place) ** 2).sum(axis=1) > radius**2
    return out


class _Bumps:
    """A smooth random displacement, so that vertices at one place stay together."""

    def __init__(self, rng: np.random.Generator, size: float):
        directions = rng.normal(size=(_WAVES, 3))
        self.waves = (
            directions / np.linalg.norm(directions, axis=1, keepdims=True) * 2 * np.pi / (_GRAIN * size)
        )
        self.phases = rng.uniform(0, 2 * np.pi, _WAVES)
        self.ways = rng.normal(size=(_WAVES, 3)) * _REACH * size * np.sqrt(2 / _WAVES)

    def __call__(self, points: np.ndarray) -> np.ndarray:
        out = np.zeros(points.shape)
        for wave, phase, way in zip(self.waves, self.phases, self.ways, strict=True):
            out += np.sin(points @ wave + phase)[:, None] * way
        return out


def _rough(part: Primitive, bumps: _Bumps, moved: dict[int, Array]) -> Primitive:
    """Moved; without normals, which would hide it."""
    old = part.attributes["POSITION"]
    if id(old) not in moved:
        values = old.values.astype(np.float64)
        values = values + bumps(values)
        if old.values.dtype.kind != "f":
            ends = np.iinfo(old.values.dtype)
            values = np.rint(values).clip(ends.min, ends.max)
        moved[id(old)] = Array(values.astype(old.values.dtype), old.normalized)
    kept = {name: array for name, array in part.attributes.items() if name not in ("NORMAL", "TANGENT")}
    return replace(part, attributes={**kept, "POSITION": moved[id(old)]})


def _faces(part: Primitive) -> np.ndarray:
    indices = (
        np.arange(len(part.attributes["POSITION"].values), dtype="<u4")
        if part.indices is None
        else part.indices.values[:, 0]
    )
    return indices[: len(indices) // 3 * 3].reshape(-1, 3)


def _corners(part: Primitive) -> np.ndarray:
    return part.attributes["POSITION"].values[_faces(part)].astype(np.float64)


def _cut(part: Primitive, kept: np.ndarray) -> Primitive:
    return replace(part, indices=Array(np.ascontiguousarray(_faces(part)[kept]).reshape(-1, 1)))
