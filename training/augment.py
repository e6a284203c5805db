"""Adaptive discriminator augmentation (ADA): random transforms of the discriminator's inputs.

Source: Karras et al. 2020, "Training generative adversarial networks with limited data", section 3 and
appendix B.

All geometric transforms of a sample are composed into one matrix, and all colour transforms into another. The
image is therefore resampled and recoloured only once.

Shapes: N is the number of images in a batch, C of channels, and an image has H x W pixels. Pixel positions
are relative to the image centre; x points right and y down. Matrices act on column vectors of homogeneous
coordinates from the left. An entry of a matrix is a number, or a tensor [N] with one value for each image.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from torch_utils.ops import grid_sample_gradfix, upfirdn2d

Entry = float | torch.Tensor  # entry of a matrix: a number, or a tensor [N]

# Least asymmetric Daubechies wavelet with 6 vanishing moments, low-pass decomposition filter (Daubechies
# 1992, table 6.3).
SYM6 = (
    0.015404109327027373,
    0.0034907120842174702,
    -0.11799011114819057,
    -0.048311742585633,
    0.4910559419267466,
    0.787641141030194,
    0.3379294217276218,
    -0.07263752278646252,
    -0.021060292512300564,
    0.04472490177066578,
    0.0017677118642428036,
    -0.007800708325034148,
)
_R3 = math.sqrt(3)
# Scaling filter of the Daubechies wavelet with 2 vanishing moments.
SYM2 = tuple(coefficient / (4 * math.sqrt(2)) for coefficient in (1 - _R3, 3 - _R3, 3 + _R3, 1 + _R3))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentOptions:
    """Settings of `AugmentPipe`.

    In each block, the first fields have the names of transforms. Their values are factors on the overall
    probability p with which the transform is applied; 0 turns the transform off. The other fields, with the
    endings _max, _std, _bands and _size, set the strength of a transform. An octave is a factor of 2.
    """

    # Pixel blitting
    xflip: float = 0  # mirror left to right
    rotate90: float = 0  # rotate by a multiple of 90 degrees
    xint: float = 0  # shift by whole pixels
    xint_max: float = 0.125  # largest shift, fraction of the image size
    # General geometry
    scale: float = 0  # scale both axes by the same factor
    rotate: float = 0  # rotate by any angle, once before and once after the anisotropic scaling
    aniso: float = 0  # scale x by a factor s and y by 1/s
    xfrac: float = 0  # shift by fractions of a pixel
    scale_std: float = 0.2  # standard deviation of the scale factor, octaves
    rotate_max: float = 1  # largest angle, as a fraction of 180 degrees
    aniso_std: float = 0.2  # standard deviation of s, octaves
    xfrac_std: float = 0.125  # standard deviation of the shift, fraction of the image size
    # Colour
    brightness: float = 0  # add the same value to all channels
    contrast: float = 0  # multiply all channels by a factor
    lumaflip: float = 0  # reverse the brightness: mirror colours along the grey axis
    hue: float = 0  # rotate colours about the grey axis; RGB only
    saturation: float = 0  # multiply the distance of colours from the grey axis by a factor; RGB only
    brightness_std: float = 0.2  # standard deviation of the added value; images are in [-1, 1]
    contrast_std: float = 0.5  # standard deviation of the factor, octaves
    hue_max: float = 1  # largest angle, as a fraction of 180 degrees
    saturation_std: float = 1  # standard deviation of the factor, octaves
    # Filtering in four frequency bands
    imgfilter: float = 0  # amplify or weaken frequency bands
    imgfilter_bands: tuple[float, ...] = (1, 1, 1, 1)  # further factor on p of each band, lowest band first
    imgfilter_std: float = 1  # standard deviation of the amplification, octaves
    # Corruption
    noise: float = 0  # add Gaussian noise
    cutout: float = 0  # replace a square by grey
    noise_std: float = 0.1  # the noise's standard deviation is this number times |N(0, 1)|
    cutout_size: float = 0.5  # side of the square, fraction of the image size


class _Draws:
    """Random numbers of one batch, from torch's global generator.

    The order of the random numbers is EG3D's: for each transform, first its value, then the gate that decides
    whether the transform is applied.

    Args:
        images: batch [N, C, H, W], of which only the size and the device are used.
        percentile: None for random values. A number in 0..1 replaces every random value by this quantile of
            its distribution, and opens every gate. The random numbers are drawn nevertheless.
    """

    def __init__(self, images: torch.Tensor, percentile: float | None):
        self.n = images.shape[0]
        self.device = images.device
        self.percentile = (
            None if percentile is None else torch.as_tensor(float(percentile), device=self.device)
        )

    def uniform(self, *shape: int) -> torch.Tensor:
        """Draw values [N, *shape] from the uniform distribution U[0, 1)."""
        random_values = torch.rand([self.n, *shape], device=self.device)
        # The quantile function of U[0, 1) is the identity.
        return self._or_percentile(random_values, lambda p: p)

    def normal(self, *shape: int) -> torch.Tensor:
        """Draw values [N, *shape] from the normal distribution N(0, 1)."""
        random_values = torch.randn([self.n, *shape], device=self.device)
        # Quantile function of the normal distribution without its factor sqrt(2), as in EG3D.
        return self._or_percentile(random_values, lambda p: torch.erfinv(p * 2 - 1))

    def half_normal(self, *shape: int) -> torch.Tensor:
        """Draw absolute values [N, *shape] of normally distributed numbers."""
        random_values = torch.randn([self.n, *shape], device=self.device).abs()
        # Quantile function of the half-normal distribution without its factor sqrt(2), as in EG3D.
        return self._or_percentile(random_values, torch.erfinv)

    def _or_percentile(
        self, random_values: torch.Tensor, quantile: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Return `random_values` or, if `percentile` is set, a tensor of this quantile of their distribution.

        Args:
            random_values: random values of any shape.
            quantile: quantile function of the distribution of the values.
        """
        # The caller has drawn the values in either case, so the generator's state does not depend
        # on `percentile`.
        if self.percentile is None:
            return random_values
        return torch.full_like(random_values, float(quantile(self.percentile)))

    def gated(
        self, drawn_parameter: torch.Tensor, probability: torch.Tensor, neutral_parameter: float
    ) -> torch.Tensor:
        """Return the drawn parameter of a transform for random images, and the neutral one for the others.

        Each image has a gate, which decides whether the transform is applied to the image.

        Args:
            drawn_parameter: random parameter of the transform, tensor [N, ...].
            probability: probability with which a gate opens, tensor [].
            neutral_parameter: number for which the transform changes nothing.
        Returns: tensor [N, ...] with `drawn_parameter` where the gate is open, and `neutral_parameter`
            elsewhere.
        """
        # One gate per image: [N, 1, ...].
        is_open = torch.rand([self.n] + [1] * (drawn_parameter.ndim - 1), device=self.device) < probability
        # With a percentile, every gate is open.
        if self.percentile is not None:
            return drawn_parameter
        return torch.where(is_open, drawn_parameter, torch.full_like(drawn_parameter, neutral_parameter))


class AugmentPipe(torch.nn.Module):
    """Random differentiable transforms of the discriminator's inputs.

    Each transform is applied with the probability p times the value of its option. The buffers are `p` []
    (overall probability, which the training loop sets), `Hz_geom` [12] (low-pass filter for geometric
    transforms) and `Hz_fbank` [4, 43] (filters of the frequency bands).

    Args: options: fields of `AugmentOptions` as keyword arguments.
    """

    p: torch.Tensor
    Hz_geom: torch.Tensor
    Hz_fbank: torch.Tensor

    def __init__(self, **options):
        super().__init__()
        self.options = AugmentOptions(**options)
        # The names of the buffers are EG3D's, because checkpoints contain them.
        self.register_buffer("p", torch.ones([]))
        self.register_buffer("Hz_geom", upfirdn2d.setup_filter(SYM6))
        self.register_buffer("Hz_fbank", torch.as_tensor(octave_filter_bank(), dtype=torch.float32))

    def forward(self, images: torch.Tensor, debug_percentile: float | None = None) -> torch.Tensor:
        """Augment a batch of images, each with other random transforms. Differentiable in images, also twice.

        Args:
            images: images [N, C, H, W], usually in [-1, 1]. C is 1 (grey), 3 (RGB) or 6 (two RGB images that
                get the same transform).
            debug_percentile: None for random transforms. A number in 0..1 replaces every random value, except
                the pixels of the noise, by this quantile of its distribution, and applies all transforms.
        Returns: images [N, C, H, W].
        """
        assert images.ndim == 4 and images.shape[1] in (1, 3, 6)
        options = self.options
        # The order of the transforms is EG3D's, because it determines which random numbers each of them gets.
        draws = _Draws(images, debug_percentile)
        if (
            options.xflip > 0
            or options.rotate90 > 0
            or options.xint > 0
            or options.scale > 0
            or options.rotate > 0
            or options.aniso > 0
            or options.xfrac > 0
        ):
            images = self._warp(images, self._draw_geometry(images, draws))
        if (
            options.brightness > 0
            or options.contrast > 0
            or options.lumaflip > 0
            or options.hue > 0
            or options.saturation > 0
        ):
            images = _recolour(images, self._draw_colour(images, draws))
        if options.imgfilter > 0:
            images = self._filter_bands(images, draws)
        if options.noise > 0:
            # One standard deviation per image, [N, 1, 1, 1].
            noise_sigma = draws.gated(
                draws.half_normal(1, 1, 1) * options.noise_std, options.noise * self.p, 0
            )
            images = images + torch.randn(images.shape, device=images.device) * noise_sigma
        if options.cutout > 0:
            height, width = images.shape[2:]
            # Width and height of the square, [N, 2, 1, 1, 1]. A closed gate gives the size 0.
            square_size = draws.gated(
                torch.full([draws.n, 2, 1, 1, 1], float(options.cutout_size), device=draws.device),
                options.cutout * self.p,
                0,
            )
            square_centre = draws.uniform(2, 1, 1, 1)
            pixel_x = (torch.arange(width, device=draws.device) + 0.5) / width  # [W]
            pixel_y = ((torch.arange(height, device=draws.device) + 0.5) / height)[:, None]  # [H, 1]
            # [N, 1, H, W]. The factor 0 inside the square is grey in [-1, 1].
            is_outside = ((pixel_x - square_centre[:, 0]).abs() >= square_size[:, 0] / 2) | (
                (pixel_y - square_centre[:, 1]).abs() >= square_size[:, 1] / 2
            )
            images = images * is_outside.to(images.dtype)
        return images

    def _draw_geometry(self, images: torch.Tensor, draws: _Draws) -> torch.Tensor:
        """Draw the geometric transform of each image.

        A matrix maps positions in the output to positions in the input, in pixels from the centre. It is the
        inverse of the transform, so a scaling by s enters as 1 / s. Factors are multiplied from the right, in
        the order in which the transforms are applied to the image.

        Args:
            images: images [N, C, H, W], of which only the size is used.
            draws: random numbers of the batch.
        Returns: matrices [N, 3, 3].
        """
        options = self.options
        p = self.p
        height, width = images.shape[2:]
        template = images.new_empty([images.shape[0]], dtype=torch.float32)
        inverse_transform = scale2d(1, 1, template)  # product of the inverse transforms so far, [N, 3, 3]
        if options.xflip > 0:
            # 2 u, rounded down, is 0 or 1 with equal probability. Half of the images with an open gate
            # are therefore mirrored.
            inverse_transform = inverse_transform @ scale2d(
                1 - 2 * draws.gated((draws.uniform() * 2).floor(), options.xflip * p, 0), 1, template
            )
        if options.rotate90 > 0:
            inverse_transform = inverse_transform @ rotate2d(
                math.pi / 2 * draws.gated((draws.uniform() * 4).floor(), options.rotate90 * p, 0), template
            )
        if options.xint > 0:
            shift = draws.gated((draws.uniform(2) * 2 - 1) * options.xint_max, options.xint * p, 0)
            inverse_transform = inverse_transform @ translate2d(
                -(shift[:, 0] * width).round(), -(shift[:, 1] * height).round(), template
            )
        if options.scale > 0:
            scale_factor = draws.gated((draws.normal() * options.scale_std).exp2(), options.scale * p, 1)
            inverse_transform = inverse_transform @ scale2d(1 / scale_factor, 1 / scale_factor, template)
        # There are two rotations. If each has the probability q, at least one is applied with the probability
        # 1 - (1 - q)^2, which has to be rotate * p.
        p_rotate = 1 - (1 - options.rotate * p).clamp(0, 1).sqrt()
        if options.rotate > 0:
            inverse_transform = inverse_transform @ rotate2d(
                draws.gated((draws.uniform() * 2 - 1) * (math.pi * options.rotate_max), p_rotate, 0), template
            )
        if options.aniso > 0:
            scale_factor = draws.gated((draws.normal() * options.aniso_std).exp2(), options.aniso * p, 1)
            inverse_transform = inverse_transform @ scale2d(1 / scale_factor, scale_factor, template)
        if options.rotate > 0:
            # With `debug_percentile` the second rotation is left out, as in EG3D, so that a single
            # angle remains.
            angle = draws.gated((draws.uniform() * 2 - 1) * (math.pi * options.rotate_max), p_rotate, 0)
            inverse_transform = inverse_transform @ rotate2d(
                angle if draws.percentile is None else torch.zeros_like(angle), template
            )
        if options.xfrac > 0:
            shift = draws.gated(draws.normal(2) * options.xfrac_std, options.xfrac * p, 0)
            inverse_transform = inverse_transform @ translate2d(
                -shift[:, 0] * width, -shift[:, 1] * height, template
            )
        return inverse_transform

    def _warp(self, images: torch.Tensor, transforms: torch.Tensor) -> torch.Tensor:
        """Resample images by geometric transforms.

        The images are padded by mirrored borders, upsampled by a factor of 2 with the filter `Hz_geom`,
        sampled bilinearly, and downsampled with the time-reversed filter. The wavelet is orthogonal, so
        upsampling and downsampling alone return the input. Pixel i of the input lies at the position 2i of
        the upsampled grid, half an upsampled pixel before the centre of its pair. The matrices that convert
        positions between the two grids contain this half pixel.

        Args:
            images: images [N, C, H, W].
            transforms: matrices [N, 3, 3] from `_draw_geometry`.
        Returns: images [N, C, H, W].
        """
        image_count, channel_count, height, width = images.shape
        # While p is small, there is often no transform in the whole batch.
        if bool((transforms == torch.eye(3, device=transforms.device)).all()):
            return images
        # Number of pixels beyond an image that the filter needs: half its length on the upsampled grid.
        filter_reach = self.Hz_geom.shape[0] // 4
        left_margin, right_margin, top_margin, bottom_margin = _margins(
            transforms, height, width, filter_reach
        )
        images = F.pad(images, (left_margin, right_margin, top_margin, bottom_margin), mode="reflect")
        images = upfirdn2d.upsample2d(images, self.Hz_geom, up=2)
        # Size of the upsampled output. It is larger than twice the image, because the downsampling filter
        # needs a margin.
        upsampled_height = 2 * (height + 2 * filter_reach)
        upsampled_width = 2 * (width + 2 * filter_reach)
        # From affine_grid's coordinates [-1, 1] on the upsampled output to pixels of the image.
        output_to_image = (
            scale2d(0.5, 0.5, transforms)
            @ translate2d(0.5, 0.5, transforms)
            @ scale2d(upsampled_width / 2, upsampled_height / 2, transforms)
        )
        # Different margins on opposite sides move the centre of the padded image.
        centre_shift = translate2d(
            (left_margin - right_margin) / 2, (top_margin - bottom_margin) / 2, transforms
        )
        # From pixels of the padded image to grid_sample's coordinates [-1, 1] on the upsampled padded image.
        image_to_input = (
            scale2d(2 / images.shape[3], 2 / images.shape[2], transforms)
            @ translate2d(-0.5, -0.5, transforms)
            @ scale2d(2, 2, transforms)
        )
        grid_transforms = image_to_input @ centre_shift @ transforms @ output_to_image
        sampling_grid = F.affine_grid(
            grid_transforms[:, :2].to(images.dtype),
            [image_count, channel_count, upsampled_height, upsampled_width],
            align_corners=False,
        )
        images = grid_sample_gradfix.grid_sample(images, sampling_grid)
        # The negative padding removes the margin of the output.
        return upfirdn2d.downsample2d(
            images, self.Hz_geom, down=2, padding=-2 * filter_reach, flip_filter=True
        )

    def _draw_colour(self, images: torch.Tensor, draws: _Draws) -> torch.Tensor:
        """Draw the colour transform of each image.

        Matrices of later transforms are multiplied from the left.

        Args:
            images: images [N, C, H, W], of which only the number of channels is used.
            draws: random numbers of the batch.
        Returns: affine maps of RGB colours, [N, 4, 4].
        """
        options = self.options
        p = self.p
        template = images.new_empty([images.shape[0]], dtype=torch.float32)
        grey_axis = template.new_tensor([1, 1, 1, 0]) / _R3  # unit vector in homogeneous coordinates
        identity = torch.eye(4, device=template.device)
        grey_projector = torch.outer(grey_axis, grey_axis)
        colour_map = affine3d(1, 0, template)  # product of the transforms so far, [N, 4, 4]
        if options.brightness > 0:
            brightness_shift = draws.gated(draws.normal() * options.brightness_std, options.brightness * p, 0)
            colour_map = affine3d(1, brightness_shift, template) @ colour_map
        if options.contrast > 0:
            factor = draws.gated((draws.normal() * options.contrast_std).exp2(), options.contrast * p, 1)
            colour_map = affine3d(factor, 0, template) @ colour_map
        if options.lumaflip > 0:
            # 2 u, rounded down, is 0 or 1 with equal probability. For 1, the matrix is the Householder
            # reflection that changes the sign of the grey component.
            colour_map = (
                identity
                - 2 * grey_projector * draws.gated((draws.uniform(1, 1) * 2).floor(), options.lumaflip * p, 0)
            ) @ colour_map
        if options.hue > 0 and images.shape[1] > 1:
            colour_map = (
                rotate_about_grey(
                    draws.gated((draws.uniform() * 2 - 1) * (math.pi * options.hue_max), options.hue * p, 0),
                    template,
                )
                @ colour_map
            )
        if options.saturation > 0 and images.shape[1] > 1:
            factor = draws.gated(
                (draws.normal(1, 1) * options.saturation_std).exp2(), options.saturation * p, 1
            )
            # The grey component is unchanged, and the component orthogonal to it is scaled.
            colour_map = (grey_projector + (identity - grey_projector) * factor) @ colour_map
        return colour_map

    def _filter_bands(self, images: torch.Tensor, draws: _Draws) -> torch.Tensor:
        """Amplify or weaken random frequency bands of images.

        Each image is convolved with a separable FIR filter, with mirrored borders. The amplifications are
        scaled so that an image with a natural (1/f) spectrum keeps its power.

        Args: images: images [N, C, H, W]; draws: random numbers of the batch.
        Returns: images [N, C, H, W].
        Raises: ValueError for images that are too small for the mirrored border that the filter needs.
        """
        options = self.options
        image_count, channel_count, height, width = images.shape
        # Expected fraction of each octave in the power of a natural image. The lowest octave contains
        # the mean.
        octave_power = torch.tensor([10, 1, 1, 1], device=draws.device) / 13
        # The gains are normalised after each band, as in EG3D.
        gains = torch.ones([draws.n, 4], device=draws.device)
        for band, probability_factor in enumerate(options.imgfilter_bands):
            band_gains = torch.ones_like(gains)  # [N, 4], 1 except for this band
            # Drawn also for a factor of 0, so that the random numbers of later bands do not depend on it.
            random_gain = draws.gated(
                (draws.normal() * options.imgfilter_std).exp2(),
                options.imgfilter * self.p * probability_factor,
                1,
            )
            band_gains[:, band] = random_gain if probability_factor > 0 else 1
            gains = gains * band_gains / (octave_power * band_gains.square()).sum(dim=1, keepdim=True).sqrt()
        # One kernel for each channel of each image: [N, 4] @ [4, 43] -> [N, 43] -> [N * C, 43].
        kernels = (gains @ self.Hz_fbank).repeat_interleave(channel_count, dim=0).to(images.dtype)
        filter_reach = self.Hz_fbank.shape[1] // 2
        if min(height, width) <= filter_reach:
            raise ValueError(
                f"AugmentPipe: the transform imgfilter needs more than {filter_reach} pixels per edge, got"
                f" images of {height} x {width} pixels. Set imgfilter=0."
            )
        # [1, N*C, H+42, W+42]
        channel_images = F.pad(images, [filter_reach] * 4, mode="reflect").flatten(0, 1)[None]
        # Grouped convolution with one group for each channel of each image. The filter is separable, so it is
        # applied along rows and then along columns.
        channel_images = F.conv2d(
            channel_images, kernels[:, None, None, :], groups=image_count * channel_count
        )
        channel_images = F.conv2d(
            channel_images, kernels[:, None, :, None], groups=image_count * channel_count
        )
        return channel_images.reshape(image_count, channel_count, height, width)


def _margins(
    transforms: torch.Tensor, height: int, width: int, filter_reach: int
) -> tuple[int, int, int, int]:
    """Return the numbers of pixels (left, right, top, bottom) that the transforms need outside the images.

    The numbers are limited to the image size minus 1, because reflection padding cannot add more pixels.

    Args:
        transforms: matrices [N, 3, 3] from `_draw_geometry`.
        height, width: size of the images in pixels.
        filter_reach: number of further pixels that the filter needs.
    """
    centre_x = (width - 1) / 2
    centre_y = (height - 1) / 2
    # Corners of the output in homogeneous coordinates, [4, 3].
    corners = transforms.new_tensor(
        [
            [-centre_x, -centre_y, 1],
            [centre_x, -centre_y, 1],
            [centre_x, centre_y, 1],
            [-centre_x, centre_y, 1],
        ]
    )
    # Positions in the input of the corners of all outputs: x and y, [2, N*4].
    corner_positions = (transforms @ corners.T)[:, :2].permute(1, 0, 2).flatten(1)
    # Largest distances of the corners from the centre to the left, right, top and bottom.
    extents = torch.stack(
        [
            -corner_positions[0].min(),
            corner_positions[0].max(),
            -corner_positions[1].min(),
            corner_positions[1].max(),
        ]
    )
    # Pixels beyond the edges of the image, with the pixels that the two filters need, one for upsampling and
    # one for downsampling.
    margins = extents + 2 * filter_reach - transforms.new_tensor([centre_x, centre_x, centre_y, centre_y])
    margin_limits = transforms.new_tensor([width - 1, width - 1, height - 1, height - 1])
    left_margin, right_margin, top_margin, bottom_margin = (
        int(margin) for margin in margins.clamp(min=0).minimum(margin_limits).ceil().tolist()
    )
    return left_margin, right_margin, top_margin, bottom_margin


def _recolour(images: torch.Tensor, colour_maps: torch.Tensor) -> torch.Tensor:
    """Apply colour transforms to images.

    Args:
        images: images [N, C, H, W], grey (C = 1) or RGB, with three channels for each RGB image.
        colour_maps: affine maps [N, 4, 4] of RGB colours. A grey image is transformed by the mean of the
            map's rows.
    Returns: images [N, C, H, W].
    """
    image_count, channel_count, height, width = images.shape
    colour_maps = colour_maps.to(images.dtype)
    if channel_count == 1:
        mean_row = colour_maps[:, :3].mean(dim=1, keepdim=True)  # [N, 1, 4]
        # The three colours are equal, so their coefficients are added. Entry 3 is the constant.
        return images * mean_row[:, :, :3].sum(dim=2)[:, :, None, None] + mean_row[:, :, 3:, None]
    rgb = images.reshape(image_count, channel_count // 3, 3, height * width)  # [N, C / 3, 3, H * W]
    # The linear part [N, 1, 3, 3] times the colours, plus the constant part [N, 1, 3, 1].
    return (colour_maps[:, None, :3, :3] @ rgb + colour_maps[:, None, :3, 3:]).reshape(
        image_count, channel_count, height, width
    )


def matrix(entry_rows: Sequence[Sequence[Entry]], template: torch.Tensor) -> torch.Tensor:
    """Return one square matrix for each image.

    Args:
        entry_rows: rows of the matrix; each is a sequence of entries, which are numbers or tensors [N].
        template: tensor [N, ...] with the number of images, the device and the dtype of the result.
    Returns: matrices [N, rows, rows].
    """
    image_count = template.shape[0]
    entries = []
    for entry_row in entry_rows:
        # A number is the same for all images, a tensor [N] contains one value for each.
        entries += [
            torch.as_tensor(entry, dtype=template.dtype, device=template.device).expand(image_count)
            for entry in entry_row
        ]
    return torch.stack(entries, dim=1).reshape(image_count, len(entry_rows), len(entry_rows[0]))


def translate2d(x: Entry, y: Entry, template: torch.Tensor) -> torch.Tensor:
    """Return matrices [N, 3, 3] that shift points by (x, y). See `matrix` for `template`."""
    return matrix([[1, 0, x], [0, 1, y], [0, 0, 1]], template)


def scale2d(x: Entry, y: Entry, template: torch.Tensor) -> torch.Tensor:
    """Return matrices [N, 3, 3] that scale about the origin by factors x and y.

    See `matrix` for `template`.
    """
    return matrix([[x, 0, 0], [0, y, 0], [0, 0, 1]], template)


def rotate2d(theta: torch.Tensor, template: torch.Tensor) -> torch.Tensor:
    """Return matrices [N, 3, 3] that rotate by theta [N] radians, from x towards y.

    See `matrix` for `template`.
    """
    cos_theta = theta.cos()
    sin_theta = theta.sin()
    return matrix([[cos_theta, -sin_theta, 0], [sin_theta, cos_theta, 0], [0, 0, 1]], template)


def affine3d(scale: Entry, shift: Entry, template: torch.Tensor) -> torch.Tensor:
    """Return matrices [N, 4, 4] that scale all axes by `scale`, then add `shift` to all.

    See `matrix` for `template`.
    """
    return matrix([[scale, 0, 0, shift], [0, scale, 0, shift], [0, 0, scale, shift], [0, 0, 0, 1]], template)


def rotate_about_grey(theta: torch.Tensor, template: torch.Tensor) -> torch.Tensor:
    """Return matrices [N, 4, 4] that rotate colours by theta [N] radians about the grey axis.

    With v = (1, 1, 1)' / sqrt(3), its transpose v', and its cross-product matrix [v]x, Rodrigues' formula is
    v v' + cos(theta) (I - v v') + sin(theta) [v]x. See `matrix` for `template`.
    """
    cos_theta = theta.cos()
    sin_theta = theta.sin()
    # Entries of Rodrigues' matrix: those of the diagonal, and those with a positive or a negative sine.
    diagonal = (1 + 2 * cos_theta) / 3
    plus_sine = (1 - cos_theta) / 3 + sin_theta / _R3
    minus_sine = (1 - cos_theta) / 3 - sin_theta / _R3
    return matrix(
        [
            [diagonal, minus_sine, plus_sine, 0],
            [plus_sine, diagonal, minus_sine, 0],
            [minus_sine, plus_sine, diagonal, 0],
            [0, 0, 0, 1],
        ],
        template,
    )


def octave_filter_bank(band_count: int = 4) -> np.ndarray:
    """Return zero-phase FIR filters that split a signal into octaves and add up to the identity.

    Let H be the frequency response of the sym2 low-pass filter or of its mirrored high-pass filter. The
    responses |H|^2 / 2 of the two sum to 1, which gives two bands. Each further stage adds a band: all
    existing filters are stretched by a factor of 2 by inserting zeros, the low-pass filter removes their
    spectral images, and the high-pass filter becomes the new highest band (Karras et al. 2020, "Training
    generative adversarial networks with limited data", appendix B).

    Args: band_count: number of bands.
    Returns: filters [bands, taps], float64, from the lowest to the highest band; taps = 43 for 4 bands.
    """
    low_pass = np.asarray(SYM2)
    # Alternating signs shift the response by half the sampling frequency.
    high_pass = low_pass * (-1.0) ** np.arange(len(low_pass))
    # A filter that is convolved with its reverse has the response |H|^2 and zero phase.
    low_power = np.convolve(low_pass, low_pass[::-1]) / 2
    high_power = np.convolve(high_pass, high_pass[::-1]) / 2
    # The first filter is the identity, the others are 0.
    filter_bank = np.eye(band_count, 1)
    for new_band in range(1, band_count):
        stretched_filters = np.zeros([band_count, 2 * filter_bank.shape[1] - 1])
        stretched_filters[:, ::2] = filter_bank
        filter_bank = np.stack([np.convolve(band_filter, low_power) for band_filter in stretched_filters])
        first_tap = (filter_bank.shape[1] - len(high_power)) // 2  # centres the shorter filter
        filter_bank[new_band, first_tap : first_tap + len(high_power)] += high_power
    # Some taps cancel except for rounding, which depends on the order of numpy's sums. They are set to
    # exactly 0.
    return np.where(np.abs(filter_bank) < 1e-12, 0.0, filter_bank)
