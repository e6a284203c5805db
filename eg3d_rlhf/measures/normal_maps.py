"""Normal maps of a density's level set, seen from fixed directions without perspective: no renderer, no colour, no rays of the generator's.

A box about the head is read from the density, turned about y and cut by columns; a column's first crossing of the level gives a height, the
heights give normals. True heads and generators take the same path, so that only their shapes tell them apart.
Letters: N shapes, F views, D, H, W grid points along z, y, x, R = RESOLUTION of the box's grid and of the maps.
"""

import math
from collections.abc import Sequence

import torch
from torch.nn import functional

from eg3d_rlhf.core.field import LEVEL, Bounds, Field
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.measures.views import normals_from_points

RESOLUTION = 64  # R
CELLS = 128  # grid points per edge of the whole cube, of which the box holds half
CROP = (0.25, 0.25, 0.28125, 0.21875, 0.28125, 0.21875)  # x -0.25..0.25, y and z -0.22..0.28 of a cube of side 1: the head, no shoulders
YAWS = (-0.5, 0.0, 0.5)  # radians from frontal
CHANNELS = 4  # normal along the view's right, up and towards the viewer; 1 where there is a surface
CLIP = 50.0  # raw density above and below the level beyond which values count as this: a decoder's extremes do not move the surface


def box(bounds: Bounds) -> SlabSpec:
    """The grid that the maps of a field with these bounds are made from."""
    return SlabSpec.of(bounds, CELLS, crop=CROP)


@torch.no_grad()
def normal_maps(sigma: torch.Tensor, level: float = LEVEL, yaws: Sequence[float] = YAWS) -> torch.Tensor:
    """Maps [N, F, 4, R, R] of raw densities [N, R, R, R] on a `box`, in a view's own axes; rows run down. 0 where nothing is known.

    The viewer of yaw a stands in direction (sin a, 0, cos a). A normal is known where a pixel and its four neighbours show a surface.
    Raises: ValueError for a grid of another shape.
    """
    if sigma.ndim != 4 or tuple(sigma.shape[1:]) != (RESOLUTION,) * 3:
        expected = ["N", *(RESOLUTION,) * 3]
        raise ValueError(f"normal_maps: expected sigma {expected}, got {list(sigma.shape)}. Sample it on a box.")
    values = (sigma.float().nan_to_num(nan=-1e4, posinf=1e4, neginf=-1e4) - level).clamp(-CLIP, CLIP)
    layers = values.transpose(1, 2).flip(1) + CLIP  # [N, H, D, W], rows down; 0 is empty
    line = torch.linspace(-1, 1, RESOLUTION, device=sigma.device)  # of the box, half its side is 1
    w, u = torch.meshgrid(line.flip(0), line, indexing="ij")  # w: towards the viewer, nearest first
    maps = []
    for yaw in yaws:
        x, z = u * math.cos(yaw) + w * math.sin(yaw), w * math.cos(yaw) - u * math.sin(yaw)
        place = torch.stack([x, z], dim=-1).expand(len(sigma), -1, -1, -1)
        turned = functional.grid_sample(layers, place, align_corners=True) - CLIP  # [N, H, w, u]
        maps.append(_maps(turned, line))
    return torch.stack(maps, dim=1)


def _maps(values: torch.Tensor, line: torch.Tensor) -> torch.Tensor:
    """One view's maps [N, 4, R, R] of densities less the level [N, H, w, u], nearest w first."""
    inside = values >= 0
    hit = inside.any(dim=2)  # [N, H, u]
    index = inside.to(torch.uint8).argmax(dim=2, keepdim=True)
    before = (index - 1).clamp_min(0)
    value, previous = values.gather(2, index), values.gather(2, before)
    step = torch.where(index > 0, (-previous / (value - previous).clamp_min(1e-9)).clamp(0, 1), 0.0)[:, :, 0]
    spacing = 2 / (RESOLUTION - 1)
    height = 1 - spacing * (before[:, :, 0] + step)  # [N, H, u]
    v, u = torch.meshgrid(line.flip(0), line, indexing="ij")
    points = torch.stack([u.expand_as(height), v.expand_as(height), height], dim=-1)  # [N, R, R, 3]
    normal, known = normals_from_points(points, hit)
    return torch.cat([(normal * known[..., None]).permute(0, 3, 1, 2), hit[:, None].float()], dim=1)


def maps_of(field: Field) -> torch.Tensor:
    """Maps [N, F, 4, R, R] of a field's shapes."""
    with torch.no_grad():
        return normal_maps(field.density_grid(box(field.bounds)), field.level)


def mirrored(maps: torch.Tensor) -> torch.Tensor:
    """Maps [..., 4, R, R] of the mirror image: columns swapped, normals turned to the other side."""
    sign = maps.new_tensor([-1.0, 1.0, 1.0, 1.0])[:, None, None]
    return maps.flip(-1) * sign
