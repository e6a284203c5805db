"""Signed-distance-like function of the head family: smooth unions and subtractions of ellipsoids, spheres and capsules, whose dimensions
follow from the shape parameters.

The head is mirror-symmetric in x; most parts are therefore evaluated at |x|. World units, y up, z front; the whole bust lies in the cube
[-0.45, 0.45]^3. Not an exact distance: values are exact in sign and within a factor of about 0.5 .. 1.1 of the distance near the
surface, so sphere tracing takes steps of 0.8 times the value.

Shape letters: N heads, P points, S shape parameters.
"""

import functools
from dataclasses import dataclass

import torch

from training.heads.family import SHAPE_COUNT, SHAPE_NAMES

Radii = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # INVERSE radii along x, y, z, each [N, 1]

JAW_Y, BROW_Y, NOSE_TOP, NOSE_LENGTH, NECK_Y = -0.055, 0.050, 0.045, 0.090, -0.25
BOUND_RADIUS = 0.56  # every head lies within this distance of BOUND_CENTRE
BOUND_CENTRE = (0.0, -0.06, 0.0)
FLOOR = -0.43  # the bust is cut off here

_TINY = 1e-12


@dataclass(frozen=True, kw_only=True)
class HeadGeometry:
    """Sizes and places of the parts; every tensor is [N, 1], lengths in world units. Differentiable in the parameters."""

    skull: Radii
    jaw: Radii
    jaw_y: torch.Tensor
    chin_y: torch.Tensor
    chin_z: torch.Tensor
    cheek_x: torch.Tensor
    cheek_radius: torch.Tensor
    brow_z: torch.Tensor
    brow_bend: torch.Tensor  # lowering of the painted eyebrow
    eye_x: torch.Tensor
    eye_y: float = 0.012
    eye_z: torch.Tensor
    eye_radius: torch.Tensor
    socket: Radii
    lid_opening: Radii
    nose_reach: torch.Tensor  # how far the tip lies before the root
    nose_scale: torch.Tensor
    wing: torch.Tensor  # radius of the nostril wings
    wing_z: torch.Tensor
    ear: Radii
    ear_x: torch.Tensor
    neck_radius: torch.Tensor
    upper_lip: Radii
    lower_lip: Radii
    cap: Radii  # hair over the skull
    mane: Radii  # hair behind and beside the face
    mane_y: torch.Tensor
    window: Radii  # the opening for the face


def head_geometry(shape: torch.Tensor) -> HeadGeometry:
    """Dimensions of the heads with parameters shape [N, S], each in [-1, 1]. Differentiable in shape.

    Raises: ValueError when the trailing dimension is not S.
    """
    if shape.ndim != 2 or shape.shape[1] != SHAPE_COUNT:
        raise ValueError(
            f"named_shape: expected shape parameters [N, {SHAPE_COUNT}], got {list(shape.shape)}. "
            "heads.family.SHAPE_NAMES lists them in order."
        )
    s = dict(zip(SHAPE_NAMES, shape.unsqueeze(-1).unbind(1), strict=True))  # each [N, 1], so that it broadcasts against points [N, P]

    def radii(x: float | torch.Tensor, y: float | torch.Tensor, z: float | torch.Tensor) -> Radii:
        rx, ry, rz = (1 / (torch.zeros_like(wide) + r) for r in (x, y, z))
        return rx, ry, rz

    wide, tall, deep = (1 + k * s[name] for k, name in ((0.09, "head_width"), (0.08, "head_height"), (0.08, "head_depth")))
    thick = 0.020 + 0.012 * s["hair_volume"]
    bottom = 0.145 + 0.125 * s["hair_length"]  # depth of the mane's lower end below y = 0
    chin, brow = 0.02 * s["chin"], 0.008 * s["brow"]
    nose, ears = 1 + 0.25 * s["nose_width"], 1 + 0.25 * s["ears"]
    full = 0.0105 + 0.0035 * s["lips"]
    reach = 0.022 * s["nose_length"]
    return HeadGeometry(
        skull=radii(0.145 * wide, 0.160 * tall, 0.178 * deep),
        cap=radii(0.145 * wide + thick, 0.160 * tall + thick, 0.176 * deep + thick),
        mane=radii(0.150 * wide + thick, 0.5 * (0.20 + bottom), 0.110 + thick),
        mane_y=0.5 * (0.06 - bottom),
        window=radii(0.128 * wide, 0.222 * tall, 0.190),
        jaw=radii(0.108 * wide * (1 + 0.16 * s["jaw_width"]), 0.142 + 0.5 * chin, 0.112),
        jaw_y=JAW_Y - 0.4 * chin,
        chin_y=-0.160 - chin,
        chin_z=0.118 + 0.5 * chin,
        cheek_x=0.066 * wide,
        cheek_radius=0.036 + 0.010 * s["cheeks"],
        brow_z=0.142 + brow,
        brow_bend=0.5 * brow,
        eye_x=0.060 * (1 + 0.05 * s["head_width"]) + 0.009 * s["eye_spacing"],
        eye_z=0.121 + 0.010 * s["head_depth"],
        eye_radius=0.0315 * (1 + 0.14 * s["eye_size"]),
        socket=radii(0.040, 0.026, 0.030 + 0.4 * brow),
        lid_opening=radii(0.033, 0.0185 * (1 + 0.25 * s["eye_size"]), 0.035),
        nose_reach=0.052 + reach,
        nose_scale=nose,
        wing=0.0125 * nose,
        wing_z=0.160 + 0.5 * reach,
        ear=radii(0.013, 0.048 * ears, 0.030 * ears),
        ear_x=0.138 * wide - 0.0025,
        neck_radius=0.074 * (1 + 0.16 * s["neck_width"]),
        upper_lip=radii(0.043, full, 0.017),
        lower_lip=radii(0.038, 1.2 * full, 0.018),
    )


@dataclass(frozen=True, kw_only=True)
class HeadParts:
    """Signed distance of each coloured part, all [N, P]; the head is their union."""

    skin: torch.Tensor  # face, ears, nose, neck
    eyes: torch.Tensor  # the two eyeballs
    lips: torch.Tensor
    hair: torch.Tensor
    shirt: torch.Tensor

    def union(self) -> torch.Tensor:
        """[N, P] signed distance of the whole bust."""
        return functools.reduce(torch.minimum, (self.skin, self.eyes, self.lips, self.hair, self.shirt))


def _norm(x, y, z) -> torch.Tensor:
    return torch.addcmul(torch.addcmul(x * x + _TINY, y, y), z, z).sqrt()


def _ellipsoid(x, y, z, inverse: Radii) -> torch.Tensor:
    """|q| (|q| - 1) / |q / r| with q = p / r: a first-order distance to the ellipsoid with radii r (Quilez, "ellipsoid SDF")."""
    x, y, z = x * inverse[0], y * inverse[1], z * inverse[2]
    k0 = _norm(x, y, z)
    return k0 * (k0 - 1) / _norm(x * inverse[0], y * inverse[1], z * inverse[2])


def _union(a, b, k: float) -> torch.Tensor:
    """Polynomial smooth minimum with blending width k (Quilez)."""
    h = (k - (a - b).abs()).clamp_min(0)
    return torch.addcmul(torch.minimum(a, b), h, h, value=-0.25 / k)


def _intersection(a, b, k: float) -> torch.Tensor:
    h = (k - (a - b).abs()).clamp_min(0)
    return torch.addcmul(torch.maximum(a, b), h, h, value=0.25 / k)


def _skin(x, ax, y, z, g: HeadGeometry) -> torch.Tensor:
    d = _ellipsoid(x, y - 0.065, z + 0.025, g.skull)
    d = _union(d, _ellipsoid(x, y - g.jaw_y, z - 0.048, g.jaw), 0.07)
    d = _union(d, _norm(x, y - g.chin_y, z - g.chin_z) - 0.030, 0.06)
    d = _union(d, _norm(ax - g.cheek_x, y + 0.042, z - 0.102) - g.cheek_radius, 0.04)
    along = (ax * (1 / 0.085)).clamp(0, 1)  # brow ridge: a capsule from the middle outwards
    d = _union(d, _norm(ax - 0.085 * along, y - BROW_Y + 0.012 * along, z - g.brow_z + 0.034 * along) - 0.017, 0.03)
    ex, ey, ez = ax - g.eye_x, y - g.eye_y, z - g.eye_z
    d = _intersection(d, -_ellipsoid(ex, ey, ez - 0.042, g.socket), 0.03)
    lid = _intersection(_norm(ex, ey, ez) - g.eye_radius - 0.004, -_ellipsoid(ex, ey, ez - 0.03, g.lid_opening), 0.004)
    d = _union(d, lid, 0.012)
    along = ((NOSE_TOP - y) * (1 / NOSE_LENGTH)).clamp(0, 1)  # nose: a cone from the root to the tip
    bridge = _norm(x, y - NOSE_TOP + NOSE_LENGTH * along, z - 0.138 - g.nose_reach * along)
    d = _union(d, bridge - (0.0125 + 0.0115 * along) * g.nose_scale, 0.022)
    d = _union(d, _norm(ax - 1.5 * g.wing, y + 0.050, z - g.wing_z) - g.wing, 0.015)
    d = _union(d, _ellipsoid(ax - g.ear_x + 0.25 * z, y + 0.005, z + 0.022, g.ear), 0.012)
    below = y - NECK_Y
    return _union(d, _norm(x, 0.35 * below, z + 0.030 + 0.15 * below) - g.neck_radius, 0.035)


def _hair(x, y, z, g: HeadGeometry) -> torch.Tensor:
    hair = _union(_ellipsoid(x, y - 0.070, z + 0.032, g.cap), _ellipsoid(x, y - g.mane_y, z + 0.062, g.mane), 0.05)
    hair = _intersection(hair, -_ellipsoid(x, y + 0.105, z - 0.160, g.window), 0.02)
    behind = z + 0.006 - 0.30 * y - 0.5 * (y - 0.05).clamp_min(0)  # below the temples the hair stays behind the ears
    return _intersection(hair, torch.minimum(behind, 0.6 * (0.045 - y)), 0.02)


def head_parts(points: torch.Tensor, shape: torch.Tensor) -> HeadParts:
    """Signed distances of the parts; see `head_sdf` for the arguments."""
    if points.ndim != 3 or points.shape[-1] != 3 or len(points) != len(shape):
        raise ValueError(f"head_parts: expected points [N, P, 3] and shape [N, S], got {list(points.shape)} and {list(shape.shape)}.")
    x, y, z = points.unbind(-1)
    return parts_at(x, y, z, head_geometry(shape))


def parts_at(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor, g: HeadGeometry) -> HeadParts:
    """`head_parts` for separate coordinates, each [N, P], and prepared dimensions: what the renderer's inner loop calls."""
    ax = torch.sqrt(x * x + 1e-8)  # |x|, smooth at the plane of symmetry
    cut, square = FLOOR - y, ax * ax
    bend, front = y + 0.108 - 2.1 * square, z - 0.146 + 7.0 * square  # of the lips
    torso = _norm(x * (1 / 0.36), (y + 0.445) * (1 / 0.165), (z + 0.035) * (1 / 0.135)) - 1
    return HeadParts(
        skin=torch.maximum(_skin(x, ax, y, z, g), cut),
        eyes=_norm(ax - g.eye_x, y - g.eye_y, z - g.eye_z) - g.eye_radius,
        lips=torch.minimum(_ellipsoid(ax, bend - 0.0075, front, g.upper_lip), _ellipsoid(ax, bend + 0.0095, front, g.lower_lip)),
        hair=_hair(x, y, z, g),
        shirt=torch.maximum(0.135 * torso, cut),
    )


def head_sdf(points: torch.Tensor, shape: torch.Tensor) -> torch.Tensor:
    """Signed-distance-like values of heads: negative inside, positive outside, zero on the surface.

    Args: points: [N, P, 3] world coordinates; shape: [N, S] shape parameters, each in [-1, 1] (`family.SHAPE_NAMES`).
    Returns: [N, P] in world units. Differentiable in points and shape (almost everywhere: parts meet in min and max).
    Raises: ValueError on wrong shapes.
    """
    return head_parts(points, shape).union()
