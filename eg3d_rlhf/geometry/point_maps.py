"""Point maps from depth maps, for generators that read the points which an image shows, such as SAM 3D.

The camera is a pinhole camera at the origin that looks along +z, with x to the left and y up. The pixel in
row v and column u, whose centre is at (u + 1/2, v + 1/2), shows the point at depth z

    x = -(u + 1/2 - c_x) z / f
    y = -(v + 1/2 - c_y) z / f

with the focal length f and the principal point (c_x, c_y) in pixels (Hartley and Zisserman 2004, equation
6.2). The signs follow from the directions of the axes: columns count to the right, and rows count downwards.

Shapes: h rows and w columns of the depth map.
"""

import math

import numpy as np


def depth_to_points(depth: np.ndarray, focal: float, centre: tuple[float, float] | None = None) -> np.ndarray:
    """Compute the point that each pixel of a depth map shows.

    Args:
        depth: depth map [h, w], the z coordinate of the point along the optical axis and not its distance.
            Values that are not finite or not above 0 mean that there is no point.
        focal: focal length in pixels of the depth map.
        centre: principal point (c_x, c_y) in pixels; None: the middle of the depth map.

    Returns: point map [h, w, 3] float32 in the unit of `depth`, with NaN where there is no point.
    Raises: ValueError for a depth map without points or of another shape, or for a focal length that is not
        above 0.

    >>> depth_to_points(np.full((1, 2), 3.0), focal=1.0)[0].tolist()
    [[1.5, 0.0, 3.0], [-1.5, 0.0, 3.0]]
    """
    if depth.ndim != 2:
        raise ValueError(
            f"depth: expected one number per pixel [h, w], got the shape {list(depth.shape)}. Save the depth"
            " along the optical axis."
        )
    if not 0 < focal < math.inf:
        raise ValueError(f"focal: the focal length must be above 0 pixels, got {focal:g}.")
    z = depth.astype(np.float64)
    z = np.where(np.isfinite(z) & (z > 0), z, np.nan)  # [h, w]
    if np.isnan(z).all():
        raise ValueError(
            "depth: no value is finite and above 0, so there is no point. Depths must be positive in front of"
            " the camera; an inverse depth (disparity) has to be converted first."
        )
    rows, columns = depth.shape
    c_x, c_y = centre or (columns / 2, rows / 2)
    u = np.arange(columns) + 0.5  # [w]
    v = np.arange(rows)[:, None] + 0.5  # [h, 1]
    return np.stack([-(u - c_x) * z / focal, -(v - c_y) * z / focal, z], 2).astype(np.float32)


def focal_of(fov: float, columns: int) -> float:
    """Return the focal length in pixels of an image with a horizontal field of view.

    Args:
        fov: horizontal field of view in degrees, between 0 and 180.
        columns: width of the image in pixels.
    """
    return columns / (2 * math.tan(math.radians(fov) / 2))


def rising_axes(points: np.ndarray) -> tuple[bool, bool]:
    """Find the axes of a point map that point in the wrong direction.

    By the formula of this module, x / z falls with the column and y / z falls with the row in every
    perspective view. Points behind the camera are ignored.

    Args:
        points: point map [h, w, 3], NaN where there is no point.
    Returns: True if x rises with the column, and True if y rises with the row.

    >>> rising_axes(depth_to_points(np.ones((2, 2)), focal=1.0) * [-1, 1, 1])
    (True, False)
    """
    valid = np.isfinite(points).all(2) & (points[..., 2] > 0)  # [h, w]
    if not valid.any():
        return False, False
    directions = points[valid, :2].astype(np.float64) / points[valid, 2:]  # [n, 2]
    rows, columns = np.nonzero(valid)
    positions = np.stack([columns, rows], 1).astype(np.float64)  # [n, 2]
    # covariances [2] of x / z with the column and of y / z with the row
    covariances = ((directions - directions.mean(0)) * (positions - positions.mean(0))).mean(0)
    # A map with equal directions, such as a constant one, has covariances of rounding errors.
    return bool(covariances[0] > 1e-9), bool(covariances[1] > 1e-9)
