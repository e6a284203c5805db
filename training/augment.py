"""Adaptive discriminator augmentation (ADA).

Source: Karras et al. 2020, "Training generative adversarial networks with limited data", section 3 and
appendix B.
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
# the same with 2 vanishing moments
SYM2 = tuple(a / (4 * math.sqrt(2)) for a in (1 - _R3, 3 - _R3, 3 + _R3, 1 + _R3))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentOptions:
    """What `AugmentPipe` does. The first group of each block multiplies the overall probability p; 0 = the
    transform is off.
    """

    # Pixel blitting
    xflip: float = 0  # mirror left to right
    rotate90: float = 0  # multiples of 90 degrees
    xint: float = 0  # whole-pixel shift
    xint_max: float = 0.125  # largest shift, fraction of the image size
    # General geometry
    scale: float = 0  # isotropic scaling
    rotate: float = 0  # any angle, half of it before and half after the anisotropic scaling
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
    saturation: float = 0  # factor on the distance from the grey axis; RGB only
    brightness_std: float = 0.2  # of the value range [-1, 1]
    contrast_std: float = 0.5  # octaves
    hue_max: float = 1  # fraction of a half turn
    saturation_std: float = 1  # octaves
    # Filtering in four frequency bands
    imgfilter: float = 0
    imgfilter_bands: tuple[float, ...] = (1, 1, 1, 1)  # factor on p per band, lowest first
    imgfilter_std: float = 1  # octaves
    # Corruption
    noise: float = 0  # additive Gaussian noise
    cutout: float = 0  # a grey square
    noise_std: float = 0.1
    cutout_size: float = 0.5  # side, fraction of the image size


class _Draws:
    """Random numbers for one batch, from torch's global generator in EG3D's order: a value, then the gate
    that admits it.

    With `percentile` the numbers are drawn and discarded, every gate is open and every value is that
    percentile.
    """

    def __init__(self, images: torch.Tensor, percentile: float | None):
        self.n = images.shape[0]
        self.device = images.device
        self.percentile = (
            None if percentile is None else torch.as_tensor(float(percentile), device=self.device)
        )

    def uniform(self, *shape: int) -> torch.Tensor:
        """U[0, 1), shape [N, *shape]."""
        return self._or_percentile(torch.rand([self.n, *shape], device=self.device), lambda p: p)

    def normal(self, *shape: int) -> torch.Tensor:
        """N(0, 1), shape [N, *shape]."""
        return self._or_percentile(
            torch.randn([self.n, *shape], device=self.device), lambda p: torch.erfinv(p * 2 - 1)
        )

    def half_normal(self, *shape: int) -> torch.Tensor:
        """|N(0, 1)|, shape [N, *shape]."""
        return self._or_percentile(torch.randn([self.n, *shape], device=self.device).abs(), torch.erfinv)

    def _or_percentile(
        self, drawn: torch.Tensor, quantile: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        return drawn if self.percentile is None else torch.full_like(drawn, float(quantile(self.percentile)))

    def gated(self, value: torch.Tensor, probability: torch.Tensor, neutral: float) -> torch.Tensor:
        """`value` [N, ...] for the samples whose gate opens, `neutral` for the others."""
        gate = torch.rand([self.n] + [1] * (value.ndim - 1), device=self.device) < probability
        return torch.where(gate, value, torch.full_like(value, neutral)) if self.percentile is None else value


class AugmentPipe(torch.nn.Module):
    """Random differentiable transforms of what the discriminator sees; each is applied with probability p
    times its option.

    Constructor: the fields of `AugmentOptions` as keywords. Buffers: `p` (overall probability, set by the
    training loop), `Hz_geom` [12] (low-pass for geometry), `Hz_fbank` [4, 43] (frequency bands).
    """

    p: torch.Tensor
    Hz_geom: torch.Tensor
    Hz_fbank: torch.Tensor

    def __init__(self, **options):
        super().__init__()
        self.options = AugmentOptions(**options)
        self.register_buffer("p", torch.ones([]))
        self.register_buffer("Hz_geom", upfirdn2d.setup_filter(SYM6))
        self.register_buffer("Hz_fbank", torch.as_tensor(octave_filter_bank(), dtype=torch.float32))

    def forward(self, images: torch.Tensor, debug_percentile: float | None = None) -> torch.Tensor:
        """Augment a batch, each sample in its own way.

        Args:
            images: [N, C, H, W], nominally in [-1, 1]; C is 1 (grey), 3 (RGB) or 6 (two RGB images that get
                the same transform).
            debug_percentile: 0..1 replaces all random values (except the noise field) and opens all gates.
        Returns: [N, C, H, W].
        Differentiable in images, twice and more.
        """
        assert images.ndim == 4 and images.shape[1] in (1, 3, 6)
        o = self.options
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
            sigma = draws.gated(draws.half_normal(1, 1, 1) * o.noise_std, o.noise * self.p, 0)
            images = images + torch.randn(images.shape, device=images.device) * sigma
        if o.cutout > 0:
            height, width = images.shape[2:]
            size = draws.gated(
                torch.full([draws.n, 2, 1, 1, 1], float(o.cutout_size), device=draws.device),
                o.cutout * self.p,
                0,
            )
            centre = draws.uniform(2, 1, 1, 1)
            x = (torch.arange(width, device=draws.device) + 0.5) / width  # [W]
            y = ((torch.arange(height, device=draws.device) + 0.5) / height)[:, None]  # [H, 1]
            # [N, 1, H, W]
            outside = ((x - centre[:, 0]).abs() >= size[:, 0] / 2) | (
                (y - centre[:, 1]).abs() >= size[:, 1] / 2
            )
            images = images * outside.to(images.dtype)
        return images

    def _draw_geometry(self, images: torch.Tensor, draws: _Draws) -> torch.Tensor:
        """Matrices that take output positions to input positions.
        Returns [N, 3, 3], pixels about the centre.
        """
        o = self.options
        p = self.p
        height, width = images.shape[2:]
        like = images.new_empty([images.shape[0]], dtype=torch.float32)
        g = scale2d(1, 1, like)
        if o.xflip > 0:
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
        p_rotate = 1 - (1 - o.rotate * p).clamp(0, 1).sqrt()  # two chances make the probability rotate * p
        if o.rotate > 0:
            g = g @ rotate2d(
                draws.gated((draws.uniform() * 2 - 1) * (math.pi * o.rotate_max), p_rotate, 0), like
            )
        if o.aniso > 0:
            s = draws.gated((draws.normal() * o.aniso_std).exp2(), o.aniso * p, 1)
            g = g @ scale2d(1 / s, s, like)
        if o.rotate > 0:
            theta = draws.gated((draws.uniform() * 2 - 1) * (math.pi * o.rotate_max), p_rotate, 0)
            g = g @ rotate2d(theta if draws.percentile is None else torch.zeros_like(theta), like)
        if o.xfrac > 0:
            t = draws.gated(draws.normal(2) * o.xfrac_std, o.xfrac * p, 0)
            g = g @ translate2d(-t[:, 0] * width, -t[:, 1] * height, like)
        return g

    def _warp(self, images: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        """Resample: mirror the borders, upsample twice with `Hz_geom`, sample bilinearly, downsample with its
        time reverse.

        The wavelet is orthogonal, so up and down alone give the input back. Sample i of the input lies at 2i
        of the fine grid, half a fine pixel before the centre of its pair; the maps between the grids carry
        that half.

        Args: g as from `_draw_geometry`. Returns [N, C, H, W].
        """
        n, channels, height, width = images.shape
        if bool((g == torch.eye(3, device=g.device)).all()):
            return images
        reach = self.Hz_geom.shape[0] // 4  # pixels that the filter reads beyond an image
        left, right, top, bottom = _margins(g, height, width, reach)
        images = F.pad(images, (left, right, top, bottom), mode="reflect")
        images = upfirdn2d.upsample2d(images, self.Hz_geom, up=2)
        out_h = 2 * (height + 2 * reach)
        out_w = 2 * (width + 2 * reach)
        # from [-1, 1]
        to_coarse = scale2d(0.5, 0.5, g) @ translate2d(0.5, 0.5, g) @ scale2d(out_w / 2, out_h / 2, g)
        recentre = translate2d((left - right) / 2, (top - bottom) / 2, g)
        # to [-1, 1]
        to_fine = (
            scale2d(2 / images.shape[3], 2 / images.shape[2], g)
            @ translate2d(-0.5, -0.5, g)
            @ scale2d(2, 2, g)
        )
        theta = to_fine @ recentre @ g @ to_coarse
        grid = F.affine_grid(theta[:, :2].to(images.dtype), [n, channels, out_h, out_w], align_corners=False)
        images = grid_sample_gradfix.grid_sample(images, grid)
        return upfirdn2d.downsample2d(images, self.Hz_geom, down=2, padding=-2 * reach, flip_filter=True)

    def _draw_colour(self, images: torch.Tensor, draws: _Draws) -> torch.Tensor:
        """Affine maps of RGB. Returns [N, 4, 4]."""
        o = self.options
        p = self.p
        like = images.new_empty([images.shape[0]], dtype=torch.float32)
        v = like.new_tensor([1, 1, 1, 0]) / _R3
        eye = torch.eye(4, device=like.device)
        # the projector onto the homogeneous grey axis
        grey = torch.outer(v, v)
        c = affine3d(1, 0, like)
        if o.brightness > 0:
            b = draws.gated(draws.normal() * o.brightness_std, o.brightness * p, 0)
            c = affine3d(1, b, like) @ c
        if o.contrast > 0:
            s = draws.gated((draws.normal() * o.contrast_std).exp2(), o.contrast * p, 1)
            c = affine3d(s, 0, like) @ c
        if o.lumaflip > 0:
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
            c = (grey + (eye - grey) * s) @ c
        return c

    def _filter_bands(self, images: torch.Tensor, draws: _Draws) -> torch.Tensor:
        """Amplify bands: a separable FIR filter of its own for each sample, borders mirrored. Returns
        [N, C, H, W].

        Each band's amplitude is scaled so that an image with a natural (1/f) spectrum keeps its power.
        """
        o = self.options
        n, channels, height, width = images.shape
        # share of each octave; the lowest holds the mean
        power = torch.tensor([10, 1, 1, 1], device=draws.device) / 13
        gains = torch.ones([draws.n, 4], device=draws.device)
        for band, strength in enumerate(o.imgfilter_bands):
            t = torch.ones_like(gains)
            drawn = draws.gated((draws.normal() * o.imgfilter_std).exp2(), o.imgfilter * self.p * strength, 1)
            t[:, band] = drawn if strength > 0 else 1
            gains = gains * t / (power * t.square()).sum(dim=1, keepdim=True).sqrt()
        # [N*C, 43], one per plane
        kernel = (gains @ self.Hz_fbank).repeat_interleave(channels, dim=0).to(images.dtype)
        reach = self.Hz_fbank.shape[1] // 2
        if min(height, width) <= reach:
            raise ValueError(
                f"AugmentPipe: expected images above {reach} pixels for imgfilter, got {height} x {width}."
                " Set imgfilter=0."
            )
        planes = F.pad(images, [reach] * 4, mode="reflect").flatten(0, 1)[None]  # [1, N*C, H+42, W+42]
        planes = F.conv2d(planes, kernel[:, None, None, :], groups=n * channels)
        planes = F.conv2d(planes, kernel[:, None, :, None], groups=n * channels)
        return planes.reshape(n, channels, height, width)


def _margins(g: torch.Tensor, height: int, width: int, reach: int) -> tuple[int, int, int, int]:
    """Pixels (left, right, top, bottom) that the batch reads outside the image, at most the size less one
    (what can be mirrored).
    """
    cx = (width - 1) / 2
    cy = (height - 1) / 2
    corners = g.new_tensor([[-cx, -cy, 1], [cx, -cy, 1], [cx, cy, 1], [-cx, cy, 1]])
    xy = (g @ corners.T)[:, :2].permute(1, 0, 2).flatten(1)  # [2, N*4]
    far = torch.stack([-xy[0].min(), xy[0].max(), -xy[1].min(), xy[1].max()])
    far = far + 2 * reach - g.new_tensor([cx, cx, cy, cy])
    limit = g.new_tensor([width - 1, width - 1, height - 1, height - 1])
    left, right, top, bottom = (int(m) for m in far.clamp(min=0).minimum(limit).ceil().tolist())
    return left, right, top, bottom


def _recolour(images: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """Apply colour maps c [N, 4, 4] to each RGB triple, or their mean row to a grey image. Returns
    [N, C, H, W].
    """
    n, channels, height, width = images.shape
    c = c.to(images.dtype)
    if channels == 1:
        row = c[:, :3].mean(dim=1, keepdim=True)  # [N, 1, 4]
        return images * row[:, :, :3].sum(dim=2)[:, :, None, None] + row[:, :, 3:, None]
    rgb = images.reshape(n, channels // 3, 3, height * width)
    return (c[:, None, :3, :3] @ rgb + c[:, None, :3, 3:]).reshape(n, channels, height, width)


def matrix(rows: Sequence[Sequence[Entry]], like: torch.Tensor) -> torch.Tensor:
    """Assemble matrices from entries. Returns [N, R, R] on the device and dtype of `like` [N, ...]."""
    n = like.shape[0]
    entries = [
        torch.as_tensor(e, dtype=like.dtype, device=like.device).expand(n) for row in rows for e in row
    ]
    return torch.stack(entries, dim=1).reshape(n, len(rows), len(rows[0]))


def translate2d(x: Entry, y: Entry, like: torch.Tensor) -> torch.Tensor:
    """Shift by (x, y). Returns [N, 3, 3]."""
    return matrix([[1, 0, x], [0, 1, y], [0, 0, 1]], like)


def scale2d(x: Entry, y: Entry, like: torch.Tensor) -> torch.Tensor:
    """Scale about the origin. Returns [N, 3, 3]."""
    return matrix([[x, 0, 0], [0, y, 0], [0, 0, 1]], like)


def rotate2d(theta: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Rotate by theta radians [N], from x towards y. Returns [N, 3, 3]."""
    c = theta.cos()
    s = theta.sin()
    return matrix([[c, -s, 0], [s, c, 0], [0, 0, 1]], like)


def affine3d(scale: Entry, shift: Entry, like: torch.Tensor) -> torch.Tensor:
    """Scale about the origin and shift, alike along all axes. Returns [N, 4, 4]."""
    return matrix([[scale, 0, 0, shift], [0, scale, 0, shift], [0, 0, scale, shift], [0, 0, 0, 1]], like)


def rotate_about_grey(theta: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Rotate colours by theta radians [N] about the grey axis v = (1,1,1)/sqrt 3 (Rodrigues: vv' + cos
    (I - vv') + sin [v]x).

    Returns [N, 4, 4].
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
    """Zero-phase FIR filters that split a signal into octaves and add up to the identity.

    One two-band stage has the power responses |H|^2/2 of the sym2 low-pass and of its mirrored high-pass,
    which sum to 1. Each further stage splits the lowest band again: all filters so far are stretched by two
    (zero-stuffed), their images removed by the low-pass, and the high-pass joins as the new top band
    (Karras et al. 2020, "Training GANs with limited data", appendix B).

    Returns: float64 [bands, taps] from lowest to highest band; taps = 43 for 4 bands.
    """
    low = np.asarray(SYM2)
    high = low * (-1.0) ** np.arange(len(low))
    low2, high2 = (np.convolve(h, h[::-1]) / 2 for h in (low, high))
    bank = np.eye(bands, 1)
    for top in range(1, bands):
        stretched = np.zeros([bands, 2 * bank.shape[1] - 1])
        stretched[:, ::2] = bank
        bank = np.stack([np.convolve(row, low2) for row in stretched])
        start = (bank.shape[1] - len(high2)) // 2
        bank[top, start : start + len(high2)] += high2
    # taps that cancel are 0 in whatever order numpy sums them
    return np.where(np.abs(bank) < 1e-12, 0.0, bank)
