"""Image preprocessing of published shape generators: cropping, background and resizing as in training.

Resizing reproduces the library that each generator was trained with: OpenCV's methods in plain numpy,
Pillow's and torch's by these libraries themselves.

    on_white        Hunyuan3D-2.1: centred on a white square; OpenCV
    on_black        TRELLIS and TRELLIS.2: on a black square around the object; Pillow
    object_inputs   SAM 3D Objects: cropped around a soft mask and uncropped, with a point map; torch

Shape letters: h, w rows and columns of an image, n pixels along an axis before resizing, m pixels after it,
s pixels per side of a square.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

Result = TypeVar("Result")
OPAQUE = 204  # alpha above which TRELLIS counts a pixel as part of the object: 0.8 of 255


def read_cut_out(path: Path, cut: Callable[[Image.Image], Result]) -> Result:
    """Read an image with a transparent background as RGBA and apply `cut` to it.

    Palette and grey images with transparency are accepted, too.

    Raises: ValueError with the file's name for an image without transparency, or if `cut` raises one.
    """
    with Image.open(path) as image:
        mode = image.mode
        rgba = image.convert("RGBA")
    try:
        # An alpha that is 255 everywhere is no mask: the whole frame would be taken for the object.
        if rgba.getchannel("A").getextrema()[0] == 255:
            raise ValueError(
                f"expected a transparent background, got an opaque image ({mode}). Remove the background"
                " first."
            )
        return cut(rgba)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


# Resizing as in OpenCV: each target pixel is a weighted sum of a few source pixels along each axis, first
# along rows, then along columns, rounded as OpenCV's arithmetic rounds.


# Per tap: the source pixels [m] that the m target pixels read, and their weights [m].
Taps = list[tuple[np.ndarray, np.ndarray]]


def opencv(pixels: np.ndarray, size: tuple[int, int], how: str) -> np.ndarray:
    """Resize bytes [h, w, ...] to another size (h, w) as OpenCV does, with differences of at most 1 of 255.

    Args: how: "area"; "cubic", whose kernel is not widened when an image shrinks, so that it aliases;
        "nearest".
    """
    height, width = pixels.shape[:2]
    rows, columns = size
    # OpenCV copies where the size does not change; its formulas would not be exact.
    if (height, width) == size:
        return pixels.copy()
    if how == "nearest":
        return pixels[_kept(height, rows)[:, None], _kept(width, columns)]
    if how == "area" and (rows > height or columns > width):
        # OpenCV's "area" is another formula as soon as one side grows, and then for both axes.
        return _grown(pixels, _edges(height, rows), _edges(width, columns))
    taps, kind = (_area, np.float32) if how == "area" else (_cubic, np.float32)
    values = _weighted(pixels.astype(kind), taps(width, columns), 1)
    # Rounded once at the end, as in OpenCV; float32 in between.
    return np.rint(_weighted(values, taps(height, rows), 0)).clip(0, 255).astype(np.uint8)


def _weighted(values: np.ndarray, taps: Taps, axis: int) -> np.ndarray:
    """Sum source pixels with their weights along one axis."""
    # the weights' shape, which broadcasts along `axis`
    shape = [-1 if i == axis else 1 for i in range(values.ndim)]
    total = np.zeros((), values.dtype)
    for pixel, weight in taps:
        # Summed tap by tap, in this order, so that rounding is that of the original.
        total = total + values.take(pixel, axis) * weight.astype(values.dtype).reshape(shape)
    return total


def _step(n: int, m: int) -> float:
    """Return the number of source pixels per target pixel."""
    return 1 / (m / n)  # OpenCV's order of operations: n / m selects other pixels in rare cases


def _kept(n: int, m: int) -> np.ndarray:
    """Return the source pixel [m] of each target pixel for nearest-neighbour resizing."""
    return np.floor(np.arange(m) * _step(n, m)).astype(int).clip(max=n - 1)


def _area(n: int, m: int) -> Taps:
    """Weigh each source pixel by the part of it that a target pixel covers; overlaps below 1/1000 are
    ignored.
    """
    low = np.arange(m) * _step(n, m)
    high = np.minimum(low + _step(n, m), n)
    taps = []
    # A target pixel overlaps at most this many source pixels.
    for k in range(int(_step(n, m)) + 2):
        pixel = np.floor(low).astype(int) + k
        # A target pixel covers the interval [low, high) of the source axis.
        overlap = np.minimum(high, pixel + 1) - np.maximum(low, pixel)
        taps.append((pixel.clip(max=n - 1), np.where(overlap > 1e-3, overlap, 0) / (high - low)))
    return taps


def _cubic(n: int, m: int) -> Taps:
    """Weigh four source pixels by Keys' kernel with a = -0.75; positions beyond the border are clamped."""
    # Centres of the target pixels in source coordinates.
    place = (np.arange(m) + 0.5) * _step(n, m) - 0.5
    left = np.floor(place).astype(int)
    a = -0.75

    def weight(x: np.ndarray) -> np.ndarray:
        # Keys 1981: one cubic for distances up to 1, another for 1 to 2.
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
        return np.where(x <= 1, near, far)

    # Four taps; their weights sum to 1.
    return [((left + k).clip(0, n - 1), weight(np.abs(place - left - k))) for k in (-1, 0, 1, 2)]


def _edges(n: int, m: int) -> Taps:
    """Weigh two source pixels where "area" enlarges a side: linear, but measured from a pixel's edge, not its
    centre.

    The weights are integers in units of 1/2048, as in OpenCV's fixed-point arithmetic.
    """
    target = np.arange(m)
    left = np.floor(target * _step(n, m)).astype(int)
    share = (target + 1) - (left + 1) * (m / n)
    # At the last pixel there is no right neighbour, so the share is 0.
    share = np.where((share <= 0) | (left >= n - 1), 0.0, share - np.floor(share)).astype(np.float32)
    parts = ((left.clip(max=n - 1), 1 - share), ((left + 1).clip(max=n - 1), share))
    return [(pixel, np.rint(part * np.float32(2048)).astype(np.int64)) for pixel, part in parts]


def _grown(pixels: np.ndarray, rows: Taps, columns: Taps) -> np.ndarray:
    """Enlarge bytes in integer arithmetic, with truncation at the two places where OpenCV truncates."""
    # Weights are in 1/2048 (11 bits). Shifts by 4, 16 and 2 remove the 22 bits of both axes.
    wide = _weighted(pixels.astype(np.int64), columns, 1) >> 4
    shape = (-1, *[1] * (pixels.ndim - 1))
    (first, share), (second, rest) = rows
    tall = (wide[first] * share.reshape(shape) >> 16) + (wide[second] * rest.reshape(shape) >> 16)
    return ((tall + 2) >> 2).clip(0, 255).astype(np.uint8)


def short_side(x: torch.Tensor, size: int) -> torch.Tensor:
    """Resize images [N, C, h, w] to a short side of `size` pixels and crop the centre: [N, C, size, size].

    Bilinear; antialiased when the image shrinks.
    """
    height, width = x.shape[-2:]
    # The long side is truncated to whole pixels, as torchvision does.
    long = size * max(height, width) // min(height, width)
    target = (long, size) if height > width else (size, long)
    x = F.interpolate(x, size=target, mode="bilinear", antialias=True) if (height, width) != target else x
    top, left = (round((side - size) / 2) for side in target)
    return x[..., top : top + size, left : left + size]


# Hunyuan3D-2.1


def on_white(image: Image.Image, size: int, border: float) -> tuple[np.ndarray, np.ndarray]:
    """Centre the object on a white square, as Hunyuan3D-2.1's ImageProcessorV2 does.

    The object is the bounding box of all pixels that are not fully transparent.

    Args:
        size: pixels per side of the result.
        border: share of the square's side that stays free.
    Returns: bytes [size, size, 3] and the mask [size, size].
    Raises: ValueError for an image that shows no more than one row or column.
    """
    square = framed(np.asarray(image), border)
    # The mask is taken from alpha and resized without interpolation.
    return opencv(over_white(square), (size, size), "cubic"), opencv(square[..., 3], (size, size), "nearest")


def framed(pixels: np.ndarray, border: float) -> np.ndarray:
    """Place the object of bytes [h, w, 4] in a square [s, s, 4], where s is the longer side of the image.

    Its box fills 1 - border of the square. As in the original, the box's last row and column are lost.
    """
    rows, columns = (np.flatnonzero(pixels[..., 3].any(axis)) for axis in (1, 0))
    # Last minus first, without + 1: this is what loses a row and a column.
    height, width = (int(places[-1] - places[0]) if len(places) else 0 for places in (rows, columns))
    # The square is as large as the image's longer side, not as the object.
    side = max(pixels.shape[:2])
    scale = int(side * (1 - border)) / max(height, width, 1)  # magnification of the object
    size = int(height * scale), int(width * scale)
    if min(size) < 1:
        raise ValueError("expected an object larger than one pixel, got a smaller one. Choose another image.")
    # All four channels are resized alike, so colours of transparent pixels blend in at the edges.
    part = opencv(pixels[rows[0] : rows[0] + height, columns[0] : columns[0] + width], size, "area")
    square = np.zeros((side, side, 4), np.uint8)
    top, left = ((side - length) // 2 for length in size)
    square[top : top + size[0], left : left + size[1]] = part
    return square


def over_white(pixels: np.ndarray) -> np.ndarray:
    """Blend bytes [h, w, 4] over white: [h, w, 3], rounded down to bytes."""
    alpha = pixels[..., 3:].astype(np.float32) / 255
    # In this form and in float32: other orders of the operations lose a count of 255.
    return (pixels[..., :3] * alpha + 255 * (1 - alpha)).clip(0, 255).astype(np.uint8)


# TRELLIS and TRELLIS.2


def on_black(image: Image.Image, size: int, margin: float = 1.2) -> torch.Tensor:
    """Place the object on a black square, as TRELLIS's pipeline does.

    With (l, t) and (r, b) the first and the last pixel of opacity above 0.8, the square around their middle
    has sides of 2 int(k / 2) with k = int(margin max(r - l, b - t)). Its corners are rounded to the
    nearest pixel, halves to the even one. After resizing by Lanczos, colours are multiplied by opacity and
    truncated to 8 bits.

    Args:
        size: pixels per side of the result.
        margin: side of the square in sides of the object.
    Returns: [3, size, size] of values 0..1, in steps of 1/255.
    Raises: ValueError for an image without visible pixels, or with an object of a pixel or two.
    """
    return _unit(over_black(squared(image, margin).resize((size, size), Image.Resampling.LANCZOS)))


def on_black_first(image: Image.Image, sizes: tuple[int, ...], largest: int = 1024) -> list[torch.Tensor]:
    """Place the object on a black square, as TRELLIS.2's pipeline does, and resize it to several sizes.

    In contrast to `on_black` there is no margin, the image is blended over black before it is resized, and
    its longer side is first reduced to `largest` at most.
    """
    # The order matters: blending after resizing differs by up to 20 counts of 255 at edges.
    square = Image.fromarray(over_black(squared(at_most(image, largest), 1.0)))
    return [_unit(np.asarray(square.resize((size, size), Image.Resampling.LANCZOS))) for size in sizes]


def at_most(image: Image.Image, largest: int) -> Image.Image:
    """Shrink an image by Lanczos so that its longer side has at most `largest` pixels."""
    factor = min(1, largest / max(image.size))
    size = int(image.width * factor), int(image.height * factor)
    return image if factor == 1 else image.resize(size, Image.Resampling.LANCZOS)


def squared(image: Image.Image, margin: float) -> Image.Image:
    """Crop the square that `on_black` describes from an RGBA image."""
    box = image.getchannel("A").point(lambda a: 255 if a > OPAQUE else 0).getbbox()
    if box is None:
        raise ValueError("the image has no pixel of opacity above 0.8. Choose another image.")
    left = box[0]
    top = box[1]
    # Pillow's box ends one pixel after the last one.
    right = box[2] - 1
    bottom = box[3] - 1
    half = int(max(right - left, bottom - top) * margin) // 2
    if half < 1:
        raise ValueError(
            "expected an object larger than two pixels, got a smaller one. Choose another image."
        )
    x = (left + right) / 2  # centre of the object, which may lie between two pixels
    y = (top + bottom) / 2
    # Pillow fills what lies outside the image with transparent black.
    return image.crop((round(x - half), round(y - half), round(x + half), round(y + half)))


def over_black(image: Image.Image) -> np.ndarray:
    """Blend an RGBA image over black: bytes [h, w, 3], rounded down to bytes."""
    pixels = np.asarray(image).astype(np.float32) / 255
    return (pixels[..., :3] * pixels[..., 3:] * 255).astype(np.uint8)


def _unit(pixels: np.ndarray) -> torch.Tensor:
    """Convert bytes [h, w, 3] to a tensor [3, h, w] of values 0..1."""
    return torch.from_numpy(pixels.astype(np.float32) / 255).permute(2, 0, 1).contiguous()


# SAM 3D Objects


@dataclass(frozen=True, kw_only=True)
class ObjectCut:
    """Settings of a preprocessor of SAM 3D Objects, as its YAML file states them. The defaults are those
    published.
    """

    size: int = 518  # pixels per side
    box_size_factor: float = 1.2  # side of the crop box, in sides of the mask's bounding box
    padding_factor: float = 0.0  # padding on every side, in sides of the crop
    rembg: bool = False  # remove what is outside the mask
    # Normaliser of the point map: ObjectCentricSSI, SSIPointmapNormalizer or ObjectApparentSizeSSI.
    normaliser: str = "ObjectCentricSSI"
    moments_alone: bool = False  # leave points as they are, but return their scale and shift
    scene_scale: bool = True  # take the scale over all points and not only over the object's


def object_inputs(pixels: np.ndarray, points: torch.Tensor | None, cut: ObjectCut) -> dict[str, torch.Tensor]:
    """Compute the inputs of SAM 3D's embedders for one object, [C, s, s] each.

    `image`, `mask` and `pointmap` are cropped around the mask. `rgb_image`, `rgb_image_mask` and
    `rgb_pointmap` show the full frame, padded to a square.

    Args:
        pixels: bytes [h, w, 4]. Alpha is the mask; the colours still contain the background.
        points: point map [h', w', 3] of the same image, x left, y up, z forward; NaN where there is no point.
            None: no point maps.
    Returns: the inputs by name; with points also pointmap_scale and pointmap_shift, [3] each: the points
        became (p - shift) / scale.
    Raises: ValueError for a mask of less than three rows or columns.
    """
    frame = torch.from_numpy(pixels.astype(np.float32) / 255).permute(2, 0, 1)  # [4, h, w]
    colours = frame[:3]
    mask = frame[3:]  # soft: alpha is not cut at a half
    fitted = None
    inputs = {}
    if points is not None:
        # The point map is brought to the image's size and normalised before any cropping. [3, h, w]
        places = F.interpolate(points.float().permute(2, 0, 1)[None], mask.shape[1:], mode="nearest")[0]
        scale, shift = moments(places, mask[0] > 0.5, cut)
        unit = 1 / scale[:, None, None]
        # In this order of operations the result is bitwise that of the original.
        fitted = places if cut.moments_alone else places * unit - shift[:, None, None] * unit
        inputs = {"pointmap_scale": scale, "pointmap_shift": shift}
    box = box_about(mask[0], cut.box_size_factor)  # top, bottom, left, right
    cropped_colours = _padded(_boxed(colours, box), cut, 0.0)
    cropped_mask = _padded(_boxed(mask, box), cut, 0.0)
    image = cropped_colours * cropped_mask if cut.rembg else cropped_colours
    inputs |= {"image": _shrunk(image, cut.size), "mask": _kept_pixels(cropped_mask, cut.size)}
    inputs |= {
        "rgb_image": _shrunk(in_square(colours), cut.size),
        "rgb_image_mask": _kept_pixels(in_square(mask), cut.size),
    }
    if fitted is not None:
        # The cropped map is padded by NaN (no point), the full frame by 0 (a valid point), as in training.
        cropped_points = _padded(_boxed(fitted, box), cut, float("nan"))
        if cut.rembg:
            cropped_points = cropped_points.where(cropped_mask > 0, float("nan"))
        inputs |= {
            "pointmap": _kept_pixels(cropped_points, cut.size),
            "rgb_pointmap": _kept_pixels(in_square(fitted), cut.size),
        }
    return inputs


def moments(
    places: torch.Tensor, on_object: torch.Tensor, cut: ObjectCut
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the scale and the shift, [3] each, by which a point map [3, h, w] is normalised.

    Medians ignore NaN and take the lower of two middle values.

    Args: on_object: [h, w] bool, True for pixels of the object.
    """
    visible = places[:, on_object]  # [3, points on the object]
    shift = torch.zeros(3)
    scale = torch.ones(())
    # Without a point on the object the map stays as it is.
    if not visible.isfinite().all(0).any():
        return scale.expand(3), shift
    if cut.normaliser == "ObjectCentricSSI":
        shift = visible.nanmedian(1).values
        among = places.flatten(1) if cut.scene_scale else visible
        scale = (among - shift[:, None]).abs().amax(0).nanmedian()
    elif cut.normaliser == "ObjectApparentSizeSSI":
        scale = (places[2] if cut.scene_scale else visible[2]).nanmedian()
    else:
        # SSIPointmapNormalizer: only the depth is shifted; the scale is a mean, not a median.
        shift = torch.stack([scale * 0, scale * 0, places[2].nanmedian()])
        scale = (places - shift[:, None, None]).abs().nanmean()
    return scale.expand(3), shift


def box_about(mask: torch.Tensor, factor: float) -> tuple[int, int, int, int]:
    """Return top, bottom, left and right of the square around a mask [h, w].

    Corners are truncated towards 0, so the square may be one pixel narrower along an axis.
    """
    sides = []
    for axis in (1, 0):
        places = (mask > 0).any(axis).nonzero()
        first, last = (int(places[0]), int(places[-1])) if len(places) else (0, 0)
        sides.append((first, last))
    if min(last - first for first, last in sides) < 2:
        raise ValueError(
            "expected a mask of at least three rows and three columns, got a smaller one. Choose another"
            " image."
        )
    # Last minus first, without + 1, as in the original.
    half = int(factor * max(last - first for first, last in sides)) // 2
    (top, bottom), (left, right) = ((int((a + b) / 2 - half), int((a + b) / 2 + half)) for a, b in sides)
    return top, bottom, left, right


def _boxed(x: torch.Tensor, box: tuple[int, int, int, int]) -> torch.Tensor:
    """Crop [C, h, w] to a box. What lies outside the image is 0, which in a point map is a valid point."""
    top, bottom, left, right = box
    height, width = x.shape[1:]
    # F.pad's order: left, right, top, bottom. The box moves by what is added on the left and at the top.
    padding = (max(0, -left), max(0, right - width), max(0, -top), max(0, bottom - height))
    return F.pad(x, padding)[
        :, top + padding[2] : bottom + padding[2], left + padding[0] : right + padding[0]
    ]


def in_square(x: torch.Tensor, around: float = 0.0) -> torch.Tensor:
    """Centre [C, h, w] in a square [C, s, s] with s = max(h, w); `around` fills the rest."""
    height, width = x.shape[1:]
    s = max(height, width)
    # With an odd remainder, the larger part of the padding is below and on the right.
    top = (s - height) // 2
    left = (s - width) // 2
    return F.pad(x, (left, s - width - left, top, s - height - top), value=around)


def _padded(x: torch.Tensor, cut: ObjectCut, around: float) -> torch.Tensor:
    """Pad a crop to a square and then by `padding_factor` on every side."""
    x = in_square(x, around)
    return F.pad(x, (int(cut.padding_factor * x.shape[1]),) * 4, value=around)


def _shrunk(x: torch.Tensor, size: int) -> torch.Tensor:
    """Resize [C, h, w] to a square of `size` pixels, bilinear with antialiasing."""
    return F.interpolate(x[None], (size, size), mode="bilinear", antialias=True)[0]


def _kept_pixels(x: torch.Tensor, size: int) -> torch.Tensor:
    """Resize [C, h, w] to a square of `size` pixels by nearest neighbour.

    This never mixes NaN, which marks missing points, into valid ones.
    """
    return F.interpolate(x[None], (size, size), mode="nearest")[0]
