"""A U-Net's features or maps, and their gradient to the slab and the weights, through fused ops on a CPU: the
network's own up to rounding.

Group normalisation is a scale and a shift per sample and channel once the sums are known, and these come out
of the pass before: every volume is written once and read once. The backward pass is written out
(`torch_utils.ops.volume_block`): a block keeps what it reads, what lies between its convolutions and what its
gates read, and no normalised, activated or gated volume.

Letters: N slabs, C channels, M features, R responses, D, H, W = z, y, x.
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

# Gradients of a U-Net's weights from the volumes that the backward pass reads and writes.


class WeightGradients:
    """What a backward pass found, by parameter: the 3x3x3 kernels' where wanted, for they cost most, and all
    others'.
    """

    def __init__(self, wanted: Iterable[torch.Tensor]):
        self._wanted = set(wanted)
        self.gradients: dict[torch.Tensor, torch.Tensor] = {}

    def convolution(
        self,
        layer: Any,
        arrived: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        x: torch.Tensor,
        mix: torch.Tensor | None,
        sums: torch.Tensor,
        behind: torch.Tensor,
    ) -> None:
        """Of a normalised convolution (NormConv).

        Args: arrived: g, h and factors as `volume_conv_gradient` takes them; x: its input, or with mix [C, 2]
        the channel of which it is made; sums: of the input and its square; behind: what
        `volume_conv_gradient` returned.
        """
        norm = layer.groupnorm
        kernel = layer.conv.weight
        voxels = x[0, 0].numel()
        if kernel in self._wanted:
            scale, shift = group_affine(norm, sums, voxels)
            if mix is not None:
                scale, shift = scale * mix[:, 0], scale * mix[:, 1] + shift
            self.gradients[kernel] = ops.volume_conv_weight(*arrived, x, scale, shift)
        self.gradients[norm.weight], self.gradients[norm.bias] = group_weights(norm, sums, behind, voxels)

    def gates(self, module: Any, linear: list[torch.Tensor], gates: torch.Tensor) -> None:
        """Of both gates (ScSE): linear: those of cSE, in its order; gates: the sums of
        `volume_gate_gradient`.
        """
        self.gradients.update(zip(module.cSE.parameters(), linear, strict=True))
        layer = module.sSE.conv
        channels = len(linear[0])
        whole = gates[:, channels:].sum(dim=0).float()
        self.gradients[layer.weight], self.gradients[layer.bias] = (
            whole[:channels].view_as(layer.weight),
            whole[channels:],
        )

    def pointwise(self, layer: Any, x: torch.Tensor, grad: torch.Tensor) -> None:
        """Of a 1x1x1 convolution of x, from the gradient of its result."""
        self.gradients[layer.weight] = torch.einsum("nov,ncv->oc", grad.flatten(2), x.flatten(2)).view_as(
            layer.weight
        )
        self.gradients[layer.bias] = grad.sum(dim=(0, 2, 3, 4))

    def upsampling(self, layer: nn.ConvTranspose3d, x: torch.Tensor, grad: torch.Tensor) -> None:
        """Of a transposed convolution of x, from the gradient of its result resampled."""
        if layer.weight in self._wanted:
            fine = [2 * n - 1 for n in x.shape[2:]]
            grad = torch.ops.aten.upsample_nearest3d_backward(grad, grad.shape[2:], [*grad.shape[:2], *fine])
            # faster by more than it takes
            grad, x = (t.contiguous(memory_format=torch.channels_last_3d) for t in (grad, x))
            self.gradients[layer.weight] = torch.ops.aten.convolution_backward(
                grad, x, layer.weight, None, [2] * 3, [1] * 3, [1] * 3, True, [0] * 3, 1, [False, True, False]
            )[1]


# Group normalisation from sums over each channel's voxels: as a scale and a shift, and its gradients. G
# groups.


def statistics(norm: nn.GroupNorm, sums: torch.Tensor, voxels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and inverse deviation [N, C] of each channel's group."""
    each = sums.shape[1] // norm.num_groups
    grouped = sums.unflatten(1, (norm.num_groups, -1)).sum(dim=2) / (voxels * each)  # [N, G, 2]
    mean = grouped[..., 0]
    inverse = (grouped[..., 1] - mean.square()).clamp_min(0).add(norm.eps).rsqrt()
    return mean.repeat_interleave(each, dim=1), inverse.repeat_interleave(each, dim=1)


def group_affine(norm: nn.GroupNorm, sums: torch.Tensor, voxels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Group normalisation as scale and shift [N, C] from sums [N, C, 2] float64 of values and squares over
    `voxels` per channel.
    """
    mean, inverse = statistics(norm, sums, voxels)
    scale = norm.weight.double() * inverse
    return scale.float(), (norm.bias.double() - mean * scale).float()


def group_gradient(
    norm: nn.GroupNorm, sums: torch.Tensor, arrived: torch.Tensor, voxels: int
) -> torch.Tensor:
    """Its gradient as f0 g + f1 x + f2, [N, C, 3] float64; arrived: sums [N, C, 2] float64 of g and g x, g
    being the gradient that arrives.

    With x' = (x - mean) inverse and the means over a group: inverse (w g - mean(w g) - x' mean(w g x')).
    """
    mean, inverse = statistics(norm, sums, voxels)
    w = norm.weight.double()
    each = sums.shape[1] // norm.num_groups

    def over_group(values: torch.Tensor) -> torch.Tensor:
        return values.unflatten(1, (norm.num_groups, -1)).mean(dim=2).repeat_interleave(each, dim=1) / voxels

    plain = over_group(w * arrived[..., 0])
    along = over_group(w * (arrived[..., 1] - mean * arrived[..., 0]) * inverse)
    slope = -inverse.square() * along
    return torch.stack([(w * inverse).expand_as(slope), slope, -inverse * plain - slope * mean], dim=2)


def group_weights(
    norm: nn.GroupNorm, sums: torch.Tensor, arrived: torch.Tensor, voxels: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of its weight and bias [C]; arguments as above."""
    mean, inverse = statistics(norm, sums, voxels)
    return ((arrived[..., 1] - mean * arrived[..., 0]) * inverse).sum(dim=0).float(), arrived[..., 0].sum(
        dim=0
    ).float()


_LANES = 8  # channels that the ops take at a time
_VOXELS = 1 << 21  # of slabs that are read at once without gradients; more only take memory
_kernels: "WeakKeyDictionary[nn.Module, dict[str, tuple[int, int, torch.Tensor]]]" = WeakKeyDictionary()


def applies(model: "RewardModel", slab: torch.Tensor) -> bool:
    """Whether the fused ops cover this network and slab: a CPU, float32, whole lanes of channels."""
    if (
        slab.device.type != "cpu"
        or slab.dtype != torch.float32
        or any(c % _LANES for c in model.arch.feature_maps)
    ):
        return False
    return next(model.parameters()).dtype == torch.float32 and ops.differentiable()


def learns(model: "RewardModel") -> bool:
    """Whether a gradient to the U-Net's weights is asked for."""
    return torch.is_grad_enabled() and any(p.requires_grad for p in model.Conv3DModule.parameters())


def features(model: "RewardModel", slab: torch.Tensor) -> torch.Tensor:
    """Features [N, M] of slabs [N, C, D, H, W], cut into patches. Differentiable in the slab, once."""
    if torch.is_grad_enabled() and slab.requires_grad:
        return _Features.apply(slab, model)
    at_once = max(1, _VOXELS // slab[0, 0].numel())
    return torch.cat([_Pass(model, kept=False).features(part) for part in slab.split(at_once)])


def maps(model: "RewardModel", slab: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the U-Net makes of slabs [N, C, D, H, W], see `UNet3d.forward`. Differentiable in the slab and the
    weights, once.
    """
    net = model.Conv3DModule
    weights = [*net.encoders.parameters(), *net.decoders.parameters()]
    whole, coarsest = _Maps.apply(slab, model, torch.is_grad_enabled(), *weights)
    return pointwise(net.final_conv, whole), coarsest


def pointwise(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """A 1x1x1 convolution with bias as a product of matrices: [N, C, D, H, W] -> [N, O, D, H, W].
    Differentiable in all.
    """
    weight = layer.weight.flatten(1).expand(len(x), -1, -1)
    return torch.baddbmm(layer.bias[:, None], weight, x.flatten(2)).unflatten(2, x.shape[2:])


class _Features(torch.autograd.Function):
    @staticmethod
    def forward(ctx, slab, model):
        ctx.run = _Pass(model, kept=True)
        return ctx.run.features(slab.detach())

    @staticmethod
    @once("reward")
    def backward(ctx, grad):
        return ctx.run.gradient(grad), None


class _Maps(torch.autograd.Function):
    """The last volume after its gates, [N, C, D, H, W], and the coarsest one."""

    @staticmethod
    def forward(ctx, slab, model, kept, *weights):
        ctx.save_for_backward(*weights)  # torch refuses a backward pass where they have changed
        ctx.set_materialize_grads(False)
        ctx.run = _Pass(model, kept, learns=kept)
        return ctx.run.maps(slab.detach())

    @staticmethod
    @once("reward")
    def backward(ctx, whole, coarsest):
        weights = ctx.saved_tensors
        needed = ctx.needs_input_grad
        gathered = WeightGradients(w for w, asked in zip(weights, needed[3:], strict=True) if asked)
        slab = ctx.run.gradient_of_maps(whole, coarsest, gathered)
        return slab if needed[0] else None, None, None, *(gathered.gradients.get(w) for w in weights)


@dataclass
class _Block:
    """What a residual block computed."""

    module: Any  # the ResidualBlock, whose parts torch types as tensors or modules
    r: torch.Tensor  # [N, C, D, H, W], or the one channel of which it is made
    mix: torch.Tensor | None  # [C, 2], the factor and offset of each
    first: torch.Tensor  # sums [N, C, 2] of r and r^2
    inner: torch.Tensor  # between the convolutions
    second: torch.Tensor  # its sums
    h: torch.Tensor  # before the gates
    squeezed: torch.Tensor  # [N, C], means of h
    gate: torch.Tensor  # [N, C]
    read: Any = None  # what the layer before r read, where its weights learn

    def spatial(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights [C] and bias [1] of the gate of voxels."""
        layer = self.module.se_module.sSE.conv
        return layer.weight.detach().flatten(), layer.bias.detach()


class _Pass:
    """One forward pass, and, where its volumes are kept, its backward pass."""

    def __init__(self, model: "RewardModel", kept: bool, learns: bool = False):
        self.arch = model.arch
        self.net = model.Conv3DModule
        self.kept = kept
        self.learns = learns
        self.down: list[_Block] = []
        self.up: list[_Block] = []
        self.memory: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def features(self, slab: torch.Tensor) -> torch.Tensor:
        return self._pooled(self._coarsest(slab))

    @torch.no_grad()
    def maps(self, slab: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The last volume after its gates, and the coarsest one."""
        coarsest = self._coarsest(slab)
        # not the tensor that a block has kept: it would keep itself
        return self._gated(self.up[-1])[0], coarsest.detach()

    def _coarsest(self, slab: torch.Tensor) -> torch.Tensor:
        """Runs all blocks; the coarsest volume after its gates."""
        x = slab
        skips = []
        net = self.net
        for level, encoder in enumerate(net.encoders):
            block = self._encode(encoder.basic_module, x)
            block.read = x if self.learns else None
            whole, pooled = self._gated(block, pool=level + 1 < len(net.encoders))
            skips.append(whole)
            self.down.append(block)
            x = whole if pooled is None else pooled
        bottleneck = skips.pop()
        last = None
        for decoder in net.decoders:
            convolution = _upsampling(decoder)
            skip = skips.pop()
            x = bottleneck if last is None else self._gated(last)[0]
            kernel = _kernel(convolution, "up", ops.transposed_kernel)
            r, sums = ops.volume_up(skip, x, convolution.weight, kernel, out=skip)
            last = self._block(decoder.basic_module, r, sums)
            last.read = x if self.learns else None
            self.up.append(last)
        return bottleneck

    def _encode(self, module: Any, x: torch.Tensor) -> _Block:
        if x.shape[1] > 1 or isinstance(module.conv1, nn.Identity):
            r = x if isinstance(module.conv1, nn.Identity) else pointwise(module.conv1, x)
            return self._block(module, r, _sums(*_moments(r), r[0, 0].numel()))
        # conv1 reads one channel, r_c = w_c x + b_c, so its normalisation is an affine function of x as well
        w = module.conv1.weight.reshape(1, -1).double()
        b = module.conv1.bias[None].double()
        mean, variance = _moments(x)  # [N, 1]
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
        channels = sums.shape[1]
        voxels = r[0, 0].numel()
        scale, shift = group_affine(module.conv2.groupnorm, sums, voxels)
        room = self._memory("inner", r, channels)
        if mix is None:
            kernel = _kernel(module.conv2.conv, "conv", ops.transformed_kernel)
            inner, second = ops.volume_conv(
                r, scale, shift, module.conv2.conv.weight, kernel, relu=True, out=room
            )
        else:
            inner, second = ops.volume_conv(
                r, *_of_one_channel(module, mix, scale, shift, *moments), relu=True, out=room
            )
        scale, shift = group_affine(module.conv3.groupnorm, second, voxels)
        kernel = _kernel(module.conv3.conv, "conv", ops.transformed_kernel)
        room = None if self.kept else r if mix is None else self._memory("outer", r, channels)
        h, third = ops.volume_conv(
            inner, scale, shift, module.conv3.conv.weight, kernel, residual=r, mix=mix, relu=True, out=room
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
        """Without a backward pass, memory that is used again: the system takes as long to hand out new pages
        as a pass over them.
        """
        if self.kept:
            return None
        shape = (len(like), channels, *like.shape[2:])
        size = len(like) * channels * like[0, 0].numel()
        if role not in self.memory or self.memory[role].numel() < size:
            self.memory[role] = like.new_empty(size)
        return self.memory[role][:size].view(shape)

    def _gated(self, block: _Block, pool: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        return ops.volume_gate(
            block.h, block.gate, *block.spatial(), out=None if self.kept else block.h, pool=pool
        )

    def _pooled(self, bottleneck: torch.Tensor) -> torch.Tensor:
        """The features; what `gradient` needs of them is a small graph of torch's own, from leaves."""
        arch = self.arch
        last = self.up[-1]
        final = self.net.final_conv
        assert final.bias is not None
        weight = final.weight.detach()[arch.recon_channels :, :, 0, 0, 0]
        bias = final.bias.detach()[arch.recon_channels :]
        with torch.set_grad_enabled(self.kept):
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
                whole, coarse = self.leaves
                response = F.conv3d(whole, weight[..., None, None, None], bias)
                self.result = torch.cat(
                    [grid_feature(response, arch.final_cells), grid_feature(coarse, arch.bottleneck_cells)],
                    dim=1,
                )
        return self.result.detach()

    @torch.no_grad()
    def gradient(self, grad: torch.Tensor) -> torch.Tensor:
        """The gradient to the slab, from one of the features [N, M]."""
        first, second = torch.autograd.grad(self.result, self.leaves, grad, retain_graph=True)
        block = self.up[-1]
        if self.arch.pooling != "slice_max":
            return self._back(*_ungated(block, first, None), second)
        arrived = torch.zeros_like(block.h)
        arrived.flatten(2).scatter_(2, self.places, first)
        return self._back(arrived, second.double(), None)

    @torch.no_grad()
    def gradient_of_maps(
        self, whole: torch.Tensor, coarsest: torch.Tensor | None, weights: WeightGradients
    ) -> torch.Tensor:
        """The gradient to the slab, from those to the maps; those to the weights are added to `weights`."""
        return self._back(*_ungated(self.up[-1], whole, None), coarsest, weights)

    def _back(
        self,
        arrived: torch.Tensor,
        gates: torch.Tensor,
        coarsest: torch.Tensor | None,
        weights: WeightGradients | None = None,
    ) -> torch.Tensor:
        """From gradients to the last volume before its gates, to its gates, and to the coarsest volume after
        them.
        """
        passed = self._through(self.up[-1], arrived, gates, weights)
        skips = []
        for k in reversed(range(len(self.up))):
            skips.append(passed)
            below = self.up[k - 1] if k else self.down[-1]
            layer = _upsampling(self.net.decoders[k])
            if weights is not None:
                weights.upsampling(layer, self.up[k].read, passed)
            kernel = _kernel(layer, "up gradient", lambda w: ops.transposed_kernel(w.transpose(0, 1)))
            whole = ops.volume_up_gradient(passed, kernel, below.h.shape[2:])
            if k:
                passed = self._through(below, *_ungated(below, whole, None), weights)
        whole = whole if coarsest is None else whole + coarsest
        pooled = None
        for level in reversed(range(len(self.down))):
            block = self.down[level]
            passed = self._through(block, *_ungated(block, whole, pooled), weights)
            if not isinstance(block.module.conv1, nn.Identity) and (block.mix is None or weights is not None):
                if weights is not None:
                    weights.pointwise(block.module.conv1, block.read, passed)
                weight = block.module.conv1.weight.flatten(1)  # [O, C]
                passed = (weight.T @ passed.flatten(2)).unflatten(2, passed.shape[2:])
            if level:
                whole = skips.pop()
                pooled = passed
        return passed

    def _through(
        self, block: _Block, arrived: torch.Tensor, gates: torch.Tensor, weights: WeightGradients | None
    ) -> torch.Tensor:
        """The gradient to a block's residual, from those to h and to the gates: the channels' [N, C], and the
        voxels' weights behind them.

        Of a frozen block whose residual is made of one channel it is that one's.
        """
        module = block.module
        voxels = block.h[0, 0].numel()
        r = block.r
        mix = block.mix
        squeezed, *linear = (
            t.detach().requires_grad_() for t in (block.squeezed, *module.se_module.cSE.parameters())
        )
        with torch.enable_grad():
            gate = _channel_gate(squeezed, *linear)
            mean, *linear = torch.autograd.grad(gate, [squeezed, *linear], gates[:, : gate.shape[1]].float())
        mean = mean[..., None].double() / voxels
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
            if mix is not None:
                r = torch.addcmul(mix[:, 1, None, None, None], r, mix[:, 0, None, None, None])
                mix = None
        factors = torch.cat(
            [mean, group_gradient(module.conv2.groupnorm, block.first, sums, voxels)], dim=2
        ).float()
        return ops.volume_join(arrived, block.h, g, r, factors, mix)


def _upsampling(decoder: Any) -> nn.ConvTranspose3d:
    return decoder.upsampling.upsample.conv_transposed


def _ungated(
    block: _Block, whole: torch.Tensor | None, pooled: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    return ops.volume_gate_gradient(block.h, block.gate, *block.spatial(), whole, pooled)


def _channel_gate(squeezed: torch.Tensor, *linear: torch.Tensor) -> torch.Tensor:
    """From means [N, C], and weights and biases of fc1 and fc2."""
    return torch.sigmoid(F.linear(F.relu(F.linear(squeezed, *linear[:2])), *linear[2:]))


def _of_one_channel(
    module: Any,
    mix: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scale, shift [N, 2] and kernels [N, O, 2, 3, 3, 3] of conv2 where its C inputs are made of one.

    The convolution of C such channels is one of two: the standardised slab, and ones, which feel the zeros
    outside.
    """
    w, b = mix.double().T[:, None]  # [1, C]
    deviation = variance.sqrt().clamp_min(1e-12)
    factors = torch.stack([scale * w * deviation, scale * (w * mean + b) + shift], dim=2)  # [N, C, 2]
    kernel = torch.einsum("oczyx,nck->nokzyx", module.conv2.conv.weight.double(), factors).float()
    inverse = 1 / deviation
    scale = torch.cat([inverse, torch.zeros_like(inverse)], dim=1).float()
    return scale, torch.cat([-mean * inverse, torch.ones_like(inverse)], dim=1).float(), kernel


def _kernel(layer: nn.Module, role: str, make: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """A layer's weights as an op reads them, kept until they change."""
    weight: Any = layer.weight
    known = _kernels.setdefault(layer, {})
    state = (weight.data_ptr(), weight._version)
    if role not in known or known[role][:2] != state:
        known[role] = (*state, make(weight.detach()))
    return known[role][2]


def _moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance [N, C] float64 over the volume."""
    flat = x.flatten(2)
    mean = flat.mean(dim=2, keepdim=True)
    centred = flat - mean
    return mean[..., 0].double(), torch.einsum("ncv,ncv->nc", centred, centred).double() / flat.shape[2]


def _sums(mean: torch.Tensor, variance: torch.Tensor, voxels: int) -> torch.Tensor:
    """Sums [N, C, 2] of values and squares."""
    return torch.stack([mean, variance + mean.square()], dim=2) * voxels
