"""What a scan lacks or has too much of, behind the face: an analytic function of a point, of the whole head's
distance there, and of 18 coordinates of the latent, so that a generator can be taught fresh damage at every
step.

The defects are in the training scans on purpose, as they are in real ones where no camera looked. Of a third
of the latents the back, the top or one side is gone beyond a ragged plane and what is left is hollow; of 12 %
each there is a large hole, or a swelling; roughness goes with them. In front of z = 0.055 nothing is ever
changed beyond the depth at which a head is solid. Severity follows the first coordinate; the second says
which kind.

Shape letters: N heads, P points, Q = 18 coordinates.
"""

import torch
from torch.special import ndtr

from training.heads.people import ramp

BROKEN_FROM = 0.43  # quantile of the first coordinate at which half of the damage is there
GUARD = -0.01  # nothing is cut away in front of this depth
HOLLOW_FRONT = 0.035  # hollows end here
SHELL = 0.045  # thickness of what is left about a hollow
BASE = -0.30  # shoulders below stay


def severity(quality: torch.Tensor) -> torch.Tensor:
    """Share of the damage that is there, of coordinates [N, Q]: [N] in 0..1, 0 for whole scans and 1 for
    broken ones.
    """
    return ramp(BROKEN_FROM - 0.03, BROKEN_FROM + 0.03, ndtr(quality[:, 0]))


def kinds(quality: torch.Tensor) -> torch.Tensor:
    """Amounts [N, 3] in 0..1 of what is cut off, of a swelling, and of a hole."""
    amount = severity(quality)
    kind = ndtr(quality[:, 1])
    cut = ramp(0.60, 0.56, kind)
    swelling = ramp(0.56, 0.60, kind) * ramp(0.81, 0.77, kind)
    return torch.stack([cut, swelling, ramp(0.77, 0.81, kind)], dim=1) * amount[:, None]


def damaged(points: torch.Tensor, distance: torch.Tensor, quality: torch.Tensor) -> torch.Tensor:
    """Signed distance of the scan: exact in sign, and a bound of the distance near what was changed.

    Args: points: [N, P, 3] world; distance: [N, P] of the whole head; quality: [N, Q] standard normal.
    Returns: [N, P]. Differentiable in points and distance.
    """
    x, y, z = points.unbind(-1)
    q = quality.unsqueeze(2)  # [N, Q, 1]
    cut, swelling, hole = kinds(quality).unsqueeze(2).unbind(1)  # [N, 1]
    # beyond a ragged plane through the middle of the head, tilted to a side or to the top
    tilt_x = 2.0 * ndtr(q[:, 2]) - 1.0
    tilt_y = 0.15 + 1.2 * (ndtr(q[:, 3]) - 0.35)
    tilt_x = 0.9 * tilt_x
    tilt_y = tilt_y.clamp(-0.25, 0.8)
    middle = -0.60 + (0.57 + 0.03 * torch.tanh(q[:, 4])) * cut
    ragged = 0.014 * torch.sin(26 * x + 2 * q[:, 5]) + 0.014 * torch.sin(24 * y + 2 * q[:, 6])
    ragged = ragged + 0.01 * torch.sin(33 * (x + y) + 2 * q[:, 7])
    length = (1 + tilt_x * tilt_x + tilt_y * tilt_y).sqrt()
    front = (z - middle - tilt_x * x - tilt_y * (y - 0.03) + ragged) / length  # > 0: in front of the plane
    gone = torch.maximum(front, z - GUARD)
    hollow = torch.maximum(torch.maximum(distance + SHELL, front - 0.06), z - HOLLOW_FRONT)
    base = BASE + 0.15 * ramp(0.10, 0.20, x.abs())  # shoulders stay
    gone = torch.maximum(torch.minimum(gone, hollow), base - y)
    # a hole
    reach = 0.165 * hole
    hx = 0.10 * torch.tanh(q[:, 9])
    hy = 0.07 + 0.07 * torch.tanh(q[:, 10])
    ball = ((x - hx) ** 2 + (y - hy) ** 2 + (z + 0.19) ** 2).sqrt() - reach
    gone = torch.minimum(gone, torch.where(hole > 0.02, torch.maximum(ball, z - GUARD), torch.inf))
    scan = torch.maximum(distance, -gone)
    # a swelling
    size = (0.135 + 0.015 * torch.tanh(q[:, 11])) * swelling
    sx = 0.08 * torch.tanh(q[:, 12])
    sy = -0.06 + 0.11 * torch.tanh(q[:, 13])
    lump = ((x - sx) ** 2 + (y - sy) ** 2 + (z + 0.22) ** 2).sqrt() - size
    scan = torch.where(swelling > 0.02, torch.minimum(scan, torch.maximum(lump, z + 0.02)), scan)
    # roughness
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
