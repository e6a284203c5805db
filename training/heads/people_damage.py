"""Simulated scan damage at the back of synthetic heads.

The damage is an analytic function of a point, of the signed distance of the intact head at this point, and of
the 18 coordinates of scan quality of a latent. The training of a generator can therefore sample new damaged
heads at every step.

We add the defects to the training scans deliberately, because real scans have defects where no camera
recorded the surface. In a third of the latents, the back, the top or one side of the head is cut off at a
ragged plane, and the remaining head is hollow. In 12 % there is a large hole, in another 12 % a swelling. In
all of these cases the surface can be rough. In front of z = 0.055 the solid head is not changed. The first
coordinate determines the severity of the damage, the second its kind, and the others determine its shape.

Shapes: N is the number of heads, P of points, Q = 18 of coordinates.
"""

import torch
from torch.special import ndtr

from training.heads.people import ramp

# Lengths and coordinates are in world units. Most numbers in this module are choices of design without
# a source.
DAMAGED_FROM = 0.43  # quantile of the first coordinate at which the severity is 1/2
GUARD = -0.01  # z coordinate; nothing is cut off in front of it
HOLLOW_FRONT = 0.035  # z coordinate at which hollows end
SHELL = 0.045  # thickness of the shell around a hollow
BASE = -0.30  # y coordinate; the shoulders below it are not damaged


def severity(quality: torch.Tensor) -> torch.Tensor:
    """Return the severity [N] of the damage for coordinates of scan quality [N, Q].

    The severity is 0 for an intact scan and 1 for a fully damaged scan.
    """
    # ndtr, the normal distribution function, maps a standard normal coordinate to its quantile. The ramp is
    # narrow, so that most scans have a severity of 0 or 1.
    return ramp(DAMAGED_FROM - 0.03, DAMAGED_FROM + 0.03, ndtr(quality[:, 0]))


def kinds(quality: torch.Tensor) -> torch.Tensor:
    """Return the amounts of the three kinds of damage, for coordinates of scan quality [N, Q].

    Returns: amounts [N, 3] in 0..1 of a cut, a swelling and a hole.
    """
    # Quantiles of the second coordinate up to 0.58 are cuts, up to 0.79 swellings, and above holes.
    # Neighbouring kinds overlap by 0.04, so that the damage is continuous in the latent.
    quantile = ndtr(quality[:, 1])
    cut_amount = ramp(0.60, 0.56, quantile)
    swelling_amount = ramp(0.56, 0.60, quantile) * ramp(0.81, 0.77, quantile)
    hole_amount = ramp(0.77, 0.81, quantile)
    return torch.stack([cut_amount, swelling_amount, hole_amount], dim=1) * severity(quality)[:, None]


def damaged_distance(points: torch.Tensor, distance: torch.Tensor, quality: torch.Tensor) -> torch.Tensor:
    """Return the signed distance of the damaged scan. Differentiable in points and distance.

    The sign of the result is exact. Near the damage, its absolute value only approximates the distance.

    Args:
        points: points [N, P, 3], world units.
        distance: signed distances [N, P] of the intact head, negative inside.
        quality: coordinates of scan quality [N, Q], standard normal.
    Returns: signed distances [N, P], world units, negative inside.
    """
    # Solids are combined by their signed distances: the maximum of two is their intersection, the minimum is
    # their union, and max(a, -b) removes the solid b from a.
    x, y, z = points.unbind(-1)
    q = quality.unsqueeze(2)  # [N, Q, 1]
    cut_amount, swelling_amount, hole_amount = kinds(quality).unsqueeze(2).unbind(1)  # [N, 1]
    # The cut removes the space behind a ragged plane through the middle of the head. tilt_x and tilt_y are
    # the slopes of the plane towards a side and towards the top.
    tilt_x = 2.0 * ndtr(q[:, 2]) - 1.0
    tilt_y = 0.15 + 1.2 * (ndtr(q[:, 3]) - 0.35)
    tilt_x = 0.9 * tilt_x
    tilt_y = tilt_y.clamp(-0.25, 0.8)
    # For cut_amount = 0, the plane lies at z = -0.6, behind the head.
    plane_z = -0.60 + (0.57 + 0.03 * torch.tanh(q[:, 4])) * cut_amount
    ripple = 0.014 * torch.sin(26 * x + 2 * q[:, 5]) + 0.014 * torch.sin(24 * y + 2 * q[:, 6])
    ripple = ripple + 0.01 * torch.sin(33 * (x + y) + 2 * q[:, 7])
    normal_length = (1 + tilt_x * tilt_x + tilt_y * tilt_y).sqrt()
    # Signed distance to the plane, positive in front of it.
    plane_distance = (z - plane_z - tilt_x * x - tilt_y * (y - 0.03) + ripple) / normal_length
    removed_distance = torch.maximum(plane_distance, z - GUARD)
    # The hollow is the space that lies deeper in the head than the shell, near the plane, and not in
    # the face.
    hollow_distance = torch.maximum(torch.maximum(distance + SHELL, plane_distance - 0.06), z - HOLLOW_FRONT)
    # The shoulders are not damaged. Their upper end rises towards the sides.
    shoulder_y = BASE + 0.15 * ramp(0.10, 0.20, x.abs())
    removed_distance = torch.maximum(torch.minimum(removed_distance, hollow_distance), shoulder_y - y)
    # The hole is a ball at the back of the head.
    hole_radius = 0.165 * hole_amount
    hole_x = 0.10 * torch.tanh(q[:, 9])
    hole_y = 0.07 + 0.07 * torch.tanh(q[:, 10])
    hole_distance = ((x - hole_x) ** 2 + (y - hole_y) ** 2 + (z + 0.19) ** 2).sqrt() - hole_radius
    # A ball of radius 0 would still remove its centre, so very small amounts are ignored.
    removed_ball_distance = torch.where(
        hole_amount > 0.02, torch.maximum(hole_distance, z - GUARD), torch.inf
    )
    removed_distance = torch.minimum(removed_distance, removed_ball_distance)
    scan_distance = torch.maximum(distance, -removed_distance)
    # The swelling is a ball that is added at the nape of the neck.
    swelling_radius = (0.135 + 0.015 * torch.tanh(q[:, 11])) * swelling_amount
    swelling_x = 0.08 * torch.tanh(q[:, 12])
    swelling_y = -0.06 + 0.11 * torch.tanh(q[:, 13])
    squared_offset = (x - swelling_x) ** 2 + (y - swelling_y) ** 2 + (z + 0.22) ** 2
    swelling_distance = squared_offset.sqrt() - swelling_radius
    swollen_distance = torch.minimum(scan_distance, torch.maximum(swelling_distance, z + 0.02))
    scan_distance = torch.where(swelling_amount > 0.02, swollen_distance, scan_distance)
    # The roughness is a wave on the surface at the back of the head. It is stronger for severe damage.
    wave_amplitude = (
        0.009
        * ramp(0.35, 0.9, ndtr(0.8 * q[:, 0] + 0.6 * q[:, 14]))
        * ramp(-0.02, -0.08, z)
        * ramp(-0.36, -0.30, y)
    )
    wave = torch.sin(42 * x + q[:, 15]) * torch.sin(40 * y + q[:, 16]) + 0.6 * torch.sin(
        47 * z + 20 * x + q[:, 17]
    )
    return scan_distance - wave_amplitude * wave
