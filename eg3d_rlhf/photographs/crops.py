"""Cutting a crop out of a photograph: rotated, resampled, and reflected where the photograph ends.

A crop with fewer pixels than its square in the photograph is averaged over the pixels that it replaces
(Lanczos filter), and is then sampled bicubically.
"""

import numpy as np
import PIL.Image

from eg3d_rlhf.photographs.face_geometry import CROP_SIZE, CropFrame

_MARGIN = 4  # pixels around the crop that the filters read


def _corners(frame: CropFrame) -> np.ndarray:
    """Return the corners [4, 2] of a crop in the photograph, in their order around it."""
    return frame.to_photograph(np.array([[0, 0], [1, 0], [1, 1], [0, 1]]), 1)


def outside_share(frame: CropFrame, photograph_size: tuple[int, int]) -> float:
    """Return the share of a crop, in 0..1, that lies outside of a photograph of (width, height) pixels."""
    polygon = list(_corners(frame))
    # The polygon is cut at each of the four edges (algorithm of Sutherland and Hodgman).
    for axis in (0, 1):
        for edge, sign in ((0.0, 1.0), (float(photograph_size[axis]), -1.0)):
            cut_polygon = []
            for start, end in zip(polygon, polygon[1:] + polygon[:1], strict=True):
                start_depth = sign * (start[axis] - edge)  # > 0 inside
                end_depth = sign * (end[axis] - edge)
                if start_depth >= 0:
                    cut_polygon.append(start)
                # This side crosses the edge, so the intersection becomes a corner.
                if (start_depth >= 0) != (end_depth >= 0):
                    cut_polygon.append(start + (end - start) * start_depth / (start_depth - end_depth))
            polygon = cut_polygon
    # No corner is left: no part of the crop lies in the photograph.
    if not polygon:
        return 1.0
    x, y = np.array(polygon).T
    inside_area = abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2  # shoelace formula
    # Rounding errors may give a share slightly below 0.
    return float(np.clip(1 - inside_area / frame.width**2, 0, 1))


def cut_crop(photograph: PIL.Image.Image, frame: CropFrame, size: int = CROP_SIZE) -> np.ndarray:
    """Cut a crop out of a photograph. Outside of the photograph its reflection is shown.

    Only the part of the photograph that the crop shows is resampled, so that the memory does not depend on
    the size of the crop's square.

    Args:
        photograph: photograph in the mode L or RGB.
        frame: square of the photograph, of which a part lies inside.
        size: pixels per edge of the crop.
    Returns: uint8 [size, size] for the mode L, else [size, size, 3].
    Raises: ValueError if no part of the square lies in the photograph.
    """
    corners = _corners(frame)
    low = np.floor(corners.min(axis=0)).astype(int) - _MARGIN
    high = np.ceil(corners.max(axis=0)).astype(int) + _MARGIN
    # The part of the box that exists in the photograph.
    inner_low = np.clip(low, 0, photograph.size)
    inner_high = np.clip(high, 0, photograph.size)
    if (inner_low >= inner_high).any():
        raise ValueError(
            f"the crop at {tuple(round(x) for x in frame.centre)} lies outside of the photograph of"
            f" {photograph.width} x {photograph.height} pixels. Choose another crop."
        )
    part = photograph.crop((*inner_low.tolist(), *inner_high.tolist()))
    # A photograph with more pixels than the crop is reduced first. Sampling it directly would alias.
    factor = min(1.0, size / frame.width)
    reduced_size = np.maximum(np.ceil(factor * (inner_high - inner_low)).astype(int), 1)
    if factor < 1:
        # With reducing_gap, Pillow first averages whole blocks of pixels, which is faster for large
        # photographs.
        part = part.resize(tuple(reduced_size.tolist()), PIL.Image.Resampling.LANCZOS, reducing_gap=3.0)
    factors = part.size / (inner_high - inner_low)  # [2]; not quite `factor`, because sizes are whole numbers
    # The reflection is added after the reduction, when it is small.
    before = np.ceil((inner_low - low) * factors).astype(int)
    after = np.ceil((high - inner_high) * factors).astype(int)
    if before.any() or after.any():
        widths = [(before[1], after[1]), (before[0], after[0]), (0, 0)]  # rows, columns, channels
        pixels = np.array(part)
        # "symmetric" repeats the pixels at the edge, which are covered half by the edge itself.
        part = PIL.Image.fromarray(np.pad(pixels, widths[: pixels.ndim], mode="symmetric"))
    # Pillow takes the affine map from pixels of the crop to pixels of the source, both with middles at .5.
    corners_in_part = (corners - inner_low) * factors + before
    along_x = (corners_in_part[1] - corners_in_part[0]) / size  # step for one pixel to the right
    along_y = (corners_in_part[3] - corners_in_part[0]) / size  # step for one pixel downwards
    coefficients = np.stack([along_x, along_y, corners_in_part[0]], axis=1).ravel()
    channels = []
    for channel in part.split():
        # Pillow's bicubic filter of bytes rounds down, which would darken a crop by half a grey level.
        values = channel.convert("F").transform(
            (size, size), PIL.Image.Transform.AFFINE, tuple(coefficients), PIL.Image.Resampling.BICUBIC
        )
        # The bicubic filter overshoots at contrasts, and values outside of 0..255 would wrap around.
        channels.append(np.clip(np.round(np.array(values)), 0, 255).astype(np.uint8))
    return channels[0] if len(channels) == 1 else np.stack(channels, axis=-1)
