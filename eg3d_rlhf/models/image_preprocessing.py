"""Pictures cut out and resized as the programs do it that generators of shapes were trained with: OpenCV's
ways of resizing in plain numpy, Pillow's and torch's by these themselves.

    on_white        Hunyuan3D-2.1: in the middle of a white square; OpenCV
    on_black        TRELLIS and TRELLIS.2: in a black square about it; Pillow
    object_inputs   SAM 3D Objects: about a soft mask and whole, with places in space; torch

Shape letters: h, w of a picture, n its pixels along an axis before resizing, m after, s pixels per side of a
square.
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
OPAQUE = 204  # alpha above which TRELLIS counts a pixel as shown: 0.8 of 255


def read_cut_out(path: Path, cut: Callable[[Image.Image], Result]) -> Result:
    """What `cut` makes of a picture with a transparent background, given as RGBA; palettes and greys with
    transparency are such, too.

    Raises: ValueError with the file's name for a picture without transparency, or one that `cut` refuses.
    """
    with Image.open(path) as image:
        mode = image.mode
        shown = image.convert("RGBA")
    try:
        if shown.getchannel("A").getextrema()[0] == 255:
            raise ValueError(
                f"expected a transparent background, got an opaque picture ({mode}). Remove the background"
                " first."
            )
        return cut(shown)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


# Resizing as OpenCV does it: along each axis a few pixels with their weights, column by column first; rounded
# as its arithmetic rounds.


Taps = list[tuple[np.ndarray, np.ndarray]]  # pixels [m] that a target reads, and their weights [m], in turn


def opencv(pixels: np.ndarray, size: tuple[int, int], how: str) -> np.ndarray:
    """Bytes [h, w, ...] -> bytes of another size (h, w); those of OpenCV, within 1 of 255.

    Args: how: "area", "cubic" (never widened, so that it aliases when it makes small) or "nearest".
    """
    height, width = pixels.shape[:2]
    rows, columns = size
    if (height, width) == size:
        return pixels.copy()
    if how == "nearest":
        return pixels[_kept(height, rows)[:, None], _kept(width, columns)]
    if how == "area" and (rows > height or columns > width):
        return _grown(pixels, _edges(height, rows), _edges(width, columns))
    taps, kind = (_area, np.float32) if how == "area" else (_cubic, np.float32)
    values = _weighted(pixels.astype(kind), taps(width, columns), 1)
    return np.rint(_weighted(values, taps(height, rows), 0)).clip(0, 255).astype(np.uint8)


def _weighted(values: np.ndarray, taps: Taps, axis: int) -> np.ndarray:
    shape = [-1 if i == axis else 1 for i in range(values.ndim)]
    total = np.zeros((), values.dtype)
    for pixel, weight in taps:
        total = total + values.take(pixel, axis) * weight.astype(values.dtype).reshape(shape)
    return total


def _step(n: int, m: int) -> float:
    return 1 / (m / n)  # in this order: n / m gives other pixels in rare cases


def _kept(n: int, m: int) -> np.ndarray:
    return np.floor(np.arange(m) * _step(n, m)).astype(int).clip(max=n - 1)


def _area(n: int, m: int) -> Taps:
    """Each pixel weighs what a target pixel covers of it; less than 1/1000 counts as nothing."""
    low = np.arange(m) * _step(n, m)
    high = np.minimum(low + _step(n, m), n)
    taps = []
    for k in range(int(_step(n, m)) + 2):
        pixel = np.floor(low).astype(int) + k
        overlap = np.minimum(high, pixel + 1) - np.maximum(low, pixel)
        taps.append((pixel.clip(max=n - 1), np.where(overlap > 1e-3, overlap, 0) / (high - low)))
    return taps


def _cubic(n: int, m: int) -> Taps:
    """Keys' kernel with a = -0.75; pixels beyond the border are those at it."""
    place = (np.arange(m) + 0.5) * _step(n, m) - 0.5
    left = np.floor(place).astype(int)
    a = -0.75

    def weight(x: np.ndarray) -> np.ndarray:
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
        return np.where(x <= 1, near, far)

    return [((left + k).clip(0, n - 1), weight(np.abs(place - left - k))) for k in (-1, 0, 1, 2)]


def _edges(n: int, m: int) -> Taps:
    """What "area" is where a side grows: linear, but from a pixel's edge, not its middle;
    weights in 1/2048.
    """
    target = np.arange(m)
    left = np.floor(target * _step(n, m)).astype(int)
    share = (target + 1) - (left + 1) * (m / n)
    share = np.where((share <= 0) | (left >= n - 1), 0.0, share - np.floor(share)).astype(np.float32)
    parts = ((left.clip(max=n - 1), 1 - share), ((left + 1).clip(max=n - 1), share))
    return [(pixel, np.rint(part * np.float32(2048)).astype(np.int64)) for pixel, part in parts]


def _grown(pixels: np.ndarray, rows: Taps, columns: Taps) -> np.ndarray:
    """By whole numbers alone, cut down twice on the way."""
    wide = _weighted(pixels.astype(np.int64), columns, 1) >> 4
    shape = (-1, *[1] * (pixels.ndim - 1))
    (first, share), (second, rest) = rows
    tall = (wide[first] * share.reshape(shape) >> 16) + (wide[second] * rest.reshape(shape) >> 16)
    return ((tall + 2) >> 2).clip(0, 255).astype(np.uint8)


def short_side(x: torch.Tensor, size: int) -> torch.Tensor:
    """[N, C, h, w] -> the middle [N, C, size, size] with the shorter side of that many pixels: bilinear,
    widened when it makes small.
    """
    height, width = x.shape[-2:]
    long = size * max(height, width) // min(height, width)
    target = (long, size) if height > width else (size, long)
    x = F.interpolate(x, size=target, mode="bilinear", antialias=True) if (height, width) != target else x
    top, left = (round((side - size) / 2) for side in target)
    return x[..., top : top + size, left : left + size]


# Hunyuan3D-2.1


def on_white(image: Image.Image, size: int, border: float) -> tuple[np.ndarray, np.ndarray]:
    """The box of all that is not transparent, in the middle of a white square with a border -> bytes
    [size, size, 3], mask [size, size].

    Args: border: share of the square's side that is left free.
    Raises: ValueError for a picture that shows no more than one row or column.
    """
    square = framed(np.asarray(image), border)
    return opencv(over_white(square), (size, size), "cubic"), opencv(square[..., 3], (size, size), "nearest")


def framed(pixels: np.ndarray, border: float) -> np.ndarray:
    """Bytes [h, w, 4] -> [s, s, 4], s the longer side, its box filling 1 - border of it. The box's last row
    and column are lost there.
    """
    rows, columns = (np.flatnonzero(pixels[..., 3].any(axis)) for axis in (1, 0))
    height, width = (int(places[-1] - places[0]) if len(places) else 0 for places in (rows, columns))
    side = max(pixels.shape[:2])
    scale = int(side * (1 - border)) / max(height, width, 1)
    size = int(height * scale), int(width * scale)
    if min(size) < 1:
        raise ValueError(
            "expected something larger than a pixel that is not transparent, got less. Choose another"
            " picture."
        )
    part = opencv(pixels[rows[0] : rows[0] + height, columns[0] : columns[0] + width], size, "area")
    square = np.zeros((side, side, 4), np.uint8)
    top, left = ((side - length) // 2 for length in size)
    square[top : top + size[0], left : left + size[1]] = part
    return square


def over_white(pixels: np.ndarray) -> np.ndarray:
    """Bytes [h, w, 4] -> [h, w, 3], cut down and not rounded."""
    alpha = pixels[..., 3:].astype(np.float32) / 255
    return (pixels[..., :3] * alpha + 255 * (1 - alpha)).clip(0, 255).astype(np.uint8)


# TRELLIS and TRELLIS.2


def on_black(image: Image.Image, size: int, margin: float = 1.2) -> torch.Tensor:
    """What a picture shows, in the middle of a black square -> [3, size, size] of 0..1, in steps of 1/255, as
    TRELLIS's pipeline.

    With (l, t) and (r, b) the first and the last pixel of an opacity above 0.8, the square about their middle
    has sides of 2 floor(floor(margin max(r - l, b - t)) / 2), its corners rounded to the nearest pixel,
    halves to the even one. Resized by Lanczos, its colours are multiplied by opacity and cut down, not
    rounded, to 8 bits.
    Raises: ValueError for a picture that shows nothing, or a pixel or two.
    """
    return _unit(over_black(squared(image, margin).resize((size, size), Image.Resampling.LANCZOS)))


def on_black_first(image: Image.Image, sizes: tuple[int, ...], largest: int = 1024) -> list[torch.Tensor]:
    """As `on_black` without a margin, but over black before it is resized, and of a longer side of `largest`
    at most: TRELLIS.2's.
    """
    square = Image.fromarray(over_black(squared(at_most(image, largest), 1.0)))
    return [_unit(np.asarray(square.resize((size, size), Image.Resampling.LANCZOS))) for size in sizes]


def at_most(image: Image.Image, largest: int) -> Image.Image:
    """Made small by Lanczos where a side is longer."""
    factor = min(1, largest / max(image.size))
    size = int(image.width * factor), int(image.height * factor)
    return image if factor == 1 else image.resize(size, Image.Resampling.LANCZOS)


def squared(image: Image.Image, margin: float) -> Image.Image:
    """The square of `on_black` of an RGBA picture."""
    box = image.getchannel("A").point(lambda a: 255 if a > OPAQUE else 0).getbbox()
    if box is None:
        raise ValueError("expected something that is not transparent, got nothing. Choose another picture.")
    left = box[0]
    top = box[1]
    right = box[2] - 1
    bottom = box[3] - 1
    half = int(max(right - left, bottom - top) * margin) // 2
    if half < 1:
        raise ValueError("expected something larger than two pixels, got less. Choose another picture.")
    x = (left + right) / 2
    y = (top + bottom) / 2
    return image.crop((round(x - half), round(y - half), round(x + half), round(y + half)))


def over_black(image: Image.Image) -> np.ndarray:
    """RGBA -> bytes [h, w, 3]: colours times opacity, cut down and not rounded."""
    pixels = np.asarray(image).astype(np.float32) / 255
    return (pixels[..., :3] * pixels[..., 3:] * 255).astype(np.uint8)


def _unit(pixels: np.ndarray) -> torch.Tensor:
    """Bytes [h, w, 3] -> [3, h, w] of 0..1."""
    return torch.from_numpy(pixels.astype(np.float32) / 255).permute(2, 0, 1).contiguous()


# SAM 3D Objects


@dataclass(frozen=True, kw_only=True)
class ObjectCut:
    """What a preprocessor's YAML says; the values are the published ones."""

    size: int = 518  # pixels per side
    box_size_factor: float = 1.2  # side of the box, in sides of the mask's
    padding_factor: float = 0.0  # around it on every side, in sides of it
    rembg: bool = False  # cut away what is not in the mask
    normaliser: str = "ObjectCentricSSI"  # of points, or SSIPointmapNormalizer, ObjectApparentSizeSSI
    moments_alone: bool = False  # points stay as they are; their scale and shift are given all the same
    scene_scale: bool = True  # of normalisers that ask: the scale is that of all points, not of the object's


def object_inputs(pixels: np.ndarray, points: torch.Tensor | None, cut: ObjectCut) -> dict[str, torch.Tensor]:
    """What SAM 3D's embedders are told of an object, [C, s, s] each: `image`, `mask`, `pointmap` cut out
    about the mask, and `rgb_image`, `rgb_image_mask`, `rgb_pointmap` whole, in a square.

    Args:
        pixels: bytes [h, w, 4], the mask as opacity, all around still in the colours.
        points: [h', w', 3] places of the same picture, x left, y up, z forward; NaN where there is none.
            None: no maps.
    Returns also pointmap_scale and pointmap_shift [3] each, where there are points: they became
    (p - shift) / scale.
    Raises: ValueError for a mask of less than three rows or columns.
    """
    whole = torch.from_numpy(pixels.astype(np.float32) / 255).permute(2, 0, 1)  # [4, h, w]
    colours = whole[:3]
    mask = whole[3:]
    fitted = None
    told = {}
    if points is not None:
        # [3, h, w]
        places = F.interpolate(points.float().permute(2, 0, 1)[None], mask.shape[1:], mode="nearest")[0]
        scale, shift = moments(places, mask[0] > 0.5, cut)
        unit = 1 / scale[:, None, None]
        # in this order: to the bit
        fitted = places if cut.moments_alone else places * unit - shift[:, None, None] * unit
        told = {"pointmap_scale": scale, "pointmap_shift": shift}
    box = box_about(mask[0], cut.box_size_factor)
    wide = (_boxed(x, box) for x in (colours, mask))
    near = _padded(next(wide), cut, 0.0), _padded(next(wide), cut, 0.0)
    image = near[0] * near[1] if cut.rembg else near[0]
    told |= {"image": _shrunk(image, cut.size), "mask": _kept_pixels(near[1], cut.size)}
    told |= {
        "rgb_image": _shrunk(in_square(colours), cut.size),
        "rgb_image_mask": _kept_pixels(in_square(mask), cut.size),
    }
    if fitted is not None:
        close = _padded(_boxed(fitted, box), cut, float("nan"))
        close = close.where(near[1] > 0, float("nan")) if cut.rembg else close
        told |= {
            "pointmap": _kept_pixels(close, cut.size),
            "rgb_pointmap": _kept_pixels(in_square(fitted), cut.size),
        }
    return told


def moments(
    places: torch.Tensor, on_object: torch.Tensor, cut: ObjectCut
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift [3] of points [3, h, w]; medians leave NaN out, and take the lower of two in the
    middle.
    """
    seen = places[:, on_object]
    shift = torch.zeros(3)
    scale = torch.ones(())
    if not seen.isfinite().all(0).any():
        return scale.expand(3), shift
    if cut.normaliser == "ObjectCentricSSI":
        shift = seen.nanmedian(1).values
        among = places.flatten(1) if cut.scene_scale else seen
        scale = (among - shift[:, None]).abs().amax(0).nanmedian()
    elif cut.normaliser == "ObjectApparentSizeSSI":
        scale = (places[2] if cut.scene_scale else seen[2]).nanmedian()
    else:
        shift = torch.stack([scale * 0, scale * 0, places[2].nanmedian()])
        scale = (places - shift[:, None, None]).abs().nanmean()
    return scale.expand(3), shift


def box_about(mask: torch.Tensor, factor: float) -> tuple[int, int, int, int]:
    """Top, bottom, left, right of the square about a mask [h, w]; corners cut down towards 0, so that it may
    be a pixel narrower.
    """
    sides = []
    for axis in (1, 0):
        places = (mask > 0).any(axis).nonzero()
        first, last = (int(places[0]), int(places[-1])) if len(places) else (0, 0)
        sides.append((first, last))
    if min(last - first for first, last in sides) < 2:
        raise ValueError(
            "expected a mask of three rows and columns or more, got less. Choose another picture."
        )
    half = int(factor * max(last - first for first, last in sides)) // 2
    (top, bottom), (left, right) = ((int((a + b) / 2 - half), int((a + b) / 2 + half)) for a, b in sides)
    return top, bottom, left, right


def _boxed(x: torch.Tensor, box: tuple[int, int, int, int]) -> torch.Tensor:
    """[C, h, w] within a box; what is outside is 0, a valid point, too."""
    top, bottom, left, right = box
    height, width = x.shape[1:]
    room = (max(0, -left), max(0, right - width), max(0, -top), max(0, bottom - height))
    return F.pad(x, room)[:, top + room[2] : bottom + room[2], left + room[0] : right + room[0]]


def in_square(x: torch.Tensor, around: float = 0.0) -> torch.Tensor:
    """[C, h, w] in the middle of a square [C, s, s]."""
    height, width = x.shape[1:]
    s = max(height, width)
    top = (s - height) // 2
    left = (s - width) // 2
    return F.pad(x, (left, s - width - left, top, s - height - top), value=around)


def _padded(x: torch.Tensor, cut: ObjectCut, around: float) -> torch.Tensor:
    x = in_square(x, around)
    return F.pad(x, (int(cut.padding_factor * x.shape[1]),) * 4, value=around)


def _shrunk(x: torch.Tensor, size: int) -> torch.Tensor:
    return F.interpolate(x[None], (size, size), mode="bilinear", antialias=True)[0]


def _kept_pixels(x: torch.Tensor, size: int) -> torch.Tensor:
    return F.interpolate(x[None], (size, size), mode="nearest")[0]
