"""Procedural heads of people, the family `synthetic:people64`. Each latent defines one head and one scan of
it.

A latent has 64 coordinates, scaled to unit root mean square as a mapping network scales it: 36 components of
identity, 4 of hair, 6 of appearance and 18 of scan quality. The first 40 give a mesh by a linear basis, which
builders/people_basis.py makes once from MakeHuman's data. The next 6 give its colours. The last 18 define the
damage of the scan, see `training.heads.people_damage`. The head without damage, defined by the first 46
coordinates, is called the intact or ground-truth head.

World axes: x right, y up, z to the camera, in the cube of side 1 about the origin.

Shape letters: N heads, V vertices, T triangles, K components, H hair fields, P points, M masks, R pixels per
edge.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from scipy.special import ndtr

from training import storage

KIND = "people-basis"  # kind in the header of the basis file
VERSION = 1  # of the basis file
COMPONENTS = 36
HAIR_FIELDS = 4
APPEARANCE = 6
QUALITY = 18
SHAPE = COMPONENTS + HAIR_FIELDS  # coordinates of a head's shape
LATENT = COMPONENTS + HAIR_FIELDS + APPEARANCE + QUALITY
UNIT = 1.15  # factor from the lengths in this file, for a head 0.4 high, to world units
EYE = (0.0512, 0.005)  # the mean head's eyes: distance from the plane x = 0, and height
ASSET = storage.ASSETS / "people-basis.safetensors"
# Unit vector towards the light, in world axes.
LIGHT = np.array([0.30, 0.50, 0.81], np.float32) / np.linalg.norm([0.30, 0.50, 0.81])

# Palettes, RGB in 0..1. A coordinate of the latent selects a place between neighbouring rows.

_SKIN = np.array(
    [[0.30, 0.18, 0.12], [0.48, 0.31, 0.21], [0.68, 0.47, 0.34], [0.86, 0.66, 0.53], [0.95, 0.79, 0.69]]
)
_HAIR = np.array(
    [
        [0.05, 0.04, 0.04],
        [0.13, 0.08, 0.05],
        [0.28, 0.17, 0.09],
        [0.50, 0.27, 0.12],
        [0.74, 0.56, 0.30],
        [0.60, 0.58, 0.56],
    ]
)
_IRIS = np.array(
    [[0.17, 0.09, 0.04], [0.30, 0.18, 0.08], [0.22, 0.34, 0.20], [0.16, 0.34, 0.55], [0.34, 0.42, 0.50]]
)
_SHIRT = np.array(
    [
        [0.75, 0.22, 0.20],
        [0.82, 0.62, 0.22],
        [0.30, 0.55, 0.32],
        [0.20, 0.45, 0.68],
        [0.45, 0.30, 0.60],
        [0.24, 0.25, 0.28],
    ]
)

# Raw density at the surface, and its limits inside and outside.
LEVEL = 10.0
INSIDE = 60.0
OUTSIDE = -10.0

Numbers = TypeVar("Numbers", np.ndarray, torch.Tensor)


@dataclass(frozen=True, kw_only=True)
class Basis:
    """Linear basis of head meshes, as arrays."""

    mean: np.ndarray  # [V, 3] float32, world units
    components: np.ndarray  # [K, V, 3] world units, offsets for one standard deviation
    hair: np.ndarray  # [H, V, 3] world units, offsets at the full amount
    triangles: np.ndarray  # [T, 3] int64
    masks: dict[str, np.ndarray]  # each [V] in 0..1
    sky: np.ndarray  # [V], share of the hemisphere above the vertex that is not occluded
    meta: dict

    @functools.cached_property
    def drawn(self) -> np.ndarray:
        """Per-vertex attributes [V, 8] from which colours are computed.

        They are the position on the mean head (3 columns), lips, scalp, eyes, long hair, and open sky.
        """
        long = np.linalg.norm(self.hair[2], axis=1)  # hair field 2 is long hair
        eyes = self.masks["eyes"]
        # The eyeball under the lids gets the lids' colour, because
        # the lids are thin and it would show through.
        bare = eyes * ramp(0.05, 0.3, self.sky)
        x, y, z = (self.mean / UNIT).T
        # Vertices near the eyes, such as the insides of the lids, are occluded in the mean head but visible
        # nearby. They would be dark spots without this lower bound.
        is_near_eye = (np.hypot(np.abs(x) - EYE[0], y - EYE[1]) < 0.036) & (z > 0.05)
        sky = np.where(is_near_eye, np.maximum(self.sky, 0.7), self.sky)
        columns = [self.masks["lips"], self.masks["scalp"], bare, long / long.max(), sky]
        return np.concatenate([self.mean, np.stack(columns, axis=1)], axis=1).astype(np.float32)


@functools.cache
def load_basis(path: Path = ASSET) -> Basis:
    """Read the basis.

    Raises: ValueError for a file that is missing, damaged or of another version.
    """
    try:
        tensors, meta = storage.read_tensors(path, KIND)
        if meta.get("version") != VERSION:
            raise ValueError(
                f"{path}: expected version {VERSION} of the basis of heads, got"
                f" {meta.get('version')}. Restore the file."
            )
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"{error} Or build it again: python -m builders.build people.") from None
    # The file holds bytes and half-precision numbers, to be small enough to bundle.
    masks = tensors["masks"].float().numpy() / 255
    return Basis(
        mean=tensors["mean"].numpy(),
        components=(tensors["components"].float() * tensors["component_step"][:, None, None]).numpy(),
        hair=tensors["hair"].float().numpy(),
        triangles=tensors["triangles"].numpy().astype(np.int64),
        masks=dict(zip(meta["masks"], masks, strict=True)),
        sky=tensors["sky"].float().numpy() / 255,
        meta=meta,
    )


# From latents to heads


def scaled(z: torch.Tensor | np.ndarray) -> np.ndarray:
    """Return latents [N, 64] scaled to unit root mean square, as float64.

    Raises: ValueError for another number of coordinates.
    """
    z = z.detach().cpu().numpy() if isinstance(z, torch.Tensor) else np.asarray(z)
    if z.ndim != 2 or z.shape[1] != LATENT:
        raise ValueError(
            f"heads of people: expected latents [N, {LATENT}], got {list(z.shape)}. Use a generator of"
            " synthetic:people64."
        )
    z = z.astype(np.float64)
    # The same normalisation as a mapping network's (`normalize_2nd_moment`), with the same epsilon.
    return z / np.sqrt((z * z).mean(axis=1, keepdims=True) + 1e-8)


def _split(z: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Split latents [N, 64] into identity, hair, appearance and scan quality."""
    ends = np.cumsum([COMPONENTS, HAIR_FIELDS, APPEARANCE])
    identity, hair, appearance, quality = np.split(z, ends, axis=1)
    return identity, hair, appearance, quality


def ramp(low: float, high: float, x: Numbers) -> Numbers:
    """Return a smooth step: 0 at `low` and before, 1 at `high` and beyond. `low` may be the larger one."""
    t = ((x - low) / (high - low)).clip(0, 1)
    return t * t * (3 - 2 * t)  # cubic with zero slope at both ends


def density_of(distance: torch.Tensor, edge: float) -> torch.Tensor:
    """Return the raw density of signed distances.

    Args:
        distance: [...], world units, negative inside.
        edge: depth at which the density is at its largest. The density at the surface is `LEVEL` for any
            edge.
    """
    return (LEVEL - distance * ((INSIDE - LEVEL) / edge)).clamp(OUTSIDE, INSIDE)


def hair_amounts(hair: np.ndarray) -> np.ndarray:
    """Return amounts [N, H] in 0..1 of volume, top, long hair and bun, for coordinates [N, H]."""
    # The normal distribution function turns a standard normal coordinate into a uniform one. The ramps leave
    # most heads without long hair and without a bun.
    share = ndtr(hair)
    return np.stack(
        [share[:, 0], share[:, 1] ** 2, ramp(0.45, 0.8, share[:, 2]), ramp(0.72, 0.9, share[:, 3])], axis=1
    )


@dataclass(frozen=True, kw_only=True)
class Head:
    """An intact head, with the coordinates of its appearance and of its scan's quality."""

    vertices: np.ndarray  # [V, 3] float32, world units
    normals: np.ndarray  # [V, 3] unit
    long: float  # amount of long hair
    appearance: np.ndarray  # [6]
    quality: np.ndarray  # [18]


def vertex_normals(vertices: np.ndarray, triangles: np.ndarray) -> np.ndarray:
    """Return unit normals [V, 3], the means of adjacent faces weighted by their area."""
    a, b, c = (vertices[triangles[:, i]] for i in range(3))
    face = np.cross(b - a, c - a)  # [T, 3], length twice the area
    normals = np.zeros_like(vertices)
    # bincount adds each face's normal to its vertices, also where a vertex occurs several times.
    for axis in range(3):
        for corner in range(3):
            normals[:, axis] += np.bincount(triangles[:, corner], face[:, axis], len(vertices))
    # The bound avoids a division by 0 at vertices without faces.
    return normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-12)


def named_people(z: torch.Tensor | np.ndarray, basis: Basis | None = None) -> list[Head]:
    """Return the heads that latents [N, 64] define."""
    basis = basis or load_basis()
    identity, hair, appearance, quality = _split(scaled(z))
    amounts = hair_amounts(hair)
    # Offsets from the mean head, [N, V, 3].
    moved = np.tensordot(identity, basis.components, axes=1) + np.tensordot(amounts, basis.hair, axes=1)
    heads = []
    for i, offsets in enumerate(moved):
        vertices = (basis.mean + offsets).astype(np.float32)
        heads.append(
            Head(
                vertices=vertices,
                normals=vertex_normals(vertices, basis.triangles),
                long=float(amounts[i, 2]),
                appearance=appearance[i],
                quality=quality[i],
            )
        )
    return heads


# The rounded cylinder that closes a bust at the bottom, world units.
BUST_RADIUS = 0.44
BUST_FLOOR = -0.46
BUST_ROUND = 0.04


def bust_end(points: np.ndarray) -> np.ndarray:
    """Return signed distances [...] of points [..., 3] to the cylinder that closes every bust at the bottom.

    The cylinder stands about the y axis and has rounded edges.
    """
    x, y, z = np.moveaxis(points, -1, 0)
    # Distances to the side and to the bottom of the cylinder without its rounding; both negative inside.
    out = np.hypot(x, z) - BUST_RADIUS + BUST_ROUND
    below = BUST_FLOOR + BUST_ROUND - y
    return (
        np.hypot(np.maximum(out, 0), np.maximum(below, 0))
        + np.minimum(np.maximum(out, below), 0)
        - BUST_ROUND
    )


# Colours


def _palette(colours: np.ndarray, coordinate: float) -> np.ndarray:
    """Return the colour [3] at a standard normal coordinate, interpolated between rows of `colours`."""
    at = ndtr(coordinate) * (len(colours) - 1)  # uniform over the rows
    return np.array([np.interp(at, np.arange(len(colours)), column) for column in colours.T], np.float32)


def _mix(base: np.ndarray, colour: np.ndarray | float, weight: np.ndarray) -> np.ndarray:
    """Blend `colour` over `base` [P, 3] with weights [P]."""
    return base + (colour - base) * weight[:, None]


def surface_colour(head: Head, drawn: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """Return shaded colours [P, 3] in 0..1 of places on the surface. No term depends on the view.

    Args:
        head: gives the palette coordinates.
        drawn: [P, 8], `Basis.drawn` interpolated at the places.
        normals: [P, 3] unit.
    """
    # Positions are on the *mean* head, so that features of the face follow the mesh for every identity.
    # Lengths are those of a head 0.4 high.
    place = drawn[:, :3] / UNIT
    lips, scalp, eyes, long, sky = drawn[:, 3:].T
    a = head.appearance
    skin, hair, iris, shirt = (
        _palette(p, c) for p, c in ((_SKIN, a[0]), (_HAIR, a[1]), (_IRIS, a[2]), (_SHIRT, a[3]))
    )
    x = np.abs(place[:, 0])  # the face is symmetric
    y = place[:, 1] - EYE[1]
    z = place[:, 2]
    albedo = np.broadcast_to(skin, (len(place), 3))
    # Later layers cover earlier ones: cheeks, lips, brows, hair, shirt, eyeballs.
    blush = np.exp(-(((x - 0.068) / 0.035) ** 2 + ((y + 0.055) / 0.03) ** 2)) * (z > 0.03)
    albedo = _mix(albedo, skin * np.array([1.0, 0.72, 0.68]), 0.5 * blush)
    lip = skin * np.array([0.86, 0.50, 0.50]) * (1 - 0.15 * ndtr(a[4]))
    albedo = _mix(albedo, lip, ramp(0.25, 0.6, lips))
    # Brows are arcs above the eyes: `across` runs from -1 to 1
    # along one, `arch` is the distance from its middle.
    across = (x - EYE[0] - 0.002) / 0.05
    arch = np.abs(y - (0.044 - 0.013 * across * across))
    brow = ramp(0.0095, 0.005, arch) * ramp(0.8, 0.6, np.abs(across)) * (z > 0.04)
    albedo = _mix(albedo, 0.8 * hair, (0.55 + 0.4 * ndtr(a[5])) * brow)
    cap = np.maximum(ramp(0.35, 0.65, scalp), head.long * ramp(0.1, 0.3, long))
    albedo = _mix(albedo, hair, cap)
    albedo = _mix(albedo, shirt, ramp(-0.305, -0.32, y) * (1 - cap))  # below the neck, under long hair
    # The eyeball from outside to inside: white, the iris with a dark rim, the pupil.
    rho = np.hypot(x - EYE[0], y)
    ball = np.full_like(albedo, 0.90)
    ball = _mix(ball, 0.35 * iris, ramp(0.0145, 0.0130, rho))
    ball = _mix(ball, iris, ramp(0.0125, 0.0110, rho))
    ball = _mix(ball, 0.02, ramp(0.0072, 0.0058, rho))
    albedo = _mix(albedo, ball, ramp(0.4, 0.6, eyes))
    # Wrapped diffuse light plus ambient light; both are weaker where the sky is occluded.
    lambert = np.clip(normals @ LIGHT * 0.65 + 0.35, 0, None)
    shading = 0.5 * (0.2 + 0.8 * sky) * (0.85 + 0.15 * normals[:, 1]) + 0.68 * lambert * (0.5 + 0.5 * sky)
    return np.clip(albedo * shading[:, None], 0, 1).astype(np.float32)


# Renders of meshes


def rasterise(
    vertices: np.ndarray, triangles: np.ndarray, cam2world: np.ndarray, focal: float, size: int
) -> tuple[np.ndarray, ...]:
    """Rasterise a mesh: find the nearest triangle of every pixel.

    Args:
        vertices: [V, 3]; triangles: [T, 3]; cam2world: [4, 4], OpenCV axes.
        focal: focal length, in image sizes.
        size: R.
    Returns: index of the triangle [R, R] (-1: none); perspective-correct weights of its corners [R, R, 3];
        depth along the camera's axis [R, R] (inf: none).
    """
    local = (vertices - cam2world[:3, 3]) @ cam2world[:3, :3]  # to camera axes: R^T (x - t), in rows
    depth = local[:, 2]
    # Pixel centres are at whole numbers, hence the -0.5.
    pixel = (local[:, :2] / depth[:, None] * focal + 0.5) * size - 0.5
    corner = pixel[triangles]  # [T, 3, 2]
    far = depth[triangles]  # [T, 3]
    # The box of pixels about each triangle, cut at the image's edges.
    low = np.clip(np.ceil(corner.min(axis=1)).astype(int), 0, size)
    high = np.clip(np.floor(corner.max(axis=1)).astype(int) + 1, 0, size)
    extent = np.clip(high - low, 0, None)
    nearest = np.full(size * size, np.inf)
    owner = np.full(size * size, -1)  # index of the triangle
    weights = np.zeros((size * size, 3))
    # All pixels of many triangles are tested at once. Triangles are sorted by their number of pixels and
    # divided into chunks, which bounds the memory.
    count = extent.prod(axis=1)
    order = np.argsort(count, kind="stable")
    order = order[count[order] > 0]
    for chunk in np.array_split(order, max(1, int(count.sum() // 400_000))):
        # One row per pair of triangle and pixel; `within` counts the pixels of each triangle from 0.
        index = np.repeat(chunk, count[chunk])
        within = np.arange(len(index)) - np.repeat(np.cumsum(count[chunk]) - count[chunk], count[chunk])
        column = low[index, 0] + within % extent[index, 0]
        row = low[index, 1] + within // extent[index, 0]
        a, b, c = (corner[index, i] for i in range(3))
        p = np.stack([column, row], axis=1)
        area = cross_2d(b - a, c - a)
        # A triangle seen edge-on has no area. An infinite one gives it shares of 0 for all of its corners.
        area = np.where(np.abs(area) < 1e-12, np.inf, area)
        share = (
            np.stack([cross_2d(c - b, p - b), cross_2d(a - c, p - c), cross_2d(b - a, p - a)], axis=1)
            / area[:, None]
        )
        inside = (share >= -1e-9).all(axis=1)  # the tolerance closes seams between neighbours
        index = index[inside]
        share = share[inside]
        place = (row * size + column)[inside]
        # 1 / depth is linear in the image, depth is not.
        over = share / far[index]
        distance = 1 / over.sum(axis=1)
        # Sorted by pixel, then from far to near: the last row of each pixel is the nearest triangle.
        last = np.lexsort((-distance, place))
        first_of_pixel = np.r_[np.diff(place[last]) > 0, True] if len(last) else np.zeros(0, bool)
        keep = last[first_of_pixel]
        # An earlier chunk may have found a nearer one.
        keep = keep[distance[keep] < nearest[place[keep]]]
        nearest[place[keep]] = distance[keep]
        owner[place[keep]] = index[keep]
        weights[place[keep]] = over[keep] * distance[keep, None]
    return owner.reshape(size, size), weights.reshape(size, size, 3), nearest.reshape(size, size)


def cross_2d(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the third component of the cross products of [N, 2] and [N, 2]: [N]."""
    return a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]


def picture(head: Head, cam2world: np.ndarray, focal: float, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Render an intact head in colour on white.

    Returns: image [R, R, 3] in 0..1, and distance [R, R] along the unit ray through each pixel's centre (inf
        where it misses the head).
    """
    basis = load_basis()
    # Colours are rendered at twice the resolution and averaged, against jagged edges. Depth is not, since a
    # mean of depths across an edge would lie on no surface.
    fine = 2 * size
    owner, weights, _ = rasterise(head.vertices, basis.triangles, cam2world, focal, fine)
    image = np.ones((fine, fine, 3), np.float32)
    seen = owner >= 0
    corners = basis.triangles[owner[seen]]
    drawn, normals = (
        np.einsum("pcd,pc->pd", values[corners], weights[seen]).astype(np.float32)
        for values in (basis.drawn, head.normals)
    )
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-9)
    image[seen] = surface_colour(head, drawn, normals)
    _, _, along = rasterise(head.vertices, basis.triangles, cam2world, focal, size)
    # From depth along the axis to distance along the ray: a factor of the length of (x, y, 1).
    steps = ((np.arange(size) + 0.5) / size - 0.5) / focal
    slant = np.sqrt(1 + steps[:, None] ** 2 + steps[None] ** 2)
    # [2R, 2R, 3] -> [R, 2, R, 2, 3] -> [R, R, 3]
    return image.reshape(size, 2, size, 2, 3).mean(axis=(1, 3)), along * slant
