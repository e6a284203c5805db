"""Simulated scan damage at the back of heads, as a function of points, distances and 18 coordinates of the
latent.

The damage is an analytic function of a point, of the intact head's signed distance there, and of the scan
quality coordinates. A generator's training can therefore sample new damaged heads at every step.

We add the defects to the training scans deliberately. Real scans have them where no camera looked. In a third
of the latents the back, the top or one side is cut away beyond a ragged plane, and what remains is hollow. In
12 % there is a large hole, in another 12 % a swelling. Rough surfaces come with all of them. In front of z =
0.055 nothing changes within the depth at which a head is solid. The first coordinate gives the severity, the
second the kind.

Shape letters: N heads, P points, Q = 18 coordinates.
"""

import torch
from torch.special import ndtr

from training.heads.people import ramp

# Lengths are in world units.
DAMAGED_FROM = 0.43  # quantile of the first coordinate at which half of the damage is present
GUARD = -0.01  # z; nothing is cut away in front of it
HOLLOW_FRONT = 0.035  # z; hollows end here
SHELL = 0.045  # thickness of the remaining shell about a hollow
BASE = -0.30  # y; the shoulders below remain


def severity(quality: torch.Tensor) -> torch.Tensor:
    """Return the severity [N] in 0..1 of the damage, for coordinates [N, Q]. 0: intact, 1: fully damaged."""
    # ndtr maps the standard normal coordinate to its quantile. The ramp is narrow, so most scans are 0 or 1.
    return ramp(DAMAGED_FROM - 0.03, DAMAGED_FROM + 0.03, ndtr(quality[:, 0]))


def kinds(quality: torch.Tensor) -> torch.Tensor:
    """Return amounts [N, 3] in 0..1 of a cut, a swelling and a hole, for coordinates [N, Q]."""
    amount = severity(quality)
    # Quantiles 0 to 0.58 are cuts, to 0.79 swellings, the rest holes. Neighbouring kinds blend over 0.04, so
    # that the family is continuous in the latent.
    kind = ndtr(quality[:, 1])
    cut = ramp(0.60, 0.56, kind)
    swelling = ramp(0.56, 0.60, kind) * ramp(0.81, 0.77, kind)
    return torch.stack([cut, swelling, ramp(0.77, 0.81, kind)], dim=1) * amount[:, None]


def damaged(points: torch.Tensor, distance: torch.Tensor, quality: torch.Tensor) -> torch.Tensor:
    """Return the signed distance of the damaged scan.

    Its sign is exact. Near changed places its value is a bound of the distance.

    Args:
        points: [N, P, 3], world units.
        distance: [N, P] of the intact head, negative inside.
        quality: [N, Q] standard normal.
    Returns: [N, P]. Differentiable in points and distance.
    """
    # Solids are combined by their signed distances: maximum is the intersection, minimum the union, and
    # max(a, -b) removes b from a.
    x, y, z = points.unbind(-1)
    q = quality.unsqueeze(2)  # [N, Q, 1]
    cut, swelling, hole = kinds(quality).unsqueeze(2).unbind(1)  # [N, 1]
    # The cut: everything beyond a ragged plane through the
    # middle of the head, tilted to a side or to the top.
    tilt_x = 2.0 * ndtr(q[:, 2]) - 1.0
    tilt_y = 0.15 + 1.2 * (ndtr(q[:, 3]) - 0.35)
    tilt_x = 0.9 * tilt_x
    tilt_y = tilt_y.clamp(-0.25, 0.8)
    # Without a cut the plane lies at z = -0.6, behind the head.
    middle = -0.60 + (0.57 + 0.03 * torch.tanh(q[:, 4])) * cut
    ragged = 0.014 * torch.sin(26 * x + 2 * q[:, 5]) + 0.014 * torch.sin(24 * y + 2 * q[:, 6])
    ragged = ragged + 0.01 * torch.sin(33 * (x + y) + 2 * q[:, 7])
    length = (1 + tilt_x * tilt_x + tilt_y * tilt_y).sqrt()
    front = (z - middle - tilt_x * x - tilt_y * (y - 0.03) + ragged) / length  # > 0: in front of the plane
    removed = torch.maximum(front, z - GUARD)
    # The hollow: what lies deeper than the shell, near the plane, and not in the face.
    hollow = torch.maximum(torch.maximum(distance + SHELL, front - 0.06), z - HOLLOW_FRONT)
    base = BASE + 0.15 * ramp(0.10, 0.20, x.abs())  # the shoulders remain, and rise to the sides
    removed = torch.maximum(torch.minimum(removed, hollow), base - y)
    # The hole: a ball at the back.
    reach = 0.165 * hole
    hx = 0.10 * torch.tanh(q[:, 9])
    hy = 0.07 + 0.07 * torch.tanh(q[:, 10])
    ball = ((x - hx) ** 2 + (y - hy) ** 2 + (z + 0.19) ** 2).sqrt() - reach
    # A ball of radius 0 would still remove its centre, so tiny amounts count as none.
    removed = torch.minimum(removed, torch.where(hole > 0.02, torch.maximum(ball, z - GUARD), torch.inf))
    scan = torch.maximum(distance, -removed)
    # The swelling: a ball at the nape that is added.
    size = (0.135 + 0.015 * torch.tanh(q[:, 11])) * swelling
    sx = 0.08 * torch.tanh(q[:, 12])
    sy = -0.06 + 0.11 * torch.tanh(q[:, 13])
    lump = ((x - sx) ** 2 + (y - sy) ** 2 + (z + 0.22) ** 2).sqrt() - size
    scan = torch.where(swelling > 0.02, torch.minimum(scan, torch.maximum(lump, z + 0.02)), scan)
    # The roughness: waves on the surface at the back, stronger for severe damage.
    rough = (
        0.009
        * ramp(0.35, 0.9, ndtr(0.8 * q[:, 0] + 0.6 * q[:, 14]))
        * ramp(-0.02, -0.08, z)
        * ramp(-0.36, -0.30, y)
    )
    wave = torch.sin(42 * x + q[:, 15]) * torch.sin(40 * y + q[:, 16]) + 0.6 * torch.sin(
        47 * z + 20 * x + q[:, 17]
    )
    return scan - rough * wave
