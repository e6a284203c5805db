"""Super-resolution modules, which turn the rendered feature image into the final image.

Chan et al. 2022 (EG3D), section 4.2. The volume renderer gives D feature channels, of which the first three
are RGB, at a low resolution; two StyleGAN2 blocks enlarge them.

Shapes: N batch, C feature channels, r rendered resolution, R final resolution, W w_dim, L num_ws.
"""

import torch

from torch_utils.ops import upfirdn2d
from training.synthesis import SynthesisBlock


class SuperresolutionHybrid(torch.nn.Module):
    """Two synthesis blocks on features and RGB, all modulated by the last w.

    Features and RGB are first resized to `input_resolution`: bilinear, and antialiased unless sr_antialias is
    False. The subclasses have EG3D's sizes. `input_resolution`, `block_channels` and `w_dim` allow smaller
    generators.

    Raises: ValueError if img_resolution is not input_resolution times the module's factor.
    """

    default_input_resolution = 128  # pixels
    default_block_channels = (128, 64)
    first_block_upsamples = True
    has_resample_filter = True  # a buffer without effect, which EG3D's files contain
    only_enlarges = False  # True: resize inputs only if they are too small; larger ones are an error
    antialias_allowed = True

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
        # EG3D's generator passes these to every module. They have no effect there either.
        del num_fp16_res, conv_clamp, channel_base, channel_max
        self.input_resolution = input_resolution or self.default_input_resolution
        # Each upsampling block doubles the resolution.
        expected = self.input_resolution * (4 if self.first_block_upsamples else 2)
        if img_resolution != expected:
            remedy = f"Use data of {expected} pixels, or name another module with --sr-module."
            raise ValueError(
                f"{type(self).__name__}: expected img_resolution {expected}, got {img_resolution}. {remedy}"
            )
        # A class that forbids antialiasing overrides the option, as EG3D's legacy module does.
        self.sr_antialias = sr_antialias and self.antialias_allowed
        wide, narrow = block_channels or self.default_block_channels
        use_fp16 = sr_num_fp16_res > 0
        kwargs = {
            "w_dim": w_dim,
            "img_channels": 3,
            "use_fp16": use_fp16,
            # The clamp keeps half-precision features in range.
            "conv_clamp": 256 if use_fp16 else None,
            **block_kwargs,
        }
        resolution0 = self.input_resolution * (2 if self.first_block_upsamples else 1)
        self.block0 = SynthesisBlock(
            channels, wide, resolution=resolution0, upsample=self.first_block_upsamples, **kwargs
        )
        self.block1 = SynthesisBlock(wide, narrow, resolution=resolution0 * 2, is_last=True, **kwargs)
        if self.has_resample_filter:
            self.register_buffer("resample_filter", upfirdn2d.setup_filter([1, 3, 3, 1]))

    def _resize(self, x: torch.Tensor) -> torch.Tensor:
        """Resize x [N, C, r, r] to the input resolution of the first block."""
        size = self.input_resolution
        if x.shape[-1] == size:
            return x  # exact, while interpolation to the same size could round
        if self.only_enlarges and x.shape[-1] > size:
            remedy = "Lower --nrr-initial and --nrr-final to it."
            raise ValueError(
                f"{type(self).__name__}: expected a rendering of at most {size} pixels, got {x.shape[-1]}."
                f" {remedy}"
            )
        return torch.nn.functional.interpolate(
            x, size=(size, size), mode="bilinear", align_corners=False, antialias=self.sr_antialias
        )

    def forward(self, rgb: torch.Tensor, x: torch.Tensor, ws: torch.Tensor, **block_kwargs) -> torch.Tensor:
        """Map rgb [N, 3, r, r] and features x [N, C, r, r] with ws [N, L, W] to an image [N, 3, R, R].

        Differentiable in all three.
        """
        # Every layer gets the last w, three per block: conv0, conv1, ToRGB.
        ws = ws[:, -1:, :].expand(-1, 3, -1)
        x = self._resize(x)
        rgb = self._resize(rgb)
        x, rgb = self.block0(x, rgb, ws, **block_kwargs)
        return self.block1(x, rgb, ws, **block_kwargs)[1]


class SuperresolutionHybrid8X(SuperresolutionHybrid):
    """From 128 to 512 pixels."""


class SuperresolutionHybrid8XDC(SuperresolutionHybrid):
    """From 128 to 512 pixels with doubled channels: the module of the published FFHQ and AFHQ checkpoints."""

    default_block_channels = (256, 128)
    has_resample_filter = False


class SuperresolutionHybrid4X(SuperresolutionHybrid):
    """From 128 to 256 pixels. The first block keeps the resolution."""

    first_block_upsamples = False
    only_enlarges = True


class SuperresolutionHybrid2X(SuperresolutionHybrid):
    """From 64 to 128 pixels. The first block keeps the resolution."""

    default_input_resolution = 64
    first_block_upsamples = False


class SuperresolutionHybridDeepfp32(SuperresolutionHybrid4X):
    """From 128 to 256 pixels without antialiasing (a legacy module of EG3D)."""

    antialias_allowed = False


class NoSuperresolution(torch.nn.Module):
    """Stand-in for a super-resolution module: the rendered colours are the image.

    They are enlarged if they are fewer pixels than the image. All detail comes from the volume.
    """

    only_enlarges = True

    def __init__(self, channels: int, img_resolution: int, **_unused):
        super().__init__()
        del channels  # EG3D's call passes them to every module
        self.input_resolution = img_resolution

    def forward(self, rgb: torch.Tensor, x: torch.Tensor, ws: torch.Tensor, **_unused) -> torch.Tensor:
        """Map rgb [N, 3, r, r] to [N, 3, R, R], bilinear. Larger renderings keep their size.

        Differentiable in rgb.
        """
        del x, ws  # features and styles of the other modules' interface
        # More pixels than in training are kept.
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
MODULES: dict[str, type] = {cls.__name__: cls for cls in (*_ALL, NoSuperresolution)}


def module_by_name(name: str) -> type:
    """Return the class for EG3D's 'training.superresolution.<Class>', or for the bare class name.

    Raises: ValueError for any other name. Nothing is imported by name, since names come from files.
    """
    # Files of EG3D store the dotted name of the class.
    key = name.removeprefix("training.superresolution.")
    if key not in MODULES:
        raise ValueError(
            f"superresolution_module: expected one of {', '.join(MODULES)}, got {name!r}. Choose one of them."
        )
    return MODULES[key]
