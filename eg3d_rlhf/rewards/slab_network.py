"""Networks that read σ slabs (cropped density grids): the paper's 3-D U-Net, or strided convolutions.

The U-Net is the network of arXiv 2606.27305. The strided convolutions need fewer labels.

Shapes: N samples, C channels, D, H, W = voxels along z, y, x, M features, p = edge of a patch in voxels (see
eg3d_rlhf/core/shapes.py).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from eg3d_rlhf.core.shapes import check_shape
from eg3d_rlhf.rewards import fused
from eg3d_rlhf.rewards.networks import READERS, RewardNetwork
from eg3d_rlhf.rewards.slab_presets import PAPER, RewardArch
from eg3d_rlhf.rewards.unet3d import UNet3d, grid_feature, slice_max_feature

# Smallest standard deviation of a voxel, as a share of the mean standard deviation of all voxels. Without
# this limit, voxels that are empty in almost all samples would be amplified.
_MIN_SCALE = 0.3


class StridedConv3d(nn.Module):
    """Feature extractor of three convolutions of stride 2, for few labels.

    The two input channels are the slab and its asymmetry |slab - mirrored slab|, standardised per voxel.
    Samples of one generator differ little from their mean, and pooling would discard where the samples
    differ. With one or two thousand pairs, accuracy improves if the input is the difference from the mean
    slab, and if there is no pooling before the first linear layer.

    In eval mode, the features of the slab and of its mirror image are averaged, so that a score does not
    change if a shape is mirrored. In training mode, the features of the slab alone are used, because training
    data are mirrored at random, and features are dropped with probability `dropout`.

    Args:
        channels: number of channels of the first convolution.
        shape: shape (D, H, W) of the slabs.
        dropout: probability of dropout.
    """

    slab_mean: torch.Tensor
    slab_scale: torch.Tensor
    difference_mean: torch.Tensor
    difference_scale: torch.Tensor

    def __init__(self, channels: int, shape: Sequence[int], dropout: float):
        super().__init__()
        shape = list(shape)
        self.first = nn.Conv3d(2, channels, 4, stride=2, padding=1)
        self.second = nn.Conv3d(channels, 2 * channels, 3, stride=2, padding=1)
        self.third = nn.Conv3d(2 * channels, 4 * channels, 3, stride=2, padding=1)
        self.dropout = nn.Dropout(dropout)
        for input_name in ("slab", "difference"):
            self.register_buffer(f"{input_name}_mean", torch.zeros(shape))
            self.register_buffer(f"{input_name}_scale", torch.ones(shape))

    @torch.no_grad()
    def calibrate(self, slabs: torch.Tensor) -> None:
        """Set mean and standard deviation of each voxel from training slabs [N, 1, D, H, W]."""
        # With the mirror images the statistics are symmetric. [2 N, D, H, W]
        slabs = torch.cat([slabs[:, 0], slabs[:, 0].flip(-1)])
        for input_name, input_slabs in (("slab", slabs), ("difference", (slabs - slabs.flip(-1)).abs())):
            voxel_stds = input_slabs.std(dim=0)
            getattr(self, f"{input_name}_mean").copy_(input_slabs.mean(dim=0))
            # Both are buffers of the state dict, so they are changed in place. 1e-6 avoids a division by 0 if
            # all slabs are equal.
            getattr(self, f"{input_name}_scale").copy_(
                voxel_stds.clamp_min(_MIN_SCALE * float(voxel_stds.mean()) + 1e-6)
            )

    def _features(self, slab: torch.Tensor, difference: torch.Tensor) -> torch.Tensor:
        """Compute features [N, M].

        Args:
            slab: slabs [N, 1, D, H, W] in one orientation.
            difference: |slab - mirrored slab|, [N, 1, D, H, W].
        """
        input_channels = [
            (slab - self.slab_mean) / self.slab_scale,
            (difference - self.difference_mean) / self.difference_scale,
        ]
        x = torch.cat(input_channels, dim=1)  # [N, 2, D, H, W]
        for layer in (self.first, self.second, self.third):
            x = F.silu(layer(x))
        return self.dropout(x.flatten(1))

    def forward(self, slab: torch.Tensor) -> torch.Tensor:
        """Compute features [N, M] of slabs [N, 1, D, H, W] with values in [0, 100].

        Differentiable in slab and parameters.

        Raises: ValueError for slabs of any other shape than the shape of the training.
        """
        expected_shape = tuple(self.slab_mean.shape)
        if tuple(slab.shape[2:]) != expected_shape:
            raise ValueError(
                f"StridedConv3d: expected slabs of {list(expected_shape)} voxels, got"
                f" {list(slab.shape[2:])}. Use the observation that is stored with the reward."
            )
        mirrored_slab = slab.flip(-1)
        difference = (slab - mirrored_slab).abs()  # equal to its own mirror image
        if self.training:
            return self._features(slab, difference)
        # One batch for both orientations, [2 N, ...]
        features = self._features(torch.cat([slab, mirrored_slab]), torch.cat([difference, difference]))
        return 0.5 * (features[: len(slab)] + features[len(slab) :])


class RewardModel(RewardNetwork):
    """Reward network on slabs: a U-Net or strided convolutions, followed by a trunk and three output heads.

    Samples of a batch do not influence each other, because all normalisation is group normalisation.

    Deviates: the published code loops over the samples. This class computes a batch at once, with equal
        results.

    Args: arch: architecture; the default is the paper's network with 12,686,699 parameters.
    """

    def __init__(self, arch: RewardArch = PAPER):
        super().__init__(arch.feature_size, arch.trunk, arch.embedding, arch.heads)
        self.arch = arch
        if arch.extractor == "strided":
            self.extractor = StridedConv3d(arch.feature_maps[0], arch.slab_shape, arch.dropout)
            return
        out_channels = arch.recon_channels + arch.feature_channels
        self.Conv3DModule = UNet3d(arch.patch**3, arch.feature_maps, out_channels, arch.groups)

    def describe(self) -> dict[str, Any]:
        """Return the architecture as JSON values, from which the network can be created again."""
        return self.arch.to_dict()

    def check(self, shape: Sequence[int]) -> None:
        """Raise ValueError if the network cannot read slabs of this shape [1, D, H, W].

        Strided convolutions read only the shape for which they were created.
        """
        if self.arch.extractor == "strided" and tuple(shape[1:]) != self.arch.slab_shape:
            raise ValueError(
                f"reward: expected slabs of {list(self.arch.slab_shape)} points, got {list(shape[1:])}. Use"
                " the --resolution and --crop with which the network was created."
            )

    def calibrate(self, take: Callable[[], torch.Tensor]) -> None:
        """Set mean and standard deviation of each voxel, if the network standardises its input.

        Args: take: function that returns the slabs of all training samples, [N, 1, D, H, W].
        """
        if self.arch.extractor == "strided":
            self.extractor.calibrate(take())

    def _pooled(self, slab: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the U-Net's final maps [N, C, D/p, H/p, W/p], and the pooled features [N, M]."""
        arch = self.arch
        # [N, p^3, D/p, H/p, W/p]
        patches = self._patches(slab)
        final_maps, coarsest_maps = (
            fused.maps(self, patches) if fused.is_supported(self, slab) else self.Conv3DModule(patches)
        )
        response_maps = final_maps[
            :, arch.recon_channels :
        ]  # the first channels are reconstructions of the slab
        if arch.pooling == "slice_max":
            return final_maps, slice_max_feature(response_maps, arch.pool_size)
        return final_maps, torch.cat(
            [
                grid_feature(response_maps, arch.final_cells),
                grid_feature(coarsest_maps, arch.bottleneck_cells),
            ],
            dim=1,
        )

    def _patches(self, slab: torch.Tensor) -> torch.Tensor:
        """Compute the input of the U-Net, [N, p^3, D/p, H/p, W/p], from slabs [N, 1, D, H, W]."""
        arch = self.arch
        # Each level halves the sides, and the coarsest level must have at least one voxel.
        if min(slab.shape[2:]) < arch.smallest_side:
            raise ValueError(
                f"RewardModel: expected slabs with at least {arch.smallest_side} voxels along each axis, got"
                f" {list(slab.shape[2:])}. Increase --resolution, or use a preset with fewer levels."
            )
        return to_patches(slab * arch.input_scale if arch.input_scale != 1 else slab, arch.patch)

    def features(self, observations: torch.Tensor) -> torch.Tensor:
        """Compute the feature vectors [N, M] of slabs [N, 1, D, H, W] with values in [0, 100].

        Raises: ValueError for slabs of any other shape, and for slabs too small for the network.
        """
        check_shape(
            "RewardModel(slab)",
            observations,
            ("N", 1, "D", "H", "W"),
            "Pass the result of the reward's observation.",
        )
        if self.arch.extractor == "strided":
            return self.extractor(observations)
        # Without gradients of the weights, the fused pass can pool without storing the final maps.
        if fused.is_supported(self, observations) and not fused.needs_weight_gradients(self):
            return fused.features(self, self._patches(observations))
        return self._pooled(observations)[1]

    def reconstruct(self, observations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the features [N, M] and the reconstruction [N, 1, D, H, W] of slabs [N, 1, D, H, W].

        Raises: ValueError for strided convolutions, which have no decoder.
        """
        if self.arch.extractor == "strided":
            # The method of the base class raises the error.
            return super().reconstruct(observations)
        check_shape(
            "RewardModel(slab)",
            observations,
            ("N", 1, "D", "H", "W"),
            "Pass the result of the reward's observation.",
        )
        final_maps, features = self._pooled(observations)
        # As published: maximum over channels, followed by a scalar affine map.
        reconstruction = final_maps[:, : self.arch.recon_channels].max(dim=1, keepdim=True).values
        affine_layer = self.Conv3DModule.conv3d_for_recon
        reconstruction = (
            fused.pointwise(affine_layer, reconstruction)
            if fused.is_supported(self, observations)
            else affine_layer(reconstruction)
        )
        if self.arch.patch > 1:
            reconstruction = F.interpolate(reconstruction, scale_factor=self.arch.patch, mode="nearest")
        # Remove the voxels that `to_patches` padded.
        d, h, w = observations.shape[2:]
        return features, reconstruction[:, :, :d, :h, :w]


def to_patches(slab: torch.Tensor, patch: int) -> torch.Tensor:
    """Cut slabs into patches of p^3 voxels, which become channels.

    [N, 1, D, H, W] -> [N, p^3, D/p, H/p, W/p]. If a side is not a multiple of p, the last voxel along it is
    repeated until it is.

    Args:
        slab: slabs [N, 1, D, H, W].
        patch: edge p of a patch in voxels.
    """
    if patch == 1:
        return slab
    # Numbers of voxels up to the next multiple of `patch`, along z, y, x
    padding = [-size % patch for size in slab.shape[2:]]
    if any(padding):
        # F.pad lists the axes from the last to the first, each with the padding before and after.
        slab = F.pad(slab, (0, padding[2], 0, padding[1], 0, padding[0]), mode="replicate")
    n, _, d, h, w = slab.shape
    patches = slab.reshape(n, d // patch, patch, h // patch, patch, w // patch, patch)
    # [N, D/p, p, H/p, p, W/p, p] -> [N, p, p, p, D/p, H/p, W/p] -> [N, p^3, D/p, H/p, W/p]
    return patches.permute(0, 2, 4, 6, 1, 3, 5).reshape(n, patch**3, d // patch, h // patch, w // patch)


READERS.add("sigma", lambda description: RewardModel(RewardArch.from_dict(description)))
