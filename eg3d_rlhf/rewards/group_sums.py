"""Group normalisation from sums over each channel's voxels: as a scale and a shift, and its gradients.

Letters: N samples, C channels, G groups.
"""

import torch
from torch import nn


def statistics(norm: nn.GroupNorm, sums: torch.Tensor, voxels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and inverse deviation [N, C] of each channel's group."""
    each = sums.shape[1] // norm.num_groups
    grouped = sums.unflatten(1, (norm.num_groups, -1)).sum(dim=2) / (voxels * each)  # [N, G, 2]
    mean = grouped[..., 0]
    inverse = (grouped[..., 1] - mean.square()).clamp_min(0).add(norm.eps).rsqrt()
    return mean.repeat_interleave(each, dim=1), inverse.repeat_interleave(each, dim=1)


def group_affine(norm: nn.GroupNorm, sums: torch.Tensor, voxels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Group normalisation as scale and shift [N, C] from sums [N, C, 2] float64 of values and squares over `voxels` per channel."""
    mean, inverse = statistics(norm, sums, voxels)
    scale = norm.weight.double() * inverse
    return scale.float(), (norm.bias.double() - mean * scale).float()


def group_gradient(norm: nn.GroupNorm, sums: torch.Tensor, arrived: torch.Tensor, voxels: int) -> torch.Tensor:
    """Its gradient as f0 g + f1 x + f2, [N, C, 3] float64; arrived: sums [N, C, 2] float64 of g and g x, g being the gradient that arrives.

    With x' = (x - mean) inverse and the means over a group: inverse (w g - mean(w g) - x' mean(w g x')).
    """
    mean, inverse = statistics(norm, sums, voxels)
    w, each = norm.weight.double(), sums.shape[1] // norm.num_groups

    def over_group(values: torch.Tensor) -> torch.Tensor:
        return values.unflatten(1, (norm.num_groups, -1)).mean(dim=2).repeat_interleave(each, dim=1) / voxels

    plain = over_group(w * arrived[..., 0])
    along = over_group(w * (arrived[..., 1] - mean * arrived[..., 0]) * inverse)
    slope = -inverse.square() * along
    return torch.stack([(w * inverse).expand_as(slope), slope, -inverse * plain - slope * mean], dim=2)


def group_weights(norm: nn.GroupNorm, sums: torch.Tensor, arrived: torch.Tensor, voxels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of its weight and bias [C]; arguments as above."""
    mean, inverse = statistics(norm, sums, voxels)
    return ((arrived[..., 1] - mean * arrived[..., 0]) * inverse).sum(dim=0).float(), arrived[..., 0].sum(dim=0).float()
