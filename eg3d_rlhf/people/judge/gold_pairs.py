"""Damaged copies of assets, in two degrees, whose order a judge must find.

Where no people have labelled, the answer to these pairs is known: of an intact asset, a slightly damaged copy
and a heavily damaged copy, the less damaged one is better. The kinds are faults of generated assets:

    hole         pieces are missing from the surface
    floater      loose lumps float beside the asset
    missing_back the surface is open at the back
    flattened    the asset is thin from front to back, like a relief
    mirrored     the front is repeated on the back, as a second face (the Janus problem)

Damage is made in the scene's coordinates with y up and the front at +z, so copies are relative to the size of
the asset. It is deterministic in the asset, the kind and the degree.

Shapes: N vertices or Gaussians, F triangles.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from eg3d_rlhf.geometry.files.model import Array, Model, Primitive, model_from_primitives
from eg3d_rlhf.geometry.files.ply import Splats
from eg3d_rlhf.geometry.files.triangles import scene_parts
from eg3d_rlhf.people.judge.view_maps import y_up
from eg3d_rlhf.people.label.assets.damage import damage_draws

KINDS = ("hole", "floater", "missing_back", "flattened", "mirrored")
DEGREES = ("mild", "severe")
# Degrees of the kinds: (mild, severe). Lengths are in units of the extent of the asset along the axis, or of
# the mean extent.
_HOLES = ((2, 0.12), (6, 0.2))  # number and radius
_LUMPS = ((2, 0.05), (6, 0.09))  # number and radius
_OPEN = (0.25, 0.6)  # depth from the back that is removed
_THIN = (0.6, 0.2)  # factor on the depth
_DOUBLED = (0.25, 1.0)  # half width of the region that is mirrored, as a share of the width


class _Frame:
    """Bounding box of an asset, y up, by which damage is measured.

    Args: points: positions [N, 3] of its surface.
    """

    def __init__(self, points: np.ndarray):
        self.low = points.min(axis=0)
        self.high = points.max(axis=0)
        self.centre = (self.low + self.high) / 2
        self.extent = np.maximum(self.high - self.low, 1e-9)
        # The mean extent, by which radii are measured on thin and on round assets.
        self.size = float(self.extent.mean())

    def is_outside_holes(self, points: np.ndarray, centres: np.ndarray, radius: float) -> np.ndarray:
        """Return the mask [N] of points that lie in none of the holes around centres [H, 3]."""
        # [N, H] -> [N], the distance to the nearest centre.
        distances = np.linalg.norm(points[:, None] - centres, axis=2).min(axis=1)
        return distances > radius * self.size

    def lump_centres(self, rng: np.random.Generator, count: int, radius: float) -> np.ndarray:
        """Return centres [count, 3] of lumps that lie around the asset, outside its box."""
        # Around the asset at about half of its height, where all side views show them.
        angles = rng.uniform(0, 2 * np.pi, count)
        heights = rng.uniform(-0.3, 0.3, count)
        directions = np.stack([np.cos(angles), heights, np.sin(angles)], axis=1)
        # the ellipse around the box, so that a lump touches nothing
        return self.centre + directions * (self.extent * 0.72 + radius * self.size)

    def is_in_front(self, points: np.ndarray) -> np.ndarray:
        """Return the mask [N] of points in the front half."""
        return points[:, 2] >= self.centre[2]

    def is_in_doubled_region(self, points: np.ndarray, share: float) -> np.ndarray:
        """Return the mask [N] of points whose x lies in the region that is mirrored."""
        return np.abs(points[:, 0] - self.centre[0]) <= share * self.extent[0] / 2

    def mirrored(self, points: np.ndarray) -> np.ndarray:
        """Return points [N, 3] reflected at the plane between front and back."""
        reflected = points.copy()
        reflected[:, 2] = 2 * self.centre[2] - reflected[:, 2]
        return reflected


def damaged_model(model: Model, kind: str, degree: str, seed: int = 0, up: str = "y") -> Model:
    """Return a damaged copy of a mesh with its materials, y up.

    Args:
        model: mesh, which is not changed.
        kind: one of KINDS.
        degree: "mild" or "severe".
        seed: random seed of positions.
        up: axis of the mesh that points up, "y" or "z".

    Raises: ValueError for an unknown kind, and if the damage would remove the whole mesh.
    """
    rng = damage_draws(kind, KINDS, seed)
    level = DEGREES.index(degree)  # index of the pairs (mild, severe) above
    # The positions in the scene, since the nodes may rotate and scale.
    parts = [(primitive, y_up(points, up), triangles) for primitive, points, triangles in scene_parts(model)]
    # Vertices that no triangle uses are not seen, and must not enlarge the frame.
    frame = _Frame(np.concatenate([points[np.unique(triangles)] for _, points, triangles in parts]))
    # Each function returns all primitives of the copy.
    change = {
        "hole": _with_holes,
        "floater": _with_lumps,
        "missing_back": _without_back,
        "flattened": _flattened,
        "mirrored": _doubled,
    }[kind]
    primitives = change(parts, frame, level, rng)
    kept = [
        primitive
        for primitive in primitives
        if primitive.indices is not None and len(primitive.indices.values)
    ]
    if not kept:
        raise ValueError(f"the damage {kind} would remove the whole mesh. Leave the asset out.")
    # One mesh at the origin: the transformations of the nodes are in its vertices.
    copy = model_from_primitives(kept)
    return replace(
        copy,
        materials=model.materials,
        textures=model.textures,
        samplers=model.samplers,
        images=model.images,
        extensions=model.extensions,
    )


_Parts = list[tuple[Primitive, np.ndarray, np.ndarray]]  # primitive, vertices [N, 3], triangles [F, 3]


def _made(primitive: Primitive, points: np.ndarray, triangles: np.ndarray) -> Primitive:
    """Return a primitive with other positions and triangles; its normals are left out, as they differ."""
    # Shading with the normals of the intact surface would hide the damage.
    attributes = {
        name: array for name, array in primitive.attributes.items() if name not in ("NORMAL", "TANGENT")
    }
    return Primitive(
        attributes={**attributes, "POSITION": Array(points.astype("<f4"))},
        indices=Array(triangles.astype("<u4").reshape(-1, 1)),
        material=primitive.material,
    )


def _selected(parts: _Parts, keep: Callable[[np.ndarray], np.ndarray]) -> list[Primitive]:
    """Return the triangles for whose centres [F, 3] `keep` is True."""
    return [
        _made(primitive, points, triangles[keep(points[triangles].mean(axis=1))])
        for primitive, points, triangles in parts
    ]


def _with_holes(parts: _Parts, frame: _Frame, level: int, rng: np.random.Generator) -> list[Primitive]:
    """Cut round holes into the surface."""
    count, radius = _HOLES[level]
    centres = np.concatenate([points[triangles].mean(axis=1) for _, points, triangles in parts])
    # Centres of triangles lie on the surface, so every hole is visible.
    holes = centres[rng.choice(len(centres), count, replace=len(centres) < count)]
    return _selected(parts, lambda points: frame.is_outside_holes(points, holes, radius))


def _without_back(parts: _Parts, frame: _Frame, level: int, rng: np.random.Generator) -> list[Primitive]:
    """Remove the surface at the back."""
    del rng
    # The back is at the low end of z.
    border = frame.low[2] + _OPEN[level] * frame.extent[2]
    return _selected(parts, lambda points: points[:, 2] > border)


def _flattened(parts: _Parts, frame: _Frame, level: int, rng: np.random.Generator) -> list[Primitive]:
    """Scale the depth about the centre."""
    del rng
    primitives = []
    for primitive, points, triangles in parts:
        points = points.copy()
        points[:, 2] = frame.centre[2] + _THIN[level] * (points[:, 2] - frame.centre[2])
        primitives.append(_made(primitive, points, triangles))
    return primitives


def _doubled(parts: _Parts, frame: _Frame, level: int, rng: np.random.Generator) -> list[Primitive]:
    """Replace the back, in the region of the degree, by the reflection of the front."""
    del rng
    # A mild copy has the second face in the middle of the back alone.
    share = _DOUBLED[level]

    def is_kept(points: np.ndarray) -> np.ndarray:
        return frame.is_in_front(points) | ~frame.is_in_doubled_region(points, share)

    primitives = _selected(parts, is_kept)
    for primitive, points, triangles in parts:
        centres = points[triangles].mean(axis=1)
        is_copied = frame.is_in_front(centres) & frame.is_in_doubled_region(centres, share)
        # a reflection turns faces inside out, so their corners are reversed
        primitives.append(_made(primitive, frame.mirrored(points), triangles[is_copied][:, ::-1]))
    return primitives


def _with_lumps(parts: _Parts, frame: _Frame, level: int, rng: np.random.Generator) -> list[Primitive]:
    """Add small octahedra that float around the asset."""
    count, radius = _LUMPS[level]
    primitives = [_made(primitive, points, triangles) for primitive, points, triangles in parts]
    # corners at +x, -x, +y, -y, +z, -z, and the eight faces between them
    corners = np.concatenate([np.eye(3), -np.eye(3)])[[0, 3, 1, 4, 2, 5]]
    faces = np.array([[x, y, z] for x in (0, 1) for y in (2, 3) for z in (4, 5)])
    centroids = corners[faces].mean(axis=1)
    # Twice the area times the normal; only its direction is used.
    normals = np.cross(
        corners[faces[:, 1]] - corners[faces[:, 0]], corners[faces[:, 2]] - corners[faces[:, 0]]
    )
    # all faces point outwards
    faces[(normals * centroids).sum(axis=1) < 0] = faces[(normals * centroids).sum(axis=1) < 0][:, ::-1]
    for centre in frame.lump_centres(rng, count, radius):
        primitives.append(
            Primitive(
                attributes={"POSITION": Array((centre + corners * radius * frame.size).astype("<f4"))},
                indices=Array(faces.astype("<u4").reshape(-1, 1)),
            )
        )
    return primitives


def damaged_splats(splats: Splats, kind: str, degree: str, seed: int = 0, up: str = "y") -> Splats:
    """Return a damaged copy of Gaussian splats, in their own axes. For the arguments, see `damaged_model`.

    Raises: ValueError for an unknown kind, and if the damage would remove all Gaussians.
    """
    rng = damage_draws(kind, KINDS, seed)
    level = DEGREES.index(degree)
    points = y_up(splats.centres.astype(np.float64), up)
    # A few distant Gaussians would make the frame much larger than the asset.
    low, high = np.quantile(points, [0.01, 0.99], axis=0)
    frame = _Frame(points.clip(low, high))
    is_kept = np.ones(len(points), dtype=bool)
    added = np.zeros(0, dtype=int)  # Gaussians that are copied
    added_points = np.zeros((0, 3))
    is_reflected = False
    if kind == "hole":
        count, radius = _HOLES[level]
        centres = points[rng.choice(len(points), count, replace=len(points) < count)]
        is_kept = frame.is_outside_holes(points, centres, radius)
    elif kind == "missing_back":
        is_kept = points[:, 2] > frame.low[2] + _OPEN[level] * frame.extent[2]
    elif kind == "flattened":
        points[:, 2] = frame.centre[2] + _THIN[level] * (points[:, 2] - frame.centre[2])
    elif kind == "mirrored":
        is_in_region = frame.is_in_doubled_region(points, _DOUBLED[level])
        is_kept = frame.is_in_front(points) | ~is_in_region
        added = np.flatnonzero(frame.is_in_front(points) & is_in_region)
        added_points = frame.mirrored(points[added])
        # Their orientation must be reflected, too.
        is_reflected = True
    else:
        count, radius = _LUMPS[level]
        for centre in frame.lump_centres(rng, count, radius):
            # a ball of copies of some Gaussians
            chosen = rng.choice(len(points), min(200, len(points)), replace=False)
            offsets = rng.normal(size=(len(chosen), 3))
            # Normally distributed vectors have uniformly distributed directions, so this is a sphere.
            offsets *= radius * frame.size / np.linalg.norm(offsets, axis=1, keepdims=True)
            added = np.concatenate([added, chosen])
            added_points = np.concatenate([added_points, centre + offsets])
    if not is_kept.any():
        raise ValueError(f"the damage {kind} would remove all splats. Leave the asset out.")
    indices = np.concatenate([np.flatnonzero(is_kept), added])
    rotations = splats.rotations[indices].copy()
    if is_reflected:
        # A Gaussian is unchanged by a reflection of its own axes, so the reflection at a plane with the
        # normal n has the rotation by the quaternion n (a half turn) before it.
        # The depth axis is z if y points up in the file, and y if z does. The sign does not matter.
        axis = {"y": (0, 0, 0, 1), "z": (0, 0, 1, 0)}[up]
        rotations[np.flatnonzero(is_kept).size :] = _after_half_turn(
            rotations[np.flatnonzero(is_kept).size :], axis
        )
    # The copied Gaussians come after the others.
    new_points = np.concatenate([points[is_kept], added_points])
    # back to the axes of the file: the inverse of `y_up`
    own_points = new_points if up == "y" else new_points[:, [0, 2, 1]] * np.array([1.0, -1.0, 1.0])
    return replace(
        splats,
        centres=own_points.astype("<f4"),
        rotations=rotations,
        **{name: getattr(splats, name)[indices] for name in ("scales", "opacities", "colours", "rest")},
    )


def _after_half_turn(rotations: np.ndarray, axis: tuple[int, int, int, int]) -> np.ndarray:
    """Return the quaternions [N, 4] (w, x, y, z; int16) of rotations that a half turn follows.

    Args:
        rotations: quaternions [N, 4].
        axis: quaternion (0, x, y, z) of the half turn, with one component 1.
    """
    w, x, y, z = rotations.astype(np.int32).T
    _, a, b, c = axis
    # Hamilton product axis * rotation
    product = np.stack(
        [
            -a * x - b * y - c * z,
            a * w + b * z - c * y,
            b * w + c * x - a * z,
            c * w + a * y - b * x,
        ],
        axis=1,
    )
    # One component of the axis is 1, so the values are those of `rotations`, in another order and with other
    # signs.
    return product.astype(rotations.dtype)
