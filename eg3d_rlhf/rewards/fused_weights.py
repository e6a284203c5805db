"""Gradients of a U-Net's weights from the volumes that the fused backward pass reads and writes; see `eg3d_rlhf.rewards.fused`.

Letters: N slabs, C channels, D, H, W = z, y, x.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from eg3d_rlhf.rewards.group_sums import group_affine, group_weights
from torch_utils.ops import volume_block as ops


class WeightGradients:
    """What a backward pass found, by parameter: the 3x3x3 kernels' where wanted, for they cost most, and all others'."""

    def __init__(self, wanted: Iterable[torch.Tensor]):
        self._wanted = set(wanted)
        self.found: dict[torch.Tensor, torch.Tensor] = {}

    def convolution(
        self, layer: Any, arrived: tuple[torch.Tensor, torch.Tensor, torch.Tensor], x: torch.Tensor, mix: torch.Tensor | None,
        sums: torch.Tensor, behind: torch.Tensor,
    ) -> None:
        """Of a normalised convolution (NormConv).

        Args: arrived: g, h and factors as `volume_conv_gradient` takes them; x: its input, or with mix [C, 2] the channel of which it is
        made; sums: of the input and its square; behind: what `volume_conv_gradient` returned.
        """
        norm, kernel, voxels = layer.groupnorm, layer.conv.weight, x[0, 0].numel()
        if kernel in self._wanted:
            scale, shift = group_affine(norm, sums, voxels)
            if mix is not None:
                scale, shift = scale * mix[:, 0], scale * mix[:, 1] + shift
            self.found[kernel] = ops.volume_conv_weight(*arrived, x, scale, shift)
        self.found[norm.weight], self.found[norm.bias] = group_weights(norm, sums, behind, voxels)

    def gates(self, module: Any, linear: list[torch.Tensor], gates: torch.Tensor) -> None:
        """Of both gates (ScSE): linear: those of cSE, in its order; gates: the sums of `volume_gate_gradient`."""
        self.found.update(zip(module.cSE.parameters(), linear, strict=True))
        layer, channels = module.sSE.conv, len(linear[0])
        whole = gates[:, channels:].sum(dim=0).float()
        self.found[layer.weight], self.found[layer.bias] = whole[:channels].view_as(layer.weight), whole[channels:]

    def pointwise(self, layer: Any, x: torch.Tensor, grad: torch.Tensor) -> None:
        """Of a 1x1x1 convolution of x, from the gradient of its result."""
        self.found[layer.weight] = torch.einsum("nov,ncv->oc", grad.flatten(2), x.flatten(2)).view_as(layer.weight)
        self.found[layer.bias] = grad.sum(dim=(0, 2, 3, 4))

    def upsampling(self, layer: nn.ConvTranspose3d, x: torch.Tensor, grad: torch.Tensor) -> None:
        """Of a transposed convolution of x, from the gradient of its result resampled."""
        if layer.weight in self._wanted:
            fine = [2 * n - 1 for n in x.shape[2:]]
            grad = torch.ops.aten.upsample_nearest3d_backward(grad, grad.shape[2:], [*grad.shape[:2], *fine])
            grad, x = (t.contiguous(memory_format=torch.channels_last_3d) for t in (grad, x))  # faster by more than it takes
            self.found[layer.weight] = torch.ops.aten.convolution_backward(
                grad, x, layer.weight, None, [2] * 3, [1] * 3, [1] * 3, True, [0] * 3, 1, [False, True, False]
            )[1]
