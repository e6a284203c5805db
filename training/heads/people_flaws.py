"""Simulated scan damage of the fourth edition of the synthetic heads, which depends on who the head is.

About half of the people have a flat back: the back of the head is cut off by a smooth, tilted plane with a
rounded edge. Independently of that, about half have a swelling at the nape: an ellipsoid that is joined to
the neck smoothly. All scans are solid. With hollow scans, the generator learns a second face, because the
inner wall of the face is a face, too, and is visible through the open back.

The leading coordinates of the identity decide whether a person has a flaw: the first and the second one for
the flat back, the third and the fourth one for the swelling. A change of the latent that removes a flaw
therefore changes the person. The coordinates of scan quality only determine the shape of a flaw, such as the
depth and the tilt of the plane. The ground truth of a latent is the head without flaws, as in the third
edition (`people_damage`).

The damage is an analytic function of a point, of the signed distance of the intact head at this point, and of
the latent.

Shapes: N is the number of heads, P of points. All lengths are in world units. Most numbers in this module are
choices of design without a source.
"""

import math

import torch

from training.heads.people import COMPONENTS, HAIR_FIELDS, LATENT, ramp
from training.heads.people_damage import BASE, GUARD

FLAWS = ("flat", "swelling")  # names of the flaws, in the order of `flaw_amounts`
# Unit vector of the two coordinates that decide about a flaw.
DIRECTION = (0.9 / math.hypot(0.9, 0.43), 0.43 / math.hypot(0.9, 0.43))
DECIDING = {"flat": (0, 1), "swelling": (2, 3)}  # indices of these coordinates in the latent
TRANSITION = 0.2  # half of the range of the projection in which the amount of a flaw rises from 0 to 1
LEAST = 0.02  # smallest amount at which a flaw has an effect
ROUND = 0.03  # width of the rounding of edges
QUALITY_START = LATENT - 18  # index of the first coordinate of scan quality
NAMED = QUALITY_START  # number of coordinates that define the ground-truth head

FLAT_Z = -0.07  # z coordinate of the plane in the middle of a flat back
NECK_Y = (-0.08, -0.30)  # y coordinates between which the plane recedes, so that no ledge remains at the neck
NECK_DEPTH = 0.18  # distance by which the plane recedes at the neck
SWELLING_SIZE = (0.115, 0.09, 0.105)  # mean semi-axes of the ellipsoid
SWELLING_CENTRE = (0.0, -0.17, -0.16)  # mean position of its centre
SWELLING_ROUND = 0.06  # width of the rounding where it meets the neck

assert NAMED >= COMPONENTS + HAIR_FIELDS


def flaw_amounts(z: torch.Tensor) -> torch.Tensor:
    """Return the amounts [N, 2] in 0..1 of the flat back and of the swelling, for latents [N, 64].

    Only the coordinates of the ground-truth head are used, so the amounts do not depend on the scan quality.
    They are scaled to a root mean square of 1.
    """
    named = z[:, :NAMED]
    unit_named = named / named.square().mean(dim=1, keepdim=True).sqrt().clamp_min(1e-8)
    return torch.stack(
        [
            ramp(
                -TRANSITION,
                TRANSITION,
                DIRECTION[0] * unit_named[:, DECIDING[name][0]]
                + DIRECTION[1] * unit_named[:, DECIDING[name][1]],
            )
            for name in FLAWS
        ],
        dim=1,
    )


def _rounded_maximum(a: torch.Tensor, b: torch.Tensor, width: float = ROUND) -> torch.Tensor:
    """Return a maximum of a and b whose kink is replaced by a parabola of the given width."""
    overlap = (width - (a - b).abs()).clamp_min(0) / width
    # Where a = b, the result is width / 4 above the maximum.
    return torch.maximum(a, b) + overlap * overlap * (width / 4)


def _cut_distance(points: torch.Tensor, z: torch.Tensor, amount: torch.Tensor) -> torch.Tensor:
    """Return the signed distance [N, P] to the space behind the plane of a flat back, negative behind it.

    Args:
        points: points [N, P, 3].
        z: latents [N, 64].
        amount: amount [N] of the flat back. At 0 the plane lies behind the head.
    """
    point_x, point_y, point_z = points.unbind(-1)
    quality = z[:, QUALITY_START:, None]  # [N, 18, 1]
    s = amount[:, None]
    # z coordinate of the plane: -0.60, behind the head, for the amount 0; about FLAT_Z for 1.
    middle = -0.60 + (0.60 + FLAT_Z) * s + 0.05 * torch.tanh(quality[:, 4]) * s
    # Slopes of the plane towards a side and towards the top
    tilt_x = 0.35 * torch.tanh(quality[:, 2])
    tilt_y = 0.05 + 0.3 * torch.tanh(quality[:, 3])
    length = (1 + tilt_x * tilt_x + tilt_y * tilt_y).sqrt()
    # At the neck the plane recedes behind the surface. A ledge would remain if it ended there.
    neck = NECK_DEPTH * ramp(*NECK_Y, point_y)
    # Divided by the length of the plane's normal, so that it is a distance.
    plane_distance = (point_z - middle - tilt_x * point_x - tilt_y * (point_y - 0.03) + neck) / length
    # The shoulders and the face are not changed. The upper end of the shoulders rises towards the sides.
    shoulder_y = BASE + 0.15 * ramp(0.10, 0.20, point_x.abs())
    return torch.maximum(torch.maximum(plane_distance, point_z - GUARD), shoulder_y - point_y)


def _ellipsoid_distance(points: torch.Tensor, z: torch.Tensor, amount: torch.Tensor) -> torch.Tensor:
    """Return about the signed distance [N, P] to the ellipsoid of a swelling, negative inside.

    The arguments are those of `_cut_distance`. The ellipsoid grows from its centre, which lies in the neck.
    """
    quality = z[:, QUALITY_START:]  # [N, 18]
    # Semi-axes of 0 would give a division by 0 below.
    scale = (1 + 0.1 * torch.tanh(quality[:, 11])) * amount.clamp_min(LEAST)
    centre = torch.stack(
        [
            SWELLING_CENTRE[0] + 0.05 * torch.tanh(quality[:, 12]),
            SWELLING_CENTRE[1] + 0.02 * torch.tanh(quality[:, 13]),
            torch.full_like(scale, SWELLING_CENTRE[2]),
        ],
        dim=1,
    )
    semi_axes = scale[:, None, None] * points.new_tensor(SWELLING_SIZE)  # [N, 1, 3]
    offset = points - centre[:, None]
    # The implicit function |o / r| - 1, divided by the length of its gradient |o / r^2| / |o / r|.
    radius = (offset / semi_axes).norm(dim=2)
    slope = (offset / semi_axes.square()).norm(dim=2).clamp_min(1e-6)  # 0 at the centre
    return radius * (radius - 1) / slope


def flawed_distance(points: torch.Tensor, distance: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Return the signed distance of the damaged scan. Differentiable in points and distance.

    Near the damage, the absolute value of the result only approximates the distance.

    Args:
        points: points [N, P, 3].
        distance: signed distances [N, P] of the intact head, negative inside.
        z: latents [N, 64].
    Returns: signed distances [N, P], negative inside.
    """
    flat, swelling = flaw_amounts(z).unbind(1)
    # max(a, -b) removes the solid b from a.
    cut = _rounded_maximum(distance, -_cut_distance(points, z, flat))
    # Selected instead of blended: without the flaw, the distance is exactly that of the intact head.
    scan_distance = torch.where(flat[:, None] > LEAST, cut, distance)
    # The minimum of two distances is the union, min(a, b) = -max(-a, -b).
    ellipsoid = _ellipsoid_distance(points, z, swelling)
    swollen = -_rounded_maximum(-scan_distance, -ellipsoid, SWELLING_ROUND)
    return torch.where(swelling[:, None] > LEAST, swollen, scan_distance)


def flaw_regions(points: torch.Tensor, distance: torch.Tensor, z: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the points that each flaw could change, if a person had it fully.

    The region of the flat back lies inside the intact head, that of the swelling outside of it, so the two
    are disjoint. They have the shape that the coordinates of scan quality determine, and exist for people
    without the flaw, too. An error can therefore be measured before and after tuning for every latent.

    Args:
        points: points [N, P, 3].
        distance: signed distances [N, P] of the intact head, negative inside.
        z: latents [N, 64].
    Returns: masks [N, P] by the name of the flaw.
    """
    full = torch.ones(len(z), dtype=points.dtype, device=points.device)
    return {
        "flat": (distance < 0) & (_cut_distance(points, z, full) < 0),
        # The rounding adds up to this distance to the ellipsoid where it meets the neck.
        "swelling": (distance >= 0) & (_ellipsoid_distance(points, z, full) < SWELLING_ROUND / 4),
    }
