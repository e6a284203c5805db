"""A small, position-aware extractor for few labels: standardised voxels and their left-right difference through three strided convolutions.

Samples of one generator differ little from their mean, and pooling forgets where; with one or two thousand pairs it pays to hand the
network the deviation from the mean slab and to keep positions up to the first linear layer.

Shape letters: N slabs, C channels, D, H, W = z, y, x, M features.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

_FLOOR = 0.3  # smallest voxel deviation, as a share of the mean one: keeps empty voxels from being blown up


def strided_feature_size(channels: int, shape: Sequence[int]) -> int:
    """Length of the flattened features of `StridedConv3d`."""
    sides = [math.ceil(math.ceil((n // 2) / 2) / 2) for n in shape]
    return 4 * channels * math.prod(sides)


class StridedConv3d(nn.Module):
    """Two input channels (standardised slab, standardised |slab - mirrored slab|), three convolutions of stride 2, flattened.

    In eval mode the features of the slab and of its mirror image are averaged, so that a score does not depend on handedness; in training
    mode one of them is used (the training data are flipped at random instead) and features are dropped with probability `dropout`.
    """

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

    def _features(self, slab: torch.Tensor) -> torch.Tensor:
        difference = (slab - slab.flip(-1)).abs()
        channels = [(slab - self.slab_mean) / self.slab_scale, (difference - self.difference_mean) / self.difference_scale]
        x = torch.cat(channels, dim=1)  # [N, 2, D, H, W]
        for layer in (self.first, self.second, self.third):
            x = F.silu(layer(x))
        return self.dropout(x.flatten(1))

    def forward(self, slab: torch.Tensor) -> torch.Tensor:
        """slab [N, 1, D, H, W] in [0, 100] -> [N, M]. Differentiable in slab and parameters."""
        expected = tuple(self.slab_mean.shape)
        if tuple(slab.shape[2:]) != expected:
            got = list(slab.shape[2:])
            raise ValueError(f"StridedConv3d: expected slabs of {list(expected)} voxels, got {got}. Use the reward's own SlabSpec.")
        if self.training:
            return self._features(slab)
        return 0.5 * (self._features(slab) + self._features(slab.flip(-1)))
