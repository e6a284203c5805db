"""Checks and cures of camera labels: good sets pass, every mistake is noticed, and the proposed cure gives
back the good labels.
"""

import numpy as np
import pytest

from tests import camera_sets
from tests.camera_sets import CURABLE, GOOD, IMPOSSIBLE, INCURABLE, TRANSPOSED_ROTATION, good_labels
from tests.rejections import raising
from training.camera_conventions import Scene, describe_cameras, diagnose, number_faults
from training.camera_cures import CURES, apply_cures
from training.camera_labels import camera_warning, label_array
from training.convert_settings import parse_cures

NAMES = [f"{i}.png" for i in range(50)]
SCENES = {
    "ffhq": Scene(
        pivot=(0, 0, 0.2), box_sides=(1, 1), radius=2.7, ray_range=(2.25, 3.3), pivot_tolerance=0.1
    ),
    "afhq": Scene(
        pivot=(0, 0, -0.06), box_sides=(1, 1), radius=2.7, ray_range=(2.25, 3.3), pivot_tolerance=0.1
    ),
    "sphere": Scene(box_sides=(1.6, 1.6), radius=1.7, ray_range=(0.1, 2.6), pivot_tolerance=0.1),
    "cars": Scene(box_sides=(1.6, 1.6), radius=1.7, ray_range=(0.1, 2.6), pivot_tolerance=0.1),
}


def checked(labels, scene=None):
    """The diagnosis of labels as they are read, in float32."""
    return diagnose(labels.astype(np.float32), NAMES[: len(labels)], scene or Scene())


@pytest.mark.parametrize("kind", GOOD)
def test_good_sets_pass(kind):
    for seed in range(5):
        labels = good_labels(kind, seed=seed)
        assert list(number_faults(labels)) == []
        assert checked(labels).findings == ()
        if kind in SCENES:
            assert checked(labels, SCENES[kind]).findings == ()
    # also a single image
    assert checked(good_labels(kind)[:1]).findings == ()


@pytest.mark.parametrize("kind", GOOD)
@pytest.mark.parametrize("mistake", CURABLE)
def test_the_proposed_cure_gives_back_the_labels(kind, mistake):
    good = good_labels(kind, seed=3)
    change, cures, scale = CURABLE[mistake]
    wrong = change(good)
    diagnosis = checked(wrong)
    assert diagnosis.findings or list(number_faults(wrong))
    assert (diagnosis.cures, diagnosis.scale) == (cures, scale)
    cured = apply_cures(wrong, diagnosis.cures, diagnosis.scale)
    np.testing.assert_allclose(cured, good, atol=1e-9)
    assert checked(cured).findings == ()


@pytest.mark.parametrize("kind", [kind for kind in GOOD if kind != "nearly-frontal"])
def test_transposed_rotations_are_found(kind):
    good = good_labels(kind, seed=3)
    change, cures, _ = TRANSPOSED_ROTATION
    diagnosis = checked(change(good))
    assert diagnosis.findings and diagnosis.cures == cures
    np.testing.assert_allclose(apply_cures(change(good), cures), good, atol=1e-12)


@pytest.mark.parametrize("mistake", INCURABLE)
@pytest.mark.parametrize("kind", ["ffhq", "afhq", "sphere"])
def test_other_mistakes_are_found_without_a_wrong_cure(kind, mistake):
    diagnosis = checked(INCURABLE[mistake](good_labels(kind, seed=3)))
    assert diagnosis.findings and diagnosis.cures is None and diagnosis.remedy


@pytest.mark.parametrize("mistake", IMPOSSIBLE)
def test_impossible_numbers_are_errors(mistake):
    change, texts = IMPOSSIBLE[mistake]
    labels = good_labels("ffhq")
    labels[7:] = change(labels)[7:]
    with raising("set.zip", "'7.png'", "43 of 50", *texts):
        label_array(labels.tolist(), NAMES, "set.zip: dataset.json", 25)


def test_errors_name_the_cure_where_one_helps():
    labels = CURABLE["all at once"][0](good_labels("ffhq"))
    with raising("Run X --fix-cameras=pixels,opengl --camera-scale=0.001", "'0.png'"):
        label_array(labels.tolist(), NAMES, "set.zip", 25, "Run X")
    # A camera that lies in no image set has no command that corrects it.
    with pytest.raises(ValueError) as caught:
        label_array(labels.tolist(), NAMES, "camera", 25)
    assert "--" not in str(caught.value)


def test_lengths_and_bad_values_are_named_at_once():
    labels = good_labels("ffhq").tolist()
    with raising("'0.png'", "25", "16", "intrinsics", "--labels=drop"):
        label_array([label[:16] for label in labels], NAMES, "set.zip", 25)
    labels[4][20] = float("nan")
    with raising("'4.png'", "finite"):
        label_array(labels, NAMES, "set.zip", 25)


def test_pixels_use_the_size_to_which_the_intrinsics_belong():
    good = good_labels("ffhq", n=3)
    good[:, [18, 21]] = [[0.5, 0.5], [0.45, 0.6], [0.4, 0.5]]  # crops off the centre
    sizes = np.array([[64, 64], [640, 480], [100, 300]], dtype=float)
    wrong = good.copy()
    wrong[:, 16:19] *= sizes[:, :1]
    wrong[:, 19:22] *= sizes[:, 1:]
    np.testing.assert_allclose(apply_cures(wrong, ["pixels"], sizes=sizes), good, atol=1e-12)
    # The images were resized to another size: only the principal point shows the original size.
    cured = apply_cures(wrong, ["pixels"], sizes=sizes / 8)
    np.testing.assert_allclose(cured[0], good[0], atol=1e-12)
    np.testing.assert_allclose(cured[:, [18, 21]], 0.5)
    # A set that mixes both kinds: labels that are right already stay as they are.
    mixed = np.concatenate([good, wrong])
    np.testing.assert_allclose(
        apply_cures(mixed, ["pixels"], sizes=np.concatenate([sizes, sizes])), [*good, *good], atol=1e-12
    )
    with raising("--fix-cameras", "0 0"):
        apply_cures(IMPOSSIBLE["no intrinsics"][0](good), ["pixels"])


def test_cures_are_applied_in_one_order():
    assert parse_cures(None) == () and parse_cures("opengl, pixels") == ("pixels", "opengl")
    labels = CURABLE["all at once"][0](camera_sets.change_poses(good_labels("afhq"), np.linalg.inv))
    np.testing.assert_array_equal(
        apply_cures(labels, ["opengl", "world2cam", "pixels"]),
        apply_cures(labels, ["pixels", "world2cam", "opengl"]),
    )
    with raising("--fix-cameras", "'gl'", *CURES):
        parse_cures("pixels,gl")


def test_a_wrong_cure_is_proposed_to_be_left_out():
    good = good_labels("ffhq")
    inverse = apply_cures(good, ["world2cam"])
    warning = camera_warning(inverse, NAMES, "set.zip", Scene(), "Write", good)
    assert warning is not None and "--fix-cameras" in warning
    diagnosis = diagnose(inverse, NAMES, Scene(), good)
    assert diagnosis.cures == () and diagnosis.scale == 1


def test_the_known_cube_decides_about_distances():
    labels = camera_sets.change_poses(good_labels("ffhq"), lambda P: camera_sets.moved(P, 1.5))
    # In a distance of 4, FFHQ's cube fills the image, but its renderer samples rays up to 3.3.
    assert checked(labels).findings == ()
    diagnosis = checked(labels, SCENES["ffhq"])
    assert (
        diagnosis.findings and diagnosis.cures == () and diagnosis.scale == pytest.approx(1 / 1.5, rel=0.05)
    )
    # cameras inside of the cube
    inside = camera_sets.change_poses(good_labels("sphere"), lambda P: camera_sets.moved(P, 0.4))
    assert checked(inside, SCENES["sphere"]).findings


def test_the_line_on_cameras_has_their_numbers():
    line = describe_cameras(good_labels("ffhq-near-pivot"), Scene(pivot=(0, 0, 0.05)))
    assert "4.26" in line and "0.00" in line
    low, high = (f"{value:.2f}" for value in (1.3, 1.7))
    line = describe_cameras(good_labels("sphere", n=2000), Scene())
    assert "1.50" in line and low in line and high in line
