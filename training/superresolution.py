"""Super-resolution modules, which turn the rendered feature image into the final image.

Chan et al. 2022 (EG3D), section 4.2. The volume renderer outputs feature channels at a low resolution, of
which the first three are RGB. Two StyleGAN2 blocks enlarge them.

Shapes: N is the number of images in a batch, C of feature channels, r of rendered pixels per edge, R of final
pixels per edge, W is w_dim, L is num_ws.
"""

import torch

from torch_utils.ops import upfirdn2d
from training.synthesis import SynthesisBlock


class SuperresolutionHybrid(torch.nn.Module):
    """Base class of EG3D's super-resolution modules: two synthesis blocks on features and RGB.

    All layers are modulated by the last style vector w. Features and RGB are first resized to
    `input_resolution` by bilinear interpolation. The subclasses have EG3D's sizes.

    Args:
        channels: number of feature channels C.
        img_resolution: final pixels per edge R.
        sr_num_fp16_res: any number above 0: compute in half precision on CUDA.
        sr_antialias: True: the resizing is antialiased.
        num_fp16_res, conv_clamp, channel_base, channel_max: arguments of EG3D's signature without effect.
        w_dim: number of entries of a style vector W.
        input_resolution: pixels per edge of the first block's input; None: EG3D's value.
        block_channels: numbers of channels of the two blocks; None: EG3D's values.
        block_kwargs: further arguments of `SynthesisBlock`.
    Raises: ValueError if img_resolution is not input_resolution times the enlargement of the module.
    """

    default_input_resolution = 128  # pixels per edge
    default_block_channels = (128, 64)
    first_block_upsamples = True  # False: the first block does not change the resolution
    has_resample_filter = True  # True: the module has a buffer without effect, which EG3D's files contain
    only_enlarges = False  # True: inputs that are larger than input_resolution are an error
    antialias_allowed = True  # False: the resizing is never antialiased

    def __init__(
        self,
        channels: int,
        img_resolution: int,
        sr_num_fp16_res: int,
        sr_antialias: bool = True,
        num_fp16_res: int = 4,
        conv_clamp: float | None = None,
        channel_base: int | None = None,
        channel_max: int | None = None,
        w_dim: int = 512,
        input_resolution: int | None = None,
        block_channels: tuple[int, int] | None = None,
        **block_kwargs,
    ):
        super().__init__()
        # EG3D's generator passes these arguments to every module.
        del num_fp16_res, conv_clamp, channel_base, channel_max
        self.input_resolution = input_resolution or self.default_input_resolution
        # Each upsampling block doubles the resolution. The second block always upsamples.
        output_resolution = self.input_resolution * (4 if self.first_block_upsamples else 2)
        if img_resolution != output_resolution:
            raise ValueError(
                f"{type(self).__name__}: the module outputs {output_resolution} pixels per edge, but the"
                f" images have {img_resolution}. Use images of {output_resolution} pixels, or name another"
                " module with --sr-module."
            )
        self.sr_antialias = sr_antialias and self.antialias_allowed
        first_channels, second_channels = block_channels or self.default_block_channels
        use_fp16 = sr_num_fp16_res > 0
        common_kwargs = {
            "w_dim": w_dim,
            "img_channels": 3,
            "use_fp16": use_fp16,
            # The clamp prevents an overflow of features in half precision.
            "conv_clamp": 256 if use_fp16 else None,
            **block_kwargs,
        }
        first_block_resolution = self.input_resolution * (2 if self.first_block_upsamples else 1)
        self.block0 = SynthesisBlock(
            channels,
            first_channels,
            resolution=first_block_resolution,
            upsample=self.first_block_upsamples,
            **common_kwargs,
        )
        self.block1 = SynthesisBlock(
            first_channels,
            second_channels,
            resolution=first_block_resolution * 2,
            is_last=True,
            **common_kwargs,
        )
        if self.has_resample_filter:
            self.register_buffer("resample_filter", upfirdn2d.setup_filter([1, 3, 3, 1]))

    def _resize(self, x: torch.Tensor) -> torch.Tensor:
        """Resize x [N, C, r, r] to the input resolution of the first block.

        Raises: ValueError if x is larger and the module only enlarges.
        """
        target_resolution = self.input_resolution
        if x.shape[-1] == target_resolution:
            return x  # interpolation to the same size could change the values by rounding
        if self.only_enlarges and x.shape[-1] > target_resolution:
            raise ValueError(
                f"{type(self).__name__}: expected a rendering of at most {target_resolution} pixels per edge,"
                f" got {x.shape[-1]}. Set --nrr-initial and --nrr-final to at most {target_resolution}."
            )
        return torch.nn.functional.interpolate(
            x,
            size=(target_resolution, target_resolution),
            mode="bilinear",
            align_corners=False,
            antialias=self.sr_antialias,
        )

    def forward(self, rgb: torch.Tensor, x: torch.Tensor, ws: torch.Tensor, **block_kwargs) -> torch.Tensor:
        """Enlarge a rendering. Differentiable in rgb, x and ws.

        Args:
            rgb: raw image [N, 3, r, r].
            x: features [N, C, r, r].
            ws: style vectors [N, L, W], of which only the last is used.
            block_kwargs: further arguments of `SynthesisBlock.forward`.
        Returns: image [N, 3, R, R].
        """
        # A block has three layers: conv0, conv1 and ToRGB. Each gets the last w.
        ws = ws[:, -1:, :].expand(-1, 3, -1)
        x = self._resize(x)
        rgb = self._resize(rgb)
        x, rgb = self.block0(x, rgb, ws, **block_kwargs)
        _, image = self.block1(x, rgb, ws, **block_kwargs)
        return image


class SuperresolutionHybrid8X(SuperresolutionHybrid):
    """Module that enlarges 128 to 512 pixels per edge."""


class SuperresolutionHybrid8XDC(SuperresolutionHybrid):
    """Module that enlarges 128 to 512 pixels per edge, with twice the channels of `SuperresolutionHybrid8X`.

    The published FFHQ and AFHQ checkpoints of EG3D have this module.
    """

    default_block_channels = (256, 128)
    has_resample_filter = False


class SuperresolutionHybrid4X(SuperresolutionHybrid):
    """Module that enlarges 128 to 256 pixels per edge. The first block does not change the resolution."""

    first_block_upsamples = False
    only_enlarges = True


class SuperresolutionHybrid2X(SuperresolutionHybrid):
    """Module that enlarges 64 to 128 pixels per edge. The first block does not change the resolution."""

    default_input_resolution = 64
    first_block_upsamples = False


class SuperresolutionHybridDeepfp32(SuperresolutionHybrid4X):
    """Module that enlarges 128 to 256 pixels per edge without antialiasing, for old networks of EG3D."""

    antialias_allowed = False


class NoSuperresolution(torch.nn.Module):
    """Module without parameters, for which the rendered colours are the final image.

    A rendering with fewer pixels than the final image is enlarged by bilinear interpolation.

    Args: channels: number of feature channels, without effect; img_resolution: final pixels per edge R.
    """

    only_enlarges = True

    def __init__(self, channels: int, img_resolution: int, **_unused):
        super().__init__()
        del channels  # the generator passes it to every module
        self.input_resolution = img_resolution

    def forward(self, rgb: torch.Tensor, x: torch.Tensor, ws: torch.Tensor, **_unused) -> torch.Tensor:
        """Enlarge rgb [N, 3, r, r] to [N, 3, R, R]. A rendering with r >= R is returned unchanged.

        Differentiable in rgb. The features x and the style vectors ws have no effect.
        """
        del x, ws
        if rgb.shape[-1] >= self.input_resolution:
            return rgb
        return torch.nn.functional.interpolate(
            rgb, size=(self.input_resolution,) * 2, mode="bilinear", align_corners=False
        )


_ALL = (
    SuperresolutionHybrid8X,
    SuperresolutionHybrid8XDC,
    SuperresolutionHybrid4X,
    SuperresolutionHybrid2X,
    SuperresolutionHybridDeepfp32,
)
# Class name -> class of all super-resolution modules.
MODULES: dict[str, type] = {cls.__name__: cls for cls in (*_ALL, NoSuperresolution)}


def module_by_name(name: str) -> type:
    """Return the class of a super-resolution module.

    The name is looked up in MODULES and never imported, because it may come from a file.

    Args: name: class name, or 'training.superresolution.<class name>' as in EG3D's files.
    Raises: ValueError for any other name.
    """
    class_name = name.removeprefix("training.superresolution.")
    if class_name not in MODULES:
        raise ValueError(
            f"superresolution_module: expected one of {', '.join(MODULES)}, got {name!r}. Use one of these"
            " names."
        )
    return MODULES[class_name]
