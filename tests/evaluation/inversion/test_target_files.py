"""Targets of an inversion that are image files of users."""

import numpy as np
import pytest
import torch
from PIL import Image

from eg3d_rlhf.evaluation.inversion.targets import case_from_file, parse_camera
from tests.rejections import raising


def stored(size: int) -> np.ndarray:
    """Pixels [size, size, 3] with a different value in each quarter."""
    pixels = np.full((size, size, 3), 200, np.uint8)
    pixels[: size // 2, : size // 2] = (10, 90, 170)
    pixels[size // 2 :, : size // 2] = (240, 30, 60)
    return pixels


def target(generator, path, mask=None):
    """The image [R, R, 3] in 0..255, and the weights [R, R] or None."""
    case = case_from_file(generator, path, mask, parse_camera(generator, None))
    image = ((case.target.image[0].permute(1, 2, 0) + 1) * 127.5).round().numpy()
    return image, None if case.target.mask is None else case.target.mask[0, 0].numpy()


def test_a_photograph_on_its_side_is_inverted_upright(generator, tmp_path):
    pixels = stored(generator.img_resolution)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(target(generator, tmp_path / "turned.png")[0], np.rot90(pixels, -1))


def test_sixteen_bits_and_transparency_are_seen_as_people_see_them(generator, tmp_path):
    size = generator.img_resolution
    Image.fromarray(np.full((size, size), 20000, np.uint16)).save(tmp_path / "grey.png")
    image, _ = target(generator, tmp_path / "grey.png")
    assert (image == round(20000 / 257)).all()
    # hidden black under full transparency
    Image.fromarray(np.zeros((size, size, 4), np.uint8)).save(tmp_path / "clear.png")
    assert (target(generator, tmp_path / "clear.png")[0] == 255).all()


def test_transparent_pixels_of_a_mask_have_no_weight(generator, tmp_path):
    size = generator.img_resolution
    Image.fromarray(stored(size)).save(tmp_path / "image.png")
    pixels = np.full((size, size, 4), 255, np.uint8)
    pixels[: size // 2, :, 3] = 0
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    weights = target(generator, tmp_path / "image.png", tmp_path / "mask.png")[1]
    assert (weights[: size // 2] == 0).all() and (weights[size // 2 :] == 1).all()
    deep = np.full((size, size), 65535, np.uint16)
    deep[:, : size // 2] = 0
    Image.fromarray(deep).save(tmp_path / "deep.png")
    weights = target(generator, tmp_path / "image.png", tmp_path / "deep.png")[1]
    assert (weights[:, : size // 2] == 0).all() and (weights[:, size // 2 :] == 1).all()


def test_unusable_files_are_named_with_their_flag(generator, tmp_path):
    size = generator.img_resolution
    Image.fromarray(stored(size)).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:-60])
    Image.fromarray(np.zeros((size, size), np.float32)).save(tmp_path / "depth.tif")
    (tmp_path / "photo.jpg").write_bytes(b"\x00\x00\x00\x18ftypheic" + bytes(99))
    for name in ("half.png", "depth.tif", "photo.jpg", "missing.png"):
        with raising("--image", str(tmp_path / name)):
            target(generator, tmp_path / name)
        with raising("--mask", str(tmp_path / name)):
            target(generator, tmp_path / "whole.png", tmp_path / name)


def test_the_size_of_a_photograph_is_stated_as_it_is_and_not_as_it_is_reduced(generator, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.new("L", (9000, 6000), 90) as image:
        image.save(tmp_path / "large.jpg", exif=exif)
    with raising("large.jpg", "6000 x 9000", str(generator.img_resolution)):
        target(generator, tmp_path / "large.jpg")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_cameras_of_windows_editors_are_read(generator, tmp_path, encoding):
    path = tmp_path / "camera.json"
    path.write_bytes("[0.3, -0.1]".encode(encoding))
    assert torch.equal(parse_camera(generator, str(path)), parse_camera(generator, "0.3,-0.1"))
