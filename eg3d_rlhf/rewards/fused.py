"""Compute a U-Net reward and its gradients with respect to slab and weights by fused operators on a CPU.

A slab is a cropped density grid. The results equal the results of the network's own modules (`unet3d.py`) up
to rounding. Group normalisation multiplies by a scale and adds a shift, per sample and channel, once the sums
of values and of squares are known. The operator before the normalisation computes these sums, so that every
volume is written once and read once. The backward pass is written by hand (`torch_utils.ops.volume_block`).
For the backward pass, a block stores its input, the volume between its convolutions, and the input of its
gates. It stores no volume after a normalisation, an activation or a gate.

Shapes: N slabs, C input channels, O output channels, M features, R responses, G groups, D, H, W = grid points
along z, y, x. In names and formulas, r is a block's residual, h the volume before its gates, and g the
gradient of the loss with respect to a result.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn

from eg3d_rlhf.rewards.unet3d import grid_feature, slice_windows
from torch_utils.ops import volume_block as ops
from torch_utils.ops.implementations import once

if TYPE_CHECKING:
    from eg3d_rlhf.rewards.slab_network import RewardModel

# Gradients of a U-Net's weights, computed from the volumes that the backward pass reads and writes. The
# arguments of the operators are described in torch_utils/ops/volume_block.py.


class WeightGradients:
    """Gradients by parameter, collected during a backward pass.

    Gradients of 3x3x3 kernels are computed only if they were requested, because they are the most expensive
    ones. The gradients of all other weights are always computed.

    Args: requested_parameters: parameters whose gradients are needed.
    """

    def __init__(self, requested_parameters: Iterable[torch.Tensor]):
        self._requested_parameters = set(requested_parameters)
        self.gradients: dict[torch.Tensor, torch.Tensor] = {}

    def convolution(
        self,
        layer: Any,
        result_gradient: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        x: torch.Tensor,
        channel_mix: torch.Tensor | None,
        sums: torch.Tensor,
        grad_sums: torch.Tensor,
    ) -> None:
        """Compute and store the gradients of a `NormConv`: of its kernel, and of its group normalisation.

        The gradient of the kernel is computed only if it was requested.

        Args:
            layer: the `NormConv`.
            result_gradient: tensors g [N, O, D, H, W], h [N, O, D, H, W] and f [N, O, 3]. The gradient of the
                convolution's result is f0 g + f1 h + f2 where h > 0, and 0 elsewhere.
            x: input [N, C, D, H, W] if `channel_mix` is None, otherwise the one channel [N, 1, D, H, W] from
                which the input is made.
            channel_mix: [C, 2]: channel c of the input is mix[c, 0] x + mix[c, 1]; None if x is the input.
            sums: sums [N, C, 2] of the input and of its square over the voxels.
            grad_sums: sums [N, C, 2] over the voxels of y and of y * input, where y is the gradient of the
                normalised input.
        """
        norm = layer.groupnorm
        kernel = layer.conv.weight
        voxel_count = x[0, 0].numel()
        if kernel in self._requested_parameters:
            scale, shift = group_affine(norm, sums, voxel_count)
            # The normalised input is scale * input + shift, and the input is mix[:, 0] x + mix[:, 1], so both
            # maps are combined into one scale and one shift of x.
            if channel_mix is not None:
                scale, shift = scale * channel_mix[:, 0], scale * channel_mix[:, 1] + shift
            self.gradients[kernel] = ops.volume_conv_weight(*result_gradient, x, scale, shift)
        self.gradients[norm.weight], self.gradients[norm.bias] = group_weights(
            norm, sums, grad_sums, voxel_count
        )

    def gates(self, module: Any, linear_gradients: list[torch.Tensor], gate_sums: torch.Tensor) -> None:
        """Store the gradients of the parameters of the channel gate and of the voxel gate.

        Args:
            module: the `ScSE` with both gates.
            linear_gradients: gradients of the parameters of the channel gate (cSE), in the order of its
                parameters.
            gate_sums: gradient sums [N, 2 C + 1] that `volume_gate_gradient` returned.
        """
        self.gradients.update(zip(module.cSE.parameters(), linear_gradients, strict=True))
        layer = module.sSE.conv
        channels = len(linear_gradients[0])
        # The first C sums belong to the channel gate. C sums for the weights of the voxel gate and one sum
        # for its bias follow.
        spatial_sums = gate_sums[:, channels:].sum(dim=0).float()  # [C + 1]
        self.gradients[layer.weight] = spatial_sums[:channels].view_as(layer.weight)
        self.gradients[layer.bias] = spatial_sums[channels:]

    def pointwise(self, layer: Any, x: torch.Tensor, grad: torch.Tensor) -> None:
        """Compute and store the gradients of a 1x1x1 convolution with bias.

        Args:
            layer: the convolution.
            x: its input [N, C, D, H, W].
            grad: gradient [N, O, D, H, W] of its result.
        """
        self.gradients[layer.weight] = torch.einsum("nov,ncv->oc", grad.flatten(2), x.flatten(2)).view_as(
            layer.weight
        )
        self.gradients[layer.bias] = grad.sum(dim=(0, 2, 3, 4))

    def upsampling(self, layer: nn.ConvTranspose3d, x: torch.Tensor, grad: torch.Tensor) -> None:
        """Compute and store the gradient of a transposed convolution, if it was requested.

        Args:
            layer: the transposed convolution.
            x: its input [N, C, d, h, w].
            grad: gradient [N, O, D, H, W] of its result after the resampling to the size of the skip
                connection.
        """
        if layer.weight in self._requested_parameters:
            # The convolution turns n voxels per axis into 2 n - 1. Afterwards its result was resampled to the
            # skip connection's size, so the gradient is resampled back first.
            result_size = [2 * n - 1 for n in x.shape[2:]]
            grad = torch.ops.aten.upsample_nearest3d_backward(
                grad, grad.shape[2:], [*grad.shape[:2], *result_size]
            )
            # The convolution is faster in this layout, by more than the conversion takes.
            grad = grad.contiguous(memory_format=torch.channels_last_3d)
            x = x.contiguous(memory_format=torch.channels_last_3d)
            # In this order: bias sizes, stride, padding, dilation, transposed, output padding, groups, and a
            # mask that requests only the second of three gradients (input, weights, bias).
            self.gradients[layer.weight] = torch.ops.aten.convolution_backward(
                grad, x, layer.weight, None, [2] * 3, [1] * 3, [1] * 3, True, [0] * 3, 1, [False, True, False]
            )[1]


# Group normalisation, written as a scale and a shift from sums over each channel's voxels, and its gradients.


def statistics(norm: nn.GroupNorm, sums: torch.Tensor, voxel_count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean and the inverse standard deviation of each channel's group, [N, C] each, in float64.

    Args:
        norm: the group normalisation.
        sums: float64 [N, C, 2], sums of the values and of their squares over the voxels of each channel.
        voxel_count: number of voxels per channel.
    """
    channels_per_group = sums.shape[1] // norm.num_groups
    # [N, G, 2]: means of the values and of their squares over each group
    group_means = sums.unflatten(1, (norm.num_groups, -1)).sum(dim=2) / (voxel_count * channels_per_group)
    mean = group_means[..., 0]
    # The variance E[x^2] - mean^2 can become slightly negative by rounding.
    inverse_std = (group_means[..., 1] - mean.square()).clamp_min(0).add(norm.eps).rsqrt()
    return (
        mean.repeat_interleave(channels_per_group, dim=1),
        inverse_std.repeat_interleave(channels_per_group, dim=1),
    )


def group_affine(
    norm: nn.GroupNorm, sums: torch.Tensor, voxel_count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scale and the shift of a group normalisation, float32 [N, C] each.

    The normalised values are scale * x + shift.

    Args:
        norm: the group normalisation.
        sums: float64 [N, C, 2], sums of the values and of their squares over the voxels of each channel.
        voxel_count: number of voxels per channel.
    """
    mean, inverse_std = statistics(norm, sums, voxel_count)
    scale = norm.weight.double() * inverse_std
    return scale.float(), (norm.bias.double() - mean * scale).float()


def group_gradient(
    norm: nn.GroupNorm, sums: torch.Tensor, grad_sums: torch.Tensor, voxel_count: int
) -> torch.Tensor:
    """Return the factors (f0, f1, f2) of the gradient of a group normalisation: float64 [N, C, 3].

    The gradient with respect to the input x is f0 g + f1 x + f2, where g is the gradient of the result. With
    the inverse standard deviation s, the standardised input x' = (x - mean) s, the weight w, and means over a
    group, this gradient is s (w g - mean(w g) - x' mean(w g x')).

    Args:
        norm: the group normalisation.
        sums: float64 [N, C, 2], sums of x and of x^2 over the voxels of each channel.
        grad_sums: float64 [N, C, 2], sums of g and of g x over the voxels of each channel.
        voxel_count: number of voxels per channel.
    """
    mean, inverse_std = statistics(norm, sums, voxel_count)
    w = norm.weight.double()
    channels_per_group = sums.shape[1] // norm.num_groups

    def group_mean(voxel_sums: torch.Tensor) -> torch.Tensor:
        """Return the mean of each channel's group, [N, C], from sums [N, C] over each channel's voxels."""
        channel_mean = voxel_sums.unflatten(1, (norm.num_groups, -1)).mean(dim=2)
        return channel_mean.repeat_interleave(channels_per_group, dim=1) / voxel_count

    mean_wg = group_mean(w * grad_sums[..., 0])  # mean(w g)
    # The sum of g x' over voxels is s (sum of g x - mean * sum of g).
    mean_wgx = group_mean(w * (grad_sums[..., 1] - mean * grad_sums[..., 0]) * inverse_std)  # mean(w g x')
    f0 = w * inverse_std
    f1 = -inverse_std.square() * mean_wgx
    # f2 collects the terms without g and x.
    f2 = -inverse_std * mean_wg - f1 * mean
    return torch.stack([f0.expand_as(f1), f1, f2], dim=2)


def group_weights(
    norm: nn.GroupNorm, sums: torch.Tensor, grad_sums: torch.Tensor, voxel_count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of the weight and of the bias of a group normalisation, float32 [C] each.

    Args:
        norm: the group normalisation.
        sums: float64 [N, C, 2], sums of the input x and of x^2 over the voxels of each channel.
        grad_sums: float64 [N, C, 2], sums of g and of g x over the voxels, with the result's gradient g.
        voxel_count: number of voxels per channel.
    """
    mean, inverse_std = statistics(norm, sums, voxel_count)
    # Sum of g x' over voxels and samples, with the standardised input x'
    weight_gradient = ((grad_sums[..., 1] - mean * grad_sums[..., 0]) * inverse_std).sum(dim=0)
    bias_gradient = grad_sums[..., 0].sum(dim=0)
    return weight_gradient.float(), bias_gradient.float()


_LANES = 8  # number of channels that the operators process at a time
# Number of voxels that are evaluated at once without gradients; more voxels need memory and save no time
_VOXELS = 1 << 21
# Weights in the layout of the operators, by layer and role. Each entry also holds the address and the version
# of the weights from which it was made.
_kernels: "WeakKeyDictionary[nn.Module, dict[str, tuple[int, int, torch.Tensor]]]" = WeakKeyDictionary()


def is_supported(model: "RewardModel", slab: torch.Tensor) -> bool:
    """Return True if the fused operators can compute this network for slabs such as `slab`.

    The operators need float32 on a CPU, numbers of channels that are multiples of 8, and the compiled
    extension.
    """
    if (
        slab.device.type != "cpu"
        or slab.dtype != torch.float32
        or any(c % _LANES for c in model.arch.feature_maps)
    ):
        return False
    # The type of the weights may differ from the slab's. `differentiable` checks that the compiled operators
    # are installed.
    return next(model.parameters()).dtype == torch.float32 and ops.differentiable()


def needs_weight_gradients(model: "RewardModel") -> bool:
    """Return True if autograd needs gradients with respect to the U-Net's weights."""
    return torch.is_grad_enabled() and any(p.requires_grad for p in model.Conv3DModule.parameters())


def features(model: "RewardModel", slab: torch.Tensor) -> torch.Tensor:
    """Compute the features [N, M] of slabs. Differentiable once, in the slab.

    The gradients of the weights are not computed.

    Args:
        model: reward network with a U-Net.
        slab: slabs [N, C, D, H, W], whose channels are the voxels of patches, see `to_patches`.
    """
    if torch.is_grad_enabled() and slab.requires_grad:
        return _Features.apply(slab, model)
    slabs_at_once = max(1, _VOXELS // slab[0, 0].numel())
    return torch.cat(
        [_Pass(model, stores_volumes=False).features(batch) for batch in slab.split(slabs_at_once)]
    )


def maps(model: "RewardModel", slab: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the U-Net's final maps and its coarsest volume, as `UNet3d.forward` does.

    Differentiable once, in the slab and the weights.

    Args:
        model: reward network with a U-Net.
        slab: slabs [N, C, D, H, W], whose channels are the voxels of patches, see `to_patches`.
    """
    net = model.Conv3DModule
    weights = [*net.encoders.parameters(), *net.decoders.parameters()]
    last_volume, coarsest = _Maps.apply(slab, model, torch.is_grad_enabled(), *weights)
    # The final convolution stays outside, so that autograd gives the gradients of its weights.
    return pointwise(net.final_conv, last_volume), coarsest


def pointwise(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Apply a 1x1x1 convolution with bias as a matrix product: [N, C, D, H, W] -> [N, O, D, H, W].

    Differentiable in the input, the weights and the bias.
    """
    # [N, O, C], without a copy
    weight = layer.weight.flatten(1).expand(len(x), -1, -1)
    return torch.baddbmm(layer.bias[:, None], weight, x.flatten(2)).unflatten(2, x.shape[2:])


class _Features(torch.autograd.Function):
    """Autograd function that computes the features of a network whose weights need no gradient."""

    @staticmethod
    def forward(ctx, slab, model):
        """Compute the features [N, M] of the slab."""
        ctx.run = _Pass(model, stores_volumes=True)
        return ctx.run.features(slab.detach())

    @staticmethod
    @once("reward")
    def backward(ctx, grad):
        """Compute the gradient of the slab; the model gets None."""
        return ctx.run.gradient(grad), None


class _Maps(torch.autograd.Function):
    """Autograd function that computes the U-Net's last volume after its gates, and its coarsest volume."""

    @staticmethod
    def forward(ctx, slab, model, stores_volumes, *weights):
        """Compute the two volumes; `weights` are arguments so that autograd requests their gradients."""
        # torch raises an error in the backward pass if a saved tensor was changed in between.
        ctx.save_for_backward(*weights)
        # The gradient of a volume that the loss does not use is then None instead of zeros.
        ctx.set_materialize_grads(False)
        ctx.run = _Pass(model, stores_volumes, trains_weights=stores_volumes)
        return ctx.run.maps(slab.detach())

    @staticmethod
    @once("reward")
    def backward(ctx, last_gradient, coarsest_gradient):
        """Compute the gradients of the slab and of the weights."""
        weights = ctx.saved_tensors
        is_gradient_needed = ctx.needs_input_grad
        # The first three arguments of `forward` are no weights.
        weight_gradients = WeightGradients(
            w for w, is_requested in zip(weights, is_gradient_needed[3:], strict=True) if is_requested
        )
        slab_gradient = ctx.run.gradient_of_maps(last_gradient, coarsest_gradient, weight_gradients)
        # One result per argument of `forward`: slab, model, stores_volumes, weights.
        return (
            slab_gradient if is_gradient_needed[0] else None,
            None,
            None,
            *(weight_gradients.gradients.get(w) for w in weights),
        )


@dataclass
class _Block:
    """Volumes and sums of a residual block that its backward pass reads."""

    module: Any  # the ResidualBlock; `Any`, since torch types its parts as tensors or modules
    r: torch.Tensor  # residual [N, C, D, H, W], or the one channel [N, 1, D, H, W] from which it is made
    mix: torch.Tensor | None  # [C, 2]: channel c of the residual is mix[c, 0] r + mix[c, 1]
    r_sums: torch.Tensor  # sums [N, C, 2] of the residual and of its square
    inner_volume: torch.Tensor  # volume between the convolutions [N, C, D, H, W]
    inner_sums: torch.Tensor  # sums [N, C, 2] of inner_volume and of its square
    h: torch.Tensor  # volume before the gates [N, C, D, H, W]
    channel_means: torch.Tensor  # means of h over the voxels, [N, C]
    gate: torch.Tensor  # channel gate [N, C]
    layer_input: Any = None  # input of the layer before r, if that layer's weights are trained

    def spatial(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weights [C] and bias [1] of the voxel gate."""
        layer = self.module.se_module.sSE.conv
        return layer.weight.detach().flatten(), layer.bias.detach()


class _Pass:
    """One forward pass of a U-Net and, if its volumes are stored, its backward pass.

    Args:
        model: reward network.
        stores_volumes: store the volumes for a backward pass.
        trains_weights: store also the inputs that the gradients of the weights need.
    """

    def __init__(self, model: "RewardModel", stores_volumes: bool, trains_weights: bool = False):
        self.arch = model.arch
        self.net = model.Conv3DModule
        self.stores_volumes = stores_volumes
        self.trains_weights = trains_weights
        self.encoder_blocks: list[_Block] = []  # from the finest to the coarsest
        self.decoder_blocks: list[_Block] = []  # from the coarsest to the finest
        self.buffers: dict[str, torch.Tensor] = {}  # reused memory by role

    @torch.no_grad()
    def features(self, slab: torch.Tensor) -> torch.Tensor:
        """Compute the features [N, M] of the slab."""
        return self._pool(self._run_blocks(slab))

    @torch.no_grad()
    def maps(self, slab: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the last volume after its gates [N, C, D, H, W], and the coarsest volume, for a slab."""
        coarsest = self._run_blocks(slab)
        # autograd attaches its graph to the returned tensors. Without detach(), a block would hold such a
        # tensor and thereby the graph to which the block itself belongs.
        return self._apply_gates(self.decoder_blocks[-1])[0], coarsest.detach()

    def _run_blocks(self, slab: torch.Tensor) -> torch.Tensor:
        """Run all blocks of encoders and decoders, and return the coarsest volume after its gates.

        The gates of the last decoder block are not yet applied.
        """
        x = slab
        skip_volumes = []
        net = self.net
        for level, encoder in enumerate(net.encoders):
            block = self._encode(encoder.basic_module, x)
            block.layer_input = x if self.trains_weights else None
            # The result of the coarsest encoder is not pooled.
            gated_volume, pooled_volume = self._apply_gates(block, pool=level + 1 < len(net.encoders))
            skip_volumes.append(gated_volume)
            self.encoder_blocks.append(block)
            x = gated_volume if pooled_volume is None else pooled_volume
        bottleneck = skip_volumes.pop()  # the coarsest volume is no skip connection
        previous_block = None
        for decoder in net.decoders:
            convolution = _upsampling(decoder)
            skip_volume = skip_volumes.pop()
            x = bottleneck if previous_block is None else self._apply_gates(previous_block)[0]
            kernel = _kernel(convolution, "up", ops.transposed_kernel)
            # The sum overwrites the skip connection, which is not read afterwards.
            r, sums = ops.volume_up(skip_volume, x, convolution.weight, kernel, out=skip_volume)
            previous_block = self._block(decoder.basic_module, r, sums)
            previous_block.layer_input = x if self.trains_weights else None
            self.decoder_blocks.append(previous_block)
        return bottleneck

    def _encode(self, module: Any, x: torch.Tensor) -> _Block:
        """Run a residual block of an encoder on x [N, C, D, H, W], without applying its gates.

        The 1x1x1 convolution at the start of the block is included.
        """
        if x.shape[1] > 1 or isinstance(module.conv1, nn.Identity):
            r = x if isinstance(module.conv1, nn.Identity) else pointwise(module.conv1, x)
            return self._block(module, r, _sums(*_moments(r), r[0, 0].numel()))
        # conv1 has one input channel, so r_c = w_c x + b_c. The normalised r is then affine in x, and r
        # itself is not computed.
        w = module.conv1.weight.reshape(1, -1).double()
        b = module.conv1.bias[None].double()
        mean, variance = _moments(x)  # [N, 1]
        # E[r_c] = w_c E[x] + b_c and Var[r_c] = w_c^2 Var[x].
        sums = _sums(mean * w + b, variance * w.square(), x[0, 0].numel())
        mix = torch.cat([w, b]).T.float().contiguous()  # [C, 2]
        return self._block(module, x, sums, mix, mean, variance)

    def _block(
        self,
        module: Any,
        r: torch.Tensor,
        sums: torch.Tensor,
        mix: torch.Tensor | None = None,
        *moments: torch.Tensor,
    ) -> _Block:
        """Run the two normalised convolutions of a residual block, and compute its channel gate.

        Args:
            module: the `ResidualBlock`.
            r: residual [N, C, D, H, W], or the one channel [N, 1, D, H, W] from which it is made.
            sums: sums [N, C, 2] of the residual and of its square.
            mix: [C, 2]: channel c of the residual is mix[c, 0] r + mix[c, 1]; None if r is the residual.
            moments: mean and variance [N, 1] of r, only with `mix`.
        """
        channels = sums.shape[1]
        voxel_count = r[0, 0].numel()
        scale, shift = group_affine(module.conv2.groupnorm, sums, voxel_count)
        buffer = self._buffer("inner", r, channels)
        if mix is None:
            kernel = _kernel(module.conv2.conv, "conv", ops.transformed_kernel)
            inner_volume, inner_sums = ops.volume_conv(
                r, scale, shift, module.conv2.conv.weight, kernel, relu=True, out=buffer
            )
        else:
            inner_volume, inner_sums = ops.volume_conv(
                r, *_convolution_of_one_channel(module, mix, scale, shift, *moments), relu=True, out=buffer
            )
        scale, shift = group_affine(module.conv3.groupnorm, inner_sums, voxel_count)
        kernel = _kernel(module.conv3.conv, "conv", ops.transformed_kernel)
        if self.stores_volumes:
            buffer = None
        elif mix is None:
            # Without a backward pass r is not needed any more, and h has the same shape.
            buffer = r
        else:
            buffer = self._buffer("outer", r, channels)
        h, h_sums = ops.volume_conv(
            inner_volume,
            scale,
            shift,
            module.conv3.conv.weight,
            kernel,
            residual=r,
            mix=mix,
            relu=True,
            out=buffer,
        )
        channel_means = (h_sums[..., 0] / voxel_count).float()
        return _Block(
            module,
            r,
            mix,
            sums,
            inner_volume,
            inner_sums,
            h,
            channel_means,
            _channel_gate(channel_means, *module.se_module.cSE.parameters()),
        )

    def _buffer(
        self, buffer_name: str, template_volume: torch.Tensor, channel_count: int
    ) -> torch.Tensor | None:
        """Return memory for a volume that later blocks reuse, or None if volumes are stored.

        Reuse saves time, because new pages of memory from the system cost as much as a pass over them.

        Args:
            buffer_name: name of the buffer.
            template_volume: volume [N, ?, D, H, W] with the same type and axes, except for the channels.
            channel_count: number of channels of the new volume.
        """
        if self.stores_volumes:
            return None
        buffer_shape = (len(template_volume), channel_count, *template_volume.shape[2:])
        buffer_size = len(template_volume) * channel_count * template_volume[0, 0].numel()
        if buffer_name not in self.buffers or self.buffers[buffer_name].numel() < buffer_size:
            self.buffers[buffer_name] = template_volume.new_empty(buffer_size)
        # A larger buffer of an earlier block serves a smaller volume, too.
        return self.buffers[buffer_name][:buffer_size].view(buffer_shape)

    def _apply_gates(self, block: _Block, pool: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Apply the channel gate and the voxel gate of a block to its volume h.

        Args:
            block: the block.
            pool: True to pool the volume after the gates as well.
        Returns: the volume after the gates, and this volume after max-pooling by 2, or None if `pool` is
            False.
        """
        # Without a backward pass, the result overwrites h.
        return ops.volume_gate(
            block.h, block.gate, *block.spatial(), out=None if self.stores_volumes else block.h, pool=pool
        )

    def _pool(self, bottleneck: torch.Tensor) -> torch.Tensor:
        """Pool the maps of the U-Net to the features [N, M].

        Args: bottleneck: coarsest volume after its gates.

        Only this last part of the network is a graph of autograd, with the tensors `self.leaves` as inputs.
        `gradient` differentiates it.
        """
        arch = self.arch
        last_block = self.decoder_blocks[-1]
        final_conv = self.net.final_conv
        assert final_conv.bias is not None
        # The first recon_channels outputs are reconstructions; the others are responses.
        weight = final_conv.weight.detach()[arch.recon_channels :, :, 0, 0, 0]  # [R, C]
        bias = final_conv.bias.detach()[arch.recon_channels :]
        with torch.set_grad_enabled(self.stores_volumes):
            # Only the voxel with the largest response in each slice matters, so the graph reads just these
            # voxels.
            if arch.pooling == "slice_max":
                # [N, D]: index of this voxel inside each slice
                _, slice_indices = ops.volume_profile(
                    last_block.h, last_block.gate, *last_block.spatial(), weight, bias
                )
                # Index of the first voxel of each slice in the flattened volume
                first_voxels = torch.arange(slice_indices.shape[1]) * last_block.h[0, 0, 0].numel()
                volume_indices = slice_indices + first_voxels
                # [N, C, D]
                self.voxel_indices = volume_indices[:, None].expand(-1, last_block.h.shape[1], -1)
                self.leaves = [last_block.h.flatten(2).gather(2, self.voxel_indices), last_block.gate]
                voxel_values, gate = (t.requires_grad_(self.stores_volumes) for t in self.leaves)
                w, b = last_block.spatial()
                voxel_gate = torch.sigmoid(torch.einsum("ncd,c->nd", voxel_values, w) + b)[:, None]
                gated_values = voxel_values * torch.maximum(gate[..., None], voxel_gate)
                profile = (torch.einsum("ncd,rc->nrd", gated_values, weight) + bias[:, None]).amax(dim=1)
                # As in `unet3d.slice_max_feature`
                self.pooled_features = profile[:, slice_windows(profile.shape[1], arch.pool_size)].amax(dim=2)
            else:
                volumes = (self._apply_gates(last_block)[0], bottleneck)
                self.leaves = [t.requires_grad_(self.stores_volumes) for t in volumes]
                last_volume, coarsest_volume = self.leaves
                response_maps = F.conv3d(last_volume, weight[..., None, None, None], bias)
                self.pooled_features = torch.cat(
                    [
                        grid_feature(response_maps, arch.final_cells),
                        grid_feature(coarsest_volume, arch.bottleneck_cells),
                    ],
                    dim=1,
                )
        return self.pooled_features.detach()

    @torch.no_grad()
    def gradient(self, grad: torch.Tensor) -> torch.Tensor:
        """Compute the gradient of the slab [N, C, D, H, W] from the gradient of the features [N, M]."""
        # The graph is retained, because backward may be called again.
        first_gradient, second_gradient = torch.autograd.grad(
            self.pooled_features, self.leaves, grad, retain_graph=True
        )
        block = self.decoder_blocks[-1]
        if self.arch.pooling != "slice_max":
            # The leaves are the last volume after its gates, and the coarsest volume.
            return self._backward(*_gate_gradients(block, first_gradient, None), second_gradient)
        # The leaves are the selected voxels of h, and the channel gate. All other voxels get no gradient.
        h_gradient = torch.zeros_like(block.h)
        h_gradient.flatten(2).scatter_(2, self.voxel_indices, first_gradient)
        return self._backward(h_gradient, second_gradient.double(), None)

    @torch.no_grad()
    def gradient_of_maps(
        self,
        last_gradient: torch.Tensor,
        coarsest_gradient: torch.Tensor | None,
        weight_gradients: WeightGradients,
    ) -> torch.Tensor:
        """Compute the gradient of the slab, and store the gradients of the weights in `weight_gradients`.

        Args:
            last_gradient: gradient of the last volume after its gates.
            coarsest_gradient: gradient of the coarsest volume after its gates, or None if it is 0.
            weight_gradients: receives the gradients of the weights.
        """
        last_block = self.decoder_blocks[-1]
        return self._backward(
            *_gate_gradients(last_block, last_gradient, None), coarsest_gradient, weight_gradients
        )

    def _backward(
        self,
        h_gradient: torch.Tensor,
        gate_sums: torch.Tensor,
        coarsest_gradient: torch.Tensor | None,
        weight_gradients: WeightGradients | None = None,
    ) -> torch.Tensor:
        """Compute the gradient of the slab through all blocks.

        Args:
            h_gradient: gradient of the last volume before its gates.
            gate_sums: gradient sums of the gates of the last volume, see `_block_backward`.
            coarsest_gradient: gradient of the coarsest volume after its gates, or None if it is 0.
            weight_gradients: receives the gradients of the weights; None if they are not needed.
        """
        # Decoders from the finest to the coarsest. The residual of a decoder block is the sum of the
        # upsampled volume and the skip connection, so both get the same gradient.
        gradient = self._block_backward(self.decoder_blocks[-1], h_gradient, gate_sums, weight_gradients)
        skip_gradients = []
        for k in reversed(range(len(self.decoder_blocks))):
            skip_gradients.append(gradient)
            # Decoder 0 reads the coarsest volume, the result of the last encoder.
            source_block = self.decoder_blocks[k - 1] if k else self.encoder_blocks[-1]
            layer = _upsampling(self.net.decoders[k])
            if weight_gradients is not None:
                weight_gradients.upsampling(layer, self.decoder_blocks[k].layer_input, gradient)
            kernel = _kernel(layer, "up gradient", lambda w: ops.transposed_kernel(w.transpose(0, 1)))
            # Gradient of the volume after the gates of `source_block`
            gated_gradient = ops.volume_up_gradient(gradient, kernel, source_block.h.shape[2:])
            if k:
                gradient = self._block_backward(
                    source_block, *_gate_gradients(source_block, gated_gradient, None), weight_gradients
                )
        gated_gradient = gated_gradient if coarsest_gradient is None else gated_gradient + coarsest_gradient
        # Encoders from the coarsest to the finest. The result of an encoder gets a gradient from its skip
        # connection and another one from the pooling before the next encoder.
        pooled_gradient = None
        for level in reversed(range(len(self.encoder_blocks))):
            block = self.encoder_blocks[level]
            gradient = self._block_backward(
                block, *_gate_gradients(block, gated_gradient, pooled_gradient), weight_gradients
            )
            # For a block with `mix` and without gradients of weights, the result is already the gradient of
            # the input of conv1.
            if not isinstance(block.module.conv1, nn.Identity) and (
                block.mix is None or weight_gradients is not None
            ):
                if weight_gradients is not None:
                    weight_gradients.pointwise(block.module.conv1, block.layer_input, gradient)
                weight = block.module.conv1.weight.flatten(1)  # [O, C]
                gradient = (weight.T @ gradient.flatten(2)).unflatten(2, gradient.shape[2:])
            if level:
                gated_gradient = skip_gradients.pop()
                pooled_gradient = gradient
        return gradient

    def _block_backward(
        self,
        block: _Block,
        h_gradient: torch.Tensor,
        gate_sums: torch.Tensor,
        weight_gradients: WeightGradients | None,
    ) -> torch.Tensor:
        """Compute the gradient of a block's residual.

        If the residual is made from one channel and no gradients of weights are needed, the result is the
        gradient of this channel instead.

        Args:
            block: the block.
            h_gradient: gradient of h through the product with the gates, without the part through the channel
                gate.
            gate_sums: gradients [N, 2 C + 1] per sample: C for the channel gate, C for the weights of the
                voxel gate, and one for its bias. The last C + 1 may be missing without gradients of weights.
            weight_gradients: receives the gradients of the weights; None if they are not needed.
        """
        module = block.module
        voxel_count = block.h[0, 0].numel()
        r = block.r
        mix = block.mix
        # The channel gate has few operations, so autograd computes its gradient.
        channel_means, *linear_parameters = (
            t.detach().requires_grad_() for t in (block.channel_means, *module.se_module.cSE.parameters())
        )
        with torch.enable_grad():
            gate = _channel_gate(channel_means, *linear_parameters)
            mean_gradient, *linear_gradients = torch.autograd.grad(
                gate, [channel_means, *linear_parameters], gate_sums[:, : gate.shape[1]].float()
            )
        # The mean of h over voxels passes the same share of its gradient to every voxel. [N, C, 1]
        mean_gradient = mean_gradient[..., None].double() / voxel_count
        # The complete gradient of h has the form f0 g + f1 h + f2 of the operators, with f0 = 1, f1 = 0 and
        # the gradient through the mean as the constant f2.
        factors = torch.cat(
            [torch.ones_like(mean_gradient), torch.zeros_like(mean_gradient), mean_gradient], dim=2
        ).float()
        conv3_kernel, conv2_kernel = (
            _kernel(convolution, "gradient", lambda w: ops.transformed_kernel(ops.adjoint_kernel(w)))
            for convolution in (module.conv3.conv, module.conv2.conv)
        )
        # Gradient of the normalised `inner_volume`, and its sums for the group normalisation
        g, sums = ops.volume_conv_gradient(h_gradient, block.h, factors, conv3_kernel, block.inner_volume)
        if weight_gradients is not None:
            weight_gradients.gates(module.se_module, linear_gradients, gate_sums)
            weight_gradients.convolution(
                module.conv3, (h_gradient, block.h, factors), block.inner_volume, None, block.inner_sums, sums
            )
        factors = group_gradient(module.conv3.groupnorm, block.inner_sums, sums, voxel_count).float()
        inner_gradient = g
        g, sums = ops.volume_conv_gradient(inner_gradient, block.inner_volume, factors, conv2_kernel, r, mix)
        if weight_gradients is not None:
            weight_gradients.convolution(
                module.conv2, (inner_gradient, block.inner_volume, factors), r, mix, block.r_sums, sums
            )
            # The gradients of conv1's weights need the gradient of every channel of the residual, so the
            # residual itself is computed now.
            if mix is not None:
                r = torch.addcmul(mix[:, 1, None, None, None], r, mix[:, 0, None, None, None])
                mix = None
        factors = torch.cat(
            [mean_gradient, group_gradient(module.conv2.groupnorm, block.r_sums, sums, voxel_count)], dim=2
        ).float()
        # The residual is added to the result of conv3, and it is also the input of conv2: both gradients.
        return ops.volume_join(h_gradient, block.h, g, r, factors, mix)


def _upsampling(decoder: Any) -> nn.ConvTranspose3d:
    """Return the transposed convolution of a `Decoder`."""
    return decoder.upsampling.upsample.conv_transposed


def _gate_gradients(
    block: _Block, gated_gradient: torch.Tensor | None, pooled_gradient: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the gradients of a block's volume h and of its gates from those after the gates.

    Args:
        block: the block.
        gated_gradient: gradient of the volume after the gates, or None if it is 0.
        pooled_gradient: gradient of this volume after max-pooling, or None if it was not pooled.
    Returns: the gradient of h through the product with the gates, and the gradient sums [N, 2 C + 1] of the
        gates.
    """
    return ops.volume_gate_gradient(block.h, block.gate, *block.spatial(), gated_gradient, pooled_gradient)


def _channel_gate(channel_means: torch.Tensor, *linear_parameters: torch.Tensor) -> torch.Tensor:
    """Compute the channel gate [N, C] of `ScSE`.

    Args:
        channel_means: means [N, C] of the channels over the voxels.
        linear_parameters: weight and bias of fc1, weight and bias of fc2.
    """
    hidden_features = F.relu(F.linear(channel_means, *linear_parameters[:2]))
    return torch.sigmoid(F.linear(hidden_features, *linear_parameters[2:]))


def _convolution_of_one_channel(
    module: Any,
    mix: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return conv2 as a convolution with two input channels, if its C inputs are made from one channel x.

    Input c of the convolution is scale_c (w_c x + b_c) + shift_c, where w_c, b_c are the rows of `mix`. The
    convolution of these C channels equals a convolution of two channels: the standardised x, and a channel of
    ones. The ones are needed because padding adds zeros outside, so that offsets are missing at the border.

    Args:
        module: the `ResidualBlock`.
        mix: factors w and offsets b, [C, 2].
        scale: scale of conv2's group normalisation, [N, C].
        shift: shift of conv2's group normalisation, [N, C].
        mean: mean of x, float64 [N, 1].
        variance: variance of x, float64 [N, 1].
    Returns: the scale [N, 2] and the shift [N, 2] that make the two channels from x, and the kernels
        [N, O, 2, 3, 3, 3].
    """
    w, b = mix.double().T[:, None]  # [1, C]
    std = variance.sqrt().clamp_min(1e-12)  # a constant slab has a standard deviation of 0
    factors = torch.stack([scale * w * std, scale * (w * mean + b) + shift], dim=2)  # [N, C, 2]
    kernel = torch.einsum("oczyx,nck->nokzyx", module.conv2.conv.weight.double(), factors).float()
    inverse_std = 1 / std
    # The first channel is (x - mean) / std. A scale of 0 and a shift of 1 make the channel of ones from x.
    channel_scale = torch.cat([inverse_std, torch.zeros_like(inverse_std)], dim=1).float()
    channel_shift = torch.cat([-mean * inverse_std, torch.ones_like(inverse_std)], dim=1).float()
    return channel_scale, channel_shift, kernel


def _kernel(layer: nn.Module, role: str, make: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Return the weights of a layer in the layout that an operator needs, cached until the weights change.

    Args:
        layer: layer with the attribute `weight`.
        role: name of the layout.
        make: function that converts the weights to the layout.
    """
    weight: Any = layer.weight
    cached_kernels = _kernels.setdefault(layer, {})
    # An optimiser changes weights in place, which increases _version; a loaded tensor may have another
    # address.
    weight_version = (weight.data_ptr(), weight._version)
    if role not in cached_kernels or cached_kernels[role][:2] != weight_version:
        cached_kernels[role] = (*weight_version, make(weight.detach()))
    return cached_kernels[role][2]


def _moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the mean and the variance of each channel over its voxels, float64 [N, C] each."""
    flat_values = x.flatten(2)
    # Two passes: the variance is computed from centred values, which avoids cancellation.
    mean = flat_values.mean(dim=2, keepdim=True)
    centred_values = flat_values - mean
    return mean[..., 0].double(), torch.einsum(
        "ncv,ncv->nc", centred_values, centred_values
    ).double() / flat_values.shape[2]


def _sums(mean: torch.Tensor, variance: torch.Tensor, voxel_count: int) -> torch.Tensor:
    """Return the sums [N, C, 2] of values and of their squares over `voxel_count` voxels.

    Args:
        mean: means [N, C] of the values of each channel.
        variance: variances [N, C] of these values, with divisor `voxel_count`.
        voxel_count: number of voxels per channel.
    """
    # E[x^2] = Var[x] + E[x]^2
    return torch.stack([mean, variance + mean.square()], dim=2) * voxel_count
