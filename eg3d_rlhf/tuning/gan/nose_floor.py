"""Nose limit: a penalty on faces that come nearer to the frontal camera than any untuned face.

A depth reward reads only one side of a head. The easiest way to a higher score is then a nose that grows
towards the camera. The limit is the smallest depth of untuned faces.

Letters: N samples; h, w rows and columns of the window.
"""

import torch

from eg3d_rlhf.core.field import Field, RenderOptions, fixed_draws
from eg3d_rlhf.generators import Generator

# The published method reads rows and columns 53 to 72 of a frontal depth map of 128 x 128 pixels.
PIXELS = 128
FIRST = 53
SIDE = 20
PSI = 0.25  # truncation of the untuned samples


def floor_loss(depth: torch.Tensor, limit: float | torch.Tensor, violators: bool = False) -> torch.Tensor:
    """Return the mean of (limit - depth)+ over a window.

    Args:
        depth: [N, h, w], distance from the camera, world units.
        limit: smallest allowed depth.
        violators: take the mean over those pixels only that are nearer than the limit, as in the published
            method. A single pixel then counts as much as a thousand. 0 if there are none.
    Returns: [N], world units. Differentiable in depth.
    Deviates: the published code takes that mean over all samples of a batch together.
    """
    # How much nearer than the limit each pixel is; 0 where it is farther.
    missing = torch.relu(limit - depth).flatten(1)  # [N, h * w]
    # clamp_min covers the case without violators: 0 / 1.
    return missing.sum(dim=1) / (missing > 0).sum(dim=1).clamp_min(1) if violators else missing.mean(dim=1)


class NoseFloor(torch.nn.Module):
    """Smallest depth d* of untuned faces in the middle of the frontal depth map, and the penalty below it.

    Args:
        generator: the untuned generator.
        ws: its samples at truncation PSI, [N, L, W].
        kind: one of NOSE_FLOORS, see `floor_loss`.
    """

    floor: torch.Tensor

    @torch.no_grad()
    def __init__(self, generator: Generator, ws: torch.Tensor, kind: str):
        super().__init__()
        self.kind = kind
        self._camera = window_camera(generator)
        # A buffer, so that a resumed run keeps the limit of the untuned generator.
        self.register_buffer(
            "floor", torch.stack([self._depth(generator.field(part)).amin() for part in ws.split(16)]).amin()
        )

    def _depth(self, field: Field) -> torch.Tensor:
        """Render the window's depth [N, h, w]."""
        # Fixed random numbers: neither the penalty nor the run's own random sequence may depend on the other.
        with fixed_draws():
            return field.render(self._camera, RenderOptions(resolution=SIDE)).depth[:, 0]

    def forward(self, field: Field) -> torch.Tensor:
        """Return the penalty [N] of samples."""
        return floor_loss(self._depth(field), self.floor, self.kind == "violators")


def window_camera(generator: Generator) -> torch.Tensor:
    """Return the label [1, 25] of a frontal camera that shows rows and columns 53 to 72 of 128."""
    # The pose sampler uses random numbers even though its standard deviations are 0.
    with fixed_draws():
        label = generator.cameras.label()
        scale = PIXELS / SIDE  # the window is a crop of SIDE of PIXELS pixels
    # Cropping an image rescales its intrinsics, since these are in units of the image.
    intrinsics = label[0, 16:25].view(3, 3)  # a view: the label itself is changed
    intrinsics[:2, :2] *= scale  # focal lengths and skew
    intrinsics[:2, 2] = (intrinsics[:2, 2] - FIRST / PIXELS) * scale
    return label
