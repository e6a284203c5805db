"""Adaptive discriminator augmentation (ADA): random transforms of the discriminator's inputs.

Source: Karras et al. 2020, "Training generative adversarial networks with limited data", section 3 and
appendix B.

All geometric transforms of a sample are composed into one matrix, and all colour transforms into another. The
image is therefore resampled and recoloured only once.

Shapes: N batch, C channels, H x W pixels. Pixel positions are relative to the image centre, x right, y down.
Matrices are homogeneous and act on column vectors from the left; an entry is a number or a tensor [N].
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from torch_utils.ops import grid_sample_gradfix, upfirdn2d

Entry = float | torch.Tensor

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
SYM2 = tuple(a / (4 * math.sqrt(2)) for a in (1 - _R3, 3 - _R3, 3 + _R3, 1 + _R3))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentOptions:
    """Settings of `AugmentPipe`.

    The first group of each block gives factors on the overall probability p. 0 turns a transform off.
    """

    # Pixel blitting
    xflip: float = 0  # mirror left to right
    rotate90: float = 0  # multiples of 90 degrees
    xint: float = 0  # whole-pixel shift
    xint_max: float = 0.125  # largest shift, fraction of the image size
    # General geometry
    scale: float = 0  # isotropic scaling
    rotate: float = 0  # any angle, in two rotations: before and after the anisotropic scaling
    aniso: float = 0  # x by s, y by 1/s
    xfrac: float = 0  # sub-pixel shift
    scale_std: float = 0.2  # octaves
    rotate_max: float = 1  # fraction of a half turn
    aniso_std: float = 0.2  # octaves
    xfrac_std: float = 0.125  # fraction of the image size
    # Colour
    brightness: float = 0  # added to all channels
    contrast: float = 0  # factor on all channels
    lumaflip: float = 0  # mirror the grey axis
    hue: float = 0  # rotation about the grey axis; RGB only
    saturation: float = 0  # factor on the distance to the grey axis; RGB only
    brightness_std: float = 0.2  # of the value range [-1, 1]
    contrast_std: float = 0.5  # octaves
    hue_max: float = 1  # fraction of a half turn
    saturation_std: float = 1  # octaves
    # Filtering in four frequency bands
    imgfilter: float = 0  # amplify or weaken frequency bands
    imgfilter_bands: tuple[float, ...] = (1, 1, 1, 1)  # factor on p per band, lowest first
    imgfilter_std: float = 1  # octaves
    # Corruption
    noise: float = 0  # additive Gaussian noise
    cutout: float = 0  # a grey square
    noise_std: float = 0.1  # scale of the half-normal standard deviation of the noise, values in [-1, 1]
    cutout_size: float = 0.5  # side, fraction of the image size


class _Draws:
    """Random numbers of one batch, from torch's global generator.

    Their order is EG3D's: a value first, then the gate that decides whether the value is used. With
    `percentile`, the numbers are drawn and discarded, every gate is open, and every value is that percentile
    of its distribution.
    """

    def __init__(self, images: torch.Tensor, percentile: float | None):
        self.n = images.shape[0]
        self.device = images.device
        self.percentile = (
            None if percentile is None else torch.as_tensor(float(percentile), device=self.device)
        )

    def uniform(self, *shape: int) -> torch.Tensor:
        """Draw from U[0, 1), shape [N, *shape]."""
        return self._or_percentile(torch.rand([self.n, *shape], device=self.device), lambda p: p)

    def normal(self, *shape: int) -> torch.Tensor:
        """Draw from N(0, 1), shape [N, *shape]."""
        return self._or_percentile(
            # Quantile function of the normal distribution, up to its
            # factor sqrt(2), which EG3D leaves out as well.
            torch.randn([self.n, *shape], device=self.device),
            lambda p: torch.erfinv(p * 2 - 1),
        )

    def half_normal(self, *shape: int) -> torch.Tensor:
        """Draw |N(0, 1)|, shape [N, *shape]."""
        return self._or_percentile(torch.randn([self.n, *shape], device=self.device).abs(), torch.erfinv)

    def _or_percentile(
        self, drawn: torch.Tensor, quantile: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        # The random numbers are drawn in either case, so that the
        # state of the generator afterwards is the same.
        return drawn if self.percentile is None else torch.full_like(drawn, float(quantile(self.percentile)))

    def gated(self, value: torch.Tensor, probability: torch.Tensor, neutral: float) -> torch.Tensor:
        """Return `value` [N, ...] for the samples whose gate opens, and `neutral` for the others."""
        # One gate per sample: [N, 1, ...].
        gate = torch.rand([self.n] + [1] * (value.ndim - 1), device=self.device) < probability
        return torch.where(gate, value, torch.full_like(value, neutral)) if self.percentile is None else value


class AugmentPipe(torch.nn.Module):
    """Random differentiable transforms of the discriminator's inputs.

    Each is applied with probability p times the value of its option.

    Args:
        options: the fields of `AugmentOptions` as keywords.

    Buffers: `p` (overall probability, set by the training loop), `Hz_geom` [12] (low-pass for geometry),
    `Hz_fbank` [4, 43] (frequency bands).
    """

    p: torch.Tensor
    Hz_geom: torch.Tensor
    Hz_fbank: torch.Tensor

    def __init__(self, **options):
        super().__init__()
        self.options = AugmentOptions(**options)
        # Buffers, with EG3D's names: checkpoints hold them.
        self.register_buffer("p", torch.ones([]))
        self.register_buffer("Hz_geom", upfirdn2d.setup_filter(SYM6))
        self.register_buffer("Hz_fbank", torch.as_tensor(octave_filter_bank(), dtype=torch.float32))

    def forward(self, images: torch.Tensor, debug_percentile: float | None = None) -> torch.Tensor:
        """Augment a batch, each sample in its own way.

        Args:
            images: [N, C, H, W], nominally in [-1, 1]. C is 1 (grey), 3 (RGB) or 6 (two RGB images that get
                the same transform).
            debug_percentile: a value in 0..1 replaces all random values, except the noise field, and opens
                all gates.
        Returns: [N, C, H, W].
        Differentiable in images, twice and more.
        """
        assert images.ndim == 4 and images.shape[1] in (1, 3, 6)
        o = self.options
        # The order of the blocks, and of the draws in each, is EG3D's: it fixes the random sequence.
        draws = _Draws(images, debug_percentile)
        if (
            o.xflip > 0
            or o.rotate90 > 0
            or o.xint > 0
            or o.scale > 0
            or o.rotate > 0
            or o.aniso > 0
            or o.xfrac > 0
        ):
            images = self._warp(images, self._draw_geometry(images, draws))
        if o.brightness > 0 or o.contrast > 0 or o.lumaflip > 0 or o.hue > 0 or o.saturation > 0:
            images = _recolour(images, self._draw_colour(images, draws))
        if o.imgfilter > 0:
            images = self._filter_bands(images, draws)
        if o.noise > 0:
            # A standard deviation per sample, [N, 1, 1, 1].
            sigma = draws.gated(draws.half_normal(1, 1, 1) * o.noise_std, o.noise * self.p, 0)
            images = images + torch.randn(images.shape, device=images.device) * sigma
        if o.cutout > 0:
            height, width = images.shape[2:]
            # Width and height of the square; a closed gate gives size 0. [N, 2, 1, 1, 1].
            size = draws.gated(
                torch.full([draws.n, 2, 1, 1, 1], float(o.cutout_size), device=draws.device),
                o.cutout * self.p,
                0,
            )
            centre = draws.uniform(2, 1, 1, 1)
            x = (torch.arange(width, device=draws.device) + 0.5) / width  # [W]
            y = ((torch.arange(height, device=draws.device) + 0.5) / height)[:, None]  # [H, 1]
            # True outside the square, [N, 1, H, W].
            outside = ((x - centre[:, 0]).abs() >= size[:, 0] / 2) | (
                (y - centre[:, 1]).abs() >= size[:, 1] / 2
            )
            images = images * outside.to(images.dtype)
        return images

    def _draw_geometry(self, images: torch.Tensor, draws: _Draws) -> torch.Tensor:
        """Return matrices [N, 3, 3] that map output positions to input positions, in pixels from the centre.

        This is the inverse of the transform, so a scaling by s enters as 1 / s. Factors multiply from the
        right in the order in which the transforms are applied to the image.
        """
        o = self.options
        p = self.p
        height, width = images.shape[2:]
        like = images.new_empty([images.shape[0]], dtype=torch.float32)
        g = scale2d(1, 1, like)
        if o.xflip > 0:
            # Each value is drawn before its gate, see `_Draws`. Half of the open gates mirror.
            g = g @ scale2d(1 - 2 * draws.gated((draws.uniform() * 2).floor(), o.xflip * p, 0), 1, like)
        if o.rotate90 > 0:
            g = g @ rotate2d(
                math.pi / 2 * draws.gated((draws.uniform() * 4).floor(), o.rotate90 * p, 0), like
            )
        if o.xint > 0:
            t = draws.gated((draws.uniform(2) * 2 - 1) * o.xint_max, o.xint * p, 0)
            g = g @ translate2d(-(t[:, 0] * width).round(), -(t[:, 1] * height).round(), like)
        if o.scale > 0:
            s = draws.gated((draws.normal() * o.scale_std).exp2(), o.scale * p, 1)
            g = g @ scale2d(1 / s, 1 / s, like)
        # Two rotations, each with probability q, give at least one
        # with probability 1 - (1 - q)^2 = rotate * p.
        p_rotate = 1 - (1 - o.rotate * p).clamp(0, 1).sqrt()
        if o.rotate > 0:
            g = g @ rotate2d(
                draws.gated((draws.uniform() * 2 - 1) * (math.pi * o.rotate_max), p_rotate, 0), like
            )
        if o.aniso > 0:
            s = draws.gated((draws.normal() * o.aniso_std).exp2(), o.aniso * p, 1)
            g = g @ scale2d(1 / s, s, like)
        if o.rotate > 0:
            # With `debug_percentile` the second rotation is left out, so that the first one can be seen.
            theta = draws.gated((draws.uniform() * 2 - 1) * (math.pi * o.rotate_max), p_rotate, 0)
            g = g @ rotate2d(theta if draws.percentile is None else torch.zeros_like(theta), like)
        if o.xfrac > 0:
            t = draws.gated(draws.normal(2) * o.xfrac_std, o.xfrac * p, 0)
            g = g @ translate2d(-t[:, 0] * width, -t[:, 1] * height, like)
        return g

    def _warp(self, images: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        """Resample images by the maps g.

        The borders are mirrored, the image is upsampled twice with `Hz_geom`, sampled bilinearly, and
        downsampled with the time-reversed filter. The wavelet is orthogonal, so up- and downsampling alone
        return the input. Sample i of the input lies at 2i of the fine grid, half a fine pixel before the
        centre of its pair. The maps between the grids contain that half pixel.

        Args:
            images: [N, C, H, W].
            g: [N, 3, 3] from `_draw_geometry`.
        Returns: [N, C, H, W].
        """
        n, channels, height, width = images.shape
        # No transform was drawn for the whole batch: often so while p is small.
        if bool((g == torch.eye(3, device=g.device)).all()):
            return images
        reach = self.Hz_geom.shape[0] // 4  # pixels that the filter reads beyond an image
        left, right, top, bottom = _margins(g, height, width, reach)
        images = F.pad(images, (left, right, top, bottom), mode="reflect")
        images = upfirdn2d.upsample2d(images, self.Hz_geom, up=2)
        # Size of the fine output. It is larger than twice the
        # image, because the downsampling filter needs a margin.
        out_h = 2 * (height + 2 * reach)
        out_w = 2 * (width + 2 * reach)
        # From affine_grid's [-1, 1] on the fine output to pixels of the image.
        to_coarse = scale2d(0.5, 0.5, g) @ translate2d(0.5, 0.5, g) @ scale2d(out_w / 2, out_h / 2, g)
        # The margins may differ, which moves the centre of the padded image.
        recentre = translate2d((left - right) / 2, (top - bottom) / 2, g)
        # From pixels of the padded image to grid_sample's [-1, 1] on its fine version.
        to_fine = (
            scale2d(2 / images.shape[3], 2 / images.shape[2], g)
            @ translate2d(-0.5, -0.5, g)
            @ scale2d(2, 2, g)
        )
        theta = to_fine @ recentre @ g @ to_coarse
        grid = F.affine_grid(theta[:, :2].to(images.dtype), [n, channels, out_h, out_w], align_corners=False)
        images = grid_sample_gradfix.grid_sample(images, grid)
        # The negative padding crops the margin again.
        return upfirdn2d.downsample2d(images, self.Hz_geom, down=2, padding=-2 * reach, flip_filter=True)

    def _draw_colour(self, images: torch.Tensor, draws: _Draws) -> torch.Tensor:
        """Return affine maps of RGB, [N, 4, 4]. Later transforms multiply from the left."""
        o = self.options
        p = self.p
        like = images.new_empty([images.shape[0]], dtype=torch.float32)
        v = like.new_tensor([1, 1, 1, 0]) / _R3
        eye = torch.eye(4, device=like.device)
        # Projector onto the grey axis (1, 1, 1, 0) / sqrt(3), in homogeneous coordinates.
        grey = torch.outer(v, v)
        c = affine3d(1, 0, like)
        if o.brightness > 0:
            b = draws.gated(draws.normal() * o.brightness_std, o.brightness * p, 0)
            c = affine3d(1, b, like) @ c
        if o.contrast > 0:
            s = draws.gated((draws.normal() * o.contrast_std).exp2(), o.contrast * p, 1)
            c = affine3d(s, 0, like) @ c
        if o.lumaflip > 0:
            # Householder reflection: the grey component changes its sign.
            c = (eye - 2 * grey * draws.gated((draws.uniform(1, 1) * 2).floor(), o.lumaflip * p, 0)) @ c
        if o.hue > 0 and images.shape[1] > 1:
            c = (
                rotate_about_grey(
                    draws.gated((draws.uniform() * 2 - 1) * (math.pi * o.hue_max), o.hue * p, 0), like
                )
                @ c
            )
        if o.saturation > 0 and images.shape[1] > 1:
            s = draws.gated((draws.normal(1, 1) * o.saturation_std).exp2(), o.saturation * p, 1)
            # The grey component stays, the rest, which is the saturation, is scaled.
            c = (grey + (eye - grey) * s) @ c
        return c

    def _filter_bands(self, images: torch.Tensor, draws: _Draws) -> torch.Tensor:
        """Amplify or weaken frequency bands, by a separable FIR filter per sample with mirrored borders.

        Each band's amplitude is scaled so that an image with a natural (1/f) spectrum keeps its power.

        Returns: [N, C, H, W].
        """
        o = self.options
        n, channels, height, width = images.shape
        # Expected share of each octave in the power of a natural image. The lowest one contains the mean.
        power = torch.tensor([10, 1, 1, 1], device=draws.device) / 13
        # Bands are drawn one after the other, and the gains renormalised after each.
        gains = torch.ones([draws.n, 4], device=draws.device)
        for band, strength in enumerate(o.imgfilter_bands):
            t = torch.ones_like(gains)
            drawn = draws.gated((draws.normal() * o.imgfilter_std).exp2(), o.imgfilter * self.p * strength, 1)
            t[:, band] = drawn if strength > 0 else 1
            gains = gains * t / (power * t.square()).sum(dim=1, keepdim=True).sqrt()
        # One kernel per plane of the batch: [N, 4] @ [4, 43] -> [N * C, 43].
        kernel = (gains @ self.Hz_fbank).repeat_interleave(channels, dim=0).to(images.dtype)
        reach = self.Hz_fbank.shape[1] // 2
        if min(height, width) <= reach:
            raise ValueError(
                f"AugmentPipe: imgfilter needs images above {reach} pixels, got {height} x {width}."
                " Set imgfilter=0."
            )
        planes = F.pad(images, [reach] * 4, mode="reflect").flatten(0, 1)[None]  # [1, N*C, H+42, W+42]
        # Grouped convolution: one group per plane. Rows, then columns, since the filter is separable.
        planes = F.conv2d(planes, kernel[:, None, None, :], groups=n * channels)
        planes = F.conv2d(planes, kernel[:, None, :, None], groups=n * channels)
        return planes.reshape(n, channels, height, width)


def _margins(g: torch.Tensor, height: int, width: int, reach: int) -> tuple[int, int, int, int]:
    """Return how many pixels (left, right, top, bottom) the batch reads outside the image.

    At most the size less one, which is all that can be mirrored.
    """
    cx = (width - 1) / 2
    cy = (height - 1) / 2
    # Where the corners of the output lie in the input, over all samples.
    corners = g.new_tensor([[-cx, -cy, 1], [cx, -cy, 1], [cx, cy, 1], [-cx, cy, 1]])
    xy = (g @ corners.T)[:, :2].permute(1, 0, 2).flatten(1)  # [2, N*4]
    far = torch.stack([-xy[0].min(), xy[0].max(), -xy[1].min(), xy[1].max()])
    far = far + 2 * reach - g.new_tensor([cx, cx, cy, cy])
    limit = g.new_tensor([width - 1, width - 1, height - 1, height - 1])
    left, right, top, bottom = (int(m) for m in far.clamp(min=0).minimum(limit).ceil().tolist())
    return left, right, top, bottom


def _recolour(images: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """Apply colour maps to images.

    Args:
        images: [N, C, H, W]. Each triple of channels is RGB.
        c: [N, 4, 4]. A grey image (C = 1) gets the mean of the maps' rows.
    Returns: [N, C, H, W].
    """
    n, channels, height, width = images.shape
    c = c.to(images.dtype)
    if channels == 1:
        row = c[:, :3].mean(dim=1, keepdim=True)  # [N, 1, 4]
        return images * row[:, :, :3].sum(dim=2)[:, :, None, None] + row[:, :, 3:, None]
    rgb = images.reshape(n, channels // 3, 3, height * width)  # [N, C / 3, 3, H * W]
    return (c[:, None, :3, :3] @ rgb + c[:, None, :3, 3:]).reshape(n, channels, height, width)


def matrix(rows: Sequence[Sequence[Entry]], like: torch.Tensor) -> torch.Tensor:
    """Return matrices [N, R, R] of the given entries, with device and dtype of `like` [N, ...]."""
    n = like.shape[0]
    # A number is the same for all samples, a tensor [N] holds one value for each.
    entries = [
        torch.as_tensor(e, dtype=like.dtype, device=like.device).expand(n) for row in rows for e in row
    ]
    return torch.stack(entries, dim=1).reshape(n, len(rows), len(rows[0]))


def translate2d(x: Entry, y: Entry, like: torch.Tensor) -> torch.Tensor:
    """Return matrices [N, 3, 3] that shift by (x, y)."""
    return matrix([[1, 0, x], [0, 1, y], [0, 0, 1]], like)


def scale2d(x: Entry, y: Entry, like: torch.Tensor) -> torch.Tensor:
    """Return matrices [N, 3, 3] that scale about the origin."""
    return matrix([[x, 0, 0], [0, y, 0], [0, 0, 1]], like)


def rotate2d(theta: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return matrices [N, 3, 3] that rotate by theta radians [N], from x towards y."""
    c = theta.cos()
    s = theta.sin()
    return matrix([[c, -s, 0], [s, c, 0], [0, 0, 1]], like)


def affine3d(scale: Entry, shift: Entry, like: torch.Tensor) -> torch.Tensor:
    """Return matrices [N, 4, 4] that scale about the origin and shift, equally along all axes."""
    return matrix([[scale, 0, 0, shift], [0, scale, 0, shift], [0, 0, scale, shift], [0, 0, 0, 1]], like)


def rotate_about_grey(theta: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return matrices [N, 4, 4] that rotate colours by theta radians [N] about the grey axis.

    With v = (1, 1, 1) / sqrt(3), Rodrigues' formula is v v' + cos(theta) (I - v v') + sin(theta) [v]x.
    """
    c = theta.cos()
    s = theta.sin()
    same = (1 + 2 * c) / 3
    plus = (1 - c) / 3 + s / _R3
    minus = (1 - c) / 3 - s / _R3
    return matrix(
        [[same, minus, plus, 0], [plus, same, minus, 0], [minus, plus, same, 0], [0, 0, 0, 1]], like
    )


def octave_filter_bank(bands: int = 4) -> np.ndarray:
    """Return zero-phase FIR filters that split a signal into octaves and add up to the identity.

    One stage of two bands has the power responses |H|^2 / 2 of the sym2 low-pass and of its mirrored
    high-pass, which sum to 1. Each further stage splits the lowest band again: all filters so far are
    stretched by two (zero-stuffed), their spectral images are removed by the low-pass, and the high-pass
    becomes the new top band (Karras et al. 2020, "Training GANs with limited data", appendix B).

    Returns: float64 [bands, taps], from the lowest to the highest band; taps = 43 for 4 bands.
    """
    low = np.asarray(SYM2)
    high = low * (-1.0) ** np.arange(len(low))
    # A filter convolved with its reverse has the response |H|^2 and zero phase.
    low2, high2 = (np.convolve(h, h[::-1]) / 2 for h in (low, high))
    bank = np.eye(bands, 1)
    for top in range(1, bands):
        stretched = np.zeros([bands, 2 * bank.shape[1] - 1])
        stretched[:, ::2] = bank
        bank = np.stack([np.convolve(row, low2) for row in stretched])
        start = (bank.shape[1] - len(high2)) // 2  # centred
        bank[top, start : start + len(high2)] += high2
    # Some taps cancel up to rounding, which depends on the order of numpy's sums. They are set to exactly 0.
    return np.where(np.abs(bank) < 1e-12, 0.0, bank)
