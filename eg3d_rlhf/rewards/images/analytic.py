"""Rewards in closed form: of pictures, and of geometry. What they judge is known, so what a method makes of
them can be checked.

`RewardModel` of pictures: scores [B] of [B, C, h, w] in 0..1 (C is 3, or 4 with inverse depth).
`GeometryReward` (guidance/geometry.py) of fields: scores [A]. Neither is the judge (judges.py) nor the
detector (`boxes.noses`). Letters: A assets, V views of each, B = A V.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from eg3d_rlhf.core.field import Field
from eg3d_rlhf.core.interfaces import Modality, RewardModel
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.rewards.box_prompts import prompt_of
from eg3d_rlhf.rewards.boxes import RESOLUTION, SIDES, modes_of, nose_voxels

# slope of the soft "this view is a face" in the difference of squared distances over that of the modes
_SHARP = 6.0


def nearer_first(pixels: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """(|x - second|^2 - |x - first|^2) / |first - second|^2 [B] of a prompt's two modes: 1 at the first, -1
    at the second.
    """
    channels = pixels.shape[1]
    first, second = modes_of(prompts)[:, :, :channels].to(pixels).unbind(1)
    if pixels.shape != first.shape:
        expected = list(first.shape[2:])
        raise ValueError(
            f"--reward: expected the test problem's pictures of {expected} pixels, got"
            f" {list(pixels.shape[2:])}. Use another."
        )
    apart = (pixels - second).square().flatten(1).sum(1) - (pixels - first).square().flatten(1).sum(1)
    return apart / (first - second).square().flatten(1).sum(1)


class _EachPicture:
    """Scores each picture alone, with a gradient."""

    modality: ClassVar[Modality] = "image"
    views = 1
    differentiable = True


class ModeDistance(_EachPicture):
    """Each view alone: how near the prompt's first mode. Of heads that is a face in every view: the bias of
    2D rewards towards Janus.
    """

    def score(self, pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return nearer_first(pixels, prompts)


class OneFace:
    """Four views of an asset together. Heads: the largest face-likeness less all others'; boxes: the mean of
    `ModeDistance`.

    The face-likeness of a view is sigmoid(6 nearer_first). Best is exactly one face: 1 less what the other
    three have of one.
    """

    modality: ClassVar[Modality] = "multiview"
    views = SIDES
    differentiable = True

    def score(self, pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        near = nearer_first(pixels, prompts).unflatten(0, (-1, self.views))  # [A, V]
        faces = torch.sigmoid(_SHARP * near)
        of_heads = 2 * faces.amax(dim=1) - faces.sum(dim=1)
        heads = torch.tensor(
            [prompt_of(text).kind == "janus" for text in prompts[:: self.views]], device=pixels.device
        )
        return torch.where(heads, of_heads, near.mean(dim=1)).repeat_interleave(self.views)


class MeanPixel(_EachPicture):
    """The mean of a picture: the smoke test of any guidance."""

    def score(self, pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        del prompts
        return pixels.flatten(1).mean(dim=1)


@dataclass(frozen=True)
class Random:
    """Numbers of 0..1 that mean nothing, the same for the same pictures: a control. The fraction of a large
    random projection.
    """

    seed: int = 0
    views: int = 1
    modality: ClassVar[Modality] = "image"
    differentiable: ClassVar[bool] = False

    def score(self, pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        del prompts
        flat = pixels.detach().unflatten(0, (-1, self.views)).flatten(1).double()
        weights = torch.randn(
            flat.shape[1], generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64
        ).to(flat)
        return ((flat @ weights) * 1e4).remainder(1.0).to(pixels).repeat_interleave(self.views)


class Inverted:
    """The negative of another reward: a method that follows rewards must fail with it."""

    def __init__(self, reward: RewardModel):
        self._reward = reward
        self.modality = reward.modality
        self.views = reward.views
        self.differentiable = reward.differentiable
        self.view_prompts = getattr(reward, "view_prompts", False)

    def score(self, pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return -self._reward.score(pixels, prompts)


def occupancy(field: Field, resolution: int = RESOLUTION) -> torch.Tensor:
    """Opacity [A, D, H, W] of a grid's cells, 1 - exp(-softplus(raw - 1) step).
    Differentiable in the field.
    """
    grid = SlabSpec.of(field.bounds, resolution)
    return -torch.expm1(-torch.nn.functional.softplus(field.density_grid(grid) - 1) * grid.voxel)


class OneNose:
    """-(sum - largest) of four nose masses, each the mean opacity where a side's nose would be: an oracle's
    ceiling for learned rewards.

    Deviates from "no more than one nose's worth" of the sum, which removes all noses of most assets and still
    lowers the Janus ratio.
    """

    def __call__(self, field: Field, prompts: Sequence[str], step: int) -> torch.Tensor:
        """See `GeometryReward`; 0 for prompts that are not of heads."""
        del step
        filled = occupancy(field)
        mass = torch.stack(
            [filled[:, nose_voxels(RESOLUTION, side).to(filled.device)].mean(dim=1) for side in range(SIDES)],
            dim=1,
        )
        heads = torch.tensor([prompt_of(text).kind == "janus" for text in prompts], device=filled.device)
        return torch.where(heads, mass.amax(dim=1) - mass.sum(dim=1), 0.0)


class Floaters:
    """Minus the share of the filled volume that hangs apart from the largest connected part. Parts are found
    without gradient.
    """

    def __call__(self, field: Field, prompts: Sequence[str], step: int) -> torch.Tensor:
        del prompts, step
        filled = occupancy(field)
        apart = torch.stack([_apart(cells.detach().cpu().numpy()) for cells in filled]).to(filled)
        return -(filled * apart).sum(dim=(1, 2, 3)) / filled.sum(dim=(1, 2, 3)).clamp_min(1e-6)


def _apart(filled: np.ndarray) -> torch.Tensor:
    """Mask [D, H, W] of half-filled cells outside the largest part; none where there is one part."""
    from scipy import ndimage

    labels, _ = ndimage.label(filled >= 0.5)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return torch.from_numpy((labels > 0) & (labels != sizes.argmax()))
