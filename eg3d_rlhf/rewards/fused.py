"""Run a U-Net reward, and its gradients to the slab and the weights, through fused operators on a CPU.

The results equal those of the network's own modules up to rounding. Group normalisation is a scale and a
shift per sample and channel once its sums are known. The operator before it computes these sums, so every
volume is written once and read once. The backward pass is written by hand (`torch_utils.ops.volume_block`). A
block keeps its input, the volume between its convolutions, and the input of its gates. It keeps no
volume after a normalisation, an activation or a gate.

Letters: N slabs, C input channels, O output channels, M features, R responses, G groups, D, H, W = z, y, x.
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

# Gradients of a U-Net's weights from the volumes that the backward pass reads and writes. The ops' arguments
# are described in torch_utils/ops/volume_block.py.


class WeightGradients:
    """Gradients by parameter, collected during a backward pass.

    Gradients of 3x3x3 kernels are computed only if they were requested, because they cost most. All others
    are always computed.
    """

    def __init__(self, requested: Iterable[torch.Tensor]):
        self._requested = set(requested)
        self.gradients: dict[torch.Tensor, torch.Tensor] = {}

    def convolution(
        self,
        layer: Any,
        arrived: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        x: torch.Tensor,
        mix: torch.Tensor | None,
        sums: torch.Tensor,
        grad_sums: torch.Tensor,
    ) -> None:
        """Add the gradients of a normalised convolution (NormConv).

        Args: arrived: g, h and factors as `volume_conv_gradient` takes them; x: its input, or with mix [C, 2]
            the one channel of which the input is made; sums: of the input and of its square; grad_sums: the
            sums that `volume_conv_gradient` returned.
        """
        norm = layer.groupnorm
        kernel = layer.conv.weight
        voxels = x[0, 0].numel()
        if kernel in self._requested:
            scale, shift = group_affine(norm, sums, voxels)
            # x' = scale * x + shift, where x is itself mix[:, 0] times the one channel plus mix[:, 1].
            if mix is not None:
                scale, shift = scale * mix[:, 0], scale * mix[:, 1] + shift
            self.gradients[kernel] = ops.volume_conv_weight(*arrived, x, scale, shift)
        self.gradients[norm.weight], self.gradients[norm.bias] = group_weights(norm, sums, grad_sums, voxels)

    def gates(self, module: Any, linear: list[torch.Tensor], gates: torch.Tensor) -> None:
        """Add the gradients of both gates (ScSE).

        Args: linear: gradients of the parameters of cSE, in its order; gates: the sums of
            `volume_gate_gradient`.
        """
        self.gradients.update(zip(module.cSE.parameters(), linear, strict=True))
        layer = module.sSE.conv
        channels = len(linear[0])
        # After C sums for the channel gate follow C sums for the weights and one for the bias of the voxel
        # The input is itself affine in the one channel, so both maps are combined.            # The input
        # is itself affine in the one channel, so both maps are combined.
        spatial = gates[:, channels:].sum(dim=0).float()  # [C + 1]
        self.gradients[layer.weight], self.gradients[layer.bias] = (
            spatial[:channels].view_as(layer.weight),
            spatial[channels:],
        )

    def pointwise(self, layer: Any, x: torch.Tensor, grad: torch.Tensor) -> None:
        """Add the gradients of a 1x1x1 convolution of x, from the gradient of its result."""
        self.gradients[layer.weight] = torch.einsum("nov,ncv->oc", grad.flatten(2), x.flatten(2)).view_as(
            layer.weight
        )
        self.gradients[layer.bias] = grad.sum(dim=(0, 2, 3, 4))

    def upsampling(self, layer: nn.ConvTranspose3d, x: torch.Tensor, grad: torch.Tensor) -> None:
        """Add the gradient of a transposed convolution of x, from the gradient of its resampled result."""
        if layer.weight in self._requested:
            # The layer's own output has 2 n - 1 voxels per axis; it was resampled to the skip's size.
            fine = [2 * n - 1 for n in x.shape[2:]]
            grad = torch.ops.aten.upsample_nearest3d_backward(grad, grad.shape[2:], [*grad.shape[:2], *fine])
            # The convolution is faster in this layout, by more than the conversion takes.
            grad, x = (t.contiguous(memory_format=torch.channels_last_3d) for t in (grad, x))
            self.gradients[layer.weight] = torch.ops.aten.convolution_backward(
                grad, x, layer.weight, None, [2] * 3, [1] * 3, [1] * 3, True, [0] * 3, 1, [False, True, False]
            )[1]


# Group normalisation, written as a scale and a shift from sums over each channel's voxels, and its gradients.


def statistics(norm: nn.GroupNorm, sums: torch.Tensor, voxels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and inverse standard deviation [N, C] of each channel's group."""
    each = sums.shape[1] // norm.num_groups  # channels per group
    grouped = sums.unflatten(1, (norm.num_groups, -1)).sum(dim=2) / (voxels * each)  # [N, G, 2]
    mean = grouped[..., 0]
    # E[x^2] - mean^2 in float64; rounding can make it slightly negative.
    inverse = (grouped[..., 1] - mean.square()).clamp_min(0).add(norm.eps).rsqrt()
    return mean.repeat_interleave(each, dim=1), inverse.repeat_interleave(each, dim=1)


def group_affine(norm: nn.GroupNorm, sums: torch.Tensor, voxels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return group normalisation as scale and shift [N, C].

    Args: sums: [N, C, 2] in float64, of values and of their squares; voxels: per channel.
    """
    mean, inverse = statistics(norm, sums, voxels)
    scale = norm.weight.double() * inverse
    return scale.float(), (norm.bias.double() - mean * scale).float()


def group_gradient(
    norm: nn.GroupNorm, sums: torch.Tensor, arrived: torch.Tensor, voxels: int
) -> torch.Tensor:
    """Return the gradient of group normalisation as factors [N, C, 3] in float64: f0 g + f1 x + f2.

    g is the gradient of the result. With x' = (x - mean) inverse and means over a group, the gradient is
    inverse (w g - mean(w g) - x' mean(w g x')).
    Args: sums: see `group_affine`; arrived: sums [N, C, 2] in float64 of g and g x.
    """
    mean, inverse = statistics(norm, sums, voxels)
    w = norm.weight.double()
    each = sums.shape[1] // norm.num_groups

    # Means over a group's channels and voxels, repeated for its channels; the argument holds sums over
    # voxels.
    def over_group(values: torch.Tensor) -> torch.Tensor:
        return values.unflatten(1, (norm.num_groups, -1)).mean(dim=2).repeat_interleave(each, dim=1) / voxels

    mean_gradient = over_group(w * arrived[..., 0])  # mean(w g)
    along = over_group(w * (arrived[..., 1] - mean * arrived[..., 0]) * inverse)  # mean(w g x')
    slope = -inverse.square() * along  # f1
    # f2 collects the terms without g or x.
    return torch.stack(
        [(w * inverse).expand_as(slope), slope, -inverse * mean_gradient - slope * mean], dim=2
    )


def group_weights(
    norm: nn.GroupNorm, sums: torch.Tensor, arrived: torch.Tensor, voxels: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of weight and bias, [C] each; arguments as in `group_gradient`."""
    mean, inverse = statistics(norm, sums, voxels)
    return ((arrived[..., 1] - mean * arrived[..., 0]) * inverse).sum(dim=0).float(), arrived[..., 0].sum(
        dim=0
    ).float()


_LANES = 8  # channels that the operators process at a time
_VOXELS = 1 << 21  # of slabs that are evaluated at once without gradients; more would only take memory
# Weights in the operators' layout by layer and role, with address and version of the weights they were made
# from
_kernels: "WeakKeyDictionary[nn.Module, dict[str, tuple[int, int, torch.Tensor]]]" = WeakKeyDictionary()


def applies(model: "RewardModel", slab: torch.Tensor) -> bool:
    """Return whether the fused operators cover this network and slab."""
    if (
        slab.device.type != "cpu"
        or slab.dtype != torch.float32
        or any(c % _LANES for c in model.arch.feature_maps)
    ):
        return False
    # `differentiable` is about the installed operators; the weights' type may differ from the slab's.
    return next(model.parameters()).dtype == torch.float32 and ops.differentiable()


def learns(model: "RewardModel") -> bool:
    """Return whether gradients to the U-Net's weights are requested."""
    return torch.is_grad_enabled() and any(p.requires_grad for p in model.Conv3DModule.parameters())


def features(model: "RewardModel", slab: torch.Tensor) -> torch.Tensor:
    """Compute features [N, M] of slabs [N, C, D, H, W] that were cut into patches.

    Differentiable once, in the slab.
    """
    if torch.is_grad_enabled() and slab.requires_grad:
        return _Features.apply(slab, model)
    at_once = max(1, _VOXELS // slab[0, 0].numel())
    return torch.cat([_Pass(model, kept=False).features(part) for part in slab.split(at_once)])


def maps(model: "RewardModel", slab: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the U-Net's result and coarsest volume for slabs [N, C, D, H, W]; see `UNet3d.forward`.

    Differentiable once, in the slab and the weights.
    """
    net = model.Conv3DModule
    weights = [*net.encoders.parameters(), *net.decoders.parameters()]
    fine, coarsest = _Maps.apply(slab, model, torch.is_grad_enabled(), *weights)
    # The final convolution stays outside, so that autograd gives the gradients of its weights.
    return pointwise(net.final_conv, fine), coarsest


def pointwise(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Apply a 1x1x1 convolution with bias as a matrix product: [N, C, D, H, W] -> [N, O, D, H, W].

    Differentiable in the input, the weights and the bias.
    """
    weight = layer.weight.flatten(1).expand(len(x), -1, -1)
    return torch.baddbmm(layer.bias[:, None], weight, x.flatten(2)).unflatten(2, x.shape[2:])


class _Features(torch.autograd.Function):
    """Features of a network whose weights need no gradient."""

    @staticmethod
    def forward(ctx, slab, model):
        ctx.run = _Pass(model, kept=True)
        return ctx.run.features(slab.detach())

    @staticmethod
    @once("reward")
    def backward(ctx, grad):
        return ctx.run.gradient(grad), None


class _Maps(torch.autograd.Function):
    """The last volume after its gates, [N, C, D, H, W], and the coarsest volume."""

    @staticmethod
    def forward(ctx, slab, model, kept, *weights):
        # torch raises an error in the backward pass if a saved tensor was changed in between.
        ctx.save_for_backward(*weights)
        ctx.set_materialize_grads(False)
        ctx.run = _Pass(model, kept, learns=kept)
        return ctx.run.maps(slab.detach())

    @staticmethod
    @once("reward")
    def backward(ctx, fine, coarsest):
        weights = ctx.saved_tensors
        needed = ctx.needs_input_grad
        gathered = WeightGradients(w for w, requested in zip(weights, needed[3:], strict=True) if requested)
        slab = ctx.run.gradient_of_maps(fine, coarsest, gathered)
        # One result per argument of `forward`: slab, model, kept, weights.
        return slab if needed[0] else None, None, None, *(gathered.gradients.get(w) for w in weights)


@dataclass
class _Block:
    """Volumes and sums of a residual block that its backward pass reads."""

    module: Any  # the ResidualBlock; torch types its parts as tensors or modules
    r: torch.Tensor  # residual [N, C, D, H, W], or the one channel of which it is made
    mix: torch.Tensor | None  # [C, 2]: r's channel c is factor times that one channel plus offset
    first: torch.Tensor  # sums [N, C, 2] of r and r^2
    inner: torch.Tensor  # volume between the convolutions [N, C, D, H, W]
    second: torch.Tensor  # sums [N, C, 2] of inner and inner^2
    h: torch.Tensor  # volume before the gates [N, C, D, H, W]
    squeezed: torch.Tensor  # [N, C], means of h
    gate: torch.Tensor  # channel gate [N, C]
    read: Any = None  # input of the layer before r, if that layer's weights are trained

    def spatial(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weights [C] and bias [1] of the gate of voxels."""
        layer = self.module.se_module.sSE.conv
        return layer.weight.detach().flatten(), layer.bias.detach()


class _Pass:
    """One forward pass and, if its volumes are kept, its backward pass."""

    def __init__(self, model: "RewardModel", kept: bool, learns: bool = False):
        self.arch = model.arch
        self.net = model.Conv3DModule
        self.kept = kept  # keep volumes for a backward pass
        self.learns = learns  # keep also what gradients of the weights need
        self.down: list[_Block] = []  # encoder blocks, from the finest
        self.up: list[_Block] = []  # decoder blocks, from the coarsest
        self.memory: dict[str, torch.Tensor] = {}  # reused buffers by role

    @torch.no_grad()
    def features(self, slab: torch.Tensor) -> torch.Tensor:
        """Return the features [N, M]."""
        return self._pooled(self._coarsest(slab))

    @torch.no_grad()
    def maps(self, slab: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the last volume after its gates, and the coarsest volume."""
        coarsest = self._coarsest(slab)
        # detach(): if a block kept the returned tensor itself, it would hold a reference to its own graph.
        return self._gated(self.up[-1])[0], coarsest.detach()

    def _coarsest(self, slab: torch.Tensor) -> torch.Tensor:
        """Run all blocks, and return the coarsest volume after its gates."""
        x = slab
        skips = []
        net = self.net
        for level, encoder in enumerate(net.encoders):
            block = self._encode(encoder.basic_module, x)
            block.read = x if self.learns else None
            gated, pooled = self._gated(block, pool=level + 1 < len(net.encoders))
            skips.append(gated)
            self.down.append(block)
            x = gated if pooled is None else pooled
        bottleneck = skips.pop()  # the coarsest volume is no skip connection
        last = None
        for decoder in net.decoders:
            convolution = _upsampling(decoder)
            skip = skips.pop()
            x = bottleneck if last is None else self._gated(last)[0]
            kernel = _kernel(convolution, "up", ops.transposed_kernel)
            # The sum overwrites the skip, which nothing reads afterwards.
            r, sums = ops.volume_up(skip, x, convolution.weight, kernel, out=skip)
            last = self._block(decoder.basic_module, r, sums)
            last.read = x if self.learns else None
            self.up.append(last)
        return bottleneck

    def _encode(self, module: Any, x: torch.Tensor) -> _Block:
        """Run an encoder's block, including its first 1x1x1 convolution."""
        if x.shape[1] > 1 or isinstance(module.conv1, nn.Identity):
            r = x if isinstance(module.conv1, nn.Identity) else pointwise(module.conv1, x)
            return self._block(module, r, _sums(*_moments(r), r[0, 0].numel()))
        # conv1 has one input channel, r_c = w_c x + b_c. Normalised r is then affine in x, so r is never
        # stored.
        w = module.conv1.weight.reshape(1, -1).double()
        b = module.conv1.bias[None].double()
        mean, variance = _moments(x)  # [N, 1]
        # E[r_c] = w_c E[x] + b_c and Var[r_c] = w_c^2 Var[x].
        sums = _sums(mean * w + b, variance * w.square(), x[0, 0].numel())
        return self._block(module, x, sums, torch.cat([w, b]).T.float().contiguous(), mean, variance)

    def _block(
        self,
        module: Any,
        r: torch.Tensor,
        sums: torch.Tensor,
        mix: torch.Tensor | None = None,
        *moments: torch.Tensor,
    ) -> _Block:
        """Run the two normalised convolutions of a block, from its residual r and the sums of r and r^2."""
        channels = sums.shape[1]
        voxels = r[0, 0].numel()
        scale, shift = group_affine(module.conv2.groupnorm, sums, voxels)
        buffer = self._memory("inner", r, channels)
        if mix is None:
            kernel = _kernel(module.conv2.conv, "conv", ops.transformed_kernel)
            inner, second = ops.volume_conv(
                r, scale, shift, module.conv2.conv.weight, kernel, relu=True, out=buffer
            )
        else:
            inner, second = ops.volume_conv(
                r, *_of_one_channel(module, mix, scale, shift, *moments), relu=True, out=buffer
            )
        scale, shift = group_affine(module.conv3.groupnorm, second, voxels)
        kernel = _kernel(module.conv3.conv, "conv", ops.transformed_kernel)
        # Without a backward pass, h overwrites r where both have the same shape.
        buffer = None if self.kept else r if mix is None else self._memory("outer", r, channels)
        h, third = ops.volume_conv(
            inner, scale, shift, module.conv3.conv.weight, kernel, residual=r, mix=mix, relu=True, out=buffer
        )
        squeezed = (third[..., 0] / voxels).float()
        return _Block(
            module,
            r,
            mix,
            sums,
            inner,
            second,
            h,
            squeezed,
            _channel_gate(squeezed, *module.se_module.cSE.parameters()),
        )

    def _memory(self, role: str, like: torch.Tensor, channels: int) -> torch.Tensor | None:
        """Return a buffer that is used again, or None if volumes are kept for a backward pass.

        Getting new pages of memory from the system takes as long as a pass over them.
        """
        if self.kept:
            return None
        shape = (len(like), channels, *like.shape[2:])
        size = len(like) * channels * like[0, 0].numel()
        if role not in self.memory or self.memory[role].numel() < size:
            self.memory[role] = like.new_empty(size)
        return self.memory[role][:size].view(shape)

    def _gated(self, block: _Block, pool: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Apply a block's gates to h, and also max-pool the result if `pool` is true."""
        return ops.volume_gate(
            block.h, block.gate, *block.spatial(), out=None if self.kept else block.h, pool=pool
        )

    def _pooled(self, bottleneck: torch.Tensor) -> torch.Tensor:
        """Return the features.

        For `gradient`, their last steps become a small autograd graph from `self.leaves`.
        """
        arch = self.arch
        last = self.up[-1]
        final = self.net.final_conv
        assert final.bias is not None
        # The first recon_channels outputs are reconstructions; the others are responses.
        weight = final.weight.detach()[arch.recon_channels :, :, 0, 0, 0]  # [R, C]
        bias = final.bias.detach()[arch.recon_channels :]
        with torch.set_grad_enabled(self.kept):
            # Only the voxel with the largest response in each slice matters, so the graph reads just these
            # voxels.
            if arch.pooling == "slice_max":
                _, places = ops.volume_profile(last.h, last.gate, *last.spatial(), weight, bias)
                first = torch.arange(places.shape[1]) * last.h[0, 0, 0].numel()
                self.places = (places + first)[:, None].expand(-1, last.h.shape[1], -1)  # [N, C, D]
                self.leaves = [last.h.flatten(2).gather(2, self.places), last.gate]
                values, gate = (t.requires_grad_(self.kept) for t in self.leaves)
                w, b = last.spatial()
                gated = values * torch.maximum(
                    gate[..., None], torch.sigmoid(torch.einsum("ncd,c->nd", values, w) + b)[:, None]
                )
                profile = (torch.einsum("ncd,rc->nrd", gated, weight) + bias[:, None]).amax(dim=1)
                self.result = profile[:, slice_windows(profile.shape[1], arch.pool_size)].amax(dim=2)
            else:
                self.leaves = [t.requires_grad_(self.kept) for t in (self._gated(last)[0], bottleneck)]
                fine, coarse = self.leaves
                response = F.conv3d(fine, weight[..., None, None, None], bias)
                self.result = torch.cat(
                    [grid_feature(response, arch.final_cells), grid_feature(coarse, arch.bottleneck_cells)],
                    dim=1,
                )
        return self.result.detach()

    @torch.no_grad()
    def gradient(self, grad: torch.Tensor) -> torch.Tensor:
        """Return the gradient to the slab, from the gradient of the features [N, M]."""
        first, second = torch.autograd.grad(self.result, self.leaves, grad, retain_graph=True)
        block = self.up[-1]
        if self.arch.pooling != "slice_max":
            return self._back(*_ungated(block, first, None), second)
        # The selected voxels get all of the gradient.
        arrived = torch.zeros_like(block.h)
        arrived.flatten(2).scatter_(2, self.places, first)
        return self._back(arrived, second.double(), None)

    @torch.no_grad()
    def gradient_of_maps(
        self, fine: torch.Tensor, coarsest: torch.Tensor | None, weights: WeightGradients
    ) -> torch.Tensor:
        """Return the gradient to the slab from those of the maps, and add those of weights to `weights`."""
        return self._back(*_ungated(self.up[-1], fine, None), coarsest, weights)

    def _back(
        self,
        arrived: torch.Tensor,
        gates: torch.Tensor,
        coarsest: torch.Tensor | None,
        weights: WeightGradients | None = None,
    ) -> torch.Tensor:
        """Return the gradient to the slab.

        Args: arrived: gradient of the last volume before its gates; gates: sums of the gradient of its gates;
            coarsest: gradient of the coarsest volume after its gates.
        """
        # Decoders from the finest to the coarsest. Each gradient also goes to the skip connection of its
        # level.
        passed = self._through(self.up[-1], arrived, gates, weights)
        skips = []
        for k in reversed(range(len(self.up))):
            skips.append(passed)
            below = self.up[k - 1] if k else self.down[-1]
            layer = _upsampling(self.net.decoders[k])
            if weights is not None:
                weights.upsampling(layer, self.up[k].read, passed)
            kernel = _kernel(layer, "up gradient", lambda w: ops.transposed_kernel(w.transpose(0, 1)))
            after_gates = ops.volume_up_gradient(passed, kernel, below.h.shape[2:])
            if k:
                passed = self._through(below, *_ungated(below, after_gates, None), weights)
        after_gates = after_gates if coarsest is None else after_gates + coarsest
        # Encoders from the coarsest to the finest, where skip and pooling meet.
        pooled = None
        for level in reversed(range(len(self.down))):
            block = self.down[level]
            passed = self._through(block, *_ungated(block, after_gates, pooled), weights)
            # A block with mix gives the gradient of the one channel itself, so conv1 is already included.
            if not isinstance(block.module.conv1, nn.Identity) and (block.mix is None or weights is not None):
                if weights is not None:
                    weights.pointwise(block.module.conv1, block.read, passed)
                weight = block.module.conv1.weight.flatten(1)  # [O, C]
                passed = (weight.T @ passed.flatten(2)).unflatten(2, passed.shape[2:])
            if level:
                after_gates = skips.pop()
                pooled = passed
        return passed

    def _through(
        self, block: _Block, arrived: torch.Tensor, gates: torch.Tensor, weights: WeightGradients | None
    ) -> torch.Tensor:
        """Return the gradient of a block's residual.

        For a block without training weights whose residual is made of one channel, it is that channel's
        gradient.
        Args: arrived: gradient of h; gates: sums for the channel gate [N, C], followed by those for the
            weights and the bias of the voxel gate.
        """
        module = block.module
        voxels = block.h[0, 0].numel()
        r = block.r
        mix = block.mix
        # The channel gate is tiny, so autograd computes its gradient.
        squeezed, *linear = (
            t.detach().requires_grad_() for t in (block.squeezed, *module.se_module.cSE.parameters())
        )
        with torch.enable_grad():
            gate = _channel_gate(squeezed, *linear)
            mean, *linear = torch.autograd.grad(gate, [squeezed, *linear], gates[:, : gate.shape[1]].float())
        # h's mean is a sum over voxels, so its gradient is spread evenly
        mean = mean[..., None].double() / voxels
        # f0 g + f1 h + f2 with f0 = 1: the gradient of the mean is a constant per channel.
        factors = torch.cat([torch.ones_like(mean), torch.zeros_like(mean), mean], dim=2).float()
        outer, inner = (
            _kernel(c, "gradient", lambda w: ops.transformed_kernel(ops.turned(w)))
            for c in (module.conv3.conv, module.conv2.conv)
        )
        g, sums = ops.volume_conv_gradient(arrived, block.h, factors, outer, block.inner)
        if weights is not None:
            weights.gates(module.se_module, linear, gates)
            weights.convolution(
                module.conv3, (arrived, block.h, factors), block.inner, None, block.second, sums
            )
        factors = group_gradient(module.conv3.groupnorm, block.second, sums, voxels).float()
        after = g
        g, sums = ops.volume_conv_gradient(after, block.inner, factors, inner, r, mix)
        if weights is not None:
            weights.convolution(module.conv2, (after, block.inner, factors), r, mix, block.first, sums)
            # Weights of conv1 need the gradient of every channel of r, so r is computed now.
            if mix is not None:
                r = torch.addcmul(mix[:, 1, None, None, None], r, mix[:, 0, None, None, None])
                mix = None
        factors = torch.cat(
            [mean, group_gradient(module.conv2.groupnorm, block.first, sums, voxels)], dim=2
        ).float()
        return ops.volume_join(arrived, block.h, g, r, factors, mix)


def _upsampling(decoder: Any) -> nn.ConvTranspose3d:
    """Return the transposed convolution of a decoder."""
    return decoder.upsampling.upsample.conv_transposed


def _ungated(
    block: _Block, after_gates: torch.Tensor | None, pooled: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradient of h and sums for the gates, from gradients after gates and pooling."""
    return ops.volume_gate_gradient(block.h, block.gate, *block.spatial(), after_gates, pooled)


def _channel_gate(squeezed: torch.Tensor, *linear: torch.Tensor) -> torch.Tensor:
    """Compute the channel gate from means [N, C], and from weights and biases of fc1 and fc2."""
    return torch.sigmoid(F.linear(F.relu(F.linear(squeezed, *linear[:2])), *linear[2:]))


def _of_one_channel(
    module: Any,
    mix: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return scale and shift [N, 2] and kernels [N, O, 2, 3, 3, 3] of conv2 if its C inputs are made of one
    channel.

    The convolution of such channels equals a convolution of two: the standardised slab, and a channel of
    ones. The ones are needed because padding adds zeros outside, so that offsets are missing at the border.
    """
    w, b = mix.double().T[:, None]  # [1, C]
    std = variance.sqrt().clamp_min(1e-12)  # a constant slab has a standard deviation of 0
    factors = torch.stack([scale * w * std, scale * (w * mean + b) + shift], dim=2)  # [N, C, 2]
    kernel = torch.einsum("oczyx,nck->nokzyx", module.conv2.conv.weight.double(), factors).float()
    inverse = 1 / std
    scale = torch.cat([inverse, torch.zeros_like(inverse)], dim=1).float()
    return scale, torch.cat([-mean * inverse, torch.ones_like(inverse)], dim=1).float(), kernel


def _kernel(layer: nn.Module, role: str, make: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Return a layer's weights in an operator's layout, from a cache until the weights change."""
    weight: Any = layer.weight
    known = _kernels.setdefault(layer, {})
    # An optimiser changes weights in place, which increases _version; a loaded tensor may have another
    # address.
    state = (weight.data_ptr(), weight._version)
    if role not in known or known[role][:2] != state:
        known[role] = (*state, make(weight.detach()))
    return known[role][2]


def _moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute mean and variance [N, C] over the volume, returned in float64."""
    flat = x.flatten(2)
    # Two passes: the variance from centred values does not cancel.
    mean = flat.mean(dim=2, keepdim=True)
    centred = flat - mean
    return mean[..., 0].double(), torch.einsum("ncv,ncv->nc", centred, centred).double() / flat.shape[2]


def _sums(mean: torch.Tensor, variance: torch.Tensor, voxels: int) -> torch.Tensor:
    """Return the sums [N, C, 2] of values and of their squares."""
    return torch.stack([mean, variance + mean.square()], dim=2) * voxels
