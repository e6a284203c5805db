"""Crop and camera of a face, from its landmarks in a photograph and the same landmarks of a canonical face.

EG3D's crop of FFHQ shows a head at a fixed size and place, and its camera is a rotation at a distance of 2.7
from the head. Both follow from 468 landmarks in four steps:

1. Five points (both eyes, the tip of the nose, the corners of the mouth) and the roll of the face.
2. The crop: an affine map, fitted by least squares, takes the five points of the canonical face to those of
   the photograph. It gives the centre of the crop and the pixels per centimetre.
3. The rotation: the mean of a perspective fit of all landmarks and of the Procrustes rotation between the
   canonical face and the landmarks with their depth.
4. The position of the camera, which follows from the rotation.

The constants of the crop and of the position were fitted to 20 photographs whose official labels are public
(docs/guides/photographs.md). No rotation is needed between the canonical face and EG3D's world, whose axes
are x right, y up and z towards the viewer.

Coordinates: photographs have x to the right and y down, in pixels, and the first pixel covers 0..1. L is the
number of landmarks, 468.
"""

import math
from dataclasses import dataclass

import numpy as np

from training.rendering.cameras import FFHQ_FOCAL, FFHQ_RADIUS, LABEL_NUMBERS

CROP_SIZE = 512  # pixels per edge of EG3D's images, in which the constants below were fitted
# Landmarks around each eye: both corners, and the middle of each lid. The first eye is at the left in the
# photograph of an upright face, which is the person's right eye.
_LEFT_EYE = (33, 133, 159, 145)
_RIGHT_EYE = (362, 263, 386, 374)
_NOSE = 4
_MOUTH_CORNERS = (61, 291)  # left and right in the photograph
_CROP_CENTRE = np.array([0.0, -0.3235, 2.4214])  # point of the canonical face at the centre of the crop, cm
_CROP_CM = CROP_SIZE / 21.135  # width of the crop in the depth of the face, cm
# Point in EG3D's world at which the cameras look, world units.
WORLD_CENTRE = np.array([0.0, 0.010, 0.173])
# The perspective fit ends when a step turns the face by less than this angle (radians).
_SMALLEST_STEP = 1e-10
_FIT_STEPS = 50  # greatest number of steps, rejected ones included


@dataclass(frozen=True, kw_only=True)
class CropFrame:
    """Square of a photograph that becomes a crop.

    A point (u, v) of a crop with `size` pixels per edge lies in the photograph at centre + width R(angle)
    ((u, v) / size - 1/2), where R turns the x axis of the crop towards the y axis of the photograph.
    """

    centre: tuple[float, float]  # (x, y) in pixels of the photograph
    width: float  # side of the square in pixels of the photograph
    # Angle from the x axis of the photograph to that of the crop in radians, clockwise as a person sees it.
    angle: float = 0.0

    def axes(self) -> np.ndarray:
        """Return the directions [2, 2] of the crop's x axis and y axis in the photograph, one in each row."""
        cosine = math.cos(self.angle)
        sine = math.sin(self.angle)
        # The photograph's y axis points down, so a positive angle is clockwise as a person sees it.
        return np.array([[cosine, sine], [-sine, cosine]])

    def to_photograph(self, crop_points: np.ndarray, size: int = CROP_SIZE) -> np.ndarray:
        """Map points [..., 2] of a crop with `size` pixels per edge to pixels of the photograph."""
        # * and @ are evaluated from left to right: offsets are scaled first, and then rotated.
        return np.asarray(self.centre) + (crop_points / size - 0.5) * self.width @ self.axes()

    def to_crop(self, photograph_points: np.ndarray, size: int = CROP_SIZE) -> np.ndarray:
        """Map points of the photograph to pixels of a crop, the inverse of `to_photograph`.

        Args:
            photograph_points: points [..., 2], or [..., 3] with a depth in pixels, which is only scaled.
            size: pixels per edge of the crop.
        """
        # The axes are orthonormal, so the transpose is the inverse of `to_photograph`.
        offsets = (photograph_points[..., :2] - self.centre) @ self.axes().T
        flat_points = (offsets / self.width + 0.5) * size
        return np.concatenate([flat_points, photograph_points[..., 2:] * (size / self.width)], axis=-1)


def five_points(landmarks: np.ndarray) -> np.ndarray:
    """Return the left eye, the right eye, the nose and both corners of the mouth, [5, D] of landmarks [L, D].

    Left and right are those of the photograph.
    """
    return np.stack(
        [
            landmarks[list(_LEFT_EYE)].mean(axis=0),
            landmarks[list(_RIGHT_EYE)].mean(axis=0),
            landmarks[_NOSE],
            landmarks[_MOUTH_CORNERS[0]],
            landmarks[_MOUTH_CORNERS[1]],
        ]
    )


def roll_of(points: np.ndarray) -> float:
    """Return the angle of a face in its photograph, radians, clockwise; 0 is upright.

    With e from eye to eye and m from the middle of the eyes to the middle of the mouth, it is the direction
    of e + (m_y, -m_x). Both terms point to the right in an upright face, so that neither a raised corner of
    the mouth nor a rotated head decides alone.

    Args: points: five points [5, 2] of the photograph, from `five_points`.
    """
    eye_line = points[1] - points[0]
    face_line = points[3:5].mean(axis=0) - points[:2].mean(axis=0)
    right = eye_line + np.array([face_line[1], -face_line[0]])
    return math.atan2(right[1], right[0])


def fit_crop(landmarks: np.ndarray, canonical: np.ndarray, keep_roll: bool = False) -> CropFrame:
    """Find EG3D's crop of a face.

    Args:
        landmarks: landmarks in pixels of the photograph, [L, 2] or [L, 3].
        canonical: landmarks of the canonical face in cm [L, 3].
        keep_roll: True: the sides of the crop are parallel to those of the photograph. False: the face is
            upright in the crop.
    Raises: ValueError if the landmarks lie in one point.
    """
    points = five_points(landmarks[:, :2])
    canonical_points = five_points(canonical)
    # Affine map of canonical points X to the photograph, x = A X + b: five equations for four unknowns in
    # each coordinate. Homogeneous rows (X, 1) make it one least-squares problem.
    homogeneous = np.concatenate([canonical_points, np.ones((5, 1))], axis=1)  # [5, 4]
    solution = np.linalg.lstsq(homogeneous, points, rcond=None)[0]  # [4, 2]
    # Mean length of the rows of A, one for x and one for y of the photograph.
    pixels_per_cm = float(np.linalg.norm(solution[:3], axis=0).mean())
    # `not >` is also True for NaN.
    if not pixels_per_cm > 1e-6:
        raise ValueError("the landmarks lie in one point, so there is no crop. Use a larger photograph.")
    centre = np.append(_CROP_CENTRE, 1) @ solution
    return CropFrame(
        centre=(float(centre[0]), float(centre[1])),
        width=_CROP_CM * pixels_per_cm,
        angle=0.0 if keep_roll else roll_of(points),
    )


def procrustes_rotation(canonical: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return the rotation R [3, 3] that minimises sum |s R X + t - x|^2 over R, a scale s and a shift t.

    The solution is that of Kabsch (doi:10.1107/S0567739476001873).

    Args:
        canonical: points X [L, 3].
        points: points x [L, 3], in any unit.
    """
    # The shift disappears with the means. The scale does not change which rotation is the best.
    covariance = (points - points.mean(axis=0)).T @ (canonical - canonical.mean(axis=0))
    return nearest_rotation(covariance)


def nearest_rotation(matrix: np.ndarray) -> np.ndarray:
    """Return the rotation [3, 3] with the largest trace of R^T M, which is the nearest one to a matrix M.

    Of the sum of two rotations it is their mean.
    """
    left, _, right = np.linalg.svd(matrix)
    # A negative determinant would be a reflection. The direction of the smallest singular value is rotated.
    sign = np.sign(np.linalg.det(left @ right))
    return left @ np.diag([1.0, 1.0, sign]) @ right


def _cross_matrix(vectors: np.ndarray) -> np.ndarray:
    """Return the matrices [..., 3, 3] of the cross products with vectors [..., 3]."""
    x, y, z = np.moveaxis(vectors, -1, 0)
    zero = np.zeros_like(x)
    return np.stack([zero, -z, y, z, zero, -x, -y, x, zero], axis=-1).reshape(*vectors.shape[:-1], 3, 3)


def _rotation_by(vector: np.ndarray) -> np.ndarray:
    """Return the rotation [3, 3] about a vector [3] by its length in radians (formula of Rodrigues)."""
    angle = float(np.linalg.norm(vector))
    # The axis of a zero vector is undefined. The first order is exact here up to rounding.
    if angle < 1e-12:
        return np.eye(3) + _cross_matrix(vector)
    axis = _cross_matrix(vector / angle)
    return np.eye(3) + math.sin(angle) * axis + (1 - math.cos(angle)) * axis @ axis


def perspective_rotation(
    canonical: np.ndarray, crop_points: np.ndarray, start: np.ndarray, size: int = CROP_SIZE
) -> np.ndarray:
    """Fit the rotation R and the position t that project the canonical face onto landmarks.

    It minimises sum |f (R X + t)_xy / (R X + t)_z + c - x|^2 by the method of Levenberg and Marquardt, with
    EG3D's focal length f = 4.2647 size and the principal point c in the middle of the crop.

    Args:
        canonical: points X of the canonical face in cm [L, 3].
        crop_points: landmarks x in pixels of the crop [L, 2].
        start: rotation at which the fit starts [3, 3].
        size: pixels per edge of the crop.
    Returns: R [3, 3], from the axes of the canonical face to those of the camera: x right, y down, z forward.
    """
    focal = FFHQ_FOCAL * size
    targets = (crop_points - size / 2) / focal  # [L, 2], tangents of the angles to the axis
    rotation = start
    rotated = canonical @ rotation.T
    # Start of the position: the distance at which the face has the size of the landmarks.
    spread = float(np.linalg.norm(targets - targets.mean(axis=0)))
    distance = np.linalg.norm((rotated - rotated.mean(axis=0))[:, :2]) / max(spread, 1e-12)
    position = np.append(targets.mean(axis=0) * distance, distance) - rotated.mean(axis=0)
    damping = 1e-3  # relative to the curvature; 0 would be the method of Gauss and Newton

    def residuals(points: np.ndarray) -> np.ndarray:
        """Return the differences [2 L] of the projections of camera points [L, 3] and the landmarks."""
        return (points[:, :2] / points[:, 2:] - targets).ravel()

    difference = residuals(rotated + position)
    for _ in range(_FIT_STEPS):
        x, y, z = (rotated + position).T
        # Derivative of the projection (x / z, y / z) with respect to the camera point [L, 2, 3].
        by_point = np.zeros((len(z), 2, 3))
        by_point[:, 0, 0] = 1 / z
        by_point[:, 1, 1] = 1 / z
        by_point[:, 0, 2] = -x / z**2
        by_point[:, 1, 2] = -y / z**2
        # A small turn w moves R X by w x R X, which is -[R X]_x w.
        by_turn = -by_point @ _cross_matrix(rotated)
        jacobian = np.concatenate([by_turn, by_point], axis=2).reshape(-1, 6)
        normal = jacobian.T @ jacobian
        # Turns (radians) and shifts (cm) have different units, so each is damped by its own curvature.
        step = np.linalg.solve(normal + damping * np.diag(np.diag(normal)), -jacobian.T @ difference)
        # The turn is about the camera's axes, so it stands on the left, as in `by_turn`.
        new_rotation = _rotation_by(step[:3]) @ rotation
        new_rotated = canonical @ new_rotation.T
        new_position = position + step[3:]
        # A camera inside the face sees some points from the back.
        is_better = (new_rotated + new_position)[:, 2].min() > 0
        if is_better:
            new_difference = residuals(new_rotated + new_position)
            is_better = float(new_difference @ new_difference) <= float(difference @ difference)
        if not is_better:
            # A larger damping gives a shorter step, nearer to the direction of the gradient.
            damping *= 10
            # Not even a tiny step reduces the error: this is the minimum up to rounding.
            if damping > 1e8:
                break
            continue
        # Rounding errors of successive products add up, and the matrix would not stay a rotation.
        rotation = nearest_rotation(new_rotation)
        rotated = canonical @ rotation.T
        position = new_position
        difference = residuals(rotated + position)
        damping = max(damping / 10, 1e-12)
        if np.abs(step[:3]).max() < _SMALLEST_STEP:
            break
    return rotation


def face_rotation(crop_landmarks: np.ndarray, canonical: np.ndarray) -> np.ndarray:
    """Estimate the rotation R [3, 3] from the axes of the canonical face to those of the camera.

    It is the mean of `perspective_rotation`, which uses only the photograph, and of `procrustes_rotation`,
    which also uses the depth of the landmarks. Their errors differ, and the mean has a smaller one than both.

    Args:
        crop_landmarks: landmarks [L, 3] in pixels of the crop, with the depth in the same unit.
        canonical: landmarks of the canonical face in cm [L, 3].
    """
    # Image axes x right, y down and depth away from the viewer are the camera's axes.
    by_depth = procrustes_rotation(canonical, crop_landmarks)
    by_projection = perspective_rotation(canonical, crop_landmarks[:, :2], by_depth)
    return nearest_rotation(by_depth + by_projection)


def camera_label(rotation: np.ndarray) -> np.ndarray:
    """Return EG3D's camera label [25] of a head whose rotation is known.

    With W = R^T, the rotation of cam2world, the camera stands at (0, .010, .173) - 2.7 W[:, 2], which is
    scaled to the length 2.7.

    Args: rotation: R [3, 3], from the axes of the head to those of the camera.
    """
    camera_to_world = rotation.T
    position = WORLD_CENTRE - FFHQ_RADIUS * camera_to_world[:, 2]
    pose = np.eye(4)
    pose[:3, :3] = camera_to_world
    # EG3D's labels have this distance from the origin, and not from the centre of the view.
    pose[:3, 3] = position * (FFHQ_RADIUS / np.linalg.norm(position))
    # Lengths are in sides of the image, so the principal point is at 0.5.
    intrinsics = np.array([[FFHQ_FOCAL, 0, 0.5], [0, FFHQ_FOCAL, 0.5], [0, 0, 1]])
    return np.concatenate([pose.ravel(), intrinsics.ravel()])


def angles_of(label: np.ndarray) -> tuple[float, float, float]:
    """Return yaw, pitch and roll of a camera label [25], in degrees.

    The signs are those of --camera: a positive yaw is a camera at the right of the head in a frontal
    photograph (its x is positive), a positive pitch a camera below the eyes. A positive roll is a head that
    is tilted clockwise in the photograph. Yaw is in -180..180 and pitch in -90..90.
    """
    assert label.shape == (LABEL_NUMBERS,)
    camera_to_world = label[:16].reshape(4, 4)[:3, :3]
    # The columns of cam2world are the camera's axes in the world.
    right, down, forward = camera_to_world.T
    # -forward points from the head to the camera.
    yaw = math.atan2(-forward[0], -forward[2])
    # asin raises for 1 + 1e-16, which rounding may give.
    pitch = math.asin(float(np.clip(forward[1], -1, 1)))
    # The world's up direction in the photograph: to the right by up_x and up by up_y. Of an upright head it
    # points straight up.
    up_x = right[1]
    up_y = -down[1]
    return math.degrees(yaw), math.degrees(pitch), math.degrees(math.atan2(up_x, up_y))
