"""Photographs as targets of an inversion: their crop and camera, and images that are crops already."""

import numpy as np
import PIL.Image
import pytest
import torch

from eg3d_rlhf.evaluation.inversion import photograph
from eg3d_rlhf.evaluation.inversion.photograph import TargetPhoto, find_target, has_face_cameras
from eg3d_rlhf.evaluation.inversion.targets import case_from_file
from eg3d_rlhf.generators import camera
from eg3d_rlhf.photographs.crops import cut_crop
from eg3d_rlhf.photographs.poses import poses_of
from tests.photographs import heads
from tests.rejections import raising


@pytest.fixture(scope="module")
def portrait() -> PIL.Image.Image:
    """A head from 20 degrees at the right, 256 x 256 pixels."""
    return heads.render(heads.heads(1)[0], 20)


@pytest.fixture(scope="module")
def photo_path(portrait, tmp_path_factory):
    """A photograph of 500 x 400 pixels that shows this head."""
    photograph, _ = heads.pasted(portrait, 1.1, 8, (500, 400), (260, 190))
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    photograph.save(path)
    return path


def test_a_photograph_is_cropped_and_has_the_camera_of_its_face(generator, photo_path, tmp_path):
    target, notes = find_target(generator, photo_path)
    pose = poses_of([photo_path])[0].poses[0]
    assert target.frame == pose.frame and np.array_equal(target.label, pose.label)
    assert photograph.CROP_FILE in notes[0] and photograph.AXES_FILE in notes[0]
    case = case_from_file(generator, photo_path, None, target.camera(generator), target.frame)
    expected = cut_crop(PIL.Image.open(photo_path), pose.frame, generator.img_resolution)
    image = ((case.target.image[0].permute(1, 2, 0) + 1) * 127.5).round()
    assert torch.equal(image.byte(), torch.from_numpy(expected))
    assert np.allclose(case.target.camera[0].numpy(), pose.label, atol=1e-6)
    photograph.write_target(tmp_path, target, expected)
    assert np.array_equal(np.array(PIL.Image.open(tmp_path / photograph.CROP_FILE)), expected)
    assert (tmp_path / photograph.AXES_FILE).is_file()


def test_a_mask_is_cropped_with_its_photograph(generator, photo_path, tmp_path):
    target, _ = find_target(generator, photo_path)
    size = PIL.Image.open(photo_path).size
    mask = np.zeros(size[::-1], np.uint8)
    mask[:, : size[0] // 2] = 255
    PIL.Image.fromarray(mask).save(tmp_path / "mask.png")
    camera_label = target.camera(generator)
    case = case_from_file(generator, photo_path, tmp_path / "mask.png", camera_label, target.frame)
    expected = cut_crop(PIL.Image.fromarray(mask), target.frame, generator.img_resolution)
    assert np.allclose(case.target.mask[0, 0].numpy() * 255, expected)
    PIL.Image.new("L", (64, 64), 255).save(tmp_path / "other.png")
    with raising("--mask", "other.png"):
        case_from_file(generator, photo_path, tmp_path / "other.png", camera_label, target.frame)


def test_an_image_of_the_generators_size_is_never_cropped(generator, portrait, tmp_path):
    """An image that was a target before --camera could be left out gives the same target."""
    size = generator.img_resolution
    portrait.resize((size, size)).save(tmp_path / "small.png")
    # at 32 pixels no face is found, or its crop is too small: the frontal camera, as before
    assert find_target(generator, tmp_path / "small.png")[0] is None
    # a generator of the size of the portrait: only the camera is estimated
    portrait.save(tmp_path / "large.png")

    class Larger:
        img_resolution = 256

        def __getattr__(self, name):
            return getattr(generator, name)

    target, notes = find_target(Larger(), tmp_path / "large.png")
    assert target.frame is None and notes
    assert np.array_equal(target.label, poses_of([tmp_path / "large.png"])[0].poses[0].label)


def test_a_photograph_without_a_face_is_rejected(generator, tmp_path):
    PIL.Image.new("RGB", (300, 200), "teal").save(tmp_path / "wall.png")
    with raising("wall.png", "--camera"):
        find_target(generator, tmp_path / "wall.png")


def test_other_cameras_have_no_estimate(generator, photo_path, monkeypatch):
    assert has_face_cameras(generator)
    label = camera(generator).clone()
    label[:, 16] = 1.0
    monkeypatch.setattr(photograph, "camera_of", lambda _: label)
    assert not has_face_cameras(generator)
    with raising("500 x 400", "--camera"):
        find_target(generator, photo_path)


def test_a_resumed_run_reads_its_camera(photo_path, generator):
    target, _ = find_target(generator, photo_path)
    again = TargetPhoto.from_record(target.record())
    assert again.frame == target.frame and again.label == target.label
    whole = TargetPhoto(label=target.label, frame=None)
    assert TargetPhoto.from_record(whole.record()) == whole
