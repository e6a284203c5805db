"""The density and colour that a generator of heads is taught directly, at points and without rendering (the field start).

    raw density = clamp(LEVEL - slope * sdf, OUTSIDE, INSIDE),  slope = (INSIDE - LEVEL) / edge

so that the level set of the target is the head's surface whatever the edge. Colour is the shaded one of the rendered images, near the
surface. Shape letters: N heads, P points, K of them near the surface, S shape and A appearance parameters.
"""

from dataclasses import dataclass

import torch

from training.heads.family import APPEARANCE_NAMES
from training.heads.render import shade, union_field
from training.heads.sdf import head_geometry

LEVEL, INSIDE, OUTSIDE = 10.0, 60.0, -10.0  # raw density of the surface, and its bounds
FACE = ((-0.11, 0.11), (-0.15, 0.06), (0.08, 0.24))  # world box (x, y, z) that holds eyes, nose and mouth
OUTER = 0.12  # world units beyond the cube in which points are taught to be empty, too: there a tri-plane decoder reads zeros


@dataclass(frozen=True)
class FieldPoints:
    """What a generator is asked for, and what it should say."""

    points: torch.Tensor  # [N, P, 3] world; the first K are near the surface
    density: torch.Tensor  # [N, P] raw
    colour: torch.Tensor  # [N, K, 3] in 0..1


def density_of(sdf: torch.Tensor, edge: float) -> torch.Tensor:
    """Raw density of signed distances [...], world units; `edge` is the depth at which it is full."""
    return (LEVEL - sdf * ((INSIDE - LEVEL) / edge)).clamp(OUTSIDE, INSIDE)


@torch.no_grad()
def draw_points(shape: torch.Tensor, appearance: torch.Tensor, edge: float, near: int, anywhere: int, side: float = 1.0) -> FieldPoints:
    """Points of heads and the truth there, from torch's global generator.

    Args:
        shape: [N, S]; appearance: [N, A]; edge: world units; side: of the generator's cube, world units.
        near: K, half of them about the face, taken as the third of the candidates that is nearest to the surface; anywhere: the others,
            even over the cube and a margin around it.
    """
    n, device = len(shape), shape.device
    g = head_geometry(shape)
    field = union_field(g)
    low, high = torch.tensor(FACE, device=device).T
    face = low + torch.rand(n, 3 * (near // 2), 3, device=device) * (high - low)
    body = (torch.rand(n, 3 * (near - near // 2), 3, device=device) - 0.5) * side
    chosen, sdfs = [], []
    for candidates in (face, body):
        sdf = field(*(x.contiguous() for x in candidates.unbind(-1)))
        nearest = sdf.abs().topk(candidates.shape[1] // 3, dim=1, largest=False, sorted=False).indices
        chosen.append(candidates.gather(1, nearest.unsqueeze(-1).expand(-1, -1, 3)))
        sdfs.append(sdf.gather(1, nearest))
    rest = (torch.rand(n, anywhere, 3, device=device) - 0.5) * (side + 2 * OUTER)
    close = torch.cat(chosen, dim=1)
    a = dict(zip(APPEARANCE_NAMES, appearance.unsqueeze(-1).unbind(1), strict=True))
    colour = shade(field, *(x.contiguous() for x in close.unbind(-1)), g, a).clamp(0, 1)
    beyond = field(*(x.contiguous() for x in rest.unbind(-1)))
    return FieldPoints(torch.cat([close, rest], dim=1), density_of(torch.cat([*sdfs, beyond], dim=1), edge), colour)


def field_loss(density: torch.Tensor, colour: torch.Tensor, truth: FieldPoints, colour_weight: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean absolute errors of density (in tenths of the raw scale) and of colour near the surface.

    Args: density [N, P] raw; colour [N, K, 3] in 0..1.
    Returns: [N] each, the second weighted. Differentiable in density and colour.
    """
    shape = (density - truth.density).abs().mean(dim=1) / 10
    return shape, colour_weight * (colour - truth.colour).abs().mean(dim=[1, 2])
