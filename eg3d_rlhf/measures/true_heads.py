"""True heads of the procedural family as raw density cubes, on the same grids as the fields of a generator.

Letters: N heads, S shape parameters, D, H, W grid points along z, y, x, V views, R pixels.
"""

import torch

from eg3d_rlhf.core.field import LEVEL
from eg3d_rlhf.core.spec import SlabSpec
from training.heads.render import render_heads, union_field
from training.heads.sdf import head_geometry
from training.rendering.cameras import unpack_label
from training.synthetic_heads import HeadsOptions, head_parameters

SEED = 81  # of synthetic:heads64@seed=81: neither a generator nor the image features learn from these heads
RAMPS = (500.0, 2000.0, 8000.0)  # raw density per world unit at the surface: soft, as a trained decoder's, nearly a step
LOWEST, HIGHEST = -100.0, 200.0  # raw density that a ramp ends at, outside and inside


def true_shapes(n: int, first: int = 0) -> torch.Tensor:
    """Shape parameters [N, S] of the heads `first` and following."""
    return torch.from_numpy(head_parameters(HeadsOptions(seed=SEED), range(first, first + n))[0])


@torch.no_grad()
def head_distances(shape: torch.Tensor, spec: SlabSpec) -> torch.Tensor:
    """Signed distances [N, D, H, W] in world units of heads [N, S] at the points of a grid."""
    points = spec.points().reshape(1, -1, 3).expand(len(shape), -1, -1)
    return union_field(head_geometry(shape))(*points.unbind(-1)).unflatten(1, spec.shape)


def ramped(distance: torch.Tensor, ramp: float = RAMPS[1], level: float = LEVEL) -> torch.Tensor:
    """Raw density level - ramp * distance, held within LOWEST..HIGHEST: its surface is where the distance is 0, whatever the ramp."""
    return (level - ramp * distance).clamp(LOWEST, HIGHEST)


def true_pictures(index: int, cameras: torch.Tensor, resolution: int) -> torch.Tensor:
    """Pictures [V, 3, R, R] in 0..1 of one head, coloured and lit as in its set, from cameras [V, 25], on white."""
    shape, appearance, _ = (torch.from_numpy(values) for values in head_parameters(HeadsOptions(seed=SEED), range(index, index + 1)))
    n = len(cameras)
    return render_heads(shape.expand(n, -1), appearance.expand(n, -1), *unpack_label(cameras), resolution)[0]
