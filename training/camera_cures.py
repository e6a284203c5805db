"""Cures of camera labels: corrections of the usual mistakes of convention and unit.

A camera label has 16 numbers of the pose cam2world and 9 of the intrinsics K, both row-major. The pose has
OpenCV's camera axes (x right, y down, z forward) in a world whose y axis points up, and K is divided by the
image size: x by the width, y by the height.

Shapes: n is the number of labels.
"""

from collections.abc import Sequence

import numpy as np

from training.convert_settings import CURES as CURES
from training.rendering.cameras import POSE_NUMBERS

# Largest allowed entry of |R^T R - I| for the rotation R of a pose. Single-precision poses of fitting
# programs reach 1e-4.
ROTATION_TOLERANCE = 1e-2
INTRINSICS_TOLERANCE = 1e-3  # largest deviation of the constant entries of K
# Largest focal length in image sizes. The field of view is then 2.9 degrees; FFHQ has 4.26, ShapeNet 1.7.
MAX_FOCAL = 20.0


def numbers_text(values: np.ndarray) -> str:
    """Return numbers with 4 digits, separated by spaces."""
    return " ".join(f"{value:.4g}" for value in values)


def point_text(coordinates: Sequence[float] | np.ndarray) -> str:
    """Return coordinates as a text such as (0, 0.2, 1)."""
    # The addition turns -0 into 0.
    return "(" + ", ".join(f"{round(float(value), 2) + 0:g}" for value in coordinates) + ")"


# Cures. Each takes float64 labels [n, 25] and returns new labels.


def is_divided(labels: np.ndarray) -> np.ndarray:
    """Return a mask [n] of the labels [n, 25] whose intrinsics are divided by the image size already."""
    intrinsics = labels[:, POSE_NUMBERS:].reshape(-1, 3, 3)
    has_centre = (np.abs(intrinsics[:, (0, 1), (2, 2)] - 0.5) < 0.2).all(axis=1)
    return np.asarray(has_centre & np.all(intrinsics[:, (0, 1), (0, 1)] <= MAX_FOCAL, axis=1))


def size_is_inferred(labels: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return a mask [n] of the labels whose intrinsics do not belong to the size of their image.

    Args: labels: before the cure `pixels` [n, 25]; sizes: (width, height) of each image in pixels [n, 2].
    """
    intrinsics = labels[:, POSE_NUMBERS:].reshape(-1, 3, 3)
    # The principal point is in the middle half of the image to which the intrinsics belong.
    is_elsewhere = (np.abs(intrinsics[:, (0, 1), (2, 2)] / sizes - 0.5) > 0.25).any(axis=1)
    return is_elsewhere & ~is_divided(labels)


def _divide_by_size(labels: np.ndarray, sizes: np.ndarray | None) -> np.ndarray:
    """Divide the intrinsics by the image sizes to which they belong.

    This is the size of the image if the principal point is then in the middle half of the image. Otherwise
    the intrinsics belong to another size, such as that of the image before it was resized. That size is
    twice the principal point.

    Args: labels: [n, 25]; sizes: (width, height) of each image in pixels [n, 2], None: unknown.
    """
    labels = labels.copy()
    intrinsics = labels[:, POSE_NUMBERS:].reshape(-1, 3, 3)  # a view
    centre = intrinsics[:, (0, 1), (2, 2)]  # [n, 2]
    divisors = 2 * centre
    if sizes is not None:
        divisors = np.where(size_is_inferred(labels, sizes)[:, None], divisors, sizes)
    if (divisors <= 0).any():
        raise ValueError(
            "--fix-cameras=pixels: the principal point of the intrinsics must be above 0, because it shows to"
            f" which image size they belong, got {numbers_text(centre[(divisors <= 0).any(axis=1)][0])}."
            " Correct the intrinsics in the file."
        )
    # In a set that mixes both kinds, labels that are right stay as they are.
    divisors = np.where(is_divided(labels)[:, None], 1.0, divisors)
    intrinsics[:, :2] /= divisors[:, :, None]
    return labels


def _transpose(labels: np.ndarray) -> np.ndarray:
    """Transpose the matrices that are evidently column-major. If none is, transpose the rotation alone."""
    labels = labels.copy()
    poses = labels[:, :POSE_NUMBERS].reshape(-1, 4, 4)  # a view, like the next one
    intrinsics = labels[:, POSE_NUMBERS:].reshape(-1, 3, 3)
    # In column-major order, the last row of a pose is the position, and that of K the principal point.
    is_pose = np.abs(poses[:, 3, :3]).max(axis=1) > ROTATION_TOLERANCE
    is_intrinsics = np.abs(intrinsics[:, 2, :2]).max(axis=1) > INTRINSICS_TOLERANCE
    poses[is_pose] = poses[is_pose].transpose(0, 2, 1)
    intrinsics[is_intrinsics] = intrinsics[is_intrinsics].transpose(0, 2, 1)
    is_rotation = ~(is_pose | is_intrinsics)
    poses[is_rotation, :3, :3] = poses[is_rotation, :3, :3].transpose(0, 2, 1)
    return labels


def _invert(labels: np.ndarray) -> np.ndarray:
    """Replace the poses by their inverses."""
    labels = labels.copy()
    poses = labels[:, :POSE_NUMBERS].reshape(-1, 4, 4)  # a view
    rotations = poses[:, :3, :3].transpose(0, 2, 1).copy()
    positions = -rotations @ poses[:, :3, 3:]
    poses[:, :3, :3] = rotations
    poses[:, :3, 3:] = positions
    return labels


def _flip_axes(labels: np.ndarray) -> np.ndarray:
    """Negate the y and z axes of the cameras, which converts OpenGL's axes to OpenCV's."""
    labels = labels.copy()
    labels[:, :POSE_NUMBERS].reshape(-1, 4, 4)[:, :3, 1:3] *= -1
    return labels


def _rotate_world(labels: np.ndarray) -> np.ndarray:
    """Rotate the world by 90 degrees about x, so that its z axis becomes y, and its y axis -z."""
    labels = labels.copy()
    poses = labels[:, :POSE_NUMBERS].reshape(-1, 4, 4)  # a view
    poses[:, 1:3] = np.stack([poses[:, 2], -poses[:, 1]], axis=1)
    return labels


def apply_cures(
    labels: np.ndarray, cures: Sequence[str], scale: float = 1.0, sizes: np.ndarray | None = None
) -> np.ndarray:
    """Apply cures to camera labels, in the order of CURES.

    Args:
        labels: labels [n, 25].
        cures: names in CURES.
        scale: factor on the translations of the poses.
        sizes: (width, height) of each image in pixels [n, 2]; None: `pixels` uses twice the principal point.
    Returns: labels float64 [n, 25].
    Raises: ValueError if the intrinsics have no principal point, which `pixels` needs.
    """
    labels = labels.astype(np.float64)
    # It stands apart from the others, because it needs the image sizes.
    if "pixels" in cures:
        labels = _divide_by_size(labels, sizes)
    for name, cure in zip(list(CURES)[1:], (_transpose, _invert, _flip_axes, _rotate_world), strict=True):
        if name in cures:
            labels = cure(labels)
    if scale != 1:
        labels = labels.copy()
        labels[:, 3:12:4] *= scale  # the position, entries (0, 3), (1, 3) and (2, 3) of the pose
    return labels
