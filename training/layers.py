"""Elementary layers of StyleGAN2: linear and convolution layers with equalised learning rate, and the
mapping network.

Equalised learning rate (Karras et al. 2018, section 4.1): weights are stored with unit variance and
multiplied by their initialisation scale 1/sqrt(fan_in) in every forward pass, where fan_in is the number of
inputs of a neuron. Adam's step size then has the same relative effect in all layers.

Shapes: N is the number of samples in a batch, I of input features, O of output features, and C of channels.
An image has H x W pixels, a kernel k x k entries. Z is z_dim, K is c_dim, W is w_dim, L is num_ws.
"""

import math

import numpy as np
import torch

from torch_utils.ops import bias_act, conv2d_resample, upfirdn2d


def normalize_2nd_moment(x: torch.Tensor, dim: int = 1, eps: float = 1e-8) -> torch.Tensor:
    """Scale a tensor to unit second moment along an axis: x / sqrt(mean(x^2) + eps). Differentiable in x.

    Args:
        x: tensor of any shape.
        dim: axis of the mean.
        eps: small number that avoids a division by 0.
    Returns: tensor of the same shape.
    """
    return x * (x.square().mean(dim=dim, keepdim=True) + eps).rsqrt()


class FullyConnectedLayer(torch.nn.Module):
    """Linear layer with equalised learning rate (Karras et al. 2018, section 4.1).

    The output is y = act(x (W lr / sqrt(I))^T + b lr), with the learning rate multiplier lr. The entries of W
    are drawn from N(0, 1/lr^2). The initial bias is `bias_init`, which is *not* divided by lr.

    Args:
        in_features: number of input features I.
        out_features: number of output features O.
        bias: False: the layer has no bias.
        activation: name of the activation in `bias_act.activation_funcs`.
        lr_multiplier: factor lr on the learning rate of the layer.
        bias_init: initial value of the bias.
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
        # The weight is divided by lr here and multiplied by lr in the forward pass. The initial function
        # therefore does not depend on lr; only the effect of an optimiser step does.
        self.weight = torch.nn.Parameter(torch.randn([out_features, in_features]) / lr_multiplier)
        self.bias = torch.nn.Parameter(torch.full([out_features], float(bias_init))) if bias else None
        self.weight_gain = lr_multiplier / math.sqrt(in_features)
        self.bias_gain = lr_multiplier

    def effective_weight(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return the scaled weight [O, I] that the input is multiplied by.

        Args: dtype: dtype of the result; None: the dtype of the stored weight.
        """
        return self.weight.to(dtype or self.weight.dtype) * self.weight_gain

    def effective_bias(self, dtype: torch.dtype | None = None) -> torch.Tensor | None:
        """Return the scaled bias [O] that is added; None if the layer has no bias.

        Args: dtype: dtype of the result; None: the dtype of the stored bias.
        """
        if self.bias is None:
            return None
        bias = self.bias.to(dtype or self.bias.dtype)
        # The multiplication is skipped for a gain of 1, which saves an operation in every forward pass.
        return bias if self.bias_gain == 1 else bias * self.bias_gain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map features x [N, I] to [N, O].

        Without activation, x may have further axes: [..., I] becomes [..., O].
        """
        scaled_weight = self.effective_weight(x.dtype)
        scaled_bias = self.effective_bias(x.dtype)
        # Without activation, torch has one fused operation.
        if self.activation == "linear":
            return torch.nn.functional.linear(x, scaled_weight, scaled_bias)
        return bias_act.bias_act(x.matmul(scaled_weight.t()), scaled_bias, act=self.activation)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, activation={self.activation}"
        )


class Conv2dLayer(torch.nn.Module):
    """Convolution with equalised learning rate, FIR resampling, bias and activation.

    The operations are, in this order: convolution with up- or downsampling by the filter [1, 3, 3, 1], bias,
    activation, gain, clamp.

    Args:
        in_channels: number of input channels C.
        out_channels: number of output channels O.
        kernel_size: size of the kernel k.
        bias: False: the layer has no bias.
        activation: name of the activation in `bias_act.activation_funcs`.
        up: factor of upsampling.
        down: factor of downsampling.
        conv_clamp: largest absolute value of the output for gain 1; None: no limit.
        trainable: False: weight and bias are buffers instead of parameters.
    """

    # Parameters, or buffers if the layer is frozen.
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
        # The gain compensates for the reduction of variance by the activation, for example sqrt(2) for
        # leaky ReLU.
        self.act_gain = bias_act.activation_funcs[activation].def_gain
        # Checkpoints of EG3D contain this buffer also for layers without up- and downsampling.
        self.register_buffer("resample_filter", upfirdn2d.setup_filter([1, 3, 3, 1]))
        initial_weight = torch.randn([out_channels, in_channels, kernel_size, kernel_size])
        for tensor_name, initial_value in (
            ("weight", initial_weight),
            ("bias", torch.zeros([out_channels]) if bias else None),
        ):
            if trainable:
                self.register_parameter(
                    tensor_name, None if initial_value is None else torch.nn.Parameter(initial_value)
                )
            else:
                # Freeze-D (Mo et al. 2020). Buffers have the same names in the state dict as parameters.
                self.register_buffer(tensor_name, initial_value)

    def forward(self, x: torch.Tensor, gain: float = 1.0) -> torch.Tensor:
        """Map features x [N, C, H, W] to [N, O, H * up / down, W * up / down].

        Args: x: features; gain: factor on the output.
        """
        # Scaled in float32 and then converted, because a product in half precision would be rounded twice.
        scaled_weight = (self.weight * self.weight_gain).to(x.dtype)
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        # As in StyleGAN2, upsampling layers compute a convolution with a flipped kernel, other
        # layers a correlation.
        is_correlation = self.up == 1
        x = conv2d_resample.conv2d_resample(
            x=x,
            w=scaled_weight,
            f=self.resample_filter,
            up=self.up,
            down=self.down,
            padding=self.padding,
            flip_weight=is_correlation,
        )
        # The clamp is applied after the gain, so its limit is multiplied by the gain.
        clamp = self.conv_clamp * gain if self.conv_clamp is not None else None
        return bias_act.bias_act(x, bias, act=self.activation, gain=self.act_gain * gain, clamp=clamp)


def channels_at(resolution: int, channel_base: int, channel_max: int) -> int:
    """Return the number of feature maps of a layer: min(channel_base // resolution, channel_max).

    Args:
        resolution: pixels per edge of the layer.
        channel_base: number of feature maps times pixels per edge.
        channel_max: largest number of feature maps.
    """
    return min(channel_base // resolution, channel_max)


def block_resolutions(resolution: int) -> list[int]:
    """Return the resolutions of the blocks of a network: [4, 8, ..., resolution], in pixels per edge.

    Raises: ValueError unless `resolution` is a power of two and at least 4.
    """
    exponent = int(np.log2(resolution)) if resolution >= 4 else 0
    if exponent < 2 or 2**exponent != resolution:
        raise ValueError(
            f"network resolution: expected a power of two >= 4, got {resolution}. Resize the images, or use"
            " another preset (--cfg)."
        )
    return [2**i for i in range(2, exponent + 1)]


def _as_float32(x: torch.Tensor | None) -> torch.Tensor:
    """Convert an input of the mapping network to float32, and check that it is not None."""
    assert x is not None, "a mapping network needs latents z if z_dim > 0, and labels c if c_dim > 0"
    return x.to(torch.float32)


class MappingNetwork(torch.nn.Module):
    """StyleGAN2 mapping network with an embedding of labels (Karras et al. 2020).

    The input of the first of `num_layers` linear layers is the concatenation of norm(z) and norm(embed(c)),
    where norm is `normalize_2nd_moment` and embed is a linear layer.

    Args:
        z_dim: number of entries of a latent Z; 0: no latent, as in the discriminator.
        c_dim: number of entries of a label K; 0: no label.
        w_dim: number of entries of a style vector W.
        num_ws: number of copies of the style vector L; None: the result is a single vector [N, W], and the
            network has no `w_avg`.
        num_layers: number of layers.
        embed_features: number of entries of an embedded label; None: w_dim.
        layer_features: number of features between the layers; None: w_dim.
        activation: activation of the layers.
        lr_multiplier: factor on the learning rate of the layers.
        w_avg_beta: decay of the running mean `w_avg` in one update; None: no running mean.
        last_activation: activation of the last layer; None: the same as of the other layers.
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
        hidden_features = layer_features or w_dim  # number of outputs of all layers except the last one
        if num_ws is not None and w_avg_beta is not None:
            self.register_buffer("w_avg", torch.zeros([w_dim]))
        if c_dim > 0:
            # Unlike the layers below, the embedding has the full learning rate.
            self.embed = FullyConnectedLayer(c_dim, embed_features)
        layer_sizes = [z_dim + embed_features] + [hidden_features] * (num_layers - 1) + [w_dim]
        for i, (in_features, out_features) in enumerate(zip(layer_sizes[:-1], layer_sizes[1:], strict=True)):
            is_last = i == num_layers - 1
            layer_activation = last_activation if is_last and last_activation is not None else activation
            # The names fc0, fc1, ... are those of published checkpoints. A ModuleList would give other names.
            setattr(
                self,
                f"fc{i}",
                FullyConnectedLayer(
                    in_features, out_features, activation=layer_activation, lr_multiplier=lr_multiplier
                ),
            )

    def forward(
        self,
        z: torch.Tensor | None,
        c: torch.Tensor | None,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        update_emas: bool = False,
    ) -> torch.Tensor:
        """Map latents and labels to style vectors. Differentiable in z and c.

        Args:
            z: latents [N, Z], standard normal; None if z_dim is 0.
            c: labels [N, K]; None if c_dim is 0.
            truncation_psi: factor psi of the truncation w_avg + psi * (w - w_avg); 1: no truncation.
            truncation_cutoff: number of layers, from the first one, that are truncated; None: all layers.
            update_emas: True: move w_avg towards the mean w of the batch by the fraction 1 - w_avg_beta. Only
                the phase Dmain of GAN training does this.
        Returns: style vectors [N, L, W], or [N, W] if num_ws is None.
        """
        normalised_inputs = []
        # Latent and label are normalised separately, so that neither dominates because of its scale.
        if self.z_dim > 0:
            normalised_inputs.append(normalize_2nd_moment(_as_float32(z)))
        if self.c_dim > 0:
            normalised_inputs.append(normalize_2nd_moment(self.embed(_as_float32(c))))
        features = torch.cat(normalised_inputs, dim=1) if len(normalised_inputs) > 1 else normalised_inputs[0]
        for i in range(self.num_layers):
            features = getattr(self, f"fc{i}")(features)
        # w_avg is a buffer, so it is updated in place.
        if update_emas and self.w_avg_beta is not None and self.num_ws is not None:
            self.w_avg.copy_(features.detach().mean(dim=0).lerp(self.w_avg, self.w_avg_beta))
        if self.num_ws is None:
            return features
        # One copy for each layer of the synthesis network. Style mixing and truncation can change some
        # of them.
        ws = features.unsqueeze(1).repeat([1, self.num_ws, 1])  # [N, L, W]
        # psi = 1 changes nothing but the rounding, so it is skipped.
        if truncation_psi != 1:
            truncated_count = self.num_ws if truncation_cutoff is None else truncation_cutoff
            ws = torch.cat(
                [self.w_avg.lerp(ws[:, :truncated_count], truncation_psi), ws[:, truncated_count:]], dim=1
            )
        return ws
