"""The networks that read σ slabs: a 3-D U-Net (the paper's), or three strided convolutions where labels are
few.

Shape letters: N samples, C channels, D, H, W = z, y, x, M entries of a vector (see eg3d_rlhf/core/shapes.py).
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

_FLOOR = 0.3  # smallest voxel deviation, as a share of the mean one: keeps empty voxels from being blown up


class StridedConv3d(nn.Module):
    """Two input channels (standardised slab, standardised |slab - mirrored slab|), three convolutions of
    stride 2, flattened.

    Samples of one generator differ little from their mean, and pooling forgets where; with one or two
    thousand pairs it pays to hand the network the deviation from the mean slab and to keep positions up to
    the first linear layer.

    In eval mode the features of the slab and of its mirror image are averaged, so that a score does not
    depend on handedness; in training mode one of them is used (the training data are flipped at random
    instead) and features are dropped with probability `dropout`.
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
        """Set means and deviations per voxel from training slabs [N, 1, D, H, W]."""
        slabs = torch.cat([slabs[:, 0], slabs[:, 0].flip(-1)])  # symmetric statistics
        for name, values in (("slab", slabs), ("difference", (slabs - slabs.flip(-1)).abs())):
            scale = values.std(dim=0)
            getattr(self, f"{name}_mean").copy_(values.mean(dim=0))
            getattr(self, f"{name}_scale").copy_(scale.clamp_min(_FLOOR * float(scale.mean()) + 1e-6))

    def _features(self, slab: torch.Tensor, difference: torch.Tensor) -> torch.Tensor:
        channels = [
            (slab - self.slab_mean) / self.slab_scale,
            (difference - self.difference_mean) / self.difference_scale,
        ]
        x = torch.cat(channels, dim=1)  # [N, 2, D, H, W]
        for layer in (self.first, self.second, self.third):
            x = F.silu(layer(x))
        return self.dropout(x.flatten(1))

    def forward(self, slab: torch.Tensor) -> torch.Tensor:
        """slab [N, 1, D, H, W] in [0, 100] -> [N, M]. Differentiable in slab and parameters."""
        expected = tuple(self.slab_mean.shape)
        if tuple(slab.shape[2:]) != expected:
            got = list(slab.shape[2:])
            raise ValueError(
                f"StridedConv3d: expected slabs of {list(expected)} voxels, got {got}. Use the reward's own"
                " SlabSpec."
            )
        mirrored = slab.flip(-1)
        difference = (slab - mirrored).abs()  # its mirror image is itself
        if self.training:
            return self._features(slab, difference)
        both = self._features(torch.cat([slab, mirrored]), torch.cat([difference, difference]))
        return 0.5 * (both[: len(slab)] + both[len(slab) :])


class RewardModel(RewardNetwork):
    """U-Net features, a trunk MLP and three heads; `score` is the reward used downstream.

    The samples of a batch never influence each other (group normalisation only), so a batch equals its items
    one by one.
    Deviates: published code loops over the batch; this runs it at once, with equal results.

    Args: `arch`, see RewardArch; the default is the paper's network, 12,686,699 parameters.
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
        return self.arch.to_dict()

    def check(self, shape: Sequence[int]) -> None:
        """The strided network reads one shape, a U-Net any that its levels can halve."""
        if self.arch.extractor == "strided" and tuple(shape[1:]) != self.arch.slab_shape:
            raise ValueError(
                f"reward: expected slabs of {list(self.arch.slab_shape)} points, got {list(shape[1:])}. Use"
                " its own crop."
            )

    def calibrate(self, take: Callable[[], torch.Tensor]) -> None:
        """Means and deviations per voxel, where the network standardises."""
        if self.arch.extractor == "strided":
            self.extractor.calibrate(take())

    def _pooled(self, slab: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Final maps of the U-Net [N, C, D/p, H/p, W/p], and the features pooled from them and the coarsest
        ones.
        """
        arch = self.arch
        patches = self._patches(slab)
        final, bottleneck = (
            fused.maps(self, patches) if fused.applies(self, slab) else self.Conv3DModule(patches)
        )
        response = final[:, arch.recon_channels :]
        if arch.pooling == "slice_max":
            return final, slice_max_feature(response, arch.pool_size)
        return final, torch.cat(
            [grid_feature(response, arch.final_cells), grid_feature(bottleneck, arch.bottleneck_cells)], dim=1
        )

    def _patches(self, slab: torch.Tensor) -> torch.Tensor:
        """What the U-Net reads, [N, p^3, D/p, H/p, W/p]."""
        arch = self.arch
        if min(slab.shape[2:]) < arch.smallest_side:
            raise ValueError(
                f"RewardModel(slab): expected sides of at least {arch.smallest_side} voxels, got"
                f" {list(slab.shape[2:])}. Raise the slab's resolution or use fewer feature_maps."
            )
        return to_patches(slab * arch.input_scale if arch.input_scale != 1 else slab, arch.patch)

    def features(self, observed: torch.Tensor) -> torch.Tensor:
        """Global feature vector before the trunk: slab [N, 1, D, H, W] in [0, 100] ->
        [N, arch.feature_size].
        """
        check_shape(
            "RewardModel(slab)", observed, ("N", 1, "D", "H", "W"), "Pass what its observation gives."
        )
        if self.arch.extractor == "strided":
            return self.extractor(observed)
        if fused.applies(self, observed) and not fused.learns(self):
            return fused.features(self, self._patches(observed))
        return self._pooled(observed)[1]

    def reconstruct(self, observed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `RewardNetwork`: slab [N, 1, D, H, W] -> features, reconstruction [N, 1, D, H, W]."""
        if self.arch.extractor == "strided":
            return super().reconstruct(observed)
        check_shape(
            "RewardModel(slab)", observed, ("N", 1, "D", "H", "W"), "Pass what its observation gives."
        )
        final, features = self._pooled(observed)
        out = final[:, : self.arch.recon_channels].max(dim=1, keepdim=True).values
        affine = self.Conv3DModule.conv3d_for_recon
        out = fused.pointwise(affine, out) if fused.applies(self, observed) else affine(out)
        if self.arch.patch > 1:
            out = F.interpolate(out, scale_factor=self.arch.patch, mode="nearest")
        d, h, w = observed.shape[2:]
        return features, out[:, :, :d, :h, :w]


def to_patches(slab: torch.Tensor, patch: int) -> torch.Tensor:
    """Cut [N, 1, D, H, W] into patch^3 channels, [N, patch^3, D/p, H/p, W/p]; a short last patch repeats its
    edge.
    """
    if patch == 1:
        return slab
    missing = [-size % patch for size in slab.shape[2:]]
    if any(missing):
        slab = F.pad(slab, (0, missing[2], 0, missing[1], 0, missing[0]), mode="replicate")
    n, _, d, h, w = slab.shape
    cut = slab.reshape(n, d // patch, patch, h // patch, patch, w // patch, patch)
    return cut.permute(0, 2, 4, 6, 1, 3, 5).reshape(n, patch**3, d // patch, h // patch, w // patch)


READERS.add("sigma", lambda description: RewardModel(RewardArch.from_dict(description)))
