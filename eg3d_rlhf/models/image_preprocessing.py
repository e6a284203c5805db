"""Image preprocessing of published shape generators: cropping, background and resizing as in their training.

The functions repeat the published preprocessing exactly, including its rounding. Resizing as in OpenCV is
written in numpy here. Resizing as in Pillow and torch uses these libraries.

    on_white        for Hunyuan3D-2.1: places the object in the centre of a white square; resizes as OpenCV
    on_black        for TRELLIS and TRELLIS.2: places the object on a black square; resizes with Pillow
    object_inputs   for SAM 3D Objects: returns the image cropped around a mask and uncropped, and a point
                    map; resizes with torch

Shapes: h rows and w columns of an image, C channels, n pixels along an axis before resizing and m pixels
after it, s pixels per side of a square.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from training.image_reading import UnusableImageError, joined_errors, read_image

Result = TypeVar("Result")
_BLOCK_VALUES = 1 << 20  # approximate number of values in a block of rows that is resized at once
OPAQUE = 204  # alpha above which TRELLIS counts a pixel as part of the object: 0.8 of 255


def read_cut_out(path: Path, cut: Callable[[Image.Image], Result]) -> Result:
    """Read an image with a transparent background and apply a function to it.

    The image is upright; see `training.image_reading`. Palette and grey images with transparency are
    accepted, too.

    Args:
        path: image file.
        cut: function that is called with the image in RGBA; its result is returned.

    Raises: ValueError that begins with the path if the image is opaque, fully transparent or cannot be read,
        or if `cut` raises ValueError.
    """
    image = read_image(path, str(path), background=None)
    image_mode = image.mode
    rgba_image = image if image_mode == "RGBA" else image.convert("RGBA")
    try:
        # Alpha is the mask of the object. If its smallest value is
        # 255, the complete image would be the object.
        lowest_alpha, highest_alpha = rgba_image.getchannel("A").getextrema()
        if lowest_alpha == 255:
            raise ValueError(
                f"the image must have a transparent background, but is opaque ({image_mode}). Remove its"
                " background first."
            )
        if highest_alpha == 0:
            raise ValueError("the image is fully transparent, so it shows no object. Choose another image.")
        return cut(rgba_image)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def usable_cut_outs(paths: Iterable[Path]) -> tuple[list[Path], list[str]]:
    """Decode images with transparent backgrounds once, to find all faults before the first one is embedded.

    Args: paths: image files.
    Returns: the files that can be used, and a message for each file that is an animation, a HEIC image under
        another name, or too large.
    Raises: ValueError that lists all images that are damaged, opaque or fully transparent.
    """
    usable_paths = []
    unusable_images = []
    faulty_images = []
    for path in paths:
        try:
            read_cut_out(path, lambda image: None)
        except UnusableImageError as error:
            unusable_images.append(str(error))
        except ValueError as error:
            faulty_images.append(str(error))
        else:
            usable_paths.append(path)
    if faulty_images:
        count_text = f"{len(faulty_images)} images cannot be used: " if len(faulty_images) > 1 else ""
        raise ValueError(count_text + joined_errors(faulty_images))
    return usable_paths, unusable_images


# Resizing as in OpenCV: each target pixel is a weighted sum of a few source pixels along each axis, first
# along rows, then along columns, rounded as OpenCV's arithmetic rounds.


# Each target pixel is a sum over a fixed number of taps. Each entry of the list is one tap: the source pixels
# [m] that the m target pixels read, and their weights [m].
Taps = list[tuple[np.ndarray, np.ndarray]]


def opencv(pixels: np.ndarray, target_size: tuple[int, int], interpolation: str) -> np.ndarray:
    """Resize an image as OpenCV does. Values differ from OpenCV's by at most 1 of 255.

    Args:
        pixels: bytes [h, w, ...].
        target_size: rows and columns of the result.
        interpolation: "area", "cubic" or "nearest". The kernel of "cubic" is not widened when an image
            shrinks, so the result has aliasing.
    """
    height, width = pixels.shape[:2]
    target_rows, target_columns = target_size
    # OpenCV copies an image whose size does not change. The formulas below would round.
    if (height, width) == target_size:
        return pixels.copy()
    if interpolation == "nearest":
        return pixels[_nearest_pixels(height, target_rows)[:, None], _nearest_pixels(width, target_columns)]
    if interpolation == "area" and (target_rows > height or target_columns > width):
        # If at least one side grows, OpenCV uses another formula for "area", along rows and columns.
        return _enlarge_by_area(
            pixels, _area_enlarging(height, target_rows), _area_enlarging(width, target_columns)
        )
    make_taps = _area_shrinking if interpolation == "area" else _cubic
    row_taps = make_taps(height, target_rows)
    column_taps = make_taps(width, target_columns)
    target = np.empty((target_rows, target_columns, *pixels.shape[2:]), np.uint8)
    for rows, source_rows, block_taps in _blocks(row_taps, pixels):
        column_sums = _weighted_sum(pixels[source_rows].astype(np.float32), column_taps, 1)
        # As in OpenCV, values stay float32 until the end and are rounded once.
        target[rows] = np.rint(_weighted_sum(column_sums, block_taps, 0)).clip(0, 255)
    return target


def _blocks(row_taps: Taps, pixels: np.ndarray) -> Iterator[tuple[slice, slice, Taps]]:
    """Divide a resizing along the rows into blocks, so that large images need little memory for sums.

    Args:
        row_taps: taps along the rows' axis.
        pixels: source pixels [h, w, ...].

    Yields: rows of the target, rows of the source that they read, and the taps between these rows. The sums
        of a pixel are the same as without blocks.
    """
    values_per_row = max(1, pixels[0].size)
    rows_per_block = max(1, _BLOCK_VALUES // values_per_row)
    for start in range(0, len(row_taps[0][0]), rows_per_block):
        rows = slice(start, start + rows_per_block)
        first_row = min(int(pixel[rows].min()) for pixel, _ in row_taps)
        last_row = max(int(pixel[rows].max()) for pixel, _ in row_taps)
        yield (
            rows,
            slice(first_row, last_row + 1),
            [(pixel[rows] - first_row, weight[rows]) for pixel, weight in row_taps],
        )


def _weighted_sum(source_pixels: np.ndarray, taps: Taps, axis: int) -> np.ndarray:
    """Sum source pixels with their weights along one axis.

    Args:
        source_pixels: source pixels with n entries along `axis`.
        taps: source pixels and weights of the m target pixels.
        axis: axis to resize.

    Returns: target pixels, with m entries along `axis`.
    """
    # Shape in which the weights [m] broadcast along `axis`
    weight_shape = [-1 if i == axis else 1 for i in range(source_pixels.ndim)]
    weighted_sum = np.zeros((), source_pixels.dtype)
    for pixel, weight in taps:
        # The order of the sum is that of the original, so that the rounding is the same.
        weighted_sum = weighted_sum + source_pixels.take(pixel, axis) * weight.astype(
            source_pixels.dtype
        ).reshape(weight_shape)
    return weighted_sum


def _step(n: int, m: int) -> float:
    """Return the number of source pixels per target pixel, for n source pixels and m target pixels.

    Args:
        n: number of source pixels along an axis.
        m: number of target pixels along the axis.
    """
    return 1 / (m / n)  # OpenCV's order of operations: n / m selects other pixels in rare cases


def _nearest_pixels(n: int, m: int) -> np.ndarray:
    """Return the source pixel [m] of each target pixel for nearest-neighbour resizing from n to m pixels."""
    return np.floor(np.arange(m) * _step(n, m)).astype(int).clip(max=n - 1)


def _area_shrinking(n: int, m: int) -> Taps:
    """Return the source pixels and weights of the interpolation "area" for an axis that shrinks from n to m.

    A source pixel is weighted by the part of it that the target pixel covers. Parts below 1/1000 are ignored,
    as in OpenCV.
    """
    # A target pixel covers the interval [low, high) of the source axis.
    interval_start = np.arange(m) * _step(n, m)
    interval_end = np.minimum(interval_start + _step(n, m), n)
    taps = []
    # A target pixel overlaps at most this many source pixels.
    for k in range(int(_step(n, m)) + 2):
        pixel = np.floor(interval_start).astype(int) + k
        overlap = np.minimum(interval_end, pixel + 1) - np.maximum(interval_start, pixel)
        # Beyond the border the overlap is 0, so any valid pixel can be read there.
        taps.append(
            (pixel.clip(max=n - 1), np.where(overlap > 1e-3, overlap, 0) / (interval_end - interval_start))
        )
    return taps


def _cubic(n: int, m: int) -> Taps:
    """Return the source pixels and weights of the interpolation "cubic" for an axis from n to m pixels.

    Each target pixel is a sum of four source pixels, weighted by the kernel of Keys 1981, "Cubic convolution
    interpolation", with a = -0.75. Positions beyond the border read the pixel at the border.
    """
    # Centres of the target pixels in source coordinates
    position = (np.arange(m) + 0.5) * _step(n, m) - 0.5
    left_pixel = np.floor(position).astype(int)
    a = -0.75

    def weight(x: np.ndarray) -> np.ndarray:
        # Keys 1981: one cubic polynomial for distances up to 1, another one for distances from 1 to 2.
        inner_polynomial = ((a + 2) * x - (a + 3)) * x * x + 1
        outer_polynomial = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
        return np.where(x <= 1, inner_polynomial, outer_polynomial)

    # Two pixels on each side of the position; their weights sum to 1.
    return [
        ((left_pixel + k).clip(0, n - 1), weight(np.abs(position - left_pixel - k))) for k in (-1, 0, 1, 2)
    ]


def _area_enlarging(n: int, m: int) -> Taps:
    """Return the source pixels and weights of the interpolation "area", if at least one axis grows.

    The axis is resized from n to m pixels.

    As in OpenCV, this is a linear interpolation in which positions are measured from the edge of a pixel and
    not from its centre. The weights are integers in units of 1/2048, for fixed-point arithmetic.
    """
    target_pixel = np.arange(m)
    left_pixel = np.floor(target_pixel * _step(n, m)).astype(int)
    right_share = (target_pixel + 1) - (left_pixel + 1) * (m / n)
    # At the last pixel there is no right neighbour, so its share is 0.
    right_share = np.where(
        (right_share <= 0) | (left_pixel >= n - 1), 0.0, right_share - np.floor(right_share)
    ).astype(np.float32)
    taps = (
        (left_pixel.clip(max=n - 1), 1 - right_share),
        ((left_pixel + 1).clip(max=n - 1), right_share),
    )
    return [(pixel, np.rint(weight * np.float32(2048)).astype(np.int64)) for pixel, weight in taps]


def _enlarge_by_area(pixels: np.ndarray, row_taps: Taps, column_taps: Taps) -> np.ndarray:
    """Enlarge an image of bytes in integer arithmetic, with the intermediate roundings of OpenCV.

    Args:
        pixels: bytes [h, w, ...].
        row_taps: taps along the rows' axis, see `_area_enlarging`.
        column_taps: taps along the columns' axis.
    """
    target = np.empty((len(row_taps[0][0]), len(column_taps[0][0]), *pixels.shape[2:]), np.uint8)
    weight_shape = (-1, *[1] * (pixels.ndim - 1))  # shape in which the weights broadcast along the rows' axis
    for rows, source_rows, block_taps in _blocks(row_taps, pixels):
        # Weights are in units of 1/2048 (11 bits). The shifts by 4, 16 and 2 remove the 22 bits of the two
        # axes.
        widened_rows = _weighted_sum(pixels[source_rows].astype(np.int64), column_taps, 1) >> 4
        (upper_row, upper_weight), (lower_row, lower_weight) = block_taps
        upper_part = widened_rows[upper_row] * upper_weight.reshape(weight_shape) >> 16
        lower_part = widened_rows[lower_row] * lower_weight.reshape(weight_shape) >> 16
        # Adding 2 before the shift by 2 rounds to the nearest integer.
        target[rows] = ((upper_part + lower_part + 2) >> 2).clip(0, 255)
    return target


def short_side(x: torch.Tensor, side_pixels: int) -> torch.Tensor:
    """Resize images so that their shorter side has `side_pixels` pixels, and crop the centre.

    The interpolation is bilinear, with antialiasing when the image shrinks.

    Args:
        x: images [N, C, h, w].
        side_pixels: pixels per side of the result.

    Returns: images [N, C, side_pixels, side_pixels].
    """
    height, width = x.shape[-2:]
    # The longer side is rounded down, as in torchvision.
    longer_side = side_pixels * max(height, width) // min(height, width)
    target_size = (longer_side, side_pixels) if height > width else (side_pixels, longer_side)
    x = (
        F.interpolate(x, size=target_size, mode="bilinear", antialias=True)
        if (height, width) != target_size
        else x
    )
    top, left = (round((length - side_pixels) / 2) for length in target_size)
    return x[..., top : top + side_pixels, left : left + side_pixels]


# Hunyuan3D-2.1


def on_white(image: Image.Image, side_pixels: int, border: float) -> tuple[np.ndarray, np.ndarray]:
    """Place the object in the centre of a white square, as Hunyuan3D-2.1's ImageProcessorV2 does.

    The object is the bounding box of all pixels that are not fully transparent.

    Args:
        image: RGBA image.
        side_pixels: pixels per side of the result.
        border: share of the square's side that stays free around the object, 0..1.

    Returns: the image, bytes [side_pixels, side_pixels, 3], and the mask of the object, bytes [side_pixels,
        side_pixels].
    Raises: ValueError if the object is empty, or too thin to be resized.
    """
    square = place_in_square(np.asarray(image), border)
    # The mask is the alpha channel, resized without interpolation.
    return opencv(over_white(square), (side_pixels, side_pixels), "cubic"), opencv(
        square[..., 3], (side_pixels, side_pixels), "nearest"
    )


def place_in_square(pixels: np.ndarray, border: float) -> np.ndarray:
    """Place the object of an image in the centre of a transparent square.

    The longer side of the object fills the share 1 - border of the square. As in the original, the last row
    and the last column of the object are lost.

    Args:
        pixels: RGBA bytes [h, w, 4].
        border: share of the square's side that stays free around the object, 0..1.

    Returns: RGBA bytes [s, s, 4], where s is the longer side of the image.
    Raises: ValueError if the object is empty, or too thin to be resized.
    """
    object_rows, object_columns = (np.flatnonzero(pixels[..., 3].any(axis)) for axis in (1, 0))
    # Last index minus first index, without + 1: this loses a row and a column, as in the original.
    height, width = (
        int(indices[-1] - indices[0]) if len(indices) else 0 for indices in (object_rows, object_columns)
    )
    # The square is as large as the longer side of the image, not of the object.
    square_side = max(pixels.shape[:2])
    magnification = int(square_side * (1 - border)) / max(height, width, 1)  # magnification of the object
    object_size = int(height * magnification), int(width * magnification)
    if min(object_size) < 1:
        raise ValueError(
            "the object is empty or too thin: its pixels that are not fully transparent lie in"
            f" {len(object_rows)} rows and {len(object_columns)} columns. Choose another image."
        )
    # All four channels are resized alike, as in the original. Colours of transparent pixels therefore
    # influence the pixels at the edge of the object.
    object_pixels = opencv(
        pixels[object_rows[0] : object_rows[0] + height, object_columns[0] : object_columns[0] + width],
        object_size,
        "area",
    )
    square = np.zeros((square_side, square_side, 4), np.uint8)
    top, left = ((square_side - length) // 2 for length in object_size)
    square[top : top + object_size[0], left : left + object_size[1]] = object_pixels
    return square


def over_white(pixels: np.ndarray) -> np.ndarray:
    """Blend RGBA bytes [h, w, 4] over a white background, and return bytes [h, w, 3], rounded down."""
    blended = np.empty((*pixels.shape[:2], 3), np.uint8)
    # Row by row in blocks, because the values in float32 need four times the memory.
    rows_per_block = max(1, _BLOCK_VALUES // max(1, pixels[0].size))
    for start in range(0, len(pixels), rows_per_block):
        block = pixels[start : start + rows_per_block]
        alpha = block[..., 3:].astype(np.float32) / 255
        # The order of operations and float32 are those of the original; others change some values by 1 of
        # 255.
        blended[start : start + rows_per_block] = (block[..., :3] * alpha + 255 * (1 - alpha)).clip(0, 255)
    return blended


# TRELLIS and TRELLIS.2


def on_black(image: Image.Image, side_pixels: int, margin: float = 1.2) -> torch.Tensor:
    """Place the object in the centre of a black square, as the pipeline of TRELLIS does.

    `squared` crops the square, which is then resized by Lanczos. At the end, colours are multiplied by
    opacity and rounded down to 8 bits.

    Args:
        image: RGBA image.
        side_pixels: pixels per side of the result.
        margin: side of the square, as a multiple of the longer side of the object.

    Returns: an image [3, side_pixels, side_pixels] of values 0..1, in steps of 1/255.
    Raises: ValueError if no pixel has an opacity above 0.8, or if the longer side of the object has at most
        two pixels.
    """
    square = squared(image, margin).resize((side_pixels, side_pixels), Image.Resampling.LANCZOS)
    return _to_tensor(over_black(square))


def on_black_first(
    image: Image.Image, side_lengths: tuple[int, ...], max_side: int = 1024
) -> list[torch.Tensor]:
    """Place the object in the centre of a black square, as the pipeline of TRELLIS.2 does, in several sizes.

    In contrast to `on_black` there is no margin, the image is blended over black before it is resized, and
    its longer side is first reduced to `max_side` pixels if it is longer.

    Args:
        image: RGBA image.
        side_lengths: pixels per side of each result.
        max_side: largest number of pixels of the longer side of the image.

    Returns: one image [3, s, s] of values 0..1 for each s of `side_lengths`.
    Raises: ValueError as `on_black`.
    """
    # The order matters: blending after resizing would change edges by up to 20 of 255.
    square = Image.fromarray(over_black(squared(at_most(image, max_side), 1.0)))
    return [
        _to_tensor(np.asarray(square.resize((side_pixels, side_pixels), Image.Resampling.LANCZOS)))
        for side_pixels in side_lengths
    ]


def at_most(image: Image.Image, max_side: int) -> Image.Image:
    """Shrink an image by Lanczos so that its longer side has at most `max_side` pixels.

    An image that is small enough is returned unchanged.
    """
    scale_factor = min(1, max_side / max(image.size))
    shrunk_size = int(image.width * scale_factor), int(image.height * scale_factor)
    return image if scale_factor == 1 else image.resize(shrunk_size, Image.Resampling.LANCZOS)


def squared(image: Image.Image, margin: float) -> Image.Image:
    """Crop the square around the object from an RGBA image.

    The object is the box of all pixels with an opacity above 0.8. (l, t) is its first and (r, b) its last
    pixel. The square has the same centre and sides of 2 int(k / 2) pixels, where
    k = int(margin max(r - l, b - t)). Its corners are rounded to whole pixels; a coordinate halfway between
    two pixels is rounded to the even one.

    Args:
        image: RGBA image.
        margin: side of the square, as a multiple of the longer side of the object.

    Raises: ValueError if no pixel has an opacity above 0.8, or if the longer side of the object has at most
        two pixels.
    """
    object_box = image.getchannel("A").point(lambda alpha: 255 if alpha > OPAQUE else 0).getbbox()
    if object_box is None:
        raise ValueError("the image has no pixel with an opacity above 0.8. Choose another image.")
    left = object_box[0]
    top = object_box[1]
    # Pillow's box ends one pixel after the last pixel.
    right = object_box[2] - 1
    bottom = object_box[3] - 1
    half_side = int(max(right - left, bottom - top) * margin) // 2
    if half_side < 1:
        raise ValueError(
            f"the longer side of the object must have more than two pixels, but the object has"
            f" {bottom - top + 1} rows and {right - left + 1} columns. Choose another image."
        )
    x = (left + right) / 2  # centre of the object, which may lie between two pixels
    y = (top + bottom) / 2
    # Pillow fills parts of the square outside the image with transparent black.
    return image.crop(
        (round(x - half_side), round(y - half_side), round(x + half_side), round(y + half_side))
    )


def over_black(image: Image.Image) -> np.ndarray:
    """Blend an RGBA image over a black background, and return bytes [h, w, 3], rounded down."""
    pixels = np.asarray(image).astype(np.float32) / 255
    return (pixels[..., :3] * pixels[..., 3:] * 255).astype(np.uint8)


def _to_tensor(pixels: np.ndarray) -> torch.Tensor:
    """Convert bytes [h, w, 3] to a tensor [3, h, w] of values 0..1."""
    return torch.from_numpy(pixels.astype(np.float32) / 255).permute(2, 0, 1).contiguous()


# SAM 3D Objects


@dataclass(frozen=True, kw_only=True)
class ObjectCut:
    """Settings of a preprocessor of SAM 3D Objects, from its YAML file.

    The defaults are the published values.
    """

    size: int = 518  # pixels per side of the results
    box_size_factor: float = 1.2  # side of the crop, as a multiple of the longer side of the mask's box
    padding_factor: float = 0.0  # padding on every side, as a multiple of the side of the crop
    rembg: bool = False  # True: the background, all pixels outside the mask, is removed
    # Method that normalises the point map: ObjectCentricSSI, SSIPointmapNormalizer or ObjectApparentSizeSSI
    normaliser: str = "ObjectCentricSSI"
    moments_alone: bool = False  # True: points are not normalised, but their scale and shift are returned
    scene_scale: bool = True  # True: the scale is computed from all points, False: from points on the object


def object_inputs(pixels: np.ndarray, points: torch.Tensor | None, cut: ObjectCut) -> dict[str, torch.Tensor]:
    """Compute the inputs of SAM 3D's image encoders for one object.

    Args:
        pixels: bytes [h, w, 4]. Alpha is the mask of the object; the colours still contain the background.
        points: point map [h', w', 3] of the same image, with x to the left, y up and z forward. It is NaN
            where there is no point. None returns no point maps.
        cut: settings of the preprocessor.

    Returns: tensors [C, s, s] by name. `image`, `mask` and `pointmap` are cropped around the mask.
        `rgb_image`, `rgb_image_mask` and `rgb_pointmap` show the complete image, padded to a square. If there
        is a point map, pointmap_scale and pointmap_shift, [3] each, are returned, too: a point p has become
        (p - shift) / scale.
    Raises: ValueError if the mask has less than three rows or columns.
    """
    rgba_pixels = torch.from_numpy(pixels.astype(np.float32) / 255).permute(2, 0, 1)  # [4, h, w]
    colours = rgba_pixels[:3]
    mask = rgba_pixels[3:]  # [1, h, w], alpha with all its values 0..1
    normalised_points = None
    inputs_by_name = {}
    if points is not None:
        # The point map is resized to the size of the image and normalised before it is cropped. [3, h, w]
        resized_points = F.interpolate(points.float().permute(2, 0, 1)[None], mask.shape[1:], mode="nearest")[
            0
        ]
        scale, shift = moments(resized_points, mask[0] > 0.5, cut)
        inverse_scale = 1 / scale[:, None, None]
        # With this order of operations the result is bitwise that of the original.
        normalised_points = (
            resized_points
            if cut.moments_alone
            else resized_points * inverse_scale - shift[:, None, None] * inverse_scale
        )
        inputs_by_name = {"pointmap_scale": scale, "pointmap_shift": shift}
    crop_box = box_about(mask[0], cut.box_size_factor)  # top, bottom, left, right
    cropped_colours = _padded(_boxed(colours, crop_box), cut, 0.0)
    cropped_mask = _padded(_boxed(mask, crop_box), cut, 0.0)
    cropped_image = cropped_colours * cropped_mask if cut.rembg else cropped_colours
    inputs_by_name |= {
        "image": _resize_bilinear(cropped_image, cut.size),
        "mask": _resize_nearest(cropped_mask, cut.size),
        "rgb_image": _resize_bilinear(in_square(colours), cut.size),
        "rgb_image_mask": _resize_nearest(in_square(mask), cut.size),
    }
    if normalised_points is not None:
        # As in the original, the cropped map is padded by NaN (no
        # point), and the complete map by 0 (a point).
        cropped_points = _padded(_boxed(normalised_points, crop_box), cut, float("nan"))
        if cut.rembg:
            cropped_points = cropped_points.where(cropped_mask > 0, float("nan"))
        inputs_by_name |= {
            "pointmap": _resize_nearest(cropped_points, cut.size),
            "rgb_pointmap": _resize_nearest(in_square(normalised_points), cut.size),
        }
    return inputs_by_name


def moments(
    points: torch.Tensor, object_mask: torch.Tensor, cut: ObjectCut
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the scale and the shift by which a point map is normalised.

    Medians ignore NaN and take the lower of two middle values.

    Args:
        points: point map [3, h, w].
        object_mask: mask [h, w] bool, True for pixels of the object.
        cut: settings; `normaliser` and `scene_scale` choose the formula.

    Returns: the scale [3] and the shift [3]. They are 1 and 0 if the object has no point.
    """
    object_points = points[:, object_mask]  # [3, points on the object]
    shift = torch.zeros(3)
    scale = torch.ones(())
    if not object_points.isfinite().all(0).any():
        return scale.expand(3), shift
    if cut.normaliser == "ObjectCentricSSI":
        shift = object_points.nanmedian(1).values
        scaled_points = points.flatten(1) if cut.scene_scale else object_points
        scale = (scaled_points - shift[:, None]).abs().amax(0).nanmedian()
    elif cut.normaliser == "ObjectApparentSizeSSI":
        # Index 2 is the depth z.
        scale = (points[2] if cut.scene_scale else object_points[2]).nanmedian()
    else:
        # SSIPointmapNormalizer shifts only the depth. Its scale is a mean and not a median.
        shift = torch.stack([scale * 0, scale * 0, points[2].nanmedian()])
        scale = (points - shift[:, None, None]).abs().nanmean()
    return scale.expand(3), shift


def box_about(mask: torch.Tensor, factor: float) -> tuple[int, int, int, int]:
    """Compute the square around the object that a mask marks.

    Corners are rounded towards 0, as in the original, so one side may be a pixel shorter than the other.

    Args:
        mask: mask [h, w], positive on the object.
        factor: side of the square, as a multiple of the longer side of the object's box.

    Returns: the indices top, bottom, left and right of the square, which may lie outside the image.
    Raises: ValueError if the object has less than three rows or columns.
    """
    index_ranges = []  # first and last row, first and last column of the object
    for axis in (1, 0):
        object_indices = (mask > 0).any(axis).nonzero()
        first_index, last_index = (
            (int(object_indices[0]), int(object_indices[-1])) if len(object_indices) else (0, 0)
        )
        index_ranges.append((first_index, last_index))
    lengths = [last_index - first_index for first_index, last_index in index_ranges]
    if min(lengths) < 2:
        raise ValueError("the mask must have at least three rows and three columns. Choose another image.")
    # Last index minus first index, without + 1, as in the original.
    half_side = int(factor * max(lengths)) // 2
    (top, bottom), (left, right) = (
        (int((start_index + end_index) / 2 - half_side), int((start_index + end_index) / 2 + half_side))
        for start_index, end_index in index_ranges
    )
    return top, bottom, left, right


def _boxed(x: torch.Tensor, crop_box: tuple[int, int, int, int]) -> torch.Tensor:
    """Crop an image or point map [C, h, w] to a box (top, bottom, left, right).

    Pixels outside the image are 0. In a point map this is a valid point, as in the original.

    Args:
        x: image or point map.
        crop_box: rows and columns of the box; they may lie outside the image.
    """
    top, bottom, left, right = crop_box
    height, width = x.shape[1:]
    # F.pad takes left, right, top, bottom. Padding on the left and at the top shifts the indices of the box.
    padding = (max(0, -left), max(0, right - width), max(0, -top), max(0, bottom - height))
    return F.pad(x, padding)[
        :, top + padding[2] : bottom + padding[2], left + padding[0] : right + padding[0]
    ]


def in_square(x: torch.Tensor, padding_value: float = 0.0) -> torch.Tensor:
    """Pad an image or point map [C, h, w] to a square [C, s, s] with s = max(h, w), around its centre.

    Args:
        x: image or point map.
        padding_value: value of the padding.
    """
    height, width = x.shape[1:]
    square_side = max(height, width)
    # If the padding is an odd number of pixels, the larger half is below or on the right.
    top = (square_side - height) // 2
    left = (square_side - width) // 2
    return F.pad(x, (left, square_side - width - left, top, square_side - height - top), value=padding_value)


def _padded(x: torch.Tensor, cut: ObjectCut, padding_value: float) -> torch.Tensor:
    """Pad a crop [C, h, w] to a square, and then by `cut.padding_factor` of its side on every side.

    Args:
        x: crop of an image or point map.
        cut: settings of the preprocessor.
        padding_value: value of the padding.
    """
    x = in_square(x, padding_value)
    return F.pad(x, (int(cut.padding_factor * x.shape[1]),) * 4, value=padding_value)


def _resize_bilinear(x: torch.Tensor, side_pixels: int) -> torch.Tensor:
    """Resize an image [C, h, w] to side_pixels x side_pixels pixels, bilinearly with antialiasing."""
    return F.interpolate(x[None], (side_pixels, side_pixels), mode="bilinear", antialias=True)[0]


def _resize_nearest(x: torch.Tensor, side_pixels: int) -> torch.Tensor:
    """Resize an image or point map [C, h, w] to side_pixels x side_pixels pixels by nearest neighbour.

    An interpolation would mix NaN, which marks missing points, into neighbouring points.
    """
    return F.interpolate(x[None], (side_pixels, side_pixels), mode="nearest")[0]
