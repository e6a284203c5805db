"""Crop, rotation and label of faces whose pose is known, on a canonical face that is made up."""

import math

import numpy as np
import pytest

from eg3d_rlhf.photographs import face_geometry as geometry
from eg3d_rlhf.photographs.face_geometry import CropFrame
from tests.photographs.heads import pose_at
from tests.rejections import raising
from training.camera_conventions import Scene
from training.camera_labels import camera_warning, check_numbers
from training.rendering.cameras import FFHQ_FOCAL

CORNERS = np.array([[0.0, 0.0], [512, 0], [512, 512], [0, 512]])


def made_up_face() -> np.ndarray:
    """Landmarks [468, 3] in cm: a bulging oval, with eyes, nose and mouth where a face has them."""
    rng = np.random.default_rng(0)
    x, y = rng.uniform(-1, 1, (2, 468)) * [[7], [8]]
    points = np.stack([x, y, 5 - (x / 5) ** 2 - (y / 8) ** 2], axis=1)
    for sign, eye in ((-1, (33, 133, 159, 145)), (1, (362, 263, 386, 374))):
        points[list(eye)] = [sign * 3.2, 2.6, 3.6] + rng.normal(0, 0.3, (4, 3))
    points[4] = [0.1, -0.5, 7.6]
    points[[61, 291]] = [[-2.5, -4.4, 4.3], [2.4, -4.3, 4.2]]
    return points


CANONICAL = made_up_face()


def head_rotation(yaw: float, pitch: float, roll: float) -> np.ndarray:
    """R [3, 3] of a head that a camera at angles in degrees sees tilted clockwise by `roll`."""
    angle = math.radians(roll)
    tilt = np.array(
        [[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]]
    )
    return tilt @ pose_at(yaw, pitch)[:3, :3].T


@pytest.mark.parametrize("angles", [(0, 0, 0), (35, -20, 8), (-70, 25, -30), (10, 5, 175)])
def test_a_perspective_view_gives_back_its_rotation(angles):
    rotation = head_rotation(*angles)
    camera_points = CANONICAL @ rotation.T + [0.7, -1.1, 104]
    pixels = camera_points[:, :2] / camera_points[:, 2:] * FFHQ_FOCAL * 512 + 256
    start = head_rotation(angles[0] + 20, angles[1] - 15, angles[2] + 10)
    fitted = geometry.perspective_rotation(CANONICAL, pixels, start)
    assert np.abs(fitted - rotation).max() < 1e-9


def test_a_similar_cloud_of_points_gives_back_its_rotation_and_no_reflection():
    rotation = head_rotation(25, -12, 6)
    assert (
        np.abs(
            geometry.procrustes_rotation(CANONICAL, 3.7 * CANONICAL @ rotation.T + [5, 6, 7]) - rotation
        ).max()
        < 1e-12
    )
    flat = CANONICAL * [1, 1, 0]
    assert np.linalg.det(geometry.procrustes_rotation(flat, flat * [1, -1, 1])) == pytest.approx(1)


def test_the_mean_of_two_rotations_lies_in_the_middle():
    mean = geometry.nearest_rotation(head_rotation(10, 0, 0) + head_rotation(30, 0, 0))
    assert np.abs(mean - head_rotation(20, 0, 0)).max() < 1e-12


def test_both_fits_agree_on_a_distant_face():
    """At a large distance the perspective fit and the depth see the same projection."""
    rotation = head_rotation(-18, 9, -4)
    landmarks = np.concatenate(
        [(CANONICAL @ rotation.T)[:, :2] * 20 + 256, (CANONICAL @ rotation.T)[:, 2:] * 20], axis=1
    )
    estimated = geometry.face_rotation(landmarks, CANONICAL)
    # An orthographic view seen as a perspective one errs by less than the angle of the face, 8 degrees.
    cosine = (np.trace(estimated.T @ rotation) - 1) / 2
    assert math.degrees(math.acos(min(cosine, 1))) < 3


@pytest.mark.parametrize("angles", [(0, 0, 0), (35, -20, 0), (-50, 15, 12)])
def test_labels_have_the_angles_of_the_camera(angles):
    label = geometry.camera_label(head_rotation(*angles))
    assert geometry.angles_of(label) == pytest.approx(angles, abs=1e-9)
    assert np.linalg.norm(label[3:12:4]) == pytest.approx(2.7)
    labels = label[None].astype(np.float32)
    check_numbers(labels, ["face"], "labels", "")
    assert camera_warning(labels, ["face"], "labels", Scene(), "") is None


def test_a_scaled_orthographic_view_gives_its_crop():
    """The affine fit is exact: the width is 512 / 21.135 cm, the centre that of the canonical face."""
    pixels_per_cm = 17.3
    points = CANONICAL[:, :2] * [pixels_per_cm, -pixels_per_cm] + [400, 300]
    # Turned by yaw, the rows of the affine map stay of equal length.
    rotation = head_rotation(30, 10, 0)
    turned = (CANONICAL @ rotation.T)[:, :2] * pixels_per_cm + [400, 300]
    centre = np.array([0, -0.3235, 2.4214])
    frame = geometry.fit_crop(points, CANONICAL)
    assert frame.centre == pytest.approx((400, 300 + 0.3235 * pixels_per_cm))
    turned_frame = geometry.fit_crop(turned, CANONICAL, keep_roll=True)
    assert turned_frame.centre == pytest.approx(tuple((rotation @ centre)[:2] * pixels_per_cm + [400, 300]))
    assert turned_frame.width == pytest.approx(512 / 21.135 * pixels_per_cm)
    assert turned_frame.angle == 0


@pytest.mark.parametrize("degrees", [-170, -90, -10, 0, 33, 90, 180])
def test_the_crop_follows_a_scaled_turned_and_shifted_picture(degrees):
    rng = np.random.default_rng(1)
    rotation = head_rotation(20, -8, 3)
    points = (CANONICAL @ rotation.T)[:, :2] * 15 + [300, 350] + rng.normal(0, 1.5, (468, 2))
    frame = geometry.fit_crop(points, CANONICAL)
    angle = math.radians(degrees)
    turn = 1.7 * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    moved = geometry.fit_crop(points @ turn.T + [-40, 900], CANONICAL)
    expected = frame.to_photograph(CORNERS) @ turn.T + [-40, 900]
    # The mean length of both rows changes a little with the turn, because noise makes them unequal.
    assert np.abs(moved.to_photograph(CORNERS) - expected).max() < 0.01 * moved.width
    assert np.abs(moved.to_crop(points @ turn.T + [-40, 900]) - frame.to_crop(points)).max() < 5


def test_the_roll_of_an_upright_face_is_zero_and_follows_a_turn():
    rotation = head_rotation(0, 0, 0)
    symmetric = CANONICAL.copy()
    symmetric[[33, 133, 159, 145]] = symmetric[[362, 263, 386, 374]] * [-1, 1, 1]
    symmetric[4, 0] = 0
    symmetric[61] = symmetric[291] * [-1, 1, 1]
    for roll in (-120, 0, 15, 90):
        points = geometry.five_points((symmetric @ (head_rotation(0, 0, roll)).T)[:, :2])
        assert math.degrees(geometry.roll_of(points)) == pytest.approx(roll, abs=1e-9)
    assert rotation[1, 1] == pytest.approx(-1)  # y of the head points up, y of the camera down


def test_points_of_a_crop_and_of_the_picture_are_inverse():
    frame = CropFrame(centre=(123.0, 77.0), width=345.0, angle=0.4)
    points = np.random.default_rng(0).uniform(0, 512, (9, 3))
    back = frame.to_crop(
        np.concatenate([frame.to_photograph(points[:, :2]), points[:, 2:] * 345 / 512], axis=1)
    )
    assert np.abs(back - points).max() < 1e-10
    assert np.allclose(frame.to_photograph(np.array([256.0, 256.0])), frame.centre)


def test_landmarks_in_one_point_have_no_crop():
    with raising("landmarks"):
        geometry.fit_crop(np.ones((468, 2)), CANONICAL)
