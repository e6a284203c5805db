"""StyleGAN2 residual discriminator with EG3D's dual discrimination of the final and the raw image.

Dual discrimination (Chan et al. 2022, section 4.3): D receives the final image and the resized raw rendering
as six channels. It can then reject images whose two versions do not agree.

Shapes: N batch, C channels, R resolution, K c_dim, G minibatch standard deviation group, F statistics
channels.
"""

import math

import torch

from torch_utils.ops import upfirdn2d
from torch_utils.ops.implementations import convolution_layout
from training.layers import Conv2dLayer, FullyConnectedLayer, MappingNetwork, block_resolutions, channels_at


def filtered_resizing(image: torch.Tensor, size: int, filter_mode: str = "antialiased") -> torch.Tensor:
    """Resize images [N, C, R, R] to [N, C, size, size], as EG3D does with raw images for the discriminator.

    Args:
        filter_mode: "antialiased" or "none"; both are bilinear.
    """
    assert filter_mode in ("antialiased", "none")
    antialias = filter_mode == "antialiased"
    return torch.nn.functional.interpolate(
        image, size=(size, size), mode="bilinear", align_corners=False, antialias=antialias
    )


class MinibatchStdLayer(torch.nn.Module):
    """Append the standard deviation over groups of samples as feature maps.

    Groups are strided: samples i, i + N/G, i + 2N/G, ... form one. This lets D see a lack of variety.
    """

    def __init__(self, group_size: int | None, num_channels: int = 1):
        super().__init__()
        self.group_size = group_size
        self.num_channels = num_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [N, C, H, W] to [N, C + num_channels, H, W]."""
        n, c, h, w = x.shape
        # A batch smaller than the group size forms a single group.
        group = n if self.group_size is None else min(self.group_size, n)
        # [G, N/G, F, C/F, H, W]
        y = x.reshape(group, n // group, self.num_channels, c // self.num_channels, h, w)
        y = (y - y.mean(dim=0)).square().mean(dim=0)  # biased variance over the group, [N/G, F, C/F, H, W]
        y = (y + 1e-8).sqrt().mean(dim=[2, 3, 4])  # [N/G, F]
        # All samples of a group get the same value at every pixel: [N, F, H, W].
        y = y.reshape(-1, self.num_channels, 1, 1).repeat(group, 1, h, w)
        return torch.cat([x, y], dim=1)


class DiscriminatorBlock(torch.nn.Module):
    """Residual block that halves the resolution. The first one starts with `fromrgb`."""

    def __init__(
        self,
        in_channels: int,
        tmp_channels: int,
        out_channels: int,
        resolution: int,
        img_channels: int,
        first_layer_idx: int,
        conv_clamp: float | None = None,
        use_fp16: bool = False,
        fp16_channels_last: bool = False,
        freeze_layers: int = 0,
    ):
        super().__init__()
        self.in_channels = in_channels
        self.resolution = resolution
        self.img_channels = img_channels
        self.use_fp16 = use_fp16
        self.channels_last = use_fp16 and fp16_channels_last
        self.register_buffer("resample_filter", upfirdn2d.setup_filter([1, 3, 3, 1]))
        self.num_layers = 0

        def layer(*args, **kwargs) -> Conv2dLayer:
            # Layers are counted over the whole network, in the order in which they are built: Freeze-D
            # freezes the first ones, those nearest to the image.
            trainable = first_layer_idx + self.num_layers >= freeze_layers
            self.num_layers += 1
            kwargs = {"conv_clamp": conv_clamp, "trainable": trainable, **kwargs}
            return Conv2dLayer(*args, **kwargs)

        if in_channels == 0:
            self.fromrgb = layer(img_channels, tmp_channels, 1, activation="lrelu")
        self.conv0 = layer(tmp_channels, tmp_channels, 3, activation="lrelu")
        self.conv1 = layer(tmp_channels, out_channels, 3, activation="lrelu", down=2)
        # As in StyleGAN2-ADA, the linear skip is not clamped.
        self.skip = layer(tmp_channels, out_channels, 1, bias=False, down=2, conv_clamp=None)

    def forward(
        self, x: torch.Tensor | None, img: torch.Tensor | None, force_fp32: bool = False
    ) -> torch.Tensor:
        """Run the block.

        Args:
            x: [N, C, R, R] features, or None in the first block.
            img: [N, I, R, R], in the first block only.
        Returns: [N, O, R/2, R/2].
        """
        source = x if x is not None else img
        assert source is not None
        half = self.use_fp16 and not force_fp32 and source.device.type == "cuda"
        dtype = torch.float16 if half else torch.float32
        fast = convolution_layout(source.device, self.resolution, self.conv1.weight.shape[0])
        memory_format = torch.channels_last if self.channels_last and half else fast
        source = source.to(dtype=dtype, memory_format=memory_format)
        x = self.fromrgb(source) if self.in_channels == 0 else source
        # Each branch is scaled by sqrt(0.5), so that their sum keeps the variance.
        y = self.skip(x, gain=math.sqrt(0.5))  # [N, O, R/2, R/2]
        return y + self.conv1(self.conv0(x), gain=math.sqrt(0.5))


class DiscriminatorEpilogue(torch.nn.Module):
    """Last part of the discriminator: from 4x4 features to a logit.

    Minibatch standard deviation, one convolution and two linear layers, then the projection on the embedded
    label (Miyato and Koyama 2018).
    """

    def __init__(
        self,
        in_channels: int,
        cmap_dim: int,
        resolution: int,
        mbstd_group_size: int | None = 4,
        mbstd_num_channels: int = 1,
        conv_clamp: float | None = None,
    ):
        super().__init__()
        self.cmap_dim = cmap_dim
        self.mbstd = (
            MinibatchStdLayer(mbstd_group_size, mbstd_num_channels) if mbstd_num_channels > 0 else None
        )
        self.conv = Conv2dLayer(
            in_channels + mbstd_num_channels, in_channels, 3, activation="lrelu", conv_clamp=conv_clamp
        )
        self.fc = FullyConnectedLayer(in_channels * resolution**2, in_channels, activation="lrelu")
        self.out = FullyConnectedLayer(in_channels, cmap_dim if cmap_dim > 0 else 1)

    def forward(self, x: torch.Tensor, cmap: torch.Tensor | None) -> torch.Tensor:
        """Map x [N, C, 4, 4] and the embedded label cmap [N, cmap_dim] to logits [N, 1]."""
        # Always in float32, even where the blocks before ran in half precision.
        x = x.to(dtype=torch.float32, memory_format=torch.contiguous_format)
        if self.mbstd is not None:
            x = self.mbstd(x)
        x = self.out(self.fc(self.conv(x).flatten(1)))  # [N, C, 4, 4] -> [N, 16 C] -> [N, cmap_dim or 1]
        if self.cmap_dim > 0:
            assert cmap is not None
            # Projection: the scalar product of image features and label, scaled to unit variance.
            x = (x * cmap).sum(dim=1, keepdim=True) * (1 / math.sqrt(self.cmap_dim))
        return x


class DualDiscriminator(torch.nn.Module):
    """Discriminator of six input channels: the image, and the raw neural rendering resized to the same size.

    Chan et al. 2022, section 4.3.
    """

    def __init__(
        self,
        c_dim: int,
        img_resolution: int,
        img_channels: int,
        channel_base: int = 32768,
        channel_max: int = 512,
        num_fp16_res: int = 4,
        conv_clamp: float | None = 256,
        cmap_dim: int | None = None,
        disc_c_noise: float = 0.0,
        block_kwargs: dict | None = None,
        mapping_kwargs: dict | None = None,
        epilogue_kwargs: dict | None = None,
    ):
        super().__init__()
        self.c_dim = c_dim
        self.img_resolution = img_resolution
        self.img_channels = img_channels * 2  # the image, and the resized raw rendering
        self.disc_c_noise = disc_c_noise
        self.block_resolutions = block_resolutions(img_resolution)[:0:-1]  # img_resolution, ..., 8
        # Lowest resolution in half precision; never below 8.
        fp16_from = max(2 ** (int(math.log2(img_resolution)) + 1 - num_fp16_res), 8)
        width = {res: channels_at(res, channel_base, channel_max) for res in [*self.block_resolutions, 4]}
        # Without labels there is no projection; the logit is then the last layer's only output.
        cmap_dim = 0 if c_dim == 0 else width[4] if cmap_dim is None else cmap_dim
        layer_idx = 0
        for res in self.block_resolutions:
            block = DiscriminatorBlock(
                # 0 marks the first block, which reads the image by fromrgb.
                width[res] if res < img_resolution else 0,
                width[res],
                width[res // 2],
                resolution=res,
                img_channels=self.img_channels,
                first_layer_idx=layer_idx,
                conv_clamp=conv_clamp,
                use_fp16=(num_fp16_res > 0 and res >= fp16_from),
                **(block_kwargs or {}),
            )
            setattr(self, f"b{res}", block)
            layer_idx += block.num_layers
        if c_dim > 0:
            # A label-only mapping whose output, one vector per sample, is the projection's label embedding.
            self.mapping = MappingNetwork(
                z_dim=0, c_dim=c_dim, w_dim=cmap_dim, num_ws=None, w_avg_beta=None, **(mapping_kwargs or {})
            )
        self.b4 = DiscriminatorEpilogue(
            width[4], cmap_dim=cmap_dim, resolution=4, conv_clamp=conv_clamp, **(epilogue_kwargs or {})
        )
        self.register_buffer("resample_filter", upfirdn2d.setup_filter([1, 3, 3, 1]))

    def forward(
        self, img: dict[str, torch.Tensor], c: torch.Tensor, update_emas: bool = False, **block_kwargs
    ) -> torch.Tensor:
        """Return the realness logits.

        Args:
            img: {'image': [N, 3, R, R], 'image_raw': [N, 3, r, r]} in [-1, 1].
            c: [N, K] camera labels.
            update_emas: part of EG3D's signature; D has no moving averages.
        Returns: [N, 1]. Differentiable in both images, twice.
        Deviates: with disc_c_noise > 0 the noise is added to a copy of c. EG3D adds it in place, so that it
        accumulates over phases.
        """
        del update_emas
        x = None
        # [N, 6, R, R]
        source = torch.cat([img["image"], filtered_resizing(img["image_raw"], img["image"].shape[-1])], dim=1)
        for res in self.block_resolutions:
            x = getattr(self, f"b{res}")(x, source if x is None else None, **block_kwargs)
        cmap = None
        if self.c_dim > 0:
            # Regularises D's conditioning on the pose (EG3D).
            if self.disc_c_noise > 0:
                c = c + torch.randn_like(c) * c.std(dim=0) * self.disc_c_noise
            cmap = self.mapping(None, c)
        return self.b4(x, cmap)
