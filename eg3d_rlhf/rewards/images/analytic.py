"""Rewards in closed form, of images and of geometry, for tests of methods.

What these rewards prefer is known exactly, so the effect of a method that optimises them can be checked.
`RewardModel` of images: scores [B] of [B, C, h, w] in 0..1 (C is 3, or 4 with inverse depth).
`GeometryReward` (guidance/geometry.py) of fields: scores [A]. Neither is the held-out evaluator
(pairwise_evaluators.py) or the detector (`boxes.noses`). Letters: A assets, V views of each, B = A V.
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

# Slope of the soft decision "this view is a face" in `nearer_first`
_SHARP = 6.0


def nearer_first(pixels: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """Compute (|x - second|^2 - |x - first|^2) / |first - second|^2 [B] for the two modes of each prompt.

    The value is 1 at the first mode and -1 at the second.
    Raises: ValueError if images have another size than the test problem's.
    """
    channels = pixels.shape[1]
    # [B, C, R, R] each; without inverse depth if the images have none.
    first, second = modes_of(prompts)[:, :, :channels].to(pixels).unbind(1)
    if pixels.shape != first.shape:
        expected = list(first.shape[2:])
        raise ValueError(
            f"--reward: this reward reads images of the test problem, of {expected} pixels, got"
            f" {list(pixels.shape[2:])}. Choose another --reward."
        )
    # The difference of squared distances is linear in x, so its gradient is the same everywhere.
    difference = (pixels - second).square().flatten(1).sum(1) - (pixels - first).square().flatten(1).sum(1)
    return difference / (first - second).square().flatten(1).sum(1)


class _EachImage:
    """Properties of rewards that score each image separately, with a gradient."""

    modality: ClassVar[Modality] = "image"
    views = 1
    differentiable = True


class ModeDistance(_EachImage):
    """Score of each view separately: the nearness to the prompt's first mode.

    For heads the first mode is a face, so this reward asks for a face in every view. This is the bias of 2D
    rewards towards the Janus problem.
    """

    def score(self, pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Return scores [B] of images [B, C, h, w]. Differentiable in the images."""
        return nearer_first(pixels, prompts)


class OneFace:
    """Score of the four views of an asset together. The best head has exactly one face.

    Heads: the largest face probability minus the sum of the others, where the face probability of a view is
    sigmoid(6 nearer_first). Boxes: the mean of `ModeDistance`.
    """

    modality: ClassVar[Modality] = "multiview"
    views = SIDES
    differentiable = True

    def score(self, pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Return scores [B] of images [B, C, h, w], equal for the views of an asset.

        Differentiable in the images.
        """
        near = nearer_first(pixels, prompts).unflatten(0, (-1, self.views))  # [A, V]
        faces = torch.sigmoid(_SHARP * near)
        of_heads = 2 * faces.amax(dim=1) - faces.sum(dim=1)  # largest - (sum - largest)
        # The views of an asset have the same prompt, so every fourth one is read.
        heads = torch.tensor(
            [prompt_of(text).kind == "janus" for text in prompts[:: self.views]], device=pixels.device
        )
        # The score of an asset is repeated for each of its views.
        return torch.where(heads, of_heads, near.mean(dim=1)).repeat_interleave(self.views)


class MeanPixel(_EachImage):
    """Mean of an image, as a smoke test of any guidance."""

    def score(self, pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Return scores [B] of images [B, C, h, w]. Differentiable in the images."""
        del prompts
        return pixels.flatten(1).mean(dim=1)


@dataclass(frozen=True)
class Random:
    """Control without information: a random number in 0..1 that is the same for the same images.

    It is the fractional part of a large random projection.
    """

    seed: int = 0  # of the projection
    views: int = 1  # images per asset, which are scored together
    modality: ClassVar[Modality] = "image"
    differentiable: ClassVar[bool] = False

    def score(self, pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Return scores [B] of images [B, C, h, w], without a gradient."""
        del prompts
        flat = pixels.detach().unflatten(0, (-1, self.views)).flatten(1).double()
        # The projection is created anew in every call, so it depends only on the seed and the size.
        weights = torch.randn(
            flat.shape[1], generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64
        ).to(flat)
        # The factor makes small changes of the image change the fraction completely.
        return ((flat @ weights) * 1e4).remainder(1.0).to(pixels).repeat_interleave(self.views)


class Inverted:
    """Negative of another reward. A method that follows rewards must get worse with it."""

    def __init__(self, reward: RewardModel):
        self._reward = reward
        self.modality = reward.modality
        self.views = reward.views
        self.differentiable = reward.differentiable
        # An optional attribute of `RewardModel`.
        self.view_prompts = getattr(reward, "view_prompts", False)

    def score(self, pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Return the negative scores [B] of the other reward."""
        return -self._reward.score(pixels, prompts)


def occupancy(field: Field, resolution: int = RESOLUTION) -> torch.Tensor:
    """Compute the opacity [A, D, H, W] of a grid's cells, 1 - exp(-softplus(raw - 1) step).

    Differentiable in the field.
    """
    grid = SlabSpec.of(field.bounds, resolution)
    # expm1 keeps small opacities accurate.
    return -torch.expm1(-torch.nn.functional.softplus(field.density_grid(grid) - 1) * grid.voxel)


class OneNose:
    """Upper bound for learned rewards: -(sum - largest) of four nose masses.

    A nose mass is the mean opacity where the nose of a side would be.
    Deviates from a limit of one nose's mass on the sum: that would remove all noses of most assets, and would
    still lower the Janus ratio.
    """

    def __call__(self, field: Field, prompts: Sequence[str], step: int) -> torch.Tensor:
        """Return scores [A], see `GeometryReward`; 0 for prompts of boxes. Differentiable in the field."""
        del step
        filled = occupancy(field)
        # [A, 4]: mean opacity of the nose voxels of each side
        mass = torch.stack(
            [filled[:, nose_voxels(RESOLUTION, side).to(filled.device)].mean(dim=1) for side in range(SIDES)],
            dim=1,
        )
        heads = torch.tensor([prompt_of(text).kind == "janus" for text in prompts], device=filled.device)
        return torch.where(heads, mass.amax(dim=1) - mass.sum(dim=1), 0.0)


class Floaters:
    """Minus the share of the filled volume that is not connected to the largest part.

    The parts are determined without a gradient.
    """

    def __call__(self, field: Field, prompts: Sequence[str], step: int) -> torch.Tensor:
        """Return scores [A], see `GeometryReward`. Differentiable in the field."""
        del prompts, step
        filled = occupancy(field)
        # Connected components have no gradient, so the mask is a constant.
        floating = torch.stack([_apart(cells.detach().cpu().numpy()) for cells in filled]).to(filled)
        # The clamp is for empty fields.
        return -(filled * floating).sum(dim=(1, 2, 3)) / filled.sum(dim=(1, 2, 3)).clamp_min(1e-6)


def _apart(filled: np.ndarray) -> torch.Tensor:
    """Return a mask [D, H, W] of cells of opacity >= 0.5 outside the largest part; empty if there is one
    part.
    """
    from scipy import ndimage

    labels, _ = ndimage.label(filled >= 0.5)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0  # label 0 is the background
    return torch.from_numpy((labels > 0) & (labels != sizes.argmax()))
