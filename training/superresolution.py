"""Super-resolution modules: from the rendered feature image to the final image.

Shapes: N batch, C feature channels, r rendered resolution, R final resolution, W w_dim.
"""

import torch

from torch_utils.ops import upfirdn2d
from training.synthesis import SynthesisBlock


class SuperresolutionHybrid(torch.nn.Module):
    """Two synthesis blocks on features and RGB, all modulated by the last w (Chan et al. 2022, section 4.2).

    Features and RGB are first resized to `input_resolution` (bilinear, antialiased unless sr_antialias is
    off). The subclasses hold EG3D's sizes; `input_resolution`, `block_channels` and `w_dim` exist for smaller
    generators.

    Raises: ValueError where img_resolution is not input_resolution times the module's factor.
    """

    default_input_resolution = 128
    default_block_channels = (128, 64)
    first_block_upsamples = True
    has_resample_filter = True  # a buffer without effect, which files of EG3D hold
    only_enlarges = False  # resize inputs only where they are too small; larger ones are an error
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
        # accepted for EG3D's call; without effect there too
        del num_fp16_res, conv_clamp, channel_base, channel_max
        self.input_resolution = input_resolution or self.default_input_resolution
        expected = self.input_resolution * (4 if self.first_block_upsamples else 2)
        if img_resolution != expected:
            remedy = f"Use data of {expected} pixels, or name another module with --sr-module."
            raise ValueError(
                f"{type(self).__name__}: expected img_resolution {expected}, got {img_resolution}. {remedy}"
            )
        self.sr_antialias = sr_antialias and self.antialias_allowed
        wide, narrow = block_channels or self.default_block_channels
        use_fp16 = sr_num_fp16_res > 0
        kwargs = {
            "w_dim": w_dim,
            "img_channels": 3,
            "use_fp16": use_fp16,
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
        size = self.input_resolution
        if x.shape[-1] == size:
            return x
        if self.only_enlarges and x.shape[-1] > size:
            remedy = "Lower the neural rendering resolution."
            raise ValueError(
                f"{type(self).__name__}: expected a rendering of at most {size} pixels, got {x.shape[-1]}."
                f" {remedy}"
            )
        return torch.nn.functional.interpolate(
            x, size=(size, size), mode="bilinear", align_corners=False, antialias=self.sr_antialias
        )

    def forward(self, rgb: torch.Tensor, x: torch.Tensor, ws: torch.Tensor, **block_kwargs) -> torch.Tensor:
        """rgb [N, 3, r, r], x [N, C, r, r], ws [N, L, W] -> image [N, 3, R, R].
        Differentiable in all three.
        """
        ws = ws[:, -1:, :].expand(-1, 3, -1)
        x = self._resize(x)
        rgb = self._resize(rgb)
        x, rgb = self.block0(x, rgb, ws, **block_kwargs)
        return self.block1(x, rgb, ws, **block_kwargs)[1]


class SuperresolutionHybrid8X(SuperresolutionHybrid):
    """128 -> 512."""


class SuperresolutionHybrid8XDC(SuperresolutionHybrid):
    """128 -> 512 with doubled channels; the module of the published FFHQ and AFHQ checkpoints."""

    default_block_channels = (256, 128)
    has_resample_filter = False


class SuperresolutionHybrid4X(SuperresolutionHybrid):
    """128 -> 256; the first block keeps the resolution."""

    first_block_upsamples = False
    only_enlarges = True


class SuperresolutionHybrid2X(SuperresolutionHybrid):
    """64 -> 128; the first block keeps the resolution."""

    default_input_resolution = 64
    first_block_upsamples = False


class SuperresolutionHybridDeepfp32(SuperresolutionHybrid4X):
    """128 -> 256 without antialiasing (legacy)."""

    antialias_allowed = False


class NoSuperresolution(torch.nn.Module):
    """None: the rendered colours are the image, enlarged where they are fewer pixels. All detail is the
    field's.
    """

    only_enlarges = True

    def __init__(self, channels: int, img_resolution: int, **_unused):
        super().__init__()
        del channels
        self.input_resolution = img_resolution

    def forward(self, rgb: torch.Tensor, x: torch.Tensor, ws: torch.Tensor, **_unused) -> torch.Tensor:
        """rgb [N, 3, r, r] -> [N, 3, R, R], bilinear; larger renderings stay as they are. Differentiable in
        rgb.
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
MODULES: dict[str, type] = {cls.__name__: cls for cls in (*_ALL, NoSuperresolution)}


def module_by_name(name: str) -> type:
    """Class for EG3D's 'training.superresolution.<Class>' (or the bare class name).

    Raises: ValueError for anything else; nothing is imported by name.
    """
    key = name.removeprefix("training.superresolution.")
    if key not in MODULES:
        raise ValueError(f"superresolution_module: expected one of {', '.join(MODULES)}, got {name!r}.")
    return MODULES[key]
