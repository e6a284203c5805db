"""`poses_of`: faces of rendered heads in photographs of several kinds."""

import math

import numpy as np
import PIL.Image
import pytest

import eg3d_rlhf
from eg3d_rlhf.photographs.face_geometry import angles_of
from eg3d_rlhf.photographs.poses import open_photograph
from tests.photographs import heads
from tests.rejections import raising

CORNERS = np.array([[0.0, 0.0], [1, 0], [1, 1], [0, 1]])


def corner_error(frame, expected) -> float:
    """Mean distance of the corners, in pixels of a crop of 512, from expected corners [4, 2]."""
    distances = np.linalg.norm(frame.to_photograph(CORNERS, 1) - expected, axis=1)
    return float(distances.mean() / frame.width * 512)


def test_cameras_of_rendered_heads_are_found(portraits):
    front, side = eg3d_rlhf.poses_of(portraits)
    assert front.faces == side.faces == 1 and front.reason == side.reason == ""
    yaw, _, roll = front.poses[0].angles
    assert abs(yaw) < 4 and abs(roll) < 4
    assert abs(side.poses[0].angles[0] - 20) < 5
    assert front.poses[0].crop(front.image()).shape == (512, 512, 3)
    # the crop is narrower than 256 pixels, which is enlarged
    assert len(front.poses[0].warnings) == 1


@pytest.mark.parametrize("scale, degrees", [(0.7, 0), (1.6, 0), (1.0, 10), (1.0, 180)])
def test_the_crop_follows_a_head_that_is_pasted_elsewhere(portraits, scale, degrees):
    expected_pose = eg3d_rlhf.poses_of(portraits[:1])[0].poses[0]
    photograph, forward = heads.pasted(portraits[0], scale, degrees, (900, 700), (430, 350))
    pose = eg3d_rlhf.poses_of([photograph])[0].poses[0]
    corners = expected_pose.frame.to_photograph(CORNERS, 1) @ forward[:, :2].T + forward[:, 2]
    assert corner_error(pose.frame, corners) < 8
    assert pose.quarter_turns == (2 if degrees == 180 else 0)
    turn = pose.label[:16].reshape(4, 4)[:3, :3].T @ expected_pose.label[:16].reshape(4, 4)[:3, :3]
    assert math.degrees(math.acos(min((np.trace(turn) - 1) / 2, 1))) < 3


def test_the_roll_is_kept_on_request(portraits):
    photograph, _ = heads.pasted(portraits[0], 1.2, 15, (500, 500), (250, 250))
    upright, tilted = (eg3d_rlhf.poses_of([photograph], keep_roll=keep)[0].poses[0] for keep in (False, True))
    assert tilted.frame.angle == 0 and math.degrees(upright.frame.angle) == pytest.approx(15, abs=3)
    assert tilted.angles[2] - upright.angles[2] == pytest.approx(15, abs=3)
    assert np.allclose(tilted.frame.centre, upright.frame.centre)


def test_faces_are_chosen_by_their_size(portraits):
    photograph, _ = heads.pasted(portraits[0], 1.5, 0, (1000, 500), (750, 250))
    small = portraits[1].resize((200, 200))
    photograph.paste(small, (40, 100))
    largest, every, second = (
        eg3d_rlhf.poses_of([photograph], face=face)[0] for face in ("largest", "all", 2)
    )
    assert largest.faces == every.faces == 2
    assert [pose.number for pose in every.poses] == [1, 2] and second.poses[0].number == 2
    assert largest.poses[0].frame.centre[0] > 500 > second.poses[0].frame.centre[0]
    assert len(largest.warnings) == 1 and not every.warnings
    third = eg3d_rlhf.poses_of([photograph], face=3)[0]
    assert third.poses == () and third.reason


def test_unusable_pictures_have_a_reason_and_do_not_stop_the_others(portraits, tmp_path):
    (tmp_path / "text.png").write_text("no photograph")
    empty = PIL.Image.new("RGB", (300, 200), "grey")
    results = eg3d_rlhf.poses_of(
        [tmp_path / "text.png", empty, tmp_path / "missing.png", np.array(portraits[0])]
    )
    assert [bool(result.reason) for result in results] == [True, True, True, False]
    assert "text.png" in results[0].reason
    with raising("uint8"):
        open_photograph(np.zeros((2, 2)))


def test_a_cut_face_is_left_out(portraits):
    cut = portraits[0].crop((100, 0, 256, 256))
    pose = eg3d_rlhf.poses_of([cut])[0]
    assert not pose.poses or (pose.poses[0].outside > 0.15 and pose.poses[0].reason)


def test_a_small_face_is_left_out(portraits):
    photograph, _ = heads.pasted(portraits[0], 0.3, 0, (300, 300), (150, 150))
    (result,) = eg3d_rlhf.poses_of([photograph])
    assert result.poses[0].reason and result.poses[0].frame.width < 64


def test_other_choices_of_faces_are_rejected():
    for choice in ("0", "smallest", "-1", ""):
        with raising("--face"):
            eg3d_rlhf.poses_of([], face=choice)


def test_angles_follow_the_signs_of_the_flag_camera():
    """--camera=YAW,PITCH: a positive yaw is a camera at +x, a positive pitch a camera below."""
    pose = heads.pose_at(30, 20)
    label = np.concatenate([pose.ravel(), np.eye(3).ravel()])
    assert pose[0, 3] > 0 and pose[1, 3] < 0
    assert angles_of(label) == pytest.approx((30, 20, 0), abs=1e-6)
