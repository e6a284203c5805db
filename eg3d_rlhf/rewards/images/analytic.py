"""Closed-form rewards of images and of geometry for the bundled test problem (boxes.py).

The shapes and images that these rewards prefer are known exactly, so the effect of a method that optimises
these rewards can be checked. Rewards of images implement `RewardModel`, and rewards of geometry
`GeometryReward` (tuning/distill/guidance/geometry.py). The held-out evaluators (pairwise_evaluators.py) and
the detector (`boxes.noses`) measure other properties than these rewards.

Each prompt of the test problem has two modes, which are two images of a side: the first one is a face or the
preferred emblem, and the second one is an empty side or the rejected emblem.

Shapes: A is the number of assets, V the number of views of each asset, and B = A V the number of images,
which have C channels (3, or 4 with inverse depth) and h x w pixels.
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

# Slope of the sigmoid that converts `mode_preference` to the probability that a view shows a face
_SHARP = 6.0


def mode_preference(pixels: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """Compute how much nearer each image is to its prompt's first mode than to the second mode: [B].

    The two modes of a prompt are two images of a side, for example a face and an empty side, see boxes.py.
    The result for an image x is (|x - second|^2 - |x - first|^2) / |first - second|^2. It is 1 at the first
    mode and -1 at the second mode. Differentiable in the images.

    Args:
        pixels: images [B, C, h, w] in 0..1.
        prompts: prompt of each image.
    Raises: ValueError if the images do not have the size of the test problem.
    """
    channels = pixels.shape[1]
    # [B, C, R, R] each. The modes have inverse depth as fourth channel, which is left out if the images do
    # not have it.
    first_mode, second_mode = modes_of(prompts)[:, :, :channels].to(pixels).unbind(1)
    if pixels.shape != first_mode.shape:
        raise ValueError(
            f"--reward: this reward reads only images of the bundled test problem, which have"
            f" {list(first_mode.shape[2:])} pixels, got {list(pixels.shape[2:])} pixels. Choose another"
            " --reward."
        )
    # The difference of squared distances is linear in x, so its gradient is the same for all images.
    first_distance = (pixels - first_mode).square().flatten(1).sum(1)
    second_distance = (pixels - second_mode).square().flatten(1).sum(1)
    return (second_distance - first_distance) / (first_mode - second_mode).square().flatten(1).sum(1)


class _EachImage:
    """Base class of the differentiable rewards that score each image separately."""

    modality: ClassVar[Modality] = "image"
    views = 1
    differentiable = True


class ModeDistance(_EachImage):
    """Reward that scores each view separately by `mode_preference`, its nearness to the prompt's first mode.

    For heads the first mode is a face, so this reward prefers a face in every view. Real rewards of single
    images have the same bias towards the Janus problem.
    """

    def score(self, pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Return scores [B] of images [B, C, h, w]. Differentiable in the images."""
        return mode_preference(pixels, prompts)


class OneFace:
    """Reward that scores the four views of an asset together, and prefers heads with exactly one face.

    The score of a head is the largest face probability minus the sum of the three others, where the face
    probability of a view is sigmoid(6 mode_preference). The score of a box is the mean of `mode_preference`
    over the four views.
    """

    modality: ClassVar[Modality] = "multiview"
    views = SIDES
    differentiable = True

    def score(self, pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Return scores [B] of images [B, C, h, w]. The four views of an asset get the same score.

        Differentiable in the images.
        """
        preference = mode_preference(pixels, prompts).unflatten(0, (-1, self.views))  # [A, V]
        face_probabilities = torch.sigmoid(_SHARP * preference)
        # largest - (sum - largest)
        head_scores = 2 * face_probabilities.amax(dim=1) - face_probabilities.sum(dim=1)
        # The four views of an asset have the same prompt, so every fourth prompt is read.
        is_head = torch.tensor(
            [prompt_of(text).kind == "janus" for text in prompts[:: self.views]], device=pixels.device
        )
        scores = torch.where(is_head, head_scores, preference.mean(dim=1))  # [A]
        return scores.repeat_interleave(self.views)


class MeanPixel(_EachImage):
    """Reward that is the mean of all pixels of an image. It is a simple test of any guidance method."""

    def score(self, pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Return scores [B] of images [B, C, h, w]. Differentiable in the images."""
        del prompts
        return pixels.flatten(1).mean(dim=1)


@dataclass(frozen=True)
class Random:
    """Control without information: a random score in 0..1 that is the same for the same images.

    The score is the fractional part of a random projection of the images with large weights.
    """

    seed: int = 0  # random seed of the projection
    views: int = 1  # number of images of an asset, which are scored together
    modality: ClassVar[Modality] = "image"
    differentiable: ClassVar[bool] = False

    def score(self, pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Return scores [B] of images [B, C, h, w], without a gradient.

        The views of an asset get the same score.
        """
        del prompts
        asset_pixels = pixels.detach().unflatten(0, (-1, self.views)).flatten(1).double()  # [A, V C h w]
        # The projection is created again in every call, so it depends only on the seed and the image size.
        weights = torch.randn(
            asset_pixels.shape[1], generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64
        ).to(asset_pixels)
        # With this factor, a small change of the image changes the fractional part completely.
        return ((asset_pixels @ weights) * 1e4).remainder(1.0).to(pixels).repeat_interleave(self.views)


class Inverted:
    """Control: the negative of a reward. A method that follows rewards must give worse results with it.

    Args: reward: reward to invert.
    """

    def __init__(self, reward: RewardModel):
        self._reward = reward
        self.modality = reward.modality
        self.views = reward.views
        self.differentiable = reward.differentiable
        # `view_prompts` is an optional attribute of `RewardModel`.
        self.view_prompts = getattr(reward, "view_prompts", False)

    def score(self, pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Return the negative scores [B] of images [B, C, h, w] with their prompts."""
        return -self._reward.score(pixels, prompts)


def occupancy(field: Field, resolution: int = RESOLUTION) -> torch.Tensor:
    """Compute the opacity [A, D, H, W] of each shape at the points of a grid over the field's cube.

    The opacity is 1 - exp(-softplus(raw - 1) step), where raw is the raw density and step the distance
    between grid points. Differentiable in the field.

    Args:
        field: field of A shapes.
        resolution: number of grid points per axis.
    """
    grid_spec = SlabSpec.from_bounds(field.bounds, resolution)
    # expm1 keeps small opacities accurate.
    return -torch.expm1(-torch.nn.functional.softplus(field.density_grid(grid_spec) - 1) * grid_spec.voxel)


class OneNose:
    """Reward of geometry that prefers heads with one nose. It is an upper bound for learned rewards.

    The score of a head is minus the sum of the three smallest of its four nose masses. A nose mass is the
    mean opacity of the voxels that the nose of a side would fill. The largest mass is left out for this
    reason: a penalty on all four masses would remove every nose of most assets, and would still lower the
    Janus ratio.
    """

    def __call__(self, field: Field, prompts: Sequence[str], step: int) -> torch.Tensor:
        """Return the scores [A] of the assets of a field, 0 for boxes. Differentiable in the field.

        Args:
            field: field of the assets.
            prompts: prompt of each asset.
            step: step of the optimisation, which this reward ignores.
        """
        del step
        opacity = occupancy(field)
        # [A, 4]: mean opacity of the nose voxels of each side
        nose_masses = torch.stack(
            [
                opacity[:, nose_voxels(RESOLUTION, side).to(opacity.device)].mean(dim=1)
                for side in range(SIDES)
            ],
            dim=1,
        )
        is_head = torch.tensor([prompt_of(text).kind == "janus" for text in prompts], device=opacity.device)
        return torch.where(is_head, nose_masses.amax(dim=1) - nose_masses.sum(dim=1), 0.0)


class Floaters:
    """Reward of geometry that penalises floaters, the parts that are not connected to the largest part.

    The score is minus the share of the total opacity that lies in floaters. The parts are determined without
    a gradient.
    """

    def __call__(self, field: Field, prompts: Sequence[str], step: int) -> torch.Tensor:
        """Return the scores [A] of the assets of a field. Differentiable in the field.

        Args:
            field: field of the assets.
            prompts: prompt of each asset, which this reward ignores.
            step: step of the optimisation, which this reward ignores.
        """
        del prompts, step
        opacity = occupancy(field)
        # Connected components have no gradient, so the mask is a constant.
        floater_mask = torch.stack([_floater_mask(grid.detach().cpu().numpy()) for grid in opacity]).to(
            opacity
        )
        # The clamp avoids a division by 0 for empty fields.
        return -(opacity * floater_mask).sum(dim=(1, 2, 3)) / opacity.sum(dim=(1, 2, 3)).clamp_min(1e-6)


def _floater_mask(opacity: np.ndarray) -> torch.Tensor:
    """Return a mask [D, H, W] of the grid points with an opacity >= 0.5 outside the largest connected part.

    If there is only one part, the mask is False everywhere.
    """
    from scipy import ndimage

    part_labels, _ = ndimage.label(opacity >= 0.5)
    part_sizes = np.bincount(part_labels.ravel())
    part_sizes[0] = 0  # label 0 is the background
    return torch.from_numpy((part_labels > 0) & (part_labels != part_sizes.argmax()))
