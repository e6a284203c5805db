"""Heads of people: the family `synthetic:people64`, each head a scan of mixed quality that a latent names.

A latent of 64 coordinates, scaled to unit root mean square as a mapping network scales it, is 36 components
of identity, 4 of hair, 6 of appearance and 18 of scan quality. The first 40 give a mesh by a linear basis
(builders/people_basis.py makes it once from MakeHuman's data), the next 6 its colours; the last 18 say
what the scan is missing or has too much of, see `training.heads.people_damage`: the *whole* head is what the
first 46 name. World axes: x right, y up, z to the camera, in the cube of side 1.

Shape letters: N heads, V vertices, T triangles, K components, H hair fields, P points, M masks.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from scipy.special import ndtr

from training import storage

KIND = "people-basis"
VERSION = 1
COMPONENTS = 36
HAIR_FIELDS = 4
APPEARANCE = 6
QUALITY = 18
SHAPE = COMPONENTS + HAIR_FIELDS  # coordinates of a head's shape
LATENT = COMPONENTS + HAIR_FIELDS + APPEARANCE + QUALITY
UNIT = 1.15  # lengths below are of a head that is 0.4 high; ours are so much larger
EYE = (0.0512, 0.005)  # the mean head's eyes: distance from the middle, height
ASSET = storage.ASSETS / "people-basis.safetensors"
LIGHT = np.array([0.30, 0.50, 0.81], np.float32) / np.linalg.norm([0.30, 0.50, 0.81])

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

# raw density of the surface, and its bounds
LEVEL = 10.0
INSIDE = 60.0
OUTSIDE = -10.0

Numbers = TypeVar("Numbers", np.ndarray, torch.Tensor)


@dataclass(frozen=True, kw_only=True)
class Basis:
    """The linear basis, as arrays."""

    mean: np.ndarray  # [V, 3] float32, world units
    components: np.ndarray  # [K, V, 3], one standard deviation each
    hair: np.ndarray  # [H, V, 3], at full amount
    triangles: np.ndarray  # [T, 3] int64
    masks: dict[str, np.ndarray]  # each [V] in 0..1
    sky: np.ndarray  # [V], share of the hemisphere that is open
    meta: dict

    @functools.cached_property
    def drawn(self) -> np.ndarray:
        """What colours are made of, of each vertex [V, 8]: the mean head's place, lips, scalp, eyes, long
        hair, sky.
        """
        long = np.linalg.norm(self.hair[2], axis=1)
        eyes = self.masks["eyes"]
        # the eyeball under the lids takes their colour: they are thin
        bare = eyes * ramp(0.05, 0.3, self.sky)
        x, y, z = (self.mean / UNIT).T
        # not seen, but near: insides of lids
        about = (np.hypot(np.abs(x) - EYE[0], y - EYE[1]) < 0.036) & (z > 0.05)
        sky = np.where(about, np.maximum(self.sky, 0.7), self.sky)
        columns = [self.masks["lips"], self.masks["scalp"], bare, long / long.max(), sky]
        return np.concatenate([self.mean, np.stack(columns, axis=1)], axis=1).astype(np.float32)


@functools.cache
def load_basis(path: Path = ASSET) -> Basis:
    """Read the basis. Raises: ValueError for a file that is missing, damaged or of another version."""
    try:
        tensors, meta = storage.read_tensors(path, KIND)
        if meta.get("version") != VERSION:
            raise ValueError(
                f"{path}: expected a basis of heads of version {VERSION}, got {meta.get('version')}."
                " Restore it."
            )
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"{error} Or make it again: python -m builders.build people.") from None
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


# What a latent names


def scaled(z: torch.Tensor | np.ndarray) -> np.ndarray:
    """Latents [N, 64] at unit root mean square, float64.

    Raises: ValueError for another number of coordinates.
    """
    z = z.detach().cpu().numpy() if isinstance(z, torch.Tensor) else np.asarray(z)
    if z.ndim != 2 or z.shape[1] != LATENT:
        raise ValueError(
            f"heads of people: expected latents [N, {LATENT}], got {list(z.shape)}. Use a generator of"
            " synthetic:people64."
        )
    z = z.astype(np.float64)
    return z / np.sqrt((z * z).mean(axis=1, keepdims=True) + 1e-8)


def _split(z: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    ends = np.cumsum([COMPONENTS, HAIR_FIELDS, APPEARANCE])
    identity, hair, appearance, quality = np.split(z, ends, axis=1)
    return identity, hair, appearance, quality


def ramp(low: float, high: float, x: Numbers) -> Numbers:
    """0 at `low` and before, 1 at `high` and beyond, smooth between; `low` may be the larger one."""
    t = ((x - low) / (high - low)).clip(0, 1)
    return t * t * (3 - 2 * t)


def density_of(distance: torch.Tensor, edge: float) -> torch.Tensor:
    """Raw density of signed distances [...], world units; `edge` is the depth at which it is full. The
    surface is `LEVEL` for any edge.
    """
    return (LEVEL - distance * ((INSIDE - LEVEL) / edge)).clamp(OUTSIDE, INSIDE)


def hair_amounts(hair: np.ndarray) -> np.ndarray:
    """Amounts [N, H] in 0..1 of volume, top, long and bun, of coordinates [N, H]."""
    share = ndtr(hair)
    return np.stack(
        [share[:, 0], share[:, 1] ** 2, ramp(0.45, 0.8, share[:, 2]), ramp(0.72, 0.9, share[:, 3])], axis=1
    )


@dataclass(frozen=True, kw_only=True)
class Head:
    """A head that a latent names."""

    vertices: np.ndarray  # [V, 3] float32, world units
    normals: np.ndarray  # [V, 3] unit
    long: float  # amount of long hair
    appearance: np.ndarray  # [6]
    quality: np.ndarray  # [18]


def vertex_normals(vertices: np.ndarray, triangles: np.ndarray) -> np.ndarray:
    """Unit normals [V, 3], weighted by area."""
    a, b, c = (vertices[triangles[:, i]] for i in range(3))
    face = np.cross(b - a, c - a)
    normals = np.zeros_like(vertices)
    for axis in range(3):
        for corner in range(3):
            normals[:, axis] += np.bincount(triangles[:, corner], face[:, axis], len(vertices))
    return normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-12)


def named_people(z: torch.Tensor | np.ndarray, basis: Basis | None = None) -> list[Head]:
    """The heads that latents [N, 64] name."""
    basis = basis or load_basis()
    identity, hair, appearance, quality = _split(scaled(z))
    amounts = hair_amounts(hair)
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


# the rounded cylinder that closes a bust
BUST_RADIUS = 0.44
BUST_FLOOR = -0.46
BUST_ROUND = 0.04


def bust_end(points: np.ndarray) -> np.ndarray:
    """Signed distance [...] of points [..., 3] to the rounded cylinder about the y axis that closes every
    bust below.
    """
    x, y, z = np.moveaxis(points, -1, 0)
    out = np.hypot(x, z) - BUST_RADIUS + BUST_ROUND
    below = BUST_FLOOR + BUST_ROUND - y
    return (
        np.hypot(np.maximum(out, 0), np.maximum(below, 0))
        + np.minimum(np.maximum(out, below), 0)
        - BUST_ROUND
    )


# Colours


def _palette(colours: np.ndarray, coordinate: float) -> np.ndarray:
    at = ndtr(coordinate) * (len(colours) - 1)
    return np.array([np.interp(at, np.arange(len(colours)), column) for column in colours.T], np.float32)


def _mix(base: np.ndarray, colour: np.ndarray | float, weight: np.ndarray) -> np.ndarray:
    return base + (colour - base) * weight[:, None]


def surface_colour(head: Head, drawn: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """Shaded colours [P, 3] in 0..1 of places on the surface; no term depends on the view.

    Args: drawn: [P, 8], `Basis.drawn` interpolated there; normals: [P, 3] unit.
    """
    place = drawn[:, :3] / UNIT
    lips, scalp, eyes, long, sky = drawn[:, 3:].T
    a = head.appearance
    skin, hair, iris, shirt = (
        _palette(p, c) for p, c in ((_SKIN, a[0]), (_HAIR, a[1]), (_IRIS, a[2]), (_SHIRT, a[3]))
    )
    x = np.abs(place[:, 0])
    y = place[:, 1] - EYE[1]
    z = place[:, 2]
    albedo = np.broadcast_to(skin, (len(place), 3))
    blush = np.exp(-(((x - 0.068) / 0.035) ** 2 + ((y + 0.055) / 0.03) ** 2)) * (z > 0.03)
    albedo = _mix(albedo, skin * np.array([1.0, 0.72, 0.68]), 0.5 * blush)
    lip = skin * np.array([0.86, 0.50, 0.50]) * (1 - 0.15 * ndtr(a[4]))
    albedo = _mix(albedo, lip, ramp(0.25, 0.6, lips))
    across = (x - EYE[0] - 0.002) / 0.05
    arch = np.abs(y - (0.044 - 0.013 * across * across))
    brow = ramp(0.0095, 0.005, arch) * ramp(0.8, 0.6, np.abs(across)) * (z > 0.04)
    albedo = _mix(albedo, 0.8 * hair, (0.55 + 0.4 * ndtr(a[5])) * brow)
    cap = np.maximum(ramp(0.35, 0.65, scalp), head.long * ramp(0.1, 0.3, long))
    albedo = _mix(albedo, hair, cap)
    albedo = _mix(albedo, shirt, ramp(-0.305, -0.32, y) * (1 - cap))
    rho = np.hypot(x - EYE[0], y)
    ball = np.full_like(albedo, 0.90)
    ball = _mix(ball, 0.35 * iris, ramp(0.0145, 0.0130, rho))
    ball = _mix(ball, iris, ramp(0.0125, 0.0110, rho))
    ball = _mix(ball, 0.02, ramp(0.0072, 0.0058, rho))
    albedo = _mix(albedo, ball, ramp(0.4, 0.6, eyes))
    lambert = np.clip(normals @ LIGHT * 0.65 + 0.35, 0, None)
    shading = 0.5 * (0.2 + 0.8 * sky) * (0.85 + 0.15 * normals[:, 1]) + 0.68 * lambert * (0.5 + 0.5 * sky)
    return np.clip(albedo * shading[:, None], 0, 1).astype(np.float32)


# Pictures of meshes


def rasterise(
    vertices: np.ndarray, triangles: np.ndarray, cam2world: np.ndarray, focal: float, size: int
) -> tuple[np.ndarray, ...]:
    """Nearest triangle of every pixel of a pinhole camera (OpenCV axes): index [R, R] (-1: none), weights of
    its corners [R, R, 3], and depth along the axis [R, R] (inf: none). The weights are perspective-correct.
    """
    local = (vertices - cam2world[:3, 3]) @ cam2world[:3, :3]
    depth = local[:, 2]
    pixel = (local[:, :2] / depth[:, None] * focal + 0.5) * size - 0.5
    # [T, 3, 2], [T, 3]
    corner = pixel[triangles]
    far = depth[triangles]
    low = np.clip(np.ceil(corner.min(axis=1)).astype(int), 0, size)
    high = np.clip(np.floor(corner.max(axis=1)).astype(int) + 1, 0, size)
    extent = np.clip(high - low, 0, None)
    nearest = np.full(size * size, np.inf)
    owner = np.full(size * size, -1)
    weights = np.zeros((size * size, 3))
    count = extent.prod(axis=1)
    order = np.argsort(count, kind="stable")
    order = order[count[order] > 0]
    for chunk in np.array_split(order, max(1, int(count.sum() // 400_000))):
        index = np.repeat(chunk, count[chunk])
        within = np.arange(len(index)) - np.repeat(np.cumsum(count[chunk]) - count[chunk], count[chunk])
        column = low[index, 0] + within % extent[index, 0]
        row = low[index, 1] + within // extent[index, 0]
        a, b, c = (corner[index, i] for i in range(3))
        p = np.stack([column, row], axis=1)
        area = cross_2d(b - a, c - a)
        area = np.where(np.abs(area) < 1e-12, np.inf, area)
        share = (
            np.stack([cross_2d(c - b, p - b), cross_2d(a - c, p - c), cross_2d(b - a, p - a)], axis=1)
            / area[:, None]
        )
        inside = (share >= -1e-9).all(axis=1)
        index = index[inside]
        share = share[inside]
        place = (row * size + column)[inside]
        over = share / far[index]
        distance = 1 / over.sum(axis=1)
        last = np.lexsort((-distance, place))  # the nearest of each pixel comes last, and stays
        first_of_pixel = np.r_[np.diff(place[last]) > 0, True] if len(last) else np.zeros(0, bool)
        keep = last[first_of_pixel]
        keep = keep[distance[keep] < nearest[place[keep]]]
        nearest[place[keep]] = distance[keep]
        owner[place[keep]] = index[keep]
        weights[place[keep]] = over[keep] * distance[keep, None]
    return owner.reshape(size, size), weights.reshape(size, size, 3), nearest.reshape(size, size)


def cross_2d(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the third component of the cross products of [N, 2] and [N, 2]: [N]."""
    return a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]


def picture(head: Head, cam2world: np.ndarray, focal: float, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The whole head in colour on white, [R, R, 3] in 0..1, and the distance [R, R] along the unit ray
    through each pixel's centre (inf where it misses).
    """
    basis = load_basis()
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
    steps = ((np.arange(size) + 0.5) / size - 0.5) / focal
    slant = np.sqrt(1 + steps[:, None] ** 2 + steps[None] ** 2)
    return image.reshape(size, 2, size, 2, 3).mean(axis=(1, 3)), along * slant
