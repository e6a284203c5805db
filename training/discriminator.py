"""StyleGAN2 residual discriminator with EG3D's dual discrimination of the final and the raw image.

Dual discrimination (Chan et al. 2022, section 4.3): the discriminator D receives the final image and the
resized raw rendering as six channels. D can then detect images whose two versions do not agree.

Shapes: N is the number of images in a batch, I of input channels, C of channels, O of output channels, R of
pixels per edge, K is c_dim, G is the group size of the minibatch standard deviation, and F the number of its
feature maps.
"""

import math

import torch

from torch_utils.ops import upfirdn2d
from torch_utils.ops.implementations import convolution_layout
from training.layers import Conv2dLayer, FullyConnectedLayer, MappingNetwork, block_resolutions, channels_at


def filtered_resizing(image: torch.Tensor, size: int, filter_mode: str = "antialiased") -> torch.Tensor:
    """Resize images by bilinear interpolation, as EG3D does for the discriminator.

    Args:
        image: images [N, C, R, R].
        size: pixels per edge of the result.
        filter_mode: "antialiased", or "none" for interpolation without antialiasing.
    Returns: images [N, C, size, size].
    """
    assert filter_mode in ("antialiased", "none")
    antialias = filter_mode == "antialiased"
    return torch.nn.functional.interpolate(
        image, size=(size, size), mode="bilinear", align_corners=False, antialias=antialias
    )


class MinibatchStdLayer(torch.nn.Module):
    """Layer that appends the standard deviation over a group of images as feature maps (Karras et al. 2018).

    With it, D can detect that generated images vary too little. The images i, i + N/G, i + 2N/G, ... form
    a group.

    Args:
        group_size: number of images in a group G; None: the full batch.
        num_channels: number of appended feature maps F. The standard deviation is averaged over C/F
            channels each.
    """

    def __init__(self, group_size: int | None, num_channels: int = 1):
        super().__init__()
        self.group_size = group_size
        self.num_channels = num_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map features x [N, C, H, W] to [N, C + F, H, W]."""
        n, c, h, w = x.shape
        # A batch with fewer images than the group size forms a single group.
        group_size = n if self.group_size is None else min(self.group_size, n)
        # [G, N/G, F, C/F, H, W]
        grouped_features = x.reshape(
            group_size, n // group_size, self.num_channels, c // self.num_channels, h, w
        )
        # Biased variance over the group, [N/G, F, C/F, H, W].
        variances = (grouped_features - grouped_features.mean(dim=0)).square().mean(dim=0)
        std_maps = (variances + 1e-8).sqrt().mean(dim=[2, 3, 4])  # [N/G, F]
        # All images of a group get the same value at every pixel: [N, F, H, W].
        std_maps = std_maps.reshape(-1, self.num_channels, 1, 1).repeat(group_size, 1, h, w)
        return torch.cat([x, std_maps], dim=1)


class DiscriminatorBlock(torch.nn.Module):
    """Residual block that halves the resolution.

    The first block begins with `fromrgb`, a convolution that converts the image to features.

    Args:
        in_channels: number of input channels C; 0 for the first block, whose input is the image.
        tmp_channels: number of channels inside the block.
        out_channels: number of output channels O.
        resolution: pixels per edge of the input R.
        img_channels: number of channels of the image I.
        first_layer_idx: number of layers in the blocks before this one.
        conv_clamp: largest absolute value of features after a convolution; None: no limit.
        use_fp16: True: compute in half precision on CUDA.
        fp16_channels_last: True: use the memory format channels_last in half precision.
        freeze_layers: number of first layers of the network that are not trained.
    """

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

        def build_layer(*args, **kwargs) -> Conv2dLayer:
            """Build the next layer, which is frozen if it is one of the first layers of the network."""
            # Layers are counted over all blocks, in the order in which they are built. Freeze-D (Mo et al.
            # 2020) freezes the layers that are nearest to the image.
            is_trainable = first_layer_idx + self.num_layers >= freeze_layers
            self.num_layers += 1
            kwargs = {"conv_clamp": conv_clamp, "trainable": is_trainable, **kwargs}
            return Conv2dLayer(*args, **kwargs)

        if in_channels == 0:
            self.fromrgb = build_layer(img_channels, tmp_channels, 1, activation="lrelu")
        self.conv0 = build_layer(tmp_channels, tmp_channels, 3, activation="lrelu")
        self.conv1 = build_layer(tmp_channels, out_channels, 3, activation="lrelu", down=2)
        # As in StyleGAN2-ADA, the linear skip connection is not clamped.
        self.skip = build_layer(tmp_channels, out_channels, 1, bias=False, down=2, conv_clamp=None)

    def forward(
        self, x: torch.Tensor | None, img: torch.Tensor | None, force_fp32: bool = False
    ) -> torch.Tensor:
        """Run the block.

        Args:
            x: features [N, C, R, R], or None in the first block.
            img: image [N, I, R, R] in the first block, else None.
            force_fp32: True: compute in float32 despite `use_fp16`.
        Returns: features [N, O, R/2, R/2].
        """
        block_input = x if x is not None else img
        assert block_input is not None
        is_half_precision = self.use_fp16 and not force_fp32 and block_input.device.type == "cuda"
        dtype = torch.float16 if is_half_precision else torch.float32
        fastest_layout = convolution_layout(block_input.device, self.resolution, self.conv1.weight.shape[0])
        memory_format = torch.channels_last if self.channels_last and is_half_precision else fastest_layout
        block_input = block_input.to(dtype=dtype, memory_format=memory_format)
        x = self.fromrgb(block_input) if self.in_channels == 0 else block_input
        # Each of the two branches is scaled by sqrt(0.5), so that the variance of their sum is that of
        # one branch.
        skip_features = self.skip(x, gain=math.sqrt(0.5))  # [N, O, R/2, R/2]
        return skip_features + self.conv1(self.conv0(x), gain=math.sqrt(0.5))


class DiscriminatorEpilogue(torch.nn.Module):
    """Last part of the discriminator, which maps features of 4 x 4 pixels to a logit.

    It consists of the minibatch standard deviation, one convolution, two linear layers, and the projection on
    the embedded label (Miyato and Koyama 2018).

    Args:
        in_channels: number of input channels C.
        cmap_dim: number of entries of the embedded label; 0: no label.
        resolution: pixels per edge of the input, 4.
        mbstd_group_size: group size of the minibatch standard deviation; None: the full batch.
        mbstd_num_channels: number of feature maps of the minibatch standard deviation; 0: there is no such
            layer.
        conv_clamp: largest absolute value of features after the convolution; None: no limit.
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
        """Map features x [N, C, 4, 4] and the embedded labels cmap [N, cmap_dim] to logits [N, 1].

        Without labels, cmap is None.
        """
        # Always in float32, also if the blocks before ran in half precision.
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
    """Discriminator with six input channels: the final image, and the raw rendering resized to the same size.

    Chan et al. 2022, section 4.3.

    Args:
        c_dim: number of entries of a camera label K; 0: no labels.
        img_resolution: pixels per edge of the final image R.
        img_channels: number of channels of one of the two images.
        channel_base, channel_max: a block at r pixels has channel_base / r channels, but at most channel_max.
        num_fp16_res: number of highest resolutions in half precision on CUDA.
        conv_clamp: largest absolute value of features after a convolution; None: no limit.
        cmap_dim: number of entries of the embedded label; None: the number of channels at 4 pixels.
        disc_c_noise: standard deviation of noise on the labels, in units of the labels' standard deviation.
        block_kwargs, mapping_kwargs, epilogue_kwargs: further arguments of `DiscriminatorBlock`,
            `MappingNetwork` and `DiscriminatorEpilogue`.
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
        # From img_resolution down to 8. The slice reverses the list and leaves out its first element, 4.
        self.block_resolutions = block_resolutions(img_resolution)[:0:-1]
        # Lowest resolution in half precision, at least 8.
        smallest_fp16_resolution = max(2 ** (int(math.log2(img_resolution)) + 1 - num_fp16_res), 8)
        channels_by_resolution = {
            resolution: channels_at(resolution, channel_base, channel_max)
            for resolution in [*self.block_resolutions, 4]
        }
        # Without labels there is no projection, and the single output of the last layer is the logit.
        if c_dim == 0:
            cmap_dim = 0
        elif cmap_dim is None:
            cmap_dim = channels_by_resolution[4]
        layer_idx = 0
        for resolution in self.block_resolutions:
            block = DiscriminatorBlock(
                # 0 marks the first block, whose input is the image.
                channels_by_resolution[resolution] if resolution < img_resolution else 0,
                channels_by_resolution[resolution],
                channels_by_resolution[resolution // 2],
                resolution=resolution,
                img_channels=self.img_channels,
                first_layer_idx=layer_idx,
                conv_clamp=conv_clamp,
                use_fp16=(num_fp16_res > 0 and resolution >= smallest_fp16_resolution),
                **(block_kwargs or {}),
            )
            setattr(self, f"b{resolution}", block)
            layer_idx += block.num_layers
        if c_dim > 0:
            # A mapping network without a latent. Its output, one vector per image, is the embedded label.
            self.mapping = MappingNetwork(
                z_dim=0, c_dim=c_dim, w_dim=cmap_dim, num_ws=None, w_avg_beta=None, **(mapping_kwargs or {})
            )
        self.b4 = DiscriminatorEpilogue(
            channels_by_resolution[4],
            cmap_dim=cmap_dim,
            resolution=4,
            conv_clamp=conv_clamp,
            **(epilogue_kwargs or {}),
        )
        self.register_buffer("resample_filter", upfirdn2d.setup_filter([1, 3, 3, 1]))

    def forward(
        self, img: dict[str, torch.Tensor], c: torch.Tensor, update_emas: bool = False, **block_kwargs
    ) -> torch.Tensor:
        """Return logits [N, 1], which are large for images that D classifies as real.

        Differentiable in both images, also twice.

        Args:
            img: 'image' [N, 3, R, R] and 'image_raw' [N, 3, r, r] of any resolution r, both in [-1, 1].
            c: camera labels [N, K].
            update_emas: argument of EG3D's signature without effect, because D has no moving averages.
            block_kwargs: further arguments of `DiscriminatorBlock.forward`.
        Deviates: with disc_c_noise > 0 the noise is added to a copy of c. EG3D adds it in place, so that the
            noise accumulates over phases.
        """
        del update_emas
        features = None
        # [N, 6, R, R]
        both_images = torch.cat(
            [img["image"], filtered_resizing(img["image_raw"], img["image"].shape[-1])], dim=1
        )
        for resolution in self.block_resolutions:
            # Only the first block gets the images.
            features = getattr(self, f"b{resolution}")(
                features, both_images if features is None else None, **block_kwargs
            )
        embedded_labels = None
        if self.c_dim > 0:
            # The noise is a regulariser of D's conditioning on the camera (EG3D).
            if self.disc_c_noise > 0:
                c = c + torch.randn_like(c) * c.std(dim=0) * self.disc_c_noise
            embedded_labels = self.mapping(None, c)
        return self.b4(features, embedded_labels)
