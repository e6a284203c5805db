"""StyleGAN2 synthesis network, which outputs the tri-planes of EG3D.

The network has the "skip" architecture (Karras et al. 2020, "Analyzing and improving the image quality
of StyleGAN", section 4.1): each block adds the output of its ToRGB layer to the upsampled image of the
blocks before.

Shapes: N is the number of images in a batch, L is num_ws, W is w_dim, C and O are the numbers of input and
output channels of a layer, I is the number of image channels, R of pixels per edge.
"""

import math
from typing import Any

import torch

from torch_utils.ops import bias_act, upfirdn2d
from torch_utils.ops.conv2d_resample import modulated_conv2d
from torch_utils.ops.implementations import add_to, convolution_layout
from training.layers import FullyConnectedLayer, MappingNetwork, block_resolutions, channels_at


class SynthesisLayer(torch.nn.Module):
    """Layer of StyleGAN2: modulated 3 x 3 convolution, noise, bias and leaky ReLU.

    Args:
        in_channels, out_channels: numbers of channels C and O.
        w_dim: number of entries of a style vector W.
        resolution: pixels per edge of the output R.
        up: factor of upsampling.
        use_noise: True: the layer has noise inputs.
        conv_clamp: largest absolute value of the output for gain 1; None: no limit.
        channels_last: True: store the weight in the memory format channels_last.
    """

    noise_const: torch.Tensor
    resample_filter: torch.Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        w_dim: int,
        resolution: int,
        up: int = 1,
        use_noise: bool = True,
        conv_clamp: float | None = None,
        channels_last: bool = False,
    ):
        super().__init__()
        self.resolution = resolution
        self.up = up
        self.use_noise = use_noise
        self.conv_clamp = conv_clamp
        self.act_gain = bias_act.activation_funcs["lrelu"].def_gain
        self.register_buffer("resample_filter", upfirdn2d.setup_filter([1, 3, 3, 1]))
        # With a bias of 1, an untrained style does not scale the features.
        self.affine = FullyConnectedLayer(w_dim, in_channels, bias_init=1)
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.weight = torch.nn.Parameter(
            torch.randn([out_channels, in_channels, 3, 3]).to(memory_format=memory_format)
        )
        if use_noise:
            # noise_const is a buffer, so that renders with the mode "const" are reproducible. The strength
            # is learned.
            self.register_buffer("noise_const", torch.randn([resolution, resolution]))
            self.noise_strength = torch.nn.Parameter(torch.zeros([]))
        self.bias = torch.nn.Parameter(torch.zeros([out_channels]))

    def forward(
        self,
        x: torch.Tensor,
        w: torch.Tensor,
        noise_mode: str = "random",
        fused_modconv: bool = True,
        gain: float = 1.0,
    ) -> torch.Tensor:
        """Map features x [N, C, R/up, R/up] with style vectors w [N, W] to features [N, O, R, R].

        Args:
            x: features.
            w: style vectors.
            noise_mode: "random", "const" (the stored noise) or "none".
            fused_modconv: see `modulated_conv2d`.
            gain: factor on the output.
        """
        assert noise_mode in ("random", "const", "none")
        noise = None  # it is added after the convolution and before the bias
        if self.use_noise and noise_mode == "random":
            # One noise image for each sample, which all channels share: [N, 1, R, R].
            noise = (
                torch.randn([x.shape[0], 1, self.resolution, self.resolution], device=x.device)
                * self.noise_strength
            )
        elif self.use_noise and noise_mode == "const":
            noise = self.noise_const * self.noise_strength  # [R, R], the same for all samples
        x = modulated_conv2d(
            x,
            self.weight,
            self.affine(w),
            noise=noise,
            up=self.up,
            padding=1,
            resample_filter=self.resample_filter,
            # As in StyleGAN2, upsampling layers compute a convolution with a flipped kernel, other layers
            # a correlation.
            flip_weight=(self.up == 1),
            fused_modconv=fused_modconv,
        )
        # The clamp is applied after the gain, so its limit is multiplied by the gain.
        clamp = self.conv_clamp * gain if self.conv_clamp is not None else None
        return bias_act.bias_act(
            x, self.bias.to(x.dtype), act="lrelu", gain=self.act_gain * gain, clamp=clamp
        )


class ToRGBLayer(torch.nn.Module):
    """Modulated 1 x 1 convolution to image (or plane) channels, without activation and demodulation.

    Args:
        in_channels, out_channels: numbers of channels C and O.
        w_dim: number of entries of a style vector W.
        conv_clamp: largest absolute value of the output; None: no limit.
        channels_last: True: store the weight in the memory format channels_last.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        w_dim: int,
        conv_clamp: float | None = None,
        channels_last: bool = False,
    ):
        super().__init__()
        self.conv_clamp = conv_clamp
        # With a bias of 1, an untrained style does not scale the features.
        self.affine = FullyConnectedLayer(w_dim, in_channels, bias_init=1)
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.weight = torch.nn.Parameter(
            torch.randn([out_channels, in_channels, 1, 1]).to(memory_format=memory_format)
        )
        self.bias = torch.nn.Parameter(torch.zeros([out_channels]))
        self.weight_gain = 1 / math.sqrt(in_channels)

    def forward(self, x: torch.Tensor, w: torch.Tensor, fused_modconv: bool = True) -> torch.Tensor:
        """Map features x [N, C, R, R] with style vectors w [N, W] to an image [N, O, R, R]."""
        # The gain of the equalised learning rate is multiplied into the styles. `SynthesisLayer` needs no
        # gain, because demodulation normalises its weights.
        styles = self.affine(w) * self.weight_gain
        x = modulated_conv2d(x, self.weight, styles, demodulate=False, fused_modconv=fused_modconv)
        return bias_act.bias_act(x, self.bias.to(x.dtype), clamp=self.conv_clamp)


class SynthesisBlock(torch.nn.Module):
    """Block of the synthesis network for one resolution: conv0 (with upsampling), conv1 and ToRGB.

    The first block of a network has no conv0, but a learned constant as input.

    Deviates: the image of the caller is not changed in place. The values are the same as in EG3D.

    Args:
        in_channels: number of input channels C; 0 for the first block.
        out_channels: number of output channels O.
        w_dim: number of entries of a style vector W.
        resolution: pixels per edge of the output R.
        img_channels: number of image channels I.
        is_last: True for the last block of a network.
        upsample: False: the block does not change the resolution, as in some super-resolution modules.
        conv_clamp: largest absolute value of features after a convolution; None: no limit.
        use_fp16: True: compute in half precision on CUDA.
        fp16_channels_last: True: use the memory format channels_last in half precision.
        fused_modconv_default: default of the argument fused_modconv of `forward`.
        use_noise: True: the layers have noise inputs.
    """

    resample_filter: torch.Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        w_dim: int,
        resolution: int,
        img_channels: int,
        is_last: bool = False,
        upsample: bool = True,
        conv_clamp: float | None = 256,
        use_fp16: bool = False,
        fp16_channels_last: bool = False,
        fused_modconv_default: bool | str = True,
        use_noise: bool = True,
    ):
        super().__init__()
        self.in_channels = in_channels
        self.w_dim = w_dim
        self.resolution = resolution
        self.img_channels = img_channels
        self.is_last = is_last
        self.upsample = upsample
        self.use_fp16 = use_fp16
        self.channels_last = use_fp16 and fp16_channels_last
        self.fused_modconv_default = fused_modconv_default
        # Numbers of layers, by which the network divides ws among its blocks. The first block has no conv0.
        self.num_conv = 1 if in_channels == 0 else 2
        self.num_torgb = 1
        self.register_buffer("resample_filter", upfirdn2d.setup_filter([1, 3, 3, 1]))
        layer_kwargs: dict[str, Any] = {
            "w_dim": w_dim,
            "conv_clamp": conv_clamp,
            "channels_last": self.channels_last,
        }
        if in_channels == 0:
            # Learned input, the same for all samples.
            self.const = torch.nn.Parameter(torch.randn([out_channels, resolution, resolution]))
        else:
            upsampling_factor = 2 if upsample else 1
            self.conv0 = SynthesisLayer(
                in_channels,
                out_channels,
                resolution=resolution,
                up=upsampling_factor,
                use_noise=use_noise,
                **layer_kwargs,
            )
        self.conv1 = SynthesisLayer(
            out_channels, out_channels, resolution=resolution, use_noise=use_noise, **layer_kwargs
        )
        self.torgb = ToRGBLayer(out_channels, img_channels, **layer_kwargs)

    def forward(
        self,
        x: torch.Tensor | None,
        img: torch.Tensor | None,
        ws: torch.Tensor,
        force_fp32: bool = False,
        fused_modconv: bool | str | None = None,
        noise_mode: str = "random",
        **_unused,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the block.

        Args:
            x: features [N, C, R/2, R/2], or [N, C, R, R] with upsample=False; None in the first block.
            img: image of the blocks before, [N, I, R/2, R/2], or [N, I, R, R] with upsample=False; None if
                there is none.
            ws: style vectors [N, num_conv + num_torgb, W], one for each layer.
            force_fp32: True: compute in float32 despite `use_fp16`.
            fused_modconv: see `modulated_conv2d`. "inference_only" means True in eval mode only; None: the
                default of the constructor.
            noise_mode: "random", "const" or "none", see `SynthesisLayer`.
        Returns: features [N, O, R, R] and image [N, I, R, R].
        """
        remaining_ws = iter(ws.unbind(dim=1))  # [N, W] each, in the order conv0, conv1, torgb
        is_half_precision = self.use_fp16 and not force_fp32 and ws.device.type == "cuda"
        dtype = torch.float16 if is_half_precision else torch.float32
        fastest_layout = convolution_layout(ws.device, self.resolution, self.conv1.weight.shape[0])
        memory_format = torch.channels_last if self.channels_last and is_half_precision else fastest_layout
        if fused_modconv is None:
            fused_modconv = self.fused_modconv_default
        if fused_modconv == "inference_only":
            # As in EG3D: the fused form has grouped convolutions, with which training is slower.
            fused_modconv = not self.training
        layer_kwargs: dict[str, Any] = {"fused_modconv": fused_modconv, "noise_mode": noise_mode}
        if self.in_channels == 0:
            # The learned constant, expanded to the batch: [O, R, R] -> [N, O, R, R].
            x = (
                self.const.to(dtype=dtype, memory_format=memory_format)
                .unsqueeze(0)
                .expand(ws.shape[0], -1, -1, -1)
            )
        else:
            assert x is not None
            x = self.conv0(x.to(dtype=dtype, memory_format=memory_format), next(remaining_ws), **layer_kwargs)
        x = self.conv1(x, next(remaining_ws), **layer_kwargs)
        # As in StyleGAN2-ADA, the image remains in float32 also if features are in half precision.
        if img is not None and self.upsample:
            img = upfirdn2d.upsample2d(img.to(memory_format=fastest_layout), self.resample_filter)
        block_image = self.torgb(x, next(remaining_ws), fused_modconv=bool(fused_modconv)).to(
            dtype=torch.float32
        )
        # As in EG3D, images on a GPU are contiguous, also if features have the format channels_last.
        block_image = block_image if ws.device.type == "cpu" else block_image.contiguous()
        if img is None:
            return x, block_image
        # After upsampling, `img` is a new tensor, which `add_to` may change in place. Otherwise it is the
        # caller's tensor.
        return x, add_to(img, block_image) if self.upsample else img + block_image


class SynthesisNetwork(torch.nn.Module):
    """Synthesis network with one block for each resolution: b4, b8, ..., b{img_resolution}.

    Each convolution has its own style vector. The ToRGB layer of a block has the same style vector as the
    first convolution of the next block.

    Args:
        w_dim: number of entries of a style vector W.
        img_resolution: pixels per edge of the output, a power of two.
        img_channels: number of image (or plane) channels I.
        channel_base, channel_max: a block at R pixels has channel_base / R channels, but at most channel_max.
        num_fp16_res: number of highest resolutions in half precision on CUDA.
        block_kwargs: further arguments of `SynthesisBlock`.
    """

    def __init__(
        self,
        w_dim: int,
        img_resolution: int,
        img_channels: int,
        channel_base: int = 32768,
        channel_max: int = 512,
        num_fp16_res: int = 4,
        **block_kwargs,
    ):
        super().__init__()
        self.w_dim = w_dim
        self.img_resolution = img_resolution
        self.img_channels = img_channels
        self.block_resolutions = block_resolutions(img_resolution)
        # Lowest resolution in half precision, at least 8.
        smallest_fp16_resolution = max(2 ** (int(math.log2(img_resolution)) + 1 - num_fp16_res), 8)
        self.num_ws = 0
        previous_channels = 0  # output channels of the block before; 0 marks the first block
        for resolution in self.block_resolutions:
            channel_count = channels_at(resolution, channel_base, channel_max)
            block = SynthesisBlock(
                previous_channels,
                channel_count,
                w_dim=w_dim,
                resolution=resolution,
                img_channels=img_channels,
                is_last=(resolution == img_resolution),
                use_fp16=(num_fp16_res > 0 and resolution >= smallest_fp16_resolution),
                **block_kwargs,
            )
            self.num_ws += block.num_conv
            # The names b4, b8, ... are those of published checkpoints.
            setattr(self, f"b{resolution}", block)
            previous_channels = channel_count
        self.num_ws += 1  # for ToRGB of the last block, which has no next block to share a style vector with

    def forward(self, ws: torch.Tensor, **block_kwargs) -> torch.Tensor:
        """Map style vectors ws [N, L, W] to an image or planes [N, I, R, R].

        Args: block_kwargs: further arguments of `SynthesisBlock.forward`.
        Raises: ValueError for another shape of ws.
        """
        if list(ws.shape[1:]) != [self.num_ws, self.w_dim]:
            raise ValueError(
                f"SynthesisNetwork: expected ws of shape [N, {self.num_ws}, {self.w_dim}], got"
                f" {list(ws.shape)}. Pass the output of this generator's mapping network."
            )
        ws = ws.to(torch.float32)
        first_w_index = 0  # index of the block's first style vector
        features: Any = None
        image: Any = None
        for resolution in self.block_resolutions:
            block = getattr(self, f"b{resolution}")
            block_ws = ws.narrow(1, first_w_index, block.num_conv + block.num_torgb)
            features, image = block(features, image, block_ws, **block_kwargs)
            # The style vector of ToRGB is also the first one of the next block.
            first_w_index += block.num_conv
        return image


class Generator(torch.nn.Module):
    """StyleGAN2 generator, which consists of a mapping network and a synthesis network.

    Args:
        z_dim: number of entries of a latent.
        c_dim: number of entries of a label.
        w_dim: number of entries of a style vector W.
        img_resolution: pixels per edge of the output.
        img_channels: number of image (or plane) channels.
        mapping_kwargs, synthesis_kwargs: further arguments of `MappingNetwork` and `SynthesisNetwork`.
    """

    def __init__(
        self,
        z_dim: int,
        c_dim: int,
        w_dim: int,
        img_resolution: int,
        img_channels: int,
        mapping_kwargs: dict | None = None,
        **synthesis_kwargs,
    ):
        super().__init__()
        self.z_dim = z_dim
        self.c_dim = c_dim
        self.w_dim = w_dim
        self.img_resolution = img_resolution
        self.img_channels = img_channels
        self.synthesis = SynthesisNetwork(
            w_dim=w_dim, img_resolution=img_resolution, img_channels=img_channels, **synthesis_kwargs
        )
        self.num_ws = self.synthesis.num_ws
        self.mapping = MappingNetwork(
            z_dim=z_dim, c_dim=c_dim, w_dim=w_dim, num_ws=self.num_ws, **(mapping_kwargs or {})
        )
