"""The nose floor: a penalty on faces that come nearer to the frontal camera than any untuned one does.

A depth reward sees one side of a head, and a nose that grows towards the camera is the nearest way to a
higher score.

Letters: N samples, h, w = rows and columns of the window.
"""

import torch

from eg3d_rlhf.core.field import Field, RenderOptions, fixed_draws
from eg3d_rlhf.generators import Generator

# of the published frontal map: its edge; rows and columns 53..72 are read
PIXELS = 128
FIRST = 53
SIDE = 20
PSI = 0.25  # truncation of the untuned samples


def floor_loss(depth: torch.Tensor, floor: float | torch.Tensor, violators: bool = False) -> torch.Tensor:
    """Mean of (floor - depth)+ over a window, [N, h, w] -> [N], world units. Differentiable in depth.

    Args: violators: the published mean, over those pixels alone that are nearer than the floor, so that one
    counts as much as a thousand; 0 where there are none.
    Deviates: published code takes that mean over all samples of a batch at once.
    """
    missing = torch.relu(floor - depth).flatten(1)  # [N, h * w]
    return missing.sum(dim=1) / (missing > 0).sum(dim=1).clamp_min(1) if violators else missing.mean(dim=1)


class NoseFloor(torch.nn.Module):
    """Least depth d* of untuned faces in the middle of the frontal map, and the loss below it.

    Args: generator: the untuned one; ws: its samples at PSI, in batches [N, L, W]; kind: of NOSE_FLOORS, see
        `floor_loss`.
    """

    floor: torch.Tensor

    @torch.no_grad()
    def __init__(self, generator: Generator, ws: torch.Tensor, kind: str):
        super().__init__()
        self.kind = kind
        self._camera = window_camera(generator)
        self.register_buffer(
            "floor", torch.stack([self._depth(generator.field(part)).amin() for part in ws.split(16)]).amin()
        )

    def _depth(self, field: Field) -> torch.Tensor:
        with fixed_draws():
            return field.render(self._camera, RenderOptions(resolution=SIDE)).depth[:, 0]

    def forward(self, field: Field) -> torch.Tensor:
        return floor_loss(self._depth(field), self.floor, self.kind == "violators")


def window_camera(generator: Generator) -> torch.Tensor:
    """Label [1, 25] of a frontal camera whose pixels are rows and columns 53..72 of a picture of 128."""
    with fixed_draws():  # the pose sampler draws, though to no effect
        label = generator.cameras.label()
        scale = PIXELS / SIDE
    intrinsics = label[0, 16:25].view(3, 3)
    intrinsics[:2, :2] *= scale
    intrinsics[:2, 2] = (intrinsics[:2, 2] - FIRST / PIXELS) * scale
    return label
