"""A reward's score without gradients, arranged for many slabs: on a CPU the U-Net runs through fused ops, elsewhere as it is.

Group normalisation is a scale and a shift per sample and channel once the sums are known, and these come out of the pass before: every
volume is written once and read once, in memory that is kept. Equal to `reward.score` up to rounding.

Letters: N slabs, C channels, G groups, D, H, W = z, y, x.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from eg3d_rlhf.attribution.shapley import Score
from eg3d_rlhf.reward.evaluation import Network
from eg3d_rlhf.reward.model import RewardModel, grid_feature, slice_windows, to_patches
from eg3d_rlhf.reward.unet3d import NormConv, ResidualBlock
from torch_utils.ops.volume_block import transformed_kernel, transposed_kernel, volume_conv, volume_gate, volume_profile, volume_up

_VOXELS = 1 << 21  # of slabs that go through the fused network at once; more only take memory


def fast_score(reward: Network) -> Score:
    """A function of slabs [B, 1, D, H, W] that gives the reward's scores [B]; not differentiable."""
    fused: Callable[[torch.Tensor], torch.Tensor] | None = None
    if isinstance(reward, RewardModel) and reward.arch.extractor == "strided":
        fused = partial(_strided_score, reward)
    elif isinstance(reward, RewardModel) and next(reward.parameters()).device.type == "cpu":
        fused = FusedReward(reward)

    @torch.no_grad()
    def score(slabs: torch.Tensor) -> torch.Tensor:
        if fused is None:
            return reward.score(slabs)
        at_once = max(1, _VOXELS // slabs[0].numel())
        return torch.cat([fused(part) for part in slabs.split(at_once)])

    return score


class FusedReward:
    """The score of a U-Net reward through `volume_block`. The weights are those of construction: transformed kernels are kept."""

    def __init__(self, reward: RewardModel):
        self.reward: Any = reward  # whose parts torch types as tensors or modules
        self.memory: dict[str, torch.Tensor] = {}
        self.kernels: dict[torch.nn.Module, torch.Tensor] = {}
        for module in reward.modules():
            if isinstance(module, NormConv) and module.conv.weight.shape[0] % 8 == 0:
                self.kernels[module] = transformed_kernel(module.conv.weight)
            elif isinstance(module, torch.nn.ConvTranspose3d) and module.weight.shape[1] % 8 == 0:
                self.kernels[module] = transposed_kernel(module.weight)

    @torch.no_grad()
    def __call__(self, slabs: torch.Tensor) -> torch.Tensor:
        """Rewards [N] of slabs [N, 1, D, H, W]."""
        arch, net = self.reward.arch, self.reward.Conv3DModule
        x = to_patches(slabs * arch.input_scale if arch.input_scale != 1 else slabs, arch.patch)
        skips = []
        for level, encoder in enumerate(net.encoders):
            body = self._one_channel if x.shape[1] == 1 else self._encode
            whole, pooled = self._gated(*body(encoder.basic_module, x), pool=level + 1 < len(net.encoders))
            skips.append(whole)
            x = whole if pooled is None else pooled
        x = bottleneck = skips.pop()
        last: Any = None
        for decoder in net.decoders:
            up = decoder.upsampling.upsample.conv_transposed
            x, skip = x if last is None else self._gated(*last)[0], skips.pop()
            last = self._body(decoder.basic_module, *volume_up(skip, x, up.weight, self.kernels.get(up), out=skip))
        return self.reward.score_embedding(self.reward.MLP(self._feature(last, bottleneck)))

    def _encode(self, block: ResidualBlock, x: torch.Tensor) -> tuple[ResidualBlock, torch.Tensor, torch.Tensor]:
        r = block.conv1(x)
        return self._body(block, r, _sums(*_moments(r), r[0, 0].numel()))

    def _one_channel(self, block: Any, x: torch.Tensor) -> tuple[ResidualBlock, torch.Tensor, torch.Tensor]:
        """A block whose conv1 reads one channel: r_c = w_c x + b_c, so its normalisation is an affine function of x as well.

        conv2 of C such channels is a convolution of two: the standardised slab, and ones, which feel the zeros outside.
        """
        w, b = block.conv1.weight.reshape(1, -1).double(), block.conv1.bias[None].double()
        mean, variance = _moments(x)  # [N, 1]
        deviation = variance.sqrt().clamp_min(1e-12)
        sums = _sums(mean * w + b, variance * w.square(), x[0, 0].numel())
        scale, shift = (v.double() for v in group_affine(block.conv2.groupnorm, sums, x[0, 0].numel()))  # [N, C]
        factors = torch.stack([scale * w * deviation, scale * (w * mean + b) + shift], dim=2)  # [N, C, 2]
        kernel = torch.einsum("oczyx,nck->nokzyx", block.conv2.conv.weight.double(), factors).float()
        inverse = 1 / deviation
        scale = torch.cat([inverse, torch.zeros_like(inverse)], dim=1).float()
        shift = torch.cat([-mean * inverse, torch.ones_like(inverse)], dim=1).float()
        h, sums = volume_conv(x, scale, shift, kernel, relu=True, out=self._memory("inner", x, w.shape[1]))
        mix = torch.cat([w, b]).T.float().contiguous()  # [C, 2]
        return self._end(block, h, sums, residual=x, mix=mix, out=self._memory("outer", x, w.shape[1]))

    def _body(self, block: Any, r: torch.Tensor, sums: torch.Tensor) -> tuple[ResidualBlock, torch.Tensor, torch.Tensor]:
        """h before its gates, with the channel gate [N, C]; r with its sums is the block's residual."""
        h, sums = self._conv(block.conv2, r, sums, out=self._memory("inner", r, r.shape[1]))
        return self._end(block, h, sums, residual=r, out=r)

    def _memory(self, role: str, like: torch.Tensor, channels: int) -> torch.Tensor:
        """Memory that the next slabs use again: the system takes as long to hand out new pages as a pass over them."""
        shape = (len(like), channels, *like.shape[2:])
        if self.memory.get(role) is None or self.memory[role].numel() < math.prod(shape):
            self.memory[role] = like.new_empty(math.prod(shape))
        return self.memory[role][: math.prod(shape)].view(shape)

    def _end(
        self, block: Any, h: torch.Tensor, sums: torch.Tensor, **residual
    ) -> tuple[ResidualBlock, torch.Tensor, torch.Tensor]:
        h, sums = self._conv(block.conv3, h, sums, **residual)
        squeezed, gate = (sums[..., 0] / h[0, 0].numel()).float(), block.se_module.cSE
        return block, h, torch.sigmoid(gate.fc2(F.relu(gate.fc1(squeezed))))

    def _conv(self, layer: NormConv, x: torch.Tensor, sums: torch.Tensor, **residual) -> tuple[torch.Tensor, torch.Tensor]:
        scale, shift = group_affine(layer.groupnorm, sums, x[0, 0].numel())
        return volume_conv(x, scale, shift, layer.conv.weight, self.kernels.get(layer), relu=True, **residual)

    def _gated(
        self, block: Any, h: torch.Tensor, gate: torch.Tensor, pool: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The block's result, in the memory of h, and its maxima over 2^3 voxels."""
        spatial = block.se_module.sSE.conv
        return volume_gate(h, gate, spatial.weight.flatten(), spatial.bias, out=h, pool=pool)

    def _feature(self, last: tuple, bottleneck: torch.Tensor) -> torch.Tensor:
        """The pooled feature, from the response channels of the final convolution alone."""
        arch, final = self.reward.arch, self.reward.Conv3DModule.final_conv
        weight, bias = final.weight[arch.recon_channels :, :, 0, 0, 0], final.bias[arch.recon_channels :]
        if arch.pooling == "slice_max":
            block, h, gate = last
            spatial = block.se_module.sSE.conv
            profile = volume_profile(h, gate, spatial.weight.flatten(), spatial.bias, weight, bias)
            return profile[:, slice_windows(profile.shape[1], arch.pool_size)].amax(dim=2)
        response = F.conv3d(self._gated(*last)[0], weight[..., None, None, None], bias)
        return torch.cat([grid_feature(response, arch.final_cells), grid_feature(bottleneck, arch.bottleneck_cells)], dim=1)


def _strided_score(reward: RewardModel, slabs: torch.Tensor) -> torch.Tensor:
    """`score` of the strided extractor in eval mode with one mirroring: the slab and its mirror image have the same difference channel."""
    net: Any = reward.extractor
    mirrored = slabs.flip(-1)
    difference = ((slabs - mirrored).abs() - net.difference_mean) / net.difference_scale
    x = torch.cat([torch.cat([(s - net.slab_mean) / net.slab_scale, difference], dim=1) for s in (slabs, mirrored)])  # [2N, 2, D, H, W]
    for layer in (net.first, net.second, net.third):
        x = F.silu(layer(x))
    first, second = x.flatten(1).chunk(2)
    return reward.score_embedding(reward.MLP(0.5 * (first + second)))


def _moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance [N, C] float64 over the volume."""
    flat = x.flatten(2)
    mean = flat.mean(dim=2, keepdim=True)
    centred = flat - mean
    return mean[..., 0].double(), torch.einsum("ncv,ncv->nc", centred, centred).double() / flat.shape[2]


def _sums(mean: torch.Tensor, variance: torch.Tensor, voxels: int) -> torch.Tensor:
    """Sums [N, C, 2] of values and squares."""
    return torch.stack([mean, variance + mean.square()], dim=2) * voxels


def group_affine(norm: torch.nn.GroupNorm, sums: torch.Tensor, voxels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Group normalisation as scale and shift [N, C] from sums [N, C, 2] float64 of values and squares over `voxels` per channel."""
    grouped = sums.unflatten(1, (norm.num_groups, -1)).sum(dim=2) / (voxels * (sums.shape[1] // norm.num_groups))  # [N, G, 2]
    mean = grouped[..., 0]
    inverse = (grouped[..., 1] - mean.square()).clamp_min(0).add(norm.eps).rsqrt()
    mean, inverse = (v.repeat_interleave(sums.shape[1] // norm.num_groups, dim=1) for v in (mean, inverse))
    scale = norm.weight.double() * inverse
    return scale.float(), (norm.bias.double() - mean * scale).float()
