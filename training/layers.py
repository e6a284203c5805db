"""Elementary layers of the StyleGAN2 family: linear and convolution layers with equalised learning rate, and
the mapping network.

Equalised learning rate (Karras et al. 2018, section 4.1): weights are stored with unit variance and
multiplied by their initialisation scale 1/sqrt(fan_in) in every forward pass. Adam's step size then has the
same relative effect in all layers.

Shapes: N batch, I input features, O output features, C channels, H x W pixels, k kernel size; Z z_dim, K
c_dim, W w_dim, L num_ws.
"""

import math

import numpy as np
import torch

from torch_utils.ops import bias_act, conv2d_resample, upfirdn2d


def normalize_2nd_moment(x: torch.Tensor, dim: int = 1, eps: float = 1e-8) -> torch.Tensor:
    """Scale to unit second moment: x / sqrt(mean(x^2) + eps) along `dim`.

    Args:
        x: any shape.
        eps: keeps a vector of zeros finite.
    Returns: shape of `x`. Differentiable in x.
    """
    return x * (x.square().mean(dim=dim, keepdim=True) + eps).rsqrt()


class FullyConnectedLayer(torch.nn.Module):
    """Linear layer with equalised learning rate (Karras et al. 2018, section 4.1).

    y = act(x (W lr / sqrt(I))^T + b lr), with lr = `lr_multiplier`. The entries of W are drawn from N(0,
    1/lr^2). The bias starts at `bias_init`, which is *not* divided by lr.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: str = "linear",
        lr_multiplier: float = 1.0,
        bias_init: float = 0.0,
    ):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.activation = activation
        # Divided by lr here and multiplied by it in the forward pass: the initial function is the same for
        # every multiplier, only the speed of learning differs.
        self.weight = torch.nn.Parameter(torch.randn([out_features, in_features]) / lr_multiplier)
        self.bias = torch.nn.Parameter(torch.full([out_features], float(bias_init))) if bias else None
        self.weight_gain = lr_multiplier / math.sqrt(in_features)
        self.bias_gain = lr_multiplier

    def effective_weight(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return the weight as it multiplies the input, [O, I]."""
        return self.weight.to(dtype or self.weight.dtype) * self.weight_gain

    def effective_bias(self, dtype: torch.dtype | None = None) -> torch.Tensor | None:
        """Return the bias as it is added, [O], or None if the layer has none."""
        if self.bias is None:
            return None
        bias = self.bias.to(dtype or self.bias.dtype)
        # A multiplication by 1 would still cost an operation in every forward pass.
        return bias if self.bias_gain == 1 else bias * self.bias_gain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [N, I] to [N, O]."""
        weight = self.effective_weight(x.dtype)
        bias = self.effective_bias(x.dtype)
        # One fused operation where no activation follows.
        if self.activation == "linear":
            return torch.nn.functional.linear(x, weight, bias)
        return bias_act.bias_act(x.matmul(weight.t()), bias, act=self.activation)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, activation={self.activation}"
        )


class Conv2dLayer(torch.nn.Module):
    """Convolution with equalised learning rate, FIR resampling, bias and activation.

    The order is: convolution (with up- or downsampling by the [1,3,3,1] filter), bias, activation, gain,
        clamp.
    """

    # Both are buffers instead of parameters where the layer is frozen.
    weight: torch.Tensor
    bias: torch.Tensor | None
    resample_filter: torch.Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        bias: bool = True,
        activation: str = "linear",
        up: int = 1,
        down: int = 1,
        conv_clamp: float | None = None,
        trainable: bool = True,
    ):
        super().__init__()
        self.activation = activation
        self.up = up
        self.down = down
        self.conv_clamp = conv_clamp
        self.padding = kernel_size // 2
        self.weight_gain = 1 / math.sqrt(in_channels * kernel_size**2)  # 1 / sqrt(fan_in)
        # sqrt(2) for leaky ReLU, which makes up for the variance that the activation removes.
        self.act_gain = bias_act.activation_funcs[activation].def_gain
        # A buffer even where neither up- nor downsampling takes place: checkpoints of EG3D hold it.
        self.register_buffer("resample_filter", upfirdn2d.setup_filter([1, 3, 3, 1]))
        weight = torch.randn([out_channels, in_channels, kernel_size, kernel_size])
        for name, value in (("weight", weight), ("bias", torch.zeros([out_channels]) if bias else None)):
            if trainable:
                self.register_parameter(name, None if value is None else torch.nn.Parameter(value))
            else:
                # Freeze-D (Mo et al. 2020): the same names as buffers, so
                # that the state dict does not change.
                self.register_buffer(name, value)

    def forward(self, x: torch.Tensor, gain: float = 1.0) -> torch.Tensor:
        """Map x [N, C, H, W] to [N, O, H * up / down, W * up / down]."""
        # Scaled in float32, then converted: in half precision the product would round twice.
        weight = (self.weight * self.weight_gain).to(x.dtype)
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        # Upsampling layers run a true convolution, the others a correlation, as in StyleGAN2.
        flip = self.up == 1
        x = conv2d_resample.conv2d_resample(
            x=x,
            w=weight,
            f=self.resample_filter,
            up=self.up,
            down=self.down,
            padding=self.padding,
            flip_weight=flip,
        )
        # The clamp applies after the gain, so it is scaled with it: the clamped quantity stays the same.
        clamp = self.conv_clamp * gain if self.conv_clamp is not None else None
        return bias_act.bias_act(x, bias, act=self.activation, gain=self.act_gain * gain, clamp=clamp)


def channels_at(resolution: int, channel_base: int, channel_max: int) -> int:
    """Return the number of feature maps at a resolution: min(channel_base // resolution, channel_max)."""
    return min(channel_base // resolution, channel_max)


def block_resolutions(resolution: int) -> list[int]:
    """Return [4, 8, ..., resolution].

    Raises: ValueError unless `resolution` is a power of two of at least 4.
    """
    log2 = int(np.log2(resolution)) if resolution >= 4 else 0
    if log2 < 2 or 2**log2 != resolution:
        raise ValueError(
            f"network resolution: expected a power of two >= 4, got {resolution}. Resize the images, or"
            " change the preset (--cfg)."
        )
    return [2**i for i in range(2, log2 + 1)]


def _given(x: torch.Tensor | None) -> torch.Tensor:
    """Return an input as float32, and check that it was given."""
    assert x is not None, "a mapping network with z_dim > 0 or c_dim > 0 takes that input"
    return x.to(torch.float32)


class MappingNetwork(torch.nn.Module):
    """StyleGAN2 mapping network with label embedding.

    x = norm(z) and y = norm(embed(c)) are concatenated, then `num_layers` leaky-ReLU layers follow, with a
    learning rate multiplier of 0.01. norm is `normalize_2nd_moment`.

    `z_dim = 0` makes a mapping of labels only, as the discriminator has. `num_ws = None` makes a single
    vector [N, W], without the L axis and without `w_avg`. `last_activation` is the activation of the last
    layer, if it differs from the others'.
    """

    w_avg: torch.Tensor

    def __init__(
        self,
        z_dim: int,
        c_dim: int,
        w_dim: int,
        num_ws: int | None,
        num_layers: int = 8,
        embed_features: int | None = None,
        layer_features: int | None = None,
        activation: str = "lrelu",
        lr_multiplier: float = 0.01,
        w_avg_beta: float | None = 0.998,
        last_activation: str | None = None,
    ):
        super().__init__()
        self.z_dim = z_dim
        self.c_dim = c_dim
        self.w_dim = w_dim
        self.num_ws = num_ws
        self.num_layers = num_layers
        self.w_avg_beta = w_avg_beta
        embed_features = 0 if c_dim == 0 else (embed_features or w_dim)
        hidden = layer_features or w_dim  # width of all layers but the last
        if num_ws is not None and w_avg_beta is not None:
            self.register_buffer("w_avg", torch.zeros([w_dim]))
        if c_dim > 0:
            # One linear layer. Unlike the layers below it learns at the full rate.
            self.embed = FullyConnectedLayer(c_dim, embed_features)
        sizes = [z_dim + embed_features] + [hidden] * (num_layers - 1) + [w_dim]
        for i, (size_in, size_out) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
            last = last_activation if i == num_layers - 1 and last_activation is not None else activation
            # Names fc0, fc1, ... are those of the published checkpoints; a ModuleList would give others.
            setattr(
                self,
                f"fc{i}",
                FullyConnectedLayer(size_in, size_out, activation=last, lr_multiplier=lr_multiplier),
            )

    def forward(
        self,
        z: torch.Tensor | None,
        c: torch.Tensor | None,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        update_emas: bool = False,
    ) -> torch.Tensor:
        """Map latents to ws.

        Args:
            z: [N, Z], standard normal (None where z_dim is 0).
            c: [N, K] label (None where c_dim is 0).
            truncation_psi: result is w_avg + psi * (w - w_avg). 1: no truncation.
            truncation_cutoff: truncate ws[:, :cutoff] only. None: truncate all.
            update_emas: move w_avg towards the mean of the batch by the share 1 - w_avg_beta. Only the
                generator pass of the discriminator phase does so.
        Returns: [N, L, W], or [N, W] where num_ws is None. Differentiable in z and c.
        """
        parts = []
        # Both parts are normalised on their own, so that neither outweighs the other by its scale.
        if self.z_dim > 0:
            parts.append(normalize_2nd_moment(_given(z)))
        if self.c_dim > 0:
            parts.append(normalize_2nd_moment(self.embed(_given(c))))
        x = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        for i in range(self.num_layers):
            x = getattr(self, f"fc{i}")(x)
        # In place: w_avg is a buffer that checkpoints hold and that G_ema copies.
        if update_emas and self.w_avg_beta is not None and self.num_ws is not None:
            self.w_avg.copy_(x.detach().mean(dim=0).lerp(self.w_avg, self.w_avg_beta))
        if self.num_ws is None:
            return x
        # One copy per layer of the synthesis network, which style mixing and truncation change separately.
        ws = x.unsqueeze(1).repeat([1, self.num_ws, 1])  # [N, L, W]
        # psi = 1 leaves ws unchanged, and skipping it also keeps the bits.
        if truncation_psi != 1:
            cutoff = self.num_ws if truncation_cutoff is None else truncation_cutoff
            ws = torch.cat([self.w_avg.lerp(ws[:, :cutoff], truncation_psi), ws[:, cutoff:]], dim=1)
        return ws
