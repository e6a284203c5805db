"""StyleGAN2 synthesis network ("skip" architecture), the backbone that outputs the tri-planes.

Karras et al. 2020, "Analyzing and improving the image quality of StyleGAN", section 4.1: each resolution adds
its ToRGB output to the upsampled sum of those before it.

Shapes: N batch, L num_ws, W w_dim, C/O in/out channels, R resolution, k kernel size.
"""

import math
from typing import Any

import torch

from torch_utils.ops import bias_act, upfirdn2d
from torch_utils.ops.conv2d_resample import modulated_conv2d
from torch_utils.ops.implementations import add_to, convolution_layout
from training.layers import FullyConnectedLayer, MappingNetwork, block_resolutions, channels_at


class SynthesisLayer(torch.nn.Module):
    """Modulated 3x3 convolution, noise, bias and leaky ReLU."""

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
        # The affine layer starts at 1: an untrained style does not scale the features.
        self.affine = FullyConnectedLayer(w_dim, in_channels, bias_init=1)
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.weight = torch.nn.Parameter(
            torch.randn([out_channels, in_channels, 3, 3]).to(memory_format=memory_format)
        )
        if use_noise:
            # The strength starts at 0. noise_const is a buffer, so that
            # renders with "const" are reproducible.
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
        """Map x [N, C, R/up, R/up] with w [N, W] to [N, O, R, R]."""
        assert noise_mode in ("random", "const", "none")
        noise = None  # added after the convolution, before the bias
        if self.use_noise and noise_mode == "random":
            # One noise image per sample, shared by all channels: [N, 1, R, R].
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
            # Upsampling layers run a true convolution, the others a correlation, as in StyleGAN2.
            flip_weight=(self.up == 1),
            fused_modconv=fused_modconv,
        )
        # The clamp applies after the gain, so it is scaled with it.
        clamp = self.conv_clamp * gain if self.conv_clamp is not None else None
        return bias_act.bias_act(
            x, self.bias.to(x.dtype), act="lrelu", gain=self.act_gain * gain, clamp=clamp
        )


class ToRGBLayer(torch.nn.Module):
    """Modulated 1x1 convolution to image (or plane) channels, linear and without demodulation."""

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
        self.affine = FullyConnectedLayer(w_dim, in_channels, bias_init=1)
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.weight = torch.nn.Parameter(
            torch.randn([out_channels, in_channels, 1, 1]).to(memory_format=memory_format)
        )
        self.bias = torch.nn.Parameter(torch.zeros([out_channels]))
        self.weight_gain = 1 / math.sqrt(in_channels)

    def forward(self, x: torch.Tensor, w: torch.Tensor, fused_modconv: bool = True) -> torch.Tensor:
        """Map x [N, C, R, R] with w [N, W] to [N, O, R, R]."""
        # The equalised-rate gain of this layer's weight goes into the styles. Other layers do not need one,
        # since demodulation normalises their weights anyway.
        styles = self.affine(w) * self.weight_gain
        x = modulated_conv2d(x, self.weight, styles, demodulate=False, fused_modconv=fused_modconv)
        return bias_act.bias_act(x, self.bias.to(x.dtype), clamp=self.conv_clamp)


class SynthesisBlock(torch.nn.Module):
    """One resolution of the skip generator: [conv0 with upsampling,] conv1, and ToRGB added to the image so
    far.

    `upsample=False` gives the variant in the super-resolution modules that keeps the resolution.

    Deviates: the image is not modified in place, so a caller's tensor stays intact. The values are the same.
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
        # The first block starts from a learned constant instead of
        # conv0. The network counts these to divide ws.
        self.num_conv = 1 if in_channels == 0 else 2
        self.num_torgb = 1
        self.register_buffer("resample_filter", upfirdn2d.setup_filter([1, 3, 3, 1]))
        layer: dict[str, Any] = {
            "w_dim": w_dim,
            "conv_clamp": conv_clamp,
            "channels_last": self.channels_last,
        }
        if in_channels == 0:
            # Learned input of the 4x4 block, the same for all samples.
            self.const = torch.nn.Parameter(torch.randn([out_channels, resolution, resolution]))
        else:
            up = 2 if upsample else 1
            self.conv0 = SynthesisLayer(
                in_channels, out_channels, resolution=resolution, up=up, use_noise=use_noise, **layer
            )
        self.conv1 = SynthesisLayer(
            out_channels, out_channels, resolution=resolution, use_noise=use_noise, **layer
        )
        self.torgb = ToRGBLayer(out_channels, img_channels, **layer)

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
            x: [N, C, R/2, R/2] features, or None in the first block.
            img: [N, I, R/2, R/2] sum of the ToRGB outputs so far, or None.
            ws: [N, num_conv + num_torgb, W].
            force_fp32: ignore `use_fp16`.
            fused_modconv: see `modulated_conv2d`; None takes the constructor's default.
            noise_mode: "random", "const" or "none".
        Returns: (x, img) at resolution R. With upsample=False, the inputs have resolution R as well.
        """
        w_iter = iter(ws.unbind(dim=1))  # [N, W] each, in the order conv0, conv1, torgb
        # Half precision is for CUDA only; on a CPU the block runs in float32.
        half = self.use_fp16 and not force_fp32 and ws.device.type == "cuda"
        dtype = torch.float16 if half else torch.float32
        layout = convolution_layout(ws.device, self.resolution, self.conv1.weight.shape[0])
        memory_format = torch.channels_last if self.channels_last and half else layout
        if fused_modconv is None:
            fused_modconv = self.fused_modconv_default
        if fused_modconv == "inference_only":
            # Training is faster with ordinary convolutions than with
            # the grouped ones of the fused form, as in EG3D.
            fused_modconv = not self.training
        kwargs: dict[str, Any] = {"fused_modconv": fused_modconv, "noise_mode": noise_mode}
        if self.in_channels == 0:
            x = (
                self.const.to(dtype=dtype, memory_format=memory_format)
                .unsqueeze(0)
                .expand(ws.shape[0], -1, -1, -1)
            )
        else:
            assert x is not None
            x = self.conv0(x.to(dtype=dtype, memory_format=memory_format), next(w_iter), **kwargs)
        x = self.conv1(x, next(w_iter), **kwargs)
        # The image stays in float32 even where features are in half precision, as in StyleGAN2-ADA.
        if img is not None and self.upsample:
            img = upfirdn2d.upsample2d(img.to(memory_format=layout), self.resample_filter)
        y = self.torgb(x, next(w_iter), fused_modconv=bool(fused_modconv)).to(dtype=torch.float32)
        # On a GPU EG3D keeps images contiguous, also with channels-last features.
        y = y if ws.device.type == "cpu" else y.contiguous()
        if img is None:
            return x, y
        # With upsampling, `img` was made above and may be overwritten. Without, it is the caller's tensor.
        return x, add_to(img, y) if self.upsample else img + y


class SynthesisNetwork(torch.nn.Module):
    """Blocks b4 ... b{img_resolution}.

    Each block reads num_conv + num_torgb of the ws, from an offset that advances by num_conv only: the w of a
    block's ToRGB is also that of the next block's first convolution.
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
        # Lowest resolution in half precision; never below 8.
        fp16_from = max(2 ** (int(math.log2(img_resolution)) + 1 - num_fp16_res), 8)
        self.num_ws = 0
        previous = 0  # channels of the block before; 0 marks the first block
        for res in self.block_resolutions:
            channels = channels_at(res, channel_base, channel_max)
            block = SynthesisBlock(
                previous,
                channels,
                w_dim=w_dim,
                resolution=res,
                img_channels=img_channels,
                is_last=(res == img_resolution),
                use_fp16=(num_fp16_res > 0 and res >= fp16_from),
                **block_kwargs,
            )
            self.num_ws += block.num_conv
            # Names b4, b8, ... are those of the published checkpoints.
            setattr(self, f"b{res}", block)
            previous = channels
        self.num_ws += 1  # ToRGB of the last block; those of the others share a w with the next block

    def forward(self, ws: torch.Tensor, **block_kwargs) -> torch.Tensor:
        """Map ws [N, num_ws, W] to an image or planes [N, img_channels, R, R]."""
        if list(ws.shape[1:]) != [self.num_ws, self.w_dim]:
            raise ValueError(
                f"SynthesisNetwork: expected ws of shape [N, {self.num_ws}, {self.w_dim}], got"
                f" {list(ws.shape)}. Use ws of this generator's mapping network."
            )
        ws = ws.to(torch.float32)
        start = 0  # index of the block's first w
        x: Any = None
        img: Any = None
        for res in self.block_resolutions:
            block = getattr(self, f"b{res}")
            x, img = block(x, img, ws.narrow(1, start, block.num_conv + block.num_torgb), **block_kwargs)
            start += block.num_conv
        return img


class Generator(torch.nn.Module):
    """Backbone: mapping and synthesis under the names that checkpoints use."""

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
