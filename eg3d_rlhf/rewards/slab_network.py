"""Networks that read σ slabs: the paper's 3-D U-Net, or strided convolutions for few labels.

Shape letters: N samples, C channels, D, H, W = z, y, x, M entries of a vector, p edge of a patch (see
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

# Least standard deviation of a voxel, as a share of the mean one. Without it, voxels that are always empty
# would be amplified.
_LEAST_SCALE = 0.3


class StridedConv3d(nn.Module):
    """Three convolutions of stride 2 on the standardised slab and |slab - mirrored slab|.

    Samples of one generator differ little from their mean, and pooling discards where they differ. With one
    or two thousand pairs, accuracy improves if the input is the difference from the mean slab, and if
    positions are kept up to the first linear layer.

    In eval mode, the features of the slab and of its mirror image are averaged, so a score does not change if
    a shape is mirrored. In training mode, only one of them is used (training data are flipped at random
    instead), and features are dropped with probability `dropout`.
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
        for name in ("slab", "difference"):
            self.register_buffer(f"{name}_mean", torch.zeros(shape))
            self.register_buffer(f"{name}_scale", torch.ones(shape))

    @torch.no_grad()
    def calibrate(self, slabs: torch.Tensor) -> None:
        """Set means and standard deviations per voxel from training slabs [N, 1, D, H, W]."""
        slabs = torch.cat([slabs[:, 0], slabs[:, 0].flip(-1)])  # makes the statistics symmetric
        for name, values in (("slab", slabs), ("difference", (slabs - slabs.flip(-1)).abs())):
            scale = values.std(dim=0)
            getattr(self, f"{name}_mean").copy_(values.mean(dim=0))
            # In place, because the values are buffers of the state dict.
            getattr(self, f"{name}_scale").copy_(scale.clamp_min(_LEAST_SCALE * float(scale.mean()) + 1e-6))

    def _features(self, slab: torch.Tensor, difference: torch.Tensor) -> torch.Tensor:
        """Return features [N, M] of slabs and differences, [N, 1, D, H, W] each."""
        channels = [
            (slab - self.slab_mean) / self.slab_scale,
            (difference - self.difference_mean) / self.difference_scale,
        ]
        x = torch.cat(channels, dim=1)  # [N, 2, D, H, W]
        for layer in (self.first, self.second, self.third):
            x = F.silu(layer(x))
        return self.dropout(x.flatten(1))

    def forward(self, slab: torch.Tensor) -> torch.Tensor:
        """Return features [N, M] of slabs [N, 1, D, H, W] in [0, 100].

        Differentiable in slab and parameters.
        """
        expected = tuple(self.slab_mean.shape)
        if tuple(slab.shape[2:]) != expected:
            got = list(slab.shape[2:])
            raise ValueError(
                f"StridedConv3d: expected slabs of {list(expected)} voxels, got {got}. Use the observation"
                " that is stored with the reward."
            )
        mirrored = slab.flip(-1)
        difference = (slab - mirrored).abs()  # symmetric, so it has no mirrored version of its own
        if self.training:
            return self._features(slab, difference)
        # One batch for both orientations, [2 N, ...]
        features = self._features(torch.cat([slab, mirrored]), torch.cat([difference, difference]))
        return 0.5 * (features[: len(slab)] + features[len(slab) :])


class RewardModel(RewardNetwork):
    """Reward network on slabs: U-Net or strided features, a trunk and three heads.

    Samples of a batch do not influence each other, because only group normalisation is used. A batch gives
    the same values as its samples one by one.
    Deviates: the published code loops over the samples. This class evaluates them together, with equal
        results.

    Args: arch: see RewardArch; the default is the paper's network with 12,686,699 parameters.
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
        """Return the JSON values of `arch`."""
        return self.arch.to_dict()

    def check(self, shape: Sequence[int]) -> None:
        """Raise ValueError if slabs of this shape cannot be read.

        The strided network reads one shape only.
        """
        if self.arch.extractor == "strided" and tuple(shape[1:]) != self.arch.slab_shape:
            raise ValueError(
                f"reward: expected slabs of {list(self.arch.slab_shape)} points, got {list(shape[1:])}. Use"
                " the resolution and crop with which the network was created."
            )

    def calibrate(self, take: Callable[[], torch.Tensor]) -> None:
        """Set means and standard deviations per voxel, if the network standardises its input."""
        if self.arch.extractor == "strided":
            self.extractor.calibrate(take())

    def _pooled(self, slab: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the U-Net's final maps [N, C, D/p, H/p, W/p], and the pooled features [N, M]."""
        arch = self.arch
        # [N, p^3, D/p, H/p, W/p]
        patches = self._patches(slab)
        final, bottleneck = (
            fused.maps(self, patches) if fused.is_supported(self, slab) else self.Conv3DModule(patches)
        )
        response = final[:, arch.recon_channels :]  # the channels before it are reconstructions
        if arch.pooling == "slice_max":
            return final, slice_max_feature(response, arch.pool_size)
        return final, torch.cat(
            [grid_feature(response, arch.final_cells), grid_feature(bottleneck, arch.bottleneck_cells)], dim=1
        )

    def _patches(self, slab: torch.Tensor) -> torch.Tensor:
        """Return the input of the U-Net, [N, p^3, D/p, H/p, W/p]."""
        arch = self.arch
        # Each level halves the sides, and the coarsest one must keep at least one voxel.
        if min(slab.shape[2:]) < arch.smallest_side:
            raise ValueError(
                f"RewardModel(slab): expected sides of at least {arch.smallest_side} voxels, got"
                f" {list(slab.shape[2:])}. Increase the slab's resolution, or use fewer feature_maps."
            )
        return to_patches(slab * arch.input_scale if arch.input_scale != 1 else slab, arch.patch)

    def features(self, observations: torch.Tensor) -> torch.Tensor:
        """Return the global feature vector before the trunk: slabs [N, 1, D, H, W] in [0, 100] -> [N, M]."""
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
        """Return features and the reconstruction [N, 1, D, H, W] of slabs, see `RewardNetwork`."""
        if self.arch.extractor == "strided":
            return super().reconstruct(observations)
        check_shape(
            "RewardModel(slab)",
            observations,
            ("N", 1, "D", "H", "W"),
            "Pass the result of the reward's observation.",
        )
        final, features = self._pooled(observations)
        # Maximum over channels, then a scalar affine, as published.
        out = final[:, : self.arch.recon_channels].max(dim=1, keepdim=True).values
        affine = self.Conv3DModule.conv3d_for_recon
        out = fused.pointwise(affine, out) if fused.is_supported(self, observations) else affine(out)
        if self.arch.patch > 1:
            out = F.interpolate(out, scale_factor=self.arch.patch, mode="nearest")
        # Cut off what `to_patches` padded.
        d, h, w = observations.shape[2:]
        return features, out[:, :, :d, :h, :w]


def to_patches(slab: torch.Tensor, patch: int) -> torch.Tensor:
    """Cut slabs [N, 1, D, H, W] into patches whose voxels become channels, [N, patch^3, D/p, H/p, W/p].

    If a side is not a multiple of `patch`, its last values are repeated.
    """
    if patch == 1:
        return slab
    missing = [-size % patch for size in slab.shape[2:]]
    if any(missing):
        # F.pad counts axes from the last one.
        slab = F.pad(slab, (0, missing[2], 0, missing[1], 0, missing[0]), mode="replicate")
    n, _, d, h, w = slab.shape
    cut = slab.reshape(n, d // patch, patch, h // patch, patch, w // patch, patch)
    # [N, D/p, p, H/p, p, W/p, p] -> [N, p, p, p, D/p, H/p, W/p] -> [N, p^3, D/p, H/p, W/p]
    return cut.permute(0, 2, 4, 6, 1, 3, 5).reshape(n, patch**3, d // patch, h // patch, w // patch)


READERS.add("sigma", lambda description: RewardModel(RewardArch.from_dict(description)))
